"""`failure_result`: a call that returned, and failed by what it returned."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import logging
import threading
import types
import weakref

import guards
import pytest
from support import PATIENCE, drive, fail, let_go, name_of, while_locked

from pybreaker import (
    CircuitBreaker,
    CircuitBreakerError,
    CircuitClosedState,
    CircuitHalfOpenState,
    FailedResult,
)


def decorated_function_that_makes_a_coroutine(breaker, work):
    async def coroutine():
        return work()

    return drive(breaker(lambda: coroutine())())


def call_of_a_coroutine_function(breaker, work):
    async def coroutine():
        return work()

    return drive(breaker.call(coroutine))


def call_async_of_an_iterable_coroutine(breaker, work):
    @types.coroutine
    def coroutine():
        return work()
        yield  # never reached, but makes this a generator function

    return drive(breaker.call_async(coroutine))


def call_async_of_a_plain_function(breaker, work):
    return drive(breaker.call_async(work))


def call_async_of_a_future(breaker, work):
    async def main():
        def later():
            future = asyncio.get_running_loop().create_future()
            try:
                future.set_result(work())
            except Exception as exc:
                future.set_exception(exc)
            return future

        return await breaker.call_async(later)

    return asyncio.run(main())


def call_of_a_subclass(breaker, work):
    """A decorated call in a subclass that overrides `call`."""

    class Watches(type(breaker)):
        def call(self, func, *args, **kwargs):
            return super().call(func, *args, **kwargs)

    breaker.__class__ = Watches
    return breaker(lambda: work())()


WITH_RESULT = [
    guards.by_call,
    guards.by_decorator,
    guards.by_coroutine,
    guards.by_call_async,
    guards.by_iterable_coroutine,
    decorated_function_that_makes_a_coroutine,
    call_of_a_coroutine_function,
    call_async_of_an_iterable_coroutine,
    call_async_of_a_plain_function,
    call_async_of_a_future,
    call_of_a_subclass,
]
WITHOUT_RESULT = [
    guards.by_block,
    guards.by_generator,
    guards.by_async_generator,
    guards.by_async_block,
]
every_way = pytest.mark.parametrize("way", WITH_RESULT, ids=lambda way: way.__name__)


class Response:
    def __init__(self, status):
        self.status = status

    def __repr__(self):
        return f"<Response {self.status}>"


def is_bad(response):
    return response.status >= 500


class Hears:
    """Remembers what failed, weakly where it is a result, and what succeeded."""

    def __init__(self):
        self.heard = []

    def failure(self, cb, exc):
        assert isinstance(exc, FailedResult)
        assert isinstance(exc, Exception)
        self.heard.append(("failure", exc.result.status))

    def success(self, cb):
        self.heard.append("success")


def get(status):
    """A function that returns a response."""
    return lambda: Response(status)


# The outcome.


@every_way
def test_a_call_whose_result_matches_is_a_failure_and_returns_it(way):
    """This holds where the failure opens the circuit, too."""
    hears = Hears()
    breaker = CircuitBreaker(fail_max=2, failure_result=is_bad, listeners=[hears])
    response = Response(500)
    for count in (1, 2):
        assert way(breaker, lambda: response) is response
        assert breaker.fail_counter == count
    assert breaker.current_state == "open"
    assert hears.heard == 2 * [("failure", 500)]
    with pytest.raises(CircuitBreakerError):
        way(breaker, get(200))


@every_way
def test_a_call_whose_result_does_not_match_is_a_success(way):
    """The success forgets failures, as any success does."""
    hears = Hears()
    breaker = CircuitBreaker(failure_result=is_bad, listeners=[hears])
    breaker.fail_counter = 3
    assert way(breaker, get(200)).status == 200
    assert breaker.fail_counter == 0
    assert hears.heard == ["success"]


@every_way
def test_the_predicate_is_asked_once_about_what_was_returned(way):
    """The predicate is asked about the awaited result of a coroutine."""
    asked = []
    breaker = CircuitBreaker(fail_max=3, failure_result=asked.append)
    response = Response(200)
    assert way(breaker, lambda: response) is response
    assert asked == [response]


@pytest.mark.parametrize("way", WITHOUT_RESULT, ids=lambda way: way.__name__)
def test_generators_and_blocks_have_no_result(way):
    """The predicate is not asked."""
    asked = []
    breaker = CircuitBreaker(failure_result=asked.append)
    way(breaker, get(500))
    assert asked == []


def test_what_a_generator_returns_is_no_result():
    """The predicate is asked neither about that nor about the generator itself."""
    asked = []
    breaker = CircuitBreaker(failure_result=asked.append)

    @breaker
    def numbers():
        yield 1
        return Response(500)

    assert list(numbers()) == [1]
    assert list(breaker.call(lambda: (number for number in [1]))) == [1]
    assert asked == []


@every_way
def test_a_call_that_raises_has_no_result(way):
    """The predicate is not asked about exceptions."""
    asked = []
    breaker = CircuitBreaker(failure_result=asked.append)
    with pytest.raises(KeyError):
        way(breaker, {}.popitem)
    assert (asked, breaker.fail_counter) == ([], 1)


def test_none_is_a_result():
    """The predicate is asked about None where a function returns nothing."""
    breaker = CircuitBreaker(failure_result=lambda result: result is None)
    assert breaker.call(lambda: None) is None
    assert breaker.fail_counter == 1


def test_a_class_matches_by_isinstance():
    """The class is not called."""

    class Failed(Response):
        def __new__(cls, *args):
            return super().__new__(cls)

    class Worse(Failed):
        pass

    breaker = CircuitBreaker(failure_result=Failed)
    breaker.call(lambda: Response(500))
    assert breaker.fail_counter == 0
    worse = Worse(500)
    assert breaker.call(lambda: worse) is worse
    assert breaker.fail_counter == 1


# Trials and late calls.


@every_way
def test_a_trial_whose_result_matches_fails(way):
    """The circuit opens, and the caller gets the result."""
    breaker = CircuitBreaker(failure_result=is_bad)
    breaker.half_open()
    assert way(breaker, get(503)).status == 503
    assert breaker.current_state == "open"
    assert breaker.state.reason == "the trial failed: FailedResult(<Response 503>)"


@every_way
def test_a_trial_whose_result_does_not_match_succeeds(way):
    """The circuit closes."""
    breaker = CircuitBreaker(failure_result=is_bad)
    breaker.half_open()
    assert way(breaker, get(200)).status == 200
    assert breaker.current_state == "closed"


@pytest.mark.parametrize("throw", [True, False])
def test_what_opens_the_circuit_by_its_result_raises_nothing(throw):
    """The caller gets the result, whatever `throw_new_error_on_trip` is."""
    breaker = CircuitBreaker(
        fail_max=1, failure_result=is_bad, throw_new_error_on_trip=throw
    )
    assert breaker.call(get(500)).status == 500
    assert breaker.current_state == "open"


def test_the_predicate_is_asked_in_calls_that_decide_nothing():
    """Late calls and calls within a trial decide nothing; listeners hear of them."""
    hears, asked = Hears(), []

    def predicate(response):
        asked.append(response.status)
        return is_bad(response)

    breaker = CircuitBreaker(failure_result=predicate, listeners=[hears])

    def late():
        breaker.half_open()
        return Response(501)

    assert breaker.call(late).status == 501
    assert (breaker.current_state, breaker.fail_counter) == ("half-open", 0)

    def trial():
        assert breaker.call(get(502)).status == 502
        assert (breaker.current_state, breaker.fail_counter) == ("half-open", 0)
        return Response(200)

    assert breaker.call(trial).status == 200
    assert breaker.current_state == "closed"
    assert asked == [501, 502, 200]
    assert hears.heard == [("failure", 501), ("failure", 502), "success"]


# What the settings for exceptions have to say: nothing.


def test_a_failed_result_is_put_before_no_other_predicate():
    """Neither `ignore`, `exclude`, `include` nor `is_system_error` is asked."""
    asked = []

    class Judges(CircuitBreaker):
        def is_system_error(self, exception):
            asked.append(exception)
            return False

    for kind in (CircuitBreaker, Judges):
        breaker = kind(
            ignore=[asked.append, FailedResult],
            exclude=[asked.append, Exception],
            include=[asked.append],
            failure_result=is_bad,
        )
        breaker.call(get(500))
        assert (breaker.fail_counter, asked) == (1, [])
        # A state of the user's own that calls the library's method changes nothing.
        breaker.fail_counter = 0
        closed, _ = asking("_handle_error")
        breaker._state = closed(breaker)
        breaker.call(get(500))
        assert (breaker.fail_counter, asked) == (1, [])


# Without the lock.


@every_way
def test_the_predicate_is_asked_without_the_lock(way):
    """A good result is returned while another thread holds the lock."""
    breaker = CircuitBreaker(failure_result=is_bad)
    assert while_locked(breaker, way, breaker, get(200)).status == 200


def test_a_predicate_that_blocks_holds_up_no_other_call():
    """Other calls fail and succeed meanwhile, and the circuit can be moved."""
    asked, told = threading.Event(), threading.Event()

    def predicate(response):
        if response.status == 500:
            asked.set()
            assert told.wait(PATIENCE)
        return is_bad(response)

    breaker = CircuitBreaker(fail_max=5, failure_result=predicate)
    thread = threading.Thread(target=breaker.call, args=(get(500),))
    thread.start()
    assert asked.wait(PATIENCE)
    assert breaker.call(get(503)).status == 503
    assert breaker.call(get(200)).status == 200
    fail(breaker, 2)
    assert breaker.fail_counter == 2
    told.set()
    thread.join(PATIENCE)
    assert breaker.fail_counter == 3


def test_a_call_whose_predicate_takes_long_is_late_when_the_circuit_moves():
    """The call ends after its predicate, and what holds then decides."""

    def predicate(response):
        breaker.close()
        return True

    breaker = CircuitBreaker(fail_max=1, failure_result=predicate)
    assert breaker.call(get(500)).status == 500
    assert (breaker.current_state, breaker.fail_counter) == ("closed", 0)


def test_a_predicate_may_use_the_breaker():
    """A call by the predicate of a trial belongs to the trial."""
    breaker = CircuitBreaker()

    def predicate(response):
        if response.status == 200:
            return False
        assert breaker.call(get(200)).status == 200
        assert breaker.current_state == "half-open"
        with pytest.raises(CircuitBreakerError):
            contextvars.Context().run(breaker.call, get(200))
        return True

    breaker.failure_result = predicate
    breaker.half_open()
    breaker.call(get(500))
    assert breaker.current_state == "open"


# A predicate that raises.


class Broken(Exception):
    pass


def broken(response):
    raise Broken


class Undecided:
    def __bool__(self):
        raise Broken


@every_way
@pytest.mark.parametrize("predicate", [broken, lambda response: Undecided()])
def test_a_predicate_that_raises_is_logged_and_did_not_match(way, predicate, caplog):
    """The caller gets the result, and the call is a success."""
    breaker = CircuitBreaker(failure_result=predicate)
    breaker.fail_counter = 2
    with caplog.at_level(logging.ERROR, "pybreaker"):
        assert way(breaker, get(500)).status == 500
    assert breaker.fail_counter == 0
    (record,) = caplog.records
    assert record.exc_info[0] is Broken
    assert repr(predicate) in record.getMessage()


def test_an_interrupt_in_the_predicate_reaches_the_caller():
    """The trial gives its place back, and nothing is counted."""

    def interrupted(response):
        raise KeyboardInterrupt

    breaker = CircuitBreaker(failure_result=interrupted)
    breaker.half_open()
    with pytest.raises(KeyboardInterrupt):
        breaker.call(get(500))
    assert (breaker.current_state, breaker.fail_counter) == ("half-open", 0)
    assert breaker.retry_after == 0


# Nothing keeps a result alive.


@pytest.fixture
def without_collector():
    """Without the collector only what nothing refers to is freed."""
    gc.disable()
    yield
    gc.enable()


def asking(*hooks):
    """State classes of a user's own that override some methods."""

    def passing(name):
        def hook(self, *args, **kwargs):
            return getattr(super(type(self), self), name)(*args, **kwargs)

        return hook

    namespace = {name: passing(name) for name in hooks}
    return (
        type("Closed", (CircuitClosedState,), dict(namespace)),
        type("HalfOpen", (CircuitHalfOpenState,), dict(namespace)),
    )


@pytest.mark.parametrize(
    "hooks", [(), ("on_failure",), ("_handle_error",)], ids=lambda hooks: str(hooks)
)
@pytest.mark.parametrize("throw", [True, False])
@pytest.mark.parametrize("state", ["closed", "half-open"])
@pytest.mark.parametrize("fail_max", [1, 5])
@pytest.mark.parametrize("way", [guards.by_call, guards.by_coroutine])
def test_nothing_keeps_a_failed_result_alive(
    without_collector, way, fail_max, state, throw, hooks
):
    """The result may count or open the circuit, may be judged by the library or by a
    state of the user's own, and may be that of a trial."""
    breaker = CircuitBreaker(
        fail_max=fail_max,
        failure_result=is_bad,
        throw_new_error_on_trip=throw,
        listeners=[Hears()],
    )
    breaker.state = state
    if hooks:
        closed, half_open = asking(*hooks)
        breaker._state = (closed if state == "closed" else half_open)(breaker)
    response = way(breaker, get(500))
    ref = weakref.ref(response)
    del response
    let_go()
    assert ref() is None
    assert breaker.fail_counter == 1


def test_a_predicate_that_raises_keeps_no_result_alive(without_collector):
    """The record goes to a handler that drops it."""
    breaker = CircuitBreaker(failure_result=broken)
    logger, disabled = logging.getLogger("pybreaker"), logging.NullHandler()
    logger.addHandler(disabled)
    logger.propagate, propagates = False, logger.propagate
    try:
        response = breaker.call(get(500))
    finally:
        logger.propagate = propagates
        logger.removeHandler(disabled)
    ref = weakref.ref(response)
    del response
    let_go()
    assert ref() is None


# The setting.


def test_the_setting_holds_for_calls_that_are_under_way():
    """What holds when a call ends decides on its result."""
    breaker = CircuitBreaker()

    def work(predicate):
        breaker.failure_result = predicate
        return Response(500)

    breaker.call(work, is_bad)
    assert breaker.fail_counter == 1
    breaker.call(work, None)
    assert breaker.fail_counter == 0
    breaker.failure_result = Response
    assert breaker.failure_result is Response


@pytest.mark.parametrize(
    "value",
    [5, "is_bad", [is_bad], True, asyncio.sleep],
    ids=name_of,
)
def test_what_is_no_predicate_is_refused(value):
    """The error names the parameter and the value; a setter changes nothing."""
    with pytest.raises(TypeError, match="failure_result") as caught:
        CircuitBreaker(failure_result=value)
    assert repr(value) in str(caught.value)
    breaker = CircuitBreaker(failure_result=is_bad)
    with pytest.raises(TypeError, match="failure_result"):
        breaker.failure_result = value
    assert breaker.failure_result is is_bad


def test_a_failed_result_has_the_result():
    """FailedResult is an exception, and can be told apart by its class."""
    failed = FailedResult([1, 2])
    assert failed.result == [1, 2]
    assert isinstance(failed, Exception)
    assert repr(failed) == "FailedResult([1, 2])"


def test_the_reason_is_the_failed_result():
    """The result has opened the circuit."""
    breaker = CircuitBreaker(fail_max=2, failure_result=is_bad)
    for _ in range(2):
        breaker.call(get(500))
    last = "FailedResult(<Response 500>)"
    assert breaker.state.reason == f"2 failures in a row; the last: {last}"


def test_a_failed_result_counts_in_a_window():
    """A failed result counts like an exception."""
    breaker = CircuitBreaker(fail_max=2, window_size=3, failure_result=is_bad)
    breaker.call(get(500))
    breaker.call(get(200))
    breaker.call(get(500))
    assert breaker.current_state == "open"
