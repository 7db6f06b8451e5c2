"""A process that is forked can use its parent's breakers: in the child each has a
new lock and no trial of its parent's.

Each scenario is a program of its own, so that no process with the tests' threads
in it is forked. The program says in an assertion what it finds in either process.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
from support import BRIEF, EVENTS, PATIENCE

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")


PRELUDE = """
import contextlib, os, signal, sys, threading, traceback, types, warnings
import pybreaker
from internals import lock_of, storage_of
from pybreaker import CircuitBreaker, CircuitBreakerError

signal.alarm(60)  # what hangs is killed
PATIENCE = 30

class Boom(Exception):
    pass

def boom():
    raise Boom

def fork(child):
    "Runs child() in a forked process and waits until that has ended well."
    with warnings.catch_warnings():
        # Since 3.12 Python warns of what this is about: the threads stay behind.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        signal.alarm(50)
        try:
            child()
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert status == 0, f"the child ended with status {status}"

@contextlib.contextmanager
def in_another_thread(run):
    "Runs run(reached, leave) in a thread as long as the block lasts."
    errors = []
    reached, leave = threading.Event(), threading.Event()
    def guarded():
        try:
            run(reached.set, lambda: leave.wait(PATIENCE))
        except BaseException as exc:
            errors.append(exc)
    thread = threading.Thread(target=guarded, daemon=True)
    thread.start()
    assert reached.wait(PATIENCE)
    try:
        yield
    finally:
        leave.set()
        thread.join(PATIENCE)
    assert not thread.is_alive()
    assert errors == []

def use(breaker):
    "A trip, a rejection, a trial, and all that looks at a breaker."
    breaker.close()
    breaker.fail_counter = breaker.fail_max - 1
    try:
        breaker.call(boom)
    except CircuitBreakerError as exc:
        assert isinstance(exc.__cause__, Boom)
    else:
        raise AssertionError
    assert breaker.state.name == "open"
    try:
        breaker.call(int)
    except CircuitBreakerError:
        pass
    else:
        raise AssertionError
    repr(breaker), breaker.snapshot()
    breaker.half_open()
    assert breaker.retry_after == 0.0
    assert breaker.call(int) == 0
    assert breaker.current_state == "closed"
    with contextlib.suppress(SystemExit):
        breaker.call(sys.exit)
"""


def run(program):
    """Runs `program` with the library in a Python of its own."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PRELUDE + textwrap.dedent(program)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_a_child_has_a_lock_of_its_own():
    """The thread that held its parent's at the fork is not there to release it."""
    run("""
        breaker = CircuitBreaker()
        lock = lock_of(breaker)

        def hold(reached, leave):
            with lock_of(breaker):
                reached()
                leave()

        def child():
            assert lock_of(breaker) is not lock
            use(breaker)

        with in_another_thread(hold):
            fork(child)
            assert lock_of(breaker) is lock
            assert not lock.acquire(blocking=False)
        use(breaker)
    """)


def test_a_child_moves_the_circuit_for_reasons_of_its_own():
    """What its parent was about to do when it forked is the parent's."""
    run("""
        class Forking(CircuitBreaker):
            def open(self):
                fork(child)
                return super().open()

        def child():
            CircuitBreaker.open(breaker)
            assert breaker.state.reason == "by hand"
            use(pybreaker.CircuitBreaker())

        breaker = Forking(fail_max=1)
        try:
            breaker.call(boom)
        except CircuitBreakerError:
            pass
        assert breaker.state.reason == "a failure: Boom()"
    """)


def test_a_child_may_be_forked_with_the_lock_held():
    """The child's lock is free, for all threads of the child."""
    run("""
        breaker = CircuitBreaker()

        def child():
            with in_another_thread(lambda reached, leave: (use(breaker), reached())):
                pass

        with lock_of(breaker):
            fork(child)
        use(breaker)
    """)


def test_a_child_may_be_forked_while_a_mapping_makes_a_breaker():
    """The lock of the child's mapping is free, for all threads of the child."""
    run("""
        class Breakers(pybreaker.CircuitBreakers):
            def make(self, key):
                if key == "forks":
                    fork(child)
                return super().make(key)

        breakers = Breakers()

        def child():
            with in_another_thread(lambda reached, leave: (breakers["new"], reached())):
                pass

        assert breakers["forks"].call(int) == 0
        assert "new" not in breakers
    """)


def test_a_child_logs_only_what_it_does_itself():
    """What its parent had still to log when it forked is the parent's."""
    run("""
        import logging

        class Handler(logging.Handler):
            def emit(self, record):
                lines.append(record.getMessage())

        lines = []
        logging.getLogger("pybreaker").addHandler(Handler())
        breaker = CircuitBreaker()

        def child():
            breaker.half_open()
            breaker.open()
            assert len(lines) == 1
            assert "open, was half-open" in lines[0]

        with lock_of(breaker):
            breaker.open()
            fork(child)
        assert breaker.state.name == "open"
        assert len(lines) == 1
        assert "open, was closed" in lines[0]
    """)


@pytest.mark.parametrize("event", EVENTS)
def test_a_child_may_be_forked_while_a_listener_is_told(event):
    """Of a call or a move in another thread, which the child never sees end."""
    run(f"""
        told = []
        armed = [True]

        class Listener(pybreaker.CircuitBreakerListener):
            def {event}(self, cb, *args):
                told.append(os.getpid())
                if armed:
                    armed.clear()
                    self.reached()
                    self.leave()

        listener = Listener()
        breaker = CircuitBreaker(fail_max=1)
        if {event!r} == "rejected":
            breaker.open()
        breaker.add_listener(listener)

        def call(reached, leave):
            listener.reached, listener.leave = reached, leave
            func = dict(failure=boom, state_change=boom, abandoned=sys.exit)
            with contextlib.suppress(CircuitBreakerError, SystemExit):
                breaker.call(func.get({event!r}, int))

        def child():
            told.clear()
            use(breaker)
            assert told and set(told) == {{os.getpid()}}

        with in_another_thread(call):
            fork(child)
        use(breaker)
        assert set(told) == {{os.getpid()}}
    """)


@pytest.mark.parametrize("due", [False, True])
def test_a_child_has_no_trial_of_its_parents(due):
    """A trial that runs in a thread of the parent holds no place in the child, and
    keeps its place in the parent."""
    run(f"""
        breaker = CircuitBreaker(reset_timeout=60)
        if {due}:
            breaker.open()
            storage_of(breaker).opened_at = None
        else:
            breaker.half_open()

        def trial(reached, leave):
            breaker.call(lambda: (reached(), leave()))

        def child():
            assert breaker.current_state == "half-open"
            assert breaker.retry_after == 0.0
            assert breaker.call(int) == 0
            assert breaker.current_state == "closed"
            use(breaker)

        with in_another_thread(trial):
            fork(child)
            assert breaker.current_state == "half-open"
            assert 0 < breaker.retry_after <= 60
            try:
                breaker.call(int)
            except CircuitBreakerError:
                pass
            else:
                raise AssertionError("two trials")
        assert breaker.current_state == "closed"
    """)


def test_a_child_that_was_forked_within_a_trial_is_outside_of_it():
    """The child goes on in the guarded function. The trial around that function is the
    parent's and has no place in the child, so a call there is the child's own trial."""
    run("""
        breaker = CircuitBreaker(reset_timeout=60, success_threshold=2)
        breaker.half_open()
        released = []

        class Storage(pybreaker.CircuitMemoryStorage):
            def release_trial(self):
                released.append(os.getpid())

        breaker._state_storage = Storage("half-open")

        def child():
            assert breaker.retry_after == 0.0
            breaker.call(lambda: breaker.call(int))  # a trial, and one within it
            assert breaker.success_counter == 1
            assert breaker.retry_after == 0.0
            assert released == [os.getpid()]

        def work():
            fork(child)
            assert breaker.call(int) == 0  # within
            assert breaker.success_counter == 0
            assert breaker.retry_after > 0

        breaker.call(work)
        assert breaker.success_counter == 1
        assert released == [os.getpid()]
    """)


def test_a_trial_that_ends_in_the_child_gives_no_place_back_there():
    """The trial's outcome counts in the child's circuit. The child does not release the
    claim that the parent was granted: another process may have the place by then."""
    run("""
        released = []

        class Storage(pybreaker.CircuitMemoryStorage):
            def release_trial(self):
                released.append(True)

        breaker = CircuitBreaker(
            reset_timeout=60, state_storage=Storage("half-open"), success_threshold=2
        )
        block = breaker.calling()
        block.__enter__()

        def child():
            import contextvars
            other = breaker.calling()
            contextvars.Context().run(other.__enter__)
            block.__exit__(None, None, None)
            assert breaker.success_counter == 1
            assert breaker.retry_after > 0
            assert released == []
            other.__exit__(None, None, None)
            assert breaker.current_state == "closed"
            assert released == [True]

        fork(child)
        assert breaker.success_counter == 0
        block.__exit__(None, None, None)
        assert breaker.success_counter == 1
        assert released == [True]
    """)


def test_a_child_of_a_child_can_use_the_breaker_as_well():
    """Each generation starts afresh."""
    run("""
        breaker = CircuitBreaker()

        def hold(reached, leave):
            with lock_of(breaker):
                reached()
                leave()

        def grandchild():
            use(breaker)

        def child():
            use(breaker)
            with in_another_thread(hold):
                fork(grandchild)
            use(breaker)

        with in_another_thread(hold):
            fork(child)
    """)


def test_a_child_keeps_state_counts_settings_and_listeners():
    """Only lock and trial are new in the child; what the child does stays there."""
    run("""
        told = []

        class Listener(pybreaker.CircuitBreakerListener):
            def state_change(self, cb, old_state, new_state):
                told.append(new_state.name)

        breaker = CircuitBreaker(7, 30, listeners=[Listener()], name="db")
        breaker.fail_counter = 3
        breaker.half_open()
        before = breaker.snapshot()
        told.clear()

        def child():
            assert breaker.snapshot() == before
            breaker.close()
            assert told == ["closed"]

        fork(child)
        assert told == []
        assert breaker.snapshot() == before
    """)


def test_every_breaker_is_usable_in_the_child():
    """However many there are, and of whichever class."""
    run("""
        class Mine(CircuitBreaker):
            pass

        breakers = [cls() for cls in (CircuitBreaker, Mine) for _ in range(50)]

        def hold(reached, leave):
            with contextlib.ExitStack() as stack:
                for breaker in breakers:
                    stack.enter_context(lock_of(breaker))
                reached()
                leave()

        def child():
            for breaker in breakers:
                use(breaker)

        with in_another_thread(hold):
            fork(child)
    """)


def test_every_breaker_that_equals_another_is_usable_in_the_child():
    """A subclass may compare by what it likes."""
    run("""
        class Named(CircuitBreaker):
            def __eq__(self, other):
                return isinstance(other, Named)

            def __hash__(self):
                return 1

        breakers = [Named() for _ in range(3)]

        def hold(reached, leave):
            with lock_of(breakers[0]), lock_of(breakers[1]), lock_of(breakers[2]):
                reached()
                leave()

        def child():
            for breaker in breakers:
                use(breaker)

        with in_another_thread(hold):
            fork(child)
    """)


@pytest.mark.parametrize("move", ["half_open", "open"])
def test_a_move_that_was_being_made_at_the_fork_is_not_the_childs(move):
    """The storage may take its time over the parent's move. A move that the child makes
    then is the child's own, by hand, and is logged so."""
    run(f"""
        import logging

        class Storage(pybreaker.CircuitMemoryStorage):
            wait = None

            @property
            def state(self):
                return self._state

            @state.setter
            def state(self, name):
                if self.wait is not None:
                    wait, self.wait = self.wait, None
                    wait()
                self._state = name

            @property
            def _state(self):
                return self.kept

            @_state.setter
            def _state(self, name):
                self.kept = name

        storage = Storage("closed")
        breaker = CircuitBreaker(fail_max=1, state_storage=storage)
        if {move!r} == "half_open":
            breaker.open()
            storage.opened_at = None

        def call(reached, leave):
            storage.wait = lambda: (reached(), leave())
            with contextlib.suppress(CircuitBreakerError):
                breaker.call(boom)

        logged = []
        handler = logging.Handler()
        handler.emit = lambda record: logged.append(record.getMessage())
        logging.getLogger("pybreaker").addHandler(handler)
        logging.getLogger("pybreaker").setLevel("INFO")

        def child():
            storage.increment_success_counter()
            breaker.{move}()
            assert storage.success_counter == 0
            assert "by hand" in logged[-1], logged

        with in_another_thread(call):
            fork(child)
    """)


# What is done before, then at every line; and for how long the child may have to wait.
STEPS = {
    "a trip": ("", "breaker.call(fails)", {0, 60}),
    "a trial that succeeds": ("is_due()", "breaker.call(int)", {0}),
    "a trial that fails": ("is_due()", "breaker.call(fails)", {0, 60}),
    "a rejection": ("breaker.open()", "breaker.call(int)", {60}),
    "opening": ("", "breaker.open()", {0, 60}),
    "a listener that is added": ("", "breaker.add_listener(Listener([]))", {0}),
}


@pytest.mark.skipif(BRIEF, reason="it takes many forks")
@pytest.mark.parametrize("before, step, waits", STEPS.values(), ids=STEPS)
def test_a_child_may_be_forked_at_any_line(before, step, waits):
    """Wherever in the library another thread is, the child can use the breaker, no
    trial holds its place there, and each move that its listeners hear of begins where
    the last one has led to."""
    run(f"""
        now = [0.0]
        pybreaker.time = types.SimpleNamespace(monotonic=lambda: now[0])

        class Listener(pybreaker.CircuitBreakerListener):
            def __init__(self, moves):
                self.moves = moves

            def state_change(self, cb, old_state, new_state):
                self.moves.append((old_state.name, new_state.name))

        def stops_at(number, do):
            "Does it, and waits before that one of all lines that it runs."
            def run(reached, leave):
                seen = set()
                def trace(frame, event, arg):
                    if frame.f_code.co_filename != pybreaker.__file__:
                        return None
                    if event == "line" and frame.f_lineno not in seen:
                        seen.add(frame.f_lineno)
                        if len(seen) == number:
                            reached()
                            leave()
                    return trace
                sys.settrace(trace)
                try:
                    do()
                finally:
                    sys.settrace(None)
                    lines.append(len(seen))
                    reached()
            return run

        number, lines = 0, [1]
        while number < lines[-1]:
            number += 1
            moves = []
            breaker = CircuitBreaker(fail_max=1, listeners=[Listener(moves)])

            def is_due():
                breaker.open()
                now[0] += 60

            def fails():
                now[0] += 1  # so that a trial's rest is less than an opening's
                raise Boom

            {before}

            def do():
                with contextlib.suppress(CircuitBreakerError):
                    {step}

            def child():
                moves.clear()
                assert breaker.retry_after in {waits}
                use(breaker)
                assert moves[-1] == ("half-open", "closed"), moves
                for (_, reached), (left, _) in zip(moves, moves[1:]):
                    assert reached == left, moves

            with in_another_thread(stops_at(number, do)):
                fork(child)
            use(breaker)
        assert number > 5
    """)
