"""What a window leaves in memory: no more than the failures that it remembers."""

from __future__ import annotations

import gc
import math

import pytest
from support import fail

import pybreaker
from pybreaker import CircuitBreaker


def kept_by_the_library(grow):
    """Bytes that the library's code has allocated in `grow()` and that are kept."""
    tracemalloc = pytest.importorskip("tracemalloc")  # PyPy has none
    mine = tracemalloc.Filter(True, pybreaker.__file__)
    tracemalloc.start()
    try:
        grow()
        gc.collect()  # the exceptions that the tests keep in a cycle
        gc.collect()  # without a GIL, Python frees some memory at the next collection
        snapshot = tracemalloc.take_snapshot().filter_traces([mine])
        return sum(trace.size for trace in snapshot.traces)
    finally:
        tracemalloc.stop()


def assert_as_little_is_kept(little, much):
    """`much` leaves as little in memory as `little`. Python may free memory late, or a
    dictionary may grow, in one of three attempts but not in all."""
    for _ in range(3):
        few, many = kept_by_the_library(little), kept_by_the_library(much)
        if many - few < 5000:
            return
    pytest.fail(f"{many - few} bytes more are kept")


@pytest.mark.parametrize(
    "settings",
    [
        {"fail_max": 3, "window_size": 4},
        {"fail_max": 3, "window_seconds": 2},
        {"fail_max": math.inf, "window_seconds": 4},
        {"fail_max": math.inf, "window_size": math.inf, "window_seconds": 4},
    ],
    ids=str,
)
def test_no_more_is_kept_than_is_remembered(clock, settings):
    """Two thousand failures, of which few are remembered, cost what few cost."""
    breaker = CircuitBreaker(**settings)

    def grow(steps):
        for _ in range(steps):
            fail(breaker, 2)
            clock.advance(2)
            if breaker.window_size == 4:
                for _ in range(4):
                    breaker.call(int)

    assert_as_little_is_kept(lambda: grow(20), lambda: grow(1000))
    assert breaker.current_state == "closed"


def test_a_window_that_was_switched_off_keeps_nothing():
    """A thousand failures in a row cost no more than ten."""
    breaker = CircuitBreaker(fail_max=math.inf, window_seconds=5)
    breaker.window_seconds = None
    assert_as_little_is_kept(lambda: fail(breaker, 10), lambda: fail(breaker, 1000))
    assert breaker.fail_counter >= 1010
