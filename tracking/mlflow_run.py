"""MLflow as a replica of a run's journal. Only the modules named mlflow_* use mlflow.

Whatever is sent may be sent again: a point that has the same time, step and value is stored once, a run is found by its
key before one is created, and how far a server has been filled is written down only after it has said so. So a server
that is dead, slow or new costs a replay and nothing else.
"""

import hashlib
import json
import math
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from nanogpt.files import write_text
from tracking import mlflow_models, mlflow_page, mlflow_view
from tracking.journal import START, JournalDamaged, Position, RunLock, read_records
from tracking.mlflow_client import fit_file
from tracking.mlflow_page import Page, Point
from tracking.mlflow_server import as_text, connect, experiment_id, explained, find_run, has_run, store_name
from tracking.run import Run, runs_in

SAMPLES, CHECKPOINTS = "samples.json", "checkpoints.json"  # shown as tables
_BATCH = 1000  # metrics that MLflow takes at once
NOTE = "mlflow.note.content"  # MLflow's page shows this tag as the run's description


class Replica:
    """A run of ours in MLflow. `push` sends what is new, `finish` ends the run as the journal says it ended.

    Both raise TrackingError when the server fails and JournalDamaged; call them again later.
    Only one process at a time may do so: hold run.sending_lock().
    """

    def __init__(self, run: Run, uri: str):
        self.run, self.uri, self.info = run, uri, run.info
        self.repository = run.repository
        self.store = store_name(uri, self.repository)
        self.page = Page(self.info["max_iters"])
        self.run_id = ""
        self.deleted = False  # in MLflow, by the user
        self._client: Any = None
        self._experiment = ""
        self._read: Position = START  # how far the journal has been read; the state says how far it was sent
        self._waiting: list[Point] = []
        self._state: dict[str, Any] = {}

    def push(self) -> None:
        """Sends what the journal and the system metrics have gained."""
        try:
            with explained(self.uri):
                self._connect()
                if not self.deleted:
                    self._send_journal()
                    self._send_system()
                    self._send_text()
                    self._send_artifacts()
        except BaseException:
            self.run_id = ""  # next time, look again at what the server has
            raise

    def finish(self, killed: bool = False) -> None:
        """Pushes, then ends the run. `killed`: the trainer is gone, so a run without an end record is KILLED."""
        self.push()
        end = self.page.end
        if self.deleted or (end is None and not killed):
            return
        with explained(self.uri):
            if end is None:
                newest = max((record["t"] for record in self.page.last.values()), default=self.info["started"])
                end = {"status": "KILLED", "t": newest}
            mark = [end["status"], end["t"], len(self.page.starts)]
            if self._state.get("finished") == mark:
                return
            self._upload("loss.png", mlflow_page.loss_picture(self.page))
            result = end.get("result", {})
            self._tag(
                {f"model.{name}": result[f"model_{name}"] for name in ("sha256", "md5") if f"model_{name}" in result}
            )
            mlflow_models.log_models(self._client, self.run_id, self._experiment, self.page, self.run)
            self._describe(killed)
            # Last, because a run that is FINISHED is one that has everything.
            self._client.set_terminated(self.run_id, end["status"], end_time=end["t"])
            self._save(finished=mark)
            self._save_view()

    def _save_view(self) -> None:
        from mlflow.exceptions import MlflowException

        with suppress(MlflowException):  # a convenience, which a shared server may refuse
            mlflow_view.save(self._client, self._experiment)

    def finished_run(self) -> str | None:
        """The run's id if this server has confirmed all of it; known without asking it, from mlflow.json."""
        state, end = self.run.mlflow, self.run.end
        if state.get("uri") != self.store or end is None:
            return None
        return str(state["run_id"]) if (state.get("finished") or [])[:2] == [end["status"], end["t"]] else None

    def _connect(self) -> None:
        """Finds the run, or creates it: once, and again after a failure."""
        if self.run_id:
            return
        self.page, self._read, self._waiting = Page(self.info["max_iters"]), START, []
        client = self._client = self._client or connect(self.uri, self.repository)
        self._experiment = experiment_id(client, self.uri, self.repository, self.info["experiment"])
        run = find_run(client, self._experiment, f"tags.run_key = '{self.info['run_key']}'")
        tags = {"mlflow.source.name": "stages/train.py", "mlflow.source.type": "LOCAL", **self.info["tags"]}
        if run is None:
            tags["run_key"] = self.info["run_key"]
            started, name = self.info["started"], self.info["name"]
            run = client.create_run(self._experiment, started, run_name=name, tags=_text(tags))
        run_id = run.info.run_id
        self.deleted = run.info.lifecycle_stage != "active"
        state = self.run.mlflow
        same = state.get("uri") == self.store and state.get("run_id") == run_id
        self._state = state if same else {"uri": self.store, "run_id": run_id}
        if not self.deleted and not self._state.get("begun"):
            self._begin(run_id, tags)
        self.run_id = run_id
        self._save(begun=True)

    def _begin(self, run_id: str, tags: dict[str, Any]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag, Param, RunTag
        from mlflow.exceptions import MlflowException

        params = [Param(key, as_text(value)) for key, value in self.info["params"].items()]
        for first in range(0, len(params), 100):
            self._client.log_batch(run_id, params=params[first : first + 100], synchronous=True)
        self._client.log_batch(run_id, tags=[RunTag(*item) for item in _text(tags).items()], synchronous=True)
        data = self.info.get("dataset")
        if data:
            source = json.dumps({"uri": data["source"]})
            profile = json.dumps({"sha256": data["sha256"], **data.get("profile", {})}, sort_keys=True)
            # MLflow takes 36 characters of digest; the profile holds the whole hash.
            entity = Dataset(data["name"], data["sha256"][:36], "local", source, profile=profile)
            inputs = [DatasetInput(entity, [InputTag("mlflow.data.context", "training")])]
            try:
                self._client.log_inputs(run_id, inputs)
            except MlflowException:
                # MLflow looks whether the experiment has this dataset, then adds it. If another run did so in between,
                # this fails; now it is there.
                self._client.log_inputs(run_id, inputs)

    def _send_journal(self) -> None:
        if not self.run.journal.exists():
            return
        # MLflow must not hold what a power cut could take from the journal: the step would come again, at another time.
        fd = os.open(self.run.journal, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
        sent = self._state.get("journal", START)
        for record, end in read_records(self.run.journal, self._read):
            points = self.page.feed(record)
            self._read = end
            if end["bytes"] > sent["bytes"]:
                self._waiting += points
            if len(self._waiting) >= _BATCH - 20:
                self._send_points()
        self._send_points()
        if self._read != sent:
            self._save(journal=self._read)
        finished = self._state.get("finished")
        if finished and not self.page.end and len(self.page.starts) > finished[2]:
            self._client.update_run(self.run_id, status="RUNNING")  # it was killed, and goes on
            self._save(finished=None)

    def _send_points(self) -> None:
        self._log(self._waiting)
        self._waiting = []

    def _log(self, points: list[Point]) -> None:
        from mlflow.entities import Metric

        for first in range(0, len(points), _BATCH):
            batch = [Metric(p.key, p.value, p.t, p.step) for p in points[first : first + _BATCH]]
            self._client.log_batch(self.run_id, metrics=batch, synchronous=True)

    def _send_system(self) -> None:
        path, position = self.run.system, self._state.get("system", START)
        if not path.exists():
            return
        points: list[Point] = []
        try:
            for record, end in read_records(path, position):
                points += [Point(key, record[key], record["t"], record["step"]) for key in record if "/" in key]
                position = end
        except JournalDamaged:
            self._tag({"system_metrics": f"incomplete: {path.name} is damaged"})
        self._log(points)
        if points:
            self._save(system=position)

    def _send_text(self) -> None:
        """The tables and the description, when they have changed."""
        page = self.page
        samples = [len(page.sample_rows()), page.last.get("sample", {}).get("step", -1)]
        kept = self._kept_checkpoints()
        checkpoints = [[row["step"], kept.get(row["step"], "")] for row in page.checkpoint_rows()]
        if samples[0] and self._state.get("samples") != samples:
            self._upload_table(SAMPLES, mlflow_page.sample_table(page))
            self._save(samples=samples)
        if checkpoints and self._state.get("checkpoints") != checkpoints:
            self._upload_table(CHECKPOINTS, mlflow_page.checkpoint_table(page, kept))
            self._save(checkpoints=checkpoints)
        told = [page.last.get("eval", {}).get("step"), len(page.starts), page.end and page.end["t"], samples]
        if self._state.get("described") != told:
            self._describe()
            self._save(described=told)

    def _send_artifacts(self) -> None:
        if self.page.starts and self._state.get("starts") != len(self.page.starts):
            starts = [{name: start.get(name) for name in ("t", "step", "environment")} for start in self.page.starts]
            self._upload("environment.json", (json.dumps(starts, indent=1) + "\n").encode())
            self._save(starts=len(starts))
        folder = self.run.artifacts
        found = {str(p.relative_to(folder)): p.stat() for p in sorted(folder.rglob("*")) if p.is_file()}
        files = {name: [stat.st_size, stat.st_mtime_ns] for name, stat in found.items()}
        if files and self._state.get("artifacts") != files:
            self._client.log_artifacts(self.run_id, str(folder))
            self._save(artifacts=files)

    def _describe(self, killed: bool = False) -> None:
        base = mlflow_page.description(self.page, self.info, killed)
        note = self._client.get_run(self.run_id).data.tags.get(NOTE, "")
        self._tag({NOTE: mlflow_page.with_sections(base, note)})
        if self.page.not_finite:
            self._tag({"not_finite": json.dumps(self.page.not_finite, sort_keys=True)})

    def _tag(self, tags: dict[str, Any]) -> None:
        for key, value in _text(tags).items():
            self._client.set_tag(self.run_id, key, value, synchronous=True)

    def _upload_table(self, name: str, table: str) -> None:
        self._upload(name, fit_file(table).encode())
        tables = sorted({*self._state.get("tables", []), name})
        # With this tag MLflow's page shows the files as tables. Its own log_table would append to what is there.
        self._tag({"mlflow.loggedArtifacts": json.dumps([{"path": path, "type": "table"} for path in tables])})
        self._save(tables=tables)

    def _kept_checkpoints(self) -> dict[int, str]:
        """Where those lie that the training has not replaced yet."""
        found = self.run.checkpoints.glob("step-????????")
        return {int(path.name[5:]): "/".join([".runs", *path.parts[-4:]]) for path in found}

    def _upload(self, name: str, content: bytes) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / name
            path.write_bytes(content)
            self._client.log_artifact(self.run_id, str(path))

    def _save(self, **changes: Any) -> None:
        self._state |= changes
        self.run.write_mlflow(self._state)


def deliver_report(path: Path, uri: str, repository: Path, again: bool = False) -> str | None:
    """Adds what `evaluate` or `sample` wrote to the run that trained their model; returns the run's id.

    The run keeps its status and end. If this server has no run of that model, one is made that says so; None if the
    user has deleted it there, which is left alone. Raises TrackingError when the server fails; deliver it again later.
    `again`: also if the server has confirmed it.
    """
    with explained(uri), RunLock(path.parent, name="reports.lock"):
        report: dict[str, Any] = json.loads(path.read_bytes())
        client = connect(uri, repository)
        deleted = _send_training(client, report["model"], uri, repository)
        run = _run_of(client, report["model"], repository)
        if run is None and deleted:
            return None
        run = run or _run_without_training(client, uri, repository, report)
        mark = {**_mark(report, uri, repository), "run_id": run.info.run_id}
        if again or _known(path) != mark:
            _add_report(client, run, report)
            write_text(_marker(path), json.dumps(mark, sort_keys=True, indent=1) + "\n")
        return str(run.info.run_id)


def delivered_to(path: Path, uri: str, repository: Path) -> str | None:
    """The run to which this very report was added on this server; known without asking it."""
    known = _known(path)
    mark = _mark(json.loads(path.read_bytes()), uri, repository)
    return known["run_id"] if mark.items() <= known.items() else None


def _mark(report: dict[str, Any], uri: str, repository: Path) -> dict[str, str]:
    """What a report's marker says; the same for a report that a repeated stage wrote again at another time."""
    content = json.dumps({**report, "t": None}, sort_keys=True)
    return {"uri": store_name(uri, repository), "sha256": hashlib.sha256(content.encode()).hexdigest()}


def _marker(path: Path) -> Path:
    return path.with_name(f"{path.stem}.delivered")


def _known(path: Path) -> dict[str, str]:
    try:
        known: dict[str, str] = json.loads(_marker(path).read_bytes())
        return known if isinstance(known, dict) else {}
    except (OSError, ValueError):
        return {}


def _send_training(client: Any, model: str, uri: str, repository: Path) -> bool:
    """Sends the training of that model first, if it lies here and has not reached the server.

    Returns whether the user has deleted its run there.
    """
    deleted = False
    for run in runs_in(repository):
        if run.status == "finished" and run.result.get("model_sha256") == model:
            replica = Replica(run, uri)
            if not has_run(client, replica.finished_run()):
                with run.sending_lock():
                    replica.finish()
                deleted = deleted or replica.deleted
    return deleted


def _run_of(client: Any, model: str, repository: Path) -> Any | None:
    """The newest finished run that trained that model, this repository's before others that got the same bits.

    If there is none, one that was made for it by another report.
    """
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    wanted = f"tags.`model.sha256` = '{model}'"
    found = client.search_runs(experiments, wanted, order_by=["attributes.start_time DESC"])
    made = [run for run in found if "model.pulled" in run.data.tags]
    trained = [run for run in found if run not in made and run.info.status == "FINISHED"]
    own = {run.mlflow.get("run_id") for run in runs_in(repository)}
    trained.sort(key=lambda run: run.info.run_id not in own)
    return (trained or made or [None])[0]


def _run_without_training(client: Any, uri: str, repository: Path, report: dict[str, Any]) -> Any:
    name = f"pulled model {report['model'][:8]}"
    note = "The model was pulled: its training run is not in this database."
    tags = {"model.sha256": report["model"], "model.pulled": "training run not in this database", NOTE: note}
    experiment = experiment_id(client, uri, repository, report["experiment"])
    return client.create_run(experiment, report["t"], run_name=name, tags=tags)


def _add_report(client: Any, run: Any, report: dict[str, Any]) -> None:
    from mlflow.entities import Metric, RunTag

    run_id, stage = run.info.run_id, report["stage"]
    found = {
        mlflow_page.REPORTED[key]: value for key, value in report["metrics"].items() if key in mlflow_page.REPORTED
    }
    metrics = [Metric(key, value, report["t"], 0) for key, value in found.items() if math.isfinite(value)]
    text = mlflow_page.report_section(stage, report["metrics"], report["files"])
    note = client.get_run(run_id).data.tags.get(NOTE, "")
    note = mlflow_page.with_sections(mlflow_page.without_sections(note), note, stage, text)
    tags = [RunTag(key, value) for key, value in _text({**report["tags"], NOTE: note}).items()]
    for name, content in report["files"].items():
        client.log_text(run_id, content, name)
    client.log_batch(run_id, metrics=metrics, tags=tags, synchronous=True)
    if run.info.status == "RUNNING":  # one that was made for reports
        client.set_terminated(run_id, "FINISHED", end_time=report["t"])


def _text(tags: dict[str, Any]) -> dict[str, str]:
    return {key: as_text(value) for key, value in tags.items()}
