"""Without a tracking server nothing is lost, and passwords and tokens reach no log, no file and no MLflow."""

import base64
import contextlib
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pipeline.clones import Clone, closed_port

pytestmark = pytest.mark.pipeline

ENVIRONMENT = {
    "AWS_SECRET_ACCESS_KEY": "aws-4f1c77d0",
    "HF_TOKEN": "hf_4f1c77d1",
    "MLFLOW_TRACKING_USERNAME": "somebody",
    "MLFLOW_TRACKING_PASSWORD": "password-4f1c77d2",
    "MLFLOW_TRACKING_TOKEN": "bearer-4f1c77d3",
    "NANOGPT_TEST_CANARY": "canary-4f1c77d4",
}
IN_ADDRESS = "s3cret-4f1c77d5"
SECRETS = [*(value for name, value in ENVIRONMENT.items() if name != "MLFLOW_TRACKING_USERNAME"), IN_ADDRESS]
SPELLINGS = [*SECRETS, *(base64.b64encode(f"{user}:{IN_ADDRESS}".encode()).decode() for user in ("user", "somebody"))]


def leaks(clone: Clone, output: str) -> list[str]:
    """Where a secret stands: in what was printed, or in any file of the clone, MLflow's database among them."""
    places = {"the output": output.encode()}
    for path in clone.path.rglob("*"):
        if path.is_file() and not path.is_symlink():
            places[str(path.relative_to(clone.path))] = path.read_bytes()
    assert any(name.endswith("tracking.log") for name in places)
    return [f"{secret} in {place}" for place, data in places.items() for secret in SPELLINGS if secret.encode() in data]


def test_the_search_finds_a_secret_where_there_is_one(tmp_path: Path):
    clone = Clone(tmp_path)
    clone.write(".runs/x/tracking.log", f"token {IN_ADDRESS}")
    assert leaks(clone, "HF_TOKEN is hf_4f1c77d1") == [
        "hf_4f1c77d1 in the output",
        f"{IN_ADDRESS} in .runs/x/tracking.log",
    ]


@contextlib.contextmanager
def answering(status: int) -> Iterator[int]:
    """A server that answers every request with that status, the whole address, and the credentials that came."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            asked.append(str(self.headers.get("Authorization")))
            body = f"no: http://user:{IN_ADDRESS}@127.0.0.1{self.path} with {asked[-1]}\n".encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = do_PUT = do_PATCH = answer

        def log_message(self, *_: object) -> None:
            pass

    asked: list[str] = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield listening.server_address[1]
        listening.shutdown()
    assert any(header.startswith(("Basic ", "Bearer ")) for header in asked), asked


def test_without_a_server_the_pipeline_succeeds_and_sync_brings_everything_later(seed, copy_of):
    """The only test that finds a report that is lost, or a secret that such a server's answer or its address brings
    into a log, a journal or the terminal. A server answers train and evaluate with errors; sample's is dead.
    """
    clone = copy_of(seed, runs=False)
    (clone.path / "mlflow.db").unlink()
    clone.set_params(**{"tracking.wait_seconds": 1})
    clone.forget("train", "evaluate", "sample")
    no_uri = f"http://user:p/{IN_ADDRESS}@127.0.0.1:{closed_port()}"
    uri = f"http://user:p@{IN_ADDRESS}@127.0.0.1:{closed_port()}/?token={IN_ADDRESS}"
    output = ""
    for status, stage in ((401, "train"), (500, "evaluate")):
        with answering(status) as port:
            address = f"http://user:{IN_ADDRESS}@127.0.0.1:{port}"
            output += clone.repro(stage, MLFLOW_TRACKING_URI=address, **ENVIRONMENT)
    output += clone.repro(MLFLOW_TRACKING_URI=uri, **ENVIRONMENT)
    assert output.count("`python -m tools sync` sends it later") == 3, output
    assert clone.lock() == seed.lock()
    assert clone.outs() == seed.outs()
    assert not (clone.path / "mlflow.db").exists()
    assert clone.processes() == []

    for address in (no_uri, uri):
        printed = clone.run("python -m tools sync", check=1, MLFLOW_TRACKING_URI=address, **ENVIRONMENT)
        assert "failed: MLflow at " in printed
        output += printed
    output += clone.run("python -m tools sync", **ENVIRONMENT)
    assert "is complete in MLflow" in output
    assert leaks(clone, output) == []
    (run,), (reference,) = clone.runs(), seed.runs()
    assert run.info.status == "FINISHED"
    assert run.data.params == reference.data.params
    assert set(run.data.metrics) >= set(reference.data.metrics)
    scores = clone.scores()
    assert {key: run.data.metrics[key] for key in scores} == scores
    for key in ("train/loss", "eval/val_loss", "tokens_per_second"):
        assert clone.history(run, key) == seed.history(reference, key)
    models, expected = (
        sorted(model.name for model in each.client().search_logged_models([of.info.experiment_id]))
        for each, of in ((clone, run), (seed, reference))
    )
    assert models == expected
    assert "has everything" in clone.tool("sync")
