"""What a training costs, computed before it runs: parameters, FLOPs, memory, tokens and time, each by its parts.

Shapes as in model.py: B batch, T time, C channels, H heads, V vocabulary (padded), L layers. `bytes` are of a training
step as train.py takes it, eager, with AdamW and GPT-2's options; a compiled model saves fewer activations, Muon keeps
one moment of a matrix instead of two, and rotary positions, QK-norm and plain attention save more.
"""

from dataclasses import dataclass

from nanogpt import loss, model
from nanogpt.flops import flops_per_token, mfu
from nanogpt.gpt_config import GPTConfig

Parts = dict[str, int]

FLOAT32, INT64 = 4, 8  # bytes
CHINCHILLA = 20  # tokens per parameter


@dataclass(frozen=True)
class Setup:
    """What memory depends on beside the model's shape."""

    batch_size: int  # B, of one micro-batch
    accumulates: bool  # more than one micro-batch per step
    dtype: str = "float32"
    device: str = "cpu"
    determinism: str = "off"
    parallel: bool = False  # several processes share the step

    @property
    def size(self) -> int:
        """Bytes of a number in what autocast computes: matrix products and what comes between two of them."""
        return FLOAT32 if self.dtype == "float32" else 2

    def fused(self, dropout: float) -> bool:
        """Whether scaled_dot_product_attention takes a kernel that keeps no T x T matrix.

        On a CPU that kernel knows no dropout. On CUDA, flash attention is for half precision; for float32 there is the
        memory-efficient kernel, which determinism.pin turns off. Elsewhere the worst is taken.
        """
        if self.device == "cpu":
            return dropout == 0
        return self.device == "cuda" and (self.dtype != "float32" or self.determinism == "off")


# --- parameters and FLOPs ---------------------------------------------------------------------------------------------


def parameters_per_layer(config: GPTConfig) -> Parts:
    c, b, norms = config.n_embd, int(config.bias), int(config.norm == "layernorm")
    return {
        "attention": 4 * c * c + b * 4 * c,  # C x 3C for queries, keys and values, C x C for the projection
        "mlp": 8 * c * c + b * 5 * c,  # C x 4C and 4C x C
        "norms": norms * 2 * c * (1 + b),
    }


def parameters(config: GPTConfig) -> Parts:
    """Parameters by part; their sum is GPT(config).parameter_count()."""
    layers = {name: config.n_layer * number for name, number in parameters_per_layer(config).items()}
    table = config.padded_vocab_size * config.n_embd
    return {
        "token_embedding": table,
        "previous_tokens": config.previous_tokens * table,
        "positions": config.block_size * config.n_embd if config.position == "learned" else 0,
        **layers,
        "norms": layers["norms"] * (2 * config.n_layer + 1 + config.embedding_norm) // (2 * config.n_layer),  # all
        "head": 0 if config.tie_embeddings else table,
    }


def forward_flops(config: GPTConfig) -> Parts:
    """FLOPs of the matrix products of one token's forward pass; two per multiplication and addition.

    The backward pass takes twice as many: a product for the gradient of either factor. Scores and values count all
    pairs of positions, as PaLM's appendix B (Chowdhery et al. 2022) and nanoGPT do; a causal kernel may skip half.
    """
    layers, c = config.n_layer, config.n_embd
    return {
        "attention_projections": layers * 2 * 4 * c * c,
        "scores_and_values": layers * 2 * 2 * config.block_size * c,
        "mlp": layers * 2 * 8 * c * c,
        "head": 2 * config.padded_vocab_size * c,
    }


def palm_flops(config: GPTConfig) -> int:
    """6N + 12LHQT per token, forward and backward: the figure that MFU is a share of (flops.py).

    Above three times forward_flops by six per LayerNorm weight and bias, which N includes.
    """
    return flops_per_token(config, sum(parameters(config).values()))


# --- memory -----------------------------------------------------------------------------------------------------------


def activations(config: GPTConfig, setup: Setup) -> Parts:
    """Bytes that autograd keeps of one micro-batch's forward pass until its backward pass, by part.

    Per token; FLOAT32 where autocast leaves float32, `s` where it does not (on CPU and CUDA alike).
    """
    c, h, s, v = config.n_embd, config.n_head, setup.size, config.padded_vocab_size
    p = config.dropout
    norm = FLOAT32 * (c + 2)  # its input (the residual stream), mean and 1 / standard deviation
    # Dropout on a CPU multiplies by a mask of the input's type; on a GPU it keeps a byte per number.
    residual_mask, float_mask = (0, 0) if p == 0 else (s, FLOAT32) if setup.device == "cpu" else (1, 1)
    attention = norm + s * c  # the LayerNorm; its output, which is the input of c_attn
    if setup.fused(p):
        attention += s * 3 * c + FLOAT32 * h  # q, k and v in one; the logarithm of each row's sum of exponentials
    else:
        attention += FLOAT32 * 3 * c + FLOAT32 * h * config.block_size  # q, k, v; the softmax's output, T x T
        attention += 0 if p == 0 else (FLOAT32 + float_mask) * h * config.block_size  # its dropout: output and mask
    attention += s * c + residual_mask * c  # the output of attention, which is the input of c_proj; dropout's mask
    mlp = norm + s * c  # the LayerNorm; its output, which is the input of c_fc
    mlp += s * 4 * c + residual_mask * c  # GELU's input; dropout's mask
    mlp += 0 if recomputed(config, setup) else s * 4 * c  # GELU's output, the input of c_proj
    per_token = {
        "embedding": INT64 + float_mask * c,  # the tokens; dropout's mask
        "attention": config.n_layer * attention,
        "mlp": config.n_layer * mlp,
        "head": norm + s * c,  # the final LayerNorm; its output, the input of the head
        "loss": FLOAT32 * v + INT64,  # log-probabilities, B x T x V in float32 whatever the type; the targets
    }
    gradient = 0
    if chunked(config, setup):
        per_token["head"] = norm
        per_token["loss"] = FLOAT32 * c  # the gradient of the head's input
        gradient = FLOAT32 * v * c  # and of the head's weight
    parts = {name: setup.batch_size * config.block_size * number for name, number in per_token.items()}
    return {**parts, "loss": parts["loss"] + gradient}


def chunked(config: GPTConfig, setup: Setup) -> bool:
    """Whether the loss is computed in chunks (loss.py)."""
    return setup.batch_size * config.block_size * config.padded_vocab_size > loss.CHUNK


def recomputed(config: GPTConfig, setup: Setup) -> bool:
    """Whether the backward pass computes GELU's output again (model.py)."""
    return setup.batch_size * config.block_size * 4 * config.n_embd >= model.RECOMPUTED


def backward_bytes(config: GPTConfig, setup: Setup) -> int:
    """The most that the backward pass needs at its beginning, on top of what is saved.

    Either at its first step, the gradients of the log-probabilities and of the logits, both B x T x V in float32; or in
    the last block, when what the head saved is gone: the gradients of the residual stream and of GELU's input, as its
    output gave way to that one's gradient (one that is computed again comes on top), or, where attention is not fused,
    those of two T x T matrices, as GELU's input and output are gone too; and the gradients of the two weights that come
    first. A loss in chunks has its own peak before, when one chunk's logits are there.
    """
    c, s, v = config.n_embd, setup.size, config.padded_vocab_size
    again = s * 4 * c if recomputed(config, setup) else 0
    block = FLOAT32 * c + s * 4 * c + again
    if not setup.fused(config.dropout):
        block = max(block, 2 * FLOAT32 * config.n_head * config.block_size - s * 8 * c + again)
    positions = setup.batch_size * config.block_size
    if chunked(config, setup):
        # Its logits; in half precision these besides, and its share of the weight's gradient.
        one_chunk = FLOAT32 * loss.CHUNK if s == FLOAT32 else (FLOAT32 + s) * loss.CHUNK + (FLOAT32 + s) * v * c
        return max(one_chunk, positions * (block - FLOAT32 * (c + 2)) + FLOAT32 * 4 * c * c)
    head = FLOAT32 * (c + 2) + s * c + FLOAT32 * v  # of activations()
    return max(positions * 2 * FLOAT32 * v, positions * (block - head) + FLOAT32 * (v * c + 4 * c * c))


def memory(config: GPTConfig, setup: Setup) -> Parts:
    """Bytes of a training step, by part. They are not all there at once: peak_bytes tells the most."""
    count = parameters(config)
    total = sum(count.values())
    matrices = sum(forward_flops(config).values()) // 2 - 2 * config.n_layer * config.block_size * config.n_embd
    if chunked(config, setup):
        matrices -= config.padded_vocab_size * config.n_embd  # the head's gradient is there already
    if recomputed(config, setup):
        matrices -= 4 * config.n_layer * config.n_embd**2  # the MLP's projection, copied again
    return {
        "weights": FLOAT32 * total,
        "gradients": FLOAT32 * total,
        "moments": 2 * FLOAT32 * total,  # AdamW's means of the gradient and of its square
        "autocast": 0 if setup.dtype == "float32" else setup.size * matrices,  # the matrices' copies, kept for backward
        "buckets": FLOAT32 * total * setup.parallel,  # in which DistributedDataParallel sums gradients
        "activations": sum(activations(config, setup).values()),
        "backward": backward_bytes(config, setup),
        # A tied wte is used twice: its gradient as input, and the sum of that and of its gradient as head, a third.
        "embedding_gradient": 2 * FLOAT32 * count["token_embedding"] * config.tie_embeddings,
    }


def peak_bytes(config: GPTConfig, setup: Setup) -> int:
    """The most that a training step holds at once, from the second step on.

    As the backward pass begins, all activations are there; as it ends, all gradients. In between one gives way to the
    other layer by layer, so that one of the ends is the peak. Gradients of earlier micro-batches are there throughout.
    """
    part = memory(config, setup)
    begin = part["activations"] + part["autocast"] + part["backward"] + setup.accumulates * part["gradients"]
    earlier = setup.accumulates * FLOAT32 * parameters(config)["token_embedding"]  # of wte, beside those three
    end = part["gradients"] + part["embedding_gradient"] + earlier
    return part["weights"] + part["moments"] + part["buckets"] + max(begin, end)


def checkpoint_bytes(config: GPTConfig) -> int:
    """Bytes of state.safetensors: weights and both moments; its header and AdamW's counts of steps are left out."""
    return 3 * FLOAT32 * sum(parameters(config).values())


# --- tokens and time --------------------------------------------------------------------------------------------------


def chinchilla_tokens(config: GPTConfig) -> int:
    """Tokens at which a fixed amount of compute is best spent on this size: some 20 per parameter.

    A rule of thumb read from the fits of Hoffmann et al. 2022. A model that will be used much is worth more tokens.
    """
    return CHINCHILLA * sum(parameters(config).values())


def step_seconds(config: GPTConfig, tokens: int, share: float, peak: float) -> float:
    """Seconds of a training step of so many tokens at a share (MFU) of the device's peak FLOP/s."""
    return tokens * palm_flops(config) / (share * peak)


def share_of_peak(config: GPTConfig, tokens: int, seconds: float, peak: float | None) -> float | None:
    """MFU of a step of so many tokens that took so many seconds; None where the peak is not known."""
    return mfu(tokens / seconds, palm_flops(config), peak)
