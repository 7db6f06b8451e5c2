"""How each library is asked for the same things: one class for each.

A worker makes one object of a library's class, which imports the library. What
the library has no way to do is None.
"""

from datetime import timedelta

NEVER = 10**9  # failures in a row that nobody waits for
HOUR = 3600


class Library:
    """What most of them have in common: a class of breakers that decorate functions
    of both kinds and have a method `call`."""

    unchanged_listener = None
    """A listener that has whatever methods its base class gives it."""

    empty_listener = None
    """A listener with methods of its own that do nothing."""

    def fresh(self, name):
        """A breaker that nobody has changed anything about."""
        return self.Breaker(name=name)

    def breaker(self, fail_max=NEVER, listeners=()):
        """A breaker that opens after so many failures, for longer than this runs."""
        raise NotImplementedError

    def decorate(self, breaker, func):
        return breaker(func)

    def decorated_coroutine_function(self, func):
        return self.decorate(self.breaker(), func)

    def call(self, breaker):
        return breaker.call


class PyBreaker(Library):
    """The ``pybreaker.py`` above this directory."""

    title = "this library"
    requirement = distribution = None
    module = "pybreaker"

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

        self.Breaker = pybreaker.CircuitBreaker
        self.Rejected = pybreaker.CircuitBreakerError
        self.unchanged_listener = Unchanged()
        self.empty_listener = Empty()

    def breaker(self, fail_max=NEVER, listeners=(), exclude=()):
        return self.Breaker(fail_max, HOUR, listeners=listeners, exclude=exclude)


class PyBreaker141(PyBreaker):
    title = "pybreaker"
    requirement = "pybreaker==1.4.1"
    distribution = "pybreaker"

    decorated_coroutine_function = None


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

        self.Breaker = aiobreaker.CircuitBreaker
        self.Rejected = aiobreaker.CircuitBreakerError
        self.unchanged_listener = Unchanged()
        self.empty_listener = Empty()

    def breaker(self, fail_max=NEVER, listeners=()):
        hour = timedelta(seconds=HOUR)
        return self.Breaker(fail_max, timeout_duration=hour, listeners=listeners)


class Purgatory(Library):
    """Makes breakers by name, in factories that keep them. A listener is a
    function."""

    title = requirement = distribution = module = "purgatory"

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


class Interlock(Library):
    """Opens by the rate of failures, once there were so many calls."""

    title = requirement = distribution = "interlock-cb"
    module = "interlock"

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

        self.Breaker = interlock.CircuitBreaker
        self.Config = interlock.Config
        self.Rejected = interlock.CircuitOpenError
        self.unchanged_listener = Unchanged()
        self.empty_listener = Empty()

    def breaker(self, fail_max=NEVER, listeners=()):
        return self.Breaker(
            name="service",
            config=self.Config(
                minimum_number_of_calls=fail_max, wait_duration_in_open=HOUR
            ),
            listener=listeners[0] if listeners else None,
        )


LIBRARIES = {
    library.__name__: library
    for library in (
        PyBreaker,
        PyBreaker141,
        CircuitBreaker,
        AioBreaker,
        Purgatory,
        Interlock,
    )
}
