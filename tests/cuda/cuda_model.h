/* cuda_model.h - what the tests of whole models share: models over a file on some table, texts, and
 * the comparison of vectors. The bound is derived in test_cuda_model.cu.
 */
#ifndef CUDA_MODEL_H
#define CUDA_MODEL_H

#include "cuda_test.h"

constexpr double MIN_COSINE = 0.99998;

inline double cosine(const float *a, const float *b, int n) {
    double ab = 0, aa = 0, bb = 0;
    for (int i = 0; i < n; i++)
        ab += (double)a[i] * b[i], aa += (double)a[i] * a[i], bb += (double)b[i] * b[i];
    return ab / sqrt(aa * bb);
}

/* A model over a file on some table, opened or reported. */
struct model {
    qemb_model *m = nullptr;
    qemb_err err = {};
    int D;
    model(const qemb_file *f, const qemb_ops *ops, int batch_tokens, qemb_options opt = {})
        : D(f->config.hidden) {
        opt.batch_tokens = batch_tokens;
        opt.threads = 2;
        if (qemb_open(&m, f, ops, &opt, &err)) m = nullptr;
    }
    ~model() { qemb_close(m); }

    /* Vectors of texts, in as few batches as they fit. */
    std::vector<std::vector<float>> embed(const std::vector<std::vector<int32_t>> &texts) {
        std::vector<std::vector<float>> out(texts.size());
        std::vector<int> row(texts.size());
        qemb_batch *b = qemb_batch_new(m);
        for (size_t first = 0, i = 0; first < texts.size(); first = i) {
            qemb_batch_clear(b);
            for (; i < texts.size(); i++)
                if ((row[i] = qemb_pack_add(b, texts[i].data(), (int)texts[i].size())) < 0) break;
            std::vector<float> v((size_t)qemb_batch_rows(b) * D);
            qemb_embed(m, b, v.data());
            for (size_t k = first; k < i; k++)
                out[k].assign(&v[(size_t)row[k] * D], &v[(size_t)row[k] * D] + D);
        }
        qemb_batch_free(b);
        return out;
    }
};

inline qemb_config config(int L, int D, int H, int K, int hd, int F, int max) {
    qemb_config c = {};
    c.n_layers = L, c.hidden = D, c.n_heads = H, c.n_kv_heads = K, c.head_dim = hd, c.ffn = F;
    c.vocab = 300, c.max_positions = max, c.eos_id = 299, c.rope_theta = 1e6f, c.norm_eps = 1e-6f;
    return c;
}

/* What a text's tokens see and what becomes its vector. Qwen3-Embedding's, then the others. */
struct model_mode {
    qemb_attention attention;
    qemb_pooling pooling;
};
constexpr model_mode USUAL = {QEMB_CAUSAL, QEMB_POOL_LAST};
constexpr model_mode OTHER_MODES[] = {{QEMB_BIDIRECTIONAL, QEMB_POOL_MEAN},
                                      {QEMB_BIDIRECTIONAL, QEMB_POOL_LAST},
                                      {QEMB_CAUSAL, QEMB_POOL_MEAN}};
inline void set_mode(qemb_file *f, model_mode m) {
    f->config.attention = m.attention, f->config.pooling = m.pooling;
}

inline std::vector<std::vector<int32_t>> random_texts(const std::vector<int> &lens, int prefix,
                                                      uint64_t seed) {
    rng r = {seed};
    std::vector<int32_t> shared(prefix);
    for (int32_t &id : shared) id = (int32_t)(rng_u64(&r) % 256);
    std::vector<std::vector<int32_t>> texts;
    for (int n : lens) {
        std::vector<int32_t> t = shared;
        for (int i = 0; i < n - 1; i++) t.push_back((int32_t)(rng_u64(&r) % 256));
        t.push_back(299);
        texts.push_back(t);
    }
    return texts;
}

inline void compare(model &cuda, model &cpu, const std::vector<std::vector<int32_t>> &texts,
                    double *worst, double least = MIN_COSINE) {
    std::vector<std::vector<float>> got = cuda.embed(texts), want = cpu.embed(texts);
    for (size_t i = 0; i < texts.size(); i++) {
        const double c = cosine(got[i].data(), want[i].data(), cuda.D);
        *worst = std::min(*worst, c);
        check(c >= least, "text %zu of %zu tokens: cosine %.7f (want %.5f)", i, texts[i].size(), c,
              least);
    }
    check(!qemb_health_of(cuda.m).recomputed, "vectors came from the CPU itself");
}

/* The CUDA table, which tells what it opened. */
inline qemb_backend *spied;
inline int spy_open(qemb_backend **be, const qemb_config *c, const qemb_options *opt,
                    qemb_err *err) {
    const int r = qemb_cuda_ops.open(be, c, opt, err);
    spied = r ? nullptr : *be;
    return r;
}
inline const qemb_ops *spy_ops() {
    static qemb_ops table = qemb_cuda_ops;
    table.open = spy_open;
    return &table;
}

/* The bytes of a section of a model in memory. */
inline uint8_t *section_of(uint8_t *model, const char *name) {
    for (uint8_t *e = model + 4096;; e += 96) {
        uint64_t at;
        memcpy(&at, e + 72, 8);
        if (!strcmp((const char *)e, name)) return model + at;
    }
}

/* What the emulation counts (emu::counters). A device does not count. */
#if defined(QEMB_EMU)
constexpr bool COUNTS = true;
#define COUNTED(what) emu::count.what
#else
constexpr bool COUNTS = false;
#define COUNTED(what) 0L
#endif

/* Batches of one class (rows, texts) share a graph, whatever their texts' lengths and prefix; the
 * third batch on is a replay. Bits as without graphs. */
struct graph_batch {
    std::vector<int> lens;
    int prefix;
};
inline void graph_case(const qemb_config &c, qemb_dtype dtype, const qemb_ops *ops,
                       const std::vector<graph_batch> &batches, long replays, model_mode mode) {
    qemb_file *f = open_model_of(dtype, &c, 43, 1);
    set_mode(f, mode);
    {
        qemb_options opt = {};
        model with(f, ops, 1024, opt);
        opt.no_graphs = 1;
        model without(f, ops, 1024, opt);
        const long before = COUNTED(graph_launches);
        for (const graph_batch &b : batches) {
            const auto texts = random_texts(b.lens, b.prefix, 7 + b.lens[0]);
            const long start = COUNTED(launches);
            const auto got = with.embed(texts);
            const long middle = COUNTED(launches);
            check(got == without.embed(texts), "%zu texts, %d tokens, prefix %d", b.lens.size(),
                  b.lens[0], b.prefix);
            check(middle - start <= COUNTED(launches) - middle, "a graph, and its kernels again");
        }
        const long launched = COUNTED(graph_launches) - before;
        check(!COUNTS || launched == replays, "%ld batches ran as graphs (want %ld)", launched,
              replays);
    }
    qemb_file_close(f);
}
inline void refused(const qemb_config &c, const char *want, int batch_tokens = 64) {
    qemb_file *f = open_model(&c, 51, 1);
    {
        model cuda(f, &qemb_cuda_ops, batch_tokens);
        check(!cuda.m && cuda.err.code && !strcmp(cuda.err.code, "device"),
              "not refused (want \"%s\")", want);
        check(strstr(cuda.err.msg, want), "message \"%s\" (want \"%s\")", cuda.err.msg, want);
    }
    qemb_file_close(f);
}

#if defined(QEMB_EMU)
/* What plan says is what open takes, but for the emulator's pages and the guess about graphs. */
inline void plan_case(const qemb_file *f, const qemb_ops *ops) {
    qemb_options opt = {};
    opt.batch_tokens = 300;
    opt.no_graphs = 1;
    qemb_memory mem;
    qemb_plan(f, ops, &opt, &mem);
    size_t sum = 0, before = 0, after = 0, total = 0;
    for (int i = 0; i < mem.n_parts; i++) sum += mem.parts[i].bytes;
    cudaMemGetInfo(&before, &total);
    {
        model m(f, ops, 300, opt);
        check(m.m, "open: %s", m.err.msg);
        cudaMemGetInfo(&after, &total);
        const size_t taken = before - after;
        check(taken >= sum && taken <= sum + 12 * 4096, "taken %zu bytes, planned %zu", taken, sum);
    }
    opt.no_graphs = 0;
    qemb_plan(f, ops, &opt, &mem);
    bool graphs = false;
    for (int i = 0; i < mem.n_parts; i++)
        graphs = graphs || (strstr(mem.parts[i].what, "graphs") && mem.parts[i].bytes > 0);
    check(graphs, "graphs are not planned");
}
#endif

#endif
