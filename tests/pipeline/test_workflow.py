"""The workflow of GitHub is valid, and its steps are make targets; test_verify.py runs them."""

import re
import subprocess
import sys
from typing import Any

from ruamel.yaml import YAML

from tests.pipeline.clones import REPOSITORY

WORKFLOW = REPOSITORY / ".github" / "workflows" / "reproduce.yml"
SUMMARY = ' >> "$GITHUB_STEP_SUMMARY"'


def jobs() -> dict[str, Any]:
    found: dict[str, Any] = YAML(typ="safe").load(WORKFLOW.read_text())["jobs"]
    return found


def commands(job: str) -> list[str]:
    return [step["run"] for step in jobs()[job]["steps"] if "run" in step]


def test_the_workflow_is_valid_by_githubs_schema():
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows"]
    subprocess.run([*command, str(WORKFLOW)], check=True, capture_output=True)
    broken = WORKFLOW.read_text().replace("runs-on:", "runs-at:").encode()
    done = subprocess.run([*command, "-"], input=broken, capture_output=True)
    assert done.returncode == 1


def test_every_step_is_a_make_target():
    targets = re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    for job in jobs():
        for command in commands(job):
            words = command.removesuffix(SUMMARY).split()
            assert words[0] == "make"
            assert words[1] in targets, command


def test_the_check_sees_no_cache_and_needs_no_secret():
    text = WORKFLOW.read_text()
    assert "secrets." not in text
    assert "pull_request_target" not in text
    for job in ("quick", "full"):
        assert not [step for step in jobs()[job]["steps"] if "cache" in str(step)], job
