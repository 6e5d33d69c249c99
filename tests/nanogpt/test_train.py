import copy
import functools
import json
import math
import time
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nanogpt import seeds
from nanogpt.batches import batch, micro_batches
from nanogpt.checkpoint import Checkpoints
from nanogpt.evaluate import Score, score, spread, windows
from nanogpt.generate import Sampling, generate
from nanogpt.optimizer import make_optimizer
from nanogpt.params import TrainParams
from nanogpt.schedule import lr_at
from nanogpt.seeds import WEIGHTS
from nanogpt.train import Diverged, Observer, Step, Stopped, train
from nanogpt.train_state import TrainState, new_state
from tests.nanogpt import tiny
from tracking.journal import Journal
from tracking.observers import JournalWriter, SpeedRecorder

TOKENS = tiny.tokens(200)
ITERS = 7
CPU = torch.device("cpu")


class Killed(BaseException):
    """SIGKILL, as far as the loop can see: nothing more is saved or written."""


@dataclass(frozen=True)
class Intervals:
    log: int
    checkpoint: int


@dataclass
class Watcher(Observer):
    """What a test wants to see, and when the training is to be stopped or killed."""

    run: "Run"
    stop_at: int | None = None
    kill_at: int | None = None

    def on_steps(self, state, steps):
        self.run.reports.append(steps)

    def on_evaluation(self, state, train, val):
        self.run.on_evaluation(state.model, state.progress)

    def should_stop(self):
        if self.run.progress.step == self.kill_at:
            raise Killed
        return "Ctrl-C" if self.run.progress.step == self.stop_at else None


@dataclass
class Run:
    """A training in a directory: started, interrupted and resumed as the train stage does it."""

    directory: Any
    params: TrainParams = field(default_factory=tiny.train_params)
    config: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    intervals: Intervals = field(default_factory=lambda: Intervals(log=2, checkpoint=2))
    tokens: Any = field(default_factory=lambda: TOKENS)
    val_losses: dict[int, float] | None = None  # instead of evaluations
    on_evaluation: Any = lambda model, progress: None
    poison: Any = lambda model, loss, step: loss
    reports: list[list[Step]] = field(default_factory=list)

    def __post_init__(self):
        self.checkpoints = Checkpoints(self.directory / "checkpoints", "run")

    def go(self, stop_at=None, kill_at=None):
        """Trains from the newest checkpoint on, until the end, a wish to stop, or a kill at a step."""
        torch.manual_seed(seeds.derived_seed(self.params.seed, WEIGHTS))
        model = self.model = tiny.gpt(**self.config)
        state = new_state(model, self.params, tiny.numerics(dtype=self.dtype))
        checkpoint = self.checkpoints.newest(lambda message: None)
        if checkpoint:
            checkpoint.restore(state)
        progress = self.progress = state.progress
        state.forward = lambda x, y: self.poison(model, model(x, y), progress.step)
        intervals = {"log_interval": self.intervals.log, "checkpoint_interval": self.intervals.checkpoint}
        params = tiny.params(self.params, **intervals)
        micros = range(self.params.gradient_accumulation_steps)
        batches = micro_batches(self.tokens, self.params, model.config.block_size, progress.step, micros, CPU)

        def evaluate(state):
            if self.val_losses is not None:
                return Score(1.0, 1), Score(self.val_losses[progress.step], 1)
            chosen = spread(windows(len(TOKENS) - 1, model.config.block_size, model.config.block_size), 4)
            return (score(model, TOKENS, chosen, 3, None, state.precision),) * 2

        with closing(Journal(self.directory / "journal.jsonl")) as journal:
            assert checkpoint is None or journal.has_position(checkpoint.extra["journal"])
            observers = [
                JournalWriter(journal, self.params),
                SpeedRecorder(journal, self.params, None),
                Watcher(self, stop_at, kill_at),
            ]
            train(state, batches, params, evaluate, observers, self.checkpoints)
        return self

    def interrupted(self, **when):
        with pytest.raises((Stopped, Killed)):
            self.go(**when)
        return self

    def records(self, kind):
        lines = [json.loads(line) for line in (self.directory / "journal.jsonl").read_text().splitlines()]
        return [{k: v for k, v in r.items() if k not in {"t", "crc"}} for r in lines if r["kind"] == kind]

    def result(self):
        """All that an interruption must not change: weights, optimizer and progress, and what is told of the steps."""
        last = self.checkpoints.read(self.params.max_iters)
        steps, evaluations = self.records("step"), self.records("eval")
        assert [record["step"] for record in steps] == list(range(1, self.params.max_iters + 1))
        assert self.records("diverged") == []
        return last.sha256, last.progress, last.scaler, self.weights(), steps, evaluations

    def weights(self):
        return {name: weight.tolist() for name, weight in tiny.weights(self.model).items()}


SETTINGS = {
    "float32": {},
    "dropout": {"config": {"dropout": 0.3}},
    "accumulation": {"params": tiny.train_params(gradient_accumulation_steps=3), "config": {"dropout": 0.3}},
    "muon": {"params": tiny.train_params(optimizer="muon", data_order="epochs", lr_decay="linear")},
    "bfloat16": {"dtype": "bfloat16", "config": {"dropout": 0.3}},
    "float16": {"dtype": "float16", "config": {"dropout": 0.3}},
}


@pytest.fixture(scope="module", params=SETTINGS)
def undisturbed(request, tmp_path_factory):
    """The settings of a run, and its result when nothing interrupts it."""
    settings = SETTINGS[request.param]
    return settings, Run(tmp_path_factory.mktemp("undisturbed"), **settings).go().result()


@pytest.mark.parametrize("how", ["stop_at", "kill_at"])
@pytest.mark.parametrize("step", range(ITERS + 1))
def test_interrupted_at_any_step_and_resumed_it_ends_with_the_same_bits(undisturbed, how, step, tmp_path):
    settings, result = undisturbed
    run = Run(tmp_path, **settings)
    if how == "stop_at" and step == ITERS:
        run.go(stop_at=step)  # the wish comes too late: it is finished
    else:
        run.interrupted(**{how: step})
    if how == "stop_at":
        assert run.checkpoints.newest(print).progress.step == step
    assert run.go().result() == result


def test_interrupted_at_every_step_it_ends_with_the_same_bits(undisturbed, tmp_path):
    settings, result = undisturbed
    run = Run(tmp_path, **settings)
    for step in range(ITERS):
        run.interrupted(stop_at=step)
    assert run.go().result() == result


def test_resumed_from_an_older_checkpoint_it_repeats_the_same_steps_and_writes_none_twice(undisturbed, tmp_path):
    settings, result = undisturbed
    run = Run(tmp_path, **settings).interrupted(stop_at=5)
    tiny.flip_bit(run.checkpoints.directory / "step-00000005" / "state.safetensors")
    assert run.go().result() == result


def test_a_finished_run_that_is_started_again_does_nothing(undisturbed, tmp_path):
    settings, result = undisturbed
    Run(tmp_path, **settings).go()
    assert Run(tmp_path, **settings).go().result() == result


def test_a_checkpoint_counts_on_the_records_of_all_its_steps(tmp_path):
    run = Run(tmp_path, intervals=Intervals(log=100, checkpoint=100)).interrupted(stop_at=5)
    position = run.checkpoints.newest(print).extra["journal"]
    lines = (tmp_path / "journal.jsonl").read_bytes()[: position["bytes"]].splitlines()
    assert [record["step"] for record in map(json.loads, lines) if record["kind"] == "step"] == [1, 2, 3, 4, 5]


def test_an_evaluation_is_not_repeated_when_the_run_resumes_at_its_step(tmp_path):
    seen = []
    run = Run(tmp_path, on_evaluation=lambda model, progress: seen.append(progress.step))
    run.interrupted(stop_at=3).go()
    assert seen == [0, 3, 6, 7]


def test_a_stop_is_raised_with_its_reason_after_the_state_is_saved(tmp_path):
    with pytest.raises(Stopped, match="Ctrl-C"):
        Run(tmp_path).go(stop_at=5)
    assert Checkpoints(tmp_path / "checkpoints", "run").newest(print).progress.step == 5
    assert [record["step"] for record in Run(tmp_path).records("step")] == [1, 2, 3, 4, 5]


def test_with_eval_only_it_evaluates_the_initial_weights_and_ends(tmp_path):
    run = Run(tmp_path, params=tiny.train_params(eval_only=True)).go()
    assert (run.progress.step, run.progress.evaluated, run.progress.best_step) == (0, 0, 0)
    assert run.records("step") == []
    assert [record["step"] for record in run.records("eval")] == [0]
    torch.manual_seed(seeds.derived_seed(run.params.seed, WEIGHTS))
    assert tiny.same(tiny.weights(run.model), tiny.weights(tiny.gpt()))
    assert run.checkpoints.read(0).progress == run.progress


# --- the steps themselves ---------------------------------------------------------------------------------------------


def reference(params, steps):
    """The same training without anything around it."""
    torch.manual_seed(seeds.derived_seed(params.seed, WEIGHTS))
    model = tiny.gpt()
    optimizer = make_optimizer(model, params.model_copy(update={"learning_rate": 123.0}), "cpu", "float32")
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, params.learning_rate, params.min_lr, params.warmup_iters, params.max_iters)
        x, y = batch(TOKENS, params, step, range(params.batch_size), 8)
        model(torch.from_numpy(x), torch.from_numpy(y)).backward()
        if params.grad_clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), params.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
    return tiny.weights(model)


@pytest.mark.parametrize("grad_clip", [0.0, 0.05, 1e9])
def test_a_training_is_forward_backward_clip_and_step(grad_clip, tmp_path):
    run = Run(tmp_path, params=tiny.train_params(grad_clip=grad_clip)).go()
    assert tiny.same(tiny.weights(run.model), reference(run.params, ITERS))
    assert all(record["grad_norm"] > 0.05 for record in run.records("step"))  # what is told is the norm before clipping


def test_clipping_at_zero_is_no_clipping_and_below_the_norm_it_acts(tmp_path):
    none, far, near = (
        Run(tmp_path / name, params=tiny.train_params(grad_clip=clip)).go().weights()
        for name, clip in (("a", 0.0), ("b", 1e9), ("c", 0.05))
    )
    assert none == far != near


def test_the_journal_holds_the_learning_rate_and_tokens_of_each_step(tmp_path):
    params = tiny.train_params(gradient_accumulation_steps=2)
    run = Run(tmp_path, params=params).go()
    assert [(r["step"], r["lr"], r["tokens"]) for r in run.records("step")] == [
        (step + 1, lr_at(step, 1e-2, 1e-3, 2, ITERS), (step + 1) * 2 * 3 * 8) for step in range(ITERS)
    ]
    assert [(r["step"], r["tokens"]) for r in run.records("eval")] == [(s, s * 48) for s in (0, 3, 6, 7)]


def test_the_decay_ends_where_it_is_said_to(tmp_path):
    run = Run(tmp_path, params=tiny.train_params(lr_decay_iters=4)).go()
    assert [record["lr"] for record in run.records("step")] == [lr_at(step, 1e-2, 1e-3, 2, 4) for step in range(ITERS)]
    assert run.records("step")[-1]["lr"] == 1e-3


def test_two_micro_batches_of_four_are_one_batch_of_eight(tmp_path):
    seen = {}

    def capture(name):
        return lambda model, loss, step: seen.setdefault(name, []).append(loss.item()) or loss

    # The first three steps: after that Adam, which divides by the size of a gradient, has made rounding visible.
    both = {"max_iters": 3, "grad_clip": 0.0}
    split = Run(
        tmp_path / "a",
        params=tiny.train_params(batch_size=4, gradient_accumulation_steps=2, **both),
        poison=capture("a"),
    ).go()
    whole = Run(
        tmp_path / "b",
        params=tiny.train_params(batch_size=8, gradient_accumulation_steps=1, **both),
        poison=capture("b"),
    ).go()
    assert (len(seen["a"]), len(seen["b"])) == (6, 3)
    for i in range(3):
        # The samples are the same, so the mean of the two means is the mean.
        assert sum(seen["a"][2 * i : 2 * i + 2]) / 2 == pytest.approx(seen["b"][i], rel=1e-5)
    for one, other in zip(split.records("step"), whole.records("step"), strict=True):
        assert one["tokens"] == other["tokens"]
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


def test_how_often_it_evaluates_reports_and_saves_changes_no_bit(tmp_path):
    def run(name, every, log, checkpoint):
        settings = {"config": {"dropout": 0.3}, "intervals": Intervals(log, checkpoint)}
        done = Run(tmp_path / name, params=tiny.train_params(eval_interval=every), **settings).go()
        return done.weights(), done.records("step")

    assert run("a", 1, 1, 1) == run("b", 100, 100, 100) == run("c", 2, 3, 5)


def test_text_written_at_an_evaluation_changes_no_bit_even_if_it_ends_early(tmp_path):
    def write(model, progress):
        for _ in generate(model, [1, 2], 2, 10, Sampling()):
            break  # an end-of-text token

    silent = Run(tmp_path / "a", config={"dropout": 0.3}).go()
    assert Run(tmp_path / "b", config={"dropout": 0.3}, on_evaluation=write).go().weights() == silent.weights()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_seed_decides_all(dropout, tmp_path):
    first, again, other = (
        Run(tmp_path / name, config={"dropout": dropout}, params=tiny.train_params(seed=seed)).go().weights()
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert first == again != other


def test_every_micro_batch_of_every_step_drops_something_else(tmp_path):
    # One sample, and a learning rate at which no weight moves: only the dropout can make two losses differ.
    params = tiny.train_params(learning_rate=1e-30, min_lr=0.0, batch_size=1, gradient_accumulation_steps=2)
    losses = []
    Run(
        tmp_path,
        params=params,
        config={"dropout": 0.3},
        tokens=tiny.tokens(9),
        poison=lambda model, loss, step: losses.append(loss.item()) or loss,
    ).go()
    assert len(set(losses)) == len(losses) == 2 * ITERS


def test_a_batch_that_it_sees_again_and_again_is_learnt_by_heart(tmp_path):
    # Nine tokens hold one sample of a context of eight.
    params = tiny.train_params(max_iters=60, warmup_iters=0, batch_size=1, weight_decay=0.0, eval_interval=60)
    run = Run(tmp_path, params=params, tokens=tiny.tokens(9)).go()
    losses = [record["loss"] for record in run.records("step")]
    assert losses[0] == pytest.approx(math.log(13), abs=0.05)
    assert losses[-1] < 0.05


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mixed_precision_trains_close_to_float32_with_weights_in_float32(dtype, tmp_path):
    exact, mixed = Run(tmp_path / "a").go(), Run(tmp_path / "b", dtype=dtype).go()
    assert {weight.dtype for weight in mixed.model.parameters()} == {torch.float32}
    assert mixed.weights() != exact.weights()
    for one, other in zip(mixed.records("step"), exact.records("step"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=0.02)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=0.1)  # of the gradient without the scale


def test_the_scale_of_float16_is_part_of_the_checkpoint(tmp_path):
    run = Run(tmp_path, dtype="float16").go()
    assert run.checkpoints.read(ITERS).scaler["scale"] > 0
    assert Run(tmp_path / "plain").go().checkpoints.read(ITERS).scaler == {}


# --- what a step does not wait for ------------------------------------------------------------------------------------


class Asked(TorchDispatchMode):
    """Counts how often a tensor's value is asked for: on a GPU all that was begun has to end first."""

    def __init__(self):
        super().__init__()
        self.times = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.times += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("grad_clip", [0.0, 1.0])
def test_no_value_is_asked_for_between_two_reports(grad_clip, tmp_path):
    params = tiny.train_params(max_iters=20, eval_interval=20, grad_clip=grad_clip, gradient_accumulation_steps=2)
    run = Run(tmp_path, params=params, val_losses={0: 1.0, 20: 1.0}, intervals=Intervals(log=5, checkpoint=20))
    counted, asked = [], Asked()
    run.poison = lambda model, loss, step: counted.append(asked.times) or loss
    with asked:
        run.go()
        assert torch.ones(1).item() == 1.0
    assert asked.times >= 1  # it can count
    reported = [counted[2 * step] for step in range(20)]
    assert all(reported[step] == reported[step - 1] for step in range(1, 20) if step % 5)


@pytest.mark.parametrize("settings", ["float32", "dropout", "accumulation", "muon"])
def test_a_device_whose_values_cannot_be_asked_for_can_train(settings):
    """On the meta device, where each such question raises."""
    given = SETTINGS[settings]
    params, model = given.get("params", tiny.train_params()), tiny.gpt(**given.get("config", {})).to("meta")
    optimizer, scaler = make_optimizer(model, params, "meta", "float32"), torch.amp.GradScaler("cpu", enabled=False)
    state = TrainState(model, optimizer, scaler)

    class Kill(Observer):
        def should_stop(self):
            if state.progress.step == 5:
                raise Killed

    micros = range(params.gradient_accumulation_steps)
    batches = micro_batches(TOKENS, params, model.config.block_size, 0, micros, torch.device("meta"))
    never = tiny.params(params, log_interval=100, checkpoint_interval=100)
    with pytest.raises(Killed):
        train(state, batches, never, None, [Kill()])
    assert state.progress.step == 5


def test_the_seconds_of_a_report_end_when_its_values_have_arrived(tmp_path, monkeypatch):
    clock, tolist = [0.0], torch.Tensor.tolist

    def arrives(tensor):
        clock[0] += 7.0  # that a GPU still computed
        return tolist(tensor)

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(torch.Tensor, "tolist", arrives)
    run = Run(tmp_path, params=tiny.train_params(max_iters=4, eval_interval=4), intervals=Intervals(2, 4))
    run.val_losses = {0: 1.0, 4: 1.0}
    assert [steps[-1].seconds for steps in run.go().reports] == [3.5, 3.5]


# --- batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["random", "epochs"])
@pytest.mark.parametrize("first", [0, 4])
def test_batches_come_one_after_the_other_and_are_those_of_their_step(order, first):
    params = tiny.train_params(gradient_accumulation_steps=4, data_order=order)
    found = micro_batches(TOKENS, params, 8, first, range(2, 4), CPU)
    for step in range(first, first + 3):
        for micro in (2, 3):
            expected = batch(TOKENS, params, step, range(micro * 3, micro * 3 + 3), 8)
            for tensor, array in zip(next(found), expected, strict=True):
                assert torch.equal(tensor, torch.from_numpy(array))


def test_the_next_batch_is_gathered_before_the_backward_pass_of_this_one(tmp_path, monkeypatch):
    events = []

    def gather(*arguments):
        events.append(f"batch {arguments[2]}")
        return batch(*arguments)

    def forward(model, loss, step):
        events.append(f"forward {step}")
        loss.register_hook(lambda grad: events.append(f"backward {step}"))
        return loss

    monkeypatch.setattr("nanogpt.batches.batch", gather)
    Run(tmp_path, params=tiny.train_params(max_iters=3), poison=forward).go()
    assert events == ["batch 0"] + [
        event for step in range(3) for event in (f"forward {step}", f"batch {step + 1}", f"backward {step}")
    ]


# --- the best model ---------------------------------------------------------------------------------------------------


def test_the_best_is_the_first_of_the_lowest_validation_losses_and_is_kept(tmp_path):
    losses = {0: 5.0, 1: 4.0, 2: 3.0, 3: 3.0, 4: 3.5, 5: 3.0, 6: 9.0, 7: 8.0}
    run = Run(tmp_path, params=tiny.train_params(eval_interval=1), val_losses=losses, intervals=Intervals(1, 1)).go()
    assert (run.progress.best_step, run.progress.best_val_loss) == (2, 3.0)
    kept = sorted(path.name for path in run.checkpoints.directory.iterdir())
    assert kept == ["step-00000002", "step-00000006", "step-00000007"]
    assert [(r["step"], r["best"], r["val_loss"]) for r in run.records("checkpoint")] == [
        (1, True, 4.0) if step == 1 else (step, step in {0, 2}, losses[step]) for step in range(8)
    ]


def test_a_new_best_is_saved_whatever_the_interval(tmp_path):
    losses = {0: 5.0, 3: 4.0, 6: 6.0, 7: 7.0}
    run = Run(tmp_path, val_losses=losses, intervals=Intervals(1, 100)).go()
    assert [record["step"] for record in run.records("checkpoint")] == [0, 3, 7]


# --- patience ---------------------------------------------------------------------------------------------------------

NO_BETTER = {0: 5.0, 1: 4.0, 2: 4.5, 3: 3.0, 4: 3.1, 5: 3.2, 6: 3.3, 7: 1.0}
IMPATIENT = {"val_losses": NO_BETTER, "intervals": Intervals(log=2, checkpoint=2)}


def impatient(directory, patience=2, **changes):
    return Run(directory, params=tiny.train_params(eval_interval=1, patience=patience), **{**IMPATIENT, **changes})


@pytest.mark.parametrize(("patience", "end"), [(1, 2), (2, 5), (3, 6), (4, 7), (None, 7)])
def test_a_training_ends_after_so_many_evaluations_without_a_new_best(patience, end, tmp_path):
    run = impatient(tmp_path, patience).go()
    assert run.progress.step == end
    assert [r["step"] for r in run.records("step")] == list(range(1, end + 1))
    assert [r["step"] for r in run.records("eval")] == list(range(end + 1))
    best = {2: 1, 7: 7}.get(end, 3)
    assert run.progress.best_step == best
    assert {best, end} <= set(run.checkpoints.steps())


def test_evaluations_are_counted_whatever_lies_between_them(tmp_path):
    losses = {0: 5.0, 3: 4.0, 6: 4.5, 9: 4.4, 10: 4.2}
    params = tiny.train_params(max_iters=10, patience=2)
    assert Run(tmp_path, params=params, val_losses=losses).go().progress.step == 9


@pytest.mark.parametrize("how", ["stop_at", "kill_at"])
@pytest.mark.parametrize("step", range(6))
def test_interrupted_at_any_step_it_ends_early_all_the_same(how, step, tmp_path):
    def result(run):
        last = run.checkpoints.read(5)
        return last.sha256, last.progress, run.weights(), run.records("step"), run.records("eval")

    reference = result(impatient(tmp_path / "reference").go())
    run = impatient(tmp_path / "run")
    if how == "stop_at" and step == 5:
        run.go(stop_at=step)  # the wish comes too late: it has ended
    else:
        run.interrupted(**{how: step})
    assert result(run.go()) == reference
    assert result(run.go()) == reference  # it has ended: started once more it does nothing
    assert run.records("diverged") == []


def test_a_report_tells_the_share_of_steps_whose_gradient_was_clipped(tmp_path):
    reference = Run(tmp_path / "a", params=tiny.train_params(grad_clip=0.0)).go()
    assert [record.get("clip_rate") for record in reference.records("speed")] == [None] * 5
    # Nothing is learnt, so that clipping changes no later norm.
    still = {"learning_rate": 1e-30, "min_lr": 0.0}
    norms = [r["grad_norm"] for r in Run(tmp_path / "b", params=tiny.train_params(**still)).go().records("step")]
    run = Run(tmp_path / "c", params=tiny.train_params(grad_clip=sorted(norms)[3], **still)).go()
    above = [norm > sorted(norms)[3] for norm in norms]
    reports = [above[0:2], above[2:3], above[3:4], above[4:6], above[6:7]]  # at steps 2, 3, 4, 6 and 7
    assert [record["clip_rate"] for record in run.records("speed")] == [sum(steps) / len(steps) for steps in reports]


# --- divergence -------------------------------------------------------------------------------------------------------


def diverged(run, match=None):
    with pytest.raises(Diverged, match=match) as caught:
        run.go()
    for path in run.checkpoints.directory.glob("step-*"):
        model = copy.deepcopy(run.model)
        model.load_state_dict(run.checkpoints.read(int(path.name[5:])).weights())
        assert all(torch.isfinite(weight).all() for weight in model.parameters()), path
    return caught.value.step


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    run = Run(tmp_path, poison=lambda model, loss, step: loss * math.nan if step == 4 else loss)
    knobs = r"step 5: loss nan.*train\.learning_rate.*train\.warmup_iters.*train\.grad_clip"
    assert diverged(run, knobs) == 5
    assert run.checkpoints.newest(print).progress.step == 4
    assert [record["step"] for record in run.records("step")] == [1, 2, 3, 4, 5]


def test_a_gradient_that_is_no_number_stops_the_run_too(tmp_path):
    def poison(model, loss, step):
        return loss + (torch.sqrt(model.wte.weight[0, 0] * 0) if step == 2 else 0)  # the root of 0: a slope of infinity

    assert diverged(Run(tmp_path, poison=poison), "step 3: loss [0-9.]+, gradient norm (nan|inf)") == 3


def test_an_absurd_learning_rate_stops_the_run(tmp_path):
    params = tiny.train_params(learning_rate=1e30, warmup_iters=0, max_iters=50, eval_interval=50)
    assert 1 < diverged(Run(tmp_path, params=params, intervals=Intervals(1, 1000))) < 50


def test_diverged_in_the_first_step_the_initial_weights_are_kept(tmp_path):
    run = Run(tmp_path, poison=lambda model, loss, step: loss * math.nan, intervals=Intervals(1, 1))
    assert diverged(run) == 1
    assert run.checkpoints.newest(print).progress.step == 0


def test_a_validation_loss_that_is_no_number_stops_the_run_too(tmp_path):
    # The last step's update can break the weights: without this they would be published.
    run = Run(tmp_path, val_losses={0: 3.0, 3: 2.0, 6: 1.0, 7: math.nan}, intervals=Intervals(2, 100))
    assert diverged(run) == 7
    assert run.checkpoints.newest(print).progress.step == 6


def test_with_a_gradient_scaler_an_infinite_gradient_is_a_skipped_step(tmp_path):
    def poison(model, loss, step):
        return loss * 1e35 if step == 2 else loss  # finite, but not when it is scaled

    run = Run(tmp_path, dtype="float16", poison=poison).go()
    norms = [record["grad_norm"] for record in run.records("step")]
    assert [math.isfinite(norm) for norm in norms] == [True, True, False, True, True, True, True]
    assert all(torch.isfinite(weight).all() for weight in run.model.parameters())


def test_a_compiled_model_computes_the_loss(monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    x = torch.from_numpy(TOKENS[:16].astype("int64")).view(2, 8)
    plain, compiled = (
        new_state(tiny.gpt(n_layer=1), tiny.train_params(), tiny.numerics(compile=compile)) for compile in (False, True)
    )
    assert compiled.forward is not compiled.model
    assert torch.equal(compiled.loss(x, x), plain.loss(x, x))
