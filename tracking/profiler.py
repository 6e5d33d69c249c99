"""A trace of a few training steps, for chrome://tracing or ui.perfetto.dev; nothing of the result depends on it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.profiler import profile, schedule

from nanogpt.files import replacing

WARM_UP = 5  # steps before the traced ones: memory is allocated, code is compiled, the profiler itself gets ready

Stop = Callable[[], str | None]


@contextmanager
def profiled(stop: Stop, steps: int, path: Path, say: Callable[[str], None]) -> Iterator[Stop]:
    """Yields a `stop` for the training loop, which asks it before each step; after the warm-up, `steps` are traced.

    What happens between two questions is a step: an evaluation and a checkpoint too, where they fall on it. The trace
    is written to `path` (Chrome's JSON) as soon as the steps are done, or of fewer when the block ends before. With 0
    steps nothing is traced and `stop` itself is yielded.
    """
    if not steps:
        yield stop
        return

    def write(profiler: profile) -> None:
        if traced := profiler.step_num - 1 - WARM_UP:
            with replacing(path) as temporary:
                profiler.export_chrome_trace(str(temporary))
            say(f"{traced} steps traced, after {WARM_UP} for warm-up -> {path} (open it in ui.perfetto.dev)")

    # The question before the first step ends what the profiler calls its step 0, in which nothing is done yet.
    phases = schedule(wait=1, warmup=WARM_UP, active=steps, repeat=1)
    with profile(schedule=phases, on_trace_ready=write) as profiler:

        def next_step() -> str | None:
            profiler.step()
            return stop()

        yield next_step
    if profiler.step_num <= 1 + WARM_UP:
        say(f"no step was traced, as no more than the {WARM_UP} for warm-up were taken")
