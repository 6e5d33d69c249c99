"""benchmarks.tracking_overhead, in a clone that has tokens: the two candidates that are put together by hand."""

import json
import shlex
from collections.abc import Callable

import pytest

from tests.pipeline.clones import Clone

pytestmark = pytest.mark.pipeline


@pytest.mark.parametrize("candidate", ["nothing", "unsampled"])
def test_a_candidate_is_timed_and_leaves_nothing_behind(
    candidate: str, seed: Clone, copy_of: Callable[..., Clone]
) -> None:
    clone = copy_of(seed, runs=False)
    (clone.path / "mlflow.db").unlink()
    work = json.dumps({"steps": 20, "candidate": candidate})
    output = clone.run(f"python -m benchmarks.common benchmarks.tracking_overhead measure {shlex.quote(work)}")
    figures = json.loads(output.splitlines()[-1])
    assert figures["seconds"] > figures["checkpoints"] > 0
    assert figures["beside"] == 0 or candidate == "unsampled"
    assert clone.run("git status --short") == ""
    assert clone.attempts() == []
    assert not (clone.path / "mlflow.db").exists()
    assert clone.processes() == []
