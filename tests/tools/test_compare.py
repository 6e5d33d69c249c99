import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tests.conftest import BUILT_IN
from tests.runs import scored_run
from tools.__main__ import main


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A repository whose params.yaml names the experiment of the runs that tests make."""
    text = BUILT_IN.read_text()
    (tmp_path / "params.yaml").write_text(text.replace("experiment: nanogpt ", "experiment: test/one experiment "))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    return tmp_path


def compare(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(main, ["compare", *arguments])
    assert result.exit_code == code, result.output
    return result


def two_settings(root: Path) -> None:
    for seed, (slow, fast) in enumerate([(2.0, 1.9), (2.05, 1.94), (2.01, 1.92)], 1):
        scored_run(root, f"slow-{seed}", slow, seed=seed)
        scored_run(root, f"fast-{seed}", fast, seed=seed, params={"train.muon_learning_rate": 0.04})


def test_the_table(root):
    two_settings(root)
    assert compare().stdout == (
        "6 runs of 2 settings: validation loss, nats per token; best possible 1.0000\n"
        "\n"
        "    muon_learning_rate    seeds         val loss  bits/byte  excess  steps  time\n"
        " 1  0.04                      3  1.9200 ± 0.0200     0.9600  0.9200     40   0 s\n"
        " 2  0.02                      3  2.0200 ± 0.0265     1.0100  1.0200     40   0 s\n"
        "\n"
        "against 1, the best: difference, 99 % interval, p corrected for 1 comparison\n"
        '(± standard deviation; verdicts need p < 0.01; "more seeds": for each setting)\n'
        " 2  +0.1000  [+0.0427, +0.1573]  paired  p=0.0033  worse\n"
    )


def test_the_best_setting_names_an_experiment_that_is_still_there(root, monkeypatch):
    two_settings(root)
    scored_run(root, "idea", 1.5, seed=4, tags={"dvc.experiment": "idea"})
    monkeypatch.setattr("tools.compare.experiment_refs", lambda root, name: [f"refs/exps/{name}"])
    assert "brings setting 1" not in compare("slow-1", "fast-1").stdout  # not made by DVC
    tags = {"dvc.experiment": "wide", "dvc.baseline": "a" * 40}
    scored_run(root, "wide", 1.4, seed=5, params={"model.n_embd": 96}, tags=tags)
    monkeypatch.setattr("tools.compare.resolve_commit", lambda root, revision: "a" * 40)
    assert "`dvc exp apply wide` brings setting 1 (seed 5) into the workspace" in (found := compare().stdout)
    assert "undoes" not in found
    monkeypatch.setattr("tools.compare.resolve_commit", lambda root, revision: "b" * 40)
    assert "and undoes what was committed since aaaaaaa (docs/experiments.md)" in compare().stdout
    monkeypatch.setattr("tools.compare.experiment_refs", lambda root, name: [])
    assert "brings setting 1" not in compare().stdout


def test_a_single_seed_is_not_what_the_others_are_compared_with(root):
    two_settings(root)
    scored_run(root, "long", 1.5, params={"train.max_iters": 1200})
    found = compare().stdout
    assert "against 2, the best with several seeds: difference" in found
    assert " 1  -0.4200  cannot tell from one seed\n" in found
    assert " 3  +0.1000  " in found


def test_a_table_of_long_names_fits_80_columns(root):
    for i in range(3):
        params = {f"train.{name}": i for name in ("gradient_accumulation_steps", "ngram_weight_decay")}
        scored_run(root, f"run-{i}", 2.0 + i / 10, params={**params, "model.position": "rotary " * 20 + str(i)})
    lines = compare().stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert any(line.strip() == "…" for line in lines)


def test_a_path_that_is_wider_than_its_column_stays_whole_on_a_line_of_its_own(root):
    paths = [f"model:inputs/pretrained/{'plays-of-many-authors/' * 3}{name}" for name in ("folio", "quarto")]
    for i, path in enumerate(paths):
        scored_run(root, f"run-{i}", 2.0 + i / 10, params={"train.init_from": path})
    lines = compare().stdout.splitlines()
    for number, path in enumerate(paths, 1):
        place = lines.index(f" {number}  {path}")
        assert lines[place + 1].split()[:2] == ["1", f"{1.9 + number / 10:.4f}"]


def test_a_line_of_a_verdict_fits_80_columns(root):
    for seed in range(1, 13):
        for i in range(3):
            scored_run(
                root, f"run-{i}-{seed}", 2 + i / 100 + (seed * (i + 3) % 7) / 20, seed=seed, params={"train.n": i}
            )
    lines = compare().stdout.splitlines()
    assert any("paired" in line and "more seeds" in line for line in lines)
    assert max(map(len, lines)) <= 80


def test_one_run_and_none(root):
    assert compare().stdout.startswith("no run has finished in this clone: `dvc repro` makes one, ")
    assert json.loads(compare("--json").stdout) == {"comparisons": [], "left_out": []}
    assert "No finished runs." in compare("--markdown").stdout
    scored_run(root, "only", 2.0)
    assert compare().stdout.endswith("there is only one setting; `dvc exp run -S KEY=VALUE` adds another one\n")


def test_runs_on_two_texts_go_by_their_names_and_need_no_other_setting(root):
    scored_run(root, "stories", 2.0)
    scored_run(root, "book", 1.0, profile={"bytes": 901})
    printed = compare().stdout
    assert [line.split()[1] for line in printed.splitlines() if line.startswith(" 1 ")] == ["stories", "book"]
    assert "there is only one setting" not in printed


def test_one_seed_of_each_cannot_tell(root):
    scored_run(root, "a", 2.0)
    scored_run(root, "b", 1.0, params={"train.batch_size": 2})
    *_, verdict, _, advice, _, _ = compare().stdout.splitlines()
    assert verdict == " 2  +1.0000  cannot tell from one seed"
    assert advice == "to decide, queue the same -S values with more seeds and compare again; or apply"


def test_what_is_left_out_goes_to_stderr(root):
    scored_run(root, "a", 2.0)
    scored_run(root, "b", 1.0)
    journal = root / ".runs/b/attempt-1/journal.jsonl"
    journal.write_bytes(journal.read_bytes().replace(b'"FINISHED"', b'"KILLED"'))
    result = compare()
    assert result.stderr == "left out: b (.runs/b/attempt-1) was stopped\n"
    assert "left out" not in result.stdout


def test_only_the_experiment_of_params_yaml_unless_runs_are_named(root):
    two_settings(root)
    text = (root / "params.yaml").read_text()
    (root / "params.yaml").write_text(text.replace("test/one experiment", "another"))
    assert "no run has finished" in compare().stdout
    assert compare("slow-*", "fast-1").stdout.startswith("4 runs of 2 settings")
    assert compare("slow-*", "--baseline", "fast-2").stdout.splitlines()[-5].endswith("cannot tell from one seed")
    assert "no finished run is 'slaw-1'" in compare("slaw-1", code=1).stderr


def test_markdown_and_json_say_the_same(root):
    two_settings(root)
    markdown = compare("--markdown").stdout
    assert "| 0.02 | 3 | 2.0200 ± 0.0265 |" in markdown
    assert "| +0.1000 | [+0.0427, +0.1573] | p=0.0033 | worse |" in markdown
    (found,) = json.loads(compare("--json").stdout)["comparisons"]
    best, other = found["settings"]
    assert best["difference"] is None
    assert (other["differs"], other["difference"]["verdict"]) == ({"muon_learning_rate": "0.02"}, "worse")
    assert other["mean"] == pytest.approx(2.02)
    assert {run["seed"]: run["scores"]["val_loss"] for run in best["runs"]} == {1: 1.9, 2: 1.94, 3: 1.92}
    assert all(len(run["model_sha256"]) == 64 and run["again"] for run in best["runs"])
    compare("--json", "--markdown", code=2)


class Page(HTMLParser):
    """Collects the tags, their addresses and the text of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str | None] = []
        self.lines: list[tuple[str | None, str]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in {"src", "href"}]
        points = dict(attributes).get("points")
        if points is not None:
            self.lines.append((tag, points))

    def handle_data(self, data):
        self.text += data


def test_the_page_stands_alone_and_shows_all(root):
    two_settings(root)
    compare("--html", "page.html")
    text = (root / "page.html").read_text()
    page = Page(text)
    assert page.addresses == []
    assert not {"script", "link", "img"} & {*page.tags}
    assert not re.search(r"url\((?!#)|@import", text)
    assert [tag for tag, _ in page.lines] == 2 * (2 * ["polygon"] + 2 * ["polyline"])  # two charts of two settings
    for shown in ("worse", "p=0.0033", "muon_learning_rate=0.04", "slow-2", "lineage", "text of 40 <!-- x -->"):
        assert shown in page.text, shown


def test_the_page_escapes_what_runs_are_called(root):
    for i, name in enumerate(("<b>one</b>", "two, \x1b[31m & co")):
        scored_run(root, f"run-{i}", 2.0, params={"train.batch_size": f"\x1b[31m{i}\n"})
        info = root / f".runs/run-{i}/attempt-1/run.json"
        info.write_text(json.dumps(json.loads(info.read_text()) | {"name": name}))
    printed = compare("--html", "page.html").stdout
    assert "\\x1b[31m0\\n" in printed
    assert "\x1b" not in printed + (root / "page.html").read_text()
    page = Page((root / "page.html").read_text())
    assert "b" not in page.tags
    assert "<b>one</b>" in page.text


def test_the_page_of_many_runs_stays_small(root):
    for i in range(60):
        scored_run(root, f"run-{i}", 2.0 + i * i / 1000, seed=i % 3, params={"train.batch_size": i // 3})
    assert compare("--html", "page.html").stdout.startswith("60 runs of 20 settings")
    assert (root / "page.html").stat().st_size < 6_000 * 60  # 300 runs: below 2 MB
    assert "The 8 best of 20 settings are drawn." in (root / "page.html").read_text()
