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

from __future__ import annotations

import atexit
import contextvars
import functools
import logging
import math
import operator
import os
import sys
import threading
import time
import types
import weakref
from datetime import datetime, timezone

TYPE_CHECKING = False  # importing typing would take longer than all the rest
if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable
    from typing import Any, Final, NoReturn, TypeVar, Union, overload

    from typing_extensions import ParamSpec

    _P = ParamSpec("_P")
    _T = TypeVar("_T")
    _F = TypeVar("_F", bound=Callable[..., Any])
    _Exclusion = Union[type[object], Callable[[Any], object]]
    _Admission = tuple["CircuitBreakerState", Union["_Trial", None]]
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
    "CircuitClosedState",
    "CircuitHalfOpenState",
    "CircuitMemoryStorage",
    "CircuitOpenState",
    "CircuitRedisStorage",
)

STATE_CLOSED: Final = "closed"
STATE_OPEN: Final = "open"
STATE_HALF_OPEN: Final = "half-open"

_REJECTED = "Timeout not elapsed yet, circuit breaker still open"

logger = logging.getLogger("pybreaker")
logger.addHandler(logging.NullHandler())  # quiet, unless logging is configured


class CircuitBreakerError(Exception):
    """The call was rejected, or its failure opened the circuit.

    In the second case ``__cause__`` is what the function raised. The breaker
    is left behind when the error is pickled.
    """

    breaker: CircuitBreaker | None = None
    """The breaker that raised the error."""

    retry_after: float = 0.0
    """Seconds until a call may be admitted, as known when the error was
    raised; `math.inf` where that needs somebody's hand."""

    def __str__(self) -> str:
        message = super().__str__()
        if self.retry_after:
            message += f" (next trial {_in(self.retry_after)})"
        return message

    def __reduce__(self) -> tuple[Any, ...]:
        attributes = {k: v for k, v in vars(self).items() if k != "breaker"}
        return type(self), self.args, attributes


class _OpenList:
    """A tuple for the breaker, and a list for code that reaches for it from
    outside and changes it. Nobody hears of such a change, so a breaker whose
    listeners were reached for takes the lock and looks, until it has others."""

    def __init__(self, attribute: str) -> None:
        self._attribute = attribute

    def __get__(self, breaker: Any, owner: Any) -> Any:
        if breaker is None:  # asked of the class
            return self
        with breaker._lock:
            items = getattr(breaker, self._attribute)
            if isinstance(items, tuple):
                items = list(items)
                self.__set__(breaker, items)
            return items

    def __set__(self, breaker: Any, items: Any) -> None:
        with breaker._lock:
            setattr(breaker, self._attribute, items)
            breaker._find_shortcut()

    def __delete__(self, breaker: Any) -> None:
        # mock.patch does so before it puts the old value back.
        delattr(breaker, self._attribute)


class CircuitBreaker:
    """Guards calls to one thing that can fail.

    Failures in a row open the circuit when there are `fail_max` of them (a
    whole number from 1; `math.inf` for a breaker that only observes). An open
    circuit waits `reset_timeout` seconds for its trial (a number from 0;
    `math.inf` to stay open until somebody closes it). `success_threshold`
    trials have to succeed to close it (a whole number from 1).

    `exclude` is an iterable of what is not a failure: classes, which match by
    `isinstance`, and predicates, which are called with the exception.
    `listeners` is an iterable of objects with methods of
    `CircuitBreakerListener`. `state_storage` is a `CircuitBreakerStorage`; by
    default the state is kept in memory. `name` is for messages and listeners.
    `throw_new_error_on_trip` says what the failure that opens the circuit
    raises: `CircuitBreakerError`, or if False what the function raised.

    An argument of the wrong kind is a `TypeError`, one out of range a
    `ValueError`; so it is in every setter, and a setter that refuses changes
    nothing.

    All of it may be used from any thread and from any number of tasks. The
    lock guards transitions, counters and the telling of listeners; the guarded
    call runs outside it.
    """

    _listeners = _OpenList("_told_listeners")
    _excluded_exceptions = _OpenList("_excluded_kinds")

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
    ) -> None:
        self._fail_max: float
        self._reset_timeout: float
        self._success_threshold: float
        self._name: str | None
        self.fail_max = fail_max
        self.reset_timeout = reset_timeout
        self.success_threshold = success_threshold
        self.name = name
        if not isinstance(throw_new_error_on_trip, bool):
            raise TypeError(
                f"throw_new_error_on_trip must be True or False, "
                f"not {throw_new_error_on_trip!r}"
            )
        self._throw_new_error_on_trip = throw_new_error_on_trip
        self._excluded_kinds: Any = _checked_exclusions(exclude)
        self._told_listeners: Any = _checked_listeners(listeners)
        if state_storage is None:
            state_storage = CircuitMemoryStorage(STATE_CLOSED)
        elif not isinstance(state_storage, CircuitBreakerStorage):
            raise TypeError(
                f"state_storage must be a CircuitBreakerStorage, not {state_storage!r}"
            )
        self._circuit_storage = state_storage
        self._lock: threading.RLock = threading.RLock()
        self._trial_in_place: _Trial | None = None  # the one that holds the place
        self._cause_of_move = _BY_HAND  # of the move that is being made
        self._unlogged: tuple[Any, ...] = ()
        self._state: CircuitBreakerState = self._create_new_state(state_storage.state)
        self._find_shortcut()
        _breakers[id(self)] = self

    # Guarding.

    @overload
    def __call__(self, func: _F, /) -> _F: ...

    @overload
    def __call__(self, **options: bool) -> Callable[[_F], _F]: ...

    def __call__(self, *functions: Any, **options: Any) -> Any:
        """Decorate a function, coroutine function, generator function or async
        generator function; it stays what it is.

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
        if not callable(func):
            raise TypeError(f"a breaker guards what can be called, not {func!r}")
        guard = CircuitBreaker._guard_coroutine if call_async else _guard_for(func)
        if call_async or getattr(self.call, "__func__", None) is not _PLAIN_CALL:
            # A subclass's own call() sees these calls too, and guards them.
            through = self.call_async if call_async else self.call
            guarded = guard(_UNGUARDED, functools.partial(through, func))
        else:
            guarded = guard(self, func)
        try:
            return functools.update_wrapper(guarded, func)
        except TypeError:  # its name is no string, as an object can have any
            return functools.update_wrapper(guarded, func, assigned=())

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
            if guard is not CircuitBreaker._guard_function:
                guarded = _called_like(guard(self, func), func)
                lazy: _T = guarded(*args, **kwargs)
                return lazy
        # From here on the same as in _guard_function, which has no frame to spare.
        state, trial = self._state, None
        if state._shortcut._state != STATE_CLOSED:
            state, trial = self._admit(func, args, kwargs)
        try:
            result = func(*args, **kwargs)
        except BaseException as exc:
            self._settle(state, trial, exc)
            raise
        try:
            if type(result) in _CODES_OF_RESULTS:
                rest: _T = self._guard_result(result, (state, trial))
                return rest
        except TypeError:
            pass  # a class that cannot be hashed, so it is none of these
        if state._shortcut._fail_counter:
            self._settle(state, trial)
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
        return await self._guard_coroutine(func)(*args, **kwargs)

    def calling(self) -> _Block:
        """A context manager, for ``with`` and ``async with``, that guards one
        block. It may span ``await`` and ``yield``, and be entered and left in
        different threads. Entering and leaving raise as `call` does."""
        return _Block(self)

    # Steering: any time, from any thread, effective at once.

    def open(self) -> bool:
        """Open the circuit: calls are rejected for `reset_timeout` seconds.

        An open circuit starts its timeout again. Returns whether a failure that
        opened it should raise `CircuitBreakerError`.
        """
        try:
            with self._lock:
                storage = self._circuit_storage
                storage.reset_success_counter()
                storage._open_now()
                cause = self._cause_of_move
                if cause.by_count:
                    storage.trip(self._fail_max)
                else:
                    storage._move(STATE_OPEN, cause.by_hand)
                self._begin_era(STATE_OPEN)
        finally:
            self._log_what_happened()
        return self._throw_new_error_on_trip

    def half_open(self) -> None:
        """Half-open the circuit: the next call is a trial."""
        try:
            with self._lock:
                cause = self._cause_of_move
                if not cause.by_trial:
                    self._circuit_storage.reset_success_counter()
                self._circuit_storage._move(STATE_HALF_OPEN, cause.by_hand)
                self._begin_era(STATE_HALF_OPEN)
        finally:
            self._log_what_happened()

    def close(self) -> None:
        """Close the circuit: calls pass, and failures are counted from 0."""
        try:
            with self._lock:
                self._circuit_storage.reset_counter()
                self._circuit_storage.reset_success_counter()
                by_hand = self._cause_of_move.by_hand
                self._circuit_storage._move(STATE_CLOSED, by_hand)
                self._begin_era(STATE_CLOSED)
        finally:
            self._log_what_happened()

    @property
    def state(self) -> CircuitBreakerState:
        """The state, after a look at the storage. Set it to ``'closed'``,
        ``'open'`` or ``'half-open'`` to move the circuit."""
        try:
            with self._lock:
                self._look()
                return self._state
        finally:
            self._log_what_happened()

    @state.setter
    def state(self, name: str) -> None:
        if name == STATE_CLOSED:
            self.close()
        elif name == STATE_OPEN:
            self.open()
        elif name == STATE_HALF_OPEN:
            self.half_open()
        else:
            raise ValueError(f"state must be {_STATE_NAMES}, not {name!r}")

    @property
    def fail_max(self) -> float:
        """Failures in a row that open the circuit. Lowering it below the
        present count opens nothing: the next failure does."""
        return self._fail_max

    @fail_max.setter
    def fail_max(self, fail_max: float) -> None:
        self._fail_max = _whole_number("fail_max", fail_max, 1, math.inf)

    @property
    def reset_timeout(self) -> float:
        """Seconds from the opening to the trial, and that a trial may hold its
        place. A change holds for a circuit that is already open."""
        return self._reset_timeout

    @reset_timeout.setter
    def reset_timeout(self, reset_timeout: float) -> None:
        self._reset_timeout = _seconds("reset_timeout", reset_timeout)

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
    def fail_counter(self) -> int:
        """Failures in a row so far. Setting it opens nothing by itself."""
        return self._circuit_storage.counter

    @fail_counter.setter
    def fail_counter(self, value: float) -> None:
        count: int = _whole_number("fail_counter", value, 0)
        with self._lock:
            storage: Any = self._circuit_storage  # whose counter may be settable
            try:
                storage.counter = count
            except AttributeError:  # this storage can only count
                if count > self._fail_max:
                    raise ValueError(
                        f"fail_counter must be at most fail_max, {self._fail_max}, "
                        f"on this storage, not {count!r}"
                    ) from None
                self._circuit_storage.reset_counter()
                for _ in range(count):
                    self._circuit_storage.increment_counter()

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
        return self._circuit_storage.state

    @property
    def success_counter(self) -> int:
        """Successful trials since the circuit was opened or moved by hand."""
        return self._circuit_storage.success_counter

    @property
    def retry_after(self) -> float:
        """Seconds until a call may be admitted, 0.0 where one may now. While a
        trial runs, until it would lose its place. It can be `math.inf`."""
        with self._lock:
            name = self._circuit_storage.state
            if name == self._state.name:
                return self._state._wait()
            return self._create_new_state(name)._wait()  # nobody is told of a look

    def snapshot(self) -> dict[str, Any]:
        """All there is to know, taken at one moment, as a dict for `json.dumps`.

        Times are in seconds; ``opened_at`` is the last opening, in UTC by ISO
        8601, or None. `math.inf` is None, as JSON has no word for it.
        """
        with self._lock:
            moment = self._circuit_storage.opened_at
            return {
                "name": self._name,
                "state": self._circuit_storage.state,
                "fail_counter": self.fail_counter,
                "fail_max": _finite(self._fail_max),
                "success_counter": self.success_counter,
                "success_threshold": self._success_threshold,
                "reset_timeout": _finite(self._reset_timeout),
                "opened_at": _utc(moment).isoformat() if moment else None,
                "retry_after": _finite(self.retry_after),
            }

    def __repr__(self) -> str:
        with self._lock:
            state, wait = self._circuit_storage.state, self.retry_after
            parts = [
                f"{self._name!r}: {state}" if self._name else f"unnamed: {state}",
                f"{self.fail_counter} of {self._fail_max} failures",
            ]
            if state == STATE_HALF_OPEN:
                parts.append(
                    f"{self.success_counter} of {self._success_threshold} successes"
                )
            if state != STATE_CLOSED:
                next_trial = (
                    f"next trial {_in(wait)}" if wait else "next call is a trial"
                )
                parts.append(next_trial)
            parts.append(f"reset_timeout {self._reset_timeout} s")
        return f"<{type(self).__name__} {', '.join(parts)}>"

    # Listeners and exclusions.

    @property
    def listeners(self) -> tuple[Any, ...]:
        """The listeners, in the order in which they are told."""
        return tuple(self._told_listeners)

    def add_listener(self, listener: object) -> None:
        """Add a listener. `TypeError` if it has none of a listener's methods."""
        self.add_listeners(listener)

    def add_listeners(self, *listeners: object) -> None:
        """Add all these listeners, or none of them: see `add_listener`."""
        added = [_checked_listener(listener) for listener in listeners]
        with self._lock:
            self._listeners = (*self._told_listeners, *added)

    def remove_listener(self, listener: object) -> None:
        """Remove a listener. `ValueError` if it is not there."""
        with self._lock:
            self._listeners = _without(self._told_listeners, listener, "listener")

    @property
    def excluded_exceptions(self) -> tuple[_Exclusion, ...]:
        """The classes and predicates that say what is not a failure."""
        return tuple(self._excluded_kinds)

    def add_excluded_exception(self, exception: _Exclusion) -> None:
        """Add a class or a predicate. `TypeError` if it is neither."""
        self.add_excluded_exceptions(exception)

    def add_excluded_exceptions(self, *exceptions: _Exclusion) -> None:
        """Add all of these, or none: see `add_excluded_exception`."""
        added = [_checked_exclusion(exception) for exception in exceptions]
        with self._lock:
            self._excluded_exceptions = (*self._excluded_kinds, *added)

    def remove_excluded_exception(self, exception: _Exclusion) -> None:
        """Remove a class or a predicate. `ValueError` if it is not there."""
        with self._lock:
            remaining = _without(self._excluded_kinds, exception, "exclusion")
            self._excluded_exceptions = remaining

    def is_system_error(self, exception: BaseException) -> bool:
        """Whether the exception counts as a failure: no exclusion matches it.

        Called outside the lock, and not for what abandons a call, such as
        `KeyboardInterrupt`. A subclass may decide otherwise.
        """
        if not self._excluded_kinds:
            return True  # as most do; sparing the loop was measured to matter
        for exclusion in tuple(self._excluded_kinds):  # which they may change
            try:
                if isinstance(exclusion, type):
                    excluded = isinstance(exception, exclusion)
                else:
                    excluded = bool(exclusion(exception))
            except Exception as exc:
                message = "%r could not judge an exception"
                with self._lock:
                    self._log_later(logging.ERROR, message, exclusion, exc_info=exc)
                self._log_what_happened()
            else:
                if excluded:
                    return False
        return True

    # Guarding, one way for each kind of callable: admit, run, settle. These
    # are called outside the lock, and what they make runs outside it.

    def _guard_function(self, func: Any, admitted: _Admission | None = None) -> Any:
        def guarded(*args: Any, **kwargs: Any) -> Any:
            state, trial = self._state, None
            if state._shortcut._state != STATE_CLOSED:
                state, trial = self._admit(func, args, kwargs)
            try:
                result = func(*args, **kwargs)
            except BaseException as exc:
                self._settle(state, trial, exc)
                raise
            # Looking the class up was measured to be faster than comparing it
            # with each of the three.
            try:
                if type(result) in _CODES_OF_RESULTS:
                    return self._guard_result(result, (state, trial))
            except TypeError:
                pass  # a class that cannot be hashed, so it is none of these
            if state._shortcut._fail_counter:
                self._settle(state, trial)
            return result

        return guarded

    def _guard_result(self, result: Any, admitted: _Admission) -> Any:
        # A plain function made something lazy: the call lasts until that ends.
        code = getattr(result, _CODES_OF_RESULTS[type(result)])
        guard = _GUARDS_BY_FLAGS[code.co_flags & _LAZY_FLAGS]
        return _called_like(guard(self, lambda: result, admitted), result)()

    def _guard_coroutine(self, func: Any, admitted: _Admission | None = None) -> Any:
        async def guarded(*args: Any, **kwargs: Any) -> Any:
            state, trial = self._state, None
            if admitted is not None:
                state, trial = admitted
            elif state._shortcut._state != STATE_CLOSED:
                state, trial = await self._admit_async(func, args, kwargs)
            try:
                result = func(*args, **kwargs)
                if type(result) is _Coroutine or _is_awaitable(result):
                    result = await result
            except BaseException as exc:
                self._settle(state, trial, exc)
                raise
            if state._shortcut._fail_counter:
                self._settle(state, trial)
            return result

        return guarded

    def _guard_generator(
        self, func: Any, admitted: _Admission | None = None, awaited: bool = False
    ) -> Any:
        def guarded(*args: Any, **kwargs: Any) -> Any:
            state, trial = admitted or self._admit(func, args, kwargs)
            closed, result = False, None
            try:
                generator = func(*args, **kwargs)
                item = next(generator)
                while True:
                    try:
                        sent = yield item
                    except BaseException as exc:
                        closed = isinstance(exc, GeneratorExit) and not awaited
                        item = generator.throw(exc)
                        closed = False  # it goes on
                    else:
                        item = generator.send(sent)
            except StopIteration as stop:
                result = stop.value
            except BaseException as exc:
                self._settle(state, trial, _unless_closed(exc, closed))
                raise
            self._settle(state, trial)
            return result

        return guarded

    def _guard_iterable_coroutine(
        self, func: Any, admitted: _Admission | None = None
    ) -> Any:
        def guarded(*args: Any, **kwargs: Any) -> Any:
            entered = admitted
            if entered is None:
                entry = self._admit_async(func, args, kwargs)
                entered = yield from entry.__await__()
            inner = CircuitBreaker._guard_generator(self, func, entered, awaited=True)
            return (yield from inner(*args, **kwargs))

        return types.coroutine(guarded)

    def _guard_async_generator(
        self, func: Any, admitted: _Admission | None = None
    ) -> Any:
        async def guarded(*args: Any, **kwargs: Any) -> Any:
            state, trial = admitted or await self._admit_async(func, args, kwargs)
            closed = False
            try:
                generator = func(*args, **kwargs)
                item = await _first_step(generator)
                while True:
                    try:
                        sent = yield item
                    except BaseException as exc:
                        closed = isinstance(exc, GeneratorExit)
                        item = await generator.athrow(exc)
                        closed = False  # it goes on
                    else:
                        item = await generator.asend(sent)
            except StopAsyncIteration:
                pass
            except BaseException as exc:
                self._settle(state, trial, _unless_closed(exc, closed))
                raise
            self._settle(state, trial)

        return guarded

    # Admission: may this call run, and is it a trial?

    def _admit(self, func: Any, args: Any, kwargs: Any, ask: bool = True) -> _Admission:
        """Let a call in, or raise `CircuitBreakerError`.

        Returns the state that admits the call and, if it is a trial, the trial.
        That takes the place at once, but begins when the storage grants it.
        """
        state, heard = self._state, self._heard
        if state._visible._state == state.name:
            # What is decided here changes nothing, so it needs no lock.
            if state._admits_all:
                if "before_call" not in heard and self._nobody_hears("before_call"):
                    return state, None
            elif not self._told_listeners or self._nobody_hears("rejected"):
                wait = state._wait()
                if wait and not (self._trial_in_place and self._is_within_trial()):
                    raise self._breaker_error(state._rejection, wait)
        trial: _Trial | None = None
        try:
            with self._lock:
                if self._circuit_storage.state != self._state.name:
                    self._look()
                state, wait = self._state, 0.0
                if not state._admits_all:
                    wait = state._wait()
                    # A trial that has held the place too long may be hanging, so
                    # it loses it to a call in its own context as well; but a
                    # timeout of 0 is too short to say so of a trial.
                    if self._is_within_trial() and (wait or not self._reset_timeout):
                        state, wait = _WITHIN, 0.0
                    elif not wait:
                        trial = self._take_place()
                if wait:
                    self._tell("rejected", (self, func, *args), kwargs)
                elif trial is None:
                    self._tell("before_call", (self, func, *args), kwargs)
        finally:
            if self._unlogged and trial is None:  # else its claim logs it
                self._log_what_happened()
        if wait:
            raise self._breaker_error(state._rejection, wait)
        if trial is not None and ask:
            return self._claim(state, trial, func, args, kwargs)
        return state, trial

    async def _admit_async(self, func: Any, args: Any, kwargs: Any) -> _Admission:
        state, trial = self._admit(func, args, kwargs, ask=False)
        if trial is None:
            return state, None
        return await self._claim_async(state, trial, func, args, kwargs)

    def _claim(
        self, state: Any, trial: _Trial, func: Any, args: Any, kwargs: Any
    ) -> _Admission:
        """Ask the storage for the trial: outside the lock, as it may take time."""
        storage = self._circuit_storage
        try:
            try:
                granted = storage.claim_trial(self._reset_timeout)
                begun = self._begin_trial(state, trial, granted, func, args, kwargs)
            finally:
                self._log_what_happened()
        except BaseException:
            self._vacate(trial)
            raise
        return (begun, trial) if begun else self._admit(func, args, kwargs)

    async def _claim_async(
        self, state: Any, trial: _Trial, func: Any, args: Any, kwargs: Any
    ) -> _Admission:
        storage = self._circuit_storage
        try:
            try:
                granted = await storage.claim_trial_async(self._reset_timeout)
                begun = self._begin_trial(state, trial, granted, func, args, kwargs)
            finally:
                self._log_what_happened()
        except BaseException:
            self._vacate(trial)
            raise
        return (begun, trial) if begun else await self._admit_async(func, args, kwargs)

    def _begin_trial(
        self,
        state: CircuitBreakerState,
        trial: _Trial,
        granted: bool,
        func: Any,
        args: Any,
        kwargs: Any,
    ) -> CircuitBreakerState | None:
        """Begin a trial when the storage has answered. Returns its state, or
        None if the circuit has moved on, so that admission starts again."""
        with self._lock:
            holder = self._trial_in_place
            if granted and holder:
                holder.claimed = True  # even if another call has taken the place
            elif granted:
                self._circuit_storage.release_trial()
            self._look()
            if self._trial_in_place is not trial:
                return None
            if not granted:
                self._tell("rejected", (self, func, *args), kwargs)
                raise self._breaker_error(
                    f"{_REJECTED}: another breaker runs the trial", 0.0
                )
            trial.begun = True
            state._start_trial()
            if self._trial_in_place is not trial:  # a listener moved the circuit
                return None
            state = self._state
            self._tell("before_call", (self, func, *args), kwargs)
            return state

    def _take_place(self) -> _Trial:
        if self._trial_in_place is not None:
            self._trial_in_place.over = True
        trial = self._trial_in_place = _Trial(self)
        _trials.set((*filter(_Trial.may_matter, _trials.get()), trial))
        return trial

    def _place_wait(self) -> float:
        """Seconds until a call may take the place."""
        trial = self._trial_in_place
        if trial is None:
            return 0.0
        return max(0.0, self._reset_timeout - (time.monotonic() - trial.since))

    def _vacate(self, trial: _Trial) -> None:
        """End a trial: it gives the place back, if it still has it."""
        trial.over = True  # so that the next trial in this context forgets it
        with self._lock:
            if self._trial_in_place is trial:
                self._trial_in_place = None
                if trial.claimed:
                    self._circuit_storage.release_trial()

    def _is_within_trial(self) -> bool:
        trial = self._trial_in_place
        return trial is not None and trial.begun and trial in _trials.get()

    # Settlement: what does the outcome change?

    def _settle(
        self,
        state: CircuitBreakerState,
        trial: _Trial | None,
        exc: BaseException | None = None,
    ) -> None:
        """Take in how a call ended that `state` admitted, with `exc` if it
        raised. Raises if that opens the circuit."""
        storage = self._circuit_storage
        try:
            if exc is None:
                failed = False
            elif isinstance(exc, Exception) or not _is_abandonment(exc):
                failed = self.is_system_error(exc)
            else:
                return
            if (
                not failed
                and "success" not in self._heard
                and state._admits_all
                and state._visible._state == state.name
                and not state._visible._fail_counter
                and self._nobody_hears("success")
            ):
                return  # this success changes nothing, so it needs no lock
            with self._lock:
                if storage.state != self._state.name:
                    self._look()
                if exc is None or not failed:
                    if state is self._state:
                        # A subclass may have its own; ours takes the lock again.
                        state._succeeded() if state._is_plain else state.on_success()
                    self._tell("success", (self,))
                else:
                    if state is self._state:
                        state._count_failure()
                    if self._told_listeners:
                        self._tell("failure", (self, exc))
                    if state is self._state:
                        state._failed(exc) if state._is_plain else state.on_failure(exc)
        finally:
            exc = None  # if it is raised, its traceback holds this frame
            if trial is not None:
                self._vacate(trial)
            if self._unlogged:
                self._log_what_happened()

    def _inc_counter(self) -> None:
        # With the lock held. Code in the field puts its own in this one's place.
        self._circuit_storage.increment_counter()

    # Transitions. The lock is held.

    def _look(self) -> None:
        """Follow the storage, if somebody else has moved it."""
        name = self._circuit_storage.state
        if name != self._state.name:
            self._begin_era(name, found=True)

    def _begin_era(self, name: str, found: bool = False) -> None:
        """Put a new state in the place of the old one, and tell of it."""
        old, trial = self._state, self._trial_in_place
        # What listeners do because of this has causes of its own.
        cause, self._cause_of_move = _FOUND if found else self._cause_of_move, _BY_HAND
        new = self._create_new_state(name, prev_state=old, notify=True)
        new.reason = str(cause)
        if found:
            new._was_found()
        # A storage that fails here will be found moved at the next look.
        count = self._circuit_storage.counter
        self._state = new
        # variant: quiet calls
        old._shortcut = _HIDDEN
        self._find_shortcut()
        try:
            # variant: overtaken trial
            if trial is not None and not (cause.by_trial and trial.begun):
                self._vacate(trial)
        finally:  # it has moved, even if the storage doesn't take its claim back
            level = logging.WARNING if name == STATE_OPEN else logging.INFO
            if logger.isEnabledFor(level):
                message = "%s: %s, was %s: %s (fail_counter %s, reset_timeout %s s)"
                who = repr(self._name) if self._name else "unnamed breaker"
                what = who, name, old.name, new.reason, count, self._reset_timeout
                self._log_later(level, message, *what)
            self._tell("state_change", (self, old, new))

    def _because(self, cause: _Cause, move: Callable[[], _T]) -> _T:
        """Make a move that nobody makes by hand."""
        self._cause_of_move = cause
        try:
            return move()
        finally:
            self._cause_of_move = _BY_HAND  # if a subclass has not moved at all

    def _create_new_state(
        self,
        new_state: str,
        prev_state: CircuitBreakerState | None = None,
        notify: bool = False,
    ) -> CircuitBreakerState:
        # By the names that the module has for them now: tests replace these.
        if new_state == STATE_CLOSED:
            cls: Any = CircuitClosedState
        elif new_state == STATE_OPEN:
            cls = CircuitOpenState
        elif new_state == STATE_HALF_OPEN:
            cls = CircuitHalfOpenState
        else:
            raise ValueError(f"state must be {_STATE_NAMES}, not {new_state!r}")
        state: CircuitBreakerState = cls(self, prev_state=prev_state, notify=notify)
        state.name = new_state  # a mock in its place has none
        return state

    def _find_shortcut(self) -> None:
        """Let calls pass without the lock where a closed state and no listener
        leave no question but what the storage says, which can be seen."""
        state, storage = self._state, self._circuit_storage
        visible = state._is_plain and storage._open_book
        state._visible = storage if visible else _HIDDEN
        clear = state._admits_all and self._told_listeners == ()
        state._shortcut = state._visible if clear else _HIDDEN
        # Spares calls that have somebody to tell the search for somebody.
        heard = (e for e in _EVENTS if not self._nobody_hears(e))
        self._heard = frozenset(heard) if self._told_listeners else _NOTHING

    def _tell(self, event: str, args: Any, kwargs: Any = None) -> None:
        for listener in tuple(self._told_listeners):  # which they may change
            try:
                method = getattr(listener, event, None)
                if method is None:
                    continue
                if kwargs:
                    method(*args, **kwargs)
                else:
                    method(*args)
            except Exception as exc:
                message = "%r failed to hear of %s"
                self._log_later(logging.ERROR, message, listener, event, exc_info=exc)

    def _log_later(self, *args: Any, **kwargs: Any) -> None:
        # Not under the lock. A handler has locks of its own, and whoever holds
        # them may be about to ask for this one, to format a breaker.
        self._unlogged = (*self._unlogged, (args, kwargs))

    def _log_what_happened(self) -> None:
        """Log what has happened under the lock, once it is released."""
        if not self._unlogged:
            return
        is_owned = getattr(self._lock, "_is_owned", None)  # threading.Condition's way
        if is_owned is None or not is_owned():
            with self._lock:
                unlogged, self._unlogged = self._unlogged, ()
            for args, kwargs in unlogged:
                _log(*args, **kwargs)

    def _after_fork(self) -> None:
        # A thread that held the lock, ran the trial or moved the circuit stayed
        # with the parent.
        self._lock = threading.RLock()
        self._trial_in_place = None
        self._cause_of_move = _BY_HAND
        self._unlogged = ()  # the parent logs it

    def _nobody_hears(self, event: str) -> bool:
        """Whether telling the listeners of the event would do nothing. Asked
        anew for each, as a method may be patched while its listener is here."""
        try:
            for listener in tuple(self._told_listeners):
                if getattr(listener, event, _DEAF_METHOD).__func__ not in _DEAF:
                    return False
        except Exception:  # it has no such method as we know: _tell() finds out
            return False
        return True

    def _breaker_error(self, message: str, wait: float) -> CircuitBreakerError:
        error = CircuitBreakerError(f"{self._name or 'unnamed breaker'}: {message}")
        error.breaker = self
        error.retry_after = wait
        return error

    @property
    def _state_storage(self) -> CircuitBreakerStorage:
        return self._circuit_storage

    @_state_storage.setter
    def _state_storage(self, storage: CircuitBreakerStorage) -> None:
        with self._lock:
            self._circuit_storage = storage
            self._find_shortcut()

    @_state_storage.deleter
    def _state_storage(self) -> None:
        del self._circuit_storage  # as in _OpenList


class CircuitBreakerState:
    """One era of a circuit: from one transition to the next.

    A call remembers the state that admitted it, and its outcome counts only
    while that very object is the breaker's state.

    `before_call`, `on_success` and `on_failure` are for code that drives a
    circuit by hand; older releases left no other way to guard a coroutine.
    """

    _admits_all = False
    _is_plain = False  # and does no more than is written here
    _rejection = ""  # that a rejected call is told

    def __init__(self, cb: CircuitBreaker, name: str) -> None:
        self._breaker: CircuitBreaker = cb
        self.name: str = name
        self.reason: str = "new"
        """Why the era began, in words: ``'by hand'``, or what happened."""
        # The storage, or its stand-in where it takes the lock to read it.
        self._visible: Any = _HIDDEN
        # The same, for calls that neither count nor have to be told.
        self._shortcut: Any = _HIDDEN

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        # A subclass may do more than its base, so it does not inherit this.
        cls._is_plain = vars(cls).get("_is_plain", False)

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}>"

    def call(self, func: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """The same as `CircuitBreaker.call`."""
        return _PLAIN_CALL(self._breaker, func, *args, **kwargs)

    def before_call(self, func: Any, *args: Any, **kwargs: Any) -> None:
        """The gate: raises `CircuitBreakerError` where a call would be rejected
        now. Half-opens an open circuit whose timeout has passed. Neither calls
        `func` nor takes the place of the trial."""
        breaker = self._breaker
        try:
            with breaker._lock:
                state = breaker.state
                wait = state._wait()
                if not wait:
                    state._start_trial()
                elif not breaker._is_within_trial():
                    raise breaker._breaker_error(state._rejection, wait)
        finally:
            breaker._log_what_happened()

    def on_success(self) -> None:
        """Decide what a success changes, if this era lasts."""
        try:
            with self._breaker._lock:
                if self is self._breaker._state:
                    self._succeeded()
        finally:
            self._breaker._log_what_happened()

    def on_failure(self, exc: BaseException) -> None:
        """Decide what a failure changes that has been counted, if this era
        lasts. Raises if it opens the circuit: `CircuitBreakerError` from `exc`,
        or `exc` where `throw_new_error_on_trip` is False."""
        try:
            with self._breaker._lock:
                if self is self._breaker._state:
                    self._failed(exc)
        finally:
            del exc  # if it is raised, its traceback holds this frame
            self._breaker._log_what_happened()

    def _handle_success(self) -> None:
        self._breaker._settle(self, None)

    def _handle_error(self, exc: BaseException, reraise: bool = True) -> None:
        try:
            self._breaker._settle(self, None, exc)
            if reraise:
                raise exc
        finally:
            del exc  # as above

    # What each state answers in its own way. The lock is held.

    def _wait(self) -> float:
        """Seconds until a call may be admitted; 0.0 is now."""
        return 0.0

    def _start_trial(self) -> None:
        """Make way for a trial."""

    def _count_failure(self) -> None:
        """Count the failure of a call that this state admitted."""

    def _succeeded(self) -> None:
        """Draw the conclusion from a success."""

    def _failed(self, exc: BaseException) -> None:
        """Draw the conclusion from a failure that has been counted."""

    def _was_found(self) -> None:
        """Begin an era that somebody else has begun in the storage."""

    def _trip(self, exc: BaseException, message: str, cause: _Cause) -> NoReturn:
        breaker = self._breaker
        try:
            # Older subclasses have an open() that returns nothing.
            if breaker._because(cause, breaker.open) is not False:
                raise breaker._breaker_error(message, breaker._state._wait()) from exc
            raise exc
        finally:
            del exc, cause  # as above


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

    def _count_failure(self) -> None:
        # The count is at the limit already where a listener that was told of
        # the failure that brought it there has caused another one.
        if self._breaker._circuit_storage.counter != self._breaker._fail_max:
            self._breaker._inc_counter()

    def _succeeded(self) -> None:
        if self._breaker._circuit_storage.counter:
            self._breaker._circuit_storage.reset_counter()

    def _failed(self, exc: BaseException) -> None:
        if self._breaker._circuit_storage.counter >= self._breaker._fail_max:
            try:
                self._trip(
                    exc,
                    "Failures threshold reached, circuit breaker opened",
                    _Cause("too many failures in a row", exc, by_count=True),
                )
            finally:
                del exc  # as above

    def _was_found(self) -> None:
        if self._breaker._circuit_storage.counter >= self._breaker._fail_max:
            self._breaker._circuit_storage.reset_counter()


class CircuitOpenState(CircuitBreakerState):
    """Calls are rejected until the timeout has passed. No call that ends now
    was admitted in this era, so none counts."""

    _is_plain = True
    _rejection = _REJECTED

    def __init__(
        self,
        cb: CircuitBreaker,
        prev_state: CircuitBreakerState | None = None,
        notify: bool = False,
    ) -> None:
        super().__init__(cb, STATE_OPEN)

    def _wait(self) -> float:
        breaker = self._breaker
        left = breaker._reset_timeout - breaker._circuit_storage.open_for()
        return left if left > 0.0 else breaker._place_wait()  # inf - inf is not

    def _start_trial(self) -> None:
        breaker = self._breaker
        breaker._because(
            _Cause("the timeout has passed", by_trial=True), breaker.half_open
        )
        if breaker._state is self:  # a subclass's half_open() did nothing
            raise breaker._breaker_error(self._rejection, 0.0)


class CircuitHalfOpenState(CircuitBreakerState):
    """One call at a time, the trial, finds out whether the trouble is over."""

    _is_plain = True
    _rejection = f"{_REJECTED}: a trial call is running"

    def __init__(
        self,
        cb: CircuitBreaker,
        prev_state: CircuitBreakerState | None = None,
        notify: bool = False,
    ) -> None:
        super().__init__(cb, STATE_HALF_OPEN)

    def _wait(self) -> float:
        return self._breaker._place_wait()

    def _count_failure(self) -> None:
        self._breaker._inc_counter()

    def _succeeded(self) -> None:
        breaker, storage = self._breaker, self._breaker._circuit_storage
        storage.increment_success_counter()
        if storage.success_counter >= breaker._success_threshold:
            breaker._because(_Cause("the trial succeeded"), breaker.close)

    def _failed(self, exc: BaseException) -> None:
        try:
            self._trip(
                exc,
                "Trial call failed, circuit breaker opened",
                _Cause("the trial failed", exc),
            )
        finally:
            del exc  # as above


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

    def state_change(
        self,
        cb: CircuitBreaker,
        old_state: CircuitBreakerState,
        new_state: CircuitBreakerState,
    ) -> None:
        """The circuit moved; the change is complete."""


class CircuitBreakerStorage:
    """Where a circuit's state and counters are kept. Subclass it.

    A subclass has at least `state`, `counter` and `opened_at` and the methods
    `increment_counter` and `reset_counter`. In calls and transitions it is used
    with the breaker's lock held and should not block, except for a claim.

    What it raises reaches the caller, chained to what the guarded function raised or
    instead of what that returned. It never counts as a failure of what is
    guarded, and leaves no trial its place.
    """

    __slots__ = ("__dict__", "__weakref__")

    _name = ""
    _successes = 0
    _open_book = False  # whether it can be read without the lock

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        # A subclass may do more than its base, so it does not inherit this.
        cls._open_book = vars(cls).get("_open_book", False)

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

    def trip(self, fail_max: float) -> None:
        """Open, because the count has reached `fail_max`."""
        self.state = STATE_OPEN

    def claim_trial(self, timeout: float) -> bool:
        """Whether this breaker may run the trial that is due; for at least
        `timeout` seconds nobody else may. Called without the lock."""
        return True

    async def claim_trial_async(self, timeout: float) -> bool:
        """The same for coroutines, on whichever event loop they run."""
        return self.claim_trial(timeout)

    def release_trial(self) -> None:
        """The trial that was claimed is over."""

    def _open_now(self) -> None:
        self.opened_at = datetime.now(timezone.utc)

    def _move(self, state: str, by_hand: bool) -> None:
        self.state = state


class CircuitMemoryStorage(CircuitBreakerStorage):
    """Keeps the state in memory, and time by the monotonic clock.

    When unpickled, it has been open for as long as the wall clock says.
    """

    # Plain attributes under both names, as a call reads them without the lock
    # to see that it has nothing to do. Tests in the field use the private ones.
    __slots__ = ("_state", "_fail_counter", "_success_counter", "_moment", "_opened")

    _name = "memory"
    _open_book = True

    _state: str
    _fail_counter: int
    _success_counter: int

    def __init__(self, state: str) -> None:
        self._state = _checked_state("state", state)
        self._fail_counter = 0
        self._success_counter = 0
        self._opened_at = None

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
        return self._moment

    @opened_at.setter
    def opened_at(self, moment: datetime | None) -> None:
        self._opened = time.monotonic() - _age(moment) if moment else _LONG_AGO
        self._moment = moment

    @opened_at.deleter
    def opened_at(self) -> None:
        del self._moment  # as in _OpenList

    _opened_at = opened_at

    def open_for(self) -> float:
        """Seconds since the opening."""
        elapsed = time.monotonic() - self._opened
        # A clock that has jumped by decades is another one (freezegun's starts
        # in 1970); then all that can be compared is the moment.
        return elapsed if -1e9 < elapsed < 1e9 else _age(self._moment)

    def _open_now(self) -> None:
        if self._open_book:  # in one step for those who read without the lock
            self._opened, self._moment = time.monotonic(), datetime.now(timezone.utc)
        else:
            super()._open_now()
            self._opened = time.monotonic()  # whatever the wall clock did meanwhile

    def __getstate__(self) -> dict[str, Any]:
        names = ("_state", "_fail_counter", "_success_counter", "_opened_at")
        return {**vars(self), **{name: getattr(self, name) for name in names}}

    def __setstate__(self, attributes: dict[str, Any]) -> None:
        for name, value in attributes.items():
            setattr(self, name, value)


for _public, _slot in (
    ("state", "_state"),
    ("counter", "_fail_counter"),
    ("success_counter", "_success_counter"),
):
    setattr(CircuitMemoryStorage, _public, vars(CircuitMemoryStorage)[_slot])


class CircuitRedisStorage(CircuitMemoryStorage):
    """Shares one circuit between processes, through Redis.

    `redis_object` is a client of redis-py or valkey-py: `Redis`, `RedisCluster`
    or the one for asyncio. Calls are decided from memory, as they are with a
    `CircuitMemoryStorage`. A thread, the courier, carries changes to Redis and
    back, every `refresh` seconds and at once after a change here. Only a call
    that is due as a trial waits for Redis, for at most `patience` seconds.

    A failure counts here at once, and the count is the fleet's, as last heard.
    The one that brings it to `fail_max` opens the circuit of this process; that
    of the others follows one to two `refresh` later, if the count still stands
    in Redis then: a success anywhere sets it back. All other moves are announced
    at once, and the last one wins. One process at a time runs a trial.

    While Redis is away each process goes by its own circuit, which it begins in
    `fallback_circuit_state` if it has never heard from Redis. `state` is what
    Redis is given where it has none.

    The keys, with `namespace` and a colon before them if there is one, are those
    of older releases, which may use them at the same time: ``pybreaker:state``,
    ``pybreaker:fail_counter``, ``pybreaker:success_counter``,
    ``pybreaker:opened_at``; and ``pybreaker:trial``. All commands are for single
    keys, so `cluster_mode` makes no difference.

    `TypeError` for something that is no client; a Redis that does not answer
    raises nothing, and is waited for no longer than `patience`.
    """

    _name = "redis"
    _open_book = True

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
        super().__init__(_checked_state("state", state))
        self._state = _checked_state("fallback_circuit_state", fallback_circuit_state)
        self._link = _RedisLink(redis_object, namespace)
        self._refresh: float = _some_time("refresh", refresh)
        self._patience: float = _some_time("patience", patience)
        # Held for moments, by breakers' threads that have their lock already,
        # and by the courier, which never has.
        self._mutex: threading.RLock = threading.RLock()
        self._away = False
        # What Redis has, as far as is known: the state and, of an open circuit,
        # `opened_at` as it is written there. What differs from this is news.
        self._shared: tuple[str, str | None] = (state, None)
        self._unheard = True
        # Opened by the count, and Redis does not say so, or not yet: until when
        # that is to be seen, and the count that it takes. None if it was seen.
        self._apart = False
        self._doubt: tuple[float, float] | None = None
        self._refused_at = _LONG_AGO
        self._claim: _Claim | None = None  # of the trial that runs
        self._lapsing: _Claim | None = None  # of the last that failed
        self._forget_errands()
        self._courier = _Courier(self)
        self._courier.start()
        _couriered[id(self)] = self
        self._wait_for_errands(time.monotonic() + self._patience)

    def _forget_errands(self) -> None:
        self._unsent: dict[str, tuple[bool, int]] = {}  # counts: "set or add", number
        self._unsent_opening = False
        self._unsent_move: str | None = None
        self._unasked: list[_Claim] = []
        self._unreturned: list[_Claim] = []
        self._waiting: list[threading.Event] = []
        self._is_carrying = False

    def _wait_for_errands(self, end: float) -> None:
        """Wait until the courier has been to Redis, or the clock says `end`."""
        done = threading.Event()
        with self._mutex:
            self._waiting.append(done)
        self._courier.wake()
        done.wait(max(0.0, end - time.monotonic()))

    # What a breaker and its owner do. A write to a public name is carried to
    # Redis; to a private one, which reads faster, it is not.

    @property
    def state(self) -> str:
        """The state's name. Setting it moves the circuit of the fleet."""
        return self._state

    @state.setter
    def state(self, state: str) -> None:
        self._move(_checked_state("state", state), by_hand=True)

    @property
    def counter(self) -> int:
        """Failures in a row, in all processes, as far as they are known here."""
        return self._fail_counter

    @counter.setter
    def counter(self, count: int) -> None:
        count = _whole_number("counter", count, 0)
        self._count("fail_counter", count, absolute=True)

    @property
    def success_counter(self) -> int:
        """Successful trials, in all processes."""
        return self._success_counter

    @success_counter.setter
    def success_counter(self, count: int) -> None:
        self._count("success_counter", count, absolute=True)

    def increment_counter(self) -> None:
        """Add one to `counter`."""
        self._count("fail_counter", 1)

    def reset_counter(self) -> None:
        """Set `counter` to 0."""
        self._count("fail_counter", 0, absolute=True)

    def increment_success_counter(self) -> None:
        """Add one to `success_counter`."""
        self._count("success_counter", 1)

    def reset_success_counter(self) -> None:
        """Set `success_counter` to 0."""
        self._count("success_counter", 0, absolute=True)

    @property
    def opened_at(self) -> datetime | None:
        """The moment of the last opening: in Redis, by its clock and in whole
        seconds. Setting it moves the opening."""
        return self._moment

    @opened_at.setter
    def opened_at(self, moment: datetime | None) -> None:
        with self._mutex:
            self._opened_at = moment
            self._unsent_opening = self._unsent_opening or not self._apart
        self._courier.wake()

    def _open_now(self) -> None:
        with self._mutex:  # while an opening elsewhere may be taken in
            super()._open_now()

    def trip(self, fail_max: float) -> None:
        """Open in this process; in the fleet if the count lasts."""
        with self._mutex:
            self._state = STATE_OPEN
            if self._away or self._shared[0] == STATE_OPEN:
                self._announce(STATE_OPEN)
            else:
                self._apart = True
                self._doubt = time.monotonic() + self._refresh, fail_max
        self._courier.wake()

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
        """The same, for asyncio and trio without holding up the event loop."""
        wait, hear = _waiter(self._patience)
        claim = self._ask(timeout, hear)
        try:
            await wait()
        except BaseException:
            self._give_back(claim)
            raise
        return self._conclude(claim)

    def release_trial(self) -> None:
        """Give the claim back, when all that was said before has been sent."""
        with self._mutex:
            claim, self._claim = self._claim, None
        if claim is not None:
            self._give_back(claim)

    def _move(self, state: str, by_hand: bool) -> None:
        with self._mutex:
            if state == STATE_HALF_OPEN and not by_hand:
                # For a trial: Redis goes on saying open. If it has just said something
                # else, that stands, and the breaker finds it at its next look.
                if self._state == STATE_OPEN:
                    self._state = state
                return
            self._state = state
            if by_hand:
                self._let_others_try()
            elif state == STATE_OPEN:  # no other trial before the claim lapses
                self._lapsing, self._claim = self._claim, None
            if self._apart and not by_hand:
                self._apart = state != STATE_CLOSED
                self._doubt = self._doubt if self._apart else None
            else:
                self._announce(state)
        self._courier.wake()

    def _let_others_try(self) -> None:
        lapsing, self._lapsing = self._lapsing, None
        if lapsing is not None:
            self._unreturned.append(lapsing)

    def _announce(self, state: str) -> None:
        self._apart, self._doubt = False, None
        self._unsent_move = state
        if state == STATE_OPEN:
            self._unsent_opening = True

    def _count(self, key: str, amount: int, absolute: bool = False) -> None:
        with self._mutex:
            name = "_" + key
            before = 0 if absolute else getattr(self, name)
            setattr(self, name, before + amount)
            if self._counts_alone():
                if self._away and (absolute, amount) == (True, 0):
                    self._unsent[key] = True, 0
                return
            if not absolute:
                absolute, unsent = self._unsent.get(key, (False, 0))
                amount += unsent
            self._unsent[key] = absolute, amount
        self._courier.wake()

    def _counts_alone(self) -> bool:
        return self._away or (self._apart and self._doubt is None)

    def _ask(self, timeout: float, hear: Callable[[], object]) -> _Claim:
        claim = _Claim(timeout, hear)
        with self._mutex:
            if self._counts_alone():
                claim.answer(True)
                return claim
            if time.monotonic() - self._refused_at < _PAUSE:
                claim.answer(False)
                return claim
            self._unasked.append(claim)
        self._courier.wake()
        return claim

    def _conclude(self, claim: _Claim) -> bool:
        with self._mutex:
            if claim.granted is False:
                return False
            self._claim = claim  # if it was not heard of, it may be on its way
            return True

    def _give_back(self, claim: _Claim) -> None:
        with self._mutex:
            self._unreturned.append(claim)
        self._courier.wake()

    # What the courier does, in its own thread.

    def _run_errands(self) -> float:
        """Carry what there is to Redis and back. Returns the seconds after which
        there will be something again."""
        with self._mutex:
            counts, self._unsent = self._unsent, {}
            move, self._unsent_move = self._unsent_move, None
            opening, self._unsent_opening = self._unsent_opening, False
            asked, self._unasked = self._unasked, []
            unreturned, self._unreturned = self._unreturned, []
            waiting, self._waiting = self._waiting, []
            self._is_carrying = True
            opened = self._opened
            # It takes a look that begins after that time, with all that was counted.
            start = time.monotonic()
            is_due = self._doubt is not None and start >= self._doubt[0]
            doubt = self._doubt if is_due else None
        try:
            if move is not None and self._away:  # its counts were not kept
                counts.setdefault("success_counter", (True, 0))
                if move == STATE_CLOSED:
                    counts.setdefault("fail_counter", (True, 0))
            writes: list[tuple[Any, ...]] = [
                ("SET" if absolute else "INCRBY", key, amount)
                for key, (absolute, amount) in counts.items()
            ]
            state, opened_at = self._shared
            if opening:
                opened_at = self._link.moment_of(opened)
                writes.append(
                    ("SET", "opened_at", opened_at)
                    if opened_at
                    else ("DEL", "opened_at")
                )
            if move is not None:
                state = move
                writes.append(("SET", "state", state))
            shared = state, opened_at if state == STATE_OPEN else None
            writes += [claim.command for claim in asked]
            picture = self._look(writes, shared, bool(asked or unreturned))
            is_news = self._take_in(picture, shared, doubt)
            mine = [claim.token for claim in unreturned]
            for claim in asked:
                if picture.holder in mine and claim.token not in mine:
                    with self._mutex:
                        self._unasked.append(claim)  # when that is given back, below
                    continue
                granted = picture.holder == claim.token and not is_news
                if not granted:
                    self._refused_at = time.monotonic()
                claim.answer(granted)
                if claim.granted is False:
                    unreturned.append(claim)
                    if picture.lease == -1:  # nobody's: whoever holds one has a lease
                        self._link.run(("PEXPIRE", "trial", claim.lease))
            for claim in unreturned:
                if picture.holder == claim.token and claim.is_safe():
                    self._link.run(("DEL", "trial"))
        except Exception as exc:
            with self._mutex:
                if self._unsent_move is None:
                    self._unsent_move = move
                self._unsent_opening = self._unsent_opening or opening
                self._unsent = {**counts, **self._unsent}
                self._unreturned += [claim for claim in unreturned if claim.is_safe()]
            self._goes_away(f"{type(exc).__name__}: {exc}")
            for claim in asked:
                claim.answer(True)
            return self._refresh
        else:
            if time.monotonic() - start <= 2 * self._refresh:
                self._is_back()
            return self._leisure()
        finally:
            self._is_carrying = False
            for done in waiting:
                done.set()

    def _look(
        self, writes: list[Any], shared: tuple[str, str | None], for_trial: bool
    ) -> _Picture:
        """Write, and read what Redis has then. What is missing or makes no sense
        is put in order: a flush does not close the circuit."""
        state, opened_at = shared
        known: list[tuple[Any, ...]] = [("SET", "state", state)]
        if opened_at is not None:
            known.insert(0, ("SET", "opened_at", opened_at))
        where_missing = [(*command, "NX") for command in known]
        if self._away:  # a Redis that can be read may still refuse writes
            writes = writes + where_missing
        for _ in range(3):
            replies = self._link.run(*writes, *_Picture.commands(for_trial))
            picture = _Picture(replies[len(writes) :])
            broken = picture.broken
            for (_, key, *_), reply in zip(writes, replies):
                if isinstance(reply, Exception):
                    if not _is_about_a_value(reply):
                        raise reply
                    broken.add(key)
            if not broken and picture.state is not None:
                return picture
            repairs: list[tuple[Any, ...]] = []
            if "trial" in broken:
                repairs.append(("DEL", "trial"))
            for key in ("fail_counter", "success_counter"):
                count = getattr(self, "_" + key)
                if key in broken:
                    repairs.append(("SET", key, count))
                elif picture.state is None and not (self._away or self._unheard):
                    repairs.append(("SET", key, count, "NX"))
            if "opened_at" in broken and opened_at is None:
                repairs.append(("DEL", "opened_at"))
            for command in known:
                repairs.append(command if command[1] in broken else (*command, "NX"))
            writes = repairs
            if broken:
                message = "%s Redis had no good value for %s; it has now"
                keys = ", ".join(sorted(broken))
                _log(logging.WARNING, message, self._link.prefix, keys)
        raise ValueError("Redis does not keep what it is given")

    def _take_in(
        self,
        picture: _Picture,
        shared: tuple[str, str | None],
        doubt: tuple[float, float] | None,
    ) -> bool:
        """Bring this process up to date. Returns whether the circuit has moved."""
        state, opened_at = picture.circuit
        is_news = self._unheard or picture.circuit != shared
        age = self._link.age_of(opened_at) if is_news and state == STATE_OPEN else 0.0
        with self._mutex:
            self._unheard = False
            self._shared = picture.circuit
            if is_news and self._unsent_move is None:
                if state != STATE_OPEN:
                    self._let_others_try()
                else:
                    self._opened, self._moment = time.monotonic() - age, picture.moment
                self._state = state
                self._apart, self._doubt = False, None
            elif doubt is not None and doubt is self._doubt:
                self._doubt = None
                if picture.fail_counter >= doubt[1]:
                    self._announce(STATE_OPEN)
            if not (self._apart and self._doubt is None):
                for key in ("fail_counter", "success_counter"):
                    absolute, unsent = self._unsent.get(key, (False, 0))
                    if not absolute:
                        setattr(self, "_" + key, getattr(picture, key) + unsent)
        return is_news

    def _leisure(self) -> float:
        with self._mutex:
            if self._unsent_move or self._unasked or self._unreturned or self._unsent:
                return 0.0
            if self._doubt is None:
                return self._refresh
            return min(self._refresh, max(0.0, self._doubt[0] - time.monotonic()))

    def _goes_away(self, why: str) -> None:
        with self._mutex:
            was_away, self._away = self._away, True
            # What failed stays here. That something succeeded is said later.
            self._unsent = {k: v for k, v in self._unsent.items() if v == (True, 0)}
            unasked, self._unasked = self._unasked, []
            if self._doubt is not None:
                self._announce(STATE_OPEN)
        for claim in unasked:
            claim.answer(True)
        if not was_away:
            message = "%s Redis is away, each process goes by its own circuit (%s)"
            _log(logging.WARNING, message, self._link.prefix, why)

    def _is_back(self) -> None:
        with self._mutex:
            was_away, self._away = self._away, False
        if was_away:
            _log(logging.INFO, "%s Redis is back", self._link.prefix)

    # Forks and the end of the program.

    def _renew(self) -> None:
        """In the child of a fork, whose parent runs the errands that there are."""
        self._mutex = threading.RLock()
        self._forget_errands()
        self._claim = self._lapsing = None
        self._link = _RedisLink(self._link.client, self._link.namespace)
        self._courier = _Courier(self)
        self._courier.start()


class _Courier:
    """Runs the errands of a `CircuitRedisStorage` in a thread of its own, until
    the storage is gone. As some clients wait for ever, another thread notices
    when Redis is silent."""

    def __init__(self, storage: CircuitRedisStorage) -> None:
        import queue  # takes a while, and is needed only here

        self._storage = weakref.ref(storage, self._wake_for_the_last_time)
        self._signals: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._nothing: type[Exception] = queue.Empty
        self._is_signalled = False
        self._lock = threading.Lock()
        self._is_running = False

    def wake(self) -> None:
        if not self._is_signalled:
            self._is_signalled = True
            self._signals.put(None)

    def _wake_for_the_last_time(self, _: object) -> None:
        self._signals.put(None)  # needs no lock, as this may run anywhere

    def start(self) -> None:
        """Begin, or go on after `stop`."""
        with self._lock:
            self._is_stopping = False
            if self._is_running:
                return
            self._is_running = True
        over = threading.Event()
        self._threads: list[threading.Thread] = [
            threading.Thread(target=target, args=(over,), name=name, daemon=True)
            for target, name in (
                (self._carry, "pybreaker courier"),
                (self._watch, "pybreaker courier's watch"),
            )
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Let both threads end."""
        with self._lock:
            self._is_stopping = True
        self._signals.put(None)

    def wait(self, end: float) -> None:
        """Wait for their end, until the clock says `end`."""
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        for thread in self._threads:
            # What join() waits for, the system may see a moment later.
            task = f"/proc/self/task/{thread.native_id}"
            while os.path.exists(task) and time.monotonic() < end:
                time.sleep(0.0001)

    def _carry(self, over: threading.Event) -> None:
        delay, link = 0.0, None
        while True:
            try:
                # Told to block for 0 s, Python 3.9 may wait for ever.
                self._signals.get(delay > 0.0, delay or None)
            except self._nothing:
                pass
            self._is_signalled = False
            storage = self._storage()
            with self._lock:
                if storage is None or self._is_stopping:
                    self._is_running = False
                    break
            link = storage._link
            delay = storage._run_errands()
            del storage
        over.set()
        if link is not None:
            link.close()

    def _watch(self, over: threading.Event) -> None:
        period = 0.0
        while not over.wait(period):
            storage = self._storage()
            if storage is None:
                return
            period = storage._refresh / 2
            asked_at = storage._link.asked_at
            if asked_at is not None:
                silence = time.monotonic() - asked_at
                if silence > 2 * storage._refresh:
                    storage._goes_away(f"no answer for {silence:.1f} s")
            del storage


class _RedisLink:
    """The way to Redis, for the courier's thread alone. Whatever the client is,
    texts are str here, and what is awaited has been awaited."""

    def __init__(self, client: Any, namespace: str | None) -> None:
        methods = "pipeline", "execute_command", "time"
        is_client = not isinstance(client, type) and all(
            callable(getattr(client, method, None)) for method in methods
        )
        pool: Any = getattr(client, "connection_pool", None)
        if not is_client or (
            _is_async(client) and not hasattr(pool, "connection_kwargs")
        ):
            raise TypeError(
                f"redis_object must be a client of redis-py or valkey-py, such as "
                f"redis.Redis(), not {client!r}"
            )
        if namespace is not None and not isinstance(namespace, str):
            raise TypeError(f"namespace must be a string or None, not {namespace!r}")
        self.client = client
        self.namespace = namespace
        self.prefix = f"{namespace}:pybreaker:" if namespace else "pybreaker:"
        self.asked_at: float | None = None  # while there is no answer
        self._own: Any = None
        self._loop: Any = None

    def run(self, *commands: tuple[Any, ...]) -> list[Any]:
        """Send commands, with their keys, in one go. Errors that Redis reports
        are among the replies."""
        pipe = self._connected().pipeline(transaction=False)
        for command, key, *rest in commands:
            key = self.prefix + key
            pipe.execute_command(command, key, *rest, NEVER_DECODE=True)
        replies = self._answer(pipe.execute, raise_on_error=False)
        return [
            r.decode("utf-8", "replace") if isinstance(r, bytes) else r for r in replies
        ]

    def time(self) -> float:
        """Redis's own."""
        now = self._answer(self._connected().time)
        if isinstance(now, dict):  # each node's of a cluster
            now = next(iter(now.values()))
        return float(now[0]) + float(now[1]) / 1e6

    def moment_of(self, opened: float) -> str | None:
        """What to write for a moment of the monotonic clock: whole seconds,
        rounded up, as older releases read no others."""
        if opened == _LONG_AGO:
            return None
        return str(math.ceil(self.time() - (time.monotonic() - opened)))

    def age_of(self, opened_at: str | None) -> float:
        """Seconds since then. No opening lies in the future."""
        return max(0.0, self.time() - int(opened_at)) if opened_at else math.inf

    def close(self) -> None:
        """Part from Redis, as far as it was not the client's own connection."""
        own, loop = self._own, self._loop
        self._own = self._loop = None
        if loop is not None:
            try:
                close = getattr(own, "aclose", None) or own.close
                loop.run_until_complete(close())
                loop.run_until_complete(own.connection_pool.disconnect())
            except Exception as exc:
                _log(logging.DEBUG, "%s the connection was lost: %r", self.prefix, exc)
            finally:
                loop.close()

    def _connected(self) -> Any:
        if not _is_async(self.client):
            return self.client
        if self._own is None:
            # An asyncio client belongs to its loop, so this one is made like it.
            import asyncio

            pool = self.client.connection_pool
            self._loop = asyncio.new_event_loop()
            # Python 3.9's locks look for it when they are made.
            asyncio.set_event_loop(self._loop)
            make_pool: Any = type(pool)
            own_pool = make_pool(
                connection_class=pool.connection_class, **pool.connection_kwargs
            )
            make_client: Any = type(self.client)
            self._own = make_client(connection_pool=own_pool)
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


def _is_async(client: Any) -> bool:
    return hasattr(type(client), "__aenter__")


class _Picture:
    """What there is in Redis under the keys of one circuit."""

    @staticmethod
    def commands(for_trial: bool) -> list[tuple[str, str]]:
        keys = ["state", "fail_counter", "success_counter", "opened_at"]
        commands = [("GET", key) for key in keys]
        return commands + [("GET", "trial"), ("PTTL", "trial")] * for_trial

    def __init__(self, replies: list[Any]) -> None:
        self.broken: set[str] = set()  # keys under which there is nonsense
        self.state = self._value("state", replies[0], _known_state)
        self.fail_counter = self._value("fail_counter", replies[1], _count_from) or 0
        self.success_counter = (
            self._value("success_counter", replies[2], _count_from) or 0
        )
        self.moment = self._value("opened_at", replies[3], _moment_from)
        opened_at = replies[3] if self.moment is not None else None
        self.circuit: tuple[Any, str | None] = (
            self.state,
            opened_at if self.state == STATE_OPEN else None,
        )
        self.holder = self.lease = None
        if replies[4:]:
            self.holder = self._value("trial", replies[4], str)
            self.lease = replies[5]

    def _value(self, key: str, reply: Any, read: Callable[[Any], _T]) -> _T | None:
        if isinstance(reply, Exception):
            if not _is_about_a_value(reply):
                raise reply
            self.broken.add(key)
        elif reply is not None:
            try:
                return read(reply)
            except (TypeError, ValueError, OverflowError, OSError):
                self.broken.add(key)
        return None


def _known_state(text: str) -> str:
    return str(_checked_state("state", text))


def _count_from(text: str) -> int:
    count = int(text)
    if count < 0:
        raise ValueError(text)
    return count


def _moment_from(text: str) -> datetime:
    return datetime.fromtimestamp(int(text), timezone.utc)


def _is_about_a_value(error: Exception) -> bool:
    """Whether Redis complains of what lies under the key, and of nothing else."""
    text = str(error)
    return any(part in text for part in ("WRONGTYPE", "wrong kind", "not an integer"))


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
            except Exception as exc:  # the event loop of who asked is gone
                _log(logging.DEBUG, "nobody waits for the answer any more: %r", exc)

    def is_safe(self) -> bool:
        """Whether it will not lapse, and be another's, before Redis is told that
        it is given back."""
        left = self._end - time.monotonic()
        return left > min(_SAFE, self.lease / 4000)


def _waiter(patience: float) -> Any:
    """A coroutine function that waits on the event loop that runs here, for at
    most `patience` seconds, and what ends the waiting, from any thread."""
    # None has no such attributes, which is an AttributeError too.
    trio: Any = sys.modules.get("trio")
    asyncio: Any = sys.modules.get("asyncio")
    try:
        trio.lowlevel.current_task()
    except (AttributeError, RuntimeError):
        pass
    else:
        return _trio_waiter(trio, patience)
    try:
        loop = asyncio.get_running_loop()
    except (AttributeError, RuntimeError):
        return _other_waiter(patience)
    return _asyncio_waiter(loop, patience)


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


class _Cause:
    """Why the circuit moves, in words and as far as it makes a difference."""

    __slots__ = ("why", "exc", "by_count", "by_trial", "by_hand")

    def __init__(
        self,
        why: str,
        exc: BaseException | None = None,
        by_count: bool = False,
        by_trial: bool = False,
        by_hand: bool = False,
    ) -> None:
        self.why: str = why
        self.exc: BaseException | None = exc
        self.by_count: bool = by_count  # the failures have reached fail_max
        self.by_trial: bool = by_trial  # a call half-opens the circuit for its trial
        self.by_hand: bool = by_hand

    def __str__(self) -> str:
        if self.exc is None:
            return self.why
        try:
            text = repr(self.exc)
        except Exception:  # the one that repr() raised
            text = type(self.exc).__name__
        # On one line and not too long, as it is logged and kept.
        return f"{self.why}: {' '.join(text[:300].split())}"


def _log(*args: Any, **kwargs: Any) -> None:
    try:
        logger.log(*args, **kwargs)
    except Exception:
        return  # a broken filter or handler is not the caller's


class _Block:
    """What `CircuitBreaker.calling` returns: good for one use."""

    def __init__(self, breaker: CircuitBreaker) -> None:
        self._breaker = breaker
        self._uses = [breaker]
        self._admitted: _Admission | None = None

    def _use(self) -> CircuitBreaker:
        try:
            return self._uses.pop()  # in one step, whatever other threads do
        except IndexError:
            raise RuntimeError("each breaker.calling() guards one block") from None

    def __enter__(self) -> None:
        breaker = self._use()
        self._admitted = breaker._admit(breaker.calling, (), {})

    async def __aenter__(self) -> None:
        breaker = self._use()
        self._admitted = await breaker._admit_async(breaker.calling, (), {})

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: types.TracebackType | None,
    ) -> None:
        if self._admitted is None:
            raise RuntimeError("breaker.calling() was left without being entered")
        (state, trial), self._admitted = self._admitted, None
        try:
            self._breaker._settle(state, trial, exc)
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


class _Unguarded:
    """Takes the breaker's place in a decorated function where a subclass's own
    call() is what guards it: admits everything, settles nothing."""

    def __init__(self) -> None:
        self._state = self
        self._shortcut = CircuitMemoryStorage(STATE_CLOSED)

    def _admit(self, func: Any, args: Any, kwargs: Any) -> Any:
        return self, None

    async def _admit_async(self, func: Any, args: Any, kwargs: Any) -> Any:
        return self, None

    def _settle(self, state: Any, trial: Any, exc: Any = None) -> None:
        """Nothing is left to do: the call inside was settled."""

    def _guard_result(self, result: Any, admitted: Any) -> Any:
        return result


# What inspect calls CO_GENERATOR, CO_COROUTINE, CO_ITERABLE_COROUTINE and
# CO_ASYNC_GENERATOR; importing it would take longer than importing this module.
_GENERATOR, _COROUTINE, _ITERABLE_COROUTINE, _ASYNC_GENERATOR = 0x20, 0x80, 0x100, 0x200
_LAZY_FLAGS = _GENERATOR | _COROUTINE | _ITERABLE_COROUTINE | _ASYNC_GENERATOR
_GUARDS_BY_FLAGS = {
    _GENERATOR: CircuitBreaker._guard_generator,
    _COROUTINE: CircuitBreaker._guard_coroutine,
    _GENERATOR | _ITERABLE_COROUTINE: CircuitBreaker._guard_iterable_coroutine,
    _ASYNC_GENERATOR: CircuitBreaker._guard_async_generator,
}
_Generator, _Coroutine = types.GeneratorType, types.CoroutineType
_AsyncGenerator = types.AsyncGeneratorType
_CODES_OF_RESULTS = {
    _Generator: "gi_code",
    _Coroutine: "cr_code",
    _AsyncGenerator: "ag_code",
}


def _guard_for(func: Any) -> Any:
    """The guard for what calling `func` makes, as far as its code tells."""
    while isinstance(func, (functools.partial, types.MethodType)):
        func = func.func if isinstance(func, functools.partial) else func.__func__
    # An AsyncMock has code too, and a method of a remote object has any attribute.
    # Of an object that can be called it is the code of its class's __call__ that
    # matters.
    for called in (func, getattr(type(func), "__call__", None)):
        flags = getattr(getattr(called, "__code__", None), "co_flags", None)
        if isinstance(flags, int):
            guard = _GUARDS_BY_FLAGS.get(flags & _LAZY_FLAGS)
            return guard or CircuitBreaker._guard_function
    return CircuitBreaker._guard_function


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


def _first_step(generator: Any) -> Any:
    # Unseen by the event loop. It closes what it has seen at its end, which is
    # for the guard around the generator to do: two at a time cannot. Nor must the
    # collector, which may come to what is inside first.
    hooks = sys.get_asyncgen_hooks()
    sys.set_asyncgen_hooks(None, _leave_it)
    try:
        return generator.__anext__()
    finally:
        sys.set_asyncgen_hooks(*hooks)


def _leave_it(generator: Any) -> None:
    """Let the guard around the generator close it, and not the collector."""


def _unless_closed(exc: BaseException, closed: bool) -> BaseException | None:
    # Closing a generator at one of its yields is a success, not an exception. A
    # GeneratorExit that arrives where it awaits means that its task is gone.
    return None if closed and isinstance(exc, GeneratorExit) else exc


def _is_abandonment(exc: BaseException) -> bool:
    """Whether `exc` says that the call was given up, not how it went."""
    if isinstance(exc, _imported(_GROUPS)):
        group: Any = exc
        return all(map(_is_abandonment, group.exceptions))
    return isinstance(exc, _imported(_ABANDONING))


_GROUPS = "builtins.BaseExceptionGroup", "exceptiongroup.BaseExceptionGroup"
_ABANDONING = (
    "builtins.KeyboardInterrupt",
    "builtins.SystemExit",
    "builtins.GeneratorExit",
    "asyncio.CancelledError",
    "trio.Cancelled",
    "greenlet.GreenletExit",
)


def _imported(names: tuple[str, ...]) -> tuple[type, ...]:
    """Those of the classes that were imported; the others were never raised."""
    found = []
    for name in names:
        module, _, attribute = name.partition(".")
        cls = getattr(sys.modules.get(module), attribute, None)
        if isinstance(cls, type):
            found.append(cls)
    return tuple(found)


def _age(moment: datetime | None) -> float:
    """Seconds since a moment, by the wall clock."""
    if not moment:
        return math.inf
    return (datetime.now(timezone.utc) - _utc(moment)).total_seconds()


def _utc(moment: datetime) -> datetime:
    if moment.tzinfo is None:
        return moment.replace(tzinfo=timezone.utc)
    return moment.astimezone(timezone.utc)


def _finite(number: float) -> float | None:
    return None if number == math.inf else number


def _in(seconds: float) -> str:
    return "only by hand" if seconds == math.inf else f"in {float(seconds):.1f} s"


def _checked_state(parameter: str, state: Any) -> Any:
    if state not in (STATE_CLOSED, STATE_OPEN, STATE_HALF_OPEN):
        raise ValueError(f"{parameter} must be {_STATE_NAMES}, not {state!r}")
    return state


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


def _some_time(parameter: str, value: Any) -> Any:
    seconds = _seconds(parameter, value)
    if not 0 < seconds < math.inf:
        raise ValueError(f"{parameter} must be some seconds, not {value!r}")
    return seconds


def _integer(parameter: str, value: Any, what: str) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{parameter} must be {what}, not {value!r}") from None


def _checked_exclusions(exclude: Any) -> tuple[Any, ...]:
    if exclude is None:
        return ()
    if hasattr(type(exclude), "__float__"):
        raise TypeError(
            f"exclude must be an iterable of exception classes and predicates, not "
            f"{exclude!r}; for a number of trials write success_threshold={exclude!r}"
        )
    if isinstance(exclude, type) or not _is_iterable(exclude):
        how = getattr(exclude, "__name__", "...")
        raise TypeError(
            f"exclude must be an iterable of exception classes and predicates, not "
            f"{exclude!r}; write exclude=[{how}]"
        )
    return tuple(_checked_exclusion(exclusion) for exclusion in exclude)


def _checked_exclusion(exclusion: Any) -> Any:
    if not callable(exclusion):
        raise TypeError(
            f"exclude takes exception classes and predicates that are called with "
            f"the exception, not {exclusion!r}; write exclude=[ValueError, ...]"
        )
    return exclusion


def _checked_listeners(listeners: Any) -> tuple[Any, ...]:
    if listeners is None:
        return ()
    if not _is_iterable(listeners):
        raise TypeError(
            f"listeners must be an iterable of listeners, not {listeners!r}; "
            f"write listeners=[...]"
        )
    return tuple(_checked_listener(listener) for listener in listeners)


_EVENTS = ("before_call", "failure", "success", "rejected", "state_change")


def _checked_listener(listener: Any) -> Any:
    if isinstance(listener, type) and issubclass(listener, CircuitBreakerListener):
        raise TypeError(f"listeners takes objects, not the class {listener!r}: add ()")
    if not any(callable(getattr(listener, event, None)) for event in _EVENTS):
        raise TypeError(
            f"listeners takes objects with at least one of the methods "
            f"{', '.join(_EVENTS)}; {listener!r} has none"
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


_LONG_AGO = -math.inf
_PAUSE = 0.1  # seconds between claims, after one was refused
_SAFE = 0.25  # seconds that a word to Redis is hardly ever under way
_LONGEST_LEASE = 86_400.0  # seconds: whoever is killed cannot give the claim back
_NOTHING: frozenset[str] = frozenset()

# Methods of listeners that do nothing.
_DEAF = frozenset(getattr(CircuitBreakerListener, event) for event in _EVENTS)
_DEAF_METHOD: Any = CircuitBreakerListener().success

_STATE_NAMES = f"{STATE_CLOSED!r}, {STATE_OPEN!r} or {STATE_HALF_OPEN!r}"
_PLAIN_CALL = CircuitBreaker.call

# In no state and with failures to forget, so that no call passes it by.
_HIDDEN = CircuitMemoryStorage(STATE_OPEN)
_HIDDEN._state = "hidden"
_HIDDEN._fail_counter = 1

_UNGUARDED: Any = _Unguarded()

# Admits the calls within a trial, so it never is a breaker's present state.
_WITHIN = CircuitBreakerState(_UNGUARDED, "within a trial")

_BY_HAND = _Cause("by hand", by_hand=True)
_FOUND = _Cause("found so in the storage")

# The trials that the running code is within.
_trials: contextvars.ContextVar[tuple[_Trial, ...]] = contextvars.ContextVar(
    "pybreaker_trials", default=()
)

# All there are, for the child of a fork. A subclass's need not be hashable.
_breakers: weakref.WeakValueDictionary[int, CircuitBreaker] = (
    weakref.WeakValueDictionary()
)


# The storages that have threads, for forks and for the end of the program.
_couriered: weakref.WeakValueDictionary[int, CircuitRedisStorage] = (
    weakref.WeakValueDictionary()
)


def _before_fork() -> None:
    # Python warns of a fork beside other threads, and so it should.
    storages = list(_couriered.values())
    for storage in storages:
        storage._courier.stop()
    begin = time.monotonic()
    for storage in storages:
        storage._courier.wait(begin + storage._patience)


def _after_fork_in_parent() -> None:
    for storage in list(_couriered.values()):
        storage._courier.start()


def _after_fork() -> None:
    for breaker in list(_breakers.values()):
        breaker._after_fork()
    for storage in list(_couriered.values()):
        storage._renew()


def _at_exit() -> None:
    begin = time.monotonic()
    for storage in list(_couriered.values()):
        if storage._is_carrying or not storage._leisure():
            storage._wait_for_errands(begin + storage._patience)


# Windows has no forks.
getattr(os, "register_at_fork", lambda **_: None)(
    before=_before_fork,
    after_in_parent=_after_fork_in_parent,
    after_in_child=_after_fork,
)
atexit.register(_at_exit)
