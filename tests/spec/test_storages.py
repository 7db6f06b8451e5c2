"""Section 7: storages, those in the field and what a new one may do besides."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import functools
import inspect
import math
import pickle
import sqlite3
import threading
import time
import typing
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from unittest import mock

import guards
import pytest
from freezegun import freeze_time
from internals import is_place_free
from support import while_locked

from pybreaker import (
    CircuitBreaker,
    CircuitBreakerError,
    CircuitBreakerStorage,
    CircuitClosedState,
    CircuitMemoryStorage,
)

MINUTE = timedelta(seconds=60)


class PlainStorage(CircuitBreakerStorage):
    """A storage as 1.4 has them, which notes what is written to it."""

    def __init__(self, state="closed"):
        super().__init__("plain")
        self.values = {"state": state, "counter": 0, "success": 0, "opened_at": None}
        self.writes = []

    def write(self, key, value):
        self.writes.append(key)
        self.values[key] = value

    @property
    def state(self):
        return self.values["state"]

    @state.setter
    def state(self, state):
        self.write("state", state)

    @property
    def counter(self):
        return self.values["counter"]

    def increment_counter(self):
        self.write("counter", self.values["counter"] + 1)

    def reset_counter(self):
        self.write("counter", 0)

    @property
    def success_counter(self):
        return self.values["success"]

    def increment_success_counter(self):
        self.write("success", self.values["success"] + 1)

    def reset_success_counter(self):
        self.write("success", 0)

    @property
    def opened_at(self):
        return self.values["opened_at"]

    @opened_at.setter
    def opened_at(self, moment):
        self.write("opened_at", moment)


class OldStorage(CircuitBreakerStorage):
    """A storage from before 1.2: no success counter, and no super().__init__()."""

    def __init__(self):
        self._row = {"state": "closed", "counter": 0, "opened_at": None}

    @property
    def state(self):
        return self._row["state"]

    @state.setter
    def state(self, state):
        self._row["state"] = state

    @property
    def counter(self):
        return self._row["counter"]

    def increment_counter(self):
        self._row["counter"] += 1

    def reset_counter(self):
        self._row["counter"] = 0

    @property
    def opened_at(self):
        return self._row["opened_at"]

    @opened_at.setter
    def opened_at(self, moment):
        self._row["opened_at"] = moment


class SQLiteStorage(CircuitBreakerStorage):
    """A row in an SQLite database, which any thread and any process may share.

    It keeps naive UTC timestamps, as old storages do.
    """

    def __init__(self, path):
        super().__init__("sqlite")
        self.path = path
        self._execute(
            "CREATE TABLE IF NOT EXISTS circuit"
            " (id INTEGER PRIMARY KEY, state TEXT, counter INTEGER,"
            " success_counter INTEGER, opened_at TEXT)"
        )
        self._execute("INSERT OR IGNORE INTO circuit VALUES (1, 'closed', 0, 0, NULL)")

    def _execute(self, statement, *values):
        with contextlib.closing(sqlite3.connect(self.path, timeout=10)) as connection:
            # The tests need not survive a power cut, and so do not wait for the disk.
            connection.execute("PRAGMA synchronous = OFF")
            with connection:
                return connection.execute(statement, values).fetchone()

    def _read(self, column):
        return self._execute(f"SELECT {column} FROM circuit")[0]

    def _write(self, column, value):
        self._execute(f"UPDATE circuit SET {column} = ?", value)

    @property
    def state(self):
        return self._read("state")

    @state.setter
    def state(self, state):
        self._write("state", state)

    @property
    def counter(self):
        return self._read("counter")

    def increment_counter(self):
        self._execute("UPDATE circuit SET counter = counter + 1")

    def reset_counter(self):
        self._write("counter", 0)

    @property
    def success_counter(self):
        return self._read("success_counter")

    def increment_success_counter(self):
        self._execute("UPDATE circuit SET success_counter = success_counter + 1")

    def reset_success_counter(self):
        self._write("success_counter", 0)

    @property
    def opened_at(self):
        text = self._read("opened_at")
        return datetime.fromisoformat(text) if text else None

    @opened_at.setter
    def opened_at(self, moment):
        naive = moment.astimezone(timezone.utc).replace(tzinfo=None)
        self._write("opened_at", naive.isoformat())


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "circuit.sqlite")


@pytest.fixture(params=["memory", "plain", "old", "sqlite"])
def storage(request, path):
    """Each kind of storage in turn."""
    if request.param == "memory":
        return CircuitMemoryStorage("closed")
    if request.param == "sqlite":
        return SQLiteStorage(path)
    return PlainStorage() if request.param == "plain" else OldStorage()


def trip(breaker, fail):
    with pytest.raises(CircuitBreakerError):
        while True:
            with contextlib.suppress(type(call_error(fail))):
                breaker.call(fail)


def call_error(func):
    try:
        func()
    except Exception as exc:
        return exc


def elsewhere(func, *args):
    """Calls the function in another thread and returns what it returns."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(func, *args).result(10)


def is_locked(breaker):
    """Whether another thread would have to wait for the lock."""

    def try_it():
        free = breaker._lock.acquire(blocking=False)
        if free:
            breaker._lock.release()
        return not free

    return elsewhere(try_it)


# A storage of the user's own.


def test_a_breaker_lives_a_whole_life_in_the_storage(storage, fail, boom, recorder):
    """The circuit fails, opens, rejects, fails a trial and recovers over each
    storage."""
    breaker = CircuitBreaker(
        fail_max=2, reset_timeout=60, state_storage=storage, listeners=[recorder]
    )
    assert breaker.call(int) == 0
    with pytest.raises(boom):
        breaker.call(fail)
    assert breaker.fail_counter == storage.counter == 1
    assert breaker.call(int) == 0
    assert breaker.fail_counter == storage.counter == 0
    trip(breaker, fail)
    assert breaker.fail_counter == storage.counter == 2
    assert breaker.current_state == storage.state == "open"
    with pytest.raises(CircuitBreakerError) as rejected:
        breaker.call(int)
    assert 0 < rejected.value.retry_after <= 60
    storage.opened_at = datetime.now(timezone.utc) - MINUTE
    with pytest.raises(CircuitBreakerError, match="Trial call failed"):
        breaker.call(fail)
    assert breaker.current_state == storage.state == "open"
    assert breaker.fail_counter == storage.counter == 3
    storage.opened_at = datetime.now(timezone.utc) - MINUTE
    assert breaker.call(int) == 0
    assert breaker.current_state == storage.state == "closed"
    assert breaker.fail_counter == storage.counter == 0
    assert recorder.transitions == [
        ("closed", "open"),
        ("open", "half-open"),
        ("half-open", "open"),
        ("open", "half-open"),
        ("half-open", "closed"),
    ]


def test_an_old_storage_serves_a_breaker_that_needs_one_success():
    """A storage without a success counter is enough for `success_threshold=1`."""
    breaker = CircuitBreaker(state_storage=OldStorage())
    breaker.half_open()
    assert breaker.success_counter == 0
    assert breaker.call(int) == 0
    assert (breaker.current_state, breaker.success_counter) == ("closed", 0)


def test_successes_are_counted_where_the_storage_does_not(clock):
    """The base class counts successes in memory, for an old storage and any
    threshold."""
    breaker = CircuitBreaker(state_storage=OldStorage(), success_threshold=3)
    breaker.half_open()
    for count in 1, 2:
        breaker.call(int)
        assert (breaker.current_state, breaker.success_counter) == ("half-open", count)
    breaker.call(int)
    assert (breaker.current_state, breaker.success_counter) == ("closed", 0)


def test_the_success_counter_is_in_the_storage(path):
    """Breakers that share such a storage count their successes together."""
    first, second = (
        CircuitBreaker(success_threshold=2, state_storage=SQLiteStorage(path))
        for _ in range(2)
    )
    first.half_open()
    first.call(int)
    assert first.success_counter == second.success_counter == 1
    second.call(int)
    assert first.current_state == second.current_state == "closed"
    assert first.success_counter == second.success_counter == 0


def test_a_success_of_another_process_counts_towards_closing():
    """The breaker closes the circuit by the count that it reads after its own trial."""

    class Busy(PlainStorage):
        def increment_success_counter(self):
            self.write("success", self.values["success"] + 2)

    breaker = CircuitBreaker(success_threshold=2, state_storage=Busy())
    breaker.half_open()
    breaker.call(int)
    assert breaker.current_state == "closed"


def test_the_half_opening_of_a_trial_keeps_the_successes_of_other_processes():
    """Another process that shares the circuit may have had successful trials before."""
    storage = PlainStorage()
    breaker = CircuitBreaker(
        reset_timeout=60, success_threshold=3, state_storage=storage
    )
    breaker.open()
    storage.opened_at -= MINUTE
    storage.values["success"] = 1
    breaker.call(int)
    assert (breaker.current_state, breaker.success_counter) == ("half-open", 2)


def test_a_storage_that_counts_no_successes_has_none():
    """The success counter reads 0 before the first trial as well."""
    assert OldStorage().success_counter == 0


def test_a_storage_has_a_name():
    """The name is the one given to super().__init__(), if the class calls that."""
    assert PlainStorage().name == "plain"
    assert CircuitBreakerStorage("redis").name == "redis"
    assert not hasattr(OldStorage(), "name")


@pytest.mark.parametrize(
    "use",
    [
        lambda storage: storage.state,
        lambda storage: setattr(storage, "state", "open"),
        lambda storage: storage.counter,
        lambda storage: storage.increment_counter(),
        lambda storage: storage.reset_counter(),
        lambda storage: storage.opened_at,
        lambda storage: setattr(storage, "opened_at", None),
    ],
)
def test_what_a_storage_must_have_is_missing_in_the_base(use):
    """Using what a subclass forgot to define raises NotImplementedError."""
    with pytest.raises(NotImplementedError):
        use(CircuitBreakerStorage("base"))


def test_a_storage_is_used_only_under_the_lock(fail, boom):
    """Such storages were written for calls and transitions that hold the lock."""
    unlocked = []

    class Guarded(PlainStorage):
        breaker = None

        def __getattribute__(self, name):
            if name in STORAGE_NAMES and self.breaker and not is_locked(self.breaker):
                unlocked.append(name)
            return super().__getattribute__(name)

        def __setattr__(self, name, value):
            if name in STORAGE_NAMES and self.breaker and not is_locked(self.breaker):
                unlocked.append(name)
            super().__setattr__(name, value)

    storage = Guarded()
    breaker = CircuitBreaker(
        fail_max=2, reset_timeout=60, success_threshold=2, state_storage=storage
    )
    guarded = breaker(int)
    storage.breaker = breaker
    guarded()
    with pytest.raises(boom):
        breaker.call(fail)
    breaker.call(int)
    trip(breaker, fail)
    with pytest.raises(CircuitBreakerError):
        guarded()
    storage.values["opened_at"] -= MINUTE
    guarded()
    asyncio.run(breaker.call_async(int))
    with breaker.calling():
        pass
    breaker.half_open()
    breaker.open()
    breaker.close()
    assert unlocked == []


STORAGE_NAMES = {
    "state",
    "counter",
    "success_counter",
    "opened_at",
    "increment_counter",
    "reset_counter",
    "increment_success_counter",
    "reset_success_counter",
    "open_for",
    "move",
    "last_move",
    "release_trial",
}


# Two breakers over one storage.


def test_two_breakers_in_two_threads_share_a_file(path, boom, fail):
    """The breakers fail in turn and open together; one breaker's trial closes for
    both."""
    turn = threading.Barrier(2, timeout=10)

    def run(index):
        storage = SQLiteStorage(path)
        breaker = CircuitBreaker(fail_max=4, reset_timeout=60, state_storage=storage)
        seen = []
        for step in range(4):
            turn.wait()
            if step % 2 == index:
                try:
                    breaker.call(fail)
                except boom:
                    seen.append("failed")
                except CircuitBreakerError:
                    seen.append("tripped")
        turn.wait()
        seen.append((breaker.state.name, breaker.fail_counter))
        with pytest.raises(CircuitBreakerError, match="Timeout not elapsed yet"):
            breaker.call(int)
        turn.wait()
        if index == 0:
            storage.opened_at = datetime.now(timezone.utc) - MINUTE
            breaker.call(int)
        turn.wait()
        seen.append((breaker.state.name, breaker.fail_counter))
        return seen

    with ThreadPoolExecutor(2) as pool:
        first, second = (pool.submit(run, index) for index in range(2))
        assert first.result(30) == ["failed", "failed", ("open", 4), ("closed", 0)]
        assert second.result(30) == ["failed", "tripped", ("open", 4), ("closed", 0)]


def test_two_breakers_that_fail_at_once_lose_no_failure(path, boom, fail):
    """Each breaker counts in the database, and no count is overwritten."""

    def run():
        breaker = CircuitBreaker(fail_max=1000, state_storage=SQLiteStorage(path))
        for _ in range(20):
            with pytest.raises(boom):
                breaker.call(fail)

    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(run) for _ in range(2)]:
            future.result(60)
    assert SQLiteStorage(path).counter == 40


class PromisingStorage(PlainStorage):
    """Promises that the breaker may read the storage without the lock, and knows
    nothing of moves."""

    _is_plain = True
    _state = property(lambda self: self.state)
    _fail_counter = property(lambda self: self.counter)


def test_a_rejection_by_a_storage_that_promises_to_be_plain_takes_no_lock():
    breaker = CircuitBreaker(state_storage=PromisingStorage("closed"))
    assert breaker.call(int) == 0
    breaker.open()

    def rejected():
        with pytest.raises(CircuitBreakerError):
            breaker.call(int)
        return True

    assert while_locked(breaker, rejected)


@pytest.mark.parametrize("kind", [CircuitMemoryStorage, PlainStorage])
def test_each_of_two_breakers_may_have_a_trial(kind):
    """The storage grants each breaker a trial, unless the storage overrides
    claim_trial()."""
    storage = kind("closed")
    first, second = (
        CircuitBreaker(success_threshold=3, state_storage=storage) for _ in range(2)
    )
    first.half_open()

    def trial():
        with pytest.raises(CircuitBreakerError):
            elsewhere(first.call, int)
        return elsewhere(second.call, str)

    assert first.call(trial) == ""
    assert storage.success_counter == 2


def test_each_of_two_breakers_tells_its_own_listeners(recorder, fail):
    """Each breaker tells its listeners of a move that it makes and of one that it
    finds."""
    storage = CircuitMemoryStorage("closed")
    told = type(recorder)()
    first = CircuitBreaker(fail_max=1, state_storage=storage, listeners=[recorder])
    second = CircuitBreaker(fail_max=1, state_storage=storage, listeners=[told])
    trip(first, fail)
    assert told.transitions == []
    with pytest.raises(CircuitBreakerError):
        second.call(int)
    assert recorder.transitions == told.transitions == [("closed", "open")]


# Changes from outside.


def look_by_a_call(breaker):
    with contextlib.suppress(CircuitBreakerError):
        breaker.call(int)


async def look_by_an_awaited_call(breaker):
    with contextlib.suppress(CircuitBreakerError):
        await breaker.call_async(int)


LOOKS = {
    "call": look_by_a_call,
    "call_async": lambda breaker: asyncio.run(look_by_an_awaited_call(breaker)),
    "state": lambda breaker: breaker.state,
}


@pytest.mark.parametrize("kind", [CircuitMemoryStorage, PlainStorage])
@pytest.mark.parametrize("look", LOOKS)
def test_a_circuit_that_a_test_opens_is_open(look, kind, recorder):
    """The next look finds `breaker._state_storage.state = "open"`, and tells
    listeners."""
    breaker = CircuitBreaker(state_storage=kind("closed"), listeners=[recorder])
    old = breaker.state
    breaker._state_storage.opened_at = datetime.now(timezone.utc)
    breaker._state_storage.state = "open"
    assert breaker.current_state == "open"
    assert recorder.events == []
    LOOKS[look](breaker)
    assert recorder.events == [("state_change", "closed", "open")]
    assert breaker.state is not old
    assert breaker.state.name == "open"
    assert len(recorder.events) == 1


@pytest.mark.parametrize("kind", [CircuitMemoryStorage, PlainStorage])
@freeze_time("2020-02-29 12:30:00")
def test_retry_after_goes_by_what_the_storage_says(kind):
    """No call has to find the new state first."""
    breaker = CircuitBreaker(reset_timeout=60, state_storage=kind("closed"))
    breaker._state_storage.opened_at = datetime.now(timezone.utc)
    breaker._state_storage.state = "open"
    assert breaker.retry_after == 60
    breaker._state_storage.state = "closed"
    assert breaker.retry_after == 0.0
    breaker.open()
    breaker._state_storage.state = "closed"
    assert breaker.retry_after == 0.0


def test_a_circuit_that_is_moved_during_a_call_is_found_when_it_settles(recorder):
    """The outcome is late by then, and counts for nothing in the new era."""
    storage = PlainStorage()
    breaker = CircuitBreaker(fail_max=1, state_storage=storage, listeners=[recorder])

    def moved(error):
        storage.values["state"] = "half-open"
        raise error

    with pytest.raises(RuntimeError):
        breaker.call(moved, RuntimeError())
    assert recorder.names == ["before_call", "state_change", "failure"]
    assert breaker.state.name == "half-open"
    assert (breaker.fail_counter, storage.writes) == (0, [])


@pytest.mark.parametrize("name", ["open", "half-open"])
@pytest.mark.parametrize("kind", [CircuitMemoryStorage, PlainStorage])
def test_a_move_from_outside_is_told_to_a_listener_that_hears_of_nothing_else(
    kind, name
):
    """Listeners are told by the call during which the circuit was moved. Over a memory
    storage that call is a quiet one, and the next call tells them."""

    class Moves:
        def state_change(self, cb, old_state, new_state):
            moves.append((old_state.name, new_state.name))

    def moved():
        breaker._state_storage.state = name

    moves = []
    breaker = CircuitBreaker(state_storage=kind("closed"), listeners=[Moves()])
    breaker.call(moved)
    if kind is CircuitMemoryStorage:  # a quiet call looks at this storage only once
        assert moves == []
        with contextlib.suppress(CircuitBreakerError):
            breaker.call(int)
    assert moves[0] == ("closed", name)


@pytest.mark.parametrize("kind", [CircuitMemoryStorage, PlainStorage])
def test_a_trial_whose_circuit_is_moved_from_outside_is_late(kind, recorder):
    """The trial's success does not close the circuit that was opened from outside."""
    storage = kind("half-open")
    breaker = CircuitBreaker(state_storage=storage, listeners=[recorder])

    def opened_meanwhile():
        storage.opened_at = datetime.now(timezone.utc)
        storage.state = "open"

    breaker.call(opened_meanwhile)
    assert breaker.current_state == "open"
    assert recorder.transitions == [("half-open", "open")]
    storage.state = "half-open"
    assert breaker.call(int) == 0
    assert breaker.current_state == "closed"


@pytest.mark.parametrize("kind", [CircuitMemoryStorage, PlainStorage])
def test_a_trial_whose_circuit_was_closed_from_outside_is_late(kind, recorder):
    """The trial's success decides nothing in the closed era."""
    storage = kind("half-open")
    breaker = CircuitBreaker(state_storage=storage, listeners=[recorder])

    def closed_meanwhile():
        storage.state = "closed"
        storage.increment_counter()

    breaker.call(closed_meanwhile)
    assert recorder.transitions == [("half-open", "closed")]
    assert recorder.names == ["before_call", "state_change", "success"]
    assert (breaker.current_state, breaker.fail_counter) == ("closed", 1)


@pytest.mark.parametrize("name", ["open", "half-open"])
def test_nothing_is_written_because_of_a_change_that_was_found(name):
    """A breaker that finds another state in the storage writes nothing there."""
    storage = PlainStorage()
    breaker = CircuitBreaker(state_storage=storage)
    storage.values.update(state=name, counter=7, success=1)
    assert breaker.state.name == name
    assert storage.writes == []


@pytest.mark.parametrize(("found", "left"), [(3, 3), (4, 0), (5, 0)])
def test_a_circuit_found_closed_at_its_limit_starts_from_nothing(found, left):
    """The breaker sets a count of `fail_max` or more to 0, because with it the next
    failure would open the circuit. A lower count stays."""
    storage = PlainStorage("open")
    breaker = CircuitBreaker(fail_max=4, state_storage=storage)
    storage.values.update(state="closed", counter=found)
    assert breaker.state.name == "closed"
    assert breaker.fail_counter == left
    assert storage.writes == ([] if left else ["counter"])


def test_a_count_that_is_written_from_outside_counts(fail):
    """storage._fail_counter = n in a test brings the limit nearer."""
    breaker = CircuitBreaker(fail_max=5)
    breaker._state_storage._fail_counter = 4
    with pytest.raises(CircuitBreakerError):
        breaker.call(fail)
    assert breaker.fail_counter == 5


@pytest.mark.parametrize("name", ["closed", "open", "half-open"])
def test_making_a_breaker_changes_nothing_in_its_storage(name, recorder):
    """A new breaker takes up the state in the storage, and tells no listener."""
    storage = PlainStorage(name)
    storage.values["counter"] = 9
    breaker = CircuitBreaker(fail_max=3, state_storage=storage, listeners=[recorder])
    assert breaker.state.name == breaker.current_state == name
    assert breaker.fail_counter == 9
    assert (storage.writes, recorder.events) == ([], [])


def test_a_breaker_made_over_an_open_circuit_rejects():
    """The breaker rejects calls for what is left of the timeout."""
    storage = PlainStorage("open")
    storage.values["opened_at"] = datetime.now(timezone.utc)
    with pytest.raises(CircuitBreakerError):
        CircuitBreaker(state_storage=storage).call(int)


def test_a_storage_can_be_exchanged():
    """breaker._state_storage = ... is followed like a change in the storage."""
    breaker = CircuitBreaker()
    breaker.call(int)
    storage = PlainStorage("open")
    storage.values["opened_at"] = datetime.now(timezone.utc)
    breaker._state_storage = storage
    with pytest.raises(CircuitBreakerError):
        breaker.call(int)
    assert breaker._state_storage is storage


# What a transition writes.


@pytest.mark.parametrize(
    ("move", "writes"),
    [
        ("open", {"success": 0, "opened_at": 1, "state": 2}),
        ("half_open", {"success": 0, "state": 2}),
        ("close", {"counter": 0, "success": 0, "state": 2}),
    ],
)
def test_a_transition_writes_the_counters_then_opened_at_then_the_state(move, writes):
    """A program that sees the state sees what belongs to it. Nothing else is
    written."""
    storage = PlainStorage()
    breaker = CircuitBreaker(state_storage=storage)
    getattr(breaker, move)()
    assert sorted(storage.writes) == sorted(writes)
    assert [writes[key] for key in storage.writes] == sorted(writes.values())


def test_a_trip_writes_opened_at_before_the_state(fail):
    """The breaker first writes the count of the failure, then what any opening
    writes."""
    storage = PlainStorage()
    breaker = CircuitBreaker(fail_max=1, state_storage=storage)
    trip(breaker, fail)
    assert storage.writes == ["counter", "success", "opened_at", "state"]


def test_calls_to_a_healthy_service_write_nothing():
    """Over a network each write would cost time."""
    storage = PlainStorage()
    breaker = CircuitBreaker(state_storage=storage)
    breaker.call(int)
    breaker.call(int)
    assert storage.writes == []


# opened_at.


@pytest.mark.parametrize(
    "moment",
    [
        datetime(2020, 2, 29, 12, 30),
        datetime(2020, 2, 29, 12, 30, tzinfo=timezone.utc),
        datetime(2020, 2, 29, 12, 30, tzinfo=timezone(timedelta(hours=2))),
        None,
        False,
    ],
)
def test_the_memory_storage_reads_back_what_was_written(moment):
    """The value that is read is the one that was written: naive, aware or anything
    false."""
    storage = CircuitMemoryStorage("open")
    storage.opened_at = moment
    assert storage.opened_at is moment


def test_nothing_has_opened_a_new_memory_storage():
    """The opened_at of a new memory storage is None."""
    assert CircuitMemoryStorage("closed").opened_at is None


@pytest.mark.parametrize("kind", [CircuitMemoryStorage, PlainStorage])
@freeze_time("2020-02-29 12:30:00")
def test_open_writes_an_aware_datetime_in_utc(kind):
    """The moment of the opening, wherever the machine is."""
    breaker = CircuitBreaker(state_storage=kind("closed"))
    breaker.open()
    opened_at = breaker._state_storage.opened_at
    assert opened_at.utcoffset() == timedelta(0)
    assert opened_at == datetime(2020, 2, 29, 12, 30, tzinfo=timezone.utc)


@pytest.mark.parametrize("kind", [CircuitMemoryStorage, PlainStorage])
@pytest.mark.parametrize(
    ("opened_at", "left"),
    [
        (datetime(2020, 2, 29, 12, 29, 30), 30),
        (datetime(2020, 2, 29, 12, 29, 30, tzinfo=timezone.utc), 30),
        (datetime(2020, 2, 29, 14, 29, 10, tzinfo=timezone(timedelta(hours=2))), 10),
        (datetime(2020, 2, 29, 12, 29), 0),
        (datetime(2020, 2, 28), 0),
        (None, 0),
        ("", 0),
        (0, 0),
    ],
)
@freeze_time("2020-02-29 12:30:00")
def test_the_timeout_is_measured_from_the_opened_at_that_is_found(
    kind, opened_at, left
):
    """A naive opened_at is UTC; None, or anything false, means that the timeout is
    over."""
    storage = kind("open")
    breaker = CircuitBreaker(reset_timeout=60, state_storage=storage)
    storage.opened_at = opened_at
    assert breaker.retry_after == left
    if left:
        with pytest.raises(CircuitBreakerError) as rejected:
            breaker.call(int)
        assert rejected.value.retry_after == left
    else:
        assert breaker.call(int) == 0


@pytest.mark.parametrize("kind", [CircuitMemoryStorage, PlainStorage])
@freeze_time("2020-02-29 12:30:00")
def test_fractions_of_a_second_count(kind):
    """A short timeout has nothing else."""
    storage = kind("open")
    breaker = CircuitBreaker(reset_timeout=0.75, state_storage=storage)
    storage.opened_at = datetime(2020, 2, 29, 12, 29, 59, 500_000)
    assert breaker.retry_after == 0.25


@pytest.mark.skipif(not hasattr(time, "tzset"), reason="needs a settable time zone")
@pytest.mark.parametrize("kind", [CircuitMemoryStorage, PlainStorage])
def test_a_naive_opened_at_is_utc_wherever_the_machine_is(kind, monkeypatch):
    """A machine in Tokyo has not been open for nine hours."""
    storage = kind("open")
    breaker = CircuitBreaker(reset_timeout=3600, state_storage=storage)
    with monkeypatch.context() as elsewhere_on_earth:
        elsewhere_on_earth.setenv("TZ", "Asia/Tokyo")
        time.tzset()
        now = datetime.now(timezone.utc).replace(tzinfo=None)
        storage.opened_at = now - timedelta(seconds=1800)
        wait = breaker.retry_after
    time.tzset()
    assert 1700 < wait <= 1800


@pytest.mark.parametrize("kind", [CircuitMemoryStorage, PlainStorage])
def test_no_opening_is_long_ago_even_for_an_endless_timeout(kind):
    """An opened_at of None means that the timeout is over, whatever its length."""
    breaker = CircuitBreaker(reset_timeout=math.inf, state_storage=kind("open"))
    assert breaker.retry_after == 0.0
    assert breaker.call(int) == 0


@pytest.mark.parametrize("kind", [CircuitMemoryStorage, PlainStorage])
@pytest.mark.parametrize("aware", [True, False])
def test_a_test_moves_the_opening_to_let_the_timeout_pass(kind, aware, fail):
    """A test may write an opened_at that is naive or aware."""
    breaker = CircuitBreaker(fail_max=1, reset_timeout=60, state_storage=kind("closed"))
    trip(breaker, fail)
    moment = breaker._state_storage.opened_at - timedelta(seconds=61)
    breaker._state_storage.opened_at = moment if aware else moment.replace(tzinfo=None)
    assert breaker.call(int) == 0
    assert breaker.current_state == "closed"


# The new questions, and how the base answers them.


@freeze_time("2020-02-29 12:30:00")
def test_a_storage_has_been_open_since_its_opened_at():
    """open_for() goes by the wall clock, where a storage doesn't override it."""
    storage = PlainStorage()
    storage.opened_at = datetime(2020, 2, 29, 12, 29, 15)
    assert storage.open_for() == 45
    storage.opened_at = None
    assert storage.open_for() == math.inf


def test_the_memory_storage_has_been_open_by_the_monotonic_clock(clock):
    """The wall clock plays no part after the opening."""
    breaker = CircuitBreaker(reset_timeout=60)
    storage = breaker._state_storage
    breaker.open()
    with mock.patch("pybreaker.datetime") as wall_clock:
        wall_clock.now.return_value = datetime(1999, 1, 1, tzinfo=timezone.utc)
        clock.advance(20)
        assert storage.open_for() == 20
        assert breaker.retry_after == 40


def test_the_wall_clock_may_jump_while_the_circuit_opens(clock, monkeypatch):
    """A subclass of the memory storage goes by the monotonic clock as well."""

    class Jumping:
        moments = [datetime(2030, 1, 1, hour, tzinfo=timezone.utc) for hour in range(9)]

        @classmethod
        def now(cls, tz):
            return cls.moments.pop(0)

    class Derived(CircuitMemoryStorage):
        pass

    monkeypatch.setattr("pybreaker.datetime", Jumping)
    for kind in CircuitMemoryStorage, Derived:
        breaker = CircuitBreaker(reset_timeout=60, state_storage=kind("closed"))
        breaker.open()
        assert breaker.retry_after == 60


def test_the_answer_of_open_for_decides(recorder):
    """A storage that measures by another clock overrides open_for()."""

    class Elsewhere(PlainStorage):
        age = 20

        def open_for(self):
            return self.age

    breaker = CircuitBreaker(reset_timeout=60, state_storage=Elsewhere())
    breaker.open()
    assert breaker.retry_after == 40
    with pytest.raises(CircuitBreakerError) as rejected:
        breaker.call(int)
    assert rejected.value.retry_after == 40
    breaker._state_storage.age = 60
    assert breaker.call(int) == 0


class AskedStorage(PlainStorage):
    """Notes the moves, claims and releases that it is asked for, and its state then."""

    def __init__(self, state="closed"):
        super().__init__(state)
        self.asked = []

    def move(self, move):
        if move.by == "count":
            self.asked.append(("trip", move.fail_max))
        super().move(move)

    def claim_trial(self, timeout):
        self.asked.append(("claim", timeout))
        return super().claim_trial(timeout)

    def release_trial(self):
        self.asked.append(("release", self.state))
        super().release_trial()


def test_the_count_that_opens_the_circuit_is_said_to_have_moved_it(fail, boom):
    """The storage is told once, with the limit; its default opens the circuit."""
    storage = AskedStorage()
    breaker = CircuitBreaker(fail_max=2, state_storage=storage)
    with pytest.raises(boom):
        breaker.call(fail)
    assert storage.asked == []
    trip(breaker, fail)
    assert storage.asked == [("trip", 2)]
    assert (storage.state, breaker.current_state) == ("open", "open")


def test_no_other_opening_is_said_to_be_made_by_the_count(fail):
    """Openings by hand and by a failed trial are not made by the count."""
    storage = AskedStorage()
    breaker = CircuitBreaker(fail_max=1, state_storage=storage)
    breaker.open()
    storage.opened_at = None
    with pytest.raises(CircuitBreakerError):
        breaker.call(fail)
    breaker.state = "open"
    assert breaker.current_state == "open"
    assert "trip" not in dict(storage.asked)


def test_an_opening_by_a_listener_of_a_trip_is_no_trip(fail):
    """A listener opens by hand, even while a trip is being told."""
    storage = AskedStorage()

    class Reopening:
        def state_change(self, cb, old_state, new_state):
            if old_state.name == "closed":
                cb.open()

    breaker = CircuitBreaker(fail_max=1, state_storage=storage, listeners=[Reopening()])
    trip(breaker, fail)
    assert storage.asked == [("trip", 1)]


def test_the_default_grants_every_trial_without_a_word():
    """Both claims are granted, the second by asking the first; the release does
    nothing."""
    storage = PlainStorage()
    assert storage.claim_trial(60) is True
    assert asyncio.run(storage.claim_trial_async(60)) is True
    assert storage.release_trial() is None
    assert storage.writes == []

    class Refusing(PlainStorage):
        def claim_trial(self, timeout):
            return timeout > 60

    assert asyncio.run(Refusing().claim_trial_async(60)) is False
    assert asyncio.run(Refusing().claim_trial_async(61)) is True


THROUGH_COROUTINES = [
    guards.by_coroutine,
    guards.by_iterable_coroutine,
    guards.by_async_generator,
    guards.by_async_block,
]
GUARDS = [guards.by_call, guards.by_block, guards.by_generator, *THROUGH_COROUTINES]


@pytest.fixture(params=GUARDS, ids=lambda way: way.__name__)
def guard(request):
    """Each way to guard a function, on an event loop if that may be needed."""
    way = request.param
    if way in THROUGH_COROUTINES:
        return functools.partial(way, run=asyncio.run)
    return way


def test_a_trial_is_claimed_and_released_once(guard):
    """The claim has the timeout of that moment; the release comes after the closing."""
    storage = AskedStorage()
    breaker = CircuitBreaker(reset_timeout=60, state_storage=storage)
    breaker.open()
    storage.opened_at -= MINUTE
    breaker.reset_timeout = 30
    assert guard(breaker, int) == 0
    assert storage.asked == [("claim", 30), ("release", "closed")]


@pytest.mark.parametrize("timeout", [0, 0.25, math.inf])
def test_a_claim_is_for_the_very_timeout(timeout):
    """However short or long the timeout is, the storage is given it unchanged."""
    storage = AskedStorage("half-open")
    CircuitBreaker(reset_timeout=timeout, state_storage=storage).call(int)
    assert storage.asked[0] == ("claim", timeout)


def test_a_failed_trial_is_released_after_the_circuit_has_opened(guard, fail):
    """The process that is granted the next trial finds the circuit open."""
    storage = AskedStorage()
    breaker = CircuitBreaker(reset_timeout=60, state_storage=storage)
    breaker.half_open()
    with pytest.raises(CircuitBreakerError):
        guard(breaker, fail)
    assert storage.asked == [("claim", 60), ("release", "open")]


def test_an_abandoned_trial_is_released(guard):
    """The circuit is half-open still, and the next call claims again."""
    storage = AskedStorage("half-open")
    breaker = CircuitBreaker(reset_timeout=60, state_storage=storage)

    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        guard(breaker, interrupted)
    assert storage.asked == [("claim", 60), ("release", "half-open")]
    assert guard(breaker, int) == 0
    assert breaker.current_state == "closed"


def test_only_trials_are_claimed(guard, fail):
    """Calls in a closed circuit, rejected calls and calls within a trial claim
    nothing."""
    storage = AskedStorage()
    breaker = CircuitBreaker(fail_max=2, reset_timeout=60, state_storage=storage)
    assert guard(breaker, int) == 0
    breaker.open()
    with pytest.raises(CircuitBreakerError):
        guard(breaker, int)
    assert storage.asked == []
    breaker.half_open()
    assert guards.by_call(breaker, lambda: breaker.call(str)) == ""
    assert storage.asked == [("claim", 60), ("release", "closed")]


def test_the_gate_claims_nothing():
    """The gate doesn't take the place, so there is no trial to ask for."""
    storage = AskedStorage()
    breaker = CircuitBreaker(state_storage=storage)
    breaker.open()
    storage.opened_at = None
    breaker.state.before_call(int)
    breaker.state._handle_success()
    assert breaker.current_state == "closed"
    assert storage.asked == []


# A storage that grants the trial to one of several breakers.


class Fleet:
    """Grants the trial to one member at a time."""

    def __init__(self):
        self.lock = threading.Lock()
        self.holder = None

    def claim(self, member):
        with self.lock:
            if self.holder is None:
                self.holder = member
            return self.holder is member

    def release(self, member):
        with self.lock:
            if self.holder is member:
                self.holder = None


class FleetStorage(PlainStorage):
    """One breaker's storage, whose answers may take time.

    `on_claim` is run (and awaited) before the answer to each claim.
    """

    def __init__(self, fleet, state="half-open", on_claim=None):
        super().__init__(state)
        self.fleet = fleet
        self.on_claim = on_claim
        self.claims = []

    def claim_trial(self, timeout):
        self.claims.append(timeout)
        if self.on_claim is not None:
            self.on_claim()
        return self.fleet.claim(self)

    async def claim_trial_async(self, timeout):
        await asyncio.sleep(0)
        if inspect.iscoroutinefunction(self.on_claim):
            self.claims.append(timeout)
            await self.on_claim()
            return self.fleet.claim(self)
        return self.claim_trial(timeout)

    def release_trial(self):
        self.fleet.release(self)


@pytest.fixture
def fleet():
    return Fleet()


def test_one_of_several_breakers_gets_the_trial(guard, fleet):
    """The other breakers reject, run nothing, and ask again when the trial is over."""
    storages = [FleetStorage(fleet) for _ in range(3)]
    first, second, third = (
        CircuitBreaker(success_threshold=2, state_storage=storage)
        for storage in storages
    )
    ran = []

    def trial():
        for other in (second, third):
            with pytest.raises(CircuitBreakerError):
                elsewhere(guard, other, lambda: ran.append("other"))
        assert ran == []
        return "granted"

    assert guard(first, trial) == "granted"
    assert fleet.holder is None
    assert guard(second, int) == 0
    assert second.success_counter == 1
    assert fleet.holder is None


def test_a_refused_call_releases_nothing(guard, fleet, monkeypatch):
    """Some storages give back any claim there is, and here another breaker has the
    claim."""
    storage, released = FleetStorage(fleet), []
    monkeypatch.setattr(storage, "release_trial", lambda: released.append("released"))
    fleet.holder = FleetStorage(fleet)
    with pytest.raises(CircuitBreakerError, match="another breaker"):
        guard(CircuitBreaker(state_storage=storage), int)
    assert released == []


def test_a_refused_call_is_rejected_and_gives_the_place_back(guard, fleet, recorder):
    """Listeners hear of the rejection, the circuit stays open, and the next call
    asks."""
    storage, listener = FleetStorage(fleet, "closed"), mock.Mock(spec=["rejected"])
    breaker = CircuitBreaker(
        reset_timeout=60,
        state_storage=storage,
        listeners=[recorder, listener],
        name="db",
    )
    breaker.open()
    storage.opened_at -= MINUTE
    fleet.holder = "somebody else"
    recorder.events.clear()
    work = mock.Mock(return_value=1)
    with pytest.raises(CircuitBreakerError, match="still open") as rejected:
        guard(breaker, work)
    assert rejected.value.breaker is breaker
    assert "db" in str(rejected.value)
    assert rejected.value.retry_after == 0.0
    work.assert_not_called()
    assert "before_call" not in recorder.names
    assert listener.rejected.call_count == 1
    assert recorder.transitions == []
    assert (breaker.current_state, breaker.retry_after) == ("open", 0.0)
    assert fleet.holder == "somebody else"
    fleet.holder = None
    assert guard(breaker, work) == 1
    assert breaker.current_state == "closed"
    assert len(storage.claims) == 2


def test_the_claim_is_asked_outside_the_lock(guard, fleet):
    """The storage's answer may take time, and other threads go on meanwhile."""
    locked = []
    storage = FleetStorage(fleet, on_claim=lambda: locked.append(is_locked(breaker)))
    breaker = CircuitBreaker(state_storage=storage)
    assert guard(breaker, int) == 0
    assert locked == [False]


def test_calls_that_come_while_the_claim_is_asked_are_rejected(guard, fleet):
    """The first call takes the place before it asks the storage, and asks once."""
    rejected, ran = [], []

    def others_come():
        try:
            elsewhere(guard, breaker, lambda: ran.append("other"))
        except CircuitBreakerError as error:
            rejected.append(error.retry_after)

    storage = FleetStorage(fleet, "open", on_claim=others_come)
    breaker = CircuitBreaker(reset_timeout=60, state_storage=storage)
    assert guard(breaker, int) == 0
    assert len(rejected) == 1
    assert 0 < rejected[0] <= 60
    assert (ran, len(storage.claims)) == ([], 1)


def test_while_the_claim_is_asked_the_wait_is_for_the_place(guard, fleet, clock):
    """`retry_after` tells when the place is free again, though the timeout is over."""
    waits = []
    storage = FleetStorage(
        fleet, "open", on_claim=lambda: waits.append(breaker.retry_after)
    )
    breaker = CircuitBreaker(reset_timeout=60, state_storage=storage)
    assert guard(breaker, int) == 0
    assert waits == [60]


def test_a_trial_holds_its_place_since_before_the_claim(guard, fleet, clock):
    """The time that the storage takes for its answer is part of the trial's time."""
    storage = FleetStorage(fleet, on_claim=lambda: clock.advance(25))
    breaker = CircuitBreaker(reset_timeout=60, state_storage=storage)
    assert guard(breaker, lambda: breaker.retry_after) == 35


def test_the_circuit_half_opens_when_the_claim_is_granted(guard, fleet, recorder):
    """Until then current_state says "open", and listeners hear nothing."""
    seen = []
    storage = FleetStorage(
        fleet,
        "open",
        on_claim=lambda: seen.append((breaker.current_state, recorder.names)),
    )
    breaker = CircuitBreaker(state_storage=storage, listeners=[recorder])
    assert guard(breaker, lambda: breaker.current_state) == "half-open"
    assert seen == [("open", [])]
    assert recorder.transitions == [("open", "half-open"), ("half-open", "closed")]
    assert recorder.names[:2] == ["state_change", "before_call"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, asyncio.CancelledError])
def test_a_claim_that_raises_gives_the_place_back(guard, fleet, error):
    """The error reaches the caller, and nothing is counted or run."""

    def broken():
        raise error("no answer")

    storage = FleetStorage(fleet, on_claim=broken)
    breaker = CircuitBreaker(state_storage=storage)
    work = mock.Mock(return_value=1)
    with pytest.raises(error):
        guard(breaker, work)
    work.assert_not_called()
    assert (breaker.current_state, breaker.fail_counter) == ("half-open", 0)
    assert breaker.retry_after == 0.0
    storage.on_claim = None
    assert guard(breaker, work) == 1


@pytest.mark.parametrize("granted", [True, False])
def test_a_circuit_opened_during_the_claim_rejects(guard, fleet, granted):
    """A grant for an earlier era is not used, and is given back."""
    storage = FleetStorage(fleet, on_claim=lambda: breaker.open())
    breaker = CircuitBreaker(reset_timeout=60, state_storage=storage)
    fleet.holder = None if granted else "somebody else"
    work = mock.Mock()
    with pytest.raises(CircuitBreakerError) as rejected:
        guard(breaker, work)
    assert 0 < rejected.value.retry_after <= 60
    work.assert_not_called()
    assert breaker.current_state == "open"
    assert fleet.holder == (None if granted else "somebody else")


@pytest.mark.parametrize("granted", [True, False])
@pytest.mark.parametrize("by_hand", [True, False])
def test_a_call_whose_circuit_closes_during_the_claim_is_an_ordinary_one(
    guard, fleet, granted, by_hand, fail, boom
):
    """Whether the circuit was closed by hand or in the storage, the call counts as one
    in the closed state."""

    def close():
        if by_hand:
            breaker.close()
        else:
            storage.values["state"] = "closed"

    storage = FleetStorage(fleet, on_claim=close)
    breaker = CircuitBreaker(state_storage=storage)
    fleet.holder = None if granted else "somebody else"
    with pytest.raises(boom):
        guard(breaker, fail)
    assert (breaker.current_state, breaker.fail_counter) == ("closed", 1)
    assert fleet.holder == (None if granted else "somebody else")


def test_a_circuit_half_opened_anew_during_the_claim_is_claimed_anew(guard, fleet):
    """The first grant was for an era that is over; the function runs once."""

    def half_open():
        if len(storage.claims) == 1:
            breaker.half_open()

    storage = FleetStorage(fleet, on_claim=half_open)
    breaker = CircuitBreaker(state_storage=storage)
    work = mock.Mock(return_value=1)
    assert guard(breaker, work) == 1
    work.assert_called_once_with()
    assert len(storage.claims) == 2
    assert (breaker.current_state, fleet.holder) == ("closed", None)


def test_a_call_that_loses_its_place_during_the_claim_is_no_trial(guard, clock):
    """The claim took a whole timeout, and another call has taken the place over."""
    claims, inner = [], []

    class Slow(PlainStorage):
        def claim_trial(self, timeout):
            claims.append(timeout)
            if len(claims) == 1:
                clock.advance(60)
                inner.append(guard_by_block_open())
            return True

    breaker = CircuitBreaker(reset_timeout=60, state_storage=Slow("half-open"))

    def guard_by_block_open():
        block = breaker.calling()
        elsewhere(block.__enter__)
        return block

    work = mock.Mock()
    with pytest.raises(CircuitBreakerError) as rejected:
        guard(breaker, work)
    assert rejected.value.retry_after == 60
    work.assert_not_called()
    assert len(claims) == 2
    inner[0].__exit__(None, None, None)
    assert breaker.current_state == "closed"


def test_a_trial_that_lost_its_place_releases_nothing(clock):
    """The claim belongs to the call that took the place over."""
    storage = AskedStorage("half-open")
    breaker = CircuitBreaker(
        reset_timeout=60, success_threshold=9, state_storage=storage
    )
    hung, late = breaker.calling(), breaker.calling()
    elsewhere(hung.__enter__)
    clock.advance(60)
    elsewhere(late.__enter__)
    storage.asked.clear()
    hung.__exit__(None, None, None)
    assert storage.asked == []
    late.__exit__(None, None, None)
    assert storage.asked == [("release", "half-open")]


def test_a_call_that_takes_the_place_over_claims_before_anything_is_released(clock):
    """A release in between would grant another breaker a trial beside this one's."""
    storage = AskedStorage("half-open")
    breaker = CircuitBreaker(reset_timeout=60, state_storage=storage)
    breaker.calling().__enter__()
    clock.advance(60)
    breaker.calling().__enter__()
    assert [event for event, _ in storage.asked] == ["claim", "claim"]


@pytest.mark.parametrize("move", ["open", "half_open", "close"])
def test_a_trial_that_is_overtaken_by_hand_is_released_then(move):
    """The trial is not released a second time when the function ends."""
    storage = AskedStorage("half-open")
    breaker = CircuitBreaker(reset_timeout=60, state_storage=storage)
    block = breaker.calling()
    elsewhere(block.__enter__)
    getattr(breaker, move)()
    block.__exit__(None, None, None)
    assert [event for event, _ in storage.asked] == ["claim", "release"]


@pytest.mark.parametrize("event", ["state_change", "before_call"])
def test_a_granted_trial_that_a_listener_interrupts_is_released(event, guard, fleet):
    """A KeyboardInterrupt in a listener takes the admission back."""

    class Interrupting:
        armed = True

    def interrupt(self, *args):
        if self.armed:
            self.armed = False
            raise KeyboardInterrupt

    setattr(Interrupting, event, interrupt)
    storage = FleetStorage(fleet, "open")
    breaker = CircuitBreaker(state_storage=storage, listeners=[Interrupting()])
    work = mock.Mock(return_value=1)
    with pytest.raises(KeyboardInterrupt):
        guard(breaker, work)
    work.assert_not_called()
    assert fleet.holder is None
    assert guard(breaker, work) == 1


def test_a_listener_that_moves_the_circuit_takes_the_grant_back(guard, fleet):
    """The listener opens the circuit again before the trial's function runs."""

    class Cautious:
        def state_change(self, cb, old_state, new_state):
            if new_state.name == "half-open":
                cb.open()

    storage = FleetStorage(fleet, "open")
    breaker = CircuitBreaker(state_storage=storage, listeners=[Cautious()])
    work = mock.Mock()
    with pytest.raises(CircuitBreakerError):
        guard(breaker, work)
    work.assert_not_called()
    assert (breaker.current_state, fleet.holder) == ("open", None)


@pytest.mark.parametrize("move", ["close", "open", "half_open"])
def test_a_listener_that_is_added_while_a_claim_waits_hears_of_the_call(
    guard, fleet, recorder, move
):
    """The breaker had no listener when the call began, and the circuit has moved since.
    The listener is told once what the call has become by then."""

    def meanwhile():
        if len(storage.claims) == 1:
            getattr(breaker, move)()
            breaker.add_listener(recorder)

    storage = FleetStorage(fleet, on_claim=meanwhile)
    breaker = CircuitBreaker(state_storage=storage)
    if move == "open":
        with pytest.raises(CircuitBreakerError):
            guard(breaker, int)
        assert recorder.names == []  # a Recorder has no method for a rejection
    else:
        assert guard(breaker, int) == 0
        assert recorder.names[0] == "before_call"
        assert recorder.names.count("before_call") == 1
        assert recorder.names[-1] == "success"
    assert breaker.current_state == ("open" if move == "open" else "closed")
    assert is_place_free(breaker)
    assert fleet.holder is None


def test_the_gate_that_half_opens_during_a_claim_takes_the_place_from_it(
    fleet, clock, recorder
):
    """The claim takes a whole timeout, so the gate half-opens the circuit meanwhile.
    The call then claims a trial of the half-open era."""

    def gate():
        if len(storage.claims) == 1:
            clock.advance(60)
            elsewhere(breaker.state.before_call, int)
            assert breaker.retry_after == 0.0

    storage = FleetStorage(fleet, "open", on_claim=gate)
    breaker = CircuitBreaker(
        reset_timeout=60, state_storage=storage, listeners=[recorder]
    )
    assert breaker.call(int) == 0
    assert len(storage.claims) == 2
    assert recorder.transitions == [("open", "half-open"), ("half-open", "closed")]
    assert recorder.names.count("before_call") == 1
    assert fleet.holder is None


@pytest.mark.parametrize("end", ["returns", "fails", "is refused"])
def test_a_grant_passes_to_the_call_that_holds_the_place(clock, end, fail, boom):
    """The call that asked took so long that another call has taken the place over. The
    other call gives the grant back once, however it ends, even if the storage refused
    it."""
    holds, go_on = threading.Event(), threading.Event()

    class Slow(AskedStorage):
        def claim_trial(self, timeout):
            if threading.current_thread() is holder:
                holds.set()
                assert go_on.wait(10)
                return end != "is refused"
            clock.advance(60)
            holder.start()
            assert holds.wait(10)
            return True

    def take_over():
        with contextlib.suppress(CircuitBreakerError, boom):
            breaker.call(fail if end == "fails" else int)

    storage = Slow("half-open")
    breaker = CircuitBreaker(reset_timeout=60, state_storage=storage)
    holder = threading.Thread(target=take_over, daemon=True)
    with pytest.raises(CircuitBreakerError) as rejected:
        breaker.call(int)
    assert rejected.value.retry_after == 60
    assert storage.asked == []
    go_on.set()
    holder.join(10)
    assert [name for name, _ in storage.asked].count("release") == 1
    if end == "is refused":
        assert breaker.retry_after == 0.0
    else:
        assert breaker.current_state == ("open" if end == "fails" else "closed")


@pytest.mark.parametrize(
    "before, written, path",
    [
        ("open", "closed", ["open", "closed"]),
        ("open", "half-open", ["open", "half-open", "closed"]),
        ("open", "open", ["open", "half-open", "closed"]),
        ("half-open", "closed", ["half-open", "closed"]),
        ("half-open", "half-open", ["half-open", "closed"]),
        ("half-open", "open", ["half-open", "open"]),
    ],
)
def test_a_storage_that_is_written_while_a_claim_waits_is_followed(
    guard, fleet, before, written, path, recorder
):
    """The call is treated as if it came after the write. Writing the state that was
    there before is no move."""

    def write():
        if len(storage.claims) == 1:
            storage.values["state"] = written
            if written != before:
                storage.values["opened_at"] = datetime.now(timezone.utc)

    storage = FleetStorage(fleet, before, on_claim=write)
    breaker = CircuitBreaker(state_storage=storage, listeners=[recorder])
    if path[-1] == "open":
        with pytest.raises(CircuitBreakerError):
            guard(breaker, int)
        assert recorder.names == ["state_change"]
    else:
        assert guard(breaker, int) == 0
        assert recorder.names.count("before_call") == 1
        assert recorder.names[-1] == "success"
    assert recorder.transitions == list(zip(path, path[1:]))
    assert fleet.holder is None


def test_threads_that_meet_at_a_slow_claim_get_one_trial(fleet):
    """One thread's call is granted the trial, and all other calls are rejected."""
    asked = threading.Barrier(3, timeout=10)
    done = threading.Barrier(12, timeout=10)
    ran = []

    def meet_the_first_time(claims):
        if len(claims) == 1:
            asked.wait()

    storages = [FleetStorage(fleet) for _ in range(3)]
    for storage in storages:
        storage.on_claim = functools.partial(meet_the_first_time, storage.claims)
    breakers = [CircuitBreaker(state_storage=storage) for storage in storages]

    def work():
        ran.append(threading.get_ident())
        done.wait()

    def client(breaker):
        try:
            breaker.call(work)
        except CircuitBreakerError:
            done.wait()
            return "rejected"
        return "ran"

    with ThreadPoolExecutor(12) as pool:
        results = list(pool.map(client, breakers * 4, timeout=30))
    assert sorted(results) == ["ran"] + ["rejected"] * 11
    assert len(ran) == 1
    assert sorted(b.current_state for b in breakers) == ["closed"] + ["half-open"] * 2
    assert fleet.holder is None


def test_tasks_that_meet_at_a_slow_claim_get_one_trial(fleet):
    """The event loop goes on while a task awaits the answer."""

    async def main():
        answer, begun = asyncio.Event(), asyncio.Event()
        storage = FleetStorage(fleet, on_claim=answer.wait)
        breaker = CircuitBreaker(state_storage=storage)

        async def work():
            begun.set()
            await asyncio.sleep(0)
            return "ran"

        first = asyncio.ensure_future(breaker.call_async(work))
        while not storage.claims:
            await asyncio.sleep(0)
        others = await asyncio.gather(
            *(breaker.call_async(work) for _ in range(5)), return_exceptions=True
        )
        assert not begun.is_set()
        answer.set()
        return others, await asyncio.wait_for(first, 10), storage.claims

    others, first, claims = asyncio.run(main())
    assert all(isinstance(other, CircuitBreakerError) for other in others)
    assert first == "ran"
    assert len(claims) == 1


def test_a_task_cancelled_while_it_claims_gives_the_place_back(fleet):
    """The function is not run, and the next task may be the trial."""

    async def main():
        answer = asyncio.Event()
        storage = FleetStorage(fleet, on_claim=answer.wait)
        breaker = CircuitBreaker(state_storage=storage)
        work = mock.AsyncMock(return_value="ran")
        task = asyncio.ensure_future(breaker.call_async(work))
        while not storage.claims:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        work.assert_not_called()
        assert (breaker.current_state, breaker.retry_after) == ("half-open", 0.0)
        answer.set()
        return await asyncio.wait_for(breaker.call_async(work), 10)

    assert asyncio.run(main()) == "ran"
    assert fleet.holder is None


def test_an_async_claim_does_not_block_a_sync_call(fleet):
    """A thread's call is rejected at once while a task awaits its claim."""

    async def main():
        answer = asyncio.Event()
        storage = FleetStorage(fleet, on_claim=answer.wait)
        breaker = CircuitBreaker(state_storage=storage)
        task = asyncio.ensure_future(breaker.call_async(int))
        while not storage.claims:
            await asyncio.sleep(0)
        with pytest.raises(CircuitBreakerError):
            elsewhere(breaker.call, int)
        breaker.close()
        assert elsewhere(breaker.call, int) == 0
        answer.set()
        return await asyncio.wait_for(task, 10)

    assert asyncio.run(main()) == 0
    assert fleet.holder is None


def test_the_async_claim_is_asked_in_coroutines_and_the_other_elsewhere():
    """A coroutine awaits claim_trial_async(), any other call asks claim_trial()."""
    asked = []

    class Both(PlainStorage):
        def claim_trial(self, timeout):
            asked.append("sync")
            return True

        async def claim_trial_async(self, timeout):
            asked.append("async")
            return True

    for guard in GUARDS:
        breaker = CircuitBreaker(state_storage=Both("half-open"))
        assert guard(breaker, int) == 0
    sync = len(GUARDS) - len(THROUGH_COROUTINES)
    assert asked == ["sync"] * sync + ["async"] * len(THROUGH_COROUTINES)


def test_coroutines_that_claim_anew_await_the_second_claim():
    """The circuit was half-opened again while the storage was answering the first
    claim."""

    class Async(PlainStorage):
        claims = 0

        def claim_trial(self, timeout):
            raise AssertionError("this would hold up the event loop")

        async def claim_trial_async(self, timeout):
            self.claims += 1
            if self.claims == 1:
                breaker.half_open()
            return True

    for guard in THROUGH_COROUTINES:
        breaker = CircuitBreaker(state_storage=Async("half-open"))
        assert guard(breaker, int) == 0
        assert breaker._state_storage.claims == 2


# The storage in memory.


def test_the_default_storage_is_the_one_in_memory():
    """Each breaker has a storage of its own, named 'memory'."""
    first, second = CircuitBreaker(), CircuitBreaker()
    assert isinstance(first._state_storage, CircuitMemoryStorage)
    assert isinstance(first._state_storage, CircuitBreakerStorage)
    assert first._state_storage is not second._state_storage
    assert first._state_storage.name == CircuitMemoryStorage("open").name == "memory"


@pytest.mark.parametrize("name", ["closed", "open", "half-open"])
def test_a_memory_storage_begins_in_the_state_that_it_is_given(name):
    """Both counters of a new memory storage are 0."""
    storage = CircuitMemoryStorage(name)
    assert storage.state == name
    assert (storage.counter, storage.success_counter) == (0, 0)


def test_a_memory_storage_refuses_an_unknown_state():
    """The error says which names there are."""
    with pytest.raises(ValueError, match="'closed', 'open' or 'half-open', not 'ajar'"):
        CircuitMemoryStorage("ajar")


def test_a_memory_storage_counts():
    """The methods of the storage can be called by hand."""
    storage = CircuitMemoryStorage("closed")
    storage.increment_counter()
    storage.increment_counter()
    storage.increment_success_counter()
    assert (storage.counter, storage.success_counter) == (2, 1)
    storage.reset_counter()
    assert (storage.counter, storage.success_counter) == (0, 1)
    storage.reset_success_counter()
    assert storage.success_counter == 0


COPIES = {
    f"pickle {protocol}": lambda storage, protocol=protocol: pickle.loads(
        pickle.dumps(storage, protocol)
    )
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1)
}
COPIES["deepcopy"] = copy.deepcopy


@pytest.mark.parametrize("how", COPIES)
@freeze_time("2020-02-29 12:30:00")
def test_a_memory_storage_pickles(how):
    """The copy is in the same state, and has been open for as long."""
    storage = CircuitMemoryStorage("open")
    storage.opened_at = datetime(2020, 2, 29, 12, 29, 40, tzinfo=timezone.utc)
    storage.increment_counter()
    storage.increment_success_counter()
    storage.note = "mine"
    copied = COPIES[how](storage)
    assert (copied.state, copied.counter, copied.success_counter) == ("open", 1, 1)
    assert copied.opened_at == storage.opened_at
    assert copied.note == "mine"
    assert copied.open_for() == 20
    assert CircuitBreaker(reset_timeout=60, state_storage=copied).retry_after == 40
    copied.increment_counter()
    assert storage.counter == 1


def test_a_memory_storage_unpickles_on_another_machine(clock):
    """Another machine's monotonic clock differs, so the opening's date and time
    decides."""
    storage = CircuitMemoryStorage("open")
    storage.opened_at = datetime.now(timezone.utc) - MINUTE
    pickled = pickle.dumps(storage)
    clock.advance(-900)
    assert 60 <= pickle.loads(pickled).open_for() < 90


@pytest.mark.parametrize(
    ("private", "public", "value"),
    [
        ("_state", "state", "open"),
        ("_fail_counter", "counter", 3),
        ("_success_counter", "success_counter", 2),
        ("_opened_at", "opened_at", datetime(2020, 1, 1)),
    ],
)
def test_the_private_names_of_a_memory_storage_are_its_values(private, public, value):
    """Tests read these names, write them, and patch them for a while."""
    storage = CircuitMemoryStorage("closed")
    before = getattr(storage, public)
    assert getattr(storage, private) == before
    with mock.patch.object(storage, private, value):
        assert getattr(storage, public) == getattr(storage, private) == value
    assert getattr(storage, public) == before
    setattr(storage, private, value)
    assert getattr(storage, public) == value
    setattr(storage, public, before)
    assert getattr(storage, private) == before


def test_a_test_steers_the_circuit_by_the_private_names(fail):
    """_state, _fail_counter and _opened_at are effective at once."""
    breaker = CircuitBreaker(fail_max=3, reset_timeout=60)
    storage = breaker._state_storage
    storage._fail_counter = 2
    trip(breaker, fail)
    assert storage._state == "open"
    storage._opened_at = datetime.now(timezone.utc) - MINUTE
    assert breaker.call(int) == 0
    storage._opened_at = datetime.now(timezone.utc)
    storage._state = "open"
    with pytest.raises(CircuitBreakerError):
        breaker.call(int)


def test_a_subclass_of_the_memory_storage_overrides_by_the_private_names(fail, boom):
    """The subclass's properties read and write what the base class keeps."""
    log = []

    class Audited(CircuitMemoryStorage):
        @property
        def state(self):
            return self._state

        @state.setter
        def state(self, state):
            log.append(state)
            self._state = state

        @property
        def counter(self):
            return self._fail_counter

        def increment_counter(self):
            log.append("failure")
            self._fail_counter += 1

    breaker = CircuitBreaker(fail_max=2, state_storage=Audited("closed"))
    log.clear()
    with pytest.raises(boom):
        breaker.call(fail)
    trip(breaker, fail)
    assert (breaker.current_state, breaker.fail_counter) == ("open", 2)
    assert log == ["failure", "failure", "open"]


def test_a_subclass_of_the_memory_storage_hears_of_every_opening():
    """A subclass's own opened_at is written to."""

    class Noted(CircuitMemoryStorage):
        moments = ()

        @property
        def opened_at(self):
            return self._opened_at

        @opened_at.setter
        def opened_at(self, moment):
            self.moments += (moment,)
            self._opened_at = moment

    storage = Noted("closed")
    breaker = CircuitBreaker(reset_timeout=60, state_storage=storage)
    breaker.open()
    assert storage.moments == (storage.opened_at,)
    assert 0 < breaker.retry_after <= 60


@pytest.mark.parametrize("base", [CircuitBreakerStorage, CircuitClosedState])
def test_a_subclass_may_have_other_bases_that_hear_of_their_subclasses(base):
    """typing.Generic is such a base; another may take options in the class
    statement."""
    options = []

    class Registry:
        def __init_subclass__(cls, **given):
            options.append(given)
            super().__init_subclass__()

    class Subclass(base, Registry, typing.Generic[typing.TypeVar("T")], key="value"):
        pass

    assert options == [{"key": "value"}]
    assert Subclass[int].__origin__ is Subclass


def test_a_subclass_of_the_memory_storage_extends_by_super(fail):
    """Every success after a failure calls the subclass's reset_counter()."""

    class Noted(CircuitMemoryStorage):
        def __init__(self):
            super().__init__("closed")
            self.resets = 0

        def reset_counter(self):
            self.resets += 1
            super().reset_counter()

    storage = Noted()
    breaker = CircuitBreaker(fail_max=2, state_storage=storage)
    storage.increment_counter()
    breaker.call(int)
    assert (storage.counter, storage.resets) == (0, 1)


class FreshStorage(CircuitMemoryStorage):
    """Answers with a new string each time, as a database does."""

    state = property(
        lambda self: "".join(list(self._state)),
        lambda self, state: setattr(self, "_state", state),
    )


def test_the_name_of_a_state_that_a_storage_returns_is_compared_by_its_letters(fail):
    """A found state is shown as the library's own, in each place that shows a state."""
    shown = {
        "closed": "<CircuitBreaker unnamed: closed, 0 of 5 failures, "
        "reset_timeout 60 s>",
        "open": "<CircuitBreaker unnamed: open, 0 of 5 failures, "
        "next call is a trial, reset_timeout 60 s>",
        "half-open": "<CircuitBreaker unnamed: half-open, 0 of 5 failures, "
        "0 of 1 successes, next call is a trial, reset_timeout 60 s>",
    }
    for name, text in shown.items():
        storage = FreshStorage("closed")
        breaker = CircuitBreaker(state_storage=storage)
        storage.state = name
        assert repr(breaker) == text
        assert breaker.snapshot()["state"] == breaker.state.name == name
        breaker.open()
        assert breaker.retry_after > 59
        breaker.close()
        with pytest.raises(Exception, match="^$"):
            breaker.call(fail)
        assert breaker.fail_counter == 1
