"""What `make repro` says at its end."""

import json

import pytest

pytestmark = pytest.mark.pipeline


def test_the_summary_has_the_result_and_knows_the_committed_lock(seed):
    output = seed.run("python -m tools summary")
    scores = json.loads(seed.read("metrics/evaluate.json"))
    assert f"{scores['val_loss']:.4f} nats per token" in output
    assert f"{scores['bits_per_byte']:.4f} bits per byte" in output
    assert f"the excess is {scores['excess']:.4f}" in output
    for place in ("samples/samples.md", "metrics/evaluate.json", "make ui"):
        assert place in output
    assert "dvc.lock is the committed one" in output


def test_the_summary_tells_a_lock_that_differs_from_new_params_and_from_one_that_is_not_committed(seed, copy_of):
    clone = copy_of(seed, runs=False)
    lock = clone.read("dvc.lock")
    model = next(out["md5"] for out in clone.lock()["train"]["outs"] if out["path"] == "model")
    clone.write("dvc.lock", lock.replace(model, "0" * 32 + ".dir"))  # what was committed on another machine
    clone.commit("A lock with another model")
    clone.write("dvc.lock", lock)
    assert "dvc.lock DIFFERS from the committed one though code and params are the same" in summary(clone)

    clone.set_params(**{"train.max_iters": 31})
    assert "dvc.lock was made before train.max_iters changed: `dvc repro` makes it true again" in summary(clone)
    clone.write("dvc.lock", lock.replace("max_iters: 30", "max_iters: 31"))
    assert "dvc.lock is new, as code or params differ" in summary(clone)

    clone.run("git rm --quiet --cached dvc.lock")
    clone.run("git commit --quiet --message 'No lock'")
    assert "dvc.lock is not committed yet" in summary(clone)


def summary(clone) -> str:
    return clone.run("python -m tools summary").splitlines()[-1]


def test_make_repro_runs_what_is_missing_and_sums_up(seed, copy_of):
    clone = copy_of(seed, runs=False, mlflow=False)
    (clone.path / ".venv").mkdir()
    (clone.path / ".venv/.ready").touch()  # the set-up is done
    clone.run("rm -r samples")
    output = clone.run("make --old-file=.venv/.ready repro")
    assert "dvc.lock is the committed one: this result is bit for bit what the commit says" in output
    assert clone.outs() == seed.outs()
