/* open_model.c - a model file with its tokenizer; see open_model.h. */
#include "open_model.h"

#include "console.h"
#include "map_fault.h"

#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <openssl/evp.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* ---- what was named instead of a .qemb file -------------------------------------------------- */

/* Ends the process: what path is, and that `make convert` makes a .qemb file of `source`. */
_Noreturn static void convert(const char *path, const char *what, const char *source) {
    const char *quote = strpbrk(source, " '()&;$*?") ? "\"" : "";
    DIE(STATUS_MODEL,
        "%.128s: %s (want a .qemb file: make convert MODEL=%s%.200s%s OUT=model.qemb)", path, what,
        quote, source, quote);
}

static int has(const char *folder, const char *name) {
    char path[PATH_MAX];
    return snprintf(path, sizeof path, "%s/%s", folder, name) < (int)sizeof path &&
           !access(path, F_OK);
}

_Noreturn static void explain_folder(const char *path) {
    if (has(path, "adapter_config.json"))
        DIE(STATUS_MODEL,
            "%.128s: a LoRA adapter (want a model: merge the two by peft's merge_and_unload, then "
            "make convert MODEL=MERGED OUT=model.qemb)",
            path);
    if (has(path, "config.json")) convert(path, "a Hugging Face directory", path);
    DIE(STATUS_MODEL, "%.128s: a directory (want a .qemb file)", path);
}

/* owner/name, as Hugging Face's hub allows it: not more than that, and no .qemb file */
static int is_hub_name(const char *s) {
    const char *slash = strchr(s, '/');
    const size_t n = strlen(s);
    if (!slash || slash == s || !slash[1] || strchr(slash + 1, '/') || *s == '.') return 0;
    for (const char *p = s; *p; p++)
        if (!isalnum((unsigned char)*p) && !strchr("-_./", *p)) return 0;
    return n < 5 || strcmp(s + n - 5, ".qemb");
}

/* The name of a model that is not there; `make convert` can take it from the hub. */
static void explain_missing(const char *path) {
    if (is_hub_name(path)) convert(path, "no such file; a name on the hub is not opened", path);
    DIE(STATUS_MODEL,
        "%.128s: %s (make convert MODEL=Qwen/Qwen3-Embedding-0.6B OUT=model.qemb makes a model)",
        path, strerror(ENOENT));
}

static uint64_t get_u64(const uint8_t *p) {
    uint64_t x = 0;
    for (int i = 7; i >= 0; i--) x = x << 8 | p[i];
    return x;
}

/* The same of a file that is a part of a Hugging Face directory. */
_Noreturn static void explain_part(const char *path, const char *what) {
    const char *slash = strrchr(path, '/');
    char folder[256];
    snprintf(folder, sizeof folder, "%.*s", slash ? (int)(slash - path) : 1, slash ? path : ".");
    convert(path, what, folder);
}

/* h: the file's first 16 bytes */
static void explain_file(const char *path, const uint8_t *h, uint64_t size) {
    if (!memcmp(h, "GGUF", 4)) convert(path, "a GGUF file", path);
    if (h[8] == '{' && get_u64(h) < size && size - get_u64(h) >= 8) /* length of the JSON in it */
        explain_part(path, "a safetensors file of a Hugging Face directory");
    if (!memcmp(h, "PK\3\4", 4))
        explain_part(path, "a zip, as PyTorch's checkpoint in a Hugging Face directory");
    /* Field 1 of the message is the first piece, whose field 1 is its text. */
    if (h[0] == '\n' && h[2] == '\n' && !memcmp(h + 4, "<unk>", 5))
        explain_part(path, "a SentencePiece model of a Hugging Face directory");
    if (!memcmp(h, "qemb\r\n\x1a\n", 8) && (h[8] != 1 || h[9] || h[10] || h[11]))
        DIE(STATUS_MODEL,
            "%.128s: a .qemb file of version %u (qemb " QEMB_VERSION
            " reads version 1: make convert "
            "makes the file again)",
            path, (unsigned)(get_u64(h + 8) & UINT32_MAX));
}

/* Ends the process with a message if path is something that people take for a model file. */
static void explain(const char *path) {
    struct stat st;
    uint8_t h[16];
    if (stat(path, &st)) {
        if (errno == ENOENT || errno == ENOTDIR) explain_missing(path);
        return;
    }
    if (S_ISDIR(st.st_mode)) explain_folder(path);
    const int fd = S_ISREG(st.st_mode) ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (fd < 0) return;
    const ssize_t n = pread(fd, h, sizeof h, 0);
    close(fd);
    if (n == sizeof h) explain_file(path, h, (uint64_t)st.st_size);
}

/* ---- opening --------------------------------------------------------------------------------- */

static int try_weights(qemb_file **f, const char *path, qemb_err *err) {
    map_fault_opening(path);
    const int failed = qemb_file_open(f, path, err);
    if (!failed) map_fault_watch((*f)->map, (*f)->map_bytes, path);
    map_fault_opening(NULL);
    return failed;
}

qemb_file *open_weights(const char *path) {
    qemb_err err;
    qemb_file *f;
    if (try_weights(&f, path, &err)) refuse_model_file(path, &err);
    return f;
}

void close_weights(qemb_file *f) {
    if (!f) return;
    map_fault_forget(f->map);
    qemb_file_close(f);
}

int verify_weights(uint8_t digest[SHA256_BYTES], const qemb_file *f, const char *path,
                   qemb_err *err) {
    const size_t start = 4096; /* the header holds the digest and is not digested */
    if (!EVP_Digest(f->map + start, f->map_bytes - start, digest, NULL, EVP_sha256(), NULL))
        return qemb_fail(err, "out_of_memory", "libcrypto: no SHA-256");
    if (!memcmp(digest, f->sha256, SHA256_BYTES)) return 0;
    return qemb_fail(err, "model_file",
                     "%.128s: SHA-256: not what its writer recorded; copy or convert it again",
                     path);
}

int try_model_file(model_file *m, const model_options *o, qemb_err *err) {
    qemb_err why;
    uint8_t digest[SHA256_BYTES];
    *m = (model_file){0};
    if (try_weights(&m->file, o->model, err)) return -1;
    if (o->verify && verify_weights(digest, m->file, o->model, err)) {
        close_model_file(m);
        return -1;
    }
    if (!qemb_file_tokenizer(&m->tokenizer, m->file, &why)) return 0;
    close_model_file(m);
    return qemb_fail(err, why.code, "%.128s: %s", o->model, why.msg);
}

void refuse_model_file(const char *path, const qemb_err *err) {
    explain(path);
    DIE(STATUS_MODEL, "%s", err->msg);
}

void open_model_file(model_file *m, const model_options *o) {
    qemb_err err;
    if (try_model_file(m, o, &err)) refuse_model_file(o->model, &err);
}

void close_model_file(model_file *m) {
    qemb_tokenizer_close(m->tokenizer);
    close_weights(m->file);
    *m = (model_file){0};
}
