"""What a training in shards takes of each process, beside one process alone, and beside `tools size --parallel fsdp`.

Real processes on this machine take steps of GPT-2. Held are their weights, gradients and moments. The peak is what a
process grows by after its imports, once the model is built, by the kernel's count: it includes activations, gathered
weights, the collectives' buffers and what the allocator keeps. Of several processes it is the largest.
Wire is what a process sent in a step through the loopback interface, with what else used it
meanwhile: `unshare --net` gives the benchmark one of its own. The predictions come from a dry run in one more process.
"""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import click
import psutil

from benchmarks.checkout import AS_NANOGPT
from benchmarks.common import benchmark, call, forget_peak, own_peak, row
from nanogpt.params import Params, load_params, with_values
from tracking.launch import launch

GPT2 = {"n_layer": 12, "n_head": 12, "n_embd": 768, "bias": True, "dropout": 0.0, "zero_init": False}
COLUMNS = ("held MB", "of one", "peak MB", "of one", "predicted", "ratio", "wire MB", "predicted")
STEPS = 4  # that `trained` takes


@benchmark
@click.option("--processes", default="1,2,4", show_default=True, help="Numbers of processes; the first one must be 1.")
@click.option("--block-size", type=click.IntRange(1), default=256, show_default=True, help="Tokens of a sequence.")
@click.option("--layers", type=click.IntRange(1), default=12, show_default=True)
@click.option("--channels", type=click.IntRange(64), default=768, show_default=True, help="A multiple of 64.")
@click.option("--vocab-size", type=click.IntRange(1), default=50_257, show_default=True)
@click.option("--optimizer", type=click.Choice(["adamw", "muon"]), default="adamw", show_default=True)
def main(processes: str, vocab_size: int, **options: Any) -> list[dict[str, Any]]:
    """Compares the memory and the communication of a process with one process's, and with the dry run's."""
    click.echo(row("processes", *COLUMNS, width=10))
    rows: list[dict[str, Any]] = []
    for size in map(int, processes.split(",")):
        arguments = {"size": size, "vocab_size": vocab_size, **options}
        predicted, _ = call(predict, **arguments)
        found = {"processes": size, **measure(arguments), "predicted": predicted}
        rows.append(found)
        held, peak = (found[name] / rows[0][name] for name in ("held", "peak"))
        figures = [found["held"] / 1e6, held, found["peak"] / 1e6, peak, predicted["peak"] / 1e6]
        sent = [found["wire"] / 1e6, sum(predicted["sent"].values()) / 1e6]
        click.echo(row(size, *figures, predicted["peak"] / found["peak"], *sent, width=10))
    return rows


def measure(arguments: dict[str, Any]) -> dict[str, Any]:
    """Returns the largest figures of the processes of a real training."""
    with tempfile.TemporaryDirectory() as folder:
        before = loopback_bytes()
        given = json.dumps({**arguments, "folder": folder})
        code = launch(
            arguments["size"],
            0.0,
            "-c",
            f"import json; from benchmarks.sharding import trained; trained(**json.loads({given!r}))",
        )
        wire = loopback_bytes() - before
        if code:
            raise click.ClickException(f"the training of {arguments['size']} processes exited with {code}")
        found = [json.loads(path.read_text()) for path in Path(folder).iterdir()]
    return {name: max(one[name] for one in found) for name in ("held", "peak")} | {
        "sent": found[0]["sent"],
        "wire": wire / arguments["size"] / STEPS,
    }


def settings(size: int, block_size: int, layers: int, channels: int, optimizer: str) -> Params:
    shape = GPT2 | {"n_layer": layers, "n_embd": channels, "n_head": channels // 64, "block_size": block_size}
    train: dict[str, Any] = {
        "processes": size,
        "gradient_accumulation_steps": 2 * size,
        "batch_size": 1,
        "parallel": "fsdp",
    }
    train |= {"optimizer": optimizer, "grad_clip": 1.0}
    values: dict[str, Any] = {f"model.{name}": value for name, value in shape.items()}
    values |= {f"train.{name}": value for name, value in train.items()}
    numerics = {"numerics.determinism": "off", "numerics.threads": 1}
    return with_values(load_params(), AS_NANOGPT | {"model.zero_init": False} | values | numerics)


def predict(size: int, vocab_size: int, **options: Any) -> dict[str, Any]:
    """Returns what `tools size` says: of several processes by a dry run."""
    from nanogpt import determinism

    params = settings(size, **options)
    numerics = determinism.pin(params.numerics, "cpu")
    from nanogpt import dry_run, sizing
    from nanogpt.gpt_config import GPTConfig

    config = GPTConfig(vocab_size=vocab_size, **params.model.model_dump())
    if size > 1:
        return dry_run.costs(config, params.train, numerics)
    setup = sizing.Setup(1, accumulates=True)
    return {"peak": sizing.peak_bytes(config, setup), "sent": {}}


def trained(folder: str, size: int, vocab_size: int, **options: Any) -> None:
    """Trains as one of the processes, and writes its figures into the folder."""
    from nanogpt import determinism

    params = settings(size, **options)
    numerics = determinism.pin(params.numerics, "cpu")
    import torch.distributed.fsdp
    import torch.distributed.tensor  # noqa: F401
    from torch import _dynamo  # noqa: F401  # what FSDP imports at its first step

    from nanogpt import dry_run
    from nanogpt.distributed import join
    from nanogpt.gpt_config import GPTConfig
    from nanogpt.model import GPT
    from nanogpt.train_state import new_state

    config = GPTConfig(vocab_size=vocab_size, **params.model.model_dump())
    with join("cpu") as ranks:
        before = resident()
        if size > 1:  # as Recipe.new_state
            determinism.return_freed_memory()
        state = new_state(GPT(config), params.train, numerics, ranks)
        forget_peak()
        for _ in range(2):
            dry_run.step(state, params.train)
        peak = own_peak() - before
        found = dry_run.measured(state, params.train, dry_run.Meter(size))
    held = sum(found[name] for name in ("weights", "gradients", "moments"))
    figures = {"held": held, "peak": peak, "sent": found["sent"], "tensors": found["peak"]}
    (Path(folder) / f"{ranks.rank}.json").write_text(json.dumps(figures))


def loopback_bytes() -> int:
    """Bytes that this machine has sent to itself."""
    return sum(nic.bytes_sent for name, nic in psutil.net_io_counters(pernic=True).items() if name.startswith("lo"))


def resident() -> int:
    """This process's memory in bytes, now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
