"""What the other files' checks rest on: `harmless` notices what an input does."""

from pathlib import Path

import pytest

from tests.safety.hostile import MOST_MEMORY, harmless, parsed


def refused() -> None:
    raise ValueError("not one of ours")


def test_memory_counts_also_where_the_process_has_held_more_before(tmp_path: Path) -> None:
    bytearray(b"x" * 2 * MOST_MEMORY).clear()
    with pytest.raises(AssertionError, match="too much memory"), harmless("a parser", tmp_path / "folder"):
        parsed("a parser", refused)
        parsed("a parser", lambda: len(b"x" * MOST_MEMORY * 2))


def test_what_takes_little_is_harmless(tmp_path: Path) -> None:
    with harmless("another parser", tmp_path / "folder"):
        parsed("another parser", refused)
        parsed("another parser", lambda: 1)
