/* packed_gemm.c - the loops around the microkernel, for every gemm_type; packed_gemm.h has the
 * terms and the picture.
 *
 * load_weights packs most matrices once. The others are packed when an op needs them, which costs
 * about 0.4 cycles a dword of W, against 1/16 cycle for each row of x that the dword is multiplied
 * with. In float, panels of F16 matrices stay halves: half the memory to read. Converting a half
 * takes the time of a multiplication, so with many tiles of x a panel is converted once for all of
 * them.
 *
 * A panel of gate_up has 16 rows of gate and the same 16 of up, so that a register tile has all
 * that SwiGLU needs: gate and up are never written to memory outside a thread's scratch.
 *
 * A row's result depends on that row alone, bit for bit: a sum adds up the columns dword after
 * dword within KC of them, however many rows a tile has.
 */
#include "packed_gemm.h"

#include <assert.h>

enum {
    ITEM_TILES = 24, /* tiles of x times panels of W in a work item, at least one panel */
    FEW_TILES = 3,   /* up to this many tiles of x, panels of halves are not converted */
    X_TILES = 86,    /* tiles of x that are packed at a time and share the reading of W */
};

static int panel_count(const qemb_mat *w, int is_gate_up) {
    return is_gate_up ? ceil_div(w->rows / 2, 16) : ceil_div(w->rows, NR);
}

/* Rows of W from one panel to the next */
static int panel_rows(int is_gate_up) { return is_gate_up ? 16 : NR; }

static w_panel panel_of(const qemb_mat *w, int p, int is_gate_up) {
    const int first = p * panel_rows(is_gate_up);
    return (w_panel){w, {first, first + (is_gate_up ? w->rows / 2 : 16)}};
}

static int tile_rows(const gemm_type *a) { return a->tile_rows ? a->tile_rows : MR; }
static int x_tiles(const gemm_type *a) { return a->x_tiles ? a->x_tiles : X_TILES; }

/* The first row of tile i: tiles of about equal height. Of tile_rows all but the last are whole. */
static int tile_start(const matmul_job *j, int i) {
    const int rows = j->be->gemm_type->tile_rows;
    return rows ? min_int(j->T, i * rows) : (int)((long)j->T * i / j->tiles);
}

weight_kind packed_kind(const gemm_type *a, const qemb_mat *w) {
    if (w->dtype == QEMB_I8) return W_I8;
    return a->weights[W_BF16].pack_w && w->bits == QEMB_BITS_8 ? W_BF16 : W_F16;
}

/* Memory of the part of a panel that a thread packs for itself or converts to float */
static size_t room_floats(const gemm_type *a) {
    const int columns = KC * a->per_dword;
    size_t most = (size_t)KC * NR;
    for (int kind = 0; kind < W_KINDS; kind++)
        if (w_floats(a, kind, columns) > most) most = w_floats(a, kind, columns);
    return most;
}

/* ---- load_weights: matrices are repacked, one after the other -----------------------------------
 * The map's pages that were read are dropped, since they are not read again. INT8 matrices that
 * would become 16 bits or floats, two and four times their size, stay in the map: ops pack them. */

static int is_repacked(const qemb_backend *be, const qemb_mat *w) {
    return (uintptr_t)w->data - (uintptr_t)be->maps[CPU_MAP_WEIGHTS] <
           be->map_bytes[CPU_MAP_WEIGHTS];
}

typedef struct {
    const gemm_type *a;
    qemb_backend *be;
    float *to;
    const qemb_mat *w;
    int is_gate_up, mapped;
} repacking;

static void repack_panel(const void *job, work_item item) {
    const repacking *p = job;
    const w_panel panel = panel_of(p->w, item.i, p->is_gate_up);
    const weight_kind kind = packed_kind(p->a, p->w);
    p->a->weights[kind].pack_w(p->to + item.i * w_floats(p->a, kind, p->w->cols), &panel, 0,
                               p->w->cols, (size_t)panel_rows(p->is_gate_up) * p->w->cols);
}

static void repack_matrix(qemb_mat *w, int is_gate_up, repacking *p) {
    const size_t rows = (size_t)w->rows, cols = (size_t)w->cols;
    if (p->a->weights[W_BF16].pack_w) w->bits = qemb_mat_bits(w);
    p->w = w, p->is_gate_up = is_gate_up;
    cpu_parallel(p->be->pool, panel_count(w, is_gate_up), repack_panel, p);
    if (p->mapped) {
        cpu_drop_pages(w->data, rows * cols * (w->dtype == QEMB_I8 ? 1 : sizeof(uint16_t)));
        if (w->scale) cpu_drop_pages(w->scale, rows * QEMB_GROUPS(cols) * sizeof *w->scale);
    }
    w->data = p->to;
}

/* Memory of all repacked matrices, in floats. p: packs them, from p->to on; NULL: only counts. */
static size_t repack_layers(const gemm_type *a, qemb_layer *layers, int n_layers, repacking *p) {
    size_t floats = 0;
    for (int l = 0; l < n_layers; l++) {
        qemb_mat *all[QEMB_LAYER_MATRICES];
        qemb_layer_matrices(&layers[l], all);
        for (int i = 0; i < QEMB_LAYER_MATRICES; i++) {
            /* W_BF16 takes the memory of W_F16: `bits` need not be known yet */
            const weight_kind kind = packed_kind(a, all[i]);
            if (!a->weights[kind].repacked) continue;
            const int is_gate_up = all[i] == &layers[l].wgu;
            const size_t n = panel_count(all[i], is_gate_up) * w_floats(a, kind, all[i]->cols);
            if (p) repack_matrix(all[i], is_gate_up, p), p->to += n;
            floats += n;
        }
        if (p && p->be->on_layer_loaded) p->be->on_layer_loaded(l + 1, n_layers);
    }
    return floats;
}

size_t packed_bytes(const gemm_type *a, const qemb_weights *w, int n_layers) {
    return sizeof(float) * repack_layers(a, w->layers, n_layers, NULL);
}

int packed_load_weights(qemb_backend *be, qemb_weights *w, qemb_err *err) {
    repacking p = {.a = be->gemm_type, .be = be, .mapped = w->mapped};
    const size_t bytes = packed_bytes(p.a, w, be->c->n_layers);
    if (!bytes) return 0;
    if (!(p.to = cpu_map(be, CPU_MAP_WEIGHTS, bytes, err))) return -1;
    repack_layers(p.a, w->layers, be->c->n_layers, &p);
    return 0;
}

/* ---- products -------------------------------------------------------------------------------- */

static void pack_tile(const void *job, work_item item) {
    const matmul_job *j = job;
    const gemm_type *a = j->be->gemm_type;
    const int K = j->w->cols, t = tile_start(j, item.i);
    a->pack_x(j->packed + item.i * x_floats(a, K), j->x + (size_t)t * K,
              tile_start(j, item.i + 1) - t, K);
}

/* Columns k .. end-1 of panel p: loop 3's part of a panel */
typedef struct {
    int p, k, end;
    microkernel *multiply;
    const float *panel;
    const float *prefetch; /* see epilogue */
    /* gate_up: the sums (MR, NR) of one tile, or of all tiles if K > KC dwords need several
     * parts */
    float *sums;
} block;

/* The register tile of tile i of x and block b: y, or gate_up's sums, = (b->k ? y : 0) + x W^T */
static void multiply_tile(const matmul_job *j, const block *b, int i) {
    const gemm_type *a = j->be->gemm_type;
    const int t = tile_start(j, i), rows = tile_start(j, i + 1) - t, n = b->p * NR;
    const int N = j->w->rows, K = j->w->cols;
    const float *x = j->packed + i * x_floats(a, K) + x_floats(a, b->k);
    epilogue o = {.y = j->y + (size_t)t * N + n,
                  .ldy = (size_t)N,
                  .cols = min_int(NR, N - n),
                  .add = j->add || b->k,
                  .factor = j->w->alpha,
                  .prefetch = b->prefetch,
                  .prefetch_floats = a->weights[packed_kind(a, j->w)].w_floats,
                  .prefetch_part = i,
                  .prefetch_parts = j->tiles};
    if (j->is_gate_up) {
        o.y = b->sums + (b->end - b->k < K ? i * MR * NR : 0);
        o.ldy = NR, o.cols = NR;
    }
    b->multiply(&o, rows, x, b->panel, ceil_div(b->end - b->k, a->per_dword));
    const int F = N / 2, h = b->p * 16;
    if (j->is_gate_up && b->end == K)
        a->swiglu(j->y + (size_t)t * F + h, (size_t)F, rows, F - h, o.y);
}

/* Finds the block's panel: as load_weights packed it, or packed or converted into `room` */
static void find_panel(const matmul_job *j, block *b, float *room) {
    const gemm_type *a = j->be->gemm_type;
    const weight_kind kind = packed_kind(a, j->w);
    const packed_weights *form = &a->weights[kind];
    const int K = j->w->cols;
    b->multiply = form->multiply;
    if (!form->repacked) {
        const w_panel p = panel_of(j->w, b->p, j->is_gate_up);
        /* the next columns of these rows; after the last columns, the rows of the next panel */
        const size_t prefetch_distance =
            b->end < K ? (size_t)(b->end - b->k) : (size_t)panel_rows(j->is_gate_up) * K - b->k;
        form->pack_w(room, &p, b->k, b->end, prefetch_distance);
        b->panel = room;
        return;
    }
    b->panel = (const float *)j->w->data + b->p * w_floats(a, kind, K) + w_floats(a, kind, b->k);
    b->prefetch = b->panel + w_floats(a, kind, b->end - b->k);
    if (a->panel_f16_to_f32 && !j->few) {
        a->panel_f16_to_f32(room, b->panel, b->end - b->k);
        b->panel = room, b->multiply = a->weights[W_I8].multiply;
    }
}

static void multiply_panels(const void *job, work_item item) {
    const matmul_job *j = job;
    const int columns = KC * j->be->gemm_type->per_dword, K = j->w->cols;
    const int last = min_int((item.i + 1) * j->panels, panel_count(j->w, j->is_gate_up));
    float *room = j->be->scratch + (size_t)item.thread * j->be->scratch_floats;
    const packed_weights *form = &j->be->gemm_type->weights[packed_kind(j->be->gemm_type, j->w)];
    if (form->multiply_panels) {
        form->multiply_panels(j, item.i * j->panels, last, room);
        return;
    }
    block b = {.p = item.i * j->panels, .sums = room + room_floats(j->be->gemm_type)};
    for (; b.p < last; b.p++)
        for (b.k = 0; b.k < K; b.k = b.end) {
            b.end = min_int(K, b.k + columns);
            find_panel(j, &b, room);
            for (int i = 0; i < j->tiles; i++) multiply_tile(j, &b, i);
        }
}

/* The panels of an item. Small items, so that threads end together. But a panel is prefetched while
 * the panel before it in the same item is multiplied, which matters most with few tiles. */
static int item_panels(const matmul_job *j) {
    const gemm_type *a = j->be->gemm_type;
    const int panels = panel_count(j->w, j->is_gate_up);
    const int most = a->item_panels ? a->item_panels : j->few ? panels : ITEM_TILES / j->tiles;
    return max_int(1, min_int(most, panels / (4 * j->be->threads)));
}

/* y (T, N) = (add ? y : 0) + alpha x W^T, or is_gate_up: y (T, N/2) */
static void matmul_all(qemb_backend *be, float *y, const float *x, const qemb_mat *w, int T,
                       int add, int is_gate_up) {
    const gemm_type *a = be->gemm_type;
    assert(w->dtype == QEMB_F16 || (w->dtype == QEMB_I8 && w->scale));
    assert(!a->weights[packed_kind(a, w)].repacked || is_repacked(be, w));
    matmul_job j = {.be = be, .w = w, .add = add, .is_gate_up = is_gate_up, .packed = be->packed};
    const int tiles = ceil_div(T, tile_rows(a)), chunks = ceil_div(tiles, x_tiles(a));
    for (int i = 0, t = 0; i < chunks; i++, t += j.T) {
        const int end = a->tile_rows ? (int)((long)tiles * (i + 1) / chunks) * a->tile_rows
                                     : (int)((long)T * (i + 1) / chunks);
        j.T = min_int(T, end) - t;
        j.tiles = ceil_div(j.T, tile_rows(a));
        j.few = j.tiles <= FEW_TILES;
        j.panels = item_panels(&j);
        j.x = x + (size_t)t * w->cols;
        j.y = y + (size_t)t * (is_gate_up ? w->rows / 2 : w->rows);
        cpu_parallel(be->pool, j.tiles, pack_tile, &j);
        cpu_parallel(be->pool, ceil_div(panel_count(w, is_gate_up), j.panels), multiply_panels, &j);
    }
}

void packed_matmul(qemb_backend *be, qemb_act *y, const qemb_act *x, const qemb_mat *w,
                   const float *bias, int T) {
    matmul_all(be, (float *)y, (const float *)x, w, T, 0, 0);
    simd_add_bias(be, y, bias, T, w->rows);
}

void packed_matmul_gelu(qemb_backend *be, qemb_act *h, const qemb_act *x, const qemb_mat *w,
                        const float *bias, int T) {
    matmul_all(be, (float *)h, (const float *)x, w, T, 0, 0);
    simd_gelu(be, h, bias, T, w->rows);
}

void packed_matmul_add(qemb_backend *be, float *x, const qemb_act *a, const qemb_mat *w, int T) {
    matmul_all(be, x, (const float *)a, w, T, 1, 0);
}

void packed_gate_up(qemb_backend *be, qemb_act *h, qemb_act *gu, const qemb_act *x,
                    const qemb_mat *w, int T) {
    (void)gu;
    matmul_all(be, (float *)h, (const float *)x, w, T, 0, 1);
}

int packed_open(qemb_backend **be, const gemm_type *a, const cpu_kernels *kernels,
                const qemb_config *c, const qemb_options *opt, qemb_err *err) {
    const int widest = max_int(max_int(c->hidden, c->n_heads * c->head_dim), c->ffn);
    const size_t scratch =
        a->scratch_floats ? (size_t)a->scratch_floats : room_floats(a) + X_TILES * MR * NR;
    if (simd_open(be, c, opt, kernels, scratch, x_tiles(a) * x_floats(a, widest), err)) return -1;
    (*be)->gemm_type = a;
    return 0;
}
