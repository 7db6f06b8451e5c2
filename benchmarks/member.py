"""One process of a fleet that shares circuits; does what each line of input says.

    python member.py LIBRARY URL

LIBRARY is a class in ``libraries.py``; the library is installed where this script
runs. URL is that of a Redis. Each line of input is an object in JSON, the name of a
method of `Member` and the arguments; each line of output is the method's answer.
``fleet.py`` starts members, and explains their answers.
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
        """Guard a function for each path of a call, and call each function once."""

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
        """Seconds for a bare call, for one whose circuit is in memory (with this
        library only) and for one whose circuit is shared."""
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
        # A sample is so long that the work behind its calls ends within the sample.
        repeated = [(timed, enough(timed, 0.01)) for timed in timers]
        return [
            [timed.timeit(number) / number for timed, number in repeated]
            for _ in range(samples)
        ]

    def repeat(self, path, count, pause):
        """Make calls; Redis counts their round trips."""
        guarded = self.guarded[path]
        for _ in range(count):
            with contextlib.suppress(*self.expected):
                guarded(1, 2)
            if pause:
                time.sleep(pause)

    def share_many(self, count):
        """Guard `count` functions, each with a circuit of its own. Returns how many
        threads the circuits have."""
        before = threading.active_count()
        for number in range(count):
            shared = self.library.shared(self.url, f"many {number}", 5, HOUR)
            self.guarded[number] = shared(succeed)
            self.guarded[number](1, 2)
        return threading.active_count() - before

    def rest(self, seconds):
        """Make no calls. Returns the share of a core that this process used."""
        before, began = time.process_time(), time.perf_counter()
        time.sleep(seconds)
        used, elapsed = time.process_time() - before, time.perf_counter() - began
        return used / elapsed

    # Life in a fleet

    def join(self, name, fail_max, timeout):
        """Share the circuit of this name, and no other."""

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
        """Make calls from `begin` to `end`, at least one. Returns how many, and the
        moments at which calls reached the service."""
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
        """Call a service that fails, in an event loop. Returns the longest stall of the
        loop and the longest call between `begin` and `end`."""
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
                # A library may raise what it likes when it loses Redis.
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
