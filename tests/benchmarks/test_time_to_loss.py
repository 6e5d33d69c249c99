"""What time_to_loss tells beside the times, which a test does not take."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import click
import pytest

from benchmarks.time_to_loss import draw, nanogpt_curve, row, set_params
from tests.benchmarks.test_against_nanogpt import checkout  # noqa: F401  (a fixture)
from tests.conftest import REPOSITORY

TRAIN = """
import os, sys
assert sys.argv[1] == "config/train_shakespeare_char.py" and "--n_layer=4" in sys.argv
print("tokens per iteration will be: 768")
print("number of parameters: 0.80M")
print("step 0: train loss 4.2, val loss 4.1750")
print("iter 0: loss 4.2, time 30.00ms, mfu -100.00%")
print(f"step 250: train loss 2.5, val loss {os.environ['OMP_NUM_THREADS']}.5010")
"""


def test_nanogpts_losses_are_read_as_it_tells_them(checkout: Path):  # noqa: F811
    (checkout / "train.py").write_text(TRAIN)
    curve = nanogpt_curve(checkout, checkout.parent / "text.txt", threads=3)
    assert [loss for _, loss in curve] == [4.175, 3.501]
    assert 0 <= curve[0][0] <= curve[1][0]


def test_a_training_of_nanogpt_that_fails_is_told(checkout: Path):  # noqa: F811
    (checkout / "train.py").write_text("raise SystemExit(3)")
    with pytest.raises(click.ClickException, match="exited with 3 after 0 evaluations"):
        nanogpt_curve(checkout, checkout.parent / "text.txt", threads=1)


def test_a_picture_has_a_line_of_each_run(tmp_path: Path):
    draw({"a": [[(0.0, 4.0), (9.0, 1.5)]] * 2, "b": [[(0.0, 4.1), (8.0, 2.0)]]}, 1.4697, tmp_path / "curves.svg")
    drawn = (tmp_path / "curves.svg").read_text()
    assert drawn.count("clip-path=") >= 4
    assert drawn == drawn.replace("<dc:date>", "")  # the same file whenever it is drawn


def test_a_row_stands_below_its_title():
    found = {
        "val_loss": 1.46,
        "train_seconds": 58.2,
        "total_seconds": 90.1,
        "tokens": 8e5,
        "parameters": 9e6,
        "steps": 400,
    }
    assert row("1337", found).split() == ["1337", "1.4600", "58.2", "90.1", "800,000", "9,000,000", "400"]


def test_values_are_set_on_top_of_the_preset(tmp_path: Path):
    from nanogpt.params import load_params
    from tracking.clean_clone import CouldNotRun

    shutil.copyfile(REPOSITORY / "params.yaml", tmp_path / "params.yaml")
    set_params(SimpleNamespace(path=tmp_path), ("train.seed=7", "numerics.threads=1"))
    params = load_params(tmp_path / "params.yaml")
    assert (params.train.seed, params.numerics.threads) == (7, 1)
    with pytest.raises(CouldNotRun, match=r"--set numerics\.thread=1 sets numerics\.thread, which params"):
        set_params(SimpleNamespace(path=tmp_path), ("numerics.thread=1",))
