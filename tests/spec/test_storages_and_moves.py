"""What a storage is told of the circuit's moves, and what it is asked of them."""

from __future__ import annotations

import contextvars
import math
import types
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from internals import pin_shortening
from support import boom, fail

import pybreaker
from pybreaker import (
    CircuitBreaker,
    CircuitBreakerError,
    CircuitBreakerStorage,
    CircuitMemoryStorage,
)


class Row(CircuitBreakerStorage):
    """A storage as it was written before there were moves, which remembers writes."""

    def __init__(self, state="closed"):
        super().__init__("row")
        self.writes = []
        self._row = {"state": state, "counter": 0, "opened_at": None}

    def _write(self, key, value):
        self.writes.append(key)
        self._row[key] = value

    state = property(
        lambda self: self._row["state"], lambda self, v: self._write("state", v)
    )
    opened_at = property(
        lambda self: self._row["opened_at"], lambda self, v: self._write("opened_at", v)
    )
    counter = property(lambda self: self._row["counter"])

    def increment_counter(self):
        self._write("counter", self.counter + 1)

    def reset_counter(self):
        self._write("counter", 0)

    def open_for(self):
        return 1000.0


class Told(Row):
    """Remembers what it is told of each move."""

    def __init__(self):
        super().__init__()
        self.moves = []

    def move(self, move):
        self.moves.append(
            (
                move.state,
                move.reason,
                move.by,
                move.seconds,
                move.failed_trials,
                move.fail_max,
            )
        )
        super().move(move)


def test_a_storage_is_told_of_each_move_by_whom_and_why():
    """A move tells state, reason, origin, seconds, failed trials and the limit."""
    storage = Told()
    breaker = CircuitBreaker(fail_max=2, state_storage=storage)
    fail(breaker, 3)
    breaker.call(int)
    breaker.open(30, "maintenance")
    breaker.half_open()
    breaker.close("done")
    trial_failed = "the trial failed: Boom()"
    passed = "the timeout has passed"
    assert storage.moves == [
        ("open", "2 failures in a row; the last: Boom()", "count", None, 0, 2),
        ("half-open", passed, "trial", None, 0, 2),
        ("open", trial_failed, "outcome", None, 1, 2),
        ("half-open", passed, "trial", None, 1, 2),
        ("closed", "the trial succeeded", "outcome", None, 0, 2),
        ("open", "maintenance", "hand", 30, 0, 2),
        ("half-open", "by hand", "hand", None, 0, 2),
        ("closed", "done", "hand", None, 0, 2),
    ]


def test_the_gate_of_a_state_makes_the_move_of_a_trial():
    """Code that drives a circuit by hand half-opens it as a trial does."""
    storage = Told()
    breaker = CircuitBreaker(state_storage=storage)
    breaker.open()
    breaker.state.before_call(int)
    assert [move[2] for move in storage.moves] == ["hand", "trial"]


def test_a_memory_storage_has_its_counter_written_before_its_state(clock):
    """With a window, what time has forgotten is gone before the state is open."""
    counts = []

    class Watch(CircuitMemoryStorage):
        def move(self, move):
            counts.append(self.counter)
            super().move(move)

    breaker = CircuitBreaker(
        fail_max=3, window_seconds=30, state_storage=Watch("closed")
    )
    fail(breaker)
    clock.advance(30)
    breaker.open()
    breaker.close()
    assert counts == [0, 0]


def test_over_an_older_storage_the_breaker_that_moved_knows_its_move():
    """Length, reason and failed trials hold for the breaker that moved, and no
    other."""
    storage = Row()
    storage.open_for = lambda: 1.0
    first, second = (CircuitBreaker(state_storage=storage) for _ in range(2))
    assert storage.last_move() is None
    first.open(300, "maintenance")
    assert (first.state.reason, first.retry_after) == ("maintenance", 299)
    assert second.state.reason != "maintenance"
    assert second.retry_after == 59


class Knows(Row):
    """Knows of a move that another process has made."""

    def __init__(self, state, **attributes):
        super().__init__(state)
        self.known = types.SimpleNamespace(state=state, by="hand", fail_max=5)
        self.known.__dict__.update(attributes)

    def last_move(self):
        return self.known

    def move(self, move):
        self.known = None
        super().move(move)

    def open_for(self):
        return 1.0


def test_a_breaker_made_over_a_storage_that_has_moved_asks_it_for_the_move():
    """Reason, seconds and failed trials are taken over; nothing is written or told."""
    storage = Knows("open", reason="elsewhere", seconds=100, failed_trials=2)
    breaker = CircuitBreaker(
        reset_timeout=10, max_reset_timeout=1000, state_storage=storage
    )
    assert breaker.state.reason == "elsewhere"
    assert breaker.retry_after == 99
    assert storage.writes == []
    storage.open_for = lambda: 1000.0
    fail(breaker)
    storage.open_for = lambda: 0.0
    assert 72 <= breaker.retry_after <= 80  # the third trial has failed


def test_a_breaker_that_finds_the_storage_moved_asks_it_for_the_move(recorder):
    """The listeners are told, and the move is not handed back."""
    storage = Knows("closed", reason="", seconds=None, failed_trials=0)
    moves = []
    storage.move = moves.append
    breaker = CircuitBreaker(state_storage=storage, listeners=[recorder])
    storage._row["state"] = "open"
    storage.known = types.SimpleNamespace(
        state="open", reason="elsewhere", seconds=math.inf, failed_trials=0
    )
    assert breaker.snapshot()["reason"] == "elsewhere"
    assert recorder.names == []
    assert breaker.state.reason == "elsewhere"
    assert breaker.retry_after == math.inf
    assert recorder.transitions == [("closed", "open")]
    assert (moves, storage.writes) == ([], [])


def test_a_move_to_another_state_than_the_present_one_is_not_believed():
    """Another program has written the state since."""
    storage = Knows("open", reason="elsewhere", seconds=100, failed_trials=2)
    storage._row["state"] = "half-open"
    breaker = CircuitBreaker(state_storage=storage)
    assert breaker.state.reason != "elsewhere"


def test_a_memory_storage_knows_the_move_that_brought_it_to_its_state():
    """The storage knows no move before the first."""
    storage = CircuitMemoryStorage("closed")
    assert storage.last_move() is None
    breaker = CircuitBreaker(fail_max=1, state_storage=storage)
    fail(breaker)
    move = storage.last_move()
    assert (move.state, move.reason, move.by) == ("open", "a failure: Boom()", "count")
    assert (move.seconds, move.failed_trials, move.fail_max) == (None, 0, 1)
    breaker.open(7)
    assert storage.last_move().seconds == 7
    breaker.close()
    assert (storage.last_move().state, storage.last_move().by) == ("closed", "hand")


def test_a_state_that_was_written_is_not_that_of_an_earlier_move():
    """A test ends a maintenance by writing the state, and opens the circuit
    likewise."""
    breaker = CircuitBreaker()
    breaker.open(math.inf, "maintenance")
    breaker._state_storage.state = "closed"
    assert breaker.state.name == "closed"
    breaker._state_storage.state = "open"
    assert breaker.state.reason != "maintenance"
    assert breaker.retry_after < math.inf


def test_an_opening_time_that_is_written_moves_the_opening_of_any_length():
    """Tests write opened_at to let a timeout pass, that of `open(seconds)` too."""
    breaker = CircuitBreaker()
    breaker.open(3600)
    breaker._state_storage.opened_at = datetime(2001, 1, 1, tzinfo=pybreaker.UTC)
    assert breaker.retry_after == 0
    breaker.open(math.inf)
    breaker._state_storage.opened_at = datetime(2001, 1, 1)
    assert breaker.retry_after == math.inf


def test_only_an_opening_changes_the_moment_of_the_last_opening(clock):
    """A trial or a hand half-opens and closes the circuit without a new moment."""
    breaker = CircuitBreaker(success_threshold=2)
    breaker.open(0)
    opened_at = breaker._state_storage.opened_at
    clock.advance(30)
    for move in (lambda: breaker.call(int), breaker.half_open, breaker.close):
        move()
        assert breaker._state_storage.opened_at == opened_at
        assert breaker._state_storage.open_for() == 30
    breaker.open()
    assert breaker._state_storage.open_for() == 0


@pytest.mark.parametrize("name", ["move", "last_move"])
def test_a_storage_of_an_older_kind_needs_neither_move_nor_last_move(name):
    """The base class has both methods."""
    assert callable(getattr(CircuitBreakerStorage, name))
    assert name not in vars(Row)


# Breakers that share a memory storage.


@pytest.mark.parametrize("move", ["open", "half_open"])
def test_a_failure_is_not_counted_where_another_breaker_has_moved_the_circuit(move):
    """The call was admitted while the circuit was closed, and its failure is late."""
    storage = CircuitMemoryStorage("closed")
    breaker, other = (CircuitBreaker(state_storage=storage) for _ in range(2))

    def work():
        getattr(other, move)()
        raise OSError

    with pytest.raises(OSError):
        breaker.call(work)
    assert breaker.fail_counter == 0


def test_another_breaker_that_closes_a_closed_circuit_begins_no_era_here():
    storage = CircuitMemoryStorage("closed")
    breaker, other = (CircuitBreaker(state_storage=storage) for _ in range(2))
    state = breaker.state
    other.close("to be sure")
    assert breaker.state is state


class Agreed:
    """What breakers over one storage have to agree about, whichever of them moves the
    circuit, and whichever has looked at the storage since."""

    def __init__(self, clock):
        self.clock, self.failures, self.ends = clock, 0, 0.0
        self.state, self.reason, self.why_opened = "closed", "new", ""
        self.failed_trials = 0

    def open(self, reason, seconds=None, failed_trials=0):
        self.state, self.reason, self.why_opened = "open", reason, reason
        self.failed_trials = failed_trials
        self.ends = self.clock.now + (self.wait if seconds is None else seconds)

    def half_open(self, reason):
        self.state, self.reason = "half-open", reason

    def close(self, reason):
        self.state, self.reason, self.why_opened = "closed", reason, ""
        self.failures = self.failed_trials = 0

    def call(self, work):
        if not self.admits:
            return
        if self.state != "closed":
            if work is int:
                self.close("the trial succeeded")
            else:
                k = self.failed_trials + 1
                self.open("the trial failed: Boom()", failed_trials=k)
        elif work is int:
            self.failures = 0
        else:
            self.failures += 1
            if self.failures == 2:
                self.open("2 failures in a row; the last: Boom()")

    @property
    def admits(self):
        return self.state != "open" or self.clock.now >= self.ends

    @property
    def wait(self):
        return 10.0 * 2**self.failed_trials


def rejection_beside_a_trial(breaker):
    """The error of a call that is made while a trial runs. The trial is abandoned
    then."""
    errors = []

    def trial():
        with pytest.raises(CircuitBreakerError) as caught:
            contextvars.Context().run(breaker.call, int)
        errors.append(caught.value)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        breaker.call(trial)
    return errors[0]


MOVES = ["open", "open for 7 s", "half_open", "close", "fail", "fail", "succeed"]
THREE = st.integers(0, 2)


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from([*MOVES, "wait"]), THREE, THREE)))
def test_breakers_over_one_memory_storage_agree_whichever_has_looked(steps):
    """In each step one of three breakers moves the circuit or makes a call, and another
    rejects a call. All agree about state, reason, waits and failed trials."""
    clock = types.SimpleNamespace(now=1000.0, monotonic=lambda: clock.now)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(pybreaker, "time", clock)
        pin_shortening(monkeypatch.setattr, 1.0)
        storage, agreed = CircuitMemoryStorage("closed"), Agreed(clock)
        breakers = [
            CircuitBreaker(2, 10, max_reset_timeout=math.inf, state_storage=storage)
            for _ in range(3)
        ]
        for number, (what, mover, other) in enumerate(steps):
            breaker, reason = breakers[mover], f"reason {number}"
            if what == "wait":
                clock.now += 10
            elif what in ("fail", "succeed"):
                work = boom if what == "fail" else int
                try:
                    breaker.call(work)
                except Exception as exc:
                    was_rejected = (
                        type(exc) is CircuitBreakerError and not exc.__cause__
                    )
                    assert was_rejected != agreed.admits
                agreed.call(work)
            elif what == "open for 7 s":
                breaker.open(7, reason)
                agreed.open(reason, 7)
            else:
                getattr(breaker, what)(reason=reason)
                getattr(agreed, what)(reason)
            assert breaker.current_state == agreed.state
            if agreed.state == "closed":
                continue
            assert {each.snapshot()["reason"] for each in breakers} == {agreed.reason}
            if not agreed.admits:
                left = agreed.ends - clock.now
                assert {each.retry_after for each in breakers} == {left}
            elif agreed.state == "half-open":
                error = rejection_beside_a_trial(breakers[other])
                assert error.reason == (agreed.why_opened or agreed.reason)
                assert error.retry_after == agreed.wait


# What the breaker asks when the circuit moves: move(move), and last_move().


class Noting(CircuitMemoryStorage):
    """Notes what it is asked, and does it."""

    def __init__(self, state="closed"):
        super().__init__(state)
        self.moves = []

    def move(self, move):
        self.moves.append(move)
        super().move(move)

    @property
    def told(self):
        return [(move.state, move.by) for move in self.moves]


@pytest.mark.parametrize(
    ("name", "method"),
    [("open", "open"), ("half-open", "half_open"), ("closed", "close")],
)
def test_a_move_by_hand_is_one_however_it_is_written(name, method):
    """The method, the setter and a listener that is told of a failure move by hand."""
    storage = Noting()
    breaker = CircuitBreaker(state_storage=storage)
    getattr(breaker, method)()
    breaker.state = name
    listener = type("Listener", (), {})()
    listener.failure = lambda cb, exc: getattr(cb, method)()
    breaker.close()
    breaker.add_listener(listener)
    del storage.moves[:]
    fail(breaker)
    assert storage.told == [(name, "hand")]
    breaker.remove_listener(listener)
    breaker.state = name
    getattr(breaker, method)()
    assert storage.told == [(name, "hand")] * 3


def test_a_move_through_an_override_that_takes_nothing_keeps_its_cause(clock):
    """Older subclasses have open(), half_open() and close() without arguments."""

    class Older(CircuitBreaker):
        def open(self):
            return super().open()

        def half_open(self):
            super().half_open()

        def close(self):
            super().close()

    storage = Noting()
    breaker = Older(1, 60, state_storage=storage)
    fail(breaker)
    clock.advance(60)
    breaker.call(int)
    breaker.open()
    assert [move.by for move in storage.moves] == ["count", "trial", "outcome", "hand"]


def test_a_move_says_what_a_shared_storage_has_to_know():
    """The move has the limit that was reached, the reason, and no length of its own."""
    storage = Noting()
    breaker = CircuitBreaker(fail_max=3, state_storage=storage)
    fail(breaker, 3)
    (move,) = storage.moves
    assert (move.state, move.by, move.fail_max) == ("open", "count", 3)
    assert move.seconds is None
    assert move.failed_trials == 0
    assert "Boom" in move.reason
    assert move.reason == breaker.state.reason


def test_a_storage_is_asked_with_the_lock_held(clock):
    """The storage must not block, because the lock is held."""

    class Locked(Noting):
        def move(self, move):
            with ThreadPoolExecutor(1) as pool:
                free = pool.submit(breaker._lock.acquire, False).result(30)
            locked.append(not free)
            super().move(move)

    locked = []
    breaker = CircuitBreaker(1, 60, state_storage=Locked())
    fail(breaker)
    clock.advance(60)
    breaker.call(int)
    breaker.open()
    assert locked == [True] * 4


def test_a_move_that_was_found_is_not_handed_back():
    """The storage made the move, or another breaker that shares the storage did."""
    storage = Noting()
    breaker = CircuitBreaker(state_storage=storage)
    storage.state = "open"
    assert breaker.state.name == "open"
    storage.state = "half-open"
    assert breaker.state.name == "half-open"
    assert storage.moves == []


def test_making_a_breaker_over_a_storage_moves_nothing():
    """The storage may have any of the three states."""
    storage = Noting("open")
    CircuitBreaker(state_storage=storage)
    assert storage.moves == []


def test_the_default_writes_the_counters_then_the_moment_then_the_state():
    """A program that reads the state of an opening first finds the rest written."""
    storage = Row()
    breaker = CircuitBreaker(fail_max=1, reset_timeout=0, state_storage=storage)
    with pytest.raises(CircuitBreakerError):
        breaker.call(boom)
    assert storage.writes == ["counter", "opened_at", "state"]
    del storage.writes[:]
    breaker.half_open()
    assert storage.writes == ["state"]
    del storage.writes[:]
    breaker.close()
    assert storage.writes == ["counter", "state"]
    assert storage.opened_at.tzinfo is timezone.utc


def test_a_storage_that_refuses_a_move_keeps_the_circuit_where_it_is():
    """The storage's exception reaches the caller."""

    class ReadOnly(CircuitMemoryStorage):
        def move(self, move):
            raise PermissionError(move.state)

    breaker = CircuitBreaker(fail_max=1, state_storage=ReadOnly("closed"))
    for name in ("open", "half-open"):
        with pytest.raises(PermissionError, match=name):
            breaker.state = name
    with pytest.raises(PermissionError):
        breaker.call(boom)
    assert breaker.current_state == "closed"


def test_the_base_class_knows_no_last_move():
    """Older storages need not keep a last move."""
    assert CircuitBreakerStorage("base").last_move() is None
    storage = Row()
    fail(CircuitBreaker(fail_max=1, state_storage=storage))
    assert storage.last_move() is None


@pytest.mark.parametrize("made", ["before", "after"])
@pytest.mark.parametrize("knows", [True, False])
def test_another_breaker_learns_why_from_a_storage_that_knows(knows, made):
    """The other breaker is made before or after the move. A storage without a last
    move tells the other breaker the state, and nothing more."""
    storage = CircuitMemoryStorage("closed") if knows else Row()
    breaker = CircuitBreaker(fail_max=1, state_storage=storage)
    other = CircuitBreaker(state_storage=storage)
    fail(breaker)
    if made == "after":
        other = CircuitBreaker(state_storage=storage)
    assert "Boom" in breaker.state.reason
    assert other.state.name == "open"
    assert (other.state.reason == breaker.state.reason) == knows
    assert ("Boom" in other.state.reason) == knows


def test_a_storage_may_tell_of_a_move_that_another_process_made():
    """A shared storage answers last_move() with any object that has the attributes."""

    class Shared(CircuitMemoryStorage):
        def last_move(self):
            return Remote()

    class Remote:
        state, by, reason = "open", "count", "3 failures in a row; the last: OSError()"
        seconds, failed_trials, fail_max = None, 0, 3

    storage = Shared("closed")
    breaker = CircuitBreaker(state_storage=storage)
    storage.state = "open"
    assert breaker.state.name == "open"
    assert breaker.state.reason == Remote.reason
    assert CircuitBreaker(state_storage=storage).state.reason == Remote.reason


def test_a_storage_may_forget_its_last_move():
    """An open circuit stays as it is, and a circuit that is moved without a reason is
    found so."""
    storage = CircuitMemoryStorage("closed")
    mover, finder = (CircuitBreaker(state_storage=storage) for _ in range(2))
    mover.open(reason="first")
    state = finder.state
    storage._last_move = None
    assert finder.state is state
    storage.state = "half-open"
    assert finder.state.reason == "found so in the storage"


def test_a_circuit_that_was_closed_and_opened_meanwhile_has_a_new_era():
    """Another breaker closed the circuit, and other code wrote that it is open."""
    storage = CircuitMemoryStorage("closed")
    mover, finder = (CircuitBreaker(state_storage=storage) for _ in range(2))
    mover.open(reason="first")
    state = finder.state
    mover.close()
    storage.state = "open"
    assert finder.state is not state
    assert finder.state.reason == "found so in the storage"
