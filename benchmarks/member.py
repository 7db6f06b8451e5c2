"""One process of a fleet that shares circuits; does what it is asked, line by line.

    python member.py LIBRARY URL

The library is a class in ``libraries.py``, to be found in the environment that runs
this; the URL is that of a Redis. Each line of the input is an object in JSON, the
name of a method of `Member` and its arguments; each line of the output its answer.
``fleet.py`` starts members, and says what their answers mean.
"""

import asyncio
import contextlib
import gc
import itertools
import json
import sys
import threading
import time
import traceback

from libraries import HOUR, LIBRARIES, NEVER
from worker import CALL, CATCH, Boom, bare, enough, fail, succeed, timer


class Member:
    def __init__(self, library, url):
        self.library = LIBRARIES[library]()
        self.expected = (Boom, self.library.Rejected)
        self.url = url
        self.guarded = {}  # functions by the names of their circuits
        self.failing, self.takes, self.reached = True, 0, []  # the guarded service

    # Costs

    def prepare(self):
        """Guard a function for each path of a call; go each path once."""

        def shared(name, fail_max, func):
            guarded = self.library.shared(self.url, name, fail_max, HOUR)(func)
            with contextlib.suppress(*self.expected):
                guarded(1, 2)
            return guarded

        self.guarded = {
            "closed": shared("closed", NEVER, succeed),
            "failing": shared("failing", NEVER, fail),
            "rejected": shared("rejected", 1, fail),
        }

    def costs(self, path, samples):
        """Seconds for a bare call, one that is guarded by a breaker with its circuit
        in memory (of this library only) and one whose circuit is shared."""
        func = succeed if path == "closed" else fail
        functions = [bare(func)]
        if self.library.requirement is None:
            breaker = self.library.breaker(fail_max=1 if path == "rejected" else NEVER)
            functions.append(self.library.decorate(breaker, func))
            with contextlib.suppress(*self.expected):
                functions[-1](1, 2)
        functions.append(self.guarded[path])
        statement = CALL if path == "closed" else CATCH
        timers = [timer(statement, w, expected=self.expected) for w in functions]
        # So long that what goes on behind a call is a part of its own sample.
        repeated = [(timed, enough(timed, 0.01)) for timed in timers]
        return [
            [timed.timeit(number) / number for timed, number in repeated]
            for _ in range(samples)
        ]

    def repeat(self, path, count, pause):
        """Make calls. Redis is asked how many round trips they were."""
        guarded = self.guarded[path]
        for _ in range(count):
            with contextlib.suppress(*self.expected):
                guarded(1, 2)
            if pause:
                time.sleep(pause)

    def share_many(self, count):
        """Guard so many functions, each with a circuit of its own. Returns how many
        threads that took."""
        before = threading.active_count()
        for number in range(count):
            shared = self.library.shared(self.url, f"many {number}", 5, HOUR)
            self.guarded[number] = shared(succeed)
            self.guarded[number](1, 2)
        return threading.active_count() - before

    def rest(self, seconds):
        """Make no calls. Returns the share of a core that it took."""
        before, began = time.process_time(), time.perf_counter()
        time.sleep(seconds)
        used, elapsed = time.process_time() - before, time.perf_counter() - began
        return used / elapsed

    # Life in a fleet

    def join(self, name, fail_max, timeout):
        """Share this circuit, and no other."""

        def service(a, b):
            self.reached.append(time.time())
            time.sleep(self.takes)
            if self.failing:
                raise Boom

        self.guarded = {}
        gc.collect()
        decorate = self.library.shared(self.url, name, fail_max, timeout)
        self.guarded[name] = decorate(service)

    def calls(self, name, begin, end, pause, takes=0, failing=True):
        """Make calls from the one time to the other, at least one. Returns how many,
        and when those began that reached the service."""
        guarded = self.guarded[name]
        self.failing, self.takes, self.reached = failing, takes, []
        time.sleep(max(0, begin - time.time()))
        for made in itertools.count(1):
            with contextlib.suppress(*self.expected):
                guarded(1, 2)
            if time.time() + pause >= end:
                return {"made": made, "reached": self.reached}
            time.sleep(pause)

    def stall(self, name, begin, end, guard=True):
        """What callers of a service that fails meet between the two times, in an
        event loop: how long it stood still at most, and the longest call."""
        return asyncio.run(self._stall(name, begin, end, guard))

    async def _stall(self, name, begin, end, guard):
        gaps, calls = [], []

        async def service(a, b):
            raise Boom

        async def tick():
            before = time.perf_counter()
            while time.time() < end:
                await asyncio.sleep(0.001)
                now = time.perf_counter()
                if time.time() > begin:
                    gaps.append(now - before)
                before = now

        async def call(guarded):
            while time.time() < end:
                began = time.perf_counter()
                # What a library raises when it loses Redis is another matter.
                with contextlib.suppress(Exception):
                    await guarded(1, 2)
                if time.time() > begin:
                    calls.append(time.perf_counter() - began)
                await asyncio.sleep(0.01)

        if guard:
            shared = self.library.shared_by_coroutines
            service = (await shared(self.url, name, 5, 1))(service)
        await asyncio.gather(tick(), *(call(service) for _ in range(4)))
        return {"gap": max(gaps), "call": max(calls)}


def main(library, url):
    member = Member(library, url)
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            answer = {"answer": getattr(member, asked.pop("do"))(**asked)}
        except Exception:
            answer = {"failed": traceback.format_exc()}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
