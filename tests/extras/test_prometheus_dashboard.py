"""examples/grafana_dashboard.json: Grafana can show the dashboard, whose queries name
existing metrics."""

from __future__ import annotations

import copy
import itertools
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from support import PATIENCE

pytest.importorskip("prometheus_client")

from pybreaker_extras.prometheus import FAMILIES  # noqa: E402

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
DASHBOARD = json.loads((EXAMPLES / "grafana_dashboard.json").read_text("utf-8"))
RULES = (EXAMPLES / "prometheus_rules.yml").read_text("utf-8")
PANELS = DASHBOARD["panels"]

# The variables that Grafana has had since version 10.
PANEL_TYPES = {"bargauge", "stat", "state-timeline", "table", "timeseries"}
BUILT_IN = {"__rate_interval", "__range", "__all"}
WIDTH = 24

LABELS = {
    family.name + ("_total" if family.is_counter else ""): set(family.labels)
    for family in FAMILIES
}
TARGET_LABELS = {"job", "instance"}  # labels that Prometheus adds


def expressions():
    """Every query of the dashboard, with its place."""
    for panel in PANELS:
        for target in panel["targets"]:
            yield f"{panel['title']}, {target['refId']}", target["expr"]
    for annotation in DASHBOARD["annotations"]["list"]:
        yield annotation["name"], annotation["expr"]
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            assert variable["definition"] == variable["query"]["query"]
            yield variable["name"], variable["definition"]


def unknown(text):
    """The metrics and labels in a query that the module does not expose."""
    for metric, selector in re.findall(r"(circuit_breaker_\w+)(?:{([^}]*)})?", text):
        if metric not in LABELS:
            yield metric
        for label in re.findall(r"(\w+) *=", selector):
            if label not in LABELS.get(metric, ()) | TARGET_LABELS:
                yield f"{metric}{{{label}}}"


def test_panels_have_what_grafana_needs():
    """Each panel has a number of its own, a known type, a title, a description, and
    queries with different letters to the chosen data source."""
    assert len({panel["id"] for panel in PANELS}) == len(PANELS) > 0
    for panel in PANELS:
        assert panel["type"] in PANEL_TYPES
        assert panel["title"]
        assert panel["description"]
        assert {"defaults", "overrides"} <= set(panel["fieldConfig"])
        letters = [target["refId"] for target in panel["targets"]]
        assert len(set(letters)) == len(letters) > 0
        for part in panel, *panel["targets"]:
            assert part["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


def lost(before, after, where=""):
    """The parts of a dashboard that are missing afterwards or have changed."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key, value in before.items():
            if key in after:
                yield from lost(value, after[key], f"{where}/{key}")
            else:
                yield f"{where}/{key}"
    elif isinstance(before, list) and isinstance(after, list):
        for number, pair in enumerate(itertools.zip_longest(before, after)):
            yield from lost(*pair, f"{where}/{number}")
    elif before != after:
        yield where


def test_grafana_knows_every_part_of_the_dashboard():
    """Grafana's own model reads the dashboard and writes it again with all parts,
    except the empty number of a dashboard that is not yet in a Grafana."""
    model = pytest.importorskip("grafana_foundation_sdk.models.dashboard")
    encoder = pytest.importorskip("grafana_foundation_sdk.cog.encoder")
    plugins = pytest.importorskip("grafana_foundation_sdk.cog.plugins")
    plugins.register_default_plugins()  # panels and queries, each with its options
    read = model.Dashboard.from_json(copy.deepcopy(DASHBOARD))
    written = json.loads(json.dumps(read, cls=encoder.JSONEncoder))
    assert list(lost(DASHBOARD, written)) == ["/id"]


def test_panels_fill_the_width_and_do_not_overlap():
    """Every square of the grid belongs to one panel."""
    taken = [
        square
        for panel in PANELS
        for grid in [panel["gridPos"]]
        for square in itertools.product(
            range(grid["x"], grid["x"] + grid["w"]),
            range(grid["y"], grid["y"] + grid["h"]),
        )
    ]
    height = max(y for _, y in taken) + 1
    assert sorted(taken) == sorted(itertools.product(range(WIDTH), range(height)))


def test_dashboard_can_be_imported_anywhere():
    """The dashboard has no number of a certain Grafana, and asks the user which
    Prometheus to query."""
    assert DASHBOARD["id"] is None
    assert DASHBOARD["title"]
    assert DASHBOARD["schemaVersion"] >= 36
    variables = {each["name"]: each for each in DASHBOARD["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert variables["datasource"]["query"] == "prometheus"


def test_every_variable_is_defined():
    """Grafana itself defines some variables."""
    defined = {each["name"] for each in DASHBOARD["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(DASHBOARD)))
    assert used - BUILT_IN == defined


@pytest.mark.parametrize(("where", "expression"), list(expressions()))
def test_dashboard_asks_only_for_what_is_exposed(where, expression):
    """The metrics and labels are those of pybreaker_extras.prometheus."""
    assert "circuit_breaker_" in expression
    assert list(unknown(expression)) == []


def test_rules_ask_only_for_what_is_exposed():
    """The metrics and labels are those of pybreaker_extras.prometheus."""
    assert "circuit_breaker_" in RULES
    assert list(unknown(RULES)) == []


def test_dashboard_shows_every_metric():
    """The exception is the time of the last transition, which the list of transitions
    shows."""
    shown = set(re.findall(r"circuit_breaker_\w+", json.dumps(DASHBOARD)))
    assert set(LABELS) - shown == {"circuit_breaker_last_transition_timestamp_seconds"}


@pytest.mark.skipif(not shutil.which("promtool"), reason="needs promtool")
def test_prometheus_understands_every_query(tmp_path):
    """With values for the variables, each query could be a rule."""
    rules = []
    for _, expression in expressions():
        expression = re.sub(r"^label_values\((.*), \w+\)$", r"\1", expression)
        expression = re.sub(r"\$__\w+", "1m", expression)
        expression = re.sub(r"\$\w+", ".*", expression)
        rules.append({"record": f"query:{len(rules)}", "expr": expression})
    file = tmp_path / "rules.yml"
    file.write_text(json.dumps({"groups": [{"name": "queries", "rules": rules}]}))
    done = subprocess.run(
        ["promtool", "check", "rules", str(file)],
        capture_output=True,
        text=True,
        timeout=4 * PATIENCE,
    )
    assert done.returncode == 0, done.stdout + done.stderr
