"""Versions of the library that are broken on purpose, so that a test can show that the
test notices.

A version is named by a function and by what that function no longer does: taking the
lock, or its n-th comparison of identities. So the library may be rewritten without a
change to the tests. Where a function's name is not enough, a comment marks a statement:

    # variant: quiet calls
    old.quiet = False

The marked statement is left out; if it is an `if`, its condition is never true.
"""

from __future__ import annotations

import ast
import copy
import functools
import types
from pathlib import Path

import internals

import pybreaker

MARK = "# variant: "
FUNCTIONS = ast.FunctionDef, ast.AsyncFunctionDef


@functools.cache
def _text():
    return Path(pybreaker.__file__).read_text(encoding="utf-8")


@functools.cache
def _tree():
    return ast.parse(_text())


def code_of(module):
    """The code of the library, or of a version of it."""
    return getattr(module, "code", None) or compile(_tree(), "<module>", "exec")


def _functions(tree, name=""):
    """All functions, inner ones too, each with its full name. A getter and its setter
    have the same name."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            full = f"{name}.{node.name}" if name else node.name
            if isinstance(node, FUNCTIONS):
                yield full, node
            yield from _functions(node, full)
        else:
            yield from _functions(node, name)


def _own(function):
    """The nodes of a function but for those of inner functions, in their order."""
    for node in ast.iter_child_nodes(function):
        if not isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            yield node
            yield from _own(node)


def _last_name(expression):
    """The "c" of "a.b.c", and "" of an expression that is no such name."""
    return getattr(expression, "attr", getattr(expression, "id", ""))


def _takes_lock(node):
    return isinstance(node, ast.With) and any(
        _last_name(item.context_expr) == "_lock" for item in node.items
    )


def _is_identity(node):
    """Whether two names are compared."""
    return (
        isinstance(node, ast.Compare)
        and isinstance(node.ops[0], (ast.Is, ast.IsNot))
        and isinstance(node.comparators[0], (ast.Name, ast.Attribute))
    )


def _operands(node):
    return {_last_name(node.left), _last_name(node.comparators[0])}


def _asks_for_era(node):
    """Whether a comparison has the breaker's present state on one side."""
    return bool(internals.names_of_state() & _operands(node))


def _asks_for_trial(node):
    """Whether a comparison has the trial that holds the place on one side."""
    return bool(internals.names_of_trial() & _operands(node))


def takers_of_the_lock():
    """The names of the functions that take a lock."""
    return list(
        dict.fromkeys(
            name
            for name, function in _functions(_tree())
            if any(map(_takes_lock, _own(function)))
        )
    )


def comparisons():
    """The comparisons of eras or trials, as pairs: the function's name, and which of
    the function's comparisons of identities this is, as a number."""
    return [
        (name, number)
        for name, function in _functions(_tree())
        for number, node in enumerate(filter(_is_identity, _own(function)), 1)
        if _asks_for_era(node) or _asks_for_trial(node)
    ]


class _Replace(ast.NodeTransformer):
    def __init__(self, replacements):
        self.replacements = replacements

    def visit(self, node):
        node = self.replacements.get(node, node)
        return self.generic_visit(node)


def _version(what, replacements):
    """The library with some nodes of its tree replaced by others."""
    assert replacements, f"nothing in pybreaker.py {what}"
    # The tree itself is not changed, as other versions are made of it.
    memo = {}
    tree = copy.deepcopy(_tree(), memo)
    copies = {memo[id(old)]: new for old, new in replacements.items()}
    tree = ast.fix_missing_locations(_Replace(copies).visit(tree))
    module = types.ModuleType("variant_of_pybreaker")
    module.code = compile(tree, f"<pybreaker.py where nothing {what}>", "exec")
    exec(module.code, vars(module))
    return module


def _unlocked(node):
    """A block without its lock."""
    body = copy.deepcopy(node.body)
    return ast.copy_location(ast.If(ast.Constant(True), body, []), node)


def _answered(node):
    """The answer of a library that does not compare: the objects are the same."""
    answer = ast.Constant(isinstance(node.ops[0], ast.Is))
    return ast.copy_location(answer, node)


@functools.cache
def without_lock(name):
    """A library in which the function of this name takes no lock."""
    found = [
        node
        for full, function in _functions(_tree())
        if full == name
        for node in _own(function)
        if _takes_lock(node)
    ]
    return _version(
        f"takes the lock in {name}", {node: _unlocked(node) for node in found}
    )


@functools.cache
def without_comparison(name, number):
    """A library in which a function does not make its n-th comparison of identities."""
    found = [
        node
        for full, function in _functions(_tree())
        if full == name
        for count, node in enumerate(filter(_is_identity, _own(function)), 1)
        if count == number
    ]
    return _version(
        f"is the comparison {number} in {name}",
        {node: _answered(node) for node in found},
    )


@functools.cache
def without_eras():
    """A library that compares no eras: all outcomes count for the present era."""
    found = filter(_is_identity, ast.walk(_tree()))
    eras = {node: _answered(node) for node in filter(_asks_for_era, found)}
    return _version("compares eras", eras)


@functools.cache
def without_marked(mark):
    """A library in which the marked statement is left out, or its condition is never
    true."""
    lines = _text().splitlines()
    marked = {n + 1 for n, line in enumerate(lines, 1) if line.strip() == MARK + mark}
    replacements = {}
    for node in ast.walk(_tree()):
        if isinstance(node, ast.stmt) and node.lineno in marked:
            if isinstance(node, ast.If):
                never = ast.copy_location(ast.Constant(False), node.test)
                replacements[node.test] = never
            else:
                replacements[node] = ast.copy_location(ast.Pass(), node)
    return _version(f"is marked {mark!r}", replacements)
