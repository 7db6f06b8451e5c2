"""What a storage is asked when the circuit moves: move(move), and last_move()."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from support import boom, fail

from pybreaker import (
    CircuitBreaker,
    CircuitBreakerError,
    CircuitBreakerStorage,
    CircuitMemoryStorage,
)


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


class Basic(CircuitBreakerStorage):
    """Has what a storage of an older program has, and notes what is written."""

    def __init__(self):
        super().__init__("basic")
        self.values = {"state": "closed", "counter": 0, "opened_at": None}
        self.writes = []

    def write(self, name, value):
        self.writes.append(name)
        self.values[name] = value

    state = property(
        lambda self: self.values["state"],
        lambda self, state: self.write("state", state),
    )
    counter = property(lambda self: self.values["counter"])
    opened_at = property(
        lambda self: self.values["opened_at"],
        lambda self, moment: self.write("opened_at", moment),
    )

    def increment_counter(self):
        self.write("counter", self.counter + 1)

    def reset_counter(self):
        self.write("counter", 0)


def test_a_storage_is_told_where_each_move_goes_and_by_whom(clock):
    """A move is by the count, the trial that is due, that trial's outcome, or a
    hand."""
    storage = Noting()
    breaker = CircuitBreaker(2, 60, state_storage=storage)
    fail(breaker, 2)
    assert storage.told == [("open", "count")]
    clock.advance(60)
    fail(breaker)
    assert storage.told[1:] == [("half-open", "trial"), ("open", "outcome")]
    clock.advance(60)
    breaker.call(int)
    assert storage.told[3:] == [("half-open", "trial"), ("closed", "outcome")]


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
    storage = Basic()
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
    storage = Basic()
    fail(CircuitBreaker(fail_max=1, state_storage=storage))
    assert storage.last_move() is None


def test_the_memory_storage_knows_its_last_move():
    """The last move has the attributes that the storage was told of."""
    storage = CircuitMemoryStorage("closed")
    breaker = CircuitBreaker(fail_max=2, state_storage=storage)
    fail(breaker, 2)
    last = storage.last_move()
    assert (last.state, last.by, last.seconds) == ("open", "count", None)
    assert last.reason == breaker.state.reason
    breaker.close()
    assert (storage.last_move().state, storage.last_move().by) == ("closed", "hand")


@pytest.mark.parametrize("made", ["before", "after"])
def test_another_breaker_over_a_memory_storage_learns_why_it_moved(made):
    """The other breaker finds the storage moved, or is made over one that has moved."""
    storage = CircuitMemoryStorage("closed")
    breaker = CircuitBreaker(fail_max=1, state_storage=storage)
    other = CircuitBreaker(state_storage=storage)
    fail(breaker)
    if made == "after":
        other = CircuitBreaker(state_storage=storage)
    assert "Boom" in breaker.state.reason
    assert other.state.reason == breaker.state.reason


@pytest.mark.parametrize("made", ["before", "after"])
def test_over_a_storage_without_a_last_move_only_the_mover_knows_why(made):
    """The other breaker sees the state, and nothing more."""
    storage = Basic()
    breaker = CircuitBreaker(fail_max=1, state_storage=storage)
    other = CircuitBreaker(state_storage=storage)
    fail(breaker)
    if made == "after":
        other = CircuitBreaker(state_storage=storage)
    assert "Boom" in breaker.state.reason
    assert other.state.name == "open"
    assert "Boom" not in other.state.reason


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
