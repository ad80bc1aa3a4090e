"""What is handed to operators (dashboard, alerts, runbook) speaks of metrics that a running server exports."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from shardbook_server.metrics.recorder import WATCHED_REASONS
from tests.behaviour.ops.conftest import Ops

ROOT = Path(__file__).resolve().parents[3]
DASHBOARD: dict[str, Any] = json.loads((ROOT / "deploy" / "grafana-dashboard.json").read_text())
RULES: list[dict[str, Any]] = [
    rule
    for group in yaml.safe_load((ROOT / "deploy" / "prometheus-alerts.yml").read_text())["groups"]
    for rule in group["rules"]
]
RUNBOOK = (ROOT / "docs" / "RUNBOOK.md").read_text()
#: Names in an expression that are followed by an opening bracket, or stand between operands, are PromQL's own.
_WORDS = re.compile(r"(?<![\w$:])[a-zA-Z_:][\w:]*")
_GROUPING = re.compile(r"\b(by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)")
_OPERATORS = {"and", "or", "unless", "bool", "offset"}
#: Suffixes of the samples of a family.
_SUFFIXES = {
    "counter": ("_total",),
    "gauge": ("",),
    "histogram": ("_bucket", "_sum", "_count"),
}


def _panels() -> Iterator[dict[str, Any]]:
    for panel in DASHBOARD["panels"]:
        yield panel
        yield from panel.get("panels", ())


def _queries() -> list[str]:
    """Every expression of the dashboard, its variables included."""
    queries = [target["expr"] for panel in _panels() for target in panel.get("targets", ())]
    variables = [v["definition"] for v in DASHBOARD["templating"]["list"] if v["type"] == "query"]
    return queries + [re.sub(r"label_values\((.*), *\w+\)", r"\1", query) for query in variables]


def _metrics(expression: str) -> set[str]:
    """Names of the metrics that a PromQL expression reads."""
    bare = re.sub(r'"[^"]*"', '""', expression)
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]", " ", bare)
    bare = _GROUPING.sub(" ", bare)
    found = set()
    for match in _WORDS.finditer(bare):
        is_function = bare[match.end() :].lstrip().startswith("(")
        # 1e9 is a number: the letter follows a digit.
        if not is_function and match.group() not in _OPERATORS:
            found.add(match.group())
    return found


def _exported(ops: Ops) -> set[str]:
    """Names of the samples that a server has, or will have once there is something to tell."""
    return {
        family.name + suffix
        for family in text_string_to_metric_families(ops.http.get("/metrics").text)
        for suffix in _SUFFIXES[family.type]
    }


def test_names_are_found_in_expressions() -> None:
    """Rule: the tests below see every metric, and nothing else."""
    expression = 'sum by (le, job) (rate(a_total{code=~"b|c", x="y"}[5m])) / on (z) 1e9 > 0.5 and max(b_x) unless c'
    assert {"a_total", "b_x", "c"} == _metrics(expression)


def test_every_metric_of_the_dashboard_is_exported(ops: Ops) -> None:
    """Rule: no panel is empty because of a name."""
    exported = _exported(ops)
    queries = _queries()
    assert len(queries) > 25
    assert {} == {query: missing for query in queries if (missing := _metrics(query) - exported)}
    assert all(_metrics(query) for query in queries)


def test_every_metric_of_the_alerts_is_exported(ops: Ops) -> None:
    """Rule: no alert is silent because of a name."""
    exported = _exported(ops)
    assert {} == {rule["alert"]: missing for rule in RULES if (missing := _metrics(rule["expr"]) - exported)}


def test_every_metric_of_ours_is_on_the_dashboard(ops: Ops) -> None:
    """Rule: what is worth exporting is worth showing."""
    shown = {name for query in _queries() for name in _metrics(query)}
    families = text_string_to_metric_families(ops.http.get("/metrics").text)
    ours = {family.name for family in families if not family.name.startswith("process_")}
    stems = {re.sub(r"_(total|bucket|sum|count)$", "", name) for name in shown}
    assert set() == ours - stems


def test_alerts_look_for_reasons_that_exist_from_the_start(ops: Ops) -> None:
    """Rule: a series that begins at 1 is no increase to Prometheus, so reasons that alerts name begin at 0."""
    named = {
        reason
        for rule in RULES
        for pattern in re.findall(r'reason=~?"([^"]*)"', rule["expr"])
        for reason in pattern.split("|")
    }
    assert set(WATCHED_REASONS) == named
    text = ops.http.get("/metrics").text
    assert all(f'shardbook_refusals_total{{reason="{reason}"}}' in text for reason in named)
    sources = [*(ROOT / "server").rglob("*.py"), ROOT / "client" / "shardbook" / "errors.py"]
    code = "\n".join(path.read_text() for path in sources if path.name != "recorder.py")
    assert [] == [reason for reason in sorted(named) if f'"{reason}"' not in code]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: str(rule["alert"]))
def test_every_alert_is_whole_and_has_its_section(rule: dict[str, Any]) -> None:
    """Rule: what happened, how bad it is, and where it says what to do."""
    assert rule["labels"]["severity"] in {"critical", "warning", "info"}
    assert rule["annotations"]["summary"]
    assert f"docs/RUNBOOK.md#{rule['alert'].lower()}" == rule["annotations"]["runbook_url"]
    section = RUNBOOK.partition(f"\n## {rule['alert']}\n")[2].partition("\n## ")[0]
    assert len(section.split()) >= 20


def test_the_runbook_speaks_of_no_other_alert() -> None:
    """Rule: sections and alerts are pairs, in one order."""
    assert [rule["alert"] for rule in RULES] == re.findall(r"^## (\w+)$", RUNBOOK, flags=re.MULTILINE)


def test_the_runbook_names_metrics_that_are_exported(ops: Ops) -> None:
    """Rule: a name that is looked up at night is right."""
    stems = {re.sub(r"_(total|bucket|sum|count)$", "", name) for name in _exported(ops)}
    named = {re.sub(r"_total$", "", name) for name in re.findall(r"`((?:shardbook|process|grpc)_\w+)`", RUNBOOK)}
    assert named
    assert set() == named - stems


def test_the_dashboard_is_one_that_grafana_reads() -> None:
    """Rule: the model's required parts, ids that differ, panels that do not overlap, one source for all."""
    assert DASHBOARD["title"]
    assert DASHBOARD["uid"]
    assert DASHBOARD["schemaVersion"] >= 36
    assert {"from", "to"} == set(DASHBOARD["time"])
    ids = [panel["id"] for panel in _panels()]
    assert len(ids) == len(set(ids))
    cells: set[tuple[int, int]] = set()
    for panel in _panels():
        place = panel["gridPos"]
        assert 0 <= place["x"] < place["x"] + place["w"] <= 24
        covered = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not covered & cells, panel["title"]
        cells |= covered
        if panel["type"] != "row":
            assert panel["targets"], panel["title"]
            assert panel["fieldConfig"]["defaults"]["unit"]
            sources = {target["datasource"]["uid"] for target in panel["targets"]} | {panel["datasource"]["uid"]}
            assert {"${datasource}"} == sources
            references = [target["refId"] for target in panel["targets"]]
            assert len(references) == len(set(references))
