"""Curves for `python -m tools report`: their picture and data, and the references in `presets/curves/`."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev

from nanogpt.files import write_json
from tools.compare_page import DRAWN, Place, curve
from tracking.comparison import Comparison, Setting
from tracking.run_name import SEED

FOLDER = Path("presets/curves")
RANGE = 0.95  # share of the means of as many runs of a reference


@dataclass(frozen=True)
class Reference:
    """A setting whose losses are known: of a preset, for example."""

    name: str
    params: Mapping[str, str]  # without the seed
    tokens: str  # hash of the validation tokens
    evaluated: str | None  # how the validation split was scored
    losses: Mapping[int, float]  # by seed
    models: Mapping[int, str]  # sha256 by seed
    commit: str
    curve: Sequence[tuple[float, float, float]]  # tokens, mean loss, its standard deviation

    def __str__(self) -> str:
        values = list(self.losses.values())
        spread = f" ± {stdev(values):.4f}" if len(values) > 1 else ""
        return f"{self.name}: {fmean(values):.4f}{spread} ({len(values)} seeds, commit {self.commit[:12]})"

    def differs(self, setting: Setting) -> list[str]:
        """The parameters in which a setting differs; those of numerics say how it computes, not what."""
        params = setting.results[0].params
        keys = {*self.params, *params} - {SEED}
        return sorted(k for k in keys if self.params.get(k) != params.get(k) and not k.startswith("numerics."))

    def position(self, losses: Sequence[float]) -> str:
        """Whether the mean of some losses lies where 95 of 100 means of as many runs of this setting do."""
        known = list(self.losses.values())
        if len(known) < 2:
            return f"{fmean(losses) - fmean(known):+.4f}; the spread of the reference is unknown"
        from scipy import stats

        error = stdev(known) * (1 / len(known) + 1 / len(losses)) ** 0.5
        reach = error * float(stats.t.ppf((1 + RANGE) / 2, len(known) - 1))
        apart = fmean(losses) - fmean(known)
        where = "within its range" if abs(apart) <= reach else "below its range" if apart < 0 else "above its range"
        return f"{apart:+.4f}, {where} (± {reach:.4f})"


def references(root: Path, found: Comparison) -> list[Reference]:
    """The references whose losses are comparable with a comparison's. Raises ValueError for a damaged file."""
    mine = {(result.tokens, result.evaluated) for setting in found.settings for result in setting.results}
    known = map(read_reference, sorted((root / FOLDER).glob("*.json")))
    return [each for each in known if mine == {(each.tokens, each.evaluated)}]


def read_reference(path: Path) -> Reference:
    """Raises ValueError, with a remedy, for a damaged file."""
    try:
        content = json.loads(path.read_bytes())
        for name in ("losses", "models"):
            content[name] = {int(seed): value for seed, value in content[name].items()}
        return Reference(**content)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}); `git checkout {path}` restores it") from error


def save_reference(root: Path, setting: Setting, name: str) -> Path:
    """Keeps a setting as a reference; returns the file."""
    first = setting.results[0]
    kept = Reference(
        name,
        {key: value for key, value in first.params.items() if key != SEED},
        first.tokens,
        first.evaluated,
        setting.losses("val_loss"),
        {result.seed: result.model for result in setting.results},
        first.tags.get("git.commit", "none"),
        [(place.x, place.loss, place.spread) for place in by_tokens(setting)],
    )
    path = root / FOLDER / f"{name}.json"
    write_json(path, asdict(kept))
    return path


def by_tokens(setting: Setting) -> list[Place]:
    return curve(setting, lambda point: float(point.tokens))


def curve_rows(found: Comparison, known: Sequence[Reference]) -> list[tuple[str, float, float, float]]:
    """The data of the picture: label, tokens, mean loss over the seeds, its standard deviation."""
    rows = [
        (setting.title, place.x, place.loss, place.spread)
        for setting in found.settings[:DRAWN]
        for place in by_tokens(setting)
    ]
    return rows + [(f"reference {each.name}", *point) for each in known for point in each.curve]


def as_csv(rows: Sequence[tuple[str, float, float, float]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([("setting", "tokens", "val_loss", "standard_deviation"), *rows])
    return text.getvalue()


def picture(rows: Sequence[tuple[str, float, float, float]]) -> str:
    """The curves as SVG, the same bytes for the same data; references are dashed."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    for label in dict.fromkeys(row[0] for row in rows):
        tokens, losses, spreads = zip(*(row[1:] for row in rows if row[0] == label), strict=True)
        style = "--" if label.startswith("reference ") else "-"
        (line,) = axes.plot(tokens, losses, style, label=label.replace("$", r"\$"))
        low, high = ([a + sign * b for a, b in zip(losses, spreads, strict=True)] for sign in (-1, 1))
        axes.fill_between(tokens, low, high, alpha=0.18, color=line.get_color(), linewidth=0)
    losses = sorted(row[2] for row in rows)
    axes.set_ylim(losses[0] - 0.02, losses[int(0.75 * (len(losses) - 1))] + 0.15)  # the first ones are far above
    axes.set(xlabel="tokens", ylabel="validation loss, nats per token")
    axes.legend(fontsize="small")
    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "report", "svg.fonttype": "none"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()
