"""An operator's console: the breakers of a running process, seen and steered.

    python examples/ops_console.py

shows a demo on http://127.0.0.1:8300/ : a page for a person, which needs no
JavaScript, and the same as JSON for scripts:

    curl http://127.0.0.1:8300/breakers
    curl http://127.0.0.1:8300/breakers/weather
    curl -X PATCH -d '{"fail_max": 20, "reset_timeout": 30}' http://127.0.0.1:8300/breakers/weather
    curl -X POST http://127.0.0.1:8300/breakers/weather/open
    curl -X POST http://127.0.0.1:8300/breakers/weather/half_open
    curl -X POST http://127.0.0.1:8300/breakers/weather/close

A PATCH is done as a whole or not at all. In JSON, null stands for `math.inf`.
Quote a name as in any URL, "a/b" as "a%2Fb"; for "..", curl wants --path-as-is.

To have it in your own program, copy this file and give `Console` your breakers.
It is a WSGI application: mount it beside yours, or run it on a port of its own:

    console = Console([weather, payments])
    threading.Thread(target=serve(console).serve_forever, daemon=True).start()

It asks for no password: whoever reaches it may press the buttons. So it listens
on the loopback address unless told otherwise, answers only to the host names that
it was given, and lets no page of another site change anything. Every change is
logged on the logger "ops_console", with the address that it came from.
"""

import argparse
import base64
import contextlib
import hashlib
import http
import json
import logging
import math
import re
import socket
import socketserver
import sys
import threading
import time
import wsgiref.simple_server
from datetime import datetime, timezone
from functools import partial
from html import escape
from pathlib import Path
from urllib.parse import parse_qsl, quote, unquote, urlsplit

try:
    import pybreaker
except ImportError:  # not installed: use the one in the directory above
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import pybreaker

LOOPBACK = ("localhost", "127.0.0.1", "::1")
MOVES = ("open", "half_open", "close")
# In the order in which they are set. Once the values have been found to be in order
# it is only the counter that can fail, as the storage has it: so it is the first.
SETTINGS = ("fail_counter", "fail_max", "reset_timeout")
TRANSITIONS = 5  # that are remembered of each breaker
REFRESH = 1  # seconds between two looks of the page
PATIENCE = 10  # seconds that a client has to ask and to take the answer
MAX_BODY = 16 * 1024  # bytes that a request may carry

logger = logging.getLogger("ops_console")


# What is known of a breaker.


class Watch:
    """A listener that remembers a breaker's last transitions, and why they were made.

    It hears of nothing else, so calls of a closed circuit need no lock for it.
    """

    def __init__(self, breaker):
        self.breaker = breaker
        self.transitions = ()  # the newest is the first
        self.changing = threading.Lock()  # by one operator at a time
        self._asking = threading.local()  # its `who` moves the circuit by hand
        breaker.add_listener(self)

    def state_change(self, cb, old_state, new_state):
        reason = new_state.reason[:300]  # it tells the exception, of whatever length
        who = getattr(self._asking, "who", None)
        if who is not None and reason == "by hand":
            reason = f"by hand, from {who}"
        transition = {
            "at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "from": old_state.name,
            "to": new_state.name,
            "reason": reason,
        }
        self.transitions = (transition, *self.transitions)[:TRANSITIONS]

    def picture(self):
        """All there is to show, as a dict for `json.dumps`."""
        try:
            picture = self.breaker.snapshot()
        except Exception as exc:  # its storage is out of reach, the others' are not
            picture = {"name": self.breaker.name, "error": repr(exc)}
        return {**picture, "transitions": list(self.transitions)}

    def move(self, move, who):
        """Open, half-open or close the circuit, because somebody asked for it."""
        self._asking.who = who
        try:
            getattr(self.breaker, move)()
        finally:
            del self._asking.who

    def change(self, values):
        """Set all these settings or none. Returns what is wrong, by setting."""
        # On a breaker that nobody uses, the setters tell at no risk what they refuse.
        spare, errors = pybreaker.CircuitBreaker(), {}
        for name, value in values.items():
            try:
                setattr(spare, name, value)
            except (TypeError, ValueError) as exc:
                errors[name] = str(exc)
        try:
            for name, value in () if errors else values.items():
                setattr(self.breaker, name, value)
        except (TypeError, ValueError) as exc:  # a storage with a limit of its own
            errors[name] = str(exc)
        return errors


# What is answered.


class Refusal(Exception):
    """A request that is not granted. It has changed nothing."""

    def __init__(self, status, message, headers=(), details=None):
        super().__init__(message)
        self.status = status
        self.headers = list(headers)
        self.body = {"error": message, **(details or {})}


class Console:
    """A WSGI application that shows these breakers and lets an operator steer them.

    `hosts` are the names under which it may be reached: what the address bar of a
    browser shows, without the port. Requests to any other are refused, because a
    name that somebody else owns can be made to lead here (DNS rebinding).
    """

    def __init__(self, breakers=(), hosts=LOOPBACK):
        self._watches = ()
        self._hosts = {host.lower() for host in hosts}
        for breaker in breakers:
            self.add(breaker)

    def add(self, breaker):
        """Show one more breaker, which then lives as long as the console. Those that
        are there already are not affected."""
        self._watches += (Watch(breaker),)

    def watches(self):
        """The watches by what URLs call them: the breaker's name. Breakers without
        a name, or with the same, are told apart by a number."""
        found = {}
        for watch in self._watches:
            name = key = watch.breaker.name or "unnamed"
            number = 1
            while key in found:
                number += 1
                key = f"{name}-{number}"
            found[key] = watch
        return found

    def __call__(self, environ, start_response):
        is_json = environ.get("PATH_INFO", "").startswith("/breakers")
        try:
            status, headers, body = self._answer(environ)
        except Refusal as exc:
            status, headers = exc.status, exc.headers
            body = exc.body if is_json else f"{exc}\n"
        except Exception:
            logger.exception("a request failed")
            status, headers = 500, []
            body = {"error": "see the log"} if is_json else "See the log.\n"
        if isinstance(body, str):
            kind = "text/html" if body.startswith("<!doctype") else "text/plain"
        else:
            kind, body = "application/json", json.dumps(body, indent=2) + "\n"
        content = body.encode("utf-8", "replace")
        headers += [
            *HEADERS,
            ("Content-Type", f"{kind}; charset=utf-8"),
            ("Content-Length", str(len(content))),
        ]
        if environ.get("PATH_INFO") == "/status":  # whatever it was this time
            headers.append(("Refresh", str(REFRESH)))
        start_response(f"{status} {http.HTTPStatus(status).phrase}", headers)
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [content]

    def _answer(self, environ):
        self._check_host(environ)
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
            return handlers[method](environ)
        _check_origin(environ)
        return handlers[method](environ, _read(environ))

    def _check_host(self, environ):
        host = environ.get("HTTP_HOST", "").lower()
        match = re.fullmatch(r"(?:\[([0-9a-f:.]+)\]|([^\[\]:]+))(?::[0-9]*)?", host)
        if not match or (match[1] or match[2]) not in self._hosts:
            raise Refusal(403, "this console does not answer to that host name")

    def _handlers(self, environ):
        """What can be done to what the URL names: functions by HTTP method."""
        try:
            # WSGI hands out the bytes of the URL as if they were Latin-1.
            path = environ.get("PATH_INFO", "").encode("latin-1")
            path = path.decode("utf-8", "surrogatepass")
        except UnicodeError:
            return {}
        if path in ("", "/"):
            return {"GET": self._get_page, "POST": self._post_form}
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

    def _picture(self, environ, key, watch):
        return {"url": f"{_root(environ)}/breakers/{_quoted(key)}", **watch.picture()}

    def _get_all(self, environ):
        watches = self.watches().items()
        return 200, [], [self._picture(environ, key, watch) for key, watch in watches]

    def _get_one(self, key, watch, environ):
        return 200, [], self._picture(environ, key, watch)

    def _post_move(self, key, watch, move, environ, body):
        if body and _json(body) != {}:
            raise Refusal(422, f"{move} takes nothing in the body")
        self._move(environ, key, watch, move)
        return 200, [], self._picture(environ, key, watch)

    def _patch(self, key, watch, environ, body):
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
        # null is what the answer to a GET has for math.inf.
        values = {k: math.inf if v is None else v for k, v in values.items()}
        errors = self._change(environ, key, watch, values)
        if errors:
            raise Refusal(422, "; ".join(errors.values()), details={"errors": errors})
        return 200, [], self._picture(environ, key, watch)

    # For people.

    def _get_page(self, environ):
        return 200, [], self._page(environ)

    def _get_status(self, environ):
        key, watch = self._named_in(_fields(environ.get("QUERY_STRING", "")))
        return 200, [], _document(f"State of {key}", _status(watch.picture()))

    def _post_form(self, environ, body):
        fields = _fields(body)
        key, watch = self._named_in(fields)
        do = fields.get("do")
        if do in MOVES:
            self._move(environ, key, watch, do)
        elif do != "set":
            raise Refusal(422, "there is no such button")
        else:
            # What the operator left alone may be out of date by now.
            typed = {
                name: fields[name]
                for name in SETTINGS
                if name in fields and fields[name] != fields.get(f"was_{name}")
            }
            values = {name: _number(text) for name, text in typed.items()}
            errors = self._change(environ, key, watch, values)
            if errors:
                return 422, [], self._page(environ, key, typed, errors)
        # See other: so that reloading the page does not do it again.
        return 303, [("Location", f"{_root(environ)}/#{_quoted(key)}")], ""

    def _named_in(self, fields):
        try:
            key = unquote(fields["breaker"], errors="surrogatepass")
            return key, self.watches()[key]
        except (KeyError, UnicodeError):
            raise Refusal(404, "there is no such breaker") from None

    def _page(self, environ, of=None, typed=(), errors=()):
        root = escape(_root(environ))
        cards = [
            _card(root, key, watch, *(typed, errors) if key == of else ({}, {}))
            for key, watch in self.watches().items()
        ]
        top = (
            f"<h1>Circuit breakers</h1><p>The states keep up to date by themselves. "
            f'For the fields, and after a restart, <a href="{root}/">reload</a>.</p>'
        )
        return _document("Circuit breakers", top + "".join(cards))

    # Both change things here, and leave a trace.

    def _move(self, environ, key, watch, move):
        who = _who(environ)
        with watch.changing:
            before = watch.breaker.current_state
            watch.move(move, who)
        logger.warning("%s: %r: %s, was %s", who, key, move, before)

    def _change(self, environ, key, watch, values):
        values = {name: values[name] for name in SETTINGS if name in values}
        with watch.changing:
            before = {name: getattr(watch.breaker, name) for name in values}
            errors = watch.change(values)
        for name, value in () if errors else values.items():
            logger.warning(
                "%s: %r: %s = %r, was %r",
                _who(environ),
                key,
                name,
                value,
                before[name],
            )
        return errors


# Reading requests.


def _check_origin(environ):
    """Refuse what a page of another site sends. Browsers say from where a change
    is asked for; other clients do not, and are not led there by strange pages."""
    site = environ.get("HTTP_SEC_FETCH_SITE", "same-origin")
    origin = environ.get("HTTP_ORIGIN") or environ.get("HTTP_REFERER")
    try:
        same = origin is None or urlsplit(origin).netloc == environ["HTTP_HOST"]
    except ValueError:
        same = False
    if not same or site not in ("same-origin", "none"):
        logger.warning("%s: refused, sent by a page of %r", _who(environ), origin)
        raise Refusal(403, "a page of another site cannot change anything here")


def _read(environ):
    if "HTTP_TRANSFER_ENCODING" in environ:
        raise Refusal(411, "the length of the body must be in Content-Length")
    length = environ.get("CONTENT_LENGTH") or "0"
    if not (length.isascii() and length.isdigit()):
        raise Refusal(400, "Content-Length must be a number of bytes")
    if len(length) > 9 or int(length) > MAX_BODY:
        raise Refusal(413, f"the body must not be longer than {MAX_BODY} bytes")
    try:
        body = environ["wsgi.input"].read(int(length))
    except OSError:  # such as the server's timeout
        raise Refusal(400, "the body could not be read") from None
    if len(body) < int(length):
        raise Refusal(400, "the body is shorter than Content-Length says")
    return body


def _json(body):
    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    def members(pairs):
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


def _fields(form):
    """The fields of a form, or of a query, by name."""
    try:
        form = form if isinstance(form, str) else form.decode("ascii")
        pairs = parse_qsl(form, keep_blank_values=True, max_num_fields=20)
    except ValueError:
        raise Refusal(400, "the fields cannot be read") from None
    if len(fields := dict(pairs)) < len(pairs):
        raise Refusal(400, "a field is there twice")
    return fields


def _number(text):
    """What was typed as a number; or as it is, for the setter to refuse."""
    for kind in (int, float):
        try:
            return _parsed(kind, text)
        except ValueError:
            pass
    return text


def _parsed(kind, text):
    """The number, unless it is too large: a float would become infinite, and an int
    of some thousand digits can be counted up until it cannot be shown any more."""
    number = kind(text)
    if len(text) > 1000 or (number in (math.inf, -math.inf) and re.search(r"\d", text)):
        raise ValueError(f"{text[:20]} is too large a number")
    return number


def _who(environ):
    return environ.get("REMOTE_ADDR") or "unknown"


def _root(environ):
    """The path under which the console is mounted."""
    return quote(environ.get("SCRIPT_NAME", ""), encoding="latin-1").rstrip("/")


def _quoted(key):
    # Such a key survives URLs and forms, whatever is in the breaker's name.
    return quote(key, safe="", errors="surrogatepass")


# Writing pages. Whatever comes from outside goes through escape().


def _document(title, body):
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}'
        f'</title><meta name="viewport" content="width=device-width">'
        f"<style>{STYLE}</style>{body}</html>\n"
    )


def _card(root, key, watch, typed, errors):
    """A breaker: its state in a frame that reloads itself, and beside it the forms,
    which are left in peace."""
    name, quoted, picture = escape(key), _quoted(key), watch.picture()
    fields = [
        _field(f"{quoted}-{setting}", setting, picture, typed, errors)
        for setting in SETTINGS
    ]
    return f"""
<section id="{quoted}"><h2>{name}</h2>
<iframe src="{root}/status?breaker={quote(quoted)}" title="state of {name}"></iframe>
<div><form method="post" action="{root}/">
<input type="hidden" name="breaker" value="{quoted}">
<button name="do" value="open">Open</button>
<button name="do" value="half_open">Half-open</button>
<button name="do" value="close">Close</button>
</form><form method="post" action="{root}/" autocomplete="off">
<input type="hidden" name="breaker" value="{quoted}">
{"".join(fields)}
<button name="do" value="set">Set</button></form></div></section>"""


def _field(ident, name, picture, typed, errors):
    """A setting with its present value, or with what was refused and why."""
    now = picture.get(name, "")
    now = "inf" if now is None else escape(str(now))
    value, error, state = escape(typed[name]) if name in typed else now, "", ""
    if name in errors:
        error = f'<strong id="{ident}-error">{escape(errors[name])}</strong>'
        state = f'aria-invalid="true" aria-describedby="{ident}-error" autofocus'
    return f"""<p><input type="hidden" name="was_{name}" value="{now}">
<label for="{ident}">{name}</label>
<input id="{ident}" name="{name}" value="{value}" inputmode="decimal" {state}>
<small>{HINTS[name]}</small>{error}</p>"""


def _status(picture):
    """What the frame shows: the state at a glance and what led to it."""
    history = "".join(
        f"<li><time title='{_time(t['at'])}'>{t['at'][11:19]}</time> "
        f"{t['from']} \N{RIGHTWARDS ARROW} "
        f"<b>{t['to']}</b>: {escape(t['reason'])}</li>"
        for t in picture["transitions"]
    )
    if "error" in picture:
        top = f"<p><b class=state>unknown</b> {escape(picture['error'])}</p>"
    else:
        state, limit = picture["state"], _or_infinity(picture["fail_max"])
        trials = ""
        if state == pybreaker.STATE_HALF_OPEN:
            done, needed = picture["success_counter"], picture["success_threshold"]
            trials = f", <b>{done}</b> of {needed} successes"
        top = f"""<p><b class="state {state}">{state}</b>
<b>{picture["fail_counter"]}</b> of {limit} failures{trials}</p>
<dl><dt>Last opened<dd>{_time(picture["opened_at"])}
<dt>Next trial<dd>{_next_trial(picture)}</dl>"""
    return (
        f"<body class=status>{top}<ol>{history or '<li>No transition seen yet.'}</ol>"
    )


def _time(moment):
    if moment is None:
        return "never"
    return f"{moment[:10]} {moment[11:19]} UTC"


def _next_trial(picture):
    state, wait = picture["state"], picture["retry_after"]
    if state == pybreaker.STATE_CLOSED:
        return "none is needed"
    if wait == 0:
        return "the next call"
    when = "only by hand" if wait is None else f"in {math.ceil(wait):.6g} s"
    if state == pybreaker.STATE_HALF_OPEN:
        return f"runs now; another one {when}"
    timeout = picture["reset_timeout"]
    if not timeout or wait is None:
        return when
    return f'{when} <progress max="1" value="{1 - wait / timeout:.3f}"></progress>'


def _or_infinity(number):
    return "\N{INFINITY}" if number is None else number


HINTS = {
    "fail_counter": "failures in a row so far",
    "fail_max": "failures that open it, or inf",
    "reset_timeout": "seconds to a trial, or inf",
}

STYLE = """
:root { color-scheme: light dark; font: 15px/1.4 system-ui, sans-serif }
body { max-width: 68rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin: 0; grid-column: 1 / -1 }
section { display: grid; grid-template-columns: 1fr 29rem; gap: .4rem 1.5rem;
  border: 1px solid #8884; border-radius: .6rem; padding: 1rem; margin: 1rem 0 }
@media (max-width: 60rem) { section { grid-template-columns: 1fr } }
section:target { border-color: #0969da }
iframe { width: 100%; height: 100%; min-height: 13rem; border: 0 }
form { margin: 0 0 .7rem } p { margin: .35rem 0 }
button { font: inherit; padding: .25rem .9rem; margin-right: .3rem; cursor: pointer }
label { display: inline-block; width: 8rem; font-family: monospace }
input { font: inherit; font-family: monospace; width: 6rem; padding: .1rem .4rem }
small { opacity: .75; margin-left: .4rem }
input[aria-invalid] { outline: 2px solid #cf222e }
strong { display: block; color: #fff; background: #cf222e; border-radius: .3rem;
  padding: .15rem .5rem; margin: .3rem 0 0 8.3rem; font-weight: 500 }
.status { padding: 0; margin: 0; font-size: .93rem }
.state { display: inline-block; min-width: 6rem; text-align: center; color: #fff;
  background: #57606a; border-radius: 1rem; padding: .1rem .7rem; margin-right: .5rem;
  text-transform: uppercase; letter-spacing: .04em }
.closed { background: #1a7f37 } .half-open { background: #9a6700 }
.open { background: #cf222e }
dl { display: grid; grid-template-columns: 6.5rem 1fr; margin: .6rem 0; gap: .1rem }
dt { opacity: .7 } dd { margin: 0 } progress { width: 6rem; margin-left: .5rem }
ol { list-style: none; margin: 0; padding: .4rem 0 0; border-top: 1px solid #8884 }
li { margin: .15rem 0 } time { opacity: .7; margin-right: .4rem }
"""

STYLE_HASH = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
HEADERS = [
    (
        "Content-Security-Policy",
        f"default-src 'none'; style-src 'sha256-{STYLE_HASH}'; frame-src 'self'; "
        f"form-action 'self'; frame-ancestors 'self'; base-uri 'none'",
    ),
    ("X-Frame-Options", "SAMEORIGIN"),
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "same-origin"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Cache-Control", "no-store"),
]


# Serving it.


class Server(socketserver.ThreadingMixIn, wsgiref.simple_server.WSGIServer):
    """A thread for each request, so that no client keeps the others waiting."""

    daemon_threads = True

    def __init__(self, *args):
        self._deadlines = {}  # of the connections
        super().__init__(*args)

    def process_request(self, request, client_address):
        self._deadlines[request] = time.monotonic() + PATIENCE
        super().process_request(request, client_address)

    def service_actions(self):
        """Called all the while. Nobody holds a thread by talking slowly."""
        for request, deadline in self._deadlines.copy().items():
            if time.monotonic() > deadline:
                with contextlib.suppress(OSError):  # it has just been closed
                    request.shutdown(socket.SHUT_RDWR)

    def close_request(self, request):
        self._deadlines.pop(request, None)
        super().close_request(request)

    def shutdown_request(self, request):
        # A connection that is closed with something unread is reset, and with it
        # goes the answer to a body that was too large to be read.
        with contextlib.suppress(OSError):
            request.shutdown(socket.SHUT_WR)
            request.settimeout(1)
            for _ in range(256):
                if not request.recv(65536):
                    break
        self.close_request(request)

    def handle_error(self, request, client_address):
        logger.debug("lost %s", client_address, exc_info=True)


class Handler(wsgiref.simple_server.WSGIRequestHandler):
    timeout = PATIENCE

    def log_message(self, *args):
        """Changes are logged; who looks, and how often, is not."""


def serve(console, address="127.0.0.1", port=8300):
    """A server for the console. Call its `serve_forever`, in a thread if you like."""
    server_class = Server
    if ":" in address:
        server_class = type("Server6", (Server,), {"address_family": socket.AF_INET6})
    return wsgiref.simple_server.make_server(
        address, port, console, server_class, Handler
    )


def demo():
    """Breakers of three services, of which two have their bad minutes."""
    breakers = [
        pybreaker.CircuitBreaker(name="weather", reset_timeout=10),
        pybreaker.CircuitBreaker(name="payments", reset_timeout=60),
        pybreaker.CircuitBreaker(name="search/v2 <b>beta</b>", success_threshold=3),
    ]

    def work(breaker, healthy, ill):
        def service():
            if time.monotonic() % (healthy + ill) > healthy:
                raise ConnectionError(f"{breaker.name} refused the connection")

        while True:
            time.sleep(0.3)
            try:
                breaker.call(service)
            except Exception:
                pass

    for breaker, healthy, ill in zip(breakers, (20, 60, 30), (25, 0, 5)):
        args = breaker, healthy, ill
        threading.Thread(target=work, args=args, daemon=True).start()
    return breakers


def main():
    parser = argparse.ArgumentParser(description="A console with a demo behind it.")
    parser.add_argument("--listen", default="127.0.0.1", metavar="ADDRESS")
    parser.add_argument("--port", default=8300, type=int)
    parser.add_argument("--name", default=[], nargs="+", help="its other host names")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    console = Console(demo(), hosts=[*LOOPBACK, options.listen, *options.name])
    server = serve(console, options.listen, options.port)
    host = f"[{options.listen}]" if ":" in options.listen else options.listen
    print(f"The console is at http://{host}:{server.server_port}/", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main()
