"""The scheduler itself: which orders it runs, what it finds, what it leaves behind."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import sys
import threading
import types

import pytest
from scheduler import Scheduler, explore, needs_monitoring
from support import PATIENCE

pytestmark = needs_monitoring

COUNTER = types.ModuleType("counter")
exec(
    compile(
        """
class Counter:
    def __init__(self):
        self.value = 0
    def add(self):
        value = self.value
        value += 1
        self.value = value
    def add_other(self):
        self.other = 1
        self.other += 1
    def add_often(self):
        while True:
            self.value += 1
    def add_twice(self, first, second):
        with first:
            self.value += 1
            with second:
                self.value += 1
""",
        "<counter>",
        "exec",
    ),
    vars(COUNTER),
)


def trails_of_a_counter(preemptions, *, locked, threads=2, alike=()):
    """The orders of the threads' steps, and the sum that each comes to."""
    with Scheduler(threads, "<counter>") as scheduler:

        def run(schedule):
            nonlocal counter
            counter = COUNTER.Counter()
            lock = scheduler.lock() if locked else contextlib.nullcontext()

            def add():
                with lock:
                    counter.add()

            assert scheduler.run([add] * threads, schedule) == [None] * threads
            return scheduler.trail

        counter = None
        return [
            (tuple(chosen for _, chosen, *_ in scheduler.trail), counter.value)
            for _ in explore(run, preemptions, alike)
        ]


def test_every_order_is_run_and_each_once():
    """Without a limit there are as many orders as ways to merge the threads' steps."""
    orders = [order for order, _ in trails_of_a_counter(math.inf, locked=False)]
    # Each thread has a beginning and two steps that touch an attribute, and
    # after the first thread's end there is one more decision, with no choice.
    assert len(set(orders)) == len(orders) == math.factorial(6) // 6**2


def orders_of_two(uses=("a", "b"), opcodes=True, tells=True):
    """The orders in which two threads say what they use, after each has counted in an
    attribute of its own: a list of one for each schedule that was run."""
    found = []
    with Scheduler(2, "<counter>", opcodes, tells=tells) as scheduler:

        def run(schedule):
            counter, order = COUNTER.Counter(), []

            def work(add, use):
                add()
                scheduler.touch(*use)
                order.append(use)

            adds = counter.add, counter.add_other
            programs = [functools.partial(work, *each) for each in zip(adds, uses)]
            assert scheduler.run(programs, schedule) == [None, None]
            assert (counter.value, counter.other) == (1, 2)
            found.append(tuple(order))
            return scheduler.trail

        for _ in explore(run, math.inf):
            pass
    return found


def test_of_orders_that_must_come_to_the_same_few_are_run():
    """Where two threads use nothing in common, two orders are run."""
    assert len(orders_of_two()) == 2
    # Else all are run: of 3 steps and 4 where each instruction is one, or 3 and 3.
    assert len(orders_of_two(tells=False)) == math.comb(7, 3)
    assert len(orders_of_two(opcodes=False)) == math.comb(6, 3)


@pytest.mark.parametrize("uses", ["aa", ("", "a"), ("", "")])
def test_what_uses_the_same_is_run_in_every_order(uses):
    """A step that does not say what it uses may use anything."""
    assert set(orders_of_two(uses)) == {(*uses,), (*reversed(uses),)}


def test_a_thread_that_is_none_of_its_own_is_left_alone():
    """A thread of another test, such as a courier, may run the watched code, too."""
    mine, others, seen = COUNTER.Counter(), COUNTER.Counter(), threading.Event()

    def count():
        for _ in range(1000):
            others.add()
        seen.set()

    with Scheduler(1, "<counter>") as scheduler:

        def program():
            threading.Thread(target=count).start()
            assert seen.wait(PATIENCE)
            mine.add()

        assert scheduler.run([program], {}) == [None]
        assert scheduler.stuck is None
        assert len(scheduler.trail) == 3  # the beginning, a look and a write
    assert others.value == 1000


def test_of_threads_that_do_the_same_the_first_begins_first():
    """All other orders are these with the threads' numbers exchanged."""
    every = {order for order, _ in trails_of_a_counter(2, locked=False, threads=3)}
    orders = [
        order
        for order, _ in trails_of_a_counter(2, locked=False, threads=3, alike="aaa")
    ]
    exchanged = {
        tuple(numbers[thread] for thread in order)
        for order in orders
        for numbers in itertools.permutations(range(3))
    }
    assert exchanged == every
    assert len(every) == 6 * len(orders)


def test_threads_that_differ_begin_in_any_order():
    """Only threads with the same label are exchanged."""
    every = trails_of_a_counter(2, locked=False, threads=3)
    assert trails_of_a_counter(2, locked=False, threads=3, alike="abc") == every
    some = trails_of_a_counter(2, locked=False, threads=3, alike="aab")
    assert 2 * len(some) == len(every)
    assert {order[0] for order, _ in some} == {0, 2}


def test_a_lost_update_takes_one_preemption():
    """Two threads in turn count to two; a thread that is interrupted loses a count."""
    assert {total for _, total in trails_of_a_counter(0, locked=False)} == {2}
    assert {total for _, total in trails_of_a_counter(1, locked=False)} == {1, 2}


def test_a_lock_keeps_the_others_out():
    """Threads that wait go on when the lock is free, and so nothing is lost."""
    totals = [total for _, total in trails_of_a_counter(2, locked=True, threads=3)]
    assert set(totals) == {3}
    assert len(totals) > 10


def test_a_deadlock_is_found():
    """Two locks that are taken in different orders are found out, not waited for."""
    with Scheduler(2, "<counter>") as scheduler:

        def run(schedule):
            add, first, second = (
                COUNTER.Counter().add_twice,
                scheduler.lock(),
                scheduler.lock(),
            )
            scheduler.run(
                [lambda: add(first, second), lambda: add(second, first)], schedule
            )
            return scheduler.trail

        reasons = {scheduler.stuck for _ in explore(run, 1)}
    assert reasons == {None, "deadlock: 2 of the threads wait for ever"}


def test_a_lock_that_is_kept_is_found():
    """A thread that ends with the lock held leaves the other one waiting."""
    with Scheduler(2, "<counter>") as scheduler:
        lock = scheduler.lock()
        scheduler.run([lock.acquire, lock.acquire], {})
        assert scheduler.stuck == "deadlock: 1 of the threads wait for ever"


def test_a_thread_that_never_ends_is_ended():
    """After so many steps a run is given up, and the next one works."""
    with Scheduler(2, "<counter>", patience=100) as scheduler:
        counter = COUNTER.Counter()
        scheduler.run([counter.add_often, counter.add], {})
        assert scheduler.stuck == "no end after 100 steps"
        counter = COUNTER.Counter()
        scheduler.run([counter.add, counter.add], {})
        assert scheduler.stuck is None
        assert len(scheduler.trail) > 4


def monitoring_tools():
    return [sys.monitoring.get_tool(number) for number in range(6)]


def test_a_scheduler_leaves_nothing_behind():
    """No thread is left, and no tool identifier of sys.monitoring stays taken."""
    tools, running = monitoring_tools(), threading.active_count()
    trails_of_a_counter(1, locked=True)
    assert monitoring_tools() == tools
    assert threading.active_count() == running
