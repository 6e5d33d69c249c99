"""The search for the first commit that changed a result, in invented histories with invented results."""

import subprocess
from pathlib import Path

import pytest

from tracking.bisection import Bisection, ends, find
from tracking.clean_clone import CouldNotRun
from tracking.git import git

IDENTITY = {"user.name": "a", "user.email": "b", "init.defaultBranch": "main"}


class History:
    """A repository whose commits are named by their subjects; a name holds the commit's result."""

    def __init__(self, root: Path):
        self.root, self.hashes = root, dict[str, str]()
        self.git("init", "--quiet")

    def git(self, *arguments: str) -> str:
        settings = [part for key, value in IDENTITY.items() for part in ("-c", f"{key}={value}")]
        return git(self.root, *settings, *arguments)

    def commit(self, name: str, *parents: str) -> None:
        tree = self.git("hash-object", "-t", "tree", "-w", "/dev/null")
        above = [part for parent in parents for part in ("-p", self.hashes[parent])]
        self.hashes[name] = self.git("commit-tree", tree, *above, "-m", name)

    def line(self, *names: str) -> None:
        for parent, name in zip(("", *names), names, strict=False):
            self.commit(name, *([parent] if parent else []))

    def name(self, commit: str) -> str:
        return next(name for name, value in self.hashes.items() if value == commit)


class Named:
    """A check that reads a result from a dict of names, and counts its runs; "" cannot be run."""

    def __init__(self, history: History, results: dict[str, str]):
        self.history, self.results, self.runs = history, results, set[str]()

    def result(self, commit: str) -> str:
        name = self.history.name(commit)
        self.runs.add(name)
        if not self.results[name]:
            raise CouldNotRun("broken")
        return self.results[name]

    def differ(self, good: str, bad: str) -> bool:
        return self.result(good) != self.result(bad)

    def changed(self, good: str, bad: str, commit: str) -> bool:
        return self.differ(good, commit)


@pytest.fixture
def history(tmp_path: Path) -> History:
    return History(tmp_path)


def search(history: History, results: dict[str, str], good: str, bad: str) -> tuple[Bisection, Named]:
    check = Named(history, results)
    return find(history.root, history.hashes[good], history.hashes[bad], check, lambda line: None), check


def names(history: History, found: Bisection) -> list[str]:
    return [history.name(commit) for commit in found.among]


def test_sixty_four_commits_take_at_most_six_checks(history: History) -> None:
    line = [f"c{i}" for i in range(65)]
    history.line(*line)
    for first in range(1, 65):
        results = {name: "new" if i >= first else "old" for i, name in enumerate(line)}
        found, check = search(history, results, "c0", "c64")
        assert names(history, found) == [f"c{first}"]
        assert found.tested == len(check.runs - {"c0", "c64"}) <= 6


def test_commits_that_cannot_be_run_are_named_and_left_out(history: History) -> None:
    line = [f"c{i}" for i in range(10)]
    history.line(*line)
    results = {name: "new" if i >= 7 else "old" for i, name in enumerate(line)}
    found, _ = search(history, results | {"c4": "", "c5": ""}, "c0", "c9")
    assert names(history, found) == ["c7"]
    assert {history.name(commit): why for commit, why in found.skipped.items()}.items() <= {
        "c4": "broken",
        "c5": "broken",
    }.items()
    found, _ = search(history, results | {"c5": "", "c6": ""}, "c0", "c9")
    assert names(history, found) == ["c5", "c6", "c7"]  # any of them, and the last one has the new result


def test_a_change_in_a_branch_is_found_there(history: History) -> None:
    history.line("a", "b", "c")
    history.line("good")
    history.commit("s1", "b")
    history.commit("s2", "s1")
    history.commit("merge", "c", "s2")
    history.commit("end", "merge")
    results = dict.fromkeys(("a", "b", "c", "s1"), "old") | dict.fromkeys(("s2", "merge", "end"), "new")
    found, _ = search(history, results, "a", "end")
    assert names(history, found) == ["s2"]


def test_a_branch_that_left_before_good_is_searched_against_where_it_left(history: History) -> None:
    """Its commits have other bits than GOOD, as GOOD has a change that they lack."""
    history.line("root", "good", "c")
    history.commit("s1", "root")
    history.commit("s2", "s1")
    history.commit("s3", "s2")
    history.commit("merge", "c", "s3")
    history.commit("end", "merge")
    results = {"root": "0", "s1": "0", "s2": "0s", "s3": "0s", "good": "1", "c": "1", "merge": "1s", "end": "1s"}
    found, _ = search(history, results, "good", "end")
    assert names(history, found) == ["merge"]
    assert found.branch is not None
    assert names(history, found.branch) == ["s2"]
    assert found.branch.branch is None
    found, _ = search(history, results | {"s2": "0", "s3": "0"}, "good", "end")
    assert found.branch is None  # the merge itself


def test_ends_that_cannot_be_searched_are_refused_with_a_remedy(history: History, tmp_path: Path) -> None:
    history.line("a", "b", "c")
    history.commit("d", "a")
    a, b, c, d = (history.hashes[name] for name in "abcd")
    assert ends(history.root, a, c) == (a, c)
    for good, bad, message in [
        (a, a, "are the same commit; give an older one first"),
        (c, a, "give the older one first"),
        (d, c, f"is not an ancestor of {c}; they parted at {a[:12]}, which can be given first"),
        ("nothing", c, "'nothing' is no commit of this repository; `git log --oneline` lists them"),
    ]:
        with pytest.raises(ValueError, match=message):
            ends(history.root, good, bad)
    history.git("branch", "main", c)
    subprocess.run(["git", "clone", "-q", "--depth", "2", f"file://{history.root}", tmp_path / "shallow"], check=True)
    with pytest.raises(ValueError, match="git fetch --unshallow"):
        ends(tmp_path / "shallow", b, c)
