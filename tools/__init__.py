"""The commands other than the stages, each run as `python -m tools COMMAND`."""
