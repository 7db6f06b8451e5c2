"""Keep README's excerpts of the measured tables in step with the tables.

    python benchmarks/readme.py [--check]

README has of each table in TABLES the head, a few lines, and the machine and versions
of the measurement, between two comments. This script copies them to README. With
--check it changes nothing, and fails if README's copy differs.
"""

import pathlib
import sys
import typing

# Around the tables in results.rst.
BEGIN = ".. The table of the benchmark begins."
END = ".. The table of the benchmark ends."
FLEET_BEGIN = ".. The fleet's table of the benchmark begins."
FLEET_END = ".. The fleet's table of the benchmark ends."
# Around the table in effect.rst.
EFFECT_BEGIN = ".. The table of the simulation begins."
EFFECT_END = ".. The table of the simulation ends."

HERE = pathlib.Path(__file__).resolve().parent
README = HERE.parent / "README.rst"


class Table(typing.NamedTuple):
    path: pathlib.Path
    begin: str  # the comment before the table in `path`
    end: str  # the comment after the table
    name: str  # the table's name in README's comments
    lines: tuple[str, ...]  # how the lines begin that README has


TABLES = [
    Table(
        HERE / "results.rst",
        BEGIN,
        END,
        "costs",
        (
            "decorated function ",
            "decorated coroutine function ",
            "function that raises, counted ",
            "rejected call, caught ",
            "growth of a call's cost from 1 to 8 busy threads ",
        ),
    ),
    Table(
        HERE / "effect.rst",
        EFFECT_BEGIN,
        EFFECT_END,
        "effects",
        (
            "20 % for 20 s, 60 breakers ",
            "100 % for 20 s, 60 breakers ",
            "20 % for 300 s, one breaker ",
            "50 % for 60 s, one breaker ",
            "metastable failure ",
        ),
    ),
]


def parts(path, begin, end):
    """The text before the first comment, between the two, and after the second."""
    before, begins, rest = path.read_text(encoding="utf-8").partition(begin)
    between, ends, after = rest.partition(end)
    if not (begins and ends):
        raise SystemExit(f"{path.name} has no pair of lines {begin!r} and {end!r}")
    return before, between, after


def excerpt(table):
    """What README has of a table: the head, a few lines, and the last paragraph; and
    nothing of a table that was never measured."""
    if not table.path.exists():
        return "\n"
    _, text, _ = parts(table.path, table.begin, table.end)
    lines = text.strip().splitlines()
    rules = [number for number, line in enumerate(lines) if set(line) == {"=", " "}]
    if len(rules) != 3:
        raise SystemExit(f"{table.path.name} has no table between its comments")
    top, head_ends, bottom = rules
    kept = []
    for beginning in table.lines:
        found = [x for x in lines[head_ends:bottom] if x.startswith(beginning)]
        if len(found) != 1:
            raise SystemExit(f"{table.path.name} has no single line {beginning!r}")
        kept += found
    measured = text.strip().split("\n\n")[-1]
    rows = [*lines[top : head_ends + 1], *kept, lines[bottom]]
    return "\n\n" + "\n".join(rows) + f"\n\n{measured}\n\n"


def main(arguments):
    if arguments not in ([], ["--check"]):
        raise SystemExit(__doc__)
    for table in TABLES:
        begin = f".. Five lines of the table of {table.name} begin."
        end = f".. Five lines of the table of {table.name} end."
        copy = excerpt(table)
        before, present, after = parts(README, begin, end)
        if not arguments:
            text = before + begin + copy + end + after
            README.write_text(text, encoding="utf-8")
        elif present != copy:
            raise SystemExit("README's tables differ: run python benchmarks/readme.py")


if __name__ == "__main__":
    main(sys.argv[1:])
