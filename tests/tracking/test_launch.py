"""Several real processes of the train stage (tests/stages/ranks.py) that share each step over gloo."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML
from safetensors.torch import load_file

from nanogpt.corpus.prepare import prepare
from nanogpt.corpus.raw_text import Writer
from nanogpt.params import load_params
from tests.conftest import BUILT_IN, REPOSITORY
from tracking.launch import check_world_size, launch, launcher, run_elsewhere

STEPS = 50
SETTINGS = {
    "tokenizer": "char",
    "n_layer": 1,
    "n_head": 2,
    "n_embd": 16,
    "block_size": 16,
    "max_iters": STEPS,
    "warmup_iters": 2,
    "gradient_accumulation_steps": 4,
    "eval_interval": 25,
    "eval_iters": 2,
    "determinism": "off",
    "threads": 1,
    "log_interval": 7,
    "checkpoint_interval": 1_000_000,
    "prompts": [],
}


@dataclass
class Stage:
    """A folder in which the train stage can run, and what it leaves there."""

    folder: Path
    output: str = ""

    def start(self, **environment: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-m", "tests.stages.ranks"],
            cwd=self.folder,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, expected: int = 0, **environment: str) -> "Stage":
        process = self.start(**environment)
        try:
            self.output, _ = process.communicate(timeout=120)
        finally:
            process.kill()
        assert process.returncode == expected, self.output
        return self

    def set(self, **values: Any) -> "Stage":
        yaml = YAML()
        params = yaml.load(self.folder / "params.yaml")
        for name, value in values.items():
            sections = ("tokenize", "model", "train", "numerics", "runtime", "tracking")
            section = next(key for key in sections if name in params[key])
            params[section][name] = value
        params["train"]["batch_size"] = 2
        yaml.dump(params, self.folder / "params.yaml")
        return self

    def records(self, kind):
        (journal,) = self.folder.glob(".runs/*/attempt-1/journal.jsonl")
        return [r for r in map(json.loads, journal.read_text().splitlines()) if r["kind"] == kind]

    def losses(self):
        steps = self.records("step")
        assert [r["step"] for r in steps] == list(range(1, STEPS + 1))
        return [r["loss"] for r in steps]

    def used(self, rank):
        """(step, samples) of each micro-batch of a process, in order; of all that have had this rank here."""
        lines = (self.folder / f"used-{rank}.jsonl").read_text().splitlines()
        return [(step, tuple(samples)) for step, samples in map(json.loads, lines)]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A training that one process has done."""
    folder = tmp_path_factory.mktemp("reference")
    shutil.copyfile(BUILT_IN, folder / "params.yaml")
    for name in ("nanogpt", "stages"):
        (folder / name).symlink_to(REPOSITORY / name)
    writer = Writer(folder / "raw", 1.0, lambda done: None)
    for number in range(60):
        writer.add([f"Story {number}. The cat sat on the mat; the dog didn't."])
    writer.close("grammar")
    stage = Stage(folder)
    stage.set(**SETTINGS)
    prepare(folder / "raw", folder / "data/tokens", load_params(folder / "params.yaml").tokenize, 1)
    return stage.run()


@pytest.fixture
def stage(reference, tmp_path):
    """The same folder before its training."""
    left_out = shutil.ignore_patterns(".runs", "model", "metrics", "plots", "used-*")
    shutil.copytree(reference.folder, tmp_path / "stage", symlinks=True, ignore=left_out)
    return Stage(tmp_path / "stage")


def test_a_stopped_training_resumes_with_the_next_batch_on_any_number_of_processes(reference, stage):
    """The only test that finds a sample that two processes use twice or leave out, or a shared training that differs
    from that of one process. tests/pipeline tests that one of two processes gets the signal."""
    stage.set(processes=2).run(-signal.SIGKILL, DO="1 20 launcher")  # returns when no process can write to it any more
    assert "train: warning: the process that launched it is gone" in stage.output
    stage.set(processes=1).run(143, DO="0 30 SIGTERM")
    assert "train: resuming at step 21 of 50" in stage.output
    assert "train: stopped at step 31 (SIGTERM), everything is saved" in stage.output
    stage.set(processes=2).run()
    assert "train: resuming at step 31 of 50" in stage.output
    assert stage.output.count("train: step 50: val loss") == stage.output.count("-> model") == 1
    assert "arning" not in stage.output
    assert (stage.folder / "model/weights.safetensors").exists()

    own = [(step, (2 * micro, 2 * micro + 1)) for step in range(STEPS) for micro in range(4)]
    assert reference.used(0) == own
    shared = [(step, samples) for step, samples in own if not 21 <= step < 31]
    assert [used for used in stage.used(0) if used in shared] == [s for i, s in enumerate(shared) if i % 4 < 2]
    assert stage.used(1) == [s for i, s in enumerate(shared) if i % 4 >= 2]
    assert sorted(stage.used(0) + stage.used(1)) == own
    assert stage.losses() == pytest.approx(reference.losses(), abs=1e-5)
    assert stage.losses() != reference.losses()  # they were added in another order
    assert [r["processes"] for r in stage.records("start")] == [2, 1, 2]
    assert [r["status"] for r in stage.records("end")] == ["KILLED", "KILLED", "FINISHED"]


def test_shards_of_four_processes_continue_on_two_and_end_on_one(reference, stage):
    """The only test of the stage with train.parallel = fsdp: saving, resuming, sampling and publishing from shards."""
    stage.set(processes=4, parallel="fsdp", prompts=["Story"]).run(143, DO="2 20 SIGTERM")
    assert "train: stopped at step 21 (SIGTERM), everything is saved" in stage.output
    (saved,) = stage.folder.glob(".runs/*/attempt-1/checkpoints/step-00000021")
    assert len([*saved.glob("state/*.safetensors")]) == 4
    stage.set(processes=2).run(143, DO="0 30 SIGTERM")
    assert "train: resuming at step 21 of 50" in stage.output
    stage.set(processes=1).run()
    assert "train: resuming at step 31 of 50" in stage.output
    assert "arning" not in stage.output
    assert stage.losses() == pytest.approx(reference.losses(), abs=1e-5)
    evaluations = [[r["val_loss"] for r in each.records("eval")] for each in (stage, reference)]
    assert evaluations[0] == pytest.approx(evaluations[1], abs=1e-5)
    assert [r["step"] for r in stage.records("sample")] == [0, 25, 50]
    weights = [load_file(each.folder / "model/weights.safetensors") for each in (stage, reference)]
    for name, weight in weights[1].items():
        assert (weights[0][name] - weight).abs().max() < 1e-3, name


def test_an_error_of_one_process_ends_all_and_is_reported_once(stage):
    stage.set(processes=2).run(1, DO="1 5 the other machine is out of memory")
    assert stage.output.endswith("\nError: train: the other machine is out of memory\n")
    assert stage.output.count("out of memory") == 1
    (end,) = stage.records("end")
    assert (end["status"], end["step"]) == ("FAILED", 5)
    assert end["message"].endswith("process 1 of this training failed: ValueError: the other machine is out of memory")


# --- launch by itself: these processes train nothing ------------------------------------------------------------------


def test_signals_are_passed_on():
    program = """
import os, signal, sys, time
signal.signal(signal.SIGINT, lambda *_: os._exit(130))
if os.environ["RANK"] == "0":
    time.sleep(0.5)
    os.kill(os.getppid(), signal.SIGINT)
time.sleep(60)
"""
    before = signal.getsignal(signal.SIGINT)
    assert launch(2, 0.0, "-c", program) == 130
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(("does", "code"), [("sys.exit(3)", 3), ("os.kill(os.getpid(), 9)", 137), ("sys.exit(0)", 0)])
def test_the_end_of_one_process_ends_all_and_gives_the_exit_code(does, code):
    other = "time.sleep(60)" if code else "pass"
    assert launch(2, 0.0, "-c", f"import os, sys, time\nif os.environ['RANK'] == '1': {does}\n{other}") == code


def test_a_process_that_ends_while_gloo_works_has_its_own_exit_code(capfd):
    program = """
import sys, torch
from nanogpt.distributed import join
from tracking.launch import run_to_exit

def main():
    try:
        with join("cpu"):
            for _ in range(3000):
                torch.distributed.all_reduce(torch.ones(()), async_op=True)
            raise ValueError("in all processes")
    except ValueError as error:
        print(error)
        sys.exit(3)

run_to_exit(main)
"""
    assert launch(2, 0.0, "-c", program) == 3
    assert "in all processes" in capfd.readouterr().out  # what was printed is not lost


def test_another_number_of_processes_than_in_the_parameters_is_rejected(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    check_world_size(1)
    check_world_size(2)  # they are still to be started
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_world_size(2)
    refusal = r"train\.processes = 1, .* has started 2 \(WORLD_SIZE\); set train\.processes to 2"
    with pytest.raises(ValueError, match=refusal):
        check_world_size(1)


# --- a launcher, which runs a stage elsewhere -------------------------------------------------------------------------


def test_a_launcher_runs_the_stages_that_compute_and_none_that_it_has_started(monkeypatch):
    monkeypatch.setenv("NANOGPT_LAUNCHER", "slurm/submit --partition='a b'")
    assert launcher("train") == ["slurm/submit", "--partition=a b", "train"]
    assert launcher("download") is None
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert launcher("train") is None


@pytest.mark.parametrize(("does", "code"), [("exit 75", 75), ("kill -9 $$", 137), ("kill -TERM $PPID; wait", 7)])
def test_a_launcher_gets_the_signals_and_gives_the_exit_code(does, code):
    assert run_elsewhere(["bash", "-c", f"trap 'exit 7' TERM; sleep 60 & {does}"]) == code
