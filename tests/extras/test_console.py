"""examples/ops_console.py: driven over HTTP, as an operator, a script, a foe."""

from __future__ import annotations

import contextlib
import html.parser
import http.client
import json
import logging
import math
import re
import shlex
import socket
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from urllib.parse import quote, urlencode, urlsplit

import ops_console
import pytest
from ops_console import Console
from support import PATIENCE

import pybreaker
from pybreaker import CircuitBreaker

ROOT = Path(__file__).resolve().parents[2]

FIELDS = ["fail_counter", "fail_max", "reset_timeout"]


class Answer:
    def __init__(self, response, text):
        self.status = response.status
        self.headers = response.headers
        self.text = text

    def json(self):
        assert self.headers["Content-Type"] == "application/json; charset=utf-8"
        return json.loads(self.text)


class Client:
    """Asks the console over HTTP, one connection for each request."""

    def __init__(self, port, root=""):
        self.port = port
        self.root = root

    def ask(self, method, path, body=None, headers=()):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, PATIENCE)
        with contextlib.closing(connection):
            connection.request(method, path, body, dict(headers))
            response = connection.getresponse()
            return Answer(response, response.read().decode())

    def get(self, path):
        return self.ask("GET", path)

    def post(self, path, body=None, headers=()):
        return self.ask("POST", path, body, headers)

    def patch(self, path, values):
        return self.ask("PATCH", path, json.dumps(values))

    def send(self, raw, half_close=True):
        """Send these bytes as they are. Return what comes back."""
        with socket.create_connection(("127.0.0.1", self.port), PATIENCE) as link:
            link.sendall(raw)
            if half_close:
                link.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: link.recv(65536), b"")).decode()

    # As the person in front of a browser.

    def page(self):
        return Page(self.get(f"{self.root}/"))

    def live(self, name):
        """What the frame with the state of this breaker says, and its elements."""
        return Page(self.get(self.page().card(name).frame))

    def press(self, page, name, button, **typed):
        """Fill in the form that has the button, and press it. Return what is shown
        then; a redirection is followed."""
        form = page.card(name).form_with(button)
        fields = {**form.fields, **typed, "do": form.buttons[button]}
        answer = self.ask(
            form.attributes["method"].upper(),
            form.attributes["action"],
            urlencode(fields),
            {
                "Content-Type": "application/x-www-form-urlencoded",
                "Origin": f"http://127.0.0.1:{self.port}",
                "Sec-Fetch-Site": "same-origin",
            },
        )
        if answer.status == 303:
            answer = self.get(answer.headers["Location"].partition("#")[0])
        return Page(answer)


class Form:
    def __init__(self, attributes):
        self.attributes = attributes
        self.fields = {}
        self.buttons = {}


class Card:
    """What the page has of one breaker."""

    def __init__(self):
        self.name = ""
        self.frame = None
        self.forms = []
        self.errors = {}

    def form_with(self, button):
        (form,) = (form for form in self.forms if button in form.buttons)
        return form

    @property
    def typed(self):
        """What stands in the fields."""
        return {name: self.form_with("Set").fields[name] for name in FIELDS}


class Page(html.parser.HTMLParser):
    """A page, taken apart as a browser does it."""

    def __init__(self, answer):
        super().__init__()
        assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
        self.status, self.headers = answer.status, answer.headers
        self.cards, self.tags, self.words = [], [], []
        self.inside, self.ident, self.button = None, None, None
        self.feed(answer.text)
        self.text = " ".join("".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.inside = tag
        self.tags.append((tag, attributes))
        if tag == "section":
            self.cards.append(Card())
        elif tag == "iframe":
            self.cards[-1].frame = attributes["src"]
        elif tag == "form":
            self.cards[-1].forms.append(Form(attributes))
        elif tag == "input":
            self.cards[-1].forms[-1].fields[attributes["name"]] = attributes["value"]
        elif tag in ("button", "strong"):
            self.button, self.ident = attributes.get("value"), attributes.get("id")

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        if self.inside == "style":
            return
        self.words.append(data + " ")
        if self.inside == "h2":
            self.cards[-1].name += data
        elif self.inside == "button":
            self.cards[-1].forms[-1].buttons[data] = self.button
        elif self.inside == "strong":
            (field,) = (
                attributes["name"]
                for tag, attributes in self.tags
                if attributes.get("aria-describedby") == self.ident
            )
            self.cards[-1].errors[field] = data

    def card(self, name):
        (card,) = (card for card in self.cards if card.name == name)
        return card

    def classes(self):
        return {c for _, a in self.tags for c in (a.get("class") or "").split()}


@pytest.fixture
def serve():
    """Serves an application on a free loopback port, and returns a client."""
    with contextlib.ExitStack() as stack:

        def serve(application, root=""):
            server = ops_console.serve(application, port=0)
            stack.callback(server.server_close)
            thread = threading.Thread(
                target=server.serve_forever, args=(0.01,), daemon=True
            )
            thread.start()
            stack.callback(thread.join, PATIENCE)
            stack.callback(server.shutdown)
            return Client(server.server_port, root)

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
    """A call whose error is of no interest here."""
    with contextlib.suppress(Exception):
        breaker.call(func)


def settings(breaker):
    """All that could have been changed."""
    names = "state", "fail_counter", "fail_max", "reset_timeout", "success_threshold"
    return {name: breaker.snapshot()[name] for name in names}


# The page


def test_page_lists_the_breakers_in_their_order(client):
    """Each with a frame, three buttons, and its settings in fields."""
    page = client.page()
    assert page.status == 200
    assert [card.name for card in page.cards] == ["weather", "payments"]
    for card in page.cards:
        assert set(card.form_with("Open").buttons) == {"Open", "Half-open", "Close"}
    assert page.card("weather").typed == {
        "fail_counter": "0",
        "fail_max": "5",
        "reset_timeout": "60",
    }
    assert page.card("payments").typed["reset_timeout"] == "30.5"


@pytest.mark.parametrize("state", ["closed", "open", "half-open"])
def test_state_is_told_by_word_and_colour(client, weather, state):
    """The word is the state's name, the colour comes with the class."""
    weather.state = state
    live = client.live("weather")
    assert live.text.split("State of weather ")[1].startswith(f"{state} ")
    assert live.classes() & {"closed", "open", "half-open"} == {state}
    assert re.search(rf"\.{state} {{ background: #\w+ }}", ops_console.STYLE)


def test_failures_are_told_with_how_many_open_the_circuit(client, weather):
    """Three of five, and of infinitely many where nothing opens it."""
    weather.fail_counter = 3
    assert "3 of 5 failures" in client.live("weather").text
    weather.fail_max = math.inf
    assert "3 of \N{INFINITY} failures" in client.live("weather").text


def test_successes_are_told_with_how_many_close_the_circuit(client, weather):
    """While they are what it waits for."""
    weather.success_threshold = 3
    assert "successes" not in client.live("weather").text
    weather.half_open()
    weather.call(int)
    live = client.live("weather").text
    assert "0 of 5 failures, 1 of 3 successes" in live


def test_opening_is_told_with_its_time(client, weather):
    """In UTC, and "never" before there was one."""
    assert "Last opened never" in client.live("weather").text
    weather.open()
    moment = weather.snapshot()["opened_at"]
    told = f"Last opened {moment[:10]} {moment[11:19]} UTC"
    assert told in client.live("weather").text


def test_next_trial_is_counted_down(client, weather, clock):
    """From the timeout to the next call; a closed circuit needs none."""
    assert "Next trial none is needed" in client.live("weather").text
    weather.open()
    assert "Next trial in 60 s" in client.live("weather").text
    clock.advance(18.5)
    live = client.live("weather")
    assert "Next trial in 42 s" in live.text
    (bar,) = (attributes for tag, attributes in live.tags if tag == "progress")
    assert float(bar["value"]) == pytest.approx(18.5 / 60, abs=1e-3)
    clock.advance(41.5)
    assert "Next trial the next call" in client.live("weather").text
    weather.reset_timeout = math.inf
    assert "Next trial only by hand" in client.live("weather").text


def test_running_trial_is_told_with_the_time_that_it_has(client, weather, clock):
    """After which another call may take its place."""
    weather.open()
    clock.advance(60)
    seen = weather.call(lambda: client.live("weather").text)
    assert "half-open" in seen
    assert "Next trial runs now; another one in 60 s" in seen


def test_transitions_are_told_with_their_reasons(client, weather, clock):
    """What a service's outage and the hands of two operators leave behind."""
    refused = ConnectionError("refused")
    for _ in range(5):
        attempt(weather, raiser(refused))
    clock.advance(60)
    attempt(weather, raiser(TimeoutError("too late")))
    clock.advance(60)
    weather.call(int)
    client.post("/breakers/weather/half_open")
    weather.close()  # at a prompt
    assert [
        (t["from"], t["to"], t["reason"])
        for t in reversed(client.get("/breakers/weather").json()["transitions"])
    ] == [
        ("closed", "open", "too many failures in a row: ConnectionError('refused')"),
        ("open", "half-open", "the timeout has passed"),
        ("half-open", "open", "the trial failed: TimeoutError('too late')"),
        ("open", "half-open", "the timeout has passed"),
        ("half-open", "closed", "the trial succeeded"),
        ("closed", "half-open", "by hand, from 127.0.0.1"),
        ("half-open", "closed", "by hand"),
    ][-ops_console.TRANSITIONS :]
    live = client.live("weather").text
    assert "half-open \N{RIGHTWARDS ARROW} closed : by hand" in live
    assert live.count("\N{RIGHTWARDS ARROW}") == ops_console.TRANSITIONS


def test_trip_is_told_with_the_failure_that_did_it(client, weather):
    """And with when it was."""
    for number in range(5):
        attempt(weather, raiser(OSError(f"failure {number}")))
    (transition,) = client.get("/breakers/weather").json()["transitions"]
    reason = "too many failures in a row: OSError('failure 4')"
    assert transition["reason"] == reason
    assert transition["at"][:16] == weather.snapshot()["opened_at"][:16]
    assert reason in client.live("weather").text


def test_hand_that_moved_the_circuit_is_forgotten_with_the_request(weather):
    """Another one may come along in the same thread."""
    watch = ops_console.Watch(weather)
    watch.move("open", "somebody")
    weather.open()
    reasons = [transition["reason"] for transition in watch.transitions]
    assert reasons == ["by hand", "by hand, from somebody"]


def test_what_a_call_does_meanwhile_is_not_put_down_to_the_operator(client, weather):
    """Not even what a call does in the thread of the request."""
    watch = ops_console.Watch(weather)

    class Caller:
        """Calls as soon as the operator's request has half-opened the circuit."""

        def state_change(self, cb, old_state, new_state):
            if new_state.name == "half-open":
                with cb.calling():
                    pass

    weather.add_listener(Caller())
    watch.move("half_open", "somebody")
    reasons = [transition["reason"] for transition in watch.transitions]
    assert reasons[:2] == ["the trial succeeded", "by hand, from somebody"]


def test_calls_take_no_lock_because_of_the_console(weather):
    """All that it listens to is transitions."""
    ops_console.Watch(weather)
    weather._lock = None
    assert weather.call(int) == 0


def test_frame_reloads_itself_and_the_page_does_not(client):
    """So what is being typed is not lost, and nobody's script is needed."""
    page, live = client.page(), client.live("weather")
    assert int(live.headers["Refresh"]) <= 5
    assert "Refresh" not in page.headers
    for shown in page, live:
        tags = [tag for tag, _ in shown.tags]
        assert "script" not in tags
        assert not [a for t, a in shown.tags if t == "meta" and "http-equiv" in a]
    assert not [tag for tag, _ in live.tags if tag in ("input", "form")]


def test_frame_goes_on_reloading_when_there_is_nothing_to_show(client):
    """The breaker may come back; nobody has to reload the page for that."""
    answer = client.get("/status?breaker=missing")
    assert answer.status == 404
    assert answer.headers["Refresh"]


@pytest.mark.parametrize(
    ("button", "state"),
    [("Open", "open"), ("Half-open", "half-open"), ("Close", "closed")],
)
def test_button_moves_the_circuit(client, weather, payments, button, state):
    """That one and no other, and shows the page again."""
    weather.state = "open" if state == "closed" else "closed"
    page = client.press(client.page(), "weather", button)
    assert page.status == 200
    assert weather.current_state == state
    assert payments.current_state == "closed"


def test_settings_are_changed(client, weather):
    """All that were typed over, and the page shows them."""
    page = client.press(
        client.page(),
        "weather",
        "Set",
        fail_counter="2",
        fail_max=" 20 ",
        reset_timeout="0.5",
    )
    assert page.status == 200
    assert (weather.fail_counter, weather.fail_max, weather.reset_timeout) == (
        2,
        20,
        0.5,
    )
    assert page.card("weather").typed["reset_timeout"] == "0.5"
    assert page.card("weather").errors == {}


def test_infinity_can_be_typed(client, weather):
    """Where the library knows it, and is shown as it is typed."""
    page = client.press(
        client.page(), "weather", "Set", fail_max="inf", reset_timeout="inf"
    )
    assert weather.fail_max == weather.reset_timeout == math.inf
    assert page.card("weather").typed["fail_max"] == "inf"


def test_field_that_was_left_alone_is_not_set(client, weather):
    """What it shows may be out of date: the count has moved meanwhile."""
    page = client.page()
    weather.fail_counter = 4
    client.press(page, "weather", "Set", fail_max="20")
    assert (weather.fail_counter, weather.fail_max) == (4, 20)


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
    ],
)
def test_refused_value_stays_in_its_field_with_the_librarys_words(
    client, weather, field, typed, parsed
):
    """And nothing is changed."""
    before = settings(weather)
    page = client.press(client.page(), "weather", "Set", **{field: typed})
    with pytest.raises((TypeError, ValueError)) as refusal:
        setattr(CircuitBreaker(), field, parsed)
    card = page.card("weather")
    assert page.status == 422
    assert card.errors == {field: str(refusal.value)}
    assert card.typed[field] == typed
    assert page.card("payments").errors == {}
    assert settings(weather) == before


def test_one_refused_value_keeps_the_others_from_being_set(client, weather):
    """Each refused one has its own error; what was typed well stays as well."""
    before = settings(weather)
    typed = {"fail_counter": "x", "fail_max": "20", "reset_timeout": "-1"}
    card = client.press(client.page(), "weather", "Set", **typed).card("weather")
    assert set(card.errors) == {"fail_counter", "reset_timeout"}
    assert card.typed == typed
    assert settings(weather) == before


def test_value_that_was_refused_can_be_corrected(client, weather):
    """In the page that shows the error."""
    page = client.press(client.page(), "weather", "Set", fail_max="x", fail_counter="1")
    page = client.press(page, "weather", "Set", fail_max="7")
    assert (weather.fail_max, weather.fail_counter) == (7, 1)
    assert page.card("weather").errors == {}


def test_page_in_which_a_value_was_refused_shows_the_count_as_it_is(client, weather):
    """Not as it was when the page was first shown, or it would be set to that."""
    page = client.page()
    weather.fail_counter = 4
    page = client.press(page, "weather", "Set", fail_max="x")
    assert page.card("weather").typed["fail_counter"] == "4"
    client.press(page, "weather", "Set", fail_max="7")
    assert (weather.fail_max, weather.fail_counter) == (7, 4)


# The same for scripts


def test_breakers_are_listed_as_json(client, weather, payments):
    """What snapshot() says, where to find it, and the last transitions."""
    payments.open()
    listed = client.get("/breakers").json()
    assert client.get("/breakers/").status == 200
    moves = [listed[1].pop("transitions"), listed[0].pop("transitions")]
    assert [len(m) for m in moves] == [1, 0]
    assert listed == [
        {"url": "/breakers/weather", **weather.snapshot()},
        {"url": "/breakers/payments", **payments.snapshot()},
    ]
    assert client.get("/breakers/weather").json() == {**listed[0], "transitions": []}


def test_settings_are_patched(client, weather):
    """Those that are named; the answer is the breaker as it is then."""
    answer = client.patch("/breakers/weather", {"fail_max": 20, "fail_counter": 7})
    assert answer.status == 200
    assert answer.json()["fail_max"] == weather.fail_max == 20
    assert answer.json()["fail_counter"] == weather.fail_counter == 7
    assert weather.reset_timeout == 60


def test_null_stands_for_infinity(client, weather):
    """In what is told and in what is taken."""
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
    """The answer is the breaker as it is then."""
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
        ({"fail_max": True, "reset_timeout": [], "fail_counter": 1}, FIELDS[1:]),
    ],
)
def test_patch_is_done_as_a_whole_or_not_at_all(client, weather, values, refused):
    """Where one value is refused none is set, and each refusal is told."""
    before = settings(weather)
    answer = client.patch("/breakers/weather", values)
    assert answer.status == 422
    errors = answer.json()["errors"]
    assert list(errors) == refused
    assert all(error.startswith(f"{name} must be ") for name, error in errors.items())
    assert answer.json()["error"] == "; ".join(errors.values())
    assert settings(weather) == before


class CountingStorage(pybreaker.CircuitBreakerStorage):
    """One whose counter cannot be set, so that it takes no more than fail_max."""

    state = "closed"
    opened_at = None

    def __init__(self):
        self.failures = 0

    @property
    def counter(self):
        if self.failures is None:
            raise OSError("the database is gone")
        return self.failures

    def increment_counter(self):
        self.failures += 1

    def reset_counter(self):
        self.failures = 0


def test_what_only_a_storage_refuses_keeps_the_others_from_being_set_too(serve):
    """Its limit is in the error, as everything that the library has to say."""
    breaker = CircuitBreaker(name="shared", state_storage=CountingStorage())
    client = serve(Console([breaker]))
    values = {"fail_max": 4, "reset_timeout": 1, "fail_counter": 6}
    answer = client.patch("/breakers/shared", values)
    assert answer.status == 422
    assert "at most fail_max, 5" in answer.json()["errors"]["fail_counter"]
    assert (breaker.fail_max, breaker.reset_timeout) == (5, 60)


def test_breaker_whose_storage_is_out_of_reach_leaves_the_others_in_place(
    serve, weather, caplog
):
    """It is shown with the error; moving it is a 500 and a traceback in the log."""
    storage = CountingStorage()
    broken = CircuitBreaker(name="broken", state_storage=storage)
    client = serve(Console([broken, weather]))
    storage.failures = None
    listed = client.get("/breakers").json()
    assert listed[0]["error"] == "OSError('the database is gone')"
    assert listed[1]["state"] == "closed"
    assert client.page().card("weather").typed["fail_max"] == "5"
    assert "unknown OSError('the database is gone')" in client.live("broken").text
    answer = client.patch("/breakers/broken", {"fail_counter": 1, "fail_max": 7})
    assert (answer.status, broken.fail_max) == (500, 5)
    assert "the database is gone" in caplog.text
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
    """By its URL in the list, and from the page."""
    # Among these are names that no terminal can show.
    caplog.set_level(logging.ERROR, logger="pybreaker")
    breaker = CircuitBreaker(name=name)
    client = serve(Console([breaker]))
    (listed,) = client.get("/breakers").json()
    url = listed["url"]
    assert url == f"/breakers/{quote(name, safe='', errors='surrogatepass')}"
    assert listed["name"] == name
    assert client.get(url).json() == listed
    assert client.patch(url, {"fail_max": 20}).json()["fail_max"] == 20
    assert client.post(f"{url}/open").json()["state"] == "open"
    page = client.page()
    (card,) = page.cards
    client.press(page, card.name, "Half-open")
    assert breaker.current_state == "half-open"
    client.press(page, card.name, "Set", fail_max="30")
    assert breaker.fail_max == 30
    assert "half-open" in client.live(card.name).text


def test_slash_in_a_name_may_be_quoted_or_not(serve):
    """WSGI does not tell which it was."""
    client = serve(Console([CircuitBreaker(name="a/b")]))
    assert client.get("/breakers/a/b").json() == client.get("/breakers/a%2Fb").json()


def test_breaker_that_is_named_like_anothers_move_is_told_apart(serve):
    """What is read and patched is the breaker, what is posted is the move."""
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
    """In the order in which they were given."""
    breakers = [CircuitBreaker(name=name) for name in ("x", None, "x", "", "x")]
    client = serve(Console(breakers))
    urls = [
        listed["url"].rpartition("/")[2] for listed in client.get("/breakers").json()
    ]
    assert urls == ["x", "unnamed", "x-2", "unnamed-2", "x-3"]
    client.post("/breakers/x-2/open")
    client.press(client.page(), "unnamed-2", "Open")
    assert [b.current_state == "open" for b in breakers] == [0, 0, 1, 1, 0]


def test_breaker_can_be_added_and_renamed_later(serve, weather):
    """The console shows what is true now."""
    console = Console([])
    client = serve(console)
    assert client.get("/breakers").json() == client.page().cards == []
    console.add(weather)
    weather.name = "storms"
    assert client.get("/breakers").json()[0]["url"] == "/breakers/storms"
    assert client.get("/breakers/weather").status == 404


def curl_lines():
    """Those of the documentation, as (method, path, body)."""
    texts = [ops_console.__doc__, (ROOT / "README.rst").read_text(encoding="utf-8")]
    for line in re.findall(r"^ *(?:\$ )?(curl .*)$", "\n".join(texts), re.MULTILINE):
        words = shlex.split(line)[1:]
        method, body = "GET", None
        while words[0].startswith("-"):
            option, value = words.pop(0), words.pop(0)
            if option == "-X":
                method = value
            else:
                assert option == "-d", line
                body = value
        (url,) = words
        assert url.startswith("http://127.0.0.1:8300/"), line
        yield method, urlsplit(url).path, body


def test_every_curl_line_of_the_documentation_works(client):
    """Each answers with JSON and 200."""
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
    "unknown breaker in a form": ("POST", "/", "breaker=missing&do=open", 404),
    "no breaker in a form": ("POST", "/", "do=open", 404),
    "no text in a form": ("POST", "/", "breaker=%ff%fe&do=open", 404),
    "no breaker in a frame": ("GET", "/status", None, 404),
    "unknown move": ("POST", "/breakers/weather/explode", None, 404),
    "unknown button": ("POST", "/", "breaker=weather&do=explode", 422),
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
    "frame posted": ("POST", "/status?breaker=weather", None, 405),
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
    "field twice": ("POST", "/", "breaker=weather&do=close&do=open", 400),
    "deep": ("PATCH", "/breakers/weather", "[" * 16000, 400),
    "no JSON for a move": ("POST", "/breakers/weather/open", "now", 400),
    "no text in fields": ("POST", "/", b"breaker=weather&do=open\xff", 400),
    "many fields": ("POST", "/", "breaker=weather&do=open" + "&a=1" * 1000, 400),
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
    "too large a form": ("POST", "/", "breaker=weather&do=open&a=" + "b" * 20000, 413),
}


@pytest.mark.parametrize(
    ("method", "path", "body", "status"), BAD.values(), ids=list(BAD)
)
def test_bad_request_is_refused(client, weather, method, path, body, status):
    """With a status that says what is wrong, and words; nothing changes, and the
    console goes on."""
    before = settings(weather)
    answer = client.ask(method, path, body)
    assert answer.status == status
    assert ("Allow" in answer.headers) == (status == 405)
    if path.startswith("/breakers"):
        assert answer.json()["error"]
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
    """In the header that is there for it."""
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
    """Whatever the body would have said."""
    head = f"PATCH /breakers/weather HTTP/1.1\r\nHost: localhost\r\n{length}\r\n"
    answer = client.send((head + body).encode("latin-1"))
    assert answer.split()[1] == str(status)
    assert json.loads(answer.partition("\r\n\r\n")[2])["error"]
    assert weather.fail_max == 5
    assert client.get("/breakers/weather").status == 200


def test_body_that_never_comes_ends_with_an_answer(client, weather, monkeypatch):
    """When the server has waited long enough. Others were served meanwhile."""
    monkeypatch.setattr(ops_console.Handler, "timeout", 0.5)
    head = b"POST /breakers/weather/open HTTP/1.1\r\nHost: localhost\r\n"
    with socket.create_connection(("127.0.0.1", client.port), PATIENCE) as link:
        link.sendall(head + b"Content-Length: 2\r\n\r\n")
        assert client.get("/breakers/weather").status == 200
        assert link.recv(65536).startswith(b"HTTP/1.0 400 ")
    assert weather.current_state == "closed"


def test_client_that_talks_slowly_is_cut_off(client, weather, monkeypatch):
    """Even if it never is silent for long. Each would have a thread for ever."""
    monkeypatch.setattr(ops_console.Handler, "timeout", None)
    monkeypatch.setattr(ops_console, "PATIENCE", 0.2)
    head = b"POST /breakers/weather/open HTTP/1.1\r\n"
    with socket.create_connection(("127.0.0.1", client.port), PATIENCE) as link:
        link.sendall(head)
        assert link.recv(65536) == b""
    assert client.get("/breakers/weather").json()["state"] == "closed"


def test_of_a_client_that_was_answered_nothing_is_left(client, monkeypatch):
    """Neither a connection nor the time at which it would be cut off."""
    close_request, left, closed = (
        ops_console.Server.close_request,
        [],
        threading.Event(),
    )

    def closing(server, request):
        close_request(server, request)
        left.append((request.fileno(), dict(server._deadlines)))
        closed.set()

    monkeypatch.setattr(ops_console.Server, "close_request", closing)
    client.get("/")
    assert closed.wait(PATIENCE)
    assert left == [(-1, {})]


@pytest.mark.parametrize("raw", [b"", b"\r\n\r\n", b"\x16\x03\x01\x00", b"GET\r\n\r\n"])
def test_what_is_no_request_does_no_harm(client, raw):
    """A port scan, a client that speaks TLS, one that hangs up."""
    client.send(raw)
    assert client.get("/breakers").status == 200


@pytest.mark.parametrize(
    "path",
    ["/", "/status?breaker=weather", "/breakers", "/breakers/weather", "/missing"],
)
def test_head_is_answered_like_get_without_the_body(client, path):
    """With the same status and headers."""
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
    "form": ("POST", "/", "breaker=weather&do=open"),
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
    """Whichever way its request gives itself away."""
    before = settings(weather)
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
def test_own_page_and_clients_that_are_no_browsers_are_served(
    client, weather, method, path, body, headers
):
    """The latter say nothing of an origin."""
    before = settings(weather)
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
@pytest.mark.parametrize("path", ["/", "/breakers", "/status?breaker=weather"])
def test_unknown_host_is_refused(client, host, path):
    """Reading as well: a name that leads here could be anybody's."""
    answer = client.ask("GET", path, headers={"Host": host})
    assert answer.status == 403
    assert "host name" in answer.text


def test_request_without_a_host_is_refused(client, weather):
    """As is one that gives two of them."""
    for hosts in "", "Host: localhost\r\nHost: evil.example\r\n":
        head = f"POST /breakers/weather/open HTTP/1.0\r\n{hosts}\r\n"
        assert client.send(head.encode()).split()[1] == "403"
    assert weather.current_state == "closed"


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:80", "127.0.0.1:8300", "[::1]:8300", "[::1]"]
)
def test_loopback_is_known_by_its_names(client, host):
    """With any port: it may be forwarded."""
    assert client.ask("GET", "/breakers", headers={"Host": host}).status == 200


def test_other_hosts_have_to_be_given(serve, weather):
    """Then they are the only ones, however they are written."""
    client = serve(Console([weather], hosts=["Ops.Example"]))
    for host, status in ("ops.example:443", 200), ("localhost", 403):
        answer = client.ask("GET", "/breakers", headers={"Host": host})
        assert answer.status == status


HOSTILE = """<script>alert('x')</script><img src=x onerror="alert(1)">&lt;"""


def test_names_and_exceptions_are_escaped(serve):
    """Whatever they hold, it is text to the browser."""
    breaker = CircuitBreaker(fail_max=1, name=HOSTILE)
    client = serve(Console([breaker]))
    attempt(breaker, raiser(OSError(HOSTILE)))
    page = client.page()
    assert page.cards[0].name == HOSTILE
    live = client.live(HOSTILE)
    assert repr(OSError(HOSTILE)) in live.text
    refused = client.press(page, HOSTILE, "Set", fail_max=HOSTILE)
    assert refused.cards[0].errors == {
        "fail_max": f"fail_max must be a whole number, not {HOSTILE!r}"
    }
    assert refused.cards[0].typed["fail_max"] == HOSTILE
    for shown in page, live, refused:
        assert not [tag for tag, _ in shown.tags if tag in ("script", "img")]


def test_exception_that_cannot_be_shown_does_no_harm(client, weather, clock):
    """The transition is told all the same."""

    class Unspeakable(Exception):
        def __repr__(self):
            raise ValueError

    for _ in range(5):
        attempt(weather, raiser(Unspeakable()))
    (transition,) = client.get("/breakers/weather").json()["transitions"]
    assert transition["reason"] == "too many failures in a row: Unspeakable"


def test_exception_of_many_words_is_cut_short(client, weather):
    """The frame stays readable."""
    for _ in range(5):
        attempt(weather, raiser(OSError("x" * 100_000)))
    assert len(client.live("weather").text) < 1000


@pytest.mark.parametrize(
    "path", ["/", "/status?breaker=weather", "/breakers", "/breakers/x", "/missing"]
)
def test_every_answer_tells_the_browser_to_be_careful(client, path):
    """No script, no foreign frame around it, no guessing, no keeping."""
    headers = client.get(path).headers
    policy = dict(
        part.strip().split(" ", 1)
        for part in headers["Content-Security-Policy"].split(";")
    )
    assert policy["default-src"] == "'none'"
    assert policy["frame-ancestors"] == policy["form-action"] == "'self'"
    assert not {"script-src", "script-src-elem", "script-src-attr"} & set(policy)
    assert "unsafe" not in headers["Content-Security-Policy"]
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Cache-Control"] == "no-store"


# What is logged


@pytest.fixture
def logged(caplog):
    """What the console has logged, at the level that shows where nobody asks."""

    def logged():
        return [
            record.getMessage()
            for record in caplog.records
            if record.name == "ops_console" and record.levelno >= logging.WARNING
        ]

    return logged


def test_changes_of_two_operators_do_not_mix(serve, logged):
    """One is done before the other begins, and so the log tells it."""

    class Slow(CircuitBreaker):
        """Its `fail_max` takes so long to be set that somebody else comes along."""

        @property
        def fail_max(self):
            return self._fail_max

        @fail_max.setter
        def fail_max(self, fail_max):
            self._fail_max = fail_max
            if fail_max == 10:
                other.start()
                other.join(0.2)  # it would be done by now

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
    """From the page and from scripts alike; looking is not logged."""
    client.get("/breakers")
    client.press(client.page(), "weather", "Open")
    client.press(client.page(), "weather", "Set", fail_max="20")
    client.patch("/breakers/payments", {"fail_counter": 2, "reset_timeout": None})
    client.post("/breakers/payments/half_open")
    assert logged() == [
        "127.0.0.1: 'weather': open, was closed",
        "127.0.0.1: 'weather': fail_max = 20, was 5",
        "127.0.0.1: 'payments': fail_counter = 2, was 0",
        "127.0.0.1: 'payments': reset_timeout = inf, was 30.5",
        "127.0.0.1: 'payments': half_open, was closed",
    ]


def test_refused_change_is_not_logged_as_one(client, logged):
    """Only what a page of another site tried is, as that."""
    client.patch("/breakers/weather", {"fail_max": 0})
    client.press(client.page(), "weather", "Set", fail_max="x")
    client.post("/breakers/missing/open")
    assert logged() == []
    client.post("/breakers/weather/open", headers={"Origin": "http://evil.example"})
    assert logged() == ["127.0.0.1: refused, sent by a page of 'http://evil.example'"]


def test_line_of_the_log_stays_one_line(serve, logged):
    """Whatever is in a name or a request, control characters are escaped."""
    name = "a\r\n10.0.0.1: 'b': close\x1b[2J\u2028"
    client = serve(Console([CircuitBreaker(name=name)]))
    client.patch(f"/breakers/{quote(name)}", {"fail_max": 20})
    client.post(f"/breakers/{quote(name)}/open")
    client.ask("POST", "/", "x", {"Origin": "http://e\x1b[2J\x85.example"})
    assert len(logged()) == 3
    assert all(line.isprintable() for line in logged())


# Running it


def test_console_listens_on_the_loopback_address_unless_told_otherwise():
    """So nobody on the network gets there by accident."""
    with ops_console.serve(Console(), port=0) as server:
        assert server.server_address[0] == "127.0.0.1"


def test_console_can_be_mounted_beside_an_application(serve, weather):
    """Its own URLs then begin with where it is."""
    console = Console([weather])

    def application(environ, start_response):
        path = environ["PATH_INFO"]
        if path == "/ops \xc3\xbc" or path.startswith("/ops \xc3\xbc/"):
            environ["SCRIPT_NAME"] = path[:7]
            environ["PATH_INFO"] = path[7:]
            return console(environ, start_response)
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [b"The application."]

    root = "/ops%20%C3%BC"
    client = serve(application, root)
    assert client.get("/").text == "The application."
    assert client.get(root).status == 200
    assert client.get(f"{root}/breakers").json()[0]["url"] == f"{root}/breakers/weather"
    page = client.press(client.page(), "weather", "Open")
    assert page.status == 200
    assert weather.current_state == "open"
    assert "open" in client.live("weather").classes()


def test_demo_runs_in_one_command():
    """It says where the console is, and there are breakers with a life of their own."""
    command = [sys.executable, str(ROOT / "examples" / "ops_console.py"), "--port", "0"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        try:
            line = process.stdout.readline()
            match = re.fullmatch(
                r"The console is at http://127\.0\.0\.1:(\d+)/\n", line
            )
            assert match, line
            client = Client(int(match[1]))
            assert len(client.page().cards) == len(client.get("/breakers").json()) == 3
            assert client.post("/breakers/weather/open").json()["state"] == "open"
        finally:
            process.kill()


def test_operator_steers_while_a_load_runs(serve):
    """Eight threads call meanwhile; every request is answered, and every picture
    is consistent."""
    breaker = CircuitBreaker(name="busy", fail_max=5, reset_timeout=0.01)
    client = serve(Console([breaker]))
    done, wrong = threading.Event(), []

    def load(func):
        while not done.wait(0.001):  # leaves the console a part of the machine
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
            assert client.live("busy").status == client.page().status == 200
    finally:
        done.set()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive(), "a thread hangs"
    assert wrong == []
