"""What tests need of a breaker beyond its public surface, in one place.

Most private names that are used here stay, as code in the field leans on them. An
attribute without such a name is found by its value.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import weakref

import pybreaker

# Attributes that may be written without the lock: numbers that stand by themselves, and
# attributes whose setters take the lock.
WRITTEN_AT_WILL = {
    "_fail_max",
    "_reset_timeout",
    "_success_threshold",
    "_name",
    "_listeners",
    "_excluded_exceptions",
    "_state_storage",
}


def lock_of(breaker):
    return breaker._lock


def put_lock(breaker, lock):
    breaker._lock = lock
    return lock


def storage_of(breaker):
    return breaker._state_storage


def state_of(breaker):
    """The present state, without the look at the storage that `breaker.state` takes."""
    return breaker._state


def pin_shortening(write, factor, module=pybreaker):
    """Shorten the openings of growing length by this factor, not by a random one."""
    write(module.CircuitBreaker, "_factor_of", lambda breaker, opening: factor)


def count_failure(breaker):
    """Count a failure by hand, as the first half of `_handle_error` does."""
    breaker._inc_counter()


@functools.cache
def names_of_state():
    """The names of the attributes in which a breaker keeps its state."""
    breaker = pybreaker.CircuitBreaker()
    state = breaker.state
    return {name for name, value in vars(breaker).items() if value is state}


@functools.cache
def names_of_storage():
    """The names of the attributes in which a breaker keeps its storage."""
    storage = pybreaker.CircuitMemoryStorage("closed")
    breaker = pybreaker.CircuitBreaker(state_storage=storage)
    return {name for name, value in vars(breaker).items() if value is storage}


@functools.cache
def names_of_trial():
    """The names of the attributes in which a breaker keeps the trial that holds the
    place: those that are not None for as long as a trial runs."""
    breaker = pybreaker.CircuitBreaker(success_threshold=2)
    breaker.half_open()
    before = dict(vars(breaker))
    block = breaker.calling()
    context = contextvars.copy_context()
    context.run(block.__enter__)
    during = dict(vars(breaker))
    context.run(block.__exit__, None, None, None)
    after = dict(vars(breaker))
    return {
        name
        for name, value in during.items()
        if value is not None and before.get(name) is after.get(name) is None
    }


def is_place_free(breaker):
    """Whether no trial holds the place."""
    return all(getattr(breaker, name) is None for name in names_of_trial())


def after_fork():
    """Do what the library does in a forked child."""
    pybreaker._after_fork()


@contextlib.contextmanager
def no_other_breakers():
    """Replace the library's table of all breakers by an empty one, for a block."""
    table = pybreaker._breakers
    pybreaker._breakers = weakref.WeakValueDictionary()
    try:
        yield
    finally:
        pybreaker._breakers = table


def prefix_of(storage):
    """The text with which all keys of a shared storage begin."""
    return storage._prefix
