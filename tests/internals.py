"""What tests need of a breaker that its public surface does not show, in one place.

Names that begin with an underscore and are used here are those that code in the field
leans on, so they stay. What has no such name is found by what is in it.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import weakref

import pybreaker

# What may be written without the lock: numbers that stand by themselves, and what
# takes the lock by itself when somebody writes it.
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
    """Let no chance shorten the openings of growing length: always by this factor."""
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
    place: those that have something in them for as long as one runs."""
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
    """Do what is done in a child when its process has been forked."""
    pybreaker._after_fork()


@contextlib.contextmanager
def no_other_breakers():
    """The library's table of all breakers is empty to begin with, and small."""
    table = pybreaker._breakers
    pybreaker._breakers = weakref.WeakValueDictionary()
    try:
        yield
    finally:
        pybreaker._breakers = table


def prefix_of(storage):
    """What all keys of a shared storage begin with."""
    return storage._prefix
