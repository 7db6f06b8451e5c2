"""One class for each library, so that all libraries are used in the same way.

A worker makes one object of a library's class, which imports the library. The name of
what a library cannot do is None.
"""

import asyncio
import functools
from datetime import timedelta

NEVER = 10**9  # failures in a row: more than there will be
HOUR = 3600


class Library:
    """What most libraries have in common: a class of breakers that decorate functions
    and coroutine functions, and have a method `call`."""

    unchanged_listener = None
    """A listener that has only the methods of its base class."""

    empty_listener = None
    """A listener with methods of its own that do nothing."""

    transition_listener = None
    """A listener that hears of transitions and of nothing else."""

    decorated_generator_function = None
    """Decorates a generator function, where a library guards it to its end."""

    client = None
    """What pip installs to let circuits be shared; None if they are not to be."""

    def fresh(self, name):
        """A breaker with the library's own settings."""
        return self.Breaker(name=name)

    def breaker(self, fail_max=NEVER, listeners=()):
        """A breaker that opens after `fail_max` failures, and stays open."""
        raise NotImplementedError

    def run(self, work):
        """The result of `work`, which is called where the library can be used."""
        return work()

    def decorate(self, breaker, func):
        return breaker(func)

    def decorated_coroutine_function(self, func):
        return self.decorate(self.breaker(), func)

    def call(self, breaker):
        return breaker.call

    def shared(self, url, name, fail_max, timeout):
        """A decorator. Calls of the functions that the decorator makes, in any process,
        share the circuit with this name, which opens after `fail_max` failures."""
        raise NotImplementedError

    async def shared_by_coroutines(self, url, name, fail_max, timeout):
        """Returns a decorator as `shared` does, for coroutine functions."""
        raise NotImplementedError


class PyBreaker(Library):
    """The ``pybreaker.py`` above this directory."""

    title = "this library"
    requirement = distribution = None
    module = "pybreaker"
    client = "redis"

    def __init__(self):
        import pybreaker

        class Unchanged(pybreaker.CircuitBreakerListener):
            pass

        class Empty(pybreaker.CircuitBreakerListener):
            def before_call(self, cb, func, *args, **kwargs):
                pass

            def failure(self, cb, exc):
                pass

            def success(self, cb):
                pass

            def state_change(self, cb, old_state, new_state):
                pass

        class Transitions(pybreaker.CircuitBreakerListener):
            def state_change(self, cb, old_state, new_state):
                pass

        self.clients = {}  # of Redis, by the URL
        self.Breaker = pybreaker.CircuitBreaker
        self.Rejected = pybreaker.CircuitBreakerError
        self.unchanged_listener = Unchanged()
        self.empty_listener = Empty()
        self.transition_listener = Transitions()

    def breaker(self, fail_max=NEVER, listeners=(), exclude=(), **settings):
        return self.Breaker(
            fail_max, HOUR, listeners=listeners, exclude=exclude, **settings
        )

    def decorated_generator_function(self, func):
        return self.decorate(self.breaker(), func)

    def shared(self, url, name, fail_max, timeout):
        import redis

        from pybreaker import STATE_CLOSED, CircuitRedisStorage

        # A program has one client for all of its circuits.
        client = self.clients.setdefault(url, redis.Redis.from_url(url))
        storage = CircuitRedisStorage(STATE_CLOSED, client, namespace=name)
        return self.Breaker(fail_max, timeout, state_storage=storage)

    async def shared_by_coroutines(self, url, name, fail_max, timeout):
        return self.shared(url, name, fail_max, timeout)


class PyBreaker141(PyBreaker):
    title = "pybreaker"
    requirement = "pybreaker==1.4.1"
    distribution = "pybreaker"

    decorated_coroutine_function = decorated_generator_function = None

    async def shared_by_coroutines(self, url, name, fail_max, timeout):
        """Guards an await by a plain block around the await."""
        breaker = self.shared(url, name, fail_max, timeout)

        def decorate(func):
            @functools.wraps(func)
            async def guarded(*args):
                with breaker.calling():
                    return await func(*args)

            return guarded

        return decorate


class CircuitBreaker(Library):
    title = requirement = distribution = module = "circuitbreaker"

    def __init__(self):
        import circuitbreaker

        self.Breaker = circuitbreaker.CircuitBreaker
        self.Rejected = circuitbreaker.CircuitBreakerError

    def breaker(self, fail_max=NEVER):
        return self.Breaker(failure_threshold=fail_max, recovery_timeout=HOUR)


class AioBreaker(Library):
    title = requirement = distribution = module = "aiobreaker"

    def __init__(self):
        import aiobreaker

        class Unchanged(aiobreaker.CircuitBreakerListener):
            pass

        class Empty(aiobreaker.CircuitBreakerListener):
            def before_call(self, breaker, func, *args, **kwargs):
                pass

            def failure(self, breaker, exception):
                pass

            def success(self, breaker):
                pass

            def state_change(self, breaker, old, new):
                pass

        class Transitions(aiobreaker.CircuitBreakerListener):
            def state_change(self, breaker, old, new):
                pass

        self.Breaker = aiobreaker.CircuitBreaker
        self.Rejected = aiobreaker.CircuitBreakerError
        self.unchanged_listener = Unchanged()
        self.empty_listener = Empty()
        self.transition_listener = Transitions()

    def breaker(self, fail_max=NEVER, listeners=()):
        hour = timedelta(seconds=HOUR)
        return self.Breaker(fail_max, timeout_duration=hour, listeners=listeners)


class Purgatory(Library):
    """Makes breakers by name, in factories that keep them. A listener is a
    function."""

    title = requirement = distribution = module = "purgatory"
    client = "purgatory[redis]"

    call = None

    def __init__(self):
        import purgatory
        from purgatory.domain.model import OpenedState

        self.Factory = purgatory.SyncCircuitBreakerFactory
        self.AsyncFactory = purgatory.AsyncCircuitBreakerFactory
        self.Rejected = OpenedState
        self.factory = self.Factory()

    def fresh(self, name):
        return self.factory.get_breaker(name)

    def breaker(self, fail_max=NEVER, listeners=()):
        factory = self.Factory(fail_max, HOUR)
        for listener in listeners:
            factory.add_listener(listener)
        return factory

    def decorate(self, breaker, func):
        return breaker("service")(func)

    def decorated_coroutine_function(self, func):
        return self.AsyncFactory(NEVER, HOUR)("service")(func)

    def empty_listener(self, name, event, payload):
        pass

    def shared(self, url, name, fail_max, timeout):
        """Runs an event loop for each call: with its ``SyncRedisUnitOfWork``, calls
        raise TypeError."""
        loop = asyncio.new_event_loop()
        run = loop.run_until_complete
        decorate = run(self.shared_by_coroutines(url, name, fail_max, timeout))

        def decorate_function(func):
            @decorate
            async def guarded_later(*args):
                return func(*args)

            @functools.wraps(func)
            def guarded(*args):
                return run(guarded_later(*args))

            return guarded

        return decorate_function

    async def shared_by_coroutines(self, url, name, fail_max, timeout):
        from purgatory import AsyncRedisUnitOfWork

        factory = self.AsyncFactory(fail_max, timeout, uow=AsyncRedisUnitOfWork(url))
        await factory.initialize()
        return factory(name)


class Interlock(Library):
    """Opens by the rate of failures, once there were `fail_max` calls."""

    title = requirement = distribution = "interlock-cb"
    module = "interlock"
    client = "interlock-cb[redis]"

    def __init__(self):
        import interlock

        class Unchanged(interlock.CoreEventListener):
            pass

        class Empty(interlock.CoreEventListener):
            def on_call(self, *, name, outcome, duration):
                pass

            def on_rejected(self, *, name):
                pass

            def on_reset(self, *, name):
                pass

            def on_state_change(self, *, name, old, new):
                pass

        class Transitions:
            def on_state_change(self, *, name, old, new):
                pass

        self.Breaker = interlock.CircuitBreaker
        self.Config = interlock.Config
        self.Rejected = interlock.CircuitOpenError
        self.unchanged_listener = Unchanged()
        self.empty_listener = Empty()
        self.transition_listener = Transitions()

    def breaker(self, fail_max=NEVER, listeners=()):
        return self.Breaker(
            name="service",
            config=self.Config(
                minimum_number_of_calls=fail_max, wait_duration_in_open=HOUR
            ),
            listener=listeners[0] if listeners else None,
        )

    def shared(self, url, name, fail_max, timeout):
        import redis
        from interlock.integrations.redis import RedisStorage

        storage = RedisStorage(redis.Redis.from_url(url))
        return self.stored(storage, name, fail_max, timeout)

    async def shared_by_coroutines(self, url, name, fail_max, timeout):
        import redis.asyncio
        from interlock.integrations.redis import AsyncRedisStorage

        storage = AsyncRedisStorage(redis.asyncio.Redis.from_url(url))
        return self.stored(storage, name, fail_max, timeout)

    def stored(self, storage, name, fail_max, timeout):
        """Opens after `fail_max` failures in a row: a window of as many calls is full
        of failures."""
        config = self.Config(
            failure_rate_threshold=1.0,
            minimum_number_of_calls=fail_max,
            window_size=min(fail_max, 100),
            permitted_calls_in_half_open=1,
            wait_duration_in_open=timeout,
        )
        return self.Breaker(name=name, config=config, storage=storage)


class NoPanic(Library):
    """Opens by the rate of failures in the last seconds."""

    title = requirement = distribution = module = "nopanic"

    def __init__(self):
        import nopanic

        self.Breaker = nopanic.CircuitBreaker
        self.Rejected = nopanic.CircuitOpen

    def breaker(self, fail_max=NEVER, listeners=()):
        return self.Breaker(
            min_calls=fail_max,
            reset_timeout=HOUR,
            on_state_change=listeners[0] if listeners else None,
        )

    def decorated_generator_function(self, func):
        return self.decorate(self.breaker(), func)

    def transition_listener(self, breaker, old_state, new_state):
        pass


class Grelmicro(Library):
    """Guards coroutine functions. Other functions have to be called in another thread
    than the event loop's, which then does the work; such calls are not measured."""

    title = requirement = distribution = "grelmicro"
    module = "grelmicro.resilience"

    decorate = call = None

    def __init__(self):
        from grelmicro import resilience

        self.make = resilience.CircuitBreaker.consecutive_count
        self.backend = resilience.MemoryCircuitBreakerAdapter()

    def run(self, work):
        """Runs an event loop, which a breaker needs even where it waits for nothing."""

        async def run():
            async with self.backend:
                return work()

        return asyncio.run(run())

    def fresh(self, name):
        return self.make(name, backend=self.backend)

    def decorated_coroutine_function(self, func):
        breaker = self.make(
            "service",
            error_threshold=NEVER,
            reset_timeout=HOUR,
            backend=self.backend,
        )
        return breaker(func)


LIBRARIES = {
    library.__name__: library
    for library in (
        PyBreaker,
        PyBreaker141,
        CircuitBreaker,
        AioBreaker,
        Purgatory,
        Interlock,
        NoPanic,
        Grelmicro,
    )
}
