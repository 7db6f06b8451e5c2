"""Build and install PyBreaker.

The library is one module, and a single-file module has nowhere to put the
``py.typed`` marker by which type checkers know that a package is annotated. So
the build adds a stub package, ``pybreaker-stubs``, to the wheel. It is made
from ``pybreaker.py`` itself (`make_stub`), so the signatures are written once.
"""

import ast
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent


class BuildWithStub(build_py):
    """Build the module, and beside it the stub package that is made from it.

    An editable install gets no stub: it would grow old with the first edit.
    """

    @property
    def stub(self):
        return Path(self.build_lib, "pybreaker-stubs", "__init__.pyi")

    def run(self):
        super().run()
        if not self._is_editable():
            source = (HERE / "pybreaker.py").read_text(encoding="utf-8")
            self.stub.parent.mkdir(parents=True, exist_ok=True)
            self.stub.write_text(make_stub(source), encoding="utf-8")

    def get_outputs(self, include_bytecode=True):
        outputs = super().get_outputs(include_bytecode)
        return outputs if self._is_editable() else [*outputs, str(self.stub)]

    def _is_editable(self):
        return getattr(self, "editable_mode", False)  # setuptools 64 and later


def make_stub(source):
    """Return the text of a stub file for the module whose text is `source`.

    It has the names in ``__all__``, every member of those classes, private ones
    too (subclasses lean on them), and the imports and other definitions that
    these mention. It has no docstrings and no function bodies. An attribute is
    there if it is annotated, in the class or where a method assigns it.
    """
    statements = _signatures(ast.parse(source).body)
    public = {"__all__", *_public_names(statements)}
    kept = _with_what_they_mention(statements, public)
    text = ast.unparse(ast.fix_missing_locations(ast.Module(kept, type_ignores=[])))
    return f"# Made from pybreaker.py when the package was built.\n{text}\n"


def _signatures(statements):
    """Return the statements of a module or class as they stand in a stub."""
    result = []
    overloaded = set()
    for node in _as_type_checkers_see(statements):
        if isinstance(node, ast.If):  # "if sys.version_info >= ..."
            node.body = _signatures(node.body) or [ast.Pass()]
            node.orelse = _signatures(node.orelse)
            result.append(node)
        elif isinstance(node, ast.ClassDef):
            attributes = _attributes(node)
            node.body = attributes + _signatures(node.body) or [ast.Pass()]
            result.append(node)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            # A stub has overloads without the function that implements them.
            if "overload" in map(_last_name, node.decorator_list):
                overloaded.add(node.name)
            elif node.name in overloaded:
                continue
            result.append(_signature(node))
        elif isinstance(node, ast.AnnAssign):
            # A value matters if it is what a bare Final or an alias stands for.
            if _last_name(node.annotation) not in ("Final", "TypeAlias"):
                node.value = node.value and _plain(node.value)
            result.append(node)
        elif isinstance(node, (ast.Assign, ast.Import, ast.ImportFrom)):
            result.append(node)
    return result


def _as_type_checkers_see(statements):
    """Yield `statements` with what is under "if TYPE_CHECKING:" in its place."""
    for node in statements:
        if isinstance(node, ast.If) and _last_name(node.test) == "TYPE_CHECKING":
            yield from _as_type_checkers_see(node.body)
        else:
            yield node


def _attributes(class_):
    """Return declarations of what is annotated as "self.name: type = value"."""
    return [
        ast.AnnAssign(ast.Name(node.target.attr), node.annotation, simple=1)
        for node in ast.walk(class_)
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Attribute)
    ]


def _signature(function):
    """Return the definition of `function` with nothing in it."""
    if isinstance(function, ast.AsyncFunctionDef) and _yields(function):
        # Without its "yield", "async def" would mean a coroutine function.
        function.__class__ = ast.FunctionDef
    function.body = [ast.Expr(ast.Constant(...))]
    function.args.defaults = [_plain(value) for value in function.args.defaults]
    function.args.kw_defaults = [
        value and _plain(value) for value in function.args.kw_defaults
    ]
    return function


def _with_what_they_mention(statements, names):
    """Return those of `statements` that define `names`, or what these need."""
    kept = []
    while True:
        more = [node for node in statements if names & _defined(node)]
        if len(more) == len(kept):
            break
        kept = more
        names = names.union(*map(_mentioned, kept))
    for node in kept:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            node.names = [alias for alias in node.names if _imported(alias) in names]
    return kept


def _public_names(statements):
    """Return the value of ``__all__``."""
    for node in statements:
        if "__all__" in _defined(node):
            return ast.literal_eval(node.value)
    raise ValueError("the module has no __all__")


def _defined(node):
    """Return the names that the statement `node` defines."""
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return {_imported(alias) for alias in node.names}
    if isinstance(node, ast.If):
        return set().union(*map(_defined, node.body + node.orelse))
    if isinstance(node, ast.Assign):
        return {_last_name(target) for target in node.targets}
    if isinstance(node, ast.AnnAssign):
        return {_last_name(node.target)}
    return {node.name} if hasattr(node, "name") else set()


def _mentioned(node):
    """Return the names that `node` uses, or defines."""
    return {child.id for child in ast.walk(node) if isinstance(child, ast.Name)}


def _imported(alias):
    """Return the name that the import of `alias` defines."""
    return alias.asname or alias.name.partition(".")[0]


def _last_name(expression):
    """Return the "c" of "a.b.c", and "" of what is not such a name."""
    return getattr(expression, "attr", getattr(expression, "id", ""))


def _plain(value):
    """Return `value` if it is a literal, otherwise "..."."""
    return value if isinstance(value, ast.Constant) else ast.Constant(...)


def _yields(node):
    """Tell whether there is a "yield" in `node`, inner functions aside."""
    inner = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
    return any(
        isinstance(child, ast.Yield)
        or (not isinstance(child, inner) and _yields(child))
        for child in ast.iter_child_nodes(node)
    )


if __name__ == "__main__":
    setup(
        name="pybreaker",
        version="1.5.0",
        description="Circuit breaker: calls to a failing service are rejected at once",
        long_description=(HERE / "README.rst").read_text(encoding="utf-8"),
        long_description_content_type="text/x-rst",
        author="the PyBreaker contributors",
        license="BSD-3-Clause",
        keywords=[
            "circuit breaker",
            "resilience",
            "fault tolerance",
            "outage",
            "microservices",
            "asyncio",
            "httpx",
            "requests",
            "aiohttp",
            "redis",
            "prometheus",
        ],
        py_modules=["pybreaker"],
        packages=["pybreaker_extras"],
        package_data={"pybreaker_extras": ["py.typed"]},
        # Said aloud so that an editable install is a plain path entry, which
        # type checkers and editors can follow, and not an import hook.
        package_dir={"": "."},
        python_requires=">=3.9",
        # The oldest releases that are tested; the newest are, too.
        extras_require={
            "aiohttp": ["aiohttp>=3.12"],
            "httpx": ["httpx>=0.23"],
            "prometheus": ["prometheus-client"],
            "redis": ["redis>=5"],
            "requests": ["requests>=2.25"],
        },
        cmdclass={"build_py": BuildWithStub},
        classifiers=[
            "Development Status :: 5 - Production/Stable",
            "Framework :: AsyncIO",
            "Framework :: Trio",
            "Intended Audience :: Developers",
            "Intended Audience :: System Administrators",
            "Operating System :: OS Independent",
            "Programming Language :: Python :: 3",
            "Programming Language :: Python :: 3 :: Only",
            "Programming Language :: Python :: 3.9",
            "Programming Language :: Python :: 3.10",
            "Programming Language :: Python :: 3.11",
            "Programming Language :: Python :: 3.12",
            "Programming Language :: Python :: 3.13",
            "Programming Language :: Python :: 3.14",
            "Programming Language :: Python :: 3.15",
            "Programming Language :: Python :: Free Threading :: 3 - Stable",
            "Programming Language :: Python :: Implementation :: CPython",
            "Programming Language :: Python :: Implementation :: PyPy",
            "Topic :: Internet :: WWW/HTTP",
            "Topic :: Software Development :: Libraries :: Python Modules",
            "Topic :: System :: Distributed Computing",
            "Typing :: Typed",
        ],
    )
