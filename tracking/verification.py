"""The checks of `tools verify`, cheapest first. Each returns a Report; ValueError: nothing is known of the result."""

import json
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tracking import divergence
from tracking.clean_clone import CleanClone, CouldNotRun, clean_clone
from tracking.dvc_files import DvcLock, read_yaml, stage_names
from tracking.first_steps import bits_environment
from tracking.git import git
from tracking.golden import Golden, differences, load_goldens, nearest, read_metrics
from tracking.journal import Record
from tracking.redaction import redact
from tracking.retrace import first_difference
from tracking.run import runs_in
from tracking.verdict import (
    DECLARED,
    DIVERGED,
    ENVIRONMENT_CHANGED,
    IDENTICAL,
    MISSING,
    SKIPPED,
    TOLERATED,
    Finding,
    Report,
)

# Where other bits are allowed (another environment, determinism: off), what may they cost? Four times the standard
# deviation of three seeds of the default experiment, in nats per token and bits per byte.
METRIC_LIMIT = 0.02
STEP_LIMIT = 1e-3  # nats; of the first 20 steps, in which rounding has not yet grown
TEXT_STAGES = ("download", "tokenize")  # whole numbers and text: no environment may change them

Say = Callable[[str], None]


def check_lock(root: Path, say: Say) -> Report:
    """Seconds: dvc.lock is complete and belongs to the commit's code and params; the remote lacks nothing."""
    report = Report("lock", git(root, "rev-parse", "HEAD"))
    with clean_clone(root, report.commit) as clone:
        stages = stage_names((clone.path / "dvc.yaml").read_text())
        lock = DvcLock.parse((clone.path / "dvc.lock").read_text())
        status = _json_of(clone.run("dvc", "status", "--json"))
        torn = _torn(clone.path, lock)
    for stage in stages:
        stale = [*_stale(status.get(stage, [])), *torn[stage]] if stage in lock.stages else ["not in dvc.lock"]
        verdict = IDENTICAL if not stale else MISSING
        report.findings.append(Finding(stage, "dvc.lock", "up to date", ", ".join(stale) or "up to date", verdict))
    if report.exit_code:
        report.notes.append("`dvc repro` and commit dvc.lock with the change")
    report.findings.append(_remote(root))
    return report


def _stale(changes: list[Any]) -> list[str]:
    """What a stage's entry in dvc.lock does not agree with; that nothing has been run in the clone does not count."""
    found = []
    for change in changes:
        if not isinstance(change, dict):
            found.append(str(change))
            continue
        for kind, items in change.items():
            if not isinstance(items, dict):
                found.append(kind)
                continue
            for path, how in items.items():
                # Of a file of parameters DVC reports each of them.
                reported = how.items() if isinstance(how, dict) else [(path, how)]
                found += [f"{name} {what}" for name, what in reported if what not in {"deleted", "not in cache"}]
    return found


def _torn(root: Path, lock: DvcLock) -> dict[str, list[str]]:
    """Inputs of which DVC sees in a clone only that they are absent: those that dvc.lock's own stages did not make."""
    made = {path: md5 for outs in lock.outs().values() for path, md5 in outs.items()}
    found: dict[str, list[str]] = {}
    for name, stage in lock.stages.items():
        others = [path for path, md5 in stage.deps.items() if made.get(path, md5) != md5]
        found[name] = [f"{path} is not what its stage made" for path in others]
        found[name] += [f"{path} deleted" for path in stage.deps if path not in made and not (root / path).exists()]
    return found


def _remote(root: Path) -> Finding:
    """Whether DVC's remote has all that dvc.lock names. DVC exits with 0 anyway, and tells directories on stderr."""
    if not _dvc(root, "remote", "list").stdout.strip():
        return Finding("remote", "objects", "", "no remote is configured", SKIPPED)
    if git(root, "diff", "HEAD", "--name-only", "--", "dvc.lock"):
        return Finding("remote", "objects", "", "the workspace has another dvc.lock", SKIPPED)
    done = _dvc(root, "status", "--cloud", "--json")
    if done.returncode:
        raise CouldNotRun(f"`dvc status --cloud` failed: {redact(done.stderr)}")
    lacking = [path for path, how in _json_of(done.stdout).items() if how in {"missing", "new"}]
    lacking += re.findall(r"md5: ([0-9a-f]{32}\.dir)", done.stderr)
    shown = ", ".join(lacking)
    return Finding("remote", "objects", "complete", shown or "complete", MISSING if lacking else IDENTICAL)


def _dvc(root: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(["dvc", *arguments], cwd=root, capture_output=True, text=True, check=False)


def _json_of(output: str) -> dict[str, Any]:
    """The JSON object that DVC printed, perhaps among warnings."""
    for line in output.splitlines():
        if line.startswith("{"):
            found: dict[str, Any] = json.loads(line)
            return found
    raise CouldNotRun(f"dvc printed no JSON: {' '.join(output.split())[:300]}")


def check_steps(root: Path, say: Say) -> Report:
    """A minute: the first training steps against the golden file of this environment, at full precision."""
    report = Report("steps", git(root, "rev-parse", "HEAD"))
    with clean_clone(root, report.commit) as clone:
        goldens = load_goldens(clone.path / "golden")
        if not goldens:
            raise CouldNotRun("golden/ holds no golden file; `make golden` writes that of this environment")
        found = _first_steps(clone, say)
    report.environment = found["environment"]
    golden = nearest(goldens, report.environment)
    report.environment_differs = differences(golden["environment"], report.environment)
    expected, steps = golden["steps"], found["steps"]
    difference, same = first_difference(expected, steps), _same_steps(expected, steps)
    verdict, shown = IDENTICAL if same else DIVERGED, f"{len(steps)} steps"
    if same and difference:
        changed = [name for name, value in golden["made_of"].items() if found["made_of"].get(name) != value]
        since = f"since the golden file was written, {', '.join(changed) or 'nothing else'} changed"
        report.notes.append(divergence.first_step(expected, steps))
        shown = f"differ at {difference[0]}"
        if report.environment_differs:
            report.notes.append(f"no golden file is of this environment ({since}); `make golden` writes one")
            verdict = TOLERATED if _are_close(expected, steps, report) else ENVIRONMENT_CHANGED
        else:
            report.notes.append(f"{since}; if that is meant: `make golden`")
            verdict = TOLERATED if _is_off(report) and _are_close(expected, steps, report) else DIVERGED
    report.findings.append(Finding("train", "first steps", f"{len(expected)} steps", shown, verdict))
    return report


def _same_steps(first: list[Record], second: list[Record]) -> bool:
    """Whether both hold the same steps, and any at all."""
    return [record["step"] for record in first] == [record["step"] for record in second] != []


def _is_off(report: Report) -> bool:
    """Whether nothing is promised of the bits, even on one machine."""
    return report.environment["numerics.determinism"] == "off"


def _are_close(first: list[Record], second: list[Record], report: Report) -> bool:
    apart: float = max(abs(a["loss"] - b["loss"]) for a, b in zip(first, second, strict=True))
    report.notes.append(f"the losses differ by {apart:.2g} at most (limit {STEP_LIMIT:g})")
    return apart <= STEP_LIMIT


def check_base(root: Path, base: str, say: Say) -> Report:
    """Minutes: the first training steps of a base commit and of HEAD, one after the other in the same environment."""
    report = Report("base", git(root, "rev-parse", "HEAD"))
    results: list[list[Record]] = []
    models = []
    for commit in (git(root, "rev-parse", f"{base}^{{commit}}"), report.commit):
        with clean_clone(root, commit) as clone:
            say(f"commit {commit[:12]}")
            models.append(DvcLock.parse((clone.path / "dvc.lock").read_text()).outs().get("train"))
            found = _first_steps(clone, say)
            results.append(found["steps"])
            report.environment = found["environment"]
    expected, steps = results
    verdict, same = IDENTICAL, _same_steps(expected, steps)
    if first_difference(expected, steps) or not same:
        report.notes.append(divergence.first_step(expected, steps))
        if models[0] != models[1]:
            verdict = DECLARED
        elif _is_off(report) and same and _are_close(expected, steps, report):
            verdict = TOLERATED
        else:
            verdict = DIVERGED
            because = "`dvc repro`, and commit dvc.lock with the reason"
            report.notes.append(f"results change and dvc.lock does not: {because}")
    report.findings.append(Finding("train", "first steps", f"{len(expected)} steps", f"{len(steps)} steps", verdict))
    return report


def _first_steps(clone: CleanClone, say: Say) -> dict[str, Any]:
    for stage in TEXT_STAGES:
        say(f"{stage}: {clone.repro(stage):.0f} s")
    # A base commit may be older than the one command line, when each command was a module that ran by itself.
    command = ("tools", "first-steps") if (clone.path / "tools/__main__.py").is_file() else ("tools.first_steps",)
    clone.run("python", "-m", *command, "--out", "first-steps.json")
    found: dict[str, Any] = json.loads((clone.path / "first-steps.json").read_bytes())
    return found


def check_all(root: Path, varied: bool, say: Say, revision: str = "HEAD") -> Report:
    """The whole check: every stage run anew in a clean clone of a revision, its outs against the dvc.lock there."""
    commit = git(root, "rev-parse", "--verify", f"{revision}^{{commit}}")
    report = Report("full, in varied surroundings" if varied else "full", commit)
    with clean_clone(root, report.commit, varied) as clone:
        expected = DvcLock.parse(git(clone.path, "show", "HEAD:dvc.lock")).outs()
        determinism = read_yaml((clone.path / "params.yaml").read_text(), "params.yaml")["numerics"]["determinism"]
        model = expected.get("train", {}).get("model", "none")
        goldens = [golden for golden in load_goldens(clone.path / "golden") if golden["model"] == model]
        for stage in stage_names((clone.path / "dvc.yaml").read_text()):
            say(f"{stage}: {clone.repro(stage):.0f} s")
        found = DvcLock.parse((clone.path / "dvc.lock").read_text()).outs()
        run = runs_in(clone.path)[-1]
        start = next(run.records("start"))
        report.environment = bits_environment(start["environment"], start["numerics"])
        golden = nearest(goldens, report.environment) if goldens else None
        if golden:
            report.environment_differs = differences(golden["environment"], report.environment)
        else:
            report.notes.append("no golden file tells in which environment this dvc.lock was made; see `make golden`")
        tolerant = golden is not None and (bool(report.environment_differs) or determinism == "off")
        close = tolerant and golden is not None and _metrics_agree(golden, read_metrics(clone.path), report)
        report.findings += _compare(expected, found, close)
        if found.get("train", {}).get("model") != model:
            try:
                report.notes += _where(root, clone, model, golden, list(run.records("step")))
            except Exception as error:  # what is only told must not hide what was found
                report.notes.append(f"where they part is not known ({type(error).__name__}: {error})")
    return report


def _compare(expected: dict[str, dict[str, str]], found: dict[str, dict[str, str]], close: bool) -> list[Finding]:
    """Every artifact that either dvc.lock names. `close`: metrics agree where other bits are allowed."""
    findings = []
    for stage in {**expected, **found}:
        for artifact in {**expected.get(stage, {}), **found.get(stage, {})}:
            md5, other = (side.get(stage, {}).get(artifact, "none") for side in (expected, found))
            verdict = TOLERATED if close and stage not in TEXT_STAGES else DIVERGED
            if "none" in (md5, other):
                verdict = MISSING
            elif md5 == other:
                verdict = IDENTICAL
            findings.append(Finding(stage, artifact, md5, other, verdict))
    return findings


def _metrics_agree(golden: Golden, found: dict[str, float], report: Report) -> bool:
    agree = True
    for name in ("val_loss", "train_loss", "bits_per_byte"):
        expected, value = golden["metrics"][name], found[name]
        if expected != value:
            report.notes.append(f"{name} {expected:.6f} -> {value:.6f} (limit {METRIC_LIMIT:g})")
        agree = agree and abs(expected - value) <= METRIC_LIMIT
    return agree


def _where(root: Path, clone: CleanClone, model: str, golden: Golden | None, steps: list[Record]) -> list[str]:
    """Where the trainings part, as far as anything is known here of the expected one."""
    known = divergence.journal_of(root, model) or (golden["steps"] if golden else [])
    lines = ["training: " + divergence.first_step(known, steps)]
    with tempfile.TemporaryDirectory() as folder:
        expected = divergence.model_of(root, model, Path(folder))
        told = divergence.first_tensor(expected, clone.path / "model") if expected else "the expected one is not here"
    return [*lines, f"weights: {told}"]
