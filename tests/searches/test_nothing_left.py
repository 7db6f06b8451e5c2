"""A breaker keeps nothing: no exception, no memory, no breaker that is gone.

Exceptions have to go by reference counting alone, so the garbage collector is off
while they are waited for. Breakers, states and decorated functions refer to each
other, and may take it.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import gc
import logging
import math
import sys
import weakref

import pytest
from internals import no_other_breakers, state_of, storage_of
from support import BRIEF, DEEP, EVENTS, drive, pairwise

from pybreaker import CircuitBreaker, CircuitBreakerError, CircuitClosedState

CALLS = 20_000 if DEEP else 1_000 if BRIEF else 2_000
A_MILLION = 100_000 if BRIEF else 1_000_000

counts_references = pytest.mark.skipif(
    sys.implementation.name != "cpython", reason="needs reference counting"
)


# Each way to guard: `way(breaker)` is a function that runs what it is given once.


def by_call(breaker):
    return breaker.call


def by_decorator(breaker):
    return breaker(lambda work: work())


def by_coroutine(breaker):
    @breaker
    async def guarded(work):
        return work()

    return lambda work: drive(guarded(work))


def by_call_async(breaker):
    return lambda work: drive(breaker.call_async(work))


def by_generator(breaker):
    @breaker
    def guarded(work):
        yield work()

    return lambda work: next(guarded(work))


def by_async_generator(breaker):
    @breaker
    async def guarded(work):
        yield work()

    async def consume(work):
        async for item in guarded(work):
            return item

    return lambda work: drive(consume(work))


def by_block(breaker):
    def guarded(work):
        with breaker.calling():
            return work()

    return guarded


def by_async_block(breaker):
    async def guarded(work):
        async with breaker.calling():
            return work()

    return lambda work: drive(guarded(work))


def by_a_call_within_a_trial(breaker):
    def guarded(work):
        with contextlib.suppress(CircuitBreakerError):
            breaker.half_open()
            breaker.call(lambda: breaker.call(work))

    return guarded


def by_handle_error(breaker):
    def guarded(work, reraise=True):
        state = state_of(breaker)
        try:
            work()
        except BaseException as exc:
            state._handle_error(exc, reraise)
        else:
            state._handle_success()

    return guarded


def by_handle_error_without_raising(breaker):
    return functools.partial(by_handle_error(breaker), reraise=False)


def by_on_failure(breaker):
    def guarded(work):
        state = state_of(breaker)
        try:
            work()
        except BaseException as exc:
            breaker._inc_counter()
            state.on_failure(exc)
        else:
            state.on_success()

    return guarded


WAYS = [
    by_call,
    by_decorator,
    by_coroutine,
    by_call_async,
    by_generator,
    by_async_generator,
    by_block,
    by_async_block,
    by_a_call_within_a_trial,
    by_handle_error,
    by_handle_error_without_raising,
    by_on_failure,
]

every_way = pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)


# Each path that an exception may take: the breaker's settings, and what is done
# to the breaker before the call and during it.


class Down(Exception):
    """What the guarded service raises."""


class Stopped(KeyboardInterrupt):
    """What abandons a call."""


class Broken:
    """A listener that breaks at every event."""


def break_down(self, *args, **kwargs):
    raise RuntimeError


for event in EVENTS:
    setattr(Broken, event, break_down)


class Loud:
    """A listener that a failure interrupts."""

    def failure(self, cb, exc):
        raise KeyboardInterrupt


def broken_predicate(exc):
    raise RuntimeError


def half_open(breaker):
    breaker.half_open()


class Own(CircuitClosedState):
    """A user's state class whose method raises what it is told of."""

    def on_failure(self, exc):
        try:
            super().on_failure(exc)
            raise exc
        finally:
            del exc


def own_state(breaker):
    breaker._state = Own(breaker)


PATHS = {
    "counted": ({}, None, None),
    "trips": ({"fail_max": 1}, None, None),
    "trips as it is": ({"fail_max": 1, "throw_new_error_on_trip": False}, None, None),
    "fails the trial": ({}, half_open, None),
    "fails the trial as it is": ({"throw_new_error_on_trip": False}, half_open, None),
    "excluded": ({"exclude": [Down]}, None, None),
    "excluded in a trial": ({"exclude": [Down]}, half_open, None),
    "judged by a broken predicate": ({"exclude": [broken_predicate]}, None, None),
    "late": ({"fail_max": 1}, None, CircuitBreaker.close),
    "told to a broken listener": ({"fail_max": 1, "listeners": [Broken()]}, None, None),
    "told to a loud listener": ({"fail_max": 1, "listeners": [Loud()]}, None, None),
    "ignored": ({"ignore": [Down]}, None, None),
    "not included": ({"include": [LookupError]}, None, None),
    "trips in a window": (
        {"fail_max": 1, "window_size": 9, "window_seconds": 9}, None, None
    ),
    "trips in a dry run": ({"fail_max": 1, "dry_run": True}, None, None),
    "let through by a dry run": ({"dry_run": True}, CircuitBreaker.open, None),
    "asked of a user's state": ({}, own_state, None),
    "trips in a user's state": ({"fail_max": 1}, own_state, None),
}  # fmt: skip


class Keeper(logging.Handler):
    """Keeps every record, as the handlers of test tools and buffers do."""

    def __init__(self):
        super().__init__(logging.INFO)
        self.records = []

    def emit(self, record):
        self.records.append(record)


@pytest.fixture
def log():
    """What the library logs, moves included; not what is logged with a traceback,
    which holds the exception by right."""
    logger, keeper = logging.getLogger("pybreaker"), Keeper()

    def has_no_traceback(record):
        return not record.exc_info

    logger.addFilter(has_no_traceback)
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(keeper)
    yield keeper.records
    logger.removeFilter(has_no_traceback)
    logger.removeHandler(keeper)
    logger.setLevel(level)


@pytest.fixture(autouse=True, scope="module")
def less_to_collect():
    """What is there already is no concern of the collector's: that takes long."""
    gc.collect()
    freeze = getattr(gc, "freeze", None)  # which PyPy has not
    if freeze:
        freeze()
    yield
    if freeze:
        gc.unfreeze()


@pytest.fixture
def no_collector():
    gc.disable()
    yield
    gc.enable()


@counts_references
@pairwise(way=WAYS, error=[Down, Stopped], path=PATHS)
def test_an_exception_is_freed_when_its_last_holder_lets_go(
    way, error, path, no_collector, log
):
    """On each path, with all that its traceback holds; log records that are kept
    do not keep it."""
    options, prepare, meanwhile = path
    breaker = CircuitBreaker(**options)
    alive = []

    def work():
        if meanwhile is not None:
            meanwhile(breaker)
        exc = error()
        alive.append(weakref.ref(exc))
        try:
            raise exc
        finally:
            del exc

    guarded = way(breaker)
    if prepare is not None:
        prepare(breaker)
    try:
        guarded(work)
    except BaseException as caught:
        assert isinstance(caught, (Down, CircuitBreakerError, KeyboardInterrupt))
    assert len(alive) == 1
    assert alive[0]() is None


@counts_references
@every_way
def test_a_rejection_is_freed_when_its_last_holder_lets_go(way, no_collector):
    """Nothing refers to the error but the code that caught the error."""
    if way in (by_handle_error, by_handle_error_without_raising, by_on_failure):
        pytest.skip("what is driven by hand has passed the gate")
    breaker = CircuitBreaker()
    if way is by_a_call_within_a_trial:
        pytest.skip("is let through")
    breaker.open()
    try:
        way(breaker)(int)
    except CircuitBreakerError as exc:
        alive = weakref.ref(exc)
    assert alive() is None


class Answer:
    """What the guarded service returns, which makes the call a failure."""


RESULT_PATHS = {
    "counted": ({}, None, None),
    "trips": ({"fail_max": 1}, None, None),
    "fails the trial": ({}, half_open, None),
    "late": ({"fail_max": 1}, None, CircuitBreaker.close),
    "let through by a dry run": ({"dry_run": True}, CircuitBreaker.open, None),
    "told to a broken listener": ({"fail_max": 1, "listeners": [Broken()]}, None, None),
    "judged by a broken predicate": ({"failure_result": broken_predicate}, None, None),
}


@counts_references
@pairwise(way=[by_call, by_decorator, by_coroutine, by_call_async], path=RESULT_PATHS)
def test_a_result_is_freed_when_its_last_holder_lets_go(way, path, no_collector, log):
    """The FailedResult that listeners were told is freed as well, whether or not the
    result opened the circuit."""
    options, prepare, meanwhile = path
    told, alive = [], []

    class Listener:
        def failure(self, cb, exc):
            assert isinstance(exc.result, Answer)
            told.append(weakref.ref(exc))

    breaker = CircuitBreaker(**{"failure_result": Answer, **options})
    breaker.add_listener(Listener())

    def work():
        if meanwhile is not None:
            meanwhile(breaker)
        answer = Answer()
        alive.append(weakref.ref(answer))
        return answer

    guarded = way(breaker)
    if prepare is not None:
        prepare(breaker)
    assert isinstance(guarded(work), Answer)
    assert len(told) == (breaker.failure_result is Answer)
    assert [ref() for ref in alive + told] == [None] * (1 + len(told))


# A million calls.


def fails():
    raise Down


def is_stopped():
    raise Stopped


def collect():
    """Free what nothing needs, and the names that Python remembers having looked up:
    some thousands, which seem to grow most on a free-threaded Python, where each call's
    names have addresses of their own. Such a Python frees the memory of what one
    collection found at the next."""
    gc.collect()
    gc.collect()
    if hasattr(sys, "_clear_internal_caches"):  # since 3.13
        sys._clear_internal_caches()
    else:
        sys._clear_type_cache()


def grown(repeat, times):
    """By how many bytes memory grows while `repeat` is called that often."""
    import tracemalloc

    # Moves are logged, and the records go no further: pytest would keep them.
    def drop(record):
        return False

    logging.getLogger("pybreaker").addFilter(drop)
    try:
        # The table of all breakers is as large as other tests have left it, and would
        # seem to grow when it is moved.
        with no_other_breakers():
            for _ in range(times // 20):
                repeat()
            collect()
            tracemalloc.start()
            for _ in range(times // 20):
                repeat()
            collect()
            before = tracemalloc.get_traced_memory()[0]
            for _ in range(times):
                repeat()
            collect()
            return tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
        logging.getLogger("pybreaker").removeFilter(drop)


def assert_nothing_grows(repeat, times=CALLS):
    """Less than a pointer for each. Tables that are resized once in a while do not
    count: what is kept for each call shows every time."""
    limit = max(4 * times, 12_000)
    assert any(grown(repeat, times) < limit for _ in range(3))


CIRCUITS = {
    "closed": lambda breaker: None,
    "trips and recovers": CircuitBreaker.close,
    "in trials": CircuitBreaker.half_open,
    "open": CircuitBreaker.open,
}


@counts_references
@pairwise(
    way=[by_call, by_coroutine, by_generator, by_block],
    move=CIRCUITS,
    work=[int, fails, is_stopped],
)
def test_calls_grow_no_memory(way, move, work):
    """Whatever the state of the circuit, and however they end."""
    breaker = CircuitBreaker(1)
    guarded = way(breaker)

    def repeat():
        move(breaker)
        with contextlib.suppress(Down, CircuitBreakerError, KeyboardInterrupt):
            guarded(work)

    assert_nothing_grows(repeat)


@counts_references
@pytest.mark.parametrize(
    ("move", "work"),
    [
        (CircuitBreaker.close, int),
        (CircuitBreaker.close, fails),
        (CircuitBreaker.half_open, int),
        (CircuitBreaker.open, int),
    ],
    ids=["successes", "failures", "trials", "rejections"],
)
def test_a_million_calls_grow_no_memory(move, work):
    """A quarter of them in each case. An object has one or more blocks of memory."""
    breaker = CircuitBreaker(math.inf, success_threshold=A_MILLION)
    move(breaker)

    def repeat(times):
        for _ in range(times):
            try:
                breaker.call(work)
            except (Down, CircuitBreakerError):
                continue

    repeat(1000)
    gc.collect()
    before = sys.getallocatedblocks()
    repeat(A_MILLION // 4)
    gc.collect()
    assert sys.getallocatedblocks() - before < 1_000


@counts_references
@pytest.mark.parametrize("size", [50, math.inf], ids=["of calls", "of time"])
def test_a_window_grows_no_memory(size, clock):
    """However many failures were forgotten, by later calls or with time."""
    breaker = CircuitBreaker(40, window_size=size, window_seconds=5)

    def repeat():
        clock.advance(1)
        breaker.call(int)
        with contextlib.suppress(Down):
            breaker.call(fails)

    assert_nothing_grows(repeat)
    assert breaker.current_state == "closed"


@counts_references
def test_trials_that_end_in_another_context_grow_no_memory():
    """What they leave in the context that they began in is cleared by the next."""
    breaker = CircuitBreaker(success_threshold=CALLS * 10)
    breaker.half_open()
    ends_in = contextvars.Context()

    def repeat():
        block = breaker.calling()
        block.__enter__()
        ends_in.run(block.__exit__, None, None, None)

    assert_nothing_grows(repeat)


@counts_references
def test_trials_that_are_never_finished_grow_no_memory(clock):
    """Each loses its place to the next and leaves nothing in the context."""
    breaker = CircuitBreaker(reset_timeout=1)
    breaker.half_open()

    def repeat():
        breaker.calling().__enter__()
        clock.advance(1)

    assert_nothing_grows(repeat)


@counts_references
@pytest.mark.parametrize("move", [CircuitBreaker.close, CircuitBreaker.half_open])
def test_trials_that_another_era_overtakes_grow_no_memory(move):
    """An overtaken trial leaves the context, since its outcome decides nothing."""
    breaker = CircuitBreaker()

    def repeat():
        breaker.half_open()
        breaker.calling().__enter__()
        move(breaker)

    assert_nothing_grows(repeat)


@counts_references
def test_unfinished_trials_of_breakers_that_are_gone_grow_no_memory():
    """No code will ever end these trials, and the breakers are gone."""

    def repeat():
        for _ in range(20):
            breaker = CircuitBreaker()
            breaker.half_open()
            breaker.calling().__enter__()
        gc.collect()

    assert_nothing_grows(repeat, CALLS // 20)


@counts_references
def test_breakers_that_come_and_go_grow_no_memory():
    """A program may make a breaker for each host and drop the breaker later."""

    def repeat():
        for _ in range(20):
            breaker = CircuitBreaker(1)
            with contextlib.suppress(CircuitBreakerError):
                breaker.call(fails)
            breaker.half_open()
            breaker.call(int)
        gc.collect()

    assert_nothing_grows(repeat, CALLS // 20)


# Breakers, decorated functions and states.


def are_freed(refs):
    for _ in range(3):  # PyPy's finalizers take more than one
        gc.collect()
        if all(ref() is None for ref in refs):
            return True
    return False


@every_way
def test_a_breaker_is_freed_when_nobody_needs_it(way):
    """Through all its states, and with all that it guards, tells and stores."""

    class Listener:
        def success(self, cb):
            """Hears."""

    listener = Listener()
    breaker = CircuitBreaker(1, listeners=[listener])
    guarded = way(breaker)
    for work in (int, fails, is_stopped):
        for state in ("closed", "half-open", "open"):
            breaker.state = state
            with contextlib.suppress(Down, CircuitBreakerError, KeyboardInterrupt):
                guarded(work)
    alive = [weakref.ref(thing) for thing in (breaker, breaker.state, listener)]
    alive.append(weakref.ref(storage_of(breaker)))
    del breaker, guarded, listener
    assert are_freed(alive)


@pytest.mark.parametrize("begin", [by_block, by_async_block])
def test_a_breaker_whose_trial_was_never_finished_is_freed(begin):
    """The context that remembers the trial does not keep the breaker."""
    breaker = CircuitBreaker()
    breaker.half_open()
    block = breaker.calling()
    if begin is by_block:
        block.__enter__()
    else:
        drive(block.__aenter__())
    assert breaker.retry_after > 0
    alive = weakref.ref(breaker)
    del breaker, block
    assert are_freed([alive])


def test_a_decorated_function_is_freed_before_its_breaker():
    """The breaker does not remember what it guards."""
    breaker = CircuitBreaker()

    @breaker
    def guarded():
        """Is guarded."""

    guarded()
    alive = weakref.ref(guarded), weakref.ref(guarded.__wrapped__)
    del guarded
    assert are_freed(alive)


@pytest.mark.parametrize("move", ["open", "half_open", "close"])
def test_the_state_of_an_era_is_freed_when_the_era_is_over(move):
    """Unless a call that it admitted still runs."""
    breaker = CircuitBreaker()
    alive = weakref.ref(breaker.state)
    with breaker.calling():
        getattr(breaker, move)()
        assert alive() is not None
    assert are_freed([alive])


@pytest.mark.parametrize("remove", ["listener", "excluded_exception"])
def test_what_was_removed_from_a_breaker_is_freed(remove):
    """A listener and a predicate alike."""

    class Thing:
        def success(self, cb):
            """Hears."""

        def __call__(self, exc):
            """Judges."""

    thing = Thing()
    breaker = CircuitBreaker(2)
    getattr(breaker, f"add_{remove}")(thing)
    breaker.call(int)
    with contextlib.suppress(Down):
        breaker.call(fails)
    getattr(breaker, f"remove_{remove}")(thing)
    alive = weakref.ref(thing)
    del thing
    assert are_freed([alive])
