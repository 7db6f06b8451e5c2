"""The pages in docs: what their examples do is what the text says."""

from __future__ import annotations

import ast
import asyncio
import concurrent.futures
import importlib
import inspect
import io
import json
import logging
import queue
import re
import sqlite3
import threading
import types
import urllib.error
from pathlib import Path

import pytest
from docutils import nodes
from internals import no_other_breakers, prefix_of, storage_of
from readme_support import (
    ROOT,
    RUNNERS,
    blocks_of,
    pages_of_docs,
    parse,
    run,
    source_of,
)
from support import PATIENCE

import pybreaker

# The tests of the companions run what their pages show, with what it needs.
RUN_ELSEWHERE = {
    "docs/console.rst": "tests/extras/test_console.py",
    "docs/frameworks.rst": "tests/extras/test_frameworks.py",
    "docs/http.rst": "tests/extras/test_http.py",
    "docs/metrics.rst": "tests/extras/test_metrics_guide.py",
    "docs/testing.rst": "tests/extras/test_testing.py",
}
# What these tests run beside the Python.
OTHER_KINDS = {"docs/console.rst": ["nginx"], "docs/testing.rst": ["ini"]}
PAGES = sorted(set(pages_of_docs()) - set(RUN_ELSEWHERE))
BLOCKS = [block for page in PAGES for block in blocks_of(source_of(page), page)]
SECTIONS = list(dict.fromkeys((block.page, block.section) for block in BLOCKS))
BASIS = "guide", "A first breaker"


@pytest.fixture
def page(documents):
    """Runs a section of a page of docs."""
    return types.SimpleNamespace(
        run=lambda page, section: documents.run(f"docs/{page}.rst", section)
    )


def trip(breaker, func, *args):
    """Call until the circuit is open, and say how many calls that took."""
    for calls in range(1, 100):
        try:
            func(*args)
        except Exception:
            if breaker.current_state == "open":
                return calls
    raise AssertionError("the circuit stays closed")


# The pages


@pytest.mark.parametrize("block", BLOCKS, ids=lambda b: f"{b.page} line {b.line}")
def test_every_block_is_of_a_kind_that_is_run(block):
    """No block is skipped because the tests do not know its kind."""
    assert block.kind in RUNNERS


@pytest.mark.parametrize(
    ("page", "tests"), RUN_ELSEWHERE.items(), ids=list(RUN_ELSEWHERE)
)
def test_page_of_a_companion_is_run_by_the_tests_of_the_companion(page, tests):
    """The test file that RUN_ELSEWHERE names for a page reads the page."""
    assert Path(page).stem in source_of(tests)


@pytest.mark.parametrize("path", RUN_ELSEWHERE)
def test_page_of_a_companion_has_no_block_that_is_not_run(path):
    """Other tests run the page's Python, and its commands work in the repository."""
    for block in blocks_of(source_of(path), path):
        kinds = {"python", "text", *OTHER_KINDS.get(path, ())}
        if block.kind not in kinds:
            run(block, {})


@pytest.mark.parametrize(
    ("path", "section"), [pytest.param(*each, id=" ".join(each)) for each in SECTIONS]
)
def test_section_runs_as_it_is_written(documents, path, section):
    """The blocks of the section run in order, after the first example's blocks."""
    documents.run(path, section)


def test_table_of_arguments_has_each_one_with_its_default():
    """The arguments are in the order of the constructor."""
    (section,) = [
        section
        for section in parse(source_of("docs/opening.rst"), True).findall(nodes.section)
        if section[0].astext() == "Arguments"
    ]
    rows = [
        [entry.astext() for entry in row.findall(nodes.entry)]
        for body in section.findall(nodes.tbody)
        for row in body.findall(nodes.row)
    ]
    parameters = inspect.signature(pybreaker.CircuitBreaker).parameters.values()
    assert [row[:2] for row in rows] == [[p.name, repr(p.default)] for p in parameters]


def test_reference_has_every_public_name():
    """The reference has the public names of the module and of each companion."""
    reference = source_of("docs/reference.rst")
    module, found = "", set()
    for directive, name in re.findall(r"^\.\. (\S+):: (\S+)$", reference, re.MULTILINE):
        if directive == "currentmodule":
            module = name
        else:
            found.add(f"{module}.{name}")
    public = {f"pybreaker.{name}" for name in pybreaker.__all__}
    for path in ROOT.glob("pybreaker_extras/[!_]*.py"):
        for name in public_names(path.read_text(encoding="utf-8")):
            public.add(f"pybreaker_extras.{path.stem}.{name}")
    assert public - found == set()


def test_page_of_benchmarks_has_every_table_that_was_measured():
    """The page includes the files that the benchmarks write, and has no copies."""
    page = source_of("docs/benchmarks.rst")
    for path in ROOT.glob("benchmarks/*.rst"):
        assert f"\n.. include:: ../benchmarks/{path.name}\n" in page


def public_names(source):
    """What ``__all__`` says, without importing what the module needs. Without one, the
    names that the module loads when a program asks for them, or else its functions."""
    module = ast.parse(source)
    values = {
        statement.targets[0].id: statement.value
        for statement in module.body
        if isinstance(statement, ast.Assign)
        and isinstance(statement.targets[0], ast.Name)
    }
    listed = values.get("__all__") or values.get("_CLIENTS")
    if listed:
        return list(ast.literal_eval(listed))
    return [
        node.name
        for node in ast.walk(module)
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
    ]


def test_every_page_can_be_reached():
    """A table of contents names each page, and no table names a page that is not
    there."""
    named = {"index"}
    for path in "docs/index.rst", "docs/guide.rst":
        for contents in re.findall(
            r"^\.\. toctree::\n((?:\n|    .*\n)+)", source_of(path), re.MULTILINE
        ):
            named |= set(re.findall(r"^    (\w+)$", contents, re.MULTILINE))
    assert {f"docs/{name}.rst" for name in named} == set(pages_of_docs())


# What the sections say


def test_instances_share_the_breaker_of_a_decorated_method(page, service):
    """A failure of one station counts for the other."""
    example = page.run("guarding", "Functions and methods")
    service.error = OSError()
    for station in example.Station(), example.Station():
        with pytest.raises(OSError):
            station.temperature()
    assert example.weather.fail_counter == 2
    assert example.Station.temperature.__doc__.startswith("Ask the station")
    assert "unit='C'" in str(inspect.signature(example.Station.temperature))


def test_instances_have_a_breaker_each_where_bound_methods_are_guarded(page, service):
    """One sensor's open circuit leaves the other's closed."""
    example = page.run("guarding", "Functions and methods")
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
    """`call` returns what the function returns."""
    example = page.run("guarding", "call")
    assert service.requests == ["/forecast/paris"]
    assert example.answer.text == "21.5"


def test_coroutines_are_guarded_for_their_whole_run(page, service):
    """Both spellings return what was awaited, and failures count."""
    example = page.run("guarding", "Coroutines")
    assert [answer.text for answer in example.forecasts] == ["21.5", "21.5"]
    service.error = OSError()
    with pytest.raises(OSError):
        asyncio.run(example.main())
    assert example.weather.fail_counter == 1


def test_generator_is_rejected_at_its_first_step(page, service):
    """A call that only makes the generator is not rejected."""
    example = page.run("guarding", "Generators")
    assert list(example.readings("https://station.example")) == [21.5]
    example.weather.open()
    iterator = example.readings("https://station.example")
    with pytest.raises(pybreaker.CircuitBreakerError):
        next(iterator)


def test_body_of_a_with_over_a_guarded_context_manager_counts(page):
    """An exception of the body is a failure, and the clean-up is done."""
    example = page.run("guarding", "Generators")
    with pytest.raises(OSError), example.session() as opened:
        raise OSError
    assert opened.closed
    assert example.weather.fail_counter == 1


def test_blocks_are_guarded(page, service):
    """The plain block ran, and a failure in the async block counts."""
    example = page.run("guarding", "Blocks")
    assert example.answer.text == "21.5"
    service.error = OSError()
    with pytest.raises(OSError):
        asyncio.run(example.forecast_later("paris"))
    assert example.weather.fail_counter == 1


def test_excluded_exceptions_set_the_count_back(page):
    """The class and what the function recognizes are excluded, and nothing else."""
    example = page.run("counting", "Excluding exceptions")
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
    """The tally counts every kind of event, by the breaker's name."""
    example = page.run("listening", "Listening")
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
    """The records have the levels and the logger that the README names."""
    caplog.set_level(0)
    weather = page.run(*BASIS).weather
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
    """The log has the traceback, and a predicate that raised did not exclude."""
    weather = page.run(*BASIS).weather
    weather.add_excluded_exception(raiser(ZeroDivisionError()))  # takes no argument
    weather.add_listener(types.SimpleNamespace(failure=raiser(OSError())))
    with pytest.raises(OSError):
        weather.call(raiser(OSError()))
    assert weather.fail_counter == 1
    assert [record.levelname for record in caplog.records] == ["ERROR", "ERROR"]
    assert {record.name for record in caplog.records} == {"pybreaker"}
    assert all(record.exc_info for record in caplog.records)


def test_status_page_shows_infinite_times_as_null(page):
    """The status page is JSON, with all that a snapshot tells."""
    with no_other_breakers():
        example = page.run("operating", "A status page")
        example.weather.open(float("inf"))
        (body,) = example.status_page({}, lambda status, headers: None)
    (status,) = json.loads(body)
    assert status == example.weather.snapshot()
    assert (status["state"], status["retry_after"]) == ("open", None)


# How to


def test_only_certain_exceptions_count(page):
    """The named exceptions are failures; every other exception is a success."""
    weather = page.run("counting", "Count only certain exceptions").weather
    for exc in ConnectionRefusedError(), TimeoutError(), ValueError():
        with pytest.raises(type(exc)):
            weather.call(raiser(exc))
    assert weather.fail_counter == 0
    assert weather.is_system_error(ConnectionRefusedError())
    assert weather.is_system_error(TimeoutError())


def test_5xx_answers_open_the_circuit_and_4xx_answers_do_not(page, service):
    """The client returns the answer and does not raise."""
    example = page.run("counting", "Count an HTTP 5xx answer as a failure")
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
    """The client raises for every answer from 400 on."""
    example = page.run("counting", "Count an HTTP 5xx answer as a failure")
    # Python 3.14 warns of an HTTPError that nobody has closed.
    with urllib.error.HTTPError("", status, "", {}, io.BytesIO()) as service.error:
        with pytest.raises(urllib.error.HTTPError):
            example.forecast("paris")
    assert example.weather.fail_counter == counted


@pytest.mark.parametrize(
    ("reset_timeout", "retry_after"), [(60, "60"), (0.5, "1"), (float("inf"), "3600")]
)
def test_503_says_when_to_come_back(page, reset_timeout, retry_after):
    """Retry-After is in whole seconds, rounded up, and at most an hour."""
    example = page.run("guarding", "Answer 503 with Retry-After")
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
    example = page.run("breakers", "A breaker for each host")
    service.error = OSError()
    bad = example.breakers["a.example"]
    assert trip(bad, example.fetch, "//a.example/x") == 25
    service.error = None
    assert example.fetch("//b.example/x").text == "21.5"
    assert bad.name == "a.example"


def test_breakers_of_tenants_differ(page):
    """A subclass makes the breaker for a key of two parts."""
    tenants = page.run("breakers", "Breakers that differ").tenants
    assert tenants["api.example", "free"].fail_max == 3
    assert tenants["api.example", "paying"].fail_max == 10
    assert tenants["api.example", "free"].name == "api.example for free"


def test_health_names_each_breaker_of_the_process(page):
    """The program keeps no list of breakers of its own."""
    with no_other_breakers():
        example = page.run("breakers", "All breakers of the process")
        example.weather.open()
        assert example.health() == {"weather": "open"}


def test_observing_breaker_counts_and_never_opens(page):
    """The breaker's listener knows the longest run of failures."""
    example = page.run("opening", "Have a breaker that only observes")
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


RETRY = "guarding", "Use it with a retry library"


def test_retry_outside_stops_when_the_circuit_opens(page, service, naps):
    """Five requests go out, the last of them in the middle of the second call."""
    example = page.run(*RETRY)
    service.error = OSError()
    with pytest.raises(OSError):
        example.forecast("paris")
    assert (len(service.requests), len(naps)) == (3, 2)
    with pytest.raises(pybreaker.CircuitBreakerError):
        example.forecast("paris")
    assert (len(service.requests), len(naps)) == (5, 3)


def test_retry_outside_does_not_retry_a_rejection(page, service, naps):
    """The caller gets the rejection at once."""
    example = page.run(*RETRY)
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
    """A trial is one request with the retry outside, three with the retry inside."""
    example = page.run(*RETRY)
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
    example = page.run(*RETRY)
    service.error = OSError()
    assert trip(example.weather, example.patient_forecast, "paris") == 5
    assert len(service.requests) == 15


@pytest.mark.parametrize(("function", "counted"), [("counted", 1), ("not_counted", 0)])
def test_timeout_counts_inside_the_guarded_code_only(page, service, function, counted):
    """The service hangs; only the timeout inside is a failure to the breaker."""
    example = page.run("guarding", "Put a timeout into async code")

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
    """A breaker made later, over another connection, finds the circuit open."""
    example = page.run("storages", "A storage of your own")
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
    """The storage counts trials, and the last one needed closes the circuit."""
    example = page.run("storages", "A storage of your own")
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
    weather = page.run("storages", "A storage of your own").weather
    raised = []

    def fail():
        try:
            weather.call(raiser(OSError()))
        except Exception as exc:
            raised.append(type(exc))

    thread = threading.Thread(target=fail)
    thread.start()
    thread.join(PATIENCE)
    assert (raised, weather.fail_counter) == ([OSError], 1)


def test_circuits_of_a_fleet_are_circuits_of_their_own_where_there_is_no_redis(page):
    """Each of the three ways to set a circuit up works, and begins without a server."""
    names = page.run("fleets", "One circuit for a fleet")
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
    """Both return a float, and pass the arguments on."""
    example = page.run("guarding", "Types")
    assert example.speed == 21.5
    assert service.requests == ["/wind/paris?height=80", "/wind/paris?height=10"]


# What counts


def test_included_exceptions_alone_count_and_ignored_ones_say_nothing(page):
    """An ignored exception leaves the count alone."""
    weather = page.run("counting", "Leave exceptions out of account").weather
    weather.fail_counter = 3
    full = weather.ignore[0]
    with pytest.raises(full):
        weather.call(raiser(full()))
    assert weather.fail_counter == 3


@pytest.mark.skipif(not hasattr(asyncio, "TaskGroup"), reason="has no TaskGroup")
@pytest.mark.parametrize(("error", "counted"), [(KeyError(), 0), (OSError(), 1)])
def test_exceptions_that_a_task_group_wraps_are_judged_one_by_one(
    page, service, error, counted
):
    """An excluded exception is no failure, even if it arrives in a group."""
    example = page.run("counting", "Exception groups")
    service.error = error
    with pytest.raises(BaseException) as raised:
        asyncio.run(example.both_cities())
    assert type(raised.value).__name__ == "ExceptionGroup"
    assert example.weather.fail_counter == counted


def test_returned_500_counts_and_reaches_the_caller(page, service):
    """The listener gets the answer, and the fifth opens the circuit."""
    example = page.run("counting", "Count a returned value as a failure")
    told = []
    listener = types.SimpleNamespace(failure=lambda cb, exc: told.append(exc.result))
    example.weather.add_listener(listener)
    service.status = 500
    answers = [example.weather.call(service.get, "/paris") for _ in range(5)]
    assert told == answers
    assert example.weather.current_state == "open"


# When it opens


def test_failures_are_forgotten_with_time(page, clock):
    """Five failures open the circuit only within 30 seconds."""
    weather = page.run("opening", "Failures within a time").weather
    for _ in range(10):
        with pytest.raises(OSError):
            weather.call(raiser(OSError()))
        clock.advance(10)
    assert weather.current_state == "closed"
    assert trip(weather, weather.call, raiser(OSError())) <= 5


def test_each_failed_trial_doubles_the_wait(page, clock):
    """The wait grows from five seconds to two minutes; closing begins anew."""
    weather = page.run("opening", "Waits that grow").weather
    trip(weather, weather.call, raiser(OSError()))
    for longest in 5, 10, 20, 40, 80, 120, 120:
        assert 0.9 * longest <= weather.retry_after <= longest
        clock.advance(longest)
        with pytest.raises(pybreaker.CircuitBreakerError):
            weather.call(raiser(OSError()))
    clock.advance(120)
    weather.call(int)
    trip(weather, weather.call, raiser(OSError()))
    assert weather.retry_after <= 5


def test_circuit_opens_for_as_long_as_the_service_asked(page):
    """The caller gets the exception of the service."""
    example = page.run("opening", "As long as the service asks")
    with pytest.raises(example.TooManyRequests):
        example.weather.call(raiser(example.TooManyRequests(600)))
    assert example.weather.retry_after == pytest.approx(600)
    with pytest.raises(pybreaker.CircuitBreakerError, match="asked for a pause"):
        example.weather.call(int)


def test_maintenance_lasts_until_it_is_over(page, documents, service, clock):
    """No call goes out during the maintenance, and the first one after it does."""
    (block,) = (b for b in BLOCKS if b.section == "Maintenance")
    begin, end = block.text.split("# The maintenance is over.")
    names = vars(page.run(*BASIS))
    run(block._replace(text=begin), names)
    clock.advance(1_000_000)
    with pytest.raises(pybreaker.CircuitBreakerError, match="new disks") as rejected:
        names["forecast"]("paris")
    assert rejected.value.retry_after == float("inf")
    assert service.requests == []
    run(block._replace(text=f"#{end}"), names)
    assert names["weather"].state.reason == "disks are in"
    assert names["forecast"]("paris") == "21.5"
    assert names["weather"].current_state == "closed"


def test_three_trials_have_to_succeed(page, clock):
    """The example has a `success_threshold` of 3."""
    weather = page.run("opening", "Trials").weather
    weather.open()
    clock.advance(60)
    states = []
    for _ in range(3):
        weather.call(int)
        states.append(weather.current_state)
    assert states == ["half-open", "half-open", "closed"]


def test_dry_run_refuses_nothing_and_tells_what_it_would_have_refused(page):
    """Calls are rejected as soon as the dry run is switched off."""
    weather = page.run("opening", "Try a breaker without refusing a call").weather
    refused = []
    weather.add_listener(
        types.SimpleNamespace(rejected=lambda cb, func: refused.append(func))
    )
    weather.open()
    assert (weather.call(int), refused) == (0, [int])
    weather.dry_run = False
    with pytest.raises(pybreaker.CircuitBreakerError):
        weather.call(int)


# Listening


def test_announcer_says_why(page, capsys):
    """The announcer prints the reason in words, with the last failure."""
    weather = page.run("listening", "Why the circuit has moved").weather
    trip(weather, weather.call, raiser(OSError("refused")))
    weather.half_open()
    assert capsys.readouterr().out == (
        "weather is open: 5 failures in a row; the last: OSError('refused')\n"
        "weather is half-open: by hand\n"
    )


def test_mailer_sends_from_another_thread(page):
    """The call that opens the circuit does not wait for the mail."""
    example = page.run("listening", "Rules for listeners")
    sent, may_send = queue.SimpleQueue(), threading.Event()

    def send(text):
        assert may_send.wait(PATIENCE)
        sent.put(text)

    example.weather.add_listener(example.Mailer(send))
    example.weather.open()
    may_send.set()
    assert sent.get(timeout=PATIENCE) == "weather is open: by hand"


# Why doesn't my breaker open?


async def hang(path):
    """Never answer. To the event loop, ten seconds have passed."""
    loop = asyncio.get_running_loop()
    later = loop.time() + 10
    loop.time = lambda: later
    await asyncio.Event().wait()


@pytest.mark.parametrize(("function", "count"), [("never_counted", 0), ("counted", 1)])
def test_trap_of_a_timeout_outside(page, function, count):
    """The timeout counts only inside the guarded function."""
    title = "A timeout stands around the guarded code"
    example = page.run("trouble", title)
    example.async_client.get = hang
    with pytest.raises(asyncio.TimeoutError):
        asyncio.run(getattr(example, function)("paris"))
    assert example.weather.fail_counter == count


@pytest.mark.parametrize(("function", "count"), [("never_fails", 0), ("fails", 1)])
def test_trap_of_a_future_that_is_given_to_call(page, service, function, count):
    """Only call_async sees how the future ends."""
    title = "An awaitable that is no coroutine is given to call"
    example = page.run("trouble", title)
    service.error = OSError()
    with pytest.raises(OSError):
        asyncio.run(getattr(example, function)("paris"))
    assert example.weather.fail_counter == count


def test_trap_of_returned_errors(page, service):
    """A predicate makes a 500 a failure."""
    title = "The client returns errors and raises nothing"
    weather = page.run("trouble", title).weather
    service.status = 500
    weather.call(service.get, "/paris")
    assert weather.fail_counter == 1


def test_trap_of_successes_in_between(page):
    """With a window, a success does not set the count back."""
    weather = page.run("trouble", "Successes come between the failures").weather
    for _ in range(5):
        weather.call(int)
        with pytest.raises(Exception, match="^$|opened"):
            weather.call(raiser(OSError()))
    assert weather.current_state == "open"


def test_trap_of_a_breaker_for_each_request(page, service):
    """Such a breaker never counts to five; a breaker for each host does."""
    example = page.run("trouble", "A breaker is made for each request")
    service.error = OSError()
    for _ in range(10):
        with pytest.raises(OSError):
            example.too_new_to_know("paris")
    host = example.breakers["a.example"]
    assert trip(host, example.one_for_each_host, "a.example", "/paris") == 5


def test_trap_of_a_guarded_function_in_a_guarded_function(page, service):
    """One fault counts twice."""
    example = page.run("trouble", "A guarded function calls a guarded function")
    service.error = OSError()
    with pytest.raises(OSError):
        example.outer("paris")
    assert example.weather.fail_counter == 2


def test_trap_of_a_timeout_of_gevent(page, service):
    """A timeout for the whole request is no failure; any other timeout is one."""
    example = page.run("trouble", "A timeout of gevent comes from outside")
    for error, count in (example.RequestTimeout(10), 0), (example.gevent.Timeout(1), 1):
        service.error = error
        with pytest.raises(type(error)):
            example.view("paris")
        assert example.weather.fail_counter == count


@pytest.mark.parametrize(
    ("function", "state"), [("never_recovers", "open"), ("recovers", "closed")]
)
def test_trap_of_looking_at_current_state(page, clock, function, state):
    """Without a call there is no trial."""
    example = page.run("trouble", "The program looks at current_state first")
    example.weather.open()
    clock.advance(60)
    getattr(example, function)("paris")
    assert example.weather.current_state == state


def test_trap_of_a_trial_that_fans_out(page, service, clock):
    """With its context, a leaf call of the trial is let through in another thread;
    without, it is rejected."""
    example = page.run("trouble", "The trial fans out into threads")
    example.weather.open()
    clock.advance(60)
    answers = example.all_forecasts(["paris", "lyon"])
    assert [answer.text for answer in answers] == ["21.5", "21.5"]
    assert example.weather.current_state == "closed"

    def without_context():
        return example.pool.submit(example.city_forecast, "paris").result(10)

    example.weather.open()
    clock.advance(60)
    with pytest.raises(pybreaker.CircuitBreakerError):
        example.weather.call(without_context)
    assert example.weather.current_state == "open"
    example.pool.shutdown()


@pytest.mark.parametrize(
    ("function", "state"),
    [("lasts_as_long_as_its_reader", "half-open"), ("lines", "closed")],
)
def test_trap_of_a_trial_that_is_a_stream(page, function, state):
    """Only a trial that opens the stream is over while the stream is read."""
    example = page.run("trouble", "Trials are streams that last")
    example.weather.half_open()
    stream = getattr(example, function)("/log")
    assert next(stream) == "one\n"
    assert example.weather.current_state == state
    stream.close()


def test_trap_of_retry_after_while_a_trial_runs(page, clock):
    """A caller that waited for retry_after, a minute, would wait far too long."""
    example = page.run("trouble", "retry_after is long while a trial runs")
    example.weather.half_open()
    with example.weather.calling():
        waits = concurrent.futures.Future()

        def be_rejected():
            try:
                example.forecast("paris")
            except pybreaker.CircuitBreakerError as error:
                waits.set_result((error.retry_after, example.seconds_to_wait(error)))

        threading.Thread(target=be_rejected).start()
        assert waits.result(PATIENCE) == (60, 1)


def test_trap_of_a_bug_in_a_trial_with_a_white_list(page):
    """A bug in a trial neither closes nor opens the circuit."""
    title = "The circuit closes although the service is down"
    weather = page.run("trouble", title).weather
    weather.half_open()
    with pytest.raises(NameError):
        weather.call(raiser(NameError()))
    assert weather.current_state == "half-open"
    weather.ignore = None
    with pytest.raises(NameError):
        weather.call(raiser(NameError()))
    assert weather.current_state == "closed"


def test_trap_of_a_guarded_handler(page, service):
    """The record waits in a queue, and no request is made by the listener."""
    try:
        example = page.run("trouble", "A thread hangs when the circuit opens")
        example.weather.open()
        assert example.records.get(timeout=PATIENCE).getMessage() == "weather is open"
        assert service.requests == []
    finally:
        logging.getLogger("alerts").handlers.clear()


# Moving


def test_wrapper_of_older_programs_keeps_working(page, service, clock):
    """The code that replaces the wrapper does the same."""
    example = page.run("moving", "Delete your wrapper")
    get = example.async_client.get
    wrapped = example.call_guarded(example.weather, get, "/paris")
    assert asyncio.run(wrapped).text == "21.5"
    service.error = OSError()

    def call(make):
        return lambda: asyncio.run(make())

    for make in (
        lambda: example.call_guarded(example.weather, get, "/paris"),
        lambda: example.forecast_soon("paris"),
        example.main,
    ):
        example.weather.close()
        assert trip(example.weather, call(make)) == 5
