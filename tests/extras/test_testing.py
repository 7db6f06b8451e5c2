"""pybreaker_extras.testing: circuits that tests leave as they found them."""

from __future__ import annotations

import gc
import logging
import math
import os
import subprocess
import sys
import unittest
from datetime import datetime, timezone

import pytest
from pages import python_blocks
from readme_support import blocks_of, source_of
from support import PATIENCE, Boom, boom, fail

import pybreaker
from pybreaker import (
    CircuitBreaker,
    CircuitBreakerError,
    CircuitBreakers,
    CircuitMemoryStorage,
)
from pybreaker_extras import testing
from pybreaker_extras.testing import let_timeout_pass, refusing, restoring_breakers


class Listener(pybreaker.CircuitBreakerListener):
    def __init__(self):
        self.told = []

    def state_change(self, cb, old_state, new_state):
        self.told.append((old_state.name, new_state.name))


def is_new(breaker):
    return (
        breaker.current_state == "closed"
        and breaker.fail_counter == breaker.success_counter == 0
        and breaker.retry_after == 0
        and breaker.state.reason != "by hand and kept"
    )


# The fixture


@pytest.mark.parametrize("move", ["open", "half_open", "fail", "trial", "nothing"])
def test_every_breaker_is_closed_without_failures_when_the_block_ends(move):
    breaker = CircuitBreaker(fail_max=3, success_threshold=3)
    with restoring_breakers():
        if move == "fail":
            fail(breaker, 2)
        elif move == "trial":
            breaker.half_open()
            breaker.call(int)
        elif move != "nothing":
            getattr(breaker, move)()
    assert is_new(breaker)
    fail(breaker, 2)
    assert breaker.current_state == "closed"
    fail(breaker)
    assert breaker.current_state == "open"


def test_a_breaker_that_was_made_in_the_block_is_closed_too():
    with restoring_breakers():
        breaker = CircuitBreaker()
        breaker.open()
    assert is_new(breaker)


def test_a_trial_that_is_left_behind_loses_its_place():
    breaker = CircuitBreaker(reset_timeout=1000)
    with restoring_breakers():
        breaker.half_open()
        left = breaker(lambda: (yield))()
        next(left)
        assert breaker.retry_after > 0
    breaker.half_open()
    assert breaker.retry_after == 0
    assert breaker.call(int) == 0
    left.close()


def test_settings_and_listeners_are_restored_when_the_block_ends():
    listener, other, counts = Listener(), Listener(), KeyError
    breaker = CircuitBreaker(
        fail_max=3, reset_timeout=10, exclude=[counts], listeners=[listener], name="db"
    )
    plain = CircuitBreaker()
    limited = CircuitBreaker(fail_max=3, window_size=3, max_reset_timeout=60)
    kept = [(b.snapshot(), b.exclude, b.listeners) for b in (breaker, plain, limited)]
    with restoring_breakers():
        for each in (breaker, plain, limited):
            each.max_reset_timeout = None
            each.window_size = 100
            each.fail_max = 100
            each.reset_timeout = 3600
            each.max_reset_timeout = 4000
            each.window_seconds = 5
            each.success_threshold = 7
            each.name = "other"
            each.dry_run = True
            each.exclude, each.include, each.ignore = [], [OSError], [LookupError]
            each.failure_result = bool
            each.throw_new_error_on_trip = False
            each.add_listener(other)
    for each, (snapshot, exclude, listeners) in zip((breaker, plain, limited), kept):
        assert {**each.snapshot(), "reason": ""} == {**snapshot, "reason": ""}
        assert (each.exclude, each.listeners) == (exclude, listeners)
        assert (each.include, each.ignore, each.failure_result) == ((), (), None)
        assert each.throw_new_error_on_trip is True


def test_no_listener_is_told_when_the_block_ends(caplog):
    caplog.set_level(logging.DEBUG)
    listener, calls = Listener(), []

    class Overriding(CircuitBreaker):
        def close(self, reason=None):
            calls.append(reason)
            super().close(reason)

    breaker = Overriding(listeners=[listener])
    with restoring_breakers():
        breaker.open()
        caplog.clear()
        listener.told.clear()
    assert is_new(breaker)
    assert (listener.told, calls, caplog.records) == ([], [], [])
    breaker.open()
    assert listener.told == [("closed", "open")]
    assert len(caplog.records) == 1


class Shared(pybreaker.CircuitBreakerStorage):
    """A storage outside of this process."""

    state, counter, opened_at = "closed", 0, None

    def __init__(self):
        super().__init__("shared")

    def increment_counter(self):
        self.counter += 1

    def reset_counter(self):
        self.counter = 0


def test_a_breaker_on_a_shared_storage_is_left_alone():
    breaker = CircuitBreaker(state_storage=Shared(), fail_max=5)
    with restoring_breakers():
        breaker.open()
        breaker.fail_max = 6
    assert (breaker.current_state, breaker.fail_max) == ("open", 6)


def test_restored_breakers_of_a_mapping_cannot_be_told_from_new_ones():
    breakers = CircuitBreakers(maxsize=1)
    with restoring_breakers():
        breakers["a"].open()
        breakers["a"].fail_max = 7
        breakers["a"].window_seconds = 7
    del breakers["a"]  # its settings were not known when the block began
    with restoring_breakers():
        breakers["b"]
        with restoring_breakers():
            breakers["b"].fail_max = 7
            breakers["b"].add_listener(Listener())
        breakers["c"]
    assert list(breakers) == ["c"]


def test_a_test_that_fails_leaves_fresh_breakers_too():
    breaker = CircuitBreaker()
    with pytest.raises(Boom), restoring_breakers():
        breaker.open()
        boom()
    assert is_new(breaker)


def run(arguments, **options):
    """Run Python code with the same modules as this process."""
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=4 * PATIENCE,
        **options,
    )


SUITE = """
import unittest
import pybreaker

breaker = pybreaker.CircuitBreaker()

def test_one():
    assert breaker.current_state == "closed"
    breaker.open()

def test_two():
    assert breaker.current_state == "closed"
    breaker.open()

class Tests(unittest.TestCase):
    def test_three(self):
        assert breaker.current_state == "closed"
        breaker.open()
"""


def test_the_fixture_serves_every_test_when_the_settings_of_pytest_name_it(tmp_path):
    (tmp_path / "conftest.py").write_text(
        'pytest_plugins = ["pybreaker_extras.testing"]\n'
    )
    (tmp_path / "test_suite.py").write_text(SUITE)
    command = ["-m", "pytest", "-p", "no:cacheprovider", "-p", "no:hypothesispytest"]
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    without = run(command, cwd=tmp_path)
    assert "2 failed, 1 passed" in without.stdout
    (tmp_path / "pytest.ini").write_text("[pytest]\nusefixtures = fresh_breakers\n")
    assert "3 passed" in run(command, cwd=tmp_path).stdout


def test_the_module_works_without_pytest():
    program = (
        "import sys\n"
        "sys.modules['pytest'] = None\n"
        "from pybreaker_extras import testing\n"
        "with testing.restoring_breakers(): pass\n"
        "try: testing.fresh_breakers\n"
        "except ImportError as exc: print(exc)\n"
        "try: testing.missing\n"
        "except AttributeError as exc: print(exc)\n"
    )
    result = run(["-c", program])
    lines = result.stdout.splitlines()
    assert lines[0].startswith("fresh_breakers is a fixture of pytest"), result.stderr
    assert "restoring_breakers()" in lines[0]
    assert "no attribute 'missing'" in lines[1]


class TestWithUnittest(unittest.TestCase):
    """A test case of the standard library."""

    breaker = CircuitBreaker(fail_max=1)

    def setUp(self):
        block = restoring_breakers()
        block.__enter__()
        self.addCleanup(block.__exit__, None, None, None)

    def test_a_failure_is_forgotten(self):
        self.assertEqual(self.breaker.current_state, "closed")
        fail(self.breaker)

    def test_another_failure_is_forgotten(self):
        self.assertEqual(self.breaker.current_state, "closed")
        fail(self.breaker)
        let_timeout_pass(self.breaker)
        self.assertEqual(self.breaker.call(int), 0)

    def test_a_block_of_refusals(self):
        with refusing(self.breaker), self.assertRaises(CircuitBreakerError):
            self.breaker.call(int)


# let_timeout_pass


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"reset_timeout": 1e9},
        {"reset_timeout": 1e300},
        {"reset_timeout": math.inf},
        {"max_reset_timeout": 1000},
        {"state_storage": Shared},
        {"reset_timeout": math.inf, "state_storage": Shared},
    ],
)
def test_the_next_call_is_the_trial_when_the_timeout_was_let_pass(settings):
    if "state_storage" in settings:
        settings = {**settings, "state_storage": Shared()}
    breaker = CircuitBreaker(fail_max=1, **settings)
    fail(breaker)
    assert breaker.retry_after > 0
    let_timeout_pass(breaker)
    assert breaker.current_state == "open"
    assert breaker.retry_after == 0
    assert breaker.call(lambda: breaker.current_state) == "half-open"
    assert breaker.current_state == "closed"


@pytest.mark.parametrize("make_storage", [Shared, CircuitMemoryStorage])
def test_a_length_that_is_drawn_anew_has_passed_as_well(make_storage):
    """For a moment that other code wrote into a storage, the breaker draws a random
    length."""
    for _ in range(50):
        storage = Shared() if make_storage is Shared else CircuitMemoryStorage("closed")
        breaker = CircuitBreaker(
            reset_timeout=1000, max_reset_timeout=2000, state_storage=storage
        )
        storage.opened_at = datetime.now(timezone.utc)
        storage.state = "open"
        assert breaker.retry_after > 0
        let_timeout_pass(breaker)
        assert breaker.retry_after == 0


def test_a_trial_that_fails_after_let_timeout_pass_opens_for_the_full_time():
    breaker = CircuitBreaker(fail_max=1, reset_timeout=60)
    breaker.open(1000)
    let_timeout_pass(breaker)
    fail(breaker)
    assert 0 < breaker.retry_after <= 60


def test_only_the_timeout_of_an_open_circuit_can_pass():
    breaker = CircuitBreaker(name="db")
    with pytest.raises(ValueError, match="let_timeout_pass takes .* open, not .*'db'"):
        let_timeout_pass(breaker)
    breaker.half_open()
    with pytest.raises(ValueError, match="half-open"):
        let_timeout_pass(breaker)


# refusing


def test_a_breaker_rejects_in_the_block_and_is_as_before_after_it():
    listener = Listener()
    breaker = CircuitBreaker(fail_max=3, reset_timeout=0, listeners=[listener])
    fail(breaker, 2)
    with refusing(breaker) as same:
        assert same is breaker
        for _ in range(2):
            with pytest.raises(CircuitBreakerError) as caught:
                breaker.call(boom)
        assert caught.value.reason == "refusing() in a test"
    assert (breaker.current_state, breaker.fail_counter) == ("closed", 2)
    assert listener.told == [("closed", "open"), ("open", "closed")]
    fail(breaker)
    assert breaker.current_state == "open"


@pytest.mark.parametrize("move", ["open", "half_open"])
def test_a_circuit_that_was_not_closed_is_not_closed_after_the_block(move):
    breaker = CircuitBreaker()
    getattr(breaker, move)(reason="maintenance")
    before = breaker.current_state
    with refusing(breaker), pytest.raises(CircuitBreakerError):
        breaker.call(int)
    assert (breaker.current_state, breaker.state.reason) == (before, "maintenance")
    assert breaker.retry_after <= 60
    if move == "half_open":
        assert breaker.call(int) == 0


def test_a_breaker_in_a_dry_run_rejects_in_the_block():
    breaker = CircuitBreaker(dry_run=True)
    with refusing(breaker), pytest.raises(CircuitBreakerError):
        breaker.call(int)
    assert breaker.dry_run is True
    assert breaker.call(int) == 0


def test_a_subclass_whose_open_takes_no_arguments_rejects_in_the_block():
    class Older(CircuitBreaker):
        def open(self):
            return super().open()

    breaker = Older(reset_timeout=0)
    with refusing(breaker), pytest.raises(CircuitBreakerError):
        breaker.call(int)
    assert breaker.call(int) == 0


def test_a_block_that_raises_ends_the_refusals():
    breaker = CircuitBreaker()
    with pytest.raises(Boom), refusing(breaker):
        boom()
    assert is_new(breaker)


def test_the_helpers_keep_no_breaker_alive():
    breaker = CircuitBreaker(name="gone")
    with restoring_breakers():
        breaker.open()
        let_timeout_pass(breaker)
        with refusing(breaker):
            del breaker
    gc.collect()
    assert "gone" not in [each.name for each in pybreaker.breakers()]
    assert testing.fresh_breakers is not None


# The page


def test_the_page_runs_as_it_is_written(tmp_path):
    conftest, *suite = python_blocks("testing")
    (tmp_path / "conftest.py").write_text(conftest)
    (ini,) = [
        b.text for b in blocks_of(source_of("docs/testing.rst")) if b.kind == "ini"
    ]
    (tmp_path / "pytest.ini").write_text(ini)
    (tmp_path / "test_page.py").write_text("\n\n".join(suite))
    command = ["-m", "pytest", "-p", "no:cacheprovider", "-p", "no:hypothesispytest"]
    result = run(command, cwd=tmp_path)
    assert "3 passed" in result.stdout, result.stdout
