"""What the bits of a result depend on beside code, data and parameters, pinned before torch is first imported.

portable: the same bits on any x86-64 CPU with AVX2 and FMA, whatever its number of cores. Threads, instruction set
          and deterministic algorithms are pinned. Across vendors Intel promises MKL's results for
          MKL_CBWR=COMPATIBLE only.
machine:  the same bits on the same kind of machine. Threads and deterministic algorithms are pinned.
off:      the fastest; two runs may differ.
"""

import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from nanogpt.gpt_config import Attention
from nanogpt.params import NumericsParams

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Numerics:
    """What was resolved; part of a run's fingerprint."""

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


def pin(params: NumericsParams, device: str) -> Numerics:
    """Pins the process, imports torch, and tells what was resolved. `device`: auto, cpu, cuda, cuda:N or mps.

    Raises ValueError where the mode or the device cannot be had here, and RuntimeError when torch was imported before.
    """
    if params.determinism != "off":
        if "torch" in sys.modules:
            raise RuntimeError("determinism.pin must come before the first import of torch")
        _check_machine(params.determinism)
        _pin_environment(params)
    import torch

    if params.determinism == "portable":
        _check_instructions(torch.cpu.get_capabilities())
    resolved = _resolve_device(device, params.determinism)
    if resolved.index is not None:
        torch.cuda.set_device(resolved)  # so that "cuda" is that one
    torch.set_num_threads(params.threads)
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
    name = torch.cuda.get_device_name(resolved) if resolved.type == "cuda" else platform.machine()
    return Numerics(
        determinism=params.determinism,
        threads=params.threads,
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


def _pin_environment(params: NumericsParams) -> None:
    """Environment variables win over the caller's: read by OpenMP, MKL, oneDNN, ATen and cuBLAS when torch loads."""
    threads = str(params.threads)
    pinned = {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
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
    if params.determinism == "portable":
        pinned |= {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "COMPATIBLE"}
    else:
        cleared += ["ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_CBWR"]
    os.environ.update(pinned)
    for name in cleared:
        os.environ.pop(name, None)


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
