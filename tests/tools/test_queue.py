"""What `python -m tools queue` makes of DVC's tasks; tests/pipeline/test_queue.py runs it with DVC's own queue."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from tools import queue
from tools.queue import run


class Queue:
    """A queue as DVC's: names of tasks; each round of `Workers` begins one and ends another."""

    def __init__(self, queued, active=()):
        self.queued, self.active, self.results = list(map(entry, queued)), list(map(entry, active)), {}
        self.proc = {}

    def iter_queued(self):
        return iter(self.queued)

    def iter_active(self):
        return iter(self.active)

    def iter_done(self):
        return (SimpleNamespace(entry=SimpleNamespace(stash_rev=rev)) for rev in self.results)

    def get_result(self, entry):
        if self.results.get(entry.stash_rev) is None:
            raise FileNotFoundError
        return self.results[entry.stash_rev]


class Workers:
    """`work` receives the queue and the round each time that workers are kept; `starts` are the workers started."""

    def __init__(self, queue, work, starts=()):
        self.queue, self.work, self.starts, self.asked = queue, work, list(starts), []
        self.living, self.log = 1, "log"

    def alive(self):
        return self.living

    def keep(self, number):
        self.asked.append(number)
        self.work(self.queue, len(self.asked))
        return self.starts.pop(0) if self.starts else 0


def entry(name):
    return SimpleNamespace(name=name, stash_rev=f"rev-{name}")


def finish(queue, made="exp"):
    done = queue.active.pop() if queue.active else queue.queued.pop(0)
    named = SimpleNamespace(name=done.name)
    queue.results[done.stash_rev] = None if made is None else SimpleNamespace(exp_hash=made, ref_info=named)


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    monkeypatch.setattr(queue, "POLL_SECONDS", 0)


def outcome(tasks, workers, jobs=1):
    lines = []
    made, failed = run(tasks, workers, jobs, lines.append)
    assert not set(made) & set(failed)
    return failed, lines


def test_an_empty_queue_says_how_to_fill_it():
    failed, lines = outcome(Queue([]), None)
    assert (failed, lines) == ([], ["nothing is queued; `dvc exp run --queue -S KEY=VALUE` adds an experiment"])


def test_each_experiment_has_a_line_and_failed_ones_are_returned():
    tasks = Queue(["a", "b"])
    workers = Workers(tasks, lambda queue, turn: finish(queue, "exp" if turn == 1 else None))
    failed, lines = outcome(tasks, workers, jobs=3)
    assert failed == ["b"]
    assert lines[1:] == ["1 of 2  a  done", "2 of 2  b  FAILED"]
    assert workers.asked == [2, 1], "no more workers than experiments"


def test_a_task_that_was_removed_has_not_failed():
    tasks = Queue(["a"])
    failed, lines = outcome(tasks, Workers(tasks, lambda queue, turn: queue.queued.clear()))
    assert (failed, lines[1]) == ([], "1 of 1  a  removed from the queue")


def test_a_task_that_was_killed_with_its_worker_is_interrupted_unless_its_process_lives(monkeypatch):
    tasks = Queue([], ["b", "a"])
    tasks.proc = {"rev-a": SimpleNamespace(pid=1), "rev-b": SimpleNamespace(pid=2)}
    rounds = iter(range(3))

    def exists(pid):
        if pid == 2 and next(rounds) == 2:
            tasks.active = tasks.active[:1]
            finish(tasks)  # b, by a worker of another command
        return pid == 2

    monkeypatch.setattr(queue.psutil, "pid_exists", exists)
    workers = Workers(tasks, None)
    workers.living = 0
    failed, lines = outcome(tasks, workers)
    assert failed == ["a"]
    assert "`dvc queue kill a`" in lines[1]
    assert lines[2] == "2 of 2  b  done"


def test_workers_that_end_at_once_are_an_error_that_names_their_log():
    tasks = Queue(["a"])
    workers = Workers(tasks, lambda queue, turn: None, starts=[1] * 100)
    with pytest.raises(ValueError, match="workers end without having run an experiment; see log"):
        outcome(tasks, workers)


def test_half_a_message_is_read_again():
    tasks, broken = Queue(["a"]), iter([ValueError("Expecting value"), None])

    def iter_queued():
        if error := next(broken, None):
            raise error
        return iter(tasks.queued)

    tasks.iter_queued = iter_queued
    assert outcome(tasks, Workers(tasks, lambda queue, turn: finish(queue)))[0] == []


def test_workers_of_an_earlier_command_count(tmp_path):
    """Or Ctrl-C and the same command would run twice as many experiments at a time."""
    program = [sys.executable, "-c", "print(flush=True); input()", "queue-worker"]
    with subprocess.Popen(program, cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        workers = queue.Workers(tmp_path, tmp_path / "log")
        assert (workers.alive(), workers.keep(1)) == (1, 0)
        assert queue.Workers(tmp_path / "elsewhere", tmp_path / "log").alive() == 0
        process.communicate(b"\n")
    assert workers.alive() == 0
