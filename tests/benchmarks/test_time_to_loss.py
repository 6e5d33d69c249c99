"""What time_to_loss tells beside the times, which a test does not take."""

from pathlib import Path

import pytest

from benchmarks.time_to_loss import draw, line, nanogpt_curve
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


def test_nanogpts_losses_are_read_as_it_tells_them(checkout: Path, monkeypatch: pytest.MonkeyPatch):  # noqa: F811
    monkeypatch.chdir(REPOSITORY)
    (checkout / "train.py").write_text(TRAIN)
    curve = nanogpt_curve(checkout, checkout.parent / "text.txt", threads=3)
    assert [loss for _, loss in curve] == [4.175, 3.501]
    assert 0 <= curve[0][0] <= curve[1][0]


def test_a_training_of_nanogpt_that_fails_is_told(checkout: Path, monkeypatch: pytest.MonkeyPatch):  # noqa: F811
    monkeypatch.chdir(REPOSITORY)
    (checkout / "train.py").write_text("raise SystemExit(3)")
    with pytest.raises(ValueError, match="exited with 3 after 0 evaluations"):
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
    assert line("1337", found).split() == ["1337", "1.4600", "58.2", "90.1", "800,000", "9,000,000", "400"]
