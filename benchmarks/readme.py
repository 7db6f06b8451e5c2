"""Keep README's copy of the table in step with benchmarks/results.rst.

    python benchmarks/readme.py [--check]

Copies what stands between two comments in results.rst to between the same two
comments in README.rst. With --check it changes nothing, and fails if they differ.
"""

import pathlib
import sys

BEGIN = ".. The table of the benchmark begins."
END = ".. The table of the benchmark ends."
FLEET_BEGIN = ".. The fleet's table of the benchmark begins."
FLEET_END = ".. The fleet's table of the benchmark ends."

HERE = pathlib.Path(__file__).resolve().parent
RESULTS = HERE / "results.rst"
README = HERE.parent / "README.rst"


def parts(path):
    """What stands before the first comment, between the two, and after."""
    before, begin, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    between, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"{path.name} has no pair of lines {BEGIN!r} and {END!r}")
    return before, between, after


def main(arguments):
    _, table, _ = parts(RESULTS)
    before, copy, after = parts(README)
    if arguments == ["--check"]:
        if copy != table:
            raise SystemExit("the tables differ: run python benchmarks/readme.py")
    elif arguments:
        raise SystemExit(__doc__)
    else:
        text = before + BEGIN + table + END + after
        README.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
