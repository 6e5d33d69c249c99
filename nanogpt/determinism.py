"""What the bits of a result depend on beside code, data and parameters, pinned before torch is first imported.

portable: the same bits on any x86-64 CPU with AVX2 and FMA, for any number of threads. The instruction set and
          deterministic algorithms are pinned, the kernels of portable.py take the place of torch's, and the known
          answers of known_answers.py are checked.
machine:  the same bits on the same kind of machine with the same number of threads: for GPUs, Arm, torch.compile and
          bfloat16. Threads and deterministic algorithms are pinned.
off:      the fastest; two runs may differ.
"""

import ctypes
import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from nanogpt.collector import collector_paused
from nanogpt.gpt_config import Attention
from nanogpt.params import NumericsParams

if TYPE_CHECKING:
    import torch


M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # of glibc's malloc.h


@dataclass(frozen=True)
class Numerics:
    """What was resolved; what the bits depend on is part of a run's fingerprint."""

    determinism: str
    threads: int
    dtype: str
    compile: bool
    attention: Attention
    device: str
    device_name: str
    instruction_set: str
    torch: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def identity(self) -> dict[str, Any]:
        """What the bits depend on; under portable, the number of threads is not part of it."""
        return {name: value for name, value in asdict(self).items() if name != "threads" or not self.is_portable}

    @property
    def is_portable(self) -> bool:
        return self.determinism == "portable"


def pin(params: NumericsParams, device: str) -> Numerics:
    """Pins the process, imports torch, and returns what was resolved. `device`: auto, cpu, cuda, cuda:N or mps.

    Raises ValueError where the mode or the device cannot be had here, and RuntimeError when torch was imported before.
    """
    threads = params.threads or available_cores()
    if params.determinism != "off":
        if "torch" in sys.modules:
            raise RuntimeError("determinism.pin must come before the first import of torch")
        _check_machine(params.determinism)
        _pin_environment(params.determinism, threads)
    _keep_freed_memory()
    with collector_paused():
        import torch

    if params.determinism == "portable":
        _check_instructions(torch.cpu.get_capabilities())
    resolved = _resolve_device(device, params.determinism)
    if resolved.index is not None:
        torch.cuda.set_device(resolved)  # so that "cuda" is that one
    if params.determinism != "off":
        if params.compile:
            torch.use_deterministic_algorithms(True)
        else:  # the same without torch.compile's own setting, whose import takes two seconds
            torch.set_deterministic_debug_mode("error")
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # no such memory is read
        torch.backends.cudnn.benchmark = False
        torch.backends.cuda.enable_mem_efficient_sdp(False)  # its backward is not deterministic
    instruction_set = torch.backends.cpu.get_cpu_capability()
    if params.determinism == "portable" and instruction_set != "AVX2":
        raise ValueError(
            f"numerics.determinism = portable needs a torch with kernels for AVX2, and this one has {instruction_set}; "
            "set it to machine"
        )
    if params.determinism == "portable":
        from nanogpt import known_answers, portable

        portable.install()
        torch.set_num_threads(1)  # the answers are those of any number, and the threads need not start for this
        known_answers.check()
    torch.set_num_threads(threads)
    name = torch.cuda.get_device_name(resolved) if resolved.type == "cuda" else platform.machine()
    return Numerics(
        determinism=params.determinism,
        threads=threads,
        dtype=params.dtype,
        compile=params.compile,
        attention=params.attention,
        device=resolved.type,
        device_name=name,
        instruction_set=instruction_set,
        torch=torch.__version__,
    )


def autocast(device: "torch.device", dtype: str) -> "torch.autocast":
    """The context in which the forward pass runs: mixed precision for bfloat16 and float16, nothing for float32."""
    import torch

    return torch.autocast(device.type, dtype=getattr(torch, dtype), enabled=dtype != "float32")


def is_emulated(dtype: str) -> bool:
    """Whether this x86-64 CPU multiplies matrices of that dtype without instructions for it: many times as slowly."""
    import torch

    instructions = {"bfloat16": ("avx512_bf16", "amx_bf16"), "float16": ("avx512_fp16", "amx_fp16")}
    has = torch.cpu.get_capabilities()
    return dtype in instructions and has["architecture"] == "x86_64" and not any(map(has.get, instructions[dtype]))


def _check_machine(determinism: str) -> None:
    if determinism == "portable" and platform.machine().lower() not in {"x86_64", "amd64"}:
        raise ValueError(
            f"numerics.determinism = portable is for x86-64 CPUs, and this is {platform.machine()}; set it to machine"
        )


def _check_instructions(has: Mapping[str, Any]) -> None:
    """`has` is what the CPU itself reports. torch's own choice echoes ATEN_CPU_CAPABILITY, whatever the CPU can do."""
    lacking = [name for name, key in (("AVX2", "avx2"), ("FMA", "fma3")) if not has.get(key)]
    if lacking:
        raise ValueError(
            "numerics.determinism = portable needs a CPU with AVX2 and FMA, and this one has no "
            f"{' or '.join(lacking)}; set it to machine"
        )


def available_cores() -> int:
    """Cores that this process may use: its share of the machine's where several processes train together."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def _keep_freed_memory() -> None:
    """Has glibc keep the memory that a step frees for the next step, instead of asking the kernel for it again.

    The kernel hands out each page anew, zeroed: a tenth of the time of a small model's step.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 2**25)
        libc.mallopt(M_TRIM_THRESHOLD, 2**30)
        libc.mallopt(M_TOP_PAD, 2**26)


def return_freed_memory() -> None:
    """Makes glibc return the memory of large freed tensors to the system from now on.

    Gathering and dropping weights would fragment the memory that glibc keeps, up to twice what sharded training needs.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for parameter in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD):
            libc.mallopt(parameter, 2**17)


# How often a thread of OpenMP looks whether the others are ready before it sleeps: for some 0.3 ms. OpenMP's default,
# 300,000, is as fast on an idle machine; beside another program the thread that is waited for does not run meanwhile.
SPINS = "10000"


def _pin_environment(determinism: str, threads: int) -> None:
    """Environment variables win over the caller's: read by OpenMP, MKL, oneDNN, ATen and cuBLAS when torch loads."""
    pinned = {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OMP_DYNAMIC": "FALSE",
        "MKL_DYNAMIC": "FALSE",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    }
    cleared = [
        "OMP_THREAD_LIMIT",
        "OMP_MAX_ACTIVE_LEVELS",
        "OMP_NESTED",
        "MKL_DOMAIN_NUM_THREADS",
        "MKL_ENABLE_INSTRUCTIONS",
        "DNNL_MAX_CPU_ISA",
        "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",  # NVIDIA's containers set it; float32 products then have 10 bits
        "NVIDIA_TF32_OVERRIDE",
    ]
    if determinism == "portable":
        pinned |= {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "COMPATIBLE"}
    else:
        cleared += ["ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_CBWR"]
    os.environ.update(pinned)
    for name in cleared:
        os.environ.pop(name, None)
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = SPINS


def _resolve_device(name: str, determinism: str) -> "torch.device":
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() and determinism != "portable" else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"runtime.device = {name}, but torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices; "
            "set it to cpu or auto, or install a CUDA build of torch (README.md)"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(
            f"runtime.device = mps, but torch {torch.__version__} sees no Apple GPU; set it to cpu or auto"
        )
    return device
