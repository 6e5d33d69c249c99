"""Trains some steps again, aside from everything: into a temporary directory that is gone afterwards."""

import contextlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tracking.console import Console
from tracking.journal import Journal, Record

if TYPE_CHECKING:
    from nanogpt.checkpoint import Checkpoint
    from nanogpt.determinism import Numerics
    from nanogpt.params import Params


class Retrace:
    """A training that repeats what one has done or would do, step by step, and leaves nothing behind.

    `numerics.pin` comes first. Begins at the checkpoint, or, if there is none, with the initial weights.
    """

    def __init__(
        self,
        console: Console,
        params: "Params",
        resolved: "Numerics",
        tokens: Path,
        fingerprint: str,
        checkpoint: "Checkpoint | None" = None,
    ):
        from nanogpt.corpus.token_files import SplitName, load_meta, load_split
        from nanogpt.corpus.tokenizer import load_tokenizer
        from nanogpt.distributed import Ranks
        from nanogpt.pretrained import load_initial
        from tracking.training import Training

        names: tuple[SplitName, ...] = ("train", "val")
        splits = {name: load_split(tokens, name) for name in names}
        tokenizer = load_tokenizer(tokens / "tokenizer.json", load_meta(tokens).tokenizer_sha256)
        initial = load_initial(params.train.init_from, params.model, tokenizer)
        self._folder = tempfile.TemporaryDirectory()
        attempt = Path(self._folder.name)
        self.journal = Journal(attempt / "journal.jsonl")
        self.training = Training(
            console,
            attempt,
            fingerprint,
            _quiet(params),
            resolved,
            tokens,
            splits,
            initial,
            self.journal,
            attempt / "loss.csv",
            Ranks(),
        )
        if checkpoint is not None:
            self.training.restore(checkpoint)
        self.first = self.training.progress.step

    def to(self, step: int) -> list[Record]:
        """Trains until so many steps are done; the records of all steps that were computed here."""
        from nanogpt.train import Stopped

        progress = self.training.progress
        reached: Callable[[], str | None] = lambda: "reached" if progress.step >= step else None  # noqa: E731
        if progress.step < step:
            progress.evaluated = progress.step  # it tells nothing of the steps
            with contextlib.suppress(Stopped):
                self.training.run(reached)
        return [record for record in self.journal.records() if record["kind"] == "step"]

    def __enter__(self) -> "Retrace":
        return self

    def __exit__(self, *error: object) -> None:
        self.journal.close()
        self._folder.cleanup()


def _quiet(params: "Params") -> "Params":
    """The same training without what is told and kept of it on the way."""
    never = params.train.max_iters
    return params.model_copy(
        update={
            "train": params.train.model_copy(update={"eval_interval": never, "patience": None}),
            "runtime": params.runtime.model_copy(update={"checkpoint_interval": never, "profile_steps": 0}),
            "tracking": params.tracking.model_copy(update={"prompts": []}),
        }
    )


def first_difference(expected: list[Record], found: list[Record]) -> tuple[int, str] | None:
    """The first step that both lists hold and the name of its first value that differs; None if all agree.

    Values are compared as the journal writes them, which is exact: equal means the same bits.
    """
    known = {record["step"]: record for record in expected}
    for record in found:
        other = known.get(record["step"], record)
        for name in ("loss", "grad_norm", "lr"):
            if repr(other.get(name)) != repr(record.get(name)):
                return int(record["step"]), name
    return None
