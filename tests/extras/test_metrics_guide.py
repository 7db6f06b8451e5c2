"""docs/metrics.rst: the code runs with the real SDK, and the list of metrics is
complete."""

from __future__ import annotations

import gc
import math
import re
from pathlib import Path

import pytest
from readme_support import blocks_of, parse

import pybreaker
from pybreaker import CircuitBreaker

prometheus_client = pytest.importorskip("prometheus_client")

from pybreaker_extras.prometheus import FAMILIES, PrometheusMetrics  # noqa: E402

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "metrics.rst"
SOURCE = GUIDE.read_text("utf-8")
EXPOSED = {each.name + ("_total" if each.is_counter else "") for each in FAMILIES}


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """Breakers that other tests have left are not shown."""
    gc.collect()
    monkeypatch.setattr(pybreaker, "_breakers", type(pybreaker._breakers)())


def run(namespace, *sections):
    """Run the Python code of these sections of the guide, in the guide's order."""
    for block in blocks_of(SOURCE):
        if block.section in sections and block.kind == "python":
            # The empty lines make a traceback name the line in the guide.
            code = "\n" * (block.line - 1) + block.text
            exec(compile(code, str(GUIDE), "exec"), namespace)
    return namespace


def test_guide_renders_without_a_warning():
    """Any site that shows the guide can render the page."""
    assert parse(SOURCE).astext().startswith("Metrics")


def test_every_piece_of_code_in_the_guide_is_run():
    """One of the tests below runs each piece."""
    assert {block.section for block in blocks_of(SOURCE) if block.kind == "python"} == {
        "Prometheus",
        "Several processes",
        "OpenTelemetry",
    }
    assert {block.kind for block in blocks_of(SOURCE)} == {"python"}


def test_list_of_the_guide_names_every_metric_and_label():
    """The guide names no other metrics and labels."""
    rows = re.findall(
        r"^``(circuit_breaker_\w+)``((?:, with)?(?: ``\w+``,?)*)$", SOURCE, re.M
    )
    expected = {
        each.name + ("_total" if each.is_counter else ""): list(each.labels[1:])
        for each in FAMILIES
    }
    assert {name: re.findall(r"``(\w+)``", labels) for name, labels in rows} == expected
    assert set(re.findall(r"circuit_breaker_\w+", SOURCE)) == EXPOSED


def test_name_makes_as_many_series_as_the_guide_says():
    """The number is that of a breaker without calls."""
    registry = prometheus_client.CollectorRegistry()
    weather = CircuitBreaker(name="weather")
    PrometheusMetrics(registry, breakers=[weather]).watch(weather)
    series = sum(len(family.samples) for family in registry.collect())
    assert f"each name makes {series} series" in SOURCE


def test_prometheus_is_used_as_the_guide_says(monkeypatch):
    """The endpoint shows two breakers, and the breakers of a mapping."""
    registry = prometheus_client.CollectorRegistry()
    monkeypatch.setattr(prometheus_client, "REGISTRY", registry)
    names = run({}, "Prometheus")
    names["weather"].call(int)
    text = prometheus_client.generate_latest(registry).decode()
    for name in "weather", "api.example.org":
        assert (
            f'circuit_breaker_calls_total{{breaker="{name}",outcome="success"}} 1.0'
            in text
        )


def test_endpoint_for_several_processes_works(monkeypatch, tmp_path):
    """The endpoint answers, and the hook for gunicorn removes the files of a dead
    process."""
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    names = run({}, "Several processes")
    answers = []
    environ = {"REQUEST_METHOD": "GET", "PATH_INFO": "/metrics"}
    names["metrics_app"](environ, lambda status, headers: answers.append(status))
    assert answers == ["200 OK"]
    left = tmp_path / "gauge_livesum_123.db"
    left.touch()
    names["child_exit"](None, type("Worker", (), {"pid": 123}))
    assert not left.exists()


@pytest.fixture
def telemetry(monkeypatch):
    """The guide's listener, and a function that collects the SDK's metrics: for each
    metric its points by their attributes, and its kind."""
    export = pytest.importorskip("opentelemetry.sdk.metrics.export")
    from opentelemetry import metrics
    from opentelemetry.sdk.metrics import MeterProvider

    reader = export.InMemoryMetricReader()
    provider = MeterProvider([reader], shutdown_on_exit=False)
    monkeypatch.setattr(metrics, "get_meter", provider.get_meter)
    breakers = {
        "weather": CircuitBreaker(fail_max=2, name="weather"),
        "payments": CircuitBreaker(),
    }
    run(breakers, "OpenTelemetry")

    def collect():
        data = reader.get_metrics_data()
        found = {}
        for resource in data.resource_metrics:
            for scope in resource.scope_metrics:
                for metric in scope.metrics:
                    if not metric.name.startswith("circuit_breaker."):
                        continue  # the SDK's own metrics
                    points = {
                        tuple(sorted(point.attributes.items())): point.value
                        for point in metric.data.data_points
                    }
                    found[metric.name] = metric, points
        return found

    yield breakers["weather"], collect
    provider.shutdown()


def attributes(name="weather", **more):
    more = {key.replace("__", "."): value for key, value in more.items()}
    return tuple(sorted({"circuit_breaker.name": name, **more}.items()))


def test_opentelemetry_counts_calls_and_transitions(telemetry, fail):
    """The metrics are monotonic sums, in units of calls and transitions."""

    def cancel():
        raise KeyboardInterrupt

    weather, collect = telemetry
    weather.call(int)
    with pytest.raises(KeyboardInterrupt):
        weather.call(cancel)
    for _ in range(3):
        with pytest.raises(Exception):  # noqa: B017
            weather.call(fail)
    calls, points = collect()["circuit_breaker.calls"]
    assert (calls.unit, calls.data.is_monotonic) == ("{call}", True)
    outcome = "circuit_breaker__call__outcome"
    assert points == {
        attributes(**{outcome: "success"}): 1,
        attributes(**{outcome: "abandoned"}): 1,
        attributes(**{outcome: "failure", "error__type": "Boom"}): 2,
        attributes(**{outcome: "rejected"}): 1,
    }
    moves, points = collect()["circuit_breaker.transitions"]
    assert (moves.unit, moves.data.is_monotonic) == ("{transition}", True)
    assert points == {attributes(circuit_breaker__state="open"): 1}


def test_opentelemetry_counts_each_call_of_a_dry_run_once(telemetry, fail):
    """The call counts by its outcome. A counter of its own says that the call would
    have been rejected."""
    weather, collect = telemetry
    weather.dry_run = True
    for func in fail, fail, int, int, int:
        try:
            weather.call(func)
        except Exception:
            pass
    found = collect()
    outcome = "circuit_breaker__call__outcome"
    assert found["circuit_breaker.calls"][1] == {
        attributes(**{outcome: "failure", "error__type": "Boom"}): 2,
        attributes(**{outcome: "success"}): 3,
    }
    rejections, points = found["circuit_breaker.dry_run.rejections"]
    assert (rejections.unit, rejections.data.is_monotonic) == ("{call}", True)
    assert points == {attributes(): 3}


def test_opentelemetry_shows_the_state_as_it_is(telemetry):
    """The state is an UpDownCounter, which follows a change of the name and counts the
    breakers with one name together."""
    weather, collect = telemetry
    weather.open()

    def states():
        return {
            each: n for each, n in collect()["circuit_breaker.count"][1].items() if n
        }

    def state(name, state):
        return attributes(name, circuit_breaker__state=state)

    count, points = collect()["circuit_breaker.count"]
    assert (count.unit, count.data.is_monotonic) == ("{circuit_breaker}", False)
    assert len(points) == 2 * 3
    assert states() == {state("weather", "open"): 1, state("unnamed", "closed"): 1}
    weather.name = None
    assert states() == {state("unnamed", "open"): 1, state("unnamed", "closed"): 1}
    twin = CircuitBreaker()
    twin.open()
    assert states() == {state("unnamed", "open"): 2, state("unnamed", "closed"): 1}


def test_opentelemetry_shows_the_wait_in_seconds(telemetry):
    """Of breakers with one name, the longest wait is shown."""
    weather, collect = telemetry
    weather.open(1000)
    wait, points = collect()["circuit_breaker.retry_after"]
    assert wait.unit == "s"
    assert 0 < points[attributes()] <= 1000
    assert points[attributes("unnamed")] == 0


def test_opentelemetry_is_given_no_infinite_wait(telemetry, caplog):
    """The SDK would drop the value, and log a warning at each collection."""
    weather, collect = telemetry
    weather.open(math.inf)
    wait, points = collect()["circuit_breaker.retry_after"]
    assert points == {attributes("unnamed"): 0}
    assert [each for each in caplog.records if each.name.startswith("opente")] == []
