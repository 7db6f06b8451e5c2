"""When a failure is forgotten: `window_size`, `window_seconds` and `fail_counter`."""

from __future__ import annotations

import itertools
import math
import sys
import threading
import time

import guards
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import DEEP, PATIENCE, at_once, boom, fail, locks_taken, while_locked

import pybreaker
from pybreaker import CircuitBreaker, CircuitMemoryStorage


def succeed(breaker, times=1):
    for _ in range(times):
        breaker.call(int)


def abandon(breaker):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        breaker.call(interrupted)


# In a row.


def test_without_a_window_a_success_forgets_all_failures():
    """Neither the number of calls nor time forgets a failure."""
    breaker = CircuitBreaker(fail_max=3)
    fail(breaker, 2)
    assert breaker.fail_counter == 2
    succeed(breaker)
    assert breaker.fail_counter == 0


def test_without_a_window_time_forgets_nothing(clock):
    """Failures with no success in between are in a row, however far apart in time."""
    breaker = CircuitBreaker(fail_max=3)
    fail(breaker, 2)
    clock.advance(1e6)
    assert breaker.fail_counter == 2
    fail(breaker)
    assert breaker.current_state == "open"


# A window of calls.


@guards.every_way
def test_in_a_window_of_calls_a_success_forgets_no_failure_by_itself(way):
    """A failure is forgotten when `window_size` calls were counted after it."""
    breaker = CircuitBreaker(fail_max=2, window_size=4)
    with pytest.raises(Exception, match="^$"):
        way(breaker, boom)
    counts = []
    for _ in range(4):
        way(breaker, int)
        counts.append(breaker.fail_counter)
    assert counts == [1, 1, 1, 0]


@guards.every_way
def test_excluded_exceptions_count_as_calls(way):
    """Excluded exceptions are successes, and push failures out of the window."""
    breaker = CircuitBreaker(fail_max=2, window_size=2, exclude=[KeyError])
    fail(breaker)
    for count in (1, 0):
        with pytest.raises(KeyError):
            way(breaker, {}.popitem)
        assert breaker.fail_counter == count


def test_a_failure_pushes_an_older_one_out_of_the_window():
    """The third failure is one of only two failures in the last four calls."""
    breaker = CircuitBreaker(fail_max=3, window_size=4)
    fail(breaker, 2)
    succeed(breaker, 3)
    assert breaker.fail_counter == 1
    fail(breaker)
    assert breaker.fail_counter == 1
    assert breaker.current_state == "closed"


def test_half_of_fifty_calls_open_the_circuit():
    """25 failures in 49 calls, every second call, are enough, and 24 failures are
    not."""
    breaker = CircuitBreaker(fail_max=25, window_size=50)
    for _ in range(24):
        fail(breaker)
        succeed(breaker)
    assert (breaker.current_state, breaker.fail_counter) == ("closed", 24)
    fail(breaker)
    assert breaker.current_state == "open"


def test_one_failure_in_three_does_not_open_the_circuit():
    """Fewer than half of the last fifty calls fail, however many calls there are."""
    breaker = CircuitBreaker(fail_max=25, window_size=50)
    for _ in range(200):
        fail(breaker)
        succeed(breaker, 2)
    assert breaker.current_state == "closed"
    assert breaker.fail_counter in (16, 17)


def test_a_window_without_end_forgets_only_when_the_circuit_closes():
    """`math.inf` calls are all calls of the era."""
    breaker = CircuitBreaker(fail_max=3, window_size=math.inf)
    fail(breaker, 2)
    succeed(breaker, 500)
    assert breaker.fail_counter == 2
    fail(breaker)
    assert breaker.current_state == "open"


def test_a_window_of_one_call_remembers_the_last_one():
    """One success forgets the failure before it, unless that failure opened the
    circuit."""
    breaker = CircuitBreaker(fail_max=1, window_size=1)
    breaker.fail_counter = 1
    succeed(breaker)
    assert breaker.fail_counter == 0


# A window of time.


def test_a_failure_is_forgotten_so_many_seconds_after_it_was_counted(clock):
    """The failure is remembered until that moment, and forgotten then."""
    breaker = CircuitBreaker(fail_max=9, window_seconds=30)
    fail(breaker)
    clock.advance(10)
    fail(breaker, 4)
    clock.advance(19.5)
    assert breaker.fail_counter == 5
    clock.advance(0.5)
    assert breaker.fail_counter == 4
    clock.advance(10)
    assert breaker.fail_counter == 0


@pytest.mark.parametrize("more", [0, 1])
def test_the_newest_failures_stand_where_other_code_has_lowered_the_count(clock, more):
    """Of four failures the storage has only one left, which is the last."""
    breaker = CircuitBreaker(fail_max=9, window_seconds=30)
    for _ in range(4):
        clock.advance(5)
        fail(breaker)
    breaker._state_storage.counter = 1
    clock.advance(5)
    fail(breaker, more)
    assert breaker.fail_counter == 1 + more
    clock.advance(24.5)
    assert breaker.fail_counter == 1 + more
    clock.advance(0.5)
    assert breaker.fail_counter == more


def test_what_time_has_forgotten_opens_nothing(clock):
    """There are three failures, and only two of them are recent enough to count."""
    breaker = CircuitBreaker(fail_max=3, window_seconds=30)
    fail(breaker)
    clock.advance(20)
    fail(breaker)
    clock.advance(10)
    fail(breaker)
    assert (breaker.current_state, breaker.fail_counter) == ("closed", 2)
    clock.advance(19)
    fail(breaker)
    assert breaker.current_state == "open"


def test_a_window_of_time_alone_is_still_in_a_row(clock):
    """A success forgets all failures."""
    breaker = CircuitBreaker(fail_max=3, window_seconds=30)
    fail(breaker, 2)
    succeed(breaker)
    assert breaker.fail_counter == 0


def test_with_both_windows_a_failure_is_forgotten_by_whichever_comes_first(clock):
    """Four calls forget the failure, or thirty seconds."""
    breaker = CircuitBreaker(fail_max=3, window_size=4, window_seconds=30)
    fail(breaker)
    clock.advance(20)
    fail(breaker)
    succeed(breaker, 2)
    assert breaker.fail_counter == 2
    clock.advance(10)
    assert breaker.fail_counter == 1  # the older one by its time
    succeed(breaker, 2)
    assert breaker.fail_counter == 0  # the other by four calls after it


@pytest.mark.parametrize("seconds", [0.5, 870])
def test_a_clock_that_goes_back_is_another_clock(clock, seconds):
    """A failure is not remembered until the new clock reaches the old moment."""
    breaker = CircuitBreaker(fail_max=3, window_seconds=30)
    fail(breaker)
    clock.advance(-seconds)
    assert breaker.fail_counter == 0
    fail(breaker, 2)
    assert breaker.fail_counter == 2


# Which calls are counted.


def test_abandoned_calls_are_not_counted():
    """Abandoned calls push no failure out of the window."""
    breaker = CircuitBreaker(fail_max=2, window_size=2)
    fail(breaker)
    for _ in range(5):
        abandon(breaker)
    succeed(breaker)
    assert breaker.fail_counter == 1


def test_ignored_exceptions_are_not_counted():
    """A call that raises an ignored exception pushes no failure out of the window."""
    breaker = CircuitBreaker(fail_max=2, window_size=2, ignore=[KeyError])
    fail(breaker)
    for _ in range(5):
        with pytest.raises(KeyError):
            breaker.call({}.popitem)
    succeed(breaker)
    assert breaker.fail_counter == 1


def test_late_calls_are_not_counted():
    """Calls of an earlier closed era push no failure of the present one out."""
    breaker = CircuitBreaker(fail_max=2, window_size=2)

    def late():
        breaker.close()
        fail(breaker)

    breaker.call(late)
    breaker.call(breaker.call, int)  # two calls, one inside the other
    assert breaker.fail_counter == 0

    def late_after_two_more():
        breaker.close()
        fail(breaker)
        succeed(breaker)

    breaker.call(late_after_two_more)
    assert breaker.fail_counter == 1


def test_calls_are_counted_in_the_order_in_which_they_are_settled():
    """A call that began before a failure and ends after it counts after it."""
    breaker = CircuitBreaker(fail_max=2, window_size=2)

    def slow():
        fail(breaker)

    breaker.call(slow)
    assert breaker.fail_counter == 1
    succeed(breaker)
    assert breaker.fail_counter == 0


# Eras.


@pytest.mark.parametrize(
    "window", [{"window_size": 4}, {"window_seconds": 30}], ids=str
)
def test_closing_forgets_everything(window):
    """This holds for closing by hand, by a trial, and of a circuit that is closed
    already."""
    breaker = CircuitBreaker(fail_max=3, reset_timeout=0, **window)
    fail(breaker, 2)
    breaker.close()
    assert breaker.fail_counter == 0
    fail(breaker, 3)
    assert breaker.current_state == "open"
    succeed(breaker)
    assert (breaker.current_state, breaker.fail_counter) == ("closed", 0)


def test_each_closed_era_has_its_window(clock):
    """After a recovery calls and time forget failures as before."""
    breaker = CircuitBreaker(fail_max=3, window_size=4, window_seconds=30)
    for _ in range(3):
        fail(breaker)
        succeed(breaker, 3)
        assert breaker.fail_counter == 1
        succeed(breaker)
        assert breaker.fail_counter == 0
        fail(breaker)
        clock.advance(30)
        assert breaker.fail_counter == 0
        fail(breaker, 3)
        assert breaker.current_state == "open"
        clock.advance(60)
        succeed(breaker)
        assert breaker.current_state == "closed"


def test_a_state_that_is_driven_by_hand_takes_nothing_from_the_era_after_it(clock):
    """A failure that only the old state remembers is forgotten with time, and the
    failures of the new state are not."""
    breaker = CircuitBreaker(fail_max=3, window_seconds=60)
    old = breaker.state
    fail(breaker)
    clock.advance(30)
    fail(breaker)
    breaker.close()
    clock.advance(40)
    fail(breaker, 2)
    old.on_failure(Exception())
    assert breaker.fail_counter == 2


@pytest.mark.parametrize("move", ["open", "half_open"])
def test_in_another_state_time_forgets_nothing(clock, move):
    """`fail_counter` stands as it was when the circuit left the closed state."""
    breaker = CircuitBreaker(fail_max=3, window_seconds=30)
    fail(breaker)
    clock.advance(20)
    fail(breaker)
    getattr(breaker, move)()
    clock.advance(3600)
    assert breaker.fail_counter == 2


def test_what_was_forgotten_before_the_opening_does_not_come_back(clock):
    """The count in the open state is the one that was read before the opening."""
    breaker = CircuitBreaker(fail_max=3, window_seconds=30)
    fail(breaker)
    clock.advance(20)
    fail(breaker)
    clock.advance(10)
    assert breaker.fail_counter == 1
    breaker.open()
    assert breaker.fail_counter == 1


def test_a_trip_leaves_the_count_that_opened_the_circuit(clock):
    """Time that passes after the trip forgets none of its failures."""
    breaker = CircuitBreaker(fail_max=3, window_size=5, window_seconds=30)
    fail(breaker, 3)
    clock.advance(1000)
    assert (breaker.current_state, breaker.fail_counter) == ("open", 3)


def test_the_trip_is_decided_on_what_is_true_after_the_failure_was_told(clock):
    """A listener that takes its time lets the first failure be forgotten."""

    class Slow:
        def failure(self, cb, exc):
            clock.advance(20)

    breaker = CircuitBreaker(fail_max=2, window_seconds=30, listeners=[Slow()])
    fail(breaker, 2)
    assert (breaker.current_state, breaker.fail_counter) == ("closed", 1)


# Setting fail_counter.


def test_a_count_that_is_set_is_so_many_failures_counted_just_now(clock):
    """Such failures are forgotten after as many calls and seconds as any."""
    breaker = CircuitBreaker(fail_max=3, window_size=4, window_seconds=30)
    fail(breaker)
    clock.advance(20)
    breaker.fail_counter = 2
    clock.advance(29)
    assert breaker.fail_counter == 2
    succeed(breaker, 2)
    assert breaker.fail_counter == 2
    succeed(breaker)
    assert breaker.fail_counter == 1
    clock.advance(1)
    assert breaker.fail_counter == 0


def test_with_a_window_the_count_can_be_set_to_at_most_fail_max():
    """A higher count is refused with both numbers, and changes nothing."""
    breaker = CircuitBreaker(fail_max=3, window_size=5)
    fail(breaker)
    with pytest.raises(ValueError, match="fail_counter .*fail_max, 3.* 4"):
        breaker.fail_counter = 4
    assert breaker.fail_counter == 1
    breaker.fail_counter = 3
    assert (breaker.current_state, breaker.fail_counter) == ("closed", 3)


def test_setting_the_count_to_zero_forgets_all():
    """The next failure after that is the first."""
    breaker = CircuitBreaker(fail_max=3, window_size=5)
    fail(breaker, 2)
    breaker.fail_counter = 0
    fail(breaker, 2)
    assert (breaker.current_state, breaker.fail_counter) == ("closed", 2)


@pytest.mark.parametrize("listener", [False, True])
def test_only_a_failure_opens_the_circuit(listener):
    """Setting the count to the limit does not open the circuit. Neither does a success
    at that count, whether a listener is told of the success or not."""

    class Hears:
        def success(self, cb):
            assert cb.fail_counter == 3

    breaker = CircuitBreaker(
        fail_max=3, window_size=10, listeners=[Hears()] if listener else None
    )
    breaker.fail_counter = 3
    succeed(breaker)
    assert (breaker.current_state, breaker.fail_counter) == ("closed", 3)
    fail(breaker)
    assert breaker.current_state == "open"


def test_a_failure_that_was_counted_by_hand_is_forgotten_like_any_other():
    """Code in the field counts through `_inc_counter()` and `on_failure()`."""
    breaker = CircuitBreaker(fail_max=3, window_size=4)
    with breaker._lock:
        breaker._inc_counter()
        breaker.state.on_failure(ValueError())
    assert breaker.fail_counter == 1
    succeed(breaker, 5)
    assert breaker.fail_counter == 0


def test_a_failure_that_was_counted_by_hand_is_forgotten_after_its_time(clock):
    """The first call may come long afterwards."""
    breaker = CircuitBreaker(fail_max=3, window_seconds=30)
    with breaker._lock:
        breaker._inc_counter()
        breaker.state.on_failure(ValueError())
    clock.advance(30)
    assert breaker.fail_counter == 0


# Switching windows on and off, and changing them.


def test_a_window_of_time_that_is_switched_on_takes_the_count_as_of_now(clock):
    """The failures are forgotten as late as if they were counted just now."""
    breaker = CircuitBreaker(fail_max=5)
    fail(breaker, 2)
    clock.advance(1000)
    breaker.window_seconds = 30
    assert breaker.fail_counter == 2
    clock.advance(29)
    assert breaker.fail_counter == 2
    clock.advance(1)
    assert breaker.fail_counter == 0


def test_a_window_of_calls_that_is_switched_on_takes_the_count_as_of_now():
    """The failures are the last calls that were counted."""
    breaker = CircuitBreaker(fail_max=4)
    fail(breaker, 2)
    breaker.window_size = 5
    succeed(breaker, 3)
    assert breaker.fail_counter == 2
    succeed(breaker)
    assert breaker.fail_counter == 1
    succeed(breaker)
    assert breaker.fail_counter == 0


@pytest.mark.parametrize("state", ["open", "half-open"])
def test_a_window_can_be_switched_on_in_any_state(state):
    """The window holds in the closed era that follows."""
    breaker = CircuitBreaker(fail_max=2)
    breaker.state = state
    breaker.window_size = 2
    breaker.close()
    fail(breaker)
    succeed(breaker)
    assert breaker.fail_counter == 1
    succeed(breaker)
    assert breaker.fail_counter == 0


def test_a_count_at_the_limit_that_time_has_forgotten_leaves_room(clock):
    """The count was set to the limit, and time has forgotten it. The next failure is
    the first."""
    breaker = CircuitBreaker(fail_max=3, window_seconds=10)
    breaker.fail_counter = 3
    clock.advance(10)
    fail(breaker)
    assert (breaker.current_state, breaker.fail_counter) == ("closed", 1)


def test_a_window_can_be_switched_on_while_a_call_is_late():
    """The late call returns what the function returned."""
    breaker = CircuitBreaker(fail_max=2)

    def slow():
        breaker.open()
        breaker.window_size = 5
        return "result"

    assert breaker.call(slow) == "result"


def test_a_window_that_is_switched_off_leaves_failures_in_a_row():
    """The failures that are remembered stay, and the next success forgets them."""
    breaker = CircuitBreaker(fail_max=4, window_size=10)
    fail(breaker)
    succeed(breaker)
    fail(breaker)
    breaker.window_size = None
    assert breaker.fail_counter == 2
    succeed(breaker)
    assert breaker.fail_counter == 0


@pytest.mark.parametrize("seconds", [None, 1000], ids=["off", "longer"])
def test_a_longer_time_brings_no_failure_back(clock, seconds):
    """A failure that was forgotten stays forgotten."""
    breaker = CircuitBreaker(fail_max=5, window_seconds=30)
    fail(breaker)
    clock.advance(20)
    fail(breaker)
    clock.advance(10)
    assert breaker.fail_counter == 1
    breaker.window_seconds = seconds
    assert breaker.fail_counter == 1


def test_a_larger_window_brings_no_failure_back():
    """A failure that was forgotten stays forgotten."""
    breaker = CircuitBreaker(fail_max=2, window_size=2)
    fail(breaker)
    succeed(breaker, 2)
    breaker.window_size = 100
    assert breaker.fail_counter == 0


def test_a_narrower_window_forgets_at_once():
    """A failure that is no longer among so many calls is forgotten, and no other."""
    breaker = CircuitBreaker(fail_max=3, window_size=10)
    fail(breaker)
    succeed(breaker, 3)
    fail(breaker)
    succeed(breaker, 2)
    breaker.window_size = 7
    assert breaker.fail_counter == 2
    breaker.window_size = 6
    assert breaker.fail_counter == 1
    breaker.window_size = 3
    assert breaker.fail_counter == 1
    breaker.fail_max = 2
    breaker.window_size = 2
    assert breaker.fail_counter == 0


def test_a_much_narrower_window_forgets_what_is_far_outside():
    """The failure was eight calls ago, and the window has three."""
    breaker = CircuitBreaker(fail_max=2, window_size=10)
    fail(breaker)
    succeed(breaker, 7)
    assert breaker.fail_counter == 1
    breaker.window_size = 3
    assert breaker.fail_counter == 0


def test_a_shorter_time_forgets_at_once(clock):
    """One failure is twenty seconds old, and the other ten."""
    breaker = CircuitBreaker(fail_max=3, window_seconds=60)
    fail(breaker)
    clock.advance(10)
    fail(breaker)
    clock.advance(10)
    breaker.window_seconds = 20
    assert breaker.fail_counter == 1
    breaker.window_seconds = 10.5
    assert breaker.fail_counter == 1
    breaker.window_seconds = 10
    assert breaker.fail_counter == 0


def test_a_narrower_window_opens_nothing():
    """A limit that is lowered to the count opens nothing either."""
    breaker = CircuitBreaker(fail_max=5, window_size=10)
    fail(breaker, 3)
    breaker.fail_max = 3
    breaker.window_size = 3
    assert (breaker.current_state, breaker.fail_counter) == ("closed", 3)
    fail(breaker)
    assert breaker.current_state == "open"


# A naive window, beside which the library's is put.


class NaiveWindow:
    """The specification's sentences, one after the other, for a closed circuit."""

    def __init__(self, clock):
        self.clock, self.size, self.seconds = clock, None, None
        self.marks = []  # how many calls ago, and when
        self.has_tripped = False

    def forget(self):
        if self.size is not None:
            self.marks = [mark for mark in self.marks if mark[0] < self.size]
        if self.seconds is not None:
            now = self.clock.now
            self.marks = [each for each in self.marks if now - each[1] < self.seconds]

    def count(self):
        self.marks = [(ago + 1, moment) for ago, moment in self.marks]

    def succeed(self):
        self.count()
        self.forget()
        if self.size is None:
            self.marks = []

    def fail(self, fail_max):
        self.count()
        self.forget()
        self.marks.append((0, self.clock.now))
        self.forget()
        if len(self.marks) >= fail_max:
            self.close()

    def close(self):
        self.marks = []

    def set_count(self, count):
        self.marks = [(ago, self.clock.now) for ago in reversed(range(count))]

    def set_window(self, size, seconds):
        self.forget()
        if self.size is self.seconds is None:
            self.set_count(len(self.marks))
        self.size, self.seconds = size, seconds
        self.forget()


STEPS = st.one_of(
    st.tuples(st.sampled_from(["succeed", "fail", "abandon"])),
    st.tuples(st.just("advance"), st.integers(0, 12)),
    st.tuples(st.just("close")),
    st.tuples(st.just("set_count"), st.integers(0, 3)),
    st.tuples(
        st.just("set_window"),
        st.one_of(st.none(), st.integers(3, 8), st.just(math.inf)),
        st.one_of(st.none(), st.integers(1, 20)),
    ),
)


class HearsFailures:
    def failure(self, cb, exc):
        """The breaker has a listener to tell of failures, and so takes the longer way
        to count."""


@pytest.mark.parametrize("listeners", [(), (HearsFailures(),)], ids=["quiet", "heard"])
@settings(deadline=None)  # a busy machine is not a fault
@given(steps=st.lists(STEPS, max_size=40))
def test_a_window_remembers_what_the_specification_says(listeners, steps):
    """After each random step the count is that of the naive window, whether a listener
    hears of failures or not."""
    clock = Clock()
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(pybreaker, "time", clock)
        breaker = CircuitBreaker(fail_max=3, listeners=listeners)
        naive = NaiveWindow(clock)
        for what, *details in steps:
            if what == "succeed":
                succeed(breaker)
                naive.succeed()
            elif what == "fail":
                fail(breaker)
                naive.fail(3)
            elif what == "abandon":
                abandon(breaker)
            elif what == "advance":
                clock.now += details[0]
                naive.forget()
            elif what == "close":
                breaker.close()
                naive.close()
            elif what == "set_count":
                breaker.fail_counter = details[0]
                naive.set_count(details[0])
            else:
                size, seconds = details
                breaker.window_size, breaker.window_seconds = (
                    size,
                    breaker.window_seconds,
                )
                naive.set_window(size, naive.seconds)
                breaker.window_seconds = seconds
                naive.set_window(size, seconds)
            if breaker.current_state == "open":
                assert breaker.fail_counter == 3
                breaker.close()
            assert breaker.fail_counter == len(naive.marks), what


class Clock:
    def __init__(self):
        self.now = 1000

    def monotonic(self):
        return float(self.now)


# What does not go together.


def refused(match, set_it):
    with pytest.raises(ValueError, match=match):
        set_it()


def test_a_limit_above_the_window_is_refused_by_whichever_comes_second():
    """The error names both settings, and neither has changed."""
    both = "fail_max.*window_size.*fail_max 6, window_size 5"
    refused(both, lambda: CircuitBreaker(fail_max=6, window_size=5))
    breaker = CircuitBreaker(fail_max=5, window_size=5)
    refused(both, lambda: setattr(breaker, "fail_max", 6))
    assert breaker.fail_max == 5
    breaker = CircuitBreaker(fail_max=6)
    refused(both, lambda: setattr(breaker, "window_size", 5))
    assert breaker.window_size is None
    refused(
        "fail_max inf, window_size 5",
        lambda: CircuitBreaker(fail_max=math.inf, window_size=5),
    )


def test_nothing_infinite_is_remembered_without_a_time():
    """`fail_max` and `window_size` may both be infinite with `window_seconds`."""
    both = "fail_max and window_size .*window_seconds"
    refused(both, lambda: CircuitBreaker(fail_max=math.inf, window_size=math.inf))
    breaker = CircuitBreaker(fail_max=math.inf)
    refused(both, lambda: setattr(breaker, "window_size", math.inf))
    assert breaker.window_size is None
    breaker = CircuitBreaker(window_size=math.inf)
    refused(both, lambda: setattr(breaker, "fail_max", math.inf))
    assert breaker.fail_max == 5
    breaker = CircuitBreaker(fail_max=math.inf, window_size=math.inf, window_seconds=30)
    refused(both, lambda: setattr(breaker, "window_seconds", None))
    assert breaker.window_seconds == 30


@pytest.mark.parametrize(
    "parameter, value",
    [
        ("fail_max", 6),
        ("window_size", 6),
        ("reset_timeout", 6),
        ("max_reset_timeout", 66),
    ],
)
def test_setters_of_what_must_go_together_take_turns(parameter, value):
    """Otherwise thread A checks `fail_max` while thread B checks `window_size`, both
    find no fault, and then both write."""
    breaker = CircuitBreaker(window_size=9, max_reset_timeout=99)
    assert locks_taken(breaker, setattr, breaker, parameter, value) >= 1
    assert getattr(breaker, parameter) == value


@pytest.mark.parametrize("kind", [TypeError, ValueError])
@pytest.mark.parametrize("parameter", ["window_size", "window_seconds"])
def test_what_is_no_window_is_refused(parameter, kind):
    """The error names the parameter and the value; a setter changes nothing."""
    values = {
        ("window_size", TypeError): ["7", [7], True, object, 7 + 0j],
        ("window_size", ValueError): [0, -1, 7.5, math.nan, -math.inf],
        ("window_seconds", TypeError): ["7", [7], True, object, 7 + 0j],
        ("window_seconds", ValueError): [0, 0.0, -1, math.nan, math.inf, 10**400],
    }
    breaker = CircuitBreaker(fail_max=1, window_size=7, window_seconds=7)
    for value in values[parameter, kind]:
        with pytest.raises(kind, match=parameter) as caught:
            CircuitBreaker(fail_max=1, **{parameter: value})
        assert repr(value) in str(caught.value)
        with pytest.raises(kind, match=parameter):
            setattr(breaker, parameter, value)
        assert getattr(breaker, parameter) == 7


def test_a_window_may_be_a_float_of_whole_value():
    """The window takes such a float as other whole numbers do; seconds may be a
    fraction."""
    breaker = CircuitBreaker(window_size=7.0, window_seconds=0.5)
    assert (breaker.window_size, breaker.window_seconds) == (7, 0.5)
    assert isinstance(breaker.window_size, int)


def test_the_settings_of_the_window_are_by_name_only():
    """There is no ninth positional argument."""
    with pytest.raises(TypeError):
        CircuitBreaker(5, 60, None, None, None, None, True, 1, 50)


# Storages.


class CountsItself(CircuitMemoryStorage):
    def increment_counter(self):
        super().increment_counter()


class HasOwnCounter(CircuitMemoryStorage):
    @property
    def counter(self):
        return self._fail_counter


class ResetsItself(CircuitMemoryStorage):
    def reset_counter(self):
        super().reset_counter()


class OnlyNamed(CircuitMemoryStorage):
    name = "rows"


class Other(pybreaker.CircuitBreakerStorage):
    state, counter, opened_at = "closed", 0, None

    def __init__(self, state):
        super().__init__("other")

    def increment_counter(self):
        self.counter += 1

    def reset_counter(self):
        self.counter = 0


@pytest.mark.parametrize("parameter", ["window_size", "window_seconds"])
@pytest.mark.parametrize("kind", [CountsItself, HasOwnCounter, ResetsItself, Other])
def test_a_window_needs_a_storage_that_counts_in_memory(kind, parameter):
    """The error names the class of any other storage; a setter changes nothing."""
    storage = kind("closed")
    with pytest.raises(
        ValueError, match=f"{parameter}.*CircuitMemoryStorage"
    ) as caught:
        CircuitBreaker(state_storage=storage, **{parameter: 10})
    assert repr(storage) in str(caught.value)
    breaker = CircuitBreaker(state_storage=storage)
    refused(parameter, lambda: setattr(breaker, parameter, 10))
    assert getattr(breaker, parameter) is None
    setattr(breaker, parameter, None)
    fail(breaker, 2)
    assert breaker.fail_counter == 2


def test_a_subclass_that_overrides_nothing_of_the_counting_will_do():
    """A subclass of the memory storage counts in the window."""
    breaker = CircuitBreaker(state_storage=OnlyNamed("closed"), window_size=5)
    fail(breaker)
    succeed(breaker, 4)
    assert breaker.fail_counter == 1
    succeed(breaker)
    assert breaker.fail_counter == 0


def test_over_a_shared_memory_storage_each_breaker_settles_by_its_own_window():
    """A success through the narrow breaker forgets failures, and one through the wide
    breaker does not."""
    storage = CircuitMemoryStorage("closed")
    narrow = CircuitBreaker(fail_max=4, window_size=4, state_storage=storage)
    wide = CircuitBreaker(fail_max=4, window_size=40, state_storage=storage)
    fail(wide, 2)
    succeed(wide, 30)
    assert (wide.fail_counter, narrow.fail_counter) == (2, 2)
    succeed(narrow, 6)
    assert (wide.fail_counter, narrow.fail_counter) == (0, 0)


def test_over_a_shared_memory_storage_a_success_in_a_row_forgets_all():
    """A success through the breaker without a window forgets the other breaker's
    failures."""
    storage = CircuitMemoryStorage("closed")
    windowed = CircuitBreaker(fail_max=4, window_size=40, state_storage=storage)
    plain = CircuitBreaker(fail_max=4, state_storage=storage)
    fail(windowed, 3)
    succeed(plain)
    fail(windowed, 3)
    assert (windowed.current_state, windowed.fail_counter) == ("closed", 3)


def test_a_failure_after_a_reset_is_remembered_as_long_as_any():
    """A success through the breaker without a window has forgotten the failure before.
    The new failure is among the last four calls until four more have ended."""
    storage = CircuitMemoryStorage("closed")
    windowed = CircuitBreaker(fail_max=3, window_size=4, state_storage=storage)
    plain = CircuitBreaker(fail_max=3, state_storage=storage)
    fail(windowed)
    succeed(windowed, 2)
    succeed(plain)
    fail(windowed)
    succeed(windowed, 3)
    assert windowed.fail_counter == 1
    succeed(windowed)
    assert windowed.fail_counter == 0


def test_failures_that_were_reset_are_not_taken_off_again_with_time(clock):
    """A success through the breaker without a window has forgotten the failures before
    their time is up."""
    storage = CircuitMemoryStorage("closed")
    windowed = CircuitBreaker(fail_max=3, window_seconds=10, state_storage=storage)
    plain = CircuitBreaker(fail_max=3, state_storage=storage)
    fail(windowed, 2)
    succeed(plain)
    clock.advance(10)
    assert windowed.fail_counter == 0


def test_a_breaker_that_finds_an_opening_leaves_its_count(clock):
    """A breaker that finds an opening writes nothing into the storage, whatever its
    window forgets."""
    storage = CircuitMemoryStorage("closed")
    short = CircuitBreaker(fail_max=3, window_seconds=10, state_storage=storage)
    long = CircuitBreaker(fail_max=3, window_seconds=100, state_storage=storage)
    fail(short, 2)
    clock.advance(50)
    storage.state = "open"
    before = long.fail_counter
    assert short.state.name == "open"
    assert long.fail_counter == before


def test_failures_of_a_circuit_that_was_found_closed_are_forgotten_with_time(clock):
    """The failures are taken to be as old as the look that found the circuit closed."""
    storage = CircuitMemoryStorage("closed")
    breaker = CircuitBreaker(window_seconds=10, state_storage=storage)
    fail(breaker, 2)
    for state in ("open", "closed"):
        storage.state = state
        assert breaker.state.name == state
    assert breaker.fail_counter == 2
    clock.advance(10)
    assert breaker.fail_counter == 0


@pytest.mark.parametrize("window", [{}, {"window_size": 9}, {"window_seconds": 9}])
def test_failures_that_a_listener_causes_bring_the_count_no_higher_than_the_limit(
    clock, window
):
    """A listener that is told of the first two failures fails a call itself, and the
    third failure ends before the second one opens the circuit."""
    counts = []

    class FailsToo:
        def failure(self, cb, exc):
            counts.append(cb.fail_counter)
            if len(counts) < 3:
                fail(cb)

    breaker = CircuitBreaker(fail_max=2, listeners=[FailsToo()], **window)
    fail(breaker)
    assert counts == [1, 2, 2]
    assert (breaker.current_state, breaker.fail_counter) == ("open", 2)


# The lock.


@pytest.mark.parametrize(
    "window",
    [
        {},
        {"window_size": 50},
        {"window_seconds": 30},
        {"window_size": 50, "window_seconds": 30},
        {"window_size": math.inf},
    ],
    ids=str,
)
@guards.every_way
def test_no_lock_is_taken_while_no_failure_is_remembered(way, window):
    """Whatever the window, a call ends while another thread holds the lock."""
    breaker = CircuitBreaker(**window)
    assert while_locked(breaker, way, breaker, lambda: "result") == "result"
    fail(breaker)
    breaker.close()
    assert while_locked(breaker, way, breaker, lambda: "result") == "result"


@guards.every_way
def test_a_success_takes_the_lock_only_where_a_failure_is_forgotten(way):
    """Of four successes after a failure, only the fourth takes the lock."""
    breaker = CircuitBreaker(fail_max=3, window_size=4)
    fail(breaker)
    for _ in range(3):
        assert while_locked(breaker, way, breaker, lambda: "result") == "result"
    assert locks_taken(breaker, way, breaker, int) == 1
    assert breaker.fail_counter == 0
    assert locks_taken(breaker, way, breaker, int) == 0


@guards.every_way
def test_a_listener_hears_of_each_success_whether_that_forgets_a_failure_or_not(way):
    """Of four successes after a failure, the last forgets that failure; all are
    told."""
    heard = []

    class Hears:
        def success(self, cb):
            heard.append(cb.fail_counter)

    breaker = CircuitBreaker(fail_max=3, window_size=4, listeners=[Hears()])
    fail(breaker)
    for _ in range(4):
        way(breaker, int)
    assert heard == [1, 1, 1, 0]


def test_a_listener_that_comes_during_a_call_hears_of_its_success():
    """The breaker had no listener when the call began, and the call forgets no
    failure."""
    heard = []

    class Hears:
        def success(self, cb):
            heard.append(cb.fail_counter)

    breaker = CircuitBreaker(fail_max=3, window_size=4)
    fail(breaker)
    breaker.call(lambda: breaker.add_listener(Hears()))
    assert heard == [1]


@pytest.mark.parametrize("seconds", [None, 30])
def test_reading_the_count_takes_no_lock(clock, seconds):
    """Another thread holds the lock; what time has forgotten is left out of the
    count."""
    breaker = CircuitBreaker(window_size=10, window_seconds=seconds)
    fail(breaker, 2)
    read = type(breaker).fail_counter.fget
    assert while_locked(breaker, read, breaker) == 2
    clock.advance(30)
    assert while_locked(breaker, read, breaker) == (0 if seconds else 2)


def read_interrupted(breaker, number, meanwhile):
    """Returns the count, and whether the reading has a line of that number. `meanwhile`
    is called before that line."""
    lines, before = itertools.count(), sys.gettrace()

    def trace(frame, event, arg):
        if event == "line" and next(lines) == number:
            meanwhile(breaker)
        return trace

    sys.settrace(trace)
    try:
        count = breaker.fail_counter
    finally:
        sys.settrace(before)
    return count, next(lines) > number


@pytest.mark.parametrize("meanwhile, counts", [(succeed, {0}), (fail, {0, 1})])
def test_the_count_is_right_whichever_call_ends_while_it_is_read(
    clock, meanwhile, counts
):
    """Time has forgotten two failures. Between any two lines of the reading a call
    ends, which forgets the same two: they are neither counted nor taken off twice."""
    for number in itertools.count():
        breaker = CircuitBreaker(fail_max=3, window_seconds=10)
        fail(breaker, 2)
        clock.advance(10)
        count, was_interrupted = read_interrupted(breaker, number, meanwhile)
        assert count in counts
        if not was_interrupted:
            break
    assert number > 3


# Threads.


def test_a_success_that_drew_its_number_forgets_nothing_that_came_after_it():
    """Thread T's success finds a failure to forget and waits for the lock. The
    count that is set meanwhile is of failures counted after T's success."""
    breaker = CircuitBreaker(fail_max=3, window_size=3)
    fail(breaker)
    succeed(breaker, 2)
    lock = breaker._lock
    waits = threading.Event()

    class Told:
        def __enter__(self):
            waits.set()
            return lock.__enter__()

        def __exit__(self, *exc_info):
            return lock.__exit__(*exc_info)

    with lock:
        breaker._lock = Told()
        thread = threading.Thread(target=succeed, args=(breaker,))
        thread.start()
        assert waits.wait(PATIENCE)
        breaker._lock = lock
        breaker.fail_counter = 2
    thread.join(PATIENCE)
    assert breaker.fail_counter == 2


def test_calls_of_many_threads_keep_to_the_limit():
    """The count stays at most `fail_max`, one transition is told for each trip,
    and the successes that follow forget all failures."""
    counts, changes = [], []

    class Watch:
        def failure(self, cb, exc):
            counts.append(cb.fail_counter)

        def state_change(self, cb, old_state, new_state):
            changes.append(new_state.name)

    breaker = CircuitBreaker(
        fail_max=6, window_size=12, reset_timeout=math.inf, listeners=[Watch()]
    )

    def work(step):
        def run():
            for i in range(200):
                if i % step:
                    if breaker.current_state == "closed":
                        breaker.call(int)
                else:
                    fail(breaker)
                    if breaker.current_state == "open":
                        breaker.close()

        return run

    at_once(*(tolerant(work(step)) for step in (2, 3, 3, 4)))
    breaker.close()
    assert max(counts) <= 6
    assert changes.count("open") >= 1
    fail(breaker, 3)
    succeed(breaker, 11)
    assert breaker.fail_counter == 1
    succeed(breaker)
    assert breaker.fail_counter == 0


def tolerant(run):
    """Ends the work of `run` without harm where a call is rejected."""

    def work():
        try:
            run()
        except pybreaker.CircuitBreakerError:
            return

    return work


def test_a_window_may_be_changed_while_calls_settle(hasty):
    """No call raises what its function did not raise, and the window is whole
    afterwards."""
    breaker = CircuitBreaker(fail_max=5, window_size=50)
    stop = threading.Event()

    def calls():
        while not stop.is_set():
            breaker.call(int)

    def failures():
        while not stop.is_set():
            fail(breaker, 2)
            breaker.fail_counter = 1

    def changes():
        try:
            for _ in range(150 if DEEP else 10):
                for size, seconds in [(5, None), (None, 9), (None, None), (7, 9)]:
                    breaker.window_size, breaker.window_seconds = size, seconds
                    assert 0 <= breaker.fail_counter <= 5
                    time.sleep(0)
        finally:
            stop.set()

    at_once(calls, calls, failures, changes)
    assert breaker.current_state == "closed"
    breaker.fail_counter = 2
    succeed(breaker, 5)
    assert breaker.fail_counter == 2
    succeed(breaker, 2)
    assert breaker.fail_counter == 0


def two_failures_before_another_breaker_moves(state, clock):
    """A breaker whose failures are older than its window. Another breaker over the same
    storage moved the circuit to `state` before the failures were too old."""
    storage = CircuitMemoryStorage("closed")
    windowed = CircuitBreaker(fail_max=5, window_seconds=10, state_storage=storage)
    plain = CircuitBreaker(state_storage=storage)
    fail(windowed, 2)
    plain.state = state
    clock.advance(20)
    return windowed


def narrow(breaker):
    breaker.window_seconds = 5


@pytest.mark.parametrize("state", ["open", "half-open"])
@pytest.mark.parametrize(
    "act",
    [narrow, CircuitBreaker.open, CircuitBreaker.half_open],
    ids=lambda act: act.__name__,
)
def test_no_setter_and_no_move_forgets_where_another_breaker_has_moved_the_circuit(
    clock, act, state
):
    """This breaker has not looked at the storage yet. If the circuit were still closed,
    the change would forget the two failures."""
    windowed = two_failures_before_another_breaker_moves(state, clock)
    act(windowed)
    assert windowed.fail_counter == 2


@pytest.mark.parametrize("state", ["open", "half-open"])
def test_time_forgets_nothing_in_a_circuit_that_another_breaker_has_moved(clock, state):
    """This holds before this breaker has looked at the storage that the two share."""
    windowed = two_failures_before_another_breaker_moves(state, clock)
    assert windowed.current_state == state
    assert windowed.fail_counter == windowed.snapshot()["fail_counter"] == 2
    assert windowed.state.name == state
    assert windowed.fail_counter == 2


def test_a_circuit_that_another_breaker_has_closed_has_no_failures(clock):
    """This breaker has not looked at the storage that the two share."""
    storage = CircuitMemoryStorage("open")
    windowed = CircuitBreaker(window_seconds=10, state_storage=storage)
    plain = CircuitBreaker(state_storage=storage)
    plain.close()
    assert windowed.fail_counter == 0
    fail(plain)
    assert windowed.fail_counter == 1


def test_a_window_of_time_does_not_care_when_the_clock_began(clock):
    """The clock of a machine begins with its start, so it may say 3 seconds."""
    clock.now = 3.0
    breaker = CircuitBreaker(fail_max=3, window_seconds=5)
    fail(breaker)
    clock.advance(7)
    assert breaker.fail_counter == 0
    fail(breaker, 2)
    assert (breaker.current_state, breaker.fail_counter) == ("closed", 2)


def test_a_failure_has_a_place_of_its_own_after_other_code_has_lowered_the_count():
    """The storage has lost the first of three failures. The fourth, and not that one,
    is remembered for four calls."""
    breaker = CircuitBreaker(fail_max=4, window_size=4)
    fail(breaker, 3)
    breaker._state_storage.counter = 2
    fail(breaker)
    succeed(breaker)
    assert breaker.fail_counter == 3


def test_a_failure_above_the_limit_is_counted_where_other_code_has_set_the_count():
    """The failure opens the circuit, and is one more than there were."""
    breaker = CircuitBreaker(fail_max=3, window_size=9)
    breaker._state_storage.counter = 7
    fail(breaker)
    assert (breaker.current_state, breaker.fail_counter) == ("open", 8)


def test_an_infinite_setting_need_not_be_the_object_math_inf():
    infinity = float("inf")  # on CPython another object than math.inf
    both = "fail_max and window_size .*window_seconds"
    refused(both, lambda: CircuitBreaker(fail_max=infinity, window_size=math.inf))
    refused(both, lambda: CircuitBreaker(fail_max=math.inf, window_size=infinity))
    refused("window_seconds.*inf", lambda: CircuitBreaker(window_seconds=infinity))
    breaker = CircuitBreaker(fail_max=2, window_size=infinity)
    assert breaker.snapshot()["window_size"] == "inf"
    fail(breaker, 2)
    assert breaker.state.reason.startswith("2 failures; the last: ")


def test_time_forgets_old_failures_where_other_code_has_raised_the_count(clock):
    """The storage has five failures, and knows when two of them were counted."""
    breaker = CircuitBreaker(fail_max=9, window_seconds=30)
    fail(breaker)
    clock.advance(20)
    fail(breaker)
    breaker._state_storage.counter = 5
    clock.advance(11)
    assert breaker.fail_counter == 4
