"""Generators, async generators and blocks: "Ways to guard" in the
specification, and "What happens to a call" for trials."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import threading
import types

import pytest
from support import PATIENCE, drive

from pybreaker import (
    CircuitBreaker,
    CircuitBreakerError,
    CircuitBreakerListener,
    CircuitMemoryStorage,
)


def elsewhere(func, *args):
    """Calls the function in a context that has nothing to do with this one."""
    return contextvars.Context().run(func, *args)


def rejects(breaker):
    """Whether a call that is no part of a trial is rejected. A call that is admitted is
    abandoned, so that asking changes nothing."""

    def probe():
        raise KeyboardInterrupt

    try:
        elsewhere(breaker.call, probe)
    except CircuitBreakerError:
        return True
    except KeyboardInterrupt:
        return False


class Sync:
    """Steps of a generator."""

    def __init__(self, breaker, *, decorate=True):
        def echo():
            """Yields what it was sent or thrown; a KeyError gets through, and "stop"
            ends the generator."""
            self.closed = False
            item = "first"
            try:
                while item != "stop":
                    try:
                        item = yield item
                    except ValueError as exc:
                        item = exc
                return "returned"
            finally:
                self.closed = True

        self.made = breaker(echo)() if decorate else breaker.call(echo)

    def next(self):
        return next(self.made)

    def send(self, value):
        return self.made.send(value)

    def throw(self, exc):
        return self.made.throw(exc)

    def close(self):
        return self.made.close()

    end = StopIteration


class Async:
    """Steps of an async generator."""

    def __init__(self, breaker, *, decorate=True):
        async def echo():
            self.closed = False
            item = "first"
            try:
                while item != "stop":
                    try:
                        item = yield item
                    except ValueError as exc:
                        item = exc
            finally:
                self.closed = True

        self.made = breaker(echo)() if decorate else breaker.call(echo)

    def next(self):
        return drive(self.made.__anext__())

    def send(self, value):
        return drive(self.made.asend(value))

    def throw(self, exc):
        return drive(self.made.athrow(exc))

    def close(self):
        return drive(self.made.aclose())

    end = StopAsyncIteration


@pytest.fixture(params=[Sync, Async], ids=["generator", "async generator"])
def make(request):
    """`make(breaker)` is a guarded generator of either kind, with the same
    names for the steps of both."""
    return request.param


@pytest.fixture(params=[True, False], ids=["decorated", "called"])
def decorate(request):
    return request.param


# What passes through.


def test_what_is_sent_and_yielded_passes_through(make, decorate):
    """The generator and its user do not notice the breaker between them."""
    generator = make(CircuitBreaker(), decorate=decorate)
    assert generator.next() == "first"
    assert generator.send("second") == "second"
    assert generator.send(None) is None
    assert generator.next() is None
    item = object()
    assert generator.send(item) is item


def test_what_is_thrown_passes_through(make, decorate):
    """The very exception arrives, and the generator may go on after it."""
    breaker = CircuitBreaker()
    generator = make(breaker, decorate=decorate)
    generator.next()
    error = ValueError()
    assert generator.throw(error) is error
    assert generator.send("on") == "on"
    assert breaker.fail_counter == 0


def test_what_is_thrown_and_not_caught_comes_back_and_counts(make, decorate):
    """The breaker takes such an exception for one that the generator raised."""
    breaker = CircuitBreaker()
    generator = make(breaker, decorate=decorate)
    generator.next()
    error = KeyError()
    with pytest.raises(KeyError) as caught:
        generator.throw(error)
    assert caught.value is error
    assert breaker.fail_counter == 1
    with pytest.raises(make.end):
        generator.next()
    assert breaker.fail_counter == 1


def test_the_return_value_passes_through():
    """`yield from` gets the value, and so does code that looks at StopIteration."""

    @CircuitBreaker()
    def guarded():
        yield 1
        return "returned"

    def outer():
        return (yield from guarded())

    for generator in guarded(), outer():
        assert next(generator) == 1
        with pytest.raises(StopIteration) as caught:
            next(generator)
        assert caught.value.value == "returned"


def test_a_generator_that_yields_nothing_returns_its_value():
    """The generator ends with its first step, which is a success."""

    @CircuitBreaker()
    def guarded():
        return "returned"
        yield

    with pytest.raises(StopIteration) as caught:
        next(guarded())
    assert caught.value.value == "returned"


def test_an_ended_generator_stays_ended(make, recorder):
    """Running an ended generator again admits nothing and settles nothing."""
    breaker = CircuitBreaker(listeners=[recorder])
    generator = make(breaker)
    generator.next()
    with pytest.raises(make.end):
        generator.send("stop")
    with pytest.raises(make.end):
        generator.next()
    generator.close()
    assert recorder.names == ["before_call", "success"]


def test_a_guarded_generator_can_be_iterated():
    """A `for` loop gets all items, and so does an `async for` loop."""
    breaker = CircuitBreaker()

    @breaker
    def numbers():
        yield from range(3)

    @breaker
    async def async_numbers():
        for number in range(3):
            yield number

    async def collect():
        return [number async for number in async_numbers()]

    assert list(numbers()) == [0, 1, 2]
    assert drive(collect()) == [0, 1, 2]


# Admitted when first run, settled when it ends.


def test_making_a_generator_admits_nothing(make, decorate, recorder):
    """In a half-open circuit no place is taken, and listeners hear nothing."""
    breaker = CircuitBreaker()
    breaker.half_open()
    breaker.add_listener(recorder)
    generator = make(breaker, decorate=decorate)
    assert breaker.retry_after == 0.0
    generator.close()
    assert recorder.events == []
    assert breaker.current_state == "half-open"


def test_a_generator_that_is_dropped_before_it_runs_decides_nothing(make, recorder):
    """A generator that never ran was no call."""
    breaker = CircuitBreaker(listeners=[recorder])
    make(breaker)
    gc.collect()
    assert recorder.events == []


def test_throwing_into_a_generator_that_has_not_run_decides_nothing(make, recorder):
    """The function never ran, so there was no call."""
    breaker = CircuitBreaker(listeners=[recorder])
    generator = make(breaker)
    with pytest.raises(KeyError):
        generator.throw(KeyError())
    assert recorder.events == []
    assert breaker.fail_counter == 0


def test_the_rejection_comes_from_the_first_next(make, decorate):
    """The call that makes the generator works, whatever the circuit says."""
    breaker = CircuitBreaker()
    breaker.open()
    generator = make(breaker, decorate=decorate)
    with pytest.raises(CircuitBreakerError):
        generator.next()
    assert not hasattr(generator, "closed")  # it did not run
    with pytest.raises(make.end):
        generator.next()


def test_what_the_circuit_says_at_the_first_next_decides(make, decorate):
    """A generator that was made while the circuit was open may run later."""
    breaker = CircuitBreaker()
    breaker.open()
    generator = make(breaker, decorate=decorate)
    breaker.close()
    assert generator.next() == "first"


def test_a_generator_goes_on_after_the_circuit_has_opened(make):
    """The generator was admitted once, for all its steps; its outcome is late."""
    breaker = CircuitBreaker(fail_max=1)
    generator = make(breaker)
    generator.next()
    breaker.open()
    assert generator.send("on") == "on"
    with pytest.raises(KeyError):
        generator.throw(KeyError())
    assert breaker.fail_counter == 0


def test_a_generator_settles_when_it_ends_and_not_before(make, decorate, recorder):
    """A trial holds its place through all its steps."""
    breaker = CircuitBreaker(reset_timeout=60)
    breaker.half_open()
    breaker.add_listener(recorder)
    generator = make(breaker, decorate=decorate)
    generator.next()
    generator.send("second")
    assert recorder.names == ["before_call"]
    assert rejects(breaker)
    with pytest.raises(make.end):
        generator.send("stop")
    assert recorder.names == ["before_call", "state_change", "success"]
    assert breaker.current_state == "closed"


def test_a_generator_that_fails_between_two_items_opens_the_circuit(make, clock):
    """The trip is raised from what the generator raised, to the code that ran it."""
    breaker = CircuitBreaker(fail_max=1)
    generator = make(breaker)
    generator.next()
    error = KeyError()
    with pytest.raises(CircuitBreakerError) as caught:
        generator.throw(error)
    assert caught.value.__cause__ is error
    assert breaker.current_state == "open"


@pytest.mark.parametrize("kind", ["generator", "async generator"])
def test_wrong_arguments_are_a_failure_of_the_first_step(kind):
    """The function is called when the generator first runs, and a trial ends with
    that."""
    breaker = CircuitBreaker()

    @breaker
    def guarded(a):
        yield a

    @breaker
    async def guarded_async(a):
        yield a

    def first_step():
        if kind == "generator":
            next(guarded())
        else:
            drive(guarded_async().__anext__())

    with pytest.raises(TypeError):
        first_step()
    assert breaker.fail_counter == 1
    breaker.half_open()
    with pytest.raises(CircuitBreakerError) as raised:
        first_step()
    assert isinstance(raised.value.__cause__, TypeError)
    breaker.half_open()
    assert breaker.retry_after == 0.0


# Closing early.


def test_closing_a_generator_that_has_yielded_is_a_success(make, decorate, recorder):
    """A reader that stops has got what it wanted; the generator cleans up first."""
    breaker = CircuitBreaker(listeners=[recorder])
    breaker.half_open()
    recorder.events.clear()
    generator = make(breaker, decorate=decorate)
    generator.next()
    generator.close()
    assert generator.closed
    assert recorder.names == ["before_call", "state_change", "success"]
    assert breaker.current_state == "closed"


def test_dropping_a_generator_that_has_yielded_is_a_success(recorder):
    """A `for` loop that breaks out drops its generator."""
    breaker = CircuitBreaker(listeners=[recorder])

    @breaker
    def numbers():
        yield from range(3)

    for _ in numbers():
        break
    gc.collect()
    assert recorder.names == ["before_call", "success"]


def test_leaving_an_async_generator_to_the_event_loop_is_a_success(recorder):
    """The loop closes a generator that was not read to its end, and awaits its
    clean-up."""
    breaker = CircuitBreaker(listeners=[recorder])
    complaints, kept, cleaned = [], [], []

    @breaker
    async def numbers():
        try:
            yield 1
            yield 2
        finally:
            await asyncio.sleep(0)
            cleaned.append(True)

    async def main():
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: complaints.append(context))
        for _ in range(2):
            generator = numbers()
            kept.append(generator)
            assert await generator.__anext__() == 1

    asyncio.run(main())
    assert cleaned == [True, True]
    assert complaints == []
    assert recorder.names == ["before_call"] * 2 + ["success"] * 2


def test_an_async_generator_that_the_collector_finds_is_left_to_the_event_loop():
    """What the generator awaits while cleaning up is awaited, as without a breaker."""
    complaints, cleaned, outcomes = [], [], []

    class Notes(CircuitBreakerListener):  # keeps no argument of an event alive
        def success(self, cb):
            outcomes.append("success")

    breaker = CircuitBreaker(listeners=[Notes()])

    @breaker
    async def numbers(holder):
        try:
            yield 1
        finally:
            await asyncio.sleep(0)
            cleaned.append(True)

    async def main():
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: complaints.append(context))
        holder = []
        generator = numbers(holder)
        holder.append(generator)
        assert await generator.__anext__() == 1
        del generator, holder
        for _ in range(5):
            gc.collect()
            await asyncio.sleep(0)
        assert cleaned == [True]

    asyncio.run(main())
    assert complaints == []
    assert outcomes == ["success"]


def test_an_async_generator_that_ignores_its_closing_may_be_given_up_later():
    """The generator's own GeneratorExit ends it later, which is no closing."""
    breaker = CircuitBreaker()
    breaker.half_open()

    @breaker
    async def guarded():
        with contextlib.suppress(GeneratorExit):
            yield 1
        yield 2
        raise GeneratorExit

    generator = guarded()
    drive(generator.__anext__())
    assert drive(generator.athrow(GeneratorExit())) == 2
    with pytest.raises(GeneratorExit):
        drive(generator.__anext__())
    assert breaker.current_state == "half-open"
    assert breaker.retry_after == 0


def test_an_async_generator_may_be_collected_before_its_guard():
    """There is no event loop here. In a cycle the older generator is closed first, and
    a generator that is closed already would answer its guard with None."""
    breaker = CircuitBreaker()
    breaker.half_open()
    closed, cycle = [], []

    async def numbers(cycle):
        try:
            yield 1
        finally:
            closed.append(True)

    made = numbers(cycle)
    guarded = breaker.call(lambda made=made: made)
    assert drive(guarded.__anext__()) == 1
    cycle += [guarded, made]
    del guarded, made, cycle
    for _ in range(3):
        gc.collect()
    assert closed == [True]
    assert breaker.current_state == "closed"


def test_a_generator_that_was_closed_before_it_yielded_is_abandoned(recorder):
    """The generator has yielded nothing, so the call tells nothing about the service,
    and a trial gives its place back."""
    breaker = CircuitBreaker()
    breaker.half_open()
    breaker.add_listener(recorder)

    @types.coroutine
    def wait():
        yield

    @breaker
    async def guarded():
        await wait()
        yield 1

    step = guarded().__anext__()
    step.send(None)  # the generator awaits something
    with pytest.raises(GeneratorExit):
        step.throw(GeneratorExit())
    assert recorder.names == ["before_call"]
    assert breaker.current_state == "half-open"
    assert not rejects(breaker)


def test_a_generator_exit_before_the_first_item_is_abandoned(recorder):
    """The generator raised GeneratorExit itself: a generator that runs cannot be
    closed."""
    breaker = CircuitBreaker(listeners=[recorder])

    @breaker
    def guarded():
        raise GeneratorExit
        yield

    with pytest.raises(GeneratorExit):
        next(guarded())
    assert recorder.names == ["before_call"]


def make_stubborn(breaker, on_close):
    """A generator of each kind that does as `on_close` does when it is closed."""

    @breaker
    def stubborn():
        try:
            yield 1
        except GeneratorExit:
            on_close()

    @breaker
    async def async_stubborn():
        try:
            yield 1
        except GeneratorExit:
            on_close()

    return stubborn(), async_stubborn()


def close_both(generator, async_generator, expected):
    next(generator)
    drive(async_generator.__anext__())
    with expected:
        generator.close()
    with expected:
        drive(async_generator.aclose())


def test_a_generator_may_return_when_it_is_closed(recorder):
    """The closing is a success even if the generator does not raise GeneratorExit."""
    breaker = CircuitBreaker(listeners=[recorder])
    close_both(*make_stubborn(breaker, lambda: None), contextlib.nullcontext())
    assert recorder.names == ["before_call"] * 2 + ["success"] * 2


def test_a_generator_that_fails_to_clean_up_is_a_failure(fail, boom):
    """What the generator raises while it is closed counts, and reaches the code that
    closes it."""
    breaker = CircuitBreaker()
    close_both(*make_stubborn(breaker, fail), pytest.raises(boom))
    assert breaker.fail_counter == 2


def test_an_interrupted_generator_is_abandoned_even_after_it_has_yielded(
    make, recorder
):
    """Only closing is a success; KeyboardInterrupt does not close a generator."""
    breaker = CircuitBreaker(listeners=[recorder])
    generator = make(breaker)
    generator.next()
    with pytest.raises(KeyboardInterrupt):
        generator.throw(KeyboardInterrupt())
    assert recorder.names == ["before_call"]


def test_a_generator_that_exits_though_nobody_closed_it_is_abandoned(recorder, boom):
    """A generator's own GeneratorExit is no closing, even after the first item."""
    breaker = CircuitBreaker(listeners=[recorder])

    @breaker
    def guarded():
        try:
            yield 1
        except boom:
            raise GeneratorExit from None

    @breaker
    async def async_guarded():
        try:
            yield 1
        except boom:
            raise GeneratorExit from None

    generator, async_generator = guarded(), async_guarded()
    next(generator)
    drive(async_generator.__anext__())
    with pytest.raises(GeneratorExit):
        generator.throw(boom())
    with pytest.raises(GeneratorExit):
        drive(async_generator.athrow(boom()))
    assert recorder.names == ["before_call"] * 2


def test_a_generator_that_refuses_to_be_closed_is_a_failure(recorder):
    """Python raises RuntimeError, as it does for "yield from" as well."""
    breaker = CircuitBreaker(listeners=[recorder])

    @breaker
    def guarded():
        with contextlib.suppress(GeneratorExit):
            yield 1
        yield 2

    generator = guarded()
    next(generator)
    with pytest.raises(RuntimeError, match="ignored GeneratorExit"):
        generator.close()
    assert recorder.names == ["before_call", "failure"]
    with pytest.raises(StopIteration):
        next(generator)
    assert recorder.names == ["before_call", "failure"]


def test_an_async_generator_that_refuses_to_be_closed_is_no_success(recorder):
    """There is no failure either: the async generator has not ended yet."""
    breaker = CircuitBreaker(listeners=[recorder])

    @breaker
    async def guarded():
        with contextlib.suppress(GeneratorExit):
            yield 1
        yield 2

    generator = guarded()
    drive(generator.__anext__())
    with pytest.raises(RuntimeError, match="ignored GeneratorExit"):
        drive(generator.aclose())
    assert recorder.names == ["before_call"]
    with pytest.raises(StopAsyncIteration):
        drive(generator.__anext__())
    assert recorder.names == ["before_call", "success"]


# @contextmanager over @breaker.


class Connection:
    """A context manager of either kind over a guarded generator. It remembers
    what it did, and swallows a ValueError."""

    def __init__(self, breaker, kind):
        self.kind, self.log = kind, []
        if kind == "contextmanager":

            @contextlib.contextmanager
            @breaker
            def connect():
                self.log.append("connected")
                try:
                    yield "connection"
                except ValueError:
                    self.log.append("swallowed")
                finally:
                    self.log.append("disconnected")

            self.connect = connect
        else:

            @contextlib.asynccontextmanager
            @breaker
            async def connect():
                self.log.append("connected")
                try:
                    yield "connection"
                except ValueError:
                    self.log.append("swallowed")
                finally:
                    self.log.append("disconnected")

            self.connect = connect

    def run(self, body):
        """Runs `body` with a connection."""

        def sync_caller():
            with self.connect() as connection:
                return body(connection)

        async def caller():
            async with self.connect() as connection:
                return body(connection)

        return sync_caller() if self.kind == "contextmanager" else drive(caller())


@pytest.fixture(params=["contextmanager", "asynccontextmanager"])
def connect_to(request):
    return lambda breaker: Connection(breaker, request.param)


def test_the_body_of_a_guarded_context_manager_is_part_of_the_call(
    connect_to, recorder
):
    """The body gets what the generator yielded; the call ends after the clean-up."""
    breaker = CircuitBreaker(listeners=[recorder])
    connection = connect_to(breaker)
    told = connection.run(lambda given: (given, list(recorder.names)))
    assert told == ("connection", ["before_call"])
    assert connection.log == ["connected", "disconnected"]
    assert recorder.names == ["before_call", "success"]


def test_what_the_body_raises_counts(connect_to, fail, boom):
    """The generator has the exception thrown into it, and lets the exception
    through."""
    breaker = CircuitBreaker()
    connection = connect_to(breaker)
    with pytest.raises(boom):
        connection.run(fail)
    assert connection.log == ["connected", "disconnected"]
    assert breaker.fail_counter == 1


def test_what_the_context_manager_swallows_does_not_count(connect_to, recorder):
    """The generator decides what is a failure of its body."""
    breaker = CircuitBreaker(listeners=[recorder])
    connection = connect_to(breaker)

    def body(given):
        raise ValueError

    assert connection.run(body) is None
    assert connection.log == ["connected", "swallowed", "disconnected"]
    assert recorder.names == ["before_call", "success"]


def test_where_the_circuit_is_open_the_body_does_not_run(connect_to):
    """The rejection comes from entering the context manager."""
    breaker = CircuitBreaker()
    breaker.open()
    connection, bodies = connect_to(breaker), []
    with pytest.raises(CircuitBreakerError):
        connection.run(bodies.append)
    assert connection.log == bodies == []


def test_calls_in_the_body_of_a_guarded_context_manager_belong_to_its_trial(
    connect_to, fail, boom
):
    """The generator is suspended meanwhile, but its call still runs."""
    breaker = CircuitBreaker()
    breaker.half_open()

    def body(given):
        with pytest.raises(boom):
            breaker.call(fail)
        assert breaker.current_state == "half-open"
        assert rejects(breaker)
        return breaker.call(lambda: "inner")

    assert connect_to(breaker).run(body) == "inner"
    assert breaker.current_state == "closed"


def test_a_stop_iteration_in_the_body_reaches_the_caller(connect_to):
    """contextlib undoes what Python makes of a StopIteration in a generator."""
    breaker = CircuitBreaker()
    error = StopIteration()

    def body(given):
        raise error

    # A coroutine cannot raise one, so its caller sees what Python makes of it.
    with pytest.raises((StopIteration, RuntimeError)) as caught:
        connect_to(breaker).run(body)
    assert error in (caught.value, caught.value.__cause__)
    assert breaker.fail_counter == 1


# Blocks.


def test_calling_alone_admits_nothing(recorder):
    """The block is admitted when it is entered."""
    breaker = CircuitBreaker(listeners=[recorder])
    breaker.half_open()
    recorder.events.clear()
    block = breaker.calling()
    assert recorder.events == []
    assert breaker.retry_after == 0.0
    with block:
        assert recorder.names == ["before_call"]


def test_listeners_get_calling_as_the_function(recorder):
    """A block has no function of its own, and no arguments."""
    breaker = CircuitBreaker(listeners=[recorder])

    async def caller():
        async with breaker.calling():
            pass

    with breaker.calling():
        pass
    drive(caller())
    before_call = ("before_call", breaker.calling, (), {})
    assert recorder.events == [before_call, ("success",)] * 2


def test_a_block_swallows_nothing(boom):
    """The block's exception leaves the block."""
    breaker = CircuitBreaker()
    error = boom()
    with pytest.raises(boom) as caught, breaker.calling():
        raise error
    assert caught.value is error


@pytest.mark.parametrize("first", ["with", "async with"])
@pytest.mark.parametrize("second", ["with", "async with"])
def test_each_block_is_for_one_use(first, second, recorder):
    """Using a block a second time is a mistake in the program, and no call."""
    breaker = CircuitBreaker(listeners=[recorder])
    block = breaker.calling()

    async def use(spelling):
        if spelling == "with":
            with block:
                pass
        else:
            async with block:
                pass

    drive(use(first))
    with pytest.raises(RuntimeError, match="one block"):
        drive(use(second))
    assert recorder.names == ["before_call", "success"]


def test_a_block_cannot_be_entered_again_while_it_runs(recorder):
    """The attempt does not disturb the first use."""
    breaker = CircuitBreaker(listeners=[recorder])
    with breaker.calling() as nothing:
        assert nothing is None
    block = breaker.calling()
    with block, pytest.raises(RuntimeError):
        block.__enter__()
    assert recorder.names == ["before_call", "success"] * 2


ENTER = {
    "with": lambda block: block.__enter__(),
    "async with": lambda block: drive(block.__aenter__()),
}
LEAVE = {
    "with": lambda block, exc=None: block.__exit__(type(exc), exc, None),
    "async with": lambda block, exc=None: drive(block.__aexit__(type(exc), exc, None)),
}
with_each = pytest.mark.parametrize("spelling", ["with", "async with"])


@with_each
def test_a_rejected_block_is_used_up(spelling):
    """The block was for the one call that was rejected."""
    breaker = CircuitBreaker()
    breaker.open()
    block = breaker.calling()
    with pytest.raises(CircuitBreakerError):
        ENTER[spelling](block)
    breaker.close()
    with pytest.raises(RuntimeError):
        ENTER[spelling](block)


def test_a_block_that_waits_for_its_trial_cannot_be_entered_again():
    """A block is used up before the storage has answered."""

    class Slow(CircuitMemoryStorage):
        @types.coroutine
        def claim_trial_async(self, timeout):
            yield
            return True

    breaker = CircuitBreaker(state_storage=Slow("half-open"))
    block = breaker.calling()
    entering = block.__aenter__()
    entering.send(None)
    with pytest.raises(RuntimeError, match="one block"):
        drive(block.__aenter__())
    with pytest.raises(StopIteration):
        entering.send(None)
    LEAVE["async with"](block)
    assert breaker.current_state == "closed"


@pytest.mark.parametrize("entered", [True, False])
def test_a_block_is_left_as_often_as_it_was_entered(entered, recorder):
    """Leaving a block once more is a mistake in the program that settles nothing."""
    breaker = CircuitBreaker(listeners=[recorder])
    block = breaker.calling()
    if entered:
        with block:
            pass
    with pytest.raises(RuntimeError):
        block.__exit__(None, None, None)
    with pytest.raises(RuntimeError):
        drive(block.__aexit__(None, None, None))
    assert recorder.names == ["before_call", "success"] * entered


@pytest.mark.parametrize("first", LEAVE)
@pytest.mark.parametrize("second", LEAVE)
def test_a_block_that_is_being_left_cannot_be_left_once_more(first, second, recorder):
    """A listener that is told how the block ended cannot leave the block either."""
    errors = []

    class Meddler(CircuitBreakerListener):
        def success(self, cb):
            try:
                LEAVE[second](block)
            except RuntimeError as exc:
                errors.append(exc)

    breaker = CircuitBreaker(listeners=[Meddler(), recorder])
    block = breaker.calling()
    ENTER[first](block)
    LEAVE[first](block)
    assert len(errors) == 1
    assert recorder.names == ["before_call", "success"]


@with_each
def test_a_block_that_has_opened_the_circuit_cannot_be_left_once_more(
    spelling, boom, recorder
):
    """The failure of the block was told and counted once."""
    breaker = CircuitBreaker(fail_max=1, listeners=[recorder])
    block = breaker.calling()
    ENTER[spelling](block)
    with pytest.raises(CircuitBreakerError):
        LEAVE[spelling](block, boom())
    with pytest.raises(RuntimeError):
        LEAVE[spelling](block, boom())
    assert recorder.names == ["before_call", "failure", "state_change"]


def test_only_one_of_many_threads_may_enter_a_block(recorder):
    """Of many threads that try at once, one enters the block."""
    breaker = CircuitBreaker(listeners=[recorder])
    block = breaker.calling()
    start = threading.Barrier(8)
    refused = []

    def enter():
        start.wait(PATIENCE)
        try:
            block.__enter__()
        except RuntimeError as exc:
            refused.append(exc)

    run_in_threads(*[enter] * 8)
    assert len(refused) == 7
    assert recorder.names == ["before_call"]


def run_in_threads(*functions):
    """Runs each function in a thread of its own; what a function raises fails the
    test."""
    errors = []

    def run(function):
        try:
            function()
        except BaseException as exc:
            errors.append(exc)

    threads = [
        threading.Thread(target=run, args=[function], daemon=True)
        for function in functions
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()
    assert errors == []


def in_this_context(func, *args):
    return func(*args)


def in_another_context(func, *args):
    return elsewhere(func, *args)


def in_another_thread(func, *args):
    run_in_threads(lambda: func(*args))


places = pytest.mark.parametrize(
    "leave_in",
    [in_this_context, in_another_context, in_another_thread],
    ids=lambda place: place.__name__,
)


@places
@pytest.mark.parametrize("error", [None, KeyError(), KeyboardInterrupt()], ids=repr)
def test_a_block_may_be_left_wherever_it_suits(leave_in, error, clock):
    """The outcome of the block counts, and a trial gives its place back."""
    breaker = CircuitBreaker(success_threshold=2, throw_new_error_on_trip=False)
    breaker.half_open()
    block = breaker.calling()
    elsewhere(block.__enter__)
    assert rejects(breaker)

    def leave():
        with contextlib.suppress(KeyError):
            block.__exit__(error and type(error), error, None)

    leave_in(leave)
    if isinstance(error, KeyError):
        assert breaker.current_state == "open"
    else:
        assert breaker.current_state == "half-open"
        assert breaker.success_counter == (error is None)
        assert not rejects(breaker)


@places
def test_once_a_block_was_left_nothing_belongs_to_it(leave_in, clock):
    """Nothing belongs to the block even in the context where it was entered, although
    it was left in another."""
    breaker = CircuitBreaker(success_threshold=2)
    breaker.half_open()
    block, next_block = breaker.calling(), breaker.calling()
    block.__enter__()
    assert breaker.call(int) == 0
    leave_in(block.__exit__, None, None, None)
    elsewhere(next_block.__enter__)
    with pytest.raises(CircuitBreakerError):
        breaker.call(int)


def test_a_block_entered_in_one_context_covers_no_calls_in_another(clock):
    """Calls belong in the context where the block was entered, and in its copies."""
    breaker = CircuitBreaker()
    breaker.half_open()
    block = breaker.calling()
    context = contextvars.Context()
    context.run(block.__enter__)
    with pytest.raises(CircuitBreakerError):
        breaker.call(int)
    assert context.run(breaker.call, int) == 0
    assert context.copy().run(breaker.call, int) == 0
    block.__exit__(None, None, None)
    assert breaker.current_state == "closed"


def test_a_block_that_is_left_elsewhere_covers_no_calls_there(clock):
    """The block belongs to the context where it was entered, until it ends."""
    breaker = CircuitBreaker()
    breaker.half_open()
    block = breaker.calling()
    elsewhere(block.__enter__)
    entered = threading.Event()

    def stranger():
        with pytest.raises(CircuitBreakerError):
            breaker.call(int)
        block.__exit__(None, None, None)
        assert breaker.call(int) == 0
        entered.set()

    run_in_threads(stranger)
    assert entered.is_set()


# Blocks around yield: fixtures, and the dependencies of web frameworks.


def fixture(breaker):
    with breaker.calling():
        yield "resource"


async def async_fixture(breaker):
    async with breaker.calling():
        yield "resource"


async def mixed_fixture(breaker):
    with breaker.calling():
        yield "resource"


def step(generator):
    """The next item of a generator of either kind, or "end" where there is none."""
    if hasattr(generator, "__anext__"):

        async def anext_or_end():
            try:
                return await generator.__anext__()
            except StopAsyncIteration:
                return "end"

        return drive(anext_or_end())
    return next(generator, "end")


def throw(generator, exc):
    if hasattr(generator, "athrow"):
        return drive(generator.athrow(exc))
    return generator.throw(exc)


every_fixture = pytest.mark.parametrize(
    "make_fixture",
    [fixture, async_fixture, mixed_fixture],
    ids=lambda kind: kind.__name__,
)


@every_fixture
@places
def test_a_block_around_yield_may_be_entered_and_left_anywhere(
    make_fixture, leave_in, clock
):
    """A framework sets up in one thread or context and tears down in another."""
    breaker = CircuitBreaker()
    breaker.half_open()
    generator = make_fixture(breaker)
    steps = []
    in_another_thread(lambda: steps.append(step(generator)))
    assert rejects(breaker)
    leave_in(lambda: steps.append(step(generator)))
    assert steps == ["resource", "end"]
    assert breaker.current_state == "closed"


@every_fixture
@places
def test_what_is_thrown_into_a_block_around_yield_counts(make_fixture, leave_in):
    """The framework hands on what the code in between raised."""
    breaker = CircuitBreaker(fail_max=1)
    generator = make_fixture(breaker)
    in_another_thread(step, generator)
    error = KeyError()

    def tear_down():
        with pytest.raises(CircuitBreakerError) as caught:
            throw(generator, error)
        assert caught.value.__cause__ is error

    leave_in(tear_down)
    assert breaker.current_state == "open"


@every_fixture
def test_closing_a_block_around_yield_abandons_it(make_fixture, recorder):
    """A GeneratorExit that leaves a block abandons the call."""
    breaker = CircuitBreaker(listeners=[recorder])
    generator = make_fixture(breaker)
    step(generator)
    if hasattr(generator, "aclose"):
        drive(generator.aclose())
    else:
        generator.close()
    assert recorder.names == ["before_call"]


# Calls within the trial of a generator or a block.


def test_calls_inside_the_generator_belong_to_its_trial(clock):
    """A guarded generator may call what the same breaker guards."""
    breaker = CircuitBreaker()
    breaker.half_open()

    @breaker
    def guarded():
        yield breaker.call(lambda: "inner")
        yield breaker.call(lambda: "inner")

    assert list(guarded()) == ["inner", "inner"]
    assert breaker.current_state == "closed"


def test_calls_between_the_items_belong_to_the_trial(make, decorate, fail, boom, clock):
    """Calls in the context that first ran the generator belong, until the generator
    ends."""
    breaker = CircuitBreaker()
    breaker.half_open()
    generator = make(breaker, decorate=decorate)
    generator.next()
    assert breaker.call(int) == 0
    with pytest.raises(boom):
        breaker.call(fail)
    assert breaker.current_state == "half-open"
    assert rejects(breaker)
    with pytest.raises(make.end):
        generator.send("stop")
    assert breaker.current_state == "closed"


def test_a_guarded_generator_within_the_trial_of_another_belongs_to_it(make, clock):
    """Two generators side by side: only the first decides."""
    breaker = CircuitBreaker()
    breaker.half_open()
    outer, inner = make(breaker), make(breaker)
    outer.next()
    inner.next()
    with pytest.raises(KeyError):
        inner.throw(KeyError())
    assert breaker.current_state == "half-open"
    with pytest.raises(make.end):
        outer.send("stop")
    assert breaker.current_state == "closed"


def test_where_the_generator_was_first_run_is_what_counts(make, clock):
    """Calls in a context that only runs the generator on do not belong to it."""
    breaker = CircuitBreaker()
    breaker.half_open()
    generator = make(breaker)
    context = contextvars.Context()
    context.run(generator.next)
    assert generator.send("on") == "on"
    with pytest.raises(CircuitBreakerError):
        breaker.call(int)
    assert context.run(breaker.call, int) == 0


def test_two_half_open_breakers_may_be_in_each_others_trials(make, clock):
    """Other breakers' trials in between change nothing."""
    first, second = CircuitBreaker(), CircuitBreaker()
    first.half_open()
    second.half_open()
    generators = make(first), make(second)
    for generator in generators:
        generator.next()
    for breaker in first, second:
        assert breaker.call(int) == 0
        assert breaker.current_state == "half-open"
    for generator in generators:  # blocks could not end in this order
        with pytest.raises(make.end):
            generator.send("stop")
    assert first.current_state == second.current_state == "closed"


@pytest.mark.parametrize("way", ["call", "coroutine"])
def test_a_trial_that_a_storage_makes_of_another_breaker_changes_nothing(way):
    """The storage makes the other breaker's trial while it answers the claim. Calls
    within the breaker's own trial still belong to it."""
    other = CircuitBreaker()

    class Curious(CircuitMemoryStorage):
        def claim_trial(self, timeout):
            other.half_open()
            return other.call(lambda: True)

        async def claim_trial_async(self, timeout):
            return self.claim_trial(timeout)

    breaker = CircuitBreaker(state_storage=Curious("half-open"))

    async def nested():
        return breaker.call(lambda: "nested")

    if way == "call":
        assert breaker.call(lambda: breaker.call(lambda: "nested")) == "nested"
    else:
        assert drive(breaker.call_async(nested)) == "nested"
    assert breaker.current_state == other.current_state == "closed"


def begin_generator(breaker):
    generator = Sync(breaker)
    generator.next()
    return generator


def begin_async_generator(breaker):
    generator = Async(breaker)
    generator.next()
    return generator


def begin_block(breaker):
    block = breaker.calling()
    block.__enter__()
    return block


def begin_async_block(breaker):
    block = breaker.calling()
    drive(block.__aenter__())
    return block


every_beginning = pytest.mark.parametrize(
    "begin",
    [begin_generator, begin_async_generator, begin_block, begin_async_block],
    ids=lambda begin: begin.__name__,
)


@every_beginning
def test_a_trial_that_is_never_finished_holds_its_place_for_a_while(begin, clock):
    """A call in the trial's context belongs to it. Any other call is rejected until the
    timeout is over, and then takes the place."""
    breaker = CircuitBreaker(reset_timeout=60)
    breaker.half_open()
    unfinished = begin(breaker)
    clock.advance(59)
    assert breaker.call(int) == 0
    assert breaker.current_state == "half-open"
    assert rejects(breaker)
    clock.advance(1)
    assert elsewhere(breaker.call, int) == 0
    assert breaker.current_state == "closed"
    del unfinished


@every_beginning
def test_a_trial_that_is_never_finished_does_not_hold_its_own_context_for_ever(
    begin, clock, fail
):
    """After the timeout the next call takes the place over, in the trial's own context
    as well: else a program of one thread would never recover."""
    breaker = CircuitBreaker(reset_timeout=60)
    breaker.half_open()
    unfinished = begin(breaker)
    clock.advance(60)
    with pytest.raises(CircuitBreakerError, match="Trial call failed"):
        breaker.call(fail)
    assert breaker.current_state == "open"
    del unfinished


@every_beginning
def test_a_new_era_ends_what_belongs_to_a_trial_that_is_never_finished(begin):
    """Moving the circuit by hand ends what belongs to the trial."""
    breaker = CircuitBreaker()
    breaker.half_open()
    unfinished = begin(breaker)
    breaker.open()
    with pytest.raises(CircuitBreakerError):
        breaker.call(int)
    breaker.half_open()
    assert breaker.call(int) == 0
    assert breaker.current_state == "closed"
    del unfinished


@pytest.mark.parametrize(
    "begin", [begin_generator, begin_async_generator], ids=lambda begin: begin.__name__
)
def test_an_unfinished_generator_that_lost_its_place_gives_none_back(begin, clock):
    """Closing the generator late counts as a success, but another call holds the
    place."""
    breaker = CircuitBreaker(reset_timeout=60, success_threshold=3)
    breaker.half_open()
    unfinished = elsewhere(begin, breaker)
    clock.advance(60)
    taker = breaker.calling()
    elsewhere(taker.__enter__)
    unfinished.close()
    assert breaker.success_counter == 1
    assert rejects(breaker)
    taker.__exit__(None, None, None)
    assert not rejects(breaker)
