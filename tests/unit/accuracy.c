/* accuracy.c - the error of each arithmetic, compared with an exact computation.
 *
 *   accuracy [--exact NAME] [--texts N] [--tokens N] MODEL.qemb...
 *
 * Prints a Markdown table with one row per model and ops table of this machine. It embeds N texts
 * of random tokens (equal seeds give equal texts) and compares the unit vectors with exact ones:
 * least and mean cosine, largest and mean relative L2 error, largest error of a number. Exact is
 * the oracle in double precision, or the ops table NAME for models where the oracle would take
 * hours. An INT8 file is compared with the file of the same name without "-int8", if there is one.
 */
#include "emulated_amx.h"
#include "oracle.h"
#include "oracle_encoder.h"
#include "support.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { SPECIAL = 4 }; /* "<s>", "<pad>", "</s>" and "<unk>" */
static int texts = 5, tokens = 24;

static void die(const char *what) {
    fprintf(stderr, "accuracy: %s\n", what);
    exit(1);
}

static qemb_file *open_path(const char *path) {
    qemb_file *f;
    qemb_err err;
    if (qemb_file_open(&f, path, &err)) die(err.msg);
    return f;
}

/* ids (texts, tokens). An encoder's first tokens are special, a decoder's last ones. */
static int32_t *random_texts(const qemb_config *c) {
    int32_t *ids = malloc(sizeof *ids * (size_t)texts * (size_t)tokens);
    const int is_bert = c->architecture == QEMB_BERT, low = is_bert ? SPECIAL : 0;
    const int end = is_bert ? c->vocab : c->eos_id;
    rng r = {1};
    for (int i = 0; i < texts * tokens; i++)
        if ((i + 1) % tokens == 0)
            ids[i] = c->eos_id;
        else if (is_bert && i % tokens == 0)
            ids[i] = c->bos_id;
        else
            ids[i] = low + (int32_t)(rng_u64(&r) % (uint64_t)(end - low));
    return ids;
}

/* out (texts, D): unit vectors; of a NULL table, the oracle's */
static void embed(double *out, const qemb_file *f, const qemb_ops *ops, const int32_t *ids) {
    const qemb_config *c = &f->config;
    const size_t D = (size_t)c->hidden;
    qemb_model *m = NULL;
    qemb_err err;
    if (ops && qemb_open(&m, f, ops, NULL, &err)) die(err.msg);
    float *one = malloc(D * sizeof *one);
    for (int i = 0; i < texts; i++) {
        double length = 0, *v = out + (size_t)i * D;
        if (ops) {
            qemb_batch *b = qemb_batch_new(m);
            qemb_pack_add(b, ids + i * tokens, tokens);
            qemb_embed(m, b, one);
            qemb_batch_free(b);
            for (size_t d = 0; d < D; d++) v[d] = one[d];
        } else if (c->architecture == QEMB_BERT) {
            oracle_encode(v, c, &f->weights, ids + i * tokens, tokens);
        } else {
            oracle_embed(v, NULL, c, &f->weights, ids + i * tokens, tokens);
        }
        for (size_t d = 0; d < D; d++) length += v[d] * v[d];
        for (size_t d = 0; d < D; d++) v[d] /= sqrt(length);
    }
    free(one);
    qemb_close(m);
}

static void compare(const char *model, const char *name, const double *got, const double *want,
                    size_t D) {
    double least = 2, mean = 0, worst = 0, l2_mean = 0, largest = 0;
    for (int i = 0; i < texts; i++) {
        double dot = 0, off = 0;
        for (size_t d = 0; d < D; d++) {
            const double a = got[i * D + d], b = want[i * D + d];
            dot += a * b, off += (a - b) * (a - b);
            if (!(fabs(a - b) <= largest)) largest = fabs(a - b); /* NaN too */
        }
        if (!(dot >= least)) least = dot;
        if (!(sqrt(off) <= worst)) worst = sqrt(off);
        mean += dot / texts, l2_mean += sqrt(off) / texts;
    }
    printf("| %s | %s | %.7f | %.7f | %.1e | %.1e | %.1e |\n", model, name, least, mean, worst,
           l2_mean, largest);
    fflush(stdout);
}

/* name-int8.qemb -> name.qemb, if that is there */
static const char *original(const char *path) {
    static char other[4096];
    const char *at = strstr(path, "-int8.qemb");
    if (!at ||
        (size_t)snprintf(other, sizeof other, "%.*s.qemb", (int)(at - path), path) >= sizeof other)
        return path;
    return access(other, R_OK) ? path : other;
}

static void run(const char *path, const char *exact_name) {
    const qemb_ops *exact = NULL;
    for (int i = 0; exact_name && test_table(i); i++)
        if (!strcmp(test_table(i)->name, exact_name)) exact = test_table(i);
    if (exact_name && !exact) die("--exact: no such table here");
    qemb_file *f = open_path(path), *truth = open_path(original(path));
    if (f->config.dense_rows) { /* every table computes it alike, and the oracle has none */
        fprintf(stderr, "%s: left out: it has a dense layer\n", path);
        qemb_file_close(f), qemb_file_close(truth);
        return;
    }
    const char *slash = strrchr(path, '/'), *base = slash ? slash + 1 : path;
    const size_t D = (size_t)f->config.hidden;
    double *want = malloc(sizeof *want * (size_t)texts * D),
           *got = malloc(sizeof *got * (size_t)texts * D);
    int32_t *ids = random_texts(&truth->config);
    embed(want, truth, exact, ids);
    for (int i = 0; test_table(i); i++) {
        if (test_table(i) == exact && truth->map_bytes == f->map_bytes) continue;
        embed(got, f, test_table(i), ids);
        compare(base, test_table(i)->name, got, want, D);
    }
    free(want), free(got), free(ids);
    qemb_file_close(f), qemb_file_close(truth);
}

int main(int argc, char **argv) {
    const char *exact = NULL;
    int i = 1;
    for (; i + 1 < argc && !strncmp(argv[i], "--", 2); i += 2)
        if (!strcmp(argv[i], "--exact"))
            exact = argv[i + 1];
        else if (!strcmp(argv[i], "--texts"))
            texts = atoi(argv[i + 1]);
        else if (!strcmp(argv[i], "--tokens"))
            tokens = atoi(argv[i + 1]);
        else
            die("usage: accuracy [--exact NAME] [--texts N] [--tokens N] MODEL.qemb...");
    if (i >= argc || texts < 1 || tokens < 1)
        die("usage: accuracy [--exact NAME] [--texts N] [--tokens N] MODEL.qemb...");
    printf("| model | table | least cosine | mean | largest relative L2 | mean | largest error |\n"
           "|---|---|---|---|---|---|---|\n");
    for (; i < argc; i++) run(argv[i], exact);
    return 0;
}
