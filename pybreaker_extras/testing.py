"""For the tests of programs that have breakers. No clock has to be faked.

In the ``conftest.py`` of a test suite for pytest:

    pytest_plugins = ["pybreaker_extras.testing"]

and in its ``pytest.ini``, to begin every test with closed circuits:

    usefixtures = fresh_breakers

Elsewhere, `restoring_breakers` is the same as a ``with`` block.
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

# In an order in which each may be set: a limit is gone before what it limits changes,
# and comes back after that.
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
    """Close, when the block ends, every breaker that is alive and has its state in
    memory, and forget its failures.

    Breakers that were there when the block began have again the settings and the
    listeners that they had then. No listener and no log is told of it. A breaker on a
    shared storage is left alone.
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
            # Not by a close() of a subclass, which may tell others.
            CircuitBreaker.close(breaker)
        finally:
            logger.disabled = was_disabled
            breaker._listeners = listeners


def let_timeout_pass(breaker: CircuitBreaker) -> None:
    """Make an open circuit as old as its timeout: the next call is the trial.

    `ValueError` if the circuit is not open.
    """
    with breaker._lock:
        if breaker.state.name != STATE_OPEN:
            raise ValueError(
                f"let_timeout_pass takes a breaker whose circuit is open, not "
                f"{breaker!r}: let its calls fail or open() it first"
            )
        wait = breaker.retry_after
        moment: datetime | None
        try:
            moment = breaker._state_storage.opened_at
            moment = moment and moment - timedelta(seconds=wait + 1)
        except OverflowError:  # until somebody moves the circuit, or nearly so
            moment = None  # means that the timeout has passed
        storage: Any = breaker._state_storage
        storage.opened_at = moment


@contextlib.contextmanager
def refusing(breaker: CircuitBreaker) -> Iterator[CircuitBreaker]:
    """A block in which the breaker rejects every call, also one in a dry run.

    When the block ends, the circuit is in the state that it was in, with the failures
    that it had. Listeners are told of both moves, as they are in an outage.
    """
    before, failures = breaker.state, breaker.fail_counter
    wait, is_dry = breaker.retry_after, breaker.dry_run
    breaker.dry_run = False
    # Not by an open() of a subclass, which may take no arguments.
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
except ImportError:  # with unittest alone there is no fixture

    def __getattr__(name: str) -> Any:
        if name == "fresh_breakers":
            raise ImportError(
                "fresh_breakers is a fixture of pytest, which is not installed; "
                "restoring_breakers() is the same as a with block"
            )
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

else:

    @pytest.fixture
    def fresh_breakers() -> Iterator[None]:
        """Circuits are closed, without failures, and breakers have the settings and
        listeners that they had, when the test ends: see `restoring_breakers`."""
        with restoring_breakers():
            yield
