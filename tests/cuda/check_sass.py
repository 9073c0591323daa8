#!/usr/bin/env python3
"""Checks the output of ptxas: no kernel spills, none waits after every wgmma, and each kernel has
its tensor-core code.

    check_sass.py FILE...   *.log: the output of nvcc -Xptxas -v; *.cubin: one architecture

There is no disassembler to rely on: an instruction is 16 bytes and its low 12 bits are the opcode.
In a cubin every kernel has a section .text.NAME."""

import re
import struct
import sys

# HGMMA takes its first matrix from shared memory or from registers: two forms. QGMMA is e4m3's. A
# multicast is another form of UTMALDG.
OPCODES = {
    "HMMA": {0x23C},
    "HGMMA": {0x9F0, 0xDF0},
    "QGMMA": {0x9F3},
    "LDSM": {0x83B},
    "LDGSTS": {0xFAE},
    "UTMALDG": {0x5B4},
    "UTMALDG.MULTICAST": {0x3B4},
    "STL": {0x387},
    "LDL": {0x983},
}
# Kernels by their name in the mangled symbol: what must be there. No kernel may touch local memory.
WANT = {"attention_kernel": ("HMMA", "LDSM", "LDGSTS")}
WANT_SM90A = {
    "gate_up_kernelI6__half": ("HGMMA", "UTMALDG", "UTMALDG.MULTICAST"),  # elsewhere they trap
    "gate_up_kernelI13__nv_bfloat16": ("HGMMA", "UTMALDG", "UTMALDG.MULTICAST"),
    "gate_up_kernelIh": ("QGMMA", "UTMALDG", "UTMALDG.MULTICAST"),
    "attention_hopper_kernel": ("HGMMA", "LDSM", "LDGSTS", "UTMALDG"),
}


def sections(data):
    """(name, contents) of a 64-bit little-endian ELF file."""
    if data[:6] != b"\x7fELF\x02\x01":
        raise ValueError("not a 64-bit ELF file")
    (offset,) = struct.unpack_from("<Q", data, 40)
    size, count, names = struct.unpack_from("<HHH", data, 58)
    headers = [struct.unpack_from("<IIQQQQIIQQ", data, offset + i * size) for i in range(count)]
    strings = headers[names][4]
    for h in headers:
        end = data.index(b"\0", strings + h[0])
        yield data[strings + h[0] : end].decode(), data[h[4] : h[4] + h[5]] if h[1] != 8 else b""


def check_cubin(path):
    kernels, problems = 0, []
    with open(path, "rb") as f:
        data = f.read()
    for name, text in sections(data):
        if not name.startswith(".text."):
            continue
        kernels += 1
        ops = [struct.unpack_from("<Q", text, i)[0] & 0xFFF for i in range(0, len(text) - 15, 16)]
        found = set(ops)
        for op in ("STL", "LDL"):
            if OPCODES[op] & found:
                problems.append(f"{path}: {name}: uses local memory ({op})")
        # The 128-row attention tile is an empty kernel on sm_12x, where it would spill: see
        # backends/cuda/attention.cuh.
        empty = len([op for op in ops if op != 0x918]) < 16
        for kernel, want in {**WANT, **(WANT_SM90A if "_90a" in path else {})}.items():
            if kernel not in name or (empty and "sm_12" not in path and re.search(r"_12\d", path)):
                continue
            problems += [f"{path}: {name}: no {op}" for op in want if not OPCODES[op] & found]
    if not kernels:
        problems.append(f"{path}: no kernels")
    return kernels, problems


def check_log(path):
    kernels, problems, name = 0, [], "?"
    with open(path, encoding="utf-8") as f:
        for line in f:
            if m := re.search(r"Compiling entry function '(\S+)'", line):
                kernels, name = kernels + 1, m[1]
            if m := re.search(
                r"(\d+) bytes stack frame, (\d+) bytes spill stores, " r"(\d+) bytes spill loads",
                line,
            ):
                if any(int(x) for x in m.groups()):
                    problems.append(f"{path}: {name}: {m[0]}")
            # C7510 to C7515, for ptxas only a remark: each wgmma waits for the one before it.
            if re.search(r"\(C751[0-5]\)|wgmma\S* instructions are serialized", line):
                problems.append(f"{path}: {line.strip()}")
    if not kernels:
        problems.append(f"{path}: no report of ptxas")
    return kernels, problems


def main(paths):
    total, problems = 0, []
    for path in paths:
        kernels, found = check_log(path) if path.endswith(".log") else check_cubin(path)
        total += kernels
        problems += found
    for p in problems:
        print(p)
    print(f"check_sass: {len(paths)} files, {total} kernels, {len(problems)} problems")
    return 1 if problems or not paths else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
