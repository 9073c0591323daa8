/* test_serve_queue.c - the server's queue: order of batches, shared texts, limits, cancellation and
 * shutdown. */
#include "frontends/server/queue.h"
#include "frontends/console.h"
#include "support.h"

#include <criterion/criterion.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define BATCH     64 /* tokens; texts of up to 8 are short */
#define MAX_TEXTS 16
#define NEVER     1e12 /* a deadline, as seconds_now */

typedef struct {
    pending_request request; /* must be first */
    int told, gone;
} client;

static qemb_file *file;
static qemb_model *model;
static qemb_batch *batch;
static queue *q;
static metrics *counters;
static text *taken[BATCH];
static queue_refusal no; /* of the last request that was refused */

static void setup(void) {
    qemb_err err;
    const qemb_options opt = {.batch_tokens = BATCH, .max_tokens = 200, .threads = 1};
    qemb_config c = small_configs[0];
    c.max_positions = 200;
    file = open_model(&c, 1, 1);
    cr_assert(!qemb_open(&model, file, &qemb_cpu_ops, &opt, &err), "%s", err.msg);
    batch = qemb_batch_new(model);
    counters = metrics_new();
    q = queue_new(1000, BATCH, BATCH / 8, counters);
}

static void teardown(void) {
    queue_free(q);
    metrics_free(counters);
    qemb_batch_free(batch);
    qemb_close(model);
    qemb_file_close(file);
}

TestSuite(serve_queue, .init = setup, .fini = teardown);

static void told(pending_request *t) { ((client *)t)->told++; }
static int departed(pending_request *t) { return ((client *)t)->gone; }

/* A client with texts of these lengths. name distinguishes them from those of other clients. */
static client *client_new(char name, const int *lengths, int n) {
    client *c = calloc(1, sizeof *c);
    c->request = (pending_request){.texts = calloc((size_t)n, sizeof(pending_text)),
                                   .n = n,
                                   .deadline = NEVER,
                                   .done = told,
                                   .departed = departed};
    for (int i = 0; i < n; i++) {
        uint8_t key[KEY_BYTES] = {(uint8_t)name, (uint8_t)i};
        text *t = c->request.texts[i].text = text_new(key, lengths[i]);
        /* one id tells the texts of a test apart, as their keys do: with 26 names and seven texts
         * of one token each, 182 of the 300 ids */
        for (int k = 0; k < lengths[i]; k++) t->ids[k] = k ? i : name - 'a' + 26 * (i % 7);
    }
    return c;
}

static void client_free(client *c) {
    pending_request_clear(&c->request);
    free(c);
}

static int submit(client *c) {
    int shared = 0;
    return queue_submit(q, &c->request, &shared, &no) ? -1 : shared;
}

/* Takes a batch and compares its texts with want, "a0 b1 ..." */
static int take(const char *want) {
    char got[BATCH * 4] = "";
    qemb_batch_clear(batch);
    const int n = queue_take(q, batch, taken);
    for (int i = 0; i < n; i++)
        sprintf(got + strlen(got), i ? " %c%d" : "%c%d", taken[i]->key[0], taken[i]->key[1]);
    cr_expect_str_eq(got, want);
    cr_expect_eq(qemb_batch_rows(batch), n);
    return n;
}

/* Finishes the batch with n vectors; each holds one number, its row. */
static void finish(int n) {
    vector *v[BATCH];
    for (int i = 0; i < n; i++) v[i] = vector_new(&(float){(float)i}, 1);
    queue_finish(q, taken, v, n, TEXT_NOT_FINITE);
    for (int i = 0; i < n; i++) vector_drop(v[i]);
}

static client *ask(char name, int n, const int *lengths) {
    client *c = client_new(name, lengths, n);
    cr_assert_geq(submit(c), 0);
    return c;
}
#define ASK(name, ...) ask(name, LENGTH(((const int[]){__VA_ARGS__})), (const int[]){__VA_ARGS__})

Test(serve_queue, what_waits_goes_together) {
    client *a = ASK('a', 4, 5), *b = ASK('b', 3);
    const queue_depth d = queue_depth_of(q);
    cr_expect(d.texts == 3 && d.tokens == 12 && d.requests == 2);
    finish(take("a0 b0 a1"));
    cr_expect(a->told == 1 && b->told == 1);
    cr_expect_eq(a->request.state, REQUEST_DONE);
    cr_expect_eq(a->request.texts[0].vector->v[0], 0);
    cr_expect_eq(a->request.texts[1].vector->v[0], 2);
    cr_expect_eq(b->request.texts[0].vector->v[0], 1);
    cr_expect_eq(queue_depth_of(q).tokens, 0);
    client_free(a);
    client_free(b);
}

Test(serve_queue, requests_take_turns) {
    /* Each client contributes eight tokens per round. The batch is full before a's last text. */
    client *a = ASK('a', 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4), *b = ASK('b', 8, 8), *c = ASK('c', 4);
    int n = take("a0 a1 b0 c0 a2 a3 b1 a4 a5 a6 a7 a8 a9 a10");
    cr_expect_gt(n, 0);
    finish(n);
    cr_expect(!a->told && b->told && c->told);
    finish(take("a11"));
    cr_expect(a->told);
    client_free(a);
    client_free(b);
    client_free(c);
}

Test(serve_queue, long_and_short_texts_alternate) {
    client *a = ASK('a', 150, 150, 150), *b = ASK('b', 5), *c;
    finish(take("b0")); /* short texts first; the long one does not fit */
    c = ASK('c', 5);
    finish(take("a0")); /* now the long text is due */
    finish(take("c0"));
    client *d = ASK('d', 5);
    finish(take("a1"));
    finish(take("d0"));
    finish(take("a2"));
    cr_expect(a->told && b->told && c->told && d->told);
    client_free(a);
    client_free(b);
    client_free(c);
    client_free(d);
}

Test(serve_queue, long_texts_fill_what_is_left) {
    client *a = ASK('a', 30), *b = ASK('b', 8, 8), *c = ASK('c', 40), *d = ASK('d', 15);
    finish(take("b0 b1 a0 d0")); /* c does not fit, d does */
    finish(take("c0"));
    client_free(a);
    client_free(b);
    client_free(c);
    client_free(d);
}

Test(serve_queue, long_texts_take_turns) {
    client *a = ASK('a', 40, 40, 40), *b = ASK('b', 40, 40);
    finish(take("a0"));
    finish(take("b0")); /* it was passed over, so it is first */
    finish(take("a1"));
    finish(take("b1"));
    finish(take("a2"));
    client_free(a);
    client_free(b);
}

Test(serve_queue, long_texts_fill_a_batch) {
    client *a = ASK('a', 20, 20, 20), *b = ASK('b', 9);
    finish(take("a0 b0 a1"));
    finish(take("a2"));
    client_free(a);
    client_free(b);
    a = ASK('a', 20, 20, 20);
    finish(take("a0 a1 a2"));
    client_free(a);
}

/* A client with n documents for its query: pairs of five tokens and three of their own. */
static client *ask_to_rank(char name, int n) {
    int lengths[BATCH];
    for (int i = 0; i < n; i++) lengths[i] = 8;
    client *c = client_new(name, lengths, n);
    for (int i = 0; i < n; i++)
        for (int k = 0; k < 8; k++)
            c->request.texts[i].text->ids[k] = k < 5 ? name : k == 5 ? i : 26;
    cr_assert_geq(submit(c), 0);
    return c;
}

/* The packer refuses a document of another query, not for want of room. The batch goes on with the
 * documents that share theirs: 5 + 3 x 19 of its 64 rows. */
Test(serve_queue, documents_of_a_query_share_a_batch) {
    queue_free(q);
    q = queue_new(1000, BATCH, BATCH / 2, counters);
    client *a = ask_to_rank('a', 25), *b = ask_to_rank('b', 4), *c = ask_to_rank('c', 4);
    finish(take("a0 a1 a2 a3 a4 a5 a6 a7 a8 a9 a10 a11 a12 a13 a14 a15 a16 a17 a18"));
    finish(take("b0 b1 b2 b3")); /* they were passed over first */
    cr_expect(!a->told && b->told && !c->told);
    finish(take("c0 c1 c2 c3"));
    finish(take("a19 a20 a21 a22 a23 a24"));
    cr_expect(a->told && c->told);
    client_free(a);
    client_free(b);
    client_free(c);
}

Test(serve_queue, equal_texts_are_computed_once) {
    client *a = ASK('a', 4, 5), *b = client_new('a', (int[]){4, 5, 6}, 3);
    cr_expect_eq(submit(b), 2);
    cr_expect_eq(queue_depth_of(q).tokens, 15);
    const int n = take("a0 a1 a2");
    client *late = client_new('a', (int[]){4}, 1); /* joins the batch in progress */
    cr_expect_eq(submit(late), 1);
    cr_expect_eq(queue_depth_of(q).tokens, 0);
    finish(n);
    cr_expect(a->told == 1 && b->told == 1 && late->told == 1);
    cr_expect_eq(a->request.texts[1].vector, b->request.texts[1].vector);
    cr_expect_eq(a->request.texts[0].vector, late->request.texts[0].vector);
    client_free(a);
    client_free(b);
    client_free(late);
}

Test(serve_queue, one_text_twice_in_a_request) {
    client *a = client_new('a', (int[]){4, 4}, 2);
    memset(a->request.texts[1].text->key, 0, KEY_BYTES);
    memcpy(a->request.texts[1].text->key, a->request.texts[0].text->key, KEY_BYTES);
    cr_expect_eq(submit(a), 1);
    finish(take("a0"));
    cr_expect_eq(a->told, 1);
    cr_expect_eq(a->request.texts[0].vector, a->request.texts[1].vector);
    client_free(a);
}

Test(serve_queue, texts_with_vectors_wait_for_nothing) {
    client *a = client_new('a', (int[]){4, 5}, 2);
    for (int i = 0; i < 2; i++) {
        free(a->request.texts[i].text);
        a->request.texts[i].text = NULL;
        a->request.texts[i].vector = vector_new(&(float){7}, 1);
    }
    cr_expect_eq(submit(a), 0);
    cr_expect(a->told == 1 && a->request.state == REQUEST_DONE);
    client_free(a);
}

Test(serve_queue, a_text_without_a_vector) {
    client *a = ASK('a', 4, 5);
    const int n = take("a0 a1");
    vector *v[2] = {vector_new(&(float){1}, 1), NULL};
    queue_finish(q, taken, v, n, TEXT_NOT_FINITE);
    vector_drop(v[0]);
    cr_expect(a->told && !a->request.texts[0].failed && a->request.texts[1].failed);
    client_free(a);
}

Test(serve_queue, bounded_in_tokens) {
    client *a = client_new('a', (int[]){200, 200, 200, 200, 190}, 5);
    cr_expect_eq(submit(a), 0);
    client *b = client_new('b', (int[]){11}, 1), *c = client_new('c', (int[]){10}, 1);
    cr_expect(submit(b) == -1 && no.why == QUEUE_FULL && no.retry_after >= 1);
    cr_expect_eq(b->request.state, REQUEST_NEW);
    cr_expect_eq(submit(c), 0);
    cr_expect_geq(queue_retry_after(q), 1);
    queue_stop(q);
    client_free(a);
    client_free(b);
    client_free(c);
}

Test(serve_queue, an_empty_queue_takes_every_request) {
    client *a = ASK('a', 200, 200, 200, 200, 200, 200);
    queue_stop(q);
    client_free(a);
}

Test(serve_queue, departed_clients_are_dropped) {
    client *a = ASK('a', 4, 5), *b = client_new('a', (int[]){4}, 1), *c = ASK('c', 3);
    submit(b);
    a->gone = c->gone = 1;
    finish(take("a0")); /* b still wants it */
    cr_expect(a->told == 1 && a->request.state == REQUEST_GONE);
    cr_expect(c->told == 1 && c->request.state == REQUEST_GONE);
    cr_expect(b->told == 1 && b->request.state == REQUEST_DONE);
    cr_expect_eq(queue_depth_of(q).texts, 0);
    client_free(a);
    client_free(b);
    client_free(c);
}

static void stop_queue(pending_request *t) {
    told(t);
    queue_stop(q);
}

/* With an idle queue, clients that left are notified before the computing thread waits again. */
Test(serve_queue, departed_clients_are_told_at_once, .timeout = 60) {
    client *a = ASK('a', 4);
    a->request.done = stop_queue; /* otherwise queue_take would wait forever */
    a->gone = 1;
    cr_expect_eq(queue_take(q, batch, taken), 0);
    cr_expect(a->told == 1 && a->request.state == REQUEST_GONE);
    client_free(a);
}

Test(serve_queue, leaving_while_it_is_computed) {
    client *a = ASK('a', 4);
    const int n = take("a0");
    a->gone = 1;
    queue_tick(q, 0);
    cr_expect(a->told == 1 && a->request.state == REQUEST_GONE);
    client_free(a);
    finish(n);
    client *b = ASK('a', 4); /* no longer in flight: computed again */
    finish(take("a0"));
    client_free(b);
}

/* A request expires while it waits, and not once a batch has taken one of its texts. */
Test(serve_queue, deadlines) {
    client *a = ASK('a', 60, 60), *b = client_new('b', (int[]){5}, 1);
    a->request.deadline = 100, b->request.deadline = 50;
    submit(b);
    queue_tick(q, 49);
    cr_expect(!a->told && !b->told);
    queue_tick(q, 50);
    cr_expect(!a->told && b->told == 1 && b->request.state == REQUEST_EXPIRED);
    const int n = take("a0");
    client *late = client_new('a', (int[]){60}, 1); /* it shares what is being computed */
    late->request.deadline = 100;
    cr_expect_eq(submit(late), 1);
    queue_tick(q, 101);
    cr_expect(!a->told && !late->told);
    finish(n);
    queue_tick(q, 101); /* its second text waits */
    cr_expect(!a->told && late->request.state == REQUEST_DONE);
    finish(take("a1"));
    cr_expect(a->told == 1 && a->request.state == REQUEST_DONE);
    client_free(a);
    client_free(b);
    client_free(late);
}

/* ---- what can be done in time ---------------------------------------------------------------- */

/* Waits until that many seconds have passed by the queue's clock. */
static void pass(double seconds) {
    const double until = seconds_now() + seconds;
    while (seconds_now() < until) usleep(1000);
}

/* Has a batch of 60 tokens take at least `seconds`. Returns the least rate that the queue can have
 * measured. */
static double measure(double seconds) {
    const double start = seconds_now();
    client *m = ASK('m', 60);
    const int n = take("m0");
    pass(seconds);
    finish(n);
    client_free(m);
    return 60 / (seconds_now() - start);
}

/* Submits a request for a deadline `left` seconds from now. */
static int submit_for(client *c, double left) {
    c->request.deadline = seconds_now() + left;
    return submit(c);
}

/* Expects that c is refused for the sake of others if its deadline leaves time for `tokens`. On a
 * busy machine that may pass before the queue looks: then it is tried again. */
static void expect_late(client *c, double tokens, long long all) {
    const double rate = no.rate;
    do cr_assert_eq(submit_for(c, tokens / rate), -1);
    while (no.why == QUEUE_LARGE);
    cr_expect(no.why == QUEUE_LATE && no.tokens == all, "%d, %lld", no.why, no.tokens);
    cr_expect_geq(no.retry_after, 1);
}

/* A rate r is at most 60/0.2 and at least `least`. So 100 tokens take between 100/300 and
 * 100/least seconds. */
Test(serve_queue, what_cannot_be_done_in_time_is_refused) {
    client *c = client_new('c', (int[]){100}, 1);
    cr_expect_eq(submit_for(c, 1e-3), 0, "no rate is known");
    queue_tick(q, NEVER);
    cr_expect_eq(c->request.state, REQUEST_EXPIRED);
    client_free(c);

    const double least = measure(0.2), most = 100 / least;
    client *large = client_new('l', (int[]){100}, 1), *fits = client_new('f', (int[]){100}, 1);
    cr_expect_eq(submit_for(large, 100.0 / 300 - 0.01), -1);
    cr_expect(no.why == QUEUE_LARGE && no.tokens == 100 && no.retry_after >= 1);
    cr_expect(no.rate <= 300 && no.rate >= least, "%g, want %g .. 300", no.rate, least);
    cr_expect(fabs(no.seconds - 100 / no.rate) < 1e-9);
    cr_expect_eq(large->request.state, REQUEST_NEW);
    cr_expect_eq(submit_for(fits, 2 * most + 1), 0);

    /* One of 100 tokens behind it takes twice as long; one of 8 waits for a turn of 8. */
    expect_late(large, 150, 200);
    client *small = client_new('s', (int[]){8}, 1);
    expect_late(small, 12, 16);
    cr_expect_eq(submit_for(small, 20 / least + 1), 0);
    queue_stop(q);
    client_free(large), client_free(fits), client_free(small);
}

/* What is being computed counts, up to a batch: a longer text lets others pass. */
Test(serve_queue, what_is_being_computed_counts) {
    measure(0.2);
    client *a = ASK('a', 150), *b = client_new('b', (int[]){8}, 1);
    const int n = take("a0");
    cr_expect_eq(submit_for(b, 1e-3), -1); /* sets the rate */
    expect_late(b, 40, BATCH + 8);
    finish(n);
    cr_expect_eq(submit_for(b, 9), 0);
    queue_stop(q);
    client_free(a), client_free(b);
}

/* After the time that its batch takes, that counts no more, though it is not finished yet. */
Test(serve_queue, what_is_done_by_now_counts_no_more) {
    measure(0.2);
    client *a = ASK('a', 60), *b = client_new('b', (int[]){8}, 1);
    const int n = take("a0");
    cr_expect_eq(submit_for(b, 1e-3), -1); /* sets the rate */
    const double rate = no.rate;
    pass(60 / rate);
    int refused;
    do refused = submit_for(b, 40 / rate);
    while (refused && no.tokens == 8); /* the time passed before the queue looked */
    cr_expect_eq(refused, 0, "%lld tokens", no.tokens);
    queue_stop(q);
    finish(n);
    client_free(a), client_free(b);
}

/* A batch below a sixteenth of a full one tells nothing: its rate is that of reading weights. */
Test(serve_queue, small_batches_are_no_measure) {
    client *a = ASK('a', 3), *b = client_new('b', (int[]){100}, 1);
    const int n = take("a0");
    pass(0.05);
    finish(n);
    cr_expect_eq(submit_for(b, 1e-3), 0);
    queue_stop(q);
    client_free(a), client_free(b);
}

/* ---- between two steps of a long text -------------------------------------------------------- */

/* Takes a batch between steps and compares it with want. */
static int take_between(const char *want, text **between) {
    char got[BATCH * 4] = "";
    qemb_batch_clear(batch);
    const int n = queue_take_between(q, batch, between);
    for (int i = 0; i < n; i++)
        sprintf(got + strlen(got), i ? " %c%d" : "%c%d", between[i]->key[0], between[i]->key[1]);
    cr_expect_str_eq(got, want);
    return n;
}

static void finish_between(text **between, int n) {
    vector *v[BATCH];
    for (int i = 0; i < n; i++) v[i] = vector_new(&(float){(float)i}, 1);
    queue_finish(q, between, v, n, TEXT_NOT_FINITE);
    for (int i = 0; i < n; i++) vector_drop(v[i]);
}

Test(serve_queue, what_fits_a_batch_goes_between_steps) {
    text *between[BATCH];
    client *a = ASK('a', 150);
    const int n = take("a0");
    cr_expect_eq(take_between("", between), 0);
    client *b = ASK('b', 150), *c = ASK('c', 5), *d = ASK('d', BATCH), *e = ASK('e', BATCH + 1);
    finish_between(between, take_between("c0", between));
    finish_between(between, take_between("d0", between)); /* long, but no longer than a batch */
    cr_expect_eq(take_between("", between), 0);
    cr_expect(!a->told && c->told && d->told);
    finish(n);
    cr_expect(a->told && !b->told && !e->told);
    finish(take("e0"));
    finish(take("b0"));
    client_free(a), client_free(b), client_free(c), client_free(d), client_free(e);
}

/* The time of a batch between steps is its own, so b's 5 tokens do not get the 0.3 s before them.
 * In the end a's 0.4 s are back, and b's tokens and seconds count 0.95 times. */
Test(serve_queue, a_batch_between_steps_has_its_own_time) {
    text *between[BATCH];
    client *a = ASK('a', 150), *c = client_new('c', (int[]){100}, 1);
    const double start = seconds_now();
    const int n = take("a0");
    client *b = ASK('b', 5);
    pass(0.3);
    const double before = seconds_now();
    const int k = take_between("b0", between);
    finish_between(between, k);
    const double after = seconds_now() - before;
    cr_expect_eq(submit_for(c, -NEVER), -1);
    cr_expect_geq(no.rate, 5 / after);
    pass(0.1);
    finish(n);
    cr_expect_eq(submit_for(c, -NEVER), -1);
    const double all = seconds_now() - start;
    cr_expect(no.rate > (0.95 * 5 + 150) / all && no.rate < 155 / (0.95 * 0.4), "%g", no.rate);
    client_free(a), client_free(b), client_free(c);
}

/* Then a goes on, with the 0.3 s that it had. */
Test(serve_queue, a_batch_between_steps_is_given_back) {
    text *between[BATCH];
    client *a = ASK('a', 150), *c = client_new('c', (int[]){100}, 1);
    const double start = seconds_now();
    const int n = take("a0");
    client *b = ASK('b', 5);
    pass(0.3);
    queue_give_back(q, between, take_between("b0", between));
    pass(0.1);
    finish(n);
    const double all = seconds_now() - start;
    cr_expect_eq(submit_for(c, -NEVER), -1);
    cr_expect(no.rate >= 150 / all && no.rate <= 150 / 0.4, "%g", no.rate);
    finish(take("b0"));
    cr_expect_eq(b->request.state, REQUEST_DONE);
    client_free(a), client_free(b), client_free(c);
}

Test(serve_queue, a_text_that_nobody_waits_for_is_given_up) {
    client *a = ASK('a', 150), *b = client_new('a', (int[]){150}, 1);
    int n = take("a0");
    cr_expect_eq(queue_is_wanted(q, taken, n), 1);
    a->gone = 1;
    queue_tick(q, 0);
    cr_expect_eq(queue_is_wanted(q, taken, n), 0);
    cr_expect_eq(submit(b), 1); /* it comes too late to be seen, and is not lost */
    queue_give_back(q, taken, n);
    finish(take("a0"));
    cr_expect_eq(b->request.state, REQUEST_DONE);
    client *c = ASK('c', 150);
    n = take("c0");
    c->gone = 1;
    queue_tick(q, 0);
    queue_give_back(q, taken, n);
    cr_expect_eq(queue_depth_of(q).texts, 0);
    client_free(a), client_free(b), client_free(c);
}

Test(serve_queue, the_end) {
    client *a = ASK('a', 4), *b = client_new('b', (int[]){5}, 1);
    queue_stop(q);
    cr_expect(a->told == 1 && a->request.state == REQUEST_STOPPED);
    cr_expect(submit(b) == -1 && no.why == QUEUE_STOPPED);
    cr_expect_eq(queue_take(q, batch, taken), 0);
    client_free(a);
    client_free(b);
}

/* ---- several computing threads --------------------------------------------------------------- */

Test(serve_queue, texts_given_back_come_first) {
    client *a = ASK('a', 4, 5), *b = ASK('b', 3), *gone = ASK('g', 4);
    const int n = take("a0 b0 g0 a1");
    client *late = ASK('l', 2), *shares = client_new('a', (int[]){4}, 1);
    cr_expect_eq(submit(shares), 1);
    gone->gone = 1;
    queue_tick(q, 0);
    cr_expect_eq(gone->request.state, REQUEST_GONE);
    queue_give_back(q, taken, n);
    const queue_depth d = queue_depth_of(q);
    cr_expect(d.texts == 4 && d.tokens == 14 && d.requests == 4);
    finish(take("a0 b0 l0 a1")); /* nobody waits for g's any more */
    cr_expect(a->told == 1 && b->told == 1 && late->told == 1 && shares->told == 1);
    client *again = ASK('g', 4); /* it is not in flight either */
    finish(take("g0"));
    client_free(a);
    client_free(b);
    client_free(gone);
    client_free(late);
    client_free(shares);
    client_free(again);
}

Test(serve_queue, given_back_while_another_batch_computes) {
    client *a = ASK('a', 60, 60);
    text *first[BATCH];
    const int n = take("a0");
    memcpy(first, taken, sizeof first);
    finish(take("a1")); /* as another thread would */
    cr_expect(!a->told);
    queue_give_back(q, first, n);
    finish(take("a0"));
    cr_expect(a->told && a->request.texts[0].vector && a->request.texts[1].vector);
    client_free(a);
}

Test(serve_queue, given_back_after_the_end) {
    client *a = ASK('a', 4);
    const int n = take("a0");
    queue_stop(q);
    cr_expect_eq(a->request.state, REQUEST_STOPPED);
    queue_give_back(q, taken, n);
    cr_expect_eq(queue_depth_of(q).texts, 0);
    client_free(a);
}

static void *take_once(void *arg) {
    qemb_batch *b = qemb_batch_new(model);
    text *texts[BATCH];
    *(int *)arg = queue_take(q, b, texts);
    vector *v[BATCH] = {NULL};
    queue_finish(q, texts, v, *(int *)arg, TEXT_NOT_FINITE);
    qemb_batch_free(b);
    return NULL;
}

Test(serve_queue, only_full_batches_without_waiting, .timeout = 60) {
    client *a = ASK('a', 30, 30);
    cr_expect_eq(queue_try_take(q, BATCH, batch, taken), 0);
    client *b = ASK('b', 8);
    const int n = queue_try_take(q, BATCH, batch, taken);
    cr_expect_eq(n, 2); /* b0 and a0 */
    finish(n);
    cr_expect_eq(queue_try_take(q, BATCH, batch, taken), 0);
    queue_stop(q);
    cr_expect_eq(queue_try_take(q, 0, batch, taken), 0);
    client_free(a);
    client_free(b);
}

/* A request of two batches, two threads that wait: the first one wakes the second. Each takes one
 * batch, so neither can take the other's. */
Test(serve_queue, a_request_for_two_threads, .timeout = 60) {
    pthread_t threads[2];
    int n[2] = {0};
    for (int i = 0; i < 2; i++) pthread_create(&threads[i], NULL, take_once, &n[i]);
    sched_yield();
    client *a = ASK('a', 60, 60);
    for (int i = 0; i < 2; i++) pthread_join(threads[i], NULL);
    cr_expect(n[0] == 1 && n[1] == 1 && a->told == 1);
    client_free(a);
}

/* Many clients, some of which leave early, and several computing threads, which give every eighth
 * batch back: each client is notified once. */

enum { N_CLIENTS = 400, N_COMPUTERS = 3 };

static void *computer(void *arg) {
    rng r = {(uint64_t)(uintptr_t)arg};
    qemb_batch *b[2] = {qemb_batch_new(model), qemb_batch_new(model)};
    text *texts[2][BATCH];
    vector *v[BATCH];
    int n[2], done = 0;
    while (!done) {
        n[0] = queue_take(q, b[0], texts[0]);
        n[1] = queue_try_take(q, 20, b[1], texts[1]);
        done = !n[0];
        for (int k = 0; k < 2; k++) {
            if (!n[k]) continue;
            for (int i = 0; i < n[k]; i++) v[i] = vector_new(&(float){(float)i}, 1);
            if (rng_u64(&r) % 8)
                queue_finish(q, texts[k], v, n[k], TEXT_NOT_FINITE);
            else
                queue_give_back(q, texts[k], n[k]);
            for (int i = 0; i < n[k]; i++) vector_drop(v[i]);
            qemb_batch_clear(b[k]);
        }
    }
    for (int k = 0; k < 2; k++) qemb_batch_free(b[k]);
    return NULL;
}

static atomic_int n_told;
static void told_counting(pending_request *t) {
    ((client *)t)->told++;
    atomic_fetch_add(&n_told, 1);
}

static client *asked[2][N_CLIENTS];

static void *asker(void *arg) {
    client **c = arg;
    rng r = {(uint64_t)(c == asked[0]) + 1};
    for (int i = 0; i < N_CLIENTS; i++) {
        int lengths[3];
        for (int k = 0; k < 3; k++) lengths[k] = 1 + (int)(rng_u64(&r) % (k ? 8 : 100));
        c[i] = client_new((char)(rng_u64(&r) % 20 + 'a'), lengths, 3);
        /* a key identifies one text: each length needs its own */
        for (int k = 0; k < 3; k++) c[i]->request.texts[k].text->key[2] = (uint8_t)lengths[k];
        c[i]->gone = !(rng_u64(&r) % 8);
        c[i]->request.deadline = rng_u64(&r) % 8 ? NEVER : NEVER / 4;
        c[i]->request.done = told_counting;
        while (submit(c[i]) < 0) sched_yield();
        if (!(i % 16)) queue_tick(q, NEVER / 2);
    }
    queue_tick(q, NEVER / 2);
    while (queue_depth_of(q).requests) sched_yield(); /* some may not have been notified */
    return NULL;
}

Test(serve_queue, every_request_ends_once) {
    pthread_t compute[N_COMPUTERS], ask_thread[2];
    for (int i = 0; i < N_COMPUTERS; i++)
        pthread_create(&compute[i], NULL, computer, (void *)(uintptr_t)(i + 1));
    for (int i = 0; i < 2; i++) pthread_create(&ask_thread[i], NULL, asker, asked[i]);
    for (int i = 0; i < 2; i++) pthread_join(ask_thread[i], NULL);
    queue_stop(q);
    for (int i = 0; i < N_COMPUTERS; i++) pthread_join(compute[i], NULL);
    cr_expect_eq(atomic_load(&n_told), 2 * N_CLIENTS);
    for (int i = 0; i < 2 * N_CLIENTS; i++) {
        client *c = asked[i / N_CLIENTS][i % N_CLIENTS];
        int vectors = 0; /* one that left early has some of them, not all */
        for (int k = 0; k < 3; k++) vectors += c->request.texts[k].vector != NULL;
        cr_expect_eq(c->told, 1);
        cr_expect_eq(c->request.state == REQUEST_DONE, vectors == 3);
        client_free(c);
    }
}
