import threading

import pytest

from tracking.report import within


def test_what_takes_too_long_is_given_up():
    waiting = threading.Event()
    with pytest.raises(TimeoutError, match="it has not answered within 0 s"):
        within(0.01, waiting.wait)
    waiting.set()


def test_a_result_and_an_error_come_back():
    assert within(60, lambda: 5) == 5
    with pytest.raises(ZeroDivisionError):
        within(60, lambda: 1 // 0)
