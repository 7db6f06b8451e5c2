"""Every client object that may be given to the storage, against each server."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
from datetime import datetime, timedelta, timezone

import fleet
import pytest
import redis
import redis.asyncio
import stepwise
import valkey
import valkey.asyncio
from fleet import ask_all, installed
from support import PATIENCE, until

import pybreaker
from pybreaker import CircuitBreaker, CircuitBreakerError, CircuitRedisStorage

pytestmark = pytest.mark.usefixtures("unhurried")


def boom():
    raise ZeroDivisionError


def calls_are_shared(mine, theirs):
    """Two breakers share failures, an opening, a trial and a closing: all that a
    storage needs a client for."""

    def soon(condition):
        """Let the couriers go at once, so that the test need not wait for the next
        refresh."""

        def looked():
            for breaker in (mine, theirs):
                stepwise.go_at_once(breaker._state_storage)
            return condition()

        until(looked)

    for breaker in (mine, theirs):
        with pytest.raises(ZeroDivisionError):
            breaker.call(boom)
    soon(lambda: mine.fail_counter == theirs.fail_counter == 2)
    with pytest.raises(CircuitBreakerError) as caught:
        mine.call(boom)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    soon(lambda: theirs.current_state == "open")
    assert 0 < theirs.retry_after <= 60
    # The timeout is over.
    mine._state_storage.opened_at = datetime.now(timezone.utc) - timedelta(seconds=100)
    soon(lambda: mine.retry_after == theirs.retry_after == 0.0)

    def work():
        with pytest.raises(CircuitBreakerError) as rejected:
            theirs.call(boom)
        assert rejected.value.__cause__ is None  # `boom` did not run
        return "done"

    assert mine.call(work) == "done"
    soon(lambda: theirs.current_state == "closed")
    mine.half_open()
    soon(lambda: theirs.current_state == "half-open")
    theirs.open()
    soon(lambda: mine.current_state == "open")
    mine.close()
    soon(lambda: theirs.current_state == "closed")


@pytest.fixture
def share(namespace):
    """Two breakers, each with a client of its own that `make` makes, share calls."""

    def share(make, **settings):
        breakers = []
        for _ in range(2):
            settings = {"refresh": 0.25, "patience": PATIENCE, **settings}
            storage = CircuitRedisStorage("closed", make(), namespace, **settings)
            breakers.append(CircuitBreaker(3, 60, state_storage=storage))
        calls_are_shared(*breakers)

    return share


@pytest.mark.parametrize("module", [redis, valkey], ids=["redis-py", "valkey-py"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"decode_responses": True},
        {"decode_responses": True, "encoding": "latin-1"},
        {"protocol": 3},
        {"single_connection_client": True},
        {"socket_timeout": 5, "health_check_interval": 1},
    ],
    ids=lambda options: "+".join(options) or "as it is",
)
def test_a_client_may_have_any_options(either_server, share, closing, module, options):
    """The client may return bytes or text."""
    client = module.Redis if module is redis else module.Valkey
    share(lambda: closing(client(port=either_server.port, **options)))


@pytest.mark.parametrize("module", [redis, valkey], ids=["redis-py", "valkey-py"])
def test_a_client_may_be_made_from_a_url_or_share_a_pool(
    server, share, closing, module, namespace
):
    """The usual clients of Django and Flask are made so."""
    client = module.Redis if module is redis else module.Valkey
    scheme = "redis" if module is redis else "valkey"
    url = f"{scheme}://127.0.0.1:{server.port}/1"
    share(lambda: closing(client.from_url(url)))
    assert server.keys(namespace) == {}  # they are in the other database
    pool = module.ConnectionPool(port=server.port, max_connections=3)
    share(lambda: closing(client(connection_pool=pool)))
    pool.disconnect()


def test_a_client_may_speak_through_a_unix_socket(tmp_path, servers, closing, share):
    """Only some servers offer a socket."""
    if not hasattr(socket, "AF_UNIX"):
        pytest.skip("needs Unix sockets")
    path = str(tmp_path / "s")
    server = servers("valkey_server")
    process = subprocess.Popen(
        [server.binary, "--port", "0", "--unixsocket", path, "--save", ""],
        stdout=subprocess.DEVNULL,
        cwd=tmp_path,
    )
    try:
        until(lambda: os.path.exists(path))
        share(lambda: closing(redis.Redis(unix_socket_path=path)))
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    "client",
    [redis.asyncio.Redis, valkey.asyncio.Valkey],
    ids=["redis-py", "valkey-py"],
)
@pytest.mark.parametrize("decode", [False, True])
def test_a_client_may_be_for_asyncio(either_server, share, client, decode):
    """No event loop runs in the process."""

    async def make():  # in Python 3.9 only a coroutine can
        return client(port=either_server.port, decode_responses=decode)

    share(lambda: asyncio.run(make()))


@pytest.mark.parametrize(
    "client",
    [redis.asyncio.Redis, valkey.asyncio.Valkey],
    ids=["redis-py", "valkey-py"],
)
def test_the_loop_of_an_asyncio_client_is_left_alone(server, namespace, client):
    """The program uses its client in its own loop before, between and after the calls.
    The storage opens no connection in that loop and uses none of the client's
    connections."""

    async def main():
        mine = client(port=server.port)
        await mine.set("mine", "1")
        storage = CircuitRedisStorage("closed", mine, namespace, refresh=0.02)
        breaker = CircuitBreaker(2, 0.2, state_storage=storage)
        tasks = asyncio.all_tasks()
        outcomes = []

        async def fail():
            await mine.incr("mine")
            raise ZeroDivisionError

        async def succeed():
            return await mine.incr("mine")

        for func in [fail] * 3 + [succeed] * 50:
            try:
                outcomes.append(type(await breaker.call_async(func)))
            except Exception as exc:
                outcomes.append(type(exc))
            await asyncio.sleep(0.01)
        assert asyncio.all_tasks() == tasks
        assert set(outcomes) == {ZeroDivisionError, CircuitBreakerError, int}
        assert breaker.current_state == "closed"
        assert int(await mine.get("mine")) > 3
        await mine.aclose()

    asyncio.run(main())
    until(lambda: server.key(namespace, "state") == "closed")


def test_an_asyncio_client_may_be_used_by_plain_calls(server, namespace):
    """The calls come from threads without a loop, while a loop runs in another thread
    and after that loop has ended."""

    async def main():
        client = redis.asyncio.Redis(port=server.port)
        storage = CircuitRedisStorage("closed", client, namespace, refresh=0.02)
        breaker = CircuitBreaker(1, 0.2, state_storage=storage)

        def work():
            with pytest.raises(CircuitBreakerError):
                breaker.call(boom)
            until(lambda: breaker.retry_after == 0.0)
            return breaker.call(int)

        assert await asyncio.to_thread(work) == 0
        return breaker

    breaker = asyncio.run(main())
    breaker.open()
    until(lambda: server.key(namespace, "state") == "open")


@pytest.fixture(scope="module")
def cluster():
    """One server that has all slots of a cluster."""
    server = fleet.Server(fleet.valkey_server(), cluster=True)
    yield server
    server.end()


@pytest.mark.parametrize("module", [redis, valkey], ids=["redis-py", "valkey-py"])
@pytest.mark.parametrize("cluster_mode", [False, True])
@pytest.mark.parametrize("decode", [False, True])
def test_a_client_may_be_a_clusters(
    cluster, share, closing, module, cluster_mode, decode
):
    """The keys need no hash tags, as no command has more than one key."""
    client = module.RedisCluster if module is redis else module.ValkeyCluster

    def make():
        return closing(
            client(host="127.0.0.1", port=cluster.port, decode_responses=decode)
        )

    share(make, cluster_mode=cluster_mode)


def test_cluster_mode_is_accepted_for_a_client_that_is_no_clusters(
    server, share, closing
):
    """The parameter has no effect, but programs in the field pass it."""
    share(lambda: closing(redis.Redis(port=server.port)), cluster_mode=True)


@pytest.mark.parametrize("kind", ["redis", "redis.asyncio", "redis.cluster"])
def test_redis_py_may_be_as_old_as_5(kind, server, cluster, fleet_of, namespace):
    """The other tests use the newest release for this Python."""
    old = installed("redis==5.0.*")
    port = cluster.port if kind == "redis.cluster" else server.port
    workers = fleet_of(
        port,
        2,
        path=[old],
        client=kind,
        breaker={"fail_max": 3, "reset_timeout": 0.5},
        storage={"refresh": 0.2, "patience": PATIENCE},
        unhurried=True,
    )
    assert {version[:4] for version in ask_all(workers, "client_version")} == {"5.0."}
    mine, theirs = workers
    mine.ask("call", "fail", times=3)
    until(lambda: theirs.ask("state") == "open")
    until(lambda: theirs.ask("call", "ok")["outcomes"] == {"ok": 1})
    until(lambda: ask_all(workers, "state") == ["closed", "closed"])
    theirs.ask("do", "open")
    until(lambda: mine.ask("state") == "open")
    assert fleet.about_redis(mine) == fleet.about_redis(theirs) == []


def local_proxy(client):
    """Werkzeug's proxy of a client that only the calling thread has."""
    local = pytest.importorskip("werkzeug.local")
    context = local.Local()
    context.client = client
    return context("client")


def test_a_client_may_be_behind_a_proxy(server, share, closing):
    """Flask programs have such a proxy from Werkzeug. The proxy's class has the methods
    of an asyncio client for a client of any kind."""
    share(lambda: local_proxy(closing(redis.Redis(port=server.port))))


def test_an_asyncio_client_may_be_behind_a_proxy(server, share):
    async def make():  # in Python 3.9 only a coroutine can
        return redis.asyncio.Redis(port=server.port)

    share(lambda: local_proxy(asyncio.run(make())))


def test_a_client_may_be_behind_an_object_that_passes_on_what_it_lacks(
    server, share, closing
):
    """The object of Flask-Redis is of this kind."""

    class Passing:
        def __init__(self, client):
            self._client = client

        def __getattr__(self, name):
            return getattr(self._client, name)

    share(lambda: Passing(closing(redis.Redis(port=server.port))))


def test_a_proxy_and_its_client_have_one_courier(server, closing, namespace):
    client = closing(redis.Redis(port=server.port))
    behind = [
        CircuitRedisStorage("closed", each, f"{namespace}-{number}")
        for number, each in enumerate([client, local_proxy(client)])
    ]
    assert len({stepwise.courier_of(storage) for storage in behind}) == 1


def test_the_client_that_was_given_is_there_by_the_name_that_programs_use(
    server, closing, namespace
):
    proxy = local_proxy(closing(redis.Redis(port=server.port)))
    storage = CircuitRedisStorage("closed", proxy, namespace)
    assert storage._redis is proxy


def test_programs_can_tell_the_storage_from_one_in_memory(server, closing, namespace):
    """Programs that fall back to memory compare the storage's class."""
    client = closing(redis.Redis(port=server.port))
    storage = CircuitRedisStorage("closed", client, namespace)
    assert not isinstance(storage, pybreaker.CircuitMemoryStorage)
    assert isinstance(storage, pybreaker.CircuitBreakerStorage)
    assert storage.name == "redis"


class NoClient:
    """An object with only one or two of a client's methods."""

    def get(self, key):
        return None

    def set(self, key, value):
        return True


@pytest.mark.parametrize(
    "thing",
    [
        None,
        "redis://127.0.0.1",
        6379,
        {"state": "closed"},
        object(),
        NoClient(),
        redis.Redis,
        redis,
        redis.asyncio.Redis,
        redis.ConnectionPool(),
    ],
    ids=lambda thing: type(thing).__name__,
)
def test_an_object_that_is_no_client_is_refused_with_what_is_needed(thing):
    """The storage raises at once, before a thread is started."""
    with pytest.raises(TypeError, match="redis_object") as caught:
        CircuitRedisStorage("closed", thing)
    assert "Redis" in str(caught.value)


def test_a_client_may_be_of_a_subclass(server, share, closing):
    """Instrumented clients are of subclasses."""
    commands = []

    class Counted(redis.Redis):
        def execute_command(self, *args, **options):
            commands.append(args)
            return super().execute_command(*args, **options)

    share(lambda: closing(Counted(port=server.port)))


def test_a_program_may_close_its_client(server, namespace, closing):
    """A program that closes its client does no harm: the client connects again."""
    client = closing(redis.Redis(port=server.port))
    storage = CircuitRedisStorage("closed", client, namespace, refresh=0.05)
    storage.increment_counter()
    until(lambda: server.key(namespace, "fail_counter") == "1")
    client.close()
    storage.state = "open"
    until(lambda: server.key(namespace, "state") == "open")


def test_the_module_needs_no_client_that_is_not_used(tmp_path):
    """Without both client packages the rest of the module works."""
    program = """
import sys
sys.modules["redis"] = sys.modules["valkey"] = None  # importing them fails
import pybreaker
breaker = pybreaker.CircuitBreaker()
assert breaker.call(int) == 0
try:
    pybreaker.CircuitRedisStorage("closed", object())
except TypeError as exc:
    assert "Redis" in str(exc)
"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run(
        [sys.executable, "-c", program], env=env, check=True, timeout=PATIENCE
    )


def test_a_busy_pool_holds_no_call_up(server, namespace, closing):
    """While all of the client's connections are in use, the circuit is not shared, and
    calls go on."""
    pool = redis.BlockingConnectionPool(
        port=server.port, max_connections=1, timeout=None
    )
    client = closing(redis.Redis(connection_pool=pool))
    storage = CircuitRedisStorage("closed", client, namespace, refresh=0.05)
    breaker = CircuitBreaker(1000, state_storage=storage)
    taken = pool.get_connection() if _needs_no_name(pool) else pool.get_connection("_")
    began = time.monotonic()
    for _ in range(20):
        with pytest.raises(ZeroDivisionError):
            breaker.call(boom)
    assert time.monotonic() - began < PATIENCE
    pool.release(taken)
    until(lambda: server.key(namespace, "fail_counter") not in (None, "0"))


def _needs_no_name(pool):
    return int(redis.__version__.split(".")[0]) >= 6
