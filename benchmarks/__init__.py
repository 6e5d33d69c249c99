"""What is measured, one command each, run as `python -m benchmarks.<name>`; no test depends on a time."""
