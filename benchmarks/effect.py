"""What a breaker saves in an outage, and what it costs, in this library and others.

    python benchmarks/effect.py [--fast] [--output FILE]

The simulation runs the libraries themselves on a clock that it moves, so that an hour
takes a moment: see simulation.py. Of the other libraries, those take part that accept
a clock; pip installs each into a virtual environment of its own, which is deleted at
the end. All random numbers come from the seeds, so that the same libraries give the
same figures on every machine. The script prints its report, and writes it to
benchmarks/effect.rst; with --fast (one seed, shorter outages) only to a given FILE.
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import typing

from readme import EFFECT_BEGIN as BEGIN
from readme import EFFECT_END as END
from run import Environment, complain
from simulation import EXACT, GROWTH, IN_A_ROW, OUTAGES, SHARES, SIMULATED, WINDOW, Rule
from tables import filled, table

HERE = pathlib.Path(__file__).resolve().parent
RESULTS = HERE / "effect.rst"

SEEDS = [1, 2, 3, 4, 5]
LONGEST = 3600  # seconds for one process, on a busy machine
RIVALS = ("Interlock", "NoPanic")  # the libraries that accept a clock

GROWING = WINDOW._replace(**GROWTH)
OURS = "this library, 25 of 50"
IN_A_ROW_OURS = "this library, 5 in a row"
COLUMNS = {
    IN_A_ROW_OURS: ("PyBreaker", IN_A_ROW),
    OURS: ("PyBreaker", WINDOW),
    "interlock-cb": ("Interlock", WINDOW),
    "nopanic": ("NoPanic", WINDOW),
}
WAITS = {
    "5 in a row, 60 s": IN_A_ROW._replace(reset_timeout=60.0),
    "25 of 50, 60 s": WINDOW._replace(reset_timeout=60.0),
    "25 of 50, 15 s": WINDOW,
    "25 of 50, 1 s": WINDOW._replace(reset_timeout=1.0),
    "25 of 50, 1 s to 60 s": GROWING,
}
LENGTHS = {
    "5 s": IN_A_ROW._replace(reset_timeout=5.0),
    "60 s": IN_A_ROW._replace(reset_timeout=60.0),
    "1 s to 60 s": IN_A_ROW._replace(**GROWTH),
}


class Row(typing.NamedTuple):
    """A row of the main table. `most` or `least` is the figure within reach."""

    scenario: str
    label: str
    figure: str
    measured: str
    most: typing.Optional[float] = None
    least: typing.Optional[float] = None
    unit: str = " %"
    more_is_better: bool = False

    def cell(self, value):
        return "never" if value is None else f"{value:.{self.digits}f}{self.unit}"

    @property
    def digits(self):
        return 0 if self.unit == " s" else 2

    @property
    def reach(self):
        if self.most is not None:
            return f"at most {self.most:g}{self.unit}"
        return "reported" if self.least is None else f"at least {self.least:g} %"

    def is_reached(self, value):
        if self.most is None and self.least is None:
            return ""
        if value is None:
            return "no"
        reached = value <= self.most if self.least is None else value >= self.least
        return "yes" if reached else "no"

    def is_better(self, one, other):
        if one is None or other is None:
            return one is not None
        return one > other if self.more_is_better else one < other


ROWS = (
    Row("fifth_of_many", "20 % for 20 s, 60 breakers", "lost", "good calls lost", 1),
    Row(
        "all_of_many",
        "100 % for 20 s, 60 breakers",
        "through",
        "failing calls let through",
        8,
    ),
    Row("fifth_of_one", "20 % for 300 s, one breaker", "lost", "good calls lost", 1),
    Row(
        "half_of_one",
        "50 % for 60 s, one breaker",
        "through",
        "failing calls let through",
    ),
    Row("half_of_one", "", "lost", "good calls lost"),
    Row("in_turn", "2 % and 6 % in turn, one breaker", "lost", "good calls lost", 0.1),
    Row(
        "metastable",
        "metastable failure",
        "goodput",
        "goodput in the 110 s after",
        least=97,
        more_is_better=True,
    ),
    Row("metastable", "", "recovery", "seconds until it recovers", 5, unit=" s"),
)


class Job(typing.NamedTuple):
    """What one process is to simulate."""

    library: str
    scenario: str
    rule: Rule


def jobs():
    """All jobs, the longest first."""
    yield from (Job("PyBreaker", "worked_out", rule) for rule in reversed(EXACT))
    yield from (Job("PyBreaker", "openings", rule) for rule in SIMULATED)
    for library, rule in COLUMNS.values():
        for scenario in {row.scenario: None for row in ROWS}:
            yield Job(library, scenario, rule_for(scenario, rule))
    yield Job("NoBreaker", "metastable", IN_A_ROW)
    yield from (Job("PyBreaker", "metastable", rule) for rule in WAITS.values())
    yield from (Job("PyBreaker", "outages", rule) for rule in LENGTHS.values())


def rule_for(scenario, rule):
    """The rule for a scenario. In a metastable failure the breaker's wait grows."""
    return rule._replace(**GROWTH) if scenario == "metastable" else rule


def simulate(job, environments, seeds, fast):
    """The figures that the job finds, or None if the job fails."""
    name = "PyBreaker" if job.library == "NoBreaker" else job.library
    environment = environments[name]
    if not environment.installed:
        return None
    arguments = [job.library, job.scenario, json.dumps(job.rule._asdict())]
    options = ["--seeds", *map(str, seeds), *(["--fast"] if fast else [])]
    script = str(HERE / "simulation.py")
    try:
        found = environment.run(script, *arguments, *options, timeout=LONGEST)
        return json.loads(found)
    except subprocess.SubprocessError as error:
        complain(f"{job} failed", error)
        if environment.library.requirement is None:
            raise
        return None


def simulate_all(environments, seeds, fast):
    """The figures that the jobs found, in a dict by job."""
    every = list(dict.fromkeys(jobs()))
    if fast:
        every = [
            job for job in every if job != Job("PyBreaker", "worked_out", EXACT[2])
        ]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(lambda job: simulate(job, environments, seeds, fast), every)
        return dict(zip(every, found))


def median(found, figure):
    """The median of a figure over the seeds. None is "never", the longest time."""
    values = [each[figure] for each in found]
    middle = statistics.median([float("inf") if v is None else v for v in values])
    return None if middle == float("inf") else middle


def value(found, row, column):
    """The figure of a row in a column; "failed" where there is none."""
    library, rule = COLUMNS[column]
    measured = found[Job(library, row.scenario, rule_for(row.scenario, rule))]
    return "failed" if measured is None else median(measured, row.figure)


def main_table(found):
    head = ["scenario", "measured", *COLUMNS, "reach", "reached"]
    rows = []
    for row in ROWS:
        values = [value(found, row, column) for column in COLUMNS]
        cells = [each if each == "failed" else row.cell(each) for each in values]
        reached = row.is_reached(value(found, row, OURS))
        # An empty first cell would continue the row before.
        rows.append([row.label or "\\", row.measured, *cells, row.reach, reached])
    return table(head, rows)


def defeats(found):
    """The rows in which another column has the better figure, in words."""
    label = ""
    for row in ROWS:
        label = row.label or label
        ours = value(found, row, OURS)
        for column in COLUMNS:
            theirs = value(found, row, column)
            if column == OURS or theirs == "failed" or not row.is_better(theirs, ours):
                continue
            if row.cell(theirs) != row.cell(ours):
                yield (
                    f"{label}, {row.measured}: {row.cell(theirs)} with {column}, "
                    f"{row.cell(ours)} with 25 of 50"
                )


def waits_table(found):
    setups = {"no breaker": Job("NoBreaker", "metastable", IN_A_ROW)}
    setups.update((k, Job("PyBreaker", "metastable", v)) for k, v in WAITS.items())
    goodput, recovery = ROWS[-2:]
    rows = [
        [
            name,
            goodput.cell(median(found[job], "goodput")),
            recovery.cell(median(found[job], "recovery")),
        ]
        for name, job in setups.items()
    ]
    return table(["opens at, waits", "goodput", "recovers after"], rows)


def outages_table(found):
    head = ["outage", *(f"{name}: late" for name in LENGTHS)]
    head += [f"{name}: trials" for name in LENGTHS]
    every = [found[Job("PyBreaker", "outages", rule)] for rule in LENGTHS.values()]
    rows = []
    for outage in OUTAGES:
        if f"late {outage}" in every[0][0]:
            late = [f"{median(each, f'late {outage}'):.1f} s" for each in every]
            trials = [f"{median(each, f'trials {outage}'):.0f}" for each in every]
            rows.append([outage, *late, *trials])
    return table(head, rows)


def openings_table(found):
    columns = {}
    for rule in EXACT:
        job = Job("PyBreaker", "worked_out", rule)
        if job in found:  # the longest is left out with --fast
            columns[rule.fail_max, rule.window_size] = found[job]
    for rule in SIMULATED:
        each = found[Job("PyBreaker", "openings", rule)]
        columns[rule.fail_max, rule.window_size] = {
            str(share): median(each, str(share)) for share in SHARES
        }
    head = [f"{n} of {m}" if m else f"{n} in a row" for n, m in columns]
    rows = []
    for share in SHARES:
        cells = [number(column.get(str(share))) for column in columns.values()]
        rows.append([f"{100 * share:.0f} %", *cells])
    return table(["fail", *head], rows)


def number(calls):
    """A number of calls as text, in three digits, as no more are known."""
    if calls is None:
        return "none opened"
    if calls >= 1e7:
        return f"{calls:.1e}".replace("e+", " e")
    return f"{calls:,.0f}" if calls >= 100 else f"{calls:.3g}"


def report(found, environments, seeds, fast):
    """The lines of effect.rst."""
    versions = ", ".join(
        f"{each.library.title} {each.version}"
        for each in environments.values()
        if each.version
    )
    yield from ("What a breaker is for", "=====================", "", BEGIN, "")
    yield main_table(found)
    yield ""
    yield filled(
        f"Each figure is the median over the seeds {', '.join(map(str, seeds))}. "
        f"Unless a line says otherwise, one call in a hundred fails, the breakers have "
        f"reset_timeout=15 and success_threshold=2, and calls arrive at random: 16.7 "
        f"a second at each of 60 breakers, 1,000 a second at one. A good call is one "
        f"that would succeed, and is lost if it is refused; the good calls of the 20 s "
        f"after the trouble count, too. In the metastable failure 800 requests a "
        f"second, each with 3 attempts and 1 s of patience for each attempt, go to a "
        f"server of 1,000 a second that handles 300 for 10 s; the breakers wait 1 s, "
        f"and longer after each failed trial, up to 60 s (nopanic always waits 1 s). "
        f"The server has recovered when ten seconds begin in each of which 95 % of the "
        f"requests succeed."
    )
    yield ""
    yield filled(
        f'"25 of 50" is fail_max=25, window_size=50. The other libraries are set as '
        f"near to that as they allow. interlock-cb opens when half of the last 50 "
        f"calls failed, as soon as there are 25 calls. nopanic has a window in time "
        f"only: it opens when half of the calls of the last {3} s failed, as soon as "
        f"there are 25 calls."
    )
    yield ""
    lost = list(defeats(found))
    if lost:
        yield "Where 25 of 50 loses:"
        yield ""
        yield from (wrapped_item(each) for each in lost)
    else:
        yield "None of the others has the better figure in any line."
    yield ""
    in_a_row, window = (
        median(found[Job("PyBreaker", "fifth_of_many", rule)], "refused")
        for rule in (IN_A_ROW, WINDOW)
    )
    yield filled(
        f"Shopify publishes such figures of its Semian, a breaker for Ruby: where one "
        f"call in five fails for 20 s, its classic breaker refuses 79 % of the calls "
        f"(published with Semian). In the first line, with the same trouble but "
        f"another program, this library refuses {in_a_row:.1f} % with five failures in "
        f"a row and {window:.1f} % with 25 of 50."
    )
    yield ""
    yield filled(
        f"Simulated on {platform.python_implementation()} "
        f"{platform.python_version()}; {versions}."
    )
    yield from ("", END, "")
    yield from section("Waits in the metastable failure", waits_table(found))
    yield from section("Outages that end soon or late", outages_table(found))
    yield filled(
        "Ten calls a second, all of which fail during the outage; fail_max=5. Late: "
        "for how long after the outage calls are refused. The waits are fixed ones, "
        "and one that doubles after each failed trial."
    )
    yield ""
    yield from section(
        "Calls until a breaker opens, if each fails with the same probability",
        openings_table(found),
    )
    calls = "10,000" if fast else "100,000"
    yield filled(
        f"The mean number of calls. Up to 10 of 20 the number is worked out from the "
        f"Markov chain whose states are the outcomes of the remembered calls. Longer "
        f"windows have too many states, so the breaker is simulated with {calls} calls "
        f'for each seed; "none opened" means that in most seeds no call opened the '
        f"circuit."
    )


def section(title, text):
    return (title, "-" * len(title), "", text, "")


def wrapped_item(text):
    first, *rest = filled(text).splitlines()
    return "\n".join([f"- {first}", *(f"  {line}" for line in rest)])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fast", action="store_true", help="rough figures, quickly")
    parser.add_argument("--output", type=pathlib.Path, metavar="FILE")
    options = parser.parse_args()
    output = options.output or (None if options.fast else RESULTS)
    seeds = SEEDS[:1] if options.fast else SEEDS
    print(f"seeds: {', '.join(map(str, seeds))}", file=sys.stderr)

    names = ("PyBreaker", *RIVALS)
    with tempfile.TemporaryDirectory() as directory:
        with concurrent.futures.ThreadPoolExecutor() as pool:
            made = pool.map(lambda n: Environment(n, pathlib.Path(directory, n)), names)
            environments = dict(zip(names, made))
        found = simulate_all(environments, seeds, options.fast)
    lines = report(found, environments, seeds, options.fast)
    text = "".join(f"{line}\n" for line in lines)
    print(text)
    if output:
        output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
