"""Compares runs: groups them into settings (runs that differ only in their seed), and settings into comparisons.

The runs come from the journals and evaluate's reports in `.runs`, or from an MLflow server (mlflow_results.py).
"""

import difflib
import fnmatch
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from tracking.dvc_files import DvcLock
from tracking.git import resolve_commit
from tracking.history import experiment_models, experiment_refs
from tracking.run import DAMAGE, Run, read_object, runs_in
from tracking.run_name import SEED
from tracking.significance import Difference, corrected, difference

# Where the validation text comes from. With the sizes of both splits they show whether two runs were scored on the same
# text, whatever their tokenizers.
TEXT = (
    *(f"download.{name}" for name in ("source", "documents", "seed", "split", "revision", "text_column")),
    *("tokenize.val_fraction", "tokenize.split_seed"),
)
THREADS = "numerics.threads"


def defining(params: Mapping[str, str]) -> dict[str, str]:
    """The parameters that define a setting: without the seed, and without what changes no bit of the result."""
    portable = params.get("numerics.determinism") == "portable"
    return {key: value for key, value in params.items() if key != SEED and not (portable and key == THREADS)}


@dataclass(frozen=True)
class Point:
    """An evaluation during training; `seconds` counts the training time alone."""

    step: int
    tokens: int
    seconds: float
    train_loss: float
    val_loss: float


@dataclass(frozen=True)
class Result:
    """A finished training: what defines it, and how good its model is."""

    id: str  # of the MLflow run, or where the journal is
    name: str
    experiment: str  # MLflow's
    params: Mapping[str, str]  # as MLflow stores them
    tags: Mapping[str, str]  # with model.sha256 and model.md5
    profile: Mapping[str, Any]  # meta.json of its tokens
    started: int  # ms
    steps: int
    seconds: float  # of training
    scores: Mapping[str, float]  # those of val_loss, bits_per_byte, floor and excess that are known
    evaluated: str | None  # how the whole validation split was scored; None: `val_loss` is an estimate from training
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
        """The commit it ran at, followed by + if there were uncommitted changes."""
        return self.tags.get("git.commit", "none")[:7] + ("+" if self.tags.get("git.dirty") == "true" else "")

    @cached_property
    def setting(self) -> tuple[Any, ...]:
        """Everything that defines the run, except its seed and its code."""
        hashes = (self.tags.get(name) for name in ("tokens.sha256", "initial.sha256"))
        return *sorted(defining(self.params).items()), *hashes

    @cached_property
    def text(self) -> tuple[Any, ...]:
        """What two runs must share for their losses to be comparable, apart from the tokenizer."""
        values = [self.params.get(name) for name in TEXT]
        sizes = [
            (self.profile.get(split) or {}).get(size) for split in ("train", "val") for size in ("bytes", "documents")
        ]
        return *values, *sizes, self.evaluated

    @property
    def tokens(self) -> str:
        """The hash of the validation tokens, which identifies the text and its tokenizer."""
        return str((self.profile.get("val") or {}).get("sha256", self.params.get("tokenize.tokenizer")))


@dataclass
class Setting:
    """The runs that differ only in their seed, one for each seed."""

    results: list[Result]
    differs: dict[str, str] = field(default_factory=dict)  # parameter, or "code" -> value, where the settings differ

    @property
    def seeds(self) -> list[int]:
        return [result.seed for result in self.results]

    def losses(self, score: str) -> dict[int, float]:
        """seed -> score, for the runs that have it"""
        return {result.seed: result.scores[score] for result in self.results if score in result.scores}

    def values(self, score: str) -> list[float]:
        return list(self.losses(score).values())

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
        """How it differs from the others: "muon_learning_rate=0.04 n_layer=2"; unambiguous keys are shortened."""
        return " ".join(f"{key}={value}" for key, value in self.differs.items())

    @property
    def title(self) -> str:
        """The label, or the names of its runs where there is no other setting to differ from."""
        more = len(self.results) - 1
        return self.label or self.results[0].name + (f" and {more} more" if more else "")


@dataclass
class Comparison:
    """Settings whose losses are comparable, the best first, and the difference of each from the reference."""

    settings: list[Setting]
    score: str  # val_loss; bits_per_byte if the tokenizers differ
    reference: Setting
    chosen: bool  # the reference is the best setting (with several seeds), chosen by the losses that are compared
    differences: list[Difference]  # of all settings but the reference, in their order

    @property
    def others(self) -> list[Setting]:
        return [setting for setting in self.settings if setting is not self.reference]

    @property
    def tests(self) -> int:
        """The number of differences that might have been the one with the smallest p, which one seed never has."""
        several = sum(len(setting.values(self.score)) > 1 for setting in self.settings)
        m = several if several > 1 else len(self.settings)
        return m * (m - 1) // 2 if self.chosen else m - 1


# --- runs


def journal_results(root: Path, evaluated: str | None = None) -> tuple[list[Result], list[str]]:
    """The finished trainings in a repository's `.runs`, oldest first; and for each other run a line that says why not.

    A model that was scored in several ways has its newest scores, or those of the way `evaluated`.
    """
    reports = _reports(root, evaluated)
    found: list[Result] = []
    left_out: list[str] = []
    for run in runs_in(root):
        place = str(run.directory.relative_to(root))
        try:
            if run.status == "finished":
                found.append(_result(run, place, reports.get(run.result["model_sha256"])))
            else:
                why = {"open": "has not finished, or was killed", "failed": "failed", "killed": "was stopped"}
                left_out.append(f"{printable(run.info['name'])} ({place}) {why.get(run.status, 'has not started')}")
        except DAMAGE as error:
            left_out.append(f"{place} is damaged ({type(error).__name__}: {error})")
    return found, left_out


def scoring_method(stride: str) -> str:
    """How the whole validation split was scored, for Result.evaluated."""
    return f"stride {stride}"


def _reports(root: Path, preferred: str | None) -> dict[str, dict[str, Any]]:
    """The newest report of evaluate for each model, by the model's sha256; `sync` reports damaged ones."""
    found = []
    for path in (root / ".runs" / "reports").glob("evaluate-*.json"):
        report = read_object(path)
        try:
            report["method"] = scoring_method(report["tags"]["evaluate.stride"])
            found.append((report["method"] == preferred, report["t"], report["model"], report))
        except (KeyError, TypeError):
            continue
    return {model: report for *_, model, report in sorted(found, key=lambda each: each[:2])}


def _result(run: Run, place: str, report: dict[str, Any] | None) -> Result:
    info, result = run.info, run.result
    scores = {"val_loss": float(result["val_loss"])}
    if report is not None:
        scores = {name.removeprefix("evaluate/"): float(value) for name, value in report["metrics"].items()}
    return Result(
        id=run.mlflow.get("run_id") or place,
        name=printable(info["name"]),
        experiment=info["experiment"],
        params=run.params,
        tags={**run.tags, "attempt": place},
        profile=info["dataset"].get("profile", {}),
        started=info["started"],
        steps=result["steps"],
        seconds=next((seconds for _, seconds in run.timed("end")), 0.0),
        scores=scores,
        evaluated=report["method"] if report else None,
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
    """Groups runs into settings, and settings with comparable losses into comparisons, the largest one first.

    `is_baseline` selects the runs to compare the others with; without it, that is the best setting with several seeds,
    if there is one, since nothing can be told from one seed. Also returns a line for each run that is left out. Raises
    ValueError if the baseline is none of the runs, or several settings.
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
    """The runs with a score of the whole validation split, if any has one, and a line for each of the others."""
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
    score = "val_loss" if len({result.tokens for result in results}) == 1 else "bits_per_byte"
    settings = [setting for setting in settings if setting.values(score)]
    settings.sort(key=lambda setting: fmean(setting.values(score)))
    baselines = [each for each in settings if is_baseline and any(map(is_baseline, each.results))]
    if len(baselines) > 1:
        raise ValueError(
            f"the baseline is {len(baselines)} settings: {'; '.join(b.label for b in baselines)}; give one"
        )
    reference = next(iter(baselines or [each for each in settings if len(each.values(score)) > 1] or settings))
    found = Comparison(settings, score, reference, not baselines, [])
    pairs = [difference(other.losses(score), reference.losses(score)) for other in found.others]
    found.differences = corrected(pairs, found.tests)
    return found


def _by_setting(results: Sequence[Result]) -> list[dict[int, Result]]:
    """The runs of each setting by seed; of a training that was repeated, the newest.

    Runs of different code are the same setting if both have made the same model with the same seed.
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
    """Sets how settings differ: in parameters, by the shortest unambiguous key, then in data and code."""
    first = [setting.results[0] for setting in settings]
    each = [defining(result.params) for result in first]
    keys = sorted({key for params in each for key in params})
    differing = [key for key in keys if len({params.get(key) for params in each}) > 1]
    # Under portable, the number of threads says nothing; under another mode, the mode shows the difference.
    if len({params.get(THREADS) for params in each if THREADS in params}) < 2:
        differing = [key for key in differing if key != THREADS]
    short = {key: key.rpartition(".")[2] for key in differing}
    uses = Counter(short.values())
    hashes = {"data": "tokens.sha256", "initial": "initial.sha256"}
    hashes = {name: tag for name, tag in hashes.items() if len({r.tags.get(tag) for r in first}) > 1}
    if any(key.startswith(("download.", "tokenize.")) for key in differing):
        hashes.pop("data", None)  # those parameters say it already
    codes = {result.tags.get("code.sha256", "") for result in first}
    by_commit = len({result.code for result in first}) == len(codes)
    for setting, result in zip(settings, first, strict=True):
        setting.differs = {
            short[key] if uses[short[key]] == 1 else key: printable(result.params.get(key, "none")) for key in differing
        }
        setting.differs |= {name: result.tags.get(tag, "none")[:7] for name, tag in hashes.items()}
        if len(codes) > 1:
            setting.differs["code"] = result.code if by_commit else f"{result.code}~{result.tags['code.sha256'][:4]}"


def printable(text: str) -> str:
    """Escapes what would move a terminal's cursor, change its colours or break a line."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


# --- which runs an argument names


def select(results: Sequence[Result], argument: str, root: Path) -> list[Result]:
    """The runs that an argument names: a run, an experiment (a pattern may have *), a commit, or a model's hash.

    A commit names the run whose model is in its dvc.lock, or else the runs that were started at it. Raises ValueError
    if the argument names no run.
    """
    is_pattern = bool({"*", "?", "["} & set(argument))
    found = [result for result in results if _is_named(result, argument, is_pattern)]
    if not found and not is_pattern:
        models = experiment_models(root, argument) | {DvcLock.of_commit(root, argument).model_md5}
        found = [result for result in results if result.tags.get("model.md5", "") in models]
    if not found and not is_pattern:
        commit = resolve_commit(root, argument)
        found = [result for result in results if commit and result.tags.get("git.commit") == commit]
    if not found and experiment_refs(root, argument):
        raise ValueError(
            f"no run of experiment {argument!r} is here, since another clone trained it: `dvc exp show` has its "
            "numbers, and `python -m tools compare --server` compares the runs of an MLflow server"
        )
    if not found and not is_pattern and resolve_commit(root, argument):
        raise ValueError(f"no run of commit {argument!r} is here: `dvc metrics diff {argument} HEAD` has its losses")
    if not found:
        names = {name for result in results for name in (result.name, result.tags.get("dvc.experiment", "none"))}
        near = difflib.get_close_matches(argument, names - {"none"}, n=3)
        raise ValueError(
            f"no finished run is {argument!r}: no run's id or name, no experiment, no commit and no model's hash"
            + (f"; did you mean {' or '.join(map(repr, near))}?" if near else "; `dvc exp show` lists experiments")
        )
    return found


def _is_named(result: Result, argument: str, is_pattern: bool) -> bool:
    names = {result.name, result.tags.get("dvc.experiment", "none")} - {"none"}
    if is_pattern:
        return any(fnmatch.fnmatchcase(name, argument) for name in names)
    place = f"{result.tags.get('attempt', '')}/"
    if argument in {*names, result.id} or place.startswith(f"{argument.rstrip('/')}/"):
        return True
    hashes = [result.model, result.tags.get("model.md5", ""), result.tags.get("fingerprint", "")]
    return len(argument) >= 7 and any(value.startswith(argument) for value in hashes)
