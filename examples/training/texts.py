"""English and translated texts from Debian packages that hold text: WordNet, FreeDict, GNOME Help.

wordnet, freedict and gnome_help return rows [kind, language, a, b, English of a], as corpus.py
writes them. A row without b has no partner: a learns from the teacher alone.
"""
import gzip
import re
import xml.etree.ElementTree as xml
from collections import Counter
from itertools import accumulate

MALLARD = "{http://projectmallard.org/1.0/}"


def tidy(text):
    return re.sub(r"\s+", " ", text).strip()


# ---- WordNet -----------------------------------------------------------------------------------


def wordnet(folder, counts):
    """-> (rows, words): the synonyms of each meaning with its gloss, and its first example.
    words: part of speech -> (words, running sums of their weights), of words that WordNet's tagged
    texts or descriptions of packages use. counts: word -> how many descriptions have it. A weight
    is sqrt(uses in the tagged texts) + sqrt(counts)."""
    tags, words, rows = Counter(), {}, []
    for line in (folder / "cntlist.rev").read_text(encoding="utf-8").splitlines():
        sense, _, count = line.split()
        lemma, kind = sense.split("%")
        tags[lemma, kind[0].replace("5", "3")] += int(count)  # 5: satellite adjectives
    for kind, part in enumerate(("noun", "verb", "adj", "adv"), 1):
        used = {}
        for line in (folder / f"index.{part}").read_text(encoding="utf-8").splitlines():
            lemma = line.split(" ")[0]
            if re.fullmatch("[a-z]{3,}", lemma):
                n, m = tags[lemma, str(kind)], counts[lemma]
                if n or m >= 5:
                    used[lemma] = n**0.5 + m**0.5
        words[part] = list(used), list(accumulate(used.values()))
    known = {w for used, _ in words.values() for w in used}
    for part in words:
        for line in (folder / f"data.{part}").read_text(encoding="utf-8").splitlines():
            if line[:1] != " ":
                rows += meaning(line, known)
    return rows, words


def meaning(line, known):
    """The rows of a line of WordNet's data, if one of its synonyms is a known word."""
    head, _, gloss = line.partition("| ")
    head = head.split()
    lemmas = [head[4 + 2 * i] for i in range(int(head[3], 16))]
    if not known.intersection(lemmas):
        return []
    lemmas = ", ".join(re.sub(r"\(\w+\)$", "", w).replace("_", " ") for w in lemmas[:5])
    text = tidy(re.split(r'; "|"', gloss)[0].rstrip("; "))
    rows = [["word", "en", lemmas, text, lemmas]]
    for example in re.findall(r'"([^"]{15,80})"', gloss)[:1]:
        rows.append(["example", "en", example, "", example])
    return rows


def made_up_needs(words, n, rng):
    """Short texts of common words, such as people type into a search box. Most make little sense;
    the teacher has a vector for each."""
    forms = ("{verb} {noun}", "{verb} my {noun}", "{verb} a {adj} {noun}", "how to {verb} {noun}",
             "{noun} for my {noun2}", "{noun} {noun2}", "my {noun} is {adj}", "{adj} {noun}",
             "{verb} the {noun} {adv}", "{verb} {noun} and {noun2}", "{verb} {noun} from {noun2}",
             "program to {verb} {noun}", "{verb} {noun} with {noun2}", "what is {adj} {noun}")

    def draw(part):
        used, weights = words[part]
        return rng.choices(used, cum_weights=weights, k=n * 2)

    drawn = zip(*(draw(part) for part in ("noun", "noun", "verb", "adj", "adv")))
    found = {rng.choice(forms).format(noun=noun, noun2=noun2, verb=verb, adj=adj, adv=adv)
             for noun, noun2, verb, adj, adv in drawn}
    return rng.sample(sorted(found), min(n, len(found)))


# ---- FreeDict ----------------------------------------------------------------------------------


def unmarked(text):
    """Without marks of grammar, subject, sound: <n>, [mus.], (futsuumeishi), /.../, 1."""
    return tidy(re.sub(r"<[^>]*>|\[[^\]]*\]|\([^)]*\)|/[^/]*/|^\d+\. ", " ", text)).strip(" ,;")


def entries(lines, language):
    """Yields (word, English) of each entry, with their marks."""
    if language == "ja":  # [marks] word /sound/, ...; grammar in parentheses; English
        for i, head in enumerate(lines):
            if ("[ichi1]" in head or "[news1]" in head) and lines[i + 1][:1] == "(":
                gloss = next(line for line in lines[i + 1 :] if line.lstrip()[:1] != "(")
                yield unmarked(head).split(",")[0].strip(), gloss
        return
    for head, line in zip(lines, lines[1:]):
        if head.startswith("      \""):  # "phrase"  - English
            phrase = head.strip()[1:].split('"  - ')
            if len(phrase) == 2:
                yield phrase
        elif "/ <" in head and head[:1] not in " -":  # word /sound/ <gender>; English
            yield head, line


def freedict(path, language, wanted):
    """Words and phrases with their English. wanted: an entry is kept if all its English words are
    in it."""
    with gzip.open(path, "rt", encoding="utf-8") as f:
        lines = f.read().split("\n")
    rows = {}
    for word, gloss in entries(lines, language):
        word, english = unmarked(word), ", ".join(unmarked(gloss).split(", ")[:3])
        words = re.findall("[a-z]+", english.lower())
        if word and words and set(words) <= wanted:
            rows.setdefault(word, ["word", language, word, "", english])
    return list(rows.values())


# ---- GNOME Help --------------------------------------------------------------------------------


def paragraphs(path):
    """The summary, the title and the paragraphs of a page, in order. Titles of a certain type, for
    links to the page, are left out."""
    tags = {MALLARD + tag for tag in ("title", "desc", "p")}
    return [tidy("".join(e.itertext())) for e in xml.parse(path).iter()
            if e.tag in tags and "type" not in e.attrib]


def gnome_help(folder, languages, longest):
    """The title of each page with its summary; paragraphs of up to `longest` characters, and their
    translations."""
    rows = []
    for page in sorted((folder / "C/gnome-help").glob("*.page")):
        own = paragraphs(page)
        rows.append(["help", "en", own[1], own[0], own[1]])  # the summary stands first
        rows += [["help", "en", text, "", text] for text in own[2:] if 20 < len(text) <= longest]
        for language in languages:
            other = folder / language / "gnome-help" / page.name
            other = paragraphs(other) if other.exists() else []
            if len(other) == len(own):
                rows += [["help", language, a, "", b] for a, b in zip(other, own)
                         if a != b and 8 < len(b) <= longest]
    return rows
