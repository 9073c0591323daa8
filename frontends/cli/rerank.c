/* rerank.c - the rerank command: queries with documents to documents by score; see cli.h.
 *
 * A record of the pipeline is one document. In JSON lines, the reader thread parses a line, lists
 * it as a `request` and gives its documents one by one; the writer thread puts their scores into
 * the oldest request and prints it after its last document. Without JSON there is one query, and
 * every line is a document; the writer keeps all lines until the end.
 */
#include "cli.h"
#include "hits.h"

#include "frontends/console.h"
#include "frontends/ranking.h"

#include <inttypes.h>
#include <pthread.h>
#include <stdlib.h>
#include <unistd.h>

/* A line of JSON. One without documents, or with an error, goes through the pipeline as one
 * document. */
typedef struct request {
    struct request *next;
    char *id; /* (id_len) */
    size_t id_len;
    size_t n, top_n; /* documents; results wanted, at most n */
    ranked *results; /* (n) */
    size_t *cut;     /* (n) bytes of each document that truncation removed */
    uint64_t tokens;
    qemb_err err; /* of the line, or of its first document that has no score; code NULL: none */
} request;

/* The reader thread calls next, bytes and tokenize, the writer thread the others. */
typedef struct {
    const options *opt;
    pipeline *p;
    input *in;

    /* The reader's: the line whose documents are given. */
    input_parser *parser;
    input_record line;
    input_ranking ranking;
    request *current;
    size_t next_document;

    pthread_mutex_t lock;
    request *oldest, **end; /* under the lock: the requests that are read and not printed */

    /* The writer's. */
    output out;
    best_hits lines; /* without JSON */
    uint64_t texts, tokens, computed, batches, truncated, errors;
    progress progress;
} reranking;

/* ---- the reader: documents ------------------------------------------------------------------- */

/* Lists the line that was read as the newest request. */
static void add_request(reranking *w) {
    request *q = need(calloc(1, sizeof *q));
    input_ranking *r = &w->ranking;
    if (w->line.too_large)
        qemb_fail(&q->err, "out_of_memory", "record: no memory for a line so long");
    else if (!input_parse_ranking(w->parser, w->line.text, w->line.len, r, &q->err))
        q->err.code = NULL;
    q->id = need(malloc(r->id_len + 1));
    q->id_len = r->id_len;
    if (r->id_len) memcpy(q->id, r->id, r->id_len);
    q->n = q->err.code ? 0 : r->n_documents;
    q->top_n = r->top_n ? r->top_n : (size_t)w->opt->best;
    if (!q->top_n || q->top_n > q->n) q->top_n = q->n;
    q->results = need(calloc(q->n + 1, sizeof *q->results));
    q->cut = need(calloc(q->n + 1, sizeof *q->cut));
    w->current = q;
    w->next_document = 0;
    pthread_mutex_lock(&w->lock);
    *w->end = q;
    w->end = &q->next;
    pthread_mutex_unlock(&w->lock);
}

/* Gives the next document of the line, or of the next line. from->offset counts the documents. */
static input_status next_document(void *self, int wait, input_record *r, origin *from) {
    reranking *w = self;
    if (w->opt->query) return input_next(w->in, wait, r);
    if (!w->current) {
        w->ranking = (input_ranking){0};
        const input_status status = input_next(w->in, wait, &w->line);
        if (status != INPUT_RECORD) return status;
        add_request(w);
    }
    const size_t n = w->current->n, i = w->next_document++;
    *r = (input_record){.line = w->line.line};
    if (i < n) r->text = input_document(w->parser, i, &r->len);
    from->offset = i;
    if (i + 1 >= n) w->current = NULL;
    return INPUT_RECORD;
}

static uint64_t bytes_read(void *self) {
    const reranking *w = self;
    return input_consumed(w->in);
}

static int tokenize(void *self, record_tokenizer *t, const input_record *r, record_ids *out,
                    qemb_err *err) {
    reranking *w = self;
    const input_ranking *q = &w->ranking;
    text_pair pair = {.query = q->query,
                      .query_len = q->query_len,
                      .task = q->instruct,
                      .task_len = q->instruct_len,
                      .document = r->text,
                      .document_len = r->len};
    *out = (record_ids){.dim = 1};
    if (w->opt->query) {
        pair.query = w->opt->query, pair.query_len = strlen(pair.query);
        if (r->too_large)
            return qemb_fail(err, "out_of_memory", "line: no memory for a line so long");
    } else if (!r->text) { /* a line without documents; the request has its error */
        return qemb_fail(err, "bad_record", "record: no documents");
    }
    return tokenize_pair(t, &pair, 0, out, err);
}

/* ---- the writer: scores ---------------------------------------------------------------------- */

static float shown(const reranking *w, float logit) {
    return w->opt->raw_scores ? logit : ranking_score(logit);
}

static void print_request(reranking *w, request *q, uint64_t line) {
    const output_head head = {.id = q->id, .id_len = q->id_len, .line = line};
    if (q->err.code) {
        w->errors++;
        output_error(&w->out, &head, q->err.code, q->err.msg, strlen(q->err.msg));
        return;
    }
    ranking_sort(q->results, q->n);
    char *p = output_room(&w->out, output_head_room(&head) + 64);
    output_wrote(&w->out, put(output_put_head(p, &head), ",\"results\":["));
    for (size_t i = 0; i < q->top_n; i++) {
        const ranked *r = &q->results[i];
        p = output_room(&w->out, 96 + 2 * FORMAT_UINT_ROOM + FORMAT_FLOAT_ROOM);
        p = format_uint(put(p, i ? ",{\"index\":" : "{\"index\":"), r->index);
        p = format_float(put(p, ",\"relevance_score\":"), shown(w, r->logit));
        if (q->cut[r->index]) p = format_uint(put(p, ",\"truncated_bytes\":"), q->cut[r->index]);
        output_wrote(&w->out, put(p, "}"));
    }
    p = output_room(&w->out, 32 + FORMAT_UINT_ROOM);
    output_wrote(&w->out, put(format_uint(put(p, "],\"tokens\":"), q->tokens), "}\n"));
}

static void drop_oldest(reranking *w) {
    pthread_mutex_lock(&w->lock);
    request *q = w->oldest;
    w->oldest = q->next;
    if (!w->oldest) w->end = &w->oldest;
    pthread_mutex_unlock(&w->lock);
    free(q->id);
    free(q->results);
    free(q->cut);
    free(q);
}

static void take_document(reranking *w, const result *r) {
    pthread_mutex_lock(&w->lock);
    request *q = w->oldest;
    pthread_mutex_unlock(&w->lock);
    const size_t i = r->from.offset;
    if (i < q->n && r->unit)
        q->results[i] = (ranked){i, *r->unit}, q->cut[i] = r->cut_bytes;
    else if (i < q->n && !q->err.code && !strcmp(r->code, "query_too_long"))
        qemb_fail(&q->err, r->code, "%.*s", (int)r->message_len, r->message);
    else if (i < q->n && !q->err.code)
        qemb_fail(&q->err, r->code, "documents[%zu]: %.*s", i, (int)r->message_len, r->message);
    q->tokens += (uint64_t)r->tokens;
    if (i + 1 < q->n) return;
    print_request(w, q, r->head.line);
    drop_oldest(w);
}

static void take_line(reranking *w, const result *r) {
    if (!r->unit) {
        if (w->errors++ < ERRORS_SHOWN)
            say("line %" PRIu64 ": %s: %.*s", r->head.line, r->code, (int)r->message_len,
                r->message);
        return;
    }
    best_offer(
        &w->lines,
        &(hit){.score = *r->unit, .order = r->head.line, .text = r->text, .len = r->text_len});
}

static void take_record(void *self, const result *r) {
    reranking *w = self;
    w->texts += r->unit != NULL;
    w->truncated += r->unit && r->cut_bytes;
    w->tokens += (uint64_t)r->tokens;
    if (w->opt->query)
        take_line(w, r);
    else
        take_document(w, r);
}

static void begin_batch(void *self, const batch_totals *b) {
    reranking *w = self;
    w->batches += b->rows > 0;
    w->computed += b->tokens_computed;
}

static void end_batch(void *self, const batch_totals *b) {
    reranking *w = self;
    output_flush(&w->out);
    progress_show(&w->progress, w->texts, w->tokens, b->bytes);
}

static void print_lines(reranking *w) {
    const int terminal = isatty(STDOUT_FILENO);
    best_sort(&w->lines);
    for (size_t i = 0; i < w->lines.n; i++) {
        const hit *h = &w->lines.heap[i];
        char *p = output_room(&w->out, FORMAT_FLOAT_ROOM + h->len + 2);
        p = put(format_float(p, shown(w, h->score)), "\t");
        p = terminal ? put_printable(p, h->text, h->len) : put_bytes(p, h->text, h->len);
        *p++ = w->opt->null_separated ? '\0' : '\n';
        output_wrote(&w->out, p);
    }
    output_flush(&w->out);
    best_free(&w->lines);
}

/* ---- the command ----------------------------------------------------------------------------- */

static void print_summary(const reranking *w) {
    if (w->errors) say("%" PRIu64 " %s failed", w->errors, w->opt->query ? "lines" : "records");
    if (!w->opt->stats) return;
    const double seconds = seconds_now() - w->progress.start;
    say("%" PRIu64 " documents, %" PRIu64 " tokens in %.3f s (%.1f documents/s)", w->texts,
        w->tokens, seconds, per_second(w->texts, seconds));
    say("%" PRIu64 " batches, %" PRIu64 " tokens computed: those that texts of a batch share, "
        "once; %" PRIu64 " truncated",
        w->batches, w->computed, w->truncated);
    pipeline_say_devices(w->p);
}

int rerank_stream(const options *o, qemb_model *const *m, record_tokenizer *t) {
    reranking w = {.opt = o, .p = pipeline_new(o, m, 1, t), .lines.most = SIZE_MAX};
    const stream s = {.self = &w,
                      .keep_texts = o->query != NULL,
                      .logits = 1,
                      .next = next_document,
                      .tokenize = tokenize,
                      .bytes = bytes_read,
                      .batch_begin = begin_batch,
                      .record = take_record,
                      .batch_end = end_batch};
    if (o->best) w.lines.most = (size_t)o->best;
    w.end = &w.oldest;
    pthread_mutex_init(&w.lock, NULL);
    w.in = need(input_new(STDIN_FILENO, catch_signals(), o->null_separated ? '\0' : '\n'));
    w.parser = need(input_parser_new(0, 1));
    progress_open(&w.progress, progress_wanted(o), 0);
    output_open(&w.out, STDOUT_FILENO, FORMAT_JSON, 1);
    w.out.nul_ended = o->query && o->null_separated;
    const int failed = pipeline_run(w.p, &s);
    if (o->query && !failed) print_lines(&w);
    output_flush(&w.out);
    if (failed) {
        print_summary(&w);
        pipeline_die(w.p);
    }
    output_close(&w.out);
    say_progress("");
    if (w.oldest) say("stopped before all documents of a record were ranked: it is left out");
    while (w.oldest) drop_oldest(&w);
    print_summary(&w);
    const int failed_read = *input_error(w.in) != 0;
    if (failed_read) say("standard input: cannot read (%s)", input_error(w.in));
    pthread_mutex_destroy(&w.lock);
    input_parser_free(w.parser);
    pipeline_free(w.p);
    input_free(w.in);
    end_by_signal(); /* so that the parent sees the signal as the cause */
    if (failed_read) return STATUS_USAGE;
    return w.errors && !o->errors_ok ? STATUS_RECORDS : STATUS_GOOD;
}
