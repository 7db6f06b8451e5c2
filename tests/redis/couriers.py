"""What tests need that start couriers, whichever folder they are in."""

from __future__ import annotations

import contextlib
import importlib
import sys
import threading
import time

import pytest


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
    if "pybreaker_extras.redis" in sys.modules:
        import stepwise

        stepwise.stop_couriers()
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
