/* format.h - output formats of vectors: numbers, base64, halves, the npy header, JSON strings.
 *
 * Each function writes at p and returns the first byte after its output. "Room" is the size that
 * the buffer at p must have. Bytes between the output and the end of the room may be overwritten,
 * since numbers are stored eight bytes at a time. Nothing is NUL-terminated. The machine has to be
 * little-endian, as for .qemb files.
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
    FORMAT_TSV,    /* numbers separated by tabs, a line per vector */
    FORMAT_BASE64, /* base64 of the little-endian floats, a line per vector */
    FORMAT_F32,    /* little-endian floats, vectors back to back */
    FORMAT_F16,    /* little-endian halves, rounded to nearest even */
    FORMAT_NPY,    /* one NumPy file: a header, then FORMAT_F32 */
    FORMAT_INT8,   /* bytes -127..127: 127 x / max|x|, rounded to nearest even */
    FORMAT_BINARY  /* a bit per number, 1 if x > 0, most significant bit first; the last byte ends
                      with zeros */
} format_kind;

extern const char *const format_names[]; /* indexed by format_kind; ends with NULL */
/* 1 if records are lines, 0 for the others. */
int format_is_text(format_kind kind);

/* The room that format_vector needs for dim numbers. */
size_t format_vector_room(format_kind kind, int dim);
/* Writes v (dim), which is finite, in the given kind. Text kinds: without the newline. */
char *format_vector(char *p, format_kind kind, const float *v, int dim);
/* FORMAT_INT8: out (dim). A vector of zeros stays one. */
void format_int8(int8_t *out, const float *v, int dim);
/* FORMAT_BINARY: out ((dim + 7) / 8). */
void format_binary(uint8_t *out, const float *v, int dim);

#define FORMAT_FLOAT_ROOM 24
/* Writes a finite x as a JSON number of at most nine significant digits, without trailing zeros.
 * strtof reads it back to the same bits. Examples: "0.25", "-0.0", "1.0", "0.100000001",
 * "1.5e-7". */
char *format_float(char *p, float x);

#define FORMAT_UINT_ROOM 24
char *format_uint(char *p, uint64_t x);

/* Writes s (n) as a JSON string with its quotes. Room 6 n + 2. Invalid UTF-8 becomes U+FFFD; every
 * control character, U+007F to U+009F too, is escaped. */
char *format_json_string(char *p, const char *s, size_t n);

/* Writes src (n) as hexadecimal digits. Room 2 n. */
char *format_hex(char *p, const void *src, size_t n);

/* Writes base64 with padding (RFC 4648). Room (n + 2) / 3 * 4. */
char *format_base64(char *p, const void *src, size_t n);

/* x as an IEEE half, rounded to nearest even; overflow is infinity, NaN stays NaN. */
uint16_t format_half(float x);

#define FORMAT_NPY_HEADER 128
/* Writes the header of a version 1.0 .npy file with an array (rows, dim) of '<f4'. It always has
 * FORMAT_NPY_HEADER bytes, so it can be overwritten once rows is known. */
char *format_npy_header(char *p, uint64_t rows, int dim);

#ifdef __cplusplus
}
#endif
#endif
