"""What tests share: calls that fail, and how many cases to go through."""

from __future__ import annotations

import gc
import itertools
import os
import re
import sys
import threading
import time

import pytest

from pybreaker import CircuitBreakerError, CircuitBreakerListener

# Set by "tox -e deep": there is time for everything.
DEEP = os.environ.get("PYBREAKER_DEEP") == "1"
# Set by tox where what takes long is not done: on all Pythons but the newest.
BRIEF = os.environ.get("PYBREAKER_BRIEF") == "1"

# Seconds that a test waits at most. Where many tests are to fail, few seconds will do.
PATIENCE = float(os.environ.get("PYBREAKER_PATIENCE", 60 if DEEP else 30))

# What listeners hear of.
EVENTS = [
    name
    for name, value in vars(CircuitBreakerListener).items()
    if callable(value) and not name.startswith("_")
]


def until(condition, patience=PATIENCE, pause=0.005):
    """Waits until condition() is true, and returns what condition() returned."""
    end = time.monotonic() + patience
    while not (found := condition()):
        assert time.monotonic() < end, f"it has not come true within {patience} s"
        time.sleep(pause)
    return found


def drive(coroutine):
    """Runs a coroutine that waits for nothing; that takes no event loop."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return stop.value
    raise AssertionError("the coroutine waited for something")


class Boom(Exception):
    """What the guarded service raises."""


def boom():
    raise Boom


def fail(breaker, times=1):
    """Calls that fail. Returns what the last one raised."""
    raised = None
    for _ in range(times):
        try:
            breaker.call(boom)
        except (Boom, CircuitBreakerError) as exc:
            raised = exc
    return raised


def let_go():
    """On a Python without reference counts, run the finalizers of all objects that no
    code refers to, and of the objects that those objects alone referred to."""
    if sys.implementation.name != "cpython":
        for _ in range(3):
            gc.collect()


def pairwise(**parameters):
    """Parametrizes a test with so few cases that any two values of any two parameters
    meet in a case; in "tox -e deep", with every combination.

    The values of a parameter are in a list, or in a dict by their names.
    """
    return _parametrized(parameters, list if DEEP else _covering)


def every(**parameters):
    """Parametrizes a test with every combination of the values."""
    return _parametrized(parameters, list)


def _parametrized(parameters, choose):
    columns = [
        list(values.items())
        if isinstance(values, dict)
        else [(getattr(value, "__name__", str(value)), value) for value in values]
        for values in parameters.values()
    ]
    rows = list(itertools.product(*(range(len(column)) for column in columns)))
    cases = []
    for row in choose(rows):
        names, values = zip(*(column[i] for column, i in zip(columns, row)))
        cases.append(pytest.param(*values, id="-".join(names)))
    return pytest.mark.parametrize(list(parameters), cases)


def _covering(rows):
    """A choice of the rows in which any two values meet that meet in `rows`. The rows
    that add the most pairs come first."""
    pairs = {row: set(itertools.combinations(enumerate(row), 2)) for row in rows}
    missing = set().union(*pairs.values())
    most = max(map(len, pairs.values()))
    for gain in range(most, 0, -1):
        for row in rows:
            new = pairs[row] & missing
            if len(new) == gain:
                missing -= new
                yield row


def while_locked(breaker, call, *args):
    """What a call returns in another thread while this one holds the breaker's
    lock, which it must not wait for."""
    results, thread = [], None

    def run():
        results.append(call(*args))

    with breaker._lock:
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(PATIENCE)
        assert not thread.is_alive(), "the call waited for the lock"
    (result,) = results
    return result


class CountingLock:
    """A breaker's lock that counts how often it is taken."""

    def __init__(self, lock):
        self._lock, self.taken = lock, 0

    def acquire(self, *args, **kwargs):
        self.taken += 1
        return self._lock.acquire(*args, **kwargs)

    def release(self):
        self._lock.release()

    def _is_owned(self):
        return self._lock._is_owned()

    def __enter__(self):
        return self.acquire()

    def __exit__(self, *exc_info):
        self.release()


def locks_taken(breaker, call, *args):
    """How often a call takes the breaker's lock."""
    lock = breaker._lock
    breaker._lock = counting = CountingLock(lock)
    try:
        call(*args)
    finally:
        breaker._lock = lock
    return counting.taken


def at_once(*calls):
    """Runs the calls in threads of their own that start together, and raises what
    one of them raised."""
    barrier, raised = threading.Barrier(len(calls)), []

    def run(call):
        barrier.wait(PATIENCE)
        try:
            call()
        except BaseException as exc:
            raised.append(exc)

    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if raised:
        raise raised[0]


def name_of(value):
    """What to call a parameter in a test's name: the same in each process, so without
    the addresses that a `repr` may have."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))
