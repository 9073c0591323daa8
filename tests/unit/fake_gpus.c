/* fake_gpus.c - a backend whose GPUs compute with the plain CPU table, for tests of what the
 * programs do with several devices and two batches in flight. tests/cuda/emu is closer to a GPU,
 * but slow, and its fibers cannot run under the thread sanitizer.
 *
 * FAKE_GPUS="COUNT", or "COUNT DEVICE BATCHES": how many there are, and which one (-1: each) fails
 * in which of its batches. A batch takes a few milliseconds, so that every GPU gets some. At the
 * end each GPU prints how many batches it had in flight at most. */
#include "backends/backend.h"
#include "backends/cpu/cpu.h"

#include <assert.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { GPUS = 8, IN_FLIGHT = 2, ROWS = 16 };

typedef struct {
    float *rows, *out; /* (n) floats */
    size_t n;
} pooled;

static struct gpu {
    _Atomic(qemb_backend *) be; /* which finds it: the backend is the plain table's */
    size_t hidden;
    pooled batches[IN_FLIGHT]; /* (n) between pool and collect */
    int n, most;               /* at any time */
    int good;                  /* batches until it fails; negative: never */
} gpus[GPUS];

static struct gpu *gpu_of(const qemb_backend *be) {
    struct gpu *g = gpus;
    while (g->be != be) g++;
    return g;
}

static void read_environment(int *count, int *device, int *batches) {
    const char *s = getenv("FAKE_GPUS");
    *device = *batches = -2;
    if (!s || sscanf(s, "%d %d %d", count, device, batches) < 1) *count = 1;
}

static int fake_devices(void) {
    int count, device, batches;
    read_environment(&count, &device, &batches);
    return count;
}

/* Enough for the larger default batches on the even ones alone. */
static size_t fake_free_memory(int device) { return device % 2 ? 1 : (size_t)1 << 40; }

static int fake_plan(qemb_part *parts, const qemb_file *f, const qemb_options *opt, size_t arena) {
    (void)f, (void)opt;
    parts[0] = (qemb_part){"activations", arena};
    return 1;
}

static int fake_open(qemb_backend **out, const qemb_config *c, const qemb_options *opt,
                     qemb_err *err) {
    int count, device, batches;
    read_environment(&count, &device, &batches);
    struct gpu *g = &gpus[opt->device];
    assert(opt->device < count && count <= GPUS && !g->be);
    if (opt->device % 2) usleep(500000); /* the others are ready first */
    if (qemb_cpu_ops.open(out, c, opt, err)) return -1;
    g->hidden = (size_t)c->hidden;
    g->good = device == -1 || device == opt->device ? batches : -1;
    g->be = *out;
    return 0;
}

static void fake_close(qemb_backend *be) {
    if (be) {
        struct gpu *g = gpu_of(be);
        fprintf(stderr, "{\"event\":\"closed\",\"device\":%d,\"in_flight\":%d}\n", (int)(g - gpus),
                g->most);
        g->be = NULL;
    }
    qemb_cpu_ops.close(be);
}

static int fake_pool(qemb_backend *be, float *out, float *x, const float *w, int B) {
    struct gpu *g = gpu_of(be);
    assert(g->n < IN_FLIGHT);
    const size_t n = (size_t)B * g->hidden;
    pooled *p = &g->batches[g->n++];
    if (g->n > g->most) g->most = g->n;
    *p = (pooled){malloc(n * sizeof(float)), out, n};
    return qemb_cpu_ops.pool(be, p->rows, x, w, B);
}

static void fake_collect(qemb_backend *be) {
    struct gpu *g = gpu_of(be);
    const pooled p = g->batches[0];
    g->batches[0] = g->batches[1];
    g->n--;
    usleep(3000);
    if (g->good > 0) g->good--;
    for (size_t i = 0; i < p.n; i++) p.out[i] = g->good ? p.rows[i] : NAN;
    free(p.rows);
}

static void fake_health(const qemb_backend *be, qemb_health *h) {
    if (!gpu_of(be)->good) h->failure = "GPU: collect failed (as told)";
}

static int fake_pad_rows(int T) { return (T + ROWS - 1) / ROWS * ROWS; }

const qemb_math qemb_backend_math = QEMB_MATH_F32;

const qemb_ops *qemb_backend_choose(qemb_math math) {
    static qemb_ops table;
    if (!table.name) { /* by the main thread, before it starts others */
        table = qemb_cpu_ops;
        table.name = "fake";
        table.in_flight = IN_FLIGHT, table.pad_rows = fake_pad_rows;
        table.plan = fake_plan, table.free_memory = fake_free_memory, table.devices = fake_devices,
        table.health = fake_health;
        table.open = fake_open, table.close = fake_close;
        table.pool = fake_pool, table.collect = fake_collect;
    }
    return math == table.math ? &table : NULL;
}
