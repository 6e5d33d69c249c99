"""What the other files' checks rest on: `harmless` notices what an input does."""

from pathlib import Path

import pytest

from tests.safety import hostile


def parse(folder: Path, size: int) -> None:
    """One input that is refused, and one that takes `size` bytes."""

    def refused() -> None:
        raise ValueError("not one of ours")

    with hostile.harmless("a parser", folder):
        hostile.parsed("a parser", refused)
        hostile.parsed("a parser", lambda: len(b"x" * size))


def test_memory_counts_also_where_the_process_has_held_more_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hostile, "MOST_MEMORY", 50_000_000)
    bytearray(b"x" * 200_000_000).clear()
    parse(tmp_path / "folder", 1000)
    with pytest.raises(AssertionError, match="too much memory"):
        parse(tmp_path / "folder", 100_000_000)
