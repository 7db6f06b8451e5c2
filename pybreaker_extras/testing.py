"""Tools for the tests of programs that have breakers. No test has to fake a clock.

A test suite for pytest has this line in its ``conftest.py``:

    pytest_plugins = ["pybreaker_extras.testing"]

and this line in its ``pytest.ini``, so that no test leaves an open circuit to the next:

    usefixtures = fresh_breakers

Without pytest, a ``with`` block of `restoring_breakers` does what the fixture does.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

from pybreaker import (
    STATE_CLOSED,
    STATE_OPEN,
    CircuitBreaker,
    CircuitMemoryStorage,
    breakers,
)

# _restore switches off the limits and then sets the settings in this order: first the
# settings that the limits bound, then the limits.
_SETTINGS = (
    "name",
    "fail_max",
    "reset_timeout",
    "success_threshold",
    "throw_new_error_on_trip",
    "exclude",
    "include",
    "ignore",
    "failure_result",
    "dry_run",
    "window_seconds",
    "window_size",
    "max_reset_timeout",
)
_LIMITS = ("window_size", "window_seconds", "max_reset_timeout")


@contextlib.contextmanager
def restoring_breakers() -> Iterator[None]:
    """A context manager for a test: when the block ends, every living breaker on a
    `CircuitMemoryStorage` is closed, without failures.

    Such a breaker that was alive when the block began also gets back the settings and
    the listeners of that moment. Listeners and the log are told nothing. Breakers on
    other storages stay as they are.
    """
    before = [(each, _settings_of(each), each.listeners) for each in _in_memory()]
    try:
        yield
    finally:
        for breaker, settings, listeners in before:
            _restore(breaker, settings, listeners)
        for breaker in _in_memory():
            _close_silently(breaker)


def _in_memory() -> list[CircuitBreaker]:
    return [
        breaker
        for breaker in breakers()
        if isinstance(breaker._state_storage, CircuitMemoryStorage)
    ]


def _settings_of(breaker: CircuitBreaker) -> dict[str, Any]:
    return {name: getattr(breaker, name) for name in _SETTINGS}


def _restore(
    breaker: CircuitBreaker, settings: dict[str, Any], listeners: tuple[Any, ...]
) -> None:
    if _settings_of(breaker) != settings:
        for name in _LIMITS:
            setattr(breaker, name, None)
    for name, value in settings.items():
        if getattr(breaker, name) != value:
            setattr(breaker, name, value)
    if breaker.listeners != listeners:
        breaker._listeners = listeners


def _close_silently(breaker: CircuitBreaker) -> None:
    logger = logging.getLogger("pybreaker")
    was_disabled = logger.disabled
    with breaker._lock:
        listeners = breaker.listeners
        breaker._listeners = ()
        logger.disabled = True
        try:
            # Not by breaker.close(), which in a subclass may tell other code.
            CircuitBreaker.close(breaker)
        finally:
            logger.disabled = was_disabled
            breaker._listeners = listeners


def let_timeout_pass(breaker: CircuitBreaker) -> None:
    """Make an open circuit older than its timeout, so that the next call is the trial.

    Raises `ValueError` if the circuit is not open.
    """
    with breaker._lock:
        if breaker.state.name != STATE_OPEN:
            raise ValueError(
                f"let_timeout_pass takes a breaker whose circuit is open, not "
                f"{breaker!r}: let its calls fail or open() it first"
            )
        storage: Any = breaker._state_storage
        moment: datetime | None = storage.opened_at
        if moment is not None:  # None says that the timeout has passed
            # For the new `opened_at` the breaker may draw another random length of the
            # opening. The shortest length is 0.9 of the longest.
            length = (storage.open_for() + breaker.retry_after) / 0.9
            try:
                moment -= timedelta(seconds=length + 1)
            except OverflowError:  # the length is infinite or too long for a timedelta
                moment = None
        storage.opened_at = moment


@contextlib.contextmanager
def refusing(breaker: CircuitBreaker) -> Iterator[CircuitBreaker]:
    """A context manager that returns the breaker. Within the block the breaker rejects
    every call, even with `dry_run`.

    When the block ends, the circuit goes back to its former state and failures.
    Listeners are told of both moves, as they are in an outage.
    """
    before, failures = breaker.state, breaker.fail_counter
    wait, is_dry = breaker.retry_after, breaker.dry_run
    breaker.dry_run = False
    # Not by breaker.open(), which in a subclass may take no arguments.
    CircuitBreaker.open(breaker, math.inf, "refusing() in a test")
    try:
        yield breaker
    finally:
        breaker.dry_run = is_dry
        if before.name == STATE_CLOSED:
            CircuitBreaker.close(breaker, before.reason)
            breaker.fail_counter = failures
        elif before.name == STATE_OPEN:
            CircuitBreaker.open(breaker, wait, before.reason)
        else:
            CircuitBreaker.half_open(breaker, before.reason)


try:
    import pytest
except ImportError:  # without pytest there is no fixture

    def __getattr__(name: str) -> Any:
        if name == "fresh_breakers":
            raise ImportError(
                "fresh_breakers is a fixture of pytest, which is not installed; "
                "without pytest, write `with restoring_breakers():`"
            )
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

else:

    @pytest.fixture
    def fresh_breakers() -> Iterator[None]:
        """A fixture that runs the test in a block of `restoring_breakers`: when the
        test ends, circuits are closed and breakers have their former settings."""
        with restoring_breakers():
            yield
