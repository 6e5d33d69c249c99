"""From a source to token files: sources, raw text, tokenizers, .bin files."""
