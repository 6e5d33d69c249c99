"""Makes run directories as the train stage leaves them, and tells what MLflow holds of them."""

import hashlib
import json
from pathlib import Path
from typing import Any

from tracking.journal import Journal

T0 = 1_700_000_000_000  # ms


def make_attempt(repository: Path, folder: str = "run", max_iters: int = 40, **fields: Any) -> Path:
    attempt = repository / ".runs" / folder / "attempt-1"
    (attempt / "artifacts").mkdir(parents=True)
    (attempt / "artifacts" / "params.yaml").write_text("train: {}\n")
    run = {
        "run_key": f"key-{folder}",
        "name": folder,
        "experiment": "test/one experiment",
        "params": {"train.learning_rate": 3e-4, "train.lr_decay_iters": None, "download.source": "grammar"},
        "tags": {"git.commit": "abc", "fingerprint": "f" * 64},
        "dataset": {"name": "grammar", "source": "data/tokens", "sha256": "d" * 64, "profile": {"train_tokens": 1000}},
        "started": T0,
        "max_iters": max_iters,
    }
    (attempt / "run.json").write_text(json.dumps(run | fields))
    return attempt


def start(journal: Journal, step: int = 0) -> None:
    journal.append("start", t=T0 + step, step=step, resumed=step > 0, environment={"python": "3.11"})


def train(journal: Journal, first: int, last: int) -> None:
    """Steps first..last, evaluated and checkpointed every tenth; the lowest validation loss is at step 30."""
    for step in range(first, last + 1):
        values = {"loss": 5 - step / 20, "grad_norm": 1 / (step + 1), "lr": 1e-3}
        if step:
            journal.append("step", t=T0 + 10 * step, step=step, tokens=512 * step, **values)
            journal.append(
                "speed", t=T0 + 10 * step, step=step, tokens_per_second=1e4 + step, step_time=0.05, memory_mb=99.5
            )
        if step % 10 == 0:
            loss = 5 - step / 10 if step <= 30 else 3.0
            journal.append(
                "eval", t=T0 + 10 * step + 1, step=step, train_loss=loss - 0.1, val_loss=loss, tokens=512 * step
            )
            journal.append("sample", t=T0 + 10 * step + 2, step=step, prompt="\n", text=f"text of {step} <!-- x -->\nü")
            journal.append(
                "checkpoint", t=T0 + 10 * step + 3, step=step, val_loss=loss, best=step <= 30, sha256=f"{step:064}"
            )


def end(journal: Journal, status: str, step: int, message: str = "", **result: Any) -> None:
    journal.append("end", t=T0 + 10 * step + 5, status=status, message=message, step=step, result=result)


def finished_attempt(repository: Path, folder: str = "run", model: str = "m" * 64, **fields: Any) -> Path:
    attempt = make_attempt(repository, folder, **fields)
    with Journal(attempt / "journal.jsonl") as journal:
        start(journal)
        train(journal, 0, 40)
        end(journal, "FINISHED", 40, model_sha256=model, parameters=12345)
    for kind in ("best", "last"):
        folder = attempt / "models" / kind
        folder.mkdir(parents=True)
        (folder / "weights.safetensors").write_text(kind)
    return attempt


def write_report(repository: Path, stage: str = "evaluate", **fields: Any) -> Path:
    path = repository / ".runs" / "reports" / f"{stage}-0123.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    report = {
        "stage": stage,
        "model": "m" * 64,
        "metrics": {"evaluate/val_loss": 1.25},
        "tags": {"evaluate.stride": "null"},
        "files": {"samples/samples.md": "Once upon a time\n```\n"} if stage == "sample" else {},
        "t": T0 + 1000,
        "experiment": "test/one experiment",
    }
    path.write_text(json.dumps(report | fields))
    return path


def contents(client: Any, run_id: str) -> dict[str, Any]:
    """All that MLflow holds of a run and that a replay must give again."""
    run = client.get_run(run_id)
    history = {
        key: sorted((m.step, m.timestamp, m.value) for m in client.get_metric_history(run_id, key))
        for key in run.data.metrics
    }
    found = client.search_logged_models([run.info.experiment_id], f"source_run_id = '{run_id}'")
    models = sorted(
        (m.name, str(m.status), sorted((x.key, x.value, x.step, x.timestamp) for x in m.metrics or [])) for m in found
    )
    return {
        "info": (run.info.run_name, run.info.status, run.info.start_time, run.info.end_time),
        "params": run.data.params,
        "tags": run.data.tags,
        "metrics": history,
        "last": run.data.metrics,
        "models": models,
        "outputs": len(run.outputs.model_outputs),
        "datasets": [(d.dataset.name, d.dataset.digest) for d in run.inputs.dataset_inputs],
        "artifacts": sorted(f.path for f in client.list_artifacts(run_id)),
    }


def scored_run(repository: Path, name: str, val_loss: float, **fields: Any) -> Path:
    """A finished training of 40 steps with evaluate's report: `seed`, `params`, `tags` and `profile` may be given."""
    model = hashlib.sha256(name.encode()).hexdigest()
    params = {"download.source": "grammar", "tokenize.tokenizer": "bpe", "train.muon_learning_rate": 0.02}
    val = {"bytes": 900, "documents": 3, "sha256": "e" * 64}
    profile = {"train": {"bytes": 8000, "documents": 30}, "val": {**val, **fields.get("profile", {})}}
    attempt = make_attempt(
        repository,
        name,
        params={**params, **fields.get("params", {}), "train.seed": fields.get("seed", 1)},
        tags={"git.commit": "a" * 40, "git.dirty": "false", "code.sha256": "c" * 64, **fields.get("tags", {})},
        dataset={"name": "grammar", "source": "data/tokens", "sha256": "d" * 64, "profile": profile},
    )
    with Journal(attempt / "journal.jsonl") as journal:
        start(journal)
        train(journal, 0, 40)
        made = {"model_sha256": fields.get("model", model), "model_md5": f"{model[:32]}.dir"}
        end(journal, "FINISHED", 40, val_loss=val_loss + 0.01, steps=40, **made)
    metrics = {"val_loss": val_loss, "bits_per_byte": val_loss / 2, "floor": 1.0, "excess": val_loss - 1.0}
    report = write_report(
        repository,
        model=made["model_sha256"],
        metrics={f"evaluate/{key}": value for key, value in metrics.items()},
    )
    report.rename(report.with_name(f"evaluate-{name}.json"))
    return attempt
