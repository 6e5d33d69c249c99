import math

import pytest
import torch

from nanogpt.optim import adamw, lr_at
from tests.nanogpt import tiny

SCHEDULE = {"learning_rate": 1.0, "min_lr": 0.1, "warmup_iters": 3, "decay_iters": 7}


def nanogpt_lr(it, learning_rate, min_lr, warmup_iters, lr_decay_iters):
    """nanoGPT's get_lr, as it stands in its train.py."""
    if it < warmup_iters:
        return learning_rate * (it + 1) / (warmup_iters + 1)
    if it > lr_decay_iters:
        return min_lr
    decay_ratio = (it - warmup_iters) / (lr_decay_iters - warmup_iters)
    coeff = 0.5 * (1.0 + math.cos(math.pi * decay_ratio))
    return min_lr + coeff * (learning_rate - min_lr)


def test_the_learning_rate_warms_up_and_decays_along_half_a_cosine():
    # 1/4, 2/4, 3/4 of the warm-up; cos of 0, 45, 90, 135 degrees; then the floor.
    root = math.sqrt(0.5)
    expected = [0.25, 0.5, 0.75, 1.0, 0.55 + 0.45 * root, 0.55, 0.55 - 0.45 * root, 0.1, 0.1]
    assert [lr_at(step, **SCHEDULE) for step in range(9)] == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize(
    ("learning_rate", "min_lr", "warmup", "decay"),
    [
        (6e-4, 6e-5, 2000, 600_000),
        (1e-3, 1e-4, 100, 2000),
        (3e-3, 3e-4, 0, 1000),
        (1e-3, 0.0, 5, 6),
        (1e-3, 1e-3, 1, 9),
    ],
)
def test_the_learning_rate_is_nanogpts(learning_rate, min_lr, warmup, decay):
    near = {*range(10), *range(warmup - 2, warmup + 3), *range(decay - 2, decay + 3), (warmup + decay) // 2, decay * 2}
    for step in near:
        if step >= 0:
            ours = lr_at(step, learning_rate, min_lr, warmup, decay)
            assert ours == nanogpt_lr(step, learning_rate, min_lr, warmup, decay), step


def test_without_a_warm_up_the_first_step_has_the_full_rate():
    assert lr_at(0, 0.5, 0.0, 0, 10) == 0.5


def test_matrices_and_embeddings_decay_and_nothing_else_does():
    model = tiny.gpt()
    decayed, others = adamw(model, 1e-3, 0.1, (0.9, 0.99), "cpu").param_groups
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert {name_of[id(p)] for p in others["params"]} == {
        name for name, _ in model.named_parameters() if name.endswith("bias") or "ln_" in name
    }
    assert len(decayed["params"]) + len(others["params"]) == len(name_of)
    assert (decayed["betas"], decayed["lr"]) == ((0.9, 0.99), 1e-3)


@pytest.mark.parametrize(("device", "fused"), [("cpu", True), ("cuda", True), ("mps", False)])
def test_it_is_fused_where_torch_has_it(device, fused):
    assert adamw(tiny.gpt(), 1e-3, 0.1, (0.9, 0.99), device).defaults["fused"] is fused


def test_the_fused_steps_are_the_plain_ones():
    fused, plain = tiny.gpt(std=0.2), tiny.gpt(std=0.2)
    for model, device in ((fused, "cpu"), (plain, "mps")):  # "mps" is asked for its unfused form alone
        optimizer = adamw(model, 1e-2, 0.1, (0.9, 0.99), device)
        generator = torch.Generator().manual_seed(5)
        for _ in range(5):
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()
    assert optimizer.defaults["fused"] is False
    for one, other in zip(fused.parameters(), plain.parameters(), strict=True):
        # Five steps of 1e-2 each, rounded in another order.
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    assert not torch.equal(fused.wte.weight, tiny.gpt(std=0.2).wte.weight)
