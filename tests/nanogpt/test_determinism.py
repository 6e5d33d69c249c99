import dataclasses
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from nanogpt import determinism
from nanogpt.params import NumericsParams


def settings(determinism="portable", threads=2):
    return NumericsParams(determinism=determinism, threads=threads, dtype="float32", compile=False, attention="fused")


# Large enough for two threads and for other instructions to sum in another order.
TRAINING = """
import hashlib, sys
from nanogpt import determinism
from nanogpt.params import NumericsParams
chosen = {"determinism": sys.argv[1], "threads": int(sys.argv[2])}
params = NumericsParams(**chosen, dtype="float32", compile=False, attention="fused")
resolved = determinism.pin(params, "auto")
import torch
from nanogpt.model import GPT
from nanogpt.optimizer import make_optimizer
from tests.nanogpt import tiny
torch.set_num_threads(resolved.threads)
weights = b""
for options, optimizer in ({}, "adamw"), (tiny.NANOCHAT, "muon"):
    torch.manual_seed(1)
    model = GPT(tiny.config(n_embd=64, block_size=64, vocab_size=65, **options))
    optimizer = make_optimizer(model, tiny.train_params(optimizer=optimizer, beta2=0.99), "cpu", "float32")
    for step in range(3):
        x = torch.randint(65, (16, 65), generator=torch.Generator().manual_seed(step))
        model(x[:, :-1], x[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    weights += b"".join(parameter.detach().numpy().tobytes() for parameter in model.parameters())
strict = torch.get_deterministic_debug_mode()  # 2: what is not deterministic is an error
tf32 = torch.backends.cuda.matmul.allow_tf32
print(hashlib.sha256(weights).hexdigest(), resolved.threads, resolved.instruction_set, resolved.device, strict, tf32)
"""

OLD_CPU = """
import sys
from nanogpt import determinism
from nanogpt.params import NumericsParams
params = NumericsParams(determinism=sys.argv[1], threads=1, dtype="float32", compile=False, attention="fused")
try:
    determinism.pin(params, "cpu")
except ValueError as error:
    sys.exit(print(error))
import torch
print(float(torch.ones(64, 64).mm(torch.ones(64, 64)).sum()))
"""

THREADS = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OMP_DYNAMIC": "true",
    "OMP_THREAD_LIMIT": "1",
    "MKL_DYNAMIC": "true",
    "MKL_DOMAIN_NUM_THREADS": "MKL_DOMAIN_BLAS=1",
}
INSTRUCTIONS = {
    "MKL_CBWR": "AVX512",
    "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    "ATEN_CPU_CAPABILITY": "default",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "DNNL_MAX_CPU_ISA": "SSE41",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1",
}
THREADS_AND_INSTRUCTIONS = THREADS | INSTRUCTIONS
OURS = {*THREADS_AND_INSTRUCTIONS, "OMP_MAX_ACTIVE_LEVELS", "OMP_NESTED"}


def bits(determinism="portable", threads=2, **environment):
    """The hash of a few training steps' weights, and what was resolved, in a new process."""
    clean = {name: value for name, value in os.environ.items() if name not in OURS}
    command = [sys.executable, "-c", TRAINING, determinism, str(threads)]
    done = subprocess.run(command, env=clean | environment, capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.fixture(scope="module")
def portable():
    return bits()


def test_portable_resolves_to_two_threads_of_avx2_on_the_cpu_and_deterministic_algorithms(portable):
    assert portable[1:] == ["2", "AVX2", "cpu", "2", "False"]


def test_what_the_caller_has_set_does_not_change_the_bits_of_portable(portable):
    assert bits(**THREADS_AND_INSTRUCTIONS) == portable
    # Without the pins the same variables do change them, or the line above would show nothing.
    assert bits("off", **THREADS_AND_INSTRUCTIONS)[0] != portable[0]


def test_nor_does_a_ban_on_parallel_regions(portable):
    # libgomp then runs one thread while torch says two.
    assert bits(OMP_MAX_ACTIVE_LEVELS="0") == portable


@pytest.mark.parametrize(
    ("variables", "expected"),
    [({}, determinism.SPINS), ({"GOMP_SPINCOUNT": "5"}, "5"), ({"OMP_WAIT_POLICY": "passive"}, None)],
)
def test_threads_that_wait_soon_sleep_unless_the_caller_says_how_they_wait(variables, expected, monkeypatch):
    monkeypatch.setattr(os, "environ", dict(variables))
    determinism._pin_environment("portable", 2)
    assert os.environ.get("GOMP_SPINCOUNT") == expected
    assert os.environ["OMP_NUM_THREADS"] == "2"


def test_the_number_of_threads_changes_the_bits_of_machine_alone(portable):
    assert bits(threads=1)[0] == portable[0]
    assert bits("machine", threads=1)[0] != bits("machine", threads=2)[0]


def test_without_a_number_there_is_a_thread_for_each_core_that_the_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)), raising=False)
    assert determinism.available_cores() == 6
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")  # of processes that share the machine
    assert determinism.available_cores() == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert determinism.available_cores() == 1


def test_the_number_of_threads_is_no_part_of_what_the_bits_of_portable_depend_on(keeps_threads):
    resolved = determinism.pin(settings("off", threads=1), "cpu")
    assert resolved.identity() == resolved.as_dict()
    two, three = (dataclasses.replace(resolved, determinism="portable", threads=threads) for threads in (2, 3))
    assert two.identity() == three.identity()
    assert two.as_dict() != three.as_dict()


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["portable", "machine"])
def test_it_must_come_before_torch(mode):
    assert "torch" in sys.modules
    with pytest.raises(RuntimeError, match="before the first import of torch"):
        determinism.pin(settings(mode), "cpu")


@pytest.mark.parametrize("machine", ["aarch64", "arm64"])
def test_portable_is_refused_on_arm_before_anything_is_pinned(machine, monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.delitem(sys.modules, "torch")
    before = dict(os.environ)
    with pytest.raises(ValueError, match=f"portable is for x86-64 CPUs, and this is {machine}; set it to machine"):
        determinism.pin(settings(), "cpu")
    assert dict(os.environ) == before


@pytest.mark.parametrize(
    ("has", "lacking"),
    [({"avx2": False, "fma3": False}, "AVX2 or FMA"), ({"avx2": True, "fma3": False}, "FMA"), ({"fma3": True}, "AVX2")],
)
def test_portable_is_refused_on_a_cpu_without_its_instructions_whatever_torch_was_made_to_report(
    has, lacking, monkeypatch
):
    monkeypatch.setattr(determinism, "sys", SimpleNamespace(modules={}))  # as if torch was not imported yet
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "x86_64", **has})
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    with pytest.raises(
        ValueError, match=f"= portable needs a CPU with AVX2 and FMA, and this one has no {lacking}; set"
    ):
        determinism.pin(settings(), "cpu")


@pytest.mark.skipif(shutil.which("qemu-x86_64") is None, reason="qemu-x86_64 (Debian: qemu-user) is not installed")
@pytest.mark.parametrize("cpu", ["SandyBridge", "Haswell,-fma"])
def test_an_older_cpu_refuses_portable_in_one_line_and_computes_under_the_mode_that_it_names(cpu):
    """Slow; only it catches what a real CPU does with instructions that it lacks: SIGILL in torch's kernels."""
    run = ["qemu-x86_64", "-cpu", cpu, sys.executable, "-c", OLD_CPU]
    refused, computed = (
        subprocess.run([*run, mode], capture_output=True, text=True, timeout=300) for mode in ("portable", "machine")
    )
    assert refused.returncode == 0, refused.stderr[-500:]
    assert "this one has no " in refused.stdout
    assert refused.stdout.endswith("; set it to machine\n")
    assert computed.stdout == "262144.0\n", computed.stderr[-500:]


@pytest.mark.parametrize("device", ["cuda", "cuda:3"])
def test_cuda_where_there_is_none(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(
        ValueError, match=rf"runtime\.device = {device}, but torch .* sees 0 CUDA.*set it to cpu or auto"
    ):
        determinism.pin(settings("off"), device)


def test_a_gpu_beyond_the_last_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=r"runtime\.device = cuda:2, but torch .* sees 2 CUDA"):
        determinism.pin(settings("off"), "cuda:2")


def test_an_apple_gpu_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"runtime\.device = mps.*set it to cpu or auto"):
        determinism.pin(settings("off"), "mps")


# --- what was resolved ------------------------------------------------------------------------------------------------


@pytest.fixture
def keeps_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_what_is_resolved_holds_all_that_the_bits_depend_on(keeps_threads, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    resolved = determinism.pin(settings("off", threads=1), "auto").as_dict()
    assert resolved == {
        "determinism": "off",
        "threads": 1,
        "dtype": "float32",
        "compile": False,
        "attention": "fused",
        "device": "cpu",
        "device_name": os.uname().machine,
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
    }


def test_autocast_acts_for_the_short_types_alone():
    x = torch.ones(2, 2)
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        with determinism.autocast(torch.device("cpu"), name):
            assert torch.mm(x, x).dtype is dtype


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system pins no process to a core")
def test_one_core_gives_the_bits_of_two(portable):
    mine = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(mine)})  # children inherit it
    try:
        assert bits() == portable
    finally:
        os.sched_setaffinity(0, mine)


@pytest.mark.parametrize("first", [0, 1])
def test_no_half_of_the_callers_variables_changes_the_bits(portable, first):
    # Of two that act on the same library, such as MKL_NUM_THREADS and MKL_DYNAMIC, one could hide what the other does.
    halves = [*list(THREADS.items())[first::2], *list(INSTRUCTIONS.items())[first::2]]
    assert bits(**dict(halves)) == portable


def test_every_knob_of_numerics_is_in_what_was_resolved():
    assert set(NumericsParams.model_fields) <= {field.name for field in dataclasses.fields(determinism.Numerics)}


@pytest.mark.parametrize(
    ("dtype", "has", "expected"),
    [
        ("bfloat16", {}, True),
        ("bfloat16", {"amx_bf16": True}, False),
        ("bfloat16", {"avx512_bf16": True}, False),
        ("bfloat16", {"avx512_fp16": True}, True),
        ("float16", {"avx512_fp16": True}, False),
        ("float16", {"avx512_bf16": True}, True),
        ("float32", {}, False),
        ("bfloat16", {"architecture": "aarch64"}, False),  # not known there, so nothing is said
    ],
)
def test_a_dtype_that_the_cpu_has_no_instructions_for_is_known(monkeypatch, dtype, has, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "x86_64", **has})
    assert determinism.is_emulated(dtype) is expected


def test_the_instructions_are_called_so_by_torch():
    known = torch.cpu.get_capabilities()
    assert (
        known["architecture"] != "x86_64"
        or {"amx_bf16", "avx512_bf16", "amx_fp16", "avx512_fp16", "avx2", "fma3"} <= known.keys()
    )
