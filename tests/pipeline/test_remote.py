"""`dvc push` and `dvc pull` with a directory as remote: a colleague's clone."""

import pytest

from tests.pipeline.clones import Clone

pytestmark = pytest.mark.pipeline


@pytest.fixture
def pulled(seed, copy_of, tmp_path) -> Clone:
    """A colleague's clone of the seed after `dvc pull`; it has never trained."""
    origin = copy_of(seed, "origin", runs=False)
    origin.run(f"dvc remote add --default storage {tmp_path / 'storage'}")
    origin.commit("A remote")
    origin.run("dvc push")
    origin.run("git clone --quiet . ../colleague")
    colleague = Clone(tmp_path / "colleague")
    colleague.run("dvc pull")
    return colleague


def test_a_pulled_clone_has_everything_and_its_evaluation_is_a_run_that_says_so(seed, pulled):
    outs = pulled.outs()
    assert {name: digest for name, digest in outs.items() if name.startswith(("data/", "model/", "samples/"))} == {
        name: digest for name, digest in seed.outs().items() if name.startswith(("data/", "model/", "samples/"))
    }

    pulled.run("python -m stages.evaluate")
    pulled.run("python -m stages.sample")
    assert pulled.outs()["metrics/evaluate.json"] == seed.outs()["metrics/evaluate.json"]
    (run,) = pulled.runs()
    assert run.info.status == "FINISHED"
    assert run.info.run_name.startswith("pulled model ")
    assert run.data.tags["model.sha256"] == seed.runs()[0].data.tags["model.sha256"]
    assert "The model was pulled" in run.data.tags["mlflow.note.content"]
    assert run.data.metrics == seed.scores()


def test_a_pulled_clone_has_nothing_to_run(seed, pulled):
    assert pulled.outs() == seed.outs()
    output = pulled.repro()
    assert "Running stage" not in output
    assert pulled.run("git status --porcelain") == ""
