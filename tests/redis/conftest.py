"""What tests of a shared circuit may use: servers, proxies, and fleets of workers."""

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
    """A test needs a server if it uses one, and is long if it starts processes."""
    for item in items:
        if "servers" in item.fixturenames:
            item.add_marker("server")
        if "nurseries" in item.fixturenames:
            item.add_marker("long")


@pytest.fixture(scope="session")
def servers():
    """Servers of the kinds that `fleet` names, each started when first asked for."""
    with contextlib.ExitStack() as stack:
        started = {}

        def server(binary, **options):
            if binary not in started:
                started[binary] = fleet.Server(getattr(fleet, binary)(), **options)
                stack.callback(started[binary].end)
            started[binary].clean()
            return started[binary]

        yield server


# Both servers are asked for where they may differ, and in any case if there is time.
SERVERS = ["valkey_server", "redis_server"]


@pytest.fixture(params=SERVERS if os.environ.get("PYBREAKER_DEEP") else SERVERS[:1])
def server(request, servers):
    """A server that is as good as new."""
    return servers(request.param)


@pytest.fixture(params=SERVERS)
def either_server(request, servers):
    """Each of the servers."""
    return servers(request.param)


@pytest.fixture
def namespace():
    """One that no other test has."""
    return next(fleet.names)


@pytest.fixture
def closing():
    """Closes clients of Redis when the test is over and no courier opens them again."""
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
    """Undoes `unhurried`: a courier notices that Redis is silent."""
    unhurried.undo()


@pytest.fixture
def proxies():
    """Makes proxies, and ends them."""
    with contextlib.ExitStack() as stack:

        def proxy(server):
            made = fleet.Proxy(server.port)
            stack.callback(made.end)
            return made

        yield proxy


@pytest.fixture
def service(tmp_path):
    """Works until it is told not to."""
    return fleet.Service(tmp_path)


@pytest.fixture(scope="session")
def nurseries():
    """By the folders in front of the path of their workers."""
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
    """Starts workers on a port, all at once; returns them when they are ready."""
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
        service.mode = "up"  # so that none hangs
