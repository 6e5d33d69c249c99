"""Data-parallel training: the process group, DDP around the model, and what the processes exchange.

torchrun or tracking/launch.py starts the processes, with RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR
and MASTER_PORT in the environment. Tensors on CPUs travel by gloo, tensors on GPUs by NCCL, and small values through
the rendezvous store. Only rank 0 reads and writes the files of a run. Nothing is pickled.
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
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

RENDEZVOUS = 120.0  # seconds within which all processes must have connected
_COLLECTIVE = 3600.0  # seconds that others wait for rank 0 to evaluate, write samples and save
_SAME_ERROR = 2.0  # seconds to wait for rank 0 to report the same error
_POLL = 0.02  # seconds
_CLOSED = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused", "timed out")


class PeerFailed(ValueError):
    """Another process of this training failed first and reports it. The message has its rank and its error."""


class PeerLost(ValueError):
    """Another process of this training is gone without having failed: this one did nothing wrong."""

    exit_code = os.EX_TEMPFAIL  # of this process: the same command, started again, continues


class Ranks:
    """The processes of a training, and the rank of this one. A single process has no process group, and each method
    returns what it is given."""

    def __init__(self, rank: int = 0, size: int = 1, store: Store | None = None):
        self.rank, self.size, self._store, self._broadcasts = rank, size, store, 0
        self._mesh: DeviceMesh | None = None

    @property
    def store(self) -> Store:
        """The rendezvous store."""
        assert self._store is not None, "a single process has no store"
        return self._store

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which reads and writes the files."""
        return self.rank == 0

    def share(self, micro_steps: int) -> range:
        """Returns which micro-batches of a step this process takes. Each belongs to exactly one process."""
        assert micro_steps % self.size == 0, "params.py checks this"
        number = micro_steps // self.size
        return range(self.rank * number, (self.rank + 1) * number)

    def parallel(self, module: nn.Module, fixed_order: bool) -> nn.Module:
        """Wraps `module` so that its gradients are averaged over all processes.

        `fixed_order` gives a resumed training the same bits. After its first step DDP rearranges its buckets of
        gradients, and with three processes or more the order of an addition depends on the place in a bucket. DDP does
        not rearrange them when it looks for unused parameters.
        """
        if self.size == 1:
            return module
        return DistributedDataParallel(module, find_unused_parameters=fixed_order)

    def mesh(self, device_type: str) -> "DeviceMesh":
        """Returns all processes and their devices, for training in shards (sharding.py)."""
        from torch.distributed.device_mesh import init_device_mesh

        self._mesh = self._mesh or init_device_mesh(device_type, (self.size,))
        return self._mesh

    def mean(self, values: list[float]) -> list[float]:
        """Averages each value over all processes, added in the order of the ranks so that the bits never change."""
        if self.size == 1:
            return values
        parts = [torch.zeros(len(values), dtype=torch.float64) for _ in range(self.size)]
        dist.all_gather(parts, torch.tensor(values, dtype=torch.float64))
        return [sum(each) / self.size for each in zip(*(part.tolist() for part in parts), strict=True)]

    def max(self, value: int) -> int:
        """Returns the largest value of all processes."""
        if self.size == 1:
            return value
        found = torch.tensor(value)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found.item())

    def broadcast(self, value: Any) -> Any:
        """Returns rank 0's value, which must be JSON, in all processes. The others wait for it without limit."""
        if self.size == 1:
            return value
        self._broadcasts += 1
        key = f"broadcast/{self._broadcasts}"
        if self.first:
            self.store.set(key, json.dumps(value))
            return value
        self._wait_for(key)
        return json.loads(self.store.get(key))

    def broadcast_tensors(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns rank 0's tensors, which are on the CPU, in all processes, with names, dtypes, shapes and bytes."""
        if self.size == 1:
            return tensors
        index = {name: [str(x.dtype).removeprefix("torch."), list(x.shape)] for name, x in tensors.items()}
        received = {}
        for name, (dtype, shape) in self.broadcast(index).items():
            tensor = tensors[name].contiguous() if self.first else torch.empty(shape, dtype=getattr(torch, dtype))
            if tensor.numel():
                dist.broadcast(tensor.reshape(-1).view(torch.uint8), 0)  # a view of `tensor`, which receives the bytes
            received[name] = tensor
        return received

    def cause(self, error: BaseException) -> BaseException:
        """Returns the error to raise for `error`: itself, or PeerFailed if another process reports what is wrong.

        An error that all processes share is reported by rank 0. Otherwise the process that failed first reports its
        own, since all that the others see of it is a closed connection.
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
            if not self.first and self._rank_0_reports(text):
                return PeerFailed(f"process 0 of this training failed: {text}")
        except RuntimeError:  # the process that hosted the store is gone
            pass
        if isinstance(error, RuntimeError) and any(sign in text for sign in _CLOSED):
            return PeerLost(
                "a process of this training is gone: killed, out of memory, or on a machine that cannot be reached; "
                "start the training again, and it continues"
            )
        return error

    def _rank_0_reports(self, text: str) -> bool:
        """Whether rank 0 has the same error, which it reports soon or not at all."""
        deadline = time.monotonic() + _SAME_ERROR
        while not self.store.check(["error of rank 0"]) and time.monotonic() < deadline:
            time.sleep(_POLL)
        return bool(self.store.check(["error of rank 0"]) and self.store.get("error of rank 0").decode() == text)

    def _wait_for(self, key: str) -> None:
        """Polls until rank 0 has set the key, so that signals and the failure of another process are noticed."""
        while not self.store.check([key]):
            if self.store.check(["first error"]):
                raise PeerFailed("another process of this training failed")
            time.sleep(_POLL)

    def leave(self) -> None:
        """Waits until rank 0 has finished, since a launcher may end all processes when the first one exits."""
        with suppress(RuntimeError):  # rank 0 hosted the store and is gone
            if self.first:
                self.store.set("done", "")
            else:
                self._wait_for("done")
        dist.destroy_process_group()


def synchronizing(forward: Callable[..., Tensor] | None, last: bool) -> AbstractContextManager[None]:
    """Context of the forward and backward pass of a micro-batch: only the `last` one of a step exchanges gradients."""
    if isinstance(forward, DistributedDataParallel) and not last:
        no_sync: AbstractContextManager[None] = forward.no_sync()
        return no_sync
    return nullcontext()


@contextmanager
def join(device_type: str, environment: Mapping[str, str] = os.environ) -> Iterator[Ranks]:
    """Connects the processes of this training for the duration of the block. Without WORLD_SIZE there is only this one.

    With `device_type` cuda each process of a machine gets its own GPU, which becomes torch's current device. Raises
    ValueError with hints if the processes cannot reach one another. An error in the block is replaced as `Ranks.cause`
    says; after any other end, SystemExit included, the processes leave together.
    """
    if int(environment.get("WORLD_SIZE", 1)) == 1:
        yield Ranks()
        return
    if environment["LOCAL_WORLD_SIZE"] == environment["WORLD_SIZE"] and (loopback := _loopback()):
        # On one machine gloo need not be reachable from others, nor this machine's name be resolvable.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
    ranks = _rendezvous()
    try:
        _connect(ranks, _device(device_type, int(environment["LOCAL_RANK"])))
        yield ranks
    except SystemExit:
        ranks.leave()
        raise
    except BaseException as error:
        # The launcher ends all processes when the first one fails; this one still has to report its error, then exits.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        cause = ranks.cause(error)
        if cause is error:
            raise
        raise cause from error
    ranks.leave()


def _rendezvous() -> Ranks:
    try:
        store, rank, size = next(rendezvous("env://", timeout=timedelta(seconds=RENDEZVOUS)))
    except (RuntimeError, ValueError) as error:
        raise ValueError(_unreachable(str(error))) from error
    return Ranks(rank, size, PrefixStore("nanogpt", store))


def _device(device_type: str, local_rank: int) -> torch.device:
    """Returns this process's device; among GPUs, the one with its local rank."""
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
    """Creates the process group and tests it by an all-reduce on CPUs and GPUs. Raises ValueError if that fails.

    Runs in a thread, because NCCL tries without a time limit.
    """
    failed: list[BaseException] = []
    done = threading.Event()

    def send() -> None:
        try:
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            limit = timedelta(seconds=_COLLECTIVE)
            dist.init_process_group(backend, store=ranks.store, rank=ranks.rank, world_size=ranks.size, timeout=limit)
            for place in dict.fromkeys([torch.device("cpu"), device]):  # in the same order on all ranks
                number = torch.ones((), device=place)
                dist.all_reduce(number)
                assert number.item() == ranks.size
        except BaseException as error:
            failed.append(error)
        done.set()

    threading.Thread(target=send, daemon=True).start()
    if not done.wait(RENDEZVOUS):
        raise ValueError(_unreachable(f"no answer in {RENDEZVOUS:g} s"))
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
    """Returns the name of the loopback interface."""
    return next((name for _, name in socket.if_nameindex() if name.startswith("lo")), None)
