"""An exception group is judged by what is in it, leaf by leaf."""

from __future__ import annotations

import asyncio
import builtins
import logging
import sys
import types

import guards
import pytest
from support import every

from pybreaker import CircuitBreaker, CircuitBreakerError


class NotFound(Exception):
    """The customer asked for something that the service does not have."""


class Unreachable(Exception):
    """The service does not answer."""


class StandInGroup(BaseException):
    """A group class of another module, on a Python that has groups of its own."""

    def __init__(self, message, exceptions):
        super().__init__(message)
        self.exceptions = tuple(exceptions)


@pytest.fixture(params=["native", "backport"])
def group(request, monkeypatch):
    """Makes a group of the exceptions that it is given: Python's own, or that of
    the package exceptiongroup."""
    if request.param == "backport":
        if sys.version_info < (3, 11):
            kind = pytest.importorskip("exceptiongroup").BaseExceptionGroup
        else:  # there the package gives Python's own, so a stand-in takes its place
            kind = StandInGroup
            package = types.SimpleNamespace(BaseExceptionGroup=kind)
            monkeypatch.setitem(sys.modules, "exceptiongroup", package)
    elif sys.version_info < (3, 11):
        pytest.skip("this Python has no exception groups")
    else:
        kind = builtins.BaseExceptionGroup

    def group(*exceptions):
        return kind("several things happened", exceptions)

    group.kind = kind
    return group


def raising(exc):
    def work():
        raise exc

    return work


def outcome(breaker, recorder, exc, guard=guards.by_call):
    """How the breaker takes a call that raises the exception."""
    breaker.add_listener(recorder)
    breaker.fail_counter = 2
    with pytest.raises(type(exc)) as raised:
        guard(breaker, raising(exc))
    assert raised.value is exc
    told = recorder.names[1:]
    assert (breaker.fail_counter > 2) == (told == ["failure"])
    assert told or breaker.fail_counter == 2
    return told[0] if told else "abandoned"


LEAVES = {
    "success": lambda: NotFound(),
    "failure": lambda: Unreachable(),
    "abandoned": lambda: KeyboardInterrupt(),
}


@every(
    first=["success", "failure", "abandoned"],
    second=["success", "failure", "abandoned"],
    nested=["flat", "nested", "deeply nested"],
)
def test_a_failure_among_the_leaves_outweighs_a_success_and_that_an_abandoned_one(
    first, second, nested, group, recorder
):
    """A group inside a group is taken apart as the outer one is."""
    leaves = LEAVES[first](), LEAVES[second]()
    exc = {
        "flat": lambda: group(*leaves),
        "nested": lambda: group(leaves[0], group(leaves[1])),
        "deeply nested": lambda: group(group(leaves[0]), group(group(leaves[1]))),
    }[nested]()
    expected = next(
        kind for kind in ("failure", "success", "abandoned") if kind in (first, second)
    )
    breaker = CircuitBreaker(exclude=[NotFound])
    assert outcome(breaker, recorder, exc) == expected


@pytest.mark.parametrize("guard", guards.WAYS)
@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        (["success", "success"], "success"),
        (["success", "failure"], "failure"),
        (["success", "abandoned"], "success"),
        (["abandoned", "failure"], "failure"),
        (["abandoned", "abandoned"], "abandoned"),
    ],
)
def test_every_way_to_guard_judges_a_group_by_its_leaves(
    guard, kinds, expected, group, recorder
):
    """The group itself reaches the caller, unless it opens the circuit."""
    exc = group(*(LEAVES[kind]() for kind in kinds))
    breaker = CircuitBreaker(exclude=[NotFound])
    assert outcome(breaker, recorder, exc, guard) == expected


def test_a_group_counts_as_one_failure_however_many_leaves_fail(group):
    """The group is what the call raised, and one call is one failure."""
    breaker = CircuitBreaker(fail_max=5)
    exc = group(Unreachable(), Unreachable(), group(Unreachable()))
    with pytest.raises(group.kind):
        breaker.call(raising(exc))
    assert breaker.fail_counter == 1


def test_the_error_of_a_trip_is_raised_from_the_group(group):
    """The cause is the group as it was raised, not one of its leaves."""
    breaker = CircuitBreaker(fail_max=1, exclude=[NotFound])
    exc = group(NotFound(), Unreachable())
    with pytest.raises(CircuitBreakerError) as tripped:
        breaker.call(raising(exc))
    assert tripped.value.__cause__ is exc


@pytest.mark.parametrize(
    ("kinds", "state"),
    [
        (["success", "success"], "closed"),
        (["success", "abandoned"], "closed"),
        (["success", "failure"], "open"),
        (["abandoned", "abandoned"], "half-open"),
    ],
)
def test_a_trial_that_raises_a_group_ends_as_its_leaves_say(kinds, state, group):
    """An abandoned trial gives its place back, and the next call is the trial."""
    breaker = CircuitBreaker(exclude=[NotFound])
    breaker.half_open()
    with pytest.raises((group.kind, CircuitBreakerError)):
        breaker.call(raising(group(*(LEAVES[kind]() for kind in kinds))))
    assert breaker.current_state == state
    if state == "half-open":
        assert breaker.call(int) == 0
        assert breaker.current_state == "closed"


def test_a_class_that_matches_a_group_decides_for_all_of_it(group, recorder):
    """The other leaf would be a failure; only a group of abandonments is left alone."""
    breaker = CircuitBreaker(exclude=[group.kind])
    exc = group(Unreachable(), KeyboardInterrupt())
    assert outcome(breaker, recorder, exc) == "success"


def test_a_predicate_that_matches_a_group_decides_for_all_of_it(group, recorder):
    """The predicate is asked about the group before any leaf."""
    breaker = CircuitBreaker(exclude=[lambda exc: "several" in str(exc)])
    assert outcome(breaker, recorder, group(Unreachable())) == "success"


def test_a_group_that_is_excluded_decides_for_itself_inside_another(group, recorder):
    """The leaves inside the excluded group are not looked at, the leaves beside it
    are."""

    class Partial(group.kind):
        """Some shards did not answer, which is fine."""

    def shards():
        return Partial("some shards", [Unreachable()])

    breaker = CircuitBreaker(exclude=[Partial, NotFound])
    assert outcome(breaker, recorder, group(shards(), NotFound())) == "success"
    breaker.remove_listener(recorder)
    recorder.events.clear()
    assert outcome(breaker, recorder, group(shards(), Unreachable())) == "failure"


def test_a_base_class_of_the_leaves_excludes_them_in_a_base_group(group, recorder):
    """A BaseExceptionGroup is no Exception, but its leaves are judged by themselves."""
    breaker = CircuitBreaker(exclude=[Exception])
    exc = group(Unreachable(), SystemExit())
    assert outcome(breaker, recorder, exc) == "success"


@pytest.mark.parametrize("exclude", ["nothing", "groups", "everything"])
def test_a_group_of_nothing_but_abandoned_is_abandoned_whatever_is_excluded(
    exclude, group, recorder
):
    """No class and no predicate turns a Ctrl-C into a success."""
    asked = []
    exclusions = {
        "nothing": [],
        "groups": [group.kind],
        "everything": [BaseException, asked.append],
    }[exclude]
    exc = group(KeyboardInterrupt(), group(asyncio.CancelledError()))
    assert outcome(CircuitBreaker(exclude=exclusions), recorder, exc) == "abandoned"
    assert asked == []


def test_a_predicate_is_asked_about_each_leaf_until_one_fails(group):
    """Such a predicate was written for single exceptions."""

    class HTTPError(Exception):
        def __init__(self, status):
            self.status = status

    breaker = CircuitBreaker(exclude=[lambda exc: getattr(exc, "status", 500) < 500])
    for statuses, failures in (((404, 422), 0), ((404, 503), 1)):
        breaker.fail_counter = 0
        exc = group(*map(HTTPError, statuses))
        with pytest.raises(group.kind):
            breaker.call(raising(exc))
        assert breaker.fail_counter == failures


def test_a_predicate_that_cannot_judge_a_group_still_judges_its_leaves(group, caplog):
    """The predicate's AttributeError is logged, and then the leaves are judged."""

    class HTTPError(Exception):
        status = 404

    breaker = CircuitBreaker(exclude=[lambda exc: exc.status < 500])
    breaker.fail_counter = 2
    with caplog.at_level(logging.ERROR, "pybreaker"):
        with pytest.raises(group.kind):
            breaker.call(raising(group(HTTPError(), HTTPError())))
    assert breaker.fail_counter == 0
    assert "AttributeError" in caplog.text


def test_no_predicate_is_asked_about_an_abandoned_leaf(group):
    """No predicate is asked about an abandonment that is raised by itself either."""
    asked = []

    def is_about_nothing(exc):
        asked.append(exc)
        return False

    exc = group(KeyboardInterrupt(), Unreachable())
    breaker = CircuitBreaker(exclude=[is_about_nothing])
    with pytest.raises(group.kind):
        breaker.call(raising(exc))
    assert asked == [exc, exc.exceptions[1]]
    assert breaker.fail_counter == 1


@pytest.mark.parametrize("answer", [True, False])
def test_a_subclass_is_asked_once_about_the_group_that_was_raised(
    answer, group, recorder
):
    """The subclass's is_system_error decides for the group, and never sees a leaf."""
    asked = []

    class Deciding(CircuitBreaker):
        def is_system_error(self, exception):
            asked.append(exception)
            return answer

    exc = group(NotFound(), Unreachable())
    expected = "failure" if answer else "success"
    breaker = Deciding(exclude=[NotFound])
    assert outcome(breaker, recorder, exc) == expected
    assert asked == [exc]


def test_what_excludes_a_group_decides_for_all_of_it_in_a_subclass(recorder, group):
    """`exclude` matches the group, and `ignore` only what is in the group."""

    class Watching(CircuitBreaker):
        def is_system_error(self, exception):
            return super().is_system_error(exception)

    exc = group(NotFound())
    for kind in (CircuitBreaker, Watching):
        breaker = kind(exclude=[group.kind], ignore=[NotFound])
        recorder.events.clear()
        assert outcome(breaker, recorder, exc) == "success"


def test_a_subclass_that_asks_super_gets_the_answer_of_the_leaves(group):
    """The subclass adds to the library's judgement without taking the group apart."""
    asked = []

    class Noting(CircuitBreaker):
        def is_system_error(self, exception):
            asked.append(exception)
            return super().is_system_error(exception)

    breaker = Noting(exclude=[NotFound])
    for exc, failures in (
        (group(NotFound(), group(NotFound())), 0),
        (group(NotFound(), group(Unreachable())), 1),
    ):
        with pytest.raises(group.kind):
            breaker.call(raising(exc))
        assert breaker.fail_counter == failures
        assert asked.pop() is exc
    assert asked == []


def test_is_system_error_answers_for_groups_as_well(group):
    """Code that drives a circuit by hand asks is_system_error()."""
    breaker = CircuitBreaker(exclude=[NotFound])
    assert breaker.is_system_error(group(NotFound(), Unreachable()))
    assert not breaker.is_system_error(group(NotFound(), group(NotFound())))
    assert not breaker.is_system_error(group(KeyboardInterrupt(), SystemExit()))


def test_a_group_handed_over_by_hand_is_judged_by_its_leaves(group):
    """Services for asyncio hand failures over by state._handle_error()."""
    breaker = CircuitBreaker(exclude=[NotFound])
    breaker.fail_counter = 2
    breaker.state._handle_error(group(NotFound(), Unreachable()), reraise=False)
    assert breaker.fail_counter == 3
    breaker.state._handle_error(group(SystemExit()), reraise=False)
    assert breaker.fail_counter == 3
    breaker.state._handle_error(group(NotFound(), NotFound()), reraise=False)
    assert breaker.fail_counter == 0


@pytest.mark.skipif(sys.version_info < (3, 11), reason="needs asyncio.TaskGroup")
@pytest.mark.parametrize(("status", "failures"), [("missing", 0), ("down", 1)])
def test_a_task_group_is_judged_by_what_its_tasks_raised(status, failures):
    """A task group wraps even a single exception, which `exclude` names, in a group."""
    breaker = CircuitBreaker(exclude=[NotFound])

    async def fetch(part):
        await asyncio.sleep(0)
        raise NotFound if status == "missing" or part else Unreachable

    @breaker
    async def page():
        async with asyncio.TaskGroup() as tasks:
            for part in range(2):
                tasks.create_task(fetch(part))

    with pytest.raises(builtins.ExceptionGroup):
        asyncio.run(page())
    assert breaker.fail_counter == failures
