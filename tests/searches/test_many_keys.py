"""What many keys leave in memory, of which each is asked for once: a million of them
where there is time."""

from __future__ import annotations

import gc

import pytest
from support import DEEP, fail

import pybreaker
from pybreaker import CircuitBreakers

KEYS = 1_000_000 if DEEP else 50_000


def test_keys_that_are_asked_for_once_leave_no_more_than_maxsize_breakers():
    tracemalloc = pytest.importorskip("tracemalloc")  # PyPy has none
    breakers = CircuitBreakers(maxsize=1000)
    before = len(pybreaker.breakers())
    tracemalloc.start()
    try:
        for key in range(1000):
            breakers[key]
        gc.collect()
        of_a_thousand, _ = tracemalloc.get_traced_memory()
        for key in range(1000, KEYS // 5):
            breakers[key]
        gc.collect()
        in_the_end, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        for key in range(KEYS // 5, KEYS):
            breakers[key]
    finally:
        tracemalloc.stop()
    gc.collect()
    assert len(breakers) == 1000
    assert len(pybreaker.breakers()) <= before + 1000
    # How much a breaker takes differs between Pythons. Were nothing freed, this would
    # be ten times as much or more. A Python without a GIL frees some of it later.
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
