"""An outage, lived through with a circuit breaker and without one.

    python examples/outage.py           takes about ten seconds
    python examples/outage.py --fast    takes about two

    python examples/outage.py --partial [--fast]

Two equal web servers on this machine suffer the same outage at the same time:
they refuse connections, then answer with an error, then answer too late, and
then are healthy again. Four clients keep fetching from the first server through
one breaker, and four others from the second server without a breaker.

A breaker has a price, which shows as well: clients without a breaker are the first
to notice that the server has recovered.

With --partial the servers fail one call in five before they fail all calls, and both
groups of clients have a breaker. The first opens when calls fail in a row, and
refuses many calls that would have succeeded. The second opens when half of the last
calls failed, and takes longer to notice that all calls fail.
"""

import argparse
import http.server
import queue
import random
import socket
import socketserver
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

try:
    import pybreaker
except ImportError:  # not installed: use the module in the directory above
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import pybreaker

parser = argparse.ArgumentParser(description="An outage, with and without a breaker.")
parser.add_argument("--fast", action="store_true", help="take a fifth of the time")
parser.add_argument(
    "--partial",
    action="store_true",
    help="one call in five fails: failures in a row against a window",
)
options = parser.parse_args()
SECOND = 0.2 if options.fast else 1.0

CLIENTS = 4  # on each side
PAUSE = 0.1 * SECOND  # of a client between its calls
TIMEOUT = 0.5 * SECOND  # after which a client gives up
FAIL_MAX = 5  # failures in a row open the circuit
FEW = 3  # failures in a row, with --partial: few, so that the left circuit opens soon
MANY, WINDOW = 25, 50  # failures, and the last calls, that open the right circuit then
RESET_TIMEOUT = 1.0 * SECOND  # until a call may try again

HEALTHY = "is healthy"
REFUSING = "refuses connections"
FAILING = "answers with an error"
SLOW = "answers too late"
UNRELIABLE = "fails one call in five"
# How many rows of the timeline each part of the story lasts.
OUTAGE = [(3, HEALTHY), (3, REFUSING), (3, FAILING), (5, SLOW), (5, HEALTHY)]
# The third figure: so many circuits must have rejected calls before the part may end.
PARTIAL_OUTAGE = [(3, HEALTHY), (14, UNRELIABLE, 1), (5, FAILING, 2), (5, HEALTHY)]
ROW = 0.5 * SECOND

# With this seed three or more failures come in a row soon, and again and again.
SEED = 207

SUCCEEDED, FAILED, REJECTED = ".", "x", "-"

HEADING = f"""\
Two equal servers suffer the same outage. {CLIENTS} clients keep fetching from each,
and wait up to {TIMEOUT:g} s for an answer. Those on the left use a breaker that
opens the circuit after {FAIL_MAX} failures, and tries again {RESET_TIMEOUT:g} s later.

Each sign is a call:  . succeeded   x failed   - rejected, nothing was sent

   time  circuit    with the breaker          without a breaker"""

PARTIAL_HEADING = f"""\
Two equal servers fail the same calls: first one in five, then all. {CLIENTS} clients
keep fetching from each, with a breaker that tries again {RESET_TIMEOUT:g} s after it
opened. The one on the left opens after {FEW} failures in a row, the one on the right
when {MANY} of the last {WINDOW} calls failed.

Each sign is a call:  . succeeded   x failed   - rejected, nothing was sent

   time  circuit    in a row                  circuit    window"""

# Straight to this machine, whatever proxy is set up.
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def fetch(url):
    """The call that can fail. What urllib raises for a refused connection, for
    a status like 500, and for a timeout, is a failure to the breaker."""
    try:
        with opener.open(url, timeout=TIMEOUT) as answer:
            return answer.read()
    except urllib.error.HTTPError as error:
        error.close()  # the error is an answer, with a connection of its own
        raise


def main():
    timeline = Timeline()
    # One breaker for one service, shared by all the threads that call it.
    common = {
        "reset_timeout": RESET_TIMEOUT,
        "listeners": [timeline],
        "throw_new_error_on_trip": False,  # so CircuitBreakerError means: rejected
    }
    if options.partial:
        in_a_row = pybreaker.CircuitBreaker(FEW, name="in a row", **common)
        window = pybreaker.CircuitBreaker(
            MANY, window_size=WINDOW, name="window", **common
        )
        left, right = Clients(Server(), in_a_row), Clients(Server(), window)
        tell(PARTIAL_HEADING, PARTIAL_OUTAGE, timeline, left, right)
        print_partial_table(left, right)
    else:
        breaker = pybreaker.CircuitBreaker(FAIL_MAX, **common)
        with_breaker, without = Clients(Server(), breaker), Clients(Server())
        tell(HEADING, OUTAGE, timeline, with_breaker, without)
        print_table(with_breaker, without)


def tell(heading, story, timeline, *both):
    """Let both groups of clients live through the story, and print what happens."""

    def print_row(seconds=ROW):
        timeline.print_transitions(seconds)
        print(f"{timeline.now()}  {'  '.join(map(Clients.report, both))}".rstrip())

    sys.stdout.reconfigure(line_buffering=True)  # live, through a pipe as well
    print(heading)
    for rows, health, *rejected in story:
        for clients in both:
            clients.server.become(health)
        print(f"{timeline.now()}  ==== The server {health} ".ljust(79, "="))
        for row in range(rows + 50):
            if row >= rows and sum(map(Clients.has_rejected, both)) >= sum(rejected):
                break
            print_row()
    for _ in range(50):  # on a busy machine the circuits may close later
        if not all(map(Clients.is_closed, both)):
            print_row()
    timeline.print_transitions(ROW)
    for clients in both:
        clients.stopping.set()
    for clients in both:
        for thread in clients.threads:
            thread.join()
    print_row(seconds=0)


class Clients:
    """Threads that fetch from a server again and again, and how their calls end."""

    def __init__(self, server, breaker=None):
        self.server = server
        self.breaker = breaker
        # As "@breaker" above "def fetch" would do.
        self.fetch = breaker(fetch) if breaker else fetch
        self.calls = []  # for each: how it ended, its seconds, the server's health
        self.told = 0
        self.stopping = threading.Event()
        self.threads = [
            threading.Thread(target=self.run, daemon=True) for _ in range(CLIENTS)
        ]
        for thread in self.threads:
            thread.start()

    def run(self):
        while not self.stopping.wait(PAUSE):
            health = self.server.health
            begun = time.monotonic()
            try:
                self.fetch(self.server.url)
                outcome = SUCCEEDED
            except pybreaker.CircuitBreakerError:
                outcome = REJECTED  # here a real client has something else to offer
            except Exception:
                outcome = FAILED
            self.calls.append((outcome, time.monotonic() - begun, health))

    def news(self):
        """The signs of the calls that ended since `news` was last called."""
        new = self.calls[self.told :]
        self.told += len(new)
        return "".join(outcome for outcome, _, _ in new)

    def report(self):
        """The state of the circuit, if there is one, and the news."""
        if self.breaker is None:
            return self.news()
        return f"{self.breaker.current_state:<9}  {self.news():<24}"

    def is_closed(self):
        return not self.breaker or self.breaker.current_state == pybreaker.STATE_CLOSED

    def has_rejected(self):
        return self.count(REJECTED) > 0

    def count(self, *outcomes):
        return sum(outcome in outcomes for outcome, _, _ in self.calls)

    def rejected_while(self, health):
        return sum((outcome, h) == (REJECTED, health) for outcome, _, h in self.calls)

    def sent_to_ill_server(self):
        return sum(
            health != HEALTHY and outcome != REJECTED
            for outcome, _, health in self.calls
        )

    def sent_while(self, health):
        return sum(h == health and outcome != REJECTED for outcome, _, h in self.calls)

    def waited_in_vain(self):
        return sum(took for outcome, took, _ in self.calls if outcome != SUCCEEDED)


class Timeline(pybreaker.CircuitBreakerListener):
    """What a person sees during the outage.

    The breaker tells this listener of transitions in the threads of the clients,
    with the breaker's lock held. So the listener only takes a note, which the main
    thread prints.
    """

    def __init__(self):
        self.began = time.monotonic()
        self.notes = queue.Queue()

    def state_change(self, cb, old_state, new_state):
        which = f"{cb.name}: " if cb.name else ""
        note = f"{self.now()}  > {which}{new_state.name.upper()}: {new_state.reason}"
        self.notes.put(note[:79])  # a reason ends with an exception's whole text

    def now(self):
        return f"{time.monotonic() - self.began:5.2f} s"

    def print_transitions(self, seconds):
        """Print the notes that are there, and those of the next `seconds` seconds."""
        end = time.monotonic() + seconds
        while True:
            try:
                note = self.notes.get(timeout=max(0, end - time.monotonic()))
            except queue.Empty:
                return
            print(note)


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        time.sleep(3 * TIMEOUT if self.server.health == SLOW else TIMEOUT / 25)
        self.send_response(500 if self.server.fails() else 200)
        self.end_headers()
        self.wfile.write(b"Hello.\n")

    def log_message(self, *args):
        """Leave the terminal to the timeline."""


class Server(socketserver.ThreadingTCPServer):
    """A web server in a thread, on a loopback port of its own."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = "http://{}:{}/".format(*self.server_address)
        self.health = HEALTHY
        self.random = random.Random(SEED)  # equal servers fail the same calls
        self.serve()

    def fails(self):
        if self.health == UNRELIABLE:
            return self.random.random() < 0.2
        return self.health == FAILING

    def serve(self):
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def become(self, health):
        before, self.health = self.health, health
        if health == REFUSING:
            self.shutdown()
            self.server_close()
            self.socket = socket.socket()
            self.server_bind()  # the port stays taken, but no socket listens
        elif before == REFUSING:
            self.server_activate()
            self.serve()

    def handle_error(self, request, client_address):
        """Leave the terminal to the timeline: a client gave up and has hung up."""


def print_row_of_table(label, measure, *both, form="{}  "):
    left, right = (form.format(measure(clients)) for clients in both)
    print(f"{label:<41}{left:>16}{right:>20}".rstrip())


def print_counts(*both):
    print_row_of_table("calls asked for", lambda run: len(run.calls), *both)
    print_row_of_table("  rejected", lambda run: run.count(REJECTED), *both)
    print_row_of_table("  admitted", lambda run: run.count(SUCCEEDED, FAILED), *both)
    print_row_of_table("    succeeded", lambda run: run.count(SUCCEEDED), *both)
    print_row_of_table("    failed", lambda run: run.count(FAILED), *both)


def print_table(*both):
    sent, waited = Clients.sent_to_ill_server, Clients.waited_in_vain
    most, longest = sent(both[1]), waited(both[1])
    print()
    print(" " * 41 + "with the breaker    without a breaker")
    print_counts(*both)
    print_row_of_table("requests sent to the ill server", sent, *both)
    print_row_of_table("requests it was spared", lambda run: most - sent(run), *both)
    seconds = "{:.1f} s"
    print_row_of_table("time callers waited for nothing", waited, *both, form=seconds)
    print_row_of_table(
        "time they did not wait", lambda run: longest - waited(run), *both, form=seconds
    )


def print_partial_table(*both):
    print()
    print(" " * 41 + "      in a row                window")
    print_counts(*both)
    print_row_of_table(
        "rejected while one call in five failed",
        lambda run: run.rejected_while(UNRELIABLE),
        *both,
    )
    print_row_of_table(
        "requests sent while all failed", lambda run: run.sent_while(FAILING), *both
    )


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\nStopped.")
        sys.exit(130)  # what a shell expects after Ctrl-C
