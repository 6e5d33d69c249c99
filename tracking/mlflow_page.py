"""What MLflow's page of a run shows, as pure functions of its journal, without MLflow.

Many points make MLflow's page slow, so of each kind of record it gets the first in each of 2,000 equal stretches of the
run, and the last before each end. That depends on the journal alone, so a replay gives the same points.
"""

import io
import json
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from nanogpt.collector import collector_paused
from tracking.journal import Record

MAX_POINTS = 2000  # of a metric
MAX_SAMPLED = 200  # evaluations whose samples are in the table
MAX_CHECKPOINTS = 20  # evaluated checkpoints in the table
MAX_NOTE = 4900  # characters of a description; every MLflow server accepts 5,000
_MAX_QUOTE = 1200

LOSS = "eval/val_loss"
METRICS = {  # journal's name -> MLflow's
    "step": {"loss": "train/loss", "grad_norm": "grad_norm", "lr": "learning_rate"},
    "speed": {name: name for name in ("tokens_per_second", "mfu", "memory_mb", "clip_rate")},
    "eval": {"val_loss": LOSS, "train_loss": "eval/train_loss"},
}
BEST, TOKENS = "eval/best_val_loss", "tokens"  # TOKENS: an x-axis for MLflow's charts
# A report's name -> MLflow's. These are scores of the finished model on the whole validation split, the numbers to
# compare; those of eval/ are estimates made in training. A report's other numbers are in the description.
REPORTED = {f"evaluate/{name}": name for name in ("val_loss", "bits_per_byte", "excess", "train_loss")}


@dataclass(frozen=True)
class Point:
    """One value of a metric. `t` in ms since the epoch; `step` is MLflow's x-axis."""

    key: str
    value: float
    t: int
    step: int


@dataclass
class Page:
    """Takes a run's records in order; `feed` returns the points that each one adds."""

    max_iters: int
    starts: list[Record] = field(default_factory=list)
    end: Record | None = None
    last: dict[str, Record] = field(default_factory=dict)  # the newest record of each kind
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=lambda: defaultdict(list))  # (step, value)
    best: tuple[float, int] | None = None  # lowest validation loss, and its step
    samples: list[Record] = field(default_factory=list)
    checkpoints: list[Record] = field(default_factory=list)  # evaluated, evenly chosen
    best_checkpoint: Record | None = None
    diverged: Record | None = None
    not_finite: dict[str, int] = field(default_factory=dict)  # metric -> the first step at which it was NaN or infinite
    _newest_samples: list[Record] = field(default_factory=list)
    _shown: dict[str, int] = field(default_factory=dict)  # kind -> newest stretch (or step) with a point

    def feed(self, record: Record) -> list[Point]:
        kind = record["kind"]
        evaluation = self.last.get("eval")
        if kind == "checkpoint" and evaluation and evaluation["step"] == record["step"]:
            record = {**record, "t": evaluation["t"]}  # its loss is the evaluation's, so it must be the same point
        self.last[kind] = record
        if kind == "start":
            self.starts.append(record)
            self.end = None
        elif kind == "end":
            self.end = record
            return [point for kind in METRICS for point in self._last_points(kind)]
        elif kind == "sample":
            self._keep_sample(record)
        elif kind == "checkpoint":
            self._keep_checkpoint(record)
        elif kind == "diverged":
            self.diverged = self.diverged or record
        elif kind in METRICS:
            # Not the minimum of the points: the best evaluation may not be one of them.
            if kind == "eval" and math.isfinite(loss := record["val_loss"]) and (not self.best or loss < self.best[0]):
                self.best = loss, record["step"]
            if self._is_new(kind, record["step"], MAX_POINTS):
                return self._points(kind, record)
        return []

    def sample_rows(self) -> list[Record]:
        """The samples for the table: of evenly spaced evaluations, and of the newest one."""
        newest = self.last.get("sample")
        shown = self.samples[-1]["step"] if self.samples else -1
        return self.samples + (self._newest_samples if newest and newest["step"] > shown else [])

    def checkpoint_rows(self) -> list[Record]:
        """The checkpoints for the table: evenly spaced ones with a loss, the best one and the newest."""
        chosen = [*self.checkpoints, self.best_checkpoint, self.last.get("checkpoint")]
        rows = {record["step"]: record for record in chosen if record}
        best = self.best_checkpoint and self.best_checkpoint["step"]
        return [{**rows[step], "best": step == best} for step in sorted(rows)]

    def _is_new(self, kind: str, step: int, limit: int) -> bool:
        """Whether `step` is the first in its stretch of the run; false for steps that are repeated after a kill."""
        stretch = step // math.ceil(max(self.max_iters, 1) / limit)
        if stretch <= self._shown.get(kind, -1):
            return False
        self._shown[kind] = stretch
        return True

    def _last_points(self, kind: str) -> list[Point]:
        record = self.last.get(kind)
        shown = self._shown.get(f"{kind} step", -1)
        return self._points(kind, record) if record and record["step"] > shown else []

    def _points(self, kind: str, record: Record) -> list[Point]:
        step = record["step"]
        self._shown[f"{kind} step"] = step
        values = {name: record.get(source) for source, name in METRICS[kind].items()}
        if kind == "eval" and self.best:
            values[BEST] = self.best[0]
        if "tokens" in record and step > self._shown.get(TOKENS, -1):  # equal for a step and its evaluation
            self._shown[TOKENS] = step
            values[TOKENS] = float(record["tokens"])
        points = []
        for name, value in values.items():
            if value is None:
                continue
            if math.isfinite(value):
                points.append(Point(name, value, record["t"], step))
                self.curves[name].append((step, value))
            else:
                self.not_finite.setdefault(name, step)
        return points

    def _keep_sample(self, record: Record) -> None:
        if self._newest_samples and self._newest_samples[-1]["step"] != record["step"]:
            self._newest_samples.clear()
        self._newest_samples.append(record)
        kept = self.samples and self.samples[-1]["step"] == record["step"]
        if kept or self._is_new("sample", record["step"], MAX_SAMPLED):
            self.samples.append(record)

    def _keep_checkpoint(self, record: Record) -> None:
        if record.get("best"):
            self.best_checkpoint = record
        if record.get("val_loss") is not None and self._is_new("checkpoint", record["step"], MAX_CHECKPOINTS):
            self.checkpoints.append(record)


def sample_table(page: Page) -> str:
    """The table of samples, as MLflow stores it."""
    return _table(["step", "prompt", "text"], page.sample_rows())


def checkpoint_table(page: Page, kept: dict[int, str]) -> str:
    """The table of checkpoints, as MLflow stores it; `kept`: step -> directory of those that still exist."""
    rows = ({**record, "kept": kept.get(record["step"], "")} for record in page.checkpoint_rows())
    return _table(["step", "val_loss", "best", "sha256", "kept"], rows)


def _table(columns: list[str], records: Iterable[Record]) -> str:
    """pandas' JSON with orient="split"."""
    rows = [[_finite(record[name]) for name in columns] for record in records]
    return json.dumps({"columns": columns, "data": rows}, ensure_ascii=False)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def description(page: Page, killed: bool = False) -> str:
    """Markdown: how the run ended, its result, a sample. `killed`: its process is gone, without an end record."""
    end = page.end or {}
    step = max((page.last[kind]["step"] for kind in ("step", "eval") if kind in page.last), default=0)
    killed = killed and not end
    status = "KILLED" if killed else end.get("status", "RUNNING")
    lines = [f"**{status}** at step {end.get('step', step):,} of {page.max_iters:,}"]
    if page.best:
        lines[0] += f": best validation loss **{page.best[0]:.4f}** at step {page.best[1]:,}"
    if end.get("message"):
        lines += ["", quote(str(end["message"]), 600)]
    elif killed:
        lines += ["", "The process was killed; the same command resumes the run."]
    facts = []
    if parameters := end.get("result", {}).get("parameters"):
        facts.append(f"{parameters:,} parameters")
    if speeds := [speed for _, speed in page.curves["tokens_per_second"]]:
        facts.append(f"{statistics.median(speeds):,.0f} tokens/s (median)")
    if resumed := [f"{record['step']:,}" for record in page.starts[1:]]:
        more = " …" if len(resumed) > 10 else ""
        facts.append(f"resumed {len(resumed)} times (at step {', '.join(resumed[:10])}{more})")
    if facts:
        lines += ["", "; ".join(facts)]
    if page.not_finite:
        bad = ", ".join(f"{name} from step {first:,}" for name, first in sorted(page.not_finite.items()))
        lines += ["", f"Not finite, so not shown: {bad}"]
    if page.diverged:
        again = page.diverged
        lines += ["", f"Step {again['step']:,}, when recomputed, gave a different {again['field']}: see the journal."]
    sample = page.last.get("sample")
    if sample:
        lines += ["", f"Sample at step {sample['step']:,}, prompt {sample['prompt']!r}:", "", quote(sample["text"])]
    return "\n".join(lines)


def quote(text: str, limit: int = _MAX_QUOTE) -> str:
    """Text as an indented Markdown code block, which no text can end, without marks of sections (see below)."""
    cut = (text if len(text) <= limit else text[:limit] + " …").replace("<!--", "<!- -")
    return "\n".join(f"    {line}" for line in cut.splitlines())


_SECTION = re.compile(r"\n\n<!-- (\w+) -->\n.*?\n<!-- /\1 -->", re.DOTALL)


def with_sections(base: str, note: str, stage: str = "", text: str = "") -> str:
    """Joins `base` and the sections in `note`, in which it replaces the section of `stage` by `text`."""
    sections = {match[1]: match[0] for match in _SECTION.finditer(note)}
    if stage:
        sections[stage] = f"\n\n<!-- {stage} -->\n{text}\n<!-- /{stage} -->"
    tail = "".join(sections[name] for name in sorted(sections))
    return base[: max(0, MAX_NOTE - len(tail))] + tail


def without_sections(note: str) -> str:
    return _SECTION.sub("", note)


def report_section(stage: str, metrics: dict[str, float], files: dict[str, str]) -> str:
    """The section that another stage adds to the description: its metrics, and the beginning of its text."""
    lines = [f"**{stage}**", ""] + [f"- {name} {value:.6g}" for name, value in sorted(metrics.items())]
    texts = [text for name, text in sorted(files.items()) if name.endswith((".md", ".txt"))]
    return "\n".join(lines + (["", quote(texts[0], 600)] if texts else []))


def loss_picture(page: Page) -> bytes:
    """The loss curve as a PNG."""
    with collector_paused():
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="step", ylabel="loss (nats per token)")
    train, val = page.curves["train/loss"], page.curves[LOSS]
    if train:
        axes.plot(*zip(*train, strict=True), linewidth=1, alpha=0.6, label="train, each step's batch")
    if val:
        axes.plot(*zip(*val, strict=True), marker=".", label="validation")
    if page.best:
        axes.plot(page.best[1], page.best[0], "o", fillstyle="none", label=f"best {page.best[0]:.4f}")
    if train or val:
        axes.legend()
    axes.grid(alpha=0.3)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=100)
    return png.getvalue()
