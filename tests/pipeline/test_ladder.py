"""`python -m tools ladder` trains its rungs through DVC; a whole ladder would take six of them."""

import json

import pytest

from tests.conftest import HOOKS
from tests.pipeline.clones import Clone
from tracking.run import Run

pytestmark = pytest.mark.pipeline

RUNG = """
import json
from pathlib import Path
from tools.ladder_run import Grid, plan, run
ladder = plan(Path("."), "tiny", [], Grid([1, 2, 3], [2000, 4000, 8000], None, 1))
ladder.rungs = ladder.rungs[3:4]
lines = [list(run(ladder))[-1] for _ in range(2)]
print(json.dumps([*lines, ladder.rungs[0].parameters, ladder.rungs[0].tokens]))
"""


def test_a_rung_is_an_experiment_of_the_size_that_was_planned(seed: Clone, copy_of):
    """The only test that finds a dial whose N, D or parameters are not those of the runs that DVC makes for it."""
    clone = copy_of(seed, runs=False)
    (clone.path / "rung.py").write_text(RUNG)
    printed = clone.run("python rung.py 2>stderr.txt", WITHOUT_MLFLOW="1", PYTHONPATH=f"{clone.path}:{HOOKS}")
    first, again, parameters, tokens = json.loads(printed.splitlines()[-1])
    assert again == f"{first}  was there"
    (run,) = (Run(path) for path in clone.attempts())
    assert run.result["tokens"] == tokens
    embedding = 300 * int(run.params["model.n_embd"])
    assert run.result["parameters"] - embedding == parameters
    assert clone.run("dvc exp list --name-only").strip() == run.tags["dvc.experiment"] == f"tiny-d2-{tokens}-1337"
