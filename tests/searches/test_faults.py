"""Everything around the breaker that can break: storages, listeners, predicates,
logging, and exceptions that are not what exceptions should be."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import sys
import threading
from datetime import datetime, timezone

import pytest
from guards import (
    by_async_block,
    by_async_generator,
    by_call,
    by_coroutine,
    by_generator,
)
from internals import lock_of, state_of, storage_of
from support import EVENTS, PATIENCE, pairwise

import pybreaker
from pybreaker import CircuitBreaker, CircuitBreakerError, CircuitBreakerListener

TIMEOUT = 10.0


def elsewhere(func, *args):
    """Calls it in a thread of its own, and raises or returns what that does."""
    results = []

    def run():
        try:
            results.append((func(*args), None))
        except BaseException as exc:
            results.append((None, exc))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    assert results, "the other thread did not get through"
    result, error = results[0]
    if error is not None:
        raise error
    return result


def raising(exc):
    """A function that raises this very exception, whatever it is given."""

    def raise_it(*args, **kwargs):
        raise exc

    return raise_it


def caught_from(guard, breaker, work):
    """What comes out of a call that raises."""
    try:
        guard(breaker, work)
    except BaseException as exc:
        return exc
    raise AssertionError("nothing came out")


def is_from(caught, error, guard):
    """Whether it is that very error, or what Python makes of one that has a
    meaning of its own where the guarded code is a coroutine or a generator."""
    turned = isinstance(error, StopAsyncIteration) and guard is by_async_generator
    stopping = isinstance(error, StopIteration) and guard is not by_call
    if caught is error:
        return True
    if (turned or stopping) and isinstance(caught, RuntimeError):
        return error in (caught.__cause__, caught.__context__)
    return False


# One for each of the admissions and settlements that there are.
GUARDS = [by_call, by_coroutine, by_generator, by_async_generator, by_async_block]


@pytest.fixture(params=GUARDS, ids=lambda guard: guard.__name__)
def guard(request):
    return request.param


@pytest.fixture(autouse=True)
def transitions_are_logged(caplog):
    """Every one of them, and formatted: that uses the storage and exceptions."""
    caplog.set_level(logging.INFO, logger="pybreaker")


# A storage that raises. The rule: what it raises reaches the caller, chained to
# what the guarded function raised; it is never taken for a failure of the
# service; and no trial's place is left taken.


class Storage(pybreaker.CircuitBreakerStorage):
    """Grants one trial at a time, and raises at one use of it.

    The uses are numbered from 0. The one with the number `fail_at` raises
    `fault`: before it takes effect or, like a connection that is lost before the
    answer is there, after that. Time is the library's.
    """

    def __init__(self, state="closed"):
        super().__init__("one that fails")
        self.values = {"state": state, "counter": 0, "success_counter": 0}
        self.opened = None
        self.claimed = None  # since when
        self.mend()

    def fail(self, number, fault, after=False):
        self.uses, self.fail_at, self.fault, self.after = [], number, fault, after

    def mend(self):
        self.fail(None, None)

    @property
    def has_failed(self):
        return self.fail_at is not None and len(self.uses) > self.fail_at

    def use(self, name, effect):
        self.uses.append(name)
        fails = len(self.uses) - 1 == self.fail_at
        if fails and not self.after:
            raise self.fault
        result = effect()
        if fails:
            raise self.fault
        return result

    def add(self, name, number):
        self.values[name] += number

    def write(self, name, value):
        self.use(f"write {name}", lambda: self.values.__setitem__(name, value))

    def read(self, name):
        return self.use(f"read {name}", lambda: self.values[name])

    state = property(
        lambda self: self.read("state"), lambda self, name: self.write("state", name)
    )
    counter = property(lambda self: self.read("counter"))
    success_counter = property(lambda self: self.read("success_counter"))

    def increment_counter(self):
        self.use("increment counter", lambda: self.add("counter", 1))

    def reset_counter(self):
        self.write("counter", 0)

    def increment_success_counter(self):
        self.use("increment success_counter", lambda: self.add("success_counter", 1))

    def reset_success_counter(self):
        self.write("success_counter", 0)

    @property
    def opened_at(self):
        return self.use("read opened_at", lambda: datetime.now(timezone.utc))

    @opened_at.setter
    def opened_at(self, moment):
        def effect():
            self.opened = pybreaker.time.monotonic()

        self.use("write opened_at", effect)

    def open_for(self):
        return self.use(
            "open_for", lambda: pybreaker.time.monotonic() - (self.opened or 0.0)
        )

    def move(self, move):
        self.use("move", lambda: None)
        super().move(move)

    def last_move(self):
        return self.use("last_move", lambda: None)

    def claim_trial(self, timeout):
        def effect():
            now = pybreaker.time.monotonic()
            if self.claimed is not None and now - self.claimed < timeout:
                return False
            self.claimed = now
            return True

        return self.use("claim_trial", effect)

    def release_trial(self):
        self.use("release_trial", lambda: setattr(self, "claimed", None))


class ServiceDown(Exception):
    """What the guarded service raises."""


class NotFound(Exception):
    """What the guarded service raises when it is well."""


BAD_RESULT = "what the guarded service returns when it is not well"


class Work:
    """The guarded function: it raises an exception of the class it has, or returns a
    bad result."""

    def __init__(self, end=None):
        self.result = BAD_RESULT if end == BAD_RESULT else "result"
        self.error = None if end in (None, BAD_RESULT) else end()
        self.ran = False

    def __call__(self):
        self.ran = True
        if self.error is not None:
            raise self.error
        return self.result


class Situation:
    """A breaker over a `Storage`, brought to where the fault will be met."""

    fail_max = 4

    def __init__(self, clock, prepare, success_threshold=1):
        self.clock = clock
        self.storage = Storage()
        self.breaker = CircuitBreaker(
            self.fail_max,
            TIMEOUT,
            exclude=[NotFound],
            failure_result=lambda result: result == BAD_RESULT,
            state_storage=self.storage,
            success_threshold=success_threshold,
        )
        self.kept = prepare(self)
        self.storage.mend()  # the uses are counted from here

    def hold_the_place(self):
        """Begin a trial in a context of its own."""
        trial = self.breaker.calling()
        contextvars.Context().run(trial.__enter__)
        return trial


def closed(the):
    """No failure yet."""


def failures(the):
    the.breaker.fail_counter = 2


def last_chance(the):
    the.breaker.fail_counter = the.fail_max - 1


def opened(the):
    the.breaker.open()


def due(the):
    the.breaker.open()
    the.clock.advance(TIMEOUT)


def half_open(the):
    the.breaker.half_open()


def trial_runs(the):
    the.breaker.half_open()
    return the.hold_the_place()


def trial_hangs(the):
    the.breaker.half_open()
    trial = the.hold_the_place()
    the.clock.advance(TIMEOUT)
    return trial


def found_open(the):
    the.storage.state = "open"


def found_closed(the):
    the.breaker.open()
    the.storage.state = "closed"
    for _ in range(the.fail_max):
        the.storage.increment_counter()


def trial_elsewhere(the):
    the.breaker.half_open()
    the.storage.claim_trial(TIMEOUT)
    the.clock.advance(1)


PREPARED = [
    closed,
    failures,
    last_chance,
    opened,
    due,
    half_open,
    trial_runs,
    trial_hangs,
    found_open,
    found_closed,
    trial_elsewhere,
]

BEFORE_OR_AFTER = {"not done": False, "done": True}
FAULTS = [
    OSError,
    KeyboardInterrupt,
    asyncio.CancelledError,
    CircuitBreakerError,
    NotFound,
    StopIteration,
    StopAsyncIteration,
]
every_fault = pytest.mark.parametrize("fault", FAULTS)

ENDS = {
    "returns": None,
    "fails": ServiceDown,
    "excluded": NotFound,
    "abandoned": SystemExit,
    "fails by its result": BAD_RESULT,
}


def contexts(exc):
    """The exceptions that it was raised over, the last one first."""
    while exc.__context__ is not None:
        exc = exc.__context__
        yield exc


def assert_works_again(the, guard):
    """With the storage mended, the circuit closes: through a trial that is
    admitted at once when it is due, or if the storage failed in saying so and
    still takes another for the holder, as soon as that is past."""
    breaker, storage = the.breaker, the.storage
    storage.mend()
    breaker.state  # noqa: B018 (a look, to find what the storage says)
    if breaker.current_state == "open":
        the.clock.advance(breaker.retry_after)
    if storage.claimed is not None:
        the.clock.advance(TIMEOUT)
    assert breaker.retry_after == 0.0
    for _ in range(breaker.success_threshold):
        assert guard(breaker, lambda: "works") == "works"
    assert breaker.current_state == "closed"
    assert breaker.fail_counter == 0
    assert storage.claimed in (None, the.claimed_before)
    assert elsewhere(guard, breaker, lambda: "works") == "works"


@pairwise(prepare=PREPARED, fault=FAULTS, end=ENDS, guard=GUARDS)
def test_a_storage_that_raises_at_any_use_by_a_call_only_tells_the_caller(
    prepare, fault, end, guard, clock, recorder
):
    """What it raises reaches the caller, with what the function raised as its
    context; it is not counted as the service's failure; the place is free."""
    assert_only_tells_the_caller(prepare, fault, False, end, guard, clock, recorder)
    assert_only_tells_the_caller(prepare, fault, True, end, guard, clock, recorder)


def assert_only_tells_the_caller(prepare, fault, after, end, guard, clock, recorder):
    number = 0
    while True:
        the = Situation(clock, prepare, success_threshold=2)
        breaker, storage = the.breaker, the.storage
        before = dict(storage.values)
        the.claimed_before = storage.claimed
        recorder.events.clear()
        breaker.add_listener(recorder)
        work = Work(end)
        storage.fail(number, fault("the storage is gone"), after)
        caught = None
        try:
            guard(breaker, work)
        except BaseException as exc:
            caught = exc
        if not storage.has_failed:
            break
        assert is_from(caught, storage.fault, guard)
        raised = work.ran and work.error is not None
        assert (work.error in contexts(storage.fault)) == raised
        by_result = end == BAD_RESULT and guard in (by_call, by_coroutine)
        failed = work.ran and (end is ServiceDown or by_result)
        told = [event[1] for event in recorder.events if event[0] == "failure"]
        if by_result:
            assert [exc.result for exc in told] in ([], [BAD_RESULT] * failed)
        else:
            assert told in ([], [work.error] * failed)
        assert storage.values["counter"] <= before["counter"] + failed
        if storage.values["state"] == "open":
            assert failed or before["state"] == "open"
        if the.kept is not None:  # the trial that ran before this one
            storage.fail_at, mended = None, storage.fail_at
            with contextlib.suppress(CircuitBreakerError):
                the.kept.__exit__(SystemExit, SystemExit(), None)
            storage.fail_at = mended
        assert_works_again(the, guard)
        number += 1
    assert number == len(storage.uses) > 0


@every_fault
def test_a_grant_that_a_fault_keeps_from_being_used_goes_back(fault, guard, clock):
    """The storage granted the trial and failed when it was looked at next."""
    the = Situation(clock, due)
    guard(the.breaker, int)
    claim = the.storage.uses.index("claim_trial")
    the = Situation(clock, due)
    the.storage.fail(claim + 1, fault())
    caught = caught_from(guard, the.breaker, int)
    assert is_from(caught, the.storage.fault, guard)
    assert the.storage.uses[claim : claim + 2] == ["claim_trial", "read state"]
    the.storage.mend()
    assert guard(the.breaker, int) == 0


MOVES = {
    "open()": CircuitBreaker.open,
    "half_open()": CircuitBreaker.half_open,
    "close()": CircuitBreaker.close,
    "state = 'open'": lambda breaker: setattr(breaker, "state", "open"),
    "state": lambda breaker: breaker.state,
    "current_state": lambda breaker: breaker.current_state,
    "fail_counter": lambda breaker: breaker.fail_counter,
    "fail_counter = 3": lambda breaker: setattr(breaker, "fail_counter", 3),
    "success_counter": lambda breaker: breaker.success_counter,
    "retry_after": lambda breaker: breaker.retry_after,
    "snapshot()": CircuitBreaker.snapshot,
    "repr()": repr,
    "the gate": lambda breaker: state_of(breaker).before_call(int),
    "_handle_success()": lambda breaker: state_of(breaker)._handle_success(),
    "_handle_error()": lambda breaker: state_of(breaker)._handle_error(ServiceDown()),
    "_inc_counter()": lambda breaker: breaker._inc_counter(),
    "on_success()": lambda breaker: state_of(breaker).on_success(),
    "on_failure()": lambda breaker: state_of(breaker).on_failure(ServiceDown()),
}


@pairwise(prepare=PREPARED, fault=FAULTS, after=BEFORE_OR_AFTER, move=MOVES)
def test_a_storage_that_raises_at_any_use_by_hand_only_tells_who_asked(
    prepare, fault, after, move, clock
):
    """The caller gets what the storage raised, and the circuit works again after."""
    number = 0
    while True:
        the = Situation(clock, prepare)
        storage = the.storage
        the.claimed_before = storage.claimed
        storage.fail(number, fault("the storage is gone"), after)
        caught = None
        try:
            move(the.breaker)
        except BaseException as exc:
            caught = exc
        if not storage.has_failed:
            break
        assert caught is storage.fault
        if the.kept is not None:
            storage.fail_at, mended = None, storage.fail_at
            the.kept.__exit__(SystemExit, SystemExit(), None)
            storage.fail_at = mended
        assert_works_again(the, by_call)
        number += 1
    assert number == len(storage.uses)


def fails_guarded(breaker):
    def fails():
        raise ServiceDown

    breaker.call(fails)


@pairwise(
    prepare=PREPARED,
    fault=FAULTS,
    after=BEFORE_OR_AFTER,
    move={
        **MOVES,
        "a success": lambda breaker: breaker.call(int),
        "a failure": fails_guarded,
    },
)
def test_no_move_goes_untold_where_a_storage_raises(
    prepare, fault, after, move, clock, recorder
):
    """What a fault has interrupted is told at the next look, and told once: each move
    begins where the last one has led to, and the last one leads to the present."""
    number = 0
    while True:
        the = Situation(clock, prepare)
        breaker, storage = the.breaker, the.storage
        state = breaker.state.name
        recorder.events.clear()
        breaker.add_listener(recorder)
        storage.fail(number, fault("the storage is gone"), after)
        with contextlib.suppress(fault, ServiceDown, CircuitBreakerError):
            move(breaker)
        if not storage.has_failed:
            break
        storage.mend()
        now = breaker.state.name
        for old, new in recorder.transitions:
            assert old == state
            state = new
        assert state == now
        number += 1
    assert number == len(storage.uses)


def test_a_move_that_a_storage_has_interrupted_is_forgotten(clock):
    """The next one, by hand, is done for its own reason, and in its own way."""
    tripped = []

    class Failing(pybreaker.CircuitMemoryStorage):
        fails = False

        def once(self):
            failed, self.fails = self.fails, False
            if failed:
                raise OSError

        def move(self, move):
            if move.by == "count":
                tripped.append(move.fail_max)
            self.once()
            super().move(move)

    storage = Failing("closed")
    breaker = CircuitBreaker(1, TIMEOUT, state_storage=storage, success_threshold=2)
    for work, move in (
        (Work(ServiceDown), breaker.open),
        (Work(), breaker.half_open),
        (Work(), breaker.close),
    ):
        clock.advance(TIMEOUT)
        storage._success_counter = 1
        storage.fails = True
        with pytest.raises(OSError):
            breaker.call(work)
        move()
        assert not storage.fails
        assert breaker.state.reason == "by hand"
        assert breaker.success_counter == 0
    assert tripped == [1]


@every_fault
def test_a_storage_that_cannot_be_read_makes_no_breaker(fault, clock):
    """What the storage raises reaches the code that makes the breaker."""
    storage = Storage()
    storage.fail(0, fault())
    with pytest.raises(fault) as raised:
        CircuitBreaker(state_storage=storage)
    assert raised.value is storage.fault


def test_a_storage_that_fails_every_time_is_never_the_services_failure(
    guard, clock, recorder
):
    """However often it does: the count is as it was when it comes back."""
    the = Situation(clock, failures)
    the.breaker.add_listener(recorder)

    def use(name, effect):
        raise the.storage.fault

    the.storage.fault = OSError()
    the.storage.use = use
    for _ in range(3 * the.fail_max):
        with pytest.raises(OSError):
            guard(the.breaker, int)
    del the.storage.use
    assert recorder.events == []
    assert the.breaker.fail_counter == 2
    assert guard(the.breaker, int) == 0
    assert the.breaker.fail_counter == 0


# Listeners that raise, at every position.

NUMBER = 3  # of listeners

if sys.version_info >= (3, 11):
    QUIET_GROUP = ExceptionGroup("group", [OSError()])  # noqa: F821
    LOUD_GROUP = BaseExceptionGroup("group", [KeyboardInterrupt()])  # noqa: F821
    GROUPS = [QUIET_GROUP], [LOUD_GROUP]
else:
    GROUPS = [], []


def named(exc):
    return type.__repr__(type(exc)).split("'")[1].rpartition(".")[2]


def by_name(*exceptions):
    return {named(exc): exc for exc in exceptions}


QUIET = by_name(RuntimeError(), StopIteration(), StopAsyncIteration(), *GROUPS[0])
LOUD = by_name(KeyboardInterrupt(), GeneratorExit(), BaseException(), *GROUPS[1])


class Witness(CircuitBreakerListener):
    """Writes down what it hears in a book that it shares, then does its worst."""

    def __init__(self, book, place, event=None, do=None):
        self.book = book
        self.place = place
        self.event = event
        self.do = do

    def hear(self, event, cb, *details):
        self.book.append((self.place, event, *details))
        if event == self.event:
            self.do(self, cb)

    def before_call(self, cb, func, *args, **kwargs):
        self.hear("before_call", cb)

    def failure(self, cb, exc):
        self.hear("failure", cb)

    def success(self, cb):
        self.hear("success", cb)

    def rejected(self, cb, func, *args, **kwargs):
        self.hear("rejected", cb)

    def abandoned(self, cb):
        self.hear("abandoned", cb)

    def state_change(self, cb, old_state, new_state):
        self.hear("state_change", cb, old_state.name, new_state.name)


def witnesses(event, place, do):
    """The book, and listeners of whom the one at `place` does that at `event`."""
    book = []
    return book, [
        Witness(book, number, event if number == place else None, do)
        for number in range(NUMBER)
    ]


# With these, no trial of `live` but the last closes the circuit.
TO_THE_END = {"exclude": [NotFound], "success_threshold": 2}


def live(breaker, clock, guard):
    """A success, a trip, a rejection, a failed trial and a recovery. Returns how
    each call ended and what the circuit was after it."""
    seen = []
    for work in (
        Work(),
        Work(ServiceDown),
        Work(ServiceDown),
        Work(),
        TIMEOUT,
        Work(ServiceDown),
        TIMEOUT,
        Work(NotFound),
        Work(SystemExit),
        Work(),
    ):
        if work == TIMEOUT:
            clock.advance(TIMEOUT)
            continue
        try:
            seen.append(guard(breaker, work))
        except BaseException as exc:
            seen.append((type(exc), str(exc), type(exc.__cause__), work.ran))
        seen.append((breaker.current_state, breaker.fail_counter, breaker.retry_after))
    return seen


@pairwise(event=EVENTS, place=range(NUMBER), error=QUIET, guard=GUARDS)
def test_a_listener_that_raises_at_any_position_is_only_logged(
    event, place, error, guard, clock, caplog
):
    """No caller, no count and no other listener can tell the difference."""
    expected_book, listeners = witnesses(None, None, None)
    expected = live(
        CircuitBreaker(2, TIMEOUT, listeners=listeners, **TO_THE_END), clock, guard
    )
    book, listeners = witnesses(event, place, lambda self, cb: raising(error)())
    caplog.clear()
    breaker = CircuitBreaker(2, TIMEOUT, listeners=listeners, **TO_THE_END)
    assert live(breaker, clock, guard) == expected
    assert book == expected_book
    logged = [record.exc_info[1] for record in caplog.records if record.exc_info]
    assert logged == [error] * [e[:2] for e in book].count((place, event)) != []


@pairwise(event=EVENTS, place=range(NUMBER), error=LOUD, guard=GUARDS)
def test_an_interruption_in_a_listener_at_any_position_reaches_the_caller(
    event, place, error, guard, clock
):
    """The listeners in front have heard, those behind have not; the call is over and
    its place is free."""
    armed = []

    def interrupt(self, cb):
        if armed:
            raise armed.pop()

    for circuit in ("closed", "open", "due", "half-open"):
        for error_of_work in (None, ServiceDown):
            book, listeners = witnesses(event, place, interrupt)
            breaker = CircuitBreaker(1, TIMEOUT, listeners=listeners)
            if circuit == "half-open":
                breaker.half_open()
            elif circuit != "closed":
                breaker.open()
            if circuit == "due":
                clock.advance(TIMEOUT)
            book.clear()
            armed.append(error)
            caught = None
            try:
                guard(breaker, Work(error_of_work))
            except BaseException as exc:
                caught = exc
            if armed:  # there was no such event
                armed.clear()
                continue
            assert caught is error
            last = [position for position, name, *_ in book if name == event]
            assert last[-(place + 1) :] == list(range(place + 1))
            if breaker.current_state == "open":
                clock.advance(breaker.retry_after)
            assert breaker.retry_after == 0.0
            assert elsewhere(guard, breaker, lambda: "works") == "works"
            assert breaker.current_state == "closed"


@pairwise(
    event=["rejected", "before_call"],
    refused_by=["the opening", "a trial", "the storage"],
    error=LOUD,
    guard=GUARDS,
)
def test_an_interruption_in_a_dry_run_takes_back_what_it_lets_through(
    event, refused_by, error, guard
):
    """A call that would be rejected is told of. A listener is interrupted: the function
    does not run, nothing is counted, and the place is whose it was."""
    ran = []

    class Grants(pybreaker.CircuitMemoryStorage):
        def claim_trial(self, timeout):
            return refused_by == "a trial"

    breaker = CircuitBreaker(1, TIMEOUT, state_storage=Grants("closed"), dry_run=True)
    breaker.open(0 if refused_by == "the storage" else TIMEOUT)
    trial = breaker.calling()
    if refused_by == "a trial":
        breaker.half_open()
        contextvars.Context().run(trial.__enter__)
    before = breaker.snapshot()
    book, listeners = witnesses(event, 0, raising(error))
    breaker.add_listeners(*listeners)
    with pytest.raises(type(error)) as raised:
        guard(breaker, lambda: ran.append("ran"))
    assert raised.value is error
    assert ran == []
    assert {name for _, name, *_ in book} <= {"rejected", "before_call"}
    names = "state", "fail_counter"
    after = breaker.snapshot()
    assert [after[name] for name in names] == [before[name] for name in names]
    assert (breaker.retry_after > 0) == (refused_by != "the storage")
    if refused_by == "a trial":
        trial.__exit__(None, None, None)
        assert breaker.current_state == "closed"


# Listeners that do things, at every position and event.


def once(do):
    """Does it the first time only, as it would bring about itself."""
    done = []

    def do_once(self, cb):
        if not done:
            done.append(True)
            do(self, cb)

    return do_once


def call_that_fails(self, cb):
    with contextlib.suppress(ServiceDown, CircuitBreakerError):
        cb.call(raising(ServiceDown()))


def call_that_succeeds(self, cb):
    with contextlib.suppress(CircuitBreakerError):
        cb.call(int)


def coroutine_that_fails(self, cb):
    with contextlib.suppress(ServiceDown, CircuitBreakerError):
        by_coroutine(cb, raising(ServiceDown()))


def block_that_succeeds(self, cb):
    with contextlib.suppress(CircuitBreakerError), cb.calling():
        pass


def call_that_is_abandoned(self, cb):
    with contextlib.suppress(KeyboardInterrupt, CircuitBreakerError):
        cb.call(raising(KeyboardInterrupt()))


def watch(self, cb):
    repr(cb), cb.snapshot(), cb.state, cb.retry_after, cb.listeners


def set_numbers(self, cb):
    cb.fail_max, cb.reset_timeout, cb.success_threshold = 2, TIMEOUT, 1
    cb.fail_counter = cb.fail_counter


DEEDS = {
    "open": lambda self, cb: cb.open(),
    "half_open": lambda self, cb: cb.half_open(),
    "close": lambda self, cb: cb.close(),
    "call_that_fails": call_that_fails,
    "call_that_succeeds": call_that_succeeds,
    "coroutine_that_fails": coroutine_that_fails,
    "block_that_succeeds": block_that_succeeds,
    "call_that_is_abandoned": call_that_is_abandoned,
    "watch": watch,
    "set_numbers": set_numbers,
    "use and raise": lambda self, cb: (cb.close(), raising(RuntimeError())()),
}


@pairwise(event=EVENTS, place=range(NUMBER), deed=DEEDS, guard=GUARDS)
def test_a_listener_may_use_the_breaker_at_any_position(
    event, place, deed, guard, clock
):
    """Every listener hears of every transition once, whoever caused it, and is
    told of it when it is complete; then the circuit works as before."""
    book, listeners = witnesses(event, place, once(deed))
    breaker = CircuitBreaker(2, TIMEOUT, listeners=listeners, exclude=[NotFound])
    live(breaker, clock, guard)
    told = [
        [entry[1:] for entry in book if entry[0] == number] for number in range(NUMBER)
    ]
    assert sorted(told[0]) == sorted(told[1]) == sorted(told[2])
    # The first in the row hears of each thing before what is done about it.
    moves = [entry[1:] for entry in told[0] if entry[0] == "state_change"]
    for (_, new), (old, _) in zip(moves, moves[1:]):
        assert new == old
    if moves:
        assert moves[0][0] == "closed"
        assert moves[-1][1] == breaker.current_state == breaker.state.name
    assert breaker.fail_counter <= breaker.fail_max or breaker.current_state != "closed"
    breaker.half_open()
    assert breaker.retry_after == 0.0
    assert elsewhere(guard, breaker, lambda: "works") == "works"
    assert breaker.current_state == "closed"


@pairwise(event=EVENTS, place=range(NUMBER), guard=GUARDS)
def test_a_listener_may_remove_itself_at_any_event(event, place, guard, clock):
    """The removed listener hears no more; the rest hear everything, once, in order."""
    everything, listeners = witnesses(None, None, None)
    live(CircuitBreaker(2, TIMEOUT, listeners=listeners, **TO_THE_END), clock, guard)
    book, listeners = witnesses(event, place, lambda self, cb: cb.remove_listener(self))
    breaker = CircuitBreaker(2, TIMEOUT, listeners=listeners, **TO_THE_END)
    live(breaker, clock, guard)
    assert breaker.listeners == (*listeners[:place], *listeners[place + 1 :])
    gone = [entry[:2] for entry in book].index((place, event))
    assert book[: gone + 1] == everything[: gone + 1]
    assert book[gone + 1 :] == [e for e in everything[gone + 1 :] if e[0] != place]


@pairwise(event=EVENTS, place=range(NUMBER), guard=GUARDS)
def test_a_listener_may_add_another_at_any_event(event, place, guard, clock):
    """The new one hears what happens from then on, and not what is being told."""
    everything, listeners = witnesses(None, None, None)
    live(CircuitBreaker(2, TIMEOUT, listeners=listeners, **TO_THE_END), clock, guard)
    book, new = [], []
    add = once(lambda self, cb: cb.add_listener(Witness(new, 0)))
    _, listeners = witnesses(event, place, add)
    for listener in listeners:
        listener.book = book
    live(CircuitBreaker(2, TIMEOUT, listeners=listeners, **TO_THE_END), clock, guard)
    assert book == everything
    of_the_last = [entry[1:] for entry in everything if entry[0] == NUMBER - 1]
    missed = [entry[0] for entry in of_the_last].index(event) + 1
    assert [entry[1:] for entry in new] == of_the_last[missed:]


@pytest.mark.parametrize("event", EVENTS)
def test_a_listener_may_remove_the_next_one_at_any_event(event, guard, clock):
    """The removed listener is still told of the event that was being told."""
    everything, listeners = witnesses(None, None, None)
    live(CircuitBreaker(2, TIMEOUT, listeners=listeners, **TO_THE_END), clock, guard)

    @once
    def remove_the_next(self, cb):
        cb.remove_listener(listeners[1])

    book, listeners = witnesses(event, 0, remove_the_next)
    live(CircuitBreaker(2, TIMEOUT, listeners=listeners, **TO_THE_END), clock, guard)
    last = [entry[:2] for entry in everything].index((1, event))
    assert [e for e in book if e[0] == 1] == [e for e in everything if e[0] == 1][
        : [e[:2] for e in everything[: last + 1] if e[0] == 1].index((1, event)) + 1
    ]
    assert [e for e in book if e[0] != 1] == [e for e in everything if e[0] != 1]


@pytest.mark.parametrize("event", EVENTS)
def test_a_listener_that_blocks_holds_others_up_and_loses_nothing(event, guard):
    """The other calls wait their turn, are told of after that, and all count."""
    blocking, go_on, book = threading.Event(), threading.Event(), []

    @once
    def block(self, cb):
        blocking.set()
        assert go_on.wait(PATIENCE)
        book.append("goes on")

    def call(work):
        try:
            guard(breaker, work)
        except (ServiceDown, CircuitBreakerError, SystemExit) as exc:
            book.append(type(exc))

    breaker = CircuitBreaker(2, TIMEOUT)
    if event == "state_change":
        breaker.half_open()
    elif event == "rejected":
        breaker.open()
    state = "open" if event == "rejected" else "closed"
    breaker.add_listener(Witness(book, 0, event, block))
    first = Work({"failure": ServiceDown, "abandoned": SystemExit}.get(event))
    threads = [
        threading.Thread(target=call, args=[work], daemon=True)
        for work in (first, lambda: book.append("runs"))
    ]
    threads[0].start()
    assert blocking.wait(PATIENCE)
    heard = list(book)
    threads[1].start()
    threads[1].join(0.02)  # in which it does not end, nor is it heard of
    assert book == heard
    go_on.set()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()
    assert book[len(heard)] == "goes on"
    names = [entry[1] for entry in book if isinstance(entry, tuple)]
    if event == "rejected":
        assert names == ["rejected"] * 2
        assert book.count(CircuitBreakerError) == 2
    else:
        assert book.count("runs") == 1
        assert names.count("before_call") == 2
        succeeded = 1 if event in ("failure", "abandoned") else 2
        assert names.count("success") == succeeded
    assert breaker.current_state == state
    assert breaker.fail_counter == 0


# Predicates.


class Odd(Exception):
    """What the predicates are asked about."""


@pairwise(
    place=range(NUMBER), error=QUIET, excluder=[None, *range(NUMBER)], guard=GUARDS
)
def test_a_predicate_that_raises_at_any_position_is_only_logged(
    place, error, excluder, guard, caplog
):
    """A predicate that raises excludes nothing; the next ones are asked in order."""
    asked = []

    def predicate(number):
        def judge(exc):
            asked.append(number)
            if number == place:
                raise error
            return number == excluder

        return judge

    breaker = CircuitBreaker(5, exclude=[predicate(number) for number in range(NUMBER)])
    odd = Odd()
    with pytest.raises(Odd) as raised:
        guard(breaker, raising(odd))
    assert raised.value is odd
    excluded = excluder is not None and excluder != place
    assert breaker.fail_counter == (0 if excluded else 1)
    assert asked == list(range(excluder + 1 if excluded else NUMBER))
    logged = [record.exc_info[1] for record in caplog.records if record.exc_info]
    assert logged == [error] * (place in asked)


@pairwise(
    place=range(NUMBER), error=LOUD, circuit=["closed", "half-open"], guard=GUARDS
)
def test_an_interruption_in_a_predicate_at_any_position_decides_nothing(
    place, error, circuit, guard, recorder
):
    """The interruption hides what the function raised; the place is free."""
    exclude = [lambda exc: False] * NUMBER
    exclude[place] = raising(error)
    breaker = CircuitBreaker(1, TIMEOUT, exclude=exclude)
    breaker.state = circuit
    breaker.add_listener(recorder)
    odd = Odd()
    with pytest.raises(type(error)) as raised:
        guard(breaker, raising(odd))
    assert raised.value is error
    assert odd in contexts(error)
    assert recorder.names == ["before_call"]
    assert (breaker.current_state, breaker.fail_counter) == (circuit, 0)
    assert breaker.retry_after == 0.0
    error.__context__ = None


def remove_themselves(breaker):
    for exclusion in breaker.excluded_exceptions:
        breaker.remove_excluded_exception(exclusion)


USES = {
    "open": (lambda breaker: breaker.open(), ["open", 0]),
    "close": (lambda breaker: breaker.close(), ["closed", 0]),
    "call": (lambda breaker: breaker.call(int), ["closed", 1]),
    "failing call": (lambda breaker: call_that_fails(None, breaker), ["closed", 2]),
    "remove": (remove_themselves, ["closed", 1]),
    "add": (lambda breaker: breaker.add_excluded_exception(OSError), ["closed", 1]),
    "watch": (lambda breaker: watch(None, breaker), ["closed", 1]),
    "fail_max": (lambda breaker: setattr(breaker, "fail_max", 1), ["open", 1]),
}


@pytest.mark.parametrize("use, expected", USES.values(), ids=USES)
def test_a_predicate_may_use_the_breaker(use, expected, guard):
    """What it does is done before the failure that it judges is counted; a move
    makes that a late one."""
    asked = []

    def judge(exc):
        if not asked:
            asked.append(exc)
            use(breaker)
        return False

    breaker = CircuitBreaker(5, TIMEOUT, exclude=[judge])
    with pytest.raises((Odd, CircuitBreakerError)):
        guard(breaker, raising(Odd()))
    assert [breaker.current_state, breaker.fail_counter] == expected
    breaker.close()
    assert elsewhere(guard, breaker, lambda: "works") == "works"


@pytest.mark.parametrize("circuit", ["closed", "half-open"])
def test_a_predicate_may_wait_for_another_thread_that_uses_the_breaker(circuit, guard):
    """The predicate is asked outside the lock."""
    seen = []

    def judge(exc):
        with contextlib.suppress(CircuitBreakerError):
            seen.append(elsewhere(repr, breaker))
            elsewhere(breaker.call, seen.append, "called")
        return True

    breaker = CircuitBreaker(exclude=[judge])
    breaker.state = circuit
    with pytest.raises(Odd):
        guard(breaker, raising(Odd()))
    assert circuit in seen[0]
    assert seen[1:] == (["called"] if circuit == "closed" else [])
    assert breaker.current_state == "closed"


# A predicate that is asked about results.

RETURNING = [by_call, by_coroutine]
returning = pytest.mark.parametrize("guard", RETURNING)
SETTINGS = ["ignore", "exclude", "include"]


@pairwise(setting=SETTINGS, error=QUIET, guard=GUARDS)
def test_a_predicate_of_any_setting_that_raises_did_not_match(
    setting, error, guard, caplog
):
    """The function's exception counts as a failure (with `include`, as a success) and
    reaches the caller untouched; what the predicate raised is logged."""
    breaker = CircuitBreaker(5, **{setting: [raising(error)]})
    odd = Odd()
    with pytest.raises(Odd) as raised:
        guard(breaker, raising(odd))
    assert raised.value is odd
    assert breaker.fail_counter == (setting != "include")
    logged = [record.exc_info[1] for record in caplog.records if record.exc_info]
    assert logged == [error]


@pairwise(setting=SETTINGS, error=LOUD, circuit=["closed", "half-open"], guard=GUARDS)
def test_an_interruption_in_a_predicate_of_any_setting_decides_nothing(
    setting, error, circuit, guard, recorder
):
    """The interruption hides what the function raised; the place is free."""
    breaker = CircuitBreaker(1, TIMEOUT, **{setting: [raising(error)]})
    breaker.state = circuit
    breaker.add_listener(recorder)
    odd = Odd()
    with pytest.raises(type(error)) as raised:
        guard(breaker, raising(odd))
    assert raised.value is error
    assert odd in contexts(error)
    assert recorder.names == ["before_call"]
    assert (breaker.current_state, breaker.fail_counter) == (circuit, 0)
    assert breaker.retry_after == 0.0
    error.__context__ = None


@pairwise(error=QUIET, circuit=["closed", "half-open"], guard=RETURNING)
def test_a_predicate_that_raises_about_a_result_is_only_logged(
    error, circuit, guard, caplog
):
    """The call has succeeded, and the caller gets the result."""
    breaker = CircuitBreaker(1, failure_result=raising(error))
    breaker.state = circuit
    assert guard(breaker, lambda: "result") == "result"
    assert (breaker.current_state, breaker.fail_counter) == ("closed", 0)
    logged = [record.exc_info[1] for record in caplog.records if record.exc_info]
    assert logged == [error]


@pairwise(error=LOUD, circuit=["closed", "half-open"], guard=RETURNING)
def test_an_interruption_in_a_predicate_about_a_result_decides_nothing(
    error, circuit, guard, recorder
):
    """The interruption reaches the caller, not the result; the place is free."""
    breaker = CircuitBreaker(1, TIMEOUT, failure_result=raising(error))
    breaker.state = circuit
    breaker.add_listener(recorder)
    with pytest.raises(type(error)) as raised:
        guard(breaker, lambda: "result")
    assert raised.value is error
    assert recorder.names == ["before_call"]
    assert (breaker.current_state, breaker.fail_counter) == (circuit, 0)
    assert breaker.retry_after == 0.0


@returning
@pytest.mark.parametrize(
    "use, expected",
    [USES[name] for name in USES if name not in ("remove", "failing call")],
    ids=[name for name in USES if name not in ("remove", "failing call")],
)
def test_a_predicate_about_results_may_use_the_breaker(use, expected, guard):
    """What it does is done before the failure that it makes of the result is counted;
    a move makes that a late one."""
    asked = []

    def judge(result):
        if asked:
            return False
        asked.append(result)
        use(breaker)
        return True

    breaker = CircuitBreaker(5, TIMEOUT, failure_result=judge)
    assert guard(breaker, lambda: "result") == "result"
    assert [breaker.current_state, breaker.fail_counter] == expected
    breaker.close()
    assert elsewhere(guard, breaker, lambda: "works") == "works"


@returning
@pytest.mark.parametrize("circuit", ["closed", "half-open"])
def test_a_predicate_about_results_may_wait_for_another_thread(circuit, guard):
    """The predicate is called without the lock, so another call is admitted or rejected
    meanwhile."""
    seen = []

    def judge(result):
        if result == "result":
            seen.append(elsewhere(repr, breaker))
            with contextlib.suppress(CircuitBreakerError):
                seen.append(elsewhere(breaker.call, lambda: "called"))
        return result == "result"

    breaker = CircuitBreaker(2, failure_result=judge)
    breaker.state = circuit
    assert guard(breaker, lambda: "result") == "result"
    assert circuit in seen[0]
    assert seen[1:] == (["called"] if circuit == "closed" else [])
    assert breaker.fail_counter == 1
    assert breaker.current_state == ("closed" if circuit == "closed" else "open")


# Exceptions that are not what exceptions should be.


class NoStr(Exception):
    def __str__(self):
        raise RuntimeError("no words")


class NoRepr(Exception):
    def __repr__(self):
        raise RuntimeError("no words")

    __str__ = __repr__


class Falsy(Exception):
    def __bool__(self):
        return False

    def __len__(self):
        return 0


class EqualToAll(Exception):
    def __eq__(self, other):
        return True

    def __ne__(self, other):
        return False

    __hash__ = None


class NoEqual(Exception):
    def __eq__(self, other):
        raise RuntimeError("incomparable")

    __ne__ = __bool__ = __hash__ = __eq__


class Meta(type):
    """Of a class that breaks whatever is asked of it, not of its instances."""

    def __instancecheck__(cls, instance):
        raise RuntimeError("no instances")

    def __eq__(cls, other):
        raise RuntimeError("incomparable")

    def __bool__(cls):
        raise RuntimeError("no truth")

    __hash__ = type.__hash__


class WithMetaclass(Exception, metaclass=Meta):
    pass


class PlainBase(BaseException):
    """A BaseException that is no Exception and does not abandon a call."""

    def __repr__(self):
        raise RuntimeError("no words")


def in_generators(exc):
    """Python itself turns these into RuntimeError in what is not a function."""
    return isinstance(exc, (StopIteration, StopAsyncIteration))


ODD = [NoStr, NoRepr, Falsy, EqualToAll, NoEqual, WithMetaclass, PlainBase]
ODD_ERRORS = by_name(*(cls() for cls in ODD), StopIteration(3), StopAsyncIteration())
if sys.version_info >= (3, 11):
    ODD_ERRORS |= {
        "group": QUIET_GROUP,
        "group of odd ones": ExceptionGroup("odd", [NoRepr(), Falsy()]),  # noqa: F821
        "mixed group": BaseExceptionGroup(  # noqa: F821
            "mixed", [KeyboardInterrupt(), Odd()]
        ),
    }

every_odd_error = pytest.mark.parametrize("error", ODD_ERRORS.values(), ids=ODD_ERRORS)


@every_odd_error
def test_an_odd_exception_is_a_failure_like_any_other(error, guard, recorder):
    """The exception is counted once, told to listeners, and reaches the caller."""
    breaker = CircuitBreaker(listeners=[recorder])
    caught = caught_from(guard, breaker, raising(error))
    assert breaker.fail_counter == 1
    assert recorder.names == ["before_call", "failure"]
    assert is_from(recorder.events[-1][1], error, guard)
    assert is_from(caught, error, guard)


@pairwise(
    error=ODD_ERRORS,
    circuit=["closed", "half-open"],
    new_error=[True, False],
    guard=GUARDS,
)
def test_an_odd_exception_opens_the_circuit_like_any_other(
    error, circuit, new_error, guard, caplog
):
    """The caller gets CircuitBreakerError or the exception; the opening is logged."""
    breaker = CircuitBreaker(1, throw_new_error_on_trip=new_error, name="odd")
    breaker.state = circuit
    caplog.clear()
    caught = caught_from(guard, breaker, raising(error))
    assert breaker.current_state == "open"
    assert breaker.fail_counter == 1
    if new_error:
        assert isinstance(caught, CircuitBreakerError)
        assert is_from(caught.__cause__, error, guard)
    else:
        assert is_from(caught, error, guard)
    (message,) = [record.getMessage() for record in caplog.records]
    assert "odd" in message and "open, was " in message
    if not in_generators(error):
        assert type(error).__name__ in message


@every_odd_error
def test_an_odd_exception_can_be_excluded_like_any_other(error, guard, recorder):
    """A predicate excludes the exception, whatever its class does."""
    breaker = CircuitBreaker(1, listeners=[recorder])
    breaker.add_excluded_exception(lambda exc: True)
    caught = caught_from(guard, breaker, raising(error))
    assert is_from(caught, error, guard)
    assert breaker.fail_counter == 0
    assert recorder.names == ["before_call", "success"]


def test_a_class_whose_metaclass_raises_can_be_excluded_and_removed(
    guard, fail, boom, caplog
):
    """Python knows the instances of the class without asking the metaclass. For other
    exceptions the metaclass raises, and the breaker logs that."""
    breaker = CircuitBreaker(5, exclude=[WithMetaclass])
    with pytest.raises(BaseException) as raised:  # noqa: B017
        guard(breaker, raising(WithMetaclass()))
    assert type(raised.value) is WithMetaclass
    assert breaker.fail_counter == 0
    with pytest.raises(boom):
        guard(breaker, fail)
    assert breaker.fail_counter == 1
    assert [str(record.exc_info[1]) for record in caplog.records] == ["no instances"]
    breaker.remove_excluded_exception(WithMetaclass)
    assert breaker.excluded_exceptions == ()


@pytest.mark.parametrize("error", [Falsy(), EqualToAll(), NoEqual()], ids=named)
def test_an_odd_exception_may_be_handed_over_by_hand(error):
    """`_handle_error` and `on_failure` take it for what it is."""
    breaker = CircuitBreaker(2, throw_new_error_on_trip=False)
    with pytest.raises(type(error)) as raised:
        breaker.state._handle_error(error)
    assert raised.value is error
    assert breaker.fail_counter == 1
    breaker.fail_counter = 2
    with pytest.raises(type(error)):
        breaker.state.on_failure(error)
    assert breaker.current_state == "open"


# Logging.


class Handler(logging.Handler):
    """Does something with each record, with its lock held."""

    def __init__(self, do):
        super().__init__()
        self.do = do
        self.records = []

    def emit(self, record):
        self.records.append(record)
        self.do(record)


@pytest.fixture
def handler(request):
    """`handler(do)` is a handler of the library's logger, until the test ends."""
    logger = logging.getLogger("pybreaker")

    def add(do):
        handler = Handler(do)
        logger.addHandler(handler)
        request.addfinalizer(lambda: logger.removeHandler(handler))
        return handler

    return add


@pytest.fixture
def log_filter(request):
    """`log_filter(do)` filters the library's logger, until the test ends."""
    logger = logging.getLogger("pybreaker")

    def add(do):
        logger.addFilter(do)
        request.addfinalizer(lambda: logger.removeFilter(do))

    return add


def broken_listener(event):
    """A listener that raises the first time."""

    def hear(self, cb, *args, **kwargs):
        whole, self.whole = self.whole, False
        if whole:
            raise RuntimeError("broken")

    return type("Broken", (), {event: hear, "whole": True})()


def settle(breaker, *, error=None):
    with contextlib.suppress(ServiceDown, CircuitBreakerError):
        breaker.call(Work(error))


def found(breaker):
    storage_of(breaker).opened_at = datetime.now(timezone.utc)
    storage_of(breaker).state = "open"
    breaker.state  # noqa: B018 (a look)


def broken_before_call(breaker):
    breaker.add_listener(broken_listener("before_call"))
    settle(breaker)


def broken_rejected(breaker):
    breaker.open()
    breaker.add_listener(broken_listener("rejected"))
    settle(breaker)


def tripped_by_hand(breaker):
    breaker.fail_counter = 1
    with contextlib.suppress(CircuitBreakerError):
        breaker.state.on_failure(ServiceDown())


def closed_by_hand(breaker):
    breaker.half_open()
    breaker.state.on_success()


def gate(breaker):
    breaker.open()
    storage_of(breaker).opened_at = None
    breaker.state.before_call(int)


def trial(breaker, *, error=None):
    breaker.open()
    storage_of(breaker).opened_at = None
    settle(breaker, error=error)


def async_trial(breaker):
    breaker.open()
    storage_of(breaker).opened_at = None
    by_coroutine(breaker, int)


def broken_predicate(breaker):
    breaker.fail_max = 5
    breaker.add_excluded_exception(raising(RuntimeError("broken")))
    settle(breaker, error=ServiceDown)


LOGGED = {
    "open()": (CircuitBreaker.open, 1),
    "half_open()": (CircuitBreaker.half_open, 1),
    "close()": (CircuitBreaker.close, 1),
    "state = 'open'": (lambda breaker: setattr(breaker, "state", "open"), 1),
    "a trip": (lambda breaker: settle(breaker, error=ServiceDown), 1),
    "a recovery": (trial, 3),
    "an async recovery": (async_trial, 3),
    "a failed trial": (lambda breaker: trial(breaker, error=ServiceDown), 3),
    "found": (found, 1),
    "on_failure()": (tripped_by_hand, 1),
    "on_success()": (closed_by_hand, 2),
    "the gate": (gate, 2),
    "a broken before_call": (broken_before_call, 1),
    "a broken rejected": (broken_rejected, 2),
    "a broken predicate": (broken_predicate, 1),
}

everything_that_is_logged = pytest.mark.parametrize(
    "cause, number", LOGGED.values(), ids=LOGGED
)


@everything_that_is_logged
def test_a_log_handler_may_wait_for_a_thread_that_uses_the_breaker(
    cause, number, handler
):
    """Records are logged when the lock has been released: a handler has a lock of its
    own, and a thread that holds the handler's lock may wait for the breaker's."""
    seen = []

    def use(record):
        elsewhere(repr, breaker)
        elsewhere(breaker.snapshot)
        # Abandoned, so that it moves nothing: that would be logged in its turn.
        with contextlib.suppress(CircuitBreakerError, KeyboardInterrupt):
            elsewhere(breaker.call, raising(KeyboardInterrupt()))
        seen.append(record)  # what an assertion raised here would not get out

    breaker = CircuitBreaker(1, TIMEOUT)
    log = handler(use)
    cause(breaker)
    assert len(log.records) >= number
    assert seen == log.records


@everything_that_is_logged
@pytest.mark.parametrize("where", ["handler", "filter"])
def test_a_log_handler_that_raises_changes_nothing(
    cause, number, where, handler, log_filter
):
    """A filter that raises breaks nothing, and gets each of the records."""
    expected = CircuitBreaker(1, TIMEOUT)
    cause(expected)
    breaker = CircuitBreaker(1, TIMEOUT)
    seen = []

    def break_it(record):
        seen.append(record)
        raise RuntimeError("the disk is full")

    handler(break_it) if where == "handler" else log_filter(break_it)
    cause(breaker)
    assert len(seen) == number
    assert breaker.current_state == expected.current_state
    assert breaker.fail_counter == expected.fail_counter
    assert elsewhere(breaker.snapshot)["state"] == expected.current_state


def logging_drops_what_a_handler_logs():
    """Whether this Python, as 3.13.5 does, drops a record that a handler makes."""
    logger = logging.Logger("of no tree")
    nested = Handler(lambda record: record.args or logger.error("%s", "nested"))
    logger.addHandler(nested)
    logger.error("the first")
    return len(nested.records) == 1


def test_a_log_handler_may_use_the_breaker_itself(handler, clock, guard):
    """The move that the handler makes is logged after the move that it was told of."""
    breaker = CircuitBreaker(1, TIMEOUT)
    log = handler(lambda record: breaker.current_state == "open" and breaker.close())
    with pytest.raises(CircuitBreakerError):
        guard(breaker, raising(ServiceDown()))
    assert breaker.current_state == "closed"
    first, *rest = (record.getMessage() for record in log.records)
    assert "open, was closed" in first
    if logging_drops_what_a_handler_logs():
        assert rest == []
    else:
        (second,) = rest
        assert "closed, was open" in second


def test_an_interruption_in_a_log_handler_reaches_the_caller(guard, handler, clock):
    """The move that the record is about stands, and the place is free."""
    armed = [KeyboardInterrupt()]

    def interrupt(record):
        if armed:
            raise armed.pop()

    breaker = CircuitBreaker(1, TIMEOUT)
    breaker.open()
    clock.advance(TIMEOUT)
    handler(interrupt)
    ran = []
    with pytest.raises(KeyboardInterrupt):
        guard(breaker, lambda: ran.append(True))
    assert ran == []
    assert breaker.current_state == "half-open"
    assert breaker.retry_after == 0.0
    assert guard(breaker, lambda: "works") == "works"
    assert breaker.current_state == "closed"


def test_an_interruption_in_a_log_handler_at_the_end_of_a_trial_frees_the_place(
    guard, handler, clock
):
    """The trial is over and has counted, whatever there was to log about it."""

    class Broken(CircuitBreakerListener):
        def success(self, cb):
            raise ValueError

    breaker = CircuitBreaker(1, TIMEOUT, success_threshold=2, listeners=[Broken()])
    breaker.half_open()
    handler(raising(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        guard(breaker, lambda: "works")
    assert breaker.success_counter == 1
    assert breaker.retry_after == 0.0


def test_an_interruption_in_a_log_handler_as_a_trial_is_admitted_frees_the_place(
    guard, handler, clock
):
    """The circuit was found half-open, and that is logged before the trial begins."""
    breaker = CircuitBreaker(1, TIMEOUT)
    storage_of(breaker).state = "half-open"
    handler(raising(KeyboardInterrupt()))
    work = Work()
    with pytest.raises(KeyboardInterrupt):
        guard(breaker, work)
    assert not work.ran
    assert breaker.retry_after == 0.0


def test_what_happens_under_a_lock_that_is_held_is_logged_after_it(handler):
    """The next thread that uses the breaker, without the lock, logs the record."""
    log = handler(lambda record: None)
    breaker = CircuitBreaker(name="db")
    with lock_of(breaker):
        breaker.open()
        breaker.half_open()
        assert log.records == []
    breaker.state  # noqa: B018 (a look)
    first, second = (record.getMessage() for record in log.records)
    assert "open, was closed" in first
    assert "half-open, was open" in second


@pytest.mark.parametrize(
    "cause",
    [
        pytest.param(CircuitBreaker.open, id="open()"),
        pytest.param(CircuitBreaker.half_open, id="half_open()"),
        pytest.param(CircuitBreaker.close, id="close()"),
        pytest.param(found, id="found"),
        pytest.param(gate, id="the gate"),
        pytest.param(lambda breaker: settle(breaker, error=ServiceDown), id="a trip"),
        pytest.param(closed_by_hand, id="on_success()"),
        pytest.param(tripped_by_hand, id="on_failure()"),
    ],
)
def test_a_move_is_logged_though_a_listener_was_interrupted(cause, handler):
    """The move stands, so the log says so, at once."""
    breaker = CircuitBreaker(1, TIMEOUT)
    log = handler(lambda record: None)
    listener = type("Listener", (), {"state_change": raising(KeyboardInterrupt())})()
    breaker.add_listener(listener)
    with pytest.raises(KeyboardInterrupt):
        cause(breaker)
    assert len(log.records) == 1
