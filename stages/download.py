"""The first stage: fetches the raw text into data/raw/."""

if __name__ == "__main__" and not __package__:
    raise SystemExit("Error: start this stage with `python -m stages.download`, in the root of the repository")

from pathlib import Path

from tracking.console import Console, command

RAW = Path("data/raw")


@command("download")
def main(console: Console) -> None:
    """Fetches the text or token files named in params.yaml (download) into data/raw/."""
    from nanogpt.corpus.sources import write_corpus
    from nanogpt.files import replacing
    from nanogpt.params import load_params

    params = load_params().download
    with console.progress("bytes", total=None) as update, replacing(RAW) as raw:
        info = write_corpus(params, raw, update, console.warn)
    documents = "1 text" if info.documents == 1 else f"{info.documents:,} documents"
    what = ", ".join(info.files) if info.kind == "tokens" else f"{documents}, {info.characters:,} characters"
    console.say(f"{what} ({info.source}) -> {RAW}")


if __name__ == "__main__":
    main()
