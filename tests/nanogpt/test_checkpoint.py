import json
import shutil
from dataclasses import asdict

import pytest
import torch

from nanogpt.checkpoint import Checkpoints
from nanogpt.optimizer import make_optimizer
from nanogpt.train_state import Progress, TrainState
from tests.nanogpt import tiny

EXTRA = {"journal": {"bytes": 123, "crc": "0a1b2c3d"}}


class Trained:
    """A model with its optimizer and scaler after some steps."""

    def __init__(self, seed=0, steps=3, scaled=False, optimizer="adamw"):
        self.model = tiny.gpt(seed=seed)
        self.optimizer = make_optimizer(self.model, tiny.train_params(optimizer=optimizer), "cpu", "float32")
        self.scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=1024.0, growth_interval=2)
        for _ in range(steps):
            self.step()

    def step(self):
        x = torch.from_numpy(tiny.tokens(32, seed=7).reshape(4, 8).astype("int64"))
        self.scaler.scale(self.model(x, x.roll(-1))).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()

    def save(self, checkpoints, step, best_step=-1):
        progress = Progress(step=step, evaluated=step, val_loss=0.1, best_step=best_step, best_val_loss=1 / 3)
        return checkpoints.save(self.train_state(progress), EXTRA)

    def train_state(self, progress):
        return TrainState(self.model, self.optimizer, self.scaler, progress)

    def state(self):
        entries = {
            f"{group}/{i}/{name}": tensor.clone()
            for group, members in enumerate(self.optimizer.param_groups)
            for i, parameter in enumerate(members["params"])
            for name, tensor in self.optimizer.state[parameter].items()
        }
        return tiny.weights(self.model) | entries


@pytest.fixture
def checkpoints(tmp_path):
    return Checkpoints(tmp_path / "checkpoints", "run")


@pytest.fixture
def saved(checkpoints):
    """Steps 10, 20 and 30, of which 10 is the best."""
    trained = Trained()
    for step in (10, 20, 30):
        trained.step()
        trained.save(checkpoints, step, best_step=10)
    return checkpoints


def steps(checkpoints):
    return sorted(path.name for path in checkpoints.directory.iterdir())


def must_be_whole(message):
    raise AssertionError(message)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("done", [0, 3])
def test_what_is_restored_is_what_was_saved_and_goes_on_the_same_way(checkpoints, done, scaled):
    first, second = Trained(steps=done, scaled=scaled), Trained(seed=9, steps=1)
    second.scaler = torch.amp.GradScaler("cpu", enabled=scaled)
    first.save(checkpoints, 5)
    checkpoint = checkpoints.newest(must_be_whole)
    restored = second.train_state(Progress())
    checkpoint.restore(restored)
    assert restored.progress == checkpoint.progress
    assert second.scaler.state_dict() == first.scaler.state_dict()
    for _ in range(3):
        assert tiny.same(second.state(), first.state())
        first.step()
        second.step()


def test_progress_and_what_observers_keep_come_back_exactly(checkpoints):
    Trained().save(checkpoints, 5, best_step=2)
    checkpoint = checkpoints.newest(must_be_whole)
    assert checkpoint.progress == Progress(step=5, evaluated=5, val_loss=0.1, best_step=2, best_val_loss=1 / 3)
    assert checkpoint.extra == EXTRA


def test_before_the_first_evaluation_the_best_loss_is_infinite_and_survives(checkpoints):
    trained = Trained()
    checkpoints.save(trained.train_state(Progress(step=1)), EXTRA)
    assert checkpoints.newest(must_be_whole).progress == Progress(step=1)


def test_weights_alone_can_be_loaded(checkpoints):
    first, other = Trained(), tiny.gpt(seed=9)
    first.save(checkpoints, 5)
    other.load_state_dict(checkpoints.read(5).weights())
    assert tiny.same(tiny.weights(other), tiny.weights(first.model))


def test_the_same_state_is_the_same_bytes(tmp_path):
    for name in "ab":
        assert Trained().save(Checkpoints(tmp_path / name, "run"), 5) == Trained().save(
            Checkpoints(tmp_path / "c", "run"), 5
        )
    assert tiny.contents(tmp_path / "a") == tiny.contents(tmp_path / "b")


def test_the_two_newest_and_the_best_are_kept_and_nothing_else(saved):
    assert steps(saved) == ["step-00000010", "step-00000020", "step-00000030"]
    Trained().save(saved, 40, best_step=10)
    assert steps(saved) == ["step-00000010", "step-00000030", "step-00000040"]
    Trained().save(saved, 50, best_step=50)
    assert steps(saved) == ["step-00000040", "step-00000050"]
    assert all(len(list(path.iterdir())) == 2 for path in saved.directory.iterdir())


def test_a_step_saved_again_replaces_itself(saved):
    other = Trained(seed=4)
    other.save(saved, 30, best_step=10)
    assert len(steps(saved)) == 3
    again = tiny.gpt()
    again.load_state_dict(saved.read(30).weights())
    assert tiny.same(tiny.weights(again), tiny.weights(other.model))


# --- damage -----------------------------------------------------------------------------------------------------------


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


def swap(path, other):
    spare = path.with_name("spare")
    path.rename(spare)
    other.rename(path)
    spare.rename(other)


DAMAGES = {
    "truncated": lambda newest: cut(newest / "state.safetensors"),
    "a bit flipped in the tensors": lambda newest: tiny.flip_bit(newest / "state.safetensors"),
    "a bit flipped in the header": lambda newest: tiny.flip_bit(newest / "state.safetensors", 20),
    "emptied": lambda newest: (newest / "state.safetensors").write_bytes(b""),
    "state missing": lambda newest: (newest / "state.safetensors").unlink(),
    "json missing": lambda newest: (newest / "checkpoint.json").unlink(),
    "json emptied": lambda newest: (newest / "checkpoint.json").write_bytes(b""),
    "json truncated": lambda newest: cut(newest / "checkpoint.json"),
    "json not UTF-8": lambda newest: tiny.flip_bit(newest / "checkpoint.json", bit=7),
    "json a list": lambda newest: (newest / "checkpoint.json").write_text("[]"),
    "json without its progress": lambda newest: tiny.edit_json(newest / "checkpoint.json", progress=None),
    "progress of another kind": lambda newest: tiny.edit_json(newest / "checkpoint.json", progress={"stop": 30}),
    "emptied directory": lambda newest: [path.unlink() for path in newest.iterdir()],
    "tensors swapped": lambda newest: swap(
        newest / "state.safetensors", newest.with_name("step-00000020") / "state.safetensors"
    ),
    "all swapped": lambda newest: swap(newest, newest.with_name("step-00000020")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_is_reported_removed_and_passed_over(saved, damage):
    DAMAGES[damage](saved.directory / "step-00000030")
    told = []
    found = saved.newest(told.append)
    healthy = 10 if "swapped" in damage else 20
    assert found.progress.step == healthy
    assert len(told) == (30 - healthy) // 10
    assert "step-00000030" in told[0]
    assert not (saved.directory / "step-00000030").exists()
    assert saved.newest(must_be_whole).progress.step == healthy


def test_when_all_are_damaged_there_is_none(saved):
    for path in saved.directory.iterdir():
        cut(path / "state.safetensors")
    told = []
    assert saved.newest(told.append) is None
    assert len(told) == 3
    assert steps(saved) == []


def test_without_a_directory_there_is_none(checkpoints):
    assert checkpoints.newest(must_be_whole) is None


def test_reading_a_step_that_is_missing_names_it(saved):
    with pytest.raises(ValueError, match="step-00000077 cannot be read"):
        saved.read(77)


def test_no_flipped_bit_of_the_json_goes_unnoticed(saved):
    path = saved.directory / "step-00000030" / "checkpoint.json"
    whole, expected = path.read_bytes(), saved.read(30)
    unnoticed = []
    for position in range(len(whole)):
        for bit in {0, 5, position % 8}:  # 0 changes a digit, 5 the case of a letter
            tiny.flip_bit(path, position, bit)
            try:
                found = saved.read(30)
            except ValueError:
                pass
            else:
                if (asdict(found.progress), found.extra, found.scaler) != (
                    asdict(expected.progress),
                    expected.extra,
                    expected.scaler,
                ):
                    unnoticed.append(path.read_bytes()[position - 15 : position + 5])
            path.write_bytes(whole)
    assert not unnoticed, f"{len(unnoticed)} flips change what is restored, such as {unnoticed[:3]}"


# --- writing ----------------------------------------------------------------------------------------------------------


def test_a_full_disk_is_an_oserror_and_costs_nothing_that_was_there(saved):
    before = tiny.contents(saved.directory)
    with tiny.full_disk(), pytest.raises(OSError, match=r"disk is full.*free some space"):
        Trained().save(saved, 40, best_step=40)
    assert tiny.contents(saved.directory) == before
    assert len(steps(saved)) == 3


def test_what_a_kill_in_the_middle_of_saving_left_is_no_checkpoint_and_is_cleaned_up(saved):
    # As `replacing` leaves it when the process is killed: a GPT-2 would lose 1.5 GB of disk each time.
    leftover = saved.directory / ".step-00000040.abcd1234.tmp" / "step-00000040"
    shutil.copytree(saved.directory / "step-00000030", leftover)
    assert saved.newest(must_be_whole).progress.step == 30
    Trained().save(saved, 40, best_step=10)
    assert steps(saved) == ["step-00000010", "step-00000030", "step-00000040"]


def test_the_files_hold_no_times_and_no_paths(saved):
    meta = json.loads((saved.directory / "step-00000030" / "checkpoint.json").read_text())
    assert set(meta) <= {"run", "progress", "extra", "scaler", "sha256", "meta_sha256"}
    assert str(saved.directory).encode() not in (saved.directory / "step-00000030" / "state.safetensors").read_bytes()


def test_another_runs_checkpoint_is_reported_removed_and_passed_over(saved, tmp_path):
    others = Checkpoints(tmp_path / "others", "another run")
    Trained().save(others, 40)
    others._path(40).rename(saved._path(40))
    told = []
    assert saved.newest(told.append).progress.step == 30
    assert told == [f"checkpoint {saved._path(40)} belongs to another run"]
    assert not saved._path(40).exists()
