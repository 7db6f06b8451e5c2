"""pybreaker_extras.prometheus, the rules and the dashboard, with a real Prometheus."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
from support import PATIENCE, until

from pybreaker import CircuitBreaker

prometheus_client = pytest.importorskip("prometheus_client")

from pybreaker_extras.prometheus import PrometheusMetrics  # noqa: E402

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
LOOPBACK = "127.0.0.1"

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not shutil.which("prometheus"), reason="needs Prometheus"),
]

CONFIGURATION = """
global: {scrape_interval: 200ms, evaluation_interval: 200ms}
rule_files: [rules.yml]
scrape_configs:
  - job_name: shop
    static_configs: [{targets: ["127.0.0.1:%d"]}]
"""


class Service:
    """A process that calls another service through a breaker until told to stop. A
    restart makes a new breaker and new counters, at the same port."""

    def __init__(self):
        self.is_up = True
        self.server = None
        self.port = 0
        self.start()

    def start(self):
        registry = prometheus_client.CollectorRegistry()
        self.breaker = CircuitBreaker(name="weather", reset_timeout=0.5)
        PrometheusMetrics(registry, breakers=[self.breaker]).watch(self.breaker)
        self.server, self.thread = prometheus_client.start_http_server(
            self.port, addr=LOOPBACK, registry=registry
        )
        self.port = self.server.server_port
        self.stopping = threading.Event()
        self.caller = threading.Thread(target=self.call_on, daemon=True)
        self.caller.start()

    def call_on(self):
        while not self.stopping.wait(0.02):
            with contextlib.suppress(Exception):
                self.breaker.call(self.forecast)

    def forecast(self):
        if not self.is_up:
            time.sleep(0.3)  # so that scrapes meet trials
            raise ConnectionError

    def stop(self):
        self.stopping.set()
        self.caller.join(PATIENCE)
        self.server.shutdown()
        self.server.server_close()
        self.thread.join(PATIENCE)


class Prometheus:
    """A server with the rules, whose times are divided by a factor."""

    def __init__(self, directory, port):
        rules = (EXAMPLES / "prometheus_rules.yml").read_text("utf-8")
        (directory / "rules.yml").write_text(re.sub(r"\b(\d+)m\b", r"\1s", rules))
        (directory / "prometheus.yml").write_text(CONFIGURATION % port)
        with socket.create_server((LOOPBACK, 0)) as free:
            own_port = free.getsockname()[1]
        with open(directory / "log", "w") as log:
            self.process = subprocess.Popen(
                [
                    "prometheus",
                    f"--config.file={directory / 'prometheus.yml'}",
                    f"--storage.tsdb.path={directory / 'data'}",
                    f"--web.listen-address={LOOPBACK}:{own_port}",
                ],
                stdout=log,
                stderr=log,
                cwd=directory,
            )
        # No proxy: a request to this machine must not go through one.
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        self.url = f"http://{LOOPBACK}:{own_port}/api/v1/"

    def get(self, what, **parameters):
        url = f"{self.url}{what}?{urllib.parse.urlencode(parameters)}"
        with self.opener.open(url, timeout=PATIENCE) as answer:
            return json.load(answer)["data"]

    def query(self, expression):
        """The result of a query: its values, by the values of all labels."""
        try:
            result = self.get("query", query=expression)["result"]
        except urllib.error.HTTPError as error:
            with error:
                if error.code == 503:  # the server is not ready
                    return {}
                pytest.fail(f"{expression}: {error.read().decode()}")
        except OSError:  # the server does not listen yet
            return {}
        return {tuple(each["metric"].values()): each["value"][1] for each in result}

    def firing(self):
        """The alerts that fire, with the time since when."""
        return {
            alert["labels"]["alertname"]: alert["activeAt"]
            for alert in self.get("alerts")["alerts"]
            if alert["state"] == "firing"
        }

    def stop(self):
        self.process.terminate()
        self.process.wait(PATIENCE)


@pytest.fixture
def service():
    service = Service()
    yield service
    service.stop()


@pytest.fixture
def prometheus(tmp_path, service):
    prometheus = Prometheus(tmp_path, service.port)
    try:
        until(lambda: prometheus.query("up == 1"))
        yield prometheus
    finally:
        prometheus.stop()


def test_outage_is_one_alert_through_trials_and_a_restart(prometheus, service):
    """The alert is the same from the beginning of the outage to its end, while circuits
    open and half-open and while the process restarts. Meanwhile Prometheus answers the
    dashboard's queries."""
    assert prometheus.firing() == {}
    service.is_up = False
    began = time.time()
    since = until(lambda: prometheus.firing().get("CircuitBreakerOpen"))
    outage = prometheus.query("max(circuit_breaker_outage_start_timestamp_seconds)")
    assert began - 1 < float(outage[()]) < time.time()

    dashboard = json.loads((EXAMPLES / "grafana_dashboard.json").read_text("utf-8"))
    queries = [
        target["expr"] for panel in dashboard["panels"] for target in panel["targets"]
    ]
    for query in queries:
        query = re.sub(r"\$__\w+|1h", "5s", query)
        query = re.sub(r"\$\w+", ".*", query)
        found = prometheus.query(query)
        is_rare = "dry_run_rejections" in query or 'outcome="abandoned"' in query
        assert found or is_rare, query

    trials = 'sum(circuit_breaker_transitions_total{to="open", cause="trial"})'
    for _ in range(3):
        tried = prometheus.query(trials)
        until(lambda tried=tried: prometheus.query(trials) != tried)
        assert prometheus.firing().get("CircuitBreakerOpen") == since
    service.stop()
    service.start()
    until(lambda: service.breaker.current_state == "open")
    until(lambda: prometheus.query('circuit_breaker_state{state="open"} == 1'))
    assert prometheus.firing() == {"CircuitBreakerOpen": since}

    service.is_up = True
    until(lambda: prometheus.firing() == {})
    assert service.breaker.current_state == "closed"


def test_renamed_breaker_leaves_no_series_that_says_open(prometheus, service):
    """Once the new name has been scraped, Prometheus does not find the old name."""
    service.breaker.open(1000)
    until(lambda: prometheus.query('circuit_breaker_state{state="open"} == 1'))
    service.breaker.name = "climate"
    is_open = 'sum by (breaker) (circuit_breaker_state{state="open"})'
    until(lambda: ("climate",) in prometheus.query(is_open))
    assert prometheus.query(is_open) == {("climate",): "1"}
