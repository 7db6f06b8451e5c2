"""What happens to a call: the specification's section of that name."""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import contextvars
import datetime
import functools
import itertools
import math
import sys
import threading
import time
import types

import freezegun
import pytest
from internals import storage_of
from support import PATIENCE

import pybreaker
from pybreaker import CircuitBreaker, CircuitBreakerError

STATES = ("closed", "open", "half-open")


def decorated(breaker, func):
    @breaker
    def guarded(*args, **kwargs):
        return func(*args, **kwargs)

    return guarded


def method(breaker, func):
    class Service:
        @breaker
        def fetch(self, *args, **kwargs):
            return func(*args, **kwargs)

    return Service().fetch


def through_call(breaker, func):
    return functools.partial(breaker.call, func)


@pytest.fixture(params=[decorated, method, through_call], ids=lambda way: way.__name__)
def guard(request):
    """Each way to guard a plain function: `guard(breaker, func)` can be called."""
    return request.param


def raising(exc):
    """A function that raises this very exception."""

    def raise_it(*args, **kwargs):
        raise exc

    return raise_it


def fails(call, exc):
    """Asserts that `call` raises this very exception."""
    with pytest.raises(type(exc)) as caught:
        call()
    assert caught.value is exc


def rejects(breaker):
    """Whether a call that is no part of a trial is rejected. A call that is admitted is
    abandoned, so that asking changes nothing in a state."""
    ran = []

    def probe():
        ran.append(True)
        raise KeyboardInterrupt

    with pytest.raises((CircuitBreakerError, KeyboardInterrupt)) as caught:
        contextvars.Context().run(breaker.call, probe)
    rejected = caught.type is CircuitBreakerError
    assert rejected is not bool(ran)
    return rejected


class InFlight:
    """A call that runs, in a thread of its own, until told how to end.

    What the call raises is raised again where the test can see it: by the
    constructor where the call was rejected, else by `succeed` or `fail`.
    """

    def __init__(self, call):
        self._running, self._told = threading.Event(), threading.Event()
        self._exc = self._raised = None
        self._thread = threading.Thread(target=self._run, args=(call,), daemon=True)
        self._thread.start()
        assert self._running.wait(PATIENCE)
        if self._raised is not None:
            raise self._raised

    def _run(self, call):
        try:
            self.result = call(self._body)
        except BaseException as exc:
            self._raised = exc
        finally:
            self._running.set()

    def _body(self):
        self.context = contextvars.copy_context()
        self._running.set()
        assert self._told.wait(PATIENCE)
        if self._exc is not None:
            raise self._exc

    def succeed(self):
        self._told.set()
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()
        if self._raised is not None:
            raise self._raised

    def fail(self, exc):
        self._exc = exc
        self.succeed()


@pytest.fixture
def in_flight():
    """Starts a call through a breaker and leaves the call running."""
    started = []

    def start(breaker):
        call = InFlight(breaker.call)
        started.append(call)
        return call

    yield start
    for call in started:
        call._told.set()
        call._thread.join(PATIENCE)


# Closed.


def test_a_closed_circuit_admits_calls(guard):
    """Arguments go in, the result comes out, and nothing is counted."""
    breaker = CircuitBreaker()
    call = guard(breaker, lambda *args, **kwargs: (args, kwargs))
    assert call(1, 2, three=3) == ((1, 2), {"three": 3})
    assert (breaker.current_state, breaker.fail_counter) == ("closed", 0)


def test_listeners_hear_of_a_success(guard, recorder):
    """Listeners hear of a success although there is no failure to forget."""
    breaker = CircuitBreaker(listeners=[recorder])
    guard(breaker, int)()
    assert recorder.names == ["before_call", "success"]


def test_a_failure_below_the_limit_is_counted_and_raised_as_it_is(guard, boom):
    """The caller gets the very exception, and the circuit stays closed."""
    breaker = CircuitBreaker(fail_max=3)
    for count in (1, 2):
        exc = boom()
        fails(guard(breaker, raising(exc)), exc)
        assert breaker.fail_counter == count
    assert breaker.current_state == "closed"


def test_a_success_sets_the_count_back(guard, fail, boom):
    """Only failures in a row open the circuit."""
    breaker = CircuitBreaker(fail_max=2)
    for _ in range(3):
        with pytest.raises(boom):
            guard(breaker, fail)()
        guard(breaker, int)()
        assert breaker.fail_counter == 0
    assert breaker.current_state == "closed"


def test_the_failure_that_reaches_the_limit_opens_the_circuit(guard, boom):
    """That very call raises CircuitBreakerError from what the function raised."""
    breaker = CircuitBreaker(fail_max=2)
    with pytest.raises(boom):
        guard(breaker, raising(boom()))()
    exc = boom()
    with pytest.raises(CircuitBreakerError, match="Failures threshold reached") as it:
        guard(breaker, raising(exc))()
    assert it.value.__cause__ is exc
    assert (breaker.current_state, breaker.fail_counter) == ("open", 2)


def test_the_trip_can_raise_what_the_function_raised(guard, boom):
    """With throw_new_error_on_trip=False the opening shows only in the state."""
    breaker = CircuitBreaker(fail_max=1, throw_new_error_on_trip=False)
    exc = boom()
    fails(guard(breaker, raising(exc)), exc)
    assert exc.__cause__ is None
    assert breaker.current_state == "open"


def test_a_breaker_that_only_observes_never_opens(guard, fail, boom):
    """With fail_max=math.inf failures are counted, and that is all."""
    breaker = CircuitBreaker(fail_max=math.inf)
    for _ in range(20):
        with pytest.raises(boom):
            guard(breaker, fail)()
    assert (breaker.current_state, breaker.fail_counter) == ("closed", 20)


def test_a_nested_call_in_a_closed_circuit_counts_by_itself(fail, boom):
    """Only a trial takes the calls within it along; here each call counts."""
    breaker = CircuitBreaker(fail_max=5)
    with pytest.raises(boom):
        breaker.call(breaker.call, fail)
    assert breaker.fail_counter == 2


# Open.


def test_an_open_circuit_rejects_calls(guard, clock):
    """The function is not run; the error has the breaker and the time to wait."""
    breaker = CircuitBreaker(reset_timeout=60)
    breaker.open()
    clock.advance(20)
    ran = []
    with pytest.raises(CircuitBreakerError, match="Timeout not elapsed yet") as caught:
        guard(breaker, ran.append)(1)
    assert not ran
    assert caught.value.breaker is breaker
    assert caught.value.retry_after == 40
    assert caught.value.__cause__ is None


def test_the_first_call_after_the_timeout_is_the_trial(guard, clock, fail):
    """The trial makes the circuit half-open and runs the function exactly once."""
    breaker = CircuitBreaker(fail_max=1, reset_timeout=60)
    with pytest.raises(CircuitBreakerError):
        guard(breaker, fail)()
    seen = []
    call = guard(breaker, lambda *args: seen.append((args, breaker.current_state)))
    clock.advance(59.75)
    with pytest.raises(CircuitBreakerError):
        call("too early")
    clock.advance(0.25)
    call("in time")
    assert seen == [(("in time",), "half-open")]
    assert breaker.current_state == "closed"


def test_time_alone_does_not_half_open_the_circuit(clock, recorder):
    """The change happens on the call and not before."""
    breaker = CircuitBreaker(reset_timeout=60)
    breaker.open()
    breaker.add_listener(recorder)
    clock.advance(1000)
    assert breaker.current_state == "open"
    assert breaker.state.name == "open"
    assert breaker.retry_after == 0.0
    assert recorder.events == []
    breaker.call(int)
    assert recorder.transitions == [("open", "half-open"), ("half-open", "closed")]


def test_rejected_calls_do_not_put_the_trial_off(clock):
    """The timeout runs from the opening."""
    breaker = CircuitBreaker(reset_timeout=60)
    breaker.open()
    for _ in range(6):
        assert rejects(breaker)
        clock.advance(10)
    assert not rejects(breaker)


def test_a_timeout_of_zero_lets_the_next_call_be_the_trial(clock):
    """No time has to pass."""
    breaker = CircuitBreaker(reset_timeout=0)
    breaker.open()
    breaker.call(int)
    assert breaker.current_state == "closed"


def test_an_endless_timeout_waits_for_a_move_by_hand(clock):
    """With reset_timeout=math.inf no time half-opens the circuit."""
    breaker = CircuitBreaker(reset_timeout=math.inf)
    breaker.open()
    clock.advance(1e9)
    assert rejects(breaker)
    assert breaker.retry_after == math.inf
    breaker.half_open()
    breaker.call(int)
    assert breaker.current_state == "closed"


def test_a_changed_timeout_holds_for_a_circuit_that_is_open(clock):
    """A timeout that is made longer or shorter is measured from the opening."""
    breaker = CircuitBreaker(reset_timeout=60)
    breaker.open()
    clock.advance(60)
    breaker.reset_timeout = 90
    assert rejects(breaker)
    breaker.reset_timeout = 30
    assert not rejects(breaker)


# Half-open.


def test_while_the_trial_runs_other_calls_are_rejected(guard, clock, in_flight):
    """The trial holds the place, of which there is one."""
    breaker = CircuitBreaker(reset_timeout=60)
    breaker.open()
    clock.advance(60)
    trial = in_flight(breaker)
    assert breaker.current_state == "half-open"
    clock.advance(20)
    ran = []
    with pytest.raises(CircuitBreakerError, match="still open") as caught:
        guard(breaker, ran.append)(1)
    assert not ran
    assert caught.value.retry_after == 40
    trial.succeed()
    guard(breaker, ran.append)(2)
    assert ran == [2]


@pytest.mark.parametrize(
    "end", [None, ValueError(), KeyboardInterrupt()], ids=lambda end: repr(end)
)
def test_a_trial_gives_its_place_back_however_it_ends(end, guard, clock):
    """The next trial runs at once where the circuit is still half-open."""
    breaker = CircuitBreaker(success_threshold=3, exclude=[ValueError])
    breaker.half_open()
    if end is None:
        guard(breaker, int)()
    else:
        fails(guard(breaker, raising(end)), end)
    assert breaker.current_state == "half-open"
    assert breaker.retry_after == 0.0
    assert not rejects(breaker)


def test_a_failed_trial_gives_its_place_back(clock, fail):
    """After the next half-opening the place is free."""
    breaker = CircuitBreaker(reset_timeout=math.inf)
    breaker.half_open()
    with pytest.raises(CircuitBreakerError):
        breaker.call(fail)
    breaker.half_open()
    assert not rejects(breaker)


def test_successful_trials_close_the_circuit(guard, clock, fail, boom):
    """success_threshold trials are needed; the first forgets the failures."""
    breaker = CircuitBreaker(fail_max=2, success_threshold=3)
    with pytest.raises(boom):
        guard(breaker, fail)()
    breaker.half_open()
    for count in (1, 2):
        guard(breaker, int)()
        assert (breaker.current_state, breaker.success_counter) == ("half-open", count)
        assert breaker.fail_counter == 0
    guard(breaker, int)()
    assert breaker.current_state == "closed"
    assert (breaker.fail_counter, breaker.success_counter) == (0, 0)


def test_a_failed_trial_opens_the_circuit_for_another_full_timeout(
    guard, clock, boom, recorder
):
    """The failure of the trial adds one to the count, and the trial raises from what
    the function raised."""
    breaker = CircuitBreaker(fail_max=2, reset_timeout=60, success_threshold=2)
    breaker.fail_counter = 2
    breaker.open()
    clock.advance(100)
    guard(breaker, int)()
    breaker.fail_counter = 2
    breaker.add_listener(recorder)
    exc = boom()
    with pytest.raises(CircuitBreakerError, match="Trial call failed") as caught:
        guard(breaker, raising(exc))()
    assert caught.value.__cause__ is exc
    assert caught.value.retry_after == 60
    assert (breaker.current_state, breaker.fail_counter) == ("open", 3)
    assert breaker.success_counter == 0
    assert recorder.transitions == [("half-open", "open")]
    clock.advance(59)
    assert rejects(breaker)
    clock.advance(1)
    assert not rejects(breaker)


def test_a_failed_trial_can_raise_what_the_function_raised(guard, boom):
    """With throw_new_error_on_trip=False the caller gets the function's exception."""
    breaker = CircuitBreaker(throw_new_error_on_trip=False)
    breaker.half_open()
    exc = boom()
    fails(guard(breaker, raising(exc)), exc)
    assert breaker.current_state == "open"


def test_one_failed_trial_is_enough_whatever_fail_max_is(fail):
    """The count has to reach the limit in the closed state only."""
    breaker = CircuitBreaker(fail_max=math.inf)
    breaker.half_open()
    with pytest.raises(CircuitBreakerError):
        breaker.call(fail)
    assert (breaker.current_state, breaker.fail_counter) == ("open", 1)


# A trial that hangs.


def test_after_the_timeout_the_next_call_takes_the_place_over(clock, in_flight):
    """A trial that hangs cannot hold the circuit for ever."""
    breaker = CircuitBreaker(reset_timeout=60)
    breaker.half_open()
    in_flight(breaker)
    clock.advance(59.75)
    assert rejects(breaker)
    assert breaker.retry_after == 0.25
    for seconds in (0.25, 100):
        clock.advance(seconds)
        assert breaker.retry_after == 0.0
    breaker.call(int)
    assert breaker.current_state == "closed"


def test_a_call_that_takes_the_place_over_holds_it_as_long(clock, in_flight):
    """Each trial's time counts from when that trial took the place."""
    breaker = CircuitBreaker(reset_timeout=60)
    breaker.half_open()
    in_flight(breaker)
    clock.advance(60)
    in_flight(breaker)
    clock.advance(59)
    assert rejects(breaker)
    clock.advance(1)
    assert not rejects(breaker)


@pytest.mark.parametrize(
    ("timeout", "rejected"), [(49, False), (50, False), (51, True), (math.inf, True)]
)
def test_the_timeout_at_the_time_of_asking_decides(clock, in_flight, timeout, rejected):
    """The timeout that held when the trial took the place does not matter."""
    breaker = CircuitBreaker(reset_timeout=60 if rejected else math.inf)
    breaker.half_open()
    in_flight(breaker)
    clock.advance(50)
    breaker.reset_timeout = timeout
    assert rejects(breaker) is rejected


def test_with_an_endless_timeout_a_trial_is_never_replaced(clock, in_flight):
    """Only moving the circuit by hand frees the place of a trial that hangs."""
    breaker = CircuitBreaker(reset_timeout=math.inf)
    breaker.half_open()
    in_flight(breaker)
    clock.advance(1e9)
    assert rejects(breaker)
    assert breaker.retry_after == math.inf
    breaker.half_open()
    assert not rejects(breaker)


def test_the_success_of_a_trial_that_lost_its_place_counts(clock, in_flight):
    """A trial that lost its place is still a trial as long as its era lasts."""
    breaker = CircuitBreaker(reset_timeout=60, success_threshold=2)
    breaker.half_open()
    lost = in_flight(breaker)
    clock.advance(60)
    holder = in_flight(breaker)
    lost.succeed()
    assert (breaker.current_state, breaker.success_counter) == ("half-open", 1)
    holder.succeed()
    assert breaker.current_state == "closed"


def test_the_failure_of_a_trial_that_lost_its_place_counts(clock, in_flight, boom):
    """The failure opens the circuit for a full timeout, while the call that took over
    runs."""
    breaker = CircuitBreaker(reset_timeout=60)
    breaker.half_open()
    lost = in_flight(breaker)
    clock.advance(60)
    holder = in_flight(breaker)
    clock.advance(30)
    with pytest.raises(CircuitBreakerError, match="Trial call failed"):
        lost.fail(boom())
    assert (breaker.current_state, breaker.retry_after) == ("open", 60)
    holder.succeed()
    assert (breaker.current_state, breaker.success_counter) == ("open", 0)


@pytest.mark.parametrize("end", [None, KeyboardInterrupt()], ids=repr)
def test_a_trial_that_lost_its_place_has_none_to_give_back(clock, in_flight, end):
    """The call that took the place over keeps it, for a whole timeout of its own."""
    breaker = CircuitBreaker(reset_timeout=60, success_threshold=3)
    breaker.half_open()
    lost = in_flight(breaker)
    clock.advance(60)
    in_flight(breaker)
    clock.advance(20)
    if end is None:
        lost.succeed()
    else:
        fails(lambda: lost.fail(end), end)
    assert breaker.current_state == "half-open"
    assert breaker.retry_after == 40
    assert rejects(breaker)


def test_a_new_era_finds_the_place_empty(clock, in_flight):
    """A call of the era before holds no place in the new one, and frees none when it
    ends."""
    breaker = CircuitBreaker(success_threshold=2, reset_timeout=60)
    breaker.half_open()
    old = in_flight(breaker)
    breaker.half_open()
    clock.advance(10)
    in_flight(breaker)
    old.succeed()
    assert breaker.success_counter == 0
    assert breaker.retry_after == 60
    assert rejects(breaker)


# Calls within a trial.


def test_a_call_within_a_trial_is_let_through(guard, clock, recorder):
    """A guarded function that calls another guarded function brings its circuit back;
    listeners hear of both calls."""
    breaker = CircuitBreaker(success_threshold=2)
    breaker.half_open()
    breaker.add_listener(recorder)
    inner = guard(breaker, lambda: "answer")
    assert guard(breaker, inner)() == "answer"
    assert breaker.success_counter == 1
    assert recorder.names == ["before_call", "before_call", "success", "success"]
    guard(breaker, inner)()
    assert breaker.current_state == "closed"


def test_the_failure_of_a_call_within_a_trial_decides_nothing(guard, boom, recorder):
    """The failure is raised as it is and listeners hear of it; the trial may yet
    succeed."""
    breaker = CircuitBreaker(fail_max=1, listeners=[recorder])
    breaker.half_open()
    exc = boom()

    def trial():
        fails(guard(breaker, raising(exc)), exc)
        return breaker.current_state, breaker.fail_counter, breaker.success_counter

    assert guard(breaker, trial)() == ("half-open", 0, 0)
    assert breaker.current_state == "closed"
    assert ("failure", exc) in recorder.events
    assert recorder.names.count("failure") == 1
    assert recorder.transitions == [("closed", "half-open"), ("half-open", "closed")]


def test_a_call_within_a_trial_gives_no_place_back(clock):
    """When the inner call ends, the trial still holds its own place."""
    breaker = CircuitBreaker(reset_timeout=60)
    breaker.half_open()

    def trial():
        breaker.call(int)
        clock.advance(20)
        return rejects(breaker), breaker.retry_after

    assert breaker.call(trial) == (True, 40)


def test_a_timeout_of_0_leaves_a_trial_the_calls_within_it():
    """A call in another context may take the trial's place at once."""
    breaker = CircuitBreaker(reset_timeout=0, success_threshold=2)
    breaker.half_open()
    assert breaker.call(breaker.call, int) == 0
    assert breaker.success_counter == 1


def test_a_call_within_a_trial_takes_its_place_when_the_timeout_is_over(clock):
    """The call within does what any other call would do; both calls are trials that
    succeed."""
    breaker = CircuitBreaker(reset_timeout=60, success_threshold=3)
    breaker.half_open()

    def work():
        clock.advance(60)
        return breaker.call(int)

    assert breaker.call(work) == 0
    assert breaker.success_counter == 2


def test_calls_within_calls_within_a_trial_belong_to_it(guard):
    """Calls belong to the trial however deep they are."""
    breaker = CircuitBreaker(success_threshold=2)
    breaker.half_open()

    def countdown(n):
        return "lift-off" if n == 0 else call(n - 1)

    call = guard(breaker, countdown)
    assert call(5) == "lift-off"
    assert (breaker.current_state, breaker.success_counter) == ("half-open", 1)


def test_two_half_open_breakers_may_call_each_other(guard, clock):
    """Other breakers' trials in between change nothing."""
    one, other = CircuitBreaker(), CircuitBreaker()
    one.half_open()
    other.half_open()

    def ask(n):
        return "answer" if n == 0 else (ask_one if n % 2 else ask_other)(n - 1)

    ask_one, ask_other = guard(one, ask), guard(other, ask)
    assert ask_one(4) == "answer"
    assert (one.current_state, other.current_state) == ("closed", "closed")


def test_a_trial_goes_on_after_another_breakers_trial_within_it():
    """The end of the inner trial takes nothing from the outer one."""
    outer, inner = CircuitBreaker(success_threshold=2), CircuitBreaker()
    outer.half_open()
    inner.half_open()

    def trial():
        inner.call(int)
        outer.call(int)
        return rejects(outer), inner.current_state

    assert outer.call(trial) == (True, "closed")
    assert outer.success_counter == 1


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_trials_of_several_breakers_may_end_in_any_order(order):
    """The end of one trial takes nothing from the trials that go on, older or
    younger."""
    breakers = [CircuitBreaker(success_threshold=2) for _ in order]
    trials = [breaker.calling() for breaker in breakers]
    for breaker, trial in zip(breakers, trials):
        breaker.half_open()
        trial.__enter__()
    for ended, number in enumerate(order):
        trials[number].__exit__(None, None, None)
        for running in order[ended + 1 :]:
            breakers[running].call(int)
            assert breakers[running].success_counter == 0
            assert rejects(breakers[running])


def test_a_trial_of_one_breaker_admits_no_call_of_another(in_flight):
    """The rejection by the other breaker is the failure of this breaker's trial."""
    one, other = CircuitBreaker(), CircuitBreaker()
    one.half_open()
    other.half_open()
    in_flight(other)
    with pytest.raises(CircuitBreakerError) as caught:
        one.call(other.call, int)
    assert caught.value.breaker is one
    assert caught.value.__cause__.breaker is other
    assert one.current_state == "open"


def test_tasks_that_a_trial_starts_belong_to_it(guard):
    """The tasks' calls are let through, all at once, and decide nothing."""
    breaker = CircuitBreaker(success_threshold=2)
    breaker.half_open()

    def trial():
        async def ask(n):
            await asyncio.sleep(0)
            return guard(breaker, abs)(n)

        async def gather():
            return await asyncio.gather(*(ask(-n) for n in range(5)))

        return asyncio.run(gather())

    assert guard(breaker, trial)() == [0, 1, 2, 3, 4]
    assert (breaker.current_state, breaker.success_counter) == ("half-open", 1)


def test_a_thread_that_gets_the_trials_context_belongs_to_it():
    """asyncio.to_thread hands the context over."""
    breaker = CircuitBreaker(success_threshold=2)
    breaker.half_open()

    def trial():
        return asyncio.run(asyncio.to_thread(breaker.call, abs, -1))

    assert breaker.call(trial) == 1
    assert breaker.success_counter == 1


@pytest.mark.skipif(
    getattr(sys.flags, "thread_inherit_context", False),
    reason="here every new thread gets the context of the one that starts it",
)
def test_a_thread_without_the_trials_context_does_not_belong_to_it(in_flight):
    """The call of such a thread is rejected like any other."""
    breaker = CircuitBreaker()
    breaker.half_open()

    def trial():
        with pytest.raises(CircuitBreakerError):
            in_flight(breaker)
        return "rejected"

    assert breaker.call(trial) == "rejected"


def test_nothing_belongs_to_a_trial_that_has_ended(clock, in_flight):
    """A call in the ended trial's context is rejected while the next trial runs."""
    breaker = CircuitBreaker(success_threshold=3)
    breaker.half_open()
    trial = in_flight(breaker)
    assert trial.context.run(breaker.call, abs, -1) == 1
    trial.succeed()
    in_flight(breaker)
    with pytest.raises(CircuitBreakerError):
        trial.context.run(breaker.call, int)


def test_a_call_in_the_context_of_an_ended_trial_can_be_a_trial(in_flight):
    """The call takes the place and counts, as a call in any other context does."""
    breaker = CircuitBreaker(success_threshold=3)
    breaker.half_open()
    trial = in_flight(breaker)
    trial.succeed()
    assert trial.context.run(breaker.call, rejects, breaker)
    assert breaker.success_counter == 2


def test_nothing_belongs_to_a_trial_that_lost_its_place(clock, in_flight):
    """Calls in its context are rejected while the call that took over holds the
    place."""
    breaker = CircuitBreaker(reset_timeout=60, success_threshold=3)
    breaker.half_open()
    lost = in_flight(breaker)
    clock.advance(60)
    holder = in_flight(breaker)
    with pytest.raises(CircuitBreakerError):
        lost.context.run(breaker.call, int)
    assert holder.context.run(breaker.call, abs, -1) == 1


@pytest.mark.parametrize("move", ["open", "half_open", "close"])
def test_nothing_belongs_to_a_trial_of_an_earlier_era(clock, in_flight, move):
    """A call in the old trial's context is treated as any other in the new state."""
    breaker = CircuitBreaker(fail_max=5, success_threshold=3)
    breaker.half_open()
    trial = in_flight(breaker)
    getattr(breaker, move)()
    if move == "open":
        with pytest.raises(CircuitBreakerError):
            trial.context.run(breaker.call, int)
    elif move == "half_open":
        assert trial.context.run(breaker.call, rejects, breaker)
        assert breaker.success_counter == 1
    else:
        exc = OSError()
        fails(lambda: trial.context.run(breaker.call, raising(exc)), exc)
        assert breaker.fail_counter == 1


@pytest.mark.parametrize("end", [None, OSError()], ids=repr)
def test_a_call_within_a_trial_decides_nothing_after_the_trial(
    clock, in_flight, recorder, end
):
    """The call may outlast the trial, and is still what it was admitted as."""
    breaker = CircuitBreaker(fail_max=1)
    breaker.half_open()
    trial = in_flight(breaker)
    within = InFlight(functools.partial(trial.context.copy().run, breaker.call))
    trial.succeed()
    breaker.fail_max = 5
    breaker.fail_counter = 3
    breaker.add_listener(recorder)
    if end is None:
        within.succeed()
        assert recorder.events == [("success",)]
    else:
        fails(lambda: within.fail(end), end)
        assert recorder.events == [("failure", end)]
    assert (breaker.current_state, breaker.fail_counter) == ("closed", 3)


def test_a_call_within_a_trial_gives_no_later_place_back(clock, in_flight):
    """The call may end while the next trial runs, and leaves that trial its place."""
    breaker = CircuitBreaker(success_threshold=3)
    breaker.half_open()
    trial = in_flight(breaker)
    within = InFlight(functools.partial(trial.context.copy().run, breaker.call))
    trial.succeed()
    in_flight(breaker)
    within.succeed()
    assert rejects(breaker)
    assert breaker.success_counter == 1


# Outcomes.


@pytest.mark.parametrize(
    "exclusion", [LookupError, lambda exc: "missing" in str(exc)], ids=type
)
def test_an_excluded_exception_is_a_success(guard, recorder, exclusion):
    """The exception reaches the caller untouched, and the count goes back to 0."""
    breaker = CircuitBreaker(fail_max=2, exclude=[exclusion], listeners=[recorder])
    breaker.fail_counter = 1
    exc = KeyError("missing")
    fails(guard(breaker, raising(exc)), exc)
    assert (breaker.current_state, breaker.fail_counter) == ("closed", 0)
    assert recorder.names == ["before_call", "success"]


def test_an_excluded_exception_is_a_successful_trial(guard, recorder):
    """The trial closes the circuit, as any successful trial does."""
    breaker = CircuitBreaker(exclude=[LookupError])
    breaker.half_open()
    exc = KeyError()
    fails(guard(breaker, raising(exc)), exc)
    assert breaker.current_state == "closed"


class ServiceGone(BaseException):
    """An exception that is no Exception and does not abandon a call."""


@pytest.mark.parametrize("exc", [OSError(), ServiceGone()], ids=repr)
def test_any_other_exception_is_a_failure(guard, recorder, exc):
    """A plain BaseException is a failure as well."""
    breaker = CircuitBreaker(fail_max=5, exclude=[LookupError], listeners=[recorder])
    fails(guard(breaker, raising(exc)), exc)
    assert breaker.fail_counter == 1
    assert recorder.events[1:] == [("failure", exc)]


def base_exception_group():
    """The class, built in from Python 3.11 on and from a package before."""
    name = "BaseExceptionGroup"
    return getattr(builtins, name, None) or getattr(
        pytest.importorskip("exceptiongroup"), name
    )


def cancelled_by_trio():
    """An exception that trio itself has raised."""
    trio = pytest.importorskip("trio")
    raised = []

    async def be_cancelled():
        with trio.CancelScope() as scope:
            scope.cancel()
            try:
                await trio.lowlevel.checkpoint()
            except trio.Cancelled as exc:
                raised.append(exc)
                raise

    trio.run(be_cancelled)
    return raised[0]


class GreenletExit(BaseException):
    """What the module greenlet has under this name, as far as it matters here."""


class BackportedGroup(BaseException):
    """What the module exceptiongroup has for Pythons without groups."""

    exceptions = (KeyboardInterrupt(), asyncio.CancelledError())


ABANDONMENTS = {
    "KeyboardInterrupt": KeyboardInterrupt,
    "SystemExit": lambda: SystemExit(1),
    "a subclass of SystemExit": type("Exit", (SystemExit,), {}),
    "GeneratorExit": GeneratorExit,
    "asyncio.CancelledError": asyncio.CancelledError,
    "trio.Cancelled": cancelled_by_trio,
    "greenlet.GreenletExit": GreenletExit,
    "group": lambda: base_exception_group()("", [KeyboardInterrupt(), SystemExit()]),
    "group in a group": lambda: base_exception_group()(
        "", [SystemExit(), base_exception_group()("", [asyncio.CancelledError()])]
    ),
    "backported group": BackportedGroup,
}


@pytest.fixture(params=ABANDONMENTS)
def abandonment(request, monkeypatch):
    """Each exception that abandons a call."""
    exc = ABANDONMENTS[request.param]()
    if type(exc) is GreenletExit:
        greenlet = types.SimpleNamespace(GreenletExit=GreenletExit)
        monkeypatch.setitem(sys.modules, "greenlet", greenlet)
    elif type(exc) is BackportedGroup:
        exceptiongroup = types.SimpleNamespace(BaseExceptionGroup=BackportedGroup)
        monkeypatch.setitem(sys.modules, "exceptiongroup", exceptiongroup)
    return exc


def test_an_abandoned_call_tells_nothing_about_the_service(
    guard, recorder, abandonment
):
    """Nothing is counted or forgotten, and no listener hears of a success or a
    failure."""
    breaker = CircuitBreaker(fail_max=2, listeners=[recorder])
    breaker.fail_counter = 1
    fails(guard(breaker, raising(abandonment)), abandonment)
    assert (breaker.current_state, breaker.fail_counter) == ("closed", 1)
    assert recorder.names == ["before_call"]


def test_exclusions_have_no_say_in_an_abandoned_call(guard, recorder, abandonment):
    """No predicate is asked, and no class makes it a success."""
    asked = []
    breaker = CircuitBreaker(
        fail_max=2,
        exclude=[asked.append, type(abandonment), BaseException],
        listeners=[recorder],
    )
    breaker.fail_counter = 1
    fails(guard(breaker, raising(abandonment)), abandonment)
    assert breaker.fail_counter == 1
    assert recorder.names == ["before_call"]
    assert not asked


def test_an_abandoned_trial_only_gives_its_place_back(guard, recorder, abandonment):
    """The circuit stays half-open, as far from closing as it was."""
    breaker = CircuitBreaker(success_threshold=3)
    breaker.half_open()
    guard(breaker, int)()
    breaker.add_listener(recorder)
    fails(guard(breaker, raising(abandonment)), abandonment)
    assert (breaker.current_state, breaker.success_counter) == ("half-open", 1)
    assert breaker.fail_counter == 0
    assert recorder.names == ["before_call"]
    assert not rejects(breaker)


@pytest.mark.parametrize(
    "others", [[OSError()], [OSError(), KeyboardInterrupt()]], ids=repr
)
def test_a_group_with_anything_else_in_it_is_a_failure(guard, others):
    """The call has failed, whatever was given up beside that failure."""
    breaker = CircuitBreaker()
    exc = base_exception_group()("", others)
    fails(guard(breaker, raising(exc)), exc)
    assert breaker.fail_counter == 1


def test_a_group_deep_down_with_anything_else_in_it_is_a_failure():
    """All the leaves of the tree are looked at."""
    breaker = CircuitBreaker()
    group = base_exception_group()
    exc = group("", [KeyboardInterrupt(), group("", [SystemExit(), OSError()])])
    fails(lambda: breaker.call(raising(exc)), exc)
    assert breaker.fail_counter == 1


def test_nothing_is_imported_to_know_what_abandons_a_call(guard, monkeypatch):
    """A class that was never imported was never raised."""
    names = ("asyncio", "trio", "greenlet", "exceptiongroup")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    breaker = CircuitBreaker()
    for exc in (ServiceGone(), KeyboardInterrupt(), GreenletExit()):
        fails(guard(breaker, raising(exc)), exc)
    assert breaker.fail_counter == 2
    assert not set(names) & set(sys.modules)


def test_a_module_that_is_not_what_its_name_says_does_no_harm(monkeypatch):
    """The module may have no such class, or some other object of that name."""
    greenlet = types.SimpleNamespace(GreenletExit="no class")
    monkeypatch.setitem(sys.modules, "greenlet", greenlet)
    monkeypatch.setitem(sys.modules, "trio", types.SimpleNamespace())
    breaker = CircuitBreaker()
    exc = ServiceGone()
    fails(lambda: breaker.call(raising(exc)), exc)
    assert breaker.fail_counter == 1


# Late outcomes.


def moved(breaker, moves):
    for move in moves.split():
        getattr(breaker, move)()


LATER = ["open", "half_open", "close", "open half_open", "open half_open close"]


@pytest.mark.parametrize("moves", LATER)
@pytest.mark.parametrize("admitted", ["closed", "half-open"])
def test_a_late_failure_changes_nothing(
    guard, clock, recorder, boom, fail, admitted, moves
):
    """The failure is raised as it is, and listeners hear of it."""
    breaker = CircuitBreaker(fail_max=1, reset_timeout=60, success_threshold=2)
    breaker.state = admitted
    exc = boom()

    def work():
        moved(breaker, moves)
        if breaker.current_state == "half-open":
            breaker.call(int)
        clock.advance(10)
        before.append((breaker.state, repr(breaker), breaker.success_counter))
        breaker.add_listener(recorder)
        raise exc

    before = []
    fails(guard(breaker, work), exc)
    assert exc.__cause__ is None
    assert before == [(breaker.state, repr(breaker), breaker.success_counter)]
    assert recorder.events == [("failure", exc)]


@pytest.mark.parametrize("moves", LATER)
@pytest.mark.parametrize("admitted", ["closed", "half-open"])
@pytest.mark.parametrize("end", [None, KeyError()], ids=repr)
def test_a_late_success_changes_nothing(guard, clock, recorder, admitted, moves, end):
    """The success forgets no failure and closes no circuit; listeners hear of it."""
    breaker = CircuitBreaker(reset_timeout=60, exclude=[KeyError])
    breaker.state = admitted

    def work():
        moved(breaker, moves)
        breaker.fail_counter = 3
        clock.advance(10)
        before.append((breaker.state, repr(breaker), breaker.success_counter))
        breaker.add_listener(recorder)
        if end is not None:
            raise end

    before = []
    call = guard(breaker, work)
    call() if end is None else fails(call, end)
    assert before == [(breaker.state, repr(breaker), breaker.success_counter)]
    assert breaker.fail_counter == 3
    assert recorder.events == [("success",)]


def test_a_late_success_is_heard_of_where_no_failures_are_to_forget(guard, recorder):
    """The listener was added during the call, after the call's own era."""
    breaker = CircuitBreaker()

    def work():
        moved(breaker, "open close")
        breaker.add_listener(recorder)

    guard(breaker, work)()
    assert recorder.events == [("success",)]


def test_a_late_call_that_was_abandoned_is_not_even_heard_of(recorder):
    """The call tells nothing about the service in its own era, or in a later one."""
    breaker = CircuitBreaker(listeners=[recorder])

    def work():
        breaker.open()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        breaker.call(work)
    assert recorder.names == ["before_call", "state_change"]


def test_a_late_failure_does_not_open_a_circuit_that_closed_again(
    clock, in_flight, fail, boom
):
    """The new era has the same state, and its count is one below the limit."""
    breaker = CircuitBreaker(fail_max=2, reset_timeout=60)
    late = in_flight(breaker)
    for error in (boom, CircuitBreakerError):
        with pytest.raises(error):
            breaker.call(fail)
    clock.advance(60)
    breaker.call(int)
    with pytest.raises(boom):
        breaker.call(fail)
    exc = boom()
    fails(lambda: late.fail(exc), exc)
    assert (breaker.current_state, breaker.fail_counter) == ("closed", 1)


@pytest.mark.parametrize("moves", ["close", "open close", "open half_open close"])
@pytest.mark.parametrize(
    "window", [{}, {"window_size": 9}, {"window_seconds": 9}], ids=str
)
def test_a_late_failure_of_which_no_listener_hears_is_not_counted(
    guard, boom, moves, window
):
    """The circuit is closed when the call begins and when the call ends, and far from
    opening. The failure belongs to the closed era before."""
    breaker = CircuitBreaker(fail_max=9, **window)
    exc = boom()

    def work():
        moved(breaker, moves)
        raise exc

    fails(guard(breaker, work), exc)
    assert (breaker.current_state, breaker.fail_counter) == ("closed", 0)


# By hand.


@pytest.mark.parametrize("start", STATES)
@pytest.mark.parametrize(
    ("move", "end"),
    [("close", "closed"), ("open", "open"), ("half_open", "half-open")],
)
def test_every_move_by_hand_works_from_every_state(recorder, start, move, end):
    """Listeners are told and a new era begins, also where the name stays the same."""
    breaker = CircuitBreaker()
    breaker.state = start
    breaker.add_listener(recorder)
    before = breaker.state
    getattr(breaker, move)()
    assert breaker.current_state == breaker.state.name == end
    assert breaker.state is not before
    assert recorder.events == [("state_change", start, end)]


@pytest.mark.parametrize("start", STATES)
@pytest.mark.parametrize(
    ("move", "failures"), [("close", 0), ("open", 3), ("half_open", 3)]
)
def test_only_closing_sets_the_failures_to_0(start, move, failures):
    """The other moves leave the count alone."""
    breaker = CircuitBreaker()
    breaker.state = start
    breaker.fail_counter = 3
    getattr(breaker, move)()
    assert breaker.fail_counter == failures


@pytest.mark.parametrize("move", ["close", "open", "half_open"])
def test_every_move_by_hand_sets_the_successes_to_0(move):
    """The next trials are counted from 0."""
    breaker = CircuitBreaker(success_threshold=3)
    breaker.half_open()
    breaker.call(int)
    assert breaker.success_counter == 1
    getattr(breaker, move)()
    assert breaker.success_counter == 0


def test_the_half_opening_by_a_trial_leaves_the_successes(clock):
    """Another process that shares the circuit may have had successful trials."""
    storage = pybreaker.CircuitMemoryStorage("closed")
    breaker = CircuitBreaker(success_threshold=3, state_storage=storage)
    breaker.open()
    clock.advance(60)
    storage.increment_success_counter()
    breaker.call(int)
    assert (breaker.current_state, breaker.success_counter) == ("half-open", 2)


def test_a_trip_sets_the_successes_to_0(fail):
    """A trip is an opening, and every opening sets success_counter to 0."""
    storage = pybreaker.CircuitMemoryStorage("closed")
    breaker = CircuitBreaker(fail_max=1, state_storage=storage)
    storage.increment_success_counter()
    with pytest.raises(CircuitBreakerError):
        breaker.call(fail)
    assert (breaker.current_state, breaker.success_counter) == ("open", 0)


def test_opening_an_open_circuit_starts_its_timeout_again(clock):
    """Opening by hand starts the timeout again, and rejected calls do not."""
    breaker = CircuitBreaker(reset_timeout=60)
    breaker.open()
    clock.advance(59)
    breaker.open()
    clock.advance(59)
    assert rejects(breaker)
    clock.advance(1)
    assert not rejects(breaker)


def test_a_circuit_half_opened_by_hand_takes_the_next_call_for_its_trial(clock, fail):
    """The next call is the trial, however much of the timeout is left."""
    breaker = CircuitBreaker(reset_timeout=60)
    breaker.open()
    breaker.half_open()
    with pytest.raises(CircuitBreakerError, match="Trial call failed"):
        breaker.call(fail)
    assert (breaker.current_state, breaker.retry_after) == ("open", 60)


def test_a_trial_for_which_a_listener_closes_the_circuit_is_a_plain_call(
    guard, clock, fail, boom
):
    """The call is admitted anew, in the closed circuit that the listener leaves."""

    class Closer(pybreaker.CircuitBreakerListener):
        def state_change(self, cb, old_state, new_state):
            if new_state.name == "half-open":
                cb.close()

    breaker = CircuitBreaker(fail_max=2, reset_timeout=60, listeners=[Closer()])
    breaker.open()
    clock.advance(60)
    with pytest.raises(boom):
        guard(breaker, fail)()
    assert (breaker.current_state, breaker.fail_counter) == ("closed", 1)


def test_a_trial_for_which_a_listener_opens_the_circuit_is_rejected(guard, clock):
    """The function does not run, because the listener has opened the circuit again."""

    class Opener(pybreaker.CircuitBreakerListener):
        def state_change(self, cb, old_state, new_state):
            if new_state.name == "half-open":
                cb.open()

    breaker = CircuitBreaker(reset_timeout=60, listeners=[Opener()])
    breaker.open()
    clock.advance(60)
    ran = []
    with pytest.raises(CircuitBreakerError) as caught:
        guard(breaker, ran.append)(1)
    assert not ran
    assert caught.value.retry_after == 60
    assert breaker.current_state == "open"


# Time.


@pytest.mark.parametrize("days", [-400, 400])
def test_setting_the_machines_clock_changes_nothing(clock, in_flight, days):
    """An open circuit and a trial both measure by a monotonic clock."""
    breaker = CircuitBreaker(reset_timeout=60)
    with freezegun.freeze_time("2020-02-02") as wall:
        breaker.open()
        wall.tick(datetime.timedelta(days=days))
        assert breaker.retry_after == 60
        clock.advance(59)
        assert rejects(breaker)
        clock.advance(1)
        trial = in_flight(breaker)
        wall.tick(datetime.timedelta(days=days))
        assert breaker.retry_after == 60
        clock.advance(59)
        assert rejects(breaker)
        clock.advance(1)
        assert not rejects(breaker)
        trial.succeed()


def test_freezegun_moves_the_circuits_time():
    """freezegun moves time.monotonic together with the wall clock."""
    breaker = CircuitBreaker(reset_timeout=60)
    with freezegun.freeze_time("2020-02-02") as wall:
        breaker.open()
        wall.tick(59)
        assert rejects(breaker)
        wall.tick(1)
        assert breaker.call(abs, -1) == 1
    assert breaker.current_state == "closed"


def test_a_replaced_time_monotonic_is_used(monkeypatch):
    """The library looks `monotonic` up in the module `time` for every reading."""
    breaker = CircuitBreaker(reset_timeout=60)
    breaker.open()
    later = time.monotonic() + 60
    monkeypatch.setattr(time, "monotonic", lambda: later)
    assert breaker.call(abs, -1) == 1


class DictStorage(pybreaker.CircuitBreakerStorage):
    """A storage of the user's own: a row of a table, say."""

    def __init__(self):
        super().__init__("dict")
        self.row = {"state": "closed", "counter": 0, "opened_at": None}

    state = property(
        lambda self: self.row["state"],
        lambda self, state: self.row.update(state=state),
    )
    counter = property(lambda self: self.row["counter"])
    opened_at = property(
        lambda self: self.row["opened_at"],
        lambda self, moment: self.row.update(opened_at=moment),
    )

    def increment_counter(self):
        self.row["counter"] += 1

    def reset_counter(self):
        self.row["counter"] = 0


def test_a_storage_of_the_users_own_measures_by_the_wall_clock(clock):
    """Another machine may have written the storage's opened_at."""
    breaker = CircuitBreaker(reset_timeout=60, state_storage=DictStorage())
    with freezegun.freeze_time("2020-02-02") as wall:
        breaker.open()
        clock.advance(1000)
        assert rejects(breaker)
        wall.tick(59)
        assert breaker.retry_after == 1
        assert rejects(breaker)
        wall.tick(1)
        assert breaker.call(abs, -1) == 1
    assert breaker.current_state == "closed"


@pytest.mark.parametrize(("seconds", "state"), [(30, "open"), (61, "closed")])
def test_a_circuit_may_open_before_the_time_is_frozen(seconds, state, fail):
    """A frozen clock counts from another year, so the moment of the opening tells how
    much time has passed."""
    breaker = CircuitBreaker(fail_max=1, reset_timeout=60)
    breaker.open()
    later = datetime.datetime.now(datetime.timezone.utc)
    later += datetime.timedelta(seconds=seconds)
    with freezegun.freeze_time(later.replace(tzinfo=None)):
        with contextlib.suppress(CircuitBreakerError):
            breaker.call(str)
        assert breaker.current_state == state


def test_a_circuit_that_opened_while_time_was_frozen_goes_on_when_it_is_not():
    """The circuit has been open for as long as the calendar says."""
    breaker = CircuitBreaker(reset_timeout=60)
    with freezegun.freeze_time("2020-02-02"):
        breaker.open()
        assert breaker.retry_after == 60.0
    assert breaker.retry_after == 0.0


def test_a_moment_in_the_future_is_waited_for_by_the_monotonic_clock(clock):
    """Setting the machine's clock does not change the time that is left."""
    with freezegun.freeze_time("2020-02-02") as wall:
        breaker = CircuitBreaker(reset_timeout=10)
        breaker.open()
        now = datetime.datetime.now(datetime.timezone.utc)
        storage_of(breaker).opened_at = now + datetime.timedelta(seconds=5)
        wall.move_to("2020-02-01")
        assert breaker.retry_after == 15.0
        clock.advance(15)
        assert breaker.retry_after == 0.0
