/* emu_hopper.cpp - sm_90a on the CPU: mbarriers, the copy engine's 2-D loads with the 128-byte
 * swizzle, wgmma, clusters. Everything asynchronous happens as late as it may: a copy lands when
 * all threads wait (in two schedules at random before that), and until then its bytes are NaN; a
 * wgmma multiplies at its warp's wait, from what shared memory and the registers of a hold by
 * then.
 *
 * A wgmma is issued and waited for warp by warp, each computing its 16 rows; the four warps of a
 * warpgroup must issue the same ones. That assumes less order than the hardware gives.
 */
#include "emu_internal.h"

#include <algorithm>
#include <bit>
#include <cstdio>

namespace emu {

/* ---- mbarriers ------------------------------------------------------------------------------- */

struct mbarrier {
    char *at;
    int arrivals, left; /* of a phase; still to come in this one */
    long bytes;         /* announced and not landed */
    int parity;         /* of the phase that runs */
    bool used, awaited;
    uint32_t waiting[MAX_THREADS / WARP];
};
static std::vector<mbarrier> barriers;

static int find_barrier(const char *at) {
    for (size_t i = 0; i < barriers.size(); i++)
        if (barriers[i].at == at) return (int)i;
    const int owner = shared_owner(at);
    die("mbarrier: used before its init (offset %ld in block %d of the cluster)",
        owner < 0 ? -1 : (long)(at - now.blocks[owner].shared), owner);
}
/* The same place in block `rank` of the cluster. */
static char *in_block(const char *at, int rank, const char *who) {
    if (rank < 0 || rank >= now.n_blocks)
        die("%s: block %d of a cluster of %d", who, rank, now.n_blocks);
    if (!now.blocks[rank].live) die("%s: block %d of the cluster has exited", who, rank);
    if (!in_shared(at, 1)) die("%s: not an address of the own block's shared memory", who);
    return now.blocks[rank].shared + (at - here().shared);
}
static void end_phase(int i) {
    mbarrier &b = barriers[i];
    if (b.left || b.bytes) return;
    b.parity ^= 1;
    b.left = b.arrivals;
    race_phase(i);
    for (int w = 0; w < now.n_warps; w++) {
        wake(w, b.waiting[w]);
        b.waiting[w] = 0;
    }
}

uint32_t shared_offset(const char *p) { return (uint32_t)(p - here().shared); }

void barrier_init(char *at, int arrivals) {
    if (!in_shared(at, 8) || (at - here().shared) % 8)
        die("mbarrier: not eight aligned bytes of shared memory (offset %ld)",
            (long)(at - here().shared));
    if (barriers.size() == MAX_BARRIERS) die("mbarrier: more than the emulator has");
    for (const mbarrier &b : barriers)
        if (b.at == at) die("mbarrier: a second init");
    race_clocks(true);
    barriers.push_back({at, arrivals, arrivals, 0, 0, false, false, {}});
}
static void arrive(char *at, int bytes) {
    const int i = find_barrier(at);
    race_arrive(i, now.cur->linear);
    barriers[i].used = true;
    barriers[i].bytes += bytes;
    if (--barriers[i].left < 0) die("mbarrier: more arrivals than it was made for");
    end_phase(i);
}
void barrier_arrive(char *at, int bytes) { arrive(in_block(at, now.cur->block, "arrive"), bytes); }
void barrier_arrive_at(char *at, int rank) { arrive(in_block(at, rank, "remote arrive"), 0); }
void barrier_wait(char *at, int parity) {
    const int i = find_barrier(in_block(at, now.cur->block, "mbarrier wait"));
    barriers[i].awaited = true;
    while (barriers[i].parity == parity) {
        barriers[i].waiting[now.cur->warp] |= 1u << now.cur->lane;
        sleep_here();
    }
    race_wait(i, now.cur->linear);
}
void fence_async() { now.cur->fences++; }

/* ---- the copy engine ------------------------------------------------------------------------- */

struct tensor_map { /* what the emulated driver keeps in a CUtensorMap */
    uint64_t magic;
    const char *base;
    uint64_t width, height, pitch;           /* elements, rows, bytes */
    uint32_t box_width, box_height, element; /* numbers, rows, bytes of a number */
};
constexpr uint64_t MAGIC = 0x7e4507e4507e4507u;
static_assert(sizeof(tensor_map) <= sizeof(CUtensorMap), "it has 128 bytes");

struct load { /* into one block */
    char *dst;
    tensor_map map;
    int block, barrier, x, y, thread;
    uint32_t tick;
};
static std::vector<load> in_flight;

static void issue(char *dst, const CUtensorMap *map, char *at, int x, int y, unsigned blocks,
                  void *pc) {
    tensor_map m;
    memcpy(&m, map, sizeof m);
    if (m.magic != MAGIC) die("tma_load: not a tensor map");
    const int bytes = (int)(m.box_height * 128), me = now.cur->linear;
    if (!in_shared(dst, bytes))
        die("tma_load: writes outside of shared memory (offset %ld)", (long)(dst - here().shared));
    if ((dst - here().shared) % 1024) die("tma_load: destination not aligned to 1024 bytes");
    for (int b = 0; blocks >> b; b++) {
        if (!(blocks >> b & 1)) continue;
        char *to = in_block(dst, b, "tma_multicast");
        const int barrier = find_barrier(in_block(at, b, "tma_multicast"));
        race_async(to, bytes, true, pc, me);
        race_pending(to, bytes, 1);
        memset(to, 0xFF, (size_t)bytes);
        in_flight.push_back({to, m, b, barrier, x, y, me, race_tick(me)});
    }
}
void tma_load(char *dst, const CUtensorMap *map, char *at, int x, int y) {
    issue(dst, map, at, x, y, 1u << now.cur->block, __builtin_return_address(0));
}
/* To the same place in each block of the mask; each part lands on its own. */
void tma_multicast(char *dst, const CUtensorMap *map, char *at, int x, int y, unsigned blocks) {
    if (!blocks) die("tma_multicast: to no block");
    issue(dst, map, at, x, y, blocks, __builtin_return_address(0));
}

bool land_one() {
    if (in_flight.empty()) return false;
    const schedule s = current_schedule();
    const size_t n = in_flight.size(), i = s == IN_ORDER  ? 0
                                           : s == REVERSE ? n - 1
                                                          : random_bits() % n;
    const load l = in_flight[i];
    in_flight.erase(in_flight.begin() + (long)i);
    const tensor_map &m = l.map;
    const int bytes = (int)(m.box_height * 128);
    race_pending(l.dst, bytes, 0);
    memset(l.dst, 0, (size_t)bytes);
    for (uint32_t r = 0; r < m.box_height; r++)
        for (uint32_t c = 0; c < 128; c += 16) { /* a 16-byte chunk stays together */
            const int64_t y = (int64_t)l.y + r, x = (int64_t)l.x + c / m.element;
            const int64_t cut = std::clamp<int64_t>((int64_t)m.width - x, 0, 16 / m.element);
            if (x < 0 || y < 0 || y >= (int64_t)m.height || !cut) continue;
            const char *from = m.base + (uint64_t)y * m.pitch + (uint64_t)x * m.element;
            race_touch(from, (int)(cut * m.element), false, nullptr, l.thread);
            memcpy(l.dst + r * 128 + (c ^ (r % 8 * 16)), from, (size_t)(cut * m.element));
        }
    race_publish(l.barrier, l.thread, l.tick);
    barriers[l.barrier].bytes -= bytes;
    count.loads++;
    end_phase(l.barrier);
    return true;
}

/* The driver's cuTensorMapEncodeTiled, as far as tma_load goes; it refuses as the driver does. */
static CUresult encode(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *base,
                       const cuuint64_t *dim, const cuuint64_t *stride, const cuuint32_t *box,
                       const cuuint32_t *step, CUtensorMapInterleave interleave,
                       CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                       CUtensorMapFloatOOBfill fill) {
    const bool bytes = type == CU_TENSOR_MAP_DATA_TYPE_UINT8;
    const uint32_t element = bytes ? 1 : 2;
    if ((!bytes && type != CU_TENSOR_MAP_DATA_TYPE_FLOAT16 &&
         type != CU_TENSOR_MAP_DATA_TYPE_BFLOAT16) ||
        rank != 2 || (uintptr_t)base % 16 || stride[0] % 16 || !dim[0] || !dim[1] || dim[0] >> 32 ||
        dim[1] >> 32 || stride[0] < dim[0] * element || box[0] * element != 128 || !box[1] ||
        box[1] > 256 || step[0] != 1 || step[1] != 1 ||
        interleave != CU_TENSOR_MAP_INTERLEAVE_NONE || swizzle != CU_TENSOR_MAP_SWIZZLE_128B ||
        fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE)
        return CUDA_ERROR_INVALID_VALUE;
    const tensor_map m = {MAGIC,  (const char *)base, dim[0], dim[1], stride[0], box[0], box[1],
                          element};
    memcpy(map, &m, sizeof m);
    return CUDA_SUCCESS;
}

/* ---- wgmma ----------------------------------------------------------------------------------- */

struct product { /* of one warp */
    wgmma_call c;
    float *d[WARP];
    const uint32_t *r[WARP];
    void *pc;
    int group;
};
struct warp_products {
    std::vector<product> pending;
    size_t issued;
    int group; /* open */
    bool fenced;
};
static warp_products products[MAX_THREADS / WARP];
static std::vector<wgmma_call> issued[MAX_THREADS / 128]; /* by any warp of the warpgroup */

/* The address of 16 bytes of a descriptor's tile, chunk `chunk` of row `row`. */
static const char *chunk_at(uint64_t tile, uint32_t row, uint32_t chunk) {
    if (tile >> 62 != 1) die("wgmma: not a tile with the 128-byte swizzle");
    const uint32_t start = (uint32_t)(tile & 0x3FFF) << 4, stride = (tile >> 32 & 0x3FFF) << 4;
    uint32_t a = start + row / 8 * stride + row % 8 * 128 + chunk * 16;
    a ^= (a >> 7 & 7) << 4;
    if (a + 16 > now.shared_bytes) die("wgmma: reads outside of shared memory (offset %u)", a);
    return here().shared + a;
}

/* Calls f(destination, address) for the chunks that a warp reads: rows first.. of (rows, 16) by
 * rows of 16 k, or (16, rows) by rows of k. */
template <class F>
static void each_chunk(uint64_t tile, int first, int rows, bool across, uint16_t *to, F f) {
    const uint32_t next = (tile >> 16 & 0x3FFF) << 4; /* 64 columns on, where rows are k */
    if (!across) {
        for (int i = 0; i < rows; i++)
            for (int c = 0; c < 2; c++)
                f(to + i * 16 + c * 8, chunk_at(tile, (uint32_t)(first + i), (uint32_t)c));
        return;
    }
    for (int k = 0; k < 16; k++)
        for (int c = 0; c < rows / 8; c++)
            f(to + k * rows + c * 8,
              chunk_at(tile + (uint64_t)(c / 8) * (next >> 4), (uint32_t)k, (uint32_t)c % 8));
}

static void touch(const product &p, int warp) {
    auto read = [&](uint16_t *, const char *at) { race_async(at, 16, false, p.pc, warp * WARP); };
    if (!p.c.r) each_chunk(p.c.a, warp % 4 * 16, 16, false, nullptr, read);
    each_chunk(p.c.b, 0, p.c.n, p.c.across, nullptr, read);
}

/* The sums that a thread has are d[l][e], row sum_row(l, e) of the warp's 16. */
static int sum_row(int l, int e) { return l / 4 + (e >> 1 & 1) * 8; }
static int sum_column(int l, int e) { return e / 4 * 8 + l % 4 * 2 + (e & 1); }

static void multiply(const product &p, int warp) {
    static uint16_t a[16][16], b[256 * 16], turned[256 * 16];
    static float A[16][16], B[16 * 256], D[16][256];
    auto load = [](uint16_t *to, const char *at) { memcpy(to, at, 16); };
    const int n = p.c.n;
    if (RACES) touch(p, warp);
    if (p.c.r) {
        for (int l = 0; l < WARP; l++)
            for (int k = 0; k < 4; k++)
                memcpy(&a[l / 4 + (k & 1) * 8][l % 4 * 2 + (k >> 1) * 8], &p.r[l][k], 4);
    } else {
        each_chunk(p.c.a, warp % 4 * 16, 16, false, a[0], load);
    }
    each_chunk(p.c.b, 0, n, p.c.across, b, load);
    const uint16_t *by_k = b; /* (16, n) */
    if (!p.c.across) {
        for (int j = 0; j < n; j++)
            for (int k = 0; k < 16; k++) turned[k * n + j] = b[j * 16 + k];
        by_k = turned;
    }
    to_floats(A[0], a[0], 256, p.c.type == BF16);
    to_floats(B, by_k, n * 16, p.c.type == BF16);
    for (int l = 0; l < WARP; l++)
        for (int e = 0; e < n / 2; e++)
            D[sum_row(l, e)][sum_column(l, e)] = p.c.add ? p.d[l][e] : 0;
    for (int i = 0; i < 16; i++)
        for (int k = 0; k < 16; k++)
            for (int j = 0; j < n; j++) D[i][j] += A[i][k] * B[k * n + j];
    for (int l = 0; l < WARP; l++)
        for (int e = 0; e < n / 2; e++) p.d[l][e] = D[sum_row(l, e)][sum_column(l, e)];
}

/* The tensor cores add 32 products of e4m3 to a sum with few bits: they shift all 33 to the
 * exponent of the largest, 2^e, and drop what is below 2^(e - 13). */
static float add_e4m3(const float *a, const float *b, float sum) {
    uint32_t largest = std::bit_cast<uint32_t>(fabsf(sum));
    for (int k = 0; k < 32; k++)
        largest = std::max(largest, std::bit_cast<uint32_t>(fabsf(a[k] * b[k])));
    if (largest < 0x08000000u || largest >= 0x7F800000u) { /* 0 or NaN; products are >= 2^-18 */
        for (int k = 0; k < 32; k++) sum += a[k] * b[k];
        return sum;
    }
    const float step = std::bit_cast<float>((largest & 0x7F800000u) - (13u << 23)), per = 1 / step;
    int total = (int)(sum * per);
    for (int k = 0; k < 32; k++) total += (int)(a[k] * b[k] * per);
    return (float)total * step;
}
static void from_e4m3(float *f, const uint8_t *codes, int n) {
    static float numbers[256];
    if (!numbers[1])
        for (int c = 0; c < 256; c++) {
            __nv_fp8_e4m3 v;
            v.__x = (uint8_t)c;
            numbers[c] = (float)v;
        }
    for (int i = 0; i < n; i++) f[i] = numbers[codes[i]];
}
static void multiply_e4m3(const product &p, int warp) {
    static uint8_t a[16 * 32], b[256 * 32];
    static float A[16 * 32], B[256 * 32];
    auto load = [](uint16_t *to, const char *at) { memcpy(to, at, 16); };
    if (p.c.r || p.c.across) die("wgmma: e4m3 is multiplied by rows of shared memory only");
    if (RACES) touch(p, warp);
    each_chunk(p.c.a, warp % 4 * 16, 16, false, (uint16_t *)a, load);
    each_chunk(p.c.b, 0, p.c.n, false, (uint16_t *)b, load);
    from_e4m3(A, a, 16 * 32);
    from_e4m3(B, b, p.c.n * 32);
    for (int l = 0; l < WARP; l++)
        for (int e = 0; e < p.c.n / 2; e++) {
            float &d = p.d[l][e];
            d = add_e4m3(A + sum_row(l, e) * 32, B + sum_column(l, e) * 32, p.c.add ? d : 0);
        }
}

static bool same(const wgmma_call &x, const wgmma_call &y) {
    return x.n == y.n && !x.r == !y.r && x.a == y.a && x.b == y.b && x.add == y.add &&
           x.across == y.across && x.type == y.type;
}

struct wgmma_slot {
    const wgmma_call *c;
    void *pc;
};
void wgmma(const wgmma_call &c) {
    wgmma_slot s = {&c, __builtin_return_address(0)};
    collective(OP_WGMMA, ~0u, &s, [](void **slot, uint32_t) {
        const int w = now.cur->warp;
        warp_products &p = products[w];
        std::vector<wgmma_call> &all = issued[w / 4];
        product q = {*((wgmma_slot *)slot[0])->c, {}, {}, ((wgmma_slot *)slot[0])->pc, p.group};
        if (!p.fenced) die("wgmma: no wgmma_fence since the last wait");
        for (int l = 0; l < WARP; l++) {
            const wgmma_call &mine = *((wgmma_slot *)slot[l])->c;
            if (!same(mine, q.c)) die("wgmma: lane %d issues another one than lane 0", l);
            q.d[l] = mine.d;
            q.r[l] = mine.r;
        }
        if (p.issued < all.size() && !same(q.c, all[p.issued]))
            die("wgmma: warp %d issues another one than its warpgroup", w);
        if (p.issued == all.size()) all.push_back(q.c);
        p.issued++;
        if (RACES) touch(q, w);
        p.pending.push_back(q);
        count.wgmmas++;
    });
}
void wgmma_fence() {
    collective(OP_WGMMA_FENCE, ~0u, nullptr,
               [](void **, uint32_t) { products[now.cur->warp].fenced = true; });
}
void wgmma_commit() {
    collective(OP_WGMMA_COMMIT, ~0u, nullptr,
               [](void **, uint32_t) { products[now.cur->warp].group++; });
}
void wgmma_wait(int newest) {
    collective(OP_WGMMA_WAIT, ~0u, &newest, [](void **slot, uint32_t) {
        warp_products &p = products[now.cur->warp];
        size_t done = 0;
        while (done < p.pending.size() && p.pending[done].group < p.group - *(int *)slot[0])
            (p.pending[done].c.type == E4M3 ? multiply_e4m3 : multiply)(p.pending[done],
                                                                        now.cur->warp),
                done++;
        p.pending.erase(p.pending.begin(), p.pending.begin() + (long)done);
        p.fenced = false; /* the sums may be read and written now */
    });
}

/* ---- a cluster's beginning and end ----------------------------------------------------------- */

void hopper_start() {
    barriers.clear();
    race_clocks(false);
    for (int w = 0; w < now.n_warps; w++) products[w] = {};
    for (int g = 0; g < MAX_THREADS / 128; g++) issued[g].clear();
}
void hopper_exit() {
    if (!products[now.cur->warp].pending.empty()) die("a warp exits with a wgmma in flight");
}
void hopper_leave() {
    for (const load &l : in_flight)
        if (l.block == now.cur->block || l.thread / now.block_threads == now.cur->block)
            die("a block ends with copies in flight");
    for (const mbarrier &b : barriers)
        if (b.used && !b.awaited && shared_owner(b.at) == now.cur->block)
            die("mbarrier: nobody has waited for it (offset %ld)", (long)(b.at - here().shared));
}
void hopper_end() {
    for (int w = 0; w < now.n_warps; w++)
        if (products[w].issued != issued[w / 4].size())
            die("wgmma: warp %d has issued fewer than its warpgroup", w);
}

} // namespace emu

using namespace emu;

extern "C" cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **f, unsigned,
                                                        unsigned long long,
                                                        cudaDriverEntryPointQueryResult *result) {
    *f = !strcmp(name, "cuTensorMapEncodeTiled") ? (void *)encode : nullptr;
    *result = *f ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return cudaSuccess;
}
