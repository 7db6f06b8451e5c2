"""examples/prometheus_metrics.py: what a scrape says of the breakers."""

from __future__ import annotations

import socket
import threading
import urllib.request

import pytest
from support import PATIENCE

import pybreaker
from pybreaker import CircuitBreaker, CircuitBreakerError

prometheus_client = pytest.importorskip("prometheus_client")
parser = pytest.importorskip("prometheus_client.parser")

from prometheus_metrics import PrometheusMetrics  # noqa: E402

LOOPBACK = "127.0.0.1"


class Prometheus:
    """Scrapes over HTTP, as Prometheus does."""

    def __init__(self, port):
        self.url = f"http://{LOOPBACK}:{port}/metrics"
        # Without proxies: the way to this very machine must not lead through one.
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def scrape(self):
        with self.opener.open(self.url, timeout=PATIENCE) as answer:
            return answer.read().decode()

    def values(self, metric, *labels):
        """The values of a metric, by the values of these labels."""
        return {
            tuple(sample.labels[label] for label in labels): sample.value
            for family in parser.text_string_to_metric_families(self.scrape())
            for sample in family.samples
            if sample.name == metric
        }

    def calls(self):
        return self.values("circuit_breaker_calls_total", "breaker", "outcome")

    def state(self):
        """The states that the gauge says the circuits are in."""
        states = self.values("circuit_breaker_state", "breaker", "state")
        assert set(states.values()) <= {0, 1}
        return [labels for labels, value in states.items() if value]

    def transitions(self):
        """Those that there were, as names."""
        moves = self.values(
            "circuit_breaker_transitions_total", "breaker", "from", "to"
        )
        return {labels: count for labels, count in moves.items() if count}


@pytest.fixture
def registry():
    return prometheus_client.CollectorRegistry()


@pytest.fixture
def metrics(registry):
    return PrometheusMetrics(registry)


@pytest.fixture
def prometheus(registry):
    server, thread = prometheus_client.start_http_server(
        0, addr=LOOPBACK, registry=registry
    )
    yield Prometheus(server.server_port)
    # It looks twice a second whether it should end, and when somebody calls.
    end = threading.Thread(target=server.shutdown)
    end.start()
    socket.create_connection((LOOPBACK, server.server_port)).close()
    end.join(PATIENCE)
    server.server_close()
    thread.join(PATIENCE)


@pytest.fixture
def weather(metrics, clock):
    breaker = CircuitBreaker(fail_max=2, reset_timeout=60, name="weather")
    metrics.watch(breaker)
    return breaker


def attempt(breaker, func):
    """A call whose error is of no interest here."""
    try:
        breaker.call(func)
    except Exception:
        pass


def test_breaker_is_shown_before_anything_happened(weather, prometheus):
    """With every outcome at 0, so that the first failure shows as an increase."""
    assert prometheus.calls() == {
        ("weather", "success"): 0,
        ("weather", "failure"): 0,
        ("weather", "rejected"): 0,
    }
    moves = prometheus.values("circuit_breaker_transitions_total", "from", "to")
    assert moves == {
        ("closed", "open"): 0,
        ("open", "half-open"): 0,
        ("half-open", "closed"): 0,
        ("half-open", "open"): 0,
    }
    assert prometheus.state() == [("weather", "closed")]


def test_calls_are_counted_by_outcome(weather, prometheus, fail):
    """Three succeed, two fail and open the circuit, four are rejected."""
    for func, times in (int, 3), (fail, 2), (int, 4):
        for _ in range(times):
            attempt(weather, func)
    assert prometheus.calls() == {
        ("weather", "success"): 3,
        ("weather", "failure"): 2,
        ("weather", "rejected"): 4,
    }


def test_abandoned_call_is_not_counted(weather, prometheus):
    """It has no outcome."""

    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        weather.call(interrupted)
    assert set(prometheus.calls().values()) == {0}


def test_gauge_follows_the_state(weather, prometheus, clock, fail):
    """It is 1 for the state that the circuit is in and 0 for the others."""
    seen = []

    def trial():
        seen.extend(prometheus.state())

    attempt(weather, fail)
    assert prometheus.state() == [("weather", "closed")]
    attempt(weather, fail)
    assert prometheus.state() == [("weather", "open")]
    clock.advance(60)
    weather.call(trial)
    assert seen == [("weather", "half-open")]
    assert prometheus.state() == [("weather", "closed")]


def test_transitions_are_counted_by_their_ends(weather, prometheus, clock, fail):
    """A trip, a failed trial and one that succeeds, and one move by hand."""
    attempt(weather, fail)
    attempt(weather, fail)
    for outcome in fail, int:
        clock.advance(60)
        attempt(weather, outcome)
    weather.half_open()
    assert prometheus.transitions() == {
        ("weather", "closed", "open"): 1,
        ("weather", "open", "half-open"): 2,
        ("weather", "half-open", "open"): 1,
        ("weather", "half-open", "closed"): 1,
        ("weather", "closed", "half-open"): 1,
    }


def test_each_breaker_has_its_own_series(metrics, prometheus, fail):
    """With its name for a label, whatever is in it; one listener serves them all."""
    names = ["weather", 'a "b" \\ c\nd/\N{SNOWMAN}', None]
    breakers = [CircuitBreaker(name=name) for name in names]
    metrics.watch(*breakers)
    for times, breaker in enumerate(breakers):
        for _ in range(times):
            attempt(breaker, fail)
    counted = {name: n for (name, outcome), n in prometheus.calls().items() if n}
    assert counted == {names[1]: 1, "unnamed": 2}
    assert set(prometheus.state()) == {(name or "unnamed", "closed") for name in names}


def test_listener_that_was_given_to_the_breaker_shows_the_state_as_well(
    metrics, prometheus
):
    """From the first event on, where nobody called watch()."""
    breaker = CircuitBreaker(name="weather", listeners=[metrics])
    breaker.call(int)
    assert prometheus.state() == [("weather", "closed")]
    assert prometheus.calls()["weather", "success"] == 1


def test_breaker_that_is_open_already_is_shown_so(metrics, prometheus):
    """The gauge does not wait for the first transition."""
    breaker = CircuitBreaker(name="weather")
    breaker.open()
    metrics.watch(breaker)
    assert prometheus.state() == [("weather", "open")]


def test_nothing_is_lost_when_many_threads_call(metrics, prometheus, fail):
    """Sixteen at once: what a scrape says adds up to what they did."""
    breaker = CircuitBreaker(fail_max=10**6, name="weather")
    metrics.watch(breaker)
    start = threading.Barrier(16)

    def work():
        start.wait(PATIENCE)
        for _ in range(50):
            attempt(breaker, int)
            attempt(breaker, fail)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive(), "a thread hangs"
    assert prometheus.calls() == {
        ("weather", "success"): 800,
        ("weather", "failure"): 800,
        ("weather", "rejected"): 0,
    }


def test_scrape_says_what_each_metric_is(weather, prometheus):
    """Each has its type and a help text."""
    text = prometheus.scrape()
    for metric, kind in [
        ("circuit_breaker_calls_total", "counter"),
        ("circuit_breaker_state", "gauge"),
        ("circuit_breaker_transitions_total", "counter"),
    ]:
        assert f"# TYPE {metric} {kind}\n" in text
        assert f"# HELP {metric} " in text
    assert (
        'circuit_breaker_calls_total{breaker="weather",outcome="failure"} 0.0\n' in text
    )


def test_metrics_are_in_the_default_registry_unless_another_is_given(monkeypatch):
    """Where the endpoint that a program has already finds them."""
    registry = prometheus_client.CollectorRegistry()
    monkeypatch.setattr(prometheus_client, "REGISTRY", registry)
    PrometheusMetrics().watch(CircuitBreaker(name="weather"))
    text = prometheus_client.generate_latest(registry).decode()
    assert 'circuit_breaker_state{breaker="weather",state="closed"} 1.0\n' in text


def test_rejection_reaches_the_caller(weather):
    """Counting it does not swallow it."""
    weather.open()
    with pytest.raises(CircuitBreakerError):
        weather.call(int)
    assert weather.current_state == pybreaker.STATE_OPEN
