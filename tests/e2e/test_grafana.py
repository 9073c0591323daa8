"""packaging/grafana/qemb.json: its expressions name what /metrics of a running server has.

Prometheus itself runs them in tests/world/test_clients.py."""
import json
import re

import pytest
from prometheus_client.parser import text_string_to_metric_families
from serve_client import OK, ROOT, server
from test_serve_rerank import ASK, RERANKER

DASHBOARD = json.loads((ROOT / "packaging" / "grafana" / "qemb.json").read_text())
PANELS = [p for p in DASHBOARD["panels"] if p["type"] != "row"]
TARGETS = [(p["title"], t) for p in PANELS for t in p["targets"]]
SCRAPED = {"job", "instance"}  # labels that Prometheus adds to every sample
SUFFIXES = {"histogram": ("_bucket", "_sum", "_count"), "counter": ("_total",), "gauge": ("",)}
FUNCTIONS = {"sum", "min", "avg", "rate", "histogram_quantile"}
TOKEN = re.compile(
    r"""\s*(?: (?P<string>"(?:[^"\\]|\\.)*")
             | (?P<range>\[\$__rate_interval\])
             | (?P<word>[a-zA-Z_:][a-zA-Z0-9_:]*)
             | (?P<number>[0-9]+(?:\.[0-9]+)?)
             | (?P<sign>=~|!~|!=|[-+*/(){},=]))""",
    re.VERBOSE,
)


def tokens_of(expression):
    """Returns the (kind, text) of an expression's tokens. Anything else is an error."""
    tokens, at = [], 0
    while at < len(expression):
        found = TOKEN.match(expression, at)
        assert found, f"{expression}: not PromQL at {at}"
        tokens.append((found.lastgroup, found.group(found.lastgroup)))
        at = found.end()
    return tokens


class Expression:
    """The metrics and labels that an expression names; rated, quantiles: the metrics inside of
    rate() and histogram_quantile()."""

    def __init__(self, text):
        self.metrics, self.labels, self.rated, self.quantiles = [], set(), [], []
        tokens = tokens_of(text)
        opened, braces = [], False
        for i, (kind, token) in enumerate(tokens):
            before = tokens[i - 1][1] if i else ""
            after = tokens[i + 1][1] if i + 1 < len(tokens) else ""
            if token == "(":
                opened.append(before)
            elif token == ")":
                assert opened, f"{text}: a bracket too many"
                opened.pop()
            elif token in "{}":
                assert braces == (token == "}"), f"{text}: braces"
                braces = not braces
            elif kind == "word" and braces:
                assert after in ("=", "=~", "!=", "!~"), f"{text}: {token} is not matched"
                self.labels.add(token)
            elif kind == "word" and opened and opened[-1] == "by":
                self.labels.add(token)
            elif kind == "word" and token != "by" and token not in FUNCTIONS:
                self.metrics.append(token)
                if "rate" in opened:
                    self.rated.append(token)
                if "histogram_quantile" in opened:
                    self.quantiles.append(token)
        assert not opened and not braces, f"{text}: a bracket is open"


@pytest.fixture(scope="module")
def families():
    """{name as in an expression: (kind, its samples)} of a server that has answered requests."""
    with server("--reranker", RERANKER) as s:
        s.wait_log("ready", 2)
        assert s.post(OK).status == 200
        assert s.post(ASK, "/v1/rerank").status == 200
        text = s.request("GET", "/metrics").body.decode()
    known = {}
    for f in text_string_to_metric_families(text):
        for suffix in SUFFIXES[f.type]:
            samples = [x for x in f.samples if x.name == f.name + suffix]
            assert samples, f.name + suffix
            known[f.name + suffix] = (f.type, samples)
    return known


@pytest.mark.parametrize("title, target", TARGETS)
def test_an_expression_names_metrics_and_labels_that_the_server_has(families, title, target):
    e = Expression(target["expr"])
    assert e.metrics
    for name in e.metrics:
        assert name in families, f"{title}: no metric {name}"
        kind, _ = families[name]
        assert (kind != "gauge") == (name in e.rated) or target.get("instant"), f"{title}: {name}"
        assert (name in e.quantiles) == name.endswith("_bucket"), f"{title}: {name}"
        if name in e.quantiles:
            assert "le" in e.labels, f"{title}: quantiles need the buckets' bounds"
    labels = {k for name in e.metrics for x in families[name][1] for k in x.labels} | SCRAPED
    shown = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
    assert e.labels | shown <= labels, f"{title}: {sorted((e.labels | shown) - labels)}"


def test_every_panel_says_what_it_shows():
    ids = [p["id"] for p in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    titles = [p["title"] for p in PANELS]
    assert len(set(titles)) == len(titles)
    for p in PANELS:
        assert p["title"] and p["description"].endswith("."), p["title"]
        assert p["fieldConfig"]["defaults"]["unit"], p["title"]
        refs = [t["refId"] for t in p["targets"]]
        legends = [t["legendFormat"] for t in p["targets"]]
        assert refs and len(set(refs)) == len(refs), p["title"]
        assert all(legends) and len(set(legends)) == len(legends), p["title"]


def test_panels_do_not_overlap():
    taken = {}
    for p in DASHBOARD["panels"]:
        g = p["gridPos"]
        assert g["x"] + g["w"] <= 24, p["title"]
        for cell in ((x, y) for x in range(g["x"], g["x"] + g["w"])
                     for y in range(g["y"], g["y"] + g["h"])):
            assert cell not in taken, f"{p['title']} lies on {taken[cell]}"
            taken[cell] = p["title"]


def test_the_data_source_and_the_servers_are_the_readers_choice(families):
    variables = {v["name"]: v for v in DASHBOARD["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    source = {"type": "prometheus", "uid": "${datasource}"}
    for p in PANELS:
        assert p["datasource"] == source, p["title"]
        for t in p["targets"]:
            assert t["datasource"] == source, p["title"]
            assert t["expr"].count('job=~"$job", instance=~"$instance"') == \
                len(Expression(t["expr"]).metrics), p["title"]
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(DASHBOARD)))
    assert used - {"__rate_interval", "__all"} == set(variables)
    for name in ("job", "instance"):
        metric, label = re.fullmatch(r"label_values\((\w+)(?:\{.*\})?, (\w+)\)",
                                     variables[name]["query"]["query"]).groups()
        assert metric in families and label == name
