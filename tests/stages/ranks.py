"""The train stage as tests run it: `python -m tests.stages.ranks`, alone or as one of several processes.

MLflow is left out. Which samples each step has used goes to used-RANK.jsonl. DO="RANK STEP WHAT" has one process, in
the step of that number, get a signal (WHAT is its name), kill its launcher (launcher), or fail (WHAT is the error).
"""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

from stages import launch, train


def main() -> None:
    used = Path(f"used-{launch.rank()}.jsonl").open("a")  # noqa: SIM115
    rank, at, what = os.environ.get("DO", "-1 0 -").split(" ", 2)

    def spy(tokens: Any, order: str, seed: int, step: int, per_step: int, samples: range, block_size: int) -> Any:
        from nanogpt.data import batch

        used.write(json.dumps([step, list(samples)]) + "\n")
        used.flush()
        if (launch.rank(), step) == (int(rank), int(at)):
            if what == "launcher":
                os.kill(os.getppid(), signal.SIGKILL)
                time.sleep(1)  # stages/stop.py looks every 0.2 s
            elif what.startswith("SIG"):
                os.kill(os.getpid(), getattr(signal, what))
            else:
                raise ValueError(what)
        return batch(tokens, order, seed, step, per_step, samples, block_size)

    with (
        patch("nanogpt.replicator.start"),
        patch("nanogpt.replicator.wait", return_value="MLflow is left out"),
        patch(
            "stages.train.launch",
            lambda processes, wait, *_: launch.launch(processes, wait, "-m", "tests.stages.ranks"),
        ),
        patch("nanogpt.numerics.pin", _pin_and(lambda: patch("nanogpt.train.batch", spy).start())),
    ):
        train.main()


def _pin_and(then: Any) -> Any:
    """numerics.pin comes before torch is imported, and what follows needs torch."""
    from nanogpt.numerics import pin

    def pin_and_then(*arguments: Any) -> Any:
        resolved = pin(*arguments)
        then()
        return resolved

    return pin_and_then


if __name__ == "__main__":
    main()
