"""Writes a report of experiments for a paper or a colleague: `python -m tools report EXPERIMENT...`."""

import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import click

from nanogpt.files import write_json, write_text
from tools.command import command, duration, markdown_row
from tools.compare import (
    TITLES,
    as_dict,
    cells_with_verdicts,
    count,
    gather,
    markdown_table,
    run_dict,
    title,
)
from tools.compare_page import Section, page
from tools.report_curves import Reference, as_csv, curve_rows, picture, references, save_reference
from tracking.comparison import Comparison, Result, journal_results
from tracking.console import repository
from tracking.run import Run
from tracking.run_name import SEED

CHOSEN = "the setting with the lowest mean of the losses reported here, so this mean is likely too low"
LATEX = (
    {c: f"\\{c}" for c in "&%$#_{}"}
    | {c: f"${c}$" for c in "<>"}
    | {"±": r"$\pm$", "~": r"\~{}", "^": r"\^{}", "\\": r"\textbackslash{}"}
)


@command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN | EXPERIMENT | COMMIT...")
@click.option(
    "--baseline",
    help="Compare the others with this run, experiment or commit.  [default: the best setting with several seeds]",
)
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), default=Path("build/report"), help="The folder."
)
@click.option("--json", "as_json", is_flag=True, help="Print the content of report.json as well.")
@click.option("--save-reference", metavar="NAME", help="Also keep this one setting as a reference curve.")
def main(runs: tuple[str, ...], baseline: str | None, out: Path, as_json: bool, save_reference: str | None) -> None:
    """Writes a report of experiments for a paper or a colleague.

    Says what was run, on what hardware, for how long and with which parameters, gives number, mean and standard
    deviation of the losses, what was searched, and for each number its model's hash and the command that makes it
    again. Writes Markdown, a LaTeX table, a page that opens offline, JSON, and the figures as SVG with their data.
    """
    root = repository()
    comparisons, left_out = gather(root, runs, baseline, server=False)
    if save_reference:
        keep_reference(root, comparisons, save_reference)
    finished, _ = journal_results(root)
    parts = [Part(root, found, finished, references(root, found)) for found in comparisons]
    options = [f"--baseline={baseline}"] if baseline else []
    write(out, parts, left_out, shlex.join(["python", "-m", "tools", "report", *options, *runs]))
    if as_json:
        click.echo((out / "report.json").read_text(encoding="utf-8"), nl=False)
    for line in left_out:
        click.echo(f"left out: {line}", err=True)
    click.echo(f"{out}: report.md, report.html, table.tex, report.json, figures/", err=as_json)


class Part:
    """What the report says of one comparison."""

    def __init__(self, root: Path, found: Comparison, finished: Sequence[Result], known: Sequence[Reference]):
        self.found, self.references = found, known
        self.trainings = {
            result.id: Run(root / result.tags["attempt"]) for setting in found.settings for result in setting.results
        }
        ids = {result.id for result in finished if result.text == self.results[0].text}
        self.others = len(ids - self.trainings.keys())

    @property
    def results(self) -> list[Result]:
        return [result for setting in self.found.settings for result in setting.results]

    def facts(self) -> list[tuple[str, str]]:
        """What was run, as item and value; what is not known is left out."""
        seconds = [result.seconds for result in self.results]
        starts = [start for run in self.trainings.values() for start, _ in run.timed("start")]
        dirty = any(result.tags.get("git.dirty") == "true" for result in self.results)
        found = {
            "measure": TITLES[self.found.score] + self._evaluated(),
            "text": _text(self.results[0]),
            "validation tokens": f"sha256 {self.results[0].tokens}" if self.found.score == "val_loss" else "",
            "trainings": f"{count(len(seconds), 'run')} of {count(len(self.found.settings), 'setting')}",
            "training time": f"{duration(sum(seconds))} in all, {duration(fmean(seconds))} for a run",
            "hardware": _distinct(map(_hardware, starts)),
            "software": _distinct(map(_software, starts)),
            "code": _distinct(f"commit {result.code}" for result in self.results)
            + ("; + stands for uncommitted changes, such as the values of -S" if dirty else ""),
            "seeds": ", ".join(map(str, sorted({result.seed for result in self.results}))),
            **{f"searched: {key}": values for key, values in self.searched().items()},
            "chosen": CHOSEN if self.found.chosen and self.found.others else "",
            "not reported": f"{count(self.others, 'other finished run')} on this text" if self.others else "",
        }
        return [(item, value) for item, value in found.items() if value]

    def _evaluated(self) -> str:
        way = self.results[0].evaluated
        return f", over the whole validation split ({way})" if way else ", of training's evaluation batches"

    def searched(self) -> dict[str, str]:
        """For each key in which the settings differ: its bounds, and the values that were tried."""
        found = {}
        for key in self.found.settings[0].differs:
            values = {setting.differs[key] for setting in self.found.settings}
            try:
                numbers = sorted(values, key=float)
                found[key] = f"{numbers[0]} to {numbers[-1]}; tried {', '.join(numbers)}"
            except ValueError:
                found[key] = f"tried {', '.join(sorted(values))}"
        return found

    def costs(self) -> tuple[list[str], list[list[str]]]:
        """The head and a row for each setting: parameters, tokens, time of a run."""
        rows = []
        for setting in self.found.settings:
            made = self.trainings[setting.results[0].id].result
            sizes = [f"{made[name]:,}" if name in made else "unknown" for name in ("parameters", "tokens")]
            rows.append([setting.title, *sizes, _time([result.seconds for result in setting.results])])
        return ["setting", "parameters", "tokens", "time"], rows

    def params(self) -> list[tuple[str, str]]:
        """The parameters that all settings share."""
        first, *others = self.results
        shared = [key for key in first.params if all(each.params.get(key) == first.params[key] for each in others)]
        return [(key, first.params[key]) for key in sorted(shared) if key != SEED]

    def beside(self) -> tuple[list[str], list[list[str]]]:
        """The head and a row for each setting and reference: where its mean lies, and how the two differ."""
        rows = []
        for known in self.references:
            for setting in self.found.settings:
                position = known.position(setting.values(self.found.score))
                differs = ", ".join(known.differs(setting)) or "nothing"
                rows.append([setting.title, str(known), position, differs])
        return ["setting", "reference", "difference", "differs in"], rows

    def runs(self) -> tuple[list[str], list[list[str]]]:
        """The head and a row for each run: its loss, and where that comes from."""
        rows = []
        for setting in self.found.settings:
            for result in setting.results:
                seen = run_dict(result)
                loss = f"{result.scores[self.found.score]:.6f}"
                rows.append([setting.title, seen["name"], str(result.seed), loss])
                rows[-1] += [result.code, result.model[:16], seen["again"]]
        return ["setting", "run", "seed", "loss", "commit", "model (sha256)", "to have it again"], rows

    def sections(self, svg: str) -> list[Section]:
        """What the page shows below compare's tables."""
        sections = [Section("What was run", (), self.facts()), Section("Size and time", *self.costs())]
        if self.references:
            sections.append(Section("Beside the references", *self.beside(), svg))
        return [*sections, Section("Parameters that all settings share", (), self.params())]


def _time(seconds: Sequence[float]) -> str:
    """The mean, and the standard deviation of several, such as "52 ± 3 s"."""
    unit, size = ("s", 1) if fmean(seconds) < 120 else ("min", 60)
    spread = f" ± {stdev(seconds) / size:.1f}" if len(seconds) > 1 else ""
    return f"{fmean(seconds) / size:.1f}{spread} {unit}"


def _text(result: Result) -> str:
    splits = []
    for name, purpose in (("train", "to train on"), ("val", "to validate")):
        split = result.profile.get(name) or {}
        sizes = [f"{split[unit]:,} {unit}" for unit in ("documents", "bytes", "tokens") if unit in split]
        splits += [f"{', '.join(sizes)} {purpose}"] if sizes else []
    return "; ".join([result.params.get("download.source", "unknown"), *splits])


def _hardware(start: dict[str, Any]) -> str:
    numerics, machine = start.get("numerics", {}), start.get("environment", {})
    device = numerics.get("device", "cpu")
    if device.startswith("cpu"):
        threads = [count(numerics["threads"], "thread")] if "threads" in numerics else []
        return ", ".join([machine.get("cpu", "unknown CPU"), *threads])
    return f"{start.get('processes', 1)} x {numerics.get('device_name', device)}"


def _software(start: dict[str, Any]) -> str:
    machine, numerics = start.get("environment", {}), start.get("numerics", {})
    names = [f"{name} {machine[name]}" for name in ("python", "torch", "numpy", "libc", "system") if name in machine]
    return ", ".join([*names, f"determinism {numerics.get('determinism', 'unknown')}"])


def _distinct(values: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(values))


def keep_reference(root: Path, comparisons: Sequence[Comparison], name: str) -> None:
    """Raises ValueError unless the runs are one setting and the name can be that of a file."""
    settings = [setting for found in comparisons for setting in found.settings]
    if not re.fullmatch(r"[\w-]+", name):
        raise ValueError(f"--save-reference {name!r} is invalid: use letters, digits, _ and -")
    if len(settings) != 1:
        raise ValueError(f"--save-reference takes the runs of one setting, and these are {len(settings)}")
    click.echo(f"{save_reference(root, settings[0], name).relative_to(root)} is written; commit it", err=True)


# --- the files


def write(out: Path, parts: Sequence[Part], left_out: Sequence[str], again: str) -> None:
    """Writes all files of the report into a folder."""
    for old in (out / "figures").glob("loss-*"):
        old.unlink()
    pages, sections, content = [f"# Report\n\nMade by `{again}`."], [], as_dict([p.found for p in parts], left_out)
    for number, part in enumerate(parts, 1):
        rows = curve_rows(part.found, part.references)
        svg = picture(rows) if rows else ""
        if svg:
            write_text(out / "figures" / f"loss-{number}.svg", svg)
            write_text(out / "figures" / f"loss-{number}.csv", as_csv(rows))
        pages.append(markdown(part, f"figures/loss-{number}" if svg else ""))
        sections.append(part.sections(svg))
        content["comparisons"][number - 1] |= {
            "facts": dict(part.facts()),
            "costs": _records(*part.costs()),
            "params": dict(part.params()),
            "references": _records(*part.beside()),
        }
    write_text(out / "report.md", "\n\n".join(pages) + "\n")
    write_text(out / "table.tex", "\n\n".join(latex(part.found) for part in parts) + "\n")
    write_text(out / "report.html", page([part.found for part in parts], left_out, "Report", sections))
    write_json(out / "report.json", {"made_by": again, **content})


def _records(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[dict[str, str]]:
    return [dict(zip(head, row, strict=True)) for row in rows]


def markdown(part: Part, figure: str) -> str:
    """One comparison as Markdown."""
    blocks = [f"## {title(part.found)}", markdown_table(part.found).partition("\n\n")[2]]
    if figure:
        blocks.append(f"![Validation loss over tokens; mean and standard deviation over seeds]({figure}.svg)")
        blocks.append(f"The data of the figure: [{figure}.csv]({figure}.csv).")
    for section in part.sections(""):
        blocks += [f"### {section.title}", _table(section.head or ("", ""), section.rows)]
    return "\n\n".join([*blocks, "### Where each number comes from", _table(*part.runs())])


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join([markdown_row(head), "|" + " --- |" * len(head), *map(markdown_row, rows)])


def latex(found: Comparison) -> str:
    """A comparison as a table in LaTeX, which needs no package."""
    head, rows = cells_with_verdicts(found)
    lines = [" & ".join(_escaped(cell) for cell in row) + r" \\" for row in [head, *rows]]
    begin = [r"\begin{table}", r"\centering", rf"\begin{{tabular}}{{l{'r' * (len(head) - 2)}l}}"]
    rules = [r"\hline", lines[0], r"\hline", *lines[1:], r"\hline"]
    end = [r"\end{tabular}", rf"\caption{{{_escaped(title(found))}}}", r"\end{table}"]
    return "\n".join([*begin, *rules, *end])


def _escaped(text: str) -> str:
    return "".join(LATEX.get(character, character) for character in text)
