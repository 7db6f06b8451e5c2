"""How a breaker is made, and what it refuses: "Construction" in the
specification."""

from __future__ import annotations

import abc
import decimal
import inspect
import math
import re
import sys
import types

import pytest
from internals import storage_of

from pybreaker import (
    CircuitBreaker,
    CircuitBreakerError,
    CircuitBreakerListener,
    CircuitMemoryStorage,
)


class Index:
    """A whole number that is no int, as numpy's are."""

    def __init__(self, value):
        self.value = value

    def __index__(self):
        return self.value

    def __repr__(self):
        return f"Index({self.value})"


def refusal(kind, parameter, value):
    """Expects an error of exactly this kind that names the parameter and the value."""
    words = f"(?s)(?=.*{re.escape(parameter)})(?=.*{re.escape(repr(value))})"
    return pytest.raises(kind, match=words)


def raising(exc):
    def raise_it():
        raise exc

    return raise_it


# The arguments and their order.


def test_the_arguments_of_older_releases_may_be_given_by_position(recorder):
    """The order is the one of every release before 1.4.0, success_threshold last. The
    arguments that no release had are by name only."""
    storage = CircuitMemoryStorage("closed")
    breaker = CircuitBreaker(
        1, 2.5, [KeyError], [recorder], storage, "database", False, 7
    )
    assert breaker.fail_max == 1
    assert breaker.reset_timeout == 2.5
    assert breaker.excluded_exceptions == (KeyError,)
    assert breaker.listeners == (recorder,)
    assert storage_of(breaker) is storage
    assert breaker.name == "database"
    assert breaker.success_threshold == 7
    with pytest.raises(ValueError):  # throw_new_error_on_trip is False
        breaker.call(raising(ValueError()))
    assert breaker.current_state == "open"
    with pytest.raises(TypeError):
        CircuitBreaker(1, 2.5, [KeyError], [recorder], storage, "db", False, 7, 10)


def test_arguments_have_their_names():
    """Each argument may be given by keyword, the older ones under their old names."""
    assert list(inspect.signature(CircuitBreaker).parameters) == [
        "fail_max",
        "reset_timeout",
        "exclude",
        "listeners",
        "state_storage",
        "name",
        "throw_new_error_on_trip",
        "success_threshold",
        "window_size",
        "window_seconds",
        "max_reset_timeout",
        "include",
        "ignore",
        "failure_result",
        "dry_run",
    ]


def test_a_breaker_needs_no_argument():
    """The defaults: five failures, a minute, one trial, nothing else."""
    breaker = CircuitBreaker()
    assert breaker.fail_max == 5
    assert breaker.reset_timeout == 60
    assert breaker.excluded_exceptions == ()
    assert breaker.listeners == ()
    assert breaker.name is None
    assert breaker.success_threshold == 1
    assert breaker.current_state == "closed"
    assert breaker.fail_counter == 0
    assert breaker.success_counter == 0


def test_the_failure_that_trips_raises_a_new_error_by_default():
    """By default the caller gets CircuitBreakerError, from the function's exception."""
    with pytest.raises(CircuitBreakerError):
        CircuitBreaker(1).call(raising(ValueError()))


def test_breakers_do_not_share_a_default_storage():
    """Each breaker that is given no storage has one of its own."""
    one, other = CircuitBreaker(), CircuitBreaker()
    one.open()
    assert other.current_state == "closed"


# Numbers. A row says what a parameter takes, and as what it reads back.

SETTABLE = ("fail_max", "success_threshold", "reset_timeout")

GOOD_NUMBERS = [
    ("fail_max", 1, 1),
    ("fail_max", 3.0, 3),
    ("fail_max", Index(4), 4),
    ("fail_max", 10**30, 10**30),
    ("fail_max", math.inf, math.inf),
    ("fail_max", float("inf"), math.inf),
    ("success_threshold", 1, 1),
    ("success_threshold", 2.0, 2),
    ("success_threshold", Index(4), 4),
    ("reset_timeout", 0, 0),
    ("reset_timeout", 0.0, 0.0),
    ("reset_timeout", 30, 30),
    ("reset_timeout", 0.25, 0.25),
    ("reset_timeout", Index(4), 4),
    ("reset_timeout", math.inf, math.inf),
    ("reset_timeout", float("inf"), math.inf),  # another object than math.inf
    pytest.param(
        "reset_timeout", int(sys.float_info.max), sys.float_info.max, id="longest"
    ),
]

# These are written to a breaker that exists, so they are no arguments.
GOOD_COUNTS = [
    ("fail_counter", 0, 0),
    ("fail_counter", 4, 4),
    ("fail_counter", 3.0, 3),
    ("fail_counter", Index(2), 2),
]

WRONG_KINDS = [
    (parameter, value)
    for parameter in SETTABLE
    for value in ("5", b"5", None, [5], (), 5j, True, False, object, int)
]

OUT_OF_RANGE = [
    ("fail_max", 0),
    ("fail_max", -1),
    ("fail_max", 0.0),
    ("fail_max", 2.5),
    ("fail_max", -math.inf),
    ("fail_max", math.nan),
    ("success_threshold", 0),
    ("success_threshold", -1),
    ("success_threshold", 0.0),
    ("success_threshold", 1.5),
    ("success_threshold", math.inf),
    ("success_threshold", -math.inf),
    ("success_threshold", math.nan),
    ("reset_timeout", -1),
    ("reset_timeout", -0.001),
    ("reset_timeout", -math.inf),
    ("reset_timeout", math.nan),
]

BAD_NUMBERS = [
    *((TypeError, parameter, value) for parameter, value in WRONG_KINDS),
    *((ValueError, parameter, value) for parameter, value in OUT_OF_RANGE),
]

BAD_COUNTS = [
    *((TypeError, "fail_counter", value) for value in ("1", None, True, 1j, [1])),
    *(
        (ValueError, "fail_counter", value)
        for value in (-1, -1.0, 0.5, math.inf, -math.inf, math.nan)
    ),
]


@pytest.mark.parametrize(("parameter", "value", "read"), GOOD_NUMBERS)
def test_a_number_in_range_is_taken(parameter, value, read):
    """Whole numbers from 1, seconds from 0, and infinity where it makes sense."""
    breaker = CircuitBreaker(**{parameter: value})
    assert getattr(breaker, parameter) == read


@pytest.mark.parametrize(("parameter", "value", "read"), GOOD_NUMBERS + GOOD_COUNTS)
def test_a_setter_takes_what_the_argument_takes(parameter, value, read):
    """What may be given at the start may be set later."""
    breaker = CircuitBreaker()
    setattr(breaker, parameter, value)
    assert getattr(breaker, parameter) == read


@pytest.mark.parametrize("parameter", ["fail_max", "success_threshold"])
def test_a_whole_float_becomes_a_whole_number(parameter):
    """A float of whole value will do, and reads back without its point."""
    breaker = CircuitBreaker(**{parameter: 3.0})
    assert str(getattr(breaker, parameter)) == "3"


@pytest.mark.parametrize(("kind", "parameter", "value"), BAD_NUMBERS)
def test_an_argument_that_makes_no_sense_is_refused(kind, parameter, value):
    """The error comes at once, and names the parameter and the value."""
    with refusal(kind, parameter, value):
        CircuitBreaker(**{parameter: value})


@pytest.mark.parametrize(("kind", "parameter", "value"), BAD_NUMBERS + BAD_COUNTS)
def test_a_setter_refuses_what_the_argument_refuses(kind, parameter, value):
    """The setter raises the same error, and the breaker is as it was."""
    breaker = CircuitBreaker(fail_max=3, reset_timeout=4, success_threshold=2)
    breaker.fail_counter = 1
    with refusal(kind, parameter, value):
        setattr(breaker, parameter, value)
    assert breaker.fail_max == 3
    assert breaker.reset_timeout == 4
    assert breaker.success_threshold == 2
    assert breaker.fail_counter == 1


def test_a_timeout_that_no_float_can_hold_is_refused():
    """No float can tell when such a timeout ends; the error says what to write
    instead."""
    with refusal(ValueError, "reset_timeout", 10**400) as error:
        CircuitBreaker(reset_timeout=10**400)
    assert "math.inf" in str(error.value)


def test_infinite_fail_max_only_observes(fail, boom):
    """A breaker with fail_max=math.inf counts failures and never opens."""
    breaker = CircuitBreaker(fail_max=math.inf)
    for _ in range(50):
        with pytest.raises(boom):
            breaker.call(fail)
    assert breaker.fail_counter == 50
    assert breaker.current_state == "closed"


def test_infinite_reset_timeout_waits_for_a_move_by_hand(clock):
    """With reset_timeout=math.inf the circuit stays open until somebody closes it."""
    breaker = CircuitBreaker(reset_timeout=math.inf)
    breaker.open()
    clock.advance(1e15)
    with pytest.raises(CircuitBreakerError):
        breaker.call(int)
    breaker.close()
    assert breaker.call(int) == 0


# The other plain arguments.


@pytest.mark.parametrize(
    ("parameter", "value"),
    [
        ("name", 5),
        ("name", b"database"),
        ("name", ["database"]),
        ("throw_new_error_on_trip", None),
        ("throw_new_error_on_trip", 1),
        ("throw_new_error_on_trip", "no"),
        ("state_storage", "closed"),
        ("state_storage", CircuitMemoryStorage),
        ("state_storage", False),
    ],
)
def test_an_argument_of_the_wrong_kind_is_refused(parameter, value):
    """The error is a TypeError and names the parameter and the value."""
    with refusal(TypeError, parameter, value):
        CircuitBreaker(**{parameter: value})


@pytest.mark.parametrize("name", ["", "database", None])
def test_a_name_is_a_string_or_none(name):
    """A name may be given at the start, or set later."""
    assert CircuitBreaker(name=name).name == name
    breaker = CircuitBreaker(name="before")
    breaker.name = name
    assert breaker.name == name


def test_a_name_of_the_wrong_kind_cannot_be_set():
    """The error names parameter and value, and the name stays."""
    breaker = CircuitBreaker(name="database")
    with refusal(TypeError, "name", 5):
        breaker.name = 5
    assert breaker.name == "database"


@pytest.mark.parametrize("state", ["ajar", "half_open", "Open", "", None, 1])
def test_a_state_of_another_name_is_refused(state, recorder):
    """There are three names; any other is a ValueError and moves nothing."""
    breaker = CircuitBreaker(listeners=[recorder])
    with refusal(ValueError, "state", state):
        breaker.state = state
    assert breaker.current_state == "closed"
    assert recorder.events == []


# Exclusions.


class Mixin:
    """A class that is no exception, and of which some exceptions are instances."""


class Meta(type):
    """A metaclass that makes its classes iterable, as that of enumerations does."""

    def __iter__(cls):
        return iter(())


class WithMetaclass(Exception, metaclass=Meta):
    pass


class Abstract(abc.ABC):  # noqa: B024
    """An ABC that takes any exception with a `business` attribute for its instance."""

    @classmethod
    def __subclasshook__(cls, subclass):
        return hasattr(subclass, "business")


class Derived(KeyError):
    pass


class Mixed(Mixin, Exception):
    pass


class Business(Exception):
    business = True


class OddlyMade(Exception, metaclass=type("AnotherMeta", (type,), {})):
    pass


def is_about_money(exc):
    return "money" in str(exc)


class Judge:
    """A predicate that is an object."""

    def __call__(self, exc):
        return "money" in str(exc)

    def judge(self, exc):
        return "money" in str(exc)


@pytest.mark.parametrize(
    ("exclusion", "excluded", "other"),
    [
        pytest.param(KeyError, KeyError(), ValueError(), id="class"),
        pytest.param(KeyError, Derived(), LookupError(), id="subclass"),
        pytest.param(Mixin, Mixed(), Exception(), id="mixin"),
        pytest.param(Abstract, Business(), Exception(), id="abc"),
        pytest.param(OddlyMade, OddlyMade(), Exception(), id="metaclass"),
        pytest.param(WithMetaclass, WithMetaclass(), Exception(), id="iterable-class"),
        pytest.param(
            is_about_money, ValueError("money"), ValueError("time"), id="function"
        ),
        pytest.param(Judge(), ValueError("money"), ValueError("time"), id="object"),
        pytest.param(
            Judge().judge, ValueError("money"), ValueError("time"), id="method"
        ),
        pytest.param(bool, Exception(), None, id="class-that-could-be-called"),
    ],
)
def test_what_an_exclusion_matches(exclusion, excluded, other):
    """A class matches by isinstance, any other callable is asked."""
    breaker = CircuitBreaker(exclude=[exclusion])
    if other is None:
        # bool(exc) would be true, but a class is a class.
        assert breaker.is_system_error(excluded)
    else:
        assert not breaker.is_system_error(excluded)
        assert breaker.is_system_error(other)


def test_classes_and_predicates_mix_freely():
    """One class or predicate that matches is enough to exclude."""
    breaker = CircuitBreaker(exclude=[KeyError, is_about_money, Mixin])
    for exc in (KeyError(), ValueError("money"), Mixed()):
        assert not breaker.is_system_error(exc)
    assert breaker.is_system_error(ValueError("time"))


def test_a_predicate_is_not_asked_about_what_is_excluded_already():
    """The predicate may count on attributes that excluded exceptions lack."""

    def is_about_the_client(exc):
        asked.append(exc)
        return exc.status < 500

    asked = []
    breaker = CircuitBreaker(exclude=[KeyError, is_about_the_client])
    assert not breaker.is_system_error(KeyError())
    assert asked == []


def test_an_exception_is_judged_by_itself_alone():
    """The cause and the context of an exception may be excluded or not."""
    breaker = CircuitBreaker(exclude=[KeyError])
    failure, excluded = OSError(), KeyError()
    failure.__cause__ = failure.__context__ = KeyError()
    excluded.__cause__ = excluded.__context__ = OSError()
    assert breaker.is_system_error(failure)
    assert not breaker.is_system_error(excluded)


def test_a_predicate_is_given_the_exception():
    """A predicate gets the very object that was raised, and nothing else."""
    seen = []
    exc = ValueError("money")
    breaker = CircuitBreaker(1, exclude=[lambda *args: seen.append(args) or True])
    with pytest.raises(ValueError):
        breaker.call(raising(exc))
    assert len(seen) == 1
    assert seen[0][0] is exc
    assert seen[0][1:] == ()


@pytest.mark.parametrize("answer", [1, "yes", [0], True])
def test_a_predicate_may_answer_with_anything_true(answer):
    """What the predicate returns is taken for true or false as Python does."""
    assert not CircuitBreaker(exclude=[lambda exc: answer]).is_system_error(OSError())


@pytest.mark.parametrize("answer", [0, "", [], None, False])
def test_a_predicate_may_answer_with_anything_false(answer):
    """A predicate that returns something false did not exclude."""
    assert CircuitBreaker(exclude=[lambda exc: answer]).is_system_error(OSError())


@pytest.mark.parametrize(
    "kind", [list, tuple, iter, dict.fromkeys, lambda items: (item for item in items)]
)
def test_exclude_is_any_iterable(kind):
    """The argument is a list, a tuple, or a generator that can be read once; order
    stays."""
    breaker = CircuitBreaker(exclude=kind([KeyError, is_about_money]))
    assert breaker.excluded_exceptions == (KeyError, is_about_money)
    assert not breaker.is_system_error(KeyError())


@pytest.mark.parametrize("bare", [KeyError, Mixin, WithMetaclass, Abstract])
def test_one_bare_class_is_refused(bare):
    """The TypeError, also for a class that is iterable, says how to write the class."""
    with refusal(TypeError, "exclude", bare) as error:
        CircuitBreaker(exclude=bare)
    assert f"exclude=[{bare.__name__}]" in str(error.value)


@pytest.mark.parametrize("bare", [is_about_money, KeyError("x"), object()])
def test_what_is_no_iterable_is_refused(bare):
    """The value is a predicate or anything else: the TypeError says how to write it."""
    with refusal(TypeError, "exclude", bare) as error:
        CircuitBreaker(exclude=bare)
    assert "exclude=[" in str(error.value)


NEITHER = [5, "KeyError", None, KeyError("x"), (KeyError, ValueError)]


@pytest.mark.parametrize("item", NEITHER)
def test_an_item_that_is_neither_class_nor_predicate_is_refused(item):
    """The TypeError names the item, and says how to write exclusions."""
    with refusal(TypeError, "exclude", item) as error:
        CircuitBreaker(exclude=[KeyError, item])
    assert "exclude=[" in str(error.value)


@pytest.mark.parametrize("item", NEITHER)
def test_exclusions_that_are_added_are_checked_like_the_argument(item):
    """Of several exclusions none is added unless all can be."""
    breaker = CircuitBreaker(exclude=[KeyError])
    with refusal(TypeError, "exclude", item):
        breaker.add_excluded_exception(item)
    with refusal(TypeError, "exclude", item):
        breaker.add_excluded_exceptions(ValueError, item)
    assert breaker.excluded_exceptions == (KeyError,)


@pytest.mark.parametrize("number", [2, 0, 2.0, True])
def test_a_number_for_exclude_is_told_where_it_belongs(number):
    """Release 1.4 had success_threshold third, so the error names it."""
    with refusal(TypeError, "exclude", number) as error:
        CircuitBreaker(5, 60, number)
    assert f"success_threshold={number!r}" in str(error.value)


def test_only_a_number_is_told_about_success_threshold():
    """The error for any other value gives no advice about success_threshold."""
    with pytest.raises(TypeError) as error:
        CircuitBreaker(exclude=KeyError)
    assert "success_threshold" not in str(error.value)


# Listeners.


class OnlyFailures:
    """Has one of a listener's methods and nothing else."""

    def __init__(self):
        self.heard = []

    def failure(self, cb, exc):
        self.heard.append(exc)


@pytest.mark.parametrize(
    "kind", [list, tuple, iter, dict.fromkeys, lambda items: (item for item in items)]
)
def test_listeners_is_any_iterable(kind, recorder):
    """The argument is a list, a tuple, or a generator that can be read once; order
    stays."""
    other = OnlyFailures()
    breaker = CircuitBreaker(listeners=kind([recorder, other]))
    assert breaker.listeners == (recorder, other)


def test_a_listener_is_told_what_it_has_a_method_for(fail, boom, caplog):
    """A listener needs neither all methods nor a base class; nothing complains."""
    listener = OnlyFailures()
    breaker = CircuitBreaker(2, 0, listeners=[listener])
    breaker.call(int)
    with pytest.raises(boom):
        breaker.call(fail)
    with pytest.raises(CircuitBreakerError):
        breaker.call(fail)
    breaker.call(int)
    assert [type(exc) for exc in listener.heard] == [boom, boom]
    assert not any(record.exc_info for record in caplog.records)


@pytest.mark.parametrize("event", ["before_call", "failure", "success", "state_change"])
def test_one_method_makes_a_listener(event):
    """Any one of a listener's methods is enough."""
    listener = type("Listener", (), {event: lambda self, *args: None})()
    breaker = CircuitBreaker(listeners=[listener])
    assert breaker.listeners == (listener,)


class Nothing:
    """Has none of a listener's methods."""


NO_LISTENERS = [Nothing(), print, 5, "failure", None, CircuitBreakerListener]


@pytest.mark.parametrize("item", NO_LISTENERS)
def test_an_object_that_is_no_listener_is_refused(item):
    """The object has none of a listener's methods, or is a class in place of an
    instance."""
    with refusal(TypeError, "listeners", item):
        CircuitBreaker(listeners=[OnlyFailures(), item])


@pytest.mark.parametrize("item", NO_LISTENERS)
def test_listeners_that_are_added_are_checked_like_the_argument(item):
    """Of several listeners none is added unless all can be."""
    first = OnlyFailures()
    breaker = CircuitBreaker(listeners=[first])
    with refusal(TypeError, "listeners", item):
        breaker.add_listener(item)
    with refusal(TypeError, "listeners", item):
        breaker.add_listeners(OnlyFailures(), item)
    assert breaker.listeners == (first,)


@pytest.mark.parametrize("bare", [CircuitBreakerListener(), 5, print])
def test_listeners_that_are_no_iterable_are_refused(bare):
    """One listener on its own is refused as well; the TypeError tells what to write."""
    with refusal(TypeError, "listeners", bare) as error:
        CircuitBreaker(listeners=bare)
    assert "listeners=[" in str(error.value)


@pytest.mark.parametrize("parameter", ["exclude", "listeners", "state_storage", "name"])
def test_none_stands_for_the_default(parameter):
    """None stands for no exclusions, no listeners, the default storage and no name."""
    breaker = CircuitBreaker(**{parameter: None})
    assert breaker.excluded_exceptions == breaker.listeners == ()
    assert breaker.call(int) == 0


@pytest.mark.parametrize("parameter", ["exclude", "listeners"])
@pytest.mark.parametrize("value", ["", "ValueError", b""])
def test_a_string_is_no_iterable_of_anything(parameter, value):
    """The letters of a name are neither exceptions nor listeners."""
    with pytest.raises(TypeError, match=f"{parameter} must be an iterable.*{value!r}"):
        CircuitBreaker(**{parameter: value})


def test_any_kind_of_number_for_exclude_names_success_threshold():
    """Release 1.4 had success_threshold in the third place."""
    with pytest.raises(TypeError, match=r"write success_threshold=Decimal\('2'\)"):
        CircuitBreaker(5, 60, decimal.Decimal(2))


def test_a_listener_needs_a_method_not_just_its_name():
    """An attribute of that name that cannot be called makes no listener."""
    with pytest.raises(TypeError, match="has none"):
        CircuitBreaker(listeners=[types.SimpleNamespace(success=True)])


def test_of_two_equal_listeners_the_one_that_was_given_is_removed():
    """The breaker looks for the very object, which `==` cannot tell from its equal."""

    class Equal(CircuitBreakerListener):
        def __eq__(self, other):
            return isinstance(other, Equal)

        __hash__ = None

    first, second = Equal(), Equal()
    breaker = CircuitBreaker(listeners=[first, second])
    breaker.remove_listener(second)
    assert breaker.listeners[0] is first


def test_of_a_listener_that_was_given_twice_the_first_is_removed(recorder):
    """The order of the other listeners stays, as with list.remove()."""
    other = CircuitBreakerListener()
    breaker = CircuitBreaker(listeners=[recorder, other, recorder])
    breaker.remove_listener(recorder)
    assert breaker.listeners == (other, recorder)
