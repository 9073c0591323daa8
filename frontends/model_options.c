/* model_options.c - the option rows of both programs; see model_options.h. */
#include "model_options.h"

#include "console.h"
#include "select_ops.h"

#include <limits.h>
#include <string.h>

#define TEXTS   (FOR_EMBED | FOR_SHARDS | FOR_TOKENIZE)
#define COMPUTE (FOR_EMBED | FOR_SHARDS | FOR_PLAN | FOR_CHECK | FOR_GREP | FOR_RERANK)
#define TABLE   (COMPUTE | FOR_INFO)
#define AT(m)   .at = offsetof(model_options, m)

/* clang-format off */
const option_row model_option_rows[] = {
    {"model", "FILE", "the model, made by convert_weights.py", NULL,
     OPTION_STRING, AT(model), .letter = 'm', .suffix = ".qemb"},
    {"verify", NULL, "check the file's SHA-256 first", NULL,
     OPTION_FLAG, AT(verify), .value = 1,
     .commands = TEXTS | FOR_INFO | FOR_CHECK | FOR_GREP | FOR_RERANK},
    {"query", NULL, "the texts are queries: the model's own prompt", NULL,
     OPTION_FLAG, AT(query), .value = 1, .commands = TEXTS},
    {"document", NULL, "the texts are documents: the model's prompt, if any", NULL,
     OPTION_FLAG, AT(document), .value = 1, .commands = TEXTS},
    {"prompt", "NAME", "the model's prompt NAME (qemb info lists them)", NULL,
     OPTION_STRING, AT(prompt), .commands = TEXTS | FOR_GREP},
    {"instruct", "TASK", "the texts are queries for TASK", NULL,
     OPTION_STRING, AT(instruct), .commands = TEXTS | FOR_GREP | FOR_RERANK},
    {"truncate", NULL, "cut longer texts; else they are errors", NULL,
     OPTION_FLAG, AT(truncate), .value = 1, .commands = TEXTS | FOR_GREP | FOR_RERANK},
    {"max-tokens", "N", "longest text, end-of-text included", NULL,
     OPTION_INT, AT(engine.max_tokens), .unset = "the model's", .min = 1, .max = INT_MAX,
     .commands = TEXTS | FOR_PLAN | FOR_GREP | FOR_RERANK},
    {"batch-tokens", "N", "tokens in a batch", NULL,
     OPTION_INT, AT(engine.batch_tokens), .unset = "1024; reranker, GPU: more",
     .min = 1, .max = 1 << 24,
     .commands = FOR_EMBED | FOR_SHARDS | FOR_PLAN | FOR_GREP | FOR_RERANK},
    {"threads", "N", "CPU threads of the model", NULL,
     OPTION_INT, AT(engine.threads), .unset = "all it may use", .min = 1, .max = 4096,
     .commands = COMPUTE},
    {"cpu", "NAME", "instructions such as avx2, or a table", NULL,
     OPTION_STRING, AT(cpu), .unset = "the fastest", .commands = TABLE},
    {"math", "NAME", "f32, int16, bf16, int8; GPU: f16, fp8", NULL,
     OPTION_STRING, AT(math), .unset = "f32; GPU: f16", .choices = math_names, .commands = TABLE},
    {"devices", "LIST", "GPU: which, such as 0,2, or all", "0",
     OPTION_STRING, AT(device_list), .commands = COMPUTE, .gpu = 1},
    {"vram", "MIB", "GPU: memory to use at most, of each", NULL,
     OPTION_SIZE, AT(engine.vram), .unset = "what is free", .min = 1, .max = 1 << 30, .shift = 20,
     .commands = COMPUTE, .gpu = 1},
    {"deterministic", NULL, "GPU: a vector does not depend on its batch", NULL,
     OPTION_FLAG, AT(engine.deterministic), .value = 1, .commands = COMPUTE, .gpu = 1},
    {"no-graphs", NULL, "GPU: no CUDA graphs for small batches", NULL,
     OPTION_FLAG, AT(engine.no_graphs), .value = 1, .commands = COMPUTE, .gpu = 1},
    {"hopper", NULL, "GPU: the kernels for compute capability 9.0", NULL,
     OPTION_FLAG, AT(engine.hopper), .value = 1, .commands = COMPUTE, .gpu = 1},
    {"completion", NULL, "the options as a table, which shells complete by", NULL,
     OPTION_TABLE, .at = 0},
};
/* clang-format on */
const int n_model_option_rows = LENGTH(model_option_rows);

static void add_device(model_options *o, int device) {
    for (int i = 0; i < o->n_devices; i++)
        if (o->devices[i] == device) usage("--devices: GPU %d twice", device);
    if (o->n_devices == MAX_DEVICES) usage("--devices: too many (want at most %d)", MAX_DEVICES);
    o->devices[o->n_devices++] = device;
}

/* Fills devices. Whether there is a GPU at all is left to qemb_open, which knows why not. */
static void find_devices(model_options *o) {
    const char *p = o->device_list;
    if (!o->ops->devices || !strcmp(p, "0")) { /* no GPU is asked */
        add_device(o, 0);
        return;
    }
    const int n = o->ops->devices();
    if (!strcmp(p, "all")) {
        for (int i = 0; i < (n ? n : 1); i++) add_device(o, i);
        return;
    }
    do {
        int device = 0;
        const char *start = p;
        for (; *p >= '0' && *p <= '9' && device < 10000; p++) device = 10 * device + (*p - '0');
        if (p == start || (*p && *p != ','))
            usage("--devices: not a list of GPUs (got %.40s, want numbers such as 0,2, or all)",
                  o->device_list);
        if (n && device >= n)
            usage("--devices: no GPU %d (got %d GPU%s)", device, n, n == 1 ? "" : "s");
        add_device(o, device);
    } while (*p++);
}

void model_options_check(model_options *o) {
    qemb_err err;
    o->ops = select_ops(o->cpu, o->math, &err);
    if (!o->ops) usage("%s", err.msg);
    find_devices(o);
    if (!o->model) usage("no model (want -m MODEL.qemb)");
    if (o->query + o->document + !!o->prompt + !!o->instruct > 1)
        usage("--query, --document, --prompt and --instruct: only one of them");
    if (o->instruct && !*o->instruct)
        usage("--instruct: an empty task (leave it out for documents)");
}
