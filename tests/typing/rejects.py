"""Code that type checkers must refuse: each line marked as ignored, no other.

Both checkers are told to complain of a mark that is not needed. The code is
checked against the installed wheel and never run.
"""

from __future__ import annotations

from pybreaker import (
    CircuitBreaker,
    CircuitBreakerListener,
    CircuitBreakers,
    CircuitBreakerState,
    CircuitBreakerStorage,
    FailedResult,
    breakers,
)

breaker = CircuitBreaker()


# Making one

CircuitBreaker(fail_max="5")  # type: ignore[arg-type]
CircuitBreaker(reset_timeout=None)  # type: ignore[arg-type]
CircuitBreaker(exclude=ValueError)  # type: ignore[arg-type]
CircuitBreaker(exclude=[3])  # type: ignore[list-item]
CircuitBreaker(exclude=5)  # type: ignore[arg-type]
CircuitBreaker(listeners=CircuitBreakerListener())  # type: ignore[arg-type]
CircuitBreaker(state_storage="memory")  # type: ignore[arg-type]
CircuitBreaker(name=b"db")  # type: ignore[arg-type]
CircuitBreaker(max_failures=5)  # type: ignore[call-arg]
CircuitBreaker(window_size="50")  # type: ignore[arg-type]
CircuitBreaker(window_seconds="30")  # type: ignore[arg-type]
CircuitBreaker(max_reset_timeout="600")  # type: ignore[arg-type]
CircuitBreaker(include=ValueError)  # type: ignore[arg-type]
CircuitBreaker(ignore=[3])  # type: ignore[list-item]
CircuitBreaker(failure_result=500)  # type: ignore[arg-type]
CircuitBreaker(failure_result=lambda: True)  # type: ignore[arg-type]
CircuitBreaker(dry_run="yes")  # type: ignore[arg-type]
CircuitBreaker(5, 60, None, None, None, None, True, 1, 50)  # type: ignore[call-arg]


# Decorated functions keep their signatures


@breaker
def fetch(key: str, /, retries: int = 3, *, strict: bool = False) -> bytes:
    return b""


fetch()  # type: ignore[call-arg]
fetch(1)  # type: ignore[arg-type]
fetch(key="key")  # type: ignore[call-arg]
fetch("key", strict="yes")  # type: ignore[arg-type]
fetched: str = fetch("key")  # type: ignore[assignment]


@breaker()
def spelled_with_brackets(number: int) -> str:
    return ""


spelled_with_brackets("1")  # type: ignore[arg-type]


class Client:
    @breaker
    def get(self, key: str) -> int:
        return len(key)


Client().get(1)  # type: ignore[arg-type]
Client().get("key", "default")  # type: ignore[call-arg]

breaker(3)  # type: ignore[call-overload]
breaker(fetch, "key")  # type: ignore[call-overload]


# call() and call_async()


def find(key: str, *, strict: bool = False) -> float:
    return 0.0


async def find_later(key: str) -> float:
    return 0.0


breaker.call()  # type: ignore[call-arg]
breaker.call(3)  # type: ignore[arg-type]
breaker.call(find)  # type: ignore[call-arg]
breaker.call(find, 1)  # type: ignore[arg-type]
breaker.call(find, "key", strict="yes")  # type: ignore[arg-type]
breaker.call(find, "key", loose=True)  # type: ignore[call-arg]
called: str = breaker.call(find, "key")  # type: ignore[assignment]


@breaker
async def fetch_later(key: str) -> bytes:
    return b""


async def main() -> None:
    fetched: bytes = b""
    fetched = fetch_later("key")  # type: ignore[assignment]
    fetched = await fetch_later("key")
    print(fetched)
    await fetch_later(1)  # type: ignore[arg-type]
    await fetch("key")  # type: ignore[misc]
    await breaker.call_async(find_later)  # type: ignore[call-overload]
    await breaker.call_async(find_later, 1)  # type: ignore[call-overload]
    await breaker.call_async(find, 1)  # type: ignore[call-overload]
    found: str = ""
    found = await breaker.call_async(find_later, "key")  # type: ignore[call-overload]
    print(found)
    with breaker.call_async(find, "key"):  # type: ignore[attr-defined]
        pass


# Watching and steering

breaker.fail_max = "5"  # type: ignore[assignment]
breaker.fail_counter = None  # type: ignore[assignment]
breaker.reset_timeout = "60"  # type: ignore[assignment]
breaker.success_threshold = "1"  # type: ignore[assignment]
breaker.name = 3  # type: ignore[assignment]
breaker.state = 1  # type: ignore[assignment]
breaker.current_state = "open"  # type: ignore[misc]
breaker.success_counter = 1  # type: ignore[misc]
breaker.retry_after = 1.0  # type: ignore[misc]
breaker.listeners = ()  # type: ignore[misc]
breaker.window_size = "50"  # type: ignore[assignment]
breaker.window_seconds = "30"  # type: ignore[assignment]
breaker.max_reset_timeout = "600"  # type: ignore[assignment]
breaker.failure_result = 500  # type: ignore[assignment]
breaker.dry_run = None  # type: ignore[assignment]
breaker.state.reason = "why"  # type: ignore[misc]
breaker.open("30")  # type: ignore[arg-type]
breaker.open(30, 30)  # type: ignore[arg-type]
breaker.half_open(30)  # type: ignore[arg-type]
breaker.close(seconds=30)  # type: ignore[call-arg]
breaker.is_open()  # type: ignore[attr-defined]
breaker.add_excluded_exception(3)  # type: ignore[arg-type]


# Many

hosts = CircuitBreakers(fail_max=5)
CircuitBreakers("many")  # type: ignore[arg-type]
host: str = hosts["example.org"]  # type: ignore[assignment]
hosts.make()  # type: ignore[call-arg]
every: CircuitBreaker = breakers()  # type: ignore[assignment]
FailedResult()  # type: ignore[call-arg]
FailedResult("result").result.upper()  # type: ignore[attr-defined]


# Listeners and storages


class Confused(CircuitBreakerListener):
    def success(self, cb: int) -> None:  # type: ignore[override]
        pass

    def state_change(  # type: ignore[override]
        self, cb: CircuitBreaker, new_state: CircuitBreakerState
    ) -> None:
        pass


class Numbered(CircuitBreakerStorage):
    @property
    def counter(self) -> str:  # type: ignore[override]
        return "0"
