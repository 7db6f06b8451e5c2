"""pybreaker_extras.http: clients with a breaker for each host, against a real
server."""

from __future__ import annotations

import asyncio
import email.utils
import functools
import gc
import math
import os
import pickle
import re
import subprocess
import sys
import threading
import time
import weakref

import pytest
from http_clients import (
    SHORT,
    Aiohttp,
    Httpx,
    HttpxAsync,
    Requests,
    for_each_async_client,
    for_each_client,
)
from http_service import Service
from pages import python_blocks
from support import PATIENCE, drive

import pybreaker
from pybreaker import CircuitBreaker, CircuitBreakerError, CircuitBreakers
from pybreaker_extras import http

REFUSING = "http://127.0.0.1:9"  # nothing listens on the port of discard


@pytest.fixture
def service():
    service = Service()
    yield service
    service.end()


@pytest.fixture
def make_client(request):
    """A function that makes a client of the kind that the test runs for, and closes the
    client when the test is over."""
    kind = request.param
    pytest.importorskip(kind.package)
    made = []

    def make(*args, **settings):
        made.append(kind(*args, **settings))
        return made[-1]

    yield make
    for client in made:
        client.close()


def raised_by(client, url, **options):
    """The exception that the client raises."""
    with pytest.raises(Exception) as caught:
        client.get(url, **options)
    return caught.value


def outcome_of(client, url):
    """The client's response, or the class of the exception that the client raises.
    (requests notices a short body since urllib3 2.)"""
    try:
        return client.get(url)
    except Exception as exc:
        return type(exc)


# Which breaker


@for_each_client
def test_each_host_and_port_has_its_own_breaker(make_client, service):
    breakers = CircuitBreakers(fail_max=1)
    client = make_client(breakers)
    client.get(f"{service.url}/status/500")
    assert client.get(f"{service.other_url}/fine") == (200, "hello")
    assert breakers[service.key].current_state == "open"
    assert breakers[service.other_key].current_state == "closed"
    assert list(breakers) == [service.key, service.other_key]
    assert breakers[service.key].name == service.key


@pytest.mark.parametrize(
    ("url", "key"),
    [
        ("https://API.example.org/a?b=http://c", "api.example.org:443"),
        ("http://user:secret@example.org", "example.org:80"),
        ("https://example.org:8443/", "example.org:8443"),
        ("http://[::1]/", "[::1]:80"),
        ("http+unix://socket/", "socket"),
        ("/path", None),
        ("http://", None),
        ("http://host:port/", None),
    ],
)
def test_the_key_of_a_url_is_its_host_and_port(url, key):
    assert http.host_and_port(url) == key


@for_each_client
def test_a_key_function_decides_which_breaker_a_request_has(make_client, service):
    breakers = CircuitBreakers(fail_max=1)
    client = make_client(breakers, key=lambda request: ("orders", request.method))
    client.get(f"{service.url}/status/500")
    assert client.get(service.url, method="DELETE")[0] == 200
    assert breakers["orders", "GET"].current_state == "open"
    assert breakers["orders", "DELETE"].current_state == "closed"


@for_each_client
def test_an_unhashable_key_is_a_type_error_that_names_it(make_client, service):
    client = make_client(CircuitBreakers(), key=lambda request: ["a"])
    with pytest.raises(TypeError, match=r"key must return .* not \['a'\]"):
        client.get(service.url)
    assert service.requests == []


@for_each_client
def test_an_exception_of_make_in_a_subclass_reaches_the_caller(make_client, service):
    class Picky(CircuitBreakers):
        def make(self, key):
            raise TypeError("no such host")

    with pytest.raises(TypeError, match="no such host"):
        make_client(Picky()).get(service.url)


@for_each_client
def test_a_url_without_a_host_is_left_to_the_client(make_client):
    breakers = CircuitBreakers(fail_max=1)
    mistake = raised_by(make_client(breakers), "http:///path")
    assert type(mistake) is type(raised_by(make_client(), "http:///path"))
    assert len(breakers) == 0


# What counts

BAD = ["/status/429", "/status/500", "/status/502", "/status/503", "/status/504"]


@for_each_client
@pytest.mark.parametrize("path", BAD)
def test_a_failure_status_counts_and_the_caller_gets_the_response(
    make_client, service, path
):
    breakers = CircuitBreakers(fail_max=2)
    client = make_client(breakers)
    expected = int(path[-3:]), "hello"
    # The second failure opens the circuit.
    assert [client.get(service.url + path) for _ in range(2)] == [expected] * 2
    assert breakers[service.key].current_state == "open"


@for_each_client
@pytest.mark.parametrize("status", [201, 400, 401, 404, 501])
def test_other_statuses_are_successes(make_client, service, status):
    breakers = CircuitBreakers(fail_max=2)
    client = make_client(breakers)
    client.get(f"{service.url}/status/500")
    client.get(f"{service.url}/status/{status}")
    assert breakers[service.key].fail_counter == 0


@for_each_client
def test_the_failure_statuses_can_be_chosen(make_client, service):
    breakers = CircuitBreakers(fail_max=2)
    client = make_client(breakers, failure_statuses=range(400, 500))
    client.get(f"{service.url}/status/404")
    client.get(f"{service.other_url}/status/503")
    assert breakers[service.key].fail_counter == 1
    assert breakers[service.other_key].fail_counter == 0


@for_each_client
@pytest.mark.parametrize("place", ["refused", "/reset", "/garbage", "/hang"])
@pytest.mark.parametrize("throw_new_error_on_trip", [True, False])
def test_a_connection_that_fails_counts_and_raises_what_the_client_raises(
    make_client, service, place, throw_new_error_on_trip
):
    """The failure that opens the circuit raises the client's exception, too."""
    breakers = CircuitBreakers(
        fail_max=2, throw_new_error_on_trip=throw_new_error_on_trip
    )
    url = REFUSING if place == "refused" else service.url + place
    timeout = SHORT if place == "/hang" else 30
    client, plain = make_client(breakers, timeout), make_client(None, timeout)
    expected = raised_by(plain, url)
    for _ in range(2):
        exc = raised_by(client, url)
        assert type(exc) is type(expected)
        assert type(exc.__cause__) is type(expected.__cause__)
        assert type(exc.__context__) is type(expected.__context__)
    (breaker,) = breakers.values()
    assert breaker.current_state == "open"
    assert isinstance(raised_by(client, url), CircuitBreakerError)
    service.release()


@for_each_client
def test_a_body_that_breaks_off_comes_after_the_guarded_call(make_client, service):
    breakers = CircuitBreakers(fail_max=1)
    client, plain = make_client(breakers), make_client()
    assert outcome_of(client, f"{service.url}/part") == outcome_of(
        plain, f"{service.url}/part"
    )
    assert breakers[service.key].fail_counter == 0


@for_each_client
def test_a_mistake_in_the_url_counts_for_nothing(make_client):
    breakers, url = CircuitBreakers(fail_max=1), "gopher://127.0.0.1/"
    expected = raised_by(make_client(), url)
    client = make_client(breakers)
    for _ in range(2):
        assert type(raised_by(client, url)) is type(expected)
    assert [breaker.fail_counter for breaker in breakers.values()] in ([], [0])


def body_that_fails():
    yield b"1"
    raise LookupError("the file has gone")


@pytest.mark.parametrize(
    ("make_client", "option"),
    [(Httpx, "content"), (Requests, "data")],
    indirect=["make_client"],
)
def test_an_exception_in_the_body_that_a_caller_sends_counts_for_nothing(
    make_client, service, option
):
    breakers = CircuitBreakers(fail_max=1)
    client = make_client(breakers)
    exc = raised_by(client, service.url, method="POST", **{option: body_that_fails()})
    assert type(exc) is LookupError
    assert breakers[service.key].fail_counter == 0
    assert breakers[service.key].current_state == "closed"


def test_httpx_full_pool_counts_for_nothing(service):
    httpx = pytest.importorskip("httpx")
    breakers = CircuitBreakers(fail_max=1)
    pool = httpx.HTTPTransport(limits=httpx.Limits(max_connections=1))
    timeout = httpx.Timeout(30, pool=0.05)
    with httpx.Client(
        transport=http.BreakerTransport(breakers, transport=pool), timeout=timeout
    ) as client:
        with client.stream("GET", service.url):
            with pytest.raises(httpx.PoolTimeout):
                client.get(service.url)
    assert breakers[service.key].fail_counter == 0
    assert breakers[service.key].current_state == "closed"


@pytest.mark.parametrize("is_wrapped", [False, True])
def test_urllib3_full_pool_counts_for_nothing(is_wrapped):
    requests = pytest.importorskip("requests")
    from urllib3.exceptions import EmptyPoolError, MaxRetryError

    class Full(requests.adapters.HTTPAdapter):
        def send(self, request, *args, **kwargs):
            error = EmptyPoolError(None, "full")
            if is_wrapped:
                error = MaxRetryError(None, request.url, error)
            raise requests.ConnectionError(error, request=request)

    breakers = CircuitBreakers(fail_max=1)
    with requests.Session() as session:
        session.mount("http://", http.BreakerAdapter(breakers, adapter=Full()))
        with pytest.raises(requests.ConnectionError):
            session.get("http://example.org")
    assert breakers["example.org:80"].fail_counter == 0


@for_each_client
def test_a_trial_with_a_mistake_in_its_url_gives_the_place_back(make_client, service):
    breakers = CircuitBreakers(fail_max=1, reset_timeout=0)
    client = make_client(breakers, key=lambda request: "all")
    breakers["all"].half_open()
    raised_by(client, "gopher://127.0.0.1/")
    assert breakers["all"].retry_after == 0.0
    assert client.get(service.url) == (200, "hello")
    assert breakers["all"].current_state == "closed"


class Deaf(pybreaker.CircuitBreakerListener):
    def __init__(self):
        self.told = []

    def failure(self, cb, exc):
        self.told.append(exc)


@for_each_client
def test_a_listener_is_told_of_a_failed_result_for_a_status(make_client, service):
    listener = Deaf()
    breakers = CircuitBreakers(listeners=[listener])
    make_client(breakers).get(f"{service.url}/status/503")
    (told,) = listener.told
    assert isinstance(told, pybreaker.FailedResult)
    status = getattr(told.result, "status_code", None) or told.result.status
    assert status == 503


@for_each_client
def test_the_settings_of_the_breakers_decide_too(make_client, service):
    """The exclusions of exceptions and the predicate for results work as for other
    calls."""
    breakers = CircuitBreakers(
        fail_max=1, exclude=[Exception], failure_result=lambda response: True
    )
    client = make_client(breakers)
    raised_by(client, REFUSING)
    assert breakers["127.0.0.1:9"].current_state == "closed"
    assert client.get(service.url) == (200, "hello")
    assert breakers[service.key].current_state == "open"


@for_each_client
def test_requests_leave_the_settings_of_the_breakers_alone(make_client, service):
    breakers = CircuitBreakers(maxsize=1)
    client = make_client(breakers)
    client.get(service.url)
    client.get(service.other_url)
    # The mapping has dropped the first breaker, which was as good as new.
    assert list(breakers) == [service.other_key]


# Rejections


@for_each_client
def test_a_rejection_is_an_error_of_both_libraries_and_sends_nothing(
    make_client, service
):
    breakers = CircuitBreakers()
    breakers[service.key].open(120, "maintenance")
    client = make_client(breakers)
    exc = raised_by(client, service.url)
    assert isinstance(exc, CircuitBreakerError) and isinstance(exc, client.broad)
    # It is of no narrower kind, which rules for retries would take for a failure to
    # connect.
    (broad,) = (base for base in type(exc).__bases__ if base is not CircuitBreakerError)
    assert broad is client.broad
    assert exc.breaker is breakers[service.key]
    assert 60 < exc.retry_after <= 120
    assert exc.reason == "maintenance"
    assert exc.args == ("Timeout not elapsed yet, circuit breaker still open",)
    assert str(exc).startswith(f"{service.key}: {exc.args[0]}: maintenance (next trial")
    assert exc.__context__ is None
    assert service.connections == 0


@for_each_client
def test_a_rejection_has_the_request_where_the_client_attaches_it(make_client, service):
    breakers = CircuitBreakers()
    breakers[service.key].open()
    exc = raised_by(make_client(breakers), f"{service.url}/path")
    if hasattr(type(exc), "request") or hasattr(exc, "request"):
        assert str(exc.request.url) == f"{service.url}/path"
    else:
        assert type(exc).__module__ == "pybreaker_extras._aiohttp"


@for_each_client
def test_a_rejection_survives_pickling_with_its_text(make_client, service):
    breakers = CircuitBreakers()
    breakers[service.key].open(120, "maintenance")
    exc = raised_by(make_client(breakers), service.url)
    copy = pickle.loads(pickle.dumps(exc))
    assert type(copy) is type(exc)
    assert str(copy) == str(exc)
    assert (copy.reason, copy.retry_after) == (exc.reason, exc.retry_after)
    assert copy.breaker is None


def test_a_rejection_is_pickled_without_a_request_that_cannot_be():
    requests = pytest.importorskip("requests")
    breakers = CircuitBreakers()
    breakers["example.org:80"].open()
    with requests.Session() as session:
        session.mount("http://", http.BreakerAdapter(breakers))
        with pytest.raises(requests.RequestException) as caught:
            session.post("http://example.org", data=body_that_fails())
    assert pickle.loads(pickle.dumps(caught.value)).request is None
    assert caught.value.request is not None


@for_each_client
def test_nothing_keeps_a_response_that_failed_alive(make_client, service):
    listener = Deaf()
    breakers = CircuitBreakers(fail_max=1, listeners=[listener])
    client = make_client(breakers)
    gc.collect()
    gc.disable()
    try:
        client.get(f"{service.url}/status/500")
        ref = weakref.ref(listener.told.pop().result)
        if sys.implementation.name == "cpython" and isinstance(client, Requests):
            assert ref() is None
    finally:
        gc.enable()
    gc.collect()
    assert ref() is None


class Down(Exception):
    """The exception that the hosts of `FakeLayer` raise."""


class FakeLayer(http.Layer):
    """The layer of a client whose hosts are all down."""

    def url_of(self, request):
        return request

    def is_failure(self, request, exc):
        return isinstance(exc, Down)

    def rejection(self, request):
        return CircuitBreakerError()


def is_freed(send):
    """Whether the exception of send() is freed while Python's collector is off."""
    ref = None
    gc.disable()
    try:
        send()
    except Exception as exc:
        ref = weakref.ref(exc)
    finally:
        gc.enable()
    return ref() is None


def send(request):
    raise Down


async def send_async(request):
    raise Down


@pytest.mark.skipif(
    sys.implementation.name != "cpython", reason="references are not counted here"
)
@pytest.mark.parametrize("is_async", [False, True])
def test_nothing_keeps_what_a_caller_gets_alive(is_async):
    """The caller gets the exception of a failure that counts, that of one that opens
    the circuit, or a rejection."""
    breakers = CircuitBreakers(fail_max=2)
    layer = FakeLayer(breakers, None, (500,), (503,), 300)

    def sent():
        if is_async:
            drive(layer.send_async("http://h/", send_async))
        else:
            layer.send("http://h/", send)

    states = []
    for _ in range(3):
        assert is_freed(sent)
        states.append(breakers["h:80"].current_state)
    assert states == ["closed", "open", "open"]


@for_each_client
def test_the_reason_of_an_opening_shows_the_status_and_no_header(make_client, service):
    """A header may be a cookie, and the reason is logged."""
    breakers = CircuitBreakers(fail_max=1)
    make_client(breakers).get(f"{service.url}/status/503")
    reason = breakers[service.key].state.reason
    assert "503" in reason
    assert "Content-Length" not in reason


@for_each_client
def test_a_trial_closes_the_circuit_again(make_client, service):
    breakers = CircuitBreakers(fail_max=1, reset_timeout=math.inf)
    client = make_client(breakers)
    client.get(f"{service.url}/status/500")
    assert isinstance(raised_by(client, service.url), CircuitBreakerError)
    breakers[service.key].half_open()
    assert client.get(service.url) == (200, "hello")
    assert breakers[service.key].current_state == "closed"


@for_each_client
def test_a_subclass_that_refuses_calls_refuses_requests(make_client, service):
    class Closing(CircuitBreaker):
        def call(self, func, *args, **kwargs):
            raise CircuitBreakerError("closed on Sundays")

        async def call_async(self, func, *args, **kwargs):
            raise CircuitBreakerError("closed on Sundays")

    class Breakers(CircuitBreakers):
        def make(self, key):
            return Closing(name=key)

    client = make_client(Breakers())
    exc = raised_by(client, service.url)
    assert isinstance(exc, client.broad)
    assert str(exc) == "closed on Sundays"


@for_each_client
def test_a_dry_run_sends_what_it_would_reject(make_client, service):
    breakers = CircuitBreakers(dry_run=True)
    breakers[service.key].open()
    client = make_client(breakers)
    assert client.get(f"{service.url}/status/503?after=1000") == (503, "hello")
    # The call that would have been rejected decides nothing.
    assert breakers[service.key].retry_after <= 60


# Retry-After


def opened(make_client, service, text, **settings):
    """The seconds for which a 503 with this Retry-After opens a circuit."""
    breakers = CircuitBreakers()
    client = make_client(breakers, **settings)
    client.get(f"{service.url}/status/503?after={text}")
    return breakers[service.key].retry_after


@for_each_client
def test_a_retry_after_opens_the_circuit_for_its_seconds(make_client, service):
    breakers = CircuitBreakers()
    client = make_client(breakers)
    client.get(f"{service.url}/status/503?after=120")
    breaker = breakers[service.key]
    assert 60 < breaker.retry_after <= 120
    assert breaker.state.reason == "status 503 with Retry-After: 120 s"
    assert isinstance(raised_by(client, service.url), CircuitBreakerError)


@for_each_client
def test_a_retry_after_counts_up_to_a_maximum(make_client, service):
    assert 200 < opened(make_client, service, "86400") <= 300
    assert 50 < opened(make_client, service, "86400", retry_after_max=100) <= 100
    assert opened(make_client, service, "86400", retry_after_max=0) == 0
    assert opened(make_client, service, "86400", retry_after_max=math.inf) > 86000


@for_each_client
def test_a_retry_after_counts_only_for_statuses_that_were_chosen(make_client, service):
    breakers = CircuitBreakers()
    client = make_client(breakers)
    client.get(f"{service.url}/status/429?after=120")
    client.get(f"{service.other_url}/status/200?after=120")
    assert breakers[service.key].retry_after == 0
    assert breakers[service.other_key].retry_after == 0
    client = make_client(breakers, retry_after_statuses=[429])
    client.get(f"{service.url}/status/429?after=120")
    assert breakers[service.key].retry_after > 60


def test_a_retry_after_can_be_a_date():
    future = email.utils.formatdate(time.time() + 100, usegmt=True)
    assert 50 < http.seconds_to_wait(future) <= 100
    assert http.seconds_to_wait(" 120 ") == 120


@pytest.fixture(params=["UTC", "America/New_York", "Asia/Tokyo"])
def time_zone(request, monkeypatch):
    if not hasattr(time, "tzset"):
        pytest.skip("Windows cannot change the time zone of a process")
    monkeypatch.setenv("TZ", request.param)
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.parametrize(
    "form",
    [
        "%a, %d %b %Y %H:%M:%S GMT",
        "%A, %d-%b-%y %H:%M:%S GMT",
        "%a %b %d %H:%M:%S %Y",
        "%a, %d %b %Y %H:%M:%S -0000",
        "%a, %d %b %Y %H:%M:%S",
    ],
)
def test_a_retry_after_in_any_form_of_date_is_in_universal_time(time_zone, form):
    """HTTP has three forms of dates, and one of them names no zone."""
    future = time.strftime(form, time.gmtime(time.time() + 100))
    assert 50 < http.seconds_to_wait(future) <= 100


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "0",
        "-1",
        "1e308",
        "9" * 10_000,
        "nan",
        "inf",
        "1.5",
        "٣",
        "120, 120",
        "Thu, 01 Jan 1970 00:00:00 GMT",
        "Thu, 01 Jan 99999 00:00:00 GMT",
        "Fri, 31 Feb 2050 99:99:99 GMT",
        "tomorrow",
        "\x00",
        ",",
    ],
)
def test_a_retry_after_that_is_nonsense_asks_for_nothing(text):
    assert http.seconds_to_wait(text) == 0.0


@for_each_client
def test_a_hostile_retry_after_is_no_more_than_a_failure(make_client, service):
    for text in ("-1", "1e308", "9" * 5000, "Thu,%2001"):
        assert opened(make_client, service, text) == 0


@for_each_client
def test_a_retry_after_lengthens_the_opening_that_its_failure_makes(
    make_client, service
):
    for reset_timeout, expected in ((60, 120), (200, 200)):
        breakers = CircuitBreakers(fail_max=1, reset_timeout=reset_timeout)
        client = make_client(breakers)
        assert client.get(f"{service.url}/status/503?after=120") == (503, "hello")
        assert expected - 1 < breakers[service.key].retry_after <= expected


@for_each_client
def test_a_retry_after_of_a_trial_opens_the_circuit_for_its_seconds(
    make_client, service
):
    breakers = CircuitBreakers()
    breakers[service.key].half_open()
    make_client(breakers).get(f"{service.url}/status/503?after=120")
    assert breakers[service.key].retry_after > 60


@for_each_client
def test_a_retry_after_within_a_trial_decides_nothing(make_client, service):
    breakers = CircuitBreakers()
    breaker, client = breakers[service.key], make_client(breakers)
    breaker.half_open()
    breaker.call(lambda: client.get(f"{service.url}/status/503?after=120"))
    assert breaker.current_state == "closed"


@pytest.mark.parametrize("make_client", [Httpx, Requests], indirect=True)
@pytest.mark.parametrize("move", ["open", "close", "half_open"])
def test_a_retry_after_from_another_era_is_late(make_client, service, move):
    breakers = CircuitBreakers()
    breaker = breakers[service.key]
    client = make_client(breakers)
    if isinstance(client, Requests):
        sender, name = client.client.adapters["http://"]._adapter, "send"
    else:
        sender, name = client.client._transport._transport, "handle_request"
    send = getattr(sender, name)

    def send_and_move(*args, **kwargs):
        response = send(*args, **kwargs)
        # The response has come, and the guarded call has not ended.
        getattr(breaker, move)()
        return response

    setattr(sender, name, send_and_move)
    client.get(f"{service.url}/status/503?after=120")
    assert breaker.retry_after <= 60
    names = {"open": "open", "close": "closed", "half_open": "half-open"}
    assert breaker.current_state == names[move]


@for_each_client
def test_a_retry_after_opens_no_circuit_that_a_listener_closed(make_client, service):
    class Closing(pybreaker.CircuitBreakerListener):
        def failure(self, cb, exc):
            cb.close()

    breakers = CircuitBreakers(listeners=[Closing()])
    make_client(breakers).get(f"{service.url}/status/503?after=120")
    assert breakers[service.key].current_state == "closed"


@for_each_client
@pytest.mark.parametrize("takes", ["nothing", "seconds", "both"])
def test_a_subclass_whose_open_takes_fewer_arguments_is_opened(
    make_client, service, takes
):
    class Plain(CircuitBreaker):
        def open(self):
            return super().open()

    class WithSeconds(CircuitBreaker):
        def open(self, seconds=None):
            return super().open(seconds)

    class WithBoth(CircuitBreaker):
        def open(self, seconds=None, reason=None):
            return super().open(seconds, reason)

    cls = {"nothing": Plain, "seconds": WithSeconds, "both": WithBoth}[takes]

    class Breakers(CircuitBreakers):
        def make(self, key):
            return cls(name=key)

    breakers = Breakers()
    make_client(breakers).get(f"{service.url}/status/503?after=120")
    expected = {"nothing": (60, "by hand"), "seconds": (120, "by hand")}.get(
        takes, (120, "status 503 with Retry-After: 120 s")
    )
    assert expected[0] - 1 < breakers[service.key].retry_after <= expected[0]
    assert breakers[service.key].state.reason == expected[1]


@for_each_client
def test_an_opening_that_was_asked_for_is_logged(make_client, service, caplog):
    make_client(CircuitBreakers()).get(f"{service.url}/status/503?after=120")
    (record,) = (r for r in caplog.records if r.name == "pybreaker")
    assert "status 503 with Retry-After: 120 s" in record.getMessage()


# What else the clients do


@for_each_client
def test_each_hop_of_a_redirect_has_the_breaker_of_its_host(make_client, service):
    breakers = CircuitBreakers(fail_max=1)
    client = make_client(breakers)
    there = f"{service.other_url}/status/500"
    assert client.get(f"{service.url}/redirect?to={there}") == (500, "hello")
    assert breakers[service.key].current_state == "closed"
    assert breakers[service.other_key].current_state == "open"
    exc = raised_by(client, f"{service.url}/redirect?to={there}")
    assert exc.breaker is breakers[service.other_key]


@for_each_client
def test_connections_are_used_again(make_client, service):
    breakers = CircuitBreakers(fail_max=100)
    client = make_client(breakers)
    for path in ("/", "/status/500", "/status/404", "/status/503?after=0", "/"):
        client.get(service.url + path)
    assert service.connections == 1


@pytest.mark.parametrize("make_client", [Aiohttp], indirect=True)
@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_a_request_that_aiohttp_itself_sends_again_counts_once(
    make_client, service, method
):
    """aiohttp sends a request again if the host has closed the kept connection."""
    breakers = CircuitBreakers(fail_max=1)
    client = make_client(breakers)
    for _ in range(3):
        answer = client.get(f"{service.url}/once", method=method)
        assert answer == (200, "hello")
    assert breakers[service.key].current_state == "closed"
    assert service.connections == 3


@pytest.mark.parametrize("make_client", [Aiohttp], indirect=True)
def test_a_host_that_always_hangs_up_on_aiohttp_opens_its_circuit(make_client, service):
    """The second sending of each request counts."""
    breakers = CircuitBreakers(fail_max=3)
    client, plain = make_client(breakers), make_client()
    expected = type(raised_by(plain, f"{service.url}/reset"))
    for count in (1, 2, 3):
        assert type(raised_by(client, f"{service.url}/reset")) is expected
        assert breakers[service.key].fail_counter == count
    assert breakers[service.key].current_state == "open"
    # The layer takes it that aiohttp does not send a request with a body again.
    raised_by(client, f"{service.other_url}/reset", method="PUT", data=b"body")
    assert breakers[service.other_key].fail_counter > 0


@pytest.mark.parametrize("make_client", [Aiohttp], indirect=True)
def test_aiohttp_may_be_told_not_to_send_again(make_client, service):
    breakers = CircuitBreakers()
    client = make_client(breakers)
    client.client._retry_connection = False
    raised_by(client, f"{service.url}/reset")
    assert breakers[service.key].fail_counter == 1


@for_each_async_client
def test_a_cancelled_request_counts_for_nothing(make_client, service):
    breakers = CircuitBreakers(fail_max=1)
    breaker = breakers[service.key]
    client = make_client(breakers)
    breaker.half_open()

    async def cancel():
        task = asyncio.ensure_future(client.get_async(f"{service.url}/hang"))
        while "/hang" not in service.requests:
            await asyncio.sleep(0.01)
        assert breaker.retry_after > 0
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    client.loop.run_until_complete(asyncio.wait_for(cancel(), PATIENCE))
    assert breaker.current_state == "half-open"
    assert breaker.retry_after == 0
    service.release()


@for_each_async_client
def test_requests_run_side_by_side_through_one_breaker(make_client, service):
    breakers = CircuitBreakers()
    client = make_client(breakers)

    async def several():
        tasks = [client.get_async(f"{service.url}/hang") for _ in range(5)]
        running = asyncio.ensure_future(asyncio.gather(*tasks))
        while service.requests.count("/hang") < 5:
            await asyncio.sleep(0.01)
        service.release()
        return await running

    answers = client.loop.run_until_complete(asyncio.wait_for(several(), PATIENCE))
    assert answers == [(200, "hello")] * 5


def test_httpx_streams_and_closes_as_without_the_layer(service):
    httpx = pytest.importorskip("httpx")
    transport = http.BreakerTransport(CircuitBreakers(fail_max=1))
    with httpx.Client(transport=transport) as client:
        with client.stream("GET", f"{service.url}/status/500") as response:
            assert not response.is_stream_consumed
            assert b"".join(response.iter_bytes()) == b"hello"
        pool = transport._transport._pool
        assert len(pool.connections) == 1
    assert len(pool.connections) == 0


def test_requests_streams_and_closes_as_without_the_layer(service):
    requests = pytest.importorskip("requests")
    adapter = http.BreakerAdapter(CircuitBreakers(fail_max=1))
    with requests.Session() as session:
        session.mount("http://", adapter)
        with session.get(f"{service.url}/status/500", stream=True) as response:
            assert b"".join(response.iter_content(2)) == b"hello"
        assert len(adapter.poolmanager.pools) == 1
    assert len(adapter.poolmanager.pools) == 0


def test_the_second_request_of_digest_authentication_is_guarded_too(service):
    requests = pytest.importorskip("requests")
    adapter = http.BreakerAdapter(CircuitBreakers())
    with requests.Session() as session:
        session.mount("http://", adapter)
        assert session.get(service.url).connection is adapter


@for_each_client
def test_a_response_that_its_caller_does_not_get_is_closed(make_client, service):
    class Interrupting(pybreaker.CircuitBreakerListener):
        def success(self, cb):
            raise KeyboardInterrupt

    client = make_client(CircuitBreakers(listeners=[Interrupting()]))
    closed = []

    class Response:
        status_code = status = 200
        headers = {}

        def close(self):
            closed.append(self)

        async def aclose(self):
            closed.append(self)

    async def give(request):
        return Response()

    layer = layer_of(client)
    with pytest.raises(KeyboardInterrupt):
        request = type("Request", (), {"url": service.url})()
        if hasattr(client, "loop"):
            client.loop.run_until_complete(layer.send_async(request, give))
        else:
            layer.send(request, lambda request: Response())
    assert len(closed) == 1


def layer_of(client):
    """The layer inside a client, which has no public name."""
    if client.package == "requests":
        return client.client.adapters["http://"]._layer
    if client.package == "httpx":
        return client.client._transport._layer
    (middleware,) = client.client._middlewares
    return middleware.__closure__[0].cell_contents


# Retries on top


def test_urllib3_retries_are_within_one_guarded_call(service):
    requests = pytest.importorskip("requests")
    from urllib3.util import Retry

    breakers = CircuitBreakers(fail_max=5)
    retry = Retry(3, status_forcelist=[503], backoff_factor=0)
    inner = requests.adapters.HTTPAdapter(max_retries=retry)
    with requests.Session() as session:
        session.mount("http://", http.BreakerAdapter(breakers, adapter=inner))
        with pytest.raises(requests.exceptions.RetryError):
            session.get(f"{service.url}/status/503")
    assert service.requests == ["/status/503"] * 4
    assert breakers[service.key].fail_counter == 1


def test_httpx_retries_are_within_one_guarded_call():
    httpx = pytest.importorskip("httpx")
    breakers = CircuitBreakers(fail_max=5)
    transport = http.BreakerTransport(
        breakers, transport=httpx.HTTPTransport(retries=1)
    )
    with httpx.Client(transport=transport) as client:
        with pytest.raises(httpx.ConnectError):
            client.get(REFUSING)
    assert breakers["127.0.0.1:9"].fail_counter == 1


@for_each_client
def test_a_rule_for_retries_can_leave_rejections_alone(make_client, service):
    tenacity = pytest.importorskip("tenacity")
    breakers = CircuitBreakers(fail_max=2)
    client = make_client(breakers)
    tries = []

    @tenacity.retry(
        retry=tenacity.retry_if_not_exception_type(CircuitBreakerError),
        stop=tenacity.stop_after_attempt(10),
    )
    def fetch():
        tries.append(1)
        status, _ = client.get(f"{service.url}/status/503")
        raise ConnectionError(status)

    with pytest.raises(CircuitBreakerError):
        fetch()
    assert len(tries) == 3
    assert len(service.requests) == 2


@for_each_client
def test_a_rule_for_connections_that_failed_does_not_retry_a_rejection(
    make_client, service
):
    """Such rules name a narrow class of the client's errors."""
    tenacity = pytest.importorskip("tenacity")
    breakers = CircuitBreakers(fail_max=2)
    client = make_client(breakers)
    narrow = type(raised_by(make_client(), REFUSING))
    tries = []

    @tenacity.retry(
        retry=tenacity.retry_if_exception_type(narrow),
        stop=tenacity.stop_after_attempt(10),
    )
    def fetch():
        tries.append(1)
        client.get(REFUSING)

    with pytest.raises(CircuitBreakerError):
        fetch()
    assert len(tries) == 3


# A service with three clients and many hosts


def test_three_clients_share_the_breakers_of_their_hosts(service):
    for package in ("httpx", "requests", "aiohttp"):
        pytest.importorskip(package)
    breakers = CircuitBreakers(fail_max=4)
    clients = [kind(breakers) for kind in (Httpx, HttpxAsync, Requests, Aiohttp)]
    try:
        for client in clients:
            assert client.get(f"{service.url}/status/500") == (500, "hello")
        assert list(breakers) == [service.key]
        for client in clients:
            assert isinstance(raised_by(client, service.url), CircuitBreakerError)
    finally:
        for client in clients:
            client.close()


def test_a_hundred_hosts_of_which_some_are_dead_do_not_disturb_each_other():
    httpx = pytest.importorskip("httpx")

    def answer(request):
        if int(request.url.host.partition(".")[0][1:]) % 10 == 0:
            raise httpx.ConnectError("dead", request=request)
        return httpx.Response(200)

    breakers = CircuitBreakers(fail_max=3)
    transport = http.BreakerTransport(breakers, transport=httpx.MockTransport(answer))
    with httpx.Client(transport=transport) as client:

        def work():
            for _ in range(5):
                for number in range(100):
                    try:
                        client.get(f"http://h{number}.example.org")
                    except httpx.TransportError:
                        continue

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
    assert len(breakers) == 100
    for key, breaker in breakers.items():
        is_dead = int(key.partition(".")[0][1:]) % 10 == 0
        assert breaker.current_state == ("open" if is_dead else "closed"), key


# Bad input and missing packages


@for_each_client
@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"breakers": {}}, TypeError, r"breakers must be CircuitBreakers.*not \{\}"),
        (
            {"breakers": CircuitBreaker(name="one")},
            TypeError,
            "breakers must be .*write CircuitBreakers",
        ),
        ({"key": "host"}, TypeError, "key must be a function .*not 'host'"),
        ({"key": str}, TypeError, "key must be a function"),
        ({"failure_statuses": 503}, TypeError, "failure_statuses .*not 503"),
        ({"failure_statuses": "503"}, TypeError, "failure_statuses .*not '503'"),
        ({"failure_statuses": ["503"]}, TypeError, "failure_statuses .*'503' is no"),
        ({"failure_statuses": [True]}, TypeError, "failure_statuses .*True is no"),
        ({"failure_statuses": [5]}, ValueError, "failure_statuses .*5 is none"),
        ({"retry_after_statuses": [None]}, TypeError, "retry_after_statuses .*None"),
        ({"retry_after_max": -1}, ValueError, "retry_after_max .*not -1"),
        ({"retry_after_max": math.nan}, ValueError, "retry_after_max .*not nan"),
        ({"retry_after_max": "1"}, TypeError, "retry_after_max .*not '1'"),
        ({"retry_after_max": True}, TypeError, "retry_after_max .*not True"),
    ],
)
def test_a_bad_setting_is_refused_with_its_name(make_client, settings, error, match):
    settings = {"breakers": CircuitBreakers(), **settings}
    make_client()  # which skips the test where the package is missing
    with pytest.raises(error, match=match):
        make_layer(make_client, **settings)


async def coroutine_function(request):
    return "key"


def generator_function(request):
    yield "key"


async def async_generator_function(request):
    yield "key"


class CoroutineFunction:
    async def __call__(self, request):
        return "key"


@for_each_client
@pytest.mark.parametrize(
    "key",
    [
        coroutine_function,
        generator_function,
        async_generator_function,
        functools.partial(coroutine_function),
        CoroutineFunction(),
    ],
)
def test_a_key_that_is_no_plain_function_is_refused(make_client, key):
    """Otherwise each request would have a key, and so a breaker, of its own."""
    make_client()  # which skips the test where the package is missing
    with pytest.raises(TypeError, match="key must be a plain function"):
        make_layer(make_client, CircuitBreakers(), key=key)


def make_layer(make_client, breakers, **settings):
    name = {
        "Httpx": "BreakerTransport",
        "HttpxAsync": "AsyncBreakerTransport",
        "Requests": "BreakerAdapter",
        "Aiohttp": "breaker_middleware",
    }[type(make_client()).__name__]
    return getattr(http, name)(breakers, **settings)


@pytest.mark.parametrize("transport", [1, "x", object(), type])
def test_an_object_that_is_no_transport_is_refused(transport):
    httpx = pytest.importorskip("httpx")
    for layer in (http.BreakerTransport, http.AsyncBreakerTransport):
        with pytest.raises(TypeError, match="transport must be an httpx"):
            layer(CircuitBreakers(), transport=transport)
    for layer, wrong in (
        (http.BreakerTransport, httpx.AsyncHTTPTransport()),
        (http.AsyncBreakerTransport, httpx.HTTPTransport()),
        (http.BreakerTransport, httpx.HTTPTransport),
    ):
        with pytest.raises(TypeError, match="transport must be an httpx"):
            layer(CircuitBreakers(), transport=wrong)


@pytest.mark.parametrize("adapter", [1, "x", object(), type])
def test_an_object_that_is_no_adapter_is_refused(adapter):
    pytest.importorskip("requests")
    with pytest.raises(TypeError, match="adapter must be a requests"):
        http.BreakerAdapter(CircuitBreakers(), adapter=adapter)


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("BreakerTransport", "httpx"),
        ("AsyncBreakerTransport", "httpx"),
        ("BreakerAdapter", "requests"),
        ("breaker_middleware", "aiohttp"),
    ],
)
def test_a_missing_client_is_named_with_what_to_install(monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"pybreaker_extras._{package}", raising=False)
    with pytest.raises(ImportError, match=rf"{name} needs .*pybreaker\[{package}\]"):
        getattr(http, name)
    assert name in dir(http)


def test_an_aiohttp_without_middlewares_is_named_with_what_to_install(monkeypatch):
    aiohttp = pytest.importorskip("aiohttp")
    monkeypatch.delattr(aiohttp, "ClientMiddlewareType")
    monkeypatch.delitem(sys.modules, "pybreaker_extras._aiohttp", raising=False)
    with pytest.raises(ImportError, match=r"aiohttp 3\.12 or later"):
        http.breaker_middleware  # noqa: B018


def test_the_module_loads_no_client_before_it_is_asked_for():
    with pytest.raises(AttributeError, match="no attribute 'Missing'"):
        http.Missing  # noqa: B018
    program = (
        "import sys, pybreaker_extras.http\n"
        "print(sorted({'httpx', 'requests', 'aiohttp'} & set(sys.modules)))"
    )
    path = os.pathsep.join(filter(None, sys.path))
    environment = {**os.environ, "PYTHONPATH": path}
    output = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        timeout=4 * PATIENCE,
    )
    assert output.stdout == "[]\n", output.stderr


# The page


def test_the_page_runs_as_it_is_written(service, capsys):
    httpx = pytest.importorskip("httpx")
    requests = pytest.importorskip("requests")
    for package in ("aiohttp", "tenacity"):
        pytest.importorskip(package)
    if tuple(map(int, httpx.__version__.split(".")[:2])) < (0, 26):
        pytest.skip("the page shows how proxies are given since httpx 0.26")
    namespace, clients = {}, []
    for block in python_blocks("http"):
        text = block.replace("https://api.example.org", service.url)
        exec(text.replace("api.example.org:443", service.key), namespace)
        clients += [
            value
            for value in namespace.values()
            if isinstance(value, (httpx.Client, requests.Session))
        ]
    for client in clients:
        client.close()
    assert service.requests == ["/orders"] * 5
    assert namespace["orders"] == "hello"
    assert list(namespace["breakers"]) == [service.key]
    printed = capsys.readouterr().out
    assert f"<CircuitBreaker '{service.key}': closed" in printed
    assert re.search(rf"maintenance (60|59)\.\d+ {service.url}/orders", printed)
