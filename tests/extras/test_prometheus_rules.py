"""examples/prometheus_rules.yml: which alerts fire, and when, by promtool.

The test scrapes real breakers while it moves a clock, so that the rules meet the real
values of the metrics.
"""

from __future__ import annotations

import contextlib
import gc
import json
import re
import shutil
import subprocess
import types
from pathlib import Path

import pytest
from support import PATIENCE

import pybreaker
from pybreaker import CircuitBreaker

prometheus_client = pytest.importorskip("prometheus_client")

import pybreaker_extras.prometheus as module  # noqa: E402
from pybreaker_extras.prometheus import PrometheusMetrics  # noqa: E402

RULES = Path(__file__).resolve().parents[2] / "examples" / "prometheus_rules.yml"
INTERVAL = 15  # seconds from scrape to scrape
MINUTE = 60
FIRING = 'count by (alertname, breaker) (ALERTS{alertstate="firing"})'
FIRED = '{alertname="CircuitBreakerANY",breaker="weather"}'

pytestmark = pytest.mark.skipif(
    not shutil.which("promtool"), reason="needs promtool, of Debian's prometheus"
)


class World:
    """Instances of a service, each with a breaker, and a Prometheus that scrapes
    them."""

    def __init__(self):
        self.now = 0
        self.series = {}
        self.scrapes = 0
        self.registries = {}
        self.used = set(re.findall(r"circuit_breaker_\w+", RULES.read_text()))

    def start(self, instance="a", **settings):
        """Start a new process of an instance, with a closed circuit and counters of
        0."""
        return self.start_workers(1, instance, **settings).breakers[0]

    def start_workers(self, number, instance="a", **settings):
        """Start an instance with this many breakers of one name, which the metrics add
        up as multiprocess mode adds up workers."""
        registry = self.registries[instance] = prometheus_client.CollectorRegistry()
        breakers = [CircuitBreaker(name="weather", **settings) for _ in range(number)]
        PrometheusMetrics(registry, breakers=breakers).watch(*breakers)
        return Workers(breakers)

    def sleep(self, seconds):
        """Let time pass while Prometheus scrapes."""
        for _ in range(seconds):
            if self.now % INTERVAL == 0:
                self.scrape()
            self.now += 1

    def scrape(self):
        found = {}
        for instance, registry in self.registries.items():
            for family in registry.collect():
                for sample in family.samples:
                    labels = {**sample.labels, "job": "shop", "instance": instance}
                    text = ",".join(f'{k}="{v}"' for k, v in sorted(labels.items()))
                    if sample.name in self.used:
                        found[f"{sample.name}{{{text}}}"] = f"{sample.value:g}"
        for series in {**self.series, **found}:
            values = self.series.setdefault(series, ["_"] * self.scrapes)
            was_there = values[-1:] not in ([], ["_"], ["stale"])
            values.append(found.get(series, "stale" if was_there else "_"))
        self.scrapes += 1

    def values(self, name, **labels):
        """The scraped values of the series with these labels."""
        found = set()
        for series, values in self.series.items():
            if series.startswith(name) and all(
                f'{label}="{value}"' in series for label, value in labels.items()
            ):
                found.update(values)
        return found

    def call(self, breaker, minutes, every=5, is_up=True, takes=0):
        """Let a client call for this many minutes; a service that is down delays the
        client."""

        def service():
            self.sleep(takes)
            if not is_up:
                raise ConnectionError

        end = self.now + minutes * MINUTE
        while self.now < end:
            try:
                breaker.call(service)
            except Exception:
                pass
            self.sleep(min(every, max(0, end - self.now)))


class Workers:
    """The workers of one instance. A client's call goes to each worker."""

    def __init__(self, breakers):
        self.breakers = breakers  # which the instance's metrics show

    def call(self, service):
        for breaker in self.breakers:
            with contextlib.suppress(Exception):
                breaker.call(service)


@pytest.fixture
def world(monkeypatch):
    """A world whose time is that of breakers and metrics."""
    gc.collect()
    world = World()
    clock = types.SimpleNamespace(monotonic=lambda: 1000.0 + world.now)
    monkeypatch.setattr(pybreaker, "time", clock)
    clock = types.SimpleNamespace(
        monotonic=lambda: 1000.0 + world.now, time=lambda: 1.7e9 + world.now
    )
    monkeypatch.setattr(module, "time", clock)
    return world


@pytest.fixture
def check(world, tmp_path):
    """Compares what an expression gives, at each of these minutes, with what is
    expected."""

    def check(tests):
        test = {
            "rule_files": [str(RULES)],
            "evaluation_interval": f"{INTERVAL}s",
            "tests": [
                {
                    "interval": f"{INTERVAL}s",
                    "input_series": [
                        {"series": series, "values": " ".join(values)}
                        for series, values in world.series.items()
                    ],
                    **tests,
                }
            ],
        }
        file = tmp_path / "test.yml"
        file.write_text(json.dumps(test))  # which is YAML as well
        done = subprocess.run(
            ["promtool", "test", "rules", str(file)],
            capture_output=True,
            text=True,
            timeout=4 * PATIENCE,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    return check


@pytest.fixture
def check_alerts(world, check):
    """Says which alerts fire, from which minute on and until which one, and checks
    that in all other minutes they do not."""

    def check_alerts(**episodes):
        tests = []
        for minute in range(world.now // MINUTE):
            expected = [
                {"labels": FIRED.replace("ANY", alert), "value": 1}
                for alert, (first, last) in episodes.items()
                if first <= minute <= last
            ]
            tests.append(
                {"expr": FIRING, "eval_time": f"{minute}m", "exp_samples": expected}
            )
        check({"promql_expr_test": tests})

    return check_alerts


def test_promtool_finds_no_fault_in_the_rules():
    """Prometheus can read the rules."""
    done = subprocess.run(
        ["promtool", "check", "rules", str(RULES)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(("takes", "first"), [(0, 16), (10, 17), (30, 18)])
def test_outage_of_an_hour_is_one_alert(world, check_alerts, takes, first):
    """With a trial a minute, which a scrape may meet or miss, the alert fires from five
    minutes after the trip until five minutes after the recovery."""
    weather = world.start()
    world.call(weather, 10)
    world.call(weather, 60, is_up=False, takes=takes)
    world.call(weather, 30)
    half_open = world.values("circuit_breaker_state", state="half-open")
    assert ("1" in half_open) == (takes > 0)
    check_alerts(Open=(first, 75))


def test_trip_that_recovers_is_no_alert(world, check_alerts):
    """A single trip, and the first trial succeeds."""
    weather = world.start()
    world.call(weather, 10)
    world.call(weather, 1, is_up=False)
    world.call(weather, 60)
    assert "1" in world.values("circuit_breaker_state", state="open")
    check_alerts()


def test_circuit_that_nobody_calls_is_one_alert(world, check_alerts):
    """The alert is not that of an outage, which does not fire. The alert ends five
    minutes after a call has closed the circuit."""
    weather = world.start()
    world.call(weather, 10)
    world.call(weather, 1, is_up=False)
    world.sleep(60 * MINUTE)
    world.call(weather, 40)
    check_alerts(Uncalled=(15, 75))


def test_outage_that_callers_meet_after_a_quiet_night_is_an_alert(world, check_alerts):
    """The alert about a circuit without calls ends half an hour after the first
    call, and the alert about the outage fires meanwhile. Both end with the outage
    or before."""
    weather = world.start()
    world.call(weather, 5)
    world.call(weather, 1, is_up=False)
    world.sleep(54 * MINUTE)
    world.call(weather, 60, is_up=False)
    world.call(weather, 10)
    check_alerts(Uncalled=(10, 94), Open=(65, 124))


def test_circuit_that_a_new_process_finds_open_is_no_alert(world, check_alerts):
    """Its first scrape says that a trial is due, as the storage was open before. The
    scrape does not say how long the trial has been due."""
    world.sleep(10 * MINUTE)
    weather = world.start(state_storage=pybreaker.CircuitMemoryStorage("open"))
    world.sleep(2 * MINUTE)
    assert "1" in world.values("circuit_breaker_trial_due")
    world.call(weather, 10)
    check_alerts()


@pytest.mark.parametrize(
    ("timeout", "every", "episodes"),
    [
        (60, 1, {"Open": (16, 138)}),
        (60, 3, {"Open": (16, 138)}),
        (60, 4, {"Uncalled": (15, 49), "Open": (20, 138)}),
        (60, 5, {"Uncalled": (15, 138)}),
        (60, 20, {"Uncalled": (15, 138)}),
        (30, 3, {"Open": (16, 138)}),
        (30, 4, {"Uncalled": (15, 138)}),
        (120, 7, {"Uncalled": (16, 138)}),
    ],
)
def test_outage_that_few_calls_meet_is_one_alert_as_well(
    world, check_alerts, timeout, every, episodes
):
    """With a call every so many minutes, one of the alerts fires throughout."""
    weather = world.start(reset_timeout=timeout)
    world.call(weather, 10)
    world.call(weather, 1, is_up=False)
    world.call(weather, 120, every=every * MINUTE, is_up=False)
    check_alerts(**episodes)


def test_outage_lasts_through_restarts_of_the_process(world, check_alerts):
    """A new process has a closed circuit until its calls have failed often enough."""
    weather = world.start()
    world.call(weather, 10)
    for _ in range(6):
        world.call(weather, 10, is_up=False)
        weather = world.start()
        gc.collect()
    world.call(weather, 20)
    check_alerts(Open=(16, 74))


def test_outage_that_all_instances_see_is_one_alert(world, check_alerts):
    """The number of processes with the breaker makes no difference. An instance without
    calls does not hide the others, and has an alert of its own."""
    weather = [world.start(instance) for instance in "ab"]
    for _ in range(60):
        for breaker in weather:
            world.call(breaker, 0.5, is_up=False)
    world.sleep(MINUTE)
    for _ in range(30):
        world.call(weather[0], 1, is_up=False)
    check_alerts(Open=(6, 90), Uncalled=(64, 90))


def test_outage_in_a_dry_run_is_no_alert(world, check_alerts):
    """Callers get only the errors of the service."""
    weather = world.start(dry_run=True)
    world.call(weather, 10)
    world.call(weather, 60, is_up=False)
    assert "1" in world.values("circuit_breaker_state", state="open")
    check_alerts()


def test_dry_run_hides_no_circuit_that_refuses_calls(world, check_alerts):
    """An instance in a dry run silences no other instance, and one worker in a dry run
    silences no other worker."""
    workers, canary = world.start_workers(2), world.start("b", dry_run=True)
    world.call(workers, 10)
    world.call(workers, 30, is_up=False)
    workers.breakers[0].dry_run = True
    world.call(workers, 30, is_up=False)
    for breaker in workers.breakers:
        breaker.dry_run = True
    world.call(workers, 10, is_up=False)
    assert canary.dry_run and workers.breakers[0].current_state == "open"
    check_alerts(Open=(16, 74))


def test_circuit_that_trips_again_and_again_is_one_alert(world, check_alerts):
    """The circuit closes each time, so that no outage lasts for five minutes."""
    weather = world.start()
    for _ in range(12):
        world.call(weather, 8)
        world.call(weather, 2, is_up=False)
    world.call(weather, 90)
    check_alerts(TripsAgain=(31, 175))


def test_single_trip_of_many_workers_is_no_alert(world, check_alerts):
    """Each of four workers trips and recovers once. After three of the workers have
    ended, the counters still include them."""
    workers = world.start_workers(4)
    world.call(workers, 10)
    world.call(workers, 1, is_up=False)
    world.call(workers, 20)
    del workers.breakers[1:]
    gc.collect()
    world.call(workers, 60)
    assert "4" in world.values("circuit_breaker_transitions", to="closed")
    assert "1" in world.values("circuit_breaker_state", state="closed")
    check_alerts()


def test_workers_that_trip_again_and_again_are_one_alert(world, check_alerts):
    """The alert of four workers fires when that of one process would, also where
    another instance has had no trouble."""
    workers, other = world.start_workers(4), world.start("b")
    for _ in range(12):
        world.call(workers, 8)
        world.call(workers, 2, is_up=False)
    world.call(workers, 90)
    assert other.current_state == "closed"
    check_alerts(TripsAgain=(31, 175))


def test_circuit_that_is_opened_and_closed_by_hand_is_no_alert(world, check_alerts):
    """A closing by an operator is no recovery."""
    weather = world.start()
    for _ in range(6):
        world.call(weather, 8)
        weather.open()
        world.call(weather, 0.5)
        weather.close()
    check_alerts()


def test_texts_of_an_alert_name_the_circuit(world, check):
    """A pager shows these texts."""
    weather = world.start()
    world.call(weather, 10, is_up=False)
    check(
        {
            "alert_rule_test": [
                {
                    "eval_time": "9m",
                    "alertname": "CircuitBreakerOpen",
                    "exp_alerts": [
                        {
                            "exp_labels": {
                                "severity": "critical",
                                "breaker": "weather",
                                "job": "shop",
                            },
                            "exp_annotations": {
                                "summary": "The circuit weather has been open for "
                                "five minutes",
                                "description": "1 circuits of that name are open and "
                                "called. No trial has closed them.",
                            },
                        }
                    ],
                }
            ]
        }
    )
