"""Checks that a commit reproduces its dvc.lock, by running it in a clean clone: `python -m tools verify`."""

import sys
from pathlib import Path

import click

from tools.command import command, commit_of
from tracking.console import repository
from tracking.git import GitError, git, git_or_none
from tracking.verdict import Report, write_reports


@command()
@click.option(
    "--layer", type=click.Choice(["lock", "steps", "base", "cpus", "full"]), default="full", help="The check."
)
@click.option("--base", metavar="COMMIT", help="For --layer base: the commit to compare HEAD with.")
@click.option("--varied", is_flag=True, help="For --layer full: vary cores, threads, locale, folder and hash seed.")
@click.option("--commit", metavar="EXPERIMENT", help="For --layer full: an experiment or a commit.  [default: HEAD]")
@click.option("--out", type=click.Path(path_type=Path), help="Where to write the reports.  [default: .runs/verify]")
def main(layer: str, base: str | None, varied: bool, commit: str | None, out: Path | None) -> None:
    """Reproduces the committed dvc.lock in a clean clone of HEAD.

    --commit names another commit or an experiment. The clone has an empty cache, and runs the stages one by one.

    lock: checks that dvc.lock and the remote are complete. steps: compares the first 20 steps with the golden file of
    this environment. base: compares them with those of another commit. cpus: compares them with those under emulated
    CPUs of Intel and AMD. full: compares every artifact of every stage.

    Exit code 0: identical, or within the stated tolerance; 1: diverged; 2: could not be run or compared.
    """
    if (layer == "base") != (base is not None) or ((varied or commit) and layer != "full"):
        raise click.UsageError("--layer base and --base belong together; --varied and --commit belong to --layer full")
    root = Path(git_top())
    report = check(root, layer, base or "", varied, commit or "HEAD")
    if commit is None and (changed := git_or_none(root, "diff", "HEAD", "--name-only")):
        report.notes.append(f"uncommitted changes, such as those of {changed.splitlines()[0]}, were not checked")
    click.echo(report.table())
    write_reports(report, out or repository() / ".runs" / "verify")
    sys.exit(report.exit_code)


def check(root: Path, layer: str, base: str, varied: bool, commit: str) -> Report:
    """Runs a layer and returns its report, even if it could not be run."""
    from tracking import verification

    def say(line: str) -> None:
        click.echo(line, err=True)

    try:
        if layer == "lock":
            return verification.check_lock(root)
        if layer == "steps":
            return verification.check_steps(root, say)
        if layer == "base":
            return verification.check_base(root, base, say)
        if layer == "cpus":
            return verification.check_cpus(root, say)
        return verification.check_all(root, varied, say, commit_of(root, commit))
    except ValueError as error:
        return Report(layer, "", error=str(error))
    except Exception as error:  # a defect says nothing about the result: exit code 2 and a report
        return Report(layer, "", error=f"{type(error).__name__}: {error}")


def git_top() -> str:
    try:
        return git(Path.cwd(), "rev-parse", "--show-toplevel")
    except GitError as error:
        raise click.UsageError(f"not in a git repository ({error})") from error
