"""Which runs can be compared, and what comes of it: runs, settings (runs that differ in the seed alone), comparisons.

Runs are read from the journals and evaluate's reports in `.runs`, or from an MLflow server (mlflow_results.py).
"""

import difflib
import fnmatch
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from tracking.dvc_files import DvcLock
from tracking.git import git_or_none
from tracking.history import experiment_models
from tracking.mlflow_server import as_text
from tracking.run import Run, runs_in
from tracking.significance import Difference, corrected, difference

SEED = "train.seed"
# Where the validation text comes from. With the sizes of both splits they say whether two runs were judged by the same
# text, whatever tokenizer cut it.
TEXT = (
    *(f"download.{name}" for name in ("source", "documents", "seed", "split", "revision", "text_column")),
    *("tokenize.val_fraction", "tokenize.split_seed"),
)


@dataclass(frozen=True)
class Point:
    """An evaluation during training; `seconds` are of training alone."""

    step: int
    tokens: int
    seconds: float
    train_loss: float
    val_loss: float


@dataclass(frozen=True)
class Result:
    """A finished training: what defines it, and how good its model is."""

    id: str  # MLflow's run, or where the journal lies
    name: str
    experiment: str  # MLflow's
    params: Mapping[str, str]  # as MLflow keeps them
    tags: Mapping[str, str]  # with model.sha256 and model.md5
    profile: Mapping[str, Any]  # of its tokens: meta.json
    started: int  # ms
    steps: int
    seconds: float  # of training
    scores: Mapping[str, float]  # val_loss, bits_per_byte, floor, excess, as far as they are known
    evaluated: str | None  # how the whole validation split was scored; None: `val_loss` is of training's batches
    curve: Callable[[], list[Point]] = field(repr=False)
    sample: Callable[[], str] = field(repr=False)

    @property
    def seed(self) -> int:
        return int(self.params.get(SEED, 0))

    @property
    def model(self) -> str:
        """The sha256 of its model."""
        return self.tags.get("model.sha256", "")

    @property
    def code(self) -> str:
        """The commit it ran at, with a + if code or parameters had uncommitted changes."""
        return self.tags.get("git.commit", "none")[:7] + ("+" if self.tags.get("git.dirty") == "true" else "")

    @cached_property
    def setting(self) -> tuple[Any, ...]:
        """All that defines the run but its seed and its code."""
        hashes = (self.tags.get(name) for name in ("tokens.sha256", "initial.sha256"))
        return *sorted((key, value) for key, value in self.params.items() if key != SEED), *hashes

    @cached_property
    def text(self) -> tuple[Any, ...]:
        """What must be the same of two runs whose losses are compared, but for the tokenizer."""
        values = [self.params.get(name) for name in TEXT]
        sizes = [
            (self.profile.get(split) or {}).get(size) for split in ("train", "val") for size in ("bytes", "documents")
        ]
        return *values, *sizes, self.evaluated

    @property
    def tokens(self) -> str:
        """The hash of the validation tokens, which names the text and its tokenizer."""
        return str((self.profile.get("val") or {}).get("sha256", self.params.get("tokenize.tokenizer")))


@dataclass
class Setting:
    """The runs that differ in their seeds alone, one for each seed."""

    results: list[Result]
    differs: dict[str, str] = field(default_factory=dict)  # parameter, or "code" -> value, where the settings differ

    @property
    def seeds(self) -> list[int]:
        return [result.seed for result in self.results]

    def values(self, score: str) -> list[float]:
        """A score of each run that has it."""
        return [result.scores[score] for result in self.results if score in result.scores]

    def losses(self, score: str) -> dict[int, float]:
        """seed -> score"""
        return {result.seed: result.scores[score] for result in self.results if score in result.scores}

    def mean(self, score: str) -> float | None:
        values = self.values(score)
        return fmean(values) if values else None

    def deviation(self, score: str) -> float | None:
        values = self.values(score)
        return stdev(values) if len(values) > 1 else None

    @property
    def seconds(self) -> float:
        return median(result.seconds for result in self.results)

    @property
    def steps(self) -> int:
        return max(result.steps for result in self.results)

    @property
    def label(self) -> str:
        """What makes it differ from the others: "muon_learning_rate=0.04 n_layer=2"; keys that are clear are short."""
        return " ".join(f"{key}={value}" for key, value in self.differs.items())


@dataclass
class Comparison:
    """Settings whose losses may be compared, the best first, and the difference of each from the reference."""

    settings: list[Setting]
    score: str  # val_loss; bits_per_byte if the tokenizers differ
    reference: Setting
    chosen: bool  # the reference is the best of them, chosen by what is compared here
    differences: list[Difference]  # of all settings but the reference, in their order

    @property
    def others(self) -> list[Setting]:
        return [setting for setting in self.settings if setting is not self.reference]

    @property
    def tests(self) -> int:
        """The number of differences among which the smallest p could be found."""
        m = len(self.settings)
        return m * (m - 1) // 2 if self.chosen else m - 1


# --- runs


def journal_results(root: Path, evaluated: str | None = None) -> tuple[list[Result], list[str]]:
    """The finished trainings in a repository's `.runs`, oldest first; and a line for each that is left out, and why.

    A model that was scored in several ways has the scores of the newest, or those of the way `evaluated`.
    """
    scores = _scores(root, evaluated)
    found: list[Result] = []
    left_out: list[str] = []
    for run in runs_in(root):
        place = run.directory.relative_to(root)
        try:
            if run.status == "finished":
                found.append(_result(run, str(place), scores.get(run.result["model_sha256"])))
            else:
                why = {"open": "has not finished, or was killed", "failed": "failed", "killed": "was stopped"}
                left_out.append(f"{printable(run.info['name'])} ({place}) {why.get(run.status, 'has not begun')}")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            left_out.append(f"{place} is damaged ({type(error).__name__}: {error})")
    return found, left_out


def way_to_score(stride: str) -> str:
    """How the whole validation split was scored, as Result.evaluated says it."""
    return f"stride {stride}"


def _scores(root: Path, preferred: str | None) -> dict[str, dict[str, Any]]:
    """The newest report of evaluate for each model, by the model's sha256; damaged ones are `sync`'s business."""
    reports = []
    for path in (root / ".runs" / "reports").glob("evaluate-*.json"):
        try:
            report = json.loads(path.read_bytes())
            way = way_to_score(report["tags"]["evaluate.stride"])
            reports.append((way == preferred, report["t"], report["model"], report | {"way": way}))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return {model: report for *_, model, report in sorted(reports, key=lambda each: each[:2])}


def _result(run: Run, place: str, report: dict[str, Any] | None) -> Result:
    info, result = run.info, run.result
    end = next((seconds for _, seconds in run.timed("end")), 0.0)
    evaluated = None
    scores = {"val_loss": float(result["val_loss"])}
    if report is not None:
        evaluated = report["way"]
        scores = {name.removeprefix("evaluate/"): float(value) for name, value in report["metrics"].items()}
    made = {f"model.{name}": str(result[f"model_{name}"]) for name in ("sha256", "md5") if f"model_{name}" in result}
    return Result(
        id=run.mlflow.get("run_id") or place,
        name=printable(info["name"]),
        experiment=info["experiment"],
        params={key: as_text(value) for key, value in info["params"].items()},
        tags={**info["tags"], **made, "attempt": place, "published": result.get("published", "best")},
        profile=info["dataset"].get("profile", {}),
        started=info["started"],
        steps=result["steps"],
        seconds=end,
        scores=scores,
        evaluated=evaluated,
        curve=lambda: [
            Point(each["step"], each["tokens"], seconds, each["train_loss"], each["val_loss"])
            for each, seconds in run.timed("eval")
        ],
        sample=lambda: next((each["text"] for each, _ in reversed([*run.timed("sample")])), ""),
    )


# --- settings and comparisons


def compare(
    results: Iterable[Result], is_baseline: Callable[[Result], bool] | None = None
) -> tuple[list[Comparison], list[str]]:
    """Groups runs into settings, and settings into those whose losses may be compared; the largest comparison first.

    `is_baseline` says which runs the others are compared with; None: the best setting. Returns a line for each run
    that is left out as well. Raises ValueError if the baseline is none of the runs, or several settings.
    """
    results, left_out = _scored(list(results))
    by_text: dict[Any, list[Result]] = defaultdict(list)
    for result in results:
        by_text[result.text].append(result)
    comparisons = [_compare(group, is_baseline) for group in by_text.values()]
    if is_baseline and not any(is_baseline(result) for result in results):
        raise ValueError("the baseline is none of the runs that are compared; name it among them, or name no runs")
    return sorted(comparisons, key=lambda each: -len(each.settings)), left_out


def _scored(results: list[Result]) -> tuple[list[Result], list[str]]:
    """Those with a score of the whole validation split, if any has one; and a line for each of the others."""
    if not any(result.evaluated for result in results):
        return results, []
    left_out = [
        f"{result.name} ({result.id}) has no score of the whole validation split: `dvc repro evaluate`, or an "
        "experiment that does not end with train, adds it"
        for result in results
        if not result.evaluated
    ]
    return [result for result in results if result.evaluated], left_out


def _compare(results: Sequence[Result], is_baseline: Callable[[Result], bool] | None) -> Comparison:
    settings = [Setting([group[seed] for seed in sorted(group)]) for group in _by_setting(results)]
    name_differences(settings)
    one_tokenizer = len({result.tokens for result in results}) == 1
    score = "val_loss" if one_tokenizer else "bits_per_byte"
    settings = [setting for setting in settings if setting.values(score)]
    settings.sort(key=lambda setting: fmean(setting.values(score)))
    baselines = [each for each in settings if is_baseline and any(map(is_baseline, each.results))]
    if len(baselines) > 1:
        raise ValueError(
            f"the baseline is {len(baselines)} settings: {'; '.join(b.label for b in baselines)}; give one"
        )
    reference = baselines[0] if baselines else settings[0]
    found = Comparison(settings, score, reference, not baselines, [])
    pairs = [difference(other.losses(score), reference.losses(score)) for other in found.others]
    found.differences = corrected(pairs, found.tests)
    return found


def _by_setting(results: Sequence[Result]) -> list[dict[int, Result]]:
    """The runs of each setting by their seeds; of a training that was repeated, the newest.

    Code that has changed is the same setting where it made the same model of the same seed.
    """
    by_code: dict[Any, dict[int, Result]] = defaultdict(dict)
    for result in sorted(results, key=lambda each: each.started):
        by_code[*result.setting, result.tags.get("code.sha256")][result.seed] = result
    groups: dict[Any, list[dict[int, Result]]] = defaultdict(list)
    for (*setting, _), group in by_code.items():
        alike = groups[tuple(setting)]
        models = {(seed, result.model) for seed, result in group.items()}
        same = next((g for g in alike if models & {(seed, result.model) for seed, result in g.items()}), None)
        if same is None:
            alike.append(group)
        else:
            same |= group
    return [group for alike in groups.values() for group in alike]


def name_differences(settings: Sequence[Setting]) -> None:
    """Sets what differs between settings: parameters by the shortest name that is clear, then data and code."""
    first = [setting.results[0] for setting in settings]
    keys = sorted({key for result in first for key in result.params} - {SEED})
    differing = [key for key in keys if len({result.params.get(key) for result in first}) > 1]
    short = Counter(key.rpartition(".")[2] for key in differing)
    names = {key: key.rpartition(".")[2] if short[key.rpartition(".")[2]] == 1 else key for key in differing}
    hashes = {"data": "tokens.sha256", "initial": "initial.sha256"}
    differing_hashes = {n: tag for n, tag in hashes.items() if len({r.tags.get(tag) for r in first}) > 1}
    if any(key.startswith(("download.", "tokenize.")) for key in differing):
        differing_hashes.pop("data", None)  # says nothing more
    codes = {result.tags.get("code.sha256", "") for result in first}
    by_commit = len({result.code for result in first}) == len(codes)
    for setting, result in zip(settings, first, strict=True):
        setting.differs = {names[key]: printable(result.params.get(key, "none")) for key in differing}
        setting.differs |= {name: result.tags.get(tag, "none")[:7] for name, tag in differing_hashes.items()}
        if len(codes) > 1:
            setting.differs["code"] = result.code if by_commit else f"{result.code}~{result.tags['code.sha256'][:4]}"


def printable(text: str) -> str:
    """A text without what would move a terminal's cursor, change its colours or break a line."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


# --- which runs an argument means


def select(results: Sequence[Result], argument: str, root: Path) -> list[Result]:
    """The runs that an argument names: a run, an experiment (a pattern may have *), a commit, or a model's hash.

    A commit names the run whose model is in its dvc.lock; if there is none, the runs that started from it. Raises
    ValueError if the argument names no run.
    """
    patterns = {"*", "?", "["} & set(argument)
    found = [result for result in results if _is_named(result, argument, bool(patterns))]
    if not found and not patterns:
        models = experiment_models(root, argument) | _models_at(root, argument)
        found = [result for result in results if result.tags.get("model.md5") in models]
    if not found and not patterns:
        commit = git_or_none(root, "rev-parse", "--verify", "--quiet", f"{argument}^{{commit}}")
        found = [result for result in results if commit and result.tags.get("git.commit") == commit]
    if not found:
        names = {name for result in results for name in (result.name, result.tags.get("dvc.experiment", "none"))}
        near = difflib.get_close_matches(argument, names - {"none"}, n=3)
        raise ValueError(
            f"no finished run is {argument!r}: no run's id or name, no experiment, no commit and no model's hash"
            + (f"; did you mean {' or '.join(map(repr, near))}?" if near else "; `dvc exp show` lists experiments")
        )
    return found


def _is_named(result: Result, argument: str, pattern: bool) -> bool:
    names = {result.name, result.tags.get("dvc.experiment", "none")} - {"none"}
    if pattern:
        return any(fnmatch.fnmatchcase(name, argument) for name in names)
    place = f"{result.tags.get('attempt', '')}/"
    if argument in {*names, result.id} or place.startswith(f"{argument.rstrip('/')}/"):
        return True
    hashes = [result.model, result.tags.get("model.md5", ""), result.tags.get("fingerprint", "")]
    return len(argument) >= 7 and any(value.startswith(argument) for value in hashes)


def _models_at(root: Path, commit: str) -> set[str]:
    """The md5 of the model in a commit's dvc.lock; empty where there is no such commit or lock."""
    lock = DvcLock.parse_or_empty(git_or_none(root, "show", f"{commit}:./dvc.lock"))
    md5 = lock.out_md5("train", "model")
    return {md5} if md5 else set()
