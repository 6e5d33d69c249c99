import pytest

from nanogpt.dial import rung
from nanogpt.gpt_config import GPTConfig
from nanogpt.model import GPT
from nanogpt.params import Params, load_params, with_values
from nanogpt.sizing import multiplied
from tests.conftest import BUILT_IN

PARAMS = load_params(BUILT_IN)
OWN = PARAMS.train.max_iters * PARAMS.train.batch_size * PARAMS.model.block_size  # tokens


def base(**values: object) -> Params:
    named = {key.replace("__", "."): value for key, value in values.items()}
    return with_values(PARAMS, named)


def test_the_experiment_itself_is_a_setting_of_the_dial():
    params = base()
    found = rung(params, 1, OWN, 1024)
    assert with_values(params, found.overrides) == with_values(params, {"train.publish": "last"})
    assert found.tokens == OWN


def test_depth_keeps_the_shape_and_the_size_of_a_head():
    found = rung(base(), 3, OWN, 1024)
    shape = {key: found.overrides[f"model.{key}"] for key in ("n_layer", "n_head", "n_embd")}
    assert shape == {"n_layer": 3, "n_head": 6, "n_embd": 288}
    assert found.overrides["train.learning_rate"] == pytest.approx(PARAMS.train.learning_rate / 3**0.5, rel=1e-3)
    assert found.overrides["train.muon_learning_rate"] == 0.025
    assert found.parameters == 12 * 3 * 288**2 + 1024 * 288


def test_longer_trainings_have_larger_steps_and_higher_learning_rates():
    found = rung(base(train__warmup_iters=60, train__lr_decay_iters=300, train__min_lr=1e-3), 1, 8 * OWN, 1024)
    values = {key.removeprefix("train."): value for key, value in found.overrides.items() if key.startswith("train.")}
    assert values["batch_size"] == 9  # 4 x 8^0.38
    assert values["max_iters"] == round(8 * OWN / (9 * 256))
    assert values["learning_rate"] == pytest.approx(1.5 * PARAMS.train.learning_rate)
    assert values["min_lr"] == pytest.approx(1.5e-3)
    assert values["muon_learning_rate"] == pytest.approx(0.0375)
    share = values["max_iters"] / PARAMS.train.max_iters
    assert values["warmup_iters"] == round(60 * share)
    assert values["lr_decay_iters"] == round(300 * share)
    evaluations = PARAMS.train.max_iters / PARAMS.train.eval_interval
    assert values["max_iters"] / values["eval_interval"] == pytest.approx(evaluations, rel=0.01)
    assert found.tokens == pytest.approx(8 * OWN, rel=1e-3)


def test_n_counts_the_weights_that_are_multiplied():
    for tied in (True, False):
        config = GPTConfig(2, 2, 32, 16, 300, bias=False, norm="rmsnorm", position="rotary", tie_embeddings=tied)
        embedding = 0 if tied else 300 * 32  # a tied one is the head as well
        assert multiplied(config) == GPT(config).parameter_count() - embedding


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train__eval_only": True}, "train.eval_only = true rules out the sizes of a dial; set it to false"),
        ({"train__patience": 3}, "train.patience = 3 rules out the sizes of a dial; set it to null"),
        ({"train__init_from": "gpt2"}, "train.init_from = gpt2 rules out the sizes of a dial; set it to scratch"),
    ],
)
def test_what_has_no_sizes_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        rung(base(**values), 2, OWN, 1024)
