"""docs/metrics.rst, "Several processes": a scrape of a real gunicorn."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
import urllib.request
from pathlib import Path

import pytest
from readme_support import blocks_of
from support import PATIENCE, until

pytest.importorskip("gunicorn")
pytest.importorskip("prometheus_client")

pytestmark = pytest.mark.long

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "metrics.rst"

APPLICATION = """
    import os

    import pybreaker
    from pybreaker_extras.prometheus import PrometheusMetrics

    weather = pybreaker.CircuitBreaker(name="weather", fail_max=2)
    metrics = PrometheusMetrics()
    metrics.watch(weather)


    def fail():
        raise ConnectionError


    def application(environ, start_response):
        if environ["PATH_INFO"] == "/metrics":
            return metrics_app(environ, start_response)
        while weather.current_state == "closed":
            try:
                weather.call(fail)
            except Exception:
                pass
        metrics.publish()
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [str(os.getpid()).encode()]
"""


class Server:
    """A gunicorn with two workers, and with the endpoint and the configuration of the
    guide."""

    def __init__(self, directory):
        metrics_app, child_exit = (
            block.text
            for block in blocks_of(GUIDE.read_text("utf-8"))
            if block.section == "Several processes"
        )
        application = metrics_app + textwrap.dedent(APPLICATION)
        (directory / "application.py").write_text(application)
        (directory / "configuration.py").write_text(child_exit)
        (directory / "files").mkdir()
        self.log = directory / "log"
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "gunicorn",
                    "--workers=2",
                    "--bind=127.0.0.1:0",
                    "--config=configuration.py",
                    "application:application",
                ],
                cwd=directory,
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(sys.path),
                    "PROMETHEUS_MULTIPROC_DIR": str(directory / "files"),
                },
                stdout=log,
                stderr=log,
            )
        # No proxy: a request to this machine must not go through one.
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def address(self):
        found = re.search(r"Listening at: (http://\S+)", self.log.read_text())
        return found and found[1]

    def get(self, path):
        with self.opener.open(self.address() + path, timeout=PATIENCE) as answer:
            return answer.read().decode()

    def sample(self, series):
        """The value of one series in a scrape; None if there is no such series."""
        found = re.search(f"^{re.escape(series)} (.*)$", self.get("/metrics"), re.M)
        return found and float(found[1])

    def circuits(self):
        """The number of closed circuits and the number of open circuits."""
        series = 'circuit_breaker_state{{breaker="weather",state="{}"}}'
        return tuple(self.sample(series.format(state)) for state in ("closed", "open"))

    def stop(self):
        self.process.terminate()
        self.process.wait(PATIENCE)


@pytest.fixture
def server(tmp_path):
    server = Server(tmp_path)
    try:
        yield server
    finally:
        server.stop()


def test_worker_that_was_killed_leaves_its_calls_and_not_its_circuit(server):
    """Two workers trip. One is killed, and gunicorn starts another, whose circuit is
    closed: no scrape shows the dead worker's circuit, and no counter goes back."""
    failures = 'circuit_breaker_calls_total{breaker="weather",outcome="failure"}'
    until(server.address)
    until(lambda: server.circuits() == (2, 0))
    assert server.sample(failures) == 0
    workers = set()
    until(lambda: workers.add(int(server.get("/"))) or len(workers) == 2)
    assert server.circuits() == (0, 2)
    assert server.sample(failures) == 4
    os.kill(workers.pop(), signal.SIGKILL)
    until(lambda: server.circuits() == (1, 1))
    assert server.sample(failures) == 4
