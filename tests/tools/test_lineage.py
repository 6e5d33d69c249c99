import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from ruamel.yaml import YAML

from nanogpt.files import sha256_tree
from tests.runs import end, make_attempt, start, write_report
from tools.__main__ import main
from tools.lineage import lines
from tracking.dvc_files import cache_path, directory_md5
from tracking.history import holders
from tracking.journal import Journal
from tracking.mlflow_run import Replica, deliver_report
from tracking.mlflow_server import resolve_uri
from tracking.run import Run

A, B = "a" * 7, "b" * 7  # beginnings of hashes


def sha256(prefix: str) -> str:
    return prefix.ljust(64, "0")


def md5(prefix: str) -> str:
    return f"{prefix.ljust(32, '1')}.dir"


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with one commit that has code, params and a text, but has never trained."""
    root = tmp_path / "repository"
    root.mkdir()
    for name in [name for name in os.environ if name.startswith(("GIT_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    for who in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{who}_NAME", "test")
        monkeypatch.setenv(f"GIT_{who}_EMAIL", "test@example.org")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("DVC_ROOT", str(root))
    monkeypatch.chdir(root)
    (root / "inputs/texts").mkdir(parents=True)
    files = {"dvc.yaml": "stages: {}\n", "code.py": "1\n", "inputs/texts/a.txt": "A\n", "inputs/texts/b.txt": "B\n"}
    files |= {".gitignore": "/.runs/\n/model/\n"}
    files |= {"params.yaml": "download:\n  source: grammar\ntrain:\n  seed: 1\nruntime:\n  device: auto\n"}
    for name, text in files.items():
        (root / name).write_text(text)
    git("init", "--quiet", "--initial-branch", "main")
    commit("Code")
    return root


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], check=True, capture_output=True, text=True).stdout.strip()


def commit(message: str) -> str:
    git("add", "--all")
    git("commit", "--quiet", "--allow-empty", "--message", message)
    return git("rev-parse", "HEAD")


def write_lock(model: str, other: str = md5("e")) -> None:
    """Writes dvc.lock as if the pipeline had just run: `model` is an out of train, `other` of evaluate."""
    params = YAML(typ="safe").load(Path("params.yaml").read_text())
    raw, tokens = {"path": "data/raw", "md5": md5("d")}, {"path": "data/tokens", "md5": md5("c")}
    lock = {
        "download": {
            "deps": [{"path": "inputs/texts", "md5": directory_md5(Path("inputs/texts"))}],
            "params": {"params.yaml": {"download": params["download"]}},
            "outs": [raw],
        },
        "tokenize": {"deps": [raw], "outs": [tokens]},
        "train": {
            "deps": [tokens, {"path": "code.py", "md5": hashlib.md5(Path("code.py").read_bytes()).hexdigest()}],
            "params": {"params.yaml": {"train": params["train"]}},
            "outs": [{"path": "model", "md5": model}],
        },
        "evaluate": {"deps": [{"path": "model", "md5": model}], "outs": [{"path": "other", "md5": other}]},
    }
    with Path("dvc.lock").open("w") as file:
        YAML(typ="safe").dump({"schema": "2.0", "stages": lock}, file)


def commit_result(model: str, message: str = "Result") -> str:
    write_lock(model)
    return commit(message)


def train(name: str, prefix: str, status: str = "FINISHED", started: int = 1, **tags: str) -> Path:
    """Makes a run whose model has hashes that begin with `prefix`."""
    known = {"git.commit": git("rev-parse", "HEAD"), "git.dirty": "false", "dvc.experiment": "none"}
    attempt = make_attempt(Path.cwd(), name, tags=known | {"code.sha256": "c0de"} | tags, started=started)
    result = {"model_sha256": sha256(prefix), "model_md5": md5(prefix)} if status == "FINISHED" else {}
    with Journal(attempt / "journal.jsonl") as journal:
        start(journal)
        end(journal, status, 40, **result)
    return attempt


def lineage(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["lineage", *arguments], catch_exceptions=False)


def described(*arguments: str) -> dict[str, Any]:
    done = lineage(*arguments, "--json")
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def fails(argument: str) -> str:
    done = lineage(argument)
    assert done.exit_code == 1
    assert done.output.startswith("Error: lineage: ")
    assert len(done.output.splitlines()) == 1
    return done.output


# --- what the argument may be


@pytest.mark.parametrize("argument", [sha256(A), sha256(A)[:7], md5(A), md5(A)[:32], md5(A)[:9], "the run", "wide"])
def test_a_hash_or_its_beginning_or_a_name_leads_to_run_and_commit(repository: Path, argument: str) -> None:
    trained_at = git("rev-parse", "HEAD")
    train("the run", A, **{"dvc.experiment": "wide"})
    train("another", B)
    kept = commit_result(md5(A))
    found = described(argument)
    assert found["model"] == {"sha256": sha256(A), "md5": md5(A)}
    assert (found["run"]["name"], found["run"]["git.commit"]) == ("the run", trained_at)
    assert found["run"]["source"] == [f"journal {Path('.runs/the run/attempt-1')}"]
    assert found["commit"] == {"id": kept, "kind": "commit", "name": f"{kept[:7]} main"}
    assert found["code"] == {"sha256": "c0de"}
    assert found["data"] == {"md5": md5("d")}
    assert found["tokens"]["md5"] == md5("c")
    assert f"git checkout --quiet {kept}" in found["commands"]


@pytest.mark.parametrize("argument", ["model", "./model", "model/"])
def test_before_any_run_it_says_what_makes_the_model(repository: Path, argument: str) -> None:
    assert fails(argument).endswith("it has no model.json; `dvc repro train` makes it\n")
    write_lock(md5(A))
    assert fails(argument).endswith("it has no model.json; `dvc repro train` makes it\n")  # nor is it in the cache
    cache_path(repository, md5(A)).mkdir(parents=True)
    assert fails(argument).endswith("it has no model.json; `dvc checkout model` restores it\n")


def test_an_experiment_whose_stages_all_came_from_the_cache_leads_to_the_run_that_trained(repository: Path) -> None:
    train("the run", A)
    kept = commit_result(md5(A))
    (repository / "params.yaml").write_text((repository / "params.yaml").read_text() + "sample:\n  seed: 2\n")
    again = commit("dvc: commit experiment")
    git("update-ref", f"refs/exps/{kept[:2]}/{kept[2:]}/again", again)
    git("reset", "--quiet", "--hard", kept)
    found = described("again")
    assert found["run"]["name"] == "the run"
    assert (found["model"]["md5"], found["commit"]["id"]) == (md5(A), kept)


def test_a_commit_leads_to_the_model_of_its_lock(repository: Path) -> None:
    train("the run", A)
    assert "has no model in its dvc.lock; `git log -- dvc.lock`" in fails("HEAD")
    kept = commit_result(md5(A))
    (repository / "notes.txt").touch()
    later = commit("another change, the same model")
    for argument in (kept, kept[:7], "HEAD~1", later, "main"):
        found = described(argument)
        assert (found["run"]["name"], found["commit"]["id"]) == ("the run", kept)
    first, *_, last = lines(repository, found)["kept by"]
    assert (first, last) == (f"{kept} (main)", f"unchanged at {later}")
    commit_result(md5(B))
    again = commit_result(md5(A))
    assert lines(repository, described(again))["kept by"][-1] == f"restored by {again[:7]} (main)"


def test_a_model_directory_leads_to_its_run(repository: Path) -> None:
    model = repository / "model"
    model.mkdir()
    (model / "model.json").write_text("{}")
    attempt = make_attempt(repository, "made", tags={"git.commit": git("rev-parse", "HEAD"), "git.dirty": "false"})
    with Journal(attempt / "journal.jsonl") as journal:
        end(journal, "FINISHED", 1, model_sha256=sha256_tree(model), model_md5=directory_md5(model))
    for argument in ("model", str(model), "./model/", "model/model.json"):
        assert described(argument)["run"]["name"] == "made"
    (model / "weights.safetensors").write_text("others")
    assert re.search(r"no run and no commit has this model .*`dvc status model`", fails("model"))
    (model / "model.json").unlink()
    assert "model is not a model directory: it has no model.json" in fails("model")


def test_a_beginning_that_several_models_share_is_refused_with_their_hashes(repository: Path) -> None:
    train("one", A + "1")
    train("two", A + "2")
    message = fails(A)
    assert sha256(A + "1") in message
    assert sha256(A + "2") in message
    assert "give more of the hash" in message
    assert described(A + "2")["run"]["name"] == "two"


def test_an_unknown_argument_is_reported_with_what_was_searched(repository: Path) -> None:
    message = fails("0123456789")
    for place in ("run ids", "journals", "dvc.lock in all of git's history", "model/", "git fetch", "mlflow.db"):
        assert place in message
    assert "7 or more" in fails("01234")


def test_a_name_that_several_runs_have_is_refused(repository: Path) -> None:
    for folder in ("one", "two"):
        train(folder, A)
        path = repository / ".runs" / folder / "attempt-1/run.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"name": "same"}))
    assert re.search(r"2 runs are named 'same': \.runs/one/attempt-1, \.runs/two/attempt-1; give", fails("same"))


def test_it_must_be_started_in_the_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    assert "start this in the root of the repository" in fails(A)


# --- which commit


def test_a_hash_elsewhere_in_dvc_lock_is_no_model(repository: Path) -> None:
    write_lock(md5(A), other=md5(B))
    commit("Result")
    assert "no run, model, experiment or commit is called" in fails(md5(B))
    assert described(md5(A))["commit"]["kind"] == "commit"


def test_a_commit_is_preferred_to_an_experiment_and_the_oldest_commit_to_later_ones(repository: Path) -> None:
    experiment = commit_result(md5(A), "dvc: commit experiment")
    name = f"refs/exps/{'1' * 2}/{'2' * 38}/tried"
    git("update-ref", name, experiment)
    git("reset", "--quiet", "--hard", "HEAD~1")
    found = described(md5(A))
    assert found["commit"] == {"id": experiment, "kind": "experiment", "name": f"{experiment[:7]} experiment tried"}
    assert f"git fetch --quiet origin {name}:{name}" in found["commands"]

    (repository / "notes").write_text("before")
    first = commit_result(md5(A))
    commit_result(md5(B), "Another")
    again = commit_result(md5(A), "Back")
    found = described(md5(A))
    assert found["commit"]["id"] == first
    assert found["also"] == [f"{again[:7]} main", f"{experiment[:7]} experiment tried"]
    assert not [command for command in found["commands"] if "fetch" in command]
    assert described(md5(B))["also"] == []


def test_a_model_that_only_a_merge_holds_is_found(repository: Path) -> None:
    git("checkout", "--quiet", "-b", "side")
    commit_result(md5("c"), "Side")
    git("checkout", "--quiet", "main")
    commit_result(md5("d"), "Main")
    subprocess.run(["git", "merge", "--no-edit", "side"], capture_output=True, check=False)
    merge = commit_result(md5(A), "Merge")
    assert len(git("rev-list", "--parents", "-n1", merge).split()) == 3
    commit("Later")
    assert [holder.commit for holder in holders(repository, md5(A))] == [merge]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda: Path("code.py").write_text("2\n"), "code.py"),
        (lambda: Path("params.yaml").write_text("download: {source: grammar}\ntrain: {seed: 2}\n"), "train.seed"),
        (lambda: Path("inputs/texts/a.txt").write_text("C\n"), "inputs/texts"),
    ],
)
def test_a_commit_whose_dvc_lock_was_made_by_something_else_is_not_trusted(
    repository: Path, change: Callable[[], object], named: str
) -> None:
    write_lock(md5(A))
    change()
    stale = commit("A result with another input")
    found = described(md5(A))
    assert found["commit"]["id"] == stale
    assert f"in this commit, {named} does not match dvc.lock: expect another model" in found["notes"]

    git("reset", "--quiet", "--hard", "HEAD~1")
    fits = commit_result(md5(A), "The true one")
    git("branch", "stale", stale)
    assert [holder.commit for holder in holders(repository, md5(A))] == [fits, stale]


def test_a_commit_that_no_clone_brings_is_fetched_by_its_hash(repository: Path, tmp_path: Path) -> None:
    lost = commit_result(md5(A), "Taken back")
    git("reset", "--quiet", "--hard", "HEAD~1")
    train("run", A, **{"git.commit": lost})
    found = described(sha256(A))
    assert found["commit"] is None
    commands = found["commands"]
    assert f"git fetch --quiet origin {lost}" in commands
    until = commands.index(f"git checkout --quiet {lost}") + 1
    subprocess.run(["bash", "-ec", "\n".join(commands[:until])], check=True)
    cloned = tmp_path / f"model-{md5(A)[:8]}"
    assert subprocess.check_output(["git", "-C", cloned, "rev-parse", "HEAD"], text=True).strip() == lost


def test_a_commit_that_is_not_here_leaves_no_way_back(repository: Path) -> None:
    train("run", A, **{"git.commit": "f" * 40})
    done = lineage(sha256(A))
    assert "no way to make it again is known" in done.output
    assert (
        "unknown: no dvc.lock in git's history contains the model, and the run's commit (ffffffffffff)" in done.output
    )


def test_a_dvc_lock_that_is_not_committed_yet_shows_the_data(repository: Path) -> None:
    write_lock(md5(A))
    train("run", A)
    found = described(md5(A))
    assert found["commit"] is None
    assert found["data"] == {"md5": md5("d")}
    assert f"git checkout --quiet {git('rev-parse', 'HEAD')}" in found["commands"]


# --- which run


def test_the_clean_run_is_preferred_then_the_oldest_and_the_others_are_named(repository: Path) -> None:
    train("dirty", A, started=1, **{"git.dirty": "true"})
    train("later", A, started=3)
    train("first", A, started=2)
    found = described(sha256(A))
    assert found["run"]["name"] == "first"
    assert sorted(found["twins"]) == [".runs/dirty/attempt-1", ".runs/later/attempt-1"]


def test_a_run_that_failed_has_no_model_but_a_lineage(repository: Path) -> None:
    train("failed", A, status="FAILED")
    found = described("failed")
    assert found["model"] == {"sha256": "none: the run is FAILED", "md5": "none: the run is FAILED"}
    assert found["commands"][-1] == "dvc repro train"


def test_a_run_that_has_not_finished_says_so(repository: Path) -> None:
    attempt = make_attempt(repository, "young", tags={"git.commit": "none"})
    with Journal(attempt / "journal.jsonl") as journal:
        start(journal)
    assert described("young")["model"]["sha256"] == "none: the run is not finished"


def test_without_a_run_dvc_lock_shows_what_it_has(repository: Path) -> None:
    commit_result(md5(A))
    done = lineage(md5(A))
    assert "run            unknown: neither MLflow nor .runs has a run of this model" in done.output
    assert "sha256 unknown: no run recorded it" in done.output
    assert "train: seed=1" in done.output
    assert "environment    unknown: no run recorded it" in done.output


def test_uncommitted_changes_are_applied_and_what_is_not_whole_is_refused(repository: Path) -> None:
    attempt = train("dirty", A, **{"git.dirty": "true"})
    assert (
        "unknown: there were uncommitted changes, but their uncommitted.diff is missing" in described("dirty")["notes"]
    )
    diff = attempt / "artifacts" / "uncommitted.diff"
    diff.write_text("diff --git a/code.py b/code.py\n--- a/code.py\n+++ b/code.py\n@@ -1 +1 @@\n-1\n+2\n")
    found = described("dirty")
    assert f"git apply '{diff}'" in found["commands"] or f"git apply {diff}" in found["commands"]
    assert any("files that git did not track were not recorded" in note for note in found["notes"])
    diff.write_text(diff.read_text() + "\n[cut: 2,000,000 characters in all]\n")
    assert described("dirty")["commands"] == []
    diff.write_text("# not kept, because it is not part of the experiment: .dvc/config\n")
    assert not any("git apply" in command for command in described("dirty")["commands"])
    diff.write_text("Binary files a/x and b/x differ\n")
    assert any("binary files had changed" in note for note in described("dirty")["notes"])


@pytest.mark.parametrize(
    ("params", "note"),
    [
        (
            {"download.source": "file:inputs/texts/a.txt"},
            "download.source is file:inputs/texts/a.txt: the text must be available",
        ),
        ({"download.source": "shakespeare"}, "download.source is shakespeare: the text must be available"),
        ({"numerics.determinism": "off"}, "numerics.determinism is off, which does not promise the same bits"),
        ({"numerics.determinism": "machine"}, "which needs the same kind of machine"),
    ],
)
def test_what_the_commands_cannot_promise_is_noted(repository: Path, params: dict[str, str], note: str) -> None:
    train("run", A)
    path = repository / ".runs/run/attempt-1/run.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"params": {"download.source": "grammar"} | params}))
    assert [line for line in described("run")["notes"] if note in line]
    commit_result(md5(A))
    of_git = params.get("download.source", "").startswith("file:")  # its hash is in dvc.lock, and was compared
    assert bool([line for line in described("run")["notes"] if note in line]) is not of_git


def test_another_environment_is_reported_line_by_line(repository: Path) -> None:
    train("run", A)
    output = lineage("run").output
    assert re.search(r"^environment +python 3\.11\n +python 3\.11 -> 3\.\d+\.\d+\S* here\n", output, re.MULTILINE)
    assert "the same bits are promised only in the environment of constraints.txt" in output


def test_a_damaged_run_is_passed_over_with_a_warning(repository: Path) -> None:
    train("good", A)
    (train("bad", B) / "run.json").write_text("{")
    done = lineage("good")
    assert done.exit_code == 0
    assert ".runs/bad/attempt-1 is damaged (JSONDecodeError" in done.stderr


# --- MLflow


def test_a_dead_server_costs_a_warning(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@127.0.0.1:9")
    train("run", A)
    done = lineage(sha256(A))
    assert done.exit_code == 0
    assert len(done.stderr.splitlines()) == 1
    assert re.search(r"cannot be reached .*; only the journals in .*\.runs were searched", done.stderr)
    assert "secret" not in done.output
    assert "found in journal .runs/run/attempt-1" in done.stdout


def test_no_database_is_made_by_looking(repository: Path) -> None:
    train("run", A)
    assert "there is no" in lineage("run").stderr
    assert not (repository / "mlflow.db").exists()


def test_mlflow_has_a_run_whose_journal_is_gone(repository: Path, empty_database: Path) -> None:
    shutil.copy(empty_database, repository)
    attempt = train("run", A, **{"git.dirty": "true"})
    (attempt / "artifacts" / "uncommitted.diff").write_text("diff\n")
    replica = Replica(Run(attempt), resolve_uri(repository))
    replica.finish()
    both = described(replica.run_id)
    assert both["run"]["source"] == [f"MLflow at sqlite:///{repository}/mlflow.db", "journal .runs/run/attempt-1"]
    (repository / ".runs").rename(repository / "lost")
    for argument in (replica.run_id, sha256(A)[:8], md5(A), "run"):
        found = described(argument)
        assert found["run"] | {"source": []} == both["run"] | {"source": []}
        assert found["environment"] == {"python": "3.11"}
        assert found["params"] == both["params"]
        assert any("--artifact-path uncommitted.diff" in command for command in found["commands"])
    assert "no run, model, experiment or commit is called" in fails("0" * 32)


def test_a_run_that_only_scored_a_pulled_model_leads_to_its_commit(repository: Path, empty_database: Path) -> None:
    shutil.copy(empty_database, repository)
    (repository / "model").mkdir()
    (repository / "model/model.json").write_text("{}")
    kept = commit_result(directory_md5(Path("model")))
    report = write_report(repository, model=sha256_tree(Path("model")))
    run_id = deliver_report(report, resolve_uri(repository), repository)
    for argument in (run_id, "model"):
        found = described(argument)
        assert (found["run"]["id"], found["commit"]["id"]) == (run_id, kept)
        assert found["model"]["md5"] == directory_md5(Path("model"))
    assert "trained at     unknown: the model was pulled" in lineage(run_id).output
