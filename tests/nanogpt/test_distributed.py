"""Two real processes over gloo, and the one that trains alone."""

import json
import time

import pytest
import torch

from nanogpt import distributed
from nanogpt.distributed import Ranks, join
from tests.nanogpt import tiny
from tracking.launch import launch

HEAD = """
import json, os, signal, sys, time, torch
torch.set_num_threads(1)
from nanogpt.distributed import PeerFailed, join, synchronizing
from tracking.launch import run_to_exit
"""


def two(program: str, expected: int = 0) -> None:
    assert launch(2, 0.0, "-c", HEAD + program) == expected


def test_alone_everything_is_given_back_as_it_is():
    with join("cpu", {}) as ranks:
        model, tensors, error = tiny.gpt(), {"a": torch.ones(2)}, ValueError("mine")
        assert (ranks.first, ranks.size, list(ranks.share(3))) == (True, 1, [0, 1, 2])
        assert ranks.parallel(model, True) is model
        assert ranks.tell_tensors(tensors) is tensors
        assert ranks.cause(error) is error
        assert (ranks.mean([0.1, 0.2]), ranks.highest(7), ranks.tell({"b": 1})) == ([0.1, 0.2], 7, {"b": 1})
    assert not torch.distributed.is_initialized()


def test_each_micro_batch_is_one_process_s():
    assert [list(Ranks(rank, 3).share(6)) for rank in range(3)] == [[0, 1], [2, 3], [4, 5]]


def test_what_two_processes_tell_one_another(tmp_path):
    two(f"""
with join("cpu") as ranks:
    alone = {{"inf": float("inf"), "third": 1 / 3, "list": [None, True]}} if ranks.first else None
    tensors = {{
        "weights": torch.arange(6.0).reshape(2, 3).T, "step": torch.tensor(3.5), "none": torch.empty(0, 2),
        "half": torch.tensor([1.5, float("nan")], dtype=torch.bfloat16), "long": torch.tensor([2**62]),
    }}
    got = ranks.tell_tensors(tensors if ranks.first else {{}})
    assert got.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert got[name].dtype == tensor.dtype and got[name].shape == tensor.shape
        assert torch.equal(got[name].nan_to_num(9.0), tensor.nan_to_num(9.0)), name
    said = [ranks.tell(alone), ranks.mean([0.1 + ranks.rank, -0.0]), ranks.highest(5 * ranks.rank)]
    json.dump([*said, ranks.tell(ranks.rank)], open(f"{tmp_path}/{{ranks.rank}}", "w"))
""")
    expected = [{"inf": float("inf"), "third": 1 / 3, "list": [None, True]}, [(0.1 + 1.1) / 2, 0.0], 5, 0]
    assert [json.loads((tmp_path / str(rank)).read_text()) for rank in (0, 1)] == [expected] * 2


def test_gradients_are_the_mean_of_all_micro_batches_and_travel_with_the_last_one(tmp_path):
    two(f"""
with join("cpu") as ranks:
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(model.weight)
    forward, seen = ranks.parallel(model, fixed_order=True), []
    for micro in (micros := ranks.share(4)):
        with synchronizing(forward, micro == micros[-1]):
            (forward(torch.tensor([[10.0**micro]])).sum() / len(micros)).backward()
        seen.append(model.weight.grad.item())
    json.dump(seen, open(f"{tmp_path}/{{ranks.rank}}", "w"))
""")
    first, second = (json.loads((tmp_path / str(rank)).read_text()) for rank in (0, 1))
    assert (first[0], second[0]) == (0.5, 50.0)  # each its own
    assert first[1] == second[1] == pytest.approx(1111 / 4)


def test_parallel_a_model_may_compute_activations_again(tmp_path):
    two(f"""
from nanogpt import model
from tests.nanogpt import tiny

tokens = torch.arange(8)[None]
with join("cpu") as ranks:
    found = []
    for model.RECOMPUTED in (2**40, 0):
        gpt = tiny.gpt(std=0.2)
        forward = ranks.parallel(gpt, fixed_order=True)
        forward(tokens + ranks.rank, tokens).backward()
        found.append({{name: parameter.grad for name, parameter in gpt.named_parameters()}})
    json.dump(tiny.same(*found), open(f"{tmp_path}/{{ranks.rank}}", "w"))
""")
    assert [json.loads((tmp_path / str(rank)).read_text()) for rank in (0, 1)] == [True, True]


FAILURES = {  # what a process does, the exit code, and which processes tell the user
    "all have the same error": ('raise ValueError("the same")', 1, {0: "ValueError: the same"}),
    "rank 0 has one": ('assert ranks.rank, "only 0"', 1, {0: "AssertionError: only 0"}),
    "rank 1 has one": ('assert ranks.first, "only 1"', 1, {1: "AssertionError: only 1"}),
    "rank 0 has one while rank 1 waits for what it tells": (
        'assert ranks.rank, "only 0"; ranks.tell(0)',
        1,
        {0: "AssertionError: only 0"},
    ),
    "rank 1 is killed": (
        # The other may hear of it from the launcher first: while it trains it has a handler (tracking/stop.py).
        "signal.signal(signal.SIGTERM, lambda *_: 0); ranks.highest(0); ranks.rank and os.kill(os.getpid(), 9)",
        137,
        {0: "ValueError: a process of this training is gone"},
    ),
}


@pytest.mark.parametrize("what", FAILURES)
def test_a_failure_ends_all_and_one_process_tells_it(what, tmp_path):
    does, code, told = FAILURES[what]
    two(
        f"""
def main():
    try:
        with join("cpu") as ranks:
            ranks.highest(0)
            {does}
            ranks.highest(0)
    except PeerFailed:
        sys.exit(1)
    except Exception as error:
        time.sleep(0.5)  # the launcher sees meanwhile that another process has ended, and sends SIGTERM
        open(f"{tmp_path}/{{ranks.rank}}", "w").write(f"{{type(error).__name__}}: {{error}}")
        sys.exit(1)

run_to_exit(main)
""",
        code,
    )
    found = {int(path.name): path.read_text() for path in tmp_path.iterdir()}
    assert found.keys() == told.keys()
    assert all(found[rank].startswith(text) for rank, text in told.items())


def test_a_process_that_meets_nobody_gets_hints(monkeypatch):
    monkeypatch.setattr(distributed, "MEETING", 0.5)
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
    monkeypatch.setattr(distributed, "MEETING", 0.2)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: time.sleep(3))
    with pytest.raises(ValueError, match=r"no answer in 0\.2 s.*NCCL_DEBUG=INFO"):
        distributed._connect(Ranks(0, 2, torch.distributed.HashStore()), torch.device("cpu"))
