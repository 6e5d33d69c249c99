"""`python -m tools bisect` finds the commit that changed the bits, among commits that look as if they might."""

import json

import pytest

from tests.pipeline.clones import Clone

pytestmark = pytest.mark.pipeline

FILE = "nanogpt/schedule.py"


def test_the_constant_is_found_and_neither_the_comment_nor_the_rename(fresh: Clone, copy_of):
    """The only test that finds a check that calls equal commits different, or one that cannot run a commit."""
    clone = copy_of(fresh, mlflow=False)
    clone.append(FILE, "\n# A comment.\n")
    clone.commit("A comment")
    for name, old, new in [
        ("A rename", "progress", "passed"),
        ("A constant", "else 1.0 - passed", "else 1.001 - passed"),
    ]:
        assert old in clone.read(FILE)
        clone.write(FILE, clone.read(FILE).replace(old, new))
        clone.commit(name)
    clone.append("params.yaml", "# Not committed.\n")

    outcome = json.loads(clone.run("python -m tools bisect HEAD~3 --json 2>stderr.txt"))
    assert (outcome["subject"], outcome["files"], outcome["skipped"]) == ("A constant", [FILE], [])
    assert outcome["commit"] == clone.run("git rev-parse HEAD").strip()
    assert "first at step 3: lr 0.02 -> 0.02002" in outcome["difference"]["line"]
    assert outcome["difference"]["tensor"] == "wte.weight"
    assert "uncommitted changes are ignored" in clone.read("stderr.txt")
    assert clone.run("git status --porcelain --untracked-files=no") == " M params.yaml\n"
    assert "running" not in clone.run("python -m tools bisect HEAD~3 2>&1")  # all results were kept
