"""A successful trial sets fail_counter to 0, even if it does not close the circuit."""

from __future__ import annotations

import contextvars

import guards
import pytest
from support import Boom, boom, fail

from pybreaker import CircuitBreaker, CircuitBreakerError, CircuitMemoryStorage


def due(**settings):
    """A breaker that needs two successful trials, of which the next call is the
    first."""
    breaker = CircuitBreaker(3, 0, success_threshold=2, **settings)
    fail(breaker, 3)
    assert (breaker.current_state, breaker.fail_counter) == ("open", 3)
    return breaker


def counts(breaker):
    return breaker.current_state, breaker.fail_counter, breaker.success_counter


@pytest.mark.parametrize("guard", guards.WAYS)
def test_the_first_of_two_successful_trials_forgets_the_failures(guard):
    """The second trial closes the circuit."""
    breaker = due()
    guard(breaker, int)
    assert counts(breaker) == ("half-open", 0, 1)
    guard(breaker, int)
    assert breaker.current_state == "closed"


@pytest.mark.parametrize("guard", guards.WAYS)
def test_a_trial_that_fails_after_one_that_succeeded_is_the_only_failure(guard):
    """The failed trial adds one to a count of 0."""
    breaker = due()
    guard(breaker, int)
    with pytest.raises(CircuitBreakerError, match="Trial call failed"):
        guard(breaker, boom)
    assert counts(breaker) == ("open", 1, 0)


def test_a_trial_that_fails_first_is_one_failure_more():
    """No trial has succeeded, so the failures from before the opening stand."""
    breaker = due()
    fail(breaker)
    assert counts(breaker) == ("open", 4, 0)


def test_a_trial_with_an_excluded_exception_is_a_success_that_forgets():
    """The exception reaches the caller all the same."""
    breaker = due()
    breaker.add_excluded_exception(Boom)
    with pytest.raises(Boom):
        breaker.call(boom)
    assert counts(breaker) == ("half-open", 0, 1)


def test_an_abandoned_trial_forgets_nothing():
    """An abandoned trial tells nothing about the service."""
    breaker = due()

    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        breaker.call(interrupted)
    assert counts(breaker) == ("half-open", 3, 0)


def test_calls_within_a_trial_forget_nothing():
    """Calls within a trial decide nothing; the trial decides."""
    breaker, seen = due(), []

    def work():
        breaker.call(int)
        seen.append(counts(breaker))

    breaker.call(work)
    assert seen == [("half-open", 3, 0)]
    assert counts(breaker) == ("half-open", 0, 1)


def test_a_trial_that_has_lost_its_place_still_forgets(clock):
    """The trial ends in the era that admitted it, so its outcome counts."""
    breaker = due()
    breaker.reset_timeout = 60
    clock.advance(60)
    block, trial = breaker.calling(), contextvars.copy_context()
    trial.run(block.__enter__)
    clock.advance(60)
    other, second = breaker.calling(), contextvars.copy_context()
    second.run(other.__enter__)
    trial.run(block.__exit__, None, None, None)
    assert counts(breaker) == ("half-open", 0, 1)
    second.run(other.__exit__, None, None, None)
    assert breaker.current_state == "closed"


def test_a_late_success_forgets_nothing():
    """A call that was admitted before the circuit opened ends during the recovery."""
    breaker = CircuitBreaker(3, 0, success_threshold=2)
    block = breaker.calling()
    block.__enter__()
    fail(breaker, 3)
    breaker.half_open()
    block.__exit__(None, None, None)
    assert counts(breaker) == ("half-open", 3, 0)


def test_a_success_handed_to_a_half_open_state_forgets_as_well():
    """Services for asyncio hand successes over by state._handle_success()."""
    breaker = due()
    breaker.half_open()
    breaker.state._handle_success()
    assert counts(breaker) == ("half-open", 0, 1)


def test_listeners_hear_of_the_success_when_the_failures_are_forgotten(recorder):
    """When the success is told, the counters are the new ones."""
    breaker, seen = due(), []
    recorder.success = lambda cb: seen.append(counts(cb))
    breaker.add_listener(recorder)
    breaker.call(int)
    assert seen == [("half-open", 0, 1)]


def test_a_health_page_shows_no_errors_while_the_service_recovers():
    """The page reports fail_counter as the present errors."""
    breaker = due(name="search")

    def health():
        return {"state": breaker.current_state, "errors": breaker.fail_counter}

    assert health() == {"state": "open", "errors": 3}
    breaker.call(int)
    assert health() == {"state": "half-open", "errors": 0}
    assert breaker.snapshot()["fail_counter"] == 0


def test_a_trip_forgets_the_successes_that_a_circuit_found_closed_had():
    """Another program closed the circuit between its trials and left their number. The
    circuit then needs as many trials as any."""
    storage = CircuitMemoryStorage("closed")
    breaker = due(state_storage=storage)
    breaker.call(int)
    storage.state = "closed"
    assert breaker.state.name == "closed"
    assert breaker.success_counter == 1
    fail(breaker, 3)
    assert counts(breaker) == ("open", 3, 0)
