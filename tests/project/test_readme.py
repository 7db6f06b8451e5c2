"""README.rst and CHANGELOG.rst: they render, and what they say is so."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import io
import json
import re
import sqlite3
import subprocess
import sys
import threading
import types
import urllib.error
import urllib.request
from unittest import mock

import prometheus_client
import pytest
import redis
from docutils import nodes
from internals import prefix_of, storage_of
from readme_support import ROOT, RUNNERS, Block, blocks_of, parse, run

import pybreaker

README = (ROOT / "README.rst").read_text(encoding="utf-8")
CHANGELOG = (ROOT / "CHANGELOG.rst").read_text(encoding="utf-8")
BLOCKS = blocks_of(README)
SECTIONS = list(dict.fromkeys(block.section for block in BLOCKS))
BASIS = "The quickest useful example"


class Service:
    """Stands in for the weather service and for the clients that reach it."""

    def __init__(self):
        self.requests = []
        self.text = "21.5"
        self.status = 200
        self.error = None

    def get(self, path, timeout=None):
        self.requests.append(path)
        if self.error is not None:
            raise self.error
        return types.SimpleNamespace(status=self.status, text=self.text)

    async def get_async(self, path):
        await asyncio.sleep(0)
        return self.get(path)

    def urlopen(self, url, timeout):
        return io.BytesIO(self.get(url, timeout).text.encode())

    def connect(self, timeout):
        return io.StringIO()


class Page:
    """The README, of which a section at a time is run."""

    def __init__(self, service, clock):
        self._names = {
            "__name__": "readme",
            "client": service,
            "async_client": types.SimpleNamespace(get=service.get_async),
            "meter": mock.Mock(),
            "application": mock.Mock(),
        }
        self._clock = clock

    def run(self, section):
        """Run the blocks of a section, which go on from the quickest example.
        Return the names that there are then."""
        names = dict(self._names)
        for block in BLOCKS:
            if block.section == BASIS != section:
                run(block, names)
        SITUATIONS.get(section, nothing_special)(names, self._clock)
        for block in BLOCKS:
            if block.section == section:
                run(block, names)
        return types.SimpleNamespace(**names)


def nothing_special(names, clock):
    """All is well when the section begins."""


def opened_a_while_ago(names, clock):
    """The service failed, and 18.5 of the 60 seconds have passed."""
    names["weather"].open()
    clock.advance(18.5)


def three_failures(names, clock):
    """Two more, and the circuit would have opened."""
    names["weather"].fail_counter = 3


SITUATIONS = {
    "What the caller sees": opened_a_while_ago,
    "Monitoring and management": three_failures,
    "At a prompt": three_failures,
}


@pytest.fixture
def service(monkeypatch):
    service = Service()
    monkeypatch.setattr(urllib.request, "urlopen", service.urlopen)
    return service


@pytest.fixture
def page(service, clock, monkeypatch, tmp_path):
    """Runs sections of the README in an empty directory, without a network."""
    databases = []
    connect = sqlite3.connect

    def remember(*args, **kwargs):
        databases.append(connect(*args, **kwargs))
        return databases[-1]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sqlite3, "connect", remember)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    registry = prometheus_client.CollectorRegistry()
    monkeypatch.setattr(prometheus_client, "REGISTRY", registry)
    monkeypatch.setenv("REDIS_URL", "redis://127.0.0.1:9")  # where nobody listens
    django_redis = types.ModuleType("django_redis")
    django_redis.get_redis_connection = {"default": redis.Redis(port=9)}.get
    monkeypatch.setitem(sys.modules, "django_redis", django_redis)
    yield Page(service, clock)
    for database in databases:
        database.close()


def trip(breaker, func, *args):
    """Call until the circuit is open, and say how many calls that took."""
    for calls in range(1, 100):
        try:
            func(*args)
        except Exception:
            if breaker.current_state == "open":
                return calls
    raise AssertionError("the circuit stays closed")


# The documents


@pytest.mark.parametrize("source", [README, CHANGELOG], ids=["README", "CHANGELOG"])
def test_renders_without_a_warning(source):
    """Nor does it use what PyPI does not allow."""
    assert list(parse(source).findall(nodes.section))


def test_changelog_begins_with_the_version_that_is_built():
    """Its first heading and setup.py name the same one."""
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    version = re.search(r'version="([^"]+)"', setup)[1]
    newest = next(parse(CHANGELOG).findall(nodes.section))
    titles = [title.astext() for title in newest.findall(nodes.title)]
    assert [title for title in titles if title[0].isdigit()][0].split()[0] == version


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"line {block.line}")
def test_every_block_is_of_a_kind_that_is_run(block):
    """No block is skipped because nobody knew what to do with it."""
    assert block.kind in RUNNERS


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        ("literal_block", "For example::\n\n    1 / 0\n"),
        ("ruby", ".. code-block:: ruby\n\n    1 / 0\n"),
        ("", ".. code-block::\n\n    1 / 0\n"),
        ("literal_block", ".. parsed-literal::\n\n    1 / 0\n"),
        ("doctest_block", ">>> 1 / 0\n"),
        ("comment", ".. code-block: python\n\n    1 / 0\n"),
    ],
)
def test_block_of_another_kind_is_found_and_refused(kind, source):
    """So the test before this one can fail."""
    (block,) = blocks_of(f"Title\n=====\n\n{source}")
    assert (block.section, block.kind) == ("Title", kind)
    with pytest.raises(KeyError):
        run(block, {})


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("console", "$ python examples/missing.py"),
        ("console", "$ python -m pip install tox && python -m nox"),
        ("console", "> pip install ."),
        ("pycon", ">>> 1 + 1\n3"),
        ("pycon", "1 + 1"),
        ("python", "assert 1 + 1 == 3"),
    ],
)
def test_block_that_does_not_work_is_noticed(kind, text):
    """A wrong command, a wrong answer, a failing statement."""
    with pytest.raises(AssertionError):
        run(Block("Title", kind, text, 1), {})


@pytest.mark.parametrize("section", SECTIONS)
def test_section_runs_as_it_is_written(page, section):
    """Its blocks in order, after those of the quickest example."""
    page.run(section)


def test_table_of_arguments_has_each_one_with_its_default():
    """In the order in which they may be given by position."""
    (section,) = [
        section
        for section in parse(README).findall(nodes.section)
        if section[0].astext() == "Arguments"
    ]
    rows = [
        [entry.astext() for entry in row.findall(nodes.entry)]
        for body in section.findall(nodes.tbody)
        for row in body.findall(nodes.row)
    ]
    parameters = inspect.signature(pybreaker.CircuitBreaker).parameters.values()
    assert [row[:2] for row in rows] == [[p.name, repr(p.default)] for p in parameters]


# What the sections say


def test_quickest_example_answers_at_once_during_an_outage(page, service, clock):
    """Five requests go out, then one each minute, until the service is back."""
    example = page.run(BASIS)
    service.error = urllib.error.URLError("refused")
    for _ in range(20):
        assert example.weather_page("paris") == "There is no forecast at the moment."
    assert len(service.requests) == 5
    clock.advance(60)
    for _ in range(20):
        example.weather_page("paris")
    assert len(service.requests) == 6
    service.error = None
    clock.advance(60)
    assert example.weather_page("paris") == "21.5"
    assert example.weather.current_state == "closed"


def test_instances_share_the_breaker_of_a_decorated_method(page, service):
    """A failure of one station counts for the other."""
    example = page.run("Functions and methods")
    service.error = OSError()
    for station in example.Station(), example.Station():
        with pytest.raises(OSError):
            station.temperature()
    assert example.weather.fail_counter == 2
    assert example.Station.temperature.__doc__.startswith("Ask the station")
    assert "unit='C'" in str(inspect.signature(example.Station.temperature))


def test_instances_have_a_breaker_each_where_bound_methods_are_guarded(page, service):
    """One sensor's open circuit leaves the other's closed."""
    example = page.run("Functions and methods")
    broken, other = example.Sensor("broken"), example.Sensor("other")
    service.error = OSError()
    for _ in range(4):
        with pytest.raises(OSError):
            broken.read()
    with pytest.raises(pybreaker.CircuitBreakerError, match="broken"):
        broken.read()
    service.error = None
    assert other.read().text == "21.5"


def test_call_hands_on_the_other_arguments(page, service):
    """And gives back what the function returns."""
    example = page.run("call")
    assert service.requests == ["/forecast/paris"]
    assert example.answer.text == "21.5"


def test_coroutines_are_guarded_for_their_whole_run(page, service):
    """Both spellings return what was awaited, and failures count."""
    example = page.run("Coroutines")
    assert [answer.text for answer in example.forecasts] == ["21.5", "21.5"]
    service.error = OSError()
    with pytest.raises(OSError):
        asyncio.run(example.main())
    assert example.weather.fail_counter == 1


def test_generator_is_rejected_at_its_first_step(page, service):
    """And so is no call that only makes it."""
    example = page.run("Generators")
    assert list(example.readings("https://station.example")) == [21.5]
    example.weather.open()
    iterator = example.readings("https://station.example")
    with pytest.raises(pybreaker.CircuitBreakerError):
        next(iterator)


def test_body_of_a_with_over_a_guarded_context_manager_counts(page):
    """What it raises is a failure, and the clean-up is done."""
    example = page.run("Generators")
    with pytest.raises(OSError), example.session() as opened:
        raise OSError
    assert opened.closed
    assert example.weather.fail_counter == 1


def test_blocks_are_guarded(page, service):
    """The plain one ran, and a failure in the async one counts."""
    example = page.run("Blocks")
    assert example.answer.text == "21.5"
    service.error = OSError()
    with pytest.raises(OSError):
        asyncio.run(example.forecast_later("paris"))
    assert example.weather.fail_counter == 1


def test_excluded_exceptions_set_the_count_back(page):
    """The class, what the function recognises, and nothing else."""
    example = page.run("Excluding exceptions")
    not_found = OSError()
    not_found.status = 404
    for answer in example.UnknownCity(), not_found:
        example.weather.fail_counter = 3
        with pytest.raises(type(answer)):
            example.weather.call(raiser(answer))
        assert example.weather.fail_counter == 0
    for failure in OSError(), KeyError():  # KeyError was removed again
        with pytest.raises(type(failure)):
            example.weather.call(raiser(failure))
    assert example.weather.fail_counter == 2


def raiser(exc):
    """A function that raises `exc`."""

    def function():
        raise exc

    return function


def test_listener_of_the_example_keeps_a_tally(page):
    """Of every kind of event, by the breaker's name."""
    example = page.run("Listening")
    weather = example.weather
    weather.call(int)
    trip(weather, weather.call, raiser(OSError()))
    with pytest.raises(pybreaker.CircuitBreakerError), weather.calling():
        pytest.fail("the block was run")
    assert example.tally.counts == {
        ("weather", "success"): 1,
        ("weather", "failure"): 5,
        ("weather", "open"): 1,
        ("weather", "rejected"): 1,
    }


def test_transitions_are_logged_and_calls_are_not(page, caplog):
    """At the levels that the README names, on its logger."""
    caplog.set_level(0)
    weather = page.run(BASIS).weather
    trip(weather, weather.call, raiser(OSError("refused")))
    with pytest.raises(pybreaker.CircuitBreakerError):
        weather.call(int)
    weather.half_open()
    weather.call(int)
    assert [record.levelname for record in caplog.records] == [
        "WARNING",
        "INFO",
        "INFO",
    ]
    assert {record.name for record in caplog.records} == {"pybreaker"}
    opening = caplog.messages[0]
    assert all(part in opening for part in ("weather", "open", "refused", "5"))


def test_what_listeners_and_predicates_raise_is_logged(page, caplog):
    """With its traceback, and a predicate that raised did not exclude."""
    weather = page.run(BASIS).weather
    weather.add_excluded_exception(raiser(ZeroDivisionError()))  # takes no argument
    weather.add_listener(types.SimpleNamespace(failure=raiser(OSError())))
    with pytest.raises(OSError):
        weather.call(raiser(OSError()))
    assert weather.fail_counter == 1
    assert [record.levelname for record in caplog.records] == ["ERROR", "ERROR"]
    assert {record.name for record in caplog.records} == {"pybreaker"}
    assert all(record.exc_info for record in caplog.records)


def test_status_page_shows_infinite_times_as_null(page):
    """It is JSON, with all there is to know."""
    example = page.run("Monitoring and management")
    example.weather.reset_timeout = float("inf")
    (body,) = example.status_page({}, lambda status, headers: None)
    status = json.loads(body)
    assert (status["name"], status["state"]) == ("weather", "open")
    assert status["retry_after"] is None


# How to


def test_only_certain_exceptions_count(page):
    """Those that are named; every other one is an answer."""
    weather = page.run("Count only certain exceptions").weather
    for exc in ConnectionRefusedError(), TimeoutError(), ValueError():
        with pytest.raises(type(exc)):
            weather.call(raiser(exc))
    assert weather.fail_counter == 0
    assert weather.is_system_error(ConnectionRefusedError())
    assert weather.is_system_error(TimeoutError())


def test_5xx_answers_open_the_circuit_and_4xx_answers_do_not(page, service):
    """With a client that returns the answer."""
    example = page.run("Count an HTTP 5xx answer as a failure")
    service.status = 404
    for _ in range(10):
        assert example.get("/paris").status == 404
    service.status = 503
    for _ in range(4):
        with pytest.raises(example.ServerError, match="503"):
            example.get("/paris")
    with pytest.raises(pybreaker.CircuitBreakerError):
        example.get("/paris")


@pytest.mark.parametrize(("status", "counted"), [(404, 0), (499, 0), (500, 1)])
def test_raised_answers_count_from_500_on(page, service, status, counted):
    """With a client that raises for every answer from 400 on."""
    example = page.run("Count an HTTP 5xx answer as a failure")
    # Python 3.14 warns of an HTTPError that nobody has closed.
    with urllib.error.HTTPError("", status, "", {}, io.BytesIO()) as service.error:
        with pytest.raises(urllib.error.HTTPError):
            example.forecast("paris")
    assert example.weather.fail_counter == counted


@pytest.mark.parametrize(
    ("reset_timeout", "retry_after"), [(60, "60"), (0.5, "1"), (float("inf"), "3600")]
)
def test_503_says_when_to_come_back(page, reset_timeout, retry_after):
    """In whole seconds, rounded up, and at most an hour."""
    example = page.run("Answer 503 with Retry-After")
    example.weather.reset_timeout = reset_timeout
    assert get(example.application) == ("200 OK", None, b"21.5")
    example.weather.open()
    status, header, body = get(example.application)
    assert (status, header) == ("503 Service Unavailable", retry_after)
    assert body


def get(application):
    """Ask a WSGI application for /paris: its status, Retry-After and body."""
    started = []
    body = b"".join(
        application({"PATH_INFO": "/paris"}, lambda *answer: started.append(answer))
    )
    ((status, headers),) = started
    return status, dict(headers).get("Retry-After"), body


def test_each_host_has_a_breaker_of_its_own(page, service):
    """One host's failures do not keep calls from another."""
    example = page.run("Have a breaker for each host")
    service.error = OSError()
    assert trip(example.breaker_for("a.example"), example.fetch, "//a.example/x") == 5
    service.error = None
    assert example.fetch("//b.example/x").text == "21.5"
    assert example.breaker_for("a.example").name == "a.example"


def test_threads_with_the_same_new_host_get_the_same_breaker(page, monkeypatch):
    """Both make one, and one of them is kept."""
    example = page.run("Have a breaker for each host")
    both_are_making_one = threading.Barrier(2)
    make = pybreaker.CircuitBreaker

    def make_together(**kwargs):
        both_are_making_one.wait(timeout=10)
        return make(**kwargs)

    monkeypatch.setattr(pybreaker, "CircuitBreaker", make_together)
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(example.breaker_for("a.example")))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=10)
    assert len(found) == 2
    assert found[0] is found[1]


def test_circuit_kept_open_stays_open_until_told_otherwise(page, service, clock):
    """No call goes out during the maintenance, and the first one after it does."""
    section = "Keep a circuit open until told otherwise"
    (block,) = [block for block in BLOCKS if block.section == section]
    begin, end = block.text.split("# The maintenance is over.")
    names = vars(page.run(BASIS))
    run(block._replace(text=begin), names)
    clock.advance(1_000_000)
    with pytest.raises(pybreaker.CircuitBreakerError) as rejected:
        names["forecast"]("paris")
    assert rejected.value.retry_after == float("inf")
    assert service.requests == []
    run(block._replace(text=f"#{end}"), names)
    assert names["forecast"]("paris") == "21.5"
    assert names["weather"].current_state == "closed"
    assert names["weather"].reset_timeout == 60


def test_observing_breaker_counts_and_never_opens(page):
    """It knows the longest run of failures."""
    example = page.run("Have a breaker that only observes")
    for outcome in [OSError()] * 50 + [None] + [OSError()] * 20:
        if outcome is None:
            example.weather.call(int)
        else:
            with pytest.raises(OSError):
                example.weather.call(raiser(outcome))
    assert example.weather.current_state == "closed"
    assert example.weather.fail_max == float("inf")
    assert example.longest.failures == 50


@pytest.fixture
def naps(monkeypatch):
    """The pauses that tenacity makes, none of which takes any time."""
    naps = []
    fake = types.SimpleNamespace(sleep=naps.append)
    monkeypatch.setattr(importlib.import_module("tenacity.nap"), "time", fake)
    return naps


RETRY = "Use it with a retry library"


def test_retry_outside_stops_when_the_circuit_opens(page, service, naps):
    """Five requests, the last of them in the middle of the second call."""
    example = page.run(RETRY)
    service.error = OSError()
    with pytest.raises(OSError):
        example.forecast("paris")
    assert (len(service.requests), len(naps)) == (3, 2)
    with pytest.raises(pybreaker.CircuitBreakerError):
        example.forecast("paris")
    assert (len(service.requests), len(naps)) == (5, 3)


def test_retry_outside_does_not_retry_a_rejection(page, service, naps):
    """The caller hears of it at once."""
    example = page.run(RETRY)
    example.weather.open()
    with pytest.raises(pybreaker.CircuitBreakerError):
        example.forecast("paris")
    assert (service.requests, naps) == ([], [])


@pytest.mark.parametrize(
    ("function", "requests"), [("forecast", 1), ("patient_forecast", 3)]
)
def test_trial_is_one_request_or_all_attempts(
    page, service, clock, naps, function, requests
):
    """One with the retry outside, three with the retry inside."""
    example = page.run(RETRY)
    example.weather.open()
    clock.advance(60)
    service.error = OSError()
    with pytest.raises(pybreaker.CircuitBreakerError):
        getattr(example, function)("paris")
    assert len(service.requests) == requests


def test_retry_inside_makes_fifteen_requests_before_the_circuit_opens(
    page, service, naps
):
    """Three attempts are one failure."""
    example = page.run(RETRY)
    service.error = OSError()
    assert trip(example.weather, example.patient_forecast, "paris") == 5
    assert len(service.requests) == 15


@pytest.mark.parametrize(("function", "counted"), [("counted", 1), ("not_counted", 0)])
def test_timeout_counts_inside_the_guarded_code_only(page, service, function, counted):
    """The service hangs; only one of the two tells the breaker."""
    example = page.run("Put a timeout into async code")

    async def hang(path):
        """Never answer. To the event loop, ten seconds have passed."""
        loop = asyncio.get_running_loop()
        later = loop.time() + 10
        loop.time = lambda: later
        await asyncio.Event().wait()

    example.async_client.get = hang
    with pytest.raises(asyncio.TimeoutError):
        asyncio.run(getattr(example, function)("paris"))
    assert example.weather.fail_counter == counted


# Storages and types


def test_storage_of_the_example_keeps_the_circuit(page, clock):
    """A breaker made later, over another connection, finds it open."""
    example = page.run("Storages")
    assert trip(example.weather, example.weather.call, raiser(OSError())) == 5
    again = sqlite3.connect("circuits.db", isolation_level=None)
    storage = example.SQLiteStorage(again, "weather")
    breaker = pybreaker.CircuitBreaker(state_storage=storage)
    with pytest.raises(pybreaker.CircuitBreakerError):
        breaker.call(int)
    assert storage.opened_at.tzinfo is not None
    assert breaker.fail_counter == 5
    other = example.SQLiteStorage(again, "other")
    assert pybreaker.CircuitBreaker(state_storage=other).call(int) == 0


def test_storage_of_the_example_sees_a_circuit_through_to_its_recovery(page):
    """It counts trials, and is closed by the last one that is needed."""
    example = page.run("Storages")
    weather, storage = example.weather, storage_of(example.weather)
    weather.success_threshold = 2
    trip(weather, weather.call, raiser(OSError()))
    storage.opened_at = None  # long ago
    assert weather.call(int) == 0
    assert (weather.current_state, weather.success_counter) == ("half-open", 1)
    assert weather.call(int) == 0
    assert (weather.current_state, weather.success_counter) == ("closed", 0)
    assert weather.fail_counter == 0


def test_storage_of_the_example_serves_all_threads(page):
    """A failure in another thread is counted."""
    weather = page.run("Storages").weather
    raised = []

    def fail():
        try:
            weather.call(raiser(OSError()))
        except Exception as exc:
            raised.append(type(exc))

    thread = threading.Thread(target=fail)
    thread.start()
    thread.join(timeout=10)
    assert (raised, weather.fail_counter) == ([OSError], 1)


def test_circuits_of_a_fleet_are_circuits_of_their_own_where_there_is_no_redis(page):
    """Each of the three ways to set one up works, and needs no server to begin."""
    names = page.run("One circuit for a fleet")
    app = types.SimpleNamespace(
        config={"REDIS_URL": "redis://127.0.0.1:9"}, extensions={}
    )
    names.init_app(app)
    circuits = names.weather, names.payments, app.extensions["search"]
    for breaker in circuits:
        breaker.open()
    assert [breaker.current_state for breaker in circuits] == ["open"] * 3
    shared = {prefix_of(storage_of(breaker)) for breaker in circuits}
    assert shared == {
        f"{name}:pybreaker:" for name in ("weather", "payments", "search")
    }


def test_decorated_and_called_functions_return_what_the_types_say(page, service):
    """A float, with the arguments passed on."""
    example = page.run("Types")
    assert example.speed == 21.5
    assert service.requests == ["/wind/paris?height=80", "/wind/paris?height=10"]


def test_the_table_of_costs_is_the_one_that_was_measured():
    """`benchmarks/readme.py` copies it, and says whether it has."""
    command = [sys.executable, ROOT / "benchmarks" / "readme.py", "--check"]
    subprocess.run(command, check=True)
