"""What tests of README and of docs share: a service, and a way to run a section.

The examples share circuits, so that tests of them start couriers.
"""

from __future__ import annotations

import asyncio
import io
import sqlite3
import sys
import types
import urllib.request

import pytest
import redis
from couriers import impatient_clients, pytest_runtest_teardown  # noqa: F401
from readme_support import blocks_of, run, source_of

# The section on which the others of a page go on.
README_BASIS = "README.rst", "The quickest useful example"
DOCS_BASIS = "docs/guide.rst", "A first breaker"


class Service:
    """Stands in for the weather service and for the clients that reach it."""

    def __init__(self):
        self.requests = []
        self.text = "21.5"
        self.status = 200
        self.error = None

    def get(self, path, timeout=None):
        self.requests.append(path)
        if self.error is not None:
            raise self.error
        return types.SimpleNamespace(status=self.status, text=self.text)

    async def get_async(self, path):
        await asyncio.sleep(0)
        return self.get(path)

    def urlopen(self, url, timeout):
        return io.BytesIO(self.get(url, timeout).text.encode())

    def connect(self, timeout):
        return io.StringIO("one\ntwo\n")


class Documents:
    """README and the pages of docs, of which a section at a time is run."""

    def __init__(self, service, clock):
        self._names = {
            "__name__": "readme",
            "client": service,
            "async_client": types.SimpleNamespace(get=service.get_async),
        }
        self._clock = clock

    def run(self, page, section):
        """Run the blocks of a section, which go on from the first example. Return the
        names that there are then."""
        names = dict(self._names)
        basis = README_BASIS if page == "README.rst" else DOCS_BASIS
        if (page, section) != basis:
            run_all(*basis, names)
        SITUATIONS.get((page, section), nothing_special)(names, self._clock)
        run_all(page, section, names)
        return types.SimpleNamespace(**names)


def run_all(page, section, names):
    """Run the blocks of a section, one after the other."""
    blocks = [
        block for block in blocks_of(source_of(page), page) if block.section == section
    ]
    assert blocks, f"{page} has no section {section!r} with a block in it"
    for block in blocks:
        run(block, names)


def nothing_special(names, clock):
    """All is well when the section begins."""


def opened_a_while_ago(names, clock):
    """The service failed, and 18.5 of the 60 seconds have passed."""
    names["weather"].open()
    clock.advance(18.5)


def three_failures(names, clock):
    """Two more, and the circuit would have opened."""
    names["weather"].fail_counter = 3


SITUATIONS = {
    ("README.rst", "At a prompt"): three_failures,
    ("docs/guarding.rst", "What the caller sees"): opened_a_while_ago,
    ("docs/operating.rst", "At a prompt"): three_failures,
    ("docs/operating.rst", "What an operator can do"): three_failures,
}


class GeventTimeout(BaseException):
    """Stands in for `gevent.Timeout`, which is no `Exception` either."""

    def __init__(self, seconds):
        super().__init__(seconds)

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        return False


@pytest.fixture
def service(monkeypatch):
    service = Service()
    monkeypatch.setattr(urllib.request, "urlopen", service.urlopen)
    return service


@pytest.fixture
def documents(service, clock, monkeypatch, tmp_path):
    """Runs sections in an empty directory, without a network."""
    databases = []
    connect = sqlite3.connect

    def remember(*args, **kwargs):
        databases.append(connect(*args, **kwargs))
        return databases[-1]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sqlite3, "connect", remember)
    monkeypatch.setenv("REDIS_URL", "redis://127.0.0.1:9")  # where nobody listens
    django_redis = types.ModuleType("django_redis")
    django_redis.get_redis_connection = {"default": redis.Redis(port=9)}.get
    monkeypatch.setitem(sys.modules, "django_redis", django_redis)
    gevent = types.ModuleType("gevent")
    gevent.Timeout = GeventTimeout
    monkeypatch.setitem(sys.modules, "gevent", gevent)
    yield Documents(service, clock)
    for database in databases:
        database.close()
