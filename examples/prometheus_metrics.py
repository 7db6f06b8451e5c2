"""A demo of the metrics for Prometheus; needs prometheus-client.

    python examples/prometheus_metrics.py

serves the metrics on http://127.0.0.1:8301/metrics . Beside this file are a dashboard
for Grafana, to be imported, and rules for alerts.
"""

import sys
import threading
import time
from pathlib import Path

import prometheus_client

try:
    import pybreaker
except ImportError:  # not installed: use the module in the directory above
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import pybreaker

from pybreaker_extras.prometheus import PrometheusMetrics

weather = pybreaker.CircuitBreaker(name="weather", reset_timeout=5)


def forecast():
    """A service that fails in every second half of a minute."""
    if time.monotonic() % 60 > 30:
        raise ConnectionError("weather refused the connection")


def call_for_ever():
    while True:
        time.sleep(0.3)
        try:
            weather.call(forecast)
        except Exception:
            pass


if __name__ == "__main__":
    PrometheusMetrics().watch(weather)
    threading.Thread(target=call_for_ever, daemon=True).start()
    server, thread = prometheus_client.start_http_server(8301, addr="127.0.0.1")
    print("The metrics are at http://127.0.0.1:8301/metrics", flush=True)
    try:
        thread.join()
    except KeyboardInterrupt:
        server.shutdown()
