"""The clones of the pipeline's tests, for tests that do harm to them."""

from tests.pipeline.conftest import copy_of, fresh, once, seed, shared

__all__ = ["copy_of", "fresh", "once", "seed", "shared"]
