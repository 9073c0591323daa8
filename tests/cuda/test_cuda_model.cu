/* test_cuda_model.cu - the whole forward on the CUDA table: against the CPU path, against what
 * transformers computed (tests/golden), against itself in other batches; and what happens when the
 * device is missing, too small, or fails.
 *
 * The bound on cosines. Every FP16 rounding is off by at most 2^-11, 2^-11 / sqrt(3) RMS, of its
 * number. A layer rounds seven times on the way into the residual stream (two norms, qkv, rope,
 * weights and output of attention; gate and up, h), so the vector's relative error is about sqrt(7
 * L) * 2^-11 / sqrt(3) = 1.5e-3 for L = 4, were each term as large as the stream, and four times
 * that if norms and softmax amplify it: 6e-3. 1 - cosine is half its square, 1.8e-5. One wrong row,
 * position or weight is far beyond that.
 */
#include "cuda_model.h"

#include <dirent.h>
#include <unistd.h>

/* ---- against the CPU path -------------------------------------------------------------------- */

static void lengths_case(int prefix, int batch_tokens) {
    const qemb_config c = config(2, 64, 2, 1, 64, 64, 512);
    qemb_file *f = open_model(&c, 11, 1);
    {
        model cuda(f, &qemb_cuda_ops, batch_tokens), cpu(f, &qemb_cpu_ops, batch_tokens);
        check(cuda.m && cpu.m, "open: %s%s", cuda.err.msg, cpu.err.msg);
        std::vector<int> lens;
        for (int n = 1; n <= 300; n++) lens.push_back(n * 7 % 301); /* 1..300, ragged */
        double worst = 1;
        compare(cuda, cpu, random_texts(lens, prefix, 3), &worst);
        printf("lengths 1..300 behind %d shared tokens: least cosine %.7f\n", prefix, worst);
    }
    qemb_file_close(f);
}
TEST(forward_lengths) { lengths_case(0, 12000); }
TEST(forward_lengths_prefix) { lengths_case(37, 12000); }

TEST_SCHEDULES(forward_shapes) {
    const qemb_config shapes[] = {
        config(3, 96, 2, 2, 64, 128, 200), config(2, 64, 4, 1, 128, 96, 200),
        config(1, 1032, 2, 1, 64, 40, 200), config(4, 64, 8, 1, 64, 8, 200)};
    for (const qemb_config &c : shapes) {
        qemb_file *f = open_model(&c, 21, 1);
        model *cuda = new model(f, &qemb_cuda_ops, 256), *cpu = new model(f, &qemb_cpu_ops, 256);
        double worst = 1;
        if (check(cuda->m && cpu->m, "open: %s%s", cuda->err.msg, cpu->err.msg)) {
            compare(*cuda, *cpu, random_texts({1, 2, 9, 64, 65, 100, 130}, 0, 5), &worst);
            compare(*cuda, *cpu, random_texts({1, 2, 9, 64}, 20, 5), &worst);
        }
        delete cuda;
        delete cpu;
        qemb_file_close(f);
    }
}

/* One long text, 128-row tiles */
TEST(forward_mlp_chunks) {
    const qemb_config c = config(2, 64, 2, 1, 64, 64, 1200);
    qemb_file *f = open_model(&c, 31, 1);
    {
        model cuda(f, &qemb_cuda_ops, 64), cpu(f, &qemb_cpu_ops, 64);
        double worst = 1;
        compare(cuda, cpu, random_texts({1200, 3, 1025}, 0, 7), &worst);
    }
    qemb_file_close(f);
}

/* Errors of rows are as independent as the rows, so a mean's relative error is that of a row. FP8's
 * bound: accuracy_case in test_cuda_quantize.cu. A batch that is a graph and one that is not; both
 * tile sizes, also with Hopper's kernels asked for. */
TEST(forward_modes) {
    const qemb_config c = config(2, 64, 4, 2, 64, 96, 700);
    for (const model_mode &mode : OTHER_MODES) {
        qemb_file *f = open_model(&c, 25, 1);
        set_mode(f, mode);
        for (const qemb_ops *ops : {&qemb_cuda_ops, &qemb_cuda_fp8_ops}) {
            const bool fp8 = ops == &qemb_cuda_fp8_ops;
            if (fp8 && !has_fp8()) continue;
            qemb_options opt = {};
            opt.hopper = 1;
            model cuda(f, ops, 2048, opt), cpu(f, &qemb_cpu_ops, 2048);
            double worst = 1;
            if (!check(cuda.m && cpu.m, "open: %s%s", cuda.err.msg, cpu.err.msg)) continue;
            compare(cuda, cpu, random_texts({1, 2, 64, 65, 130, 600}, 0, 5), &worst,
                    fp8 ? 1 - 2.2e-2 : MIN_COSINE);
            compare(cuda, cpu, random_texts({3, 4, 5}, 7, 6), &worst,
                    fp8 ? 1 - 2.2e-2 : MIN_COSINE);
            printf("attention %d pooling %d %s: least cosine %.7f\n", mode.attention, mode.pooling,
                   ops->name, worst);
        }
        qemb_file_close(f);
    }
}

/* ---- against transformers -------------------------------------------------------------------- */

/* Reads ids and vectors of a golden (tests/fixtures/make_golden.py describes it). */
static bool golden_case_compare(const char *name, double *max_swiglu) {
    const std::string base = std::string("tests/golden/") + name;
    qemb_file *f = nullptr;
    qemb_err err = {};
    FILE *in = fopen((base + ".vec").c_str(), "r");
    if (!check(in && !qemb_file_open(&f, (base + ".qemb").c_str(), &err), "%s: cannot open (%s)",
               name, err.msg)) {
        if (in) fclose(in);
        return false;
    }
    int cases = 0, dim = 0;
    bool ok =
        fscanf(in, "golden 1 model %*s dim %d f32_diff %*a f32_cosine %*a max_swiglu %la cases %d",
               &dim, max_swiglu, &cases) == 3;
    model *cuda = new model(f, spy_ops(), 512);
    ok = check(ok && cuda->m && cases > 0, "%s: %s", name, cuda->m ? "malformed" : cuda->err.msg);
    double worst = 1;
    std::vector<std::vector<int32_t>> texts;
    std::vector<std::vector<float>> want;
    for (int i = 0; i < cases && ok; i++) {
        int bytes = 0, n = 0;
        ok = fscanf(in, " case %*s text %d", &bytes) == 1;
        if (bytes > 0) ok = ok && fscanf(in, "%*s") == 0;
        ok = ok && fscanf(in, " ids %d", &n) == 1;
        std::vector<int32_t> ids(n);
        for (int32_t &id : ids) ok = ok && fscanf(in, "%d", &id) == 1;
        ok = ok && fscanf(in, " norm %*a vec %d", &n) == 1 && n == dim;
        std::vector<float> v(dim);
        for (float &x : v) ok = ok && fscanf(in, "%a", &x) == 1;
        texts.push_back(ids);
        want.push_back(v);
        check(ok, "%s: malformed at case %d", name, i);
    }
    if (ok) {
        std::vector<std::vector<float>> together = cuda->embed(texts);
        for (size_t i = 0; i < texts.size(); i++) {
            const double c = cosine(together[i].data(), want[i].data(), dim);
            worst = std::min(worst, c);
            check(c >= MIN_COSINE, "%s case %zu: cosine %.7f (want %.5f)", name, i, c, MIN_COSINE);
        }
        check(!qemb_health_of(cuda->m).recomputed, "%s: vectors came from the CPU", name);
        check((unsigned long long)health_of(spied).clamped == 0, "%s: %llu SwiGLU outputs clamped",
              name, (unsigned long long)health_of(spied).clamped);
        printf("golden %s: least cosine %.7f over %zu texts\n", name, worst, texts.size());
    }
    delete cuda;
    qemb_file_close(f);
    fclose(in);
    return ok;
}
TEST(golden) {
    double max_swiglu;
    for (const char *name : {"gqa1", "gqa2", "gqa4", "square", "whole", "demo"})
        golden_case_compare(name, &max_swiglu);
}
/* SwiGLU outputs far beyond the largest half: without the shift all is lost */
TEST(golden_massive) {
    double max_swiglu = 0;
    if (golden_case_compare("massive", &max_swiglu))
        check(max_swiglu > 65504, "the golden has no massive activation (got %g)", max_swiglu);
}

/* ---- what FP16 cannot hold ------------------------------------------------------------------- */

/* Token 7 has one number in its row of the table, so that is sqrt(D) = 8 after the norm, and the
 * norm's weight there is 30000: 240000 does not fit FP16 (65504) and is nothing to FP32. Other rows
 * hold at most sqrt(3) there: 52000 fits. */
TEST_SCHEDULES(overflow_is_computed_again) {
    const qemb_config c = config(2, 64, 2, 1, 64, 64, 64);
    char path[64];
    size_t bytes;
    uint8_t *data = make_model(&c, 91, 1, &bytes);
    uint16_t *row = (uint16_t *)section_of(data, "tok_emb") + 7 * 64;
    memset(row, 0, 64 * sizeof *row);
    row[3] = 0x4c00; /* 16 */
    ((float *)section_of(data, "layers.0.attn_norm"))[3] = 30000;
    seal_model(data, bytes);
    write_temporary(path, data, bytes);
    free(data);
    qemb_file *f;
    qemb_err err = {};
    check(!qemb_file_open(&f, path, &err), "%s", err.msg);
    {
        model cuda(f, spy_ops(), 256), cpu(f, qemb_cpu_mapped(), 256);
        std::vector<std::vector<int32_t>> texts = random_texts({5, 20, 33, 9}, 4, 3);
        for (std::vector<int32_t> &t : texts)
            std::replace(t.begin(), t.end(), (int32_t)7, (int32_t)8);
        texts[1][11] = texts[3][6] = 7;
        const std::vector<std::vector<float>> got = cuda.embed(texts), want = cpu.embed(texts);
        for (size_t i : {0, 2}) {
            const double cos = cosine(got[i].data(), want[i].data(), 64);
            check(cos >= MIN_COSINE, "text %zu: cosine %.7f", i, cos);
        }
        check(got[1] == want[1] && got[3] == want[3], "not the CPU's own vectors");
        const unsigned long long n = qemb_health_of(cuda.m).recomputed;
        check(n == 2, "recomputed (got %llu, want 2)", n);
    }
    qemb_file_close(f);
    unlink(path);
}

/* ---- a text's vector is its own -------------------------------------------------------------- */

/* Alone, packed, behind a shared prefix, and with either tile size */
static void same_bits_case(const qemb_ops *ops, model_mode mode) {
    const qemb_config c = config(2, 64, 4, 2, 64, 96, 700);
    qemb_file *f = open_model(&c, 41, 1);
    set_mode(f, mode);
    {
        qemb_options opt = {};
        opt.deterministic = 1;
        model cuda(f, ops, 2048, opt);
        std::vector<std::vector<int32_t>> texts = random_texts({1, 40, 64, 90, 129}, 33, 9);
        for (const std::vector<int32_t> &t : random_texts({5, 600}, 0, 10)) texts.push_back(t);
        std::vector<std::vector<float>> packed = cuda.embed(texts);
        texts.resize(5);
        std::vector<std::vector<float>> shared = cuda.embed(texts);
        for (size_t i = 0; i < texts.size(); i++) {
            std::vector<float> alone = cuda.embed({texts[i]})[0];
            check(alone == packed[i], "text %zu differs when packed", i);
            check(alone == shared[i], "text %zu differs behind a shared prefix", i);
        }
    }
    qemb_file_close(f);
}
TEST_SCHEDULES(same_bits) { same_bits_case(&qemb_cuda_ops, USUAL); }
TEST(same_bits_of_modes) {
    for (const model_mode &mode : OTHER_MODES) {
        same_bits_case(&qemb_cuda_ops, mode);
        if (has_fp8()) same_bits_case(&qemb_cuda_fp8_ops, mode);
    }
}

/* ---- timed algorithms ------------------------------------------------------------------------ */

static std::string read_all(const std::string &path) {
    std::string s;
    FILE *in = fopen(path.c_str(), "r");
    for (int c; in && (c = fgetc(in)) != EOF;) s += (char)c;
    if (in) fclose(in);
    return s;
}
/* The file in dir, which holds only one. */
static std::string only_file(const char *dir) {
    std::string name;
    DIR *d = opendir(dir);
    for (dirent *e; d && (e = readdir(d));)
        if (e->d_name[0] != '.') name = std::string(dir) + "/" + e->d_name;
    if (d) closedir(d);
    return name;
}
/* The fastest algorithm is found, kept, read back; a damaged file is timed anew. The emulated
 * library's fastest one adds the parts of K in FP16, which the program forbids: so 2 is the
 * fastest, in FP8 with fast accumulation. */
static void timed_case(const qemb_ops *ops, double least, int fast) {
    char dir[] = "/tmp/qemb-test-XXXXXX";
    check(mkdtemp(dir), "mkdtemp");
    const qemb_config c = config(2, 64, 2, 1, 64, 96, 64);
    qemb_file *f = open_model(&c, 81, 1);
    qemb_options opt = {};
    opt.cache_dir = dir;
    const std::vector<std::vector<int32_t>> texts = random_texts({3, 30, 64}, 0, 3);
    std::string first;
    for (int round = 0; round < 4; round++) {
        const long before = COUNTED(gemms);
        model cuda(f, ops, 64, opt), cpu(f, &qemb_cpu_ops, 64);
        if (!check(cuda.m, "%s", cuda.err.msg)) break;
        const long timed = COUNTED(gemms) - before;
        const std::string path = only_file(dir), kept = read_all(path);
        if (round == 0) first = kept;
        double worst = 1;
        compare(cuda, cpu, texts, &worst, least);
        if (round == 0 || round == 3) {
            check(!COUNTS || timed > 4 * 3 * 8, "%ld products timed", timed);
            for (size_t at = 0, lines = 0; at < kept.size(); at = kept.find('\n', at) + 1, lines++)
                if (lines >= (round ? 1u : 0u)) {
                    int n, k, add, rows, quick;
                    unsigned long id;
                    check(sscanf(&kept[at], "%d %d %d %d %d %lx", &n, &k, &add, &rows, &quick,
                                 &id) == 6 &&
                              (!COUNTS || (id == 2 && quick == fast)),
                          "line: %.40s", &kept[at]);
                }
            const size_t want = 4 * 3 + (round ? 1 : 0);
            check((size_t)std::count(kept.begin(), kept.end(), '\n') == want,
                  "%zu bytes, want %zu lines", kept.size(), want);
        }
        if (round == 1) check(timed == 0 && kept == first, "%ld products timed again", timed);
        if (round == 2) {
            FILE *out = fopen(path.c_str(), "w"); /* a wrong seal, words missing, no numbers */
            /* A device's library may take any algorithm; the emulated one knows its own. */
            fprintf(out, "256 64 0 16 0 2 1 0 0 0 0 %s\n", COUNTS ? "0 0" : "");
            fclose(out);
        }
    }
    unlink(only_file(dir).c_str());
    rmdir(dir);
    qemb_file_close(f);
}
TEST_SCHEDULES(timed_once) { timed_case(&qemb_cuda_ops, MIN_COSINE, 0); }
/* The bound of accuracy_case in test_cuda_quantize.cu; K is too short for fast accumulation to add
 * to it: four steps, 2^-13 each. */
TEST_SCHEDULES(timed_once_fp8) {
    if (has_fp8()) timed_case(&qemb_cuda_fp8_ops, 1 - 2.2e-2, 1);
}

/* ---- graphs ---------------------------------------------------------------------------------- */

static const qemb_config graph_config = config(2, 64, 2, 1, 64, 64, 700);
TEST_SCHEDULES(graph_same_bits) {
    /* (rows, texts) with the one that fills up, and how often: (32, 2) 20 23 24 30; (16, 2) 9 1 14,
     * and full 2+14; (16, 3) 5+3+4 1+5+2 13+1+1; (32, 1) full 32; the first of each class runs
     * plainly */
    const std::vector<graph_batch> small = {{{20}, 0}, {{9}, 0},    {{23}, 0},    {{1}, 0},
                                            {{32}, 0}, {{24}, 0},   {{3, 4}, 5},  {{2, 14}, 0},
                                            {{30}, 0}, {{5, 2}, 1}, {{1, 1}, 13}, {{14}, 0}};
    for (qemb_dtype dtype : {QEMB_F16, QEMB_I8})
        graph_case(graph_config, dtype, &qemb_cuda_ops, small, 3 + 3 + 2, USUAL);
    if (has_fp8()) graph_case(graph_config, QEMB_F16, &qemb_cuda_fp8_ops, small, 3 + 3 + 2, USUAL);
}
/* (32, 2) 20 23 24; (16, 2) 9 1 14; (16, 3) 5+2 3+4, causal also 5+3+4 and 4+2+3; (640, 2) */
TEST(graph_modes) {
    for (const model_mode &mode : OTHER_MODES) {
        const bool shares = mode.attention == QEMB_CAUSAL;
        std::vector<graph_batch> batches = {{{20}, 0},  {{23}, 0},   {{9}, 0},  {{1}, 0},
                                            {{24}, 0},  {{5, 2}, 0}, {{14}, 0}, {{3, 4}, 0},
                                            {{600}, 0}, {{520}, 0},  {{610}, 0}};
        if (shares) batches.insert(batches.end(), {{{3, 4}, 5}, {{2, 3}, 4}});
        graph_case(graph_config, QEMB_F16, &qemb_cuda_ops, batches, 2 + 2 + 1 + 2 * shares + 2,
                   mode);
    }
}
/* Tiles of both sizes in a graph: (640, 2) and (640, 3) */
TEST(graph_long) {
    graph_case(graph_config, QEMB_F16, &qemb_cuda_ops,
               {{{600}, 0}, {{520}, 0}, {{9, 600}, 3}, {{610}, 0}, {{1, 1}, 560}, {{600, 9}, 0}},
               2 + 2, USUAL);
}
/* Longer, more texts, or another number of rows: no graph, however often */
TEST(graph_bounds) {
    const qemb_config c = config(1, 64, 2, 1, 64, 64, 1200);
    qemb_file *f = open_model(&c, 44, 1);
    {
        model cuda(f, &qemb_cuda_ops, 2048);
        const long before = COUNTED(graph_launches);
        for (int round = 0; round < 3; round++) {
            cuda.embed(random_texts({1030}, 0, 3));
            cuda.embed(random_texts({1, 2, 3, 1, 2, 3}, 0, 3));
        }
        check(COUNTED(graph_launches) == before, "graphs ran");
    }
    qemb_file_close(f);
}
/* Two batches in flight, of one class and of two, some as graphs: the same bits as one by one. A
 * batch's lists are overwritten while the batch before is on its way. */
static void in_flight_case(int no_graphs) {
    const qemb_config c = config(2, 64, 2, 1, 64, 64, 700);
    qemb_file *f = open_model(&c, 46, 1);
    {
        qemb_options opt = {};
        opt.no_graphs = no_graphs;
        model one(f, &qemb_cuda_ops, 700, opt), two(f, &qemb_cuda_ops, 700, opt);
        check(qemb_in_flight(two.m) == 2, "%d in flight", qemb_in_flight(two.m));
        const std::vector<int> lens = {20, 23, 600, 24, 9, 30, 14, 610, 21, 22};
        const auto texts = random_texts(lens, 0, 5);
        std::vector<std::vector<float>> got(lens.size(), std::vector<float>(64));
        qemb_batch *b[2] = {qemb_batch_new(two.m), qemb_batch_new(two.m)};
        for (size_t i = 0; i <= lens.size(); i++) {
            if (i < lens.size()) {
                qemb_batch_clear(b[i % 2]);
                qemb_pack_add(b[i % 2], texts[i].data(), (int)texts[i].size());
                qemb_submit(two.m, b[i % 2], got[i].data());
            }
            if (i) qemb_collect(two.m);
        }
        for (size_t i = 0; i < lens.size(); i++)
            check(one.embed({texts[i]})[0] == got[i], "text %zu of %d tokens", i, lens[i]);
        for (qemb_batch *k : b) qemb_batch_free(k);
    }
    qemb_file_close(f);
}
TEST_SCHEDULES(in_flight) {
    in_flight_case(0);
    in_flight_case(1);
}
#if defined(QEMB_EMU)
/* The driver refuses to record: the batch and all later ones run op by op. */
TEST_SCHEDULES(graph_refused) {
    const emu::device standard = emu::dev;
    const qemb_config c = config(2, 64, 2, 1, 64, 64, 64);
    for (qemb_dtype dtype : {QEMB_F16, QEMB_I8})
        for (int fault = 1; fault <= 4; fault++) {
            qemb_file *f = open_model_of(dtype, &c, 43, 1);
            {
                model with(f, spy_ops(), 256);
                qemb_options opt = {};
                opt.no_graphs = 1;
                model without(f, &qemb_cuda_ops, 256, opt);
                const long before = COUNTED(graph_launches);
                emu::dev.capture_fault = fault;
                for (int n = 20; n < 25; n++) {
                    const auto texts = random_texts({n}, 0, 7);
                    check(with.embed(texts) == without.embed(texts), "%d tokens, fault %d", n,
                          fault);
                    if (n == 22) emu::dev = standard;
                }
                check(!failure_of(spied), "%s", failure_of(spied));
                check(COUNTED(graph_launches) == before, "a graph ran after fault %d", fault);
            }
            qemb_file_close(f);
        }
}
#endif

/* ---- refusals -------------------------------------------------------------------------------- */

TEST(refuse_shapes) {
    refused(config(1, 64, 2, 1, 32, 64, 64), "head size not supported (got 32, want 64 or 128)");
    refused(config(1, 64, 3, 1, 64, 64, 64),
            "query heads per key head not supported (got 3, want a power of two up to 64)");
    refused(config(1, 60, 2, 1, 64, 64, 64), "sizes not supported (got hidden 60, ffn 64");
    refused(config(1, 64, 2, 1, 64, 60, 64), "sizes not supported (got hidden 64, ffn 60");
}

#if defined(QEMB_EMU)
static const qemb_config tiny_config = config(1, 64, 2, 1, 64, 64, 64);

TEST(refuse_device) {
    const emu::device standard = emu::dev;
    {
        qemb_file *f = open_model(&tiny_config, 51, 1);
        qemb_options opt = {};
        opt.device = 1;
        model cuda(f, &qemb_cuda_ops, 64, opt);
        check(!cuda.m && strstr(cuda.err.msg, "GPU: no such device (got 1, want 0..0)"),
              "message \"%s\"", cuda.err.msg);
        qemb_file_close(f);
    }
    emu::dev.driver = false;
    refused(tiny_config, "NVIDIA driver: missing or too old (got one for CUDA 0.0, want ");
    emu::dev = standard;
    emu::dev.count = 0;
    refused(tiny_config, "GPU: none found (no CUDA-capable device is detected)");
    emu::dev = standard;
    emu::dev.major = 7;
    emu::dev.minor = 5;
    refused(tiny_config, "GPU: too old (got compute capability 7.5, want 8.0 or newer)");
    emu::dev = standard;
    emu::dev.image = false;
    refused(tiny_config, "GPU: this build has no code for compute capability 9.0");
    emu::dev = standard;
}
/* Too little for each thing in turn; what was taken is given back */
TEST(refuse_memory) {
    const emu::device standard = emu::dev;
    qemb_file *f = open_model(&tiny_config, 51, 1);
    qemb_memory plan;
    qemb_options opt = {};
    opt.batch_tokens = 64;
    qemb_plan(f, &qemb_cuda_ops, &opt, &plan);
    size_t left = 0, total = 0;
    {
        model cuda(f, &qemb_cuda_ops, 64);
        cudaMemGetInfo(&left, &total);
        check(cuda.m, "open: %s", cuda.err.msg);
        opt.vram = (size_t)20 << 20; /* the user's cap, with memory left */
        model capped(f, &qemb_cuda_ops, 64, opt);
        check(!capped.m &&
                  strstr(capped.err.msg, "for cuBLASLt's workspace (got 3 MiB left, want 32 MiB)"),
              "vram: %s", capped.err.msg);
    }
    size_t weights = 0, table = 0;
    for (int i = 0; i < plan.n_parts; i++) {
        if (strstr(plan.parts[i].what, "weights of the layers")) weights = plan.parts[i].bytes;
        if (strstr(plan.parts[i].what, "embedding table")) table = plan.parts[i].bytes;
    }
    const auto pages = [](size_t n) { return (n + 4095) / 4096 * 4096; };
    const size_t all = total - left - pages(table), before_weights = all - pages(weights);
    const struct {
        size_t memory;
        const char *what;
    } cases[] = {{(size_t)1 << 20, "for the upload of weights"},
                 {(size_t)20 << 20, "for cuBLASLt's workspace"},
                 {before_weights - 4096, "for the activations"},
                 {all - 4096, "for the weights"}};
    for (const auto &k : cases) {
        emu::dev.memory = k.memory;
        refused(tiny_config, k.what);
        cudaMemGetInfo(&left, &total);
        check(left == total, "%zu bytes are not freed", total - left);
    }
    emu::dev = standard;
    qemb_file_close(f);
}
/* In the middle of a run: NaN, which the engine above never returns, and a reason */
TEST(device_fails) {
    qemb_file *f = open_model(&tiny_config, 61, 1);
    {
        model cuda(f, spy_ops(), 64);
        std::vector<std::vector<int32_t>> texts = random_texts({5, 9}, 0, 3);
        check(!failure_of(spied), "%s", failure_of(spied));
        check(!std::isnan(cuda.embed(texts)[1][3]), "fails before it should");
        emu::dev.fault = cudaErrorIllegalAddress;
        for (const std::vector<float> &v : cuda.embed(texts))
            for (float x : v) check(std::isnan(x), "a number from a failed device: %g", (double)x);
        const char *why = failure_of(spied);
        check(why && strstr(why, "GPU: ") && strstr(why, " failed ("), "failure: %s",
              why ? why : "none");
        emu::dev.fault = cudaSuccess;
        for (const std::vector<float> &v : cuda.embed(texts))
            for (float x : v) check(std::isnan(x), "a failed device came back");
    }
    qemb_file_close(f);
}
/* ---- the plan -------------------------------------------------------------------------------- */

TEST(plan_is_what_open_takes) {
    const qemb_config c = config(3, 96, 2, 1, 64, 160, 200);
    for (qemb_dtype dtype : {QEMB_F16, QEMB_I8}) {
        qemb_file *f = open_model_of(dtype, &c, 45, 1);
        plan_case(f, &qemb_cuda_ops);
        plan_case(f, &qemb_cuda_fp8_ops);
        qemb_file_close(f);
    }
}

TEST(hot_path_allocates_nothing) {
    qemb_file *f = open_model(&tiny_config, 71, 1);
    {
        model cuda(f, &qemb_cuda_ops, 256);
        const long before = emu::count.allocations;
        cuda.embed(random_texts({1, 2, 3, 40, 64, 64}, 0, 3));
        check(emu::count.allocations == before, "%ld allocations", emu::count.allocations - before);
    }
    qemb_file_close(f);
}
/* The embedding table stays in pinned memory where it does not fit beside the reserve, or the cap:
 * the same bits. */
TEST_SCHEDULES(table_in_pinned_memory) {
    const emu::device standard = emu::dev;
    const qemb_config c = config(2, 64, 2, 1, 64, 64, 64);
    qemb_file *f = open_model(&c, 72, 1);
    const size_t table = (size_t)c.vocab * 64 * sizeof(uint16_t);
    size_t before = 0, beside = 0, capped = 0, low = 0, total = 0;
    cudaMemGetInfo(&before, &total);
    {
        model on_device(f, &qemb_cuda_ops, 64);
        cudaMemGetInfo(&beside, &total);
        const auto texts = random_texts({3, 30, 64, 1}, 0, 3);
        const auto want = on_device.embed(texts);
        qemb_options opt = {};
        opt.vram = before - beside - table / 2;
        model cap(f, &qemb_cuda_ops, 64, opt);
        cudaMemGetInfo(&capped, &total);
        check(cap.m && cap.embed(texts) == want, "capped: %s", cap.err.msg);
        emu::dev.memory = 3 * (before - beside) + ((size_t)512 << 20) - table * 3 / 2;
        model little(f, &qemb_cuda_ops, 64);
        cudaMemGetInfo(&low, &total);
        check(little.m && little.embed(texts) == want, "little memory: %s", little.err.msg);
        const auto pages = [](size_t n) { return (n + 4095) / 4096 * 4096; };
        check(beside - capped == before - beside - pages(table), "the cap is not kept");
        check(capped - (low + standard.memory - emu::dev.memory) == beside - capped,
              "the reserve is not kept");
    }
    emu::dev = standard;
    qemb_file_close(f);
}

/* The defaults of batch_tokens and mlp_rows double where there is memory for it. */
TEST(batch_by_memory) {
    const emu::device standard = emu::dev;
    const qemb_config c = config(1, 1024, 2, 1, 64, 4096, 64);
    qemb_file *f = open_model(&c, 73, 1);
    qemb_options opt = {};
    qemb_memory mem;
    qemb_plan(f, &qemb_cuda_ops, &opt, &mem);
    check(mem.batch_tokens == 16384, "%d rows in 8 GiB", mem.batch_tokens);
    size_t sum = 0;
    for (int i = 0; i < mem.n_parts; i++) sum += mem.parts[i].bytes;
    emu::dev.memory = sum + sum / 16;
    qemb_plan(f, &qemb_cuda_ops, &opt, &mem);
    check(mem.batch_tokens == 8192, "%d rows where a sixteenth is not left", mem.batch_tokens);
    emu::dev.memory = sum + sum / 14;
    qemb_plan(f, &qemb_cuda_ops, &opt, &mem);
    check(mem.batch_tokens == 16384, "%d rows where it is", mem.batch_tokens);
    opt.batch_tokens = 500;
    qemb_plan(f, &qemb_cuda_ops, &opt, &mem);
    check(mem.batch_tokens == 500, "%d rows, not the 500 asked for", mem.batch_tokens);
    emu::dev = standard;
    qemb_file_close(f);
}
#endif
