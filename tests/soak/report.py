"""What a soak leaves: a table in Markdown, a plot, the page."""
import collections
import re
import shutil
import subprocess

from traffic import GOOD, STEADY

BUCKETS = 300  # points of a curve
BEGIN, END = "<!-- soak: begin -->\n", "<!-- soak: end -->\n"


def column(account, server, samples, base, last, traffic):
    """The figures of a server: [(row, value)]."""
    name = server.name
    good = [k.__name__ for k in (*GOOD, *STEADY)]
    outcomes = collections.Counter()
    for (s, kind), c in account.outcomes.items():
        if s == name and kind in good:
            outcomes.update(c)
    refused = sum(n for o, n in outcomes.items() if o.startswith("refused"))
    closed = sum(n for o, n in outcomes.items() if o.startswith("closed"))
    all_of = account.total(name)

    def times(what):
        return ", ".join(f"{1000 * t:.0f}" for t in account.quantiles(name, what, 0.5, 0.99, 1)) + \
            " ms"

    held = max(samples.rows, key=lambda r: r[1])
    growth = "too short to say" if server.growth is None else f"{server.growth:.0f} KiB an hour"
    faults = [w for w in account.windows if w[1] == name]
    return [
        ("good requests", f"{sum(outcomes.values()):,}"),
        ("answered with the bits of ./qemb", f"{outcomes['right']:,}"),
        ("refused with 429 or 503 and Retry-After", f"{refused:,}"),
        ("closed for want of memory or of a connection", f"{closed:,}"),
        ("hostile requests and held connections", f"{all_of - sum(outcomes.values()):,}"),
        ("faults injected", f"{len(faults)}"),
        ("lost, leaked or hung", f"{account.total(name, outcome='LOST'):,}"),
        ("good requests without a fault: P50, P99, worst", times("calm good")),
        ("good requests, all: P50, P99, worst", times("good")),
        ("/health and /metrics without a fault: P50, P99, worst", times("calm health")),
        ("/health and /metrics, all: P50, P99, worst", times("health")),
        ("anonymous memory: start, most, end",
         ", ".join(f"{r[1] / 1024:.0f}" for r in (base, held, last or base)) + " MiB"),
        ("growth once the caches are full", growth),
        ("descriptors: start, most, end",
         f"{base[2]}, {max(r[2] for r in samples.rows)}, {last[2] if last else '-'}"),
        ("threads: start, most, end",
         f"{base[4]}, {max(r[4] for r in samples.rows)}, {last[4] if last else '-'}"),
        ("seconds from SIGTERM to the end",
         "-" if server.seconds_to_end is None else f"{server.seconds_to_end:.1f}"),
    ]


def table(account, servers, samples, bases, ends, traffic):
    columns = [column(account, s, own, base, last, traffic)
               for s, own, base, last in zip(servers, samples, bases, ends)]
    lines = ["| | small model, reranker, keys, Redis | demo model |", "|---|---|---|"]
    lines += [f"| {row[0][0]} | {' | '.join(value for _, value in row)} |"
              for row in zip(*columns)]
    runs = account.total("pipe")
    lines += ["", f"The pipe ran {runs} times in these {traffic:.0f} s, with bad lines, stopped "
              f"and continued, and onto a full disk: {account.total('pipe', outcome='LOST')} lost."]
    counted = collections.Counter(w[0].replace("_", " ") for w in account.windows)
    lines += ["", "Faults: " + ", ".join(f"{f} {n}" for f, n in sorted(counted.items())) + "."]
    return "\n".join(lines) + "\n"


def latencies(account, server, traffic):
    """(second, good requests a second, P50, P99 in ms) by bucket; NaN: none was answered."""
    step = max(1, traffic / BUCKETS)
    buckets = collections.defaultdict(list)
    for at, seconds in account.times[server, "good"]:
        buckets[int(at / step)].append(seconds)
    for i in range(int(traffic / step)):
        times = sorted(buckets[i]) or [float("nan")]
        yield (i + 0.5) * step, len(buckets[i]) / step, 1000 * times[len(times) // 2], \
            1000 * times[int(0.99 * (len(times) - 1))]


def thin(rows):
    """The rows with the most descriptors of each bucket, so that no peak is lost."""
    size = max(1, len(rows) // BUCKETS)
    return [max(rows[i:i + size], key=lambda r: r[2]) for i in range(0, len(rows), size)]


def plot(out, account, servers, samples, traffic):
    if not shutil.which("gnuplot"):
        print("no plot: gnuplot is not there (apt-get install gnuplot-nox)")
        return
    for s, own in zip(servers, samples):
        (out / f"{s.name}.samples").write_text(
            "".join(f"{r[0]:.1f} {r[1] / 1024:.1f} {r[2]} {r[3]} {r[4]}\n" for r in thin(own.rows)))
        (out / f"{s.name}.times").write_text(
            "".join("%.1f %.1f %.2f %.2f\n" % r for r in latencies(account, s.name, traffic)))
    (out / "faults").write_text("".join(f"{w[2]:.1f} 1\n" for w in account.windows) or "0 0\n")

    def curves(kind, columns):
        return f"plot '{out}/faults' axes x1y2 with impulses lc 'gray90' notitle, " + ", ".join(
            f"'{out / s.name}.{kind}' using 1:{i} with lines lt {n} title '{s.name}: {title}'"
            for n, (s, i, title) in enumerate(((s, *c) for s in servers for c in columns), 1))

    script = f"""set terminal svg size 900,1000 background rgb "white"; set output "{out}/soak.svg"
set multiplot layout 4,1; set grid y; set key outside right top; set xrange [0:{traffic:.0f}]
set lmargin 10; set rmargin 32; set y2range [0:1]; set ytics nomirror
set ylabel "MiB"; set yrange [0:*]; {curves("samples", [(2, "anonymous memory")])}
set ylabel "number"; {curves("samples", [(3, "descriptors"), (5, "threads")])}
set ylabel "good requests/s"; {curves("times", [(2, "answered")])}
set ylabel "ms"; set logscale y; set yrange [*:*]; set xlabel "s; grey: a fault begins"
{curves("times", [(3, "P50"), (4, "P99")])}
unset multiplot
"""
    subprocess.run(["gnuplot"], input=script.encode(), check=True)


def publish(root, out, result):
    """The table, the plot and the result where the repository keeps them."""
    page = root / "docs" / "reliability.md"
    m = result["machine"]
    text = (f"{result['seconds']} s on {m['cpu']}, {m['cpus']} CPUs, {m['date'][:10]}, commit "
            f"{m['commit']}; `make soak SOAK_S={result['seconds']}`. The numbers of each kind of "
            "request are in [soak.json](../bench/results/soak.json).\n\n" + result["table"] +
            "\n![Memory, descriptors, requests and times of both servers](soak.svg)\n")
    old = page.read_text()
    assert BEGIN in old and END in old, f"{page}: no place for the table"
    page.write_text(re.sub(f"(?s){BEGIN}.*{END}", lambda _: BEGIN + text + END, old))
    shutil.copy(out / "soak.svg", root / "docs" / "soak.svg")
    shutil.copy(out / "soak.json", root / "bench" / "results" / "soak.json")
