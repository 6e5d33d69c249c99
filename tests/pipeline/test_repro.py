"""`dvc repro`: the same bits from two clones, nothing twice, and each change runs what depends on it and no more."""

import socket

import pytest

pytestmark = pytest.mark.pipeline

SKIPPED = "Stage '{}' didn't change, skipping"
# Another locale, time zone, hash seed and number of threads than the seed was made with.
ELSEWHERE = {"LANG": "C", "LC_ALL": "C", "TZ": "Asia/Tokyo", "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "3"}


def ran(output):
    return [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")]


def test_two_fresh_clones_give_the_same_bytes(fresh, seed, copy_of):
    """The only test that finds bits that come from the folder, locale, time, hash seed or number of threads."""
    clone = copy_of(fresh, "another folder", mlflow=False)
    clone.repro(**ELSEWHERE)
    assert clone.outs() == seed.outs()
    assert clone.read("dvc.lock") == seed.read("dvc.lock")
    assert clone.leftovers() == []
    assert clone.processes() == []


def test_what_dvc_hashes_names_no_folder_host_or_date(seed):
    year = "20" + seed.run("date +%y").strip()
    private = [str(seed.path), str(seed.path.parent), f"{year}-", "/tmp/"]
    if len(socket.gethostname()) > 7:  # a shorter one may be a word of the corpus
        private.append(socket.gethostname())
    for name in seed.outs():
        content = (seed.path / name).read_bytes()
        assert [word for word in private if word.encode() in content] == [], name


def test_only_what_depends_on_a_change_runs_and_what_is_known_comes_from_the_cache(seed, copy_of):
    """The only test that finds a stage that runs without need, or one whose known result is made once more."""
    clone = copy_of(seed)
    output = clone.repro()
    assert "Data and pipelines are up to date." in output
    assert ran(output) == []
    runs = [run.info.run_id for run in clone.runs()]

    clone.set_params(**{"sample.temperature": 0.5})
    assert ran(clone.repro()) == ["sample"]
    assert clone.read("samples/samples.md") != seed.read("samples/samples.md")

    clone.set_params(**{"sample.temperature": 1.0})
    output = clone.repro()
    assert ran(output) == []
    assert "Stage 'sample' is cached" in output
    assert clone.read("dvc.lock") == seed.read("dvc.lock")
    assert clone.outs() == seed.outs()
    assert [run.info.run_id for run in clone.runs()] == runs


def test_a_change_of_generate_py_wants_new_samples_and_one_of_model_py_a_new_model(seed, copy_of):
    clone = copy_of(seed, runs=False)
    clone.append("nanogpt/generate.py", "\n# A comment.\n")
    wanted = clone.run("dvc status")
    assert "sample:" in wanted
    assert "train:" not in wanted
    assert "evaluate:" not in wanted
    clone.append("nanogpt/model.py", "\n# A comment.\n")
    wanted = clone.run("dvc status")
    assert [stage for stage in ("download", "tokenize", "train", "evaluate", "sample") if f"{stage}:" in wanted] == [
        "train",
        "evaluate",
        "sample",
    ]


def test_a_comment_costs_no_training_step_but_force_and_a_constant_do(seed, copy_of):
    """The only test that finds a training that `dvc repro` repeats, or leaves out, for the wrong reason."""
    clone = copy_of(seed, mlflow=False)
    clone.append("nanogpt/model.py", "\n# A comment.\n")
    output = clone.repro("train")
    assert ran(output) == ["train"]
    assert "train: changed without effect on the result: nanogpt/model.py" in output
    assert "this training is finished already" in output
    assert len(clone.attempts()) == 1
    assert clone.outs() == seed.outs()

    assert "dvc.lock has this model already: training it afresh" in clone.repro("-f -s train")
    assert len(clone.attempts()) == 2
    assert clone.outs() == seed.outs()

    clone.write("nanogpt/model.py", clone.read("nanogpt/model.py").replace("eps=1e-5", "eps=1e-4"))
    assert "this training is finished already" not in clone.repro("train")
    assert len(clone.attempts()) == 3
