/* qemb.h - qemb's C interface, and what its modules agree on.
 *
 * A program that wants vectors of texts needs the first two parts, errors and embedders. The others
 * are for programs that batch, and for people who change qemb. From text to vector:
 *
 *   lib/model_file.c  a .qemb file, mapped and validated           qemb_file
 *   tokenizer.c       text -> token ids                            qemb_tokenizer
 *   lib/unigram.c     the same for QEMB_BERT
 *   qemb.c            token ids -> batch -> forward -> vectors     qemb_model
 *   lib/encoder.c     the forward of QEMB_BERT
 *   backends/         what the forward calls                       qemb_ops
 *
 * Sizes: B texts, T rows (tokens) of a batch, P rows of a shared prefix, D hidden size, H query
 * heads, K key/value heads, hd head size, F feed-forward size, L layers, V vocabulary rows. A
 * matrix is (out, in), row-major. Comments give the shape of every tensor.
 *
 * A function that can fail for a reason outside the program returns 0, or -1 with a filled
 * qemb_err; then it has changed nothing. What *_open or *_new returns, the caller closes or frees.
 * A text is a pointer and a length.
 */
#ifndef QEMB_H
#define QEMB_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define QEMB_VERSION "0.1.0"

/* ---- errors ---------------------------------------------------------------------------------- */

/* code: a short name that stays the same from version to version ("invalid_utf8", "model_file").
 * msg: one line, "<object>: <what> (got X, want Y)", without the program's name. */
typedef struct {
    const char *code; /* static string */
    char msg[400];
} qemb_err;

/* Fills *err (if not NULL) and returns -1, so that callers write `return qemb_fail(...)`. */
int qemb_fail(qemb_err *err, const char *code, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));

/* ---- embedders: texts to vectors (lib/embed_text.c) ------------------------------------------ */

typedef struct qemb_ops qemb_ops;
typedef struct qemb_options qemb_options;
/* A model file with its tokenizer and a model over one table of ops. One thread at a time. */
typedef struct qemb_embedder qemb_embedder;

/* QEMB_VERSION as the library was built. */
const char *qemb_version(void);

/* Opens the .qemb file path, of an embedding model. ops: the table that computes, NULL for the
 * fastest in float that this CPU has. opt: NULL for the defaults, with which texts are computed one
 * by one; for lists of texts, batch_tokens = qemb_batch_tokens(ops). Codes: "model_file", "device",
 * "out_of_memory", "usage" (max_tokens is more than the model can). */
int qemb_embedder_open(qemb_embedder **e, const char *path, const qemb_ops *ops,
                       const qemb_options *opt, qemb_err *err);
void qemb_embedder_close(qemb_embedder *e); /* NULL may be closed */
/* The numbers of a whole vector. */
int qemb_embedder_dim(const qemb_embedder *e);
/* The most tokens of a text, with the prompt and the end-of-text. */
int qemb_embedder_max_tokens(const qemb_embedder *e);
/* The model's prompt of that name ("query", "document"), or NULL. It lives as long as e. */
const char *qemb_embedder_prompt(const qemb_embedder *e, const char *name);
/* The name of the model's prompt i, from 0 on; NULL past the last one. It lives as long as e. */
const char *qemb_embedder_prompt_name(const qemb_embedder *e, int i);
/* *prompt = the prompt of a task ("Find packages"), in the form of the model's own prompts. The
 * caller frees it. Codes: "no_task" (theirs has no task), "out_of_memory". */
int qemb_embedder_task_prompt(const qemb_embedder *e, const char *task, char **prompt,
                              qemb_err *err);

/* out (dim) = the vector of text, len bytes of UTF-8, cut to dim numbers and scaled to length 1,
 * 1 <= dim <= qemb_embedder_dim. prompt is put before the text; NULL for none, which is right for
 * documents of most models. The end-of-text token is appended here. Codes: "invalid_utf8",
 * "too_long" (more tokens than the model takes), "empty_text" (no token at all), "bad_dim",
 * "non_finite" (no length to scale to 1), "out_of_memory", "device", "model_file" (the file was
 * written to since it was opened). */
int qemb_embed_text(qemb_embedder *e, const char *prompt, const char *text, size_t len, float *out,
                    int dim, qemb_err *err);

/* Texts that qemb_embed_texts embeds alike. */
typedef struct {
    const char *prompt; /* put before each text; NULL: none */
    int truncate;       /* 1: a text that is too long is cut; 0: it is an error */
    int dim;            /* numbers of a vector */
} qemb_text_options;

/* out (k, dim) = the vectors of the first k of the n texts, text[i] of len[i] bytes: as many as one
 * batch takes. A vector has the same bits whatever its batch. Returns k, 0 if n is 0. Returns -1 if
 * text[0] fails, with the codes of qemb_embed_text; a later text that fails ends the k texts, so
 * that it is the first one of the next call:
 *
 *   for (int i = 0, k; i < n; i += k) {
 *       k = qemb_embed_texts(e, &o, text + i, len + i, n - i, out + (size_t)i * o.dim, &err);
 *       if (k < 0) k = 1; // text i failed: err says why
 *   }
 */
int qemb_embed_texts(qemb_embedder *e, const qemb_text_options *o, const char *const text[],
                     const size_t len[], int n, float *out, qemb_err *err);

/* ---- the model, as the file describes it ----------------------------------------------------- */

/* What a text's vector is for. A reranker's texts are pairs of a query and a document; the vector
 * is one number, the logit of "the document answers the query". */
typedef enum { QEMB_EMBEDDING = 0, QEMB_RERANKER = 1 } qemb_kind;
/* How a vector is computed. QEMB_QWEN3: a decoder's layers, with RMSNorm before each block, RoPE
 * and SwiGLU (qemb.c). QEMB_BERT: an encoder's layers, with LayerNorm after each block, learned
 * positions, biases and GELU, as in BERT and XLM-RoBERTa (lib/encoder.c). */
typedef enum { QEMB_QWEN3 = 0, QEMB_BERT = 1 } qemb_architecture;
/* Which rows, after the last norm, become the vector: the last token's, the mean of all, or the
 * first token's. */
typedef enum { QEMB_POOL_LAST = 0, QEMB_POOL_MEAN = 1, QEMB_POOL_FIRST = 2 } qemb_pooling;
/* Which tokens of its text a token sees: itself and the earlier ones, or all. */
typedef enum { QEMB_CAUSAL = 0, QEMB_BIDIRECTIONAL = 1 } qemb_attention;
typedef enum { QEMB_IDENTITY = 0, QEMB_TANH = 1 } qemb_activation;

#define QEMB_NO_TOKEN (-1)

typedef struct {
    int32_t n_layers;      /* L */
    int32_t hidden;        /* D */
    int32_t n_heads;       /* H */
    int32_t n_kv_heads;    /* K, divides H */
    int32_t head_dim;      /* hd, even; H*hd need not equal D */
    int32_t ffn;           /* F */
    int32_t vocab;         /* V, rows of the embedding table */
    int32_t max_positions; /* longest text, with all tokens that are added to it */
    int32_t eos_id;        /* the token appended to every text, or QEMB_NO_TOKEN */
    float rope_theta;      /* 0: the model has no RoPE */
    float norm_eps;        /* of RMSNorm or LayerNorm */
    qemb_kind kind;
    qemb_pooling pooling;
    qemb_attention attention;
    int32_t dense_rows;         /* rows of the dense layer behind the pooling; 0: there is none */
    qemb_activation activation; /* of the dense layer */
    int32_t window;             /* longest text unless a caller says otherwise; 0: max_positions */
    qemb_architecture architecture;
    /* The rest is of QEMB_BERT. */
    int32_t bos_id;         /* the token put before every text, or QEMB_NO_TOKEN */
    int32_t pad_id;         /* has row first_position - 1 and takes no position; or QEMB_NO_TOKEN */
    int32_t first_position; /* row of the position table for a text's first token */
} qemb_config;

/* The rows of the position table of QEMB_BERT. */
static inline int qemb_position_rows(const qemb_config *c) {
    return c->first_position + c->max_positions;
}

/* The numbers of a vector: those of the dense layer, or D. A reranker has 1, its score's logit. */
static inline int qemb_dim(const qemb_config *c) {
    return c->dense_rows ? c->dense_rows : c->hidden;
}
/* The tokens that a text may have by default. */
static inline int qemb_window(const qemb_config *c) {
    return c->window ? c->window : c->max_positions;
}

typedef enum { QEMB_U8 = 0, QEMB_U32 = 1, QEMB_F32 = 2, QEMB_F16 = 3, QEMB_I8 = 4 } qemb_dtype;

/* Consecutive weights of a row that share a scale in an INT8 matrix; the last group of a row may be
 * shorter. */
#define QEMB_GROUP        64
#define QEMB_GROUPS(cols) (((cols) + QEMB_GROUP - 1) / QEMB_GROUP)

/* Significant bits of a matrix of halves, from the first 1 to the last 1 of a number; 0 has none.
 * A half with at most 8 of them is also a bfloat16 number. All weights of a BF16 checkpoint have
 * at most 8, since rounding one below 2^-17 to a half only removes bits. */
typedef enum {
    QEMB_BITS_UNKNOWN = 0, /* an older file, a matrix that a caller built */
    QEMB_BITS_8 = 8,       /* every number has at most 8 */
    QEMB_BITS_11 = 11      /* some number has more */
} qemb_bits;

/* A weight matrix W (rows = out, cols = in), for products y = alpha * x W^T. alpha is 1 in a file;
 * a backend that scales x sets alpha to undo it (the CUDA table scales SwiGLU's output). */
typedef struct {
    const void *data; /* (rows, cols) of dtype */
    int32_t rows, cols;
    qemb_dtype dtype;
    float alpha;
    const float *scale; /* (rows, QEMB_GROUPS(cols)) of QEMB_I8, else NULL:
                           W[r][c] = scale[r][c / QEMB_GROUP] * data[r][c] */
    qemb_bits bits;     /* of QEMB_F16, as the file records them */
} qemb_mat;

/* m->bits, or if they are unknown those of m's halves, which are read until one has more than 8.
 * A matrix that is not QEMB_F16 has QEMB_BITS_UNKNOWN. Call it before load_weights repacks m. In
 * lib/model_file.c. */
qemb_bits qemb_mat_bits(const qemb_mat *m);

/* A layer. The norms stand before their block in QEMB_QWEN3, behind it in QEMB_BERT. */
typedef struct {
    const float *attn_norm; /* (D)  */
    qemb_mat wqkv;          /* ((H+2K)*hd, D): rows of q heads, then k heads, then v heads */
    qemb_mat wo;            /* (D, H*hd) */
    const float *mlp_norm;  /* (D)  */
    qemb_mat wdown;         /* (D, F) */
    /* QEMB_QWEN3 alone */
    const float *q_norm; /* (hd) */
    const float *k_norm; /* (hd) */
    qemb_mat wgu;        /* (2F, D): F rows of gate, then F rows of up */
    /* QEMB_BERT alone: wup, and the biases of matrices and norms */
    qemb_mat wup;                                /* (F, D) */
    const float *bqkv, *bup;                     /* ((H+2K)*hd), (F) */
    const float *bo, *bdown;                     /* (D) */
    const float *attn_norm_bias, *mlp_norm_bias; /* (D) */
} qemb_layer;

typedef struct {
    qemb_mat tok_emb;        /* (V, D) */
    qemb_layer *layers;      /* (L) */
    const float *final_norm; /* (D); NULL: none, QEMB_BERT */
    /* QEMB_BERT alone; else NULL */
    const float *pos_emb;                  /* (qemb_position_rows, D) */
    const float *emb_norm, *emb_norm_bias; /* (D) */
    /* The dense layer, y = activation(dense x + dense_bias); NULL: none. Always in host memory. */
    const float *dense;      /* (dense_rows, D) */
    const float *dense_bias; /* (dense_rows) */
    int mapped; /* all of this lies in a file's map: pages dropped from memory can be read again */
} qemb_weights;

enum { QEMB_LAYER_MATRICES = 4 };
/* m[0..3] = the layer's matrices in the order in which the forward uses them. */
static inline void qemb_layer_matrices(qemb_layer *w, qemb_mat *m[QEMB_LAYER_MATRICES]) {
    m[0] = &w->wqkv, m[1] = &w->wo, m[2] = w->wup.data ? &w->wup : &w->wgu, m[3] = &w->wdown;
}

/* ---- the .qemb file -----------------------------------------------------------------------------
 *
 * All little-endian. Version 1:
 *   0     u8[8]  magic "qemb\r\n\x1a\n"
 *   8     u32    version, 1
 *   12    u32    0x01020304
 *   16    u64    bytes of the whole file
 *   24    u64    FNV-1a 64 of the header (this field as zero) followed by the directory
 *   32    u32    number of sections
 *   36    u32    0
 *   40    u8[32] SHA-256 of everything from byte 4096 to the end of the file
 *   72    u32[9] n_layers hidden n_heads n_kv_heads head_dim ffn vocab max_positions eos_id
 *           eos_id 0xffffffff: no token is appended
 *   108   f32[2] rope_theta norm_eps
 *   116   u32[6] kind pooling attention dense_rows activation window: the numbers of qemb.h's
 *           enums; all 0 in older files
 *   140   u64    FNV-1a 64 of the tables and vectors: the contents of all sections, in their order,
 *                that are u32 or have one row; 0 in older files: not recorded
 *   148   u32[4] architecture bos_id pad_id first_position: all 0 for QEMB_QWEN3, and in older
 *           files; ids 0xffffffff: none
 *   164   zeros up to 4096
 *   4096  the directory: per section, 96 bytes
 *           0 u8[48] name, padded with zeros   48 u32 dtype   52 u32 bits   56 u64 rows
 *           64 u64 cols   72 u64 offset        80 u64 bytes   88 u64 0
 *         bits, of an f16 section: the significant bits of its numbers. 8: at most 8 in every one;
 *         11: more in some; 0: not recorded (older files). 0 for every other dtype.
 *   then the sections, each at the next multiple of 256; the file ends where the last one ends.
 * Sections, in this order, all present:
 *   merges         u32 (M, 2)    BPE merge i joins ids [0],[1] into id 256+i
 *   added_tokens   u8  (1, n)    { u32 id, u32 length, bytes, zeros to a multiple of 4 } ...
 *   prompts        u8  (1, n)    { name NUL text NUL } ...
 *                                a reranker has "prefix", "suffix", "instruct": see lib/text_ids.h
 *   provenance     u8  (1, n)    "key: value" lines, UTF-8
 *   tok_emb        f16 (V, D)
 *   layers.I.attn_norm f32 (1, D), .wqkv f16, .q_norm f32 (1, hd), .k_norm f32 (1, hd), .wo f16,
 *   .mlp_norm f32 (1, D), .wgu f16, .wdown f16           for I = 0 .. L-1
 *   final_norm     f32 (1, D)
 *   dense          f32 (dense_rows, D), dense_bias f32 (1, dense_rows)    if dense_rows > 0
 * A file of QEMB_BERT has attention 1 and rope_theta 0, and other sections:
 *   unigram        u8  (1, n)    in the place of merges: see lib/unigram.c
 *   added_tokens, prompts, provenance, tok_emb            as above
 *   pos_emb        f32 (first_position + max_positions, D): rows of positions, to each of which the
 *                                row of token type 0 was added
 *   emb_norm, emb_norm_bias   f32 (1, D)
 *   layers.I.wqkv f16, .bqkv f32 (1, (H+2K)*hd), .wo f16, .bo f32 (1, D), .attn_norm f32 (1, D),
 *   .attn_norm_bias f32 (1, D), .wup f16 (F, D), .bup f32 (1, F), .wdown f16, .bdown f32 (1, D),
 *   .mlp_norm f32 (1, D), .mlp_norm_bias f32 (1, D)      for I = 0 .. L-1
 *   dense, dense_bias         as above
 * In an INT8 file the four matrices of every layer are i8, in -127 .. 127, and each is followed by
 * a section of its name and ".scale", f32 (rows, cols / 64 rounded up), a scale for each 64 weights
 * of a row: W[r][c] = scale[r][c / 64] * data[r][c].
 * convert_weights.py writes it, model_file.c reads it.
 */
typedef struct {
    const char *name; /* a prompt's name: "query", "document" */
    const char *text; /* NUL-terminated */
} qemb_prompt;

typedef struct {
    qemb_config config;
    qemb_weights weights; /* pointers into the map; layers is owned by the file */
    uint8_t *tables; /* owned: a copy of merges or unigram, added tokens and prompts, where these
                        point to */
    const uint32_t *merges; /* QEMB_QWEN3 alone */
    uint32_t n_merges;
    const uint8_t *unigram; /* QEMB_BERT alone */
    size_t unigram_bytes;
    const uint8_t *added;
    size_t added_bytes;
    const qemb_prompt *prompts;
    int n_prompts;
    const char *provenance; /* not NUL-terminated */
    size_t provenance_bytes;
    uint8_t sha256[32];  /* as recorded, not verified */
    uint8_t checksum[8]; /* of header and directory, as recorded */
    int tables_proved;   /* tables and vectors have their checksum; 0: an older file without */
    const uint8_t *map;  /* the whole file, read-only */
    size_t map_bytes;
    struct qemb_watch *watch; /* owned; what qemb_file_check compares with. NULL: never changes */
} qemb_file;

/* Maps and validates path; reads no matrix. The caller closes; pointers taken from *f end with it.
 * Codes: "model_file", "out_of_memory". */
int qemb_file_open(qemb_file **f, const char *path, qemb_err *err);
void qemb_file_close(qemb_file *f);
/* Returns -1, code "model_file", if the file that f was opened from has been written to or
 * truncated since. Weights that were read before a call that returns 0 were the file's own: the
 * system sets a file's time of modification before it shows what was written. Its clock ticks every
 * few milliseconds, so a write within a tick of the one before opening goes unseen. The path may
 * name another file by then, or none; that changes nothing. Thread-safe. */
int qemb_file_check(const qemb_file *f, qemb_err *err);
/* The text of the prompt `name`, or NULL. */
const char *qemb_file_prompt(const qemb_file *f, const char *name);

/* ---- tokenizer.c, lib/unigram.c: the ids of Hugging Face's tokenizers ------------------------ */

typedef struct qemb_tokenizer qemb_tokenizer; /* immutable, shared by threads */
typedef struct qemb_tokenizer_state
    qemb_tokenizer_state; /* scratch and pre-token cache of one thread */

/* Byte-level BPE. Builds the tables. merges (n_merges, 2) and added (the file's section
 * added_tokens) must outlive t. Refuses with code "model_file": a merge of an id that no earlier
 * merge makes, a pair that occurs twice, a token over 1,024 bytes, malformed added tokens, an added
 * token's id below 256 + n_merges. The caller closes. */
int qemb_tokenizer_open(qemb_tokenizer **t, const uint32_t *merges, uint32_t n_merges,
                        const uint8_t *added, size_t added_bytes, qemb_err *err);
/* The same for Unigram. unigram (the file's section of that name) and added must outlive t. Refuses
 * with code "model_file" a section whose parts do not fit each other, pieces that occur twice, text
 * that is not UTF-8, scores that are not -1,000,000 to 0, malformed added tokens. */
int qemb_unigram_open(qemb_tokenizer **t, const uint8_t *unigram, size_t bytes,
                      const uint8_t *added, size_t added_bytes, qemb_err *err);
/* Builds those of f, which must stay valid until close, in lib/model_file.c. Also refuses ids
 * without a row in the embedding table. Codes: "model_file", "out_of_memory". */
int qemb_file_tokenizer(qemb_tokenizer **t, const qemb_file *f, qemb_err *err);
void qemb_tokenizer_close(qemb_tokenizer *t);
qemb_tokenizer_state *qemb_tokenizer_state_new(const qemb_tokenizer *t); /* NULL: out of memory */
void qemb_tokenizer_state_free(qemb_tokenizer_state *s);
/* The largest id that can come out, plus 1. */
uint32_t qemb_tokenizer_n_ids(const qemb_tokenizer *t);

typedef struct {
    const int32_t *ids; /* (n), owned by the state, valid until its next call */
    size_t n;
    size_t bytes_left; /* above 0 exactly when `limit` cut ids off. BPE: bytes of the text, after
                          NFC, that the ids do not cover. Unigram: about as many */
} qemb_tokenizer_result;

/* text, len bytes of UTF-8 (NUL is a character like any other) -> ids, without added ones. At most
 * `limit` ids come out: the first ones of the whole text's ids. The rest of the text is then
 * neither tokenized nor validated. Time is linear in len. Codes: "invalid_utf8" (the message names
 * the byte offset), "too_long" (a word of more than 8 MiB), "out_of_memory". */
int qemb_tokenizer_encode(qemb_tokenizer_state *s, const char *text, size_t len, size_t limit,
                          qemb_tokenizer_result *r, qemb_err *err);
/* Writes the bytes of token id to buf, at most cap of them. Returns how many the token has: BPE's
 * added tokens have none. Those of Unigram have U+2581 in the place of a space. */
size_t qemb_tokenizer_token_bytes(const qemb_tokenizer *t, uint32_t id, uint8_t *buf, size_t cap);

/* ---- a packed batch: texts laid end to end, nothing padded ----------------------------------- */

/* A batch as the ops see it. Rows 0..P-1 hold the longest common prefix of all texts' ids, once, at
 * positions 0..P-1. Rows cu[b]..cu[b+1]-1 hold the other ids of text b, at positions P, P+1, ...;
 * they attend to the prefix's rows and to the text's own. cu[0] = P, cu[B] = T. */
typedef struct {
    int B, T, P;
    const int32_t *tokens; /* (T) */
    const int32_t *pos;    /* (T); of QEMB_BERT the rows of pos_emb */
    const int32_t *cu;     /* (B+1) */
    int bidirectional;     /* 1: a token sees its whole text, and P = 0; 0: itself and what is
                              before it */
    int first, rows; /* attention computes rows first .. first+rows-1 alone; rows = 0: all. Never
                        set for a table with in_flight */
} qemb_packed_batch;

/* The rows that attention computes. */
static inline int qemb_first_row(const qemb_packed_batch *b) { return b->rows ? b->first : 0; }
static inline int qemb_end_row(const qemb_packed_batch *b) {
    return b->rows ? b->first + b->rows : b->T;
}

/* Rows of each text that an op computes or takes. */
typedef enum { QEMB_ALL_ROWS, QEMB_LAST_ROWS, QEMB_FIRST_ROWS } qemb_rows;

/* ---- backends -------------------------------------------------------------------------------- */

struct qemb_options {
    int batch_tokens; /* rows of a bulk batch; 0: the table's default, of a reranker its window */
    int max_tokens;   /* longest text with the added tokens; 0: the model's window */
    int mlp_rows;     /* rows that the MLP computes at a time; 0: the table's default */
    int threads;      /* CPU threads; 0: qemb_cpu_count() */
    /* For the CUDA backend; the CPU's tables ignore them. */
    int device;        /* which GPU, from 0 on */
    int deterministic; /* a vector's bits do not depend on its batch (always so on a CPU) */
    int hopper;        /* the kernels for sm_90, where the shapes allow; off if deterministic */
    int no_graphs;     /* launches small batches op by op instead of replaying CUDA graphs */
    size_t vram;       /* bytes of GPU memory to use at most; 0: what is free */
    /* Directory for timings of cuBLASLt's algorithms; NULL: none are timed, cuBLASLt chooses. */
    const char *cache_dir;
    /* Called after each layer that load_weights has copied; NULL: not called. */
    void (*on_layer_loaded)(int layers, int of);
    /* For the CPU's tables; that of CUDA, which puts whole batches in line, ignores it. A text of
     * more than batch_tokens ids is computed in steps, some rows of some ops each, with the same
     * bits. Between two of them between_steps(between_arg) is called, by the thread that computes.
     * It may call qemb_embed_between. Returns 0, or 1 to give the text up: its row of out is then
     * NaN. NULL: no steps. */
    int (*between_steps)(void *arg);
    void *between_arg;
};

/* Rows of a bulk batch, unless the table or the options say otherwise. */
#define QEMB_BATCH_TOKENS 1024
/* Rows that the MLP computes at a time, so that its buffers do not grow with the longest text. */
#define QEMB_MLP_ROWS 1024

typedef struct qemb_backend qemb_backend; /* a table's own state: device, stream, threads */
typedef struct qemb_act qemb_act;         /* an activation: float on the CPU, half on CUDA */

/* A part of the memory that a backend allocates for itself. */
typedef struct {
    const char *what; /* static string */
    size_t bytes;
} qemb_part;
#define QEMB_PARTS 16

/* Faults that did not end the run. */
typedef struct {
    uint64_t recomputed; /* vectors that were not finite and were computed again on the CPU */
    uint64_t clamped;    /* numbers clamped to the largest value of the activations' type */
    const char *failure; /* one line that says why the device stopped, or that the model's file
                            was written to (qemb_file_check); NULL: it works */
} qemb_health;

/* The arithmetic of the GEMMs. On a CPU everything else is float, except that attention of the
 * tables with AVX-512 or tiles multiplies 16-bit integers where the arithmetic is not f32. Tables
 * with tiles (amx.c) do not scale: INT16 has 16 bits of each activation, INT8 has bfloat16
 * activations. On CUDA activations are halves, sums float. */
typedef enum {
    QEMB_MATH_F32,   /* weights as the file has them, activations in float */
    QEMB_MATH_BF16,  /* both rounded to bfloat16 */
    QEMB_MATH_INT16, /* both scaled to 16-bit integers, a scale for 64 numbers of a row */
    QEMB_MATH_INT8,  /* the same with 8 bits; activations with AVX2: 128 steps from the least on */
    QEMB_MATH_FP8,   /* both scaled to e4m3, a scale for a row of weights and for a token */
    QEMB_MATH_F16    /* both in half precision */
} qemb_math;

/* One table per backend and arithmetic. Ops return void, assert on misuse, and read and write only
 * what their shapes say. The forward calls them in order, from one thread. The residual stream x is
 * float everywhere. On a CPU, and on CUDA with `deterministic`, a row's result depends on that
 * row's inputs alone, in attention also on the rows of its text that it sees: never on T or on
 * other texts. */
struct qemb_ops {
    const char *name;
    qemb_math math;
    size_t act_size;  /* bytes of one qemb_act */
    int batch_tokens; /* rows of a bulk batch by default; 0: QEMB_BATCH_TOKENS */
    int mlp_rows;     /* rows that the MLP computes at a time by default; 0: QEMB_MLP_ROWS */
    int in_flight;    /* batches that may be between pool and collect; 0: there is no collect */

    /* The table that recomputes vectors with infinities or NaN. It must read the map without
     * copying weights. NULL: the activations cannot overflow earlier than float. */
    const qemb_ops *(*fallback)(void);
    /* The number of rows to which a batch of T rows is padded by one more text, which is not
     * pooled. The result is at least T, never falls as T grows, and padding twice changes nothing.
     * Buffers have that many rows. NULL: no padding. */
    int (*pad_rows)(int T);
    /* Lists the GPU memory that open, load_weights and arena will allocate for f, the options opt
     * (all defaults filled in) and `arena` bytes of activations. Returns the number of parts, at
     * most QEMB_PARTS. NULL: a CPU table; the options for GPUs do not apply. */
    int (*plan)(qemb_part *parts, const qemb_file *f, const qemb_options *opt, size_t arena);
    /* Bytes that load_weights allocates for repacked copies of matrices. NULL: none. */
    size_t (*repacked_bytes)(const qemb_weights *w, int n_layers);
    /* Bytes of free memory of a GPU; 0: not known. NULL: a CPU table. */
    size_t (*free_memory)(int device);
    /* The number of GPUs that options.device can name. NULL: a CPU table. */
    int (*devices)(void);
    /* Adds the faults of be to h. NULL: there are none to count. */
    void (*health)(const qemb_backend *be, qemb_health *h);

    /* Opens a backend for config c, which must stay valid until close. Codes: "device",
     * "out_of_memory". */
    int (*open)(qemb_backend **be, const qemb_config *c, const qemb_options *opt, qemb_err *err);
    void (*close)(qemb_backend *be);
    /* Memory for the activations, aligned to 256 bytes, freed by close. Called once, before
     * load_weights. */
    void *(*arena)(qemb_backend *be, size_t bytes, qemb_err *err);
    /* Makes w usable by the ops: replaces pointers into the map by pointers to the backend's copies
     * where it makes some (the plain table makes none). Called once. */
    int (*load_weights)(qemb_backend *be, qemb_weights *w, qemb_err *err);
    /* Announces the batch of the following calls, up to pool. b lies in host memory. Returns 1 if
     * the table has recorded the ops for such a batch: then only pool is called. Else 0. */
    int (*begin)(qemb_backend *be, const qemb_packed_batch *b);

    /* x (T, D) = rows tokens[t] of tok_emb (V, D), plus rows pos[t] of pos_emb (positions, D)
     * unless that is NULL */
    void (*embed)(qemb_backend *be, float *x, const qemb_mat *tok_emb, const float *pos_emb,
                  const qemb_packed_batch *b);
    /* y (T, D) = x / sqrt(mean(x^2) + eps) * w,  x (T, D), w (D) */
    void (*rmsnorm)(qemb_backend *be, qemb_act *y, const float *x, const float *w, int T);
    /* x (T, D) in place = (z - mean(z)) / sqrt(mean((z - mean(z))^2) + eps) * w + b, where z = x +
     * bias; y (T, D) = x.  w, b, bias (D); bias NULL: none. QEMB_BERT alone. */
    void (*layernorm)(qemb_backend *be, qemb_act *y, float *x, const float *bias, const float *w,
                      const float *b, int T);
    /* y (T, out) = alpha * x W^T + bias,  x (T, in), W (out, in), bias (out) or NULL */
    void (*matmul)(qemb_backend *be, qemb_act *y, const qemb_act *x, const qemb_mat *w,
                   const float *bias, int T);
    /* x (T, out) += alpha * a W^T,  a (T, in), W (out, in) */
    void (*matmul_add)(qemb_backend *be, float *x, const qemb_act *a, const qemb_mat *w, int T);
    /* qkv (T, (H+2K)*hd) in place: every q and k head is RMS-normed with q_norm or k_norm (hd),
     * then rotated by its position (RoPE on halves); v is not changed */
    void (*qknorm_rope)(qemb_backend *be, qemb_act *qkv, const float *q_norm, const float *k_norm,
                        const qemb_packed_batch *b);
    /* Grouped-query attention with scale 1/sqrt(hd), qkv (T, (H+2K)*hd), causal unless
     * b->bidirectional. All rows: att (T, H*hd), or b's rows from `first` on. Each text's last or
     * first row: att (B, H*hd). */
    void (*attention)(qemb_backend *be, qemb_act *att, const qemb_act *qkv,
                      const qemb_packed_batch *b, qemb_rows rows);
    /* h (T, F) = silu(gate) * up; gate and up (T, F) are the two halves of x W^T,  x (T, in), W
     * (2F, in): gate's rows, then up's. gu (T, 2F) is scratch for tables that do not fuse the
     * two. */
    void (*gate_up)(qemb_backend *be, qemb_act *h, qemb_act *gu, const qemb_act *x,
                    const qemb_mat *w, int T);
    /* h (T, F) = gelu(alpha * x W^T + bias),  x (T, in), W (F, in), bias (F);  gelu(t) = t/2 (1 +
     * erf(t / sqrt(2))). QEMB_BERT alone. */
    void (*matmul_gelu)(qemb_backend *be, qemb_act *h, const qemb_act *x, const qemb_mat *w,
                        const float *bias, int T);
    /* y (B, D) = each text's last or first row of x (T, D) */
    void (*gather)(qemb_backend *be, float *y, const float *x, const qemb_packed_batch *b,
                   qemb_rows rows);
    /* y (B, D) = mean of rmsnorm(x row) with w (D) over each text's rows, the shared prefix's
     * included; w NULL: of the rows as they are. x (T, D) is scratch from here on. Sums so that a
     * text's bits do not depend on where its rows lie, nor on how many of them are shared. */
    void (*gather_mean)(qemb_backend *be, float *y, float *x, const float *w,
                        const qemb_packed_batch *b);
    /* out (B, D), in host memory = rmsnorm of x (B, D) with w (D), or x if w is NULL; x is scratch
     * from here on.
     * Without in_flight, out is written here, else in collect. Returns 1 if the ops have to be
     * called again, from begin on, because the recording failed. Else 0. */
    int (*pool)(qemb_backend *be, float *out, float *x, const float *w, int B);
    /* Waits for the oldest batch between pool and collect, and writes its out. */
    void (*collect)(qemb_backend *be);
};

/* The table "plain" of qemb.c: portable C. */
extern const qemb_ops qemb_cpu_ops;
/* backends/cpu/cpu_count.c: CPUs that this process may use: those of its affinity, and no more than
 * the quotas of its control groups, rounded up. */
int qemb_cpu_count(void);
/* backends/cpu/dispatch.c: the tables that this CPU can run, "plain" first, the fastest of each
 * arithmetic last; NULL past the end. */
const qemb_ops *qemb_cpu_table(int i);
/* The fastest table whose error is at most that of math, which may be another arithmetic. Errors:
 * f32 < int16 < bf16 < int8. The name is a table's ("avx512-int8") or that of instructions
 * ("avx512": all their tables); NULL: any. NULL if there is none, as for fp8 and f16. */
const qemb_ops *qemb_cpu_choose(const char *name, qemb_math math);
/* The fastest table in float that reads the map and copies no weights. */
const qemb_ops *qemb_cpu_mapped(void);

/* ---- the engine ------------------------------------------------------------------------------ */

typedef struct qemb_model qemb_model; /* computes one batch at a time */
typedef struct qemb_batch qemb_batch; /* texts that one forward will compute */

/* Memory of a model, in bytes. */
typedef struct {
    int batch_tokens;   /* as in the options, filled in */
    size_t arena_batch; /* activations of a bulk batch of batch_tokens rows, and what a dense layer
                           reads */
    size_t arena_text;  /* activations of one text of max_tokens */
    size_t arena_between; /* those of a second batch, for qemb_embed_between; 0: not asked for */
    size_t weights; /* the layers' matrices in the map: every batch reads them, or their copy */
    size_t table;   /* the tables of tokens and positions in the map: only rows in use are read */
    size_t repacked_bytes;       /* the table's repacked copies of matrices; 0: it makes none */
    qemb_part parts[QEMB_PARTS]; /* (n_parts) the backend's own memory, activations included */
    int n_parts;
} qemb_memory;

/* The memory that qemb_open would use, without opening anything. */
void qemb_plan(const qemb_file *f, const qemb_ops *ops, const qemb_options *opt, qemb_memory *mem);

/* Opens a model over f, which must stay valid until qemb_close. opt may be NULL. Codes: "device",
 * "out_of_memory", "model_file" (the file was written to meanwhile). */
int qemb_open(qemb_model **m, const qemb_file *f, const qemb_ops *ops, const qemb_options *opt,
              qemb_err *err);
void qemb_close(qemb_model *m);
const qemb_options *qemb_options_of(const qemb_model *m); /* with the defaults filled in */
int qemb_batch_tokens(const qemb_ops *ops); /* rows of a bulk batch where the options say 0 */
/* To be called by the thread that calls qemb_embed. */
qemb_health qemb_health_of(const qemb_model *m);

/* An empty batch for m. There may be several, so that one is filled while another computes. */
qemb_batch *qemb_batch_new(const qemb_model *m); /* NULL: out of memory */
void qemb_batch_free(qemb_batch *b);
void qemb_batch_clear(qemb_batch *b);
/* Adds a text: ids (n), end-of-text included, 1 <= n <= max_tokens, every id in 0..V-1. The caller
 * owns ids and keeps them until qemb_embed returns. Returns the row of out for the text's vector,
 * the same row for equal texts, or -1 if it belongs into the next batch: this one has no room, or
 * what its texts no longer share costs more than another batch. An empty batch takes every text. */
int qemb_pack_add(qemb_batch *b, const int32_t *ids, int n);
int qemb_batch_rows(const qemb_batch *b); /* rows of out: distinct texts */
/* Tokens that need not be computed because the texts share a prefix. */
size_t qemb_batch_tokens_saved(const qemb_batch *b);
/* Tokens that the forward computes: those of the distinct texts, a shared prefix once. */
size_t qemb_batch_tokens_computed(const qemb_batch *b);

/* out (qemb_batch_rows, qemb_dim) = the texts' rows after pooling, last norm and dense layer,
 * neither cut nor scaled. If the device fails, or the model's file was written to, out holds NaN
 * and qemb_health_of says why, from then on. */
void qemb_embed(qemb_model *m, const qemb_batch *b, float *out);
/* The same in two steps, so that a GPU has its next batch before the host has looked at the last
 * one: submit starts a batch, collect waits for the oldest one and writes its out. Up to
 * qemb_in_flight batches may be submitted and not collected; b and out stay the caller's and
 * unchanged until then. All calls on a model are made by one thread at a time. */
void qemb_submit(qemb_model *m, const qemb_batch *b, float *out);
void qemb_collect(qemb_model *m);
int qemb_in_flight(const qemb_model *m); /* at least 1 */
/* qemb_embed for a call of between_steps. b has at most batch_tokens rows. */
void qemb_embed_between(qemb_model *m, const qemb_batch *b, float *out);

/* dst (dim) = the first dim numbers of src, scaled to length 1. Returns -1 and leaves dst alone if
 * their length is zero or not finite. Sums in double, in order: the same bits on every backend. */
int qemb_l2_normalize(float *dst, const float *src, int dim);
/* Whether qemb_l2_normalize can scale src (dim): 1, or 0. */
int qemb_has_length(const float *src, int dim);

#ifdef __cplusplus
}
#endif
#endif
