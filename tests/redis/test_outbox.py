"""What a shared storage writes to Redis and reads from Redis, step by step.

Here no thread makes passes: a courier makes a pass when a test says so, and the test
moves the clock. Redis is a table of the circuit's keys, and each breaker stands for a
process.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import inspect
import json
import logging
import math
import os
import queue
import threading
import time
import types
import weakref
from datetime import datetime, timezone

import hypothesis.strategies as st
import pytest
import redis
import stepwise
import trio
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    precondition,
    rule,
    run_state_machine_as_test,
)
from stepwise import (
    REFRESH,
    Client,
    Process,
    Redis,
    agree,
    ends,
    let_no_thread_wait,
    trial_of,
)
from support import BRIEF, DEEP, PATIENCE, Boom, boom, fail

from pybreaker import CircuitBreakerError, CircuitRedisStorage


@pytest.fixture
def clock(clock, monkeypatch):
    clock.module = stepwise.set_clock(monkeypatch, clock)
    return clock


@pytest.fixture
def keys(clock):
    return Redis(clock)


@pytest.fixture
def slept(clock):
    """The seconds for which all threads slept."""
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        clock.advance(1.0)  # other code may take long to run meanwhile

    clock.module.sleep = sleep
    return slept


@pytest.fixture
def waits(monkeypatch):
    """The timeouts of all waits for an event that was not set."""
    waits = []

    let_no_thread_wait(monkeypatch, waits.append)
    return waits


@pytest.fixture
def alone(monkeypatch):
    stepwise.leave_alone(monkeypatch)


@pytest.fixture
def process(monkeypatch, keys, waits, alone):
    """A function that makes processes."""
    stepwise.carry_by_hand(monkeypatch)
    return lambda **settings: Process(keys, **settings)


@pytest.fixture
def said(caplog):
    """The log records about Redis."""
    caplog.set_level(logging.DEBUG, "pybreaker")
    return lambda: [
        (record.levelname, record.getMessage())
        for record in caplog.records
        if "Redis" in record.getMessage()
    ]


def levels(said):
    return [level for level, _ in said()]


def test_a_shared_storage_says_what_it_is(process):
    """Every storage of the library has a name."""
    assert process().storage.name == "redis"


# Openings by the count.


def test_a_trip_while_redis_is_away_is_announced_when_it_is_back(process, keys):
    mine = process()
    mine.is_cut_off()
    fail(mine.breaker, 3)
    assert keys["state"] == "closed"
    mine.is_back()
    assert keys["state"] == "open"
    assert keys["opened_at"] == "5"


def test_a_trip_of_a_circuit_that_is_open_elsewhere_is_announced_at_once(process, keys):
    """This process has not read of the other opening, and does not wait to do so."""
    mine, theirs = process(), process()
    mine.breaker.open()
    mine.makes_passes()
    mine.makes_passes()
    mine.breaker.close()
    fail(mine.breaker, 3)
    mine.makes_passes()
    theirs.makes_passes()
    assert keys["state"] == "open"
    assert ("SET", "closed") not in mine.client.sent_to("state")
    assert mine.state == theirs.state == "open"


@pytest.mark.parametrize("elsewhere", [0, 1, 1000])
def test_a_trip_is_announced_if_the_count_stands_after_a_refresh(
    process, keys, clock, elsewhere
):
    """The count in Redis decides, and may be above `fail_max`, as other processes have
    failed too."""
    mine, theirs = process(), process(fail_max=2000)
    fail(mine.breaker, 3)
    assert (mine.state, theirs.state) == ("open", "closed")
    mine.makes_passes()
    fail(theirs.breaker, elsewhere)
    theirs.makes_passes()
    clock.advance(REFRESH)
    assert keys["state"] == "closed"
    assert mine.makes_passes() == 0.0
    assert mine.makes_passes() == REFRESH
    assert keys["state"] == "open"
    assert keys["opened_at"] == "5"
    assert int(keys["fail_counter"]) == 3 + elsewhere


def test_the_courier_comes_when_the_count_is_to_be_judged(process, clock):
    """The courier comes neither sooner nor, if the next refresh is later, at the next
    refresh."""
    mine = process()
    fail(mine.breaker, 3)
    clock.advance(1)
    assert mine.makes_passes() == REFRESH - 1
    clock.advance(REFRESH)
    assert stepwise.unconfirmed(mine.storage).due < clock.now


def test_a_count_that_does_not_stand_leaves_the_others_closed(process, keys, clock):
    mine, theirs = process(), process()
    fail(mine.breaker, 3)
    mine.makes_passes()
    theirs.makes_passes()
    theirs.breaker.call(int)
    theirs.makes_passes()
    clock.advance(REFRESH)
    mine.makes_passes(2)
    theirs.makes_passes()
    assert (mine.state, theirs.state) == ("open", "closed")
    assert keys["state"] == "closed"


@pytest.fixture
def apart(process, clock):
    """Two processes. The first has opened, and its count was gone a refresh later."""
    mine, theirs = process(), process()
    fail(mine.breaker, 3)
    mine.makes_passes()
    theirs.breaker.fail_counter = 0
    theirs.makes_passes()
    clock.advance(REFRESH)
    mine.makes_passes()
    assert (mine.state, theirs.state) == ("open", "closed")
    return mine, theirs


def test_while_a_trip_is_unconfirmed_its_count_is_the_fleets(process, keys):
    mine, theirs = process(), process()
    fail(mine.breaker, 3)
    mine.makes_passes()
    theirs.breaker.fail_counter = 1
    theirs.makes_passes()
    mine.makes_passes()
    assert mine.breaker.fail_counter == 1
    mine.storage.increment_counter()
    mine.makes_passes()
    assert keys["fail_counter"] == "2"


def test_a_process_that_is_open_alone_counts_alone(apart, keys, clock):
    mine, theirs = apart
    clock.advance(60)
    ends(trial_of(mine.breaker), Boom())
    mine.makes_passes()
    counted = mine.breaker.fail_counter
    fail(theirs.breaker)
    theirs.makes_passes()
    mine.makes_passes()
    assert mine.breaker.fail_counter == counted != 1
    mine.storage.reset_counter()
    mine.makes_passes()
    assert mine.breaker.fail_counter == 0
    assert keys["fail_counter"] == "1"
    assert mine.state == "open"
    assert keys["state"] == "closed"
    assert keys["trial"] is None


def test_a_process_that_was_open_alone_closes_alone_and_counts_with_the_others(
    apart, keys, clock
):
    mine, theirs = apart
    clock.advance(60)
    ends(trial_of(mine.breaker))
    assert mine.state == "closed"
    fail(mine.breaker, 2)
    mine.makes_passes()
    assert keys["fail_counter"] == "2"
    assert mine.client.sent_to("state") == [("SET", "closed", "NX")]
    theirs.makes_passes()
    fail(theirs.breaker)
    assert theirs.state == "open"


def test_a_process_that_is_open_alone_goes_with_the_others_at_their_next_move(
    apart, keys
):
    mine, theirs = apart
    for move in (theirs.breaker.open, theirs.breaker.close):
        move()
        theirs.makes_passes()
        mine.makes_passes()
    assert mine.state == "closed"
    fail(mine.breaker)
    mine.makes_passes()
    assert keys["fail_counter"] == "1"


def test_a_trip_that_is_not_judged_when_redis_goes_away_is_announced(process, keys):
    """No process can tell whether the count would have stood."""
    mine = process()
    fail(mine.breaker, 3)
    mine.makes_passes()
    mine.is_cut_off()
    mine.is_back()
    assert keys["state"] == "open"


def test_a_trip_is_judged_where_a_trial_has_failed_meanwhile(process, keys, clock):
    mine = process(reset_timeout=1)
    fail(mine.breaker, 3)
    mine.makes_passes()
    clock.advance(1)
    ends(trial_of(mine.breaker), Boom())
    mine.makes_passes()
    assert keys["state"] == "closed"
    clock.advance(REFRESH - 1)
    mine.makes_passes(2)
    assert keys["state"] == "open"


def test_a_trip_is_judged_no_more_when_a_trial_has_closed_the_circuit(
    process, keys, clock
):
    """The timeout is shorter than a refresh."""
    mine, theirs = process(reset_timeout=1), process(fail_max=10)
    fail(mine.breaker, 3)
    mine.makes_passes()
    clock.advance(1)
    ends(trial_of(mine.breaker))
    assert mine.state == "closed"
    mine.makes_passes()
    fail(theirs.breaker, 3)
    theirs.makes_passes()
    clock.advance(REFRESH)
    mine.makes_passes(2)
    assert (mine.state, keys["state"]) == ("closed", "closed")


def test_a_view_judges_no_trip_that_is_newer_than_it(process, keys, clock, said):
    """Between the view and the trip a move by hand was made, which all processes
    follow."""
    mine = process()
    fail(mine.breaker, 3)
    mine.makes_passes()
    clock.advance(REFRESH)

    def meanwhile():
        mine.breaker.close()
        fail(mine.breaker, 3)

    mine.client.meanwhile = meanwhile
    mine.makes_passes()
    mine.makes_passes()
    assert keys["state"] == "closed"
    clock.advance(REFRESH)
    mine.makes_passes(2)
    assert keys["state"] == "open"
    assert said() == []


def test_a_view_judges_no_trip_where_a_later_one_was_made_at_the_same_moment(
    process, keys, clock
):
    """A clock may stand still for a while."""
    mine = process()
    fail(mine.breaker, 3)
    mine.makes_passes()
    _, membership = stepwise.shared_state(mine.storage)
    clock.advance(REFRESH)

    def meanwhile():
        membership.unconfirmed = membership.unconfirmed._replace()

    mine.client.meanwhile = meanwhile
    mine.makes_passes()
    assert keys["state"] == "closed"
    assert stepwise.outbox(mine.storage).state is None


def test_a_trip_that_is_forgotten_while_it_is_judged_does_no_harm(process, clock, said):
    mine = process()
    fail(mine.breaker, 3)
    clock.advance(REFRESH)
    mine.client.meanwhile = mine.breaker.close
    mine.makes_passes()
    assert mine.state == "closed"
    assert said() == []


def test_a_trip_during_the_exchange_of_a_closing_is_not_lost(process, keys, clock):
    mine = process()
    mine.breaker.open()
    mine.breaker.close()
    mine.client.meanwhile = lambda: fail(mine.breaker, 3)
    mine.makes_passes()
    assert mine.state == "open"
    clock.advance(REFRESH)
    mine.makes_passes(3)
    assert keys["state"] == "open"


# Counts.


def test_counts_that_come_in_during_an_exchange_are_added_to_its_view(process, keys):
    mine, theirs = process(fail_max=10), process(fail_max=10)
    fail(theirs.breaker, 3)
    theirs.makes_passes()
    mine.client.meanwhile = lambda: fail(mine.breaker)
    assert mine.makes_passes() == 0.0
    assert mine.breaker.fail_counter == 4
    assert keys["fail_counter"] == "3"
    mine.makes_passes()
    assert keys["fail_counter"] == "4"
    assert mine.breaker.fail_counter == 4


def test_a_count_that_is_set_during_an_exchange_stays(process, keys):
    mine = process(fail_max=10)
    keys.texts["fail_counter"] = "3"
    mine.client.meanwhile = lambda: setattr(mine.breaker, "fail_counter", 7)
    mine.makes_passes()
    assert mine.breaker.fail_counter == 7
    mine.makes_passes()
    assert keys["fail_counter"] == "7"


@pytest.mark.parametrize("count", [0, 1, 7])
def test_a_count_may_be_set(process, keys, count):
    mine = process()
    keys.texts.update(fail_counter="3", success_counter="3")
    mine.makes_passes()
    mine.storage.counter = mine.storage.success_counter = count
    mine.makes_passes()
    assert (mine.storage.counter, keys["fail_counter"]) == (count, str(count))
    assert mine.storage.success_counter == int(keys["success_counter"]) == count


@pytest.mark.parametrize("when", ["before it", "during it", "after it"])
def test_failures_that_could_not_be_sent_stay_in_their_process(process, keys, when):
    """A count that was set by hand stays in the process, too: the fleet has gone on
    without it."""
    mine = process(fail_max=10)
    keys.texts.update(fail_counter="1", success_counter="7")

    def count():
        fail(mine.breaker, 2)
        mine.storage.success_counter = 5

    if when == "before it":
        count()
    elif when == "during it":
        mine.client.meanwhile = count
    mine.is_cut_off()
    if when == "after it":
        count()
    assert mine.breaker.fail_counter == 2
    mine.is_back()
    assert (keys["fail_counter"], keys["success_counter"]) == ("1", "7")
    assert mine.breaker.fail_counter == 1


def test_what_is_counted_while_an_exchange_fails_is_newer_than_its_outbox(
    process, keys
):
    """The success comes after a count that was set by hand."""
    mine = process(fail_max=10)
    mine.breaker.fail_counter = 2
    mine.client.meanwhile = lambda: mine.breaker.call(int)
    mine.is_cut_off()
    keys.texts["fail_counter"] = "3"
    mine.is_back()
    assert keys["fail_counter"] == "0"


@pytest.mark.parametrize("when", ["before it", "during it", "after it"])
def test_a_success_that_could_not_be_sent_is_sent_later(process, keys, when):
    mine = process()
    fail(mine.breaker, 2)
    mine.makes_passes()
    assert keys["fail_counter"] == "2"
    if when == "before it":
        mine.breaker.call(int)
    elif when == "during it":
        mine.client.meanwhile = lambda: mine.breaker.call(int)
    mine.is_cut_off()
    if when == "after it":
        mine.breaker.call(int)
    mine.is_back()
    assert keys["fail_counter"] == "0"


@pytest.mark.parametrize("when", ["before it", "during it"])
def test_a_failure_does_not_hide_a_success_that_could_not_be_sent(process, keys, when):
    """The failure itself stays in the process, as other failures do."""
    mine = process()
    fail(mine.breaker, 2)
    mine.makes_passes()
    mine.breaker.call(int)
    if when == "before it":
        fail(mine.breaker)
    else:
        mine.client.meanwhile = lambda: fail(mine.breaker)
    mine.is_cut_off()
    assert mine.breaker.fail_counter == 1
    mine.is_back()
    assert keys["fail_counter"] == "0"


def test_a_process_that_made_no_move_while_away_resets_no_count(process, keys):
    mine = process(success_threshold=3)
    mine.is_cut_off()
    keys.texts.update(fail_counter="2", success_counter="1")
    mine.is_back()
    assert (keys["fail_counter"], keys["success_counter"]) == ("2", "1")


def test_a_process_that_opened_while_away_resets_no_failures(process, keys, said):
    """The process set only the state, so its opening has no moment, in Redis either."""
    mine = process()
    mine.is_cut_off()
    keys.texts.update(fail_counter="2", success_counter="1", opened_at="1")
    mine.storage.state = "".join(["o", "pen"])
    mine.is_back()
    assert (keys["fail_counter"], keys["success_counter"]) == ("2", "0")
    assert keys["opened_at"] is None
    assert levels(said) == ["WARNING", "INFO"]  # nothing was mended


def test_a_process_that_closed_while_away_resets_all_counts(process, keys, said):
    """This holds also where the count of the process was 0, and whichever process wrote
    the state."""
    mine = process()
    mine.is_cut_off()
    keys.texts.update(fail_counter="2", success_counter="1")
    mine.storage.state = "".join(["clo", "sed"])
    mine.is_back()
    assert (keys["fail_counter"], keys["success_counter"]) == ("0", "0")
    assert levels(said) == ["WARNING", "INFO"]  # nothing was mended


def test_a_move_while_redis_answers_resets_no_count_by_itself(process, keys):
    mine = process()
    keys.texts.update(fail_counter="2", success_counter="1")
    mine.makes_passes()
    mine.storage.state = "open"
    mine.makes_passes()
    assert (keys["fail_counter"], keys["success_counter"]) == ("2", "1")


# Moves.


def test_a_move_that_could_not_be_sent_is_sent_later_with_its_moment(
    process, keys, clock
):
    mine = process()
    mine.breaker.open()
    mine.is_cut_off()
    clock.advance(13)
    mine.is_back()
    assert (keys["state"], keys["opened_at"]) == ("open", "5")


def test_a_move_that_is_no_opening_writes_no_moment_of_opening(process):
    mine = process()
    mine.breaker.half_open()
    mine.makes_passes()
    mine.breaker.close()
    mine.makes_passes()
    assert mine.client.sent_to("opened_at") == []


def test_a_circuit_that_is_open_in_redis_has_its_moment_of_opening(process, keys):
    """The courier writes the moment before the state, both for a move and after a
    flush."""
    mine = process()
    seen = []
    reply = mine.client.reply

    def watched(command):
        replied = reply(command)
        seen.append((keys["state"], keys["opened_at"]))
        return replied

    mine.client.reply = watched
    mine.breaker.open()
    mine.makes_passes()
    keys.texts.clear()
    mine.makes_passes()
    assert ("open", "5") in seen
    assert ("open", None) not in seen


def test_a_moment_of_opening_that_is_set_is_sent_at_once(process, keys, clock):
    mine = process()
    mine.breaker.open()
    mine.makes_passes()
    mine.courier.done.clear()
    mine.storage.opened_at = mine.storage.opened_at
    assert mine.courier.done == ["wake"]
    assert stepwise.is_due(mine.storage)
    assert mine.courier.make_pass() > 0
    assert len(mine.client.sent_to("opened_at")) == 2


@pytest.mark.parametrize(
    "add",
    [
        lambda mine: mine.breaker.open(),
        lambda mine: fail(mine.breaker),
        lambda mine: stepwise.ask(mine.storage),
        lambda mine: stepwise.give_back(mine.storage, stepwise.claim(60, int)),
    ],
    ids=["a move", "a count", "a claim", "a claim to give back"],
)
def test_the_courier_goes_again_at_once_for_news_during_its_pass(process, add):
    mine = process()
    mine.client.meanwhile = lambda: add(mine)
    assert mine.makes_passes() == 0.0
    assert mine.makes_passes() == REFRESH


def test_a_process_that_redis_never_answered_sends_its_moves_later(
    process, keys, clock
):
    """The process's own circuit was open, and a trial has closed the circuit."""
    trouble = redis.ConnectionError("not yet")
    mine = process(trouble=trouble, fallback_circuit_state="open")
    keys.texts.update(state="open", opened_at="5")
    ends(trial_of(mine.breaker))
    assert mine.state == "closed"
    mine.is_back()
    assert keys["state"] == "closed"


def test_a_move_is_sent_with_its_own_moment(process, keys, clock):
    """The circuit may move again while the courier asks for the time of Redis."""
    mine = process()
    mine.breaker.open()
    clock.advance(7)
    time = mine.client.time

    def meanwhile():
        mine.client.time = time
        mine.breaker.open()
        return time()

    mine.client.time = meanwhile
    mine.makes_passes()
    assert mine.client.sent_to("opened_at") == [("SET", "5")]
    mine.makes_passes()
    assert keys["opened_at"] == "12"


def test_a_process_that_is_open_alone_sends_no_moment_that_is_set(apart, keys):
    mine, _ = apart
    mine.storage.opened_at = mine.storage.opened_at
    mine.makes_passes()
    assert keys["opened_at"] is None


def test_a_move_by_hand_of_a_process_that_is_open_alone_reaches_the_fleet(apart, keys):
    """An operator who closes one circuit means the circuit of the fleet."""
    mine, theirs = apart
    for move in ("half_open", "open", "close"):
        getattr(mine.breaker, move)()
        mine.makes_passes()
        theirs.makes_passes()
        assert keys["state"] == theirs.state == mine.state


# What belongs to an opening: its length, its reason and the number of failed trials.


def move(state="open", by="hand", reason="why", seconds=None, failed_trials=0):
    """A move such as a breaker gives to its storage."""
    return types.SimpleNamespace(
        state=state,
        by=by,
        reason=reason,
        seconds=seconds,
        failed_trials=failed_trials,
        fail_max=3,
    )


def known(process):
    """The attributes of the last move that the storage of a process knows."""
    found = process.storage.last_move()
    return found and (found.state, found.reason, found.seconds, found.failed_trials)


@pytest.mark.parametrize("seconds", [None, 0, 0.5, 3600, 10**12, math.inf])
@pytest.mark.parametrize("failed_trials", [0, 7])
def test_what_belongs_to_an_opening_travels_with_it(
    process, seconds, failed_trials, said
):
    mine, theirs = process(), process()
    why = 'ümläuts, "quotes" and a \N{SNOWMAN}'
    made = move(by="outcome", reason=why, seconds=seconds, failed_trials=failed_trials)
    mine.storage.move(made)
    mine.makes_passes()
    theirs.makes_passes()
    assert known(theirs) == ("open", why, seconds, failed_trials)
    assert theirs.storage.last_move().by == "outcome"
    assert said() == []


def test_a_breaker_shows_what_belongs_to_an_opening_elsewhere(process, clock):
    """The breaker waits for the length of the opening, whatever its own timeout is."""
    mine, theirs = process(), process(reset_timeout=5)
    mine.breaker.open(1000, "maintenance")
    mine.makes_passes()
    clock.advance(10)
    theirs.makes_passes()
    assert theirs.breaker.state.reason == "maintenance"
    assert theirs.breaker.retry_after == 990


def test_a_process_that_starts_later_knows_what_belongs_to_the_opening(process):
    mine = process()
    mine.storage.move(move(seconds=9, failed_trials=2))
    mine.makes_passes()
    assert known(process()) == ("open", "why", 9, 2)


def test_a_storage_knows_the_very_move_that_was_made_in_its_process(
    process, keys, clock
):
    """The object is the same until the circuit moves again, so that a breaker can tell
    two moves apart."""
    mine, theirs = process(), process()
    mine.storage.counter = 3
    assert mine.storage.last_move() is None
    for made in (move(), move("half-open"), move("closed"), move(by="count")):
        mine.storage.move(made)
        mine.makes_passes(2)
        assert mine.storage.last_move() is made
    clock.advance(REFRESH)
    mine.makes_passes(3)
    assert (keys["state"], mine.storage.last_move()) == ("open", made)
    theirs.makes_passes()
    found = theirs.storage.last_move()
    theirs.makes_passes(3)
    assert theirs.storage.last_move() is found


def test_the_half_opening_for_a_trial_takes_nothing_from_the_opening(process, keys):
    """The process that runs the trial opened the circuit while Redis was away."""
    mine = process()
    mine.is_cut_off()
    mine.storage.move(move(seconds=9))
    trial = move("half-open", by="trial")
    mine.storage.move(trial)
    mine.is_back()
    assert mine.storage.last_move() is trial
    assert known(process()) == ("open", "why", 9, 0)


def test_an_opening_by_the_count_travels_with_its_reason_when_it_is_confirmed(
    process, clock
):
    mine, theirs = process(), process()
    for _ in range(3):
        mine.storage.increment_counter()
    mine.storage.move(move(by="count", reason="3 failures"))
    mine.makes_passes()
    theirs.makes_passes()
    assert known(theirs) is None
    clock.advance(REFRESH)
    mine.makes_passes(2)
    theirs.makes_passes()
    assert known(theirs) == ("open", "3 failures", None, 0)


def test_an_opening_in_the_same_second_as_the_one_before_is_news(process):
    """Redis has the same moment for both openings."""
    mine, theirs = process(), process()
    for seconds in (None, 30, 60):
        mine.storage.move(move(seconds=seconds))
        mine.makes_passes()
        theirs.makes_passes()
        assert known(theirs) == ("open", "why", seconds, 0)


def test_what_belongs_to_another_opening_is_ignored(process, keys):
    """Older releases open the circuit anew and leave the key ``opening`` as it is."""
    mine = process()
    mine.storage.move(move(seconds=9, failed_trials=2))
    mine.makes_passes()
    keys.texts["opened_at"] = "4"
    mine.makes_passes()
    assert (mine.storage.state, mine.storage.last_move()) == ("open", None)
    assert known(process()) is None


def test_closing_deletes_what_belongs_to_the_opening(process, keys):
    mine, theirs = process(), process()
    mine.breaker.open()
    mine.makes_passes()
    assert keys["opening"] is not None
    mine.breaker.half_open()
    mine.makes_passes()
    assert keys["opening"] is not None
    mine.breaker.close()
    mine.makes_passes()
    assert keys["opening"] is None
    theirs.makes_passes()
    assert (theirs.state, theirs.storage.last_move()) == ("closed", None)


def test_what_belongs_to_an_opening_is_written_before_the_opening(process, keys):
    """The courier writes the key ``opening`` before the state."""
    mine = process()
    seen = []
    reply = mine.client.reply

    def watched(command):
        replied = reply(command)
        seen.append((keys["opened_at"], keys["opening"] is not None))
        return replied

    mine.client.reply = watched
    mine.breaker.open()
    mine.makes_passes()
    assert (None, True) in seen
    assert ("5", False) not in seen


def test_a_moment_that_is_set_takes_what_belongs_to_the_opening_along(process, clock):
    """An opening whose moment is set remains the same opening."""
    mine, theirs = process(), process()
    mine.storage.move(move(seconds=9))
    mine.makes_passes()
    clock.advance(10)
    mine.storage.opened_at = datetime.fromtimestamp(stepwise.EPOCH + 8, timezone.utc)
    mine.makes_passes()
    theirs.makes_passes()
    assert known(theirs) == ("open", "why", 9, 0)
    assert theirs.storage.open_for() == 7


def test_a_state_that_is_written_alone_says_nothing_of_an_opening(process, keys):
    """The reason and the length of the opening before do not belong to the new
    state."""
    mine = process()
    mine.storage.move(move(seconds=9))
    mine.makes_passes()
    mine.storage.state = "open"
    assert mine.storage.last_move() is None
    mine.makes_passes()
    assert keys["opening"] is None
    assert known(process()) is None


def test_a_flush_loses_nothing_of_what_belongs_to_an_opening(process, keys):
    mine, theirs = process(), process()
    mine.storage.move(move(seconds=9))
    mine.makes_passes()
    theirs.makes_passes()
    keys.texts.clear()
    theirs.makes_passes()
    assert known(process()) == ("open", "why", 9, 0)


def test_what_belongs_to_an_opening_may_be_lost_alone(process, keys):
    """A server that is short of memory may drop the key. A process that knows the
    opening still knows its reason and length."""
    mine = process()
    mine.storage.move(move(seconds=9))
    mine.makes_passes()
    del keys["opening"]
    mine.makes_passes(2)
    assert known(mine) == ("open", "why", 9, 0)
    assert known(process()) is None


GOOD = {"opened_at": "5", "reason": "", "by": "", "seconds": None, "failed_trials": 0}


@pytest.mark.parametrize(
    "nonsense",
    [
        *(["a", "list"], "", "nonsense", "5", "[]", "[" * 100_000, "null", "{}"),
        *(json.dumps({**GOOD, "seconds": s}) for s in (-1, math.nan, "9", [])),
        *(json.dumps({**GOOD, "failed_trials": k}) for k in (-1, 0.5, "1", None)),
    ],
    ids=lambda nonsense: str(nonsense)[:80],
)
def test_nonsense_about_an_opening_is_put_in_order(process, keys, nonsense, said):
    """A process that knows the opening writes the key anew; another deletes the key."""
    mine = process()
    mine.storage.move(move(seconds=9))
    mine.makes_passes()
    good = keys["opening"]
    keys.texts["opening"] = nonsense
    mine.makes_passes()
    assert (keys["opening"], levels(said)) == (good, ["WARNING"])
    mine.breaker.close()
    mine.makes_passes()
    keys.texts["opening"] = nonsense
    mine.makes_passes()
    assert keys["opening"] is None


def test_a_trip_made_before_redis_first_answered_stands_and_is_sent(process, keys):
    """Redis is empty when Redis first answers."""
    mine = process(trouble=redis.ConnectionError("not yet"), patience=0.001)
    mine.client.trouble = None
    membership = stepwise.shared_state(mine.storage)[1]
    membership.is_away = False  # as if Redis were only late
    mine.client.meanwhile = lambda: fail(mine.breaker, 3)
    keys.texts.clear()
    mine.makes_passes()
    assert mine.state == "open"
    mine.makes_passes()
    assert (mine.state, keys["state"], keys["fail_counter"]) == ("open", "open", "3")


# Trials.


@pytest.fixture
def due(process, clock, keys):
    """A function that makes processes with an open circuit whose timeout is over."""

    def due(number=2, success_threshold=1, reset_timeout=60):
        processes = [
            process(success_threshold=success_threshold, reset_timeout=reset_timeout)
            for _ in range(number)
        ]
        processes[0].breaker.open()
        for each in processes:
            each.makes_passes()
            assert each.state == "open"
        clock.advance(reset_timeout)
        return processes

    return due


def is_refused(breaker):
    try:
        breaker.call(int)
    except CircuitBreakerError:
        return True
    return False


def test_no_call_waits_for_an_answer_that_has_come(due, keys, waits):
    mine, theirs = due()
    trial = trial_of(mine.breaker)
    assert keys["trial"] is not None
    assert is_refused(theirs.breaker)
    ends(trial)
    assert waits == []


def test_a_refused_process_asks_nothing_for_a_tenth_of_a_second(due, clock):
    mine, theirs = due()
    trial_of(mine.breaker)
    for passed, asked in ((0.0, 1), (0.09, 1), (0.02, 2)):
        clock.advance(passed)
        assert is_refused(theirs.breaker)
        theirs.makes_passes()
        assert len(theirs.client.sent_to("trial")) == asked


def test_a_refused_process_may_ask_after_a_tenth_of_a_second(process, clock, keys):
    clock.now = 0.0
    mine = process()
    keys.texts["trial"] = "another process's"
    assert not mine.storage.claim_trial(60)
    clock.now = 0.1
    del keys["trial"]
    assert mine.storage.claim_trial(60)


def test_a_claim_that_was_granted_without_redis_is_not_sent_later(due, keys, waits):
    mine, _ = due()
    mine.is_cut_off()
    trial = trial_of(mine.breaker)
    assert waits == []
    mine.is_back()
    assert keys["trial"] is None
    ends(trial)


def test_a_circuit_that_closes_as_its_trial_begins_is_closed(due, keys):
    """The storage learns of the closing between the breaker's look and its move. A
    failure of that trial is then late and opens no circuit. (Found by
    test_interleavings.)"""
    mine, theirs = due()
    mine.courier.is_quick = False
    theirs.breaker.close()
    theirs.makes_passes()
    move = mine.storage.move

    def hear_and_move(*args, **kwargs):
        mine.makes_passes()
        move(*args, **kwargs)

    mine.storage.move = hear_and_move
    trial = trial_of(mine.breaker)
    assert mine.state == "closed"
    del mine.storage.move
    ends(trial, Boom())
    mine.makes_passes(2)
    assert mine.state == theirs.state == keys["state"] == "closed"


@pytest.mark.parametrize("reset_timeout", [0, 0.0004, 0.4, 60, math.inf, 1e9])
def test_the_lease_of_a_claim_is_the_timeout_and_a_day_at_most(process, reset_timeout):
    mine = process()
    claim = stepwise.ask(mine.storage, reset_timeout)
    lease = {0: 1, 0.0004: 1, 0.4: 400, 60: 60_000}.get(reset_timeout, 86_400_000)
    assert mine.client.sent_to("trial")[0] == ("SET", claim.token, "NX", "PX", lease)


def test_a_process_makes_its_next_claim_when_its_last_is_given_back(due, keys):
    mine, theirs = due(success_threshold=3)
    for each in (mine, theirs):
        each.breaker.half_open()
        each.makes_passes(3)
    ends(trial_of(mine.breaker))
    assert keys["trial"] is not None  # the claim of the ended trial
    trial = trial_of(mine.breaker)
    assert keys["trial"] == mine.client.sent_to("trial")[-1][1]
    assert is_refused(theirs.breaker)
    ends(trial)


def test_all_waiting_claims_are_answered_when_the_last_is_given_back(due):
    mine, _ = due(success_threshold=3)
    trial = trial_of(mine.breaker)
    mine.courier.is_quick = False
    ends(trial)
    claims = [stepwise.ask(mine.storage) for _ in range(2)]
    mine.makes_passes(2)
    assert [claim.granted for claim in claims] == [True, False]


def test_a_claim_is_not_granted_by_a_view_that_brings_news(due, keys):
    """Redis has the claim, but the circuit has moved since the claim was made."""
    mine, theirs = due()
    mine.courier.is_quick = False
    theirs.storage.state = "half-open"
    theirs.makes_passes()
    claim = stepwise.ask(mine.storage)
    mine.makes_passes()
    assert claim.granted is False
    assert keys["trial"] is None


def test_a_claim_that_was_written_without_a_lease_lapses(due, keys, clock):
    """A user may have written the key by hand, without a lease."""
    mine, _ = due()
    keys.texts["trial"] = "another process's"
    assert is_refused(mine.breaker)
    clock.advance(59.9)
    assert keys["trial"] == "another process's"
    clock.advance(0.2)
    assert keys["trial"] is None


def test_a_refused_claim_stays_refused_when_redis_goes_away(due, keys):
    """Redis goes away when the courier gives a lease to a claim without one."""
    mine, _ = due()
    keys.texts["trial"] = "another process's"

    def go_away():
        mine.client.trouble = redis.ConnectionError("gone")

    mine.client.meanwhile = go_away
    assert is_refused(mine.breaker)


def test_a_refused_process_does_not_prolong_the_claim_of_another(due, keys, clock):
    mine, theirs = due()
    trial_of(theirs.breaker)
    assert is_refused(mine.breaker)
    assert [words[0] for words in mine.client.sent_to("trial")] == ["SET"]


def test_a_claim_is_refused_where_the_circuit_has_moved(due, keys):
    """The process gives the claim back at once."""
    mine, theirs = due()
    theirs.breaker.close()
    theirs.makes_passes()
    assert not is_refused(mine.breaker) or mine.state == "closed"
    assert mine.state == "closed"
    mine.makes_passes()
    assert keys["trial"] is None


# The margin before the lease's end is a quarter of a second for a lease of a minute,
# and a quarter of the lease for a lease of 0.4 s.
@pytest.mark.parametrize(
    ("lease", "left", "is_safe"),
    [
        (60, 60, True),
        (5, 5, True),
        (10, 0.255, True),
        (10, 0.25, False),
        (10, 0.245, False),
        (10, 0, False),
        (0.4, 0.11, True),
        (0.4, 0.10001, True),
        (0.4, 0.09999, False),
        (0.4, 0.09, False),
    ],
)
def test_a_claim_that_is_about_to_lapse_is_not_given_back(
    process, keys, clock, lease, left, is_safe
):
    """When the command reaches Redis, the key may have another process's claim."""
    mine = process()
    assert mine.storage.claim_trial(lease)
    clock.now += lease - left
    mine.storage.release_trial()
    keys.lapses.clear()
    mine.makes_passes(2)
    assert (keys["trial"] is None) == is_safe


def test_a_process_without_a_claim_gives_none_back(process):
    mine = process()
    mine.storage.release_trial()
    assert mine.makes_passes() == REFRESH


@pytest.mark.parametrize("when", ["sent", "asked meanwhile"])
def test_a_call_that_waits_is_told_at_once_that_redis_is_away(process, when):
    """A call that waits for Redis may run the trial, as at the end of its patience."""
    mine = process()
    mine.courier.is_quick = False
    told, claims = [], []

    def ask():
        claims.append(
            stepwise.ask(mine.storage, hear=lambda: told.append(claims[0].granted))
        )

    if when == "sent":
        ask()
    else:
        mine.client.meanwhile = ask
    assert told == []
    mine.is_cut_off()
    assert told == [True]


def test_a_call_that_cannot_be_told_keeps_no_answer_from_others(process, said):
    """The event loop of the waiting call may be closed."""
    mine = process()
    mine.courier.is_quick = False

    def gone():
        raise RuntimeError("Event loop is closed")

    claims = [stepwise.ask(mine.storage, hear=gone), stepwise.ask(mine.storage)]
    mine.makes_passes()
    assert [claim.granted for claim in claims] == [True, False]
    assert said() == []


def test_a_trial_whose_claim_gets_no_answer_runs(due, waits, keys):
    """The trial runs after `patience` seconds, and a claim that Redis grants later is
    given back."""
    mine, _ = due()
    mine.courier.is_quick = False
    trial = trial_of(mine.breaker)
    assert waits == [0.25]
    ends(trial)
    mine.makes_passes(3)
    assert keys["trial"] is None


@pytest.mark.parametrize(
    ("silent_for", "expected"), [(0.0, [0.25]), (0.2, [0.25]), (0.25, [])]
)
def test_a_storage_does_not_wait_where_another_has_waited_in_vain(
    process, keys, clock, waits, silent_for, expected
):
    """Two hundred storages that wait would delay the start of their program by a
    minute."""
    mine = process()
    mine.courier.is_quick = False
    mine.courier.link.asked_at = clock.now
    clock.advance(silent_for)
    CircuitRedisStorage("closed", mine.client, "another", refresh=REFRESH)
    assert waits == expected


def test_the_patience_and_the_refresh_have_defaults():
    parameters = inspect.signature(CircuitRedisStorage).parameters
    assert parameters["patience"].default == 0.25
    assert parameters["refresh"].default == 1.0


# Redis that is away, slow, or odd.


@pytest.mark.parametrize(
    ("seconds", "is_back"), [(0.0, True), (8.0, True), (8.5, False), (13.0, False)]
)
def test_redis_is_back_when_it_answers_within_two_refreshes(
    process, clock, said, seconds, is_back
):
    mine = process()
    mine.is_cut_off()
    mine.client.seconds = seconds
    clock.now = 3.0
    mine.is_back()
    assert levels(said) == ["WARNING"] + ["INFO"] * is_back


def test_a_redis_that_refuses_to_write_stays_away(process, keys, said):
    """Redis answers reads, and there is nothing to write: the courier writes the
    circuit as a test. One record says that Redis is away."""
    mine = process()
    mine.client.refusal = redis.ReadOnlyError("READONLY you cannot write here")
    fail(mine.breaker)
    for _ in range(3):
        mine.makes_passes()
    assert levels(said) == ["WARNING"]
    assert keys["fail_counter"] is None
    assert mine.breaker.fail_counter == 1
    mine.client.refusal = None
    mine.makes_passes()
    assert levels(said) == ["WARNING", "INFO"]


def test_a_redis_that_refuses_to_read_is_away(process, keys, said):
    mine = process()
    does = keys.does
    loading = redis.ResponseError("LOADING the dataset is in memory soon")
    keys.does = lambda name, *rest: loading if name == "GET" else does(name, *rest)
    mine.makes_passes()
    assert levels(said) == ["WARNING"]
    keys.does = does
    mine.makes_passes()
    assert levels(said) == ["WARNING", "INFO"]


def test_a_redis_that_keeps_nothing_is_asked_three_times_and_is_away(
    process, keys, said
):
    mine = process()
    keys.texts.clear()
    keys.set = lambda *_: True
    passes = mine.client.passes
    assert mine.makes_passes() == REFRESH
    assert mine.client.passes == passes + 3
    assert levels(said) == ["WARNING"]
    assert "does not keep" in said()[0][1]


@pytest.mark.parametrize("state", ["closed", "half-open", "open"])
def test_a_process_writes_again_what_a_flush_deleted(process, keys, state):
    """The first exchange after the flush writes the state, the moment and the
    counts."""
    mine, theirs = process(), process(fail_max=10)
    fail(theirs.breaker, 2)
    theirs.makes_passes()
    theirs.storage.state = state
    theirs.storage.success_counter = 4
    theirs.makes_passes()
    if state == "open":
        theirs.breaker.open()
        theirs.makes_passes()
    before = dict(keys.texts)
    mine.makes_passes()
    keys.texts.clear()
    mine.makes_passes()
    assert keys.texts == before


def test_a_count_that_another_process_restores_first_stays(process, keys):
    mine = process(fail_max=10)
    fail(mine.breaker, 2)
    mine.makes_passes()
    keys.texts.clear()
    mine.client.meanwhile = lambda: keys.texts.update(fail_counter="9")
    mine.makes_passes()
    assert keys["fail_counter"] == "9"
    assert mine.breaker.fail_counter == 9


def test_a_process_that_was_away_sends_no_counts_to_an_empty_redis(process, keys):
    """Redis has restarted and is empty. Failures of the meantime stay in the
    process."""
    mine = process()
    mine.is_cut_off()
    fail(mine.breaker, 2)
    keys.texts.clear()
    mine.is_back()
    assert keys["fail_counter"] is None
    assert keys["state"] == "closed"
    assert mine.breaker.fail_counter == 0


def test_a_deleted_count_stays_deleted_whatever_else_is_mended(process, keys):
    mine = process()
    fail(mine.breaker, 2)
    mine.makes_passes()
    del keys["fail_counter"]
    keys.texts["opened_at"] = "yesterday"
    mine.makes_passes()
    assert keys["fail_counter"] is None
    assert mine.breaker.fail_counter == 0


def test_nonsense_for_a_moment_is_deleted_where_there_was_no_opening(process, keys):
    mine = process()
    keys.texts["opened_at"] = "yesterday"
    mine.makes_passes()
    assert keys["opened_at"] is None
    assert keys["state"] == "closed"


def test_a_good_moment_stays_where_only_the_state_was_lost(process, keys):
    mine = process()
    keys.texts["opened_at"] = "3"
    del keys["state"]
    mine.makes_passes()
    assert (keys["state"], keys["opened_at"]) == ("closed", "3")


def test_a_broken_moment_is_mended_where_the_circuit_is_open(process, keys):
    mine = process()
    mine.breaker.open()
    mine.makes_passes()
    keys.texts["opened_at"] = "yesterday"
    mine.makes_passes()
    assert (keys["state"], keys["opened_at"]) == ("open", "5")


def test_an_opening_while_an_exchange_fails_is_sent_with_its_moment(
    process, keys, clock
):
    """The opening is newer than the outbox of that exchange."""
    process = process()
    process.makes_passes()
    process.client.meanwhile = process.breaker.open
    process.is_cut_off()
    clock.advance(10)
    process.is_back()
    assert (keys["state"], keys["opened_at"]) == ("open", "5")


def test_a_claim_that_is_given_back_while_an_exchange_fails_is_not_lost(
    process, keys, clock
):
    """If the claim were lost, no process could run a trial before the claim lapsed."""
    mine = process()
    mine.breaker.half_open()
    trial = trial_of(mine.breaker)
    assert keys["trial"] is not None
    mine.courier.is_quick = False
    mine.client.meanwhile = lambda: ends(trial, GeneratorExit())
    mine.is_cut_off()
    assert keys["trial"] is not None
    mine.is_back()
    assert keys["trial"] is None


def test_a_move_that_has_arrived_is_not_sent_again_with_a_claim(due, keys):
    """Redis goes away when a claim is to be given back. Meanwhile another process has
    opened the circuit by hand."""
    mine, theirs = due()
    ends(trial_of(mine.breaker))

    def go_away():
        mine.client.trouble = redis.ConnectionError("gone")

    mine.client.meanwhile = go_away
    mine.makes_passes()
    assert keys["state"] == "closed"
    theirs.makes_passes()
    theirs.breaker.open()
    theirs.makes_passes()
    mine.is_back()
    assert mine.state == keys["state"] == "open"
    assert keys["trial"] is None


def test_a_process_that_was_away_sends_no_count_to_a_redis_with_nonsense(process, keys):
    """Redis was away, and each process counted alone."""
    process = process()
    process.is_cut_off()
    fail(process.breaker, 2)
    keys.texts.clear()
    keys.texts["state"] = "nonsense"
    process.is_back()
    assert keys["state"] == "closed"
    assert keys["fail_counter"] in (None, "0")
    assert process.breaker.fail_counter == 0


@pytest.mark.parametrize("nonsense", [["a", "list"], "10.5", "-1", str(10**20)])
def test_a_broken_count_is_set_to_what_the_process_knows(process, keys, nonsense, said):
    """The count includes the failure that Redis could not add."""
    mine = process(fail_max=10)
    fail(mine.breaker, 2)
    mine.makes_passes()
    keys.texts["fail_counter"] = nonsense
    fail(mine.breaker)
    mine.makes_passes()
    if nonsense == "-1":  # a number, to which Redis could add one
        assert keys["fail_counter"] == "0"
    else:
        assert keys["fail_counter"] == "3"
        assert mine.breaker.fail_counter == 3
        assert levels(said) == ["WARNING"]


@pytest.mark.parametrize("count", ["-1", "-2"])
def test_a_count_is_never_below_zero(process, keys, said, count):
    mine = process()
    fail(mine.breaker, 2)
    mine.makes_passes()
    keys.texts["fail_counter"] = count
    mine.makes_passes()
    assert keys["fail_counter"] == "2"
    assert levels(said) == ["WARNING"]


@pytest.mark.parametrize("opened_at", ["5", "6", "1000000"])
def test_no_opening_lies_in_the_future(process, keys, opened_at):
    mine = process()
    keys.texts.update(state="open", opened_at=opened_at)
    mine.makes_passes()
    assert mine.storage.open_for() == 0


def test_an_opening_without_a_moment_may_be_written_again(process, keys, said):
    """Other software may write the state alone. Then a trial is due."""
    mine = process()
    keys.texts["state"] = "open"
    mine.makes_passes()
    assert mine.breaker.retry_after == 0
    mine.storage.state = "open"
    mine.makes_passes()
    assert keys["opened_at"] is None
    assert said() == []


def test_a_claim_that_is_no_text_is_deleted(due, keys, clock, said):
    mine, _ = due()
    keys.texts["trial"] = ["a", "list"]
    assert is_refused(mine.breaker)
    assert keys["trial"] is None
    assert levels(said) == ["WARNING"]
    clock.advance(0.11)
    assert not is_refused(mine.breaker)


def test_redis_is_asked_for_its_time_once_for_a_new_opening(process, keys, clock):
    mine, theirs = process(), process()
    theirs.makes_passes(3)
    theirs.breaker.half_open()
    theirs.makes_passes()
    mine.makes_passes()
    assert mine.client.times == 0
    theirs.breaker.open()
    theirs.makes_passes()
    clock.advance(2)
    mine.makes_passes(3)
    assert mine.client.times == 1
    assert mine.storage.open_for() == 2


def test_the_clock_of_redis_has_microseconds(process, clock):
    mine = process()
    clock.now = 12.5
    assert mine.courier.link.time() == 12.5


# All together.


class AnyFleet(RuleBasedStateMachine):
    """Three processes that make any steps in any order, over a Redis with any faults.
    In the end all agree."""

    who = st.integers(0, 2)
    states = st.sampled_from(["closed", "half-open", "open"])
    actions = st.sampled_from(["fails", "succeeds", "opens", "closes", "half-opens"])

    def __init__(self, process, keys):
        super().__init__()
        keys.texts.clear()
        keys.lapses.clear()
        self.keys = keys
        self.processes = [
            process(success_threshold=2, reset_timeout=20) for _ in range(3)
        ]
        self.trials = []

    def act(self, process, action):
        breaker = process.breaker
        if action == "fails":
            fail(breaker)
        elif action == "succeeds":
            with contextlib.suppress(CircuitBreakerError):
                breaker.call(int)
        else:
            by_hand = {"opens": "open", "closes": "close", "half-opens": "half_open"}
            getattr(breaker, by_hand[action])()

    @rule(who=who, action=actions)
    def acts(self, who, action):
        self.act(self.processes[who], action)

    @rule(who=who, times=st.integers(1, 3))
    def fails(self, who, times):
        fail(self.processes[who].breaker, times)

    @rule(who=who)
    def begins(self, who):
        with contextlib.suppress(CircuitBreakerError):
            self.trials.append(trial_of(self.processes[who].breaker))

    @precondition(lambda self: self.trials)
    @rule(exc=st.sampled_from([None, Boom(), GeneratorExit()]))
    def ends(self, exc):
        ends(self.trials.pop(0), exc)

    @rule(who=who, count=st.integers(0, 3))
    def counts(self, who, count):
        self.processes[who].breaker.fail_counter = count

    @rule(who=who, times=st.integers(1, 3))
    def makes_passes(self, who, times):
        self.processes[who].makes_passes(times)

    @rule(who=who, action=actions)
    def is_busy_meanwhile(self, who, action):
        process = self.processes[who]
        process.client.meanwhile = lambda: self.act(process, action)

    @rule(seconds=st.sampled_from([0.1, 1, REFRESH, 20]))
    def time_passes(self, seconds):
        self.keys.clock.advance(seconds)

    @rule(who=who, trouble=st.sampled_from([None, redis.ConnectionError("gone")]))
    def is_cut_off(self, who, trouble):
        self.processes[who].client.trouble = trouble

    @rule(who=who, refusal=st.sampled_from([None, redis.ReadOnlyError("READONLY")]))
    def is_refused(self, who, refusal):
        self.processes[who].client.refusal = refusal

    @rule()
    def redis_starts_anew(self):
        self.keys.texts.clear()

    @rule(
        key=st.sampled_from(
            ["state", "opened_at", "fail_counter", "success_counter", "trial"]
        ),
        text=st.sampled_from(["closed", "half-open", "open", "2", "", ["list"]]),
    )
    def other_software_writes(self, key, text):
        self.keys.remove(key)
        self.keys.texts[key] = text

    def teardown(self):
        for trial in self.trials:
            ends(trial)
        agree(self.processes)


def test_all_processes_of_a_fleet_agree_in_the_end(process, keys):
    """The steps of the processes and the faults of Redis make no difference."""
    run_state_machine_as_test(
        functools.partial(AnyFleet, process, keys),
        settings=settings(
            max_examples=2000 if DEEP else 50 if BRIEF else 200,
            stateful_step_count=15,
            deadline=None,
            database=None,
            derandomize=not DEEP,
            suppress_health_check=list(HealthCheck),
        ),
    )


# Threads, forks, and the end of the program.


class Member:
    """A storage as a courier sees the storage, and a list of the calls to it."""

    _patience = 0.25

    def __init__(self, refresh=REFRESH):
        self.heard = []
        self._refresh = refresh
        self._note_redis_away = self.heard.append
        self._due_at = lambda: math.inf


@pytest.fixture
def courier(clock, alone):
    """The library's courier with one member. The threads are not started, and the test
    says what a pass does."""
    client = Client(Redis(clock))
    courier = stepwise.OpenCourier(client)
    courier.member = Member()
    courier.add(courier.member)
    courier.heard = []
    courier.make_pass = lambda: courier.heard.append("pass") or 3600.0
    courier.link.close = lambda: courier.heard.append("close")
    return courier


def test_a_courier_that_has_a_signal_is_given_no_other(courier):
    """A million calls that fail leave one signal."""
    for _ in range(3):
        courier.wake(courier.member)
    assert courier.signals.qsize() == 1


def test_a_courier_that_is_started_twice_starts_its_threads_once(courier, monkeypatch):
    started = []

    class Thread:
        def __init__(self, target, args, name, daemon):
            assert daemon
            self.name = name

        def start(self):
            started.append(self.name)

    stepwise.replace(monkeypatch, "threading", Thread=Thread)
    courier.start()
    courier.start()
    assert sorted(started) == ["pybreaker courier", "pybreaker courier's watch"]


@pytest.mark.parametrize("number", [0, 1])
def test_a_courier_that_can_have_no_thread_is_started_by_the_next_storage(
    courier, monkeypatch, number
):
    """The system may refuse a thread for a while, or refuse the second thread. Then the
    first thread ends."""
    started = []

    class NoThread(threading.Thread):
        def start(self):
            if len(started) == number:
                raise RuntimeError("can't start new thread")
            started.append(self)
            super().start()

    with monkeypatch.context() as patch:
        stepwise.replace(patch, "threading", Thread=NoThread)
        with pytest.raises(RuntimeError):
            courier.start()
    courier.wait(time.monotonic() + PATIENCE)
    assert not any(thread.is_alive() for thread in started)
    assert courier.over.is_set()
    courier.start()
    assert not courier.over.is_set()
    courier.stop()
    courier.wait(time.monotonic() + PATIENCE)


class Gate:
    """A lock that tells whether it is held."""

    def __init__(self):
        self.is_held = False
        self.passed = 0

    def __enter__(self):
        self.is_held = True

    def __exit__(self, *exc_info):
        self.is_held = False
        self.passed += 1


def test_a_courier_announces_its_end_with_the_gate_held(courier, monkeypatch):
    """A storage that needs a courier in the meantime starts another one."""
    gate, over = stepwise.set_gate(monkeypatch, Gate()), threading.Event()
    courier.stop()
    courier.carry(over)
    assert gate.passed == 1
    assert over.is_set()
    assert courier.heard == ["close"]


def test_a_courier_closes_its_connection_at_its_end(courier):
    def make_pass():
        courier.heard.append("pass")
        courier.stop()
        return 3600.0

    courier.make_pass = make_pass
    courier.carry(threading.Event())
    assert courier.heard == ["pass", "close"]


def test_a_courier_makes_a_pass_at_once_and_one_after_each_delay(courier):
    waited = []

    def get(block, timeout):
        waited.append((block, timeout))
        if len(waited) == 3:
            courier.is_stopping = True
        raise queue.Empty

    delays = iter([7.0, 0.0, 8.0])
    courier.signals = types.SimpleNamespace(get=get)
    courier.make_pass = lambda: next(delays)
    courier.carry(threading.Event())
    # In Python 3.9, get() with a timeout of 0 may block for ever.
    assert waited == [(True, 7.0), (False, None), (True, 8.0)]


def test_a_courier_that_begins_again_does_not_wait_until_its_connection_is_closed(
    courier, monkeypatch
):
    """The thread that ends closes its own connection, and the next thread has
    another."""
    monkeypatch.setattr(threading.Thread, "start", lambda self: None)
    closed = []
    courier.link.close = lambda: [courier.start(), closed.append(courier.link)]
    link = courier.link
    courier.stop()
    courier.carry(threading.Event())
    assert closed[0] is not link
    assert courier.link.client is link.client


def test_a_courier_that_is_started_before_it_has_stopped_goes_on(courier):
    courier.is_stopping = True
    courier.over.clear()
    courier.start()
    assert not courier.is_stopping
    assert courier.threads == []


def test_a_courier_that_is_woken_during_its_pass_makes_another(courier):
    def make_pass():
        courier.heard.append("pass")
        courier.wake(courier.member) if len(courier.heard) == 1 else courier.stop()
        return 3600.0

    courier.make_pass = make_pass
    thread = threading.Thread(
        target=courier.carry, args=(threading.Event(),), daemon=True
    )
    thread.start()
    thread.join(PATIENCE)
    assert courier.heard == ["pass", "pass", "close"]


def test_a_courier_ends_at_once_when_its_last_storage_is_gone(courier):
    """The courier ends in the middle of its idle time, and not when its first storage
    is gone."""
    asleep, over = threading.Semaphore(0), threading.Event()
    courier.make_pass = lambda: asleep.release() or 3600.0
    other = Member()
    courier.add(other)
    thread = threading.Thread(target=courier.carry, args=(over,), daemon=True)
    thread.start()
    assert asleep.acquire(timeout=PATIENCE)
    del other
    gc.collect()
    assert asleep.acquire(timeout=PATIENCE)
    assert not over.is_set()
    del courier.member
    gc.collect()
    assert over.wait(PATIENCE)
    thread.join(PATIENCE)


@pytest.mark.parametrize(
    ("asked_at", "now", "said"),
    [
        (None, 100.0, []),
        (3.0, 3.0, []),
        (3.0, 11.0, []),
        (3.0, 11.5, ["no answer for 8.5 s"]),
        (3.0, 14.0, ["no answer for 11.0 s"]),
        (3.0, 19.5, ["no answer for 16.5 s"]),
    ],
)
def test_redis_is_silent_after_two_refreshes_without_an_answer(
    courier, clock, asked_at, now, said
):
    """The watch looks twice in each refresh, and tells all storages."""
    periods, other = [], Member(refresh=2 * REFRESH)
    courier.add(other)

    def wait(period):
        periods.append(period)
        return len(periods) == 3

    courier.link.asked_at, clock.now = asked_at, now
    courier.watch(types.SimpleNamespace(wait=wait))
    assert periods == [0.0, REFRESH / 2, REFRESH / 2]
    assert courier.member.heard == other.heard == said * 2


def test_a_watch_keeps_no_storage_alive(courier, clock):
    """The watch holds no storage while waiting, even after a look that found Redis
    silent."""
    gone = weakref.ref(courier.member)
    rounds = iter([False, True])

    def wait(period):
        if period:
            del courier.member
            gc.collect()
            assert gone() is None
        return next(rounds)

    courier.link.asked_at, clock.now = 3.0, 100.0
    courier.watch(types.SimpleNamespace(wait=wait))
    assert gone() is None


def test_an_answer_may_come_while_the_watch_looks_for_silence(courier, clock):
    """In that case Redis is not silent."""
    asked = [3.0, None, None]
    rounds = iter([False, False, True])
    link = type("Link", (stepwise.OpenLink,), {})
    courier.link = link(courier.link.client)
    link.asked_at = property(lambda _: asked.pop(0))
    clock.now = 4.0
    courier.watch(types.SimpleNamespace(wait=lambda period: next(rounds)))
    assert courier.member.heard == []
    assert asked == [None]


def test_a_question_to_redis_ends_with_its_answer(process):
    """Between two passes Redis is not silent."""
    mine = process()
    assert mine.courier.link.asked_at is None
    asked = []
    mine.client.meanwhile = lambda: asked.append(mine.courier.link.asked_at)
    mine.makes_passes()
    assert asked == [5.0]
    assert mine.courier.link.asked_at is None
    mine.is_cut_off()
    assert mine.courier.link.asked_at is None


@pytest.mark.parametrize("say", ["fails", "trips", "opens"])
def test_a_collected_storage_sends_its_outbox_first(process, keys, clock, say):
    """The courier drops the storage after the exchange, also while Redis is away."""
    mine = process()
    courier, client, breaker = mine.courier, mine.client, mine.breaker
    gone = weakref.ref(mine.storage)
    if say == "opens":
        breaker.open()
    else:
        fail(breaker, 3 if say == "trips" else 1)
    del mine, breaker
    gc.collect()
    courier.go()
    clock.advance(REFRESH)
    if say == "trips":
        courier.go()
        courier.go()
    assert keys["state"] == ("closed" if say == "fails" else "open")
    assert keys["fail_counter"] == {"fails": "1", "trips": "3"}.get(say)
    gc.collect()
    assert gone() is None
    assert client.sent


def test_a_storage_is_not_kept_for_a_redis_that_is_away(process):
    """Redis might never come back."""
    mine = process()
    courier, gone = mine.courier, weakref.ref(mine.storage)
    mine.is_cut_off()
    mine.breaker.open()
    mine.makes_passes()
    mine.client.trouble = None  # its traceback refers to the storage
    del mine
    gc.collect()
    assert gone() is None
    assert courier.storages() == []


def test_a_wait_for_a_couriers_end_joins_its_threads(courier, clock, slept):
    """The waiting thread joins one after the other, and waits no longer than the given
    end."""
    timeouts = []

    def join(timeout):
        timeouts.append(timeout)
        clock.advance(2.0)

    courier.threads = [types.SimpleNamespace(join=join, native_id=-1)] * 3
    courier.wait(clock.now + 3.0)
    assert timeouts == [3.0, 1.0, 0.0]
    assert slept == []


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="needs Linux")
def test_a_wait_for_a_couriers_end_lasts_while_the_system_lists_a_thread(
    courier, clock, slept
):
    """Python warns of a fork while the system still lists another thread."""
    me = types.SimpleNamespace(
        join=lambda timeout: None, native_id=threading.get_native_id()
    )
    courier.threads = [me]
    courier.wait(clock.now + 3.0)
    assert slept == [0.0001] * 3


def test_a_wait_for_a_couriers_end_is_over_when_no_thread_is_listed(
    courier, clock, slept
):
    """The system does not list the thread any more."""
    courier.threads = [types.SimpleNamespace(join=lambda timeout: None, native_id=-1)]
    courier.wait(clock.now + 3.0)
    assert slept == []


def test_a_fork_waits_for_all_couriers_and_for_its_patience_once(process, clock):
    """All couriers are told to stop before the fork waits for one of them."""
    processes = [process(), process()]
    told = []

    def wait(end):
        told.append(("wait", end))
        clock.now = end  # the wait lasted until its end

    for each in processes:
        each.courier.done = told
        each.courier.wait = wait
    clock.now = 1000.5
    stepwise.before_fork()
    assert told == ["stop", "stop", ("wait", 1000.75), ("wait", 1000.75)]
    stepwise.after_fork_in_parent()
    assert told[4:] == ["start", "start"]


def test_a_child_begins_with_an_outbox_of_its_own(process, waits, monkeypatch):
    """The child has nothing of its parent's, whatever the parent was doing."""
    mine = process()
    storage, courier = mine.storage, mine.courier
    courier.is_quick = False
    held, over = threading.Event(), threading.Event()

    def another_thread():
        with stepwise.mutex_of(storage), stepwise.gate():
            held.set()
            over.wait(PATIENCE)

    stepwise.set_gate(monkeypatch, threading.RLock())
    mine.breaker.half_open()
    trial_of(mine.breaker)
    mine.breaker.open()
    fail(mine.breaker)
    stepwise.give_back(storage, stepwise.ask(storage))
    thread = threading.Thread(target=another_thread)
    thread.start()
    assert held.wait(PATIENCE)
    stepwise.after_fork_in_child()
    over.set()
    thread.join(PATIENCE)
    assert not stepwise.outbox(storage)
    new = stepwise.courier_of(storage)
    assert new is not courier
    assert new.link is not courier.link
    assert new.link.client is mine.client
    assert new.done == ["start"]
    assert "start" not in courier.done[1:]  # the process itself made the first start
    assert stepwise.couriers() == [new]
    new.is_quick = False
    storage.release_trial()  # gives nothing back: the claim is the parent's
    waits.clear()
    stepwise.at_exit()
    assert waits == []


def test_a_child_that_ends_announces_no_trip_of_its_parent(process, keys, monkeypatch):
    """The parent lives to read whether the count stands. Until the fleet moves, the
    child has the circuit of its parent."""
    stepwise.set_gate(monkeypatch, threading.RLock())
    mine, theirs = process(), process()
    fail(mine.breaker, 3)
    mine.makes_passes()
    stepwise.after_fork_in_child()
    stepwise.at_exit()
    assert (mine.state, keys["state"]) == ("open", "closed")
    theirs.breaker.close()
    for each in theirs, mine:
        stepwise.courier_of(each.storage).go()
    assert mine.state == "open"
    for move in theirs.breaker.open, theirs.breaker.close:
        move()
        for each in theirs, mine:
            stepwise.courier_of(each.storage).go()
    assert mine.state == "closed"


def test_an_opening_that_was_half_taken_in_is_taken_in_again(process, monkeypatch):
    """A fork in the middle of an exchange gives such a storage to the child, where the
    courier's thread does not go on."""
    mine, theirs = process(), process()
    theirs.breaker.open(9, "maintenance")
    theirs.makes_passes()
    with monkeypatch.context() as patch:
        stepwise.let_openings_fail(patch)
        mine.makes_passes()
    assert mine.state == "closed"
    mine.makes_passes()
    assert mine.state == "open"
    assert known(mine) == ("open", "maintenance", 9, 0)


def test_a_child_does_not_wait_for_a_lock_that_its_parent_held(process, monkeypatch):
    """In the child no thread would release the lock."""
    mine = process()
    mutex, gate = threading.Lock(), threading.Lock()
    mutex.acquire()
    gate.acquire()
    stepwise.set_gate(monkeypatch, gate)
    stepwise.set_mutex(mine.storage, mutex)
    stepwise.after_fork_in_child()
    fail(mine.breaker)
    process()
    assert mine.breaker.fail_counter == 1


def test_a_process_that_ends_waits_for_what_is_to_be_sent(process, waits):
    """The process waits for all storages together no longer than the patience."""
    idle, busy, under_way = process(), process(), process()
    for each in (idle, busy, under_way):
        each.courier.is_quick = False
    fail(busy.breaker)
    stepwise.at_exit()
    assert waits == [0.25]
    waits.clear()
    under_way.client.meanwhile = stepwise.at_exit
    under_way.makes_passes()
    assert waits == [0.25, 0.25]
    waits.clear()
    busy.makes_passes()
    under_way.makes_passes()
    stepwise.at_exit()
    assert waits == []


def test_a_process_that_ends_waits_once_for_all_silent_storages(process, waits, clock):
    """The time that one storage has used is not there for the next storage."""
    process.kept = [process(), process(), process()]
    waits.clear()
    for each in process.kept:
        each.courier.is_quick = False
        each.courier.wake = lambda storage: clock.advance(0.1)
        fail(each.breaker)
    clock.now = 1000.0
    stepwise.at_exit()
    assert waits == [0.0, 0.0, 0.0]


def test_at_the_end_a_trip_that_redis_has_not_confirmed_is_announced(process, keys):
    """Otherwise the next process of its kind would make the same failing call, and so
    on."""
    mine = process()
    fail(mine.breaker, 3)
    mine.makes_passes()
    assert keys["state"] == "closed"
    stepwise.at_exit()
    assert (keys["state"], keys["opened_at"]) == ("open", "5")


# Clients, and waiting calls.


def test_an_asyncio_client_without_a_pool_is_refused_at_once(alone):
    """An asyncio client of a cluster has no pool, so the courier cannot make
    connections like the client's."""

    class Cluster:
        async def __aenter__(self):
            return self

        async def execute_command(self):
            raise AssertionError

        def pipeline(self):
            raise AssertionError

        time = pipeline

    with pytest.raises(TypeError, match="redis_object"):
        CircuitRedisStorage("closed", Cluster())
    assert stepwise.couriers() == []


@pytest.mark.parametrize("name", ["refresh", "patience"])
@pytest.mark.parametrize("value", [0, -1, 0.0, float("inf"), float("nan"), -math.inf])
def test_refresh_and_patience_are_finite_and_above_zero(process, name, value):
    with pytest.raises(ValueError, match=name):
        process(**{name: value})


def test_a_client_that_is_a_context_manager_for_coroutines_may_be_none_for_asyncio(
    process, keys
):
    """A client is for asyncio if its commands are coroutine functions."""

    class Mixed(Client):
        async def __aenter__(self):
            raise AssertionError("nobody does that")

    client = Mixed(keys)
    storage = CircuitRedisStorage("closed", client, refresh=REFRESH)
    storage.increment_counter()
    stepwise.courier_of(storage).go()
    assert keys["fail_counter"] == "1"


class Pool:
    """The pool of an asyncio client, which remembers the arguments of its
    connections."""

    def __init__(self, connection_class, **connection_kwargs):
        self.connection_class = connection_class
        self.connection_kwargs = connection_kwargs
        self.heard = connection_kwargs.get("heard")

    async def disconnect(self):
        self.heard.append("disconnect")


class AsyncClient:
    """An asyncio client over a plain client."""

    def __init__(self, connection_pool):
        self.connection_pool = connection_pool
        self.client = connection_pool.connection_kwargs["client"]
        self.heard = connection_pool.heard
        self.heard.append("made")
        # A Python that looks for the loop when a lock is made must find this loop.
        self.lock = asyncio.Lock()

    async def __aenter__(self):
        raise AssertionError("nobody does that")

    async def execute_command(self):
        raise AssertionError("commands are sent together")

    async def time(self):
        return self.client.time()

    def pipeline(self, transaction):
        pipe = self.client.pipeline(transaction)
        execute = pipe.execute

        async def execute_in_turn(raise_on_error):
            async with self.lock:
                await asyncio.sleep(0)
            return execute(raise_on_error)

        pipe.execute = execute_in_turn
        return pipe

    async def aclose(self):
        self.heard.append("aclose")


class OldAsyncClient(AsyncClient):
    """A client whose method for closing has the older name."""

    aclose = property()

    async def close(self):
        self.heard.append("close")


async def made(kind, pool):
    """Make the client in a coroutine, as Python 3.9 requires."""
    return kind(pool)


@pytest.mark.parametrize("kind", [AsyncClient, OldAsyncClient])
def test_an_asyncio_client_is_asked_in_a_loop_of_the_couriers(process, keys, kind):
    """The courier makes a client of its own with connections of the same kind, and
    closes the client and the loop. This works also in the courier's thread, which has
    no loop."""
    heard = []
    pool = Pool(dict, client=Client(keys), heard=heard)
    link = stepwise.OpenLink(asyncio.run(made(kind, pool)))
    found = []

    def ask():
        found.append(link.run([("SET", "state", "open"), ("GET", "state")]))
        found.append(link.time())
        found.append(link.own)

    for _ in range(2):
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join(PATIENCE)
    assert found[:2] == found[3:5] == [[True, "open"], 5.0]
    own = found[2]
    assert found[5] is own
    assert own is not link.client
    assert type(own) is kind
    assert own.connection_pool is not pool
    assert own.connection_pool.connection_class is dict
    assert own.connection_pool.connection_kwargs == pool.connection_kwargs
    assert heard == ["made", "made"]
    loop = link.loop
    link.close()
    link.close()
    close = "aclose" if kind is AsyncClient else "close"
    assert heard == ["made", "made", close, "disconnect"]
    assert loop.is_closed()
    assert link.client.lock is not own.lock


def test_a_connection_that_was_lost_is_closed_all_the_same(keys, caplog):
    """A debug record tells of the error."""
    caplog.set_level(logging.DEBUG, "pybreaker")
    pool = Pool(dict, client=Client(keys), heard=[])
    link = stepwise.OpenLink(asyncio.run(made(AsyncClient, pool)))
    link.run([("GET", "state")])
    loop, link.own.aclose = link.loop, boom
    link.close()
    assert loop.is_closed()
    (record,) = caplog.records
    assert record.levelname == "DEBUG"
    assert record.getMessage() == "the connection to Redis was lost: Boom()"


def test_a_pool_that_cannot_be_made_leaves_no_loop(keys, monkeypatch):
    """The courier tries to make the pool again in each pass."""
    loops = []

    class Impossible(Pool):
        def __init__(self, *args, **options):
            if hasattr(Impossible, "first"):
                loops.append(asyncio.get_event_loop())
                raise TypeError("no such option")
            super().__init__(*args, **options)
            Impossible.first = self

    pool = Impossible(dict, client=Client(keys), heard=[])
    link = stepwise.OpenLink(asyncio.run(made(AsyncClient, pool)))
    for _ in range(2):
        with pytest.raises(TypeError, match="no such option"):
            link.run([("GET", "state")])
    link.close()
    assert [loop.is_closed() for loop in loops] == [True, True]
    asyncio.set_event_loop(None)


def test_the_clock_of_a_cluster_is_that_of_one_of_its_nodes(process):
    """Each node answers with its time."""
    mine = process()
    mine.client.time = lambda: {"a": (12, 500_000), "b": (99, 0)}
    assert mine.courier.link.time() == 12.5


def test_nothing_is_left_in_a_loop_that_has_waited():
    """The loop keeps no timer, not even until the patience is over."""
    timers = []

    async def main():
        loop = asyncio.get_running_loop()
        call_later = loop.call_later
        loop.call_later = lambda *args: timers.append(call_later(*args)) or timers[-1]
        wait, hear = stepwise.waiter(PATIENCE)
        hear()
        await wait()

    asyncio.run(main())
    (timer,) = timers
    assert timer.cancelled()


def test_an_answer_that_comes_twice_is_heard_once():
    """One answer comes at the end of the patience, and one when Redis has answered."""
    complaints = []

    async def main():
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: complaints.append(context))
        wait, hear = stepwise.waiter(0.001)
        hear()
        hear()
        await wait()
        hear()
        await asyncio.sleep(0.01)

    asyncio.run(main())
    assert complaints == []


def test_a_coroutine_on_no_event_loop_waits_for_its_answer(monkeypatch):
    """The coroutine waits as long as a plain call would."""
    wait, hear = stepwise.waiter(30.0)
    timer = threading.Timer(0.05, hear)
    began = time.monotonic()
    timer.start()
    with contextlib.suppress(StopIteration):
        wait().send(None)
    assert 0.05 <= time.monotonic() - began < 25


def test_no_trio_loop_stalls_while_a_trial_is_asked_for():
    """Another task runs meanwhile, and that task brings the answer."""
    order = []

    async def main():
        wait, hear = stepwise.waiter(30.0)
        async with trio.open_nursery() as nursery:

            async def other():
                order.append("another task")
                hear()

            nursery.start_soon(other)
            with trio.fail_after(20):
                await wait()
            order.append("the answer")

    trio.run(main)
    assert order == ["another task", "the answer"]


def test_a_task_of_trio_waits_no_longer_than_its_patience():
    async def main():
        wait, _ = stepwise.waiter(0.01)
        with trio.fail_after(20):
            await wait()

    trio.run(main)
