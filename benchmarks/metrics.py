"""What counting calls for Prometheus costs, beside a listener that hears all.

    python benchmarks/metrics.py

The script needs prometheus-client. It times a successful call of a decorated function
with each kind of listener by turns, in rounds so short that all listeners meet the same
machine. It prints the shortest time, and the median ratio to the listener whose six
methods do nothing; then how long a scrape of a thousand breakers takes.
"""

import pathlib
import statistics
import sys
import time
import timeit

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import prometheus_client  # noqa: E402

import pybreaker  # noqa: E402
from pybreaker_extras.prometheus import PrometheusMetrics  # noqa: E402

ROUNDS = 300
CALLS = 300  # in a round: few, so that it ends before another process has its turn


class HearsAll:
    """Six methods that do nothing."""

    def before_call(self, cb, func, *args, **kwargs):
        """Do nothing."""

    def success(self, cb):
        """Do nothing."""

    def failure(self, cb, exc):
        """Do nothing."""

    def rejected(self, cb, func, *args, **kwargs):
        """Do nothing."""

    def abandoned(self, cb):
        """Do nothing."""

    def state_change(self, cb, old_state, new_state):
        """Do nothing."""


class CountsTwice(HearsAll):
    """Counts two events with counters of prometheus-client that it keeps."""

    def __init__(self, counter):
        self.admitted = counter.labels("weather", "admitted")
        self.succeeded = counter.labels("weather", "success")

    def before_call(self, cb, func, *args, **kwargs):
        self.admitted.inc()

    def success(self, cb):
        self.succeeded.inc()


def timer(*listeners):
    @pybreaker.CircuitBreaker(name="weather", listeners=listeners)
    def call(a, b):
        return a

    return timeit.Timer("call(1, 2)", globals={"call": call})


def measure():
    counter = prometheus_client.Counter(
        "calls", "Calls.", ["breaker", "outcome"], registry=None
    )
    metrics = PrometheusMetrics(prometheus_client.CollectorRegistry())
    timers = {
        "no listener": timer(),
        "hears all": timer(HearsAll()),
        "hears all, two counters of prometheus-client": timer(CountsTwice(counter)),
        "pybreaker_extras.prometheus": timer(metrics),
    }
    rounds = [
        {name: each.timeit(CALLS) / CALLS for name, each in timers.items()}
        for _ in range(ROUNDS)
    ]
    for name in timers:
        seconds = min(each[name] for each in rounds)
        ratio = statistics.median(each[name] / each["hears all"] for each in rounds)
        print(f"{name:46} {seconds * 1e6:6.2f} us  {ratio:5.2f}")


def measure_scrape(count=1000):
    registry = prometheus_client.CollectorRegistry()
    metrics = PrometheusMetrics(registry)
    breakers = [pybreaker.CircuitBreaker(name=f"host {i}") for i in range(count)]
    metrics.watch(*breakers)
    took = []
    for _ in range(5):
        began = time.perf_counter()
        list(metrics.collect())
        read = time.perf_counter()
        prometheus_client.generate_latest(registry)
        took.append((read - began, time.perf_counter() - read))
    read, whole = map(min, zip(*took))
    print(f"a scrape of {count} breakers: {whole * 1e3:.0f} ms, ", end="")
    print(f"of which {read * 1e3:.0f} ms read the breakers")


if __name__ == "__main__":
    measure()
    measure_scrape()
