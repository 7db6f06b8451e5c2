"""States of the user's own: each method that they override is asked by every call."""

from __future__ import annotations

import contextvars

import guards
import pytest
from support import Boom, boom, pairwise

import pybreaker
from pybreaker import (
    CircuitBreaker,
    CircuitBreakerError,
    CircuitClosedState,
    CircuitHalfOpenState,
    CircuitOpenState,
)

STATES = [CircuitClosedState, CircuitHalfOpenState]
NAMES = {
    CircuitClosedState: "closed",
    CircuitOpenState: "open",
    CircuitHalfOpenState: "half-open",
}


# Three ways in which programs put such a state in.


def by_create_new_state(cls, base, monkeypatch, **settings):
    class Own(CircuitBreaker):
        def _create_new_state(self, new_state, prev_state=None, notify=False):
            if new_state == NAMES[base]:
                return cls(self, prev_state=prev_state, notify=notify)
            return super()._create_new_state(new_state, prev_state, notify)

    return moved(Own(**settings), base)


def by_the_modules_name(cls, base, monkeypatch, **settings):
    monkeypatch.setattr(pybreaker, base.__name__, cls)
    return moved(CircuitBreaker(**settings), base)


def by_writing_state(cls, base, monkeypatch, **settings):
    breaker = moved(CircuitBreaker(**settings), base)
    breaker._state = cls(breaker, prev_state=breaker._state)
    return breaker


def moved(breaker, base):
    if base is not CircuitClosedState:
        breaker.state = NAMES[base]
    return breaker


WAYS_IN = [by_create_new_state, by_the_modules_name, by_writing_state]


def watching(base, hook, heard):
    """A subclass that notes the calls of one method, and then calls the library's."""

    def override(self, *args, **kwargs):
        heard.append((hook, *args))
        return getattr(super(Watching, self), hook)(*args, **kwargs)

    class Watching(base):
        pass

    setattr(Watching, hook, override)
    return Watching


def raised_by(guard, breaker, work):
    """The exception that the caller of a guarded call gets, or None."""
    try:
        guard(breaker, work)
    except BaseException as exc:
        return exc
    return None


@pairwise(
    hook=["before_call", "on_success", "_handle_success"],
    put_in=WAYS_IN,
    base=STATES,
    guard=guards.WAYS,
)
def test_a_method_that_hears_of_successes_is_asked_once_by_every_way_to_guard(
    hook, put_in, base, guard, monkeypatch, recorder
):
    """What the method leaves to the library happens as ever."""
    heard = []
    cls = watching(base, hook, heard)
    breaker = put_in(cls, base, monkeypatch, listeners=[recorder])
    breaker.fail_counter = 2
    recorder.events.clear()
    assert guard(breaker, lambda: "result") == "result"
    assert [event[0] for event in heard] == [hook]
    assert (breaker.current_state, breaker.fail_counter) == ("closed", 0)
    assert breaker.retry_after == 0
    told = [name for name in recorder.names if name != "state_change"]
    assert told == ["before_call", "success"]


@pairwise(
    hook=["before_call", "on_failure", "_handle_error"],
    put_in=WAYS_IN,
    base=STATES,
    guard=guards.WAYS,
)
def test_a_method_that_hears_of_failures_is_asked_once_by_every_way_to_guard(
    hook, put_in, base, guard, monkeypatch, recorder
):
    """The method gets the exception, which is counted and opens the circuit as ever."""
    heard, exc = [], Boom()

    def work():
        raise exc

    cls = watching(base, hook, heard)
    breaker = put_in(cls, base, monkeypatch, fail_max=2, listeners=[recorder])
    recorder.events.clear()
    raised = raised_by(guard, breaker, work)
    assert [event[0] for event in heard] == [hook]
    if hook != "before_call":
        assert heard[0][1] is exc
    assert breaker.fail_counter == 1
    if base is CircuitClosedState:
        assert raised is exc
        assert breaker.current_state == "closed"
        raised = raised_by(guard, breaker, work)
    assert isinstance(raised, CircuitBreakerError)
    assert raised.__cause__ is exc
    assert breaker.current_state == "open"
    told = [name for name in recorder.names if name != "state_change"]
    calls = 1 if base is CircuitHalfOpenState else 2
    assert told == ["before_call", "failure"] * calls


class Maintenance(Exception):
    """The service is being worked on."""


def closed_for_maintenance(base):
    class UnderMaintenance(base):
        """Lets nothing through while the service is worked on."""

        active = True

        def before_call(self, func, *args, **kwargs):
            super().before_call(func, *args, **kwargs)
            if self.active:
                raise Maintenance

    return UnderMaintenance


@pairwise(put_in=WAYS_IN, base=STATES, guard=guards.WAYS)
def test_a_before_call_that_raises_keeps_the_function_from_running(
    put_in, base, guard, monkeypatch
):
    """The exception reaches the caller, nothing is counted, and no place is kept."""
    cls, ran = closed_for_maintenance(base), []
    breaker = put_in(cls, base, monkeypatch, reset_timeout=60)
    breaker.fail_counter = 2
    for _ in range(2):
        with pytest.raises(Maintenance):
            guard(breaker, lambda: ran.append(1))
    assert ran == []
    assert (breaker.current_state, breaker.fail_counter) == (NAMES[base], 2)
    assert breaker.retry_after == 0
    cls.active = False
    guard(breaker, lambda: ran.append(1))
    assert ran == [1]
    assert (breaker.current_state, breaker.fail_counter) == ("closed", 0)


def test_before_call_is_given_the_function_and_its_arguments(monkeypatch):
    """before_call gets what listeners get."""
    heard = []
    cls = watching(CircuitClosedState, "before_call", heard)
    breaker = by_writing_state(cls, CircuitClosedState, monkeypatch)
    assert breaker.call(divmod, 7, 2) == (3, 1)
    with breaker.calling():
        assert heard == [
            ("before_call", divmod, 7, 2),
            ("before_call", breaker.calling),
        ]


class Throttled(Exception):
    """The service asked to come again later, which is no outage."""


def forgiving(base):
    class Forgiving(base):
        """Does not count exceptions that only say that there were too many calls."""

        throttled = 0

        def _handle_error(self, exc, reraise=True):
            if not isinstance(exc, Throttled):
                return super()._handle_error(exc, reraise)
            type(self).throttled += 1
            if reraise:
                raise exc

    return Forgiving


@pairwise(put_in=WAYS_IN, base=STATES, guard=guards.WAYS)
def test_a_handle_error_that_keeps_an_exception_to_itself_has_it_uncounted(
    put_in, base, guard, monkeypatch
):
    """The exception reaches the caller, and a trial gives its place back."""
    exc = Throttled()

    def work():
        raise exc

    cls = forgiving(base)
    breaker = put_in(cls, base, monkeypatch, fail_max=1, reset_timeout=60)
    assert raised_by(guard, breaker, work) is exc
    assert cls.throttled == 1
    assert (breaker.current_state, breaker.fail_counter) == (NAMES[base], 0)
    assert breaker.retry_after == 0
    raised = raised_by(guard, breaker, boom)
    assert isinstance(raised, CircuitBreakerError)
    assert breaker.current_state == "open"


def cautious(base):
    class Cautious(base):
        """Leaves only the second success to the library."""

        seen = 0

        def _handle_success(self):
            type(self).seen += 1
            if type(self).seen == 2:
                super()._handle_success()

    return Cautious


@pairwise(put_in=WAYS_IN, base=STATES, guard=guards.WAYS)
def test_a_handle_success_that_keeps_a_success_to_itself_has_it_ignored(
    put_in, base, guard, monkeypatch
):
    """A success counts once the state leaves it to the library; a trial gives its place
    back in any case."""
    cls = cautious(base)
    breaker = put_in(cls, base, monkeypatch, reset_timeout=60)
    breaker.fail_counter = 2
    guard(breaker, int)
    assert (breaker.current_state, breaker.fail_counter) == (NAMES[base], 2)
    assert breaker.retry_after == 0
    guard(breaker, int)
    assert (breaker.current_state, breaker.fail_counter) == ("closed", 0)


@pairwise(put_in=WAYS_IN, guard=guards.WAYS)
def test_an_on_success_of_ones_own_decides_when_the_circuit_closes(
    put_in, guard, monkeypatch
):
    """The state counts successes in its own way, as before success_threshold."""

    class Patient(CircuitHalfOpenState):
        successes = 0

        def on_success(self):
            self.successes += 1
            if self.successes >= 3:
                self._breaker.close()

    breaker = put_in(Patient, CircuitHalfOpenState, monkeypatch, reset_timeout=60)
    for _ in range(2):
        guard(breaker, int)
        assert breaker.current_state == "half-open"
        assert breaker.retry_after == 0
    guard(breaker, int)
    assert breaker.current_state == "closed"


@pairwise(put_in=WAYS_IN, guard=guards.WAYS)
def test_an_on_failure_of_ones_own_decides_when_the_circuit_opens(
    put_in, guard, monkeypatch
):
    """Failures are counted up to the limit, but at night they open nothing."""

    class Nightly(CircuitClosedState):
        night = True

        def on_failure(self, exc):
            if not self.night:
                super().on_failure(exc)

    breaker = put_in(Nightly, CircuitClosedState, monkeypatch, fail_max=2)
    for count in (1, 2, 2):
        assert isinstance(raised_by(guard, breaker, boom), Boom)
        assert (breaker.current_state, breaker.fail_counter) == ("closed", count)
    Nightly.night = False
    assert isinstance(raised_by(guard, breaker, boom), CircuitBreakerError)
    assert breaker.current_state == "open"


@pairwise(put_in=WAYS_IN, base=STATES, guard=guards.WAYS)
def test_an_excluded_exception_reaches_handle_success(put_in, base, guard, monkeypatch):
    """An excluded exception is a success to the state as well."""
    heard = []
    cls = watching(base, "_handle_success", heard)
    breaker = put_in(cls, base, monkeypatch, exclude=[Boom])
    assert isinstance(raised_by(guard, breaker, boom), Boom)
    assert heard == [("_handle_success",)]
    assert breaker.current_state == "closed"


SETTLING = ["_handle_success", "_handle_error"]


@pairwise(
    hook=SETTLING,
    put_in=WAYS_IN,
    base=STATES,
    guard=guards.WAYS,
    error=[KeyboardInterrupt, SystemExit],
)
def test_an_abandoned_call_is_not_put_before_the_state(
    hook, put_in, base, guard, error, monkeypatch
):
    """There is nothing to decide; a trial gives its place back."""
    heard = []
    cls = watching(base, hook, heard)
    breaker = put_in(cls, base, monkeypatch, reset_timeout=60)

    def work():
        raise error

    assert type(raised_by(guard, breaker, work)) is error
    assert heard == []
    assert (breaker.current_state, breaker.retry_after) == (NAMES[base], 0)


@pairwise(
    hook=SETTLING,
    put_in=WAYS_IN,
    base=STATES,
    guard=guards.WAYS,
    moves=["open", "to the same state"],
)
def test_a_late_call_is_not_put_before_the_state_that_admitted_it(
    hook, put_in, base, guard, moves, monkeypatch
):
    """The state that came after is not asked either, whatever its class."""
    heard = []
    cls = watching(base, hook, heard)
    breaker = put_in(cls, base, monkeypatch)

    def work():
        if moves == "open":
            breaker.open()
        else:
            breaker.state = NAMES[base]
            breaker._state = cls(breaker, prev_state=breaker._state)
        if hook == "_handle_error":
            raise Boom

    raised = raised_by(guard, breaker, work)
    assert type(raised) is (Boom if hook == "_handle_error" else type(None))
    assert heard == []
    assert breaker.current_state == ("open" if moves == "open" else NAMES[base])


@pairwise(hook=SETTLING, put_in=WAYS_IN, guard=guards.WAYS)
def test_a_call_within_a_trial_is_not_put_before_the_state(
    hook, put_in, guard, monkeypatch
):
    """Only the outcome of the trial itself is put before the state."""
    heard, inside = [], []
    cls = watching(CircuitHalfOpenState, hook, heard)
    breaker = put_in(cls, CircuitHalfOpenState, monkeypatch)

    def trial():
        raised_by(guard, breaker, boom)
        raised_by(guard, breaker, int)
        inside.extend(heard)
        if hook == "_handle_error":
            raise Boom

    raised_by(guard, breaker, trial)
    assert inside == []
    assert [event[0] for event in heard] == [hook]


@pairwise(
    hook=["on_success", "on_failure", *SETTLING],
    put_in=WAYS_IN,
    base=STATES,
    guard=guards.WAYS,
)
def test_a_method_that_breaks_is_heard_of_and_keeps_no_place(
    hook, put_in, base, guard, monkeypatch
):
    """The method's exception reaches the caller, and the next call is admitted."""

    class Broken(base):
        pass

    def override(self, *args, **kwargs):
        raise ZeroDivisionError

    setattr(Broken, hook, override)
    breaker = put_in(Broken, base, monkeypatch, reset_timeout=60)
    work = int if hook in ("on_success", "_handle_success") else boom
    for _ in range(2):
        assert type(raised_by(guard, breaker, work)) is ZeroDivisionError
        assert (breaker.current_state, breaker.retry_after) == (NAMES[base], 0)


# An open state: there is only its gate.


@pairwise(put_in=WAYS_IN, guard=guards.WAYS)
def test_an_open_state_may_reject_in_its_own_words(put_in, guard, monkeypatch):
    """Programs answer with an exception of their own."""

    class Polite(CircuitOpenState):
        def before_call(self, func, *args, **kwargs):
            try:
                return super().before_call(func, *args, **kwargs)
            except CircuitBreakerError as error:
                raise Maintenance(error.retry_after) from error

    breaker, ran = put_in(Polite, CircuitOpenState, monkeypatch, reset_timeout=60), []
    with pytest.raises(Maintenance) as rejected:
        guard(breaker, lambda: ran.append(1))
    assert 50 < rejected.value.args[0] <= 60
    assert ran == []
    assert breaker.current_state == "open"


@pairwise(put_in=WAYS_IN, guard=guards.WAYS)
def test_the_gate_of_an_open_state_may_leave_everything_to_the_library(
    put_in, guard, monkeypatch, clock, recorder
):
    """The gate rejects; once the timeout has passed the call runs once, as the
    trial."""
    heard, ran = [], []
    cls = watching(CircuitOpenState, "before_call", heard)
    breaker = put_in(
        cls, CircuitOpenState, monkeypatch, reset_timeout=60, listeners=[recorder]
    )
    recorder.events.clear()
    with pytest.raises(CircuitBreakerError, match="Timeout not elapsed"):
        guard(breaker, lambda: ran.append(1))
    assert (len(heard), ran) == (1, [])
    clock.advance(60)
    guard(breaker, lambda: ran.append(1))
    assert ran == [1]
    assert recorder.transitions == [("open", "half-open"), ("half-open", "closed")]


@pairwise(put_in=WAYS_IN, guard=guards.WAYS)
def test_an_open_state_may_refuse_the_trial(put_in, guard, monkeypatch, clock):
    """The function does not run, and no place is kept."""
    cls, ran = closed_for_maintenance(CircuitOpenState), []
    breaker = put_in(cls, CircuitOpenState, monkeypatch, reset_timeout=60)
    clock.advance(60)
    with pytest.raises(Maintenance):
        guard(breaker, lambda: ran.append(1))
    assert ran == []
    assert breaker.retry_after == 0
    cls.active = False
    guard(breaker, lambda: ran.append(1))
    assert ran == [1]
    assert breaker.current_state == "closed"


# What else holds for such states.


@pairwise(put_in=WAYS_IN, base=STATES, guard=guards.WAYS)
def test_call_of_a_state_is_not_asked_by_guarded_calls(
    put_in, base, guard, monkeypatch
):
    """call() of a state is for code that calls the state."""

    class Own(base):
        def call(self, func, *args, **kwargs):
            raise AssertionError("nobody called this")

    breaker = put_in(Own, base, monkeypatch)
    guard(breaker, int)
    assert breaker.current_state == "closed"


def test_a_state_that_is_written_is_asked_by_calls_that_are_decorated_already(
    monkeypatch,
):
    """The breaker looks at its state whenever a call comes."""
    breaker, heard = CircuitBreaker(), []
    guarded = breaker(int)
    guarded()
    cls = watching(CircuitClosedState, "_handle_success", heard)
    breaker._state = cls(breaker, prev_state=breaker._state)
    guarded()
    breaker._state = CircuitClosedState(breaker)
    guarded()
    assert heard == [("_handle_success",)]


def test_a_call_that_is_in_flight_when_the_state_is_written_is_late():
    """The state that admitted the call is no longer the breaker's."""
    breaker, heard = CircuitBreaker(), []
    cls = watching(CircuitClosedState, "_handle_error", heard)
    block = breaker.calling()
    block.__enter__()
    breaker._state = cls(breaker, prev_state=breaker._state)
    exc = Boom()
    assert not block.__exit__(Boom, exc, None)
    assert (breaker.fail_counter, heard) == (0, [])


def test_while_a_trial_runs_the_gate_of_its_state_admits_no_other_call(monkeypatch):
    """An overriding before_call that calls super() rejects other calls."""
    heard = []
    cls = watching(CircuitHalfOpenState, "before_call", heard)
    breaker = by_create_new_state(cls, CircuitHalfOpenState, monkeypatch)
    block, trial = breaker.calling(), contextvars.copy_context()
    trial.run(block.__enter__)
    with pytest.raises(CircuitBreakerError, match="Timeout not elapsed"):
        breaker.call(int)
    trial.run(block.__exit__, None, None, None)
    assert breaker.current_state == "closed"


def test_a_state_with_hooks_serves_code_that_drives_it_by_hand():
    """Code that drives by hand calls the state's own methods."""
    breaker = CircuitBreaker(fail_max=1)
    cls = forgiving(CircuitClosedState)
    breaker._state = cls(breaker)
    state = breaker.state
    state.before_call(int)
    state._handle_error(Throttled(), reraise=False)
    assert (cls.throttled, breaker.fail_counter) == (1, 0)
    with pytest.raises(CircuitBreakerError):
        state._handle_error(Boom(), reraise=False)
    assert breaker.current_state == "open"
