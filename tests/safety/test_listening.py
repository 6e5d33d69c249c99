"""Whatever listens does so on this machine alone, unless told otherwise."""

import re
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
HERE = "tests/safety/test_listening.py"
# A team's server answers its members, from a container that has an address of its own; the test starts it here alone.
TEAM = {"servers/compose.yaml", "tests/pipeline/team_servers.py"}


def texts() -> dict[str, str]:
    """All files of the repository that can hold a command or code."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    chosen = [name for name in listed if Path(name).suffix in {"", ".py", ".md", ".yaml", ".yml", ".toml", ".sh"}]
    paths = {name: REPOSITORY / name for name in chosen if name != HERE}
    return {name: path.read_text(encoding="utf-8", errors="replace") for name, path in paths.items() if path.is_file()}


def test_nothing_listens_on_every_address() -> None:
    wildcard = re.compile(r"""0\.0\.0\.0|\bINADDR_ANY\b|--host[= ]\*|\[::\]|bind\(\(["']["']""")
    offered = re.compile(r"0\.0\.0\.0`? answers other machines")  # what `serve --host` can be told
    assert {name for name, text in texts().items() if wildcard.search(offered.sub("", text))} == TEAM


def test_every_server_that_is_started_is_told_this_machine_s_address() -> None:
    """MLflow's page, and what else could be started."""
    started = re.compile(r"^\s*[^#\n]*\b(?:mlflow (?:ui|server)|tensorboard|jupyter|uvicorn|gunicorn|http\.server)\b")
    found = []
    for name, text in texts().items():
        if not (name in {"Makefile", "tools/ui.py"} or name.startswith(".ci/") or name.endswith((".md", ".yaml"))):
            continue
        for line in [] if name in TEAM else text.replace("\\\n", " ").splitlines():
            if started.search(line):
                found.append(name)
                assert re.search(r"--host[= ]127\.0\.0\.1\b", line), f"{name}: {line}"
    assert "tools/ui.py" in found


@pytest.mark.parametrize("folder", ["nanogpt", "stages", "tools", "benchmarks"])
def test_no_module_opens_a_socket_to_listen_for_others(folder: str) -> None:
    listening = re.compile(r"\.bind\(|\.listen\(|\bsocketserver\b|http\.server|HTTPServer|start_server|create_server")
    sources = {path: path.read_text(encoding="utf-8") for path in (REPOSITORY / folder).glob("*.py")}
    assert sources
    mine = 'create_server(("127.0.0.1", 0))'
    assert [str(path) for path, text in sources.items() if listening.search(text.replace(mine, ""))] == []
