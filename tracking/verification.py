"""The checks of `tools verify`, the fastest first. Each returns a Report; after a ValueError the result is unknown."""

import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tracking import divergence
from tracking.clean_clone import CleanClone, CouldNotRun, clean_clone
from tracking.dvc_files import DvcLock, read_yaml, remote_folder, stage_names
from tracking.git import git
from tracking.golden import Golden, bits_environment, differences, load_goldens, nearest, read_metrics
from tracking.history import changed_params
from tracking.journal import Record
from tracking.redaction import redact
from tracking.run import as_text, runs_in
from tracking.verdict import (
    DECLARED,
    DIVERGED,
    ENVIRONMENT_CHANGED,
    IDENTICAL,
    MISSING,
    SKIPPED,
    STALE,
    TOLERATED,
    Finding,
    Report,
)

# By how much metrics may differ where other bits are allowed (in another environment, or with determinism: off): four
# times the standard deviation of three seeds of the default experiment, in nats per token and bits per byte.
METRIC_LIMIT = 0.02
STEP_LIMIT = 1e-3  # nats; in the first 20 steps, in which rounding errors have not grown yet
EMULATOR = "qemu-x86_64"
CPUS = ("Haswell", "Skylake-Client", "EPYC", "EPYC-Rome")  # Intel's and AMD's, without AVX-512, which qemu lacks
UNABLE_CPUS = ("SandyBridge", "Haswell,-fma")
TEXT_STAGES = ("download", "tokenize")  # integers and text, which no environment may change

Say = Callable[[str], None]


def check_lock(root: Path) -> Report:
    """Checks in seconds that dvc.lock is complete and matches the commit's code and params, and that the remote is."""
    report = Report("lock", git(root, "rev-parse", "HEAD"))
    with clean_clone(root, report.commit) as clone:
        stages = stage_names((clone.path / "dvc.yaml").read_text())
        lock = DvcLock.parse((clone.path / "dvc.lock").read_text())
        status = _json_of(clone.run("dvc", "status", "--json"))
        inconsistent = _inconsistent(clone.path, lock)
    for stage in stages:
        stale = ["not in dvc.lock"]
        if stage in lock.stages:
            changed = changed_params(root, report.commit, lock.stages[stage].params)
            sections = {name.partition(".")[0] for name, _, _ in changed}
            stale = [f"{name} {as_text(old)} -> {as_text(new)}" for name, old, new in changed]
            stale += [each for each in _stale(status.get(stage, [])) if each.removesuffix(" modified") not in sections]
            stale += inconsistent[stage]
        verdict = IDENTICAL if not stale else STALE
        report.findings.append(Finding(stage, "dvc.lock", "up to date", ", ".join(stale) or "up to date", verdict))
    if report.exit_code:
        report.notes.append(
            "run `dvc repro` and `make golden`, commit dvc.lock and golden/ with the change, and `dvc push` to a remote"
        )
        report.notes.append("or take the change back: `git revert --no-edit COMMIT`, then `dvc checkout`")
    report.findings.append(_remote(root))
    if report.findings[-1].verdict == MISSING:
        report.notes.append("run `dvc push` where the remote can be reached")
    return report


def _stale(changes: list[Any]) -> list[str]:
    """What `dvc status` reports for a stage, except that a fresh clone has no outs."""
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
                # For a params file, DVC reports each of its keys.
                reported = how.items() if isinstance(how, dict) else [(path, how)]
                found += [f"{name} {what}" for name, what in reported if what not in {"deleted", "not in cache"}]
    return found


def _inconsistent(root: Path, lock: DvcLock) -> dict[str, list[str]]:
    """For each stage the deps that differ from the outs in the same dvc.lock, or are neither an out nor a file.

    `dvc status` in a fresh clone only reports that they are absent.
    """
    outs = {path: md5 for stage in lock.outs().values() for path, md5 in stage.items()}
    found: dict[str, list[str]] = {}
    for name, stage in lock.stages.items():
        others = [path for path, md5 in stage.deps.items() if outs.get(path, md5) != md5]
        found[name] = [f"{path} is not what its stage made" for path in others]
        found[name] += [f"{path} deleted" for path in stage.deps if path not in outs and not (root / path).exists()]
    return found


def _remote(root: Path) -> Finding:
    """Whether DVC's remote has every object of dvc.lock. DVC exits with 0 anyway, and names directories on stderr."""
    if others := git(root, "diff", "HEAD", "--name-only", "--", "dvc.lock", ".dvc/config").split():
        return Finding("remote", "objects", "", f"the workspace has another {others[-1]}", SKIPPED)
    if not _dvc(root, "remote", "list").stdout.strip():
        return Finding("remote", "objects", "", "no remote is configured", SKIPPED)
    done = _dvc(root, "status", "--cloud", "--json")
    if done.returncode:
        raise CouldNotRun(f"`dvc status --cloud` failed: {redact(done.stderr)}")
    missing = [path for path, how in _json_of(done.stdout).items() if how in {"missing", "new"}]
    missing += re.findall(r"md5: ([0-9a-f]{32}\.dir)", done.stderr)
    if not missing:
        return Finding("remote", "objects", "complete", "complete", IDENTICAL)
    folder = remote_folder(root)
    lacking = f"{len(missing)} missing, such as {missing[0]}"
    if folder and not folder.is_dir():
        lacking = f"this machine has no folder {folder}"
    return Finding("remote", "objects", "complete", lacking, MISSING)


def _dvc(root: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(["dvc", *arguments], cwd=root, capture_output=True, text=True, check=False)


def _json_of(output: str) -> dict[str, Any]:
    """The JSON object in DVC's output, which may contain warnings."""
    for line in output.splitlines():
        if line.startswith("{"):
            found: dict[str, Any] = json.loads(line)
            return found
    raise CouldNotRun(f"dvc printed no JSON: {' '.join(output.split())[:300]}")


def check_steps(root: Path, say: Say) -> Report:
    """Compares in a minute the first training steps with the golden file of this environment, bit for bit."""
    report = Report("steps", git(root, "rev-parse", "HEAD"))
    with clean_clone(root, report.commit) as clone:
        goldens = load_goldens(clone.path / "golden")
        if not goldens:
            raise CouldNotRun("golden/ has no golden file; `make golden` writes the one of this environment")
        found = run_first_steps(clone, say)
    report.environment = found["environment"]
    golden = nearest(goldens, report.environment)
    report.environment_differs = differences(golden["environment"], report.environment)
    expected, steps = golden["steps"], found["steps"]
    difference, same = divergence.first_difference(expected, steps), _same_steps(expected, steps)
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
            report.notes.append(f"{since}; if that is intended: `dvc repro` and `make golden`")
            verdict = TOLERATED if _is_off(report) and _are_close(expected, steps, report) else DIVERGED
    report.findings.append(Finding("train", "first steps", f"{len(expected)} steps", shown, verdict))
    if kernels := golden.get("kernels"):
        different = [name for name, answer in kernels.items() if found["kernels"].get(name) != answer]
        report.findings.append(
            Finding(
                "kernels",
                "known answers",
                f"{len(kernels)} kernels",
                ", ".join(different) or f"{len(kernels)} kernels",
                DIVERGED if different else IDENTICAL,
            )
        )
    return report


def _same_steps(first: list[Record], second: list[Record]) -> bool:
    """Whether both have the same steps, and at least one."""
    return [record["step"] for record in first] == [record["step"] for record in second] != []


def _is_off(report: Report) -> bool:
    """Whether no bits are promised, even on one machine."""
    return report.environment["numerics.determinism"] == "off"


def _are_close(first: list[Record], second: list[Record], report: Report) -> bool:
    apart: float = max(abs(a["loss"] - b["loss"]) for a, b in zip(first, second, strict=True))
    report.notes.append(f"the losses differ by {apart:.2g} at most (limit {STEP_LIMIT:g})")
    return apart <= STEP_LIMIT


def check_base(root: Path, base: str, say: Say) -> Report:
    """Compares in minutes the first training steps of a base commit and of HEAD, both run in this environment."""
    report = Report("base", git(root, "rev-parse", "HEAD"))
    results: list[list[Record]] = []
    outs = []
    for commit in (git(root, "rev-parse", f"{base}^{{commit}}"), report.commit):
        with clean_clone(root, commit) as clone:
            say(f"commit {commit[:12]}")
            outs.append(DvcLock.parse((clone.path / "dvc.lock").read_text()).outs().get("train"))
            found = run_first_steps(clone, say)
            results.append(found["steps"])
            report.environment = found["environment"]
    expected, steps = results
    verdict, same = IDENTICAL, _same_steps(expected, steps)
    if divergence.first_difference(expected, steps) or not same:
        report.notes.append(divergence.first_step(expected, steps))
        if outs[0] != outs[1]:
            verdict = DECLARED
        elif _is_off(report) and same and _are_close(expected, steps, report):
            verdict = TOLERATED
        else:
            verdict = DIVERGED
            report.notes.append(
                "results change and dvc.lock does not: run `dvc repro`, and commit dvc.lock with the reason"
            )
    report.findings.append(Finding("train", "first steps", f"{len(expected)} steps", f"{len(steps)} steps", verdict))
    return report


def check_cpus(root: Path, say: Say) -> Report:
    """Compares the first training steps here with those under emulated CPUs, and checks that others are refused."""
    if shutil.which(EMULATOR) is None:
        raise CouldNotRun(f"{EMULATOR} is not installed; on Debian and Ubuntu: apt-get install qemu-user")
    report = Report("cpus", git(root, "rev-parse", "HEAD"))
    with clean_clone(root, report.commit) as clone:
        here = run_first_steps(clone, say)
        report.environment = here["environment"]
        if report.environment["numerics.determinism"] != "portable":
            raise CouldNotRun("only numerics.determinism = portable gives the same bits on other CPUs")
        for cpu in CPUS:
            begin = time.monotonic()
            found = _train_first_steps(clone, EMULATOR, "-cpu", cpu, sys.executable)
            same = found["steps"] == here["steps"] and found["kernels"] == here["kernels"]
            if not same:
                report.notes.append(f"{cpu}: {divergence.first_step(here['steps'], found['steps'])}")
            expected, shown = (f"{len(each['steps'])} steps, {len(each['kernels'])} kernels" for each in (here, found))
            report.findings.append(Finding(cpu, "first steps", expected, shown, IDENTICAL if same else DIVERGED))
            say(f"{cpu}: {time.monotonic() - begin:.0f} s")
        for cpu in UNABLE_CPUS:
            shown = "trained"
            try:
                _train_first_steps(clone, EMULATOR, "-cpu", cpu, sys.executable)
            except CouldNotRun as error:
                shown = "refused" if "needs a CPU with AVX2 and FMA" in str(error) else "crashed"
            report.findings.append(
                Finding(cpu, "refusal", "refused", shown, IDENTICAL if shown == "refused" else DIVERGED)
            )
    return report


def run_first_steps(clone: CleanClone, say: Say) -> dict[str, Any]:
    """Trains the first steps in a clone; see golden.first_steps. Raises CouldNotRun."""
    say(f"{' and '.join(TEXT_STAGES)}: {clone.repro(*TEXT_STAGES):.0f} s")
    return _train_first_steps(clone, "python")


def _train_first_steps(clone: CleanClone, *python: str) -> dict[str, Any]:
    clone.run(*python, "-m", "tools", "first-steps", "--out", "first-steps.json")
    found: dict[str, Any] = json.loads((clone.path / "first-steps.json").read_bytes())
    return found


def check_all(root: Path, varied: bool, say: Say, revision: str = "HEAD") -> Report:
    """Runs every stage again in a clean clone of a revision, and compares all outs with the dvc.lock there."""
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
        close = False
        if golden:
            report.environment_differs = differences(golden["environment"], report.environment)
            other_bits_allowed = report.environment_differs or determinism == "off"
            close = bool(other_bits_allowed) and _metrics_agree(golden, read_metrics(clone.path), report)
        else:
            report.notes.append(
                "no golden file records the environment in which this dvc.lock was made; see `make golden`"
            )
        report.findings += _compare(expected, found, close)
        if found.get("train", {}).get("model") != model:
            try:
                report.notes += _where(root, clone, model, golden, list(run.records("step")))
            except Exception as error:  # a note must not hide the findings
                report.notes.append(f"where they diverge is unknown ({type(error).__name__}: {error})")
    return report


def _compare(expected: dict[str, dict[str, str]], found: dict[str, dict[str, str]], close: bool) -> list[Finding]:
    """Compares all artifacts of two dvc.locks. `close`: other bits are allowed, and the metrics agree."""
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
    """Where the trainings diverge, if this repository has records or weights of the expected one."""
    expected = divergence.journal_of(root, model) or (golden["steps"] if golden else [])
    with tempfile.TemporaryDirectory() as folder:
        weights = divergence.model_of(root, model, Path(folder))
        line = divergence.first_tensor(weights, clone.path / "model") if weights else "the expected ones are not here"
    return [f"training: {divergence.first_step(expected, steps)}", f"weights: {line}"]
