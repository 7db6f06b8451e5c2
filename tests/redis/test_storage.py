"""A circuit that is shared through Redis, seen from one process: what the storage
writes and reads, and what calls wait for. Each breaker stands for a process."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import math
import os
import re
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from datetime import datetime, timedelta, timezone

import fleet
import pytest
import redis
import stepwise
import trio
from fleet import never
from support import PATIENCE, Boom, boom, fail, until

import pybreaker
import pybreaker_extras.redis
from pybreaker import CircuitBreaker, CircuitBreakerError, CircuitRedisStorage

pytestmark = pytest.mark.usefixtures("unhurried")

KEYS = {"state", "fail_counter", "success_counter", "opened_at", "opening", "trial"}


def succeeds(breaker):
    """Whether a call is admitted."""
    try:
        breaker.call(int)
    except CircuitBreakerError:
        return False
    return True


def is_due(breaker):
    return breaker.current_state == "open" and breaker.retry_after == 0.0


@pytest.fixture
def storage_of(server, namespace, closing):
    """A function that makes storages that share a circuit, each with a client of its
    own."""
    storages = weakref.WeakSet()

    def make(refresh=0.1, patience=PATIENCE, port=server.port, **settings):
        client = closing(redis.Redis(port=port))
        state = settings.pop("state", "closed")
        settings.setdefault("namespace", namespace)
        storage = CircuitRedisStorage(
            state, client, refresh=refresh, patience=patience, **settings
        )
        storages.add(storage)
        return storage

    yield make
    server.resume()
    # A storage that a test has left would write its keys anew in the next test.
    with contextlib.suppress(AssertionError):
        until(lambda: gc.collect() is not None and not storages, patience=2)


@pytest.fixture
def breaker_of(storage_of):
    """A function that makes breakers over storages of `storage_of`."""

    def make(fail_max=3, reset_timeout=60, success_threshold=1, **settings):
        return CircuitBreaker(
            fail_max,
            reset_timeout,
            success_threshold=success_threshold,
            state_storage=storage_of(**settings),
        )

    return make


@pytest.fixture
def key(server, namespace):
    """The value of a key of the circuit."""
    return lambda name: server.key(namespace, name)


@pytest.fixture
def write(server, namespace):
    """A function that writes keys of the circuit, as another process would."""

    def write(**values):
        for name, value in values.items():
            server.client.set(f"{namespace}:pybreaker:{name}", value)

    return write


def server_time(server):
    seconds, microseconds = server.client.time()
    return seconds + microseconds / 1e6


def requests_of(proxy, idle=0.2):
    """The number of requests through a proxy, once no more come."""
    deadline = time.monotonic()
    seen = -1
    while seen != proxy.requests or time.monotonic() < deadline:
        if seen != proxy.requests:
            seen, deadline = proxy.requests, time.monotonic() + idle
        time.sleep(0.01)
    return seen


@contextlib.contextmanager
def trial_in(breaker):
    """A context manager: a call runs while the block runs. The call succeeds, or raises
    the exception that the block puts into the list."""
    running, leave, raises, outcomes = threading.Event(), threading.Event(), [], []

    def work():
        running.set()
        assert leave.wait(PATIENCE)
        if raises:
            raise raises[0]

    def call():
        try:
            outcomes.append(breaker.call(work))
        except BaseException as exc:
            outcomes.append(exc)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    try:
        until(lambda: running.is_set() or outcomes)
        assert not outcomes, outcomes
        yield raises
    finally:
        leave.set()
        thread.join(PATIENCE)


# Making one


def test_settings_that_are_new_are_given_by_name(server, closing):
    """The other settings can be given by position, as in 1.4.1."""
    client = closing(redis.Redis(port=server.port))
    with pytest.raises(TypeError):
        CircuitRedisStorage("closed", client, None, "closed", False, 1.0)
    CircuitRedisStorage("closed", client, None, "closed", False)
    CircuitRedisStorage(
        state="closed",
        redis_object=client,
        namespace="x",
        fallback_circuit_state="open",
        cluster_mode=True,
        refresh=1,
        patience=0.25,
    )


@pytest.mark.parametrize("state", ["opened", None, ""])
def test_a_state_must_be_one_of_the_three(server, state):
    client = redis.Redis(port=server.port)
    with pytest.raises(ValueError, match="state must be"):
        CircuitRedisStorage(state, client)
    with pytest.raises(ValueError, match="fallback_circuit_state must be"):
        CircuitRedisStorage("closed", client, fallback_circuit_state=state)


@pytest.mark.parametrize("name", ["refresh", "patience"])
def test_a_time_that_is_no_number_of_seconds_is_refused(server, name):
    """An error names the parameter and the value."""
    client = redis.Redis(port=server.port)
    for value in (-1, math.nan):
        with pytest.raises(ValueError, match=name):
            CircuitRedisStorage("closed", client, **{name: value})
    with pytest.raises(TypeError, match=name):
        CircuitRedisStorage("closed", client, **{name: "1"})


def test_the_first_process_writes_the_state_that_it_was_given(storage_of, key):
    """Redis is empty."""
    storage = storage_of(state="open")
    assert storage.state == "open"
    assert until(lambda: key("state")) == "open"


@pytest.mark.parametrize("state", ["closed", "open", "half-open"])
def test_a_new_process_starts_where_the_fleet_is(storage_of, write, key, state):
    """The given state is only for an empty Redis."""
    write(state=state, fail_counter=2, success_counter=1, opened_at=int(time.time()))
    storage = storage_of(refresh=60, state="closed" if state == "open" else "open")
    assert storage.state == state
    assert storage.counter == 2
    assert storage.success_counter == 1
    assert key("state") == state


@pytest.mark.parametrize("fallback", ["closed", "open", "half-open"])
def test_a_process_that_finds_no_redis_starts_where_it_was_told(fallback, storage_of):
    """The constructor raises nothing and does not wait."""
    began = time.monotonic()
    storage = storage_of(port=fleet.free_port(), fallback_circuit_state=fallback)
    assert time.monotonic() - began < PATIENCE / 2
    assert storage.state == fallback


def test_a_process_waits_for_the_first_answer_until_its_patience_ends(
    server, storage_of
):
    """The patience here is longer than a Redis that is there takes, and shorter than a
    Redis that is away takes."""
    began = time.monotonic()
    assert storage_of(patience=PATIENCE).state == "closed"
    assert time.monotonic() - began < PATIENCE / 2
    server.pause()
    began = time.monotonic()
    assert storage_of(patience=0.3, fallback_circuit_state="open").state == "open"
    assert 0.25 < time.monotonic() - began < PATIENCE / 2
    server.resume()


def test_a_fallback_is_not_announced(proxies, server, storage_of, write, key):
    """A process that later reaches Redis follows the state in Redis."""
    write(state="closed")
    proxy = proxies(server)
    proxy.cut()
    storage = storage_of(port=proxy.port, fallback_circuit_state="open")
    assert storage.state == "open"
    proxy.heal()
    until(lambda: storage.state == "closed")
    assert key("state") == "closed"


# What is written


def test_keys_are_those_of_the_original(server, namespace, breaker_of, key):
    """The key ``trial`` is new. All values are strings that older releases
    understand."""
    breaker = breaker_of(fail_max=2, reset_timeout=0.05, success_threshold=2)
    fail(breaker, 2)
    until(lambda: key("state") == "open")
    until(lambda: is_due(breaker))
    fail(breaker)
    breaker.half_open()
    until(lambda: succeeds(breaker))
    until(lambda: key("success_counter") == "1")
    keys = server.client.keys(f"{namespace}*")
    assert {key.rpartition(":")[0] for key in keys} == {f"{namespace}:pybreaker"}
    assert (
        KEYS - {"trial", "opening"} <= {key.rpartition(":")[2] for key in keys} <= KEYS
    )
    assert key("state") in ("closed", "open", "half-open")
    for name in ("fail_counter", "success_counter", "opened_at"):
        assert re.fullmatch(r"\d+", key(name)), name


@pytest.mark.parametrize("nothing", [None, ""])
def test_keys_of_a_circuit_without_a_namespace_have_no_prefix(
    server, storage_of, nothing
):
    """The names of the keys then have no prefix before ``pybreaker``."""
    storage = storage_of(namespace=nothing)
    storage.increment_counter()
    until(lambda: server.client.get("pybreaker:fail_counter") == "1")
    assert server.client.get("pybreaker:state") == "closed"
    keys = set(server.client.keys("*pybreaker*"))
    assert {key for key in keys if not key.startswith("test-")} <= {
        f"pybreaker:{name}" for name in KEYS
    }


def test_an_opening_is_written_in_whole_seconds_rounded_up(breaker_of, server, key):
    """The seconds are by the server's clock."""
    breaker = breaker_of()
    before = server_time(server)
    breaker.open()
    opened_at = int(until(lambda: key("opened_at")))
    assert before <= opened_at < server_time(server) + 1


def test_commands_have_one_key_and_no_script(server, namespace, breaker_of, key):
    """So a cluster needs no hash tags, and a server need not permit Lua."""
    with server.watched() as commands:
        breaker = breaker_of(fail_max=2, reset_timeout=0.1)
        fail(breaker)
        succeeds(breaker)
        fail(breaker, 2)
        until(lambda: key("state") == "open")
        until(lambda: is_due(breaker))
        fail(breaker)
        until(lambda: succeeds(breaker))
        for move in (breaker.open, breaker.half_open, breaker.close):
            move()
        until(lambda: key("state") == "closed")
    ours = [words for words in commands if f"{namespace}:" in " ".join(words)]
    assert ours
    for words in ours:
        assert sum(word.startswith(f"{namespace}:") for word in words) == 1, words
    assert not {words[0].upper() for words in commands} & {
        *("EVAL", "EVALSHA", "FCALL", "SCRIPT", "FUNCTION"),
        *("SUBSCRIBE", "PSUBSCRIBE", "PUBLISH"),
    }


# What calls cost


def test_calls_make_no_round_trips(server, proxies, breaker_of, key):
    """Calls that succeed and calls that are rejected make no requests at all."""
    proxy = proxies(server)
    breaker = breaker_of(port=proxy.port, refresh=60)
    before = requests_of(proxy)
    for _ in range(500):
        breaker.call(int)
    assert requests_of(proxy) == before
    breaker.open()
    until(lambda: key("state") == "open")
    before = requests_of(proxy)
    for _ in range(500):
        assert not succeeds(breaker)
    assert requests_of(proxy) == before


def test_calls_wait_for_no_round_trip(server, proxies, breaker_of, key):
    """The courier sends the changes of a call afterwards."""
    proxy = proxies(server)
    breaker = breaker_of(port=proxy.port, fail_max=8)
    proxy.delay = PATIENCE
    began = time.monotonic()
    fail(breaker, 3)
    breaker.call(int)
    assert isinstance(fail(breaker, 8), CircuitBreakerError)
    assert not succeeds(breaker)
    breaker.close()
    breaker.call(int)
    breaker.open()
    breaker.snapshot(), repr(breaker)
    assert time.monotonic() - began < PATIENCE / 2
    proxy.delay = 0.0
    until(lambda: key("state") == "open")


def test_a_quiet_process_looks_once_for_each_refresh(server, proxies, storage_of):
    """A look is one round trip, or at most two."""
    proxy = proxies(server)
    storage = storage_of(port=proxy.port, refresh=0.2)
    began, before = time.monotonic(), proxy.requests
    until(lambda: proxy.requests - before >= 10)
    made = proxy.requests - before
    assert made <= 2 * ((time.monotonic() - began) / 0.2 + 2)
    assert storage.state == "closed"


# Counting


def test_a_failure_counts_at_once_and_is_added_in_redis(breaker_of, key):
    """Redis adds the failure to those of other processes."""
    mine, theirs = breaker_of(refresh=60), breaker_of(refresh=60)
    fail(mine)
    assert mine.fail_counter == 1
    until(lambda: key("fail_counter") == "1")
    assert theirs.fail_counter == 0
    fail(theirs)
    until(lambda: key("fail_counter") == "2")
    until(lambda: theirs.fail_counter == 2)  # the reply to the command has the count
    assert mine.fail_counter == 1


def test_failures_of_others_are_known_after_a_refresh(breaker_of):
    """The breaker compares the fleet's count with fail_max."""
    mine, theirs = breaker_of(fail_max=3), breaker_of(fail_max=3)
    fail(theirs, 2)
    until(lambda: mine.fail_counter == 2)
    assert isinstance(fail(mine), CircuitBreakerError)


def test_many_failures_in_many_threads_are_all_counted(breaker_of, key):
    """Each failure counts once."""
    breakers = [breaker_of(fail_max=1000) for _ in range(4)]
    threads = [
        threading.Thread(target=fail, args=(breaker, 50))
        for breaker in breakers
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    until(lambda: key("fail_counter") == "400")
    for breaker in breakers:
        until(lambda: breaker.fail_counter == 400)  # noqa: B023
    never(lambda: key("fail_counter") != "400", within=0.2)


def test_a_success_resets_the_failures_that_its_process_has_read(breaker_of, key):
    """The count is 0 at once in this process, and within a refresh in the others."""
    mine, theirs = breaker_of(), breaker_of()
    fail(theirs)
    fail(mine)
    until(lambda: mine.fail_counter == theirs.fail_counter == 2)
    mine.call(int)
    assert mine.fail_counter == 0
    until(lambda: key("fail_counter") == "0")
    until(lambda: theirs.fail_counter == 0)


def test_a_success_leaves_failures_alone_that_its_process_has_not_read(breaker_of, key):
    """A success looks only at the count in memory, which costs nothing."""
    mine, theirs = breaker_of(refresh=60), breaker_of(refresh=60)
    fail(theirs, 2)
    until(lambda: key("fail_counter") == "2")
    mine.call(int)
    never(lambda: key("fail_counter") != "2", within=0.2)


def test_a_count_that_is_set_is_set_for_all(breaker_of, key):
    """A count that is set by hand is announced."""
    mine, theirs = breaker_of(), breaker_of()
    mine.fail_counter = 2
    assert mine.fail_counter == 2
    until(lambda: key("fail_counter") == "2")
    until(lambda: theirs.fail_counter == 2)


def test_a_breaker_that_only_observes_counts_too(breaker_of, key):
    breaker = breaker_of(fail_max=math.inf)
    fail(breaker, 20)
    until(lambda: key("fail_counter") == "20")
    assert breaker.current_state == "closed"


# Opening


def test_the_last_failure_opens_its_process_at_once_and_the_fleet_later(
    breaker_of, key
):
    """The fleet opens after one to two `refresh`, and a success in that time prevents
    the opening."""
    mine, theirs = breaker_of(refresh=0.6), breaker_of(refresh=0.6)
    began = time.monotonic()
    assert isinstance(fail(mine, 3), CircuitBreakerError)
    assert mine.current_state == "open"
    assert not succeeds(mine)
    never(
        lambda: key("state") == "open" or theirs.current_state == "open",
        within=0.6 - (time.monotonic() - began),
    )
    until(lambda: key("state") == "open")
    until(lambda: theirs.current_state == "open")
    assert not succeeds(theirs)


def trips_alone(mine, theirs, key, refresh):
    """Have the breaker `mine` trip, and the breaker `theirs` succeed less than
    `refresh` seconds later. If the machine is too slow, both try again."""

    def have_tried():
        mine.close()
        until(lambda: theirs.current_state == key("state") == "closed")
        until(lambda: theirs.fail_counter == 0)
        began = time.monotonic()
        fail(mine, 3)
        until(lambda: theirs.fail_counter == 3)
        succeeds(theirs)
        until(lambda: key("fail_counter") == "0" or key("state") == "open")
        return time.monotonic() - began < refresh

    until(have_tried)


def test_a_success_elsewhere_keeps_the_fleet_closed(breaker_of, key):
    """Only one host had the failures: the circuit of that process alone stays open, for
    its timeout."""
    mine = breaker_of(refresh=0.4, reset_timeout=1.5)
    theirs = breaker_of(refresh=0.02)
    trips_alone(mine, theirs, key, refresh=0.4)
    never(
        lambda: key("state") != "closed" or theirs.current_state != "closed",
        within=1.2,
    )
    assert mine.current_state == "open"
    until(lambda: succeeds(mine))
    assert mine.current_state == "closed"
    assert key("state") == "closed"


def test_a_local_opening_is_left_by_a_trial_that_is_local(breaker_of, key):
    """A trial that fails opens the same process again, and no other."""
    mine = breaker_of(refresh=0.3, reset_timeout=0.5)
    theirs = breaker_of(refresh=0.02)
    trips_alone(mine, theirs, key, refresh=0.3)
    until(lambda: is_due(mine))
    fail(mine)
    assert mine.current_state == "open"
    end = time.monotonic() + 0.4
    while time.monotonic() < end:
        theirs.call(int)
        assert key("state") == "closed"
        time.sleep(0.005)
    until(lambda: succeeds(mine))
    assert key("state") == "closed"


def test_an_opening_is_told_once_in_each_process(breaker_of, recorder):
    """The fleet's opening, which follows, is the same opening."""
    breaker = breaker_of(refresh=0.1)
    breaker.add_listener(recorder)
    fail(breaker, 3)
    time.sleep(0.4)
    assert breaker.state.name == "open"
    assert recorder.transitions == [("closed", "open")]


# By hand


@pytest.mark.parametrize(
    "move, state", [("open", "open"), ("half_open", "half-open"), ("close", "closed")]
)
@pytest.mark.parametrize("before", ["open", "half_open", "close"])
def test_moves_by_hand_are_announced_at_once(breaker_of, key, move, before, state):
    """The move does not wait for the next refresh; other processes follow at their next
    refresh."""
    mine, theirs = breaker_of(refresh=60), breaker_of()
    getattr(mine, before)()
    getattr(mine, move)()
    until(lambda: key("state") == state)
    until(lambda: theirs.current_state == state)
    if move == "close":
        assert key("fail_counter") in (None, "0")


def test_of_moves_by_hand_the_last_one_wins(breaker_of, key):
    """Any process may make the last move."""
    mine, theirs = breaker_of(), breaker_of()
    for _ in range(5):
        mine.open()
        until(lambda: theirs.current_state == "open")
        theirs.close()
        until(lambda: mine.current_state == "closed")
    for move in (mine.half_open, mine.close, mine.open, mine.close, mine.open):
        move()
    until(lambda: theirs.current_state == "open")
    never(lambda: theirs.current_state != "open" or key("state") != "open", within=0.2)


def test_a_move_by_hand_elsewhere_is_told_to_listeners_here(breaker_of, recorder):
    """The listeners of this process are told after the next exchange."""
    mine, theirs = breaker_of(), breaker_of()
    mine.add_listener(recorder)
    theirs.open()
    until(lambda: mine.state.name == "open")
    theirs.close()
    until(lambda: mine.state.name == "closed")
    assert recorder.transitions == [("closed", "open"), ("open", "closed")]


# The trial


@pytest.fixture
def due_of(breaker_of, key, write, server):
    """A function that makes breakers which know that the fleet is open and that the
    trial is due."""

    def make(reset_timeout=50, number=2, refresh=0.4, **settings):
        settings.update(refresh=refresh)
        write(state="open", fail_counter=3, opened_at=int(server_time(server)) - 60)
        breakers = [
            breaker_of(reset_timeout=reset_timeout, **settings) for _ in range(number)
        ]
        assert all(map(is_due, breakers))
        return breakers

    return make


def test_a_trial_is_claimed_for_all_of_the_fleet(server, due_of, namespace, key):
    """The claim is one command, whose lease is the timeout. The state in Redis remains
    `open`."""
    mine, theirs = due_of()
    with server.watched() as commands, trial_in(mine):
        assert mine.current_state == "half-open"
        assert key("state") == "open"
        assert 10_000 < server.client.pttl(f"{namespace}:pybreaker:trial") <= 50_000
        assert key("trial")
        for _ in range(3):
            with pytest.raises(CircuitBreakerError) as caught:
                theirs.call(boom)
            assert caught.value.breaker is theirs
        assert theirs.current_state == "open"
    (claim, *_) = (words for words in commands if "NX" in map(str.upper, words))
    assert claim[0].upper() == "SET"
    assert claim[1] == f"{namespace}:pybreaker:trial"
    options = [word.upper() for word in claim[3:]]
    assert sorted(options) == ["50000", "NX", "PX"]
    until(lambda: key("state") == "closed")
    until(lambda: theirs.current_state == "closed")


def test_a_trial_that_succeeds_is_released_after_the_state_is_written(
    server, due_of, namespace, key
):
    """In the other order another trial could begin in between."""
    mine, _ = due_of(number=2)
    with server.watched() as commands:
        assert mine.call(int) == 0
        until(lambda: key("state") == "closed" and key("trial") is None)
    state, trial = f"{namespace}:pybreaker:state", f"{namespace}:pybreaker:trial"
    closed = commands.index(["SET", state, "closed"])
    (released,) = (
        number
        for number, words in enumerate(commands)
        if words[0].upper() in ("DEL", "UNLINK", "GETDEL") and trial in words
    )
    assert closed < released
    assert key("fail_counter") == "0"


def test_a_trial_that_fails_leaves_its_claim_to_lapse(
    server, due_of, namespace, key, write
):
    """So there is one trial for each timeout even if another process has an old
    view."""
    mine, theirs = due_of()
    opened_at = key("opened_at")
    assert isinstance(fail(mine), CircuitBreakerError)
    until(lambda: key("opened_at") != opened_at)
    assert key("state") == "open"
    claim = key("trial")
    assert server.client.pttl(f"{namespace}:pybreaker:trial") > 10_000
    assert not succeeds(mine)
    write(opened_at=opened_at)  # so that the next trial is due
    until(lambda: is_due(theirs))
    never(lambda: succeeds(theirs) or key("trial") != claim, within=0.5)
    server.client.delete(f"{namespace}:pybreaker:trial")
    until(lambda: succeeds(theirs))
    until(lambda: mine.current_state == "closed")


def test_a_trial_that_is_abandoned_is_released(due_of, key):
    """Other processes may run the next trial at once."""
    mine, theirs = due_of(reset_timeout=60)
    with trial_in(mine) as raises:
        raises.append(KeyboardInterrupt())
    until(lambda: key("trial") is None)
    assert key("state") == "open"
    until(lambda: succeeds(theirs))
    until(lambda: mine.current_state == "closed")


def test_a_process_releases_only_its_own_claim(server, due_of, write, key):
    """After a claim has lapsed, the key may have another process's claim."""
    mine, _ = due_of()
    with trial_in(mine):
        write(trial="another process's")
    until(lambda: key("state") == "closed")
    never(lambda: key("trial") != "another process's", within=0.3)


def test_a_process_that_was_refused_asks_again_a_tenth_of_a_second_later(
    server, due_of, write, namespace
):
    """The number of calls that are rejected in the meantime makes no difference."""
    (breaker,) = due_of(number=1, refresh=60)
    write(trial="another process's")
    with server.watched() as commands:
        began = time.monotonic()
        for _ in range(5):
            for _ in range(50):
                assert not succeeds(breaker)
            time.sleep(0.1)
        elapsed = time.monotonic() - began  # half a second, or more on a busy machine
    key = f"{namespace}:pybreaker:trial"
    asked = sum("NX" in map(str.upper, words) and key in words for words in commands)
    assert 5 <= asked <= elapsed / 0.1 + 1
    assert len(commands) <= 12 * (asked + 1)
    server.client.delete(f"{namespace}:pybreaker:trial")
    until(lambda: succeeds(breaker))


def test_a_refused_call_is_rejected_as_any_other(due_of, write, recorder):
    """The error has the phrase that programs in the field compare, and listeners are
    told."""
    (breaker,) = due_of(number=1)
    breaker.add_listener(recorder)
    write(trial="another process's")
    with pytest.raises(CircuitBreakerError, match="circuit breaker still open"):
        breaker.call(boom)
    assert recorder.events == []  # the recorder has no method for rejections
    assert breaker.current_state == "open"


def test_a_process_recognizes_its_claim_whose_answer_was_lost(
    server, proxies, due_of, namespace, key
):
    """The client sends the claim again, and Redis refuses the claim because of the
    first sending."""
    proxy = proxies(server)
    (breaker,) = due_of(number=1, refresh=60, port=proxy.port)
    proxy.lose_answer_to(b"NX")
    with server.watched() as commands:
        assert breaker.call(int) == 0
        until(lambda: key("state") == "closed")
        until(lambda: key("trial") is None)
    assert proxy.lost == 1
    assert sum("NX" in map(str.upper, words) for words in commands) >= 1


def test_a_claim_is_given_back_where_the_trial_is_not_due_any_more(
    server, due_of, write, key
):
    """The trial of another process has failed in the meantime, and the claim of that
    trial is gone."""
    (breaker,) = due_of(number=1, refresh=60, reset_timeout=30)
    write(opened_at=int(server_time(server)))
    assert not succeeds(breaker)
    until(lambda: key("trial") is None)
    assert key("state") == "open"
    assert 0 < breaker.retry_after <= 30


def test_a_claim_is_given_back_where_the_circuit_is_closed_meanwhile(
    due_of, write, key
):
    """The call runs as any call of a closed circuit."""
    (breaker,) = due_of(number=1, refresh=60)
    write(state="closed", fail_counter=0)
    until(lambda: succeeds(breaker))
    assert breaker.current_state == "closed"
    until(lambda: key("trial") is None)


def test_without_an_answer_in_time_a_trial_is_granted(server, due_of):
    """A process that cannot reach Redis goes by its own circuit."""
    (breaker,) = due_of(number=1, patience=0.3, refresh=60)
    server.pause()
    began = time.monotonic()
    assert breaker.call(int) == 0
    assert 0.2 < time.monotonic() - began < PATIENCE / 2
    assert breaker.current_state == "closed"


def test_others_do_not_wait_for_a_call_that_waits_for_its_trial(server, due_of):
    """Other calls are rejected at once, and other threads can read the breaker."""
    (breaker,) = due_of(number=1, patience=2 * PATIENCE, refresh=60)
    server.pause()
    done = []
    thread = threading.Thread(
        target=lambda: done.append(breaker.call(int)), daemon=True
    )
    thread.start()
    until(lambda: breaker.retry_after > 0)
    began = time.monotonic()
    for _ in range(20):
        assert not succeeds(breaker)
        breaker.snapshot(), repr(breaker), breaker.current_state
    assert time.monotonic() - began < PATIENCE
    assert done == []
    server.resume()
    thread.join(PATIENCE)
    assert done == [0]


def test_no_event_loop_stalls_while_a_trial_is_asked_for(server, due_of):
    """The asynchronous admission awaits the answer."""
    (breaker,) = due_of(number=1, patience=2 * PATIENCE, refresh=60)
    server.pause()

    async def main():
        async def work():
            return "done"

        call = asyncio.ensure_future(breaker.call_async(work))
        began = time.monotonic()
        for _ in range(10):
            await asyncio.sleep(0.01)
        assert breaker.retry_after > 0
        assert not call.done()
        assert time.monotonic() - began < PATIENCE
        server.resume()
        return await call

    assert asyncio.run(main()) == "done"


def test_no_event_loop_waits_longer_for_a_trial_than_its_patience(server, due_of):
    """Plain calls wait no longer either."""
    (breaker,) = due_of(number=1, patience=0.3, refresh=60)
    server.pause()

    async def work():
        return "done"

    began = time.monotonic()
    assert asyncio.run(breaker.call_async(work)) == "done"
    assert 0.2 < time.monotonic() - began < PATIENCE / 2


def test_a_task_that_is_cancelled_while_it_asks_for_a_trial_leaves_no_claim(
    server, due_of, key
):
    """A claim that Redis grants afterwards is given back."""
    (breaker,) = due_of(number=1, refresh=0.2, reset_timeout=60)
    server.pause()

    async def work():
        raise AssertionError("not to be run")

    async def main():
        call = asyncio.ensure_future(breaker.call_async(work))
        while breaker.retry_after == 0.0 and not call.done():
            await asyncio.sleep(0.01)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call

    asyncio.run(main())
    server.resume()
    until(lambda: succeeds(breaker))
    until(lambda: key("state") == "closed")
    until(lambda: key("trial") is None)


def test_many_tasks_and_threads_ask_for_one_trial_only(due_of):
    """In each process a call takes the place before the storage asks Redis."""
    breakers = due_of(number=3, reset_timeout=60)
    ran, leave = [], threading.Event()

    def work():
        ran.append(1)
        assert leave.wait(PATIENCE)

    def call(breaker):
        with contextlib.suppress(CircuitBreakerError):
            breaker.call(work)

    threads = [
        threading.Thread(target=call, args=(breaker,)) for breaker in breakers * 4
    ]
    for thread in threads:
        thread.start()
    until(lambda: sum(thread.is_alive() for thread in threads) == 1 and ran)
    leave.set()
    for thread in threads:
        thread.join(PATIENCE)
    assert ran == [1]


def test_trials_of_two_processes_make_up_the_threshold(due_of, key):
    """Redis counts the successes, and its state is `open` until the last success."""
    mine, theirs = due_of(success_threshold=2)
    assert mine.call(int) == 0
    until(lambda: key("success_counter") == "1" and key("trial") is None)
    assert key("state") == "open"
    until(lambda: succeeds(theirs))
    assert theirs.current_state == "closed"
    until(lambda: key("state") == "closed")
    until(lambda: mine.current_state == "closed")
    until(lambda: key("success_counter") == "0")


def test_a_trial_may_follow_another_trial_at_once(due_of):
    """A claim that is being given back refuses no call of its own process."""
    (breaker,) = due_of(number=1, success_threshold=3, reset_timeout=60)
    assert [breaker.call(int) for _ in range(3)] == [0, 0, 0]
    assert breaker.current_state == "closed"


def test_a_move_by_hand_does_not_wait_for_the_claim_of_a_failed_trial(due_of, key):
    """After a move by hand in any process, the next call is the trial."""
    for mover in 0, 1:
        breakers = due_of(reset_timeout=60)
        assert isinstance(fail(breakers[0]), CircuitBreakerError)
        until(lambda: all(b.retry_after for b in breakers))  # noqa: B023
        assert key("trial")
        breakers[mover].half_open()
        until(lambda: succeeds(breakers[1]))  # noqa: B023
        until(lambda: key("state") == "closed" and key("trial") is None)


def test_a_claim_is_given_back_where_waiting_for_it_is_interrupted(
    server, due_of, key, monkeypatch
):
    """Ctrl-C is one such interruption."""
    (breaker,) = due_of(number=1, reset_timeout=60)

    class Interrupted(threading.Event):
        def wait(self, timeout=None):
            until(lambda: key("trial"))
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        stepwise.replace(patch, "threading", Event=Interrupted)
        with pytest.raises(KeyboardInterrupt):
            breaker.call(int)
    until(lambda: key("trial") is None)
    until(lambda: succeeds(breaker))


def test_a_failed_trial_starts_the_threshold_anew(due_of, key):
    """The rule is that of a single process."""
    mine, theirs = due_of(success_threshold=2, reset_timeout=0.3)
    assert mine.call(int) == 0
    until(lambda: key("success_counter") == "1")
    until(lambda: isinstance(fail(theirs), CircuitBreakerError) and not is_due(theirs))
    until(lambda: key("success_counter") == "0")
    until(lambda: theirs.current_state == mine.current_state == "open")
    until(lambda: succeeds(mine))
    assert mine.current_state == "half-open"


@pytest.mark.parametrize("reset_timeout", [0, 1e-9, 1e15, math.inf])
def test_a_timeout_may_be_of_any_length(
    breaker_of, key, caplog, namespace, reset_timeout
):
    """A lease is a whole number of milliseconds, from 1 to the longest that Redis
    takes."""
    mine = breaker_of(reset_timeout=reset_timeout, refresh=0.5)
    theirs = breaker_of(reset_timeout=reset_timeout, refresh=0.5)
    mine.half_open()
    until(lambda: theirs.current_state == "half-open")
    if reset_timeout > 1:
        with trial_in(mine):
            assert not succeeds(theirs)
    else:
        until(lambda: succeeds(mine))
    until(lambda: theirs.current_state == "closed")
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []
    assert f"{namespace}:pybreaker: Redis is away" not in caplog.text


def test_a_circuit_that_was_half_opened_by_hand_has_one_trial(breaker_of, key):
    """Any process may run the trial."""
    mine, theirs = breaker_of(), breaker_of()
    mine.half_open()
    until(lambda: theirs.current_state == "half-open")
    with trial_in(theirs) as raises:
        assert not succeeds(mine)
        raises.append(Boom())
    assert theirs.current_state == "open"
    until(lambda: key("state") == "open")
    until(lambda: mine.current_state == "open")


# Time


def test_the_age_of_an_opening_is_by_the_clock_of_redis(server, breaker_of, write):
    """The age is the present time of Redis less the moment of the opening."""
    write(state="open", opened_at=int(server_time(server)) - 2000)
    assert 3900 < breaker_of(reset_timeout=6000).retry_after < 4001


def test_an_opening_in_the_future_counts_as_now(server, breaker_of, write):
    """From then on the opening ages: an exchange does not make the opening new
    again."""
    write(state="open", opened_at=int(server_time(server)) + 1000)
    breaker = breaker_of(reset_timeout=60, refresh=0.02)
    first = breaker.retry_after
    assert 0 < first <= 60
    until(lambda: breaker.retry_after < first - 0.5)


def test_the_rounding_does_not_prolong_the_timeout_of_its_process(breaker_of, key):
    """The process that opened the circuit knows the moment more exactly than Redis."""
    breaker = breaker_of(fail_max=1, reset_timeout=60, refresh=0.02)
    for _ in range(3):
        before = time.monotonic()
        fail(breaker)
        opened = time.monotonic()

        def is_wrong():
            at_most = 60 - (time.monotonic() - opened)  # noqa: B023
            found = breaker.retry_after
            at_least = 60 - (time.monotonic() - before)  # noqa: B023
            return not at_least - 0.01 < found < at_most + 0.01

        until(lambda: key("state") == "open")
        never(is_wrong, within=0.2)
        breaker.close()
        until(lambda: key("state") == "closed")


def test_the_clock_of_the_host_plays_no_part(breaker_of, monkeypatch, key, server):
    """The storage uses the host's clock neither for writing nor for reading."""
    breaker = breaker_of(reset_timeout=60)
    true_time, true_datetime = time.time, pybreaker.datetime

    class Late(true_datetime):
        @classmethod
        def now(cls, tz=None):
            return true_datetime.fromtimestamp(true_time() - 500, tz)

    monkeypatch.setattr(time, "time", lambda: true_time() - 500)
    for module in (pybreaker, stepwise.shared):
        monkeypatch.setattr(module, "datetime", Late)
    breaker.open()
    opened_at = int(until(lambda: key("opened_at")))
    assert abs(opened_at - server_time(server)) < 100
    time.sleep(0.2)
    assert 0 < breaker.retry_after <= 60
    assert 0 < breaker_of(reset_timeout=60).retry_after <= 60


@pytest.mark.parametrize("garbage", ["", "soon", "1.5e9", "-1", "nan", "9" * 40])
def test_an_opening_that_makes_no_sense_does_no_harm(breaker_of, write, garbage):
    write(state="open", opened_at=garbage)
    breaker = breaker_of(reset_timeout=0.5)
    breaker.snapshot(), repr(breaker)
    until(lambda: succeeds(breaker))


# Redis away


@pytest.fixture
def said(caplog, namespace):
    """A function that returns the levels of the log records about this circuit, without
    the records of storages that other tests have left."""
    caplog.set_level(logging.INFO, "pybreaker")

    def said():
        records = [
            r for r in caplog.records if r.getMessage().startswith(f"{namespace}:")
        ]
        assert {record.name for record in records} <= {"pybreaker"}
        return [record.levelname for record in records]

    return said


@pytest.mark.parametrize("how", ["cut", "swallow"])
def test_one_line_says_that_redis_is_away_and_one_that_it_is_back(
    server, proxies, breaker_of, said, how, silence, monkeypatch
):
    """Redis may refuse connections or be silent; calls go on as if each process were
    alone."""
    proxy = proxies(server)
    breaker = breaker_of(port=proxy.port, fail_max=3, refresh=0.5)
    getattr(proxy, how)()
    until(lambda: said() == ["WARNING"])
    fail(breaker, 2)
    assert breaker.call(int) == 0
    assert breaker.fail_counter == 0
    assert isinstance(fail(breaker, 3), CircuitBreakerError)
    assert not succeeds(breaker)
    never(lambda: said() != ["WARNING"], within=0.5)
    proxy.heal()
    until(lambda: said() == ["WARNING", "INFO"])
    stepwise.let_redis_be_silent(monkeypatch.setattr)
    never(lambda: said() != ["WARNING", "INFO"], within=0.3)


def test_a_move_while_redis_is_away_is_announced_later(
    server, proxies, breaker_of, said, key
):
    """The last move is announced when Redis is back."""
    proxy = proxies(server)
    breaker = breaker_of(port=proxy.port)
    until(lambda: key("state") == "closed")
    proxy.cut()
    until(lambda: said()[-1:] == ["WARNING"])
    breaker.half_open()
    breaker.open()
    assert key("state") == "closed"
    proxy.heal()
    until(lambda: key("state") == "open")
    assert breaker.current_state == "open"


def test_counts_stay_local_while_redis_is_away(server, proxies, breaker_of, said, key):
    """The counts are out of date by the time that Redis is back."""
    proxy = proxies(server)
    breaker = breaker_of(port=proxy.port, fail_max=10)
    fail(breaker)
    until(lambda: key("fail_counter") == "1")
    proxy.cut()
    until(lambda: said()[-1:] == ["WARNING"])
    fail(breaker, 5)
    assert breaker.fail_counter == 6
    proxy.heal()
    until(lambda: said()[-1:] == ["INFO"])
    never(lambda: key("fail_counter") != "1", within=0.3)


def test_a_success_while_redis_is_away_is_told_when_it_is_back(
    server, proxies, breaker_of, said, key
):
    """Old failures must not open a circuit that has worked ever since."""
    proxy = proxies(server)
    breaker = breaker_of(port=proxy.port, fail_max=3)
    fail(breaker, 2)
    until(lambda: key("fail_counter") == "2")
    proxy.cut()
    until(lambda: said()[-1:] == ["WARNING"])
    assert succeeds(breaker)
    proxy.heal()
    until(lambda: said()[-1:] == ["INFO"])
    until(lambda: key("fail_counter") == "0")
    assert breaker.fail_counter == 0


def test_a_log_filter_that_raises_does_not_end_the_courier(
    server, proxies, breaker_of, write
):
    """The process follows the fleet afterwards as before."""
    proxy = proxies(server)
    breaker = breaker_of(port=proxy.port)
    heard = []

    def broken(record):
        heard.append(record.getMessage())
        raise RuntimeError

    logger = logging.getLogger("pybreaker")
    logger.addFilter(broken)
    try:
        proxy.cut()
        until(lambda: heard)
        proxy.heal()
        write(state="open", opened_at=int(server_time(server)))
        until(lambda: breaker.current_state == "open")
    finally:
        logger.removeFilter(broken)


@pytest.mark.parametrize("name", ["state", "fail_counter", "trial"])
def test_a_value_that_is_no_text_is_mended_by_a_client_that_decodes(
    server, namespace, write, key, name, caplog, closing
):
    """Otherwise the client would raise in each exchange."""
    client = closing(redis.Redis(port=server.port, decode_responses=True))
    storage = CircuitRedisStorage(
        "closed", client, namespace, refresh=0.1, patience=PATIENCE
    )
    breaker = CircuitBreaker(reset_timeout=0.2, state_storage=storage)
    breaker.open()
    until(lambda: key("state") == "open")
    write(**{name: b"\xff\xfe"})
    until(lambda: succeeds(breaker))
    until(lambda: key("state") == "closed")
    assert f"{namespace}:pybreaker: Redis is away" not in caplog.text


@pytest.mark.parametrize("count", [-1, 1.5, None])
def test_a_value_that_is_no_count_is_refused(storage_of, count):
    """Otherwise Redis would have a broken value."""
    storage = storage_of()
    with pytest.raises((TypeError, ValueError), match="counter"):
        storage.counter = count
    assert storage.counter == 0


def test_a_move_elsewhere_is_known_when_redis_is_back(
    server, proxies, breaker_of, said, key
):
    proxy = proxies(server)
    mine, theirs = breaker_of(port=proxy.port), breaker_of()
    proxy.cut()
    until(lambda: said()[-1:] == ["WARNING"])
    theirs.open()
    until(lambda: key("state") == "open")
    assert mine.current_state == "closed"
    proxy.heal()
    until(lambda: mine.current_state == "open")


# Data lost


@pytest.mark.parametrize("state", ["closed", "open", "half-open"])
def test_a_flush_changes_no_state(server, breaker_of, key, state):
    """A process that knows the state writes the state anew."""
    mine, theirs = breaker_of(), breaker_of()
    mine.state = state
    until(lambda: key("state") == theirs.current_state == state)
    opened_at = key("opened_at")
    server.client.flushall()
    until(lambda: key("state") == state)
    if state == "open":
        until(lambda: key("opened_at"))
        assert abs(int(key("opened_at")) - int(opened_at)) <= 100
    for breaker in (mine, theirs):
        assert breaker.current_state == state


def test_a_flush_does_not_make_a_timeout_longer(server, breaker_of, key, write):
    """The moment that is written anew is that of the opening, not that of the flush."""
    breaker = breaker_of(reset_timeout=1000)
    breaker.open()
    until(lambda: key("state") == "open")
    written = server_time(server) - 600
    write(opened_at=int(written))
    until(lambda: breaker.retry_after < 500)
    server.client.flushall()
    until(lambda: key("opened_at"))
    assert abs(int(key("opened_at")) - written) <= 100
    assert breaker.retry_after < 500


# Lifecycle


def test_a_storage_that_is_collected_ends_its_thread(breaker_of):
    """Both threads end. The threads keep no process and no storage alive."""
    before = set(threading.enumerate())
    breaker = breaker_of(refresh=60)
    fail(breaker)
    threads = set(threading.enumerate()) - before
    assert threads
    assert all(thread.daemon for thread in threads)
    del breaker
    until(lambda: gc.collect() is not None and not threads & set(threading.enumerate()))


def test_a_storage_can_be_collected_while_redis_is_silent(
    server, proxies, breaker_of, said, silence
):
    """The thread ends when an answer comes: some clients wait for ever."""
    proxy = proxies(server)
    before = set(threading.enumerate())
    breaker = breaker_of(port=proxy.port)
    near = {t for t in threading.enumerate() if t.name != "proxy"} - before
    proxy.swallow()
    until(lambda: said()[-1:] == ["WARNING"])
    fail(breaker)
    del breaker
    proxy.heal()
    until(lambda: gc.collect() is not None and not near & set(threading.enumerate()))


PRELUDE = """
import gc, os, signal, sys, threading, time, warnings
import redis
import pybreaker, stepwise
from pybreaker import CircuitBreaker, CircuitBreakerError, CircuitRedisStorage

signal.alarm(60)  # what hangs is killed
stepwise.let_redis_be_silent()  # a busy machine may delay an answer
port, namespace = int(sys.argv[1]), sys.argv[2]

def boom():
    raise ZeroDivisionError

def fail(breaker):
    try:
        breaker.call(boom)
    except (ZeroDivisionError, CircuitBreakerError):
        pass

def breaker_of(fail_max=100, reset_timeout=60, **settings):
    client = redis.Redis(port=port)
    settings.setdefault("patience", 30)
    storage = CircuitRedisStorage("closed", client, namespace=namespace, **settings)
    return CircuitBreaker(fail_max, reset_timeout, state_storage=storage)

def until(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "too late"
        time.sleep(0.005)

def fork(child):
    "Runs child() in a forked process and waits until that has ended well."
    pid = os.fork()
    if pid == 0:
        signal.alarm(50)
        try:
            child()
        except BaseException:
            sys.excepthook(*sys.exc_info())
            sys.stderr.flush()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert status == 0, f"the child ended with status {status}"
"""


@pytest.fixture
def run(server, namespace):
    """Runs a program in a process of its own, every warning an error. Returns
    what it printed."""

    def run(program, port=server.port, ends_well=True):
        done = subprocess.run(
            [
                *(sys.executable, "-W", "error", "-c"),
                PRELUDE + textwrap.dedent(program),
                *(str(port), namespace),
            ],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            capture_output=True,
            text=True,
            timeout=2 * PATIENCE,
        )
        if ends_well:
            assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    return run


@pytest.mark.parametrize("end", ["", "sys.exit()", "boom()"])
def test_changes_that_were_not_sent_are_sent_at_a_normal_exit(run, key, end):
    """The exit comes immediately after the change."""
    run(
        f"""
        breaker = breaker_of(refresh=60)
        fail(breaker)
        fail(breaker)
        breaker.open()
        {end}
        """,
        ends_well=end != "boom()",
    )
    assert key("state") == "open"
    assert key("fail_counter") == "2"


def test_an_exit_waits_no_longer_than_its_patience(server, proxies, namespace):
    """The server does not answer."""
    proxy = proxies(server)
    program = """
breaker = breaker_of(refresh=60, patience=0.5)
print("ready", flush=True)
sys.stdin.readline()
breaker.open()
print(time.monotonic(), flush=True)
"""
    with subprocess.Popen(
        [sys.executable, "-c", PRELUDE + program, str(proxy.port), namespace],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == "ready\n"
        proxy.swallow()
        process.stdin.write("\n")
        process.stdin.flush()
        ended = float(process.stdout.readline())
        assert process.wait(PATIENCE) == 0
        assert time.monotonic() - ended < 15  # some clients wait for ever
        assert "Traceback" not in process.stderr.read()


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")


@needs_fork
def test_a_forked_child_shares_the_circuit(run, key):
    """The child and its parent each go on with a courier of their own."""
    run("""
        breaker = breaker_of(refresh=0.3)
        fail(breaker)
        until(lambda: breaker._state_storage.counter == 1)

        def child():
            fail(breaker)
            until(lambda: breaker.fail_counter == 2)
            other = breaker_of(refresh=0.3)
            until(lambda: other.fail_counter == 2)
            breaker.open()
            until(lambda: other.current_state == "open")

        fork(child)
        until(lambda: breaker.current_state == "open")
    """)


@needs_fork
def test_a_fork_gives_no_warning_of_threads(run):
    """Since 3.12 Python warns where a process with several threads forks. The courier
    is not there at that moment, and is there again afterwards."""
    run("""
        warnings.simplefilter("error")
        breaker = breaker_of(refresh=0.3)
        for _ in range(5):
            fail(breaker)
            fork(lambda: fail(breaker))
        other = breaker_of(refresh=0.3)
        breaker.open()
        until(lambda: other.current_state == "open")
    """)


@needs_fork
def test_changes_that_were_not_sent_before_a_fork_are_sent_once(run, key):
    """The parent sends the changes of before the fork, and the child only its own."""
    run("""
        breaker = breaker_of(refresh=0.3)
        def child():
            fail(breaker)
            until(lambda: breaker.fail_counter == 11)
            time.sleep(0.2)
        for _ in range(10):
            fail(breaker)
        fork(child)
        time.sleep(0.2)
    """)
    assert key("fail_counter") == "11"


@needs_fork
@pytest.mark.parametrize("trouble", ["swallow", "cut"])
def test_a_fork_does_not_wait_for_redis(run, server, proxies, trouble):
    """If Redis is away, the fork waits no longer than the patience."""
    proxy = proxies(server)
    timer = threading.Timer(1.0, getattr(proxy, trouble))
    timer.start()
    run(
        """
        import logging
        logging.disable()
        # The courier, which waits for Redis, may be there still when the process forks.
        warnings.simplefilter("ignore", DeprecationWarning)
        breaker = breaker_of(refresh=0.1, patience=0.25)
        time.sleep(1.5)
        fail(breaker)
        began = time.monotonic()
        pid = os.fork()
        took = time.monotonic() - began
        if pid == 0:
            began = time.monotonic()
            fail(breaker)
            assert breaker.call(int) == 0
            assert time.monotonic() - began < 15
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        assert took < 15, took
        """,
        port=proxy.port,
    )
    timer.join()


@needs_fork
def test_a_child_may_be_forked_while_calls_fail_in_threads(run):
    """The child gets no lock of the courier that is held for ever."""
    run("""
        warnings.simplefilter("ignore", DeprecationWarning)  # of these threads
        breaker = breaker_of(refresh=0.01)
        over = threading.Event()

        def work():
            while not over.is_set():
                fail(breaker)
                time.sleep(0.0005)

        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()

        def child():
            before = breaker.fail_counter
            breaker.close()
            breaker.open()
            other = breaker_of(refresh=0.01)
            until(lambda: other.current_state == "open")
            breaker.close()

        for _ in range(10):
            fork(child)
        over.set()
        for thread in threads:
            thread.join()
    """)


def test_the_module_imports_no_client(run):
    """The module uses the client that the program gives."""
    code = "import sys, pybreaker; print([m for m in sys.modules if m == 'redis'])"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, check=True, capture_output=True
    )
    assert done.stdout.strip() == b"[]"


# Odds and ends


def test_a_success_counter_that_is_set_is_set_for_all(storage_of, key):
    """The count of failures has the same rule."""
    mine, theirs = storage_of(), storage_of()
    mine.success_counter = 2
    until(lambda: key("success_counter") == "2" and theirs.success_counter == 2)


def test_a_moment_of_opening_that_is_set_moves_the_opening_of_all(
    server, breaker_of, key
):
    """Tests in the field let a timeout pass in this way."""
    breaker = breaker_of(reset_timeout=60)
    breaker.open()
    until(lambda: key("state") == "open")
    moment = datetime.now(timezone.utc) - timedelta(seconds=100)
    breaker._state_storage.opened_at = moment
    assert breaker._state_storage.opened_at == moment
    assert is_due(breaker)
    until(lambda: int(key("opened_at")) < server_time(server) - 90)


def test_a_count_that_is_no_number_is_mended_when_a_failure_is_added(
    server, namespace, write, key, closing
):
    """The new count includes the failure."""
    client = closing(redis.Redis(port=server.port))
    storage = CircuitRedisStorage("closed", client, namespace, refresh=60)
    write(fail_counter="nonsense")
    storage.increment_counter()
    until(lambda: key("fail_counter") == "1")


def test_a_courier_that_runs_is_not_started_twice(storage_of):
    """A courier may not have ended in time for a fork."""
    storage = storage_of()
    before = set(threading.enumerate())
    with stepwise.gate():
        stepwise.courier_of(storage).start()
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize("namespace", [b"bytes", 5])
def test_a_namespace_is_a_string(server, namespace):
    """The namespace may also be None, for keys without a prefix."""
    with pytest.raises(TypeError, match="namespace"):
        CircuitRedisStorage("closed", redis.Redis(port=server.port), namespace)


@pytest.mark.parametrize("name", ["refresh", "patience"])
def test_a_time_of_zero_or_infinity_is_refused(server, name):
    """A time may be neither 0 nor infinite."""
    for value in 0, math.inf:
        with pytest.raises(ValueError, match=name):
            CircuitRedisStorage(
                "closed", redis.Redis(port=server.port), **{name: value}
            )


def test_trio_may_ask_for_a_trial(due_of):
    """The task gets the answer of Redis."""
    mine, theirs = due_of()

    async def main():
        async def work():
            assert mine.current_state == "half-open"
            with pytest.raises(CircuitBreakerError):
                await theirs.call_async(int)
            return "done"

        return await mine.call_async(work)

    assert trio.run(main) == "done"
    until(lambda: theirs.current_state == "closed")


def test_a_coroutine_that_runs_on_no_event_loop_may_ask_for_a_trial(due_of):
    """The coroutine waits for the answer as a function does."""
    (breaker,) = due_of(number=1)
    with pytest.raises(StopIteration) as stopped:
        breaker.call_async(int).send(None)
    assert stopped.value.value == 0
    assert breaker.current_state == "closed"


class _Client:
    """A client whose answers the function `answer` makes from the commands."""

    def __init__(self, answer):
        self.answer = answer
        self.commands = []

    def pipeline(self, transaction):
        self.commands = []
        return self

    def execute_command(self, *words, **options):
        self.commands.append(words)

    def execute(self, raise_on_error):
        return self.answer(self.commands)

    def time(self):
        return int(time.time()), 0


def test_a_redis_that_keeps_nothing_is_away(caplog):
    """The courier tries again later, not for ever at once."""

    def nonsense(commands):
        return [redis.ResponseError("WRONGTYPE nonsense") for _ in commands]

    storage = CircuitRedisStorage("closed", _Client(nonsense), refresh=0.1)
    until(lambda: "does not keep" in caplog.text)
    breaker = CircuitBreaker(fail_max=1, state_storage=storage)
    assert isinstance(fail(breaker), CircuitBreakerError)


def test_a_claim_that_meets_an_error_is_granted():
    """A trial runs in this process, though other processes may run trials too."""

    def only_reads(commands):
        if any(words[0] == "SET" for words in commands):
            raise redis.ConnectionError
        texts = {"state": b"open", "opened_at": b"1", "fail_counter": b"3"}
        return [texts.get(words[1].rpartition(":")[2]) for words in commands]

    storage = CircuitRedisStorage("closed", _Client(only_reads), refresh=5)
    breaker = CircuitBreaker(reset_timeout=1, state_storage=storage)
    assert breaker.current_state == "open"
    assert succeeds(breaker)


def test_a_courier_meets_no_half_made_storage(monkeypatch, caplog):
    """The first pass may end before the constructor goes on."""
    passes, join = threading.Semaphore(0), pybreaker_extras.redis._join_courier

    def answers(commands):
        passes.release()
        return [b"closed" if each[1].endswith("state") else None for each in commands]

    def join_and_wait(storage):
        joined = join(storage)
        for _ in range(3):  # two passes have begun, and the first has ended
            assert passes.acquire(timeout=PATIENCE)
        return joined

    monkeypatch.setattr(pybreaker_extras.redis, "_join_courier", join_and_wait)
    CircuitRedisStorage("closed", _Client(answers), refresh=0.05)
    assert "AttributeError" not in caplog.text


def test_a_newer_move_is_sent_after_an_error():
    """The courier does not send the move that failed."""
    moved = []

    def refuses(commands):
        if any(words[:2] == ("SET", "pybreaker:state") for words in commands):
            if len(moved) == 0:
                moved.append(True)
                storage.state = "half-open"  # while the courier sends the former move
                raise redis.ConnectionError
            moved.extend(words[2] for words in commands if words[1].endswith("state"))
        state = moved[-1].encode() if len(moved) > 1 else b"closed"
        return [state if words[1].endswith("state") else None for words in commands]

    refuses_nothing_else = _Client(refuses)
    storage = CircuitRedisStorage("closed", refuses_nothing_else, refresh=0.1)
    storage.state = "open"
    until(lambda: len(moved) > 1)
    assert moved[1] == "half-open"


def test_a_release_that_failed_is_tried_again():
    """The claim does not stay for its whole lease."""
    texts = {"state": b"open", "opened_at": b"1", "fail_counter": b"3"}
    failed = []

    def answer(commands):
        keys = [words[1].rpartition(":")[2] for words in commands]
        if "trial" in texts and "trial" in keys and not failed:
            failed.append(True)  # the courier has read whose claim the key has
            raise redis.ConnectionError
        replies = []
        for (name, _, *words), key in zip(commands, keys):
            if (name, key) == ("SET", "trial"):
                texts["trial"] = words[0].encode()
            elif (name, key) == ("DEL", "trial"):
                del texts["trial"]
            replies.append(texts.get(key) if name == "GET" else None)
        return replies

    storage = CircuitRedisStorage("closed", _Client(answer), refresh=0.1)
    breaker = CircuitBreaker(
        reset_timeout=60, success_threshold=2, state_storage=storage
    )
    assert succeeds(breaker)
    until(lambda: failed and "trial" not in texts)


def test_a_count_is_judged_by_a_view_that_has_all_its_failures():
    """A view that was on its way before the last failures were sent judges nothing."""
    texts = {"state": b"closed", "fail_counter": b"0"}
    holding, held, go_on = threading.Event(), threading.Event(), threading.Event()

    def answer(commands):
        replies = []
        for name, key, *words in commands:
            key = key.rpartition(":")[2]
            if name == "INCRBY":
                texts[key] = str(int(texts[key]) + words[0]).encode()
            elif name == "SET" and "NX" not in words:
                texts[key] = str(words[0]).encode()
            replies.append(texts.get(key) if name == "GET" else None)
        if holding.is_set():
            held.set()
            assert go_on.wait(PATIENCE)
        return replies

    storage = CircuitRedisStorage("closed", _Client(answer), refresh=0.5)
    breaker = CircuitBreaker(fail_max=2, state_storage=storage)
    holding.set()
    assert held.wait(PATIENCE)
    assert isinstance(fail(breaker, 2), CircuitBreakerError)
    time.sleep(0.6)  # longer than the trip is unconfirmed, shorter than a silence
    holding.clear()
    go_on.set()
    until(lambda: texts["state"] == b"open")
