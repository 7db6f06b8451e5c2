"""How long an opening lasts: growth, `open(seconds)`, and who moved the circuit."""

from __future__ import annotations

import contextlib
import contextvars
import math
import random
import threading

import guards
import pytest
from internals import after_fork
from support import at_once, boom, fail, while_locked

from pybreaker import (
    CircuitBreaker,
    CircuitBreakerError,
    CircuitBreakerListener,
    CircuitBreakerStorage,
    CircuitMemoryStorage,
)


def succeed(breaker):
    return breaker.call(int)


def until_the_trial(breaker, clock):
    """Lets the opening end, and returns how long it was to last."""
    wait = breaker.state and breaker.retry_after
    clock.advance(wait + 0.001)  # or rounding may leave a moment of it
    return wait


def fail_trials(breaker, clock, times):
    for _ in range(times):
        until_the_trial(breaker, clock)
        fail(breaker)
        assert breaker.current_state == "open"


def assert_lasts(breaker, seconds):
    """The opening has just begun and lasts `seconds`, or up to a tenth less."""
    assert 0.9 * seconds <= breaker.retry_after <= seconds


def rejection(breaker):
    """The error of a call that is rejected, also while a trial runs around it."""
    with pytest.raises(CircuitBreakerError) as caught:
        contextvars.Context().run(breaker.call, int)
    return caught.value


# Growth.


def test_without_a_longest_timeout_all_openings_last_as_long(clock):
    """Each opening lasts exactly `reset_timeout`, however many trials fail."""
    breaker = CircuitBreaker(fail_max=1, reset_timeout=10)
    fail(breaker)
    for _ in range(5):
        assert breaker.retry_after == 10
        fail_trials(breaker, clock, 1)


def test_each_failed_trial_doubles_the_timeout_up_to_the_longest(clock):
    """The openings last 10, 20, 40, 80, and then 100 seconds, or up to a tenth less."""
    breaker = CircuitBreaker(fail_max=1, reset_timeout=10, max_reset_timeout=100)
    fail(breaker)
    for seconds in (10, 20, 40, 80, 100, 100):
        assert_lasts(breaker, seconds)
        fail_trials(breaker, clock, 1)


def test_the_first_failed_trial_of_a_circuit_that_is_found_half_open_doubles(clock):
    """A storage that knows no move has had no failed trial."""
    breaker = CircuitBreaker(
        reset_timeout=10,
        max_reset_timeout=100,
        state_storage=CircuitMemoryStorage("half-open"),
    )
    fail(breaker)
    assert_lasts(breaker, 20)


def test_no_call_is_admitted_before_the_grown_timeout_has_passed(clock):
    """The first call afterwards is the trial."""
    breaker = CircuitBreaker(fail_max=1, reset_timeout=10, max_reset_timeout=100)
    fail(breaker)
    fail_trials(breaker, clock, 2)
    wait = breaker.retry_after
    clock.advance(wait - 0.001)
    assert rejection(breaker).retry_after == pytest.approx(0.001)
    clock.advance(0.0011)
    succeed(breaker)
    assert breaker.current_state == "closed"


def test_the_factor_is_drawn_once_for_each_opening(clock):
    """retry_after, the error and the snapshot show the same wait while the circuit is
    open."""
    breaker = CircuitBreaker(reset_timeout=10, max_reset_timeout=100)
    for _ in range(5):
        breaker.open()
        waits = {breaker.retry_after for _ in range(20)}
        waits |= {rejection(breaker).retry_after, breaker.snapshot()["retry_after"]}
        assert len(waits) == 1


class Elsewhere(CircuitBreakerStorage):
    """A storage of the user's own that knows nothing of moves."""

    state, counter, opened_at = "closed", 0, None

    def __init__(self):
        super().__init__("elsewhere")

    def increment_counter(self):
        self.counter += 1

    def reset_counter(self):
        self.counter = 0

    def open_for(self):
        return 0.0


def test_a_breaker_that_has_yet_to_look_draws_one_factor_over_any_storage():
    storage = Elsewhere()
    mover = CircuitBreaker(state_storage=storage)
    looker = CircuitBreaker(max_reset_timeout=1000, state_storage=storage)
    mover.open()
    waits = {looker.retry_after for _ in range(20)}
    mover.open()
    assert len(waits) == 1
    assert looker.retry_after not in waits


def test_two_threads_that_ask_first_draw_one_factor(clock, monkeypatch):
    """Both threads find that the factor of this opening has not been drawn yet."""
    breaker = CircuitBreaker(reset_timeout=100, max_reset_timeout=1000)
    breaker.open()
    both, draw, waits = threading.Barrier(2), random.uniform, []

    def slow(low, high):
        drawn = draw(low, high)
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(0.2)  # the other thread waits here only if it draws
        return drawn

    monkeypatch.setattr(random, "uniform", slow)

    def rejected():
        with pytest.raises(CircuitBreakerError) as caught:
            breaker.call(int)
        waits.append(caught.value.retry_after)

    at_once(rejected, rejected)
    assert waits == [breaker.retry_after] * 2


def test_the_factor_differs_between_openings_and_breakers(clock):
    """The factor is between 0.9 and 1, and not always in the same part of that range.
    (The clock stands, or two readings would differ by the time between them.)"""
    factors = []
    for _ in range(10):
        breaker = CircuitBreaker(reset_timeout=1000, max_reset_timeout=1000)
        for _ in range(20):
            breaker.open()
            factors.append(breaker.retry_after / 1000)
    assert 0.9 <= min(factors) < 0.91
    assert 0.99 < max(factors) <= 1
    assert len(set(factors)) > 100


def test_a_child_process_draws_a_factor_of_its_own(clock):
    """With the parent's factors all children of a fork would send their trials at
    once."""
    breaker = CircuitBreaker(reset_timeout=10, max_reset_timeout=100)
    breaker.open()
    waits = {breaker.retry_after}
    for _ in range(3):
        after_fork()
        waits.add(breaker.retry_after)
    assert len(waits) == 4


def test_a_breaker_that_has_yet_to_look_draws_one_factor(clock):
    """Another breaker has opened the circuit in the storage that they share."""
    storage = CircuitMemoryStorage("closed")
    first, second = (
        CircuitBreaker(
            reset_timeout=1000, max_reset_timeout=1000, state_storage=storage
        )
        for _ in range(2)
    )
    first.open()
    assert len({second.retry_after for _ in range(20)}) == 1


def test_a_timeout_of_zero_stays_zero(clock):
    """Doubling a timeout of zero gives zero."""
    breaker = CircuitBreaker(fail_max=1, reset_timeout=0, max_reset_timeout=100)
    fail(breaker)
    for _ in range(1100):  # more doublings than a float has room for
        assert breaker.retry_after == 0
        fail(breaker)
        assert breaker.current_state == "open"


@pytest.mark.parametrize("longest", [1e300, math.inf])
def test_any_number_of_failed_trials_is_safe(clock, longest):
    """Doubling the timeout overflows no number: a float has room for 33 doublings of
    this one."""
    breaker = CircuitBreaker(
        fail_max=1, reset_timeout=2.0**990, max_reset_timeout=longest
    )
    fail(breaker)
    for _ in range(40):
        breaker._state_storage.opened_at = None  # the timeout has passed
        fail(breaker)
    assert_lasts(breaker, longest)
    breaker.reset_timeout = 1
    breaker.max_reset_timeout = 5
    assert_lasts(breaker, 5)


def test_a_circuit_that_waits_for_ever_may_grow():
    """An infinite `reset_timeout` needs an infinite `max_reset_timeout`."""
    breaker = CircuitBreaker(reset_timeout=math.inf, max_reset_timeout=math.inf)
    breaker.open()
    assert breaker.retry_after == math.inf


@pytest.mark.parametrize("move", ["close", "open"])
def test_closing_and_opening_by_hand_begin_anew(clock, move):
    """The opening after a move by hand lasts as long as the first."""
    breaker = CircuitBreaker(fail_max=1, reset_timeout=10, max_reset_timeout=100)
    fail(breaker)
    fail_trials(breaker, clock, 2)
    assert_lasts(breaker, 40)
    getattr(breaker, move)()
    if move == "close":
        fail(breaker)
    assert_lasts(breaker, 10)
    fail_trials(breaker, clock, 1)
    assert_lasts(breaker, 20)


def test_a_recovery_begins_anew(clock):
    """The trial that closes the circuit forgets those that failed."""
    breaker = CircuitBreaker(fail_max=1, reset_timeout=10, max_reset_timeout=100)
    fail(breaker)
    fail_trials(breaker, clock, 2)
    until_the_trial(breaker, clock)
    succeed(breaker)
    fail(breaker)
    assert_lasts(breaker, 10)


def test_a_successful_trial_in_between_changes_nothing(clock):
    """Two successes are needed, and the second trial fails."""
    breaker = CircuitBreaker(
        fail_max=1, reset_timeout=10, max_reset_timeout=100, success_threshold=2
    )
    fail(breaker)
    fail_trials(breaker, clock, 1)
    until_the_trial(breaker, clock)
    succeed(breaker)
    fail(breaker)
    assert_lasts(breaker, 40)


def test_half_opening_by_hand_leaves_the_number_of_failed_trials(clock):
    """A half-opening by hand neither closes nor opens, and so forgets no failed
    trial."""
    breaker = CircuitBreaker(fail_max=1, reset_timeout=10, max_reset_timeout=100)
    fail(breaker)
    fail_trials(breaker, clock, 1)
    breaker.half_open()
    fail(breaker)
    assert_lasts(breaker, 40)


def growing_ones(number):
    """Breakers over one storage, in which each failed trial doubles the wait."""
    storage = CircuitMemoryStorage("closed")
    return [
        CircuitBreaker(
            fail_max=1, reset_timeout=10, max_reset_timeout=100, state_storage=storage
        )
        for _ in range(number)
    ]


def test_half_opening_by_hand_counts_the_trials_of_breakers_that_share_the_storage(
    clock,
):
    """An operator half-opens the circuit by a breaker that has made no call since the
    circuit opened, in a process that is idle, say."""
    works, idles = growing_ones(2)
    fail(works)
    fail_trials(works, clock, 2)
    idles.half_open()
    fail(idles)
    assert_lasts(idles, 80)
    assert_lasts(works, 80)


def test_a_half_opening_that_is_found_leaves_the_number_of_failed_trials(clock):
    """A test half-opens the circuit by writing the state, which closes nothing."""
    breaker = CircuitBreaker(fail_max=1, reset_timeout=10, max_reset_timeout=100)
    fail(breaker)
    fail_trials(breaker, clock, 1)
    breaker._state_storage.state = "half-open"
    fail(breaker)
    assert breaker.current_state == "open"
    assert_lasts(breaker, 40)


def test_the_numbers_that_hold_are_the_present_ones(clock):
    """New settings hold for an opening that lasts already, too; its factor stays."""
    breaker = CircuitBreaker(fail_max=1, reset_timeout=10, max_reset_timeout=100)
    fail(breaker)
    fail_trials(breaker, clock, 2)
    factor = breaker.retry_after / 40
    breaker.reset_timeout = 20
    assert breaker.retry_after == pytest.approx(80 * factor)
    breaker.max_reset_timeout = 50
    assert breaker.retry_after == pytest.approx(50 * factor)
    breaker.max_reset_timeout = None
    assert breaker.retry_after == 20
    breaker.max_reset_timeout = 1000
    assert breaker.retry_after == pytest.approx(80 * factor)


def test_growth_counts_the_trials_of_all_breakers_that_share_a_memory_storage(clock):
    """Each failed trial adds one, whichever of the breakers runs the trial."""
    first, second, third = growing_ones(3)
    fail(first)
    fail_trials(second, clock, 1)
    assert_lasts(first, 20)
    fail_trials(first, clock, 1)
    assert_lasts(third, 40)
    storage = first._state_storage
    made_later = CircuitBreaker(
        reset_timeout=10, max_reset_timeout=100, state_storage=storage
    )
    assert_lasts(made_later, 40)
    made_later.close()
    fail(second)
    assert_lasts(first, 10)


def test_a_breaker_that_missed_a_trial_sees_that_the_opening_grew(clock):
    """Both trials failed for the same reason, and this breaker saw only the first."""
    runs_trials, looks_on = growing_ones(2)
    fail(runs_trials)
    fail_trials(runs_trials, clock, 1)
    reason = looks_on.state.reason
    assert_lasts(looks_on, 20)
    fail_trials(runs_trials, clock, 1)
    assert looks_on.state.reason == reason
    assert_lasts(looks_on, 40)


# The trial's place.


def test_a_trial_may_hold_its_place_as_long_as_the_opening_grew(clock):
    """The settings at the time of asking decide how long, and there is no factor."""
    breaker = CircuitBreaker(fail_max=1, reset_timeout=10, max_reset_timeout=100)
    fail(breaker)
    fail_trials(breaker, clock, 2)
    until_the_trial(breaker, clock)

    def hang():
        assert rejection(breaker).retry_after == 40
        breaker.max_reset_timeout = 30
        assert rejection(breaker).retry_after == 30
        breaker.reset_timeout = 5
        assert rejection(breaker).retry_after == 20
        clock.advance(19)
        assert rejection(breaker).retry_after == 1
        clock.advance(1)
        assert breaker.retry_after == 0
        contextvars.Context().run(breaker.call, int)

    breaker.call(hang)
    assert breaker.current_state == "closed"


@pytest.mark.parametrize("seconds", [0, 5, 500])
def test_the_length_of_an_opening_does_not_change_how_long_its_trial_may_take(
    clock, seconds
):
    """`open(seconds)` says when the trial may begin."""
    breaker = CircuitBreaker(reset_timeout=10, max_reset_timeout=100)
    breaker.open(seconds)
    clock.advance(seconds)

    def trial():
        assert rejection(breaker).retry_after == 10

    breaker.call(trial)


class Grants(CircuitMemoryStorage):
    """Grants each trial, and remembers the seconds that each was asked for."""

    def __init__(self):
        super().__init__("closed")
        self.granted = []

    def claim_trial(self, timeout):
        self.granted.append(timeout)
        return True


@pytest.mark.parametrize("way", [guards.by_call, guards.by_coroutine])
def test_the_storage_is_asked_for_a_trial_as_long_as_that_may_hold_its_place(
    clock, way
):
    """The time that is asked for grows; it has no factor, and no part of an opening by
    hand."""
    storage = Grants()
    breaker = CircuitBreaker(
        fail_max=1, reset_timeout=10, max_reset_timeout=30, state_storage=storage
    )
    fail(breaker)
    for _ in range(3):
        until_the_trial(breaker, clock)
        with pytest.raises(CircuitBreakerError):
            way(breaker, boom)
    breaker.open(500)
    until_the_trial(breaker, clock)
    way(breaker, int)
    assert storage.granted == [10, 20, 30, 10]


@pytest.mark.parametrize("context", [contextvars.Context, contextvars.copy_context])
def test_the_place_is_taken_from_the_very_moment_when_the_opening_ends(clock, context):
    """The storage has not answered the first trial's claim. The next call is rejected
    for as long as that trial may hold its place, in the trial's own context as well, as
    the trial has yet to begin."""
    waits = []

    class Thinks(CircuitMemoryStorage):
        def claim_trial(self, timeout):
            if not waits:
                waits.append(None)  # otherwise the other call's claim would ask again
                with pytest.raises(CircuitBreakerError) as caught:
                    context().run(breaker.call, int)
                waits[:] = [caught.value.retry_after]
            return True

    breaker = CircuitBreaker(reset_timeout=60, state_storage=Thinks("closed"))
    breaker.open(10)
    clock.advance(10)
    assert succeed(breaker) == 0
    assert waits == [60]


# What does not go together.


def test_a_longest_timeout_below_the_first_is_refused_by_whichever_comes_second():
    """The error names both settings, and neither has changed."""
    both = "reset_timeout.*max_reset_timeout.*reset_timeout 60, max_reset_timeout 59"
    with pytest.raises(ValueError, match=both):
        CircuitBreaker(reset_timeout=60, max_reset_timeout=59)
    breaker = CircuitBreaker(reset_timeout=59, max_reset_timeout=59)
    with pytest.raises(ValueError, match=both):
        breaker.reset_timeout = 60
    assert breaker.reset_timeout == 59
    breaker = CircuitBreaker(reset_timeout=60)
    with pytest.raises(ValueError, match=both):
        breaker.max_reset_timeout = 59
    assert breaker.max_reset_timeout is None
    breaker.max_reset_timeout = 60
    breaker.max_reset_timeout = math.inf
    assert breaker.max_reset_timeout == math.inf


@pytest.mark.parametrize(
    "kind, value",
    [
        (TypeError, "60"),
        (TypeError, True),
        (TypeError, [60]),
        (ValueError, -1),
        (ValueError, math.nan),
        (ValueError, -math.inf),
        (ValueError, 10**400),
    ],
)
def test_what_is_no_longest_timeout_is_refused(kind, value):
    """The error names the parameter and the value; a setter changes nothing."""
    with pytest.raises(kind, match="max_reset_timeout") as caught:
        CircuitBreaker(reset_timeout=0, max_reset_timeout=value)
    assert repr(value) in str(caught.value)
    breaker = CircuitBreaker(max_reset_timeout=100)
    with pytest.raises(kind, match="max_reset_timeout"):
        breaker.max_reset_timeout = value
    assert breaker.max_reset_timeout == 100


# By hand, for so many seconds.


@pytest.mark.parametrize("settings", [{}, {"max_reset_timeout": 60}], ids=str)
def test_an_opening_by_hand_lasts_as_many_seconds_as_it_was_given(clock, settings):
    """The length is exact whatever `reset_timeout` is or becomes, and does not grow."""
    breaker = CircuitBreaker(reset_timeout=60, **settings)
    breaker.open(300)
    assert breaker.retry_after == 300
    breaker.reset_timeout = 7
    assert breaker.retry_after == 300
    clock.advance(299)
    assert rejection(breaker).retry_after == 1
    clock.advance(1)
    succeed(breaker)
    assert breaker.current_state == "closed"


def test_an_opening_of_no_length_admits_a_trial_at_once():
    """0 is a number of seconds."""
    breaker = CircuitBreaker()
    breaker.open(0)
    assert (breaker.current_state, breaker.retry_after) == ("open", 0)
    succeed(breaker)
    assert breaker.current_state == "closed"


def test_an_opening_without_end_lasts_until_the_circuit_is_moved(clock):
    """Each of the three moves ends such an opening."""
    breaker = CircuitBreaker(reset_timeout=1)
    breaker.open(math.inf)
    clock.advance(1e9)
    assert rejection(breaker).retry_after == math.inf
    breaker.open()
    assert breaker.retry_after == 1
    breaker.open(seconds=math.inf)
    breaker.half_open()
    succeed(breaker)
    assert breaker.current_state == "closed"


def test_the_length_belongs_to_one_opening(clock):
    """The trial that fails afterwards opens the circuit for `reset_timeout`, or what
    growth makes of that."""
    breaker = CircuitBreaker(reset_timeout=10)
    breaker.open(300)
    fail_trials(breaker, clock, 1)
    assert breaker.retry_after == 10
    breaker.max_reset_timeout = 100
    breaker.open(300)
    fail_trials(breaker, clock, 1)
    assert_lasts(breaker, 20)


def test_the_length_holds_for_all_breakers_of_a_memory_storage(clock):
    """A breaker may be made before the opening or after."""
    storage = CircuitMemoryStorage("closed")
    first, second = (CircuitBreaker(state_storage=storage) for _ in range(2))
    first.open(300, "maintenance")
    for breaker in (second, CircuitBreaker(state_storage=storage)):
        assert breaker.retry_after == 300
        assert breaker.snapshot()["retry_after"] == 300
        assert breaker.state.reason == "maintenance"
        assert breaker.retry_after == 300
        assert rejection(breaker).reason == "maintenance"


def test_an_opening_that_follows_an_opening_holds_for_all_breakers(clock):
    """The other breaker finds the circuit open as before, for another reason and
    another time."""
    storage = CircuitMemoryStorage("closed")
    first, second = (CircuitBreaker(state_storage=storage) for _ in range(2))
    first.open(5, "first")
    assert rejection(second).reason == "first"
    first.open(300, "second")
    assert rejection(second).retry_after == 300
    assert rejection(second).reason == "second"
    assert second.state.reason == "second"


@pytest.mark.parametrize("second", [(9, "first"), (5, "second")], ids=str)
def test_an_opening_differs_from_the_one_before_by_its_time_or_its_reason(
    clock, second
):
    """A breaker that found both openings in the storage tells them apart by either."""
    storage = CircuitMemoryStorage("closed")
    mover, finder = (CircuitBreaker(state_storage=storage) for _ in range(2))
    for seconds, reason in ((5, "first"), second):
        mover.open(seconds, reason)
        error = rejection(finder)
        assert (error.retry_after, error.reason) == (seconds, reason)
        assert (finder.retry_after, finder.state.reason) == (seconds, reason)


@pytest.mark.parametrize(
    "kind, value",
    [
        (TypeError, "60"),
        (TypeError, True),
        (ValueError, -1),
        (ValueError, math.nan),
        (ValueError, 10**400),
    ],
)
def test_what_is_no_number_of_seconds_is_refused(kind, value):
    """The error names the parameter and the value, and the circuit has not moved."""
    breaker = CircuitBreaker()
    with pytest.raises(kind, match="seconds") as caught:
        breaker.open(value)
    assert repr(value) in str(caught.value)
    assert breaker.current_state == "closed"


@pytest.mark.parametrize("move", ["open", "half_open", "close"])
def test_what_is_no_reason_is_refused(move):
    """The error names the parameter and the value, and the circuit has not moved."""
    breaker = CircuitBreaker()
    state = breaker.state
    for value in (b"why", 3, ["why"]):
        with pytest.raises(TypeError, match="reason") as caught:
            getattr(breaker, move)(reason=value)
        assert repr(value) in str(caught.value)
    assert breaker.state is state


def test_only_an_opening_takes_seconds():
    """half_open() and close() take a reason, by position as well."""
    breaker = CircuitBreaker()
    breaker.open(5, "first")
    breaker.half_open("second")
    assert breaker.state.reason == "second"
    breaker.close("third")
    assert breaker.state.reason == "third"
    with pytest.raises(TypeError):
        breaker.close(seconds=5)


# A listener that opens for as long as the service asked.


class Unavailable(Exception):
    def __init__(self, retry_after):
        super().__init__(retry_after)
        self.retry_after = retry_after


class Obeys:
    """Opens the circuit for as long as the service asked."""

    def failure(self, cb, exc):
        if isinstance(exc, Unavailable):
            cb.open(exc.retry_after, f"the service asked for {exc.retry_after} s")


@pytest.mark.parametrize("fail_max", [1, 5])
def test_a_listener_may_open_at_once_for_as_long_as_the_service_asked(clock, fail_max):
    """The caller gets the function's own exception, even where that failure would
    have opened the circuit."""
    breaker = CircuitBreaker(fail_max=fail_max, listeners=[Obeys()])
    exc = Unavailable(120)

    def unavailable():
        raise exc

    with pytest.raises(Unavailable) as caught:
        breaker.call(unavailable)
    assert caught.value is exc
    assert (breaker.current_state, breaker.retry_after) == ("open", 120)
    assert rejection(breaker).reason == "the service asked for 120 s"


def test_failures_that_end_after_such_an_opening_are_late(clock):
    """Such failures neither count nor shorten the opening."""
    breaker = CircuitBreaker(fail_max=2, reset_timeout=10, listeners=[Obeys()])

    def unavailable():
        raise Unavailable(120)

    def slow():
        with pytest.raises(Unavailable):
            breaker.call(unavailable)
        boom()

    assert type(fail(breaker)).__name__ == "Boom"
    breaker.close()
    with pytest.raises(Exception, match="^$") as caught:
        breaker.call(slow)
    assert not isinstance(caught.value, CircuitBreakerError)
    assert (breaker.fail_counter, breaker.retry_after) == (1, 120)


def test_a_listener_may_open_for_as_long_as_asked_when_a_trial_fails(clock):
    """The opening by the listener is by hand, so the failed trials before are
    forgotten."""
    breaker = CircuitBreaker(
        fail_max=1, reset_timeout=10, max_reset_timeout=100, listeners=[Obeys()]
    )
    fail(breaker)
    fail_trials(breaker, clock, 3)
    until_the_trial(breaker, clock)

    def unavailable():
        raise Unavailable(120)

    with pytest.raises(Unavailable):
        breaker.call(unavailable)
    assert breaker.retry_after == 120
    fail_trials(breaker, clock, 1)
    assert_lasts(breaker, 20)


# Subclasses that override the moves.


def test_an_opening_by_a_listener_of_an_opening_is_one_by_hand(clock):
    """A trial failed and the circuit opened; the listener that is told of this opens
    the circuit once more. The second opening is by hand, so growth begins anew."""
    storage = CircuitMemoryStorage("closed")

    class Reopens:
        def state_change(self, cb, old_state, new_state):
            if (old_state.name, new_state.name) == ("half-open", "open"):
                cb.open()

    breaker = CircuitBreaker(
        fail_max=1,
        reset_timeout=10,
        max_reset_timeout=100,
        state_storage=storage,
        listeners=[Reopens()],
    )
    fail(breaker)
    fail_trials(breaker, clock, 2)
    assert (storage.last_move().by, breaker.state.reason) == ("hand", "by hand")
    assert_lasts(breaker, 10)


class TakesNothing(CircuitBreaker):
    """A subclass as it was written before moves took arguments."""

    def __init__(self, **settings):
        self.moves = []
        super().__init__(**settings)

    def open(self):
        self.moves.append("open")
        return super().open()

    def half_open(self):
        self.moves.append("half_open")
        super().half_open()

    def close(self):
        self.moves.append("close")
        super().close()


def test_the_library_calls_the_moves_without_arguments(clock):
    """Overrides without parameters keep working, and so do growth and reasons."""
    breaker = TakesNothing(fail_max=1, reset_timeout=10, max_reset_timeout=100)
    fail(breaker)
    assert breaker.state.reason == "a failure: Boom()"
    fail_trials(breaker, clock, 1)
    assert_lasts(breaker, 20)
    until_the_trial(breaker, clock)
    succeed(breaker)
    breaker.state = "open"
    breaker.state = "half-open"
    breaker.state = "closed"
    moves = ["open", "half_open", "open", "half_open", "close"]
    assert breaker.moves == [*moves, "open", "half_open", "close"]


class Passes(CircuitBreaker):
    """Passes seconds and reasons of its own on."""

    def open(self, seconds=None, reason=None):
        return super().open(seconds, reason or "as the subclass says")

    def half_open(self, reason=None):
        super().half_open(reason or "half, as the subclass says")

    def close(self, reason=None):
        super().close(reason or "closed, as the subclass says")


class Remembers(CircuitMemoryStorage):
    """Remembers the moves that it was told of."""

    def __init__(self):
        super().__init__("closed")
        self.moves = []

    def move(self, move):
        self.moves.append((move.state, move.by, move.reason))
        super().move(move)


def test_an_override_that_passes_a_reason_on_does_not_change_who_moved(clock):
    """The trip is by the count, and the failed trial adds one to the growth."""
    storage = Remembers()
    breaker = Passes(
        fail_max=1, reset_timeout=10, max_reset_timeout=100, state_storage=storage
    )
    fail(breaker)
    fail_trials(breaker, clock, 2)
    assert_lasts(breaker, 40)
    until_the_trial(breaker, clock)
    succeed(breaker)
    opened = "as the subclass says"
    halved = "half, as the subclass says"
    assert storage.moves == [
        ("open", "count", opened),
        *2 * [("half-open", "trial", halved), ("open", "outcome", opened)],
        ("half-open", "trial", halved),
        ("closed", "outcome", "closed, as the subclass says"),
    ]


class Longer(CircuitBreaker):
    def open(self, seconds=None, reason=None):
        return super().open(30 if seconds is None else seconds, reason)


def test_an_override_that_passes_seconds_on_does_not_change_who_moved(clock):
    """The opening lasts as long as the override says, and failed trials still count."""
    breaker = Longer(fail_max=1, reset_timeout=10, max_reset_timeout=1000)
    error = fail(breaker)
    assert isinstance(error, CircuitBreakerError)
    assert error.retry_after == 30
    assert breaker.state.reason == "a failure: Boom()"
    fail_trials(breaker, clock, 3)
    assert breaker.retry_after == 30
    until_the_trial(breaker, clock)

    def trial():
        assert rejection(breaker).retry_after == 80

    breaker.call(trial)


def test_an_override_may_make_another_move_before_its_own(recorder):
    """The first move is a closing, although open() was called, and the second an
    opening."""

    class ClosesFirst(CircuitBreaker):
        def open(self):
            self.close()
            return super().open()

    breaker = ClosesFirst(fail_max=1, listeners=[recorder])
    assert isinstance(fail(breaker), CircuitBreakerError)
    assert recorder.transitions == [("closed", "closed"), ("closed", "open")]


def test_an_override_that_does_not_move_leaves_nothing_behind():
    """A later move by hand is by hand."""

    class Stubborn(CircuitBreaker):
        may_open = False

        def open(self, seconds=None, reason=None):
            return self.may_open and super().open(seconds, reason)

    breaker = Stubborn(fail_max=1)
    fail(breaker)
    assert breaker.current_state == "closed"
    breaker.may_open = True
    breaker.open()
    assert breaker.state.reason == "by hand"


def test_retry_after_of_a_closed_circuit_with_growth_takes_no_factor():
    """A closed circuit has nothing to wait for, and admits calls without the lock."""
    breaker = CircuitBreaker(max_reset_timeout=100)
    assert breaker.retry_after == 0
    assert while_locked(breaker, breaker.call, int) == 0


@guards.every_way
def test_a_quiet_rejection_goes_by_an_opening_that_another_breaker_made(way, clock):
    """The rejecting breaker found the first opening, and nothing has made it look at
    the storage since the second."""
    storage = CircuitMemoryStorage("closed")
    mover, finder = (CircuitBreaker(state_storage=storage) for _ in range(2))
    for seconds in (5, 300):
        mover.open(seconds)
        with pytest.raises(CircuitBreakerError) as caught:
            way(finder, int)
        assert caught.value.retry_after == seconds


def test_adding_a_listener_hides_no_opening_that_another_breaker_made(clock):
    storage = CircuitMemoryStorage("closed")
    mover, finder = (CircuitBreaker(state_storage=storage) for _ in range(2))
    mover.open(5, "first")
    assert finder.state.reason == "first"
    mover.open(300, "second")
    finder.add_listener(CircuitBreakerListener())
    assert rejection(finder).retry_after == 300
    assert finder.state.reason == "second"
