import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner, Result

from nanogpt.params import flatten, parse_params
from tests.conftest import BUILT_IN
from tests.runs import scored_run
from tools import trial
from tools.__main__ import main
from tracking.fingerprint import code_hash
from tracking.significance import evidence

IDEA = "train.muon_learning_rate=0.04"


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A repository with params.yaml and a train stage, where DVC must not be called."""
    (tmp_path / "params.yaml").write_text(BUILT_IN.read_text())
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages/train.py").write_text('"""Trains."""\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.setattr(trial, "dvc", lambda *arguments: pytest.fail(f"{arguments} was run"))
    return tmp_path


def run(root: Path, name: str, seed: int, loss: float, **values: object) -> None:
    """A finished run of params.yaml with other values ("train__max_iters=5")."""
    params = parse_params((root / "params.yaml").read_text(), Path("params.yaml"))
    flat = {k: v for part in trial.SECTIONS for k, v in flatten(getattr(params, part), f"{part}.").items()}
    flat |= {key.replace("__", "."): value for key, value in values.items()}
    tags = {"code.sha256": code_hash(root, "stages.train")}
    scored_run(root, name, loss, seed=seed, params=flat, tags=tags)


def pairs(root: Path, *differences: float) -> None:
    for i, by in enumerate(differences):
        seed, loss = 1337 + i, 2.0 + (i * 7 % 5) / 50
        run(root, f"baseline-{seed}", seed, loss)
        run(root, f"idea-{seed}", seed, loss + by, train__muon_learning_rate=0.04)


def try_it(*arguments: str, code: int) -> Result:
    result = CliRunner().invoke(main, ["trial", "--name", "idea", *arguments])
    assert result.exit_code == code, result.output
    return result


def test_a_gain_is_kept_as_soon_as_it_is_clear(root):
    pairs(root, *(-0.1 + 0.01 * (i % 3) for i in range(12)))
    printed = try_it("-S", IDEA, code=0).stdout
    assert "idea (muon_learning_rate=0.04) against params.yaml, up to 20 seeds" in printed
    assert printed.splitlines()[-1].startswith("keep: idea is better by 0.09")
    assert "seed 1341" in printed
    assert "seed 1348" not in printed
    ledger = (root / "experiments/ledger.md").read_text()
    assert "| idea | muon_learning_rate=0.04 | params.yaml |" in ledger
    try_it("-S", IDEA, code=0)  # the same outcome is no second line
    assert (root / "experiments/ledger.md").read_text() == ledger


def test_a_loss_is_discarded(root):
    pairs(root, *(0.1 + 0.01 * (i % 3) for i in range(12)))
    assert try_it("-S", IDEA, code=1).stdout.splitlines()[-1].startswith("discard: idea is worse by 0.1")


def test_noise_is_undecided(root):
    pairs(root, 0.1, -0.1, 0.05, -0.06)
    printed = try_it("-S", IDEA, "--max-seeds", "4", code=3).stdout
    assert printed.splitlines()[-1].startswith("undecided: idea differs by -0.0025 nats per token after 4 pairs")
    assert "| undecided |" in (root / "experiments/ledger.md").read_text()


def test_an_idea_that_changes_nothing_is_discarded_after_one_pair(root):
    run(root, "baseline-1337", 1337, 2.0)
    printed = try_it("-S", "train.muon_learning_rate=0.025", code=1).stdout
    assert printed.endswith("discard: idea changes no bit of the model\n")


def test_json_is_for_programs(root):
    pairs(root, *(-0.1 + 0.01 * (i % 3) for i in range(12)))
    found = json.loads(try_it("-S", IDEA, "--json", code=0).stdout)
    assert (found["decision"], found["verdict"], found["score"]) == ("keep", "better", "val_loss")
    assert found["idea"] == {"name": "idea", "overrides": {"train.muon_learning_rate": 0.04}}
    assert found["p"] < 0.01
    assert found["interval"][1] < 0
    assert [pair["seed"] for pair in found["pairs"]] == list(range(1337, 1337 + len(found["pairs"])))


def test_runs_of_other_code_or_without_a_score_are_not_used_again(root, monkeypatch):
    pairs(root, -0.1)
    (root / "stages/train.py").write_text('"""Trains."""\nx = 1\n')
    calls = []

    def fails(root, log, *arguments):
        calls.append(arguments)
        log.write_text("Running\nERROR: failed to reproduce 'train': it broke\nmore\n")
        return 1

    monkeypatch.setattr(trial, "dvc", fails)
    failed = try_it("-S", IDEA, code=2).stderr
    assert "experiment idea-baseline-1337 failed: ERROR: failed to reproduce 'train': it broke (see" in failed
    assert calls == [("exp", "run", "--temp", "--name", "idea-baseline-1337", "--set-param=train.seed=1337")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "nothing to try: give -S KEY=VALUE, or --baseline"),
        (("-S", "train.muon_learn_rate=1"), "not a known parameter; did you mean train.muon_learning_rate?"),
        (("-S", "train.batch_size=x"), "train.batch_size = 'x' is invalid"),
        (("-S", "batch_size"), "write section.key=value"),
        (("-S", "train.seed=3"), "a trial sets the seeds itself"),
        (("-S", "train.max_iters=[1"), "the value is not YAML"),
        (("-S", "train.max_iters=300"), "idea trains on 307,200 tokens and params.yaml on 1,228,800"),
        (("-S", "train.max_iters=300", "--budget", "flops"), "leave out -S train.max_iters"),
        (("-S", "download.documents=50"), "differ in download.documents: losses on different text cannot be compared"),
        (("-S", "evaluate.stride=16"), "idea is evaluated with stride 16 and params.yaml with stride null"),
        (("--baseline", "nothing"), "--baseline 'nothing' is not an experiment or commit"),
    ],
)
def test_errors_come_before_any_run_and_have_an_exit_code_of_their_own(root, arguments, message):
    assert message in try_it(*arguments, code=2).stderr


def test_a_budget_of_flops_sets_the_steps(root):
    planned = trial.plan(root, "idea", ["model.n_embd=192"], None, "flops")
    steps = planned.idea.params.train.max_iters
    ratio = steps * trial.flops_per_step(planned.idea) / (1200 * trial.flops_per_step(planned.baseline))
    assert steps < 1200
    assert ratio == pytest.approx(1, abs=1 / steps)
    assert planned.idea.overrides == {"model.n_embd": 192, "train.max_iters": steps}


def test_too_few_pairs_for_an_interval_are_called_that():
    found = SimpleNamespace(
        evidence=evidence([-0.26, -0.25]),
        verdict="cannot tell",
        score="val_loss",
        idea=SimpleNamespace(name="faster"),
    )
    assert (
        trial.conclusion(found)
        == "undecided: faster differs by -0.2550 nats per token after 2 pairs, too few to decide"
    )
