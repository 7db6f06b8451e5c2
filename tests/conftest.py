"""What every test file may use: a clock to move, and a listener that remembers."""

from __future__ import annotations

import gc
import sys
import types

import pytest

import pybreaker


def pytest_terminal_summary(terminalreporter):
    """Say how far the searches have come, whichever processes they ran in."""
    found = {"schedules": [], "circuits": []}
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            for name, value in report.user_properties:
                if report.when == "call" and name in found:
                    found[name].append(value)
    if found["schedules"]:
        scenarios, counts = zip(*found["schedules"])
        terminalreporter.write_line(
            f"explored {sum(counts)} schedules of {len(set(scenarios))} scenarios"
        )
    if found["circuits"]:
        circuits, calls, trials = map(sum, zip(*found["circuits"]))
        terminalreporter.write_line(
            f"compared {circuits} circuits with the model: {calls} calls, {trials} "
            f"trials"
        )


if hasattr(gc, "freeze"):  # PyPy has none

    def pytest_collection_finish(session):
        """The collector leaves out what pytest has collected, which lasts as long as
        the process. A quarter of the time of tests/spec went into looking through
        that."""
        gc.collect()
        gc.freeze()

    def pytest_sessionfinish(session):
        """Hypothesis, which is imported after the tests, asks the collector for all."""
        gc.unfreeze()


class Clock:
    """The monotonic clock as the library sees it. It moves when told to."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now

    def advance(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    """Stops the library's monotonic clock, and no other code's."""
    clock = Clock()
    fake = types.SimpleNamespace(monotonic=clock.monotonic)
    monkeypatch.setattr(pybreaker, "time", fake)
    return clock


class Recorder(pybreaker.CircuitBreakerListener):
    """Remembers what it is told, in order, as tuples that begin with the event."""

    def __init__(self):
        self.events = []

    def before_call(self, cb, func, *args, **kwargs):
        self.events.append(("before_call", func, args, kwargs))

    def failure(self, cb, exc):
        self.events.append(("failure", exc))

    def success(self, cb):
        self.events.append(("success",))

    def state_change(self, cb, old_state, new_state):
        self.events.append(("state_change", old_state.name, new_state.name))

    @property
    def names(self):
        """The events without their details."""
        return [event[0] for event in self.events]

    @property
    def transitions(self):
        """The moves from state to state, as pairs of names."""
        return [event[1:] for event in self.events if event[0] == "state_change"]


@pytest.fixture
def hasty():
    """Makes threads take turns as often as they can, to bring races out."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.fixture
def recorder():
    return Recorder()


class Boom(Exception):
    """What the guarded service raises in these tests."""


@pytest.fixture
def fail():
    """A function that always raises Boom, whatever it is given."""

    def fail(*args, **kwargs):
        raise Boom

    return fail


@pytest.fixture
def boom():
    """The class that `fail` raises."""
    return Boom
