"""Forks workers, as importing a Redis client takes longer than many tests.

Each line on stdin has the settings of one worker: see fleet_worker.py. `fleet.Nursery`
has put the folders in the setting "path" at the front of ``sys.path``.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys

with contextlib.suppress(ImportError):
    import redis  # noqa: F401


def main():
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no process waits for the workers
    for line in sys.stdin:
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            become_worker(json.loads(line))
            return  # the worker ends as any program ends


def become_worker(settings):
    """Talk to the test through a connection that lasts as long as the process."""
    with socket.create_connection(("127.0.0.1", settings["test"])) as connection:
        os.dup2(connection.fileno(), 0)
        os.dup2(connection.fileno(), 1)
    with open(settings["errors"], "a") as errors:
        os.dup2(errors.fileno(), 2)
    sys.stdin = open(0, closefd=False)
    sys.stdout = open(1, "w", closefd=False)
    print(os.getpid(), flush=True)
    import fleet_worker

    fleet_worker.main(settings)


if __name__ == "__main__":
    main()
