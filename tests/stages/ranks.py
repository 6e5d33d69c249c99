"""The train stage as tests run it: `python -m tests.stages.ranks`, alone or as one of several processes.

MLflow is left out. Which samples each step has used goes to used-RANK.jsonl. DO="RANK STEP WHAT" has one process, in
the step of that number, get a signal (WHAT is its name), kill its launcher (launcher), or fail (WHAT is the error).
"""

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

from stages import train
from tracking import launch


def main() -> None:
    used = Path(f"used-{launch.rank()}.jsonl").open("a")  # noqa: SIM115
    real: list[Any] = []
    rank, at, what = os.environ.get("DO", "-1 0 -").split(" ", 2)

    def spy(tokens: Any, params: Any, block_size: int, step: int, micros: range, device: Any) -> Iterator[Any]:
        for number, batch in enumerate(real[0](tokens, params, block_size, step, micros, device)):
            yield batch
            # The loop asks for the next one when it has used this one.
            now, micro = step + number // len(micros), micros[number % len(micros)]
            samples = range(micro * params.batch_size, (micro + 1) * params.batch_size)
            used.write(json.dumps([now, list(samples)]) + "\n")
            used.flush()
            if (launch.rank(), now) == (int(rank), int(at)):
                if what == "launcher":
                    os.kill(os.getppid(), signal.SIGKILL)
                    time.sleep(1)  # tracking/stop.py looks every 0.2 s
                elif what.startswith("SIG"):
                    os.kill(os.getpid(), getattr(signal, what))
                else:
                    raise ValueError(what)

    def spy_on_batches() -> None:
        from nanogpt import recipe

        real.append(recipe.micro_batches)
        patch.object(recipe, "micro_batches", spy).start()

    with (
        patch("tracking.mlflow_process.start"),
        patch("tracking.mlflow_process.wait", return_value="MLflow is left out"),
        patch(
            "stages.train.launch",
            lambda processes, wait, *_: launch.launch(processes, wait, "-m", "tests.stages.ranks"),
        ),
        patch("nanogpt.determinism.pin", _pin_and(spy_on_batches)),
    ):
        train.main()


def _pin_and(then: Any) -> Any:
    """determinism.pin comes before torch is imported, and what follows needs torch."""
    from nanogpt.determinism import pin

    def pin_and_then(*arguments: Any) -> Any:
        resolved = pin(*arguments)
        then()
        return resolved

    return pin_and_then


if __name__ == "__main__":
    launch.run_to_exit(main)
