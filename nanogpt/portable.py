"""The kernels of `portable`: the same bits on any x86-64 CPU with AVX2 and FMA, for any number of threads.

torch multiplies matrices by a library that takes another path on each CPU, and a few of its kernels divide their work
among threads so that the number of threads shows in the last bits. `install` replaces those kernels in torch's
dispatcher, for the whole process: layers, gradients, optimizers, evaluation and generation all go through this module,
and the model stays as it is. The signatures are those of the operators that they replace. `portable_products.py` has
the products of matrices.

Shapes: B batch, H heads, T queries, S keys, D head size, G products of one shape (B * H).
"""

import functools
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import Library, get_kernel

from nanogpt.portable_products import PART, addmm, addmm_, baddbmm, bmm, grouped_product, linear, mm

QUERIES = 128  # queries per block of attention; keys after the block are skipped
SCORES = 2**19  # attention scores held at once: 2 MiB, so that they stay in the cache
GRAIN = 32768  # elements per thread when torch splits elementwise work and sums
UNDIVIDED = 16384  # elements up to which torch splits nothing, GELU included
LANES = 16  # floats per iteration of torch's AVX2 loops; leftover elements are computed one at a time
# Other forms of a product, and the square root, whose bits in MKL differ between CPUs.
UNDEFINED = (
    *("mm.out", "addmm.out", "bmm.out", "baddbmm.out", "baddbmm_", "addmv", "addmv_", "addmv.out", "dot", "vdot"),
    *("sqrt", "sqrt_", "sqrt.out"),
)

Kernel = Callable[..., Any]


def install() -> None:
    """Replaces torch's kernels for the CPU in this process. Calling it again changes nothing."""
    _library()


def installed() -> bool:
    """Whether the kernels are replaced in this process."""
    return _library.cache_info().currsize > 0


@functools.cache
def _library() -> Library:
    """The registrations, which last as long as this object."""
    library = Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    kernels: dict[str, Kernel] = {
        "mm": mm,
        "addmm": addmm,
        "addmm_": addmm_,
        "bmm": bmm,
        "baddbmm": baddbmm,
        "_scaled_dot_product_flash_attention_for_cpu": attention,
        "_scaled_dot_product_flash_attention_for_cpu_backward": attention_backward,
        "_softmax_backward_data": softmax_backward,
        "native_layer_norm_backward": functools.partial(
            layer_norm_backward, _torch_kernel("native_layer_norm_backward")
        ),
        "gelu": functools.partial(gelu, _torch_kernel("gelu.out")),
        "gelu_backward": functools.partial(gelu_backward, _torch_kernel("gelu_backward.grad_input")),
        "sum": total,
        "mean": mean,
    }
    kernels |= {name: functools.partial(_undefined, name) for name in UNDEFINED}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Warning only once for all operators")  # of replacing them
        for name, kernel in kernels.items():
            library.impl(name, kernel, "CPU")  # type: ignore[no-untyped-call]
    return library


def _torch_kernel(name: str) -> Kernel:
    """torch's own kernel for the CPU."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    return functools.partial(get_kernel(f"aten::{name}", "CPU").call_boxed, keys)


def _undefined(name: str, *args: Any, **kwargs: Any) -> None:
    raise NotImplementedError(
        f"torch's {name} is not the same on every CPU, and nanogpt/portable.py has no kernel for it"
    )


# Attention


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """q (B, H, T, D), k and v (B, H, S, D) -> weighted values (B, H, T, D), and log2 of the weights' sums (B, H, T).

    As in FlashAttention (Dao et al. 2022), values are divided by the sum at the end, and the scores are computed again
    for the gradients. Weights are powers of 2, which take a quarter of the time of torch's exp.
    """
    assert dropout_p == 0, "torch takes other kernels for dropout"
    assert attn_mask is None, "and for masks"
    B, H, T, D = q.shape
    S = k.size(2)
    q = _by_position(q) * _log2_scale(D, scale)  # (T, G, D)
    if T == 1 and not is_causal and H > 1 and H * D <= PART:
        return _generating(q, k, v)
    k = k.reshape(B * H, S, D)
    v = _transposed(_by_position(v))  # (G, D, S)
    out, log_sum = torch.empty_like(q), q.new_empty(T, B * H, 1)
    for group in _slices(B * H, max(1, SCORES // (QUERIES * S))):
        for rows in _slices(T, QUERIES):
            seen = rows.stop if is_causal else S
            mask = _mask(rows.stop - rows.start, q.device) if is_causal else None
            found = _block(q[rows, group], k[group, :seen], v[group, :, :seen], mask)
            out[rows, group], log_sum[rows, group] = found
    return _by_head(out, B), log_sum.view(T, B, H).permute(1, 2, 0)


def _generating(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """`attention` of one scaled query (1, G, D) to all keys: the numbers of `_block` in less time.

    The heads of a sample are taken in one product, each with zeros in place of the other heads' channels, which add
    nothing to a chain. Keys are padded, as oneDNN compiles a kernel for each number of them.
    """
    B, H, S, D = k.shape
    more = -S % LANES
    k, v = (F.pad(x.transpose(1, 2), (0, 0, 0, 0, 0, more)).flatten(2) for x in (k, v))  # (B, S + more, H * D)
    q = torch.diag_embed(q.view(B, H, D).mT, dim1=1, dim2=2).flatten(2)  # (B, H, H * D)
    scores = torch.cat([linear(a, b) for a, b in zip(q.unbind(), k.unbind(), strict=True)])  # (G, S + more)
    scores.narrow(1, S, more).fill_(-torch.inf)  # weights of 0
    largest = scores.amax(-1, keepdim=True)
    weights = _exp2_(scores.sub_(largest))
    sums = weights.narrow(1, 0, S).sum(-1, keepdim=True)
    both = zip(weights.view(B, H, -1).unbind(), v.unbind(), strict=True)
    values = torch.cat([linear(a, b.t()) for a, b in both]).view(B, H, H, D)
    out = values.diagonal(dim1=1, dim2=2).mT / sums.view(B, H, 1)
    return out.view(B, H, 1, D), sums.log2().add_(largest).view(B, H, 1)


def _block(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """q (t, G, D), k (G, S, D), v (G, D, S) -> weighted values (t, G, D) and log2 of the sums (t, G, 1).

    `mask` (t, t) is added to the scores of the last t keys.
    """
    scores = grouped_product(q, k)  # (t, G, S)
    if mask is not None:
        scores[:, :, -mask.size(1) :] += mask[:, None]
    largest = scores.amax(-1, keepdim=True)
    weights = _exp2_(scores.sub_(largest))
    sums = weights.sum(-1, keepdim=True)
    return grouped_product(weights, v).div_(sums), sums.log2().add_(largest)


def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_sum: Tensor,
    dropout_p: float,
    is_causal: bool,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v. Those of k and v are sums over blocks of QUERIES, added in order.

    The scores are computed with keys first, (S, G, T). Two of the three products by them then need no transposed copy
    of a tensor as large as the scores.
    """
    B, H, T, D = q.shape
    S = k.size(2)
    dot = (grad * out).sum(-1).reshape(B * H, T)
    log_sum = log_sum.reshape(B * H, T)
    q, k, v, grad = _by_position(q) * _log2_scale(D, scale), _by_position(k), _by_position(v), _by_position(grad)
    q_channels, k_channels, grad_channels = _transposed(q), _transposed(k), _transposed(grad)  # (G, D, T)
    dq, dk, dv = torch.empty_like(q_channels), torch.zeros_like(k), torch.zeros_like(v)
    for group in _slices(B * H, max(1, SCORES // (QUERIES * S))):
        for rows in _slices(T, QUERIES):
            seen = rows.stop if is_causal else S
            scores = grouped_product(k[:seen, group], q[rows, group].transpose(0, 1))  # (seen, G, t)
            if is_causal:
                scores[rows] += _mask(scores.size(2), q.device).t()[:, None]
            weights = _exp2_(scores.sub_(log_sum[group, rows]))
            dscores = grouped_product(v[:seen, group], grad[rows, group].transpose(0, 1))
            dscores.sub_(dot[group, rows]).mul_(weights)
            dv[:seen, group] += grouped_product(weights, grad_channels[group, :, rows])
            dk[:seen, group] += grouped_product(dscores, q_channels[group, :, rows])
            dq_rows = grouped_product(k_channels[group, :, :seen].transpose(0, 1), _transposed(dscores))  # (D, G, t)
            dq[group, :, rows] = dq_rows.transpose(0, 1)
    dq = dq.view(-1, T).t().contiguous().view(T, B * H, D)
    return _by_head(dq.mul_(_scale(D, scale)), B), _by_head(dk.mul_(math.log(2)), B), _by_head(dv, B)


def _scale(head_size: int, scale: float | None) -> float:
    return 1 / math.sqrt(head_size) if scale is None else scale


def _log2_scale(head_size: int, scale: float | None) -> float:
    """The scale of scores whose powers of 2 are wanted instead of those of e."""
    return _scale(head_size, scale) / math.log(2)


def _by_position(x: Tensor) -> Tensor:
    """(B, H, T, D) -> (T, B * H, D); a view where no copy is needed."""
    return x.permute(2, 0, 1, 3).reshape(x.size(2), -1, x.size(3))


def _by_head(x: Tensor, batch: int) -> Tensor:
    """(T, B * H, D) -> (B, H, T, D), a view."""
    return x.view(x.size(0), batch, -1, x.size(2)).permute(1, 2, 0, 3)


def _transposed(x: Tensor) -> Tensor:
    """(T, G, D) -> (G, D, T), contiguous, by way of a matrix: torch transposes those several times as fast."""
    return x.reshape(x.size(0), -1).t().contiguous().view(x.size(1), x.size(2), -1)


def _slices(size: int, length: int) -> Iterator[slice]:
    return (slice(start, min(start + length, size)) for start in range(0, size, length))


def _mask(size: int, device: torch.device) -> Tensor:
    """(size, size) to add to the scores of queries and keys at the same positions: -inf where the key comes later."""
    return torch.full((size, size), -torch.inf, device=device).triu_(1)


def _exp2_(x: Tensor) -> Tensor:
    _by_vectors(lambda x, result: torch.exp2(x, out=result), x, result=x)
    return x


# What depends on the number of threads


def softmax_backward(grad: Tensor, output: Tensor, dim: int, input_dtype: torch.dtype) -> Tensor:
    """The gradient of a softmax's input."""
    return (grad - (grad * output).sum(dim, keepdim=True)).mul_(output)


def layer_norm_backward(
    kernel: Kernel,
    grad: Tensor,
    x: Tensor,
    shape: list[int],
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    wanted: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of a LayerNorm: of the input by torch, of weight and bias by sums that no thread divides."""
    dx, *_ = kernel(grad, x, shape, mean, rstd, weight, bias, [wanted[0], False, False])
    rows = list(range(x.dim() - len(shape)))
    dweight = (x - mean).mul_(rstd).mul_(grad).sum(rows) if wanted[1] else None
    return dx, dweight, grad.sum(rows) if wanted[2] else None


def gelu(kernel: Kernel, x: Tensor, *, approximate: str = "none") -> Tensor:
    """GELU, of either form."""
    x, result = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    _by_vectors(lambda x, result: kernel(x, approximate=approximate, out=result), x, result=result)
    return result


def gelu_backward(kernel: Kernel, grad: Tensor, x: Tensor, *, approximate: str = "none") -> Tensor:
    """The gradient of GELU's input."""
    grad, x, result = grad.contiguous(), x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    derive = functools.partial(kernel, approximate=approximate)
    _by_vectors(lambda grad, x, result: derive(grad, x, grad_input=result), grad, x, result=result)
    return result


def total(x: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """The sum of all elements: of rows of 1,024, then of their sums, and so on."""
    x = x.reshape(-1)
    if dtype is not None or not x.is_floating_point():
        x = x.to(dtype or torch.int64)
    while x.numel() >= GRAIN:
        end = x.numel() // 1024 * 1024
        x = torch.cat([x[:end].view(-1, 1024).sum(1), x[end:]])
    return x.sum(0)


def mean(x: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """The mean of all elements."""
    return total(x, dtype=dtype) / x.numel()


def _by_vectors(kernel: Kernel, *operands: Tensor, result: Tensor) -> None:
    """Calls kernel(*operands, result), elementwise on contiguous tensors, with every element computed in a vector.

    torch splits such work evenly among threads, and computes the elements left over at the end of each share one at a
    time, often to different bits. Here each share consists of whole vectors, and the remaining elements are padded.
    """
    if result.numel() <= UNDIVIDED and result.numel() % LANES == 0:
        kernel(*operands, result)
        return
    flat = [x.view(-1) for x in (*operands, result)]
    end = flat[0].numel() // LANES * LANES
    for piece in zip(*(_shares(x[:end]) for x in flat), strict=True):
        kernel(*piece)
    if rest := flat[0].numel() - end:
        padded = [F.pad(x[end:], (0, LANES - rest)) for x in flat]
        kernel(*padded)
        flat[-1][end:] = padded[-1][:rest]


def _shares(flat: Tensor) -> tuple[Tensor, ...]:
    """Cuts whole vectors into pieces of which torch gives each thread whole vectors, or that it does not split."""
    threads = torch.get_num_threads()
    if threads == 1 or flat.numel() <= UNDIVIDED:
        return (flat,)
    end = flat.numel() // (LANES * threads) * LANES * threads
    return (flat[:end], flat[end:]) if end >= threads * GRAIN else flat.split(UNDIVIDED)  # type: ignore[no-untyped-call]
