"""@breaker on staticmethod and classmethod objects guards the function inside."""

from __future__ import annotations

import inspect

import pytest
from support import Boom, boom, drive, every, fail

from pybreaker import CircuitBreaker, CircuitBreakerError


def plain(kind):
    def work(*args):
        """Does the work."""
        return args

    return kind(work), lambda result: result


def coroutine(kind):
    async def work(*args):
        """Does the work."""
        return args

    return kind(work), drive


def generator(kind):
    def work(*args):
        """Does the work."""
        yield args

    return kind(work), next


def async_generator(kind):
    async def work(*args):
        """Does the work."""
        yield args

    return kind(work), lambda result: drive(result.__anext__())


SPELLINGS = {
    "@breaker": lambda breaker: breaker,
    "@breaker()": lambda breaker: breaker(),
}


@every(
    kind=[staticmethod, classmethod],
    make=[plain, coroutine, generator, async_generator],
    spelling=SPELLINGS,
)
def test_a_decorated_static_or_class_method_stays_one_and_is_guarded(
    kind, make, spelling, recorder
):
    """The method is called on the class and on objects, with the arguments of its
    kind."""
    breaker = CircuitBreaker(name="db", listeners=[recorder])
    method, run = make(kind)
    decorated = spelling(breaker)(method)
    assert type(decorated) is kind

    class Service:
        work = decorated

    class Derived(Service):
        pass

    owner = {staticmethod: (), classmethod: (Service,)}[kind]
    assert run(Service.work(1, 2)) == (*owner, 1, 2)
    assert run(Service().work(3)) == (*owner, 3)
    if kind is classmethod:
        assert run(Derived.work()) == (Derived,)
    assert recorder.names.count("before_call") == 2 + (kind is classmethod)
    breaker.open()
    with pytest.raises(CircuitBreakerError):
        run(Service.work())


@pytest.mark.parametrize("kind", [staticmethod, classmethod])
@pytest.mark.parametrize("make", [plain, coroutine, generator, async_generator])
def test_the_function_inside_keeps_its_kind_name_and_docstring(kind, make):
    """Tools that look at the class see the same kind, name and docstring as before."""
    method, _ = make(kind)
    decorated = CircuitBreaker()(method)
    inside = decorated.__func__
    for is_kind in (
        inspect.iscoroutinefunction,
        inspect.isgeneratorfunction,
        inspect.isasyncgenfunction,
    ):
        assert is_kind(inside) == is_kind(method.__func__)
    assert inside.__name__ == "work"
    assert inside.__doc__ == "Does the work."
    assert inside.__wrapped__ is method.__func__


@pytest.mark.parametrize("kind", [staticmethod, classmethod])
def test_failures_of_a_decorated_static_or_class_method_open_the_circuit(kind):
    """Such failures count like those of any function."""
    breaker = CircuitBreaker(fail_max=2)

    class Service:
        @breaker
        @kind
        def work(*args):
            raise Boom

    with pytest.raises(Boom):
        Service.work()
    with pytest.raises(CircuitBreakerError) as tripped:
        Service().work()
    assert isinstance(tripped.value.__cause__, Boom)
    assert breaker.current_state == "open"


@pytest.mark.parametrize("kind", [staticmethod, classmethod])
def test_the_order_of_the_two_decorators_makes_no_difference(kind):
    """The breaker below or above: both guard, and both count."""
    breaker = CircuitBreaker(fail_max=3)

    class Service:
        @breaker
        @kind
        def above(*args):
            return boom()

        @kind
        @breaker
        def below(*args):
            return boom()

    for work in (Service.above, Service.below):
        with pytest.raises(Boom):
            work()
    assert breaker.fail_counter == 2


@pytest.mark.parametrize("kind", [staticmethod, classmethod])
def test_a_subclass_that_overrides_call_sees_static_and_class_methods(kind):
    """The subclass's call() sees all decorated calls."""
    seen = []

    class Watching(CircuitBreaker):
        def call(self, func, *args, **kwargs):
            seen.append((func.__name__, args))
            return super().call(func, *args, **kwargs)

    breaker = Watching()

    class Service:
        @breaker
        @kind
        def work(*args):
            return args

    arguments = {staticmethod: (1,), classmethod: (Service, 1)}[kind]
    assert Service.work(1) == arguments
    assert seen == [("work", arguments)]


def test_what_is_inside_must_be_callable():
    """A staticmethod around something else is refused where it is decorated."""
    breaker = CircuitBreaker()
    with pytest.raises(TypeError):
        breaker(staticmethod(5))
    fail(breaker)
    assert breaker.fail_counter == 1
