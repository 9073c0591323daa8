#!/usr/bin/env python3
"""Writes lib/unicode_tables.h from the tokenizer's unicode_tables.json.

    lib/make_unicode_tables.py > lib/unicode_tables.h

The JSON file holds, for every code point, what the reference tokenizer does with it: \\p{L} and
\\p{N} (Unicode 16.0), White_Space, and the normalization data of Unicode 9.0. It is looked for in
$QEMB_SHARED/tokenizer (default ../shared/tokenizer beside the repository).
"""

import json
import os
import sys
import textwrap
from pathlib import Path

OTHER, LETTER, NUMBER, SPACE = range(4)
CLASS_SHIFT = 8  # bits 0..7: combining class
NFC_NO, NFC_MAYBE, NFC_FIRST, NFC_DECOMPOSES = 1 << 10, 1 << 11, 1 << 12, 1 << 13
N_CODE_POINTS = 0x110000
BLOCK = 64

# Hangul is algorithmic: syllables are AC00..D7A3, and jamo compose as L+V and LV+T.
HANGUL_L, HANGUL_V, HANGUL_T = range(0x1100, 0x1113), range(0x1161, 0x1176), range(0x11A8, 0x11C3)
HANGUL_SYLLABLES = range(0xAC00, 0xD7A4)


def utf8_len(cp):
    return 1 if cp < 0x80 else 2 if cp < 0x800 else 3 if cp < 0x10000 else 4


def properties(tables, ccc, decomp, comp):
    """One 16-bit word per code point; see the comment in the header written."""
    props = [0] * N_CODE_POINTS
    for name, kind in (("L", LETTER), ("N", NUMBER)):
        for first, last in tables[name]:
            for cp in range(first, last + 1):
                assert props[cp] == 0
                props[cp] = kind << CLASS_SHIFT
    for cp in tables["S"]:
        assert props[cp] == 0
        props[cp] = SPACE << CLASS_SHIFT
    for cp, k in ccc.items():
        props[cp] |= k

    firsts = {a for a, _ in comp} | set(HANGUL_L) | set(HANGUL_SYLLABLES) | set(decomp)
    seconds = {b for _, b in comp} | set(HANGUL_V) | set(HANGUL_T)
    for cp in firsts:
        props[cp] |= NFC_FIRST
    for cp in seconds:
        props[cp] |= NFC_MAYBE
    for cp in list(decomp) + list(HANGUL_SYLLABLES):
        props[cp] |= NFC_DECOMPOSES
    for cp, full in decomp.items():
        if nfc_alone(full, ccc, comp) != [cp]:
            props[cp] |= NFC_NO
        elif not ccc.get(cp, 0):
            # A starter that NFC keeps begins with a starter that joins nothing before it:
            # otherwise the quick check would have to look inside it.
            assert not ccc.get(full[0], 0) and full[0] not in seconds
    return props


def nfc_alone(full, ccc, comp):
    """NFC of one fully decomposed character."""
    out = [full[0]]
    for cp in full[1:]:
        blocked = len(out) > 1 and ccc.get(out[-1], 0) >= ccc.get(cp, 0)
        starter = not ccc.get(out[0], 0)
        if starter and not blocked and (out[0], cp) in comp:
            out[0] = comp[out[0], cp]
        else:
            out.append(cp)
    return out


def check(decomp, comp, ccc):
    """What the C code relies on: buffer sizes, and composed characters being starters."""
    for cp, full in decomp.items():
        assert len(full) <= 2 * utf8_len(cp)
        assert sum(map(utf8_len, full)) <= 3 * utf8_len(cp)
        assert not any(c in decomp for c in full)
    for (a, b), c in comp.items():
        assert not ccc.get(a, 0) and not ccc.get(c, 0)
        assert utf8_len(c) <= utf8_len(a) + utf8_len(b)
    assert all(cp >= 0xC0 for cp in list(decomp) + list(ccc))  # ASCII is always NFC


def rows(values):
    text = ", ".join(str(v) for v in values) + ","
    return textwrap.wrap(text, 98, initial_indent="    ", subsequent_indent="    ")


def array(declaration, values):
    return [declaration + " = {", *rows(values), "};", ""]


def main():
    root = Path(__file__).resolve().parent.parent
    shared = Path(os.environ.get("QEMB_SHARED") or root.parent / "shared")
    path = shared / "tokenizer" / "unicode_tables.json"
    if not path.exists():
        sys.exit(f"make_unicode_tables.py: {path}: no such file\nhint: set QEMB_SHARED")
    tables = json.loads(path.read_text())

    ccc = {cp: k for first, last, k in tables["ccc"] for cp in range(first, last + 1)}
    decomp = {int(cp): full for cp, full in tables["decomp"].items()}
    comp = {(a, b): c for a, b, c in tables["comp"]}
    check(decomp, comp, ccc)
    props = properties(tables, ccc, decomp, comp)

    blocks, index = [], []
    for start in range(0, N_CODE_POINTS, BLOCK):
        block = tuple(props[start : start + BLOCK])
        if block not in blocks:
            blocks.append(block)
        index.append(blocks.index(block))

    pool, entries = [], []
    for cp in sorted(decomp):
        entries.append(f"{{0x{cp:X}, {len(pool)}, {len(decomp[cp])}}}")
        pool += decomp[cp]
    pairs = [f"{{0x{a:X}, 0x{b:X}, 0x{c:X}}}" for (a, b), c in sorted(comp.items())]

    out = [
        "/* unicode_tables.h - written by make_unicode_tables.py; do not edit.",
        " *",
        " * Letters and numbers: Unicode 16.0. Normalization: Unicode 9.0, as in the reference",
        " * tokenizer. Hangul is composed and decomposed by arithmetic and only marked here. */",
        "#ifndef UNICODE_TABLES_H",
        "#define UNICODE_TABLES_H",
        "",
        "#include <stdint.h>",
        "",
        "/* A code point's word: bits 0..7 combining class, 8..9 class, then",
        " *   NFC_NO          NFC changes it wherever it stands",
        " *   NFC_MAYBE       it can join a character before it",
        " *   NFC_FIRST       it, or a part of it, can be joined by a mark or jamo after it",
        " *   NFC_DECOMPOSES  it has a canonical decomposition */",
        "enum { CLASS_OTHER, CLASS_LETTER, CLASS_NUMBER, CLASS_SPACE };",
        "#define UNICODE_CCC(word)   ((word)&0xFFu)",
        "#define UNICODE_CLASS(word) ((word) >> 8 & 3u)",
        f"#define NFC_NO              0x{NFC_NO:X}u",
        f"#define NFC_MAYBE           0x{NFC_MAYBE:X}u",
        f"#define NFC_FIRST           0x{NFC_FIRST:X}u",
        f"#define NFC_DECOMPOSES      0x{NFC_DECOMPOSES:X}u",
        "",
        f"/* Word of code point c: unicode_words[unicode_block[c / {BLOCK}]][c % {BLOCK}]. */",
        *array(f"static const uint16_t unicode_block[{len(index)}]", index),
        f"static const uint16_t unicode_words[{len(blocks)}][{BLOCK}] = {{",
    ]
    for block in blocks:
        out += ["    {"] + rows(block) + ["    },"]
    out += [
        "};",
        "",
        "/* Full canonical decompositions, ascending: n code points from unicode_pool[at]. */",
        f"#define N_DECOMPOSITIONS {len(entries)}",
        "static const struct { uint32_t cp; uint16_t at, n; } unicode_decomposition[] = {",
        *rows(entries),
        "};",
        *array(f"static const uint32_t unicode_pool[{len(pool)}]", [f"0x{cp:X}" for cp in pool]),
        "/* Primary composites, ascending by first, then second. */",
        f"#define N_COMPOSITIONS {len(pairs)}",
        "static const struct { uint32_t first, second, composed; } unicode_composition[] = {",
        *rows(pairs),
        "};",
        "",
        "#endif",
    ]
    print("\n".join(out))


if __name__ == "__main__":
    main()
