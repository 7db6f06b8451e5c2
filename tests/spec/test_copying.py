"""A breaker is one shared thing: it is not copied, and it does not travel."""

from __future__ import annotations

import copy
import dataclasses
import functools
import pickle
import threading

import pytest
from support import fail

import pybreaker
from pybreaker import CircuitBreaker, CircuitBreakerError, CircuitBreakers

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copy_of_a_breaker_is_that_breaker(copied):
    """Copying a function gives that very function, too."""
    breaker = CircuitBreaker(name="db")
    assert copied(breaker) is breaker


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copy_of_a_subclass_is_that_breaker(copied):
    """The subclass may have set any attributes on the breaker."""

    class Counting(CircuitBreaker):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.seen, self.guard = [], threading.Lock()

    breaker = Counting(name="db")
    assert copied(breaker) is breaker


def test_a_deep_copy_of_a_client_shares_the_clients_breaker():
    """Form fields, settings and serializers are deep-copied for each request."""

    class Client:
        def __init__(self):
            self.headers = {"accept": "*"}
            self.breaker = CircuitBreaker(fail_max=2, name="api")

    client = Client()
    other = copy.deepcopy(client)
    assert other.headers is not client.headers
    assert other.breaker is client.breaker
    fail(client.breaker, 2)
    with pytest.raises(CircuitBreakerError):
        other.breaker.call(int)


def test_a_dataclass_with_a_breaker_can_be_made_a_dict():
    """dataclasses.asdict deep-copies what it does not know."""

    @dataclasses.dataclass
    class Service:
        url: str
        breaker: CircuitBreaker

    service = Service("http://localhost", CircuitBreaker())
    assert dataclasses.asdict(service)["breaker"] is service.breaker


def test_a_copy_of_a_tripped_breaker_is_still_the_tripped_one():
    """No copy starts from a closed circuit."""
    breaker = CircuitBreaker(fail_max=1)
    fail(breaker)
    assert copy.deepcopy([breaker])[0].current_state == "open"


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_pickling_a_breaker_is_refused_with_the_way_out(protocol):
    """The TypeError says why, and to make and name the breaker in each process."""
    breaker = CircuitBreaker(name="db")
    with pytest.raises(TypeError) as refused:
        pickle.dumps(breaker, protocol)
    text = str(refused.value)
    assert "process" in text
    assert "name" in text
    assert "RLock" not in text  # the reader can do nothing about the lock


@pytest.mark.parametrize(
    "holder",
    [
        lambda breaker: [breaker],
        lambda breaker: functools.partial(breaker.call, int),
        lambda breaker: {"listeners": breaker.call},
    ],
)
def test_pickling_an_object_that_holds_a_breaker_is_refused(holder):
    """A task queue pickles arguments, which may hold a breaker."""
    with pytest.raises(TypeError, match="process"):
        pickle.dumps(holder(CircuitBreaker(name="db")))


class Plain(CircuitBreaker):
    """Says nothing about pickling."""


def test_pickling_a_subclass_that_does_not_say_how_is_refused():
    """The subclass inherits the refusal with its text."""
    with pytest.raises(TypeError, match="process"):
        pickle.dumps(Plain(name="db"))


class Reduced(CircuitBreaker):
    """Is made anew where it is unpickled."""

    def __reduce__(self):
        return type(self), (self.fail_max, self.reset_timeout), {"_name": self.name}


class Stated(CircuitBreaker):
    """Leaves the lock behind, as subclasses for process pools do."""

    def __getstate__(self):
        return {"fail_max": self.fail_max, "name": self.name}

    def __setstate__(self, state):
        self.__init__(**state)


class StatedBelow(Stated):
    """Inherits the way of its base class."""


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("cls", [Reduced, Stated, StatedBelow])
def test_a_subclass_that_says_how_can_be_pickled(cls, protocol):
    """By __reduce__ or by __getstate__ a subclass makes a working breaker arrive."""
    breaker = cls(fail_max=2, name="db")
    arrived = pickle.loads(pickle.dumps(breaker, protocol))
    assert type(arrived) is cls
    assert arrived is not breaker
    assert (arrived.name, arrived.fail_max) == ("db", 2)
    fail(arrived, 2)
    assert (arrived.current_state, breaker.current_state) == ("open", "closed")


@pytest.mark.parametrize("cls", [Reduced, Stated])
def test_a_subclass_that_can_be_pickled_is_still_one_thing_to_copy(cls):
    """A copy in the same process would be a second circuit for the same service."""
    breaker = cls(name="db")
    assert copy.copy(breaker) is copy.deepcopy(breaker) is breaker


def test_the_memory_storage_of_a_breaker_still_travels():
    """Storages pickle as ever; what is refused is the breaker."""
    breaker = CircuitBreaker(fail_max=1)
    fail(breaker)
    storage = pickle.loads(pickle.dumps(breaker._state_storage))
    assert isinstance(storage, pybreaker.CircuitMemoryStorage)
    assert (storage.state, storage.counter) == ("open", 1)


def test_a_mapping_of_breakers_cannot_be_pickled_and_says_what_to_do():
    breakers = CircuitBreakers()
    breakers["a"]
    with pytest.raises(TypeError, match="CircuitBreakers of 1, .*in each process"):
        pickle.dumps(breakers)
