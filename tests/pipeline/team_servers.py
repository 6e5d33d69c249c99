"""A team's servers on loopback: PostgreSQL, an S3 store, and MLflow by the command of servers/compose.yaml."""

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from ruamel.yaml import YAML

from tests.conftest import REPOSITORY
from tests.faults.servers import free_port
from tests.pipeline.clones import environment

SERVERS = REPOSITORY / "servers"
NAME = "mlflow.example.org"
PASSWORDS = {  # of servers/compose.yaml
    "DATABASE_PASSWORD": "database-4f1c77d6",
    "STORE_PASSWORD": "store-4f1c77d7",
    "MEMBERS_PASSWORD": "members-4f1c77d8",
    "ADMIN_PASSWORD": "admin-4f1c77d9",
    "SECRET_KEY": "secret-4f1c77da",
}


def missing() -> str:
    """What this machine lacks to run the servers; empty if it has everything."""
    packages = [name for name in ("moto", "psycopg2", "flask_wtf", "dvc_s3") if find_spec(name) is None]
    return ", ".join(([] if _postgres() else ["PostgreSQL"]) + packages)


def _postgres() -> Path | None:
    """The folder with initdb and pg_ctl. Debian has it apart from its other commands."""
    found = [Path(path).resolve().parent for path in (shutil.which("initdb"),) if path]
    return next(iter([*found, *sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)]), None)


@contextlib.contextmanager
def database() -> Iterator[Path]:
    """Runs PostgreSQL; gives the folder of its socket. It refuses to be run by root, so root runs it as `postgres`."""
    folder, programs = Path(tempfile.mkdtemp(prefix="postgres-")), _postgres()
    who = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"] if os.getuid() == 0 else []
    (folder / "password").write_text(PASSWORDS["DATABASE_PASSWORD"])
    if who:
        for path in (folder, folder / "password"):
            shutil.chown(path, "postgres", "postgres")
    data = ["--pgdata", f"{folder}/data"]
    owner = ["--username", "mlflow", "--auth", "scram-sha-256", "--pwfile", f"{folder}/password"]
    options = f"-c listen_addresses= -c unix_socket_directories={folder} -c fsync=off"

    def run(program: str, *arguments: str, **variables: str) -> None:
        command = [*who, f"{programs}/{program}", *arguments]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd="/", env=os.environ | variables)

    run("initdb", *data, *owner, "--no-sync")
    run("pg_ctl", "start", *data, "--wait", "--options", options, "--log", f"{folder}/log")
    try:
        login = ["--host", str(folder), "--username", "mlflow", "--dbname", "postgres"]
        run("psql", *login, "--command", "CREATE DATABASE mlflow", PGPASSWORD=PASSWORDS["DATABASE_PASSWORD"])
        yield folder
    finally:
        run("pg_ctl", "stop", *data, "--mode", "immediate")
        shutil.rmtree(folder, ignore_errors=True)


class TeamServers:
    """MLflow with accounts, on its database and its store. `kill` and `start` are a server that is away for a while."""

    def __init__(self, folder: Path, database: Path, endpoint: str):
        self.folder, self.database, self.endpoint, self.port = folder, database, endpoint, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._service = YAML(typ="safe").load(SERVERS / "compose.yaml")["services"]["mlflow"]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Runs the service's command with its variables, but on loopback, by one worker, and with these stores."""
        here = {"0.0.0.0": "127.0.0.1", "5000": str(self.port), "--workers 2": "--workers 1"}
        here |= {"/buckets.py": str(SERVERS / "buckets.py"), "python ": f"{sys.executable} "}
        command = str(self._service["command"])
        for there, value in here.items():
            assert there in command, there
            command = command.replace(there, value)
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                shlex.split(command), cwd="/", env=self.variables(), stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + 120
        while not self._answers():
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.2)

    def variables(self) -> dict[str, str]:
        """The service's environment, with the addresses of here."""
        filled = {"SERVER": NAME, **PASSWORDS}
        named = {
            name: re.sub(r"\$\{(\w+):\?\}", lambda found: filled[found[1]], value)
            for name, value in self._service["environment"].items()
        }
        here = {
            "PGHOST": str(self.database),
            "MLFLOW_S3_ENDPOINT_URL": self.endpoint,
            "MLFLOW_AUTH_CONFIG_PATH": str(SERVERS / "basic_auth.ini"),
        }
        hosts = named["MLFLOW_SERVER_ALLOWED_HOSTS"].replace("127.0.0.1:5000", "127.0.0.1:*")
        return environment() | named | here | {"MLFLOW_SERVER_ALLOWED_HOSTS": hosts}

    @property
    def log(self) -> Path:
        return self.folder / "mlflow.log"

    def requests(self) -> list[str]:
        """The requests that it has answered, such as "POST /api/2.0/mlflow/runs/create"."""
        return re.findall(r'"([A-Z]+ /(?!health)\S*) HTTP', self.log.read_text())

    def _answers(self) -> bool:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=5) as response:
            return bool(response.status == 200)
        return False

    def kill(self) -> None:
        if self._process:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def administrator(self) -> dict[str, str]:
        return {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": PASSWORDS["ADMIN_PASSWORD"]}

    def members(self, *names: str) -> dict[str, str]:
        """Has servers/members.py make accounts or new passwords; name -> password."""
        command = [sys.executable, SERVERS / "members.py", *names]
        variables = self.variables() | {"MLFLOW_TRACKING_URI": self.uri}
        printed = subprocess.run(command, env=variables, check=True, text=True, stdout=subprocess.PIPE).stdout
        return dict(line.split() for line in printed.splitlines())


@contextlib.contextmanager
def team_servers(folder: Path) -> Iterator[TeamServers]:
    from moto.server import ThreadedMotoServer

    store = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    store.start()
    try:
        with database() as socket:
            servers = TeamServers(folder, socket, f"http://127.0.0.1:{store.get_host_and_port()[1]}")
            servers.start()
            try:
                yield servers
            finally:
                servers.kill()
    finally:
        store.stop()
