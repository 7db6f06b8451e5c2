"""Watching and steering a breaker: the specification's section of that name."""

from __future__ import annotations

import asyncio
import contextvars
import copy
import logging
import math
import pickle
import threading

import pytest
from guards import (
    by_async_block,
    by_async_generator,
    by_block,
    by_call,
    by_coroutine,
    by_generator,
)
from internals import lock_of, storage_of
from support import PATIENCE

import pybreaker
from pybreaker import (
    CircuitBreaker,
    CircuitBreakerError,
    CircuitBreakerListener,
    CircuitMemoryStorage,
)


class OldStorage(pybreaker.CircuitBreakerStorage):
    """A storage written against the old interface: its counter can only count."""

    def __init__(self):
        super().__init__("old")
        self._state = "closed"
        self._counter = 0
        self._opened_at = None
        self.written = []

    @property
    def state(self):
        return self._state

    @state.setter
    def state(self, state):
        self.written.append(state)
        self._state = state

    @property
    def counter(self):
        return self._counter

    def increment_counter(self):
        self.written.append("increment")
        self._counter += 1

    def reset_counter(self):
        self.written.append("reset")
        self._counter = 0

    @property
    def opened_at(self):
        return self._opened_at

    @opened_at.setter
    def opened_at(self, moment):
        self._opened_at = moment


class Hook(CircuitBreakerListener):
    """Calls `do(cb)` at the first event of one kind that it hears of."""

    def __init__(self, event, do):
        self.do = do
        setattr(self, event, self.hear)

    def hear(self, cb, *args, **kwargs):
        do, self.do = self.do, None
        if do is not None:
            do(cb)


def raising(exc):
    """A function that raises this very exception."""

    def raise_it(*args, **kwargs):
        raise exc

    return raise_it


def elsewhere(func, *args):
    """Call `func` in a thread of its own and return what it returns."""
    results = []
    thread = threading.Thread(target=lambda: results.append(func(*args)), daemon=True)
    thread.start()
    thread.join(PATIENCE)
    assert results, "the other thread did not get through"
    return results[0]


def is_locked(breaker):
    """Whether another thread would have to wait for the breaker's lock."""

    def can_be_taken():
        taken = lock_of(breaker).acquire(blocking=False)
        if taken:
            lock_of(breaker).release()
        return taken

    return not elsewhere(can_be_taken)


def failures(breaker, number, fail):
    for _ in range(number):
        with pytest.raises(Exception):  # noqa: B017
            breaker.call(fail)


# What can be read.


def test_counters_can_be_read(clock, fail):
    """`fail_counter` counts failures in a row, `success_counter` trials that
    succeeded."""
    breaker = CircuitBreaker(3, 10, success_threshold=2)
    failures(breaker, 2, fail)
    assert (breaker.fail_counter, breaker.success_counter) == (2, 0)
    failures(breaker, 1, fail)
    clock.advance(10)
    breaker.call(int)
    assert (breaker.fail_counter, breaker.success_counter) == (0, 1)
    breaker.call(int)
    assert (breaker.fail_counter, breaker.success_counter) == (0, 0)


@pytest.mark.parametrize("name", ["closed", "open", "half-open"])
def test_the_state_can_be_read(name):
    """`current_state` is the state's name; `state` is an object with that name and
    str()."""
    breaker = CircuitBreaker()
    breaker.state = name
    assert breaker.current_state == name
    assert breaker.state.name == name
    assert str(breaker.state) == name
    assert f"{breaker.state}" == name


def test_a_state_says_of_what_kind_it_is():
    """The repr of a state tells its class and its name."""
    assert repr(CircuitBreaker().state) == "<CircuitClosedState closed>"


def test_listeners_and_exclusions_are_tuples(recorder):
    """What is read cannot be changed by accident."""
    breaker = CircuitBreaker(exclude=[KeyError], listeners=[recorder])
    assert breaker.excluded_exceptions == (KeyError,)
    assert breaker.listeners == (recorder,)


def test_listeners_that_were_put_into_the_private_list_are_read_as_a_tuple(recorder):
    """`listeners` and `excluded_exceptions` are tuples, not the private lists."""
    breaker = CircuitBreaker()
    breaker._listeners.append(recorder)
    breaker._excluded_exceptions.append(KeyError)
    assert breaker.excluded_exceptions == (KeyError,)
    assert breaker.listeners == (recorder,)


@pytest.mark.parametrize(
    "attribute",
    [
        "success_counter",
        "current_state",
        "excluded_exceptions",
        "listeners",
        "retry_after",
    ],
)
def test_what_can_only_be_read_refuses_to_be_set(attribute):
    """A typing error of an operator does not go unnoticed."""
    breaker = CircuitBreaker()
    with pytest.raises(AttributeError):
        setattr(breaker, attribute, 0)


def test_everything_can_be_read_and_set_while_a_call_is_in_flight(boom):
    """Another thread reads and sets, without waiting for the call that is in flight."""
    breaker = CircuitBreaker(fail_max=5, reset_timeout=60, name="database")
    running, finish = threading.Event(), threading.Event()
    outcome = []

    def work():
        running.set()
        assert finish.wait(PATIENCE)
        raise boom

    def client():
        try:
            breaker.call(work)
        except Exception as exc:
            outcome.append(exc)

    thread = threading.Thread(target=client, daemon=True)
    thread.start()
    assert running.wait(PATIENCE)

    def operate():
        breaker.fail_counter = 2
        breaker.fail_max = 3
        breaker.reset_timeout = 7
        breaker.success_threshold = 4
        breaker.name = "db"
        return (
            breaker.fail_counter,
            breaker.success_counter,
            breaker.fail_max,
            breaker.reset_timeout,
            breaker.success_threshold,
            breaker.name,
            breaker.state.name,
            breaker.current_state,
            breaker.excluded_exceptions,
            breaker.listeners,
            breaker.retry_after,
        )

    try:
        picture = elsewhere(operate)
    finally:
        finish.set()
    thread.join(PATIENCE)
    assert picture == (2, 0, 3, 7, 4, "db", "closed", "closed", (), (), 0.0)
    assert isinstance(outcome[0], CircuitBreakerError)  # the third of three
    assert "db" in str(outcome[0])
    assert 0 < outcome[0].retry_after <= 7


# retry_after.


def test_retry_after_counts_down_while_open(clock):
    """`retry_after` is the time until a call may be admitted, then 0.0 though still
    open."""
    breaker = CircuitBreaker(reset_timeout=10)
    assert breaker.retry_after == 0.0
    breaker.open()
    assert breaker.retry_after == 10
    clock.advance(4)
    assert breaker.retry_after == 6
    clock.advance(6)
    assert breaker.retry_after == 0.0
    assert breaker.current_state == "open"
    clock.advance(100)
    assert breaker.retry_after == 0.0


def test_retry_after_counts_down_while_a_trial_runs(clock):
    """`retry_after` is the time until the trial loses its place, 0.0 once it has
    ended."""
    breaker = CircuitBreaker(reset_timeout=10, success_threshold=2)
    breaker.half_open()
    assert breaker.retry_after == 0.0
    with breaker.calling():
        assert breaker.retry_after == 10
        clock.advance(3)
        assert breaker.retry_after == 7
        breaker.reset_timeout = 5
        assert breaker.retry_after == 2
        clock.advance(50)
        assert breaker.retry_after == 0.0
    assert breaker.current_state == "half-open"
    assert breaker.retry_after == 0.0


def test_retry_after_counts_down_for_days(clock):
    """The timeout may be longer than the machine has been up."""
    breaker = CircuitBreaker(reset_timeout=500_000)
    breaker.open()
    clock.advance(200_000)
    assert breaker.retry_after == 300_000
    breaker.half_open()
    with breaker.calling():
        clock.advance(300_000)
        assert breaker.retry_after == 200_000


def test_retry_after_can_be_infinite(clock):
    """With reset_timeout=math.inf the wait is infinite when open and during a trial."""
    breaker = CircuitBreaker(reset_timeout=math.inf)
    breaker.open()
    clock.advance(1e9)
    assert breaker.retry_after == math.inf
    breaker.half_open()
    with breaker.calling():
        assert breaker.retry_after == math.inf


@pytest.mark.parametrize("name", ["closed", "half-open"])
def test_retry_after_is_nought_where_a_call_may_come_now(name):
    """`retry_after` is 0.0 in a closed circuit, and in a half-open one with the place
    free."""
    breaker = CircuitBreaker()
    breaker.state = name
    assert breaker.retry_after == 0.0
    assert isinstance(breaker.retry_after, float)


def test_retry_after_keeps_what_it_promises(clock):
    """A call is rejected just before that many seconds and admitted just after."""
    breaker = CircuitBreaker(reset_timeout=8)
    breaker.open()
    wait = breaker.retry_after
    clock.advance(wait - 0.25)
    with pytest.raises(CircuitBreakerError):
        breaker.call(int)
    clock.advance(0.25)
    assert breaker.call(int) == 0


@pytest.mark.parametrize(
    "watch",
    [
        lambda breaker: breaker.retry_after,
        lambda breaker: breaker.current_state,
        lambda breaker: breaker.snapshot(),
        repr,
    ],
)
def test_an_operator_who_only_watches_moves_nothing(watch, recorder):
    """Only calls and breaker.state find a change in the storage, and tell listeners of
    it."""
    breaker = CircuitBreaker(listeners=[recorder])
    storage_of(breaker).state = "open"
    watch(breaker)
    assert recorder.events == []
    assert breaker.state.name == "open"
    assert recorder.transitions == [("closed", "open")]


# What can be set.


def test_a_fail_counter_that_is_set_is_counted_from(fail, boom):
    """The next failure adds one to the count that was set."""
    breaker = CircuitBreaker(fail_max=5)
    breaker.fail_counter = 3
    with pytest.raises(boom):
        breaker.call(fail)
    assert breaker.fail_counter == 4
    with pytest.raises(CircuitBreakerError):
        breaker.call(fail)


def test_a_fail_counter_that_is_set_is_forgotten_by_a_success():
    """A success sets the count back to 0, whether the failures were counted or set."""
    breaker = CircuitBreaker(fail_max=5)
    breaker.fail_counter = 3
    breaker.call(int)
    assert breaker.fail_counter == 0


def test_setting_numbers_never_moves_the_circuit(clock, recorder):
    """Setting a number tells listeners nothing; the next call decides by the number."""
    breaker = CircuitBreaker(fail_max=5, reset_timeout=10, listeners=[recorder])
    breaker.fail_counter = 9
    breaker.fail_max = 1
    assert breaker.current_state == breaker.state.name == "closed"
    breaker.fail_counter = 0
    breaker.open()
    clock.advance(5)
    breaker.reset_timeout = 1
    assert breaker.current_state == breaker.state.name == "open"
    breaker.half_open()
    breaker.success_threshold = 1
    breaker.fail_counter = 3
    assert breaker.current_state == breaker.state.name == "half-open"
    assert recorder.transitions == [("closed", "open"), ("open", "half-open")]


@pytest.mark.parametrize(("fail_max", "count"), [(1, 4), (3, 3), (4, 4)])
def test_with_fail_max_lowered_the_next_failure_opens(fail_max, count, fail, boom):
    """`fail_max` is lowered below the count, to the count, or to one above. The circuit
    opens with the next failure, which is counted unless the count is at the limit
    already."""
    breaker = CircuitBreaker(fail_max=10)
    failures(breaker, 3, fail)
    breaker.fail_max = fail_max
    assert breaker.current_state == "closed"
    with pytest.raises(CircuitBreakerError) as error:
        breaker.call(fail)
    assert isinstance(error.value.__cause__, boom)
    assert (breaker.current_state, breaker.fail_counter) == ("open", count)


def test_a_count_that_reaches_a_high_limit_opens_the_circuit(fail):
    """Two numbers that are equal need not be the same object."""
    breaker = CircuitBreaker(fail_max=1000)
    breaker.fail_counter = int("1000")
    with pytest.raises(CircuitBreakerError):
        breaker.call(fail)
    assert breaker.fail_counter == 1000


def test_with_fail_max_lowered_a_success_still_forgets(fail, boom):
    """The count goes back to 0, and the circuit did not open."""
    breaker = CircuitBreaker(fail_max=10)
    failures(breaker, 3, fail)
    breaker.fail_max = 2
    breaker.call(int)
    with pytest.raises(boom):
        breaker.call(fail)
    assert breaker.current_state == "closed"


def test_a_changed_reset_timeout_holds_for_an_open_circuit(clock):
    """A timeout that is made shorter or longer is measured from the opening."""
    breaker = CircuitBreaker(reset_timeout=100)
    breaker.open()
    clock.advance(20)
    breaker.reset_timeout = 30
    assert breaker.retry_after == 10
    with pytest.raises(CircuitBreakerError):
        breaker.call(int)
    breaker.reset_timeout = 20
    assert breaker.retry_after == 0.0
    assert breaker.call(int) == 0


@pytest.mark.parametrize("threshold", [1, 3, 4])
def test_a_changed_success_threshold_holds_for_a_half_open_circuit(threshold):
    """The threshold is set below the successes so far, to their number, or to one more:
    the next successful trial closes the circuit."""
    breaker = CircuitBreaker(success_threshold=9)
    breaker.half_open()
    for _ in range(3):
        breaker.call(int)
    breaker.success_threshold = threshold
    assert breaker.current_state == "half-open"
    breaker.call(int)
    assert breaker.current_state == "closed"


@pytest.mark.parametrize("before", ["closed", "open", "half-open"])
@pytest.mark.parametrize(
    ("name", "method"),
    [("closed", "close"), ("open", "open"), ("half-open", "half_open")],
)
def test_setting_the_state_is_the_same_as_the_method(before, name, method, fail):
    """The setter does what the method does, from every state, to the counters, the
    listeners and the timeout."""
    pictures = []
    for move in (
        lambda breaker: setattr(breaker, "state", name),
        lambda breaker: getattr(breaker, method)(),
    ):
        told = []
        breaker = CircuitBreaker(fail_max=5, success_threshold=3)
        failures(breaker, 2, fail)
        if before != "closed":
            breaker.half_open()
            breaker.call(int)
        if before == "open":
            breaker.open()
        old = breaker.state
        breaker.add_listener(
            Hook("state_change", lambda cb, told=told: told.append(cb.state.name))
        )
        move(breaker)
        pictures.append(
            (
                breaker.current_state,
                breaker.fail_counter,
                breaker.success_counter,
                breaker.retry_after > 0,
                breaker.state is old,
                told,
            )
        )
    assert pictures[0] == pictures[1]
    assert pictures[0][0] == name
    assert pictures[0][5] == [name]  # and a new era, whatever the name was before
    assert not pictures[0][4]


@pytest.mark.parametrize("name", ["closed", "open", "half-open"])
def test_a_state_may_be_set_by_a_name_that_was_typed(name):
    """A name that was typed is equal to the constant and not the same object."""
    breaker = CircuitBreaker()
    breaker.state = "".join(list(name))
    assert breaker.current_state == name


def test_setting_the_state_to_open_starts_the_timeout_again(clock):
    """Setting the state of an open circuit to open starts its timeout again."""
    breaker = CircuitBreaker(reset_timeout=10)
    breaker.state = "open"
    clock.advance(9)
    breaker.state = "open"
    assert breaker.retry_after == 10


# The counter of a storage that can only count.


def test_a_counter_that_cannot_be_set_is_counted_up():
    """The breaker calls reset_counter() once, then increment_counter() as often as
    needed."""
    storage = OldStorage()
    breaker = CircuitBreaker(fail_max=5, state_storage=storage)
    breaker.fail_counter = 2
    storage.written.clear()
    breaker.fail_counter = 3
    assert storage.written == ["reset", "increment", "increment", "increment"]
    assert breaker.fail_counter == 3
    storage.written.clear()
    breaker.fail_counter = 0
    assert storage.written == ["reset"]
    assert breaker.fail_counter == 0


def test_a_counter_that_cannot_be_set_goes_up_to_fail_max():
    """A count above fail_max is refused: the ValueError names both, and nothing
    changes."""
    storage = OldStorage()
    breaker = CircuitBreaker(fail_max=4, state_storage=storage)
    breaker.fail_counter = 4
    assert breaker.fail_counter == 4
    assert breaker.current_state == "closed"
    storage.written.clear()
    with pytest.raises(ValueError, match=r"fail_counter.*fail_max.*4.*5"):
        breaker.fail_counter = 5
    assert storage.written == []
    assert breaker.fail_counter == 4


def test_a_counter_that_can_be_set_has_no_such_limit():
    """With the default storage the count may be set above fail_max."""
    breaker = CircuitBreaker(fail_max=4)
    breaker.fail_counter = 50
    assert breaker.fail_counter == 50


@pytest.mark.parametrize(
    ("kind", "value"),
    [(TypeError, "2"), (TypeError, None), (ValueError, -1), (ValueError, 1.5)],
)
def test_a_count_that_makes_no_sense_never_reaches_the_storage(kind, value):
    """The breaker checks the count before anything is written, as on any storage."""
    storage = OldStorage()
    breaker = CircuitBreaker(state_storage=storage)
    with pytest.raises(kind, match="fail_counter"):
        breaker.fail_counter = value
    assert storage.written == []


def test_a_count_that_was_counted_up_is_counted_from(fail):
    """The next failure trips, and the breaker reads the count from the storage."""
    breaker = CircuitBreaker(fail_max=3, state_storage=OldStorage())
    breaker.fail_counter = 2
    with pytest.raises(CircuitBreakerError):
        breaker.call(fail)
    assert breaker.fail_counter == 3
    assert breaker.current_state == "open"
    assert 0 < breaker.retry_after <= 60


def test_a_count_that_is_set_is_no_failure_of_a_call():
    """A subclass's _inc_counter() is not called while a count is being set."""

    class Alarming(CircuitBreaker):
        def _inc_counter(self):
            raise AssertionError("nothing has failed")

    breaker = Alarming(state_storage=OldStorage())
    breaker.fail_counter = 2
    assert breaker.fail_counter == 2


# Listeners and exclusions come and go.


def test_listeners_come_and_go(recorder):
    """Listeners are added and removed alone or together, and told in the order of
    adding."""
    first, second, third = (CircuitBreakerListener() for _ in range(3))
    breaker = CircuitBreaker(listeners=[first])
    breaker.add_listener(second)
    breaker.add_listeners(third, recorder)
    assert breaker.listeners == (first, second, third, recorder)
    breaker.remove_listener(second)
    assert breaker.listeners == (first, third, recorder)


def test_a_listener_hears_from_when_it_is_added_until_it_is_removed(recorder):
    """A listener is told nothing that happens before it is added or after it is
    removed."""
    breaker = CircuitBreaker()
    breaker.call(int)
    breaker.add_listener(recorder)
    breaker.call(int)
    assert recorder.names == ["before_call", "success"]
    breaker.remove_listener(recorder)
    breaker.call(int)
    assert recorder.names == ["before_call", "success"]


def test_a_listener_that_is_added_during_a_call_hears_how_it_ends(recorder):
    """The breaker had no listener when the call began."""
    breaker = CircuitBreaker()
    breaker.call(lambda: breaker.add_listener(recorder))
    assert recorder.names == ["success"]


def test_a_listener_that_was_added_twice_is_told_twice():
    """Removing that listener once takes away the first of its two places in the
    list."""

    class Counting(CircuitBreakerListener):
        heard = 0

        def success(self, cb):
            self.heard += 1

    first, second = Counting(), Counting()
    breaker = CircuitBreaker(listeners=[first])
    breaker.add_listeners(second, first)
    assert breaker.listeners == (first, second, first)
    breaker.call(int)
    assert (first.heard, second.heard) == (2, 1)
    breaker.remove_listener(first)
    assert breaker.listeners == (second, first)


def test_removing_a_listener_that_is_not_there_is_an_error(recorder):
    """The ValueError names the stranger, and the listeners of the breaker stay."""
    breaker = CircuitBreaker(listeners=[recorder])
    stranger = CircuitBreakerListener()
    with pytest.raises(ValueError, match="CircuitBreakerListener object"):
        breaker.remove_listener(stranger)
    assert breaker.listeners == (recorder,)
    breaker.remove_listener(recorder)
    with pytest.raises(ValueError):
        breaker.remove_listener(recorder)


def test_exclusions_come_and_go():
    """Exclusions, classes and predicates alike, are added and removed alone or
    together."""

    def predicate(exc):
        return False

    breaker = CircuitBreaker(exclude=[KeyError])
    breaker.add_excluded_exception(predicate)
    breaker.add_excluded_exceptions(ValueError, OSError)
    assert breaker.excluded_exceptions == (KeyError, predicate, ValueError, OSError)
    assert not breaker.is_system_error(ValueError())
    breaker.remove_excluded_exception(ValueError)
    breaker.remove_excluded_exception(predicate)
    assert breaker.excluded_exceptions == (KeyError, OSError)
    assert breaker.is_system_error(ValueError())


def test_removing_an_exclusion_that_is_not_there_is_an_error():
    """The ValueError names the exclusion, also where a base class of it is excluded."""
    breaker = CircuitBreaker(exclude=[LookupError])
    with pytest.raises(ValueError, match="KeyError"):
        breaker.remove_excluded_exception(KeyError)
    assert breaker.excluded_exceptions == (LookupError,)


def test_an_exclusion_that_is_added_during_a_call_holds_for_it(fail, boom):
    """Whether an exception is a failure is asked when it has been raised."""
    breaker = CircuitBreaker(fail_max=1)

    def work():
        breaker.add_excluded_exception(boom)
        fail()

    with pytest.raises(boom):
        breaker.call(work)
    assert breaker.current_state == "closed"


# repr.


def test_repr_tells_an_operator_everything(clock, fail):
    """The repr tells name, state, failures, fail_max and the timeout on one line."""
    breaker = CircuitBreaker(7, 45, name="database")
    failures(breaker, 3, fail)
    text = repr(breaker)
    assert text.startswith("<CircuitBreaker ")
    for part in ("database", "closed", "3 of 7", "45"):
        assert part in text
    assert "\n" not in text


def test_repr_tells_the_settings_that_change_when_a_circuit_opens_and_how_long():
    """The repr tells the longest timeout and the window, each only where it is set."""
    parts = {
        "max_reset_timeout": "max_reset_timeout 90 s",
        "window_size": "window_size 50",
        "window_seconds": "window_seconds 30 s",
    }
    values = {"max_reset_timeout": 90, "window_size": 50, "window_seconds": 30}
    for setting, value in values.items():
        text = repr(CircuitBreaker(**{setting: value}))
        assert [name for name, part in parts.items() if part in text] == [setting]


def test_a_reason_is_one_line_of_bearable_length():
    """A reason is logged and kept for an era, so a long repr of an exception is cut."""

    class Babbling(Exception):
        def __repr__(self):
            return "first\nsecond " + 1000 * "x"

    breaker = CircuitBreaker(fail_max=1, throw_new_error_on_trip=False)

    def babble():
        raise Babbling

    with pytest.raises(Babbling):
        breaker.call(babble)
    reason = breaker.state.reason
    assert reason.startswith("a failure: first second xxx")
    assert len(reason) < 400


def test_repr_tells_when_the_next_trial_is_due(clock):
    """The repr of an open circuit tells when, and that of a closed circuit does not."""
    breaker = CircuitBreaker(reset_timeout=45)
    assert "trial" not in repr(breaker)
    breaker.open()
    clock.advance(15)
    assert "open" in repr(breaker)
    assert "next trial in 30.0 s" in repr(breaker)
    clock.advance(30)
    assert "next call is a trial" in repr(breaker)


def test_repr_of_a_circuit_that_waits_for_a_move_by_hand(clock):
    """With an infinite timeout the repr says that the circuit is moved only by hand."""
    breaker = CircuitBreaker(math.inf, math.inf)
    breaker.open()
    assert "only by hand" in repr(breaker)
    assert "0 of inf" in repr(breaker)


def test_repr_tells_how_far_a_recovery_is():
    """The repr of a half-open circuit tells how many of how many trials have
    succeeded."""
    breaker = CircuitBreaker(success_threshold=4)
    breaker.half_open()
    breaker.call(int)
    assert "half-open" in repr(breaker)
    assert "1 of 4" in repr(breaker)


def test_repr_knows_a_state_by_its_name():
    """A storage may return a string that is equal to the constant and another
    object."""
    for name, told in (("closed", "trial"), ("half-open", "successes")):
        breaker = CircuitBreaker(state_storage=CircuitMemoryStorage(name))
        text = repr(breaker)
        storage_of(breaker).state = equal = "".join(list(name))
        assert repr(breaker) == text
        breaker = CircuitBreaker(state_storage=CircuitMemoryStorage(equal))
        assert repr(breaker) == text
        assert (told in text) == (name == "half-open")


def test_repr_of_a_breaker_without_a_name():
    """The repr says that the breaker is unnamed."""
    assert "unnamed" in repr(CircuitBreaker())


def test_repr_is_one_line_whatever_the_name():
    """The repr shows characters that break lines escaped."""
    breaker = CircuitBreaker(name="db\n<CircuitBreaker 'other': closed>")
    assert len(repr(breaker).splitlines()) == 1
    assert repr(breaker).startswith(f"<CircuitBreaker {breaker.name!r}: closed")


def test_repr_knows_subclasses():
    """The repr shows the breaker's own class."""

    class Special(CircuitBreaker):
        pass

    assert repr(Special()).startswith("<Special ")


# What listeners are told, and in which order.


def test_a_successful_call_is_told(recorder):
    """Listeners hear before_call with the function and its arguments, then success."""
    breaker = CircuitBreaker(listeners=[recorder])
    breaker.call(max, 1, 2, key=abs)
    assert recorder.events == [
        ("before_call", max, (1, 2), {"key": abs}),
        ("success",),
    ]


def test_a_failed_call_is_told(recorder, boom):
    """Listeners hear before_call, then failure with the very exception."""
    breaker = CircuitBreaker(listeners=[recorder])
    exc = boom()
    with pytest.raises(boom):
        breaker.call(raising(exc))
    assert recorder.names == ["before_call", "failure"]
    assert recorder.events[1][1] is exc


def test_an_excluded_exception_is_told_as_a_success(recorder, fail, boom):
    """Listeners hear before_call, then success."""
    breaker = CircuitBreaker(exclude=[boom], listeners=[recorder])
    with pytest.raises(boom):
        breaker.call(fail)
    assert recorder.names == ["before_call", "success"]


def test_an_abandoned_call_is_told_to_begin_only(recorder):
    """Listeners hear before_call, and neither success nor failure."""
    breaker = CircuitBreaker(listeners=[recorder])
    with pytest.raises(KeyboardInterrupt):
        breaker.call(raising(KeyboardInterrupt()))
    assert recorder.names == ["before_call"]


class AbandonedCalls:
    """Hears of abandoned calls, and notes what could be seen then."""

    def __init__(self):
        self.heard = []

    def abandoned(self, cb):
        self.heard.append((cb.name, cb.current_state, is_locked(cb)))


def test_a_listener_may_hear_of_abandoned_calls(run):
    """Listeners are told once for each call, under the lock, in each way to guard."""
    listener = AbandonedCalls()
    breaker = CircuitBreaker(1, name="db", ignore=[LookupError], listeners=[listener])
    for exc in (KeyboardInterrupt(), KeyError(), SystemExit()):
        with pytest.raises(type(exc)):
            run(breaker, raising(exc))
    assert listener.heard == [("db", "closed", True)] * 3
    with pytest.raises(CircuitBreakerError):
        run(breaker, raising(ValueError()))
    with pytest.raises(CircuitBreakerError):
        run(breaker, int)
    breaker.close()
    run(breaker, int)
    assert len(listener.heard) == 3


def test_abandoned_calls_are_told_late_ones_and_trials_included():
    """The trial holds its place until the listener has been told."""
    waits = []

    class Listener(AbandonedCalls):
        def abandoned(self, cb):
            super().abandoned(cb)
            waits.append(cb.retry_after)

    listener = Listener()
    breaker = CircuitBreaker(listeners=[listener])

    def moved(move):
        move()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        breaker.call(moved, breaker.half_open)
    with pytest.raises(KeyboardInterrupt):
        breaker.call(raising(KeyboardInterrupt()))
    assert [state for _, state, _ in listener.heard] == ["half-open", "half-open"]
    assert waits[0] == 0.0
    assert 0.0 < waits[1] <= 60.0
    assert breaker.retry_after == 0.0


def test_a_listener_that_raises_when_it_hears_of_an_abandoned_call_is_logged(caplog):
    """The caller gets what the function raised."""

    class Listener:
        def abandoned(self, cb):
            raise LookupError

    breaker = CircuitBreaker(listeners=[Listener()])
    with pytest.raises(KeyboardInterrupt):
        breaker.call(raising(KeyboardInterrupt()))
    assert [record.exc_info[0] for record in caplog.records] == [LookupError]


def test_a_rejected_call_is_told_as_rejected_only():
    """Listeners hear rejected, once, with the function that was not called."""
    heard = []

    class Listener(CircuitBreakerListener):
        def before_call(self, cb, func, *args, **kwargs):
            heard.append("before_call")

        def rejected(self, cb, func, *args, **kwargs):
            heard.append((cb, func, args, kwargs))

    breaker = CircuitBreaker(listeners=[Listener()])
    breaker.open()
    with pytest.raises(CircuitBreakerError):
        breaker.call(max, 1, 2, key=abs)
    assert heard == [(breaker, max, (1, 2), {"key": abs})]


def test_a_rejected_call_is_no_failure(recorder):
    """A rejection is not counted, and listeners are told of no failure and no
    success."""
    breaker = CircuitBreaker(listeners=[recorder])
    breaker.open()
    recorder.events.clear()
    with pytest.raises(CircuitBreakerError):
        breaker.call(int)
    assert {"before_call", "failure", "success"}.isdisjoint(recorder.names)
    assert breaker.fail_counter == 0


def test_the_life_of_a_circuit_in_order(clock, fail, recorder):
    """A failure is told before the state_change that it causes, a success after it."""
    breaker = CircuitBreaker(2, 10, listeners=[recorder], success_threshold=2)
    failures(breaker, 2, fail)
    clock.advance(10)
    failures(breaker, 1, fail)
    clock.advance(10)
    breaker.call(int)
    breaker.call(int)
    story = [
        (event[0], *event[1:]) if event[0] == "state_change" else event[0]
        for event in recorder.events
    ]
    assert story == [
        "before_call",
        "failure",
        "before_call",
        "failure",
        ("state_change", "closed", "open"),
        ("state_change", "open", "half-open"),
        "before_call",
        "failure",
        ("state_change", "half-open", "open"),
        ("state_change", "open", "half-open"),
        "before_call",
        "success",
        "before_call",
        ("state_change", "half-open", "closed"),
        "success",
    ]


def test_listeners_are_told_one_event_after_the_other(fail):
    """All listeners hear of one event, in their order, before any hears the next."""
    heard = []

    class Listener(CircuitBreakerListener):
        def __init__(self, name):
            self.name = name

        def before_call(self, cb, func, *args, **kwargs):
            heard.append((self.name, "before_call"))

        def failure(self, cb, exc):
            heard.append((self.name, "failure"))

        def state_change(self, cb, old_state, new_state):
            heard.append((self.name, "state_change"))

    breaker = CircuitBreaker(1, listeners=[Listener("a"), Listener("b")])
    failures(breaker, 1, fail)
    assert heard == [
        ("a", "before_call"),
        ("b", "before_call"),
        ("a", "failure"),
        ("b", "failure"),
        ("a", "state_change"),
        ("b", "state_change"),
    ]


def test_listeners_get_the_breaker_and_the_states_themselves(clock, fail):
    """state_change is given state objects: the one that was and the one that is."""
    seen = []

    class Listener(CircuitBreakerListener):
        def before_call(self, cb, func, *args, **kwargs):
            seen.append(cb)

        def success(self, cb):
            seen.append(cb)

        def failure(self, cb, exc):
            seen.append(cb)

        def state_change(self, cb, old_state, new_state):
            seen.append(cb)
            states.append((old_state, new_state))

    states = []
    breaker = CircuitBreaker(1, 10, listeners=[Listener()])
    first = breaker.state
    breaker.call(int)
    failures(breaker, 1, fail)
    second = breaker.state
    breaker.close()
    assert len(seen) == 6
    assert all(cb is breaker for cb in seen)
    assert states[0][0] is first
    assert states[0][1] is states[1][0] is second
    assert states[1][1] is breaker.state
    assert [state.name for state in states[1]] == ["open", "closed"]


def test_the_base_listener_hears_everything_and_does_nothing(clock, fail, caplog):
    """A listener overrides what it wants to hear of and inherits the rest."""
    breaker = CircuitBreaker(1, 10, listeners=[CircuitBreakerListener()])
    failures(breaker, 1, fail)
    clock.advance(10)
    assert breaker.call(int) == 0
    with pytest.raises(KeyboardInterrupt):
        breaker.call(raising(KeyboardInterrupt()))
    assert not any(record.exc_info for record in caplog.records)


def picture(cb):
    """What a listener can see of a breaker."""
    return (
        cb.state.name,
        cb.current_state,
        cb.fail_counter,
        cb.success_counter,
        cb.retry_after,
        storage_of(cb).opened_at,
    )


class Photographer(CircuitBreakerListener):
    """Takes a picture at each event."""

    def __init__(self):
        self.pictures = {}

    def failure(self, cb, exc):
        self.pictures["failure"] = picture(cb)

    def success(self, cb):
        self.pictures["success"] = picture(cb)

    def state_change(self, cb, old_state, new_state):
        assert cb.state is new_state
        self.pictures[new_state.name] = picture(cb)


def test_when_a_failure_is_told_it_is_counted_and_nothing_decided(clock, fail):
    """The breaker decides on the trip after the failure has been told."""
    listener = Photographer()
    breaker = CircuitBreaker(1, 10, listeners=[listener])
    failures(breaker, 1, fail)
    assert listener.pictures["failure"] == ("closed", "closed", 1, 0, 0.0, None)


@pytest.mark.parametrize("how", ["trip", "failed trial", "by hand"])
def test_when_an_opening_is_told_it_is_complete(how, clock, fail):
    """The state is the new one, and so are counters, opened_at and timeout."""
    listener = Photographer()
    breaker = CircuitBreaker(1, 10, success_threshold=3)
    if how == "failed trial":
        breaker.half_open()
        breaker.call(int)
    breaker.add_listener(listener)
    if how == "by hand":
        breaker.open()
    else:
        failures(breaker, 1, fail)
    opened_at = storage_of(breaker).opened_at
    assert opened_at is not None
    failed = 0 if how == "by hand" else 1
    assert listener.pictures["open"] == ("open", "open", failed, 0, 10, opened_at)


def test_when_a_half_opening_by_a_trial_is_told_it_is_complete(clock, fail):
    """The trial holds its place already."""
    listener = Photographer()
    breaker = CircuitBreaker(1, 10, success_threshold=2)
    failures(breaker, 1, fail)
    opened_at = storage_of(breaker).opened_at
    clock.advance(10)
    breaker.add_listener(listener)
    breaker.call(int)
    assert listener.pictures["half-open"] == (
        *("half-open", "half-open"),
        *(1, 0, 10, opened_at),
    )
    assert listener.pictures["success"][:4] == ("half-open", "half-open", 0, 1)


def test_when_a_half_opening_by_hand_is_told_it_is_complete(clock):
    """success_counter is 0 again, and the place is free."""
    listener = Photographer()
    breaker = CircuitBreaker(1, 10, success_threshold=5)
    breaker.half_open()
    breaker.call(int)
    breaker.add_listener(listener)
    breaker.half_open()
    assert listener.pictures["half-open"][:5] == ("half-open", "half-open", 0, 0, 0.0)


def test_when_a_move_by_hand_is_told_a_trial_that_runs_has_lost_its_place():
    """The trial belongs to an era that is over, so no call has to wait for it."""
    waits = []
    breaker = CircuitBreaker()
    breaker.half_open()
    breaker.calling().__enter__()
    breaker.add_listener(Hook("state_change", lambda cb: waits.append(cb.retry_after)))
    breaker.half_open()
    assert waits == [0.0]


@pytest.mark.parametrize("how", ["trial", "by hand"])
def test_when_a_closing_is_told_it_is_complete(how, clock, fail):
    """Both counters are 0."""
    listener = Photographer()
    breaker = CircuitBreaker(2, 10, success_threshold=2, listeners=[listener])
    failures(breaker, 2, fail)
    clock.advance(10)
    breaker.call(int)
    assert (breaker.fail_counter, breaker.success_counter) == (0, 1)
    if how == "trial":
        breaker.call(int)
        assert listener.pictures["success"][:5] == ("closed", "closed", 0, 0, 0.0)
    else:
        breaker.close()
    assert listener.pictures["closed"][:5] == ("closed", "closed", 0, 0, 0.0)


# Why an era began.


class Reasons(CircuitBreakerListener):
    """Remembers the reason of each move that it hears of."""

    def __init__(self):
        self.heard = []

    def state_change(self, cb, old_state, new_state):
        self.heard.append(new_state.reason)


def test_each_era_says_why_it_began(clock, fail, boom):
    """The reason tells what moved the circuit, and the state object keeps the
    reason."""
    reasons = Reasons()
    breaker = CircuitBreaker(2, 60, listeners=[reasons])
    assert breaker.state.reason == "new"
    with pytest.raises(boom):
        breaker.call(fail)
    for _ in range(2):
        with pytest.raises(CircuitBreakerError):
            breaker.call(fail)
        clock.advance(60)
    assert breaker.state.reason == "the trial failed: Boom()"
    breaker.call(int)
    assert breaker.state.reason == "the trial succeeded"
    assert reasons.heard == [
        "2 failures in a row; the last: Boom()",
        "the timeout has passed",
        "the trial failed: Boom()",
        "the timeout has passed",
        "the trial succeeded",
    ]


@pytest.mark.parametrize("name", ["closed", "open", "half-open"])
def test_an_era_that_was_begun_by_hand_says_so(name):
    """The reason is "by hand" for the method and for the setter, from whichever
    state."""
    reasons = Reasons()
    breaker = CircuitBreaker(listeners=[reasons])
    breaker.state = name
    getattr(breaker, {"half-open": "half_open", "closed": "close"}.get(name, name))()
    assert reasons.heard == ["by hand", "by hand"]
    assert breaker.state.reason == "by hand"


@pytest.mark.parametrize("name", ["open", "half-open"])
def test_an_era_that_was_found_in_the_storage_says_so(name):
    """This breaker cannot know why another program moved the circuit."""
    reasons = Reasons()
    breaker = CircuitBreaker(listeners=[reasons])
    storage_of(breaker).state = name
    assert breaker.state.reason == "found so in the storage"
    assert reasons.heard == ["found so in the storage"]


def test_a_trial_whose_half_opening_a_listener_repeats_has_its_place(clock):
    """The trial is admitted once more, in the era that the listener has begun."""
    insisted = []

    class Insists(CircuitBreakerListener):
        def state_change(self, cb, old_state, new_state):
            if new_state.name == "half-open" and not insisted:
                insisted.append(True)
                cb.half_open()

    breaker = CircuitBreaker(reset_timeout=60, listeners=[Insists()])
    breaker.open()
    clock.advance(60)

    def trial():
        assert breaker.retry_after == 60
        with pytest.raises(CircuitBreakerError):
            contextvars.Context().run(breaker.call, int)
        return "result"

    assert breaker.call(trial) == "result"
    assert insisted == [True]
    assert breaker.current_state == "closed"


def test_an_era_that_the_gate_began_says_that_the_timeout_has_passed(clock):
    """The gate gives the same reason as a call that half-opens the circuit."""
    breaker = CircuitBreaker(reset_timeout=60)
    breaker.open()
    clock.advance(60)
    breaker.state.before_call(int)
    assert breaker.state.reason == "the timeout has passed"


def test_an_era_that_an_outcome_handed_over_began_says_what_it_was():
    """`on_failure` and `on_success` give the same reasons as calls do."""
    breaker = CircuitBreaker(1)
    breaker.fail_counter = 1
    with pytest.raises(CircuitBreakerError):
        breaker.state.on_failure(OSError("down"))
    assert breaker.state.reason == "a failure: OSError('down')"
    breaker.half_open()
    breaker.state.on_success()
    assert breaker.state.reason == "the trial succeeded"


def test_an_era_that_a_listener_began_is_by_hand(fail):
    """A listener that closes the circuit while a trip is told closes it by hand."""
    reasons = Reasons()

    class Closes(CircuitBreakerListener):
        def state_change(self, cb, old_state, new_state):
            if new_state.name == "open":
                cb.close()

    breaker = CircuitBreaker(1, listeners=[reasons, Closes()])
    with pytest.raises(CircuitBreakerError):
        breaker.call(fail)
    assert reasons.heard == ["a failure: Boom()", "by hand"]


# The trip is decided after the failure has been told.


def test_a_listener_that_forgives_prevents_the_trip(fail, boom, recorder):
    """The breaker decides on the trip by the count that the listener leaves."""
    forgive = Hook("failure", lambda cb: setattr(cb, "fail_counter", 0))
    breaker = CircuitBreaker(1, listeners=[forgive, recorder])
    with pytest.raises(boom):
        breaker.call(fail)
    assert breaker.current_state == "closed"
    assert breaker.fail_counter == 0
    assert recorder.transitions == []


def test_a_listener_that_lowers_fail_max_brings_the_trip(fail):
    """The breaker decides on the trip by the limit that the listener leaves."""
    strict = Hook("failure", lambda cb: setattr(cb, "fail_max", 1))
    breaker = CircuitBreaker(5, listeners=[strict])
    with pytest.raises(CircuitBreakerError):
        breaker.call(fail)
    assert breaker.current_state == "open"


@pytest.mark.parametrize("name", ["closed", "open", "half-open"])
def test_a_listener_that_moves_the_circuit_has_the_last_word(
    name, fail, boom, recorder
):
    """The listener has begun another era, so the failure of the era before decides
    nothing, and the caller gets the function's exception."""
    move = Hook("failure", lambda cb: setattr(cb, "state", name))
    breaker = CircuitBreaker(1, listeners=[move, recorder])
    with pytest.raises(boom):
        breaker.call(fail)
    assert breaker.current_state == name
    assert recorder.transitions == [("closed", name)]


def test_a_listener_that_ends_the_era_of_a_trial_has_the_last_word(fail, boom):
    """The failed trial of the era before opens nothing."""
    breaker = CircuitBreaker(1)
    breaker.half_open()
    breaker.add_listener(Hook("failure", lambda cb: cb.half_open()))
    with pytest.raises(boom):
        breaker.call(fail)
    assert breaker.current_state == "half-open"


@pytest.mark.parametrize("name", ["closed", "half-open"])
@pytest.mark.parametrize("later", ["closed", "open", "half-open"])
def test_a_call_whose_era_a_listener_ends_at_its_beginning_is_late(
    name, later, fail, boom
):
    """The call was admitted before the listener moved the circuit, so its outcome
    belongs to the era before and changes nothing."""
    breaker = CircuitBreaker(1)
    breaker.state = name
    breaker.add_listener(Hook("before_call", lambda cb: setattr(cb, "state", later)))
    with pytest.raises(boom):
        breaker.call(fail)
    assert breaker.current_state == later
    assert breaker.fail_counter == 0


@pytest.mark.parametrize("move", [CircuitBreaker.half_open, CircuitBreaker.close])
def test_a_trial_that_a_listener_begins_goes_on_when_all_are_told(move, clock):
    """A listener that is told of a move takes the place, and still holds it
    afterwards."""
    trials = []

    def begin(cb):
        cb.half_open()
        trials.append(cb.calling())
        trials[0].__enter__()

    breaker = CircuitBreaker(reset_timeout=60, listeners=[Hook("state_change", begin)])
    move(breaker)
    assert breaker.retry_after == 60
    trials[0].__exit__(None, None, None)
    assert breaker.current_state == "closed"


# The lock, and what listeners may do.


@pytest.mark.parametrize("event", ["before_call", "failure", "success", "state_change"])
def test_listeners_are_called_with_the_lock_held(event, clock, fail):
    """The lock is held, so listeners are called one at a time."""
    locked = []
    hook = Hook(event, lambda cb: locked.append(is_locked(cb)))
    breaker = CircuitBreaker(2, listeners=[hook])
    breaker.call(int)
    failures(breaker, 2, fail)
    assert locked == [True]


def test_a_rejection_is_told_with_the_lock_held():
    """The breaker takes the lock to tell a listener, though not to decide on a
    rejection."""
    locked = []
    breaker = CircuitBreaker()
    breaker.open()
    hook = Hook("rejected", lambda cb: locked.append(is_locked(cb)))
    breaker.add_listener(hook)
    with pytest.raises(CircuitBreakerError):
        breaker.call(int)
    assert locked == [True]


@pytest.mark.parametrize("move", [CircuitBreaker.close, CircuitBreaker.half_open])
def test_a_listener_that_hears_of_a_rejection_does_not_change_it(move, clock):
    """The error says why the call was rejected, whatever a listener has done since."""
    breaker = CircuitBreaker(reset_timeout=60)
    breaker.open()
    clock.advance(20)
    breaker.add_listener(Hook("rejected", move))
    with pytest.raises(CircuitBreakerError) as rejected:
        breaker.call(int)
    assert rejected.value.retry_after == 40
    assert "by hand" in str(rejected.value)
    assert "40.0 s" in str(rejected.value)
    assert breaker.call(int) == 0


def test_a_guarded_call_does_not_run_under_the_lock(recorder):
    """The function runs without the lock, whether the breaker has listeners or none."""
    breaker = CircuitBreaker(listeners=[recorder])
    assert breaker.call(is_locked, breaker) is False


def test_only_a_guarded_call_by_a_listener_runs_under_the_lock():
    """The listener holds the lock all the while."""
    locked = []
    hook = Hook("before_call", lambda cb: locked.append(cb.call(is_locked, cb)))
    breaker = CircuitBreaker(listeners=[hook])
    assert breaker.call(is_locked, breaker) is False
    assert locked == [True]


def test_what_a_listener_causes_is_told_at_once(fail, recorder):
    """The next listener hears of the opening before the failure that brought it
    about."""
    breaker = CircuitBreaker(
        5, listeners=[Hook("failure", lambda cb: cb.open()), recorder]
    )
    failures(breaker, 1, fail)
    assert recorder.names == ["before_call", "state_change", "failure"]


def test_a_listener_that_takes_itself_off_the_list_hides_no_event_from_the_next(
    recorder,
):
    """Code in the field changes breaker._listeners in place, even from within a
    listener."""
    breaker = CircuitBreaker()
    once = Hook("success", lambda cb: cb._listeners.remove(once))
    breaker._listeners.extend([once, recorder])
    breaker.call(int)
    assert recorder.names == ["before_call", "success"]
    assert breaker.listeners == (recorder,)


def test_a_listener_that_is_taken_off_while_it_is_asked_hides_no_other(recorder):
    """The breaker asks each listener that was in the list when the asking began."""

    class Leaves:
        @property
        def success(self):
            breaker._listeners.remove(self)
            return CircuitBreakerListener().success

    breaker = CircuitBreaker()
    breaker._listeners.extend([Leaves(), recorder])
    breaker.call(int)
    assert recorder.names == ["before_call", "success"]


def test_a_predicate_that_takes_itself_off_the_list_hides_no_exception_from_the_next(
    fail, boom
):
    """Code in the field changes breaker._excluded_exceptions from within a
    predicate."""
    breaker = CircuitBreaker(1)
    breaker._excluded_exceptions.append(
        lambda exc: breaker._excluded_exceptions.pop(0) and False
    )
    breaker._excluded_exceptions.append(boom)
    with pytest.raises(boom):
        breaker.call(fail)
    assert breaker.current_state == "closed"
    assert breaker.excluded_exceptions == (boom,)


def test_a_listener_hears_of_what_it_causes_itself(recorder):
    """A listener that moves the circuit is told of that move."""
    heard = []

    class Closer(CircuitBreakerListener):
        def state_change(self, cb, old_state, new_state):
            heard.append((old_state.name, new_state.name))
            if new_state.name == "open":
                cb.close()
            heard.append("done")

    breaker = CircuitBreaker(listeners=[Closer(), recorder])
    breaker.open()
    assert heard == [("closed", "open"), ("open", "closed"), "done", "done"]
    assert breaker.current_state == "closed"
    assert recorder.transitions == [("open", "closed"), ("closed", "open")]


def test_a_guarded_call_by_a_listener_is_guarded(recorder, fail):
    """The call is told and counted at once, like any other."""

    def call(cb):
        with pytest.raises(CircuitBreakerError):
            cb.call(fail)

    breaker = CircuitBreaker(1, listeners=[Hook("success", call), recorder])
    breaker.call(int)
    assert breaker.current_state == "open"
    assert recorder.names == [
        *("before_call", "before_call", "failure", "state_change"),
        "success",
    ]


def test_a_listener_may_read_and_set_everything(recorder):
    """A listener may use all properties and methods of the breaker."""

    def use(cb):
        cb.fail_counter = 1
        cb.fail_max = 9
        cb.reset_timeout = 8
        cb.success_threshold = 7
        cb.name = "renamed"
        assert "renamed" in repr(cb)
        assert cb.retry_after == 0.0
        cb.remove_listener(hook)
        cb.add_listener(recorder)

    hook = Hook("before_call", use)
    breaker = CircuitBreaker(listeners=[hook])
    breaker.call(int)
    assert breaker.fail_max == 9
    assert breaker.listeners == (recorder,)
    assert recorder.names == ["success"]


def test_a_listener_may_close_the_circuit_at_the_beginning_of_a_trial(clock, recorder):
    """The listener closes the circuit, so the call goes on as one in a closed
    circuit."""
    breaker = CircuitBreaker(1, 10)
    breaker.open()
    clock.advance(10)
    breaker.add_listeners(Hook("state_change", lambda cb: cb.close()), recorder)
    assert breaker.call(int) == 0
    assert breaker.current_state == "closed"
    assert recorder.names == [
        *("state_change", "state_change"),
        *("before_call", "success"),
    ]


def test_a_listener_may_open_the_circuit_at_the_beginning_of_a_trial(clock):
    """The listener opens the circuit again, so the call is rejected and does not
    run."""
    ran = []
    breaker = CircuitBreaker(1, 10)
    breaker.open()
    clock.advance(10)
    breaker.add_listener(Hook("state_change", lambda cb: cb.open()))
    with pytest.raises(CircuitBreakerError):
        breaker.call(ran.append, 1)
    assert ran == []
    assert breaker.current_state == "open"
    assert breaker.retry_after == 10


# Exceptions in listeners and predicates.


def tracebacks(caplog):
    """The exceptions that the library logged with their tracebacks."""
    return [
        record.exc_info[1]
        for record in caplog.records
        if record.name == "pybreaker" and record.exc_info
    ]


def run_through(breaker, clock, fail):
    """Makes a success, a trip and a recovery. Returns what callers and operators
    see."""
    seen = []
    for func in (int, fail, int, fail, fail, int):
        try:
            seen.append(breaker.call(func))
        except Exception as exc:
            seen.append((type(exc), str(exc), type(exc.__cause__)))
        seen.append((breaker.current_state, breaker.fail_counter))
    clock.advance(10)
    seen.append(breaker.call(int))
    seen.append((breaker.current_state, breaker.fail_counter))
    return seen


@pytest.mark.parametrize("event", ["before_call", "failure", "success", "state_change"])
@pytest.mark.parametrize("error", [RuntimeError, CircuitBreakerError])
def test_an_exception_in_a_listener_changes_nothing(
    event, error, clock, fail, caplog, recorder
):
    """The caller's result, the state and what other listeners hear stay the same."""
    caplog.set_level(logging.CRITICAL, logger="pybreaker")
    expected_recorder = type(recorder)()
    expected = run_through(
        CircuitBreaker(2, 10, listeners=[expected_recorder]), clock, fail
    )
    exc = error("broken listener")
    broken = type("Broken", (), {event: raising(exc)})()
    breaker = CircuitBreaker(2, 10, listeners=[broken, recorder])
    caplog.set_level(logging.ERROR, logger="pybreaker")
    assert run_through(breaker, clock, fail) == expected
    assert recorder.names == expected_recorder.names
    logged = tracebacks(caplog)
    assert len(logged) == recorder.names.count(event) > 0
    assert all(one is exc for one in logged)


def test_an_exception_in_a_listener_is_logged_so_that_it_can_be_found(caplog):
    """The library logs an error with the traceback, the listener and the event."""

    class Unhappy(CircuitBreakerListener):
        def success(self, cb):
            raise RuntimeError("out of paper")

    CircuitBreaker(listeners=[Unhappy()]).call(int)
    (record,) = (record for record in caplog.records if record.exc_info)
    assert record.name == "pybreaker"
    assert record.levelno == logging.ERROR
    assert "Unhappy" in record.getMessage()
    assert "success" in record.getMessage()
    assert "out of paper" in caplog.text
    assert "Traceback" in caplog.text


@pytest.mark.parametrize(
    "event", ["before_call", "failure", "success", "rejected", "state_change"]
)
def test_a_listener_whose_method_cannot_be_had_changes_nothing(
    event, clock, fail, caplog, recorder
):
    """A proxy whose object is gone raises as soon as it is asked for the method."""

    class Proxy(CircuitBreakerListener):
        gone = False

        def __getattribute__(self, name):
            if name == event and Proxy.gone:
                raise RuntimeError("gone")
            return super().__getattribute__(name)

    expected = run_through(CircuitBreaker(2, 10), clock, fail)
    breaker = CircuitBreaker(2, 10, listeners=[Proxy()])
    Proxy.gone = True
    breaker.add_listener(recorder)  # so that the methods are looked up again
    assert run_through(breaker, clock, fail) == expected
    assert {type(exc) for exc in tracebacks(caplog)} == {RuntimeError}


def test_an_exception_in_a_listener_does_not_undo_what_the_listener_did(
    fail, boom, caplog
):
    """What the listener did to the breaker before it raised stands."""

    def close_and_break(cb):
        cb.close()
        raise RuntimeError

    breaker = CircuitBreaker(1, listeners=[Hook("failure", close_and_break)])
    with pytest.raises(boom):
        breaker.call(fail)
    assert breaker.current_state == "closed"
    assert len(tracebacks(caplog)) == 1


def test_a_predicate_that_raises_did_not_exclude(fail, caplog, boom):
    """The failure counts and reaches the caller; the predicate's exception is
    logged."""
    exc = RuntimeError("broken predicate")
    breaker = CircuitBreaker(2, exclude=[raising(exc)])
    with pytest.raises(boom):
        breaker.call(fail)
    assert breaker.fail_counter == 1
    assert tracebacks(caplog) == [exc]


def test_a_predicate_that_raises_is_logged_where_nothing_is_called(boom, caplog):
    """Code may call is_system_error() without making a guarded call."""
    exc = RuntimeError("broken predicate")
    breaker = CircuitBreaker(exclude=[raising(exc)])
    assert breaker.is_system_error(boom())
    assert tracebacks(caplog) == [exc]


def test_a_predicate_that_raises_leaves_the_decision_to_the_rest(fail, boom, caplog):
    """A predicate or class behind the one that raised may still exclude."""
    breaker = CircuitBreaker(1, exclude=[raising(RuntimeError()), boom])
    with pytest.raises(boom):
        breaker.call(fail)
    assert breaker.fail_counter == 0
    assert breaker.current_state == "closed"
    assert len(tracebacks(caplog)) == 1


def test_an_answer_that_has_no_truth_did_not_exclude(fail, boom, caplog):
    """What a predicate returns may refuse to be true or false, as arrays do."""

    class Array:
        def __bool__(self):
            raise ValueError("ambiguous")

    breaker = CircuitBreaker(2, exclude=[lambda exc: Array()])
    with pytest.raises(boom):
        breaker.call(fail)
    assert breaker.fail_counter == 1
    assert len(tracebacks(caplog)) == 1


def test_a_class_that_cannot_judge_did_not_exclude(fail, boom, caplog):
    """A metaclass may define __instancecheck__, and raise there."""

    class Meta(type):
        def __instancecheck__(cls, instance):
            raise RuntimeError("no opinion")

    breaker = CircuitBreaker(2, exclude=[Meta("Class", (), {})])
    with pytest.raises(boom):
        breaker.call(fail)
    assert breaker.fail_counter == 1
    assert len(tracebacks(caplog)) == 1


# Ctrl-C and the like in listeners and predicates.


class Plain(BaseException):
    """A BaseException that is no Exception and does not abandon a call."""


INTERRUPTIONS = [KeyboardInterrupt, SystemExit, Plain]


@pytest.fixture(
    params=[
        by_call,
        by_block,
        by_generator,
        by_coroutine,
        by_async_generator,
        by_async_block,
    ],
    ids=lambda way: way.__name__,
)
def run(request):
    """Each way to guard is a function `run(breaker, func)`."""
    return request.param


@pytest.mark.parametrize("interruption", INTERRUPTIONS)
def test_an_interrupted_admission_is_taken_back(interruption, run, recorder):
    """In a closed circuit the function does not run, and nothing is counted."""
    ran = []
    interrupt = Hook("before_call", raising(interruption()))
    breaker = CircuitBreaker(1, listeners=[interrupt, recorder])
    with pytest.raises(interruption):
        run(breaker, lambda: ran.append(1))
    assert ran == []
    assert recorder.events == []
    assert breaker.fail_counter == 0
    assert breaker.current_state == "closed"
    run(breaker, lambda: ran.append(2))
    assert ran == [2]


@pytest.mark.parametrize("interruption", INTERRUPTIONS)
@pytest.mark.parametrize("event", ["before_call", "state_change"])
def test_an_interrupted_trial_gives_its_place_back(event, interruption, run, clock):
    """The function does not run, the circuit stays half-open, the next call is a
    trial."""
    ran = []
    breaker = CircuitBreaker(1, 10)
    breaker.open()
    clock.advance(10)
    breaker.add_listener(Hook(event, raising(interruption())))
    with pytest.raises(interruption):
        run(breaker, lambda: ran.append(1))
    assert ran == []
    assert breaker.current_state == "half-open"
    assert breaker.retry_after == 0.0
    run(breaker, lambda: ran.append(2))
    assert ran == [2]
    assert breaker.current_state == "closed"


@pytest.mark.parametrize("interruption", INTERRUPTIONS)
def test_an_interrupted_trial_of_a_half_open_circuit_gives_its_place_back(
    interruption, run, clock
):
    """The circuit was half-open before the interrupted call."""
    breaker = CircuitBreaker(1, 10)
    breaker.half_open()
    breaker.add_listener(Hook("before_call", raising(interruption())))
    with pytest.raises(interruption):
        run(breaker, int)
    assert breaker.retry_after == 0.0
    run(breaker, int)
    assert breaker.current_state == "closed"


@pytest.mark.parametrize("interruption", INTERRUPTIONS)
def test_an_interruption_while_a_failure_is_told_reaches_the_caller(
    interruption, fail, clock
):
    """The failure stays counted; the trip was not decided yet."""
    breaker = CircuitBreaker(2, listeners=[Hook("failure", raising(interruption()))])
    with pytest.raises(interruption):
        breaker.call(fail)
    assert breaker.fail_counter == 1
    with pytest.raises(CircuitBreakerError):
        breaker.call(fail)


@pytest.mark.parametrize("interruption", INTERRUPTIONS)
def test_an_interruption_while_a_success_is_told_reaches_the_caller(
    interruption, fail, boom
):
    """The failures before the success stay forgotten."""
    breaker = CircuitBreaker(5, listeners=[Hook("success", raising(interruption()))])
    with pytest.raises(boom):
        breaker.call(fail)
    with pytest.raises(interruption):
        breaker.call(int)
    assert breaker.fail_counter == 0


@pytest.mark.parametrize("interruption", INTERRUPTIONS)
def test_an_interruption_while_a_trip_is_told_leaves_the_circuit_open(
    interruption, fail, clock
):
    """The opening stands, complete with its timeout."""
    hook = Hook("state_change", raising(interruption()))
    breaker = CircuitBreaker(1, 10, listeners=[hook])
    with pytest.raises(interruption):
        breaker.call(fail)
    assert breaker.current_state == "open"
    assert breaker.state.name == "open"
    assert breaker.fail_counter == 1
    assert breaker.retry_after == 10


@pytest.mark.parametrize("event", ["failure", "success", "state_change"])
@pytest.mark.parametrize("interruption", INTERRUPTIONS)
def test_an_interruption_at_the_end_of_a_trial_gives_the_place_back(
    event, interruption, fail, clock, run
):
    """Any event of a trial's end may be interrupted: the move, the failure or the
    success."""
    breaker = CircuitBreaker(1, 10, success_threshold=2 if event == "success" else 1)
    breaker.half_open()
    breaker.add_listener(Hook(event, raising(interruption())))
    with pytest.raises(interruption):
        run(breaker, fail if event == "failure" else int)
    assert breaker.retry_after == 0.0
    assert breaker.current_state == {"state_change": "closed"}.get(event, "half-open")
    run(breaker, int)
    assert breaker.current_state == "closed"


@pytest.mark.parametrize("interruption", INTERRUPTIONS)
def test_an_interruption_keeps_the_news_from_the_listeners_behind(
    interruption, recorder
):
    """Only the listeners in front of the one that raised hear of the event."""
    first = type(recorder)()
    breaker = CircuitBreaker(
        listeners=[first, Hook("state_change", raising(interruption())), recorder]
    )
    with pytest.raises(interruption):
        breaker.open()
    assert first.transitions == [("closed", "open")]
    assert recorder.events == []
    assert breaker.current_state == "open"


@pytest.mark.parametrize("interruption", INTERRUPTIONS)
def test_an_interruption_in_a_predicate_reaches_the_caller(
    interruption, fail, recorder
):
    """Nothing was decided, so nothing is counted or told; a trial's place is free."""
    breaker = CircuitBreaker(1, exclude=[raising(interruption())], listeners=[recorder])
    with pytest.raises(interruption):
        breaker.call(fail)
    assert breaker.fail_counter == 0
    assert recorder.names == ["before_call"]
    breaker.half_open()
    with pytest.raises(interruption):
        breaker.call(fail)
    assert breaker.current_state == "half-open"
    assert breaker.retry_after == 0.0


def test_an_interruption_leaves_the_lock_free(fail):
    """Another thread can take the lock afterwards."""
    hook = Hook("before_call", raising(KeyboardInterrupt()))
    breaker = CircuitBreaker(listeners=[hook])
    with pytest.raises(KeyboardInterrupt):
        breaker.call(int)
    assert elsewhere(breaker.call, int) == 0


def test_cancelling_is_no_exception_that_is_only_logged():
    """asyncio.CancelledError out of a listener reaches the task."""
    hook = Hook("before_call", raising(asyncio.CancelledError()))
    breaker = CircuitBreaker(listeners=[hook])
    with pytest.raises(asyncio.CancelledError):
        breaker.call(int)


# CircuitBreakerError.

REJECTED = "Timeout not elapsed yet, circuit breaker still open"
TRIPPED = "Failures threshold reached, circuit breaker opened"
TRIAL_FAILED = "Trial call failed, circuit breaker opened"


def rejected_while_open(breaker, clock, fail):
    breaker.open()
    clock.advance(4)
    breaker.call(int)


def rejected_during_a_trial(breaker, clock, fail):
    def client():
        try:
            return breaker.call(int)
        except CircuitBreakerError as exc:
            return exc

    breaker.half_open()
    with breaker.calling():
        clock.advance(4)
        error = elsewhere(client)
    raise error


def tripped(breaker, clock, fail):
    breaker.call(fail)


def trial_failed(breaker, clock, fail):
    breaker.half_open()
    breaker.call(fail)


ERRORS = pytest.mark.parametrize(
    ("provoke", "phrase", "retry_after"),
    [
        (rejected_while_open, REJECTED, 6),
        (rejected_during_a_trial, REJECTED, 6),
        (tripped, TRIPPED, 10),
        (trial_failed, TRIAL_FAILED, 10),
    ],
)


@ERRORS
def test_the_error_tells_why_and_where_and_until_when(
    provoke, phrase, retry_after, clock, fail
):
    """The text has the phrase that code in the field looks for, and the breaker's
    name."""
    breaker = CircuitBreaker(1, 10, name="database")
    with pytest.raises(CircuitBreakerError) as error:
        provoke(breaker, clock, fail)
    message = str(error.value)
    assert phrase in message
    assert "database" in message
    assert f"{retry_after}.0 s" in message
    assert [
        other for other in (REJECTED, TRIPPED, TRIAL_FAILED) if other in message
    ] == [phrase]
    assert error.value.breaker is breaker
    assert error.value.retry_after == retry_after


@ERRORS
def test_the_error_survives_pickling(provoke, phrase, retry_after, clock, fail):
    """The message and retry_after survive; the breaker is left behind."""
    breaker = CircuitBreaker(1, 10, name="database")
    with pytest.raises(CircuitBreakerError) as error:
        provoke(breaker, clock, fail)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        copied = pickle.loads(pickle.dumps(error.value, protocol))
        assert type(copied) is CircuitBreakerError
        assert str(copied) == str(error.value)
        assert copied.args == error.value.args
        assert copied.retry_after == retry_after
        assert copied.breaker is None
    assert error.value.breaker is breaker


def test_the_error_names_the_breaker_in_full():
    """The text shows the whole name, whatever characters the name has."""
    name = "db: main\n(replica 2)"
    breaker = CircuitBreaker(name=name)
    breaker.open()
    with pytest.raises(CircuitBreakerError) as rejected:
        breaker.call(int)
    assert str(rejected.value).startswith(name + ": Timeout not elapsed yet")


def test_a_breaker_without_a_name_is_told_as_one():
    """The message does not say None."""
    breaker = CircuitBreaker()
    breaker.open()
    with pytest.raises(CircuitBreakerError, match="unnamed") as error:
        breaker.call(int)
    assert "None" not in str(error.value)


def test_the_error_names_the_breaker_as_it_is_called_now():
    """The text shows the name that the breaker has when the text is read."""
    breaker = CircuitBreaker(name="before")
    breaker.open()
    breaker.name = "after"
    with pytest.raises(CircuitBreakerError, match="after"):
        breaker.call(int)


def test_the_error_of_a_circuit_that_waits_for_a_move_by_hand():
    """The error says that only a hand helps, and retry_after is math.inf."""
    breaker = CircuitBreaker(reset_timeout=math.inf)
    breaker.open()
    with pytest.raises(CircuitBreakerError, match="only by hand") as error:
        breaker.call(int)
    assert error.value.retry_after == math.inf


def test_the_error_of_a_trip_tells_the_wait_that_a_listener_has_left(fail):
    """The listener closes the circuit that has opened, so a call may come at once."""
    breaker = CircuitBreaker(fail_max=1)
    breaker.add_listener(Hook("state_change", CircuitBreaker.close))
    with pytest.raises(CircuitBreakerError) as tripped:
        breaker.call(fail)
    assert tripped.value.retry_after == breaker.retry_after == 0.0


def test_an_error_that_asks_for_no_wait_speaks_of_none(fail):
    """With reset_timeout=0 the next call may come at once."""
    with pytest.raises(CircuitBreakerError) as error:
        CircuitBreaker(1, 0).call(fail)
    assert error.value.retry_after == 0.0
    assert "trial" not in str(error.value)


@pytest.mark.parametrize("args", [(), ("message",), ("message", 5), (None,)])
def test_the_error_takes_any_arguments(args):
    """The error takes what any exception takes, and carries its defaults."""
    error = CircuitBreakerError(*args)
    assert isinstance(error, Exception)
    assert error.args == args
    assert str(error) == str(Exception(*args))
    assert error.breaker is None
    assert error.retry_after == 0.0
    copied = pickle.loads(pickle.dumps(error))
    assert copied.args == args
    assert copied.breaker is None
    assert copied.retry_after == 0.0


class WithDetails(CircuitBreakerError):
    """An error of the user's own, which lives at module level for pickle."""


def test_what_other_code_has_put_on_the_error_survives_pickling():
    """Notes survive, and so does an attribute that a framework keeps on the error."""
    error = CircuitBreakerError("message")
    error.__notes__ = ["while the customer was updated"]
    error._request_id = 7
    copied = pickle.loads(pickle.dumps(error))
    assert copied.__notes__ == ["while the customer was updated"]
    assert copied._request_id == 7


def test_a_subclass_of_the_error_keeps_what_it_carries():
    """The class and its own attributes survive pickling and copying."""
    error = WithDetails("message")
    error.details = {"host": "db1"}
    error.attempts = 2
    error.retry_after = 3.0
    error.breaker = CircuitBreaker()
    for copied in (pickle.loads(pickle.dumps(error)), copy.deepcopy(error)):
        assert type(copied) is WithDetails
        assert copied.details == {"host": "db1"}
        assert copied.attempts == 2
        assert copied.retry_after == 3.0
        assert copied.breaker is None
