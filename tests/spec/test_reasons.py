"""Why the circuit is as it is: in the state, the snapshot, the log and the error."""

from __future__ import annotations

import contextvars
import gc
import json
import logging
import math
import pickle
import weakref

import pytest
from support import Boom, boom, fail, let_go

from pybreaker import (
    CircuitBreaker,
    CircuitBreakerError,
    CircuitMemoryStorage,
)


def rejection(breaker):
    with pytest.raises(CircuitBreakerError) as caught:
        contextvars.Context().run(breaker.call, int)
    return caught.value


def shown(breaker, caplog):
    """The reason, which is the same wherever it is shown."""
    reason = breaker.state.reason
    assert breaker.snapshot()["reason"] == reason
    assert f": {reason} (" in caplog.records[-1].getMessage()
    if breaker.current_state == "open" and breaker.retry_after:
        error = rejection(breaker)
        assert error.reason == reason
        assert f": {reason} (" in str(error)
    return reason


@pytest.fixture(autouse=True)
def log(caplog):
    caplog.set_level(logging.DEBUG, "pybreaker")


# Trips.


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({}, "5 failures in a row; the last: Boom()"),
        ({"fail_max": 1}, "a failure: Boom()"),
        ({"window_seconds": 30}, "5 failures in a row within 30 s; the last: Boom()"),
        ({"window_seconds": 0.5}, "5 failures in a row within 0.5 s; the last: Boom()"),
        ({"fail_max": 1, "window_seconds": 30}, "a failure within 30 s: Boom()"),
        ({"window_size": 50}, "5 of the last 50 calls failed; the last: Boom()"),
        (
            {"window_size": 50, "window_seconds": 30},
            "5 of the last 50 calls failed; the last: Boom()",
        ),
        ({"fail_max": 1, "window_size": 50}, "a failure: Boom()"),
        (
            {"window_seconds": 2592000},
            "5 failures in a row within 2592000 s; the last: Boom()",
        ),
        ({"window_size": math.inf}, "5 failures; the last: Boom()"),
        (
            {"window_size": math.inf, "window_seconds": 30},
            "5 failures within 30 s; the last: Boom()",
        ),
    ],
    ids=str,
)
def test_a_trip_says_how_many_failures_there_were(settings, expected, caplog):
    """The reason tells whether the failures were in a row or in the window, and in
    which time."""
    breaker = CircuitBreaker(**settings)
    error = fail(breaker, settings.get("fail_max", 5))
    assert isinstance(error, CircuitBreakerError)
    assert error.reason == expected
    assert shown(breaker, caplog) == expected


@pytest.mark.parametrize(
    "window, expected",
    [
        ({}, "5 failures in a row; the last: Boom()"),
        ({"window_seconds": 30}, "5 failures in a row within 30 s; the last: Boom()"),
        ({"window_size": 50}, "5 of the last 50 calls failed; the last: Boom()"),
        ({"window_size": math.inf}, "5 failures; the last: Boom()"),
    ],
    ids=str,
)
def test_a_trip_says_how_many_failures_there_are_where_the_limit_was_lowered(
    window, expected, caplog
):
    """The reason has the count, not the limit."""
    breaker = CircuitBreaker(fail_max=5, **window)
    fail(breaker, 4)
    breaker.fail_max = 2
    fail(breaker)
    assert shown(breaker, caplog) == expected


def test_a_trip_says_only_that_there_was_a_failure_where_one_is_enough(caplog):
    """There were more failures before the limit was lowered to one."""
    breaker = CircuitBreaker(fail_max=5)
    fail(breaker, 3)
    breaker.fail_max = 1
    fail(breaker)
    assert breaker.fail_counter == 4
    assert shown(breaker, caplog) == "a failure: Boom()"


def test_a_failed_trial_is_the_reason_of_the_opening(caplog):
    """The reason shows the exception that the trial raised."""
    breaker = CircuitBreaker(fail_max=1, reset_timeout=60)
    breaker.open(0)
    error = fail(breaker)
    assert error.reason == "the trial failed: Boom()"
    assert shown(breaker, caplog) == "the trial failed: Boom()"


def test_the_exception_is_shown_by_its_repr_on_one_line(caplog):
    """A long repr is cut."""

    class Wordy(Exception):
        def __repr__(self):
            return "one\ntwo\r\n" + 10_000 * "x"

    def wordy():
        raise Wordy

    breaker = CircuitBreaker(fail_max=1)
    with pytest.raises(CircuitBreakerError):
        breaker.call(wordy)
    reason = shown(breaker, caplog)
    assert reason.startswith("a failure: one two xxx")
    assert len(reason.splitlines()) == 1
    assert len(reason) < 400


def test_a_repr_that_moves_the_circuit_is_not_overruled():
    """The circuit has moved by then, so the failure opens nothing: one move is told."""

    class Moving(Exception):
        def __repr__(self):
            breaker.open(30, "asked for")
            return "Moving()"

    def moving():
        raise Moving

    class Watch:
        def state_change(self, cb, old_state, new_state):
            moves.append((old_state.name, new_state.name))

    moves = []
    breaker = CircuitBreaker(fail_max=1, listeners=[Watch()])
    with pytest.raises(Moving):
        breaker.call(moving)
    assert moves == [("closed", "open")]
    assert 0 < breaker.retry_after <= 30
    assert breaker.state.reason == "asked for"


def test_an_exception_whose_repr_fails_is_shown_by_its_class(caplog):
    """The caller gets CircuitBreakerError from the function's exception, as ever."""

    class Mute(Exception):
        def __repr__(self):
            raise ValueError

    def mute():
        raise Mute

    breaker = CircuitBreaker(fail_max=1)
    with pytest.raises(CircuitBreakerError) as caught:
        breaker.call(mute)
    assert type(caught.value.__cause__) is Mute
    assert shown(breaker, caplog) == "a failure: Mute"


def test_the_reason_is_made_when_the_circuit_moves(caplog):
    """What the exception says afterwards does not change the reason."""
    exc = KeyError("before")

    def raise_it():
        raise exc

    breaker = CircuitBreaker(fail_max=1)
    with pytest.raises(CircuitBreakerError):
        breaker.call(raise_it)
    exc.args = ("after",)
    assert shown(breaker, caplog) == "a failure: KeyError('before')"


# By hand.


@pytest.mark.parametrize("move", ["open", "half_open", "close"])
def test_a_move_by_hand_is_by_hand_or_for_a_reason(move, caplog):
    """The reason that is given takes the place of "by hand"."""
    breaker = CircuitBreaker()
    getattr(breaker, move)()
    assert shown(breaker, caplog) == "by hand"
    getattr(breaker, move)(reason="maintenance until ten")
    assert shown(breaker, caplog) == "maintenance until ten"
    getattr(breaker, move)(reason=None)
    assert shown(breaker, caplog) == "by hand"
    getattr(breaker, move)(reason="")
    assert shown(breaker, caplog) == "by hand"


@pytest.mark.parametrize(
    "reason, expected",
    [
        ("one\ntwo", "one two"),
        ("one\r\ntwo\rthree", "one two three"),
        ("one\u2028two", "one two"),
        ("\n", "by hand"),
        (299 * "x" + "yz", 299 * "x" + "y"),
        (10_000 * "x", 300 * "x"),
        ("größer", "größer"),
    ],
    ids=lambda text: ascii(text)[:20],
)
def test_a_reason_is_one_line_of_at_most_300_characters(reason, expected, caplog):
    """Line breaks become spaces, and a reason that is empty then is none."""
    breaker = CircuitBreaker()
    breaker.open(reason=reason)
    assert shown(breaker, caplog) == expected


def test_setting_the_state_is_by_hand(caplog):
    """The reason is "by hand", as for the three methods."""
    breaker = CircuitBreaker()
    for name in ("open", "half-open", "closed"):
        breaker.state = name
        assert shown(breaker, caplog) == "by hand"


# Recoveries.


def test_a_recovery_has_its_reasons(caplog):
    """The half-opening has a reason, and so has the closing."""
    breaker = CircuitBreaker()
    breaker.open(0)

    def trial():
        assert shown(breaker, caplog) == "the timeout has passed"

    breaker.call(trial)
    assert shown(breaker, caplog) == "the trial succeeded"


def test_the_errors_reason_is_why_the_circuit_opened_while_it_is_half_open():
    """The cause and the reason of the half-opening do not matter."""
    breaker = CircuitBreaker()
    breaker.open(0, "maintenance")

    def trial():
        assert rejection(breaker).reason == "maintenance"
        assert breaker.state.reason == "the timeout has passed"
        breaker.half_open("to see")
        breaker.call(inner_trial)

    def inner_trial():
        assert breaker.state.reason == "to see"
        assert rejection(breaker).reason == "maintenance"

    breaker.call(trial)
    assert breaker.current_state == "closed"


def test_the_errors_reason_is_the_opening_by_another_breaker_over_the_same_storage():
    """This breaker has not looked at the storage since, and half-opens the circuit."""
    storage = CircuitMemoryStorage("closed")
    other, breaker = (CircuitBreaker(state_storage=storage) for _ in range(2))
    other.open(reason="maintenance")
    breaker.half_open("to see")
    breaker.call(lambda: rejected_for(breaker, "maintenance"))


def test_half_open_without_an_opening_before_the_error_says_why_it_is_half_open():
    """Of two half-openings the error has the reason of the last one."""
    breaker = CircuitBreaker()
    breaker.half_open("first")

    def trial():
        assert rejection(breaker).reason == "first"
        breaker.half_open("second")
        breaker.call(inner_trial)

    def inner_trial():
        assert rejection(breaker).reason == "second"

    breaker.call(trial)


def test_closing_ends_the_opening_that_the_error_tells_of():
    """A circuit that is half-opened after it was closed has no opening before."""
    breaker = CircuitBreaker()
    breaker.open(reason="long ago")
    breaker.close()
    breaker.half_open("now")
    breaker.call(lambda: rejected_for(breaker, "now"))


def rejected_for(breaker, reason):
    assert rejection(breaker).reason == reason


def test_the_storage_refuses_a_trial_for_the_reason_of_the_opening():
    """The storage has granted the trial to another breaker."""

    class Refuses(CircuitMemoryStorage):
        def claim_trial(self, timeout):
            return False

    breaker = CircuitBreaker(state_storage=Refuses("closed"))
    breaker.open(0, "maintenance")
    assert rejection(breaker).reason == "maintenance"


def test_an_opening_by_a_listener_shows_its_reason_and_not_the_failed_trials():
    """The listener opened the circuit when it was told of the failure."""

    class Opens:
        def failure(self, cb, exc):
            cb.open(30, "as the listener says")

    breaker = CircuitBreaker(listeners=[Opens()])
    breaker.open(0, "before")
    assert type(fail(breaker)) is Boom
    assert rejection(breaker).reason == "as the listener says"


# The error.


def test_an_error_has_no_reason_by_default():
    """An error has by default no breaker and no time to wait either."""
    assert CircuitBreakerError().reason == ""
    assert str(CircuitBreakerError("phrase")) == "phrase"


def test_the_reason_survives_pickling():
    """The text survives as well."""
    breaker = CircuitBreaker(name="db")
    breaker.open(reason="maintenance")
    error = rejection(breaker)
    copied = pickle.loads(pickle.dumps(error))
    assert copied.reason == "maintenance"
    assert str(copied) == str(error)
    assert "maintenance" in str(copied)


def test_the_reason_of_the_error_is_that_of_the_moment_when_it_was_raised():
    """Later moves change neither the reason nor the text."""
    breaker = CircuitBreaker()
    breaker.open(reason="first")
    error = rejection(breaker)
    text = str(error)
    breaker.open(reason="second")
    assert (error.reason, str(error)) == ("first", text)


def test_the_gate_of_a_state_refuses_for_the_reason_of_the_opening():
    """Code that drives a circuit by hand sees what a guarded call would."""
    breaker = CircuitBreaker()
    breaker.open(reason="maintenance")
    with pytest.raises(CircuitBreakerError) as caught:
        breaker.state.before_call(int)
    assert caught.value.reason == "maintenance"


@pytest.mark.parametrize("is_granted", [True, False], ids=["waits", "is refused"])
def test_the_reason_of_a_rejection_is_that_of_the_opening_that_rejected(is_granted):
    """A listener that is told of the rejection opens the circuit anew. The error still
    tells of the opening that the call met; the next error tells of the listener's."""

    class Opens:
        def rejected(self, cb, func, *args, **kwargs):
            cb.open(30, "after a rejection")

    class Storage(CircuitMemoryStorage):
        def claim_trial(self, timeout):
            return is_granted

    breaker = CircuitBreaker(state_storage=Storage("closed"), listeners=[Opens()])
    breaker.open(10 if is_granted else 0, "maintenance")
    assert rejection(breaker).reason == "maintenance"
    assert rejection(breaker).reason == "after a rejection"


# Listeners.


def test_a_listener_sees_the_reasons_of_both_states():
    """A move is complete when listeners are told of it."""
    changes = []

    class Watch:
        def state_change(self, cb, old_state, new_state):
            assert cb.state is new_state
            changes.append((old_state.reason, new_state.reason))

    breaker = CircuitBreaker(listeners=[Watch()])
    breaker.open(reason="first")
    breaker.close("second")
    assert changes == [("new", "first"), ("first", "second")]


# Text, and no exception.


@pytest.mark.parametrize("throw", [True, False])
@pytest.mark.parametrize("trial", [False, True])
@pytest.mark.parametrize(
    "settings", [{}, {"window_size": 5}, {"window_seconds": 5, "include": [Boom]}]
)
def test_the_breaker_keeps_no_exception_alive(throw, trial, settings):
    """Neither a counted exception nor one that opened the circuit is kept."""
    gc.disable()  # without the collector only what nothing refers to is freed
    try:
        breaker = CircuitBreaker(fail_max=2, throw_new_error_on_trip=throw, **settings)
        if trial:
            breaker.half_open()
        refs = []
        for _ in range(1 if trial else 2):
            exc = Boom()
            refs.append(weakref.ref(exc))
            failing(breaker, exc)
            del exc
        assert breaker.current_state == "open"
        assert type(breaker.state.reason) is str
        let_go()
        assert [ref() for ref in refs] == len(refs) * [None]
    finally:
        gc.enable()


def failing(breaker, exc):
    holder = [exc]
    del exc

    def raise_it():
        raise holder.pop()

    try:
        breaker.call(raise_it)
    except (Boom, CircuitBreakerError):
        return
    raise AssertionError("the call did not fail")


# The snapshot.


def test_the_snapshot_has_all_settings_by_name():
    """A setting that is off is None."""
    breaker = CircuitBreaker(name="db")
    assert json.loads(json.dumps(breaker.snapshot())) == {
        "name": "db",
        "state": "closed",
        "reason": "new",
        "fail_counter": 0,
        "fail_max": 5,
        "success_counter": 0,
        "success_threshold": 1,
        "reset_timeout": 60,
        "window_size": None,
        "window_seconds": None,
        "max_reset_timeout": None,
        "dry_run": False,
        "opened_at": None,
        "retry_after": 0.0,
    }


def test_infinity_is_told_from_off_in_the_snapshot(clock):
    """Infinity is "inf" in settings that can be off, and None in all others."""
    breaker = CircuitBreaker(
        fail_max=math.inf,
        reset_timeout=math.inf,
        window_size=math.inf,
        window_seconds=30,
        max_reset_timeout=math.inf,
        dry_run=True,
    )
    breaker.open(reason="maintenance")
    snapshot = json.loads(json.dumps(breaker.snapshot(), allow_nan=False))
    assert snapshot["window_size"] == snapshot["max_reset_timeout"] == "inf"
    assert snapshot["window_seconds"] == 30
    assert snapshot["fail_max"] is snapshot["reset_timeout"] is None
    assert snapshot["retry_after"] is None
    assert snapshot["dry_run"] is True
    assert snapshot["reason"] == "maintenance"


def test_the_snapshot_counts_what_is_remembered(clock):
    """Failures that time has forgotten are left out."""
    breaker = CircuitBreaker(window_seconds=30)
    fail(breaker, 2)
    assert breaker.snapshot()["fail_counter"] == 2
    clock.advance(30)
    assert breaker.snapshot()["fail_counter"] == 0
    assert "0 of 5 failures" in repr(breaker)


def test_boom_is_what_these_tests_raise():
    """Its `repr` is what the reasons show."""
    with pytest.raises(Boom) as caught:
        boom()
    assert repr(caught.value) == "Boom()"
