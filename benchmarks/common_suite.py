"""
transformers' own model tests (`ModelTesterMixin`) on hybrids, and on a native Llama under the same stand-ins. A test
that only skips its subtests counts as skipped. Fails where a test fails.
"""

import argparse
import sys
import time
from collections import defaultdict
from pathlib import Path

import pytest
from _shared import quiet, write


TESTS = Path(__file__).parents[1] / "tests"
sys.path.insert(0, str(TESTS))
from common_suite import FACTS, SUBJECTS  # noqa: E402


class Recorder:
    """A pytest plugin that keeps what became of every test and its subtests."""

    def __init__(self):
        self.subject, self.outcomes, self.seconds = {}, defaultdict(list), defaultdict(float)

    def pytest_collection_modifyitems(self, items: list) -> None:
        """Which of the subjects each test is about."""
        self.subject = {item.nodeid: item.cls.subject for item in items}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Outcome and, for a skip, its reason."""
        self.seconds[self.subject[report.nodeid]] += report.duration
        if report.when == "call" or report.outcome != "passed":
            reason = report.longrepr[2].removeprefix("Skipped: ") if report.outcome == "skipped" else None
            is_subtest = type(report) is not pytest.TestReport
            self.outcomes[report.nodeid].append((is_subtest, report.outcome, reason))

    def verdict(self, test: str) -> tuple[str, str | None]:
        """("passed" | "skipped" | "failed", the reason for a skip)."""
        found = self.outcomes[test]
        if any(outcome == "failed" for _, outcome, _ in found):
            return "failed", None
        skips = [reason for _, outcome, reason in found if outcome == "skipped"]
        if skips and not any(is_subtest and outcome == "passed" for is_subtest, outcome, _ in found):
            return "skipped", skips[0]
        return "passed", None

    def table(self, subject: str) -> dict:
        """Counts, and the tests behind every reason: facts about hybrids, and transformers' own reasons."""
        tests = [test for test, name in self.subject.items() if name == subject]
        verdicts = {test.rpartition("::")[2]: self.verdict(test) for test in tests}
        skips = defaultdict(list)
        for test, (outcome, reason) in verdicts.items():
            if outcome == "skipped":
                skips[reason].append(test)
        counts = {kind: sum(outcome == kind for outcome, _ in verdicts.values()) for kind in KINDS}
        return counts | {
            "seconds": round(self.seconds[subject], 1),
            "failures": [test for test, (outcome, _) in verdicts.items() if outcome == "failed"],
            "facts": {reason: tests for reason, tests in skips.items() if reason in FACTS},
            "reasons_of_transformers": {reason: tests for reason, tests in skips.items() if reason not in FACTS},
        }


KINDS = ("passed", "skipped", "failed")


def main() -> None:
    """Print the table and write `results/common_suite.json`; an error where a test fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    quiet()
    recorder, started = Recorder(), time.monotonic()
    options = ["-q", "-rN", "--tb=short", "-p", "no:cacheprovider", "--disable-warnings", f"--rootdir={TESTS.parent}"]
    status = pytest.main([str(TESTS / "test_common_suite.py"), *options], plugins=[recorder])
    tables = {subject: recorder.table(subject) for subject in SUBJECTS}

    print(f"\n{'subject':32}" + "".join(f"{kind:>9}" for kind in KINDS) + f"{'seconds':>9}")
    for subject, table in tables.items():
        print(f"{subject:32}" + "".join(f"{table[kind]:9}" for kind in KINDS) + f"{table['seconds']:9}")
    for title, key in (("Facts about hybrids", "facts"), ("Reasons of transformers", "reasons_of_transformers")):
        print(f"\n{title}:")
        rows = defaultdict(list)
        for subject, table in tables.items():
            for reason, tests in table[key].items():
                rows[reason].append(f"{subject}: {len(tests)}")
        for reason, counts in rows.items():
            print(f"  {reason}  ({', '.join(counts)})")
    write("common_suite", {"wall_seconds": round(time.monotonic() - started, 1), "subjects": tables})
    if status != pytest.ExitCode.OK:
        raise SystemExit(f"pytest ended with {status!r}")


if __name__ == "__main__":
    main()
