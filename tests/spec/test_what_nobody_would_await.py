"""Predicates and listeners that would have to be awaited, and classes for listeners."""

from __future__ import annotations

import functools
from unittest import mock

import pytest
from support import EVENTS, Boom, boom, every, fail

from pybreaker import CircuitBreaker, CircuitBreakerListener


async def a_coroutine_function(exc):
    return False


def a_generator_function(exc):
    yield False


async def an_async_generator_function(exc):
    yield False


class Judge:
    """Has methods of all these kinds."""

    async def a_coroutine_method(self, exc):
        return False

    def a_generator_method(self, exc):
        yield False

    async def an_async_generator_method(self, exc):
        yield False


class AwaitableJudge:
    """Is called like a function, and answers with a coroutine."""

    async def __call__(self, exc):
        return False


LAZY = {
    "coroutine function": a_coroutine_function,
    "generator function": a_generator_function,
    "async generator function": an_async_generator_function,
    "coroutine method": Judge().a_coroutine_method,
    "generator method": Judge().a_generator_method,
    "async generator method": Judge().an_async_generator_method,
    "partial": functools.partial(a_coroutine_function),
    "object": AwaitableJudge(),
    "mock": mock.AsyncMock(),
}


@every(predicate=LAZY)
def test_a_predicate_whose_answer_is_always_true_is_refused(predicate):
    """The predicate would return a coroutine or a generator, which is always true."""
    with pytest.raises(TypeError) as refused:
        CircuitBreaker(exclude=[KeyError, predicate])
    assert "exclude" in str(refused.value)
    assert repr(predicate) in str(refused.value)


@every(predicate=LAZY)
def test_a_predicate_that_is_added_or_set_is_checked_like_the_argument(predicate):
    """A refusal changes nothing."""
    breaker = CircuitBreaker(exclude=[KeyError])
    with pytest.raises(TypeError):
        breaker.add_excluded_exception(predicate)
    with pytest.raises(TypeError):
        breaker.add_excluded_exceptions(OSError, predicate)
    with pytest.raises(TypeError):
        breaker.exclude = [OSError, predicate]
    assert breaker.excluded_exceptions == (KeyError,)


@pytest.mark.parametrize(
    "predicate", [lambda exc: False, functools.partial(isinstance, 1), mock.Mock()]
)
def test_a_predicate_that_answers_at_once_is_taken(predicate):
    """Only what is lazy is refused."""
    assert CircuitBreaker(exclude=[predicate]).exclude == (predicate,)


async def hears(self, cb, *args, **kwargs):
    """Would have to be awaited."""


@pytest.mark.parametrize("event", EVENTS)
def test_a_listener_with_a_method_that_must_be_awaited_is_refused(event):
    """The breaker would call the method, and what the method does would never
    happen."""
    listener = type("Listener", (CircuitBreakerListener,), {event: hears})()
    with pytest.raises(TypeError) as refused:
        CircuitBreaker(listeners=[listener])
    assert "listeners" in str(refused.value)
    assert event in str(refused.value)


@pytest.mark.parametrize("event", EVENTS)
def test_a_listener_that_is_added_is_checked_like_the_argument(event):
    """A refusal adds none of the listeners that were given."""
    listener = type("Listener", (), {event: hears})()
    breaker, other = CircuitBreaker(), CircuitBreakerListener()
    with pytest.raises(TypeError, match=event):
        breaker.add_listener(listener)
    with pytest.raises(TypeError, match=event):
        breaker.add_listeners(other, listener)
    assert breaker.listeners == ()


def test_an_asynchronous_method_beside_a_good_one_is_refused_as_well():
    """With one asynchronous method of five the listener would miss something."""

    class Reporter(CircuitBreakerListener):
        def state_change(self, cb, old_state, new_state):
            raise AssertionError("the breaker was never made")

        async def failure(self, cb, exc):
            raise AssertionError("nobody awaits this")

    with pytest.raises(TypeError, match="failure"):
        CircuitBreaker(listeners=[Reporter()])


def test_a_mock_of_an_asynchronous_listener_is_refused_and_an_ordinary_one_taken():
    """Suites use mocks of both kinds."""
    with pytest.raises(TypeError, match="listeners"):
        CircuitBreaker(listeners=[mock.AsyncMock()])
    listener = mock.Mock()
    CircuitBreaker(listeners=[listener]).call(int)
    assert listener.success.call_count == 1


def test_other_methods_of_a_listener_may_be_coroutine_functions():
    """The breaker never calls such methods."""

    class Reporter(CircuitBreakerListener):
        heard = 0

        def failure(self, cb, exc):
            self.heard += 1

        async def flush(self):
            return self.heard

    reporter = Reporter()
    fail(CircuitBreaker(listeners=[reporter]))
    assert reporter.heard == 1


class Statistics:
    """Has a method that could be called on the class."""

    @classmethod
    def success(cls, cb):
        raise AssertionError("the class is no listener")


class Told(CircuitBreakerListener):
    """Was meant to be given as an object."""

    def failure(self, cb, exc):
        raise AssertionError("the class is no listener")


@pytest.mark.parametrize("cls", [CircuitBreakerListener, Told, Statistics])
def test_a_class_in_place_of_a_listener_is_refused(cls):
    """The parentheses were forgotten; the class would be told without an object."""
    with pytest.raises(TypeError) as refused:
        CircuitBreaker(listeners=[cls])
    assert "listeners" in str(refused.value)
    assert cls.__name__ in str(refused.value)
    breaker = CircuitBreaker()
    with pytest.raises(TypeError, match=cls.__name__):
        breaker.add_listener(cls)
    assert breaker.listeners == ()


@pytest.mark.parametrize("event", EVENTS)
def test_what_only_has_the_name_of_a_listeners_method_is_not_told(event, caplog):
    """A count or a flag of that name is nothing to call, and nothing to complain of."""

    class Counts(CircuitBreakerListener):
        """Hears of all events but one, whose name it has for a number."""

        heard = 0

        def hear(self, *args):
            type(self).heard += 1

    for each in EVENTS:
        setattr(Counts, each, 0 if each == event else Counts.hear)
    breaker = CircuitBreaker(fail_max=1, ignore=[LookupError], listeners=[Counts()])
    breaker.call(int)  # before_call, success
    with pytest.raises(LookupError):
        breaker.call({}.__getitem__, "key")  # before_call, abandoned
    fail(breaker, 2)  # before_call, failure, state_change; rejected
    times = {"before_call": 3}.get(event, 1)
    assert Counts.heard == 8 - times
    assert getattr(Counts, event) == 0
    assert not any(record.exc_info for record in caplog.records)


# Settings that are lists, and the one that is a flag.


def test_exclude_can_be_read_as_a_tuple_and_replaced():
    """Any iterable replaces the setting, is read once, and holds at once."""
    breaker = CircuitBreaker(exclude=[KeyError])
    assert breaker.exclude == breaker.excluded_exceptions == (KeyError,)
    breaker.exclude = (cls for cls in (OSError, Boom))
    assert breaker.exclude == breaker.excluded_exceptions == (OSError, Boom)
    with pytest.raises(Boom):
        breaker.call(boom)
    assert breaker.fail_counter == 0
    breaker.exclude = None
    assert breaker.exclude == ()
    fail(breaker)
    assert breaker.fail_counter == 1


@pytest.mark.parametrize("value", [KeyError, 5, [object()], "KeyError", [None]])
def test_exclude_refuses_what_the_argument_refuses(value):
    """The setting stays as it was."""
    breaker = CircuitBreaker(exclude=[KeyError])
    with pytest.raises(TypeError, match="exclude"):
        breaker.exclude = value
    assert breaker.exclude == (KeyError,)


def test_an_exclusion_that_is_added_is_in_exclude():
    """Both names show the same tuple."""
    breaker = CircuitBreaker()
    breaker.add_excluded_exception(KeyError)
    assert breaker.exclude == (KeyError,)
    breaker.remove_excluded_exception(KeyError)
    assert breaker.exclude == ()


def test_throw_new_error_on_trip_can_be_read_and_set():
    """The setting that holds when the failure opens the circuit decides."""
    breaker = CircuitBreaker(fail_max=1)
    assert breaker.throw_new_error_on_trip is True
    breaker.throw_new_error_on_trip = False
    assert breaker.throw_new_error_on_trip is False
    assert isinstance(fail(breaker), Boom)
    assert breaker.current_state == "open"
    assert breaker.open() is False
    assert (
        CircuitBreaker(throw_new_error_on_trip=False).throw_new_error_on_trip is False
    )


@pytest.mark.parametrize("value", ["no", None, 1, 0, []])
def test_throw_new_error_on_trip_refuses_what_the_argument_refuses(value):
    """The setting stays as it was."""
    breaker = CircuitBreaker()
    with pytest.raises(TypeError, match="throw_new_error_on_trip"):
        breaker.throw_new_error_on_trip = value
    assert breaker.throw_new_error_on_trip is True
