#!/usr/bin/env python3
"""Writes lib/grapheme_tables.h from the classes of grapheme clusters as the reference uses them.

    lib/make_grapheme_tables.py > lib/grapheme_tables.h

The JSON file, grapheme_tables.json, holds ranges of code points. It is looked for in
$QEMB_SHARED/encoder (default ../shared/encoder beside the repository).
"""

import json
import os
import sys
import textwrap
from pathlib import Path

HANGUL = ((0x1100, 0x115F, "L"), (0xA960, 0xA97C, "L"), (0x1160, 0x11A7, "V"),
          (0xD7B0, 0xD7C6, "V"), (0x11A8, 0x11FF, "T"), (0xD7CB, 0xD7FB, "T"))
SYLLABLES, TAILS = range(0xAC00, 0xD7A4), 28
REGIONAL = (0x1F1E6, 0x1F1FF, "REGIONAL")
NAMES = (("control", "CONTROL"), ("prepend", "PREPEND"), ("spacing_mark", "SPACING"),
         ("extended_pictographic", "PICTURE"), ("incb_consonant", "CONSONANT"),
         ("extend", "EXTEND"))


def classes(tables):
    """The class of each code point that has one."""
    found = {}

    def mark(first, last, name):
        for cp in range(first, last + 1):
            assert cp not in found, f"U+{cp:04X} is {found[cp]} and {name}"
            found[cp] = name

    for key, name in NAMES:
        for first, last in tables[key]:
            mark(first, last, name)
    for cp, name in ((0x0D, "CR"), (0x0A, "LF")):
        assert found[cp] == "CONTROL"
        found[cp] = name
    # These four extend a cluster, and differ in what they do between two consonants or pictures.
    for cp, name in [(0x200C, "NONJOINER"), (0x200D, "JOINER")] + [
            (cp, "LINKER") for first, last in tables["incb_linker"]
            for cp in range(first, last + 1)]:
        assert found[cp] == "EXTEND"
        found[cp] = name
    for entry in HANGUL + (REGIONAL,):
        for cp in range(entry[0], entry[1] + 1):
            if found.get(cp) not in ("SPACING", "EXTEND"):
                mark(cp, cp, entry[2])
    for cp in SYLLABLES:
        mark(cp, cp, "LVT" if (cp - SYLLABLES[0]) % TAILS else "LV")
    return found


def ranges(found):
    """Runs of one class. The syllables, which change class all the time, are left out."""
    runs = []
    for cp in sorted(cp for cp in found if cp not in SYLLABLES):
        if runs and runs[-1][1] == cp - 1 and runs[-1][2] == found[cp]:
            runs[-1][1] = cp
        else:
            runs.append([cp, cp, found[cp]])
    return runs


def main():
    root = Path(__file__).resolve().parent.parent
    shared = Path(os.environ.get("QEMB_SHARED") or root.parent / "shared")
    path = shared / "encoder" / "grapheme_tables.json"
    if not path.exists():
        sys.exit(f"make_grapheme_tables.py: {path}: no such file\nhint: set QEMB_SHARED")
    runs = ranges(classes(json.loads(path.read_text())))
    text = ", ".join(f"{{0x{a:X}, 0x{b:X}, GRAPHEME_{c}}}" for a, b, c in runs) + ","
    rows = textwrap.wrap(text.replace(", GRAPHEME_", ",~GRAPHEME_").replace(", 0x", ",~0x"), 96)
    rows = [row.replace("~", " ") for row in rows]
    print(f"""/* grapheme_tables.h - written by make_grapheme_tables.py; do not edit. */
#ifndef GRAPHEME_TABLES_H
#define GRAPHEME_TABLES_H

#include "lib/grapheme.h"

/* The classes of Unicode 17, ascending. Code points in no range are GRAPHEME_OTHER, but for the
 * Hangul syllables, which are 0xAC00..0xD7A3: LV where the syllable has no tail, else LVT. */
static const struct {{
    uint32_t first, last;
    uint8_t class;
}} grapheme_ranges[{len(runs)}] = {{""")
    for row in rows:
        print("    " + row)
    print("};\n\n#endif")


if __name__ == "__main__":
    main()
