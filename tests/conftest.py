"""What every test file may use: a clock to move, and a listener that remembers."""

from __future__ import annotations

import contextlib
import importlib
import os
import threading
import time
import types

import pytest

import pybreaker


def pytest_terminal_summary(terminalreporter):
    """Say how far the searches have come, whichever processes they ran in."""
    found = {"schedules": [], "circuits": []}
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            for name, value in report.user_properties:
                if report.when == "call" and name in found:
                    found[name].append(value)
    if found["schedules"]:
        scenarios, counts = zip(*found["schedules"])
        terminalreporter.write_line(
            f"explored {sum(counts)} schedules of {len(set(scenarios))} scenarios"
        )
    if found["circuits"]:
        circuits, calls, trials = map(sum, zip(*found["circuits"]))
        terminalreporter.write_line(
            f"compared {circuits} circuits with the model: {calls} calls, {trials} "
            f"trials"
        )


@pytest.fixture(autouse=True, scope="session")
def impatient_clients():
    """Clients of Redis that find nobody try again at once, and not for a minute."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("redis.retry", "valkey.retry"):
            with contextlib.suppress(ImportError):
                retry = importlib.import_module(name)
                patch.setattr(retry, "sleep", lambda _: time.sleep(0.01), raising=False)
        yield


def stop_couriers(patience):
    """Let them end that there are, and wait for so many seconds until they have."""
    for storage in list(pybreaker._couriered.values()):
        storage._courier.stop()
    end = time.monotonic() + patience
    for thread in threading.enumerate():
        if "pybreaker courier" in thread.name:
            thread.join(max(0.0, end - time.monotonic()))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown():
    """A test's couriers end with it. They would disturb who counts threads, objects, or
    the numbers that chance has given."""
    try:
        return (yield)
    finally:
        stop_couriers(patience=5)  # some had to wait for a server that has gone on now


class Clock:
    """The monotonic clock as the library sees it. It moves when told to."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now

    def advance(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    """Stops the library's monotonic clock, and no other code's."""
    clock = Clock()
    fake = types.SimpleNamespace(monotonic=clock.monotonic)
    monkeypatch.setattr(pybreaker, "time", fake)
    return clock


class Recorder(pybreaker.CircuitBreakerListener):
    """Remembers what it is told, in order, as tuples that begin with the event."""

    def __init__(self):
        self.events = []

    def before_call(self, cb, func, *args, **kwargs):
        self.events.append(("before_call", func, args, kwargs))

    def failure(self, cb, exc):
        self.events.append(("failure", exc))

    def success(self, cb):
        self.events.append(("success",))

    def state_change(self, cb, old_state, new_state):
        self.events.append(("state_change", old_state.name, new_state.name))

    @property
    def names(self):
        """The events without their details."""
        return [event[0] for event in self.events]

    @property
    def transitions(self):
        """The moves from state to state, as pairs of names."""
        return [event[1:] for event in self.events if event[0] == "state_change"]


@pytest.fixture
def recorder():
    return Recorder()


class Boom(Exception):
    """What the guarded service raises in these tests."""


@pytest.fixture
def fail():
    """A function that always raises Boom, whatever it is given."""

    def fail(*args, **kwargs):
        raise Boom

    return fail


@pytest.fixture
def boom():
    """The class that `fail` raises."""
    return Boom


@pytest.fixture(scope="session")
def servers():
    """Servers of the kinds that `fleet` names, each started when first asked for."""
    with contextlib.ExitStack() as stack:
        started = {}

        def server(binary, **options):
            import fleet

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
    import fleet

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
def proxies():
    """Makes proxies, and ends them."""
    import fleet

    with contextlib.ExitStack() as stack:

        def proxy(server):
            made = fleet.Proxy(server.port)
            stack.callback(made.end)
            return made

        yield proxy


@pytest.fixture
def service(tmp_path):
    """Works until it is told not to."""
    import fleet

    return fleet.Service(tmp_path)


@pytest.fixture(scope="session")
def nurseries():
    """By the folders in front of the path of their workers."""
    import fleet

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
    import fleet

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
