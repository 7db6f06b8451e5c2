"""Runs threads one step at a time, in an order that is chosen and can be repeated.

A *step* is a line, or an instruction, of the watched file that reads or writes an
attribute which some thread writes during the race. No other code changes what another
thread can see, so between two steps it makes no difference which thread runs. (Steps by
line are coarse: a real thread may be interrupted within a line. Steps by instruction
are not.) `sys.monitoring` (Python 3.12) stops each thread before each of its steps, and
lets all other code run at full speed. One thread runs at a time; before every step the
scheduler decides which thread goes on. In a program whose threads share memory and
nothing else, only these decisions differ from run to run.

By default the thread that ran last goes on, and when that thread has ended or waits for
a `Lock`, the first thread that can. A *schedule* says where to decide otherwise:
``{0: 1, 31: 0}`` begins with thread 1 and leaves thread 1 for thread 0 at step 31.
Leaving a thread that could have gone on is a *preemption*. Most races need only one
or two, so `explore` tries every schedule with at most a given number. With two, the
number of schedules grows with the square of the number of steps, not exponentially.
(Musuvathi and Qadeer called this context bounding in 2007.)

    with Scheduler(2, watched.__file__) as scheduler:
        for schedule in explore(run, 2):  # run calls scheduler.run(programs, schedule)
            check(...)

Many of these orders differ only in the order of two steps that commute, as neither
writes what the other uses. Of such orders `explore` runs one, if every instruction is
a step and code that is not watched declares by `touch` what that code uses.
(Godefroid called this partial-order reduction in 1996.)

The lock of the watched code has to be a `Lock` of the scheduler: if a thread waited for
any other lock, the scheduler would wait for that thread for ever.
"""

from __future__ import annotations

import contextvars
import dis
import functools
import itertools
import os
import sys
import threading
import types
from typing import NamedTuple

import pytest

needs_monitoring = pytest.mark.skipif(
    not hasattr(sys, "monitoring"), reason="the scheduler takes sys.monitoring"
)


class Stuck(BaseException):
    """Ends a thread that can never go on, or that makes too many steps."""


class Use(NamedTuple):
    """The names that a step reads and writes, each set as a number with a bit for each
    name."""

    reads: int = 0
    writes: int = 0

    def __or__(self, other):
        """What two steps use together."""
        return Use(self.reads | other.reads, self.writes | other.writes)

    def commutes_with(self, other):
        """Whether it makes no difference which of two steps comes first."""
        return not (
            self.writes & (other.reads | other.writes) or self.reads & other.writes
        )


# Second names of attributes, which are one attribute to the scheduler.
ALIASES = {
    "state": "_state",
    "counter": "_fail_counter",
    "success_counter": "_success_counter",
}
NOTHING = Use()
ANYTHING = Use(-1, -1)  # -1 has all bits


@functools.cache
def bits(*names):
    """A number that has the bits of these names, or of their aliases."""
    return functools.reduce(int.__or__, map(_bit, names), 0)


@functools.cache
def _bit(name, _numbers=itertools.count()):  # noqa: B008
    return _bit(ALIASES[name]) if name in ALIASES else 1 << next(_numbers)


class Scheduler:
    """Runs up to `threads` programs at once, as the module's docstring says. `filename`
    is the watched file; with `opcodes`, steps are instructions and not lines. `shared`
    are the names of the attributes that make a step, by default all. `tells` promises
    that code which is not watched declares by `touch` what that code uses. A run of
    more than `patience` steps is stuck.

    `trail` is the list of the decisions of the last run: the numbers of the thread that
    ran, of the thread that went on and of all that could have gone on, the line of the
    decision, and the `Use` of shared attributes up to the next decision. `current` is
    the number of the running thread, `waiting` has the lock that each waiting thread
    waits for, and `stuck` says why a run could not go on, or is None.
    """

    def __init__(
        self,
        threads,
        filename,
        opcodes=False,
        shared=None,
        tells=False,
        patience=100_000,
    ):
        self.current = None
        self.trail = []
        self.stuck = None
        self.waiting = {}
        self._patience = patience  # steps
        self._schedule = {}
        self._ready = ()
        # What each thread uses in the step that the thread is about to make.
        self._unknown = NOTHING if tells and opcodes else ANYTHING
        self._next = [self._unknown] * threads
        self._programs = [None] * threads
        self._results = [None] * threads
        self._steps = _Steps(filename, opcodes, shared, self.step)
        # A thread that does not run waits for its baton; run() waits for _over.
        self._batons = [_taken() for _ in range(threads)]
        self._over = _taken()
        self._threads = [
            threading.Thread(target=self._work, args=(number,), daemon=True)
            for number in range(threads)
        ]

    def __enter__(self):
        self._steps.watch()
        self._cores = _move_to_one_core()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._programs = None
        for baton in self._batons:
            baton.release()
        for thread in self._threads:
            thread.join()
        _move_to(self._cores)
        self._steps.leave()

    def run(self, programs, schedule):
        """Run each program in a thread and a context of its own. Returns a list of what
        the programs returned, or of the exceptions that they raised."""
        self._programs = programs
        self._results = [None] * len(programs)
        self._schedule = schedule
        self._ready = tuple(range(len(programs)))
        self._next = [self._unknown] * len(programs)
        self.trail = []
        self.stuck = None
        self.waiting = {}
        self._go_on()
        self._over.acquire()
        self.current = None
        return self._results

    def step(self, line=None, use=NOTHING):
        """Make a step of the running thread, after another thread has gone on if the
        schedule says so. Code that is not watched calls this to be interrupted."""
        me = self.current
        if me is None:  # no program is being run
            return
        number = len(self.trail)
        if number >= self._patience:
            self.stuck = f"no end after {self._patience} steps"
            raise Stuck
        if self._unknown is ANYTHING:
            use = ANYTHING
        if number not in self._schedule:  # so it is with most steps
            self.trail.append((me, me, self._ready, line, use))
            return
        self._next[me] = use
        if self._go_on(line) != me:
            self._batons[me].acquire()

    def touch(self, *names, reads=()):
        """Say that code which is not watched writes the attributes in `names` and reads
        those in `reads`; without any name, that it may use anything."""
        if self.current is not None:
            *decision, use = self.trail[-1]
            more = Use(bits(*reads), bits(*names)) if names or reads else ANYTHING
            self.trail[-1] = (*decision, use | more)

    def lock(self):
        """A new `Lock` for the code that is run."""
        return Lock(self)

    def _work(self, me):
        self._steps.threads.add(threading.get_ident())
        while True:
            self._batons[me].acquire()
            if self._programs is None:
                return
            try:
                result = contextvars.Context().run(self._programs[me])
            except BaseException as exc:
                result = exc
            self._results[me] = result
            self._retire()

    def _go_on(self, line=None):
        """Decide which thread goes on, and hand that thread its baton."""
        me, ready = self.current, self._ready
        chosen = self._schedule.get(len(self.trail))
        if chosen not in ready:
            chosen = me if me in ready else ready[0]
        self.trail.append((me, chosen, ready, line, self._next[chosen]))
        if chosen != me:
            self.current = chosen
            self._batons[chosen].release()
        return chosen

    def _retire(self):
        """The current thread has ended."""
        self._ready = tuple(number for number in self._ready if number != self.current)
        if not self._ready and not self._rescue():
            self._over.release()
        else:
            self._go_on()

    def _wait(self, lock):
        """The current thread waits until the lock is free."""
        me = self.current
        self._next[me] = self._unknown
        self.waiting[me] = lock
        self._ready = tuple(number for number in self._ready if number != me)
        if not self._ready:
            self._rescue()
        if self._go_on() != me:
            self._batons[me].acquire()

    def _wake(self, numbers):
        for number in numbers:
            del self.waiting[number]
        self._ready = tuple(sorted({*self._ready, *numbers}))

    def _rescue(self):
        """No thread is ready. If threads wait, end the deadlock by waking them all.
        Returns whether there was a deadlock."""
        if not self.waiting:
            return False
        self.stuck = f"deadlock: {len(self.waiting)} of the threads wait for ever"
        self._wake(list(self.waiting))
        return True


class Lock:
    """Stands in for `threading.RLock`. `owner` is the number of the thread that
    holds the lock, `uses` counts how often the lock was taken."""

    def __init__(self, scheduler):
        self._scheduler = scheduler
        self._depth = 0
        self.owner = None
        self.uses = 0

    def acquire(self):
        scheduler = self._scheduler
        scheduler.touch("a lock")
        while self._depth and self.owner != scheduler.current:
            if scheduler.stuck:
                raise Stuck
            scheduler._wait(self)
            scheduler.touch("a lock")
        self.owner = scheduler.current
        self._depth += 1
        self.uses += 1
        return True

    def release(self):
        if not self.is_mine():
            raise RuntimeError("released by a thread that does not hold it")
        self._scheduler.touch("a lock")
        self._depth -= 1
        if not self._depth:
            self.owner = None
            waiting = self._scheduler.waiting
            self._scheduler._wake([n for n, lock in waiting.items() if lock is self])

    __enter__ = acquire

    def __exit__(self, *_):
        self.release()

    def is_mine(self):
        """Whether the running thread, or the caller between runs, holds the lock."""
        return self._depth > 0 and self.owner == self._scheduler.current

    _is_owned = is_mine  # threading.RLock has this method, and the library asks it


def explore(run, preemptions, alike=()):
    """Call `run(schedule)`, which returns a trail, once with each schedule of at most
    `preemptions` preemptions. Yields the schedules.

    `alike` has a label for each thread; threads with equal labels run equal programs.
    Of such threads the first always begins first.

    A thread is left before a step only if the step does not commute with what other
    threads do in the thread's absence. If the two commute, leaving the thread after the
    step has the same effect.
    """

    def begin_with(schedule, spent, absences):
        trail = run(schedule)
        yield schedule
        for absence in absences:
            absence.see(trail)
        later = {}  # absences if another thread goes on one decision later, by thread
        for number in reversed(range(max(schedule, default=-1) + 1, len(trail))):
            before, chosen, ready, _, use = trail[number]
            cost = spent + (before in ready)
            sooner = {}
            for other in ready:
                absence = _Absence(before, number)
                if other == chosen:
                    # Of three threads, a third might have been chosen here as well.
                    if other != before and len(trail[0][2]) == 2:
                        absence.see(trail)
                        sooner[other] = absence
                elif (
                    before == chosen
                    and other in later
                    and use.commutes_with(later[other].use)
                ):
                    sooner[other] = later[other]
                elif cost <= preemptions and not (
                    alike and _is_like_an_earlier(other, trail[:number], alike)
                ):
                    switched = {**schedule, number: other}
                    yield from begin_with(switched, cost, (*absences, absence))
                    sooner[other] = absence
            later = sooner

    return begin_with({}, 0, ())


class _Absence:
    """`thread` is left at decision `number`. `use` is what all other threads use until
    `thread` goes on, in all trails that were seen."""

    def __init__(self, thread, number):
        self.thread, self.number, self.use = thread, number, NOTHING

    def see(self, trail):
        if self.use == ANYTHING:
            return
        reads, writes = self.use
        for _, chosen, _, _, use in trail[self.number :]:
            if chosen == self.thread:
                break
            reads |= use.reads
            writes |= use.writes
        self.use = Use(reads, writes)


def _is_like_an_earlier(thread, trail, alike):
    """Whether `thread` has not begun, and an earlier thread with an equal label has not
    begun either."""
    same = {earlier for earlier in range(thread) if alike[earlier] == alike[thread]}
    begun = {chosen for _, chosen, *_ in trail} if same else {thread}
    return thread not in begun and not same <= begun


def sample(run, rng, known, count):
    """Call `run(schedule)` with up to `count` random schedules. Each has one preemption
    more than the schedule before, or than a schedule in `known`, a list of pairs of
    schedule and trail. Yields the schedules."""
    trail = ()
    for _ in range(count if known else 0):
        if not trail or rng.random() < 0.25:
            schedule, trail = rng.choice(known)
        fresh = max(schedule, default=-1) + 1
        switches = [
            (number, other)
            for number, (before, chosen, ready, *_) in enumerate(trail[fresh:], fresh)
            for other in ready
            if before in ready and other != chosen
        ]
        if switches:
            number, other = rng.choice(switches)
            schedule = {**schedule, number: other}
            trail = run(schedule)
            yield schedule
        else:
            trail = ()


def preemptions_in(trail):
    """How many times in the trail a thread was left that could have gone on."""
    return sum(
        before in ready and before != chosen for before, chosen, ready, *_ in trail
    )


NAMES = "abc"  # of the threads, in printed schedules


def written(schedule):
    """The schedule as text, such as "0:b 31:a"."""
    return " ".join(f"{step}:{NAMES[schedule[step]]}" for step in sorted(schedule))


def parsed(text):
    """The schedule that `written` turned into this text."""
    switches = (switch.split(":") for switch in text.split())
    return {int(step): NAMES.index(name) for step, name in switches}


def _move_to_one_core():
    """Keep the calling thread, and threads that it starts, on one core, as handing over
    to another core takes ten times as long. Only where each worker of pytest-xdist can
    have a core of its own. Returns the cores that the thread could run on before, or
    None if the thread still can."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0))
    if not workers or not hasattr(os, "sched_setaffinity"):
        return None
    cores = os.sched_getaffinity(0)
    if workers > len(cores):
        return None
    number = int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw"))
    _move_to({sorted(cores)[number]})
    return cores


def _move_to(cores):
    if cores:
        os.sched_setaffinity(0, cores)


def _taken():
    baton = threading.Lock()
    baton.acquire()
    return baton


def written_names(code):
    """The names of the attributes that this code, or code nested in it, writes outside
    constructors; and all strings in it that are names, as `setattr` may write by them.
    """
    names = set()
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= written_names(constant)
        elif isinstance(constant, str) and constant.isidentifier():
            names.add(constant)
    if code.co_name != "__init__":
        for instruction in dis.get_instructions(code):
            if instruction.opname in ("STORE_ATTR", "DELETE_ATTR"):
                names.add(instruction.argval)
    return names


class _Steps:
    """Calls `step(line, use)` before each step in the file by one of `threads`."""

    TOOL = 4  # a number that sys.monitoring leaves free

    def __init__(self, filename, opcodes, shared, step):
        self._filename = filename
        self._opcodes = opcodes
        self._shared = shared
        self._step = step
        self.threads = set()  # the identities of the watched threads
        # By id(code), as hashing code takes long: the code's places, and the code, so
        # that the code stays alive and no other code gets the id.
        self._places = {}

    def watch(self):
        monitoring = sys.monitoring
        monitoring.use_tool_id(self.TOOL, __name__)
        events = monitoring.events
        self._event = events.INSTRUCTION if self._opcodes else events.LINE
        monitoring.register_callback(self.TOOL, self._event, self._reach)
        monitoring.set_events(self.TOOL, self._event)
        monitoring.restart_events()  # also where an earlier scheduler disabled them

    def leave(self):
        sys.monitoring.set_events(self.TOOL, 0)
        sys.monitoring.register_callback(self.TOOL, self._event, None)
        sys.monitoring.free_tool_id(self.TOOL)

    def _reach(self, code, place):
        """The running thread is at `place` in the code, a line or an offset."""
        try:
            places, _ = self._places[id(code)]
        except KeyError:
            ours = code.co_filename == self._filename
            places = _places(code, self._opcodes, self._shared) if ours else {}
            self._places[id(code)] = places, code
        step = places.get(place)
        if step is None:
            return sys.monitoring.DISABLE  # no event comes from this place again
        if threading.get_ident() in self.threads:
            self._step(*step)
        return None


def _places(code, opcodes, shared):
    """The lines of the code, or the offsets in it, that use a shared attribute, each
    with the line, and the use that the whole line makes of shared attributes."""
    starts = dict(dis.findlinestarts(code))
    places, uses, line = {}, {}, None
    for instruction in dis.get_instructions(code):
        line = starts.get(instruction.offset, line)
        use = _use(instruction, shared)
        if use != NOTHING:
            places[instruction.offset if opcodes else line] = line
            uses[line] = uses.get(line, NOTHING) | use
    return {place: (line, uses[line]) for place, line in places.items()}


def _use(instruction, shared):
    """What the instruction uses of the attributes in `shared`, or of all if None."""
    kind, name = instruction.opname, instruction.argval
    if "SUBSCR" in kind or instruction.argrepr == "[]":  # the second in Python 3.14
        name = "[]"
    elif kind == "LOAD_GLOBAL" and name == "getattr":
        return Use(reads=~bits("a lock"))
    elif kind == "LOAD_GLOBAL" and name in ("setattr", "delattr", "vars"):
        return ANYTHING
    elif not ("ATTR" in kind or "METHOD" in kind):
        return NOTHING
    elif shared is not None and name not in shared:
        return NOTHING
    changes = kind.startswith(("STORE", "DELETE"))
    return Use(writes=bits(name)) if changes else Use(reads=bits(name))
