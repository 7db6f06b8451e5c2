"""The client middleware for aiohttp, which `pybreaker_extras.http` exports."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Awaitable, Callable, Hashable, Iterable
from typing import Any

import aiohttp
from aiohttp.http import HttpProcessingError

from pybreaker import CircuitBreakerError, CircuitBreakers, FailedResult
from pybreaker_extras.http import FAILURE_STATUSES, RETRY_AFTER_STATUSES, Layer

if not hasattr(aiohttp, "ClientMiddlewareType"):
    raise ImportError(
        f"breaker_middleware needs aiohttp 3.12 or later, which has client "
        f"middlewares, not {aiohttp.__version__}: python -m pip install -U aiohttp"
    )

_FAILURES = (
    aiohttp.ClientConnectionError,
    aiohttp.ClientHttpProxyError,
    asyncio.TimeoutError,
    ConnectionError,
    TimeoutError,
)
_RETRIED = (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError)
_IDEMPOTENT = frozenset({"GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE"})


class Rejected(CircuitBreakerError, aiohttp.ClientError):
    """The breaker rejected the request, which was not sent."""


class _FailedResult(FailedResult):
    """Hides the headers of the response, such as cookies: reasons and the log show the
    repr of an exception, and aiohttp's repr of a response has all headers."""

    def __repr__(self) -> str:
        response: Any = self.result
        return f"FailedResult(<ClientResponse [{response.status}]>)"


class _AiohttpLayer(Layer):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        # The tasks in which aiohttp is about to send a request for the second time.
        self._retrying: weakref.WeakSet[Any] = weakref.WeakSet()

    def status_of(self, response: Any) -> Any:
        return response.status

    def failed_result(self, response: Any) -> FailedResult:
        return _FailedResult(response)

    def is_failure(self, request: Any, exc: Exception) -> bool:
        if isinstance(exc, _FAILURES):
            return not self._is_retried(request, exc)
        # The host answered, but not in HTTP.
        return isinstance(exc, aiohttp.ClientResponseError) and isinstance(
            exc.__cause__, HttpProcessingError
        )

    def _is_retried(self, request: Any, exc: Exception) -> bool:
        """Whether aiohttp sends the request once more, because the host may have closed
        the kept connection while it was idle. Only the outcome of the second sending
        is counted, so that closed idle connections open no circuit."""
        task = asyncio.current_task()
        if task in self._retrying or not (
            isinstance(exc, _RETRIED)
            and not isinstance(exc, aiohttp.ClientConnectorError)
            and request.method in _IDEMPOTENT
            # aiohttp sends no body twice, as the first sending may have used it up.
            and "Transfer-Encoding" not in request.headers
            and request.headers.get("Content-Length", "0") == "0"
            and getattr(request.session, "_retry_connection", False)
        ):
            return False
        self._retrying.add(task)
        return True

    def rejection(self, request: Any) -> CircuitBreakerError:
        return Rejected()

    async def send_async(self, request: Any, send: Any) -> Any:
        task = asyncio.current_task()
        is_retry = task in self._retrying
        try:
            return await super().send_async(request, send)
        finally:
            if is_retry:
                self._retrying.discard(task)


def breaker_middleware(
    breakers: CircuitBreakers,
    *,
    key: Callable[[aiohttp.ClientRequest], Hashable] | None = None,
    failure_statuses: Iterable[int] = FAILURE_STATUSES,
    retry_after_statuses: Iterable[int] = RETRY_AFTER_STATUSES,
    retry_after_max: float = 300,
) -> Callable[
    [
        aiohttp.ClientRequest,
        Callable[[aiohttp.ClientRequest], Awaitable[aiohttp.ClientResponse]],
    ],
    Awaitable[aiohttp.ClientResponse],
]:
    """A client middleware that sends each request through a breaker, for
    ``aiohttp.ClientSession(middlewares=[...])``.

    `breakers` is a `pybreaker.CircuitBreakers`. Its keys are host and port, or what
    `key` returns when called with the `aiohttp.ClientRequest`.

    A connection error, a timeout and a response whose status is in `failure_statuses`
    are failures. A response with a status in `retry_after_statuses` and a Retry-After
    opens the circuit for as long as the Retry-After says, at most for
    `retry_after_max` seconds (0: never). A rejected request raises an error that is a
    `pybreaker.CircuitBreakerError` and an `aiohttp.ClientError`. The guarded call ends
    when the head of the response has come. `breaker_middleware` raises `TypeError` for
    an argument of the wrong kind and `ValueError` for one out of range.
    """
    layer = _AiohttpLayer(
        breakers, key, failure_statuses, retry_after_statuses, retry_after_max
    )

    async def middleware(
        request: aiohttp.ClientRequest,
        handler: Callable[[aiohttp.ClientRequest], Awaitable[aiohttp.ClientResponse]],
    ) -> aiohttp.ClientResponse:
        response: aiohttp.ClientResponse = await layer.send_async(request, handler)
        return response

    return middleware
