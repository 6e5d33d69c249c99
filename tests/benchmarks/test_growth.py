import json

import pytest
from click.testing import CliRunner

from benchmarks import growth
from tracking.journal import Journal, end_of


def rows(part, figure, *points):
    return [{"part": part, "size": size, figure: value} for size, value in points]


@pytest.mark.parametrize("power", [0.5, 1, 2])
def test_the_exponent_is_that_of_the_largest_sizes(power):
    points = [(1, 1000.0), *((size, 3 * size**power) for size in (10, 100, 1000))]
    assert growth.exponent(rows("corpus", "open_s", *points), "open_s") == pytest.approx(power)


def test_one_size_has_no_exponent():
    assert growth.exponent(rows("corpus", "open_s", (1, 2.0)), "open_s") is None


def test_rows_are_kept_until_their_size_is_measured_again(monkeypatch, tmp_path):
    out, answers = tmp_path / "growth.json", iter([1.0, 2.0, 3.0])
    monkeypatch.setattr(growth, "call", lambda part, size: ({"open_s": next(answers), "open_mb": 5.0}, 0))
    for size in ("10", "1", "10"):
        options = ["--part", "corpus", "--size", size, "--json", str(out), "--picture", str(tmp_path / "growth.svg")]
        result = CliRunner().invoke(growth.main, options, catch_exceptions=False)
        assert result.exit_code == 0, result.output
    found = [(row["size"], row["open_s"]) for row in json.loads(out.read_text())]
    assert found == [(1.0, 2.0), (10.0, 3.0)]
    assert "exponent" in result.output
    assert (tmp_path / "growth.svg").stat().st_size < 100_000


@pytest.mark.parametrize(
    ("options", "told"),
    [(["--size", "1"], "choose one with --part"), (["--part", "model", "--picture", "x.svg"], "--json FILE")],
)
def test_options_that_cannot_be_together(options, told):
    result = CliRunner().invoke(growth.main, options)
    assert result.exit_code == 2
    assert told in result.output


def test_the_corpus_is_measured_stage_by_stage():
    figures = growth.corpus(0.1)
    stages = ("download", "tokenize_char", "tokenize_bpe", "open")
    assert figures.keys() == {f"{stage}_{unit}" for stage in stages for unit in ("s", "mb")}
    assert all(value > 0 for value in figures.values())


def test_the_journal_is_a_training_s(tmp_path):
    with Journal(tmp_path / "journal.jsonl") as journal:
        growth.fill(journal, 500)
        kinds = [record["kind"] for record in journal.records()]
        assert [kinds.count(kind) for kind in ("start", "step", "speed", "eval", "checkpoint", "end")] == [
            *(1, 500, 50, 2, 2, 1)
        ]
        assert end_of(journal.records())


def test_the_models_are_of_the_sizes_that_are_told():
    sizes = growth.PARTS["model"].sizes
    assert sizes[0] == pytest.approx(1e6, rel=0.1)
    assert sizes[-1] == pytest.approx(124e6, rel=0.01)
