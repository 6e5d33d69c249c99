import json
import xml.etree.ElementTree as ElementTree

import pytest

from tracking.verdict import (
    DECLARED,
    DIVERGED,
    ENVIRONMENT_CHANGED,
    IDENTICAL,
    MISSING,
    SKIPPED,
    STALE,
    TOLERATED,
    Finding,
    Report,
    write_reports,
)


def report(*verdicts: str, **fields) -> Report:
    found = [Finding("train", f"artifact {i}", "a" * 40, "b|b", verdict) for i, verdict in enumerate(verdicts)]
    return Report("full", "c" * 40, found, {"torch": "2.13.0"}, **fields)


@pytest.mark.parametrize(
    ("verdicts", "code", "verdict"),
    [
        ([IDENTICAL, IDENTICAL], 0, "identical"),
        ([IDENTICAL, SKIPPED], 0, "identical"),
        ([IDENTICAL, TOLERATED], 0, "within tolerance"),
        ([IDENTICAL, DECLARED], 0, "changed, as dvc.lock says"),
        ([TOLERATED, DIVERGED], 1, "DIVERGED"),
        ([IDENTICAL, MISSING], 1, "INCOMPLETE"),
        ([IDENTICAL, STALE, MISSING], 1, "STALE"),
        ([DIVERGED, ENVIRONMENT_CHANGED], 1, "DIVERGED"),
        ([ENVIRONMENT_CHANGED], 2, "environment changed"),
        ([], 2, "could not be run"),
    ],
)
def test_the_worst_finding_decides(verdicts, code, verdict):
    assert report(*verdicts).exit_code == code
    assert report(*verdicts).verdict == verdict
    assert report(*verdicts).table().endswith(f"full: {verdict}")


def test_a_table_shortens_hashes_and_shows_what_has_changed_in_words():
    words = "params.yaml train.weight_decay modified"
    found = [
        Finding("train", "dvc.lock", "up to date", words, STALE),
        Finding("train", "model", "a" * 32, "", DIVERGED),
    ]
    table = Report("lock", "c" * 40, found).table()
    assert words in table
    assert f" {'a' * 16} " in table


def test_an_error_is_neither_a_success_nor_a_divergence():
    assert report(IDENTICAL, error="no git").exit_code == 2
    assert "no git" in report(error="no git").table()


def test_the_table_and_the_markdown_are_complete(tmp_path):
    checked = report(IDENTICAL, DIVERGED, notes=["first at step 5"], environment_differs=["torch 1 -> 2"])
    for text in (checked.table(), checked.markdown()):
        for part in ("a" * 16, "artifact 1", "DIVERGED", "first at step 5", "environment: torch 1 -> 2"):
            assert part in text
    assert r"b\|b" in checked.markdown()


def test_junit_counts_its_test_cases():
    suite = ElementTree.fromstring(report(IDENTICAL, DIVERGED, MISSING, SKIPPED, error="no <git>").junit())
    assert suite.attrib == {"name": "verify full", "tests": "5", "failures": "2", "skipped": "1", "errors": "1"}
    assert [case.get("name") for case in suite] == [*(f"artifact {i}" for i in range(4)), "run"]
    assert suite[4][0].get("message") == "no <git>"


def test_verify_json_collects_the_checks_of_several_machines(tmp_path):
    first, second = report(IDENTICAL), report(TOLERATED)
    second.environment = {"torch": "2.14.0"}
    for each in (first, second, first):
        write_reports(each, tmp_path)
    kept = json.loads((tmp_path / "verify.json").read_text())
    assert [(entry["environment"]["torch"], entry["verdict"]) for entry in kept] == [
        ("2.14.0", "within tolerance"),
        ("2.13.0", "identical"),
    ]
    assert (tmp_path / "report.md").read_text() == first.markdown()
    (tmp_path / "verify.json").write_text("}{")
    write_reports(first, tmp_path)
    assert len(json.loads((tmp_path / "verify.json").read_text())) == 1
