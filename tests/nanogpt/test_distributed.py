"""Two real processes over gloo, and the one that trains alone."""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from nanogpt import distributed
from nanogpt.distributed import PeerFailed, Ranks, join
from tests.nanogpt import tiny
from tracking.launch import launch

HEAD = """
import json, os, signal, sys, time, torch
torch.set_num_threads(1)
from nanogpt.distributed import join, synchronizing
from tracking.launch import run_to_exit
"""


def test_alone_everything_is_given_back_as_it_is():
    with join("cpu", {}) as ranks:
        model, tensors, error = tiny.gpt(), {"a": torch.ones(2)}, ValueError("mine")
        assert (ranks.first, ranks.size, list(ranks.share(3))) == (True, 1, [0, 1, 2])
        assert ranks.parallel(model, True) is model
        assert ranks.broadcast_tensors(tensors) is tensors
        assert ranks.cause(error) is error
        assert (ranks.mean([0.1, 0.2]), ranks.max(7), ranks.broadcast({"b": 1})) == ([0.1, 0.2], 7, {"b": 1})
    assert not torch.distributed.is_initialized()


def test_each_micro_batch_is_one_process_s():
    assert [list(Ranks(rank, 3).share(6)) for rank in range(3)] == [[0, 1], [2, 3], [4, 5]]


# What two processes do together; a process takes three seconds to import torch and DDP. Results are JSON.
TOGETHER = """
import psutil
from nanogpt import model
from tests.nanogpt import tiny

def told(ranks):
    alone = {"inf": float("inf"), "third": 1 / 3, "list": [None, True]} if ranks.first else None
    tensors = {
        "weights": torch.arange(6.0).reshape(2, 3).T, "step": torch.tensor(3.5), "none": torch.empty(0, 2),
        "half": torch.tensor([1.5, float("nan")], dtype=torch.bfloat16), "long": torch.tensor([2**62]),
    }
    got = ranks.broadcast_tensors(tensors if ranks.first else {})
    assert got.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert got[name].dtype == tensor.dtype and got[name].shape == tensor.shape
        assert torch.equal(got[name].nan_to_num(9.0), tensor.nan_to_num(9.0)), name
    received = [ranks.broadcast(alone), ranks.mean([0.1 + ranks.rank, -0.0]), ranks.max(5 * ranks.rank)]
    return [*received, ranks.broadcast(ranks.rank)]

def gradients(ranks):
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(model.weight)
    forward, seen = ranks.parallel(model, fixed_order=True), []
    for micro in (micros := ranks.share(4)):
        with synchronizing(forward, micro == micros[-1]):
            (forward(torch.tensor([[10.0**micro]])).sum() / len(micros)).backward()
        seen.append(model.weight.grad.item())
    return seen

def recomputed(ranks):
    tokens, found = torch.arange(8)[None], []
    for model.RECOMPUTED in (2**40, 0):
        gpt = tiny.gpt(std=0.2)
        forward = ranks.parallel(gpt, fixed_order=True)
        forward(tokens + ranks.rank, tokens).backward()
        found.append({name: parameter.grad for name, parameter in gpt.named_parameters()})
    return tiny.same(*found)

def listening(ranks):
    both = (psutil.Process(), psutil.Process().parent())
    return sorted({c.laddr.ip for p in both for c in p.net_connections("tcp") if c.status == psutil.CONN_LISTEN})

with join("cpu") as ranks:
    found = {each.__name__: each(ranks) for each in (told, gradients, recomputed, listening)}
    json.dump(found, open(f"{sys.argv[1]}/{ranks.rank}", "w"))
"""


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """What each of two processes that did all of TOGETHER found."""
    folder = tmp_path_factory.mktemp("together")
    assert launch(2, 0.0, "-c", HEAD + TOGETHER, str(folder)) == 0
    return [json.loads((folder / str(rank)).read_text()) for rank in (0, 1)]


def test_what_two_processes_tell_one_another(together):
    expected = [{"inf": float("inf"), "third": 1 / 3, "list": [None, True]}, [(0.1 + 1.1) / 2, 0.0], 5, 0]
    assert [found["told"] for found in together] == [expected] * 2


def test_gradients_are_the_mean_of_all_micro_batches_and_travel_with_the_last_one(together):
    first, second = (found["gradients"] for found in together)
    assert (first[0], second[0]) == (0.5, 50.0)  # each its own
    assert first[1] == second[1] == pytest.approx(1111 / 4)


def test_parallel_a_model_may_compute_activations_again(together):
    assert [found["recomputed"] for found in together] == [True, True]


def test_they_listen_to_this_machine_alone(together):
    assert [found["listening"] for found in together] == [["127.0.0.1"]] * 2


def two_in_one_process() -> list[Ranks]:
    store = torch.distributed.HashStore()
    return [Ranks(rank, 2, store) for rank in (0, 1)]


def test_of_an_error_that_tears_the_others_connection_only_the_first_is_told():
    first, second = two_in_one_process()
    own, torn = AssertionError("only 0"), RuntimeError("Connection closed by peer [127.0.0.1]:1")
    assert first.cause(own) is own
    found = second.cause(torn)
    assert (type(found), str(found)) == (PeerFailed, "process 0 of this training failed: AssertionError: only 0")


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_rank_0_reports_an_error_that_all_have(order):
    both, errors = two_in_one_process(), [ValueError("the same"), ValueError("the same")]
    with ThreadPoolExecutor() as threads:
        waiting = {}
        for rank in order:
            waiting[rank] = threads.submit(both[rank].cause, errors[rank])
            time.sleep(0.1)
    assert waiting[0].result() is errors[0]
    assert type(waiting[1].result()) is PeerFailed


def test_an_error_of_rank_0_ends_the_wait_for_its_broadcast():
    first, second = two_in_one_process()
    with ThreadPoolExecutor() as threads:
        waiting = threads.submit(second.broadcast, None)
        time.sleep(0.1)
        assert not waiting.done()
        first.cause(AssertionError("only 0"))
    assert type(waiting.exception()) is PeerFailed


def test_a_killed_process_is_reported_by_the_other(tmp_path):
    # The other may hear of it from the launcher first: while it trains it has a handler (tracking/stop.py).
    program = f"""
signal.signal(signal.SIGTERM, lambda *_: 0)

def main():
    try:
        with join("cpu") as ranks:
            ranks.max(0)
            ranks.rank and os.kill(os.getpid(), 9)
            ranks.max(0)
    except Exception as error:
        time.sleep(0.5)  # the launcher sees meanwhile that another process has ended, and sends SIGTERM
        open(f"{tmp_path}/{{ranks.rank}}", "w").write(f"{{type(error).__name__}}: {{error}}")
        sys.exit(1)

run_to_exit(main)
"""
    assert launch(2, 0.0, "-c", HEAD + program) == 137
    (told,) = tmp_path.iterdir()
    assert told.name == "0"
    assert told.read_text().startswith("PeerLost: a process of this training is gone")


def test_a_process_that_meets_nobody_gets_hints(monkeypatch):
    monkeypatch.setattr(distributed, "RENDEZVOUS", 0.5)
    environment = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    for name, value in {**environment, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}.items():
        monkeypatch.setenv(name, value)
    hints = (
        "MASTER_ADDR",
        "firewall",
        "GLOO_SOCKET_IFNAME",
        "NCCL_SOCKET_IFNAME",
        "NCCL_IB_DISABLE=1",
        "NCCL_P2P",
        "INFO",
    )
    with pytest.raises(ValueError, match=".*".join(hints)), join("cpu"):
        pass


def test_a_network_that_does_not_answer_gets_hints_too(monkeypatch):
    monkeypatch.setattr(distributed, "RENDEZVOUS", 0.2)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: time.sleep(3))
    with pytest.raises(ValueError, match=r"no answer in 0\.2 s.*NCCL_DEBUG=INFO"):
        distributed._connect(Ranks(0, 2, torch.distributed.HashStore()), torch.device("cpu"))
