"""Replicates a run's journal in MLflow. Only the modules named mlflow_* use mlflow.

Everything may be sent again: a point with the same time, step and value is stored once, a run is looked for by its key
before it is created, and progress is written down only after the server has confirmed it. So a dead, slow or new server
costs a replay and nothing else.
"""

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from nanogpt.files import write_json
from tracking import mlflow_models, mlflow_page, mlflow_view
from tracking.journal import START, JournalDamaged, Position, read_records
from tracking.lock import RunLock
from tracking.mlflow_client import fit_file
from tracking.mlflow_page import REPORTED, Page, Point
from tracking.mlflow_server import connect, experiment_id, explained, find_run, has_run, store_name
from tracking.run import Run, read_object, runs_in

SAMPLES, CHECKPOINTS = "samples.json", "checkpoints.json"  # shown as tables
NOTE = "mlflow.note.content"  # MLflow's page shows this tag as the run's description


class Replica:
    """A run of the journals in MLflow. `push` sends what is new, `finish` also ends the run as the journal says.

    Both raise TrackingError when the server fails, and JournalDamaged; call them again later. Only one process at a
    time may call them: hold run.sending_lock().
    """

    def __init__(self, run: Run, uri: str):
        self.run, self.uri, self.info = run, uri, run.info
        self.repository = run.repository
        self.store = store_name(uri, self.repository)
        self.page = Page(self.info["max_iters"])
        self.run_id = ""
        self.deleted = False  # by the user, in MLflow
        self._client: Any = None
        self._experiment = ""
        self._read: Position = START  # how far the journal has been read; _state records how far it was sent
        self._state: dict[str, Any] = {}

    def push(self) -> None:
        """Sends what has been added to the journal and to the system metrics."""
        try:
            with explained(self.uri):
                self._connect()
                if not self.deleted:
                    self._send_journal()
                    self._send_system()
                    self._send_files()
                    self._send_description()
        except BaseException:
            self.run_id = ""  # next time, look again at what the server has
            raise

    def finish(self, killed: bool = False) -> None:
        """Pushes, then ends the run. `killed`: its process is gone, so a run without an end record becomes KILLED."""
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
            self._client.log_file(self.run_id, "loss.png", mlflow_page.loss_picture(self.page))
            self._client.set_tags(self.run_id, self.run.model_tags)
            mlflow_models.log_models(self._client, self.run_id, self._experiment, self.page, self.run)
            self._describe(killed)
            # Last, because a run that is FINISHED must be complete.
            self._client.set_terminated(self.run_id, end["status"], end_time=end["t"])
            self._save(finished=mark)
            self._save_view()

    def _save_view(self) -> None:
        from mlflow.exceptions import MlflowException

        with suppress(MlflowException):  # a shared server may refuse it, and it is only a convenience
            mlflow_view.save(self._client, self._experiment)

    def finished_run(self) -> str | None:
        """The run's id if mlflow.json says that this server has the whole run; does not ask the server."""
        state, end = self.run.mlflow, self.run.end
        if state.get("uri") != self.store or end is None:
            return None
        return str(state["run_id"]) if (state.get("finished") or [])[:2] == [end["status"], end["t"]] else None

    def _connect(self) -> None:
        """Finds or creates the run, the first time and after each failure."""
        if self.run_id:
            return
        self.page, self._read = Page(self.info["max_iters"]), START
        client = self._client = self._client or connect(self.uri, self.repository)
        self._experiment = experiment_id(client, self.uri, self.repository, self.info["experiment"])
        run = find_run(client, self._experiment, f"tags.run_key = '{self.info['run_key']}'")
        tags = {"mlflow.source.name": "stages/train.py", "mlflow.source.type": "LOCAL", **self.info["tags"]}
        if run is None:
            tags["run_key"] = self.info["run_key"]
            run = client.create_run(self._experiment, self.info["started"], self.info["name"], tags)
        run_id = run.info.run_id
        self.deleted = run.info.lifecycle_stage != "active"
        state = self.run.mlflow
        same = state.get("uri") == self.store and state.get("run_id") == run_id
        self._state = state if same else {"uri": self.store, "run_id": run_id}
        if not self.deleted and not self._state.get("begun"):
            client.log_params(run_id, self.run.params)
            client.set_tags(run_id, tags)
            self._log_dataset(run_id)
        self.run_id = run_id
        self._save(begun=True)

    def _log_dataset(self, run_id: str) -> None:
        from mlflow.exceptions import MlflowException

        data = self.info.get("dataset")
        if data:
            profile = json.dumps({"sha256": data["sha256"], **data.get("profile", {})}, sort_keys=True)
            arguments = run_id, data["name"], data["sha256"], json.dumps({"uri": data["source"]}), profile
            try:
                self._client.log_dataset(*arguments)
            except MlflowException:
                # MLflow adds a dataset that the experiment does not have yet. That fails if another run has added it
                # in between; then it is there.
                self._client.log_dataset(*arguments)

    def _send_journal(self) -> None:
        if not self.run.journal.exists():
            return
        # MLflow must not have what a power cut could take from the journal: the step would come again, at another time.
        fd = os.open(self.run.journal, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
        sent, new = self._state.get("journal", START), []
        for record, end in read_records(self.run.journal, self._read):
            points = self.page.feed(record)
            self._read = end
            if end["bytes"] > sent["bytes"]:
                new += points
        self._client.log_points(self.run_id, new)
        if self._read != sent:
            self._save(journal=self._read)
        finished = self._state.get("finished")
        if finished and not self.page.end and len(self.page.starts) > finished[2]:
            self._client.update_run(self.run_id, status="RUNNING")  # it was killed, and has been resumed
            self._save(finished=None)

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
            self._client.set_tags(self.run_id, {"system_metrics": f"incomplete: {path.name} is damaged"})
        self._client.log_points(self.run_id, points)
        if points:
            self._save(system=position)

    def _send_files(self) -> None:
        """Sends the artifacts and tables that have changed."""
        page, folder = self.page, self.run.artifacts
        files = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
        if page.starts:
            starts = [{name: start.get(name) for name in ("t", "step", "environment")} for start in page.starts]
            files["environment.json"] = fit_file(json.dumps(starts, indent=1) + "\n")
        if page.samples:
            files[SAMPLES] = fit_file(mlflow_page.sample_table(page))
        if page.checkpoint_rows():
            files[CHECKPOINTS] = fit_file(mlflow_page.checkpoint_table(page, self._kept_checkpoints()))
        sent = self._state.setdefault("files", {})
        for name, content in files.items():
            sha256 = hashlib.sha256(content).hexdigest()
            if sent.get(name) != sha256:
                self._client.log_file(self.run_id, name, content)
                sent[name] = sha256
                self._save()

    def _send_description(self) -> None:
        """Sends the description if more than the step has changed."""
        last, starts, end = self.page.last, self.page.starts, self.page.end
        steps = [last.get(kind, {}).get("step") for kind in ("eval", "sample")]
        described = [*steps, len(starts), end and end["t"]]
        if self._state.get("described") != described:
            self._describe()
            self._save(described=described)

    def _describe(self, killed: bool = False) -> None:
        base = mlflow_page.description(self.page, killed)
        tags = {NOTE: mlflow_page.with_sections(base, _note_of(self._client, self.run_id))}
        if self.page.not_finite:
            tags["not_finite"] = json.dumps(self.page.not_finite, sort_keys=True)
        if tables := [name for name in (CHECKPOINTS, SAMPLES) if name in self._state.get("files", {})]:
            # With this tag MLflow's page shows the files as tables. MLflow's own log_table would append to them.
            tags["mlflow.loggedArtifacts"] = json.dumps([{"path": name, "type": "table"} for name in tables])
        self._client.set_tags(self.run_id, tags)

    def _kept_checkpoints(self) -> dict[int, str]:
        """Where the checkpoints are that still exist: step -> directory."""
        found = self.run.checkpoints.glob("step-????????")
        return {int(path.name[5:]): "/".join([".runs", *path.parts[-4:]]) for path in found}

    def _save(self, **changes: Any) -> None:
        self._state |= changes
        self.run.write_mlflow(self._state)


def _note_of(client: Any, run_id: str) -> str:
    return str(client.get_run(run_id).data.tags.get(NOTE, ""))


# --- reports: what evaluate and sample have found


def deliver_report(path: Path, uri: str, repository: Path, again: bool = False) -> str | None:
    """Adds a report to the run that trained its model; returns the run's id.

    The run keeps its status and end. If the server has no such run, one is created that says so. None if the user has
    deleted the run there: then nothing is sent. `again`: send it even if the server has confirmed it. Raises
    TrackingError when the server fails; call it again later.
    """
    with explained(uri), RunLock(path.parent, name="reports.lock"):
        report: dict[str, Any] = json.loads(path.read_bytes())
        client = connect(uri, repository)
        deleted = _send_training(client, report["model"], uri, repository)
        run = _run_of(client, report["model"], repository)
        if run is None and deleted:
            return None
        run = run or _run_without_training(client, uri, repository, report)
        run_id = str(run.info.run_id)
        # The report cannot have changed since it was delivered: its name contains a hash of its content.
        if again or delivered_to(path, uri, repository) != run_id:
            _add_report(client, run, report)
            write_json(path.with_suffix(".delivered"), {"uri": store_name(uri, repository), "run_id": run_id})
        return run_id


def delivered_to(path: Path, uri: str, repository: Path) -> str | None:
    """The id of the run to which this report was added on this server; does not ask the server."""
    delivery = read_object(path.with_suffix(".delivered"))
    return delivery["run_id"] if delivery.get("uri") == store_name(uri, repository) else None


def _send_training(client: Any, model: str, uri: str, repository: Path) -> bool:
    """Sends the runs here that trained that model, unless the server has them.

    Returns whether the user has deleted one of them there.
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
    """The newest finished run that trained that model, preferably one of this repository; it may be another with the
    same bits. Without one, the run that was created for another report on the model.
    """
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    found = client.search_runs(experiments, f"tags.`model.sha256` = '{model}'", order_by=["attributes.start_time DESC"])
    pulled = [run for run in found if "model.pulled" in run.data.tags]
    trained = [run for run in found if run not in pulled and run.info.status == "FINISHED"]
    here = {run.mlflow.get("run_id") for run in runs_in(repository)}
    trained.sort(key=lambda run: run.info.run_id not in here)
    return (trained or pulled or [None])[0]


def _run_without_training(client: Any, uri: str, repository: Path, report: dict[str, Any]) -> Any:
    note = "The model was pulled: its training run is not in this database."
    tags = {"model.sha256": report["model"], "model.pulled": "training run not in this database", NOTE: note}
    experiment = experiment_id(client, uri, repository, report["experiment"])
    return client.create_run(experiment, report["t"], f"pulled model {report['model'][:8]}", tags)


def _add_report(client: Any, run: Any, report: dict[str, Any]) -> None:
    run_id, stage = run.info.run_id, report["stage"]
    text = mlflow_page.report_section(stage, report["metrics"], report["files"])
    note = _note_of(client, run_id)
    note = mlflow_page.with_sections(mlflow_page.without_sections(note), note, stage, text)
    for name, content in report["files"].items():
        client.log_file(run_id, name, fit_file(content))
    reported = ((REPORTED[key], value) for key, value in report["metrics"].items() if key in REPORTED)
    client.log_points(run_id, [Point(key, value, report["t"], 0) for key, value in reported])
    client.set_tags(run_id, {**report["tags"], NOTE: note})
    if run.info.status == "RUNNING":  # created for this report
        client.set_terminated(run_id, "FINISHED", end_time=report["t"])
