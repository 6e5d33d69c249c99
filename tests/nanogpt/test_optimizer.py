import copy
import math

import pytest
import torch

from nanogpt.optimizer import make_optimizer, momentum_at, orthogonalize, parameter_groups
from nanogpt.schedule import lr_at
from tests.nanogpt import tiny

TOKENS = torch.arange(24).view(3, 8) % 13  # (B, T)
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


def test_a_linear_decay_is_a_straight_line():
    assert [lr_at(step, **SCHEDULE, decay="linear") for step in range(9)] == pytest.approx(
        [0.25, 0.5, 0.75, 1.0, 0.775, 0.55, 0.325, 0.1, 0.1], rel=1e-15
    )


# --- groups -----------------------------------------------------------------------------------------------------------


def groups(model, **changes):
    """{kind: (names of the parameters, the group)}"""
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    optimizer = make_optimizer(model, tiny.train_params(**changes), "cpu", "float32")
    return {group["kind"]: ({name_of[id(p)] for p in group["params"]}, group) for group in optimizer.param_groups}


def test_matrices_and_embeddings_decay_and_nothing_else_does():
    model = tiny.gpt()
    found = groups(model)
    assert {kind: group["weight_decay"] for kind, (_, group) in found.items()} == {
        "matrices": 0.1,
        "vectors": 0.0,
    }
    names = {name for name, _ in model.named_parameters()}
    assert found["vectors"][0] == {name for name in names if name.endswith("bias") or "ln_" in name}
    assert set.union(*(members for members, _ in found.values())) == names
    assert {"wte.weight", "wpe.weight"} <= found["matrices"][0]
    assert found["matrices"][1]["betas"] == (0.9, 0.99)


def test_muon_has_the_matrices_of_the_blocks_and_each_group_its_learning_rate():
    model = tiny.gpt(tie_embeddings=False, previous_tokens=2, ngrams=3)
    changes = {"learning_rate": 0.1, "ngram_weight_decay": 3.0, "muon_learning_rate": 0.04}
    found = groups(model, optimizer="muon", muon_weight_decay=0.3, **changes)
    assert found["muon"][0] == {f"h.{i}.{part}.weight" for i in (0, 1) for part in MATRICES}
    assert found["matrices"][0] == {
        "lm_head.weight",
        "wte.weight",
        "wpe.weight",
        "previous.0.weight",
        "previous.1.weight",
    }
    assert found["ngrams"][0] == {"ngrams.table.weight"}
    multipliers = {kind: group["lr_multiplier"] for kind, (_, group) in found.items()}
    assert multipliers == {"muon": pytest.approx(0.4), "matrices": 1.0, "ngrams": 1.0, "vectors": 1.0}
    assert found["ngrams"][1]["weight_decay"] == 3.0
    assert found["muon"][1]["weight_decay"] == 0.3


MATRICES = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


# --- AdamW ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("device", "fused"), [("cpu", True), ("cuda", True), ("mps", False)])
def test_it_is_fused_where_torch_has_it(device, fused):
    assert make_optimizer(tiny.gpt(), tiny.train_params(), device, "float32").defaults["fused"] is fused


def stepped(params, device="cpu", steps=5):
    """A model after some steps with random gradients."""
    model = tiny.gpt(std=0.2)
    optimizer = make_optimizer(model, params, device, "float32")
    for group in optimizer.param_groups:
        group["lr"] = params.learning_rate * group["lr_multiplier"]
    generator = torch.Generator().manual_seed(5)
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return model


def test_the_fused_steps_are_the_plain_ones():
    fused, plain = stepped(tiny.train_params()), stepped(tiny.train_params(), "mps")  # "mps": asked for its plain form
    for one, other in zip(fused.parameters(), plain.parameters(), strict=True):
        # Five steps of 1e-2 each, rounded in another order.
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    assert not torch.equal(fused.wte.weight, tiny.gpt(std=0.2).wte.weight)


def test_its_steps_and_its_state_are_those_of_torchs_own_adamw():
    params = tiny.train_params()
    models = [tiny.gpt(std=0.2), tiny.gpt(std=0.2)]
    ours = make_optimizer(models[0], params, "cpu", "float32")
    theirs = torch.optim.AdamW(
        parameter_groups(models[1], params), **{name: ours.defaults[name] for name in ("lr", "betas", "fused")}
    )
    for step in range(6):
        for model, optimizer in zip(models, (ours, theirs), strict=True):
            optimizer.zero_grad(set_to_none=True)
            model(TOKENS, TOKENS).backward()
            optimizer.step()
        if step == 2:  # each goes on with the other's state
            states = [ours.state_dict(), theirs.state_dict()]
            theirs.load_state_dict(copy.deepcopy(states[0]))
            ours.load_state_dict(copy.deepcopy(states[1]))
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(models[0].wte.weight, tiny.gpt(std=0.2).wte.weight)


def test_what_muon_leaves_to_adamw_takes_its_very_steps():
    plain = dict(stepped(tiny.train_params()).named_parameters())
    for name, parameter in stepped(tiny.train_params(optimizer="muon")).named_parameters():
        assert torch.equal(parameter, plain[name]) == (not name.endswith(tuple(f"{m}.weight" for m in MATRICES)))


# --- Muon -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 64, 16), (2, 16, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_orthogonalizing_leaves_the_directions_and_makes_all_singular_values_about_one(shape, dtype):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 7
    found = orthogonalize(matrices, dtype)
    assert found.dtype == torch.float32
    singular = torch.linalg.svdvals(found)
    assert singular.min() > 0.3  # the smallest of a square random matrix needs more steps than five
    assert singular.median() > 0.6
    assert singular.max() < 1.3
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    cosine = (found * (u @ v)).sum(dim=(1, 2)) / (found.norm(dim=(1, 2)) * (u @ v).norm(dim=(1, 2)))
    assert cosine.min() > 0.95


def test_a_step_of_muon_is_the_one_of_torch():
    """torch.optim.Muon, matrix by matrix, queries, keys and values apart, with the same momentum."""
    params = tiny.train_params(optimizer="muon", muon_momentum=0.85, muon_weight_decay=0.2)  # no warm-up of momentum
    start, ours = tiny.gpt(std=0.2), stepped(params, steps=3)
    generator = torch.Generator().manual_seed(5)
    gradients = [[torch.randn(p.shape, generator=generator) for p in start.parameters()] for _ in range(3)]
    for i, (name, parameter) in enumerate(start.named_parameters()):
        if not name.endswith(tuple(f"{m}.weight" for m in MATRICES)):
            continue
        parts = 3 if "c_attn" in name else 1
        theirs = [torch.nn.Parameter(part.clone()) for part in parameter.detach().chunk(parts)]
        optimizer = torch.optim.Muon(theirs, lr=2e-2, weight_decay=0.2, momentum=0.85)
        for step in gradients:
            for part, gradient in zip(theirs, step[i].chunk(parts), strict=True):
                part.grad = gradient
            optimizer.step()
        # torch's computes in bfloat16.
        found = ours.get_parameter(name) - parameter
        torch.testing.assert_close(found, torch.cat(theirs) - parameter, rtol=0.1, atol=4e-3)


def test_the_momentum_of_muon_rises_and_stays():
    assert [momentum_at(step, 0.95) for step in (0, 50, 100, 1000)] == pytest.approx([0.85, 0.9, 0.95, 0.95])


def test_a_step_with_infinite_gradients_is_left_out_as_the_scaler_wants():
    model = tiny.gpt(std=0.2)
    optimizer = make_optimizer(model, tiny.train_params(optimizer="muon"), "cpu", "float32")
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = tiny.weights(model)
    tokens = torch.from_numpy(tiny.tokens(8).reshape(1, 8).astype("int64"))
    scaler.scale(model(tokens, tokens)).backward()
    model.h[0].mlp.c_fc.weight.grad[0, 0] = torch.inf
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert tiny.same(tiny.weights(model), before)
    assert scaler.get_scale() == 2.0
