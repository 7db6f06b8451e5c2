"""The simulation of outages, shortened, finds what can be known beforehand."""

import importlib.util
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

import pybreaker

SIMULATION = Path(__file__).resolve().parents[2] / "benchmarks" / "simulation.py"


@pytest.fixture(scope="module")
def simulation():
    """The module benchmarks/simulation.py, whose folder has names that tests use."""
    spec = importlib.util.spec_from_file_location("simulation", SIMULATION)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def global_generator():
    """The simulation seeds the generator that all share; other tests get it back."""
    state = random.getstate()
    yield
    random.setstate(state)


@pytest.fixture
def live_through(simulation):
    """One short run of a scenario with this library."""

    def live_through(scenario, rule, seed=1):
        (found,) = simulation.live_through("PyBreaker", scenario, rule, [seed], True)
        return found

    return live_through


def test_a_window_of_fifty_loses_no_good_call_while_a_fifth_fails(
    simulation, live_through
):
    """25 failures of 50 do not come about by chance; five in a row do."""
    window = live_through("fifth_of_one", simulation.WINDOW)
    in_a_row = live_through("fifth_of_one", simulation.IN_A_ROW)
    assert window["lost"] == 0.0
    assert in_a_row["lost"] > 30.0


def test_each_breaker_lets_25_failing_calls_and_a_trial_through(
    simulation, live_through
):
    """In 20 s a breaker is asked 334 times, and tries once, 15 s after it opened."""
    found = live_through("all_of_many", simulation.WINDOW)
    assert found["through"] == pytest.approx(100 * 26 / 334, rel=0.1)
    assert found["refused"] == pytest.approx(100.0 - found["through"])


def test_retries_keep_a_recovered_server_down_unless_there_is_a_breaker(
    simulation, live_through
):
    """The failure is metastable, and a wait that starts at a second ends it soon."""
    rule = simulation.WINDOW._replace(**simulation.GROWTH)
    with_breaker = live_through("metastable", rule)
    (without,) = simulation.live_through("NoBreaker", "metastable", rule, [1], True)
    assert without["goodput"] < 10.0
    assert without["recovery"] is None
    assert with_breaker["goodput"] > 90.0
    assert with_breaker["recovery"] <= 10


def test_a_fixed_minute_refuses_for_fifty_seconds_after_an_outage_of_ten(
    simulation, live_through
):
    """The circuit opens at the outage's start, so no trial is due before it ends."""
    rule = simulation.IN_A_ROW._replace(reset_timeout=60.0)
    found = live_through("outages", rule)
    assert found["late 10 s"] == pytest.approx(50.5, abs=1.0)
    assert found["trials 10 s"] == 0


def test_a_wait_that_doubles_refuses_for_five_seconds_after_an_outage_of_ten(
    simulation, live_through
):
    """The breaker waits 1, 2, 4 and 8 s, each up to a tenth less, before a trial."""
    rule = simulation.IN_A_ROW._replace(**simulation.GROWTH)
    found = live_through("outages", rule)
    assert 3.0 < found["late 10 s"] < 7.0
    assert found["trials 10 s"] == 3


@pytest.mark.parametrize("scenario", ["half_of_one", "outages"])
def test_a_seed_gives_the_same_figures_each_time(simulation, live_through, scenario):
    """The lengths of openings that grow also come from the seed."""
    rule = simulation.WINDOW._replace(**simulation.GROWTH)
    once, again, other = (live_through(scenario, rule, seed) for seed in (1, 1, 2))
    assert once == again != other


def test_the_simulation_gives_the_real_clock_back(simulation, live_through):
    """The library's clock is moved only while a scenario runs."""
    real = pybreaker.time
    live_through("outages", simulation.IN_A_ROW)
    assert pybreaker.time is real


def test_n_of_the_last_n_calls_are_n_in_a_row(simulation):
    """The chain of a window without room for a success gives what the formula gives."""
    for share in simulation.SHARES:
        expected = simulation.mean_calls(share, 5)
        assert simulation.mean_calls(share, 5, 5) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("share", [0.3, 0.5, 1.0])
def test_the_mean_number_of_calls_is_that_which_the_library_takes(simulation, share):
    """For 5 of 10 the formula and a count of calls give the same number."""
    library = simulation.PyBreaker(simulation.Clock())
    rule = simulation.Rule(5, 10)
    counted = simulation.counted_calls(library, rule, 1, 10_000, share)
    assert counted == pytest.approx(simulation.mean_calls(share, 5, 10), rel=0.15)


def test_the_simulation_prints_json(simulation):
    """The simulation of a library imports that library and the standard library."""
    rule = json.dumps(simulation.IN_A_ROW._asdict())
    printed = subprocess.run(
        [sys.executable, SIMULATION, "PyBreaker", "in_turn", rule, "--fast"],
        env={**os.environ, "PYTHONPATH": str(Path(pybreaker.__file__).parent)},
        capture_output=True,
        check=True,
        timeout=60,
    ).stdout
    (found,) = json.loads(printed)
    assert found == {"lost": 0.0, "through": 100.0, "refused": 0.0}
