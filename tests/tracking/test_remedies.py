"""Errors of the core reach the user together with the command that mends them."""

import errno
import pickle
from pathlib import Path

import pytest

from nanogpt.corpus.sources import write_corpus
from nanogpt.files import Damaged, Missing
from nanogpt.params import DownloadParams, load_params
from nanogpt.params_errors import ParamsError
from tests.conftest import committed_params
from tracking.errors import explain
from tracking.remedies import remedy


@pytest.fixture(autouse=True)
def workspace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("folder", "stage"), [("data/raw", "download"), ("data/tokens", "tokenize")])
def test_damaged_data_is_removed_first(folder, stage, tmp_path):
    for damaged in (Path(folder, "a.bin"), tmp_path / folder / "a.bin"):
        assert remedy(Damaged(damaged, "is cut off")) == (
            f"`rm -r {folder}` and `dvc checkout`, or make it again with `dvc repro -f {stage}`"
        )


def test_a_model_is_restored_from_the_cache_or_made_again():
    weights = Path("model/weights.safetensors")
    assert remedy(Damaged(weights, "is missing")) == "`dvc checkout` or `dvc repro` brings it back"
    weights.parent.mkdir()
    weights.touch()
    assert remedy(Damaged(weights, "is cut off")) == (
        "remove model and run `dvc checkout`, or `dvc repro` if DVC's cache has lost it too"
    )


def test_params_are_in_git(tmp_path):
    path = tmp_path / "params.yaml"
    with pytest.raises(Damaged) as caught:
        load_params(path)
    advice = f"`git diff {path}` shows what was lost, and `git checkout {path}` restores it"
    assert explain(caught.value) == f"{path} cannot be read (No such file or directory); {advice}"


def test_a_value_that_dvc_wrote_into_params_yaml_is_taken_back(tmp_path, monkeypatch):
    error = ParamsError("params.yaml: train.max_iters = 0 is invalid: input should be greater than 0")
    assert remedy(error) == ""  # the user wrote it
    monkeypatch.setenv("DVC_EXP_NAME", "wide")
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    assert remedy(error).startswith("`touch params.yaml && git checkout params.yaml` takes back what -S wrote there, ")
    monkeypatch.setenv("DVC_ROOT", str(tmp_path.parent))  # --temp and the queue write into another folder
    assert remedy(error) == ""


def test_every_other_file_has_a_remedy():
    assert remedy(Damaged(Path("inputs/pretrained/a/tokenizer.json"), "is cut off")) == (
        "restore it with `git checkout` or `dvc checkout`, or rerun the stage that makes it (`dvc repro -f`)"
    )


@pytest.mark.parametrize(
    ("source", "problem"),
    [("file:inputs/texts/*.txt", "no file matches inputs/texts/*.txt; correct download.source"),
     ("bin:/nowhere", "download.source = bin:/nowhere: /nowhere/train.bin cannot be read (No such file or directory); "
      "name the folder into which nanoGPT wrote train.bin and val.bin")],
)  # fmt: skip
def test_a_missing_text_may_be_untracked(source, problem):
    values = committed_params().download.model_dump()
    with pytest.raises(Missing) as caught:
        write_corpus(DownloadParams(**values | {"source": source}), Path("raw"))
    assert explain(caught.value) == (
        f"{problem}; under `dvc exp run --temp` and in the queue, untracked files are absent: "
        "commit them, or give an absolute path"
    )


@pytest.mark.parametrize("error", [ValueError("model.n_embd = 7"), KeyError("a"), OSError("as a library raises it")])
def test_an_error_that_names_its_remedy_is_not_changed(error):
    assert remedy(error) == ""
    assert explain(error) == str(error)


def test_an_error_of_the_system_gets_one_remedy():
    assert explain(OSError(errno.EROFS, "read-only")) == (
        f"[Errno {errno.EROFS}] read-only; make the file system writable and start again"
    )
    full = OSError(errno.ENOSPC, "the disk is full; free some space\nand start again")
    assert explain(full) == f"[Errno {errno.ENOSPC}] the disk is full; free some space and start again"


def test_damage_that_another_process_finds_arrives_complete():
    error = pickle.loads(pickle.dumps(Damaged(Path("data/raw/text.txt"), "is cut off")))
    assert (type(error), error.path, error.what) == (Damaged, Path("data/raw/text.txt"), "is cut off")
    assert str(error) == "data/raw/text.txt is cut off"
