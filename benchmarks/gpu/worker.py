"""A worker of the pool: collects the tests once, then runs those whose ids come in, one line each.

Answers with lines of JSON on what was its standard output; everything else that is printed goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any, TextIO

import pytest

# In the text of a failure: CUDA refuses every later call of this process. Being out of memory is not such an error.
STICKY = ("CUDA error", "CUDA_ERROR_", "Triton Error [CUDA]", "cudaError")
MOST_TEXT = 4000  # characters of a failure that are kept


class Worker:
    """A plugin for pytest, in place of its loop over the tests."""

    def __init__(self, orders: TextIO, answers: TextIO) -> None:
        self._orders, self._answers = orders, answers
        self._reports: list[pytest.TestReport] = []
        self._errors: list[str] = []

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._errors.append(str(report.longrepr))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._reports.append(report)

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        items = {item.nodeid: item for item in session.items}
        self._answer(ids=list(items), errors=self._errors)
        for line in self._orders:
            item = items[line.rstrip("\n")]
            start = time.monotonic()
            self._reports.clear()
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
            outcome, text = outcome_of(self._reports)
            late = _settle()
            if late is not None:
                outcome, text = "failed", f"{text}\nafter the test: {late}"
            sticky = late is not None or (outcome == "failed" and any(words in text for words in STICKY))
            seconds = round(time.monotonic() - start, 2)
            self._answer(outcome=outcome, text=text[-MOST_TEXT:], seconds=seconds, sticky=sticky)
        return True

    def _answer(self, **message: Any) -> None:
        self._answers.write(json.dumps(message) + "\n")
        self._answers.flush()


def outcome_of(reports: list[pytest.TestReport]) -> tuple[str, str]:
    """How a test ended, from the reports of its set-up, its call and its teardown, and what they say."""
    failed = [report for report in reports if report.failed]
    if failed:
        return "failed", "\n".join(f"{report.when}: {report.longreprtext}" for report in failed)
    for report in reports:
        if report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
            return "skipped", str(reason)
    return "passed", ""


def _settle() -> str | None:
    """Wait for the device: an error of what the test has launched belongs to this test, not to the next."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    try:
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def main() -> int:
    # Before pytest takes these files for its own.
    orders, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return int(pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[1:]], plugins=[Worker(orders, answers)]))


if __name__ == "__main__":
    sys.exit(main())
