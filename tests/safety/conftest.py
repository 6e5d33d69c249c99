"""At the end of a run, a line per parser: how many inputs were tried."""

from typing import Any

import pytest

from tests.safety.hostile import TRIED


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["tried"] = TRIED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    for parser, counts in getattr(node, "workeroutput", {}).get("tried", {}).items():
        known = TRIED.setdefault(parser, [0, 0])
        known[:] = [known[0] + counts[0], known[1] + counts[1]]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if TRIED:
        terminalreporter.section("inputs tried")
    for parser, (inputs, accepted) in sorted(TRIED.items()):
        terminalreporter.write_line(f"{parser}: {inputs:,} inputs, {accepted:,} accepted")
