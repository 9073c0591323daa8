/* threads.c - the threads that run a table's ops.
 *
 * A job is a number of items. The caller and its helpers take them one by one. The caller waits for
 * the helpers that have taken an item, but not for those that have not: on a busy machine a helper
 * may not run for milliseconds, and the others then do its share. (OpenMP's barriers wait for all
 * threads, and by spinning: that left a quarter of the speed when other programs ran.)
 */
#include "cpu.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

struct cpu_pool {
    pthread_mutex_t lock; /* of all but next */
    pthread_cond_t posted, left;
    atomic_uint jobs;  /* jobs posted so far; spinning helpers watch it */
    atomic_int inside; /* helpers at work on the current job */
    atomic_int next;   /* the next item to take */
    int open, sleeping, quit, items, n;
    cpu_work *run;
    const void *job;
    struct helper {
        struct cpu_pool *pool;
        pthread_t id;
        int thread;
    } helpers[];
};

static inline void pause_spinning(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

enum { SPINS = 1000 }; /* about 20 microseconds: longer than the time between two ops */

static void take_items(struct cpu_pool *p, int thread) {
    for (int i; (i = atomic_fetch_add(&p->next, 1)) < p->items;)
        p->run(p->job, (work_item){i, thread});
}

static void *helper_main(void *arg) {
    const struct helper *h = arg;
    struct cpu_pool *p = h->pool;
    unsigned seen = 0;
    for (;;) {
        for (int i = 0; i < SPINS && atomic_load(&p->jobs) == seen; i++) pause_spinning();
        pthread_mutex_lock(&p->lock);
        p->sleeping++;
        while (!p->quit && !(p->open && p->jobs != seen)) pthread_cond_wait(&p->posted, &p->lock);
        p->sleeping--;
        if (p->quit) break;
        seen = p->jobs;
        p->inside++;
        pthread_mutex_unlock(&p->lock);
        take_items(p, h->thread);
        pthread_mutex_lock(&p->lock);
        if (--p->inside == 0) pthread_cond_signal(&p->left);
        pthread_mutex_unlock(&p->lock);
    }
    pthread_mutex_unlock(&p->lock);
    return NULL;
}

void cpu_parallel(struct cpu_pool *p, int items, cpu_work *run, const void *job) {
    if (!p || items == 1) {
        for (int i = 0; i < items; i++) run(job, (work_item){i, 0});
        return;
    }
    pthread_mutex_lock(&p->lock);
    p->run = run;
    p->job = job;
    p->items = items;
    p->next = 0;
    p->open = 1;
    p->jobs++;
    if (p->sleeping) pthread_cond_broadcast(&p->posted);
    pthread_mutex_unlock(&p->lock);
    take_items(p, 0);
    for (int i = 0; i < SPINS && atomic_load(&p->inside); i++) pause_spinning();
    pthread_mutex_lock(&p->lock);
    p->open = 0;
    while (p->inside) pthread_cond_wait(&p->left, &p->lock);
    pthread_mutex_unlock(&p->lock);
}

void cpu_pool_close(struct cpu_pool *p) {
    if (!p) return;
    pthread_mutex_lock(&p->lock);
    p->quit = 1;
    pthread_cond_broadcast(&p->posted);
    pthread_mutex_unlock(&p->lock);
    for (int i = 0; i < p->n; i++) pthread_join(p->helpers[i].id, NULL);
    pthread_mutex_destroy(&p->lock);
    pthread_cond_destroy(&p->posted);
    pthread_cond_destroy(&p->left);
    free(p);
}

int cpu_pool_open(struct cpu_pool **out, int threads, qemb_err *err) {
    if (threads == 1) return 0;
    struct cpu_pool *p = calloc(1, sizeof *p + (size_t)threads * sizeof *p->helpers);
    if (!p) return qemb_fail(err, "out_of_memory", "threads: out of memory");
    pthread_mutex_init(&p->lock, NULL);
    pthread_cond_init(&p->posted, NULL);
    pthread_cond_init(&p->left, NULL);
    for (; p->n < threads - 1; p->n++) {
        struct helper *h = &p->helpers[p->n];
        *h = (struct helper){.pool = p, .thread = p->n + 1};
        const int error = pthread_create(&h->id, NULL, helper_main, h);
        if (error) {
            qemb_fail(err, "device", "threads: cannot start them (got %d, want %d; %s)", p->n + 1,
                      threads, strerror(error));
            cpu_pool_close(p);
            return -1;
        }
    }
    *out = p;
    return 0;
}
