import json
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.runs import make_attempt
from tools.__main__ import main
from tracking.dvc_files import path_md5


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    train = {"parameters": 1000, "tokens": 2000, "steps": 30}
    scores = {"val_loss": 1.5, "perplexity": 4.48, "bits_per_byte": 2.1, "train_loss": 1.4, "floor": 1.0, "excess": 0.5}
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics/train.json").write_text(json.dumps(train))
    (tmp_path / "metrics/evaluate.json").write_text(json.dumps(scores))
    (tmp_path / "dvc.lock").write_text(lock("a"))
    (tmp_path / "params.yaml").write_text("train:\n")
    git("init", "-q")
    git("add", "dvc.lock", "params.yaml")
    git("commit", "-qm", "1")
    return tmp_path


def lock(model: str, code: str = "c0") -> str:
    return f"stages: {{train: {{deps: [{{path: a.py, md5: {code}}}], outs: [{{path: model, md5: {model}}}]}}}}\n"


def git(*arguments: str) -> None:
    subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=b", *arguments], check=True)


def summary() -> str:
    return CliRunner().invoke(main, ["summary"], catch_exceptions=False).output


def test_it_shows_the_loss_the_excess_and_where_to_look(repository: Path) -> None:
    output = summary()
    for text in ("1.5000", "best possible  1.0000, so the excess is 0.5000", "samples/samples.md"):
        assert text in output
    assert "make ui" not in output  # a pulled result has no run here
    make_attempt(repository)
    assert "make ui" in summary()


def test_a_lock_as_committed_is_reported(repository: Path) -> None:
    assert "dvc.lock is the committed one" in summary()


def test_other_bits_from_the_same_code_and_params_are_reported_as_such(repository: Path) -> None:
    (repository / "dvc.lock").write_text(lock("b"))
    assert "dvc.lock DIFFERS from the committed one though code and params are the same" in summary()


def test_a_committed_lock_that_was_not_true_is_not_blamed_on_the_environment(repository: Path) -> None:
    old = lock("a").replace("outs:", "params: {params.yaml: {model: {n_layer: 2, n_head: 2}}}, outs:")
    (repository / "dvc.lock").write_text(old)
    (repository / "params.yaml").write_text("model: {n_layer: 3, n_head: 2}\n")
    git("commit", "-qam", "2")
    assert "dvc.lock was made before model.n_layer changed: `dvc repro` makes it true again" in summary()
    (repository / "dvc.lock").write_text(old.replace("n_layer: 2", "n_layer: 3").replace("md5: a", "md5: b"))
    assert "dvc.lock is new: the committed one was made before model.n_layer changed; `make golden`" in summary()
    (repository / "dvc.lock").write_text(lock("b", code="c1"))
    git("checkout", "-q", "HEAD~1", "--", "dvc.lock")
    git("commit", "-qm", "3")
    (repository / "dvc.lock").write_text(lock("b", code="c1"))
    assert "made before a.py changed" in summary()


def test_a_text_that_was_added_to_a_folder_of_inputs_is_named(repository: Path) -> None:
    (repository / "texts").mkdir()
    (repository / "texts/a.txt").write_text("a")
    folder = path_md5(Path("texts"))
    (repository / "dvc.lock").write_text(f"stages: {{download: {{deps: [{{path: texts, md5: {folder}}}], outs: []}}}}")
    git("add", ".")
    git("commit", "-qm", "2")
    assert "dvc.lock is the committed one" in summary()
    (repository / "texts/b.txt").write_text("b")
    assert "dvc.lock was made before texts changed: `dvc repro` makes it true again" in summary()


def test_the_result_of_another_commit_is_not_taken_for_that_of_the_lock(repository: Path) -> None:
    made = "metrics/evaluate.json"
    out = f"{{path: {made}, md5: {path_md5(Path(made))}}}"
    (repository / "dvc.lock").write_text(f"stages: {{evaluate: {{outs: [{out}]}}}}")
    git("commit", "-qam", "2")
    assert "dvc.lock is the committed one" in summary()
    (repository / made).write_text((repository / made).read_text().replace("1.5", "1.6"))
    assert "the result here is NOT that of dvc.lock: `dvc checkout`" in summary()


@pytest.mark.parametrize("stage", ["train", "sample"])
def test_a_damaged_part_of_the_result_is_named(repository: Path, stage: str) -> None:
    (repository / "made").mkdir()
    (repository / "made/weights").write_bytes(b"weights")
    out = f"{{path: made, md5: {path_md5(Path('made'))}}}"
    (repository / "dvc.lock").write_text(f"stages: {{{stage}: {{outs: [{out}]}}}}")
    git("commit", "-qam", "2")
    assert "dvc.lock is the committed one" in summary()
    (repository / "made/weights").write_bytes(b"weightz")
    assert summary().endswith("lacks it (made differs)\n")


def test_the_same_bits_of_other_code_are_reported_as_such(repository: Path) -> None:
    (repository / "dvc.lock").write_text(lock("a", code="c1"))
    assert "this result is bit for bit the committed one: commit dvc.lock" in summary()


def test_an_untracked_file_is_named_before_a_commit_that_no_clone_could_confirm(repository: Path) -> None:
    (repository / "texts").mkdir()
    (repository / "texts/kept.txt").touch()
    git("add", "texts")
    (repository / "dvc.lock").write_text(lock("a").replace("a.py", "texts"))
    git("commit", "-qam", "2")
    (repository / "texts/left over.txt").touch()
    changed = lock("a", code=path_md5(Path("texts"))).replace("a.py", "texts")
    (repository / "dvc.lock").write_text(changed)
    assert summary().splitlines()[-1] == (
        "dvc.lock depends on texts/left over.txt, which git does not track, so a clone lacks it: commit it too, or "
        "move it away and run `dvc repro`"
    )
    (repository / "texts/left over.txt").unlink()
    (repository / "dvc.lock").write_text(lock("a", code=path_md5(Path("texts"))).replace("a.py", "texts"))
    assert "commit dvc.lock" in summary()


def test_other_params_explain_another_lock(repository: Path) -> None:
    (repository / "dvc.lock").write_text(lock("b"))
    (repository / "params.yaml").write_text("train: {seed: 2}\n")
    assert "dvc.lock is new, as code or params differ" in summary()


def test_a_lock_that_was_never_committed_is_reported(repository: Path) -> None:
    git("rm", "-q", "--cached", "dvc.lock")
    git("commit", "-qm", "2")
    assert "dvc.lock is not committed yet" in summary()


def test_without_a_result_one_line_says_what_is_missing_and_what_makes_it(repository: Path) -> None:
    (repository / "metrics/evaluate.json").unlink()
    result = CliRunner().invoke(main, ["summary"])
    assert result.exit_code == 1
    remedy = "`dvc checkout` restores it (`dvc pull` from a remote), or `dvc repro` makes it"
    assert result.output == f"Error: summary: metrics/evaluate.json is missing; {remedy}\n"
