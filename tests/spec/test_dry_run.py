"""Dry run: the whole machine works, and nothing is refused."""

from __future__ import annotations

import contextvars
import json

import guards
import pytest
from support import Boom, boom, fail, while_locked

import pybreaker
from pybreaker import CircuitBreaker, CircuitBreakerError, CircuitMemoryStorage


class Events:
    """The names of the events that are told."""

    def __init__(self):
        self.names = []

    def before_call(self, cb, func, *args, **kwargs):
        self.names.append("before_call")

    def rejected(self, cb, func, *args, **kwargs):
        self.names.append("rejected")

    def success(self, cb):
        self.names.append("success")

    def failure(self, cb, exc):
        self.names.append("failure")

    def state_change(self, cb, old_state, new_state):
        self.names.append(new_state.name)


@pytest.fixture
def events():
    return Events()


def elsewhere(breaker, func=int):
    """A call outside the context of a trial that may be running."""
    return contextvars.Context().run(breaker.call, func)


@guards.every_way
def test_a_call_that_would_be_rejected_runs_and_decides_nothing(way, events):
    """The call is told as rejected, and then like any other."""
    breaker = CircuitBreaker(dry_run=True, listeners=[events])
    breaker.open()
    state = breaker.state
    events.names.clear()
    assert way(breaker, lambda: "result") == "result"
    assert events.names == ["rejected", "before_call", "success"]
    events.names.clear()
    with pytest.raises(Boom):
        way(breaker, boom)
    assert events.names == ["rejected", "before_call", "failure"]
    assert breaker.state is state
    assert (breaker.fail_counter, breaker.success_counter) == (0, 0)


@guards.every_way
def test_the_failure_that_opens_the_circuit_raises_what_the_function_raised(
    way, events
):
    """The circuit opens all the same."""
    breaker = CircuitBreaker(fail_max=2, dry_run=True, listeners=[events])
    exc = Boom()

    def raise_it():
        raise exc

    for _ in range(2):
        with pytest.raises(Boom) as caught:
            way(breaker, raise_it)
        assert caught.value is exc
    assert events.names == ["before_call", "failure"] * 2 + ["open"]
    assert breaker.state.reason == "2 failures in a row; the last: Boom()"


@guards.every_way
def test_a_trial_runs_as_a_trial(way, events):
    """The trial takes the place, and closes the circuit or opens it again."""
    breaker = CircuitBreaker(dry_run=True, listeners=[events])
    for work, state in ((int, "closed"), (boom, "open")):
        breaker.open(0)
        events.names.clear()

        def trial(work=work):
            assert breaker.current_state == "half-open"
            assert 0 < breaker.retry_after <= 60
            assert elsewhere(breaker) == 0
            return work()

        if work is boom:
            with pytest.raises(Boom):
                way(breaker, trial)
        else:
            way(breaker, trial)
        rejected = ["rejected", "before_call", "success"]
        assert events.names[:5] == ["half-open", "before_call", *rejected]
        assert breaker.current_state == state


def test_retry_after_and_current_state_say_what_would_hold(clock):
    """Both are what they would be without dry run."""
    breaker = CircuitBreaker(fail_max=1, reset_timeout=60, dry_run=True)
    fail(breaker)
    assert (breaker.current_state, breaker.retry_after) == ("open", 60)
    clock.advance(59)
    breaker.call(int)
    assert (breaker.current_state, breaker.retry_after) == ("open", 1)
    clock.advance(1)
    breaker.call(int)
    assert (breaker.current_state, breaker.retry_after) == ("closed", 0)


def test_opening_says_that_nothing_is_to_be_raised():
    """open() returns False, whatever `throw_new_error_on_trip` is."""
    breaker = CircuitBreaker(dry_run=True)
    assert breaker.open() is False
    breaker.dry_run = False
    assert breaker.open() is True
    breaker.throw_new_error_on_trip = False
    assert breaker.open() is False


def test_an_override_of_open_that_returns_nothing_raises_nothing():
    """Subclasses were written so for older releases."""

    class Opens(CircuitBreaker):
        def open(self):
            super().open()

    breaker = Opens(fail_max=1, dry_run=True)
    assert type(fail(breaker)) is Boom
    assert breaker.current_state == "open"


def test_the_gate_of_a_state_raises_nothing(clock):
    """The gate lets calls pass, in an open circuit and during a trial, and half-opens
    the circuit as ever."""
    breaker = CircuitBreaker(dry_run=True)
    breaker.open()
    breaker.state.before_call(int)
    assert breaker.current_state == "open"
    clock.advance(60)
    breaker.state.before_call(int)
    assert breaker.current_state == "half-open"

    def trial():
        contextvars.Context().run(breaker.state.before_call, int)

    breaker.call(trial)
    assert breaker.current_state == "closed"


@pytest.mark.parametrize("part", ["on_failure", "_handle_error"])
def test_a_failure_that_is_settled_by_hand_raises_what_was_raised(part):
    """The failure opens the circuit all the same."""
    breaker = CircuitBreaker(fail_max=1, dry_run=True)
    exc = Boom()
    with breaker._lock, pytest.raises(Boom) as caught:
        if part == "on_failure":
            breaker._inc_counter()
        getattr(breaker.state, part)(exc)
    assert caught.value is exc
    assert breaker.current_state == "open"


def test_a_state_of_the_users_own_that_refuses_is_told_and_passed_by(events):
    """A gate that is overridden raises, and the call runs."""

    class Refuses(pybreaker.CircuitClosedState):
        def before_call(self, func, *args, **kwargs):
            raise CircuitBreakerError("not now")

    breaker = CircuitBreaker(dry_run=True, listeners=[events])
    breaker._state = Refuses(breaker)
    assert breaker.call(lambda: "result") == "result"
    assert events.names == ["rejected", "before_call", "success"]
    with pytest.raises(Boom):
        breaker.call(boom)
    assert breaker.fail_counter == 0


@pytest.mark.parametrize("state", ["open", "half-open"])
@pytest.mark.parametrize("way", [guards.by_call, guards.by_coroutine])
def test_a_trial_that_the_storage_refuses_runs_and_decides_nothing(way, state, events):
    """Another breaker runs the trial, and may have half-opened the circuit for it."""

    class Refuses(CircuitMemoryStorage):
        def claim_trial(self, timeout):
            return False

    breaker = CircuitBreaker(
        dry_run=True, state_storage=Refuses("closed"), listeners=[events]
    )
    breaker.open(0)
    if state == "half-open":
        breaker.half_open()
    events.names.clear()
    with pytest.raises(Boom):
        way(breaker, boom)
    assert way(breaker, int) == 0
    assert events.names == [
        *("rejected", "before_call", "failure"),
        *("rejected", "before_call", "success"),
    ]
    assert (breaker.current_state, breaker.retry_after) == (state, 0)


def test_an_ignored_exception_is_told_to_no_listener(events):
    """Listeners hear of no outcome, also where the call would have been rejected."""
    breaker = CircuitBreaker(dry_run=True, ignore=[Boom], listeners=[events])
    breaker.open()
    events.names.clear()
    fail(breaker)
    assert events.names == ["rejected", "before_call"]


def test_switching_dry_run_off_enforces_at_once():
    """The next call is rejected."""
    breaker = CircuitBreaker(dry_run=True)
    breaker.open()
    breaker.call(int)
    breaker.dry_run = False
    with pytest.raises(CircuitBreakerError):
        breaker.call(int)


def test_a_call_is_refused_where_a_listener_of_the_rejection_switches_dry_run_off():
    """Listeners were told that the call is rejected, and so it is."""

    class Enforces:
        def rejected(self, cb, func, *args, **kwargs):
            cb.dry_run = False

    breaker = CircuitBreaker(dry_run=True, listeners=[Enforces()])
    breaker.open()
    with pytest.raises(CircuitBreakerError):
        breaker.call(boom)


def test_switching_dry_run_on_lets_all_calls_in_at_once():
    """The next call runs."""
    breaker = CircuitBreaker()
    breaker.open()
    with pytest.raises(CircuitBreakerError):
        breaker.call(int)
    breaker.dry_run = True
    assert breaker.call(int) == 0


@pytest.mark.parametrize("work, state", [(int, "closed"), (boom, "open")])
def test_switching_dry_run_off_during_a_trial_leaves_the_trial(work, state):
    """Other calls are rejected from then on, and the trial decides."""
    breaker = CircuitBreaker(dry_run=True, throw_new_error_on_trip=True)
    breaker.open(0)

    def trial():
        assert elsewhere(breaker) == 0
        breaker.dry_run = False
        with pytest.raises(CircuitBreakerError):
            elsewhere(breaker)
        assert breaker.call(int) == 0  # within the trial
        return work()

    if work is boom:
        with pytest.raises(CircuitBreakerError):  # what holds when the call ends
            breaker.call(trial)
    else:
        breaker.call(trial)
    assert breaker.current_state == state


def test_a_call_that_would_be_rejected_decides_nothing_when_dry_run_ends():
    """The circuit did not admit the call, so the call's outcome counts nowhere."""
    breaker = CircuitBreaker(fail_max=1, dry_run=True)
    breaker.open()

    def work():
        breaker.dry_run = False
        breaker.close()
        raise Boom

    with pytest.raises(Boom):
        breaker.call(work)
    assert (breaker.current_state, breaker.fail_counter) == ("closed", 0)


def test_switching_dry_run_on_during_a_call_spares_the_caller_the_error():
    """The setting that holds when the call ends decides what the call raises."""
    breaker = CircuitBreaker(fail_max=1)

    def work():
        breaker.dry_run = True
        raise Boom

    with pytest.raises(Boom):
        breaker.call(work)
    assert breaker.current_state == "open"


def test_a_closed_circuit_takes_no_lock_in_a_dry_run():
    """A quiet call costs the same with dry run and without."""
    breaker = CircuitBreaker(dry_run=True)
    assert while_locked(breaker, breaker.call, int) == 0


def test_repr_and_snapshot_tell_of_dry_run():
    """repr and snapshot say nothing of dry run where it is off."""
    breaker = CircuitBreaker(dry_run=True)
    assert "dry run" in repr(breaker)
    assert json.loads(json.dumps(breaker.snapshot()))["dry_run"] is True
    breaker.dry_run = False
    assert "dry run" not in repr(breaker)
    assert breaker.snapshot()["dry_run"] is False


@pytest.mark.parametrize("value", [1, 0, None, "yes"])
def test_what_is_neither_true_nor_false_is_refused(value):
    """The error names the parameter and the value; a setter changes nothing."""
    with pytest.raises(TypeError, match=f"dry_run.*{value!r}"):
        CircuitBreaker(dry_run=value)
    breaker = CircuitBreaker(dry_run=True)
    with pytest.raises(TypeError, match=f"dry_run.*{value!r}"):
        breaker.dry_run = value
    assert breaker.dry_run is True
    with pytest.raises(TypeError, match=f"throw_new_error_on_trip.*{value!r}"):
        breaker.throw_new_error_on_trip = value
    assert breaker.throw_new_error_on_trip is True
