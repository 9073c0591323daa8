#!/usr/bin/env python3
"""Breaks one line of the CUDA code at a time; an emulated test must fail every time.

    mutants.py [--sample] [NAME...]

A mutant replaces text that occurs exactly once in its file. It is built twice (plain, and with the
race detector) and is caught if a run of the tests named for it fails. --sample: a few that cover
each kind of net. Exit 1 if one survives, does not build or no longer applies. CUDA and CXX as in
backends/cuda/cuda.mk. """

import concurrent.futures
import functools
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
A, K, E, G, P, D, R = (
    f"backends/cuda/{x}.cuh"
    for x in ("attention", "kernels", "quantize", "gemm", "hopper", "device", "graphs")
)
Q, T = "qemb.cu", "tests/cuda/cuda_test.h"

# name, file, text, replacement, tests that must notice; * in front: in the sample
MUTANTS = [
    # barriers
    ("*row_in", K, "__syncthreads(); /* row_in", "/* row_in", "quantize rmsnorm layernorm"),
    ("row_out", K, "__syncthreads(); /* row_out", "/* row_out", "quantize rmsnorm layernorm"),
    ("att_q", A, "__syncthreads();    /* att_q:", "/* att_q:", "attention_narrow"),
    (
        "att_kv",
        A,
        "__syncthreads();    /* att_kv:",
        "/* att_kv:",
        "attention_narrow attention_wide",
    ),
    ("att_end", A, "__syncthreads(); /* att_end", "/* att_end", "attention_narrow attention_wide"),
    ("att_out", A, "__syncwarp(); /* att_out", "/* att_out", "attention_narrow attention_wide"),
    # cp.async
    ("att_q_wait", A, "cp_async_wait<1>(); /* att_q_wait", "/* att_q_wait", "attention_narrow"),
    (
        "att_q_wait_2",
        A,
        "cp_async_wait<1>(); /* att_q_wait",
        "cp_async_wait<2>(); /* att_q_wait",
        "attention_narrow",
    ),
    (
        "att_kv_wait",
        A,
        "cp_async_wait<0>(); /* att_kv_wait",
        "/* att_kv_wait",
        "attention_narrow attention_wide",
    ),
    (
        "att_kv_wait_1",
        A,
        "cp_async_wait<0>(); /* att_kv_wait",
        "cp_async_wait<1>(); /* att_kv_wait",
        "attention_narrow attention_wide",
    ),
    (
        "att_load_late",
        A,
        "att_load_kv<A, HD>(s, base + ((n + 1) & 1) * STAGE, n + 1);",
        "att_load_kv<A, HD>(s, base + (n & 1) * STAGE, n + 1);",
        "attention_narrow attention_wide",
    ),
    # divergence
    (
        "lane_leaves",
        K,
        "for (int o = 16; o; o >>= 1) v = op(",
        "for (int o = threadIdx.x ? 16 : 8; o; o >>= 1) v = op(",
        "rmsnorm",
    ),
    (
        "rope_leaves",
        K,
        "    if (!ok) return;\n    const float s",
        "    const float s",
        "qknorm_rope",
    ),
    (
        "barrier_in_branch",
        K,
        "__syncthreads(); /* row_out",
        "if (threadIdx.x < 64) __syncthreads(); /* row_out",
        "rmsnorm",
    ),
    # guards of kernels
    (
        "keys_end",
        A,
        "const bool ok = p < s.keys;",
        "const bool ok = true;",
        "attention_narrow attention_wide op_attention",
    ),
    (
        "keys_cut",
        A,
        "w.prefix + min(w.len, w.t0 + (64 * M >> lg))",
        "w.prefix + w.t0 + (64 * M >> lg)",
        "attention_narrow attention_wide op_attention",
    ),
    (
        "query_end",
        A,
        "const bool ok = t < w.len;",
        "const bool ok = true;",
        "attention_narrow op_attention",
    ),
    (
        "*store_end",
        A,
        "        if (t < w.len)\n            *(uint4 *)(att",
        "        *(uint4 *)(att",
        "attention_narrow attention_last",
    ),
    (
        "causal",
        A,
        "if (key + j * 8 + (e & 1) > row >> s.lg)",
        "if (key + j * 8 + (e & 1) >= row >> s.lg)",
        "attention_narrow",
    ),
    (
        "causal_loose",
        A,
        "if (key + j * 8 + (e & 1) > row >> s.lg)",
        "if (key + j * 8 + (e & 1) > (row >> s.lg) + 1)",
        "attention_narrow",
    ),
    (
        "mask_skipped",
        A,
        "if (n * ATT_KEYS + ATT_KEYS - 1 > s.first)",
        "if (n * ATT_KEYS > s.first)",
        "attention_narrow",
    ),
    (
        "all_end",
        A,
        "if (j * 8 + (e & 1) >= left)",
        "if (j * 8 + (e & 1) > left)",
        "attention_all",
    ),
    (
        "all_end_skipped",
        A,
        "if (n * ATT_KEYS + ATT_KEYS > s.keys)",
        "if (n * ATT_KEYS > s.keys)",
        "attention_all",
    ),
    ("all_keys", A, "s.keys = ALL ? w.len :", "s.keys =", "attention_all"),
    ("all_behind", A, "s.keys += w.behind;", "{}", "attention_first"),
    ("swizzle_32", A, "HD == 32 ? r >> 1 & 3 : r & 7", "r & 7", "attention_32"),
    ("all_softmax", A, "att_softmax<A, M, ALL>(s, p,", "att_softmax<A, M>(s, p,", "attention_all"),
    (
        "prefix_rows",
        A,
        "(p < s.prefix ? p : s.own + p)",
        "(s.own + p)",
        "attention_narrow_128 attention_last",
    ),
    (
        "prefix_mask",
        A,
        "s.first = w.prefix + w.t0;",
        "s.first = w.t0;",
        "attention_narrow_128 attention_last",
    ),
    (
        "swizzle_v",
        A,
        "Vt + att_swizzle<HD>(k * 16 + lane % 16, j * 2 + lane / 16)",
        "Vt + (k * 16 + lane % 16) * HD * 2 + (j * 2 + lane / 16) * 16",
        "attention_narrow",
    ),
    ("k_halves", A, "k * 2 + ((lane >> 3) & 1)", "k * 2 + (lane >> 4)", "attention_narrow"),
    (
        "rescale",
        A,
        "o[u][j][e] *= older[u][e / 2];",
        "if (e & 1) o[u][j][e] *= older[u][e / 2];",
        "attention_sharp attention_narrow",
    ),
    (
        "sum_rescale",
        A,
        "l[u][h] = l[u][h] * older[u][h] + sum;",
        "l[u][h] = l[u][h] + sum;",
        "attention_sharp",
    ),
    ("embed_rows", K, "if (t >= T) return;", "", "embed"),
    (
        "norm_tail",
        K,
        "v[j] = i < D ? *(const float4 *)(row + i) : make_float4(0, 0, 0, 0);",
        "v[j] = *(const float4 *)(row + i);",
        "rmsnorm",
    ),
    (
        "norm_store",
        K,
        "if (i >= D) continue;\n            const float4 g = *(const float4 *)(w + i);",
        "const float4 g = *(const float4 *)(w + i);",
        "rmsnorm",
    ),
    ("embed_positions", K, "(size_t)pos[t] * D", "(size_t)t * D", "embed"),
    (
        "ln_load",
        K,
        "if (i >= D) continue;\n            v[j] = *(const float4 *)(row + i);",
        "v[j] = *(const float4 *)(row + i);",
        "layernorm",
    ),
    ("ln_tail", K, "if (i >= D) continue; /* ln_tail", "(void)i; /* ln_tail", "layernorm"),
    (
        "ln_store",
        K,
        "if (i >= D) continue;\n            const float4 g = *(const float4 *)(w + i), c",
        "const float4 g = *(const float4 *)(w + i), c",
        "layernorm",
    ),
    ("ln_bias", K, "if (bias) {", "if (false) {", "layernorm"),
    (
        "bias_end",
        K,
        "BIAS_THREADS + threadIdx.x; i < n;",
        "BIAS_THREADS + threadIdx.x; i <= n;",
        "bias",
    ),
    ("bias_column", K, "bias + i % N8 * 4", "bias + i % N8", "bias"),
    ("mean_store", K, "if (ok && lane < 8)", "if (lane < 8)", "op_gather_mean"),
    ("mean_load", K, "ok ? lane / 8 : rows", "lane / 8", "op_gather_mean"),
    (
        "mean_prefix",
        K,
        "(p < t.prefix ? p : t.row0 + p - t.prefix)",
        "(t.row0 + p - t.prefix)",
        "op_gather_mean",
    ),
    ("mean_rows", K, "rows = t.prefix + t.len;", "rows = t.len;", "op_gather_mean"),
    ("mean_lanes", K, "sum[k] += __shfl_xor_sync(0xffffffffu, sum[k], 16);", "", "op_gather_mean"),
    ("no_shift", K, "SWIGLU_SHIFT = 6", "SWIGLU_SHIFT = 0", "golden_massive"),
    ("clamp", K, "return over ? (v > 0 ? limit : -limit) : v;", "return v;", "swiglu"),
    (
        "clamp_hides_nan",
        K,
        "const bool over = v > limit || v < -limit;",
        "const bool over = !(fabsf(v) <= limit);",
        "swiglu",
    ),
    ("clamps_uncounted", K, "if (clamped) atomicAdd(", "if (0) atomicAdd(", "swiglu"),
    # numbers of 8 bits
    (
        "ln8_load",
        E,
        "if (i >= D) continue;\n            load_eight(v[j], row + i);",
        "load_eight(v[j], row + i);",
        "layernorm_e4m3",
    ),
    ("ln8_tail", E, "if (i >= D) continue; /* ln_tail", "(void)i; /* ln_tail", "layernorm_e4m3"),
    (
        "ln8_store",
        E,
        "if (i >= D) continue;\n            float g[8], c[8];",
        "float g[8], c[8];",
        "layernorm_e4m3",
    ),
    ("ln8_bias", E, "if (bias) load_eight(c, bias + i);", "", "layernorm_e4m3"),
    (
        "gelu_end",
        E,
        "if (i >= F) continue;\n            float c[8];",
        "float c[8];",
        "gelu_e4m3",
    ),
    (
        "row_warp",
        K,
        "for (int o = 16; o; o >>= 1) v = op(",
        "for (int o = 8; o; o >>= 1) v = op(",
        "quantize",
    ),
    ("row_zeros", E, "largest()), 0x1p-100f)", "largest()), 0.0f)", "quantize"),
    ("row_scale", E, "*scale = top / E4M3_MAX;", "*scale = top / 256;", "quantize"),
    (
        "row_end",
        E,
        "if (i >= K) continue;\n        uint32_t two[2];",
        "uint32_t two[2];",
        "quantize",
    ),
    (
        "row_order",
        E,
        "e4m3_pair(w[2] * to_code, w[3] * to_code) << 16;",
        "e4m3_pair(w[3] * to_code, w[2] * to_code) << 16;",
        "quantize",
    ),
    (
        "int8_row",
        E,
        "x_scales[(size_t)t * QEMB_GROUPS(K) + i / QEMB_GROUP]",
        "x_scales[i / QEMB_GROUP]",
        "quantize",
    ),
    (
        "int8_group",
        E,
        "x_scales[(size_t)t * QEMB_GROUPS(K) + i / QEMB_GROUP]",
        "x_scales[(size_t)t * QEMB_GROUPS(K)]",
        "quantize",
    ),
    (
        "int8_placed",
        D,
        "memcpy(s->host + n * row, m->scale + r * groups, own)",
        "memcpy(s->host + n * row, m->scale, own)",
        "int8_placed",
    ),
    ("dequantize_row", E, "scale[row * groups + group]", "scale[group]", "dequantize"),
    ("dequantize_group", E, "scale[row * groups + group]", "scale[row * groups]", "dequantize"),
    (
        "dequantize_groups",
        E,
        "groups = QEMB_GROUPS((unsigned)K)",
        "groups = (unsigned)K / QEMB_GROUP",
        "dequantize",
    ),
    (
        "dequantized_stale",
        Q,
        "if (be->dense_of[i] != w->data) {",
        "if (!be->dense_of[i]) {",
        "int8_against_cpu",
    ),
    (
        "wgu_slot",
        Q,
        "run_gemm(be, gu, x, w, false, T, 0);",
        "run_gemm(be, gu, x, w, false, T);",
        "int8_against_cpu",
    ),
    (
        "slot_quantize",
        D,
        'ok = good(be, cudaEventSynchronize(s->free), "upload"); /* slot_quantize',
        "/* slot_quantize",
        "fp8_same accuracy",
    ),
    (
        "fp8_attention",
        Q,
        "if (be->fp8) launch_quantize(be, coded_rows(att",
        "if (0) launch_quantize(be, coded_rows(att",
        "accuracy",
    ),
    (
        "fp8_scales",
        D,
        "(size_t)(T + 15) / 16 * 16 * K)) {}",
        "(size_t)T * K)) {}",
        "op_fp8",
    ),
    (
        "fp8_sums",
        Q,
        "if (unscaled && add) apply_scales<float, true>(be, (float *)y, rows, w, T);",
        "",
        "op_fp8_sums",
    ),
    (
        "fp8_sums_beta",
        G,
        "const float beta = p->add && g->kind != GEMM_E4M3_SUMS;",
        "const float beta = p->add;",
        "op_fp8_sums",
    ),
    (
        "fp8_sums_alpha",
        G,
        "g->kind == GEMM_E4M3_SUMS ? 1 : w->alpha",
        "w->alpha * 2",
        "op_fp8 op_matmul",
    ),
    (
        "scale_add",
        E,
        "if constexpr (ADD) {",
        "if constexpr (false) {",
        "op_fp8_sums",
    ),
    (
        "scale_row",
        E,
        "const float s = alpha * x_scale[i / N8];",
        "const float s = alpha * x_scale[0];",
        "op_fp8_sums",
    ),
    (
        "fp8_kind",
        D,
        "return major == 9 && minor == 0 ? GEMM_E4M3 : GEMM_E4M3_SUMS;",
        "return GEMM_E4M3;",
        "op_fp8_sums",
    ),
    (
        "fast_unasked",
        G,
        "fast <= (g->kind != GEMM_F16)",
        "fast <= 0",
        "timed_once_fp8",
    ),
    (
        "fast_lost",
        G,
        "if (!s) s = gemm_fast(g, a->fast);",
        "if (!s) s = gemm_fast(g, false);",
        "fp8_fast timed_once_fp8",
    ),
    (
        "fp8_rows",
        G,
        "(uint64_t)(g->kind == GEMM_F16 ? T : (T + 15) / 16 * 16)",
        "(uint64_t)T",
        "op_fp8",
    ),
    (
        "fp8_x_scales",
        G,
        "return s ? s : gemm_describe(g, CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, x);",
        "return s ? s : gemm_describe(g, CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, w);",
        "op_fp8",
    ),
    (
        "fp8_anywhere",
        D,
        "if (be->fp8 && (10 * major + minor < 89",
        "if (0 && (10 * major + minor < 89",
        "refuse_fp8",
    ),
    (
        "products_unasked",
        D,
        "s = gemm_choose(g, &g->shapes[i], be->max_rows);",
        "",
        "refuse_fp8 op_matmul",
    ),
    # graphs
    ("*graph_tiles", R, "while (*n < full) tiles[(*n)++] = att_tile{};", "", "graph_"),
    ("empty_tile", A, "if (w.t0 >= w.len) return;", "", "graph_"),
    (
        "graph_texts",
        R,
        "&be->graphs[size - GRAPH_ROWS][b->B]",
        "&be->graphs[size - GRAPH_ROWS][1]",
        "graph_",
    ),
    (
        "graph_replays",
        R,
        "return be->mode == REPLAY;",
        "return 0;",
        "graph_",
    ),
    (
        "graph_unrecorded",
        R,
        "if (e == cudaSuccess && be->unrecorded) e = cudaErrorStreamCaptureInvalidated;",
        "",
        "graph_refused",
    ),
    (
        "graph_failure",
        D,
        "if (be->mode == RECORD)\n        be->unrecorded = true;\n    else if",
        "if",
        "graph_refused",
    ),
    (
        "graph_again",
        R,
        "be->graph->exec = nullptr;\n    be->graphs_off = true;\n    return 1;",
        "be->graph->exec = nullptr;\n    be->graphs_off = true;\n    return 0;",
        "graph_refused",
    ),
    (
        "graph_refused_once",
        R,
        "be->graph->exec = nullptr;\n    be->graphs_off = true;",
        "be->graph->exec = nullptr;",
        "graph_refused",
    ),
    (
        "graph_no_start",
        R,
        "if (cudaStreamBeginCapture(be->st, cudaStreamCaptureModeThreadLocal) == cudaSuccess)",
        "if (cudaStreamBeginCapture(be->st, cudaStreamCaptureModeThreadLocal), true)",
        "graph_refused",
    ),
    (
        "graph_not_run",
        R,
        "good(be, cudaGraphLaunch(be->graph->exec, be->st), \"graph\");",
        "",
        "graph_",
    ),
    ("no_graphs", R, "if (be->graphs_off || size", "if (size", "graph_"),
    # the host's side
    (
        "slot_upload",
        D,
        'ok = good(be, cudaEventSynchronize(s->free), "upload"); /* slot_upload',
        "/* slot_upload",
        "forward_shapes",
    ),
    (
        "pooled",
        Q,
        "if (good(be, cudaEventSynchronize(p->done), \"collect\")) { /* pooled */",
        "if (1) {",
        "op_gather in_flight",
    ),
    (
        "pooled_turn",
        Q,
        "be->first_pooled = (be->first_pooled + 1) % IN_FLIGHT;",
        "",
        "op_gather in_flight",
    ),
    (
        "table_reserve",
        D,
        "left -= std::min(left, reserve);",
        "",
        "table_in_pinned",
    ),
    (
        "batch_free",
        R,
        'good(be, cudaEventSynchronize(be->batch_free), "begin"); /* batch_free',
        "/* batch_free",
        "op_embed_back",
    ),
    ("last_row", R, ": b->cu[i + 1] - 1;", ": b->cu[i];", "op_gather"),
    (
        "first_row",
        R,
        "be->first ? b->cu[i] : b->cu[i + 1] - 1;",
        "b->cu[i + 1] - 1;",
        "op_gather_first",
    ),
    ("first_tile", R, "i, len - 1, {}}", "i, 0, {}}", "op_attention_first"),
    (
        "mean_bare",
        Q,
        "if (w) any_rmsnorm(be, x, x, w, b->T);",
        "any_rmsnorm(be, x, x, w, b->T);",
        "op_gather_mean",
    ),
    (
        "gelu_bias",
        Q,
        "if (!be->fp8) return launch_bias<true>",
        "if (!be->fp8) return launch_bias<false>",
        "op_matmul_gelu",
    ),
    (
        "alpha_of_gelu",
        D,
        "if (c->architecture == QEMB_QWEN3) y->wdown.alpha",
        "y->wdown.alpha",
        "encoder_shapes",
    ),
    (
        "up_of_gelu",
        D,
        "const int up = c->architecture == QEMB_BERT ? c->ffn : 2 * c->ffn;",
        "const int up = 2 * c->ffn;",
        "encoder_shapes",
    ),
    (
        "halves_of_gelu",
        D,
        "std::max(R * Q, bert ? chunk * F : 0)",
        "R * Q",
        "encoder_fp8",
    ),
    (
        "all_hopper",
        Q,
        "if (b->bidirectional) {",
        "if (b->bidirectional && !be->hopper.on) {",
        "op_attention_all",
    ),
    ("all_op", Q, "if (b->bidirectional) {", "if (false) {", "op_attention_all"),
    ("mean_norm", Q, "any_rmsnorm(be, x, x, w, b->T);", "", "op_gather_mean"),
    (
        "pool_norm",
        Q,
        "if (w) any_rmsnorm(be, x, x, w, B);",
        "any_rmsnorm(be, x, x, w, B);",
        "op_gather_mean",
    ),
    (
        "last_tile",
        R,
        "att_tile{len - 1, b->cu[i], len, b->P, i - (len - 1), 0, {}}",
        "att_tile{len - 1, b->cu[i], len, b->P, i, 0, {}}",
        "op_attention",
    ),
    (
        "prefix_tiles",
        R,
        "if (b->P) list_tiles(be, 0, b->P, 0);",
        "",
        "golden same_bits forward_shapes",
    ),
    (
        "wide_offset",
        Q,
        "*one = wide + be->n_wide;",
        "*one = wide;",
        "op_attention same_bits forward_mlp",
    ),
    (
        "alpha",
        D,
        "y->wdown.alpha *= 1 << SWIGLU_SHIFT;",
        "y->wdown.alpha *= 1;",
        "forward_shapes golden",
    ),
    (
        "fp8_shift",
        E,
        "silu(v[j][e]) * up[e] * (1.0f / (1 << SWIGLU_SHIFT))",
        "silu(v[j][e]) * up[e]",
        "accuracy",
    ),
    (
        "hopper_fp8",
        Q,
        "launch_quantize(be, coded_rows(h, T, F), (const act *)gu, nullptr, T, F);",
        "",
        "hopper_fp8_forward",
    ),
    (
        "failure_hidden",
        Q,
        "if (be->failure[0]) std::fill(p->out, p->out + n, NAN);",
        "",
        "device_fails",
    ),
    (
        "rope_position",
        D,
        "const float angle = (float)p * freq;",
        "const float angle = (float)(p + 1) * freq * (p > 0);",
        "op_attention",
    ),
    (
        "free_nothing",
        D,
        "for (int i = 0; i < be->n_allocated; i++) cudaFree(be->allocated[i]);",
        "",
        "refuse_memory",
    ),
    (
        "deterministic",
        D,
        "kind_of(be->fp8, be->device), opt->deterministic)",
        "kind_of(be->fp8, be->device), false)",
        "same_bits",
    ),
    (
        "deterministic_rows",
        G,
        "while (g->deterministic && k < n && !serves_all(&found[k].algo)) k++;",
        "",
        "same_bits",
    ),
    (
        "no_device",
        D,
        "be->device < 0 || be->device >= n",
        "be->device < 0",
        "refuse_device",
    ),
    (
        "budget",
        D,
        "return be->budget ? std::min(left, be->budget - std::min(be->used, be->budget)) : left;",
        "return left;",
        "refuse_memory table_in_pinned",
    ),
    (
        "beta",
        G,
        "const float beta = p->add && g->kind != GEMM_E4M3_SUMS;",
        "const float beta = 0;",
        "op_matmul_add",
    ),
    (
        "gemm_rows",
        G,
        "cublasStatus_t s = gemm_set_rows(g, p, T);\n    if (!s) s = gemm_fast(g, a->fast);",
        "cublasStatus_t s = gemm_fast(g, a->fast);",
        "op_matmul",
    ),
    (
        "reduction",
        G,
        "deterministic ? CUBLASLT_REDUCTION_SCHEME_NONE\n : CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE",
        "CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE",
        "same_bits",
    ),
    (
        "reduction_narrow",
        G,
        "deterministic ? CUBLASLT_REDUCTION_SCHEME_NONE\n : CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE",
        "deterministic ? CUBLASLT_REDUCTION_SCHEME_NONE : CUBLASLT_REDUCTION_SCHEME_MASK",
        "timed_once",
    ),
    (
        "slowest",
        G,
        "ms < 0 || (best >= 0 && ms >= best)",
        "ms < 0 || (best >= 0 && ms <= best)",
        "timed_once",
    ),
    (
        "unchecked_cache",
        G,
        "return !gemm_set_rows(g, p, T) &&\n           !cublasLtMatmulAlgoCheck(",
        "return !gemm_set_rows(g, p, T) || !cublasLtMatmulAlgoCheck(",
        "timed_once",
    ),
    # Hopper's kernels
    ("hopper_rows", Q, "T >= GATE_UP_FROM", "true", "op_hopper_choice"),
    ("hopper_bits", D, "opt->hopper && !opt->deterministic", "opt->hopper", "op_hopper_choice"),
    (
        "hopper_chip",
        D,
        "be->hopper.on && major == 9 && minor == 0",
        "be->hopper.on",
        "op_hopper_choice",
    ),
    ("gu_init", P, "cluster_sync(); /* gu_init", "/* gu_init", "gate_up_hopper"),
    (
        "gu_init_block",
        P,
        "cluster_sync(); /* gu_init",
        "__syncthreads(); /* gu_init",
        "gate_up_hopper",
    ),
    ("gu_exit", P, "cluster_sync(); /* gu_exit", "/* gu_exit", "gate_up_hopper"),
    (
        "gu_empty",
        P,
        "barrier_wait(ring.empty(ring.i), ring.parity(ring.i) ^ 1); /* gu_empty",
        "/* gu_empty",
        "gate_up_hopper",
    ),
    (
        "gu_empty_phase",
        P,
        "ring.parity(ring.i) ^ 1); /* gu_empty",
        "ring.parity(ring.i)); /* gu_empty",
        "gate_up_hopper",
    ),
    ("gu_readers", P, "GU_CLUSTER * HOPPER_WARPS", "HOPPER_WARPS", "gate_up_hopper"),
    (
        "gu_own_readers",
        P,
        "barrier_arrive_at(empty, rank);",
        "barrier_arrive(empty);",
        "gate_up_hopper",
    ),
    (
        "gu_other_readers",
        P,
        "barrier_arrive_at(empty, rank);",
        "barrier_arrive_at(empty, 1 - cluster_rank());",
        "gate_up_hopper",
    ),
    ("gu_all_lanes", P, "if (threadIdx.x % 32 > 0) return;", "", "gate_up_hopper"),
    (
        "*gu_full",
        P,
        "barrier_wait(ring.full(ring.i), ring.parity(ring.i)); /* gu_full",
        "/* gu_full",
        "gate_up_hopper",
    ),
    ("gu_full_phase", P, "ring.parity(ring.i)); /* gu_full", "0); /* gu_full", "gate_up_hopper"),
    (
        "gu_bytes",
        P,
        "barrier_expect(full, 3 * GU_PART);",
        "barrier_expect(full, 2 * GU_PART);",
        "gate_up_hopper",
    ),
    ("gu_mask", P, "(1 << GU_CLUSTER) - 1);", "1 << rank);", "gate_up_hopper"),
    ("gu_half_of_w", P, "column + rank * F", "column", "gate_up_hopper"),
    ("gu_part", P, "to + (1 + rank) * GU_PART", "to + GU_PART", "gate_up_hopper"),
    (
        "gu_block_rows",
        P,
        "* GU_CLUSTER + rank) * HOPPER_ROWS",
        "* GU_CLUSTER) * HOPPER_ROWS",
        "gate_up_hopper",
    ),
    (
        "gu_last_group",
        P,
        "in_group = min(GU_GROUP, pairs - first);",
        "in_group = GU_GROUP;",
        "gate_up_hopper",
    ),
    ("gu_lag", P, "barrier_wait(lag, 0); /* gu_lag", "; /* gu_lag", "gate_up_hopper"),
    (
        "gu_lag_arrive",
        P,
        "if (!half && ring.i == ahead && lane == 0) barrier_arrive(lag);",
        "",
        "gate_up_hopper",
    ),
    ("gu_lag_short", P, "min(GU_LAG, tiles.steps) - 1;", "GU_LAG - 1;", "gate_up_hopper"),
    (
        "gu_lag_idle",
        P,
        "if (half && tiles.first() < tiles.count()) barrier_wait(lag",
        "if (half) barrier_wait(lag",
        "gate_up_hopper",
    ),
    ("gu_fence", P, "wgmma_fence(); /* gu_fence", "/* gu_fence", "gate_up_hopper"),
    ("gu_step", P, "wgmma_wait<1>(); /* gu_step", "/* gu_step", "gate_up_hopper"),
    (
        "gu_step_2",
        P,
        "wgmma_wait<1>(); /* gu_step",
        "wgmma_wait<2>(); /* gu_step",
        "gate_up_hopper",
    ),
    ("gu_sums", P, "wgmma_wait<0>(d); /* gu_sums", "/* gu_sums", "gate_up_hopper"),
    (
        "gu_sums_1",
        P,
        "wgmma_wait<0>(d); /* gu_sums",
        "wgmma_wait<1>(d); /* gu_sums",
        "gate_up_hopper",
    ),
    (
        "gu_last",
        P,
        "gate_up_release(ring.empty(ring.i - 1)); /* gu_last",
        "/* gu_last",
        "gate_up_hopper",
    ),
    (
        "gu_early",
        P,
        "if (k > 0) gate_up_release(ring.empty(ring.i - 1));",
        "if (k > 0) gate_up_release(ring.empty(ring.i));",
        "gate_up_hopper",
    ),
    ("gu_zero", P, "k + s > 0", "true", "gate_up_hopper"),
    ("gu_rows", P, "if (r + e * 8 < T && column < F)", "if (column < F)", "gate_up_hopper"),
    ("gu_columns", P, "if (r + e * 8 < T && column < F)", "if (r + e * 8 < T)", "gate_up_hopper"),
    ("gu_alpha", P, "{ return alpha; }", "{ return 1; }", "gate_up_hopper"),
    (
        "gu_row_scale",
        P,
        "r + e * 8 < T ? scale.row(r + e * 8) : 0;",
        "scale.row(r + e * 8);",
        "gate_up_hopper",
    ),
    (
        "gu_column_scale",
        P,
        "return ok ? *(const float2 *)(w + c) : make_float2(0, 0);",
        "return *(const float2 *)(w + c);",
        "gate_up_hopper",
    ),
    (
        "gu_up_scale",
        P,
        "scale.columns(F + own, own < F)",
        "scale.columns(own, own < F)",
        "gate_up_hopper",
    ),
    ("gu_clamps", P, "if (clamped) atomicAdd(", "if (0) atomicAdd(", "gate_up_hopper"),
    (
        "gu_transpose",
        P,
        "const bool upper = lane & bit;",
        "const bool upper = lane & 1;",
        "gate_up_hopper",
    ),
    (
        "gu_one_block",
        P,
        "s->blocks < GU_CLUSTER ? 1 : s->blocks / GU_CLUSTER",
        "s->blocks / GU_CLUSTER",
        "gate_up_hopper",
    ),
    (
        "gu_odd_blocks",
        P,
        "dim3((unsigned)(clusters * GU_CLUSTER))",
        "dim3((unsigned)s->blocks)",
        "gate_up_hopper",
    ),
    (
        "ring_readers",
        P,
        "barrier_init(ring.empty(j), readers);",
        "barrier_init(ring.empty(j), 4);",
        "hopper",
    ),
    ("ah_init", P, "__syncthreads(); /* ah_init", "/* ah_init", "attention_hopper"),
    (
        "ah_q_empty",
        P,
        "barrier_wait(work.q_empty(), turn ^ 1); /* ah_q_empty",
        "/* ah_q_empty",
        "attention_hopper",
    ),
    (
        "ah_empty",
        P,
        "barrier_wait(ring.empty(ring.i), ring.parity(ring.i) ^ 1); /* ah_empty",
        "/* ah_empty",
        "attention_hopper",
    ),
    ("ah_landed", P, "cp_async_wait<1>(); /* ah_landed", "/* ah_landed", "attention_hopper"),
    (
        "ah_landed_2",
        P,
        "cp_async_wait<1>(); /* ah_landed",
        "cp_async_wait<2>(); /* ah_landed",
        "attention_hopper",
    ),
    ("*ah_fence", P, "fence_async();      /* ah_fence:", "/* ah_fence:", "attention_hopper"),
    (
        "ah_landed_last",
        P,
        "cp_async_wait<0>(); /* ah_landed_last",
        "/* ah_landed_last",
        "attention_hopper",
    ),
    (
        "ah_fence_last",
        P,
        "fence_async();      /* ah_fence_last",
        "/* ah_fence_last",
        "attention_hopper",
    ),
    (
        "ah_q_full",
        P,
        "barrier_wait(work.q_full(), turn); /* ah_q_full",
        "/* ah_q_full",
        "attention_hopper",
    ),
    ("ah_q_read", P, "__syncwarp(); /* ah_q_read", "/* ah_q_read", "attention_hopper"),
    (
        "ah_full_first",
        P,
        "barrier_wait(ring.full(ring.i), ring.parity(ring.i)); /* ah_full_first",
        "/* ah_full_first",
        "attention_hopper",
    ),
    (
        "ah_full",
        P,
        "barrier_wait(ring.full(ring.i), ring.parity(ring.i)); /* ah_full */",
        "/* ah_full */",
        "attention_hopper",
    ),
    ("ah_first", P, "wgmma_wait<0>(p[0]); /* ah_first", "/* ah_first", "attention_hopper"),
    ("ah_touched", P, "wgmma_fence(); /* ah_touched", "/* ah_touched", "attention_hopper"),
    (
        "ah_scores_done",
        P,
        "wgmma_wait<1>(p[0]); /* ah_scores_done",
        "wgmma_wait<2>(p[0]); /* ah_scores_done",
        "attention_hopper",
    ),
    (
        "ah_values_done",
        P,
        "wgmma_wait<0>(o[0]); /* ah_values_done",
        "/* ah_values_done",
        "attention_hopper",
    ),
    (
        "ah_early",
        P,
        "if (lane == 0) barrier_arrive(ring.empty(ring.i - 1));\n            att_rescale",
        "if (lane == 0) barrier_arrive(ring.empty(ring.i));\n            att_rescale",
        "attention_hopper",
    ),
    ("ah_last", P, "wgmma_wait<0>(o[0]); /* ah_last", "/* ah_last", "attention_hopper"),
    (
        "ah_freed_last",
        P,
        "if (lane == 0) barrier_arrive(ring.empty(ring.i));\n        ring.i++;",
        "ring.i++;",
        "attention_hopper",
    ),
    ("ah_zero", P, "t > 1);", "true);", "attention_hopper"),
    ("ah_rescale", P, "att_rescale<HD, 1>(o, older);", "", "attention_hopper"),
    ("ah_keys_end", P, "const bool ok = p < s.keys;", "const bool ok = true;", "attention_hopper"),
    (
        "ah_keys_cut",
        P,
        "w.prefix + min(w.len, w.t0 + (HOPPER_ROWS >> lg))",
        "w.prefix + w.t0 + (HOPPER_ROWS >> lg)",
        "attention_hopper",
    ),
    ("ah_prefix_rows", P, "p < s.prefix ? p : s.own + p;", "s.own + p;", "attention_hopper"),
    (
        "ah_whole_keys",
        P,
        "return last < s.keys && ah_row",
        "return ah_row",
        "attention_hopper_whole",
    ),
    (
        "ah_whole_keys_more",
        P,
        "return last < s.keys && ah_row",
        "return last <= s.keys && ah_row",
        "attention_hopper_whole",
    ),
    (
        "ah_whole_keys_less",
        P,
        "return last < s.keys && ah_row",
        "return last + 1 < s.keys && ah_row",
        "attention_hopper_whole",
    ),
    (
        "ah_whole_rows",
        P,
        "last < s.keys && ah_row(s, last) - ah_row(s, p) == ATT_KEYS - 1",
        "last < s.keys",
        "attention_hopper_whole",
    ),
    (
        "ah_whole_first_row",
        P,
        "ah_row(s, last) - ah_row(s, p) == ATT_KEYS - 1",
        "ah_row(s, last) - ah_row(s, p + 1) == ATT_KEYS - 2",
        "attention_hopper_whole",
    ),
    (
        "ah_whole_last_row",
        P,
        "ah_row(s, last) - ah_row(s, p) == ATT_KEYS - 1",
        "ah_row(s, last - 1) - ah_row(s, p) == ATT_KEYS - 2",
        "attention_hopper_whole",
    ),
    (
        "ah_whole_never",
        P,
        "if (ah_whole(s, t)) {",
        "if (false) {",
        "attention_hopper_whole",
    ),
    (
        "ah_arrive",
        P,
        "if (threadIdx.x > 0) return barrier_arrive(full);",
        "if (threadIdx.x > 0) return;",
        "attention_hopper",
    ),
    (
        "ah_expect",
        P,
        "barrier_expect(full, ah_stage_bytes<HD>);",
        "barrier_arrive(full);",
        "attention_hopper",
    ),
    (
        "ah_expect_half",
        P,
        "barrier_expect(full, ah_stage_bytes<HD>);",
        "barrier_expect(full, ah_stage_bytes<HD> / 2);",
        "attention_hopper",
    ),
    ("ah_group", P, "cp_async_commit(); /* ah_group", "/* ah_group", "attention_hopper"),
    # the tests' own
    (
        "array_set",
        T,
        'cuda_ok(cudaDeviceSynchronize(), "device_array"); /* array_set */',
        "/* array_set */",
        "op_gather_pool",
    ),
    ("ah_filled_up", P, "if (w.t0 >= w.len) break; /* padding", "/* padding", "attention_hopper"),
]

CODE = [
    f.relative_to(ROOT)
    for d in (".", "backends/cuda", "tests/cuda", "tests/cuda/emu", "tests/unit")
    for f in (ROOT / d).glob("*.*")
    if f.suffix in (".cu", ".cuh", ".h", ".cpp")
]
# Per net: flags of the code under test. The other objects come from build/NET.
FLAGS = {
    "emu": ["-O1"],
    "emu-race": ["-O1", "-fsanitize=thread", "-fno-threadsafe-statics", "-fno-pie"]
    + ["-DEMU_RACE"],
}


def make(*targets, **options):
    # Not a part of the make that runs this program: its job server is out of reach.
    env = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL")}
    return subprocess.run(["make", "-s", *targets], cwd=ROOT, env=env, check=False, **options)


@functools.cache
def test_objects(net):
    """The objects of build/NET/test_cuda, in the order in which make links them."""
    made = make("emu-objects", f"NET={net}", stdout=subprocess.PIPE, text=True)
    made.check_returncode()
    return made.stdout.split()


def find_cuda():
    for d in (os.environ.get("CUDA"), "/usr/local/cuda", "/opt/cuda"):
        if d and pathlib.Path(d, "include/cuda_fp16.h").exists():
            return d
    return None


KERNEL_TESTS = ("rmsnorm", "attention_", "qknorm_rope", "swiglu")  # launch kernels themselves
QUANTIZE_TESTS = ("quantize", "rmsnorm_e4m3", "dequantize")  # and these
MODEL_TESTS = (
    "golden",
    "forward",
    "same",
    "device",
    "refuse",
    "hot",
    "timed",
    "graph",
    "accuracy",
    "int8",
    "fp8",
    "overflow",
)


def touched(file, tests):
    """Which objects a change of this file alters for these tests; the others are those that make
    built."""
    if file == E and all(t in QUANTIZE_TESTS for t in tests):
        return ["tests/cuda/test_cuda_quantize.cu"]
    if file == P and all("hopper" in t for t in tests):
        return ["tests/cuda/test_cuda_hopper.cu"]
    if file == T:
        return ["tests/cuda/test_cuda_ops.cu"]
    if file not in (A, K):
        return ["qemb.cu"]
    if all(t.startswith(KERNEL_TESTS) for t in tests):
        return ["tests/cuda/test_cuda_ops.cu"]
    return ["qemb.cu", "tests/cuda/test_cuda_ops.cu"]


def build(command):
    """Raises RuntimeError with the first error. A mutant that does not build proves nothing."""
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode:
        errors = [x for x in made.stderr.splitlines() if "error" in x or "undefined" in x]
        raise RuntimeError(f"does not build: {(errors or ['exit ' + str(made.returncode)])[0]}")


def run_net(net, work, file, tests, cuda):
    """None if the mutant survives in this net, else what caught it."""
    # Mutated objects come first: kernels are templates, and of equal ones the linker takes the
    # first.
    objects, others = [], []
    only_model = all(t.startswith(MODEL_TESTS) for t in tests)
    only_ops = not any(t.startswith(MODEL_TESTS) for t in tests)
    for name in test_objects(net):
        source = name.removesuffix(".o").removeprefix(f"build/{net}/")
        ops = source.endswith(("ops.cu", "hopper.cu"))
        if (ops and only_model) or (source.endswith("model.cu") and only_ops):
            continue
        if source not in touched(file, tests):
            others.append(str(ROOT / name))
            continue
        out = work / net / (pathlib.Path(source).name + ".o")
        out.parent.mkdir(exist_ok=True)
        cmd = [
            os.environ.get("CXX", "g++"),
            "-std=c++20",
            "-w",
            "-DQEMB_EMU",
            "-isystem",
            cuda + "/include",
            f"-I{work}",
            f"-I{work}/tests/cuda/emu",
            *FLAGS[net],
            "-x",
            "c++",
            "-c",
            str(work / source),
            "-o",
            str(out),
        ]
        build(cmd)
        objects.append(str(out))
    program = work / net / "t"
    cxx = os.environ.get("CXX", "g++")
    libraries = ["-lcrypto", "-lm"]
    build([cxx, "-pthread", "-no-pie", *objects, *others, *libraries, "-o", str(program)])
    schedules = ["--schedules", "5"] if net == "emu" else []
    try:
        r = subprocess.run(
            [str(program), *schedules, *tests],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "timeout"
    if r.returncode == 0:
        return None
    lines = [x for x in (r.stdout + r.stderr).splitlines() if x.startswith(("FAIL", "emu: "))]
    return f"{net}: {lines[0][:110] if lines else 'exit ' + str(r.returncode)}"


def try_mutant(mutant, cuda):
    name, file, text, replacement, tests = mutant
    source = (ROOT / file).read_text()
    # However it is laid out: white space counts for nothing.
    pattern = re.compile(r"\s*".join(re.escape(c) for c in text if not c.isspace()))
    found = pattern.findall(source)
    if len(found) != 1:
        return name, False, f"the text occurs {len(found)} times in {file}"
    with tempfile.TemporaryDirectory() as tmp:
        work = pathlib.Path(tmp)
        for f in CODE:
            (work / f).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / f, work / f)
        (work / file).write_text(pattern.sub(lambda _: replacement, source))
        try:
            for net in FLAGS:
                caught = run_net(net, work, file, tests.split(), cuda)
                if caught:
                    return name, True, caught
        except RuntimeError as e:
            return name, False, str(e)
    return name, False, "survives"


def main(args):
    cuda = find_cuda()
    if not cuda:
        print("skipped: no CUDA toolkit")
        return 0
    if make("build/emu/test_cuda", "build/emu-race/test_cuda").returncode:
        return 1
    names = [a for a in args if not a.startswith("-")]
    chosen = [
        (m[0].lstrip("*"), *m[1:])
        for m in MUTANTS
        if (not names or m[0].lstrip("*") in names)
        and ("--sample" not in args or m[0].startswith("*"))
    ]
    survivors = 0
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for name, caught, why in pool.map(lambda m: try_mutant(m, cuda), chosen):
            survivors += not caught
            print(f"{'caught  ' if caught else 'SURVIVES'} {name:18} {why}", flush=True)
    print(f"mutants: {len(chosen) - survivors} of {len(chosen)} caught")
    return 1 if survivors or not chosen else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
