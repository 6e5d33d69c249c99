"""A text as token files, made as the first two stages make them, aside from data/."""

from pathlib import Path

from nanogpt.corpus.prepare import prepare
from nanogpt.corpus.sources import write_corpus
from nanogpt.params import Params


def write_tokens(text: Path, params: Params, folder: Path) -> Path:
    """Writes folder/tokens from a file, as params.tokenize says, and returns it. Raises ValueError."""
    download = params.download.model_copy(update={"source": f"file:{text}"})
    write_corpus(download, folder / "raw")
    prepare(folder / "raw", folder / "tokens", params.tokenize, params.runtime.processes)
    return folder / "tokens"
