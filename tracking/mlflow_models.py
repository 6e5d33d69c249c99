"""A run's best and last checkpoint as MLflow's LoggedModels. Others, which hold no model, are a table of the run.

MLflow makes another model of each attempt to log one, so each step here looks first at what the run has already.
"""

import json
import tempfile
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tracking import mlflow_page
from tracking.journal import Record
from tracking.mlflow_page import Page
from tracking.run import Run

# What nanogpt.published needs to load a model and generate text.
REQUIREMENTS = ("mlflow", "torch", "numpy", "safetensors", "tiktoken", "tokenizers", "pydantic", "ruamel.yaml")


def log_models(client: Any, run_id: str, experiment: str, page: Page, run: Run) -> None:
    """Brings the run's models up to date: `best`, and `last` if it is another one."""
    found = client.search_logged_models([experiment], f"source_run_id = '{run_id}'", max_results=100)
    wanted = _models(page, run)
    there = set()
    for model in found:
        record = wanted.get(model.name, {})
        ready = str(getattr(model.status, "value", model.status)) == "READY"
        if ready and model.tags.get("sha256") == record.get("sha256") and model.name not in there:
            there.add(model.name)
        else:  # half-made by a try that failed, overtaken by a later checkpoint, or an entry without a model
            client.delete_logged_model(model.model_id)
    for name, record in wanted.items():
        if name not in there:
            _log_model(client, run_id, experiment, name, record, run.models / name)
    _link(client, run_id, experiment)


def _models(page: Page, run: Run) -> dict[str, Record]:
    best, last = page.best_checkpoint, page.last.get("checkpoint")
    found = {}
    if best and (run.models / "best").is_dir():
        found["best"] = best
    if last and (run.models / "last").is_dir() and not (found and best and best["step"] == last["step"]):
        found["last"] = last
    return found


def _log_model(client: Any, run_id: str, experiment: str, name: str, record: Record, folder: Path) -> None:
    step = record["step"]
    tags = {"step": str(step), "sha256": str(record["sha256"])}
    params = {"step": str(step), "val_loss": json.dumps(record["val_loss"])}
    model = client.create_logged_model(experiment, name, run_id, tags, params, "gpt")
    with tempfile.TemporaryDirectory() as workspace:
        save_pyfunc(folder, Path(workspace) / "model", run_id, model.model_id)
        client.log_model_artifacts(model.model_id, f"{workspace}/model")
    from mlflow.entities import Metric

    if record["val_loss"] is not None:
        # The same time as the evaluation's, so that the run's own point is not stored twice.
        metric = Metric(mlflow_page.LOSS, record["val_loss"], record["t"], step, model_id=model.model_id, run_id=run_id)
        client.log_batch(run_id, metrics=[metric], synchronous=True)
    client.finalize_logged_model(model.model_id, "READY")


def _link(client: Any, run_id: str, experiment: str) -> None:
    """Lists the models among the run's outputs, where MLflow's page looks for them."""
    from mlflow.entities import LoggedModelOutput

    outputs = client.get_run(run_id).outputs
    known = {output.model_id for output in outputs.model_outputs} if outputs else set()
    found = client.search_logged_models([experiment], f"source_run_id = '{run_id}'", max_results=100)
    new = [LoggedModelOutput(m.model_id, int(m.tags["step"])) for m in found if m.model_id not in known]
    if new:
        client.log_outputs(run_id, new)


def save_pyfunc(model: Path, target: Path, run_id: str | None = None, model_id: str | None = None) -> None:
    """Writes a published model directory as an MLflow model: `mlflow.pyfunc.load_model(target).predict(["ROMEO:"])`.

    It holds the weights, the code of the package nanogpt and the names of what to install; nothing is pickled.
    """
    import mlflow.pyfunc
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

    here = Path(__file__).parent
    options = [
        ParamSpec("max_new_tokens", DataType.long, 200),
        ParamSpec("temperature", DataType.double, 1.0),
        ParamSpec("top_k", DataType.long, 0),
        ParamSpec("top_p", DataType.double, 1.0),
        ParamSpec("seed", DataType.long, 1337),
    ]
    text = Schema([ColSpec(DataType.string)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # an example input, which it asks for, it would run the model on
        mlflow.pyfunc.save_model(
            str(target),
            mlflow_model=Model(run_id=run_id, model_id=model_id, model_uuid=model_id),
            python_model=str(here / "mlflow_model.py"),
            artifacts={"model": str(model.absolute())},
            code_paths=[str(here.parent / "nanogpt")],
            pip_requirements=[_requirement(name) for name in REQUIREMENTS],
            signature=ModelSignature(text, text, ParamSchema(options)),
        )


def _requirement(name: str) -> str:
    try:
        return f"{name}=={version(name).partition('+')[0]}"  # torch's +cpu is on no package index
    except PackageNotFoundError:
        return name
