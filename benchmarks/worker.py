"""Measures one library once, in this process; prints the figures as JSON.

    python worker.py LIBRARY TASK [--fast] [--port PORT]

LIBRARY is a class in ``libraries.py``; the library is installed where this script
runs. ``run.py`` starts workers by turns, and explains their figures.

Each guarded call is timed right after a bare wrapper that does nothing, so that both
meet the same machine; a figure is such a pair of times.
"""

import argparse
import contextlib
import functools
import http.client
import json
import random
import sys
import threading
import time
import timeit
import traceback
import tracemalloc

from libraries import HOUR, LIBRARIES, NEVER


class Boom(Exception):
    """What the guarded service raises."""


def succeed(a, b):
    return a


async def succeed_later(a, b):
    return a


def succeed_in_parts(a, b):
    yield a


def fail(a, b):
    raise Boom


def sleep(a, b):
    time.sleep(0.01)


def bare(f):
    @functools.wraps(f)
    def w(*a, **k):
        return f(*a, **k)

    return w


def bare_coroutine_function(f):
    @functools.wraps(f)
    async def w(*a, **k):
        return await f(*a, **k)

    return w


def bare_generator_function(f):
    @functools.wraps(f)
    def w(*a, **k):
        return (yield from f(*a, **k))

    return w


# The statements that are timed.
CALL = "w(1, 2)"
CALL_OF_FUNC = "w(func, 1, 2)"
AWAIT = """\
try:
    w(1, 2).send(None)
except StopIteration:
    pass
"""
CATCH = """\
try:
    w(1, 2)
except expected:
    pass
"""
ITERATE = """\
for _ in w(1, 2):
    pass
"""
GO_ROUND = """\
for each in w:
    each(1, 2)
"""


def timer(statement, w, before="pass", **names):
    # Collecting garbage is a part of what a call costs, so timeit may not stop it.
    setup = f"import gc; gc.enable(); {before}"
    return timeit.Timer(statement, setup, globals={"w": w, **names})


def enough(timed, seconds):
    """How many repetitions of `timed` take about this many seconds."""
    number = 1
    while min(timed.repeat(3, number)) < seconds:
        number *= 2
    return number


def pairs(without, guarded, samples, each=1):
    """Seconds for a bare and for a guarded call, `samples` times; `each` is the
    number of calls in the statement."""
    # Most samples are so short that they end before another process has its turn.
    repeated = [(timed, enough(timed, 0.0003)) for timed in (without, guarded)]
    return [
        tuple(timed.timeit(number) / (number * each) for timed, number in repeated)
        for _ in range(samples)
    ]


def measure_calls(library, options):
    """One caller, every path of a call."""
    samples = 20 if options.fast else 60

    def decorated(func=succeed, **how):
        return library.decorate(library.breaker(**how), func)

    def closed():
        return timer(CALL, bare(succeed)), timer(CALL, decorated())

    def call():
        guarded = library.call(library.breaker())
        return timer(CALL, bare(succeed)), timer(CALL_OF_FUNC, guarded, func=succeed)

    def coroutine():
        guarded = library.decorated_coroutine_function(succeed_later)
        without = bare_coroutine_function(succeed_later)
        return timer(AWAIT, without), timer(AWAIT, guarded)

    def generator():
        guarded = library.decorated_generator_function(succeed_in_parts)
        without = bare_generator_function(succeed_in_parts)
        return timer(ITERATE, without), timer(ITERATE, guarded)

    def failure():
        guarded = timer(CATCH, decorated(fail), expected=Boom)
        return timer(CATCH, bare(fail), expected=Boom), guarded

    def rejection():
        w = decorated(fail, fail_max=1)
        with contextlib.suppress(Boom, library.Rejected):
            w(1, 2)
        guarded = timer(CATCH, w, expected=library.Rejected)
        return timer(CATCH, bare(fail), expected=Boom), guarded

    def transition_listener():
        guarded = decorated(listeners=[library.transition_listener])
        return timer(CALL, bare(succeed)), timer(CALL, guarded)

    def unchanged_listener():
        guarded = decorated(listeners=[library.unchanged_listener])
        return timer(CALL, bare(succeed)), timer(CALL, guarded)

    def empty_listener():
        guarded = decorated(listeners=[library.empty_listener])
        return timer(CALL, bare(succeed)), timer(CALL, guarded)

    paths = {
        closed: library.decorate,
        call: library.call,
        coroutine: library.decorated_coroutine_function,
        generator: library.decorated_generator_function,
        failure: library.decorate,
        rejection: library.decorate,
        transition_listener: library.transition_listener,
        unchanged_listener: library.unchanged_listener,
        empty_listener: library.empty_listener,
    }
    return measured(paths, samples)


def measured(paths, samples):
    """The pairs of each path, by the path's name."""
    found = {}
    for path, there_is in paths.items():
        if there_is is None:
            continue
        try:
            found[path.__name__] = pairs(*path(), samples)
        except Exception:  # the other paths may still be measured
            traceback.print_exc()
            found[path.__name__] = "failed"
    return found


def measure_settings(library, options):
    """What the settings cost that are off unless they are given."""
    window = {"window_size": NEVER}
    every = {
        **window,
        "window_seconds": HOUR,
        "max_reset_timeout": 2 * HOUR,
        "include": [Boom],
        "ignore": [LookupError],
        "failure_result": lambda result: False,
    }

    def success(failures, **settings):
        """Two timers, of a bare and of a guarded call, with `failures` remembered."""
        breaker = library.breaker(**settings)
        w = library.decorate(breaker, succeed)
        for _ in range(failures):
            with contextlib.suppress(Boom):
                breaker.call(fail, 1, 2)
        if breaker.fail_counter != failures:
            raise RuntimeError(f"{breaker!r} has not counted {failures} failures")
        return timer(CALL, bare(succeed)), timer(CALL, w)

    def failing(**settings):
        breaker = library.breaker(**settings)
        w = library.decorate(breaker, fail)
        plain = timer(CATCH, bare(fail), expected=Boom)
        # Each sample begins with an empty window: a window in use remembers fewer
        # failures than fail_max, and not all failures of a benchmark.
        names = {"expected": Boom, "breaker": breaker}
        return plain, timer(CATCH, w, "breaker.close()", **names)

    def rejected(**settings):
        breaker = library.breaker(**settings)
        breaker.open()
        w = library.decorate(breaker, fail)
        plain = timer(CATCH, bare(fail), expected=Boom)
        return plain, timer(CATCH, w, expected=library.Rejected)

    def unset_success():
        return success(0)

    def window_success():
        return success(0, **window)

    def window_success_after_failures():
        return success(10, **window)

    def every_success():
        return success(0, **every)

    def every_success_after_failures():
        return success(10, **every)

    def unset_failure():
        return failing()

    def window_failure():
        return failing(**window)

    def every_failure():
        return failing(**every)

    def unset_rejection():
        return rejected()

    def every_rejection():
        return rejected(**every)

    paths = (
        unset_success,
        window_success,
        window_success_after_failures,
        every_success,
        every_success_after_failures,
        unset_failure,
        window_failure,
        every_failure,
        unset_rejection,
        every_rejection,
    )
    return measured(dict.fromkeys(paths, True), 20 if options.fast else 60)


def in_threads(count, work):
    """Seconds until each of `count` threads has done the work once."""
    began, ended = [], []
    start = threading.Barrier(count, lambda: began.append(time.perf_counter()))

    def run():
        start.wait()
        work()
        ended.append(time.perf_counter())

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(ended) < count:
        raise RuntimeError("a thread failed")
    return max(ended) - began[0]


def hammer(timed, threads, seconds=0.02):
    """Seconds for a call when `threads` threads make calls and do nothing else, each
    for at least as long as some turns of a thread last."""
    number = enough(timed, seconds)
    work = functools.partial(timed.timeit, number)
    return in_threads(threads, work) / (number * threads)


def measure_threads(library, options):
    """Threads in calls that wait, and threads in calls that don't."""
    if library.decorate is None:
        return {}
    calls, samples = (2, 2) if options.fast else (5, 2)
    without, guarded = bare(sleep), library.decorate(library.breaker(), sleep)

    def slow(w):
        work = functools.partial(timer(CALL, w).timeit, calls)
        return in_threads(32, work) / (32 * calls)

    waiting = [(slow(without), slow(guarded)) for _ in range(samples)]

    without = timer(CALL, bare(succeed))
    guarded = timer(CALL, library.decorate(library.breaker(), succeed))
    growth = [
        tuple(hammer(each, 8) / hammer(each, 1) for each in (without, guarded))
        for _ in range(samples)
    ]
    return {"waiting": waiting, "hammering": growth}


def measure_growth(library, options):
    """What more threads, breakers, listeners and exclusions cost."""
    samples = 10 if options.fast else 30
    plain = timer(CALL, bare(succeed))
    raising = timer(CATCH, bare(fail), expected=Boom)

    def decorated(func=succeed, **how):
        return library.decorate(library.breaker(**how), func)

    guarded = timer(CALL, decorated())
    seconds = 0.005 if options.fast else 0.02
    threads = {
        count: [(hammer(plain, count, seconds), hammer(guarded, count, seconds))]
        for count in (1, 2, 4, 8, 16, 32, 64)
    }

    breakers, making = {}, {}
    for count in counts_of_breakers(options):
        began = time.perf_counter()
        made = [library.breaker() for _ in range(count)]
        making[count] = [(time.perf_counter() - began) / count]
        without = [bare(succeed) for _ in range(count)]
        guarded = [library.decorate(breaker, succeed) for breaker in made]
        for functions in without, guarded:
            random.shuffle(functions)  # not the order in which they lie in memory
        rounds = timer(GO_ROUND, without), timer(GO_ROUND, guarded)
        breakers[count] = pairs(*rounds, 3 if count > 1000 else samples, each=count)
        del made, without, guarded, rounds

    def with_listeners(listener, count):
        guarded = decorated(listeners=[listener] * count)
        return pairs(plain, timer(CALL, guarded), samples)

    def excluding(count, func, without, statement):
        others = [type(f"Other{n}", (Exception,), {}) for n in range(count)]
        guarded = timer(statement, decorated(func, exclude=others), expected=Boom)
        return pairs(without, guarded, samples)

    some = (0, 1, 2, 4, 8)
    return {
        "threads": threads,
        "breakers": breakers,
        "making": making,
        "unchanged_listeners": {
            count: with_listeners(library.unchanged_listener, count) for count in some
        },
        "empty_listeners": {
            count: with_listeners(library.empty_listener, count) for count in some
        },
        "exclusions": {count: excluding(count, succeed, plain, CALL) for count in some},
        "exclusions_failing": {
            count: excluding(count, fail, raising, CATCH) for count in some
        },
    }


def counts_of_breakers(options):
    most = 3 if options.fast else 5
    return [10**power for power in range(most + 1)]


def memory(library, count):
    """Bytes for each of `count` new breakers, without the text of their names."""
    names = [f"service {n}" for n in range(count)]
    breakers = [None] * count
    tracemalloc.start()
    try:
        for n, name in enumerate(names):
            breakers[n] = library.fresh(name)
        allocated, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return allocated / count


def measure_memory(library, options):
    """The memory of breakers that guard no calls yet."""
    library.fresh("the first one")  # and all that the library makes only once
    counts = {10_000} if library.requirement else {10_000, *counts_of_breakers(options)}
    return {"memory": {count: [memory(library, count)] for count in sorted(counts)}}


def measure_request(library, options):
    """An HTTP request to another process, over a connection that is kept, and a
    call beside it."""
    connection = http.client.HTTPConnection("127.0.0.1", options.port)

    def get():
        connection.request("GET", "/")
        connection.getresponse().read()

    request = timeit.Timer(get)
    guarded = timer(CALL, library.decorate(library.breaker(), succeed))
    get()
    number = enough(guarded, 0.01)
    requests = 20 if options.fast else 50
    return {
        "request": [
            (request.timeit(requests) / requests, guarded.timeit(number) / number)
            for _ in range(5)
        ]
    }


TASKS = {
    "calls": measure_calls,
    "settings": measure_settings,
    "threads": measure_threads,
    "growth": measure_growth,
    "memory": measure_memory,
    "request": measure_request,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("library", choices=LIBRARIES)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--fast", action="store_true", help="smaller samples")
    parser.add_argument("--port", type=int, help="where the HTTP server listens")
    options = parser.parse_args()
    library = LIBRARIES[options.library]()
    measure = functools.partial(TASKS[options.task], library, options)
    json.dump(library.run(measure), sys.stdout)


if __name__ == "__main__":
    main()
