import errno
import json
import math
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tracking.journal import START, Journal, JournalDamaged, read_records


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "attempt-1" / "journal.jsonl"


def filled(path: Path, steps: int = 5) -> bytes:
    """A journal of a start, some steps and a sample; returns its bytes."""
    path.unlink(missing_ok=True)
    with Journal(path) as journal:
        journal.append("start", step=0, resumed=False, environment={})
        for step in range(1, steps + 1):
            journal.append("step", step=step, loss=1 / step, grad_norm=0.1 * step, lr=3e-4, tokens=step)
        journal.append("sample", step=steps, prompt="\n", text="Ünicode\n\u2028 \ud800 and 'quotes\"")
    return path.read_bytes()


def test_values_come_back_exactly(path: Path) -> None:
    values = [0.1, 1e-300, -0.0, math.pi, math.inf, -math.inf, 5e-324, 2**53 + 1]
    with Journal(path) as journal:
        for step, value in enumerate(values):
            assert journal.append("step", step=step, loss=value, lr=math.nan) == []
        records = list(journal.records())
    assert [json.dumps(r["loss"]) for r in records] == [json.dumps(v) for v in values]
    assert all(math.isnan(r["lr"]) and isinstance(r["t"], int) for r in records)


def test_records_of_one_kind_are_read_without_the_others(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(path)
    with Journal(path) as journal:
        for step in (2, 4, 4, 3):  # one comes twice, and one late
            journal.append("eval", step=step, tokens=10 * step, val_loss=1 / step)
        expected = sorted((r for r in journal.records() if r["kind"] == "eval"), key=lambda record: record["step"])
        read: list[int] = []
        monkeypatch.setattr(journal, "_read", lambda offset: read.append(offset) or Journal._read(journal, offset))
        assert list(journal.records_of("eval")) == expected
        assert len(read) == len(expected) == 3
        assert list(journal.records_of("checkpoint")) == []


def test_append_many_is_one_block_and_reopening_continues_the_chain(path: Path) -> None:
    with Journal(path) as journal:
        assert journal.append_many({"kind": "step", "step": s, "t": 7, "loss": s / 3} for s in range(100)) == []
        position = journal.position()
    with Journal(path) as journal:
        assert journal.position() == position
        journal.append("end", status="FINISHED", message="", step=99, result={})
        assert journal.has_position(position)
        assert [r["step"] for r in journal.records()][:100] == list(range(100))
        assert next(journal.records())["t"] == 7


def test_the_first_record_of_a_step_stays(path: Path) -> None:
    filled(path)
    before = path.read_bytes()
    with Journal(path) as journal:
        assert journal.append("step", t=1, step=3, loss=1 / 3, grad_norm=0.1 * 3, lr=3e-4, tokens=3) == []
        assert journal.append("step", step=1, loss=1.0, grad_norm=0.1, lr=3e-4, tokens=1) == []
        assert path.read_bytes() == before
        # speed varies from run to run, so it is not compared
        assert journal.append("speed", step=3, step_time=1.0) == journal.append("speed", step=3, step_time=2.0) == []


def test_the_first_step_that_differs_is_recorded_once(path: Path) -> None:
    filled(path)
    with Journal(path) as journal:
        assert journal.append("step", step=2, loss=0.5, grad_norm=0.25, lr=3e-4, tokens=2) == ["grad_norm"]
        assert journal.append("step", step=3, loss=0.0, grad_norm=0.0, lr=3e-4, tokens=3) == ["loss", "grad_norm"]
        diverged = [r for r in journal.records() if r["kind"] == "diverged"]
    assert [(r["of"], r["step"], r["field"], r["first"], r["again"]) for r in diverged] == [
        ("step", 2, "grad_norm", 0.2, 0.25)
    ]
    with Journal(path) as journal:
        assert [r["loss"] for r in journal.records() if r["kind"] == "step"][:3] == [1.0, 0.5, 1 / 3]


def test_samples_are_identified_by_step_and_prompt(path: Path) -> None:
    with Journal(path) as journal:
        long = "x" * 5000
        assert journal.append("sample", step=10, prompt="a", text=long) == []
        assert journal.append("sample", step=10, prompt="b", text="other") == []
        assert journal.append("sample", step=10, prompt="a", text=long) == []
        assert journal.append("sample", step=10, prompt="a", text=long + "y") == ["text"]
        assert [r["kind"] for r in journal.records()] == ["sample", "sample", "diverged"]


def test_steps_may_come_in_any_order(path: Path) -> None:
    with Journal(path) as journal:
        for step in (5, 1, 3, 2, 4):
            assert journal.append("step", step=step, loss=float(step)) == []
    with Journal(path) as journal:
        for step in range(1, 6):
            assert journal.append("step", step=step, loss=float(step)) == []
            assert journal.append("step", step=step, loss=0.0) == ["loss"]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_flipped_bit_is_noticed(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "flip" / "attempt-1" / "journal.jsonl"
    content = bytearray(filled(path))
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    with pytest.raises(
        JournalDamaged, match=r"flip/attempt-1/journal.jsonl is damaged: line \d.*delete .*flip to train"
    ):
        Journal(path)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_journal_that_is_cut_off_keeps_its_complete_lines_and_knows_its_positions(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "cut" / "attempt-1" / "journal.jsonl"
    content = filled(path)
    with Journal(path) as journal:
        position = journal.position()
    length = data.draw(st.integers(0, len(content) - 1))
    path.write_bytes(content[:length])
    with Journal(path) as journal:
        assert path.read_bytes() == content[: content.rfind(b"\n", 0, length) + 1]
        assert not journal.has_position(position)
        assert journal.has_position(START)
        assert journal.has_position(journal.position())
    # what was cut off is appended again, and the chain holds
    with Journal(path) as journal:
        for step in range(1, 6):
            assert not journal.append("step", step=step, loss=1 / step, grad_norm=0.1 * step, lr=3e-4, tokens=step)
    with Journal(path) as journal:
        assert sorted(r["step"] for r in journal.records() if r["kind"] == "step") == [1, 2, 3, 4, 5]


@settings(max_examples=40, deadline=None)
@given(first=st.integers(0, 6), last=st.integers(0, 6))
def test_missing_or_swapped_lines_are_noticed(tmp_path_factory: pytest.TempPathFactory, first: int, last: int) -> None:
    path = tmp_path_factory.getbasetemp() / "lines" / "attempt-1" / "journal.jsonl"
    lines = filled(path).splitlines(keepends=True)
    if first == last:
        del lines[first]
        by_a_kill = first == 6  # only the newest line: a kill can do that
    else:
        lines[first], lines[last] = lines[last], lines[first]
        by_a_kill = False
    path.write_bytes(b"".join(lines))
    if by_a_kill:
        Journal(path).close()
    else:
        with pytest.raises(JournalDamaged):
            Journal(path)


def test_a_position_of_another_run_is_not_accepted(path: Path, tmp_path: Path) -> None:
    filled(path)
    other = tmp_path / "other" / "attempt-1" / "journal.jsonl"
    with Journal(other) as journal:
        for step in range(50):
            journal.append("step", step=step, loss=0.5)
        position = journal.position()
    with Journal(path) as journal:
        assert not journal.has_position(position)
        assert not journal.has_position({**journal.position(), "crc": "12345678"})


def test_a_reader_gets_complete_lines_and_continues_where_it_was(path: Path) -> None:
    with Journal(path) as journal:
        journal.append("step", step=1, loss=1.0)
        ((first, position),) = read_records(path)
        assert first["step"] == 1
        assert list(read_records(path, position)) == []
        with path.open("ab") as file:
            file.write(b'{"kind":"st')  # another process is in the middle of a write
        assert list(read_records(path, position)) == []
    with Journal(path) as journal:
        journal.append("step", step=2, loss=0.5)
        assert [r["step"] for r, _ in read_records(path, position)] == [2]
    with pytest.raises(JournalDamaged, match="have changed since they were read"):
        list(read_records(path, {"bytes": position["bytes"], "crc": "00000000"}))


def test_a_full_disk_leaves_the_file_unchanged(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = filled(path)
    real = os.write
    with Journal(path) as journal:
        monkeypatch.setattr(os, "write", lambda fd, block: real(fd, block[: len(block) // 2]))
        with pytest.raises(OSError, match="free some space") as caught:
            journal.append("step", step=6, loss=0.0)
        assert caught.value.errno == errno.ENOSPC
        assert path.read_bytes() == before
        monkeypatch.undo()
        assert journal.append("step", step=6, loss=0.0) == []
    Journal(path).close()


def test_ctrl_c_during_an_append_does_not_break_the_chain(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(path)
    with Journal(path) as journal:
        real = journal._write

        def interrupted(block: bytes) -> None:
            real(block)
            raise KeyboardInterrupt

        monkeypatch.setattr(journal, "_write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            journal.append("step", step=6, loss=0.0)
        monkeypatch.undo()
        assert journal.append("step", step=6, loss=0.0) == []
        journal.append("end", status="KILLED", message="Ctrl-C", step=6, result={})
    with Journal(path) as journal:
        assert [r["kind"] for r in journal.records()][-2:] == ["step", "end"]
