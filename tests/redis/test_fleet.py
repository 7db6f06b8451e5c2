"""Fleets of real processes that share a circuit: one opening, one trial, and
nobody who is shut out by somebody else's trouble."""

from __future__ import annotations

import time

import pytest
from fleet import about_redis, ask_all, exceptions, installed, never, until
from support import DEEP

REFRESH = 0.25
TIMEOUTS = [0.5, 1, 2, 5] if DEEP else [0.5, 1]
ONLY = {"ok", "Down", "CircuitBreakerError"}  # how a call may end


@pytest.fixture
def workers(server, fleet_of):
    """Starts workers with the settings that most tests here need."""

    def start(number, fail_max=5, reset_timeout=1, success_threshold=1, **settings):
        breaker = {"fail_max": fail_max, "reset_timeout": reset_timeout}
        if success_threshold != 1:
            breaker["success_threshold"] = success_threshold
        ours = {} if settings.get("path") else {"storage": {"refresh": REFRESH}}
        return fleet_of(server.port, number, breaker=breaker, **{**ours, **settings})

    return start


def all_are(workers, state):
    return set(ask_all(workers, "state")) == {state}


def open_all(workers, service):
    """The service goes down under load, until all know."""
    service.mode = "down"
    ask_all(workers, "load", threads=2, pause=0.03)
    until(lambda: all_are(workers, "open"))
    return time.monotonic()


def closes_for_all(workers, service, server, namespace):
    """It is up, and all processes find out; then they have no more to do."""
    service.mode = "up"
    until(lambda: all_are(workers, "closed"))
    until(lambda: server.key(namespace, "state") == "closed")
    until(lambda: all("ok" in r["outcomes"] for r in ask_all(workers, "report")))
    reports = ask_all(workers, "unload")
    assert exceptions(reports) <= ONLY, reports
    for worker, report in zip(workers, reports):
        nobody_missed_redis(worker, report)


def nobody_missed_redis(worker, report):
    """A process that the machine has held up may have waited in vain for it."""
    assert about_redis(worker) == [] or report["oversleeping"] > REFRESH / 2


@pytest.mark.parametrize("timeout", TIMEOUTS)
def test_one_trial_goes_out_for_each_timeout(
    workers, service, server, namespace, timeout
):
    """From eight processes under load, to a service that is getting up. A trial
    whose process is killed, or which hangs, is followed by one after its lease."""
    # A machine that is busy with eight must not seem to have lost Redis.
    patient = {"refresh": 0.5, "patience": 2}
    eight = workers(8, reset_timeout=timeout, storage=patient)
    began = open_all(eight, service)
    # Calls that were under way when the last one heard of it.
    time.sleep(0.1)
    rounds = 4 if DEEP else 2
    until(lambda: len(service.since(began + 0.1)) >= rounds)
    trials = service.since(began + 0.1)
    assert_gaps(trials, timeout)
    assert service.most_at_once(began + 0.1) == 1

    # The next trial's process is killed.
    service.mode = "hanging"
    (pid,) = until(lambda: service.present(began + 0.1))
    (killed,) = (worker for worker in eight if worker.pid == pid)
    killed.kill()
    others = [worker for worker in eight if worker is not killed]

    # The one after that hangs, for longer than its lease; and so does the next.
    until(lambda: len(service.present(began + 0.1)) >= 3)
    assert_gaps(service.since(began + 0.1), timeout)

    closes_for_all(others, service, server, namespace)


def assert_gaps(trials, timeout):
    """They are the timeout apart: nearly, as some time passes between Redis's
    answer and the moment that the service sees the call."""
    for earlier, later in zip(trials, trials[1:]):
        assert later.at - earlier.at > 0.6 * timeout, trials


def test_a_trial_that_is_cancelled_is_followed_by_another_at_once(
    workers, service, server, namespace
):
    """One at a time, however: the claim is released first."""
    patient = {"refresh": 0.5, "patience": 0.5}
    four = workers(4, reset_timeout=1.5, storage=patient)
    began = open_all(four, service)
    ask_all(four, "unload")
    time.sleep(0.05)
    service.mode = "hanging"
    for worker in four:
        worker.tell("call_async_until", "closed", timeout=0.2, pause=0.02)
    until(lambda: len(service.since(began + 0.05)) >= 5)
    assert service.most_at_once(began + 0.05) == 1
    trials = service.since(began + 0.05)
    # Faster than one for each timeout would be.
    assert trials[4].at - trials[0].at < 4 * 1.5
    service.mode = "up"
    outcomes = [worker.answer() for worker in four]
    assert sum(outcome.get("TimeoutError", 0) for outcome in outcomes) >= 4
    until(lambda: server.key(namespace, "state") == "closed")
    assert server.key(namespace, "trial") is None


def test_trials_of_two_processes_reach_the_threshold_together(
    workers, service, server, namespace
):
    """It takes three successes, of whichever process."""
    two = workers(2, fail_max=3, reset_timeout=0.5, success_threshold=3)
    began = open_all(two, service)
    time.sleep(0.1)
    assert service.most_at_once(began + 0.1) <= 1
    closes_for_all(two, service, server, namespace)
    assert server.key(namespace, "success_counter") == "0"


def test_successes_of_two_processes_are_added(workers, service, server, namespace):
    """With one trial in each, in turns: the second closes the circuit."""
    mine, theirs = workers(2, reset_timeout=0.3, success_threshold=2)
    mine.ask("do", "open")
    until(lambda: theirs.ask("state") == "open")
    until(lambda: mine.ask("call", "ok")["outcomes"] == {"ok": 1})
    until(lambda: server.key(namespace, "success_counter") == "1")
    assert server.key(namespace, "state") == "open"
    until(lambda: theirs.ask("call", "ok")["outcomes"] == {"ok": 1})
    until(lambda: all_are([mine, theirs], "closed"))


def test_the_fleet_opens_after_few_failures(workers, service):
    """About fail_max and two for each process, however many calls there are."""
    eight = workers(8, fail_max=5, reset_timeout=30)
    service.mode = "down"
    ask_all(eight, "load", threads=1, pause=REFRESH / 2)
    until(lambda: all_are(eight, "open"))
    failures = len(service.arrivals)
    # The rate of calls here is two for each refresh.
    assert failures <= 5 + 2 * 8 + 8
    reports = ask_all(eight, "unload")
    assert exceptions(reports) <= ONLY


def test_an_idle_process_learns_of_an_opening_within_two_refreshes(workers):
    """And of any move by hand within one."""
    refresh = 0.5
    idle, busy = workers(2, fail_max=3, reset_timeout=30, storage={"refresh": refresh})

    # Which sees how late the machine makes them.
    ask_all([idle, busy], "load", threads=0)

    def seconds_until_it_knows(state):
        until(lambda: idle.ask("look") == state)
        (moved, *_), (found, *_) = busy.ask("changes")[-1], idle.ask("changes")[-1]
        reports = ask_all([idle, busy], "report")
        return found - moved - 5 * max(r["oversleeping"] for r in reports)

    for move, state in (("open", "open"), ("close", "closed")):
        busy.ask("do", move)
        assert seconds_until_it_knows(state) < refresh + 0.3
    busy.ask("call", "fail", times=3)
    assert seconds_until_it_knows("open") < 2 * refresh + 0.3


def test_a_bad_host_shuts_nobody_else_out(workers, service):
    """Its network is broken: all of its calls fail, and none of the others'."""
    bad, *good = workers(4, fail_max=3, reset_timeout=0.3)
    ask_all(good, "load", threads=1, what="ok")
    bad.ask("load", threads=1, what="fail")
    time.sleep(6 if DEEP else 2)
    (report,) = ask_all([bad], "unload")
    assert report["outcomes"]["CircuitBreakerError"] > 10
    for report in ask_all(good, "unload"):
        assert set(report["outcomes"]) == {"ok"}, report


def test_clocks_that_differ_change_nothing(workers, service, server, namespace):
    """Twenty seconds to either side: openings last as long as they should."""
    late = workers(1, reset_timeout=1, clock=-20)
    right = workers(1, reset_timeout=1)
    early = workers(1, reset_timeout=1, clock=20)
    everybody = late + right + early
    pairs = [*zip(everybody, everybody[1:]), *zip(everybody[1:], everybody)]
    for worker, other in pairs:
        worker.ask("do", "open")
        until(lambda: other.ask("state") == "open")  # noqa: B023
        assert abs(int(server.key(namespace, "opened_at")) - time.time()) < 3
        assert 0 < other.ask("see", "retry_after")[0] <= 1
        worker.ask("do", "close")
        until(lambda: all_are(everybody, "closed"))
    began = open_all(everybody, service) + 0.1
    time.sleep(0.1)
    until(lambda: len(service.since(began)) >= 2)
    assert_gaps(service.since(began), 1)
    assert service.since(began)[1].at - began < 2 * 2 + 1.5
    closes_for_all(everybody, service, server, namespace)


@pytest.fixture
def mixed(workers):
    """Four of ours, and four of 1.4.1, which only they know."""
    old = installed("pybreaker==1.4.1")
    ours = workers(4, fail_max=5, reset_timeout=2)
    theirs = workers(4, fail_max=5, reset_timeout=2, path=[old])
    assert set(ask_all(theirs, "version")) == {"1.4.1"}
    return ours, theirs


def test_half_a_fleet_may_be_of_the_old_release(mixed, service, server, namespace):
    """It opens and recovers as a whole and loses nothing. The old ones send a trial
    each; ours leave their keys as they want them."""
    ours, theirs = mixed
    both = ours + theirs
    ask_all(both, "load", threads=2, pause=0.03)
    time.sleep(0.3)
    for _ in range(2):
        service.mode = "down"
        until(lambda: server.key(namespace, "state") == "open")
        until(lambda: all_are(both, "open"))
        assert server.key(namespace, "opened_at").isdigit()
        assert int(server.key(namespace, "fail_counter")) >= 5
        service.mode = "up"
        until(lambda: server.key(namespace, "state") == "closed")
        until(lambda: all_are(both, "closed"))
        until(lambda: server.key(namespace, "fail_counter") == "0")
    reports = ask_all(both, "unload")
    assert exceptions(reports) <= ONLY, reports
    for worker, report in zip(ours, reports):
        nobody_missed_redis(worker, report)


def test_old_and_new_count_together(mixed, service, server, namespace):
    """Each other's failures; and each opens the circuit for the other."""
    ours, theirs = mixed
    ours[0].ask("call", "fail", times=2)
    until(lambda: server.key(namespace, "fail_counter") == "2")
    theirs[0].ask("call", "fail", times=2)
    assert server.key(namespace, "fail_counter") == "4"
    until(lambda: ours[1].ask("see", "fail_counter") == [4])
    report = theirs[1].ask("call", "fail")
    assert report["outcomes"] == {"CircuitBreakerError": 1}
    until(lambda: all_are(ours, "open"))
    assert ours[2].ask("call", "ok")["outcomes"] == {"CircuitBreakerError": 1}
    ours[2].ask("do", "close")
    until(lambda: server.key(namespace, "state") == "closed")
    assert all_are(theirs, "closed")
    until(lambda: all_are(ours, "closed"))
    ours[3].ask("call", "fail", times=5)
    until(lambda: all_are(theirs, "open"))
    assert theirs[3].ask("call", "ok")["outcomes"] == {"CircuitBreakerError": 1}
    until(lambda: theirs[3].ask("call", "ok")["outcomes"] == {"ok": 1})
    until(lambda: all_are(ours, "closed"))


BELONGS_TO_AN_OPENING = ("reason", "seconds", "failed_trials")


def opening(seconds=None, failed_trials=0, by="hand"):
    """A move that opens the circuit."""
    return {
        "state": "open",
        "by": by,
        "reason": "why",
        "seconds": seconds,
        "failed_trials": failed_trials,
        "fail_max": 5,
    }


def test_old_processes_go_by_their_timeout_whatever_belongs_to_an_opening(
    mixed, server, namespace
):
    """They do not know of its length, its reason and the failed trials, which only the
    new ones share. What an old one does next is an opening of its own, or a closing,
    and nothing of that belongs to it."""
    ours, theirs = mixed

    def known():
        return [w.ask("last_move", *BELONGS_TO_AN_OPENING) for w in ours]

    ours[0].ask("move", **opening(seconds=3600, failed_trials=2, by="outcome"))
    until(lambda: known() == [["why", 3600, 2]] * 4)

    def moment():
        return server.key(namespace, "opened_at")

    opened_at = moment()
    assert theirs[0].ask("call", "ok")["outcomes"] == {"CircuitBreakerError": 1}
    # Its timeout of two seconds over, an old one makes its trial, and it fails.
    until(lambda: theirs[0].ask("call", "fail") and opened_at != moment())
    until(lambda: all_are(ours, "open") and known() == [None] * 4)
    # The next one succeeds.
    until(lambda: theirs[0].ask("call", "ok")["outcomes"] == {"ok": 1})
    until(lambda: all_are(ours, "closed"))
    assert known() == [None] * 4
    # An opening by a new one is shared among the new ones again.
    ours[1].ask("move", **opening(seconds=7))
    until(lambda: known() == [["why", 7, 0]] * 4)
    assert ask_all(theirs, "state") == ["open"] * 4
    ours[2].ask("do", "close")
    until(lambda: server.key(namespace, "opening") is None)
    assert all_are(theirs, "closed")


def test_a_process_that_is_killed_takes_nothing_with_it(
    workers, service, server, namespace
):
    """Whenever that is. The others go on with the same circuit."""
    four = workers(4, reset_timeout=0.5)
    ask_all(four, "load", threads=2)
    time.sleep(0.2)
    four[0].kill()
    service.mode = "down"
    until(lambda: all_are(four[1:], "open"))
    four[1].kill()
    time.sleep(0.3)
    closes_for_all(four[2:], service, server, namespace)


def test_a_process_that_ends_leaves_the_fleet_as_it_is(workers, server, namespace):
    """Also the one that opened the circuit a moment ago."""
    mine, theirs = workers(2)
    mine.ask("do", "open")
    assert mine.leave() < 5
    assert server.key(namespace, "state") == "open"
    until(lambda: theirs.ask("state") == "open")
    never(lambda: theirs.ask("state") != "open", within=0.3)
