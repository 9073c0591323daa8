#!/usr/bin/env python3
"""Tables for docs/gpu.md out of what tests/cuda/gpu_day.py wrote.

    gpu_table.py RESULTS...     files NAME.jsonl, or the folders that hold them; prints Markdown

Every step that was not ok is listed with its reason. A step that ran twice counts as it ran last.
"""

import json
import sys
from pathlib import Path


def read(paths):
    rows = {}
    for path in paths:
        for log in sorted(path.glob("*.jsonl")) if path.is_dir() else [path]:
            for line in log.read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                rows[row["phase"], row["step"]] = row
    return list(rows.values())


def table(title, head, lines):
    lines = [[str(c) for c in line] for line in lines]
    if not lines:
        return ""
    rows = [head, ["---"] * len(head), *lines]
    return f"\n### {title}\n" + "".join(f"| {' | '.join(r)} |\n" for r in rows)


def number(x, digits=0):
    return f"{x:,.{digits}f}"


def machine(rows):
    for r in reversed(rows):
        if r["step"] == "machine":
            names = ("name", "driver_version", "memory.total", "clocks.max.sm", "clocks.max.memory",
                     "power.limit")
            return (", ".join(r[n] for n in names if r.get(n))
                    + f"; {r['cores']} cores, commit {r['commit']}, {r['date']} UTC\n")
    return "no machine\n"


def checks(rows):
    lines = [(r["step"], r["result"], r.get("ended", ""), r.get("seconds", "")) for r in rows
             if r["step"].startswith(("test ", "program", "server", "graphs", "memcheck",
                                      "racecheck", "synccheck"))]
    return table("Tests", ["step", "result", "tests", "seconds"], lines)


def reason(r):
    parts = [f"{t}: {why}" for t, why in r.get("stopped", {}).items()]
    parts += [f"{t}: failed" for t in r.get("failed", ())]
    if r.get("not_run"):
        parts.append(f"not run: {', '.join(r['not_run'])}")
    if not parts:
        parts = [r.get("last") or (r.get("output", "").strip().splitlines() or [""])[-1]]
    return "; ".join(parts)[:300].replace("|", "/")


def problems(rows):
    bad = [r for r in rows if r["result"] != "ok"]
    return table("Not ok", ["step", "result", "why"],
                 [(r["step"], r["result"], reason(r)) for r in bad])


def throughput(rows):
    out = ""
    measured = [r for r in rows if r["result"] == "ok" and "variant" in r]
    peers = {r["step"].split()[-1]: {x["tokens"]: x["tokens_s"] for x in r["rates"]}
             for r in rows if r["result"] == "ok" and "rates" in r}
    for model in dict.fromkeys(r["model"] for r in measured):
        own = [r for r in measured if r["model"] == model]
        kinds = list(dict.fromkeys(r["variant"] for r in own))
        cells = {(r["tokens"], r["variant"]): r["tokens_s"] for r in own}
        if model in peers:
            kinds.append("transformers")
            cells |= {(n, "transformers"): rate for n, rate in peers[model].items()}
        lines = [[n, *(number(cells[n, k]) if (n, k) in cells else "" for k in kinds)]
                 for n in sorted({n for n, _ in cells})]
        out += table(f"{model}: tokens/s", ["tokens a text", *kinds], lines)
    return out


def latency(rows):
    lines = [(r["step"], r["median_ms"], r["p99_ms"]) for r in rows if "median_ms" in r]
    return table("One text at a time", ["step", "median, ms", "99th percentile, ms"], lines)


def accuracy(rows):
    lines = [(r["step"], number(r["least_cosine"], 6), number(r["largest_error"], 5))
             for r in rows if "least_cosine" in r]
    return table("Accuracy", ["step", "least cosine", "largest error"], lines)


def kernels(rows):
    out = ""
    steps = {r["step"]: r for r in rows if "kernels" in r}  # the last of each arithmetic
    for step, r in steps.items():
        lines = [(k["op"], k["sizes"], number(k["us"], 1),
                  f"{number(k['tflop_s'], 1)} TFLOP/s" if k["tflop_s"]
                  else f"{number(k['gb_s'], 1)} GB/s") for k in r["kernels"]]
        out += table(step.capitalize(), ["op", "sizes", "us", "rate"], lines)
    return out


def main(paths):
    rows = read([Path(p) for p in paths])
    if not rows:
        print("usage: gpu_table.py RESULTS...", file=sys.stderr)
        return 1
    print(machine(rows) + "".join(part(rows) for part in (
        checks, problems, throughput, latency, accuracy, kernels)), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
