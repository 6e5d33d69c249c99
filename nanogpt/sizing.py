"""Computes the cost of a training before it runs: parameters, FLOPs, memory, tokens and time, each by parts.

Shapes as in model.py: B batch, T time, C channels, H heads, V vocabulary (padded), L layers. Memory is that of an eager
training step with AdamW and GPT-2's options. A compiled model saves fewer activations; Muon keeps one moment of a
matrix instead of two; rotary positions, QK-norm and plain attention save more activations.
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
    """Everything besides the shape of the model that affects memory."""

    batch_size: int  # B, of one micro-batch
    accumulates: bool  # more than one micro-batch per step
    dtype: str = "float32"
    device: str = "cpu"
    determinism: str = "off"
    parallel: bool = False  # several processes share the step

    @property
    def size(self) -> int:
        """Bytes of a number that autocast computes: in matrix products and between two of them."""
        return FLOAT32 if self.dtype == "float32" else 2

    def fused(self, dropout: float) -> bool:
        """Whether scaled_dot_product_attention uses a kernel that keeps no T x T matrix.

        On a CPU that kernel does not support dropout. On CUDA, flash attention needs half precision; for float32 there
        is the memory-efficient kernel, which determinism.pin turns off. For other devices, assumes the worst case.
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
    """Parameters by part; the sum is GPT(config).parameter_count()."""
    layers = {name: config.n_layer * number for name, number in parameters_per_layer(config).items()}
    table = config.padded_vocab_size * config.n_embd
    return {
        "token_embedding": table,
        "previous_tokens": config.previous_tokens * table,
        "ngrams": config.ngram_rows * config.n_embd if config.ngrams > 1 else 0,
        "positions": config.block_size * config.n_embd if config.position == "learned" else 0,
        **layers,
        "norms": layers["norms"] * (2 * config.n_layer + 1 + config.embedding_norm) // (2 * config.n_layer),  # all
        "head": 0 if config.tie_embeddings else table,
    }


def multiplied(config: GPTConfig) -> int:
    """The weights of matrix products, the N of a scaling law: no embedding that is only looked up, no norm, no bias."""
    return config.n_layer * 12 * config.n_embd**2 + config.padded_vocab_size * config.n_embd


def forward_flops(config: GPTConfig) -> Parts:
    """FLOPs of the matrix products in the forward pass per token; a multiplication and addition are two.

    The backward pass takes twice as many: a product for the gradient of each factor. Scores and values count all pairs
    of positions, as in PaLM's appendix B (Chowdhery et al. 2022) and nanoGPT; a causal kernel may skip half of them.
    """
    layers, c = config.n_layer, config.n_embd
    return {
        "attention_projections": layers * 2 * 4 * c * c,
        "scores_and_values": layers * 2 * 2 * config.block_size * c,
        "mlp": layers * 2 * 8 * c * c,
        "head": 2 * config.padded_vocab_size * c,
    }


def palm_flops(config: GPTConfig) -> int:
    """6N + 12LHQT per token, forward and backward, from which MFU is computed (flops.py).

    This is three times forward_flops, plus six for each weight and bias of a LayerNorm, which N includes.
    """
    return flops_per_token(config, sum(parameters(config).values()))


# --- memory -----------------------------------------------------------------------------------------------------------


def activations(config: GPTConfig, setup: Setup) -> Parts:
    """Bytes that autograd keeps from the forward to the backward pass of one micro-batch, by part.

    The code counts per token: FLOAT32 for what autocast leaves in float32, `s` for the rest (the same on CPU and CUDA).
    """
    c, h, s, v = config.n_embd, config.n_head, setup.size, config.padded_vocab_size
    p = config.dropout
    norm = FLOAT32 * (c + 2)  # its input (the residual stream), mean and 1 / standard deviation
    # The mask of dropout has the dtype of the input on a CPU, and a byte per number on a GPU.
    residual_mask, float_mask = (0, 0) if p == 0 else (s, FLOAT32) if setup.device == "cpu" else (1, 1)
    attention = norm + s * c  # LayerNorm and its output, the input of c_attn
    if setup.fused(p):
        attention += s * 3 * c + FLOAT32 * h  # q, k and v in one tensor; the log of the sum of exponentials of each row
    else:
        attention += FLOAT32 * 3 * c + FLOAT32 * h * config.block_size  # q, k, v; the output of softmax, T x T
        attention += 0 if p == 0 else (FLOAT32 + float_mask) * h * config.block_size  # output and mask of its dropout
    attention += s * c + residual_mask * c  # the output of attention, the input of c_proj; the mask of dropout
    mlp = norm + s * c  # LayerNorm and its output, the input of c_fc
    mlp += s * 4 * c + residual_mask * c  # the input of GELU; the mask of dropout
    mlp += 0 if recomputed(config, setup) else s * 4 * c  # the output of GELU, the input of c_proj
    per_token = {
        "embedding": INT64 * config.ngrams + float_mask * c,  # the tokens and the rows of n-grams; the mask of dropout
        "attention": config.n_layer * attention,
        "mlp": config.n_layer * mlp,
        "head": norm + s * c,  # the final LayerNorm and its output, the input of the head
        "loss": FLOAT32 * v + INT64,  # log-probabilities, B x T x V, always in float32; the targets
    }
    gradient = 0
    if chunked(config, setup):
        per_token["head"] = norm
        per_token["loss"] = FLOAT32 * c  # the gradient of the input of the head
        gradient = FLOAT32 * v * c  # and of its weight
    parts = {name: setup.batch_size * config.block_size * number for name, number in per_token.items()}
    return {**parts, "loss": parts["loss"] + gradient}


def chunked(config: GPTConfig, setup: Setup) -> bool:
    """Whether the loss is computed in chunks (loss.py)."""
    return setup.batch_size * config.block_size * config.padded_vocab_size > loss.CHUNK


def recomputed(config: GPTConfig, setup: Setup) -> bool:
    """Whether the backward pass recomputes the output of GELU (model.py)."""
    return setup.batch_size * config.block_size * 4 * config.n_embd >= model.RECOMPUTED


def backward_bytes(config: GPTConfig, setup: Setup) -> int:
    """The largest memory of the first part of the backward pass, in addition to the saved activations.

    It is the larger of two. In the first step, the gradients of the log-probabilities and of the logits, both B x T x V
    in float32. In the last block, after the activations of the head were freed: the gradients of the residual stream
    and of the input of GELU, whose output was freed for it (a recomputed output adds to that), or without fused
    attention those of two T x T matrices, after input and output of GELU were freed; and the gradients of the first two
    weights. A loss in chunks has an earlier peak, with the logits of one chunk.
    """
    c, s, v = config.n_embd, setup.size, config.padded_vocab_size
    again = s * 4 * c if recomputed(config, setup) else 0
    block = FLOAT32 * c + s * 4 * c + again
    if not setup.fused(config.dropout):
        block = max(block, 2 * FLOAT32 * config.n_head * config.block_size - s * 8 * c + again)
    positions = setup.batch_size * config.block_size
    if chunked(config, setup):
        # The logits of a chunk; in half precision a copy of them, and its part of the gradient of the weight.
        one_chunk = FLOAT32 * loss.CHUNK if s == FLOAT32 else (FLOAT32 + s) * loss.CHUNK + (FLOAT32 + s) * v * c
        return max(one_chunk, positions * (block - FLOAT32 * (c + 2)) + FLOAT32 * 4 * c * c)
    head = FLOAT32 * (c + 2) + s * c + FLOAT32 * v  # as in activations()
    return max(positions * 2 * FLOAT32 * v, positions * (block - head) + FLOAT32 * (v * c + 4 * c * c))


def memory(config: GPTConfig, setup: Setup) -> Parts:
    """Bytes of a training step, by part. Not all exist at the same time; peak_bytes returns the maximum."""
    count = parameters(config)
    total = sum(count.values())
    matrices = sum(forward_flops(config).values()) // 2 - 2 * config.n_layer * config.block_size * config.n_embd
    if chunked(config, setup):
        matrices -= config.padded_vocab_size * config.n_embd  # the gradient of the head exists already
    if recomputed(config, setup):
        matrices -= 4 * config.n_layer * config.n_embd**2  # the projection of the MLP is copied again
    return {
        "weights": FLOAT32 * total,
        "gradients": FLOAT32 * total,
        "moments": 2 * FLOAT32 * total,  # of AdamW: the means of the gradient and of its square
        "autocast": 0
        if setup.dtype == "float32"
        else setup.size * matrices,  # copies of the matrices, kept for the backward pass
        "buckets": FLOAT32 * total * setup.parallel,  # of DistributedDataParallel, to sum gradients
        "activations": sum(activations(config, setup).values()),
        "backward": backward_bytes(config, setup),
        # A tied wte is used twice: besides its gradient as the head, its gradient as the input and the sum of both.
        "embedding_gradient": 2 * FLOAT32 * count["token_embedding"] * config.tie_embeddings,
    }


def peak_bytes(config: GPTConfig, setup: Setup) -> int:
    """The peak memory of a training step, from the second step on.

    All activations exist when the backward pass begins, and all gradients when it ends. In between, the activations of
    each layer are freed as its gradients are computed, so the peak is at the beginning or at the end. Gradients of
    earlier micro-batches exist throughout.
    """
    part = memory(config, setup)
    begin = part["activations"] + part["autocast"] + part["backward"] + setup.accumulates * part["gradients"]
    earlier = setup.accumulates * FLOAT32 * parameters(config)["token_embedding"]  # of wte, besides those
    end = part["gradients"] + part["embedding_gradient"] + earlier
    return part["weights"] + part["moments"] + part["buckets"] + max(begin, end)


def checkpoint_bytes(config: GPTConfig) -> int:
    """Bytes of state.safetensors: weights and both moments, without the header and the step counts of AdamW."""
    return 3 * FLOAT32 * sum(parameters(config).values())


# --- tokens and time --------------------------------------------------------------------------------------------------


def chinchilla_tokens(config: GPTConfig) -> int:
    """The number of tokens for which this size is the best use of a fixed amount of compute: some 20 per parameter.

    This is a rule of thumb from Hoffmann et al. 2022. A model that will be used often is worth more tokens.
    """
    return CHINCHILLA * sum(parameters(config).values())


def step_seconds(config: GPTConfig, tokens: int, share: float, peak: float) -> float:
    """Seconds of a training step of `tokens` tokens at a share (MFU) of the device's peak FLOP/s."""
    return tokens * palm_flops(config) / (share * peak)


def share_of_peak(config: GPTConfig, tokens: int, seconds: float, peak: float | None) -> float | None:
    """MFU of a step of `tokens` tokens that takes `seconds`; None if the peak is unknown."""
    return mfu(tokens / seconds, palm_flops(config), peak)
