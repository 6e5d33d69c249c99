"""What a check has found, as a table for people, Markdown, JUnit and verify.json."""

import json
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nanogpt.files import write_text

IDENTICAL, TOLERATED, DECLARED = "identical", "within tolerance", "changed, as dvc.lock says"
DIVERGED, MISSING, ENVIRONMENT_CHANGED, SKIPPED = "DIVERGED", "MISSING", "environment changed", "skipped"
_CODES = {DIVERGED: 1, MISSING: 1, ENVIRONMENT_CHANGED: 2}
_JUNIT = {DIVERGED: "failure", MISSING: "failure", ENVIRONMENT_CHANGED: "skipped", SKIPPED: "skipped"}


@dataclass(frozen=True)
class Finding:
    """One thing that was compared. `expected` and `found` are hashes or values."""

    stage: str
    artifact: str
    expected: str
    found: str
    verdict: str


@dataclass
class Report:
    """All that one check has found; `error` if it could not be run."""

    layer: str
    commit: str
    findings: list[Finding] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    environment_differs: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    error: str = ""

    @property
    def exit_code(self) -> int:
        """0: identical or within the stated tolerance; 1: diverged; 2: could not be run, or not be compared."""
        codes = {_CODES.get(finding.verdict, 0) for finding in self.findings}
        if self.error or not self.findings:
            return 2
        return 1 if 1 in codes else max(codes)

    @property
    def verdict(self) -> str:
        if self.exit_code == 2:
            return "could not be run" if self.error or not self.findings else ENVIRONMENT_CHANGED
        worst = {finding.verdict for finding in self.findings}
        if self.exit_code == 1:
            return "DIVERGED" if DIVERGED in worst else "INCOMPLETE"
        return next((name for name in (TOLERATED, DECLARED) if name in worst), IDENTICAL)

    def table(self) -> str:
        rows = [("stage", "artifact", "expected", "found", ""), *(self._cells(finding) for finding in self.findings)]
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, *self._tail()])

    def markdown(self) -> str:
        lines = [f"## {self.layer}: {self.verdict}", "", f"Commit `{self.commit}`", ""]
        lines += ["| stage | artifact | expected | found | |", "|---|---|---|---|---|"]
        lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in self._cells(f)) + " |" for f in self.findings]
        return "\n".join([*lines, "", *(f"- {line}" for line in self._tail() if line)]) + "\n"

    def _cells(self, finding: Finding) -> tuple[str, str, str, str, str]:
        return (finding.stage, finding.artifact, finding.expected[:16], finding.found[:16], finding.verdict)

    def _tail(self) -> list[str]:
        differs = [f"environment: {line}" for line in self.environment_differs]
        return ["", *differs, *self.notes, *([self.error] if self.error else []), f"{self.layer}: {self.verdict}"]

    def junit(self) -> bytes:
        suite = ElementTree.Element("testsuite", name=f"verify {self.layer}")
        for finding in self.findings:
            case = ElementTree.SubElement(suite, "testcase", classname=finding.stage, name=finding.artifact)
            if kind := _JUNIT.get(finding.verdict):
                text = f"{finding.verdict}: expected {finding.expected}, found {finding.found}"
                notes = "\n".join(self.notes) if kind == "failure" else None
                ElementTree.SubElement(case, kind, message=text).text = notes
        if self.error:
            case = ElementTree.SubElement(suite, "testcase", classname=self.layer, name="run")
            ElementTree.SubElement(case, "error", message=self.error)
        counted = {"tests": "testcase", "failures": "failure", "skipped": "skipped", "errors": "error"}
        for total, kind in counted.items():
            suite.set(total, str(len(suite.findall(f".//{kind}"))))
        document: bytes = ElementTree.tostring(suite, encoding="utf-8", xml_declaration=True)
        return document

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "verdict": self.verdict}


def write_reports(report: Report, folder: Path) -> None:
    """report.md, junit.xml, and verify.json, a list to which every machine's check of the same commit adds its own."""
    write_text(folder / "report.md", report.markdown())
    write_text(folder / "junit.xml", report.junit().decode())
    collected = _joined(report, folder / "verify.json")
    write_text(folder / "verify.json", json.dumps(collected, sort_keys=True, indent=1) + "\n")


def _joined(report: Report, path: Path) -> list[dict[str, Any]]:
    try:
        others = json.loads(path.read_bytes())
    except (OSError, ValueError):
        others = []
    others = others if isinstance(others, list) else []
    mine = report.as_dict()
    same = {name: mine[name] for name in ("layer", "commit", "environment")}
    kept = [other for other in others if isinstance(other, dict) and not same.items() <= other.items()]
    return [*kept, mine]
