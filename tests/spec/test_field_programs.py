"""What programs in the field lean on: each test is written as such a program is."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import inspect
import logging
import math
import os
import subprocess
import sys
import threading
from datetime import datetime, timedelta, timezone

import pytest
from freezegun import freeze_time
from support import Boom, boom, drive, fail

import pybreaker
from pybreaker import (
    STATE_CLOSED,
    STATE_HALF_OPEN,
    STATE_OPEN,
    CircuitBreaker,
    CircuitBreakerError,
    CircuitBreakerStorage,
    CircuitMemoryStorage,
)

# Names of the module.


def test_the_module_has_the_names_of_datetime_that_programs_import_from_it():
    """Older releases had these names because the module used them."""
    assert pybreaker.UTC is timezone.utc
    assert pybreaker.datetime is datetime
    assert pybreaker.timedelta is timedelta
    from pybreaker import UTC  # noqa: F401


def test_a_name_that_the_module_does_not_have_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'pybreaker' has no attribute 'Nonsense'"):
        pybreaker.Nonsense  # noqa: B018


def test_has_tornado_support_is_true_and_coroutines_are_guarded():
    """Programs read HAS_TORNADO_SUPPORT before they decorate coroutines."""
    assert pybreaker.HAS_TORNADO_SUPPORT is True
    breaker = CircuitBreaker(fail_max=1)

    @breaker(__pybreaker_call_async=pybreaker.HAS_TORNADO_SUPPORT)
    async def fetch():
        raise Boom

    with pytest.raises(CircuitBreakerError):
        drive(fetch())


def test_has_redis_support_says_whether_redis_py_can_be_imported():
    """Programs choose their storage by HAS_REDIS_SUPPORT."""
    expected = importlib.util.find_spec("redis") is not None
    assert pybreaker.HAS_REDIS_SUPPORT is expected
    from pybreaker import HAS_REDIS_SUPPORT

    assert HAS_REDIS_SUPPORT is expected


@pytest.mark.parametrize("installed", ["True", "False"])
def test_has_redis_support_can_be_asked_with_and_without_redis_py(installed, tmp_path):
    """Importing pybreaker does not import redis-py."""
    if installed == "True":
        (tmp_path / "redis").mkdir()
        (tmp_path / "redis" / "__init__.py").write_text("class Redis: ...\n")
        missing = ""
    else:
        missing = "sys.modules['redis'] = None; "
    program = (
        f"import sys; {missing}import pybreaker; "
        "assert 'redis' not in sys.modules or sys.modules['redis'] is None; "
        "print(pybreaker.HAS_REDIS_SUPPORT)"
    )
    path = os.pathsep.join([str(tmp_path), os.path.dirname(pybreaker.__file__)])
    ran = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=60,
        check=False,
    )
    assert (ran.stdout.strip(), ran.stderr) == (installed, "")


# An asynchronous subclass.


class AsyncioBreaker(CircuitBreaker):
    """Makes its states in a coroutine, as it looks them up in a database."""

    async def _create_new_state(self, new_state, prev_state=None, notify=False):
        await asyncio.sleep(0)
        state = super()._create_new_state(new_state, prev_state, notify)
        if notify:
            for listener in self.listeners:
                listener.state_change(self, prev_state, state)
        return state

    @property
    async def state(self):
        if inspect.isawaitable(self._state):
            self._state = await self._state
        name = self.current_state
        if name != self._state.name:
            self._state = await self._create_new_state(name, self._state, notify=True)
        return self._state

    async def call(self, func, *args, **kwargs):
        state = await self.state
        if state.name == STATE_OPEN:
            opened_at = self._state_storage.opened_at
            timeout = pybreaker.timedelta(seconds=self.reset_timeout)
            if opened_at and datetime.now(pybreaker.UTC) < opened_at + timeout:
                raise CircuitBreakerError(
                    "Timeout not elapsed yet, circuit breaker still open"
                )
            self._state_storage.state = STATE_HALF_OPEN
            state = await self.state
        try:
            result = await func(*args, **kwargs)
        except Exception as exc:
            if not self.is_system_error(exc):
                raise
            with self._lock:
                self._inc_counter()
            if state.name == STATE_HALF_OPEN or self.fail_counter >= self.fail_max:
                self._state_storage.opened_at = datetime.now(pybreaker.UTC)
                self._state_storage.state = STATE_OPEN
                await self.state
                raise CircuitBreakerError("opened") from exc
            raise
        self._state_storage.reset_counter()
        if state.name == STATE_HALF_OPEN:
            self._state_storage.state = STATE_CLOSED
        await self.state
        return result


async def fetch(error=None):
    await asyncio.sleep(0)
    if error is not None:
        raise error
    return "page"


def test_an_asynchronous_subclass_can_be_made_and_driven(recorder):
    """The circuit opens on failures, rejects, half-opens, and recovers."""

    async def story(frozen):
        breaker = AsyncioBreaker(fail_max=2, reset_timeout=60, listeners=[recorder])
        assert await breaker.call(fetch) == "page"
        with pytest.raises(Boom):
            await breaker.call(fetch, Boom())
        with pytest.raises(CircuitBreakerError, match="opened"):
            await breaker.call(fetch, Boom())
        assert (await breaker.state).name == "open"
        frozen.tick(59)
        with pytest.raises(CircuitBreakerError, match="Timeout not elapsed"):
            await breaker.call(fetch)
        frozen.tick(1)
        assert await breaker.call(fetch) == "page"
        assert (await breaker.state).name == "closed"
        assert breaker.fail_counter == 0

    with freeze_time("2024-02-29", real_asyncio=True) as frozen:
        asyncio.run(story(frozen))
    assert recorder.transitions == [
        ("closed", "open"),
        ("open", "half-open"),
        ("half-open", "closed"),
    ]


def test_the_states_of_an_asynchronous_subclass_can_be_driven_by_hand():
    """The library's states do not ask for the breaker's state, which is awaited."""

    async def story():
        breaker = AsyncioBreaker(fail_max=3, exclude=[KeyError])
        state = await breaker.state
        state.before_call(fetch)
        state._handle_error(Boom(), reraise=False)
        assert breaker.fail_counter == 1
        state._handle_error(KeyError(), reraise=False)
        assert breaker.fail_counter == 0
        state._handle_error(Boom(), reraise=False)
        state._handle_success()
        assert (breaker.fail_counter, breaker.current_state) == (0, "closed")

    asyncio.run(story())


def test_settings_of_an_asynchronous_subclass_can_be_read_before_it_is_driven():
    """A program logs its breakers when it has made them."""
    breaker = AsyncioBreaker(fail_max=3, reset_timeout=60, name="db")
    assert (breaker.name, breaker.fail_max, breaker.reset_timeout) == ("db", 3, 60)
    assert (breaker.current_state, breaker.fail_counter) == ("closed", 0)
    drive_all(breaker._state)


def test_an_asynchronous_subclass_can_be_shown_and_moved_before_it_is_driven():
    """A scrape shows the breaker, and an operator opens it, before its first call."""
    breaker = AsyncioBreaker(fail_max=3, reset_timeout=60, name="db", window_size=9)
    drive_all(breaker._state)
    assert repr(breaker).startswith("<AsyncioBreaker 'db': closed, 0 of 3 failures")
    assert (breaker.snapshot()["state"], breaker.retry_after) == ("closed", 0.0)
    breaker.open(math.inf, "maintenance")
    assert breaker.snapshot()["reason"] == "maintenance"
    assert breaker.retry_after == math.inf

    async def story():
        assert (await breaker.state).name == "open"
        with pytest.raises(CircuitBreakerError):
            await breaker.call(fetch)

    asyncio.run(story())


@pytest.mark.parametrize("made", [None, "closed", 42])
def test_a_breaker_whose_state_is_none_can_be_made_and_shown(made):
    """Before the first call the state that the subclass made may be anything."""

    class Strange(CircuitBreaker):
        def _create_new_state(self, new_state, prev_state=None, notify=False):
            return made

    breaker = Strange(name="strange")
    assert breaker._state == made
    assert repr(breaker).startswith("<Strange 'strange': closed")


def drive_all(awaitable):
    """Runs the coroutine to its end, so that Python does not warn of one left alone."""

    async def wait():
        return await awaitable

    return asyncio.run(wait())


# Subclasses.


@pytest.mark.parametrize(
    "name",
    ["_log", "_logger", "_error", "_errors", "_records", "_tell", "_hooks", "_metrics"],
)
def test_a_subclass_may_keep_what_it_likes_under_a_usual_private_name(name):
    """A subclass sets attributes of its own on the instance."""

    class Own(CircuitBreaker):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            setattr(self, name, "its own")

    breaker = Own(fail_max=2, reset_timeout=0)
    fail(breaker, 3)
    breaker.open(seconds=60)
    fail(breaker)
    breaker.close()
    breaker.call(int)
    assert getattr(breaker, name) == "its own"


# Storages.


class SharedStorage(CircuitBreakerStorage):
    """One object for each key, however often it is made, so __init__ runs again."""

    made = {}

    def __new__(cls, key):
        return cls.made.setdefault(key, super().__new__(cls))

    def __init__(self, key):
        if hasattr(self, "name"):
            return
        super().__init__(f"shared {key}")
        self.key, self.times = key, getattr(self, "times", 0) + 1
        self.values = {"state": STATE_CLOSED, "counter": 0, "opened_at": None}

    @property
    def state(self):
        return self.values["state"]

    @state.setter
    def state(self, state):
        self.values["state"] = state

    @property
    def counter(self):
        return self.values["counter"]

    def increment_counter(self):
        self.values["counter"] += 1

    def reset_counter(self):
        self.values["counter"] = 0

    @property
    def opened_at(self):
        return self.values["opened_at"]

    @opened_at.setter
    def opened_at(self, moment):
        self.values["opened_at"] = moment


def test_a_storage_can_ask_whether_its_base_class_was_initialized():
    """The storage asks by hasattr(self, "name"); only the first answer is no."""
    SharedStorage.made.clear()
    storage = SharedStorage("db")
    assert storage.name == "shared db"
    assert SharedStorage("db") is storage
    assert storage.times == 1
    breakers = [CircuitBreaker(2, state_storage=SharedStorage("db")) for _ in range(2)]
    fail(breakers[0], 2)
    assert [breaker.current_state for breaker in breakers] == ["open", "open"]


def test_a_memory_storage_can_ask_whether_its_base_class_was_initialized():
    """A subclass of which there is one object asks by hasattr(self, "name")."""

    class Only(CircuitMemoryStorage):
        made = []

        def __new__(cls, *args):
            if not cls.made:
                cls.made.append(super().__new__(cls))
            return cls.made[0]

        def __init__(self, state="closed"):
            if hasattr(self, "name"):
                return
            super().__init__(state)

    first = CircuitBreaker(2, state_storage=Only())
    second = CircuitBreaker(2, state_storage=Only("open"))
    fail(second, 2)
    assert [first.current_state, second.current_state] == ["open", "open"]


def test_a_storage_whose_base_class_was_not_initialized_has_no_name():
    """Such a storage serves a breaker all the same."""

    class Skipping(SharedStorage):
        made = {}

        def __init__(self, key):
            self.values = {"state": STATE_CLOSED, "counter": 0, "opened_at": None}

    storage = Skipping("db")
    assert not hasattr(storage, "name")
    assert getattr(storage, "name", "default") == "default"
    breaker = CircuitBreaker(fail_max=1, reset_timeout=0, state_storage=storage)
    fail(breaker)
    assert breaker.current_state == "open"
    breaker.call(int)
    assert breaker.current_state == "closed"
    assert "closed" in repr(breaker)
    assert breaker.snapshot()["state"] == "closed"


class DocumentStorage(CircuitBreakerStorage):
    """Keeps a circuit in a document, whose field for the moment is a number.

    Such storages catch everything, so that a broken database breaks no call.
    """

    logger = logging.getLogger("app.storage")

    def __init__(self, documents, key):
        super().__init__("documents")
        self._documents, self._key = documents, key
        documents.setdefault(key, {"state": STATE_CLOSED, "counter": 0, "successes": 0})

    @property
    def _document(self):
        return self._documents[self._key]

    @property
    def state(self):
        return self._document["state"]

    @state.setter
    def state(self, state):
        self._document["state"] = state

    @property
    def counter(self):
        return self._document["counter"]

    def increment_counter(self):
        self._document["counter"] += 1

    def reset_counter(self):
        self._document["counter"] = 0

    @property
    def success_counter(self):
        return self._document["successes"]

    def increment_success_counter(self):
        self._document["successes"] += 1

    def reset_success_counter(self):
        self._document["successes"] = 0

    @property
    def opened_at(self):
        try:
            epoch = pybreaker.datetime(1970, 1, 1, tzinfo=pybreaker.UTC)
            return epoch + pybreaker.timedelta(seconds=self._document["opened_at"])
        except Exception:
            self.logger.exception("the moment of the opening is not to be had")
            return datetime.now(timezone.utc)  # so the timeout never passes

    @opened_at.setter
    def opened_at(self, moment):
        try:
            self._document["opened_at"] = moment.astimezone(pybreaker.UTC).timestamp()
        except Exception:
            self.logger.exception("the moment of the opening was not kept")


@pytest.mark.parametrize("outage", [1, 3])
def test_a_production_storage_that_uses_the_modules_names_recovers(outage, caplog):
    """The storage leans on pybreaker.UTC, pybreaker.datetime and
    pybreaker.timedelta."""
    documents = {}
    with freeze_time("2024-02-29 12:00:00") as frozen:
        breakers = [
            CircuitBreaker(
                fail_max=2,
                reset_timeout=60,
                success_threshold=2,
                state_storage=DocumentStorage(documents, "db"),
                name="db",
            )
            for _ in range(2)
        ]
        fail(breakers[0], 2)
        for _ in range(outage):
            frozen.tick(59)
            for breaker in breakers:
                with pytest.raises(CircuitBreakerError, match="Timeout not elapsed"):
                    breaker.call(int)
            frozen.tick(1)
            fail(breakers[1])
        frozen.tick(60)
        assert breakers[0].call(int) == breakers[1].call(int) == 0
        assert [breaker.current_state for breaker in breakers] == ["closed"] * 2
    assert caplog.records == [] or not any(r.exc_info for r in caplog.records)


# States.


def test_a_state_has_a_call_async_of_its_own(recorder):
    """await breaker.state.call_async(func) is breaker.call_async(func)."""

    async def story():
        breaker = CircuitBreaker(fail_max=2, reset_timeout=60, listeners=[recorder])
        assert await breaker.state.call_async(fetch) == "page"
        assert recorder.events == [("before_call", fetch, (), {}), ("success",)]
        with pytest.raises(Boom):
            await breaker.state.call_async(fetch, error=Boom())
        with pytest.raises(CircuitBreakerError, match="Failures threshold"):
            await breaker.state.call_async(fetch, Boom())
        with pytest.raises(CircuitBreakerError, match="Timeout not elapsed"):
            await breaker.state.call_async(fetch)
        breaker.half_open()
        state = breaker.state
        assert await state.call_async(fetch) == "page"
        assert breaker.current_state == "closed"
        pending = state.call_async(fetch)
        assert inspect.iscoroutine(pending)
        pending.close()

    asyncio.run(story())


def test_call_async_of_a_state_returns_what_is_not_awaitable_as_it_is():
    """call_async() of the breaker does the same."""
    assert drive(CircuitBreaker().state.call_async(divmod, 7, 2)) == (3, 1)


@pytest.fixture(params=["lock held", "lock free"])
def shelter(request):
    """Code that drives by hand holds the lock, or holds nothing."""

    def shelter(breaker):
        if request.param == "lock held":
            return breaker._lock
        return contextlib.nullcontext()

    return shelter


def test_on_success_by_hand_leaves_the_count_of_a_closed_circuit(shelter):
    """Programs call on_success() where they reset the count themselves."""
    breaker = CircuitBreaker()
    breaker.fail_counter = 3
    with shelter(breaker):
        breaker.state.on_success()
    assert (breaker.fail_counter, breaker.current_state) == (3, "closed")


def test_handle_success_by_hand_sets_the_count_of_a_closed_circuit_back(
    shelter, recorder
):
    """Listeners hear of the success."""
    breaker = CircuitBreaker(listeners=[recorder])
    breaker.fail_counter = 3
    with shelter(breaker):
        breaker.state._handle_success()
    assert breaker.fail_counter == 0
    assert recorder.names == ["success"]


def test_a_driver_that_resets_by_itself_counts_in_a_row():
    """The program calls reset_counter() of the storage, and then on_success()."""
    breaker = CircuitBreaker(fail_max=3)

    def guarded(func):
        with breaker._lock:
            breaker.state.before_call(func)
            state = breaker.state
        try:
            result = func()
        except Exception as exc:
            with breaker._lock:
                breaker._inc_counter()
                state.on_failure(exc)
            raise
        with breaker._lock:
            breaker._state_storage.reset_counter()
            state.on_success()
        return result

    for _ in range(2):
        for _ in range(2):
            with pytest.raises(Boom):
                guarded(boom)
        assert breaker.fail_counter == 2
        assert guarded(int) == 0
        assert breaker.fail_counter == 0
    for expected in (Boom, Boom, CircuitBreakerError):
        with pytest.raises(expected):
            guarded(boom)


def test_a_driver_that_counts_failed_health_checks_is_not_reset_by_on_success():
    """Two failures reported by hand stand while probes succeed through on_success."""
    breaker = CircuitBreaker(fail_max=3)
    for _ in range(2):
        breaker._inc_counter()
        breaker.state.on_failure(Boom())
        breaker.state.on_success()
    breaker._inc_counter()
    with pytest.raises(CircuitBreakerError, match="Failures threshold"):
        breaker.state.on_failure(Boom())


def test_a_listener_may_keep_a_success_counter_of_its_own_on_the_breaker():
    """The breaker itself has no attribute `_success_counter`."""
    breaker = CircuitBreaker()
    assert not hasattr(breaker, "_success_counter")


# Threads of a service.


def test_a_guarded_service_answers_by_the_phrase_of_the_error():
    """The service's handler compares args[0], whichever thread the call comes from."""
    breaker, answers = CircuitBreaker(fail_max=1, name="search"), []
    phrases = {
        "Failures threshold reached, circuit breaker opened": 502,
        "Timeout not elapsed yet, circuit breaker still open": 503,
    }

    def handle():
        try:
            breaker.call(boom)
        except CircuitBreakerError as error:
            answers.append(phrases[error.args[0]])

    for _ in range(2):
        thread = threading.Thread(target=handle)
        thread.start()
        thread.join(30)
    assert answers == [502, 503]
