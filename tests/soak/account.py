"""The account of a soak: what was sent, what may come back, what came; how long it took; what the
processes held meanwhile."""
import collections
import os
import re
import statistics
import threading
import time

KEPT = 200  # losses that are told in full


class Loss(Exception):
    """An answer that is not allowed, or none."""

    def __init__(self, want, got):
        super().__init__(f"want {want}, got {str(got)[:400]}")


class Account:
    """Counts outcomes by server and kind. All threads share one."""

    def __init__(self):
        self.lock, self.start = threading.Lock(), time.monotonic()
        self.outcomes = collections.defaultdict(collections.Counter)  # (server, kind) -> outcomes
        # (server, "good" or "health") -> (end, seconds); also "calm good": no fault at that time
        self.times = collections.defaultdict(list)
        self.losses, self.n_losses = [], 0
        self.windows = []  # [fault, server or None, start, end or None]

    def now(self):
        return time.monotonic() - self.start

    def add(self, server, kind, outcome, timed=None, seconds=0.0, calm=False):
        with self.lock:
            self.outcomes[server, kind][outcome] += 1
            for what in ([timed] if timed else []) + ([f"calm {timed}"] if timed and calm else []):
                self.times[server, what].append((self.now(), seconds))

    def lose(self, server, kind, error, sent=b""):
        with self.lock:
            self.outcomes[server, kind]["LOST"] += 1
            self.n_losses += 1
            if len(self.losses) < KEPT:
                self.losses.append({"second": round(self.now(), 1), "server": server,
                                    "kind": kind, "what": str(error), "sent": repr(sent[:300]),
                                    "faults": self.active(server)})

    # ---- faults ----

    def opens(self, fault, server):
        with self.lock:
            self.windows.append([fault, server, self.now(), None])
            return self.windows[-1]

    def closes(self, window):
        window[3] = self.now()

    def active(self, server, since=None):
        """The faults of that server, or of all, that were on at any time since then."""
        now = self.now()
        since = now if since is None else since
        last = self.windows[-100:]  # of more than any request takes; every request asks
        return sorted({w[0] for w in last
                       if w[1] in (None, server) and (w[3] or now) >= since - 1})

    # ---- sums ----

    def total(self, server, names=None, outcome=None):
        return sum(n for (s, kind), c in self.outcomes.items() if s == server
                   and (names is None or kind in names)
                   for o, n in c.items() if outcome is None or o.startswith(outcome))

    def quantiles(self, server, what, *shares):
        times = sorted(s for _, s in self.times[server, what])
        return [times[min(len(times) - 1, int(p * len(times)))] if times else 0 for p in shares]


class Samples:
    """What a process holds, once a second."""

    FIELDS = ("second", "memory_kib", "descriptors", "sockets", "threads")

    def __init__(self, account, process):
        self.account, self.process, self.rows = account, process, []

    def take(self):
        folder = f"/proc/{self.process.pid}"
        try:
            status = open(f"{folder}/status").read()
            links = []
            for n in os.listdir(f"{folder}/fd"):
                try:
                    links.append(os.readlink(f"{folder}/fd/{n}"))
                except OSError:
                    pass  # closed in between
            # Anonymous memory: pages of the model file come and go as the kernel likes.
            memory = int(re.search(r"RssAnon:\s+(\d+)", status)[1])
            threads = int(re.search(r"Threads:\s+(\d+)", status)[1])
        except (OSError, TypeError):
            return None  # it has ended
        row = (self.account.now(), memory, len(links),
               sum(link.startswith("socket:") for link in links), threads)
        self.rows.append(row)
        return row

    def growth(self, until, seconds=10):
        """KiB an hour: the median slope of the memory's minima of ten seconds each, after the
        caches are full and the allocator has seen most of what comes (Theil and Sen: a burst does
        not bend it). None: too short to say."""
        first = max(300, until / 5)
        lows = {}
        for second, memory, *_ in self.rows:
            if first <= second <= until:
                at = int(second / seconds)
                lows[at] = min(memory, lows.get(at, memory))
        points = sorted(lows.items())
        if until < 600 or len(points) < 12:
            return None
        slopes = [(b[1] - a[1]) / (b[0] - a[0])
                  for i, a in enumerate(points) for b in points[i + 1:]]
        return statistics.median(slopes) * 3600 / seconds
