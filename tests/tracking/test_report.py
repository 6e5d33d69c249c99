import threading

import pytest

from tracking.report import within


def test_a_call_that_takes_too_long_times_out():
    waiting = threading.Event()
    with pytest.raises(TimeoutError, match="it has not answered within 0 s"):
        within(0.01, waiting.wait)
    waiting.set()


def test_a_result_or_an_error_is_passed_on():
    assert within(60, lambda: 5) == 5
    with pytest.raises(ZeroDivisionError):
        within(60, lambda: 1 // 0)
