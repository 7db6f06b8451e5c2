"""A shared circuit's calls and its courier, in every order of their turns.

One thread makes calls and moves in a process; another thread makes passes to Redis.
`scheduler` runs the two one instruction at a time, in every order with one preemption.
Each order must have an outcome that is also possible if the threads take turns only
where the storage's lock is released, where Redis has answered, and where a thread
waits. So whatever a thread does with the lock held happens at one moment. In the end
the process agrees with Redis.

With ``PYBREAKER_DEEP=1`` the orders with two preemptions between lines run as well.
These tests need Python 3.12.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import re
from dataclasses import dataclass

import pytest
import stepwise
from scheduler import (
    NAMES,
    Lock,
    Scheduler,
    explore,
    needs_monitoring,
    parsed,
    written,
    written_names,
)
from stepwise import (
    REFRESH,
    Process,
    Redis,
    check,
    ends,
    let_no_thread_wait,
    trial_of,
)
from support import DEEP, Boom, fail

import pybreaker
from pybreaker import CircuitBreakerError

pytestmark = [needs_monitoring, pytest.mark.long]

PREEMPTIONS = 2 if DEEP else 1
TIMEOUT = 60.0


@dataclass(frozen=True)
class Scenario:
    """The steps before the race, and the steps of the thread that races with the
    passes, as names of methods of `World`."""

    name: str
    before: str
    race: str

    def __str__(self):
        return self.name


class Mutex(Lock):
    """The storage's mutex. A thread that releases the mutex lets the other thread
    run."""

    def __exit__(self, *_):
        self.release()
        self._scheduler.step()


class NoMutex(Mutex):
    """A mutex that excludes no thread."""

    def acquire(self):
        return True

    __enter__ = acquire

    def release(self):
        """Release nothing."""


class World:
    """Two processes, and the steps that run in them."""

    def __init__(self, scenario, scheduler, clock, mutex):
        clock.now = 5.0
        stepwise.couriers_of_old_worlds_are_gone()
        self.clock = clock
        self.step = clock.step = scheduler.step
        self.keys = Redis(clock)
        self.mine = Process(self.keys, fail_max=2, reset_timeout=TIMEOUT)
        self.breaker = self.mine.breaker
        self.block = None
        self.heard = []
        self.breaker.add_listener(Listener(self.heard))
        self.do(scenario.before)
        self.mine.courier.is_quick = False
        self.mine.client.interrupted = scheduler.step
        stepwise.set_mutex(self.mine.storage, mutex(scheduler))
        self.breaker._lock = Lock(scheduler)
        self.results = {}

    @functools.cached_property
    def theirs(self):
        return Process(self.keys, fail_max=2, reset_timeout=TIMEOUT)

    def do(self, words):
        return tuple([getattr(self, word)() for word in words.split()])

    def boom(self):
        self.step()
        raise Boom

    def fails(self):
        try:
            self.breaker.call(self.boom)
        except (Boom, CircuitBreakerError) as exc:
            return type(exc).__name__

    def succeeds(self):
        with contextlib.suppress(CircuitBreakerError):
            return self.breaker.call(self.step)

    def opens(self):
        self.breaker.open()

    def closes(self):
        self.breaker.close()

    def half_opens(self):
        self.breaker.half_open()

    def counts_nothing(self):
        self.breaker.fail_counter = 0

    def enters(self):
        try:
            self.block = trial_of(self.breaker)
        except CircuitBreakerError:
            return "rejected"

    def leaves(self, exc=None):
        if self.block is not None:
            ends(self.block, exc)

    def leaves_failing(self):
        self.leaves(Boom())

    def leaves_abandoned(self):
        self.leaves(GeneratorExit())

    def passes(self):
        self.mine.makes_passes()

    def they_fail(self):
        fail(self.theirs.breaker)
        self.theirs.makes_passes()

    def they_succeed(self):
        self.theirs.makes_passes()
        self.theirs.breaker.call(int)
        self.theirs.makes_passes()

    def they_open(self):
        self.theirs.breaker.open()
        self.theirs.makes_passes()

    def they_close(self):
        self.theirs.breaker.close()
        self.theirs.makes_passes()

    def is_cut_off(self):
        self.mine.client.trouble = ConnectionError("gone")

    def is_mended(self):
        self.mine.client.trouble = None

    def waits(self):
        self.clock.advance(REFRESH)

    def expires(self):
        self.clock.advance(TIMEOUT)

    def seen(self):
        storage = self.mine.storage
        return (
            self.mine.state,
            storage.counter,
            storage.success_counter,
            storage.open_for() if storage.state == "open" else None,
        )

    def outcome(self):
        """The outcome of the race, at once and after all has been sent."""
        found = [tuple(sorted(self.results.items())), self.seen()]
        self.is_mended()
        for _ in range(2):  # the second pass confirms a count
            self.waits()
            self.mine.makes_passes(2)
        check(self.mine)
        names = "state", "fail_counter", "success_counter", "opened_at"
        found += [self.seen(), tuple(map(self.keys.__getitem__, names))]
        found += [self.keys["trial"] is None, tuple(self.heard)]
        return tuple(found)


class Listener(pybreaker.CircuitBreakerListener):
    def __init__(self, heard):
        self.heard = heard

    def state_change(self, cb, old_state, new_state):
        self.heard.append((old_state.name, new_state.name))


@functools.cache
def shared_names():
    """The names of the attributes that a storage and its claims write, and of the
    lock."""
    names = {"_mutex", "_lock"}
    for each in stepwise.WRITERS:
        names |= written_names(compile(inspect.getsource(each), "<class>", "exec"))
    return names


class Race:
    """Runs a scenario again and again, by steps of the library or by whole moments."""

    def __init__(self, scenario, clock, steps="lines", mutex=Mutex):
        self.scenario = scenario
        self.clock = clock
        self.mutex = mutex
        self.scheduler = Scheduler(
            2,
            None if steps == "moments" else stepwise.shared.__file__,
            opcodes=steps == "instructions",
            shared=shared_names(),
        )

    def __enter__(self):
        self.scheduler.__enter__()
        return self

    def __exit__(self, *_):
        self.scheduler.__exit__()

    def run(self, schedule):
        """Run it by the schedule, set `outcome`, and return the trail."""
        world = self.world = World(
            self.scenario, self.scheduler, self.clock, self.mutex
        )
        both = self.scenario.race, "passes"
        programs = [functools.partial(world.do, each) for each in both]
        results = self.scheduler.run(programs, schedule)
        trail = self.scheduler.trail
        world.results = dict(zip(NAMES, results))
        try:
            assert not self.scheduler.stuck
            for result in results:
                if isinstance(result, BaseException):
                    raise result
            self.outcome = world.outcome()
        except Exception as exc:
            exc.add_note(self.replay(schedule))
            raise
        return trail

    def replay(self, schedule):
        return f'replay("{self.scenario}", "{written(schedule)}")'


@pytest.fixture
def clock(clock, monkeypatch):
    """One of a world where who would wait lets others in, and does not."""
    let_no_thread_wait(monkeypatch, lambda timeout: clock.step())
    stepwise.leave_alone(monkeypatch)
    stepwise.carry_by_hand(monkeypatch)
    stepwise.set_clock(monkeypatch, clock)
    return clock


S = Scenario
SCENARIOS = [
    S("a failure", "", "fails"),
    S("a trip", "fails passes", "fails"),
    S("a trip during an exchange", "fails", "fails"),
    S("a trip against news of failures", "they_fail", "fails"),
    S("a trip against news of an opening", "fails they_open", "fails"),
    S("a success", "fails", "succeeds"),
    S("a success against news of failures", "they_fail passes", "succeeds"),
    S("a count that is set", "fails", "counts_nothing"),
    S("an opening", "", "opens"),
    S("an opening against news", "opens passes they_close", "opens"),
    S("a closing against news", "they_open", "closes"),
    S("two moves", "", "opens closes"),
    S("two openings", "opens waits", "opens"),
    S("a half-opening against news", "they_open", "half_opens"),
    S("a trip that is judged against a closing", "fails fails passes waits", "closes"),
    S("a trip that is judged against an opening", "fails fails passes waits", "opens"),
    S(
        "a trip that does not stand",
        "fails fails passes they_succeed waits",
        "half_opens",
    ),
    S("a trial", "opens passes expires", "enters"),
    S("a trial against news", "opens passes expires they_close", "enters"),
    S("a trial's success", "opens passes expires enters", "leaves"),
    S("a trial's failure", "opens passes expires enters", "leaves_failing"),
    S("a trial given up", "opens passes expires enters", "leaves_abandoned"),
    S(
        "a trial's success against news",
        "opens passes expires enters they_open",
        "leaves",
    ),
    S("a failure while Redis goes away", "fails is_cut_off", "fails"),
    S("a success while Redis goes away", "fails is_cut_off", "succeeds"),
    S("a move while Redis goes away", "opens is_cut_off", "closes"),
    S("a trial while Redis goes away", "opens passes expires is_cut_off", "enters"),
    S(
        "a failure while Redis comes back",
        "is_cut_off fails passes is_mended",
        "fails",
    ),
    S(
        "a success while Redis comes back",
        "is_cut_off fails passes is_mended",
        "succeeds",
    ),
    S("a move while Redis comes back", "is_cut_off passes is_mended", "opens"),
]


LOST_WITHOUT_THE_LOCK = [
    "a failure",
    "a trip",
    "an opening against news",
    "a failure while Redis goes away",
    "a trial while Redis goes away",
]
STEPS = ["instructions", "lines"] if DEEP else ["instructions"]


@functools.cache
def possible(scenario, clock):
    """All outcomes that are possible if the threads take turns only between moments."""
    found = set()
    with Race(scenario, clock, "moments") as race:
        for _ in explore(race.run, math.inf if DEEP else 3):
            found.add(race.outcome)
    return found


def orders(scenario, clock, steps="lines", **version):
    """Run the scenario in all orders, and check that each outcome is possible. Returns
    the number of orders."""
    expected = possible(scenario, clock)
    count = 0
    with Race(scenario, clock, steps, **version) as race:
        preemptions = 1 if steps == "instructions" else PREEMPTIONS
        for schedule in explore(race.run, preemptions):
            count += 1
            assert race.outcome in expected, race.replay(schedule)
    return count


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("scenario", SCENARIOS, ids=str)
def test_steps_with_the_lock_held_happen_at_one_moment(
    scenario, steps, clock, record_property
):
    """No order of steps has an outcome that no order of whole moments has."""
    count = orders(scenario, clock, steps)
    record_property("schedules", [scenario.name, count])


class Unlocked(BaseException):
    """A thread used a shared object without the lock."""


class Watched(pybreaker.CircuitRedisStorage):
    """Checks that the lock is held, once the scheduler runs the threads."""

    # These attributes are read with the lock held, too.
    to_do = {"_outbox", "_claim", "_lapsing", "_membership"}
    known = {"_state", "_fail_counter", "_success_counter", "_opening"}
    known |= {"_view", "_last_move"}

    def __getattribute__(self, name):
        own = super().__getattribute__
        if name in own("to_do"):
            own("has_the_lock_for")(name)
        return own(name)

    def __setattr__(self, name, value):
        if name in self.to_do | self.known:
            self.has_the_lock_for(name)
        super().__setattr__(name, value)

    def has_the_lock_for(self, name):
        mutex = vars(self).get("_mutex")
        if isinstance(mutex, Mutex) and not mutex.is_mine():
            raise Unlocked(name)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=str)
def test_objects_that_threads_share_are_used_with_the_lock_held(
    scenario, clock, monkeypatch
):
    """The rule holds also where a use without the lock would do no harm."""
    monkeypatch.setattr(stepwise, "CircuitRedisStorage", Watched)
    with Race(scenario, clock, "moments") as race:
        for _ in explore(race.run, 1):
            storage = race.world.mine.storage
            stepwise.go_at_once(storage)
            storage.opened_at = storage.opened_at
            stepwise.is_due(storage)
            # The second trial follows while the first claim is still being given back.
            claim = stepwise.ask(storage, TIMEOUT)
            race.world.passes()
            stepwise.give_back(storage, claim)
            stepwise.ask(storage, TIMEOUT)
            race.world.passes()


@pytest.mark.parametrize("name", LOST_WITHOUT_THE_LOCK)
def test_a_storage_without_a_lock_is_found_out(name, clock):
    """With a mutex that excludes no thread, the same races are lost."""
    with pytest.raises(AssertionError):
        orders(named(name), clock, mutex=NoMutex)


def test_a_race_that_was_lost_is_lost_again(clock):
    """The schedule that is printed for a lost race loses the race again."""
    with pytest.raises(AssertionError) as lost:
        orders(named("a failure"), clock, mutex=NoMutex)
    said = str(lost.value) + "".join(getattr(lost.value, "__notes__", ()))
    schedule = re.search('replay\\("a failure", "(.*?)"', said)[1]
    assert replay("a failure", schedule, clock, mutex=NoMutex)
    assert not replay("a failure", schedule, clock)


def replay(name, text, clock, **version):
    """Whether the race of that name is lost by a schedule such as "0:b 31:a"."""
    scenario = named(name)
    with Race(scenario, clock, **version) as race:
        try:
            race.run(parsed(text))
        except AssertionError:
            return True
        return race.outcome not in possible(scenario, clock)


def named(name):
    (scenario,) = (each for each in SCENARIOS if each.name == name)
    return scenario
