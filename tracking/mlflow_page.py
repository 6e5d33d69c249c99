"""What MLflow's page of a run shows, as pure functions of its journal; knows no MLflow.

MLflow's page chokes on many points, so of each kind of record the first in each of 2,000 equal stretches of the run is
shown, and the last before each end. That depends on the journal alone: whoever replays it gets the same points.
"""

import io
import json
import math
import re
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from tracking.journal import Record

MAX_POINTS = 2000  # of a metric
MAX_SAMPLED = 200  # evaluations whose samples the table shows
MAX_CHECKPOINTS = 20  # evaluated checkpoints that are listed
MAX_NOTE = 4900  # characters of a description; every MLflow server takes 5,000
_MAX_QUOTE = 1200

LOSS = "eval/val_loss"
METRICS = {  # journal's name -> MLflow's
    "step": {"loss": "train/loss", "grad_norm": "grad_norm", "lr": "learning_rate"},
    "speed": {name: name for name in ("tokens_per_second", "mfu", "memory_mb", "clip_rate")},
    "eval": {"val_loss": LOSS, "train_loss": "eval/train_loss"},
}
BEST, TOKENS = "eval/best_val_loss", "tokens"  # TOKENS: by step, for MLflow to draw a loss over tokens
# A report's name -> MLflow's. These are of the finished model and the whole validation split, the numbers to compare;
# those of eval/ are estimates from a part of it, made in training. A report's other numbers are in the description.
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
    """Fed with a run's records in order; `feed` returns the points each one adds."""

    max_iters: int
    starts: list[Record] = field(default_factory=list)
    end: Record | None = None
    last: dict[str, Record] = field(default_factory=dict)  # newest record of each kind
    train: list[tuple[int, float]] = field(default_factory=list)  # shown (step, loss)
    val: list[tuple[int, float]] = field(default_factory=list)
    speeds: list[float] = field(default_factory=list)  # shown tokens per second
    best: tuple[float, int] | None = None  # lowest validation loss, its step
    samples: list[Record] = field(default_factory=list)
    checkpoints: list[Record] = field(default_factory=list)  # evaluated, evenly chosen
    best_checkpoint: Record | None = None
    diverged: Record | None = None
    not_finite: dict[str, int] = field(default_factory=dict)  # metric -> first step at which it was no number
    _newest_samples: list[Record] = field(default_factory=list)
    _shown: dict[str, int] = field(default_factory=dict)  # kind -> stretch (or step) shown last

    def feed(self, record: Record) -> list[Point]:
        kind = record["kind"]
        evaluation = self.last.get("eval")
        if kind == "checkpoint" and evaluation and evaluation["step"] == record["step"]:
            record = {**record, "t": evaluation["t"]}  # its loss is that evaluation's, so it is the same point
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
            value = record.get("val_loss")
            # Not a running minimum of what is shown: the best evaluation may be one that is not.
            if (
                kind == "eval"
                and value is not None
                and math.isfinite(value)
                and (not self.best or value < self.best[0])
            ):
                self.best = value, record["step"]
            if self._is_new(kind, record["step"], MAX_POINTS):
                return self._points(kind, record)
        return []

    def sample_rows(self) -> list[Record]:
        """The samples that the table shows: evenly chosen evaluations, and the newest one."""
        newest = self.last.get("sample")
        shown = self.samples[-1]["step"] if self.samples else -1
        return self.samples + (self._newest_samples if newest and newest["step"] > shown else [])

    def checkpoint_rows(self) -> list[Record]:
        """The checkpoints that the table shows: evenly chosen ones with a loss, the best one and the newest."""
        chosen = [*self.checkpoints, self.best_checkpoint, self.last.get("checkpoint")]
        rows = {record["step"]: record for record in chosen if record}
        best = self.best_checkpoint and self.best_checkpoint["step"]
        return [{**rows[step], "best": step == best} for step in sorted(rows)]

    def _is_new(self, kind: str, step: int, limit: int) -> bool:
        """Whether `step` is the first in its stretch of the run. Steps that come again after a kill are not."""
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
        points = [Point(name, value, record["t"], step) for name, value in values.items() if value is not None]
        if kind == "eval" and self.best:
            points.append(Point(BEST, self.best[0], record["t"], step))
        if "tokens" in record and step > self._shown.get(TOKENS, -1):  # a step and its evaluation have the same
            self._shown[TOKENS] = step
            points.append(Point(TOKENS, float(record["tokens"]), record["t"], step))
        for point in points:
            if not math.isfinite(point.value):
                self.not_finite.setdefault(point.key, step)
        points = [point for point in points if math.isfinite(point.value)]
        curves = {"train/loss": self.train, LOSS: self.val}
        for point in points:
            if point.key in curves:
                curves[point.key].append((point.step, point.value))
            elif point.key == "tokens_per_second":
                self.speeds.append(point.value)
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
    """The samples, as a table."""
    return _table(["step", "prompt", "text"], page.sample_rows())


def checkpoint_table(page: Page, kept: dict[int, str]) -> str:
    """The checkpoints, as a table; `kept`: step -> where it still lies."""
    rows = ({**record, "kept": kept.get(record["step"], "")} for record in page.checkpoint_rows())
    return _table(["step", "val_loss", "best", "sha256", "kept"], rows)


def _table(columns: list[str], records: Iterable[Record]) -> str:
    """In the form of MLflow's tables (pandas' JSON, orient="split")."""
    rows = [[_finite(record[name]) for name in columns] for record in records]
    return json.dumps({"columns": columns, "data": rows}, ensure_ascii=False)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def description(page: Page, run: dict[str, Any], killed: bool = False) -> str:
    """Markdown: how the run ended, its result, a sample. `killed`: the trainer is gone without an end record."""
    end = page.end or {}
    step = max((page.last[kind]["step"] for kind in ("step", "eval") if kind in page.last), default=0)
    status = "KILLED" if killed and not end else str(end.get("status", "RUNNING"))
    lines = [f"**{status}** at step {end.get('step', step):,} of {page.max_iters:,}"]
    if page.best:
        lines[0] += f": best validation loss **{page.best[0]:.4f}** at step {page.best[1]:,}"
    if end.get("message"):
        lines += ["", quote(str(end["message"]), 600)]
    elif killed and not end:
        lines += ["", "The process is gone without a word; the same command resumes it."]
    facts = []
    parameters = run.get("parameters") or end.get("result", {}).get("parameters")
    if parameters:
        facts.append(f"{parameters:,} parameters")
    if page.speeds:
        facts.append(f"{statistics.median(page.speeds):,.0f} tokens/s (median)")
    resumed = [f"{record['step']:,}" for record in page.starts[1:]]
    if resumed:
        more = " …" if len(resumed) > 10 else ""
        facts.append(f"resumed {len(resumed)} times (at step {', '.join(resumed[:10])}{more})")
    if facts:
        lines += ["", "; ".join(facts)]
    if page.not_finite:
        bad = ", ".join(f"{name} from step {first:,}" for name, first in sorted(page.not_finite.items()))
        lines += ["", f"Not finite, so not shown: {bad}"]
    if page.diverged:
        again = page.diverged
        lines += ["", f"Step {again['step']:,}, computed again, gave another {again['field']}: see the journal."]
    sample = page.last.get("sample")
    if sample:
        lines += ["", f"Sample at step {sample['step']:,}, prompt {sample['prompt']!r}:", "", quote(sample["text"])]
    return "\n".join(lines)


def quote(text: str, limit: int = _MAX_QUOTE) -> str:
    """Text as a Markdown code block that no text can end, and that holds no mark of a section (see below)."""
    cut = (text if len(text) <= limit else text[:limit] + " …").replace("<!--", "<!- -")
    return "\n".join(f"    {line}" for line in cut.splitlines())


_SECTION = re.compile(r"\n\n<!-- (\w+) -->\n.*?\n<!-- /\1 -->", re.DOTALL)


def with_sections(base: str, note: str, stage: str = "", text: str = "") -> str:
    """`base` and the sections that other stages have added to `note`, of which `stage`'s becomes `text`."""
    sections = {match[1]: match[0] for match in _SECTION.finditer(note)}
    if stage:
        sections[stage] = f"\n\n<!-- {stage} -->\n{text}\n<!-- /{stage} -->"
    tail = "".join(sections[name] for name in sorted(sections))
    return base[: max(0, MAX_NOTE - len(tail))] + tail


def without_sections(note: str) -> str:
    return _SECTION.sub("", note)


def report_section(stage: str, metrics: dict[str, float], files: dict[str, str]) -> str:
    """What another stage adds to the description: its metrics, and the beginning of its text."""
    lines = [f"**{stage}**", ""] + [f"- {name} {value:.6g}" for name, value in sorted(metrics.items())]
    texts = [text for name, text in sorted(files.items()) if name.endswith((".md", ".txt"))]
    return "\n".join(lines + (["", quote(texts[0], 600)] if texts else []))


def loss_picture(page: Page) -> bytes:
    """The loss curve as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="step", ylabel="loss (nats per token)")
    if page.train:
        axes.plot(*zip(*page.train, strict=True), linewidth=1, alpha=0.6, label="train, each step's batch")
    if page.val:
        axes.plot(*zip(*page.val, strict=True), marker=".", label="validation")
    if page.best:
        axes.plot(page.best[1], page.best[0], "o", fillstyle="none", label=f"best {page.best[0]:.4f}")
    if page.train or page.val:
        axes.legend()
    axes.grid(alpha=0.3)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=100)
    return png.getvalue()
