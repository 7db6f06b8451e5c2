"""What holds whatever the number of threads: "Concurrency" in the
specification."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import contextvars
import functools
import itertools
import math
import random
import sys
import threading
from datetime import datetime, timezone

import pytest
from internals import (
    WRITTEN_AT_WILL,
    lock_of,
    names_of_state,
    names_of_storage,
    names_of_trial,
    put_lock,
    storage_of,
)
from support import PATIENCE

import pybreaker
from pybreaker import CircuitBreaker, CircuitBreakerError, CircuitMemoryStorage

THREADS = 12


def all_at_once(*functions):
    """Runs each function in a thread of its own, all set off together. Returns
    what they returned or raised, in their order."""
    start = threading.Barrier(len(functions))
    results = [None] * len(functions)

    def run(number, function):
        start.wait(PATIENCE)
        try:
            results[number] = function()
        except BaseException as exc:
            results[number] = exc

    threads = [
        threading.Thread(target=run, args=numbered, daemon=True)
        for numbered in enumerate(functions)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive(), "a thread hangs"
    return results


def kinds(results):
    """The number of results of each type, by the name of the type."""
    names = [type(result).__name__ for result in results]
    return {name: names.count(name) for name in names}


class DictStorage(pybreaker.CircuitBreakerStorage):
    """A user's own storage, of the older interface."""

    def __init__(self):
        super().__init__("dict")
        self.row = {"state": "closed", "counter": 0, "opened_at": None}

    state = property(
        lambda self: self.row["state"],
        lambda self, state: self.row.update(state=state),
    )
    counter = property(lambda self: self.row["counter"])
    opened_at = property(
        lambda self: self.row["opened_at"],
        lambda self, moment: self.row.update(opened_at=moment),
    )

    def increment_counter(self):
        self.row["counter"] += 1

    def reset_counter(self):
        self.row["counter"] = 0


# The ways to guard. Each makes, from a breaker and a plain function, something
# to call that runs the function as one guarded call.


def decorated(breaker, func):
    return breaker(lambda: func())


def method(breaker, func):
    class Service:
        @breaker
        def fetch(self):
            return func()

    return Service().fetch


def through_call(breaker, func):
    return lambda: breaker.call(func)


def call_with_parentheses(breaker, func):
    return breaker()(lambda: func())


def coroutine_function(breaker, func):
    @breaker
    async def guarded():
        return func()

    return lambda: asyncio.run(guarded())


def coroutine_through_call(breaker, func):
    async def work():
        return func()

    return lambda: asyncio.run(breaker.call(work))


def coroutine_from_a_lambda(breaker, func):
    async def work():
        return func()

    return lambda: asyncio.run(breaker.call(lambda: work()))


def through_call_async(breaker, func):
    async def work():
        return func()

    return lambda: asyncio.run(breaker.call_async(work))


def older_async_spelling(breaker, func):
    @breaker(__pybreaker_call_async=True)
    async def guarded():
        return func()

    return lambda: asyncio.run(guarded())


def generator_function(breaker, func):
    @breaker
    def guarded():
        yield func()

    return lambda: list(guarded())[0]


def generator_through_call(breaker, func):
    def work():
        yield func()

    return lambda: list(breaker.call(work))[0]


def async_generator_function(breaker, func):
    @breaker
    async def guarded():
        yield func()

    async def consume():
        return [item async for item in guarded()][0]

    return lambda: asyncio.run(consume())


def context_manager(breaker, func):
    @contextlib.contextmanager
    @breaker
    def guarded():
        yield

    def run():
        with guarded():
            return func()

    return run


def block(breaker, func):
    def run():
        with breaker.calling():
            return func()

    return run


def async_block(breaker, func):
    async def run():
        async with breaker.calling():
            return func()

    return lambda: asyncio.run(run())


@pytest.fixture(
    params=[
        decorated,
        method,
        through_call,
        call_with_parentheses,
        coroutine_function,
        coroutine_through_call,
        coroutine_from_a_lambda,
        through_call_async,
        older_async_spelling,
        generator_function,
        generator_through_call,
        async_generator_function,
        context_manager,
        block,
        async_block,
    ],
    ids=lambda way: way.__name__,
)
def guard(request):
    """Each way to guard: `guard(breaker, func)` can be called without arguments."""
    return request.param


# 1. Guarded calls never wait for each other.


def meeting(threads=THREADS):
    """A function that returns when so many threads are in it at the same time."""
    barrier = threading.Barrier(threads)

    def meet():
        barrier.wait(PATIENCE)
        return "met"

    return meet


def test_guarded_calls_never_wait_for_each_other(guard):
    """Twelve calls meet inside the guarded function."""
    breaker = CircuitBreaker()
    results = all_at_once(*[guard(breaker, meeting())] * THREADS)
    assert results == ["met"] * THREADS


def with_a_listener():
    return CircuitBreaker(listeners=[pybreaker.CircuitBreakerListener()])


def with_failures_to_forget():
    breaker = CircuitBreaker()
    breaker.fail_counter = 1
    return breaker


def with_a_storage_of_the_users_own():
    return CircuitBreaker(state_storage=DictStorage())


@pytest.mark.parametrize(
    "make",
    [with_a_listener, with_failures_to_forget, with_a_storage_of_the_users_own],
    ids=lambda make: make.__name__,
)
def test_calls_that_need_the_lock_do_not_wait_for_each_other(make, guard):
    """The lock is for deciding, never for the guarded call."""
    breaker = make()
    results = all_at_once(*[guard(breaker, meeting())] * THREADS)
    assert results == ["met"] * THREADS
    assert breaker.fail_counter == 0


def test_a_trial_that_takes_its_time_keeps_no_thread_waiting():
    """Other calls are rejected meanwhile, and the breaker can be watched and
    steered."""
    breaker = CircuitBreaker(success_threshold=5)
    breaker.half_open()
    begun, end = threading.Event(), threading.Event()

    def trial():
        begun.set()
        return end.wait(PATIENCE)

    def others():
        assert begun.wait(PATIENCE)
        with pytest.raises(CircuitBreakerError):
            breaker.call(int)
        assert (breaker.current_state, breaker.state.name) == ("half-open",) * 2
        assert 0 < breaker.retry_after <= 60
        assert "half-open" in repr(breaker)
        breaker.fail_counter = 1
        breaker.add_listener(pybreaker.CircuitBreakerListener())
        end.set()
        return "not kept"

    results = all_at_once(lambda: breaker.call(trial), others)
    assert results == [True, "not kept"]


# 2. One trip, one transition, one state_change.


def failing(exc_type, threads=THREADS):
    """A function that fails in so many threads at the same time."""
    meet = meeting(threads)

    def fail_together():
        meet()
        raise exc_type

    return fail_together


@pytest.mark.parametrize("fail_max", [1, 5, THREADS - 1, THREADS])
def test_many_calls_that_fail_at_once_open_the_circuit_once(
    guard, recorder, boom, fail_max
):
    """One call trips the circuit; the other calls fail below the limit, or late."""
    breaker = CircuitBreaker(fail_max=fail_max, listeners=[recorder])
    results = all_at_once(*[guard(breaker, failing(boom))] * THREADS)
    assert kinds(results) == {"Boom": THREADS - 1, "CircuitBreakerError": 1}
    assert recorder.transitions == [("closed", "open")]
    assert recorder.names.count("failure") == THREADS
    assert (breaker.current_state, breaker.fail_counter) == ("open", fail_max)


def test_many_calls_that_fail_at_once_are_all_counted(hasty, boom):
    """No failure is lost where there is room for all failures below the limit."""
    breaker = CircuitBreaker(fail_max=math.inf)

    def fail_often():
        for _ in range(100):
            with pytest.raises(boom):
                breaker.call(work)

    def work():
        raise boom

    all_at_once(*[fail_often] * 8)
    assert breaker.fail_counter == 800


def test_many_trials_that_fail_at_once_open_the_circuit_once(clock, recorder, boom):
    """Trials that lost the place are trials as well, but only one of them can end the
    era."""
    breaker = CircuitBreaker(reset_timeout=60, success_threshold=2)
    breaker.half_open()
    breaker.add_listener(recorder)
    meet = meeting(8)
    begun = [threading.Event() for _ in range(8)]

    def call(number):
        def trial():
            begun[number].set()
            meet()
            raise boom

        if number:
            assert begun[number - 1].wait(PATIENCE)
            clock.advance(60)
        breaker.call(trial)

    results = all_at_once(*(functools.partial(call, number) for number in range(8)))
    assert kinds(results) == {"Boom": 7, "CircuitBreakerError": 1}
    assert recorder.transitions == [("half-open", "open")]
    assert breaker.fail_counter == 1


# 3. At most one trial holds the place.


def half_opened_by_a_trial(clock):
    breaker = CircuitBreaker(reset_timeout=60)
    breaker.open()
    clock.advance(60)
    return breaker


def half_opened_by_hand(clock):
    breaker = CircuitBreaker(reset_timeout=60)
    breaker.half_open()
    return breaker


def half_opened_over_a_storage_of_the_users_own(clock):
    breaker = CircuitBreaker(reset_timeout=60, state_storage=DictStorage())
    breaker.open()
    storage_of(breaker).opened_at = None
    return breaker


@pytest.mark.parametrize(
    "make",
    [
        half_opened_by_a_trial,
        half_opened_by_hand,
        half_opened_over_a_storage_of_the_users_own,
    ],
    ids=lambda make: make.__name__,
)
def test_of_many_calls_at_the_end_of_a_timeout_one_is_the_trial(
    make, guard, clock, recorder
):
    """The trial alone runs; all other calls are rejected while it does."""
    breaker = make(clock)
    breaker.add_listener(recorder)
    before = [("open", "half-open")] if breaker.current_state == "open" else []
    rejections = threading.Semaphore(0)
    ran = []

    def trial():
        ran.append(True)
        for _ in range(THREADS - 1):
            assert rejections.acquire(timeout=PATIENCE)
        return "ran"

    call = guard(breaker, trial)

    def arrive():
        try:
            return call()
        except CircuitBreakerError as exc:
            rejections.release()
            return exc

    results = all_at_once(*[arrive] * THREADS)
    assert kinds(results) == {"str": 1, "CircuitBreakerError": THREADS - 1}
    assert len(ran) == 1
    assert recorder.names.count("before_call") == 1
    assert recorder.transitions == [*before, ("half-open", "closed")]


def test_of_many_calls_that_find_a_trial_hanging_one_takes_over(clock):
    """The call that takes over holds the place for a whole timeout of its own."""
    breaker = CircuitBreaker(reset_timeout=60, success_threshold=3)
    breaker.half_open()
    begun, over = threading.Event(), threading.Event()
    rejections = threading.Semaphore(0)

    def hang():
        begun.set()
        assert over.wait(PATIENCE)
        return "hung"

    def take_over():
        for _ in range(THREADS - 1):
            assert rejections.acquire(timeout=PATIENCE)
        over.set()
        return "took over"

    def arrive():
        try:
            return breaker.call(take_over)
        except CircuitBreakerError as exc:
            rejections.release()
            return exc

    hung = []
    hanging = threading.Thread(
        target=lambda: hung.append(breaker.call(hang)), daemon=True
    )
    hanging.start()
    assert begun.wait(PATIENCE)
    clock.advance(60)
    results = all_at_once(*[arrive] * THREADS)
    hanging.join(PATIENCE)
    assert hung == ["hung"]
    assert results.count("took over") == 1
    assert kinds(results) == {"str": 1, "CircuitBreakerError": THREADS - 1}
    assert breaker.success_counter == 2


def test_the_place_is_held_while_the_storage_decides_on_the_trial(clock):
    """Calls that arrive meanwhile are rejected, also in the context of the call that
    holds the place: the trial has not begun, so no call belongs to it."""

    class SlowToGrant(CircuitMemoryStorage):
        def claim_trial(self, timeout):
            for context in (contextvars.Context(), contextvars.copy_context()):
                with pytest.raises(CircuitBreakerError):
                    context.run(breaker.call, ran.append, "too early")
            return True

    ran = []
    breaker = CircuitBreaker(reset_timeout=60, state_storage=SlowToGrant("closed"))
    for make_way in (breaker.half_open, breaker.open):
        make_way()
        clock.advance(60)
        breaker.call(ran.append, "trial")
    assert ran == ["trial"] * 2


def test_trials_follow_one_another_and_never_overlap(hasty):
    """Many threads ask to be the next trial at once."""
    breaker = CircuitBreaker(reset_timeout=60, success_threshold=10**6)
    breaker.half_open()
    inside, most, ran = [], [], []

    def trial():
        inside.append(True)
        most.append(len(inside))
        ran.append(True)
        inside.pop()

    def ask_often():
        for _ in range(200):
            with contextlib.suppress(CircuitBreakerError):
                breaker.call(trial)

    results = all_at_once(*[ask_often] * 8)
    assert results == [None] * 8
    assert max(most) == 1
    assert breaker.success_counter == len(ran) >= 8


# 4. No call brings fail_counter above fail_max in the closed state.


class Counts(pybreaker.CircuitBreakerListener):
    """Remembers fail_counter as it was at each failure."""

    def __init__(self):
        self.seen = []

    def failure(self, cb, exc):
        self.seen.append(cb.fail_counter)


@pytest.mark.parametrize("storage", [None, DictStorage], ids=["memory", "own"])
def test_no_call_counts_beyond_the_limit(boom, storage):
    """Late failures are not counted, and no listener sees a higher count in between."""
    counts = Counts()
    breaker = CircuitBreaker(
        fail_max=5, listeners=[counts], state_storage=storage and storage()
    )
    all_at_once(*[through_call(breaker, failing(boom))] * THREADS)
    assert sorted(counts.seen) == [1, 2, 3, 4] + [5] * (THREADS - 4)
    assert breaker.fail_counter == 5


def test_a_listener_that_makes_failing_calls_counts_no_further(fail, boom, recorder):
    """The listener is told of the failure that reaches the limit before the circuit
    opens, so the listener's own calls are still admitted; only one of all these calls
    trips."""

    class Prober(Counts):
        def failure(self, cb, exc):
            super().failure(cb, exc)
            if len(self.seen) < 4:
                raised.append(probe(cb))

    def probe(cb):
        with pytest.raises((boom, CircuitBreakerError)) as caught:
            cb.call(fail)
        return caught.type

    raised = []
    prober = Prober()
    breaker = CircuitBreaker(fail_max=1, listeners=[prober, recorder])
    with pytest.raises(boom):
        breaker.call(fail)
    assert prober.seen == [1] * 4
    assert raised == [CircuitBreakerError, boom, boom]
    assert breaker.fail_counter == 1
    assert recorder.transitions == [("closed", "open")]


# 5. A rejected call never runs the function.


def test_a_rejected_call_never_runs_the_function(guard):
    """Each function that ran belongs to a call that was not rejected."""
    breaker = CircuitBreaker(reset_timeout=math.inf)
    ran = []
    call = guard(breaker, lambda: ran.append(True))
    before = all_at_once(*[call] * 4)
    breaker.open()
    rejected = all_at_once(*[call] * 4)
    assert kinds(before + rejected) == {"NoneType": 4, "CircuitBreakerError": 4}
    assert len(ran) == 4


def test_a_circuit_that_opens_and_closes_runs_what_it_does_not_reject(hasty):
    """The function runs as often as calls are admitted, while another thread opens and
    closes the circuit."""
    breaker = CircuitBreaker(reset_timeout=math.inf)
    ran = []

    def ask_often():
        outcomes = []
        for _ in range(300):
            try:
                breaker.call(ran.append, True)
            except CircuitBreakerError:
                outcomes.append("rejected")
            else:
                outcomes.append("ran")
        return outcomes

    def flap():
        for _ in range(100):
            breaker.open()
            breaker.close()

    *outcomes, flapped = all_at_once(*[ask_often] * 4, flap)
    assert flapped is None
    assert sum(outcome.count("ran") for outcome in outcomes) == len(ran)


# 6. A late outcome never changes a later era.


@pytest.mark.parametrize("fails", [True, False])
def test_a_call_may_outlast_a_whole_outage(guard, clock, recorder, fail, boom, fails):
    """The call is admitted while closed, and ends when the circuit has opened,
    half-opened and closed again and one failure has been counted in the new era."""
    breaker = CircuitBreaker(fail_max=2, reset_timeout=60)
    begun, end = threading.Event(), threading.Event()

    def slow():
        begun.set()
        assert end.wait(PATIENCE)
        if fails:
            raise boom

    def outage():
        assert begun.wait(PATIENCE)
        for error in (boom, CircuitBreakerError):
            with pytest.raises(error):
                breaker.call(fail)
        clock.advance(60)
        breaker.call(int)
        with pytest.raises(boom):
            breaker.call(fail)
        breaker.add_listener(recorder)
        state = breaker.state
        end.set()
        return state

    late, state = all_at_once(guard(breaker, slow), outage)
    assert type(late) is (boom if fails else type(None))
    assert breaker.state is state
    assert (breaker.current_state, breaker.fail_counter) == ("closed", 1)
    assert recorder.names == ["failure" if fails else "success"]


def test_many_late_failures_do_not_disturb_the_next_era(guard, recorder, boom):
    """Twelve calls fail after another thread has opened and closed the circuit."""
    breaker = CircuitBreaker(fail_max=1)
    begun, end = threading.Semaphore(0), threading.Event()

    def late():
        begun.release()
        assert end.wait(PATIENCE)
        raise boom

    def steer():
        for _ in range(THREADS):
            assert begun.acquire(timeout=PATIENCE)
        breaker.open()
        breaker.close()
        breaker.add_listener(recorder)
        end.set()

    *results, steered = all_at_once(*[guard(breaker, late)] * THREADS, steer)
    assert steered is None
    assert kinds(results) == {"Boom": THREADS}
    assert recorder.names == ["failure"] * THREADS
    assert (breaker.current_state, breaker.fail_counter) == ("closed", 0)


@pytest.fixture
def look_alikes(monkeypatch):
    """State classes whose objects are equal to all state objects."""

    class Alike:
        __hash__ = object.__hash__

        def __eq__(self, other):
            return isinstance(other, pybreaker.CircuitBreakerState)

    for name in ("CircuitClosedState", "CircuitOpenState", "CircuitHalfOpenState"):
        cls = type(name, (Alike, getattr(pybreaker, name)), {})
        monkeypatch.setattr(pybreaker, name, cls)


@pytest.mark.usefixtures("look_alikes")
@pytest.mark.parametrize("move", [CircuitBreaker.close, CircuitBreaker.half_open])
def test_eras_are_told_apart_whatever_their_states_say_of_themselves(move, boom):
    """The breaker knows an era by its state object, even where a subclass defines
    equality."""
    breaker = CircuitBreaker(fail_max=2, success_threshold=2)
    for late in (None, boom()):
        move(breaker)
        old, block = breaker.state, breaker.calling()
        block.__enter__()
        move(breaker)
        breaker.fail_counter = 1
        new = breaker.state
        block.__exit__(late and boom, late, None)
        breaker.fail_max = 1
        old.on_success()
        old.on_failure(boom())
        breaker.fail_max = 2
        assert breaker.state is new
        assert breaker.fail_counter == 1
        assert breaker.success_counter == 0


@pytest.mark.usefixtures("look_alikes")
def test_a_state_that_ends_while_a_failure_is_told_is_not_asked(fail, boom):
    """The new era's state equals the one that has ended, and is closed as well."""
    asked = []

    class Restarts(pybreaker.CircuitBreakerListener):
        def failure(self, cb, exc):
            cb.close()
            cb.fail_counter = 2

    pybreaker.CircuitClosedState.on_failure = lambda state, exc: asked.append(state)
    breaker = CircuitBreaker(fail_max=2, listeners=[Restarts()])
    with pytest.raises(boom):
        breaker.call(fail)
    assert (breaker.current_state, breaker.fail_counter) == ("closed", 2)
    assert asked == []


@pytest.mark.usefixtures("look_alikes")
def test_a_state_that_has_ended_is_not_asked_what_an_outcome_means(boom):
    """The new era's state equals the one that has ended."""
    asked = []
    pybreaker.CircuitClosedState.on_success = asked.append
    pybreaker.CircuitClosedState.on_failure = lambda state, exc: asked.append(state)
    breaker = CircuitBreaker(fail_max=1)
    breaker.fail_counter = 1
    for late in (None, boom()):
        block = breaker.calling()
        block.__enter__()
        breaker.close()
        breaker.fail_counter = 1
        block.__exit__(late and boom, late, None)
        assert asked == []
    with pytest.raises(boom), breaker.calling():
        raise boom
    assert asked == [breaker.state]


@pytest.mark.usefixtures("look_alikes")
def test_a_trial_begins_where_an_open_state_equals_a_half_open_one(guard):
    """The breaker sees the half-opening although the two states are equal."""
    breaker = CircuitBreaker(reset_timeout=0)
    breaker.open()
    assert guard(breaker, lambda: "done")() == "done"
    assert breaker.current_state == "closed"


# 7. The quiet path takes no lock; storages of the user's own are used under it.


class CountingLock:
    """Stands in for a breaker's lock. Knows how often and by which threads it was
    taken."""

    def __init__(self, lock):
        self._lock = lock
        self._holders = []
        self.taken = 0

    def acquire(self, *args, **kwargs):
        acquired = self._lock.acquire(*args, **kwargs)
        if acquired:
            self.taken += 1
            self._holders.append(threading.get_ident())
        return acquired

    def release(self):
        self._holders.pop()
        self._lock.release()

    def __enter__(self):
        return self.acquire()

    def __exit__(self, *exc_info):
        self.release()

    @property
    def is_mine(self):
        return threading.get_ident() in self._holders


def count_lock(breaker):
    return put_lock(breaker, CountingLock(lock_of(breaker)))


def test_a_quiet_circuit_takes_no_lock(guard):
    """The circuit is closed, with a memory storage, no listener and no failure to
    forget."""
    breaker = CircuitBreaker()
    call = guard(breaker, lambda: "quiet")
    lock = count_lock(breaker)
    assert [call(), call()] == ["quiet"] * 2
    assert lock.taken == 0


def closed_again(breaker):
    breaker.open()
    breaker.half_open()
    breaker.close()


def failed_and_recovered(breaker):
    breaker.fail_counter = 1
    breaker.call(int)


def had_a_listener(breaker):
    listener = pybreaker.CircuitBreakerListener()
    breaker.add_listener(listener)
    breaker.remove_listener(listener)


@pytest.mark.parametrize(
    "past",
    [closed_again, failed_and_recovered, had_a_listener],
    ids=lambda past: past.__name__,
)
def test_a_circuit_is_quiet_again_when_all_is_over(guard, past):
    """An outage, a failure or a listener of the past costs later calls no lock."""
    breaker = CircuitBreaker()
    call = guard(breaker, lambda: "quiet")
    past(breaker)
    lock = count_lock(breaker)
    assert call() == "quiet"
    assert lock.taken == 0


def test_a_lock_that_another_thread_holds_does_not_stop_a_quiet_circuit(guard):
    """A quiet call waits for no lock, because it takes none."""
    breaker = CircuitBreaker()
    call = guard(breaker, lambda: "quiet")
    done = threading.Event()

    def hold():
        with lock_of(breaker):
            return done.wait(PATIENCE)

    def ask():
        result = call()
        done.set()
        return result

    assert all_at_once(hold, ask) == [True, "quiet"]


class Watched:
    """Part of a storage that notes what is used while the lock is not held."""

    USED = frozenset(
        "state counter success_counter opened_at increment_counter reset_counter "
        "increment_success_counter reset_success_counter open_for move "
        "release_trial".split()
    )
    CLAIMS = frozenset(["claim_trial", "claim_trial_async"])

    lock = None

    def __getattribute__(self, name):
        get = super().__getattribute__
        if name in Watched.USED | Watched.CLAIMS and get("lock") is not None:
            get("used").append((name, get("lock").is_mine))
        return get(name)

    def __setattr__(self, name, value):
        if name in Watched.USED and self.lock is not None:
            self.used.append((name, self.lock.is_mine))
        super().__setattr__(name, value)

    def watch(self, lock):
        self.used = []
        self.lock = lock


class WatchedStorage(Watched, DictStorage):
    """A storage of the user's own that notes its use without the lock."""


class WatchedMemory(Watched, CircuitMemoryStorage):
    """A subclass of the memory storage, which may do more than its base."""

    def __init__(self):
        super().__init__("closed")


@pytest.fixture(params=[WatchedStorage, WatchedMemory], ids=lambda cls: cls.__name__)
def watched(request):
    return request.param()


def test_any_other_storage_is_used_only_under_the_lock(guard, watched, recorder, boom):
    """This holds in calls and transitions. The claim alone, which may take its time, is
    asked without the lock."""
    breaker = CircuitBreaker(
        fail_max=2, state_storage=watched, listeners=[recorder], success_threshold=2
    )

    def work():
        if fails:
            raise boom

    def run(*errors):
        with pytest.raises(errors) if errors else contextlib.nullcontext():
            call()

    def let_the_timeout_pass():
        with lock:
            watched.opened_at = None

    call = guard(breaker, work)
    lock = count_lock(breaker)
    watched.watch(lock)
    fails = True
    run(boom)
    fails = False
    run()
    fails = True
    run(boom)
    run(CircuitBreakerError)
    let_the_timeout_pass()
    run(CircuitBreakerError)
    fails = False
    run(CircuitBreakerError)
    let_the_timeout_pass()
    run()
    run()
    assert recorder.transitions == [
        ("closed", "open"),
        ("open", "half-open"),
        ("half-open", "open"),
        ("open", "half-open"),
        ("half-open", "closed"),
    ]
    assert {name for name, held in watched.used if held} == Watched.USED
    outside = {name for name, held in watched.used if not held}
    assert "claim_trial" in outside
    assert outside <= Watched.CLAIMS


def test_a_quiet_call_over_any_other_storage_takes_the_lock(guard, watched):
    """The call may look quiet, but the storage was written for use under the lock."""
    breaker = CircuitBreaker(state_storage=watched)
    call = guard(breaker, lambda: "done")
    lock = count_lock(breaker)
    watched.watch(lock)
    assert call() == "done"
    assert watched.used
    assert all(held for _, held in watched.used)


# How little a call does. Each function of the library that runs takes as long as all
# the rest of a quiet call.


CLOSED = ["closed", "".join(["clo", "sed"])]  # two equal strings that are two objects


@contextlib.contextmanager
def functions_that_run():
    """The names of the library's functions that this thread runs meanwhile."""
    names = set()

    def note(frame, event, arg):
        if event == "call" and frame.f_code.co_filename == pybreaker.__file__:
            names.add(frame.f_code.co_name)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        yield names
    finally:
        sys.setprofile(before)


@pytest.mark.parametrize("word", CLOSED)
def test_a_quiet_call_runs_nothing_but_its_guard(word):
    """The storage may name its state by any string that equals "closed"."""
    breaker = CircuitBreaker(state_storage=CircuitMemoryStorage(word))

    async def work():
        return 1

    coroutine = breaker(work)()
    for call, guard in (
        (breaker(lambda: 1), "guarded"),
        (lambda: breaker.call(lambda: 1), "call"),
        (lambda: coroutine.send(None), "guarded"),
    ):
        with functions_that_run() as names, contextlib.suppress(StopIteration):
            call()
        assert names == {guard}


def test_a_call_asks_a_listener_only_for_the_events_that_it_tells():
    """When a listener is added, the breaker finds out which events that listener
    hears."""
    told, asked = [], []

    class Asked(pybreaker.CircuitBreakerListener):
        def __getattribute__(self, name):
            asked.append(name)
            return super().__getattribute__(name)

        def before_call(self, cb, func, *args, **kwargs):
            told.append("before_call")

        def success(self, cb):
            told.append("success")

    breaker = CircuitBreaker(listeners=[Asked()])
    call = breaker(lambda: 1)
    del asked[:]
    call()
    assert told == ["before_call", "success"]
    assert not collections.Counter(asked) - collections.Counter(told)


@pytest.mark.parametrize("listeners", [[], [pybreaker.CircuitBreakerListener()]])
def test_a_rejection_that_no_listener_hears_takes_no_lock(guard, listeners):
    """The call is rejected at once, even while another thread is telling a listener."""
    breaker = CircuitBreaker(listeners=listeners)
    call = guard(breaker, int)
    breaker.open()
    lock = count_lock(breaker)
    with pytest.raises(CircuitBreakerError):
        call()
    assert lock.taken == 0
    breaker.half_open()
    contextvars.copy_context().run(breaker.calling().__enter__)
    lock = count_lock(breaker)
    with pytest.raises(CircuitBreakerError):
        call()
    assert lock.taken == 0


@pytest.mark.parametrize("word", CLOSED)
def test_a_success_that_no_listener_hears_takes_no_lock(guard, word):
    """The breaker has a listener that overrides no method."""
    breaker = CircuitBreaker(listeners=[pybreaker.CircuitBreakerListener()])
    call = guard(breaker, int)
    storage_of(breaker).state = word
    lock = count_lock(breaker)
    call()
    assert lock.taken == 0


# Steering while calls are in flight.


def reads_the_state(breaker):
    breaker.state  # noqa: B018


def takes_a_snapshot(breaker):
    breaker.snapshot()


def shows_its_repr(breaker):
    breaker.open()
    breaker.half_open()
    assert "0 of 2 successes" in repr(breaker)


def reads_retry_after(breaker):
    breaker.open()
    assert breaker.retry_after > 0


def reads_retry_after_of_an_opening_from_outside(breaker):
    with lock_of(breaker):
        storage_of(breaker).opened_at = datetime.now(timezone.utc)
        storage_of(breaker).state = "open"
    assert breaker.retry_after > 0


def sets_the_count(breaker):
    breaker.fail_counter = 1


def asks_the_gate(breaker):
    breaker.state.before_call(int)
    breaker.open()
    breaker.reset_timeout = 0
    breaker.state.before_call(int)


def settles_by_hand(breaker):
    breaker.fail_counter = 1
    breaker.state.on_success()
    breaker.fail_counter = 2
    with pytest.raises(CircuitBreakerError):
        breaker.state.on_failure(Exception())


def exchanges_listeners_and_exclusions(breaker):
    listener = pybreaker.CircuitBreakerListener()
    breaker.add_listener(listener)
    breaker.add_listeners(listener)
    breaker.remove_listener(listener)
    breaker._listeners.append(listener)
    breaker.add_excluded_exception(ValueError)
    breaker.add_excluded_exceptions(KeyError)
    breaker.remove_excluded_exception(ValueError)
    breaker._excluded_exceptions = []


def exchanges_the_storage(breaker):
    breaker._state_storage = CircuitMemoryStorage("closed")


@pytest.fixture(
    params=[
        reads_the_state,
        takes_a_snapshot,
        shows_its_repr,
        reads_retry_after,
        reads_retry_after_of_an_opening_from_outside,
        sets_the_count,
        asks_the_gate,
        settles_by_hand,
        exchanges_listeners_and_exclusions,
        exchanges_the_storage,
        CircuitBreaker.open,
        CircuitBreaker.half_open,
        CircuitBreaker.close,
    ],
    ids=lambda steer: steer.__name__,
)
def steer(request):
    """One way to watch a breaker or to steer it."""
    return request.param


def test_watching_and_steering_use_any_other_storage_under_the_lock(steer, watched):
    """What belongs together is read, and written, at one moment."""
    breaker = CircuitBreaker(fail_max=2, state_storage=watched, success_threshold=2)
    watched.watch(count_lock(breaker))
    steer(breaker)
    assert [name for name, held in watched.used if not held] == []


class WatchedBreaker(CircuitBreaker):
    """Notes which attributes of the circuit, its state, its storage and its trial are
    read without the lock, and which attributes are written without it."""

    GUARDED = names_of_state() | names_of_storage() | names_of_trial()

    lock = None

    def __getattribute__(self, name):
        get = super().__getattribute__
        if name in WatchedBreaker.GUARDED and get("lock") is not None:
            if not get("lock").is_mine:
                get("read").append(name)
        return get(name)

    def __setattr__(self, name, value):
        if name[0] == "_" and name not in WRITTEN_AT_WILL and self.lock is not None:
            if not self.lock.is_mine:
                self.written.append(name)
        super().__setattr__(name, value)

    def watch(self):
        self.read, self.written = [], []
        self.lock = count_lock(self)


def test_watching_and_steering_use_the_breaker_under_the_lock(steer):
    """No change is lost that another thread makes at the same time."""
    breaker = WatchedBreaker(fail_max=2, success_threshold=2)
    breaker.watch()
    steer(breaker)
    assert breaker.read == []
    assert breaker.written == []


@pytest.mark.parametrize(
    "change",
    [
        lambda breaker: breaker.add_listener(Counts()),
        lambda breaker: breaker.add_listeners(Counts(), Counts()),
        lambda breaker: breaker.remove_listener(breaker.listeners[0]),
        lambda breaker: breaker.add_excluded_exception(KeyError),
        lambda breaker: breaker.add_excluded_exceptions(KeyError, OSError),
        lambda breaker: breaker.remove_excluded_exception(ValueError),
    ],
    ids=lambda change: change.__code__.co_names[0],
)
def test_a_list_is_read_and_written_in_one_step(change):
    """Two threads that change a list at the same time lose none of each other's
    changes."""

    class Steps(CountingLock):
        steps = 0

        def acquire(self, *args, **kwargs):
            self.steps += not self.is_mine
            return super().acquire(*args, **kwargs)

    breaker = CircuitBreaker(exclude=[ValueError], listeners=[Counts()])
    lock = put_lock(breaker, Steps(lock_of(breaker)))
    change(breaker)
    assert lock.steps == 1


def test_calls_change_the_breaker_under_the_lock(guard, boom, caplog):
    """The calls go from the first failure to the trial that closes the circuit again,
    with a listener and a predicate that raise."""

    class Grumbling(pybreaker.CircuitBreakerListener):
        def before_call(self, cb, func, *args, **kwargs):
            raise Exception("not now")

        def rejected(self, cb, func, *args, **kwargs):
            """With a listener of rejections, the breaker decides on them under the
            lock."""

    def work():
        if fails:
            raise boom

    def undecided(exc):
        raise Exception("not mine")

    breaker = WatchedBreaker(fail_max=1, exclude=[undecided], listeners=[Grumbling()])
    call = guard(breaker, work)
    breaker.watch()
    fails = True
    with pytest.raises(CircuitBreakerError):
        call()
    with pytest.raises(CircuitBreakerError):
        call()
    fails = False
    breaker.reset_timeout = 0
    del breaker.read[:]
    call()
    assert breaker.current_state == "closed"
    assert names_of_trial().isdisjoint(breaker.read)
    assert "not now" in caplog.text
    assert "not mine" in caplog.text
    assert breaker.written == []


def test_the_gate_looks_and_decides_at_one_moment():
    """No other thread moves the circuit in between."""

    class Watched(pybreaker.CircuitMemoryStorage):
        @property
        def state(self):
            looks.append(breaker is not None and breaker._lock.is_mine)
            return self._state

    looks, breaker = [], None
    breaker = CircuitBreaker(state_storage=Watched("closed"))
    count_lock(breaker)
    gate = breaker.state.before_call
    del looks[:]
    gate(int)
    assert looks
    assert all(looks)


class Chain(pybreaker.CircuitBreakerListener):
    """Remembers each transition that does not follow from the one before it."""

    def __init__(self, breaker):
        self.last, self.wrong, self.length = breaker.state, [], 0

    def state_change(self, cb, old_state, new_state):
        if old_state is not self.last or cb.state is not new_state:
            self.wrong.append((self.last, old_state, new_state, cb.state))
        self.last = new_state
        self.length += 1


def hammered(breaker, boom, seed):
    """Calls that succeed, fail and are given up, in turn."""
    chance = random.Random(seed)
    ran = itertools.count()

    def work(outcome):
        next(ran)
        if outcome:
            raise outcome

    admitted = rejected = 0
    for _ in range(300):
        outcome = chance.choice([None, None, boom, KeyboardInterrupt])
        try:
            breaker.call(work, outcome)
        except CircuitBreakerError as exc:
            admitted += exc.__cause__ is not None
            rejected += exc.__cause__ is None
        except (boom, KeyboardInterrupt):
            admitted += 1
        else:
            admitted += 1
    assert admitted + rejected == 300
    assert next(ran) == admitted


@pytest.mark.parametrize("storage", [None, DictStorage], ids=["memory", "own"])
def test_everything_can_be_set_while_calls_are_in_flight(hasty, boom, storage):
    """No call is lost or run twice, nothing is raised or told out of order, and in the
    end the breaker works as if nothing had happened."""
    breaker = CircuitBreaker(state_storage=storage and storage())
    chain = Chain(breaker)
    breaker.add_listener(chain)

    def keep(parameter, *values):
        for value in values * 40:
            setattr(breaker, parameter, value)

    def come_and_go():
        for _ in range(40):
            listener = Counts()
            breaker.add_listener(listener)
            breaker.add_excluded_exception(KeyError)
            breaker.remove_listener(listener)
            breaker.remove_excluded_exception(KeyError)

    def watch():
        for _ in range(100):
            assert breaker.retry_after >= 0.0
            assert breaker.current_state in ("closed", "open", "half-open")
            assert breaker.state.name in ("closed", "open", "half-open")
            assert breaker.fail_counter >= 0
            assert repr(breaker)

    results = all_at_once(
        *(functools.partial(hammered, breaker, boom, seed) for seed in range(6)),
        functools.partial(keep, "fail_max", 1, 5, 100),
        functools.partial(keep, "reset_timeout", 0, 0.001, 60),
        functools.partial(keep, "success_threshold", 1, 3),
        functools.partial(keep, "fail_counter", 0, 1),
        functools.partial(keep, "state", "open", "half-open", "closed"),
        functools.partial(keep, "name", "one", "other", None),
        come_and_go,
        watch,
    )
    assert results == [None] * len(results)
    assert chain.wrong == []
    assert chain.length >= 120

    breaker.fail_max, breaker.reset_timeout, breaker.success_threshold = 2, 60, 1
    breaker.close()
    for error in (boom, CircuitBreakerError):
        with pytest.raises(error):
            breaker.call(failing(boom, 1))
    assert (breaker.current_state, breaker.fail_counter) == ("open", 2)
    breaker.reset_timeout = 0
    assert breaker.call(abs, -1) == 1
    assert breaker.current_state == "closed"


def test_a_setting_counts_for_calls_that_are_in_flight(guard, boom):
    """What is set when a call ends decides, not what was set when it began."""
    breaker = CircuitBreaker(fail_max=1)

    def work():
        breaker.fail_max = 2
        raise boom

    with pytest.raises(boom):
        guard(breaker, work)()
    assert breaker.fail_counter == 1

    def work_again():
        breaker.fail_max, breaker.fail_counter = 9, 8
        raise boom

    with pytest.raises(CircuitBreakerError):
        guard(breaker, work_again)()
    assert (breaker.current_state, breaker.fail_counter) == ("open", 9)


def test_a_limit_set_below_the_count_opens_the_circuit_with_the_next_failure(
    guard, fail
):
    """Setting the limit opens nothing by itself."""
    breaker = CircuitBreaker(fail_max=9)
    breaker.fail_counter = 5
    breaker.fail_max = 3
    assert breaker.current_state == "closed"
    with pytest.raises(CircuitBreakerError):
        guard(breaker, fail)()
    assert breaker.current_state == "open"
