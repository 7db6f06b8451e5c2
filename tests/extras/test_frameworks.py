"""docs/frameworks.rst: each recipe runs with the real framework in a process of its
own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
from pages import files_of, python_blocks
from support import PATIENCE


@pytest.fixture
def play(tmp_path):
    """Runs a program beside the files of the page."""
    for name, text in files_of("frameworks").items():
        (tmp_path / name).write_text(text)

    def play(program, **environment):
        result = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(program)],
            env={
                **os.environ,
                **environment,
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            },
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=4 * PATIENCE,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout.splitlines()

    return play


def test_every_block_of_the_page_is_a_file_that_is_run_here():
    files = files_of("frameworks")
    assert len(files) == len(python_blocks("frameworks")) == 8
    assert sorted(files) == [
        "configuration.py",
        "outages.py",
        "providers.py",
        "settings.py",
        "shop.py",
        "tasks.py",
        "urls.py",
        "web.py",
    ]


def test_fastapi_answers_503_with_retry_after_while_a_circuit_is_open(play):
    pytest.importorskip("fastapi")
    pytest.importorskip("httpx")
    lines = play(
        """
        import asyncio
        import httpx
        import shop
        from pybreaker_extras.http import AsyncBreakerTransport

        def answer(request):
            raise httpx.ConnectError("down", request=request)

        down = httpx.AsyncClient(transport=AsyncBreakerTransport(
            shop.hosts, transport=httpx.MockTransport(answer)))
        shop.app.dependency_overrides[shop.orders_service] = lambda: down

        async def main():
            transport = httpx.ASGITransport(shop.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(
                transport=transport, base_url="http://shop"
            ) as client:
                ready = await client.get("/ready")
                print(ready.status_code, ready.json())
                for _ in range(6):
                    response = await client.get("/orders/7")
                    print(response.status_code, response.headers.get("Retry-After"))
                ready = await client.get("/ready")
                print(ready.status_code, ready.json())
                shop.hosts["api.example.org:443"].open(float("inf"))
                response = await client.get("/orders/7")
                print(response.status_code, response.headers.get("Retry-After"))
                shop.hosts["api.example.org:443"].open(0)
                ready = await client.get("/ready")
                print(ready.status_code, ready.json())

        asyncio.run(main())
        """
    )
    assert lines == [
        "200 {}",
        *["500 None"] * 5,
        "503 30",
        "503 {'api.example.org:443': 'open'}",
        "503 None",
        "200 {'api.example.org:443': 'open'}",
    ]


def test_django_answers_503_with_retry_after_while_a_circuit_is_open(play):
    pytest.importorskip("django")
    lines = play(
        """
        import django
        from django.test import Client

        django.setup()
        client = Client(raise_request_exception=False)
        for _ in range(4):
            response = client.get("/pay")
            print(response.status_code, response.headers.get("Retry-After"))

        from outages import breakers
        print(breakers["payments"].fail_max)
        breakers["payments"].open(float("inf"))
        response = client.get("/pay")
        print(response.status_code, response.headers.get("Retry-After"))
        """,
        DJANGO_SETTINGS_MODULE="settings",
    )
    # The second failure opens the circuit, and raises CircuitBreakerError too.
    assert lines == ["500 None", "503 30", "503 30", "503 30", "2", "503 None"]


def test_celery_does_not_retry_a_rejection(play):
    pytest.importorskip("celery")
    lines = play(
        """
        import tasks

        result = tasks.send_mail.apply(args=["a@example.org"])
        print(type(result.result).__name__, len(tasks.sent))
        result = tasks.send_mail.apply(args=["a@example.org"])
        print(type(result.result).__name__, len(tasks.sent))

        waits = []
        retry = tasks.send_mail_when_possible.retry
        def waiting(**options):
            waits.append(options["countdown"])
            return retry(**options)
        tasks.send_mail_when_possible.retry = waiting
        result = tasks.send_mail_when_possible.apply(args=["a@example.org"])
        print(type(result.result).__name__, len(tasks.sent), len(waits))
        print(all(60 < wait <= 61 for wait in waits))
        """
    )
    # Ten retries are allowed, and the third try opens the circuit.
    assert lines == [
        "CircuitBreakerError 3",
        "CircuitBreakerError 3",
        "CircuitBreakerError 3 11",
        "True",
    ]


def test_flask_answers_503_with_retry_after_while_a_circuit_is_open(play):
    pytest.importorskip("flask")
    lines = play(
        """
        import web

        client = web.app.test_client()
        print(client.get("/stock").status_code)
        web.breaker.open()
        response = client.get("/stock")
        print(response.status_code, response.headers["Retry-After"], response.json)
        web.breaker.open(float("inf"))
        print("Retry-After" in client.get("/stock").headers)
        """
    )
    assert lines == ["200", "503 60 {'detail': 'try again later'}", "False"]


def test_settings_come_from_the_environment(play):
    lines = play(
        """
        import configuration
        print(configuration.breakers["a"])
        """,
        BREAKER_FAIL_MAX="7",
        BREAKER_RESET_TIMEOUT="inf",
    )
    assert lines == [
        "<CircuitBreaker 'a': closed, 0 of 7 failures, reset_timeout inf s>"
    ]


def test_a_chain_of_providers_passes_by_one_that_is_down(play):
    lines = play(
        """
        import providers

        asked = []
        def down(question):
            asked.append("down")
            raise ConnectionError

        chain = {"first": down, "second": str.upper}
        for _ in range(5):
            print(providers.first_answer(chain, "tea"))
        print(asked)
        try:
            providers.first_answer({"first": down}, "tea")
        except providers.CircuitBreakerError as exc:
            print(exc.breaker.name)
        """
    )
    assert lines == ["TEA"] * 5 + ["['down', 'down', 'down']", "first"]
