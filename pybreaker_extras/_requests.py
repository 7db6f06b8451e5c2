"""The adapter for requests, which `pybreaker_extras.http` exports."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any, cast

import requests
from requests.adapters import BaseAdapter, HTTPAdapter
from urllib3.exceptions import ClosedPoolError, EmptyPoolError

from pybreaker import CircuitBreakerError, CircuitBreakers
from pybreaker_extras.http import FAILURE_STATUSES, RETRY_AFTER_STATUSES, Layer

_FAILURES = (
    requests.ConnectionError,
    requests.Timeout,
    requests.exceptions.RetryError,  # urllib3 has retried failure statuses in vain
    ConnectionError,
    TimeoutError,
)
_NOT_THE_HOST = (EmptyPoolError, ClosedPoolError)


class Rejected(CircuitBreakerError, requests.RequestException):
    """The breaker rejected the request, which was not sent."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Pickling drops the request.
        cls, args, attributes = super().__reduce__()
        attributes["request"] = None
        return cls, args, attributes


class _RequestsLayer(Layer):
    def is_failure(self, request: Any, exc: Exception) -> bool:
        if not isinstance(exc, _FAILURES):
            return False
        # The first argument of exc is an exception of urllib3: the cause itself, or a
        # MaxRetryError whose attribute `reason` is the cause.
        cause = exc.args[0] if exc.args else None
        return not isinstance(getattr(cause, "reason", cause), _NOT_THE_HOST)

    def rejection(self, request: requests.PreparedRequest) -> CircuitBreakerError:
        return Rejected(request=request)


class BreakerAdapter(BaseAdapter):
    """An adapter for `requests.Session.mount` that sends each request through a
    breaker.

    `breakers` is a `pybreaker.CircuitBreakers`. Its keys are host and port, or what
    `key` returns when called with the `requests.PreparedRequest`. `adapter` sends the
    requests, by default a `requests.adapters.HTTPAdapter`; the other attributes of
    `adapter` are attributes of the `BreakerAdapter` as well.

    A connection error, a timeout and a response whose status is in `failure_statuses`
    are failures. A response with a status in `retry_after_statuses` and a Retry-After
    opens the circuit for as long as the Retry-After says, at most for
    `retry_after_max` seconds (0: never). A rejected request raises an error that is a
    `pybreaker.CircuitBreakerError` and a `requests.RequestException`. The guarded call
    ends when the head of the response has come; the retries of `adapter` are part of
    the call. The constructor raises `TypeError` for an argument of the wrong kind and
    `ValueError` for one out of range.
    """

    def __init__(
        self,
        breakers: CircuitBreakers,
        *,
        adapter: BaseAdapter | None = None,
        key: Callable[[requests.PreparedRequest], Hashable] | None = None,
        failure_statuses: Iterable[int] = FAILURE_STATUSES,
        retry_after_statuses: Iterable[int] = RETRY_AFTER_STATUSES,
        retry_after_max: float = 300,
    ) -> None:
        super().__init__()
        self._layer = _RequestsLayer(
            breakers, key, failure_statuses, retry_after_statuses, retry_after_max
        )
        if adapter is None:
            adapter = HTTPAdapter()
        if not isinstance(adapter, BaseAdapter):
            raise TypeError(
                f"adapter must be a requests.adapters.BaseAdapter, such as an "
                f"HTTPAdapter(), not {adapter!r}"
            )
        self._adapter: BaseAdapter = adapter

    def send(
        self, request: requests.PreparedRequest, *args: Any, **kwargs: Any
    ) -> requests.Response:
        def send(request: requests.PreparedRequest) -> requests.Response:
            return self._adapter.send(request, *args, **kwargs)

        response: Any = self._layer.send(request, send)
        # HTTPDigestAuth sends its second request by response.connection.
        response.connection = self
        return cast("requests.Response", response)

    def close(self) -> None:
        self._adapter.close()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_adapter":
            raise AttributeError(name)
        return getattr(self._adapter, name)
