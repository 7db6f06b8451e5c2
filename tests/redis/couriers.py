"""Fixtures for all tests that start couriers, in any folder."""

from __future__ import annotations

import contextlib
import importlib
import sys
import threading
import time

import pytest


@pytest.fixture(autouse=True, scope="session")
def impatient_clients():
    """Clients of Redis wait 10 ms between attempts to connect, instead of up to a
    minute in all."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("redis.retry", "valkey.retry"):
            with contextlib.suppress(ImportError):
                retry = importlib.import_module(name)
                patch.setattr(retry, "sleep", lambda _: time.sleep(0.01), raising=False)
        yield


def stop_couriers(patience):
    """Let all couriers end, and wait at most `patience` seconds until they have."""
    if "pybreaker_extras.redis" in sys.modules:
        import stepwise

        stepwise.stop_couriers()
    end = time.monotonic() + patience
    for thread in threading.enumerate():
        if "pybreaker courier" in thread.name:
            thread.join(max(0.0, end - time.monotonic()))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown():
    """End a test's couriers with the test: couriers would disturb later tests that
    count threads or objects, or draw random numbers."""
    try:
        return (yield)
    finally:
        stop_couriers(patience=5)  # a courier may have waited for a paused server
