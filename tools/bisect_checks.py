"""What commits compute in clean clones, for `python -m tools bisect`: their first steps, or their losses."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nanogpt.files import sha256_json, write_json, write_text
from tools.preset import changed
from tracking.bisection import Say, summary
from tracking.clean_clone import CleanClone, CouldNotRun, clean_clone
from tracking.divergence import first_difference, first_step
from tracking.dvc_files import DvcLock
from tracking.fingerprint import environment
from tracking.git import GitError
from tracking.golden import read_metrics
from tracking.redaction import redact
from tracking.run import read_object
from tracking.run_name import SEED
from tracking.significance import Evidence, evidence
from tracking.verification import run_first_steps

Found = dict[str, Any]
_REASON = re.compile(r"[\w.]*(Error|Exception): ")  # a line of a command's output, before DVC's own


class Results:
    """Runs commits in clean clones. Keeps what each computed in `.runs/bisect`, so that nothing is run twice."""

    def __init__(self, root: Path, overrides: dict[str, Any], again: bool, say: Say):
        self.root, self.overrides, self.again, self.say = root, overrides, again, say
        key = sha256_json({"environment": environment(), "overrides": overrides})[:8]
        self.folder = root / ".runs" / "bisect" / key
        self._made: set[Path] = set()  # by this process

    def first_steps(self, commit: str) -> Found:
        """See tracking.golden.first_steps. Raises CouldNotRun."""
        return self._result(commit, "first steps", {}, lambda clone: run_first_steps(clone, lambda line: None))

    def scores(self, commit: str, seed: int) -> Found:
        """Hashes of text, tokens and model, and the losses, of a training with a seed. Raises CouldNotRun."""
        return self._result(commit, f"seed {seed}", {SEED: seed}, _train)

    def _result(self, commit: str, name: str, values: dict[str, Any], run: Callable[[CleanClone], Found]) -> Found:
        path = self.folder / f"{commit}-{name.replace(' ', '-')}.json"
        kept = read_object(path) if path in self._made or not self.again else {}
        if not kept:
            self.say(f"{summary(self.root, commit)}: running {name}")
            kept = self._run(commit, {**self.overrides, **values}, run)
            write_json(path, kept)
            self._made.add(path)
        if "error" in kept:
            raise CouldNotRun(f"{summary(self.root, commit)}: {kept['error']}")
        found: Found = kept["result"]
        return found

    def _run(self, commit: str, values: dict[str, Any], run: Callable[[CleanClone], Found]) -> Found:
        try:
            with clean_clone(self.root, commit) as clone:
                set_params(clone.path / "params.yaml", values)
                return {"result": run(clone)}
        except GitError:  # says nothing about the commit
            raise
        except (ValueError, KeyError, FileNotFoundError) as error:
            lines = str(error).splitlines() or [repr(error)]
            return {"error": redact(next(filter(_REASON.match, lines), lines[0]))}


def set_params(path: Path, values: dict[str, Any]) -> None:
    """Sets parameters, by "section.key", in a params.yaml. Raises ValueError for a key that it does not have."""
    sections: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    if sections:
        write_text(path, changed(path.read_text(encoding="utf-8"), "its params.yaml", ("-S", sections))[0])


def _train(clone: CleanClone) -> Found:
    clone.repro("download", "tokenize", "train", "evaluate")
    lock = DvcLock.parse((clone.path / "dvc.lock").read_text())
    hashes = {"text": lock.out_md5("download", "data/raw"), "tokens": lock.out_md5("tokenize", "data/tokens")}
    metrics = read_metrics(clone.path)
    return {**hashes, "model": lock.model_md5, **{name: metrics[name] for name in ("val_loss", "bits_per_byte")}}


class Bits:
    """Compares commits by the bits of their tokens and first training steps."""

    what = "other bits"

    def __init__(self, results: Results):
        self.results = results

    def differ(self, good: str, bad: str) -> bool:
        return self.difference(good, bad) is not None

    def changed(self, good: str, bad: str, commit: str) -> bool:
        return self.differ(good, commit)

    def difference(self, good: str, commit: str) -> Found | None:
        """{"step", "tensor", "line"} of the first difference; step 0 is before the first one. None if all agree."""
        expected = self.results.first_steps(good)
        if expected["environment"]["numerics.determinism"] == "off":
            raise ValueError(
                "numerics.determinism = off gives other bits each time: add -S numerics.determinism=portable (or "
                "machine), or compare losses with --loss"
            )
        return first_change(expected, self.results.first_steps(commit))

    def same(self, good: str, bad: str) -> str:
        """Why there is nothing to search."""
        steps = len(self.results.first_steps(good)["steps"])
        return (
            f"the first {steps} steps have the same bits at {good[:12]} and {bad[:12]}; --loss compares whole trainings"
        )


def first_change(expected: Found, found: Found) -> Found | None:
    """The first difference between two results of golden.first_steps; None if all that both recorded agrees."""
    tokens = [each["made_of"]["tokens"] for each in (expected, found)]
    if tokens[0] != tokens[1]:
        return {"step": 0, "tensor": None, "line": f"data/tokens: sha256 {tokens[0][:12]} -> {tokens[1][:12]}"}
    steps = [each["steps"] for each in (expected, found)]
    record, weights = first_difference(*steps), _first_weights(expected.get("tensors"), found.get("tensors"))
    lines = [(record[0], f"values: {first_step(*steps)}")] if record else []
    if weights:
        lines.append(weights[:2])
    if not lines and len(steps[0]) != len(steps[1]):
        lines.append((min(map(len, steps)) + 1, f"{len(steps[0])} steps -> {len(steps[1])} steps"))
    if not lines:
        return None
    lines.sort(key=lambda line: line[0])  # a step's values are computed before the weights that it makes
    return {
        "step": lines[0][0],
        "tensor": weights[2] if weights else None,
        "line": "; ".join(text for _, text in lines),
    }


def _first_weights(expected: list[Any] | None, found: list[Any] | None) -> tuple[int, str, str] | None:
    """The first step after which weights differ, a line, and the first tensor. A new name alone is no difference."""
    for step, (first, second) in enumerate(zip(expected or [], found or [], strict=False)):
        different = [name for (_, old), (name, new) in zip(first, second, strict=False) if old != new]
        different += [name for name, _ in second[len(first) :] or first[len(second) :]]
        if different:
            when = f"after step {step}" if step else "before the first step"
            line = f"weights: {len(different)} of {len(second)} tensors differ {when}, the first is {different[0]}"
            return step, line, different[0]
    return None


class Losses:
    """Compares commits by the losses of trainings with the same seeds, a pair at a time, by the rule of `trial`."""

    what = "another loss"

    def __init__(self, results: Results, max_seeds: int):
        self.results, self.seeds = results, range(1, max_seeds + 1)
        self._seen: dict[str, Evidence] = {}  # of each commit that differs, against its good end

    def differ(self, good: str, bad: str) -> bool:
        pairs: list[float] = []
        for seed in self.seeds:
            first, second = self._scores(seed, good, bad)
            if first["model"] == second["model"]:
                return False
            pairs.append(_minus(second, first))
            self._seen[bad] = evidence(pairs)
            if self._seen[bad].verdict != "cannot tell":
                return True
        return False

    def changed(self, good: str, bad: str, commit: str) -> bool:
        """Whether its losses differ from those of `good`; no, if it makes the same model, or differs from `bad`."""
        from_good: list[float] = []
        from_bad: list[float] = []
        for seed in self.seeds:
            first, last, own = self._scores(seed, good, bad, commit)
            if own["model"] in (first["model"], last["model"]):
                self._seen[commit] = self._seen[bad]
                return bool(own["model"] == last["model"])
            from_good.append(_minus(own, first))
            from_bad.append(_minus(own, last))
            self._seen[commit] = evidence(from_good)
            if self._seen[commit].verdict != "cannot tell":
                return True
            if evidence(from_bad).verdict != "cannot tell":
                return False
        raise CouldNotRun(
            f"{commit[:12]}: its loss is undecided after {len(self.seeds)} seeds; --max-seeds allows more"
        )

    def difference(self, good: str, commit: str) -> Found | None:
        """{"mean", "interval", "pairs", "line"} of the pairs by which a commit was found to differ."""
        seen = self._seen[commit]
        return {"mean": seen.mean, "interval": [seen.low, seen.high], "pairs": seen.pairs, "line": _line(seen)}

    def same(self, good: str, bad: str) -> str:
        """Why there is nothing to search."""
        found = [self._scores(seed, good, bad) for seed in self.seeds[:1]]
        if found[0][0]["model"] == found[0][1]["model"]:
            return f"{good[:12]} and {bad[:12]} make the same model"
        return (
            f"the losses of {good[:12]} and {bad[:12]} do not differ beyond noise after {len(self.seeds)} seeds; "
            "--max-seeds allows more"
        )

    def _scores(self, seed: int, *commits: str) -> list[Found]:
        found = [self.results.scores(commit, seed) for commit in commits]
        if len({each["text"] for each in found}) > 1:
            raise CouldNotRun(f"{commits[-1][:12]}: its data/raw is another text, so its losses cannot be compared")
        return found


def _minus(found: Found, reference: Found) -> float:
    score = "val_loss" if found["tokens"] == reference["tokens"] else "bits_per_byte"
    return float(found[score] - reference[score])


def _line(seen: Evidence) -> str:
    return f"loss {seen.mean:+.4f} after {seen.pairs} pairs of seeds, 99 % interval [{seen.low:+.4f}, {seen.high:+.4f}]"
