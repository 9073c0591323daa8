#!/bin/sh
# llama.cpp or ik_llama.cpp: llama-embedding, which is looked for on PATH.
#
#   llama.sh MODEL.gguf THREADS FILE LENGTH
#
# LENGTH is the longest text's tokens. A batch has that many, but at least 512; set BATCH to try others
# (ik_llama.cpp was fastest with 128 for short texts in F16 and BF16). OPTIONS are further arguments,
# as -rtr, with which ik_llama.cpp repacks BF16 and Q8_0. POOLING is last, or cls for bge-m3.
#
# To install, outside of this project: llama.cpp's source is in the source package of the Python
# package llama-cpp-python, under vendor/llama.cpp, or in its public repository; ik_llama.cpp has a
# repository of its own (ikawrakow/ik_llama.cpp). Build the target llama-embedding with CMake, in
# release mode and for the machine's own instructions (GGML_NATIVE). llama.cpp's AMX kernels serve
# quantized formats of 4 to 8 bits only, Q8_0 among them.
#
# Weights: convert_hf_to_gguf.py, in the same source, makes MODEL.gguf from the directory that
# convert_weights.py made qemb's file from: --outtype f16 for qemb's f32 and int16, bf16, q8_0 for
# int8.
set -u
[ $# = 4 ] || { sed -n '4s/^# *//p' "$0" >&2; exit 1; }
command -v llama-embedding >/dev/null || { echo "llama.sh: llama-embedding is not on PATH" >&2; exit 1; }
batch=${BATCH:-$(($4 > 512 ? $4 : 512))}
# shellcheck disable=SC2086
exec llama-embedding -m "$1" -t "$2" -f "$3" -c "$batch" -b "$batch" -ub "$batch" --pooling "${POOLING:-last}" \
    --embd-output-format array ${OPTIONS:-}
