import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nanogpt import known_answers, portable, portable_products

# Each of these scripts runs in a process of its own: `install` cannot be undone.
PINNED = {"GOMP_SPINCOUNT": "0", "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "COMPATIBLE"}

PRODUCTS = """
import json, random
import numpy as np, torch
from nanogpt import portable, portable_products
portable.install()

def definition(a, b):  # float64 holds each product exactly; its sum is rounded twice only once in 2**29
    total = np.zeros((len(a), len(b)), np.float32)
    for start in range(0, a.shape[1], 1024):
        acc = np.zeros_like(total)
        for k in range(start, min(start + 1024, a.shape[1])):
            acc = (a[:, k, None].astype(np.float64) * b[None, :, k] + acc).astype(np.float32)
        total = acc if start == 0 else total + acc
    return total

def share(found, expected):
    return float((found.numpy() == expected).mean())

draw, found = random.Random(1), []
torch.manual_seed(1)
for case in range(20):
    M, N = draw.choice([1, 2, 3, 8, 17, 64, 100]), draw.choice([1, 2, 7, 8, 33, 65, 128])
    K, G = draw.choice([1, 3, 16, 96, 200, 1000, 1024, 1025, 2100]), draw.choice([1, 2, 5])
    torch.set_num_threads(draw.choice([1, 2, 3, 5]))
    a, b = torch.randn(G, M, K), torch.randn(G, N, K)
    expected = [definition(x.numpy(), y.numpy()) for x, y in zip(a, b)]
    forms = [
        a[0] @ b[0].T,
        a[0].T.contiguous().T @ b[0].T.contiguous(),
        a[0] @ torch.stack([b[0]] * 2, -1)[..., 0].T,  # strided
        torch.nn.functional.linear(a[0][None], b[0])[0],
        (b[0] @ a[0].T).T,
        portable_products.packed_product(b[0], M)(a[0][:, None])[:, 0],
    ]
    shares = [share(form, expected[0]) for form in forms]
    for groups in (a @ b.mT, a.mT.contiguous().mT @ b.mT):
        shares += [share(group, whole) for group, whole in zip(groups, expected)]
    found.append([f"{G} x {M} x {N} x {K}", min(shares)])
for B, H, S, D in ((1, 2, 1, 8), (1, 6, 37, 64), (3, 5, 16, 20), (2, 3, 1030, 8)):  # the next token, by its short cut
    q, k, v = torch.randn(B, H, 1, D), torch.randn(B, H, S, D), torch.randn(B, H, S, D)
    by_groups = portable._by_position(q) * portable._log2_scale(D, None), k.flatten(0, 1), v.flatten(0, 1).mT
    pairs = zip(portable.attention(q, k, v), portable._block(*by_groups))
    shares = [share(found_.flatten(), expected.flatten().numpy()) for found_, expected in pairs]
    found.append([f"attention {B} x {H} x {S} x {D}", min(shares)])
print(json.dumps(found))
"""

THREADS = """
import hashlib, json, sys
from nanogpt import determinism
from nanogpt.params import NumericsParams
settings = {"determinism": "portable", "threads": 1, "dtype": "float32", "compile": False, "attention": "fused"}
determinism.pin(NumericsParams(**settings), "cpu")
import torch
from nanogpt import known_answers, portable
from nanogpt.generate import Decoder
from nanogpt.model import GPT, KVCache
from nanogpt.optimizer import make_optimizer
from tests.nanogpt import tiny

def trained(optimizer, **options):
    torch.manual_seed(1)
    model = GPT(tiny.config(**{"n_embd": 96, "n_head": 3, "block_size": 70, "vocab_size": 301, **options}))
    optimizer = make_optimizer(model, tiny.train_params(optimizer=optimizer), "cpu", "float32")
    for step in range(2):
        x = torch.randint(301, (7, 71), generator=torch.Generator().manual_seed(step))
        loss = model(x[:, :-1], x[:, 1:])
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    values = [loss, norm, *model.parameters()]
    return hashlib.sha256(b"".join(x.detach().numpy().tobytes() for x in values)).hexdigest()

def generated(samples):  # the logits of one token after another, by the model's layers and by packed weights
    torch.manual_seed(1)
    model = GPT(tiny.config(n_embd=96, n_head=3, block_size=20, vocab_size=301, bias=True))
    caches = [KVCache(model.config, samples, torch.device("cpu"), torch.float32) for _ in range(2)]
    decoder, tokens, logits = Decoder(model, caches[1]), torch.arange(7)[None].expand(samples, -1), [[], []]
    with torch.inference_mode():
        for cache in caches:
            model(tokens, cache=cache)
        for token in range(13):
            following = torch.full((samples, 1), token)
            logits[0].append(model(following, cache=caches[0]))
            logits[1].append(decoder(following))
    return [hashlib.sha256(torch.stack(each).numpy().tobytes()).hexdigest() for each in logits]

def everything():
    return {
        "one sample": generated(1),
        "several samples": generated(3),
        "GPT-2, AdamW": trained("adamw"),
        "GPT-2's tanh, dropout": trained("adamw", activation="gelu_tanh", dropout=0.1),
        "Muon, RMSNorm, rotary": trained("muon", **tiny.NANOCHAT),
        **known_answers.answers(),
    }

found = {}
for threads in (1, 2, 3, 5):
    torch.set_num_threads(threads)
    found[threads] = everything()
portable.SCORES = 1  # groups one by one, which is a matter of memory alone
found["in groups"] = {name: answer for name, answer in known_answers.answers().items() if "attention" in name}
print(json.dumps(found))
"""


def run(script, *arguments):
    environment = {**os.environ, **PINNED}
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_products_are_their_definition_for_any_shape_order_and_number_of_threads():
    """Whatever the way a product is asked for: its numbers are those of the chain written out."""
    different = [case for case in run(PRODUCTS) if case[1] < 0.9999]
    assert not different


def test_the_number_of_threads_changes_no_bit():
    """Every optimizer, norm and activation; sizes are such that threads share the work, in pieces that are not even."""
    found = run(THREADS)
    assert found["1"] == found["2"] == found["3"] == found["5"]
    for kind in ("one sample", "several samples"):
        by_the_model, by_packed_weights = found["1"][kind]
        assert by_packed_weights == by_the_model
    assert known_answers.ANSWERS.items() <= found["1"].items()
    assert len(found["in groups"]) == 2
    assert found["in groups"].items() <= found["1"].items()


@pytest.mark.parametrize(
    ("batch", "heads", "queries", "keys", "head_size", "causal"),
    [
        (2, 3, 300, 300, 16, True),
        (1, 1, 10, 10, 8, True),  # one head of one sequence: where a reshape is a view
        (2, 2, 10, 10, 6, True),  # no whole vectors
        (2, 2, 129, 129, 4, False),
        (3, 2, 1, 37, 8, False),  # the next token
        (1, 2, 1, 37, 8, True),  # a first token, which sees the first key alone
        (1, 2, 1, 1, 2, False),
    ],
)
def test_attention_is_torchs(batch, heads, queries, keys, head_size, causal):
    draw = torch.Generator().manual_seed(1)
    shapes = [(batch, length, heads, head_size) for length in (queries, keys, keys, queries)]
    q, k, v, grad = (torch.randn(shape, generator=draw).transpose(1, 2) for shape in shapes)
    before = [x.clone() for x in (q, k, v, grad)]
    out, log_sum = portable.attention(q, k, v, is_causal=causal)
    gradients = portable.attention_backward(grad, q, k, v, out, log_sum, 0.0, causal)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    expected = F.scaled_dot_product_attention(*leaves, is_causal=causal)
    expected.backward(grad)
    torch.testing.assert_close(out, expected.detach(), rtol=1e-4, atol=2e-6)
    for found, leaf in zip(gradients, leaves, strict=True):
        torch.testing.assert_close(found, leaf.grad, rtol=1e-4, atol=5e-6)
    for x, old in zip((q, k, v, grad), before, strict=True):
        assert torch.equal(x, old)  # none was changed in place


def test_other_products_are_torchs():
    a, b, c = (torch.randn(3, 40, 40, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2, 3))
    scaled = {"beta": 0.5, "alpha": -2.0}
    close = torch.testing.assert_close
    close(portable_products.addmm(c[0], a[0], b[0], **scaled), torch.addmm(c[0], a[0], b[0], **scaled))
    close(portable_products.addmm_(c[0].clone(), a[0], b[0], **scaled), torch.addmm(c[0], a[0], b[0], **scaled))
    close(portable_products.baddbmm(c, a, b, **scaled), torch.baddbmm(c, a, b, **scaled))
    close(portable_products.bmm(a.mT, b), a.mT @ b)
    large = torch.randn(2, 130, 130, generator=torch.Generator().manual_seed(4))  # a call for each group
    close(portable_products.bmm(large, large), large @ large)


def test_norms_and_softmax_have_torchs_gradients():
    x, grad = torch.randn(2, 6, 7, 10, generator=torch.Generator().manual_seed(1))
    scale = torch.linspace(-1, 2, 10)
    _, mean, rstd = torch.native_layer_norm(x, [10], scale, scale, 1e-5)
    arguments = (grad, x, [10], mean, rstd, scale, scale)
    expected = torch.ops.aten.native_layer_norm_backward(*arguments, [True, True, True])
    kernel = torch.ops.aten.native_layer_norm_backward
    torch.testing.assert_close(portable.layer_norm_backward(kernel, *arguments, [True, True, True]), expected)
    assert portable.layer_norm_backward(kernel, *arguments, [True, False, False])[1:] == (None, None)
    soft = x.softmax(-1)
    expected = torch.ops.aten._softmax_backward_data(grad, soft, -1, x.dtype)
    torch.testing.assert_close(portable.softmax_backward(grad, soft, -1, x.dtype), expected)


def test_sums_and_means_of_everything():
    x = torch.arange(100_000)
    assert portable.total(x) == x.sum() == portable.total(x.view(100, 1000).T)
    assert portable.total(x > 5) == 99_994
    torch.testing.assert_close(portable.mean(x, dtype=torch.float64), torch.tensor(49_999.5, dtype=torch.float64))


@pytest.mark.parametrize("threads", [1, 2, 3, 5, 64])
def test_every_thread_has_whole_vectors(threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for size in (1, 16, 16_400, 40_000, 100_001, 5_000_000):
        x = torch.arange(size, dtype=torch.float32)
        result, counts = torch.empty_like(x), []

        def double(x, out, counts=counts):
            counts.append(x.numel())
            torch.mul(x, 2, out=out)

        portable._by_vectors(double, x, result=result)
        assert torch.equal(result, x * 2)
        for count in counts:  # torch gives so many threads a share each, or all of it to one
            used = {1} if count <= portable.UNDIVIDED else {min(threads, -(-count // portable.GRAIN)), threads}
            assert all(count % (each * portable.LANES) == 0 for each in used)


def test_what_has_no_portable_kernel_is_refused():
    script = """
import json, torch
from nanogpt import portable
portable.install(), portable.install()
refused = []
for name, call in {
    "dot": lambda x: x @ x,
    "mv": lambda x: torch.eye(3) @ x,
    "sqrt": torch.sqrt,
    "out": lambda x: torch.mm(x[None], x[:, None], out=torch.empty(1, 1)),
}.items():
    try:
        call(torch.ones(3))
    except NotImplementedError as error:
        refused.append([name, str(error)])
print(json.dumps(refused))
"""
    found = run(script)
    assert [name for name, _ in found] == ["dot", "mv", "sqrt", "out"]
    assert "torch's sqrt is not the same on every CPU" in found[2][1]


def test_another_answer_is_refused_by_the_name_of_its_kernel(monkeypatch):
    monkeypatch.setattr(known_answers, "answers", lambda: {**known_answers.ANSWERS, "attention": "0" * 12})
    with pytest.raises(
        ValueError, match=r"portable: this CPU with torch .* computes attention to other bits .*; set it"
    ):
        known_answers.check()
    monkeypatch.setattr(known_answers, "answers", lambda: known_answers.ANSWERS)
    known_answers.check()


def test_the_numbers_of_known_answers_need_no_kernel():
    count = np.arange(1, 7, dtype=np.int64)
    expected = ((count * 2_654_435_761 * 3) % 2**24).astype(np.float32) / 2**23 - 1
    assert known_answers.numbers(2, 3, seed=3).numpy().tolist() == expected.reshape(2, 3).tolist()
