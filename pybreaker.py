"""A circuit breaker: rejects calls to a service while the service keeps failing.

    import pybreaker

    db_breaker = pybreaker.CircuitBreaker(fail_max=5, reset_timeout=60)

    @db_breaker
    def update_customer(customer):
        ...

While calls succeed the circuit is *closed* and every call runs. After
``fail_max`` failures in a row the circuit *opens*: calls raise
`CircuitBreakerError` at once and the function is not run. The first call made
``reset_timeout`` seconds later or after that makes the circuit *half-open* and
is the trial: a trial that succeeds closes the circuit, and one that fails
opens the circuit again.

A program makes one breaker for each service, keeps the breaker as long as the
program runs, and shares it among all threads and tasks.

The pattern is from Michael T. Nygard's book "Release It!" (2007). The API is
that of Daniel Fernandes Martins' PyBreaker, whose releases up to 1.4.1 this
module replaces. The module imports only the standard library.
"""

# How it works
#
# A state object is an era: the circuit's stay in one state. Every transition,
# closed to closed included, gives the breaker a new state object. A call keeps
# the state object that admitted the call, and is late if the breaker has another
# one when the call ends. Listeners are told of a late outcome, which changes
# nothing.
#
# Every kind of guarded call takes three steps, in a _guard_ function or a _Block:
#
#   admit    The lock is held, except where a quiet call sees that it passes or is
#            rejected, and while the storage is asked whether a trial may run.
#            Gives an _Admission, or raises CircuitBreakerError.
#   run      The lock is not held: calls never wait for each other.
#   settle   The lock is held, except to judge an exception or a result, and
#            for a success that changes nothing.
#
# A trial is a call that a half-open circuit admits; one call at a time has the
# place of the trial. A trial takes the place under the lock (_enter), asks the
# storage without the lock, because the storage may take time to answer (_admit),
# and begins under the lock again (_begin_trial). A trial gives the place back
# however it ends; an overdue trial loses the place to another call, but its
# outcome still counts. Calls in the trial's context (_trials) belong to the trial:
# they run, and decide nothing (_WITHIN).
#
# Operators and states begin a new era only by open(), half_open() or close(),
# because subclasses override these methods; only a move that is found in the
# storage (_look) begins an era without them. A _Move says why the circuit moves.
# _carry_out leaves the library's own move in _move_under_way for _move_to, as
# the overridden methods take no _Move. What differs between the states, each
# state answers in methods of its own (_wait, _start_trial, _count_success,
# _count_failure, _succeeded, _failed). These get the outcome and not the call, as
# a method of a user's state class may stand between the call and them.
#
# A quiet call is one that the storage alone decides, because no listener hears
# of the call, no state class of a user's decides, and the storage is the library's
# own. An _Admission holds what a quiet call may read without the lock.
# _find_admission makes one when an era begins, when listeners, storage or settings
# change, and when a program writes one of the private attributes that are _Watched.
#
# For speed some rules are written more than once: how to guard a plain function
# (_guard_function, call); when to reject (_enter, _admit, _admit_async, and
# before_call of a state); that a success changes nothing while fail_counter is 0
# (where returns._fail_counter is read, _settle, _count_success).
#
# "Lock held." in a docstring says that the caller holds the breaker's lock. Log
# records are made under the lock and reach handlers after its release.

from __future__ import annotations

import contextvars
import functools
import itertools
import logging
import math
import operator
import os
import sys
import threading
import time
import types
import weakref
from collections import OrderedDict, deque
from datetime import datetime, timezone
from datetime import timedelta as timedelta  # programs import timedelta from here

TYPE_CHECKING = False  # importing typing takes as long as this module itself
if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable
    from typing import Any, Final, NoReturn, TypeVar, Union, overload

    from typing_extensions import ParamSpec

    from pybreaker_extras.redis import CircuitRedisStorage as CircuitRedisStorage

    _P = ParamSpec("_P")
    _T = TypeVar("_T")
    _F = TypeVar("_F", bound=Callable[..., Any])
    _Exclusion = Union[type[object], Callable[[Any], object]]

    HAS_REDIS_SUPPORT: bool
else:

    def overload(function):
        return function


__all__ = (
    "STATE_CLOSED",
    "STATE_HALF_OPEN",
    "STATE_OPEN",
    "CircuitBreaker",
    "CircuitBreakerError",
    "CircuitBreakerListener",
    "CircuitBreakerState",
    "CircuitBreakerStorage",
    "CircuitBreakers",
    "CircuitClosedState",
    "CircuitHalfOpenState",
    "CircuitMemoryStorage",
    "CircuitOpenState",
    "FailedResult",
    "breakers",
)

STATE_CLOSED: Final = "closed"
STATE_OPEN: Final = "open"
STATE_HALF_OPEN: Final = "half-open"

# Programs written for releases up to 1.4.1 import these two names from here.
UTC = timezone.utc
HAS_TORNADO_SUPPORT = True  # coroutines of Tornado are guarded like all others

# Programs written for releases up to 1.4.1 compare errors with these phrases.
_REJECTED = "Timeout not elapsed yet, circuit breaker still open"
_TRIPPED = "Failures threshold reached, circuit breaker opened"
_TRIAL_FAILED = "Trial call failed, circuit breaker opened"

_FOUND = "found so in the storage"
_NOTHING: Any = object()  # stands for a result or a move that there is not

# How a guarded call can end.
_SUCCESS, _FAILURE, _ABANDONED = "success", "failure", "abandoned"

logger = logging.getLogger("pybreaker")
logger.addHandler(logging.NullHandler())  # quiet, unless logging is configured


class CircuitBreakerError(Exception):
    """The call was rejected, or its failure opened the circuit.

    Where the failure opened the circuit, ``__cause__`` is what the function
    raised. ``args[0]`` is a phrase that says what happened; ``str(error)`` adds
    the breaker's name, the reason and the seconds to the next trial. Pickling
    drops the breaker and keeps the text.
    """

    breaker: CircuitBreaker | None = None
    """The breaker that raised the error; None after unpickling."""

    retry_after: float = 0.0
    """Seconds from the raising of the error until a call may be admitted;
    `math.inf` where only a move by hand ends the rejections."""

    reason: str = ""
    """Why the circuit opened, in words."""

    _hint: str = ""  # added to the text, such as that a trial is running
    _name: str | None = None  # the breaker's name, where pickling dropped the breaker

    def __str__(self) -> str:
        text = super().__str__()
        name = self._name or _title(self.breaker)
        if name:
            text = f"{name}: {text}"
        if self.reason:
            text += f": {self.reason}"
        hints = [self._hint] if self._hint else []
        if self.retry_after:
            hints.append(f"next trial {_in(self.retry_after)}")
        return f"{text} ({'; '.join(hints)})" if hints else text

    def __reduce__(self) -> tuple[Any, ...]:
        attributes = {**vars(self), "_name": self._name or _title(self.breaker)}
        attributes.pop("breaker", None)
        return type(self), self.args, attributes


def _title(breaker: CircuitBreaker | None) -> str | None:
    """The name of the breaker in texts; None if there is no breaker."""
    return None if breaker is None else breaker._name or "unnamed breaker"


class FailedResult(Exception):
    """What listeners receive as the exception of a call that failed because
    `failure_result` matches `result`, which the call returned. The breaker never
    raises a `FailedResult`."""

    result: object
    """What the call returned."""

    def __init__(self, result: object) -> None:
        super().__init__(result)
        self.result = result


class _Watched:
    """A private attribute that programs write, such as ``breaker._state``: a write
    makes the breaker work out anew what calls may decide without the lock."""

    def __init__(self, attribute: str) -> None:
        self._attribute = attribute

    def __get__(self, breaker: Any, owner: Any) -> Any:
        if breaker is None:  # the attribute was read on the class
            return self
        return getattr(breaker, self._attribute)

    def __set__(self, breaker: Any, value: Any) -> None:
        with breaker._lock:
            setattr(breaker, self._attribute, value)
            breaker._find_admission()

    def __delete__(self, breaker: Any) -> None:
        # mock.patch deletes the attribute before restoring the old value.
        delattr(breaker, self._attribute)


class _WatchedState(_Watched):
    """The attribute ``breaker._state``. An asynchronous subclass reads from it the
    coroutine that the `_create_new_state` of the subclass returned."""

    def __get__(self, breaker: Any, owner: Any) -> Any:
        state = super().__get__(breaker, owner)
        return getattr(state, "__dict__", {}).get("_made", state)


class _WatchedList(_Watched):
    """A tuple that programs read as a list, which they may change in place. The
    breaker does not notice such a change, so once a program has read the list,
    the breaker reads the list at each use, until a tuple is assigned."""

    def __get__(self, breaker: Any, owner: Any) -> Any:
        if breaker is None:
            return self
        with breaker._lock:
            items = getattr(breaker, self._attribute)
            if isinstance(items, tuple):
                items = list(items)
                self.__set__(breaker, items)
            return items


def _logging(method: Any) -> Any:
    """Decorate a method of a breaker or a state: after `method` has released the
    lock, handlers get the log records that `method` made under the lock."""

    @functools.wraps(method)
    def logged(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, *args, **kwargs)
        finally:
            getattr(self, "_breaker", self)._hand_on_records()

    return logged


class CircuitBreaker:
    """Guards the calls to one service.

    `fail_max` failures in a row open the circuit (a whole number from 1;
    `math.inf` for a breaker that only observes). `reset_timeout` seconds after
    the opening the trial may run (a number from 0; `math.inf` for a circuit
    that stays open until moved by hand). `success_threshold` successful trials
    close the circuit (a whole number from 1).

    `exclude` is an iterable of what is not a failure: classes, which match by
    `isinstance`, and predicates, which are called with the exception.
    `listeners` is an iterable of objects with methods of
    `CircuitBreakerListener`. `state_storage` is a `CircuitBreakerStorage`; by
    default the state is kept in memory. `name` is for messages and listeners.
    `throw_new_error_on_trip` says what the failure that opens the circuit
    raises: `CircuitBreakerError`, or if False what the function raised.

    The settings that are given by name only are off by default; the properties
    of the same names explain them. The constructor, setters and methods raise
    `TypeError` for a value of the wrong kind and `ValueError` for one out of
    range; a setter that raises one of these changes nothing.

    Any number of threads and tasks may use a breaker at once. The breaker's
    lock, a `threading.RLock`, is held for transitions, counting and the telling
    of listeners; guarded calls run without the lock.
    """

    _state = _WatchedState("_era")
    _state_storage = _Watched("_storage")
    _listeners = _WatchedList("_told")
    _excluded_exceptions = _WatchedList("_exclude")

    _window_size: float | None = None
    _window_seconds: float | None = None
    _max_reset_timeout: float | None = None
    _include: tuple[Any, ...] = ()
    _ignore: tuple[Any, ...] = ()
    _failure_result: Any = None
    _dry_run = False

    _factor: tuple[Any, float] = (object(), 1.0)  # an opening, and its random factor
    _as_made: tuple[Any, ...] | None = None  # settings that CircuitBreakers gave
    _move_under_way: _Move | None = None  # the move that the library is about to make
    _trial: _Trial | None = None  # the trial that holds the place
    _log_records: tuple[Any, ...] = ()  # log records that no handler has got yet

    def __init__(
        self,
        fail_max: float = 5,
        reset_timeout: float = 60,
        exclude: Iterable[_Exclusion] | None = None,
        listeners: Iterable[object] | None = None,
        state_storage: CircuitBreakerStorage | None = None,
        name: str | None = None,
        throw_new_error_on_trip: bool = True,
        success_threshold: float = 1,
        *,
        window_size: float | None = None,
        window_seconds: float | None = None,
        max_reset_timeout: float | None = None,
        include: Iterable[_Exclusion] | None = None,
        ignore: Iterable[_Exclusion] | None = None,
        failure_result: _Exclusion | None = None,
        dry_run: bool = False,
    ) -> None:
        self._lock: threading.RLock = threading.RLock()
        self._fail_max: float
        self._reset_timeout: float
        self._success_threshold: float
        self._name: str | None
        self.fail_max = fail_max
        self.reset_timeout = reset_timeout
        self.success_threshold = success_threshold
        self.name = name
        self.throw_new_error_on_trip = throw_new_error_on_trip
        self._exclude: Any = _checked_exclusions("exclude", exclude)
        self._told: Any = _checked_listeners(listeners)
        if state_storage is None:
            state_storage = CircuitMemoryStorage(STATE_CLOSED)
        elif not isinstance(state_storage, CircuitBreakerStorage):
            raise TypeError(
                f"state_storage must be a CircuitBreakerStorage, not {state_storage!r}"
            )
        self._storage = state_storage
        self._admission = _Admission()
        known = state_storage.last_move()
        move = _Move.found(state_storage.state, known, "new").follow(_NEW)
        self._era = self._make_state(move)
        self._find_admission()
        # A setting that is off stays a class attribute, so that breakers are small.
        for setting, value, unset in (
            ("window_seconds", window_seconds, None),
            ("window_size", window_size, None),
            ("max_reset_timeout", max_reset_timeout, None),
            ("include", include, None),
            ("ignore", ignore, None),
            ("failure_result", failure_result, None),
            ("dry_run", dry_run, False),
        ):
            if value is not unset:
                setattr(self, setting, value)
        _breakers[id(self)] = self

    # A breaker is one shared object, so a copy is the breaker itself.

    def __copy__(self: _T) -> _T:
        return self

    def __deepcopy__(self: _T, memo: object) -> _T:
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        for name in ("__reduce__", "__getstate__"):
            if getattr(type(self), name, None) is not getattr(object, name, None):
                return super().__reduce_ex__(protocol)
        raise TypeError(
            f"{self!r} cannot be pickled, as a copy would be another circuit: make "
            f"a breaker in the module that uses it, with the same name in each process"
        )

    # Guarding.

    @overload
    def __call__(self, func: _F, /) -> _F: ...

    @overload
    def __call__(self, **options: bool) -> Callable[[_F], _F]: ...

    def __call__(self, *functions: Any, **options: Any) -> Any:
        """Decorate a function, coroutine function, generator function or async
        generator function: returns a guarded function of the same kind. Of a
        `staticmethod` or `classmethod` object the function inside is guarded.

        Guarded calls raise what `call` raises. `TypeError` if the decorated object
        is not callable. ``@breaker()`` and, for a function that returns an awaitable,
        ``@breaker(__pybreaker_call_async=True)`` are spellings of older releases.
        """
        call_async = options.pop("__pybreaker_call_async", False)
        if options or len(functions) > 1:
            raise TypeError("a breaker decorates one function and takes no options")
        if not functions:
            return functools.partial(self._decorated, call_async=call_async)
        return self._decorated(functions[0], call_async)

    def _decorated(self, func: Any, call_async: bool) -> Any:
        if isinstance(func, (staticmethod, classmethod)):
            return type(func)(self._decorated(func.__func__, call_async))
        if not callable(func):
            raise TypeError(f"a breaker guards what can be called, not {func!r}")
        guard = _guard_coroutine if call_async else _guard_for(func)
        if call_async or self._has_own_call():
            # call() or call_async(), which a subclass may override, guards each call.
            through = self.call_async if call_async else self.call
            guarded = guard(_UNGUARDED, functools.partial(through, func))
        else:
            guarded = guard(self, func)
        try:
            return functools.update_wrapper(guarded, func)
        except TypeError:  # the __name__ of an object need not be a string
            return functools.update_wrapper(guarded, func, assigned=())

    def _has_own_call(self) -> bool:
        return not _is_method(self.call, _PLAIN_CALL)

    def call(self, func: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Call `func` with the other arguments and return what `func` returns.

        Raises `CircuitBreakerError` without calling `func` where the call is
        rejected, and `CircuitBreakerError` from the exception of `func` where
        that failure opens the circuit; else what `func` raises. A coroutine, a
        generator or an async generator that `func` makes is guarded to its end.
        """
        # A copy of _guard_function: making and calling a guard here would take twice as
        # long. To look whether a function is lazy would take a third of a quiet call's
        # time, so a quiet call looks only when a function has returned something lazy:
        # of a lazy function nothing has run by then.
        admission = self._admission
        may_be_lazy = admission.passes._state == STATE_CLOSED and (
            type(func) is _Function
            or (
                type(func) is _Method
                and type(getattr(func, "__func__", None)) is _Function
            )
        )
        if not may_be_lazy:
            if _is_lazy(func):
                return _call_later(self, func, args, kwargs)
            admission = self._admit(func, args, kwargs)
        try:
            result = func(*args, **kwargs)
        except BaseException as exc:
            if may_be_lazy and type(exc) is TypeError and _is_lazy(func):
                return _call_later(self, func, args, kwargs)  # raises exc when run
            self._settle(admission, exc)
            raise
        try:
            if type(result) in _CODES_OF_RESULTS:
                if may_be_lazy and _is_lazy(func):
                    if isinstance(result, _Coroutine):
                        result.close()  # else Python warns that nothing awaits result
                    return _call_later(self, func, args, kwargs)
                rest: _T = _guard_result(self, result, admission)
                return rest
        except TypeError:
            pass  # a class that cannot be hashed is not in _CODES_OF_RESULTS
        if admission.returns._fail_counter:
            self._settle(admission, None, result)
        return result

    @overload
    async def call_async(
        self, func: Callable[_P, Awaitable[_T]], *args: _P.args, **kwargs: _P.kwargs
    ) -> _T: ...

    @overload
    async def call_async(
        self, func: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs
    ) -> _T: ...

    async def call_async(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        """Call `func` with the other arguments, await what `func` returns if that
        is awaitable, and return the result. The call is admitted when this
        coroutine is awaited. Raises what `call` raises."""
        return await _guard_coroutine(self, func)(*args, **kwargs)

    def calling(self) -> _Block:
        """A context manager, for ``with`` and ``async with``, that guards one
        block, which may contain ``await`` and ``yield`` and be left in another
        thread than entered. A rejected block raises `CircuitBreakerError` when
        entered; a block whose failure opens the circuit raises what `call` would.
        Entering a second time is a `RuntimeError`. If a subclass overrides `call`,
        the block goes through that method, as in releases 1.1 to 1.4.1."""
        return _Block(self)

    # Steering: any time, from any thread, effective at once.

    def open(self, seconds: float | None = None, reason: str | None = None) -> bool:
        """Open the circuit: calls are rejected for `reset_timeout` seconds, or
        for `seconds` (a number from 0; `math.inf` until the circuit is moved by
        hand), whatever `reset_timeout` becomes. `reason`, a string, is shown and
        logged instead of "by hand".

        On an open circuit the timeout starts again. Returns whether a failure that
        opens the circuit is to raise `CircuitBreakerError`:
        `throw_new_error_on_trip`, but False in a dry run.
        """
        self._move_to(STATE_OPEN, seconds, reason)
        return self._throw_new_error_on_trip and not self._dry_run

    def half_open(self, reason: str | None = None) -> None:
        """Half-open the circuit: the next call is a trial. `reason`, a string, is
        shown and logged instead of "by hand"."""
        self._move_to(STATE_HALF_OPEN, None, reason)

    def close(self, reason: str | None = None) -> None:
        """Close the circuit: calls are admitted, and failures are counted from 0.
        `reason`, a string, is shown and logged instead of "by hand"."""
        self._move_to(STATE_CLOSED, None, reason)

    @property
    def state(self) -> CircuitBreakerState:
        """The state object of the present era; if the storage was moved, reading
        begins the new era first. Assigning ``'closed'``, ``'open'`` or
        ``'half-open'`` calls `close`, `open` or `half_open`."""
        state: CircuitBreakerState = self._present_state()
        return state

    @state.setter
    def state(self, name: str) -> None:
        moves: dict[str, Callable[[], object]] = {
            STATE_CLOSED: self.close,
            STATE_OPEN: self.open,
            STATE_HALF_OPEN: self.half_open,
        }
        moves[_checked_state("state", name)]()

    @property
    def fail_max(self) -> float:
        """How many failures, in a row or in the window, open the circuit. If
        `fail_max` is lowered below `fail_counter`, the next failure opens it."""
        return self._fail_max

    @fail_max.setter
    def fail_max(self, fail_max: float) -> None:
        fail_max = _whole_number("fail_max", fail_max, 1, math.inf)
        with self._lock:
            _check_window(fail_max, self._window_size, self._window_seconds)
            self._fail_max = fail_max

    @property
    def window_size(self) -> float | None:
        """How many calls a failure is remembered for: a whole number, at least
        `fail_max`, or `math.inf`. With 50, `fail_max` failures among the last 50
        successes and failures open the circuit, and a success does not set
        `fail_counter` to 0. None (the default): a success forgets all failures.

        `ValueError` on a storage that does not count as `CircuitMemoryStorage`.
        """
        return self._window_size

    @window_size.setter
    def window_size(self, size: float | None) -> None:
        if size is not None:
            size = _whole_number("window_size", size, 1, math.inf)
        self._set_window("window_size", size, self._window_seconds)

    @property
    def window_seconds(self) -> float | None:
        """How many seconds a failure is remembered for, by the monotonic clock: more
        than 0 and finite. None (the default): time forgets no failure. With
        `window_size`, too, a failure is forgotten by whichever comes first.

        `ValueError` on a storage that does not count as `CircuitMemoryStorage`.
        """
        return self._window_seconds

    @window_seconds.setter
    def window_seconds(self, seconds: float | None) -> None:
        if seconds is not None:
            seconds = _some_seconds("window_seconds", seconds)
        self._set_window("window_seconds", self._window_size, seconds)

    def _set_window(
        self, parameter: str, size: float | None, seconds: float | None
    ) -> None:
        if (size, seconds) != (None, None) and not _counts_in_memory(self._storage):
            raise ValueError(
                f"{parameter} needs a CircuitMemoryStorage with no counting method "
                f"overridden, not {self._storage!r}"
            )
        with self._lock:
            _check_window(self._fail_max, size, seconds)
            if self._has_window():
                self._era._forget()  # what the old window has forgotten stays forgotten
            else:
                # Failures get marks before calls in other threads see window_size,
                # and so draw numbers without the lock.
                self._era._mark_anew()
            self._window_size, self._window_seconds = size, seconds
            self._era._change_window()

    def _has_window(self) -> bool:
        return self._window_size is not None or self._window_seconds is not None

    @property
    def reset_timeout(self) -> float:
        """Seconds from an opening to the trial, and for which a trial may hold the
        place. A change takes effect on a circuit that is open already."""
        return self._reset_timeout

    @reset_timeout.setter
    def reset_timeout(self, reset_timeout: float) -> None:
        reset_timeout = _seconds("reset_timeout", reset_timeout)
        with self._lock:
            _check_timeouts(reset_timeout, self._max_reset_timeout)
            self._reset_timeout = reset_timeout

    @property
    def max_reset_timeout(self) -> float | None:
        """The most seconds that an opening lasts, where each failed trial doubles
        `reset_timeout`: at least `reset_timeout`; `math.inf` for no limit. Each
        opening is also up to a tenth shorter, at random, so that processes do not
        send their trials together. None (the default): `reset_timeout` never grows."""
        return self._max_reset_timeout

    @max_reset_timeout.setter
    def max_reset_timeout(self, longest: float | None) -> None:
        if longest is not None:
            longest = _seconds("max_reset_timeout", longest)
        with self._lock:
            _check_timeouts(self._reset_timeout, longest)
            self._set("_max_reset_timeout", longest)

    def _grown_timeout(self, failed_trials: int) -> float:
        """`reset_timeout`, doubled for each failed trial, up to `max_reset_timeout`."""
        longest = self._max_reset_timeout
        if longest is None:
            return self._reset_timeout
        try:
            # ldexp, unlike 2.0 ** failed_trials, leaves a timeout of 0 at 0.
            grown = math.ldexp(self._reset_timeout, failed_trials)
        except OverflowError:
            return longest
        return min(grown, longest)

    @property
    def success_threshold(self) -> float:
        """How many successful trials close the circuit."""
        return self._success_threshold

    @success_threshold.setter
    def success_threshold(self, success_threshold: float) -> None:
        self._success_threshold = _whole_number(
            "success_threshold", success_threshold, 1
        )

    @property
    def throw_new_error_on_trip(self) -> bool:
        """What the failure that opens the circuit raises: `CircuitBreakerError` if
        True (the default), what the function raised if False."""
        return self._throw_new_error_on_trip

    @throw_new_error_on_trip.setter
    def throw_new_error_on_trip(self, throw: bool) -> None:
        self._throw_new_error_on_trip: bool = _true_or_false(
            "throw_new_error_on_trip", throw
        )

    @property
    def failure_result(self) -> _Exclusion | None:
        """A predicate, or a class: a call whose result matches is a failure, though
        the caller gets the result. Listeners receive a `FailedResult`. The predicate
        is called without the lock, once for each call that returns, with the awaited
        result of a coroutine; never for generators and blocks. None (the default): no
        result is a failure."""
        predicate: _Exclusion | None = self._failure_result
        return predicate

    @failure_result.setter
    def failure_result(self, predicate: _Exclusion | None) -> None:
        if predicate is not None and not callable(predicate):
            raise TypeError(
                f"failure_result must be a predicate that is called with the result, "
                f"a class or None, not {predicate!r}"
            )
        self._set("_failure_result", _checked_predicate("failure_result", predicate))

    @property
    def dry_run(self) -> bool:
        """If True, a call that would be rejected is told to listeners as
        ``rejected``, runs all the same, and decides nothing; the failure that opens
        the circuit raises what the function raised. Setting False (the default)
        takes effect on the next call."""
        return self._dry_run

    @dry_run.setter
    def dry_run(self, dry_run: bool) -> None:
        self._set("_dry_run", _true_or_false("dry_run", dry_run))

    def _set(self, attribute: str, value: Any) -> None:
        """Write a setting that decides which calls may skip the lock."""
        with self._lock:
            setattr(self, attribute, value)
            self._find_admission()

    @property
    def fail_counter(self) -> int:
        """How many failures are remembered, in a row or in the window; reading takes
        no lock. Setting the counter never opens the circuit. With a window, setting n
        stands for n failures counted just now; n is then at most `fail_max`."""
        if self._window_seconds is None or self._storage.state != STATE_CLOSED:
            return self._storage.counter
        return self._era._remembered()

    @fail_counter.setter
    def fail_counter(self, value: float) -> None:
        count: int = _whole_number("fail_counter", value, 0)
        with self._lock:
            storage: Any = self._storage  # of a class whose counter may be settable
            if self._has_window() and count > self._fail_max:
                raise ValueError(
                    f"fail_counter must be at most fail_max, {self._fail_max}, "
                    f"with a window, not {count!r}"
                )
            try:
                storage.counter = count
            except AttributeError:  # this storage's counter cannot be set
                if count > self._fail_max:
                    raise ValueError(
                        f"fail_counter must be at most fail_max, {self._fail_max}, "
                        f"on this storage, not {count!r}"
                    ) from None
                storage.reset_counter()
                for _ in range(count):
                    storage.increment_counter()
            if self._has_window():
                self._era._mark_anew()

    @property
    def name(self) -> str | None:
        """The breaker's name in messages and for listeners, or None."""
        return self._name

    @name.setter
    def name(self, name: str | None) -> None:
        if name is not None and not isinstance(name, str):
            raise TypeError(f"name must be a string or None, not {name!r}")
        self._name = name

    # Watching: any time, from any thread.

    @property
    def current_state(self) -> str:
        """The state's name in the storage: ``'closed'``, ``'open'`` or ``'half-open'``.
        An open circuit whose timeout has passed stays open until the next call."""
        return self._storage.state

    @property
    def success_counter(self) -> int:
        """Successful trials since the circuit opened, closed or was moved by hand."""
        return self._storage.success_counter

    @property
    def retry_after(self) -> float:
        """Seconds until a call may be admitted: 0.0 where one may be admitted now,
        `math.inf` where only a move by hand helps. While a trial runs, seconds until
        the trial would lose the place."""
        with self._lock:
            return self._shown_state()._wait()

    def snapshot(self) -> dict[str, Any]:
        """State, counters and settings, all read under one hold of the lock, as a
        dict for `json.dumps`.

        Times are in seconds; ``opened_at`` is the last opening, in UTC by ISO
        8601, or None. `math.inf` becomes None, because JSON has no infinity, but
        ``"inf"`` in the settings whose None means off.
        """
        with self._lock:
            state = self._shown_state()
            opened_at = self._storage.opened_at
            return {
                "name": self._name,
                "state": state.name,
                "reason": state.reason,
                "fail_counter": self.fail_counter,
                "fail_max": _finite(self._fail_max),
                "success_counter": self.success_counter,
                "success_threshold": self._success_threshold,
                "reset_timeout": _finite(self._reset_timeout),
                "window_size": _finite(self._window_size, "inf"),
                "window_seconds": self._window_seconds,
                "max_reset_timeout": _finite(self._max_reset_timeout, "inf"),
                "dry_run": self._dry_run,
                "opened_at": _utc(opened_at).isoformat() if opened_at else None,
                "retry_after": _finite(state._wait()),
            }

    def __repr__(self) -> str:
        with self._lock:
            state = self._shown_state()
            wait = state._wait()
            parts = [
                f"{self._name!r}: {state}" if self._name else f"unnamed: {state}",
                f"{self.fail_counter} of {self._fail_max} failures",
            ]
            if self._dry_run:
                parts.insert(0, "dry run")
            if state.name == STATE_HALF_OPEN:
                parts.append(
                    f"{self.success_counter} of {self._success_threshold} successes"
                )
            if state.name != STATE_CLOSED:
                next_trial = (
                    f"next trial {_in(wait)}" if wait else "next call is a trial"
                )
                parts.append(next_trial)
            parts.append(f"reset_timeout {self._reset_timeout} s")
            if self._max_reset_timeout is not None:
                parts.append(f"max_reset_timeout {self._max_reset_timeout} s")
            if self._window_size is not None:
                parts.append(f"window_size {self._window_size}")
            if self._window_seconds is not None:
                parts.append(f"window_seconds {self._window_seconds} s")
        return f"<{type(self).__name__} {', '.join(parts)}>"

    # Listeners and exclusions.

    @property
    def listeners(self) -> tuple[Any, ...]:
        """The listeners, in the order in which the breaker tells them."""
        return tuple(self._told)

    def add_listener(self, listener: object) -> None:
        """Add a listener. `TypeError` if the object has none of the methods of
        `CircuitBreakerListener`, is a class, or has a coroutine function for one."""
        self.add_listeners(listener)

    def add_listeners(self, *listeners: object) -> None:
        """Add all `listeners`, or none if `add_listener` refuses one (`TypeError`)."""
        added = [_checked_listener(listener) for listener in listeners]
        with self._lock:
            self._listeners = (*self._told, *added)

    def remove_listener(self, listener: object) -> None:
        """Remove a listener. `ValueError` if the breaker does not have it."""
        with self._lock:
            self._listeners = _without(self._told, listener, "listener")

    @property
    def excluded_exceptions(self) -> tuple[_Exclusion, ...]:
        """The classes and predicates of `exclude`, under the name in older releases."""
        return tuple(self._exclude)

    @property
    def exclude(self) -> tuple[_Exclusion, ...]:
        """Classes and predicates: a call whose exception one of them matches is a
        success. An iterable or None can be assigned."""
        return tuple(self._exclude)

    @exclude.setter
    def exclude(self, exclude: Iterable[_Exclusion] | None) -> None:
        self._excluded_exceptions = _checked_exclusions("exclude", exclude)

    @property
    def include(self) -> tuple[_Exclusion, ...]:
        """Classes and predicates: if there are any, a call whose exception none of
        them matches is a success. `exclude` is asked before `include`."""
        return self._include

    @include.setter
    def include(self, include: Iterable[_Exclusion] | None) -> None:
        self._set("_include", _checked_exclusions("include", include))

    @property
    def ignore(self) -> tuple[_Exclusion, ...]:
        """Classes and predicates: a call whose exception one of them matches is
        abandoned, no success and no failure. `ignore` is asked before `exclude`."""
        return self._ignore

    @ignore.setter
    def ignore(self, ignore: Iterable[_Exclusion] | None) -> None:
        self._set("_ignore", _checked_exclusions("ignore", ignore))

    def add_excluded_exception(self, exception: _Exclusion) -> None:
        """Add a class or a predicate to `exclude`. `TypeError` for anything else, or
        for a predicate that is a coroutine or generator function."""
        self.add_excluded_exceptions(exception)

    def add_excluded_exceptions(self, *exceptions: _Exclusion) -> None:
        """Add all `exceptions` to `exclude`, or none if `add_excluded_exception`
        refuses one (`TypeError`)."""
        added = [_checked_exclusion("exclude", exception) for exception in exceptions]
        with self._lock:
            self._excluded_exceptions = (*self._exclude, *added)

    def remove_excluded_exception(self, exception: _Exclusion) -> None:
        """Remove a class or a predicate from `exclude`. `ValueError` if `exclude`
        does not hold it."""
        with self._lock:
            remaining = _without(self._exclude, exception, "exclusion")
            self._excluded_exceptions = remaining

    def is_system_error(self, exception: BaseException) -> bool:
        """Whether the exception is a failure by `exclude` and `include`. A group that
        `exclude` does not match is a failure if an exception in the group is one that
        `ignore` does not match.

        The breaker calls this method without the lock, and never for exceptions that
        abandon a call, such as `KeyboardInterrupt`. A subclass may override it.
        """
        return self._judge_by_kind(exception, asks_ignore=False) is _FAILURE

    # Judging an exception. The lock is not held, because predicates are user code.

    def _judge(self, exc: BaseException) -> str:
        """The outcome of a call that raised `exc`."""
        if isinstance(exc, FailedResult):
            return _FAILURE
        if _is_abandonment(exc):
            return _ABANDONED
        if not self._has_own_judgement():
            return self._judge_by_kind(exc)
        if self._is_ignored(exc):
            return _ABANDONED
        return _FAILURE if self.is_system_error(exc) else _SUCCESS

    def _judge_by_kind(self, exc: BaseException, asks_ignore: bool = True) -> str:
        """The outcome by `ignore`, `exclude`, what is in a group, and `include`, of
        which the first that answers decides."""
        if asks_ignore and self._matches(self._ignore, exc):
            return _ABANDONED
        if self._matches(self._exclude, exc):
            return _SUCCESS
        leaves = _leaves_of(exc)
        if leaves:
            outcomes = [
                _ABANDONED if _is_abandonment(leaf) else self._judge_by_kind(leaf)
                for leaf in leaves
            ]
            order = (_FAILURE, _SUCCESS, _ABANDONED)
            return next(outcome for outcome in order if outcome in outcomes)
        if self._include and not self._matches(self._include, exc):
            return _SUCCESS
        return _FAILURE

    def _is_ignored(self, exc: BaseException) -> bool:
        """Whether `ignore` matches an exception, or every exception in a group that
        `exclude` does not match."""
        if self._matches(self._ignore, exc):
            return True
        leaves = _leaves_of(exc)
        if not leaves or self._matches(self._exclude, exc):
            return False
        return all(_is_abandonment(each) or self._is_ignored(each) for each in leaves)

    def _has_own_judgement(self) -> bool:
        return not _is_method(self.is_system_error, _PLAIN_JUDGEMENT)

    def _matches(self, kinds: Any, told: object) -> bool:
        """Whether one of the classes and predicates in `kinds` matches `told`, an
        exception or a result. A predicate that raises is logged and does not match."""
        for kind in tuple(kinds):  # kinds may be a list that a predicate changes
            try:
                if isinstance(told, kind) if isinstance(kind, type) else kind(told):
                    return True
            except Exception as error:
                message = "%r could not judge an exception or a result"
                with self._lock:
                    self._log_later(logging.ERROR, message, kind, exc_info=error)
                self._hand_on_records()
        return False

    # Admission: may this call run, and is it a trial?

    def _admit(self, func: Any, args: Any, kwargs: Any) -> _Admission:
        """Admit a call, or raise `CircuitBreakerError`."""
        admission = self._admission
        if admission.passes._state == STATE_CLOSED:
            return admission
        state = admission.state
        seen = admission.rejects
        if seen._state == state.name and seen._last_move is state._known_move:
            # A rejection that no listener hears changes nothing and takes no lock.
            wait = state._wait()
            if wait and not (self._trial and self._is_within_trial()):
                raise self._new_error(state._move, wait, state._hint)
        while True:
            admission = self._enter(func, args, kwargs)
            trial = admission.trial
            if trial is None:
                return admission
            try:  # without the lock: the storage may take its time
                granted = self._storage.claim_trial(self._longest_trial())
                begun = self._begin_trial(trial, granted, func, args, kwargs)
            except BaseException:
                self._vacate(trial)
                raise
            if begun is not None:
                return begun  # else the call has lost the place, and asks again

    async def _admit_async(self, func: Any, args: Any, kwargs: Any) -> _Admission:
        """Admit a call as `_admit` does, letting other tasks run during the claim."""
        admission = self._admission
        if admission.passes._state == STATE_CLOSED:
            return admission
        state = admission.state
        seen = admission.rejects
        if seen._state == state.name and seen._last_move is state._known_move:
            wait = state._wait()
            if wait and not (self._trial and self._is_within_trial()):
                raise self._new_error(state._move, wait, state._hint)
        while True:
            admission = self._enter(func, args, kwargs)
            trial = admission.trial
            if trial is None:
                return admission
            try:
                granted = await self._storage.claim_trial_async(self._longest_trial())
                begun = self._begin_trial(trial, granted, func, args, kwargs)
            except BaseException:
                self._vacate(trial)
                raise
            if begun is not None:
                return begun

    def _enter(self, func: Any, args: Any, kwargs: Any) -> _Admission:
        """Admit a call, give the call the place, or raise `CircuitBreakerError`. A
        trial holds the place when this method returns, but begins, and gets an
        admission with a state, only when the storage has granted the trial."""
        trial = None
        try:
            with self._lock:
                if self._storage.state != self._era.name or not self._era._admits_all:
                    self._look()
                is_rejected = (
                    "before_call" in self._state_hooks
                    and self._is_rejected_by_gate(func, args, kwargs)
                )
                admission, state = self._admission, self._era
                if is_rejected:
                    admission = _WITHIN
                elif not state._admits_all:
                    wait = state._wait()
                    # An overdue trial (wait is 0) may hang, and so loses the place
                    # even to a call in its own context. With a timeout of 0 every
                    # trial is overdue, and such a call belongs to the trial.
                    if self._is_within_trial() and (wait or not self._reset_timeout):
                        admission = _WITHIN
                    elif wait:
                        admission = self._refuse(
                            self._new_error(state._move, wait, state._hint),
                            func,
                            args,
                            kwargs,
                        )
                    else:
                        trial = self._take_place()
                        return _Admission(None, trial)
                self._tell_all("before_call", (self, func) + args, kwargs)
                return admission
        finally:
            # If a log handler were interrupted here, the trial would not give the
            # place back: the try in _admit begins later. So for a trial, records
            # stay until _begin_trial.
            if self._log_records and trial is None:
                self._hand_on_records()

    def _is_rejected_by_gate(self, func: Any, args: Any, kwargs: Any) -> bool:
        """Call the `before_call` of a user's state class, which raises
        `CircuitBreakerError` to reject the call. Returns whether a dry run lets a
        rejected call run. Lock held."""
        try:
            self._era.before_call(func, *args, **kwargs)
        except CircuitBreakerError as error:
            self._refuse(error, func, args, kwargs)
            return True
        return False

    def _refuse(
        self, error: CircuitBreakerError, func: Any, args: Any, kwargs: Any
    ) -> _Admission:
        """Tell listeners that a call is rejected, and raise `error`, or in a dry run
        return the admission of a call that decides nothing. Lock held."""
        try:
            self._tell_all("rejected", (self, func) + args, kwargs)
            if not self._dry_run:
                raise error
            return _WITHIN
        finally:
            del error  # else error, its traceback and this frame are a cycle

    def _begin_trial(
        self, trial: _Trial, granted: bool, func: Any, args: Any, kwargs: Any
    ) -> _Admission | None:
        """Begin a trial after the storage has answered, or raise `CircuitBreakerError`
        if the storage has not `granted` the trial. None means that the trial has lost
        the place, so that admission starts again."""
        try:
            with self._lock:
                holder = self._trial
                if granted and holder:
                    # The holder, even if not this trial, will release the claim.
                    holder.claimed = True
                elif granted:
                    self._storage.release_trial()
                self._look()
                if self._trial is not trial:
                    return None
                trial.granted = granted
                is_admitted = granted and self._era._start_trial()
                if self._trial is not trial:  # a listener moved the circuit
                    return None
                admission = _Admission(self._era, trial)
                if not is_admitted:
                    hint = "" if granted else "another breaker runs the trial"
                    admission = self._refuse(
                        self._new_error(self._era._move, 0.0, hint), func, args, kwargs
                    )
                    self._vacate(trial)
                self._tell_all("before_call", (self, func) + args, kwargs)
                return admission
        finally:
            self._hand_on_records()

    def _factor_of(self, opening: Any) -> float:
        """A random factor between 0.9 and 1, drawn once for each opening. Takes no
        lock: `_find_admission` has the factor drawn before quiet calls ask for it."""
        drawn_for, factor = self._factor
        if drawn_for != opening:
            from random import uniform  # imported here, as few breakers need it

            factor = uniform(0.9, 1.0)
            self._factor = opening, factor
        return factor

    def _longest_trial(self) -> float:
        """Seconds for which a trial may hold its place."""
        return self._grown_timeout(self._era._move.failed_trials)

    def _take_place(self) -> _Trial:
        """Make the running call a trial, which gets the place. Lock held."""
        if self._trial is not None:
            self._trial.over = True
        trial = self._trial = _Trial(self)
        _trials.set((*filter(_Trial.may_matter, _trials.get()), trial))
        return trial

    def _place_wait(self) -> float:
        """Seconds until a call may take the place."""
        trial = self._trial
        if trial is None:
            return 0.0
        held = time.monotonic() - trial.since
        left = self._longest_trial() - held
        # held is below 0 only if the clock was exchanged, as tests do.
        return left if held >= 0.0 < left else 0.0

    def _is_within_trial(self) -> bool:
        """Whether the running code is in the context of the trial with the place."""
        trial = self._trial
        return trial is not None and trial.granted and trial in _trials.get()

    def _vacate(self, trial: _Trial) -> None:
        """End a trial, which gives the place back if the trial still holds it."""
        trial.over = True  # so that _take_place drops the trial from the context
        with self._lock:
            if self._trial is trial:
                self._trial = None
                if trial.claimed:
                    self._storage.release_trial()

    def _new_error(
        self, move: _Move, wait: float, hint: str, phrase: str = _REJECTED
    ) -> CircuitBreakerError:
        """An error that says why the circuit opened, for a call in the era that `move`
        began; `wait` is the seconds for `retry_after`."""
        error = CircuitBreakerError(phrase)
        # One dictionary is made in half the time that three assignments take.
        error.__dict__ = {
            "breaker": self,
            "retry_after": wait,
            "reason": move.why_opened or move.reason,
        }
        if hint:
            error._hint = hint
        return error

    # Settlement: what does the outcome change?

    def _settle(
        self,
        admission: _Admission,
        exc: BaseException | None = None,
        result: object = _NOTHING,
        by: str = "",
    ) -> None:
        """Settle an admitted call, which raised `exc` or returned `result`. If the
        failure opens the circuit, raises what the caller is to get instead of `exc`.

        Late outcomes, and those of calls within a trial, are told and change
        nothing. `by` names the method of a state that calls this one, if one does,
        so that a method that a user's state class overrides is not called again.
        """
        state, number, is_counted = admission.state, 0, False
        error: Any = None
        told: Any = exc  # what listeners receive; what may be raised is exc
        try:
            if exc is None:
                outcome = _SUCCESS
                if self._failure_result is not None and result is not _NOTHING:
                    if self._matches((self._failure_result,), result):
                        outcome, told = _FAILURE, FailedResult(result)
            elif self._judges or not isinstance(exc, Exception):
                outcome = self._judge(exc)
            else:
                outcome = _FAILURE
            if outcome is _ABANDONED:
                if self._hearers["abandoned"]:
                    with self._lock:
                        self._tell_all("abandoned", (self,))
                return
            if outcome is _SUCCESS:
                seen = admission.settles
                if not seen._fail_counter:
                    return  # a success that changes nothing takes no lock
                # A number that was drawn without a window would be older than the marks
                # that a setter in another thread makes when switching a window on.
                if self._window_size is not None and seen is not _OPAQUE:
                    number = state._draw_number()
                    if not state._forgets(number):
                        return
            with self._lock:
                if outcome is _FAILURE and admission.counts._state == STATE_CLOSED:
                    # A quiet failure, which most often is only counted.
                    state._count_failure()
                    if self._storage.counter < self._fail_max:
                        return
                    is_counted = True
                if self._storage.state != self._era.name:
                    self._look()
                hooks = self._state_hooks
                if hooks and self._ask_own_state(state, outcome, told, exc, by):
                    return
                if outcome is _SUCCESS:
                    if state is self._era:
                        state._count_success(number)
                        if "on_success" in hooks:
                            state.on_success()
                        else:
                            state._succeeded()
                    self._tell_all("success", (self,))
                else:
                    if state is self._era and not is_counted:
                        state._count_failure()
                    if self._hearers["failure"]:
                        self._tell_all("failure", (self, told))
                    # Not if the outcome is late, or if a listener moved the circuit.
                    if state is self._era:
                        if "on_failure" in hooks:
                            self._ask(state.on_failure, told, exc)
                        else:
                            error = state._failed(told)
            if error is not None and exc is not None:
                _raise(error, exc)
        finally:
            # Else error, its traceback and this frame are a cycle.
            exc = told = error = None
            if admission.trial is not None:
                self._vacate(admission.trial)
            if self._log_records:
                self._hand_on_records()

    def _ask_own_state(
        self, state: Any, outcome: str, told: Any, exc: Any, by: str
    ) -> bool:
        """Let a user's state class settle the call, if that class overrides
        `_handle_error` or `_handle_success`. Returns whether it settled. Lock held."""
        if state is not self._era:
            return False
        if told is not None and "_handle_error" in self._state_hooks and not by:
            self._ask(state._handle_error, told, exc, reraise=False)
            return True
        if outcome is _SUCCESS and "_handle_success" in self._state_hooks:
            if by != "_handle_success":
                state._handle_success()
                return True
        return False

    def _ask(self, method: Any, told: Any, exc: Any, **options: Any) -> None:
        """Call a method of a user's state class about a failure. If the call returned a
        result (`exc` is None), the caller gets the result even if `method` raises
        `CircuitBreakerError` or `FailedResult`. Lock held."""
        try:
            method(told, **options)
        except (CircuitBreakerError, FailedResult):
            if exc is not None:
                raise
            told.__traceback__ = None  # else told and its frames are a cycle
        finally:
            del told, exc  # else an exception and this frame are a cycle

    def _inc_counter(self) -> None:
        """Count a failure. Lock held. Subclasses in the field override this method, and
        tests replace it."""
        self._storage.increment_counter()

    # Moves. All methods but _move_to and _present_state are called with the lock held.

    @_logging
    def _move_to(self, name: str, seconds: float | None, reason: str | None) -> None:
        """Make the move that `_carry_out` has announced, or one by hand."""
        if seconds is not None:
            seconds = _seconds("seconds", seconds)
        reason = _checked_reason(reason)
        with self._lock:
            move, self._move_under_way = self._move_under_way, None
            if move is None or move.state != name:
                move = _Move(name, "by hand", "hand")
            move.seconds = seconds
            move.reason = reason or move.reason
            move.fail_max = self._fail_max
            # Another breaker may have moved the storage since this era began.
            move.follow(self._found_move() or self._era._move)
            if self._has_window():
                self._era._forget()  # only a closed circuit forgets with time
            if name == STATE_CLOSED:
                self._storage.reset_counter()
            if move.by != "trial":
                self._storage.reset_success_counter()
            self._storage.move(move)
            self._begin_era(move)

    def _carry_out(self, move: _Move, method: Callable[[], _T]) -> _T:
        """Make a move of the library's own by `method`, which is `open`, `half_open`
        or `close`: a subclass may override it. Returns what `method` returns."""
        self._move_under_way = move
        try:
            return method()
        finally:
            # A subclass's method may not have moved the circuit.
            self._move_under_way = None

    @_logging
    def _present_state(self) -> CircuitBreakerState:
        with self._lock:
            self._look()
            return self._era

    def _look(self) -> None:
        """Begin a new era if something other than this breaker moved the storage."""
        move = self._found_move()
        if move is not None:
            self._begin_era(move)

    def _shown_state(self) -> CircuitBreakerState:
        """The state as the storage has it, for readers: begins no era, tells nobody."""
        move = self._found_move()
        return self._era if move is None else self._make_state(move)

    def _found_move(self) -> _Move | None:
        """The move that something other than this breaker has made in the storage
        since this era began, or None."""
        era, state, known = self._era, self._storage.state, self._storage.last_move()
        if known is era._known_move:
            known = None  # the storage knows of no later move
        if state == era.name and (known is None or not era._differs_from(known)):
            return None
        return _Move.found(state, known).follow(era._move)

    def _begin_era(self, move: _Move) -> None:
        """Give the breaker a new state object, log the move and tell the listeners."""
        old, trial = self._era, self._trial
        new = self._make_state(move, prev_state=old, notify=True)
        if move.by == "found":
            new._was_found()
        # If the storage raises here, the next _look finds the storage moved.
        count = self._storage.counter
        self._era = new
        self._find_admission()
        try:
            # variant: overtaken trial
            if trial is not None and not (move.by == "trial" and trial.granted):
                self._vacate(trial)
        finally:  # the circuit has moved, even if the storage's release_trial() raises
            level = logging.WARNING if move.state == STATE_OPEN else logging.INFO
            if logger.isEnabledFor(level):
                message = "%s: %s, was %s: %s (fail_counter %s, reset_timeout %s s)"
                title = repr(self._name) if self._name else "unnamed breaker"
                what = title, new, old, move.reason, count, self._reset_timeout
                self._log_later(level, message, *map(str, what))
            self._tell_all("state_change", (self, old, new))

    def _make_state(self, move: _Move, **options: Any) -> CircuitBreakerState:
        made = state = self._create_new_state(move.state, **options)
        if not hasattr(made, "_admits_all"):
            # _create_new_state of an asynchronous subclass returns a coroutine, which
            # the subclass finds in _state, awaits, and replaces there by the state. A
            # state of the library's stands in until then.
            state = CircuitBreaker._create_new_state(self, move.state)
            state._made = made
        state.name, state._move = move.state, move  # which a mock would not have
        state._known_move = self._storage.last_move()
        return state

    def _create_new_state(
        self,
        new_state: str,
        prev_state: CircuitBreakerState | None = None,
        notify: bool = False,
    ) -> CircuitBreakerState:
        # The classes are looked up at each call, as tests replace the module's names.
        classes: dict[str, Any] = {
            STATE_CLOSED: CircuitClosedState,
            STATE_OPEN: CircuitOpenState,
            STATE_HALF_OPEN: CircuitHalfOpenState,
        }
        cls = classes[_checked_state("state", new_state)]
        state: CircuitBreakerState = cls(self, prev_state=prev_state, notify=notify)
        return state

    def _find_admission(self) -> None:
        """Work out for this era which listeners hear of what, what a user's state
        class overrides, and what a call may decide without the lock. Lock held."""
        state, storage = self._era, self._storage
        self._judges = (
            self._exclude != ()  # an empty list, too, as a program may add to it
            or self._include != ()
            or self._ignore != ()
            or self._has_own_judgement()
        )
        self._state_hooks = _own_hooks(state)
        self._hearers: Any = (
            _hearers_of(self._told)
            if isinstance(self._told, tuple)
            else _HearersInList(self._told)
        )
        is_quiet = (
            not self._state_hooks and _is_plain(storage) and type(self._told) is tuple
        )
        seen = storage if is_quiet else _OPAQUE
        if getattr(state, "_known_move", None) is _NOTHING:  # not by _make_state
            state._known_move = storage.last_move()
        passes = returns = settles = rejects = counts = _OPAQUE
        if not getattr(state, "_admits_all", False):
            if not self._hearers["rejected"] and not self._dry_run:
                rejects = seen
                if is_quiet and self._max_reset_timeout is not None:
                    state._wait()  # draws the factor, so that two threads cannot
        else:
            passes = _OPAQUE if self._hearers["before_call"] else seen
            settles = _OPAQUE if self._hearers["success"] else seen
            returns = settles if self._failure_result is None else _OPAQUE
            counts = _OPAQUE if self._hearers["failure"] else seen
        old = self._admission
        # Calls that are running now must settle under the lock: thread A's call is
        # admitted, thread B moves the circuit, and A's call ends, which is late.
        # variant: quiet calls
        old.returns = old.settles = old.counts = _OPAQUE
        self._admission = _Admission(
            state, None, passes, returns, settles, rejects, counts
        )

    # Telling and logging. The lock is held in _tell_all and _log_later.

    def _tell_all(self, event: str, args: Any, kwargs: Any = None) -> None:
        for hear in self._hearers[event]:
            try:
                if kwargs:
                    hear(*args, **kwargs)
                else:
                    hear(*args)
            except Exception as exc:
                listener = getattr(hear, "__self__", hear)
                message = "listener %r raised an exception when told of %s"
                self._log_later(logging.ERROR, message, listener, event, exc_info=exc)

    def _log_later(self, *args: Any, **kwargs: Any) -> None:
        # A log handler has a lock. Thread A may hold the handler's lock and wait for
        # the breaker's, to format the breaker. So that thread B never holds the
        # breaker's lock and waits for the handler's, a record waits for its release.
        self._log_records = (*self._log_records, (args, kwargs))

    def _hand_on_records(self) -> None:
        """Log the records that were made under the lock, unless the running thread
        still holds the lock."""
        if not self._log_records:
            return
        is_owned = getattr(self._lock, "_is_owned", None)  # as threading.Condition asks
        if is_owned is None or not is_owned():
            with self._lock:
                records, self._log_records = self._log_records, ()
            for args, kwargs in records:
                try:
                    logger.log(*args, **kwargs)
                except Exception:
                    continue  # the caller gets no exception of a filter or handler

    # What CircuitBreakers and a fork ask of a breaker.

    def _settings(self) -> tuple[Any, ...]:
        """All that an operator may have changed since the breaker was made, without
        listeners that only watch."""
        telling = [
            listener
            for listener in self._told
            if not getattr(type(listener), "only_watches", False)
        ]
        return telling, _settings_of(self)

    def _is_dispensable(self) -> bool:
        """Whether `CircuitBreakers` may drop the breaker: closed, without failures and
        with its first settings, or open and due for a trial. Never waits: False while
        another thread holds the lock."""
        if self._storage.state == self._era.name and self._era._wait():
            return False  # without the lock, as most old breakers may be open
        if not self._lock.acquire(blocking=False):
            return False
        try:
            state = self._shown_state()
            if state._admits_all:
                return not self.fail_counter and self._settings() == self._as_made
            return state.name == STATE_OPEN and not state._wait()
        finally:
            self._lock.release()

    def _after_fork(self) -> None:
        # Called in the child. A thread that held the lock, ran the trial or moved the
        # circuit is in the parent alone, and the parent logs the records.
        self._lock = threading.RLock()
        self._trial = self._move_under_way = None
        vars(self).pop("_factor", None)
        self._log_records = ()


class CircuitBreakerState:
    """One era of a circuit: from one transition to the next.

    A call keeps the state object that admitted the call, and its outcome counts
    only while the breaker still has that object.

    `before_call`, `on_success` and `on_failure` are for programs that drive a
    circuit by hand: up to release 1.4.1 asyncio programs had to. Every guarded
    call asks a subclass that overrides one of these methods, `_handle_success`
    or `_handle_error`.
    """

    name: str
    """``'closed'``, ``'open'`` or ``'half-open'``."""

    _admits_all = False
    _made: Any  # the coroutine that a state stands in for
    _hint = ""  # what the error of a rejected call says beside the reason

    def __init__(self, cb: CircuitBreaker, name: str) -> None:
        self._breaker: CircuitBreaker = cb
        self.name = name
        self._move = _NEW  # the move that began this era
        self._known_move: Any = _NOTHING  # the storage's last_move() at its beginning

    @property
    def reason(self) -> str:
        """Why the era began, in words, such as ``'by hand'``."""
        return self._move.reason

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}>"

    def call(self, func: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Guard a call by `CircuitBreaker.call`, even if a subclass overrides that."""
        return _PLAIN_CALL(self._breaker, func, *args, **kwargs)

    async def call_async(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        """Guard a call by `CircuitBreaker.call_async`, even if that is overridden."""
        return await CircuitBreaker.call_async(self._breaker, func, *args, **kwargs)

    @_logging
    def before_call(self, func: Any, *args: Any, **kwargs: Any) -> None:
        """Raise `CircuitBreakerError` where the breaker would reject a call now.
        Half-opens an open circuit whose timeout has passed. Does not take the place,
        and does not call `func`, which release 1.4.1 called when half-opening."""
        breaker = self._breaker
        with breaker._lock:
            breaker._look()
            state = breaker._era
            wait = state._wait()
            is_admitted = (
                breaker._is_within_trial() if wait else state._start_trial()
            ) or breaker._dry_run
            if not is_admitted:
                raise breaker._new_error(state._move, wait, state._hint)

    @_logging
    def on_success(self) -> None:
        """Take in a success, unless this era has ended: it counts towards closing a
        half-open circuit, and leaves the `fail_counter` of a closed one alone."""
        with self._breaker._lock:
            if self is self._breaker._era:
                self._succeeded()

    def on_failure(self, exc: BaseException) -> None:
        """Take in a failure that `_inc_counter` has counted, unless this era has
        ended. Where the failure opens the circuit, raises `CircuitBreakerError` from
        `exc`, or `exc` in a dry run or if `throw_new_error_on_trip` is False."""
        error = None
        try:
            with self._breaker._lock:
                if self is self._breaker._era:
                    self._forget()  # which gives the failure its mark
                    error = self._failed(exc)
            if error is not None:
                _raise(error, exc)
        finally:
            del exc, error  # else error, its traceback and this frame are a cycle
            self._breaker._hand_on_records()

    def _handle_success(self) -> None:
        self._breaker._settle(_Admission(self), by="_handle_success")

    def _handle_error(self, exc: BaseException, reraise: bool = True) -> None:
        try:
            self._breaker._settle(_Admission(self), exc, by="_handle_error")
            if reraise:
                raise exc
        finally:
            del exc  # else exc, its traceback and this frame are a cycle

    # What each state answers in its own way. Lock held.

    def _wait(self) -> float:
        """Seconds until a call may be admitted; 0.0 is now. A quiet call asks
        without the lock."""
        return 0.0

    def _differs_from(self, move: Any) -> bool:
        """Whether `move`, a later one to the same state, begins a new era."""
        mine = self._move
        return not self._admits_all and (
            (mine.reason, mine.seconds, mine.failed_trials)
            != (move.reason, move.seconds, move.failed_trials)
        )

    def _start_trial(self) -> bool:
        """Half-open an open circuit for a trial. Returns whether that may begin."""
        return True

    def _count_success(self, number: int) -> None:
        """Take the success of a call that this state admitted into `fail_counter`. In
        a half-open circuit the success sets that counter to 0, as in every release;
        `success_counter` is left to `_succeeded`. `number` is from `_draw_number`,
        or 0."""
        if self._breaker._storage.counter:
            self._breaker._storage.reset_counter()

    def _count_failure(self) -> None:
        """Count the failure of a call that this state admitted."""
        self._breaker._inc_counter()

    def _remembered(self) -> int:
        """How many failures have not been forgotten. Needs no lock."""
        return self._breaker._storage.counter

    def _mark_anew(self) -> None:
        """Let the failures that are counted stand for failures of this moment."""

    def _change_window(self) -> None:
        """Take in that the window was set, or switched off."""

    def _forget(self) -> None:
        """Take the failures from the counter that the window has forgotten."""

    def _succeeded(self) -> None:
        """Take the success of a trial into `success_counter`, and decide what
        follows from the success."""

    def _failed(self, exc: BaseException) -> BaseException | None:
        """Decide what follows from a failure that has been counted. Returns what is
        to be raised, if the failure opens the circuit, else None."""
        return None

    def _was_found(self) -> None:
        """Begin an era whose move something other than this breaker made."""

    def _trip(
        self, phrase: str, move: _Move, exc: BaseException
    ) -> BaseException | None:
        breaker = self._breaker
        if breaker._era is not self:
            return None  # the repr of exc, in the reason, has moved the circuit
        # None, from a subclass whose open() returns nothing, means True.
        if breaker._carry_out(move, breaker.open) is False or breaker._dry_run:
            return exc
        return breaker._new_error(move, breaker._era._wait(), "", phrase)


class CircuitClosedState(CircuitBreakerState):
    """Calls are admitted, and failures counted, in a row or in the window."""

    _admits_all = True

    def __init__(
        self,
        cb: CircuitBreaker,
        prev_state: CircuitBreakerState | None = None,
        notify: bool = False,
    ) -> None:
        super().__init__(cb, STATE_CLOSED)
        # A mark stands for a remembered failure: the number of the failed call among
        # the calls counted in this era, and the monotonic moment of counting. Marks go
        # with the era, so closing forgets all failures. None if there is no window.
        self._marks: deque[tuple[int, float]] | None = (
            deque() if cb._has_window() else None
        )
        self._numbers = itertools.count(1)
        self._oldest = math.inf  # the number in the oldest mark

    def _count_success(self, number: int) -> None:
        storage = self._breaker._storage
        if self._breaker._window_size is None and storage.counter:
            storage.reset_counter()
        if self._marks is not None:
            self._forget(number or next(self._numbers))

    def _count_failure(self) -> None:
        breaker, marks = self._breaker, self._marks
        count = breaker._storage.counter
        if count == breaker._fail_max or (marks is not None and len(marks) != count):
            # Time may have forgotten failures, or other code has set the counter.
            self._forget()
            # The circuit is still closed if a listener, told of the failure that made
            # the counter reach fail_max, causes another failure, or if the counter was
            # set.
            if breaker._storage.counter == breaker._fail_max:
                return
        breaker._inc_counter()
        if marks is not None:
            self._forget()

    def _failed(self, exc: BaseException) -> BaseException | None:
        breaker = self._breaker
        if breaker._storage.counter < breaker._fail_max:
            return None
        self._forget()  # time may have passed while listeners were told
        count = breaker._storage.counter
        if count < breaker._fail_max:
            return None
        reason = f"{self._how_many(count)}: {_text_of(exc)}"
        return self._trip(_TRIPPED, _Move(STATE_OPEN, reason, "count"), exc)

    def _how_many(self, count: int) -> str:
        size, seconds = self._breaker._window_size, self._breaker._window_seconds
        within = "" if seconds is None else f" within {seconds} s"
        if self._breaker._fail_max == 1:
            return f"a failure{within}"
        if size is None:
            return f"{count} failures in a row{within}; the last"
        if size == math.inf:
            return f"{count} failures{within}; the last"
        return f"{count} of the last {size} calls failed; the last"

    def _was_found(self) -> None:
        if self._breaker._storage.counter >= self._breaker._fail_max:
            self._breaker._storage.reset_counter()
        self._forget()

    def _draw_number(self) -> int:
        """Draw the number of a success among the counted calls. Needs no lock."""
        return next(self._numbers)

    def _forgets(self, number: int) -> bool:
        """Whether the success with that number may make this state forget a failure.
        Needs no lock."""
        breaker = self._breaker
        marks = self._marks  # which a setter in another thread may make None
        is_in_step = marks and len(marks) == breaker._storage.counter
        return not is_in_step or number - self._oldest >= (breaker._window_size or 0)

    def _forget(self, latest: int | None = None) -> None:
        """Make the counter and the number of marks equal: counted failures without a
        mark get one with the present moment; marks go that are too old, too many, or
        `window_size` calls or more before the call with the number `latest`."""
        marks, breaker = self._marks, self._breaker
        storage: Any = breaker._storage
        if marks is None or storage.state != STATE_CLOSED:
            return  # there is no window, or another breaker has moved the storage
        now, count = time.monotonic(), storage.counter
        while len(marks) < count:
            latest = next(self._numbers)
            marks.append((latest, now))
        size, seconds = breaker._window_size, breaker._window_seconds
        far = -math.inf if size is None or latest is None else latest - size
        gone = len(marks) - count
        while gone < len(marks):
            number, moment = marks[gone]
            # A mark later than now was made by another clock, as in tests, and goes.
            if number > far and (seconds is None or 0.0 <= now - moment < seconds):
                break
            gone += 1
        if gone:
            # The counter is written before marks go: _remembered takes no lock, reads
            # the marks first, and leaves out the oldest of too many.
            storage.counter = len(marks) - gone
            for _ in range(gone):
                marks.popleft()
        self._oldest = marks[0][0] if marks else math.inf

    def _remembered(self) -> int:
        seconds, marks = self._breaker._window_seconds, self._marks
        if seconds is None or marks is None:
            return self._breaker._storage.counter
        now = time.monotonic()
        moments = [moment for _, moment in _copy_of(marks)]
        count = self._breaker._storage.counter
        # If there are more marks than failures, the oldest marks are out of date.
        standing = moments[max(0, len(moments) - count) :]
        return count - sum(not 0.0 <= now - moment < seconds for moment in standing)

    def _mark_anew(self) -> None:
        self._marks = deque()
        self._forget()

    def _change_window(self) -> None:
        if not self._breaker._has_window():
            self._marks = None
            return
        # No call has the number drawn here, so each mark's number grows by one as well.
        latest = next(self._numbers)
        self._marks = deque(
            (number + 1, moment) for number, moment in self._marks or ()
        )
        self._forget(latest)


def _copy_of(marks: deque[Any]) -> tuple[Any, ...]:
    while True:
        try:
            return tuple(marks)
        except RuntimeError:  # another thread changed marks, on a Python without a GIL
            continue


class CircuitOpenState(CircuitBreakerState):
    """Calls are rejected until the timeout has passed. An open circuit admits no
    call, so no outcome counts in this era."""

    def __init__(
        self,
        cb: CircuitBreaker,
        prev_state: CircuitBreakerState | None = None,
        notify: bool = False,
    ) -> None:
        super().__init__(cb, STATE_OPEN)

    def _wait(self) -> float:
        breaker, length = self._breaker, self._move.seconds
        if length is None:
            length = breaker._reset_timeout
            if breaker._max_reset_timeout is not None:
                grown = breaker._grown_timeout(self._move.failed_trials)
                length = grown * breaker._factor_of(
                    self._known_move or breaker._storage.opened_at
                )
        left = length - breaker._storage.open_for()
        # If opened_at is None, left may be inf - inf, a NaN, which is not above 0.
        return left if left > 0.0 else breaker._place_wait()

    def _start_trial(self) -> bool:
        breaker = self._breaker
        move = _Move(STATE_HALF_OPEN, "the timeout has passed", "trial")
        breaker._carry_out(move, breaker.half_open)
        return breaker._era is not self  # if so, a subclass's half_open() did nothing

    def _count_success(self, number: int) -> None:
        """Count nothing: an open circuit admits no call."""

    def _count_failure(self) -> None:
        """Count nothing: an open circuit admits no call."""


class CircuitHalfOpenState(CircuitBreakerState):
    """One call at a time, the trial, is admitted; all other calls are rejected."""

    _hint = "a trial call is running"

    def __init__(
        self,
        cb: CircuitBreaker,
        prev_state: CircuitBreakerState | None = None,
        notify: bool = False,
    ) -> None:
        super().__init__(cb, STATE_HALF_OPEN)

    def _wait(self) -> float:
        return self._breaker._place_wait()

    def _succeeded(self) -> None:
        breaker, storage = self._breaker, self._breaker._storage
        storage.increment_success_counter()
        if storage.success_counter >= breaker._success_threshold:
            move = _Move(STATE_CLOSED, "the trial succeeded", "outcome")
            breaker._carry_out(move, breaker.close)

    def _failed(self, exc: BaseException) -> BaseException | None:
        move = _Move(STATE_OPEN, f"the trial failed: {_text_of(exc)}", "outcome")
        return self._trip(_TRIAL_FAILED, move, exc)


def breakers() -> tuple[CircuitBreaker, ...]:
    """All breakers alive in this process, sorted by name, unnamed ones last."""
    alive = [breaker for ref in _breakers.valuerefs() if (breaker := ref()) is not None]
    return tuple(sorted(alive, key=lambda each: (each._name is None, each._name or "")))


class CircuitBreakers(dict[object, CircuitBreaker]):
    """A mapping that makes a breaker for each key when the key is first looked up.

        breakers = CircuitBreakers(fail_max=25, window_size=50)
        breakers["api.example.org"].call(fetch, url)

    `breakers[key]` is ``CircuitBreaker(name=str(key), **settings)``, made once however
    many threads ask; looking up a breaker that is there takes no lock. A subclass may
    override `make`. ``in``, ``len``, iteration and `get` make no breaker. A program
    whose threads may look up new keys meanwhile iterates over `copy()`, a plain
    dictionary. The settings are checked at once; `name` and `state_storage` among them
    are a `TypeError`.

    Beyond `maxsize` breakers (a whole number from 1; `math.inf` for no limit), a new
    breaker makes the mapping drop old ones: those among a few of the oldest that are
    closed, without failures and with their first settings and listeners (apart from
    those that only watch), or open and due for a trial. A dropped breaker is still
    found by its key as long as anything, such as a running call, refers to the breaker.
    """

    def __init__(self, maxsize: float = 1024, **settings: Any) -> None:
        for name in ("name", "state_storage"):
            if name in settings:
                raise TypeError(
                    f"{name} cannot be the same for all breakers, not "
                    f"{settings[name]!r}: override make(key) in a subclass"
                )
        super().__init__()
        self._maxsize = _whole_number("maxsize", maxsize, 1, math.inf)
        for name in ("exclude", "include", "ignore", "listeners"):
            # An iterator can be read only once, and all breakers need the items. What
            # is not iterable or is a class, the constructor of `checked` refuses.
            if _is_iterable(settings.get(name)) and not isinstance(
                settings[name], type
            ):
                settings[name] = tuple(settings[name])
        self._settings = settings
        checked = CircuitBreaker(**settings)  # raises if a setting is wrong
        del _breakers[id(checked)]
        self._lock = threading.RLock()
        # The keys of the breakers that `make` has made, in the order in which
        # _make_room judges them. A key stays here for a while after the program has
        # deleted the key. Used with the lock held: an OrderedDict that one thread reads
        # while another writes crashes a Python without a GIL.
        self._by_age: OrderedDict[Any, None] = OrderedDict()
        self._gone: weakref.WeakValueDictionary[Any, CircuitBreaker] = (
            weakref.WeakValueDictionary()
        )
        _registries[id(self)] = self

    def __copy__(self: _T) -> _T:
        return self  # a mapping is one shared object, as each breaker is

    def __deepcopy__(self: _T, memo: object) -> _T:
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            f"{self!r} cannot be pickled, as copies would be other circuits: make "
            f"CircuitBreakers in the module that uses them, in each process"
        )

    def make(self, key: Any) -> CircuitBreaker:
        """Return a new breaker for `key`. The lock of the mapping is held."""
        return CircuitBreaker(name=str(key), **self._settings)

    def __missing__(self, key: Any) -> CircuitBreaker:
        with self._lock:
            breaker = self.get(key, self._gone.get(key))
            if breaker is None:
                breaker = self.make(key)
                if not isinstance(breaker, CircuitBreaker):
                    raise TypeError(
                        f"make must return a CircuitBreaker, not {breaker!r}: the "
                        f"key was {key!r}"
                    )
                breaker._as_made = breaker._settings()
            self[key] = breaker
            self._by_age[key] = None
            self._make_room()
            return breaker

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {len(self)}, maxsize {self._maxsize}>"

    def _make_room(self) -> None:
        for _ in range(min(_LOOKED_AT, len(self._by_age) - 1)):  # never at the new one
            if len(self) <= self._maxsize and len(self._by_age) <= len(self):
                return
            key, _ = self._by_age.popitem(last=False)
            breaker = self.get(key)
            if breaker is None:
                continue  # the program has deleted the key
            self._by_age[key] = None
            if len(self) > self._maxsize and breaker._is_dispensable():
                # The breaker is judged once more when it has been taken out, as a call
                # in another thread may have failed just before. From then on a look-up
                # waits for the lock, and finds the breaker in _gone.
                self._gone[key] = self.pop(key, breaker)
                if breaker._is_dispensable():
                    del self._by_age[key]
                else:
                    self[key] = breaker


# What a call, a trial and a move are to the breaker.


class _Admission:
    """What a call keeps from admission to settlement: the state that admitted the
    call and, for a trial, its _Trial. One object serves all ordinary calls of an era;
    a trial has its own; calls within a trial have `_WITHIN`, whose state is None.

    The other five are the storage, or `_OPAQUE` where that alone does not decide. A
    quiet call reads four of them without the lock to find that it passes (`passes`),
    that there is nothing to settle when it returns (`returns`), that its success
    changes nothing (`settles`), or that it is rejected (`rejects`). A quiet failure
    reads the fifth with the lock held to find that it is only counted (`counts`).
    """

    __slots__ = ("state", "trial", "passes", "returns", "settles", "rejects", "counts")

    def __init__(
        self,
        state: Any = None,
        trial: _Trial | None = None,
        passes: Any = None,
        returns: Any = None,
        settles: Any = None,
        rejects: Any = None,
        counts: Any = None,
    ) -> None:
        self.state: Any = state
        self.trial: _Trial | None = trial
        self.passes: Any = passes or _OPAQUE
        self.returns: Any = returns or _OPAQUE
        self.settles: Any = settles or _OPAQUE
        self.rejects: Any = rejects or _OPAQUE
        self.counts: Any = counts or _OPAQUE


class _Trial:
    """A call that took the place. A trial does not keep the breaker alive, because
    the context of a generator that is never finished keeps the trial."""

    __slots__ = ("since", "claimed", "granted", "over", "_breaker")

    def __init__(self, breaker: CircuitBreaker) -> None:
        self.since: float = time.monotonic()  # before the storage is asked
        self.claimed: bool = False  # whether the storage's claim must be released
        self.granted: bool = False  # whether the storage has granted the trial
        self.over: bool = False  # whether no call can be within the trial any more
        self._breaker = weakref.ref(breaker)

    def may_matter(self) -> bool:
        return not self.over and self._breaker() is not None


class _Move:
    """A transition: where to, why in words, and what caused it.

    `by` is ``'count'`` (the failures have reached `fail_max`), ``'trial'`` (a
    call half-opens the circuit to be the trial), ``'outcome'`` (of a trial),
    ``'hand'``, or ``'found'`` for a move that something other than the breaker made
    in the storage. `seconds` is how long an opening by ``open(seconds)`` lasts,
    else None. `why_opened` is the reason of the last opening until a closing.
    """

    __slots__ = (
        "state",
        "reason",
        "by",
        "seconds",
        "failed_trials",
        "fail_max",
        "why_opened",
    )

    def __init__(
        self,
        state: str,
        reason: str,
        by: str,
        seconds: float | None = None,
        failed_trials: int | None = None,
    ) -> None:
        self.state: str = state
        self.reason: str = reason
        self.by: str = by
        self.seconds: float | None = seconds
        self.failed_trials: Any = failed_trials  # None until `follow`
        self.fail_max: float = math.inf
        self.why_opened: str | None = None  # None until `follow`

    @classmethod
    def found(cls, state: str, known: Any, unknown: str = _FOUND) -> _Move:
        """A move to `state` that something other than the breaker made in a storage.
        `known` is the storage's last_move(); `unknown` is the reason where `known` is
        None or a move to another state."""
        if known is None or known.state != state:
            return cls(state, unknown, "found")
        move = cls(state, known.reason, "found", known.seconds, known.failed_trials)
        move.why_opened = getattr(known, "why_opened", None)
        return move

    def follow(self, before: _Move) -> _Move:
        """Take over from the move `before` why the circuit opened, and how many trials
        have failed since the circuit was closed or opened by hand. Returns self."""
        if self.state == STATE_OPEN:
            self.why_opened = self.reason
        elif self.state == STATE_CLOSED:
            self.why_opened = ""
        elif self.why_opened is None:  # else the storage knows why
            self.why_opened = before.why_opened or ""
        if self.failed_trials is None:
            self.failed_trials = 0
            if self.state == STATE_HALF_OPEN:
                self.failed_trials = before.failed_trials
            elif self.state == STATE_OPEN and self.by == "outcome":
                self.failed_trials = before.failed_trials + 1
        return self


def _raise(error: BaseException, cause: BaseException | None) -> NoReturn:
    """Raise `error` from `cause`, or `cause` itself if `error` is the same object."""
    try:
        if error is cause:
            raise error
        raise error from cause
    finally:
        del error, cause  # else error, its traceback and this frame are a cycle


# Guards, one for each kind of callable: admit, run, settle. `admitted` is the
# admission of a plain function's call that has returned a coroutine or a generator.


def _guard_function(breaker: Any, func: Any, admitted: Any = None) -> Any:
    def guarded(*args: Any, **kwargs: Any) -> Any:
        admission = breaker._admission
        if admission.passes._state != STATE_CLOSED:
            admission = breaker._admit(func, args, kwargs)
        try:
            result = func(*args, **kwargs)
        except BaseException as exc:
            breaker._settle(admission, exc)
            raise
        # Looking the class up once is faster than comparing it with three classes.
        try:
            if type(result) in _CODES_OF_RESULTS:
                return _guard_result(breaker, result, admission)
        except TypeError:
            pass  # a class that cannot be hashed is not in _CODES_OF_RESULTS
        if admission.returns._fail_counter:
            breaker._settle(admission, None, result)
        return result

    return guarded


def _guard_coroutine(breaker: Any, func: Any, admitted: Any = None) -> Any:
    async def guarded(*args: Any, **kwargs: Any) -> Any:
        admission = admitted or breaker._admission
        if admitted is None and admission.passes._state != STATE_CLOSED:
            admission = await breaker._admit_async(func, args, kwargs)
        try:
            result = func(*args, **kwargs)
            if type(result) is _Coroutine or _is_awaitable(result):
                result = await result
        except BaseException as exc:
            breaker._settle(admission, exc)
            raise
        if admission.returns._fail_counter:
            breaker._settle(admission, None, result)
        return result

    return guarded


def _guard_generator(breaker: Any, func: Any, admitted: Any = None) -> Any:
    def guarded(*args: Any, **kwargs: Any) -> Any:
        admission = admitted or breaker._admit(func, args, kwargs)
        generator = None
        try:
            generator = func(*args, **kwargs)
            result = yield from generator
        except BaseException as exc:
            breaker._settle(admission, _unless_closed(exc, generator))
            raise
        breaker._settle(admission)
        return result

    return guarded


def _guard_iterable_coroutine(breaker: Any, func: Any, admitted: Any = None) -> Any:
    def guarded(*args: Any, **kwargs: Any) -> Any:
        admission = admitted
        if admission is None:
            entry = breaker._admit_async(func, args, kwargs)
            admission = yield from entry.__await__()
        try:
            result = yield from func(*args, **kwargs)
        except BaseException as exc:
            breaker._settle(admission, exc)
            raise
        breaker._settle(admission, None, result)
        return result

    return types.coroutine(guarded)


def _guard_async_generator(breaker: Any, func: Any, admitted: Any = None) -> Any:
    async def guarded(*args: Any, **kwargs: Any) -> Any:
        admission = admitted or await breaker._admit_async(func, args, kwargs)
        closed = False
        try:
            generator = func(*args, **kwargs)
            item = await _first_step(generator)
            while True:  # there is no "yield from" for async generators
                try:
                    sent = yield item
                except BaseException as exc:
                    closed = isinstance(exc, GeneratorExit)
                    item = await generator.athrow(exc)
                    closed = False  # the generator swallowed exc and yielded again
                else:
                    item = await generator.asend(sent)
        except StopAsyncIteration:
            pass
        except BaseException as exc:
            # Closing a generator at one of its yields is a success.
            closed = closed and isinstance(exc, GeneratorExit)
            breaker._settle(admission, None if closed else exc)
            raise
        breaker._settle(admission)

    return guarded


def _guard_result(breaker: Any, result: Any, admission: _Admission) -> Any:
    """Guard to its end the coroutine or generator that a plain function returned."""
    code = getattr(result, _CODES_OF_RESULTS[type(result)])
    guard = _GUARDS_BY_FLAGS[code.co_flags & _LAZY_FLAGS]
    return _called_like(guard(breaker, lambda: result, admission), result)()


# What inspect calls CO_GENERATOR, CO_COROUTINE, CO_ITERABLE_COROUTINE and
# CO_ASYNC_GENERATOR; importing inspect takes longer than this module itself.
_GENERATOR, _COROUTINE, _ITERABLE_COROUTINE, _ASYNC_GENERATOR = 0x20, 0x80, 0x100, 0x200
_LAZY_FLAGS = _GENERATOR | _COROUTINE | _ITERABLE_COROUTINE | _ASYNC_GENERATOR
_GUARDS_BY_FLAGS = {
    _GENERATOR: _guard_generator,
    _COROUTINE: _guard_coroutine,
    _GENERATOR | _ITERABLE_COROUTINE: _guard_iterable_coroutine,
    _ASYNC_GENERATOR: _guard_async_generator,
}
_Generator, _Coroutine = types.GeneratorType, types.CoroutineType
_Function, _Method = types.FunctionType, types.MethodType
_CODES_OF_RESULTS = {
    _Generator: "gi_code",
    _Coroutine: "cr_code",
    types.AsyncGeneratorType: "ag_code",
}


def _guard_for(func: Any) -> Any:
    """The guard for calls of `func`, as far as the code of `func` tells its kind."""
    return _GUARDS_BY_FLAGS.get(_lazy_flags(func), _guard_function)


def _is_lazy(func: Any) -> bool:
    """Whether `func` is a coroutine function or a generator function of some kind."""
    return _lazy_flags(func) in _GUARDS_BY_FLAGS


def _call_later(breaker: Any, func: Callable[..., _T], args: Any, kwargs: Any) -> _T:
    """Guard a call of `func`, which is lazy: admission takes place when the coroutine
    or generator that this function returns begins to run."""
    guarded = _called_like(_guard_for(func)(breaker, func), func)
    later: _T = guarded(*args, **kwargs)
    return later


def _lazy_flags(func: Any) -> int:
    """Those flags of the code behind `func` that say that a call of it runs later."""
    if type(func) is _Function:  # most callables are, and the rest takes longer
        return func.__code__.co_flags & _LAZY_FLAGS
    while isinstance(func, (functools.partial, types.MethodType)):
        func = func.func if isinstance(func, functools.partial) else func.__func__
    # An AsyncMock has a __code__ of its own, and a proxy of a remote object has any
    # attribute, so that only an int counts. Any other callable object runs the code
    # of the __call__ of its class.
    for called in (func, getattr(type(func), "__call__", None)):
        flags = getattr(getattr(called, "__code__", None), "co_flags", None)
        if isinstance(flags, int):
            return flags & _LAZY_FLAGS
    return 0


def _called_like(guarded: Any, original: Any) -> Any:
    """Give `guarded` the name of `original`, which tracebacks and tasks show."""
    for attribute in ("__name__", "__qualname__"):
        name = getattr(original, attribute, None)
        if isinstance(name, str):
            setattr(guarded, attribute, name)
    return guarded


def _is_awaitable(result: Any) -> bool:
    if type(result) is _Generator:
        return bool(result.gi_code.co_flags & _ITERABLE_COROUTINE)
    return hasattr(type(result), "__await__")


def _unless_closed(exc: BaseException, generator: Any) -> BaseException | None:
    """What a call that raised `exc` is settled with: None for the GeneratorExit of a
    close() at a yield, which is a success, else `exc`. A GeneratorExit that the
    generator itself raised has the generator's frame in the traceback."""
    if not isinstance(exc, GeneratorExit):
        return exc
    below = exc.__traceback__ and exc.__traceback__.tb_next
    if below and below.tb_frame.f_code is getattr(generator, "gi_code", None):
        return exc
    return None


def _first_step(generator: Any) -> Any:
    # Without the hooks the event loop does not see the generator. At its end the loop
    # closes each async generator that it has seen, the guard closes this one, and only
    # one of them may. The garbage collector, which may come to the generator before
    # the guard does, must leave the closing to the guard as well.
    hooks = sys.get_asyncgen_hooks()
    sys.set_asyncgen_hooks(None, _leave_it)
    try:
        return generator.__anext__()
    finally:
        sys.set_asyncgen_hooks(*hooks)


def _leave_it(generator: Any) -> None:
    """Do nothing about a generator that the guard will close."""


class _Block:
    """The context manager that `CircuitBreaker.calling` returns, for one use."""

    def __init__(self, breaker: CircuitBreaker) -> None:
        self._breaker = breaker
        self._uses = [breaker]
        self._admission: _Admission | None = None
        self._through: Any = None  # the block as call() of a subclass guards it

    def _enter(self) -> bool:
        """True if this object is to guard the block; False if a subclass's `call`
        guards the block and has been entered."""
        try:
            breaker = self._uses.pop()  # atomic: of several threads, one gets it
        except IndexError:
            raise RuntimeError("each breaker.calling() guards one block") from None
        if not breaker._has_own_call() or _lazy_flags(breaker.call) & _COROUTINE:
            return True
        from contextlib import contextmanager  # imported here, as few blocks need it

        call: Any = breaker.call
        self._through = contextmanager(call)(_block)
        self._through.__enter__()
        return False

    def __enter__(self) -> None:
        if self._enter():
            breaker = self._breaker
            self._admission = breaker._admit(breaker.calling, (), {})

    async def __aenter__(self) -> None:
        if self._enter():
            breaker = self._breaker
            self._admission = await breaker._admit_async(breaker.calling, (), {})

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: types.TracebackType | None,
    ) -> None:
        through, self._through = self._through, None
        admission, self._admission = self._admission, None
        try:
            if through is not None:
                through.__exit__(exc_type, exc, traceback)
            elif admission is None:
                raise RuntimeError("breaker.calling() was left without being entered")
            else:
                self._breaker._settle(admission, exc)
        finally:
            del exc, traceback  # they may refer to this frame, which is a cycle

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: types.TracebackType | None,
    ) -> None:
        try:
            self.__exit__(exc_type, exc, traceback)
        finally:
            del exc, traceback

    def __call__(self, func: _F) -> _F:
        """Decorate `func`, as ``@breaker.calling()`` did in older releases."""
        return self._breaker(func)


def _block() -> Any:
    """What `call` of a subclass receives as `func` in place of a block."""
    yield


class _Unguarded:
    """Stands in for the breaker in a decorated function whose calls go through the
    call() of a subclass, which guards them: admits every call, settles none."""

    def __init__(self) -> None:
        quiet = CircuitMemoryStorage(STATE_CLOSED)
        self._admission = _Admission(None, None, quiet, quiet, quiet)

    def _admit(self, func: Any, args: Any, kwargs: Any) -> _Admission:
        return self._admission

    async def _admit_async(self, func: Any, args: Any, kwargs: Any) -> _Admission:
        return self._admission

    def _settle(self, admission: Any, exc: Any = None, result: Any = None) -> None:
        """Do nothing: the call() of the subclass has settled the call."""


class CircuitBreakerListener:
    """Is told what happens to a breaker. Override the methods for the events that
    you want to hear of; `cb` is the breaker.

    The methods are called with the breaker's lock held, one at a time, in the
    thread of the call. The methods may use the breaker; they must not wait for
    another thread that uses the breaker, nor use a breaker whose listeners use
    this one: both deadlock. An `Exception` in a method is logged on the logger
    ``pybreaker`` and changes nothing; any other `BaseException` reaches the caller.

    A class that sets ``only_watches = True`` says that its listeners only watch:
    `CircuitBreakers` may drop a breaker to which such a listener was added.
    """

    only_watches: bool = False

    def before_call(
        self, cb: CircuitBreaker, func: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> None:
        """A call was admitted; `func` is called next, with `args` and `kwargs`."""

    def failure(self, cb: CircuitBreaker, exc: BaseException) -> None:
        """A call failed with `exc`, a `FailedResult` if `failure_result` matched. A
        failure that counts is counted by now; the opening is decided afterwards."""

    def success(self, cb: CircuitBreaker) -> None:
        """A call succeeded. `state_change` comes before, if the circuit closed."""

    def rejected(
        self, cb: CircuitBreaker, func: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> None:
        """A call was rejected; `func` is not called, except in a dry run."""

    def abandoned(self, cb: CircuitBreaker) -> None:
        """An admitted call was abandoned, neither a success nor a failure: the call was
        canceled, say, or raised an exception that `ignore` matches."""

    def state_change(
        self,
        cb: CircuitBreaker,
        old_state: CircuitBreakerState,
        new_state: CircuitBreakerState,
    ) -> None:
        """The circuit has moved: `cb.state` is `new_state` already, and the counters
        are the new ones. The states have a `name`."""


_EVENTS = (
    "before_call",
    "failure",
    "success",
    "rejected",
    "abandoned",
    "state_change",
)
_NO_HEARERS: dict[str, tuple[Any, ...]] = dict.fromkeys(_EVENTS, ())


def _hearers_of(listeners: Iterable[Any]) -> dict[str, tuple[Any, ...]]:
    """For each event, the listeners' methods that are to be called."""
    if listeners == ():
        return _NO_HEARERS
    listeners = tuple(listeners)
    return {
        event: tuple(filter(callable, (_hearer(each, event) for each in listeners)))
        for event in _EVENTS
    }


def _hearer(listener: Any, event: str) -> Any:
    """A listener's own method for an event; not callable if the listener has none."""
    try:
        method = getattr(listener, event, None)
        unheard = getattr(CircuitBreakerListener, event)
        return None if getattr(method, "__func__", None) is unheard else method
    except Exception:  # a property raised; at an event it raises again and is logged
        return lambda *args, **kwargs: getattr(listener, event)(*args, **kwargs)


class _HearersInList:
    """`_hearers_of` a list, asked at each event, as a program may change the list."""

    def __init__(self, listeners: Any) -> None:
        self._listeners = listeners

    def __getitem__(self, event: str) -> tuple[Any, ...]:
        return _hearers_of(self._listeners)[event]


class CircuitBreakerStorage:
    """Base class for where a circuit's state and counters are kept.

    A subclass has at least `state`, `counter` and `opened_at` and the methods
    `increment_counter` and `reset_counter`. In calls and transitions the breaker
    uses a storage with the breaker's lock held, so a storage should not block;
    only `claim_trial` and `claim_trial_async` are called without the lock.

    What a storage raises reaches the caller, chained to what the guarded function
    raised or instead of the result. It never counts as a failure of the function, and
    a trial gives the place back.

    A class that sets ``_is_plain = True`` in its own body (subclasses do not inherit
    the promise) promises that the breaker may read a storage of exactly that class
    without the lock: the attributes ``_state``, ``_fail_counter`` and ``_last_move``
    always hold what `state`, `counter` and `last_move` say, and any thread may call
    `open_for`.
    """

    __slots__ = ("__dict__", "__weakref__")

    _successes = 0
    _last_move: Any = None
    _is_plain = False

    def __init__(self, name: str) -> None:
        self._name = name

    @property
    def name(self) -> str:
        """The kind of the storage, such as ``'memory'``."""
        return self._name

    @property
    def state(self) -> str:
        """The name of the circuit's state. Settable."""
        raise NotImplementedError

    @state.setter
    def state(self, state: str, /) -> None:
        raise NotImplementedError

    @property
    def counter(self) -> int:
        """How many failures are remembered."""
        raise NotImplementedError

    def increment_counter(self) -> None:
        """Add one to `counter`."""
        raise NotImplementedError

    def reset_counter(self) -> None:
        """Set `counter` to 0."""
        raise NotImplementedError

    @property
    def success_counter(self) -> int:
        """How many trials have succeeded. The base class counts for storages that
        do not, such as those written for releases without `success_threshold`."""
        return self._successes

    def increment_success_counter(self) -> None:
        """Add one to `success_counter`."""
        self._successes += 1

    def reset_success_counter(self) -> None:
        """Set `success_counter` to 0."""
        self._successes = 0

    @property
    def opened_at(self) -> datetime | None:
        """The moment of the last opening. Settable. A naive datetime is in UTC; None
        means that the timeout has passed."""
        raise NotImplementedError

    @opened_at.setter
    def opened_at(self, moment: datetime, /) -> None:
        raise NotImplementedError

    def open_for(self) -> float:
        """Seconds since the opening; by default by the wall clock, from `opened_at`."""
        return _age(self.opened_at)

    def move(self, move: Any) -> None:
        """Write that the circuit moves to `move.state`; by default an opening sets
        `opened_at`, then `state` is set.

        `move.reason` says why in words, and `move.by` what caused it: ``'count'``,
        ``'trial'`` (the half-opening that a trial makes), ``'outcome'`` (of a
        trial) or ``'hand'``. `move.seconds` is the length of an opening that has
        one of its own, else None; `move.failed_trials` the number of failed trials
        since the circuit was last closed or opened by hand; `move.fail_max` the
        breaker's `fail_max`. The breaker has written the counters before. Lock held.
        """
        if move.state == STATE_OPEN:
            self.opened_at = datetime.now(UTC)
        self.state = move.state

    def last_move(self) -> Any:
        """What the storage knows of the last move, as an object with the attributes
        that `move` receives, or None. The storage returns the same object until the
        circuit moves: a new one tells a breaker that an open circuit opened again."""
        return None

    def claim_trial(self, timeout: float) -> bool:
        """Whether the breaker may run the trial that is due. If True, no other
        breaker may for `timeout` seconds. Called without the lock; may block."""
        return True

    async def claim_trial_async(self, timeout: float) -> bool:
        """Answer as `claim_trial` does, to a coroutine on any event loop."""
        return self.claim_trial(timeout)

    def release_trial(self) -> None:
        """Take in that the trial which the breaker claimed is over. Lock held."""


class CircuitMemoryStorage(CircuitBreakerStorage):
    """Keeps the state in memory, and measures time by the monotonic clock.

    An unpickled storage has been open for as long as the wall clock says.
    """

    # `state`, `counter` and `success_counter` are the slots themselves, so that quiet
    # calls read them fast. Tests in the field use the private names.
    __slots__ = (
        "_name",
        "_state",
        "_fail_counter",
        "_success_counter",
        "_opening",  # opened_at; when that was written (monotonic), and its age then
        "_last_move",
    )

    _is_plain = True

    _name: str
    _state: str
    _fail_counter: int
    _success_counter: int
    _opening: tuple[datetime | None, float, float]

    def __init__(self, state: str) -> None:
        self._name = "memory"
        self._state = _checked_state("state", state)
        self._fail_counter = 0
        self._success_counter = 0
        self._opening = _NEVER  # one tuple for all storages, to save memory
        self._last_move: Any = None

    def increment_counter(self) -> None:
        """Add one to `counter`."""
        self._fail_counter += 1

    def reset_counter(self) -> None:
        """Set `counter` to 0."""
        self._fail_counter = 0

    def increment_success_counter(self) -> None:
        """Add one to `success_counter`."""
        self._success_counter += 1

    def reset_success_counter(self) -> None:
        """Set `success_counter` to 0."""
        self._success_counter = 0

    @property
    def opened_at(self) -> datetime | None:
        """The moment of the last opening; setting another moves the opening there."""
        return self._opening[0]

    @opened_at.setter
    def opened_at(self, moment: datetime | None) -> None:
        self._opening = moment, time.monotonic(), _age(moment)

    @opened_at.deleter
    def opened_at(self) -> None:
        del self._opening  # mock.patch deletes before restoring the old value

    _opened_at = opened_at

    def open_for(self) -> float:
        """Seconds since the opening, by the monotonic clock."""
        moment, written, age = self._opening
        elapsed = time.monotonic() - written
        if 0.0 <= elapsed < _DECADES:
            return age + elapsed
        # A monotonic clock that went back, or on by decades, is another clock, such as
        # freezegun's. The wall clock decides then, and an opening in its future is now.
        age = _age(moment)
        if age < 0.0:
            self.opened_at = datetime.now(UTC)
        return max(0.0, age)

    def move(self, move: Any) -> None:
        """Write a move as `CircuitBreakerStorage.move` does, and keep `move`."""
        self._last_move = move
        if move.state == STATE_OPEN:
            now = datetime.now(UTC)
            if not _is_plain(self):
                self.opened_at = now  # which a subclass may have overridden
            self._opening = now, time.monotonic(), 0.0
        self.state = move.state

    def last_move(self) -> Any:
        """The last move that a breaker wrote, or None."""
        return self._last_move

    def __getstate__(self) -> dict[str, Any]:
        names = "_name", "_state", "_fail_counter", "_success_counter", "_opened_at"
        return {**vars(self), **{name: getattr(self, name) for name in names}}

    def __setstate__(self, attributes: dict[str, Any]) -> None:
        self._last_move = None
        for name, value in attributes.items():
            setattr(self, name, value)


for _public, _slot in (
    ("state", "_state"),
    ("counter", "_fail_counter"),
    ("success_counter", "_success_counter"),
):
    setattr(CircuitMemoryStorage, _public, vars(CircuitMemoryStorage)[_slot])


def __getattr__(name: str) -> Any:
    # Finding out takes long, and few programs ask for these two names.
    if name == "HAS_REDIS_SUPPORT":
        from importlib.util import find_spec

        return find_spec("redis") is not None
    if name == "CircuitRedisStorage":
        try:
            from pybreaker_extras.redis import CircuitRedisStorage
        except ModuleNotFoundError as exc:
            if exc.name not in ("pybreaker_extras", "pybreaker_extras.redis"):
                raise
            raise ImportError(
                "CircuitRedisStorage is in pybreaker_extras/redis.py, which this copy "
                "of pybreaker.py lacks; installing the package pybreaker brings both"
            ) from exc
        return CircuitRedisStorage
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), "CircuitRedisStorage", "HAS_REDIS_SUPPORT"})


# Exceptions that say nothing about the service, and exception groups.


def _is_abandonment(exc: BaseException) -> bool:
    """Whether `exc` says that the call was given up, and not how the service did."""
    if isinstance(exc, Exception):
        return False  # no Exception does, which spares most calls the search
    leaves = _leaves_of(exc)
    if leaves:
        return all(map(_is_abandonment, leaves))
    return isinstance(exc, _imported(_ABANDONING))


def _leaves_of(exc: BaseException) -> tuple[BaseException, ...]:
    """The exceptions in an exception group, at least one; () if `exc` is no group."""
    group: Any = exc
    return group.exceptions if isinstance(exc, _imported(_GROUPS)) else ()


_GROUPS = (
    ("builtins", "BaseExceptionGroup"),
    ("exceptiongroup", "BaseExceptionGroup"),
)
_ABANDONING = (
    ("builtins", "KeyboardInterrupt"),
    ("builtins", "SystemExit"),
    ("builtins", "GeneratorExit"),
    ("asyncio", "CancelledError"),
    ("trio", "Cancelled"),
    ("greenlet", "GreenletExit"),
)


def _imported(names: tuple[tuple[str, str], ...]) -> tuple[type, ...]:
    """Those of the named classes that were imported; no other was ever raised."""
    found = []
    for module, attribute in names:
        cls = getattr(sys.modules.get(module), attribute, None)
        if isinstance(cls, type):
            found.append(cls)
    return tuple(found)


# Moments and texts.


def _age(moment: datetime | None) -> float:
    """Seconds since `moment`, by the wall clock; `math.inf` for None."""
    if not moment:
        return math.inf
    return (datetime.now(UTC) - _utc(moment)).total_seconds()


def _utc(moment: datetime) -> datetime:
    if moment.tzinfo is None:
        return moment.replace(tzinfo=UTC)
    return moment.astimezone(UTC)


def _finite(number: float | None, infinity: str | None = None) -> float | str | None:
    return infinity if number == math.inf else number


def _in(seconds: float) -> str:
    if seconds == math.inf:
        return "only by hand"
    text = f"{float(seconds):.1f}"
    return f"in {text} s" if text != "0.0" else "in less than 0.1 s"


def _text_of(exc: BaseException) -> str:
    """The `repr` of an exception, on one line and cut, because reasons keep it."""
    try:
        text = repr(exc)
    except Exception:  # a __repr__ that raises
        text = type(exc).__name__
    return _line(text)


def _line(text: str) -> str:
    return " ".join(text[:_LONGEST_TEXT].splitlines())


# Checks of arguments.


def _checked_state(parameter: str, state: Any) -> Any:
    if state not in (STATE_CLOSED, STATE_OPEN, STATE_HALF_OPEN):
        names = f"{STATE_CLOSED!r}, {STATE_OPEN!r} or {STATE_HALF_OPEN!r}"
        raise ValueError(f"{parameter} must be {names}, not {state!r}")
    return state


def _checked_reason(reason: Any) -> str:
    if reason is None:
        return ""
    if not isinstance(reason, str):
        raise TypeError(f"reason must be a string or None, not {reason!r}")
    return _line(reason)


def _true_or_false(parameter: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{parameter} must be True or False, not {value!r}")
    return value


def _whole_number(
    parameter: str, value: Any, minimum: int, unlimited: float | None = None
) -> Any:
    """`value` as an int, or as it is if it equals `unlimited`."""
    if isinstance(value, float):
        if value == unlimited:
            return value
        if not value.is_integer():
            raise ValueError(f"{parameter} must be a whole number, not {value!r}")
        number = int(value)
    else:
        number = _integer(parameter, value, "a whole number")
    if number < minimum:
        raise ValueError(f"{parameter} must be at least {minimum}, not {value!r}")
    return number


def _seconds(parameter: str, value: Any) -> Any:
    if not isinstance(value, float):
        value = _integer(parameter, value, "a number of seconds")
    if not 0 <= value:  # which is so for NaN, too
        raise ValueError(f"{parameter} must be at least 0 seconds, not {value!r}")
    if value > sys.float_info.max and value != math.inf:
        raise ValueError(f"{parameter} is too long; use math.inf for no end: {value!r}")
    return value


def _some_seconds(parameter: str, value: Any) -> Any:
    seconds = _seconds(parameter, value)
    if not 0 < seconds < math.inf:
        raise ValueError(f"{parameter} must be more than 0 and finite, not {value!r}")
    return seconds


def _check_window(fail_max: float, size: float | None, seconds: float | None) -> None:
    if size is not None and fail_max > size:
        raise ValueError(
            f"fail_max must be at most window_size, or failures are forgotten before "
            f"there are enough: fail_max {fail_max!r}, window_size {size!r}"
        )
    if fail_max == size == math.inf and seconds is None:
        raise ValueError(
            "fail_max and window_size are both infinite, so that failures would be "
            "remembered without end: set window_seconds, too"
        )


def _check_timeouts(reset_timeout: float, longest: float | None) -> None:
    if longest is not None and reset_timeout > longest:
        raise ValueError(
            f"reset_timeout must be at most max_reset_timeout: reset_timeout "
            f"{reset_timeout!r}, max_reset_timeout {longest!r}"
        )


def _counts_in_memory(storage: Any) -> bool:
    """Whether a storage counts by the very methods of `CircuitMemoryStorage`."""
    names = ("counter", "_fail_counter", "increment_counter", "reset_counter")
    return isinstance(storage, CircuitMemoryStorage) and all(
        getattr(type(storage), name) is getattr(CircuitMemoryStorage, name)
        for name in names
    )


def _integer(parameter: str, value: Any, what: str) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{parameter} must be {what}, not {value!r}") from None


def _checked_exclusions(parameter: str, exclusions: Any) -> tuple[Any, ...]:
    if exclusions is None:
        return ()
    if hasattr(type(exclusions), "__float__"):
        raise TypeError(
            f"{parameter} must be an iterable of exception classes and predicates, not "
            f"{exclusions!r}; for a number of trials write "
            f"success_threshold={exclusions!r}"
        )
    if isinstance(exclusions, type) or not _is_iterable(exclusions):
        how = getattr(exclusions, "__name__", "...")
        raise TypeError(
            f"{parameter} must be an iterable of exception classes and predicates, not "
            f"{exclusions!r}; write {parameter}=[{how}]"
        )
    return tuple(_checked_exclusion(parameter, exclusion) for exclusion in exclusions)


def _checked_exclusion(parameter: str, exclusion: Any) -> Any:
    if not callable(exclusion):
        raise TypeError(
            f"{parameter} takes exception classes and predicates that are called with "
            f"the exception, not {exclusion!r}; write {parameter}=[ValueError, ...]"
        )
    return _checked_predicate(parameter, exclusion)


def _checked_predicate(parameter: str, predicate: Any) -> Any:
    if not isinstance(predicate, type) and _lazy_flags(predicate):
        raise TypeError(
            f"{parameter} takes predicates that answer when they are called; what "
            f"{predicate!r} returns would always be true: make it a plain function"
        )
    return predicate


def _checked_listeners(listeners: Any) -> tuple[Any, ...]:
    if listeners is None:
        return ()
    if not _is_iterable(listeners):
        raise TypeError(
            f"listeners must be an iterable of listeners, not {listeners!r}; "
            f"write listeners=[...]"
        )
    return tuple(_checked_listener(listener) for listener in listeners)


def _checked_listener(listener: Any) -> Any:
    if isinstance(listener, type):
        raise TypeError(
            f"listeners takes objects, not the class {listener!r}: call the class"
        )
    methods = [getattr(listener, event, None) for event in _EVENTS]
    if not any(map(callable, methods)):
        raise TypeError(
            f"listeners takes objects with at least one of the methods "
            f"{', '.join(_EVENTS)}; {listener!r} has none"
        )
    for event, method in zip(_EVENTS, methods):
        if _lazy_flags(method) & (_COROUTINE | _ITERABLE_COROUTINE):
            raise TypeError(
                f"listeners takes objects whose methods are plain functions: nothing "
                f"would await what {event} of {listener!r} returns"
            )
    return listener


def _is_iterable(value: Any) -> bool:
    if isinstance(value, (str, bytes)):
        return False
    try:
        iter(value)
    except TypeError:
        return False
    return True


def _without(items: Iterable[Any], item: object, what: str) -> tuple[Any, ...]:
    remaining = list(items)
    same = [i for i, other in enumerate(remaining) if other is item]
    try:
        del remaining[same[0] if same else remaining.index(item)]
    except ValueError:
        raise ValueError(
            f"{item!r} cannot be removed: the breaker has no such {what}"
        ) from None
    return tuple(remaining)


# Shared by the parts above.


def _is_plain(thing: Any) -> bool:
    """Whether the very class of a storage promises that a call may decide without the
    lock. A subclass or a mock may do more, so neither inherits the promise."""
    return bool(vars(type(thing)).get("_is_plain", False))


def _is_method(method: Any, function: Any) -> bool:
    """Whether `method` is the library's `function`, and nothing that a subclass or a
    test has put in its place."""
    return getattr(method, "__func__", None) is function


def _own_hooks(state: Any) -> tuple[str, ...]:
    """Those of the methods in _HOOKS that the user's class of `state` overrides."""
    return tuple(
        hook
        for hook in _HOOKS
        if getattr(type(state), hook, None) is not getattr(CircuitBreakerState, hook)
        or hook in getattr(state, "__dict__", ())
    )


_HOOKS = ("before_call", "on_success", "on_failure", "_handle_success", "_handle_error")
_settings_of = operator.attrgetter(
    "_name",
    "_fail_max",
    "_reset_timeout",
    "_success_threshold",
    "_throw_new_error_on_trip",
    "_exclude",
    "_window_size",
    "_window_seconds",
    "_max_reset_timeout",
    "_include",
    "_ignore",
    "_failure_result",
    "_dry_run",
)
_LOOKED_AT = 4  # old breakers that CircuitBreakers judges for each new one
_NEVER = None, 0.0, math.inf  # the _opening of a circuit that has never been open
_DECADES = 6e8  # seconds
_LONGEST_TEXT = 300  # characters of a reason
_NEW = _Move("", "new", "", failed_trials=0)  # to no state: where no move was made
_PLAIN_CALL = CircuitBreaker.call
_PLAIN_JUDGEMENT = CircuitBreaker.is_system_error

# The storage that makes every call take the lock: in no state, with a failure.
_OPAQUE: Any = CircuitMemoryStorage(STATE_CLOSED)
_OPAQUE._state = "hidden"
_OPAQUE._fail_counter = 1

_UNGUARDED: Any = _Unguarded()

# The admission of calls within a trial, and of those that a dry run does not reject.
_WITHIN = _Admission()

# The trials in whose context the code runs.
_trials: contextvars.ContextVar[tuple[_Trial, ...]] = contextvars.ContextVar(
    "pybreaker_trials", default=()
)

# All breakers that are alive, by id(), as a subclass's need not be hashable.
_breakers: weakref.WeakValueDictionary[int, CircuitBreaker] = (
    weakref.WeakValueDictionary()
)


_registries: weakref.WeakValueDictionary[int, CircuitBreakers] = (
    weakref.WeakValueDictionary()
)


def _after_fork() -> None:
    for breaker in breakers():
        breaker._after_fork()
    for registry in list(_registries.values()):
        registry._lock = threading.RLock()


if hasattr(os, "register_at_fork"):  # Windows has no forks
    os.register_at_fork(after_in_child=_after_fork)
