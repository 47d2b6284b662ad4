"""The session that runs cases, and the table of rows at the end."""

from __future__ import annotations

from collections import defaultdict

import pytest

from faults import catalogue
from faults.runner import Session

VERDICTS = pytest.StashKey[dict[str, list[tuple[str, float, str]]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--table", action="store_true", help="Run slow cases too, and print the table of rows.")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[VERDICTS] = defaultdict(list)


@pytest.fixture(scope="session")
def faults():
    """What runs cases."""
    session = Session()
    yield session
    session.close()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    report = yield
    case = getattr(item, "callspec", None) and item.callspec.params.get("case")
    if case is not None and (report.when == "call" or report.outcome != "passed"):
        word = "open" if report.outcome == "skipped" and hasattr(report, "wasxfail") else report.outcome
        item.config.stash[VERDICTS][case.row].append((word, report.duration, getattr(report, "wasxfail", "")))
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    told = config.stash[VERDICTS]
    if not config.getoption("--table") or not told:
        return
    write = terminalreporter.write_line
    terminalreporter.section("the catalogue")
    passed = 0
    for row, meaning in catalogue.ROWS.items():
        verdict, reasons = _verdict(told.get(row, []))
        passed += verdict == "ok"
        seconds = sum(took for _, took, _ in told.get(row, []))
        write(f"{row:5} {verdict:8} {len(told.get(row, [])):4} cases {seconds:7.1f} s  {meaning}")
        for reason in reasons:
            write(f"{'':15}open: {reason}")
    write(f"{passed} of {len(catalogue.ROWS)} rows pass")


def _verdict(told: list[tuple[str, float, str]]) -> tuple[str, list[str]]:
    """One word for a row, and what is open in it."""
    words = {word for word, _, _ in told}
    if "failed" in words:
        return "FAILED", []
    reasons = sorted({reason for word, _, reason in told if word == "open"})
    if reasons or not told:
        return "open", reasons or ["not run"]
    return ("ok", []) if "passed" in words else ("skipped", [])
