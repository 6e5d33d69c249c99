"""What a ladder predicts, and the grade of the prediction once the larger training has run."""

import json
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from nanogpt.files import sha256_json, write_json, write_text
from nanogpt.params import Params, Section, flatten, load_params, with_values
from tools.ladder_picture import picture
from tools.ladder_run import Ladder
from tools.trial import SECTIONS, WITH_OVERRIDES, Side, obtain
from tracking.comparison import Result
from tracking.console import Console, repository
from tracking.fingerprint import code_hash
from tracking.git import GitError, git_bytes
from tracking.report import report

if TYPE_CHECKING:
    from nanogpt.dial import Rung
    from nanogpt.scaling import Fit, Law

FOLDER = Path("experiments/ladders")
DEEPEST = 8  # times the deepest rung, for the prediction
BUDGETS = (1, 8, 64, 512)  # of the table of optimal sizes, in multiples of the largest rung


def prediction_path(name: str) -> Path:
    """The file of a ladder's law and prediction, to be committed."""
    return FOLDER / f"{name}.json"


# --- the prediction


def predict(ladder: Ladder, compute: float) -> dict[str, Any]:
    """Fits the law and writes it with the prediction and a picture. Raises ValueError, OSError."""
    from nanogpt.scaling import Point, fit

    fitted = fit([Point(r.parameters, r.tokens, found.scores["val_loss"]) for r, found in ladder.runs])
    budget = compute * ladder.largest.flops
    rung = best(ladder, fitted.law, budget)
    side = ladder.side(rung)
    low, high = fitted.prediction(rung.parameters, rung.tokens)
    constants = asdict(fitted.law)
    found = {
        "name": ladder.name,
        "law": constants,
        "intervals": {constant: fitted.interval(constant) for constant in constants},
        "best_possible": ladder.floor,
        "train_tokens": ladder.train_tokens,
        "runs": [row(rung, result) for rung, result in ladder.runs],
        "optimal": optimal(ladder, fitted),
        "target": {
            "experiment": side.name,
            "compute": compute,
            "depth": rung.depth,
            "parameters": rung.parameters,
            "tokens": rung.tokens,
            "flops": rung.flops,
            "seeds": ladder.seeds,
            "overrides": side.overrides,
            "identity": identity(side),
        },
        "prediction": {"loss": fitted.law.loss(rung.parameters, rung.tokens), "low": low, "high": high},
    }
    path = prediction_path(ladder.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, found)
    write_text(path.with_suffix(".svg"), picture(found))
    written: dict[str, Any] = json.loads(path.read_bytes())
    return written


def best(ladder: Ladder, law: "Law", flops: float) -> "Rung":
    """The training of the dial with the lowest loss that the law gives for so many FLOPs.

    It takes no text twice if there is such a training, since the law is of tokens that are new.
    """
    depths = range(1, DEEPEST * max(rung.depth for rung in ladder.rungs) + 1)
    each = {depth: (rung := ladder.rung(depth, 1e6)).flops / rung.tokens for depth in depths}  # FLOPs per token
    rungs = [ladder.rung(depth, flops / per_token) for depth, per_token in each.items()]
    fresh = [rung for rung in rungs if rung.tokens <= (ladder.train_tokens or rung.tokens)]
    return min(fresh or rungs, key=lambda rung: law.loss(rung.parameters, rung.tokens))


def row(rung: "Rung", result: Result) -> dict[str, Any]:
    """A run of the ladder, as JSON."""
    return {
        "depth": rung.depth,
        "parameters": rung.parameters,
        "tokens": rung.tokens,
        "flops": rung.flops,
        "seed": result.seed,
        "loss": result.scores["val_loss"],
        "seconds": result.seconds,
        "model": result.model,
    }


def optimal(ladder: Ladder, fitted: "Fit") -> list[dict[str, float]]:
    """Parameters and tokens of the lowest loss for multiples of the largest rung's FLOPs."""
    largest, rows = ladder.largest, []
    for multiple in BUDGETS:
        flops = multiple * largest.flops
        parameters, tokens = fitted.law.optimum(flops, largest.flops / (largest.parameters * largest.tokens))
        rows.append({"flops": flops, "parameters": parameters, "tokens": tokens})
        rows[-1] |= {"tokens_per_parameter": tokens / parameters, "loss": fitted.law.loss(parameters, tokens)}
    return rows


def identity(side: Side) -> str:
    """A hash of what the target is trained with, besides its seed."""
    return sha256_json([side.code, *(flatten(getattr(side.params, section)) for section in (*SECTIONS, "evaluate"))])


# --- the grade


def grade(name: str, say: Callable[[str], None]) -> dict[str, Any]:
    """Trains the target of a committed prediction unless it has been, and grades the prediction.

    Raises ValueError if the prediction was not committed before the training began.
    """
    root, path = repository(), prediction_path(name)
    found = committed_prediction(root, path)
    target, predicted = found["target"], found["prediction"]
    params = with_values(load_params(root / "params.yaml"), target["overrides"], WITH_OVERRIDES)
    side = Side(target["experiment"], params, code_hash(root, "stages.train"), target["overrides"])
    if identity(side) != target["identity"]:
        raise ValueError(
            f"params.yaml or the code of the train stage is not what {path} was made with; `git checkout` the commit "
            f"that added it (`git log -1 {path}`), or repeat the command without --grade"
        )
    losses = []
    for seed in target["seeds"]:
        if side.find(root, seed) is None:
            say(f"training {side.name}-{seed}: depth {target['depth']}, {target['flops']:.1e} FLOPs")
        result = obtain(side, side.name, seed)
        check_order(root, path, result)
        losses.append(result.scores["val_loss"])
    loss = fmean(losses)
    held = {
        "name": name,
        "prediction": predicted,
        "losses": losses,
        "loss": loss,
        "difference": loss - predicted["loss"],
        "holds": predicted["low"] <= loss <= predicted["high"],
        "best_possible": found["best_possible"],
        "fitted_floor": found["law"]["floor"],
        "model": result.model,
    }
    write_json(root / path.with_name(f"{name}-grade.json"), held)
    drawn = picture(found, loss)
    write_text(root / path.with_suffix(".svg"), drawn)
    send(held, drawn, params)
    return held


class Predicted(Section):
    """The tags of the graded run in MLflow."""

    name: str
    predicted: float
    low: float
    high: float


def send(held: dict[str, Any], drawn: str, params: Params) -> None:
    """Adds the grade and the ladder's picture to the graded run in MLflow; a server that fails costs a warning."""
    predicted = held["prediction"]
    tags = Predicted(name=held["name"], predicted=predicted["loss"], low=predicted["low"], high=predicted["high"])
    metrics = {key: held[key] for key in ("loss", "difference")}
    with redirect_stdout(sys.stderr):  # stdout is for the grade
        report(Console("ladder"), params.tracking, held["model"], tags, metrics, {"ladder.svg": drawn})


def committed_prediction(root: Path, path: Path) -> dict[str, Any]:
    """The prediction, which is the one in HEAD. Raises ValueError."""
    name = path.stem
    if not (root / path).exists():
        raise ValueError(f"{path} is missing: `python -m tools ladder --name {name}` makes the prediction to grade")
    content = (root / path).read_bytes()
    if content_at(root, "HEAD", path) != content:
        raise ValueError(f"{path} is not committed: `git add {path}` and `git commit` come before the larger training")
    found: dict[str, Any] = json.loads(content)
    return found


def check_order(root: Path, path: Path, result: Result) -> None:
    """Raises ValueError unless the prediction was in the commit at which the run was started."""
    commit = result.tags.get("git.commit", "none")
    if content_at(root, commit, path) != (root / path).read_bytes():
        raise ValueError(
            f"{result.name} was started at commit {commit[:7]}, which lacks this {path}: its loss may have been known "
            "when the prediction was committed; predict another training (--compute, --seeds)"
        )


def content_at(root: Path, commit: str, path: Path) -> bytes | None:
    """The content of a file in a commit; None if it is not there."""
    try:
        return git_bytes(root, "show", f"{commit}:./{path}")
    except GitError:
        return None
