"""Fixtures for tests of a shared circuit: servers, proxies, and fleets of workers."""

from __future__ import annotations

import contextlib
import os

import fleet
import pytest
import stepwise
from couriers import (
    impatient_clients,  # noqa: F401
    pytest_runtest_teardown,  # noqa: F401
    stop_couriers,
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark a test as `server` if the test uses a server, and as `long` if the test
    starts processes."""
    for item in items:
        if "servers" in item.fixturenames:
            item.add_marker("server")
        if "nurseries" in item.fixturenames:
            item.add_marker("long")


@pytest.fixture(scope="session")
def servers():
    """Servers of the kinds that `fleet` names. Each starts when a test first asks for
    it."""
    with contextlib.ExitStack() as stack:
        started = {}

        def server(binary, **options):
            if binary not in started:
                started[binary] = fleet.Server(getattr(fleet, binary)(), **options)
                stack.callback(started[binary].end)
            started[binary].clean()
            return started[binary]

        yield server


# Tests run with both servers where the servers may differ, and in a deep run always.
SERVERS = ["valkey_server", "redis_server"]


@pytest.fixture(params=SERVERS if os.environ.get("PYBREAKER_DEEP") else SERVERS[:1])
def server(request, servers):
    """A server without keys."""
    return servers(request.param)


@pytest.fixture(params=SERVERS)
def either_server(request, servers):
    """Each of the two servers without keys."""
    return servers(request.param)


@pytest.fixture
def namespace():
    """A namespace that no other test uses."""
    return next(fleet.names)


@pytest.fixture
def closing():
    """A function that has clients closed when the test and its couriers are over."""
    with contextlib.ExitStack() as stack:

        def closing(client):
            stack.callback(client.close)
            return client

        yield closing
        stop_couriers(patience=5)


@pytest.fixture
def unhurried(monkeypatch):
    """No courier takes Redis for lost because a busy machine delays an answer."""
    with monkeypatch.context() as patch:
        stepwise.let_redis_be_silent(patch.setattr)
        yield patch


@pytest.fixture
def silence(unhurried):
    """Undoes `unhurried`, so that a courier notices that Redis is silent."""
    unhurried.undo()


@pytest.fixture
def proxies():
    """A function that makes a proxy. All proxies end with the test."""
    with contextlib.ExitStack() as stack:

        def proxy(server):
            made = fleet.Proxy(server.port)
            stack.callback(made.end)
            return made

        yield proxy


@pytest.fixture
def service(tmp_path):
    """A service that is up."""
    return fleet.Service(tmp_path)


@pytest.fixture(scope="session")
def nurseries():
    """A function that gives the nursery for the folders at the front of its workers'
    path."""
    with contextlib.ExitStack() as stack:
        started = {}

        def nursery(path):
            if path not in started:
                started[path] = fleet.Nursery(path)
                stack.callback(started[path].end)
            return started[path]

        yield nursery


@pytest.fixture
def fleet_of(namespace, service, nurseries):
    """A function that starts workers on a port, all at once, and returns them when they
    are ready."""
    with contextlib.ExitStack() as stack:

        def start(port, number, path=(), **settings):
            settings.update(port=port, namespace=namespace, service=str(service.folder))
            workers = []
            for _ in range(number):
                workers.append(fleet.Worker(nurseries(tuple(path)), **settings))
                stack.callback(workers[-1].end)
            fleet.ask_all(workers, "ready")
            return workers

        yield start
        service.mode = "up"  # so that no worker hangs
