"""An operator's console: shows and controls the breakers of a running process.

    python -m pybreaker_extras.console

This command serves a demo at http://127.0.0.1:8300/ : a page for people, and JSON for
scripts:

    curl http://127.0.0.1:8300/breakers
    curl http://127.0.0.1:8300/breakers/weather
    curl -X PATCH -d '{"fail_max": 20, "reset_timeout": 30}' http://127.0.0.1:8300/breakers/weather
    curl -X POST -d '{"seconds": 1800, "reason": "new disks"}' http://127.0.0.1:8300/breakers/weather/open
    curl -X POST http://127.0.0.1:8300/breakers/weather/half_open
    curl -X POST -d '{"reason": "disks are in"}' http://127.0.0.1:8300/breakers/weather/close

A PATCH sets all of its values or none. In JSON, null stands for `math.inf` in
`fail_max` and `reset_timeout`, and switches other settings off, where ``"inf"`` stands
for `math.inf`. With ``"seconds": null`` the circuit stays open until an operator moves
the circuit. A URL quotes the name of the breaker: "a/b" is "a%2Fb"; for a breaker named
"..", curl needs --path-as-is.

A program can serve the console on a separate port:

    threading.Thread(target=serve(Console()).serve_forever, daemon=True).start()

or mount the console, a WSGI application, beside another WSGI application:

    application = Console(hosts=["www.example.com"]).mount(application, "/ops")

Without `authorize` the console asks for no password: every client that reaches the
console may change breakers. So `serve` listens on the loopback address by default, the
console refuses requests to host names that are not in `hosts`, and refuses changes that
a page of another site asks for. The console logs every change, with the name of the
operator, on the logger "pybreaker_extras.console" at level WARNING.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import hashlib
import http
import inspect
import io
import ipaddress
import itertools
import json
import logging
import math
import os
import re
import secrets
import socket
import socketserver
import stat
import sys
import threading
import time
import weakref
import wsgiref.simple_server
from collections import OrderedDict
from datetime import datetime, timedelta, timezone
from functools import partial
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

import pybreaker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, MutableMapping

    Environ = dict[str, Any]
    Application = Callable[[Environ, Any], Iterable[bytes]]
    Answer = tuple[int, list[tuple[str, str]], Any]

__all__ = ("Console", "Server", "blot_out_passwords", "main", "serve")

LOOPBACK = ("localhost", "127.0.0.1", "::1")
MOVES = ("open", "half_open", "close")
# The settings of each of these two groups limit each other, so a change sets them in
# an order that their setters accept (_order_of).
LIMITS = ("window_seconds", "window_size", "fail_max")
TIMEOUTS = ("max_reset_timeout", "reset_timeout")
# A change sets fail_counter last, because fail_max limits fail_counter.
SETTINGS = (
    "fail_max",
    "window_size",
    "window_seconds",
    "reset_timeout",
    "max_reset_timeout",
    "success_threshold",
    "dry_run",
    "fail_counter",
)
MAY_BE_OFF = ("window_size", "window_seconds", "max_reset_timeout")
TRANSITIONS = 20  # how many transitions of a breaker the console remembers
HAND_MOVES = 10  # how many moves by hand the console remembers of an outage
OUTAGES = 5  # how many past outages of a breaker the console remembers
OUTCOMES = 256  # how many outcomes of changes the console remembers for the page
ROWS = 300  # how many breakers a page shows; the filter finds the others
REFRESH = 2  # seconds after which the page asks the process again
CONNECTION_TIMEOUT = 10  # seconds for a client to send a request and read the answer
PAGE_WAIT = 0.25  # seconds that a page waits for all busy breakers together
# After these seconds a page still waits LEAST_WAIT seconds for each breaker that was
# not busy on the page before, up to EXTRA_WAIT seconds in all.
LEAST_WAIT = 0.005
EXTRA_WAIT = 0.5
WAIT = 1.0  # seconds that a change waits for a busy breaker
SMALL_READ_PAUSE = 0.1  # seconds between reads from a client that sends small pieces
MAX_HEAD = 32 * 1024  # bytes of the head of a request
MAX_BODY = 16 * 1024  # bytes of the body of a request from a script
MAX_FORM = 1024 * 1024  # bytes of the form of the page, which may have ROWS rows
MAX_TEXT = 300  # characters of a reason; the library has the same limit
CONNECTIONS = 32  # how many connections the server serves at a time
BACKLOG = 128  # how many more connections the operating system lets wait
CROWDED_TIMEOUT = 1.0  # seconds for a client to send a request while other clients wait
# An idle connection is one that brings no whole request.
IDLE_BURST = 32  # how many idle connections the server accepts in a row
IDLE_A_SECOND = 16  # how many idle connections a second the server accepts afterwards
WASTED_BYTES = 1024 * 1024  # unread bytes that count as one idle connection
ACCEPT_PAUSE = 0.5  # seconds until the server tries again after accept() has failed
SEARCH_INTERVAL = 1.0  # seconds between two searches for new breakers
ELLIPSIS = "\N{HORIZONTAL ELLIPSIS}"  # marks a button that asks a question first
DEFAULT_MINUTES = "30"  # how long a hold lasts if the operator types no other number

logger = logging.getLogger("pybreaker_extras.console")


# What the console knows of a breaker.


class Outage(NamedTuple):
    """The story of one outage, of limited size however long the outage lasts."""

    since: datetime
    reason: str  # why the circuit opened first
    failed_trials: int = 0
    first_trial: datetime | None = None  # when the first trial failed
    last_trial: datetime | None = None  # when the last trial failed
    last_error: str = ""
    moves: tuple[tuple[datetime, str, str], ...] = ()  # by hand: time, state, reason
    forgotten_moves: int = 0  # how many earlier moves by hand are left out of `moves`
    until: datetime | None = None  # None: the outage goes on
    ending: str = ""  # why the circuit closed

    def follow(self, now: datetime, old: str, new: str, reason: str) -> Outage:
        """The story after a transition of the circuit from state `old` to `new`."""
        if new == pybreaker.STATE_CLOSED:
            return self._replace(until=now, ending=reason)
        if reason.startswith("the trial failed") and new == pybreaker.STATE_OPEN:
            return self._replace(
                failed_trials=self.failed_trials + 1,
                first_trial=self.first_trial or now,
                last_trial=now,
                last_error=reason,
            )
        if reason == "the timeout has passed":
            return self
        # A picture (_update_outage) has begun the story with this transition already.
        if self == Outage(self.since, reason):
            return self
        moves = (*self.moves, (now, new, reason))
        too_many = max(0, len(moves) - HAND_MOVES)
        return self._replace(
            moves=moves[too_many:], forgotten_moves=self.forgotten_moves + too_many
        )

    def for_json(self) -> dict[str, Any]:
        story = self._asdict()
        story["moves"] = [
            {"at": _iso(at), "to": to, "reason": reason}
            for at, to, reason in self.moves
        ]
        for name in ("since", "until", "first_trial", "last_trial"):
            story[name] = _iso(story[name])
        return story


class Busy(Exception):
    """Another thread holds the breaker's lock too long, or the breaker is gone."""


class _ScratchBreaker(pybreaker.CircuitBreaker):
    """A breaker that guards nothing. The console tries settings on a scratch breaker,
    to learn without a risk which values the setters refuse."""


class Watch:
    """What the console knows of one breaker. The watch does not keep the breaker alive.

    The watch listens to the breaker's transitions alone, so calls of a closed circuit
    take no lock because of the watch. `redact` gives what may be shown of a text; None:
    the whole text.
    """

    # CircuitBreakers may drop a breaker although the watch listens to the breaker.
    only_watches = True

    def __init__(
        self,
        breaker: pybreaker.CircuitBreaker,
        ident: str,
        redact: Callable[[str], str] | None,
    ) -> None:
        self.ident = ident
        self._reference = weakref.ref(breaker)
        self._redact = partial(_redacted, redact)
        self._listens = False
        self.watched_since = _now()
        self.transitions: tuple[dict[str, str], ...] = ()  # the newest first
        self.transition_count = 0
        self.outage: Outage | None = None  # the present outage
        self.outages: tuple[Outage, ...] = ()  # the past outages, the newest first
        # The last change of each setting: value, operator, time, reason.
        self.set_by: dict[str, tuple[Any, str, datetime, str]] = {}
        self._last_picture: dict[str, Any] | None = None
        self._busy_since: datetime | None = None
        self._picture_thread: threading.Thread | None = None

    @property
    def breaker(self) -> pybreaker.CircuitBreaker | None:
        return self._reference()

    @property
    def name(self) -> str | None:
        breaker = self.breaker
        return None if breaker is None else breaker.name

    def state_change(self, cb: Any, old_state: Any, new_state: Any) -> None:
        """Remember a transition. The breaker calls this method with its lock held."""
        now, old, new = _now(), old_state.name, new_state.name
        reason = self._redact(new_state.reason)[: 2 * MAX_TEXT]
        transition = {"at": _iso(now), "from": old, "to": new, "reason": reason}
        self.transitions = (transition, *self.transitions)[:TRANSITIONS]
        self.transition_count += 1
        if self.outage is not None:
            outage = self.outage.follow(now, old, new, reason)
            self.outage = None if outage.until else outage
            if outage.until:
                self.outages = (outage, *self.outages)[:OUTAGES]
        elif new != pybreaker.STATE_CLOSED:
            self.outage = Outage(now, reason)

    @contextlib.contextmanager
    def holding(self, patience: float) -> Iterator[pybreaker.CircuitBreaker]:
        """A context manager that gives the breaker and holds the breaker's lock. Raises
        `Busy` if the lock is not free within `patience` seconds or the breaker is
        gone."""
        breaker = self.breaker
        if breaker is None:
            raise Busy("the breaker is no longer there")
        if not breaker._lock.acquire(timeout=max(0.0, patience)):
            raise Busy(
                "the breaker is busy: its lock is held, as by a listener that hangs"
            )
        try:
            yield breaker
        finally:
            breaker._lock.release()

    # Watching.

    def listen(self) -> None:
        """Listen to the breaker from now on. Does nothing if the breaker's lock is
        held: the thread of the console calls `listen` again soon."""
        if not self._listens:
            with contextlib.suppress(Busy), self.holding(0.0) as breaker:
                self._listen_to(breaker)

    def _listen_to(self, breaker: pybreaker.CircuitBreaker) -> None:
        if not self._listens:
            breaker.add_listener(self)
            self._listens = True

    def picture(self, deadline: float) -> dict[str, Any]:
        """The state, the settings and the story of the breaker, as a dict for
        `json.dumps`. If the breaker is busy until `deadline`, a time of
        `time.monotonic`, the dict is the last picture, and ``busy`` is true."""
        breaker = self.breaker
        if self._busy_since is not None:  # the page keeps its time for other breakers
            deadline = 0.0
        if breaker is None or _may_be_read(breaker):
            self._take_picture(deadline)
        else:  # this storage may hang or wait for a network, so a thread reads it
            if self._picture_thread is None or not self._picture_thread.is_alive():
                self._picture_thread = threading.Thread(
                    target=self._take_picture, args=(deadline,), daemon=True
                )
                self._picture_thread.start()
            self._picture_thread.join(max(0.0, deadline - time.monotonic()))
            if self._picture_thread.is_alive():
                self._busy_since = self._busy_since or _now()
        watched_since, busy_since = _iso(self.watched_since), self._busy_since
        picture = self._last_picture or {"name": self.name, "as_of": watched_since}
        return {
            "id": self.ident,
            **picture,
            "busy": busy_since is not None,
            "busy_since": _iso(busy_since),
            "watched_since": watched_since,
            "outage": self.outage.for_json() if self.outage else None,
            "outages": [outage.for_json() for outage in self.outages],
            "transitions": list(self.transitions),
        }

    def _take_picture(self, deadline: float) -> None:
        """Read the breaker into `_last_picture`, or note that the breaker is busy."""
        try:
            left = deadline - time.monotonic()
            least = min(LEAST_WAIT, left + EXTRA_WAIT)
            patience = max(left, least if self._busy_since is None else 0.0)
            with self.holding(patience) as breaker:
                self._listen_to(breaker)
                try:
                    picture = breaker.snapshot()
                    self._update_outage(picture, breaker)
                    held = _held_for(breaker, picture["state"])
                    # When the time of a hold has passed, the next call is the trial,
                    # and the circuit counts as held no longer.
                    picture["held"] = held is not None and picture["retry_after"] != 0
                    picture["reason"] = self._redact(picture["reason"])
                except Exception as exc:  # such as a storage that is out of reach
                    error = self._redact(repr(exc))[:MAX_TEXT]
                    picture = {"name": breaker.name, "error": error}
        except Busy:
            self._busy_since = self._busy_since or _now()
        else:
            self._last_picture = {**picture, "as_of": _iso(_now())}
            self._busy_since = None

    def _update_outage(self, picture: dict[str, Any], breaker: Any) -> None:
        """Begin or end the story of an outage if the picture shows a state of which no
        transition has told the watch: the outage began before the console was made, or
        another process moved the circuit in a shared storage."""
        if picture["state"] == pybreaker.STATE_CLOSED:
            if self.outage is not None:
                ended = self.outage._replace(until=_now(), ending=picture["reason"])
                self.outage, self.outages = None, (ended, *self.outages)[:OUTAGES]
        elif self.outage is None:
            opened_at = picture["opened_at"]
            since = datetime.fromisoformat(opened_at) if opened_at else _now()
            self.outage = Outage(since, self._redact(picture["reason"]))

    # Changing.

    def move(
        self,
        move: str,
        operator: str,
        reason: str | None,
        seconds: float | None,
        if_match: str,
    ) -> str:
        """Call the breaker's method `move`: "open", "half_open" or "close". Returns the
        state before the move.

        Raises `Refusal` if the breaker refuses an argument, or if the header If-Match,
        `if_match`, does not match the breaker; `Busy` if the breaker is busy.
        """
        text = f"by hand, from {operator}"
        options: dict[str, Any] = {"reason": f"{text}: {reason}" if reason else text}
        if seconds is not None:
            options["seconds"] = seconds
        with self.holding(WAIT) as breaker:
            self._check_tag(breaker, if_match)
            before = breaker.current_state
            method = getattr(breaker, move)
            try:
                inspect.signature(method).bind(**options)
            except TypeError:  # a subclass overrides the method without parameters
                if seconds is not None:
                    raise Refusal(
                        422,
                        f"the {move}() of this breaker's class takes no seconds",
                        details={"errors": {"seconds": "this class takes no length"}},
                    ) from None
                options = {}
            try:
                method(**options)
            except (TypeError, ValueError) as exc:
                errors = {"seconds" if "seconds" in str(exc) else "reason": str(exc)}
                raise Refusal(422, str(exc), details={"errors": errors}) from None
        return before

    def change(
        self,
        values: dict[str, Any],
        operator: str,
        seen: dict[str, str] | None = None,
        if_match: str = "",
        reason: str = "",
    ) -> Change:
        """Set all settings in `values` or none. `seen` has the texts of the settings on
        the page that the operator saw: if a setting has changed since then, the outcome
        has a notice, and nothing is set.

        Raises `Refusal` if the header If-Match, `if_match`, does not match the breaker,
        and `Busy` if the breaker is busy.
        """
        done = Change({}, {}, {})
        with self.holding(WAIT) as breaker:
            self._check_tag(breaker, if_match)
            done.before.update(_settings_of(breaker, values))
            for name, before in done.before.items():
                now = _setting_text(name, before)
                # Calls change fail_counter, so a difference tells of no colleague.
                if seen and name != "fail_counter" and seen.get(name, now) != now:
                    done.notices[name] = (
                        f"meanwhile {now}, {self._set_by_text(name, before)}"
                    )
            paired = _settings_of(breaker, (*LIMITS, *TIMEOUTS))
            done.errors.update(_errors_of(values, paired))
            if done.errors or done.notices:
                return done
            self._set_all(breaker, values, paired, done)
            if not done.errors:
                for name in values:
                    value = getattr(breaker, name)
                    self.set_by[name] = (value, operator, _now(), reason)
        return done

    def _set_all(
        self, breaker: Any, values: dict[str, Any], paired: Any, done: Change
    ) -> None:
        """Set the settings one by one. If a setter refuses its value, set the earlier
        settings back. The breaker's lock is held: no call sees half of the change."""
        done_names: list[str] = []
        for name in _order_of(values, paired):
            try:
                setattr(breaker, name, values[name])
            except Exception as exc:
                for earlier in reversed(done_names):
                    setattr(breaker, earlier, done.before[earlier])
                if not isinstance(exc, (TypeError, ValueError)):
                    raise
                # A scratch breaker took the value, but this breaker's storage does not.
                done.errors[name] = str(exc)
                return
            done_names.append(name)

    def _set_by_text(self, name: str, value: Any) -> str:
        """Says whether the program or which operator set the setting to `value`."""
        by = self.set_by.get(name)
        if by is None or by[0] != value:
            return "set by the program"
        return f"set by {by[1]} at {_clock(by[2])}"

    def tag(self, picture: dict[str, Any]) -> str:
        """The entity tag of the breaker. Every change of a setting and every transition
        changes the tag. Calls, which change the counters, do not."""
        parts = [picture.get(name) for name in SETTINGS if name != "fail_counter"]
        parts += [self.ident, picture.get("state"), self.transition_count]
        digest = hashlib.sha256(json.dumps(parts).encode("utf-8", "replace"))
        return f'"{digest.hexdigest()[:20]}"'

    def _check_tag(self, breaker: Any, if_match: str) -> None:
        """Raise `Refusal` unless the header If-Match, `if_match`, is empty or names the
        breaker's present entity tag."""
        if not if_match or if_match.strip() == "*":
            return
        if self.tag(breaker.snapshot()) not in re.split(r"\s*,\s*", if_match.strip()):
            raise Refusal(412, "the breaker has changed meanwhile: look at it again")


class Change(NamedTuple):
    """The outcome of a change of settings, by name of the setting. If there is an error
    or a notice, no setting was changed."""

    before: dict[str, Any]  # the values before the change
    errors: dict[str, str]  # why the library refuses a value
    notices: dict[str, str]  # that a colleague or the program has changed the setting


def _may_be_read(breaker: Any) -> bool:
    """Whether the breaker's storage promises that reads return at once."""
    return bool(vars(type(breaker._state_storage)).get("_is_plain", False))


def _held_for(breaker: Any, state: str) -> float | None:
    """The ``seconds`` with which an operator or the program has opened the circuit;
    None if the circuit is not held open."""
    if state != pybreaker.STATE_OPEN:
        return None
    move = breaker._state_storage.last_move()
    seconds: float | None = getattr(move, "seconds", None)
    return seconds


def _settings_of(breaker: Any, names: Iterable[str]) -> dict[str, Any]:
    return {name: getattr(breaker, name) for name in names}


def _errors_of(values: dict[str, Any], paired: dict[str, Any]) -> dict[str, str]:
    """The library's error for each setting in `values` that the library refuses.
    `paired` has the breaker's present values of the settings that limit each other."""
    errors = {}
    for name, value in values.items():
        # With these settings of the scratch breaker, no limit refuses the value.
        scratch = _ScratchBreaker(fail_max=1, reset_timeout=0)
        try:
            setattr(scratch, name, value)
        except (TypeError, ValueError) as exc:
            errors[name] = str(exc)
    for pair in () if errors else (LIMITS, TIMEOUTS):
        wanted = {name: values.get(name, paired[name]) for name in pair}
        try:
            _ScratchBreaker(**wanted)
        except (TypeError, ValueError) as exc:
            changed = [name for name in pair if name in values]
            errors.update((name, str(exc)) for name in changed if name in str(exc))
    return errors


def _order_of(values: dict[str, Any], paired: dict[str, Any]) -> list[str]:
    """An order in which the setters of a breaker that has the settings `paired` accept
    the settings in `values`."""
    order = []
    for pair in (LIMITS, TIMEOUTS):
        changed = [name for name in pair if name in values]
        for attempt in itertools.permutations(changed):
            scratch = _ScratchBreaker(**{name: paired[name] for name in pair})
            try:
                for name in attempt:
                    setattr(scratch, name, values[name])
            except (TypeError, ValueError):
                continue
            changed = list(attempt)
            break
        order += changed
    return order + [name for name in SETTINGS if name in values and name not in order]


# Answers.


class Refusal(Exception):
    """The console refuses the request, and has changed nothing."""

    def __init__(
        self,
        status: int,
        message: str,
        headers: Iterable[tuple[str, str]] = (),
        details: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = list(headers)
        self.errors: dict[str, str] = (details or {}).get("errors", {})
        self.body = {"error": message, **(details or {})}


# An apostrophe may be part of a user name or password, and may follow a URL.
_URL_PASSWORD = re.compile(r"(://[^\s/:\"]*:)[^\s\"<>]*@")
# The library cuts long texts, perhaps within a password: then no "@" follows.
_CUT_PASSWORD = re.compile(r"(://[^\s/:\"]*:)(?!\d{1,5}(?:[/?#)']|$))[^\s\"<>@]+$")
_QUERY_PASSWORD = re.compile(
    r"([?&;#](?:\w*(?:pass(?:word|wd|phrase)?|pwd|secret|token|api_?key))=)[^&;\s'\"<>]+",
    re.IGNORECASE,
)


def _redacted(redact: Callable[[str], str] | None, text: str) -> str:
    """The text as `redact` returns it, or a note that `redact` has failed."""
    if redact is None:
        return text
    try:
        return str(redact(text))
    except Exception:
        logger.exception("redact failed, so a text is not shown")
        return "(not shown, as redact failed)"


def blot_out_passwords(text: str) -> str:
    """Returns the text with three asterisks in place of each password in a URL."""
    text = _URL_PASSWORD.sub(r"\1***@", text)
    text = _CUT_PASSWORD.sub(r"\1***", text)
    return _QUERY_PASSWORD.sub(r"\1***", text)


class Console:
    """A WSGI application that shows breakers, moves their circuits and changes their
    settings.

    `breakers` is an iterable of the breakers to show. The console goes through a list
    anew for each answer, so the list may change; an iterator is read once. By default
    the console shows all breakers of the process, and keeps none of them alive.

    `hosts` are the host names by which browsers and scripts reach the console, without
    the port. The console refuses requests to other host names, because an attacker can
    make a name of the attacker's own lead to the console (DNS rebinding).

    `service` is the name of the program on the page. A console that is `read_only`
    changes nothing. `authorize` is a function that gets the WSGI environment of a
    request and says whether the console answers the request. `trusted_proxies` are the
    addresses of proxies whose X-Forwarded-For header names the operator; ``"unix"``
    stands for every client of a Unix socket. `redact` is a function that gets each
    reason and each text of an exception and returns what the console may show; None:
    the console shows the whole text.

    Raises `TypeError` if an argument is of the wrong kind.
    """

    def __init__(
        self,
        breakers: Iterable[pybreaker.CircuitBreaker] | None = None,
        hosts: Iterable[str] = LOOPBACK,
        *,
        service: str | None = None,
        read_only: bool = False,
        authorize: Callable[[Environ], object] | None = None,
        trusted_proxies: Iterable[str] = (),
        redact: Callable[[str], str] | None = blot_out_passwords,
    ) -> None:
        self._breakers = _checked_breakers(breakers)
        self._hosts = frozenset(each.lower() for each in _checked_names("hosts", hosts))
        if service is not None and not isinstance(service, str):
            raise TypeError(f"service must be a string or None, not {service!r}")
        if not isinstance(read_only, bool):
            raise TypeError(f"read_only must be True or False, not {read_only!r}")
        self._service = service or _program_name()
        self._read_only = read_only
        self._authorize = _checked_function("authorize", authorize)
        self._proxies = frozenset(_checked_names("trusted_proxies", trusted_proxies))
        self._redact = _checked_function("redact", redact)
        self._watches: dict[int, Watch] = {}  # by the identity of the breaker
        self._numbers = itertools.count(1)
        self._begin_process()
        self.listen()
        _watchers[self] = _Watcher(self)

    def add(self, breaker: pybreaker.CircuitBreaker) -> None:
        """Show one more breaker, beside those in `breakers`. Raises `TypeError` if
        `breaker` is not a breaker, or if the console shows all breakers."""
        _check_breaker(breaker)
        given = self._breakers
        if given is None:
            raise TypeError("a console of all breakers shows this one already")
        self._breakers = (*given, breaker)

    def mount(self, application: Application, path: str) -> Application:
        """Returns a WSGI application that serves the console at `path`, such as "/ops",
        and the WSGI application `application` at all other paths. Raises `ValueError`
        unless `path` begins with a slash and ends without a slash."""
        if not (isinstance(path, str) and re.fullmatch(r"(/[^/]+)+", path)):
            raise ValueError(f"path must be like '/ops', not {path!r}")
        # WSGI passes the bytes of a path as Latin-1 characters.
        prefix = path.encode().decode("latin-1")

        def mounted(environ: Environ, start_response: Any) -> Iterable[bytes]:
            requested = environ.get("PATH_INFO", "")
            if requested != prefix and not requested.startswith(f"{prefix}/"):
                return application(environ, start_response)
            here = {
                **environ,
                "SCRIPT_NAME": environ.get("SCRIPT_NAME", "") + prefix,
                "PATH_INFO": requested[len(prefix) :],
            }
            return self(here, start_response)

        return mounted

    # Which breakers the console shows.

    def watches(self) -> dict[str, Watch]:
        """The watches of all breakers that the console shows. The keys are the names of
        the breakers in URLs: a number follows a name that an earlier breaker has."""
        watches = self._all_watches()
        names = [watch.name or "unnamed" for watch in watches]
        # A name with a number must not be the name of another breaker.
        taken = set(names)
        found: dict[str, Watch] = {}
        for name, watch in zip(names, watches):
            key, number = name, 1
            while key in found or (number > 1 and key in taken):
                number += 1
                key = f"{name}-{number}"
            found[key] = watch
        return found

    def _all_watches(self) -> list[Watch]:
        breakers = self._present()
        with self._watches_lock:
            watches = []
            for breaker in breakers:
                watch = self._watches.get(id(breaker))
                if watch is None or watch.breaker is not breaker:
                    watch = Watch(breaker, str(next(self._numbers)), self._redact)
                    self._watches[id(breaker)] = watch
                watches.append(watch)
            if len(self._watches) > len(watches):  # some breakers no longer exist
                self._watches = {id(b): w for b, w in zip(breakers, watches)}
        return watches

    def _present(self) -> list[pybreaker.CircuitBreaker]:
        if self._breakers is None:
            everything: Iterable[Any] = pybreaker.breakers()
        else:
            everything = _as_tuple(self._breakers)
        unique = {id(b): b for b in everything if not isinstance(b, _ScratchBreaker)}
        return list(unique.values())

    def listen(self) -> None:
        """Find new breakers and listen to them."""
        for watch in self._all_watches():
            watch.listen()

    def _begin_process(self) -> None:
        # A page carries the token, which says which process made the page.
        self._token = secrets.token_hex(8)
        self._watches_lock = threading.Lock()
        # The outcome of each change, as the ident of the breaker and a sentence, by a
        # digest of the request.
        self._outcomes: OrderedDict[str, tuple[str, str]] = OrderedDict()
        self._outcomes_lock = threading.Lock()

    # Answering.

    def __call__(self, environ: Environ, start_response: Any) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "")
        is_json = path.startswith("/breakers")
        try:
            status, headers, body = self._answer(environ)
        except Refusal as exc:
            status, headers = exc.status, exc.headers
            body = exc.body if is_json else f"{exc}\n"
        except Busy as exc:
            status, headers = 503, [("Retry-After", "5")]
            body = {"error": str(exc)} if is_json else f"Nothing was changed: {exc}.\n"
        except Exception:
            logger.exception("a request failed")
            status, headers = 500, []
            body = {"error": "see the log"} if is_json else "See the log.\n"
        if isinstance(body, str):
            kind = "text/html" if body.startswith("<!doctype") else "text/plain"
        else:
            kind, body = "application/json", json.dumps(body, indent=2) + "\n"
        content = body.encode("utf-8", "replace")
        headers = [
            *headers,
            *HEADERS,
            ("Content-Type", f"{kind}; charset=utf-8"),
            ("Content-Length", str(len(content))),
        ]
        if path == "/status":  # the frame goes on asking after a refusal or an error
            headers.append(("Refresh", str(REFRESH)))
        start_response(f"{status} {http.HTTPStatus(status).phrase}", headers)
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [content]

    def _answer(self, environ: Environ) -> Answer:
        self._check_host(environ)
        authorize = self._authorize
        if authorize is not None and not _checked_answer(authorize(environ)):
            raise Refusal(403, "you are not authorized to use this console")
        handlers = self._handlers(environ)
        if not handlers:
            raise Refusal(404, "there is no such page or breaker")
        if "GET" in handlers:
            handlers["HEAD"] = handlers["GET"]
        method = environ["REQUEST_METHOD"]
        if method not in handlers:
            allowed = ", ".join(sorted(handlers))
            raise Refusal(405, f"only {allowed} can be done here", [("Allow", allowed)])
        if method in ("GET", "HEAD"):
            answer: Answer = handlers[method](environ)
            return answer
        self._check_origin(environ)
        if self._read_only:
            raise Refusal(403, "this console is read-only")
        is_page = environ.get("PATH_INFO", "") in ("", "/")
        body = _read_body(environ, MAX_FORM if is_page else MAX_BODY)
        answer = handlers[method](environ, body)
        return answer

    def _check_host(self, environ: Environ) -> None:
        host = environ.get("HTTP_HOST", "").lower()
        match = re.fullmatch(r"(?:\[([0-9a-f:.]+)\]|([^\[\]:]+))(?::[0-9]*)?", host)
        if not match or (match[1] or match[2]) not in self._hosts:
            raise Refusal(
                403,
                "this console does not answer to that host name; "
                "its program has to allow the name: Console(hosts=[...])",
            )

    def _check_origin(self, environ: Environ) -> None:
        """Raise `Refusal` if a page of another site sent the request. Browsers name the
        site in a header; a client without such a header is not a browser, so no page
        made the client send the request."""
        site = environ.get("HTTP_SEC_FETCH_SITE", "same-origin")
        origin = environ.get("HTTP_ORIGIN") or environ.get("HTTP_REFERER")
        try:
            same = origin is None or urlsplit(origin).netloc == environ["HTTP_HOST"]
        except ValueError:
            same = False
        if not same or site not in ("same-origin", "none"):
            logger.warning(
                "%s: refused, sent by a page of %r", self._operator(environ), origin
            )
            raise Refusal(403, "a page of another site cannot change anything here")

    def _operator(self, environ: Environ) -> str:
        """The name of the operator who sent the request: the user whom the server or
        proxy has authenticated, or else an address."""
        user = environ.get("REMOTE_USER")
        if user:
            return "".join(c if c.isprintable() else "?" for c in str(user)[:100])
        # Most servers give no address for a client of a Unix socket.
        unix = "unix" if "unix" in self._proxies else "unknown"
        address = environ.get("REMOTE_ADDR") or unix
        forwarded = environ.get("HTTP_X_FORWARDED_FOR", "").split(",")
        # Each proxy appends the address of its client, so the last entry comes from the
        # proxy; the client may have made up the entries before.
        while address in self._proxies and forwarded:
            try:
                address = str(ipaddress.ip_address(forwarded.pop().strip()))
            except ValueError:
                break
        return str(address)

    def _handlers(self, environ: Environ) -> dict[str, Any]:
        """The functions that answer requests to the URL. The keys are HTTP methods."""
        try:
            # WSGI passes the bytes of a path as Latin-1 characters.
            path = environ.get("PATH_INFO", "").encode("latin-1")
            path = path.decode("utf-8", "surrogatepass")
        except UnicodeError:
            return {}
        if path in ("", "/"):
            return {"GET": self._get_page, "POST": self._post_form}
        if path == "/live":
            return {"GET": self._get_live}
        if path == "/status":
            return {"GET": self._get_status}
        if path in ("/breakers", "/breakers/"):
            return {"GET": self._get_all}
        if not path.startswith("/breakers/"):
            return {}
        # A name may hold slashes, so the path is not split at slashes.
        watches, key, handlers = self.watches(), path[len("/breakers/") :], {}
        if key in watches:
            handlers["GET"] = partial(self._get_one, key, watches[key])
            handlers["PATCH"] = partial(self._patch, key, watches[key])
        key, _, move = key.rpartition("/")
        if key in watches and move in MOVES:
            handlers["POST"] = partial(self._post_move, key, watches[key], move)
        return handlers

    # Answers for scripts.

    def _picture(
        self, environ: Environ, key: str, watch: Watch, deadline: float | None = None
    ) -> dict[str, Any]:
        if deadline is None:
            deadline = time.monotonic() + PAGE_WAIT
        url = f"{_root(environ)}/breakers/{_quoted(key)}"
        return {"url": url, **watch.picture(deadline)}

    def _tagged(self, environ: Environ, key: str, watch: Watch) -> Answer:
        picture = self._picture(environ, key, watch)
        return 200, [("ETag", watch.tag(picture))], picture

    def _get_all(self, environ: Environ) -> Answer:
        deadline, watches = time.monotonic() + PAGE_WAIT, self.watches()
        matches = _filter_of(_fields(environ.get("QUERY_STRING", "")))
        pictures = (
            (key, self._picture(environ, key, watch, deadline))
            for key, watch in watches.items()
        )
        return 200, [], [picture for key, picture in pictures if matches(key, picture)]

    def _get_one(self, key: str, watch: Watch, environ: Environ) -> Answer:
        return self._tagged(environ, key, watch)

    def _post_move(
        self, key: str, watch: Watch, move: str, environ: Environ, body: bytes
    ) -> Answer:
        given = _json(body) if body else {}
        known = ("seconds", "reason") if move == "open" else ("reason",)
        if not isinstance(given, dict) or set(given) - set(known):
            raise Refusal(422, f"{move} takes an object with any of {', '.join(known)}")
        seconds, reason = given.get("seconds"), given.get("reason")
        if "seconds" in given and seconds is None:  # the hold has no end
            seconds = math.inf
        if reason is not None and not isinstance(reason, str):
            message = f"reason must be a string, not {reason!r}"
            raise Refusal(422, message, details={"errors": {"reason": message}})
        self._move(environ, key, watch, move, reason, seconds)
        return self._tagged(environ, key, watch)

    def _patch(self, key: str, watch: Watch, environ: Environ, body: bytes) -> Answer:
        values = _json(body)
        if not isinstance(values, dict):
            raise Refusal(
                422, f"a change is an object with any of {', '.join(SETTINGS)}"
            )
        unknown = [name for name in values if name not in SETTINGS]
        if unknown:
            raise Refusal(
                422, f"{unknown[0]!r} cannot be set, only {', '.join(SETTINGS)}"
            )
        # JSON has no infinity. Answers to GET write infinity in the same two ways.
        values = {
            name: math.inf
            if (value == "inf" if name in MAY_BE_OFF else value is None)
            else value
            for name, value in values.items()
        }
        done = self._change(environ, key, watch, values)
        if done.errors:
            message = "; ".join(dict.fromkeys(done.errors.values()))
            raise Refusal(422, message, details={"errors": done.errors})
        return self._tagged(environ, key, watch)

    # Answers for people.

    def _page(self, environ: Environ, form: _Form, status: int = 200) -> Answer:
        return status, [], _Page(self, environ, form).whole()

    def _get_page(self, environ: Environ) -> Answer:
        return self._page(environ, _Form.from_query(environ))

    def _get_live(self, environ: Environ) -> Answer:
        return 200, [], _Page(self, environ, _Form.from_query(environ)).live()

    def _get_status(self, environ: Environ) -> Answer:
        return 200, [], _Page(self, environ, _Form.from_query(environ)).glance()

    def _post_form(self, environ: Environ, body: bytes) -> Answer:
        watches = {watch.ident: (key, watch) for key, watch in self.watches().items()}
        # The page may have more rows than there are breakers now, such as after a
        # restart, so the limit is that of the largest page.
        form = _Form.from_body(_fields(body, 20 + 20 * ROWS))
        if form.token != self._token:
            form = form.carried_over({key: i for i, (key, _) in watches.items()})
            return self._page(environ, form, 409)
        form.drop_gone(watches)
        # A browser that reloads the page sends an identical body.
        form.change_id = hashlib.sha256(body).hexdigest()[:20]
        outcome = self._outcomes.get(form.change_id)
        if outcome is not None:
            form.say(f"This was done already: {outcome[1]}")
            return self._page(environ, form)
        return self._press(environ, form, watches)

    def _press(self, environ: Environ, form: _Form, watches: Any) -> Answer:
        """Do what the pressed button says, and answer with the page or a redirect.
        `watches` has the key and the watch of each breaker, by ident."""
        do, _, argument = form.do.partition(".")
        if do == "enter":  # the operator pressed the Enter key in a field
            changed = [ident for ident in form.typed if form.typed_settings(ident)]
            if form.filter_changed():
                do = "filter"
            elif len(changed) == 1:
                do, argument = "set", changed[0]
            else:
                form.say("Nothing was done yet: press the button that says what to do.")
                return self._page(environ, form)
        if do in ("filter", "reload"):
            form.unfolded = argument  # the breaker about which the operator said no
            if form.typed or form.lost or argument:
                return self._page(environ, form)
            return 303, [("Location", f"{_root(environ)}/{form.query()}")], ""
        ident, _, exact = argument.partition(".")
        if do not in BUTTONS:
            raise Refusal(422, "there is no such button")
        if ident not in watches:
            form.say("Nothing was changed: that breaker is no longer there.")
            return self._page(environ, form, 404)
        key, watch = watches[ident]
        form.unfolded = ident
        try:
            outcome = BUTTONS[do](self, environ, form, key, watch, exact)
        except Busy as exc:
            form.say(f"Nothing was changed: {exc}.")
            return self._page(environ, form, 503)
        except Refusal as exc:
            form.errors[ident] = {
                "minutes" if field == "seconds" else field: error
                for field, error in exc.errors.items()
            }
            form.say(f"Nothing was changed: {exc}")
            return self._page(environ, form, exc.status)
        except Exception as exc:  # such as a storage that is out of reach
            logger.exception("a button failed")
            error = _redacted(self._redact, repr(exc))[:MAX_TEXT]
            form.say(f"The button failed, see how {key} is now: {error}")
            return self._page(environ, form, 500)
        if outcome is None:  # the page shows a question, an error or a notice
            status = 422 if form.errors else 409 if form.notices else 200
            return self._page(environ, form, status)
        with self._outcomes_lock:
            self._outcomes[form.change_id] = ident, outcome
            while len(self._outcomes) > OUTCOMES:
                self._outcomes.popitem(last=False)
        if form.typed or form.lost:  # a redirect would lose what was typed elsewhere
            form.say(outcome, done=True)
            return self._page(environ, form)
        # After this redirect, a reload of the page does not ask for the change again.
        place = f"{form.query(did=form.change_id)}#b-{ident}"
        return 303, [("Location", f"{_root(environ)}/{place}")], ""

    # The functions of the buttons. Each returns a sentence that says what was done, or
    # None if the page has to show a question, an error or a notice. `exact` is the last
    # part of the button's value, the seconds in "yes.5.60".

    def _press_set(
        self, environ: Environ, form: _Form, key: str, watch: Watch, exact: str
    ) -> str | None:
        ident = watch.ident
        texts = form.typed_settings(ident)
        if not texts:
            form.say(f"Nothing was changed: no setting of {key} was typed over.")
            return None
        values = {name: _typed_value(name, text) for name, text in texts.items()}
        reason = form.typed[ident].get("why", "")
        done = self._change(environ, key, watch, values, form.seen_texts(ident), reason)
        if done.errors:
            form.errors[ident] = done.errors
            return None
        if done.notices:
            form.notices[ident] = done.notices
            return None
        form.forget(ident, *values, "why")
        changes = ", ".join(
            f"{name} = {_setting_text(name, value)} "
            f"(was {_setting_text(name, done.before[name])})"
            for name, value in values.items()
        )
        return f"{key}: {changes}."

    def _press_hold(
        self, environ: Environ, form: _Form, key: str, watch: Watch, exact: str
    ) -> str | None:
        """Ask the operator first, as a circuit that is held open rejects all calls."""
        typed = form.typed.get(watch.ident, {}).get("minutes", DEFAULT_MINUTES)
        seconds = _seconds_of(typed)
        if seconds is None:
            form.errors[watch.ident] = {
                "minutes": f"minutes must be a number above 0, not {typed!r}; for a "
                "hold without an end, press Hold open until released"
            }
        else:
            form.question = f"yes.{watch.ident}.{seconds}"
        return None

    def _press_hold_on(
        self, environ: Environ, form: _Form, key: str, watch: Watch, exact: str
    ) -> str | None:
        form.question = f"yes.{watch.ident}.inf"
        return None

    def _press_move(
        self,
        environ: Environ,
        form: _Form,
        key: str,
        watch: Watch,
        exact: str,
        move: str,
        is_sure: bool = False,
    ) -> str | None:
        """Move the circuit, or unless `is_sure`, ask the operator first where the move
        may do harm: closing lets all calls through to a service that may still fail,
        and half-opening a closed circuit rejects calls."""
        picture = watch.picture(time.monotonic() + PAGE_WAIT)
        is_closed = picture.get("state") == pybreaker.STATE_CLOSED
        if not is_sure and is_closed == (move == "half_open"):
            form.question = f"{move.replace('_', '-')}-yes.{watch.ident}"
            return None
        self._move(environ, key, watch, move, form.reason(watch.ident))
        form.forget(watch.ident, "why")
        return f"{key} is {MOVED[move]}."

    def _press_yes(
        self, environ: Environ, form: _Form, key: str, watch: Watch, exact: str
    ) -> str | None:
        try:
            seconds = float(exact)
        except ValueError:
            raise Refusal(422, "there is no such button") from None
        self._move(environ, key, watch, "open", form.reason(watch.ident), seconds)
        # The page keeps a number that was typed beside the question and is not used.
        typed = form.typed.get(watch.ident, {}).get("minutes", DEFAULT_MINUTES)
        is_used = _seconds_of(typed) == exact
        form.forget(watch.ident, "why", *(["minutes"] if is_used else []))
        breaker = watch.breaker
        effect = _effect(breaker is not None and breaker.dry_run)
        return f"{key} is held open {_until(seconds)}: {effect}."

    # Only these two methods change breakers. Both log each change.

    def _move(
        self,
        environ: Environ,
        key: str,
        watch: Watch,
        move: str,
        reason: str | None = None,
        seconds: float | None = None,
    ) -> None:
        operator, if_match = self._operator(environ), environ.get("HTTP_IF_MATCH", "")
        before = watch.move(move, operator, reason, seconds, if_match)
        length = "" if seconds is None else f" for {seconds} s"
        because = f", because {reason!r}" if reason else ""
        logger.warning(
            "%s: %r: %s%s, was %s%s", operator, key, move, length, before, because
        )

    def _change(
        self,
        environ: Environ,
        key: str,
        watch: Watch,
        values: dict[str, Any],
        seen: dict[str, str] | None = None,
        reason: str = "",
    ) -> Change:
        operator, if_match = self._operator(environ), environ.get("HTTP_IF_MATCH", "")
        values = {name: values[name] for name in SETTINGS if name in values}
        done = watch.change(values, operator, seen, if_match, reason)
        because = f", because {reason!r}" if reason else ""
        for name in () if done.errors or done.notices else values:
            value, before = values[name], done.before[name]
            logger.warning(
                "%s: %r: %s = %r, was %r%s", operator, key, name, value, before, because
            )
        return done


BUTTONS: dict[str, Any] = {
    "set": Console._press_set,
    "hold": Console._press_hold,
    "hold-on": Console._press_hold_on,
    "yes": Console._press_yes,
    "close": partial(Console._press_move, move="close"),
    "close-yes": partial(Console._press_move, move="close", is_sure=True),
    "half-open": partial(Console._press_move, move="half_open"),
    "half-open-yes": partial(Console._press_move, move="half_open", is_sure=True),
}
MOVED = {
    "close": "closed: all its calls go through",
    "half_open": "half-open: its next call is a trial",
}


# Checks of the arguments of a console.


def _checked_breakers(breakers: Any) -> Any:
    if breakers is None:
        return None
    if isinstance(breakers, pybreaker.CircuitBreaker):
        raise TypeError(f"breakers must be an iterable, such as [{breakers!r}]")
    if isinstance(breakers, dict):  # such as CircuitBreakers
        breakers = breakers.values()
    try:
        if iter(breakers) is breakers:  # an iterator can be read only once
            breakers = tuple(breakers)
    except TypeError:
        raise TypeError(
            f"breakers must be an iterable of breakers or None, not {breakers!r}"
        ) from None
    for breaker in _as_tuple(breakers):
        _check_breaker(breaker)
    return breakers


def _check_breaker(breaker: Any) -> None:
    if not isinstance(breaker, pybreaker.CircuitBreaker):
        raise TypeError(f"breakers must be CircuitBreaker objects, not {breaker!r}")


def _as_tuple(iterable: Any) -> tuple[Any, ...]:
    """The items of the iterable, to which other threads may be adding items."""
    for _ in range(100):
        with contextlib.suppress(RuntimeError):  # another thread has added an item
            return tuple(iterable)
    return tuple(iterable)


def _checked_names(parameter: str, names: Any) -> list[str]:
    if isinstance(names, str):
        raise TypeError(f"{parameter} must be an iterable, such as [{names!r}]")
    found = []
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"{parameter} must be names, not {name!r}")
        found.append(name)
    return found


def _checked_function(parameter: str, function: Any) -> Any:
    if function is not None and not callable(function):
        raise TypeError(f"{parameter} must be a function or None, not {function!r}")
    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        type(function).__call__  # the function may be an object with this method
    ):
        raise TypeError(
            f"{parameter} must be a plain function, as nothing would await what "
            f"{function!r} returns"
        )
    return function


def _checked_answer(answer: object) -> object:
    """Returns what `authorize` returned. Raises `TypeError` for an awaitable object,
    which is true, and would grant every request."""
    if not inspect.isawaitable(answer):
        return answer
    if inspect.iscoroutine(answer):
        answer.close()  # so that Python does not warn that nothing awaited it
    raise TypeError(
        f"authorize must be a plain function, as nothing awaits what it returned: "
        f"{answer!r}"
    )


def _program_name() -> str:
    """The name of the program: a module for ``python -m``, or else a file."""
    main = sys.modules.get("__main__")
    spec = getattr(main, "__spec__", None)
    if spec is not None and spec.name:
        return str(spec.name).rpartition(".__main__")[0] or str(spec.name)
    return os.path.basename(sys.argv[0] if sys.argv else "") or "python"


# Reading requests. These functions raise Refusal for what they cannot read.


def _read_body(environ: Environ, limit: int) -> bytes:
    """The body of the request, of at most `limit` bytes."""
    if "HTTP_TRANSFER_ENCODING" in environ:
        raise Refusal(411, "the length of the body must be in Content-Length")
    length = environ.get("CONTENT_LENGTH") or "0"
    if not (length.isascii() and length.isdigit()):
        raise Refusal(400, "Content-Length must be a number of bytes")
    if len(length) > 9 or int(length) > limit:
        raise Refusal(413, f"the body must not be longer than {limit} bytes")
    try:
        body: bytes = environ["wsgi.input"].read(int(length))
    except OSError:  # such as a timeout
        raise Refusal(400, "the body could not be read") from None
    if len(body) < int(length):
        raise Refusal(400, "the body is shorter than Content-Length says")
    return body


def _json(body: bytes) -> Any:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    def members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(values := dict(pairs)) < len(pairs):
            raise ValueError("a name appears twice")
        return values

    try:
        return json.loads(
            body.decode(),
            parse_constant=refuse,
            parse_int=partial(_parsed_number, int),
            parse_float=partial(_parsed_number, float),
            object_pairs_hook=members,
        )
    except (ValueError, RecursionError) as exc:
        raise Refusal(400, f"the body is not JSON: {exc}") from None


def _fields(form: bytes | str, limit: int = 20) -> dict[str, str]:
    """The texts of the fields of a form or a query, by name."""
    try:
        text = form if isinstance(form, str) else form.decode("ascii")
        pairs = parse_qsl(text, keep_blank_values=True, max_num_fields=limit)
    except ValueError:
        raise Refusal(400, "the fields cannot be read") from None
    if len(fields := dict(pairs)) < len(pairs):
        raise Refusal(400, "a field appears twice")
    return fields


def _typed_value(name: str, text: str) -> Any:
    """The value of a setting that the operator typed as `text`. A text that stands for
    no value is returned unchanged, for the setter to refuse."""
    text = text.strip()
    if name in MAY_BE_OFF and text in ("", "off"):
        return None
    if name == "dry_run":
        return {"on": True, "off": False}.get(text, text)
    return _number(text)


def _number(text: str) -> Any:
    """The number that the text stands for, or the text if it stands for no number."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return _parsed_number(kind, text)
    return text


def _seconds_of(minutes: str) -> str | None:
    """The seconds of a hold, as a text for the button that confirms the hold; None if
    `minutes` is not a number above 0."""
    number = _number(minutes)
    if isinstance(number, str) or not 0 < number < 1e9:
        return None
    return f"{number * 60:.15g}"


def _parsed_number(kind: Any, text: str) -> Any:
    """The number that the text stands for. Raises `ValueError` for a number that is too
    large: a float would become infinite, and Python does not print an int of some
    thousand digits, so the page could not show such a counter."""
    number = kind(text)
    if len(text) > 1000 or (number in (math.inf, -math.inf) and re.search(r"\d", text)):
        raise ValueError(f"{text[:20]} is too large a number")
    return number


def _root(environ: Environ) -> str:
    """The path at which the console is mounted, quoted for a URL."""
    return quote(environ.get("SCRIPT_NAME", ""), encoding="latin-1").rstrip("/")


def _quoted(key: str) -> str:
    """The key quoted for a URL. A name may hold any characters, also surrogates."""
    return quote(key, safe="", errors="surrogatepass")


STATES = ("", "open", "half-open", "busy", "unknown", "closed")


def _filter_of(fields: dict[str, str]) -> Callable[[str, dict[str, Any]], bool]:
    """A function that says of the key and the picture of a breaker whether the filter,
    the fields ``q`` and ``state``, lets the breaker through. Raises `Refusal` for a
    state that does not exist."""
    words, state = fields.get("q", "").casefold(), fields.get("state", "")
    if state not in STATES:
        raise Refusal(422, f"state must be one of {', '.join(STATES[1:])}")
    return lambda key, picture: (
        words in key.casefold() and state in ("", _state_of(picture))
    )


class _Form:
    """What the operator typed and pressed on the page, and what the next page answers.
    The whole page is one HTML form, so that a button for one breaker does not throw
    away what the operator typed for another breaker.

    `typed` has the texts of the fields that the operator has changed, `errors` and
    `notices` messages for fields, each by ident of the breaker and name of the field.
    `do` is the value of the button that was pressed, such as "set.5" or "yes.5.60";
    `question` is the value of the button that says yes on the next page.
    """

    def __init__(self, fields: dict[str, str]) -> None:
        self.q, self.state = fields.get("q", "").strip(), fields.get("state", "")
        self.change_id = fields.get("did", "")
        self.do = fields.get("do", "")
        self.token = fields.get("page", "").partition(".")[0]
        self.typed: dict[str, dict[str, str]] = {}
        self.errors: dict[str, dict[str, str]] = {}
        self.notices: dict[str, dict[str, str]] = {}
        self.question = ""
        self.unfolded = ""  # the ident of the breaker that the page shows unfolded
        self.message = ""
        self.lost = ""  # says what was typed for breakers that no longer exist
        self.is_done = False  # whether the message tells of a change
        self._fields = fields

    @classmethod
    def from_query(cls, environ: Environ) -> _Form:
        """The form of a request for the page, whose query has the filter."""
        form = cls(_fields(environ.get("QUERY_STRING", "")))
        _filter_of({"state": form.state})
        return form

    @classmethod
    def from_body(cls, fields: dict[str, str]) -> _Form:
        """The form that the browser has sent, whose body has `fields`."""
        form = cls(fields)
        _filter_of({"state": form.state})
        for name, text in fields.items():
            ident, _, field = name.partition(".")
            if not field or field in ("was", "name"):
                continue
            before = {"why": "", "minutes": DEFAULT_MINUTES, **form.seen_texts(ident)}
            known = field in before or field in SETTINGS
            if known and text.strip() != before.get(field):
                form.typed.setdefault(ident, {})[field] = text
        return form

    def seen_texts(self, ident: str) -> dict[str, str]:
        """The texts of the settings of a breaker on the page that the operator saw."""
        texts = self._fields.get(f"{ident}.was", "").split("|")
        return dict(zip(SETTINGS, texts)) if len(texts) == len(SETTINGS) else {}

    def typed_settings(self, ident: str) -> dict[str, str]:
        """The texts of the settings of a breaker that the operator has changed."""
        typed = self.typed.get(ident, {})
        return {name: typed[name] for name in SETTINGS if name in typed}

    def reason(self, ident: str) -> str | None:
        return self.typed.get(ident, {}).get("why") or None

    def forget(self, ident: str, *names: str) -> None:
        """Drop what the operator typed into these fields of a breaker."""
        typed = self.typed.get(ident, {})
        for name in names:
            typed.pop(name, None)
        if not typed:
            self.typed.pop(ident, None)

    def carried_over(self, idents: dict[str, str]) -> _Form:
        """This form of another process's page as a form for this process: texts that
        were typed for a breaker go to the breaker with the same name here. `idents` has
        the idents of this process's breakers by name."""
        form = _Form({"q": self.q, "state": self.state})
        message = (
            "This page was made by another process: the program has been restarted, "
        )
        message += "or several processes answer here. Nothing was changed."
        if self.typed:
            message += " What you typed is in its fields again; look, then press again."
        for ident, typed in self.typed.items():
            name = self._fields.get(f"{ident}.name", "")
            if name in idents:
                form.typed[idents[name]] = typed
            else:
                form._lose(name, typed)
        form.say(message)
        return form

    def drop_gone(self, present: Iterable[str]) -> None:
        """Move what was typed for breakers that no longer exist into the message.
        `present` has the idents of the breakers that exist."""
        for ident in self.typed.keys() - present:
            self._lose(self._fields.get(f"{ident}.name", ""), self.typed.pop(ident))

    def _lose(self, name: str, typed: dict[str, str]) -> None:
        texts = ", ".join(f"{field} = {text}" for field, text in typed.items())
        self.lost += f" For {name!r}, which is no longer there, was typed: {texts}."

    def filter_changed(self) -> bool:
        return f"{self.q} {self.state}" != self._fields.get("shown", "")

    def say(self, message: str, done: bool = False) -> None:
        self.message, self.is_done = message, done

    def query(self, **more: str) -> str:
        """The query of a URL that shows the page with this filter."""
        fields = {"q": self.q, "state": self.state, **more}
        text = urlencode({k: v for k, v in fields.items() if v}, errors="replace")
        return f"?{text}" if text else ""


# Writing pages. escape() makes every text that may hold HTML harmless.


class _Page:
    """All breakers at one moment, and methods that write them as HTML."""

    def __init__(self, console: Console, environ: Environ, form: _Form) -> None:
        deadline = time.monotonic() + PAGE_WAIT
        self._console, self._form = console, form
        self._root = _root(environ)
        self._now = _now()
        everything = [
            _Row(key, watch, watch.picture(deadline))
            for key, watch in console.watches().items()
        ]
        everything.sort(key=_Row.rank)
        self._counts: dict[str, int] = dict.fromkeys(STATES[1:], 0)
        for row in everything:
            self._counts[row.state] += 1
        matches = _filter_of({"q": form.q, "state": form.state})
        outcome = console._outcomes.get(form.change_id)
        if outcome is not None and not form.message:
            form.unfolded, message = outcome
            form.say(message, done=True)
        self._everything = everything
        self._matching = [
            row
            for row in everything
            if matches(row.key, row.picture) or self._is_in_use(row)
        ]
        # A page of ROWS rows must have room for the rows on which the operator works.
        shown = sorted(self._matching, key=self._is_in_use, reverse=True)[:ROWS]
        self._rows = sorted(shown, key=_Row.rank)

    def _is_in_use(self, row: _Row) -> bool:
        """Whether the operator typed into the row or pressed one of its buttons."""
        return row.ident in self._form.typed or row.ident == self._form.unfolded

    def whole(self) -> str:
        """The whole page."""
        form, root = self._form, escape(self._root)
        rows = "".join(self._row(row) for row in self._rows)
        token = self._console._token
        body = f"""<header><h1 id="summary">{self._summary()}</h1>
<p id="process">{self._process()}</p>
<p id="dead" role="alert"></p></header><main>
{self._news()}{self._no_script()}"""
        filters = self._filters()
        if self._console._read_only:
            body += f"""<form method="get" action="{root}/">{filters}</form>
<p>This console is read-only.</p><div id="rows">{rows}</div>"""
        else:
            body += f"""<form method="post" action="{root}/" autocomplete="off">
<input type="hidden" name="page" value="{token}.{secrets.token_hex(8)}">
<input type="hidden" name="shown" value="{escape(f"{form.q} {form.state}")}">
<button class="unseen" tabindex="-1" name="do" value="enter">Do what was typed</button>
{filters}<div id="rows">{rows}</div></form>"""
        live, here = f"{self._root}/live{form.query()}", f"{self._root}/{form.query()}"
        attributes = f'data-live="{escape(live)}" data-here="{escape(here)}" '
        attributes += f'data-token="{token}"'
        return _document(self._title(), f"{body}</main>", attributes, SCRIPT)

    def live(self) -> str:
        """The page without its forms. The script fetches this page and copies its texts
        into the page that the browser shows."""
        rows = "".join(self._row(row, has_form=False) for row in self._rows)
        token = self._console._token
        return (
            f"<!doctype html><html lang=en><title>{escape(self._title())}</title>"
            f'<body data-token="{token}"><h1 id="summary">{self._summary()}</h1>'
            f'<p id="process">{self._process()}</p><p id="shown">{self._shown()}</p>'
            f'<div id="rows">{rows}</div></html>\n'
        )

    def glance(self) -> str:
        """A summary and the breakers that are not closed. A browser without scripts
        shows this short page in a frame."""
        wrong = [row for row in self._rows if row.state != pybreaker.STATE_CLOSED]
        items = "".join(f"<li>{self._headline(row)}</li>" for row in wrong)
        return _document(
            self._title(),
            f"<main><h1>{self._summary()}</h1><p>{self._process()}</p>"
            f"<ul>{items or '<li>No circuit is open.</li>'}</ul></main>",
            'class="glance"',
        )

    def _news(self) -> str:
        """A message that says what was done, or why nothing was done."""
        kind = "done" if self._form.is_done else "said"
        text = escape(self._form.message + self._form.lost)
        return f'<p id="news" role="status" class="{kind}">{text}</p>'

    def _no_script(self) -> str:
        # The page itself holds the outer frame, so the outer frame goes on loading the
        # inner frame when the process no longer answers.
        inner = f"{self._root}/status{self._form.query()}"
        frame = (
            f'<!doctype html><html lang="en"><meta http-equiv="refresh" '
            f'content="{REFRESH}"><title>What is wrong now</title><p>The frame below '
            f"shows what is wrong now. If the frame shows no time, the process does "
            f"not answer; the page tries again every {REFRESH} seconds.</p>"
            f'<iframe title="what is wrong now" width="100%" height="150" '
            f'src="{escape(inner)}"></iframe>'
        )
        return (
            f'<noscript><iframe class="now" title="what is wrong now" '
            f'srcdoc="{escape(frame)}"></iframe><p class="old">The list below is as of '
            f"{_clock(self._now, self._now)}.</p></noscript>"
        )

    def _title(self) -> str:
        return f"{self._summary()} \N{EM DASH} {self._console._service}"

    def _summary(self) -> str:
        counts = [f"{n} {state}" for state, n in self._counts.items() if n]
        return " \N{MIDDLE DOT} ".join(counts) or "no breakers"

    def _process(self) -> str:
        return (
            f"<b>{escape(self._console._service)}</b> on "
            f"{escape(socket.gethostname())}, process {os.getpid()}, running since "
            f"{_clock(_started, self._now)}. As of "
            f'<time id="as-of">{_clock(self._now, self._now)}</time>.'
        )

    def _shown(self) -> str:
        if len(self._rows) == len(self._everything):
            if len(self._rows) < 2:
                return ""
            return f"All {len(self._rows)} breakers, the worst first."
        text = f"{len(self._rows)} of {len(self._everything)} breakers are shown"
        if len(self._rows) < len(self._matching):
            text += "; narrow the search to see the others"
        return f"{text}."

    def _filters(self) -> str:
        form = self._form
        options = "".join(
            f'<option value="{state}"{" selected" if state == form.state else ""}>'
            f"{state or 'any'}</option>"
            for state in STATES
        )
        name, again = 'name="do" value="filter"', ""
        if self._console._read_only:
            name = ""
        else:
            again = '<button name="do" value="reload">Look again</button>'
        return f"""<div class="filters" role="search"><label>Name
<input name="q" value="{escape(form.q)}" type="search"></label>
<label>State <select name="state">{options}</select></label>
<button {name}>Show these breakers</button>{again}
<span id="shown">{self._shown()}</span></div>"""

    # A row of the list.

    def _row(self, row: _Row, has_form: bool = True) -> str:
        form = self._form
        unfolded = self._is_in_use(row)
        # The row whose button was pressed has the focus, unless a field or a question
        # needs the focus.
        has_message = form.errors or form.notices or form.question
        has_focus = row.ident == form.unfolded and not has_message
        forms = ""
        if has_form and not self._console._read_only:
            forms = f'<div class="forms">{self._forms(row)}</div>'
        texts = escape(row.joined_texts())
        return f"""
<details id="b-{row.ident}" class="{row.css_class()}" data-was="{texts}"\
{" open" if unfolded else ""}>
<summary{" autofocus" if has_focus else ""}>{self._headline(row)}</summary>
<div class="story">{self._story(row)}</div>{forms}</details>"""

    def _headline(self, row: _Row) -> str:
        mark, word = row.badge()
        name = escape(row.key)
        return (
            f'<span class="badge"><span aria-hidden="true">{mark}</span> {word}</span> '
            f'<b class="name">{name}</b> <span class="brief">'
            f"{escape(row.brief(self._now))}</span>"
        )

    def _story(self, row: _Row) -> str:
        """What the breaker's state means, its outages, and its changed settings."""
        picture, now, watch = row.picture, self._now, row.watch
        parts = [f"<p><b>{escape(row.meaning(now))}</b></p>"]
        if "error" in picture:
            parts.append(f"<p>Its state cannot be read: {escape(picture['error'])}</p>")
        outage = watch.outage
        if outage is not None:
            parts.append(_outage_html(outage, now))
        elif watch.outages:
            parts.append(_outage_html(watch.outages[0], now))
        if len(watch.outages) > (outage is None):
            earlier = "".join(
                f"<li>{escape(_outage_line(each, now))}</li>"
                for each in watch.outages[outage is None :]
            )
            parts.append(f"<p>Before that:</p><ul>{earlier}</ul>")
        if outage is None and not watch.outages:
            parts.append(
                f"<p>No outage was seen since {_clock(watch.watched_since, now)}, when "
                f"the console began to watch it.</p>"
            )
        by = {name: watch.set_by[name] for name in SETTINGS if name in watch.set_by}
        for name, (value, operator, at, reason) in by.items():
            change = f"{name} = {_setting_text(name, value)} was set by {operator} at "
            change += f"{_clock(at, now)}" + (f": {reason}." if reason else ".")
            parts.append(f"<p>{escape(change)}</p>")
        as_of = datetime.fromisoformat(picture["as_of"])
        parts.append(f'<p class="as-of">As of {_clock(as_of, now)}.</p>')
        return "".join(parts)

    def _forms(self, row: _Row) -> str:
        """The buttons and fields of a row. Each has a label that names the breaker, for
        screen readers."""
        ident, form = row.ident, self._form
        typed = form.typed.get(ident, {})
        errors, notices = form.errors.get(ident, {}), form.notices.get(ident, {})
        of = f'<span class="unseen"> of {escape(row.key)}</span>'
        is_closed = row.state == pybreaker.STATE_CLOSED
        release = "Release half-open" if row.held else "Half-open"
        close = "Release closed" if row.held else "Close"
        buttons = {
            "hold": ("Hold open", ELLIPSIS),
            "hold-on": ("Hold open until released", ELLIPSIS),
            "half-open": (
                f"{release}, let one call try",
                ELLIPSIS if is_closed else "",
            ),
            "close": (f"{close}, let all calls through", "" if is_closed else ELLIPSIS),
            "set": ("Save the settings", ""),
        }
        press = {
            do: f'<button name="do" value="{do}.{ident}">{text}'
            f'<span class="unseen">: {escape(row.key)}</span>{asks}</button>'
            for do, (text, asks) in buttons.items()
        }
        settings = "".join(
            self._field(row, setting, typed, errors, notices) for setting in SETTINGS
        )
        why = escape(typed.get("why", ""))
        why_aria = _aria(ident, "reason", errors, notices, f"{ident}-why-hint")
        why_aria += _typed_mark("why", typed)
        minutes = escape(typed.get("minutes", DEFAULT_MINUTES))
        minutes_aria = _aria(ident, "minutes", errors, notices)
        minutes_aria += _typed_mark("minutes", typed)
        return f"""{self._question(row)}
<input type="hidden" name="{ident}.was" value="{escape(row.joined_texts())}">
<input type="hidden" name="{ident}.name" value="{escape(row.key)}">
<fieldset><legend>Move the circuit{of}</legend>
<p><label for="{ident}-why">Because{of}</label> <input id="{ident}-why" class="why"
 name="{ident}.why" maxlength="{MAX_TEXT}" value="{why}" {why_aria}>
<small id="{ident}-why-hint">shown with what you do, and logged</small></p>
{_message_html(ident, "reason", errors, notices)}
<p><label>Hold open{of} for <input class="few" name="{ident}.minutes"
 inputmode="decimal" value="{minutes}" {minutes_aria}> minutes</label>
{press["hold"]}</p>{_message_html(ident, "minutes", errors, notices)}
<p>{press["hold-on"]}</p><p>{press["half-open"]}</p><p>{press["close"]}</p></fieldset>
<fieldset><legend>Settings{of}</legend><div class="fields">{settings}</div>
<p>{press["set"]}</p></fieldset>"""

    def _question(self, row: _Row) -> str:
        """The question that the operator has to answer before the circuit moves."""
        do, _, argument = self._form.question.partition(".")
        ident, _, exact = argument.partition(".")
        if not do or ident != row.ident:
            return ""
        name = escape(row.key)
        if do == "yes":
            until = _until(float(exact))
            effect = _effect(row.picture.get("dry_run"))
            what = f"Hold {name} open {until}? Meanwhile {effect}."
            yes = f"Yes, hold {name} open"
        elif do == "close-yes":
            what = f"Close {name}? All its calls go through at once, whether or not "
            what += "the service is well again. Half-open lets one call try first."
            yes = f"Yes, close {name}"
        else:
            what = f"Half-open {name}, which is closed? "
            if row.picture.get("dry_run"):
                what += f"Meanwhile {_effect(True)}."
            else:
                what += "Its calls are refused, except one trial at a time, until the "
                what += "trials succeed."
            yes = f"Yes, half-open {name}"
        sure = f'name="do" value="{escape(self._form.question)}" autofocus'
        return f"""<div class="question" role="group" aria-label="Are you sure?">
<p>{what}</p><p><button {sure}>{yes}</button>
<button name="do" value="reload.{ident}">No, leave {name} as it is</button></p></div>"""

    def _field(
        self, row: _Row, name: str, typed: Any, errors: Any, notices: Any
    ) -> str:
        """The field of a setting, with the present value or the text that the operator
        typed, and with its error or notice."""
        ident, now = row.ident, row.texts()[name]
        field = f"{ident}-{name}"
        value = escape(typed.get(name, now))
        aria = _aria(ident, name, errors, notices, f"{field}-hint")
        aria += _typed_mark(name, typed)
        if name == "dry_run":
            options = "".join(
                f"<option{' selected' if each == value else ''}>{each}</option>"
                for each in ("off", "on")
            )
            control = f'<select id="{field}" name="{ident}.{name}" {aria}>'
            control += f"{options}</select>"
        else:
            control = f'<input id="{field}" class="few" name="{ident}.{name}" '
            control += f'value="{value}" inputmode="decimal" {aria}>'
        unsaved = ""
        if name in typed and name not in errors and name not in notices:
            unsaved = f" <i>not saved yet; it is {escape(now)}</i>"
        return f"""<p><label for="{field}">{name}<span class="unseen"> of \
{escape(row.key)}</span></label> {control}
<small id="{field}-hint">{HINTS[name]}{unsaved}</small>
{_message_html(ident, name, errors, notices)}</p>"""


class _Row:
    """The texts of one breaker in the list."""

    def __init__(self, key: str, watch: Watch, picture: dict[str, Any]) -> None:
        self.key, self.watch, self.picture = key, watch, picture
        self.ident = watch.ident
        self.state = _state_of(picture)
        self.held = bool(picture.get("held"))

    def rank(self) -> tuple[Any, ...]:
        """The sort key that puts the worst breaker first."""
        count = self.picture.get("fail_counter", 0)
        return STATES.index(self.state), self.held, -count, self.key.casefold()

    def badge(self) -> tuple[str, str]:
        """A mark and a word for the state, so that no reader has to see colors."""
        mark, word = {
            "busy": ("\N{HOURGLASS}\N{VARIATION SELECTOR-15}", "BUSY"),
            "open": ("\N{BLACK SQUARE}", "HELD OPEN" if self.held else "OPEN"),
            "half-open": ("\N{CIRCLE WITH LEFT HALF BLACK}", "HALF-OPEN"),
            "closed": ("\N{WHITE CIRCLE}", "closed"),
            "unknown": ("?", "UNKNOWN"),
        }[self.state]
        return mark, f"{word} (dry run)" if self.picture.get("dry_run") else word

    def css_class(self) -> str:
        count, limit = self.picture.get("fail_counter", 0), self.picture.get("fail_max")
        near = self.state == "closed" and limit and count and count >= limit / 2
        return f"{self.state}{' near' if near else ''}"

    def _wait(self) -> str:
        wait = self.picture["retry_after"]
        return "" if wait is None else human(wait)

    def meaning(self, now: datetime) -> str:
        """What the state means to callers, in a sentence."""
        picture = self.picture
        if picture["busy"]:
            since = datetime.fromisoformat(picture["busy_since"])
            return (
                f"BUSY since {_clock(since, now)}: its lock is held, as by a listener "
                f"that hangs, or its storage does not answer. What follows is older."
            )
        if self.state == "unknown":
            return "UNKNOWN: its storage is out of reach."
        refused = "calls are refused"
        if picture["dry_run"]:
            refused = (
                "calls would be refused, but this is a dry run: all calls go through"
            )
        wait = self._wait()
        if self.state == "open":
            if self.held:
                until = f"for another {wait}" if wait else "until it is released"
                return f"HELD OPEN {until}: {refused}."
            if picture["retry_after"] == 0:
                return "OPEN: the next call is the trial."
            when = f"in {wait}" if wait else "only by hand"
            return f"OPEN: {refused}; the next trial {when}."
        if self.state == "half-open":
            done, needed = picture["success_counter"], picture["success_threshold"]
            admitted = "one call at a time is let through as a trial"
            if picture["dry_run"]:
                admitted = "one call at a time is the trial, and all calls go through"
            text = f"HALF-OPEN: {admitted}; {done} of {needed} successes."
            if picture["retry_after"] != 0:
                text += " A trial is running" + (
                    f"; it has {wait} left." if wait else "."
                )
            return text
        return f"CLOSED: all calls go through. {self._failures()}."

    def _failures(self) -> str:
        limit = self.picture["fail_max"]
        limit = "\N{INFINITY}" if limit is None else limit
        return f"{self.picture['fail_counter']} of {limit} failures"

    def brief(self, now: datetime) -> str:
        """What the line of the breaker says after the breaker's name."""
        if self.picture["busy"]:
            as_of = datetime.fromisoformat(self.picture["as_of"])
            seen = self.picture.get("state", "unknown")
            return f"seen last as {seen} at {_clock(as_of, now)}"
        if "error" in self.picture:
            return f"out of reach: {self.picture['error']}"
        if self.state == "closed":
            return self._failures()
        parts = []
        if self.state == "open":
            in_force = not self.picture["dry_run"]
            parts.append("calls are refused" if in_force else "nothing is refused")
            wait = self._wait()
            if self.held:
                parts.append(f"for another {wait}" if wait else "until released")
            elif self.picture["retry_after"] == 0:
                parts = ["the next call is the trial"]
            else:
                parts.append(f"next trial {f'in {wait}' if wait else 'only by hand'}")
        else:
            done = self.picture["success_counter"]
            parts = ["one call at a time is tried"]
            parts.append(f"{done} of {self.picture['success_threshold']} successes")
        outage = self.watch.outage
        if outage is not None:
            length = human((now - outage.since).total_seconds())
            parts.insert(1, f"for {length}")
            if outage.failed_trials:
                parts.append(_trials(outage.failed_trials))
            error = outage.last_error or outage.reason
            parts.append(error)
        return " \N{MIDDLE DOT} ".join(parts)

    def texts(self) -> dict[str, str]:
        """The texts in the fields of the settings, empty if the console could not read
        the breaker yet."""
        infinite = ("fail_max", "reset_timeout")
        values = {
            name: math.inf if value is None and name in infinite else value
            for name, value in ((each, self.picture.get(each)) for each in SETTINGS)
        }
        if "fail_max" not in self.picture:
            return dict.fromkeys(SETTINGS, "")
        return {name: _setting_text(name, value) for name, value in values.items()}

    def joined_texts(self) -> str:
        """The texts of the settings as one text, as `_Form.seen_texts` reads it."""
        return "|".join(self.texts().values())


def _state_of(picture: dict[str, Any]) -> str:
    """The state under which the summary counts the breaker and the filter finds it."""
    return "busy" if picture["busy"] else str(picture.get("state", "unknown"))


def _outage_html(outage: Outage, now: datetime) -> str:
    """The story of an outage as an HTML list."""
    since, until = outage.since, outage.until
    length = human(((until or now) - since).total_seconds())
    if until is None:
        parts = [f"Since {_clock(since, now)}, for {length}."]
    else:
        parts = [
            f"The last outage lasted {length}, from {_clock(since, now)} to "
            f"{_clock(until, now)}."
        ]
    parts.append(f"It began with: {outage.reason or 'no reason is known'}.")
    if outage.failed_trials:
        assert outage.first_trial and outage.last_trial
        text = f"{_trials(outage.failed_trials)} since; "
        if outage.failed_trials > 1:
            text += f"the first one at {_clock(outage.first_trial, now)}, "
        ago = human((now - outage.last_trial).total_seconds())
        text += f"the last one at {_clock(outage.last_trial, now)} ({ago} ago): "
        parts.append(f"{text}{outage.last_error}.")
    if outage.forgotten_moves:
        parts.append(f"{outage.forgotten_moves} earlier moves by hand are not listed.")
    parts += (f"{_clock(at, now)}: {to}, {reason}." for at, to, reason in outage.moves)
    if until is not None:
        parts.append(f"It ended at {_clock(until, now)}: {outage.ending}.")
    return "<ul>" + "".join(f"<li>{escape(part)}</li>" for part in parts) + "</ul>"


def _trials(number: int) -> str:
    return "1 trial has failed" if number == 1 else f"{number} trials have failed"


def _outage_line(outage: Outage, now: datetime) -> str:
    assert outage.until
    length = human((outage.until - outage.since).total_seconds())
    return f"{_clock(outage.since, now)}, for {length}: {outage.reason}"


def _aria(ident: str, name: str, errors: Any, notices: Any, hint: str = "") -> str:
    """The attributes that tie a field to its error, notice and hint."""
    if name in errors:
        return (
            f'aria-invalid="true" autofocus '
            f'aria-describedby="{f"{ident}-{name}-said {hint}".strip()}"'
        )
    if name in notices:
        return f'autofocus aria-describedby="{f"{ident}-{name}-said {hint}".strip()}"'
    return f'aria-describedby="{hint}"' if hint else ""


def _typed_mark(name: str, typed: Any) -> str:
    """The attribute of a field whose text the operator typed. The script does not
    replace that text."""
    return " data-typed" if name in typed else ""


def _message_html(ident: str, name: str, errors: Any, notices: Any) -> str:
    if name in errors:
        return f'<strong id="{ident}-{name}-said">{escape(errors[name])}</strong>'
    if name in notices:
        return (
            f'<em id="{ident}-{name}-said">{escape(notices[name])}. Nothing was saved; '
            f"press Save again to save your value.</em>"
        )
    return ""


def _document(title: str, body: str, attributes: str = "", script: str = "") -> str:
    script = f"<script>{script}</script>" if script else ""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>'
        f'{escape(title)}</title><meta name="viewport" '
        f'content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
        f"<body {attributes}>{body}{script}</body></html>\n"
    )


def _setting_text(name: str, value: Any) -> str:
    """The value of a setting as the text in its field."""
    if value is None or value is False:
        return "off"
    if value is True:
        return "on"
    return str(value)


def _effect(dry_run: object) -> str:
    """Says what an open circuit does to calls."""
    if dry_run:
        return "all its calls go through, as it is a dry run"
    return "its calls are refused"


def _until(seconds: float) -> str:
    """Says how long a hold lasts, and until when."""
    if seconds == math.inf:
        return "until an operator releases it"
    try:
        end = _now() + timedelta(seconds=seconds)
    except OverflowError:
        return f"for {human(seconds)}"
    return f"for {human(seconds)}, until {_clock(end)}"


def human(seconds: float) -> str:
    """A length of time in its one or two largest units, rounded up to seconds."""
    if seconds == math.inf:
        return "ever"  # for texts such as "for ever"
    whole = max(0, math.ceil(seconds - 1e-9))
    for unit, size, smaller, part in (
        ("d", 86400, "h", 3600),
        ("h", 3600, "min", 60),
        ("min", 60, "s", 1),
    ):
        if whole >= size:
            rest = whole % size // part
            return f"{whole // size} {unit}" + (f" {rest} {smaller}" if rest else "")
    return f"{whole} s"


def _now() -> datetime:
    return datetime.now(timezone.utc)


def _clock(moment: datetime, now: datetime | None = None) -> str:
    """The moment as a time of day, with the date if the date is not that of `now`."""
    moment = moment.astimezone(timezone.utc)
    today = (now or _now()).date() == moment.date()
    return f"{moment:%H:%M:%S} UTC" if today else f"{moment:%Y-%m-%d %H:%M:%S} UTC"


def _iso(moment: datetime | None) -> Any:
    return None if moment is None else moment.isoformat(timespec="seconds")


HINTS = {
    "fail_max": "failures that open the circuit, or inf",
    "window_size": "calls a failure is remembered for, inf, or off: until a success",
    "window_seconds": "seconds a failure is remembered for, or off",
    "reset_timeout": "seconds to a trial, or inf",
    "max_reset_timeout": "seconds up to which reset_timeout doubles, inf, or off",
    "success_threshold": "successful trials that close the circuit",
    "dry_run": "on: nothing is refused",
    "fail_counter": "failures so far; calls go on counting",
}

STYLE = """
:root { color-scheme: light dark; font: 15px/1.35 system-ui, sans-serif;
  --page: #fff; --ink: #1f2328; --soft: #57606a; --line: #d0d7de; --red: #b42318;
  --amber: #7d4e00; --green: #1a6b34; --card: #f6f8fa; --focus: #0550ae }
@media (prefers-color-scheme: dark) { :root { --page: #0d1117; --ink: #e6edf3;
  --soft: #9da7b3; --line: #3d444d; --red: #c93c37; --amber: #e3b341;
  --green: #57c46b; --card: #161b22; --focus: #79b8ff } }
* { box-sizing: border-box }
body { background: var(--page); color: var(--ink); max-width: 90rem; margin: 0 auto;
  padding: .6rem 1rem; overflow-wrap: anywhere }
h1 { font-size: 1.3rem; margin: 0 } p { margin: .3rem 0 } ul { margin: .3rem 0;
  padding-left: 1.2rem }
#process { color: var(--soft); margin-top: .1rem } #process b { color: var(--ink) }
#dead:empty, #news:empty { display: none }
#dead { background: var(--red); color: #fff; padding: .5rem .8rem; font-weight: 600;
  position: sticky; top: 0; z-index: 2; border: 3px solid var(--red) }
#news { border: 2px solid var(--amber); padding: .4rem .7rem; border-radius: .3rem }
#news.done { border-color: var(--green) }
.dead main, .dead h1, .dead #process { filter: grayscale(1); --ink: var(--soft);
  color: var(--soft) }
.dead details .badge { background: none; color: var(--soft);
  border: 2px dotted var(--soft) }
.dead .badge::before, .dead h1::before { content: "was " }
.filters { display: flex; flex-wrap: wrap; gap: .3rem .8rem; align-items: center;
  margin: .4rem 0 }
#shown, .old, small, .as-of { color: var(--soft) }
#rows { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem),
  1fr)); gap: .1rem .5rem }
details { border: 1px solid var(--line); border-left: 5px solid var(--line);
  border-radius: .25rem; scroll-margin-top: 4rem; position: relative;
  overflow: clip }
details:not(.closed), details[open] { grid-column: 1 / -1 }
details[open] { background: var(--card) }
details.open { border-left-color: var(--red) }
details.half-open { border-left: 5px dashed var(--amber) }
:is(details.busy, details.unknown) { border-left: 5px double var(--soft) }
details:target { outline: 2px solid var(--focus) }
details.gone { opacity: .6 }
summary { cursor: pointer; padding: .1rem .5rem; white-space: nowrap; overflow: hidden;
  text-overflow: ellipsis; min-height: 24px }
details[open] > summary { white-space: normal }
details[open] > summary .brief { display: none }
.badge { display: inline-block; border: 2px solid transparent; border-radius: .25rem;
  padding: 0 .35rem; font-weight: 650; font-size: .88rem; line-height: 1.1 }
.open .badge { background: var(--red); color: #fff; border-color: var(--red) }
.half-open .badge { color: var(--amber); border: 2px dashed var(--amber) }
:is(.busy, .unknown) .badge { border: 2px dotted currentcolor }
.closed .badge { color: var(--green); font-weight: 400 }
.near .brief { color: var(--amber); font-weight: 600 }
.brief { color: var(--soft) }
.story, .forms { padding: .1rem .8rem .3rem }
.forms { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem),
  1fr)); gap: .5rem }
fieldset { border: 1px solid var(--line); border-radius: .3rem; margin: 0;
  min-width: 0 }
.fields p { display: grid; grid-template-columns: 10rem 7rem 1fr; gap: .1rem .5rem;
  align-items: baseline }
.fields label { font-family: ui-monospace, monospace; font-size: .9rem }
.fields strong, .fields em { grid-column: 1 / -1 }
input, select, button { font: inherit; color: inherit; background: var(--page);
  border: 1px solid var(--soft); border-radius: .25rem; padding: .1rem .4rem;
  min-height: 26px; max-width: 100% }
button { background: var(--card); cursor: pointer; margin: .1rem .2rem .1rem 0;
  border-color: var(--ink) }
.few { width: 7rem } .why { width: min(100%, 20rem) }
:focus-visible { outline: 3px solid var(--focus); outline-offset: 1px }
input[aria-invalid] { border: 2px solid var(--red) }
strong, em { display: block; border-radius: .25rem; padding: .15rem .5rem;
  font-weight: 500; font-style: normal }
strong { color: #fff; background: var(--red); border: 2px solid var(--red) }
em, .question { border: 2px solid var(--amber) }
.question { padding: .3rem .8rem; border-radius: .3rem; grid-column: 1 / -1;
  background: var(--page) }
.unseen { position: absolute; width: 1px; height: 1px; overflow: hidden;
  clip-path: inset(50%); white-space: nowrap; padding: 0; border: 0; min-height: 0 }
.now { width: 100%; height: 15rem; border: 1px solid var(--line) }
.glance { padding: 0 } .glance li { list-style: none }
@media (max-width: 40rem) { body { padding: .2rem .4rem } #rows { gap: 0 }
  summary { padding: 0 .4rem; line-height: 1.4 } details { margin-top: -1px }
  .filters { gap: .2rem .5rem; margin: .2rem 0 }
  .filters input { width: 7rem } .fields p {
  grid-template-columns: 1fr 7rem } .fields small { grid-column: 1 / -1 } }
body:has(.old) :is(#rows .badge, #summary) { animation: age 0s 5s forwards }
body:has(.old) :is(#rows .badge, #summary)::before { content: "was "; font-size: 0;
  animation: word 0s 5s forwards }
@keyframes age { to { background: none; color: var(--soft);
  border-color: var(--soft) } }
@keyframes word { to { font-size: 1em } }
@media (forced-colors: active) { .open .badge { forced-color-adjust: none;
  background: Highlight; color: HighlightText; border-color: Highlight }
  .closed .badge { border-color: Canvas } details.open { border-left-width: 8px } }
"""

# The script keeps the page up to date. The page works without the script, too: a frame
# then shows the present state. The script never changes a field into which the operator
# has typed.
SCRIPT = """
"use strict";
(() => {
  const body = document.body, dead = document.getElementById("dead");
  const rows = document.getElementById("rows");
  const byId = (place, id) => place.querySelector("#" + CSS.escape(id));
  const isDirty = (place) => [...place.querySelectorAll("input, select")].some(
    (field) => field.type !== "hidden" && ("typed" in field.dataset || (field.options
      ? [...field.options].some((option) => option.selected !== option.defaultSelected)
      : field.value !== field.defaultValue)));
  const copyHtml = (old, now) => {
    if (old && now && old.innerHTML !== now.innerHTML) old.innerHTML = now.innerHTML;
  };
  const renewFields = (row, was) => {
    const before = row.querySelector("input[name$='.was']");
    if (!before || before.value === was || isDirty(row)) return;
    const names = NAMES, values = was.split("|"), id = row.id.slice(2);
    names.forEach((name, i) => {
      const field = byId(row, id + "-" + name);
      if (field.options) {
        for (const option of field.options) {
          option.selected = option.defaultSelected = option.value === values[i];
        }
      } else field.value = field.defaultValue = values[i];
    });
    before.value = was;
  };
  const isUsed = () => rows.matches(":hover, :focus-within") ||
    rows.querySelector("details[open]");
  const show = (page) => {
    document.title = page.title;
    for (const id of ["summary", "process", "shown"]) {
      copyHtml(document.getElementById(id), page.getElementById(id));
    }
    const present = new Set();
    for (const now of page.querySelectorAll("#rows > details")) {
      present.add(now.id);
      const old = byId(rows, now.id);
      if (!old) { listDiffers = true; continue; }
      if (old.className !== now.className) old.className = now.className;
      copyHtml(old.querySelector("summary"), now.querySelector("summary"));
      copyHtml(old.querySelector(".story"), now.querySelector(".story"));
      renewFields(old, now.dataset.was);
    }
    for (const old of rows.children) {
      if (!present.has(old.id)) { old.classList.add("gone"); listDiffers = true; }
    }
    // While the operator uses the list, the rows keep their order: no row moves away
    // from under the pointer.
    if (!isUsed()) {
      for (const now of page.querySelectorAll("#rows > details")) {
        const old = byId(rows, now.id);
        if (old) rows.append(old);
      }
    }
  };
  const noAnswer = "NO ANSWER, was ";
  let listDiffers = false, otherAnswers = 0;
  // Loads the page anew, with other breakers or from another process.
  const reload = () => {
    const button = document.querySelector("button[value=reload]");
    if (button && isDirty(document)) button.click();
    else location.replace(body.dataset.here);
  };
  const refresh = async () => {
    try {
      const stop = new AbortController(), hangs = new Error("2 seconds have passed");
      const timer = setTimeout(() => stop.abort(hangs), 2000);
      const answer = await fetch(body.dataset.live, { signal: stop.signal,
        cache: "no-store" });
      if (!answer.ok) throw new Error("the answer is " + answer.status);
      const page = new DOMParser().parseFromString(await answer.text(), "text/html");
      clearTimeout(timer);
      if (page.body.dataset.token !== body.dataset.token) {
        // The program was restarted, or several processes answer at this address.
        // After an error, or five such answers in a row, the page is loaded anew.
        otherAnswers += 1;
        if (otherAnswers >= 5) return reload();
        throw new Error("another process answers");
      }
      otherAnswers = 0;
      body.classList.remove("dead");
      dead.textContent = "";
      show(page);
      if (listDiffers && !isUsed() && !isDirty(document)) return reload();
    } catch (error) {
      if (!error.message.startsWith("another")) otherAnswers = 5;
      const asOf = document.getElementById("as-of").textContent;
      body.classList.add("dead");
      const text = "NO ANSWER from the process (" + error.message + "). All below is "
        + "as of " + asOf + ", not as of now. The page tries again every 2 seconds.";
      if (dead.textContent !== text) dead.textContent = text;
      const title = document.title;
      if (!title.startsWith(noAnswer)) document.title = noAnswer + title;
    }
    setTimeout(refresh, 2000);
  };
  setTimeout(refresh, 1000);
  let isSent = false;
  addEventListener("submit", () => { isSent = true; });
  addEventListener("beforeunload", (event) => {  // on reloading or leaving the page
    if (!isSent && isDirty(rows)) event.preventDefault();
  });
})();
""".replace("NAMES", json.dumps(SETTINGS))


def _hash_of(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


HEADERS = [
    (
        "Content-Security-Policy",
        f"default-src 'none'; style-src 'sha256-{_hash_of(STYLE)}'; "
        f"script-src 'sha256-{_hash_of(SCRIPT)}'; connect-src 'self'; "
        f"frame-src 'self'; form-action 'self'; frame-ancestors 'self'; "
        f"base-uri 'none'",
    ),
    ("X-Frame-Options", "SAMEORIGIN"),
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "same-origin"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Cache-Control", "no-store"),
]


# Watching. The console remembers the outages of breakers that no page has shown yet.


class _Watcher:
    """A thread that makes a console find new breakers. The thread ends when the console
    no longer exists."""

    def __init__(self, console: Console) -> None:
        self._console = weakref.ref(console)
        self.start()

    def start(self) -> None:
        self._ended = threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(self._ended,), name="pybreaker-console", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        self._thread.join(WAIT)

    def _run(self, ended: threading.Event) -> None:
        while self._find_breakers():
            if ended.wait(SEARCH_INTERVAL):
                return

    def _find_breakers(self) -> bool:
        """Have the console find new breakers. False: the console no longer exists."""
        console = self._console()
        if console is None:
            return False
        try:
            console.listen()
        except Exception:
            logger.exception("looking for new breakers failed")
        return True


_watchers: weakref.WeakKeyDictionary[Console, _Watcher] = weakref.WeakKeyDictionary()
_started = _now()


def _before_fork() -> None:
    """End the threads, because a process should not fork while it has threads."""
    for watcher in list(_watchers.values()):
        watcher.stop()


def _after_fork_in_parent() -> None:
    for watcher in list(_watchers.values()):
        watcher.start()


def _after_fork_in_child() -> None:
    """Give the child's consoles new tokens, as the parent made the pages that have the
    old tokens."""
    global _started
    _started = _now()
    for console, watcher in list(_watchers.items()):
        console._begin_process()
        watcher.start()


if hasattr(os, "register_at_fork"):  # Windows has no forks
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=_after_fork_in_parent,
        after_in_child=_after_fork_in_child,
    )


# Serving the console.


class Server(socketserver.ThreadingMixIn, wsgiref.simple_server.WSGIServer):
    """The HTTP server that `serve` makes.

    The server serves at most 32 connections at a time, each in a thread. Further
    connections wait in the backlog of the operating system, where they cost the process
    nothing. The server cuts off a connection after 10 seconds, or after 1 second
    without a whole request while other clients wait. Of connections that bring no whole
    request, the server accepts 32 at once, and then 16 a second.
    """

    daemon_threads = True
    request_queue_size = BACKLOG

    def __init__(self, *args: Any) -> None:
        self._slots = threading.BoundedSemaphore(CONNECTIONS)
        self._connections_lock = threading.Lock()
        self._accepted_at: dict[Any, float] = {}  # when each connection was accepted
        self._with_request: set[Any] = set()  # connections that brought a whole request
        # How many idle connections the server may accept now.
        self._idle_allowance = float(IDLE_BURST)
        self._refilled_at = time.monotonic()
        self._closing = threading.Event()
        self._file_owner: int | None = None  # the process that made the Unix socket
        super().__init__(*args)
        # A client in the backlog may hang up before accept(), which must not block.
        self.socket.setblocking(False)

    def server_bind(self) -> None:
        if self.address_family != getattr(socket, "AF_UNIX", None):
            # HTTPServer's method would look the server's name up, and may wait.
            socketserver.TCPServer.server_bind(self)
            place: Any = self.server_address
            self.server_name, self.server_port = place[:2]
        else:
            _remove_stale_socket(str(self.server_address))
            self.socket.bind(self.server_address)
            self._file_owner = os.getpid()
            os.chmod(str(self.server_address), 0o600)  # before a client can connect
            self.server_name, self.server_port = "localhost", 0
        self.setup_environ()

    def server_close(self) -> None:
        self._closing.set()
        super().server_close()
        if self._file_owner == os.getpid():  # a forked child has only a copy
            self._file_owner = None
            with contextlib.suppress(OSError):
                os.unlink(str(self.server_address))

    def shutdown(self) -> None:
        self._closing.set()
        super().shutdown()

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        self._closing.clear()
        super().serve_forever(poll_interval)

    def get_request(self) -> tuple[Any, Any]:
        """Accept a connection. Raises `OSError` if there is no connection or if the
        limits allow none now; `serve_forever` then tries again."""
        self._refill()
        if self._idle_allowance < 1 or not self._slots.acquire(timeout=0.1):
            self._closing.wait(0.1)
            raise BlockingIOError("too many connections")
        try:
            connection, address = super().get_request()
            connection.settimeout(CONNECTION_TIMEOUT)
        except BaseException as exc:
            self._slots.release()
            if isinstance(exc, OSError) and not isinstance(exc, BlockingIOError):
                self._closing.wait(ACCEPT_PAUSE)  # such as without file descriptors
            raise
        with self._connections_lock:
            self._accepted_at[connection] = time.monotonic()
        return connection, address or ("unix", 0)

    def _refill(self) -> None:
        now = time.monotonic()
        with self._connections_lock:
            more = (now - self._refilled_at) * IDLE_A_SECOND
            self._idle_allowance = min(IDLE_BURST, self._idle_allowance + more)
            self._refilled_at = now

    def note_request(self, connection: Any) -> None:
        """Note that the connection has brought a whole request."""
        with self._connections_lock:
            self._with_request.add(connection)

    def service_actions(self) -> None:
        """Cut off connections whose time is over. `serve_forever` calls this method
        several times a second."""
        now = time.monotonic()
        with self._connections_lock:
            connections, asked = dict(self._accepted_at), set(self._with_request)
        crowded = len(connections) >= CONNECTIONS
        for connection, since in connections.items():
            hurry = crowded and connection not in asked
            if now - since > (CROWDED_TIMEOUT if hurry else CONNECTION_TIMEOUT):
                with contextlib.suppress(OSError):  # a thread has just closed it
                    connection.shutdown(socket.SHUT_RDWR)

    def close_request(self, request: Any) -> None:
        with self._connections_lock:
            counted = self._accepted_at.pop(request, None) is not None
            if counted and request not in self._with_request:
                self._idle_allowance -= 1
            self._with_request.discard(request)
        super().close_request(request)
        if counted:
            self._slots.release()

    def shutdown_request(self, request: Any) -> None:
        # Closing a connection with unread bytes resets the connection, and the client
        # may lose the answer to a body that is too large. So the server reads the rest.
        with contextlib.suppress(OSError):
            request.shutdown(socket.SHUT_WR)
            request.settimeout(1)
            for _ in range(256):
                size = len(request.recv(65536))
                if not size:
                    break
                with self._connections_lock:
                    self._idle_allowance -= size / WASTED_BYTES
                    if self._idle_allowance < 0:
                        break
        self.close_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        logger.debug("lost %s", client_address, exc_info=True)


class Server6(Server):
    address_family = socket.AF_INET6


class ServerUnix(Server):
    address_family = getattr(socket, "AF_UNIX", socket.AF_INET)


class _RawInput(io.RawIOBase):
    """The bytes that a client sends. A client sends a request in one or two pieces, the
    head and the body. From a client that sends more pieces, the server reads only every
    `SMALL_READ_PAUSE` seconds, because each read wakes a thread."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._small_reads = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self._small_reads > 2:
            time.sleep(SMALL_READ_PAUSE)  # meanwhile the system collects more bytes
        size: int = self._connection.recv_into(buffer)
        self._small_reads += size < len(buffer)
        return size


class _RequestReader(io.BufferedReader):
    """Reads the head of a request, of at most `MAX_HEAD` bytes, and the body, and calls
    `on_whole_request` when the whole body has arrived."""

    def __init__(self, connection: Any, on_whole_request: Callable[[], None]) -> None:
        super().__init__(_RawInput(connection), 65536)
        self._on_whole_request = on_whole_request
        self._head_left = MAX_HEAD
        self.has_whole_head = False

    def readline(self, size: int | None = -1) -> bytes:
        if self.has_whole_head:  # an application reads the body
            return super().readline(size)
        line = super().readline(self._head_left)
        self._head_left -= len(line)
        self.has_whole_head = line in (b"\r\n", b"\n")
        return line

    def read(self, size: int | None = -1) -> bytes:
        content = super().read(size)
        if len(content) == size:
            self._on_whole_request()
        return content


class _ServerHandler(wsgiref.simple_server.ServerHandler):
    """Runs the WSGI application for one request. The WSGI environment has no variables
    of the process, because one of them could pass for a user or a header."""

    os_environ: MutableMapping[str, str] = {}


class Handler(wsgiref.simple_server.WSGIRequestHandler):
    timeout = CONNECTION_TIMEOUT

    def setup(self) -> None:
        super().setup()
        server: Any = self.server
        self._note_request = partial(server.note_request, self.connection)
        self._request = _RequestReader(self.connection, self._note_request)
        self.rfile.close()
        self.rfile = self._request

    def handle(self) -> None:
        """Answer one request with a `_ServerHandler`."""
        self.raw_requestline = self.rfile.readline()
        if self.parse_request():
            rfile: Any = self.rfile
            wfile: Any = self.wfile
            server: Any = self.server
            stderr, environ = self.get_stderr(), self.get_environ()
            handler: Any = _ServerHandler(rfile, wfile, stderr, environ)
            handler.request_handler = self
            handler.run(server.get_app())

    def parse_request(self) -> bool:
        if not super().parse_request():
            return False
        if not self._request.has_whole_head:
            self.send_error(400, "the head of the request is too long or not whole")
            return False
        if self.headers.get("Content-Length", "0") == "0":
            self._note_request()
        return True

    def address_string(self) -> str:
        return str(self.client_address[0])

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: the console logs the changes, and reading is not logged."""


def _remove_stale_socket(path: str) -> None:
    """Remove a Unix socket on which no process listens. Raises `OSError` if a process
    listens there, or if the file is not a socket."""
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            raise OSError(f"{path} is there already and is no socket")
    except FileNotFoundError:
        return
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as probe:
        try:
            probe.connect(path)
        except OSError:
            os.unlink(path)
        else:
            raise OSError(f"{path} is in use: another process listens there")


def serve(console: Application, address: str = "127.0.0.1", port: int = 8300) -> Server:
    """Returns a server that listens for requests to the console and answers when the
    program calls the server's `serve_forever`, for example in a thread.

    With `port` 0 the system chooses a free port: the server's `server_port`. An
    `address` such as "unix:/run/app/console.sock" is a Unix socket, to which only the
    user of the process can connect.

    Raises `TypeError` or `ValueError` for a wrong argument, and `OSError` if the server
    cannot listen at the address.
    """
    if not isinstance(address, str):
        raise TypeError(f"address must be a string, not {address!r}")
    if isinstance(port, bool) or not isinstance(port, int):
        raise TypeError(f"port must be a whole number, not {port!r}")
    if not 0 <= port <= 65535:
        raise ValueError(f"port must be from 0 to 65535, not {port!r}")
    kind, _, path = address.partition(":")
    place: Any = (address, port)
    server_class = Server6 if ":" in address else Server
    if kind == "unix":
        if not hasattr(socket, "AF_UNIX"):
            raise ValueError(f"there are no Unix sockets here: {address!r}")
        server_class, place = ServerUnix, path
    server = server_class(place, Handler)
    server.set_app(console)
    return server


def demo() -> list[pybreaker.CircuitBreaker]:
    """Three breakers with threads that call them. Two of the services fail at times."""
    breakers = [
        pybreaker.CircuitBreaker(name="weather", reset_timeout=10),
        pybreaker.CircuitBreaker(name="payments", reset_timeout=60),
        pybreaker.CircuitBreaker(name="search/v2 <b>beta</b>", success_threshold=3),
    ]

    def work(breaker: pybreaker.CircuitBreaker, healthy: float, ill: float) -> None:
        def service() -> None:
            if time.monotonic() % (healthy + ill) > healthy:
                raise ConnectionError(f"{breaker.name} refused the connection")

        while True:
            time.sleep(0.3)
            with contextlib.suppress(Exception):
                breaker.call(service)

    for breaker, healthy, ill in zip(breakers, (20, 60, 30), (25, 0, 5)):
        args = breaker, healthy, ill
        threading.Thread(target=work, args=args, daemon=True).start()
    return breakers


def main() -> None:
    """The command ``python -m pybreaker_extras.console``, which serves the demo."""
    parser = argparse.ArgumentParser(description="A console with a demo behind it.")
    parser.add_argument("--listen", default="127.0.0.1", metavar="ADDRESS")
    parser.add_argument("--port", default=8300, type=int)
    parser.add_argument("--name", default=[], nargs="+", help="its other host names")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    hosts = [*LOOPBACK, options.listen, *options.name]
    console = Console(demo(), hosts, service="demo")
    server = serve(console, options.listen, options.port)
    host = f"[{options.listen}]" if ":" in options.listen else options.listen
    place = f"http://{host}:{server.server_port}/"
    if options.listen.startswith("unix:"):
        place = options.listen
    print(f"The console is at {place}", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()


if __name__ == "__main__":
    main()
