"""What breakers do, as metrics for Prometheus; needs prometheus-client.

    python examples/prometheus_metrics.py

serves the metrics of a demo on http://127.0.0.1:8301/metrics . To have them in
your own program, copy this file, then

    metrics = PrometheusMetrics()
    metrics.watch(weather, payments)

beside the endpoint that you have already, or `prometheus_client.start_http_server`.
In alerts and dashboards these are then to be had:

    circuit_breaker_state{breaker="weather", state="open"} == 1
    rate(circuit_breaker_calls_total{outcome="failure"}[5m])
    increase(circuit_breaker_transitions_total{to="open"}[1h])

An abandoned call has no outcome and is not counted. A breaker's name should be
one of a few: each one makes a dozen time series.
"""

import sys
import threading
import time
from pathlib import Path

import prometheus_client

try:
    import pybreaker
except ImportError:  # not installed: use the one in the directory above
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import pybreaker

CLOSED, OPEN, HALF_OPEN = STATES = (
    pybreaker.STATE_CLOSED,
    pybreaker.STATE_OPEN,
    pybreaker.STATE_HALF_OPEN,
)
# Those that a circuit makes by itself.
MOVES = [(CLOSED, OPEN), (OPEN, HALF_OPEN), (HALF_OPEN, CLOSED), (HALF_OPEN, OPEN)]
OUTCOMES = ("success", "failure", "rejected")


class PrometheusMetrics(pybreaker.CircuitBreakerListener):
    """A listener that counts. One serves any number of breakers."""

    def __init__(self, registry=None):
        registry = registry or prometheus_client.REGISTRY
        self._calls = prometheus_client.Counter(
            "circuit_breaker_calls",
            "Calls through the breaker, by outcome.",
            ["breaker", "outcome"],
            registry=registry,
        )
        self._state = prometheus_client.Gauge(
            "circuit_breaker_state",
            "1 for the state that the circuit is in, 0 for the others.",
            ["breaker", "state"],
            registry=registry,
        )
        self._transitions = prometheus_client.Counter(
            "circuit_breaker_transitions",
            "Moves of the circuit from one state to another.",
            ["breaker", "from", "to"],
            registry=registry,
        )

        self._shown = set()

    def watch(self, *breakers):
        """Listen to these breakers, and show them at once, quiet as they are."""
        for breaker in breakers:
            breaker.add_listener(self)
            self._name(breaker)

    def success(self, cb):
        self._calls.labels(self._name(cb), "success").inc()

    def failure(self, cb, exc):
        self._calls.labels(self._name(cb), "failure").inc()

    def rejected(self, cb, func, *args, **kwargs):
        self._calls.labels(self._name(cb), "rejected").inc()

    def state_change(self, cb, old_state, new_state):
        name = self._name(cb)
        self._transitions.labels(name, old_state.name, new_state.name).inc()
        self._show_state(name, new_state.name)

    def _name(self, breaker):
        """The breaker's label. When it is new, all series begin, at 0: so a rate
        is right from the first event on."""
        name = breaker.name or "unnamed"
        if name not in self._shown:
            for outcome in OUTCOMES:
                self._calls.labels(name, outcome)
            for old, new in MOVES:
                self._transitions.labels(name, old, new)
            self._show_state(name, breaker.current_state)
            self._shown.add(name)
        return name

    def _show_state(self, name, current):
        for state in STATES:
            self._state.labels(name, state).set(state == current)


def demo():
    """Calls a service that fails half of the time, half a minute each."""
    weather = pybreaker.CircuitBreaker(name="weather", reset_timeout=5)
    PrometheusMetrics().watch(weather)

    def forecast():
        if time.monotonic() % 60 > 30:
            raise ConnectionError("weather refused the connection")

    while True:
        time.sleep(0.3)
        try:
            weather.call(forecast)
        except Exception:
            pass


if __name__ == "__main__":
    threading.Thread(target=demo, daemon=True).start()
    server, thread = prometheus_client.start_http_server(8301, addr="127.0.0.1")
    print("The metrics are at http://127.0.0.1:8301/metrics", flush=True)
    try:
        thread.join()
    except KeyboardInterrupt:
        server.shutdown()
