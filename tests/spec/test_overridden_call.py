"""Blocks of a subclass that overrides call: they go through that call."""

from __future__ import annotations

import asyncio
import inspect

import pytest
from support import Boom, drive

from pybreaker import CircuitBreaker, CircuitBreakerError


class Switchable(CircuitBreaker):
    """Refuses while a switch is off, as programs with feature flags do."""

    def __init__(self, *args, **kwargs):
        self.enabled = True
        self.seen = []
        super().__init__(*args, **kwargs)

    def call(self, func, *args, **kwargs):
        self.seen.append((func, args, kwargs))
        if not self.enabled:
            raise CircuitBreakerError("switched off")
        return super().call(func, *args, **kwargs)


def with_block(breaker, work):
    with breaker.calling():
        return work()


def async_with_block(breaker, work):
    async def block():
        async with breaker.calling():
            return work()

    return drive(block())


BLOCKS = pytest.mark.parametrize("block", [with_block, async_with_block])


def raising(exc):
    def work():
        raise exc

    return work


@BLOCKS
def test_a_subclass_that_refuses_calls_refuses_blocks(block, recorder):
    """The body does not run, nothing is counted, and no listener is told."""
    breaker, ran = Switchable(listeners=[recorder]), []
    breaker.enabled = False
    with pytest.raises(CircuitBreakerError, match="switched off"):
        block(breaker, lambda: ran.append(1))
    assert ran == []
    assert (breaker.fail_counter, recorder.events) == (0, [])
    breaker.enabled = True
    assert block(breaker, lambda: "done") == "done"


@BLOCKS
def test_call_receives_a_generator_function_that_yields_once(block):
    """call() gets the function once for each block, without further arguments."""
    breaker = Switchable()
    block(breaker, int)
    ((func, args, kwargs),) = breaker.seen
    assert inspect.isgeneratorfunction(func)
    assert len(list(func())) == 1
    assert (args, kwargs) == ((), {})


@BLOCKS
def test_listeners_hear_of_the_function_that_call_received(block, recorder):
    """For blocks of other breakers listeners hear of breaker.calling instead."""
    breaker = Switchable(listeners=[recorder])
    block(breaker, int)
    assert recorder.events == [
        ("before_call", breaker.seen[0][0], (), {}),
        ("success",),
    ]


@BLOCKS
def test_a_block_that_call_lets_pass_is_guarded(block, recorder):
    """Failures count, the last one opens, and an open circuit rejects."""
    breaker, exc = Switchable(fail_max=2, listeners=[recorder]), Boom()
    with pytest.raises(Boom):
        block(breaker, raising(Boom()))
    assert breaker.fail_counter == 1
    with pytest.raises(CircuitBreakerError, match="Failures threshold") as tripped:
        block(breaker, raising(exc))
    assert tripped.value.__cause__ is exc
    ran = []
    with pytest.raises(CircuitBreakerError, match="Timeout not elapsed"):
        block(breaker, lambda: ran.append(1))
    assert ran == []
    assert recorder.transitions == [("closed", "open")]


@BLOCKS
@pytest.mark.parametrize("exc", [Boom(), KeyError(), StopIteration(), SystemExit()])
def test_what_a_block_raises_reaches_the_caller_as_it_is(block, exc):
    """This holds for StopIteration, which code inside a generator cannot raise."""
    if block is async_with_block and isinstance(exc, StopIteration):
        pytest.skip("a coroutine cannot raise StopIteration")
    breaker = Switchable(exclude=[KeyError])
    breaker.fail_counter = 2
    with pytest.raises(type(exc)) as raised:
        block(breaker, raising(exc))
    assert raised.value is exc
    expected = {KeyError: 0, SystemExit: 2}.get(type(exc), 3)
    assert breaker.fail_counter == expected


@BLOCKS
def test_a_block_can_be_the_trial(block):
    """The block closes the circuit, opens it again, or gives its place back."""
    breaker = Switchable(reset_timeout=60)
    breaker.half_open()
    with pytest.raises(KeyboardInterrupt):
        block(breaker, raising(KeyboardInterrupt()))
    assert (breaker.current_state, breaker.retry_after) == ("half-open", 0)
    with pytest.raises(CircuitBreakerError, match="Trial call failed"):
        block(breaker, raising(Boom()))
    assert breaker.current_state == "open"
    breaker.half_open()
    block(breaker, int)
    assert breaker.current_state == "closed"


@BLOCKS
def test_a_call_in_a_block_on_trial_belongs_to_it(block):
    """The call is let through, and the block decides."""
    breaker = Switchable()
    breaker.half_open()

    def work():
        assert breaker.call(str, "inner") == "inner"
        return breaker.current_state

    assert block(breaker, work) == "half-open"
    assert breaker.current_state == "closed"


@BLOCKS
def test_a_generator_exit_in_such_a_block_is_a_success(block, recorder):
    """To the generator of such a block a GeneratorExit is a close after its yield."""
    breaker = Switchable(listeners=[recorder])
    breaker.fail_counter = 2
    with pytest.raises(GeneratorExit):
        block(breaker, raising(GeneratorExit()))
    assert breaker.fail_counter == 0
    assert recorder.names == ["before_call", "success"]


@BLOCKS
def test_a_generator_exit_in_another_block_is_abandoned(block, recorder):
    """Without an override there is no generator to close, so the call is abandoned."""
    breaker = CircuitBreaker(listeners=[recorder])
    breaker.fail_counter = 2
    with pytest.raises(GeneratorExit):
        block(breaker, raising(GeneratorExit()))
    assert breaker.fail_counter == 2
    assert recorder.names == ["before_call"]


@BLOCKS
def test_each_calling_of_a_subclass_is_for_one_use(block):
    """Each block is for one use, as with every breaker."""
    breaker = Switchable()
    calling = breaker.calling()
    breaker.calling = lambda: calling
    block(breaker, int)
    with pytest.raises(RuntimeError):
        block(breaker, int)


def test_a_block_that_call_refuses_with_an_exception_of_its_own_does_not_run():
    """Rate limits and tenants are refused in the same way."""

    class TooMany(Exception):
        pass

    class Limited(CircuitBreaker):
        left = 1

        def call(self, func, *args, **kwargs):
            if not self.left:
                raise TooMany
            self.left -= 1
            return super().call(func, *args, **kwargs)

    breaker, ran = Limited(), []
    for block in (with_block, with_block):
        try:
            block(breaker, lambda: ran.append(1))
        except TooMany:
            ran.append("refused")
    assert ran == [1, "refused"]
    assert breaker.fail_counter == 0


def test_a_call_that_reads_its_function_sees_its_name():
    """Such subclasses log or count by func.__name__."""
    names = []

    class Counting(CircuitBreaker):
        def call(self, func, *args, **kwargs):
            names.append(func.__name__)
            return super().call(func, *args, **kwargs)

    breaker = Counting()
    with_block(breaker, int)
    async_with_block(breaker, int)
    breaker.call(divmod, 7, 2)
    assert len(names) == 3
    assert all(isinstance(name, str) for name in names)


class Asynchronous(CircuitBreaker):
    """Its call() is a coroutine function, and only decorated calls can go through
    it."""

    calls = 0

    async def call(self, func, *args, **kwargs):
        self.calls += 1
        return await self.call_async(func, *args, **kwargs)


@BLOCKS
def test_a_call_that_is_a_coroutine_function_is_passed_by(block, recorder):
    """A block cannot await call(), so the breaker guards the block itself."""
    breaker = Asynchronous(fail_max=2, listeners=[recorder])
    assert block(breaker, lambda: "done") == "done"
    assert recorder.events == [("before_call", breaker.calling, (), {}), ("success",)]
    with pytest.raises(Boom):
        block(breaker, raising(Boom()))
    with pytest.raises(CircuitBreakerError, match="Failures threshold"):
        block(breaker, raising(Boom()))
    with pytest.raises(CircuitBreakerError, match="Timeout not elapsed"):
        block(breaker, int)
    assert breaker.calls == 0


def test_an_async_block_of_a_subclass_may_wait():
    """The blocks run on an event loop, side by side."""

    async def story(breaker):
        async def block(number):
            async with breaker.calling():
                await asyncio.sleep(0)
                return number

        return await asyncio.gather(*map(block, range(3)))

    breaker = Switchable()
    assert asyncio.run(story(breaker)) == [0, 1, 2]
    assert len(breaker.seen) == 3


def test_a_block_goes_through_a_call_that_is_a_generator_function(recorder):
    """Only a `call` that is a coroutine function is passed by."""

    class Own(CircuitBreaker):
        def call(self, func, *args, **kwargs):
            heard.append("entered")
            yield from super().call(func, *args, **kwargs)
            heard.append("left")

    heard, breaker = [], Own(listeners=[recorder])
    with breaker.calling():
        heard.append("block")
    assert heard == ["entered", "block", "left"]
    assert recorder.names == ["before_call", "success"]
