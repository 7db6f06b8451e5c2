"""A circuit as the specification has it, for one thread, and with nothing to run.

It is asked the same as a breaker and answers what should come of it, by returning
or by raising `Rejected` or `Tripped`. The names are the specification's. `test_model`
puts `pybreaker.py` next to it; `test_interleavings` lets other threads in between.
"""

from __future__ import annotations

import math

CLOSED, OPEN, HALF_OPEN = "closed", "open", "half-open"
SUCCESS, FAILURE, ABANDONED = "success", "failure", "abandoned"


class Rejected(Exception):
    """The call is refused, and may come back after so many seconds."""

    def __init__(self, retry_after):
        self.retry_after = retry_after


class Tripped(Exception):
    """The call's failure opened the circuit, and that is what its caller sees."""

    def __init__(self, phrase, cause, retry_after):
        self.phrase, self.cause, self.retry_after = phrase, cause, retry_after


class Era:
    """A stay in one state."""

    def __init__(self, name):
        self.name = name


class Call:
    """An admitted call; one within a trial belongs to no era, nor does a trial
    that the storage has yet to grant."""

    def __init__(self, era, trial=False, since=math.nan):
        self.era, self.trial, self.since = era, trial, since
        self.granted = self.claimed = False  # so that it runs; so that it releases


class Model:
    """`clock` says how late it is, `open_for` how long ago the opening was, and
    `listeners` are functions that are called with an event and its details."""

    def __init__(self, clock, state=CLOSED):
        self.clock, self.era, self.stored = clock, Era(state), state
        self.fail_counter = self.success_counter = 0
        self.fail_max, self.reset_timeout, self.success_threshold = 5, 60, 1
        self.throw_new_error_on_trip = True
        self.name = None
        self.opened = None  # a moment of the storage's clock
        self.place = None  # the trial that holds it
        self.listeners = []
        self.trips, self.released = [], 0  # what a storage is told

    # What happens to a call.

    def admission(self, context, what):
        """The call that is let in. A generator: at its `yield` it asks the storage
        for the trial, and is sent the answer. `context` holds the trials whose
        context the call is in; `what` is called."""
        call = self.arrive(context, what)
        while call.trial and call.era is None:
            try:
                granted = yield
                begun = self.may_begin(call, granted, what)
            except BaseException:
                self.give_back(call)
                raise
            if not begun:
                call = self.arrive(context, what)
        return call

    def arrive(self, context, what):
        self.look()
        if self.era.name == CLOSED:
            call = Call(self.era)
        elif self.is_within(context) and (self.retry_after or self.reset_timeout == 0):
            call = Call(None)  # even a timeout of 0 leaves a trial its own calls
        elif self.retry_after == 0:
            self.place = Call(None, trial=True, since=self.clock.now)
            context.add(self.place)
            return self.place
        else:
            retry_after = self.retry_after
            self.tell("rejected", what)
            raise Rejected(retry_after)
        self.tell("before_call", what)
        return call

    def may_begin(self, trial, granted, what):
        """It goes on only if the era is still the same, and the place its own."""
        if granted and self.place is not None:
            self.place.claimed = True  # even if another call holds it by now
        elif granted:
            self.release()
        self.look()
        if self.place is not trial:
            return False
        if not granted:
            self.tell("rejected", what)
            raise Rejected(0.0)
        trial.granted = True
        if self.era.name == OPEN:
            self.move(HALF_OPEN, trial)
        if self.place is not trial:
            return False
        trial.era = self.era
        self.tell("before_call", what)
        return True

    def settle(self, call, outcome, exc=None):
        try:
            self.conclude(call, outcome, exc)
        finally:
            self.give_back(call)

    def conclude(self, call, outcome, exc=None):
        """A late outcome, and one within a trial, changes nothing and is heard of;
        that of a trial that lost its place counts."""
        if outcome == ABANDONED:
            return
        self.look()
        if outcome == SUCCESS:
            if call.era is self.era:
                self.succeed()
            self.tell("success")
        else:
            if call.era is self.era:
                self.count()
            self.tell("failure", exc)
            if call.era is self.era:
                self.fail(exc)

    def succeed(self):
        """A success that counts forgets the failures, whatever it decides."""
        if self.era.name != OPEN:
            self.fail_counter = 0
        self.decide_success()

    def decide_success(self):
        """`state.on_success`, which leaves the failures to whoever calls it."""
        if self.era.name == HALF_OPEN:
            self.success_counter += 1
            if self.success_counter >= self.success_threshold:
                self.move(CLOSED)

    def count(self):
        """In the closed state no call brings the count above the limit."""
        if self.era.name == HALF_OPEN or (
            self.era.name == CLOSED and self.fail_counter != self.fail_max
        ):
            self.fail_counter += 1

    def fail(self, exc):
        """What is decided after the failure has been told, on what is then true."""
        if self.era.name == CLOSED and self.fail_counter >= self.fail_max:
            self.trips.append(self.fail_max)
            phrase = "Failures threshold reached, circuit breaker opened"
        elif self.era.name == HALF_OPEN:
            phrase = "Trial call failed, circuit breaker opened"
        else:
            return
        self.move(OPEN)
        if not self.throw_new_error_on_trip:
            raise exc
        raise Tripped(phrase, exc, self.retry_after)

    def give_back(self, trial):
        if trial is not None and trial is self.place:
            self.place = None
            if trial.claimed:
                self.release()

    def release(self):
        self.released += 1

    def gate(self, context):
        """`state.before_call`: neither takes the place nor tells of the call."""
        self.look()
        if self.retry_after == 0:
            if self.era.name == OPEN:
                self.move(HALF_OPEN, by_gate=True)
        elif not self.is_within(context):
            raise Rejected(self.retry_after)

    def is_within(self, context):
        return self.place in context and self.place.granted

    # Moves, by hand and others.

    def move(self, name, trial=None, by_gate=False):
        """All but the half-opening that a trial makes forget the successes."""
        if trial is None and not by_gate:
            self.success_counter = 0
        if name == CLOSED:
            self.fail_counter = 0
        if name == OPEN:
            self.opened = self.clock.moment
        self.stored = name
        self.begin_era(name, trial)

    def look(self):
        """Whether somebody else has moved the circuit."""
        if self.stored != self.era.name:
            if self.stored == CLOSED and self.fail_counter >= self.fail_max:
                self.fail_counter = 0
            self.begin_era(self.stored)

    def begin_era(self, name, trial=None):
        old, self.era = self.era, Era(name)
        if self.place is not trial:
            self.give_back(self.place)
        self.tell("state_change", old, self.era)

    # What can be seen.

    @property
    def retry_after(self):
        """The seconds until a call may be admitted."""
        if self.stored == CLOSED:
            return 0.0
        open_for = math.inf if self.opened is None else self.clock.moment - self.opened
        if self.stored == OPEN and open_for < self.reset_timeout:
            return self.reset_timeout - open_for
        if self.place is None:
            return 0.0
        return max(0.0, self.reset_timeout - (self.clock.now - self.place.since))

    def tell(self, event, *details):
        for listener in tuple(self.listeners):
            listener(event, *details)
