"""What a training step in shards costs each process, found without the other processes and without computing anything.

torch's fake process group answers at once, and its fake tensors have shapes but no memory. Everything else is the real
thing: model, FSDP, loss, clipping and optimizer, as on a CPU.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from nanogpt import sharding
from nanogpt.determinism import Numerics
from nanogpt.distributed import Ranks
from nanogpt.gpt_config import GPTConfig
from nanogpt.model import GPT
from nanogpt.params import TrainParams
from nanogpt.train import clip_gradient
from nanogpt.train_state import TrainState, new_state

# torch's names of collectives, ours, and the position of the argument to which all processes contribute
COLLECTIVES = {
    "_allgather_base_": ("all_gather", 0),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "alltoall_base_": ("all_to_all", 1),
    "allreduce_": ("all_reduce", 0),
    "broadcast_": ("all_gather", 0),  # on CPUs, sharding.py gathers by one of each process
}


class Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors that a block creates or `see` is given: those alive (`bytes`) and their `peak`.

    `sent` maps each kind of collective to the bytes that a process sends for it, in a ring.
    """

    def __init__(self, size: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.size, self.bytes, self.peak, self.sent = size, 0, 0, dict[str, int]()
        self._known: dict[int, tuple[Any, int]] = {}  # by the storage's id: a weak reference to it and its bytes

    def __enter__(self) -> "Meter":
        from torch.distributed.tensor import DTensor

        self._asking, self._undo = False, ExitStack()
        propagator = DTensor._op_dispatcher.sharding_propagator
        self._replace(propagator, "_propagate_tensor_meta_non_cached", self._ask)  # DTensor asks an operator for shapes
        self._replace(UntypedStorage, "resize_", self._resize)  # FSDP drops weights and takes them back
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._undo.close()

    def _replace(self, owner: Any, name: str, function: Callable[..., Any]) -> None:
        """Passes the original to `function`, before its arguments, until the block ends."""
        original = getattr(owner, name)
        self._undo.callback(setattr, owner, name, original)
        setattr(owner, name, lambda *args: function(original, *args))

    def _ask(self, original: Callable[..., Any], *args: Any) -> Any:
        self._asking = True
        try:
            return original(*args)
        finally:
            self._asking = False

    def _resize(self, original: Callable[..., Any], storage: UntypedStorage, size: int) -> None:
        original(storage, size)
        if id(storage) in self._known:
            self.see(storage)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(hasattr(each, "full_tensor") for each in types):
            return NotImplemented  # what DTensor makes of it comes here again, for the shards
        result = func(*args, **(kwargs or {}))
        if not self._asking:
            for tensor in tree_iter(result):
                if isinstance(tensor, Tensor) and not sharding.is_shard(tensor):
                    self.see(tensor.untyped_storage())
            self._count(func.name().rpartition("::")[2].partition(".")[0], args)
        return result

    def _count(self, name: str, args: Any) -> None:
        if name in COLLECTIVES:
            kind, position = COLLECTIVES[name]
            everything = sum(t.nbytes for t in tree_iter(args[position]) if isinstance(t, Tensor))
            sent = everything * (self.size - 1) // self.size
            if kind == "all_reduce":
                sent *= 2  # to add up, and to spread the sums
            elif kind == "all_to_all" and (parts := args[4]):  # numbers for each process
                sent = everything * (sum(parts) - parts[dist.get_rank()]) // max(1, sum(parts))
            elif kind == "all_to_all":
                kind = "reduce_scatter"  # on CPUs, sharding.py takes that in pieces
            self.sent[kind] = self.sent.get(kind, 0) + sent

    def see(self, storage: UntypedStorage) -> None:
        """Counts the storage of a tensor, once, with the size that it has now."""
        key, size = id(storage), storage.nbytes()
        reference, before = self._known.get(key, (None, 0))
        self._known[key] = (reference or weakref.ref(storage, lambda _: self._forget(key)), size)
        self.bytes += size - before
        self.peak = max(self.peak, self.bytes)

    def _forget(self, key: int) -> None:
        self.bytes -= self._known.pop(key)[1]


def costs(config: GPTConfig, params: TrainParams, numerics: Numerics) -> dict[str, Any]:
    """Returns the bytes that one of params.processes holds, by part and at the peak, and sends in a sharded step."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    ranks = Ranks(0, params.processes)
    with _fake_group(ranks.size):
        ranks.mesh("cpu")  # which is not to be fake
        with FakeTensorMode(allow_non_fake_inputs=True):
            state = new_state(GPT(config, numerics.attention), params, numerics, ranks)
            state.optimizer.count_step = lambda _: 0  # type: ignore[attr-defined]  # a fake count has no value
            return measured(state, params, Meter(ranks.size))


def measured(state: TrainState, params: TrainParams, meter: Meter) -> dict[str, Any]:
    """Takes two steps, the second one with the optimizer's state; returns what that one costs this process."""
    weights = list(state.model.parameters())
    held = {"weights": sum(sharding.local(weight).nbytes for weight in weights)}
    for weight in weights:
        meter.see(sharding.local(weight).untyped_storage())
    with meter:
        for _ in range(2):
            meter.sent = {}
            gradients = step(state, params)
    entries = [tensor for entries in state.optimizer.state.values() for tensor in entries.values()]
    held |= {"gradients": gradients, "moments": sum(sharding.local(tensor).nbytes for tensor in entries)}
    return {**held, "peak": meter.peak, "sent": meter.sent}


def step(state: TrainState, params: TrainParams) -> int:
    """Takes a step as the loop does, on tokens of no meaning; returns the bytes of this process's gradients."""
    tokens = torch.zeros(params.batch_size, state.model.config.block_size, dtype=torch.int64, device=state.device)
    for _ in state.ranks.share(params.gradient_accumulation_steps):
        state.loss(tokens, tokens).backward()  # type: ignore[no-untyped-call]
    clip_gradient(state.model, params.grad_clip)
    state.optimizer.step()
    gradients = sum(sharding.local(p.grad).nbytes for p in state.model.parameters() if p.grad is not None)
    state.optimizer.zero_grad(set_to_none=True)
    return gradients


@contextmanager
def _fake_group(size: int) -> Iterator[None]:
    import torch.testing._internal.distributed.fake_pg  # noqa: F401  # registers it

    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("fake", store=store, rank=0, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()
