"""What is built and installed: the version, the wheel, the sdist, the stub."""

import ast
import runpy
import shutil
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import pybreaker

ROOT = Path(__file__).resolve().parents[2]
IN_WHEEL = {
    "pybreaker.py",
    "pybreaker-stubs/__init__.pyi",
    "pybreaker_extras/py.typed",
    *(f"pybreaker_extras/{path.name}" for path in ROOT.glob("pybreaker_extras/*.py")),
}
EXTRAS = {
    "aiohttp": ">=3.12",
    "httpx": ">=0.23",
    "prometheus-client": "",
    "redis": ">=5",
    "requests": ">=2.25",
}


@pytest.fixture(scope="module")
def make_stub():
    """The function of setup.py that turns a module's text into a stub's."""
    return runpy.run_path(str(ROOT / "setup.py"), run_name="setup")["make_stub"]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder of a wheel and an sdist that were built from a copy."""
    copy = tmp_path_factory.mktemp("copy") / "pybreaker"
    shutil.copytree(ROOT, copy, ignore=_not_in_a_clean_clone)
    return build(copy, "sdist", "bdist_wheel")


def _not_in_a_clean_clone(folder, names):
    generated = {"build", "dist", "venv", "__pycache__"}
    return [
        name
        for name in names
        if name in generated or name.startswith(".") or name.endswith(".egg-info")
    ]


def build(source, *commands):
    """Run `commands` of the setup.py in `source`; return where they left it."""
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", *commands],
        cwd=source,
        check=True,
        capture_output=True,
    )
    return source / "dist"


def names_in_wheel(folder):
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


# The version


def test_installed_version_satisfies_what_packages_in_the_field_require():
    """The version is in ``pybreaker>=1,<2``, and comes after the last older release."""
    version = metadata.version("pybreaker")
    assert SpecifierSet(">=1,<2").contains(version)
    assert SpecifierSet(">1.4.1").contains(version)


def test_needs_nothing_but_python():
    """No dependency is installed with PyBreaker, on Python 3.9 and later."""
    requires = metadata.requires("pybreaker") or []
    assert [line for line in requires if "extra ==" not in line] == []
    assert metadata.metadata("pybreaker")["Requires-Python"] == ">=3.9"


def test_an_extra_brings_the_package_that_a_companion_needs():
    """Each package has an extra, such as ``pip install pybreaker[redis]``."""
    needed = {
        each.name: each for each in map(Requirement, metadata.requires("pybreaker"))
    }
    assert {name: str(each.specifier) for name, each in needed.items()} == EXTRAS
    for name, each in needed.items():
        assert each.marker.evaluate({"extra": name.partition("-")[0]})
        assert not each.marker.evaluate({"extra": ""})


# Wheel and sdist


def test_wheel_holds_the_module_its_stub_its_companions_and_nothing_else(built):
    """Everything besides is the wheel's own description of itself."""
    names = names_in_wheel(built)
    assert {name for name in names if ".dist-info/" not in name} == IN_WHEEL
    assert any(name.endswith("LICENSE") for name in names)


def test_sdist_holds_what_it_takes_to_build_test_and_read_it(built):
    """Tests, examples and documents come along; leftovers do not."""
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names >= {
        "CHANGELOG.rst",
        "CONTRIBUTING.rst",
        "LICENSE",
        "README.rst",
        "SECURITY.rst",
        "benchmarks/results.rst",  # which a page of docs includes
        "docs/conf.py",
        "docs/static/phone.css",
        "pybreaker.py",
        "pyproject.toml",
        "setup.py",
        "tox.ini",
        "tests/requirements.txt",
        "tests/typing/pyrightconfig.json",
        "tools/mutation/survivors.toml",
        *(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/*.rst")),
        *(path.relative_to(ROOT).as_posix() for path in ROOT.glob("examples/*.py")),
        *(path.relative_to(ROOT).as_posix() for path in ROOT.glob("tests/**/*.py")),
        *(path.relative_to(ROOT).as_posix() for path in ROOT.glob("tools/**/*.py")),
    }
    assert not [name for name in names if "cache" in name or name.startswith(".")]


def test_wheel_can_be_built_from_the_sdist(built, tmp_path):
    """That wheel has the same files as the wheel built from the repository."""
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        # Newer Pythons want a filter named; older ones have none.
        archive.extraction_filter = getattr(tarfile, "data_filter", None)
        archive.extractall(tmp_path)
    (source,) = tmp_path.iterdir()
    assert names_in_wheel(build(source, "bdist_wheel")) == names_in_wheel(built)


# The stub


def test_stub_has_every_public_name(make_stub):
    """The stub defines each name in ``__all__``, and its functions have no bodies."""
    stub = ast.parse(make_stub((ROOT / "pybreaker.py").read_text(encoding="utf-8")))
    defined = set()
    for node in stub.body:
        defined |= {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}
        defined.add(getattr(node, "name", None))
    assert defined >= set(pybreaker.__all__)
    for function in ast.walk(stub):
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert ast.unparse(function.body) == "..."


@pytest.mark.parametrize(
    "source, stub",
    [
        pytest.param(
            '''
            """Documented."""
            __all__ = ["f"]
            def f(a: int, b: str = "b", *, c: float = 1 / 3) -> None:
                """Documented."""
                print(a)
            ''',
            """
            __all__ = ["f"]
            def f(a: int, b: str = "b", *, c: float = ...) -> None: ...
            """,
            id="docstrings, bodies and computed defaults go",
        ),
        pytest.param(
            """
            from __future__ import annotations
            import time, typing as t
            TYPE_CHECKING = False
            if TYPE_CHECKING:
                from collections.abc import Callable, Iterable
                from typing import TypeVar
                F = TypeVar("F", bound=Callable[..., object])
                G = TypeVar("G")
            __all__ = ("f",)
            log = t.cast("object", time)
            def f(func: F) -> F: ...
            def _helper() -> Iterable[int]: ...
            """,
            """
            from collections.abc import Callable
            from typing import TypeVar
            F = TypeVar("F", bound=Callable[..., object])
            __all__ = ("f",)
            def f(func: F) -> F: ...
            """,
            id="what is under TYPE_CHECKING stays, what nobody mentions goes",
        ),
        pytest.param(
            """
            __all__ = ("A",)
            class A(_Base):
                '''Documented.'''
                b: int
                c: ClassVar[dict[str, int]] = dict(a=1)
                d: Final = "d"
                __slots__ = ("b",)
                def _e(self) -> _Other: return _Other()
            class _Base: x = _Y()
            class _Other: pass
            class _Y: pass
            class _Unknown: pass
            """,
            """
            __all__ = ("A",)
            class A(_Base):
                b: int
                c: ClassVar[dict[str, int]] = ...
                d: Final = "d"
                __slots__ = ("b",)
                def _e(self) -> _Other: ...
            class _Base: x = _Y()
            class _Other: pass
            class _Y: pass
            """,
            id="a class brings its members, and the private names they mention",
        ),
        pytest.param(
            """
            __all__ = ("A",)
            class A:
                b: int = 1
                def __init__(self, name: str) -> None:
                    self.name: str = name
                    self._c = 3
                    d: int = 4
            """,
            """
            __all__ = ("A",)
            class A:
                name: str
                b: int = 1
                def __init__(self, name: str) -> None: ...
            """,
            id="an attribute may be annotated where it is assigned",
        ),
        pytest.param(
            """
            __all__ = ("A",)
            class A:
                if TYPE_CHECKING:
                    @overload
                    def f(self, a: int) -> int: ...
                    @typing.overload
                    def f(self, a: str) -> str: ...
                else:
                    def f(self, a): return a
                @overload
                def g(self, a: int) -> int: ...
                @overload
                def g(self, a: str) -> str: ...
                def g(self, a): return a
            """,
            """
            __all__ = ("A",)
            class A:
                @overload
                def f(self, a: int) -> int: ...
                @typing.overload
                def f(self, a: str) -> str: ...
                @overload
                def g(self, a: int) -> int: ...
                @overload
                def g(self, a: str) -> str: ...
            """,
            id="overloads stand alone",
        ),
        pytest.param(
            """
            __all__ = ("A",)
            class A:
                async def f(self) -> int: return await g()
                async def h(self) -> AsyncIterator[int]:
                    while True:
                        yield 1
                @property
                def p(self) -> int: return 1
                @p.setter
                def p(self, value: int) -> None: print(value)
                async def q(self) -> None:
                    def inner(): yield 1
            """,
            """
            __all__ = ("A",)
            class A:
                async def f(self) -> int: ...
                def h(self) -> AsyncIterator[int]: ...
                @property
                def p(self) -> int: ...
                @p.setter
                def p(self, value: int) -> None: ...
                async def q(self) -> None: ...
            """,
            id="an async generator function is one without its yield",
        ),
        pytest.param(
            """
            import sys
            __all__ = ("f",)
            if sys.version_info >= (3, 11):
                _Error = ExceptionGroup
                def g() -> None: print()
            else:
                _Error = ValueError
            def f() -> _Error: return _Error()
            """,
            """
            import sys
            __all__ = ("f",)
            if sys.version_info >= (3, 11):
                _Error = ExceptionGroup
                def g() -> None: ...
            else:
                _Error = ValueError
            def f() -> _Error: ...
            """,
            id="other conditions stay as they are",
        ),
    ],
)
def test_stub_of(source, stub, make_stub):
    """A stub says what the module says to a type checker, and no more."""
    made = make_stub(textwrap.dedent(source))
    assert ast.dump(ast.parse(made)) == ast.dump(ast.parse(textwrap.dedent(stub)))


# Importing it


def test_import_brings_in_neither_asyncio_nor_typing_nor_third_parties():
    """Importing stays quick, and never loads asyncio into a program that uses trio."""
    here = str(Path(pybreaker.__file__).parent)
    # Without "site", whose .pth files may import anything.
    command = [sys.executable, "-I", "-S", "-c"]
    program = f"""
import sys
sys.path.append({here!r})
before = set(sys.modules)
import pybreaker
for name in sorted(set(sys.modules) - before):
    print(name, getattr(sys.modules[name], "__file__", None))
"""
    output = subprocess.run(
        [*command, program], check=True, capture_output=True, text=True
    ).stdout
    loaded = dict(line.split(" ", 1) for line in output.splitlines())
    assert "pybreaker" in loaded
    assert not {"asyncio", "typing", "typing_extensions"} & set(loaded)
    assert [name for name, file in loaded.items() if file.startswith(here)] == [
        "pybreaker"
    ]
