import os
from pathlib import Path

import pytest
from dvc.repo import Repo

from tracking.dvc_files import directory_md5, dvc_process, experiment_name, locked_md5

pytestmark = pytest.mark.filterwarnings("ignore:_NoneStep:DeprecationWarning")  # within DVC

FILES = {
    "weights.safetensors": b"\x00\x01\xff" * 1000,
    "model.json": b'{"a": 1}\r\n',
    "empty": b"",
    "a.b": b"sorts before a/b",
    "a/b": b"in a folder",
    "a/deep/er": b"further down",
    "Z": b"capital",
    "é €": b"not ASCII",
}


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """An empty DVC repository as the working directory, with no cache outside of it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path / "site"))
    monkeypatch.setenv("DVC_NO_ANALYTICS", "1")
    with Repo.init(str(tmp_path), no_scm=True) as repo:
        yield repo


def fill(directory, files):
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def test_the_hash_of_a_directory_is_dvcs(repository):
    for name, files in (("all", FILES), ("one", {"model.json": b"{}"})):
        fill(Path(name), files)
        (stage,) = repository.add(name)
        assert directory_md5(Path(name)) == stage.outs[0].hash_info.value


def test_the_lock_that_dvc_writes_holds_that_hash(repository):
    Path("dvc.yaml").write_text("stages:\n  train:\n    cmd: mkdir model && echo 1 > model/a\n    outs: [model]\n")
    repository.reproduce()
    assert locked_md5("train", "model") == directory_md5(Path("model"))


# --- dvc.lock ---------------------------------------------------------------------------------------------------------

MODEL, METRICS = "0123456789abcdef0123456789abcdef.dir", "fedcba9876543210fedcba9876543210"
LOCK = f"""schema: '2.0'
stages:
  tokenize:
    cmd: exec python -m stages.tokenize
    outs:
    - path: data/tokens
      hash: md5
      md5: aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa.dir
  train:
    cmd: exec python -m stages.train
    deps:
    - path: model
      hash: md5
      md5: bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb.dir
    params:
      params.yaml:
        train.learning_rate: 3e-3
    outs:
    - path: metrics/train.json
      hash: md5
      md5: {METRICS}
      size: 111
    - path: model
      hash: md5
      md5: {MODEL}
      size: 3252000
      nfiles: 3
"""


@pytest.fixture
def lock(tmp_path):
    path = tmp_path / "dvc.lock"

    def write(text):
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def test_a_lock_says_the_hash_of_each_out(lock):
    path = lock(LOCK)
    assert locked_md5("train", "model", path) == MODEL
    assert locked_md5("train", "metrics/train.json", path) == METRICS


@pytest.mark.parametrize(("stage", "out"), [("train", "data/tokens"), ("train", "mode"), ("evaluate", "model")])
def test_what_it_does_not_hold_is_none(lock, stage, out):
    assert locked_md5(stage, out, lock(LOCK)) is None


def test_without_a_lock_there_is_none(tmp_path):
    assert locked_md5("train", "model", tmp_path / "dvc.lock") is None
    assert locked_md5("train", "model", tmp_path) is None  # a directory


def test_a_lock_that_was_cut_anywhere_gives_the_hash_a_part_of_it_or_none(lock):
    # DVC writes it in place, so a kill leaves any beginning of it.
    for length in range(len(LOCK)):
        found = locked_md5("train", "model", lock(LOCK[:length]))
        assert found is None or MODEL.startswith(found), LOCK[:length][-40:]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "hello",
        "- 1",
        "stages: 3",
        "stages: {train: null}",
        "stages: {train: {outs: null}}",
        "stages: {train: {outs: [model]}}",
        "stages: {train: {outs: [{path: model}]}}",
        "stages: {train: {outs: [{md5: aa}]}}",
        "<<<<<<< HEAD\nstages:\n=======\n",
        b"\xff\xfe\x00binary",
        b"a: \x00",
    ],
)
def test_what_is_no_lock_gives_none(lock, content):
    assert locked_md5("train", "model", lock(content)) is None


# --- what DVC says in the environment ---------------------------------------------------------------------------------


def test_dvc_tells_its_stages_who_they_are(monkeypatch):
    assert "DVC_STAGE" not in os.environ
    assert (dvc_process(), experiment_name()) == (None, None)
    monkeypatch.setenv("DVC_STAGE", "train")
    assert (dvc_process(), experiment_name()) == (os.getppid(), None)
    monkeypatch.setenv("DVC_EXP_NAME", "wavy-tern")
    assert experiment_name() == "wavy-tern"
