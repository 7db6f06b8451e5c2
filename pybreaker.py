"""A circuit breaker: calls to something that can fail, refused while it does.

    import pybreaker

    db_breaker = pybreaker.CircuitBreaker(fail_max=5, reset_timeout=60)

    @db_breaker
    def update_customer(customer):
        ...

While calls succeed the circuit is *closed* and stays out of the way. After
``fail_max`` failures in a row it *opens*: calls raise `CircuitBreakerError` at
once and the function is not run. The first call made ``reset_timeout`` seconds
later makes the circuit *half-open* and is its trial: if that succeeds, the
circuit closes, and if it fails, the circuit opens again.

A breaker is made once for each thing that can fail, lives as long as the
program, and is shared by all its threads and tasks.

The pattern is Michael T. Nygard's ("Release It!"). The API is that of Daniel
Fernandes Martins' PyBreaker, for whose releases up to 1.4.1 this module stands
in. It needs nothing but the standard library.
"""

# How it works
#
# A state object is an era: the circuit's stay in one state. Every transition,
# closed to closed included, puts a new object in the place of the old one. A
# call keeps the state that admitted it, and is late if that object is no longer
# the breaker's when the call ends. A late outcome is told and changes nothing.
#
# Each call takes three steps, whichever way it is guarded:
#
#   admit    The lock is held, except where a quiet call sees that it passes or
#            is rejected. Gives an _Admission, or raises CircuitBreakerError.
#   run      The lock is not held: calls never wait for each other.
#   settle   The lock is held, except for a success that changes nothing.
#
# The trial is the one call that a half-open circuit admits. It takes the place
# under the lock, asks the storage for leave without the lock, as that may take
# time, and begins under the lock again. It gives the place back however it
# ends, and loses the place to another call when it is overdue. Calls in the
# trial's context belong to it: they run, and decide nothing.
#
# open(), half_open() and close() are the only ways to another era, for operators
# and for the states alike, because subclasses override them. A _Move says why
# the circuit moves. What the states decide differently, they answer themselves
# (_wait, _count_failure, _succeeded, _failed); nobody asks which state it is.
#
# A quiet call is one that the storage alone decides, because no listener hears
# of it and the state and the storage are the library's own. _Admission holds
# what such a call may look at. _find_admission works that out when an era
# begins and when listeners, storage or settings change.
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
from datetime import timedelta as timedelta  # for code that imports it from here

TYPE_CHECKING = False  # importing typing would take longer than all the rest
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

# Names that code for older releases imports from here.
UTC = timezone.utc
HAS_TORNADO_SUPPORT = True  # coroutines of Tornado are guarded like all others

# The three phrases that code in the field compares errors with.
_REJECTED = "Timeout not elapsed yet, circuit breaker still open"
_TRIPPED = "Failures threshold reached, circuit breaker opened"
_TRIAL_FAILED = "Trial call failed, circuit breaker opened"

_FOUND = "found so in the storage"
_NOTHING: Any = object()  # the result of a call that has none

# How a guarded call can end.
_SUCCESS, _FAILURE, _ABANDONED = "success", "failure", "abandoned"

logger = logging.getLogger("pybreaker")
logger.addHandler(logging.NullHandler())  # quiet, unless logging is configured


class CircuitBreakerError(Exception):
    """The call was rejected, or its failure opened the circuit.

    In the second case ``__cause__`` is what the function raised. ``args`` holds
    one phrase that says which of these happened; the text adds the breaker's
    name, the reason and the time. The breaker is left behind when the error is
    pickled; the text stays the same.
    """

    breaker: CircuitBreaker | None = None
    """The breaker that raised the error."""

    retry_after: float = 0.0
    """Seconds until a call may be admitted, as known when the error was
    raised; `math.inf` where the circuit has to be moved by hand."""

    reason: str = ""
    """Why the circuit opened, in words."""

    _hint: str = ""  # what else an operator should know
    _name: str | None = None  # the breaker's, where the breaker was left behind

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
    """What texts call the breaker."""
    return None if breaker is None else breaker._name or "unnamed breaker"


class FailedResult(Exception):
    """What a listener is told where `failure_result` made a call that returned
    `result` a failure. It is never raised."""

    def __init__(self, result: object) -> None:
        super().__init__(result)
        self.result: object = result


class _Watched:
    """An attribute of a breaker that code outside the library may write: the
    breaker then works out anew what calls may decide without the lock."""

    def __init__(self, attribute: str) -> None:
        self._attribute = attribute

    def __get__(self, breaker: Any, owner: Any) -> Any:
        if breaker is None:  # the class was asked
            return self
        return getattr(breaker, self._attribute)

    def __set__(self, breaker: Any, value: Any) -> None:
        with breaker._lock:
            setattr(breaker, self._attribute, value)
            breaker._find_admission()

    def __delete__(self, breaker: Any) -> None:
        # mock.patch deletes the attribute before it puts the old value back.
        delattr(breaker, self._attribute)


class _WatchedState(_Watched):
    """The same for the state, where an asynchronous subclass finds its coroutine."""

    def __get__(self, breaker: Any, owner: Any) -> Any:
        state = super().__get__(breaker, owner)
        return getattr(state, "__dict__", {}).get("_made", state)


class _WatchedList(_Watched):
    """The same for a tuple, which code outside the library finds as a list and
    may change in place. As the breaker does not hear of such a change, it then
    looks at the list each time, until it is given another tuple."""

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
    """Let a method of a breaker or a state hand on, when it has released the
    lock, the log records that were made meanwhile."""

    @functools.wraps(method)
    def logged(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, *args, **kwargs)
        finally:
            getattr(self, "_breaker", self)._hand_on_records()

    return logged


class CircuitBreaker:
    """Guards calls to one thing that can fail.

    Failures in a row open the circuit when there are `fail_max` of them (a
    whole number from 1; `math.inf` for a breaker that only observes). An open
    circuit waits `reset_timeout` seconds for its trial (a number from 0;
    `math.inf` to stay open until it is moved by hand). `success_threshold`
    trials have to succeed to close it (a whole number from 1).

    `exclude` is an iterable of what is not a failure: classes, which match by
    `isinstance`, and predicates, which are called with the exception.
    `listeners` is an iterable of objects with methods of
    `CircuitBreakerListener`. `state_storage` is a `CircuitBreakerStorage`; by
    default the state is kept in memory. `name` is for messages and listeners.
    `throw_new_error_on_trip` says what the failure that opens the circuit
    raises: `CircuitBreakerError`, or if False what the function raised.

    The other settings, which are off unless they are given, are properties
    with the same names, and are explained there.

    An argument of the wrong kind is a `TypeError`, one out of range a
    `ValueError`; so it is in every setter, and a setter that refuses changes
    nothing.

    All of it may be used from any thread and from any number of tasks. The
    lock guards transitions, counters and the telling of listeners; the guarded
    call runs outside it.
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

    _factor: tuple[Any, float] = (None, 1.0)  # the last opening's
    _as_made: tuple[Any, ...] | None = None  # the settings, if CircuitBreakers made it
    _due: _Move | None = None  # the move that the library is about to make
    _trial: _Trial | None = None  # the one that holds the place
    _records: tuple[Any, ...] = ()  # for the log, made under the lock

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
        # What is not given stays as the class has it, so that a breaker is small.
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

    # A breaker is one shared thing, as a function is.

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
        generator function; it stays what it is. Of a `staticmethod` or
        `classmethod` object the function inside is guarded.

        `TypeError` if it is not callable. ``@breaker()`` and, for a function
        that returns something to await,
        ``@breaker(__pybreaker_call_async=True)`` are older spellings.
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
            # A subclass's own call() sees these calls too, and guards them.
            through = self.call_async if call_async else self.call
            guarded = guard(_UNGUARDED, functools.partial(through, func))
        else:
            guarded = guard(self, func)
        try:
            return functools.update_wrapper(guarded, func)
        except TypeError:  # its name is no string, as an object can have any
            return functools.update_wrapper(guarded, func, assigned=())

    def _has_own_call(self) -> bool:
        return getattr(self.call, "__func__", None) is not _PLAIN_CALL

    def call(self, func: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Call `func` with the other arguments and return what it returns.

        Raises `CircuitBreakerError` without calling it where the circuit does
        not admit the call, and from its exception where that opens the circuit;
        else what `func` raises. If `func` makes a coroutine, a generator or an
        async generator, that is what is guarded, from its first step to its end.
        """
        try:
            may_be_lazy = func.__code__.co_flags & _LAZY_FLAGS
        except (AttributeError, TypeError):
            may_be_lazy = True
        if may_be_lazy:
            guard = _guard_for(func)
            if guard is not _guard_function:
                guarded = _called_like(guard(self, func), func)
                lazy: _T = guarded(*args, **kwargs)
                return lazy
        # From here on a copy of _guard_function: to make and call a guard here
        # takes twice as long.
        admission = self._admission
        if admission.passes._state != STATE_CLOSED:
            admission = self._admit(func, args, kwargs)
        try:
            result = func(*args, **kwargs)
        except BaseException as exc:
            self._settle(admission, exc)
            raise
        try:
            if type(result) in _CODES_OF_RESULTS:
                rest: _T = _guard_result(self, result, admission)
                return rest
        except TypeError:
            pass  # a class that cannot be hashed is none of these
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
        """Call `func`, await what it returns if that can be awaited, and return
        the result. Admitted when awaited; raises as `call` does."""
        return await _guard_coroutine(self, func)(*args, **kwargs)

    def calling(self) -> _Block:
        """A context manager, for ``with`` and ``async with``, that guards one
        block. It may span ``await`` and ``yield``, and be entered and left in
        different threads. Entering and leaving raise as `call` does. In a
        subclass that overrides `call`, the block goes through that method."""
        return _Block(self)

    # Steering: any time, from any thread, effective at once.

    def open(self, seconds: float | None = None, reason: str | None = None) -> bool:
        """Open the circuit: calls are rejected for `reset_timeout` seconds, or
        for `seconds` (a number from 0; `math.inf` until the circuit is moved by
        hand), whatever `reset_timeout` becomes. `reason` takes the place of "by
        hand" in what is shown and logged.

        An open circuit starts its timeout again. Returns whether a failure that
        opened the circuit should raise `CircuitBreakerError`: never in a dry run.
        """
        self._move_to(STATE_OPEN, seconds, reason)
        return self._throw_new_error_on_trip and not self._dry_run

    def half_open(self, reason: str | None = None) -> None:
        """Half-open the circuit: the next call is a trial. `reason` as in `open`."""
        self._move_to(STATE_HALF_OPEN, None, reason)

    def close(self, reason: str | None = None) -> None:
        """Close the circuit: calls pass, and failures are counted from 0.
        `reason` as in `open`."""
        self._move_to(STATE_CLOSED, None, reason)

    @property
    def state(self) -> CircuitBreakerState:
        """The state, after a look at the storage. Set it to ``'closed'``,
        ``'open'`` or ``'half-open'`` to move the circuit."""
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
        """Failures in a row, or in the window, that open the circuit. Lowering it
        below the present count opens nothing: the next failure does."""
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
        counted calls open the circuit, and a success forgets no failure by itself.
        None (the default): a success forgets all failures.

        `ValueError` with a storage that is no `CircuitMemoryStorage`.
        """
        return self._window_size

    @window_size.setter
    def window_size(self, size: float | None) -> None:
        if size is not None:
            size = _whole_number("window_size", size, 1, math.inf)
        self._set_window("window_size", size, self._window_seconds)

    @property
    def window_seconds(self) -> float | None:
        """How many seconds a failure is remembered for, by the monotonic clock; more
        than 0. None (the default): until a success. With `window_size` too, a failure
        is forgotten by whichever comes first.

        `ValueError` with a storage that is no `CircuitMemoryStorage`.
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
        with self._lock:
            if (size, seconds) != (None, None) and not _counts_in_memory(self._storage):
                raise ValueError(
                    f"{parameter} needs a CircuitMemoryStorage that counts as the "
                    f"library's does, not {self._storage!r}"
                )
            _check_window(self._fail_max, size, seconds)
            was_on = self._has_window()
            if was_on:
                self._era._end()  # what the old window has forgotten stays forgotten
            is_on = (size, seconds) != (None, None)
            if is_on and not was_on:
                # The failures have marks before calls draw numbers in the window.
                self._era._change_window(was_on, is_on)
            self._window_size, self._window_seconds = size, seconds
            self._era._change_window(True, is_on)

    def _has_window(self) -> bool:
        return self._window_size is not None or self._window_seconds is not None

    @property
    def reset_timeout(self) -> float:
        """Seconds from the opening to the trial, and that a trial may hold its
        place. A change holds for a circuit that is already open."""
        return self._reset_timeout

    @reset_timeout.setter
    def reset_timeout(self, reset_timeout: float) -> None:
        reset_timeout = _seconds("reset_timeout", reset_timeout)
        with self._lock:
            _check_timeouts(reset_timeout, self._max_reset_timeout)
            self._reset_timeout = reset_timeout

    @property
    def max_reset_timeout(self) -> float | None:
        """Seconds up to which each failed trial doubles `reset_timeout`, at least
        that; `math.inf` for no end. An opening is then also up to a tenth shorter,
        by chance, so that processes do not come back in step. None (the default):
        all openings last `reset_timeout`."""
        return self._max_reset_timeout

    @max_reset_timeout.setter
    def max_reset_timeout(self, longest: float | None) -> None:
        if longest is not None:
            longest = _seconds("max_reset_timeout", longest)
        with self._lock:
            _check_timeouts(self._reset_timeout, longest)
            self._max_reset_timeout = longest

    def _grown_timeout(self, failed_trials: int) -> float:
        """`reset_timeout`, doubled by each trial that has failed."""
        longest = self._max_reset_timeout
        if longest is None:
            return self._reset_timeout
        try:
            grown = math.ldexp(self._reset_timeout, failed_trials)
        except OverflowError:
            return longest
        return min(grown, longest)

    @property
    def success_threshold(self) -> float:
        """Successful trials that close the circuit."""
        return self._success_threshold

    @success_threshold.setter
    def success_threshold(self, success_threshold: float) -> None:
        self._success_threshold = _whole_number(
            "success_threshold", success_threshold, 1
        )

    @property
    def throw_new_error_on_trip(self) -> bool:
        """Whether the failure that opens the circuit raises
        `CircuitBreakerError`, or what the function raised."""
        return self._throw_new_error_on_trip

    @throw_new_error_on_trip.setter
    def throw_new_error_on_trip(self, throw: bool) -> None:
        self._throw_new_error_on_trip: bool = _true_or_false(
            "throw_new_error_on_trip", throw
        )

    @property
    def failure_result(self) -> _Exclusion | None:
        """A predicate, or a class: a call whose result matches is a failure, though
        its caller gets the result. Listeners are told a `FailedResult`. Asked without
        the lock, once for each call that returns; of coroutines about the awaited
        result, of generators and blocks not at all. None (the default): no result is a
        failure."""
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
        """Whether nothing is refused: a call that would be rejected is told as
        ``rejected``, runs, and decides nothing; the failure that opens the circuit
        raises what the function raised. Switching it off enforces at once."""
        return self._dry_run

    @dry_run.setter
    def dry_run(self, dry_run: bool) -> None:
        self._set("_dry_run", _true_or_false("dry_run", dry_run))

    def _set(self, attribute: str, value: Any) -> None:
        """Change a setting that each call is asked about."""
        with self._lock:
            setattr(self, attribute, value)
            self._find_admission()

    @property
    def fail_counter(self) -> int:
        """The failures that are remembered: in a row, or in the window. Setting it
        opens nothing by itself; with a window it makes so many failures that were
        counted just now, at most `fail_max`. Reading takes no lock."""
        if self._window_seconds is None:
            return self._storage.counter
        return self._era._remembered()

    @fail_counter.setter
    def fail_counter(self, value: float) -> None:
        count: int = _whole_number("fail_counter", value, 0)
        with self._lock:
            storage: Any = self._storage  # its counter may be settable
            if self._has_window() and count > self._fail_max:
                raise ValueError(
                    f"fail_counter must be at most fail_max, {self._fail_max}, "
                    f"with a window, not {count!r}"
                )
            try:
                storage.counter = count
            except AttributeError:  # this storage can only count
                if count > self._fail_max:
                    raise ValueError(
                        f"fail_counter must be at most fail_max, {self._fail_max}, "
                        f"on this storage, not {count!r}"
                    ) from None
                storage.reset_counter()
                for _ in range(count):
                    storage.increment_counter()
            if self._has_window():
                self._era._change_window(was_on=False, is_on=True)

    @property
    def name(self) -> str | None:
        """What messages call the breaker."""
        return self._name

    @name.setter
    def name(self, name: str | None) -> None:
        if name is not None and not isinstance(name, str):
            raise TypeError(f"name must be a string or None, not {name!r}")
        self._name = name

    # Watching: any time, from any thread.

    @property
    def current_state(self) -> str:
        """The state's name: ``'closed'``, ``'open'`` or ``'half-open'``. An open
        circuit whose timeout has passed stays open until the next call."""
        return self._storage.state

    @property
    def success_counter(self) -> int:
        """Successful trials since the circuit was opened or moved by hand."""
        return self._storage.success_counter

    @property
    def retry_after(self) -> float:
        """Seconds until a call may be admitted, 0.0 where one may now. While a
        trial runs, until it would lose its place. It can be `math.inf`."""
        with self._lock:
            return self._shown_state()._wait()

    def snapshot(self) -> dict[str, Any]:
        """All there is to know, taken at one moment, as a dict for `json.dumps`.

        Times are in seconds; ``opened_at`` is the last opening, in UTC by ISO
        8601, or None. `math.inf` is None, as JSON has no word for it; where None
        means that a setting is off, it is ``"inf"``.
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
        """The listeners, in the order in which they are told."""
        return tuple(self._told)

    def add_listener(self, listener: object) -> None:
        """Add a listener. `TypeError` if it has none of a listener's methods."""
        self.add_listeners(listener)

    def add_listeners(self, *listeners: object) -> None:
        """Add all these listeners, or none of them: see `add_listener`."""
        added = [_checked_listener(listener) for listener in listeners]
        with self._lock:
            self._listeners = (*self._told, *added)

    def remove_listener(self, listener: object) -> None:
        """Remove a listener. `ValueError` if it is not there."""
        with self._lock:
            self._listeners = _without(self._told, listener, "listener")

    @property
    def excluded_exceptions(self) -> tuple[_Exclusion, ...]:
        """The classes and predicates that say what is not a failure."""
        return tuple(self._exclude)

    @property
    def exclude(self) -> tuple[_Exclusion, ...]:
        """The same; an iterable or None can be assigned."""
        return tuple(self._exclude)

    @exclude.setter
    def exclude(self, exclude: Iterable[_Exclusion] | None) -> None:
        self._excluded_exceptions = _checked_exclusions("exclude", exclude)

    @property
    def include(self) -> tuple[_Exclusion, ...]:
        """Classes and predicates: if there are any, an exception that none of them
        matches is no failure but a success. `exclude` comes before."""
        return self._include

    @include.setter
    def include(self, include: Iterable[_Exclusion] | None) -> None:
        self._set("_include", _checked_exclusions("include", include))

    @property
    def ignore(self) -> tuple[_Exclusion, ...]:
        """Classes and predicates: an exception that one of them matches says nothing,
        so that the call is abandoned. `ignore` comes before `exclude`."""
        return self._ignore

    @ignore.setter
    def ignore(self, ignore: Iterable[_Exclusion] | None) -> None:
        self._set("_ignore", _checked_exclusions("ignore", ignore))

    def add_excluded_exception(self, exception: _Exclusion) -> None:
        """Add a class or a predicate. `TypeError` if it is neither."""
        self.add_excluded_exceptions(exception)

    def add_excluded_exceptions(self, *exceptions: _Exclusion) -> None:
        """Add all of these, or none: see `add_excluded_exception`."""
        added = [_checked_exclusion("exclude", exception) for exception in exceptions]
        with self._lock:
            self._excluded_exceptions = (*self._exclude, *added)

    def remove_excluded_exception(self, exception: _Exclusion) -> None:
        """Remove a class or a predicate. `ValueError` if it is not there."""
        with self._lock:
            remaining = _without(self._exclude, exception, "exclusion")
            self._excluded_exceptions = remaining

    def is_system_error(self, exception: BaseException) -> bool:
        """Whether the exception counts as a failure by `exclude` and `include`. An
        exception group does if an exception in it does.

        Called outside the lock, and not for what abandons a call, such as
        `KeyboardInterrupt`. A subclass may decide otherwise.
        """
        return self._judge_by_kind(exception, ()) is _FAILURE

    # What an exception says. The lock is not held: predicates are strangers' code.

    def _judge(self, exc: BaseException) -> str:
        """The outcome of a call that raised `exc`."""
        if isinstance(exc, FailedResult):
            return _FAILURE
        if _is_abandonment(exc):
            return _ABANDONED
        if not self._has_own_judgement():
            return self._judge_by_kind(exc, self._ignore)
        if self._is_ignored(exc):
            return _ABANDONED
        return _FAILURE if self.is_system_error(exc) else _SUCCESS

    def _judge_by_kind(self, exc: BaseException, ignore: tuple[Any, ...]) -> str:
        if self._matches(ignore, exc):
            return _ABANDONED
        if self._matches(self._exclude, exc):
            return _SUCCESS
        leaves = _leaves_of(exc)
        if leaves:
            outcomes = [
                _ABANDONED
                if _is_abandonment(leaf)
                else self._judge_by_kind(leaf, self._ignore)
                for leaf in leaves
            ]
            order = (_FAILURE, _SUCCESS, _ABANDONED)
            return next(outcome for outcome in order if outcome in outcomes)
        if self._include and not self._matches(self._include, exc):
            return _SUCCESS
        return _FAILURE

    def _is_ignored(self, exc: BaseException) -> bool:
        """Whether `ignore` matches the exception, or all that is in a group of them."""
        leaves = _leaves_of(exc)
        return self._matches(self._ignore, exc) or (
            len(leaves) > 0
            and all(_is_abandonment(each) or self._is_ignored(each) for each in leaves)
        )

    def _has_own_judgement(self) -> bool:
        judge = getattr(self.is_system_error, "__func__", None)
        return judge is not CircuitBreaker.is_system_error

    def _matches(self, kinds: Any, told: object) -> bool:
        """Whether a class or a predicate matches an exception or a result."""
        for kind in tuple(kinds):  # a predicate may change a list
            try:
                if isinstance(told, kind) if isinstance(kind, type) else kind(told):
                    return True
            except Exception as error:
                with self._lock:
                    message = "%r could not judge an exception or a result"
                    self._log(logging.ERROR, message, kind, exc_info=error)
                self._hand_on_records()
        return False

    # Admission: may this call run, and is it a trial?

    def _admit(self, func: Any, args: Any, kwargs: Any) -> _Admission:
        """Let a call in, or raise `CircuitBreakerError`."""
        admission = self._admission
        if admission.passes._state == STATE_CLOSED:
            return admission
        state = admission.state
        seen = admission.rejects
        if seen._state == state.name and seen.last_move() is state._known_move:
            # A rejection that no listener hears changes nothing and takes no lock.
            wait = state._wait()
            if wait and not (self._trial and self._is_within_trial()):
                raise self._error(state._move, wait, state._hint)
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
                return begun  # else the circuit has moved meanwhile

    async def _admit_async(self, func: Any, args: Any, kwargs: Any) -> _Admission:
        """The same, while other tasks may run."""
        admission = self._admission
        if admission.passes._state == STATE_CLOSED:
            return admission
        state = admission.state
        seen = admission.rejects
        if seen._state == state.name and seen.last_move() is state._known_move:
            wait = state._wait()
            if wait and not (self._trial and self._is_within_trial()):
                raise self._error(state._move, wait, state._hint)
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
        """Decide on a call: let it in, give it the place, or raise
        `CircuitBreakerError`. A trial has taken the place when this returns, but
        begins only when the storage has granted it."""
        trial = None
        try:
            with self._lock:
                if self._storage.state != self._era.name or not self._era._admits_all:
                    self._look()
                is_refused = "before_call" in self._hooks and self._is_refused_by_gate(
                    func, args, kwargs
                )
                admission, state = self._admission, self._era
                if is_refused:
                    admission = _WITHIN
                elif not state._admits_all:
                    wait = state._wait()
                    # A trial that has held the place too long may be hanging, so
                    # it loses it to a call in its own context as well; but a
                    # timeout of 0 is too short to say so of a trial.
                    if self._is_within_trial() and (wait or not self._reset_timeout):
                        admission = _WITHIN
                    elif wait:
                        self._tell("rejected", (self, func, *args), kwargs)
                        if not self._dry_run:
                            raise self._error(state._move, wait, state._hint)
                        admission = _WITHIN
                    else:
                        trial = self._take_place()
                        return _Admission(None, trial)
                self._tell("before_call", (self, func, *args), kwargs)
                return admission
        finally:
            # An interrupted handler must not cost a trial its place, so what a
            # trial's admission has to log, _begin_trial hands on.
            if self._records and trial is None:
                self._hand_on_records()

    def _is_refused_by_gate(self, func: Any, args: Any, kwargs: Any) -> bool:
        """Ask the gate of a state of the user's own, which raises where it refuses. In
        a dry run the call is let in all the same. Lock held."""
        try:
            self._era.before_call(func, *args, **kwargs)
        except CircuitBreakerError:
            self._tell("rejected", (self, func, *args), kwargs)
            if not self._dry_run:
                raise
            return True
        return False

    def _begin_trial(
        self, trial: _Trial, granted: bool, func: Any, args: Any, kwargs: Any
    ) -> _Admission | None:
        """Begin a trial when the storage has answered, or raise
        `CircuitBreakerError` if the storage has refused it. None means that the
        circuit has moved on, so that admission starts again."""
        try:
            with self._lock:
                holder = self._trial
                if granted and holder:
                    holder.claimed = True  # even if another call has the place now
                elif granted:
                    self._storage.release_trial()
                self._look()
                if self._trial is not trial:
                    return None
                trial.begun = granted
                is_let_in = granted and self._era._start_trial()
                if self._trial is not trial:  # a listener moved the circuit
                    return None
                admission = _Admission(self._era, trial)
                if not is_let_in:
                    move = self._era._move  # before a listener makes another
                    self._tell("rejected", (self, func, *args), kwargs)
                    if not self._dry_run:
                        hint = "" if granted else "another breaker runs the trial"
                        raise self._error(move, 0.0, hint)
                    self._vacate(trial)
                    admission = _WITHIN
                self._tell("before_call", (self, func, *args), kwargs)
                return admission
        finally:
            self._hand_on_records()

    def _factor_of(self, opening: Any) -> float:
        """A factor between 0.9 and 1, by chance and the same for the whole opening."""
        if self._factor[0] is not opening:
            from random import uniform  # which takes long to load

            self._factor = opening, uniform(0.9, 1.0)
        return self._factor[1]

    def _longest_trial(self) -> float:
        """Seconds for which a trial may hold its place."""
        return self._grown_timeout(self._era._move.failed_trials)

    def _take_place(self) -> _Trial:
        """Give the place to the call that asks. Lock held."""
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
        return left if held >= 0.0 < left else 0.0  # a clock that went back is another

    def _is_within_trial(self) -> bool:
        """Whether the code that asks runs in the trial's context."""
        trial = self._trial
        return trial is not None and trial.begun and trial in _trials.get()

    def _vacate(self, trial: _Trial) -> None:
        """End a trial: it gives the place back, if it still has it."""
        trial.over = True  # so that the next trial in this context forgets it
        with self._lock:
            if self._trial is trial:
                self._trial = None
                if trial.claimed:
                    self._storage.release_trial()

    def _error(
        self, move: _Move, wait: float, hint: str, phrase: str = _REJECTED
    ) -> CircuitBreakerError:
        """An error that says why the circuit opened, in an era that `move` began."""
        error = CircuitBreakerError(phrase)
        # One dictionary is made in half the time that four assignments take.
        error.__dict__ = {
            "breaker": self,
            "retry_after": wait,
            "reason": move.why_opened or move.reason,
            "_hint": hint,
        }
        return error

    # Settlement: what does the outcome change?

    def _settle(
        self,
        admission: _Admission,
        exc: BaseException | None = None,
        result: object = _NOTHING,
        by: str = "",
    ) -> None:
        """Take in how a call ended that was admitted: with `exc`, which it raised, or
        with `result`. Raises what is to be raised instead of `exc`, if a failure
        opens the circuit.

        Late outcomes, and those of calls within a trial, are told and change
        nothing. A state of the user's own is asked first, unless this was called
        `by` that state's method.
        """
        state, number = admission.state, 0
        error: Any = None
        told: Any = exc  # what listeners are told; what may be raised is exc
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
                        self._tell("abandoned", (self,))
                return
            if outcome is _SUCCESS:
                seen = admission.settles
                if not seen._fail_counter:
                    return  # a success that changes nothing takes no lock
                if self._window_size is not None and seen is not _OPAQUE:
                    number = state._draw_number()
                    if not state._forgets(number):
                        return
            with self._lock:
                if self._storage.state != self._era.name:
                    self._look()
                hooks = self._hooks
                if hooks and self._ask_own_state(state, outcome, told, exc, by):
                    pass
                elif outcome is _SUCCESS:
                    if state is self._era:
                        state._count_success(number)
                        if "on_success" in hooks:
                            state.on_success()
                        else:
                            state._succeeded()
                    self._tell("success", (self,))
                else:
                    if state is self._era:
                        state._count_failure()
                    if self._hearers["failure"]:
                        self._tell("failure", (self, told))
                    if state is not self._era:
                        pass  # the outcome is late, or a listener has moved the circuit
                    elif "on_failure" in hooks:
                        self._ask(state.on_failure, told, exc)
                    else:
                        error = state._failed(told)
            if error is not None and exc is not None:
                _raise(error, exc)
        finally:
            # Or error, its traceback, this frame and error are a cycle.
            exc = told = error = None
            if admission.trial is not None:
                self._vacate(admission.trial)
            if self._records:
                self._hand_on_records()

    def _ask_own_state(
        self, state: Any, outcome: str, told: Any, exc: Any, by: str
    ) -> bool:
        """Let a state of the user's own settle, if that overrides what settles, and say
        whether it did. Lock held."""
        if state is not self._era:
            return False
        if told is not None and "_handle_error" in self._hooks and not by:
            self._ask(state._handle_error, told, exc, reraise=False)
            return True
        if outcome is _SUCCESS and "_handle_success" in self._hooks:
            if by != "_handle_success":
                state._handle_success()
                return True
        return False

    def _ask(self, method: Any, told: Any, exc: Any, **options: Any) -> None:
        """Ask a method of a state of the user's own about a failure. It may raise, but
        a call that failed by its result returns that all the same. Lock held."""
        try:
            method(told, **options)
        except (CircuitBreakerError, FailedResult):
            if exc is not None:
                raise
            told.__traceback__ = None  # or told, that and its frames are a cycle
        finally:
            del told, exc  # for the same reason

    def _inc_counter(self) -> None:
        """Count a failure. Lock held. Code in the field overrides this."""
        self._storage.increment_counter()

    # Moves. The lock is held in all but _move_to and _present_state.

    @_logging
    def _move_to(self, name: str, seconds: float | None, reason: str | None) -> None:
        """Move the circuit, as the library was about to, or else by hand."""
        if seconds is not None:
            seconds = _seconds("seconds", seconds)
        reason = _checked_reason(reason)
        with self._lock:
            move, self._due = self._due, None
            if move is None or move.state != name:
                move = _Move(name, "by hand", "hand")
            move.seconds = seconds
            move.reason = reason or move.reason
            move.fail_max = self._fail_max
            move.follow(self._era._move)
            if self._has_window():
                self._era._end()
            if name == STATE_CLOSED:
                self._storage.reset_counter()
            if move.by != "trial":
                self._storage.reset_success_counter()
            self._storage.move(move)
            self._begin_era(move)

    def _carry_out(self, move: _Move, method: Callable[[], _T]) -> _T:
        """Make a move that nobody makes by hand, by the method for it, as a
        subclass may have its own."""
        self._due = move
        try:
            return method()
        finally:
            self._due = None  # if the subclass has not moved at all

    @_logging
    def _present_state(self) -> CircuitBreakerState:
        with self._lock:
            self._look()
            return self._era

    def _look(self) -> None:
        """Follow the storage, if something else has moved it."""
        move = self._found_move()
        if move is not None:
            self._begin_era(move)

    def _shown_state(self) -> CircuitBreakerState:
        """The state as the storage has it. Listeners are not told of a look."""
        move = self._found_move()
        return self._era if move is None else self._make_state(move)

    def _found_move(self) -> _Move | None:
        """The move that something else has made in the storage since this era began,
        or None. The storage may know more of it than the new state's name."""
        state, known, era = self._storage.state, self._storage.last_move(), self._era
        if known is era._known_move or (known is not None and known.state != state):
            known = None  # what the storage knows is older than the move
        if state == era.name and (known is None or not era._differs_from(known)):
            return None
        return _Move.found(state, known).follow(era._move)

    def _begin_era(self, move: _Move) -> None:
        """Put a new state in the place of the old one, and tell of it."""
        old, trial = self._era, self._trial
        new = self._make_state(move, prev_state=old, notify=True)
        if move.by == "found":
            new._was_found()
        # A storage that fails here will be found moved at the next look.
        count = self._storage.counter
        self._era = new
        self._find_admission()
        try:
            # variant: overtaken trial
            if trial is not None and not (move.by == "trial" and trial.begun):
                self._vacate(trial)
        finally:  # the circuit has moved even if the storage fails to take a claim back
            level = logging.WARNING if move.state == STATE_OPEN else logging.INFO
            if logger.isEnabledFor(level):
                message = "%s: %s, was %s: %s (fail_counter %s, reset_timeout %s s)"
                title = repr(self._name) if self._name else "unnamed breaker"
                what = title, new, old, move.reason, count, self._reset_timeout
                self._log(level, message, *map(str, what))
            self._tell("state_change", (self, old, new))

    def _make_state(self, move: _Move, **options: Any) -> CircuitBreakerState:
        made = state = self._create_new_state(move.state, **options)
        if not hasattr(made, "_admits_all"):
            # An asynchronous subclass finds its coroutine in `_state`, awaits the
            # coroutine and writes the state there. A state of the library's stands in
            # until then.
            state = CircuitBreaker._create_new_state(self, move.state)
            state._made = made
        state.name, state._move = move.state, move  # a mock in its place has none
        state._known_move = self._storage.last_move()
        return state

    def _create_new_state(
        self,
        new_state: str,
        prev_state: CircuitBreakerState | None = None,
        notify: bool = False,
    ) -> CircuitBreakerState:
        # By the names that the module has for them now: tests replace these.
        classes: dict[str, Any] = {
            STATE_CLOSED: CircuitClosedState,
            STATE_OPEN: CircuitOpenState,
            STATE_HALF_OPEN: CircuitHalfOpenState,
        }
        cls = classes[_checked_state("state", new_state)]
        state: CircuitBreakerState = cls(self, prev_state=prev_state, notify=notify)
        return state

    def _find_admission(self) -> None:
        """Work out what the present era asks of each call: who is told of what,
        and what a call may decide without the lock. Lock held."""
        state, storage = self._era, self._storage
        self._judges = (
            self._exclude != ()  # a list, too, which may be changed in place
            or self._include != ()
            or self._ignore != ()
            or self._has_own_judgement()
        )
        self._hooks = _own_hooks(state)
        self._hearers: Any = (
            _hearers_of(self._told)
            if isinstance(self._told, tuple)
            else _HearersInList(self._told)
        )
        is_quiet = _is_plain(state) and _is_plain(storage) and type(self._told) is tuple
        seen = storage if is_quiet else _OPAQUE
        if getattr(state, "_known_move", None) is _NOTHING:  # of the user's own
            state._known_move = storage.last_move()
        passes = returns = settles = rejects = _OPAQUE
        if not getattr(state, "_admits_all", False):
            if not self._hearers["rejected"] and not self._dry_run:
                rejects = seen
        else:
            passes = _OPAQUE if self._hearers["before_call"] else seen
            settles = _OPAQUE if self._hearers["success"] else seen
            returns = settles if self._failure_result is None else _OPAQUE
        # Calls that are under way settle under the lock: thread A is admitted,
        # thread B moves the circuit, A ends and must find that it is late.
        # variant: quiet calls
        self._admission.returns = self._admission.settles = _OPAQUE
        self._admission = _Admission(state, None, passes, returns, settles, rejects)

    # Telling and logging. The lock is held in all but _hand_on_records.

    def _tell(self, event: str, args: Any, kwargs: Any = None) -> None:
        for hear in self._hearers[event]:
            try:
                if kwargs:
                    hear(*args, **kwargs)
                else:
                    hear(*args)
            except Exception as exc:
                listener = getattr(hear, "__self__", hear)
                message = "%r failed to hear of %s"
                self._log(logging.ERROR, message, listener, event, exc_info=exc)

    def _log(self, *args: Any, **kwargs: Any) -> None:
        # A handler has locks of its own. Thread A, which holds one of them, may be
        # about to ask for this breaker's lock, to format the breaker; thread B must
        # not hold that lock and ask for the handler's.
        self._records = (*self._records, (args, kwargs))

    def _hand_on_records(self) -> None:
        """Log what was recorded under the lock, if this thread has released it."""
        if not self._records:
            return
        is_owned = getattr(self._lock, "_is_owned", None)  # threading.Condition's way
        if is_owned is None or not is_owned():
            with self._lock:
                records, self._records = self._records, ()
            for args, kwargs in records:
                try:
                    logger.log(*args, **kwargs)
                except Exception:
                    continue  # a broken filter or handler is not the caller's

    def _settings(self) -> tuple[Any, ...]:
        """What an operator may have changed since the breaker was made."""
        return tuple(getattr(self, name) for name in _SETTINGS)

    def _is_dispensable(self) -> bool:
        """Whether the breaker is as good as the new one that it was, or open and due
        for a trial. A look never waits: a breaker whose lock is held is neither."""
        if not self._lock.acquire(blocking=False):
            return False
        try:
            state = self._shown_state()
            if state._admits_all:
                return not self.fail_counter and self._settings() == self._as_made
            return state.name == STATE_OPEN and not (self._trial or state._wait())
        finally:
            self._lock.release()

    def _after_fork(self) -> None:
        # A thread that held the lock, ran the trial or moved the circuit stayed
        # with the parent, which logs what was recorded.
        self._lock = threading.RLock()
        self._trial = self._due = None
        self._factor = None, 1.0
        self._records = ()


class CircuitBreakerState:
    """One era of a circuit: from one transition to the next.

    A call remembers the state that admitted it, and its outcome counts only
    while that very object is the breaker's state.

    `before_call`, `on_success` and `on_failure` are for code that drives a
    circuit by hand; older releases left no other way to guard a coroutine. A
    subclass that overrides one of these, `_handle_success` or `_handle_error` is
    asked by every guarded call.
    """

    _admits_all = False
    _made: Any  # the coroutine that a state stands in for
    _hint = ""  # what a rejected call is told beside the reason

    def __init__(self, cb: CircuitBreaker, name: str) -> None:
        self._breaker: CircuitBreaker = cb
        self.name: str = name

        self._move = _NEW  # the move that began this era
        self._known_move: Any = _NOTHING  # what the storage knew then

    @property
    def reason(self) -> str:
        """Why the era began, in words: ``'by hand'``, or what happened."""
        return self._move.reason

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}>"

    def call(self, func: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """The same as `CircuitBreaker.call`."""
        return _PLAIN_CALL(self._breaker, func, *args, **kwargs)

    async def call_async(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        """The same as `CircuitBreaker.call_async`."""
        return await CircuitBreaker.call_async(self._breaker, func, *args, **kwargs)

    @_logging
    def before_call(self, func: Any, *args: Any, **kwargs: Any) -> None:
        """The gate: raises `CircuitBreakerError` where a call would be rejected
        now. Half-opens an open circuit whose timeout has passed. Neither calls
        `func` nor takes the place of the trial."""
        breaker = self._breaker
        with breaker._lock:
            breaker._look()
            state = breaker._era
            wait = state._wait()
            is_let_in = (
                breaker._is_within_trial() if wait else state._start_trial()
            ) or breaker._dry_run
            if not is_let_in:
                raise breaker._error(state._move, wait, state._hint)

    @_logging
    def on_success(self) -> None:
        """Decide what a success changes, if this era lasts."""
        with self._breaker._lock:
            if self is self._breaker._era:
                self._succeeded()

    def on_failure(self, exc: BaseException) -> None:
        """Decide what a failure changes that has been counted, if this era
        lasts. Raises if it opens the circuit: `CircuitBreakerError` from `exc`,
        or `exc` where `throw_new_error_on_trip` is False."""
        error = None
        try:
            with self._breaker._lock:
                if self is self._breaker._era:
                    error = self._failed(exc)
            if error is not None:
                _raise(error, exc)
        finally:
            del exc, error  # or error, its traceback, this frame and error are a cycle
            self._breaker._hand_on_records()

    def _handle_success(self) -> None:
        self._breaker._settle(_Admission(self), by="_handle_success")

    def _handle_error(self, exc: BaseException, reraise: bool = True) -> None:
        try:
            self._breaker._settle(_Admission(self), exc, by="_handle_error")
            if reraise:
                raise exc
        finally:
            del exc  # or exc, its traceback, this frame and exc are a cycle

    # What each state answers in its own way. Lock held.

    def _wait(self) -> float:
        """Seconds until a call may be admitted; 0.0 is now. A quiet call asks
        without the lock."""
        return 0.0

    def _differs_from(self, move: Any) -> bool:
        """Whether a later move to the same state changes what this state answers."""
        return False

    def _start_trial(self) -> bool:
        """Make way for a trial, and say whether that was possible."""
        return True

    def _count_success(self, number: int) -> None:
        """Count the success of a call that this state admitted: as in every
        release, a success that counts forgets the failures."""
        if self._breaker._storage.counter:
            self._breaker._storage.reset_counter()

    def _count_failure(self) -> None:
        """Count the failure of a call that this state admitted."""
        self._breaker._inc_counter()

    def _draw_number(self) -> int:
        """The number of a success among the counted calls. Needs no lock."""
        return 0

    def _forgets(self, number: int) -> bool:
        """Whether the success with that number makes a failure be forgotten. Needs no
        lock."""
        return True

    def _remembered(self) -> int:
        """How many failures have not been forgotten. Needs no lock."""
        return self._breaker._storage.counter

    def _change_window(self, was_on: bool, is_on: bool) -> None:
        """Take in that the window, or the number of failures, was set."""

    def _end(self) -> None:
        """This breaker is about to move the circuit."""

    def _succeeded(self) -> None:
        """Draw the conclusion from a success that has been counted."""

    def _failed(self, exc: BaseException) -> BaseException | None:
        """Draw the conclusion from a failure that has been counted: returns what
        is to be raised, if the failure opens the circuit."""
        return None

    def _was_found(self) -> None:
        """Begin an era that began in the storage, where something else moved."""

    def _trip(self, phrase: str, move: _Move, exc: BaseException) -> BaseException:
        breaker = self._breaker
        # An open() of an older subclass returns nothing, and means True.
        if breaker._carry_out(move, breaker.open) is False or breaker._dry_run:
            return exc
        return breaker._error(move, breaker._era._wait(), "", phrase)


class CircuitClosedState(CircuitBreakerState):
    """Calls pass, and failures in a row are counted."""

    _admits_all = True
    _is_plain = True

    def __init__(
        self,
        cb: CircuitBreaker,
        prev_state: CircuitBreakerState | None = None,
        notify: bool = False,
    ) -> None:
        super().__init__(cb, STATE_CLOSED)
        # The window. A mark stands for a failure that is remembered: it is the number
        # of the failed call among those counted in this era, and the moment when it
        # was counted. The marks are gone with the era: closing forgets all failures.
        # There are none without a window.
        self._marks: deque[tuple[int, float]] | None = (
            deque() if cb._has_window() else None
        )
        self._numbers = itertools.count(1)
        self._oldest = math.inf  # the number of the oldest mark

    def _count_success(self, number: int) -> None:
        storage = self._breaker._storage
        if self._breaker._window_size is None and storage.counter:
            storage.reset_counter()
        if self._marks is not None:
            self._forget(number or next(self._numbers))

    def _count_failure(self) -> None:
        breaker = self._breaker
        if breaker._storage.counter == breaker._fail_max:
            # A listener that was told of the failure that brought the count to the
            # limit has caused another failure, unless the window has moved on.
            self._forget()
            if breaker._storage.counter == breaker._fail_max:
                return
        breaker._inc_counter()
        if self._marks is not None:
            self._forget()

    def _failed(self, exc: BaseException) -> BaseException | None:
        if self._marks is not None:
            self._catch_up()
        breaker = self._breaker
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

    def _end(self) -> None:
        self._forget()

    def _draw_number(self) -> int:
        return next(self._numbers)

    def _forgets(self, number: int) -> bool:
        breaker = self._breaker
        marks = self._marks  # which a setter may take away
        is_in_step = marks and len(marks) == breaker._storage.counter
        return not is_in_step or number - self._oldest >= (breaker._window_size or 0)

    def _forget(self, number: int | None = None) -> None:
        """Bring marks and counter together: failures that were counted since get a
        mark of now, and marks that are too old, too far back from the call with
        `number`, or too many, go. Lock held."""
        marks, breaker = self._marks, self._breaker
        storage: Any = breaker._storage
        if marks is None:
            return
        now, count = time.monotonic(), storage.counter
        while len(marks) < count:
            number = next(self._numbers)
            marks.append((number, now))
        size, seconds = breaker._window_size, breaker._window_seconds
        far = -math.inf if size is None or number is None else number - size
        gone = len(marks) - count
        while gone < len(marks):
            failed, moment = marks[gone]
            # A clock that stands before the moment of a mark is another clock.
            if failed > far and (seconds is None or 0.0 <= now - moment < seconds):
                break
            gone += 1
        if gone:
            # A reader without the lock takes the marks first and the counter after.
            storage.counter = len(marks) - gone
            for _ in range(gone):
                marks.popleft()
        self._oldest = marks[0][0] if marks else math.inf

    def _catch_up(self) -> None:
        """The same where time may have passed or other code has counted."""
        breaker, marks = self._breaker, self._marks or ()
        if (
            breaker._window_seconds is not None
            or len(marks) != breaker._storage.counter
        ):
            self._forget()

    def _remembered(self) -> int:
        seconds, marks = self._breaker._window_seconds, self._marks
        if seconds is None or marks is None:
            return self._breaker._storage.counter
        now = time.monotonic()
        moments = [moment for _, moment in _copy_of(marks)]
        count = self._breaker._storage.counter
        # Of too many marks, the oldest stand for failures that have been reset.
        standing = moments[max(0, len(moments) - count) :]
        return count - sum(not 0.0 <= now - moment < seconds for moment in standing)

    def _change_window(self, was_on: bool, is_on: bool) -> None:
        if not is_on:
            self._marks = None
            return
        if not was_on or self._marks is None:
            self._marks = deque()
        # The number drawn here is no call's, so the marks move on by one with it.
        number = next(self._numbers)
        self._marks = deque((failed + 1, moment) for failed, moment in self._marks)
        self._forget(number)


def _copy_of(marks: deque[Any]) -> tuple[Any, ...]:
    while True:
        try:
            return tuple(marks)
        except RuntimeError:  # another thread changed them, on a Python without the GIL
            continue


class CircuitOpenState(CircuitBreakerState):
    """Calls are rejected until the timeout has passed. No call that ends now
    was admitted in this era, so none counts."""

    _is_plain = True

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
                length = grown * breaker._factor_of(self._known_move or self._move)
        left = length - breaker._storage.open_for()
        return left if left > 0.0 else breaker._place_wait()  # inf - inf is not

    def _differs_from(self, move: Any) -> bool:
        mine = self._move
        return (mine.reason, mine.seconds, mine.failed_trials) != (
            move.reason,
            move.seconds,
            move.failed_trials,
        )

    def _start_trial(self) -> bool:
        breaker = self._breaker
        move = _Move(STATE_HALF_OPEN, "the timeout has passed", "trial")
        breaker._carry_out(move, breaker.half_open)
        return breaker._era is not self  # else a subclass's half_open() did nothing

    def _count_success(self, number: int) -> None:
        """Nothing: an open circuit admits no call."""

    def _count_failure(self) -> None:
        """Nothing: an open circuit admits no call."""


class CircuitHalfOpenState(CircuitBreakerState):
    """One call at a time, the trial, finds out whether the trouble is over."""

    _is_plain = True
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
    """All breakers that are alive in this process, by name, unnamed ones last."""
    alive = [breaker for ref in _breakers.valuerefs() if (breaker := ref()) is not None]
    return tuple(sorted(alive, key=lambda each: (each._name is None, each._name or "")))


class CircuitBreakers(OrderedDict[object, CircuitBreaker]):
    """A mapping that makes a breaker for each key when it is first asked for.

        breakers = CircuitBreakers(fail_max=25, window_size=50)
        breakers["api.example.org"].call(fetch, url)

    `breakers[key]` is ``CircuitBreaker(name=str(key), **settings)``, one however many
    threads ask at once; the look-up of one that is there takes no lock. A subclass
    overrides `make` for anything else. ``in``, ``len``, iteration and `get` make none.

    When there are more than `maxsize` (a whole number from 1; `math.inf`: never), a new
    one makes room. Of the oldest a few are looked at, and those go that are as good as
    new (closed, nothing remembered, settings and listeners as they were made), or open
    and due for a trial. A breaker that has gone stays the one for its key as long as
    anything holds it, as a running call does.
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
            # An iterator is read once, for all breakers, if it is one that may be.
            if _is_iterable(settings.get(name)) and not isinstance(
                settings[name], type
            ):
                settings[name] = tuple(settings[name])
        self._settings = settings
        checked = CircuitBreaker(**settings)  # which raises if they are wrong
        del _breakers[id(checked)]
        self._lock = threading.RLock()
        self._gone: weakref.WeakValueDictionary[Any, CircuitBreaker] = (
            weakref.WeakValueDictionary()
        )
        _registries[id(self)] = self

    def __copy__(self: _T) -> _T:
        return self  # one shared thing, as each breaker is

    def __deepcopy__(self: _T, memo: object) -> _T:
        return self

    def make(self, key: Any) -> CircuitBreaker:
        """A new breaker for a key. Called with this mapping's lock held."""
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
            if len(self) > self._maxsize:
                self._make_room()
            return breaker

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {len(self)}, maxsize {self._maxsize}>"

    def _make_room(self) -> None:
        for _ in range(min(_LOOKED_AT, len(self) - 1)):  # not at the new one
            # The oldest is taken out first, so that a look-up in another thread meets
            # the lock, and finds it again in the weak table.
            key, breaker = self.popitem(last=False)
            self._gone[key] = breaker
            if not breaker._is_dispensable():
                self[key] = breaker  # as the newest
            elif len(self) <= self._maxsize:
                return


# What a call, a trial and a move are to the breaker.


class _Admission:
    """What a call was let in by. One serves all ordinary calls of an era; a trial
    has its own; that of calls within a trial has a state that is no breaker's.

    The others are the storage, where a call may see in it without the lock that it
    passes (`passes`), that there is nothing to settle when it returns (`returns`),
    that its success changes nothing (`settles`), or that it is rejected (`rejects`);
    elsewhere they are `_OPAQUE`, which shows none of this.
    """

    __slots__ = ("state", "trial", "passes", "returns", "settles", "rejects")

    def __init__(
        self,
        state: Any = None,
        trial: _Trial | None = None,
        passes: Any = None,
        returns: Any = None,
        settles: Any = None,
        rejects: Any = None,
    ) -> None:
        self.state: Any = state
        self.trial: _Trial | None = trial
        self.passes: Any = passes or _OPAQUE
        self.returns: Any = returns or _OPAQUE
        self.settles: Any = settles or _OPAQUE
        self.rejects: Any = rejects or _OPAQUE


class _Trial:
    """A call that took the place. It keeps nothing alive, as the context of a
    generator or a block that is never finished does not forget it."""

    __slots__ = ("since", "claimed", "begun", "over", "_breaker")

    def __init__(self, breaker: CircuitBreaker) -> None:
        self.since: float = time.monotonic()
        self.claimed: bool = False  # from the storage, which has granted it
        self.begun: bool = False
        self.over: bool = False
        self._breaker = weakref.ref(breaker)

    def may_matter(self) -> bool:
        return not self.over and self._breaker() is not None


class _Move:
    """A transition: where to, why in words, and what caused it.

    `by` is ``'count'`` (the failures have reached `fail_max`), ``'trial'`` (a
    call half-opens the circuit to be its trial), ``'outcome'`` (of a trial),
    ``'hand'``, or ``'found'`` for a move that something else made in the storage.
    `seconds` is the length of an opening that has one of its own, else None.
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
        self.why_opened: str = ""

    @classmethod
    def found(cls, state: str, known: Any, unknown: str = _FOUND) -> _Move:
        """A move that something else has made in a storage, which knows `known` of it,
        an object with attributes like these, or None."""
        if known is None or known.state != state:
            return cls(state, unknown, "found")
        return cls(state, known.reason, "found", known.seconds, known.failed_trials)

    def follow(self, before: _Move) -> _Move:
        """Take over what lasts from the move before: why the circuit opened, and how
        many trials have failed since it was last closed or opened by hand."""
        if self.state == STATE_HALF_OPEN:
            self.why_opened = before.why_opened
        elif self.state == STATE_OPEN:
            self.why_opened = self.reason
        if self.failed_trials is None:
            self.failed_trials = 0
            if self.state == STATE_HALF_OPEN:
                self.failed_trials = before.failed_trials
            elif self.state == STATE_OPEN and self.by == "outcome":
                self.failed_trials = before.failed_trials + 1
        return self


def _raise(error: BaseException, cause: BaseException | None) -> NoReturn:
    """Raise what a failure raises that opens the circuit."""
    try:
        if error is cause:
            raise error
        raise error from cause
    finally:
        del error, cause  # or error, its traceback, this frame and error are a cycle


# Guards, one for each kind of callable: admit, run, settle. `admitted` is given
# where a plain function made something lazy, and its call was admitted before.


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
        # To look the class up is faster than to compare it with each of the three.
        try:
            if type(result) in _CODES_OF_RESULTS:
                return _guard_result(breaker, result, admission)
        except TypeError:
            pass  # a class that cannot be hashed is none of these
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
                    closed = False  # the generator swallowed it and yielded again
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
    """Guard what a plain function has made, to the end: it is lazy."""
    code = getattr(result, _CODES_OF_RESULTS[type(result)])
    guard = _GUARDS_BY_FLAGS[code.co_flags & _LAZY_FLAGS]
    return _called_like(guard(breaker, lambda: result, admission), result)()


# What inspect calls CO_GENERATOR, CO_COROUTINE, CO_ITERABLE_COROUTINE and
# CO_ASYNC_GENERATOR; importing it would take longer than importing this module.
_GENERATOR, _COROUTINE, _ITERABLE_COROUTINE, _ASYNC_GENERATOR = 0x20, 0x80, 0x100, 0x200
_LAZY_FLAGS = _GENERATOR | _COROUTINE | _ITERABLE_COROUTINE | _ASYNC_GENERATOR
_GUARDS_BY_FLAGS = {
    0: _guard_function,
    _GENERATOR: _guard_generator,
    _COROUTINE: _guard_coroutine,
    _GENERATOR | _ITERABLE_COROUTINE: _guard_iterable_coroutine,
    _ASYNC_GENERATOR: _guard_async_generator,
}
_Generator, _Coroutine = types.GeneratorType, types.CoroutineType
_CODES_OF_RESULTS = {
    _Generator: "gi_code",
    _Coroutine: "cr_code",
    types.AsyncGeneratorType: "ag_code",
}


def _guard_for(func: Any) -> Any:
    """The guard for what calling `func` makes, as far as its code tells."""
    return _GUARDS_BY_FLAGS.get(_lazy_flags(func), _guard_function)


def _lazy_flags(func: Any) -> int:
    """Those flags of the code behind `func` that say that a call of it runs later."""
    while isinstance(func, (functools.partial, types.MethodType)):
        func = func.func if isinstance(func, functools.partial) else func.__func__
    # An AsyncMock has code too, and a method of a remote object has any attribute.
    # Of an object that can be called it is the code of its class's __call__ that
    # matters.
    for called in (func, getattr(type(func), "__call__", None)):
        flags = getattr(getattr(called, "__code__", None), "co_flags", None)
        if isinstance(flags, int):
            return flags & _LAZY_FLAGS
    return 0


def _called_like(guarded: Any, original: Any) -> Any:
    """Give what `guarded` makes the name that tracebacks and tasks show."""
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
    """None for a GeneratorExit that came to the guard from outside: closing a
    generator at one of its yields is a success. One that the generator raised
    itself came through the generator's own frame."""
    if not isinstance(exc, GeneratorExit):
        return exc
    below = exc.__traceback__ and exc.__traceback__.tb_next
    if below and below.tb_frame.f_code is getattr(generator, "gi_code", None):
        return exc
    return None


def _first_step(generator: Any) -> Any:
    # Unseen by the event loop. The loop closes, at its end, each generator that it
    # has seen, and this one is closed by the guard around it: two at a time cannot.
    # Nor must the collector, which may come to this generator before the guard.
    hooks = sys.get_asyncgen_hooks()
    sys.set_asyncgen_hooks(None, _leave_it)
    try:
        return generator.__anext__()
    finally:
        sys.set_asyncgen_hooks(*hooks)


def _leave_it(generator: Any) -> None:
    """Let the guard around the generator close it, and not the collector."""


class _Block:
    """What `CircuitBreaker.calling` returns: good for one use."""

    def __init__(self, breaker: CircuitBreaker) -> None:
        self._breaker = breaker
        self._uses = [breaker]
        self._admission: _Admission | None = None
        self._through: Any = None  # a subclass's own call()

    def _enter(self) -> bool:
        """Whether the library guards the block, or a subclass's own `call`."""
        try:
            breaker = self._uses.pop()  # in one step, whatever other threads do
        except IndexError:
            raise RuntimeError("each breaker.calling() guards one block") from None
        if not breaker._has_own_call() or _lazy_flags(breaker.call) & _COROUTINE:
            return True
        from contextlib import contextmanager  # which takes long, and is rare

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
            del exc, traceback  # they may hold this very frame

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
        """``@breaker.calling()`` decorates, as it did in older releases."""
        return self._breaker(func)


def _block() -> Any:
    """Stands for a block where a subclass's own `call` guards it."""
    yield


class _Unguarded:
    """Takes the breaker's place in a decorated function where a subclass's own
    call() is what guards it: admits everything, settles nothing."""

    def __init__(self) -> None:
        quiet = CircuitMemoryStorage(STATE_CLOSED)
        self._admission = _Admission(None, None, quiet, quiet, quiet)

    def _admit(self, func: Any, args: Any, kwargs: Any) -> _Admission:
        return self._admission

    async def _admit_async(self, func: Any, args: Any, kwargs: Any) -> _Admission:
        return self._admission

    def _settle(self, admission: Any, exc: Any = None, result: Any = None) -> None:
        """Nothing is left to do: the call inside was settled."""


class CircuitBreakerListener:
    """Told what happens to a breaker. Override what you want to hear of.

    The methods are called with the breaker's lock held, one at a time, in the
    thread of the call. They may use the breaker; they must not wait for another
    thread that does, nor use a breaker whose listeners use this one: both
    deadlock. What they raise is logged on the logger ``pybreaker`` and changes
    nothing, unless it is no `Exception`.
    """

    def before_call(
        self, cb: CircuitBreaker, func: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> None:
        """A call was admitted; `func` is called next."""

    def failure(self, cb: CircuitBreaker, exc: BaseException) -> None:
        """A call failed with `exc`. It is counted; whether it opens the
        circuit is decided after this."""

    def success(self, cb: CircuitBreaker) -> None:
        """A call succeeded."""

    def rejected(
        self, cb: CircuitBreaker, func: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> None:
        """A call was rejected; `func` is not called."""

    def abandoned(self, cb: CircuitBreaker) -> None:
        """An admitted call was abandoned: cancelled, say, or ended by an exception
        that `ignore` matches. It has neither succeeded nor failed."""

    def state_change(
        self,
        cb: CircuitBreaker,
        old_state: CircuitBreakerState,
        new_state: CircuitBreakerState,
    ) -> None:
        """The circuit moved; the change is complete."""


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
    """A listener's method, or None where calling it would do nothing."""
    try:
        method = getattr(listener, event, None)
        unheard = getattr(CircuitBreakerListener, event)
        return None if getattr(method, "__func__", None) is unheard else method
    except Exception:  # of a property; told and logged when there is an event
        return lambda *args, **kwargs: getattr(listener, event)(*args, **kwargs)


class _HearersInList:
    """The same of a list of listeners, which may have changed at each event."""

    def __init__(self, listeners: Any) -> None:
        self._listeners = listeners

    def __getitem__(self, event: str) -> tuple[Any, ...]:
        return _hearers_of(self._listeners)[event]


class CircuitBreakerStorage:
    """Where a circuit's state and counters are kept. Subclass it.

    A subclass has at least `state`, `counter` and `opened_at` and the methods
    `increment_counter` and `reset_counter`. In calls and transitions it is used
    with the breaker's lock held and should not block, except for a claim.

    What it raises reaches the caller, chained to what the guarded function raised or
    instead of what that returned. It never counts as a failure of what is
    guarded, and leaves no trial its place.

    A class that sets ``_is_plain = True`` in its own body, which its subclasses do
    not inherit, promises that it may be read without the lock: its attributes
    ``_state`` and ``_fail_counter`` always hold what `state` and `counter` say,
    and `open_for` and `last_move` may be called at any time from any thread.
    """

    __slots__ = ("__dict__", "__weakref__")

    _successes = 0
    _is_plain = False

    def __init__(self, name: str) -> None:
        self._name = name

    @property
    def name(self) -> str:
        """What kind of storage it is."""
        return self._name

    @property
    def state(self) -> str:
        """The state's name. Settable."""
        raise NotImplementedError

    @state.setter
    def state(self, state: str, /) -> None:
        raise NotImplementedError

    @property
    def counter(self) -> int:
        """Failures in a row."""
        raise NotImplementedError

    def increment_counter(self) -> None:
        """Add one to `counter`."""
        raise NotImplementedError

    def reset_counter(self) -> None:
        """Set `counter` to 0."""
        raise NotImplementedError

    @property
    def success_counter(self) -> int:
        """Successful trials. Kept here for storages that do not keep it."""
        return self._successes

    def increment_success_counter(self) -> None:
        """Add one to `success_counter`."""
        self._successes += 1

    def reset_success_counter(self) -> None:
        """Set `success_counter` to 0."""
        self._successes = 0

    @property
    def opened_at(self) -> datetime | None:
        """The moment of the last opening. Settable. A naive one is UTC; None
        means that the timeout has passed."""
        raise NotImplementedError

    @opened_at.setter
    def opened_at(self, moment: datetime, /) -> None:
        raise NotImplementedError

    def open_for(self) -> float:
        """Seconds since the opening; by default from `opened_at`."""
        return _age(self.opened_at)

    def move(self, move: Any) -> None:
        """The circuit moves to `move.state`.

        `move.reason` says why in words, and `move.by` what caused it: ``'count'``,
        ``'trial'`` (the half-opening that a trial makes), ``'outcome'`` (of a
        trial) or ``'hand'``. `move.seconds` is the length of an opening that has
        one of its own, else None; `move.failed_trials` the number of failed trials
        since the circuit was last closed or opened by hand; `move.fail_max` the
        breaker's. The counters have been written before.
        """
        if move.state == STATE_OPEN:
            self.opened_at = datetime.now(UTC)
        self.state = move.state

    def last_move(self) -> Any:
        """What the storage knows of the move that brought it to its state, with the
        attributes that `move` is given, or None. It is the same object until the
        circuit moves: by that a breaker notices an opening of an open circuit."""
        return None

    def claim_trial(self, timeout: float) -> bool:
        """Whether this breaker may run the trial that is due; for at least
        `timeout` seconds no other breaker may. Called without the lock."""
        return True

    async def claim_trial_async(self, timeout: float) -> bool:
        """The same for coroutines, on whichever event loop they run."""
        return self.claim_trial(timeout)

    def release_trial(self) -> None:
        """The trial that was claimed is over."""


class CircuitMemoryStorage(CircuitBreakerStorage):
    """Keeps the state in memory, and time by the monotonic clock.

    When unpickled, it has been open for as long as the wall clock says.
    """

    # Plain attributes under both names, as a call reads them without the lock
    # to see that it has nothing to do. Tests in the field use the private ones.
    __slots__ = (
        "_state",
        "_fail_counter",
        "_success_counter",
        "_opening",  # its moment, and by the monotonic clock when that was written
        "_last_move",
    )

    _name = "memory"
    _is_plain = True

    _state: str
    _fail_counter: int
    _success_counter: int

    def __init__(self, state: str) -> None:
        self._state = _checked_state("state", state)
        self._fail_counter = 0
        self._success_counter = 0
        self._opened_at = None
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
        """The moment of the last opening. Setting it moves the opening."""
        return self._opening[0]

    @opened_at.setter
    def opened_at(self, moment: datetime | None) -> None:
        self._opening = moment, time.monotonic(), _age(moment)

    @opened_at.deleter
    def opened_at(self) -> None:
        del self._opening  # mock.patch does so before it puts the old value back

    _opened_at = opened_at

    def open_for(self) -> float:
        """Seconds since the opening."""
        moment, written, age = self._opening
        elapsed = time.monotonic() - written
        if 0.0 <= elapsed < _DECADES:
            return age + elapsed
        # A clock that went back, or on by decades, is another one, such as
        # freezegun's. Then the wall clock decides, and there is no future.
        age = _age(moment)
        if age < 0.0:
            self.opened_at = datetime.now(UTC)
        return max(0.0, age)

    def move(self, move: Any) -> None:
        """The circuit moves: see `CircuitBreakerStorage.move`."""
        self._last_move = move
        if move.state == STATE_OPEN:
            now = datetime.now(UTC)
            if not _is_plain(self):
                self.opened_at = now  # a subclass may have its own
            self._opening = now, time.monotonic(), 0.0
        self.state = move.state

    def last_move(self) -> Any:
        """The move that brought the storage to its state, if it was told of one."""
        return self._last_move

    def __getstate__(self) -> dict[str, Any]:
        names = ("_state", "_fail_counter", "_success_counter", "_opened_at")
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
    # What takes long to load, and few ask for.
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


# What says nothing about the service.


def _is_abandonment(exc: BaseException) -> bool:
    """Whether `exc` says that the call was given up, not how it went."""
    if isinstance(exc, Exception):
        return False  # none of these are, which spares most calls the search
    leaves = _leaves_of(exc)
    if leaves:
        return all(map(_is_abandonment, leaves))
    return isinstance(exc, _imported(_ABANDONING))


def _leaves_of(exc: BaseException) -> tuple[BaseException, ...]:
    """What is in an exception group. None is empty."""
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
    """Those of the classes that were imported; the others were never raised."""
    found = []
    for module, attribute in names:
        cls = getattr(sys.modules.get(module), attribute, None)
        if isinstance(cls, type):
            found.append(cls)
    return tuple(found)


# Moments and texts.


def _age(moment: datetime | None) -> float:
    """Seconds since a moment, by the wall clock."""
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
    """The `repr` of an exception, on one line and not too long, as it is kept."""
    try:
        text = repr(exc)
    except Exception:  # the one that repr() raised
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
    """`value` as an int, or `unlimited` where it is that."""
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
    if not 0 <= value:  # nor NaN
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
    """Whether a storage counts as a `CircuitMemoryStorage` does."""
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
        raise TypeError(f"listeners takes objects, not the class {listener!r}: add ()")
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
            f"{item!r} is not there: no such {what} of the breaker"
        ) from None
    return tuple(remaining)


# What the parts share.


def _is_plain(thing: Any) -> bool:
    """Whether the class of a state or a storage is one that may be trusted without
    the lock: a subclass, or a mock, may do more."""
    return bool(vars(type(thing)).get("_is_plain", False))


def _own_hooks(state: Any) -> frozenset[str]:
    """Those methods that a state class of the user's own overrides."""
    return frozenset(
        hook
        for hook in _HOOKS
        if getattr(type(state), hook, None) is not getattr(CircuitBreakerState, hook)
        or hook in getattr(state, "__dict__", ())
    )


_HOOKS = ("before_call", "on_success", "on_failure", "_handle_success", "_handle_error")
_SETTINGS = (
    "_name",
    "_fail_max",
    "_reset_timeout",
    "_success_threshold",
    "_throw_new_error_on_trip",
    "_exclude",
    "_told",
    "_window_size",
    "_window_seconds",
    "_max_reset_timeout",
    "_include",
    "_ignore",
    "_failure_result",
    "_dry_run",
)
_LOOKED_AT = 4  # old breakers, for each new one
_DECADES = 6e8  # seconds
_LONGEST_TEXT = 300  # characters
_NEW = _Move("", "new", "", failed_trials=0)
_PLAIN_CALL = CircuitBreaker.call

# Shows no call that it may pass by: in no state, and with failures to forget.
_OPAQUE: Any = CircuitMemoryStorage(STATE_CLOSED)
_OPAQUE._state = "hidden"
_OPAQUE._fail_counter = 1

_UNGUARDED: Any = _Unguarded()

# Of calls within a trial, whose outcome belongs to no era.
_WITHIN = _Admission()

# The trials that the running code is within.
_trials: contextvars.ContextVar[tuple[_Trial, ...]] = contextvars.ContextVar(
    "pybreaker_trials", default=()
)

# All breakers that are alive. A subclass's need not be hashable.
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
