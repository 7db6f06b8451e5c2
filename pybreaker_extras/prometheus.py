"""Metrics of breakers for Prometheus. Needs the package prometheus-client.

    from pybreaker_extras.prometheus import PrometheusMetrics

    metrics = PrometheusMetrics()
    metrics.watch(weather, payments)

Prometheus then finds the metrics at the program's own endpoint or at the endpoint of
`prometheus_client.start_http_server`. docs/metrics.rst says what each metric means.
"""

# How it works
#
# A scrape calls `collect`, which reads every breaker at that moment, so that no gauge
# is out of date: a scrape sees a breaker's present name and state, and no breaker that
# the program has dropped. Calls, transitions and the times of transitions cannot be
# read afterwards, so the listener counts and keeps them.
#
# A counter belongs to a name and not to a breaker: the counter does not go back when
# one of two breakers with the same name is dropped, or when a breaker is made anew.
#
# In multiprocess mode a scrape reads files that each process keeps, and calls no
# collector. So a thread in each process writes the values of `collect` into the files.
#
# A breaker and its state refer to each other, so a breaker that the program has dropped
# is alive until Python collects garbage, which some processes never do. Until then a
# scrape would show the breaker's circuit. Therefore `_read` collects garbage now and
# then, while some circuit looks as if the program had dropped its breaker.

from __future__ import annotations

import atexit
import gc
import logging
import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from typing import Any, NamedTuple, Optional

import pybreaker

try:
    import prometheus_client
except ModuleNotFoundError as exc:
    if exc.name != "prometheus_client":
        raise
    raise ImportError(
        "pybreaker_extras.prometheus needs the package prometheus-client: "
        "python -m pip install prometheus-client"
    ) from exc
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    Metric,
)

__all__ = ("PrometheusMetrics",)

PUBLISHED_EVERY = 5.0  # seconds from one writing of the files to the next
KEPT = 300.0  # seconds for which a name's counters outlive its last breaker
COLLECTED_EVERY = 120.0  # seconds, at least, from one collection of garbage to the next
COLLECTING = 0.01  # the greatest share of the time that collecting garbage may take
PATIENCE = 0.1  # seconds that one scrape waits, in all, for locks and storages

logger = logging.getLogger("pybreaker")

STATES = (pybreaker.STATE_CLOSED, pybreaker.STATE_OPEN, pybreaker.STATE_HALF_OPEN)
CLOSED, OPEN, HALF_OPEN = STATES

# The value of the label `cause`, by the value of `move.by`.
CAUSES = {"count": "failures", "trial": "trial", "outcome": "trial", "hand": "hand"}
UNKNOWN = "unknown"
# The labels `to` and `cause` of the series that each breaker has, even where the value
# is still 0.
MOVES = (
    (OPEN, "failures"),
    (HALF_OPEN, "trial"),
    (OPEN, "trial"),
    (CLOSED, "trial"),
    *((state, cause) for cause in ("hand", UNKNOWN) for state in STATES),
)


class _Family(NamedTuple):
    """A metric. `mode` says how multiprocess mode shows the gauges of the processes: as
    a sum (``"livesum"``), or as one series for each process (``"liveall"``)."""

    name: str
    help: str
    labels: tuple[str, ...] = ("breaker",)
    mode: str = "liveall"
    is_counter: bool = False


CALLS = _Family(
    "circuit_breaker_calls",
    "Calls by outcome: they succeeded, failed, were abandoned or were rejected.",
    ("breaker", "outcome"),
    is_counter=True,
)
DRY_RUN_REJECTIONS = _Family(
    "circuit_breaker_dry_run_rejections",
    "Calls that would have been rejected, but for the dry run.",
    is_counter=True,
)
TRANSITIONS = _Family(
    "circuit_breaker_transitions",
    "Moves of the circuit, by the state moved to and by what caused them.",
    ("breaker", "to", "cause"),
    is_counter=True,
)
STATE = _Family(
    "circuit_breaker_state",
    "How many circuits of that name are in the state.",
    ("breaker", "state"),
    "livesum",
)
TRIAL_DUE = _Family(
    "circuit_breaker_trial_due",
    "How many circuits of that name are not closed and would admit a call now.",
    mode="livesum",
)
DRY_RUN = _Family(
    "circuit_breaker_dry_run",
    "How many circuits of that name refuse nothing, because of a dry run.",
    mode="livesum",
)
FAILURES = _Family("circuit_breaker_failures", "Failures that are remembered.")
FAILURES_LIMIT = _Family(
    "circuit_breaker_failures_limit", "Failures that open the circuit."
)
RETRY_AFTER = _Family(
    "circuit_breaker_retry_after_seconds",
    "Seconds until a call may be admitted; 0 where one may now.",
)
LAST_TRANSITION = _Family(
    "circuit_breaker_last_transition_timestamp_seconds",
    "When the circuit last moved, in Unix time; 0 if it has not.",
)
OUTAGE_START = _Family(
    "circuit_breaker_outage_start_timestamp_seconds",
    "Since when the circuit has not been closed, in Unix time; 0 while it is.",
)
FAMILIES = (
    CALLS,
    DRY_RUN_REJECTIONS,
    TRANSITIONS,
    STATE,
    TRIAL_DUE,
    DRY_RUN,
    FAILURES,
    FAILURES_LIMIT,
    RETRY_AFTER,
    LAST_TRANSITION,
    OUTAGE_START,
)

_Labels = tuple[str, ...]
_Series = dict[_Labels, float]


class PrometheusMetrics:
    """A collector that reads breakers, and a listener that counts calls and moves.

    A scrape shows the breakers in `breakers`, by default every breaker that is alive in
    this process. `breakers` is an iterable that each scrape goes through anew, so an
    iterator is a `TypeError`. Calls and transitions are counted for breakers given to
    `watch`. The label `breaker` is the breaker's name.

    The constructor registers the collector in `registry`, by default
    `prometheus_client.REGISTRY`. One collector serves any number of breakers; a second
    collector in the same registry is a `ValueError`.
    """

    only_watches = True  # so that CircuitBreakers may drop an idle breaker

    def __init__(
        self,
        registry: prometheus_client.CollectorRegistry | None = None,
        breakers: Iterable[pybreaker.CircuitBreaker] | None = None,
    ) -> None:
        self._chosen = _checked_breakers(breakers)
        # Reentrant: while a thread counts a call, a signal handler or a finalizer may
        # make a guarded call in that thread. A thread that holds this lock waits for
        # nothing.
        self._lock = threading.RLock()
        self._tallies = _Tallies()
        self._stories: dict[int, _Story] = {}
        self._has_idle = False  # whether the last reading saw a circuit that looks idle
        self._next_collection = -math.inf
        self._publisher: _Publisher | None = None
        (prometheus_client.REGISTRY if registry is None else registry).register(self)
        if _is_multiprocess():
            self._publisher = _Publisher(self._read)
            self._publisher.start()
        _instances.add(self)

    def watch(self, *breakers: pybreaker.CircuitBreaker) -> None:
        """Count the calls and the transitions of these breakers from now on. Each
        breaker gets this object as a listener, but only once. Watching keeps no breaker
        alive. Raises `TypeError` for anything but a breaker."""
        for breaker in breakers:
            _checked_breaker("watch() takes breakers", breaker)
        for breaker in breakers:
            with breaker._lock:
                if not self._hears(breaker):
                    breaker.add_listener(self)
                    self._find_outage(breaker, breaker.snapshot())
        if self._publisher is not None:
            self._publisher.publish()

    def publish(self) -> None:
        """In multiprocess mode, write the metrics of this process into its files now;
        else do nothing. A thread writes the files every five seconds, and `atexit`
        writes them when the process ends."""
        if self._publisher is not None:
            self._publisher.publish()

    # The methods of the listener. The breaker's lock is held. The parameters are
    # positional-only, because keyword arguments of guarded functions may have the same
    # names.

    def success(self, cb: pybreaker.CircuitBreaker, /) -> None:
        with self._lock:
            self._tallies[cb.name].success += 1

    def failure(self, cb: pybreaker.CircuitBreaker, exc: BaseException, /) -> None:
        with self._lock:
            self._tallies[cb.name].failure += 1

    def abandoned(self, cb: pybreaker.CircuitBreaker, /) -> None:
        with self._lock:
            self._tallies[cb.name].abandoned += 1

    def rejected(
        self, cb: pybreaker.CircuitBreaker, func: Any, /, *args: Any, **kwargs: Any
    ) -> None:
        with self._lock:
            if cb.dry_run:
                self._tallies[cb.name].would_be_rejected += 1
            else:
                self._tallies[cb.name].rejected += 1

    def state_change(
        self,
        cb: pybreaker.CircuitBreaker,
        old_state: pybreaker.CircuitBreakerState,
        new_state: pybreaker.CircuitBreakerState,
        /,
    ) -> None:
        now = time.time()
        move = new_state.name, _cause(cb, new_state)
        with self._lock:
            moves = self._tallies[cb.name].moves
            moves[move] = moves.get(move, 0) + 1
            story = self._story_of(cb)
            story.moved = now
            if new_state.name == CLOSED:
                story.outage = 0.0
            elif old_state.name == CLOSED:
                story.outage = now
            # A move between open and half-open neither begins nor ends an outage.

    def _hears(self, breaker: pybreaker.CircuitBreaker) -> bool:
        return any(listener is self for listener in breaker.listeners)

    def _story_of(self, breaker: pybreaker.CircuitBreaker) -> _Story:
        """The breaker's story, which is made if there is none. The caller holds this
        object's lock."""
        story = self._stories.get(id(breaker))
        if story is None or story.breaker() is not breaker:
            story = self._stories[id(breaker)] = _Story(breaker, self._stories)
        return story

    # The methods of the collector.

    def describe(self) -> Iterable[Metric]:
        """The metrics without values, so that a registry can find taken names."""
        return [_metric(family, {}) for family in FAMILIES]

    def collect(self) -> Iterator[Metric]:
        """The metrics with the values of this moment, for a scrape."""
        series = self._read()
        for family in FAMILIES:
            yield _metric(family, series[family])

    def _read(self) -> dict[_Family, _Series]:
        """The values of each metric, by the values of the metric's labels."""
        self._collect_garbage()
        series: dict[_Family, _Series] = {family: {} for family in FAMILIES}
        deadline = time.monotonic() + PATIENCE
        counted = set()
        has_idle = False
        breakers = tuple(self._chosen())
        stories = [self._begin_to_look(breaker, deadline) for breaker in breakers]
        for breaker, story in zip(breakers, stories):
            seen = self._end_look(breaker, story, deadline)
            label = _label(breaker.name)
            if self._hears(breaker):
                counted.add(breaker.name)
                _put(series[LAST_TRANSITION], (label,), story.moved, max)
            if not seen:  # the storage is out of reach, or has never answered
                continue
            if story.outage or seen["state"] == CLOSED:  # else the start is not known
                _put(series[OUTAGE_START], (label,), story.outage, _earlier)
            _show(series, label, seen)
            has_idle = has_idle or _looks_idle(seen)
        self._has_idle = has_idle
        with self._lock:
            for name, tally in self._tallies.current(counted):
                _show_tally(series, _label(name), tally)
        return series

    def _collect_garbage(self) -> None:
        """Free breakers that the program has dropped, but not often."""
        now = time.monotonic()
        # A program may have switched Python's collector off on purpose.
        if self._has_idle and now >= self._next_collection and gc.isenabled():
            gc.collect()
            took = time.monotonic() - now
            self._next_collection = now + max(COLLECTED_EVERY, took / COLLECTING)

    def _begin_to_look(
        self, breaker: pybreaker.CircuitBreaker, deadline: float
    ) -> _Story:
        """The breaker's story. If the storage is of the user's own, which may hang or
        wait for a network, start a thread that looks at the breaker. All such threads
        start before the scrape waits for one of them, so that a storage that hangs
        takes no time from others."""
        with self._lock:
            story = self._story_of(breaker)
        if not _may_be_read(breaker) and not (story.looker and story.looker.is_alive()):
            looker = threading.Thread(
                target=self._look, args=(breaker, story, deadline), daemon=True
            )
            try:
                looker.start()
                story.looker = looker
            except RuntimeError:  # no thread can start, such as when Python ends
                story.looker = None
        return story

    def _end_look(
        self, breaker: pybreaker.CircuitBreaker, story: _Story, deadline: float
    ) -> dict[str, Any]:
        """The breaker's snapshot. If there is no new snapshot at `deadline`
        (monotonic), the last snapshot without `retry_after`, which is out of date.
        Empty if no snapshot could be taken."""
        if _may_be_read(breaker):
            self._look(breaker, story, deadline)
            return story.seen
        looker = story.looker
        if looker is not None:
            looker.join(max(0.0, deadline - time.monotonic()))
            if not looker.is_alive():
                return story.seen
        return {k: value for k, value in story.seen.items() if k != "retry_after"}

    def _look(
        self, breaker: pybreaker.CircuitBreaker, story: _Story, deadline: float
    ) -> None:
        """Keep the breaker's snapshot in the story. If another thread holds the lock of
        the breaker until `deadline` (monotonic), keep only the values that can be read
        without the lock."""
        lock = breaker._lock
        try:
            if lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
                try:
                    # The lock is held for both calls. Otherwise thread A may see the
                    # circuit closed, thread B may trip the circuit, and thread A would
                    # then erase the beginning of the outage.
                    self._find_outage(breaker, breaker.snapshot())
                finally:
                    lock.release()
            else:
                story.seen = {
                    "state": breaker.current_state,
                    "fail_counter": breaker.fail_counter,
                    "fail_max": breaker.fail_max,
                    "dry_run": breaker.dry_run,
                }
        except Exception:  # a storage that raises must not hide other breakers
            story.seen = {}
            logger.warning("%r could not be read", breaker.name, exc_info=True)

    def _find_outage(
        self, breaker: pybreaker.CircuitBreaker, seen: dict[str, Any]
    ) -> None:
        with self._lock:
            story = self._story_of(breaker)
            story.seen = seen
            if seen["state"] == CLOSED:
                story.outage = 0.0
            elif not story.outage and seen.get("opened_at"):
                # The outage began before the breaker was watched, or the breaker is not
                # watched. The outage is at least as old as the circuit's last opening.
                story.outage = datetime.fromisoformat(seen["opened_at"]).timestamp()

    # Forks.

    def _before_fork(self) -> None:
        if self._publisher is not None:
            self._publisher.stop()

    def _after_fork_in_parent(self) -> None:
        if self._publisher is not None:
            self._publisher.start()

    def _after_fork_in_child(self) -> None:
        """Let the child count from 0. The parent goes on with its own counts."""
        self._lock = threading.RLock()
        self._tallies = _Tallies()
        if self._publisher is not None:
            self._publisher = _Publisher(self._read, self._publisher)
            self._publisher.start()


# Counts and snapshots.


class _Tally:
    """The counts of all breakers with one name."""

    __slots__ = (
        "success",
        "failure",
        "abandoned",
        "rejected",
        "would_be_rejected",
        "moves",
        "alive",
    )

    def __init__(self) -> None:
        self.success = self.failure = self.abandoned = 0
        self.rejected = self.would_be_rejected = 0
        self.moves: dict[tuple[str, str], int] = {}
        self.alive = time.monotonic()  # when a reading last saw a breaker of the name


class _Tallies(dict[Optional[str], _Tally]):
    """The tally of each name. Callers hold the lock of the `PrometheusMetrics`."""

    _enough = 1024

    def __missing__(self, name: str | None) -> _Tally:
        if len(self) >= self._enough:  # only a scrape or this call drops tallies
            alive = {breaker.name for breaker in pybreaker.breakers()}
            self.current(self.keys() & alive)
            self._enough = max(1024, 2 * len(self))
        tally = self[name] = _Tally()
        return tally

    def current(
        self, names: Iterable[str | None]
    ) -> Iterable[tuple[str | None, _Tally]]:
        """The tallies to show, by name: the tallies of `names`, which watched breakers
        have now, and of names that watched breakers had in the last `KEPT` seconds.
        Drops all other tallies."""
        now = time.monotonic()
        for name in names:
            self[name].alive = now
        for name, tally in list(self.items()):
            if now - tally.alive > KEPT:
                del self[name]
        return self.items()


class _Story:
    """The times and the last snapshot of a breaker. At the Unix time `moved` the
    circuit last moved; since the Unix time `outage` the circuit has not been closed.
    0 stands for no time. `stories` drops the story when the breaker is freed."""

    __slots__ = ("breaker", "moved", "outage", "seen", "looker")

    def __init__(
        self, breaker: pybreaker.CircuitBreaker, stories: dict[int, _Story]
    ) -> None:
        key = id(breaker)

        def forget(reference: object) -> None:
            # In an interpreter without reference counting, another breaker may have the
            # id by now.
            story = stories.get(key)
            if story is not None and story.breaker is reference:
                stories.pop(key, None)

        self.breaker = weakref.ref(breaker, forget)
        self.moved = 0.0
        self.outage = 0.0
        self.seen: dict[str, Any] = {}  # the last snapshot, or empty
        self.looker: threading.Thread | None = None  # runs _look


# Reading.


def _may_be_read(breaker: pybreaker.CircuitBreaker) -> bool:
    """Whether the storage's class promises that reading does not block."""
    return bool(vars(type(breaker._state_storage)).get("_is_plain", False))


def _looks_idle(seen: dict[str, Any]) -> bool:
    """Whether the program may have dropped the breaker: its circuit is not closed, and
    a trial is due or never will be."""
    return seen["state"] != CLOSED and seen.get("retry_after", 1) in (0, None)


def _show(series: dict[_Family, _Series], label: str, seen: dict[str, Any]) -> None:
    # For breakers with the same name, numbers of circuits are added up. Of any other
    # values, a scrape shows the one that should worry an operator most.
    for state in STATES:
        _put(series[STATE], (label, state), seen["state"] == state, _sum)
    _put(series[DRY_RUN], (label,), seen["dry_run"], _sum)
    _put(series[FAILURES], (label,), seen["fail_counter"], max)
    _put(series[FAILURES_LIMIT], (label,), _or_infinity(seen["fail_max"]), min)
    is_due = False  # while another thread holds the lock, no call is admitted
    if "retry_after" in seen:
        wait = _or_infinity(seen["retry_after"])
        is_due = seen["state"] != CLOSED and not wait
        _put(series[RETRY_AFTER], (label,), wait, max)
    _put(series[TRIAL_DUE], (label,), is_due, _sum)


def _show_tally(series: dict[_Family, _Series], label: str, tally: _Tally) -> None:
    for outcome in ("success", "failure", "abandoned", "rejected"):
        _put(series[CALLS], (label, outcome), getattr(tally, outcome), _sum)
    _put(series[DRY_RUN_REJECTIONS], (label,), tally.would_be_rejected, _sum)
    for move in MOVES:
        _put(series[TRANSITIONS], (label, *move), tally.moves.get(move, 0), _sum)


def _put(
    series: _Series,
    labels: _Labels,
    value: float,
    both: Callable[[float, float], float],
) -> None:
    """Write a value into the series. If another breaker of the same name has written a
    value, write the result of `both` for the two values."""
    series[labels] = both(series[labels], value) if labels in series else float(value)


def _sum(one: float, other: float) -> float:
    return one + other


def _earlier(one: float, other: float) -> float:
    """The earlier of two times, where 0 stands for no time."""
    return min(one, other) or max(one, other)


def _or_infinity(number: float | None) -> float:
    return math.inf if number is None else number


def _cause(
    breaker: pybreaker.CircuitBreaker, state: pybreaker.CircuitBreakerState
) -> str:
    """The cause of the move to `state`, or `UNKNOWN`."""
    move = breaker._state_storage.last_move()
    # Another listener may have moved the circuit in the meantime.
    if move is None or breaker._state is not state or move.state != state.name:
        return UNKNOWN
    return CAUSES.get(getattr(move, "by", ""), UNKNOWN)


def _label(name: str | None) -> str:
    # A lone surrogate cannot be encoded, so the scrape would lose all metrics.
    return (name or "unnamed").encode("utf-8", "backslashreplace").decode()


def _metric(family: _Family, series: _Series) -> Metric:
    cls = CounterMetricFamily if family.is_counter else GaugeMetricFamily
    metric = cls(family.name, family.help, labels=family.labels)
    for labels, value in series.items():
        metric.add_metric(labels, value)
    return metric


# Multiprocess mode.


def _is_multiprocess() -> bool:
    names = "PROMETHEUS_MULTIPROC_DIR", "prometheus_multiproc_dir"
    return any(name in os.environ for name in names)


class _Publisher:
    """Writes the series that `read` returns into the files that this process has in
    multiprocess mode. The metrics that write the files are in no registry."""

    def __init__(
        self,
        read: Callable[[], dict[_Family, _Series]],
        parents: _Publisher | None = None,
    ) -> None:
        self._read = read
        self._lock = threading.Lock()
        self._last: dict[_Family, _Series] = {}
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()
        # After a fork the parent's metrics write into files of the child's own.
        self._metrics: Any = parents._metrics if parents else _metrics_in_files()

    def start(self) -> None:
        self._stopping = threading.Event()
        self._thread = threading.Thread(
            target=self._run,
            args=(self._stopping,),
            name="pybreaker-prometheus",
            daemon=True,
        )
        self._thread.start()

    def stop(self) -> None:
        """End the thread before a fork. The child would never release a lock that the
        thread held at the fork."""
        if self._thread is not None:
            self._stopping.set()
            self._thread.join(1.0)

    def _run(self, stopping: threading.Event) -> None:
        while True:
            try:
                self.publish()
            except Exception:
                logger.exception("the metrics could not be written")
            if stopping.wait(PUBLISHED_EVERY):
                return

    def publish(self) -> None:
        with self._lock:
            series = self._read()
            for family, metric in self._metrics.items():
                last, now = self._last.setdefault(family, {}), series[family]
                for labels in {**last, **now}:
                    child = metric.labels(*labels)
                    if not family.is_counter:
                        child.set(now.get(labels, 0.0))  # 0: the breaker is gone
                    elif labels in now:
                        written = last.get(labels, 0.0)
                        if now[labels] < written:  # the tally was begun anew
                            written = 0.0
                        child.inc(now[labels] - written)
                    # This is noted at once, as writing the next series may raise, such
                    # as for a full disk.
                    if labels in now:
                        last[labels] = now[labels]
                    else:
                        del last[labels]


def _metrics_in_files() -> dict[_Family, Any]:
    metrics: dict[_Family, Any] = {}
    for family in FAMILIES:
        if family.is_counter:
            metrics[family] = prometheus_client.Counter(
                family.name, family.help, family.labels, registry=None
            )
        else:
            mode: Any = family.mode
            metrics[family] = prometheus_client.Gauge(
                family.name,
                family.help,
                family.labels,
                registry=None,
                multiprocess_mode=mode,
            )
    return metrics


# Checks of arguments.


def _checked_breakers(
    breakers: Any,
) -> Callable[[], Iterable[pybreaker.CircuitBreaker]]:
    """A function that returns the breakers to show at each scrape."""
    if breakers is None:
        return pybreaker.breakers
    try:
        is_used_up = iter(breakers) is breakers
    except TypeError:
        is_used_up = True
    if is_used_up:
        raise TypeError(
            f"breakers must be an iterable that each scrape can go through anew, such "
            f"as a list, not {breakers!r}"
        )
    for breaker in tuple(breakers):
        _checked_breaker("breakers must hold breakers", breaker)
    return lambda: tuple(breakers)


def _checked_breaker(rule: str, breaker: object) -> None:
    if not isinstance(breaker, pybreaker.CircuitBreaker):
        raise TypeError(f"{rule}, not {breaker!r}")


# Forks, and the end of the process.

_instances: weakref.WeakSet[PrometheusMetrics] = weakref.WeakSet()


def _tell_all(method: str) -> None:
    for instance in list(_instances):
        getattr(instance, method)()


if hasattr(os, "register_at_fork"):  # Windows has no forks
    os.register_at_fork(
        before=lambda: _tell_all("_before_fork"),
        after_in_parent=lambda: _tell_all("_after_fork_in_parent"),
        after_in_child=lambda: _tell_all("_after_fork_in_child"),
    )
atexit.register(_tell_all, "publish")
