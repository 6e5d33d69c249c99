"""Python's garbage collector, kept out of work that it only slows down."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_paused() -> Iterator[None]:
    """Pauses the garbage collector for a block that makes many objects, such as the import of a large library.

    It would look through all of them again and again: 10 to 40 % of the time of such imports. What is left of them
    stays for the life of the process, so later collections leave it out.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()
