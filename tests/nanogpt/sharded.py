"""Trainings in shards, as test_sharding.py runs them: `python -m tests.nanogpt.sharded FOLDER` in each process."""

import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from nanogpt import portable, sharding
from nanogpt.batches import micro_batches
from nanogpt.checkpoint import Checkpoints, add_shards, restore_on_all_ranks
from nanogpt.distributed import Ranks, join
from nanogpt.dry_run import Meter, measured
from nanogpt.evaluate import Score, score, windows
from nanogpt.generate import Sampling, generate
from nanogpt.model import GPT
from nanogpt.params import TrainParams
from nanogpt.train import Observer, Stopped, train
from nanogpt.train_state import new_state
from tests.nanogpt import tiny
from tracking.launch import run_to_exit

STEPS, STOP = 6, 4
VOCABULARY = 9  # of four processes the last one has no row of it
TOKENS = tiny.tokens(200, vocab_size=VOCABULARY)
MODERN = {**tiny.NANOCHAT, "previous_tokens": 1, "ngrams": 2, "ngram_rows": 16, "zero_init": True}
TRAININGS: dict[str, dict[str, Any]] = {
    "bfloat16": {"optimizer": "adamw", "dtype": "bfloat16"},
    "float16": {"optimizer": "muon", "dtype": "float16"},
    "adamw": {"optimizer": "adamw", "dropout": 0.1},
    "muon": {"optimizer": "muon", "shape": MODERN},
}
PORTABLE = ("adamw", "muon")
LARGER = tiny.config(n_layer=3, n_head=4, n_embd=64, block_size=32, vocab_size=257)


class Training(Observer):
    """A training of a tiny GPT with two micro-batches of each of four processes in a step, scored every two steps."""

    def __init__(
        self,
        folder: Path,
        ranks: Ranks,
        optimizer: str,
        dtype: str = "float32",
        dropout: float = 0.0,
        shape: dict[str, Any] | None = None,
    ):
        steps = {"max_iters": STEPS, "eval_interval": 2, "gradient_accumulation_steps": 8, "batch_size": 1}
        settings = tiny.train_params(parallel="fsdp", processes=ranks.size, optimizer=optimizer, **steps)
        self.params = tiny.params(settings, log_interval=1, checkpoint_interval=STOP)
        model = tiny.gpt(dropout=dropout, vocab_size=VOCABULARY, **(shape or {}))
        self.state = new_state(model, settings, tiny.numerics(dtype=dtype, determinism="portable"), ranks)
        self.checkpoints = Checkpoints(folder, "run")
        self.values: list[list[float]] = []  # losses, norms, scores
        self.last = STEPS

    def to(self, step: int) -> "Training":
        self.last = step
        train_params = self.params.train
        micros = self.state.ranks.share(train_params.gradient_accumulation_steps)
        batches = micro_batches(TOKENS, train_params, 8, self.state.progress.step, micros, self.state.device)
        with suppress(Stopped):
            own = self.checkpoints if self.state.ranks.first else None
            train(self.state, batches, self.params, self.score, [self], own)
        self.state.ranks.max(0)  # until rank 0 has its last checkpoint in place
        return self

    def score(self, state: Any) -> tuple[Score, Score]:
        found = score(state.model, TOKENS, windows(50, 8, 8), 3, precision=state.precision)
        self.values.append([found.loss])
        return found, found

    def on_steps(self, state: Any, steps: Any) -> None:
        self.values += [[step.loss, step.grad_norm] for step in steps]

    def should_stop(self) -> str | None:
        return "reached" if self.state.progress.step >= self.last else None

    def shards(self) -> dict[str, torch.Tensor]:
        return {name: sharding.local(tensor).clone() for name, tensor in self.state.tensors().items()}


def resumed(folder: Path, ranks: Ranks, name: str, expected: dict[str, torch.Tensor]) -> bool:
    """Whether a training that begins with the checkpoint of step STOP has the same bits in the end."""
    again = Training(folder / name, ranks, **TRAININGS[name])
    restore_on_all_ranks(again.state, again.checkpoints.read(STOP) if ranks.first else None)
    assert again.state.progress.step == STOP
    return tiny.same(again.to(STEPS).shards(), expected)


def held(training: Training) -> dict[str, list[int]]:
    """The numbers that this process and a whole training hold: of weights, gradients and moments."""
    state, x = training.state, torch.from_numpy(TOKENS[:9].astype("int64"))[None]
    state.loss(x[:, :-1], x[:, 1:]).backward()
    weights = list(state.model.parameters())
    gradients = [p.grad for p in weights]
    moments = [t for entries in state.optimizer.state.values() for t in entries.values() if t.dim()]
    kinds = {"weights": weights, "gradients": gradients, "moments": moments}
    return {
        name: [sum(sharding.local(t).numel() for t in ts), sum(t.numel() for t in ts)] for name, ts in kinds.items()
    }


def generated(training: Training, folder: Path) -> list[list[list[int]]]:
    """Tokens of the model in shards, and of a whole one with the same weights."""
    whole = tiny.gpt(vocab_size=VOCABULARY, **MODERN)
    whole.load_state_dict(Checkpoints(folder, "run").read(STEPS).weights())
    return [[*generate(model, [1, 2, 3], 2, 12, Sampling())] for model in (training.state.model, whole)]


def owned(ranks: Ranks) -> list[Any]:
    """How many matrices this process computed, and whether all came back."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh, seen = init_device_mesh("cpu", (ranks.size,)), []
    matrices = [torch.arange(18.0).reshape(6, 3) + 100 * number for number in range(5)]

    def squared(stack: torch.Tensor) -> torch.Tensor:
        seen.append(len(stack))
        assert stack.shape[1:] == (6, 3)
        return (stack.cumsum(1) ** 2).mT.contiguous().mT

    found = sharding.by_owners([distribute_tensor(matrix, mesh, [Shard(0)]) for matrix in matrices], squared)
    expected = [distribute_tensor(squared(m[None])[0], mesh, [Shard(0)]).to_local() for m in matrices]
    return [seen[0], all(map(torch.equal, found, expected))]


def restored(training: Training, folder: Path, expected: dict[str, torch.Tensor]) -> list[bool]:
    """Whether a whole state has the tensors of a checkpoint in shards, and a state in shards those of a whole one."""
    ranks = training.state.ranks
    whole = Training(folder / "whole", Ranks(), **TRAININGS["muon"])
    Checkpoints(folder / "muon", "run").read(STEPS).restore(whole.state)
    tensors = {name: sharding.whole(tensor) for name, tensor in training.state.tensors().items()}
    same = tiny.same(whole.state.tensors(), tensors)
    if ranks.first:
        whole.checkpoints.save(whole.state, {})
    ranks.max(0)
    again = Training(folder / "again", ranks, **TRAININGS["muon"])
    restore_on_all_ranks(again.state, whole.checkpoints.read(STEPS) if ranks.first else None)
    return [same, tiny.same(again.shards(), expected)]


def larger(size: int, optimizer: str) -> TrainParams:
    several = {"processes": size, "gradient_accumulation_steps": 2 * size, "parallel": "fsdp"}
    return tiny.train_params(batch_size=2, optimizer=optimizer, **several)


def costs(ranks: Ranks, optimizer: str) -> dict[str, Any]:
    """What a real step of a larger model costs."""
    params = larger(ranks.size, optimizer)
    return measured(new_state(GPT(LARGER), params, tiny.numerics(), ranks), params, Meter(ranks.size))


def not_shared(training: Training, folder: Path) -> str:
    try:
        add_shards(training.state, folder / "elsewhere")
    except ValueError as error:
        return str(error)
    return ""


def main() -> None:
    folder = Path(sys.argv[1])
    with join("cpu") as ranks:
        found: dict[str, Any] = {"trained": {}, "resumed": {}}
        found["costs"] = {optimizer: costs(ranks, optimizer) for optimizer in ("adamw", "muon")}
        for name, settings in TRAININGS.items():
            if name in PORTABLE:
                portable.install()
            training = Training(folder / name, ranks, **settings).to(STEPS)
            found["trained"][name] = training.values
            if name in PORTABLE:
                shards = training.shards()
                found["resumed"][name] = resumed(folder, ranks, name, shards)
        found["generated"] = generated(training, folder / "muon")
        found["restored"] = restored(training, folder, shards)
        found["held"] = held(training)
        found["owned"] = owned(ranks)
        found["not shared"] = not_shared(training, folder)
        (folder / f"{ranks.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_to_exit(main)
