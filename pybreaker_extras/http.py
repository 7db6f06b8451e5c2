"""HTTP clients with a breaker for each host.

    import httpx
    from pybreaker import CircuitBreakers
    from pybreaker_extras.http import BreakerTransport

    breakers = CircuitBreakers(fail_max=25, window_size=50)
    client = httpx.Client(transport=BreakerTransport(breakers))

`BreakerTransport` and `AsyncBreakerTransport` are transports of httpx,
`BreakerAdapter` is an adapter of requests, and `breaker_middleware` makes a client
middleware of aiohttp. Each of these names imports its client when first used.
"""

# How it works
#
# A Layer finds the breaker of a request and makes an _Attempt, whose send() or
# send_async() the breaker guards. The guarded function raises, so that the breaker
# needs no settings for HTTP:
#
#   the client's own exception   where that exception is a failure
#   a FailedResult               for a response with a failure status
#   _Ignored                     for any other exception of the client; _Ignored
#                                abandons the call
#
# When the breaker has settled the call, _Attempt.answer finds what the caller gets: the
# response or the exception of the client.

from __future__ import annotations

import importlib
import re
import time
from collections.abc import Callable, Hashable, Iterable
from datetime import timezone
from typing import TYPE_CHECKING, Any, Optional
from urllib.parse import urlsplit

from pybreaker import (
    STATE_CLOSED,
    STATE_OPEN,
    CircuitBreaker,
    CircuitBreakerError,
    CircuitBreakers,
    FailedResult,
)

if TYPE_CHECKING:
    from pybreaker_extras._aiohttp import breaker_middleware as breaker_middleware
    from pybreaker_extras._httpx import (
        AsyncBreakerTransport as AsyncBreakerTransport,
    )
    from pybreaker_extras._httpx import BreakerTransport as BreakerTransport
    from pybreaker_extras._requests import BreakerAdapter as BreakerAdapter

FAILURE_STATUSES = (429, 500, 502, 503, 504)
RETRY_AFTER_STATUSES = (503,)

Key = Optional[Callable[[Any], Hashable]]

_CLIENTS = {
    "AsyncBreakerTransport": "httpx",
    "BreakerAdapter": "requests",
    "BreakerTransport": "httpx",
    "breaker_middleware": "aiohttp",
}
_PORTS = {"http": 80, "https": 443, "ws": 80, "wss": 443}
_LONGEST_HEADER = 100  # characters; a longer Retry-After is nonsense


def __getattr__(name: str) -> Any:
    client = _CLIENTS.get(name)
    if client is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f"pybreaker_extras._{client}")
    except ModuleNotFoundError as exc:
        if exc.name != client:
            raise
        raise ImportError(
            f"{name} needs {client}, which is not installed: "
            f"python -m pip install 'pybreaker[{client}]'"
        ) from exc
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_CLIENTS})


def host_and_port(url: str) -> str | None:
    """The host and the port of a URL, such as ``"api.example.org:443"``; None if the
    URL names no host. This is the key of a breaker where no `key` is given."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port or _PORTS.get(parts.scheme)
    except ValueError:
        return None
    if not host:
        return None
    if ":" in host:
        host = f"[{host}]"
    return host if port is None else f"{host}:{port}"


def seconds_to_wait(header: str | None) -> float:
    """The seconds that a Retry-After header asks for, as a number or by a date. 0.0 for
    a missing header, a past date or nonsense."""
    text = (header or "")[: _LONGEST_HEADER + 1].strip()
    if len(text) > _LONGEST_HEADER:
        return 0.0
    if re.fullmatch("[0-9]+", text):
        return float(text)
    if not text:
        return 0.0
    from email.utils import parsedate_to_datetime  # few responses have a date

    try:
        date = parsedate_to_datetime(text)
        if date.tzinfo is None:  # HTTP allows asctime's format, which has no zone
            date = date.replace(tzinfo=timezone.utc)
        return max(0.0, date.timestamp() - time.time())
    except Exception:  # a server may send anything, and no header may raise here
        return 0.0


class Layer:
    """Sends each request through its breaker. Each client has a subclass. The
    constructor raises `TypeError` or `ValueError` for a wrong setting."""

    def __init__(
        self,
        breakers: CircuitBreakers,
        key: Key,
        failure_statuses: Iterable[int],
        retry_after_statuses: Iterable[int],
        retry_after_max: float,
    ) -> None:
        if not isinstance(breakers, CircuitBreakers):
            raise TypeError(
                f"breakers must be CircuitBreakers, which has a breaker for each key, "
                f"not {breakers!r}: write CircuitBreakers(fail_max=5)"
            )
        if key is not None and (isinstance(key, type) or not callable(key)):
            raise TypeError(
                f"key must be a function that is called with the request and returns "
                f"the key of its breaker, or None, not {key!r}"
            )
        if key is not None and _is_lazy(key):
            raise TypeError(
                f"key must be a plain function: nothing would run what {key!r} returns"
            )
        self.breakers = breakers
        self.key = key
        self.failure_statuses = _checked_statuses("failure_statuses", failure_statuses)
        self.retry_after_statuses = _checked_statuses(
            "retry_after_statuses", retry_after_statuses
        )
        self.retry_after_max = _checked_maximum(retry_after_max)

    # Subclasses override these methods for their client.

    def url_of(self, request: Any) -> str:
        return str(request.url)

    def status_of(self, response: Any) -> Any:
        return response.status_code

    def failed_result(self, response: Any) -> FailedResult:
        return FailedResult(response)

    def is_failure(self, request: Any, exc: Exception) -> bool:
        """Whether an exception of the client is a failure of the host."""
        raise NotImplementedError

    def rejection(self, request: Any) -> CircuitBreakerError:
        """The error for a rejected request: a `CircuitBreakerError` that is also an
        exception of the client's own kind."""
        raise NotImplementedError

    async def discard(self, response: Any) -> None:
        """Close a response that the caller does not get."""
        response.close()

    # send and send_async differ only by the word await.

    def send(self, request: Any, send: Any) -> Any:
        attempt = self._attempt(request, send)
        if attempt is None:
            return send(request)
        try:
            response = attempt.breaker.call(attempt.send, request)
        except BaseException as exc:
            raised = attempt.answer(exc)
            if raised is exc:
                del raised
                if attempt.response is not None:
                    attempt.response.close()
                raise
        else:
            attempt.answer()
            return response
        try:
            return attempt.give(raised)
        finally:
            del raised  # else the exception, its traceback and this frame are a cycle

    async def send_async(self, request: Any, send: Any) -> Any:
        attempt = self._attempt(request, send)
        if attempt is None:
            return await send(request)
        try:
            response = await attempt.breaker.call_async(attempt.send_async, request)
        except BaseException as exc:
            raised = attempt.answer(exc)
            if raised is exc:
                del raised
                if attempt.response is not None:
                    await self.discard(attempt.response)
                raise
        else:
            attempt.answer()
            return response
        try:
            return attempt.give(raised)
        finally:
            del raised  # else the exception, its traceback and this frame are a cycle

    def _attempt(self, request: Any, send: Any) -> _Attempt | None:
        """The attempt to send the request through its breaker. None if the URL names no
        host, for which the client has an error of its own."""
        if self.key is None:
            key: Hashable = host_and_port(self.url_of(request))
            if key is None:
                return None
        else:
            key = self.key(request)
        try:
            breaker = self.breakers[key]
        except TypeError:
            if _can_be_hashed(key):
                raise
            raise TypeError(
                f"key must return something that can be hashed, such as a string or a "
                f"tuple, not {key!r}"
            ) from None
        return _Attempt(self, breaker, request, send)


def _can_be_hashed(key: object) -> bool:
    try:
        hash(key)
    except TypeError:
        return False
    return True


class _Ignored(GeneratorExit):
    """Abandons a guarded call whose exception says nothing about the host: no setting
    makes a breaker count a call that ends with a `GeneratorExit`."""


class _Attempt:
    """One request on its way through a breaker."""

    def __init__(
        self, layer: Layer, breaker: CircuitBreaker, request: Any, send: Any
    ) -> None:
        self.breaker = breaker
        self.response: Any = None
        self._layer = layer
        self._request = request
        self._send = send
        self._exc: BaseException | None = None  # what the client raised
        self._has_run = False
        self._era: Any = None  # the breaker's state when the request began to run
        self._wait = 0.0  # seconds for which the response asks the circuit to open
        # A call within a trial decides nothing, nor does a call that runs only because
        # of a dry run. While such a call runs, retry_after is above 0.
        is_closed = breaker._state.name == STATE_CLOSED
        self._decides = is_closed or not breaker.retry_after

    # The breaker guards send() or send_async().

    def send(self, request: Any) -> Any:
        self._begin()
        try:
            response = self._send(request)
        except Exception as exc:
            self._judge(exc)
            raise
        except BaseException as exc:
            self._exc = exc
            raise
        return self._judged(response)

    async def send_async(self, request: Any) -> Any:
        self._begin()
        try:
            response = await self._send(request)
        except Exception as exc:
            self._judge(exc)
            raise
        except BaseException as exc:
            self._exc = exc
            raise
        return self._judged(response)

    def _begin(self) -> None:
        # A subclass of CircuitBreaker may run a guarded call again, from the start.
        self.response = self._exc = None
        self._wait = 0.0
        self._has_run = True
        self._era = self.breaker._state

    def _judge(self, exc: Exception) -> None:
        self._exc = exc
        if not self._layer.is_failure(self._request, exc):
            raise _Ignored from None

    def _judged(self, response: Any) -> Any:
        self.response = response
        layer, status = self._layer, self._layer.status_of(response)
        if status in layer.retry_after_statuses and layer.retry_after_max:
            asked = seconds_to_wait(response.headers.get("Retry-After"))
            # An open circuit admits no call, so a call that found the circuit open
            # when the call began to run is late.
            is_of_present_era = (
                self._decides
                and self._era is self.breaker._state
                and self._era.name != STATE_OPEN
            )
            if is_of_present_era:
                self._wait = min(asked, layer.retry_after_max)
        if status in layer.failure_statuses:
            raise layer.failed_result(response)
        return response

    # After the breaker has settled the call.

    def answer(self, raised: BaseException | None = None) -> BaseException | None:
        """The exception that the caller gets, or None if the caller gets the response.
        `raised` is the exception that the breaker raised, or None."""
        exc, self._exc = self._exc, None  # else exc, its traceback and self are a cycle
        self._open_as_asked()
        if not self._has_run:
            if isinstance(raised, CircuitBreakerError):
                return self._rejection(raised)
            return raised
        if isinstance(raised, (CircuitBreakerError, FailedResult, _Ignored)):
            return exc  # None if the call failed by the status of the response
        return raised

    def give(self, exc: BaseException | None) -> Any:
        """Return the response, or raise `exc` unless None. The caller handles no
        exception at that time, so that Python chains none to `exc`."""
        try:
            if exc is not None:
                raise exc
            return self.response
        finally:
            del exc  # else exc, its traceback and this frame are a cycle

    def _rejection(self, error: CircuitBreakerError) -> CircuitBreakerError:
        rejection = self._layer.rejection(self._request)
        rejection.args = error.args
        vars(rejection).update(vars(error))
        rejection.__cause__ = error.__cause__
        return rejection

    def _open_as_asked(self) -> None:
        """Open the circuit for the seconds that the response asked for, unless the
        circuit stays open for longer anyway."""
        breaker, wait = self.breaker, self._wait
        if not wait:
            return
        with breaker._lock:
            now = breaker._state
            # The settlement of this call may have moved the circuit, but only to a
            # state with another name. A new state of the same name is a move by hand.
            if now is not self._era and now.name == self._era.name:
                return
            if now.name == STATE_OPEN and breaker.retry_after >= wait:
                return
            status = self._layer.status_of(self.response)
            _open(breaker, wait, f"status {status} with Retry-After: {wait:.0f} s")
        # Reading the state hands the log records of open() on, without the lock.
        str(breaker.state)


def _open(breaker: CircuitBreaker, seconds: float, reason: str) -> None:
    """Open the circuit by `breaker.open()`, which in a subclass may take fewer
    arguments."""
    method: Any = breaker.open
    if getattr(method, "__func__", None) is CircuitBreaker.open:
        method(seconds, reason)
        return
    import inspect  # imported here, as few subclasses override open()

    for args, kwargs in (((seconds,), {"reason": reason}), ((seconds,), {})):
        try:
            inspect.signature(method).bind(*args, **kwargs)
        except (TypeError, ValueError):
            continue
        method(*args, **kwargs)
        return
    method()


# Checks of arguments.


def _is_lazy(function: Any) -> bool:
    """Whether the function returns a coroutine or a generator. Such an object can be
    hashed, but would be another key for each request."""
    import inspect  # imported here, as importing inspect takes long

    return any(
        is_lazy(each)
        for each in (function, type(function).__call__)
        for is_lazy in (
            inspect.iscoroutinefunction,
            inspect.isgeneratorfunction,
            inspect.isasyncgenfunction,
        )
    )


def _checked_statuses(parameter: str, statuses: Any) -> frozenset[int]:
    how = f"{parameter} must be an iterable of HTTP statuses such as (502, 503)"
    if isinstance(statuses, (str, bytes)):
        raise TypeError(f"{how}, not {statuses!r}")
    try:
        statuses = tuple(statuses)
    except TypeError:
        raise TypeError(f"{how}, not {statuses!r}") from None
    for status in statuses:
        if not isinstance(status, int) or isinstance(status, bool):
            raise TypeError(f"{how}; {status!r} is no number")
        if not 100 <= status <= 999:
            raise ValueError(f"{how}; {status!r} is none")
    return frozenset(map(int, statuses))


def _checked_maximum(seconds: Any) -> float:
    if not isinstance(seconds, (int, float)) or isinstance(seconds, bool):
        raise TypeError(
            f"retry_after_max must be a number of seconds, not {seconds!r}; "
            f"0 leaves Retry-After out of account"
        )
    if not seconds >= 0:  # also refuses NaN
        raise ValueError(
            f"retry_after_max must be at least 0 seconds, not {seconds!r}; "
            f"0 leaves Retry-After out of account"
        )
    return seconds
