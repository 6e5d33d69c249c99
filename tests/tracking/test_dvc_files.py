import os
import subprocess
from pathlib import Path

import pytest
from dvc.repo import Repo

from tracking.dvc_files import DvcLock, cache_path, directory_md5, dvc_process, stage_names

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


def test_the_hash_of_a_directory_equals_dvcs(repository):
    for name, files in (("all", FILES), ("one", {"model.json": b"{}"})):
        fill(Path(name), files)
        (stage,) = repository.add(name)
        assert directory_md5(Path(name)) == stage.outs[0].hash_info.value


def test_the_lock_that_dvc_writes_has_that_hash(repository):
    Path("dvc.yaml").write_text("stages:\n  train:\n    cmd: mkdir model && echo 1 > model/a\n    outs: [model]\n")
    repository.reproduce()
    lock = DvcLock.parse(Path("dvc.lock").read_text())
    assert lock.model_md5 == directory_md5(Path("model"))
    assert lock == DvcLock.of_workspace(Path())


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


def found(text):
    return DvcLock.parse_or_empty(text).model_md5


def test_a_lock_has_the_hash_of_each_out():
    lock = DvcLock.parse(LOCK)
    assert lock.model_md5 == MODEL
    assert lock.out_md5("train", "metrics/train.json") == METRICS
    assert lock.outs() == {
        "tokenize": {"data/tokens": "a" * 32 + ".dir"},
        "train": {"metrics/train.json": METRICS, "model": MODEL},
    }
    assert lock.stages["train"].deps == {"model": "b" * 32 + ".dir"}
    assert lock.stages["train"].params == {"params.yaml": {"train.learning_rate": 3e-3}}
    assert DvcLock.parse_or_empty(LOCK) == lock


@pytest.mark.parametrize(("stage", "out"), [("train", "data/tokens"), ("train", "mode"), ("evaluate", "model")])
def test_the_hash_of_an_unknown_out_is_none(stage, out):
    assert DvcLock.parse(LOCK).out_md5(stage, out) is None


def test_without_a_file_the_lock_is_empty(tmp_path):
    assert DvcLock.of_workspace(tmp_path) == DvcLock.parse_or_empty(None) == DvcLock()
    (tmp_path / "dvc.lock").mkdir()
    assert DvcLock.of_workspace(tmp_path) == DvcLock()


def test_a_lock_that_was_cut_off_has_the_hash_a_part_of_it_or_none():
    # DVC writes it in place, so a kill leaves any beginning of it.
    for length in range(len(LOCK)):
        md5 = found(LOCK[:length])
        assert md5 is None or MODEL.startswith(md5), LOCK[:length][-40:]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello",
        b"- 1",
        b"[1]",
        b"}{",
        b"schema: '2.0'\n",
        b"stages: 3",
        b"stages: {train: null}",
        b"stages: {train: {outs: null}}",
        b"stages: {train: {outs: [model]}}",
        b"stages: {train: {outs: [{path: model}]}}",
        b"stages: {train: {outs: [{md5: aa}]}}",
        b"stages: {train: {outs: [{path: model, md5: 11}]}}",
        b"stages: {train: {params: {params.yaml: 1}}}",
        b"<<<<<<< HEAD\nstages:\n=======\n",
        b"\xff\xfe\x00binary",
        b"a: \x00",
    ],
)
def test_a_text_that_is_no_lock_is_rejected_or_empty(tmp_path, content):
    (tmp_path / "dvc.lock").write_bytes(content)
    assert DvcLock.of_workspace(tmp_path) == DvcLock()
    text = content.decode(errors="replace")
    assert found(text) is None
    with pytest.raises(ValueError, match=r"dvc\.lock .*`git checkout (--ours )?dvc\.lock`") as caught:
        DvcLock.parse(text)
    assert "\n" not in str(caught.value)


def test_the_stages_of_a_dvc_yaml_are_in_its_order():
    assert stage_names("stages:\n  b: {cmd: x}\n  a: {cmd: y}\n") == ["b", "a"]
    with pytest.raises(ValueError, match=r"dvc\.yaml is empty"):
        stage_names("")


# --- the cache --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("files", [[], ["global"], ["repo"], ["local"], ["global", "repo", "local"]])
@pytest.mark.parametrize("place", ["{tmp}/{level}", "../{level}"])
def test_an_object_is_found_wherever_dvc_keeps_its_cache(repository, tmp_path, monkeypatch, files, place):
    monkeypatch.setenv("DVC_GLOBAL_CONFIG_DIR", str(tmp_path / "settings"))
    paths = {"global": "settings/config", "repo": ".dvc/config", "local": ".dvc/config.local"}
    (tmp_path / "settings").mkdir()
    for level in files:
        with (tmp_path / paths[level]).open("a") as file:
            file.write(f"[cache]\n    dir = {place.format(tmp=tmp_path, level=level)}\n")
    fill(Path("model"), FILES)
    with Repo() as repo:
        (stage,) = repo.add("model")
        odb = Path(repo.cache.repo.path)
    md5 = stage.outs[0].hash_info.value
    assert odb.is_relative_to(tmp_path)
    assert odb.parts[-3] == (files[-1] if files else "cache")
    assert cache_path(tmp_path, md5) == odb / md5[:2] / md5[2:]
    assert cache_path(tmp_path, md5).exists()


def test_a_damaged_configuration_is_reported_with_the_remedy(repository, tmp_path):
    (tmp_path / ".dvc/config").write_text("[cache\n")
    with pytest.raises(ValueError, match=r"DVC's configuration is damaged .*`dvc config --list` shows it"):
        cache_path(tmp_path, "0" * 32)


# --- the DVC that runs a stage ---------------------------------------------------------------------------------


def test_a_stage_knows_the_dvc_that_runs_it(monkeypatch):
    assert "DVC_STAGE" not in os.environ
    assert dvc_process() is None
    monkeypatch.setenv("DVC_STAGE", "train")
    assert dvc_process() == os.getppid()


def test_a_merge_conflict_in_dvc_lock_is_named_with_a_remedy_that_works(tmp_path):
    lock = "stages: {{train: {{deps: [], outs: [{{path: model, md5: {0}}}]}}}}\n"

    def git(*arguments, check=True):
        person = ("-c", "user.name=a", "-c", "user.email=b")
        subprocess.run(["git", *person, *arguments], cwd=tmp_path, check=check, capture_output=True)

    git("init", "-q", "-b", "main")
    for branch, md5 in (("main", "a"), ("other", "b"), ("main", "c")):
        git("checkout", "-q", *(("-b",) if branch == "other" else ()), branch, check=md5 != "a")
        (tmp_path / "dvc.lock").write_text(lock.format(md5))
        git("add", "dvc.lock")
        git("commit", "-qm", md5)
    git("merge", "other", check=False)
    with pytest.raises(ValueError, match=r"^dvc.lock holds a merge conflict; `git checkout --ours ") as error:
        DvcLock.parse((tmp_path / "dvc.lock").read_text())
    git(*str(error.value).split("`")[1].split()[1:])
    assert DvcLock.parse((tmp_path / "dvc.lock").read_text()).model_md5 == "c"
