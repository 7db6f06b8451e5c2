"""What many keys leave in memory, of which each is asked for once: a million of them
where there is time."""

from __future__ import annotations

import gc
import sys

import pytest
from support import DEEP, fail

import pybreaker
from pybreaker import CircuitBreakers

try:
    import tracemalloc
except ImportError:  # PyPy
    tracemalloc = None

KEYS = 1_000_000 if DEEP else 50_000


def collect():
    """Free what nothing needs, which takes PyPy, and a Python without a GIL, more than
    one collection."""
    for _ in range(3):
        gc.collect()


def held():
    """How many objects Python holds of those that its collector looks at."""
    collect()
    return len(gc.get_objects())


def test_keys_that_are_asked_for_once_leave_no_more_than_maxsize_breakers():
    breakers = CircuitBreakers(maxsize=1000)
    before = len(pybreaker.breakers())
    at_first = held()
    for key in range(1000):
        breakers[key]
    of_a_thousand = held() - at_first
    for key in range(1000, KEYS):
        breakers[key]
    in_the_end = held() - at_first
    assert len(breakers) == 1000
    # PyPy's machine code keeps some dozens of the breakers that it was compiled for.
    spare = 0 if sys.implementation.name == "cpython" else 500
    assert len(pybreaker.breakers()) <= before + 1000 + spare
    # Were nothing freed, `in_the_end` would be fifty times `of_a_thousand` or more.
    assert in_the_end < 3 * of_a_thousand


def traced():
    """How many bytes Python holds since tracemalloc has been started."""
    collect()
    return tracemalloc.get_traced_memory()[0]


@pytest.mark.skipif(tracemalloc is None, reason="PyPy has no tracemalloc")
def test_keys_that_are_asked_for_once_leave_the_bytes_of_maxsize_breakers():
    breakers = CircuitBreakers(maxsize=1000)
    tracemalloc.start()
    try:
        for key in range(1000):
            breakers[key]
        of_a_thousand = traced()
        for key in range(1000, 10_000):
            breakers[key]
        in_the_end = traced()
    finally:
        tracemalloc.stop()
    # How much a breaker takes differs between Pythons. Were nothing freed, `in_the_end`
    # would be ten times `of_a_thousand`.
    assert in_the_end < 3 * of_a_thousand


def test_dead_keys_leave_about_as_many_as_their_timeouts_hold(clock, caplog):
    caplog.set_level("CRITICAL", logger="pybreaker")
    breakers = CircuitBreakers(maxsize=1000, fail_max=1, reset_timeout=2000)
    most = 0
    for key in range(KEYS if DEEP else KEYS // 5):
        fail(breakers[key])
        clock.advance(1)
        most = max(most, len(breakers))
    assert 2000 <= most <= 3000
