"""Processes that share a circuit through Redis, without Redis, processes and threads.

Nothing happens by itself: a courier makes a pass when a test says so, and the test
moves the clock. Redis is a table of the circuit's keys. Tests use the private names of
the storage through this module only.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
import types
from datetime import datetime, timezone

import redis

import pybreaker
from pybreaker import CircuitBreaker, CircuitBreakerError, CircuitRedisStorage
from pybreaker_extras import redis as shared

REFRESH = 4.0  # seconds
EPOCH = 1_600_000_000  # the Unix time at which the tests' clocks are 0
LibrarysCourier = shared._Courier
waiter, claim, view = shared._waiter, shared._Claim, shared._View
at_exit, before_fork = shared._at_exit, shared._before_fork
after_fork_in_parent = shared._after_fork_in_parent
after_fork_in_child = shared._after_fork_in_child


class Alias:
    """A public name of an attribute."""

    def __init__(self, name):
        self.name = name

    def __get__(self, owner, cls):
        return self if owner is None else getattr(owner, self.name)

    def __set__(self, owner, value):
        setattr(owner, self.name, value)


class OpenCourier(LibrarysCourier):
    """The library's courier, with public names for tests of its threads."""

    carry, watch, threads = Alias("_carry"), Alias("_watch"), Alias("_threads")
    signals, over = Alias("_signals"), Alias("_over")
    is_stopping = Alias("_is_stopping")


class OpenLink(shared._Link):
    """The library's link, with public names for tests of its event loop."""

    own, loop = Alias("_own"), Alias("_loop")


def trial_of(breaker):
    """The block of a call that has been admitted as a trial and has begun."""
    block = breaker.calling()
    block.__enter__()
    return block


def ends(block, exc=None):
    with contextlib.suppress(CircuitBreakerError):
        block.__exit__(exc and type(exc), exc, None)


def let_no_thread_wait(monkeypatch, wait):
    """The storage's events call `wait` with the timeout and return at once."""

    class Event(threading.Event):
        def wait(self, timeout=None):
            if not self.is_set():
                wait(timeout)
            return self.is_set()

    replace(monkeypatch, "threading", Event=Event)


def replace(monkeypatch, module, **names):
    """Replace these names in a module as the storage sees the module."""
    real = getattr(shared, module)
    fake = types.SimpleNamespace(**{**vars(real), **names})
    monkeypatch.setattr(shared, module, fake)
    return fake


def set_clock(monkeypatch, clock):
    """Give the shared storage and the memory storage the test's clock, which may begin
    near zero, as the clock of a machine may."""
    clock.now = 5.0
    fake = types.SimpleNamespace(monotonic=lambda: clock.monotonic(), sleep=time.sleep)
    monkeypatch.setattr(shared, "time", fake)

    class Datetime(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.fromtimestamp(EPOCH + clock.now, timezone.utc)

    for module in (pybreaker, shared):
        monkeypatch.setattr(module, "datetime", Datetime)
    return fake


def leave_alone(monkeypatch):
    """Hide the couriers that other tests have left."""
    monkeypatch.setattr(shared, "_couriers", {})


def carry_by_hand(monkeypatch):
    """Give couriers no threads: a courier makes a pass when a test says so."""
    monkeypatch.setattr(shared, "_Courier", Courier)


def let_redis_be_silent(setattr=setattr):
    """From now on no courier takes Redis for lost because an answer is late."""
    setattr(LibrarysCourier, "_notice_silence", lambda self: None)


# The classes whose objects threads share.
WRITERS = (
    *(CircuitRedisStorage, shared._Outbox, shared._Membership, shared._Claim),
    *(shared._Exchange, pybreaker.CircuitMemoryStorage),
)


def couriers_of_old_worlds_are_gone():
    """Forget all couriers: a client of a new world may have the id of a client of an
    old world."""
    shared._couriers.clear()


def gate():
    return shared._gate


def set_gate(monkeypatch, gate):
    """Replace the lock that is held where a courier begins or ends."""
    monkeypatch.setattr(shared, "_gate", gate)
    return gate


def mutex_of(storage):
    return storage._mutex


def set_mutex(storage, mutex):
    storage._mutex = mutex


def couriers():
    return list(shared._couriers.values())


def stop_couriers():
    """Let all couriers end."""
    with shared._gate:
        for courier in couriers():
            courier.stop()


def courier_of(storage):
    return storage._courier


def let_openings_fail(monkeypatch):
    """Interrupt every storage that follows an opening of another process."""

    def interrupted(*_):
        raise RuntimeError("interrupted")

    monkeypatch.setattr(shared._Opening, "at", interrupted)


def go_at_once(storage):
    """Ask the courier for an exchange, even if there is nothing to send. Returns an
    event that is set afterwards."""
    return storage._notify_when_sent()


def shared_state(storage):
    """The objects of a storage that several threads change, apart from the counts."""
    return storage._outbox, storage._membership


def outbox(storage):
    return storage._outbox


def unconfirmed(storage):
    """The trip that a view may still confirm."""
    return storage._membership.unconfirmed


def ask(storage, timeout=60, hear=int):
    """A claim. No call waits for the answer."""
    return storage._ask(timeout, hear)


def give_back(storage, claim):
    storage._give_back(claim)


def is_due(storage):
    """Whether the next pass takes the storage at once."""
    return storage._due_at() == -math.inf


class Redis:
    """The keys of one circuit, with the test's clock."""

    def __init__(self, clock):
        self.clock = clock
        self.texts = {}
        self.lapses = {}  # by key, when the value lapses

    def __getitem__(self, key):
        """The present value of a key, or None."""
        if self.lapses.get(key, math.inf) <= self.clock.now:
            self.remove(key)
        return self.texts.get(key)

    def remove(self, key):
        self.lapses.pop(key, None)
        return self.texts.pop(key, None)

    def does(self, name, key, *words):
        text = self[key]
        if isinstance(text, list) and name in ("GET", "INCRBY"):
            return redis.ResponseError("WRONGTYPE it is a list")
        if name == "GET":
            return text if text is None else str(text).encode()
        if name == "PTTL":
            left = self.lapses.get(key, self.clock.now - 0.001) - self.clock.now
            return -2 if text is None else round(1000 * left)
        return getattr(self, name.lower())(key, text, *words)

    def set(self, key, text, new, *words):
        if "NX" in words and text is not None:
            return None
        self.remove(key)
        self.texts[key] = str(new)
        if "PX" in words:
            self.pexpire(key, new, words[-1])
        return True

    def incrby(self, key, text, amount):
        try:
            if abs(int(text or 0)) >= 2**63:
                raise ValueError
        except ValueError:
            return redis.ResponseError("value is not an integer or out of range")
        self.texts[key] = str(int(text or 0) + amount)
        return int(self.texts[key])

    def pexpire(self, key, text, milliseconds):
        if text is not None:
            self.lapses[key] = self.clock.now + milliseconds / 1000

    def __delitem__(self, key):
        self.remove(key)

    # The command is called DEL, which is a keyword of Python.
    locals()["del"] = lambda self, key, text: self.remove(key)


class Client:
    """The client of one process."""

    def __init__(self, keys):
        self.keys = keys
        self.trouble = None  # an error that each pipeline raises
        self.refusal = None  # the reply to each write
        self.meanwhile = None  # a function that runs once before an answer arrives
        self.seconds = 0.0  # seconds that each answer takes
        self.sent = []
        self.passes = self.times = 0

    def execute_command(self, *words):
        raise AssertionError("commands are sent together")

    def time(self):
        self.times += 1
        if self.trouble:
            raise self.trouble
        return int(self.keys.clock.now), int(self.keys.clock.now % 1 * 1e6)

    def pipeline(self, transaction):
        assert not transaction
        commands = []

        def execute_command(name, key, *words, NEVER_DECODE):
            commands.append((name, key.rpartition(":")[2], *words))

        def execute(raise_on_error):
            assert not raise_on_error
            self.passes += 1
            self.keys.clock.advance(self.seconds)
            if self.trouble:
                self.interrupted()
                raise self.trouble
            replies = list(map(self.reply, commands))
            self.interrupted()
            return replies

        return types.SimpleNamespace(execute_command=execute_command, execute=execute)

    def reply(self, command):
        self.sent.append(command)
        if self.refusal and command[0] not in ("GET", "PTTL"):
            return self.refusal
        return self.keys.does(*command)

    def interrupted(self):
        meanwhile, self.meanwhile = self.meanwhile, None
        if meanwhile is not None:
            meanwhile()

    def sent_to(self, key):
        """The commands that write to a key."""
        return [
            (name, *words)
            for name, about, *words in self.sent
            if about == key and name not in ("GET", "PTTL")
        ]


class Courier(LibrarysCourier):
    """A courier without threads. If a thread would wait for an answer, wake() makes the
    passes."""

    def __init__(self, client):
        super().__init__(client)
        self.done = []
        self.is_quick = True
        self.is_passing = False

    def wake(self, storage):
        self._kept[id(storage)] = storage
        self.done.append("wake")
        for _ in range(3):
            if not self.is_quick or self.is_passing:
                return
            boxes = [outbox(storage) for storage in self.storages()]
            if not any(box.waiting or box.asked for box in boxes):
                return
            self.go()

    def go(self):
        """Make a pass with all storages."""
        self._next_round = -math.inf
        self.is_passing = True
        try:
            self.looks_after_its_storages()
            return self.make_pass()
        finally:
            self.is_passing = False

    def looks_after_its_storages(self):
        """Whether the courier has storages, as the courier asks before each pass."""
        return self._goes_on(threading.Event())

    def start(self):
        self.done.append("start")

    def stop(self):
        self.done.append("stop")

    def wait(self, end):
        self.done.append(("wait", end))


class Process:
    """A process's breaker, storage and client."""

    def __init__(
        self,
        keys,
        fail_max=3,
        reset_timeout=60,
        success_threshold=1,
        trouble=None,
        refresh=REFRESH,
        **settings,
    ):
        self.client = Client(keys)
        self.client.trouble = trouble
        self.storage = CircuitRedisStorage(
            settings.pop("state", "closed"), self.client, refresh=refresh, **settings
        )
        self.courier = courier_of(self.storage)
        self.breaker = CircuitBreaker(
            fail_max,
            reset_timeout,
            success_threshold=success_threshold,
            state_storage=self.storage,
        )

    def makes_passes(self, times=1):
        for _ in range(times):
            idle_time = self.courier.go()
        return idle_time

    def is_cut_off(self, why="gone"):
        self.client.trouble = redis.ConnectionError(why)
        self.makes_passes()

    def is_back(self):
        self.client.trouble = None
        self.makes_passes()

    @property
    def state(self):
        return self.breaker.current_state


def agree(processes):
    """Let each process make passes until all has been sent, and check that all agree
    with Redis. The clock moves."""
    for process in processes:
        process.client.trouble = process.client.refusal = None
        process.client.meanwhile = None
    for _ in range(4):
        processes[0].client.keys.clock.advance(REFRESH)
        for process in processes:
            process.makes_passes(3)
    for process in processes:
        check(process)


def check(process):
    assert math.isclose(process.makes_passes(), REFRESH)  # there is nothing to send
    storage, keys = process.storage, process.client.keys
    with mutex_of(storage):
        is_apart = storage._membership.is_apart
    if is_apart:  # the process opened by a count that was gone later
        assert process.state != "closed"
        return
    if process.state != "half-open" or keys["state"] != "open":
        # (an open circuit is half-open in the process that runs its trials)
        assert process.state == keys["state"]
    assert storage.counter == int(keys["fail_counter"] or 0)
    assert storage.success_counter == int(keys["success_counter"] or 0)
    if process.state == "open":
        now, opened_at = keys.clock.now, keys["opened_at"]
        age = math.inf if opened_at is None else max(0, now - int(opened_at))
        assert age - 0.001 <= storage.open_for() <= age + 1.001
