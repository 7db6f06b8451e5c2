"""The four ways in which a client sends its requests through breakers, and how tests
use each: `get` returns the status and the body, or raises what the client raises."""

from __future__ import annotations

import asyncio

import pytest

# Seconds after which a client gives up, in tests of timeouts.
SHORT = 0.3


class Httpx:
    package = "httpx"

    def __init__(self, breakers=None, timeout=30, **settings):
        import httpx

        self.broad = httpx.TransportError
        transport = None
        if breakers is not None:
            from pybreaker_extras.http import BreakerTransport

            transport = BreakerTransport(breakers, **settings)
        self.client = httpx.Client(
            transport=transport, timeout=timeout, trust_env=False
        )

    def get(self, url, method="GET", **options):
        options.setdefault("follow_redirects", True)
        response = self.client.request(method, url, **options)
        return response.status_code, response.text

    def close(self):
        self.client.close()


class HttpxAsync:
    package = "httpx"

    def __init__(self, breakers=None, timeout=30, **settings):
        import httpx

        self.broad = httpx.TransportError
        transport = None
        if breakers is not None:
            from pybreaker_extras.http import AsyncBreakerTransport

            transport = AsyncBreakerTransport(breakers, **settings)
        self.client = httpx.AsyncClient(
            transport=transport, timeout=timeout, trust_env=False
        )
        self.loop = asyncio.new_event_loop()

    def get(self, *args, **options):
        return self.loop.run_until_complete(self.get_async(*args, **options))

    async def get_async(self, url, method="GET", **options):
        options.setdefault("follow_redirects", True)
        response = await self.client.request(method, url, **options)
        return response.status_code, response.text

    def close(self):
        self.loop.run_until_complete(self.client.aclose())
        self.loop.close()


class Requests:
    package = "requests"

    def __init__(self, breakers=None, timeout=30, **settings):
        import requests

        self.broad = requests.RequestException
        self.timeout = timeout
        self.client = requests.Session()
        self.client.trust_env = False
        if breakers is not None:
            from pybreaker_extras.http import BreakerAdapter

            adapter = BreakerAdapter(breakers, **settings)
            for scheme in ("http://", "https://"):
                self.client.mount(scheme, adapter)

    def get(self, url, method="GET", **options):
        options.setdefault("timeout", self.timeout)
        response = self.client.request(method, url, **options)
        return response.status_code, response.text

    def close(self):
        self.client.close()


class Aiohttp:
    package = "aiohttp"

    def __init__(self, breakers=None, timeout=30, **settings):
        import aiohttp

        self.broad = aiohttp.ClientError
        self.loop = asyncio.new_event_loop()
        middlewares = ()
        if breakers is not None:
            from pybreaker_extras.http import breaker_middleware

            middlewares = (breaker_middleware(breakers, **settings),)

        async def make():
            return aiohttp.ClientSession(
                middlewares=middlewares,
                timeout=aiohttp.ClientTimeout(sock_read=timeout, sock_connect=timeout),
            )

        self.client = self.loop.run_until_complete(make())

    def get(self, *args, **options):
        return self.loop.run_until_complete(self.get_async(*args, **options))

    async def get_async(self, url, method="GET", **options):
        async with self.client.request(method, url, **options) as response:
            return response.status, await response.text()

    def close(self):
        self.loop.run_until_complete(self.client.close())
        # The closed connections finish their work.
        self.loop.run_until_complete(asyncio.sleep(0))
        self.loop.close()


CLIENTS = [Httpx, HttpxAsync, Requests, Aiohttp]
ASYNC_CLIENTS = [HttpxAsync, Aiohttp]


for_each_client = pytest.mark.parametrize("make_client", CLIENTS, indirect=True)
for_each_async_client = pytest.mark.parametrize(
    "make_client", ASYNC_CLIENTS, indirect=True
)
