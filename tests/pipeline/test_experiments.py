"""`dvc exp run` in the workspace, in a temporary directory and through the queue, and DVC's comparisons."""

import csv
import io
import json
import re
import socket

import pytest
from ruamel.yaml import YAML

from tests.pipeline.clones import Clone, closed_port, wait_until

pytestmark = pytest.mark.pipeline


@pytest.fixture(scope="session")
def experiments(seed: Clone, once) -> Clone:
    """A clone whose queue two workers have run, from an empty machine on, and then an experiment of the workspace.

    Two tasks begin at once where there are no runs and no database of MLflow yet. Not to be changed.
    """

    def make(path):
        clone = seed.copy(path, runs=False)
        (path / "mlflow.db").unlink()
        try:
            clone.run("dvc exp run --queue --name diverging -S train.learning_rate=1e30")
            clone.run("dvc exp run --queue -S train.seed=3 -S sample.temperature=0.5,0.8")
            assert "1 failed: diverging;" in clone.run("python -m tools queue --jobs 2", check=1)
            clone.run("dvc exp run --name alone --set-param train.seed=2 -S train.learning_rate=0.001")
            clone.run("git checkout --quiet . && dvc checkout")
            wait_until(lambda: not clone.processes(), "the end of all processes", clone)
        finally:
            clone.end_processes()

    return once("experiments", make)


@pytest.fixture(scope="module")
def shown(experiments: Clone) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(experiments.run("dvc exp show --csv --no-pager"))))


def one(rows: list[dict[str, str]], **values: str) -> dict[str, str]:
    """The only row with these values; underscores in names stand for dots."""
    found = [row for row in rows if all(row[name.replace("__", ".")] == value for name, value in values.items())]
    assert len(found) == 1, found
    return found[0]


def test_every_experiment_has_one_complete_run_of_its_name_in_mlflow(experiments, shown):
    """The only test that finds a run that is lost or made twice where several processes begin MLflow's database."""
    names = {row["Experiment"] for row in shown} - {"", "main"}
    assert len(names) == 4
    assert experiments.queue().count("Success") == 2
    runs = {run.data.tags["dvc.experiment"]: run for run in experiments.runs()}
    assert len(runs) == len(experiments.runs()) == 3  # one of the two that share a training
    assert runs.keys() < names
    assert {run.info.run_name for run in runs.values()} == {
        "diverging learning_rate=1e+30 seed=1337",
        f"{experiments.run('git rev-parse HEAD~1')[:7]} seed=3",  # DVC made up this one's name
        "alone learning_rate=0.001 seed=2",
    }
    head = experiments.run("git rev-parse HEAD").strip()
    for name, run in runs.items():
        assert run.data.tags["dvc.baseline"] == head
        if name != "diverging":
            assert run.info.status == "FINISHED"
            assert experiments.history(run, "train/loss") == list(range(1, 31))
            assert {"val_loss", "eval/best_val_loss"} <= run.data.metrics.keys()
            artifacts = {file.path for file in experiments.client().list_artifacts(run.info.run_id)}
            assert {"samples", "samples.json", "loss.png", "params.yaml"} <= artifacts
    assert sorted(run.data.params["train.seed"] for run in runs.values()) == ["1337", "2", "3"]
    assert runs["alone"].data.params["train.seed"] == "2"


def test_two_tasks_that_share_a_training_train_once(experiments, shown):
    tries = [
        attempt
        for attempt, run in zip(experiments.attempts(), experiments.runs(), strict=True)
        if run.data.params["train.seed"] == "3"
    ]
    assert len(tries) == 1
    steps = experiments.steps(experiments.attempts().index(tries[0]))
    assert steps == list(range(1, 31))
    found = [row for row in shown if row["train.seed"] == "3" and row["Experiment"]]
    assert sorted(row["sample.temperature"] for row in found) == ["0.5", "0.8"]
    locks = [YAML(typ="safe").load(experiments.run(f"git show {row['rev']}:dvc.lock"))["stages"] for row in found]
    assert locks[0]["train"] == locks[1]["train"]
    assert locks[0]["evaluate"] == locks[1]["evaluate"]
    assert locks[0]["sample"]["outs"] != locks[1]["sample"]["outs"]


def test_a_task_that_failed_can_be_understood(experiments):
    assert re.search(r"diverging +.*Failed", experiments.queue())
    assert experiments.queue().count("Failed") == 1
    told = r"training diverged at step \d+: .*lower train.learning_rate"
    assert re.search(told, experiments.run("dvc queue logs diverging"))
    log = experiments.read(".runs/logs/diverging/train.log")
    assert re.search(told, log)
    assert "Traceback" in log
    (run,) = [run for run in experiments.runs() if run.info.run_name.startswith("diverging ")]
    assert run.info.status == "FAILED"
    assert re.search(r"Diverged: training diverged at step \d+", run.data.tags["mlflow.note.content"])


def test_exp_show_has_the_metrics_of_every_experiment(experiments, shown):
    rows = [row for row in shown if row["Experiment"] or row["rev"] == "workspace"]
    for row in rows:
        if row["Experiment"] != "diverging":
            assert row["val_loss"] not in ("", "!"), row
            assert float(row["val_loss"]) > 0, row
    rate = one(shown, train__learning_rate="0.001")
    run = next(run for run in experiments.runs() if run.data.tags["dvc.experiment"] == rate["Experiment"])
    assert float(rate["val_loss"]) == run.data.metrics["val_loss"]


def test_the_table_of_a_queue_fits_120_columns_with_the_loss_and_what_differs(experiments):
    table = experiments.run("dvc exp show --only-changed --no-pager", COLUMNS="120").splitlines()
    assert max(map(len, table)) <= 120
    for name in ("val_loss", "train.seed", "train.learning_rate"):
        assert name in table[1]


def test_metrics_and_params_can_be_compared(experiments):
    output = experiments.run("dvc metrics diff main alone")
    row = [line.split() for line in output.splitlines() if " val_loss" in line]
    assert len(row) == 1, output
    _, _, old, new, change = row[0]
    assert float(new) - float(old) == pytest.approx(float(change), abs=2e-5)
    assert float(change) != 0
    row = next(line for line in experiments.run("dvc params diff main alone").splitlines() if "train.seed" in line)
    assert row.split() == ["params.yaml", "train.seed", "1337", "2"]


def test_loss_curves_of_two_revisions_are_drawn_together(experiments):
    output = experiments.run("dvc plots diff main alone --out plots-page")
    page = experiments.read("plots-page/index.html")
    assert "failed to load" not in output
    for revision in ("main", "alone"):
        assert re.search(rf'"rev": ?"{revision}"', page), f"{revision} is not in the page\n{output}"
    for curve in ("train_loss", "val_loss"):
        assert re.search(rf'"field": ?"{curve}"', page), f"{curve} is not in the page"
    assert page.count("vegaEmbed(") >= 1
    assert not re.search(r"(src|href) ?= ?[\"']?http", page), "the page loads something from the network"


def test_the_smoke_run_leaves_the_workspace_alone_and_its_traces_in_the_original_repository(seed, copy_of):
    """The only test that finds traces of a temporary experiment that lie in its folder, which DVC deletes."""
    clone = copy_of(seed, runs=False)
    (clone.path / ".venv").mkdir()
    (clone.path / ".venv/.ready").touch()  # the set-up is done
    output = clone.run("make --old-file=.venv/.ready smoke")
    assert "Ran experiment(s): smoke" in output
    assert clone.run("git status --porcelain --untracked-files=no") == ""
    assert clone.outs() == seed.outs()
    assert list((clone.path / ".dvc/tmp/exps/standalone").glob("tmp*")) == []
    (run,) = clone.runs()
    assert (run.data.tags["dvc.experiment"], run.info.status) == ("smoke", "FINISHED")
    assert run.info.artifact_uri.startswith(f"file://{clone.path}/mlartifacts/")
    assert len(clone.attempts()) == 1
    assert clone.steps() == list(range(1, 21))
    assert {path.name for path in (clone.path / ".runs/logs/smoke").iterdir()} >= {"train.log", "sample.log"}
    assert clone.processes() == []


def test_an_experiment_older_than_the_remote_reaches_a_colleague_as_the_page_says(experiments, copy_of, tmp_path):
    """DVC reads an experiment's remote from its baseline, unless this clone alone has one for all commits."""
    add = f"dvc remote add --local --default storage {tmp_path / 'storage'}"
    origin = copy_of(experiments, "origin", runs=False)
    origin.run(f"dvc remote add --default storage {tmp_path / 'storage'}")
    origin.commit("A remote")
    origin.run(add)
    assert "files uploaded" in origin.run("dvc exp push . alone")
    origin.run("git clone --quiet . ../colleague")
    colleague = Clone(tmp_path / "colleague")
    for command in (add, "dvc exp pull origin alone", "dvc exp apply alone"):
        colleague.run(command)
    origin.run("dvc exp apply alone")
    assert colleague.outs() == origin.outs()


def test_the_champion_has_come_out_again_and_answers_over_http(experiments, copy_of):
    """The only test that finds a champion that MLflow cannot serve, or an experiment that cannot be verified."""
    clone = copy_of(experiments)
    compared = clone.run("python -m tools compare")
    assert compared.startswith("2 runs of 2 settings")
    best = re.search(r"^`dvc exp apply (\S+)` brings setting 1 \(seed", compared, re.MULTILINE)
    assert best, compared
    assert best[1] in clone.run("dvc exp list --name-only").split()
    output = clone.run("python -m tools champion alone")
    assert re.search(r"^alone.* is the champion: version 1 of nanogpt, val loss", output, re.MULTILINE), output
    port = closed_port()
    server = clone.start(f"exec python -m tools serve --port {port}")
    try:
        wait_until(lambda: listens(port) or server.poll() is not None, "MLflow's server", clone)
        command = server.stdout.readline()
        assert f"127.0.0.1:{port}/invocations" in command
        (text,) = json.loads(clone.run(f"cd / && {command.strip()} --silent"))["predictions"]
        assert text.startswith("One sunny morning")
    finally:
        server.terminate()
        server.wait()


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
