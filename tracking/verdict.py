"""The result of a check, as a table for people, Markdown, JUnit and verify.json."""

import json
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nanogpt.files import write_json, write_text

IDENTICAL, TOLERATED, DECLARED = "identical", "within tolerance", "changed, as dvc.lock says"
DIVERGED, STALE, MISSING = "DIVERGED", "STALE", "MISSING"
ENVIRONMENT_CHANGED, SKIPPED = "environment changed", "skipped"
_CODES = {DIVERGED: 1, STALE: 1, MISSING: 1, ENVIRONMENT_CHANGED: 2}
_JUNIT = {DIVERGED: "failure", STALE: "failure", MISSING: "failure", ENVIRONMENT_CHANGED: "skipped", SKIPPED: "skipped"}
_HASH = re.compile(r"[0-9a-f]{32,}(\.dir)?")
_LONGEST = 100  # characters of a cell


@dataclass(frozen=True)
class Finding:
    """One comparison. `expected` and `found` are hashes or values."""

    stage: str
    artifact: str
    expected: str
    found: str
    verdict: str

    @property
    def cells(self) -> tuple[str, str, str, str, str]:
        return (self.stage, self.artifact, _short(self.expected), _short(self.found), self.verdict)


def _short(value: str) -> str:
    """The first digits of a hash; other values whole, unless they are very long."""
    if _HASH.fullmatch(value):
        return value[:16]
    return value if len(value) <= _LONGEST else f"{value[: _LONGEST - 1]}…"


@dataclass
class Report:
    """All findings of one check; `error` if it could not be run."""

    layer: str
    commit: str
    findings: list[Finding] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    environment_differs: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    error: str = ""

    @property
    def exit_code(self) -> int:
        """0: identical or within the stated tolerance; 1: diverged; 2: could not be run or compared."""
        codes = {_CODES.get(finding.verdict, 0) for finding in self.findings}
        if self.error or not self.findings:
            return 2
        return 1 if 1 in codes else max(codes)

    @property
    def verdict(self) -> str:
        if self.exit_code == 2:
            return "could not be run" if self.error or not self.findings else ENVIRONMENT_CHANGED
        verdicts = {finding.verdict for finding in self.findings}
        if self.exit_code == 1:
            return next((name for name in (DIVERGED, STALE) if name in verdicts), "INCOMPLETE")
        return next((name for name in (TOLERATED, DECLARED) if name in verdicts), IDENTICAL)

    def table(self) -> str:
        rows = [("stage", "artifact", "expected", "found", ""), *(finding.cells for finding in self.findings)]
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, *self._tail()])

    def markdown(self) -> str:
        lines = [f"## {self.layer}: {self.verdict}", "", f"Commit `{self.commit}`", ""]
        lines += ["| stage | artifact | expected | found | |", "|---|---|---|---|---|"]
        lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in f.cells) + " |" for f in self.findings]
        return "\n".join([*lines, "", *(f"- {line}" for line in self._tail() if line)]) + "\n"

    def _tail(self) -> list[str]:
        differs = [f"environment: {line}" for line in self.environment_differs]
        return ["", *differs, *self.notes, *([self.error] if self.error else []), f"{self.layer}: {self.verdict}"]

    def junit(self) -> str:
        suite = ElementTree.Element("testsuite", name=f"verify {self.layer}")
        for finding in self.findings:
            case = ElementTree.SubElement(suite, "testcase", classname=finding.stage, name=finding.artifact)
            if kind := _JUNIT.get(finding.verdict):
                message = f"{finding.verdict}: expected {finding.expected}, found {finding.found}"
                notes = "\n".join(self.notes) if kind == "failure" else None
                ElementTree.SubElement(case, kind, message=message).text = notes
        if self.error:
            case = ElementTree.SubElement(suite, "testcase", classname=self.layer, name="run")
            ElementTree.SubElement(case, "error", message=self.error)
        counted = {"tests": "testcase", "failures": "failure", "skipped": "skipped", "errors": "error"}
        for total, kind in counted.items():
            suite.set(total, str(len(suite.findall(f".//{kind}"))))
        return ElementTree.tostring(suite, encoding="unicode")

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "verdict": self.verdict}


def write_reports(report: Report, folder: Path) -> None:
    """Writes report.md, junit.xml and verify.json, a list to which each machine that checks a commit adds a report."""
    write_text(folder / "report.md", report.markdown())
    write_text(folder / "junit.xml", report.junit())
    write_json(folder / "verify.json", _joined(report, folder / "verify.json"))


def _joined(report: Report, path: Path) -> list[dict[str, Any]]:
    """The reports in the file, except one of the same check, and this report."""
    try:
        others = json.loads(path.read_bytes())
    except (OSError, ValueError):
        others = []
    added = report.as_dict()
    same = {name: added[name] for name in ("layer", "commit", "environment")}
    kept = [other for other in others if isinstance(other, dict) and not same.items() <= other.items()]
    return [*kept, added]
