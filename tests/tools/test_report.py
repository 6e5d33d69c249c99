import csv
import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from ruamel.yaml import YAML

from tests.conftest import BUILT_IN, REPOSITORY
from tests.runs import scored_run
from tests.tools.test_compare import Page, two_settings
from tools.__main__ import main
from tools.report_curves import read_reference
from tracking.run_name import SEED


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with three seeds of two settings, and a run that is not reported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    two_settings(tmp_path)
    scored_run(tmp_path, "forgotten", 1.95, params={"train.muon_learning_rate": 0.03})
    return tmp_path


def report(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(main, ["report", *arguments])
    assert result.exit_code == code, result.output
    return result


def test_the_report_says_what_was_run_and_where_each_number_comes_from(root: Path) -> None:
    assert (
        report("slow-*", "fast-*").stdout == "build/report: report.md, report.html, table.tex, report.json, figures/\n"
    )
    text = (root / "build/report/report.md").read_text()
    for shown in (
        "Made by `python -m tools report 'slow-*' 'fast-*'`.",
        "| 0.02 | 3 | 2.0200 ± 0.0265 |",
        "| +0.1000 | [+0.0427, +0.1573] | p=0.0033 | worse |",
        "| searched: muon_learning_rate | 0.02 to 0.04; tried 0.02, 0.04 |",
        "| chosen | the setting with the lowest mean of the losses reported here, so this mean is likely too low |",
        "| not reported | 1 other finished run on this text |",
        "| text | grammar; 30 documents, 8,000 bytes to train on; 3 documents, 900 bytes to validate |",
        "| seeds | 1, 2, 3 |",
        "| software | python 3.11, determinism unknown |",
        "| code | commit aaaaaaa |",
        "| muon_learning_rate=0.04 | unknown | unknown | 0.4 ± 0.0 s |",
        "| tokenize.tokenizer | bpe |",
    ):
        assert shown in text, shown
    assert (
        len(re.findall(r"\| \d\.\d{6} \| aaaaaaa \| [0-9a-f]{16} \| python -m tools lineage [0-9a-f]{12} \|", text))
        == 6
    )


def test_the_figure_has_its_data_and_is_the_same_each_time(root: Path) -> None:
    report("slow-*", "fast-*")
    figures = root / "build/report/figures"
    picture = (figures / "loss-1.svg").read_bytes()
    rows = list(csv.DictReader((figures / "loss-1.csv").open()))
    assert {row["setting"] for row in rows} == {"muon_learning_rate=0.04", "muon_learning_rate=0.02"}
    assert rows[0] | {"standard_deviation": ""} == {
        **{"setting": "muon_learning_rate=0.04", "tokens": "5120.0", "val_loss": "4.0", "standard_deviation": ""}
    }
    report("slow-*", "fast-*")
    assert (figures / "loss-1.svg").read_bytes() == picture


def test_the_table_for_latex(root: Path) -> None:
    report("slow-*", "fast-*", "--baseline", "slow-1")
    lines = (root / "build/report/table.tex").read_text().splitlines()
    assert lines[4].startswith(r"muon\_learning\_rate & seeds & val loss &")
    assert r"1.9200 $\pm$ 0.0200" in lines[6]
    assert "99 \\% interval" in lines[4]
    assert all(line.count(" & ") == lines[4].count(" & ") for line in lines[6:8])


def test_the_page_stands_alone_and_json_has_all(root: Path) -> None:
    content = json.loads(report("slow-*", "fast-*", "--json").stdout)
    page = Page((root / "build/report/report.html").read_text())
    assert page.addresses == []
    for shown in ("What was run", "8,000 bytes to train on", "Parameters that all settings share", "worse"):
        assert shown in page.text, shown
    (found,) = content["comparisons"]
    assert found["facts"]["seeds"] == "1, 2, 3"
    assert found["costs"][0]["setting"] == "muon_learning_rate=0.04"
    assert [run["model_sha256"] for run in found["settings"][0]["runs"]]
    assert content == json.loads((root / "build/report/report.json").read_text())


def test_a_reference_says_whether_a_loss_is_normal(root: Path) -> None:
    assert "presets/curves/usual.json is written; commit it" in report("slow-*", "--save-reference", "usual").stderr
    scored_run(root, "mine", 2.03, seed=9)
    scored_run(root, "odd", 2.6, seed=9, params={"train.batch_size": 2})
    scored_run(root, "other-text", 2.6, params={"download.documents": 3}, profile={"sha256": "f" * 64})
    report("mine", "odd")
    text = (root / "build/report/report.md").read_text()
    assert re.search(
        r"usual: 2\.0200 ± 0\.0265 \(3 seeds, commit a{12}\) \| \+0\.0100, within its range \(.+\) \| nothing \|",
        text,
    )
    assert re.search(r"\| \+0\.5800, above its range \(± 0\.131\d\) \| train\.batch_size \|", text)
    page = (root / "build/report/report.html").read_text()
    assert "Beside the references" in page
    (address,) = Page(page).addresses
    assert str(address).startswith("data:image/svg+xml;base64,")
    assert "reference usual" in (root / "build/report/figures/loss-1.csv").read_text()
    report("other-text")
    assert "usual" not in (root / "build/report/report.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, "Missing argument"),
        (("slaw-1",), 1, "no finished run is 'slaw-1'"),
        (("slow-*", "fast-*", "--save-reference", "x"), 1, "takes the runs of one setting, and these are 2"),
        (("slow-*", "--save-reference", "../x"), 1, "--save-reference '../x' is invalid"),
    ],
)
def test_errors_come_before_any_file(root: Path, arguments: tuple[str, ...], code: int, message: str) -> None:
    assert message in report(*arguments, code=code).stderr
    assert not (root / "build").exists()


def test_a_damaged_reference_is_named(root: Path) -> None:
    report("slow-*", "--save-reference", "usual")
    (root / "presets/curves/usual.json").write_text("{}")
    assert "usual.json is damaged" in report("slow-*", code=1).stderr


def test_the_references_that_are_committed_are_of_presets() -> None:
    found = [read_reference(path) for path in (REPOSITORY / "presets/curves").glob("*.json")]
    assert {each.name for each in found} == {"default", "shakespeare_cpu", "shakespeare_speedrun"}
    assert all(len(each.losses) >= 3 and each.losses.keys() == each.models.keys() for each in found)
    sections = YAML(typ="safe").load(BUILT_IN.read_text(encoding="utf-8"))
    trained = ("download", "tokenize", "model", "train", "numerics")
    keys = {f"{section}.{name}" for section in trained for name in sections[section]} - {SEED}
    for each in found:  # or a report would name parameters that a user has not touched
        assert each.params.keys() == keys, each.name
