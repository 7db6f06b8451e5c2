"""Coroutines, tasks and event loops: "Ways to guard" in the
specification, and "What happens to a call" for trials."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import inspect
import threading
import types

import pytest
from support import PATIENCE

from pybreaker import (
    CircuitBreaker,
    CircuitBreakerError,
    CircuitBreakerStorage,
    CircuitMemoryStorage,
)


def run(main):
    """Runs a coroutine function on an event loop; what hangs fails the test."""

    async def patiently():
        return await asyncio.wait_for(main(), PATIENCE)

    return asyncio.run(patiently())


async def pause():
    """Lets the other tasks run, once."""
    await asyncio.sleep(0)


def elsewhere(func, *args):
    """Calls the function in a context that has nothing to do with this one."""
    return contextvars.Context().run(func, *args)


# Every way to guard work that waits: `way(breaker, work)` is a coroutine in
# which the coroutine function `work` runs once, guarded.


async def decorated(breaker, work):
    @breaker
    async def guarded():
        return await work()

    return await guarded()


async def decorated_with_call_async(breaker, work):
    @breaker(__pybreaker_call_async=True)
    def guarded():
        return work()

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


async def decorated_iterable_coroutine(breaker, work):
    @breaker
    @types.coroutine
    def guarded():
        return (yield from work())

    return await guarded()


async def call(breaker, work):
    return await breaker.call(work)


async def call_of_a_lambda(breaker, work):
    return await breaker.call(lambda: work())


async def call_async(breaker, work):
    return await breaker.call_async(work)


async def call_async_of_a_task(breaker, work):
    return await breaker.call_async(lambda: asyncio.ensure_future(work()))


async def block(breaker, work):
    with breaker.calling():
        return await work()


async def async_block(breaker, work):
    async with breaker.calling():
        return await work()


class Seen(CircuitBreaker):
    def call(self, func, *args, **kwargs):
        return super().call(func, *args, **kwargs)


WAYS = [
    decorated,
    decorated_with_call_async,
    decorated_async_generator,
    decorated_async_generator_between_items,
    async_context_manager_over_it,
    decorated_iterable_coroutine,
    call,
    call_of_a_lambda,
    call_async,
    call_async_of_a_task,
    block,
    async_block,
]

every_way = pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)

# These ways are admitted by code that cannot await, and so cannot be cancelled there.
NOT_AWAITING = [block, decorated_iterable_coroutine, call_of_a_lambda]
every_way_that_awaits_its_admission = pytest.mark.parametrize(
    "way",
    [way for way in WAYS if way not in NOT_AWAITING],
    ids=lambda way: way.__name__,
)

# Whether a subclass has a say makes no difference to how a call goes.
every_breaker = pytest.mark.parametrize("make", [CircuitBreaker, Seen])


# Coroutine functions.


def test_a_coroutine_that_is_never_awaited_decides_nothing(recorder):
    """Making a coroutine is no call: no place is taken and no listener is told."""
    breaker = CircuitBreaker()
    breaker.half_open()
    breaker.add_listener(recorder)

    async def work():
        raise AssertionError("ran")

    for coroutine in breaker(work)(), breaker.call(work), breaker.call_async(work):
        assert inspect.iscoroutine(coroutine)
        assert breaker.retry_after == 0.0
        coroutine.close()
    assert recorder.events == []
    assert breaker.current_state == "half-open"


def test_a_task_that_is_cancelled_before_its_first_step_decides_nothing(recorder):
    """The call was never admitted."""
    breaker = CircuitBreaker()
    breaker.half_open()
    breaker.add_listener(recorder)

    async def main():
        task = asyncio.ensure_future(breaker(pause)())
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(main)
    assert recorder.events == []
    assert breaker.retry_after == 0.0


@pytest.mark.parametrize(
    "make",
    [
        lambda breaker, work: breaker(work)(),
        lambda breaker, work: breaker.call(work),
        lambda breaker, work: breaker.call_async(work),
    ],
    ids=["decorated", "call", "call_async"],
)
def test_a_coroutine_is_admitted_when_it_is_awaited(make):
    """The state of the circuit at the await decides, not the state before."""
    breaker = CircuitBreaker()
    ran = []

    async def work():
        ran.append(True)

    async def main():
        coroutine = make(breaker, work)
        breaker.open()
        with pytest.raises(CircuitBreakerError):
            await coroutine
        assert ran == []
        coroutine = make(breaker, work)
        breaker.close()
        await coroutine
        assert ran == [True]

    run(main)


@every_way
@every_breaker
def test_a_coroutine_settles_when_it_is_done(make, way, clock, recorder):
    """A trial holds its place through all its awaits."""
    breaker = make(reset_timeout=60)
    breaker.half_open()
    breaker.add_listener(recorder)

    async def main():
        go_on = asyncio.Event()

        async def work():
            await go_on.wait()
            return "result"

        task = asyncio.ensure_future(way(breaker, work))
        for _ in range(5):
            await pause()
        assert recorder.names == ["before_call"]
        assert breaker.current_state == "half-open"
        assert breaker.retry_after == 60
        with pytest.raises(CircuitBreakerError):
            await way(breaker, work)
        go_on.set()
        assert await task == "result"

    run(main)
    assert breaker.current_state == "closed"
    assert recorder.names == ["before_call", "state_change", "success"]


@every_way
@every_breaker
def test_what_a_coroutine_raises_after_an_await_is_counted(make, way, boom):
    """The failure that opens the circuit is raised to the code that awaits."""
    breaker = make(fail_max=2)

    async def work():
        await pause()
        raise boom

    async def main():
        with pytest.raises(boom):
            await way(breaker, work)
        assert breaker.fail_counter == 1
        with pytest.raises(CircuitBreakerError) as caught:
            await way(breaker, work)
        assert isinstance(caught.value.__cause__, boom)

    run(main)
    assert breaker.current_state == "open"


def test_call_async_returns_a_coroutine():
    """call_async is a coroutine function, so tasks can be made of its calls."""
    breaker = CircuitBreaker()
    assert inspect.iscoroutinefunction(breaker.call_async)

    async def work(a, *, b):
        await pause()
        return a, b

    async def main():
        return await asyncio.gather(
            *(asyncio.create_task(breaker.call_async(work, n, b="b")) for n in range(3))
        )

    assert run(main) == [(0, "b"), (1, "b"), (2, "b")]


# Cancellation.


@every_way
@every_breaker
@pytest.mark.parametrize("steps", range(1, 5))
def test_a_task_that_is_cancelled_at_any_await_is_abandoned(way, make, steps, recorder):
    """A cancelled call is no failure and no success; a cancelled trial gives its place
    back."""
    breaker = make()
    breaker.fail_counter = 3
    breaker.half_open()
    breaker.add_listener(recorder)
    reached = []

    async def work():
        for number in range(1, 5):
            reached.append(number)
            await pause()
        raise AssertionError("was not cancelled")

    async def main():
        task = asyncio.ensure_future(way(breaker, work))
        while len(reached) < steps:
            await pause()
        assert breaker.retry_after > 0
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(main)
    assert reached[-1] == steps
    assert recorder.names == ["before_call"]
    assert breaker.current_state == "half-open"
    assert breaker.fail_counter == 3
    assert breaker.retry_after == 0.0


@every_way
def test_a_call_that_is_cancelled_in_a_closed_circuit_leaves_the_count(way):
    """A cancellation tells nothing about the service, good or bad."""
    breaker = CircuitBreaker()
    breaker.fail_counter = 3

    async def main():
        started = asyncio.Event()

        async def work():
            started.set()
            await asyncio.Event().wait()

        task = asyncio.ensure_future(way(breaker, work))
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(main)
    assert breaker.fail_counter == 3
    assert breaker.current_state == "closed"


@pytest.mark.parametrize(
    "exc, state", [(None, "closed"), (TimeoutError, "open")], ids=["returns", "raises"]
)
def test_what_a_cancelled_function_makes_of_it_counts(exc, state):
    """A function that handles its cancellation has an outcome like any other."""
    breaker = CircuitBreaker(throw_new_error_on_trip=False)
    breaker.half_open()

    async def main():
        started = asyncio.Event()

        async def work():
            try:
                started.set()
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                if exc is not None:
                    raise exc from None

        task = asyncio.ensure_future(breaker(work)())
        await started.wait()
        task.cancel()
        with contextlib.suppress(TimeoutError):
            await task

    run(main)
    assert breaker.current_state == state


class SlowToGrant(CircuitMemoryStorage):
    """Takes for ever to grant a trial to a coroutine."""

    def __init__(self):
        super().__init__("half-open")
        self.asked = []
        self.released = 0

    async def claim_trial_async(self, timeout):
        self.asked.append(timeout)
        await asyncio.Event().wait()

    def release_trial(self):
        self.released += 1


@every_way_that_awaits_its_admission
def test_a_task_that_is_cancelled_while_the_storage_grants_its_trial_was_no_call(
    way, recorder
):
    """The place comes back, no listener was told, and the function did not run."""
    storage = SlowToGrant()
    breaker = CircuitBreaker(
        state_storage=storage, listeners=[recorder], reset_timeout=60
    )
    ran = []

    async def work():
        ran.append(True)

    async def main():
        task = asyncio.ensure_future(way(breaker, work))
        while not storage.asked:
            await pause()
        assert storage.asked == [60]
        assert breaker.retry_after > 0
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(main)
    assert ran == recorder.events == []
    assert breaker.retry_after == 0.0
    assert breaker.call(lambda: "next") == "next"
    assert storage.released == 1


def test_cancelling_one_of_many_tasks_leaves_the_others(recorder):
    """Each task's outcome is its own."""
    breaker = CircuitBreaker(listeners=[recorder])

    async def main():
        go_on = asyncio.Event()
        guarded = breaker(go_on.wait)
        tasks = [asyncio.ensure_future(guarded()) for _ in range(10)]
        await pause()
        for task in tasks[::2]:
            task.cancel()
        go_on.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert results[1::2] == [True] * 5

    run(main)
    assert recorder.names == ["before_call"] * 10 + ["success"] * 5


def test_a_timeout_around_the_guarded_code_does_not_count():
    """wait_for() cancels the call, and a cancelled call is abandoned."""
    breaker = CircuitBreaker(fail_max=1)

    async def main():
        loop = asyncio.get_running_loop()
        task = asyncio.ensure_future(breaker(asyncio.Event().wait)())
        await pause()
        # What a timeout does when its time has come, without the waiting.
        loop.call_soon(task.cancel)
        with pytest.raises(asyncio.CancelledError):
            await task

    run(main)
    assert breaker.fail_counter == 0


def test_a_timeout_inside_the_guarded_code_counts():
    """Inside, the slowness of the service raises an exception in the guarded code."""
    breaker = CircuitBreaker(fail_max=1)

    @breaker
    async def guarded():
        await asyncio.wait_for(asyncio.Event().wait(), 0)

    async def main():
        with pytest.raises(CircuitBreakerError) as caught:
            await guarded()
        assert isinstance(caught.value.__cause__, asyncio.TimeoutError)

    run(main)
    assert breaker.current_state == "open"


# What call_async awaits.


class Awaitable:
    """An awaitable object of some other library."""

    def __init__(self, result):
        self.result = result

    def __await__(self):
        yield from pause().__await__()
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


@types.coroutine
def old_coroutine(result):
    yield from pause()
    if isinstance(result, Exception):
        raise result
    return result


async def new_coroutine(result):
    await pause()
    if isinstance(result, Exception):
        raise result
    return result


def future(result):
    future = asyncio.get_running_loop().create_future()
    if isinstance(result, Exception):
        future.set_exception(result)
    else:
        future.set_result(result)
    return future


def task(result):
    return asyncio.ensure_future(new_coroutine(result))


@pytest.mark.parametrize(
    "make",
    [Awaitable, old_coroutine, new_coroutine, future, task],
    ids=lambda make: make.__name__,
)
@pytest.mark.parametrize("shape", [lambda f: f, functools.partial, "lambda"])
def test_call_async_awaits_whatever_can_be_awaited(make, shape, boom):
    """Futures, tasks and other libraries' awaitables, however they are made."""
    breaker = CircuitBreaker()
    func = (lambda *args: make(*args)) if shape == "lambda" else shape(make)
    error = boom()

    async def main():
        assert await breaker.call_async(func, "result") == "result"
        with pytest.raises(boom) as caught:
            await breaker.call_async(func, error)
        assert caught.value is error

    run(main)
    assert breaker.fail_counter == 1


def plain_generator():
    yield


async def plain_async_generator():
    yield


@pytest.mark.parametrize(
    "make",
    [object, plain_generator, plain_async_generator],
    ids=lambda make: make.__name__,
)
def test_call_async_returns_what_cannot_be_awaited_as_it_is(make, recorder):
    """The call ends when the function returns."""
    breaker = CircuitBreaker(listeners=[recorder])
    result = make()

    async def main():
        assert await breaker.call_async(lambda: result) is result

    run(main)
    assert recorder.names == ["before_call", "success"]


def test_call_async_returns_what_only_seems_to_be_awaitable():
    """Python looks for __await__ in the class, and a proxy has any attribute."""

    class Proxy:
        def __getattr__(self, name):
            return Proxy()

    result = Proxy()

    async def main():
        assert await CircuitBreaker().call_async(lambda: result) is result

    run(main)


def test_call_async_awaits_once():
    """What a coroutine returns is the result, even if that could be awaited."""
    breaker = CircuitBreaker()
    inner = Awaitable("never asked for")

    async def work():
        return inner

    async def main():
        assert await breaker.call_async(work) is inner
        assert await breaker.call(work) is inner

    run(main)


# Many tasks, many loops, many threads.


def test_guarded_tasks_do_not_wait_for_each_other():
    """Fifty tasks are in guarded calls at once: each task waits for the last one."""
    breaker = CircuitBreaker()
    number = 50

    async def main():
        everybody = asyncio.Event()
        arrived = []

        @breaker
        async def guarded():
            arrived.append(True)
            if len(arrived) == number:
                everybody.set()
            await everybody.wait()

        await asyncio.gather(*(guarded() for _ in range(number)))

    run(main)


def test_many_tasks_that_fail_at_once_open_the_circuit_once(recorder, boom):
    """There is one trip and one transition; a late task gets what the function
    raised."""
    breaker = CircuitBreaker(fail_max=3, listeners=[recorder])

    async def main():
        go_on = asyncio.Event()

        @breaker
        async def guarded():
            await go_on.wait()
            raise boom

        tasks = [asyncio.ensure_future(guarded()) for _ in range(20)]
        await pause()
        go_on.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    raised = [type(exc) for exc in run(main)]
    assert raised.count(CircuitBreakerError) == 1
    assert raised.count(boom) == 19
    assert breaker.fail_counter == 3
    assert recorder.transitions == [("closed", "open")]


@every_way
def test_of_many_tasks_after_the_timeout_one_is_the_trial(way, clock):
    """The function runs once, and the other tasks are rejected meanwhile."""
    breaker = CircuitBreaker(reset_timeout=60)
    breaker.open()
    clock.advance(60)
    ran = []

    async def main():
        go_on = asyncio.Event()

        async def work():
            ran.append(True)
            await go_on.wait()

        tasks = [asyncio.ensure_future(way(breaker, work)) for _ in range(20)]
        for _ in range(5):
            await pause()
        go_on.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    results = [type(result) for result in run(main)]
    assert ran == [True]
    assert results.count(CircuitBreakerError) == 19
    assert breaker.current_state == "closed"


def in_threads(functions):
    """Runs each function in a thread of its own; what a function raises fails the
    test."""
    errors = []

    def run_it(function):
        try:
            function()
        except BaseException as exc:
            errors.append(exc)

    threads = [
        threading.Thread(target=run_it, args=[function], daemon=True)
        for function in functions
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()
    assert errors == []


def test_several_loops_and_threads_share_a_breaker(recorder, boom):
    """Tasks on four loops and four plain threads are in guarded calls of one
    breaker all at once, then all fail: the circuit opens once."""
    breaker = CircuitBreaker(fail_max=5, listeners=[recorder])
    loops, tasks, threads = 4, 8, 4
    everybody = threading.Barrier(loops + threads)
    raised = []

    async def on_a_loop():
        all_tasks, go_on, inside = asyncio.Event(), asyncio.Event(), []

        async def work():
            inside.append(True)
            if len(inside) == tasks:
                all_tasks.set()
            await go_on.wait()
            raise boom

        guarded = [asyncio.ensure_future(breaker(work)()) for _ in range(tasks)]
        await all_tasks.wait()
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(None, everybody.wait, PATIENCE)
        go_on.set()
        for error in await asyncio.gather(*guarded, return_exceptions=True):
            raised.append(type(error))

    def on_a_thread():
        def work():
            everybody.wait(PATIENCE)
            raise boom

        try:
            breaker.call(work)
        except (boom, CircuitBreakerError) as exc:
            raised.append(type(exc))

    in_threads([lambda: run(on_a_loop)] * loops + [on_a_thread] * threads)
    calls = loops * tasks + threads
    assert raised.count(CircuitBreakerError) == 1
    assert raised.count(boom) == calls - 1
    assert breaker.fail_counter == 5
    assert recorder.transitions == [("closed", "open")]
    assert recorder.names.count("before_call") == calls
    assert recorder.names.count("failure") == calls


def test_several_loops_and_threads_have_one_trial(clock, recorder):
    """All calls arrive when the timeout has passed; one gets through."""
    breaker = CircuitBreaker(reset_timeout=60, listeners=[recorder])
    breaker.open()
    clock.advance(60)
    loops, tasks, threads = 4, 8, 4
    start = threading.Barrier(loops + threads)
    asked = threading.Barrier(loops + threads)
    ran, rejected = [], []

    async def on_a_loop():
        loop = asyncio.get_running_loop()
        go_on = asyncio.Event()

        async def work():
            ran.append(True)
            await go_on.wait()

        start.wait(PATIENCE)
        guarded = [asyncio.ensure_future(breaker(work)()) for _ in range(tasks)]
        await pause()
        await loop.run_in_executor(None, asked.wait, PATIENCE)
        go_on.set()
        results = await asyncio.gather(*guarded, return_exceptions=True)
        rejected.extend(r for r in results if isinstance(r, CircuitBreakerError))

    def on_a_thread():
        def work():
            ran.append(True)
            asked.wait(PATIENCE)

        start.wait(PATIENCE)
        try:
            breaker.call(work)
        except CircuitBreakerError as exc:
            rejected.append(exc)
            asked.wait(PATIENCE)

    in_threads([lambda: run(on_a_loop)] * loops + [on_a_thread] * threads)
    assert ran == [True]
    assert len(rejected) == loops * tasks + threads - 1
    assert recorder.transitions[-2:] == [("open", "half-open"), ("half-open", "closed")]


# Calls within a trial.


@every_way
def test_tasks_that_a_trial_starts_belong_to_it(way, fail, boom):
    """A trial may gather guarded tasks; only its own outcome decides."""
    breaker = CircuitBreaker()
    breaker.half_open()

    @breaker
    async def fetch(number):
        await pause()
        return number, await asyncio.gather(breaker.call_async(int))

    async def failing():
        await pause()
        fail()

    async def work():
        results = await asyncio.gather(
            *(fetch(number) for number in range(3)),
            way(breaker, failing),
            return_exceptions=True,
        )
        assert breaker.current_state == "half-open"
        return results

    async def main():
        *results, failed = await way(breaker, work)
        assert results == [(0, [0]), (1, [0]), (2, [0])]
        assert isinstance(failed, boom)

    run(main)
    assert breaker.current_state == "closed"


@every_way
def test_tasks_that_were_started_outside_the_trial_do_not_belong(way):
    """Such tasks are rejected while the trial runs, on the same loop and thread."""
    breaker = CircuitBreaker()
    breaker.half_open()

    async def main():
        in_trial, go_on = asyncio.Event(), asyncio.Event()

        async def stranger():
            await in_trial.wait()
            with pytest.raises(CircuitBreakerError):
                await way(breaker, pause)
            with pytest.raises(CircuitBreakerError):
                breaker.call(int)
            go_on.set()

        async def work():
            in_trial.set()
            await go_on.wait()

        started_before = asyncio.ensure_future(stranger())
        await asyncio.gather(asyncio.ensure_future(way(breaker, work)), started_before)

    run(main)
    assert breaker.current_state == "closed"


def test_the_task_that_started_the_trials_task_does_not_belong_to_it():
    """The context goes from the trial to what it starts, and not back."""
    breaker = CircuitBreaker()
    breaker.half_open()

    async def main():
        go_on = asyncio.Event()
        trial = asyncio.ensure_future(breaker(go_on.wait)())
        await pause()
        with pytest.raises(CircuitBreakerError):
            breaker.call(int)
        go_on.set()
        await trial

    run(main)
    assert breaker.current_state == "closed"


def test_a_task_that_outlives_its_trial_no_longer_belongs():
    """The task is rejected while the next trial runs, like any other."""
    breaker = CircuitBreaker(success_threshold=2)
    breaker.half_open()

    async def main():
        go_on = asyncio.Event()

        async def straggler():
            assert breaker.call(int) == 0
            await go_on.wait()
            with pytest.raises(CircuitBreakerError):
                await breaker.call_async(int)

        @breaker
        async def guarded():
            task = asyncio.ensure_future(straggler())
            await pause()
            return task

        task = await guarded()
        assert breaker.success_counter == 1
        next_trial = breaker.calling()
        elsewhere(next_trial.__enter__)
        go_on.set()
        await task
        next_trial.__exit__(None, None, None)

    run(main)
    assert breaker.current_state == "closed"


def test_a_call_that_began_within_a_trial_decides_nothing_after_it(boom):
    """The trial let the call through, so the call is no trial itself."""
    breaker = CircuitBreaker(success_threshold=2)
    breaker.half_open()

    async def main():
        go_on = asyncio.Event()

        @breaker
        async def inner():
            await go_on.wait()
            raise boom

        @breaker
        async def outer():
            task = asyncio.ensure_future(inner())
            await pause()
            return task

        task = await outer()
        go_on.set()
        with pytest.raises(boom):
            await task

    run(main)
    assert breaker.current_state == "half-open"
    assert breaker.success_counter == 1
    assert breaker.fail_counter == 0


def test_a_thread_belongs_if_the_trials_context_goes_along():
    """asyncio.to_thread takes the context along, run_in_executor does not."""
    breaker = CircuitBreaker()
    breaker.half_open()

    @breaker
    async def guarded():
        loop = asyncio.get_running_loop()
        assert await asyncio.to_thread(breaker.call, int) == 0
        with pytest.raises(CircuitBreakerError):
            await loop.run_in_executor(None, breaker.call, int)

    run(guarded)
    assert breaker.current_state == "closed"


def test_a_block_entered_in_one_task_covers_no_calls_in_another():
    """Another task may leave the block, though, and its outcome counts."""
    breaker = CircuitBreaker()
    breaker.half_open()

    async def main():
        block = breaker.calling()
        await asyncio.ensure_future(block.__aenter__())
        with pytest.raises(CircuitBreakerError):
            await breaker.call_async(int)
        await asyncio.ensure_future(block.__aexit__(None, None, None))
        assert breaker.current_state == "closed"

    run(main)


def test_an_async_generator_covers_the_task_that_first_ran_it():
    """Another task that reads on does not belong to the generator's trial."""
    breaker = CircuitBreaker()
    breaker.half_open()

    @breaker
    async def guarded():
        yield 1
        yield 2

    async def main():
        generator = guarded()

        async def read_on():
            return await generator.__anext__()

        assert await asyncio.ensure_future(read_on()) == 1
        assert await read_on() == 2
        with pytest.raises(CircuitBreakerError):
            breaker.call(int)
        with pytest.raises(StopAsyncIteration):
            await read_on()

    run(main)
    assert breaker.current_state == "closed"


@every_way
def test_two_half_open_breakers_may_call_each_other(way):
    """Calls belong to one breaker's trial with a trial of the other in between."""
    first, second = CircuitBreaker(), CircuitBreaker()
    first.half_open()
    second.half_open()

    async def innermost():
        await pause()
        return first.current_state, second.current_state

    async def through_the_second_again():
        return await way(second, innermost)

    async def through_the_first_again():
        return await way(first, through_the_second_again)

    async def through_the_second():
        states = await way(second, through_the_first_again)
        assert second.current_state == "closed"
        assert first.call(int) == 0  # the end of the other trial changed nothing
        return states

    async def main():
        return await way(first, through_the_second)

    assert run(main) == ("half-open", "half-open")
    assert first.current_state == second.current_state == "closed"


def test_sync_calls_within_an_async_trial_belong_to_it():
    """Async calls within a sync trial belong as well: how a call is written does not
    matter."""
    breaker = CircuitBreaker(success_threshold=2)
    breaker.half_open()

    @breaker
    async def guarded():
        await pause()
        return breaker.call(int)

    assert run(guarded) == 0
    assert breaker.success_counter == 1

    @breaker
    def guarded_in_a_thread():
        return run(lambda: breaker.call_async(int))

    assert guarded_in_a_thread() == 0
    assert breaker.current_state == "closed"


# The seam to the storage.


class Refusing(CircuitBreakerStorage):
    """A half-open circuit whose trial another breaker runs. Finding that out
    takes time, so coroutines must not ask by the plain claim."""

    state, counter, opened_at = "half-open", 0, None

    def __init__(self):
        super().__init__("refusing")

    def claim_trial(self, timeout):
        raise AssertionError("would block the event loop")

    async def claim_trial_async(self, timeout):
        await pause()
        return False


@every_way_that_awaits_its_admission
def test_coroutines_ask_for_their_trial_without_blocking_the_loop(way):
    """The breaker awaits claim_trial_async() of the storage."""
    breaker = CircuitBreaker(state_storage=Refusing())

    async def main():
        with pytest.raises(CircuitBreakerError, match="another breaker"):
            await way(breaker, pause)

    run(main)
    assert breaker.retry_after == 0.0


# Other event loops.


def test_cancellation_under_trio_is_abandonment(recorder):
    """trio.Cancelled gives the trial's place back; the loop isn't asyncio's."""
    trio = pytest.importorskip("trio")
    breaker = CircuitBreaker()
    breaker.half_open()
    breaker.add_listener(recorder)

    @breaker
    async def guarded():
        await trio.sleep_forever()

    async def main():
        with trio.move_on_after(0) as scope:
            await guarded()
        assert scope.cancelled_caught

    trio.run(main)
    assert recorder.names == ["before_call"]
    assert breaker.current_state == "half-open"
    assert breaker.retry_after == 0.0


def test_a_trio_nursery_that_is_cancelled_is_abandonment(recorder):
    """An exception group of nothing but cancellations abandons the call."""
    trio = pytest.importorskip("trio")
    breaker = CircuitBreaker(listeners=[recorder])

    @breaker
    async def guarded():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            nursery.start_soon(trio.sleep_forever)

    async def main():
        with trio.move_on_after(0) as scope:
            await guarded()
        assert scope.cancelled_caught

    trio.run(main)
    assert recorder.names == ["before_call"]


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_timeout_of_anyio_counts_where_it_is_inside(backend):
    """A timeout around the guarded code abandons the call; a timeout inside is a
    failure."""
    anyio = pytest.importorskip("anyio")
    pytest.importorskip(backend)
    breaker = CircuitBreaker()

    @breaker
    async def impatient():
        with anyio.fail_after(0):
            await anyio.sleep_forever()

    async def main():
        with pytest.raises(TimeoutError), anyio.fail_after(0):
            async with breaker.calling():
                await anyio.sleep_forever()
        assert breaker.fail_counter == 0
        with pytest.raises(TimeoutError):
            await impatient()
        assert breaker.fail_counter == 1

    anyio.run(main, backend=backend)


@every_way
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_task_group_of_anyio_within_a_trial_belongs_to_it(way, backend):
    """On both of anyio's backends the trial's context goes along to what it starts."""
    anyio = pytest.importorskip("anyio")
    pytest.importorskip(backend)
    if way is call_async_of_a_task and backend == "trio":
        pytest.skip("trio knows no asyncio tasks")
    breaker = CircuitBreaker()
    breaker.half_open()
    results = []

    async def fetch():
        await anyio.lowlevel.checkpoint()
        results.append(await anyio.to_thread.run_sync(breaker.call, int))

    async def work():
        async with anyio.create_task_group() as group:
            for _ in range(3):
                group.start_soon(breaker(fetch))

    async def main():
        import anyio.lowlevel
        import anyio.to_thread

        with anyio.fail_after(PATIENCE):
            await way(breaker, work)

    anyio.run(main, backend=backend)
    assert results == [0, 0, 0]
    assert breaker.current_state == "closed"
