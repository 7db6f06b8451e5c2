"""Code that type checkers must accept, and the types that they must infer.

It is checked against the installed wheel and never run.
"""

from __future__ import annotations

import asyncio
import functools
import math
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Callable,
    Coroutine,
    Generator,
    Iterator,
)
from contextlib import asynccontextmanager, contextmanager
from datetime import datetime, timezone
from typing import Any, Optional, TypeVar, Union

from typing_extensions import ParamSpec, assert_type

import pybreaker
from pybreaker import (
    CircuitBreaker,
    CircuitBreakerError,
    CircuitBreakerListener,
    CircuitBreakers,
    CircuitBreakerState,
    CircuitBreakerStorage,
    CircuitClosedState,
    CircuitMemoryStorage,
    CircuitOpenState,
    FailedResult,
)

P = ParamSpec("P")
T = TypeVar("T")
Kind = Union[type[object], Callable[[Any], object]]  # a class or a predicate

# Making one

breaker = CircuitBreaker()
CircuitBreaker(5, 60, [ValueError], [], CircuitMemoryStorage("closed"), "db", True, 1)
CircuitBreaker(
    fail_max=math.inf,
    reset_timeout=0.5,
    exclude=[KeyError, lambda exc: isinstance(exc, OSError) and exc.errno == 2],
    listeners=(listener for listener in [CircuitBreakerListener()]),
    state_storage=None,
    name=None,
    throw_new_error_on_trip=False,
    success_threshold=2,
)


class Response:
    status: int = 200


def is_bad(response: Response) -> bool:
    return response.status >= 500


def never(exc: BaseException) -> bool:
    return False


CircuitBreaker(
    fail_max=25,
    window_size=50,
    window_seconds=0.5,
    max_reset_timeout=math.inf,
    include=[OSError, never],
    ignore=(kind for kind in (KeyError, ValueError)),
    failure_result=is_bad,
    dry_run=True,
)
CircuitBreaker(
    window_size=None,
    window_seconds=None,
    max_reset_timeout=None,
    include=None,
    ignore=None,
    failure_result=None,
)
CircuitBreaker(window_size=math.inf, failure_result=Response)
CircuitBreaker(failure_result=lambda response: response.status == 429)


# Decorated functions keep their signatures


@breaker
def fetch(key: str, /, retries: int = 3, *, strict: bool = False) -> bytes:
    return b""


assert_type(fetch("key"), bytes)
assert_type(fetch("key", 1, strict=True), bytes)
assert_type(fetch("key", retries=1), bytes)


@breaker
def double(number: int, /) -> int:
    return 2 * number


assert_type(double, Callable[[int], int])


@breaker()
def spelled_with_brackets(number: int, /) -> str:
    return ""


assert_type(spelled_with_brackets, Callable[[int], str])


class Client:
    @breaker
    def get(self, key: str) -> int:
        return len(key)

    @breaker()
    def put(self, key: str, value: int) -> None:
        pass

    @breaker
    async def get_later(self, key: str) -> int:
        return len(key)

    @property
    @breaker
    def size(self) -> int:
        return 0

    @classmethod
    @breaker
    def connect(cls, host: str) -> Client:
        return cls()

    @staticmethod
    @breaker
    def ping(host: str) -> float:
        return 0.0

    def __call__(self, key: str) -> list[int]:
        return []


client = Client()
assert_type(client.get("key"), int)
assert_type(client.get(key="key"), int)
assert_type(client.size, int)
assert_type(Client.connect("host"), Client)
assert_type(Client.ping("host"), float)
client.put("key", value=1)


# Whatever is lazy stays as lazy as it was


@breaker
async def fetch_later(key: str) -> bytes:
    return b""


@breaker()
async def fetch_much_later(key: str) -> bytes:
    return b""


@breaker(__pybreaker_call_async=True)
async def fetch_the_older_way(key: str) -> bytes:
    return b""


coroutine_functions: list[Callable[[str], Coroutine[Any, Any, bytes]]] = [
    fetch_later,
    fetch_much_later,
    fetch_the_older_way,
]


@breaker
def count(limit: int) -> Generator[int, str, bool]:
    yield limit
    return True


@breaker
def rows(table: str) -> Iterator[tuple[int, str]]:
    yield 1, table


@breaker
async def ticks(limit: int) -> AsyncIterator[float]:
    yield float(limit)


@breaker
async def answers(limit: int) -> AsyncGenerator[int, str]:
    yield limit


@contextmanager
@breaker
def connection(host: str) -> Generator[Client, None, None]:
    yield Client()


@asynccontextmanager
@breaker
async def connection_later(host: str) -> AsyncGenerator[Client, None]:
    yield Client()


assert_type(count(3), Generator[int, str, bool])
assert_type(rows("table"), Iterator[tuple[int, str]])
assert_type(ticks(3), AsyncIterator[float])
assert_type(answers(3), AsyncGenerator[int, str])
with connection("host") as connected:
    assert_type(connected, Client)


# call() and call_async()


def find(key: str, /, default: int = 0, *, strict: bool = False) -> float:
    return default


async def find_later(key: str) -> float:
    return 0.0


def find_in_future(key: str) -> asyncio.Future[float]:
    return asyncio.get_running_loop().create_future()


async def stream(limit: int) -> AsyncIterator[float]:
    yield float(limit)


assert_type(breaker.call(find, "key"), float)
assert_type(breaker.call(find, "key", default=1, strict=True), float)
assert_type(breaker.call(lambda: "text"), str)
assert_type(breaker.call(len, [1, 2]), int)
assert_type(breaker.call(client, "key"), list[int])
assert_type(breaker.call(client.get, key="key"), int)
assert_type(breaker.call(functools.partial(find, "key")), float)
assert_type(breaker.call(rows, "table"), Iterator[tuple[int, str]])
assert_type(breaker.call(stream, 3), AsyncIterator[float])
created: Client = breaker.call(Client)


async def main() -> None:
    assert_type(await fetch_later("key"), bytes)
    assert_type(await fetch_much_later(key="key"), bytes)
    assert_type(await fetch_the_older_way("key"), bytes)
    assert_type(await client.get_later("key"), int)
    assert_type(await asyncio.create_task(fetch_later("key")), bytes)
    async with connection_later("host") as connected:
        assert_type(connected, Client)

    assert_type(await breaker.call(find_later, "key"), float)
    assert_type(await breaker.call_async(find_later, "key"), float)
    assert_type(await breaker.call_async(find_later, key="key"), float)
    assert_type(await breaker.call_async(find_in_future, "key"), float)
    assert_type(await breaker.call_async(client.get_later, "key"), int)
    # What is not awaitable comes back as it is.
    assert_type(await breaker.call_async(find, "key", default=1), float)
    # And call_async() is a coroutine, which can be a task.
    task = asyncio.create_task(breaker.call_async(find_later, "key"))
    assert_type(await task, float)


# Blocks. They swallow no exception, so a checker sees that these return.


def returns_from_block() -> int:
    with breaker.calling():
        return 1


async def returns_from_async_block() -> int:
    async with breaker.calling():
        return 1


# Watching and steering

count_now: int = breaker.fail_counter
successes: int = breaker.success_counter
limit: float = breaker.fail_max
timeout: float = breaker.reset_timeout
threshold: float = breaker.success_threshold
state: CircuitBreakerState = breaker.state
state_name: str = breaker.state.name
state_reason: str = breaker.state.reason
current: str = breaker.current_state
assert_type(breaker.name, Optional[str])
assert_type(breaker.retry_after, float)
assert_type(breaker.is_system_error(ValueError()), bool)
excluded: tuple[object, ...] = breaker.excluded_exceptions
listening: tuple[object, ...] = breaker.listeners

breaker.fail_counter = 0
breaker.fail_max = 10
breaker.fail_max = math.inf
breaker.reset_timeout = 30
breaker.reset_timeout = 0.25
breaker.success_threshold = 2
breaker.name = "database"
breaker.state = pybreaker.STATE_OPEN
breaker.state = pybreaker.STATE_HALF_OPEN
breaker.state = "closed"
breaker.open()
breaker.half_open()
breaker.close()
assert_type(breaker.open(30, "maintenance"), bool)
breaker.open(seconds=math.inf, reason=None)
breaker.half_open("to see")
breaker.close(reason="released")

assert_type(breaker.window_size, Optional[float])
assert_type(breaker.window_seconds, Optional[float])
assert_type(breaker.max_reset_timeout, Optional[float])
assert_type(breaker.dry_run, bool)
assert_type(breaker.throw_new_error_on_trip, bool)
assert_type(breaker.failure_result, Optional[Kind])
assert_type(breaker.snapshot(), dict[str, Any])
assert_type(breaker.state.reason, str)
assert_type(breaker.exclude, tuple[Kind, ...])
assert_type(breaker.include, tuple[Kind, ...])
assert_type(breaker.ignore, tuple[Kind, ...])
breaker.window_size = 50
breaker.window_size = math.inf
breaker.window_size = None
breaker.window_seconds = 30
breaker.window_seconds = None
breaker.max_reset_timeout = 600.0
breaker.max_reset_timeout = None
breaker.failure_result = is_bad
breaker.failure_result = Response
breaker.failure_result = None
breaker.dry_run = False
breaker.throw_new_error_on_trip = True


def is_missing(error: KeyError) -> bool:
    return True


breaker.add_excluded_exception(ValueError)
breaker.add_excluded_exception(is_missing)
breaker.add_excluded_exceptions(ValueError, is_missing, lambda exc: False)
breaker.remove_excluded_exception(ValueError)


# Listeners


class Log(CircuitBreakerListener):
    def before_call(
        self, cb: CircuitBreaker, func: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> None:
        print(cb.name, func)

    def failure(self, cb: CircuitBreaker, exc: BaseException) -> None:
        if isinstance(exc, FailedResult):
            assert_type(exc.result, object)
        cb.open(30, reason=f"{exc!r}")

    def success(self, cb: CircuitBreaker) -> None:
        print(cb.name)

    def abandoned(self, cb: CircuitBreaker) -> None:
        print(cb.name)

    def state_change(
        self,
        cb: CircuitBreaker,
        old_state: CircuitBreakerState | None,
        new_state: CircuitBreakerState,
    ) -> None:
        print(old_state.name if old_state else None, new_state.name)


class OnlySuccess:
    def success(self, cb: CircuitBreaker) -> None:
        pass


log = Log()
CircuitBreaker(listeners=[log])
CircuitBreaker(listeners=[log, OnlySuccess()])
breaker.add_listener(log)
breaker.add_listeners(log, OnlySuccess())
breaker.remove_listener(log)


# The error

try:
    fetch("key")
except CircuitBreakerError as error:
    assert_type(error.retry_after, float)
    assert_type(error.breaker, Optional[CircuitBreaker])
    assert_type(error.reason, str)
raise_it: Exception = CircuitBreakerError("any", 1, "arguments")
failed: Exception = FailedResult(Response())
assert_type(FailedResult(Response()).result, object)


# Many


class Hosts(CircuitBreakers):
    def make(self, key: Any) -> CircuitBreaker:
        return CircuitBreaker(name=f"host {key}", fail_max=3)


hosts = CircuitBreakers(maxsize=10_000, fail_max=25, window_size=50)
CircuitBreakers(math.inf)
assert_type(hosts["example.org"], CircuitBreaker)
assert_type(Hosts()[("example.org", 443)].call(find, "key"), float)
assert_type(hosts.get("example.org"), Optional[CircuitBreaker])
assert_type("example.org" in hosts, bool)
assert_type(len(hosts), int)
for made in hosts.values():
    assert_type(made, CircuitBreaker)
assert_type(pybreaker.breakers(), tuple[CircuitBreaker, ...])


# Storages and breakers of one's own


class RowStorage(CircuitBreakerStorage):
    def __init__(self, key: str) -> None:
        super().__init__("row")
        self.key = key

    @property
    def state(self) -> str:
        return "closed"

    @state.setter
    def state(self, state: str) -> None:
        pass

    @property
    def counter(self) -> int:
        return 0

    @property
    def success_counter(self) -> int:
        return 0

    @property
    def opened_at(self) -> datetime | None:
        return datetime.now(timezone.utc)

    @opened_at.setter
    def opened_at(self, value: datetime) -> None:
        pass

    def increment_counter(self) -> None:
        pass

    def reset_counter(self) -> None:
        pass

    def increment_success_counter(self) -> None:
        pass

    def reset_success_counter(self) -> None:
        pass


class FleetStorage(RowStorage):
    def open_for(self) -> float:
        return 0.0

    def move(self, move: Any) -> None:
        pass

    def last_move(self) -> Any:
        return None

    def claim_trial(self, timeout: float) -> bool:
        return True

    async def claim_trial_async(self, timeout: float) -> bool:
        return True

    def release_trial(self) -> None:
        pass


CircuitBreaker(state_storage=RowStorage("key"))
CircuitBreaker(state_storage=FleetStorage("key"))
CircuitBreaker(state_storage=CircuitMemoryStorage(pybreaker.STATE_CLOSED))


class CarefulBreaker(CircuitBreaker):
    def is_system_error(self, exception: BaseException) -> bool:
        return super().is_system_error(exception) and not isinstance(exception, OSError)

    def call(self, func: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        print("calling", func)
        return super().call(func, *args, **kwargs)


@CarefulBreaker(name="careful")
def careful(number: int, /) -> str:
    return ""


assert_type(careful, Callable[[int], str])


# Names that existing code leans on

with breaker._lock:
    held = breaker.state
    if isinstance(held, CircuitOpenState):
        breaker.half_open()
        held = breaker.state
    held.before_call(find, "key")
    held._handle_success()
    held._handle_error(ValueError(), reraise=False)
    held.on_success()
    held.on_failure(ValueError())
    breaker._inc_counter()
    breaker._state_storage.state = "open"
    breaker._state_storage.opened_at = datetime.now(timezone.utc)

breaker._reset_timeout = 0.1
private_state: CircuitBreakerState = breaker._state
private_name: str | None = breaker._name
private_limits: tuple[float, ...] = (
    breaker._fail_max,
    breaker._reset_timeout,
    breaker._success_threshold,
)
print(*breaker._listeners, *breaker._excluded_exceptions)
made_by_name: CircuitBreakerState = breaker._create_new_state("closed")
made_by_hand = CircuitClosedState(breaker, prev_state=made_by_name, notify=False)
assert_type(made_by_hand._breaker, CircuitBreaker)
assert_type(CircuitBreakerState(breaker, "closed").name, str)
