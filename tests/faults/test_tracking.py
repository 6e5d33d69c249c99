"""A tracking server may die, be slow or broken: the training does not wait for it, and in the end it has all, once."""

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.servers import Proxy, Server, running
from tests.pipeline.clones import Clone, wait_until
from tests.pipeline.test_kills import PausedTraining
from tests.runs import contents

pytestmark = pytest.mark.pipeline

WAIT = 3  # seconds of tracking.wait_seconds


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with running(tmp_path / "server") as server:
        yield server


@pytest.fixture
def clone(seed: Clone, copy_of: Callable[..., Clone]) -> Clone:
    """The seed before its training."""
    clone = copy_of(seed, runs=False)
    clone.set_params(**{"tracking.wait_seconds": WAIT})
    clone.commit()
    clone.forget("train", "evaluate", "sample")
    return clone


def assert_all_is_there_once(server: Server, clone: Clone, seed: Clone) -> None:
    """The run on the server is as complete as that of the undisturbed seed, each point once, in the journal's words."""
    client = server.client()
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    (run,) = client.search_runs(experiments)
    (reference,) = seed.runs()
    found, expected = contents(client, run.info.run_id), contents(seed.client(), reference.info.run_id)
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
            assert steps == [step for step, _, _ in expected["metrics"].get(key, points)], key
    losses = {step: value for step, _, value in found["metrics"]["train/loss"]}
    assert losses == {record["step"]: record["loss"] for record in clone.records("step")}
    assert clone.scores().items() <= found["last"].items()


def log(clone: Clone) -> str:
    return (clone.attempts()[-1] / "tracking.log").read_text()


def test_a_server_that_is_killed_and_comes_back_during_the_training(server, clone, seed):
    training = PausedTraining(clone, "speed", 15, f"MLFLOW_TRACKING_URI={server.uri} dvc repro")
    wait_until(lambda: server.client().search_runs(["1"]), "the first points", clone)
    server.kill()
    training.let_go()
    output, _ = training.process.communicate(timeout=300)
    assert training.process.returncode == 0, output
    assert output.count("`python -m tools sync` sends it later") == 3, output
    server.start()
    output = clone.run("python -m tools sync", MLFLOW_TRACKING_URI=server.uri)
    assert "is complete in MLflow" in output
    assert_all_is_there_once(server, clone, seed)
    assert clone.outs() == seed.outs()


def test_a_server_that_comes_back_before_the_end_gets_all_from_the_training_itself(server, clone, seed):
    training = PausedTraining(clone, "speed", 15, f"MLFLOW_TRACKING_URI={server.uri} dvc repro")
    wait_until(lambda: server.client().search_runs(["1"]), "the first points", clone)
    server.kill()
    # The follower must notice it: it has nothing to send while the trainer stands still, but it looks.
    server.start()
    training.let_go()
    output, _ = training.process.communicate(timeout=300)
    assert training.process.returncode == 0, output
    assert "is complete in MLflow" in output
    assert "tools sync" not in output
    assert_all_is_there_once(server, clone, seed)


@pytest.mark.parametrize("mode", ["slow", "500"])
def test_a_server_that_is_slow_or_broken_costs_the_stages_a_bounded_wait(server, clone, seed, mode):
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
    clone.set_params(**{"tracking.wait_seconds": 60})
    if mode == "500":
        output = clone.repro(MLFLOW_TRACKING_URI=proxy.uri)
        assert output.count("`python -m tools sync` sends it later") == 2, output
    proxy.mode = "pass"
    output = clone.run("python -m tools sync && dvc repro", MLFLOW_TRACKING_URI=proxy.uri)
    assert "is complete in MLflow" in output
    assert clone.lock() == seed.lock()
    assert_all_is_there_once(server, clone, seed)
    proxy.close()


@pytest.mark.long
def test_eight_experiments_from_an_empty_machine_are_eight_complete_runs(fresh, copy_of):
    clone = copy_of(fresh)
    seeds = ",".join(map(str, range(1, 9)))
    clone.run(f"dvc exp run --queue -S train.seed={seeds}")
    clone.run("dvc queue start -j 2", timeout=800)
    try:
        tasks = clone.wait_for_queue(seconds=800)
        assert tasks.count("Success") == 8, tasks
        wait_until(lambda: not clone.processes(), "the end of all processes", clone)
    finally:
        clone.end_processes()
    runs = clone.runs()
    assert sorted(run.data.params["train.seed"] for run in runs) == sorted(map(str, range(1, 9)))
    for run in runs:
        assert run.info.status == "FINISHED"
        assert clone.history(run, "train/loss") == list(range(1, 31))
        assert {"evaluate/val_loss", "best/val_loss"} <= run.data.metrics.keys()
        artifacts = {file.path for file in clone.client().list_artifacts(run.info.run_id)}
        assert {"samples", "samples.json", "loss.png", "params.yaml"} <= artifacts
    shown = clone.run("dvc exp show --csv --no-pager")
    assert len({run.info.run_name for run in runs} & set(re.split(r"[,\n]", shown))) == 8
