"""Keep README's copies of two tables in step with benchmarks/results.rst.

    python benchmarks/readme.py [--check]

Copies what stands between two comments in results.rst to between the same two
comments in README.rst, for each table. With --check it changes nothing, and fails
if they differ.
"""

import pathlib
import sys

BEGIN = ".. The table of the benchmark begins."
END = ".. The table of the benchmark ends."
FLEET_BEGIN = ".. The fleet's table of the benchmark begins."
FLEET_END = ".. The fleet's table of the benchmark ends."
# Around the table of effect.rst, which README does not have.
EFFECT_BEGIN = ".. The table of the simulation begins."
EFFECT_END = ".. The table of the simulation ends."

HERE = pathlib.Path(__file__).resolve().parent
RESULTS = HERE / "results.rst"
README = HERE.parent / "README.rst"


def parts(path, begin, end):
    """What stands before the first comment, between the two, and after."""
    before, begins, rest = path.read_text(encoding="utf-8").partition(begin)
    between, ends, after = rest.partition(end)
    if not (begins and ends):
        raise SystemExit(f"{path.name} has no pair of lines {begin!r} and {end!r}")
    return before, between, after


def main(arguments):
    if arguments not in ([], ["--check"]):
        raise SystemExit(__doc__)
    for begin, end in (BEGIN, END), (FLEET_BEGIN, FLEET_END):
        _, table, _ = parts(RESULTS, begin, end)
        before, copy, after = parts(README, begin, end)
        if not arguments:
            text = before + begin + table + end + after
            README.write_text(text, encoding="utf-8")
        elif copy != table:
            raise SystemExit("the tables differ: run python benchmarks/readme.py")


if __name__ == "__main__":
    main(sys.argv[1:])
