"""A process of the fleet, which makes a breaker over a storage and runs commands.

Each line on stdin is a JSON list of a command, its arguments and its keyword arguments.
The worker answers each with a line of JSON on stdout, and ends when stdin ends.
"""

from __future__ import annotations

import collections
import contextlib
import importlib
import json
import logging
import os
import sys
import threading
import time
import traceback
import types
from pathlib import Path

SETTINGS = {}
pybreaker = None  # is imported when the settings are known


def shift_clock(seconds):
    """Shift this process's wall clock, for all modules that are imported afterwards."""
    import datetime as module

    true_time = time.time
    time.time = lambda: true_time() + seconds

    class Datetime(module.datetime):
        @classmethod
        def now(cls, tz=None):
            return super().now(tz) + module.timedelta(seconds=seconds)

        @classmethod
        def utcnow(cls):
            return cls.now(module.timezone.utc).replace(tzinfo=None)

    module.datetime = Datetime


class Down(Exception):
    """The error of a service that is down."""


def mode():
    return Path(SETTINGS["service"], "mode").read_text()


def note(what):
    """Write the outcome of a call, its time, and the time at which the call began."""
    line = f"{time.monotonic()} {inside.call_began} {os.getpid()} {what}\n"
    with open(Path(SETTINGS["service"], "log"), "a") as log:
        log.write(line)  # in one piece, as it is short


inside = threading.local()


def ask():
    """The guarded function, which calls the service."""
    began = time.monotonic()
    note("in")
    try:
        while mode() == "hanging":
            time.sleep(0.01)
        if mode() == "down":
            raise Down
        return 0
    finally:
        note("out")
        inside.seconds = time.monotonic() - began


async def ask_async():
    import asyncio

    note("in")
    try:
        while mode() == "hanging":
            await asyncio.sleep(0.01)
        if mode() == "down":
            raise Down
        return 0
    finally:
        note("out")


def fail():
    raise Down


CALLS = {"ask": ask, "fail": fail, "ok": int}


def make_client():
    """The client of the kind that the settings name."""
    kind, port = SETTINGS.get("client", "redis"), SETTINGS["port"]
    options = SETTINGS.get("options", {})
    if kind == "redis":
        import redis

        return redis.Redis(port=port, **options)
    if kind == "redis.asyncio":
        import redis.asyncio

        return redis.asyncio.Redis(port=port, **options)
    if kind == "redis.cluster":
        import redis

        return redis.RedisCluster(host="127.0.0.1", port=port, **options)
    if kind == "valkey":
        import valkey

        return valkey.Valkey(port=port, **options)
    if kind == "valkey.asyncio":
        import valkey.asyncio

        return valkey.asyncio.Valkey(port=port, **options)
    raise ValueError(kind)


class Records(logging.Handler):
    """Remembers each log record and its time."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def emit(self, record):
        self.seen.append([record.levelname, record.getMessage(), time.monotonic()])


class Changes:
    """A listener that remembers the moves of the circuit and their times."""

    def __init__(self):
        self.seen = []

    def before_call(self, cb, func, *args, **kwargs):
        pass

    def success(self, cb):
        pass

    def failure(self, cb, exc):
        pass

    def state_change(self, cb, old_state, new_state):
        self.seen.append([time.monotonic(), old_state.name, new_state.name])


class Load:
    """Threads that make one call after another."""

    def __init__(self, breaker, threads=1, pause=0.01, what="ask"):
        self._breaker, self._pause, self._what = breaker, pause, CALLS[what]
        self._stopped = threading.Event()
        self.outcomes = collections.Counter()
        self.longest = 0.0  # seconds that the breaker has delayed a call
        self.oversleeping = 0.0  # seconds that the machine has delayed a thread
        self.strange = []
        runs = [self._run] * threads + [self._sleep]
        self._threads = [threading.Thread(target=run, daemon=True) for run in runs]
        for thread in self._threads:
            thread.start()

    def _run(self):
        while not self._stopped.wait(self._pause):
            self.call()

    def call(self):
        began = inside.call_began = time.monotonic()
        inside.seconds = 0.0
        try:
            self._breaker.call(self._what)
            outcome = "ok"
        except BaseException as exc:
            outcome = type(exc).__name__
            if not isinstance(exc, (Down, pybreaker.CircuitBreakerError)):
                self.strange.append(traceback.format_exc())
        held_up = time.monotonic() - began - inside.seconds
        self.longest = max(self.longest, held_up)
        self.outcomes[outcome] += 1

    def _sleep(self):
        # Measures how late a thread wakes that only the machine can delay.
        while not self._stopped.is_set():
            began = time.monotonic()
            time.sleep(0.01)
            late = time.monotonic() - began - 0.01
            self.oversleeping = max(self.oversleeping, late)

    def report(self):
        return {
            "outcomes": dict(self.outcomes),
            "longest": self.longest,
            "oversleeping": self.oversleeping,
            "strange": self.strange,
        }

    def stop(self):
        self._stopped.set()
        for thread in self._threads:
            thread.join(0.5)


class Commands:
    """The commands that a worker runs, one method each."""

    def __init__(self):
        self._records, self._changes = Records(), Changes()
        logger = logging.getLogger("pybreaker")
        logger.setLevel(logging.INFO)
        logger.addHandler(self._records)
        logger.propagate = False
        self._load = None
        self._client = make_client()
        began = time.monotonic()
        storage = pybreaker.CircuitRedisStorage(
            SETTINGS.get("state", "closed"),
            self._client,
            namespace=SETTINGS["namespace"],
            **SETTINGS.get("storage", {}),
        )
        self._construction = time.monotonic() - began
        self._breaker = pybreaker.CircuitBreaker(
            state_storage=storage,
            listeners=[self._changes],
            **SETTINGS.get("breaker", {}),
        )

    def ready(self):
        """The seconds that the making of the storage took."""
        return self._construction

    def version(self):
        """The version of the library, if the library is an installed one."""
        from importlib import metadata

        return metadata.version("pybreaker")

    def client_version(self):
        return sys.modules[type(self._client).__module__.partition(".")[0]].__version__

    def call(self, what="ask", times=1):
        """The outcomes of this many calls."""
        load = Load(self._breaker, threads=0, what=what)
        for _ in range(times):
            load.call()
        load.stop()
        return load.report()

    def call_async(self, timeout):
        """The outcome of a coroutine that is cancelled after this many seconds."""
        import asyncio

        async def main():
            inside.call_began = time.monotonic()
            await asyncio.wait_for(self._breaker.call_async(ask_async), timeout)

        try:
            asyncio.run(main())
            return "ok"
        except Exception as exc:
            return type(exc).__name__

    def call_async_until(self, state, timeout, pause):
        """Call until the circuit has the given state; returns how many calls were
        cancelled."""
        outcomes = collections.Counter()
        while self._breaker.current_state != state:
            outcomes[self.call_async(timeout)] += 1
            time.sleep(pause)
        return outcomes

    def stall(self, seconds):
        """The longest time for which an event loop stood still while the loop made
        calls."""
        import asyncio

        async def main():
            longest, end = 0.0, time.monotonic() + seconds
            calls = asyncio.ensure_future(self._keep_calling(end))
            while time.monotonic() < end:
                began = time.monotonic()
                await asyncio.sleep(0.001)
                longest = max(longest, time.monotonic() - began)
            await calls
            return longest

        return asyncio.run(main())

    async def _keep_calling(self, end):
        import asyncio

        while time.monotonic() < end:
            inside.call_began = time.monotonic()
            with contextlib.suppress(Down, pybreaker.CircuitBreakerError):
                await self._breaker.call_async(ask_async)
            await asyncio.sleep(0.005)

    def load(self, **how):
        self._load = Load(self._breaker, **how)

    def report(self):
        """The results of the load so far."""
        return self._load.report()

    def unload(self):
        self._load.stop()
        return self._load.report()

    def state(self):
        return self._breaker.current_state

    def look(self):
        """The circuit's state. Looking makes the breaker follow the storage and tell
        its listeners."""
        return self._breaker.state.name

    def see(self, *names):
        return [getattr(self._breaker, name) for name in names]

    def snapshot(self):
        return self._breaker.snapshot()

    def put(self, name, value):
        setattr(self._breaker, name, value)

    def do(self, move):
        getattr(self._breaker, move)()

    def move(self, **attributes):
        """Give the storage a move, as a breaker does."""
        self._breaker._state_storage.move(types.SimpleNamespace(**attributes))

    def last_move(self, *names):
        """These attributes of the last move that the storage knows, or None."""
        move = self._breaker._state_storage.last_move()
        return move and [getattr(move, name) for name in names]

    def log(self):
        return self._records.seen

    def changes(self):
        return self._changes.seen


def main(settings):
    global pybreaker
    SETTINGS.update(settings)
    if settings.get("clock"):
        shift_clock(settings["clock"])
    pybreaker = importlib.import_module("pybreaker")
    if settings.get("unhurried"):
        importlib.import_module("stepwise").let_redis_be_silent()
    commands = Commands()
    for line in sys.stdin:
        name, args, kwargs = json.loads(line)
        try:
            answer = getattr(commands, name)(*args, **kwargs)
        except Exception:
            answer = {"traceback": traceback.format_exc()}
        print(json.dumps(answer), flush=True)
