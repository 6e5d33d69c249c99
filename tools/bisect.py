"""Finds the commit that changed the bits or the loss: `python -m tools bisect GOOD BAD`."""

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tools.command import command, commit_of
from tools.verify import git_top
from tracking.bisection import Bisection, Say, ends, find, summary
from tracking.clean_clone import CouldNotRun
from tracking.git import git, git_or_none
from tracking.run_name import SEED

if TYPE_CHECKING:
    from tools.bisect_checks import Bits, Losses

UNDECIDED = 3  # exit code


@command()
@click.argument("good")
@click.argument("bad", default="HEAD")
@click.option("--loss", is_flag=True, help="Search for the commit that changed the loss beyond noise.")
@click.option(
    "-S",
    "--set-param",
    "assignments",
    multiple=True,
    metavar="KEY=VALUE",
    help="Set a parameter of every commit; repeatable.",
)
@click.option("--max-seeds", type=click.IntRange(2, 1000), default=20, help="For --loss: seeds per commit, at most.")
@click.option("--again", is_flag=True, help="Run commits again that were run before.")
@click.option("--json", "as_json", is_flag=True, help="Print the outcome as JSON.")
def main(
    good: str, bad: str, loss: bool, assignments: tuple[str, ...], max_seeds: int, again: bool, as_json: bool
) -> None:
    """Finds the first commit after GOOD whose first training steps have other bits.

    GOOD is a commit or an experiment, and BAD a later one with other results, by default HEAD. Halves the commits
    between them and runs each in a clean clone, in this environment; the checkout is not touched. Keeps the results in
    .runs/bisect, so an interrupted search continues when you repeat the command. Skips commits that cannot be run.

    Exit code 0: found; 3: skipped commits leave several; 1: error.
    """
    from nanogpt.params import flatten, load_params, parse_assignments, with_values
    from tools.bisect_checks import Bits, Losses, Results

    overrides = parse_assignments(assignments)
    if loss and SEED in overrides:
        raise ValueError(f"-S {SEED} is invalid: --loss sets the seeds itself")

    def say(line: str) -> None:
        click.echo(line, err=True)

    root = Path(git_top())
    if overrides:
        params = load_params(root / "params.yaml")
        # A key may exist only in older commits, but a known one must have a value that is valid today.
        known = {key: value for key, value in overrides.items() if key in flatten(params)}
        with_values(params, known, Path("-S"), combined=False)
    first, last = ends(root, commit_of(root, good), commit_of(root, bad))
    if git(root, "status", "--porcelain", "--untracked-files=no"):
        say("uncommitted changes are ignored: this compares commits")
    results = Results(root, overrides, again, say)
    check = Losses(results, max_seeds) if loss else Bits(results)
    found = search(root, first, last, check, say)
    options = [f"--set-param={each}" for each in assignments]
    if loss:
        options += ["--loss", f"--max-seeds={max_seeds}"]
    outcome = as_dict(root, found, check, options)
    click.echo(json.dumps(outcome, indent=1) if as_json else text(outcome, check.what))
    sys.exit(0 if outcome["commit"] else UNDECIDED)


def search(root: Path, good: str, bad: str, check: "Bits | Losses", say: Say) -> Bisection:
    """`find`, after both ends were run. Raises ValueError if one cannot be run, or they do not differ."""
    try:
        if not check.differ(good, bad):
            raise ValueError(check.same(good, bad))
    except CouldNotRun as error:
        raise ValueError(f"an end cannot be run: {error}; choose another, or try it again with --again") from error
    return find(root, good, bad, check, say)


def as_dict(root: Path, found: Bisection, check: "Bits | Losses", options: list[str]) -> dict[str, Any]:
    """The outcome as JSON. "commit" is null if several remain; "in_branch" is an outcome like this one."""
    first = found.among[-1]  # it was run; what comes before it was skipped
    parent = parent_of(root, found.good, first) if len(found.among) == 1 else found.good
    author, date, subject = git(root, "log", "-1", "--no-show-signature", "--format=%an%n%ai%n%s", first).split("\n")
    again = ["python", "-m", "tools", "bisect", "--again", *options, parent[:12], first[:12]]
    return {
        "commit": first if len(found.among) == 1 else None,
        "among": [{"commit": commit, "summary": summary(root, commit)} for commit in found.among],
        "author": author,
        "date": date,
        "subject": subject,
        "files": git(root, "diff", "--name-only", parent, first).splitlines(),
        "difference": check.difference(found.good, first),
        "again": shlex.join(again),
        "skipped": [{"commit": commit, "reason": reason} for commit, reason in found.skipped.items()],
        "commits": int(git(root, "rev-list", "--count", "--ancestry-path", f"{found.good}..{found.bad}")),
        "tested": found.tested,
        "in_branch": as_dict(root, found.branch, check, options) if found.branch else None,
    }


def parent_of(root: Path, good: str, commit: str) -> str:
    """The first parent of a commit that contains `good`."""
    parents = git(root, "rev-parse", f"{commit}^@").splitlines()
    return next(each for each in parents if git_or_none(root, "merge-base", "--is-ancestor", good, each) is not None)


def text(outcome: dict[str, Any], what: str) -> str:
    """The outcome for people."""
    if outcome["commit"]:
        lines = [f"first commit with {what}: {outcome['among'][0]['summary']}"]
    else:
        among = len(outcome["among"])
        lines = [f"the first commit with {what} is one of these {among}, of which only the last could be run:"]
        lines += [f"  {each['summary']}" for each in outcome["among"]]
    lines += [
        f"author     {outcome['author']}, {outcome['date']}",
        f"files      {', '.join(outcome['files']) or 'none'}",
        f"differs    {outcome['difference']['line']}",
        f"see it     {outcome['again']}",
    ]
    lines += [f"skipped    {each['reason']}" for each in outcome["skipped"]]
    lines.append(f"checks     {outcome['tested']} among {outcome['commits']} commits, besides both ends")
    if outcome["in_branch"]:
        lines += ["", "this merge brought it in; in its branch:", text(outcome["in_branch"], what)]
    return "\n".join(lines)
