"""Does the commit give what its dvc.lock says? `python -m tools verify` runs all of it anew in a clean clone."""

import sys
from pathlib import Path

import click

from tools.command import command
from tracking.console import repository
from tracking.git import GitError, git
from tracking.history import experiment_refs
from tracking.verdict import Report, write_reports


@command()
@click.option("--layer", type=click.Choice(["lock", "steps", "base", "full"]), default="full", show_default=True)
@click.option("--base", metavar="COMMIT", help="For --layer base: the commit to compare HEAD with.")
@click.option("--varied", is_flag=True, help="For --layer full: one core, other locale, threads, folder, hash seed.")
@click.option("--commit", metavar="EXPERIMENT", help="For --layer full: an experiment or a commit.  [default: HEAD]")
@click.option("--out", type=click.Path(path_type=Path), help="Where the reports go.  [default: .runs/verify]")
def main(layer: str, base: str | None, varied: bool, commit: str | None, out: Path | None) -> None:
    """Reproduces the committed dvc.lock in a clean clone of HEAD.

    --commit names another commit or an experiment. The clone's cache is empty; the stages run one by one.

    lock: dvc.lock is complete, and the remote too. steps: the first 20 steps against the golden file of this
    environment. base: the same against another commit, run here too. full: every stage, every artifact.

    Exit code 0: identical, or within the stated tolerance; 1: diverged; 2: could not be run or compared.
    """
    if (layer == "base") != (base is not None) or ((varied or commit) and layer != "full"):
        raise click.UsageError("--layer base and --base belong together; --varied and --commit belong to --layer full")
    root = Path(git_top())
    report = check(root, layer, base or "", varied, commit or "HEAD")
    click.echo(report.table())
    write_reports(report, out or repository() / ".runs" / "verify")
    sys.exit(report.exit_code)


def check(root: Path, layer: str, base: str, varied: bool, commit: str) -> Report:
    """The report of a layer; what could not be run is a report too."""
    from tracking import verification

    def say(line: str) -> None:
        click.echo(line, err=True)

    try:
        if commit == "HEAD" and git(root, "status", "--porcelain", "--untracked-files=no"):
            say("uncommitted changes are not part of what is checked: the commit is")
        if layer == "lock":
            return verification.check_lock(root)
        if layer == "steps":
            return verification.check_steps(root, say)
        if layer == "base":
            return verification.check_base(root, base, say)
        references = experiment_refs(root, commit) or [commit]
        if len(references) > 1:
            raise ValueError(
                f"{len(references)} experiments are named {commit!r}; give the hash of one (`dvc exp show`)"
            )
        return verification.check_all(root, varied, say, references[0])
    except ValueError as error:
        return Report(layer, "", error=str(error))
    except Exception as error:  # whatever it was, nothing is known of the result: exit code 2 and a report
        return Report(layer, "", error=f"{type(error).__name__}: {error}")


def git_top() -> str:
    try:
        return git(Path.cwd(), "rev-parse", "--show-toplevel")
    except GitError as error:
        raise click.UsageError(f"not in a git repository ({error})") from error
