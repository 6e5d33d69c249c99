"""A run's best and last checkpoint as MLflow's LoggedModels; the other checkpoints are rows of a table.

MLflow creates a new model on each attempt to log one, so this looks first which models the run has already.
"""

import json
import tempfile
import warnings
import zipfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tracking.journal import Record
from tracking.mlflow_page import LOSS, Page, Point
from tracking.run import Run

# What nanogpt.saved_model needs to load a model and generate text.
REQUIREMENTS = ("mlflow", "torch", "numpy", "safetensors", "tiktoken", "tokenizers", "pydantic", "ruamel.yaml")


def log_models(client: Any, run_id: str, experiment: str, page: Page, run: Run) -> None:
    """Brings the run's models up to date: `best`, and `last` if it is another checkpoint."""
    from mlflow.entities import LoggedModelOutput

    wanted = _models(page, run)
    logged: dict[str, str] = {}  # name -> id
    for model in client.search_logged_models([experiment], f"source_run_id = '{run_id}'", max_results=100):
        record = wanted.get(model.name, {})
        ready = str(getattr(model.status, "value", model.status)) == "READY"
        if ready and model.tags.get("sha256") == record.get("sha256") and model.name not in logged:
            logged[model.name] = model.model_id
        else:  # left incomplete by a failure, or replaced by a later checkpoint
            client.delete_logged_model(model.model_id)
    for name, record in wanted.items():
        if name not in logged:
            logged[name] = _log_model(client, run_id, experiment, name, record, run.models / name)
    # MLflow's page looks for the models among the run's outputs.
    outputs = client.get_run(run_id).outputs
    listed = {output.model_id for output in outputs.model_outputs} if outputs else set()
    new = [LoggedModelOutput(id, wanted[name]["step"]) for name, id in logged.items() if id not in listed]
    if new:
        client.log_outputs(run_id, new)


def _models(page: Page, run: Run) -> dict[str, Record]:
    """The checkpoints that should be logged: name -> record."""
    found = {"best": page.best_checkpoint, "last": page.last.get("checkpoint")}
    if found["last"] == found["best"]:
        del found["last"]
    return {name: record for name, record in found.items() if record and (run.models / name).is_dir()}


def _log_model(client: Any, run_id: str, experiment: str, name: str, record: Record, folder: Path) -> str:
    """Logs a model directory; returns the model's id."""
    step, loss = record["step"], record["val_loss"]
    tags = {"step": str(step), "sha256": str(record["sha256"])}
    params = {"step": str(step), "val_loss": json.dumps(loss)}
    model_id: str = client.create_logged_model(experiment, name, run_id, tags, params, "gpt").model_id
    with tempfile.TemporaryDirectory() as workspace:
        save_pyfunc(folder, Path(workspace) / "model", run_id, model_id)
        client.log_model_artifacts(model_id, f"{workspace}/model")
    if loss is not None:
        # With the time of the evaluation, so that the run's own point is not stored twice.
        client.log_points(run_id, [Point(LOSS, loss, record["t"], step)], model_id)
    client.finalize_logged_model(model_id, "READY")
    return model_id


def save_pyfunc(model: Path, target: Path, run_id: str | None = None, model_id: str | None = None) -> None:
    """Writes a model directory as an MLflow model: `mlflow.pyfunc.load_model(target).predict(["ROMEO:"])`.

    It contains the weights, the code of the package nanogpt and a list of requirements; nothing is pickled. The code is
    one zip file, as a server takes each file in a request of its own.
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
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        code = _zipped(here.parent / "nanogpt", Path(folder) / "nanogpt.zip")
        warnings.simplefilter("ignore", UserWarning)  # it suggests an example input, with which it would run the model
        mlflow.pyfunc.save_model(
            str(target),
            mlflow_model=Model(run_id=run_id, model_id=model_id, model_uuid=model_id),
            python_model=str(here / "mlflow_model.py"),
            artifacts={"model": str(model.absolute()), "code": str(code)},
            # Without torch's +cpu, which no package index has.
            pip_requirements=[f"{name}=={version(name).partition('+')[0]}" for name in REQUIREMENTS],
            signature=ModelSignature(text, text, ParamSchema(options)),
        )


def _zipped(package: Path, target: Path) -> Path:
    """Writes the package's modules as a zip file, from which Python can import them; returns its path."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, strict_timestamps=False) as file:
        for path in sorted(package.rglob("*.py")):
            file.write(path, path.relative_to(package.parent))
    return target
