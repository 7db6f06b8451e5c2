"""One courier for each client, over a real server: many circuits cost what one circuit
costs, and a fault of one circuit touches no other."""

from __future__ import annotations

import contextlib
import gc
import itertools
import threading
import time

import pytest
import redis
import stepwise
from fleet import never
from support import PATIENCE, fail, until

from pybreaker import CircuitBreaker, CircuitRedisStorage

pytestmark = pytest.mark.usefixtures("unhurried")


@pytest.fixture
def client(server, closing):
    return closing(redis.Redis(port=server.port))


@pytest.fixture
def circuit(namespace, client):
    """A function that makes a breaker over a circuit, by number. All share a client."""

    def circuit(number=0, client=client, fail_max=3, reset_timeout=60, **settings):
        settings.setdefault("refresh", 0.2)
        settings.setdefault("patience", PATIENCE)
        storage = CircuitRedisStorage(
            "closed", client, f"{namespace}-{number}", **settings
        )
        return CircuitBreaker(fail_max, reset_timeout, state_storage=storage)

    return circuit


@pytest.fixture
def key(server, namespace):
    """The value of a key of the circuit of this number."""
    return lambda number, name: server.key(f"{namespace}-{number}", name)


def couriers():
    return [t for t in threading.enumerate() if t.name.startswith("pybreaker courier")]


def circuits_asked_for(server, namespace):
    """The numbers of the circuits whose keys couriers read during some refreshes."""
    with server.watched() as commands:
        time.sleep(0.5)
    return circuits_in(commands, namespace)


def circuits_in(commands, namespace):
    """The numbers of the circuits whose keys are in these commands."""
    about = [words[1] for words in commands if len(words) > 1]
    numbers = [key[len(namespace) + 1 :].partition(":")[0] for key in about]
    return {
        int(number)
        for key, number in zip(about, numbers)
        if key.startswith(f"{namespace}-") and number.isdigit()
    }


def test_two_hundred_circuits_have_two_threads_and_one_connection(
    server, circuit, namespace
):
    before = set(couriers())
    connected = server.client.info("clients")["connected_clients"]
    breakers = [circuit(number) for number in range(200)]
    assert len(set(couriers()) - before) == 2
    assert server.client.info("clients")["connected_clients"] <= connected + 2
    until(lambda: circuits_asked_for(server, namespace) == set(range(200)))
    assert {breaker.current_state for breaker in breakers} == {"closed"}


def test_circuits_without_calls_make_one_round_trip_for_each_refresh(server, circuit):
    """The number of circuits makes no difference to the number of reads that the server
    counts."""
    refresh = 0.2
    breakers = [circuit(number, refresh=refresh) for number in range(10)]

    asked = itertools.count()

    def reads():
        """How many reads the server has processed, without those of this function."""
        stats = server.client.info("stats")
        return int(stats["total_reads_processed"]) - next(asked)

    time.sleep(refresh)
    began, before = time.monotonic(), reads()
    until(lambda: reads() - before >= 9, pause=refresh)
    made, elapsed = reads() - before, time.monotonic() - began
    # The courier may be in the middle of a round.
    assert made <= elapsed / refresh + 1
    assert len(breakers) == 10


def test_news_of_one_circuit_travels_without_the_other_circuits(
    server, circuit, namespace, key
):
    """An opening and a trial of one circuit among two hundred are as quick as those of
    a circuit that is alone."""
    breakers = [circuit(number, refresh=60) for number in range(20)]
    time.sleep(0.1)
    with server.watched() as commands:
        breakers[7].open()
        until(lambda: key(7, "state") == "open")
        breakers[7].half_open()
        assert breakers[7].call(int) == 0
        until(lambda: key(7, "state") == "closed" and key(7, "trial") is None)
    assert any("NX" in words for words in commands)
    # (The test's own questions are about the seventh, too.)
    assert circuits_in(commands, namespace) == {7}


@pytest.mark.parametrize("refreshes", [(60, 0.05), (0.05, 60)])
def test_a_client_is_served_at_the_smallest_refresh_of_its_storages(
    server, circuit, refreshes, closing
):
    """The order in which the storages were made makes no difference."""
    mine = [circuit(number, refresh=r) for number, r in enumerate(refreshes)]
    theirs = closing(redis.Redis(port=server.port))
    for number in range(2):
        circuit(number, client=theirs, refresh=60).open()
    until(lambda: all(breaker.state.name == "open" for breaker in mine))


def test_a_storage_that_is_collected_leaves_its_courier(server, circuit, namespace):
    """The courier does not read the circuit's keys any more, and serves the other
    storages. The courier ends with its last storage; a storage that is made later gets
    a new courier."""
    before = set(couriers())
    breakers = {number: circuit(number, refresh=0.05) for number in range(3)}
    mine = set(couriers()) - before
    courier = stepwise.courier_of(breakers[0]._state_storage)
    assert courier in stepwise.couriers()
    del breakers[1]
    gc.collect()
    until(lambda: circuits_asked_for(server, namespace) == {0, 2})
    breakers.clear()
    until(lambda: gc.collect() is not None and not mine & set(couriers()))
    assert courier not in stepwise.couriers()
    again = circuit(1)
    assert len(set(couriers()) - before) == 2
    assert again.current_state == "closed"


def test_threads_that_make_storages_at_once_share_one_courier(circuit):
    before = set(couriers())
    barrier, made = threading.Barrier(8), []

    def make(number):
        barrier.wait(PATIENCE)
        made.append(circuit(number))

    threads = [threading.Thread(target=make, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert len(made) == 8
    assert len(set(couriers()) - before) == 2
    assert len({stepwise.courier_of(each._state_storage) for each in made}) == 1


def test_clients_that_share_a_pool_are_still_two(circuit, server, closing):
    """Each client has a courier, as a program may close one of the clients."""
    pool = redis.ConnectionPool(port=server.port)
    before = set(couriers())
    made = [circuit(n, client=redis.Redis(connection_pool=pool)) for n in range(2)]
    assert len(set(couriers()) - before) == 4
    assert len(made) == 2
    del made
    until(lambda: gc.collect() is not None and not set(couriers()) - before)
    pool.disconnect()


def test_a_circuit_whose_keys_are_used_otherwise_harms_no_other(
    server, circuit, namespace, key, caplog
):
    """The courier mends the circuit, and the other circuits notice nothing."""
    mine, other = circuit(0), circuit(1)
    server.client.delete(f"{namespace}-0:pybreaker:state")
    server.client.rpush(f"{namespace}-0:pybreaker:state", "a list")
    other.open()
    until(lambda: key(1, "state") == "open")
    until(lambda: "no good value" in caplog.text)
    assert f"{namespace}-1:" not in caplog.text
    assert mine.current_state == "closed"


def test_a_circuit_that_redis_refuses_harms_no_other(server, circuit, namespace, key):
    """The Redis user may use only the keys of one circuit."""
    allowed = f"~{namespace}-1:*"
    server.client.execute_command(
        *("ACL", "SETUSER", "narrow", "on", ">pw", "+@all", "resetkeys", allowed)
    )
    try:
        client = redis.Redis(port=server.port, username="narrow", password="pw")
        refused, other = circuit(0, client=client), circuit(1, client=client)
        fail(refused, 3)
        fail(other)
        until(lambda: key(1, "fail_counter") == "1")
        assert refused.current_state == "open"
        assert key(0, "fail_counter") is None
        other.open()
        until(lambda: key(1, "state") == "open")
    finally:
        del refused, other
        gc.collect()
        client.close()
        server.client.execute_command("ACL", "DELUSER", "narrow")


def test_a_redis_that_does_not_tell_the_time_shares_all_but_openings(
    server, circuit, closing, key, caplog, namespace
):
    """Some servers forbid the command TIME. For a circuit that opens, Redis is away
    until the server tells the time; then the opening is announced."""
    may_tell = []

    class Timeless(redis.Redis):
        def time(self, **options):
            if not may_tell:
                raise redis.ResponseError("NOPERM no permissions to run 'time'")
            return super().time(**options)

    client = closing(Timeless(port=server.port))
    mine, other = circuit(0, client=client), circuit(1, client=client)
    mine.open()
    until(lambda: f"{namespace}-0:pybreaker: Redis is away" in caplog.text)
    fail(other, 2)
    until(lambda: key(1, "fail_counter") == "2")
    assert key(0, "state") == "closed"
    assert f"{namespace}-1:pybreaker: Redis is away" not in caplog.text
    may_tell.append(True)
    until(lambda: key(0, "state") == "open")


def test_a_pipeline_that_fails_loses_the_news_of_no_circuit(
    server, circuit, closing, key
):
    """The courier sends all openings when the pipeline works again."""
    failing = []

    class Broken(redis.Redis):
        def pipeline(self, **options):
            if failing:
                raise redis.ConnectionError("no pipeline")
            return super().pipeline(**options)

    client = closing(Broken(port=server.port))
    breakers = [circuit(number, client=client) for number in range(3)]
    failing.append(True)
    for breaker in breakers:
        breaker.open()
    never(lambda: key(0, "state") == "open", within=0.3)
    failing.clear()
    for number in range(3):
        until(lambda: key(number, "state") == "open")  # noqa: B023


def test_a_trial_of_one_circuit_does_not_wait_for_the_others(circuit, key):
    """The trials of twenty circuits are due at once, and all of them run."""
    breakers = [circuit(number, refresh=60) for number in range(20)]
    for breaker in breakers:
        breaker.half_open()
    results = []

    def call(breaker):
        results.append(breaker.call(int))

    threads = [threading.Thread(target=call, args=(b,)) for b in breakers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert results == [0] * 20
    for number in range(20):
        until(lambda: key(number, "state") == "closed")  # noqa: B023


class TestSmallestRefresh:
    """Tests step by step, without a server."""

    @pytest.fixture
    def clock(self, clock, monkeypatch):
        stepwise.set_clock(monkeypatch, clock)
        stepwise.let_no_thread_wait(monkeypatch, lambda timeout: None)
        stepwise.leave_alone(monkeypatch)
        stepwise.carry_by_hand(monkeypatch)
        return clock

    def storage(self, client, refresh, namespace):
        return CircuitRedisStorage("closed", client, namespace, refresh=refresh)

    def test_the_courier_comes_again_after_the_smallest_refresh(self, clock):
        client = stepwise.Client(stepwise.Redis(clock))
        slow = self.storage(client, 60, "slow")
        courier = stepwise.courier_of(slow)
        assert courier.make_pass() == 60
        quick = self.storage(client, 2, "quick")
        assert stepwise.courier_of(quick) is courier
        assert courier.make_pass() == 2
        clock.advance(2)
        passes = client.passes
        assert courier.make_pass() == 2
        assert client.passes == passes + 1
        del quick
        gc.collect()
        assert courier.looks_after_its_storages()
        clock.advance(2)
        assert courier.make_pass() == 60

    def test_a_pass_with_no_storage_due_asks_redis_nothing(self, clock):
        client = stepwise.Client(stepwise.Redis(clock))
        storage = self.storage(client, 60, "slow")
        clock.advance(1)
        passes = client.passes
        assert stepwise.courier_of(storage).make_pass() == 59
        assert client.passes == passes

    def test_the_time_of_redis_is_asked_once_for_all_openings(self, clock):
        client = stepwise.Client(stepwise.Redis(clock))
        storages = [self.storage(client, 60, str(n)) for n in range(3)]
        for storage in storages:
            CircuitBreaker(state_storage=storage).open()
        stepwise.courier_of(storages[0]).go()
        assert client.times == 1

    def test_a_clock_that_fails_is_asked_once(self, clock):
        """If each of two hundred circuits waited five seconds for the time, a pass
        would take too long."""
        client = stepwise.Client(stepwise.Redis(clock))
        storages = [self.storage(client, 60, str(n)) for n in range(3)]
        for storage in storages:
            CircuitBreaker(state_storage=storage).open()

        def no_time():
            client.times += 1
            raise redis.TimeoutError

        client.time = no_time
        with contextlib.suppress(redis.TimeoutError):
            stepwise.courier_of(storages[0]).go()
        assert client.times == 1
