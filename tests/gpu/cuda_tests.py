"""Run the tests that need a GPU, and write what came of them as JSON.

    python tests/gpu/cuda_tests.py [--json PATH] [--select cuda] [FILE ...]

The selection is pytest's `-k`. Parametrised tests carry their device in their names, so `cuda` picks what runs there.
"""

import argparse
import time
from collections import Counter
from pathlib import Path

import pytest
from conditions import ROOT, conditions, default_device

from hf_specauf.records import write_record

# Where tests for CUDA lie. To collect the whole suite takes longer than to run these.
FILES = ["tests/gpu/test_on_device.py", "tests/test_blocks.py", "tests/test_head_loss.py"]


class Outcomes:
    """A pytest plugin: what became of each test."""

    def __init__(self):
        self.tests: list[dict] = []

    def pytest_runtest_logreport(self, report):
        # `call` is the test itself. A skip, or an error of a fixture, shows in `setup`.
        if report.when != "call" and report.passed:
            return
        test = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 3)}
        if report.failed:
            test["error"] = report.longreprtext[-2000:]
        self.tests.append(test)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", default=FILES)
    parser.add_argument("--select", default="cuda", help="pytest's -k")
    parser.add_argument("--json", type=Path, help="write the outcomes here")
    args = parser.parse_args(argv)
    outcomes = Outcomes()
    begin = time.perf_counter()
    files = [str(ROOT / name) for name in args.files]
    # the checkout may be read-only or thrown away, so pytest's cache is left out
    words = ["-p", "no:cacheprovider", "-k", args.select, *files]
    code = int(pytest.main(words, plugins=[outcomes]))
    counts = Counter(test["outcome"] for test in outcomes.tests)
    record = conditions(default_device()) | {"headline": "", "exit_code": code, "seconds": time.perf_counter() - begin}
    record |= {name: counts[name] for name in ("passed", "failed", "skipped")}
    record["headline"] = f"{counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped"
    record["tests"] = outcomes.tests
    if args.json is not None:
        write_record(args.json, record)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
