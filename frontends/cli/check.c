/* check.c - the check command: a model's scores of published examples; see cli.h. */
#include "cli.h"

#include "frontends/console.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

/* Texts of an example: each query with each document. */
typedef struct {
    const char *const *queries, *const *documents;
    int n_queries, n_documents;
} example;
/* clang-format off */
#define EXAMPLE(queries, documents) {queries, documents, LENGTH(queries), LENGTH(documents)}
/* clang-format on */

/* The example of Qwen3's model cards of both kinds. */
static const char task[] =
    "Given a web search query, retrieve relevant passages that answer the query";
static const char *const queries[] = {"What is the capital of China?", "Explain gravity"};
static const char *const documents[] = {
    "The capital of China is Beijing.",
    "Gravity is a force that attracts two bodies towards each other. It gives weight to physical "
    "objects and is responsible for the movement of planets around the sun."};
static const example qwen3_card = EXAMPLE(queries, documents);

/* That of BGE-M3's card, as it is written there. */
static const char *const m3_queries[] = {"What is BGE M3?", "Defination of BM25"};
static const char *const m3_documents[] = {
    "BGE M3 is an embedding model supporting dense retrieval, lexical matching and multi-vector "
    "interaction.",
    "BM25 is a bag-of-words retrieval function that ranks a set of documents based on the query "
    "terms appearing in each document"};
static const example m3_card = EXAMPLE(m3_queries, m3_documents);

/* The example of sentence-transformers' tests of rerankers. */
static const char *const planet_queries[] = {"Which planet is known as the Red Planet?"};
static const char *const planet_documents[] = {
    "Venus is often called Earth's twin because of its similar size and proximity.",
    "Mars, known for its reddish appearance, is often referred to as the Red Planet.",
    "Jupiter, the largest planet in our solar system, has a prominent red spot.",
    "Saturn, famous for its rings, is sometimes mistaken for the Red Planet."};
static const example planets = EXAMPLE(planet_queries, planet_documents);

enum { SCORES = 4 }; /* of an example: those of its first query, then of its second */

typedef struct {
    const char *name;
    qemb_kind kind;
    qemb_architecture architecture;
    qemb_pooling pooling;
    const example *texts;
    int layers, hidden, heads, ffn;
    double score[SCORES]; /* of texts: cosines, or logits */
    double tolerance;
} known_model;

/* clang-format off */
static const known_model known_models[] = {
    /* computed by transformers in FP32: FP32 has to agree closely */
    {"Qwen3-Embedding-0.6B", QEMB_EMBEDDING, QEMB_QWEN3, QEMB_POOL_LAST, &qwen3_card,
     28, 1024, 16, 3072,
     {0.7645568251609802, 0.14142508804798126, 0.13549736142158508, 0.5999549627304077}, 1e-5},
    /* published, with four digits or from 16-bit runs */
    {"Qwen3-Embedding-4B", QEMB_EMBEDDING, QEMB_QWEN3, QEMB_POOL_LAST, &qwen3_card,
     36, 2560, 32, 9728,
     {0.7534, 0.1147, 0.0320, 0.6258}, 3e-3},
    {"Qwen3-Embedding-8B", QEMB_EMBEDDING, QEMB_QWEN3, QEMB_POOL_LAST, &qwen3_card,
     36, 4096, 32, 12288,
     {0.7493016123771667, 0.0750647559762001, 0.08795969933271408, 0.6318399906158447}, 3e-3},
    {"BGE-M3", QEMB_EMBEDDING, QEMB_BERT, QEMB_POOL_FIRST, &m3_card,
     24, 1024, 16, 4096,
     {0.6265, 0.3477, 0.3499, 0.678}, 1e-3},
    /* sentence-transformers 6.2.0, tests/cross_encoder/test_model.py, FP32, and its tolerance */
    {"Qwen3-Reranker-0.6B", QEMB_RERANKER, QEMB_QWEN3, QEMB_POOL_LAST, &planets,
     28, 1024, 16, 3072,
     {-3.109297752380371, 7.120389938354492, -0.3787546157836914, 3.541637420654297}, 1e-4},
};
/* clang-format on */

static const known_model *find_known(const qemb_file *f) {
    const qemb_config *c = &f->config;
    const char *query = qemb_file_prompt(f, "query");
    const int has_prompt = query && *query;
    for (int i = 0; i < LENGTH(known_models); i++) {
        const known_model *k = &known_models[i];
        /* Other encoders have BGE-M3's shape, and prompts. */
        if (k->architecture == QEMB_BERT && has_prompt) continue;
        if (k->kind == c->kind && k->architecture == c->architecture && k->pooling == c->pooling &&
            k->layers == c->n_layers && k->hidden == c->hidden && k->heads == c->n_heads &&
            k->ffn == c->ffn)
            return k;
    }
    return NULL;
}

static void print_texts(const example *e) {
    for (int i = 0; i < e->n_queries; i++) printf("q%d  %s\n", i, e->queries[i]);
    for (int i = 0; i < e->n_documents; i++) printf("d%d  %s\n", i, e->documents[i]);
}

/* Prints the scores, beside the expected ones if known is not NULL. Returns whether they are
 * within its tolerance. */
static int print_scores(const example *e, const double score[SCORES], const known_model *known) {
    int within = 1;
    printf("%18s%s\n", "score", known ? "    expected  difference" : "");
    for (int i = 0; i < SCORES; i++) {
        printf("q%d.d%d %12.7f", i / e->n_documents, i % e->n_documents, score[i]);
        if (known) {
            const double d = score[i] - known->score[i];
            if (!(d <= known->tolerance && d >= -known->tolerance)) within = 0;
            printf("%12.7f%12.1e", known->score[i], d);
        }
        putchar('\n');
    }
    return within;
}

/* unit (dim) = the normalized vector of a query, for `task` if the model has tasks, or of a
 * document. */
static void embed_example(const qemb_file *f, qemb_model *m, record_tokenizer *t, const char *text,
                          int is_query, float *unit) {
    record_ids ids = {0};
    qemb_err err;
    const size_t len = strlen(text), task_len = is_query ? sizeof task - 1 : 0; /* 0: no prompt */
    const char *prompt = qemb_file_prompt(f, is_query ? "query" : "document");
    if (!prompt) prompt = "";
    if (t->task_end ? tokenize_text(t, text, len, task, task_len, &ids, &err)
                    : tokenize_behind(t, prompt, strlen(prompt), text, len, &ids, &err))
        DIE(STATUS_MODEL, "%s", err.msg);
    if (embed_ids(m, t->dim, &ids, unit, t->dim))
        DIE(STATUS_MODEL, "the example: a vector without a finite length");
}

/* score = the cosines of the example. */
static void compute_cosines(const example *e, const qemb_file *f, qemb_model *m,
                            record_tokenizer *t, double score[SCORES]) {
    const int n = e->n_queries, all = n + e->n_documents;
    const size_t dim = (size_t)t->dim;
    float *unit = need(malloc((size_t)all * dim * sizeof *unit));
    for (int i = 0; i < all; i++)
        embed_example(f, m, t, i < n ? e->queries[i] : e->documents[i - n], i < n, unit + i * dim);
    for (int i = 0; i < SCORES; i++) {
        const float *q = unit + i / e->n_documents * dim;
        const float *d = unit + (n + i % e->n_documents) * dim;
        score[i] = 0;
        for (size_t k = 0; k < dim; k++) score[i] += (double)q[k] * (double)d[k];
    }
    free(unit);
}

/* score = the logits of the example. */
static void compute_logits(const example *e, qemb_model *m, record_tokenizer *t,
                           double score[SCORES]) {
    qemb_batch *b = need(qemb_batch_new(m));
    for (int i = 0; i < SCORES; i++) {
        const char *q = e->queries[i / e->n_documents], *d = e->documents[i % e->n_documents];
        const text_pair pair = {task, q, d, sizeof task - 1, strlen(q), strlen(d)};
        record_ids ids = {0};
        qemb_err err;
        float logit;
        if (tokenize_pair(t, &pair, 0, &ids, &err)) DIE(STATUS_MODEL, "%s", err.msg);
        qemb_batch_clear(b);
        qemb_pack_add(b, ids.ids, ids.n);
        qemb_embed(m, b, &logit);
        if (qemb_health_of(m).failure) DIE(STATUS_MODEL, "%s", qemb_health_of(m).failure);
        if (!isfinite(logit)) DIE(STATUS_MODEL, "the example: a score that is not finite");
        score[i] = logit;
    }
    qemb_batch_free(b);
}

int check_model(const qemb_file *f, qemb_model *m, record_tokenizer *t, int with_texts) {
    const int ranks = f->config.kind == QEMB_RERANKER;
    const known_model *known = find_known(f);
    const example *card = known && !ranks ? known->texts : &qwen3_card;
    double score[SCORES];
    int within;
    if (with_texts) print_texts(card);
    if (ranks)
        compute_logits(card, m, t, score);
    else
        compute_cosines(card, f, m, t, score);
    within = print_scores(card, score, ranks ? NULL : known); /* no card has a reranker's */
    if (ranks) {
        if (with_texts) print_texts(&planets);
        compute_logits(&planets, m, t, score);
        within = print_scores(&planets, score, known);
        printf("A score is a logit: the probability is 1 / (1 + exp(-score)).\n");
    }
    if (!known)
        printf("No expected scores are known for a model of this shape.\n");
    else if (within)
        printf("Within the scores of %s (tolerance %g)\n", known->name, known->tolerance);
    else
        printf("OUT of the scores of %s (tolerance %g), or a model trained from it\n", known->name,
               known->tolerance);
    return within;
}
