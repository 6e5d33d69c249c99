"""Puts a training together: model, optimizer, data and checkpoints for the loop, and what is told of it."""

import csv
import io
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file

from nanogpt import determinism, flops
from nanogpt.checkpoint import Checkpoint, Checkpoints, load_weights, put, restore
from nanogpt.corpus.token_files import Split, SplitName, load_meta
from nanogpt.corpus.tokenizer import load_tokenizer
from nanogpt.distributed import Ranks
from nanogpt.evaluate import Score, score, spread, windows
from nanogpt.files import sha256_tree, write_text
from nanogpt.optimizer import make_optimizer
from nanogpt.params import Params, flatten
from nanogpt.pretrained import Initial
from nanogpt.saved_model import PublishedModel, save_model
from nanogpt.train import Intervals, Report, train
from nanogpt.train_state import Progress
from tracking.console import Console, Update
from tracking.dvc_files import directory_md5
from tracking.journal import Journal
from tracking.preview import check_prompts, preview
from tracking.profiler import profiled


class Training:
    """One attempt: from the beginning, or from where `resume` or `restore` puts it."""

    def __init__(
        self,
        console: Console,
        attempt: Path,
        fingerprint: str,
        params: Params,
        resolved: determinism.Numerics,
        tokens: Path,
        splits: dict[SplitName, Split],
        initial: Initial,
        journal: Journal,
        curve: Path,
        ranks: Ranks,
    ):
        self.console, self.attempt, self.params, self.splits, self.journal = console, attempt, params, splits, journal
        self.ranks = ranks
        self.curve = curve  # where the loss curve is kept up to date
        self.device = torch.device(resolved.device)
        self.autocast = determinism.autocast(self.device, resolved.dtype)
        self.tokenizer_path = tokens / "tokenizer.json"
        tokenizer = load_tokenizer(self.tokenizer_path, load_meta(tokens).tokenizer_sha256)
        check_prompts(tokenizer, params.tracking.prompts)
        self.model = initial.build(params.train.seed, params.numerics.attention, self.device)
        self.optimizer = make_optimizer(self.model, params.train, self.device.type, resolved.dtype)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=resolved.dtype == "float16")
        self.checkpoints = Checkpoints(attempt / "checkpoints", fingerprint)
        self.progress = Progress()
        self.unfinished = PublishedModel(self.model, tokenizer, {})
        self.peak = self._peak(resolved) if ranks.first else None

    def resume(self) -> None:
        """Goes on from the newest checkpoint that is whole, if there is one; the first process alone looks for it."""
        checkpoint = self._newest() if self.ranks.first else None
        known = {"progress": asdict(checkpoint.progress), "scaler": checkpoint.scaler} if checkpoint else None
        state = self.ranks.tell(known)
        if state is None:
            return
        tensors = self.ranks.tell_tensors(load_file(checkpoint.state) if checkpoint else {})
        put(tensors, state["scaler"], self.model, self.optimizer, self.scaler)
        self.progress = Progress(**state["progress"])
        self.console.say(f"resuming at step {self.progress.step:,} of {self.params.train.last_step:,}")

    def _newest(self) -> Checkpoint | None:
        checkpoint = self.checkpoints.newest(on_damage=self.console.warn)
        if checkpoint is not None and not self.journal.has_position(checkpoint.journal):
            raise ValueError(
                f"{self.journal.path} lacks records that checkpoint {checkpoint.directory.name} counts on; "
                f"remove {self.attempt} to train afresh"
            )
        return checkpoint

    def restore(self, checkpoint: Checkpoint) -> None:
        """Goes on from that checkpoint."""
        restore(checkpoint, self.model, self.optimizer, self.scaler)
        self.progress = checkpoint.progress

    def _peak(self, resolved: determinism.Numerics) -> float | None:
        """Of all processes' devices together."""
        peak: float | None
        if self.device.type == "cpu":
            peak = flops.measured_peak_flops(time.perf_counter, getattr(torch, resolved.dtype))
        else:
            peak = flops.peak_flops(resolved.device_name, resolved.dtype)
        return peak and peak * self.ranks.size

    def run(self, stop: Callable[[], str | None]) -> None:
        """Trains to the end. Raises what the loop raises."""
        params = self.params
        compiled: Any = torch.compile(self.model) if params.numerics.compile else self.model
        forward = self.ranks.parallel(compiled, fixed_order=params.numerics.determinism != "off")
        traced = params.runtime.profile_steps if self.ranks.first else 0
        trace = profiled(stop, traced, self.attempt / "trace.json", self.console.say)
        with self.console.progress("step", params.train.last_step, self.progress.step) as update, trace as stop:
            train(
                self.model,
                forward,
                self.optimizer,
                self.scaler,
                self.autocast,
                params.train,
                self.splits["train"].tokens,
                self.evaluate,
                self.progress,
                self.checkpoints,
                self.journal,
                Intervals(params.runtime.log_interval, params.runtime.checkpoint_interval),
                self.ranks,
                lambda progress, report: self.report(update, report),
                self.after_evaluation,
                stop,
            )
        if self.progress.step < params.train.last_step:
            self.console.say(
                f"ended at step {self.progress.step:,} of {params.train.last_step:,}: no new best validation loss in "
                f"{params.train.patience} evaluations (train.patience)"
            )

    def evaluate(self) -> tuple[Score, Score]:
        """Scores eval_iters batches of each split: windows spread over it, the same ones each time.

        The first process does it and tells the others, so that all decide by the same numbers.
        """
        splits = (self.splits["train"], self.splits["val"])
        scores = [asdict(self._estimate(split)) for split in splits] if self.ranks.first else None
        train_score, val_score = (Score(**each) for each in self.ranks.tell(scores))
        return train_score, val_score

    def _estimate(self, split: Split) -> Score:
        block_size, batch_size = self.model.config.block_size, self.params.train.batch_size
        targets = len(split.tokens) - (split.meta.first_context is None)
        chosen = spread(windows(targets, block_size, block_size), self.params.train.eval_iters * batch_size)
        return score(self.model, split.tokens, chosen, batch_size, split.meta.first_context, self.autocast)

    def report(self, update: Update, report: Report) -> None:
        """Tells of the newest steps: on the screen, and how fast they went to the journal."""
        config = self.model.config
        train_params = self.params.train
        samples = train_params.batch_size * train_params.gradient_accumulation_steps  # of all processes
        speed = samples * config.block_size / report.seconds
        share = flops.mfu(speed, flops.flops_per_token(config, self.model.parameter_count()), self.peak)
        values = {"mfu": share, "clip_rate": report.clip_rate}
        self.journal.append(
            "speed",
            step=self.progress.step,
            tokens_per_second=speed,
            step_time=report.seconds,
            memory_mb=memory_mb(self.device),
            **{name: value for name, value in values.items() if value is not None},
        )
        update(self.progress.step, loss=f"{report.loss:.4f}", **{"tokens/s": f"{speed:,.0f}"})

    def after_evaluation(self, progress: Progress) -> None:
        """Tells of an evaluation: the loss curve for DVC's live plots, and what the model writes by now."""
        if not self.ranks.first:
            return
        write_text(self.curve, loss_curve(self.journal))
        tracking = self.params.tracking
        preview(self.unfinished, tracking.prompts, tracking.sample_tokens, progress.step, self.journal)
        best = " (best so far)" if progress.best_step == progress.step else ""
        self.console.say(f"step {progress.step:,}: val loss {progress.val_loss:.4f}{best}")

    def finish(self, tokens_sha256: str) -> dict[str, Any]:
        """Writes models/best and models/last of the attempt; returns the result that the journal's end records."""
        progress = self.progress
        published = {"best": progress.best_step, "last": progress.step}
        evaluations = {r["step"]: r for r in self.journal.records() if r["kind"] == "eval"}
        for name, step in published.items():
            load_weights(self.checkpoints.read(step), self.model)
            info = {
                "step": step,
                "train_loss": evaluations[step]["train_loss"],
                "val_loss": evaluations[step]["val_loss"],
                "tokens_sha256": tokens_sha256,
                "params": flatten(self.params.model, "model.") | flatten(self.params.train, "train."),
            }
            weights = dict(self.model.named_parameters())
            detached = {name: weight.detach().cpu() for name, weight in weights.items()}
            save_model(self.attempt / "models" / name, self.model.config, detached, self.tokenizer_path, info)
        chosen = self.params.train.publish
        model = self.attempt / "models" / chosen
        return {
            "published": chosen,
            "step": published[chosen],
            "train_loss": evaluations[published[chosen]]["train_loss"],
            "val_loss": evaluations[published[chosen]]["val_loss"],
            "best_step": progress.best_step,
            "best_val_loss": progress.best_val_loss,
            "steps": progress.step,
            "tokens": evaluations[progress.step]["tokens"],
            "parameters": self.model.parameter_count(),
            "model_sha256": sha256_tree(model),
            "model_md5": directory_md5(model),
        }


def loss_curve(journal: Journal) -> str:
    """The evaluations as CSV: a row a step. Written at each of them, so it must not read the whole journal."""
    text = io.StringIO()
    rows = csv.DictWriter(
        text, ["step", "tokens", "train_loss", "val_loss"], extrasaction="ignore", lineterminator="\n"
    )
    rows.writeheader()
    rows.writerows(journal.records_of("eval"))
    return text.getvalue()


def memory_mb(device: torch.device) -> float:
    """Peak memory on a GPU, else what the process holds now, in 10^6 bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    return float(psutil.Process().memory_info().rss / 1e6)
