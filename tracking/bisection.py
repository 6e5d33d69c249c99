"""Finds the first commit that changed a result, with git's bisection; commits that cannot be run are left out.

Only commits that contain the good one are tested: a branch that left before it may have had other results all along.
The merge that brings such a branch in is tested, and if it changed the result, the branch is searched by itself.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import log2
from pathlib import Path
from typing import Protocol

from tracking.clean_clone import CouldNotRun
from tracking.git import git, git_or_none, resolve_commit

Say = Callable[[str], None]


class Check(Protocol):
    """Runs commits and compares their results. Each method may raise CouldNotRun."""

    def differ(self, good: str, bad: str) -> bool:
        """Whether two commits have different results."""

    def changed(self, good: str, bad: str, commit: str) -> bool:
        """Whether a commit between them has another result than `good`, whose result differs from `bad`'s."""


@dataclass
class Bisection:
    """What was found between two commits."""

    good: str
    bad: str
    among: list[str]  # the first commit that changed the result; after those that may be it and could not be run
    skipped: dict[str, str] = field(default_factory=dict)  # commit -> why it could not be run
    tested: int = 0  # commits between the two that were run
    branch: "Bisection | None" = None  # the search in the branch that brought the change, if `among` is a merge


def ends(root: Path, good: str, bad: str) -> tuple[str, str]:
    """The hashes of the two commits. Raises ValueError unless the first is an ancestor of the second."""
    if git(root, "rev-parse", "--is-shallow-repository") == "true":
        raise ValueError("this clone is shallow, so it lacks commits; `git fetch --unshallow` brings them")
    found = [resolve_commit(root, revision) for revision in (good, bad)]
    for revision, commit in zip((good, bad), found, strict=True):
        if commit is None:
            raise ValueError(f"{revision!r} is no commit of this repository; `git log --oneline` lists them")
    first, last = map(str, found)
    if first == last:
        raise ValueError(f"{good} and {bad} are the same commit; give an older one first")
    if git_or_none(root, "merge-base", "--is-ancestor", first, last) is None:
        if git_or_none(root, "merge-base", "--is-ancestor", last, first) is not None:
            raise ValueError(f"{good} is newer than {bad}; give the older one first")
        base = git_or_none(root, "merge-base", first, last)
        advice = f"; they parted at {base[:12]}, which can be given first" if base else ""
        raise ValueError(f"{good} is not an ancestor of {bad}{advice}")
    return first, last


def find(root: Path, good: str, bad: str, check: Check, say: Say) -> Bisection:
    """Finds the first commit after `good` that changed the result, among those that lead to `bad`.

    The results of the two must differ. Tests about log2 of the number of commits between them.
    """
    found, goods, first = Bisection(good, bad, []), [good], bad
    while True:
        commits = candidates(root, goods, first)
        todo = [commit for commit in commits if commit != first and commit not in found.skipped]
        if not todo:
            break
        say(f"{_count(len(commits), 'commit')} left, about {_count(round(log2(len(commits))), 'check')}")
        commit = todo[0]
        try:
            changed = check.changed(good, bad, commit)
            found.tested += 1
        except CouldNotRun as error:
            found.skipped[commit] = str(error)
            say(f"{summary(root, commit)}: skipped, it could not be run")
            continue
        say(f"{summary(root, commit)}: {'changed' if changed else 'as before'}")
        if changed:
            first = commit
        else:
            goods.append(commit)
    found.among = git(root, "rev-list", "--topo-order", "--reverse", *_between(goods, first)).splitlines()
    if len(found.among) == 1:
        found.branch = _in_branch(root, good, first, check, say)
    return found


def candidates(root: Path, goods: list[str], bad: str) -> list[str]:
    """The commits that may be the first one, `bad` among them; the one that halves them comes first."""
    lines = git(root, "rev-list", "--bisect-all", *_between(goods, bad)).splitlines()
    return [line.split()[0] for line in lines]


def _between(goods: list[str], bad: str) -> list[str]:
    return ["--ancestry-path", bad, "--not", *goods]


def _in_branch(root: Path, good: str, merge: str, check: Check, say: Say) -> Bisection | None:
    """The search in a branch that left before `good` and that `merge` brought in; None without such a change."""
    for parent in git(root, "rev-parse", f"{merge}^@").splitlines():
        base = git_or_none(root, "merge-base", good, parent)
        if base is None or base in (good, parent):  # it contains `good`, so it was tested; or `good` contains it
            continue
        say(f"{summary(root, merge)}: merges a branch that left at {base[:12]}; searching there")
        try:
            if check.differ(base, parent):
                return find(root, base, parent, check, say)
        except CouldNotRun as error:
            say(f"the branch could not be searched: {error}")
    return None


def summary(root: Path, commit: str) -> str:
    """Such as "1a2b3c4 A larger batch"."""
    return git(root, "log", "-1", "--no-show-signature", "--format=%h %s", commit)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
