"""The small trainings of a ladder, as DVC experiments."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanogpt.params import Params, load_params, parse_assignments, with_values
from tools.command import check_name
from tools.trial import WITH_OVERRIDES, Side, obtain
from tracking.comparison import Result
from tracking.console import repository
from tracking.fingerprint import code_hash
from tracking.run_name import SEED

if TYPE_CHECKING:
    from nanogpt.dial import Rung


@dataclass(frozen=True)
class Grid:
    """Which trainings: each of the depths on each of the numbers of tokens, up to a limit of FLOPs."""

    depths: list[int] | None  # None: 1, 2 and 3 times that of params.yaml
    tokens: list[int] | None  # None: 1/2, 1 and 2 times those of params.yaml
    limit: float | None
    seeds: int


@dataclass
class Ladder:
    """Small trainings of one experiment."""

    name: str
    base: Params  # params.yaml with -S
    overrides: dict[str, Any]  # -S
    code: str  # hash of the code of the train stage
    vocab_size: int
    seeds: list[int]
    rungs: list["Rung"] = field(default_factory=list)
    runs: list[tuple["Rung", Result]] = field(default_factory=list)

    def rung(self, depth: int, tokens: float) -> "Rung":
        """A training of the dial."""
        from nanogpt.dial import rung

        return rung(self.base, depth, tokens, self.vocab_size)

    def side(self, rung: "Rung") -> Side:
        """The parameters and the code of a rung's runs, with the name of their experiments."""
        values = {**self.overrides, **rung.overrides}
        name = f"{self.name}-d{rung.depth}-{rung.tokens}"
        return Side(name, with_values(self.base, values, WITH_OVERRIDES), self.code, values)

    @property
    def largest(self) -> "Rung":
        return max(self.rungs, key=lambda rung: rung.flops)

    @property
    def floor(self) -> float | None:
        """The best possible loss on the validation text; None where it is unknown."""
        return self.runs[0][1].scores.get("floor")

    @property
    def train_tokens(self) -> int | None:
        """The size of the train split; None where it is unknown."""
        return (self.runs[0][1].profile.get("train") or {}).get("tokens")


def plan(root: Path, name: str, assignments: Sequence[str], grid: Grid) -> Ladder:
    """The trainings, checked. Raises ValueError for wrong parameters and for a grid that determines no law."""
    from nanogpt.scaling import check_determined
    from tools.size import known_meta, vocabulary

    check_name(name)
    overrides = parse_assignments(assignments)
    if SEED in overrides:
        raise ValueError(f"-S {SEED} is invalid: a ladder sets the seeds itself; --seeds says how many")
    base = with_values(load_params(root / "params.yaml"), overrides, WITH_OVERRIDES)
    meta = known_meta(base.tokenize) if base.tokenize.tokenizer == "char" else None
    first = base.train.seed
    seeds = [*range(first, first + grid.seeds)]
    ladder = Ladder(name, base, overrides, code_hash(root, "stages.train"), vocabulary(base.tokenize, meta), seeds)
    layers, train = base.model.n_layer or 1, base.train
    sequences = train.max_iters * train.batch_size * train.gradient_accumulation_steps
    own = sequences * (base.model.block_size or 1)
    for depth in grid.depths or [layers, 2 * layers, 3 * layers]:
        for tokens in grid.tokens or [own // 2, own, 2 * own]:
            rung = ladder.rung(depth, tokens)
            if grid.limit is None or rung.flops <= grid.limit:
                ladder.rungs.append(rung)
                ladder.side(rung)  # checks its parameters
    check_determined([(rung.parameters, rung.tokens) for rung in ladder.rungs])
    return ladder


def run(ladder: Ladder) -> Iterator[str]:
    """Trains what is missing, the cheapest first; yields a line for each run. Raises ValueError if one fails."""
    total = sum(rung.flops for rung in ladder.rungs) * len(ladder.seeds)
    yield f"{ladder.name}: {len(ladder.rungs)} trainings x {len(ladder.seeds)} seeds, {total:.2e} FLOPs"
    yield f"  {'depth':>5} {'parameters':>11} {'tokens':>11} {'FLOPs':>8}  {'seed':>5}  loss"
    root = repository()
    for seed in ladder.seeds:
        for rung in sorted(ladder.rungs, key=lambda rung: rung.flops):
            side = ladder.side(rung)
            is_new = side.find(root, seed) is None
            result = obtain(side, side.name, seed)
            ladder.runs.append((rung, result))
            yield (
                f"  {rung.depth:>5} {rung.parameters:>11,} {rung.tokens:>11,} {rung.flops:>8.1e}  {seed:>5}  "
                f"{result.scores['val_loss']:.4f}{'' if is_new else '  was there'}"
            )
