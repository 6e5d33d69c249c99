"""Commands that are no stage, each run as `python -m tools COMMAND`."""
