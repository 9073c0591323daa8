#!/usr/bin/env python3
"""Checks the form of the files: lengths of lines and functions, links, first lines, includes.

    style.py [DIRECTORY]   the checks, on this repository or on the git checkout DIRECTORY
    style.py --self-test   that each check finds a fault in a tree made for it

Prints what is wrong, then "N tests, M failed"; exit 1 if something failed.
"""
import posixpath
import re
import subprocess
import sys
import tempfile
from pathlib import Path

COLUMNS = 100
FUNCTION_LINES = 100
TOP_LEVEL = 22  # README names the ways in; packaging/ and python/ are two of them
README_WORDS = 900
CODE = (".c", ".h", ".cu", ".cuh", ".cpp")
GENERATED = {"lib/unicode_tables.h"}


def tracked(root):
    git = ["git", "-c", "safe.directory=*", "ls-files"]
    out = subprocess.run(git, cwd=root, capture_output=True, text=True, check=True)
    return [f for f in out.stdout.splitlines() if (root / f).is_file()]


def columns(root, files):
    """No line of C, CUDA or Python has more than COLUMNS columns."""
    for f in files:
        if f.endswith((*CODE, ".py")) and f not in GENERATED:
            for n, line in enumerate((root / f).read_text(encoding="utf-8").splitlines(), 1):
                if len(line) > COLUMNS:
                    yield f"{f}:{n}: {len(line)} columns"


def functions(root, files):
    """No function has more than FUNCTION_LINES lines. As laid out by clang-format: the body of a
    C function ends with the first } in column 0; a Python one before the next line as far left."""
    for f in files:
        text = (root / f).read_text(encoding="utf-8").splitlines() if f.endswith((*CODE, ".py")) \
            else []
        start = None
        for n, line in enumerate(text, 1):
            if f.endswith(".py"):
                if start and line.strip() and not line.startswith((" ", ")", "#")):
                    if last - start + 1 > FUNCTION_LINES:
                        yield f"{f}:{start}: a function of {last - start + 1} lines"
                    start = None
                if line.startswith(("def ", "async def ")):
                    start = n
                if line.strip():
                    last = n
            elif re.match(r"[A-Za-z].*\) \{$|    .*\) \{$", line) and not line.startswith("    "):
                start = n
            elif line.startswith("}") and start:
                if n - start + 1 > FUNCTION_LINES:
                    yield f"{f}:{start}: a function of {n - start + 1} lines"
                start = None


def top_level(root, files):
    """The top level has at most TOP_LEVEL entries."""
    entries = {f.split("/")[0] for f in files}
    if len(entries) > TOP_LEVEL:
        yield f"{len(entries)} entries at the top level: {', '.join(sorted(entries))}"


def readme(root, files):
    """README has fewer than README_WORDS words."""
    if "README.md" in files:
        words = len((root / "README.md").read_text(encoding="utf-8").split())
        if words >= README_WORDS:
            yield f"README.md: {words} words"


def anchors(text):
    """The anchors of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ +(.*)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in heads}


def links(root, files):
    """Relative links of the pages lead to files and headings that exist."""
    for f in files:
        if not f.endswith(".md"):
            continue
        text = (root / f).read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if re.match(r"[a-z]+:", target):
                continue
            path, _, anchor = target.partition("#")
            page = posixpath.normpath(posixpath.join(posixpath.dirname(f), path)) if path else f
            if not (root / page).exists():
                yield f"{f}: {target}: no such file"
            elif anchor and anchor not in anchors((root / page).read_text(encoding="utf-8")):
                yield f"{f}: {target}: no such heading"


def names(root, files):
    """Source files that the pages name exist. The log of old attempts may name others."""
    known = {posixpath.basename(f) for f in files}
    for f in files:
        if f.endswith(".md") and not f.endswith("-log.md"):
            text = (root / f).read_text(encoding="utf-8")
            for name in re.findall(r"\b[\w-]+\.(?:cuh?|[ch]|py|sh|mk)\b", text):
                if name not in known:
                    yield f"{f}: {name}: no such file"


def paths(root, files):
    """Files that Python programs name as ROOT / "a" / "b" exist, or are made (.gitignore)."""
    for f in files:
        if not f.endswith(".py") or f == "tests/style.py":  # whose own trees are below
            continue
        for parts in re.findall(r'\bROOT((?: / "[^"{}]+")+)', (root / f).read_text("utf-8")):
            path = posixpath.join(*re.findall(r'"([^"]+)"', parts))
            made = ["git", "-c", "safe.directory=*", "check-ignore", "-q", path]
            if not (root / path).exists() and subprocess.run(made, cwd=root).returncode:
                yield f"{f}: {path}: no such file"


def openings(root, files):
    """A source file begins with a comment that names it."""
    for f in files:
        if f.endswith(CODE) and not (root / f).read_text(encoding="utf-8").startswith(
                f"/* {posixpath.basename(f)} - "):
            yield f"{f}: does not begin with its name"


def includes(root, files):
    """{module: the modules that it includes}. A .c and its own header are one module; a header that
    is named after nothing is one by itself."""
    sources = [f for f in files if f.endswith(CODE) and not f.startswith("tests/")]
    stems = {f: posixpath.splitext(f)[0] for f in sources}
    graph = {}
    for f in sources:
        for name in re.findall(r'^#include "([^"]+)"', (root / f).read_text(), re.M):
            near = posixpath.normpath(posixpath.join(posixpath.dirname(f), name))
            found = near if near in stems else name if name in stems else None
            if found and stems[found] != stems[f]:
                graph.setdefault(stems[f], set()).add(stems[found])
    return graph


def circles(root, files):
    """No two files include each other, over any number of steps. qemb.h and qemb.c count as two:
    every module includes the interface, and qemb.c includes what it stands on."""
    graph = includes(root, files)
    graph["qemb"] = set()
    done = set()

    def visit(node, path):
        if node in path:
            yield "includes in a circle: " + " -> ".join([*path[path.index(node):], node])
        elif node not in done:
            for other in sorted(graph.get(node, ())):
                yield from visit(other, [*path, node])
            done.add(node)

    for node in sorted(graph):
        yield from visit(node, [])


CHECKS = (columns, functions, top_level, readme, links, names, paths, openings, circles)


def check(root):
    files = tracked(root)
    return {c.__name__: list(c(root, files)) for c in CHECKS}


BODY = "    x();\n"
FAULTS = {  # check -> the files of a tree in which it must find something
    "columns": {"a.py": "x" * 101 + "\n"},
    "functions": {"a.c": "/* a.c - x */\nvoid f(void) {\n" + BODY * 99 + "}\n"},
    "top_level": {f"f{i}": "" for i in range(23)},
    "readme": {"README.md": "word " * 900},
    "links": {"a.md": "[x](b.md)"},
    "names": {"a.md": "See b.c.\n"},
    "paths": {"a.py": 'x = ROOT / "b" / "c.txt"\n'},
    "openings": {"a.c": "/* b.c - x */\n"},
    "circles": {"a.h": '/* a.h - x */\n#include "b.h"\n', "b.h": '/* b.h - x */\n#include "a.h"\n'},
}
GOOD = {
    "README.md": "word " * 898 + "[a](a.md#one-two)\n",
    "a.md": "# One, two\n",
    "a.c": '/* a.c - x */\n#include "a.h"\nvoid f(void) {\n' + BODY * 98 + "}\n" + "/" * 100 + "\n",
    "a.h": "/* a.h - x */\n",
    "c.md": "See a.c and d.py.\n",
    "d.py": 'x = ROOT / "a.h", ROOT / "build" / "x"\n',
    ".gitignore": "/build/\n",
    "b.py": "def f():\n" + "    x()\n" * 99 + "\n\ny = 1\n",
}


def found_in(tree):
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name, text in tree.items():
            (root / name).write_text(text, encoding="utf-8")
        subprocess.run(["git", "init", "-q"], cwd=root, check=True)
        subprocess.run(["git", "add", "-A"], cwd=root, check=True)
        return {name for name, faults in check(root).items() if faults}


def self_test():
    failed = [name for name, tree in FAULTS.items() if name not in found_in(tree)]
    failed += [f"a good tree: {name}" for name in found_in(GOOD)]
    py = "def f():\n" + "    x()\n" * 100 + "y = 1\n"
    failed += [] if "functions" in found_in({"a.py": py}) else ["functions of Python"]
    anchor = found_in({"a.md": "[x](b.md#two)", "b.md": "# One\n"})
    failed += [] if "links" in anchor else ["links to headings"]
    for name in failed:
        print(f"self-test: {name}")
    return len(FAULTS) + 3, len(failed)


def main(args):
    n, failed = len(CHECKS), 0
    if args == ["--self-test"]:
        n, failed = self_test()
    else:
        root = Path(args[0]) if args else Path(__file__).parents[1]
        if not (root / ".git").exists():
            print("skipped: not a git checkout, so no list of its files")
            return 0
        for faults in check(root).values():
            failed += bool(faults)
            print(*faults, sep="\n", end="\n" if faults else "")
    print(f"{n} tests, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
