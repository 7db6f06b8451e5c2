"""CircuitBreakerError: the phrase as its one argument, the rest in its text."""

from __future__ import annotations

import contextvars
import copy
import pickle

import guards
import pytest
from support import Boom, boom, every, fail

from pybreaker import CircuitBreaker, CircuitBreakerError, CircuitMemoryStorage

REJECTED = "Timeout not elapsed yet, circuit breaker still open"
TRIPPED = "Failures threshold reached, circuit breaker opened"
TRIAL_FAILED = "Trial call failed, circuit breaker opened"


def rejected(breaker, guard=guards.by_call):
    breaker.open()
    return error_of(lambda: guard(breaker, int))


def rejected_during_a_trial(breaker, guard=guards.by_call):
    breaker.half_open()
    block, trial = breaker.calling(), contextvars.copy_context()
    trial.run(block.__enter__)  # so that the call below does not belong to the trial
    try:
        return error_of(lambda: guard(breaker, int))
    finally:
        trial.run(block.__exit__, None, None, None)


def tripped(breaker, guard=guards.by_call):
    breaker.fail_max = 1
    return error_of(lambda: guard(breaker, boom))


def trial_failed(breaker, guard=guards.by_call):
    breaker.half_open()
    return error_of(lambda: guard(breaker, boom))


def error_of(call):
    with pytest.raises(CircuitBreakerError) as raised:
        call()
    return raised.value


PHRASES = {
    rejected: REJECTED,
    rejected_during_a_trial: REJECTED,
    tripped: TRIPPED,
    trial_failed: TRIAL_FAILED,
}
PROVOCATIONS = pytest.mark.parametrize("provoke", list(PHRASES))


@every(provoke=list(PHRASES), guard=guards.WAYS)
def test_the_one_argument_of_the_error_is_the_phrase(provoke, guard):
    """Code in the field compares args[0] with the phrase, and groups reports by
    args."""
    error = provoke(CircuitBreaker(name="db"), guard)
    assert error.args == (PHRASES[provoke],)
    assert error.args[0] == PHRASES[provoke]


@PROVOCATIONS
def test_the_arguments_are_the_same_whichever_breaker_raises_and_whenever(
    provoke, clock
):
    """A tracker of errors makes one group of errors with the same arguments."""
    one = provoke(CircuitBreaker(name="db", reset_timeout=60))
    other = provoke(CircuitBreaker(name="mail", reset_timeout=5))
    assert one.args == other.args
    assert str(one) != str(other)


@PROVOCATIONS
def test_the_text_has_the_phrase_unbroken_and_adds_name_reason_and_time(provoke, clock):
    """An operator reads the text in the log."""
    error = provoke(CircuitBreaker(name="db", reset_timeout=42))
    text = str(error)
    assert PHRASES[provoke] in text
    assert "db" in text
    assert "42.0 s" in text
    assert error.reason
    assert error.reason in text


def test_the_text_of_a_trip_names_what_made_the_circuit_open():
    """The reason in the text shows the exception."""
    error = tripped(CircuitBreaker(name="db"))
    assert "Boom" in error.reason
    assert "Boom" in str(error)


@PROVOCATIONS
def test_the_time_in_the_text_is_that_of_the_raising(provoke, clock):
    """The text stays the same, whenever it is read and whatever the settings are by
    then."""
    breaker = CircuitBreaker(name="db", reset_timeout=42)
    error = provoke(breaker)
    clock.advance(20)
    breaker.reset_timeout = 1000
    assert "42.0 s" in str(error)
    assert error.retry_after == 42


@PROVOCATIONS
def test_the_reason_in_the_text_is_that_of_the_raising(provoke, clock):
    """A circuit that moves afterwards does not change the text."""
    breaker = CircuitBreaker(name="db")
    error = provoke(breaker)
    reason, text = error.reason, str(error)
    breaker.close()
    breaker.fail_max = 1
    with pytest.raises(CircuitBreakerError):
        breaker.call(lambda: 1 / 0)
    assert (error.reason, str(error)) == (reason, text)
    assert "ZeroDivisionError" not in text


@PROVOCATIONS
def test_the_name_in_the_text_is_that_of_the_reading(provoke):
    """A breaker that is given its name late has that name in all its errors."""
    breaker = CircuitBreaker(name="before")
    error = provoke(breaker)
    assert "before" in str(error)
    breaker.name = "after"
    assert "after" in str(error)
    assert "before" not in str(error)
    breaker.name = None
    assert "after" not in str(error)
    assert "None" not in str(error)


@PROVOCATIONS
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickled_error_keeps_its_text_and_the_name_of_that_moment(
    provoke, protocol, clock
):
    """The breaker is left behind, so a later name cannot reach the copy."""
    breaker = CircuitBreaker(name="before", reset_timeout=42)
    error = provoke(breaker)
    breaker.name = "pickled"
    pickled, text = pickle.dumps(error, protocol), str(error)
    breaker.name = "after"
    arrived = pickle.loads(pickled)
    assert str(arrived) == text
    assert "pickled" in text
    assert arrived.args == (PHRASES[provoke],)
    assert (arrived.reason, arrived.retry_after) == (error.reason, 42)
    assert arrived.breaker is None


@PROVOCATIONS
def test_an_error_that_travels_on_from_process_to_process_keeps_its_text(provoke):
    """A task queue pickles the copy again."""
    error = provoke(CircuitBreaker(name="db"))
    first = pickle.loads(pickle.dumps(error))
    second = pickle.loads(pickle.dumps(first))
    assert str(second) == str(error)
    assert second.args == error.args
    assert (second.reason, second.retry_after) == (error.reason, error.retry_after)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copied_error_keeps_its_text(copied):
    """Frameworks copy what they raise in another thread."""
    error = tripped(CircuitBreaker(name="db"))
    assert str(copied(error)) == str(error)
    assert copied(error).args == error.args


def test_an_error_without_a_breaker_has_no_reason_and_no_more_text():
    """Programs raise such an error themselves, to refuse a call or in a mock."""
    error = CircuitBreakerError("switched off")
    assert error.reason == ""
    assert str(error) == "switched off"
    assert pickle.loads(pickle.dumps(error)).reason == ""


def test_the_gate_of_a_state_rejects_with_the_same_phrase():
    """Code that drives a circuit by hand compares the phrase as well."""
    breaker = CircuitBreaker(name="db")
    breaker.open()
    error = error_of(lambda: breaker.state.before_call(int))
    assert error.args == (REJECTED,)
    assert "db" in str(error)


@pytest.mark.parametrize(
    ("state", "phrase"), [("closed", TRIPPED), ("half-open", TRIAL_FAILED)]
)
def test_on_failure_by_hand_raises_with_the_same_phrase(state, phrase):
    """The error is raised from the exception that on_failure() was given."""
    breaker, exc = CircuitBreaker(fail_max=1, name="db"), Boom()
    breaker.state = state
    breaker._inc_counter()
    error = error_of(lambda: breaker.state.on_failure(exc))
    assert error.args == (phrase,)
    assert error.__cause__ is exc


def test_a_handler_tells_the_kinds_of_error_apart_by_the_phrase(clock):
    """Endpoints answer a trip and a rejection differently."""
    breaker = CircuitBreaker(fail_max=1, reset_timeout=30, name="search")

    def view(func):
        try:
            return breaker.call(func)
        except CircuitBreakerError as error:
            if error.args[0] == TRIPPED:
                return 502
            if error.args[0] == TRIAL_FAILED:
                return 504
            return 503 if error.args == (REJECTED,) else 500

    answers = [view(boom), view(boom)]
    clock.advance(30)
    answers.append(view(boom))
    assert answers == [502, 503, 504]


@pytest.mark.parametrize(
    ("wait", "words"),
    [
        (0.001, "less than 0.1 s"),
        (0.04, "less than 0.1 s"),
        (0.06, "0.1 s"),
        (0.1, "0.1 s"),
        (1, "1.0 s"),
    ],
)
def test_a_short_wait_does_not_read_as_none(wait, words, clock):
    """The text never tells the reader to come back in 0.0 s, when it is too early."""
    breaker = CircuitBreaker(reset_timeout=wait, name="db")
    text = str(rejected(breaker))
    assert words in text
    assert " 0.0 s" not in text
    assert ("less than" in text) == ("less than" in words)


def test_the_end_of_a_wait_does_not_read_as_none(clock):
    """The last moments of a long timeout are short as well."""
    breaker = CircuitBreaker(fail_max=1, reset_timeout=60, name="db")
    fail(breaker)
    clock.advance(59.97)
    text = str(error_of(lambda: breaker.call(int)))
    assert "less than 0.1 s" in text
    assert " 0.0 s" not in text


def test_repr_does_not_tell_a_short_wait_as_none(clock):
    """The operator's line has the same words."""
    breaker = CircuitBreaker(reset_timeout=60, name="db")
    breaker.open()
    clock.advance(59.97)
    assert "less than 0.1 s" in repr(breaker)
    assert " 0.0 s" not in repr(breaker)


def test_a_wait_that_is_over_is_not_told_as_a_short_one():
    """With reset_timeout=0 the next call may come at once."""
    error = error_of(lambda: CircuitBreaker(1, 0, name="db").call(boom))
    assert error.retry_after == 0
    assert "less than" not in str(error)


def test_an_error_that_nobody_reads_makes_no_text():
    """Most rejections are caught and forgotten."""

    class Name(str):
        read = 0

        def __str__(self):
            type(self).read += 1
            return str.__str__(self)

    breaker = CircuitBreaker(name=Name("db"))
    breaker.open()
    Name.read = 0
    error = error_of(lambda: breaker.call(int))
    assert Name.read == 0
    assert "db" in str(error)


def test_the_text_says_that_a_trial_is_running():
    """The caller sees why a circuit that is half-open rejects the call."""
    error = rejected_during_a_trial(CircuitBreaker(reset_timeout=60))
    assert "(a trial call is running; next trial in " in str(error)
    assert "running" in str(pickle.loads(pickle.dumps(error)))


def test_the_text_says_that_another_breaker_runs_the_trial():
    """The storage grants no trial, because another breaker has the claim."""

    class Claimed(CircuitMemoryStorage):
        def claim_trial(self, timeout):
            return False

    breaker = CircuitBreaker(state_storage=Claimed("half-open"))
    error = error_of(lambda: breaker.call(int))
    assert str(error).endswith(" (another breaker runs the trial)")
