"""How time and memory grow: with the corpus, the model, the context, the checkpoint and the journal.

Each size of each part is a process of its own that takes the real code paths (growth_parts.py). Rows are added to the
JSON one by one, in place of older ones of the same part and size, so a long run can be cut in any way and its picture
drawn at the end.
"""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.growth_parts import PARTS

Row = dict[str, Any]  # "part", "size", and figures by name: those that end in _s are seconds, in _mb 10^6 bytes

FITTED = 3  # largest sizes, whose growth is told: below them fixed costs count for more


@click.command()
@click.option("--part", "parts", type=click.Choice(list(PARTS)), multiple=True, default=list(PARTS))
@click.option("--size", "sizes", type=float, multiple=True, help="Of one part, in its unit. [default: all its sizes]")
@click.option("--json", "out", type=click.Path(dir_okay=False, path_type=Path), help="Add the figures to this file.")
@click.option("--picture", type=click.Path(dir_okay=False, path_type=Path), help="Draw --json (.png, .svg).")
@click.option("--only", nargs=2, type=(str, float), hidden=True, help="Measure a part and a size in this process.")
def main(
    parts: tuple[str, ...],
    sizes: tuple[float, ...],
    out: Path | None,
    picture: Path | None,
    only: tuple[str, float] | None,
) -> None:
    """Measures seconds and memory of each size and tells the exponent of their growth."""
    if only:
        click.echo(json.dumps(PARTS[only[0]].measure(only[1])))
        return
    if sizes and len(parts) > 1:
        raise click.UsageError("--size is in a part's own unit: choose one with --part")
    if picture and not out:
        raise click.UsageError("--picture draws what is in --json FILE: name it")
    rows: list[Row] = json.loads(out.read_text()) if out and out.exists() else []
    for name in parts:
        for size in sizes or PARTS[name].sizes:
            row = {"part": name, "size": size, **measured(name, size)}
            rows = [old for old in rows if (old["part"], old["size"]) != (name, size)] + [row]
            rows.sort(key=lambda row: (list(PARTS).index(row["part"]), row["size"]))
            if out:
                out.write_text(json.dumps(rows, indent=1) + "\n")
        click.echo("\n".join(table(name, [row for row in rows if row["part"] == name])))
    if picture:
        draw(rows, picture)


def measured(part: str, size: float) -> dict[str, float]:
    """The figures of one size, from a process of its own."""
    command = [sys.executable, "-m", "benchmarks.growth", "--only", part, repr(size)]
    child = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if child.returncode:
        raise click.ClickException(f"{part} of size {size:g} failed with exit code {child.returncode}")
    figures: dict[str, float] = json.loads(child.stdout.splitlines()[-1])
    return figures


def exponent(rows: list[Row], name: str) -> float | None:
    """The b of `figure = a * size^b`, by least squares over the largest sizes; None for a single one."""
    points = [(math.log(row["size"]), math.log(row[name])) for row in rows if row.get(name)][-FITTED:]
    if len(points) < 2:
        return None
    x, y = np.array(points).T
    return float(np.polyfit(x, y, 1)[0])


def table(part: str, rows: list[Row]) -> list[str]:
    """A line for each size, and one with the exponents."""
    names = [name for name in rows[0] if name not in {"part", "size"}]
    width = max(12, *(len(name) + 1 for name in names))
    lines = [f"{PARTS[part].unit:>14}" + "".join(f"{name:>{width}}" for name in names)]
    for row in rows:
        lines.append(f"{row['size']:14,.0f}" + "".join(f"{told(row.get(name)):>{width}}" for name in names))
    exponents = [exponent(rows, name) if name.endswith(("_s", "_mb")) else None for name in names]
    fits = ["" if each is None else f"{each:.2f}" for each in exponents]
    return [part, *lines, f"{'exponent':>14}" + "".join(f"{fit:>{width}}" for fit in fits), ""]


def told(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def draw(rows: list[Row], path: Path) -> None:
    """Two panels a part, on logarithmic axes: seconds and memory over size."""
    from matplotlib.figure import Figure

    drawn = [name for name in PARTS if any(row["part"] == name for row in rows)]
    figure = Figure(figsize=(3.2 * len(drawn), 5.6), layout="constrained")
    panels = figure.subplots(2, len(drawn), squeeze=False)
    for column, name in enumerate(drawn):
        mine = [row for row in rows if row["part"] == name]
        for panel, ending, label in zip(panels[:, column], ("_s", "_mb"), ("seconds", "MB"), strict=True):
            for figure_name in (each for each in mine[0] if each.endswith(ending)):
                points = [(row["size"], row[figure_name]) for row in mine if row.get(figure_name)]
                panel.plot(*zip(*points, strict=True), marker="o", label=figure_name.removesuffix(ending))
            panel.set(xscale="log", yscale="log", xlabel=PARTS[name].unit, ylabel=label)
            panel.grid(alpha=0.3)
            panel.legend(fontsize="x-small")
        panels[0, column].set_title(name)
    figure.savefig(path, dpi=80, metadata={"Date": None} if path.suffix == ".svg" else None)


if __name__ == "__main__":
    main()
