"""Tests of pybreaker_extras.console, which drive the console over HTTP, as an operator,
a script and an attacker."""

from __future__ import annotations

import base64
import contextlib
import gc
import hashlib
import html.parser
import http.client
import io
import itertools
import json
import logging
import math
import os
import re
import select
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
import weakref
import wsgiref.handlers
from functools import partial
from pathlib import Path
from urllib.parse import quote, urlencode, urlsplit

import pytest
from readme_support import blocks_of, run
from support import PATIENCE, until

import pybreaker
from pybreaker import CircuitBreaker
from pybreaker_extras import console as module
from pybreaker_extras.console import Console

ROOT = Path(__file__).resolve().parents[2]


class Answer:
    def __init__(self, response, text):
        self.status = response.status
        self.headers = response.headers
        self.text = text

    def json(self):
        assert self.headers["Content-Type"] == "application/json; charset=utf-8"
        return json.loads(self.text)


class Client:
    """A client that asks the console over HTTP, with one connection for each
    request."""

    def __init__(self, port, root="", console=None):
        self.port = port
        self.root = root
        self.console = console

    def ask(self, method, path, body=None, headers=()):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, PATIENCE)
        with contextlib.closing(connection):
            connection.request(method, path, body, dict(headers))
            response = connection.getresponse()
            return Answer(response, response.read().decode())

    def get(self, path):
        return self.ask("GET", path)

    def is_answered(self):
        """Whether the console answers. On a busy machine the server may cut this client
        off before the request has arrived."""
        try:
            return self.get("/breakers").status == 200
        except (OSError, http.client.HTTPException):
            return False

    def post(self, path, body=None, headers=()):
        return self.ask("POST", path, body, headers)

    def patch(self, path, values, headers=()):
        return self.ask("PATCH", path, json.dumps(values), headers)

    def send(self, raw, half_close=True):
        """Send the bytes `raw` and return the bytes of the answer."""
        with socket.create_connection(("127.0.0.1", self.port), PATIENCE) as link:
            link.sendall(raw)
            if half_close:
                link.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: link.recv(65536), b"")).decode()

    # What an operator does in a browser.

    def page(self, query=""):
        return Page(self.get(f"{self.root}/{query}"))

    def row(self, name):
        """What the page shows of the breaker `name`."""
        return self.page().row(name)

    def press(self, page, name, button, headers=(), **typed):
        """Type into the fields of a row, press a button of the row, and return the page
        that the browser then shows. A redirect is followed."""
        row = page.row(name)
        fields = {f"{row.ident}.{field}": text for field, text in typed.items()}
        return self.submit(page, row.buttons[button], headers, **fields)

    def confirm(self, page, name, button, **typed):
        """Press a button and answer its question with yes."""
        page = self.press(page, name, button, **typed)
        (yes,) = (each for each in page.row(name).buttons if each.startswith("Yes, "))
        return self.press(page, name, yes)

    def submit(self, page, do, headers=(), **typed):
        """Send the form of the whole page, with the button `do`."""
        assert set(typed) <= set(page.fields)
        answer = self.ask(
            "POST",
            page.action,
            urlencode({**page.fields, **typed, "do": do}),
            {
                "Content-Type": "application/x-www-form-urlencoded",
                "Origin": f"http://127.0.0.1:{self.port}",
                "Sec-Fetch-Site": "same-origin",
                **dict(headers),
            },
        )
        if answer.status == 303:
            answer = self.get(answer.headers["Location"].partition("#")[0])
        return Page(answer)


class Row:
    """What the page shows of one breaker."""

    def __init__(self, attributes):
        self.ident = attributes["id"][len("b-") :]
        self.kind = attributes["class"].split()[0]
        self.is_unfolded = "open" in attributes
        self.name, self.headline, self.story = "", "", ""
        self.buttons = {}
        self.said = {}
        self.typed = {}


class Page(html.parser.HTMLParser):
    """A page, taken apart as a browser takes it apart."""

    EMPTY = ("meta", "input", "link", "br")

    def __init__(self, answer):
        super().__init__()
        assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
        self.status, self.headers, self.source = (
            answer.status,
            answer.headers,
            answer.text,
        )
        self.rows, self.tags, self.words, self.path = [], [], [], []
        self.fields, self.action, self.texts = {}, None, {}
        self.selected = None
        self.feed(answer.text)
        self.text = " ".join("".join(self.words).split())
        for row in self.rows:
            row.name = " ".join(row.name.split()) if row.name.strip() else row.name
            row.headline = " ".join(row.headline.split())
            row.story = " ".join(row.story.split())
            row.buttons = {
                " ".join(text.split()).partition(":")[0].rstrip(module.ELLIPSIS): do
                for do, text in row.buttons.items()
            }
            row.typed = {
                name.partition(".")[2]: text
                for name, text in self.fields.items()
                if name.partition(".")[0] == row.ident
            }

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        if tag not in self.EMPTY:
            self.path.append((tag, attributes))
        if tag == "form":
            self.action = attributes["action"]
        elif tag == "details":
            self.rows.append(Row(attributes))
        elif tag == "input":
            self.fields[attributes["name"]] = attributes["value"]
        elif tag == "select":
            self.selected = attributes["name"]
        elif tag == "option":
            text = attributes.get("value")
            if "selected" in attributes and text is not None:
                self.fields[self.selected] = text

    def handle_endtag(self, tag):
        while self.path and self.path.pop()[0] != tag:
            pass

    def handle_data(self, data):
        if not self.path or self.path[-1][0] in ("style", "script"):
            return
        self.words.append(data + " ")
        inside = [tag for tag, _ in self.path]
        ident = self.path[-1][1].get("id")
        if ident:
            self.texts[ident] = data
        if self.path[-1][0] == "option" and "selected" in self.path[-1][1]:
            self.fields.setdefault(self.selected, data)
        if "details" not in inside:
            return
        row = self.rows[-1]
        if "summary" in inside:
            row.headline += f"{data} "
            if self.path[-1][1].get("class") == "name":
                row.name += data
        elif any(attributes.get("class") == "story" for _, attributes in self.path):
            row.story += f"{data} "
        elif "button" in inside:
            (button,) = (a["value"] for tag, a in self.path if tag == "button")
            row.buttons[button] = row.buttons.get(button, "") + data
        elif inside[-1] in ("strong", "em"):
            # A screen reader reads the message with the field that names it.
            (field,) = (
                attributes["name"].partition(".")[2]
                for _, attributes in self.tags
                if ident in attributes.get("aria-describedby", "").split()
            )
            row.said[field] = data

    def row(self, name):
        (row,) = (row for row in self.rows if row.name == name)
        return row

    def heading(self):
        return self.texts["summary"]

    def news(self):
        return self.texts.get("news", "")


@pytest.fixture
def serve():
    """Serves an application on a free loopback port, and returns a client."""
    with contextlib.ExitStack() as stack:

        def serve(application, root="", console=None):
            server = module.serve(application, port=0)
            stack.callback(server.server_close)
            thread = threading.Thread(
                target=server.serve_forever, args=(0.01,), daemon=True
            )
            thread.start()
            stack.callback(thread.join, PATIENCE)
            stack.callback(server.shutdown)
            return Client(server.server_port, root, console or application)

        yield serve


@pytest.fixture
def weather(clock):
    return CircuitBreaker(name="weather")


@pytest.fixture
def payments(clock):
    return CircuitBreaker(fail_max=3, reset_timeout=30.5, name="payments")


@pytest.fixture
def client(serve, weather, payments):
    return serve(Console([weather, payments]))


def raiser(exc):
    """A function that raises `exc`."""

    def function():
        raise exc

    return function


def attempt(breaker, func):
    """Make a call whose error does not matter to the test."""
    with contextlib.suppress(Exception):
        breaker.call(func)


def settings(breaker):
    """All that a request could have changed of the breaker."""
    return {
        name: breaker.snapshot()[name]
        for name in (*module.SETTINGS, "success_counter", "state")
    }


@contextlib.contextmanager
def lock_held(breaker):
    """Another thread holds the breaker's lock, as a listener that hangs does."""
    has_it, done = threading.Event(), threading.Event()

    def hold():
        with breaker._lock:
            has_it.set()
            done.wait(PATIENCE)

    thread = threading.Thread(target=hold, daemon=True)
    thread.start()
    assert has_it.wait(PATIENCE)
    try:
        yield
    finally:
        done.set()
        thread.join(PATIENCE)


# The list of breakers, the worst first


def test_summary_is_in_the_heading_and_in_the_title(client, weather):
    """The heading and the title count the breakers by state, the worst state first."""
    assert client.page().heading() == "2 closed"
    weather.open()
    page = client.page()
    assert page.heading() == "1 open \N{MIDDLE DOT} 1 closed"
    (title,) = re.findall("<title>(.*?)</title>", page.source)
    assert title.startswith(f"{page.heading()} \N{EM DASH} ")


def test_worst_breaker_is_the_first_row(serve):
    """The rows are in the order open, held open, half-open, busy, closed; of closed
    breakers, the one with the most failures is first."""
    names = ["quiet", "failing", "busy", "half", "held", "opened"]
    breakers = {name: CircuitBreaker(name=name) for name in names}
    client = serve(Console(list(breakers.values())))
    breakers["failing"].fail_counter = 2
    breakers["half"].half_open()
    breakers["held"].open(seconds=60)
    breakers["opened"].open()
    with lock_held(breakers["busy"]):
        page = client.page()
    assert [row.name for row in page.rows] == [
        "opened", "held", "half", "busy", "failing", "quiet"
    ]  # fmt: skip
    assert page.heading() == ("2 open \xb7 1 half-open \xb7 1 busy \xb7 2 closed")


def test_each_breaker_has_one_row_with_buttons_and_its_settings_in_fields(client):
    """The row is folded, and its line shows the state and the failures."""
    page = client.page()
    assert page.status == 200
    assert [row.name for row in page.rows] == ["payments", "weather"]
    row = page.row("payments")
    assert not row.is_unfolded
    assert row.headline == "\N{WHITE CIRCLE} closed payments 0 of 3 failures"
    assert set(row.buttons) == {
        "Hold open",
        "Hold open until released",
        "Half-open, let one call try",
        "Close, let all calls through",
        "Save the settings",
    }
    assert {name: row.typed[name] for name in module.SETTINGS} == {
        "fail_max": "3",
        "window_size": "off",
        "window_seconds": "off",
        "reset_timeout": "30.5",
        "max_reset_timeout": "off",
        "success_threshold": "1",
        "dry_run": "off",
        "fail_counter": "0",
    }


@pytest.mark.parametrize(
    ("query", "names"),
    [
        ("?q=WEA", ["weather"]),
        ("?q=missing", []),
        ("?state=open", ["payments"]),
        ("?state=closed", ["weather"]),
        ("?state=open&q=wea", []),
        ("?q=&state=", ["payments", "weather"]),
    ],
)
def test_rows_are_filtered_by_name_and_state(client, payments, query, names):
    """The page, the part that the script fetches and the list for scripts show the same
    breakers."""
    payments.open()
    assert [row.name for row in client.page(query).rows] == names
    assert [row.name for row in Page(client.get(f"/live{query}")).rows] == names
    listed = client.get(f"/breakers{query}").json()
    assert sorted(each["name"] for each in listed) == names


def test_filter_button_keeps_what_was_typed(client, payments):
    """The row with a typed text stays in the list, whatever the operator searches
    for."""
    page = client.page()
    row = page.row("payments")
    page = client.submit(page, "filter", q="wea", **{f"{row.ident}.fail_max": "7"})
    assert [each.name for each in page.rows] == ["payments", "weather"]
    assert page.row("payments").typed["fail_max"] == "7"
    page = client.submit(page, "filter", q="wea", **{f"{row.ident}.fail_max": "3"})
    assert [each.name for each in page.rows] == ["weather"]
    assert page.fields["q"] == "wea"


def test_unknown_state_in_the_query_is_refused(client):
    """The refusal names the states that exist."""
    answer = client.get("/?state=ajar")
    assert (answer.status, "half-open" in answer.text) == (422, True)


def test_page_of_very_many_breakers_says_how_to_find_the_others(serve, monkeypatch):
    """The page shows the worst breakers and counts all breakers."""
    monkeypatch.setattr(module, "ROWS", 3)
    breakers = [CircuitBreaker(name=f"b{number}") for number in range(5)]
    client = serve(Console(breakers))
    breakers[4].open()
    page = client.page()
    assert [row.name for row in page.rows] == ["b4", "b0", "b1"]
    assert page.heading() == "1 open \xb7 4 closed"
    assert "3 of 5 breakers are shown; narrow the search" in page.text


def test_rows_in_use_have_room_on_a_page_of_very_many_breakers(serve, monkeypatch):
    """Rows with a typed text or a question stay on the page when worse rows come or the
    operator searches for another name."""
    monkeypatch.setattr(module, "ROWS", 3)
    breakers = [CircuitBreaker(name=f"b{number}") for number in range(6)]
    client = serve(Console(breakers))
    page = client.page("?q=b5")
    ident = page.row("b5").ident
    page = client.submit(page, "filter", q="", **{f"{ident}.minutes": "45"})
    assert [row.name for row in page.rows] == ["b0", "b1", "b5"]
    assert page.row("b5").typed["minutes"] == "45"
    for breaker in breakers[1:5]:
        breaker.open()
    page = client.press(page, "b0", "Half-open, let one call try")
    assert [row.name for row in page.rows] == ["b1", "b0", "b5"]
    assert "Half-open b0, which is closed?" in page.text
    assert page.row("b5").typed["minutes"] == "45"


@pytest.mark.parametrize("state", ["closed", "open", "half-open"])
def test_state_is_told_by_word_and_mark_and_color(client, weather, state):
    """Each state has a word, a mark and a color that no other state has."""
    weather.state = state
    row = client.row("weather")
    mark, word = row.headline.split()[:2]
    assert word.lower() == state == row.kind
    assert (
        mark == dict(zip(["closed", "open", "half-open"], "\u25cb\u25a0\u25d0"))[state]
    )
    assert f".{state} .badge {{" in module.STYLE


def test_page_says_which_process_it_shows_and_as_of_when(serve, weather):
    """The page names the service, the host, the process and the time."""
    page = serve(Console([weather], service="shop <1>")).page()
    text = f"shop <1> on {socket.gethostname()}, process {os.getpid()}, running since"
    assert text in page.text
    assert re.fullmatch(r"\d\d:\d\d:\d\d UTC", page.texts["as-of"])
    assert "As of" in page.row("weather").story


def test_console_shows_all_breakers_of_the_process_unless_it_is_given_some(serve):
    """A console without `breakers` shows also breakers that are made later, and keeps
    no breaker alive."""
    client = serve(Console())
    breaker = CircuitBreaker(name="all of them: one")
    names = [each["name"] for each in client.get("/breakers").json()]
    assert "all of them: one" in names
    assert client.row("all of them: one")
    alive = weakref.ref(breaker)
    del breaker
    # A thread of the console may still hold a reference to the breaker.
    until(lambda: gc.collect() is not None and alive() is None)
    names = [each["name"] for each in client.get("/breakers").json()]
    assert "all of them: one" not in names


def test_scratch_breaker_is_not_shown(serve):
    """No page shows the scratch breakers that the console makes for a moment."""
    scratch = module._ScratchBreaker(name="scratch")
    names = [each["name"] for each in serve(Console()).get("/breakers").json()]
    assert scratch.name not in names


def test_breaker_that_no_page_has_shown_yet_has_its_story_too(serve):
    """The console listens to a breaker before a client asks for the first page."""
    console = Console()
    breaker = CircuitBreaker(name="unseen", fail_max=1)
    console.listen()
    attempt(breaker, raiser(OSError("first")))
    breaker.half_open()
    attempt(breaker, raiser(OSError("second")))
    story = serve(console).row("unseen").story
    assert "OSError('first')" in story
    assert "OSError('second')" in story


def test_new_breakers_are_found_without_a_request(monkeypatch):
    """A thread of the console finds new breakers."""
    monkeypatch.setattr(module, "SEARCH_INTERVAL", 0.01)
    found = threading.Event()

    class Told(CircuitBreaker):
        def add_listener(self, listener):
            super().add_listener(listener)
            found.set()

    console = Console()
    breaker = Told(name="late")
    assert found.wait(PATIENCE)
    assert breaker.listeners
    del console


def test_console_ends_with_its_last_reference():
    """The thread of the console does not keep the console alive."""
    console = Console()
    alive = weakref.ref(console)
    del console
    until(lambda: gc.collect() is not None and alive() is None)


def test_iterable_that_a_console_was_given_is_read_anew(serve, weather, payments):
    """The console shows new items of a list, and reads an iterator once."""
    breakers = [weather]
    client = serve(Console(breakers))
    breakers.append(payments)
    assert len(client.get("/breakers").json()) == 2
    client = serve(Console(iter(breakers)))
    assert len(client.get("/breakers").json()) == 2
    hosts = pybreaker.CircuitBreakers(fail_max=3)
    client = serve(Console(hosts))
    assert hosts["a.example"].name == client.get("/breakers").json()[0]["name"]


def test_console_keeps_no_mapping_of_breakers_from_making_room(serve):
    """`CircuitBreakers` drops a breaker that the console has shown as any other
    breaker."""
    hosts = pybreaker.CircuitBreakers(maxsize=2)
    client = serve(Console(hosts))
    for number in range(10):
        hosts[number].call(int)
        client.get("/breakers")
        # A console that another test has left may listen to the breaker, too.
        own = client.console.watches().values()
        assert [each in own for each in hosts[number].listeners].count(True) == 1
    assert len(hosts) == 2
    gc.collect()
    assert len(client.get("/breakers").json()) == 2


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"breakers": 5}, "breakers"),
        ({"breakers": ["weather"]}, "breakers"),
        ({"breakers": CircuitBreaker()}, "breakers"),
        ({"hosts": "www.example.com"}, "hosts"),
        ({"hosts": [b"x"]}, "hosts"),
        ({"service": 5}, "service"),
        ({"read_only": "yes"}, "read_only"),
        ({"authorize": "yes"}, "authorize"),
        ({"trusted_proxies": "10.0.0.1"}, "trusted_proxies"),
        ({"redact": "yes"}, "redact"),
    ],
)
def test_argument_of_the_wrong_kind_is_refused_at_once(arguments, named):
    """The error names the parameter."""
    with pytest.raises(TypeError, match=f"^{named} must be "):
        Console(**arguments)


def test_coroutine_function_is_no_authorization():
    """The console refuses a coroutine function at once, because a coroutine is always
    true."""

    async def authorize(environ):
        return False

    class Authority:
        async def __call__(self, environ):
            return False

    for each in (authorize, Authority()):
        with pytest.raises(TypeError, match="authorize must be a plain function"):
            Console(authorize=each)


# An outage as one story


def test_outage_is_one_story_however_long_it_lasts(client, weather, clock):
    """The story tells when the outage began, the first error, the number of failed
    trials, and the time and error of the last trial."""
    for _ in range(5):
        attempt(weather, raiser(ConnectionError("refused")))
    for number in range(50):
        clock.advance(60)
        attempt(weather, raiser(TimeoutError(f"too late, {number}")))
    clock.advance(15)
    row = client.row("weather")
    assert "OPEN: calls are refused; the next trial in 45 s." in row.story
    since = weather.snapshot()["opened_at"][11:19]
    assert "Since " in row.story
    assert (
        "It began with: 5 failures in a row; the last: ConnectionError('refused')"
        in (row.story)
    )
    assert "50 trials have failed since; the first one at " in row.story
    assert f"the last one at {since} UTC" in row.story
    assert "TimeoutError('too late, 49')" in row.story
    assert "too late, 48" not in row.story
    assert "50 trials have failed" in row.headline
    outage = client.get("/breakers/weather").json()["outage"]
    assert outage["failed_trials"] == 50
    assert outage["reason"].endswith("ConnectionError('refused')")


def test_outage_that_is_over_is_told_until_there_are_newer_ones(client, weather, clock):
    """The story tells how long the past outage lasted and how the outage ended."""
    weather.open(reason="first")
    clock.advance(60)
    weather.call(int)
    story = client.row("weather").story
    assert "CLOSED: all calls go through." in story
    assert "The last outage lasted " in story
    assert "It began with: first." in story
    assert re.search("It ended at .* UTC: the trial succeeded.", story)
    for number in range(module.OUTAGES + 2):
        weather.open(reason=f"outage {number}")
        weather.close()
    picture = client.get("/breakers/weather").json()
    assert len(picture["outages"]) == module.OUTAGES
    assert picture["outage"] is None
    assert "Before that:" in client.row("weather").story


def test_moves_by_hand_are_part_of_the_story(client, weather):
    """The story lists the last moves by hand and counts the earlier moves."""
    weather.open(reason="it smokes")
    for number in range(module.HAND_MOVES + 3):
        weather.half_open(reason=f"try {number}")
    story = client.row("weather").story
    assert "It began with: it smokes." in story
    assert "3 earlier moves by hand are not listed." in story
    assert "half-open, try 12." in story
    assert "try 2." not in story


def test_outage_that_began_before_the_console_is_told_from_the_breaker(serve, weather):
    """The breaker still knows when and why the circuit opened."""
    for _ in range(5):
        attempt(weather, raiser(OSError("before")))
    story = serve(Console([weather])).row("weather").story
    since = weather.snapshot()["opened_at"][11:19]
    assert f"Since {since} UTC" in story
    assert "OSError('before')" in story


def test_opening_that_only_the_storage_knows_of_is_told_once(serve, weather):
    """The console finds the opening in the storage before the breaker notices and tells
    of a transition."""
    client = serve(Console([weather]))
    weather._state_storage.state = "open"
    assert client.row("weather").kind == "open"
    assert weather.state.name == "open"
    outage = client.get("/breakers/weather").json()["outage"]
    assert (outage["reason"], outage["moves"]) == ("found so in the storage", [])


def test_transitions_are_told_with_their_reasons(client, weather, clock):
    """The list of transitions has an outage of the service and the moves of two
    operators."""
    refused = ConnectionError("refused")
    for _ in range(5):
        attempt(weather, raiser(refused))
    clock.advance(60)
    attempt(weather, raiser(TimeoutError("too late")))
    clock.advance(60)
    weather.call(int)
    client.post("/breakers/weather/half_open")
    weather.close()  # by the program or at a Python prompt
    assert [
        (t["from"], t["to"], t["reason"])
        for t in reversed(client.get("/breakers/weather").json()["transitions"])
    ] == [
        ("closed", "open", "5 failures in a row; the last: ConnectionError('refused')"),
        ("open", "half-open", "the timeout has passed"),
        ("half-open", "open", "the trial failed: TimeoutError('too late')"),
        ("open", "half-open", "the timeout has passed"),
        ("half-open", "closed", "the trial succeeded"),
        ("closed", "half-open", "by hand, from 127.0.0.1"),
        ("half-open", "closed", "by hand"),
    ]


def test_transition_by_a_call_does_not_get_the_operators_reason(client, weather):
    """A transition that a call makes in the thread of the request does not have the
    operator's reason."""

    class Caller:
        """A listener that calls as soon as the operator's request has half-opened the
        circuit."""

        def state_change(self, cb, old_state, new_state):
            if new_state.name == "half-open":
                with cb.calling():
                    pass

    weather.add_listener(Caller())
    client.post("/breakers/weather/half_open")
    transitions = client.get("/breakers/weather").json()["transitions"]
    reasons = [transition["reason"] for transition in transitions]
    assert reasons[:2] == ["the trial succeeded", "by hand, from 127.0.0.1"]


def test_calls_take_no_lock_because_of_the_console(weather, monkeypatch):
    """The console listens to transitions alone."""
    Console([weather])
    assert weather.listeners
    monkeypatch.setattr(weather, "_lock", None)
    assert weather.call(int) == 0


@pytest.mark.parametrize(
    ("seconds", "told"),
    [
        (0, "0 s"),
        (0.2, "1 s"),
        (59, "59 s"),
        (60, "1 min"),
        (61, "1 min 1 s"),
        (3599.5, "1 h"),
        (7500, "2 h 5 min"),
        (86400 * 3 + 7200, "3 d 2 h"),
    ],
)
def test_length_is_told_in_units_that_a_person_uses(seconds, told):
    """A length of time has two units at most."""
    assert module.human(seconds) == told


def test_failures_are_told_with_how_many_open_the_circuit(client, weather):
    """The page says "3 of 5 failures", and "3 of ∞ failures" if no number of failures
    opens the circuit."""
    weather.fail_counter = 3
    assert "3 of 5 failures" in client.row("weather").headline
    weather.fail_max = math.inf
    assert "3 of \N{INFINITY} failures" in client.row("weather").story


def test_half_open_in_a_dry_run_is_told_as_refusing_nothing(client, weather):
    weather.dry_run = True
    weather.half_open()
    told = (
        "HALF-OPEN: one call at a time is the trial, and all calls go through; 0 of 1"
    )
    assert told in client.row("weather").story


def test_half_open_is_told_with_the_successes_that_it_needs(client, weather):
    """The page shows also that a trial is running."""
    weather.success_threshold = 3
    weather.half_open()
    weather.call(int)
    row = client.row("weather")
    assert (
        "HALF-OPEN: one call at a time is let through as a trial; 1 of 3" in row.story
    )
    assert "A trial is running" not in row.story
    seen = weather.call(lambda: client.row("weather").story)
    assert "A trial is running; it has 1 min left." in seen


def test_next_trial_is_told_in_words(client, weather, clock):
    """The page says when the next trial is, that the next call is the trial, or that
    only an operator ends the opening."""
    weather.open()
    clock.advance(18.5)
    assert "the next trial in 42 s." in client.row("weather").story
    clock.advance(41.5)
    assert "OPEN: the next call is the trial." in client.row("weather").story
    weather.reset_timeout = math.inf
    assert "the next trial only by hand." in client.row("weather").story


def test_page_says_that_a_breaker_is_in_a_dry_run(client, weather):
    """A dry run rejects no call, so the page does not say that calls are refused."""
    weather.dry_run = True
    page = client.press(client.page(), "weather", "Half-open, let one call try")
    told = "which is closed? Meanwhile all its calls go through, as it is a dry run."
    assert told in page.text
    weather.open()
    row = client.row("weather")
    assert row.headline.startswith(
        "\N{BLACK SQUARE} OPEN (dry run) weather nothing is ref"
    )
    assert "but this is a dry run: all calls go through" in row.story
    page = client.press(client.page(), "weather", "Hold open")
    assert "Meanwhile all its calls go through, as it is a dry run." in page.text
    page = client.press(page, "weather", "Yes, hold weather open")
    assert page.news().endswith(": all its calls go through, as it is a dry run.")


# Hold


def test_circuit_is_held_open_for_as_long_as_was_typed(client, weather, payments):
    """The button asks a question, and yes holds this circuit open and no other
    circuit."""
    page = client.press(
        client.page(), "weather", "Hold open", minutes="45", why="new disks"
    )
    assert page.status == 200
    assert weather.current_state == "closed"
    assert "Hold weather open for 45 min, until " in page.text
    page = client.press(page, "weather", "Yes, hold weather open")
    assert page.news().startswith("weather is held open for 45 min, until ")
    assert weather.snapshot()["retry_after"] == pytest.approx(45 * 60)
    assert weather.state.reason == "by hand, from 127.0.0.1: new disks"
    row = page.row("weather")
    assert row.is_unfolded
    assert "HELD OPEN for another 45 min: calls are refused." in row.story
    assert "by hand, from 127.0.0.1: new disks" in row.story
    assert (row.typed["minutes"], row.typed["why"]) == ("30", "")
    assert payments.current_state == "closed"


def test_circuit_is_held_open_until_it_is_released(client, weather):
    """The operator releases the circuit half-open without a question, or closed after a
    question."""
    page = client.confirm(client.page(), "weather", "Hold open until released")
    assert weather.retry_after == math.inf
    assert (
        "HELD OPEN until it is released: calls are refused."
        in page.row("weather").story
    )
    page = client.press(page, "weather", "Release half-open, let one call try")
    assert weather.current_state == "half-open"
    page = client.confirm(page, "weather", "Hold open until released")
    page = client.confirm(page, "weather", "Release closed, let all calls through")
    assert weather.current_state == "closed"
    assert page.news() == "weather is closed: all its calls go through."


def test_circuit_whose_hold_has_ended_is_not_shown_as_held(client, weather, clock):
    """The next call is the trial, so the page does not say that the circuit is held
    open."""
    weather.open(seconds=60)
    assert client.get("/breakers/weather").json()["held"]
    clock.advance(60)
    row = client.row("weather")
    assert "HELD" not in row.headline
    assert "OPEN: the next call is the trial." in row.story
    assert "Half-open, let one call try" in row.buttons
    assert not client.get("/breakers/weather").json()["held"]


@pytest.mark.parametrize(
    ("button", "wait"), [("Hold open", 45 * 60), ("Hold open until released", math.inf)]
)
def test_minutes_that_were_typed_beside_the_question_are_kept(
    client, weather, button, wait
):
    """The answer to the question does not use minutes that were typed after the
    question."""
    page = client.press(client.page(), "weather", button, minutes="45")
    page = client.press(page, "weather", "Yes, hold weather open", minutes="90")
    assert weather.retry_after == pytest.approx(wait)
    row = page.row("weather")
    assert (row.typed["minutes"], row.is_unfolded) == ("90", True)


def test_answering_no_leaves_the_circuit_as_it_is(client, weather):
    """After a no the question is gone, the circuit has not moved, and the page keeps
    what was typed."""
    page = client.press(client.page(), "weather", "Hold open")
    page = client.press(page, "weather", "No, leave weather as it is")
    assert page.row("weather").is_unfolded
    page = client.press(page, "weather", "Hold open", minutes="5", why="?")
    page = client.press(page, "weather", "No, leave weather as it is")
    assert weather.current_state == "closed"
    row = page.row("weather")
    assert (row.typed["minutes"], row.typed["why"]) == ("5", "?")
    assert not [each for each in row.buttons if each.startswith("Yes")]


@pytest.mark.parametrize("minutes", ["", "0", "-1", "soon", "inf", "nan", "1e99"])
def test_hold_of_no_length_is_refused_at_its_field(client, weather, minutes):
    """The page shows an error at the field and no question, and the circuit does not
    move."""
    page = client.press(client.page(), "weather", "Hold open", minutes=minutes)
    row = page.row("weather")
    assert page.status == 422
    assert "minutes must be a number above 0" in row.said["minutes"]
    assert row.typed["minutes"] == minutes
    assert weather.current_state == "closed"


@pytest.mark.parametrize(
    ("start", "button", "end", "asks"),
    [
        ("closed", "Half-open, let one call try", "half-open", True),
        ("open", "Half-open, let one call try", "half-open", False),
        ("open", "Close, let all calls through", "closed", True),
        ("half-open", "Close, let all calls through", "closed", True),
        ("closed", "Close, let all calls through", "closed", False),
    ],
)
def test_button_moves_the_circuit_and_asks_where_the_move_may_do_harm(
    client, weather, payments, start, button, end, asks
):
    """The button moves this circuit and no other circuit, and the page says what was
    done."""
    weather.state = start
    weather.fail_counter = 1
    page = client.press(client.page(), "weather", button)
    if asks:
        assert weather.current_state == start
        assert not page.news()
        (yes,) = (each for each in page.row("weather").buttons if "Yes" in each)
        page = client.press(page, "weather", yes)
    assert weather.current_state == end
    assert page.news().startswith(f"weather is {end}: ")
    assert payments.current_state == "closed"


def test_page_that_is_sent_twice_changes_the_breaker_once(client, weather):
    """When the browser sends the page again, as on a reload, the console says that the
    change was done already."""
    weather.open()
    page = client.page()
    client.press(page, "weather", "Half-open, let one call try")
    weather.close()
    again = client.press(page, "weather", "Half-open, let one call try")
    assert again.news().startswith("This was done already: weather is half-open")
    assert weather.current_state == "closed"


def test_answer_to_a_change_is_not_itself_a_change(client, weather):
    """The answer is a redirect to a page that the browser may load again."""
    weather.open()
    page = client.page()
    row = page.row("weather")
    body = urlencode({**page.fields, "do": f"half-open.{row.ident}"})
    answer = client.post("/", body, {"Origin": f"http://127.0.0.1:{client.port}"})
    assert answer.status == 303
    assert answer.headers["Location"].endswith(f"#b-{row.ident}")


def test_subclass_whose_moves_take_no_arguments_is_moved_without_a_reason(serve):
    """A subclass of the breaker overrides a move with a method that has no
    parameters."""

    class Older(CircuitBreaker):
        def open(self):
            return super().open()

    breaker = Older(name="older")
    client = serve(Console([breaker]))
    assert client.post("/breakers/older/open", '{"reason": "x"}').status == 200
    assert breaker.current_state == "open"
    breaker.close()
    answer = client.post("/breakers/older/open", '{"seconds": 5}')
    assert (answer.status, "takes no seconds" in answer.text) == (422, True)
    assert breaker.current_state == "closed"


# Settings


def test_settings_are_changed(client, weather):
    """All settings with a typed text are changed, and the page tells the old and the
    new values."""
    page = client.press(
        client.page(),
        "weather",
        "Save the settings",
        fail_counter="2",
        fail_max=" 20 ",
        reset_timeout="0.5",
        max_reset_timeout="inf",
        dry_run="on",
    )
    assert page.status == 200
    assert (weather.fail_counter, weather.fail_max, weather.reset_timeout) == (
        2,
        20,
        0.5,
    )
    assert (weather.max_reset_timeout, weather.dry_run) == (math.inf, True)
    assert page.news() == (
        "weather: fail_max = 20 (was 5), reset_timeout = 0.5 (was 60), "
        "max_reset_timeout = inf (was off), dry_run = on (was off), "
        "fail_counter = 2 (was 0)."
    )
    assert page.row("weather").typed["reset_timeout"] == "0.5"
    assert page.row("weather").said == {}
    assert "fail_max = 20 was set by 127.0.0.1 at " in page.row("weather").story


def test_setting_is_switched_off_by_the_word_off_or_an_empty_field(client, weather):
    """The word "off" or an empty field switches off a setting that the library can
    switch off."""
    weather.window_size, weather.window_seconds = 10, 60
    client.press(
        client.page(),
        "weather",
        "Save the settings",
        window_size="off",
        window_seconds="",
    )
    assert (weather.window_size, weather.window_seconds) == (None, None)


def test_field_that_was_left_alone_is_not_set(client, weather):
    """The field may show an old value, because calls have changed fail_counter
    meanwhile."""
    page = client.page()
    weather.fail_counter = 4
    client.press(page, "weather", "Save the settings", fail_max="20")
    assert (weather.fail_counter, weather.fail_max) == (4, 20)


BEFORE_AND_AFTER = [
    ({"fail_max": 10, "window_size": 10}, {"fail_max": 20, "window_size": 30}),
    ({"fail_max": 20, "window_size": 30}, {"fail_max": 10, "window_size": 10}),
    ({"fail_max": 3}, {"fail_max": 3, "window_size": math.inf}),
    ({"fail_max": math.inf}, {"fail_max": 5, "window_size": math.inf}),
    (
        {"fail_max": math.inf},
        {"fail_max": math.inf, "window_size": math.inf, "window_seconds": 9},
    ),
    (
        {"fail_max": math.inf, "window_size": math.inf, "window_seconds": 9},
        {"fail_max": 5, "window_size": 5, "window_seconds": None},
    ),
    (
        {"reset_timeout": 10, "max_reset_timeout": 10},
        {"reset_timeout": 60, "max_reset_timeout": 90},
    ),
    (
        {"reset_timeout": 60, "max_reset_timeout": 90},
        {"reset_timeout": 5, "max_reset_timeout": 6},
    ),
]


@pytest.mark.parametrize(("before", "after"), BEFORE_AND_AFTER)
@pytest.mark.parametrize("order", [1, -1])
def test_pair_of_settings_is_changed_whatever_the_order(serve, before, after, order):
    """Settings that limit each other are set from a form and from a script."""
    breaker = CircuitBreaker(name="b", **before)
    client = serve(Console([breaker]))
    values = {
        name: ("inf" if name in module.MAY_BE_OFF else None)
        if value == math.inf
        else value
        for name, value in list(after.items())[::order]
    }
    assert client.patch("/breakers/b", values).status == 200
    assert {name: getattr(breaker, name) for name in after} == after
    breaker = CircuitBreaker(name="c", **before)
    client = serve(Console([breaker]))
    typed = {name: module._setting_text(name, value) for name, value in after.items()}
    client.press(client.page(), "c", "Save the settings", **typed)
    assert {name: getattr(breaker, name) for name in after} == after


@pytest.mark.parametrize(
    ("values", "refused"),
    [
        ({"fail_max": 20, "window_size": 10}, ["fail_max", "window_size"]),
        ({"window_size": 3}, ["window_size"]),
        ({"fail_max": None, "window_size": "inf"}, ["fail_max", "window_size"]),
        (
            {"reset_timeout": 9, "max_reset_timeout": 5},
            ["reset_timeout", "max_reset_timeout"],
        ),
        ({"max_reset_timeout": 59}, ["max_reset_timeout"]),
        ({"window_size": 10, "fail_counter": 6}, ["fail_counter"]),
    ],
)
def test_pair_of_settings_that_do_not_fit_is_refused_as_a_whole(
    client, weather, values, refused
):
    """Each setting of the pair that the request changes has an error."""
    before = settings(weather)
    answer = client.patch("/breakers/weather", {"success_threshold": 2, **values})
    assert answer.status == 422
    assert sorted(answer.json()["errors"]) == sorted(refused)
    assert settings(weather) == before


def test_setting_that_only_the_breaker_refuses_undoes_the_others(serve):
    """A storage of the user's own refuses a window, so the other settings are set
    back."""
    breaker = CircuitBreaker(name="shared", state_storage=CountingStorage())
    client = serve(Console([breaker]))
    before = settings(breaker)
    answer = client.patch(
        "/breakers/shared",
        {"fail_max": 4, "reset_timeout": 1, "window_size": 9, "success_threshold": 2},
    )
    assert answer.status == 422
    assert "CircuitMemoryStorage" in answer.json()["errors"]["window_size"]
    assert settings(breaker) == before


def test_fail_counter_is_limited_by_the_new_fail_max(client, weather):
    """A window limits fail_counter to fail_max, so fail_max is set first."""
    weather.window_size = 100
    answer = client.patch("/breakers/weather", {"fail_counter": 15, "fail_max": 20})
    assert answer.status == 200
    assert (weather.fail_counter, weather.fail_max) == (15, 20)


@pytest.mark.parametrize(
    ("field", "typed", "parsed"),
    [
        ("fail_max", "0", 0),
        ("fail_max", "seven", "seven"),
        ("fail_max", "2.5", 2.5),
        ("fail_max", "", ""),
        ("fail_max", "-inf", -math.inf),
        ("fail_counter", "-1", -1),
        ("fail_counter", "inf", math.inf),
        ("fail_max", "1e999", "1e999"),
        ("fail_max", "9" * 4400, "9" * 4400),
        ("reset_timeout", "nan", math.nan),
        ("reset_timeout", "-0.1", -0.1),
        ("reset_timeout", '5 "<i>min', '5 "<i>min'),
        ("reset_timeout", "1" + "0" * 400, 10**400),
        ("window_seconds", "0", 0),
        ("success_threshold", "inf", math.inf),
        ("dry_run", "perhaps", "perhaps"),
    ],
)
def test_refused_value_stays_in_its_field_with_the_librarys_words(
    client, weather, field, typed, parsed
):
    """No setting is changed."""
    before = settings(weather)
    page = client.press(client.page(), "weather", "Save the settings", **{field: typed})
    with pytest.raises((TypeError, ValueError)) as refusal:
        setattr(CircuitBreaker(), field, parsed)
    row = page.row("weather")
    assert page.status == 422
    assert row.said == {field: str(refusal.value)}
    if field != "dry_run":  # the operator chooses dry_run from a list
        assert row.typed[field] == typed
    assert page.row("payments").said == {}
    assert settings(weather) == before


def test_one_refused_value_keeps_the_others_from_being_set(client, weather):
    """Each refused value has its own error, and the page keeps the other typed
    texts."""
    before = settings(weather)
    typed = {"fail_counter": "x", "fail_max": "20", "reset_timeout": "-1"}
    page = client.press(client.page(), "weather", "Save the settings", **typed)
    row = page.row("weather")
    assert set(row.said) == {"fail_counter", "reset_timeout"}
    assert {name: row.typed[name] for name in typed} == typed
    assert settings(weather) == before
    assert "not saved yet; it is 5" in page.text


def test_value_that_was_refused_can_be_corrected(client, weather):
    """The operator corrects the value on the page that shows the error."""
    page = client.press(
        client.page(), "weather", "Save the settings", fail_max="x", fail_counter="1"
    )
    page = client.press(page, "weather", "Save the settings", fail_max="7")
    assert (weather.fail_max, weather.fail_counter) == (7, 1)
    assert page.row("weather").said == {}


def test_page_in_which_a_value_was_refused_shows_the_count_as_it_is(client, weather):
    """The field does not show the count of the first page, because saving would set
    that count."""
    page = client.page()
    weather.fail_counter = 4
    page = client.press(page, "weather", "Save the settings", fail_max="x")
    assert page.row("weather").typed["fail_counter"] == "4"
    client.press(page, "weather", "Save the settings", fail_max="7")
    assert (weather.fail_max, weather.fail_counter) == (7, 4)


def test_value_that_a_colleague_has_changed_meanwhile_is_not_overwritten(
    client, weather
):
    """A notice at the field tells the present value and who set the value; the operator
    presses the button again to overwrite the value."""
    page = client.page()
    client.patch("/breakers/weather", {"fail_max": 50})
    page = client.press(page, "weather", "Save the settings", fail_max="20")
    assert page.status == 409
    assert weather.fail_max == 50
    row = page.row("weather")
    assert row.said["fail_max"].startswith("meanwhile 50, set by 127.0.0.1 at ")
    assert row.typed["fail_max"] == "20"
    page = client.press(page, "weather", "Save the settings")
    assert weather.fail_max == 20
    assert "fail_max = 20 (was 50)" in page.news()


def test_notice_tells_that_the_program_has_changed_the_value_meanwhile(client, weather):
    """The notice does not name the operator who set the setting earlier."""
    client.patch("/breakers/weather", {"fail_max": 50})
    page = client.page()
    weather.fail_max = 60
    page = client.press(page, "weather", "Save the settings", fail_max="20")
    said = page.row("weather").said["fail_max"]
    assert said.startswith("meanwhile 60, set by the program")


def test_typed_text_outlives_every_other_button(client, weather, payments):
    """A typed text outlives another button of its row, a button of another row, a
    question, an answer and an error."""
    page = client.page()
    ident = page.row("payments").ident
    mine = {f"{ident}.fail_max": "9", f"{ident}.why": "later"}
    weather.open()
    for do, typed in (
        ("reload", {}),
        ("filter", {"q": "nothing like it"}),
        (f"half-open.{page.row('weather').ident}", {}),
        (
            f"set.{page.row('weather').ident}",
            {f"{page.row('weather').ident}.fail_max": "8"},
        ),
        (f"hold.{ident}", {f"{ident}.minutes": "x"}),
        (f"hold.{ident}", {f"{ident}.minutes": "5"}),
        (f"hold-on.{ident}", {}),
    ):
        page = client.submit(page, do, **mine, **typed)
        mine = {}
        row = page.row("payments")
        assert (row.typed["fail_max"], row.typed["why"]) == ("9", "later")
        assert row.is_unfolded
        page.fields["q"] = ""
    assert (weather.current_state, weather.fail_max) == ("half-open", 8)
    page = client.press(page, "payments", "Yes, hold payments open")
    assert page.row("payments").typed["fail_max"] == "9"
    assert payments.fail_max == 3
    assert payments.state.reason.endswith(": later")


def test_enter_saves_the_settings_of_the_one_row_that_was_typed_into(client, weather):
    """With typed texts in several rows the page asks for a button, and in the search
    field the Enter key searches."""
    page = client.page()
    one, two = page.row("weather").ident, page.row("payments").ident
    again = client.submit(
        page, "enter", **{f"{one}.fail_max": "7", f"{two}.fail_max": "7"}
    )
    assert again.news().startswith("Nothing was done yet")
    assert weather.fail_max == 5
    found = client.submit(page, "enter", q="wea")
    assert [row.name for row in found.rows] == ["weather"]
    client.submit(page, "enter", **{f"{one}.fail_max": "7"})
    assert weather.fail_max == 7


# Identities


def test_form_names_the_breaker_whatever_it_is_called_now(serve):
    """A button changes the breaker whose row the operator saw, although another breaker
    has that name now."""
    first, second = CircuitBreaker(name="x"), CircuitBreaker(name="y")
    client = serve(Console([first, second]))
    page = client.page()
    first.name, second.name = "y", "x"
    client.press(page, "x", "Save the settings", fail_max="9")
    assert (first.fail_max, second.fail_max) == (9, 5)


def test_breaker_that_is_gone_is_not_another_one(serve):
    """The page says that the breaker is gone, and changes no breaker of the same
    name."""
    breakers = [CircuitBreaker(name="x")]
    client = serve(Console(breakers))
    page = client.page()
    breakers[0] = CircuitBreaker(name="x")
    page = client.press(page, "x", "Save the settings", fail_max="9")
    assert page.status == 404
    assert page.news() == (
        "Nothing was changed: that breaker is no longer there."
        " For 'x', which is no longer there, was typed: fail_max = 9."
    )
    assert breakers[0].fail_max == 5


@pytest.mark.parametrize(
    "button", ["Save the settings", "Close, let all calls through"]
)
def test_text_typed_for_a_breaker_that_is_gone_is_told_by_any_button(
    serve, weather, button
):
    """A button of another row does what the button says, and the page tells what was
    typed for the breaker that is gone."""
    breakers = [weather, CircuitBreaker(name="gone")]
    client = serve(Console(breakers))
    page = client.page()
    ident = page.row("gone").ident
    del breakers[1]
    page.fields[f"{ident}.why"] = "a long story"
    page = client.press(page, "weather", button, fail_max="9")
    assert page.status == 200
    assert page.news().endswith(
        " For 'gone', which is no longer there, was typed: why = a long story."
    )
    assert weather.fail_max == (9 if button == "Save the settings" else 5)


def test_page_of_another_process_changes_nothing_and_loses_nothing(serve, weather):
    """After a restart the fields of the new page have what the operator typed into the
    old page."""
    page = serve(Console([weather])).page()
    client = serve(Console([CircuitBreaker(name="other"), weather]))
    page = client.press(page, "weather", "Save the settings", fail_max="9", why="so")
    assert page.status == 409
    assert "made by another process" in page.news()
    row = page.row("weather")
    assert (row.typed["fail_max"], row.typed["why"]) == ("9", "so")
    assert weather.fail_max == 5
    client.press(page, "weather", "Save the settings")
    assert weather.fail_max == 9


@pytest.mark.parametrize("is_restarted", [True, False])
def test_page_with_many_breakers_is_accepted_when_they_are_gone(
    serve, weather, is_restarted
):
    """The form of the page is not too long when a program has dropped breakers or makes
    them one by one after a restart."""
    name = "a long name of a breaker " * 10
    many = [weather, *(CircuitBreaker(name=f"{name}{i}") for i in range(99))]
    client = serve(Console(many))
    page = client.page()
    del many[1:]
    if is_restarted:
        client = serve(Console(many))
    page = client.press(page, "weather", "Save the settings", fail_max="9")
    if is_restarted:
        assert (page.status, weather.fail_max) == (409, 5)
        assert page.row("weather").typed["fail_max"] == "9"
    else:
        assert (page.status, weather.fail_max) == (200, 9)


def test_page_of_another_process_tells_what_was_typed_for_a_breaker_that_is_gone(serve):
    """The new page tells every typed text that has no field any more."""
    page = serve(Console([CircuitBreaker(name="old")])).page()
    client = serve(Console([]))
    page = client.press(page, "old", "Save the settings", fail_max="9")
    assert page.news().endswith(
        " For 'old', which is no longer there, was typed: fail_max = 9."
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs forks")
def test_forked_process_is_another_process():
    """The child's pages have a token of their own, and the consoles of the child and of
    the parent find new breakers."""
    script = """
import os, sys, threading, time, warnings
import pybreaker
from pybreaker_extras.console import Console
warnings.simplefilter("error")  # such as about a fork with threads
console = Console()
before = console._token
reading, writing = os.pipe()
if os.fork() == 0:
    breaker = pybreaker.CircuitBreaker(name="of the child")
    deadline = time.monotonic() + 30
    while not breaker.listeners and time.monotonic() < deadline:
        time.sleep(0.01)
    os.write(writing, f"{console._token} {len(breaker.listeners)}".encode())
    os._exit(0)
os.wait()
token, listeners = os.read(reading, 100).decode().split()
assert listeners == "1"
assert token != before == console._token
assert threading.active_count() == 2
"""
    command = [sys.executable, "-c", script]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run(command, check=True, timeout=4 * PATIENCE, env=env)


# Busy breakers and old data


def test_busy_breaker_is_shown_as_busy_and_the_others_go_on(client, weather, payments):
    """The page shows when and how the console last saw the busy breaker."""
    weather.open()
    client.get("/breakers")
    with lock_held(weather):
        page = client.page()
        listed = {each["name"]: each for each in client.get("/breakers").json()}
        answer = client.patch("/breakers/payments", {"fail_max": 9})
        assert [row.name for row in client.page("?state=busy").rows] == ["weather"]
    row = page.row("weather")
    assert "BUSY" in row.headline
    assert "seen last as open at " in row.headline
    assert "BUSY since " in row.story
    assert listed["weather"]["busy"]
    assert listed["weather"]["state"] == "open"
    assert not listed["payments"]["busy"]
    assert answer.status == 200
    assert page.heading() == "1 busy \xb7 1 closed"
    assert "BUSY" not in client.row("weather").headline


def test_breaker_that_stays_busy_costs_a_page_its_time_once(
    client, weather, monkeypatch
):
    """Later pages do not wait for a breaker that was busy before."""
    monkeypatch.setattr(module, "PAGE_WAIT", 0.01)
    with lock_held(weather):
        client.page()
        monkeypatch.setattr(module, "PAGE_WAIT", PATIENCE)
        begun = time.monotonic()
        assert "BUSY" in client.row("weather").headline
        assert time.monotonic() - begun < PATIENCE / 2


def test_page_waits_for_no_breaker_that_was_busy_already(serve, monkeypatch):
    """The page waits for none of several busy breakers, also after the time of the page
    is used up."""
    breakers = [CircuitBreaker(name=f"b{number}") for number in range(3)]
    waits, holding = [], module.Watch.holding

    def noted(watch, patience):
        waits.append(patience)
        return holding(watch, patience)

    console = Console(breakers)
    monkeypatch.setattr(module, "PAGE_WAIT", 0.0)
    with contextlib.ExitStack() as stack:
        for breaker in breakers:
            stack.enter_context(lock_held(breaker))
        for watch in console.watches().values():
            assert watch.picture(0.0)["busy"]
        monkeypatch.setattr(module.Watch, "holding", noted)
        assert serve(console).page().heading() == "3 busy"
    assert waits == [0.0, 0.0, 0.0]


def test_page_has_one_time_for_all_breakers_that_become_busy(weather, monkeypatch):
    """When the time of the page is used up, the page waits for no breaker."""
    waits, holding = [], module.Watch.holding

    def noted(watch, patience):
        waits.append(patience)
        return holding(watch, patience)

    (watch,) = Console([weather]).watches().values()
    monkeypatch.setattr(module.Watch, "holding", noted)
    with lock_held(weather):
        deadline = time.monotonic() - module.EXTRA_WAIT
        assert watch.picture(deadline)["busy"]
    assert max(waits) <= 0


def test_breaker_whose_lock_is_held_for_a_moment_is_not_busy(
    client, weather, monkeypatch
):
    """The page waits a moment for the lock although other breakers have used up the
    time of the page."""
    monkeypatch.setattr(module, "PAGE_WAIT", 0.0)
    monkeypatch.setattr(module, "LEAST_WAIT", PATIENCE)
    monkeypatch.setattr(module, "EXTRA_WAIT", PATIENCE)
    has_it = threading.Event()

    def hold():
        with weather._lock:
            has_it.set()
            time.sleep(0.2)  # meanwhile the page begins to wait

    threading.Thread(target=hold, daemon=True).start()
    assert has_it.wait(PATIENCE)
    assert "BUSY" not in client.row("weather").headline


def test_change_of_a_busy_breaker_is_refused_after_a_moment(
    client, weather, monkeypatch
):
    """No thread waits forever for the breaker, and the page keeps what was typed."""
    monkeypatch.setattr(module, "WAIT", 0.01)
    page = client.page()
    with lock_held(weather):
        answer = client.post("/breakers/weather/open")
        assert (answer.status, answer.headers["Retry-After"]) == (503, "5")
        assert client.patch("/breakers/weather", {"fail_max": 9}).status == 503
        page = client.press(page, "weather", "Save the settings", fail_max="9")
    assert page.status == 503
    assert "Nothing was changed: the breaker is busy" in page.news()
    assert page.row("weather").typed["fail_max"] == "9"
    assert settings(weather)["fail_max"] == 5


def test_busy_breaker_that_was_never_seen_is_shown_too(serve):
    """The constructor of the console waits for no breaker's lock."""
    breaker = CircuitBreaker(name="hangs")
    with lock_held(breaker):
        client = serve(Console([breaker]))
        assert "BUSY" in client.row("hangs").headline
        assert client.get("/breakers/hangs").json()["busy"]
    assert client.row("hangs").kind == "closed"
    assert breaker.listeners


def test_storage_that_hangs_leaves_the_others_in_place(serve, weather, monkeypatch):
    """One thread waits for the storage, and later pages start no further thread."""
    storage = CountingStorage()
    client = serve(
        Console([CircuitBreaker(name="slow", state_storage=storage), weather])
    )
    client.page()
    storage.gate = threading.Event()
    try:
        for _ in range(3):
            page = client.page()
            assert "BUSY" in page.row("slow").headline
            assert page.row("weather").kind == "closed"
        assert storage.waiting == 1
    finally:
        storage.gate.set()


def test_page_is_renewed_by_a_part_that_has_no_fields(client):
    """The script fetches a page without fields, so a text that the operator is typing
    is not lost."""
    page, live = client.page(), Page(client.get("/live"))
    assert [row.name for row in live.rows] == [row.name for row in page.rows]
    assert [row.ident for row in live.rows] == [row.ident for row in page.rows]
    assert not [tag for tag, _ in live.tags if tag in ("input", "form", "script")]
    body = dict(page.tags)["body"]
    assert body["data-live"] == "/live"
    assert body["data-token"] == dict(live.tags)["body"]["data-token"]


def test_browser_without_scripts_has_a_frame_that_renews_itself(client, weather):
    """The outer frame comes with the page and goes on asking when the process is gone;
    the inner frame says what is wrong."""
    weather.open()
    page = client.page()
    (frame,) = (a for tag, a in page.tags if tag == "iframe")
    assert 'http-equiv="refresh"' in frame["srcdoc"]
    (inner,) = re.findall('src="(.*?)"', frame["srcdoc"])
    shown = Page(client.get(inner))
    assert int(shown.headers["Refresh"]) <= 5
    assert "1 open" in shown.text
    assert "OPEN weather calls are refused" in shown.text
    assert "payments" not in shown.text


# JSON for scripts


def test_breakers_are_listed_as_json(client, weather, payments):
    """Each entry has what snapshot() returns, the URL of the breaker and the story."""
    payments.open()
    listed = client.get("/breakers").json()
    assert client.get("/breakers/").status == 200
    for each, breaker in zip(listed, (weather, payments)):
        assert each["url"] == f"/breakers/{breaker.name}"
        assert breaker.snapshot().items() <= each.items()
    assert [len(each["transitions"]) for each in listed] == [0, 1]
    one = client.get("/breakers/weather").json()
    assert {**one, "as_of": None} == {**listed[0], "as_of": None}


def test_entity_tag_changes_with_settings_and_states_and_not_with_counts(
    client, weather
):
    """A failed call does not change the tag; a setting and each opening do."""
    tags = []
    for change in (
        lambda: None,
        lambda: attempt(weather, raiser(OSError())),
        lambda: setattr(weather, "fail_max", 9),
        weather.open,
        weather.open,
    ):
        change()
        tags.append(client.get("/breakers/weather").headers["ETag"])
    assert tags[0] == tags[1]
    assert len(set(tags)) == 4


def test_change_with_an_older_entity_tag_is_refused(client, weather):
    """The header If-Match of a script names the entity tag that the script has seen."""
    tag = client.get("/breakers/weather").headers["ETag"]
    patch = partial(client.patch, "/breakers/weather", {"fail_max": 9})
    assert patch(headers={"If-Match": '"other"'}).status == 412
    weather.success_threshold = 2
    assert patch(headers={"If-Match": tag}).status == 412
    move = partial(client.post, "/breakers/weather/open", None)
    assert move({"If-Match": tag}).status == 412
    assert (weather.fail_max, weather.current_state) == (5, "closed")
    tag = client.get("/breakers/weather").headers["ETag"]
    answer = patch(headers={"If-Match": f'"other", {tag}'})
    assert answer.status == 200
    assert move({"If-Match": answer.headers["ETag"]}).status == 200
    assert patch(headers={"If-Match": "*"}).status == 200


@pytest.mark.parametrize(
    ("body", "wait", "reason"),
    [
        ('{"seconds": 1800, "reason": "new disks"}', 1800, ": new disks"),
        ('{"seconds": null}', math.inf, ""),
        ('{"reason": null}', 60, ""),
        ("{}", 60, ""),
        (None, 60, ""),
    ],
)
def test_script_holds_a_circuit_open(client, weather, body, wait, reason):
    """The circuit stays open for the given seconds, without an end, or for
    reset_timeout."""
    answer = client.post("/breakers/weather/open", body)
    assert answer.status == 200
    assert weather.retry_after == wait
    assert answer.json()["held"] == (wait != 60)
    assert weather.state.reason == f"by hand, from 127.0.0.1{reason}"


def test_script_gives_a_reason_for_other_moves(client, weather):
    """The reason of the state has the reason that the script gave."""
    for move in "half_open", "close":
        client.post(f"/breakers/weather/{move}", '{"reason": "a test"}')
        assert weather.state.reason == "by hand, from 127.0.0.1: a test"


def test_settings_are_patched(client, weather):
    """A PATCH changes the settings that the body names, and the answer shows the new
    values."""
    answer = client.patch("/breakers/weather", {"fail_max": 20, "fail_counter": 7})
    assert answer.status == 200
    assert answer.json()["fail_max"] == weather.fail_max == 20
    assert answer.json()["fail_counter"] == weather.fail_counter == 7
    assert weather.reset_timeout == 60


def test_null_stands_for_infinity(client, weather):
    """Requests and answers write infinity as null."""
    answer = client.patch(
        "/breakers/weather", {"fail_max": None, "reset_timeout": None}
    )
    assert weather.fail_max == weather.reset_timeout == math.inf
    assert answer.json()["fail_max"] is answer.json()["reset_timeout"] is None


@pytest.mark.parametrize(
    ("move", "state"),
    [("open", "open"), ("half_open", "half-open"), ("close", "closed")],
)
@pytest.mark.parametrize("body", [None, "", "{}"])
def test_circuit_is_moved(client, weather, move, state, body):
    """The answer shows the state after the move."""
    weather.state = "half-open"
    answer = client.post(f"/breakers/weather/{move}", body)
    assert answer.status == 200
    assert answer.json()["state"] == weather.current_state == state


@pytest.mark.parametrize(
    ("values", "refused"),
    [
        ({"fail_max": 20, "reset_timeout": -1}, ["reset_timeout"]),
        ({"reset_timeout": 1, "fail_max": 0, "fail_counter": 2}, ["fail_max"]),
        ({"fail_counter": 2, "fail_max": "20"}, ["fail_max"]),
        ({"fail_counter": None, "fail_max": 20}, ["fail_counter"]),
        ({"fail_max": True, "reset_timeout": []}, ["fail_max", "reset_timeout"]),
    ],
)
def test_patch_is_done_as_a_whole_or_not_at_all(client, weather, values, refused):
    """If the library refuses one value, the PATCH sets no value, and the answer has an
    error for each refused value."""
    before = settings(weather)
    answer = client.patch("/breakers/weather", values)
    assert answer.status == 422
    errors = answer.json()["errors"]
    assert sorted(errors) == sorted(refused)
    assert all(error.startswith(f"{name} must be ") for name, error in errors.items())
    assert answer.json()["error"] == "; ".join(errors.values())
    assert settings(weather) == before


class CountingStorage(pybreaker.CircuitBreakerStorage):
    """A storage whose counter cannot be set and counts no further than fail_max."""

    state = "closed"
    opened_at = None

    def __init__(self):
        self.failures, self.gate, self.waiting = 0, None, 0

    @property
    def counter(self):
        if self.gate is not None:
            self.waiting += 1
            self.gate.wait(PATIENCE)
        if self.failures is None:
            raise OSError("the database is gone")
        return self.failures

    def increment_counter(self):
        self.failures += 1

    def reset_counter(self):
        self.failures = 0


def test_patch_with_a_value_that_only_a_storage_refuses_sets_nothing(serve):
    """The error of the library tells the limit of the storage."""
    breaker = CircuitBreaker(name="shared", state_storage=CountingStorage())
    client = serve(Console([breaker]))
    values = {"fail_max": 4, "reset_timeout": 1, "fail_counter": 6}
    answer = client.patch("/breakers/shared", values)
    assert answer.status == 422
    assert "at most fail_max, 4" in answer.json()["errors"]["fail_counter"]
    assert (breaker.fail_max, breaker.reset_timeout) == (5, 60)


def test_breaker_whose_storage_is_out_of_reach_leaves_the_others_in_place(
    serve, weather, caplog
):
    """The page shows the error of the storage. A change is a 500 with a traceback in
    the log, and the page keeps what was typed."""
    storage = CountingStorage()
    broken = CircuitBreaker(name="broken", state_storage=storage)
    client = serve(Console([broken, weather]))
    storage.failures = None
    listed = client.get("/breakers").json()
    assert listed[0]["error"] == "OSError('the database is gone')"
    assert listed[1]["state"] == "closed"
    assert client.row("weather").typed["fail_max"] == "5"
    row = client.row("broken")
    assert "UNKNOWN" in row.headline
    assert "OSError('the database is gone')" in row.story
    answer = client.patch("/breakers/broken", {"fail_counter": 1, "fail_max": 7})
    assert (answer.status, broken.fail_max) == (500, 5)
    assert "the database is gone" in caplog.text
    page = client.press(
        client.page(), "broken", "Save the settings", fail_max="7", fail_counter="1"
    )
    assert (page.status, broken.fail_max) == (500, 5)
    assert "OSError('the database is gone')" in page.news()
    assert page.row("broken").typed["fail_max"] == "7"
    assert client.get("/breakers/weather").status == 200


NAMES = [
    "weather",
    "a/b",
    "//",
    "/",
    "..",
    ".",
    "../..",
    " two  spaces ",
    "a+b",
    "100%",
    "%2F",
    "?q=1&breaker=2#top",
    "\"quotes\" and 'more'",
    "</h2><script>alert(1)</script>&amp;",
    "Wetterdienst M\xfcnchen \N{SNOWMAN}\N{WATER WAVE}",
    "line\r\nbreak\x00\x1b[2J",
    "\udce9 and \ud800",
    "open",
    "weather/open",
]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_breaker_can_be_watched_and_steered_whatever_its_name_is(serve, name, caplog):
    """A script uses the URL in the list, and an operator uses the page."""
    # The library would log names that no terminal can show.
    caplog.set_level(logging.ERROR, logger="pybreaker")
    breaker = CircuitBreaker(name=name)
    client = serve(Console([breaker]))
    (listed,) = client.get("/breakers").json()
    url = listed["url"]
    assert url == f"/breakers/{quote(name, safe='', errors='surrogatepass')}"
    assert listed["name"] == name
    assert client.get(url).json()["id"] == listed["id"]
    assert client.patch(url, {"fail_max": 20}).json()["fail_max"] == 20
    assert client.post(f"{url}/open").json()["state"] == "open"
    page = client.page()
    (row,) = page.rows
    client.press(page, row.name, "Half-open, let one call try")
    assert breaker.current_state == "half-open"
    client.press(page, row.name, "Save the settings", fail_max="30")
    assert breaker.fail_max == 30
    assert client.page().rows[0].kind == "half-open"


def test_slash_in_a_name_may_be_quoted_or_not(serve):
    """WSGI does not tell the console whether the slash was quoted."""
    client = serve(Console([CircuitBreaker(name="a/b")]))
    assert client.get("/breakers/a/b").json() == client.get("/breakers/a%2Fb").json()


def test_breaker_that_is_named_like_anothers_move_is_told_apart(serve):
    """GET and PATCH address the breaker "a/open", and POST moves the breaker "a"."""
    short, long = CircuitBreaker(name="a"), CircuitBreaker(name="a/open")
    client = serve(Console([short, long]))
    assert client.get("/breakers/a/open").json()["name"] == "a/open"
    client.post("/breakers/a/open")
    assert (short.current_state, long.current_state) == ("open", "closed")
    client.post("/breakers/a/open/open")
    assert long.current_state == "open"
    answer = client.ask("DELETE", "/breakers/a/open")
    assert answer.headers["Allow"] == "GET, HEAD, PATCH, POST"


def test_breakers_of_the_same_name_or_of_none_are_told_apart_by_a_number(serve):
    """The numbers follow the order in which the console was given the breakers."""
    breakers = [CircuitBreaker(name=name) for name in ("x", None, "x", "", "x")]
    client = serve(Console(breakers))
    urls = [
        listed["url"].rpartition("/")[2] for listed in client.get("/breakers").json()
    ]
    assert urls == ["x", "unnamed", "x-2", "unnamed-2", "x-3"]
    client.post("/breakers/x-2/open")
    client.confirm(client.page(), "unnamed-2", "Hold open")
    assert [b.current_state == "open" for b in breakers] == [0, 0, 1, 1, 0]


def test_number_makes_no_name_that_another_breaker_has(serve):
    """The first breaker of each name keeps the name, and the numbers leave out names
    that breakers have."""
    breakers = [CircuitBreaker(name=name) for name in ("pay", "pay", "pay-2", "pay-2")]
    client = serve(Console(breakers))
    urls = [
        listed["url"].rpartition("/")[2] for listed in client.get("/breakers").json()
    ]
    assert urls == ["pay", "pay-3", "pay-2", "pay-2-2"]
    client.post("/breakers/pay-2/open")
    assert [b.current_state == "open" for b in breakers] == [0, 0, 1, 0]


def test_breaker_can_be_added_and_renamed_later(serve, weather):
    """The console shows the added breaker under its present name."""
    console = Console([])
    client = serve(console)
    assert client.get("/breakers").json() == client.page().rows == []
    console.add(weather)
    weather.name = "storms"
    assert client.get("/breakers").json()[0]["url"] == "/breakers/storms"
    assert client.get("/breakers/weather").status == 404


def curl_lines():
    """The curl commands of the documentation, as tuples (method, path, body)."""
    texts = [module.__doc__, DOCS]
    for line in re.findall(r"^ *(?:\$ )?(curl .*)$", "\n".join(texts), re.MULTILINE):
        words = shlex.split(line)[1:]
        method, body = "GET", None
        while words[0].startswith("-"):
            option, value = words.pop(0), words.pop(0)
            if option == "-X":
                method = value
            elif option == "-d":
                body = value
            else:
                assert option == "--unix-socket", line
        (url,) = words
        assert re.match(r"http://(127\.0\.0\.1:8300|localhost)/", url), line
        yield method, urlsplit(url).path, body


def test_every_curl_line_of_the_documentation_works(client):
    """The console answers each command with JSON and status 200."""
    lines = list(curl_lines())
    assert {method for method, _, _ in lines} == {"GET", "PATCH", "POST"}
    for method, path, body in lines:
        headers = {"Content-Type": "application/x-www-form-urlencoded"} if body else {}
        answer = client.ask(method, path, body, headers)
        assert (answer.status, bool(answer.json())) == (200, True)


# Bad requests


BAD = {
    "unknown page": ("GET", "/missing", None, 404),
    "unknown breaker": ("GET", "/breakers/missing", None, 404),
    "unknown breaker patched": ("PATCH", "/breakers/missing", "{}", 404),
    "unknown breaker moved": ("POST", "/breakers/missing/open", None, 404),
    "unknown state": ("GET", "/live?state=ajar", None, 422),
    "query twice": ("GET", "/?q=a&q=b", None, 400),
    "unknown move": ("POST", "/breakers/weather/explode", None, 404),
    "unknown button": ("POST", "/", "page={token}.x&do=explode.1", 422),
    "no button": ("POST", "/", "page={token}.x", 422),
    "no number for a hold": ("POST", "/", "page={token}.x&do=yes.1.x", 422),
    "negative hold": ("POST", "/", "page={token}.x&do=yes.1.-1", 422),
    "form without a page": ("POST", "/", "do=yes.1.60", 409),
    "form of another page": ("POST", "/", "page=0123.x&do=yes.1.60", 409),
    "form for another breaker": ("POST", "/", "page={token}.x&do=yes.99.60", 404),
    "state in a form": ("POST", "/", "page={token}.x&do=yes.1.60&state=ajar", 422),
    "private method": ("POST", "/breakers/weather/__init__", None, 404),
    "no UTF-8": ("GET", "/breakers/%ff", None, 404),
    "dots": ("GET", "/breakers/../../etc/passwd", None, 404),
    "slash at the end": ("POST", "/breakers/weather/open/", None, 404),
    "prefix only": ("GET", "/breakersweather", None, 404),
    "move read": ("GET", "/breakers/weather/open", None, 405),
    "move patched": ("PATCH", "/breakers/weather/open", "{}", 405),
    "breaker posted": ("POST", "/breakers/weather", "{}", 405),
    "breaker deleted": ("DELETE", "/breakers/weather", None, 405),
    "breaker put": ("PUT", "/breakers/weather", '{"fail_max": 1}', 405),
    "list posted": ("POST", "/breakers", "{}", 405),
    "frame posted": ("POST", "/status", None, 405),
    "page patched": ("PATCH", "/", "{}", 405),
    "unheard-of method": ("open", "/breakers/weather", None, 405),
    "empty": ("PATCH", "/breakers/weather", None, 400),
    "no JSON": ("PATCH", "/breakers/weather", "fail_max=1", 400),
    "half of it": ("PATCH", "/breakers/weather", '{"fail_max": 1', 400),
    "no UTF-8 in JSON": ("PATCH", "/breakers/weather", b'{"fail_max": "\xff"}', 400),
    "NaN": ("PATCH", "/breakers/weather", '{"reset_timeout": NaN}', 400),
    "Infinity": ("PATCH", "/breakers/weather", '{"fail_max": Infinity}', 400),
    "infinite": ("PATCH", "/breakers/weather", '{"fail_max": 1e999}', 400),
    "thousand digits": (
        "PATCH",
        "/breakers/weather",
        f'{{"fail_max": {10**1000}}}',
        400,
    ),
    "twice": ("PATCH", "/breakers/weather", '{"fail_max": 0, "fail_max": 1}', 400),
    "field twice": ("POST", "/", "do=close-yes.1&do=yes.1.60", 400),
    "deep": ("PATCH", "/breakers/weather", "[" * 16000, 400),
    "no JSON for a move": ("POST", "/breakers/weather/open", "now", 400),
    "no text in fields": ("POST", "/", b"do=yes.1.60\xff", 400),
    "many fields": ("POST", "/", "do=yes.1.60" + "&a=1" * 1000, 400),
    "seconds of the wrong kind": (
        "POST",
        "/breakers/weather/open",
        '{"seconds": "soon"}',
        422,
    ),
    "negative seconds": ("POST", "/breakers/weather/open", '{"seconds": -1}', 422),
    "reason of the wrong kind": (
        "POST",
        "/breakers/weather/open",
        '{"reason": 1}',
        422,
    ),
    "seconds for another move": (
        "POST",
        "/breakers/weather/close",
        '{"seconds": 1}',
        422,
    ),
    "list": ("PATCH", "/breakers/weather", "[]", 422),
    "null": ("PATCH", "/breakers/weather", "null", 422),
    "unknown setting": ("PATCH", "/breakers/weather", '{"fail_max": 1, "x": 1}', 422),
    "private": ("PATCH", "/breakers/weather", '{"_fail_max": 1}', 422),
    "name": ("PATCH", "/breakers/weather", '{"name": "storms"}', 422),
    "settings for a move": ("POST", "/breakers/weather/open", '{"fail_max": 1}', 422),
    "array for a move": ("POST", "/breakers/weather/open", "[]", 422),
    "too large": ("PATCH", "/breakers/weather", " " * 20000 + "{}", 413),
    "far too large": ("PATCH", "/breakers/weather", " " * 5_000_000 + "{}", 413),
    "too large for a move": ("POST", "/breakers/weather/open", " " * 20000, 413),
    "too large a form": ("POST", "/", "do=yes.1.60&a=" + "b" * 1100000, 413),
}


@pytest.mark.parametrize(
    ("method", "path", "body", "status"), BAD.values(), ids=list(BAD)
)
def test_bad_request_is_refused(client, weather, method, path, body, status):
    """The status and the text say what is wrong, nothing changes, and the console goes
    on answering."""
    before = settings(weather)
    if isinstance(body, str):
        body = body.replace("{token}", client.console._token)
    answer = client.ask(method, path, body)
    assert answer.status == status
    assert ("Allow" in answer.headers) == (status == 405)
    if path.startswith("/breakers"):
        assert answer.json()["error"]
    elif status in (404, 409) and method == "POST":
        assert Page(answer).news()
    elif "yes.1.x" in str(body) or "yes.1.-1" in str(body):
        assert Page(answer).news()
    else:
        assert answer.headers["Content-Type"] == "text/plain; charset=utf-8"
        assert answer.text.strip()
    assert settings(weather) == before
    assert client.get("/breakers/weather").status == 200


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/", "GET, HEAD, POST"),
        ("/status", "GET, HEAD"),
        ("/breakers", "GET, HEAD"),
        ("/breakers/weather", "GET, HEAD, PATCH"),
        ("/breakers/weather/close", "POST"),
    ],
)
def test_wrong_method_is_answered_with_the_right_ones(client, path, allowed):
    """The header Allow lists the methods that the path takes."""
    answer = client.ask("OPTIONS", path)
    assert (answer.status, answer.headers["Allow"]) == (405, allowed)


@pytest.mark.parametrize(
    ("length", "body", "status"),
    [
        ("", "", 400),
        ("Content-Length: x\r\n", '{"fail_max": 1}', 400),
        ("Content-Length: -1\r\n", '{"fail_max": 1}', 400),
        ("Content-Length: 1_5\r\n", '{"fail_max": 1}', 400),
        ("Content-Length: \xb2\r\n", '{"fail_max": 1}', 400),
        ("Content-Length: 0\r\n", '{"fail_max": 1}', 400),
        ("Content-Length: 14\r\n", '{"fail_max": 1}', 400),
        ("Content-Length: 100\r\n", '{"fail_max": 1}', 400),
        ("Content-Length: 99999\r\n", '{"fail_max": 1}', 413),
        (f"Content-Length: {'9' * 5000}\r\n", '{"fail_max": 1}', 413),
        ("Transfer-Encoding: chunked\r\n", 'f\r\n{"fail_max": 1}\r\n0\r\n\r\n', 411),
    ],
)
def test_length_that_is_missing_or_wrong_is_refused(
    client, weather, length, body, status
):
    """The refusal of the Content-Length does not depend on the body."""
    head = f"PATCH /breakers/weather HTTP/1.1\r\nHost: localhost\r\n{length}\r\n"
    answer = client.send((head + body).encode("latin-1"))
    assert answer.split()[1] == str(status)
    assert json.loads(answer.partition("\r\n\r\n")[2])["error"]
    assert weather.fail_max == 5
    assert client.get("/breakers/weather").status == 200


def test_body_that_never_comes_ends_with_an_answer(client, weather, monkeypatch):
    """The server stops waiting after its timeout, and serves other clients
    meanwhile."""

    def timeout(handler):
        is_late = handler.client_address == link.getsockname()
        return 0.5 if is_late else PATIENCE

    monkeypatch.setattr(module.Handler, "timeout", property(timeout))
    head = b"POST /breakers/weather/open HTTP/1.1\r\nHost: localhost\r\n"
    with socket.socket() as link:
        link.settimeout(PATIENCE)
        link.bind(("127.0.0.1", 0))  # the handler may read the address at once
        link.connect(("127.0.0.1", client.port))
        link.sendall(head + b"Content-Length: 2\r\n\r\n")
        assert client.get("/breakers/weather").status == 200
        assert link.recv(65536).startswith(b"HTTP/1.0 400 ")
    assert weather.current_state == "closed"


def test_client_that_talks_slowly_is_cut_off(client, weather, monkeypatch):
    """A client that is never silent for long would otherwise hold a thread forever."""
    monkeypatch.setattr(module.Handler, "timeout", None)
    monkeypatch.setattr(module, "CONNECTION_TIMEOUT", 0.2)
    head = b"POST /breakers/weather/open HTTP/1.1\r\n"
    with socket.create_connection(("127.0.0.1", client.port), PATIENCE) as link:
        link.sendall(head)
        link.settimeout(0.02)

        def is_cut_off():
            try:
                link.sendall(b"x")
                return link.recv(65536) == b""
            except socket.timeout:
                return False
            except OSError:
                return True

        until(is_cut_off)
    monkeypatch.setattr(module, "CONNECTION_TIMEOUT", PATIENCE)
    assert client.get("/breakers/weather").json()["state"] == "closed"


def test_server_keeps_nothing_of_a_client_that_was_answered(client, monkeypatch):
    """The server keeps neither the connection of an answered client nor its time."""
    close_request, left, closed = (
        module.Server.close_request,
        [],
        threading.Event(),
    )

    def closing(server, request):
        close_request(server, request)
        kept = (
            dict(server._accepted_at),
            set(server._with_request),
            server._slots._value,
        )
        left.append((request.fileno(), *kept))
        closed.set()

    monkeypatch.setattr(module.Server, "close_request", closing)
    client.get("/")
    assert closed.wait(PATIENCE)
    assert left == [(-1, {}, set(), module.CONNECTIONS)]


@pytest.mark.parametrize("raw", [b"", b"\r\n\r\n", b"\x16\x03\x01\x00", b"GET\r\n\r\n"])
def test_bytes_that_are_no_request_do_no_harm(client, raw):
    """The server goes on after a port scan, a TLS client and a client that hangs up."""
    client.send(raw)
    assert client.get("/breakers").status == 200


@pytest.mark.parametrize(
    "path",
    ["/", "/status", "/breakers", "/breakers/weather", "/missing"],
)
def test_head_is_answered_like_get_without_the_body(client, path):
    """The answer to HEAD has the status and the headers of the answer to GET."""
    got, head = client.get(path), client.ask("HEAD", path)
    raw = client.send(f"HEAD {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    assert raw.endswith("\r\n\r\n")
    assert raw.count("\r\n\r\n") == 1
    assert head.status == got.status
    kept = [name for name in got.headers if name != "Date"]
    assert [head.headers[name] for name in kept] == [got.headers[name] for name in kept]
    assert int(head.headers["Content-Length"]) == len(got.text.encode())


# Hostile requests


CHANGES = {
    "form": ("POST", "/", "page={token}.x&do=yes.1.60"),
    "move": ("POST", "/breakers/weather/open", None),
    "patch": ("PATCH", "/breakers/weather", '{"fail_max": 1}'),
}
changes = pytest.mark.parametrize(
    ("method", "path", "body"), CHANGES.values(), ids=list(CHANGES)
)


@changes
@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://localhost:1"},
        {"Origin": "http://localhost:{port}.evil.example"},
        {"Origin": "http://localhost"},
        {"Origin": "http://[::1"},
        {"Origin": "http://evil.example", "Referer": "http://localhost:{port}/"},
        {"Referer": "http://evil.example/localhost:{port}/"},
        {"Referer": "http://localhost:{port}@evil.example/"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site", "Origin": "http://localhost:{port}"},
    ],
    ids=str,
)
def test_page_of_another_site_changes_nothing(
    client, weather, method, path, body, headers
):
    """The console recognizes the request by Origin, Referer or Sec-Fetch-Site."""
    before = settings(weather)
    body = body and body.replace("{token}", client.console._token)
    headers = {name: value.format(port=client.port) for name, value in headers.items()}
    answer = client.ask(
        method, path, body, {"Host": f"localhost:{client.port}", **headers}
    )
    assert answer.status == 403
    assert "another site" in answer.text
    assert settings(weather) == before


@changes
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Origin": "http://localhost:{port}"},
        {"Origin": "http://localhost:{port}", "Sec-Fetch-Site": "same-origin"},
        {"Referer": "http://localhost:{port}/"},
    ],
    ids=str,
)
def test_consoles_own_page_and_clients_without_an_origin_are_served(
    client, weather, method, path, body, headers
):
    """A client that is no browser sends no Origin."""
    before = settings(weather)
    body = body and body.replace("{token}", client.console._token)
    headers = {name: value.format(port=client.port) for name, value in headers.items()}
    answer = client.ask(
        method, path, body, {"Host": f"localhost:{client.port}", **headers}
    )
    assert answer.status in (200, 303)
    assert settings(weather) != before


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "localhost.evil.example:8300",
        "evil.example@localhost",
        "127.0.0.1.evil.example",
        "127.0.0.2",
        "0.0.0.0",
        "[::2]:80",
        "localhost:80:80",
        "localhost:x",
        "localhost/",
        "localhost, evil.example",
        "",
    ],
)
@pytest.mark.parametrize("path", ["/", "/breakers", "/status"])
def test_unknown_host_is_refused(client, host, path):
    """The console refuses also GET, because an attacker's host name may lead to the
    console."""
    answer = client.ask("GET", path, headers={"Host": host})
    assert answer.status == 403
    assert "host name" in answer.text


def test_request_without_a_host_is_refused(client, weather):
    """The console refuses also a request with two Host headers."""
    for hosts in "", "Host: localhost\r\nHost: evil.example\r\n":
        head = f"POST /breakers/weather/open HTTP/1.0\r\n{hosts}\r\n"
        assert client.send(head.encode()).split()[1] == "403"
    assert weather.current_state == "closed"


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:80", "127.0.0.1:8300", "[::1]:8300", "[::1]"]
)
def test_names_of_the_loopback_host_are_accepted(client, host):
    """The port in the Host header may be any port, because a proxy may forward the
    port."""
    assert client.ask("GET", "/breakers", headers={"Host": host}).status == 200


def test_other_hosts_have_to_be_given_to_the_console(serve, weather):
    """The console then answers to the given hosts alone, in upper or lower case."""
    client = serve(Console([weather], hosts=["Ops.Example"]))
    for host, status in ("ops.example:443", 200), ("localhost", 403):
        answer = client.ask("GET", "/breakers", headers={"Host": host})
        assert answer.status == status


HOSTILE = """<script>alert('x')</script><img src=x onerror="alert(1)">&lt;"""


def test_names_and_exceptions_are_escaped(serve):
    """The browser takes names, exceptions and typed texts as text and not as HTML."""
    breaker = CircuitBreaker(fail_max=1, name=HOSTILE)
    client = serve(Console([breaker], service=HOSTILE))
    attempt(breaker, raiser(OSError(HOSTILE)))
    page = client.page()
    assert page.rows[0].name == HOSTILE
    assert repr(OSError(HOSTILE)) in page.rows[0].story
    refused = client.press(
        page, HOSTILE, "Save the settings", fail_max=HOSTILE, why=HOSTILE
    )
    row = refused.rows[0]
    assert row.said == {"fail_max": f"fail_max must be a whole number, not {HOSTILE!r}"}
    assert row.typed["fail_max"] == row.typed["why"] == HOSTILE
    asks = client.press(refused, HOSTILE, "Hold open until released", fail_max="1")
    found = client.page(f"?q={quote(HOSTILE)}")
    assert found.fields["q"] == HOSTILE
    shown = [page, refused, asks, found]
    shown += [Page(client.get(path)) for path in ("/live", "/status")]
    for each in shown:
        scripts = [tag for tag, _ in each.tags if tag == "script"]
        assert len(scripts) <= 1
        assert "img" not in [tag for tag, _ in each.tags]
        assert not [a for _, a in each.tags if any(name[:2] == "on" for name in a)]


def test_exception_that_cannot_be_shown_does_no_harm(client, weather, clock):
    """The page tells the transition although repr() of the exception raises."""

    class Unspeakable(Exception):
        def __repr__(self):
            raise ValueError

    for _ in range(5):
        attempt(weather, raiser(Unspeakable()))
    (transition,) = client.get("/breakers/weather").json()["transitions"]
    assert transition["reason"] == "5 failures in a row; the last: Unspeakable"


def test_exception_of_many_words_is_cut_short(client, weather):
    """The row of the breaker stays short."""
    for _ in range(5):
        attempt(weather, raiser(OSError("x" * 100_000)))
    row = client.row("weather")
    assert len(row.story) + len(row.headline) < 1500


@pytest.mark.parametrize(
    "path", ["/", "/status", "/breakers", "/breakers/x", "/missing"]
)
def test_every_answer_tells_the_browser_to_be_careful(client, path):
    """The headers allow no script but the page's own, no frame around the page on
    another site, no guessing of content types and no storing."""
    headers = client.get(path).headers
    policy = dict(
        part.strip().split(" ", 1)
        for part in headers["Content-Security-Policy"].split(";")
    )
    assert policy["default-src"] == "'none'"
    assert policy["frame-ancestors"] == policy["form-action"] == "'self'"
    digest = base64.b64encode(hashlib.sha256(module.SCRIPT.encode()).digest()).decode()
    assert policy["script-src"] == f"'sha256-{digest}'"
    assert policy["connect-src"] == policy["frame-src"] == "'self'"
    assert not {"script-src-elem", "script-src-attr"} & set(policy)
    assert "unsafe" not in headers["Content-Security-Policy"]
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Cache-Control"] == "no-store"


# The log


@pytest.fixture
def logged(caplog):
    """The messages of the console's logger at WARNING and above, which Python shows
    without configuration."""

    def logged():
        return [
            record.getMessage()
            for record in caplog.records
            if record.name == "pybreaker_extras.console"
            and record.levelno >= logging.WARNING
        ]

    return logged


def test_changes_of_two_operators_do_not_mix(serve, logged):
    """One change ends before the other begins, as the values in the log show."""

    class Slow(CircuitBreaker):
        """A breaker whose `fail_max` takes so long to set that another operator's
        request comes."""

        @property
        def fail_max(self):
            return self._fail_max

        @fail_max.setter
        def fail_max(self, fail_max):
            self._fail_max = fail_max
            if fail_max == 10:
                other.start()
                other.join(0.2)  # a request that does not wait ends in this time

    breaker = Slow(name="slow")
    client = serve(Console([breaker]))
    ask = partial(client.patch, "/breakers/slow")
    other = threading.Thread(target=ask, args=[{"fail_max": 20, "reset_timeout": 20}])
    ask({"fail_max": 10, "reset_timeout": 10})
    other.join(PATIENCE)
    assert (breaker.fail_max, breaker.reset_timeout) == (20, 20)
    assert sorted(logged()) == [
        "127.0.0.1: 'slow': fail_max = 10, was 5",
        "127.0.0.1: 'slow': fail_max = 20, was 10",
        "127.0.0.1: 'slow': reset_timeout = 10, was 60",
        "127.0.0.1: 'slow': reset_timeout = 20, was 10",
    ]


def test_every_change_is_logged_with_who_asked_and_what(client, logged):
    """The console logs changes from the page and from scripts, and does not log
    reading."""
    client.get("/breakers")
    client.confirm(client.page(), "weather", "Hold open until released", why="it's new")
    client.press(client.page(), "weather", "Save the settings", fail_max="20", why="x")
    client.patch("/breakers/payments", {"fail_counter": 2, "reset_timeout": None})
    client.post("/breakers/payments/half_open")
    assert logged() == [
        "127.0.0.1: 'weather': open for inf s, was closed, because \"it's new\"",
        "127.0.0.1: 'weather': fail_max = 20, was 5, because 'x'",
        "127.0.0.1: 'payments': reset_timeout = inf, was 30.5",
        "127.0.0.1: 'payments': fail_counter = 2, was 0",
        "127.0.0.1: 'payments': half_open, was closed",
    ]


def test_refused_change_is_not_logged_as_one(client, logged):
    """The console logs only the refusal of a page of another site."""
    client.patch("/breakers/weather", {"fail_max": 0})
    client.press(client.page(), "weather", "Save the settings", fail_max="x")
    client.post("/breakers/missing/open")
    assert logged() == []
    client.post("/breakers/weather/open", headers={"Origin": "http://evil.example"})
    assert logged() == ["127.0.0.1: refused, sent by a page of 'http://evil.example'"]


def test_line_of_the_log_stays_one_line(serve, logged):
    """The log escapes control characters in names and requests."""
    name = "a\r\n10.0.0.1: 'b': close\x1b[2J\u2028"
    client = serve(Console([CircuitBreaker(name=name)]))
    client.patch(f"/breakers/{quote(name)}", {"fail_max": 20})
    client.post(f"/breakers/{quote(name)}/open", '{"reason": "b\\n10.0.0.1: x"}')
    client.ask("POST", "/", "x", {"Origin": "http://e\x1b[2J\x85.example"})
    assert len(logged()) == 3
    assert all(line.isprintable() for line in logged())


# Authorization, and the operator's name


def test_console_that_is_read_only_changes_nothing(serve, weather):
    """The page has no buttons, and the console refuses changes from scripts."""
    client = serve(Console([weather], read_only=True))
    page = client.page("?q=wea")
    assert not page.row("weather").buttons
    assert "read-only" in page.text
    for method, path in ("POST", "/"), ("POST", "/breakers/weather/open"):
        answer = client.ask(method, path, "")
        assert (answer.status, "read-only" in answer.text) == (403, True)
    assert client.patch("/breakers/weather", {"fail_max": 9}).status == 403
    assert client.get("/breakers/weather").status == 200
    assert (weather.current_state, weather.fail_max) == ("closed", 5)


def test_authorize_decides_from_the_request(serve, weather):
    """The console asks `authorize` about reading and changing, after the check of the
    host."""
    asked = []

    def authorize(environ):
        asked.append(environ["PATH_INFO"])
        return environ.get("HTTP_X_KEY") == "secret"

    client = serve(Console([weather], authorize=authorize))
    for path in "/", "/live", "/status", "/breakers", "/missing":
        assert client.get(path).status == 403
    assert client.post("/breakers/weather/open").status == 403
    assert (
        client.post("/breakers/weather/open", headers={"X-Key": "secret"}).status == 200
    )
    asked.clear()
    client.ask("GET", "/", headers={"Host": "evil.example"})
    assert asked == []


def test_authorization_that_fails_grants_nothing(serve, weather, caplog):
    """The console logs the exception that `authorize` raised."""

    def authorize(environ):
        raise LookupError("no such user")

    client = serve(Console([weather], authorize=authorize))
    assert client.post("/breakers/weather/open").status == 500
    assert weather.current_state == "closed"
    assert "no such user" in caplog.text


@pytest.mark.filterwarnings("error")
def test_authorization_that_would_have_to_be_awaited_grants_nothing(
    serve, weather, caplog
):
    """A coroutine or another awaitable object grants nothing, although the object is
    true."""

    async def answer():
        return True

    class Awaitable:
        def __await__(self):
            return iter(())

    for authorize in (lambda environ: answer(), lambda environ: Awaitable()):
        client = serve(Console([weather], authorize=authorize))
        assert client.get("/").status == 500
        assert client.post("/breakers/weather/open").status == 500
        gc.collect()
    assert weather.current_state == "closed"
    assert "nothing awaits what it returned" in caplog.text


def ask_as(console, **environ):
    """Move a circuit by a call of the WSGI application with these variables."""
    answers = []
    given = {
        "REQUEST_METHOD": "POST",
        "PATH_INFO": "/breakers/weather/open",
        "HTTP_HOST": "localhost",
        "CONTENT_LENGTH": "0",
        "wsgi.input": io.BytesIO(),
        "REMOTE_ADDR": "10.0.0.1",
        **environ,
    }
    console(given, lambda status, headers: answers.append(status))
    assert answers == ["200 OK"]


@pytest.mark.parametrize(
    ("environ", "who"),
    [
        ({}, "10.0.0.1"),
        ({"REMOTE_USER": "ada"}, "ada"),
        ({"REMOTE_USER": "a\r\nb"}, "a??b"),
        ({"HTTP_X_FORWARDED_FOR": "1.1.1.1"}, "1.1.1.1"),
        ({"HTTP_X_FORWARDED_FOR": "9.9.9.9, 1.1.1.1"}, "1.1.1.1"),
        ({"HTTP_X_FORWARDED_FOR": "9.9.9.9, 1.1.1.1, 10.0.0.2"}, "1.1.1.1"),
        ({"HTTP_X_FORWARDED_FOR": "x\r\ny"}, "10.0.0.1"),
        ({"HTTP_X_FORWARDED_FOR": "1.1.1.1", "REMOTE_ADDR": "5.5.5.5"}, "5.5.5.5"),
        ({"REMOTE_ADDR": ""}, "unknown"),
    ],
)
def test_reason_names_the_user_or_the_address_behind_a_trusted_proxy(
    weather, environ, who
):
    """The console does not believe addresses that the client may have made up."""
    console = Console([weather], trusted_proxies=["10.0.0.1", "10.0.0.2"])
    ask_as(console, **environ)
    assert weather.state.reason == f"by hand, from {who}"


@pytest.mark.parametrize("address", [{"REMOTE_ADDR": ""}, {"REMOTE_ADDR": None}])
def test_proxy_behind_a_unix_socket_is_trusted_where_the_server_tells_no_address(
    weather, address
):
    """The address is an empty text from Gunicorn, and None from an ASGI server."""
    console = Console([weather], trusted_proxies=["unix"])
    ask_as(console, **address, HTTP_X_FORWARDED_FOR="9.9.9.9, 1.1.1.1")
    assert weather.state.reason == "by hand, from 1.1.1.1"


def test_variables_of_the_process_are_no_part_of_a_request(serve, weather, monkeypatch):
    """A variable of the process would pass for a user or for a header of the client."""
    variables = {"REMOTE_USER": "root", "HTTP_X_KEY": "secret", "HTTPS": "on"}
    monkeypatch.setattr(wsgiref.handlers.BaseHandler, "os_environ", variables)
    asked = []

    def authorize(environ):
        asked.append(environ)
        return True

    client = serve(Console([weather], authorize=authorize))
    assert client.post("/breakers/weather/open?a=b").status == 200
    assert weather.state.reason == "by hand, from 127.0.0.1"
    (environ,) = asked
    assert not {*variables} & {*environ}
    assert environ["wsgi.url_scheme"] == "http"
    assert environ["SERVER_PORT"] == str(client.port)
    assert environ["QUERY_STRING"] == "a=b"
    assert environ["wsgi.multithread"]


SECRETS = {
    "redis://:hunter2@cache/0": "redis://:***@cache/0",
    "redis://user:hunter2@cache/0": "redis://user:***@cache/0",
    "postgresql://u:p@ss/hunter2@db": "postgresql://u:***@db",
    "https://h/?a=1&api_key=hunter2&b=2": "https://h/?a=1&api_key=***&b=2",
    "smtp://ada@example.com:hunter2@mail": "smtp://ada@example.com:***@mail",
    "https://h/x#access_token=hunter2": "https://h/x#access_token=***",
    "https://h/x?access_token=hunter2'": "https://h/x?access_token=***'",
    "https://h/?pass=hunter2&b=2": "https://h/?pass=***&b=2",
    "https://h/?passphrase=hunter2": "https://h/?passphrase=***",
    "mysql://root:it's-hunter2@db/": "mysql://root:***@db/",
    "('mysql://o'brien:hunter2@db/')": "('mysql://o'brien:***@db/')",
    "cut: mysql://root:it's-hunter2": "cut: mysql://root:***",
    "nor at 'http://h:8080'": "nor at 'http://h:8080'",
    "nor in 'http://h' or 'a@b'": "nor in 'http://h' or 'a@b'",
    "no secret in http://h:8080/path": "no secret in http://h:8080/path",
    "nor in http://h:8080": "nor in http://h:8080",
    "cut: mysql://u:hunter2": "cut: mysql://u:***",
}


@pytest.mark.parametrize(("text", "shown"), SECRETS.items())
def test_passwords_in_urls_are_blotted_out(serve, weather, text, shown):
    """The page and the answers to scripts show no password, also after the outage."""
    assert module.blot_out_passwords(text) == shown
    client = serve(Console([weather]))
    weather.open(reason=text)
    seen = client.page().source + client.get("/breakers").text
    assert "hunter2" not in seen
    weather.close()
    assert "hunter2" not in client.page().source + client.get("/breakers").text


def test_texts_are_redacted_by_a_function_of_the_users_own(serve, weather, caplog):
    """A `redact` that raises shows no text, and `redact=None` shows the whole text."""
    weather.open(reason="://u:hunter2@h")
    for redact, shown in (
        (str.upper, "://U:HUNTER2@H"),
        (None, "://u:hunter2@h"),
        (lambda text: 1 / 0, "(not shown, as redact failed)"),
    ):
        client = serve(Console([weather], redact=redact))
        assert client.get("/breakers/weather").json()["reason"] == shown
        assert shown in client.row("weather").story
    assert "ZeroDivisionError" in caplog.text


# Floods and other load


def descriptors():
    """How many file descriptors the process has."""
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs Linux's /proc")
def test_flood_of_unfinished_requests_costs_little(serve, weather, monkeypatch):
    """Another process opens 300 connections and sends half a request on each. The
    process of the console opens few descriptors, runs its calls and answers."""
    monkeypatch.setattr(module, "CROWDED_TIMEOUT", 0.05)
    monkeypatch.setattr(module, "IDLE_BURST", 10_000)
    client = serve(Console([weather]))
    before = descriptors()
    script = """
import socket, sys, time
links = []
for _ in range(300):
    link = socket.socket()
    link.setblocking(False)
    link.connect_ex(("127.0.0.1", int(sys.argv[1])))
    links.append(link)
time.sleep(0.2)
for link in links:
    try:
        link.send(b"GET / HT")
    except OSError:
        pass
print("flooded", flush=True)
sys.stdin.read()
"""
    command = [sys.executable, "-c", script, str(client.port)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as flood:
        assert flood.stdout.readline() == "flooded\n"
        assert descriptors() - before <= 64
        assert weather.call(int) == 0
        until(client.is_answered)
        flood.stdin.close()


def test_no_more_connections_are_served_than_are_allowed(client, monkeypatch):
    """Other connections wait in the backlog of the system until a connection ends."""
    monkeypatch.setattr(module, "CROWDED_TIMEOUT", PATIENCE)
    links = []
    try:
        for _ in range(module.CONNECTIONS):
            links.append(socket.create_connection(("127.0.0.1", client.port), PATIENCE))
            links[-1].sendall(b"GET /breakers HTTP/1.0\r\nHost: localhost\r\n")
        waiting = socket.create_connection(("127.0.0.1", client.port), PATIENCE)
        links.append(waiting)
        waiting.sendall(b"GET /breakers HTTP/1.0\r\nHost: localhost\r\n\r\n")
        assert select.select([waiting], [], [], 0.5)[0] == []
        links[0].sendall(b"\r\n")
        assert waiting.recv(12) == b"HTTP/1.0 200"
    finally:
        for link in links:
            link.close()


@pytest.mark.parametrize("rest", [b"", b"Content-Length: 2\r\n\r\n{"])
def test_unfinished_request_makes_room_for_others(client, monkeypatch, rest):
    """The server cuts off a connection that lacks the rest of its head or body."""
    monkeypatch.setattr(module, "CROWDED_TIMEOUT", 0.05)
    head = b"PATCH /breakers/weather HTTP/1.0\r\nHost: localhost\r\n" + rest
    links = []
    try:
        for _ in range(module.CONNECTIONS):
            links.append(socket.create_connection(("127.0.0.1", client.port), PATIENCE))
            links[-1].sendall(head)
        begun = time.monotonic()
        until(client.is_answered)
        assert time.monotonic() - begun < module.CONNECTION_TIMEOUT / 2
    finally:
        for link in links:
            link.close()


HEAD = b"GET /breakers HTTP/1.0\r\nHost: localhost\r\n"
UNFINISHED = {
    "part of a line": b"GET",
    "head without its end": HEAD,
    "head that is too long": HEAD + b"X: %b\r\n" % (b"x" * 60_000),
    "body without its end": HEAD.replace(b"GET /breakers", b"PATCH /breakers/weather")
    + b"Content-Length: 2\r\n\r\n{",
}


@pytest.mark.parametrize("raw", list(UNFINISHED.values())[:3], ids=list(UNFINISHED)[:3])
def test_unfinished_head_is_not_served(serve, raw):
    """The server makes no page for a client that has hung up or was cut off."""
    served = []
    assert "400" in serve(served.append, console=Console([])).send(raw)
    assert served == []


def test_head_that_is_too_long_is_refused(client):
    """The server answers a head below the limit and refuses a longer head."""
    fields = b"X: %b\r\n" % (b"x" * (module.MAX_HEAD // 4))
    assert "200 OK" in client.send(HEAD + 3 * fields + b"\r\n")
    assert " 400 " in client.send(HEAD + 4 * fields + b"\r\n")


def test_application_beside_the_console_reads_a_body_as_it_likes(serve):
    """The application reads a body line by line, although the body is longer than a
    head may be."""

    def echo(environ, start_response):
        body = environ["wsgi.input"]
        start_response("200 OK", [])
        return [body.readline(), *itertools.islice(body, 1), body.read(5)]

    client = serve(Console([]).mount(echo, "/ops"))
    line = b"x" * module.MAX_HEAD + b"\n"
    assert client.post("/", 2 * line + b"tail.").text.encode() == 2 * line + b"tail."


def test_client_that_sends_small_pieces_is_read_only_so_often(monkeypatch):
    """The server pauses before each read but the first three, so that the system
    collects more bytes. A body that follows its head is read without a pause."""
    events = []
    monkeypatch.setattr(module.time, "sleep", events.append)

    class SmallPieces:
        def recv_into(self, buffer):
            events.append("read")
            buffer[:2] = b"x\n"
            return 2

    request = module._RequestReader(SmallPieces(), lambda: None)
    for _ in range(6):
        assert request.readline() == b"x\n"
    assert events == ["read"] * 3 + [module.SMALL_READ_PAUSE, "read"] * 3


@pytest.mark.parametrize("raw", UNFINISHED.values(), ids=UNFINISHED)
def test_idle_connections_are_accepted_slowly(serve, weather, monkeypatch, raw):
    """The server accepts a limited number of idle connections, and does not count a
    connection that has brought a request."""
    monkeypatch.setattr(module, "IDLE_BURST", 5)
    monkeypatch.setattr(module, "IDLE_A_SECOND", 0.0)
    client = serve(Console([weather]))
    for _ in range(8):
        assert client.get("/breakers").status == 200
    for _ in range(5):
        client.send(raw)
    check_others_wait(client, monkeypatch)


def test_unread_bytes_count_as_idle_connections(serve, weather, monkeypatch):
    """Reading bytes that no request needs costs the process time, so many such bytes
    count as an idle connection."""
    monkeypatch.setattr(module, "IDLE_BURST", 5)
    monkeypatch.setattr(module, "IDLE_A_SECOND", 0.0)
    monkeypatch.setattr(module, "WASTED_BYTES", 100_000)
    client = serve(Console([weather]))
    answer = client.patch("/breakers/weather", {"fail_max": " " * 500_000})
    assert answer.status == 413
    check_others_wait(client, monkeypatch)


def check_others_wait(client, monkeypatch):
    """Check that other connections wait until the server may accept connections
    again."""

    def has_to_wait():
        with socket.create_connection(("127.0.0.1", client.port), PATIENCE) as link:
            link.sendall(b"GET /breakers HTTP/1.0\r\nHost: localhost\r\n\r\n")
            if select.select([link], [], [], 1.0)[0]:
                return False  # the server has not yet counted the last connection
            monkeypatch.setattr(module, "IDLE_A_SECOND", 1000.0)
            assert link.recv(12) == b"HTTP/1.0 200"
            return True

    # On a busy machine an answer may take a second, so the test does not ask often.
    until(has_to_wait, patience=5, pause=0.5)


def test_server_pauses_when_accept_fails(weather, monkeypatch):
    """Without file descriptors the server pauses, and goes on when there are
    descriptors again."""
    monkeypatch.setattr(module, "ACCEPT_PAUSE", 0.05)
    server = module.serve(Console([weather]), port=0)
    failures, enough = [], threading.Event()
    accept = module.socketserver.TCPServer.get_request

    def failing(self):
        if enough.is_set():
            return accept(self)
        failures.append(time.monotonic())
        if len(failures) == 4:
            enough.set()
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(module.socketserver.TCPServer, "get_request", failing)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        assert Client(server.server_port).get("/breakers").status == 200
    finally:
        server.shutdown()
        thread.join(PATIENCE)
        server.server_close()
    assert failures[3] - failures[0] >= 3 * 0.05
    assert server._slots._value == module.CONNECTIONS


# Ways to run the console


def test_console_listens_on_the_loopback_address_unless_told_otherwise():
    """No client of the network reaches the console by accident."""
    with module.serve(Console(), port=0) as server:
        assert server.server_address[0] == "127.0.0.1"


def test_console_can_be_mounted_beside_an_application(serve, weather):
    """The URLs of the console begin with the path at which the console is mounted."""

    def application(environ, start_response):
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [b"The application."]

    console = Console([weather])
    mounted = console.mount(application, "/ops \xfc")
    root = "/ops%20%C3%BC"
    client = serve(mounted, root, console)
    assert client.get("/").text == client.get("/opsx").text == "The application."
    check_mounted(client, weather)


def check_mounted(client, breaker):
    """Check that every page and request of the console works under the mount path."""
    root = client.root
    assert client.get(root).status in (200, 307, 308)
    assert client.get(f"{root}/").status == 200
    (listed,) = client.get(f"{root}/breakers").json()
    assert listed["url"] == f"{root}/breakers/{breaker.name}"
    page = client.confirm(client.page(), breaker.name, "Hold open")
    assert page.status == 200
    assert breaker.current_state == "open"
    assert dict(page.tags)["body"]["data-live"] == f"{root}/live"
    assert client.get(f"{root}/live").status == 200
    assert client.patch(listed["url"], {"fail_max": 9}).status == 200
    assert client.post(f"{root}/breakers/{breaker.name}/close").status == 200
    foreign = {"Origin": "http://evil.example"}
    assert (
        client.post(f"{root}/breakers/{breaker.name}/open", None, foreign).status == 403
    )
    assert breaker.current_state == "closed"
    assert client.ask("GET", f"{root}/", headers={"Host": "evil.example"}).status in (
        400,  # a framework may refuse the host first
        403,
    )


@pytest.mark.parametrize("path", ["ops", "/", "/ops/", "", 5])
def test_path_to_mount_at_is_checked(path):
    """The path must begin with a slash and end without a slash."""
    with pytest.raises(ValueError, match="path must be like '/ops'"):
        Console([]).mount(lambda environ, start_response: [], path)


def configure_django(monkeypatch):
    """Make a Django site of one page."""
    import django
    from django.conf import settings
    from django.http import HttpResponse
    from django.urls import path

    urls = type(sys)("console_urls")
    urls.urlpatterns = [path("", lambda request: HttpResponse("The application."))]
    monkeypatch.setitem(sys.modules, "console_urls", urls)
    if not settings.configured:
        settings.configure(
            ROOT_URLCONF="console_urls", ALLOWED_HOSTS=["127.0.0.1"], SECRET_KEY="x"
        )
        django.setup()


def test_console_in_flask(serve, weather):
    """Two lines mount the console, and the pages of the application stay at their
    paths."""
    flask = pytest.importorskip("flask")
    app = flask.Flask("site")
    app.add_url_rule("/", view_func=lambda: "The application.")
    console = Console([weather])
    app.wsgi_app = console.mount(app.wsgi_app, "/ops")
    client = serve(app, "/ops", console)
    assert client.get("/").text == "The application."
    check_mounted(client, weather)


def test_console_in_django(serve, weather, monkeypatch):
    """Two lines in wsgi.py mount the console."""
    pytest.importorskip("django")
    configure_django(monkeypatch)
    from django.core.wsgi import get_wsgi_application

    console = Console([weather])
    application = console.mount(get_wsgi_application(), "/ops")
    client = serve(application, "/ops", console)
    assert client.get("/").text == "The application."
    check_mounted(client, weather)


def test_console_in_fastapi(weather):
    """Two lines mount the console, with the bridge from ASGI to WSGI that FastAPI's
    documentation names."""
    fastapi = pytest.importorskip("fastapi")
    a2wsgi = pytest.importorskip("a2wsgi")
    uvicorn = pytest.importorskip("uvicorn")
    app = fastapi.FastAPI()
    app.add_api_route("/", lambda: "The application.")
    console = Console([weather])
    app.mount("/ops", a2wsgi.WSGIMiddleware(console))
    with contextlib.closing(socket.socket()) as listening:
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        thread = threading.Thread(
            target=server.run, kwargs={"sockets": [listening]}, daemon=True
        )
        thread.start()
        until(lambda: server.started)
        try:
            client = Client(listening.getsockname()[1], "/ops", console)
            assert client.get("/").text == '"The application."'
            check_mounted(client, weather)
        finally:
            server.should_exit = True
            thread.join(PATIENCE)


def test_unix_socket_serves_several_processes_of_a_host(weather, tmp_path):
    """Only the user of the process may open the socket, and a new server replaces the
    socket of a process that was killed."""
    if not hasattr(socket, "AF_UNIX"):
        pytest.skip("needs Unix sockets")
    path = os.path.relpath(tmp_path / "console.sock")  # the whole path may be too long
    for _ in range(2):
        server = module.serve(
            Console([weather], trusted_proxies=["unix"]), f"unix:{path}"
        )
        assert os.stat(path).st_mode & 0o777 == 0o600
        with pytest.raises(OSError, match="another process listens there"):
            module.serve(Console([weather]), f"unix:{path}")
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            with contextlib.closing(socket.socket(socket.AF_UNIX)) as link:
                link.settimeout(PATIENCE)
                link.connect(path)
                link.sendall(
                    b"POST /breakers/weather/open HTTP/1.0\r\nHost: localhost\r\n"
                    b"X-Forwarded-For: 10.0.0.9\r\n\r\n"
                )
                answer = b"".join(iter(lambda: link.recv(65536), b""))
            assert answer.split()[1] == b"200"
            assert weather.state.reason == "by hand, from 10.0.0.9"
        finally:
            server.shutdown()
            thread.join(PATIENCE)
            server.socket.close()  # as if the process had been killed
    server.server_close()
    assert not os.path.exists(path)


def test_fork_that_closes_its_copy_of_a_server_leaves_the_socket_in_place(tmp_path):
    """The parent goes on listening at the socket, and removes the file in the end."""
    if not (hasattr(socket, "AF_UNIX") and hasattr(os, "fork")):
        pytest.skip("needs Unix sockets and forks")
    script = """
import os
from pybreaker_extras.console import Console, serve
server = serve(Console([]), "unix:console.sock")
if os.fork() == 0:
    server.server_close()
    os._exit(0)
os.wait()
assert os.path.exists("console.sock")
server.server_close()
assert not os.path.exists("console.sock")
"""
    command = [sys.executable, "-c", script]
    places = [os.path.abspath(place) for place in sys.path]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
    subprocess.run(command, check=True, timeout=4 * PATIENCE, env=env, cwd=tmp_path)


def test_file_that_is_no_socket_is_not_removed(tmp_path):
    """A mistyped path does not remove a file."""
    path = tmp_path / "notes.txt"
    path.write_text("mine")
    with pytest.raises(OSError, match="is no socket"):
        module.serve(Console([]), f"unix:{path}")
    assert path.read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "error", "named"),
    [
        ({"port": "8300"}, TypeError, "port must be a whole number, not '8300'"),
        ({"port": True}, TypeError, "port must be a whole number"),
        ({"port": 65536}, ValueError, "port must be from 0 to 65535, not 65536"),
        ({"address": 5}, TypeError, "address must be a string, not 5"),
    ],
)
def test_place_to_listen_at_is_checked(arguments, error, named):
    """The error names the parameter and the value."""
    with pytest.raises(error, match=named):
        module.serve(Console([]), **arguments)


@pytest.mark.parametrize(
    "command",
    [["-m", "pybreaker_extras.console"], [str(ROOT / "examples" / "ops_console.py")]],
    ids=["module", "example"],
)
def test_demo_runs_in_one_command(command):
    """The command prints the address of the console, which shows three breakers."""
    command = [sys.executable, *command, "--port", "0"]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as process:
        try:
            line = process.stdout.readline()
            match = re.fullmatch(
                r"The console is at http://127\.0\.0\.1:(\d+)/\n", line
            )
            assert match, line
            client = Client(int(match[1]))
            assert len(client.page().rows) == len(client.get("/breakers").json()) == 3
            assert client.post("/breakers/weather/open").json()["state"] == "open"
        finally:
            process.kill()


def test_operator_steers_while_a_load_runs(serve):
    """Eight threads call while the operator moves the circuit; the console answers
    every request, and every picture is consistent."""
    breaker = CircuitBreaker(name="busy", fail_max=5, reset_timeout=0.01)
    client = serve(Console([breaker]))
    done, wrong = threading.Event(), []

    def load(func):
        while not done.wait(0.001):  # the pause leaves the console time to run
            try:
                breaker.call(func)
            except (OSError, pybreaker.CircuitBreakerError):
                pass
            except Exception as exc:
                wrong.append(exc)

    threads = [
        threading.Thread(target=load, args=(func,), daemon=True)
        for func in [int, raiser(OSError("refused"))] * 4
    ]
    for thread in threads:
        thread.start()
    try:
        for number in range(10):
            assert (
                client.patch("/breakers/busy", {"fail_max": 5 + number}).status == 200
            )
            assert client.post("/breakers/busy/open").status == 200
            picture = client.get("/breakers/busy").json()
            assert picture["state"] != "closed" or picture["retry_after"] == 0
            assert picture["opened_at"]
            assert client.get("/live").status == client.page().status == 200
    finally:
        done.set()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive(), "a thread hangs"
    assert wrong == []


# The documentation

DOCS = (ROOT / "docs" / "console.rst").read_text(encoding="utf-8")
NEEDED = {
    "Flask": ["flask"],
    "Django": ["django"],
    "FastAPI": ["fastapi", "a2wsgi"],
}


@pytest.fixture
def names(monkeypatch, tmp_path):
    """The names that a block of the documentation may use, in an empty directory. Its
    servers listen on free ports and end with the test."""
    servers = []
    serve = module.serve

    def serve_on_a_free_port(console, address="127.0.0.1", port=8300):
        servers.append(serve(console, address, 0))
        return servers[-1]

    monkeypatch.setattr(module, "serve", serve_on_a_free_port)
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "documentation", "servers": servers}
    exec("import threading; from pybreaker_extras.console import *", names)
    yield names
    for server in servers:
        server.shutdown()
        server.server_close()


def run_section(names, section):
    for block in blocks_of(DOCS):
        if block.section == section and block.kind == "python":
            run(block, names)


def test_documentation_renders():
    """Every block of the documentation is of a kind that a test in this file runs."""
    assert {block.kind for block in blocks_of(DOCS)} == {"python", "console", "nginx"}


@pytest.mark.parametrize(
    "section",
    dict.fromkeys(b.section for b in blocks_of(DOCS) if b.kind == "python"),
)
def test_python_of_the_documentation_runs(names, section, monkeypatch):
    """Each section is run as one program."""
    for needed in NEEDED.get(section, ()):
        pytest.importorskip(needed)
    if section == "Django":
        configure_django(monkeypatch)
    run_section(names, section)
    assert isinstance(names.get("console", Console([])), Console)


def test_console_of_the_documentation_is_served(names):
    """The console answers on a port and on a Unix socket."""
    run_section(names, "In a program")
    on_port, on_socket = names["servers"]
    assert Client(on_port.server_port).get("/breakers").status == 200
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as link:
        link.connect(names["path"].partition(":")[2])
        link.sendall(b"GET / HTTP/1.0\r\nHost: localhost\r\n\r\n")
        assert b"shop" in b"".join(iter(lambda: link.recv(65536), b""))


def test_authorization_of_the_documentation_authorizes(names):
    """The function authorizes the client with the key and no other client."""
    run_section(names, "Who may use it")
    assert names["authorize"]({"HTTP_X_OPS_KEY": "from your secrets"})
    assert not names["authorize"]({"HTTP_X_OPS_KEY": "guessed"})
    assert not names["authorize"]({})
    assert names["redact"]("customer 17 at ://u:p@h") == "customer *** at ://u:***@h"


@pytest.mark.skipif(not shutil.which("nginx"), reason="needs nginx")
def test_nginx_recipe_of_the_documentation_works(names, tmp_path, clock):
    """The console answers the operator who logged in, refuses a page of another site,
    and names the operator's address in the reason."""
    breaker = CircuitBreaker(name="behind nginx")
    run_section(names, "Behind nginx")
    (recipe,) = (b.text for b in blocks_of(DOCS) if b.kind == "nginx")
    (server,) = names["servers"]
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    passwords = tmp_path / "operators"
    passwords.write_text("ada:{PLAIN}secret\n")
    recipe = recipe.replace("8300", str(server.server_port))
    recipe = recipe.replace("/etc/nginx/operators", str(passwords))
    config = tmp_path / "nginx.conf"
    config.write_text(
        f"daemon off; master_process off; pid {tmp_path}/pid; error_log stderr;"
        f"events {{}} http {{ access_log off; client_body_temp_path {tmp_path}/a;"
        f"proxy_temp_path {tmp_path}/b; fastcgi_temp_path {tmp_path}/c;"
        f"uwsgi_temp_path {tmp_path}/d; scgi_temp_path {tmp_path}/e;"
        f"server {{ listen 127.0.0.1:{port};\n{recipe}\n}} }}"
    )
    command = ["nginx", "-p", str(tmp_path), "-e", "stderr", "-c", str(config)]
    login = {"Authorization": "Basic " + base64.b64encode(b"ada:secret").decode()}
    host = f"www.example.com:{port}"
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as nginx:
        try:
            client = Client(port, "/ops")

            def status():
                with contextlib.suppress(OSError):
                    return client.ask("GET", "/ops/", None, {"Host": host}).status

            assert until(status) == 401
            ask = partial(client.ask, headers={"Host": host, **login})
            page = Page(ask("GET", "/ops/"))
            row = page.row("behind nginx")
            body = urlencode({**page.fields, "do": f"yes.{row.ident}.60"})
            for origin, status in ("http://evil.example", 403), (f"http://{host}", 303):
                headers = {"Host": host, "Origin": origin, **login}
                answer = client.ask("POST", page.action, body, headers)
                assert answer.status == status
            assert breaker.state.reason == "by hand, from 127.0.0.1"
        finally:
            nginx.terminate()
