"""Adds up the reports of a test run and says in a few lines how it went.

Usage: summarize_tests.py NAME=REPORT [NAME=REPORT ...]

REPORT is a folder with a `ctest.xml` (ctest's JUnit report) and GoogleTest's JSON reports, or the
JUnit report of pytest. Exits with 1 when anything failed, or when a report is missing or empty.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
import xml.etree.ElementTree as ElementTree

from source_hash import ROOT, has_cuda_kernels, source_hash


@dataclasses.dataclass
class Counts:
    """How many tests passed, failed and were skipped, and the names of those that failed."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    failures: list[str] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        text = f"{self.passed} passed, {self.failed} failed"
        return text + (f", {self.skipped} skipped" if self.skipped else "")

    def add(self, name: str, outcome: str) -> None:
        if outcome == "passed":
            self.passed += 1
        elif outcome == "skipped":
            self.skipped += 1
        else:
            self.failed += 1
            self.failures.append(name)


def read_googletest(path: pathlib.Path, counts: Counts) -> None:
    for suite in json.loads(path.read_text())["testsuites"]:
        for test in suite["testsuite"]:
            skipped = test.get("result") == "SKIPPED" or test.get("status") == "NOTRUN"
            outcome = "failed" if "failures" in test else "skipped" if skipped else "passed"
            counts.add(f"{suite['name']}.{test['name']}", outcome)


def read_junit(path: pathlib.Path) -> list[tuple[str, str]]:
    """The (name, outcome) pairs of a JUnit report."""
    tests = []
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        broken = case.find("failure") is not None or case.find("error") is not None
        skipped = case.find("skipped") is not None
        outcome = "failed" if broken else "skipped" if skipped else "passed"
        classname = case.get("classname", "")
        name = case.get("name", "")
        tests.append((f"{classname}::{name}" if classname != name else name, outcome))
    return tests


def read_report(path: pathlib.Path) -> Counts:
    counts = Counts()
    if path.is_dir():
        # A program that ends normally leaves a report of its own; of the others (a crash, a test
        # without GoogleTest) only ctest knows the outcome.
        for name, outcome in read_junit(path / "ctest.xml"):
            own = path / f"{name}.json"
            before = counts.failed
            if own.exists():
                read_googletest(own, counts)
            if not own.exists() or (outcome == "failed" and counts.failed == before):
                counts.add(name, outcome)
    else:
        for name, outcome in read_junit(path):
            counts.add(name, outcome)
    return counts


def gpu_warning() -> str:
    """A warning when the recorded GPU tests belong to other sources; empty when all is well."""
    if not has_cuda_kernels():
        return ""
    path = ROOT / "benchmarks" / "results" / "gpu-tests.json"
    if not path.exists():
        return "The CUDA kernels have no recorded GPU test run: `make gpu-test` on a GPU machine."
    recorded = json.loads(path.read_text())
    if recorded.get("failed"):
        return f"The recorded GPU test run had {recorded['failed']} failures."
    if recorded.get("source_hash") != source_hash():
        return (
            "The CUDA sources have changed since the recorded GPU test run "
            f"({recorded.get('date', 'no date')}): `make gpu-test` on a GPU machine."
        )
    return ""


def main(arguments: list[str]) -> int:
    total = Counts()
    ok = True
    print()
    for argument in arguments:
        name, _, report = argument.partition("=")
        try:
            counts = read_report(pathlib.Path(report))
        except (OSError, ElementTree.ParseError) as error:
            print(f"{name} tests: no report ({error})")
            ok = False
            continue
        print(f"{name} tests: {counts}")
        for failure in counts.failures:
            print(f"    failed: {failure}")
        ok = ok and counts.failed == 0 and counts.passed > 0
        total.passed += counts.passed
        total.failed += counts.failed
        total.skipped += counts.skipped
    warning = gpu_warning()
    if warning:
        line = "!" * 100
        print(f"{line}\n! {warning}\n{line}")
    print("Everything passed." if ok else "NOT everything passed.")
    print(f"Total: {total}")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
