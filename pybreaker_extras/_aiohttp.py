"""The client middleware of aiohttp that `pybreaker_extras.http` makes."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Awaitable, Callable, Hashable, Iterable
from typing import Any

import aiohttp
from aiohttp.http import HttpProcessingError

from pybreaker import CircuitBreakerError, CircuitBreakers
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
    """A request that its breaker did not admit, so that it was not sent."""


class _AiohttpLayer(Layer):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        # The tasks in which aiohttp is about to send a request for the second time.
        self._retrying: weakref.WeakSet[Any] = weakref.WeakSet()

    def status_of(self, response: Any) -> Any:
        return response.status

    def is_failure(self, request: Any, exc: Exception) -> bool:
        if isinstance(exc, _FAILURES):
            return not self._is_retried(request, exc)
        # What came was no HTTP.
        return isinstance(exc, aiohttp.ClientResponseError) and isinstance(
            exc.__cause__, HttpProcessingError
        )

    def _is_retried(self, request: Any, exc: Exception) -> bool:
        """Whether aiohttp sends the request again, once, because the connection that
        was kept may have been closed meanwhile. Only how that ends is counted, so
        that connections which the host closes while they are idle open no circuit."""
        task = asyncio.current_task()
        if task in self._retrying or not (
            isinstance(exc, _RETRIED)
            and not isinstance(exc, aiohttp.ClientConnectorError)
            and request.method in _IDEMPOTENT
            # A body may be gone with the first attempt, and then there is no second.
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

    `breakers` is a `pybreaker.CircuitBreakers`, which has one for each host and port,
    or for what `key` returns of an `aiohttp.ClientRequest`.

    A connection error, a timeout and a response whose status is in `failure_statuses`
    are failures. A Retry-After in a response whose status is in
    `retry_after_statuses` opens the circuit for so long, at most for
    `retry_after_max` seconds (0: never). A rejected request raises an error that is a
    `pybreaker.CircuitBreakerError` and an `aiohttp.ClientError`. The guarded call ends
    when the head of the response has come.
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
