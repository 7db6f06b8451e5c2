"""An outage, lived through with a circuit breaker and without one.

    python examples/outage.py           takes about ten seconds
    python examples/outage.py --fast    takes about two

Two equal web servers on this machine suffer the same outage at the same time:
they refuse connections, then answer with an error, then answer too late, and
then are healthy again. Four clients keep fetching from the first server through
one breaker, and four others from the second server without a breaker.

A breaker has a price, which shows as well: when the server has recovered, the
first clients to hear of it are those that have no breaker.
"""

import argparse
import http.server
import queue
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
except ImportError:  # not installed: take the one in the directory above this
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import pybreaker

parser = argparse.ArgumentParser(description="An outage, with and without a breaker.")
parser.add_argument("--fast", action="store_true", help="take about two seconds")
SECOND = 0.2 if parser.parse_args().fast else 1.0

CLIENTS = 4  # on each side
PAUSE = 0.1 * SECOND  # of a client between its calls
TIMEOUT = 0.5 * SECOND  # after which a client gives up
FAIL_MAX = 5  # failures in a row open the circuit
RESET_TIMEOUT = 1.0 * SECOND  # until a call may try again

HEALTHY = "is healthy"
REFUSING = "refuses connections"
FAILING = "answers with an error"
SLOW = "answers too late"
# How many rows of the timeline each part of the story lasts.
OUTAGE = [(3, HEALTHY), (3, REFUSING), (3, FAILING), (5, SLOW), (5, HEALTHY)]
ROW = 0.5 * SECOND

SUCCEEDED, FAILED, REJECTED = ".", "x", "-"

HEADING = f"""\
Two equal servers suffer the same outage. {CLIENTS} clients keep fetching from each,
and wait up to {TIMEOUT:g} s for an answer. Those on the left use a breaker that
opens the circuit after {FAIL_MAX} failures, and tries again {RESET_TIMEOUT:g} s later.

Each sign is a call:  . succeeded   x failed   - rejected, nothing was sent

   time  circuit    with the breaker          without a breaker"""

# Straight to this machine, whatever proxy is set up.
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def fetch(url):
    """The call that can fail. What urllib raises for a refused connection, for
    a status like 500, and for a timeout, is a failure to the breaker."""
    try:
        with opener.open(url, timeout=TIMEOUT) as answer:
            return answer.read()
    except urllib.error.HTTPError as error:
        error.close()  # an answer like any other, on a connection of its own
        raise


def main():
    timeline = Timeline()

    # One breaker for one service, shared by all the threads that call it.
    breaker = pybreaker.CircuitBreaker(
        fail_max=FAIL_MAX,
        reset_timeout=RESET_TIMEOUT,
        listeners=[timeline],
        throw_new_error_on_trip=False,  # so CircuitBreakerError means: rejected
    )
    guarded_fetch = breaker(fetch)  # as "@breaker" above "def fetch" would do

    with_breaker = Clients(guarded_fetch, Server())
    without = Clients(fetch, Server())

    def print_row(seconds=ROW):
        timeline.print_transitions(seconds)
        state, left, right = breaker.current_state, with_breaker.news(), without.news()
        print(f"{timeline.now()}  {state:<9}  {left:<24}  {right}".rstrip())

    sys.stdout.reconfigure(line_buffering=True)  # live, through a pipe as well
    print(HEADING)
    for rows, health in OUTAGE:
        for clients in with_breaker, without:
            clients.server.become(health)
        print(f"{timeline.now()}  ==== The server {health} ".ljust(79, "="))
        for _ in range(rows):
            print_row()
    for _ in range(50):  # it may take longer to recover on a busy machine
        if breaker.current_state != pybreaker.STATE_CLOSED:
            print_row()
    timeline.print_transitions(ROW)
    for clients in with_breaker, without:
        clients.stopping.set()
    for thread in with_breaker.threads + without.threads:
        thread.join()
    print_row(seconds=0)
    print_table(with_breaker, without)


class Clients:
    """Threads that fetch from a server again and again, and what comes of it."""

    def __init__(self, fetch, server):
        self.fetch = fetch
        self.server = server
        self.calls = []  # for each: how it ended, its seconds, was the server ill
        self.told = 0
        self.stopping = threading.Event()
        self.threads = [
            threading.Thread(target=self.run, daemon=True) for _ in range(CLIENTS)
        ]
        for thread in self.threads:
            thread.start()

    def run(self):
        while not self.stopping.wait(PAUSE):
            ill = self.server.health != HEALTHY
            begun = time.monotonic()
            try:
                self.fetch(self.server.url)
                outcome = SUCCEEDED
            except pybreaker.CircuitBreakerError:
                outcome = REJECTED  # here a real client has something else to offer
            except Exception:
                outcome = FAILED
            self.calls.append((outcome, time.monotonic() - begun, ill))

    def news(self):
        """How those calls ended that have ended since it was last asked."""
        new = self.calls[self.told :]
        self.told += len(new)
        return "".join(outcome for outcome, _, _ in new)

    def count(self, *outcomes):
        return sum(outcome in outcomes for outcome, _, _ in self.calls)

    def sent_to_ill_server(self):
        return sum(ill and outcome != REJECTED for outcome, _, ill in self.calls)

    def waited_in_vain(self):
        return sum(took for outcome, took, _ in self.calls if outcome != SUCCEEDED)


class Timeline(pybreaker.CircuitBreakerListener):
    """What a person sees while it happens.

    The breaker tells it of transitions in the threads of the clients, holding
    its lock. So it only takes a note then, for the main thread to print.
    """

    def __init__(self):
        self.began = time.monotonic()
        self.notes = queue.Queue()

    def state_change(self, cb, old_state, new_state):
        note = f"{self.now()}  > {new_state.name.upper()}: {new_state.reason}"
        self.notes.put(note[:79])  # which has an exception's whole text at its end

    def now(self):
        return f"{time.monotonic() - self.began:5.2f} s"

    def print_transitions(self, seconds):
        """Print what is noted, and for so many seconds what will be."""
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
        self.send_response(500 if self.server.health == FAILING else 200)
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
        self.serve()

    def serve(self):
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def become(self, health):
        before, self.health = self.health, health
        if health == REFUSING:
            self.shutdown()
            self.server_close()
            self.socket = socket.socket()
            self.server_bind()  # the port stays taken, but nobody listens
        elif before == REFUSING:
            self.server_activate()
            self.serve()

    def handle_error(self, request, client_address):
        """A client that got no answer in time has hung up."""


def print_table(with_breaker, without):
    def row(label, measure, form="{}  "):
        left, right = form.format(measure(with_breaker)), form.format(measure(without))
        print(f"{label:<41}{left:>16}{right:>20}".rstrip())

    sent, waited = Clients.sent_to_ill_server, Clients.waited_in_vain
    print()
    print(" " * 41 + "with the breaker    without a breaker")
    row("calls asked for", lambda run: len(run.calls))
    row("  rejected", lambda run: run.count(REJECTED))
    row("  admitted", lambda run: run.count(SUCCEEDED, FAILED))
    row("    succeeded", lambda run: run.count(SUCCEEDED))
    row("    failed", lambda run: run.count(FAILED))
    row("requests sent to the ill server", sent)
    row("requests it was spared", lambda run: sent(without) - sent(run))
    row("time callers waited for nothing", waited, "{:.1f} s")
    row("time they did not wait", lambda run: waited(without) - waited(run), "{:.1f} s")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\nStopped.")
        sys.exit(130)  # what a shell expects after Ctrl-C
