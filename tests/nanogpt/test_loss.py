import pytest
import torch
import torch.nn.functional as F

from nanogpt import loss
from tests.nanogpt import tiny

TOKENS, CHANNELS, VOCABULARY = 37, 8, 50


@pytest.fixture
def case():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, CHANNELS, generator=generator, requires_grad=True)
    head = torch.randn(VOCABULARY, CHANNELS, generator=generator, requires_grad=True)
    return hidden, head, torch.randint(VOCABULARY, (TOKENS,), generator=generator)


def gradients(function, hidden, head, targets):
    value = function(hidden, head, targets)
    return value, *torch.autograd.grad(3 * value, (hidden, head))


def plain(hidden, head, targets):
    return F.cross_entropy(F.linear(hidden, head).float(), targets)


@pytest.mark.parametrize("chunk", [1, VOCABULARY, 5 * VOCABULARY + 7, TOKENS * VOCABULARY - 1])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_in_chunks_loss_and_gradients_are_those_of_all_logits_at_once(monkeypatch, case, chunk, dtype):
    monkeypatch.setattr(loss, "CHUNK", chunk)
    with torch.autocast("cpu", dtype=getattr(torch, dtype), enabled=dtype != "float32"):
        expected, found = gradients(plain, *case), gradients(loss.cross_entropy, *case)
    tolerance = {"float32": 1e-6, "bfloat16": 1e-2}[dtype]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
        assert one.dtype == other.dtype


def test_no_more_logits_than_a_chunk_exist_at_once(monkeypatch, case):
    monkeypatch.setattr(loss, "CHUNK", 4 * VOCABULARY)
    rows = []
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda x, w: rows.append(len(x)) or linear(x, w))
    loss.cross_entropy(*case)
    assert rows == [4] * 9 + [1]


def test_each_tokens_loss_is_that_of_all_logits_at_once_though_they_never_exist(monkeypatch, case):
    hidden, head, targets = case
    expected = F.cross_entropy(F.linear(hidden, head).detach(), targets, reduction="none")
    assert torch.equal(loss.each_cross_entropy(*case), expected)
    monkeypatch.setattr(loss, "CHUNK", 4 * VOCABULARY)
    rows = []
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda x, w: rows.append(len(x)) or linear(x, w))
    torch.testing.assert_close(loss.each_cross_entropy(*case), expected)
    assert rows == [4] * 9 + [1]


def test_without_gradients_it_is_the_same_loss(monkeypatch, case):
    monkeypatch.setattr(loss, "CHUNK", 100)
    with torch.no_grad():
        torch.testing.assert_close(loss.cross_entropy(*case), plain(*case))


def test_up_to_a_chunk_it_is_torchs_own(case):
    for one, other in zip(gradients(loss.cross_entropy, *case), gradients(plain, *case), strict=True):
        assert torch.equal(one, other)


def test_a_model_learns_the_same_by_either(monkeypatch):
    """Its head is the embedding too, whose gradient has two parts."""
    tokens = torch.from_numpy(tiny.tokens(24).reshape(3, 8).astype("int64"))
    found = []
    for chunk in (loss.CHUNK, 30):
        monkeypatch.setattr(loss, "CHUNK", chunk)
        model = tiny.gpt(std=0.2)
        model(tokens, tokens.roll(-1, 1)).backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-5, atol=1e-6)


def test_it_compiles(monkeypatch, case):
    monkeypatch.setattr(loss, "CHUNK", 500)
    compiled = torch.compile(loss.cross_entropy, backend="aot_eager", fullgraph=True)  # test_model.py compiles it too
    for one, other in zip(gradients(compiled, *case), gradients(plain, *case), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
