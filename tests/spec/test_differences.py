"""Section 8: where the library differs from older releases on purpose.

One test for each entry of the list in docs/moving.rst, as a program that moves over
meets the difference. The sections that the differences belong to pin them in full.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from unittest import mock

import pytest
from internals import storage_of

from pybreaker import CircuitBreaker, CircuitBreakerError, CircuitBreakerListener


def elsewhere(func, *args):
    """Calls the function in another thread and returns what it returns."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(func, *args).result(10)


def test_guarded_calls_run_side_by_side():
    """Older releases held the lock during the call, so that calls queued."""
    breaker = CircuitBreaker()
    everybody_is_inside = threading.Barrier(4, timeout=10)
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(breaker.call, everybody_is_inside.wait) for _ in range(4)]
        assert sorted(call.result(20) for call in calls) == [0, 1, 2, 3]


def test_calls_that_arrive_during_a_trial_are_rejected_at_once():
    """Older releases let such calls wait for the trial, in a queue of threads."""
    breaker, work = CircuitBreaker(), mock.Mock()
    breaker.half_open()

    def trial():
        with pytest.raises(CircuitBreakerError):
            elsewhere(breaker.call, work)

    breaker.call(trial)
    work.assert_not_called()
    assert breaker.current_state == "closed"


def test_a_trial_that_hangs_loses_its_place(clock):
    """In older releases a trial that hung kept all other calls waiting for ever."""
    breaker = CircuitBreaker(reset_timeout=60)
    breaker.half_open()
    trial_runs, let_go = threading.Event(), threading.Event()

    def hang():
        trial_runs.set()
        assert let_go.wait(10)

    with ThreadPoolExecutor(1) as pool:
        trial = pool.submit(breaker.call, hang)
        assert trial_runs.wait(10)
        try:
            clock.advance(59)
            with pytest.raises(CircuitBreakerError):
                breaker.call(int)
            clock.advance(1)
            assert breaker.call(int) == 0
            assert breaker.current_state == "closed"
        finally:
            let_go.set()
        trial.result(10)


def test_calls_within_a_trial_decide_nothing(fail, boom):
    """In older releases the inner call closed the circuit, or opened it."""
    breaker = CircuitBreaker()
    breaker.half_open()

    def trial():
        assert breaker.call(int) == 0
        assert breaker.current_state == "half-open"
        with pytest.raises(boom):
            breaker.call(fail)
        assert (breaker.current_state, breaker.fail_counter) == ("half-open", 0)

    breaker.call(trial)
    assert breaker.current_state == "closed"


@pytest.mark.parametrize("error", [None, OSError()])
def test_late_outcomes_are_ignored(error):
    """A call from before a transition tells nothing about the time after it."""
    breaker = CircuitBreaker(fail_max=1)

    def slow(move):
        move()
        breaker.fail_counter = 1
        if error:
            raise error

    for move in (breaker.open, breaker.half_open, breaker.close):
        breaker.close()
        if error:
            with pytest.raises(OSError):
                breaker.call(slow, move)
        else:
            breaker.call(slow, move)
        assert breaker.fail_counter == 1
        assert (
            breaker.state.name
            == {
                "open": "open",
                "half_open": "half-open",
                "close": "closed",
            }[move.__name__]
        )


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt, SystemExit, GeneratorExit, asyncio.CancelledError]
)
def test_abandoned_calls_are_not_counted(error, recorder):
    """In older releases Ctrl-C and cancellation counted as failures."""
    breaker = CircuitBreaker(fail_max=1, listeners=[recorder])
    work = mock.Mock(side_effect=error)
    with pytest.raises(error):
        breaker.call(work)
    assert (breaker.current_state, breaker.fail_counter) == ("closed", 0)
    assert recorder.names == ["before_call"]


async def time_out():
    """What waiting with a timeout amounts to: a cancellation, made an error."""
    await asyncio.wait_for(asyncio.Event().wait(), 0)


def test_a_timeout_around_a_block_does_not_count():
    """The timeout cancels the block, and a cancellation tells nothing of the
    service."""
    breaker = CircuitBreaker()

    async def around():
        async def block():
            with breaker.calling():
                await asyncio.Event().wait()

        task = asyncio.ensure_future(block())
        await asyncio.sleep(0)
        await asyncio.wait_for(task, 0)

    with pytest.raises(asyncio.TimeoutError):
        asyncio.run(around())
    assert breaker.fail_counter == 0


def test_a_timeout_inside_the_guarded_code_counts():
    """The timeout raises an exception inside the guarded code, like any other."""
    breaker = CircuitBreaker()

    async def inside():
        with breaker.calling():
            await time_out()

    with pytest.raises(asyncio.TimeoutError):
        asyncio.run(inside())
    assert breaker.fail_counter == 1


def test_coroutine_functions_are_guarded_for_their_whole_run(boom):
    """In older releases making the coroutine was the success."""
    breaker = CircuitBreaker(fail_max=2)

    @breaker
    async def fetch():
        await asyncio.sleep(0)
        raise boom

    assert inspect.iscoroutinefunction(fetch)
    breaker.fail_counter = 1
    coroutine = fetch()
    assert breaker.fail_counter == 1
    with pytest.raises(CircuitBreakerError):
        asyncio.run(coroutine)
    assert breaker.current_state == "open"


def test_call_async_returns_a_coroutine():
    """In older releases call_async returned a Tornado future, which needed Tornado."""
    breaker = CircuitBreaker()

    async def answer():
        return 42

    coroutine = breaker.call_async(answer)
    assert inspect.iscoroutine(coroutine)
    assert asyncio.run(coroutine) == 42


@pytest.mark.parametrize("patched", ["breaker", "class"])
def test_a_call_that_is_patched_in_is_seen_by_what_is_decorated_afterwards(patched):
    """In older releases what had been decorated before saw the patched call() as
    well."""
    breaker = CircuitBreaker()
    before = breaker(lambda: "real")
    target = breaker if patched == "breaker" else CircuitBreaker
    with mock.patch.object(target, "call", return_value="patched"):
        after = breaker(lambda: "real")
        assert breaker.call(lambda: "real") == "patched"
        assert after() == "patched"
        assert before() == "real"


def test_the_rejection_of_a_generator_comes_from_its_first_next():
    """In older releases the rejection came from the call that made the generator."""
    breaker = CircuitBreaker()

    @breaker
    def numbers():
        yield 1

    breaker.open()
    generator = numbers()
    with pytest.raises(CircuitBreakerError):
        next(generator)


@pytest.mark.parametrize("event", ["before_call", "success", "failure", "state_change"])
def test_a_broken_listener_cannot_break_or_veto_a_call(event, fail, recorder, caplog):
    """In older releases the listener's exception reached the caller instead."""

    class Broken(CircuitBreakerListener):
        pass

    setattr(Broken, event, mock.Mock(side_effect=ZeroDivisionError("broken")))
    breaker = CircuitBreaker(fail_max=1, listeners=[Broken(), recorder])
    with caplog.at_level(logging.ERROR, "pybreaker"):
        assert breaker.call(str, "result") == "result"
        with pytest.raises(CircuitBreakerError):
            breaker.call(fail)
    assert breaker.current_state == "open"
    assert recorder.names == ["before_call", "success"] + [
        "before_call",
        "failure",
        "state_change",
    ]
    assert "ZeroDivisionError: broken" in caplog.text


def test_time_is_monotonic(clock):
    """In older releases a set clock kept the circuit open, or ended its timeout."""
    breaker = CircuitBreaker(reset_timeout=60)
    breaker.open()
    with mock.patch("pybreaker.datetime") as wall_clock:
        for days in (-1, 1):
            there = datetime.now(timezone.utc) + timedelta(days=days)
            wall_clock.now.return_value = there
            assert breaker.retry_after == 60
            with pytest.raises(CircuitBreakerError):
                breaker.call(int)
        clock.advance(60)
        assert breaker.call(int) == 0


def test_opened_at_is_aware():
    """In older releases opened_at was naive; a comparison has to say UTC now."""
    breaker = CircuitBreaker()
    before = datetime.now(timezone.utc)
    breaker.open()
    opened_at = storage_of(breaker).opened_at
    assert before <= opened_at <= datetime.now(timezone.utc)
    assert opened_at.utcoffset() == timedelta(0)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"fail_max": 0}, ValueError),
        ({"fail_max": "5"}, TypeError),
        ({"reset_timeout": -1}, ValueError),
        ({"reset_timeout": None}, TypeError),
        ({"exclude": ValueError}, TypeError),
        ({"listeners": [object()]}, TypeError),
        ({"success_threshold": 0}, ValueError),
        ({"name": 1}, TypeError),
        ({"state_storage": "memory"}, TypeError),
        ({"throw_new_error_on_trip": "no"}, TypeError),
    ],
)
def test_arguments_are_checked(arguments, error):
    """Older releases took any argument, and failed much later, if at all."""
    (parameter,) = arguments
    with pytest.raises(error, match=parameter):
        CircuitBreaker(**arguments)


def test_circuit_breaker_error_says_when_to_come_back(clock, fail):
    """Older releases left that to the caller's arithmetic."""
    breaker = CircuitBreaker(fail_max=1, reset_timeout=60)
    with pytest.raises(CircuitBreakerError) as tripped:
        breaker.call(fail)
    clock.advance(45)
    with pytest.raises(CircuitBreakerError) as rejected:
        breaker.call(fail)
    assert (tripped.value.retry_after, rejected.value.retry_after) == (60, 15)
    assert tripped.value.breaker is rejected.value.breaker is breaker


def test_the_third_positional_argument_is_exclude(fail, boom):
    """Release 1.4 had success_threshold there, and every release before had
    `exclude`."""
    breaker = CircuitBreaker(5, 60, [boom])
    with pytest.raises(boom):
        breaker.call(fail)
    assert breaker.fail_counter == 0
    with pytest.raises(TypeError, match="success_threshold"):
        CircuitBreaker(5, 60, 2)
