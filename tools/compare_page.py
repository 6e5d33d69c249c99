"""Writes a comparison as one HTML file without external resources: tables, loss curves, samples and runs."""

from base64 import b64encode
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from tools.compare import cells, difference_of, interval, number_of, p_value, reference_is, run_dict, title, words
from tracking.comparison import Comparison, Point, Setting, printable
from tracking.significance import ALPHA

DRAWN = 8  # settings with curves and samples; the page has as many colours
SAMPLE = 600  # characters shown of a sample
CURVE_POINTS = 200


@dataclass(frozen=True)
class Place:
    """A point of the curve of a setting: means over its seeds, and the standard deviation of the loss."""

    x: float
    loss: float
    spread: float


@dataclass(frozen=True)
class Chart:
    """A drawing area of 640 by 360 units and its scales."""

    x_label: str
    x_most: float
    y_least: float
    y_most: float

    LEFT, TOP, RIGHT, BOTTOM = 52.0, 12.0, 628.0, 318.0

    def x(self, value: float) -> float:
        return round(self.LEFT + (self.RIGHT - self.LEFT) * value / (self.x_most or 1), 1)

    def y(self, value: float) -> float:
        share = (value - self.y_least) / ((self.y_most - self.y_least) or 1)
        return round(self.BOTTOM - (self.BOTTOM - self.TOP) * min(max(share, -0.02), 1.02), 1)

    def line(self, curve: Sequence[Place]) -> str:
        return " ".join(f"{self.x(place.x)},{self.y(place.loss)}" for place in curve)

    def band(self, curve: Sequence[Place]) -> str:
        upper = [f"{self.x(place.x)},{self.y(place.loss + place.spread)}" for place in curve]
        lower = [f"{self.x(place.x)},{self.y(place.loss - place.spread)}" for place in reversed(curve)]
        return " ".join(upper + lower)

    @property
    def x_ticks(self) -> list[tuple[float, str]]:
        return [(self.x(value), short(value)) for value in ticks(0, self.x_most)]

    @property
    def y_ticks(self) -> list[tuple[float, str]]:
        return [(self.y(value), f"{value:.4g}") for value in ticks(self.y_least, self.y_most)]


@dataclass(frozen=True)
class Section:
    """A table, or a picture, that the page shows below a comparison."""

    title: str
    head: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    svg: str = ""

    @property
    def address(self) -> str:
        """The picture as an address; inside an img its styles and the page's do not mix."""
        return f"data:image/svg+xml;base64,{b64encode(self.svg.encode()).decode()}"


def page(
    comparisons: Sequence[Comparison],
    left_out: Sequence[str],
    heading: str = "Comparison",
    sections: Sequence[Sequence[Section]] = (),
) -> str:
    """The whole HTML file. `sections` has those of each comparison."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(Path(__file__).with_suffix(".html").read_text(encoding="utf-8"))
    return template.render(
        heading=heading,
        parts=[part(found) for found in comparisons],
        sections=sections or [[] for _ in comparisons],
        left_out=left_out,
        alpha=ALPHA,
        drawn=DRAWN,
        torch=metadata.version("torch"),
    )


def part(found: Comparison) -> dict[str, Any]:
    """The values of the template for one comparison."""
    head, rows = cells(found)
    drawn = found.settings[:DRAWN]
    by_tokens = {id(setting): curve(setting, lambda point: float(point.tokens)) for setting in drawn}
    by_seconds = {id(setting): curve(setting, lambda point: point.seconds) for setting in drawn}
    return {
        "title": title(found),
        "text": " or ".join(dict.fromkeys(map(text_of, found.settings))),
        "head": head,
        "rows": [
            {"number": i, "cells": row, "verdict": verdict(found, setting)}
            for i, (setting, row) in enumerate(zip(found.settings, rows, strict=True), 1)
        ],
        "reference": number_of(found, found.reference),
        "tests": found.tests,
        "settings": len(found.settings),
        "charts": [
            drawing(label, [by[id(setting)] for setting in drawn])
            for label, by in (("tokens", by_tokens), ("seconds of training", by_seconds))
        ],
        "legend": [setting.title for setting in drawn],
        "samples": [
            {"number": i, "label": setting.title, "text": setting.results[0].sample()[:SAMPLE]}
            for i, setting in enumerate(drawn, 1)
        ],
        "runs": [
            {"number": i, **run_dict(result), "score": result.scores[found.score]}
            for i, setting in enumerate(found.settings, 1)
            for result in setting.results
        ],
    }


def text_of(setting: Setting) -> str:
    """The source and the tokenizer, such as "grammar, tokenizer bpe"."""
    params = setting.results[0].params
    return printable(
        f"{params.get('download.source', 'unknown')}, tokenizer {params.get('tokenize.tokenizer', 'unknown')}"
    )


def verdict(found: Comparison, setting: Setting) -> dict[str, Any]:
    """The difference of a setting from the reference, with its interval on a bar from 0 to 100."""
    diff = difference_of(found, setting)
    if diff is None:
        return dict.fromkeys(("mean", "interval", "p", "bar", "kind")) | {"words": reference_is(found)}
    bar = None
    if diff.low is not None and diff.high is not None:
        ends = (end for other in found.differences for end in (other.low, other.high) if end is not None)
        widest = max(map(abs, ends)) or 1
        bar = [round(50 + 48 * value / widest, 1) for value in (diff.low, diff.mean, diff.high)]
    kind = diff.verdict.split()[0]
    numbers = {"mean": f"{diff.mean:+.4f}", "interval": interval(diff), "p": p_value(diff)}
    return {**numbers, "bar": bar, "kind": kind, "words": words(diff)}


def curve(setting: Setting, x: Callable[[Point], float]) -> list[Place]:
    """The validation loss of a setting during training; without the evaluation before the first step."""
    by_step: dict[int, list[Point]] = {}
    for result in setting.results:
        for point in result.curve():
            if point.step:
                by_step.setdefault(point.step, []).append(point)
    every = -(-len(by_step) // CURVE_POINTS) or 1
    steps = sorted(by_step)[::-every][::-1]  # always with the last one
    return [
        Place(
            fmean(map(x, by_step[step])),
            fmean(point.val_loss for point in by_step[step]),
            stdev(point.val_loss for point in by_step[step]) if len(by_step[step]) > 1 else 0.0,
        )
        for step in steps
    ]


def drawing(x_label: str, curves: Sequence[Sequence[Place]]) -> dict[str, Any] | None:
    """The scales and shapes of a chart; None if there is no curve."""
    places = [place for curve in curves for place in curve]
    if not places:
        return None
    losses = [place.loss for place in places]
    # The first evaluations are far above the rest, so the axis covers the lower three quarters of the points.
    most = sorted(losses)[int(0.75 * (len(losses) - 1))]
    least = min(place.loss - place.spread for place in places)
    chart = Chart(x_label, max(place.x for place in places), least, max(most, least) + 0.15 * (most - least))
    shapes = [{"line": chart.line(curve), "band": chart.band(curve)} for curve in curves]
    return {"x_label": x_label, "x_ticks": chart.x_ticks, "y_ticks": chart.y_ticks, "shapes": shapes}


def ticks(low: float, high: float) -> list[float]:
    """Round numbers from low to high."""
    from matplotlib.ticker import MaxNLocator

    found = MaxNLocator(nbins=5, steps=[1, 2, 5, 10]).tick_values(low, high)
    return [float(value) for value in found if low <= value <= high]


def short(value: float) -> str:
    """ "500", "20k", "1.5M" """
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"
