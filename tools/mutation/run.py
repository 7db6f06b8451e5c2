"""Mutation testing of pybreaker.py: ``tox -e mutation``. Mutation testing of another
module: ``tox -e mutation -- pybreaker_extras.redis``, where several may be named.

Cosmic Ray makes the mutants, each with one small change to one of the modules, and
keeps their outcomes in a database, the session. This module runs the tests on them.
pytest collects the tests in one process, which forks a child for each mutant. The child
gives the functions the mutant's code and runs the tests that reach the changed line
until a test fails: first the tests that have killed most mutants of the same function,
then the quickest. For a change outside of functions the child imports the module and
the tests anew.

The searching tests take long. With ``--searches`` these tests are run on the mutants
that the other tests have left. A mutant that survives both must be in survivors.toml
with the reason why its change has no effect. There the name of a mutant is the changed
function, the operator of Cosmic Ray, and a number, as an operator may apply to several
places of a function.

The outcome of a mutant is kept until its function changes, in files that begin with the
name of the session. After a change of a module only the mutants of changed functions
are run; ``--all`` runs all mutants again.
"""

import argparse
import ast
import collections
import functools
import gc
import hashlib
import importlib
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import types
from pathlib import Path

import cosmic_ray.commands
import cosmic_ray.plugins
import coverage
import hypothesis  # noqa: F401 (later it would warn of trio, and that is an error)
import pytest
import tomllib
from cosmic_ray.ast import get_ast
from cosmic_ray.mutating import MutationVisitor
from cosmic_ray.work_db import use_db
from cosmic_ray.work_item import TestOutcome, WorkerOutcome, WorkResult

sys.path.insert(0, str(Path(__file__).parent))

import operators

ROOT = Path(__file__).resolve().parents[2]
SURVIVORS = Path(__file__).with_name("survivors.toml")
# The folders of the tests for mutants of pybreaker.py and for those of companions, and
# the folders with tests that search or wait for processes: these tests take long, and
# are for mutants that the others have not killed.
CORE = ("spec",)
COMPANIONS = ("spec", "redis", "extras")
SEARCHES = ("searches", "redis")
# These tests use sys.monitoring or fork, so the lines that they reach are not known.
ALWAYS_RUN = (
    "test_interleavings.py",
    "test_fork.py",
)
MEMORY = 4 << 30  # bytes that a child may have
OWN_FAULT = 70  # the exit status of a child in which this module has failed
os.environ["PYBREAKER_PATIENCE"] = "4"

PYTEST = [
    "-q",
    "--maxfail=1",
    *("-p", "no:cacheprovider"),
    *("-p", "no:randomly"),
    *("-p", "no:xdist"),
    *("-W", "ignore::pytest.PytestAssertRewriteWarning"),  # of hypothesis, see above
    f"--rootdir={ROOT}",
]


def test_folders(options):
    """The folders of the tests that the options ask for."""
    folders = CORE if options.modules == ["pybreaker"] else COMPANIONS
    if options.searches:
        folders = SEARCHES
    return [str(ROOT / "tests" / name) for name in folders]


def is_search(item):
    """Whether a test is a searching test."""
    return "searches" in item.path.parts or item.get_closest_marker("long") is not None


def definitions(tree):
    """A dict: the full name of the innermost function or class around each line."""
    names = {}

    def visit(node, name):
        for child in ast.iter_child_nodes(node):
            inner = name
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                inner = f"{name}.{child.name}" if name else child.name
                start = min([child.lineno, *(d.lineno for d in child.decorator_list)])
                names.update(dict.fromkeys(range(start, child.end_lineno + 1), inner))
            visit(child, inner)

    for node in tree.body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            target = getattr(node, "target", None) or node.targets[0]
            names.update(
                dict.fromkeys(
                    range(node.lineno, node.end_lineno + 1), ast.unparse(target)
                )
            )
    visit(tree, "")
    return names


def statement_lines(tree):
    """A dict: for each line the lines of its statement; for a line in the head of a
    compound statement, the lines of the head."""
    lines = {}
    for node in ast.walk(tree):  # outer statements first
        if isinstance(node, ast.stmt):
            body = getattr(node, "body", None)
            end = max(node.lineno, body[0].lineno - 1) if body else node.end_lineno
            head = set(range(node.lineno, end + 1))
            for line in range(node.lineno, node.end_lineno + 1):
                lines[line] = head if line in head else head | lines.get(line, head)
    return lines


def spans_without_effect(tree):
    """The start and the end of each piece of code that only type checkers read."""
    for node in ast.walk(tree):
        unread = [getattr(node, "annotation", None), getattr(node, "returns", None)]
        if isinstance(node, ast.AnnAssign) and node.value is None:
            unread.append(node)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            if any(getattr(d, "id", "") == "overload" for d in node.decorator_list):
                unread += [node, *node.decorator_list]
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            unread += [node.test, *node.body]
        if isinstance(node, ast.Assign) and "TYPE_CHECKING" in map(
            ast.unparse, node.targets
        ):
            unread.append(node)
        for part in filter(None, unread):
            start = part.lineno, part.col_offset
            if part in getattr(node, "decorator_list", ()):
                start = part.lineno, 0  # the @
            yield start, (part.end_lineno, part.end_col_offset)


def name_of(path):
    """A module's name: "pybreaker", or "pybreaker_extras.redis"."""
    return ".".join(Path(path).relative_to(ROOT).with_suffix("").parts)


def identities(work_items, texts):
    """For each work item: the job, the mutant's name, and the text of the function or
    class around the change. While this text stays the same, so does the mutant."""
    places, sources = {}, collections.defaultdict(list)
    for module, text in texts.items():
        places[module] = definitions(ast.parse(text))
        for number, line in enumerate(text.splitlines(), 1):
            sources[module, places[module].get(number, "")].append(line)
    seen = collections.Counter()
    for work in sorted(work_items, key=lambda work: work.mutations[0].occurrence):
        mutation = work.mutations[0]
        module = name_of(mutation.module_path)
        place = places[module].get(mutation.start_pos[0], "")
        operator = mutation.operator_name.partition("/")[2]
        kind = f"{module}.{place}" if place else module, operator
        seen[kind] += 1
        source = "\n".join(sources[module, place])
        yield work.job_id, " ".join((*kind, str(seen[kind]))), source


def functions(code, is_inner=False):
    """The code object and all code objects in it, each with a flag that says whether
    the code object is inside a function."""
    yield code, is_inner
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            optimized = bool(code.co_flags & 0x1)
            yield from functions(constant, is_inner or optimized)


class Module:
    """A module that is mutated."""

    def __init__(self, path):
        self.path = path
        self.name = name_of(path)
        self.text = path.read_text()
        self.tree = ast.parse(self.text)
        self.syntax_tree = get_ast(self.text)  # Cosmic Ray's, which takes long to make
        self.definitions = definitions(self.tree)
        self.lines = statement_lines(self.tree)
        self.functions = list(functions(self.compiled(self.text)))

    def compiled(self, text):
        return compile(text, str(self.path), "exec")

    def mutated(self, mutation):
        """The text with a mutation. The mutation stays in the syntax tree, so each
        process can call this method once."""
        operator = cosmic_ray.plugins.get_operator(mutation.operator_name)()
        visitor = MutationVisitor(mutation.occurrence, operator)
        return visitor.walk(self.syntax_tree).get_code()

    def difference(self, text):
        """The change from the module's text to `text`, for the reader of the report."""
        old, new = self.text.splitlines(), text.splitlines()
        start = len(os.path.commonprefix([old, new]))
        old, new = old[start:], new[start:]
        same = len(os.path.commonprefix([old[::-1], new[::-1]]))
        was, becomes = (
            " / ".join(filter(None, map(str.strip, lines[: len(lines) - same])))
            for lines in (old, new)
        )
        return f"{was} -> {becomes}"


SOURCES = {}  # the modules that are mutated, by their paths


def module_of(mutation):
    return SOURCES[str(mutation.module_path)]


def own_part(code):
    """The code object without the code objects in it."""
    constants = (c if not isinstance(c, types.CodeType) else 0 for c in code.co_consts)
    return code.replace(co_consts=tuple(constants))


def living_functions():
    """The living functions of the modules, by the place of their code."""
    living = collections.defaultdict(list)
    gc.unfreeze()  # gc.get_objects() leaves out what the tests' conftest.py has frozen
    for function in gc.get_objects():
        if type(function) is types.FunctionType:
            code = function.__code__
            if code.co_filename in SOURCES:
                living[place_in_source(code)].append(function)
    return living


def place_in_source(code):
    return code.co_filename, code.co_qualname, code.co_firstlineno


def put_in_place(module, text, living):
    """Give the living functions their mutated code. False if the mutation also changes
    code that runs at import, so that the module must be imported anew."""
    new = list(functions(module.compiled(text)))
    if len(module.functions) != len(new):
        return False
    changes = []
    for (before, is_inner), (after, _) in zip(module.functions, new):
        is_function = before.co_flags & 0x1
        if own_part(before) != own_part(after) or (is_function and before != after):
            found = living.get(place_in_source(before), ())
            if not found and not is_inner:
                return False
            changes += [(function, after) for function in found]
    try:
        for function, after in changes:
            flags = function.__code__.co_flags | after.co_flags & ~0x100
            function.__code__ = after.replace(co_flags=flags)
    except ValueError:  # the number of free variables has changed
        return False
    return True


def import_anew(module, text):
    for name, loaded in list(sys.modules.items()):
        file = getattr(loaded, "__file__", None) or ""
        if file.startswith(str(ROOT)) and loaded.__name__ not in (
            "__main__",
            "operators",
        ):
            if ".tox" not in file:
                del sys.modules[name]
    package, _, name = module.name.rpartition(".")
    mutant = types.ModuleType(module.name)
    mutant.__file__ = str(module.path)
    mutant.__package__ = package
    sys.modules[module.name] = mutant
    if package:
        setattr(importlib.import_module(package), name, mutant)
    exec(module.compiled(text), vars(mutant))


class Chosen:
    """A pytest plugin that keeps only the searching tests, or only the other tests."""

    def __init__(self, searches):
        self.searches = searches

    def pytest_collection_modifyitems(self, items):
        items[:] = [item for item in items if is_search(item) == self.searches]


class Runner:
    """A pytest plugin that runs the tests for which `is_apt` is true, until one fails.
    Tests that are likely to fail and quick tests come first."""

    def __init__(self, is_apt, seconds, kills, output):
        self.is_apt = is_apt
        self.seconds = seconds
        self.kills = kills  # by test, how many mutants of the function it has killed
        self.output = output

    def pytest_runtestloop(self, session):
        self.run(session, session.items)
        return True

    def turn(self, item):
        always = item.path.name in ALWAYS_RUN
        kills, seconds = self.kills[item.nodeid], self.seconds.get(item.nodeid, 0.0)
        return always, -kills, seconds

    def run(self, session, items):
        items = sorted(filter(self.is_apt, items), key=self.turn)
        for item, following in zip(items, [*items[1:], None]):
            # The alarm ends the child if the test hangs.
            limit = 20 + 20 * self.seconds.get(item.nodeid, 0.0)
            self.say(item.nodeid + "\n")
            signal.alarm(int(limit))
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            signal.alarm(0)
            if session.testsfailed:
                self.failed = True
                return

    failed = False

    def say(self, text):
        os.ftruncate(self.output, 0)
        os.pwrite(self.output, text.encode(), 0)


class Mutants:
    """The plugin of the outer pytest, which runs the mutants in place of the tests."""

    def __init__(self, options):
        self.options = options
        self.verdict = 2

    def pytest_runtestloop(self, session):
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        self.session = session
        self.items = {item.nodeid: item for item in session.items}
        with use_db(self.options.session) as database:
            self.prepare(database)
            self.measure()
            self.living = living_functions()
            gc.freeze()  # else each child's collector would copy all memory
            self.execute(database)
            self.verdict = report(database, self.options)
        return True

    # The tests that reach a line.

    def measure(self):
        which = "searches" if self.options.searches else "tests"
        cache = Path(f"{self.options.session}.{which}.json")
        known = json.loads(cache.read_text()) if cache.exists() else {}
        if new := [test for test in self.items if test not in known]:
            print(f"measuring {len(new)} tests", flush=True)
            pid = os.fork()
            if not pid:
                try:
                    known.update(self.measured(new))
                    cache.write_text(json.dumps(known))
                finally:
                    os._exit(0)
            os.waitpid(pid, 0)
            known = json.loads(cache.read_text())
        self.seconds, self.reached = {}, collections.defaultdict(set)
        for test in list(self.items):
            self.seconds[test], passed, reached = known[test]
            for path, lines in reached.items():
                for line in lines:
                    self.reached[path, line].add(test)
            if not passed:
                print(f"left out, as it fails without a mutant: {test}")
                del self.items[test]

    def measured(self, tests):
        """For each test: its seconds, whether it passes, and the lines it reaches."""
        cov = coverage.Coverage(data_file=None, include=[*SOURCES], config_file=False)
        seconds, passed = {}, {}
        clock = time.perf_counter
        for test in tests:
            item, failed = self.items[test], self.session.testsfailed
            cov.start()
            cov.switch_context(test)
            start = clock()
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
            seconds[test] = round(clock() - start, 3)
            cov.stop()
            passed[test] = self.session.testsfailed == failed
        lines = {test: {path: [] for path in SOURCES} for test in tests}
        for path in SOURCES:
            for line, reaching in cov.get_data().contexts_by_lineno(path).items():
                for test in reaching:
                    if test in lines:  # lines reached at import have no test
                        lines[test][path].append(line)
        return {test: (seconds[test], passed[test], lines[test]) for test in tests}

    def tests_for(self, mutation):
        module = module_of(mutation)
        lines = set(range(mutation.start_pos[0], mutation.end_pos[0] + 1))
        lines = lines.union(*(module.lines.get(line, ()) for line in list(lines)))
        path = str(module.path)
        chosen = set().union(*(self.reached.get((path, line), ()) for line in lines))
        return [
            item
            for item in self.items.values()
            if item.nodeid in chosen or item.path.name in ALWAYS_RUN
        ]

    def is_apt(self, mutation, item):
        """Whether the test may run on the mutant. The tests of companions take long, so
        they are only for mutants of companions and for ``--searches``."""
        own = item.path.parent.name in ("spec", "searches")
        return own or self.options.searches or is_companion(mutation)

    # The mutants.

    def prepare(self, database):
        if not database.num_work_items:
            cosmic_ray.commands.init([*map(Path, SOURCES)], database, {})
            if not self.options.all:
                self.bring_over(database)
        spans = {
            path: list(spans_without_effect(module.tree))
            for path, module in SOURCES.items()
        }
        skipped = []
        for work in database.work_items:
            mutation = work.mutations[0]
            start = mutation.start_pos
            if any(s <= start < e for s, e in spans[str(mutation.module_path)]):
                skipped.append(work.job_id)
        database.set_multiple_results(
            skipped, WorkResult(worker_outcome=WorkerOutcome.SKIPPED)
        )

    def bring_over(self, database):
        """Take over the outcomes that earlier sessions have for unchanged functions."""
        name = Path(self.options.session)
        texts = {module.name: module.text for module in SOURCES.values()}
        name.with_suffix(".texts").write_text(json.dumps(texts))
        earlier = name.parent.glob(name.name.rpartition("-")[0] + "-*.sqlite")
        earlier = sorted(earlier, key=lambda path: path.stat().st_mtime)
        known = {}
        for path in earlier:  # the latest outcome wins
            if path == name or not path.with_suffix(".texts").exists():
                continue
            earlier_texts = json.loads(path.with_suffix(".texts").read_text())
            with use_db(path) as old:
                results = {job: r for job, r in old.results if r.test_outcome}
                for job, *mutant in identities(old.work_items, earlier_texts):
                    if job in results:
                        known[tuple(mutant)] = results[job]
        for job, *mutant in identities(database.work_items, texts):
            if tuple(mutant) in known:
                database.set_result(job, known[tuple(mutant)])

    def execute(self, database):
        results = dict(database.results)
        self.kills = collections.defaultdict(collections.Counter)
        for work in database.work_items:
            if work.job_id in results:
                self.note(work, results[work.job_id])
        names, explained = names_of_mutants(database), explanations()
        waiting = [
            work
            for work in database.work_items
            if self.is_waiting(results.get(work.job_id), names[work.job_id], explained)
        ]
        waiting.sort(key=turn, reverse=True)
        if self.options.only:
            waiting = [w for w in waiting if self.options.only in names[w.job_id]]
        if self.options.limit:
            waiting = waiting[-self.options.limit :]  # the last is run first
        print(f"{len(waiting)} mutants to run", flush=True)
        running, total, start = {}, len(waiting), time.monotonic()
        while waiting or running:
            while waiting and len(running) < self.options.jobs:
                work = waiting.pop()
                output, folder = tempfile.TemporaryFile(), tempfile.TemporaryDirectory()
                pid = os.fork()
                if not pid:
                    self.run_in_child(work, output.fileno(), folder.name)
                running[pid] = work, output, folder
            pid, status = os.wait()
            if pid not in running:
                continue
            try:
                os.killpg(pid, signal.SIGKILL)  # processes that the tests have left
            except ProcessLookupError:
                pass
            work, output, folder = running.pop(pid)
            folder.cleanup()
            output.seek(0)
            said = output.read().decode()
            output.close()
            code = os.waitstatus_to_exitcode(status)
            if code == OWN_FAULT:
                print(f"could not be run: {names[work.job_id]}")
                continue
            survived = code == 0
            diff, _, killer = said.partition("\n")
            outcome = TestOutcome.SURVIVED if survived else TestOutcome.KILLED
            if killer.strip() == "SyntaxError":
                outcome = TestOutcome.INCOMPETENT  # the mutant is no Python
            if os.WIFSIGNALED(status):
                killer = f"signal {os.WTERMSIG(status)} in {killer}"
            result = WorkResult(WorkerOutcome.NORMAL, killer.strip(), outcome, diff)
            database.set_result(work.job_id, result)
            self.note(work, result)
            number = total - len(waiting) - len(running)
            if survived or not number % 50:
                spent = time.monotonic() - start
                name = names[work.job_id]
                print(f"{number}/{total} {spent:.0f} s {outcome.value}: {name}: {diff}")
                sys.stdout.flush()

    def is_waiting(self, result, name, explained):
        if result is None:
            return not self.options.searches
        if result.test_outcome != TestOutcome.SURVIVED or name in explained:
            return False
        return self.options.searches or self.options.retry

    def note(self, work, result):
        """Remember the test that has killed the mutant."""
        if result.test_outcome == TestOutcome.KILLED:
            self.kills[place_of(work)][result.output] += 1

    def run_in_child(self, work, output, folder):
        status, mutation = OWN_FAULT, work.mutations[0]
        try:
            os.setsid()
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            null = os.open(os.devnull, os.O_RDWR)
            for fd in (0, 1, 2):
                os.dup2(null, fd)
            self.session.config.pluginmanager.unregister(name="terminalreporter")
            module = module_of(mutation)
            text = module.mutated(mutation)
            # Processes that tests start import the mutant from this folder.
            path = Path(folder, module.path.relative_to(ROOT))
            if path.parent != Path(folder):
                shutil.copytree(module.path.parent, path.parent)
            path.write_text(text)
            sys.path.insert(0, folder)
            os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
            os.environ["PYTHONSAFEPATH"] = "1"  # else the current folder comes first
            first = module.difference(text) + "\n"
            tests = self.tests_for(mutation)
            is_apt = functools.partial(self.is_apt, mutation)
            runner = Runner(is_apt, self.seconds, self.kills[place_of(work)], output)
            runner.say = lambda said: Runner.say(runner, first + said)
            runner.say("")  # for a mutant without tests
            try:
                is_in_place = put_in_place(module, text, self.living)
            except SyntaxError:
                runner.say("SyntaxError")
                status = 1
                return
            if is_in_place:
                runner.run(self.session, tests)
                status = int(runner.failed)
            else:
                runner.say("import")
                signal.alarm(120)
                status = 1  # stands if the import raises
                import_anew(module, text)
                chosen = Chosen(self.options.searches)
                status = pytest.main(self.options.pytest, plugins=[chosen, runner])
        finally:
            os._exit(int(status))


def place_of(work):
    """The module and the innermost function or class of a mutant."""
    mutation = work.mutations[0]
    module = module_of(mutation)
    return module.name, module.definitions.get(mutation.start_pos[0], "")


def names_of_mutants(database):
    """A dict: for each job the name that the mutant has in survivors.toml."""
    texts = {module.name: module.text for module in SOURCES.values()}
    named = identities(database.work_items, texts)
    return {job: name for job, name, _ in named}


def is_companion(mutation):
    return module_of(mutation).name != "pybreaker"


def turn(work):
    """A sort key: the core's mutants come before those of companions, and each group is
    shuffled, always in the same way."""
    mutation = work.mutations[0]
    key = f"{place_of(work)} {mutation.operator_name} {mutation.occurrence}"
    return is_companion(mutation), hashlib.sha1(key.encode()).digest()


def explanations():
    listed = tomllib.loads(SURVIVORS.read_text())["survivors"]
    return {mutant for entry in listed for mutant in entry["mutants"]}


def report(database, options):
    outcomes = collections.Counter()
    survivors, names = {}, names_of_mutants(database)
    for work, result in database.completed_work_items:
        if result.worker_outcome == WorkerOutcome.SKIPPED:
            continue
        outcomes[result.test_outcome.value] += 1
        if result.test_outcome == TestOutcome.SURVIVED:
            survivors[names[work.job_id]] = result.diff
    left = database.num_work_items - database.num_results
    explained = explanations()
    unexplained = sorted(set(survivors) - explained)
    for mutant in unexplained:
        print(f"survived without a reason: {mutant}: {survivors[mutant]}")
    if not left:
        for mutant in sorted(explained - set(survivors)):
            print(f"explained, but killed or gone: {mutant}")
    killed, survived = outcomes["killed"], outcomes["survived"]
    score = 100 * killed / (killed + survived or 1)
    print(
        f"{killed + survived} mutants: {killed} killed, {survived} survived, "
        f"{len(unexplained)} of these without a reason; {left} not run; "
        f"score {score:.2f} %"
    )
    return int(bool(unexplained) or left > 0)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("modules", nargs="*", default=["pybreaker"], help="the modules to mutate")
    add("--session", default=".mutation", help="where to keep the outcomes")
    add("--jobs", type=int, default=os.cpu_count())
    add("--limit", type=int, help="the most mutants to run; the next run goes on")
    add("--only", help="run the mutants whose name has this text")
    add("--retry", action="store_true", help="run the surviving mutants again")
    add("--all", action="store_true", help="take over no outcomes of earlier sessions")
    add("--searches", action="store_true", help="run the searching tests")
    options = parser.parse_args()
    for module in options.modules:
        path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
        SOURCES[str(path)] = Module(path)
    options.pytest = [*PYTEST, *test_folders(options)]
    digest = hashlib.sha256(Path(operators.__file__).read_bytes())
    for module in SOURCES.values():
        digest.update(module.text.encode())
    options.session += f"-{digest.hexdigest()[:12]}.sqlite"
    cosmic_ray.plugins.OPERATOR_PROVIDERS["own"] = operators.Provider()
    sys.path.insert(0, str(ROOT))
    sys.dont_write_bytecode = False  # pytest caches rewritten tests
    plugin = Mutants(options)
    pytest.main(options.pytest, plugins=[Chosen(options.searches), plugin])
    return plugin.verdict


if __name__ == "__main__":
    sys.exit(main())
