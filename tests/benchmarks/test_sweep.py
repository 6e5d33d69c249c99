import math

import pytest
from click.testing import CliRunner

from benchmarks import sweep


def test_sweeps_are_replayed_from_the_recorded_grid(project, monkeypatch, tmp_path):
    project()
    grid = {"train.learning_rate": (0.003, 0.012, 0.05), "train.beta1": (0.5, 0.8), "train.weight_decay": (0.0, 0.1)}
    monkeypatch.setattr(sweep, "GRID", grid)

    def train(params):
        far = abs(math.log(params.train.learning_rate / 0.012)) + params.train.beta1 + params.train.weight_decay
        return {step: 2 + far + 10 / (step + 20) for step in range(0, 181, 20)}

    monkeypatch.setattr(sweep, "train", train)
    arguments = ["--repeats", "2", "--share", "0.5", "--record", str(tmp_path / "record.json")]
    result = CliRunner().invoke(sweep.main, arguments)
    assert result.exit_code == 0, result.output
    assert "12 trainings" in result.output
    assert result.output.endswith("2 of 2 found the best, or one that compare cannot tell from it\n")
    monkeypatch.setattr(sweep, "train", lambda params: pytest.fail("the record was not used"))
    assert CliRunner().invoke(sweep.main, arguments).output == result.output
