"""Simulates outages with one library, on a clock that is moved; prints JSON.

    python simulation.py LIBRARY SCENARIO RULE [--seeds N ...] [--fast]

No thread sleeps. Before each call the clock is moved to the moment of the call, and
the breaker sees no other clock. All random numbers come from the seed, so that all
libraries see the same calls. ``effect.py`` starts this script, and explains the
figures.
"""

import argparse
import contextlib
import contextvars
import heapq
import json
import math
import operator
import random
import sys
import types
import typing


class Clock:
    """Stands in for the module ``time``; moves only when `now` is set."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now


class Boom(Exception):
    """What the service raises when it fails."""


class Rule(typing.NamedTuple):
    """When a breaker opens, and for how long."""

    fail_max: int
    window_size: typing.Optional[int] = None  # None: failures in a row
    reset_timeout: float = 15.0
    max_reset_timeout: typing.Optional[float] = None
    success_threshold: int = 2


IN_A_ROW = Rule(5)
WINDOW = Rule(25, 50)
GROWTH = {"reset_timeout": 1.0, "max_reset_timeout": 60.0}


# The libraries. Each has a method that decorates a function or a coroutine function
# with a new breaker, and the class of the error that a rejected call raises.


class PyBreaker:
    def __init__(self, clock):
        import pybreaker

        self.module, self.clock = pybreaker, clock
        self.Rejected = pybreaker.CircuitBreakerError

    @contextlib.contextmanager
    def clock_moved(self):
        """Let the library see the simulation's clock in place of the real one."""
        real, self.module.time = self.module.time, self.clock
        try:
            yield
        finally:
            self.module.time = real

    def breaker(self, rule):
        return self.module.CircuitBreaker(
            rule.fail_max,
            rule.reset_timeout,
            success_threshold=rule.success_threshold,
            window_size=rule.window_size,
            max_reset_timeout=rule.max_reset_timeout,
        )

    def guard(self, rule, func):
        return self.breaker(rule)(func)


class Interlock:
    """Opens at a share of failures in the last calls; its wait can grow."""

    def __init__(self, clock):
        import interlock

        self.module, self.clock = interlock, clock
        self.Rejected = interlock.CircuitOpenError

    clock_moved = contextlib.nullcontext  # each breaker is given the clock

    def guard(self, rule, func):
        growth = {}
        if rule.max_reset_timeout is not None:
            growth = {
                "wait_duration_backoff_multiplier": 2.0,
                "wait_duration_in_open_max": rule.max_reset_timeout,
            }
        config = self.module.Config(
            failure_rate_threshold=rule.fail_max / rule.window_size,
            minimum_number_of_calls=rule.fail_max,
            window_size=rule.window_size,
            permitted_calls_in_half_open=rule.success_threshold,
            wait_duration_in_open=rule.reset_timeout,
            **growth,
        )
        breaker = self.module.CircuitBreaker(
            name="service", config=config, clock=self.clock
        )
        return breaker(func)


class NoPanic:
    """Opens at a share of failures in the last seconds; its wait cannot grow."""

    SECONDS = 3.0  # in which 16.7 calls a second make fifty

    def __init__(self, clock):
        import nopanic

        self.module, self.clock = nopanic, clock
        self.Rejected = nopanic.CircuitOpen

    clock_moved = contextlib.nullcontext  # each breaker is given the clock

    def guard(self, rule, func):
        return self.module.circuit_breaker(
            failure_threshold=rule.fail_max / rule.window_size,
            min_calls=rule.fail_max,
            window=self.SECONDS,
            reset_timeout=rule.reset_timeout,
            half_open_max_calls=rule.success_threshold,
            clock=self.clock.monotonic,
        )(func)


class NoBreaker:
    """Clients that have no breaker."""

    Rejected = Boom
    clock_moved = contextlib.nullcontext

    def __init__(self, clock):
        self.clock = clock

    def guard(self, rule, func):
        return func


LIBRARIES = {
    library.__name__: library for library in (PyBreaker, Interlock, NoPanic, NoBreaker)
}


# A service that fails for a while.


class Phase(typing.NamedTuple):
    seconds: float
    share: float  # of the calls that fail
    kind: str  # "before", "trouble" or "after"


def trouble(share, seconds):
    """A share of the calls fails for a while; one in a hundred before and after."""
    return (
        Phase(20, 0.01, "before"),
        Phase(seconds, share, "trouble"),
        Phase(20, 0.01, "after"),
    )


def suffer(library, rule, phases, seed, breakers=1, rate=1000.0):
    """Four counts for each kind of phase: good and bad calls that were made, and good
    and bad calls that reached the service."""
    clock, uniform = library.clock, random.Random(seed).random
    random.seed(seed)  # this library draws the lengths of openings that grow
    reached = [0, 0]  # good, bad

    def service(is_bad):
        reached[is_bad] += 1
        if is_bad:
            raise Boom

    guarded = [library.guard(rule, service) for _ in range(breakers)]
    counts = {}
    log = math.log
    for seconds, share, kind in phases:
        end = clock.now + seconds
        made, before = [0, 0], list(reached)
        while True:
            now = clock.now - log(1.0 - uniform()) / rate
            if now >= end:
                break
            clock.now = now
            is_bad = uniform() < share
            made[is_bad] += 1
            try:
                guarded[int(uniform() * breakers)](is_bad)
            except (Boom, library.Rejected):
                pass
        clock.now = end
        through = [now - then for now, then in zip(reached, before)]
        counts[kind] = [*map(sum, zip(counts.get(kind, (0,) * 4), made + through))]
    return counts


def figures_of(counts):
    """The figures of the trouble, in per cent, from the counts."""
    good, bad, good_through, bad_through = counts["trouble"]
    after = counts.get("after", (0, 0, 0, 0))
    good_in_all = good + after[0]
    lost = good_in_all - good_through - after[2]
    made = good + bad
    return {
        "lost": 100 * lost / good_in_all,
        "through": 100 * bad_through / bad,
        "refused": 100 * (made - good_through - bad_through) / made,
    }


def many_breakers(library, rule, seed, fast, share):
    phases = trouble(share, 20)
    breakers = 6 if fast else 60
    counts = suffer(library, rule, phases, seed, breakers, rate=16.7 * breakers)
    return figures_of(counts)


def fifth_of_many(library, rule, seed, fast):
    """60 breakers at 16.7 calls a second each; one call in five fails for 20 s."""
    return many_breakers(library, rule, seed, fast, 0.2)


def all_of_many(library, rule, seed, fast):
    """60 breakers at 16.7 calls a second each; every call fails for 20 s."""
    return many_breakers(library, rule, seed, fast, 1.0)


def fifth_of_one(library, rule, seed, fast):
    """One breaker at 1,000 calls a second; one call in five fails for 300 s."""
    phases = [Phase(30 if fast else 300, 0.2, "trouble")]
    return figures_of(suffer(library, rule, phases, seed))


def half_of_one(library, rule, seed, fast):
    """One breaker at 1,000 calls a second; every other call fails for 60 s."""
    return figures_of(suffer(library, rule, trouble(0.5, 20 if fast else 60), seed))


def in_turn(library, rule, seed, fast):
    """One breaker at 1,000 calls a second; 2 % and 6 % fail, 20 s each in turn."""
    both = [Phase(20, 0.02, "trouble"), Phase(20, 0.06, "trouble")]
    return figures_of(suffer(library, rule, both * (1 if fast else 5), seed))


# A metastable failure: retries keep a recovered server down.


CALMLY, SLOWLY, AFTERWARDS = 20.0, 10.0, 110.0  # seconds
REQUESTS = 800.0  # a second
CAPACITY, REDUCED = 1000.0, 300.0  # requests a second
PATIENCE = 1.0  # seconds
ATTEMPTS = 3


@types.coroutine
def answer():
    return (yield)


async def ask():
    """One attempt. The server answers in time, or the client gives up; the server does
    not know that the client has gone, and works all the same."""
    if not await answer():
        raise Boom


def metastable(library, rule, seed, fast):
    """800 requests a second to a server of 1,000, which for 10 s handles 300."""
    clock, uniform = library.clock, random.Random(seed).random
    random.seed(seed)
    guarded = library.guard(rule, ask)
    began = clock.now
    slow, quick = began + CALMLY, began + CALMLY + SLOWLY
    last, seconds = quick + AFTERWARDS, int(AFTERWARDS)
    made, succeeded = [0] * seconds, [0] * seconds
    ends = []  # a heap of attempts, by their end
    free = began  # the moment from which on the server is idle
    number = 0

    def attempt(second, left):
        """Send one attempt of a request that arrived in this second."""
        nonlocal free, number
        # Each attempt has its own context, as a thread or a task has. In one context
        # all other attempts would be calls within a trial that waits for its answer.
        context, coroutine = contextvars.copy_context(), guarded()
        try:
            context.run(coroutine.send, None)
        except library.Rejected:
            return
        start = max(free, clock.now)
        free = start + 1.0 / (REDUCED if slow <= start < quick else CAPACITY)
        in_time = free <= clock.now + PATIENCE
        end = free if in_time else clock.now + PATIENCE
        number += 1
        heapq.heappush(ends, (end, number, in_time, context, coroutine, second, left))

    arrival = began
    while ends or arrival < last:
        if not ends or arrival <= ends[0][0] and arrival < last:
            clock.now = arrival
            second = int(arrival - quick) if quick <= arrival < last else None
            if second is not None:
                made[second] += 1
            attempt(second, ATTEMPTS - 1)
            arrival -= math.log(1.0 - uniform()) / REQUESTS
            continue
        clock.now, _, in_time, context, coroutine, second, left = heapq.heappop(ends)
        try:
            context.run(coroutine.send, in_time)
        except StopIteration:
            if second is not None:
                succeeded[second] += 1
        except (Boom, library.Rejected):
            if left:
                attempt(second, left - 1)
    well = [good >= 0.95 * all_ for good, all_ in zip(succeeded, made)]
    recovered = [second for second in range(seconds - 9) if all(well[second:][:10])]
    return {
        "goodput": 100 * sum(succeeded) / sum(made),
        "recovery": recovered[0] if recovered else None,
    }


# Outages that end soon or late.


OUTAGES = {"10 s": 10, "1 min": 60, "10 min": 600, "1 h": 3600}


def outages(library, rule, seed, fast):
    """Ten calls a second, all of which fail during the outage."""
    found = {}
    for name, length in OUTAGES.items():
        if not fast or length <= 60:
            late, trials = outage(library, rule, seed, length)
            found[f"late {name}"], found[f"trials {name}"] = late, trials
    return found


def outage(library, rule, seed, length):
    """For how many seconds after the outage calls are refused, and how many trials
    were sent during the outage."""
    clock, uniform = library.clock, random.Random(seed).random
    random.seed(seed)
    healthy = clock.now + length
    reached = 0

    def service():
        nonlocal reached
        reached += 1
        if clock.now < healthy:
            raise Boom

    guarded = library.guard(rule, service)
    late, trials, has_opened = 0.0, 0, False
    longest = max(rule.reset_timeout, rule.max_reset_timeout or 0)
    while clock.now < healthy + longest + 5:
        clock.now -= math.log(1.0 - uniform()) / 10.0
        before = reached
        with contextlib.suppress(Boom, library.Rejected):
            guarded()
        if reached == before:
            has_opened = True
            late = max(late, clock.now - healthy)
        elif has_opened and clock.now < healthy:
            trials += 1
    return late, trials


# How many calls until a breaker opens, if each fails with the same probability.


SHARES = (0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)
EXACT = (Rule(5), Rule(5, 10), Rule(10, 20))  # a longer window has too many states
SIMULATED = (Rule(25, 50), Rule(50, 100))


def mean_calls(share, fail_max, window_size=None):
    """The mean number of calls until a breaker opens, worked out.

    The outcomes of the remembered calls are the state of a Markov chain. The chain is
    followed until the probability that the next call opens the circuit hardly changes
    any more. For failures in a row there is a formula.
    """
    if share == 1.0:
        return float(fail_max)
    good = 1.0 - share
    if window_size is None:
        return (1.0 - share**fail_max) / (good * share**fail_max)
    # A state has a bit for each call before the next: 1 for a failure, oldest highest.
    half = 1 << (window_size - 2)
    failures = [bin(n).count("1") for n in range(half)]
    # The states in which one more failure opens the circuit: if the oldest call
    # succeeded, and if the oldest call failed.
    full = [n for n in range(half) if failures[n] == fail_max - 1]
    full_with_oldest = [n for n in range(half) if failures[n] == fail_max - 2]
    states = [0.0] * (2 * half)  # their probabilities, with the circuit closed
    states[0] = closed = 1.0
    mean, hazard, steps = 0.0, 0.0, 0
    while closed > 1e-9:
        succeeded, failed = states[:half], states[half:]  # the oldest call
        opening = share * (
            math.fsum([succeeded[n] for n in full])
            + math.fsum([failed[n] for n in full_with_oldest])
        )
        before, hazard = hazard, opening / closed
        rest = closed / hazard if hazard else math.inf  # if hazard stays so
        if steps > window_size:
            change = abs(hazard - before) / hazard
            if change * rest < 1e-5 * (mean + rest):
                return mean + rest
        mean += closed
        closed -= opening
        steps += 1
        forgotten = list(map(operator.add, succeeded, failed))
        states[0::2] = [good * chance for chance in forgotten]
        for n in full:
            forgotten[n] = 0.0
        for n in full_with_oldest:
            forgotten[n] = succeeded[n]
        states[1::2] = [share * chance for chance in forgotten]
    return mean


def counted_calls(library, rule, seed, calls, share):
    """The mean number of calls until this library's breaker opens, counted; None if no
    call opened it."""
    uniform = random.Random(seed).random

    def service():
        if uniform() < share:
            raise Boom

    breaker = library.breaker(rule)
    guarded, openings = breaker(service), 0
    for _ in range(calls):
        try:
            guarded()
        except Boom:
            pass
        except library.Rejected:  # by the failing call that opened the circuit
            openings += 1
            breaker.close()
    return calls / openings if openings else None


def openings(library, rule, seed, fast):
    """For each share of failing calls, the calls until the breaker opens."""
    calls = 10_000 if fast else 100_000
    return {
        str(share): counted_calls(library, rule, seed, calls, share) for share in SHARES
    }


def worked_out(rule):
    """The mean numbers of calls for each share of failures, by a formula and without a
    breaker, for a rule that remembers few calls."""
    return {str(share): mean_calls(share, *rule[:2]) for share in SHARES}


SCENARIOS = {
    scenario.__name__: scenario
    for scenario in (
        fifth_of_many,
        all_of_many,
        fifth_of_one,
        half_of_one,
        in_turn,
        metastable,
        outages,
        openings,
    )
}


def live_through(name, scenario, rule, seeds, fast=False):
    """The figures of the scenario with the library of this name, for each seed."""
    found = []
    for seed in seeds:
        library = LIBRARIES[name](Clock())
        with library.clock_moved():
            found.append(SCENARIOS[scenario](library, rule, seed, fast))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("library", choices=LIBRARIES)
    parser.add_argument("scenario", choices=(*SCENARIOS, "worked_out"))
    parser.add_argument("rule", type=json.loads, help="the fields of a Rule, in JSON")
    parser.add_argument("--seeds", type=int, nargs="*", default=[1])
    parser.add_argument("--fast", action="store_true", help="shorter outages")
    options = parser.parse_args()
    rule = Rule(**options.rule)
    if options.scenario == "worked_out":
        found = worked_out(rule)
    else:
        found = live_through(
            options.library, options.scenario, rule, options.seeds, options.fast
        )
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
