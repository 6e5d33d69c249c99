import pytest
import torch

from nanogpt import loss
from nanogpt.tied_gradient import TiedGradient
from tests.nanogpt import tiny

TOKENS = torch.from_numpy(tiny.tokens(64).astype("int64")).view(8, 8)


def gradients(tied):
    model = tiny.gpt(std=0.3)
    model.tied_gradient = tied
    for tokens in TOKENS.chunk(2):  # two micro-batches
        model(tokens, tokens.roll(-1)).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("chunk", [loss.CHUNK, 16])
def test_the_gradient_is_autograds_but_for_rounding(monkeypatch, chunk):
    monkeypatch.setattr(loss, "CHUNK", chunk)
    tied = TiedGradient()
    found, expected = gradients(tied), gradients(None)
    assert tied.kept == []
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, atol=1e-7), name
    assert expected["wte.weight"].abs().max() > 0.01
