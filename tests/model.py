"""A model of a circuit by the rules of the specification, without locks or threads.

A model runs no functions: a test tells the model what happens to a breaker, and the
model says what should come of that, by returning or by raising `Rejected` or `Tripped`.
The names are the specification's. `test_model` compares breakers with the model;
`test_interleavings` tries all orders in which the steps of several calls can happen.
"""

from __future__ import annotations

import math

CLOSED, OPEN, HALF_OPEN = "closed", "open", "half-open"
SUCCESS, FAILURE, ABANDONED = "success", "failure", "abandoned"


class Rejected(Exception):
    """The call is rejected; `retry_after` is in seconds."""

    def __init__(self, retry_after, reason):
        self.retry_after, self.reason = retry_after, reason


class Tripped(Exception):
    """The call's failure opened the circuit; the caller sees this, from `cause`."""

    def __init__(self, phrase, cause, retry_after, reason):
        self.phrase, self.cause = phrase, cause
        self.retry_after, self.reason = retry_after, reason


class FailedResult(Exception):
    """Stands for the exception of a call whose result made the call a failure."""


class Era:
    """A stay in one state, and the move that began it."""

    def __init__(self, name, reason="new", seconds=None, failed_trials=0, before=None):
        self.name, self.reason, self.seconds = name, reason, seconds
        self.failed_trials = failed_trials
        self.why_opened = reason if name == OPEN else ""
        if name == HALF_OPEN and before is not None:
            self.why_opened = before.why_opened

    @property
    def why_refused(self):
        return self.why_opened or self.reason


class Call:
    """An admitted call. `era` is None for a call that decides nothing, and for a trial
    until the storage has granted the trial."""

    def __init__(self, era, trial=False, since=math.nan):
        self.era, self.trial, self.since = era, trial, since
        # Whether the storage has granted the trial; whether the trial has a claim of
        # the storage to release.
        self.granted = self.claimed = False


class Model:
    """A circuit. `clock` has the time in seconds, by the monotonic clock (`now`) and by
    the storage's clock (`moment`); `listeners` are functions that are called with the
    name of an event and the event's details."""

    is_abandoning = staticmethod(lambda exc: False)  # whether exc always abandons
    shortening = 1.0  # the random factor of openings, with `max_reset_timeout`

    def __init__(self, clock, state=CLOSED):
        self.clock, self.era, self.stored = clock, Era(state), state
        # The number of counted calls of this era; (number, moment) of each failure.
        self.calls, self.failures = 0, []
        self.success_counter = 0
        self.fail_max, self.reset_timeout, self.success_threshold = 5, 60, 1
        self.window_size = self.window_seconds = self.max_reset_timeout = None
        self.throw_new_error_on_trip, self.dry_run = True, False
        self.ignore, self.exclude, self.include = [], [], []
        self.failure_result = lambda result: False
        self.name = None
        self.opened = None  # the last opening, by the storage's clock
        self.place = None  # the trial that holds the place
        self.listeners = []
        self.moves, self.released = [], 0  # the storage's move() and release_trial()

    # What happens to a call.

    def admission(self, context, what):
        """A generator that returns the admitted call. At the `yield` it asks the
        storage for the trial, and is sent the storage's answer. `context` holds the
        trials whose context the call is in; `what` is the function."""
        call = self.arrive(context, what)
        while call.trial and call.era is None:
            try:
                granted = yield
                begun = self.may_begin(call, granted, what)
            except BaseException:
                self.give_back(call)
                raise
            call = begun or self.arrive(context, what)
        return call

    def arrive(self, context, what):
        self.look()
        if self.era.name == CLOSED:
            call = Call(self.era)
        elif self.is_within(context) and (self.retry_after or self.reset_timeout == 0):
            call = Call(None)  # within the trial, for a timeout of 0 even if overdue
        elif self.retry_after == 0:
            self.place = Call(None, trial=True, since=self.clock.now)
            context.add(self.place)
            return self.place
        else:
            rejected = Rejected(self.retry_after, self.era.why_refused)
            call = self.refuse(rejected, what)
        self.tell("before_call", what)
        return call

    def refuse(self, rejected, what):
        """Tell that a call is rejected, and raise; in a dry run return a call that
        decides nothing."""
        self.tell("rejected", what)
        if not self.dry_run:
            raise rejected
        return Call(None)

    def may_begin(self, trial, granted, what):
        """The admitted call, after the storage's answer; None if `trial` has lost the
        place."""
        if granted and self.place is not None:
            self.place.claimed = True  # even if another trial holds the place by now
        elif granted:
            self.release()
        self.look()
        if self.place is not trial:
            return None
        call = trial
        if granted:
            trial.granted = True
            if self.era.name == OPEN:
                self.move(HALF_OPEN, "trial", "the timeout has passed")
            if self.place is not trial:
                return None
            trial.era = self.era
        else:
            call = self.refuse(Rejected(0.0, self.era.why_refused), what)
            self.give_back(trial)
        self.tell("before_call", what)
        return call

    def judge(self, exc):
        """The outcome of a call that raised `exc`."""
        if self.is_abandoning(exc) or self.matches(self.ignore, exc):
            return ABANDONED
        if self.matches(self.exclude, exc):
            return SUCCESS
        if hasattr(exc, "exceptions"):  # a group: the exceptions in the group decide
            outcomes = {self.judge(each) for each in exc.exceptions}
            return next(o for o in (FAILURE, SUCCESS, ABANDONED) if o in outcomes)
        if self.include and not self.matches(self.include, exc):
            return SUCCESS
        return FAILURE

    @staticmethod
    def matches(kinds, exc):
        return any(kind(exc) for kind in kinds)

    def settle(self, call, outcome, exc=None):
        try:
            self.conclude(call, outcome, exc)
        finally:
            self.give_back(call)

    def conclude(self, call, outcome, exc=None):
        """Take in an outcome. A late outcome, or one of a call within a trial, is told
        and changes nothing; the outcome of a trial that lost the place counts."""
        if outcome == ABANDONED:
            self.tell("abandoned")
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
        """Count a success, which forgets all failures unless `window_size` is set."""
        self.calls += 1
        if self.era.name == HALF_OPEN or (
            self.era.name == CLOSED and self.window_size is None
        ):
            self.failures = []
        self.forget()
        self.decide_success()

    def decide_success(self):
        """What `state.on_success` does, which forgets no failures."""
        if self.era.name == HALF_OPEN:
            self.success_counter += 1
            if self.success_counter >= self.success_threshold:
                self.move(CLOSED, "outcome", "the trial succeeded")

    def count(self):
        """Count a failure; no call brings `fail_counter` above `fail_max` while the
        circuit is closed."""
        if self.era.name == HALF_OPEN or (
            self.era.name == CLOSED and self.fail_counter != self.fail_max
        ):
            self.count_one()

    def count_one(self):
        self.calls += 1
        self.failures.append((self.calls, self.clock.now))
        self.forget()

    def fail(self, exc):
        """Decide whether a failure opens the circuit. The failure has been told, and a
        listener may have changed anything meanwhile."""
        if self.era.name == CLOSED and self.fail_counter >= self.fail_max:
            by, reason = "count", self.why_so_many()
            phrase = "Failures threshold reached, circuit breaker opened"
        elif self.era.name == HALF_OPEN:
            by, reason = "outcome", "the trial failed"
            phrase = "Trial call failed, circuit breaker opened"
        else:
            return
        reason = f"{reason}: {exc!r}"
        self.move(OPEN, by, reason)
        if isinstance(exc, FailedResult):
            return  # the caller gets the result
        if self.dry_run or not self.throw_new_error_on_trip:
            raise exc
        raise Tripped(phrase, exc, self.retry_after, reason)

    def why_so_many(self):
        count, size, seconds = self.fail_counter, self.window_size, self.window_seconds
        within = "" if seconds is None else f" within {seconds} s"
        if self.fail_max == 1:
            return f"a failure{within}"
        if size is None:
            return f"{count} failures in a row{within}; the last"
        if size == math.inf:
            return f"{count} failures{within}; the last"
        return f"{count} of the last {size} calls failed; the last"

    def give_back(self, trial):
        if trial is not None and trial is self.place:
            self.place = None
            if trial.claimed:
                self.release()

    def release(self):
        self.released += 1

    def gate(self, context):
        """What `state.before_call` does, without a trial and without listeners."""
        self.look()
        if self.retry_after == 0:
            if self.era.name == OPEN:
                self.move(HALF_OPEN, "trial", "the timeout has passed")
        elif not self.is_within(context) and not self.dry_run:
            raise Rejected(self.retry_after, self.era.why_refused)

    def is_within(self, context):
        return self.place in context and self.place.granted

    # The window. Only a closed circuit forgets failures, and then for good.

    def forget(self):
        if self.era.name == self.stored == CLOSED:
            size = math.inf if self.window_size is None else self.window_size
            seconds = math.inf if self.window_seconds is None else self.window_seconds
            self.failures = [
                (number, moment)
                for number, moment in self.failures
                if self.calls - number < size and self.clock.now - moment < seconds
            ]

    @property
    def fail_counter(self):
        self.forget()
        return len(self.failures)

    @fail_counter.setter
    def fail_counter(self, count):
        """Have `count` failures, counted just now."""
        self.failures = []
        for _ in range(int(count)):
            self.count_one()

    def has_window(self):
        return (self.window_size, self.window_seconds) != (None, None)

    def set(self, name, value):
        count, had_window = self.fail_counter, self.has_window()
        setattr(self, name, value)
        if self.has_window() and not had_window:
            self.fail_counter = count
        self.forget()

    def refuses(self, name, value):
        """Whether a breaker refuses `value` because of the other settings."""
        new = {**vars(self), name: value}
        fail_max, size, longest = (
            new[each] for each in ("fail_max", "window_size", "max_reset_timeout")
        )
        return (
            (name == "fail_counter" and self.has_window() and value > fail_max)
            or (size is not None and fail_max > size)
            or (fail_max == size == math.inf and new["window_seconds"] is None)
            or (longest is not None and new["reset_timeout"] > longest)
        )

    # Moves, by hand and others.

    def move(self, name, by="hand", reason="by hand", seconds=None):
        """Move the circuit. Each move but the half-opening that a trial makes sets
        `success_counter` to 0."""
        if by != "trial":
            self.success_counter = 0
        self.forget()
        before = self.shown()  # something else may have moved the storage
        failed_trials = before.failed_trials + (by == "outcome")
        if name == CLOSED or (name == OPEN and by == "hand"):
            failed_trials = 0
        if name == OPEN:
            self.opened = self.clock.moment
        self.stored = name
        era = Era(name, reason, seconds, failed_trials, before)
        self.moves.append((name, by, reason, seconds, failed_trials, self.fail_max))
        if name == CLOSED:
            self.failures = []
        self.begin_era(era, by)

    def look(self):
        """Begin a new era if something else has moved the storage."""
        if self.stored != self.era.name:
            self.begin_era(self.found())

    def found(self):
        failed_trials = self.era.failed_trials if self.stored == HALF_OPEN else 0
        reason = "found so in the storage"
        return Era(self.stored, reason, None, failed_trials, self.era)

    def begin_era(self, new, by="found"):
        count = self.fail_counter
        old, self.era = self.era, new
        self.calls, self.fail_counter = 0, count
        if new.name == CLOSED and count >= self.fail_max:
            self.fail_counter = 0
        if self.place and not (by == "trial" and self.place.granted):
            self.give_back(self.place)
        self.tell("state_change", old, new)

    # What can be seen.

    @property
    def reason(self):
        return self.shown().reason

    def shown(self):
        """The era that `look` would begin, or the present one."""
        return self.era if self.stored == self.era.name else self.found()

    @property
    def retry_after(self):
        """The seconds until a call may be admitted; 0.0 where one may be now."""
        if self.stored == CLOSED:
            return 0.0
        open_for = math.inf if self.opened is None else self.clock.moment - self.opened
        if self.stored == OPEN and open_for < self.length(self.shown()):
            return self.length(self.shown()) - open_for
        if self.place is None:
            return 0.0
        held = self.clock.now - self.place.since
        return max(0.0, self.grown(self.era) - held)

    def length(self, opening):
        if opening.seconds is not None:
            return opening.seconds
        factor = 1 if self.max_reset_timeout is None else self.shortening
        return self.grown(opening) * factor

    def grown(self, era):
        """The seconds that an opening lasts, and that a trial may hold the place, with
        `reset_timeout` grown by the failed trials before `era`."""
        if self.max_reset_timeout is None:
            return self.reset_timeout
        grown = self.reset_timeout * 2.0**era.failed_trials
        return min(grown, self.max_reset_timeout)

    def tell(self, event, *details):
        for listener in tuple(self.listeners):
            listener(event, *details)
