"""pybreaker_extras.prometheus: what a scrape shows of breakers."""

from __future__ import annotations

import asyncio
import gc
import math
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
import types
import urllib.request
from pathlib import Path

import pytest
from support import PATIENCE, until

import pybreaker
from pybreaker import CircuitBreaker, CircuitBreakerError, CircuitBreakers

prometheus_client = pytest.importorskip("prometheus_client")
parser = pytest.importorskip("prometheus_client.parser")

import pybreaker_extras.prometheus as module  # noqa: E402
from pybreaker_extras.prometheus import PrometheusMetrics  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
MIDNIGHT = 1_700_000_000.0


class Scrape:
    """The result of one scrape: the values of each metric, by the values of the
    labels."""

    def __init__(self, text):
        self.text = text
        self.samples = [
            sample
            for family in parser.text_string_to_metric_families(text)
            for sample in family.samples
        ]

    def values(self, metric, *labels):
        found = {}
        for sample in self.samples:
            if sample.name == f"circuit_breaker_{metric}":
                key = tuple(sample.labels[label] for label in labels)
                assert key not in found, f"{sample} is there twice"
                found[key] = sample.value
        return found

    def of(self, metric, name="weather"):
        """The value of a metric that has no label but the name; None if there is no
        such series."""
        return self.values(metric, "breaker").get((name,))

    def calls(self, name="weather"):
        """The calls of one breaker, by outcome."""
        calls = self.values("calls_total", "breaker", "outcome")
        return {
            outcome: n for (breaker, outcome), n in calls.items() if breaker == name
        }

    def states(self):
        """The states that the scrape shows, with the number of circuits in each."""
        return {k: n for k, n in self.values("state", "breaker", "state").items() if n}

    def transitions(self):
        """The transitions that have happened, with their numbers."""
        moves = self.values("transitions_total", "breaker", "to", "cause")
        return {labels: count for labels, count in moves.items() if count}


@pytest.fixture
def registry():
    return prometheus_client.CollectorRegistry()


@pytest.fixture
def metrics(registry):
    return PrometheusMetrics(registry)


@pytest.fixture
def scrape(registry):
    """A function that scrapes and returns a `Scrape`."""
    return lambda: Scrape(prometheus_client.generate_latest(registry).decode())


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """Breakers that other tests have left are not shown."""
    gc.collect()
    monkeypatch.setattr(pybreaker, "_breakers", type(pybreaker._breakers)())


@pytest.fixture
def clock(clock, monkeypatch):
    """The test's clock, which the metrics use, too. The wall clock moves with the
    clock."""
    fake = types.SimpleNamespace(
        monotonic=clock.monotonic, time=lambda: MIDNIGHT + clock.now - 1000
    )
    monkeypatch.setattr(module, "time", fake)
    return clock


@pytest.fixture
def weather(metrics, clock):
    breaker = CircuitBreaker(fail_max=2, reset_timeout=60, name="weather")
    metrics.watch(breaker)
    return breaker


def attempt(breaker, func, times=1):
    """Make calls and drop their exceptions."""
    for _ in range(times):
        try:
            breaker.call(func)
        except Exception:
            pass


def outcomes(**counts):
    """How many calls had each outcome; 0 for an outcome that is not given."""
    return {"success": 0, "failure": 0, "abandoned": 0, "rejected": 0, **counts}


class Deaf(pybreaker.CircuitBreakerStorage):
    """A storage such as those of older releases, which remembers no move."""

    state, counter, opened_at = "closed", 0, None

    def increment_counter(self):
        self.counter += 1

    def reset_counter(self):
        self.counter = 0


class Hanging(pybreaker.CircuitMemoryStorage):
    """A storage of the user's own, which does not answer until `let` is set."""

    def __init__(self):
        self.asked, self.let = threading.Event(), threading.Event()
        self.let.set()
        super().__init__("closed")

    def hang(self):
        self.asked.set()
        assert self.let.wait(PATIENCE)

    @property
    def state(self):
        self.hang()
        return self._state

    @state.setter
    def state(self, state):
        self._state = state

    @property
    def counter(self):
        self.hang()
        return self._fail_counter


# Calls.


def test_breaker_is_shown_before_anything_happened(weather, scrape):
    """Every counter of a watched breaker is 0 from the first scrape on, so that the
    first failure shows as an increase."""
    found = scrape()
    assert found.calls() == outcomes()
    assert found.of("dry_run_rejections_total") == 0
    assert found.values("transitions_total", "to", "cause") == dict.fromkeys(
        [
            ("open", "failures"),
            ("half-open", "trial"),
            ("open", "trial"),
            ("closed", "trial"),
            ("open", "hand"),
            ("half-open", "hand"),
            ("closed", "hand"),
            ("open", "unknown"),
            ("half-open", "unknown"),
            ("closed", "unknown"),
        ],
        0,
    )
    assert found.states() == {("weather", "closed"): 1}


def test_calls_are_counted_by_outcome(weather, scrape, fail):
    """Three calls succeed, two fail and open the circuit, four are rejected."""
    for func, times in (int, 3), (fail, 2), (int, 4):
        attempt(weather, func, times)
    found = scrape()
    assert found.calls() == outcomes(success=3, failure=2, rejected=4)


def test_abandoned_calls_have_an_outcome_of_their_own(weather, scrape):
    """A call that is cancelled, and one whose exception is to be ignored, have neither
    succeeded nor failed."""

    def end(exc):
        raise exc

    weather.call(int)
    weather.ignore = [KeyError]
    for exc in KeyboardInterrupt(), asyncio.CancelledError(), KeyError("weather"):
        with pytest.raises(type(exc)):
            weather.call(end, exc)
    assert scrape().calls() == outcomes(success=1, abandoned=3)


def test_dry_run_counts_what_would_have_been_rejected(weather, scrape, fail):
    """Such a call runs, so it has an outcome as well, and is not among the rejected."""
    weather.dry_run = True
    attempt(weather, fail, 2)
    attempt(weather, int, 3)
    found = scrape()
    assert found.of("dry_run_rejections_total") == 3
    assert found.calls() == outcomes(success=3, failure=2)
    assert found.of("dry_run") == 1
    weather.dry_run = False
    attempt(weather, int)
    found = scrape()
    assert found.of("dry_run_rejections_total") == 3
    assert found.calls()["rejected"] == 1
    assert found.of("dry_run") == 0


def test_calls_are_counted_whatever_the_names_of_their_arguments(weather, scrape):
    """The listener's own parameters take no name from a guarded function."""

    @weather
    def configure(cb, func, self):
        return cb

    configure(cb=1, func=2, self=3)
    weather.open()
    with pytest.raises(CircuitBreakerError):
        configure(cb=1, func=2, self=3)
    assert scrape().calls() == outcomes(success=1, rejected=1)


def test_rejection_reaches_the_caller(weather):
    """Counting a rejection does not swallow the error."""
    weather.open()
    with pytest.raises(CircuitBreakerError):
        weather.call(int)
    assert weather.current_state == pybreaker.STATE_OPEN


def test_nothing_is_lost_when_many_threads_call(metrics, scrape, fail):
    """What a scrape says of two breakers with one name adds up to what sixteen threads
    did with them."""
    breakers = [CircuitBreaker(fail_max=math.inf, name="weather") for _ in range(2)]
    metrics.watch(*breakers)
    start = threading.Barrier(16)

    def work(breaker):
        start.wait(PATIENCE)
        for _ in range(50):
            attempt(breaker, int)
            attempt(breaker, fail)

    threads = [
        threading.Thread(target=work, args=[breakers[i % 2]], daemon=True)
        for i in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive(), "a thread hangs"
    assert scrape().calls() == outcomes(success=800, failure=800)


def test_call_that_interrupts_the_counting_of_another_is_counted(metrics, scrape):
    """A signal handler or a finalizer may make a guarded call at any line, here where
    the name is read. That call must not wait for the call that it interrupts."""
    interrupting = CircuitBreaker(name="interrupting", listeners=[metrics])

    class Interrupted(CircuitBreaker):
        @property
        def name(self):
            interrupting.call(int)
            return "interrupted"

        @name.setter
        def name(self, name):
            self._name = name

    interrupted = Interrupted(listeners=[metrics])
    thread = threading.Thread(target=interrupted.call, args=[int], daemon=True)
    thread.start()
    thread.join(PATIENCE)
    assert not thread.is_alive(), "the thread waits for itself"
    assert scrape().calls("interrupted")["success"] == 1
    assert scrape().calls("interrupting")["success"] > 1


def test_successful_call_does_little_more_than_with_a_listener_that_hears_all(metrics):
    """The call runs at most two functions more: the two counters."""

    class HearsAll:
        def before_call(self, cb, func, *args, **kwargs):
            """Hears."""

        def success(self, cb):
            """Hears."""

    def functions_run(listener):
        run = []
        breaker = CircuitBreaker(name="weather", listeners=[listener])
        breaker.call(int)
        sys.setprofile(lambda frame, event, arg: run.append(event))
        try:
            breaker.call(int)
        finally:
            sys.setprofile(None)
        return len([event for event in run if event in ("call", "c_call")])

    assert functions_run(metrics) <= functions_run(HearsAll()) + 2


def test_watching_twice_counts_once(metrics, scrape):
    """The breaker may have been made with the listener, and several threads may watch
    it at once."""
    breaker = CircuitBreaker(name="weather", listeners=[metrics])
    other = CircuitBreaker(name="other")
    start = threading.Barrier(8)

    def watch():
        start.wait(PATIENCE)
        metrics.watch(breaker, other, other)

    threads = [threading.Thread(target=watch, daemon=True) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    breaker.call(int)
    other.call(int)
    assert scrape().calls()["success"] == 1
    assert scrape().calls("other")["success"] == 1


# State.


def test_state_follows_the_circuit(weather, scrape, clock, fail):
    """The value is 1 for the state that the circuit is in, and 0 for the others."""
    seen = []
    attempt(weather, fail)
    assert scrape().states() == {("weather", "closed"): 1}
    attempt(weather, fail)
    assert scrape().states() == {("weather", "open"): 1}
    clock.advance(60)
    weather.call(lambda: seen.append(scrape().states()))
    assert seen == [{("weather", "half-open"): 1}]
    assert scrape().states() == {("weather", "closed"): 1}
    assert set(scrape().values("state", "state")) == {
        ("closed",),
        ("open",),
        ("half-open",),
    }


def test_scrape_tells_how_far_the_circuit_is_from_the_next_trial(
    weather, scrape, clock, fail
):
    """The wait goes down to 0; from then on a trial is due until a call makes it."""
    seen = []

    def waits():
        found = scrape()
        return found.of("retry_after_seconds"), found.of("trial_due")

    assert waits() == (0, 0)
    attempt(weather, fail, 2)
    assert waits() == (60, 0)
    clock.advance(45)
    assert waits() == (15, 0)
    clock.advance(15)
    assert waits() == (0, 1)
    assert weather.current_state == "open", "the scrape has moved the circuit"
    weather.call(lambda: seen.append(waits()))
    assert seen == [(60, 0)]  # seconds until the trial would lose its place
    assert waits() == (0, 0)
    weather.half_open()
    assert waits() == (0, 1)
    weather.open(math.inf)
    assert waits() == (math.inf, 0)


def test_scrape_tells_the_failures_and_the_limit(weather, scrape, fail):
    """The values are those at the moment of the scrape, in whichever way they were
    set."""
    attempt(weather, fail)
    assert scrape().of("failures") == 1
    assert scrape().of("failures_limit") == 2
    weather.fail_counter, weather.fail_max = 7, math.inf
    assert scrape().of("failures") == 7
    assert scrape().of("failures_limit") == math.inf


def test_failures_that_time_has_forgotten_are_not_shown(metrics, scrape, clock, fail):
    """A gauge is read at the scrape, so nothing has to happen for it to change."""
    breaker = CircuitBreaker(window_seconds=30, name="weather")
    metrics.watch(breaker)
    attempt(breaker, fail, 3)
    assert scrape().of("failures") == 3
    clock.advance(31)
    assert scrape().of("failures") == 0


def test_breaker_that_nobody_watches_is_shown_without_counters(metrics, scrape):
    """A counter of 0 would say that there were no calls, so there is no counter."""
    breaker = CircuitBreaker(name="weather")
    breaker.call(int)
    breaker.open()
    found = scrape()
    assert found.states() == {("weather", "open"): 1}
    assert found.of("retry_after_seconds") > 0
    assert found.calls() == {}
    assert found.of("last_transition_timestamp_seconds") is None
    assert breaker.listeners == ()


def test_only_chosen_breakers_are_shown_where_a_list_is_given(registry, scrape):
    """Each scrape goes through the list anew."""
    weather, payments = (CircuitBreaker(name=name) for name in ("weather", "payments"))
    chosen = [weather]
    PrometheusMetrics(registry, breakers=chosen)
    assert scrape().states() == {("weather", "closed"): 1}
    chosen.append(payments)
    assert len(scrape().states()) == 2


def test_breaker_made_with_the_listener_is_shown_at_once(metrics, scrape):
    """The counters are 0 before the first call, also where the program has not called
    watch()."""
    breaker = CircuitBreaker(name="weather", listeners=[metrics])
    assert scrape().calls() == outcomes()
    breaker.call(int)
    assert scrape().calls()["success"] == 1


def assert_slow_is_shown_without_its_wait(found):
    """The breaker "slow" has two failures of three, and cannot be read at the
    moment."""
    assert found.states()["slow", "closed"] == 1
    assert found.of("failures", "slow") == 2
    assert found.of("failures_limit", "slow") == 3
    assert found.of("dry_run", "slow") == 0
    assert found.of("retry_after_seconds", "slow") is None
    assert found.of("trial_due", "slow") == 0
    assert found.calls("slow")["success"] == 0


def test_breaker_whose_lock_is_held_does_not_hold_the_scrape_up(metrics, scrape):
    """The scrape shows the values of this breaker that need no lock, and all values of
    the others."""
    held, let = threading.Event(), threading.Event()

    class Slow:
        def before_call(self, cb, func, *args, **kwargs):
            held.set()
            assert let.wait(PATIENCE)

    slow = CircuitBreaker(name="slow", fail_max=3, listeners=[metrics, Slow()])
    slow.fail_counter = 2
    others = [CircuitBreaker(name=f"other {i}") for i in range(20)]
    thread = threading.Thread(target=slow.call, args=[int], daemon=True)
    thread.start()
    try:
        assert held.wait(PATIENCE)
        began = time.monotonic()
        found = scrape()
        assert time.monotonic() - began < PATIENCE / 2
    finally:
        let.set()
        thread.join(PATIENCE)
    assert_slow_is_shown_without_its_wait(found)
    assert len(found.states()) == 1 + len(others)
    assert found.of("retry_after_seconds", "other 19") == 0
    assert scrape().of("retry_after_seconds", "slow") == 0


@pytest.mark.parametrize("is_called", [True, False])
def test_storage_that_hangs_does_not_hold_the_scrape_up(metrics, scrape, is_called):
    """The scrape shows the breaker's last snapshot, whether or not a call waits for the
    storage as well."""
    storage = Hanging()
    slow = CircuitBreaker(name="slow", fail_max=3, state_storage=storage)
    storage._fail_counter = 2
    metrics.watch(slow)
    storage.asked.clear()
    storage.let.clear()
    thread = threading.Thread(target=slow.call, args=[int], daemon=True)
    try:
        if is_called:
            thread.start()
            assert storage.asked.wait(PATIENCE)
        began = time.monotonic()
        found = scrape()
        assert time.monotonic() - began < PATIENCE / 2
    finally:
        storage.let.set()
        if is_called:
            thread.join(PATIENCE)
    assert_slow_is_shown_without_its_wait(found)
    until(lambda: scrape().of("retry_after_seconds", "slow") == 0)


def test_storage_that_has_never_answered_leaves_the_counters(metrics, scrape):
    """The scrape shows no state for the breaker."""
    storage = Hanging()
    breaker = CircuitBreaker(name="slow", state_storage=storage, listeners=[metrics])
    storage.let.clear()
    try:
        found = scrape()
    finally:
        storage.let.set()
    assert found.values("state", "breaker", "state") == {}
    assert found.of("failures", "slow") is None
    assert found.calls("slow") == outcomes()
    assert breaker.listeners == (metrics,)


@pytest.fixture
def patient(monkeypatch):
    """A scrape waits for a storage that answers, however busy the machine is."""
    monkeypatch.setattr(module, "PATIENCE", PATIENCE)


def test_storages_that_may_hang_are_asked_at_once(scrape, registry, patient):
    """A storage that hangs takes no time from another storage: the first answers here
    as soon as the second is read."""
    storages = first, second = Hanging(), Hanging()
    breakers = [
        CircuitBreaker(name=f"number {number}", state_storage=storage)
        for number, storage in enumerate(storages)
    ]
    PrometheusMetrics(registry, breakers)
    second.asked.clear()
    first.let = second.asked
    assert set(scrape().states()) == {("number 0", "closed"), ("number 1", "closed")}


def test_breaker_whose_storage_is_out_of_reach_does_not_cost_the_others(
    metrics, scrape, caplog, patient
):
    """The scrape shows only counters of this breaker, and the error is logged."""

    class Away(Deaf):
        broken = False

        @property
        def opened_at(self):
            if self.broken:
                raise ConnectionError("the storage is away")

    broken = CircuitBreaker(name="broken", state_storage=Away("away"))
    weather = CircuitBreaker(name="weather")
    metrics.watch(broken, weather)
    Away.broken = True
    found = scrape()
    assert found.states() == {("weather", "closed"): 1}
    assert found.calls("broken") == outcomes()
    assert "'broken' could not be read" in caplog.text


def test_looking_at_a_storage_in_a_thread_keeps_no_breaker_alive(
    metrics, scrape, patient
):
    """Neither the thread nor the snapshot refers to the breaker afterwards."""
    breaker = CircuitBreaker(name="weather", state_storage=Deaf("deaf"))
    assert scrape().states() == {("weather", "closed"): 1}
    del breaker
    gc.collect()
    assert scrape().states() == {}


# Transitions and times.


def test_transitions_are_counted_by_their_cause(weather, scrape, clock, fail):
    """The causes are a trip, a failed trial, a successful trial, and moves by hand,
    also with reasons of their own."""
    attempt(weather, fail, 2)
    for outcome in fail, int:
        clock.advance(60)
        attempt(weather, outcome)
    weather.half_open()
    weather.open(30, "the trial failed: maintenance")
    weather.close("the trial succeeded")
    assert scrape().transitions() == {
        ("weather", "open", "failures"): 1,
        ("weather", "half-open", "trial"): 2,
        ("weather", "open", "trial"): 1,
        ("weather", "closed", "trial"): 1,
        ("weather", "half-open", "hand"): 1,
        ("weather", "open", "hand"): 1,
        ("weather", "closed", "hand"): 1,
    }


def test_cause_is_unknown_where_the_storage_knows_no_moves(metrics, scrape, fail):
    """An older storage is not told the cause of a move."""
    breaker = CircuitBreaker(
        fail_max=1, name="weather", state_storage=Deaf("deaf"), listeners=[metrics]
    )
    attempt(breaker, fail)
    assert scrape().transitions() == {("weather", "open", "unknown"): 1}


@pytest.mark.parametrize("move", ["close", "open"])
def test_cause_is_unknown_where_the_circuit_has_moved_on(metrics, scrape, fail, move):
    """Another listener moves the circuit by hand as soon as the circuit trips. Then
    this listener is told of the trip, which the storage does not know any more."""

    class Mover:
        def state_change(self, cb, old_state, new_state):
            if new_state.reason.startswith("a failure"):
                getattr(cb, move)()

    breaker = CircuitBreaker(fail_max=1, name="weather", listeners=[Mover(), metrics])
    attempt(breaker, fail)
    state = {"close": "closed"}.get(move, move)
    assert scrape().transitions() == {
        ("weather", state, "hand"): 1,
        ("weather", "open", "unknown"): 1,
    }


def test_cause_is_unknown_of_a_move_that_something_else_made_in_the_storage(
    metrics, scrape
):
    """The storage still knows the earlier move, which opened the circuit."""
    breaker = CircuitBreaker(name="weather", listeners=[metrics])
    breaker.open()
    breaker._state_storage.state = "closed"
    assert breaker.state.name == "closed"
    assert scrape().transitions() == {
        ("weather", "open", "hand"): 1,
        ("weather", "closed", "unknown"): 1,
    }
    assert scrape().of("outage_start_timestamp_seconds") == 0


def test_outage_begins_with_the_trip_and_not_with_each_trial(
    weather, scrape, clock, fail
):
    """The last transition moves on with each trial; closing ends the outage."""

    def times():
        found = scrape()
        return (
            found.of("last_transition_timestamp_seconds"),
            found.of("outage_start_timestamp_seconds"),
        )

    assert times() == (0, 0)
    attempt(weather, fail, 2)
    trip = MIDNIGHT
    assert times() == (trip, trip)
    for minute in 1, 2, 3:
        clock.advance(60)
        attempt(weather, fail)
        assert times() == (trip + minute * 60, trip)
    clock.advance(60)
    weather.call(int)
    assert times() == (trip + 240, 0)


@pytest.mark.parametrize("trials", [0, 2])
def test_outage_that_was_there_before_begins_with_the_opening_that_is_known(
    metrics, scrape, clock, fail, trials
):
    """Trials that fail later do not change the beginning."""
    breaker = CircuitBreaker(name="weather", reset_timeout=60)
    breaker.open()
    opened_at = breaker._state_storage.opened_at.timestamp()
    metrics.watch(breaker)
    for _ in range(trials):
        clock.advance(60)
        attempt(breaker, fail)
    assert scrape().of("outage_start_timestamp_seconds") == opened_at


def test_outage_of_a_breaker_that_nobody_watches_is_shown_from_the_first_scrape_on(
    metrics, scrape, clock, fail
):
    """The outage begins with the opening that the scrape found. For a circuit that was
    never open and is not closed, the beginning is not known and not shown."""

    def start():
        return scrape().of("outage_start_timestamp_seconds")

    breaker = CircuitBreaker(name="weather", reset_timeout=60)
    assert start() == 0
    breaker.open()
    opened_at = breaker._state_storage.opened_at.timestamp()
    assert start() == opened_at
    clock.advance(60)
    attempt(breaker, fail)
    assert start() == opened_at
    breaker.close()
    assert start() == 0
    other = CircuitBreaker(name="other")
    other.half_open()
    assert scrape().values("outage_start_timestamp_seconds", "breaker") == {
        ("weather",): 0
    }


def test_trip_during_a_scrape_is_the_beginning_of_the_outage(metrics, scrape, clock):
    """The scrape has seen the circuit closed. Another thread trips the circuit before
    the scrape goes on, and the scrape must not erase the beginning."""

    class Tripping(CircuitBreaker):
        is_armed = False

        @property
        def listeners(self):
            if self.is_armed:
                self.is_armed = False
                self.open()
            return super().listeners

    breaker = Tripping(name="weather")
    metrics.watch(breaker)
    breaker.is_armed = True
    assert scrape().states() == {("weather", "closed"): 1}
    clock.advance(30)
    assert scrape().states() == {("weather", "open"): 1}
    assert scrape().of("outage_start_timestamp_seconds") == MIDNIGHT


# Names, and breakers that come and go.


def test_each_breaker_has_its_own_series(metrics, scrape, fail):
    """The name is the label, with any characters; one listener serves all breakers."""
    names = ["weather", 'a "b" \\ c\nd/\N{SNOWMAN}', None]
    breakers = [CircuitBreaker(name=name) for name in names]
    metrics.watch(*breakers)
    for times, breaker in enumerate(breakers):
        attempt(breaker, fail, times)
    found = scrape()
    assert [found.calls(name or "unnamed")["failure"] for name in names] == [0, 1, 2]
    assert set(found.states()) == {(name or "unnamed", "closed") for name in names}


def test_name_that_cannot_be_written_does_not_cost_the_scrape(metrics, scrape):
    """A lone surrogate is escaped."""
    breaker = CircuitBreaker(name="bad \udc80", listeners=[metrics])
    breaker.call(int)
    assert scrape().states() == {("bad \\udc80", "closed"): 1}
    assert scrape().calls("bad \\udc80")["success"] == 1


def test_breakers_with_one_name_do_not_hide_each_other(metrics, scrape, clock, fail):
    """Circuits and calls are added up. Of times and counts that cannot be added, the
    scrape shows the value that should worry an operator most."""
    breakers = [
        CircuitBreaker(fail_max=limit, reset_timeout=timeout, name="weather")
        for limit, timeout in ((5, 60), (2, 90), (9, 30))
    ]
    metrics.watch(*breakers)
    attempt(breakers[0], fail, 3)
    attempt(breakers[1], fail, 2)
    clock.advance(10)
    breakers[2].open()
    found = scrape()
    assert found.states() == {("weather", "closed"): 1, ("weather", "open"): 2}
    assert found.calls()["failure"] == 5
    assert found.of("failures") == 3
    assert found.of("failures_limit") == 2
    assert found.of("retry_after_seconds") == 80
    assert found.of("last_transition_timestamp_seconds") == MIDNIGHT + 10
    assert found.of("outage_start_timestamp_seconds") == MIDNIGHT
    clock.advance(80)
    assert scrape().of("trial_due") == 2


def test_no_counter_goes_back_when_one_of_two_breakers_with_a_name_goes(
    metrics, scrape, fail
):
    """Prometheus takes a counter that goes back for one that has begun again at 0."""
    stays, goes = (CircuitBreaker(name="weather") for _ in range(2))
    metrics.watch(stays, goes)
    attempt(stays, int, 2)
    attempt(goes, int, 3)
    del goes
    gc.collect()
    found = scrape()
    assert found.calls()["success"] == 5
    assert found.states() == {("weather", "closed"): 1}


def test_renamed_breaker_leaves_no_state_behind(weather, scrape, clock, fail):
    """A series that says open for ever would be wrong. Calls count under the name that
    the breaker has at the time."""
    attempt(weather, fail, 2)
    assert scrape().states() == {("weather", "open"): 1}
    weather.name = "climate"
    attempt(weather, int, 4)
    found = scrape()
    assert found.states() == {("climate", "open"): 1}
    assert found.of("outage_start_timestamp_seconds", "climate") == MIDNIGHT
    assert found.of("outage_start_timestamp_seconds", "weather") is None
    assert found.calls("climate") == outcomes(rejected=4)
    assert found.calls("weather") == outcomes(failure=2)


def test_breaker_that_has_gone_is_shown_no_more(metrics, scrape, clock):
    """The counters of the name stay for five minutes, so that every Prometheus scrapes
    the last calls."""
    breaker = CircuitBreaker(name="weather")
    metrics.watch(breaker)
    breaker.call(int)
    breaker.open()
    assert scrape().states() == {("weather", "open"): 1}
    del breaker
    gc.collect()
    clock.advance(299)
    found = scrape()
    assert found.states() == {}
    assert found.values("outage_start_timestamp_seconds") == {}
    assert found.calls()["success"] == 1
    clock.advance(2)
    assert scrape().samples == []


@pytest.fixture
def uncollected():
    """Python collects no garbage by itself, as in a process that allocates little."""
    thresholds = gc.get_threshold()
    gc.set_threshold(0)
    yield
    gc.set_threshold(*thresholds)


@pytest.mark.parametrize("seconds", [60, math.inf])
def test_breaker_that_was_thrown_away_does_not_stay_open(
    metrics, scrape, clock, uncollected, seconds
):
    """A breaker and its state refer to each other, and would live until Python collects
    garbage. A scrape collects garbage when the circuit looks as if the program had
    dropped its breaker."""
    breaker = CircuitBreaker(name="weather")
    breaker.open(seconds)
    del breaker
    assert scrape().states() == {("weather", "open"): 1}
    clock.advance(60)
    scrape()
    assert scrape().states() == {}


@pytest.fixture
def collections(clock, monkeypatch):
    """The times at which garbage was collected, and whether Python's collector is on. A
    collection takes longer in a bigger process."""
    collections = types.SimpleNamespace(times=[], take=0, are_on=True)

    def collect():
        collections.times.append(clock.now)
        clock.advance(collections.take)

    fake = types.SimpleNamespace(collect=collect, isenabled=lambda: collections.are_on)
    monkeypatch.setattr(module, "gc", fake)
    return collections


@pytest.mark.parametrize(("take", "pause"), [(0, 120), (5, 500)])
def test_garbage_is_collected_seldom(metrics, weather, clock, collections, take, pause):
    """A scrape collects at most once in two minutes, for at most one hundredth of the
    time, and only while some circuit looks idle: not for a closed circuit, nor for one
    that waits."""

    def scrapes(seconds):
        end = clock.now + seconds
        while clock.now < end:
            list(metrics.collect())
            clock.advance(5)

    collections.take = take
    scrapes(600)
    weather.open()
    scrapes(60)
    assert collections.times == []
    scrapes(2000)
    times = collections.times
    assert {later - time for time, later in zip(times, times[1:])} == {pause}
    weather.call(int)
    scrapes(10)
    count = len(times)
    scrapes(600)
    assert len(times) == count


def test_garbage_is_not_collected_where_the_program_has_switched_that_off(
    weather, scrape, clock, collections
):
    """A program may do so on purpose, such as where processes share their memory."""
    collections.are_on = False
    weather.open(0)
    for _ in range(10):
        clock.advance(1000)
        scrape()
    assert collections.times == []


def test_counters_of_a_breaker_that_is_made_anew_go_on(metrics, scrape):
    """The counters belong to the name, whichever breaker has the name."""
    for expected in 1, 2, 3:
        breaker = CircuitBreaker(name="weather", listeners=[metrics])
        breaker.call(int)
        assert scrape().calls()["success"] == expected
        del breaker
        gc.collect()


def test_scrape_does_not_keep_a_mapping_of_breakers_from_making_room(registry, scrape):
    """The mapping drops breakers that were scraped like others."""
    metrics = PrometheusMetrics(registry)
    hosts = CircuitBreakers(maxsize=2, listeners=[metrics])
    for number in range(10):
        hosts[number].call(int)
        scrape()
    gc.collect()
    assert len(hosts) == 2
    assert len(scrape().states()) == 2
    assert scrape().calls("0")["success"] == 1


def test_breaker_of_a_mapping_that_was_watched_later_can_go(metrics, scrape):
    """The counters of its name go on when the breaker is made anew and watched
    again."""
    hosts = CircuitBreakers(maxsize=2)
    for number in [*range(10), 0]:
        metrics.watch(hosts[number])
        hosts[number].call(int)
    assert list(hosts) == [9, 0]
    assert scrape().calls("0")["success"] == 2


def test_breakers_that_have_gone_are_forgotten_where_nothing_scrapes(metrics, clock):
    """Of five thousand breakers, one a second, the counters of the latest are left, and
    nothing of those that cannot be shown any more."""
    for number in range(5000):
        breaker = CircuitBreaker(name=str(number), listeners=[metrics])
        breaker.call(int)
        breaker.open()
        clock.advance(1)
    assert len(metrics._tallies) <= 1024 + 300
    del breaker
    gc.collect()
    assert not metrics._stories


# The registry, and what is refused.


def test_scrape_over_http_says_what_each_metric_is(metrics, registry, weather):
    """Each metric has its type and a help text, at a real endpoint."""
    server, thread = prometheus_client.start_http_server(
        0, addr="127.0.0.1", registry=registry
    )
    # No proxy: a request to this machine must not go through one.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        url = f"http://127.0.0.1:{server.server_port}/metrics"
        with opener.open(url, timeout=PATIENCE) as answer:
            text = answer.read().decode()
    finally:
        server.shutdown()
        server.server_close()
        thread.join(PATIENCE)
    for family in module.FAMILIES:
        kind, suffix = ("counter", "_total") if family.is_counter else ("gauge", "")
        assert f"# TYPE {family.name}{suffix} {kind}\n" in text
        assert f"# HELP {family.name}{suffix} {family.help}\n" in text
    assert 'circuit_breaker_state{breaker="weather",state="closed"} 1.0\n' in text


@pytest.mark.skipif(not shutil.which("promtool"), reason="needs promtool")
def test_scrape_has_nothing_that_promtool_complains_of(weather, scrape, fail):
    """The lint of the exposition format."""
    attempt(weather, fail, 3)
    lint = subprocess.run(
        ["promtool", "check", "metrics"],
        input=scrape().text,
        capture_output=True,
        text=True,
        timeout=4 * PATIENCE,
    )
    assert (lint.returncode, lint.stdout, lint.stderr) == (0, "", "")


def test_metrics_are_in_the_default_registry_unless_another_is_given(
    monkeypatch, registry, scrape
):
    """The program's endpoint reads the default registry."""
    monkeypatch.setattr(prometheus_client, "REGISTRY", registry)
    PrometheusMetrics().watch(breaker := CircuitBreaker(name="weather"))
    assert scrape().states() == {(breaker.name, "closed"): 1}


def test_second_collector_in_a_registry_is_refused(metrics, registry):
    """Otherwise each series would appear twice, and Prometheus would drop the whole
    scrape."""
    with pytest.raises(ValueError, match="circuit_breaker_state"):
        PrometheusMetrics(registry)


@pytest.mark.parametrize(
    "breakers",
    [iter([]), CircuitBreaker(name="weather"), ["weather"], 5],
    ids=["iterator", "breaker", "names", "number"],
)
def test_breakers_that_cannot_be_shown_are_refused(registry, scrape, breakers):
    """A TypeError names the parameter and the value, and nothing is registered."""
    with pytest.raises(TypeError, match="^breakers must .*, not "):
        PrometheusMetrics(registry, breakers=breakers)
    assert scrape().text == ""


def test_watch_takes_all_breakers_or_none(metrics):
    """If one argument is no breaker, watch() raises a TypeError that shows the
    argument."""
    breaker = CircuitBreaker()
    with pytest.raises(TypeError, match=r"^watch\(\) takes breakers, not 'weather'"):
        metrics.watch(breaker, "weather")
    assert breaker.listeners == ()


def test_error_says_what_to_install_where_prometheus_client_is_missing():
    """The error names the package and the command that installs the package."""
    code = """
        import sys
        sys.modules["prometheus_client"] = None
        try:
            import pybreaker_extras.prometheus
        except ImportError as exc:
            print(exc)
    """
    assert "python -m pip install prometheus-client" in run(code)


# Forks and several processes.


def run(code, **environment):
    """The output of a program, which must end well and print nothing else."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        capture_output=True,
        text=True,
        timeout=4 * PATIENCE,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")


@needs_fork
def test_forked_child_counts_what_it_does_itself(metrics, weather):
    """The child's counters begin at 0 and the parent's go on. A lock that another
    thread held at the fork does not block the child."""
    weather.call(int)
    weather.open()
    held, let = threading.Event(), threading.Event()

    def hold():
        with metrics._lock:
            held.set()
            let.wait(PATIENCE)

    thread = threading.Thread(target=hold, daemon=True)
    thread.start()
    assert held.wait(PATIENCE)
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            signal.alarm(int(PATIENCE))
            attempt(weather, int, 2)
            series = metrics._read()
            calls = sorted(series[module.CALLS].items())
            state = series[module.STATE]["weather", "open"]
            os.write(writing, repr((calls, state)).encode())
        finally:
            os._exit(0)
    let.set()
    thread.join(PATIENCE)
    os.waitpid(pid, 0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        calls, state = eval(pipe.read())
    assert dict(calls) == {
        ("weather", "abandoned"): 0,
        ("weather", "failure"): 0,
        ("weather", "rejected"): 2,
        ("weather", "success"): 0,
    }
    assert state == 1
    assert metrics._read()[module.CALLS]["weather", "success"] == 1


WORKERS = """
    import os, threading

    def check_threads():
        assert threading.active_count() == 1, "a fork would copy another thread's locks"

    os.register_at_fork(before=check_threads)  # what is registered first is run last

    import prometheus_client
    from prometheus_client import multiprocess
    import pybreaker
    from pybreaker_extras.prometheus import PrometheusMetrics

    def fail():
        raise ConnectionError

    metrics = PrometheusMetrics(prometheus_client.CollectorRegistry())
    weather = pybreaker.CircuitBreaker(name="weather", fail_max=2)
    metrics.watch(weather)
    registry = prometheus_client.CollectorRegistry()
    multiprocess.MultiProcessCollector(registry)

    def scrape(title):
        print(title)
        print(prometheus_client.generate_latest(registry).decode(), flush=True)

    def in_child(work):
        ours, theirs = os.pipe()
        done, go = os.pipe()
        pid = os.fork()
        if not pid:
            work()
            metrics.publish()
            os.write(theirs, b"x")
            os.read(done, 1)
            os._exit(0)
        os.read(ours, 1)
        def end():
            os.write(go, b"x")
            os.waitpid(pid, 0)
            multiprocess.mark_process_dead(pid)
        return end
"""


def parts(output):
    """The scrapes that a program has printed, by their titles."""
    found, title, lines = {}, None, []
    for line in output.splitlines(keepends=True):
        if line.startswith("= "):
            title, lines = line[2:].strip(), []
        lines.append(line if not line.startswith("= ") else "")
        found[title] = "".join(lines)
    return {title: Scrape(text) for title, text in found.items()}


def scrape_of_files(directory):
    """A scrape of the files of multiprocess mode in a folder."""
    return Scrape(
        run(
            """
            import prometheus_client
            from prometheus_client import multiprocess
            registry = prometheus_client.CollectorRegistry()
            multiprocess.MultiProcessCollector(registry)
            print(prometheus_client.generate_latest(registry).decode())
            """,
            PROMETHEUS_MULTIPROC_DIR=str(directory),
        )
    )


@needs_fork
def test_multiprocess_mode_adds_up_what_all_processes_say(tmp_path):
    """Two workers open their circuits, and one worker ends: its circuit does not count
    any more, and its calls do. Before the first scrape nothing has happened, and all
    counters are there."""
    output = run(
        textwrap.dedent(WORKERS)
        + textwrap.dedent("""
            def trip():
                for i in range(3):
                    try:
                        weather.call(fail)
                    except Exception:
                        pass

            scrape("= before")
            weather.call(int)
            metrics.publish()
            ends = [in_child(trip), in_child(trip)]
            scrape("= two")
            ends[0]()
            scrape("= one")
            ends[1]()
            weather.name = "climate"
            metrics.publish()
            scrape("= renamed")
        """),
        PROMETHEUS_MULTIPROC_DIR=str(tmp_path),
    )
    found = parts(output)
    assert found["before"].calls() == outcomes()
    assert len(found["before"].values("transitions_total", "to", "cause")) == 10
    assert found["two"].states() == {("weather", "closed"): 1, ("weather", "open"): 2}
    assert found["two"].calls() == outcomes(success=1, failure=4, rejected=2)
    outages = found["two"].values("outage_start_timestamp_seconds", "breaker", "pid")
    assert sorted(map(bool, outages.values())) == [False, True, True]
    assert found["one"].states() == {("weather", "closed"): 1, ("weather", "open"): 1}
    assert found["one"].calls() == outcomes(success=1, failure=4, rejected=2)
    assert found["renamed"].states() == {("climate", "closed"): 1}
    assert found["renamed"].calls() == outcomes(success=1, failure=4, rejected=2)


@needs_fork
def test_multiprocess_mode_writes_again_and_again_and_when_python_ends(tmp_path):
    """Calls reach the files without publish(), also the calls of a forked child, and no
    call counts twice."""
    output = run(
        textwrap.dedent(WORKERS)
        + textwrap.dedent("""
            import struct, time
            import pybreaker_extras.prometheus as module

            def scrape():
                try:
                    return prometheus_client.generate_latest(registry)
                except struct.error:  # the other process has just made a file
                    return b""

            def wait_for(calls):
                sample = f'outcome="success"}} {calls}.0'.encode()
                while sample not in scrape():
                    time.sleep(0.01)

            module.PUBLISHED_EVERY = 0.05
            pid = os.fork()
            weather.call(int)
            wait_for(2)
            if not pid:
                os._exit(0)
            os.waitpid(pid, 0)
            module.PUBLISHED_EVERY = 1000
            time.sleep(0.1)
            weather.call(int)
        """),
        PROMETHEUS_MULTIPROC_DIR=str(tmp_path),
    )
    assert output == ""
    assert scrape_of_files(tmp_path).calls() == outcomes(success=3)


def test_last_calls_are_written_when_python_ends_whatever_the_storage(tmp_path):
    """Some Pythons start no thread when they end, not even one that looks at a
    storage."""
    run(
        """
        import prometheus_client
        import pybreaker
        import pybreaker_extras.prometheus as module

        class Own(pybreaker.CircuitMemoryStorage):
            "A storage that does not say that it may be read at any time."

        module.PUBLISHED_EVERY = 1000
        metrics = module.PrometheusMetrics(prometheus_client.CollectorRegistry())
        weather = pybreaker.CircuitBreaker(name="weather", state_storage=Own("closed"))
        metrics.watch(weather)
        weather.call(int)
        """,
        PROMETHEUS_MULTIPROC_DIR=str(tmp_path),
    )
    assert scrape_of_files(tmp_path).calls() == outcomes(success=1)


PUBLISHES_WHEN_TOLD = """
    import gc, os
    import prometheus_client
    import pybreaker
    import pybreaker_extras.prometheus as module

    module._Publisher.start = lambda self: None  # no thread writes as well
    metrics = module.PrometheusMetrics(prometheus_client.CollectorRegistry())
    weather = pybreaker.CircuitBreaker(name="weather", listeners=[metrics])
    weather.call(int)
"""


def test_error_while_files_are_written_makes_no_call_count_again(tmp_path):
    """One counter cannot be written once, as on a full disk. Later each counter gets
    only the calls that it does not have yet."""
    run(
        textwrap.dedent(PUBLISHES_WHEN_TOLD)
        + textwrap.dedent("""
            write, written = prometheus_client.Counter.inc, []

            def fail_at_the_second(self, amount):
                written.append(amount)
                if len(written) == 2:
                    raise OSError("no space left on device")
                write(self, amount)

            prometheus_client.Counter.inc = fail_at_the_second
            for failing in True, False, False:
                weather.call(int)
                try:
                    metrics.publish()
                    assert not failing
                except OSError:
                    assert failing
        """),
        PROMETHEUS_MULTIPROC_DIR=str(tmp_path),
    )
    assert scrape_of_files(tmp_path).calls() == outcomes(success=4)


def test_counters_that_were_forgotten_and_are_there_again_go_on(tmp_path):
    """Between two writings a breaker is freed, its counters are dropped among a
    thousand others, and another breaker gets the name. The calls of that breaker count
    from 0 and are added."""
    run(
        textwrap.dedent(PUBLISHES_WHEN_TOLD)
        + textwrap.dedent("""
            import time, types

            for _ in range(9):
                weather.call(int)
            metrics.publish()
            del weather
            gc.collect()
            later = time.monotonic() + 2 * module.KEPT
            module.time = types.SimpleNamespace(
                monotonic=lambda: later, time=time.time
            )
            for number in range(1024):
                host = pybreaker.CircuitBreaker(name=str(number), listeners=[metrics])
                host.call(int)
            assert "weather" not in metrics._tallies
            weather = pybreaker.CircuitBreaker(name="weather", listeners=[metrics])
            weather.call(int)
            metrics.publish()
        """),
        PROMETHEUS_MULTIPROC_DIR=str(tmp_path),
    )
    assert scrape_of_files(tmp_path).calls() == outcomes(success=11)
