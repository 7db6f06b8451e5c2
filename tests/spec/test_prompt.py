"""An operator at an interactive prompt of the process, while calls fly."""

from __future__ import annotations

import builtins
import code
import contextlib
import doctest
import io
import math
import pydoc
import re
import rlcompleter
import threading

import pytest
from readme_support import blocks_of, source_of
from support import PATIENCE

import pybreaker
from pybreaker import CircuitBreaker


class Prompt(code.InteractiveConsole):
    """Takes a line as if it had been typed, and returns what is shown then."""

    def __init__(self, **names):
        super().__init__(names)

    def type(self, line):
        shown = io.StringIO()
        with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
            for part in line.splitlines():
                more = self.push(part)
        assert not more, f"{line!r} is not complete"
        return shown.getvalue()


@pytest.fixture(autouse=True)
def last_result(monkeypatch):
    """A prompt remembers its last result where other tests could find it."""
    monkeypatch.setattr(builtins, "_", None, raising=False)


@pytest.fixture
def weather(clock):
    return CircuitBreaker(name="weather")


@pytest.fixture
def in_flight(weather):
    """Starts calls that go on until the test ends. Returns how to end them now."""
    running, released = threading.Barrier(5), threading.Event()
    wrong = []

    def slow():
        running.wait(PATIENCE)
        assert released.wait(PATIENCE)
        raise OSError("too late to matter")

    def call():
        try:
            weather.call(slow)
        except (OSError, pybreaker.CircuitBreakerError):
            pass
        except BaseException as exc:
            wrong.append(exc)

    threads = [threading.Thread(target=call, daemon=True) for _ in range(4)]

    def start():
        for thread in threads:
            thread.start()
        running.wait(PATIENCE)

    def end():
        released.set()
        for thread in threads:
            if thread.ident is not None:
                thread.join(PATIENCE)
                assert not thread.is_alive(), "a call hangs"
        assert wrong == []

    start.end = end
    yield start
    end()


# The sessions that the guide shows


PAGE = "docs/operating.rst"
SESSIONS = ["At a prompt", "What an operator can do"]


def blocks():
    """The page's blocks that are sessions of an operator, by section."""
    sections = {}
    for block in blocks_of(source_of(PAGE), PAGE):
        if block.kind == "pycon" and block.section in SESSIONS:
            sections.setdefault(block.section, []).append(block.text)
    return sections


@pytest.mark.parametrize(("section", "texts"), blocks().items(), ids=list(blocks()))
def test_session_of_the_guide_goes_as_it_is_shown(section, texts, weather, in_flight):
    """Typed at a prompt, line by line, while four calls are on their way."""
    in_flight()
    weather.fail_counter = 3
    prompt = Prompt(weather=weather)
    for text in texts:
        for example in doctest.DocTestParser().get_examples(text):
            shown = prompt.type(example.source)
            if example.exc_msg is None:
                assert shown == example.want
            else:
                assert shown.endswith(f"\n{example.exc_msg}")
                assert shown.startswith("Traceback")
    in_flight.end()


# Looking


def test_name_of_a_breaker_is_all_it_takes_to_know_the_situation(weather, clock, fail):
    """The repr tells the situation while the circuit trips, is open, and is on
    trial."""
    prompt = Prompt(weather=weather)
    seen = [prompt.type("weather")]
    for _ in range(5):
        with contextlib.suppress(Exception):
            weather.call(fail)
        seen.append(prompt.type("weather"))
    clock.advance(18.5)
    seen.append(prompt.type("weather"))
    clock.advance(41.5)
    weather.call(lambda: seen.append(prompt.type("weather")))
    assert seen == [
        f"<CircuitBreaker 'weather': {situation}, reset_timeout 60 s>\n"
        for situation in [
            *(f"closed, {n} of 5 failures" for n in range(5)),
            "open, 5 of 5 failures, next trial in 60.0 s",
            "open, 5 of 5 failures, next trial in 41.5 s",
            "half-open, 5 of 5 failures, 0 of 1 successes, next trial in 60.0 s",
        ]
    ]


def test_completion_offers_what_an_operator_needs(weather):
    """Completion offers nothing private, and pressing Tab changes nothing."""
    weather.open()
    before = weather.snapshot()
    completer = rlcompleter.Completer({"weather": weather})
    offered = {
        match.partition(".")[2].rstrip("()")
        for match in completer.attr_matches("weather.")
    }
    assert offered >= {
        "close",
        "current_state",
        "fail_counter",
        "fail_max",
        "half_open",
        "open",
        "reset_timeout",
        "retry_after",
        "snapshot",
        "state",
        "success_threshold",
    }
    assert not [name for name in offered if name.startswith("_")]
    assert weather.snapshot() == before


def test_help_explains_all_that_completion_offers(weather):
    """help() has words of its own for each name."""
    text = pydoc.render_doc(weather, renderer=pydoc.plaintext)
    for name in dir(weather):
        if not name.startswith("_"):
            assert re.search(rf"^ \|  (async )?{name}\b", text, re.MULTILINE), name
            assert getattr(CircuitBreaker, name).__doc__, name


# Steering


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("fail_counter", 3),
        ("fail_max", 20),
        ("reset_timeout", 0.5),
        ("success_threshold", 2),
        ("window_size", 50),
        ("window_seconds", 0.5),
        ("max_reset_timeout", 600),
        ("dry_run", True),
    ],
)
def test_setting_is_read_set_and_read_again(weather, in_flight, setting, value):
    """Setting does not disturb calls that are on their way."""
    in_flight()
    prompt = Prompt(weather=weather)
    # The prompt shows nothing for None, which is a setting that is off.
    default = getattr(CircuitBreaker(), setting)
    shown = prompt.type(f"weather.{setting}")
    assert shown == ("" if default is None else f"{default}\n")
    assert prompt.type(f"weather.{setting} = {value}") == ""
    assert prompt.type(f"weather.{setting}") == f"{value}\n"


def test_breaker_that_is_tripping_is_held_closed_by_hand(weather, in_flight):
    """The limit is raised while the failures that would have tripped it are on
    their way."""
    weather.fail_counter = 3
    in_flight()
    prompt = Prompt(weather=weather)
    prompt.type("weather.fail_max = 20")
    in_flight.end()
    assert (
        prompt.type("weather.current_state, weather.fail_counter") == "('closed', 7)\n"
    )


def test_mistake_is_told_and_changes_nothing(weather):
    """The last line of the traceback, where the eye falls, has the error's text."""
    prompt = Prompt(weather=weather)
    before = weather.snapshot()
    shown = prompt.type("weather.fail_max = 0")
    assert shown.splitlines()[-1] == "ValueError: fail_max must be at least 1, not 0"
    shown = prompt.type("weather.state = 'shut'")
    assert shown.splitlines()[-1].startswith("ValueError: state must be 'closed'")
    assert weather.snapshot() == before


def test_circuit_is_held_open_for_a_maintenance_window_and_let_go(clock):
    """In the window not one call of eight threads gets through, however long the window
    lasts; afterwards a trial brings the circuit back."""
    weather = CircuitBreaker(name="weather")
    ran, done = threading.Semaphore(0), threading.Event()
    rejected = [threading.Semaphore(0) for _ in range(8)]  # for each thread
    ran_at_all = []

    def forecast():
        ran_at_all.append(None)
        ran.release()

    def load(rejected):
        while not done.wait(0.001):
            try:
                weather.call(forecast)
            except pybreaker.CircuitBreakerError:
                rejected.release()

    def wait_for_rejections():
        for each in rejected * 50:
            assert each.acquire(timeout=PATIENCE)

    threads = [
        threading.Thread(target=load, args=[each], daemon=True) for each in rejected
    ]
    prompt = Prompt(weather=weather, math=math)
    for thread in threads:
        thread.start()
    try:
        assert ran.acquire(timeout=PATIENCE)
        prompt.type("weather.reset_timeout = math.inf")
        assert prompt.type("weather.open()") == "True\n"
        wait_for_rejections()  # what was on its way in any thread has ended
        before = len(ran_at_all)
        clock.advance(10**9)
        wait_for_rejections()
        assert prompt.type("weather.current_state") == "'open'\n"
        assert len(ran_at_all) == before

        while ran.acquire(blocking=False):
            pass
        prompt.type("weather.reset_timeout = 60")
        prompt.type("weather.half_open()")
        for _ in range(50):
            assert ran.acquire(timeout=PATIENCE)
        assert prompt.type("weather.current_state") == "'closed'\n"
    finally:
        done.set()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive(), "a thread hangs"
