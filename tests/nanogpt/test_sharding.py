"""Four real processes over gloo that hold a training in shards, beside one that holds it whole."""

import json
import shutil

import pytest
import torch

from nanogpt import dry_run, sharding
from nanogpt.checkpoint import Checkpoints
from nanogpt.distributed import Ranks
from tests.nanogpt import sharded, tiny
from tracking.launch import launch


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("four")


@pytest.fixture(scope="module")
def four(folder):
    """What each of four processes found (tests/nanogpt/sharded.py); starting them takes most of the time."""
    assert launch(4, 0.0, "-m", "tests.nanogpt.sharded", str(folder)) == 0
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(4)]


@pytest.mark.parametrize("name", sharded.TRAININGS)
def test_losses_norms_and_scores_are_those_of_one_process_but_for_rounding(four, name, tmp_path):
    whole = sharded.Training(tmp_path, Ranks(), **sharded.TRAININGS[name]).to(sharded.STEPS)
    close = 2e-2 if "dtype" in sharded.TRAININGS[name] else 1e-5
    for found in four:
        for values, expected in zip(found["trained"][name], whole.values, strict=True):
            assert values == pytest.approx(expected, abs=close)
    assert len({json.dumps(found["trained"][name]) for found in four}) == 1


def test_a_stopped_training_continues_to_the_same_bits(four):
    assert [found["resumed"] for found in four] == [{"muon": True, "adamw": True}] * 4


def test_each_process_holds_a_quarter_of_weights_gradients_and_moments(four):
    for found in four:
        for name, (own, whole) in found["held"].items():
            assert own < 0.4 * whole, name
    assert sum(found["held"]["weights"][0] for found in four) == four[0]["held"]["weights"][1]


def test_the_model_in_shards_generates_the_tokens_of_the_whole_one(four):
    sharded_tokens, whole_tokens = four[0]["generated"]
    assert sharded_tokens == whole_tokens
    assert [found["generated"] for found in four] == [four[0]["generated"]] * 4


def test_each_matrix_has_one_owner(four):
    """Five matrices of six rows on four processes, of which the last one has no rows and the first one two matrices."""
    assert [found["owned"] for found in four] == [[2, True], [1, True], [1, True], [1, True]]


def test_a_checkpoint_in_shards_is_restored_whole_and_a_whole_one_in_shards(four):
    assert [found["restored"] for found in four] == [[True, True]] * 4


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_dry_run_without_the_others_shows_what_a_real_step_costs(four, optimizer):
    predicted = dry_run.costs(sharded.LARGER, sharded.larger(4, optimizer), tiny.numerics())
    for found in four:
        real = found["costs"][optimizer]
        if found is four[0] or optimizer == "adamw":  # with three layers, three processes own matrices
            assert real["sent"] == predicted["sent"]
        assert set(real["sent"]) == {"all_gather", "reduce_scatter", *(["all_to_all"] if optimizer == "muon" else [])}
        for name in ("weights", "gradients", "moments", "peak"):
            assert predicted[name] == pytest.approx(real[name], rel=0.15), name


@pytest.mark.parametrize("damage", [tiny.flip_bit, lambda shard: shard.unlink(), lambda shard: shard.write_bytes(b"")])
def test_a_checkpoint_with_a_damaged_shard_is_not_used(four, folder, tmp_path, damage):
    shutil.copytree(folder / "muon", tmp_path / "copy")
    checkpoints = Checkpoints(tmp_path / "copy", "run")
    _, newest = checkpoints.steps()
    damage(checkpoints.directory / f"step-{newest:08}" / "state" / "shard-00003-model-00001-of-00001.safetensors")
    told = []
    assert checkpoints.newest(told.append).progress.step == sharded.STOP
    assert "is damaged: its hash is wrong" in told[0]


def test_a_directory_that_a_process_does_not_share_is_reported(four):
    assert "train.parallel = fsdp needs a file system that all machines share" in four[1]["not shared"]


def test_alone_nothing_is_sharded(tmp_path):
    training = sharded.Training(tmp_path, Ranks(), optimizer="adamw")
    assert not training.state.sharded
    sharding.reshard(training.state.model)
    tensor = torch.ones(2)
    assert sharding.whole(tensor) is sharding.local(tensor) is tensor
