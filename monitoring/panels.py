"""Make Prometheus' page and Grafana's dashboard from one list of panels.

    python panels.py

Writes consoles/servers.html and grafana/servers.json.
"""

import argparse
import json
import re
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
PAGE, DASHBOARD = FOLDER / "consoles" / "servers.html", FOLDER / "grafana" / "servers.json"
RANGE = "1m"  # of rates; at least four scrapes
BY = "sum by (server, version)"


@dataclass
class Panel:
    """One chart. `$name` in a line's legend stands for the label of that name."""

    title: str
    unit: str  # s, percent (of a ratio from 0 to 1), or short
    lines: list[tuple[str, str]]  # PromQL and legend
    help: str  # what to look for
    largest: float | None = None  # of the axis; None: by the values


def quantile(share: str, metric: str, scale: str = "", more: str = "") -> str:
    """Return the PromQL for a quantile of a histogram's last minute, by server and version."""
    matching = f"{{{more}}}" if more else ""
    return (
        f"histogram_quantile({share}, sum by (server, version, le) (rate({metric}_bucket{matching}[{RANGE}]))){scale}"
    )


OURS = "gateway_request_seconds"
TORCHSERVE = "ts_inference_latency_microseconds", "ts_inference_requests_total"
ALL = f"sum by (server) (rate({OURS}_count[{RANGE}]))"
OWN_P99 = [
    (quantile("0.99", "onnx_server_request_latency_seconds"), "$server v$version"),
    (quantile("0.99", ":tensorflow:serving:request_latency", " / 1e6"), "$server v$version"),
    (quantile("0.99", "bentoml_service_request_duration_seconds", more='endpoint="/predict"'), "$server v$version"),
    (f"{BY} (rate({TORCHSERVE[0]}[5m])) / {BY} (rate({TORCHSERVE[1]}[5m])) / 1e6", "$server v$version, mean"),
]
PANELS = [
    Panel(
        "Requests per second", "short",
        [(f'{BY} (rate({OURS}_count{{code!="aborted"}}[{RANGE}]))', "$server v$version")],
        "How the split divides the requests.",
    ),
    Panel(
        "p99 as users see it", "s", [(quantile("0.99", OURS, more='code="2xx"'), "$server v$version")],
        "One clock and the same buckets for all: the servers can be compared here.",
    ),
    Panel(
        "p50 as users see it", "s", [(quantile("0.5", OURS, more='code="2xx"'), "$server v$version")],
        "From the request to the end of its reply, through TLS.",
    ),
    Panel(
        "p99 as the servers report it", "s", OWN_P99,
        "Each has its own clock, buckets and health checks (two predictions a second and replica). BentoML's default "
        "buckets begin at 5 ms, so it cannot show less. TorchServe has only sums: a mean, of REST.",
    ),
    Panel(
        "p50 as the servers report it", "s",
        [(expression.replace("0.99", "0.5"), legend) for expression, legend in OWN_P99[:3]],
        "Compare with p50 as users see it: the difference is the gateway, or too coarse a histogram.",
    ),
    Panel(
        "Failed requests", "percent",
        [
            ("requests:failed:ratio_5m", "$server v$version"),
            ("vector(0.001)", "objective"),
        ],
        "Share of 5xx, over five minutes.",
    ),
    Panel(
        "Answers slower than 50 ms", "percent",
        [
            ("requests:slow:ratio_5m", "$server v$version"),
            ("vector(0.01)", "objective"),
        ],
        "Over five minutes.",
    ),
    Panel(
        "Replicas that answer", "short", [(f'{BY} (up{{job="servers"}})', "$server v$version")],
        "Prometheus asks each for its metrics; the gateway asks each for a prediction.",
    ),
    Panel(
        "Version 2's share of the requests", "percent",
        [
            (
                f'sum by (server) (rate({OURS}_count{{version="2"}}[{RANGE}])) / {ALL} or {ALL} * 0',
                "$server",
            )
        ],
        "The share that gateway.py set, counted behind it.", 1.0,
    ),
    Panel(
        "Rows called benign", "percent",
        [(f'{BY} (rate(gateway_rows_total{{class="benign"}}[5m])) / {BY} (rate(gateway_rows_total[5m]))',
          "$server v$version"), ("vector(0.63)", "test.csv")],
        "The first figure that moves when the patients change.", 1.0,
    ),
    Panel(
        "A feature's fullest tenth", "percent",
        [(
            "max by (feature) (sum by (feature, decile) (rate(gateway_rows_by_decile_total[5m])) / on (feature) "
            "group_left () sum by (feature) (rate(gateway_rows_by_decile_total[5m])))",
            "$feature",
        ), ("vector(0.1)", "train.csv")],
        "Without drift each tenth of train.csv holds a tenth of the rows. To look at, not to alert on.",
    ),
    Panel(
        "Evidence of drift", "percent",
        [("max by (server, version, kind) (drift_progress)", "$server v$version $kind"), ("vector(1)", "alarm")],
        "Logarithmic, from the detectors in collect.py. 100 % is an alarm, which stays until the reset.",
    ),
    Panel(
        "Accuracy", "percent",
        [
            (f"{BY} (increase(gateway_expected_right_total[5m])) / {BY} (increase(gateway_rows_total[5m]))",
             "$server v$version expects"),
            (f'{BY} (increase(gateway_labels_total{{right="yes"}}[5m])) / {BY} (increase(gateway_labels_total[5m]))',
             "$server v$version was right"),
        ],
        "Expected by the model itself, the mean of max(p, 1 - p), and measured once labels come.", 1.0,
    ),
    Panel(
        "Requests that are not in the log", "short",
        [(
            'sum(increase(haproxy_frontend_http_responses_total{proxy="gateway"}[5m])) '
            "- sum(increase(gateway_records_total[5m]))",
            "missing",
        ), ("sum(increase(gateway_log_write_errors_total[5m]))", "not written"),
         ("sum(increase(gateway_unreadable_records_total[5m]))", "unreadable")],
        "HAProxy's count minus the collector's, over five minutes; what is on its way makes it vary around 0.",
    ),
]  # fmt: skip

PAGE_TEMPLATE = FOLDER / "page.html"
SOURCE = {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"}
LEGEND = {"displayMode": "table", "placement": "bottom", "showLegend": True}
UNITS = {"s": "s", "percent": "percentunit", "short": "short"}


def make_page() -> str:
    """Return the page: page.html with the panels in it. ValueError if Prometheus would take it for a template."""
    panels = [{**vars(panel), "lines": [list(line) for line in panel.lines]} for panel in PANELS]
    page = PAGE_TEMPLATE.read_text().replace("PANELS", json.dumps(panels, indent=1))
    if "{{" in page:
        raise ValueError("the page holds {{, which Prometheus would read as a command")
    return page


def make_dashboard() -> str:
    """Return the dashboard for Grafana, which asks for its Prometheus when it is imported."""
    source = {"type": "prometheus", "uid": "${datasource}"}
    panels = []
    for number, panel in enumerate(PANELS):
        defaults = {"unit": UNITS[panel.unit], "min": 0, "custom": {"lineWidth": 2, "fillOpacity": 0}}
        if panel.largest is not None:
            defaults["max"] = panel.largest
        targets = [
            {"refId": chr(ord("A") + i), "expr": expression, "legendFormat": re.sub(r"\$(\w+)", r"{{\1}}", legend),
             "datasource": source}
            for i, (expression, legend) in enumerate(panel.lines)
        ]  # fmt: skip
        panels.append(
            {
                "id": number + 1,
                "type": "timeseries",
                "title": panel.title,
                "description": panel.help,
                "datasource": source,
                "gridPos": {"x": 8 * (number % 3), "y": 8 * (number // 3), "w": 8, "h": 8},
                "fieldConfig": {"defaults": defaults, "overrides": []},
                "options": {
                    "legend": {
                        "displayMode": "table",
                        "placement": "bottom",
                        "calcs": ["lastNotNull"],
                        "showLegend": True,
                    },
                    "tooltip": {"mode": "multi", "sort": "desc"},
                },
                "targets": targets,
            }
        )
    dashboard = {
        "title": "Four servers behind one gateway",
        "uid": "model-serving",
        "schemaVersion": 41,
        "editable": True,
        "refresh": "5s",
        "time": {"from": "now-15m", "to": "now"},
        "timezone": "browser",
        "tags": ["model serving"],
        "templating": {
            "list": [{"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"}]
        },
        "panels": panels,
    }
    return json.dumps(dashboard, indent=1) + "\n"


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for path, content in ((PAGE, make_page()), (DASHBOARD, make_dashboard())):
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
        print(f"wrote {path.relative_to(FOLDER)}: {len(PANELS)} panels")


if __name__ == "__main__":
    main()
