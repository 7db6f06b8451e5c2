"""The library does what the specification says, in whatever order things happen.

A breaker and the `model` of one go through the same steps, which Hypothesis makes
up: calls of every kind that begin, and end at some later time or never, moves by
hand, time, settings, listeners, exclusions, and a storage that others write. After
each step both must agree on what callers get, what listeners hear and see, and all
that can be read.

How often the search came to each corner is counted, printed (``pytest -rP``), and
has a lower bound. Each Python has seeds of its own, always the same ones. With
``PYBREAKER_DEEP=1`` (``tox -e deep``) the search is longer and its seeds are new each
time; with ``PYBREAKER_BRIEF=1`` there is one seed.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import contextvars
import functools
import logging
import math
import random
import sys
from datetime import datetime, timedelta, timezone

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from internals import lock_of, pin_shortening, state_of
from model import (
    ABANDONED,
    CLOSED,
    FAILURE,
    HALF_OPEN,
    OPEN,
    SUCCESS,
    Call,
    FailedResult,
    Model,
    Rejected,
    Tripped,
)
from support import BRIEF, DEEP, EVENTS

import pybreaker
from pybreaker import CircuitBreaker, CircuitBreakerError, CircuitBreakerStorage

settings.register_profile(
    "model",
    max_examples=30,
    stateful_step_count=50,
    deadline=None,
    database=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
    print_blob=False,
)
settings.register_profile("model-deep", settings.get_profile("model"), max_examples=300)
PROFILE = settings.get_profile("model-deep" if DEEP else "model")
SEEDS = 3
ENOUGH = 3 if DEEP else 1  # times that the search has to come to each corner


# What calls end with.


class Boom(Exception):
    """A failure, until it is excluded."""


class Marker:
    """Not an exception, but can be excluded all the same."""


class Marked(Boom, Marker):
    """A failure that exclusions of `Boom` and of `Marker` match."""


class Gone(BaseException):
    """A BaseException that counts as a failure."""


ABANDONING = (KeyboardInterrupt, SystemExit, asyncio.CancelledError, GeneratorExit)
EXCEPTIONS = [*[Boom] * 4, Marked, Gone, *ABANDONING[:3]]
GROUPS = ()
if sys.version_info >= (3, 11):
    Group = BaseExceptionGroup  # noqa: F821
    GROUPS = (Group, ExceptionGroup)  # noqa: F821
    EXCEPTIONS += [
        lambda: Group("all abandon", [SystemExit(), KeyboardInterrupt()]),
        lambda: Group("one fails", [KeyboardInterrupt(), Boom()]),
        lambda: Group("two kinds", [Group("inner", [Marked()]), Boom()]),
    ]


def is_abandoning(exc):
    """Whether an exception, or each one in a group, says nothing about the service."""
    if isinstance(exc, GROUPS):
        return all(map(is_abandoning, exc.exceptions))
    return isinstance(exc, ABANDONING)


def is_marked(exc):
    return type(exc) is Marked


def is_undecided(exc):
    raise LookupError("an exclusion that does not work")


# Exclusions, each with the classes that it matches.
KINDS = [
    (Boom, {Boom, Marked}),
    (Marker, {Marked}),
    (is_marked, {Marked}),
    (is_undecided, set()),
    (BaseException, {Boom, Marked, Gone, *GROUPS}),
]


def is_one_of(kinds):
    """What the model is given for a pair in KINDS."""
    return lambda exc: type(exc) in kinds[1]


# Predicates, each with its answer to the result "value".
RESULTS = [(None, False), (bool, False), (str, True), (len, True), (math.sqrt, False)]


# Storages.


class PlainStorage(CircuitBreakerStorage):
    """What a user would write, with everything in a dict."""

    def __init__(self, state):
        super().__init__("plain")
        self.row = {"state": state, "count": 0, "successes": 0, "opened_at": None}

    state = property(
        lambda self: self.row["state"],
        lambda self, state: self.row.update(state=state),
    )
    counter = property(
        lambda self: self.row["count"],
        lambda self, count: self.row.update(count=count),
    )
    success_counter = property(lambda self: self.row["successes"])
    opened_at = property(
        lambda self: self.row["opened_at"],
        lambda self, moment: self.row.update(opened_at=moment),
    )

    def increment_counter(self):
        self.row["count"] += 1

    def reset_counter(self):
        self.row["count"] = 0

    def increment_success_counter(self):
        self.row["successes"] += 1

    def reset_success_counter(self):
        self.row["successes"] = 0


class OldStorage(CircuitBreakerStorage):
    """Written against the old interface: the storage counts no successes, its counter
    cannot be set, and its `__init__` does not call the base's."""

    def __init__(self, state):
        self._kept_state, self._kept_count, self._kept_moment = state, 0, None

    state = property(
        lambda self: self._kept_state,
        lambda self, state: setattr(self, "_kept_state", state),
    )
    counter = property(lambda self: self._kept_count)
    opened_at = property(
        lambda self: self._kept_moment,
        lambda self, moment: setattr(self, "_kept_moment", moment),
    )

    def increment_counter(self):
        self._kept_count += 1

    def reset_counter(self):
        self._kept_count = 0


class Ask:
    """Awaits an answer of the code that drives the coroutine."""

    def __init__(self, question):
        self.question = question

    def __await__(self):
        return (yield self.question)


class FleetStorage(PlainStorage):
    """Grants or refuses the trial, at once or after some time."""

    def __init__(self, state):
        super().__init__(state)
        self.grants, self.is_slow = True, False
        self.moves, self.granted, self.released = [], 0, 0

    def move(self, move):
        how_long = move.seconds, move.failed_trials
        told = move.state, move.by, move.reason, *how_long, move.fail_max
        self.moves.append(told)
        super().move(move)

    def claim_trial(self, timeout):
        self.granted += self.grants
        return self.grants

    async def claim_trial_async(self, timeout):
        if not self.is_slow:
            return await super().claim_trial_async(timeout)
        granted = await Ask("may it run?")
        self.granted += granted
        return granted

    def release_trial(self):
        self.released += 1


STORAGES = {
    "memory": pybreaker.CircuitMemoryStorage,
    "plain": PlainStorage,
    "old": OldStorage,
    "fleet": FleetStorage,
}


# Ways to guard. Those in LAZY make a generator or a coroutine that stops once, inside
# the guarded call, and is then sent what the call should end with. Those in PLAIN are
# given the function that they guard.


def end_with(end):
    if isinstance(end, BaseException):
        raise end
    return end


def generator():
    return end_with((yield "running"))


async def coroutine():
    return end_with(await Ask("running"))


async def async_generator():
    end_with((yield "running"))


class Service:
    async def method(self):
        return await coroutine()

    async def __call__(self):
        return await coroutine()


class ThirdParty:
    """An awaitable that is no coroutine."""

    def __await__(self):
        return coroutine().__await__()


def make_generator():
    return generator()


def make_coroutine():
    return coroutine()


service = Service()


def delegated(make):
    """Make a generator at the first step, as making it admits the call."""
    return (yield from make())


async def awaited(make):
    return await make()


def in_block(manager):
    with manager:
        return end_with((yield "running"))


async def in_async_block(manager):
    async with manager:
        return end_with(await Ask("running"))


async def stepped(agen):
    assert await agen.__anext__() == "running"
    try:
        end = await Ask("running")
    except GeneratorExit:
        await agen.aclose()
        raise
    except BaseException as exc:
        await agen.athrow(exc)
    else:
        try:
            await agen.asend(end)
        except StopAsyncIteration:
            return end


# For each way: what makes the generator or coroutine, the function that listeners hear
# of (None: the block), whether closing it is a success, and whether its admission can
# wait for the storage.
LAZY = {
    "@breaker on a generator function": (
        lambda b: b(generator)(), generator, True, False),
    "call on a generator function": (
        lambda b: b.call(generator), generator, True, False),
    "call on what makes a generator": (
        lambda b: delegated(lambda: b.call(make_generator)),
        make_generator, True, False),
    "@contextmanager over @breaker": (
        lambda b: in_block(contextlib.contextmanager(b(generator))()),
        generator, True, False),
    "with calling()": (
        lambda b: in_block(b.calling()), None, False, False),
    "@breaker on async def": (
        lambda b: b(coroutine)(), coroutine, False, True),
    "@breaker() on async def": (
        lambda b: b()(coroutine)(), coroutine, False, True),
    "@breaker on an async method": (
        lambda b: b(service.method)(), service.method, False, True),
    "call on a coroutine function": (
        lambda b: b.call(coroutine), coroutine, False, True),
    "call on an object": (
        lambda b: b.call(service), service, False, True),
    "call on what makes a coroutine": (
        lambda b: awaited(lambda: b.call(make_coroutine)),
        make_coroutine, False, False),
    "call_async": (
        lambda b: b.call_async(coroutine), coroutine, False, True),
    "call_async on a third party's awaitable": (
        lambda b: b.call_async(ThirdParty), ThirdParty, False, True),
    "the oldest spelling": (
        lambda b: b(__pybreaker_call_async=True)(make_coroutine)(),
        make_coroutine, False, True),
    "async with calling()": (
        lambda b: in_async_block(b.calling()), None, False, True),
    "@breaker on an async generator function": (
        lambda b: stepped(b(async_generator)()), async_generator, True, True),
    "call on an async generator function": (
        lambda b: stepped(b.call(async_generator)), async_generator, True, True),
    "@asynccontextmanager over @breaker": (
        lambda b: in_async_block(contextlib.asynccontextmanager(b(async_generator))()),
        async_generator, True, True),
}  # fmt: skip


def with_block(breaker, func):
    with breaker.calling():
        return func()


PLAIN = {
    "@breaker": lambda breaker, func: breaker(func)(),
    "@breaker()": lambda breaker, func: breaker()(func)(),
    "call": lambda breaker, func: breaker.call(func),
    "state.call": lambda breaker, func: state_of(breaker).call(func),
    "with calling()": with_block,
}


# What the breaker and the model do in a step, and whether they do the same.


def result_of(func, *args):
    """The result of a call: ("returned", value) or ("raised", exception)."""
    try:
        return "returned", func(*args)
    except BaseException as exc:
        if isinstance(exc, AssertionError):
            raise
        return "raised", exc


def check_same(actual, predicted):
    """What the library did is what the model says."""
    if isinstance(predicted[1], (Rejected, Tripped)):
        expected, (how, error) = predicted[1], actual
        assert how == "raised" and type(error) is CircuitBreakerError, actual
        assert error.retry_after == expected.retry_after
        assert error.reason == expected.reason
        if isinstance(expected, Tripped):
            assert error.__cause__ is expected.cause
            assert expected.phrase in str(error)
        else:
            assert error.__cause__ is None
            assert "Timeout not elapsed yet, circuit breaker still open" in str(error)
    elif isinstance(predicted[1], BaseException):
        assert actual[0] == predicted[0] and actual[1] is predicted[1], actual
    else:
        assert actual == predicted


class Interrupt(KeyboardInterrupt):
    """What a listener raises for Ctrl-C."""


REACTIONS = [OPEN, HALF_OPEN, CLOSED, "open for a time", "forget", "interrupt"]
BY_HAND = {OPEN: "open", HALF_OPEN: "half_open", CLOSED: "close"}


def move(side, name, **about):
    """Move a breaker or the model by hand."""
    if isinstance(side, Model):
        side.move(name, **about)
    else:
        getattr(side, BY_HAND[name])(**about)


def heard_of(detail):
    """A detail that listeners hear, in a form that can be compared."""
    if isinstance(detail, (FailedResult, pybreaker.FailedResult)):
        return "FailedResult", *detail.args
    return detail


class Listener:
    """`real` listens to the breaker, `told` to the model. Both may react to the first
    event of each kind. `machine.heard` and `machine.told` have the events in their
    order, each with what could be read at that moment."""

    def __init__(self, machine, hears, reactions, raises):
        self.machine, self.hears = machine, hears
        self.reactions, self.to_come = dict(reactions), dict(reactions)
        self.interrupt = Interrupt()
        self.raises = raises
        methods = {name: self._method(name) for name in hears}
        self.real = type("Listener", (), methods)()

    def _method(self, name):
        def method(_, breaker, *details):
            if name == "state_change":
                old, new = details
                details = old.name, new.name, new.reason, breaker.state is new
            details = tuple(map(heard_of, details))
            self.machine.heard.append((
                self, name, details, breaker.current_state, breaker.fail_counter,
                breaker.success_counter, breaker.retry_after,
            ))  # fmt: skip
            self.react(self.reactions.pop(name, None), breaker)
            if self.raises:
                raise LookupError("a listener that does not work")

        return method

    def told(self, name, *details):
        model = self.machine.model
        if name not in self.hears:
            return
        if name == "state_change":
            old, new = details
            details = old.name, new.name, new.reason, model.era is new
        details = tuple(map(heard_of, details))
        self.machine.told.append((
            self, name, details, model.stored, model.fail_counter,
            model.success_counter, model.retry_after,
        ))  # fmt: skip
        self.react(self.to_come.pop(name, None), model)

    def react(self, reaction, side):
        if reaction == "interrupt":
            raise self.interrupt
        elif reaction == "forget":
            side.fail_counter = 0
        elif reaction == "open for a time":
            move(side, OPEN, seconds=7, reason="asked to")
        elif reaction:
            move(side, reaction)


SHORTENING = 0.9375  # with which floats and microseconds are exact


class Witness(Model):
    """The model, which counts how often it comes to each corner."""

    shortening = SHORTENING
    is_abandoning = staticmethod(is_abandoning)

    def __init__(self, clock, state, reached):
        self.reached = reached
        super().__init__(clock, state)
        self.running = set()  # trials that have begun and not ended

    def is_moved(self):
        return self.stored != self.era.name

    def look(self):
        if self.is_moved():
            self.reached[f"found {self.stored}"] += 1
            if self.stored == CLOSED and self.fail_counter >= self.fail_max:
                self.reached["found closed with too many failures"] += 1
        super().look()

    def arrive(self, context, what):
        holder = self.place
        for trial in self.running & context - {holder}:
            ended = self.is_moved() or trial.era is not self.era
            kind = "of an earlier era" if ended else "that had lost its place"
            self.reached[f"a call within a trial {kind}"] += 1
        try:
            call = super().arrive(context, what)
        except Rejected:
            name = "while a trial runs" if holder and holder.granted else "while open"
            self.reached[f"rejected {name}"] += 1
            raise
        if call.trial and holder and not self.is_moved():
            kind = "trial" if holder.granted else "claim"
            self.reached[f"a {kind} was taken over"] += 1
        elif not call.trial and call.era is None and self.is_within(context):
            self.reached["a call within a trial"] += 1
        return call

    def refuse(self, rejected, what):
        call = super().refuse(rejected, what)
        self.reached["let through by a dry run"] += 1
        return call

    def may_begin(self, trial, granted, what):
        if self.is_moved():
            self.reached["the storage was written while a claim waited"] += 1
        if self.place is not trial:
            self.reached["a claim was answered too late"] += 1
            if granted and self.place is not None:
                self.reached["a grant passed to another call"] += 1
        elif not granted:
            self.reached["a claim was refused"] += 1
        begun = super().may_begin(trial, granted, what)
        if begun is trial:
            self.running.add(trial)
            self.reached["a trial"] += 1
        return begun

    def settle(self, call, outcome, exc=None):
        late = call.era is not self.era or self.is_moved()
        self.running.discard(call)
        if call.era is None:
            self.reached[f"{outcome} within a trial"] += 1
        elif late:
            self.reached[f"late {outcome}"] += 1
        elif call.trial and self.place is call:
            self.reached[f"{outcome} of a trial"] += 1
        elif call.trial:
            self.reached[f"{outcome} of a trial that had lost its place"] += 1
        else:
            self.reached[f"{outcome} while {self.era.name}"] += 1
        super().settle(call, outcome, exc)

    def forget(self):
        failures, calls = self.failures, self.calls
        super().forget()
        if len(self.failures) < len(failures):
            size, seconds = self.window_size, self.window_seconds
            far = size is not None and calls - failures[0][0] >= size
            old = seconds is not None and self.clock.now - failures[0][1] >= seconds
            self.reached["forgotten as too far back"] += far
            self.reached["forgotten with time"] += old

    def set(self, name, value):
        if name == "dry_run" and self.dry_run and not value and self.running:
            self.reached["a dry run ended during a trial"] += 1
        remembered = self.fail_counter
        super().set(name, value)
        if name.startswith("window") and self.fail_counter < remembered:
            self.reached["a narrower window forgot"] += 1

    def decide_success(self):
        if self.era.name == HALF_OPEN and self.success_threshold > 1:
            last = self.success_counter + 1 >= self.success_threshold
            corner = "the last success of several" if last else "a success of several"
            self.reached[corner] += 1
        super().decide_success()

    def count(self):
        if self.era.name == CLOSED and self.fail_counter == self.fail_max:
            self.reached["a failure that would pass the limit"] += 1
        super().count()

    def fail(self, exc):
        if self.era.name == CLOSED and self.fail_counter >= self.fail_max:
            exceeds = self.fail_counter > self.fail_max
            self.reached["a trip"] += 1
            self.reached["a trip by a lowered fail_max"] += exceeds
            self.reached["a trip in a window"] += self.has_window()
            self.reached["a trip by a result"] += isinstance(exc, FailedResult)
            self.reached["a trip in a dry run"] += self.dry_run
        super().fail(exc)

    def gate(self, context):
        era, claim = self.era, self.place
        found = self.is_moved()
        super().gate(context)
        if claim and not claim.granted and era is not self.era and not found:
            self.reached["the gate half-opened while a claim waited"] += 1

    def begin_era(self, new, by="found"):
        if new.name == self.era.name:
            self.reached[f"{new.name} to {new.name}"] += 1
        if self.running and self.place in self.running and by == "hand":
            self.reached["moved by hand during a trial"] += 1
        if new.name == OPEN and new.failed_trials > 1 and by == "outcome":
            self.reached["a trial failed after another"] += self.grown(new) > 0
        super().begin_era(new, by)

    def tell(self, event, *details):
        era = self.era
        try:
            super().tell(event, *details)
        except Interrupt:
            self.reached[f"interrupted in {event}"] += 1
            raise
        if era is not self.era:
            self.reached[f"a listener moved the circuit in {event}"] += 1


CORNERS = """
    rejected while open
    rejected while a trial runs
    a trial
    success of a trial
    failure of a trial
    abandoned of a trial
    a trial was taken over
    success of a trial that had lost its place
    failure of a trial that had lost its place
    abandoned of a trial that had lost its place
    a call within a trial
    success within a trial
    failure within a trial
    abandoned within a trial
    a call within a trial that had lost its place
    a call within a trial of an earlier era
    moved by hand during a trial
    late success
    late failure
    late abandoned
    a success of several
    the last success of several
    success while closed
    failure while closed
    abandoned while closed
    a failure that would pass the limit
    a trip
    a trip by a lowered fail_max
    found closed
    found open
    found half-open
    found closed with too many failures
    closed to closed
    open to open
    half-open to half-open
    interrupted in before_call
    interrupted in failure
    interrupted in success
    interrupted in rejected
    interrupted in state_change
    a listener moved the circuit in before_call
    a listener moved the circuit in failure
    a listener moved the circuit in success
    a listener moved the circuit in rejected
    a listener moved the circuit in state_change
    a listener was added during a call
    let through by a dry run
    a dry run ended during a trial
    a trip in a dry run
    a trip by a result
    a trial failed after another
    a setting that does not go with another
"""
CORNERS_OF_A_WINDOW = """
    forgotten as too far back
    forgotten with time
    a narrower window forgot
    a trip in a window
"""
CORNERS_OF_A_FLEET = """
    a claim was refused
    a claim was taken over
    a claim was answered too late
    a grant passed to another call
    the storage was written while a claim waited
    the gate half-opened while a claim waited
    a listener was added while a claim waited
"""


# The machine.


class Context:
    """Where calls are made: a context, and the trials that it is within."""

    def __init__(self, real=None, trials=()):
        self.real = real or contextvars.Context()
        self.trials = set(trials)

    def copy(self):
        return Context(self.real.copy(), self.trials)


class Flight:
    """A call that has begun and not ended."""

    def __init__(
        self, driver, what, context, admission, closes_well, can_wait, has_result
    ):
        self.driver, self.what, self.context = driver, what, context
        self.admission, self.call = admission, None
        self.closes_well, self.can_wait = closes_well, can_wait
        self.has_result = has_result

    @property
    def is_trial(self):
        return bool(self.call and self.call.trial)


def drive(how, driver, argument):
    """Let a generator or a coroutine go on, to its next stop or its end."""
    try:
        if how == "close":
            return driver.close()
        return getattr(driver, how)(argument)
    except StopIteration as stop:
        return stop.value


class Time:
    """The time for the model, by both clocks."""

    def __init__(self, clock, wall):
        self.clock, self.wall = clock, wall

    @property
    def now(self):
        return self.clock.now

    @property
    def moment(self):
        """The time by the clock that the storage measures with."""
        return self.clock.now + (self.clock.shift if self.wall else 0)


EPOCH = datetime(2024, 2, 29, tzinfo=timezone.utc)


@pytest.fixture
def clocks(clock, monkeypatch):
    """The monotonic clock and the machine's, which `shift` sets."""

    class Wall(datetime):
        @classmethod
        def now(cls, tz=None):
            return EPOCH.astimezone(tz) + timedelta(seconds=clock.now + clock.shift)

    clock.shift = 0
    monkeypatch.setattr(pybreaker, "datetime", Wall)
    pin_shortening(monkeypatch.setattr, SHORTENING)
    # To format the log's records would take longer than all else.
    quiet = logging.Logger("pybreaker")
    quiet.addHandler(logging.NullHandler())
    monkeypatch.setattr(pybreaker, "logger", quiet)
    return clock


ways = st.sampled_from(sorted(LAZY))
plain_ways = st.sampled_from(sorted(PLAIN))
states = st.sampled_from([OPEN, HALF_OPEN, CLOSED])
exceptions = st.sampled_from(EXCEPTIONS)
endings = st.one_of(st.none(), exceptions)
indexes = st.integers(0, 7)
timeouts = st.sampled_from([10, 10, 10, 0.5, 0, math.inf])
sizes = st.sampled_from([None, 2, 3, 5, math.inf])
spans = st.sampled_from([None, 5, 12, 0.5])
longest = st.sampled_from([None, 10, 25, 300.0, math.inf])

# Where a call is made: in the context of the code that makes the call or in a copy, as
# in a task; in a new context; or in one of the machine's three.
places = st.sampled_from(["here", "here", "copy", "new", 0, 1, 2])

BAD = [
    ("fail_max", 0, ValueError),
    ("fail_max", 1.5, ValueError),
    ("fail_max", math.nan, ValueError),
    ("fail_max", "3", TypeError),
    ("fail_max", True, TypeError),
    ("reset_timeout", -1, ValueError),
    ("reset_timeout", math.nan, ValueError),
    ("reset_timeout", None, TypeError),
    ("success_threshold", 0, ValueError),
    ("success_threshold", math.inf, ValueError),
    ("success_threshold", [], TypeError),
    ("fail_counter", -1, ValueError),
    ("fail_counter", 0.5, ValueError),
    ("fail_counter", math.inf, ValueError),
    ("fail_counter", "0", TypeError),
    ("name", 3, TypeError),
    ("window_size", 0, ValueError),
    ("window_size", "9", TypeError),
    ("window_seconds", 0, ValueError),
    ("window_seconds", math.inf, ValueError),
    ("max_reset_timeout", math.nan, ValueError),
    ("dry_run", 1, TypeError),
    ("failure_result", "value", TypeError),
    ("include", Boom, TypeError),
    ("ignore", ["Boom"], TypeError),
    ("state", "half_open", ValueError),
    ("state", None, ValueError),
]
GOOD = st.one_of(
    st.tuples(st.just("fail_max"), st.sampled_from([1, 1, 2, 3.0, 5, math.inf])),
    st.tuples(st.just("reset_timeout"), timeouts),
    st.tuples(st.just("success_threshold"), st.sampled_from([1, 2, 3.0])),
    st.tuples(st.just("fail_counter"), st.sampled_from([0, 1, 2.0, 3, 5])),
    st.tuples(st.just("name"), st.sampled_from([None, "db", ""])),
    st.tuples(st.just("window_size"), sizes),
    st.tuples(st.just("window_seconds"), spans),
    st.tuples(st.just("max_reset_timeout"), longest),
    st.tuples(st.just("dry_run"), st.booleans()),
)
listeners = st.fixed_dictionaries({
    "hears": st.one_of(
        st.just(EVENTS), st.lists(st.sampled_from(EVENTS), min_size=1, unique=True)
    ),
    "reactions": st.lists(
        st.tuples(st.sampled_from(EVENTS), st.sampled_from(REACTIONS)), max_size=3
    ),
    "raises": st.booleans(),
})  # fmt: skip

interrupters = st.sampled_from([
    {"hears": EVENTS, "reactions": [(name, "interrupt")], "raises": False}
    for name in EVENTS
])  # fmt: skip


WINDOWS = "window_size", "window_seconds"
SWITCHED = "window_size", "max_reset_timeout"  # None means off, and "inf" infinity
SHOWN = (
    *("name", "reason", "fail_counter", "fail_max", "success_counter", "dry_run"),
    *("success_threshold", "reset_timeout", "max_reset_timeout", *WINDOWS),
    "retry_after",
)


def step(name, /, **arguments):
    return st.tuples(st.just(name), st.fixed_dictionaries(arguments))


# What guarded functions do.
scripts = st.lists(
    st.one_of(
        step("begin", way=ways, place=places),
        step("end", index=indexes, how=st.just("send"), exc=endings),
        step("call", way=plain_ways, place=places, exc=endings, script=st.just([])),
        step("call", way=plain_ways, place=places, exc=endings, script=st.just([])),
        step("pass_time", which=st.sampled_from(["wait", "some"])),
        step("move", name=states, by_setter=st.booleans()),
        step("set", setting=GOOD),
        step("write_state", name=states),
        step("gate", place=places, waits=st.just(False)),
        step("look"),
    ),
    max_size=3,
)

# What happens in a window.
in_a_window = st.lists(
    st.one_of(
        step("call", way=plain_ways, place=places, exc=st.none(), script=st.just([])),
        step("call", way=plain_ways, place=places, exc=st.none(), script=st.just([])),
        step("fail", way=plain_ways, place=places, exc=st.just(Boom)),
        step("fail", way=plain_ways, place=places, exc=st.just(Boom)),
        step("pass_time", which=st.just("some")),
        step("set", setting=st.tuples(st.just("window_size"), sizes)),
        step("set", setting=st.tuples(st.just("window_seconds"), spans)),
        step("set", setting=st.tuples(st.just("fail_counter"), st.integers(0, 3))),
    ),
    min_size=4,
    max_size=10,
)

changes = st.one_of(
    step("set", setting=GOOD),
    step("set", setting=GOOD),
    step("refuse", setting=st.sampled_from(BAD)),
    step("add_listener", about=listeners),
    step("add_listener", about=listeners),
    step("add_listener", about=interrupters),
    step("remove_listener", index=indexes),
    step("add_exclusion", exclusion=st.sampled_from(KINDS)),
    step("remove_exclusions"),
    step(
        "judge_by",
        name=st.sampled_from(["include", "ignore"]),
        kinds=st.lists(st.sampled_from(KINDS), max_size=2),
    ),
    step("judge_results_by", predicate=st.sampled_from(RESULTS)),
    step("judge_results_by", predicate=st.sampled_from(RESULTS)),
    step("set_the_machines_clock", seconds=st.sampled_from([-10, 3600])),
    step("write_counter", count=st.integers(0, 4)),
    step("write_success_counter", count=st.integers(0, 3)),
    step(
        "write_opened_at",
        seconds=st.sampled_from([None, 0, 9.5, 10, -5]),
        naive=st.booleans(),
    ),
)


# What happens while the storage has not answered a claim.
in_a_claim = st.lists(
    st.one_of(
        step("add_listener", about=listeners),
        step("move", name=states, by_setter=st.booleans()),
        step("write_state", name=states),
        step("gate", place=places, waits=st.booleans()),
        step("begin_a_trial", way=ways, place=st.just("new")),
    ),
    max_size=3,
)
answers = st.sampled_from([True, True, True, False])


class Circuit(RuleBasedStateMachine):
    """A breaker and the model of one, which go through the same steps."""

    def __init__(self, clock, storage, reached):
        super().__init__()
        self.clock, self.kind, self.reached = clock, storage, reached
        clock.now, clock.shift = 1000.0, 0
        self.heard, self.told = [], []
        self.listeners, self.exclusions = [], []
        self.flights, self.forgotten = [], []
        self.contexts = [Context(), Context(), Context()]
        self.inside = []  # the contexts of calls that run, the innermost last
        self.seen = {}  # the breaker's state object of each era
        self.wrong = None
        reached["(runs)"] += 1

    @initialize(
        state=states,
        fail_max=st.sampled_from([1, 2, 3]),
        reset_timeout=timeouts,
        success_threshold=st.sampled_from([1, 1, 2, 3]),
        throw_new_error_on_trip=st.sampled_from([True, True, False]),
        dry_run=st.sampled_from([False, False, False, True]),
        later=st.lists(GOOD, max_size=3),
        listener=st.one_of(st.none(), listeners),
        is_open_for=st.sampled_from([None, 0, 0, 9.5, 10]),
        count=st.sampled_from([0, 0, 1, 2, 3]),
        successes=st.sampled_from([0, 0, 0, 1, 3]),
        watched=st.booleans(),
    )
    def make(
        self,
        state,
        listener,
        is_open_for,
        count,
        successes,
        watched,
        later,
        **arguments,
    ):
        """A breaker over a storage that may have been used before."""
        self.storage = STORAGES[self.kind](state)
        time = Time(self.clock, self.kind != "memory")
        self.watched = watched  # after each step a look finds changes of the storage
        self.model = Witness(time, state, self.reached)
        self.write_counter(count)
        self.write_success_counter(successes)
        if is_open_for is not None:
            self.write_opened_at(is_open_for, naive=False)
        for name, value in arguments.items():
            setattr(self.model, name, value)
        given = []
        if listener is not None:
            given.append(self.listener(**listener))
        self.breaker = CircuitBreaker(
            state_storage=self.storage,
            listeners=[listener.real for listener in given],
            **arguments,
        )
        self.model.listeners = [listener.told for listener in given]
        self.listeners = given
        for setting in later:
            self.set(setting)

    def do(self, step):
        name, arguments = step
        getattr(self, name)(**arguments)

    # What is done to the breaker and to the model.

    def both(self, real, predicted, *args):
        """Do the same to the breaker and to the model, and compare the results."""
        expected = result_of(predicted, *args)
        check_same(result_of(real, *args), expected)

    @invariant()
    def agrees(self):
        """What listeners heard, and all that can be read, is as predicted."""
        if self.wrong:
            raise self.wrong
        assert self.heard == self.told
        self.heard, self.told = [], []
        breaker, model = self.breaker, self.model
        assert breaker.current_state == model.stored
        assert breaker.fail_counter == model.fail_counter
        assert breaker.success_counter == model.success_counter
        assert breaker.retry_after == model.retry_after
        assert breaker.fail_max == model.fail_max
        assert breaker.reset_timeout == model.reset_timeout
        assert breaker.success_threshold == model.success_threshold
        assert breaker.name == model.name
        seen = breaker.snapshot()
        for name in SHOWN:
            value = getattr(model, name)
            infinity = "inf" if name in SWITCHED else None
            assert seen[name] == (infinity if value == math.inf else value)
        assert seen["state"] == model.stored
        assert breaker.listeners == tuple(item.real for item in self.listeners)
        assert breaker.excluded_exceptions == tuple(item for item, _ in self.exclusions)
        if self.watched and not model.is_moved():  # so this look finds nothing
            state = breaker.state
            assert state.name == model.stored
            assert self.seen.setdefault(model.era, state) is state
        if self.kind == "fleet":
            assert self.storage.moves == model.moves
            assert self.storage.released == model.released

    def settled(self, flight, exc, value, outcome=None):
        """What the caller should get when a call ends."""
        model, told = self.model, exc
        if outcome is None:
            outcome = SUCCESS if exc is None else model.judge(exc)
            if exc is None and flight.has_result and model.failure_result(value):
                outcome, told = FAILURE, FailedResult(value)
        try:
            model.settle(flight.call, outcome, told)
        except BaseException as error:
            return "raised", error
        return ("returned", value) if exc is None else ("raised", exc)

    def admitted(self, flight, answer=None):
        """What a call's next step towards its admission should give."""
        waits = flight.can_wait and getattr(self.storage, "is_slow", False)
        try:
            flight.admission.send(answer)
            while not waits:
                flight.admission.send(getattr(self.storage, "grants", True))
        except StopIteration as stop:
            flight.call = stop.value
            return "returned", "running"
        except BaseException as error:
            return "raised", error
        return "returned", "may it run?"

    def context(self, place):
        if isinstance(place, Context):
            return place
        here = self.inside[-1] if self.inside else self.contexts[0]
        if place == "copy":
            return here.copy()
        if place == "new":
            return Context()
        if place == "here" or self.contexts[place] in self.inside:
            return here
        return self.contexts[place]

    def run(self, context, func, *args):
        if self.inside and context is self.inside[-1]:
            return func(*args)
        self.inside.append(context)
        try:
            return context.real.run(func, *args)
        finally:
            self.inside.pop()

    # Calls that begin, and end some time.

    @rule(way=ways, place=places)
    def begin(self, way, place):
        """Begin a call that stops in the middle."""
        self.reached["(calls begun)"] += 1
        make, what, closes_well, can_wait = LAZY[way]
        driver = make(self.breaker)
        self.agrees()  # nothing is admitted before it runs
        context = self.context(place)
        has_result = what is not None and not closes_well
        what = what or self.breaker.calling
        admission = self.model.admission(context.trials, what)
        flight = Flight(
            driver, what, context, admission, closes_well, can_wait, has_result
        )
        self.go_on(flight, "send", None, self.admitted(flight))
        self.reached[f"a trial: {way}"] += flight.is_trial

    @rule(way=ways, place=places)
    def begin_a_trial(self, way, place):
        """Wait until a trial is due, and begin; a running trial is taken over."""
        self.pass_time("wait")
        self.begin(way, place)

    @rule(way=ways, other=ways, place=places)
    def hang(self, way, other, place):
        """A trial hangs and loses its place to another one."""
        self.begin_a_trial(way, place)
        self.begin_a_trial(other, "new")

    @rule(way=ways, copied=st.booleans())
    def begin_within(self, way, copied):
        """Begin a call in the context of the last call that has begun."""
        flights = [f for f in self.flights if f.context not in self.inside]
        if flights:
            context = flights[-1].context
            context = context.copy() if copied else context
            self.begin(way, context)

    def go_on(self, flight, how, argument, predicted):
        go_on = functools.partial(drive, how, flight.driver, argument)
        actual = result_of(self.run, flight.context, go_on)
        check_same(actual, predicted)
        if actual[0] == "returned" and actual[1] in ("running", "may it run?"):
            self.flights.append(flight)

    def take(self, index, ready):
        """One of the calls in flight; the last calls have the lowest numbers."""
        flights = [flight for flight in reversed(self.flights) if ready(flight)]
        if not flights:
            return None
        flight = flights[index % len(flights)]
        self.flights.remove(flight)
        return flight

    def end(self, index, how, exc, place="its own"):
        """A call in flight ends: it returns, raises, is thrown into or closed."""
        flight = self.take(
            index, lambda flight: flight.call and flight.context not in self.inside
        )
        if flight is None:
            return
        if place != "its own":
            flight.context = self.context(place)
        exc = exc and exc()
        if how == "close":
            outcome = SUCCESS if flight.closes_well else ABANDONED
            predicted = self.settled(flight, None, None, outcome)
        else:
            predicted = self.settled(flight, exc, "value")
        self.go_on(flight, how, exc or "value", predicted)

    others = st.sampled_from(["its own", "its own", "its own", 1, 2, "new"])

    @precondition(lambda self: self.flights)
    @rule(index=indexes, exc=endings, place=others)
    def finish(self, index, exc, place):
        self.end(index, "send", exc, place)

    @precondition(lambda self: self.flights)
    @rule(index=indexes, place=others)
    def succeed(self, index, place):
        self.end(index, "send", None, place)

    @precondition(lambda self: self.flights)
    @rule(index=indexes, how=st.sampled_from(["send", "throw"]))
    def let_fail(self, index, how):
        self.end(index, how, Boom)

    @precondition(lambda self: self.flights)
    @rule(index=indexes, exc=exceptions, place=others)
    def throw(self, index, exc, place):
        self.end(index, "throw", exc, place)

    @precondition(lambda self: self.flights)
    @rule(index=indexes, place=others)
    def close(self, index, place):
        self.end(index, "close", None, place)

    @precondition(lambda self: any(not flight.call for flight in self.flights))
    @rule(index=indexes, answer=answers)
    def answer(self, index, answer):
        """The storage says whether a call may be the trial."""
        flight = self.take(index, lambda flight: not flight.call)
        self.go_on(flight, "send", answer, self.admitted(flight, answer))

    @precondition(lambda self: any(not flight.call for flight in self.flights))
    @rule(index=indexes, exc=exceptions)
    def cancel(self, index, exc):
        """A call that waits for the storage is given up."""
        flight = self.take(index, lambda flight: not flight.call)
        exc = exc()
        predicted = result_of(flight.admission.throw, exc)
        self.go_on(flight, "throw", exc, predicted)

    @precondition(lambda self: self.kind == "fleet")
    @rule(
        way=ways, listened=st.booleans(), script=in_a_claim, answer=answers, exc=endings
    )
    def claim(self, way, listened, script, answer, exc):
        """The storage takes its time over a claim, and other things happen."""
        while self.listeners and not listened:
            self.remove_listener(0)
        if self.model.stored == CLOSED:
            self.move(OPEN, by_setter=False)
        self.storage.is_slow = True
        self.begin_a_trial(way, "new")
        if not any(flight.call is None for flight in self.flights[-1:]):
            return
        claim = self.flights[-1]
        heard = len(self.listeners)
        for step in script:
            self.do(step)
            self.agrees()
        if not heard and self.listeners:
            self.reached["a listener was added while a claim waited"] += 1
        if claim not in self.flights:
            return
        self.flights.remove(claim)
        self.go_on(claim, "send", answer, self.admitted(claim, answer))
        self.agrees()
        if claim.call and claim in self.flights:
            self.end(0, "send", exc)

    @rule(way=plain_ways, place=places, exc=endings, script=scripts)
    def call(self, way, place, exc, script):
        """A call that begins and ends; its function does what the script says."""
        self.reached["(calls begun)"] += 1
        context = self.context(place)
        exc = exc and exc()
        ends = []

        def func():
            try:
                assert predicted == ("returned", "running"), "a rejected call ran"
                self.agrees()
                for step in script:
                    self.do(step)
                    self.agrees()
            except AssertionError as wrong:
                self.wrong = wrong  # the breaker may catch it
                raise
            ends.append(self.settled(flight, exc, "value"))
            return end_with(exc or "value")

        is_block = way == "with calling()"
        what = self.breaker.calling if is_block else func
        admission = self.model.admission(context.trials, what)
        flight = Flight(None, what, context, admission, False, False, not is_block)
        predicted = self.admitted(flight)
        self.reached[f"a trial: {way}"] += flight.is_trial
        actual = result_of(self.run, context, PLAIN[way], self.breaker, func)
        if self.wrong:
            raise self.wrong
        check_same(actual, ends[0] if ends else predicted)
        assert ends or predicted[0] == "raised", "an admitted call did not run"

    @precondition(lambda self: self.model.stored != CLOSED)
    @rule(way=plain_ways, exc=endings, script=scripts)
    def call_a_trial(self, way, exc, script):
        self.pass_time("wait")
        self.call(way, "new", exc, script)

    @rule(way=plain_ways, place=places, exc=exceptions)
    def fail(self, way, place, exc):
        self.call(way, place, exc, [])

    @rule(place=places)
    def forget(self, place):
        """A call that is admitted and never runs."""
        context = self.context(place)
        admission = self.model.admission(context.trials, make_generator)
        flight = Flight(None, make_generator, context, admission, False, False, False)
        predicted = self.admitted(flight)
        actual = result_of(self.run, context, self.breaker.call, make_generator)
        if predicted[0] == "returned":
            assert actual[0] == "returned"
            self.forgotten.append(actual[1])
        else:
            check_same(actual, predicted)

    # Time.

    @rule(which=st.sampled_from(["wait", "wait", "almost", "some"]))
    def pass_time(self, which):
        """To the end of `retry_after`, or almost, or any time."""
        wait = self.model.retry_after
        if which == "some" or wait == math.inf:
            self.clock.advance(4.5)
        elif which == "wait":
            self.clock.advance(wait)
        else:
            self.clock.advance(max(0, wait - 0.5))

    def set_the_machines_clock(self, seconds):
        self.clock.shift += seconds

    # Steering.

    @rule(seconds=st.sampled_from([None, 0, 3.0, 30, math.inf]))
    def open_for(self, seconds):
        """The program opens the circuit for a time, and gives the reason."""
        about = {"seconds": seconds, "reason": "the service is being mended"}
        self.both(
            lambda: move(self.breaker, OPEN, **about),
            lambda: move(self.model, OPEN, **about),
        )

    @rule(name=states, by_setter=st.booleans())
    def move(self, name, by_setter):
        if by_setter:
            real = functools.partial(setattr, self.breaker, "state", name)
        else:
            real = functools.partial(move, self.breaker, name)
        expected = result_of(self.model.move, name)
        actual = result_of(real)
        if actual[0] == "returned":  # open() returns something else
            assert expected[0] == "returned"
        else:
            check_same(actual, expected)

    def set(self, setting):
        name, value = setting
        only_counts = self.kind == "old" and name == "fail_counter"
        if (
            self.model.refuses(name, value)
            or (self.kind != "memory" and name in WINDOWS and value is not None)
            or (only_counts and value > self.model.fail_max)
        ):
            self.reached["a setting that does not go with another"] += 1
            self.refuse((name, value, ValueError))
        else:
            setattr(self.breaker, name, value)
            self.model.set(name, value)

    def refuse(self, setting):
        """A setter that refuses changes nothing."""
        name, value, error = setting
        # The state is not read, as that would be a look at the storage.
        before = None if name == "state" else getattr(self.breaker, name, None)
        with pytest.raises(error, match=name):
            setattr(self.breaker, name, value)
        assert name == "state" or getattr(self.breaker, name) == before

    def add_listener(self, about):
        listener = self.listener(**about)
        self.breaker.add_listener(listener.real)
        self.listeners.append(listener)
        self.model.listeners.append(listener.told)

    @precondition(lambda self: self.flights and not self.listeners)
    @rule(about=listeners, name=st.one_of(st.none(), states), index=indexes)
    def begin_to_listen(self, about, name, index):
        """A listener is added during a call that began without listeners."""
        if name is not None:
            self.model.move(name)
            move(self.breaker, name)
        self.add_listener(about)
        self.end(index, "send", None)
        self.reached["a listener was added during a call"] += 1

    @rule(about=interrupters, way=plain_ways, exc=endings)
    def interrupt(self, about, way, exc):
        """A listener is interrupted, as by Ctrl-C, while it is told of a call."""
        self.add_listener(about)
        self.call(way, "new", exc, [])

    @rule(way=plain_ways, count=st.sampled_from([1, 2]))
    def lower(self, way, count):
        """A call fails after the limit was lowered to the count, or below it."""
        self.set(("fail_counter", min(count, self.model.fail_max)))
        self.set(("fail_max", 1))
        self.fail(way, "here", Boom)

    @precondition(lambda self: self.kind == "memory")
    @rule(
        size=sizes, seconds=spans, fail_max=st.sampled_from([2, 3]), script=in_a_window
    )
    def fill_a_window(self, size, seconds, fail_max, script):
        """Calls fail and succeed in a closed circuit, whose window may change."""
        for setting in (
            ("window_size", None),
            ("window_seconds", None),
            ("fail_max", fail_max),
            ("window_size", size),
            ("window_seconds", seconds),
        ):
            self.set(setting)
        self.move(CLOSED, by_setter=False)
        for step in script:
            self.do(step)
            self.agrees()

    @precondition(lambda self: self.kind == "memory")
    @rule(way=plain_ways, successes=st.sampled_from([2, 3]))
    def narrow_a_window(self, way, successes):
        """A call fails, others succeed, and then the window is made narrower."""
        wide = ("window_seconds", None), ("fail_max", 2), ("window_size", 9)
        for setting in wide:
            self.set(setting)
        self.move(CLOSED, by_setter=False)
        self.fail(way, "new", Boom)
        for _ in range(successes):
            self.call(way, "new", None, [])
        self.set(("window_size", 2))

    @rule(way=plain_ways, excluded=st.sampled_from(KINDS))
    def fail_by_result(self, way, excluded):
        """A call fails by its result, whatever is excluded."""
        self.add_exclusion(excluded)
        self.judge_results_by((str, True))
        self.set(("fail_max", 1))
        self.call(way, "new", None, [])
        self.judge_results_by((None, False))

    @rule(way=ways, exc=endings)
    def end_the_dry_run(self, way, exc):
        """A dry run ends while a trial runs: calls are rejected from then on."""
        self.set(("dry_run", True))
        self.begin_a_trial(way, "new")
        self.set(("dry_run", False))
        self.call("call", "new", None, [])
        self.end(0, "send", exc)

    def listener(self, hears, reactions, raises):
        return Listener(self, hears, reactions, raises)

    def remove_listener(self, index):
        if not self.listeners:
            return
        listener = self.listeners.pop(index % len(self.listeners))
        self.breaker.remove_listener(listener.real)
        self.model.listeners.remove(listener.told)
        with pytest.raises(ValueError):
            self.breaker.remove_listener(listener.real)

    def add_exclusion(self, exclusion):
        self.breaker.add_excluded_exception(exclusion[0])
        self.exclusions.append(exclusion)
        self.model.exclude = list(map(is_one_of, self.exclusions))

    def remove_exclusions(self):
        while self.exclusions:
            self.breaker.remove_excluded_exception(self.exclusions.pop()[0])
        self.model.exclude = []

    def judge_by(self, name, kinds):
        setattr(self.breaker, name, [kind for kind, _ in kinds])
        setattr(self.model, name, list(map(is_one_of, kinds)))

    def judge_results_by(self, predicate):
        self.breaker.failure_result, matches = predicate
        self.model.failure_result = lambda result: matches

    @rule(step=changes)
    def change(self, step):
        """Make one of the changes that are made less often."""
        self.do(step)

    # A storage that others write.

    @rule()
    def look(self):
        """A look at the state finds what has changed."""
        self.both(lambda: self.breaker.state and None, self.model.look)
        if not self.model.is_moved():
            state = self.breaker.state
            assert self.seen.setdefault(self.model.era, state) is state

    @rule(name=states)
    def write_state(self, name):
        """Others move the circuit. In memory the breaker looks at once, as a quiet call
        leaves the look to the next call. With `window_seconds` the others write how
        many failures are left, as a look writes nothing."""
        if self.model.window_seconds is not None:
            self.storage.counter = self.model.fail_counter
        self.storage.state = self.model.stored = name
        if self.kind == "memory":
            self.look()

    def write_counter(self, count):
        """Others count. (By whose window they would, the rules do not say.)"""
        if self.model.has_window():
            return
        self.model.fail_counter = count
        if self.kind == "old":
            self.storage._kept_count = count
        else:
            self.storage.counter = count

    def write_success_counter(self, count):
        self.model.success_counter = count
        self.storage.reset_success_counter()
        for _ in range(count):
            self.storage.increment_success_counter()

    def write_opened_at(self, seconds, naive):
        """Others have opened the circuit, `seconds` seconds ago."""
        moment = self.model.opened = None
        if seconds is not None:
            self.model.opened = self.model.clock.moment - seconds
            moment = pybreaker.datetime.now(timezone.utc) - timedelta(seconds=seconds)
            if naive:
                moment = moment.replace(tzinfo=None)
            else:
                moment = moment.astimezone(timezone(timedelta(hours=-7)))
        self.storage.opened_at = moment

    @precondition(lambda self: self.kind == "fleet")
    @rule(grants=st.sampled_from([True, True, False]), is_slow=st.booleans())
    def share(self, grants, is_slow):
        """The storage answers claims at once or later, and grants them or not."""
        self.storage.grants, self.storage.is_slow = grants, is_slow

    # Driving by hand.

    @rule(place=places, waits=st.booleans())
    def gate(self, place, waits):
        """Code asks the state by `before_call` whether a call would be rejected."""
        if waits:
            self.pass_time("wait")
        context, state = self.context(place), state_of(self.breaker)
        gate = functools.partial(self.run, context, state.before_call, generator)
        self.both(gate, self.model.gate, context.trials)

    @precondition(lambda self: self.seen)
    @rule(index=indexes, exc=endings, reraise=st.booleans())
    def handle(self, index, exc, reraise):
        """Code tells a state that it holds how a call ended."""
        era, state = self.held(index)
        exc = exc and exc()

        def handled():
            outcome = self.model.judge(exc) if exc else SUCCESS
            self.model.settle(Call(era), outcome, exc)
            if exc and reraise:
                raise exc

        if exc:
            self.both(lambda: state._handle_error(exc, reraise), handled)
        else:
            self.both(state._handle_success, handled)

    @precondition(lambda self: self.seen and not self.model.is_moved())
    @rule(index=indexes, fails=st.booleans())
    def decide(self, index, fails):
        """Code counts a failure itself, and lets the state decide."""
        era, state = self.held(index)
        if self.model.has_window() and era is not self.model.era:
            return  # the rules do not say when a failure of no era was counted
        exc = Boom()

        def decided():
            if fails:
                self.model.count_one()
            if era is self.model.era:
                self.model.fail(exc) if fails else self.model.decide_success()

        def decide():
            with lock_of(self.breaker):
                if fails:
                    self.breaker._inc_counter()
                    state.on_failure(exc)
                else:
                    state.on_success()

        self.both(decide, decided)

    def held(self, index):
        """One of the last three states, with its era."""
        return list(self.seen.items())[-1 - index % min(3, len(self.seen))]

    def teardown(self):
        for flight in self.flights:
            with contextlib.suppress(BaseException):
                flight.driver.close()


def search(clocks, kind, reached):
    """Let Hypothesis look for a difference, with one seed after the other, and count
    how often the search came to each corner."""
    python = sys.implementation.name, *sys.version_info[:2]
    chance = random.SystemRandom() if DEEP else random.Random(f"{kind} {python}")
    while True:
        number = chance.getrandbits(32)
        print(f"seed {number}")
        machine = seed(number)(functools.partial(Circuit, clocks, kind, reached))
        run_state_machine_as_test(machine, settings=PROFILE)
        yield number


@pytest.mark.parametrize("kind", list(STORAGES))
def test_the_library_does_what_the_model_says(clocks, kind, record_property):
    """A search that is not brief also reaches each corner."""
    reached = collections.Counter()
    of_a_kind = {"fleet": CORNERS_OF_A_FLEET, "memory": CORNERS_OF_A_WINDOW}
    corners = CORNERS + of_a_kind.get(kind, "")
    corners = list(filter(None, map(str.strip, corners.splitlines())))
    corners += [f"a trial: {way}" for way in {**LAZY, **PLAIN}]
    for searched, _ in enumerate(search(clocks, kind, reached), 1):
        missed = {each: reached[each] for each in corners if reached[each] < ENOUGH}
        if BRIEF or searched >= (SEEDS if not missed else 5 * SEEDS):
            break
    for corner, times in sorted(reached.items()):
        print(f"{times:8} {corner}")
    figures = "(runs)", "(calls begun)", "a trial"
    record_property("circuits", [reached[figure] for figure in figures])
    assert BRIEF or missed == {}
