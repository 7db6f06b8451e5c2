"""An operator's console: the breakers of a running process, seen and steered.

    python -m pybreaker_extras.console

shows a demo on http://127.0.0.1:8300/ : a page for a person, and the same as JSON
for scripts:

    curl http://127.0.0.1:8300/breakers
    curl http://127.0.0.1:8300/breakers/weather
    curl -X PATCH -d '{"fail_max": 20, "reset_timeout": 30}' http://127.0.0.1:8300/breakers/weather
    curl -X POST -d '{"seconds": 1800, "reason": "new disks"}' http://127.0.0.1:8300/breakers/weather/open
    curl -X POST http://127.0.0.1:8300/breakers/weather/half_open
    curl -X POST -d '{"reason": "disks are in"}' http://127.0.0.1:8300/breakers/weather/close

A PATCH is done as a whole or not at all. In JSON, null stands for `math.inf` where a
setting cannot be off, and for "off" elsewhere, where ``"inf"`` stands for `math.inf`;
null seconds hold a circuit open until it is released. Quote a name as in any URL,
"a/b" as "a%2Fb"; for "..", curl wants --path-as-is.

In a program of your own, the console listens on a port of its own:

    threading.Thread(target=serve(Console()).serve_forever, daemon=True).start()

or stands beside your site, as it is a WSGI application:

    application = Console(hosts=["www.example.com"]).mount(application, "/ops")

The console asks for no password unless it is given `authorize`: every client that
reaches it may press the buttons. So it listens on the loopback address unless told
otherwise, answers only to the host names that it was given, and lets no page of
another site change anything. Every change is logged on the logger
"pybreaker_extras.console", at level WARNING, with who asked for it.
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
# A pair that limits each other is set in whatever order works; the counter comes last,
# as fail_max limits it.
LIMITS = ("window_seconds", "window_size", "fail_max")
TIMEOUTS = ("max_reset_timeout", "reset_timeout")
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
TRANSITIONS = 20  # that are remembered of each breaker one by one
HAND_MOVES = 10  # by hand, that an outage's story tells one by one
OUTAGES = 5  # that are over and still remembered
NEWS = 256  # changes whose outcome is remembered for the page that asked
ROWS = 300  # on a page; the filter finds the others
REFRESH = 2  # seconds between two looks of the page
PATIENCE = 10  # seconds that a client has to ask and to take the answer
LOOK = 0.25  # seconds that one page waits for breakers that are busy
LEAST_LOOK = 0.005  # that a page waits for a breaker that was not busy when seen last
MORE_LOOKS = 0.5  # seconds that all these least looks of a page may take together
WAIT = 1.0  # seconds that a change waits for a breaker that is busy
CRUMBS = 0.1  # seconds between two readings from a client that sends little at a time
MAX_HEAD = 32 * 1024  # bytes of a request before its body,
MAX_BODY = 16 * 1024  # and of the body,
MAX_FORM = 1024 * 1024  # or of a page that is sent back: the page may have `ROWS` rows
MAX_TEXT = 300  # characters of a reason, as the library has it
CONNECTIONS = 32  # at a time
BACKLOG = 128  # connections that the system keeps waiting
HURRY = 1.0  # seconds that a connection has to ask while others wait
BURST = 32  # connections that ask for nothing and are let in at once,
IDLE_A_SECOND = 16  # and after that
UNREAD = 1024 * 1024  # bytes sent in vain that count as one more such connection
PAUSE = 0.5  # seconds, when the system cannot give another connection
FIND = 1.0  # seconds between two searches for new breakers
ELLIPSIS = "\N{HORIZONTAL ELLIPSIS}"  # of a button that asks before it does anything
MINUTES = "30"  # that a hold lasts unless the operator types another number

logger = logging.getLogger("pybreaker_extras.console")


# What is known of a breaker.


class Outage(NamedTuple):
    """The story of one outage. It has the same size however long the outage lasts."""

    since: datetime
    reason: str  # of the first opening, with the first error
    failed_trials: int = 0
    first_trial: datetime | None = None  # that failed
    last_trial: datetime | None = None
    last_error: str = ""
    moves: tuple[tuple[datetime, str, str], ...] = ()  # by hand: when, where to, why
    forgotten_moves: int = 0  # that came before these
    until: datetime | None = None
    ending: str = ""

    def follow(self, now: datetime, old: str, new: str, reason: str) -> Outage:
        """The story with one more transition in it."""
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
        if self == Outage(self.since, reason):  # a look has told the story so far
            return self
        moves = (*self.moves, (now, new, reason))
        too_many = max(0, len(moves) - HAND_MOVES)
        return self._replace(
            moves=moves[too_many:], forgotten_moves=self.forgotten_moves + too_many
        )

    def for_json(self) -> dict[str, Any]:
        told = self._asdict()
        told["moves"] = [
            {"at": _iso(at), "to": to, "reason": reason}
            for at, to, reason in self.moves
        ]
        for name in ("since", "until", "first_trial", "last_trial"):
            told[name] = _iso(told[name])
        return told


class Busy(Exception):
    """Another thread holds the breaker's lock for long, or the breaker is gone."""


class _Spare(pybreaker.CircuitBreaker):
    """A breaker that guards nothing: its setters tell at no risk what they refuse."""


class Watch:
    """What the console knows of a breaker, and keeps without keeping the breaker alive.

    It is a listener of transitions alone, so calls of a closed circuit need no lock
    for it. Each look at the breaker waits for no lock longer than it was told to.
    """

    only_watches = True  # so that a breaker of CircuitBreakers can go

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
        self.since = _now()
        self.transitions: tuple[dict[str, str], ...] = ()  # the newest is the first
        self.moved = 0  # how often
        self.outage: Outage | None = None
        self.outages: tuple[Outage, ...] = ()  # that are over; the newest is the first
        self.set_by: dict[str, tuple[Any, str, datetime, str]] = {}
        self._last: dict[str, Any] | None = None  # the last picture
        self._busy_since: datetime | None = None
        self._looker: threading.Thread | None = None

    @property
    def breaker(self) -> pybreaker.CircuitBreaker | None:
        return self._reference()

    @property
    def name(self) -> str | None:
        breaker = self.breaker
        return None if breaker is None else breaker.name

    def state_change(self, cb: Any, old_state: Any, new_state: Any) -> None:
        """Remember a transition. The breaker's lock is held."""
        now, old, new = _now(), old_state.name, new_state.name
        reason = self._redact(new_state.reason)[: 2 * MAX_TEXT]
        transition = {"at": _iso(now), "from": old, "to": new, "reason": reason}
        self.transitions = (transition, *self.transitions)[:TRANSITIONS]
        self.moved += 1
        if self.outage is not None:
            outage = self.outage.follow(now, old, new, reason)
            self.outage = None if outage.until else outage
            if outage.until:
                self.outages = (outage, *self.outages)[:OUTAGES]
        elif new != pybreaker.STATE_CLOSED:
            self.outage = Outage(now, reason)

    @contextlib.contextmanager
    def holding(self, patience: float) -> Iterator[pybreaker.CircuitBreaker]:
        """The breaker with its lock held, unless that takes longer than this."""
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

    # Looking.

    def listen(self) -> None:
        """Listen to the breaker, unless its lock is held: then there is a next time."""
        if not self._listens:
            with contextlib.suppress(Busy), self.holding(0.0) as breaker:
                self._listen_to(breaker)

    def _listen_to(self, breaker: pybreaker.CircuitBreaker) -> None:
        if not self._listens:
            breaker.add_listener(self)
            self._listens = True

    def picture(self, deadline: float) -> dict[str, Any]:
        """All there is to show, as a dict for `json.dumps`. It is that of an earlier
        moment, and says so, where the breaker is busy beyond the deadline."""
        breaker = self.breaker
        if self._busy_since is not None:  # the time is for the other breakers
            deadline = 0.0
        if breaker is None or _may_be_read(breaker):
            self._take(deadline)
        else:  # a storage of the user's own may hang, or wait for a network
            if self._looker is None or not self._looker.is_alive():
                self._looker = threading.Thread(
                    target=self._take, args=(deadline,), daemon=True
                )
                self._looker.start()
            self._looker.join(max(0.0, deadline - time.monotonic()))
            if self._looker.is_alive():
                self._busy_since = self._busy_since or _now()
        picture = self._last or {"name": self.name, "as_of": _iso(self.since)}
        busy_since = self._busy_since
        return {
            "id": self.ident,
            **picture,
            "busy": busy_since is not None,
            "busy_since": _iso(busy_since),
            "watched_since": _iso(self.since),
            "outage": self.outage.for_json() if self.outage else None,
            "outages": [outage.for_json() for outage in self.outages],
            "transitions": list(self.transitions),
        }

    def _take(self, deadline: float) -> None:
        """Look at the breaker, and keep what is seen."""
        try:
            left = deadline - time.monotonic()
            least = min(LEAST_LOOK, left + MORE_LOOKS)
            patience = max(left, least if self._busy_since is None else 0.0)
            with self.holding(patience) as breaker:
                self._listen_to(breaker)
                try:
                    picture = breaker.snapshot()
                    self._begin_with(picture, breaker)
                    held = _held_for(breaker, picture["state"])
                    # Once the time of a hold has passed, the next call is the trial.
                    picture["held"] = held is not None and picture["retry_after"] != 0
                    picture["reason"] = self._redact(picture["reason"])
                except (
                    Exception
                ) as exc:  # a storage is out of reach, the others are not
                    error = self._redact(repr(exc))[:MAX_TEXT]
                    picture = {"name": breaker.name, "error": error}
        except Busy:
            self._busy_since = self._busy_since or _now()
        else:
            self._last = {**picture, "as_of": _iso(_now())}
            self._busy_since = None

    def _begin_with(self, picture: dict[str, Any], breaker: Any) -> None:
        """Begin the story of an outage that the watch has not seen beginning, and end
        one whose end only the storage has seen."""
        if picture["state"] == pybreaker.STATE_CLOSED:
            if self.outage is not None:
                ended = self.outage._replace(until=_now(), ending=picture["reason"])
                self.outage, self.outages = None, (ended, *self.outages)[:OUTAGES]
        elif self.outage is None:
            opened_at = picture["opened_at"]
            since = datetime.fromisoformat(opened_at) if opened_at else _now()
            self.outage = Outage(since, self._redact(picture["reason"]))

    # Steering.

    def move(
        self, move: str, who: str, reason: str | None, seconds: float | None, match: str
    ) -> str:
        """Open, half-open or close the circuit. Returns the state that it was in."""
        text = f"by hand, from {who}"
        options: dict[str, Any] = {"reason": f"{text}: {reason}" if reason else text}
        if seconds is not None:
            options["seconds"] = seconds
        with self.holding(WAIT) as breaker:
            self._check_tag(breaker, match)
            before = breaker.current_state
            method = getattr(breaker, move)
            try:
                inspect.signature(method).bind(**options)
            except TypeError:  # a subclass has one of its own, in the older manner
                if seconds is not None:
                    raise Refusal(
                        422,
                        f"the {move}() of this breaker's class takes no seconds",
                        details={"errors": {"seconds": "this breaker takes none"}},
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
        who: str,
        was: dict[str, str] | None = None,
        match: str = "",
        reason: str = "",
    ) -> Change:
        """Set all these settings or none."""
        done = Change({}, {}, {})
        with self.holding(WAIT) as breaker:
            self._check_tag(breaker, match)
            done.before.update(_settings_of(breaker, values))
            for name, before in done.before.items():
                now = _shown(name, before)
                # The count moves by itself, so another one is no colleague's.
                if was and name != "fail_counter" and was.get(name, now) != now:
                    done.notices[name] = (
                        f"meanwhile {now}, {self._setter(name, before)}"
                    )
            paired = _settings_of(breaker, (*LIMITS, *TIMEOUTS))
            done.errors.update(_errors_of(values, paired))
            if done.errors or done.notices:
                return done
            self._set_all(breaker, values, paired, done)
            if not done.errors:
                for name in values:
                    value = getattr(breaker, name)
                    self.set_by[name] = (value, who, _now(), reason)
        return done

    def _set_all(
        self, breaker: Any, values: dict[str, Any], paired: Any, done: Change
    ) -> None:
        """Set them one by one, or set back what was set. The lock is held, so no call
        counts by half of them."""
        were: list[str] = []
        for name in _order_of(values, paired):
            try:
                setattr(breaker, name, values[name])
            except Exception as exc:
                for earlier in reversed(were):
                    setattr(breaker, earlier, done.before[earlier])
                if not isinstance(exc, (TypeError, ValueError)):
                    raise
                # Such as a storage with a limit of its own.
                done.errors[name] = str(exc)
                return
            were.append(name)

    def _setter(self, name: str, value: Any) -> str:
        """Who has set a setting to the value that it has."""
        by = self.set_by.get(name)
        if by is None or by[0] != value:
            return "set by the program"
        return f"set by {by[1]} at {_clock(by[2])}"

    def tag(self, picture: dict[str, Any]) -> str:
        """An entity tag: another one when a setting or the state is another one. The
        counters, which every call may move, are left out."""
        told = [picture.get(name) for name in SETTINGS if name != "fail_counter"]
        told += [self.ident, picture.get("state"), self.moved]
        digest = hashlib.sha256(json.dumps(told).encode("utf-8", "replace"))
        return f'"{digest.hexdigest()[:20]}"'

    def _check_tag(self, breaker: Any, match: str) -> None:
        """Refuse a change that was decided on something else than what is so now."""
        if not match or match.strip() == "*":
            return
        if self.tag(breaker.snapshot()) not in re.split(r"\s*,\s*", match.strip()):
            raise Refusal(412, "the breaker has changed meanwhile: look at it again")


class Change(NamedTuple):
    """What came of changing settings; each by the setting's name."""

    before: dict[str, Any]
    errors: dict[str, str]
    notices: dict[str, str]  # of settings that a colleague has changed meanwhile


def _may_be_read(breaker: Any) -> bool:
    """Whether the breaker's storage says that it may be read at any time."""
    return bool(vars(type(breaker._state_storage)).get("_is_plain", False))


def _held_for(breaker: Any, state: str) -> float | None:
    """The length of an opening that has one of its own, which is a hold."""
    if state != pybreaker.STATE_OPEN:
        return None
    move = breaker._state_storage.last_move()
    seconds: float | None = getattr(move, "seconds", None)
    return seconds


def _settings_of(breaker: Any, names: Iterable[str]) -> dict[str, Any]:
    return {name: getattr(breaker, name) for name in names}


def _errors_of(values: dict[str, Any], paired: dict[str, Any]) -> dict[str, str]:
    """What the library has to say against these settings, in its words."""
    errors = {}
    for name, value in values.items():
        # Settings that no other setting can be in the way of.
        spare = _Spare(fail_max=1, reset_timeout=0)
        try:
            setattr(spare, name, value)
        except (TypeError, ValueError) as exc:
            errors[name] = str(exc)
    for pair in () if errors else (LIMITS, TIMEOUTS):
        wanted = {name: values.get(name, paired[name]) for name in pair}
        try:
            _Spare(**wanted)
        except (TypeError, ValueError) as exc:
            changed = [name for name in pair if name in values]
            errors.update((name, str(exc)) for name in changed if name in str(exc))
    return errors


def _order_of(values: dict[str, Any], paired: dict[str, Any]) -> list[str]:
    """An order in which all setters accept these settings."""
    order = []
    for pair in (LIMITS, TIMEOUTS):
        changed = [name for name in pair if name in values]
        for attempt in itertools.permutations(changed):
            spare = _Spare(**{name: paired[name] for name in pair})
            try:
                for name in attempt:
                    setattr(spare, name, values[name])
            except (TypeError, ValueError):
                continue
            changed = list(attempt)
            break
        order += changed
    return order + [name for name in SETTINGS if name in values and name not in order]


# What is answered.


class Refusal(Exception):
    """A request that is not granted. It has changed nothing."""

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


# An apostrophe may be part of a name and of a password, and may stand after a URL.
_URL_PASSWORD = re.compile(r"(://[^\s/:\"]*:)[^\s\"<>]*@")
# The end of a text that was cut where a password may have been.
_CUT_PASSWORD = re.compile(r"(://[^\s/:\"]*:)(?!\d{1,5}(?:[/?#)']|$))[^\s\"<>@]+$")
_QUERY_PASSWORD = re.compile(
    r"([?&;#](?:\w*(?:pass(?:word|wd|phrase)?|pwd|secret|token|api_?key))=)[^&;\s'\"<>]+",
    re.IGNORECASE,
)


def _redacted(redact: Callable[[str], str] | None, text: str) -> str:
    """What may be shown of a text."""
    if redact is None:
        return text
    try:
        return str(redact(text))
    except Exception:
        logger.exception("redact failed, so a text is not shown")
        return "(not shown, as redact failed)"


def blot_out_passwords(text: str) -> str:
    """The text with three asterisks in the place of passwords in URLs."""
    text = _URL_PASSWORD.sub(r"\1***@", text)
    text = _CUT_PASSWORD.sub(r"\1***", text)
    return _QUERY_PASSWORD.sub(r"\1***", text)


class Console:
    """A WSGI application that shows breakers and lets an operator steer them.

    `breakers` is an iterable, which is looked through for each answer if it can be;
    None: all breakers of the process, new ones as they appear. The console keeps
    none of them alive; what it was given does.

    `hosts` are the names under which it may be reached: what the address bar of a
    browser shows, without the port. Requests to any other are refused, because a
    name that a stranger owns can be made to lead here (DNS rebinding).

    `service` is what pages call the program. With `read_only` nothing can be changed.
    `authorize` is a function of the WSGI environment that says whether a request is
    granted. `trusted_proxies` are the addresses of proxies (``"unix"``: whatever
    connects to a Unix socket) whose X-Forwarded-For says who asked. `redact` is a
    function that is given each text of an exception and returns what may be shown;
    None: all of it.
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
        self._hosts = frozenset(each.lower() for each in _names("hosts", hosts))
        if service is not None and not isinstance(service, str):
            raise TypeError(f"service must be a string or None, not {service!r}")
        if not isinstance(read_only, bool):
            raise TypeError(f"read_only must be True or False, not {read_only!r}")
        self._service = service or _program()
        self._read_only = read_only
        self._authorize = _checked_function("authorize", authorize)
        self._proxies = frozenset(_names("trusted_proxies", trusted_proxies))
        self._redacts = _checked_function("redact", redact)
        self._watches: dict[int, Watch] = {}  # by the identity of the breaker
        self._numbers = itertools.count(1)
        self._begin_process()
        self.listen()
        _watchers[self] = _Watcher(self)

    def add(self, breaker: pybreaker.CircuitBreaker) -> None:
        """Show one more breaker, beside those that the console was given."""
        _check_breaker(breaker)
        given = self._breakers
        if given is None:
            raise TypeError("a console of all breakers shows this one already")
        self._breakers = (*given, breaker)

    def mount(self, application: Application, path: str) -> Application:
        """A WSGI application that is the console at `path`, such as "/ops", and
        `application` elsewhere."""
        if not (isinstance(path, str) and re.fullmatch(r"(/[^/]+)+", path)):
            raise ValueError(f"path must be like '/ops', not {path!r}")
        prefix = path.encode().decode("latin-1")  # as WSGI has it

        def mounted(environ: Environ, start_response: Any) -> Iterable[bytes]:
            asked = environ.get("PATH_INFO", "")
            if asked != prefix and not asked.startswith(f"{prefix}/"):
                return application(environ, start_response)
            here = {
                **environ,
                "SCRIPT_NAME": environ.get("SCRIPT_NAME", "") + prefix,
                "PATH_INFO": asked[len(prefix) :],
            }
            return self(here, start_response)

        return mounted

    # What there is to show.

    def watches(self) -> dict[str, Watch]:
        """The watches by what URLs call them: the breaker's name. Breakers without
        a name, or with the same, are told apart by a number."""
        watches = self._all_watches()
        names = [watch.name or "unnamed" for watch in watches]
        # A number makes no name that another breaker has of its own.
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
        with self._growing:
            watches = []
            for breaker in breakers:
                watch = self._watches.get(id(breaker))
                if watch is None or watch.breaker is not breaker:
                    watch = Watch(breaker, str(next(self._numbers)), self._redacts)
                    self._watches[id(breaker)] = watch
                watches.append(watch)
            if len(self._watches) > len(watches):  # of breakers that are gone
                self._watches = {id(b): w for b, w in zip(breakers, watches)}
        return watches

    def _present(self) -> list[pybreaker.CircuitBreaker]:
        if self._breakers is None:
            everything: Iterable[Any] = pybreaker.breakers()
        else:
            everything = _as_tuple(self._breakers)
        unique = {id(each): each for each in everything if not isinstance(each, _Spare)}
        return list(unique.values())

    def listen(self) -> None:
        """Find new breakers, and listen to those that are not listened to yet."""
        for watch in self._all_watches():
            watch.listen()

    def _begin_process(self) -> None:
        # Tells this process from its forks and from the one before a restart.
        self._token = secrets.token_hex(8)
        self._growing = threading.Lock()
        # What was done, with the breaker, by a digest of what asked for it.
        self._news: OrderedDict[str, tuple[str, str]] = OrderedDict()
        self._news_lock = threading.Lock()

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
        if path == "/status":  # whatever the answer was this time
            headers.append(("Refresh", str(REFRESH)))
        start_response(f"{status} {http.HTTPStatus(status).phrase}", headers)
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [content]

    def _answer(self, environ: Environ) -> Answer:
        self._check_host(environ)
        if self._authorize is not None and not _answered(self._authorize(environ)):
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
        body = _read(environ, MAX_FORM if is_page else MAX_BODY)
        answer = handlers[method](environ, body)
        return answer

    def _check_host(self, environ: Environ) -> None:
        host = environ.get("HTTP_HOST", "").lower()
        match = re.fullmatch(r"(?:\[([0-9a-f:.]+)\]|([^\[\]:]+))(?::[0-9]*)?", host)
        if not match or (match[1] or match[2]) not in self._hosts:
            raise Refusal(
                403,
                "this console does not answer to that host name; "
                "its program names them: Console(hosts=[...])",
            )

    def _check_origin(self, environ: Environ) -> None:
        """Refuse what a page of another site sends. Browsers say from where a change
        is asked for; other clients do not, and are not led here by strange pages."""
        site = environ.get("HTTP_SEC_FETCH_SITE", "same-origin")
        origin = environ.get("HTTP_ORIGIN") or environ.get("HTTP_REFERER")
        try:
            same = origin is None or urlsplit(origin).netloc == environ["HTTP_HOST"]
        except ValueError:
            same = False
        if not same or site not in ("same-origin", "none"):
            logger.warning(
                "%s: refused, sent by a page of %r", self._who(environ), origin
            )
            raise Refusal(403, "a page of another site cannot change anything here")

    def _who(self, environ: Environ) -> str:
        """Who asks: a user whom the server knows, or else an address."""
        user = environ.get("REMOTE_USER")
        if user:
            return "".join(c if c.isprintable() else "?" for c in str(user)[:100])
        # Most servers tell no address of a client that connects to a Unix socket.
        unix = "unix" if "unix" in self._proxies else "unknown"
        address = environ.get("REMOTE_ADDR") or unix
        forwarded = environ.get("HTTP_X_FORWARDED_FOR", "").split(",")
        # Each proxy has appended whom it was asked by; the first is only claimed.
        while address in self._proxies and forwarded:
            try:
                address = str(ipaddress.ip_address(forwarded.pop().strip()))
            except ValueError:
                break
        return str(address)

    def _handlers(self, environ: Environ) -> dict[str, Any]:
        """What can be done to what the URL names: functions by HTTP method."""
        try:
            # WSGI hands out the bytes of the URL as if they were Latin-1.
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
        # A name may hold slashes, so it is looked up as it is.
        watches, key, handlers = self.watches(), path[len("/breakers/") :], {}
        if key in watches:
            handlers["GET"] = partial(self._get_one, key, watches[key])
            handlers["PATCH"] = partial(self._patch, key, watches[key])
        key, _, move = key.rpartition("/")
        if key in watches and move in MOVES:
            handlers["POST"] = partial(self._post_move, key, watches[key], move)
        return handlers

    # For scripts.

    def _picture(
        self, environ: Environ, key: str, watch: Watch, deadline: float | None = None
    ) -> dict[str, Any]:
        if deadline is None:
            deadline = time.monotonic() + LOOK
        url = f"{_root(environ)}/breakers/{_quoted(key)}"
        return {"url": url, **watch.picture(deadline)}

    def _tagged(self, environ: Environ, key: str, watch: Watch) -> Answer:
        picture = self._picture(environ, key, watch)
        return 200, [("ETag", watch.tag(picture))], picture

    def _get_all(self, environ: Environ) -> Answer:
        deadline, watches = time.monotonic() + LOOK, self.watches()
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
        if "seconds" in given and seconds is None:  # until the circuit is released
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
        # As the answer to a GET has them.
        values = {
            name: math.inf
            if (value == "inf" if name in MAY_BE_OFF else value is None)
            else value
            for name, value in values.items()
        }
        done = self._change(environ, key, watch, values)
        if done.errors:
            told = "; ".join(dict.fromkeys(done.errors.values()))
            raise Refusal(422, told, details={"errors": done.errors})
        return self._tagged(environ, key, watch)

    # For people.

    def _page(self, environ: Environ, form: _Form, status: int = 200) -> Answer:
        return status, [], _Page(self, environ, form).whole()

    def _get_page(self, environ: Environ) -> Answer:
        return self._page(environ, _Form.asked(environ))

    def _get_live(self, environ: Environ) -> Answer:
        return 200, [], _Page(self, environ, _Form.asked(environ)).live()

    def _get_status(self, environ: Environ) -> Answer:
        return 200, [], _Page(self, environ, _Form.asked(environ)).glance()

    def _post_form(self, environ: Environ, body: bytes) -> Answer:
        watches = {watch.ident: (key, watch) for key, watch in self.watches().items()}
        # Breakers that the page has may be gone, as all are after a restart.
        form = _Form.sent(_fields(body, 20 + 20 * ROWS))
        if form.token != self._token:
            form = form.carried_to({key: i for i, (key, _) in watches.items()})
            return self._page(environ, form, 409)
        form.drop_gone(watches)
        # What a browser that reloads the page sends again is the very same.
        form.did = hashlib.sha256(body).hexdigest()[:20]
        news = self._news.get(form.did)
        if news is not None:
            form.say(f"This was done already: {news[1]}")
            return self._page(environ, form)
        return self._press(environ, form, watches)

    def _press(self, environ: Environ, form: _Form, watches: Any) -> Answer:
        """Do what the button says that was pressed."""
        do, _, argument = form.do.partition(".")
        if do == "enter":  # the key, in some field
            changed = [ident for ident in form.typed if form.settings_of(ident)]
            if form.filter_changed():
                do = "filter"
            elif len(changed) == 1:
                do, argument = "set", changed[0]
            else:
                form.say("Nothing was done yet: press the button that says what to do.")
                return self._page(environ, form)
        if do in ("filter", "reload"):
            form.unfolded = argument  # of a question that was answered with no
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
            told = BUTTONS[do](self, environ, form, key, watch, exact)
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
        except Exception as exc:  # such as a storage out of reach
            logger.exception("a button failed")
            error = _redacted(self._redacts, repr(exc))[:MAX_TEXT]
            form.say(f"The button failed, see how {key} is now: {error}")
            return self._page(environ, form, 500)
        if told is None:  # there is a question, an error or a notice
            status = 422 if form.errors else 409 if form.notices else 200
            return self._page(environ, form, status)
        with self._news_lock:
            self._news[form.did] = ident, told
            while len(self._news) > NEWS:
                self._news.popitem(last=False)
        if form.typed or form.lost:  # elsewhere, and not to be lost
            form.say(told, done=True)
            return self._page(environ, form)
        # See other: so that reloading the page does not ask for it again.
        place = f"{form.query(did=form.did)}#b-{ident}"
        return 303, [("Location", f"{_root(environ)}/{place}")], ""

    def _press_set(
        self, environ: Environ, form: _Form, key: str, watch: Watch, exact: str
    ) -> str | None:
        ident = watch.ident
        texts = form.settings_of(ident)
        if not texts:
            form.say(f"Nothing was changed: no setting of {key} was typed over.")
            return None
        values = {name: _typed_value(name, text) for name, text in texts.items()}
        reason = form.typed[ident].get("why", "")
        done = self._change(environ, key, watch, values, form.was(ident), reason)
        if done.errors:
            form.errors[ident] = done.errors
            return None
        if done.notices:
            form.notices[ident] = done.notices
            return None
        form.forget(ident, *values, "why")
        told = ", ".join(
            f"{name} = {_shown(name, value)} (was {_shown(name, done.before[name])})"
            for name, value in values.items()
        )
        return f"{key}: {told}."

    def _press_hold(
        self, environ: Environ, form: _Form, key: str, watch: Watch, exact: str
    ) -> str | None:
        """Ask, as all calls will be refused."""
        typed = form.typed.get(watch.ident, {}).get("minutes", MINUTES)
        seconds = _seconds_of(typed)
        if seconds is None:
            form.errors[watch.ident] = {
                "minutes": f"minutes must be a number above 0, not {typed!r}; for no "
                "end there is the button beside it"
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
        """Ask first where that changes what calls may do for the worse: closing lets
        all through to a service that may be ill, half-opening refuses calls."""
        picture = watch.picture(time.monotonic() + LOOK)
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
        # A number that was typed beside the question is for another hold, and is kept.
        typed = form.typed.get(watch.ident, {}).get("minutes", MINUTES)
        is_used = _seconds_of(typed) == exact
        form.forget(watch.ident, "why", *(["minutes"] if is_used else []))
        breaker = watch.breaker
        effect = _effect(breaker is not None and breaker.dry_run)
        return f"{key} is held open {_until(seconds)}: {effect}."

    # Both change things here, and leave a trace.

    def _move(
        self,
        environ: Environ,
        key: str,
        watch: Watch,
        move: str,
        reason: str | None = None,
        seconds: float | None = None,
    ) -> None:
        who, match = self._who(environ), environ.get("HTTP_IF_MATCH", "")
        before = watch.move(move, who, reason, seconds, match)
        length = "" if seconds is None else f" for {seconds} s"
        because = f", because {reason!r}" if reason else ""
        logger.warning(
            "%s: %r: %s%s, was %s%s", who, key, move, length, before, because
        )

    def _change(
        self,
        environ: Environ,
        key: str,
        watch: Watch,
        values: dict[str, Any],
        was: dict[str, str] | None = None,
        reason: str = "",
    ) -> Change:
        who, match = self._who(environ), environ.get("HTTP_IF_MATCH", "")
        values = {name: values[name] for name in SETTINGS if name in values}
        done = watch.change(values, who, was, match, reason)
        because = f", because {reason!r}" if reason else ""
        for name in () if done.errors or done.notices else values:
            value, before = values[name], done.before[name]
            logger.warning(
                "%s: %r: %s = %r, was %r%s", who, key, name, value, before, because
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


# Checking what a console is given.


def _checked_breakers(breakers: Any) -> Any:
    if breakers is None:
        return None
    if isinstance(breakers, pybreaker.CircuitBreaker):
        raise TypeError(f"breakers must be an iterable of them: [{breakers!r}]")
    if isinstance(breakers, dict):  # such as CircuitBreakers
        breakers = breakers.values()
    try:
        if iter(breakers) is breakers:  # can be gone through only once
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
    """All of it at one moment, though other threads may be adding to it."""
    for _ in range(100):
        with contextlib.suppress(RuntimeError):  # it has grown meanwhile
            return tuple(iterable)
    return tuple(iterable)


def _names(parameter: str, names: Any) -> list[str]:
    if isinstance(names, str):
        raise TypeError(f"{parameter} must be an iterable of names: [{names!r}]")
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
        type(function).__call__  # of an object
    ):
        raise TypeError(
            f"{parameter} must be a plain function, as nothing would await what "
            f"{function!r} returns"
        )
    return function


def _answered(answer: object) -> object:
    """What `authorize` has answered, unless that would have to be awaited: an object
    that nothing awaits is true, and would grant every request."""
    if not inspect.isawaitable(answer):
        return answer
    if inspect.iscoroutine(answer):
        answer.close()  # so that Python does not warn that nothing awaited it
    raise TypeError(
        f"authorize must be a plain function, as nothing awaits what it returned: "
        f"{answer!r}"
    )


def _program() -> str:
    """What the program was started as."""
    main = sys.modules.get("__main__")
    spec = getattr(main, "__spec__", None)
    if spec is not None and spec.name:
        return str(spec.name).rpartition(".__main__")[0] or str(spec.name)
    return os.path.basename(sys.argv[0] if sys.argv else "") or "python"


# Reading requests.


def _read(environ: Environ, limit: int) -> bytes:
    if "HTTP_TRANSFER_ENCODING" in environ:
        raise Refusal(411, "the length of the body must be in Content-Length")
    length = environ.get("CONTENT_LENGTH") or "0"
    if not (length.isascii() and length.isdigit()):
        raise Refusal(400, "Content-Length must be a number of bytes")
    if len(length) > 9 or int(length) > limit:
        raise Refusal(413, f"the body must not be longer than {limit} bytes")
    try:
        body: bytes = environ["wsgi.input"].read(int(length))
    except OSError:  # such as the server's timeout
        raise Refusal(400, "the body could not be read") from None
    if len(body) < int(length):
        raise Refusal(400, "the body is shorter than Content-Length says")
    return body


def _json(body: bytes) -> Any:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    def members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(values := dict(pairs)) < len(pairs):
            raise ValueError("a name is there twice")
        return values

    try:
        return json.loads(
            body.decode(),
            parse_constant=refuse,
            parse_int=partial(_parsed, int),
            parse_float=partial(_parsed, float),
            object_pairs_hook=members,
        )
    except (ValueError, RecursionError) as exc:
        raise Refusal(400, f"the body is not JSON: {exc}") from None


def _fields(form: bytes | str, limit: int = 20) -> dict[str, str]:
    """The fields of a form, or of a query, by name."""
    try:
        text = form if isinstance(form, str) else form.decode("ascii")
        pairs = parse_qsl(text, keep_blank_values=True, max_num_fields=limit)
    except ValueError:
        raise Refusal(400, "the fields cannot be read") from None
    if len(fields := dict(pairs)) < len(pairs):
        raise Refusal(400, "a field is there twice")
    return fields


def _typed_value(name: str, text: str) -> Any:
    """What was typed into the field of a setting; as it is, for the setter to refuse,
    where it means nothing."""
    text = text.strip()
    if name in MAY_BE_OFF and text in ("", "off"):
        return None
    if name == "dry_run":
        return {"on": True, "off": False}.get(text, text)
    return _number(text)


def _number(text: str) -> Any:
    """What was typed as a number, or as it is."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return _parsed(kind, text)
    return text


def _seconds_of(minutes: str) -> str | None:
    """The length of a hold, as the button that is sure has it. None: the text is no
    length."""
    number = _number(minutes)
    if isinstance(number, str) or not 0 < number < 1e9:
        return None
    return f"{number * 60:.15g}"


def _parsed(kind: Any, text: str) -> Any:
    """The number, unless it is too large: a float would become infinite, and an int
    of some thousand digits can be counted up until it cannot be shown any more."""
    number = kind(text)
    if len(text) > 1000 or (number in (math.inf, -math.inf) and re.search(r"\d", text)):
        raise ValueError(f"{text[:20]} is too large a number")
    return number


def _root(environ: Environ) -> str:
    """The path under which the console is mounted."""
    return quote(environ.get("SCRIPT_NAME", ""), encoding="latin-1").rstrip("/")


def _quoted(key: str) -> str:
    # Such a key survives URLs and forms, whatever is in the breaker's name.
    return quote(key, safe="", errors="surrogatepass")


STATES = ("", "open", "half-open", "busy", "unknown", "closed")


def _filter_of(fields: dict[str, str]) -> Callable[[str, dict[str, Any]], bool]:
    """Whether a breaker is among those that were asked for."""
    words, state = fields.get("q", "").casefold(), fields.get("state", "")
    if state not in STATES:
        raise Refusal(422, f"state must be one of {', '.join(STATES[1:])}")
    return lambda key, picture: (
        words in key.casefold() and state in ("", _state_of(picture))
    )


class _Form:
    """The form that the whole page is, so that no button throws away what was typed
    beside another one.

    `typed` has what was typed over, by breaker and field; `errors` and `notices` what
    is to be said of a field; `question` the button that is to be pressed again.
    """

    def __init__(self, fields: dict[str, str]) -> None:
        self.q, self.state = fields.get("q", "").strip(), fields.get("state", "")
        self.did = fields.get("did", "")
        self.do = fields.get("do", "")
        self.token = fields.get("page", "").partition(".")[0]
        self.typed: dict[str, dict[str, str]] = {}
        self.errors: dict[str, dict[str, str]] = {}
        self.notices: dict[str, dict[str, str]] = {}
        self.question = ""
        self.unfolded = ""
        self.message = ""
        self.lost = ""  # what was typed for breakers that are gone
        self.is_done = False
        self._fields = fields

    @classmethod
    def asked(cls, environ: Environ) -> _Form:
        """From the query of a page that is asked for."""
        form = cls(_fields(environ.get("QUERY_STRING", "")))
        _filter_of({"state": form.state})
        return form

    @classmethod
    def sent(cls, fields: dict[str, str]) -> _Form:
        """From the body of a page that was sent back."""
        form = cls(fields)
        _filter_of({"state": form.state})
        for name, text in fields.items():
            ident, _, field = name.partition(".")
            if not field or field in ("was", "name"):
                continue
            before = {"why": "", "minutes": MINUTES, **form.was(ident)}
            known = field in before or field in SETTINGS
            if known and text.strip() != before.get(field):
                form.typed.setdefault(ident, {})[field] = text
        return form

    def was(self, ident: str) -> dict[str, str]:
        """What stood in the fields of the settings."""
        texts = self._fields.get(f"{ident}.was", "").split("|")
        return dict(zip(SETTINGS, texts)) if len(texts) == len(SETTINGS) else {}

    def settings_of(self, ident: str) -> dict[str, str]:
        """The settings that were typed over."""
        typed = self.typed.get(ident, {})
        return {name: typed[name] for name in SETTINGS if name in typed}

    def reason(self, ident: str) -> str | None:
        return self.typed.get(ident, {}).get("why") or None

    def forget(self, ident: str, *names: str) -> None:
        """Drop what has been used."""
        typed = self.typed.get(ident, {})
        for name in names:
            typed.pop(name, None)
        if not typed:
            self.typed.pop(ident, None)

    def carried_to(self, idents: dict[str, str]) -> _Form:
        """The same for the breakers of the same name in another process."""
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
        """Tell what was typed for breakers that are gone."""
        for ident in self.typed.keys() - present:
            self._lose(self._fields.get(f"{ident}.name", ""), self.typed.pop(ident))

    def _lose(self, name: str, typed: dict[str, str]) -> None:
        told = ", ".join(f"{field} = {text}" for field, text in typed.items())
        self.lost += f" For {name!r}, which is no longer there, was typed: {told}."

    def filter_changed(self) -> bool:
        return f"{self.q} {self.state}" != self._fields.get("shown", "")

    def say(self, message: str, done: bool = False) -> None:
        self.message, self.is_done = message, done

    def query(self, **more: str) -> str:
        """The query of the page that shows the same breakers."""
        fields = {"q": self.q, "state": self.state, **more}
        text = urlencode({k: v for k, v in fields.items() if v}, errors="replace")
        return f"?{text}" if text else ""


# Writing pages. Whatever comes from outside goes through escape().


class _Page:
    """A look at all breakers at one moment, written as HTML."""

    def __init__(self, console: Console, environ: Environ, form: _Form) -> None:
        deadline = time.monotonic() + LOOK
        self._console, self._form = console, form
        self._root, self._who = _root(environ), console._who(environ)
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
        news = console._news.get(form.did)
        if news is not None and not form.message:
            form.unfolded = news[0]
            form.say(news[1], done=True)
        self._everything = everything
        self._matching = [
            row
            for row in everything
            if matches(row.key, row.picture) or self._is_in_use(row)
        ]
        # If there are more than ROWS, the rows on which the operator works are shown.
        shown = sorted(self._matching, key=self._is_in_use, reverse=True)[:ROWS]
        self._rows = sorted(shown, key=_Row.rank)

    def _is_in_use(self, row: _Row) -> bool:
        """Whether the row was typed into, or its button was pressed."""
        return row.ident in self._form.typed or row.ident == self._form.unfolded

    def whole(self) -> str:
        """The page itself."""
        form, root = self._form, escape(self._root)
        rows = "".join(self._row(row) for row in self._rows)
        token = self._console._token
        body = f"""<header><h1 id="summary">{self._summary()}</h1>
<p id="process">{self._process()}</p>
<p id="dead" role="alert"></p></header><main>
{self._news()}{self._no_script()}"""
        filters = self._filters()
        # One form, so that no button throws away what was typed beside another one.
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
        """What the script puts into the page: all of it but the forms."""
        rows = "".join(self._row(row, has_form=False) for row in self._rows)
        token = self._console._token
        return (
            f"<!doctype html><html lang=en><title>{escape(self._title())}</title>"
            f'<body data-token="{token}"><h1 id="summary">{self._summary()}</h1>'
            f'<p id="process">{self._process()}</p><p id="shown">{self._shown()}</p>'
            f'<div id="rows">{rows}</div></html>\n'
        )

    def glance(self) -> str:
        """What a browser without scripts shows in a frame: what is wrong."""
        wrong = [row for row in self._rows if row.state != pybreaker.STATE_CLOSED]
        items = "".join(f"<li>{self._headline(row)}</li>" for row in wrong)
        return _document(
            self._title(),
            f"<main><h1>{self._summary()}</h1><p>{self._process()}</p>"
            f"<ul>{items or '<li>No circuit is open.</li>'}</ul></main>",
            'class="glance"',
        )

    def _news(self) -> str:
        """What was done, or why nothing was."""
        kind = "done" if self._form.is_done else "said"
        text = escape(self._form.message + self._form.lost)
        return f'<p id="news" role="status" class="{kind}">{text}</p>'

    def _no_script(self) -> str:
        # The outer frame comes from the page itself, so it can load the inner one
        # again though the process is gone.
        inner = f"{self._root}/status{self._form.query()}"
        frame = (
            f'<!doctype html><html lang="en"><meta http-equiv="refresh" '
            f'content="{REFRESH}"><title>What is wrong now</title><p>In the frame '
            f"below is what is so now. If it shows no time, the process does not "
            f"answer; it is asked every {REFRESH} seconds.</p>"
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
        told = [f"{n} {state}" for state, n in self._counts.items() if n]
        return " \N{MIDDLE DOT} ".join(told) or "no breakers"

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
        told = f"{len(self._rows)} of {len(self._everything)} breakers are shown"
        if len(self._rows) < len(self._matching):
            told += "; narrow the search to see the others"
        return f"{told}."

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
        # The page that comes back shows the row whose button was pressed.
        said = form.errors or form.notices or form.question
        has_focus = row.ident == form.unfolded and not said
        forms = ""
        if has_form and not self._console._read_only:
            forms = f'<div class="forms">{self._forms(row)}</div>'
        return f"""
<details id="b-{row.ident}" class="{row.looks()}" data-was="{escape(row.was())}"\
{" open" if unfolded else ""}>
<summary{" autofocus" if has_focus else ""}>{self._headline(row)}</summary>
<div class="story">{self._story(row)}</div>{forms}</details>"""

    def _headline(self, row: _Row) -> str:
        mark, word = row.word()
        name = escape(row.key)
        return (
            f'<span class="badge"><span aria-hidden="true">{mark}</span> {word}</span> '
            f'<b class="name">{name}</b> <span class="brief">'
            f"{escape(row.brief(self._now))}</span>"
        )

    def _story(self, row: _Row) -> str:
        """What is so, and how it came to that."""
        picture, now, watch = row.picture, self._now, row.watch
        parts = [f"<p><b>{escape(row.means(now))}</b></p>"]
        if "error" in picture:
            parts.append(f"<p>Its state cannot be read: {escape(picture['error'])}</p>")
        outage = watch.outage
        if outage is not None:
            parts.append(_told(outage, now))
        elif watch.outages:
            parts.append(_told(watch.outages[0], now))
        if len(watch.outages) > (outage is None):
            earlier = "".join(
                f"<li>{escape(_briefly(each, now))}</li>"
                for each in watch.outages[outage is None :]
            )
            parts.append(f"<p>Before that:</p><ul>{earlier}</ul>")
        if outage is None and not watch.outages:
            parts.append(
                f"<p>No outage was seen since {_clock(watch.since, now)}, when the "
                f"console began to watch it.</p>"
            )
        by = {name: watch.set_by[name] for name in SETTINGS if name in watch.set_by}
        for name, (value, who, at, reason) in by.items():
            told = f"{name} = {_shown(name, value)} was set by {who} at "
            told += f"{_clock(at, now)}" + (f": {reason}." if reason else ".")
            parts.append(f"<p>{escape(told)}</p>")
        as_of = datetime.fromisoformat(picture["as_of"])
        parts.append(f'<p class="as-of">As of {_clock(as_of, now)}.</p>')
        return "".join(parts)

    def _forms(self, row: _Row) -> str:
        """Buttons and fields. Each has a name that tells the breaker."""
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
        why, minutes = escape(typed.get("why", "")), typed.get("minutes", MINUTES)
        why_is = _described(ident, "reason", errors, notices, f"{ident}-why-hint")
        why_is += _mark_of("why", typed)
        minutes_are = _described(ident, "minutes", errors, notices)
        minutes_are += _mark_of("minutes", typed)
        return f"""{self._question(row)}
<input type="hidden" name="{ident}.was" value="{escape(row.was())}">
<input type="hidden" name="{ident}.name" value="{escape(row.key)}">
<fieldset><legend>Move the circuit{of}</legend>
<p><label for="{ident}-why">Because{of}</label> <input id="{ident}-why" class="why"
 name="{ident}.why" maxlength="{MAX_TEXT}" value="{why}" {why_is}>
<small id="{ident}-why-hint">shown with what you do, and logged</small></p>
{_said(ident, "reason", errors, notices)}
<p><label>Hold open{of} for <input class="few" name="{ident}.minutes"
 inputmode="decimal" value="{escape(minutes)}" {minutes_are}> minutes</label>
{press["hold"]}</p>{_said(ident, "minutes", errors, notices)}
<p>{press["hold-on"]}</p><p>{press["half-open"]}</p><p>{press["close"]}</p></fieldset>
<fieldset><legend>Settings{of}</legend><div class="fields">{settings}</div>
<p>{press["set"]}</p></fieldset>"""

    def _question(self, row: _Row) -> str:
        """What is asked once before a button does what hurts."""
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
                what += "Its calls are refused but for one at a time, until that "
                what += "succeeds."
            yes = f"Yes, half-open {name}"
        sure = f'name="do" value="{escape(self._form.question)}" autofocus'
        return f"""<div class="question" role="group" aria-label="Are you sure?">
<p>{what}</p><p><button {sure}>{yes}</button>
<button name="do" value="reload.{ident}">No, leave {name} as it is</button></p></div>"""

    def _field(
        self, row: _Row, name: str, typed: Any, errors: Any, notices: Any
    ) -> str:
        """A setting with its present value, or with what was typed and what is to be
        said of it."""
        ident, now = row.ident, row.texts()[name]
        field = f"{ident}-{name}"
        value = escape(typed.get(name, now))
        described = _described(ident, name, errors, notices, f"{field}-hint")
        described += _mark_of(name, typed)
        if name == "dry_run":
            options = "".join(
                f"<option{' selected' if each == value else ''}>{each}</option>"
                for each in ("off", "on")
            )
            control = f'<select id="{field}" name="{ident}.{name}" {described}>'
            control += f"{options}</select>"
        else:
            control = f'<input id="{field}" class="few" name="{ident}.{name}" '
            control += f'value="{value}" inputmode="decimal" {described}>'
        unsaved = ""
        if name in typed and name not in errors and name not in notices:
            unsaved = f" <i>not saved yet; it is {escape(now)}</i>"
        return f"""<p><label for="{field}">{name}<span class="unseen"> of \
{escape(row.key)}</span></label> {control}
<small id="{field}-hint">{HINTS[name]}{unsaved}</small>
{_said(ident, name, errors, notices)}</p>"""


class _Row:
    """A breaker as the list shows it."""

    def __init__(self, key: str, watch: Watch, picture: dict[str, Any]) -> None:
        self.key, self.watch, self.picture = key, watch, picture
        self.ident = watch.ident
        self.state = _state_of(picture)
        self.held = bool(picture.get("held"))

    def rank(self) -> tuple[Any, ...]:
        """The worst is the first."""
        count = self.picture.get("fail_counter", 0)
        return STATES.index(self.state), self.held, -count, self.key.casefold()

    def word(self) -> tuple[str, str]:
        """A mark and a word for the state, which need no colour."""
        mark, word = {
            "busy": ("\N{HOURGLASS}\N{VARIATION SELECTOR-15}", "BUSY"),
            "open": ("\N{BLACK SQUARE}", "HELD OPEN" if self.held else "OPEN"),
            "half-open": ("\N{CIRCLE WITH LEFT HALF BLACK}", "HALF-OPEN"),
            "closed": ("\N{WHITE CIRCLE}", "closed"),
            "unknown": ("?", "UNKNOWN"),
        }[self.state]
        return mark, f"{word} (dry run)" if self.picture.get("dry_run") else word

    def looks(self) -> str:
        count, limit = self.picture.get("fail_counter", 0), self.picture.get("fail_max")
        near = self.state == "closed" and limit and count and count >= limit / 2
        return f"{self.state}{' near' if near else ''}"

    def _wait(self) -> str:
        wait = self.picture["retry_after"]
        return "" if wait is None else human(wait)

    def means(self, now: datetime) -> str:
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
            told = f"HALF-OPEN: {admitted}; {done} of {needed} successes."
            if picture["retry_after"] != 0:
                told += " A trial is running" + (
                    f"; it has {wait} left." if wait else "."
                )
            return told
        return f"CLOSED: all calls go through. {self._failures()}."

    def _failures(self) -> str:
        limit = self.picture["fail_max"]
        limit = "\N{INFINITY}" if limit is None else limit
        return f"{self.picture['fail_counter']} of {limit} failures"

    def brief(self, now: datetime) -> str:
        """The rest of the line."""
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
        """What stands in the fields of the settings."""
        infinite = ("fail_max", "reset_timeout")
        values = {
            name: math.inf if value is None and name in infinite else value
            for name, value in ((each, self.picture.get(each)) for each in SETTINGS)
        }
        if "fail_max" not in self.picture:  # it could not be looked at yet
            return dict.fromkeys(SETTINGS, "")
        return {name: _shown(name, value) for name, value in values.items()}

    def was(self) -> str:
        return "|".join(self.texts().values())


def _state_of(picture: dict[str, Any]) -> str:
    """The state by which a breaker is counted and found."""
    return "busy" if picture["busy"] else str(picture.get("state", "unknown"))


def _told(outage: Outage, now: datetime) -> str:
    """An outage as one story, in HTML."""
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
        told = f"{_trials(outage.failed_trials)} since; "
        if outage.failed_trials > 1:
            told += f"the first one at {_clock(outage.first_trial, now)}, "
        ago = human((now - outage.last_trial).total_seconds())
        told += f"the last one at {_clock(outage.last_trial, now)} ({ago} ago): "
        parts.append(f"{told}{outage.last_error}.")
    if outage.forgotten_moves:
        parts.append(f"{outage.forgotten_moves} earlier moves by hand are not listed.")
    parts += (f"{_clock(at, now)}: {to}, {reason}." for at, to, reason in outage.moves)
    if until is not None:
        parts.append(f"It ended at {_clock(until, now)}: {outage.ending}.")
    return "<ul>" + "".join(f"<li>{escape(part)}</li>" for part in parts) + "</ul>"


def _trials(number: int) -> str:
    return "1 trial has failed" if number == 1 else f"{number} trials have failed"


def _briefly(outage: Outage, now: datetime) -> str:
    assert outage.until
    length = human((outage.until - outage.since).total_seconds())
    return f"{_clock(outage.since, now)}, for {length}: {outage.reason}"


def _described(ident: str, name: str, errors: Any, notices: Any, hint: str = "") -> str:
    """The attributes that tie a field to what is said of it."""
    if name in errors:
        return (
            f'aria-invalid="true" autofocus '
            f'aria-describedby="{f"{ident}-{name}-said {hint}".strip()}"'
        )
    if name in notices:
        return f'autofocus aria-describedby="{f"{ident}-{name}-said {hint}".strip()}"'
    return f'aria-describedby="{hint}"' if hint else ""


def _mark_of(name: str, typed: Any) -> str:
    """What tells the script of a text that was typed, and is not to be renewed."""
    return " data-typed" if name in typed else ""


def _said(ident: str, name: str, errors: Any, notices: Any) -> str:
    if name in errors:
        return f'<strong id="{ident}-{name}-said">{escape(errors[name])}</strong>'
    if name in notices:
        return (
            f'<em id="{ident}-{name}-said">{escape(notices[name])}. Nothing was saved; '
            f"press Save again if yours is to hold.</em>"
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


def _shown(name: str, value: Any) -> str:
    """A setting as it stands in its field."""
    if value is None or value is False:
        return "off"
    if value is True:
        return "on"
    return str(value)


def _effect(dry_run: object) -> str:
    """What an open circuit does to its calls."""
    if dry_run:
        return "all its calls go through, as it is a dry run"
    return "its calls are refused"


def _until(seconds: float) -> str:
    """For how long, and until when."""
    if seconds == math.inf:
        return "until somebody releases it"
    try:
        end = _now() + timedelta(seconds=seconds)
    except OverflowError:
        return f"for {human(seconds)}"
    return f"for {human(seconds)}, until {_clock(end)}"


def human(seconds: float) -> str:
    """A length of time in the one or two units that matter."""
    if seconds == math.inf:
        return "ever"
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
    """The time of day, and the day if it is another one."""
    moment = moment.astimezone(timezone.utc)
    today = (now or _now()).date() == moment.date()
    return f"{moment:%H:%M:%S} UTC" if today else f"{moment:%Y-%m-%d %H:%M:%S} UTC"


def _iso(moment: datetime | None) -> Any:
    return None if moment is None else moment.isoformat(timespec="seconds")


HINTS = {
    "fail_max": "failures that open it, or inf",
    "window_size": "calls a failure is remembered for, inf, or off: until a success",
    "window_seconds": "seconds a failure is remembered for, or off",
    "reset_timeout": "seconds to a trial, or inf",
    "max_reset_timeout": "seconds up to which that doubles, inf, or off",
    "success_threshold": "successful trials that close it",
    "dry_run": "on: nothing is refused",
    "fail_counter": "failures so far; the count goes on by itself",
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

# It needs nothing of the page to be scripted: without it the forms work, and a frame
# shows what is so now. It never touches a field that was typed into.
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
  const put = (old, now) => {
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
      put(document.getElementById(id), page.getElementById(id));
    }
    const present = new Set();
    for (const now of page.querySelectorAll("#rows > details")) {
      present.add(now.id);
      const old = byId(rows, now.id);
      if (!old) { unknown = true; continue; }
      if (old.className !== now.className) old.className = now.className;
      put(old.querySelector("summary"), now.querySelector("summary"));
      put(old.querySelector(".story"), now.querySelector(".story"));
      renewFields(old, now.dataset.was);
    }
    for (const old of rows.children) {
      if (!present.has(old.id)) { old.classList.add("gone"); unknown = true; }
    }
    // Nothing moves under a finger: the order is that of the page while it is used.
    if (!isUsed()) {
      for (const now of page.querySelectorAll("#rows > details")) {
        const old = byId(rows, now.id);
        if (old) rows.append(old);
      }
    }
  };
  const none = "NO ANSWER, was ";
  let unknown = false, strangers = 0;
  const again = () => {  // a page with other breakers, or of another process
    const button = document.querySelector("button[value=reload]");
    if (button && isDirty(document)) button.click();
    else location.replace(body.dataset.here);
  };
  const look = async () => {
    try {
      const stop = new AbortController(), hangs = new Error("it hangs");
      const timer = setTimeout(() => stop.abort(hangs), 2000);
      const answer = await fetch(body.dataset.live, { signal: stop.signal,
        cache: "no-store" });
      if (!answer.ok) throw new Error("the answer is " + answer.status);
      const page = new DOMParser().parseFromString(await answer.text(), "text/html");
      clearTimeout(timer);
      if (page.body.dataset.token !== body.dataset.token) {
        // A process that was started in its place, or one that works beside it.
        strangers += 1;
        if (strangers >= 5) return again();
        throw new Error("another process answers");
      }
      strangers = 0;
      body.classList.remove("dead");
      dead.textContent = "";
      show(page);
      if (unknown && !isUsed() && !isDirty(document)) return again();
    } catch (error) {
      if (!error.message.startsWith("another")) strangers = 5;
      const asOf = document.getElementById("as-of").textContent;
      body.classList.add("dead");
      const text = "NO ANSWER from the process (" + error.message + "). All below is "
        + "as of " + asOf + ", and not what is so now. It is asked every 2 seconds.";
      if (dead.textContent !== text) dead.textContent = text;
      if (!document.title.startsWith(none)) document.title = none + document.title;
    }
    setTimeout(look, 2000);
  };
  setTimeout(look, 1000);
  let isSent = false;
  addEventListener("submit", () => { isSent = true; });
  addEventListener("beforeunload", (event) => {  // the operator reloads or leaves it
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


# Watching. A breaker that no page has shown yet has its outages, too.


class _Watcher:
    """A thread that lets a console find new breakers, as long as there is one."""

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
        while self._look():
            if ended.wait(FIND):
                return

    def _look(self) -> bool:
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
    """End the threads, as a process with threads should not fork."""
    for watcher in list(_watchers.values()):
        watcher.stop()


def _after_fork_in_parent() -> None:
    for watcher in list(_watchers.values()):
        watcher.start()


def _after_fork_in_child() -> None:
    """Begin anew: the child is another process than its parent's pages are of."""
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


# Serving it.


class Server(socketserver.ThreadingMixIn, wsgiref.simple_server.WSGIServer):
    """A thread for each connection, and never more of them than `CONNECTIONS`: others
    wait in the backlog of the system, where they cost the process nothing.

    No client holds a thread by talking slowly. A connection has `PATIENCE` seconds, and
    while others wait, one that has not yet asked for anything has `HURRY`. Connections
    that ask for nothing at all are let in only so many a second.
    """

    daemon_threads = True
    request_queue_size = BACKLOG

    def __init__(self, *args: Any) -> None:
        self._slots = threading.BoundedSemaphore(CONNECTIONS)
        self._since: dict[Any, float] = {}  # of the connections
        self._asked: set[Any] = set()  # those with a whole request
        self._guard = threading.Lock()
        self._allowance = float(BURST)  # connections that may still ask for nothing
        self._counted = time.monotonic()
        self._closing = threading.Event()
        self._file_owner: int | None = None  # the process that made a Unix socket
        super().__init__(*args)
        self.socket.setblocking(False)  # a client that waited may be gone

    def server_bind(self) -> None:
        if self.address_family != getattr(socket, "AF_UNIX", None):
            # Not HTTPServer's, which asks for the name of the address and may wait.
            socketserver.TCPServer.server_bind(self)
            place: Any = self.server_address
            self.server_name, self.server_port = place[:2]
        else:
            _make_way(str(self.server_address))
            self.socket.bind(self.server_address)
            self._file_owner = os.getpid()
            os.chmod(str(self.server_address), 0o600)  # before a client can connect
            self.server_name, self.server_port = "localhost", 0
        self.setup_environ()

    def server_close(self) -> None:
        self._closing.set()
        super().server_close()
        if self._file_owner == os.getpid():  # and not a fork, which has a copy
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
        """Accept a connection. An OSError makes the caller go on to the next turn."""
        self._refill()
        if self._allowance < 1 or not self._slots.acquire(timeout=0.1):
            self._closing.wait(0.1)
            raise BlockingIOError("too many connections")
        try:
            connection, address = super().get_request()
            connection.settimeout(PATIENCE)
        except BaseException as exc:
            self._slots.release()
            if isinstance(exc, OSError) and not isinstance(exc, BlockingIOError):
                self._closing.wait(PAUSE)  # as without file descriptors
            raise
        with self._guard:
            self._since[connection] = time.monotonic()
        return connection, address or ("unix", 0)

    def _refill(self) -> None:
        now = time.monotonic()
        with self._guard:
            more = (now - self._counted) * IDLE_A_SECOND
            self._allowance, self._counted = min(BURST, self._allowance + more), now

    def asks(self, connection: Any) -> None:
        """A whole request has come."""
        with self._guard:
            self._asked.add(connection)

    def service_actions(self) -> None:
        """Called all the while: cut off who has had enough time."""
        now = time.monotonic()
        with self._guard:
            connections, asked = dict(self._since), set(self._asked)
        crowded = len(connections) >= CONNECTIONS
        for connection, since in connections.items():
            hurry = crowded and connection not in asked
            if now - since > (HURRY if hurry else PATIENCE):
                with contextlib.suppress(OSError):  # it has just been closed
                    connection.shutdown(socket.SHUT_RDWR)

    def close_request(self, request: Any) -> None:
        with self._guard:
            counted = self._since.pop(request, None) is not None
            if counted and request not in self._asked:
                self._allowance -= 1
            self._asked.discard(request)
        super().close_request(request)
        if counted:
            self._slots.release()

    def shutdown_request(self, request: Any) -> None:
        # A connection that is closed with something unread is reset, and with it
        # goes the answer to a body that was too large to be read.
        with contextlib.suppress(OSError):
            request.shutdown(socket.SHUT_WR)
            request.settimeout(1)
            for _ in range(256):
                size = len(request.recv(65536))
                if not size:
                    break
                with self._guard:
                    self._allowance -= size / UNREAD
                    if self._allowance < 0:
                        break
        self.close_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        logger.debug("lost %s", client_address, exc_info=True)


class Server6(Server):
    address_family = socket.AF_INET6


class ServerUnix(Server):
    address_family = getattr(socket, "AF_UNIX", socket.AF_INET)


class _Incoming(io.RawIOBase):
    """What a client sends. One that sends crumbs, where others send a head and a body,
    is read only so often: each reading wakes a thread."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._crumbs = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self._crumbs > 2:
            time.sleep(CRUMBS)  # the system gathers what comes meanwhile
        size: int = self._connection.recv_into(buffer)
        self._crumbs += size < len(buffer)
        return size


class _Request(io.BufferedReader):
    """A request as it comes: a head of at most `MAX_HEAD` bytes, and then a body. It
    knows whether the head is whole, and tells when all of the body has come."""

    def __init__(self, connection: Any, told: Callable[[], None]) -> None:
        super().__init__(_Incoming(connection), 65536)
        self._told = told
        self._left = MAX_HEAD
        self.has_whole_head = False

    def readline(self, size: int | None = -1) -> bytes:
        if self.has_whole_head:  # an application reads the body
            return super().readline(size)
        line = super().readline(self._left)
        self._left -= len(line)
        self.has_whole_head = line in (b"\r\n", b"\n")
        return line

    def read(self, size: int | None = -1) -> bytes:
        content = super().read(size)
        if len(content) == size:
            self._told()
        return content


class _Run(wsgiref.simple_server.ServerHandler):
    """One run of the application, whose environment is of the request alone: not of
    the process, whose variables could pass for a user or a header."""

    os_environ: MutableMapping[str, str] = {}


class Handler(wsgiref.simple_server.WSGIRequestHandler):
    timeout = PATIENCE

    def setup(self) -> None:
        super().setup()
        server: Any = self.server
        self._asks: Callable[[], None] = partial(server.asks, self.connection)
        self._request = _Request(self.connection, self._asks)
        self.rfile.close()
        self.rfile = self._request

    def handle(self) -> None:
        """Answer one request, as the overridden method does, in an environment of the
        request alone."""
        self.raw_requestline = self.rfile.readline()
        if self.parse_request():
            rfile: Any = self.rfile
            wfile: Any = self.wfile
            server: Any = self.server
            run: Any = _Run(rfile, wfile, self.get_stderr(), self.get_environ())
            run.request_handler = self
            run.run(server.get_app())

    def parse_request(self) -> bool:
        if not super().parse_request():
            return False
        if not self._request.has_whole_head:  # where the client stopped, or was cut off
            self.send_error(400, "the head of the request is too long or not whole")
            return False
        if self.headers.get("Content-Length", "0") == "0":
            self._asks()
        return True

    def address_string(self) -> str:
        return str(self.client_address[0])

    def log_message(self, format: str, *args: Any) -> None:
        """Changes are logged; who looks, and how often, is not."""


def _make_way(path: str) -> None:
    """Remove the socket that a process has left behind, and no other file."""
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
    """A server for the console. Call its `serve_forever`, in a thread if you like.

    `port` 0 is a free one, which is the server's `server_port`. An `address` like
    "unix:/run/app/console.sock" is a Unix socket, for the user of the process alone.
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
    """Breakers of three services, of which two have their bad minutes."""
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
    """The demo, as a command."""
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
