"""A real HTTP server on loopback that misbehaves as the path of a request says."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading

from support import PATIENCE

LOOPBACK = "127.0.0.1"


class Service:
    """Answers on two ports, so that a client takes the service for two hosts.

    `/status/503` answers with status 503, `?after=TEXT` adds a Retry-After, `/hang`
    answers when `release()` has been called, `/reset` resets the connection, `/garbage`
    answers without HTTP, `/part` breaks off in the body, `/redirect?to=URL` is a 302,
    `/once` hangs up on a connection's second request, and any other path is a 200.
    """

    def __init__(self):
        self.requests = []  # the paths that were asked for
        self.connections = 0
        self._released = threading.Event()
        self._listening = [
            socket.create_server((LOOPBACK, 0), backlog=128) for _ in range(2)
        ]
        self._threads = []
        self._open = set()
        for listening in self._listening:
            self._start(self._accept, listening)
        self.url, self.other_url = (
            f"http://{LOOPBACK}:{listening.getsockname()[1]}"
            for listening in self._listening
        )
        self.key, self.other_key = (
            url.partition("//")[2] for url in (self.url, self.other_url)
        )

    def release(self):
        self._released.set()

    def end(self):
        self.release()
        for each in [*self._listening, *self._open]:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        for thread in self._threads:
            thread.join(PATIENCE)

    def _start(self, target, *args):
        thread = threading.Thread(target=target, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self, listening):
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            self.connections += 1
            self._open.add(connection)
            self._start(self._serve, connection)

    def _serve(self, connection):
        with connection, contextlib.suppress(OSError):
            file = connection.makefile("rb")
            served = 0
            while True:
                line = file.readline()
                if not line:
                    return
                length, is_chunked = 0, False
                while (header := file.readline().strip().lower()) != b"":
                    name, _, value = header.partition(b":")
                    if name == b"content-length":
                        length = int(value)
                    is_chunked = is_chunked or header == b"transfer-encoding: chunked"
                file.read(length)
                while is_chunked and file.readline() not in (b"0\r\n", b""):
                    pass
                if is_chunked:
                    file.readline()
                path, _, query = line.split()[1].decode().partition("?")
                served += 1
                if path == "/once" and served > 1:
                    return
                self.requests.append(path)
                if not self._answer(connection, path, query.partition("=")[2]):
                    return

    def _answer(self, connection, path, argument):
        """Answer a request. Returns whether the connection is kept."""
        if path == "/hang":
            self._released.wait(PATIENCE)
        if path == "/reset":
            linger = struct.pack("ii", 1, 0)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            return False
        if path == "/garbage":
            connection.sendall(b"220 this is a mail server\r\n\r\n")
            return False
        status, headers, body = 200, "", b"hello"
        if path.startswith("/status/"):
            status = int(path.rpartition("/")[2])
            headers = f"Retry-After: {argument}\r\n" if argument else ""
        if path == "/redirect":
            status, headers = 302, f"Location: {argument}\r\n"
        length = 1000 if path == "/part" else len(body)
        connection.sendall(
            f"HTTP/1.1 {status} Because\r\n{headers}"
            f"Content-Length: {length}\r\n\r\n".encode()
            + body
        )
        return path != "/part"
