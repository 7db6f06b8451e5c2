"""Ways to guard, and what all of them have in common: the
specification's section of that name."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import gc
import inspect
import sys
import types
import weakref
from unittest import mock

import pytest
from support import drive

from pybreaker import CircuitBreaker, CircuitBreakerError


def exhaust(generator):
    """Runs a generator to its end and returns its return value."""
    while True:
        try:
            next(generator)
        except StopIteration as stop:
            return stop.value


async def collect(agen):
    """Runs an async generator to its end and returns the last thing it yielded."""
    async for item in agen:
        last = item
    return last


# Every way to guard, as a function that runs `work` once, guarded in that way,
# to the end, and returns what `work` returned.


def decorated_function(breaker, work):
    @breaker
    def guarded():
        return work()

    return guarded()


def decorated_method(breaker, work):
    class Service:
        @breaker
        def fetch(self):
            return work()

    return Service().fetch()


def decorated_with_parentheses(breaker, work):
    @breaker()
    def guarded():
        return work()

    return guarded()


def decorated_coroutine_function(breaker, work):
    @breaker
    async def guarded():
        return work()

    return drive(guarded())


def decorated_with_call_async(breaker, work):
    @breaker(__pybreaker_call_async=True)
    def guarded():
        return Awaitable(work)

    return drive(guarded())


def decorated_iterable_coroutine(breaker, work):
    @breaker
    @types.coroutine
    def guarded():
        return work()
        yield

    async def caller():
        return await guarded()

    return drive(caller())


def decorated_function_that_returns_a_coroutine(breaker, work):
    async def coroutine():
        return work()

    @breaker
    def guarded():
        return coroutine()

    return drive(guarded())


def decorated_generator_function(breaker, work):
    @breaker
    def guarded():
        result = work()
        yield
        return result

    return exhaust(guarded())


def decorated_async_generator_function(breaker, work):
    @breaker
    async def guarded():
        yield work()

    return drive(collect(guarded()))


def context_manager_over_it(breaker, work):
    @contextlib.contextmanager
    @breaker
    def guarded():
        yield

    with guarded():
        return work()


def async_context_manager_over_it(breaker, work):
    @contextlib.asynccontextmanager
    @breaker
    async def guarded():
        yield

    async def caller():
        async with guarded():
            return work()

    return drive(caller())


def call(breaker, work):
    return breaker.call(lambda: work())


def call_of_a_coroutine_function(breaker, work):
    async def guarded():
        return work()

    return drive(breaker.call(guarded))


def call_of_what_returns_a_coroutine(breaker, work):
    async def guarded():
        return work()

    return drive(breaker.call(lambda: guarded()))


def call_of_a_generator_function(breaker, work):
    def guarded():
        result = work()
        yield
        return result

    return exhaust(breaker.call(guarded))


def call_of_what_returns_a_generator(breaker, work):
    def guarded():
        result = work()
        yield
        return result

    return exhaust(breaker.call(lambda: guarded()))


def call_of_an_async_generator_function(breaker, work):
    async def guarded():
        yield work()

    return drive(collect(breaker.call(guarded)))


def call_of_what_returns_an_async_generator(breaker, work):
    async def guarded():
        yield work()

    return drive(collect(breaker.call(lambda: guarded())))


def call_async(breaker, work):
    async def guarded():
        return work()

    return drive(breaker.call_async(guarded))


def call_async_of_what_returns_an_awaitable(breaker, work):
    return drive(breaker.call_async(lambda: Awaitable(work)))


def call_async_of_a_plain_function(breaker, work):
    return drive(breaker.call_async(lambda: work()))


def block(breaker, work):
    with breaker.calling():
        return work()


def async_block(breaker, work):
    async def caller():
        async with breaker.calling():
            return work()

    return drive(caller())


class Awaitable:
    """An awaitable object of some other library."""

    def __init__(self, work):
        self.work = work

    def __await__(self):
        return self.work()
        yield


WAYS = [
    decorated_function,
    decorated_method,
    decorated_with_parentheses,
    decorated_coroutine_function,
    decorated_with_call_async,
    decorated_iterable_coroutine,
    decorated_function_that_returns_a_coroutine,
    decorated_generator_function,
    decorated_async_generator_function,
    context_manager_over_it,
    async_context_manager_over_it,
    call,
    call_of_a_coroutine_function,
    call_of_what_returns_a_coroutine,
    call_of_a_generator_function,
    call_of_what_returns_a_generator,
    call_of_an_async_generator_function,
    call_of_what_returns_an_async_generator,
    call_async,
    call_async_of_what_returns_an_awaitable,
    call_async_of_a_plain_function,
    block,
    async_block,
]

every_way = pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)


def raising(exc):
    """A function that raises this very exception."""

    def raise_it():
        raise exc

    return raise_it


def held(breaker):
    """Takes the trial's place and holds it, in a context of its own."""
    block = breaker.calling()
    contextvars.Context().run(block.__enter__)
    return block


# All ways to guard admit, run and settle alike.


@every_way
def test_what_the_function_returns_reaches_the_caller(way, recorder):
    """The result comes through, and the call is one admitted, successful call."""
    breaker = CircuitBreaker(listeners=[recorder])
    result = object()
    assert way(breaker, lambda: result) is result
    assert recorder.names == ["before_call", "success"]


@every_way
def test_a_success_sets_the_count_back(way):
    """A success forgets the failures before it, whichever way the call was guarded."""
    breaker = CircuitBreaker()
    breaker.fail_counter = 3
    way(breaker, int)
    assert breaker.fail_counter == 0


@every_way
def test_what_the_function_raises_is_counted_and_reaches_the_caller(
    way, recorder, boom
):
    """A failure below the limit is counted once and raised as it is."""
    breaker = CircuitBreaker(fail_max=2, listeners=[recorder])
    error = boom()
    with pytest.raises(boom) as caught:
        way(breaker, raising(error))
    assert caught.value is error
    assert breaker.fail_counter == 1
    assert recorder.names == ["before_call", "failure"]


@every_way
def test_the_failure_that_opens_the_circuit_says_so(way, boom):
    """The trip raises CircuitBreakerError from the original exception."""
    breaker = CircuitBreaker(fail_max=1)
    error = boom()
    with pytest.raises(CircuitBreakerError) as caught:
        way(breaker, raising(error))
    assert caught.value.__cause__ is error
    assert breaker.current_state == "open"


@every_way
def test_the_failure_that_opens_the_circuit_can_be_left_as_it_is(way, boom):
    """With throw_new_error_on_trip=False the trip raises what was raised."""
    breaker = CircuitBreaker(fail_max=1, throw_new_error_on_trip=False)
    error = boom()
    with pytest.raises(boom) as caught:
        way(breaker, raising(error))
    assert caught.value is error
    assert breaker.current_state == "open"


@every_way
def test_an_open_circuit_rejects_the_call(way, clock, recorder):
    """The function does not run, and the caller learns when to come back."""
    breaker = CircuitBreaker(reset_timeout=60)
    breaker.open()
    breaker.add_listener(recorder)
    work = mock.Mock()
    clock.advance(59)
    with pytest.raises(CircuitBreakerError) as caught:
        way(breaker, work)
    work.assert_not_called()
    assert caught.value.breaker is breaker
    assert caught.value.retry_after == pytest.approx(1)
    assert "before_call" not in recorder.names


@every_way
def test_the_first_call_after_the_timeout_is_the_trial(way, clock):
    """The trial makes the circuit half-open, runs once, and closes the circuit."""
    breaker = CircuitBreaker(reset_timeout=60)
    breaker.open()
    clock.advance(60)
    states = []
    way(breaker, lambda: states.append(breaker.current_state))
    assert states == ["half-open"]
    assert breaker.current_state == "closed"


@every_way
def test_a_failed_trial_opens_the_circuit_again(way, fail, boom):
    """The trial raises CircuitBreakerError from what the function raised."""
    breaker = CircuitBreaker()
    breaker.half_open()
    with pytest.raises(CircuitBreakerError, match="Trial call failed") as caught:
        way(breaker, fail)
    assert isinstance(caught.value.__cause__, boom)
    assert breaker.current_state == "open"


@every_way
def test_while_a_trial_runs_the_call_is_rejected(way, clock):
    """There is one place, and another call holds it."""
    breaker = CircuitBreaker()
    breaker.half_open()
    trial = held(breaker)
    work = mock.Mock()
    with pytest.raises(CircuitBreakerError):
        way(breaker, work)
    work.assert_not_called()
    trial.__exit__(None, None, None)
    assert breaker.current_state == "closed"


@every_way
def test_a_running_trial_holds_the_place(way, clock):
    """While the trial runs, `retry_after` is the time until the trial loses its
    place."""
    breaker = CircuitBreaker(reset_timeout=60)
    breaker.half_open()
    waits = []
    way(breaker, lambda: waits.append(breaker.retry_after))
    assert waits == [60]


@every_way
@pytest.mark.parametrize("exclude", [[], [BaseException]], ids=["plain", "excluded"])
def test_an_abandoned_trial_only_gives_its_place_back(way, exclude, clock, recorder):
    """What interrupts a call tells nothing about the service."""
    breaker = CircuitBreaker(exclude=exclude, listeners=[recorder])
    breaker.half_open()
    recorder.events.clear()
    interrupt = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt) as caught:
        way(breaker, raising(interrupt))
    assert caught.value is interrupt
    assert recorder.names == ["before_call"]
    assert breaker.current_state == "half-open"
    assert breaker.fail_counter == 0
    assert breaker.retry_after == 0.0


@every_way
def test_an_abandoned_call_leaves_the_count(way):
    """In a closed circuit an abandoned call is neither a failure nor a success."""
    breaker = CircuitBreaker()
    breaker.fail_counter = 3
    with pytest.raises(KeyboardInterrupt):
        way(breaker, raising(KeyboardInterrupt()))
    assert breaker.fail_counter == 3


@every_way
def test_an_excluded_exception_is_a_success(way, boom, recorder):
    """The exception reaches the caller untouched, and the count goes back to 0."""
    breaker = CircuitBreaker(exclude=[boom], listeners=[recorder])
    breaker.fail_counter = 3
    error = boom()
    with pytest.raises(boom) as caught:
        way(breaker, raising(error))
    assert caught.value is error
    assert recorder.names == ["before_call", "success"]
    assert breaker.fail_counter == 0


@every_way
def test_a_call_within_a_trial_belongs_to_it(way, boom, fail, recorder):
    """The call is let through and listeners hear of it; its failure decides nothing."""
    breaker = CircuitBreaker()
    breaker.half_open()
    breaker.add_listener(recorder)
    with breaker.calling():
        with pytest.raises(boom):
            way(breaker, fail)
        assert recorder.names == ["before_call", "before_call", "failure"]
        assert breaker.fail_counter == 0
        assert breaker.current_state == "half-open"
    assert breaker.current_state == "closed"


@every_way
def test_calls_made_by_a_trial_belong_to_it(way):
    """Whichever way the trial is guarded, its own calls are let through."""
    breaker = CircuitBreaker()
    breaker.half_open()

    def work():
        result = breaker.call(lambda: "inner")
        return result, breaker.current_state

    assert way(breaker, work) == ("inner", "half-open")
    assert breaker.current_state == "closed"


@every_way
def test_once_the_trial_has_ended_nothing_belongs_to_it(way, clock):
    """A call in the context of an ended trial is rejected while another trial runs."""
    breaker = CircuitBreaker(success_threshold=2)
    breaker.half_open()
    way(breaker, int)
    trial = held(breaker)
    with pytest.raises(CircuitBreakerError):
        breaker.call(int)
    trial.__exit__(None, None, None)
    assert breaker.current_state == "closed"


@every_way
def test_a_late_failure_changes_nothing(way, boom, recorder):
    """The failure is told and raised as it is, but its era is over."""
    breaker = CircuitBreaker(fail_max=1, listeners=[recorder])
    error = boom()

    def work():
        breaker.open()
        breaker.close()
        raise error

    with pytest.raises(boom) as caught:
        way(breaker, work)
    assert caught.value is error
    assert breaker.fail_counter == 0
    assert breaker.current_state == "closed"
    assert recorder.names[-1] == "failure"


@every_way
def test_a_late_success_changes_nothing(way, recorder):
    """The success is told, but forgets no failures of a later era."""
    breaker = CircuitBreaker(listeners=[recorder])

    def work():
        breaker.close()
        breaker.fail_counter = 3

    way(breaker, work)
    assert breaker.fail_counter == 3
    assert recorder.names[-1] == "success"


@every_way
def test_a_listener_added_during_the_call_hears_how_it_ended(way, recorder):
    """The listeners that the breaker has when the call ends are told."""
    breaker = CircuitBreaker()
    way(breaker, lambda: breaker.add_listener(recorder))
    assert recorder.names == ["success"]


@pytest.mark.parametrize(
    "way",
    # contextlib makes cycles of its own
    [way for way in WAYS if "context_manager" not in way.__name__],
    ids=lambda way: way.__name__,
)
@pytest.mark.parametrize("new_error", [True, False])
@pytest.mark.skipif(
    sys.implementation.name != "cpython", reason="needs reference counting"
)
def test_an_exception_is_freed_when_the_caller_lets_go_of_it(way, new_error, boom):
    """No cycle through a traceback keeps the exception, and all it refers to, alive."""
    breaker = CircuitBreaker(fail_max=2, throw_new_error_on_trip=new_error)
    alive = []

    def work():
        error = boom()
        alive.append(weakref.ref(error))
        try:
            raise error
        finally:
            del error

    gc.disable()
    try:
        for _ in range(2):  # one that is counted and one that opens the circuit
            with contextlib.suppress(boom, CircuitBreakerError):
                way(breaker, work)
        assert breaker.current_state == "open"
        assert [ref() for ref in alive] == [None, None]
    finally:
        gc.enable()


class HearsRejections:
    def rejected(self, cb, func, *args, **kwargs):
        """Hear of a rejection, so that the breaker rejects the call under its lock."""


@pytest.mark.parametrize(
    "listeners", [(), (HearsRejections(),)], ids=["quiet", "heard"]
)
@pytest.mark.skipif(
    sys.implementation.name != "cpython", reason="needs reference counting"
)
def test_a_rejection_is_freed_when_the_caller_lets_go_of_it(listeners):
    """No cycle through a traceback keeps the error, and the breaker, alive."""
    breaker = CircuitBreaker(listeners=listeners)
    breaker.open()
    gc.disable()
    try:
        try:
            breaker.call(int)
        except CircuitBreakerError as error:
            alive = weakref.ref(error)
        assert alive() is None
    finally:
        gc.enable()


# Decorating leaves things what they are.


def plain(a, b: int = 2, *, c="c") -> str:
    """Does it."""
    return f"{a} {b} {c}"


async def coroutine(a, b: int = 2, *, c="c") -> str:
    """Does it."""
    return f"{a} {b} {c}"


def generator(a, b: int = 2, *, c="c"):
    """Does it."""
    yield f"{a} {b} {c}"


async def async_generator(a, b: int = 2, *, c="c"):
    """Does it."""
    yield f"{a} {b} {c}"


@types.coroutine
def iterable_coroutine(a, b: int = 2, *, c="c"):
    """Does it."""
    return f"{a} {b} {c}"
    yield


async def await_it(awaitable):
    return await awaitable


# Each kind of function, with what turns the return value of a call into the result.
KINDS = {
    plain: lambda result: result,
    coroutine: drive,
    generator: lambda result: list(result)[0],
    async_generator: lambda result: drive(collect(result)),
    iterable_coroutine: lambda result: drive(await_it(result)),
}
LAZY = [kind for kind in KINDS if kind is not plain]

every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
every_lazy_kind = pytest.mark.parametrize("kind", LAZY, ids=lambda kind: kind.__name__)


def nature(func):
    """What inspect takes a function for."""
    return {
        question.__name__: question(func)
        for question in (
            inspect.iscoroutinefunction,
            inspect.isgeneratorfunction,
            inspect.isasyncgenfunction,
        )
    }


def as_function(func):
    return func


def as_partial(func):
    return functools.partial(func, b=2)


def as_partial_of_a_partial(func):
    inner = functools.partial(func, b=1)
    inner.note = "with an attribute, so that Python doesn't merge the two"
    return functools.partial(inner, b=2)


class Service(str):
    """Something with methods, which get an "a" for their self."""


def as_bound_method(func):
    return type("WithMethod", (Service,), {"fetch": func})("a").fetch


def as_static_method(func):
    return type("WithMethod", (Service,), {"fetch": staticmethod(func)})("a").fetch


def as_partial_of_a_bound_method(func):
    return functools.partial(as_bound_method(func), b=2)


def as_partial_method(func):
    fetch = functools.partialmethod(func, b=2)
    return type("WithMethod", (Service,), {"fetch": fetch})("a").fetch


def as_object_with_call(func):
    return type("WithCall", (Service,), {"__call__": func})("a")


def as_partial_of_an_object_with_call(func):
    return functools.partial(as_object_with_call(func), b=2)


# Each shape in which a function may come, with the arguments that are left to give.
SHAPES = {
    as_function: ["a"],
    as_partial: ["a"],
    as_partial_of_a_partial: ["a"],
    as_bound_method: [],
    as_static_method: ["a"],
    as_partial_of_a_bound_method: [],
    as_partial_method: [],
    as_object_with_call: [],
    as_partial_of_an_object_with_call: [],
}

every_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.__name__)


@every_kind
@every_shape
def test_whatever_is_decorated_stays_of_its_kind(shape, kind, recorder):
    """Frameworks that ask inspect get the answer that the function gave."""
    breaker = CircuitBreaker(listeners=[recorder])
    func, args = shape(kind), SHAPES[shape]
    decorated = breaker(func)
    assert nature(decorated) == nature(kind)
    assert KINDS[kind](decorated(*args, c="see")) == "a 2 see"
    assert recorder.events == [
        ("before_call", func, tuple(args), {"c": "see"}),
        ("success",),
    ]


@every_kind
@every_shape
def test_anything_can_be_called_through_the_breaker(shape, kind, recorder):
    """call() guards any callable, of any of the kinds and in any shape."""
    breaker = CircuitBreaker(listeners=[recorder])
    func, args = shape(kind), SHAPES[shape]
    assert KINDS[kind](breaker.call(func, *args, c="see")) == "a 2 see"
    assert recorder.events == [
        ("before_call", func, tuple(args), {"c": "see"}),
        ("success",),
    ]


@every_lazy_kind
@every_shape
def test_what_is_lazy_is_admitted_when_it_first_runs(shape, kind, recorder):
    """call() itself admits nothing where the callable is known to be lazy."""
    breaker = CircuitBreaker(listeners=[recorder])
    lazy = breaker.call(shape(kind), *SHAPES[shape])
    assert recorder.events == []
    breaker.open()
    with pytest.raises(CircuitBreakerError):
        KINDS[kind](lazy)
    assert recorder.names == ["state_change"]


@every_lazy_kind
@every_shape
def test_without_listeners_what_is_lazy_is_admitted_when_it_first_runs(shape, kind):
    """A call of which no listener hears is admitted no sooner than one that is heard,
    and leaves no coroutine behind of which Python would warn."""
    breaker = CircuitBreaker()
    lazy, rejected = (breaker.call(shape(kind), *SHAPES[shape]) for _ in range(2))
    assert KINDS[kind](lazy) == "a 2 c"
    breaker.open()
    with pytest.raises(CircuitBreakerError):
        KINDS[kind](rejected)


@every_lazy_kind
@pytest.mark.parametrize("heard", [False, True])
def test_wrong_arguments_of_what_is_lazy_fail_when_it_runs(kind, heard, recorder):
    """Whether listeners hear of the calls makes no difference."""
    breaker = CircuitBreaker(listeners=[recorder] if heard else [])
    lazy = breaker.call(kind)
    assert breaker.fail_counter == 0
    with pytest.raises(TypeError):
        KINDS[kind](lazy)
    assert breaker.fail_counter == 1


@every_way
def test_a_function_that_raises_a_type_error_runs_once(way):
    """A TypeError may come from the function, and not from wrong arguments."""
    breaker, runs = CircuitBreaker(), []

    def fetch():
        runs.append("run")
        raise TypeError

    with pytest.raises(TypeError):
        way(breaker, fetch)
    assert runs == ["run"]
    assert breaker.fail_counter == 1


@every_kind
def test_a_decorated_function_keeps_its_name_docstring_and_signature(kind):
    """The decorated function looks like the function inside, which is at hand."""
    decorated = CircuitBreaker()(kind)
    assert decorated.__name__ == kind.__name__
    assert decorated.__qualname__ == kind.__qualname__
    assert decorated.__module__ == kind.__module__
    assert decorated.__doc__ == "Does it."
    assert inspect.signature(decorated) == inspect.signature(kind)
    assert decorated.__wrapped__ is kind


def test_a_decorated_function_keeps_its_attributes():
    """Attributes that other decorators left on the function are still there."""

    def func():
        pass

    func.route = "/customers"
    assert CircuitBreaker()(func).route == "/customers"


class RemoteMethod:
    """As in xmlrpc.client, each of its attributes is a method further down."""

    def __init__(self, name):
        self.name_sent = name

    def __getattr__(self, name):
        return RemoteMethod(f"{self.name_sent}.{name}")

    def __call__(self, *args):
        return self.name_sent, args


def test_a_method_of_a_remote_object_can_be_called():
    """The object has every attribute, those of functions too, and they say nothing."""
    breaker = CircuitBreaker()
    add = RemoteMethod("add")
    assert breaker.call(add, 1) == ("add", (1,))
    assert breaker.state.call(add, 2) == ("add", (2,))
    assert breaker(add)(3) == ("add", (3,))
    assert breaker(add).__wrapped__ is add
    assert drive(breaker.call_async(add, 4)) == ("add", (4,))


def test_what_a_function_wraps_does_not_say_what_it_is():
    """A plain function that runs a coroutine function for its callers is plain."""

    async def fetch():
        return "fetched"

    @functools.wraps(fetch)
    def fetch_at_once():
        return drive(fetch())

    assert CircuitBreaker()(fetch_at_once)() == "fetched"


@every_lazy_kind
@pytest.mark.parametrize(
    "make",
    [
        lambda breaker, kind: breaker(kind)("a"),
        lambda breaker, kind: breaker.call(kind, "a"),
        lambda breaker, kind: breaker.call(lambda made: made, kind("a")),
    ],
    ids=["decorated", "called", "returned"],
)
def test_what_is_lazy_keeps_its_name(make, kind):
    """Tracebacks and warnings show a guarded coroutine under the function's name."""
    lazy = make(CircuitBreaker(), kind)
    assert lazy.__name__ == kind.__name__
    assert lazy.__qualname__ == kind.__qualname__
    KINDS[kind](lazy)


def test_an_async_mock_is_a_coroutine_function(boom):
    """The mock that tests put in the place of a client is awaited and guarded."""
    breaker = CircuitBreaker()
    client = mock.AsyncMock(return_value="result")
    decorated = breaker(client)
    assert inspect.iscoroutinefunction(decorated)
    assert drive(decorated(1)) == "result"
    assert drive(breaker.call(client, 2)) == "result"
    assert drive(breaker.call_async(client, 3)) == "result"
    assert client.await_args_list == [mock.call(1), mock.call(2), mock.call(3)]
    client.side_effect = boom
    for call in (decorated, functools.partial(breaker.call, client)):
        with pytest.raises(boom):
            drive(call())
    assert breaker.fail_counter == 2


def test_a_method_over_an_async_mock_is_called_once():
    """An AsyncMock counts each call at once, before a program awaits the result."""
    breaker = CircuitBreaker()
    client = mock.AsyncMock(return_value="result")
    fetch = types.MethodType(client, "self")
    lazy, rejected = breaker.call(fetch, 1), breaker.call(fetch, 2)
    assert client.call_count == 0
    assert drive(lazy) == "result"
    breaker.open()
    with pytest.raises(CircuitBreakerError):
        drive(rejected)
    assert client.call_args_list == [mock.call("self", 1)]


class LoadedAtFirstCall:
    """Has the attributes of a function only from the first call on."""

    def __init__(self, func):
        self.func = func
        self.loaded = None
        self.calls = 0

    def __getattr__(self, name):
        return getattr(self.loaded, name)

    def __call__(self, *args):
        self.calls += 1
        self.loaded = self.func
        return self.func(*args)


@every_lazy_kind
@pytest.mark.parametrize("is_method", [False, True])
def test_a_call_that_makes_an_object_lazy_runs_once(kind, is_method, recorder):
    """An object that looks plain before its call is guarded as a plain function is."""
    breaker = CircuitBreaker(listeners=[recorder])
    breaker.half_open()
    loaded = LoadedAtFirstCall(kind)
    if is_method:
        lazy = breaker.call(types.MethodType(loaded, "a"))
    else:
        lazy = breaker.call(loaded, "a")
    assert KINDS[kind](lazy) == "a 2 c"
    assert loaded.calls == 1
    assert recorder.names == ["state_change", "before_call", "state_change", "success"]


@every_lazy_kind
def test_wrong_arguments_of_an_object_that_its_call_makes_lazy_are_a_failure(kind):
    """The TypeError of the call is the outcome of the trial."""
    breaker = CircuitBreaker()
    breaker.half_open()
    with pytest.raises(CircuitBreakerError) as caught:
        breaker.call(LoadedAtFirstCall(kind))
    assert isinstance(caught.value.__cause__, TypeError)
    assert breaker.current_state == "open"


@pytest.mark.parametrize("mocked", [mock.Mock, mock.MagicMock])
def test_a_mock_is_a_plain_function(mocked):
    """A mock that isn't asynchronous is called at once."""
    breaker = CircuitBreaker()
    client = mocked(return_value="result")
    assert breaker.call(client, 1) == "result"
    assert breaker(client)(2) == "result"
    assert client.call_args_list == [mock.call(1), mock.call(2)]


@pytest.mark.parametrize("target", [dict, Service], ids=["builtin", "Python"])
def test_a_class_can_be_guarded(target):
    """Making an object may fail like any other call."""
    breaker = CircuitBreaker()
    assert type(breaker.call(target)) is target
    assert type(breaker(target)()) is target


def test_an_object_is_not_taken_for_a_call_of_its_class():
    """A class whose objects make coroutines makes no coroutine itself."""

    class Client:
        async def __call__(self):
            return "result"

    breaker = CircuitBreaker()
    client = breaker.call(Client)
    assert type(client) is Client
    assert drive(breaker.call(client)) == "result"


class LooksAlike(type):
    """A metaclass with an __eq__ and so without a hash."""

    def __eq__(cls, other):
        return cls is other


def test_a_result_of_any_class_is_returned(recorder):
    """Nothing is asked of the result's class, not even to be hashable."""

    class Result(metaclass=LooksAlike):
        pass

    breaker = CircuitBreaker(listeners=[recorder])
    assert type(breaker.call(Result)) is Result
    assert type(breaker(Result)()) is Result
    assert recorder.names == ["before_call", "success"] * 2


def test_a_builtin_function_can_be_guarded():
    """A callable without Python code is a plain function."""
    breaker = CircuitBreaker()
    assert breaker.call(len, "four") == 4
    assert breaker(len)("four") == 4


# Plain functions that turn out to return something lazy.


@every_lazy_kind
@pytest.mark.parametrize("decorate", [True, False], ids=["decorated", "called"])
def test_what_a_plain_function_returns_is_guarded_to_its_end(
    kind, decorate, clock, recorder
):
    """The call is admitted at once, holds the place, and settles when the result
    ends."""
    breaker = CircuitBreaker(reset_timeout=60)
    breaker.half_open()
    breaker.add_listener(recorder)
    func = lambda a: kind(a)  # noqa: E731
    lazy = breaker(func)("a") if decorate else breaker.call(func, "a")
    assert recorder.events == [("before_call", func, ("a",), {})]
    assert breaker.retry_after == 60
    assert KINDS[kind](lazy) == "a 2 c"
    assert recorder.names == ["before_call", "state_change", "success"]
    assert breaker.current_state == "closed"


@every_lazy_kind
def test_a_plain_function_that_would_return_something_lazy_is_rejected_at_the_call(
    kind,
):
    """What the function would return is unknown, so the breaker does not call the
    function."""
    breaker = CircuitBreaker()
    breaker.open()
    func = mock.Mock(side_effect=kind)
    with pytest.raises(CircuitBreakerError):
        breaker.call(func, "a")
    func.assert_not_called()


@every_lazy_kind
def test_a_plain_function_that_fails_before_it_returns_something_lazy_is_a_failure(
    kind, boom
):
    """The call began with the plain function."""
    breaker = CircuitBreaker()

    def func():
        raise boom
        return kind()

    with pytest.raises(boom):
        breaker.call(func)
    assert breaker.fail_counter == 1


@every_lazy_kind
def test_if_what_was_returned_never_runs_the_place_comes_back_with_time(kind, clock):
    """The trial holds its place for as long as a trial that hangs, and no longer."""
    breaker = CircuitBreaker(reset_timeout=60)
    breaker.half_open()
    made = kind("a")
    guarded = contextvars.Context().run(breaker.call, lambda: made)
    assert breaker.retry_after == 60
    clock.advance(59)
    with pytest.raises(CircuitBreakerError):
        breaker.call(int)
    clock.advance(1)
    assert breaker.call(int) == 0
    assert breaker.current_state == "closed"
    for lazy in guarded, made:
        getattr(lazy, "close", int)()  # a coroutine wants to be closed or awaited


# Methods.


def test_a_decorated_method_serves_all_instances(boom):
    """One breaker guards the method of all instances, and each call gets its own
    self."""
    breaker = CircuitBreaker(fail_max=2)

    class Service:
        @breaker
        def fetch(self, key):
            if key is None:
                raise boom
            return self, key

        @classmethod
        @breaker
        def make(cls):
            return cls

        @staticmethod
        @breaker
        def ping():
            return "pong"

    first, second = Service(), Service()
    assert first.fetch("key") == (first, "key")
    assert Service.make() is Service
    assert first.ping() == "pong"
    with pytest.raises(boom):
        first.fetch(None)
    with pytest.raises(CircuitBreakerError):
        second.fetch(None)


def test_one_breaker_may_guard_many_functions(fail, boom):
    """The functions share the breaker's state, which stands for what they depend on."""
    breaker = CircuitBreaker(fail_max=1, throw_new_error_on_trip=False)
    with pytest.raises(boom):
        breaker(fail)()
    with pytest.raises(CircuitBreakerError):
        breaker(len)("four")


# The older spellings.


@every_kind
def test_the_parentheses_make_no_difference(kind):
    """@breaker() decorates everything as @breaker does."""
    decorated = CircuitBreaker()()(kind)
    assert nature(decorated) == nature(kind)
    assert decorated.__name__ == kind.__name__
    assert inspect.signature(decorated) == inspect.signature(kind)
    assert KINDS[kind](decorated("a")) == "a 2 c"


@pytest.mark.parametrize(
    "kind", [plain, coroutine, iterable_coroutine], ids=lambda kind: kind.__name__
)
def test_call_async_makes_a_coroutine_function(kind):
    """@breaker(__pybreaker_call_async=True) is awaited, whatever it decorates."""
    decorated = CircuitBreaker()(__pybreaker_call_async=True)(kind)
    assert inspect.iscoroutinefunction(decorated)
    assert decorated.__name__ == kind.__name__
    assert inspect.signature(decorated) == inspect.signature(kind)
    assert drive(decorated("a")) == "a 2 c"


def test_call_async_is_known_inside_a_class():
    """The two underscores in front of the option's name do no harm there."""
    breaker = CircuitBreaker()

    class Service:
        @breaker(__pybreaker_call_async=True)
        def fetch(self):
            return Awaitable(lambda: self)

    service = Service()
    assert drive(service.fetch()) is service


@every_kind
def test_call_async_can_be_denied(kind):
    """@breaker(__pybreaker_call_async=False) is the plain decorator."""
    decorated = CircuitBreaker()(__pybreaker_call_async=False)(kind)
    assert nature(decorated) == nature(kind)
    assert KINDS[kind](decorated("a")) == "a 2 c"


@pytest.mark.parametrize("options", [{}, {"__pybreaker_call_async": True}])
def test_options_may_come_along_with_the_function(options, recorder):
    """breaker(func, ...) is the same as breaker(...)(func)."""
    breaker = CircuitBreaker(listeners=[recorder])
    decorated = breaker(coroutine, **options)
    assert drive(decorated("a")) == "a 2 c"
    assert recorder.names == ["before_call", "success"]


def test_a_block_decorates_as_well():
    """Each call of the decorated function is guarded, as in older releases."""
    breaker = CircuitBreaker()

    @breaker.calling()
    def guarded():
        return "result"

    assert [guarded(), guarded()] == ["result", "result"]
    breaker.open()
    with pytest.raises(CircuitBreakerError):
        guarded()


# What cannot be decorated.


@pytest.mark.parametrize("thing", [None, 42, "function", ()], ids=repr)
@pytest.mark.parametrize("options", [None, {}, {"__pybreaker_call_async": True}])
def test_only_what_can_be_called_can_be_decorated(thing, options):
    """The mistake shows at the decoration, not at the first call."""
    breaker = CircuitBreaker()
    decorate = breaker if options is None else breaker(**options)
    with pytest.raises(TypeError) as caught:
        decorate(thing)
    assert repr(thing) in str(caught.value)


@pytest.mark.parametrize(
    "args, kwargs",
    [([plain, plain], {}), ([plain], {"fail_max": 3}), ([], {"fail_max": 3})],
    ids=["two functions", "an option with the function", "an option"],
)
def test_the_decorator_takes_one_function_and_no_other_options(args, kwargs):
    """A setting belongs to the breaker, not to the decoration."""
    with pytest.raises(TypeError):
        CircuitBreaker()(*args, **kwargs)


# Subclasses that override call().


class Counting(CircuitBreaker):
    """Remembers the function and the arguments of each call()."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.called = []

    def call(self, func, *args, **kwargs):
        self.called.append((func, args, kwargs))
        return super().call(func, *args, **kwargs)


class Refusing(CircuitBreaker):
    """Lets nothing through while the service is being maintained."""

    def call(self, func, *args, **kwargs):
        raise PermissionError("maintenance")


@every_kind
@pytest.mark.parametrize("options", [None, {}], ids=["bare", "with parentheses"])
def test_a_subclass_that_overrides_call_sees_decorated_calls(kind, options, recorder):
    """The override gets the function itself with its arguments, when the call runs."""
    breaker = Counting(listeners=[recorder])
    decorated = (breaker if options is None else breaker(**options))(kind)
    assert nature(decorated) == nature(kind)
    assert inspect.signature(decorated) == inspect.signature(kind)
    assert KINDS[kind](decorated("a", c="see")) == "a 2 see"
    assert breaker.called == [(kind, ("a",), {"c": "see"})]
    assert recorder.names == ["before_call", "success"]


def test_a_subclass_that_overrides_call_async_sees_calls_decorated_for_it():
    """With __pybreaker_call_async=True decorated calls go through call_async()."""
    called = []

    class CountingAsync(CircuitBreaker):
        async def call_async(self, func, *args, **kwargs):
            called.append((func, args, kwargs))
            return await super().call_async(func, *args, **kwargs)

    decorated = CountingAsync()(__pybreaker_call_async=True)(coroutine)
    assert drive(decorated("a", c="see")) == "a 2 see"
    assert called == [(coroutine, ("a",), {"c": "see"})]


@every_lazy_kind
def test_a_subclass_sees_a_lazy_call_when_it_first_runs(kind):
    """Making a coroutine or a generator is no call yet."""
    breaker = Counting()
    lazy = breaker(kind)("a")
    assert breaker.called == []
    KINDS[kind](lazy)
    assert len(breaker.called) == 1


@every_kind
def test_a_subclass_may_refuse_a_decorated_call(kind, recorder):
    """The exception of the override reaches the caller, and nothing was admitted."""
    breaker = Refusing(listeners=[recorder])
    with pytest.raises(PermissionError, match="maintenance"):
        KINDS[kind](breaker(kind)("a"))
    assert recorder.events == []
    assert breaker.fail_counter == 0


@every_lazy_kind
def test_a_subclass_sees_a_plain_function_that_returns_something_lazy(kind, recorder):
    """The call is admitted at once, and guarded once, to the end of what was
    returned."""
    breaker = Counting(listeners=[recorder])
    lazy = breaker(lambda: kind("a"))()
    assert recorder.names == ["before_call"]
    assert len(breaker.called) == 1
    assert KINDS[kind](lazy) == "a 2 c"
    assert recorder.names == ["before_call", "success"]


@pytest.mark.parametrize(
    "way",
    [way for way in WAYS if "decorated" in way.__name__],
    ids=lambda w: w.__name__,
)
def test_the_failure_of_a_call_that_a_subclass_saw_is_counted_once(way, fail, boom):
    """Overriding call() changes nothing about what the outcome does."""
    breaker = Counting(fail_max=2)
    with pytest.raises(boom):
        way(breaker, fail)
    assert breaker.fail_counter == 1
    with pytest.raises(CircuitBreakerError) as caught:
        way(breaker, fail)
    assert isinstance(caught.value.__cause__, boom)
    assert breaker.current_state == "open"


def test_a_call_put_on_one_breaker_sees_its_decorated_calls():
    """Tests replace call() on the breaker itself, which is an override as well."""
    breaker = CircuitBreaker()
    breaker.call = mock.Mock(return_value="mocked")
    assert breaker(plain)("a") == "mocked"
    breaker.call.assert_called_once_with(plain, "a")


# What call() does not do.


@pytest.mark.parametrize(
    "value", [None, (), iter([1]), range(3)], ids=lambda value: type(value).__name__
)
def test_results_that_are_not_lazy_are_returned_as_they_are(value, recorder):
    """An iterator that is no generator is a result like any other."""
    breaker = CircuitBreaker(listeners=[recorder])
    assert breaker.call(lambda: value) is value
    assert recorder.names == ["before_call", "success"]


def test_the_state_calls_as_the_breaker_does():
    """breaker.state.call(func) is breaker.call(func)."""
    breaker = CircuitBreaker()
    assert breaker.state.call(plain, "a", c="see") == "a 2 see"
    assert drive(breaker.state.call(coroutine, "a")) == "a 2 c"
