"""Suites that freeze the time, whatever year they freeze, and what comes after."""

from __future__ import annotations

import asyncio
import contextlib
from datetime import datetime, timedelta, timezone

import pytest
from freezegun import freeze_time
from support import fail

import pybreaker
from pybreaker import CircuitBreaker, CircuitBreakerError

PAST = [
    "1971-06-01",
    "1985-10-26",
    "1999-12-31",
    "2000-02-29",
    "2001-09-09",
    "2020-01-01",
]
FUTURE = ["2090-01-01", "2150-07-01"]
YEARS = PAST + FUTURE


def open_circuit(**settings):
    """A breaker whose only call has failed."""
    breaker = CircuitBreaker(fail_max=1, reset_timeout=60, name="api", **settings)
    fail(breaker)
    assert breaker.current_state == "open"
    return breaker


@pytest.mark.parametrize("moment", YEARS)
def test_a_timeout_passes_within_a_frozen_year(moment):
    """The timeout passes to the second, and not before."""
    with freeze_time(moment) as frozen:
        breaker = open_circuit()
        assert breaker.retry_after == 60
        frozen.tick(59)
        with pytest.raises(CircuitBreakerError) as rejected:
            breaker.call(int)
        assert rejected.value.retry_after == 1
        frozen.tick(1)
        assert breaker.call(int) == 0
        assert breaker.current_state == "closed"


@pytest.mark.parametrize("moment", PAST)
def test_a_circuit_opened_in_a_frozen_past_is_due_after_the_frozen_block(moment):
    """By the wall clock the circuit has been open for years."""
    with freeze_time(moment):
        breaker = open_circuit()
    assert breaker.retry_after == 0
    assert breaker.call(int) == 0
    assert breaker.current_state == "closed"


@pytest.mark.parametrize("moment", FUTURE)
def test_a_circuit_opened_in_a_frozen_future_waits_its_timeout_after_the_block(moment):
    """The circuit does not wait for that year: its moment of opening becomes now."""
    with freeze_time(moment):
        breaker = open_circuit()
    assert 50 < breaker.retry_after <= 60
    assert 50 < breaker.snapshot()["retry_after"] <= 60
    with pytest.raises(CircuitBreakerError) as rejected:
        breaker.call(int)
    assert 50 < rejected.value.retry_after <= 60


@pytest.mark.parametrize("moment", FUTURE)
def test_a_circuit_opened_in_a_frozen_future_recovers_in_an_earlier_year(moment):
    """The timeout begins at the first look, and ends a full timeout later."""
    with freeze_time(moment):
        breaker = open_circuit()
    with freeze_time("2024-01-01") as frozen:
        assert breaker.retry_after == 60
        frozen.tick(59)
        assert breaker.retry_after == 1
        with pytest.raises(CircuitBreakerError):
            breaker.call(int)
        frozen.tick(1)
        assert breaker.call(int) == 0


@pytest.mark.parametrize("moment", YEARS)
def test_calls_alone_find_the_end_of_a_timeout_from_another_year(moment):
    """No program has to read retry_after for the timeout to pass."""
    with freeze_time(moment):
        breaker = open_circuit()
    admitted = []
    with freeze_time("2024-01-01") as frozen:
        for _ in range(3):
            try:
                admitted.append(breaker.call(int))
            except CircuitBreakerError:
                frozen.tick(30)
    assert admitted[:1] == [0]


@pytest.mark.parametrize("moment", ["1999-12-31", *FUTURE])
def test_a_circuit_that_is_open_when_the_time_is_frozen_waits_no_longer(
    moment,
):
    """The wait is at most the timeout, in the frozen block and after it."""
    breaker = open_circuit()
    with freeze_time(moment) as frozen:
        assert breaker.retry_after <= 60
        frozen.tick(60)
        assert breaker.retry_after == 0
    assert breaker.retry_after <= 60


@pytest.mark.parametrize("moment", YEARS)
def test_a_trial_that_hangs_in_a_frozen_year_loses_its_place_after_the_block(moment):
    """The trial may hold the place for reset_timeout seconds, not until that year."""
    breaker = CircuitBreaker(reset_timeout=60)
    breaker.half_open()
    with freeze_time(moment):
        block = breaker.calling()
        block.__enter__()
    assert breaker.retry_after <= 60
    with freeze_time("2024-01-01") as frozen:
        assert breaker.retry_after <= 60
        frozen.tick(60)
        assert breaker.retry_after == 0
    block.__exit__(None, None, None)


@pytest.mark.parametrize("moment", YEARS)
def test_a_moment_that_a_test_writes_in_a_frozen_year_is_the_moment_of_opening(moment):
    """Tests let a timeout pass by writing opened_at."""
    with freeze_time(moment):
        breaker = open_circuit()
        now = datetime.now(timezone.utc)
        breaker._state_storage.opened_at = now - timedelta(seconds=20)
        assert breaker.retry_after == pytest.approx(40)
        breaker._state_storage.opened_at = now - timedelta(seconds=61)
        assert breaker.call(int) == 0


@pytest.mark.parametrize("moment", YEARS)
def test_a_coroutine_waits_for_the_timeout_of_a_frozen_year(moment):
    """The suite is one for asyncio, whose loop keeps its own clock."""

    async def story(frozen):
        breaker = CircuitBreaker(fail_max=1, reset_timeout=60)

        @breaker
        async def fetch(error=None):
            await asyncio.sleep(0)
            if error:
                raise error
            return "page"

        with pytest.raises(CircuitBreakerError):
            await fetch(OSError())
        frozen.tick(59)
        with pytest.raises(CircuitBreakerError):
            await fetch()
        frozen.tick(1)
        return await fetch()

    with freeze_time(moment, real_asyncio=True) as frozen:
        assert asyncio.run(story(frozen)) == "page"


class Repository:
    """Has a breaker that was made when the module was imported, with the real clock."""

    breaker = CircuitBreaker(fail_max=1, reset_timeout=60)

    @breaker
    def find(self, error=None):
        if error:
            raise error
        return "row"


@pytest.mark.parametrize("moment", YEARS)
def test_a_breaker_of_a_module_survives_the_frozen_tests_of_a_suite(moment):
    """One test trips the breaker in a frozen year; a later test runs in the present."""
    Repository.breaker.close()
    with freeze_time(moment):
        with pytest.raises(CircuitBreakerError):
            Repository().find(OSError())
        with pytest.raises(CircuitBreakerError):
            Repository().find()
    with freeze_time("2024-01-01") as frozen:
        with contextlib.suppress(CircuitBreakerError):
            Repository().find()
        frozen.tick(60)
        assert Repository().find() == "row"
    assert Repository.breaker.current_state == "closed"


class Table(pybreaker.CircuitBreakerStorage):
    """A storage of the user's own, which goes by the wall clock."""

    state, counter, opened_at = "closed", 0, None

    def __init__(self):
        super().__init__("table")

    def increment_counter(self):
        self.counter += 1

    def reset_counter(self):
        self.counter = 0


@pytest.mark.parametrize("moment", YEARS)
def test_a_storage_of_the_users_own_goes_by_the_frozen_wall_clock(moment):
    """The storage's opened_at decides, as in an ordinary year."""
    with freeze_time(moment) as frozen:
        breaker = open_circuit(state_storage=Table())
        frozen.tick(59)
        assert breaker.retry_after == pytest.approx(1)
        frozen.tick(1)
        assert breaker.call(int) == 0


def test_a_clock_that_only_moves_forward_is_believed(clock):
    """A day is a day, though the wall clock has not moved."""
    breaker = CircuitBreaker(reset_timeout=86400)
    breaker.open()
    clock.advance(86399)
    assert breaker.retry_after == 1
    clock.advance(1)
    assert breaker.retry_after == 0


@pytest.mark.parametrize(("later", "wait"), [(0, 60), (20, 40), (61, 0)])
def test_a_clock_that_stands_before_the_opening_is_another_clock(later, wait, clock):
    """The wall clock then says how long ago the circuit was opened."""
    breaker = CircuitBreaker(reset_timeout=60)
    breaker.open()
    clock.now -= 500
    with freeze_time(datetime.now(timezone.utc) + timedelta(seconds=later)):
        assert breaker.retry_after == pytest.approx(wait, abs=9)
