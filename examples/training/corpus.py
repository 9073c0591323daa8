#!/usr/bin/env python3
"""Texts to train a small model: Debian's descriptions of packages, dictionaries, GNOME Help.

Writes, into a work directory:
  pairs.jsonl    training pairs: a short text and an English text of the same meaning; some rows
                 have the first text alone
  dev.jsonl      pairs of another 2 % of the sources, to measure progress; not trained on
With --held-out it also writes documents.tsv and queries.tsv from the sources kept out of training.

A source package is held out as a whole: with all its binary packages, translations and AppStream
entries. Needs PyYAML and dpkg-deb.
"""
import argparse
import bz2
import gzip
import hashlib
import json
import lzma
import random
import re
import subprocess
import urllib.request
from collections import Counter, defaultdict
from pathlib import Path

import texts
import yaml
from texts import tidy

ROOT = Path(__file__).resolve().parents[2]
RETRIEVAL = ROOT / "tests/retrieval"
MIRROR = "http://deb.debian.org/debian"
SUITE = f"{MIRROR}/dists/trixie/main"
LANGUAGES = ("de", "fr", "ja")
# Debian 13.8. A later point release replaces the lists, and then a run says which ones differ. A
# .deb of another content is refused.
FILES = {
    f"{SUITE}/binary-amd64/Packages.xz":
        "be3d7d96a040eda0505c1808cccc67f183bbc05dff0842c50f88e6c396557412",
    f"{SUITE}/i18n/Translation-en.xz":
        "7a04715253cc2eb0165da58a5339722ccf8be41bc08b1a41f1e6b2704a66cb7a",
    f"{SUITE}/i18n/Translation-de.bz2":
        "d770db8a3e9d99169f2e0d78f72742431c7cb359064f782c787463bd6f1b1a58",
    f"{SUITE}/i18n/Translation-fr.bz2":
        "5c5a848f00107ae7df02f419b31499274761df03dbb49fc99574ed150adfd07f",
    f"{SUITE}/i18n/Translation-ja.bz2":
        "7245fa81813f8e6837e1d5c2fecaff9c55f3ea3ccf0d903da85d7ddb456f6bfe",
    f"{SUITE}/dep11/Components-amd64.yml.gz":
        "782b0a6b58526790764605aabf84356d1cfa7fda562d1b154ccb8998da73a9a2",
    f"{MIRROR}/pool/main/w/wordnet/wordnet-base_3.0-39_all.deb":
        "f4f96d4d5d19061916c66cbb889a0119e6a46f9655051f5fd42b7317e46ce4db",
    f"{MIRROR}/pool/main/f/freedict/dict-freedict-deu-eng_2022.04.21-1_all.deb":
        "52fa2ba6c73ebe84df0e4a7b8612a94a45e6026a157fc75f5ae36c4a1106e3db",
    f"{MIRROR}/pool/main/f/freedict/dict-freedict-fra-eng_2022.04.21-1_all.deb":
        "fb853d1f3da00ddddfe60dc3b88b5aaca122eecf3ba5c219131bea479d6274db",
    f"{MIRROR}/pool/main/f/freedict/dict-freedict-jpn-eng_2022.04.21-1_all.deb":
        "29feef8cb0e4e01efeb3524173709395ac528ad1d1c6622f7dddff7fef7e54ed",
    f"{MIRROR}/pool/main/g/gnome-user-docs/gnome-user-docs_48.2-1_all.deb":
        "94202c324aa65e87820ed0cec8872c1bbe81cfd6f238b8d62ce55a79d8cb6b82",
}
LONGEST = 300  # characters of a description that are used
# Sections with thousands of similar packages. Training uses a third of those without AppStream
# texts.
CROWDED = {"libdevel", "rust", "golang", "haskell", "perl", "ruby", "javascript", "doc", "ocaml",
           "oldlibs", "localization", "fonts", "java", "libs", "python"}
STOP = set("the and for with from your you that are can this which its into any all but not use "
           "used using".split())
PHRASES, MADE_UP, FREEDICT = 40000, 100000, 40000  # rows; FREEDICT is per language
KEPT = {"de": 1, "fr": 1 / 3, "ja": 1}  # share of the translated paragraphs


def fetch(folder):
    """Downloads what is missing. -> file name -> path"""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for url, want in FILES.items():
        path = paths[url.rsplit("/", 1)[1]] = folder / url.rsplit("/", 1)[1]
        if not path.exists():
            part = path.with_name(path.name + ".part")
            with urllib.request.urlopen(url, timeout=60) as answer:
                part.write_bytes(answer.read())
            part.rename(path)
        got = hashlib.sha256(path.read_bytes()).hexdigest()
        if got != want:
            message = f"corpus: {path.name}: SHA-256 (got {got[:12]}, want {want[:12]})"
            if path.suffix == ".deb":
                raise SystemExit(message)
            print(message + ": a later point release; the model will differ")
    return paths


def stanzas(path):
    """The stanzas of a Debian control file, as dictionaries; long values keep their newlines."""
    opener = {".xz": lzma.open, ".bz2": bz2.open}[path.suffix]
    with opener(path, "rt", encoding="utf-8") as f:
        for block in f.read().split("\n\n"):
            fields, name = {}, ""
            for line in block.split("\n"):
                if not line:
                    continue
                if line[:1] in " \t":
                    fields[name] += "\n" + line[1:]
                else:
                    name, _, value = line.partition(":")
                    fields[name] = value.strip()
            if fields:
                yield fields


def first_sentences(description, limit=LONGEST):
    """The first paragraph of a long description, cut at a sentence's end within limit."""
    text = tidy(description.split("\n.\n")[0])
    if len(text) <= limit:
        return text
    ends = [m.end() for m in re.finditer(r"[.!?](?=\s|$)|。", text[:limit])]
    return text[: ends[-1]].strip() if ends else text[:limit].rsplit(" ", 1)[0]


class Package:
    def __init__(self, fields, synopsis, description):
        self.name = fields["Package"]
        self.source = fields.get("Source", self.name).split(" ")[0]
        self.synopsis, self.description = synopsis, description
        self.program = "role::program" in fields.get("Tag", "")
        self.section = fields.get("Section", "")
        self.translated = {}  # language -> (synopsis, description)
        self.summaries = {}  # language -> AppStream's summary
        self.keywords = ""

    def line(self):
        return f"{self.name} - {self.synopsis}"


def split_translation(fields, language):
    synopsis, _, rest = fields.get(f"Description-{language}", "").partition("\n")
    return tidy(synopsis), first_sentences(rest)


def read_packages(paths):
    """name -> Package, with its translations and AppStream texts."""
    long_texts = {}
    for fields in stanzas(paths["Translation-en.xz"]):
        long_texts[fields["Description-md5"]] = split_translation(fields, "en")
    packages, by_digest = {}, defaultdict(list)
    for fields in stanzas(paths["Packages.xz"]):
        digest = fields.get("Description-md5", "")
        synopsis, description = long_texts.get(digest, (tidy(fields.get("Description", "")), ""))
        if re.search(r"transitional|dummy package|debug symbols", synopsis, re.I):
            continue
        p = packages[fields["Package"]] = Package(fields, synopsis, description)
        by_digest[digest].append(p)
    for language in LANGUAGES:
        for fields in stanzas(paths[f"Translation-{language}.bz2"]):
            for p in by_digest.get(fields["Description-md5"], []):
                p.translated[language] = split_translation(fields, language)
    add_appstream(packages, paths["Components-amd64.yml.gz"])
    return packages


def add_appstream(packages, path):
    with gzip.open(path, "rt", encoding="utf-8") as f:
        for block in f.read().split("\n---\n"):
            # Icons, screenshots and releases are long and of no use here.
            kept = re.search(r"(?ms)^Type: .*?(?=^(?:Categories|Icon|Screenshots|Releases):|\Z)",
                             block)
            found = yaml.load(kept.group(0), yaml.CSafeLoader) if kept else None
            p = packages.get((found or {}).get("Package"))
            if not p or "Summary" not in found or p.summaries:
                continue
            summaries = {k[:2].replace("C", "en"): tidy(str(v)) for k, v in
                         found["Summary"].items() if k in ("C", "en", "de", "fr", "ja", "ja-JP")}
            p.summaries = {k: v for k, v in summaries.items() if len(v) > 8}
            keywords = re.search(r"(?m)^Keywords:\n  C:\n((?:  - .*\n)+)", block)
            if keywords:
                p.keywords = ", ".join(w[4:].strip("'\"") for w in
                                       keywords.group(1).splitlines()[:8])


def share_of(source):
    """A number in [0, 1) that depends on the source's name alone."""
    return int.from_bytes(hashlib.sha256(source.encode()).digest()[:4], "big") / 2**32


def held_out(packages, demo_names):
    """The sources kept out of training: those of the demo's packages, 5 % of all, and 25 % of those
    with AppStream texts. The latter are few, and they are the paraphrases."""
    missing = [n for n in demo_names if n not in packages]
    if missing:
        raise SystemExit(f"corpus: not in Debian's lists: {', '.join(missing)}")
    with_summary = {p.source for p in packages.values() if p.summaries}
    out = {packages[n].source for n in demo_names}
    for source in {p.source for p in packages.values()}:
        if share_of(source) < (0.25 if source in with_summary else 0.05):
            out.add(source)
    return out


def words(text):
    return re.findall(r"\w+", text.lower())


# ---- training pairs ----------------------------------------------------------------------------


def package_pairs(p, rng):
    """Rows [kind, language, a, b, English of a]; a and b mean the same. Without b, a learns from
    the teacher alone."""
    pairs = []
    if len(p.description) > 30:
        pairs.append(["synopsis", "en", p.synopsis, p.description, p.synopsis])
    for language, (synopsis, description) in p.translated.items():
        if synopsis and synopsis != p.synopsis:
            b = rng.choice((p.line(), p.description))
            pairs.append(["translation", language, synopsis, b or p.line(), p.synopsis])
        if len(description) > 30 and description != p.description and rng.random() < KEPT[language]:
            pairs.append(["paragraph", language, description, "", p.description])
    for language, summary in p.summaries.items() if "en" in p.summaries else ():
        for b in (p.line(), p.description):
            if len(b) > 30:
                pairs.append(["summary", language, summary, b, p.summaries["en"]])
    if p.keywords:
        pairs.append(["keywords", "en", p.keywords, p.line(), p.keywords])
    return pairs


def phrases(descriptions, n, rng):
    """Random pieces of 2 to 8 words, within a sentence."""
    found = set()
    while len(found) < n:
        sentence = rng.choice(re.split(r"[.:;()]", rng.choice(descriptions))).split()
        length = rng.randint(2, 8)
        if len(sentence) >= length:
            at = rng.randint(0, len(sentence) - length)
            found.add(" ".join(sentence[at : at + length]).strip(", "))
    return sorted(found)


def key(text):
    """The words of a text: equal for texts that differ in case and punctuation alone."""
    return " ".join(words(text))


def keys_of(packages):
    """The keys of synopses, descriptions, summaries and translations, without the empty key."""
    return {key(t) for p in packages
            for t in (p.synopsis, p.description, *p.summaries.values(),
                      *(s for pair in p.translated.values() for s in pair))} - {""}


def write_pairs(path, pairs):
    with open(path, "w", encoding="utf-8") as f:
        for pair in pairs:
            f.write(json.dumps(pair, ensure_ascii=False) + "\n")
    print(f"corpus: {path.name}", dict(Counter((kind, language) for kind, language, *_ in pairs)))


def unlike(pairs, banned):
    """The pairs of which no text (a, b, English of a) has a banned key, each pair once."""
    kept = {}
    for pair in pairs:
        if banned.isdisjoint(map(key, pair[2:])):
            kept.setdefault((pair[2], pair[3]), pair)
    return list(kept.values())


def needs():
    """The queries of tests/retrieval/needs*.tsv."""
    return [line.split("\t")[0] for path in sorted(RETRIEVAL.glob("needs*.tsv"))
            for line in path.read_text(encoding="utf-8").splitlines()]


def general_rows(shared, counts, rng):
    """General English and other languages, beside packages. shared: /usr/share of the unpacked
    packages."""
    rows, by_part = texts.wordnet(shared / "wordnet", counts)
    known = {w for used, _ in by_part.values() for w in used}
    known |= {w for w, n in counts.items() if n > 9}
    for language, code in (("de", "deu"), ("fr", "fra"), ("ja", "jpn")):
        found = texts.freedict(shared / f"dictd/freedict-{code}-eng.dict.dz", language, known)
        rows += rng.sample(found, min(FREEDICT, len(found)))
    rows += texts.gnome_help(shared / "help", LANGUAGES, 200)
    return rows + [["made up", "en", t, "", t] for t in texts.made_up_needs(by_part, MADE_UP, rng)]


def write_training(folder, packages, out, shared, rng):
    """dev.jsonl has no text of a held-out source, pairs.jsonl none of a held-out or dev source."""
    banned = keys_of(p for p in packages.values() if p.source in out) | {key(t) for t in needs()}
    known = [p for p in packages.values()
             if p.source not in out and key(p.synopsis) not in banned]
    dev = [p for p in known if share_of(p.source) > 0.98]
    train = [p for p in known if share_of(p.source) <= 0.98]
    write_pairs(folder / "dev.jsonl",
                unlike([pair for p in dev for pair in package_pairs(p, rng)], banned))
    banned |= keys_of(dev)
    descriptions = sorted({p.description for p in train
                           if len(p.description) > 60 and key(p.description) not in banned})
    counts = Counter(w for d in descriptions for w in set(re.findall(r"[a-z]{2,}", d.lower())))
    train = [p for p in train if p.section not in CROWDED or p.summaries or rng.random() < 1 / 3]
    pairs = [pair for p in train if key(p.synopsis) not in banned for pair in package_pairs(p, rng)]
    pairs += [["phrase", "en", t, "", t] for t in phrases(descriptions, PHRASES, rng)]
    pairs = unlike(pairs + general_rows(shared, counts, rng), banned)
    rng.shuffle(pairs)
    write_pairs(folder / "pairs.jsonl", pairs)


# ---- the held-out texts ------------------------------------------------------------------------


def copied(summary, p):
    """Whether a summary stands in the package's own texts, or the other way round."""
    s, own = key(summary), [key(t) for t in (p.synopsis, p.description)]
    return any(s in t or (t and t in s) for t in own)


def stems(text):
    """The first five letters of the words that mean something, roughly."""
    return {w[:5] for w in words(text) if len(w) > 2 and w not in STOP}


def write_held_out(folder, packages, out, rng):
    """documents.tsv: id, description. queries.tsv: set, accepted ids, query."""
    queries, taken = [], set()
    by_source = defaultdict(list)
    for p in packages.values():
        if p.source in out and len(p.description) > 60 and p.description not in taken:
            taken.add(p.description)
            by_source[p.source].append(p)
    # One binary package a source: its siblings say the same.
    chosen = sorted((min(group, key=lambda p: (not p.summaries, not p.program, len(p.name)))
                     for group in by_source.values()), key=lambda p: p.name)
    with_summary = [p for p in chosen if p.summaries]
    others = [p for p in chosen if not p.summaries]
    chosen = sorted(with_summary + rng.sample(others, max(0, 1500 - len(with_summary))),
                    key=lambda p: p.name)
    documents = [(p.name, p.description) for p in chosen]
    for p in chosen:
        if "en" in p.summaries and not copied(p.summaries["en"], p):
            queries.append(("summary", p.name, p.summaries["en"]))
    for name, n, of in (("synopsis", 500, lambda p: p.synopsis),
                        ("german", 300, lambda p: p.translated.get("de", ("",))[0]),
                        ("french", 300, lambda p: p.translated.get("fr", ("",))[0]),
                        ("japanese", 300, lambda p: p.translated.get("ja", ("",))[0])):
        having = [p for p in chosen if of(p) and (name == "synopsis" or of(p) != p.synopsis)]
        for p in sorted(rng.sample(having, min(n, len(having))), key=lambda p: p.name):
            queries.append((name, p.name, of(p)))
    for p in chosen:
        for text in (p.summaries.get("en", ""), p.synopsis):
            if text and not stems(text) & stems(f"{p.name} {p.description}"):
                queries.append(("paraphrase", p.name, text))
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("documents", documents), ("queries", queries)):
        (folder / f"{name}.tsv").write_text("".join("\t".join(r) + "\n" for r in rows),
                                            encoding="utf-8")
    print("corpus: held out", len(documents), "documents,", dict(Counter(q[0] for q in queries)))


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("work", type=Path, help="directory for downloads and results")
    p.add_argument("--held-out", type=Path, metavar="DIR",
                   help="write documents.tsv and queries.tsv there")
    a = p.parse_args()
    paths = fetch(a.work / "debian")
    for path in paths.values():
        if path.suffix == ".deb":
            subprocess.run(["dpkg-deb", "-x", path, a.work / "debian/files"], check=True)
    packages = read_packages(paths)
    demo = [line.split(" - ")[0] for line in
            (ROOT / "examples/packages.txt").read_text(encoding="utf-8").splitlines()]
    out = held_out(packages, demo)
    print(f"corpus: {len(packages)} packages, {len(out)} of "
          f"{len({p.source for p in packages.values()})} sources held out")
    write_training(a.work, packages, out, a.work / "debian/files/usr/share", random.Random(1))
    if a.held_out:
        write_held_out(a.held_out, packages, out, random.Random(2))


if __name__ == "__main__":
    main()
