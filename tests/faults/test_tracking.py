"""A tracking server may die, be slow or broken: the training does not wait for it, and in the end it has all, once."""

import re
import time
from collections.abc import Callable, Iterator

import pytest

from tests.faults.servers import Proxy, Server, running
from tests.pipeline.clones import Clone, wait_until
from tests.pipeline.test_kills import PausedTraining
from tests.runs import contents
from tracking.mlflow_page import REPORTED

pytestmark = pytest.mark.pipeline

WAIT = 3  # seconds of tracking.wait_seconds
# A training that was stopped has another point of these where it stopped.
SPEED = {"tokens_per_second", "step_time", "memory_mb", "mfu", "clip_rate"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tmp_path_factory.mktemp("tracking") / "server") as server:
        yield server


@pytest.fixture
def clone(seed: Clone, copy_of: Callable[..., Clone], request: pytest.FixtureRequest) -> Clone:
    """The seed before its training, which has an experiment of its own on the server."""
    clone = copy_of(seed, runs=False)
    clone.set_params(**{"tracking.wait_seconds": WAIT, "tracking.experiment": request.node.name})
    clone.commit()
    clone.forget("train", "evaluate", "sample")
    return clone


def assert_all_is_there_once(server: Server, clone: Clone, seed: Clone, experiment: str, reports: bool = True) -> None:
    """The run on the server is as complete as that of the undisturbed seed, each point once, in the journal's words.

    Without `reports` it has nothing of evaluate and sample.
    """
    client = server.client()
    (run,) = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    (reference,) = seed.runs()
    found, expected = contents(client, run.info.run_id), contents(seed.client(), reference.info.run_id)
    if not reports:
        for name in REPORTED.values():
            del expected["metrics"][name]
        expected["artifacts"] = set(expected["artifacts"]) - {"samples"}
    assert run.info.status == "FINISHED"
    for key in ("params", "outputs", "datasets"):
        assert found[key] == expected[key], key
    assert [name for name, *_ in found["models"]] == [name for name, *_ in expected["models"]]
    assert set(found["artifacts"]) == set(expected["artifacts"])
    assert found["metrics"].keys() - {"mfu"} == expected["metrics"].keys() - {"mfu"}
    for key, points in found["metrics"].items():
        steps = [step for step, _, _ in points]
        assert steps == sorted(set(steps)), f"{key} holds a step twice"
        if not key.startswith("system/"):
            wanted = [step for step, _, _ in expected["metrics"].get(key, points)]
            assert steps == wanted or (key in SPEED and set(steps) > set(wanted)), key
    losses = {step: value for step, _, value in found["metrics"]["train/loss"]}
    assert losses == {record["step"]: record["loss"] for record in clone.records("step")}
    assert not reports or clone.scores().items() <= found["last"].items()


def test_a_server_that_is_killed_twice_and_comes_back(server, clone, seed, request):
    """The only test that finds a point that a server has twice, or not at all, since it was gone meanwhile."""
    name = request.node.name
    clone.set_params(**{"tracking.wait_seconds": 60})
    clone.commit()
    training = PausedTraining(clone, "speed", 15, f"MLFLOW_TRACKING_URI={server.uri} dvc repro train")
    experiment = wait_until(lambda: server.client().get_experiment_by_name(name), "the experiment", clone)
    wait_until(lambda: server.client().search_runs([experiment.experiment_id]), "the first points", clone)
    server.kill()
    # The follower must notice it: it has nothing to send while the trainer stands still, but it looks.
    server.start()
    training.let_go()
    output, _ = training.process.communicate(timeout=300)
    assert training.process.returncode == 0, output
    assert "is complete in MLflow" in output
    assert "tools sync" not in output
    assert_all_is_there_once(server, clone, seed, name, reports=False)
    server.kill()
    output = clone.repro(MLFLOW_TRACKING_URI=server.uri)
    assert output.count("`python -m tools sync` sends it later") == 2, output
    server.start()
    assert "is in MLflow run" in clone.tool("sync", MLFLOW_TRACKING_URI=server.uri)
    assert_all_is_there_once(server, clone, seed, name)
    assert clone.outs() == seed.outs()


@pytest.mark.parametrize("mode", ["slow", "500"])
def test_a_server_that_is_slow_or_broken_costs_the_stages_a_bounded_wait(server, clone, seed, mode, request):
    """The only test that finds a stage that hangs on such a server, or a run of which it has a part that stays so."""
    proxy = Proxy(server.port)
    proxy.mode = mode
    begin = time.monotonic()
    output = clone.repro("train", MLFLOW_TRACKING_URI=proxy.uri)
    # A hang would take minutes; the wait is bounded by wait_seconds and two graces of 5 s.
    assert time.monotonic() - begin < 120
    assert proxy.requests > 0
    told = r"`python -m tools sync` sends (the rest|it later)"
    assert re.search(told, output), output
    assert clone.lock()["train"] == seed.lock()["train"]
    if mode == "500":
        output = clone.repro(MLFLOW_TRACKING_URI=proxy.uri)
        assert output.count("`python -m tools sync` sends it later") == 2, output
        assert clone.lock() == seed.lock()
    proxy.mode = "pass"
    output = clone.tool("sync", MLFLOW_TRACKING_URI=proxy.uri)
    assert "is complete in MLflow" in output
    assert_all_is_there_once(server, clone, seed, request.node.name, reports=mode == "500")
    proxy.close()
