/* graphs.cuh - a batch's lists on the device, and the CUDA graphs of small batches.
 *
 * A class of batches, (rows, texts), goes through three modes: the first batch is launched op by op
 * (PLAIN), the second records its ops as a graph and launches it (RECORD), later ones launch the
 * graph (REPLAY): begin then says that the ops need not be called. Nothing in a graph may depend on
 * a batch except through the uploaded lists. If the driver refuses a recording, the batch is
 * launched op by op, and so are all later ones.
 */
#ifndef CUDA_GRAPHS_CUH
#define CUDA_GRAPHS_CUH

#include "device.cuh"

/* ---- begin: the batch's lists ---------------------------------------------------------------- */

/* Lists the tiles of a text: tokens 0..len-1 in rows row0.., after the prefix. */
static void list_tiles(qemb_backend *be, int row0, int len, int prefix) {
    const bool wide = be->wide && prefix + len >= WIDE_FROM;
    const int tokens = (wide ? 128 : 64) >> be->lg;
    att_tile *to = wide ? be->wide_tiles : be->narrow;
    int *n = wide ? &be->n_wide : &be->n_narrow;
    for (int t = 0; t < len; t += tokens) to[(*n)++] = att_tile{t, row0, len, prefix, row0, 0, {}};
}

/* Sorts tiles with the most keys first, so that the last blocks to run are short. */
static void sort_tiles(att_tile *t, int n, bool bidirectional) {
    const auto keys = [=](const att_tile &a) { return a.prefix + (bidirectional ? a.len : a.t0); };
    std::stable_sort(t, t + n,
                     [=](const att_tile &a, const att_tile &b) { return keys(a) > keys(b); });
}

/* Finds the graph of the batch's class and fills its lists up with empty tiles. Their sizes must
 * depend on T and B alone, since a graph's launches keep the sizes that they were recorded with.
 * Every text and the prefix begin a tile of their own, so there are at most T / tokens + B + 1
 * tiles of either kind. */
static void choose_graph(qemb_backend *be, const qemb_packed_batch *b) {
    const int *size = std::find(GRAPH_ROWS, GRAPH_ROWS + GRAPH_SIZES, b->T);
    be->mode = PLAIN;
    be->graph = nullptr;
    if (be->graphs_off || size == GRAPH_ROWS + GRAPH_SIZES || b->B > GRAPH_TEXTS) return;
    be->graph = &be->graphs[size - GRAPH_ROWS][b->B];
    if (be->graph->exec)
        be->mode = REPLAY;
    else
        be->graph->seen++;
    const auto fill = [&](att_tile *tiles, int *n, int tokens) {
        const int full = b->T / tokens + b->B + 1;
        while (*n < full) tiles[(*n)++] = att_tile{};
    };
    fill(be->narrow, &be->n_narrow, 64 >> be->lg);
    if (be->wide && b->T >= WIDE_FROM) fill(be->wide_tiles, &be->n_wide, 128 >> be->lg);
}

/* Starts to record the second batch of a class. The recording ends in finish_graph. */
static void start_recording(qemb_backend *be) {
    if (!be->graph || be->mode == REPLAY || be->graph->seen < 2) return;
    be->unrecorded = false;
    if (cudaStreamBeginCapture(be->st, cudaStreamCaptureModeThreadLocal) == cudaSuccess) {
        be->mode = RECORD;
    } else {
        cudaGetLastError(); /* reported here, not by the next launch */
        be->graphs_off = true;
    }
}

static int cuda_begin(qemb_backend *be, const qemb_packed_batch *b) {
    cudaSetDevice(be->device);
    assert(b->T <= be->max_rows && b->B >= 1 && b->cu[0] == b->P && b->cu[b->B] == b->T);
    /* so that a graph need not know */
    assert(b->bidirectional == (be->c->attention == QEMB_BIDIRECTIONAL));
    assert(!b->bidirectional || b->P == 0);
    be->n_narrow = be->n_wide = 0;
    if (b->P) list_tiles(be, 0, b->P, 0);
    for (int i = 0; i < b->B; i++) list_tiles(be, b->cu[i], b->cu[i + 1] - b->cu[i], b->P);
    sort_tiles(be->narrow, be->n_narrow, b->bidirectional);
    sort_tiles(be->wide_tiles, be->n_wide, b->bidirectional);
    choose_graph(be, b);

    batch_view host;
    const int tiles = be->n_narrow + be->n_wide + b->B;
    const size_t bytes = view_batch(&host, be->batch_host, b->T, b->B, tiles);
    view_batch(&be->dev, be->batch_dev, b->T, b->B, tiles);
    /* The last batch's upload has read batch_host. */
    good(be, cudaEventSynchronize(be->batch_free), "begin"); /* batch_free */
    memcpy(host.tokens, b->tokens, (size_t)b->T * sizeof *host.tokens);
    memcpy(host.pos, b->pos, (size_t)b->T * sizeof *host.pos);
    std::copy(be->narrow, be->narrow + be->n_narrow, host.tiles);
    std::copy(be->wide_tiles, be->wide_tiles + be->n_wide, host.tiles + be->n_narrow);
    att_tile *one = host.tiles + be->n_narrow + be->n_wide;
    for (int i = 0; i < b->B; i++) {
        const int len = b->cu[i + 1] - b->cu[i];
        assert(len >= 1);
        host.rows[i] = be->first ? b->cu[i] : b->cu[i + 1] - 1;
        one[i] = be->first ? att_tile{0, b->cu[i], 1, 0, i, len - 1, {}}
                           : att_tile{len - 1, b->cu[i], len, b->P, i - (len - 1), 0, {}};
    }
    good(be, cudaMemcpyAsync(be->batch_dev, be->batch_host, bytes, cudaMemcpyHostToDevice, be->st),
         "begin");
    good(be, cudaEventRecord(be->batch_free, be->st), "begin");
    start_recording(be);
    return be->mode == REPLAY;
}

/* ---- the end of a batch's ops ---------------------------------------------------------------- */

/* Ends the recording, if there is one, and launches the graph. Returns 1 if the ops could not be
 * recorded: they have not run, and have to be called again. */
static int finish_graph(qemb_backend *be) {
    cudaGraph_t recorded = nullptr;
    cudaError_t e = cudaSuccess;
    if (be->mode == PLAIN) return 0;
    if (be->mode == RECORD) {
        e = cudaStreamEndCapture(be->st, &recorded);
        if (e == cudaSuccess && be->unrecorded) e = cudaErrorStreamCaptureInvalidated;
        if (e == cudaSuccess) e = cudaGraphInstantiate(&be->graph->exec, recorded, 0);
        if (recorded) cudaGraphDestroy(recorded);
    }
    be->mode = PLAIN;
    if (e == cudaSuccess) {
        good(be, cudaGraphLaunch(be->graph->exec, be->st), "graph");
        return 0;
    }
    cudaGetLastError(); /* dealt with here, not by the next launch */
    be->graph->exec = nullptr;
    be->graphs_off = true;
    return 1;
}

#endif
