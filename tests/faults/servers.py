"""A real tracking server on loopback, and a proxy before it that is slow, answers 500, or is not there."""

import contextlib
import os
import signal
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from mlflow import MlflowClient

from tests.pipeline.clones import environment


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


class Server:
    """`mlflow server` with a database of its own; the same port and database each time it is started."""

    def __init__(self, folder: Path):
        self.folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None
        folder.mkdir()

    def start(self) -> None:
        command = ["mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        stores = [
            "--backend-store-uri",
            f"sqlite:///{self.folder}/db",
            "--artifacts-destination",
            f"{self.folder}/files",
        ]
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [*command, *stores],
                env=environment() | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + 120
        while not self._answers():
            assert time.monotonic() < deadline, (self.folder / "server.log").read_text()
            time.sleep(0.2)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=5) as response:
                return bool(response.status == 200)
        except OSError:
            return False

    def kill(self) -> None:
        if self._process:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def client(self) -> MlflowClient:
        return MlflowClient(self.uri)


class Proxy:
    """Passes connections on to a port; `mode` may be changed: "pass", "slow" (2 s before each answer), "500", "far".

    "far" delays each answer by 50 ms, once, as a server in another country does.
    """

    def __init__(self, target: int, mode: str = "pass"):
        self.target, self.mode, self.requests = target, mode, 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.uri = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            if self.mode == "500":
                connection.recv(65536)
                self.requests += 1
                body = b"it is broken"
                head = f"HTTP/1.1 500 Internal Server Error\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
                connection.sendall(head.encode() + body)
                return
            with socket.create_connection(("127.0.0.1", self.target)) as server:
                asked = threading.Event()
                threading.Thread(target=self._answers, args=(server, connection, asked), daemon=True).start()
                while block := connection.recv(65536):
                    self.requests += 1
                    asked.set()
                    server.sendall(block)

    def _answers(self, server: socket.socket, connection: socket.socket, asked: threading.Event) -> None:
        with contextlib.suppress(OSError):
            while block := server.recv(65536):
                if self.mode == "slow":
                    time.sleep(2)
                elif self.mode == "far" and asked.is_set():
                    asked.clear()
                    time.sleep(0.05)
                connection.sendall(block)


@contextlib.contextmanager
def running(folder: Path) -> Iterator[Server]:
    server = Server(folder)
    server.start()
    try:
        yield server
    finally:
        server.kill()
