"""The processes that share each training step: their group, DDP around the model, and what they tell one another.

torchrun or tracking/launch.py starts them, with RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and
MASTER_PORT in the environment. What lies on CPUs travels by gloo, what lies on GPUs by NCCL, and small values by the
store where the processes have met. Rank 0 alone reads and writes files of a run; nothing is pickled.
"""

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

MEETING = 120.0  # seconds in which all must have met and reached one another
_COLLECTIVE = 3600.0  # seconds, the longest that rank 0 may evaluate, write samples and save while others wait
_SAME_ERROR = 2.0  # seconds
_TICK = 0.02
_TORN = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused", "timed out")


class PeerFailed(ValueError):
    """Another process of this training has failed first, and tells the user; the message is its rank and its error."""


class Ranks:
    """All processes of a training, and which of them this is. A training alone (size 1) has no process group, and each
    method gives back what it is given."""

    def __init__(self, rank: int = 0, size: int = 1, store: Store | None = None):
        self.rank, self.size, self._store, self._told = rank, size, store, 0

    @property
    def store(self) -> Store:
        """Where the processes have met."""
        assert self._store is not None, "a training alone has no store"
        return self._store

    @property
    def first(self) -> bool:
        """Whether this is the process that reads and writes."""
        return self.rank == 0

    def share(self, micro_steps: int) -> range:
        """The micro-batches of a step that are this process's: the same ones in all, each in one."""
        assert micro_steps % self.size == 0, "params.py has checked that"
        number = micro_steps // self.size
        return range(self.rank * number, (self.rank + 1) * number)

    def parallel(self, module: nn.Module, fixed_order: bool) -> nn.Module:
        """`module` with gradients that are the mean over all processes, in each of them.

        `fixed_order`: the same bits from a resumed training too. After its first step DDP puts gradients into buckets
        anew, and with three processes or more the order in which a gradient's parts are added depends on its place in a
        bucket. It does not where it looks for parameters that are not used.
        """
        if self.size == 1:
            return module
        return DistributedDataParallel(module, find_unused_parameters=fixed_order)

    def mean(self, values: list[float]) -> list[float]:
        """The mean over all processes of each value; added in the order of the ranks, so always the same bits."""
        if self.size == 1:
            return values
        parts = [torch.zeros(len(values), dtype=torch.float64) for _ in range(self.size)]
        dist.all_gather(parts, torch.tensor(values, dtype=torch.float64))
        return [sum(each) / self.size for each in zip(*(part.tolist() for part in parts), strict=True)]

    def highest(self, value: int) -> int:
        """The highest value that any process has."""
        if self.size == 1:
            return value
        found = torch.tensor(value)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found.item())

    def tell(self, value: Any) -> Any:
        """Rank 0's value, which JSON can hold, in all processes. The others wait for it as long as it takes."""
        if self.size == 1:
            return value
        self._told += 1
        key = f"told/{self._told}"
        if self.first:
            self.store.set(key, json.dumps(value))
            return value
        self._wait_for(key)
        return json.loads(self.store.get(key))

    def tell_tensors(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rank 0's tensors, which lie on the CPU, in all processes: the same names, types, shapes and bytes."""
        if self.size == 1:
            return tensors
        index = {name: [str(x.dtype).removeprefix("torch."), list(x.shape)] for name, x in tensors.items()}
        received = {}
        for name, (dtype, shape) in self.tell(index).items():
            tensor = tensors[name].contiguous() if self.first else torch.empty(shape, dtype=getattr(torch, dtype))
            if tensor.numel():
                dist.broadcast(tensor.reshape(-1).view(torch.uint8), 0)  # a view: what arrives lies in `tensor`
            received[name] = tensor
        return received

    def cause(self, error: BaseException) -> BaseException:
        """The error to raise for `error`: itself, or PeerFailed if another process tells the user what is wrong.

        Where all have the same error, rank 0 tells it; else the process that had one first, since what others see of it
        is a torn connection.
        """
        if self.size == 1 or isinstance(error, PeerFailed | KeyboardInterrupt | SystemExit):
            return error
        text = " ".join(f"{type(error).__name__}: {error}".split())
        try:
            if self.first:
                self.store.set("error of rank 0", text)
            rank, _, first = self.store.compare_set("first error", "", f"{self.rank} {text}").decode().partition(" ")
            if int(rank) != self.rank and not (self.first and first == text):
                return PeerFailed(f"process {rank} of this training failed: {first}")
            if not self.first and self._has_rank_0(text):
                return PeerFailed(f"process 0 of this training failed: {text}")
        except RuntimeError:  # the store is gone with the process that kept it
            pass
        if isinstance(error, RuntimeError) and any(sign in text for sign in _TORN):
            return ValueError(
                "a process of this training is gone: killed, out of memory, or its machine cannot be reached; "
                "start the training again and it goes on"
            )
        return error

    def _has_rank_0(self, text: str) -> bool:
        """Whether rank 0 has the same error; it has it soon or not at all."""
        deadline = time.monotonic() + _SAME_ERROR
        while not self.store.check(["error of rank 0"]) and time.monotonic() < deadline:
            time.sleep(_TICK)
        return bool(self.store.check(["error of rank 0"]) and self.store.get("error of rank 0").decode() == text)

    def _wait_for(self, key: str) -> None:
        """Until rank 0 has set that key. Asks again and again, so that signals and another's failure are seen."""
        while not self.store.check([key]):
            if self.store.check(["first error"]):
                raise PeerFailed("another process of this training failed")
            time.sleep(_TICK)

    def part(self) -> None:
        """Waits until rank 0 has done all, and leaves: who started the processes may end all with the first."""
        with suppress(RuntimeError):  # rank 0 kept the store itself, and is gone
            if self.first:
                self.store.set("done", "")
            else:
                self._wait_for("done")
        dist.destroy_process_group()


def synchronizing(forward: Callable[..., Tensor] | None, last: bool) -> AbstractContextManager[None]:
    """For the forward and the backward pass of a micro-batch: gradients travel with the `last` one of a step alone."""
    if isinstance(forward, DistributedDataParallel) and not last:
        no_sync: AbstractContextManager[None] = forward.no_sync()
        return no_sync
    return nullcontext()


@contextmanager
def join(device_type: str, environment: Mapping[str, str] = os.environ) -> Iterator[Ranks]:
    """The processes of this training, which have met when the block begins; alone without WORLD_SIZE, or if that is 1.

    With `device_type` cuda each process of a machine has a GPU of its own, which becomes torch's current one. Raises
    ValueError with hints if they cannot reach one another. An error in the block comes out as `Ranks.cause` says; after
    any other end of it, SystemExit included, all processes part together.
    """
    if int(environment.get("WORLD_SIZE", 1)) == 1:
        yield Ranks()
        return
    if environment["LOCAL_WORLD_SIZE"] == environment["WORLD_SIZE"] and (loopback := _loopback()):
        # One machine: no other is to reach gloo, and nothing depends on whether this machine's name can be resolved.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
    ranks = _meet()
    try:
        _connect(ranks, _device(device_type, int(environment["LOCAL_RANK"])))
        yield ranks
    except SystemExit:
        ranks.part()
        raise
    except BaseException as error:
        # Who launched the processes ends all with the first, and this one is still to tell its error, and ends anyway.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        cause = ranks.cause(error)
        if cause is error:
            raise
        raise cause from error
    ranks.part()


def _meet() -> Ranks:
    try:
        store, rank, size = next(rendezvous("env://", timeout=timedelta(seconds=MEETING)))
    except (RuntimeError, ValueError) as error:
        raise ValueError(_unreachable(str(error))) from error
    return Ranks(rank, size, PrefixStore("nanogpt", store))


def _device(device_type: str, local_rank: int) -> torch.device:
    """This process's device: of GPUs, the one of its number on its machine."""
    if device_type != "cuda":
        return torch.device(device_type)
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"train.processes asks for more processes than this machine has GPUs ({torch.cuda.device_count()}); lower "
            "train.processes or use more machines (docs/gpus.md)"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def _connect(ranks: Ranks, device: torch.device) -> None:
    """Makes the process group and sends a number around, on CPUs and GPUs. Raises ValueError if it does not come back.

    In a thread, since NCCL has no limit of its own to how long it tries.
    """
    failed: list[BaseException] = []
    done = threading.Event()

    def send() -> None:
        try:
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            limit = timedelta(seconds=_COLLECTIVE)
            dist.init_process_group(backend, store=ranks.store, rank=ranks.rank, world_size=ranks.size, timeout=limit)
            for place in dict.fromkeys([torch.device("cpu"), device]):  # in the same order everywhere
                number = torch.ones((), device=place)
                dist.all_reduce(number)
                assert number.item() == ranks.size
        except BaseException as error:
            failed.append(error)
        done.set()

    threading.Thread(target=send, daemon=True).start()
    if not done.wait(MEETING):
        raise ValueError(_unreachable(f"no answer in {MEETING:g} s"))
    if failed:
        raise ValueError(_unreachable(str(failed[0]))) from failed[0]


def _unreachable(what: str) -> str:
    return (
        f"the processes of this training cannot reach one another ({' '.join(what.split())[:300]}): check MASTER_ADDR, "
        "MASTER_PORT and the firewall between the machines; name the network's interface by GLOO_SOCKET_IFNAME and "
        "NCCL_SOCKET_IFNAME; with GPUs try NCCL_IB_DISABLE=1 (no InfiniBand) or NCCL_P2P_DISABLE=1 (GPUs that cannot "
        "reach one another), and read what NCCL_DEBUG=INFO prints"
    )


def _loopback() -> str | None:
    """Name of the interface by which a machine reaches itself."""
    return next((name for _, name in socket.if_nameindex() if name.startswith("lo")), None)
