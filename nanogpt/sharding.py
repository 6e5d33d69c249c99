"""Training in shards by torch's FSDP2: each process keeps one part of every weight, gradient and moment.

A block's weights are gathered before it computes and dropped afterwards. Its gradients are averaged and divided at
once, after each micro-batch, so that no process ever has all of them. Embeddings, final norm and head are one more such
unit. Only calls of the model and of `token_losses` gather weights, and all processes must make the same calls. The
gradient of an embedding that is also the head is one tensor (tied_gradient.py).

Checkpoints are one safetensors file for each process, by the planner and the storage of torch.distributed.checkpoint.
Its `save` and `load` would pickle their plans to exchange them, which shards that are known from the mesh do not need.
torch imports its compiler for FSDP, so all imports of it are inside functions.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nanogpt.tied_gradient import TiedGradient

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

PIECE = 2**20  # numbers for each process that are sent at once


def shard(model: nn.Module, mesh: "DeviceMesh", dtype: str, compiled: bool = False) -> None:
    """Divides the weights of a GPT on the CPU among the processes of a mesh, and moves each part to its device.

    The weights of linear layers are gathered in `dtype`, that of matrix products, since autocast would round them too.
    Other weights and all gradients travel in float32. `compiled` compiles each block, but not the gathering of weights.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    policy = MixedPrecisionPolicy()
    if dtype != "float32":
        policy = MixedPrecisionPolicy(getattr(torch, dtype), torch.float32, cast_forward_inputs=False)
    blocks: Any = model.h
    for block in blocks:
        norms = [norm for norm in (block.ln_1, block.ln_2) if next(norm.parameters(), None) is not None]
        if norms and dtype != "float32":
            fully_shard(norms, mesh=mesh)
        fully_shard(block, mesh=mesh, mp_policy=policy)
        if compiled:
            block.forward = torch.compile(block.forward)
    if model.lm_head is None:
        model.tied_gradient = TiedGradient()
    fully_shard(model, mesh=mesh)
    if mesh.device_type == "cpu":
        for module in model.modules():
            if is_sharded(module):
                module.set_custom_reduce_scatter(_summing_in_pieces())  # type: ignore[operator]
                module.set_custom_all_gather(_gathering_in_place())  # type: ignore[operator]
    register_fsdp_forward_method(model, "token_losses")


def _summing_in_pieces() -> Any:
    """Returns a reduce-scatter for gloo, whose own one works on a copy of all gradients and sends them twice.

    The parts are added up in the order of the processes.
    """
    from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter

    class SumInPieces(ReduceScatter):
        def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
            return torch.empty(*size, dtype=dtype, device=device)

        def __call__(
            self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False
        ) -> None:
            parts = input_tensor.view(group.size(), -1).split(PIECE, 1)  # type: ignore[no-untyped-call]
            for part, total in zip(parts, output_tensor.split(PIECE), strict=True):  # type: ignore[no-untyped-call]
                received = torch.empty_like(part, memory_format=torch.contiguous_format)
                dist.all_to_all_single(received, part.contiguous(), group=group)
                torch.sum(received, 0, out=total)
            if op == dist.ReduceOp.AVG:
                output_tensor.div_(group.size())

    return SumInPieces()


def _gathering_in_place() -> Any:
    """Returns an all-gather for gloo, whose own one works on a copy of everything."""
    from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather

    class Broadcasts(AllGather):
        def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
            return torch.empty(*size, dtype=dtype, device=device)

        def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> None:
            for rank, part in enumerate(output_tensor.view(group.size(), -1)):
                if rank == group.rank() and not part.is_set_to(input_tensor.view(-1)):
                    part.copy_(input_tensor.view(-1))
                dist.broadcast(part, rank, group=group)

    return Broadcasts()


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` has divided the model."""
    return hasattr(model, "reshard")


def reshard(model: nn.Module) -> None:
    """Drops the weights that are still gathered after a forward pass without a backward pass."""
    if is_sharded(model):
        model.reshard()  # type: ignore[operator]


def is_shard(tensor: Tensor) -> bool:
    """Whether a tensor is divided among processes."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """Gathers a tensor that is in shards; all processes must call it. Returns any other tensor as it is."""
    return tensor.full_tensor() if is_shard(tensor) else tensor  # type: ignore[attr-defined]


def local(tensor: Tensor) -> Tensor:
    """This process's shard, which shares its memory; any other tensor as it is."""
    return tensor.to_local() if is_shard(tensor) else tensor  # type: ignore[attr-defined]


def by_owners(tensors: list[Tensor], function: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Applies `function` to each matrix whole, in one process; returns this process's shards of the results.

    The tensors are shards of matrices of one shape. Each matrix goes to one process, its owner, which calls `function`
    with a stack (N, rows, columns) of all that it owns and sends the parts of the results back. So every matrix is
    computed once, and less is sent than if every process gathered all matrices.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    rows, columns = tensors[0].shape
    rows_of = [max(0, min(-(-rows // size), rows - other * -(-rows // size))) for other in range(size)]  # torch.chunk's
    order = [number for owner in range(size) for number in range(owner, len(tensors), size)]
    owned = [len(range(owner, len(tensors), size)) for owner in range(size)]
    sent = [number * rows_of[rank] * columns for number in owned]
    received = [owned[rank] * other * columns for other in rows_of]
    parts = _exchange([local(tensors[number]) for number in order], sent, received)
    matrices = torch.cat([part.view(owned[rank], n, columns) for part, n in zip(parts, rows_of, strict=True)], 1)
    if owned[rank]:
        matrices = function(matrices)
    returned = torch.cat(_exchange(list(matrices.split(rows_of, 1)), received, sent))  # type: ignore[no-untyped-call]
    results = returned.view(len(tensors), rows_of[rank], columns)
    return [shard for _, shard in sorted(zip(order, results, strict=True), key=lambda pair: pair[0])]


def _exchange(tensors: list[Tensor], sent: list[int], received: list[int]) -> tuple[Tensor, ...]:
    """Sends the numbers of the tensors in order, `sent` of them to each process; returns what each one has sent."""
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    result = flat.new_empty(sum(received))
    dist.all_to_all_single(result, flat, received, sent)
    return result.split(received)  # type: ignore[no-any-return, no-untyped-call]


# --- checkpoints ------------------------------------------------------------------------------------------------------


def save_shards(tensors: Mapping[str, Tensor], directory: Path) -> None:
    """Writes this process's shards to a file in the directory, and process 0 what all have in common."""
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.tensor import DTensor

    rank = dist.get_rank()
    own = {name: tensor for name, tensor in tensors.items() if rank == 0 or isinstance(tensor, DTensor)}
    planner, writer = DefaultSavePlanner(), HuggingFaceStorageWriter(str(directory), save_distributed=True)
    planner.set_up_planner(own, is_coordinator=rank == 0)
    plan = replace(planner.create_local_plan(), storage_data={"shard_index": rank + 1})
    writer.write_data(planner.finish_plan(plan), planner).wait()


def load_shards(directory: Path, parameters: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """Returns the tensors in the directory whose names begin with `prefix`.

    A tensor with the shape of the parameter in its name is sharded like that parameter, and this process reads only its
    shard. Without parameters, all are whole and on the CPU. Any number of processes may have written them.
    """
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    planner, reader = DefaultLoadPlanner(), HuggingFaceStorageReader(str(directory))
    metadata = reader.read_metadata()
    tensors: dict[str, Tensor] = {}
    for name, found in metadata.state_dict_metadata.items():
        assert isinstance(found, TensorStorageMetadata)  # the only kind in safetensors
        parameter = parameters.get(name.split("/")[1])
        if parameter is not None and parameter.shape == found.size:
            tensors[name] = torch.empty_like(parameter.detach())
        elif name.startswith(prefix):
            tensors[name] = torch.empty(found.size, dtype=found.properties.dtype)
    planner.set_up_planner(tensors, metadata, is_coordinator=True)
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    reader.read_data(planner.finish_plan(planner.create_local_plan()), planner).wait()
    return tensors
