"""The counts and moves of a process reach the fleet, however short the process lives
and whenever Redis first answers. Over a real server."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time

import pytest
import redis
from support import PATIENCE, fail, until

from pybreaker import CircuitBreaker, CircuitRedisStorage

PRELUDE = """
import multiprocessing, os, signal, sys, threading, time
import redis, stepwise
from pybreaker import CircuitBreaker, CircuitBreakerError, CircuitRedisStorage

signal.alarm(60)  # what hangs is killed
stepwise.let_redis_be_silent()  # a busy machine may delay an answer
port, namespace = int(sys.argv[1]), sys.argv[2]

def boom():
    print("the service is called", flush=True)
    raise ZeroDivisionError

def fail(breaker):
    try:
        breaker.call(boom)
    except (ZeroDivisionError, CircuitBreakerError) as exc:
        print(type(exc).__name__, flush=True)

def breaker_of(fail_max=3, number="", client=None, **settings):
    client = client or redis.Redis(port=port)
    settings.setdefault("patience", 30)
    storage = CircuitRedisStorage("closed", client, namespace + number, **settings)
    return CircuitBreaker(fail_max, state_storage=storage)
"""


@pytest.fixture
def run(server, namespace):
    """A function that runs a program in a process and returns the printed lines."""

    def run(program, port=server.port):
        done = subprocess.run(
            [
                *(sys.executable, "-c", PRELUDE + textwrap.dedent(program)),
                *(str(port), namespace),
            ],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            capture_output=True,
            text=True,
            timeout=2 * PATIENCE,
        )
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout.splitlines()

    return run


@pytest.fixture
def key(server, namespace):
    """The value of a key of the circuit."""
    return lambda name, number="": server.key(namespace + number, name)


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")


def test_a_command_that_is_run_again_and_again_opens_the_circuit(run, key):
    """Each run makes one call and ends, long before a view could confirm the count."""
    program = "fail(breaker_of())"
    failed = ["the service is called", "ZeroDivisionError"]
    assert run(program) == failed
    assert run(program) == failed
    assert run(program) == ["the service is called", "CircuitBreakerError"]
    assert (key("state"), key("fail_counter")) == ("open", "3")
    assert run(program) == ["CircuitBreakerError"]


def test_all_circuits_of_a_program_are_delivered_at_its_end(run, key):
    """This holds also for circuits of other clients, and for storages that the program
    has dropped."""
    run("""
        client = redis.Redis(port=port)
        for number in range(50):
            shared = client if number % 10 else None
            fail(breaker_of(1, f"-{number}", shared))
    """)
    for number in range(50):
        assert key("state", f"-{number}") == "open"


@needs_fork
def test_an_asyncio_client_may_look_names_up_after_a_fork_and_at_the_end(run, key):
    """A process that ends can start no thread for that, and a process that forks should
    not."""
    run("""
        import atexit, redis.asyncio, warnings
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads at a fork
        client = redis.asyncio.Redis(host="localhost", port=port)
        breaker = breaker_of(10, client=client, refresh=60)
        names = [thread.name for thread in threading.enumerate()]
        assert not [name for name in names if "asyncio" in name], names
        if not os.fork():
            os._exit(0)
        atexit.register(fail, breaker)
    """)
    assert key("fail_counter") == "1"


@needs_fork
@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_a_child_that_ends_at_once_delivers_its_counts(run, key, method, tmp_path):
    """A `multiprocessing.Process` runs no functions of `atexit`."""
    if method == "forkserver":
        # Such a child makes its own storage.
        program = tmp_path / "work.py"
        program.write_text(f"""{PRELUDE}
def work():
    fail(breaker_of())

if __name__ == "__main__":
    context = multiprocessing.get_context("forkserver")
    child = context.Process(target=work)
    child.start()
    child.join()
    assert child.exitcode == 0
""")
        run(f"""
            import subprocess
            command = [sys.executable, {str(program)!r}, *sys.argv[1:]]
            assert subprocess.run(command).returncode == 0
        """)
    else:
        run("""
            breaker = breaker_of(refresh=60)
            child = multiprocessing.get_context("fork").Process(
                target=fail, args=(breaker,)
            )
            child.start()
            child.join()
            assert child.exitcode == 0
        """)
    assert key("fail_counter") == "1"


@needs_fork
def test_a_child_that_trips_and_ends_at_once_opens_the_fleets_circuit(run, key):
    run("""
        breaker = breaker_of(refresh=60)
        def work():
            for _ in range(3):
                fail(breaker)
        child = multiprocessing.get_context("fork").Process(target=work)
        child.start()
        child.join()
    """)
    assert (key("state"), key("fail_counter")) == ("open", "3")


@needs_fork
def test_a_grandchild_delivers_its_counts_too(run, key):
    """The parent, the child and the grandchild each deliver their counts once."""
    run("""
        breaker = breaker_of(10, refresh=60)
        fork = multiprocessing.get_context("fork")

        def spawn(depth):
            fail(breaker)
            if depth:
                child = fork.Process(target=spawn, args=(depth - 1,))
                child.start()
                child.join()

        for _ in range(2):
            spawn(2)
    """)
    assert key("fail_counter") == "6"


@needs_fork
def test_a_child_has_one_courier_for_all_circuits_of_a_client(run, key):
    """The parent has one courier afterwards, too. All circuits of both are
    delivered."""
    run("""
        client = redis.Redis(port=port)
        breakers = [breaker_of(9, f"-{n}", client) for n in range(20)]
        child = multiprocessing.get_context("fork").Process

        def work():
            couriers = [t for t in threading.enumerate() if "courier" in t.name]
            assert len(couriers) == 2, couriers
            for breaker in breakers:
                fail(breaker)

        work()
        processes = [child(target=work) for _ in range(2)]
        for process in processes:
            process.start()
            work()
        for process in processes:
            process.join()
            assert process.exitcode == 0
    """)
    for number in range(20):
        assert key("fail_counter", f"-{number}") == "5"


@needs_fork
def test_a_child_waits_no_longer_than_its_patience(run, proxies, server):
    """The server does not answer."""
    proxy = proxies(server)
    proxy.swallow()
    (took,) = run(
        """
        import logging
        logging.disable()
        breaker = breaker_of(refresh=60, patience=0.3)
        child = multiprocessing.get_context("fork").Process(target=breaker.open)
        child.start()
        began = time.monotonic()
        child.join()
        print(time.monotonic() - began, flush=True)
        os._exit(0)  # some clients wait for ever
        """,
        port=proxy.port,
    )
    assert float(took) < 15


@pytest.mark.parametrize("how", ["swallow", "cut"])
def test_a_trip_made_before_redis_first_answered_stands_and_is_sent(
    server, proxies, namespace, closing, key, how
):
    """Redis is empty when Redis first answers, and does not say that the circuit is
    closed."""
    proxy = proxies(server)
    getattr(proxy, how)()
    client = closing(redis.Redis(port=proxy.port))
    storage = CircuitRedisStorage("closed", client, namespace, refresh=5)
    breaker = CircuitBreaker(3, state_storage=storage)
    fail(breaker, 3)
    assert breaker.current_state == "open"
    proxy.heal()
    seen = set()
    until(lambda: seen.add(breaker.state.name) or key("state") == "open")
    time.sleep(0.1)
    assert seen | {breaker.state.name} == {"open"}
