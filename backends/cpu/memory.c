/* memory.c - a CPU backend's state and memory: what its tables' open, arena and close share. */
#include "cpu.h"

#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

void *cpu_map(qemb_backend *be, int slot, size_t bytes, qemb_err *err) {
    /* MAP_NORESERVE: address space, which becomes memory page by page as it is written */
    void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                   -1, 0);
    if (p == MAP_FAILED) {
        qemb_fail(err, "out_of_memory", "memory: cannot map %zu bytes", bytes);
        return NULL;
    }
    madvise(p, bytes, MADV_HUGEPAGE); /* a matmul's rows are many small pages apart */
    be->maps[slot] = p;
    be->map_bytes[slot] = bytes;
    return p;
}

void *cpu_arena(qemb_backend *be, size_t bytes, qemb_err *err) {
    return cpu_map(be, CPU_MAP_ARENA, bytes, err);
}

void cpu_close(qemb_backend *be) {
    if (!be) return;
    cpu_pool_close(be->pool);
    for (int i = 0; i < CPU_MAPS; i++)
        if (be->maps[i]) munmap(be->maps[i], be->map_bytes[i]);
    free(be);
}

int cpu_open(qemb_backend **out, const qemb_config *c, const qemb_options *opt,
             size_t scratch_floats, size_t packed_floats, qemb_err *err) {
    qemb_backend *be = calloc(1, sizeof *be);
    if (!be) return qemb_fail(err, "out_of_memory", "backend: out of memory");
    be->c = c;
    be->threads = opt->threads;
    be->on_layer_loaded = opt->on_layer_loaded;
    be->scratch_floats = (scratch_floats + 15) / 16 * 16;
    const size_t rope = c->rope_theta > 0 ? (size_t)opt->max_tokens * c->head_dim : 0;
    if (rope) be->rope = cpu_map(be, CPU_MAP_ROPE, rope * sizeof(float), err);
    be->scratch =
        cpu_map(be, CPU_MAP_SCRATCH, be->threads * be->scratch_floats * sizeof(float), err);
    if (packed_floats) be->packed = cpu_map(be, CPU_MAP_PACKED, packed_floats * sizeof(float), err);
    if ((rope && !be->rope) || !be->scratch || (packed_floats && !be->packed) ||
        cpu_pool_open(&be->pool, be->threads, err)) {
        cpu_close(be);
        return -1;
    }
    *out = be;
    return 0;
}

int cpu_load_weights(qemb_backend *be, qemb_weights *w, qemb_err *err) {
    (void)be, (void)w, (void)err; /* the CPU reads the file's map */
    return 0;
}

void cpu_drop_pages(const void *p, size_t bytes) {
    const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    const uintptr_t start = ((uintptr_t)p + page - 1) / page * page;
    const uintptr_t end = ((uintptr_t)p + bytes) / page * page;
    if (end > start) madvise((void *)start, end - start, MADV_DONTNEED);
}
