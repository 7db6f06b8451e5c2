"""Processes that share a circuit through Redis, without Redis, processes and threads.

Nothing happens by itself: a process's errands are run when a test says so, and the
clock is moved. Redis is a table of the circuit's keys.
"""

from __future__ import annotations

import contextlib
import math
import threading
import types
import weakref

import redis

import pybreaker
from pybreaker import CircuitBreaker, CircuitBreakerError, CircuitRedisStorage

REFRESH = 4.0  # seconds


def trial_of(breaker):
    """A call that is admitted as a trial, and begun."""
    block = breaker.calling()
    block.__enter__()
    return block


def ends(block, exc=None):
    with contextlib.suppress(CircuitBreakerError):
        block.__exit__(exc and type(exc), exc, None)


def let_nobody_wait(monkeypatch, wait):
    """The library's events call this with their timeout, and wait for nothing."""

    class Event(threading.Event):
        def wait(self, timeout=None):
            if not self.is_set():
                wait(timeout)
            return self.is_set()

    fake = types.SimpleNamespace(**{**vars(threading), "Event": Event})
    monkeypatch.setattr(pybreaker, "threading", fake)


def leave_alone(monkeypatch):
    """There are no storages and breakers that other tests have left."""
    for name in ("_couriered", "_breakers"):
        monkeypatch.setattr(pybreaker, name, weakref.WeakValueDictionary())


class Redis:
    """The keys of one circuit, and a clock that goes with the test's."""

    def __init__(self, clock):
        self.clock = clock
        self.texts = {}
        self.lapses = {}  # when keys do, by the clock

    def __getitem__(self, key):
        """What is there now."""
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

    # The command is called like that.
    locals()["del"] = lambda self, key, text: self.remove(key)


class Client:
    """A process's way to it."""

    def __init__(self, keys):
        self.keys = keys
        self.trouble = None  # is raised, instead of an answer
        self.refusal = None  # is the answer to each write
        self.meanwhile = None  # is called once, while an answer is on its way
        self.seconds = 0.0  # that answers take
        self.sent = []
        self.looks = self.times = 0

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
            self.looks += 1
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
        """The commands about a key, other than those that look."""
        return [
            (name, *words)
            for name, about, *words in self.sent
            if about == key and name not in ("GET", "PTTL")
        ]


class Courier:
    """Takes the place of the library's: who waits for it is waited for by it."""

    def __init__(self, storage):
        self.storage = weakref.ref(storage)
        self.done = []
        self.is_quick = True
        self.is_under_way = False

    def wake(self):
        self.done.append("wake")
        storage = self.storage()
        for _ in range(3):
            if not self.is_quick or self.is_under_way:
                return
            if not storage._waiting and not storage._unasked:
                return
            self.run_errands()

    def run_errands(self):
        self.is_under_way = True
        try:
            return self.storage()._run_errands()
        finally:
            self.is_under_way = False

    def start(self):
        self.done.append("start")

    def stop(self):
        self.done.append("stop")

    def wait(self, end):
        self.done.append(("wait", end))


class Process:
    """A breaker, with its storage and its client."""

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
        self.courier = self.storage._courier
        self.breaker = CircuitBreaker(
            fail_max,
            reset_timeout,
            success_threshold=success_threshold,
            state_storage=self.storage,
        )

    def runs_errands(self, times=1):
        for _ in range(times):
            leisure = self.courier.run_errands()
        return leisure

    def is_cut_off(self, why="gone"):
        self.client.trouble = redis.ConnectionError(why)
        self.runs_errands()

    def is_back(self):
        self.client.trouble = None
        self.runs_errands()

    @property
    def state(self):
        return self.breaker.current_state


def agree(processes):
    """Let each of them run its errands until there are none, and see that all say what
    Redis says. Time passes."""
    for process in processes:
        process.client.trouble = process.client.refusal = None
        process.client.meanwhile = None
    for _ in range(4):
        processes[0].client.keys.clock.advance(REFRESH)
        for process in processes:
            process.runs_errands(3)
    for process in processes:
        check(process)


def check(process):
    assert process.runs_errands() == REFRESH
    storage, keys = process.storage, process.client.keys
    if storage._apart:  # it has opened by a count that did not stand
        assert process.state != "closed"
        return
    if process.state != "half-open" or keys["state"] != "open":
        # (between two trials an open circuit is half-open where they run)
        assert process.state == keys["state"]
    assert storage.counter == int(keys["fail_counter"] or 0)
    assert storage.success_counter == int(keys["success_counter"] or 0)
    if process.state == "open":
        now, opened_at = keys.clock.now, keys["opened_at"]
        age = math.inf if opened_at is None else max(0, now - int(opened_at))
        assert age - 0.001 <= storage.open_for() <= age + 1.001
