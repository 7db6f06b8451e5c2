"""Ways to guard: each runs `work` once, and returns what `work` returned.

The ways for coroutines take a function `run` that runs a coroutine; by default the
coroutine may wait for nothing.
"""

from __future__ import annotations

import types

import pytest
from support import drive


def by_call(breaker, work):
    return breaker.call(work)


def by_decorator(breaker, work):
    return breaker(lambda: work())()


def by_block(breaker, work):
    with breaker.calling():
        return work()


def by_generator(breaker, work):
    @breaker
    def guarded():
        yield
        yield work()

    return list(guarded())[-1]


def by_coroutine(breaker, work, run=drive):
    @breaker
    async def guarded():
        return work()

    return run(guarded())


def by_call_async(breaker, work, run=drive):
    async def guarded():
        return work()

    return run(breaker.call_async(guarded))


def by_iterable_coroutine(breaker, work, run=drive):
    @breaker
    @types.coroutine
    def guarded():
        return work()
        yield  # never reached, but makes it a generator function

    async def wait():
        return await guarded()

    return run(wait())


def by_async_generator(breaker, work, run=drive):
    @breaker
    async def guarded():
        yield
        yield work()

    async def consume():
        return [item async for item in guarded()][-1]

    return run(consume())


def by_async_block(breaker, work, run=drive):
    async def block():
        async with breaker.calling():
            return work()

    return run(block())


WAYS = [
    by_call,
    by_decorator,
    by_block,
    by_generator,
    by_coroutine,
    by_call_async,
    by_iterable_coroutine,
    by_async_generator,
    by_async_block,
]
every_way = pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
