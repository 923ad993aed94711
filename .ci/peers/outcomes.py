"""A pytest plugin for the suites of others: enable one host, and write down how each test ended."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import deq_phantom_plugin as dpp

# Of several reports of one test, such as those of subtests, the last in this order counts. A test
# of which a subtest fails as expected passes itself.
ORDER = ("skipped", "xpassed", "xfailed", "passed", "failed")
HOST, FILE = "DEQ_PHANTOM_PEERS_HOST", "DEQ_PHANTOM_PEERS_FILE"

outcomes: dict[str, str] = {}


def pytest_configure(config: pytest.Config) -> None:
    """Enable the host, if one is asked for."""
    if os.environ.get(HOST):
        dpp.enable(os.environ[HOST])


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Write down what counts of a test."""
    if report.when != "call" and report.passed:
        return
    new = report.outcome
    if hasattr(report, "wasxfail"):
        new = "xpassed" if report.passed else "xfailed"
    outcomes[report.nodeid] = max(outcomes.get(report.nodeid, new), new, key=ORDER.index)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hand all of it to whoever started pytest."""
    Path(os.environ[FILE]).write_text(json.dumps(outcomes))
