"""The workflows of GitHub are valid, and their steps are make targets; test_verify.py runs those of reproduce.yml.

The compose file of servers/ is valid, too.
"""

import re
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from ruamel.yaml import YAML

from tests.conftest import REPOSITORY, pytest_terminal_summary

WORKFLOWS = sorted((REPOSITORY / ".github" / "workflows").glob("*.yml"))
REPRODUCE = REPOSITORY / ".github" / "workflows" / "reproduce.yml"
TEST = REPOSITORY / ".github" / "workflows" / "test.yml"
SUMMARY = ' >> "$GITHUB_STEP_SUMMARY"'
each_workflow = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)


def load(path=REPRODUCE) -> dict[str, Any]:
    found: dict[str, Any] = YAML(typ="safe").load(path.read_text())
    return found


def steps(path=REPRODUCE) -> list[dict[str, Any]]:
    return [step for job in load(path)["jobs"].values() for step in job["steps"]]


def commands(job: str, path=REPRODUCE) -> list[str]:
    """The commands of a job, those with `matrix.target` once for each target."""
    found = load(path)["jobs"][job]
    targets = found.get("strategy", {}).get("matrix", {}).get("target", [""])
    lines = [
        step["run"].replace("${{ matrix.target }}", name)
        for name in targets
        for step in found["steps"]
        if "run" in step
    ]
    return list(dict.fromkeys(lines))


@pytest.mark.parametrize(
    ("path", "schema"),
    [
        *((path, "github-workflows") for path in WORKFLOWS),
        (REPOSITORY / ".github/dependabot.yml", "dependabot"),
        (REPOSITORY / "servers/compose.yaml", "compose-spec"),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_it_is_valid_by_its_schema(path, schema):
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}"]
    subprocess.run([*command, str(path)], check=True, capture_output=True)
    broken = re.sub("runs-on:|schedule:|image:", "nothing:", path.read_text()).encode()
    done = subprocess.run([*command, "-"], input=broken, capture_output=True)
    assert done.returncode == 1


@each_workflow
def test_every_step_is_a_make_target(path):
    targets = re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    for job in load(path)["jobs"]:
        for command in commands(job, path):
            words = command.removesuffix(SUMMARY).split()
            if command == "sudo apt-get update && sudo apt-get install --yes qemu-user":  # make asks for no password
                continue
            assert words[0] == "make"
            assert words[1] in targets, command


def test_pull_requests_get_what_ci_runs_here():
    here = set(re.findall(r"^make .*", (REPOSITORY / ".ci" / "run").read_text(), re.MULTILINE))
    assert "pull_request" in load(TEST)["on"]
    assert set(commands("make", TEST)) == here - {"make verify-lock"} | {"make setup", "make docs"}
    assert "make verify-lock" in commands("quick")


@each_workflow
def test_no_action_can_be_replaced_and_none_gets_a_secret(path):
    text = path.read_text()
    assert "secrets." not in text
    assert "pull_request_target" not in text
    assert load(path)["permissions"] == {"contents": "read"}
    actions = [step for step in steps(path) if "uses" in step]
    assert all(re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40}", step["uses"]) for step in actions)
    assert len(re.findall(r"@[0-9a-f]{40} # v\d+\.\d+\.\d+$", text, re.MULTILINE)) == len(actions)  # for Dependabot
    checkouts = [step["with"] for step in actions if step["uses"].startswith("actions/checkout@")]
    assert [options["persist-credentials"] for options in checkouts] == [False] * len(load(path)["jobs"])


def test_the_check_sees_no_cache():
    for job in ("quick", "full"):
        assert not [step for step in load()["jobs"][job]["steps"] if "cache" in str(step)], job


ZEROS = "0" * 40


@pytest.mark.parametrize(
    ("name", "event", "base"),
    [
        ("pull_request", {}, "HEAD~1"),
        ("push", {"before": "abc", "created": False, "forced": False}, "abc"),
        ("push", {"before": ZEROS, "created": True, "forced": False}, ""),  # the first push of main
        ("push", {"before": "gone", "created": False, "forced": True}, ""),  # not among what is fetched
        ("schedule", {}, ""),
    ],
)
def test_only_a_base_that_is_there_is_compared_with(name, event, base):
    """GitHub's operators are Python's by another name; a field that an event lacks is null."""
    expression = load()["env"]["BASE"].removeprefix("${{").removesuffix("}}").strip()
    for sign, word in (("&&", " and "), ("||", " or "), ("!g", " not g")):
        expression = expression.replace(sign, word)
    fields = SimpleNamespace(**{"before": None, "created": None, "forced": None, **event})
    github = SimpleNamespace(event_name=name, event=fields)
    assert eval(expression, {"github": github}) == base
    assert all(step["if"] == "env.BASE" for step in steps() if "$BASE" in step.get("run", ""))


def test_the_summary_of_a_job_names_what_failed(tmp_path, monkeypatch):
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    failed = SimpleNamespace(nodeid="tests/test_it.py::test_it", longreprtext="assert 1 == 2")
    pytest_terminal_summary(SimpleNamespace(stats={"passed": [1, 2], "failed": [failed]}))
    assert (
        (tmp_path / "summary.md")
        .read_text()
        .startswith("## Tests: 2 passed, 1 failed\n\n### tests/test_it.py::test_it\n\n````text\nassert 1 == 2\n")
    )
