"""Code with HTTP clients and test helpers that type checkers must accept, or refuse
where a line is marked as ignored.

It is checked against the installed wheel and never run.
"""

from __future__ import annotations

import aiohttp
import httpx
import requests
from requests.adapters import HTTPAdapter
from typing_extensions import assert_type

from pybreaker import CircuitBreaker, CircuitBreakers
from pybreaker_extras.http import (
    AsyncBreakerTransport,
    BreakerAdapter,
    BreakerTransport,
    breaker_middleware,
)
from pybreaker_extras.testing import (
    let_timeout_pass,
    refusing,
    restoring_breakers,
)

breakers = CircuitBreakers(fail_max=25, window_size=50)

# httpx


def provider(request: httpx.Request) -> str:
    return request.url.host


transport = BreakerTransport(
    breakers,
    transport=httpx.HTTPTransport(retries=1),
    key=provider,
    failure_statuses=range(500, 600),
    retry_after_statuses={429, 503},
    retry_after_max=60.5,
)
client = httpx.Client(transport=transport)
async_client = httpx.AsyncClient(
    transport=AsyncBreakerTransport(
        breakers, transport=httpx.AsyncHTTPTransport(), key=lambda request: 1
    )
)
BreakerTransport(breakers, transport=httpx.AsyncHTTPTransport())  # type: ignore[arg-type]
AsyncBreakerTransport(breakers, transport=httpx.HTTPTransport())  # type: ignore[arg-type]
BreakerTransport(breakers, failure_statuses=503)  # type: ignore[arg-type]
BreakerTransport(breakers, retry_after_max="60")  # type: ignore[arg-type]
BreakerTransport(CircuitBreaker())  # type: ignore[arg-type]

# requests


def host(request: requests.PreparedRequest) -> tuple[str | None, str | None]:
    return request.method, request.url


session = requests.Session()
session.mount("https://", BreakerAdapter(breakers, adapter=HTTPAdapter(), key=host))
BreakerAdapter(breakers, adapter=session)  # type: ignore[arg-type]
BreakerAdapter(breakers, key=provider)  # type: ignore[arg-type]

# aiohttp


def method(request: aiohttp.ClientRequest) -> str:
    return request.method


async def main() -> None:
    middleware = breaker_middleware(breakers, key=method)
    async with aiohttp.ClientSession(middlewares=[middleware]) as session:
        async with session.get("https://api.example.org") as response:
            assert_type(response, aiohttp.ClientResponse)
    breaker_middleware(breakers, key=provider)  # type: ignore[arg-type]


# Helpers for tests

let_timeout_pass(breakers["host"])
let_timeout_pass("host")  # type: ignore[arg-type]
with restoring_breakers(), refusing(CircuitBreaker()) as breaker:
    assert_type(breaker, CircuitBreaker)
