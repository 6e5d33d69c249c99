"""Leaves MLflow out, whose import and database take more of the processor than the pipeline itself.

A stage cannot import it, and the process that fills it beside a training ends at once.
"""

import sys


class WithoutMlflow:
    """Finds every module where it is, but for MLflow."""

    @staticmethod
    def find_spec(name: str, *_: object) -> None:
        if name == "mlflow":
            raise SystemExit if "sync" in sys.orig_argv else ImportError("MLflow is left out")


sys.meta_path.insert(0, WithoutMlflow)
