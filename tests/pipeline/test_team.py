"""A team's day on real servers: two members train, share, compare and register a champion, by the commands of the page.

The commands are those of docs/team.md; only names, addresses and sizes are replaced.
"""

import contextlib
import json
import os
import re
import shlex
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import pytest
import requests

from tests.conftest import REPOSITORY
from tests.faults.servers import Proxy
from tests.pipeline import team_servers
from tests.pipeline.clones import Clone, closed_port, environment
from tests.pipeline.team_servers import NAME, PASSWORDS, TeamServers
from tools.champion import finished_runs, register
from tracking.comparison import select
from tracking.mlflow_server import connect

pytestmark = pytest.mark.pipeline

PAGE = (REPOSITORY / "docs" / "team.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    (.+)$", PAGE, re.MULTILINE)
ALLOWED = 60  # requests of a whole run with one model and two reports
ADA, BEN = "ada-wide", "ben-deep"


def said(beginning: str, **instead: str) -> str:
    """The only command of the page that begins so, with some of its words replaced."""
    (command,) = [command for command in COMMANDS if command.startswith(beginning)]
    for word, other in instead.items():
        assert word in command
        command = command.replace(word, other)
    return command


@dataclass
class Team:
    """Two clones of one origin, each with its member's variables; what their commands have printed."""

    servers: TeamServers
    proxy: Proxy  # by which Ada reaches MLflow, so that it can be far away
    ada: Clone
    ben: Clone
    requests: list[str] = field(default_factory=list)  # of the first sync


def member(clone: Clone, address: str, name: str, password: str) -> Clone:
    """The clone with the variables that the page has its member set."""
    values = {
        f"http://{NAME}:5000": address,
        "ada": name,
        "<ada's password>": password,
        "<MEMBERS_PASSWORD of servers/.env>": PASSWORDS["MEMBERS_PASSWORD"],
    }
    for line in (command for command in COMMANDS if command.startswith("export ")):
        variable, _, value = line.removeprefix("export ").partition("=")
        clone.variables[variable] = values.get(value, value)
    return clone


@pytest.fixture(scope="session")
def installed() -> None:
    if lacking := team_servers.missing():
        pytest.skip(f"a team's servers need {lacking} (.ci/run installs it)")


@pytest.fixture(scope="module")
def team(installed: None, seed: Clone, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    """Ada has sent a finished pipeline, Ben has cloned it; each has queued and run an experiment and sent it."""
    folder = tmp_path_factory.mktemp("team")
    with team_servers.team_servers(folder) as servers:
        passwords = servers.members("ada", "ben")
        seed.run(f"git clone --quiet --bare . {folder}/origin.git")
        proxy = Proxy(servers.port)
        ada = member(seed.copy(folder / "ada"), proxy.uri, "ada", passwords["ada"])
        ben = member(Clone(folder / "ben"), servers.uri, "ben", passwords["ben"])
        team = Team(servers, proxy, ada, ben)
        try:
            share(team, folder)
            train(team)
            yield team
        finally:
            for clone in (ada, ben):
                clone.end_processes()
            proxy.close()


def share(team: Team, folder: Path) -> None:
    ada, ben = team.ada, team.ben
    ada.run(f"git remote add origin {folder}/origin.git")
    ada.run(said("dvc remote add"))
    ada.run(said("dvc remote modify", **{f"http://{NAME}:8333": team.servers.endpoint}))
    ada.run(f"{said('git add')} && {said('git push')} && {said('dvc push')}")
    before, begin, team.proxy.mode = len(team.servers.requests()), time.monotonic(), "far"
    tool(ada, said("python -m tools sync"))
    team.requests, seconds, team.proxy.mode = team.servers.requests()[before:], time.monotonic() - begin, "pass"
    print(f"a run's sync: {len(team.requests)} requests, {seconds:.1f} s with 50 ms before each answer")
    ada.run(said("git clone", **{"git@example.org:team/nanogpt.git": f"{folder}/origin.git {ben.path}"}))
    ben.run(said("dvc pull"))


def train(team: Team) -> None:
    """Both queues work at the same time."""
    names = {"ada-wide": BEN, "model.n_embd=192": "model.n_layer=3"}
    for clone, instead in ((team.ada, {"192": "64"}), (team.ben, names)):
        clone.run(said("dvc exp run --queue", **instead))
    with ThreadPoolExecutor() as pool:
        printed = [pool.submit(clone.run, said("python -m tools queue")) for clone in (team.ada, team.ben)]
    for clone, name, output in zip((team.ada, team.ben), (ADA, BEN), printed, strict=True):
        assert f"1 of 1  {name}  done" in output.result(), clone.logs()
        clone.run(said("dvc exp push", **{ADA: name}))


def test_every_command_of_the_page_is_run():
    """Except those that need Docker or install, and what the fixture does."""
    here = tuple(re.findall(r"""said\(["']([^"']+)""", Path(__file__).read_text(encoding="utf-8")))
    elsewhere = (
        "cd ",
        "for name in ",
        "echo ",
        "docker compose ",
        "pip install ",
        "export ",
        "make setup",
        "source ",
    )
    assert [command for command in COMMANDS if not command.startswith((*here, *elsewhere))] == []


def test_a_runs_sync_takes_few_requests(team: Team):
    """The only test that finds a request for each file of a model, which takes a distant server seconds."""
    asked = team.requests
    assert sum("runs/create" in request for request in asked) == 1
    assert len(asked) <= ALLOWED, "\n".join(asked)
    before = len(team.servers.requests())
    assert "has everything" in team.ada.tool("sync")
    assert len(team.servers.requests()) - before <= 10


def test_members_compare_everybodys_runs_and_pull_a_colleagues_best(team: Team):
    """The only test that finds an experiment of a queue whose data or run does not reach the other member."""
    for clone in (team.ada, team.ben):
        assert "3 runs of 3 settings" in tool(clone, said("python -m tools compare"))
    assert ADA in team.ben.run(said("dvc exp list"))
    assert "Pulled experiment" in team.ada.run(said("dvc exp pull", **{ADA: BEN}))
    team.ben.run(f"{said('dvc exp pull')} && {said('dvc exp apply')}")
    assert json.loads(team.ben.read("model/model.json"))["config"]["n_embd"] == 64
    team.ben.run("git checkout --quiet . && dvc checkout")


def test_a_colleagues_run_becomes_the_champion_and_loads_without_the_repository(team: Team, tmp_path: Path):
    """The only test that finds a champion that needs its trainer's clone to be registered, beaten or loaded."""
    champion = said("python -m tools champion")
    assert re.search(rf"{ADA} .*is the champion: version 1 of nanogpt", tool(team.ben, champion))
    refused = tool(team.ben, champion.replace(ADA, BEN), check=1)
    assert re.search(rf"{BEN} .*does not become the champion: against {ADA} ", refused)

    elsewhere = Clone(tmp_path)
    elsewhere.variables = team.ada.variables
    assert "['One sunny morning" in elsewhere.run(said("python -c"), PYTHONPATH="")

    with contextlib.chdir(team.ada.path), patch.dict(os.environ, environment() | team.ada.variables):
        root, address = team.ada.path, team.proxy.uri  # Ada is no owner of the registered model, which Ben created
        (theirs,) = select(finished_runs(root, address), BEN, root)
        assert register(connect(address, root), theirs, ["by hand"]) == "2"


def test_refusals_say_whose_they_are_and_what_to_do(team: Team):
    """The only test that finds a guest who can write, or a refusal of the real server that is explained as another."""
    guest = {"MLFLOW_TRACKING_USERNAME": "eve", "MLFLOW_TRACKING_PASSWORD": "guest-4f1c77db"}
    from mlflow.server.auth.client import AuthServiceClient  # which not every environment has

    with patch.dict(os.environ, team.servers.administrator()):
        AuthServiceClient(team.servers.uri).create_user(*guest.values())
    compare = said("python -m tools compare")
    assert "3 runs of 3 settings" in tool(team.ada, compare, **guest)
    assert "does not allow this account to do that" in team.ada.tool("sync", "--again", check=1, **guest)
    for variables, refusal in (
        ({"MLFLOW_TRACKING_PASSWORD": "expired"}, "refuses these credentials"),
        (
            {"MLFLOW_TRACKING_URI": team.servers.uri.replace("127.0.0.1", "localhost")},
            "does not accept this host name",
        ),
        ({"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{closed_port()}"}, "cannot be reached"),
    ):
        assert refusal in tool(team.ada, compare, check=1, **variables)


def test_a_browser_is_answered_under_the_servers_name_alone(team: Team):
    """The only test that finds a page that shows nothing: a browser names its origin, and our commands do not."""

    def status(host: str, origin: str) -> int:
        return requests.post(
            f"{team.servers.uri}/ajax-api/2.0/mlflow/experiments/search",
            json={"max_results": 1},
            auth=("ada", team.ada.variables["MLFLOW_TRACKING_PASSWORD"]),
            headers={"Host": host, "Origin": origin},
            timeout=60,
        ).status_code

    for address in (f"http://{NAME}:5000", f"https://{NAME}"):  # the second one by a proxy
        assert status(address.partition("//")[2], address) == 200
        assert status(address.partition("//")[2], "http://elsewhere.example.org") == 403
        assert status("elsewhere.example.org", address) == 403


def test_no_password_is_in_a_clone_or_in_the_servers_log(team: Team):
    secrets = [*PASSWORDS.values(), *(clone.variables["MLFLOW_TRACKING_PASSWORD"] for clone in (team.ada, team.ben))]
    files = [path for clone in (team.ada, team.ben) for path in clone.path.rglob("*") if path.is_file()]
    for path in [*files, team.servers.log]:
        content = path.read_bytes()
        assert not [secret for secret in secrets if secret.encode() in content], path


def tool(clone: Clone, command: str, check: int = 0, **variables: str) -> str:
    """A command of ours, in this process."""
    return clone.tool(*shlex.split(command.removeprefix("python -m tools ")), check=check, **variables)
