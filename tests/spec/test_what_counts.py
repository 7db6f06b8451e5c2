"""What counts: `ignore`, `exclude`, `include`, and exception groups."""

from __future__ import annotations

import asyncio
import builtins
import contextvars
import logging
import threading
import types

import guards
import pytest
from support import PATIENCE, fail, name_of, while_locked

from pybreaker import CircuitBreaker, CircuitBreakerError


def raising(exc):
    def raise_it():
        raise exc

    return raise_it


def outcome(breaker, exc, way=guards.by_call):
    """What the breaker makes of a call that raises `exc`, by what it counts and
    tells. The circuit is half-open, where each outcome shows."""
    told = []

    class Told:
        def success(self, cb):
            told.append("success")

        def failure(self, cb, told_exc):
            assert told_exc is exc
            told.append("failure")

    listener = Told()
    breaker.add_listener(listener)
    breaker.half_open()
    state = breaker.state
    try:
        way(breaker, raising(exc))
    except BaseException as raised:
        opened = isinstance(raised, CircuitBreakerError)
        assert raised is exc or (opened and raised.__cause__ is exc)
    breaker.remove_listener(listener)
    if not told:
        assert breaker.state is state
        assert breaker.retry_after == 0  # the trial has given its place back
        return "abandoned"
    assert breaker.current_state == {"success": "closed", "failure": "open"}[told[0]]
    (only,) = told
    return only


# The order.


CASES = [
    ({}, "failure"),
    ({"ignore": [OSError]}, "abandoned"),
    ({"exclude": [OSError]}, "success"),
    ({"include": [OSError]}, "failure"),
    ({"include": [KeyError]}, "success"),
    ({"ignore": [OSError], "exclude": [OSError]}, "abandoned"),
    ({"ignore": [OSError], "include": [OSError]}, "abandoned"),
    ({"ignore": [OSError], "include": [KeyError]}, "abandoned"),
    ({"exclude": [OSError], "include": [OSError]}, "success"),
    ({"exclude": [KeyError], "include": [OSError]}, "failure"),
    ({"ignore": [KeyError], "exclude": [KeyError], "include": [OSError]}, "failure"),
    ({"include": []}, "failure"),
    ({"include": None, "ignore": None}, "failure"),
    ({"include": [lambda exc: exc.errno == 2]}, "failure"),
    ({"include": [lambda exc: exc.errno == 3]}, "success"),
    ({"ignore": [KeyError, lambda exc: exc.errno == 2]}, "abandoned"),
    ({"include": [KeyError, ValueError, OSError]}, "failure"),
]


@pytest.mark.parametrize("settings, expected", CASES, ids=name_of)
@pytest.mark.parametrize("later", [False, True], ids=["made so", "set so"])
def test_an_exception_is_judged_in_this_order(settings, expected, later):
    """`ignore` decides first, then `exclude`, then `include`, else it is a failure."""
    if later:
        breaker = CircuitBreaker()
        for name, value in settings.items():
            setattr(breaker, name, value)
    else:
        breaker = CircuitBreaker(**settings)
    assert outcome(breaker, FileNotFoundError(2, "gone")) == expected


@guards.every_way
@pytest.mark.parametrize(
    "settings, expected",
    [
        ({}, "failure"),
        ({"ignore": [OSError]}, "abandoned"),
        ({"exclude": [OSError]}, "success"),
        ({"include": [OSError]}, "failure"),
        ({"include": [KeyError]}, "success"),
    ],
    ids=name_of,
)
def test_every_way_to_guard_judges_alike(way, settings, expected):
    """Functions, coroutines, generators and blocks."""
    assert outcome(CircuitBreaker(**settings), OSError(), way) == expected


@guards.every_way
def test_an_ignored_exception_counts_nothing_in_a_closed_circuit(way):
    """An ignored exception forgets no failure, and adds none."""
    breaker = CircuitBreaker(ignore=[KeyError])
    fail(breaker, 2)
    with pytest.raises(KeyError):
        way(breaker, {}.popitem)
    assert breaker.fail_counter == 2


def test_an_exception_that_is_not_included_forgets_failures():
    """Such an exception is a success like any other."""
    breaker = CircuitBreaker(include=[ConnectionError])
    with pytest.raises(ConnectionError):
        breaker.call(raising(ConnectionError()))
    assert breaker.fail_counter == 1
    with pytest.raises(KeyError):
        breaker.call({}.popitem)
    assert breaker.fail_counter == 0


@pytest.mark.parametrize(
    "exc",
    [KeyboardInterrupt(), SystemExit(), GeneratorExit(), asyncio.CancelledError()],
)
@pytest.mark.parametrize("setting", ["ignore", "exclude", "include"])
def test_no_predicate_is_asked_about_the_abandoned_kinds(exc, setting):
    """Whatever the settings say, the call is abandoned."""
    asked = []
    breaker = CircuitBreaker(**{setting: [asked.append, BaseException]})
    assert outcome(breaker, exc) == "abandoned"
    assert asked == []


def test_a_plain_base_exception_is_judged_like_an_exception():
    """Such an exception does not abandon the call."""

    class Strange(BaseException):
        pass

    assert outcome(CircuitBreaker(), Strange()) == "failure"
    assert outcome(CircuitBreaker(ignore=[Strange]), Strange()) == "abandoned"
    assert outcome(CircuitBreaker(include=[Exception]), Strange()) == "success"


def test_each_predicate_is_asked_in_turn_and_only_as_far_as_needed():
    """A match in `exclude` leaves the predicates of `include` unasked."""
    asked = []

    def saying(name, answer):
        return lambda exc: asked.append(name) or answer

    breaker = CircuitBreaker(
        ignore=[saying("ignore", False)],
        exclude=[saying("exclude", False), saying("exclude too", False)],
        include=[saying("include", True), saying("include too", True)],
    )
    assert outcome(breaker, OSError()) == "failure"
    assert asked == ["ignore", "exclude", "exclude too", "include"]
    asked.clear()
    breaker.exclude = [saying("exclude", True)]
    assert outcome(breaker, OSError()) == "success"
    assert asked == ["ignore", "exclude"]
    asked.clear()
    breaker.ignore = [saying("ignore", True)]
    assert outcome(breaker, OSError()) == "abandoned"
    assert asked == ["ignore"]


@pytest.mark.parametrize(
    "setting, expected",
    [("ignore", "failure"), ("exclude", "failure"), ("include", "success")],
)
def test_a_predicate_that_raises_is_logged_and_did_not_match(setting, expected, caplog):
    """The log has the traceback, and the caller gets the function's own exception."""

    def broken(exc):
        raise ZeroDivisionError

    breaker = CircuitBreaker(**{setting: [broken]})
    with caplog.at_level(logging.ERROR, "pybreaker"):
        assert outcome(breaker, OSError()) == expected
    (record,) = caplog.records
    assert record.exc_info[0] is ZeroDivisionError
    assert "broken" in record.getMessage()


def test_a_predicate_that_takes_itself_out_of_the_list_hides_no_other():
    """Code in the field changes the list of exclusions in place."""
    breaker = CircuitBreaker()

    def once(exc):
        breaker._excluded_exceptions.remove(once)
        return False

    breaker.add_excluded_exceptions(once, ValueError)
    assert breaker._excluded_exceptions == [once, ValueError]
    assert outcome(breaker, ValueError()) == "success"
    assert breaker.exclude == (ValueError,)


@pytest.mark.parametrize("setting", ["ignore", "exclude", "include"])
def test_predicates_are_asked_without_the_lock(setting):
    """The predicates answer while another thread holds the lock."""
    asked = threading.Event()

    def predicate(exc):
        asked.set()
        return True

    breaker = CircuitBreaker(**{setting: [predicate]})

    def call():
        with pytest.raises(OSError):
            breaker.call(raising(OSError()))

    if setting != "include":  # which ends in a failure, whose counting takes the lock
        while_locked(breaker, call)
        return
    thread = threading.Thread(target=call)
    with breaker._lock:
        thread.start()
        assert asked.wait(PATIENCE)
    thread.join(PATIENCE)
    assert breaker.fail_counter == 1


def test_a_predicate_may_use_the_breaker():
    """The predicate reads the state, and changes the very settings that asked it."""

    def predicate(exc):
        breaker.exclude = []
        breaker.close()
        return True

    breaker = CircuitBreaker(fail_max=1, exclude=[predicate])
    with pytest.raises(OSError):
        breaker.call(raising(OSError()))
    assert (breaker.exclude, breaker.fail_counter) == ((), 0)


@pytest.mark.parametrize("setting", ["ignore", "exclude", "include"])
def test_what_holds_for_the_outcome_is_what_holds_when_the_call_ends(setting):
    """A setting that is changed while a call runs decides on that call."""
    breaker = CircuitBreaker()

    def work():
        setattr(breaker, setting, [KeyError])
        raise OSError

    with pytest.raises(OSError):
        breaker.call(work)
    assert breaker.fail_counter == (0 if setting == "include" else 1)
    setattr(breaker, setting, None)
    breaker.fail_counter = 1

    def work_again():
        setattr(breaker, setting, [OSError])
        raise OSError

    with pytest.raises(OSError):
        breaker.call(work_again)
    counts = {"ignore": 1, "exclude": 0, "include": 2}
    assert breaker.fail_counter == counts[setting]


# What the settings take.


@pytest.mark.parametrize("setting", ["exclude", "include", "ignore"])
def test_the_settings_are_tuples_and_take_any_iterable_or_none(setting):
    """An iterator is read once; None stands for no kinds."""

    def predicate(exc):
        return True

    kinds = (KeyError, predicate)
    assert getattr(CircuitBreaker(), setting) == ()
    assert getattr(CircuitBreaker(**{setting: iter(kinds)}), setting) == kinds
    breaker = CircuitBreaker()
    for value in (kinds, list(kinds), iter(kinds), dict.fromkeys(kinds)):
        setattr(breaker, setting, None)
        assert getattr(breaker, setting) == ()
        setattr(breaker, setting, value)
        assert getattr(breaker, setting) == kinds


async def coroutine_function(exc):
    return False


def generator_function(exc):
    yield False


async def async_generator_function(exc):
    yield False


class Asynchronous:
    async def __call__(self, exc):
        return False


@pytest.mark.parametrize("setting", ["exclude", "include", "ignore"])
@pytest.mark.parametrize(
    "value",
    [
        ValueError,
        "ValueError",
        b"ValueError",
        3,
        [3],
        [ValueError, "KeyError"],
        [ValueError()],
        [coroutine_function],
        [generator_function],
        [async_generator_function],
        [Asynchronous()],
    ],
    ids=name_of,
)
def test_what_is_no_iterable_of_kinds_is_refused(setting, value):
    """The error names the parameter and the value; a setter changes nothing."""
    with pytest.raises(TypeError, match=setting) as caught:
        CircuitBreaker(**{setting: value})
    named = value[-1] if isinstance(value, list) else value
    assert repr(named) in str(caught.value)
    breaker = CircuitBreaker(**{setting: [KeyError]})
    with pytest.raises(TypeError, match=setting):
        setattr(breaker, setting, value)
    assert getattr(breaker, setting) == (KeyError,)


@pytest.mark.parametrize("setting", ["exclude", "include", "ignore"])
def test_one_bare_class_is_told_how_to_write_it(setting):
    """The error says to write the class in brackets."""
    with pytest.raises(TypeError, match=rf"write {setting}=\[KeyError\]"):
        CircuitBreaker(**{setting: KeyError})


# is_system_error.


def test_is_system_error_answers_for_exclude_and_include():
    """is_system_error() does not ask `ignore`."""
    breaker = CircuitBreaker(exclude=[KeyError], include=[LookupError, OSError])
    assert not breaker.is_system_error(KeyError())
    assert breaker.is_system_error(IndexError())
    assert breaker.is_system_error(OSError())
    assert not breaker.is_system_error(ValueError())
    breaker.ignore = [OSError]
    assert breaker.is_system_error(OSError())


@guards.every_way
def test_a_subclass_that_judges_itself_is_asked_where_nothing_is_set(way):
    """The subclass's `is_system_error` alone says what is a failure."""

    class Judges(CircuitBreaker):
        def is_system_error(self, exception):
            return not isinstance(exception, OSError)

    assert outcome(Judges(), OSError(), way) == "success"
    assert outcome(Judges(), ValueError(), way) == "failure"


def test_a_subclass_that_judges_itself_is_asked_after_ignore():
    """The subclass's `is_system_error` stands in the place of `exclude` and
    `include`."""
    asked = []

    class Judges(CircuitBreaker):
        def is_system_error(self, exception):
            asked.append(exception)
            return isinstance(exception, KeyError)

    breaker = Judges(ignore=[OSError], exclude=[KeyError], include=[ValueError])
    assert outcome(breaker, OSError()) == "abandoned"
    assert outcome(breaker, KeyboardInterrupt()) == "abandoned"
    assert asked == []
    assert outcome(breaker, KeyError()) == "failure"
    assert outcome(breaker, ValueError()) == "success"
    assert len(asked) == 2


# Groups.


class BackportedGroup(BaseException):
    """A group as the package exceptiongroup has it, for Pythons without groups."""

    def __init__(self, message, exceptions):
        super().__init__(message)
        self.exceptions = tuple(exceptions)


@pytest.fixture(params=["own", "backport"])
def group(request, monkeypatch):
    """Makes a group of exceptions, of Python's kind and of the backport's."""
    if request.param == "own":
        if not hasattr(builtins, "BaseExceptionGroup"):
            pytest.skip("this Python has no groups")
        return lambda *leaves: builtins.BaseExceptionGroup("group", leaves)
    module = types.SimpleNamespace(BaseExceptionGroup=BackportedGroup)
    monkeypatch.setitem(__import__("sys").modules, "exceptiongroup", module)
    return lambda *leaves: BackportedGroup("group", leaves)


SETTINGS = {"ignore": [KeyError], "exclude": [OSError]}
WITH_INCLUDE = {**SETTINGS, "include": [ConnectionError, ZeroDivisionError, OSError]}


@pytest.mark.parametrize(
    "settings, leaves, expected",
    [
        ({}, [ValueError()], "failure"),
        ({}, [KeyboardInterrupt(), ValueError()], "failure"),
        ({}, [KeyboardInterrupt(), asyncio.CancelledError()], "abandoned"),
        (SETTINGS, [KeyError(), OSError(), ValueError()], "failure"),
        (SETTINGS, [OSError(), KeyError(), KeyboardInterrupt()], "success"),
        (SETTINGS, [KeyError(), KeyError()], "abandoned"),
        (SETTINGS, [KeyError(), KeyboardInterrupt()], "abandoned"),
        (SETTINGS, [OSError()], "success"),
        (WITH_INCLUDE, [ValueError()], "success"),
        (WITH_INCLUDE, [ValueError(), ZeroDivisionError()], "failure"),
        (WITH_INCLUDE, [ValueError(), ConnectionError()], "success"),
        (WITH_INCLUDE, [KeyError(), ValueError()], "success"),
    ],
    ids=name_of,
)
def test_a_group_is_judged_leaf_by_leaf(group, settings, leaves, expected):
    """A group is a failure if any leaf is one, else a success if any leaf is one, else
    abandoned."""
    breaker = CircuitBreaker(**settings)
    assert outcome(breaker, group(*leaves)) == expected
    assert outcome(breaker, group(group(*leaves))) == expected
    for leaf in leaves:
        assert outcome(breaker, group(group(leaf), *leaves)) == expected


def has_message(exc):
    return "group" in str(exc)


def test_what_matches_a_group_decides_for_all_of_it(group):
    """A group inside a group decides likewise; `include` is asked about no group."""
    breaker = CircuitBreaker(ignore=[has_message])
    assert outcome(breaker, group(ValueError())) == "abandoned"
    breaker = CircuitBreaker(exclude=[has_message])
    assert outcome(breaker, group(ValueError())) == "success"

    def is_pair(exc):
        return len(getattr(exc, "exceptions", ())) == 2

    pair = group(ValueError(), ValueError())
    breaker = CircuitBreaker(exclude=[is_pair])
    assert outcome(breaker, group(pair)) == "success"
    assert outcome(breaker, group(pair, ValueError(), ValueError())) == "failure"
    breaker = CircuitBreaker(ignore=[is_pair])
    assert outcome(breaker, group(pair)) == "abandoned"
    breaker = CircuitBreaker(ignore=[is_pair], exclude=[KeyError])
    assert outcome(breaker, group(pair, KeyError(), KeyError())) == "success"


def test_include_is_asked_about_leaves(group):
    """A predicate of `include` that matches only groups makes no failure."""
    asked = []

    def asked_about(exc):
        asked.append(exc)
        return hasattr(exc, "exceptions")

    breaker = CircuitBreaker(include=[asked_about])
    leaf, other = ValueError(), KeyError()
    assert outcome(breaker, group(leaf, group(other))) == "success"
    assert asked == [leaf, other]


def test_no_predicate_is_asked_about_an_abandoned_leaf(group):
    """The leaf is abandoned, whatever the settings say."""
    asked = []
    breaker = CircuitBreaker(exclude=[lambda exc: asked.append(exc)], include=[OSError])
    leaf, interrupt = OSError(), KeyboardInterrupt()
    whole = group(interrupt, leaf)
    assert outcome(breaker, whole) == "failure"
    assert asked == [whole, leaf]


def test_a_subclass_that_judges_itself_is_asked_once_about_a_group(group):
    """The subclass is asked about what was raised, and not about leaves."""
    asked = []

    class Judges(CircuitBreaker):
        def is_system_error(self, exception):
            asked.append(exception)
            return super().is_system_error(exception)

    whole = group(OSError(), group(KeyError()))
    assert outcome(Judges(exclude=[OSError]), whole) == "failure"
    assert asked == [whole]
    assert outcome(Judges(exclude=[OSError, KeyError]), whole) == "success"
    assert outcome(Judges(ignore=[type(whole)]), whole) == "abandoned"


def test_a_subclass_that_only_watches_judges_groups_as_the_library_does(group):
    """A group of nothing but ignored exceptions is abandoned."""

    class Watches(CircuitBreaker):
        def is_system_error(self, exception):
            return super().is_system_error(exception)

    settings = {"ignore": [KeyError], "exclude": [OSError]}
    for leaves in ([KeyError()], [KeyError(), KeyboardInterrupt()]):
        assert outcome(CircuitBreaker(**settings), group(*leaves)) == "abandoned"
        assert outcome(Watches(**settings), group(*leaves)) == "abandoned"
    mixed = group(KeyError(), OSError())
    assert outcome(Watches(**settings), mixed) == "success"


def test_a_call_within_a_trial_is_judged_and_decides_nothing():
    """The trial goes on after an ignored, an excluded and a failing call inside."""
    breaker = CircuitBreaker(ignore=[KeyError], exclude=[OSError])
    breaker.half_open()

    def trial():
        for exc in (KeyError(), OSError(), ValueError()):
            with pytest.raises(type(exc)):
                breaker.call(raising(exc))
            assert breaker.current_state == "half-open"
            with pytest.raises(CircuitBreakerError):
                contextvars.Context().run(breaker.call, int)

    breaker.call(trial)
    assert breaker.current_state == "closed"
