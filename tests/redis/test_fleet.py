"""Fleets of real processes that share a circuit: the fleet opens once, runs one trial
at a time, and one process's own fault shuts no other process out."""

from __future__ import annotations

import time

import pytest
from fleet import about_redis, ask_all, exceptions, installed, never
from support import DEEP, PATIENCE, until

REFRESH = 0.25
TIMEOUTS = [0.5, 1, 2, 5] if DEEP else [0.5, 1]
ONLY = {"ok", "Down", "CircuitBreakerError"}  # how a call may end


@pytest.fixture
def workers(server, fleet_of):
    """A function that starts workers with the settings that most tests here need. No
    worker takes Redis for lost because the machine is busy."""

    def start(number, fail_max=5, reset_timeout=1, success_threshold=1, **settings):
        breaker = {"fail_max": fail_max, "reset_timeout": reset_timeout}
        if success_threshold != 1:
            breaker["success_threshold"] = success_threshold
        if not settings.get("path"):
            storage = {"refresh": REFRESH, "patience": PATIENCE}
            storage.update(settings.get("storage", {}))
            settings.update(storage=storage, unhurried=True)
        return fleet_of(server.port, number, breaker=breaker, **settings)

    return start


def all_are(workers, state):
    return set(ask_all(workers, "state")) == {state}


def open_all(workers, service):
    """Take the service down under load until every process is open."""
    service.mode = "down"
    ask_all(workers, "load", threads=2, pause=0.03)
    until(lambda: all_are(workers, "open"))
    return time.monotonic()


def end_timeout(server, namespace):
    """Make the opening older than every timeout here. Returns when."""
    moment = str(int(time.time()) - 1000)
    server.client.set(f"{namespace}:pybreaker:opened_at", moment)
    return moment


def closes_for_all(workers, service, server, namespace):
    """The service is up, and the circuits of all processes close. After that the
    processes have nothing more to do."""
    service.mode = "up"
    until(lambda: all_are(workers, "closed"))
    until(lambda: server.key(namespace, "state") == "closed")
    until(lambda: all("ok" in r["outcomes"] for r in ask_all(workers, "report")))
    reports = ask_all(workers, "unload")
    assert exceptions(reports) <= ONLY, reports
    for worker in workers:
        assert about_redis(worker) == []


@pytest.mark.parametrize("timeout", TIMEOUTS)
def test_one_trial_goes_out_for_each_timeout(
    workers, service, server, namespace, timeout
):
    """Eight processes under load call a service that recovers. A trial whose process is
    killed, or that hangs, is followed by another trial after its lease."""
    eight = workers(8, reset_timeout=timeout)
    began = open_all(eight, service)
    rounds = 4 if DEEP else 2
    until(lambda: len(service.since(began)) >= rounds)
    assert_gaps(service.since(began), timeout)
    assert service.most_at_once(began) == 1

    # The next trial's process is killed.
    service.mode = "hanging"
    (pid,) = until(lambda: service.present(began))
    (killed,) = (worker for worker in eight if worker.pid == pid)
    killed.kill()
    others = [worker for worker in eight if worker is not killed]

    # The next two trials hang for longer than their leases.
    until(lambda: len(service.present(began)) >= 3)
    assert_gaps(service.since(began), timeout)

    closes_for_all(others, service, server, namespace)


def assert_gaps(trials, timeout):
    """No trial is claimed before the former claim is as old as the timeout. Clocks
    differ, so a little less will do."""
    for earlier, later in zip(trials, trials[1:]):
        assert later.at - earlier.call_began > 0.9 * timeout, trials


def test_a_trial_that_is_cancelled_is_followed_by_another_at_once(
    workers, service, server, namespace
):
    """There is still one trial at a time: the claim is released first."""
    four = workers(4, reset_timeout=60)
    began = open_all(four, service)
    ask_all(four, "unload")
    service.mode = "hanging"
    for worker in four:
        worker.tell("call_async_until", "closed", timeout=0.2, pause=0.02)

    def let_them_try():
        """End the timeout, and also the timeout of an opening that a process announces
        later."""
        if int(server.key(namespace, "opened_at") or time.time()) > time.time() - 500:
            end_timeout(server, namespace)

    # A test is too short for two such timeouts.
    until(lambda: let_them_try() or len(service.since(began)) >= 5)
    assert service.most_at_once(began) == 1
    service.mode = "up"
    until(lambda: let_them_try() or server.key(namespace, "state") == "closed")
    outcomes = [worker.answer() for worker in four]
    assert sum(outcome.get("TimeoutError", 0) for outcome in outcomes) >= 4
    until(lambda: server.key(namespace, "state") == "closed")
    until(lambda: server.key(namespace, "trial") is None)


def test_trials_of_two_processes_reach_the_threshold_together(
    workers, service, server, namespace
):
    """The circuit closes after three successes, of either process."""
    two = workers(2, fail_max=3, reset_timeout=0.5, success_threshold=3)
    began = open_all(two, service)
    until(lambda: service.since(began))
    assert service.most_at_once(began) == 1
    closes_for_all(two, service, server, namespace)
    until(lambda: server.key(namespace, "success_counter") == "0")


def test_successes_of_two_processes_are_added(workers, service, server, namespace):
    """The two processes run one trial each, in turns, and the second trial closes the
    circuit."""
    mine, theirs = workers(2, reset_timeout=0.3, success_threshold=2)
    mine.ask("do", "open")
    until(lambda: theirs.ask("state") == "open")
    until(lambda: mine.ask("call", "ok")["outcomes"] == {"ok": 1})
    until(lambda: server.key(namespace, "success_counter") == "1")
    assert server.key(namespace, "state") == "open"
    until(lambda: theirs.ask("call", "ok")["outcomes"] == {"ok": 1})
    until(lambda: all_are([mine, theirs], "closed"))


def test_the_fleet_opens_after_few_failures(workers, service):
    """All processes together have few more failures than fail_max. If each process
    counted by itself, all together would have eight times fail_max."""
    eight = workers(8, fail_max=60, reset_timeout=60)
    service.mode = "down"
    ask_all(eight, "load", threads=1, pause=REFRESH / 2)
    until(lambda: all_are(eight, "open"))
    assert len(service.arrivals) <= 8 * 60 / 2
    reports = ask_all(eight, "unload")
    assert exceptions(reports) <= ONLY


def test_an_idle_process_learns_of_an_opening_within_two_refreshes(workers):
    """The process learns of a move by hand within one refresh."""
    refresh = 0.5
    idle, busy = workers(2, fail_max=3, reset_timeout=30, storage={"refresh": refresh})

    # The load measures how much the machine delays the processes.
    ask_all([idle, busy], "load", threads=0)

    def seconds_until_it_knows(state):
        until(lambda: idle.ask("look") == state)
        (moved, *_), (found, *_) = busy.ask("changes")[-1], idle.ask("changes")[-1]
        reports = ask_all([idle, busy], "report")
        return found - moved - 5 * max(r["oversleeping"] for r in reports)

    def learns_in_time():
        """Whether the idle process learned of all three moves in time. A busy machine
        may delay the process in one attempt, so the test makes several."""
        found = []
        for move, state in (("open", "open"), ("close", "closed")):
            busy.ask("do", move)
            found.append(seconds_until_it_knows(state) < refresh + 0.3)
        busy.ask("call", "fail", times=3)
        found.append(seconds_until_it_knows("open") < 2 * refresh + 0.3)
        busy.ask("do", "close")
        until(lambda: all_are([idle, busy], "closed"))
        return all(found)

    until(learns_in_time)


def test_a_bad_host_opens_no_circuit_of_another_host(workers, service):
    """All calls of one host fail because of its network, and no calls of the other
    hosts fail."""
    good = workers(3, fail_max=3, storage={"refresh": 0.1})
    # The other processes have this time to reset the count.
    (bad,) = workers(1, fail_max=3, reset_timeout=0.3, storage={"refresh": 1})
    ask_all(good, "load", threads=1, what="ok")
    bad.ask("load", threads=1, what="fail")
    time.sleep(6 if DEEP else 2.5)
    until(lambda: bad.ask("report")["outcomes"].get("CircuitBreakerError", 0) > 10)
    bad.ask("unload")
    for report in ask_all(good, "unload"):
        assert set(report["outcomes"]) == {"ok"}, report


def test_clocks_that_differ_change_nothing(workers, service, server, namespace):
    """With wall clocks a hundred seconds off to either side, openings last as long as
    they should."""
    late = workers(1, reset_timeout=30, clock=-100)
    right = workers(1, reset_timeout=30)
    early = workers(1, reset_timeout=30, clock=100)
    everybody = late + right + early
    pairs = [*zip(everybody, everybody[1:]), *zip(everybody[1:], everybody)]
    for worker, other in pairs:
        worker.ask("do", "open")
        until(lambda: other.ask("state") == "open")  # noqa: B023
        assert abs(int(server.key(namespace, "opened_at")) - time.time()) < 50
        assert 0 < other.ask("see", "retry_after")[0] <= 30
        worker.ask("do", "close")
        until(lambda: all_are(everybody, "closed"))
    ask_all(everybody, "put", "reset_timeout", 1)
    began = open_all(everybody, service)
    until(lambda: len(service.since(began)) >= 2)
    assert_gaps(service.since(began), 1)
    closes_for_all(everybody, service, server, namespace)


@pytest.fixture
def mixed(workers):
    """A function that starts four workers with this library and four with release
    1.4.1."""

    def start(reset_timeout=60):
        old = installed("pybreaker==1.4.1")
        ours = workers(4, fail_max=5, reset_timeout=reset_timeout)
        theirs = workers(4, fail_max=5, reset_timeout=reset_timeout, path=[old])
        assert set(ask_all(theirs, "version")) == {"1.4.1"}
        return ours, theirs

    return start


def test_half_a_fleet_may_be_of_the_old_release(mixed, service, server, namespace):
    """The fleet opens and recovers as a whole and loses nothing. Each old process sends
    a trial of its own; the new processes leave the keys valid for the old ones."""
    ours, theirs = mixed(reset_timeout=2)
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
    for worker in ours:
        assert about_redis(worker) == []


def test_old_and_new_processes_share_one_count(mixed, service, server, namespace):
    """Old and new processes add to one count, and each kind opens the circuit for the
    other."""
    ours, theirs = mixed()
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
    end_timeout(server, namespace)
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
    """Old processes do not know the length, the reason and the failed trials of an
    opening, which only new processes share. The next opening or closing by an old
    process has none of these."""
    ours, theirs = mixed()

    def known():
        return [w.ask("last_move", *BELONGS_TO_AN_OPENING) for w in ours]

    ours[0].ask("move", **opening(seconds=3600, failed_trials=2, by="outcome"))
    until(lambda: known() == [["why", 3600, 2]] * 4)

    def moment():
        return server.key(namespace, "opened_at")

    assert theirs[0].ask("call", "ok")["outcomes"] == {"CircuitBreakerError": 1}
    # The timeout is over, and the trial of a process with release 1.4.1 fails. The test
    # waits for another second, because only whole seconds tell two openings apart.
    second = int(moment())
    until(lambda: time.time() >= second + 1)
    opened_at = end_timeout(server, namespace)
    until(lambda: theirs[0].ask("call", "fail") and opened_at != moment())
    until(lambda: all_are(ours, "open") and known() == [None] * 4)
    # The next trial succeeds.
    end_timeout(server, namespace)
    until(lambda: theirs[0].ask("call", "ok")["outcomes"] == {"ok": 1})
    until(lambda: all_are(ours, "closed"))
    assert known() == [None] * 4
    # An opening by a new process is shared among the new processes again.
    ours[1].ask("move", **opening(seconds=7))
    until(lambda: known() == [["why", 7, 0]] * 4)
    assert ask_all(theirs, "state") == ["open"] * 4
    ours[2].ask("do", "close")
    until(lambda: server.key(namespace, "opening") is None)
    assert all_are(theirs, "closed")


def test_a_process_that_is_killed_takes_nothing_with_it(
    workers, service, server, namespace
):
    """The process is killed at any moment, and the other processes go on with the same
    circuit."""
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
    """This holds also for the process that has just opened the circuit."""
    mine, theirs = workers(2)
    mine.ask("do", "open")
    assert mine.leave() < PATIENCE / 2
    assert server.key(namespace, "state") == "open"
    until(lambda: theirs.ask("state") == "open")
    never(lambda: theirs.ask("state") != "open", within=0.3)
