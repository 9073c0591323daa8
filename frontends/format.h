/* format.h - how vectors leave: numbers, base64, halves, the npy header, JSON strings.
 *
 * Pure functions from memory to memory: each writes at p, which has room for what its comment
 * says, and returns the first byte after what it wrote. Bytes between that and the end of the room
 * may be overwritten too (numbers are stored eight bytes at a time). Nothing is NUL-terminated.
 * A little-endian machine is taken for granted, as in the .qemb file.
 */
#ifndef QEMB_FORMAT_H
#define QEMB_FORMAT_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum {
    FORMAT_JSON,   /* a JSON array per line */
    FORMAT_JSONL,  /* a JSON object per line; format_vector writes the array inside it */
    FORMAT_TSV,    /* numbers with tabs between them, a line per vector */
    FORMAT_BASE64, /* base64 of the little-endian floats, a line per vector */
    FORMAT_F32,    /* the floats, little-endian, nothing between vectors */
    FORMAT_F16,    /* halves, little-endian, rounded to nearest even */
    FORMAT_NPY     /* one NumPy file: a header, then FORMAT_F32 */
} format_kind;

extern const char *const format_names[]; /* of the kinds, in their order; ends with NULL */
/* 1 for the kinds whose records are lines, 0 for f32, f16 and npy. */
int format_is_text(format_kind kind);

/* Room that format_vector needs for dim numbers. */
size_t format_vector_room(format_kind kind, int dim);
/* v (dim), finite, in that kind. Text kinds: without the newline. */
char *format_vector(char *p, format_kind kind, const float *v, int dim);

#define FORMAT_FLOAT_ROOM 24
/* A finite x as a JSON number: nine significant digits, which strtof reads back to the same bits,
 * less trailing zeros: "0.25", "-0.0", "1.0", "0.100000001", "1.5e-7". */
char *format_float(char *p, float x);

#define FORMAT_UINT_ROOM 24
char *format_uint(char *p, uint64_t x);

/* A JSON string, quotes included: room 6 n + 2. Bytes that are not UTF-8 become U+FFFD. */
char *format_json_string(char *p, const char *s, size_t n);

/* RFC 4648 base64 with padding: room (n + 2) / 3 * 4. */
char *format_base64(char *p, const void *src, size_t n);

/* x as an IEEE half, rounded to nearest even; overflow is infinity, NaN stays NaN. */
uint16_t format_half(float x);

#define FORMAT_NPY_HEADER 128
/* The header of a version 1.0 .npy file with an array (rows, dim) of '<f4', FORMAT_NPY_HEADER
 * bytes whatever the numbers are, so that it can be written again when rows is known. */
char *format_npy_header(char *p, uint64_t rows, int dim);

#ifdef __cplusplus
}
#endif
#endif
