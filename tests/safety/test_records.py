"""Property tests of what resumes a training: journals, checkpoints, and DVC's own dvc.lock."""

import json
from pathlib import Path
from random import Random

import pytest
import torch

from nanogpt.checkpoint import Checkpoints
from nanogpt.files import sha256_json
from nanogpt.optimizer import make_optimizer
from nanogpt.train_state import Progress, TrainState
from tests.nanogpt import tiny
from tests.safety.hostile import TRIED, dumped, harmless, inputs, parsed, swapped
from tracking.dvc_files import DvcLock
from tracking.journal import Journal, read_records

LOCK = b"""schema: '2.0'
stages:
  train:
    cmd: exec python -m stages.train
    outs:
    - path: metrics/train.json
      hash: md5
      md5: c8bd6fd9ba5c0bd6a9e9ddfcd6a9e9dd
    - path: model
      hash: md5
      md5: 0123456789abcdef0123456789abcdef.dir
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "folder").mkdir()
    return tmp_path / "folder"


def test_journal(folder: Path) -> None:
    path = folder / "attempt-1" / "journal.jsonl"
    with Journal(path) as journal:
        journal.append("start", step=0, resumed=False)
        for step in (1, 2, 3):
            journal.append("step", step=step, loss=1 / step)
        journal.append("sample", step=3, prompt="é", text="a\nb")
    whole, written = path.read_bytes(), [record for record, _ in read_records(path)]

    with harmless("read_records", folder), harmless("Journal", folder):
        for data, _ in inputs(1000, whole):
            path.write_bytes(data)
            read = parsed("read_records", lambda: [record for record, _ in read_records(path)])
            if read is not None:
                assert read == written[: len(read)]
            journal = parsed("Journal", lambda: Journal(path))
            assert (journal is None) == (read is None)
            if journal is None:
                assert path.read_bytes() == data
            else:
                with journal:
                    journal.append("step", step=4, loss=0.1)
                    assert [record["step"] for record in journal.records()][-1] == 4


def saved(folder: Path) -> Path:
    model = tiny.gpt(n_layer=1)
    optimizer = make_optimizer(model, tiny.train_params(), "cpu", "float32")
    model(torch.zeros(1, 2, dtype=torch.long)).sum().backward()
    optimizer.step()
    position = {"bytes": 0, "crc": "00000000"}
    state = TrainState(model, optimizer, torch.amp.GradScaler("cpu", enabled=False), Progress(5))
    Checkpoints(folder, "a run").save(state, {"journal": position})
    return folder / "step-00000005"


@pytest.mark.parametrize("name", ["checkpoint.json", "state.safetensors"])
def test_checkpoint(folder: Path, name: str) -> None:
    """Also of a stranger who makes the hash of checkpoint.json anew."""
    path = saved(folder) / name
    whole, expected = path.read_bytes(), Checkpoints(folder, "a run").read(5)

    def rehashed(draw: Random) -> bytes:
        content = json.loads(whole)
        content.pop("meta_sha256")
        content = swapped(draw, content)
        return dumped({**content, "meta_sha256": sha256_json(content)})

    with harmless("Checkpoints.read", folder):
        for data, _ in inputs(500, whole, rehashed if name == "checkpoint.json" else whole):
            path.write_bytes(data)
            found = parsed("Checkpoints.read", lambda: Checkpoints(folder, "a run").read(5))
            if found is not None:
                assert found.progress.step == expected.progress.step
                assert type(found.progress) is type(expected.progress)


def test_lock(folder: Path) -> None:
    """The tolerant reader says the same of a whole one, and of another that it is empty."""
    path = folder / "dvc.lock"
    path.touch()

    with harmless("DvcLock", folder):
        for data, _ in inputs(250, LOCK):
            path.write_bytes(data)
            found = parsed("DvcLock", lambda: DvcLock.parse(path.read_text(encoding="utf-8", errors="surrogateescape")))
            assert DvcLock.of_workspace(folder) == (found or DvcLock())
    assert TRIED["DvcLock"][1] > 20
