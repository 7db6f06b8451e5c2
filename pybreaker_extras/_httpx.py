"""The transports for httpx, which `pybreaker_extras.http` exports."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from types import TracebackType
from typing import Any, cast

import httpx

from pybreaker import CircuitBreakerError, CircuitBreakers
from pybreaker_extras.http import FAILURE_STATUSES, RETRY_AFTER_STATUSES, Layer

_NOT_THE_HOST = (
    httpx.UnsupportedProtocol,
    httpx.LocalProtocolError,
    httpx.PoolTimeout,  # the pool of the client has no connection to spare
)
_FAILURES = (httpx.TransportError, ConnectionError, TimeoutError)


class Rejected(CircuitBreakerError, httpx.TransportError):
    """The breaker rejected the request, which was not sent."""

    # httpx keeps the request in this attribute. Pickling drops the request.
    _request: httpx.Request | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        cls, args, attributes = super().__reduce__()
        attributes.pop("_request", None)
        return cls, args, attributes


class _HttpxLayer(Layer):
    def is_failure(self, request: Any, exc: Exception) -> bool:
        return isinstance(exc, _FAILURES) and not isinstance(exc, _NOT_THE_HOST)

    def rejection(self, request: httpx.Request) -> CircuitBreakerError:
        error = Rejected("")
        error.request = request
        return error

    async def discard(self, response: httpx.Response) -> None:
        await response.aclose()


class BreakerTransport(httpx.BaseTransport):
    """A transport of `httpx.Client` that sends each request through a breaker.

    `breakers` is a `pybreaker.CircuitBreakers`. Its keys are host and port, or what
    `key` returns when called with the `httpx.Request`. `transport` sends the requests;
    by default an `httpx.HTTPTransport`.

    A connection error, a timeout and a response whose status is in `failure_statuses`
    are failures. A response with a status in `retry_after_statuses` and a Retry-After
    opens the circuit for as long as the Retry-After says, at most for
    `retry_after_max` seconds (0: never). A rejected request raises an error that is a
    `pybreaker.CircuitBreakerError` and an `httpx.TransportError`. The guarded call
    ends when the head of the response has come. The constructor raises `TypeError` for
    an argument of the wrong kind and `ValueError` for one out of range.
    """

    def __init__(
        self,
        breakers: CircuitBreakers,
        *,
        transport: httpx.BaseTransport | None = None,
        key: Callable[[httpx.Request], Hashable] | None = None,
        failure_statuses: Iterable[int] = FAILURE_STATUSES,
        retry_after_statuses: Iterable[int] = RETRY_AFTER_STATUSES,
        retry_after_max: float = 300,
    ) -> None:
        self._layer = _HttpxLayer(
            breakers, key, failure_statuses, retry_after_statuses, retry_after_max
        )
        if transport is None:
            transport = httpx.HTTPTransport()
        _check_transport(transport, "handle_request", "httpx.BaseTransport")
        self._transport: httpx.BaseTransport = transport

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        response = self._layer.send(request, self._transport.handle_request)
        return cast("httpx.Response", response)

    def close(self) -> None:
        self._transport.close()

    def __enter__(self) -> BreakerTransport:
        self._transport.__enter__()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None = None,
        exc_value: BaseException | None = None,
        traceback: TracebackType | None = None,
    ) -> None:
        self._transport.__exit__(exc_type, exc_value, traceback)


class AsyncBreakerTransport(httpx.AsyncBaseTransport):
    """A transport of `httpx.AsyncClient` that sends each request through a breaker,
    with the arguments and errors of `BreakerTransport`. `transport` is by default an
    `httpx.AsyncHTTPTransport`."""

    def __init__(
        self,
        breakers: CircuitBreakers,
        *,
        transport: httpx.AsyncBaseTransport | None = None,
        key: Callable[[httpx.Request], Hashable] | None = None,
        failure_statuses: Iterable[int] = FAILURE_STATUSES,
        retry_after_statuses: Iterable[int] = RETRY_AFTER_STATUSES,
        retry_after_max: float = 300,
    ) -> None:
        self._layer = _HttpxLayer(
            breakers, key, failure_statuses, retry_after_statuses, retry_after_max
        )
        if transport is None:
            transport = httpx.AsyncHTTPTransport()
        _check_transport(transport, "handle_async_request", "httpx.AsyncBaseTransport")
        self._transport: httpx.AsyncBaseTransport = transport

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        send = self._transport.handle_async_request
        return cast("httpx.Response", await self._layer.send_async(request, send))

    async def aclose(self) -> None:
        await self._transport.aclose()

    async def __aenter__(self) -> AsyncBreakerTransport:
        await self._transport.__aenter__()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None = None,
        exc_value: BaseException | None = None,
        traceback: TracebackType | None = None,
    ) -> None:
        await self._transport.__aexit__(exc_type, exc_value, traceback)


def _check_transport(transport: Any, method: str, kind: str) -> None:
    is_class = isinstance(transport, type)
    if is_class or not callable(getattr(transport, method, None)):
        raise TypeError(f"transport must be an {kind}, not {transport!r}")
