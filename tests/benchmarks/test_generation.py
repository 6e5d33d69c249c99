import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks import generation
from benchmarks.common import shown

TINY = {"1x8": {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 16, "vocab_size": 65}}


def test_the_json_has_what_the_table_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(generation.SHAPES, "4x128", TINY["1x8"])
    out = tmp_path / "out.json"
    result = CliRunner().invoke(
        generation.main, ["--rounds", "1", "--threads", "1", "--shape", "4x128", "--json", str(out)]
    )
    assert result.exit_code == 0, result.output
    rows = json.loads(out.read_text())["rows"]
    assert [(row["batch"], row["context"]) for row in rows] == [
        (batch, context) for batch in (1, 10) for context in ("within", "beyond")
    ]
    for row, line in zip(rows, result.output.splitlines()[1:], strict=True):
        assert row["tokens_per_s"].keys() == {"ours", "uncached"}
        assert shown(row["tokens_per_s"]["ours"]) in line


def test_ours_goes_through_a_whole_cycle_and_the_others_through_its_lengths() -> None:
    candidates = generation.make_candidates(TINY["1x8"], None, "cpu")
    assert [candidates["ours"](1, beyond) for beyond in (False, True)] == [16, 8]
    assert [candidates["uncached"](1, beyond) for beyond in (False, True)] == [2, 1]
    assert list(generation.lengths(8, 16)) == [12]
    assert list(generation.lengths(0, 256))[:2] == [4, 12]
