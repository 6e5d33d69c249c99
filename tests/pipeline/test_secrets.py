"""Passwords and tokens, in the environment or in the address of a server, reach no log, no file and no MLflow."""

import base64
import contextlib
import http.server
import threading
from collections.abc import Callable, Iterator

import pytest

from tests.pipeline.clones import Clone
from tracking.redaction import redact

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


@pytest.fixture
def clone(seed: Clone, copy_of: Callable[..., Clone]) -> Clone:
    """A clone in which train, evaluate and sample are to be run, and a dead server is not waited for."""
    clone = copy_of(seed, runs=False)
    clone.set_params(**{"tracking.wait_seconds": 1})
    clone.forget("train", "evaluate", "sample")
    return clone


def test_the_search_finds_a_secret_where_there_is_one(clone: Clone):
    clone.write(".runs/x/tracking.log", f"token {IN_ADDRESS}")
    assert leaks(clone, "HF_TOKEN is hf_4f1c77d1") == [
        "hf_4f1c77d1 in the output",
        f"{IN_ADDRESS} in .runs/x/tracking.log",
    ]


@pytest.mark.parametrize(
    "address",
    [
        f"http://user:{IN_ADDRESS}@127.0.0.1:9",
        f"http://user:p@{IN_ADDRESS}@127.0.0.1:9",
        f"http://user:p/{IN_ADDRESS}@127.0.0.1:9",
        f"http://127.0.0.1:9/?token={IN_ADDRESS}",
        f"http://user:p@{IN_ADDRESS}@127.0.0.1:9/?token={IN_ADDRESS}",
    ],
)
def test_an_address_without_its_secrets(address: str):
    shown = redact(f"failed at {address} (refused)")
    assert "127.0.0.1:9" in shown
    assert IN_ADDRESS not in shown


@contextlib.contextmanager
def server(status: int) -> Iterator[int]:
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


def test_of_a_server_that_repeats_them(clone: Clone):
    """The only test that finds a secret that a server's own answer brings into a log, a journal or the terminal."""
    output = ""
    for status, stage in ((401, "train"), (500, "evaluate")):
        with server(status) as port:
            uri = f"http://user:{IN_ADDRESS}@127.0.0.1:{port}"
            output += clone.repro(stage, MLFLOW_TRACKING_URI=uri, **ENVIRONMENT)
            output += clone.run("python -m tools sync", check=1, MLFLOW_TRACKING_URI=uri, **ENVIRONMENT)
    assert output.count("`python -m tools sync` sends it later") == 2, output
    output += clone.run("python -m tools sync", **ENVIRONMENT)
    assert leaks(clone, output) == []
