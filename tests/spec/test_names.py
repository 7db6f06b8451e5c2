"""Section 7: the names that existing code leans on, used the way it uses them."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import math
import pickle
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from unittest import mock

import pytest
from freezegun import freeze_time
from support import PATIENCE

import pybreaker
from pybreaker import (
    CircuitBreaker,
    CircuitBreakerError,
    CircuitBreakerListener,
    CircuitBreakerState,
    CircuitClosedState,
    CircuitHalfOpenState,
    CircuitMemoryStorage,
    CircuitOpenState,
)

STATES = [
    ("closed", "CircuitClosedState"),
    ("open", "CircuitOpenState"),
    ("half-open", "CircuitHalfOpenState"),
]
MOVES = {"closed": "close", "open": "open", "half-open": "half_open"}


@pytest.fixture(params=["lock held", "lock free"])
def shelter(request):
    """Code that drives by hand holds the lock, or holds nothing."""

    def shelter(breaker):
        if request.param == "lock held":
            return breaker._lock
        return contextlib.nullcontext()

    return shelter


def elsewhere(func, *args):
    """Calls the function in another thread and returns what it returns."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(func, *args).result(10)


def is_locked(breaker):
    """Whether another thread would have to wait for the lock."""

    def try_it():
        free = breaker._lock.acquire(blocking=False)
        if free:
            breaker._lock.release()
        return not free

    return elsewhere(try_it)


# The module.


@pytest.mark.parametrize(
    "name",
    [
        "CircuitBreaker",
        "CircuitBreakerError",
        "CircuitBreakerListener",
        "CircuitBreakerState",
        "CircuitClosedState",
        "CircuitOpenState",
        "CircuitHalfOpenState",
        "CircuitBreakerStorage",
        "CircuitMemoryStorage",
    ],
)
def test_the_module_has_the_class(name):
    """The classes are there to import, by name and by star."""
    assert isinstance(getattr(pybreaker, name), type)
    assert name in pybreaker.__all__


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("STATE_CLOSED", "closed"),
        ("STATE_OPEN", "open"),
        ("STATE_HALF_OPEN", "half-open"),
    ],
)
def test_the_module_has_the_name_of_the_state(name, value):
    """The constants are the plain strings that current_state says."""
    assert getattr(pybreaker, name) == value
    assert name in pybreaker.__all__


# States.


@pytest.mark.parametrize(("name", "class_name"), STATES)
def test_a_state_is_built_from_the_breaker_alone(name, class_name):
    """prev_state and notify are optional."""
    breaker = CircuitBreaker()
    state = getattr(pybreaker, class_name)(breaker)
    assert isinstance(state, CircuitBreakerState)
    assert (state.name, str(state), state._breaker) == (name, name, breaker)


@pytest.mark.parametrize(("name", "class_name"), STATES)
def test_a_state_built_by_hand_tells_nobody(name, class_name, recorder):
    """Such a state tells no listener even with notify=True, and moves nothing."""
    breaker = CircuitBreaker(listeners=[recorder])
    present = breaker.state
    cls = getattr(pybreaker, class_name)
    assert cls(breaker, prev_state=present, notify=True).name == name
    assert breaker.state is present
    assert recorder.events == []


def test_the_base_of_the_states_is_built_from_a_breaker_and_a_name():
    """The base class takes a breaker and a name, by position or by keyword."""
    breaker = CircuitBreaker()
    for state in (
        CircuitBreakerState(breaker, "maintenance"),
        CircuitBreakerState(cb=breaker, name="maintenance"),
    ):
        assert (state.name, str(state)) == ("maintenance", "maintenance")
        assert state._breaker is breaker


@pytest.mark.parametrize(("name", "class_name"), STATES)
def test_the_state_is_an_object_of_its_class(name, class_name):
    """Code asks with isinstance, by the state's name, and by the constants."""
    breaker = CircuitBreaker()
    getattr(breaker, MOVES[name])()
    cls = getattr(pybreaker, class_name)
    assert isinstance(breaker.state, cls)
    others = {CircuitClosedState, CircuitOpenState, CircuitHalfOpenState} - {cls}
    assert not isinstance(breaker.state, tuple(others))
    assert breaker.state.name == breaker.current_state == str(breaker.state) == name


def test_a_call_through_the_state_is_guarded(fail, boom):
    """state.call() is breaker.call()."""
    breaker = CircuitBreaker(fail_max=2)
    assert breaker.state.call(divmod, 7, 2) == (3, 1)
    with pytest.raises(boom):
        breaker.state.call(fail)
    assert breaker.fail_counter == 1
    with pytest.raises(CircuitBreakerError):
        breaker.state.call(fail)
    with pytest.raises(CircuitBreakerError):
        breaker.state.call(int)


@pytest.mark.parametrize(("name", "class_name"), STATES)
def test_a_mock_in_place_of_a_state_class_is_built_and_becomes_the_state(
    name, class_name
):
    """The classes are looked up in the module at every transition."""
    breaker = CircuitBreaker()
    old = breaker.state
    with mock.patch.object(pybreaker, class_name) as cls:
        getattr(breaker, MOVES[name])()
    cls.assert_called_once_with(breaker, prev_state=old, notify=mock.ANY)
    assert breaker.state is cls.return_value
    assert breaker.state.name == breaker.current_state == name


@pytest.mark.parametrize(("name", "class_name"), STATES)
def test_a_circuit_leaves_a_mocked_state(name, class_name, recorder, fail, boom):
    """After the patch is over the breaker works as before."""
    breaker = CircuitBreaker(fail_max=2, listeners=[recorder])
    with mock.patch.object(pybreaker, class_name):
        getattr(breaker, MOVES[name])()
    breaker.close()
    assert recorder.transitions[-1] == (name, "closed")
    with pytest.raises(boom):
        breaker.call(fail)
    assert breaker.fail_counter == 1


def test_a_mock_can_be_the_first_state():
    """Making a breaker looks the class up as well."""
    with mock.patch("pybreaker.CircuitClosedState") as cls:
        breaker = CircuitBreaker()
    assert breaker.state is cls.return_value


@pytest.mark.parametrize(("name", "class_name"), STATES)
def test_a_function_can_stand_in_for_a_state_class(name, class_name, monkeypatch):
    """Suites put a function there to count transitions."""
    original, made = getattr(pybreaker, class_name), []

    def counting(breaker, prev_state=None, notify=False):
        made.append(prev_state.name)
        return original(breaker, prev_state, notify)

    breaker = CircuitBreaker()
    monkeypatch.setattr(pybreaker, class_name, counting)
    getattr(breaker, MOVES[name])()
    assert made == ["closed"]
    assert isinstance(breaker.state, original)


@pytest.mark.parametrize(("name", "class_name"), STATES)
def test_a_state_class_is_asked_to_notify_where_the_circuit_has_moved(
    name, class_name, monkeypatch
):
    """A state that is made by hand, or for a new breaker, is not asked to notify and
    has no state before it."""
    original, asked = getattr(pybreaker, class_name), []

    def noting(breaker, *, prev_state=None, notify=False):
        asked.append((prev_state, notify))
        return original(breaker, prev_state=prev_state, notify=notify)

    monkeypatch.setattr(pybreaker, class_name, noting)
    breaker = CircuitBreaker(state_storage=CircuitMemoryStorage(name))
    breaker._create_new_state(name)
    assert asked == [(None, False)] * 2
    first = breaker.state
    getattr(breaker, MOVES[name])()
    assert asked[2:] == [(first, True)]


@pytest.mark.parametrize(("name", "class_name"), STATES)
def test_a_subclass_that_makes_states_makes_them_all(name, class_name):
    """The subclass makes the first state, and one for each move."""
    made = []

    class Maker(CircuitBreaker):
        def _create_new_state(self, new_state, prev_state=None, notify=False):
            made.append(super()._create_new_state(new_state, prev_state, notify))
            return made[-1]

    breaker = Maker(state_storage=CircuitMemoryStorage(name))
    assert breaker._state is made[-1]
    getattr(breaker, MOVES[name])()
    assert breaker._state is made[-1]
    assert len(made) == 2
    assert isinstance(made[-1], getattr(pybreaker, class_name))


@pytest.fixture
def counting_states(monkeypatch):
    """Subclasses in place of the three state classes note each of their instances."""
    made = []
    for _, class_name in STATES:
        base = getattr(pybreaker, class_name)

        def __init__(self, cb, prev_state=None, notify=False, base=base):
            base.__init__(self, cb, prev_state=prev_state, notify=notify)
            made.append(self.name)

        subclass = type(f"Counting{class_name}", (base,), {"__init__": __init__})
        monkeypatch.setattr(pybreaker, class_name, subclass)
    return made


def test_a_breaker_with_subclassed_states_works_the_same(
    counting_states, clock, fail, recorder
):
    """The circuit goes through a whole outage in states that a suite has put there."""
    breaker = CircuitBreaker(fail_max=1, reset_timeout=60, listeners=[recorder])
    with pytest.raises(CircuitBreakerError):
        breaker.call(fail)
    with pytest.raises(CircuitBreakerError):
        breaker.call(int)
    clock.advance(60)
    with pytest.raises(CircuitBreakerError):
        breaker.call(fail)
    clock.advance(60)
    assert breaker.call(int) == 0
    assert counting_states == ["closed", "open"] + ["half-open", "open"] + [
        "half-open",
        "closed",
    ]
    assert len(recorder.transitions) == 5


def test_calls_in_a_subclassed_closed_state_are_no_trials(counting_states, fail, boom):
    """A call within another call counts, and the storage is asked for no trial."""
    storage = CircuitMemoryStorage("closed")
    breaker = CircuitBreaker(state_storage=storage)

    def nested():
        with pytest.raises(boom):
            breaker.call(fail)
        return breaker.fail_counter

    with mock.patch.object(storage, "claim_trial") as claim_trial:
        assert breaker.call(nested) == 1
    claim_trial.assert_not_called()


# Driving by hand: the gate.


def test_the_gate_is_open_while_the_circuit_is_closed(shelter):
    """The gate lets a call pass, and does not run the function."""
    breaker, work = CircuitBreaker(), mock.Mock()
    with shelter(breaker):
        assert breaker.state.before_call(work, 1, key="value") is None
    work.assert_not_called()


def test_the_gate_is_shut_while_the_circuit_is_open(shelter, clock):
    """The gate raises as a call would, until the very end of the timeout."""
    breaker, work = CircuitBreaker(reset_timeout=60, name="db"), mock.Mock()
    breaker.open()
    clock.advance(59)
    with (
        pytest.raises(
            CircuitBreakerError,
            match="Timeout not elapsed yet, circuit breaker still open",
        ) as raised,
        shelter(breaker),
    ):
        breaker.state.before_call(work)
    assert raised.value.breaker is breaker
    assert raised.value.retry_after == 1
    assert breaker.current_state == "open"
    work.assert_not_called()


def test_the_gate_half_opens_when_the_timeout_has_passed(shelter, clock, recorder):
    """The gate calls the breaker's own half_open(), and does not run the function."""
    breaker, work = CircuitBreaker(reset_timeout=60, listeners=[recorder]), mock.Mock()
    breaker.open()
    clock.advance(60)
    with (
        shelter(breaker),
        mock.patch.object(breaker, "half_open", wraps=breaker.half_open) as half_open,
    ):
        breaker.state.before_call(work)
    half_open.assert_called_once_with()
    assert breaker.current_state == "half-open"
    assert recorder.transitions == [("closed", "open"), ("open", "half-open")]
    work.assert_not_called()


@pytest.mark.parametrize("begin", ["open", "half_open"])
def test_the_gate_does_not_take_the_place(shelter, clock, begin):
    """The gate lets any number of calls pass, and a guarded call after them is the
    trial."""
    breaker = CircuitBreaker(reset_timeout=60)
    getattr(breaker, begin)()
    clock.advance(60)
    with shelter(breaker):
        breaker.state.before_call(int)
        breaker.state.before_call(int)
    assert breaker.retry_after == 0.0
    assert breaker.call(int) == 0
    assert breaker.current_state == "closed"


def test_the_gate_is_shut_while_a_trial_runs(clock):
    """The gate is shut for another thread, and open within the trial."""
    breaker = CircuitBreaker(reset_timeout=60)
    breaker.half_open()

    def trial():
        breaker.state.before_call(int)
        with pytest.raises(CircuitBreakerError) as raised:
            elsewhere(breaker.state.before_call, int)
        return raised.value.retry_after

    assert breaker.call(trial) == 60


def test_the_gate_of_an_old_state_asks_the_present_one(shelter, clock):
    """Code may hold the state object of an era that is over."""
    breaker = CircuitBreaker(reset_timeout=60)
    closed = breaker.state
    breaker.open()
    opened = breaker.state
    with pytest.raises(CircuitBreakerError), shelter(breaker):
        closed.before_call(int)
    breaker.close()
    with shelter(breaker):
        opened.before_call(int)
    assert breaker.current_state == "closed"


# Driving by hand: the outcome.


def test_a_success_handed_to_the_closed_state_forgets_the_failures(shelter, recorder):
    """_handle_success() settles like a call that succeeded."""
    breaker = CircuitBreaker(listeners=[recorder])
    breaker.fail_counter = 3
    with shelter(breaker):
        assert breaker.state._handle_success() is None
    assert breaker.fail_counter == 0
    assert recorder.names == ["success"]


@pytest.mark.parametrize("reraise", [True, False])
def test_an_error_handed_to_the_closed_state_is_counted(
    shelter, recorder, boom, reraise
):
    """_handle_error() settles like a call that failed; `reraise` says whether it
    raises."""
    breaker, error = CircuitBreaker(listeners=[recorder]), boom()
    with shelter(breaker):
        if reraise:
            with pytest.raises(boom) as raised:
                breaker.state._handle_error(error)
            assert raised.value is error
        else:
            assert breaker.state._handle_error(error, reraise=False) is None
    assert breaker.fail_counter == 1
    assert recorder.events == [("failure", error)]


@pytest.mark.parametrize("reraise", [True, False])
@pytest.mark.parametrize("begin", ["close", "half_open"])
def test_an_error_that_opens_the_circuit_is_raised_whatever_reraise_says(
    shelter, boom, begin, reraise
):
    """The circuit opens, and CircuitBreakerError is raised from the error handed
    over."""
    breaker, error = CircuitBreaker(fail_max=1), boom()
    getattr(breaker, begin)()
    with shelter(breaker), pytest.raises(CircuitBreakerError) as raised:
        breaker.state._handle_error(error, reraise=reraise)
    assert raised.value.__cause__ is error
    assert (breaker.current_state, breaker.fail_counter) == ("open", 1)


@pytest.mark.parametrize("reraise", [True, False])
def test_an_error_that_opens_the_circuit_is_raised_itself_where_that_is_asked(
    shelter, boom, reraise
):
    """The breaker is made with throw_new_error_on_trip=False."""
    breaker = CircuitBreaker(fail_max=1, throw_new_error_on_trip=False)
    error = boom()
    with shelter(breaker), pytest.raises(boom) as raised:
        breaker.state._handle_error(error, reraise=reraise)
    assert raised.value is error
    assert breaker.current_state == "open"


def test_an_excluded_error_handed_to_a_state_is_a_success(shelter, recorder):
    """The count goes back to 0, and `reraise` says whether the error is raised."""
    breaker = CircuitBreaker(exclude=[ValueError], listeners=[recorder])
    breaker.fail_counter = 3
    with shelter(breaker):
        breaker.state._handle_error(ValueError(), reraise=False)
        assert breaker.fail_counter == 0
        with pytest.raises(ValueError):
            breaker.state._handle_error(ValueError())
    assert recorder.names == ["success", "success"]


def test_an_error_that_is_handed_over_is_raised_untouched(boom):
    """The error keeps the cause that it came with."""
    exc = boom()
    exc.__cause__ = cause = OSError()
    with pytest.raises(boom) as raised:
        CircuitBreaker().state._handle_error(exc)
    assert raised.value is exc
    assert exc.__cause__ is cause


def test_an_abandonment_handed_to_a_state_tells_nothing(shelter, recorder):
    """A cancelled task of code that drives by hand is no failure."""
    breaker = CircuitBreaker(fail_max=1, listeners=[recorder])
    with shelter(breaker):
        breaker.state._handle_error(asyncio.CancelledError(), reraise=False)
        with pytest.raises(asyncio.CancelledError):
            breaker.state._handle_error(asyncio.CancelledError())
    assert (breaker.fail_counter, recorder.events) == (0, [])


def test_successes_handed_to_the_half_open_state_close_the_circuit(shelter):
    """The circuit closes with the success that reaches success_threshold."""
    breaker = CircuitBreaker(success_threshold=2)
    breaker.half_open()
    with shelter(breaker):
        breaker.state._handle_success()
        assert (breaker.current_state, breaker.success_counter) == ("half-open", 1)
        breaker.state._handle_success()
    assert breaker.current_state == "closed"


def test_an_outcome_handed_over_gives_no_place_back(recorder):
    """A trial that runs meanwhile keeps its place."""
    breaker = CircuitBreaker(success_threshold=2)
    breaker.half_open()

    def trial():
        breaker.state._handle_success()
        with pytest.raises(CircuitBreakerError):
            elsewhere(breaker.call, int)

    breaker.call(trial)
    assert breaker.current_state == "closed"


def hand_over_success(state):
    state._handle_success()


def hand_over_error(state):
    state._handle_error(RuntimeError(), reraise=False)


def count_and_fail(state):
    state.on_failure(RuntimeError())


def conclude_success(state):
    state.on_success()


SETTLING = [hand_over_success, hand_over_error, count_and_fail, conclude_success]


@pytest.mark.parametrize("settle", SETTLING)
def test_an_open_state_moves_nothing(shelter, settle, clock):
    """The counters, the circuit and its timeout stay as they are."""
    breaker = CircuitBreaker(fail_max=1, reset_timeout=60, success_threshold=2)
    breaker.fail_counter = 1
    breaker.open()
    state = breaker.state
    clock.advance(20)
    with shelter(breaker):
        settle(state)
    assert breaker.state is state
    assert (breaker.fail_counter, breaker.success_counter) == (1, 0)
    assert breaker.retry_after == 40


@pytest.mark.parametrize("settle", SETTLING)
@pytest.mark.parametrize("held", ["close", "half_open"])
@pytest.mark.parametrize("present", ["close", "half_open"])
def test_the_state_of_an_earlier_era_moves_nothing(shelter, settle, held, present):
    """Code that drives by hand may settle late, as a call may end late."""
    breaker = CircuitBreaker(fail_max=3)
    getattr(breaker, held)()
    state = breaker.state
    getattr(breaker, present)()
    breaker.fail_counter = 3
    now = breaker.state
    with shelter(breaker):
        settle(state)
    assert breaker.state is now
    assert (breaker.fail_counter, breaker.success_counter) == (3, 0)


@pytest.mark.parametrize("settle", SETTLING[:2])
def test_listeners_hear_of_a_late_outcome_handed_over(shelter, settle, recorder):
    breaker = CircuitBreaker()
    state = breaker.state
    breaker.close()
    breaker.add_listener(recorder)
    with shelter(breaker):
        settle(state)
    assert recorder.names in (["success"], ["failure"])


def test_the_bare_parts_open_the_circuit_at_the_limit(shelter, boom):
    """_inc_counter() counts the failure, on_failure() decides on the trip."""
    breaker, error = CircuitBreaker(fail_max=2), boom()
    state = breaker.state
    with shelter(breaker):
        breaker._inc_counter()
        assert state.on_failure(error) is None
        assert (breaker.fail_counter, breaker.current_state) == (1, "closed")
        breaker._inc_counter()
        with pytest.raises(CircuitBreakerError, match="Failures threshold") as raised:
            state.on_failure(error)
    assert raised.value.__cause__ is error
    assert (breaker.fail_counter, breaker.current_state) == (2, "open")


def test_on_failure_alone_counts_nothing(shelter, boom):
    """Counting is left to _inc_counter()."""
    breaker = CircuitBreaker(fail_max=2)
    with shelter(breaker):
        breaker.state.on_failure(boom())
    assert (breaker.fail_counter, breaker.current_state) == (0, "closed")


def test_on_failure_reopens_a_half_open_circuit(shelter, boom):
    """One failure is enough, whatever the count is."""
    breaker = CircuitBreaker()
    breaker.half_open()
    with shelter(breaker), pytest.raises(CircuitBreakerError, match="Trial call"):
        breaker.state.on_failure(boom())
    assert breaker.current_state == "open"


def test_on_failure_raises_the_error_itself_where_that_is_asked(shelter, boom):
    """The breaker is made with throw_new_error_on_trip=False."""
    breaker, error = CircuitBreaker(throw_new_error_on_trip=False), boom()
    breaker.half_open()
    with shelter(breaker), pytest.raises(boom) as raised:
        breaker.state.on_failure(error)
    assert raised.value is error


def test_on_success_closes_a_half_open_circuit(shelter):
    """The circuit closes at success_threshold."""
    breaker = CircuitBreaker(success_threshold=2)
    breaker.half_open()
    with shelter(breaker):
        breaker.state.on_success()
        assert (breaker.current_state, breaker.success_counter) == ("half-open", 1)
        breaker.state.on_success()
    assert breaker.current_state == "closed"


# Driving by hand, as whole programs do it.


async def drive_by_handle(breaker, func, *args):
    """What services wrote for asyncio before there was call_async."""
    with breaker._lock:
        if isinstance(breaker.state, CircuitOpenState):
            timeout = timedelta(seconds=breaker.reset_timeout)
            opened_at = breaker._state_storage.opened_at
            if opened_at and datetime.now(timezone.utc) < opened_at + timeout:
                raise CircuitBreakerError("Timeout not elapsed yet")
            breaker.half_open()
        state = breaker.state
    try:
        result = await func(*args)
    except Exception as exc:
        with breaker._lock:
            state._handle_error(exc, reraise=False)
        raise
    with breaker._lock:
        state._handle_success()
    return result


async def drive_by_gate(breaker, func, *args):
    """A service for asyncio that drives by the gate of the state."""
    with breaker._lock:
        breaker.state.before_call(func, *args)
        state = breaker.state
    for listener in breaker.listeners:
        listener.before_call(breaker, func, *args)
    try:
        result = await func(*args)
    except BaseException as exc:
        state._handle_error(exc)
        raise
    state._handle_success()
    return result


async def drive_by_parts(breaker, func, *args):
    """A service for asyncio that drives by the gate and by the bare parts."""
    with breaker._lock:
        breaker.state.before_call(func, *args)
    try:
        result = await func(*args)
    except Exception as exc:
        with breaker._lock:
            if breaker.is_system_error(exc):
                breaker._inc_counter()
                for listener in breaker.listeners:
                    listener.failure(breaker, exc)
                breaker.state.on_failure(exc)
        raise
    with breaker._lock:
        breaker.state.on_success()
    return result


@pytest.mark.parametrize("drive", [drive_by_handle, drive_by_gate, drive_by_parts])
def test_a_service_that_drives_by_hand_survives_an_outage(drive, boom, recorder):
    """The circuit opens, rejects, half-opens, fails a trial, half-opens and
    recovers."""

    async def work(error=None):
        await asyncio.sleep(0)
        if error is not None:
            raise error
        return "fine"

    breaker = CircuitBreaker(fail_max=2, reset_timeout=60, listeners=[recorder])

    async def fails_with(expected):
        with pytest.raises(expected):
            await drive(breaker, work, boom())

    async def outage(frozen):
        assert await drive(breaker, work) == "fine"
        await fails_with(boom)
        await fails_with((boom, CircuitBreakerError))
        assert breaker.current_state == "open"
        frozen.tick(59)
        with pytest.raises(CircuitBreakerError):
            await drive(breaker, work)
        frozen.tick(1)
        await fails_with((boom, CircuitBreakerError))
        assert breaker.current_state == "open"
        frozen.tick(60)
        assert await drive(breaker, work) == "fine"
        assert breaker.current_state == "closed"
        assert breaker.fail_counter == 0

    with freeze_time("2020-02-29 12:00:00", real_asyncio=True) as frozen:
        asyncio.run(outage(frozen))
    assert recorder.transitions == [
        ("closed", "open"),
        ("open", "half-open"),
        ("half-open", "open"),
        ("open", "half-open"),
        ("half-open", "closed"),
    ]


def test_tasks_that_are_driven_by_hand_open_the_circuit_once(boom, recorder):
    """A task that settles after the opening holds the closed state, and changes
    nothing."""
    breaker = CircuitBreaker(fail_max=3, listeners=[recorder])

    async def main():
        everybody_waits = asyncio.Event()

        async def work():
            await everybody_waits.wait()
            raise boom

        tasks = [
            asyncio.ensure_future(drive_by_handle(breaker, work)) for _ in range(10)
        ]
        await asyncio.sleep(0)
        everybody_waits.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    errors = asyncio.run(main())
    assert len(errors) == 10
    assert sum(isinstance(error, CircuitBreakerError) for error in errors) == 1
    assert recorder.transitions == [("closed", "open")]
    assert breaker.fail_counter == 3


# On a breaker.


def test_the_private_names_say_what_the_public_ones_say(recorder):
    """A debugger, or a test, looks at either."""
    storage = CircuitMemoryStorage("closed")
    breaker = CircuitBreaker(
        fail_max=4,
        reset_timeout=30,
        exclude=[ValueError],
        listeners=[recorder],
        state_storage=storage,
        name="db",
        success_threshold=2,
    )
    assert breaker._fail_max == breaker.fail_max == 4
    assert breaker._reset_timeout == breaker.reset_timeout == 30
    assert breaker._success_threshold == breaker.success_threshold == 2
    assert breaker._name == breaker.name == "db"
    assert breaker._state is breaker.state
    assert breaker._state_storage is storage
    assert list(breaker._listeners) == list(breaker.listeners) == [recorder]
    assert list(breaker._excluded_exceptions) == [ValueError]


def test_a_test_that_writes_the_timeout_ends_it(fail):
    """breaker._reset_timeout = 0 is a way not to wait."""
    breaker = CircuitBreaker(fail_max=1)
    with pytest.raises(CircuitBreakerError):
        breaker.call(fail)
    breaker._reset_timeout = 0
    assert breaker.call(int) == 0


@pytest.mark.parametrize(
    ("private", "public", "value"),
    [
        ("_fail_max", "fail_max", 9),
        ("_reset_timeout", "reset_timeout", 9),
        ("_success_threshold", "success_threshold", 9),
        ("_name", "name", "nine"),
        ("_excluded_exceptions", "excluded_exceptions", (KeyError,)),
        ("_listeners", "listeners", (CircuitBreakerListener(),)),
        ("_state_storage", "current_state", "open"),
    ],
)
@pytest.mark.parametrize("patch", ["mock", "monkeypatch"])
def test_a_private_name_can_be_patched_for_a_while(
    private, public, value, patch, monkeypatch
):
    """unittest.mock and pytest patch the name, and undo the patch afterwards."""
    breaker = CircuitBreaker()
    before, written = getattr(breaker, public), value
    if private == "_state_storage":
        written = CircuitMemoryStorage(value)
    if patch == "mock":
        with mock.patch.object(breaker, private, written):
            assert getattr(breaker, public) == value
    else:
        with monkeypatch.context() as patched:
            patched.setattr(breaker, private, written)
            assert getattr(breaker, public) == value
    assert getattr(breaker, public) == before


def test_a_suite_may_replace_a_breaker_by_a_mock_of_it():
    """The mock is made like the class, or like a breaker, with all of their
    attributes."""
    for like in (CircuitBreaker, CircuitBreaker()):
        breaker = mock.create_autospec(like, instance=True, current_state="open")
        breaker.call(int, "5")
        breaker.call.assert_called_once_with(int, "5")
        assert breaker.current_state == "open"
        for name in ("_listeners", "_excluded_exceptions", "_state", "_state_storage"):
            assert hasattr(like, name)
        with pytest.raises(TypeError):
            breaker.add_listener()


def test_a_listener_slipped_into_the_list_is_told(recorder):
    """Code appends to breaker._listeners, and removes from that list."""
    breaker = CircuitBreaker()
    breaker.call(int)
    breaker._listeners.append(recorder)
    breaker.call(int)
    assert recorder.names == ["before_call", "success"]
    assert breaker.listeners == (recorder,)
    breaker._listeners.remove(recorder)
    breaker.call(int)
    assert recorder.names == ["before_call", "success"]


def test_a_list_once_taken_stays_the_breakers_list(recorder):
    """add_listener() and remove_listener() do not detach that list from the breaker."""
    breaker = CircuitBreaker()
    other = CircuitBreakerListener()
    assert breaker._listeners is breaker._listeners
    assert list(breaker._listeners) == []
    breaker.add_listener(other)
    breaker.remove_listener(other)
    breaker._listeners.append(recorder)
    breaker.call(int)
    assert recorder.names == ["before_call", "success"]


def test_the_listeners_can_be_replaced(recorder):
    """breaker._listeners = [...] is effective at once."""
    breaker = CircuitBreaker()
    breaker._listeners = [recorder]
    breaker.call(int)
    breaker._listeners = []
    breaker.call(int)
    assert recorder.names == ["before_call", "success"]


def test_an_exclusion_slipped_into_the_list_counts(boom, fail):
    """Code appends an exception class to breaker._excluded_exceptions."""
    breaker = CircuitBreaker()
    breaker._excluded_exceptions.append(boom)
    with pytest.raises(boom):
        breaker.call(fail)
    assert breaker.fail_counter == 0


def test_a_listener_may_keep_a_success_counter_on_the_breaker():
    """A breaker has no _success_counter, so the listener finds only its own."""

    class CountingListener(CircuitBreakerListener):
        def success(self, cb):
            if not hasattr(cb, "_success_counter"):
                cb._success_counter = 0
            cb._success_counter += 1

    breaker = CircuitBreaker(listeners=[CountingListener()])
    assert not hasattr(breaker, "_success_counter")
    breaker.call(int)
    breaker.call(int)
    assert breaker._success_counter == 2
    assert breaker.success_counter == 0


def test_the_lock_is_reentrant_and_shuts_others_out():
    """Code takes the lock around several steps, and makes guarded calls within."""
    breaker = CircuitBreaker()
    with breaker._lock, breaker._lock:
        assert breaker.call(int) == 0
        breaker.open()
        assert is_locked(breaker)
    assert not is_locked(breaker)


def test_guarded_calls_run_without_the_lock():
    """The lock is free while the function runs, in every state and during a trial."""
    breaker = CircuitBreaker()
    assert not breaker.call(is_locked, breaker)
    breaker.half_open()
    assert not breaker.call(is_locked, breaker)


def test_every_failure_is_counted_through_inc_counter_under_the_lock(clock, fail, boom):
    """A function that code puts in the place of breaker._inc_counter counts the
    failures."""
    breaker = CircuitBreaker(fail_max=2, reset_timeout=60)
    seen = []

    def inc_counter():
        seen.append((breaker.current_state, is_locked(breaker)))
        breaker._state_storage.increment_counter()

    breaker._inc_counter = inc_counter
    with pytest.raises(boom):
        breaker.call(fail)
    with pytest.raises(CircuitBreakerError):
        breaker.call(fail)
    clock.advance(60)
    with pytest.raises(CircuitBreakerError):
        breaker.call(fail)
    assert seen == [("closed", True), ("closed", True), ("half-open", True)]
    assert breaker.fail_counter == 3


def test_a_counter_that_does_not_count_opens_nothing(fail, boom):
    """mock.patch.object(breaker, "_inc_counter") takes the counting away."""
    breaker = CircuitBreaker(fail_max=2)
    with mock.patch.object(breaker, "_inc_counter") as inc_counter:
        for _ in range(3):
            with pytest.raises(boom):
                breaker.call(fail)
    assert inc_counter.call_count == 3
    assert (breaker.fail_counter, breaker.current_state) == (0, "closed")


def test_a_counter_that_is_patched_on_the_class_counts_for_breakers_made_before(
    fail, boom
):
    breaker = CircuitBreaker(fail_max=2)
    with mock.patch.object(CircuitBreaker, "_inc_counter", autospec=True) as counter:
        with pytest.raises(boom):
            breaker.call(fail)
    counter.assert_called_once_with(breaker)
    assert breaker.fail_counter == 0


def test_a_subclass_that_counts_each_failure_twice_opens_the_circuit_in_half_the_calls(
    fail, boom
):
    """The breaker compares the count with fail_max after its _inc_counter() has
    returned."""

    class Twice(CircuitBreaker):
        def _inc_counter(self):
            CircuitBreaker._inc_counter(self)
            super()._inc_counter()

    breaker = Twice(fail_max=4)
    with pytest.raises(boom):
        breaker.call(fail)
    assert breaker.fail_counter == 2
    with pytest.raises(CircuitBreakerError):
        breaker.call(fail)
    assert breaker.current_state == "open"


@pytest.mark.parametrize(
    ("hook", "func"),
    [("before_call", int), ("on_success", int), ("on_failure", None)],
)
def test_a_method_that_is_set_on_a_state_object_is_asked(hook, func, fail, boom):
    breaker = CircuitBreaker(fail_max=5)
    state = pybreaker.CircuitClosedState(breaker)
    asked = mock.Mock()
    setattr(state, hook, asked)
    breaker._state = state
    with contextlib.suppress(boom):
        breaker.call(func or fail)
    assert asked.call_count == 1


def start_threads(target, n):
    """Runs the target in so many threads, all at once, to their end."""
    barrier = threading.Barrier(n, timeout=PATIENCE)

    def run():
        barrier.wait()
        target()

    with ThreadPoolExecutor(n) as pool:
        for future in [pool.submit(run) for _ in range(n)]:
            future.result(PATIENCE)


def test_failures_are_not_lost_to_a_slow_counter(fail, boom):
    """Other threads run between the counter's reading and its writing."""
    breaker = CircuitBreaker(fail_max=3000)

    def _inc_counter(self):
        count = self._state_storage._fail_counter
        time.sleep(0)
        self._state_storage._fail_counter = count + 1

    breaker._inc_counter = types.MethodType(_inc_counter, breaker)

    @breaker
    def err():
        fail()

    def target():
        for _ in range(100):
            with pytest.raises(boom):
                err()

    start_threads(target, 8)
    assert breaker.fail_counter == 800


def test_a_slow_counter_does_not_pass_the_limit(fail, boom):
    """Many calls fail at once, and exactly fail_max failures are counted."""
    trips = []

    class Listener(CircuitBreakerListener):
        def before_call(self, cb, func, *args, **kwargs):
            time.sleep(0)

        def state_change(self, cb, old_state, new_state):
            trips.append(new_state.name)

    breaker = CircuitBreaker(fail_max=10, reset_timeout=60, listeners=[Listener()])

    def _inc_counter(self):
        count = self._state_storage._fail_counter
        time.sleep(0)
        self._state_storage._fail_counter = count + 1

    breaker._inc_counter = types.MethodType(_inc_counter, breaker)

    def target():
        while breaker.current_state == "closed":
            with pytest.raises((boom, CircuitBreakerError)):
                breaker.call(fail)

    start_threads(target, 8)
    assert breaker.fail_counter == 10
    assert trips == ["open"]


def test_a_storage_whose_counter_is_slow_does_not_lose_a_success(fail, boom):
    """The success sets the count of many threads' failures back to 0."""
    breaker = CircuitBreaker(fail_max=3000)
    started = threading.Event()

    def _inc_counter(self):
        count = self._state_storage._fail_counter
        started.set()
        time.sleep(0)
        self._state_storage._fail_counter = count + 1

    breaker._inc_counter = types.MethodType(_inc_counter, breaker)

    def failing():
        with pytest.raises(boom):
            breaker.call(fail)

    start_threads(failing, 8)
    assert started.wait(PATIENCE)
    breaker.call(int)
    assert breaker.fail_counter == 0


@pytest.mark.parametrize("throws", [True, False])
def test_open_returns_throw_new_error_on_trip(throws):
    """An open() that overrides this one returns the same value."""
    breaker = CircuitBreaker(throw_new_error_on_trip=throws)
    assert breaker.open() is throws


def test_trips_and_recoveries_go_through_the_breakers_own_methods(clock, fail):
    """mock.patch.object with wraps sees each method called once."""
    breaker = CircuitBreaker(fail_max=1, reset_timeout=60)
    with mock.patch.object(breaker, "open", wraps=breaker.open) as opened:
        with pytest.raises(CircuitBreakerError):
            breaker.call(fail)
        opened.assert_called_once_with()
    clock.advance(60)
    with mock.patch.object(breaker, "half_open", wraps=breaker.half_open) as half:
        with mock.patch.object(breaker, "open", wraps=breaker.open) as opened:
            with pytest.raises(CircuitBreakerError):
                breaker.call(fail)
        half.assert_called_once_with()
        opened.assert_called_once_with()
    clock.advance(60)
    with mock.patch.object(breaker, "close", wraps=breaker.close) as closed:
        breaker.call(int)
        closed.assert_called_once_with()
    assert breaker.current_state == "closed"


def test_a_breaker_whose_open_is_a_mock_raises_but_stays_closed(fail):
    """The mock returns something true, so the failure raises; the mock opens
    nothing."""
    breaker = CircuitBreaker(fail_max=1)
    with mock.patch.object(breaker, "open") as opened:
        with pytest.raises(CircuitBreakerError):
            breaker.call(fail)
    opened.assert_called_once_with()
    assert breaker.current_state == "closed"


def test_a_call_is_rejected_where_half_open_does_nothing(clock):
    """A half_open() that moves nothing leaves the circuit open, and the place free."""
    breaker, work = CircuitBreaker(reset_timeout=60), mock.Mock(return_value=1)
    breaker.open()
    clock.advance(60)
    with mock.patch.object(breaker, "half_open"):
        with pytest.raises(CircuitBreakerError) as rejected:
            breaker.call(work)
    assert rejected.value.retry_after == 0.0
    work.assert_not_called()
    assert breaker.current_state == "open"
    assert breaker.call(work) == 1


def test_looking_at_a_breaker_makes_no_state(monkeypatch):
    """A project's own state class is instantiated for eras only."""
    made = []

    class Noted(CircuitOpenState):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(pybreaker, "CircuitOpenState", Noted)
    breaker = CircuitBreaker(reset_timeout=math.inf)
    breaker.open()
    breaker._state_storage.state = "".join(["op", "en"])  # equal, not the same string
    assert breaker.retry_after == math.inf
    assert "open" in repr(breaker)
    assert breaker.snapshot()["state"] == "open"
    assert made == [breaker.state]


def test_where_half_open_does_nothing_the_error_has_the_usual_words(clock):
    """Code in the field recognizes the rejection by its words."""
    breaker = CircuitBreaker(reset_timeout=60)
    breaker.open()
    clock.advance(60)
    with mock.patch.object(breaker, "half_open"):
        with pytest.raises(CircuitBreakerError, match="^unnamed breaker: Timeout not"):
            breaker.call(int)


@pytest.mark.parametrize(("name", "class_name"), STATES)
def test_create_new_state_makes_a_state_and_moves_nothing(name, class_name, recorder):
    """Suites call _create_new_state() with the constants."""
    breaker = CircuitBreaker(listeners=[recorder])
    present = breaker.state
    state = breaker._create_new_state(name)
    assert isinstance(state, getattr(pybreaker, class_name))
    assert state._breaker is breaker
    assert breaker.state is present
    assert recorder.events == []


@pytest.mark.parametrize("name", ["OPEN", "unknown", "", None])
def test_create_new_state_refuses_an_unknown_name(name):
    """The error says which names there are."""
    with pytest.raises(ValueError, match="'closed', 'open' or 'half-open'"):
        CircuitBreaker()._create_new_state(name)


# Subclasses.


class RefusingBreaker(CircuitBreaker):
    """Refuses before it calls super(), while a switch is off."""

    def __init__(self, *args, **kwargs):
        self.enabled = True
        self.calls = []
        super().__init__(*args, **kwargs)

    def call(self, func, *args, **kwargs):
        self.calls.append((func, args, kwargs))
        if not self.enabled:
            raise CircuitBreakerError("switched off")
        return super().call(func, *args, **kwargs)


def test_a_subclass_that_overrides_call_sees_every_call():
    """The subclass's call() gets the function and its arguments, and returns the
    result."""
    breaker = RefusingBreaker()
    assert breaker.call(divmod, 7, 2) == (3, 1)
    assert breaker.calls == [(divmod, (7, 2), {})]


def test_a_subclass_that_refuses_keeps_decorated_functions_from_running():
    """Once the subclass lets calls pass, the breaker guards them as ever."""
    breaker, ran = RefusingBreaker(fail_max=2), []

    @breaker
    def work(error=None):
        ran.append(error)
        if error:
            raise error

    breaker.enabled = False
    with pytest.raises(CircuitBreakerError, match="switched off"):
        work()
    assert ran == []
    breaker.enabled = True
    work()
    with pytest.raises(OSError):
        work(OSError())
    assert breaker.fail_counter == 1
    with pytest.raises(CircuitBreakerError, match="Failures threshold"):
        work(error=OSError())
    assert [call[1:] for call in breaker.calls[-1:]] == [
        ((), {"error": mock.ANY}),
    ]
    assert len(ran) == 3


def test_a_subclass_that_refuses_keeps_coroutines_from_running():
    """A decorated function stays a coroutine function, and is refused when awaited."""
    breaker, ran = RefusingBreaker(fail_max=1), []

    @breaker
    async def work(error=None):
        ran.append(error)
        if error:
            raise error
        return "done"

    assert inspect.iscoroutinefunction(work)
    assert asyncio.run(work()) == "done"
    breaker.enabled = False
    coroutine = work()
    with pytest.raises(CircuitBreakerError, match="switched off"):
        asyncio.run(coroutine)
    assert ran == [None]
    breaker.enabled = True
    with pytest.raises(CircuitBreakerError, match="Failures threshold"):
        asyncio.run(work(OSError()))
    assert breaker.current_state == "open"
    assert len(breaker.calls) == 3


def test_a_subclass_that_refuses_keeps_generators_from_running():
    """A decorated function stays a generator function, and its first next() is
    refused."""
    breaker = RefusingBreaker(fail_max=1)

    @breaker
    def numbers(error=None):
        yield 1
        if error:
            raise error

    assert inspect.isgeneratorfunction(numbers)
    assert list(numbers()) == [1]
    breaker.enabled = False
    generator = numbers()
    with pytest.raises(CircuitBreakerError, match="switched off"):
        next(generator)
    breaker.enabled = True
    with pytest.raises(CircuitBreakerError, match="Failures threshold"):
        list(numbers(OSError()))


def test_a_subclass_may_hold_the_lock_around_the_call(fail, boom):
    """Like older releases, some subclasses hold the lock in call()."""

    class Queueing(CircuitBreaker):
        def call(self, func, *args, **kwargs):
            with self._lock:
                return self.state.call(func, *args, **kwargs)

    breaker = Queueing(fail_max=2)
    assert breaker(is_locked)(breaker)
    with pytest.raises(boom):
        breaker.call(fail)
    with pytest.raises(CircuitBreakerError):
        breaker(fail)()
    assert breaker.current_state == "open"


def test_a_subclass_that_overrides_decoration_is_what_decorates(fail):
    """A subclass's __call__ may wrap on its own, by super() and by call()."""

    class Falling(CircuitBreaker):
        def __call__(self, func, fallback=None):
            guarded = super().__call__(func)

            def with_fallback(*args, **kwargs):
                try:
                    return guarded(*args, **kwargs)
                except CircuitBreakerError:
                    return fallback

            return with_fallback

    breaker = Falling(fail_max=1)
    work = breaker(fail, fallback="stale")
    assert work() == "stale"
    assert work() == "stale"
    assert (breaker.fail_counter, breaker.current_state) == (1, "open")


def test_a_subclass_that_overrides_is_system_error_decides():
    """is_system_error() is asked for calls that are decorated, direct or driven by
    hand."""

    class HttpError(Exception):
        def __init__(self, status):
            self.status = status

    class HttpBreaker(CircuitBreaker):
        def is_system_error(self, exception):
            if isinstance(exception, HttpError) and exception.status < 500:
                return False
            return super().is_system_error(exception)

    breaker = HttpBreaker(exclude=[KeyError])

    @breaker
    def fetch(error):
        raise error

    for error, count in [
        (HttpError(503), 1),
        (HttpError(404), 0),
        (OSError(), 1),
        (KeyError(), 0),
    ]:
        with pytest.raises(type(error)):
            fetch(error)
        assert breaker.fail_counter == count
    breaker.state._handle_error(HttpError(503), reraise=False)
    assert breaker.fail_counter == 1
    breaker.state._handle_error(HttpError(404), reraise=False)
    assert breaker.fail_counter == 0


def test_a_subclass_that_overrides_the_transitions_is_asked_for_each(clock, fail):
    """The subclass calls super(), and returns what open() returns."""
    moves = []

    class Watched(CircuitBreaker):
        def open(self):
            moves.append("open")
            return super().open()

        def half_open(self):
            moves.append("half-open")
            super().half_open()

        def close(self):
            moves.append("close")
            super().close()

        def _inc_counter(self):
            moves.append("count")
            super()._inc_counter()

    breaker = Watched(fail_max=1, reset_timeout=60)
    with pytest.raises(CircuitBreakerError):
        breaker.call(fail)
    clock.advance(60)
    with pytest.raises(CircuitBreakerError):
        breaker.call(fail)
    clock.advance(60)
    breaker.call(int)
    assert moves == ["count", "open", "half-open", "count", "open"] + [
        "half-open",
        "close",
    ]
    for name in ("open", "half-open", "closed"):
        breaker.state = name
        assert breaker.current_state == name
    assert moves[-3:] == ["open", "half-open", "close"]


def test_a_subclass_whose_open_returns_false_raises_the_original_error(fail, boom):
    """A failure raises the new error only if open() returns something true."""

    class Quiet(CircuitBreaker):
        def open(self):
            super().open()
            return False

    breaker = Quiet(fail_max=1)
    with pytest.raises(boom):
        breaker.call(fail)
    assert breaker.current_state == "open"


def test_a_subclass_may_ask_for_more_trials_instead_of_closing():
    """The subclass's close() half-opens the circuit, and trials are counted from 0."""

    class Careful(CircuitBreaker):
        is_sure = False

        def close(self):
            if self.is_sure:
                super().close()
            else:
                self.is_sure = True
                self.half_open()

    breaker = Careful(success_threshold=2)
    breaker.half_open()
    seen = []
    for _ in range(4):
        breaker.call(int)
        seen.append((breaker.current_state, breaker.success_counter))
    assert seen == [("half-open", 1), ("half-open", 0), ("half-open", 1), ("closed", 0)]


def test_a_subclass_sets_attributes_of_its_own():
    """The subclass sets attributes before super().__init__() and after it."""

    class Tagged(CircuitBreaker):
        def __init__(self, tags, **kwargs):
            self.tags = tags
            super().__init__(**kwargs)
            self.metrics = {}
            self._created_at = "today"

    breaker = Tagged(["db"], name="db", fail_max=3)
    breaker.extra = 1
    assert (breaker.tags, breaker.metrics, breaker.extra) == (["db"], {}, 1)
    assert breaker.call(int) == 0


# Client code, as it is.


def test_a_listener_that_logs_formats_names_and_states(caplog, fail):
    """cb.name, new_state.name and the states themselves go into messages."""
    log = logging.getLogger("client")

    class LogListener(CircuitBreakerListener):
        def failure(self, cb, exc):
            log.warning("%s: %s failures, %r", cb.name, cb.fail_counter, exc)

        def state_change(self, cb, old_state, new_state):
            old_name = old_state.name if old_state else None
            message = "State Change: CB: {0}, {1} -> {2}, New State: {3}".format  # noqa: UP032
            log.warning(message(cb.name, old_name, new_state.name, new_state))

    breaker = CircuitBreaker(fail_max=1, listeners=[LogListener()], name="payments")
    with caplog.at_level("WARNING", "client"), pytest.raises(CircuitBreakerError):
        breaker.call(fail)
    messages = [r.getMessage() for r in caplog.records if r.name == "client"]
    assert messages == [
        "payments: 1 failures, Boom()",
        "State Change: CB: payments, closed -> open, New State: open",
    ]


def test_a_listener_counts_by_the_current_state(fail, boom):
    """cb.current_state in a listener is the state after the change."""
    gauge = {}

    class MetricsListener(CircuitBreakerListener):
        def state_change(self, cb, old_state, new_state):
            gauge[cb.name] = {
                pybreaker.STATE_CLOSED: 0,
                pybreaker.STATE_HALF_OPEN: 1,
                pybreaker.STATE_OPEN: 2,
            }[cb.current_state]

    breaker = CircuitBreaker(fail_max=1, listeners=(MetricsListener(),), name="db")
    with pytest.raises(CircuitBreakerError):
        breaker.call(fail)
    assert gauge == {"db": 2}
    breaker.close()
    assert gauge == {"db": 0}


class Repository:
    """A class with one breaker for all of its objects, as in a Django app."""

    breaker = CircuitBreaker(fail_max=2, reset_timeout=60)

    def __init__(self, backend):
        self.backend = backend

    @breaker
    def find(self, key, default=None):
        return self.backend(key) or default

    def find_or(self, key, fallback):
        try:
            return self.find(key)
        except CircuitBreakerError:
            return fallback


@pytest.fixture
def repository_breaker():
    """What suites write to keep the tests of a module-level breaker apart."""
    Repository.breaker.close()
    yield Repository.breaker
    Repository.breaker.close()


@pytest.mark.parametrize("run", [1, 2])
def test_a_breaker_on_a_class_is_reset_by_a_fixture(run, repository_breaker, fail):
    """Each test begins with a closed circuit and nothing counted."""
    assert repository_breaker.current_state == pybreaker.STATE_CLOSED
    assert repository_breaker.fail_counter == 0
    repository = Repository(fail)
    for _ in range(2):
        with pytest.raises(Exception):  # noqa: B017
            repository.find("key")
    assert repository.find_or("key", "fallback") == "fallback"
    assert repository_breaker.current_state == "open"


def test_an_endpoint_answers_503_while_the_circuit_is_open(clock):
    """Web code asks the state first, or catches the error."""
    breaker = CircuitBreaker(reset_timeout=60, name="search")

    def view():
        try:
            return 200, breaker.call(str, "results")
        except CircuitBreakerError as error:
            return 503, f"{error.retry_after:.0f}"

    def health():
        return {breaker.name: breaker.current_state, "errors": breaker.fail_counter}

    assert view() == (200, "results")
    breaker.open()
    clock.advance(15)
    assert view() == (503, "45")
    assert health() == {"search": "open", "errors": 0}


def test_a_worker_retries_on_the_error_by_its_class(clock):
    """A task queue pickles the error, and retries when `retry_after` has passed."""
    breaker, attempts = CircuitBreaker(reset_timeout=60, name="mail"), []
    breaker.open()

    def task():
        attempts.append(breaker.state.name)
        return breaker.call(str, "sent")

    autoretry_for = (CircuitBreakerError,)
    for _ in range(3):
        try:
            result = task()
        except autoretry_for as error:
            error = pickle.loads(pickle.dumps(error))
            assert "mail" in str(error)
            clock.advance(error.retry_after)
        else:
            break
    assert result == "sent"
    assert attempts == ["open", "open"]


def test_a_guarded_client_can_be_mocked_to_be_broken():
    """Suites raise the error themselves, with any arguments or none."""
    client = mock.Mock()
    for error in (CircuitBreakerError, CircuitBreakerError("open"), "any", 1):
        client.get.side_effect = (
            error if not isinstance(error, (str, int)) else CircuitBreakerError(error)
        )
        with pytest.raises(CircuitBreakerError):
            client.get()


def test_code_tells_rejections_from_trips_by_their_words(clock, fail):
    """The phrases of older releases are in the messages."""
    breaker = CircuitBreaker(fail_max=1, reset_timeout=60)
    with pytest.raises(CircuitBreakerError) as tripped:
        breaker.call(fail)
    with pytest.raises(CircuitBreakerError) as rejected:
        breaker.call(fail)
    clock.advance(60)
    with pytest.raises(CircuitBreakerError) as reopened:
        breaker.call(fail)
    assert "Failures threshold reached, circuit breaker opened" in str(tripped.value)
    assert "Timeout not elapsed yet, circuit breaker still open" in str(rejected.value)
    assert "Trial call failed, circuit breaker opened" in str(reopened.value)


def test_breakers_for_hosts_live_in_a_dict_that_threads_share():
    """The dict has a breaker for each host, and a pool of threads calls through
    them."""
    breakers = {host: CircuitBreaker(fail_max=2, name=host) for host in "abc"}

    def fetch(host):
        def get():
            if host == "b":
                raise OSError(host)
            return host

        try:
            return breakers[host].call(get)
        except (OSError, CircuitBreakerError):
            return None

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(fetch, "abc" * 20)) == ["a", None, "c"] * 20
    assert {host: b.current_state for host, b in breakers.items()} == {
        "a": "closed",
        "b": "open",
        "c": "closed",
    }


def test_a_suite_moves_the_clock_with_freezegun(fail):
    """tick() and move_to() let the timeout pass, and not before its end."""
    with freeze_time("2020-01-01 00:00:00") as frozen:
        breaker = CircuitBreaker(fail_max=1, reset_timeout=60)
        with pytest.raises(CircuitBreakerError):
            breaker.call(fail)
        frozen.tick(timedelta(seconds=59))
        with pytest.raises(CircuitBreakerError):
            breaker.call(int)
        assert breaker.retry_after == 1
        frozen.move_to("2020-01-01 00:01:00")
        assert breaker.retry_after == 0
        assert breaker.current_state == "open"
        assert breaker.call(int) == 0
        assert breaker.current_state == "closed"


def test_a_suite_freezes_the_time_after_the_timeout(fail):
    """freeze_time(later) around the call, with the opening outside of it."""
    breaker = CircuitBreaker(fail_max=1, reset_timeout=60)
    with pytest.raises(CircuitBreakerError):
        breaker.call(fail)
    with freeze_time(datetime.now(timezone.utc) + timedelta(seconds=61)):
        assert breaker.call(int) == 0
    assert breaker.current_state == "closed"


@freeze_time("2020-01-01", auto_tick_seconds=30)
def test_a_frozen_time_that_ticks_by_itself_ends_the_timeout(fail):
    """auto_tick_seconds moves the clock at every look."""
    breaker = CircuitBreaker(fail_max=1, reset_timeout=600)
    with pytest.raises(CircuitBreakerError):
        breaker.call(fail)
    rejected = 0
    while breaker.current_state == "open" and rejected < 100:
        try:
            breaker.call(int)
        except CircuitBreakerError:
            rejected += 1
    assert breaker.current_state == "closed"
    assert 1 <= rejected < 100


def test_the_error_of_a_trip_into_a_mocked_state_can_be_read(fail):
    """The mock knows no time to wait, so the error takes that time from the storage."""
    breaker = CircuitBreaker(fail_max=1, reset_timeout=60, name="db")
    with mock.patch("pybreaker.CircuitOpenState"):
        with pytest.raises(CircuitBreakerError, match="threshold reached") as info:
            breaker.call(fail)
    assert "next trial in" in str(info.value)


def test_a_state_class_of_a_project_hears_how_guarded_calls_end(
    monkeypatch, fail, boom
):
    """The on_success and on_failure of the project's class decide."""
    heard = []

    class WatchedState(pybreaker.CircuitClosedState):
        def on_success(self):
            heard.append("success")
            super().on_success()

        def on_failure(self, exc):
            heard.append(exc)
            super().on_failure(exc)

    monkeypatch.setattr(pybreaker, "CircuitClosedState", WatchedState)
    breaker = CircuitBreaker(fail_max=2)
    with pytest.raises(boom) as failed:
        breaker.call(fail)
    breaker.call(int)
    assert heard == [failed.value, "success"]
    assert breaker.fail_counter == 0
    breaker(int)()  # no failure to forget, and on_success is asked all the same
    assert heard[2:] == ["success"]
    breaker.fail_max = 1
    with pytest.raises(CircuitBreakerError):
        breaker(fail)()
    assert len(heard) == 4


def test_an_open_method_that_returns_nothing_lets_the_trip_raise_its_error(fail):
    """Subclasses that are older than throw_new_error_on_trip have such a method."""

    class Old(CircuitBreaker):
        def open(self):
            super().open()

    with pytest.raises(CircuitBreakerError):
        Old(fail_max=1).call(fail)


def test_a_listener_does_more_than_watch_unless_its_class_says_otherwise():
    assert CircuitBreakerListener.only_watches is False


@pytest.mark.parametrize("method", ["before_call", "on_success", "on_failure"])
def test_a_method_of_a_state_has_its_name_and_its_docstring(method):
    """`help` shows them."""
    function = getattr(CircuitBreakerState, method)
    assert function.__name__ == method
    assert function.__doc__
    assert "self" in inspect.signature(function).parameters


def test_the_shared_storage_is_loaded_when_it_is_first_asked_for():
    from pybreaker_extras import redis

    assert pybreaker.CircuitRedisStorage is redis.CircuitRedisStorage


def test_a_copy_of_the_module_alone_says_what_the_shared_storage_lacks(monkeypatch):
    """No other missing module is taken for the missing file."""
    monkeypatch.setitem(sys.modules, "pybreaker_extras.redis", None)
    with pytest.raises(ImportError, match="pybreaker_extras/redis.py") as caught:
        pybreaker.CircuitRedisStorage  # noqa: B018
    assert type(caught.value) is ImportError
    monkeypatch.delitem(sys.modules, "pybreaker_extras.redis")
    monkeypatch.setitem(sys.modules, "queue", None)
    with pytest.raises(ModuleNotFoundError, match="queue"):
        pybreaker.CircuitRedisStorage  # noqa: B018


@pytest.mark.parametrize("name", ["A", "CircuitRedis", "Z", "_a", "z"])
def test_the_module_has_no_attribute_of_any_other_name(name):
    with pytest.raises(AttributeError, match=f"'pybreaker' has no attribute '{name}'"):
        getattr(pybreaker, name)
