"""Many breakers: `breakers()`, which knows all of them, and `CircuitBreakers`, which
makes one for each key."""

from __future__ import annotations

import copy
import gc
import math
import threading
import weakref
from unittest import mock

import pytest
from internals import lock_of
from support import DEEP, PATIENCE, Boom, at_once, boom, fail, let_go

import pybreaker
from pybreaker import (
    CircuitBreaker,
    CircuitBreakerError,
    CircuitBreakerListener,
    CircuitBreakers,
    CircuitBreakerStorage,
    CircuitMemoryStorage,
)


def collect():
    """A breaker that nobody holds is gone after this."""
    gc.collect()
    for _ in range(3):
        let_go()


# breakers()


def test_all_breakers_that_are_alive_come_by_name_and_unnamed_ones_last():
    kept = [CircuitBreaker(name=name) for name in ("zz-b", None, "zz-a", "")]
    found = [each for each in pybreaker.breakers() if any(each is one for one in kept)]
    assert isinstance(pybreaker.breakers(), tuple)
    assert [each.name for each in found] == ["", "zz-a", "zz-b", None]


def test_a_breaker_that_nobody_holds_is_not_among_them():
    CircuitBreaker(name="nobody holds this one")
    collect()
    assert "nobody holds this one" not in [each.name for each in pybreaker.breakers()]


def test_making_a_mapping_adds_no_breaker():
    """The breaker that checks the settings of the mapping is not for programs."""
    gc.disable()
    try:
        before = set(map(id, pybreaker.breakers()))
        breakers = CircuitBreakers(fail_max=3)
        assert set(map(id, pybreaker.breakers())) <= before
    finally:
        gc.enable()
    assert len(breakers) == 0


def test_a_subclass_that_cannot_be_hashed_or_compared_is_among_them():
    class Strange(CircuitBreaker):
        __hash__ = None

        def __eq__(self, other):
            raise RuntimeError

    strange = Strange(name="strange")
    assert any(each is strange for each in pybreaker.breakers())


def test_a_breaker_that_was_refused_is_not_among_them():
    with pytest.raises(ValueError):
        CircuitBreaker(name="refused", dry_run=True, window_size=1, fail_max=2)
    assert "refused" not in [each.name for each in pybreaker.breakers()]


def test_breakers_can_be_asked_for_while_other_threads_make_and_drop_some():
    failures, is_over = [], threading.Event()

    def make():
        while not is_over.is_set():
            [CircuitBreaker(name=str(i)) for i in range(10)]

    def ask():
        try:
            for _ in range(30):
                pybreaker.breakers()
        except Exception as exc:
            failures.append(exc)

    makers = [threading.Thread(target=make) for _ in range(2)]
    asker = threading.Thread(target=ask)
    for thread in (*makers, asker):
        thread.start()
    asker.join(PATIENCE)
    is_over.set()
    for thread in makers:
        thread.join(PATIENCE)
    assert failures == []


# A breaker for each key


def test_a_breaker_is_made_for_a_key_when_it_is_first_asked_for():
    breakers = CircuitBreakers(fail_max=25, window_size=50, exclude=[KeyError])
    breaker = breakers["api.example.org"]
    assert breakers["api.example.org"] is breaker
    assert breaker.name == "api.example.org"
    assert (breaker.fail_max, breaker.window_size) == (25, 50)
    assert breaker.exclude == (KeyError,)
    assert breakers["db", 3].name == "('db', 3)"
    assert breakers[None].name == "None"


def test_each_key_has_a_circuit_of_its_own():
    breakers = CircuitBreakers(fail_max=1)
    fail(breakers["a"])
    assert breakers["a"].current_state == "open"
    assert breakers["b"].current_state == "closed"


def test_looking_makes_nothing():
    breakers = CircuitBreakers()
    breakers["a"]
    assert "b" not in breakers
    assert breakers.get("b") is None
    assert breakers.get("b", 7) == 7
    assert (len(breakers), list(breakers)) == (1, ["a"])
    assert dict(breakers) == {"a": breakers["a"]}
    assert breakers.get("a") is breakers["a"]


def test_a_key_that_cannot_be_hashed_is_a_type_error():
    with pytest.raises(TypeError, match="unhashable"):
        CircuitBreakers()[["a"]]


def test_all_threads_that_ask_at_once_get_the_same_breaker():
    made = []

    class Slow(CircuitBreakers):
        def make(self, key):
            made.append(key)
            is_making.set()
            may_go_on.wait(PATIENCE)
            return super().make(key)

    for _ in range(20):
        is_making, may_go_on = threading.Event(), threading.Event()
        breakers, found = Slow(), []
        made.clear()
        start = threading.Barrier(4)

        def ask(breakers=breakers, found=found, start=start):
            start.wait(PATIENCE)
            found.append(breakers["key"])

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        assert is_making.wait(PATIENCE)
        may_go_on.set()
        for thread in threads:
            thread.join(PATIENCE)
        assert made == ["key"]
        assert len(found) == 4 and len(set(map(id, found))) == 1


def test_a_thread_that_asks_while_another_makes_room_loses_no_breaker():
    """Thread A makes room for new keys all the time. Thread B holds the breaker of one
    key, and asks for that key again and again."""
    breakers, held, wrong = CircuitBreakers(maxsize=2), [], []
    is_over = threading.Event()
    held.append(breakers["held"])

    def make_room():
        for number in range(3000 if DEEP else 300):
            breakers[number]
        is_over.set()

    def ask():
        while not is_over.is_set():
            if breakers["held"] is not held[0]:
                wrong.append(True)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    threads.append(threading.Thread(target=make_room))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert is_over.is_set()
    assert wrong == []


def test_a_subclass_makes_the_breakers_itself():
    class Named(CircuitBreakers):
        def make(self, key):
            if key == "own":
                return CircuitBreaker(name="made by hand", fail_max=99)
            return super().make(key)

    breakers = Named(fail_max=3)
    assert (breakers["own"].name, breakers["own"].fail_max) == ("made by hand", 99)
    assert (breakers["other"].name, breakers["other"].fail_max) == ("other", 3)


def test_a_make_that_raises_leaves_nothing_behind():
    class Picky(CircuitBreakers):
        def make(self, key):
            raise LookupError(key)

    breakers = Picky()
    with pytest.raises(LookupError):
        breakers["a"]
    assert len(breakers) == 0


def test_a_make_that_returns_something_else_is_a_type_error_that_names_it():
    class Wrong(CircuitBreakers):
        def make(self, key):
            return "no breaker"

    breakers = Wrong()
    with pytest.raises(TypeError, match="make must return .* not 'no breaker'"):
        breakers["a"]
    assert len(breakers) == 0


def test_repr_tells_how_many_there_are():
    breakers = CircuitBreakers(maxsize=7)
    breakers["a"]
    assert repr(breakers) == "<CircuitBreakers of 1, maxsize 7>"


# The settings are checked at once


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"maxsize": 0}, ValueError, "maxsize must be at least 1, not 0"),
        ({"maxsize": 1.5}, ValueError, "maxsize must be a whole number, not 1.5"),
        ({"maxsize": "9"}, TypeError, "maxsize must be a whole number, not '9'"),
        ({"maxsize": None}, TypeError, "maxsize"),
        ({"maxsize": math.nan}, ValueError, "maxsize"),
        ({"fail_max": 0}, ValueError, "fail_max"),
        ({"fail_max": 5, "window_size": 4}, ValueError, "window_size 4"),
        ({"exclude": KeyError}, TypeError, r"exclude.*write exclude=\[KeyError\]"),
        ({"exclude": 3}, TypeError, "exclude.*success_threshold=3"),
        ({"listeners": [int]}, TypeError, "listeners takes objects"),
        ({"listeners": 3}, TypeError, "listeners must be an iterable"),
        ({"no_such_setting": 1}, TypeError, "no_such_setting"),
        ({"name": "all"}, TypeError, "name cannot be .*'all'.*override make"),
        ({"name": None}, TypeError, "name cannot be"),
        (
            {"state_storage": CircuitMemoryStorage("closed")},
            TypeError,
            "state_storage cannot be .*override make",
        ),
    ],
)
def test_a_bad_setting_is_refused_when_the_mapping_is_made(settings, error, match):
    with pytest.raises(error, match=match):
        CircuitBreakers(**settings)


def test_iterables_among_the_settings_are_read_once():
    listener = CircuitBreakerListener()
    breakers = CircuitBreakers(
        exclude=iter([KeyError]),
        include=iter([OSError]),
        ignore=iter([LookupError]),
        listeners=iter([listener]),
    )
    for key in ("a", "b"):
        breaker = breakers[key]
        assert breaker.exclude == (KeyError,)
        assert breaker.include == (OSError,)
        assert breaker.ignore == (LookupError,)
        assert breaker.listeners == (listener,)


def test_a_caller_who_changes_a_list_afterwards_changes_no_setting():
    exclude = [KeyError]
    breakers = CircuitBreakers(exclude=exclude)
    exclude.append(OSError)
    assert breakers["a"].exclude == (KeyError,)


def test_no_breaker_is_left_of_the_check():
    CircuitBreakers(fail_max=98765)
    collect()
    assert 98765 not in [each.fail_max for each in pybreaker.breakers()]


# Making room


def ask_for(breakers, keys):
    for key in keys:
        breakers[key]
    return breakers


def test_breakers_that_nobody_can_tell_from_new_ones_make_room():
    breakers = ask_for(CircuitBreakers(maxsize=10), range(25))
    assert list(breakers) == list(range(15, 25))


def test_a_mapping_without_a_maxsize_keeps_all():
    assert len(ask_for(CircuitBreakers(maxsize=math.inf), range(3000))) == 3000


def test_the_maxsize_is_1024_unless_it_is_given():
    assert len(ask_for(CircuitBreakers(), range(2000))) == 1024


def test_a_success_leaves_nothing_to_remember():
    breakers = CircuitBreakers(maxsize=10, fail_max=3)
    fail(breakers["a"])
    breakers["a"].call(int)
    assert "a" not in ask_for(breakers, range(20))


class Listener(CircuitBreakerListener):
    """Hears nothing."""


KEEPING = {
    "a failure": fail,
    "an open circuit": lambda breaker: breaker.open(),
    "a half-open circuit": lambda breaker: breaker.half_open(),
    "fail_max": lambda breaker: setattr(breaker, "fail_max", 7),
    "reset_timeout": lambda breaker: setattr(breaker, "reset_timeout", 7),
    "success_threshold": lambda breaker: setattr(breaker, "success_threshold", 7),
    "throw_new_error_on_trip": lambda breaker: setattr(
        breaker, "throw_new_error_on_trip", False
    ),
    "name": lambda breaker: setattr(breaker, "name", "other"),
    "window_size": lambda breaker: setattr(breaker, "window_size", 70),
    "window_seconds": lambda breaker: setattr(breaker, "window_seconds", 70),
    "max_reset_timeout": lambda breaker: setattr(breaker, "max_reset_timeout", 70),
    "exclude": lambda breaker: breaker.add_excluded_exception(KeyError),
    "include": lambda breaker: setattr(breaker, "include", [KeyError]),
    "ignore": lambda breaker: setattr(breaker, "ignore", [KeyError]),
    "failure_result": lambda breaker: setattr(breaker, "failure_result", bool),
    "dry_run": lambda breaker: setattr(breaker, "dry_run", True),
    "a listener": lambda breaker: breaker.add_listener(Listener()),
}


@pytest.mark.parametrize("change", KEEPING)
def test_a_breaker_that_can_be_told_from_a_new_one_stays(change):
    breakers = CircuitBreakers(maxsize=10, fail_max=3)
    KEEPING[change](breakers["a"])
    assert "a" in ask_for(breakers, range(50))
    assert len(breakers) == 10


def test_a_breaker_that_the_program_put_into_the_mapping_stays():
    breakers, own = CircuitBreakers(maxsize=10), CircuitBreaker()
    breakers["a"] = own
    assert ask_for(breakers, range(50))["a"] is own
    assert len(breakers) == 10


def test_a_setting_that_was_put_back_keeps_no_breaker():
    breakers = CircuitBreakers(maxsize=10)
    breaker, listener = breakers["a"], Listener()
    breaker.fail_max = 7
    breaker.include = [KeyError]
    breaker.add_listener(listener)
    breaker.fail_max, breaker.include = 5, None
    breaker.remove_listener(listener)
    del breaker
    assert "a" not in ask_for(breakers, range(50))


class Watching(CircuitBreakerListener):
    only_watches = True


def test_a_listener_that_only_watches_keeps_no_breaker():
    breakers = CircuitBreakers(maxsize=10, listeners=[Watching(), Listener()])
    for key in range(50):
        breakers[key].add_listener(Watching())
    breakers[49].remove_listener(breakers[49].listeners[0])
    assert list(breakers) == list(range(40, 50))
    assert 49 not in ask_for(breakers, range(100, 150))


def test_a_breaker_that_only_watching_listeners_hear_can_still_be_told_from_a_new_one():
    breakers = CircuitBreakers(maxsize=10, listeners=[Listener()])
    for key in "abc":
        breakers[key].add_listener(Watching())
    breakers["a"].remove_listener(breakers["a"].listeners[0])
    breakers["b"].add_listener(Listener())
    fail(breakers["c"])
    assert {*"abc"} < {*ask_for(breakers, range(50))}


def test_only_the_class_of_a_listener_can_say_that_the_listener_only_watches():
    """A mock has every attribute."""
    breakers = CircuitBreakers(maxsize=10)
    breakers["a"].add_listener(mock.Mock())
    assert "a" in ask_for(breakers, range(50))


def test_a_look_at_the_private_list_of_listeners_keeps_no_breaker():
    breakers = CircuitBreakers(maxsize=10)
    assert list(breakers["a"]._listeners) == []
    assert "a" not in ask_for(breakers, range(50))


def test_an_open_circuit_stays_until_it_would_admit_a_call(clock):
    breakers = CircuitBreakers(maxsize=10, fail_max=1, reset_timeout=60)
    fail(breakers["a"])
    clock.advance(59)
    assert "a" in ask_for(breakers, range(50))
    clock.advance(1)
    assert "a" not in ask_for(breakers, range(100, 150))


def test_a_circuit_that_is_found_open_stays_until_it_would_admit_a_call(clock):
    """Another breaker over the same storage opened the circuit."""
    storage = CircuitMemoryStorage("closed")

    class Shared(CircuitBreakers):
        def make(self, key):
            settings = {"state_storage": storage} if key == "a" else {}
            return CircuitBreaker(name=str(key), reset_timeout=60, **settings)

    breakers = Shared(maxsize=10)
    assert breakers["a"].current_state == "closed"
    CircuitBreaker(state_storage=storage).open()
    assert "a" in ask_for(breakers, range(50))
    clock.advance(60)
    assert "a" not in ask_for(breakers, range(100, 150))


def test_an_open_circuit_with_a_trial_that_runs_stays():
    breakers = CircuitBreakers(maxsize=10, reset_timeout=0)
    breakers["a"].open()

    def trial():
        assert "a" in ask_for(breakers, range(50))

    breakers["a"].call(trial)


def test_open_circuits_are_not_forgotten_because_new_keys_come(clock):
    """There may then be more than `maxsize` breakers."""
    breakers = CircuitBreakers(maxsize=10, fail_max=1, reset_timeout=60)
    for key in range(50):
        fail(breakers[key])
    assert len(breakers) == 50
    assert {breakers[key].current_state for key in range(50)} == {"open"}
    clock.advance(60)
    # A few breakers go with each new key.
    ask_for(breakers, range(100, 150))
    assert len(breakers) == 10


def test_a_new_key_looks_at_a_few_breakers_however_many_there_are():
    class Counting(CircuitBreaker):
        looks = 0

        @property
        def fail_counter(self):
            Counting.looks += 1
            return 1

    class Breakers(CircuitBreakers):
        def make(self, key):
            return Counting(name=str(key))

    breakers = ask_for(Breakers(maxsize=1), range(500))
    Counting.looks = 0
    breakers["one more"]
    assert 1 <= Counting.looks <= 10


def test_a_breaker_that_stays_is_there_while_it_is_looked_at():
    """Another thread may ask for its key, or go through the mapping, just then."""
    was_there = []

    class Looked(CircuitBreaker):
        @property
        def fail_counter(self):
            was_there.append(int(self.name) in breakers)
            return 1

    class Breakers(CircuitBreakers):
        def make(self, key):
            return Looked(name=str(key))

    breakers = Breakers(maxsize=2)
    ask_for(breakers, range(10))
    assert was_there and all(was_there)


def test_a_breaker_that_fails_while_it_is_taken_out_stays():
    """A call in another thread fails between the look and the removal."""

    class Failing(CircuitBreaker):
        looks = 0

        @property
        def fail_counter(self):
            if self.name == "first":
                self.looks += 1
                return min(self.looks - 1, 1)
            return 0

    class Breakers(CircuitBreakers):
        def make(self, key):
            return Failing(name=str(key))

    breakers = Breakers(maxsize=2)
    first = breakers["first"]
    ask_for(breakers, range(2))
    assert first.looks == 2
    assert "first" in breakers


def test_a_new_key_waits_for_no_open_breaker_that_is_busy():
    """The busy breaker's timeout grows, and no call has asked yet how long the opening
    is."""
    breakers = CircuitBreakers(maxsize=1, max_reset_timeout=100)
    breakers["busy"].max_reset_timeout = None
    breakers["busy"].open()
    breakers["busy"]._max_reset_timeout = 100
    made = threading.Thread(target=breakers.__getitem__, args=["new"], daemon=True)
    with lock_of(breakers["busy"]):
        made.start()
        made.join(PATIENCE)
        assert not made.is_alive()


def test_a_key_that_another_thread_deletes_while_room_is_made_is_gone():
    class Deleting(CircuitBreaker):
        @property
        def fail_counter(self):
            breakers.pop("first", None)
            return 1

    class Breakers(CircuitBreakers):
        def make(self, key):
            return Deleting(name=str(key))

    breakers = Breakers(maxsize=2)
    ask_for(breakers, ["first", "second", "third"])
    assert sorted(breakers) == ["second", "third"]


@pytest.mark.parametrize("maxsize", [1, 2, 3, 4, 5])
def test_a_new_key_is_not_forgotten_in_favor_of_open_ones(maxsize):
    """If the new breaker went, its failures would never add up."""
    breakers = CircuitBreakers(maxsize=maxsize, fail_max=2)
    for number in range(maxsize):
        breakers[number].open()
    fail(breakers["new"])
    collect()
    fail(breakers["new"])
    assert breakers["new"].current_state == "open"


def test_a_breaker_that_takes_the_place_of_one_made_by_the_mapping_stays():
    """The mapping did not make the breaker, and cannot make one like it."""
    breakers = CircuitBreakers(maxsize=1)
    assert breakers["key"].call(int) == 0
    breakers["key"] = own = CircuitBreaker()
    ask_for(breakers, range(10))
    assert breakers["key"] is own


def test_looking_never_waits_for_a_breaker_that_is_busy():
    breakers = CircuitBreakers(maxsize=2)
    is_held, may_end = threading.Event(), threading.Event()

    def hold():
        with lock_of(breakers["busy"]):
            is_held.set()
            may_end.wait(PATIENCE)

    thread = threading.Thread(target=hold)
    thread.start()
    assert is_held.wait(PATIENCE)
    try:
        assert "busy" in ask_for(breakers, range(20))
    finally:
        may_end.set()
        thread.join(PATIENCE)
    assert "busy" not in ask_for(breakers, range(20, 40))


def test_looking_tells_no_listener():
    told = []

    class Telling(CircuitBreakerListener):
        def state_change(self, cb, old_state, new_state):
            told.append(new_state.name)

    class Shared(CircuitBreakerStorage):
        state, counter, opened_at = "closed", 0, None

        def __init__(self):
            super().__init__("shared")

    class Breakers(CircuitBreakers):
        def make(self, key):
            return CircuitBreaker(state_storage=Shared(), listeners=[Telling()])

    breakers = Breakers(maxsize=2)
    breakers["a"]._state_storage.state = "open"
    ask_for(breakers, range(20))
    assert told == []


# Breakers that have gone


def test_a_breaker_that_has_gone_stays_the_one_for_its_key_while_anything_holds_it():
    breakers = CircuitBreakers(maxsize=10, fail_max=3)
    held = breakers["a"]
    ask_for(breakers, range(50))
    assert "a" not in breakers
    fail(held)
    assert breakers["a"] is held
    assert "a" in breakers
    assert "a" in ask_for(breakers, range(100, 150))


def test_a_breaker_that_came_back_can_go_again():
    breakers = CircuitBreakers(maxsize=10)
    held = breakers["a"]
    for _ in range(3):
        ask_for(breakers, range(50))
        assert "a" not in breakers
        assert breakers["a"] is held
    assert len(breakers) == 10


def test_a_running_call_holds_its_breaker():
    breakers = CircuitBreakers(maxsize=10, fail_max=1)

    def slow():
        ask_for(breakers, range(50))
        collect()
        assert "a" not in breakers
        boom()

    with pytest.raises(CircuitBreakerError) as caught:
        breakers["a"].call(slow)
    assert isinstance(caught.value.__cause__, Boom)
    assert breakers["a"].current_state == "open"


def test_a_breaker_that_has_gone_and_that_nobody_holds_is_made_anew():
    breakers = CircuitBreakers(maxsize=10)
    ref = weakref.ref(breakers["a"])
    ask_for(breakers, range(50))
    collect()
    assert ref() is None
    assert breakers["a"].name == "a"


def test_a_key_that_is_deleted_by_hand_is_gone():
    breakers = CircuitBreakers()
    first = breakers["a"]
    del breakers["a"]
    assert "a" not in breakers
    assert breakers["a"] is not first
    breakers.clear()
    assert len(breakers) == 0


# Memory (the searches go on to a million)


def alive_of(names):
    """How many breakers with these names are alive. (Other tests' breakers may still be
    alive, too, and the collector may come to these at any time.)"""
    names = frozenset(names)
    return sum(each.name in names for each in pybreaker.breakers())


def test_keys_that_are_asked_for_once_leave_at_most_maxsize_in_memory():
    keys = [f"asked for once: {number}" for number in range(2000)]
    breakers = ask_for(CircuitBreakers(maxsize=50), keys)
    collect()
    assert len(breakers) == 50
    assert alive_of(keys) == 50


def test_dead_keys_leave_about_as_many_as_their_timeouts_hold(clock):
    breakers = CircuitBreakers(maxsize=50, fail_max=1, reset_timeout=100)
    longest = 0
    for key in range(1000):
        fail(breakers[key])
        clock.advance(1)
        longest = max(longest, len(breakers))
    assert 100 <= longest <= 150


def test_keys_that_the_program_deletes_leave_nothing():
    """Each key is made, deleted and let go, with a maxsize and without."""

    class Key:
        pass

    for maxsize in (50, math.inf):
        breakers = CircuitBreakers(maxsize=maxsize)
        breakers["stays"]
        refs = []
        for _ in range(200):
            key = Key()
            refs.append(weakref.ref(key))
            breakers[key]
            del breakers[key]
        del key
        ask_for(breakers, range(40))
        breakers.clear()
        ask_for(breakers, range(100, 140))
        collect()
        assert [ref() for ref in refs] == [None] * 200
        assert len(breakers) == 40


def test_deleting_a_key_makes_no_breaker_go_that_there_is_room_for():
    breakers = CircuitBreakers(maxsize=20)
    ask_for(breakers, range(20))
    del breakers[0], breakers[10]
    assert set(ask_for(breakers, [20, 21])) == {*range(1, 10), *range(11, 22)}


def test_the_oldest_breaker_goes_first():
    breakers = CircuitBreakers(maxsize=20)
    ask_for(breakers, range(25))
    assert set(breakers) == set(range(5, 25))


def test_a_breaker_that_the_program_puts_in_stays():
    """Such a breaker counts among `maxsize`, so that other breakers go for it."""
    breakers = CircuitBreakers(maxsize=5)
    breakers["own"] = own = CircuitBreaker()
    ask_for(breakers, range(20))
    assert len(breakers) == 5
    assert breakers["own"] is own


def test_threads_may_delete_and_iterate_while_others_make_breakers():
    """A Python without a GIL once crashed here."""
    breakers = CircuitBreakers(maxsize=16)
    seen = set()

    def make():
        for number in range(3000):
            assert breakers[number % 100].name == str(number % 100)

    def delete():
        for number in range(3000):
            breakers.pop(number % 100, None)

    def iterate():
        for _ in range(3000):
            seen.update(map(type, breakers.copy().values()))

    at_once(make, make, delete, iterate)
    assert seen <= {CircuitBreaker}
    ask_for(breakers, range(100, 150))
    assert len(breakers) == 16


def test_copy_gives_a_plain_dictionary_of_the_moment():
    breakers = CircuitBreakers(fail_max=2)
    breakers["a"]
    copied = breakers.copy()
    assert type(copied) is dict
    breakers["b"]
    assert copied == {"a": breakers["a"]}


def test_a_copy_of_the_mapping_is_the_mapping():
    """A client session that holds the mapping may be copied, like one with a
    breaker."""
    breakers = CircuitBreakers()
    assert copy.copy(breakers) is copy.deepcopy(breakers) is breakers
    assert copy.deepcopy({"breakers": breakers})["breakers"] is breakers
