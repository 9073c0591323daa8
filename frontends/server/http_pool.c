/* http_pool.c - threads that decompress, parse, tokenize and format; see request.h. */
#include "request.h"

#include "frontends/console.h"

#include <stdlib.h>
#include <string.h>

typedef struct {
    request *first, *last;
} list;

struct pool {
    http *h;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    list started, finished; /* finished goes first: it frees memory and answers those who wait */
    int stopping;
    int idle; /* threads that wait */
    int n;    /* threads */
    pthread_t threads[];
};

static void add(pool *p, list *l, request *r) {
    pthread_mutex_lock(&p->lock);
    r->next = NULL;
    *(l->last ? &l->last->next : &l->first) = r;
    l->last = r;
    const int wakes = p->idle > 0;
    pthread_mutex_unlock(&p->lock);
    if (wakes) pthread_cond_signal(&p->changed);
}

static request *take(list *l) {
    request *r = l->first;
    if (r && !(l->first = r->next)) l->last = NULL;
    return r;
}

void pool_work(pool *p, request *r) { add(p, &p->started, r); }
void pool_finish(pool *p, request *r) { add(p, &p->finished, r); }

static void *pool_main(void *arg) {
    pool *p = arg;
    for (;;) {
        pthread_mutex_lock(&p->lock);
        p->idle++;
        while (!p->started.first && !p->finished.first && !p->stopping)
            pthread_cond_wait(&p->changed, &p->lock);
        p->idle--;
        request *done = take(&p->finished), *r = done ? done : take(&p->started);
        pthread_mutex_unlock(&p->lock);
        if (!r) return NULL;
        if (done) http_finish_work(r);
        if (!done && !request_work(r)) continue;
        http_end_work(r);
        api_request_free(&r->api);
        request_drop_body(r);
        connections_answer(p->h->connections, r);
    }
}

pool *pool_start(http *h) {
    const int n = h->opt.http_threads;
    pool *p = need(calloc(1, sizeof *p + (size_t)n * sizeof *p->threads));
    p->h = h;
    pthread_mutex_init(&p->lock, NULL);
    pthread_cond_init(&p->changed, NULL);
    for (; p->n < n; p->n++) {
        const int error = pthread_create(&p->threads[p->n], NULL, pool_main, p);
        if (error) DIE(STATUS_MODEL, "thread: cannot start it (%s)", strerror(error));
    }
    return p;
}

void pool_free(pool *p) {
    pthread_mutex_lock(&p->lock);
    p->stopping = 1;
    pthread_cond_broadcast(&p->changed);
    pthread_mutex_unlock(&p->lock);
    for (int i = 0; i < p->n; i++) pthread_join(p->threads[i], NULL);
    pthread_mutex_destroy(&p->lock);
    pthread_cond_destroy(&p->changed);
    free(p);
}
