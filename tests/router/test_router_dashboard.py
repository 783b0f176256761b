"""The Grafana dashboard asks for metrics and labels that exist."""

import json
import re
from pathlib import Path

from router.app import Gateway
from router.config import RouterConfig
from router.metrics import Histogram

FILE = Path(__file__).parents[2] / "configs" / "grafana" / "gateway.json"
WORDS = {"sum", "by", "le", "rate", "histogram_quantile", "__rate_interval"}


def targets() -> list[dict]:
    panels = json.loads(FILE.read_text("utf-8"))["panels"]
    return [target for panel in panels for target in panel.get("targets", ())]


def known() -> dict[str, tuple[str, set[str]]]:
    """By sample name the family's kind and its labels."""
    out: dict[str, tuple[str, set[str]]] = {}
    for metric in Gateway(RouterConfig(policy="cache_aware")).metrics.all:
        labels = set(metric.labels)
        if isinstance(metric, Histogram):
            out.update({f"{metric.name}_{end}": (metric.kind, labels) for end in ("sum", "count")})
            out[f"{metric.name}_bucket"] = (metric.kind, labels | {"le"})
        else:
            out[metric.name] = (metric.kind, labels)
    return out


def test_every_query_names_an_existing_metric_and_its_labels():
    metrics = known()
    assert len(targets()) > 40
    for target in targets():
        expr = target["expr"]
        (name,) = set(re.findall(r"\b(?:smg|router|sglang)_\w+", expr))
        assert name in metrics, expr
        kind, labels = metrics[name]
        grouped = {label.strip() for by in re.findall(r"by \(([^)]*)\)", expr) for label in by.split(",")}
        shown = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
        assert grouped <= labels, expr
        assert shown <= (grouped or labels), target
        assert ("rate(" in expr) == (kind != "gauge"), expr
        assert set(re.findall(r"[A-Za-z_]\w*", expr)) <= WORDS | labels | {name}, expr


def test_panels_have_their_own_ids_and_places():
    panels = json.loads(FILE.read_text("utf-8"))["panels"]
    assert len({p["id"] for p in panels}) == len(panels)
    assert len({(p["gridPos"]["x"], p["gridPos"]["y"]) for p in panels}) == len(panels)
    assert all(p["gridPos"]["x"] + p["gridPos"]["w"] <= 24 for p in panels)
