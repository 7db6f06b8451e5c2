"""What operators get from a breaker: its log and its snapshot."""

from __future__ import annotations

import contextlib
import contextvars
import datetime
import gc
import json
import logging
import math
import subprocess
import sys
import threading

import pytest
from internals import after_fork, lock_of, storage_of
from support import PATIENCE, drive

import pybreaker
from pybreaker import CircuitBreaker, CircuitBreakerError


@pytest.fixture
def log(caplog):
    """The lines that were logged, as pairs of level and text."""
    gc.collect()  # a generator that another test left may move its circuit when it ends
    if hasattr(gc, "freeze"):
        gc.freeze()  # the next test need not look at the same objects again
    caplog.set_level(logging.INFO, "pybreaker")
    return lambda: [(r.levelname, r.getMessage()) for r in caplog.records]


def test_each_transition_is_logged_with_its_reason(log, clock, fail, boom):
    """Openings are warnings, because an operator may have to act."""
    breaker = CircuitBreaker(fail_max=2, reset_timeout=60, name="db")
    for _ in range(2):
        with pytest.raises((boom, CircuitBreakerError)):
            breaker.call(fail)
    clock.advance(60)
    with pytest.raises(CircuitBreakerError):
        breaker.call(fail)
    clock.advance(60)
    breaker.call(str)
    many = "2 failures in a row; the last: Boom()"
    counts = "(fail_counter {}, reset_timeout 60 s)"
    assert log() == [
        ("WARNING", f"'db': open, was closed: {many} {counts.format(2)}"),
        (
            "INFO",
            f"'db': half-open, was open: the timeout has passed {counts.format(2)}",
        ),
        (
            "WARNING",
            f"'db': open, was half-open: the trial failed: Boom() {counts.format(3)}",
        ),
        (
            "INFO",
            f"'db': half-open, was open: the timeout has passed {counts.format(3)}",
        ),
        (
            "INFO",
            f"'db': closed, was half-open: the trial succeeded {counts.format(0)}",
        ),
    ]


@pytest.mark.parametrize(
    ("move", "level"), [("open", "WARNING"), ("half_open", "INFO"), ("close", "INFO")]
)
def test_a_move_by_hand_is_logged_as_one(move, level, log):
    """The log calls a breaker without a name an unnamed one."""
    breaker = CircuitBreaker()
    getattr(breaker, move)()
    [(logged, text)] = log()
    assert logged == level
    assert text.startswith("unnamed breaker: ")
    assert ", was closed: by hand (" in text


def test_a_change_found_in_the_storage_is_logged_as_that(log):
    """This breaker cannot know why another program made the change."""
    breaker = CircuitBreaker()
    storage_of(breaker).state = "".join(["op", "en"])  # equal, not the same string
    assert breaker.state.name == "open"
    ((level, text),) = log()
    assert level == "WARNING"
    assert ": found so in the storage (" in text


def test_a_circuit_that_is_found_closed_is_logged_with_the_count_it_begins_with(log):
    """The count begins at 0 where the count that was found would open the circuit."""
    breaker = CircuitBreaker(fail_max=2)
    breaker.open()
    breaker.fail_counter = 5
    storage_of(breaker).state = "closed"
    assert breaker.state.name == "closed"
    assert "(fail_counter 0," in log()[-1][1]


def test_a_change_that_a_rejected_call_has_found_is_logged_with_that_call(log):
    """A call that gets through may come much later."""
    breaker = CircuitBreaker()
    storage_of(breaker).opened_at = datetime.datetime.now(datetime.timezone.utc)
    storage_of(breaker).state = "open"
    with pytest.raises(CircuitBreakerError):
        breaker.call(int)
    assert ": found so in the storage (" in log()[0][1]


def test_a_half_opening_is_logged_when_the_trial_begins(log, clock):
    """A trial may take its time, and an operator may watch the log meanwhile."""
    breaker = CircuitBreaker(reset_timeout=60)

    def told():
        return [text.split(" (")[0] for _, text in log()][-1]

    async def told_later():
        return told()

    begun = "unnamed breaker: half-open, was open: the timeout has passed"
    for call in (lambda: breaker.call(told), lambda: drive(breaker.call(told_later))):
        breaker.open()
        clock.advance(60)
        assert call() == begun


def test_a_change_is_logged_with_the_count_that_it_left(log):
    """Another program closed the circuit, and has counted failures since."""
    breaker = CircuitBreaker(fail_max=5)
    breaker.open()
    storage_of(breaker).counter = 2
    storage_of(breaker).state = "closed"
    assert breaker.state.name == "closed"
    assert "fail_counter 2" in log()[-1][1]


def test_what_a_listener_does_because_of_a_transition_is_by_hand(log, fail):
    """Only the listener knows the reason for its own move."""

    class Reopens(pybreaker.CircuitBreakerListener):
        def state_change(self, cb, old_state, new_state):
            if new_state.name == "open":
                cb.half_open()

    breaker = CircuitBreaker(fail_max=1, listeners=[Reopens()])
    with pytest.raises(CircuitBreakerError):
        breaker.call(fail)
    reasons = [text.split(": ")[2].split(" (")[0] for _, text in log()]
    assert reasons == ["a failure", "by hand"]


def test_a_state_knows_why_it_began(clock, fail, boom):
    """Listeners are told of states with their reasons, and breaker.state keeps its
    own."""
    told = []

    class Scribe:
        def state_change(self, cb, old_state, new_state):
            told.append((old_state.reason, new_state.reason))

    breaker = CircuitBreaker(fail_max=2, reset_timeout=60, listeners=[Scribe()])
    for call in fail, fail, fail, str:
        with contextlib.suppress(boom, CircuitBreakerError):
            breaker.call(call)
        clock.advance(60)
    breaker.open()
    assert breaker.state.reason == "by hand"
    storage_of(breaker).state = "closed"
    assert breaker.state.reason == "found so in the storage"
    eras = [
        "new",
        "2 failures in a row; the last: Boom()",
        "the timeout has passed",
        "the trial failed: Boom()",
        "the timeout has passed",
        "the trial succeeded",
        "by hand",
        "found so in the storage",
    ]
    assert told == list(zip(eras, eras[1:]))


def test_a_name_cannot_forge_a_line_in_the_log(log):
    """Characters that break lines are shown escaped."""
    CircuitBreaker(name="a\nb").open()
    assert r"'a\nb'" in log()[0][1]


def test_an_exception_that_cannot_be_shown_is_named(log):
    """The log shows the exception's class instead."""

    class Mute(Exception):
        def __repr__(self):
            raise RuntimeError("no")

    def fail():
        raise Mute

    with pytest.raises(CircuitBreakerError):
        CircuitBreaker(fail_max=1).call(fail)
    assert "a failure: Mute (" in log()[0][1]


def test_nothing_is_printed_unless_logging_is_configured():
    """Python itself would print warnings where no handler is configured."""
    code = "import pybreaker; pybreaker.CircuitBreaker().open()"
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        check=True,
        cwd=pybreaker.__file__.rpartition("pybreaker.py")[0],
        text=True,
    )
    assert run.stdout + run.stderr == ""


def test_a_handler_may_wait_for_another_thread_that_uses_the_breaker(log):
    """A log handler is called after the lock has been released."""

    class Waits(logging.Handler):
        def emit(self, record):
            thread = threading.Thread(target=use, args=(breaker, done))
            thread.start()
            heard.append(done.wait(PATIENCE))
            thread.join(PATIENCE)

    def use(breaker, done):
        repr(breaker)
        breaker.snapshot()
        with pytest.raises(CircuitBreakerError):
            breaker.call(str)
        done.set()

    breaker, done, heard = CircuitBreaker(), threading.Event(), []
    handler = Waits()
    logging.getLogger("pybreaker").addHandler(handler)
    try:
        breaker.open()
    finally:
        logging.getLogger("pybreaker").removeHandler(handler)
    assert heard == [True]


def test_a_broken_filter_changes_nothing(log, recorder):
    """The caller gets the function's result although the filter raises."""

    def broken(record):
        raise RuntimeError

    breaker = CircuitBreaker(listeners=[recorder])
    logging.getLogger("pybreaker").addFilter(broken)
    try:
        breaker.open()
    finally:
        logging.getLogger("pybreaker").removeFilter(broken)
    assert breaker.current_state == "open"
    assert recorder.transitions == [("closed", "open")]


def test_a_snapshot_tells_all_of_a_closed_circuit(fail, boom):
    """The snapshot is a dict that `json.dumps` takes."""
    breaker = CircuitBreaker(name="db")
    with pytest.raises(boom):
        breaker.call(fail)
    assert json.loads(json.dumps(breaker.snapshot())) == {
        "name": "db",
        "state": "closed",
        "reason": "new",
        "fail_counter": 1,
        "fail_max": 5,
        "success_counter": 0,
        "success_threshold": 1,
        "reset_timeout": 60,
        "window_size": None,
        "window_seconds": None,
        "max_reset_timeout": None,
        "dry_run": False,
        "opened_at": None,
        "retry_after": 0.0,
    }


def test_a_snapshot_tells_when_a_circuit_opened_and_when_to_come_back(clock):
    """The moment is in UTC by ISO 8601, whatever the storage keeps."""
    breaker = CircuitBreaker(reset_timeout=60)
    breaker.open()
    clock.advance(18.5)
    assert breaker.snapshot()["retry_after"] == 41.5
    east = datetime.timezone(datetime.timedelta(hours=5))
    for moment in (
        datetime.datetime(2020, 2, 2, 12),
        datetime.datetime(2020, 2, 2, 17, tzinfo=east),
    ):
        storage_of(breaker).opened_at = moment
        assert breaker.snapshot()["opened_at"] == "2020-02-02T12:00:00+00:00"


def test_a_snapshot_still_tells_of_the_last_opening_when_the_circuit_is_closed():
    """An operator asks about the last opening afterwards."""
    breaker = CircuitBreaker()
    breaker.open()
    opened_at = breaker.snapshot()["opened_at"]
    breaker.close()
    assert breaker.snapshot()["opened_at"] == opened_at is not None


@pytest.mark.parametrize("watch", [CircuitBreaker.snapshot, repr])
def test_an_operator_is_told_what_the_storage_says(watch):
    """No call has yet found that another program has opened the circuit."""
    breaker = CircuitBreaker(reset_timeout=math.inf)
    told = str(watch(breaker))
    assert "closed" in told
    assert "open" not in told.replace("opened_at", "")
    storage_of(breaker).state = "open"
    told = str(watch(breaker))
    assert "closed" not in told
    assert "open" in told.replace("opened_at", "")


def test_a_snapshot_has_none_where_there_is_no_end():
    """JSON has no word for infinity."""
    breaker = CircuitBreaker(fail_max=math.inf, reset_timeout=math.inf)
    breaker.open()
    snapshot = breaker.snapshot()
    assert snapshot["fail_max"] is None
    assert snapshot["reset_timeout"] is None
    assert snapshot["retry_after"] is None
    assert json.loads(json.dumps(snapshot, allow_nan=False)) == snapshot


def test_a_snapshot_is_of_one_moment(clock):
    """The snapshot is taken under the lock, so it waits for a thread that holds the
    lock."""
    breaker, taken = CircuitBreaker(), []
    thread = threading.Thread(target=lambda: taken.append(breaker.snapshot()))
    with lock_of(breaker):
        thread.start()
        breaker.fail_counter = 3
        breaker.open()
        assert not taken
    thread.join(PATIENCE)
    assert (taken[0]["state"], taken[0]["fail_counter"]) == ("open", 3)


def test_the_child_of_a_fork_begins_with_a_free_lock_and_a_free_place(clock):
    """The child takes nothing over that the parent's threads hold. (This test does what
    the child does; tests that fork show that the child does it.)"""
    breaker = CircuitBreaker()
    breaker.half_open()
    trial = breaker.calling()
    held, over = threading.Event(), threading.Event()

    def hold():
        with lock_of(breaker):
            held.set()
            over.wait(PATIENCE)

    contextvars.copy_context().run(trial.__enter__)
    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(PATIENCE)
    after_fork()
    try:
        assert breaker.call(str) == ""
        assert breaker.current_state == "closed"
    finally:
        over.set()
        thread.join(PATIENCE)


def test_breakers_need_not_be_told_apart_by_comparing_them():
    """A subclass may be a dataclass, whose objects are equal and not hashable."""

    class Equal(CircuitBreaker):
        __hash__ = None

        def __eq__(self, other):
            return True

    breakers = [Equal(), Equal()]
    locks = [lock_of(breaker) for breaker in breakers]
    after_fork()
    for breaker, lock in zip(breakers, locks):
        assert lock_of(breaker) is not lock


class Filter:
    """A filter of the library's logger that counts the records, and raises."""

    def __init__(self):
        self.records = 0

    def filter(self, record):
        self.records += 1
        raise RuntimeError


def test_a_filter_that_raises_keeps_no_other_record_from_the_log(log):
    """The listener raises, so there are two records."""

    class Broken:
        def state_change(self, cb, old_state, new_state):
            raise ZeroDivisionError

    broken = Filter()
    breaker = CircuitBreaker(listeners=[Broken()])
    logging.getLogger("pybreaker").addFilter(broken)
    try:
        breaker.open()
    finally:
        logging.getLogger("pybreaker").removeFilter(broken)
    assert broken.records == 2


def test_a_handler_gets_no_record_while_a_listener_holds_the_lock(log):
    """The listener moves the circuit again, and only then the lock is released."""

    class Locks(logging.Handler):
        def emit(self, record):
            free = []
            thread = threading.Thread(target=lambda: free.append(repr(breaker)))
            thread.start()
            thread.join(PATIENCE)
            heard.append(bool(free))

    class Closes:
        def state_change(self, cb, old_state, new_state):
            if new_state.name == "open":
                cb.close()
                cb.is_system_error(ValueError())
                told.append(len(log()))

    def cannot_judge(exc):
        raise TypeError

    breaker = CircuitBreaker(exclude=[cannot_judge], listeners=[Closes()])
    heard, told, handler = [], [], Locks()
    logging.getLogger("pybreaker").addHandler(handler)
    try:
        breaker.open()
    finally:
        logging.getLogger("pybreaker").removeHandler(handler)
    assert told == [0]
    assert heard == [True, True, True]


def test_methods_of_a_state_that_move_the_circuit_log_that_at_once(log, clock):
    breaker = CircuitBreaker(fail_max=1, reset_timeout=60)
    breaker.open()
    clock.advance(60)
    breaker.state.before_call(int)
    assert len(log()) == 2
    breaker.state.on_success()
    assert len(log()) == 3
    breaker._inc_counter()
    with pytest.raises(CircuitBreakerError):
        breaker.state.on_failure(ValueError())
    assert len(log()) == 4


def test_a_breaker_in_a_dry_run_says_so_first():
    breaker = CircuitBreaker(dry_run=True, name="db")
    assert repr(breaker).startswith("<CircuitBreaker dry run, 'db': closed, 0 of 5 ")
