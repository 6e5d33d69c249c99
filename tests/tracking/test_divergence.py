import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.runs import end, make_attempt, start, train
from tracking.divergence import first_step, first_tensor, journal_of, model_of, ulps
from tracking.dvc_files import directory_md5
from tracking.journal import Journal


@pytest.mark.parametrize(
    ("first", "second", "distance"),
    [
        (1.0, 1.0, 0),
        (1.0, np.nextafter(np.float32(1), np.float32(2)), 1),
        (-1.0, np.nextafter(np.float32(-1), np.float32(0)), 1),
        (0.0, -0.0, 0),
        (np.float32(1e-45), np.float32(-1e-45), 2),
        (1.0, 2.0, 2**23),
    ],
)
def test_ulps_count_the_floats_between(first, second, distance):
    a, b = np.array([first], dtype=np.float32), np.array([second], dtype=np.float32)
    assert ulps(a, b).tolist() == ulps(b, a).tolist() == [distance]


def test_ulps_of_the_short_and_the_long_type():
    assert ulps(np.array([1.0], np.float16), np.array([np.nextafter(np.float16(1), np.float16(2))])).tolist() == [1]
    assert ulps(np.array([1.0]), np.array([np.nextafter(1.0, 2.0)])).tolist() == [1]


def steps(**changed):
    records = [{"step": step, "loss": 5 - step / 10, "grad_norm": 1.0, "lr": 1e-3} for step in (1, 2, 3)]
    for name, value in changed.items():
        records[1][name] = value
    return records


def test_the_first_step_that_differs_is_reported_with_its_value():
    assert first_step(steps(), steps()) == "the 3 steps that both have recorded are the same"
    above = float(np.nextafter(np.float32(1), np.float32(2)))
    assert first_step(steps(), steps(grad_norm=above)) == (
        f"first at step 2: grad_norm 1.0 -> {above!r} (1 ulp in float32)"
    )
    assert first_step(steps(), steps(loss=4.0)[2:]) == "the 1 steps that both have recorded are the same"
    assert first_step([], steps()) == "the expected steps are not recorded here"


def model(path: Path, **tensors: np.ndarray) -> Path:
    path.mkdir()
    save_file(tensors, path / "weights.safetensors")
    return path


def test_the_first_tensor_that_differs_is_reported(tmp_path):
    a, b = np.ones((2, 3), np.float32), np.zeros(4, np.float32)
    other = a.copy()
    other[1, 2] = np.nextafter(np.float32(1), np.float32(2))
    first = model(tmp_path / "first", b=b, a=a)
    assert first_tensor(first, model(tmp_path / "same", a=a, b=b)) == "all tensors are the same"
    line = "1 of 2 tensors differ, the first is a: 1 of 6 elements, by up to 1 ulp"
    assert first_tensor(first, model(tmp_path / "other", a=other, b=b)) == line
    line = "1 of 2 tensors differ, the first is b: float32(4,) -> float32(5,)"
    assert first_tensor(first, model(tmp_path / "shape", a=a, b=np.zeros(5, np.float32))) == line
    assert first_tensor(first, model(tmp_path / "names", a=a, c=b)) == "the names of tensors differ: b, c"


def test_the_expected_journal_and_model_are_found_by_the_models_hash(tmp_path):
    with Journal(make_attempt(tmp_path) / "journal.jsonl") as journal:
        start(journal)
        train(journal, 0, 5)
        end(journal, "FINISHED", 5, model_md5="ab.dir")
    assert [record["step"] for record in journal_of(tmp_path, "ab.dir")] == [1, 2, 3, 4, 5]
    assert journal_of(tmp_path, "cd.dir") == []

    folder = tmp_path / "copy"
    folder.mkdir()
    path = model(tmp_path / "model", a=np.ones(1, np.float32))
    md5 = directory_md5(path)
    assert model_of(tmp_path, md5, folder) == path
    path.rename(tmp_path / "away")
    assert model_of(tmp_path, md5, folder) is None
    cache = tmp_path / ".dvc/cache/files/md5"
    weights = (tmp_path / "away/weights.safetensors").read_bytes()
    for name, content in (
        (md5, json.dumps([{"md5": "0123", "relpath": "weights.safetensors"}]).encode()),
        ("0123", weights),
    ):
        (cache / name[:2]).mkdir(parents=True)
        (cache / name[:2] / name[2:]).write_bytes(content)
    assert model_of(tmp_path, md5, folder) == folder
    assert (folder / "weights.safetensors").read_bytes() == weights
