"""Calls that are cancelled, at every point where that can happen.

Coroutines and generators are driven by hand, one step at a time, so that "every
await" and "every yield" mean what they say. What is asked after each time: has
the breaker counted nothing, told nobody of an outcome, and is the place free?
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import types

import pytest
from internals import storage_of
from support import PATIENCE, every, let_go, pairwise

from pybreaker import CircuitBreaker, CircuitBreakerError, CircuitMemoryStorage


@types.coroutine
def pause():
    """Waits for nothing in particular; whoever drives it decides what comes."""
    yield


class Slow(CircuitMemoryStorage):
    """Grants one trial at a time, and takes two awaits to think about it."""

    def __init__(self, name="closed", wait=pause):
        super().__init__(name)
        self.wait = wait
        self.claimed = False

    def claim_trial(self, timeout):
        granted = not self.claimed
        self.claimed = True
        return granted

    async def claim_trial_async(self, timeout):
        await self.wait()
        await self.wait()
        return self.claim_trial(timeout)

    def release_trial(self):
        self.claimed = False


# Every way to guard work that waits: `way(breaker, work)` is a coroutine in
# which the coroutine function `work` runs once, guarded.


async def decorated(breaker, work):
    @breaker
    async def guarded():
        return await work()

    return await guarded()


async def decorated_with_parentheses(breaker, work):
    @breaker()
    async def guarded():
        return await work()

    return await guarded()


async def decorated_method(breaker, work):
    class Client:
        @breaker
        async def guarded(self):
            return await work()

    return await Client().guarded()


async def object_that_is_called(breaker, work):
    class Client:
        async def __call__(self):
            return await work()

    return await breaker.call(Client())


async def decorated_with_call_async(breaker, work):
    @breaker(__pybreaker_call_async=True)
    def guarded():
        return work()

    return await guarded()


async def decorated_iterable_coroutine(breaker, work):
    @breaker
    @types.coroutine
    def guarded():
        return (yield from work())

    return await guarded()


async def decorated_async_generator(breaker, work):
    @breaker
    async def guarded():
        yield await work()

    return [result async for result in guarded()][-1]


async def decorated_async_generator_between_items(breaker, work):
    @breaker
    async def guarded():
        yield
        yield await work()

    return [result async for result in guarded()][-1]


async def async_context_manager_over_it(breaker, work):
    @contextlib.asynccontextmanager
    @breaker
    async def guarded():
        yield

    async with guarded():
        return await work()


async def call(breaker, work):
    return await breaker.call(work)


async def call_of_a_lambda(breaker, work):
    return await breaker.call(lambda: work())


async def call_of_an_async_generator_function(breaker, work):
    async def guarded():
        yield await work()

    return [result async for result in breaker.call(guarded)][-1]


async def call_of_a_lambda_that_makes_an_async_generator(breaker, work):
    async def made():
        yield await work()

    return [result async for result in breaker.call(lambda: made())][-1]


async def call_async(breaker, work):
    return await breaker.call_async(work)


async def call_async_of_a_lambda(breaker, work):
    return await breaker.call_async(lambda: work())


class Awaitable:
    """One of a kind that no library of ours has heard of."""

    def __init__(self, work):
        self.work = work

    def __await__(self):
        return self.work().__await__()


async def call_async_of_an_awaitable(breaker, work):
    return await breaker.call_async(Awaitable, work)


async def block(breaker, work):
    with breaker.calling():
        return await work()


async def async_block(breaker, work):
    async with breaker.calling():
        return await work()


async def async_block_in_an_async_generator(breaker, work):
    async def guarded():
        async with breaker.calling():
            yield await work()

    return [result async for result in guarded()][-1]


async def call_async_of_a_task(breaker, work):
    return await breaker.call_async(lambda: asyncio.ensure_future(work()))


class Seen(CircuitBreaker):
    def call(self, func, *args, **kwargs):
        return super().call(func, *args, **kwargs)


async def decorated_by_a_subclass(breaker, work):
    breaker.__class__ = Seen
    return await decorated(breaker, work)


WAYS = [
    decorated,
    decorated_with_parentheses,
    decorated_method,
    object_that_is_called,
    decorated_with_call_async,
    decorated_iterable_coroutine,
    decorated_async_generator,
    decorated_async_generator_between_items,
    async_context_manager_over_it,
    call,
    call_of_a_lambda,
    call_of_an_async_generator_function,
    call_async,
    call_of_a_lambda_that_makes_an_async_generator,
    call_async_of_a_lambda,
    call_async_of_an_awaitable,
    block,
    async_block,
    async_block_in_an_async_generator,
    decorated_by_a_subclass,
]

# Code that cannot await admits these, so that the claim is asked in one go.
NOT_AWAITING = [
    block,
    call_of_a_lambda,
    call_of_a_lambda_that_makes_an_async_generator,
]

ERRORS = [asyncio.CancelledError, KeyboardInterrupt]

every_way = pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)


# Every situation in which a call may be: `situation(clock)` is a breaker.


def closed(clock, storage=None):
    breaker = CircuitBreaker(reset_timeout=10, state_storage=storage)
    breaker.fail_counter = 3
    return breaker


def half_open(clock, storage=None):
    breaker = closed(clock, storage)
    breaker.half_open()
    return breaker


def due(clock, storage=None):
    breaker = closed(clock, storage)
    breaker.open()
    clock.advance(10)
    return breaker


def half_open_with_a_slow_storage(clock):
    return half_open(clock, Slow())


def due_with_a_slow_storage(clock):
    return due(clock, Slow())


SITUATIONS = [
    closed,
    half_open,
    due,
    half_open_with_a_slow_storage,
    due_with_a_slow_storage,
]

every_situation = pytest.mark.parametrize(
    "situation", SITUATIONS, ids=lambda situation: situation.__name__
)


class Work:
    """Waits twice and takes a third wait to clean up. Counts how often it ran."""

    def __init__(self, wait=pause, cleanup=True):
        self.wait = wait
        self.cleanup = cleanup
        self.begun = 0

    async def __call__(self):
        self.begun += 1
        try:
            await self.wait()
            await self.wait()
        finally:
            if self.cleanup:
                await self.wait()


def finish(coroutine):
    """Drives it to its end; says after how many awaits that came."""
    awaits = 0
    while True:
        try:
            coroutine.send(None)
        except StopIteration:
            return awaits
        awaits += 1


def advance(coroutine, awaits):
    """Drives it to the await of that number."""
    for _ in range(awaits):
        coroutine.send(None)


def number_of_awaits(way, situation, clock, **options):
    return finish(way(situation(clock), Work(**options)))


def assert_nothing_was_decided(breaker, recorder, began_as):
    """No event of an outcome, no count, and the place is free: for this context
    too, to which nothing of the call that was cancelled clings."""
    assert set(recorder.names) <= {"before_call", "state_change"}
    assert recorder.transitions in ([], [("open", "half-open")])
    assert (breaker.current_state == began_as) == (recorder.transitions == [])
    assert breaker.fail_counter == 3
    assert breaker.success_counter == 0
    assert breaker.retry_after == 0.0
    assert getattr(storage_of(breaker), "claimed", False) is False
    assert breaker.call(lambda: "next") == "next"
    assert breaker.current_state == "closed"
    assert breaker.fail_counter == 0


# Coroutines and blocks: at every await.


@pairwise(way=WAYS, situation=SITUATIONS, error=ERRORS, times=[1, 2])
def test_a_call_that_is_cancelled_at_any_await_decides_nothing(
    way, situation, error, times, clock, recorder
):
    """While it asks for its trial, works, or cleans up; and cancelled again then."""
    total = number_of_awaits(way, situation, clock)
    slow = "slow" in situation.__name__ and way not in NOT_AWAITING
    assert total == (5 if slow else 3)
    for awaits in range(1, total + 1):
        breaker, work = situation(clock), Work()
        began_as = breaker.current_state
        recorder.events.clear()
        breaker.add_listener(recorder)
        coroutine = way(breaker, work)
        advance(coroutine, awaits)
        assert (breaker.retry_after > 0) == (situation is not closed)
        thrown = error()
        with pytest.raises(error) as raised:
            for _ in range(times):
                thrown = error()
                coroutine.throw(thrown)
            finish(coroutine)
        if times == 1:
            assert raised.value is thrown
        assert work.begun == recorder.names.count("before_call")
        assert work.begun == (not slow or awaits > 2)
        assert_nothing_was_decided(breaker, recorder, began_as)


# What is closed in the body of a context manager closes the generator under it,
# at its yield, and that is a success.
CLOSED = [way for way in WAYS if way is not async_context_manager_over_it]


@pytest.mark.parametrize("way", CLOSED, ids=lambda way: way.__name__)
@every_situation
def test_a_coroutine_that_is_closed_at_any_await_decides_nothing(
    way, situation, clock, recorder
):
    """An event loop that ends before its tasks closes their coroutines."""
    if sys.implementation.name == "pypy" and "slow" in situation.__name__:
        if "async_generator" in way.__name__:
            pytest.skip("PyPy leaves async generators that wait where they are")
    for awaits in range(1, number_of_awaits(way, situation, clock, cleanup=False) + 1):
        breaker = situation(clock)
        began_as = breaker.current_state
        recorder.events.clear()
        breaker.add_listener(recorder)
        coroutine = way(breaker, Work(cleanup=False))
        advance(coroutine, awaits)
        coroutine.close()
        del coroutine
        if "async_generator" in way.__name__:  # which ends when nobody holds it
            let_go()
        assert_nothing_was_decided(breaker, recorder, began_as)


@pairwise(way=WAYS, situation=SITUATIONS, how=["throw", "close"])
def test_a_call_that_is_cancelled_before_its_first_step_was_none(
    way, situation, how, clock, recorder
):
    """No place was taken, so that none has to come back."""
    breaker, work = situation(clock), Work()
    began_as = breaker.current_state
    breaker.add_listener(recorder)
    coroutine = way(breaker, work)
    if how == "close":
        coroutine.close()
    else:
        with pytest.raises(asyncio.CancelledError):
            coroutine.throw(asyncio.CancelledError())
    assert work.begun == 0
    assert recorder.events == []
    assert_nothing_was_decided(breaker, recorder, began_as)


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")
@pytest.mark.parametrize("how", ["throw", "close"])
@pytest.mark.parametrize("kind", ["coroutine", "generator", "async generator"])
@pytest.mark.parametrize("make", [half_open, due], ids=lambda make: make.__name__)
def test_a_trial_that_was_admitted_and_never_ran_gives_its_place_back_with_time(
    how, kind, make, clock, recorder
):
    """A plain function made it, so it was admitted at the call; what is closed
    before its first step runs none of its code, and the breaker hears of nothing."""

    async def coroutine():
        raise AssertionError("never runs")

    def generator():
        raise AssertionError("never runs")
        yield

    async def async_generator():
        raise AssertionError("never runs")
        yield

    func = {f.__name__.replace("_", " "): f for f in (coroutine, generator)}
    func["async generator"] = async_generator
    breaker = make(clock)
    breaker.add_listener(recorder)
    made = breaker.call(lambda: func[kind]())
    if kind == "async generator":
        made = made.aclose() if how == "close" else made.athrow(asyncio.CancelledError)
        with contextlib.suppress(StopIteration, asyncio.CancelledError):
            made.send(None)
    elif how == "close":
        made.close()
    else:
        with pytest.raises(asyncio.CancelledError):
            made.throw(asyncio.CancelledError())
    del made
    let_go()
    clock.advance(9)
    assert breaker.retry_after == 1.0
    clock.advance(1)
    assert_nothing_was_decided(breaker, recorder, make.__name__.replace("_", "-"))


@every_way
def test_a_call_within_a_trial_that_is_cancelled_leaves_the_trial_its_place(
    way, clock, recorder
):
    """The inner call has no place to give back, and the trial goes on to decide."""
    total = number_of_awaits(way, closed, clock)
    for awaits in range(1, total + 1):
        breaker = half_open(clock)
        trial = breaker.calling()
        trial.__enter__()
        breaker.add_listener(recorder)
        coroutine = way(breaker, Work())
        advance(coroutine, awaits)
        with pytest.raises(asyncio.CancelledError):
            coroutine.throw(asyncio.CancelledError())
            finish(coroutine)
        assert set(recorder.names) == {"before_call"}
        assert breaker.retry_after == 10
        assert breaker.call(int) == 0  # still within
        assert breaker.current_state == "half-open"
        trial.__exit__(None, None, None)
        assert breaker.current_state == "closed"
        recorder.events.clear()


@every_way
def test_a_trial_that_is_cancelled_when_it_has_lost_its_place_gives_none_back(
    way, clock, recorder
):
    """The place is somebody else's by then."""
    for awaits in range(1, number_of_awaits(way, half_open, clock) + 1):
        breaker = half_open(clock)
        coroutine = way(breaker, Work())
        advance(coroutine, awaits)
        clock.advance(10)
        other = breaker.calling()
        other.__enter__()
        with pytest.raises(asyncio.CancelledError):
            coroutine.throw(asyncio.CancelledError())
            finish(coroutine)
        assert breaker.retry_after == 10
        other.__exit__(None, None, None)
        assert breaker.current_state == "closed"


@pytest.mark.parametrize("move", ["open", "half_open", "close"])
@every_way
def test_a_call_that_is_cancelled_in_a_later_era_changes_nothing_in_it(
    way, move, clock, recorder
):
    """Not even what it would have counted as, had it ended in time."""
    for situation in (closed, half_open):
        breaker = situation(clock)
        coroutine = way(breaker, Work())
        advance(coroutine, 1)
        getattr(breaker, move)()
        before = breaker.snapshot()
        recorder.events.clear()
        breaker.add_listener(recorder)
        with pytest.raises(asyncio.CancelledError):
            coroutine.throw(asyncio.CancelledError())
            finish(coroutine)
        assert breaker.snapshot() == before
        assert recorder.events == []


# Tasks: cancelled after any number of the event loop's rounds.


async def one_round():
    await asyncio.sleep(0)


@pairwise(
    way=[*WAYS, call_async_of_a_task],
    situation=[closed, half_open, due],
    slow={"at once": False, "slow claim": True},
)
def test_a_task_that_is_cancelled_after_any_number_of_rounds_decides_nothing(
    way, situation, slow, clock, recorder
):
    """Before its first step, while it asks, works, and cleans up."""

    async def cancelled_after(rounds):
        breaker = situation(clock, Slow(wait=one_round) if slow else None)
        began_as = breaker.current_state
        recorder.events.clear()
        breaker.add_listener(recorder)
        task = asyncio.ensure_future(way(breaker, Work(one_round)))
        for _ in range(rounds):
            await one_round()
        if task.done():
            await task
            return False
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(task, PATIENCE)
        assert_nothing_was_decided(breaker, recorder, began_as)
        return True

    async def main():
        rounds = 0
        while await cancelled_after(rounds):
            rounds += 1
        return rounds

    assert asyncio.run(main()) >= 4


# Generators: at every yield, and async ones at every await between as well.

ITEMS = 3


def items(heard):
    """Yields; a KeyError is swallowed, everything else comes back."""
    for number in range(ITEMS):
        try:
            yield number
        except KeyError as exc:
            heard.append(exc)


async def async_items(heard):
    """The same, with an await before each item and one for cleaning up."""
    try:
        for number in range(ITEMS):
            await pause()
            try:
                yield number
            except KeyError as exc:
                heard.append(exc)
    finally:
        await pause()


class Generator:
    """Runs steps of a generator: each ends at a yield or at the end."""

    def __init__(self, breaker, decorate):
        self.heard = []
        self.made = breaker(items)(self.heard) if decorate else None
        self.made = self.made or breaker.call(items, self.heard)

    def next(self):
        next(self.made)

    def throw(self, exc):
        self.made.throw(exc)

    def close(self):
        self.made.close()

    end = StopIteration


class AsyncGenerator:
    def __init__(self, breaker, decorate):
        self.heard = []
        self.made = breaker(async_items)(self.heard) if decorate else None
        self.made = self.made or breaker.call(async_items, self.heard)

    def next(self):
        finish(self.made.__anext__())

    def throw(self, exc):
        finish(self.made.athrow(exc))

    def close(self):
        finish(self.made.aclose())

    end = StopAsyncIteration


GENERATORS = {
    "make": {"generator": Generator, "async generator": AsyncGenerator},
    "decorate": {"decorated": True, "called": False},
    "situation": SITUATIONS,
}
YIELDS = range(1, ITEMS + 1)


def begun(situation, clock, recorder, make, decorate, yields):
    """A breaker and a guarded generator that is at the yield of that number."""
    breaker = situation(clock)
    breaker.add_listener(recorder)
    generator = make(breaker, decorate)
    for _ in range(yields):
        generator.next()
    assert recorder.names[-1:] == (["before_call"] if yields else [])
    return breaker, generator


def assert_ended(generator):
    with pytest.raises(generator.end):
        generator.next()


@every(**GENERATORS, yields=YIELDS, error=ERRORS)
def test_a_generator_that_is_cancelled_at_any_yield_decides_nothing(
    make, decorate, situation, yields, error, clock, recorder
):
    """What is thrown in there and comes back out abandons the call."""
    began_as = situation(clock).current_state
    breaker, generator = begun(situation, clock, recorder, make, decorate, yields)
    with pytest.raises(error):
        generator.throw(error())
    assert_ended(generator)
    assert_nothing_was_decided(breaker, recorder, began_as)


@every(**GENERATORS, yields=YIELDS, how=["close", "throw"])
def test_a_generator_that_is_closed_at_any_yield_has_succeeded(
    make, decorate, situation, yields, how, clock, recorder
):
    """Closing a generator counts as a success, and in a trial closes the circuit."""
    breaker, generator = begun(situation, clock, recorder, make, decorate, yields)
    if how == "close":
        generator.close()
    else:
        with pytest.raises(GeneratorExit):
            generator.throw(GeneratorExit())
    assert_ended(generator)
    assert recorder.names[-1] == "success"
    assert recorder.names.count("success") == 1
    assert (breaker.current_state, breaker.fail_counter) == ("closed", 0)


@every(**GENERATORS, yields=YIELDS)
def test_a_failure_that_is_thrown_in_at_any_yield_counts_once(
    make, decorate, situation, yields, clock, recorder
):
    """What comes out of the generator is its failure, whoever threw it in."""
    breaker, generator = begun(situation, clock, recorder, make, decorate, yields)
    expected = ValueError if situation is closed else CircuitBreakerError
    with pytest.raises(expected):
        generator.throw(ValueError())
    assert_ended(generator)
    assert recorder.names.count("failure") == 1
    assert "success" not in recorder.names
    assert breaker.fail_counter == 4
    assert breaker.current_state == ("closed" if situation is closed else "open")
    assert getattr(storage_of(breaker), "claimed", False) is False


@every(**GENERATORS, yields=YIELDS)
def test_what_a_generator_swallows_at_any_yield_decides_nothing_yet(
    make, decorate, situation, yields, clock, recorder
):
    """The generator goes on, holds its place, and is settled when it ends."""
    breaker, generator = begun(situation, clock, recorder, make, decorate, yields)
    thrown = KeyError()
    with contextlib.suppress(generator.end):
        generator.throw(thrown)
        for _ in range(ITEMS - yields):
            assert recorder.names[-1] == "before_call"
            assert (breaker.retry_after > 0) == (situation is not closed)
            generator.next()
    assert generator.heard == [thrown]
    assert recorder.names[-1] == "success"
    assert recorder.names.count("success") == 1
    assert breaker.current_state == "closed"


@every(**GENERATORS, how=["close", "throw"])
def test_a_generator_that_is_cancelled_before_its_first_step_was_no_call(
    make, decorate, situation, how, clock, recorder
):
    """The generator was not admitted, so it holds no place."""
    began_as = situation(clock).current_state
    breaker, generator = begun(situation, clock, recorder, make, decorate, 0)
    if how == "close":
        generator.close()
    else:
        with pytest.raises(asyncio.CancelledError):
            generator.throw(asyncio.CancelledError())
    assert_ended(generator)
    assert recorder.events == []
    assert_nothing_was_decided(breaker, recorder, began_as)


def steps_of_an_async_generator(agen, stop, ending):
    """Drives it to its `stop`-th await and returns the coroutine that waits
    there, or None if there are fewer. It ends by itself, or with `ending` at its
    first yield."""
    awaits, steps = 0, [agen.__anext__]
    if ending == "aclose":
        steps.append(agen.aclose)
    elif ending == "athrow":
        steps.append(lambda: agen.athrow(ValueError()))
    else:
        steps += [agen.__anext__] * ITEMS
    for step in steps:
        waiting = step()
        while True:
            try:
                waiting.send(None)
            except (StopIteration, StopAsyncIteration, ValueError, CircuitBreakerError):
                break
            awaits += 1
            if awaits == stop:
                return waiting
    return None


@pairwise(
    decorate=GENERATORS["decorate"],
    situation=SITUATIONS,
    ending=["by itself", "aclose", "athrow"],
    error=ERRORS,
)
def test_an_async_generator_that_is_cancelled_at_any_await_decides_nothing(
    decorate, situation, ending, error, clock, recorder
):
    """Between any two items, while it asks for its trial, while it cleans up
    after its last item, after a failure, or because it is being closed."""
    stop = 0
    while True:
        stop += 1
        breaker = situation(clock)
        began_as = breaker.current_state
        recorder.events.clear()
        breaker.add_listener(recorder)
        agen = breaker(async_items)([]) if decorate else breaker.call(async_items, [])
        waiting = steps_of_an_async_generator(agen, stop, ending)
        if waiting is None:
            break
        assert (breaker.retry_after > 0) == (situation is not closed)
        with pytest.raises(error):
            waiting.throw(error())
            finish(waiting)  # what it has to clean up
        assert_nothing_was_decided(breaker, recorder, began_as)
    claims = 2 if "slow" in situation.__name__ else 0
    assert stop - 1 == claims + (ITEMS + 1 if ending == "by itself" else 2)


@every_situation
def test_a_failure_at_any_await_of_an_async_generator_counts_once(
    situation, clock, recorder
):
    """What it awaits may fail before the first item, between two, or at the end."""
    claims = 2 if "slow" in situation.__name__ else 0
    for stop in range(claims + 1, claims + ITEMS + 2):
        breaker = situation(clock)
        recorder.events.clear()
        breaker.add_listener(recorder)
        waiting = steps_of_an_async_generator(
            breaker(async_items)([]), stop, "by itself"
        )
        expected = ValueError if situation is closed else CircuitBreakerError
        with pytest.raises(expected):
            waiting.throw(ValueError())
            finish(waiting)
        assert recorder.names.count("failure") == 1
        assert "success" not in recorder.names
        assert breaker.fail_counter == 4
