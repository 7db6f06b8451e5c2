"""README.rst and CHANGELOG.rst: they render, and what README says is so."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import types
import urllib.error

import pytest
from docutils import nodes
from readme_support import ROOT, RUNNERS, Block, blocks_of, parse, run, source_of

import pybreaker

README = source_of("README.rst")
BLOCKS = blocks_of(README)
SECTIONS = list(dict.fromkeys(block.section for block in BLOCKS))
QUICKEST = "README.rst", "The quickest useful example"


@pytest.mark.parametrize(
    "page", ["README.rst", "CHANGELOG.rst", "CONTRIBUTING.rst", "SECURITY.rst"]
)
def test_page_renders_without_a_warning(page):
    """The page uses nothing that PyPI does not allow."""
    assert list(parse(source_of(page)).findall(nodes.section))


def test_readme_fits_on_two_screens():
    """A reader with five minutes can read all of README."""
    assert README.count("\n") <= 250


def test_changelog_begins_with_the_version_that_is_built():
    """The first version in the changelog is the version in setup.py."""
    version = re.search(r'version="([^"]+)"', source_of("setup.py"))[1]
    newest = next(parse(source_of("CHANGELOG.rst")).findall(nodes.section))
    titles = [title.astext() for title in newest.findall(nodes.title)]
    assert [title for title in titles if title[0].isdigit()][0].split()[0] == version


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"line {block.line}")
def test_every_block_is_of_a_kind_that_is_run(block):
    """No block is skipped because the tests do not know its kind."""
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
@pytest.mark.parametrize("page", ["README.rst", "docs/guide.rst"])
def test_block_of_another_kind_is_found_and_refused(kind, source, page):
    """The check that every block is of a known kind can fail."""
    (block,) = blocks_of(f"Title\n=====\n\n{source}", page)
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
    """A wrong command, a wrong answer and a failing statement are errors."""
    with pytest.raises(AssertionError):
        run(Block("Title", kind, text, 1), {})


@pytest.mark.parametrize("block", blocks_of(source_of("CONTRIBUTING.rst")), ids=str)
def test_contributors_commands_can_be_given(block):
    """The files that the commands need are there."""
    run(block, {})


@pytest.mark.parametrize("section", SECTIONS)
def test_section_runs_as_it_is_written(documents, section):
    """The section's blocks run in order, after those of the quickest example."""
    documents.run("README.rst", section)


def test_ci_gives_the_command_that_readme_names():
    """A change that CI accepts has passed the command that contributors know."""
    assert "$ python -m pip install tox && python -m tox\n" in README
    assert re.search(
        r"^ *python -m pip install --quiet tox && python -m tox$",
        source_of(".ci/run"),
        re.MULTILINE,
    )


def test_files_that_readme_names_are_there():
    """No page has been renamed behind README's back."""
    named = set(re.findall(r"``((?:docs/)?\w+\.rst)``", README))
    assert "docs/guide.rst" in named
    for name in named:
        assert (ROOT / name).is_file(), name


def test_quickest_example_answers_at_once_during_an_outage(documents, service, clock):
    """Five requests go out, then one each minute, until the service is back."""
    example = documents.run(*QUICKEST)
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


def test_guide_begins_with_the_example_of_readme():
    """A reader who goes on to the guide meets the same names."""
    (example,) = [b.text for b in BLOCKS if b.section == QUICKEST[1]]
    guide = blocks_of(source_of("docs/guide.rst"), "docs/guide.rst")
    assert guide[0].text == example


def test_coroutine_and_block_are_guarded(documents, service):
    """The block ran, and a failure in the coroutine counts."""
    example = documents.run("README.rst", "Coroutines and blocks")
    assert example.answer.text == "21.5"
    service.error = OSError()
    with pytest.raises(OSError):
        asyncio.run(example.forecast_soon("paris"))
    assert example.weather.fail_counter == 1


def test_answer_with_status_500_counts_and_excluded_exception_does_not(documents):
    """The caller gets the answer of a failed call, and the excluded exception."""
    orders = documents.run("README.rst", "What to catch").orders
    answer = types.SimpleNamespace(status_code=500)
    assert orders.call(lambda: answer) is answer
    assert orders.fail_counter == 1
    with pytest.raises(KeyError):
        orders.call({}.__getitem__, "an unknown order")
    assert orders.fail_counter == 0


def test_busy_service_opens_at_25_failures_of_50_calls(documents, clock):
    """Each trial that fails doubles the wait, up to two minutes."""
    payments = documents.run("README.rst", "Three numbers for a busy service").payments

    def fail():
        raise OSError

    for _ in range(24):
        payments.call(int)
        with pytest.raises(OSError):
            payments.call(fail)
    payments.call(int)
    with pytest.raises(pybreaker.CircuitBreakerError, match="25 of the last 50"):
        payments.call(fail)
    waits = []
    for _ in range(7):
        waits.append(payments.retry_after)
        clock.advance(waits[-1] + 0.001)  # a float is not exact
        with pytest.raises(pybreaker.CircuitBreakerError):
            payments.call(fail)
    longest = [5, 10, 20, 40, 80, 120, 120]
    assert all(0.9 * full <= wait <= full for wait, full in zip(waits, longest))


def test_tables_of_readme_are_lines_of_those_that_were_measured():
    """`benchmarks/readme.py` copies the lines, and checks the copies."""
    command = [sys.executable, ROOT / "benchmarks" / "readme.py", "--check"]
    subprocess.run(command, check=True)
