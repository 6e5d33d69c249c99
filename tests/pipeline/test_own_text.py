"""A user's own text, and a model used by hand."""

import json

import pytest

from tests.pipeline.clones import Clone
from tracking.run import Run

pytestmark = pytest.mark.pipeline

TALE = "".join(f"The {n}th day was cold, and the {n + 1}th was warmer. Nobody knew why.\n" for n in range(150))
CHAR = {"download.source": "file:inputs/texts/mine.txt", "tokenize.tokenizer": "char"}


@pytest.fixture(scope="session")
def own(seed: Clone, once) -> Clone:
    """A clone in which the pipeline has run on a text file, by characters, as the README shows. Not to be changed."""

    def make(path):
        clone = seed.copy(path, runs=False, mlflow=False)
        clone.write("inputs/texts/mine.txt", TALE)
        clone.run("git add inputs/texts/mine.txt && git commit --quiet --message 'A text'")
        clone.run("dvc exp run --name mine " + " ".join(f"-S {key}={value}" for key, value in CHAR.items()))

    return once("own", make)


def meta(clone: Clone) -> dict:
    return json.loads(clone.read("data/tokens/meta.json"))


def test_the_pipeline_runs_on_a_text_file_by_characters(own):
    found = meta(own)
    assert found["corpus"] == {"documents": 1, "source": "file:inputs/texts/mine.txt"}
    assert found["vocab_size"] == len(set(TALE))
    assert found["train"]["tokens"] + found["val"]["tokens"] == len(TALE)
    assert found["end_of_text"] is None
    scores = json.loads(own.read("metrics/evaluate.json"))
    assert "floor" not in scores
    assert scores["bits_per_byte"] > 0
    assert own.end()["status"] == "FINISHED"
    assert Run(own.attempts()[0]).info["params"]["download.source"] == "file:inputs/texts/mine.txt"


def test_the_way_back_to_the_commit_ends_with_the_committed_result_and_a_lock_that_a_clone_confirms(seed, own, copy_of):
    clone = copy_of(own, runs=False, mlflow=False)
    assert "inputs/texts/mine.txt" in clone.run("git ls-files")  # what is only staged, DVC unstages
    clone.run("git checkout --quiet params.yaml dvc.lock && dvc checkout --quiet")
    assert "Running stage 'tokenize'" not in clone.repro()
    assert clone.outs() == seed.outs()
    assert "bit for bit the committed one: commit dvc.lock" in clone.run("python -m tools summary")
    clone.run("git commit --quiet --message 'The lock' dvc.lock")
    assert "DIVERGED" not in clone.run("python -m tools verify --layer lock")
    assert clone.run("git status --porcelain") == ""


def test_an_edit_of_the_text_runs_the_pipeline_again(own, copy_of):
    clone = copy_of(own, runs=False)
    assert "up to date" in clone.run("dvc status")
    clone.append("inputs/texts/mine.txt", "One more line: ÿ.\n")
    output = clone.repro("tokenize")
    assert "Running stage 'download'" in output
    assert "Running stage 'tokenize'" in output
    assert meta(clone)["vocab_size"] == meta(own)["vocab_size"] + len(set("One more line: ÿ.\n") - set(TALE))
    assert "train:" in clone.run("dvc status")


def test_documents_of_a_jsonl_file_end_with_an_end_of_text_token(own, copy_of):
    clone = copy_of(own, runs=False)
    documents = [TALE[:2000], TALE[2000:5000], TALE[5000:5500], TALE[5500:]]
    clone.write("inputs/texts/mine.jsonl", "".join(json.dumps({"body": text}) + "\n" for text in documents))
    clone.set_params(**{"download.source": "file:inputs/texts/mine.jsonl", "download.text_column": "body"})
    clone.repro("tokenize")
    found = meta(clone)
    assert found["corpus"]["documents"] == 4
    assert found["end_of_text"] is not None
    assert found["train"]["tokens"] + found["val"]["tokens"] == len(TALE) + 4


def test_samples_by_hand_leave_dvcs_outputs_alone(seed, copy_of):
    clone = copy_of(seed, runs=False)
    (clone.path / "mlflow.db").unlink()
    first = clone.run("python -m stages.sample --prompt 'One day' --stream")
    assert first.startswith("One day")
    assert len(first) > len("One day\n")
    printed = clone.run("python -m stages.sample --prompt 'One day' --num-samples 1")
    assert first.rstrip("\n") in printed
    assert clone.outs() == seed.outs()
    assert "up to date" in clone.run("dvc status")
    assert clone.run("git status --porcelain") == ""
    assert not (clone.path / "mlflow.db").exists()


def test_a_prompt_with_an_unknown_character_is_refused_by_name(own):
    for option in ("--stream", "--num-samples 2"):
        output = own.run(f"python -m stages.sample --prompt 'The day ß' {option}", check=1)
        assert "ß" in output
        assert "Traceback" not in output
        assert len(output.splitlines()) == 1
