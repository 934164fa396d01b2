# Two commands: `make quickstart` and `make test`. Both set up .venv first; PYTHON picks the interpreter (3.11 or newer).
# Versions are held by .ci/newest.txt and .ci/oldest.txt, so that small CPU builds are tested and nothing moves unseen.
PYTHON ?= python3
BIN := .venv/bin
OLDEST := .venv-oldest/bin

.PHONY: quickstart test test-newest test-oldest lint clean

quickstart: .venv/installed
	$(BIN)/python -m hf_specauf.quickstart

test: lint test-newest test-oldest

# Each suite is told where the other version is: what is made by one must work on the other. Two test processes keep two
# cores busy. A file's tests stay together, because they share what is dear to make; files start in their order, because
# the slow ones come early in it.
PYTEST := python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder --durations 25

test-newest: .venv/tested .venv-oldest/tested
	SPECAUF_OTHER_PYTHON=$(CURDIR)/$(OLDEST)/python $(BIN)/$(PYTEST)

test-oldest: .venv/tested .venv-oldest/tested
	SPECAUF_OTHER_PYTHON=$(CURDIR)/$(BIN)/python $(OLDEST)/$(PYTEST) -m "internals and not own"

lint: .venv/tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/installed: pyproject.toml .ci/newest.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint .ci/newest.txt --editable .
	touch $@

.venv/tested: .venv/installed
	$(BIN)/python -m pip install --quiet --constraint .ci/newest.txt --editable '.[dev]'
	touch $@

.venv-oldest/tested: pyproject.toml .ci/oldest.txt
	$(PYTHON) -m venv .venv-oldest
	$(OLDEST)/python -m pip install --quiet --upgrade pip
	$(OLDEST)/python -m pip install --quiet --constraint .ci/oldest.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv .venv-oldest out dist build
