"""Compares settings over their seeds, with a test of significance: `python -m tools compare`."""

import json
import textwrap
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click

from nanogpt.files import write_text
from tools.command import command, duration, markdown_row
from tracking import comparison
from tracking.comparison import Comparison, Result, Setting
from tracking.dvc_files import DvcLock
from tracking.git import resolve_commit
from tracking.history import experiment_refs
from tracking.significance import ALPHA, Difference

WIDTH = 80
TITLES = {"val_loss": "validation loss, nats per token", "bits_per_byte": "bits per byte (the tokenizers differ)"}
MANY_LINES = 4  # at most, for a label in the table
NO_RUNS = (
    "no run has finished in this clone: `dvc repro` makes one, `dvc metrics show` has the numbers of what was pulled, "
    "and --server compares the runs of an MLflow server"
)
TRIAL = (
    "to decide, queue the same -S values with more seeds and compare again; or apply\n"
    "the baseline (`dvc exp apply`), and `python -m tools trial --name NAME\n"
    "-S KEY=VALUE` adds seeds until the difference is clear"
)


@command()
@click.argument("runs", nargs=-1, metavar="[RUN | EXPERIMENT | COMMIT]...")
@click.option(
    "--baseline", help="Compare the others with this run, experiment or commit.  [default: the best with several seeds]"
)
@click.option("--server", is_flag=True, help="Take the runs from MLflow (MLFLOW_TRACKING_URI) instead of .runs.")
@click.option("--markdown", is_flag=True, help="Print Markdown, for a pull request.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--html", type=click.Path(dir_okay=False, path_type=Path), help="Write a page that opens offline.")
def main(
    runs: tuple[str, ...], baseline: str | None, server: bool, markdown: bool, as_json: bool, html: Path | None
) -> None:
    """Shows which setting is best, by how much, and whether that is noise.

    Compares the given runs, or all finished runs of params.yaml's tracking.experiment. Runs that differ only in their
    seeds are one setting.
    """
    if markdown and as_json:
        raise click.UsageError("--markdown and --json exclude each other")
    comparisons, left_out = gather(Path.cwd(), runs, baseline, server)
    if as_json:
        click.echo(json.dumps(as_dict(comparisons, left_out), indent=1))
    elif markdown:
        click.echo("\n\n".join(map(markdown_table, comparisons)) or "No finished runs.")
    else:
        click.echo("\n\n".join(map(table, comparisons)) or NO_RUNS)
        for line in advice(Path.cwd(), comparisons):
            click.echo(f"\n{line}")
    if not as_json:
        for line in left_out:
            click.echo(f"left out: {line}", err=True)
    if html is not None:
        from tools.compare_page import page

        write_text(html, page(comparisons, left_out))
        click.echo(f"{html} opens in any browser, offline", err=True)


def gather(
    root: Path, arguments: Sequence[str], baseline: str | None, server: bool
) -> tuple[list[Comparison], list[str]]:
    """The comparisons of the given runs, and a line for each run that is left out. Raises ValueError."""
    if server:
        from tracking.mlflow_results import server_results

        results, left_out = server_results(root, experiment_here())
    else:
        results, left_out = comparison.journal_results(root)
    wanted = [result for argument in arguments for result in comparison.select(results, argument, root)]
    if not arguments:
        here = experiment_here()
        wanted = [result for result in results if result.experiment == here]
    else:
        left_out = []  # the user gave others
    is_baseline = None
    if baseline is not None:
        ids = {result.id for result in comparison.select(results, baseline, root)}
        wanted += [result for result in results if result.id in ids]
        is_baseline = partial(_is_one_of, ids)
    unique = list({result.id: result for result in wanted}.values())
    comparisons, without_score = comparison.compare(unique, is_baseline)
    return comparisons, left_out + without_score


def _is_one_of(ids: set[str], result: Result) -> bool:
    return result.id in ids


def experiment_here() -> str:
    """params.yaml's tracking.experiment."""
    from nanogpt.params import load_params

    return load_params().tracking.experiment


# --- as text


def table(found: Comparison) -> str:
    """A comparison as text: the settings, then the difference of each from the reference."""
    head, rows = cells(found)
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(1, len(head))]
    room = WIDTH - 4 - sum(widths) - 2 * len(widths)
    lines = [title(found), "", *_row("", head[0], head[1:], widths, room)]
    for number, row in enumerate(rows, 1):
        lines += _row(str(number), row[0], row[1:], widths, room)
    return "\n".join([*lines, *verdict_lines(found)])


def advice(root: Path, comparisons: Sequence[Comparison]) -> Iterator[str]:
    """What to run next."""
    for found in comparisons:
        best = found.settings[0].results
        kept = DvcLock.of_commit(root, "HEAD").model_md5 in [result.tags.get("model.md5") for result in best]
        for result in best if found.others and not kept else ():
            if (name := result.tags.get("dvc.experiment", "")) and experiment_refs(root, name):
                began = result.tags.get("dvc.baseline", "none")
                older = began != resolve_commit(root, "HEAD")
                undone = f",\nand undoes what was committed since {began[:7]} (docs/experiments.md)" if older else ""
                yield f"`dvc exp apply {name}` brings setting 1 (seed {result.seed}) into the workspace{undone}"
                break
    if len(comparisons) == 1 and not comparisons[0].others:
        yield "there is only one setting; `dvc exp run -S KEY=VALUE` adds another one"
    if any(diff.verdict == "cannot tell" for found in comparisons for diff in found.differences):
        yield TRIAL


def title(found: Comparison) -> str:
    """Such as "6 runs of 2 settings: validation loss, nats per token; best possible 1.0408"."""
    runs, settings = sum(len(setting.results) for setting in found.settings), len(found.settings)
    floors = {round(floor, 4) for setting in found.settings for floor in setting.values("floor")}
    counted = f"{count(runs, 'run')} of {count(settings, 'setting')}: {TITLES[found.score]}"
    if not found.settings[0].results[0].evaluated:
        counted += ", of training's batches"
    return counted + (f"; best possible {floors.pop():.4f}" if len(floors) == 1 and found.score == "val_loss" else "")


def cells(found: Comparison) -> tuple[list[str], list[list[str]]]:
    """The head and the rows of the table of settings, as text; empty columns are left out."""
    columns = {
        "seeds": [str(len(setting.results)) for setting in found.settings],
        "val loss": [_spread(setting, "val_loss") for setting in found.settings],
        "bits/byte": [_spread(setting, "bits_per_byte", found.score == "bits_per_byte") for setting in found.settings],
        "excess": [_spread(setting, "excess", False) for setting in found.settings],
        "steps": [f"{setting.steps:,}" for setting in found.settings],
        "time": [duration(setting.seconds) for setting in found.settings],
    }
    if found.score == "bits_per_byte":  # losses per token are not comparable for different tokens
        del columns["val loss"]
    columns = {name: column for name, column in columns.items() if any(column)}
    head, labels = "setting", [setting.title for setting in found.settings]
    if len(found.settings[0].differs) == 1:
        head = next(iter(found.settings[0].differs))
        labels = [setting.differs[head] for setting in found.settings]
    rows = zip(labels, *columns.values(), strict=True)
    return [head, *columns], [list(row) for row in rows]


def verdict_lines(found: Comparison) -> list[str]:
    """The difference of each setting from the reference."""
    if not found.others:
        return []
    against = f"against {number_of(found, found.reference)}, the {reference_is(found)}"
    lines = ["", f"{against}: difference, 99 % interval, p corrected for {count(found.tests, 'comparison')}"]
    lines.append(f'(± standard deviation; verdicts need p < {ALPHA}; "more seeds": for each setting)')
    for setting, diff in zip(found.others, found.differences, strict=True):
        kind = "" if diff.p is None else "paired" if diff.paired else "Welch"
        shown = [f"{diff.mean:+.4f}", interval(diff), kind, p_value(diff), words(diff)]
        lines.append("  ".join([f"{number_of(found, setting):>2}", *filter(None, shown)]))
    return lines


def difference_of(found: Comparison, setting: Setting) -> Difference | None:
    """The difference of a setting from the reference; None for the reference itself."""
    pairs = zip(found.others, found.differences, strict=True)
    return next((difference for other, difference in pairs if other is setting), None)


def words(diff: Difference) -> str:
    """The verdict, such as "worse", or "cannot tell: 4 more seeds" with the seeds that would show the difference."""
    if diff.p is None:
        return "cannot tell from one seed"
    if diff.more_seeds is not None:
        return f"cannot tell: {count(diff.more_seeds, 'more seed')}"
    if diff.verdict == "cannot tell":
        return "the same" if diff.mean == 0 and diff.low == 0 else "cannot tell"
    return diff.verdict


def interval(diff: Difference) -> str:
    return "" if diff.p is None else f"[{diff.low:+.4f}, {diff.high:+.4f}]"


def p_value(diff: Difference) -> str:
    return "" if diff.p is None else "p<0.0001" if diff.p < 0.0001 else f"p={diff.p:.4f}"


def reference_is(found: Comparison) -> str:
    if not found.chosen:
        return "baseline"
    return "best" if found.reference is found.settings[0] else "best with several seeds"


def number_of(found: Comparison, setting: Setting) -> str:
    """The number of a setting in the table."""
    return str(next(number for number, each in enumerate(found.settings, 1) if each is setting))


def count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _spread(setting: Setting, score: str, with_deviation: bool = True) -> str:
    mean, deviation = setting.mean(score), setting.deviation(score)
    if mean is None:
        return ""
    return f"{mean:.4f} ± {deviation:.4f}" if with_deviation and deviation is not None else f"{mean:.4f}"


def _row(number: str, label: str, values: Sequence[str], widths: Sequence[int], room: int) -> Iterator[str]:
    width = max(room, 12)
    lines = textwrap.wrap(label, width, break_on_hyphens=False, break_long_words=False)  # a path stays whole
    if len(lines) > MANY_LINES:
        lines[MANY_LINES - 1 :] = ["…"]
    if len(lines[0]) > width:
        yield f"{number:>2}  {lines[0]}"
        number, lines[0] = "", ""
    numbers = "  ".join(value.rjust(size) for value, size in zip(values, widths, strict=True))
    yield f"{number:>2}  {lines[0]:<{width}}  {numbers}".rstrip()
    yield from (f"    {line}" for line in lines[1:])


# --- as Markdown and JSON


def cells_with_verdicts(found: Comparison) -> tuple[list[str], list[list[str]]]:
    """The head and the rows of `cells`, each with its difference from the reference."""
    head, rows = cells(found)
    for setting, row in zip(found.settings, rows, strict=True):
        diff = difference_of(found, setting)
        row += (
            [f"{diff.mean:+.4f}", interval(diff), p_value(diff), words(diff)]
            if diff
            else ["", "", "", reference_is(found)]
        )
    return [*head, "difference", "99 % interval", "p", "verdict"], rows


def markdown_table(found: Comparison) -> str:
    """A comparison as one table in Markdown."""
    head, rows = cells_with_verdicts(found)
    lines = [f"**{title(found)}**", "", markdown_row(head), "|" + " --- |" * len(head), *map(markdown_row, rows)]
    note = f"p is corrected for {count(found.tests, 'comparison')}; a verdict needs p < {ALPHA}."
    return "\n".join([*lines, *(["", note] if found.others else [])])


def as_dict(comparisons: Sequence[Comparison], left_out: Sequence[str]) -> dict[str, Any]:
    """The comparisons as JSON, with numbers that are not rounded."""
    return {"comparisons": [_comparison_dict(found) for found in comparisons], "left_out": list(left_out)}


def _comparison_dict(found: Comparison) -> dict[str, Any]:
    differences = [difference_of(found, setting) for setting in found.settings]
    return {
        "score": found.score,
        "reference": number_of(found, found.reference),
        "reference_is": reference_is(found),
        "tests": found.tests,
        "settings": [
            {
                "number": number_of(found, setting),
                "differs": setting.differs,
                "mean": setting.mean(found.score),
                "standard_deviation": setting.deviation(found.score),
                "steps": setting.steps,
                "seconds": setting.seconds,
                "difference": {**vars(diff), "verdict": diff.verdict} if diff else None,
                "runs": [run_dict(result) for result in setting.results],
            }
            for setting, diff in zip(found.settings, differences, strict=True)
        ],
    }


def run_dict(result: Result) -> dict[str, Any]:
    """A run as JSON: its scores, its origin, and the command that shows how to make it again."""
    return {
        "id": result.id,
        "name": result.name,
        "seed": result.seed,
        "scores": dict(result.scores),
        "commit": result.tags.get("git.commit", "none"),
        "uncommitted_changes": result.tags.get("git.dirty") == "true",
        "model_sha256": result.model,
        "again": f"python -m tools lineage {result.model[:12]}",
    }
