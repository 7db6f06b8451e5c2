"""One circuit for many processes, shared through Redis.

    import redis
    from pybreaker_extras.redis import CircuitRedisStorage

    storage = CircuitRedisStorage("closed", redis.Redis(), namespace="weather")

``pybreaker.CircuitRedisStorage`` is the same class.

How it works. The processes that share a circuit are its *fleet*. A process decides
calls from memory and puts each change for the fleet into the storage's *outbox*. Each
client of Redis has a thread, the *courier*, which makes one *pass* after the other. In
a pass each circuit has an *exchange*: the courier takes the circuit's outbox, sends the
changes, and reads in the same pipeline what Redis has then, the *view*; the storage
follows the view. If the exchange fails, the courier puts the outbox back and the
storage notes that Redis is *away*: the process goes by its own circuit until an
exchange succeeds. A circuit whose outbox holds something has an exchange at once; every
circuit has one every `refresh` seconds. Between two passes the courier is idle.

A storage's `_Membership` says whether the circuit of its process is the fleet's. A trip
by the count is *unconfirmed* until `refresh` seconds have passed and a view shows the
count again. If the count is gone by then, the circuit of this process stays open
*apart* from the fleet's.

There are two kinds of locks. No thread waits for Redis while holding one. Each storage
has a mutex, which a breaker's thread takes while holding the breaker's lock and the
courier takes alone. The gate guards the list of couriers, and their starts and ends.

"Mutex held." and "Gate held." say that the caller holds the lock.
"""

from __future__ import annotations

import atexit
import contextlib
import copy
import inspect
import json
import logging
import math
import operator
import os
import queue
import sys
import threading
import time
import weakref
from datetime import datetime, timedelta, timezone
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, Callable, NamedTuple

from pybreaker import (
    STATE_CLOSED,
    STATE_HALF_OPEN,
    STATE_OPEN,
    CircuitBreakerStorage,
    CircuitMemoryStorage,
)

if TYPE_CHECKING:
    from collections.abc import Generator

    _Command = tuple[Any, ...]  # the command's name, the key, further arguments
    _Steps = Generator[list[_Command], Any, None]  # see `_Exchange.steps`

__all__ = ("CircuitRedisStorage",)

_PAUSE = 0.1  # seconds for which no claim is sent after Redis has refused one
_SAFETY_MARGIN = 0.25  # seconds; a command almost always reaches Redis within them
_LONGEST_LEASE = 86_400.0  # seconds until the claim of a killed process lapses
_COUNTERS = ("fail_counter", "success_counter")
_STATES = (STATE_CLOSED, STATE_OPEN, STATE_HALF_OPEN)


class CircuitRedisStorage(CircuitBreakerStorage):
    """Shares one circuit between processes, through Redis.

    `redis_object` is a client of redis-py or valkey-py: a `Redis`, a `RedisCluster`,
    one of their asyncio variants, or a proxy of a client. Calls are decided from
    memory, as with a `CircuitMemoryStorage`. A thread, the courier, exchanges changes
    with Redis every `refresh` seconds, and at once after a change in this process. Only
    a call that may become the trial waits for Redis, for at most `patience` seconds.
    All storages with the same client share a courier, which uses their smallest
    `refresh`.

    The count of failures is the fleet's, as last read from Redis, and this process adds
    each failure of its own at once. The failure that brings the count to `fail_max`
    opens the circuit of this process. The circuits of the other processes open one to
    two `refresh` later if Redis still has the count: a success in any process resets
    the count. The courier announces every other move at once, and the last move wins.
    One process at a time runs a trial.

    While Redis is away each process goes by its own circuit. The circuit of a process
    that has never reached Redis begins in `fallback_circuit_state`. `state` is written
    to Redis if Redis has no state.

    Older releases use four of the keys, and may do so at the same time:
    ``pybreaker:state``, ``pybreaker:fail_counter``, ``pybreaker:success_counter`` and
    ``pybreaker:opened_at``. Two keys are new: ``pybreaker:trial`` names the claim of
    the running trial, and ``pybreaker:opening`` has the length, the reason and the
    failed trials of the opening at ``opened_at``. A `namespace` and a colon go before
    each key. Every command is for a single key, so `cluster_mode` makes no difference.

    The constructor raises `TypeError` or `ValueError` for a wrong argument. If Redis
    does not answer, the constructor returns after `patience` seconds, and raises
    nothing.
    """

    _is_plain = True

    def __init__(
        self,
        state: str,
        redis_object: Any,
        namespace: str | None = None,
        fallback_circuit_state: str = STATE_CLOSED,
        cluster_mode: bool = False,
        *,
        refresh: float = 1.0,
        patience: float = 0.25,
    ) -> None:
        super().__init__("redis")
        state = _checked_state("state", state)
        self._state: str = _checked_state(
            "fallback_circuit_state", fallback_circuit_state
        )
        self._fail_counter = self._success_counter = 0
        if namespace is not None and not isinstance(namespace, str):
            raise TypeError(f"namespace must be a string or None, not {namespace!r}")
        self._prefix = f"{namespace}:pybreaker:" if namespace else "pybreaker:"
        self._refresh = _checked_seconds("refresh", refresh)
        self._patience = _checked_seconds("patience", patience)
        self._redis = redis_object  # programs in the field use this private name
        self._client = _client_behind(redis_object)

        self._mutex = threading.RLock()
        self._outbox = _Outbox()
        self._view = _View([state, None, None, None, None])
        self._membership = _Membership()
        self._opening = _Opening.at(None)
        self._last_move: Any = None
        self._refused_at = -math.inf
        self._claim: _Claim | None = None  # the claim of the running trial
        self._lapsing: _Claim | None = None  # the claim of the last failed trial
        self._courier: _Courier
        _join_courier(self)
        done = self._notify_when_sent()
        # If Redis has kept an earlier storage waiting, this storage does not wait too.
        if self._courier.link.silence() < self._patience:
            done.wait(self._patience)

    # The interface for a breaker and its owner. A breaker reads _state, _fail_counter
    # and _success_counter without the mutex.

    @property
    def state(self) -> str:
        """The state's name. Setting `state` moves the fleet's circuit."""
        return self._state

    @state.setter
    def state(self, state: str) -> None:
        state = _checked_state("state", state)
        with self._mutex:
            self._last_move, self._state = None, state
            self._opening = self._opening._replace(move=None)
            self._give_back_lapsing_claim()
            self._announce(state)
        self._courier.wake(self)

    @property
    def counter(self) -> int:
        """Failures in a row in all processes, as far as this process knows."""
        return self._fail_counter

    @counter.setter
    def counter(self, count: int) -> None:
        count = _checked_count("counter", count)
        self._change_counter("fail_counter", _CounterChange(count, 0))

    @property
    def success_counter(self) -> int:
        """Successful trials, in all processes."""
        return self._success_counter

    @success_counter.setter
    def success_counter(self, count: int) -> None:
        count = _checked_count("success_counter", count)
        self._change_counter("success_counter", _CounterChange(count, 0))

    def increment_counter(self) -> None:
        """Add one to `counter`."""
        self._change_counter("fail_counter", _ADD_ONE)

    def reset_counter(self) -> None:
        """Set `counter` to 0."""
        self._change_counter("fail_counter", _RESET)

    def increment_success_counter(self) -> None:
        """Add one to `success_counter`."""
        self._change_counter("success_counter", _ADD_ONE)

    def reset_success_counter(self) -> None:
        """Set `success_counter` to 0."""
        self._change_counter("success_counter", _RESET)

    @property
    def opened_at(self) -> datetime | None:
        """The moment of the last opening. Redis has the moment by its own clock and in
        whole seconds. Setting `opened_at` moves the opening."""
        return self._opening.moment

    @opened_at.setter
    def opened_at(self, moment: datetime | None) -> None:
        with self._mutex:
            self._opening = _Opening.at(moment, move=self._opening.move)
            self._outbox.opening |= not self._membership.opened_alone
        self._courier.wake(self)

    def open_for(self) -> float:
        """Seconds since the opening."""
        return self._opening.storage.open_for()

    def move(self, move: Any) -> None:
        """Move the circuit of this process, and tell the fleet: of a trip by the count
        only if a later view still has the count."""
        with self._mutex:
            membership = self._membership
            if move.by == "trial":
                # Redis keeps the state open during a trial. If the last view has moved
                # the circuit elsewhere, the breaker finds that state at its next call.
                if self._state == STATE_OPEN:
                    self._last_move, self._state = move, move.state
                return
            if move.state == STATE_OPEN:
                self._opening = _Opening.at(datetime.now(timezone.utc), move=move)
            self._last_move, self._state = move, move.state
            if move.by == "count":
                # If the fleet's count is not known, the trip needs no confirmation.
                cannot_tell = membership.is_away or membership.is_new
                if cannot_tell or self._view.state == STATE_OPEN:
                    self._announce(STATE_OPEN)
                else:
                    due = time.monotonic() + self._refresh
                    membership.unconfirmed = _Trip(due, move.fail_max)
            elif move.by == "outcome":
                if move.state == STATE_OPEN:
                    # Other processes may not know of this opening yet. The claim is not
                    # given back, so they run no trial until the claim lapses.
                    self._lapsing, self._claim = self._claim, None
                if not membership.opened_alone:
                    self._announce(move.state)
                elif move.state == STATE_CLOSED:
                    membership.rejoin()
            else:
                self._give_back_lapsing_claim()
                self._announce(move.state)
        self._courier.wake(self)

    def last_move(self) -> Any:
        """The move that brought the circuit to its state, or None if the storage does
        not know the move. Until the circuit moves again, each call returns the same
        object. Any thread may call this method at any time."""
        move = self._last_move
        return move if move is not None and move.state == self._state else None

    def claim_trial(self, timeout: float) -> bool:
        """Whether this process may run the trial that is due. The claim lapses after
        `timeout` seconds. The calling thread waits for the answer of Redis for at most
        `patience` seconds; without an answer the process may run the trial."""
        heard = threading.Event()
        claim = self._ask(timeout, heard.set)
        try:
            heard.wait(self._patience)
        except BaseException:
            self._give_back(claim)
            raise
        return self._conclude(claim)

    async def claim_trial_async(self, timeout: float) -> bool:
        """Answers as `claim_trial` does. An event loop of asyncio or trio runs other
        tasks meanwhile."""
        wait, hear = _waiter(self._patience)
        claim = self._ask(timeout, hear)
        try:
            await wait()
        except BaseException:
            self._give_back(claim)
            raise
        return self._conclude(claim)

    def release_trial(self) -> None:
        """Give the claim of the running trial back. Redis gets all other changes in the
        outbox first."""
        with self._mutex:
            claim, self._claim = self._claim, None
        self._give_back(claim)

    def _ask(self, timeout: float, on_answer: Callable[[], object]) -> _Claim:
        """Make a claim and put it into the outbox, unless the answer is known."""
        claim = _Claim(timeout, on_answer)
        with self._mutex:
            if self._membership.is_alone:
                claim.answer(True)
            elif time.monotonic() - self._refused_at < _PAUSE:
                claim.answer(False)
            else:
                self._outbox.asked.append(claim)
        if claim.granted is None:
            self._courier.wake(self)
        return claim

    def _conclude(self, claim: _Claim) -> bool:
        """Whether the call that made the claim may run the trial."""
        with self._mutex:
            if claim.granted is False:
                return False
            self._claim = claim  # a claim without an answer may still reach Redis
            return True

    def _give_back(self, claim: _Claim | None) -> None:
        if claim is not None:
            with self._mutex:
                self._outbox.returned.append(claim)
            self._courier.wake(self)

    def _change_counter(self, key: str, change: _CounterChange) -> None:
        with self._mutex:
            setattr(self, "_" + key, change.applied_to(getattr(self, "_" + key)))
            membership = self._membership
            # Of the changes made while Redis is away, Redis later gets only the resets.
            if membership.is_alone and not (membership.is_away and change == _RESET):
                return
            self._outbox.add_change(key, change)
        self._courier.wake(self)

    def _announce(self, state: str) -> None:
        """Tell the fleet that the circuit has moved to `state`. Mutex held."""
        self._membership.rejoin()
        self._outbox.state = state
        self._outbox.opening |= state == STATE_OPEN

    def _give_back_lapsing_claim(self) -> None:
        """Let the fleet run the next trial before the claim lapses. Mutex held."""
        claim, self._lapsing = self._lapsing, None
        self._give_back(claim)

    # The interface for the courier's threads.

    def _due_at(self) -> float:
        """When this storage needs an exchange besides the round of all storages, by the
        monotonic clock; -inf for at once, inf for never."""
        with self._mutex:
            membership = self._membership
            # While Redis is away the outbox is sent in the rounds only.
            if self._outbox.waiting or (self._outbox and not membership.is_away):
                return -math.inf
            trip = membership.unconfirmed
            return math.inf if trip is None else trip.due

    def _follow(
        self, view: _View, has_moved: bool, age: float, trip: _Trip | None
    ) -> None:
        """Follow the view's circuit if it `has_moved`, or else confirm or drop `trip`.
        `age` is the seconds since the opening in the view."""
        with self._mutex:
            membership = self._membership
            if has_moved and self._outbox.state is None:
                if view.state == STATE_OPEN:
                    self._opening = _Opening.at(view.moment, age, view.move)
                else:
                    self._give_back_lapsing_claim()
                self._last_move, self._state = view.move, view.state
                membership.rejoin()
            elif trip is not None and trip is membership.unconfirmed:
                membership.end_confirmation()
                if view.fail_counter >= trip.fail_max:
                    self._announce(STATE_OPEN)
            for key in _COUNTERS:
                unsent = self._outbox.changes.get(key, _NO_CHANGE)
                if unsent.base is None and not membership.is_apart:
                    setattr(self, "_" + key, unsent.applied_to(getattr(view, key)))
            # These come last: if the process forks before, the child follows the view
            # again.
            self._view, membership.is_new = view, False

    def _note_redis_away(self, why: str, unsent: _Outbox | None = None) -> None:
        """Put the outbox `unsent` back and let this process go by its own circuit.
        `why` is for the log."""
        with self._mutex:
            if unsent is not None:
                self._outbox.put_back(unsent)
            was_away, self._membership.is_away = self._membership.is_away, True
            self._outbox.drop_failures()
            asked, self._outbox.asked = self._outbox.asked, []
            if self._membership.unconfirmed is not None:
                self._announce(STATE_OPEN)
        for claim in asked:
            claim.answer(True)
        if not was_away:
            message = "%s Redis is away, each process goes by its own circuit (%s)"
            _log(logging.WARNING, message, self._prefix, why)

    def _note_redis_back(self) -> None:
        """Let this process go by the fleet's circuit again."""
        with self._mutex:
            was_away, self._membership.is_away = self._membership.is_away, False
        if was_away:
            _log(logging.INFO, "%s Redis is back", self._prefix)

    # The start and the end of a process.

    def _notify_when_sent(self) -> threading.Event:
        """An event that is set when the next exchange, which takes the present outbox,
        has succeeded or failed."""
        done = threading.Event()
        with self._mutex:
            self._outbox.waiting.append(done)
        self._courier.wake(self)
        return done

    def _send_before_exit(self) -> threading.Event | None:
        """An event that is set after the last exchange of a process that ends; None if
        there is nothing to send."""
        with self._mutex:
            if self._membership.unconfirmed is not None:
                self._announce(STATE_OPEN)  # no later view will confirm the trip
            if not self._outbox and id(self) not in self._courier._kept:
                return None
        return self._notify_when_sent()

    def _reset_after_fork(self) -> None:
        """Begin anew in the child of a fork. The outbox, the claims and the unconfirmed
        trip remain the parent's."""
        self._mutex = threading.RLock()
        self._outbox = _Outbox()
        self._claim = self._lapsing = None
        self._membership.end_confirmation()
        _join_courier(self)


class _Opening(NamedTuple):
    """The last opening. An `_Opening` never changes, as a breaker may read the
    storage's `_Opening` without the mutex."""

    moment: datetime | None  # what `opened_at` returns
    storage: CircuitMemoryStorage  # measures `open_for()`
    move: Any  # the move that opened the circuit, or None if it is not known

    @classmethod
    def at(
        cls, moment: datetime | None, age: float | None = None, move: Any = None
    ) -> _Opening:
        """An opening at `moment` by the clock of this host; or, if `moment` is by the
        clock of Redis, an opening `age` seconds ago."""
        storage = CircuitMemoryStorage(STATE_OPEN)
        if age is None:
            storage.opened_at = moment
        elif age == math.inf:
            storage.opened_at = None
        else:
            storage.opened_at = datetime.now(timezone.utc) - timedelta(seconds=age)
        return cls(moment, storage, move)


class _Membership:
    """Whether a process goes by the fleet's circuit or by its own."""

    def __init__(self) -> None:
        self.is_new = True  # no exchange has succeeded so far
        self.is_away = False  # the last exchange failed, or Redis has been silent
        self.unconfirmed: _Trip | None = None  # the trip that a view may still confirm
        self.is_apart = False  # the circuit is open by a trip that no view confirmed

    @property
    def is_alone(self) -> bool:
        """Whether Redis gets no failures of this process and is asked for no trial."""
        return self.is_away or self.is_apart

    @property
    def opened_alone(self) -> bool:
        """Whether this process opened its circuit and the fleet did not, or not yet."""
        return self.is_apart or self.unconfirmed is not None

    def end_confirmation(self) -> None:
        """An unconfirmed trip, if there is one, sets the circuit apart."""
        self.unconfirmed, self.is_apart = None, self.opened_alone

    def rejoin(self) -> None:
        """This process goes by the fleet's circuit again."""
        self.unconfirmed, self.is_apart = None, False


class _Trip(NamedTuple):
    """A trip by the count. The fleet's circuit opens too if the first view read at
    `due` (monotonic) or later has `fail_max` failures."""

    due: float
    fail_max: float


class _CounterChange(NamedTuple):
    """A change of a counter: set it to `base`, unless None, then add `added`."""

    base: int | None
    added: int

    def applied_to(self, number: int) -> int:
        """The value of a counter that was `number` before the change."""
        return (number if self.base is None else self.base) + self.added

    def followed_by(self, later: _CounterChange) -> _CounterChange:
        """The one change that does what this change and then `later` do."""
        if later.base is not None:
            return later
        return _CounterChange(self.base, self.added + later.added)


_NO_CHANGE, _ADD_ONE = _CounterChange(None, 0), _CounterChange(None, 1)
_RESET = _CounterChange(0, 0)


class _Outbox:
    """What a storage has to send. An exchange takes the whole outbox, and puts the
    outbox back if the exchange fails."""

    __slots__ = ("changes", "state", "opening", "asked", "returned", "waiting")

    def __init__(self) -> None:
        self.changes: dict[str, _CounterChange] = {}  # by key
        self.state: str | None = None  # the state that the circuit has moved to
        self.opening = False  # whether Redis lacks the storage's last opening
        self.asked: list[_Claim] = []  # claims that Redis is to grant or refuse
        self.returned: list[_Claim] = []  # claims that Redis is to delete
        self.waiting: list[threading.Event] = []  # are set when the exchange is over

    def __bool__(self) -> bool:
        return bool(
            self.changes or self.state or self.opening or self.asked or self.returned
        )

    def add_change(self, key: str, change: _CounterChange) -> None:
        self.changes[key] = self.changes.get(key, _NO_CHANGE).followed_by(change)

    def put_back(self, older: _Outbox) -> None:
        """Put the contents of an older outbox before the contents of this outbox."""
        newer, self.changes = self.changes, older.changes
        for key, change in newer.items():
            self.add_change(key, change)
        self.asked = older.asked + self.asked
        self.state = self.state or older.state
        self.opening |= older.opening
        self.returned += [claim for claim in older.returned if claim.is_safe()]

    def drop_failures(self) -> None:
        """Keep only the resets of the counters."""
        resets = [key for key, change in self.changes.items() if change.base == 0]
        self.changes = dict.fromkeys(resets, _RESET)


class _Claim:
    """Asks Redis whether this process may run the trial. Redis grants the claim by
    keeping the claim's `token` under the key ``trial`` for `lease` milliseconds."""

    def __init__(self, timeout: float, on_answer: Callable[[], object]) -> None:
        self.token = os.urandom(16).hex()
        self.lease = max(1, math.ceil(1000 * min(timeout, _LONGEST_LEASE)))
        self.command = "SET", "trial", self.token, "NX", "PX", self.lease
        self.granted: bool | None = None  # None before the answer
        self._on_answer = on_answer
        self._end = time.monotonic() + self.lease / 1000

    def answer(self, granted: bool) -> None:
        """Tell the waiting call whether Redis grants the claim. Only the first answer
        holds."""
        if self.granted is None:
            self.granted = granted
            try:
                self._on_answer()
            except Exception as exc:  # the event loop of the caller is closed
                _log(logging.DEBUG, "nobody waits for the answer any more: %r", exc)

    def is_safe(self) -> bool:
        """Whether the lease is long enough for a ``DEL`` to reach Redis before another
        process can have a claim under the key."""
        left = self._end - time.monotonic()
        return left > min(_SAFETY_MARGIN, self.lease / 4000)


class _Circuit(NamedTuple):
    """The values of three keys of a circuit. `opened_at` and `opening` are None unless
    the circuit is open."""

    state: Any
    opened_at: str | None
    opening: str | None

    def differs_from(self, expected: _Circuit) -> bool:
        # A missing key ``opening`` alone is no new opening: Redis may have lost it.
        return self[:2] != expected[:2] or self.opening not in (None, expected.opening)

    def commands(self) -> list[_Command]:
        """The commands that write the circuit. The state comes last, so that no process
        reads an open circuit without its moment of opening."""
        commands: list[_Command] = []
        if self.opening is not None:
            commands.append(("SET", "opening", self.opening))
        if self.opened_at is not None:
            commands.append(("SET", "opened_at", self.opened_at))
        return [*commands, ("SET", "state", self.state)]


class _FoundMove(NamedTuple):
    """The move of another process that opened the circuit, read from the key
    ``opening``."""

    reason: str
    by: str
    seconds: float | None
    failed_trials: int
    state: str = STATE_OPEN
    fail_max: float = math.inf


class _View:
    """What an exchange has read from Redis: the values of one circuit's keys. A missing
    or broken value is None, or 0 for a counter."""

    keys = ("state", "fail_counter", "success_counter", "opened_at", "opening")

    @classmethod
    def commands(cls, for_trial: bool) -> list[_Command]:
        """The commands that read the keys, with the key ``trial`` if `for_trial`."""
        commands = [("GET", key) for key in cls.keys]
        return commands + [("GET", "trial"), ("PTTL", "trial")] * for_trial

    def __init__(self, replies: list[Any]) -> None:
        state, fail_counter, success_counter, opened_at, opening, *trial = replies
        self.broken: set[str] = set()  # keys whose values make no sense
        self.state = self._value("state", state, lambda s: _checked_state("state", s))
        self.fail_counter = self._value("fail_counter", fail_counter, _read_count) or 0
        self.success_counter = (
            self._value("success_counter", success_counter, _read_count) or 0
        )
        self.moment = self._value("opened_at", opened_at, _read_moment)
        if self.moment is None or self.state != STATE_OPEN:
            opened_at = None
        about, move = self._value("opening", opening, _read_opening) or (None, None)
        if about is None or about != opened_at:
            opening = move = None
        self.move = move  # the move that opened the circuit, or None
        self.circuit = _Circuit(self.state, opened_at, opening)
        self.holder = self.lease = None
        if trial:
            self.holder = self._value("trial", trial[0], str)
            self.lease = trial[1]

    def _value(self, key: str, reply: Any, read: Callable[[Any], Any]) -> Any:
        self.note_error(key, reply)
        if reply is None or isinstance(reply, Exception):
            return None
        try:
            return read(reply)
        except Exception:  # reading nonsense may raise anything
            self.broken.add(key)
            return None

    def note_error(self, key: str, reply: Any) -> None:
        """Note the key as broken if the reply is an error about its value. Raise any
        other error."""
        if isinstance(reply, Exception):
            about_values = "WRONGTYPE", "wrong kind", "not an integer"
            if not any(part in str(reply) for part in about_values):
                raise reply
            self.broken.add(key)


def _read_count(text: str) -> int:
    return _checked_count("count", int(text))


def _read_moment(text: str) -> datetime:
    return datetime.fromtimestamp(int(text), timezone.utc)


def _opening_text(opened_at: str | None, move: Any) -> str | None:
    """The value of the key ``opening``; None if there is nothing to write."""
    if opened_at is None or move is None or move.state != STATE_OPEN:
        return None
    opening = {
        "opened_at": opened_at,
        "reason": move.reason,
        "by": move.by,
        "seconds": move.seconds,
        "failed_trials": move.failed_trials,
    }
    return json.dumps(opening)


def _read_opening(text: str) -> tuple[str, _FoundMove]:
    """The `opened_at` and the move in the value of the key ``opening``. Raises any
    error for a value that makes no sense."""
    opening = json.loads(text)
    seconds, failed_trials = opening["seconds"], opening["failed_trials"]
    if seconds is not None and not 0 <= seconds <= math.inf:
        raise ValueError(text)
    if not isinstance(failed_trials, int) or failed_trials < 0:
        raise ValueError(text)
    reason, by = str(opening["reason"]), str(opening["by"])
    return opening["opened_at"], _FoundMove(reason, by, seconds, failed_trials)


class _Exchange:
    """One circuit's part in a pass: sends the storage's outbox, and lets the storage
    follow the view."""

    def __init__(self, storage: CircuitRedisStorage) -> None:
        """Take the outbox from the storage."""
        with storage._mutex:
            self.storage = storage
            self.outbox, storage._outbox = storage._outbox, _Outbox()
            self.membership = copy.copy(storage._membership)
            self.began = now = time.monotonic()
            self.opened, self.move = now - storage.open_for(), storage._opening.move
            # The circuit that Redis has if no other process has moved the circuit;
            # `_writes` adds the moves in the outbox.
            self.expected = storage._view.circuit

    def steps(self, clock: _Clock) -> _Steps:
        """A generator that yields lists of commands. The courier sends the replies into
        the generator, or throws in the pipeline's error. The generator handles every
        error, so that none reaches another circuit's exchange."""
        storage, outbox = self.storage, self.outbox
        try:
            view = yield from self._view_after(self._writes(clock))
            returns = self._apply_view(view, clock)
            # Redis has these changes. If the next step fails, they must not be sent
            # again: that would undo later changes of other processes.
            outbox.changes, outbox.state, outbox.opening = {}, None, False
            if returns:
                yield self._with_prefix(returns)
            if time.monotonic() - self.began <= 2 * storage._courier.refresh:
                storage._note_redis_back()
        except Exception as exc:
            storage._note_redis_away(f"{type(exc).__name__}: {exc}", outbox)
        finally:
            for done in outbox.waiting:
                done.set()

    def _writes(self, clock: _Clock) -> list[_Command]:
        """The commands that write the outbox to Redis. Updates `expected`."""
        outbox = self.outbox
        writes: list[_Command] = []
        if outbox.state is not None and self.membership.is_away:
            # While Redis was away, the outbox may have lost the move's resets.
            reset = _COUNTERS if outbox.state == STATE_CLOSED else _COUNTERS[1:]
            for key in reset:
                outbox.changes.setdefault(key, _RESET)
        for key, change in outbox.changes.items():
            name = "INCRBY" if change.base is None else "SET"
            writes.append((name, key, change.applied_to(0)))
        state, opened_at, opening = self.expected
        if outbox.opening:
            opened_at = clock.moment_of(self.opened)
            opening = _opening_text(opened_at, self.move)
            for key, text in (("opening", opening), ("opened_at", opened_at)):
                writes.append(("DEL", key) if text is None else ("SET", key, text))
        if outbox.state is not None:
            state = outbox.state
            writes.append(("SET", "state", state))
            if state == STATE_CLOSED:
                writes.append(("DEL", "opening"))
        if state != STATE_OPEN:
            opened_at = opening = None
        self.expected = _Circuit(state, opened_at, opening)
        writes += [claim.command for claim in outbox.asked]
        if self.membership.is_away:
            # These commands test writing: a Redis that answers reads may refuse writes.
            writes += [(*command, "NX") for command in self.expected.commands()]
        return writes

    def _view_after(
        self, writes: list[_Command]
    ) -> Generator[list[_Command], Any, _View]:
        """Send the writes and return the view. Missing and broken values are written
        anew before, so that a flush does not close a circuit. Raises `ValueError` if
        Redis does not keep the values."""
        reads = _View.commands(bool(self.outbox.asked or self.outbox.returned))
        for _ in range(3):
            replies = yield self._with_prefix(writes + reads)
            view = _View(replies[len(writes) :])
            for (_, key, *_), reply in zip(writes, replies):
                view.note_error(key, reply)
            if view.state is not None and not view.broken:
                return view
            writes = self._repairs(view)
        raise ValueError("Redis does not keep what it is given")

    def _with_prefix(self, commands: list[_Command]) -> list[_Command]:
        prefix = self.storage._prefix
        return [(name, prefix + key, *rest) for name, key, *rest in commands]

    def _repairs(self, view: _View) -> list[_Command]:
        """The commands that write the view's missing and broken values anew."""
        storage, known = self.storage, self.expected.commands()
        has_own_counts = self.membership.is_away or self.membership.is_new
        repairs: list[_Command] = []
        for key in _COUNTERS:
            count = getattr(storage, "_" + key)
            if key in view.broken:
                repairs.append(("SET", key, count))
            elif view.state is None and not has_own_counts:
                repairs.append(("SET", key, count, "NX"))
        for key in ("trial", "opening", "opened_at"):
            if key in view.broken and key not in [name for _, name, _ in known]:
                repairs.append(("DEL", key))
        for command in known:
            is_broken = command[1] in view.broken
            repairs.append(command if is_broken else (*command, "NX"))
        if view.broken:
            message = "%s Redis had no good value for %s; it has now"
            keys = ", ".join(sorted(view.broken))
            _log(logging.WARNING, message, storage._prefix, keys)
        return repairs

    def _apply_view(self, view: _View, clock: _Clock) -> list[_Command]:
        """Let the storage follow the view, and answer the claims. Returns the commands
        that give claims back."""
        storage, circuit = self.storage, view.circuit
        has_moved = self.membership.is_new or circuit.differs_from(self.expected)
        is_opening = has_moved and circuit.state == STATE_OPEN
        age = clock.age_of(circuit.opened_at) if is_opening else 0.0
        # An exchange that began before the trip was due cannot confirm the trip.
        trip = self.membership.unconfirmed
        if trip is not None and self.began < trip.due:
            trip = None
        storage._follow(view, has_moved, age, trip)
        asked, returned = self.outbox.asked, self.outbox.returned
        own = [claim.token for claim in returned]
        commands: list[_Command] = []
        for claim in asked:
            if view.holder in own and claim.token not in own:
                # An earlier claim of this process has the key, and is given back below.
                # The next exchange asks again.
                with storage._mutex:
                    storage._outbox.asked.append(claim)
                continue
            is_granted = view.holder == claim.token and not has_moved
            if not is_granted:
                storage._refused_at = time.monotonic()
            claim.answer(is_granted)
            if claim.granted is False:
                returned.append(claim)
                if view.lease == -1:  # the key has no lease, so no process set it
                    commands.append(("PEXPIRE", "trial", claim.lease))
        for claim in returned:
            if view.holder == claim.token and claim.is_safe():
                commands.append(("DEL", "trial"))
        return commands


class _Courier:
    """Makes passes for all storages of one client, in a thread of its own, until the
    last of the storages is gone. As a client may wait for Redis for ever, a second
    thread, the watch, notices when Redis is silent."""

    def __init__(self, client: Any) -> None:
        self.link = _Link(client)
        self.refresh = math.inf  # the smallest `refresh` of the storages
        self.patience = 0.0  # the longest `patience` of the storages
        # All storages, by id.
        self._members: dict[int, weakref.ref[CircuitRedisStorage]] = {}
        # The storages that may have something to send or are in a pass, by id. None of
        # these is collected.
        self._kept: dict[int, CircuitRedisStorage] = {}
        self._next_round = -math.inf  # when the next pass takes all storages
        self._signals: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._is_stopping = False
        self._over = threading.Event()  # is set while the courier's thread does not run
        self._over.set()
        self._threads: list[threading.Thread] = []

    def wake(self, storage: CircuitRedisStorage) -> None:
        """Ask for a pass: the storage has something to send or an unconfirmed trip."""
        self._kept[id(storage)] = storage
        if self._signals.empty():  # a million failures leave one signal
            self._signals.put(None)

    def add(self, storage: CircuitRedisStorage) -> None:
        """Take the storage into the courier's passes. Gate held."""

        # A thread that holds any lock may collect the storage, so forget takes no lock.
        def forget(_: object, key: int = id(storage)) -> None:
            self._members.pop(key, None)
            self._signals.put(None)

        self._members[id(storage)] = weakref.ref(storage, forget)
        self.refresh = min(self.refresh, storage._refresh)
        self.patience = max(self.patience, storage._patience)

    def storages(self) -> list[CircuitRedisStorage]:
        """The courier's storages that are alive."""
        found = (member() for member in self._members.copy().values())
        return [storage for storage in found if storage is not None]

    def start(self) -> None:
        """Start both threads, unless they run. Raises `RuntimeError` if no thread can
        start. Gate held."""
        self._is_stopping = False
        if not self._over.is_set():
            return
        over = self._over = threading.Event()
        self._threads = []
        # The courier's former thread may still be closing the former link.
        self.link = _Link(self.link.client)
        try:
            for target, name in (
                (self._watch, "pybreaker courier's watch"),
                (self._carry, "pybreaker courier"),
            ):
                thread = threading.Thread(
                    target=target, args=(over,), name=name, daemon=True
                )
                thread.start()
                self._threads.append(thread)
        except BaseException:  # the next storage tries to start the threads again
            over.set()
            raise

    def stop(self) -> None:
        """Tell both threads to end. Gate held."""
        self._is_stopping = True
        self._signals.put(None)

    def wait(self, end: float) -> None:
        """Wait until both threads have ended, at most until `end` (monotonic)."""
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        for thread in self._threads:
            # The system may list the thread for a moment after join() has returned.
            task = f"/proc/self/task/{thread.native_id}"
            while os.path.exists(task) and time.monotonic() < end:
                time.sleep(0.0001)

    def _carry(self, over: threading.Event) -> None:
        """Run the courier's thread."""
        link = self.link
        while self._goes_on(over):
            idle_time = self.make_pass()
            # In Python 3.9, get() with a timeout of 0 may block for ever.
            with contextlib.suppress(queue.Empty):
                self._signals.get(idle_time > 0.0, idle_time or None)
        link.close()

    def _goes_on(self, over: threading.Event) -> bool:
        """Whether the courier makes another pass. If not, set `over`."""
        with _gate:
            if self._members and not self._is_stopping:
                return True
            over.set()
            if not self._members:
                _couriers.pop(id(self.link.client), None)
            return False

    def make_pass(self) -> float:
        """Make an exchange for each storage that is due. Returns the seconds until the
        next storage is due."""
        start = time.monotonic()
        self._next_round = min(self._next_round, start + self.refresh)
        is_round = start >= self._next_round
        if is_round:
            with _gate:  # so that no storage with a smaller `refresh` joins meanwhile
                storages = self.storages()
                refreshes = (storage._refresh for storage in storages)
                self.refresh = min(refreshes, default=self.refresh)
            self._next_round = start + self.refresh
            self._kept.update((id(storage), storage) for storage in storages)
        # Outside of rounds, only storages with work are in the pass, so that no trial
        # waits for hundreds of idle circuits.
        kept = self._kept.copy().values()
        due = [storage for storage in kept if is_round or storage._due_at() <= start]
        if due:
            self._exchange(due)
        next_due = self._next_round
        for storage in self._kept.copy().values():
            # The storage is removed first: a thread may call wake() before _due_at().
            self._kept.pop(id(storage), None)
            due_at = storage._due_at()
            if due_at < math.inf:
                self._kept[id(storage)] = storage
            next_due = min(next_due, due_at)
        return max(0.0, next_due - time.monotonic())

    def _exchange(self, storages: list[CircuitRedisStorage]) -> None:
        """Make the exchanges of these storages, one pipeline for each step of all."""
        clock = _Clock(self.link)
        replies: dict[_Steps, Any] = {}
        for storage in storages:
            replies[_Exchange(storage).steps(clock)] = None
        while replies:
            commands: dict[_Steps, list[_Command]] = {}
            for steps, reply in replies.items():
                with contextlib.suppress(StopIteration):
                    commands[steps] = steps.send(reply)
            replies = self._send(commands) if commands else {}

    def _send(self, commands: dict[_Steps, list[_Command]]) -> dict[_Steps, Any]:
        """Send the commands of all exchanges in one pipeline, and return the replies by
        exchange. If the pipeline fails, throw its error into all exchanges."""
        try:
            replies = iter(self.link.run(list(chain.from_iterable(commands.values()))))
        except Exception as exc:
            for steps in commands:
                with contextlib.suppress(StopIteration):
                    steps.throw(exc)
            return {}
        return {s: list(islice(replies, len(own))) for s, own in commands.items()}

    def _watch(self, over: threading.Event) -> None:
        """Run the watch's thread."""
        period = 0.0
        while not over.wait(period):
            self._notice_silence()
            period = self.refresh / 2

    def _notice_silence(self) -> None:
        silence = self.link.silence()
        if silence > 2 * self.refresh:
            for storage in self.storages():
                storage._note_redis_away(f"no answer for {silence:.1f} s")


# The couriers that have storages, by the id of the client. A thread holds the gate
# while it starts a courier, gives a courier a storage, or ends a courier.
_couriers: dict[int, _Courier] = {}
_gate = threading.RLock()


def _join_courier(storage: CircuitRedisStorage) -> None:
    """Give the storage the courier of its client, and start that courier if it does not
    run."""
    client = storage._client
    _register_with_multiprocessing()
    with _gate:
        courier = _couriers.get(id(client))
        if courier is None:
            courier = _couriers[id(client)] = _Courier(client)
        storage._courier = courier  # set before the first pass, which reads it
        courier.add(storage)
        courier.start()


# In the child of a fork only the thread that forked runs. So all couriers end before a
# fork and start again in the parent, and the child gets couriers of its own.


def _before_fork() -> None:
    _register_with_multiprocessing()
    with _gate:
        couriers = list(_couriers.values())
        for courier in couriers:
            courier.stop()
    begin = time.monotonic()
    for courier in couriers:
        courier.wait(begin + courier.patience)


def _after_fork_in_parent() -> None:
    with _gate:
        for courier in _couriers.values():
            courier.start()


def _after_fork_in_child() -> None:
    global _gate
    _gate = threading.RLock()
    couriers = list(_couriers.values())
    _couriers.clear()
    for courier in couriers:
        for storage in courier.storages():
            storage._reset_after_fork()


def _at_exit() -> None:
    """Wait until all storages have sent their outboxes, for each storage at most
    `patience` seconds."""
    begin = time.monotonic()
    with _gate:
        storages = [s for courier in _couriers.values() for s in courier.storages()]
    pending = [(storage, storage._send_before_exit()) for storage in storages]
    for storage, done in pending:
        if done is not None:
            done.wait(max(0.0, begin + storage._patience - time.monotonic()))


def _register_with_multiprocessing() -> None:
    """Let `multiprocessing` call `_at_exit` in the processes that it forks, which do
    not run `atexit` functions."""
    util: Any = sys.modules.get("multiprocessing.util")
    if util is not None and not _registered:
        _registered.append(True)

        def register(at_exit: Callable[[], None]) -> None:
            util.Finalize(None, at_exit, exitpriority=0)

        register(_at_exit)  # multiprocessing may have forked this process
        util.register_after_fork(_at_exit, register)


_registered: list[bool] = []

# Windows has no forks.
getattr(os, "register_at_fork", lambda **_: None)(
    before=_before_fork,
    after_in_parent=_after_fork_in_parent,
    after_in_child=_after_fork_in_child,
)
atexit.register(_at_exit)


class _Link:
    """Sends commands to Redis through the client, from the courier's thread. For every
    kind of client, replies have texts as str, and the methods of the link are plain
    functions: the link runs the coroutines of an asyncio client to their end."""

    def __init__(self, client: Any) -> None:
        self.client = client
        self.asked_at: float | None = None  # since when an answer is awaited
        self._own: Any = None
        self._loop: Any = None

    def run(self, commands: list[_Command]) -> list[Any]:
        """Send commands in one pipeline and return the replies, with exceptions for the
        commands that Redis refuses. Raises the client's error if the pipeline fails."""
        pipe = self._connected().pipeline(transaction=False)
        for command in commands:
            pipe.execute_command(*command, NEVER_DECODE=True)
        replies = self._answer(pipe.execute, raise_on_error=False)
        return [
            r.decode("utf-8", "replace") if isinstance(r, bytes) else r for r in replies
        ]

    def silence(self) -> float:
        """Seconds for which an answer has been awaited; 0 if none is."""
        asked_at = self.asked_at
        return 0.0 if asked_at is None else time.monotonic() - asked_at

    def time(self) -> float:
        """The Unix time by the clock of Redis."""
        now = self._answer(self._connected().time)
        if isinstance(now, dict):  # a cluster gives the time of each node
            now = next(iter(now.values()))
        return float(now[0]) + float(now[1]) / 1e6

    def close(self) -> None:
        """Close the client and the event loop that the link made for itself, if any."""
        own, loop = self._own, self._loop
        self._own = self._loop = None
        if loop is not None:
            try:
                close = getattr(own, "aclose", None) or own.close
                loop.run_until_complete(close())
                loop.run_until_complete(own.connection_pool.disconnect())
            except Exception as exc:
                _log(logging.DEBUG, "the connection to Redis was lost: %r", exc)
            finally:
                loop.close()

    def _connected(self) -> Any:
        """The program's client. Instead of an asyncio client, which belongs to the
        program's event loop, a copy of it with a loop of the link's own."""
        if not _is_async(self.client):
            return self.client
        if self._own is None:
            loop = _new_loop()
            try:
                pool = self.client.connection_pool
                own_pool = type(pool)(
                    connection_class=pool.connection_class, **pool.connection_kwargs
                )
                self._own = type(self.client)(connection_pool=own_pool)
            except BaseException:
                loop.close()
                raise
            self._loop = loop
        return self._own

    def _answer(self, ask: Callable[..., Any], **options: Any) -> Any:
        self.asked_at = time.monotonic()
        try:
            answer = ask(**options)
            if self._loop is not None:
                answer = self._loop.run_until_complete(answer)
            return answer
        finally:
            self.asked_at = None


def _new_loop() -> Any:
    """A new event loop for the calling thread. The loop starts no threads."""
    import asyncio
    import socket

    async def getaddrinfo(*args: Any, **options: Any) -> Any:
        return socket.getaddrinfo(*args, **options)

    loop = asyncio.new_event_loop()
    # In Python 3.9 a lock looks for the thread's loop when the lock is made.
    asyncio.set_event_loop(loop)
    # The loop's own getaddrinfo() starts a thread. Python starts no threads at the end
    # of a process, and a process should have no other threads when it forks.
    setattr(loop, "getaddrinfo", getaddrinfo)  # noqa: B010
    return loop


class _Clock:
    """The clock of Redis. One pass asks Redis for the time at most once."""

    def __init__(self, link: _Link) -> None:
        self._link = link
        # Seconds from the monotonic clock of this process to the clock of Redis; None
        # before Redis is asked, NaN if Redis has not answered.
        self._ahead: float | None = None

    def moment_of(self, opened: float) -> str | None:
        """The value of ``opened_at`` for a moment by the monotonic clock: seconds,
        rounded up, as older releases read whole ones only. None for -inf."""
        return None if opened == -math.inf else str(math.ceil(opened + self._asked()))

    def age_of(self, opened_at: str | None) -> float:
        """Seconds since the opening: at least 0, and inf for None."""
        if opened_at is None:
            return math.inf
        return max(0.0, time.monotonic() + self._asked() - int(opened_at))

    def _asked(self) -> float:
        if self._ahead is None:
            self._ahead = math.nan  # so that Redis is not asked again after an error
            self._ahead = self._link.time() - time.monotonic()
        if math.isnan(self._ahead):
            raise RuntimeError("Redis has not told the time")
        return self._ahead


def _client_behind(redis_object: Any) -> Any:
    """The client itself where `redis_object` is a proxy of a client, such as Werkzeug's
    LocalProxy, which other threads may not use. Raises `TypeError` if there is no
    client."""
    method = getattr(redis_object, "pipeline", None)
    for client in (getattr(method, "__self__", None), redis_object):
        if not isinstance(client, type) and all(
            callable(getattr(client, name, None))
            for name in ("pipeline", "execute_command", "time")
        ):
            pool = getattr(client, "connection_pool", None)
            if not _is_async(client) or hasattr(pool, "connection_kwargs"):
                return client
    raise TypeError(
        f"redis_object must be a client of redis-py or valkey-py, such as "
        f"redis.Redis(), not {redis_object!r}"
    )


def _is_async(client: Any) -> bool:
    return inspect.iscoroutinefunction(inspect.unwrap(client.execute_command))


def _waiter(patience: float) -> Any:
    """A coroutine function that waits on the running event loop, for at most `patience`
    seconds, and a function by which any thread ends the waiting."""
    # These errors say that the library is not loaded, or runs no loop in this thread.
    with contextlib.suppress(KeyError, AttributeError, RuntimeError):
        trio: Any = sys.modules["trio"]
        trio.lowlevel.current_task()
        return _trio_waiter(trio, patience)
    with contextlib.suppress(KeyError, AttributeError, RuntimeError):
        asyncio: Any = sys.modules["asyncio"]
        return _asyncio_waiter(asyncio.get_running_loop(), patience)
    return _other_waiter(patience)


def _asyncio_waiter(loop: Any, patience: float) -> Any:
    future = loop.create_future()

    def end() -> None:
        if not future.done():
            future.set_result(None)

    async def wait() -> None:
        timer = loop.call_later(patience, end)
        try:
            await future
        finally:
            timer.cancel()

    return wait, lambda: loop.call_soon_threadsafe(end)


def _trio_waiter(trio: Any, patience: float) -> Any:
    token, heard = trio.lowlevel.current_trio_token(), trio.Event()

    async def wait() -> None:
        with trio.move_on_after(patience):
            await heard.wait()

    return wait, lambda: token.run_sync_soon(heard.set)


def _other_waiter(patience: float) -> Any:
    heard = threading.Event()

    async def wait() -> None:
        heard.wait(patience)

    return wait, heard.set


def _log(*args: Any) -> None:
    try:
        logging.getLogger("pybreaker").log(*args)
    except Exception:
        return  # an error of a filter or a handler must not end the courier


def _checked_state(parameter: str, state: Any) -> Any:
    if state not in _STATES:
        names = f"{STATE_CLOSED!r}, {STATE_OPEN!r} or {STATE_HALF_OPEN!r}"
        raise ValueError(f"{parameter} must be {names}, not {state!r}")
    return state


def _checked_count(parameter: str, value: Any) -> int:
    whole = isinstance(value, float) and value.is_integer()
    count = _index(parameter, int(value) if whole else value, "a whole number")
    if count < 0:
        raise ValueError(f"{parameter} must be at least 0, not {value!r}")
    return count


def _checked_seconds(parameter: str, value: Any) -> Any:
    if not isinstance(value, float):
        value = _index(parameter, value, "a number of seconds")
    if not 0 < value <= threading.TIMEOUT_MAX:  # nor NaN
        raise ValueError(
            f"{parameter} must be some seconds, more than 0 and not without an end, "
            f"not {value!r}"
        )
    return value


def _index(parameter: str, value: Any, what: str) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{parameter} must be {what}, not {value!r}") from None
