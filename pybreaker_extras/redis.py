"""One circuit for many processes, shared through Redis.

    import redis
    from pybreaker_extras.redis import CircuitRedisStorage

    storage = CircuitRedisStorage("closed", redis.Redis(), namespace="weather")

``pybreaker.CircuitRedisStorage`` is the same class.

How it works. Calls are decided from memory. What a process has to tell the fleet goes
into the storage's *outbox*. A thread, the *courier*, makes one *pass* after the other.
In a pass each circuit has an *exchange*: the courier takes the storage's outbox, sends
the contents, reads in the same pipeline what Redis has afterwards, the *view*, and the
storage follows the view. If the exchange fails, the courier puts the outbox back and
the storage goes *away*: the process goes by its own circuit until an exchange succeeds.
There is one courier for each client. All circuits of the client share the courier's
pipelines: circuits with something in the outbox at once, all circuits every `refresh`
seconds. Between passes the courier has *idle time*.

How far a process goes with the fleet is its `_Membership`. A trip by the count is
*unconfirmed* until a view that is one `refresh` younger still has that count. If the
count is gone by then, the circuit of this process stays open *apart* from the fleet's.

Two locks, each held for moments, and by no thread that waits for Redis: a storage's
mutex, which the threads of a breaker take while they hold the breaker's lock, and the
courier's threads by itself; and the gate, where couriers begin and end.
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

    _Command = tuple[Any, ...]  # its name, a key, and the rest
    _Steps = Generator[list[_Command], Any, None]  # see `_Exchange.steps`

__all__ = ("CircuitRedisStorage",)

_PAUSE = 0.1  # seconds between claims, after one was refused
_SAFE = 0.25  # seconds that a command is hardly ever under way
_LONGEST_LEASE = 86_400.0  # seconds: a process that is killed gives no claim back
_COUNTERS = ("fail_counter", "success_counter")
_STATES = (STATE_CLOSED, STATE_OPEN, STATE_HALF_OPEN)


class CircuitRedisStorage(CircuitBreakerStorage):
    """Shares one circuit between processes, through Redis.

    `redis_object` is a client of redis-py or valkey-py: `Redis`, `RedisCluster`
    or the one for asyncio, or a proxy of one. Calls are decided from memory, as they
    are with a `CircuitMemoryStorage`. A thread, the courier, carries changes to Redis
    and back, every `refresh` seconds and at once after a change here. Only a call that
    is due as a trial waits for Redis, for at most `patience` seconds. All storages
    with the same client share a courier, which goes by the smallest `refresh`.

    A failure counts in this process at once; the count is the fleet's, as this process
    last heard of it. The failure that brings the count to `fail_max` opens the circuit
    of this process; the circuits of the other processes follow one to two `refresh`
    later, if the count still stands in Redis then: a success in any process sets the
    count back. All other moves are announced at once, and the last one wins. One
    process at a time runs a trial.

    While Redis is away each process goes by its own circuit, which it begins in
    `fallback_circuit_state` if it has never heard from Redis. `state` is what
    Redis is given where it has none.

    The keys, with `namespace` and a colon before them if there is one, are those
    of older releases, which may use them at the same time: ``pybreaker:state``,
    ``pybreaker:fail_counter``, ``pybreaker:success_counter``,
    ``pybreaker:opened_at``; and two more: ``pybreaker:trial``, the claim of the process
    that runs the trial, and ``pybreaker:opening``, the length, the reason and the
    failed trials of the opening at ``opened_at``. All commands are for single keys, so
    `cluster_mode` makes no difference.

    Raises `TypeError` if `redis_object` is no client. Where Redis does not answer, the
    constructor raises nothing, and waits for at most `patience` seconds.
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
        self._redis = redis_object  # by a name that programs in the field use
        self._client = _client_behind(redis_object)

        self._mutex = threading.RLock()
        self._outbox = _Outbox()
        self._view = _View([state, None, None, None, None])
        self._membership = _Membership()
        self._opening = _Opening.at(None)
        self._last_move: Any = None
        self._refused_at = -math.inf
        self._claim: _Claim | None = None  # of the trial that runs
        self._lapsing: _Claim | None = None  # of the last trial that failed
        self._courier: _Courier
        _join_courier(self)
        done = self._notify_when_sent()
        # Where a storage has waited in vain already, the next ones do not.
        if self._courier.link.silence() < self._patience:
            done.wait(self._patience)

    # What a breaker and its owner do. A breaker reads the private attributes of these
    # names without the lock.

    @property
    def state(self) -> str:
        """The state's name. Setting it moves the circuit of the fleet."""
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
        """Failures in a row, in all processes, as far as they are known here."""
        return self._fail_counter

    @counter.setter
    def counter(self, count: int) -> None:
        self._count("fail_counter", _Count(_checked_count("counter", count), 0))

    @property
    def success_counter(self) -> int:
        """Successful trials, in all processes."""
        return self._success_counter

    @success_counter.setter
    def success_counter(self, count: int) -> None:
        self._count(
            "success_counter", _Count(_checked_count("success_counter", count), 0)
        )

    def increment_counter(self) -> None:
        """Add one to `counter`."""
        self._count("fail_counter", _ADD_ONE)

    def reset_counter(self) -> None:
        """Set `counter` to 0."""
        self._count("fail_counter", _RESET)

    def increment_success_counter(self) -> None:
        """Add one to `success_counter`."""
        self._count("success_counter", _ADD_ONE)

    def reset_success_counter(self) -> None:
        """Set `success_counter` to 0."""
        self._count("success_counter", _RESET)

    @property
    def opened_at(self) -> datetime | None:
        """The moment of the last opening: in Redis, by its clock and in whole
        seconds. Setting it moves the opening."""
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
        """Move the circuit of this process, and that of the fleet; after a trip by the
        count that of the fleet follows if the count lasts."""
        with self._mutex:
            membership = self._membership
            if move.by == "trial":
                # Redis goes on saying open. If the last view says something else, that
                # stands, and the breaker finds it at its next call.
                if self._state == STATE_OPEN:
                    self._last_move, self._state = move, move.state
                return
            if move.state == STATE_OPEN:
                self._opening = _Opening.at(datetime.now(timezone.utc), move=move)
            self._last_move, self._state = move, move.state
            if move.by == "count":
                # Where the count of the fleet is not known, the trip stands.
                cannot_tell = membership.is_away or membership.is_new
                if cannot_tell or self._view.state == STATE_OPEN:
                    self._announce(STATE_OPEN)
                else:
                    due = time.monotonic() + self._refresh
                    membership.unconfirmed = _Trip(due, move.fail_max)
            elif move.by == "outcome":
                if move.state == STATE_OPEN:
                    # Other processes may not have heard of this opening yet. They run
                    # no trial before the claim lapses.
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
        """The move that has brought the circuit to its state, or None if the storage
        does not know that move. Returns the same object until the circuit moves again.
        Any thread may call this method at any time."""
        move = self._last_move
        return move if move is not None and move.state == self._state else None

    def claim_trial(self, timeout: float) -> bool:
        """Whether this process may run the trial that is due. Waits for the
        answer of Redis for at most `patience` seconds; without one, it may."""
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
        """Give the claim of this process back. The courier sends what is in the outbox
        already before Redis drops the claim."""
        with self._mutex:
            claim, self._claim = self._claim, None
        self._give_back(claim)

    def _ask(self, timeout: float, hear: Callable[[], object]) -> _Claim:
        claim = _Claim(timeout, hear)
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
        with self._mutex:
            if claim.granted is False:
                return False
            self._claim = claim  # one without an answer may still reach Redis
            return True

    def _give_back(self, claim: _Claim | None) -> None:
        if claim is not None:
            with self._mutex:
                self._outbox.returned.append(claim)
            self._courier.wake(self)

    def _count(self, key: str, count: _Count) -> None:
        with self._mutex:
            setattr(self, "_" + key, count.after(getattr(self, "_" + key)))
            membership = self._membership
            # While Redis is away, failures stay here, and a reset is told later.
            if membership.is_alone and not (membership.is_away and count == _RESET):
                return
            self._outbox.count(key, count)
        self._courier.wake(self)

    # Mutex held.

    def _announce(self, state: str) -> None:
        """Tell the fleet that the circuit has moved to this state."""
        self._membership.rejoin()
        self._outbox.state = state
        self._outbox.opening |= state == STATE_OPEN

    def _give_back_lapsing_claim(self) -> None:
        claim, self._lapsing = self._lapsing, None
        self._give_back(claim)

    # What the threads of the courier call.

    def _due_at(self) -> float:
        """The moment, by the monotonic clock, of the next exchange that this storage
        needs before the round of all storages: -inf for at once, inf for none."""
        with self._mutex:
            membership = self._membership
            # While Redis is away the outbox waits for the next round.
            if self._outbox.waiting or (self._outbox and not membership.is_away):
                return -math.inf
            trip = membership.unconfirmed
            return math.inf if trip is None else trip.due

    def _follow(
        self, view: _View, has_moved: bool, age: float, trip: _Trip | None
    ) -> None:
        """Follow the circuit in Redis if it has moved there, else judge `trip`. `age`
        is the age, in seconds, of the opening in `view`."""
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
                membership.wait_no_longer()
                if view.fail_counter >= trip.fail_max:
                    self._announce(STATE_OPEN)
            for key in _COUNTERS:
                unsent = self._outbox.counts.get(key, _ADD_NOTHING)
                if unsent.base is None and not membership.is_apart:
                    setattr(self, "_" + key, unsent.after(getattr(view, key)))
            # These come last: the child of a fork that was made in between follows the
            # same view again.
            self._view, membership.is_new = view, False

    def _go_away(self, why: str, unsent: _Outbox | None = None) -> None:
        """Let this process go by its own circuit from now on. `unsent` is the outbox of
        an exchange that has failed; `why` is for the log."""
        with self._mutex:
            if unsent is not None:
                self._outbox.put_under(unsent)
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

    def _come_back(self) -> None:
        with self._mutex:
            was_away, self._membership.is_away = self._membership.is_away, False
        if was_away:
            _log(logging.INFO, "%s Redis is back", self._prefix)

    # What begins and ends a process.

    def _notify_when_sent(self) -> threading.Event:
        """Returns an event that the courier sets after the exchange of all that is in
        the outbox now, whether or not the exchange goes well."""
        done = threading.Event()
        with self._mutex:
            self._outbox.waiting.append(done)
        self._courier.wake(self)
        return done

    def _last_words(self) -> threading.Event | None:
        """Called at the end of the process. Returns an event as `_notify_when_sent`
        does, or None if all has been sent."""
        with self._mutex:
            if self._membership.unconfirmed is not None:
                self._announce(STATE_OPEN)  # there will be no view to judge the trip
            if not self._outbox and not self._courier.keeps(self):
                return None
        return self._notify_when_sent()

    def _renew(self) -> None:
        """Begin anew in the child of a fork. The parent sends what is in the outbox,
        and sees to it that an unconfirmed trip is judged."""
        self._mutex = threading.RLock()
        self._outbox = _Outbox()
        self._claim = self._lapsing = None
        self._membership.wait_no_longer()
        _join_courier(self)


class _Opening(NamedTuple):
    """The last opening. The storage replaces this object as a whole, because a breaker
    may read the opening without the lock."""

    moment: datetime | None  # as `opened_at` says it
    storage: CircuitMemoryStorage  # knows the rule of clocks
    move: Any  # that has opened the circuit, or None if the storage does not know it

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
    """How far a process goes with its fleet."""

    def __init__(self) -> None:
        self.is_new = True  # Redis has never answered
        self.is_away = False  # Redis does not answer now
        self.unconfirmed: _Trip | None = None  # the trip that Redis may still confirm
        self.is_apart = False  # open by a trip that Redis has not confirmed

    @property
    def is_alone(self) -> bool:
        """Whether counts and trials stay in this process."""
        return self.is_away or self.is_apart

    @property
    def opened_alone(self) -> bool:
        """Whether the circuit is open here and the fleet has not followed."""
        return self.is_apart or self.unconfirmed is not None

    def wait_no_longer(self) -> None:
        """Treat an unconfirmed trip as a trip that Redis does not confirm."""
        self.unconfirmed, self.is_apart = None, self.opened_alone

    def rejoin(self) -> None:
        """Take in that the circuits of this process and of the fleet agree again."""
        self.unconfirmed, self.is_apart = None, False


class _Trip(NamedTuple):
    """A trip by the count. The fleet follows if the count still stands when due."""

    due: float  # by the monotonic clock
    fail_max: float


class _Count(NamedTuple):
    """A change of a counter: set to a number, added to, or both in that order."""

    base: int | None  # the number that the counter was set to; None if it was not set
    added: int  # the number that was added afterwards

    def after(self, number: int) -> int:
        """The counter after this change, where the counter was `number`."""
        return (number if self.base is None else self.base) + self.added

    def then(self, later: _Count) -> _Count:
        """The change that does the same as this change and then `later`."""
        if later.base is not None:
            return later
        return _Count(self.base, self.added + later.added)


_ADD_NOTHING, _ADD_ONE, _RESET = _Count(None, 0), _Count(None, 1), _Count(0, 0)


class _Outbox:
    """What a storage has to send. An exchange takes the whole outbox; an exchange that
    fails puts the outbox back."""

    __slots__ = ("counts", "state", "opening", "asked", "returned", "waiting")

    def __init__(self) -> None:
        self.counts: dict[str, _Count] = {}
        self.state: str | None = None  # the circuit has moved there
        self.opening = False  # the storage has an opening that Redis does not have
        self.asked: list[_Claim] = []
        self.returned: list[_Claim] = []
        self.waiting: list[threading.Event] = []  # set when the pass is over

    def __bool__(self) -> bool:
        return bool(
            self.counts or self.state or self.opening or self.asked or self.returned
        )

    def count(self, key: str, count: _Count) -> None:
        self.counts[key] = self.counts.get(key, _ADD_NOTHING).then(count)

    def put_under(self, older: _Outbox) -> None:
        """Put back an older outbox. What this outbox has is newer and wins."""
        newer, self.counts = self.counts, older.counts
        for key, count in newer.items():
            self.count(key, count)
        self.asked = older.asked + self.asked
        self.state = self.state or older.state
        self.opening |= older.opening
        self.returned += [claim for claim in older.returned if claim.is_safe()]

    def drop_failures(self) -> None:
        """Forget what was added to the counters, and keep which were reset."""
        self.counts = {key: _RESET for key, c in self.counts.items() if c.base == 0}


class _Claim:
    """A question to Redis: may this process run the trial?"""

    def __init__(self, timeout: float, hear: Callable[[], object]) -> None:
        self.token = os.urandom(16).hex()
        self.lease = max(1, math.ceil(1000 * min(timeout, _LONGEST_LEASE)))
        self.command = "SET", "trial", self.token, "NX", "PX", self.lease
        self.granted: bool | None = None
        self._hear = hear
        self._end = time.monotonic() + self.lease / 1000

    def answer(self, granted: bool) -> None:
        if self.granted is None:
            self.granted = granted
            try:
                self._hear()
            except Exception as exc:  # the caller's event loop is gone
                _log(logging.DEBUG, "nobody waits for the answer any more: %r", exc)

    def is_safe(self) -> bool:
        """Whether Redis will still have this claim, and no other process's, when Redis
        hears that the claim is given back."""
        left = self._end - time.monotonic()
        return left > min(_SAFE, self.lease / 4000)


class _Circuit(NamedTuple):
    """The circuit as Redis has it. `opened_at` and `opening` are None unless `state` is
    ``'open'``."""

    state: Any
    opened_at: str | None
    opening: str | None

    def differs_from(self, expected: _Circuit) -> bool:
        # Redis may have lost the text of an opening. That makes no new opening.
        return self[:2] != expected[:2] or self.opening not in (None, expected.opening)

    def commands(self) -> list[_Command]:
        """The commands that write the circuit. The state comes last: no process may see
        an open circuit without a moment of opening."""
        commands: list[_Command] = []
        if self.opening is not None:
            commands.append(("SET", "opening", self.opening))
        if self.opened_at is not None:
            commands.append(("SET", "opened_at", self.opened_at))
        return [*commands, ("SET", "state", self.state)]


class _FoundMove(NamedTuple):
    """An opening by another process, as far as the key ``opening`` tells."""

    reason: str
    by: str
    seconds: float | None
    failed_trials: int
    state: str = STATE_OPEN
    fail_max: float = math.inf


class _View:
    """What Redis has under the keys of one circuit, read from `replies`."""

    keys = ("state", "fail_counter", "success_counter", "opened_at", "opening")

    @classmethod
    def commands(cls, for_trial: bool) -> list[_Command]:
        commands = [("GET", key) for key in cls.keys]
        return commands + [("GET", "trial"), ("PTTL", "trial")] * for_trial

    def __init__(self, replies: list[Any]) -> None:
        state, fail_counter, success_counter, opened_at, opening, *trial = replies
        self.broken: set[str] = set()  # keys under which there is nonsense
        self.state = self._value("state", state, _read_state)
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
        self.move = move  # that has opened the circuit, where it is open
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
        except Exception:  # whatever comes of reading nonsense
            self.broken.add(key)
            return None

    def note_error(self, key: str, reply: Any) -> None:
        """Note that a key is broken, if the reply is an error about the key's value.
        Raises any other error."""
        if isinstance(reply, Exception):
            about_values = "WRONGTYPE", "wrong kind", "not an integer"
            if not any(part in str(reply) for part in about_values):
                raise reply
            self.broken.add(key)


def _read_state(text: str) -> Any:
    return _checked_state("state", text)


def _read_count(text: str) -> int:
    return _checked_count("count", int(text))


def _read_moment(text: str) -> datetime:
    return datetime.fromtimestamp(int(text), timezone.utc)


def _opening_text(opened_at: str | None, move: Any) -> str | None:
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
    """The moment of the opening that the text is about, and the move."""
    opening = json.loads(text)
    seconds, failed_trials = opening["seconds"], opening["failed_trials"]
    if seconds is not None and not 0 <= seconds <= math.inf:
        raise ValueError(text)
    if not isinstance(failed_trials, int) or failed_trials < 0:
        raise ValueError(text)
    reason, by = str(opening["reason"]), str(opening["by"])
    return opening["opened_at"], _FoundMove(reason, by, seconds, failed_trials)


class _Exchange:
    """One circuit's part in a pass: what it sends, and what comes of the replies."""

    def __init__(self, storage: CircuitRedisStorage) -> None:
        """Take the outbox from the storage, and copy what the steps need to know."""
        with storage._mutex:
            self.storage = storage
            self.outbox, storage._outbox = storage._outbox, _Outbox()
            self.membership = copy.copy(storage._membership)
            self.began = now = time.monotonic()
            self.opened, self.move = now - storage.open_for(), storage._opening.move
            # What Redis has after the writes, if no other process moves the circuit.
            self.expected = storage._view.circuit

    def steps(self, clock: _Clock) -> _Steps:
        """A generator. Each step yields commands; the courier sends in the replies of
        Redis, or throws in the error of the pipeline. An error concerns this circuit
        alone."""
        storage, outbox = self.storage, self.outbox
        try:
            view = yield from self._view_after(self._writes(clock))
            returns = self._take_in(view, clock)
            # Redis has these. Sent again, they would undo what came after them.
            outbox.counts, outbox.state, outbox.opening = {}, None, False
            if returns:
                yield self._with_prefix(returns)
            if time.monotonic() - self.began <= 2 * storage._courier.refresh:
                storage._come_back()
        except Exception as exc:
            storage._go_away(f"{type(exc).__name__}: {exc}", outbox)
        finally:
            for done in outbox.waiting:
                done.set()

    def _writes(self, clock: _Clock) -> list[_Command]:
        """The commands that send the outbox. Sets `expected`."""
        outbox = self.outbox
        writes: list[_Command] = []
        if outbox.state is not None and self.membership.is_away:
            # The resets that belong to the move were not kept.
            reset = _COUNTERS if outbox.state == STATE_CLOSED else _COUNTERS[1:]
            for key in reset:
                outbox.counts.setdefault(key, _RESET)
        for key, count in outbox.counts.items():
            name = "INCRBY" if count.base is None else "SET"
            writes.append((name, key, count.after(0)))
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
            # A Redis that can be read may still refuse writes.
            writes += [(*command, "NX") for command in self.expected.commands()]
        return writes

    def _view_after(
        self, writes: list[_Command]
    ) -> Generator[list[_Command], Any, _View]:
        """Send the writes, and return what Redis has afterwards. Repairs keys that are
        missing or broken first: a flush of Redis closes no circuit."""
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

    def _take_in(self, view: _View, clock: _Clock) -> list[_Command]:
        """Let the storage follow the view, and answer the claims. Returns the commands
        that give claims back."""
        storage, circuit = self.storage, view.circuit
        has_moved = self.membership.is_new or circuit.differs_from(self.expected)
        is_opening = has_moved and circuit.state == STATE_OPEN
        age = clock.age_of(circuit.opened_at) if is_opening else 0.0
        # The view that judges a trip was asked for when the trip was due, so it has all
        # that was counted before.
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
                with storage._mutex:
                    storage._outbox.asked.append(claim)
                continue
            is_granted = view.holder == claim.token and not has_moved
            if not is_granted:
                storage._refused_at = time.monotonic()
            claim.answer(is_granted)
            if claim.granted is False:
                returned.append(claim)
                if view.lease == -1:  # a claim of no process: theirs have a lease
                    commands.append(("PEXPIRE", "trial", claim.lease))
        for claim in returned:
            if view.holder == claim.token and claim.is_safe():
                commands.append(("DEL", "trial"))
        return commands


class _Courier:
    """Makes passes for all storages of one client, in a thread of its own, until the
    last storage is gone. Some clients wait for ever, so a second thread, the watch,
    notices when Redis is silent."""

    def __init__(self, client: Any) -> None:
        self.link = _Link(client)
        self.refresh = math.inf  # seconds: the smallest `refresh` of the storages
        self.patience = 0.0  # seconds: the longest `patience` of the storages
        self._members: dict[int, weakref.ref[CircuitRedisStorage]] = {}  # by id()
        # The storages that have something to send or are in a pass, by id(), so that
        # none of them is collected before.
        self._kept: dict[int, CircuitRedisStorage] = {}
        self._next_round = -math.inf  # when all storages are in the pass
        self._signals: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._is_stopping = False
        self._over = threading.Event()  # is set while the courier does not run
        self._over.set()
        self._threads: list[threading.Thread] = []

    def wake(self, storage: CircuitRedisStorage) -> None:
        """Make a pass soon, for a storage that has something to send or whose trip is
        unconfirmed."""
        self._kept[id(storage)] = storage
        if self._signals.empty():  # a million failures leave one signal
            self._signals.put(None)

    def keeps(self, storage: CircuitRedisStorage) -> bool:
        """Whether the storage may have something to send, or is in a pass."""
        return id(storage) in self._kept

    def add(self, storage: CircuitRedisStorage) -> None:
        """Take a storage into the passes. Gate held."""

        # The storage may be collected anywhere, so this takes no lock.
        def lose(_: object, key: int = id(storage)) -> None:
            self._members.pop(key, None)
            self._signals.put(None)

        self._members[id(storage)] = weakref.ref(storage, lose)
        self.refresh = min(self.refresh, storage._refresh)
        self.patience = max(self.patience, storage._patience)

    def storages(self) -> list[CircuitRedisStorage]:
        """The storages that are alive; the list keeps them alive."""
        found = (member() for member in self._members.copy().values())
        return [storage for storage in found if storage is not None]

    def start(self) -> None:
        """Start both threads, or let them go on after `stop`. Gate held."""
        self._is_stopping = False
        if not self._over.is_set():
            return
        over = self._over = threading.Event()
        self._threads = []
        # The thread before may still be closing its own link.
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
        except BaseException:  # no thread can be had, so the next storage tries again
            over.set()
            raise

    def stop(self) -> None:
        """Let both threads end. Gate held."""
        self._is_stopping = True
        self._signals.put(None)

    def wait(self, end: float) -> None:
        """Wait until both threads have ended, or the monotonic clock says `end`."""
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        for thread in self._threads:
            # The system may still show a thread for a moment after join() returns.
            task = f"/proc/self/task/{thread.native_id}"
            while os.path.exists(task) and time.monotonic() < end:
                time.sleep(0.0001)

    def _carry(self, over: threading.Event) -> None:
        link = self.link
        while self._goes_on(over):
            idle_time = self.make_pass()
            # Told to block for 0 s, Python 3.9 may wait for ever.
            with contextlib.suppress(queue.Empty):
                self._signals.get(idle_time > 0.0, idle_time or None)
        link.close()

    def _goes_on(self, over: threading.Event) -> bool:
        with _gate:
            if self._members and not self._is_stopping:
                return True
            over.set()
            if not self._members:
                _couriers.pop(id(self.link.client), None)
            return False

    def make_pass(self) -> float:
        """Let the storages that are due have an exchange. Returns the idle time until
        the next storage is due."""
        start = time.monotonic()
        self._next_round = min(self._next_round, start + self.refresh)
        is_round = start >= self._next_round
        if is_round:
            with _gate:  # no storage with a smaller refresh joins meanwhile
                storages = self.storages()
                refreshes = (storage._refresh for storage in storages)
                self.refresh = min(refreshes, default=self.refresh)
            self._next_round = start + self.refresh
            self._kept.update((id(storage), storage) for storage in storages)
        # Else only few are due: no trial waits for two hundred idle circuits.
        kept = self._kept.copy().values()
        due = [storage for storage in kept if is_round or storage._due_at() <= start]
        if due:
            self._exchange(due)
        next_due = self._next_round
        for storage in self._kept.copy().values():
            # Removed first, as meanwhile a thread may wake the courier for the storage.
            self._kept.pop(id(storage), None)
            due_at = storage._due_at()
            if due_at < math.inf:
                self._kept[id(storage)] = storage
            next_due = min(next_due, due_at)
        return max(0.0, next_due - time.monotonic())

    def _exchange(self, storages: list[CircuitRedisStorage]) -> None:
        """Let the circuits of these storages take their steps together."""
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
        """Send the commands of all circuits in one pipeline, and return the replies of
        each circuit. A pipeline that fails fails for all circuits: no replies."""
        try:
            replies = iter(self.link.run(list(chain.from_iterable(commands.values()))))
        except Exception as exc:
            for steps in commands:
                with contextlib.suppress(StopIteration):
                    steps.throw(exc)
            return {}
        return {s: list(islice(replies, len(own))) for s, own in commands.items()}

    def _watch(self, over: threading.Event) -> None:
        period = 0.0
        while not over.wait(period):
            self._notice_silence()
            period = self.refresh / 2

    def _notice_silence(self) -> None:
        silence = self.link.silence()
        if silence > 2 * self.refresh:
            for storage in self.storages():
                storage._go_away(f"no answer for {silence:.1f} s")


# The couriers that have storages, by the id of the client. The gate is held where a
# courier begins, gets a storage, or ends.
_couriers: dict[int, _Courier] = {}
_gate = threading.RLock()


def _join_courier(storage: CircuitRedisStorage) -> None:
    """Give the storage the courier of its client, which takes the storage into its
    passes from now on."""
    client = storage._client
    _deliver_at_the_end_of_processes()
    with _gate:
        courier = _couriers.get(id(client))
        if courier is None:
            courier = _couriers[id(client)] = _Courier(client)
        storage._courier = courier  # which the first pass asks for
        courier.add(storage)
        courier.start()


# A fork copies the thread that forks and no other. So all couriers end before a fork
# and begin again in the parent, and the child gets couriers of its own.


def _before_fork() -> None:
    _deliver_at_the_end_of_processes()
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
            storage._renew()


def _at_exit() -> None:
    """Wait until all storages have sent what they have to send; for each of them at
    most its `patience`."""
    begin = time.monotonic()
    with _gate:
        storages = [s for courier in _couriers.values() for s in courier.storages()]
    told = [(storage, storage._last_words()) for storage in storages]
    for storage, done in told:
        if done is not None:
            done.wait(max(0.0, begin + storage._patience - time.monotonic()))


def _deliver_at_the_end_of_processes() -> None:
    """A forked `multiprocessing.Process` runs no `atexit` functions, but those that are
    registered with `multiprocessing` in that process."""
    util: Any = sys.modules.get("multiprocessing.util")
    if util is not None and not _registered:
        _registered.append(True)

        def register(at_exit: Callable[[], None]) -> None:
            util.Finalize(None, at_exit, exitpriority=0)

        register(_at_exit)  # this process may be one itself
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
    """The connection to Redis, for the courier's thread alone. Returns texts as str,
    and runs the coroutines of an asyncio client to their end."""

    def __init__(self, client: Any) -> None:
        self.client = client
        self.asked_at: float | None = None  # a moment, while Redis owes an answer
        self._own: Any = None
        self._loop: Any = None

    def run(self, commands: list[_Command]) -> list[Any]:
        """Send commands in one pipeline. Errors that Redis answers are among the
        replies."""
        pipe = self._connected().pipeline(transaction=False)
        for command in commands:
            pipe.execute_command(*command, NEVER_DECODE=True)
        replies = self._answer(pipe.execute, raise_on_error=False)
        return [
            r.decode("utf-8", "replace") if isinstance(r, bytes) else r for r in replies
        ]

    def silence(self) -> float:
        """For how many seconds Redis has owed an answer; 0.0 if Redis owes none."""
        asked_at = self.asked_at
        return 0.0 if asked_at is None else time.monotonic() - asked_at

    def time(self) -> float:
        """The time by the clock of Redis."""
        now = self._answer(self._connected().time)
        if isinstance(now, dict):  # the time of each node of a cluster
            now = next(iter(now.values()))
        return float(now[0]) + float(now[1]) / 1e6

    def close(self) -> None:
        """Close the connection, unless it belongs to the program's client."""
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
        """The program's client; for an asyncio client, which belongs to the program's
        event loop, another client with the same settings."""
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
    """An event loop for this thread."""
    import asyncio
    import socket

    async def getaddrinfo(*args: Any, **options: Any) -> Any:
        return socket.getaddrinfo(*args, **options)

    loop = asyncio.new_event_loop()
    # Python 3.9's locks look for the loop when they are made.
    asyncio.set_event_loop(loop)
    # The loop's own getaddrinfo() needs another thread. At the end of a process Python
    # gives none any more, and at a fork there should be none.
    setattr(loop, "getaddrinfo", getaddrinfo)  # noqa: B010
    return loop


class _Clock:
    """The clock of Redis. A pass asks Redis for the time at most once."""

    def __init__(self, link: _Link) -> None:
        self._link = link
        # Seconds by which Redis is ahead of the monotonic clock here; NaN: no answer.
        self._ahead: float | None = None

    def moment_of(self, opened: float) -> str | None:
        """The text that Redis gets for a moment of the monotonic clock: whole seconds,
        rounded up, because older releases read no fractions."""
        return None if opened == -math.inf else str(math.ceil(opened + self._asked()))

    def age_of(self, opened_at: str | None) -> float:
        """Seconds since the opening. No opening lies in the future."""
        if opened_at is None:
            return math.inf
        return max(0.0, time.monotonic() + self._asked() - int(opened_at))

    def _asked(self) -> float:
        if self._ahead is None:
            self._ahead = math.nan  # if Redis fails to answer, the pass asks no more
            self._ahead = self._link.time() - time.monotonic()
        if math.isnan(self._ahead):
            raise RuntimeError("Redis has not told the time")
        return self._ahead


def _client_behind(redis_object: Any) -> Any:
    """The client itself, even if `redis_object` is a proxy such as Werkzeug's
    LocalProxy: a proxy hides the client's class, and other threads may not use it."""
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
    """Returns a coroutine function that waits on the running event loop for at most
    `patience` seconds, and a function by which any thread ends that waiting."""
    # A library that is not loaded, or does not run here, raises one of these errors.
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
        return  # a broken filter or handler must not end the courier


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
