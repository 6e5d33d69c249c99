"""What MLflow holds of a run of the whole pipeline."""

import json
import textwrap
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from nanogpt.complete import complete
from nanogpt.saved_model import load_model

pytestmark = pytest.mark.pipeline

EVALUATIONS = [0, 10, 20, 30]
STEPS = list(range(1, 31))
REPORTS = [5, 10, 15, 20, 25, 30]


@pytest.fixture(scope="module")
def run(seed):
    (run,) = seed.runs()
    return run


def test_one_finished_run_named_by_its_commit_holds_every_param_that_training_depends_on(seed, run):
    first = seed.run("git rev-parse HEAD~1").strip()
    assert (run.info.status, run.info.run_name) == ("FINISHED", f"{first[:7]} seed=1337")
    params = YAML(typ="safe").load(seed.read("params.yaml"))
    expected = {
        f"{name}.{key}": value if isinstance(value, str) else json.dumps(value)
        for name in ("download", "tokenize", "model", "train", "numerics")
        for key, value in params[name].items()
    }
    assert run.data.params == expected


def test_tags_lead_to_commit_code_data_and_model(seed, run):
    tags, lock = run.data.tags, seed.lock()
    assert tags["git.commit"] == seed.run("git rev-parse HEAD~1").strip()
    assert tags["git.dirty"] == "false"
    assert tags["dvc.experiment"] == tags["dvc.baseline"] == "none"
    assert tags["model.md5"] == next(out["md5"] for out in lock["train"]["outs"] if out["path"] == "model")
    assert all(len(tags[name]) == 64 for name in ("fingerprint", "tokens.sha256", "code.sha256", "model.sha256"))
    assert (seed.path / tags["attempt"] / "journal.jsonl").exists()
    assert tags["evaluate.train_tokens"] == "2000"
    assert tags["sample.temperature"] == "1.0"
    (data,) = run.inputs.dataset_inputs
    assert (data.dataset.name, data.dataset.digest) == ("grammar", tags["tokens.sha256"][:36])


def test_metrics_have_every_step_once(seed, run):
    steps = dict.fromkeys(("train/loss", "grad_norm", "learning_rate"), STEPS)
    steps |= dict.fromkeys(("tokens_per_second", "mfu", "memory_mb", "clip_rate"), REPORTS)
    steps |= dict.fromkeys(("eval/val_loss", "eval/train_loss", "eval/best_val_loss"), EVALUATIONS)
    steps["tokens"] = [0, *STEPS]
    assert {key: seed.history(run, key) for key in steps} == steps
    own = json.loads(seed.read("metrics/train.json"))
    scores = seed.scores()
    assert run.data.metrics["eval/best_val_loss"] == own["best_val_loss"]
    assert run.data.metrics["tokens"] == own["tokens"]
    assert {key: run.data.metrics[key] for key in scores} == scores
    journal = {record["step"]: record["loss"] for record in seed.records("step")}
    points = seed.client().get_metric_history(run.info.run_id, "train/loss")
    assert {point.step: point.value for point in points} == journal


def test_artifacts_show_the_result_at_a_glance(seed, run, tmp_path):
    client = seed.client()
    assert sorted(file.path for file in client.list_artifacts(run.info.run_id)) == [
        "checkpoints.json",
        "environment.json",
        "loss.png",
        "params.yaml",
        "samples",
        "samples.json",
    ]
    folder = Path(client.download_artifacts(run.info.run_id, "", str(tmp_path)))
    assert (folder / "params.yaml").read_text() == seed.read("params.yaml")
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "samples/samples.md").read_text() == seed.read("samples/samples.md")
    table = json.loads((folder / "samples.json").read_text())
    assert table["columns"] == ["step", "prompt", "text"]
    assert [row[0] for row in table["data"]] == EVALUATIONS
    note = run.data.tags["mlflow.note.content"]
    best = json.loads(seed.read("metrics/train.json"))["best_val_loss"]
    assert f"best validation loss **{best:.4f}**" in note
    for expected in (
        "**FINISHED** at step 30 of 30",
        "Sample at step 30",
        "**evaluate**",
        "bits_per_byte",
        "**sample**",
    ):
        assert expected in note


def test_reports_of_later_stages_leave_the_end_of_the_run_alone(seed, run):
    assert run.info.end_time == seed.end()["t"]
    later = max(point.timestamp for point in seed.client().get_metric_history(run.info.run_id, "bits_per_byte"))
    assert later > run.info.end_time


def test_only_what_loads_is_a_logged_model_and_it_writes_our_text_anywhere(seed, run, tmp_path):
    models = {m.name: m for m in seed.client().search_logged_models([run.info.experiment_id])}
    best = json.loads(seed.read("metrics/train.json"))["best_step"]
    assert models.keys() == ({"best"} if best == 30 else {"best", "last"})
    assert {str(model.status) for model in models.values()} == {"READY"}
    assert models["best"].tags["step"] == str(best)
    assert float(models["best"].params["val_loss"]) == run.data.metrics["eval/best_val_loss"]
    prompts = ["One day", "The"]
    code = """
        import mlflow
        model = mlflow.pyfunc.load_model("models:/{}")
        print(ascii(model.predict({!r}, params={{"max_new_tokens": 20}})))
    """
    (tmp_path / "predict.py").write_text(textwrap.dedent(code).format(models["best"].model_id, prompts))
    uri = f"sqlite:///{seed.path}/mlflow.db"
    output = seed.run(f"cd {tmp_path} && python predict.py", MLFLOW_TRACKING_URI=uri)
    gpt = load_model(seed.path / "model")
    assert output.splitlines()[-1] == ascii([complete(gpt, prompt, max_new_tokens=20) for prompt in prompts])
