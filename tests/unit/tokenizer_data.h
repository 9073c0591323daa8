/* tokenizer_data.h - reads a Hugging Face tokenizer.json (or .json.xz, through the xz program) into
 * what qemb_tokenizer_open takes. For tests and benchmarks; the product reads a .qemb. */
#ifndef TOKENIZER_DATA_H
#define TOKENIZER_DATA_H

#include <jansson.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    uint32_t *merges; /* (n_merges, 2) */
    uint32_t n_merges;
    uint8_t *added; /* as the section added_tokens of a .qemb */
    size_t added_bytes;
} tokenizer_data;

static inline void tokenizer_data_free(tokenizer_data *d) {
    free(d->merges);
    free(d->added);
}

/* Appends one entry of the section added_tokens. */
static inline void tokenizer_data_add(tokenizer_data *d, uint32_t id, const char *text,
                                      size_t len) {
    size_t padded = 8 + (len + 3) / 4 * 4;
    uint32_t head[2] = {id, (uint32_t)len};
    uint8_t *grown = realloc(d->added, d->added_bytes + padded);
    if (!grown) abort();
    d->added = grown;
    grown += d->added_bytes;
    memset(grown, 0, padded);
    memcpy(grown, head, sizeof head);
    memcpy(grown + 8, text, len);
    d->added_bytes += padded;
}

/* The JSON value in the file at path, or NULL with a message on stderr. */
static inline json_t *tokenizer_data_json(const char *path) {
    int xz = strlen(path) > 3 && !strcmp(path + strlen(path) - 3, ".xz");
    json_error_t err = {.text = "cannot be read"};
    json_t *root = NULL;
    FILE *f;
    if (xz) setenv("TOKENIZER_DATA_XZ", path, 1); /* no quoting to get wrong */
    f = xz ? popen("xz -dc \"$TOKENIZER_DATA_XZ\"", "r") : fopen(path, "r");
    if (f) {
        root = json_loadf(f, 0, &err);
        if ((xz ? pclose(f) : fclose(f)) != 0 && root) {
            json_decref(root);
            root = NULL;
        }
    }
    if (!root) fprintf(stderr, "%s: %s\n", path, err.text);
    return root;
}

/* The id of a vocabulary entry, or UINT32_MAX. */
static inline uint32_t tokenizer_data_id(const json_t *vocab, const char *s, size_t n) {
    const json_t *id = json_object_getn(vocab, s, n);
    return id ? (uint32_t)json_integer_value(id) : UINT32_MAX;
}

/* One merge, ["l", "r"] or "l r", which must make the vocabulary's token `id`. */
static inline int tokenizer_data_merge(const json_t *vocab, const json_t *merge, uint32_t id,
                                       uint32_t *pair) {
    char both[2048];
    const char *l, *r;
    size_t nl, nr;
    if (json_is_array(merge)) {
        l = json_string_value(json_array_get(merge, 0));
        r = json_string_value(json_array_get(merge, 1));
        if (!l || !r) return -1;
        nl = strlen(l);
    } else {
        l = json_string_value(merge);
        r = l ? strchr(l, ' ') : NULL;
        if (!r) return -1;
        nl = (size_t)(r++ - l);
    }
    nr = strlen(r);
    if (nl + nr > sizeof both) return -1;
    memcpy(both, l, nl);
    memcpy(both + nl, r, nr);
    pair[0] = tokenizer_data_id(vocab, l, nl);
    pair[1] = tokenizer_data_id(vocab, r, nr);
    return tokenizer_data_id(vocab, both, nl + nr) == id ? 0 : -1;
}

/* 0, or -1 with a message on stderr. The caller frees with tokenizer_data_free. */
static inline int tokenizer_data_read(tokenizer_data *d, const char *path) {
    json_t *root = tokenizer_data_json(path);
    const json_t *model = json_object_get(root, "model"), *vocab = json_object_get(model, "vocab");
    const json_t *merges = json_object_get(model, "merges");
    const json_t *added = json_object_get(root, "added_tokens");
    *d = (tokenizer_data){0};
    if (!root) return -1;
    d->n_merges = (uint32_t)json_array_size(merges);
    d->merges = malloc(((size_t)d->n_merges + 1) * 2 * sizeof *d->merges);
    if (!d->merges) abort();
    for (uint32_t i = 0; i < d->n_merges; i++) {
        if (tokenizer_data_merge(vocab, json_array_get(merges, i), 256 + i, d->merges + 2 * i)) {
            fprintf(stderr, "%s: merge %u does not make token %u\n", path, i, 256 + i);
            tokenizer_data_free(d);
            json_decref(root);
            return -1;
        }
    }
    for (size_t i = 0; i < json_array_size(added); i++) {
        const json_t *a = json_array_get(added, i), *content = json_object_get(a, "content");
        tokenizer_data_add(d, (uint32_t)json_integer_value(json_object_get(a, "id")),
                           json_string_value(content), json_string_length(content));
    }
    json_decref(root);
    return 0;
}

#endif
