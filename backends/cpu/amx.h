/* amx.h - Intel's tile unit (AMX) for C: whether it may be used, and its instructions as macros.
 *
 * There are eight tile registers, 0 to 7, of 16 rows of 64 bytes. A product reads two tiles:
 *   a   16 rows of x, 32 bfloat16 numbers of each: a[i][k]
 *   b   16 rows of W, as 16 pairs of columns: row k/2 has the numbers k and k+1 of all 16 rows
 * and tile_dp_bf16(c, a, b) adds their product to the floats c (16, 16).
 *
 * The instructions are written in assembler, because a program that finds the CPU at run time
 * cannot be compiled for AMX, and because gcc 12's _tile_loadd does not tell the compiler that it
 * reads memory: stores may then move past it.
 *
 * With AMX_EMULATE the macros call tests/unit/amx_emulation.h: plain C that computes the same bits.
 */
#ifndef CPU_AMX_H
#define CPU_AMX_H

#include <stdint.h>
#include <string.h>

/* What LDTILECFG reads. */
typedef struct {
    uint8_t palette, start_row, zero[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} __attribute__((aligned(64))) amx_config;

/* All eight tiles with 16 rows of 64 bytes. Fewer rows would hardly be faster: a product takes 16
 * cycles with 16 rows, 10 with 8 and 9 with one (Sapphire Rapids). */
static inline amx_config amx_whole_tiles(void) {
    amx_config c;
    memset(&c, 0, sizeof c);
    c.palette = 1;
    for (int i = 0; i < 8; i++) c.row_bytes[i] = 64, c.rows[i] = 16;
    return c;
}

#ifdef AMX_EMULATE
#include "tests/unit/amx_emulation.h"
#else

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Returns NULL if tiles may be used, else the reason. Asks the kernel for the permission, which
 * holds for all threads of the process; asking again changes nothing. Old kernels and some
 * sandboxes refuse. */
static inline const char *amx_open(void) {
    enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 };
    unsigned a, b, c, d;
    uint32_t low, high;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return "CPUID has no leaf 7";
    if (!(d >> 24 & 1)) return "the CPU has no AMX-TILE (leaf 7, EDX bit 24)";
    if (!(d >> 22 & 1)) return "the CPU has no AMX-BF16 (leaf 7, EDX bit 22)";
    __get_cpuid(1, &a, &b, &c, &d);
    if (!(c >> 27 & 1)) return "the system does not use XSAVE (leaf 1, ECX bit 27)";
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    if ((low >> 17 & 3) != 3) return "the system does not save tiles (XCR0 bits 17 and 18)";
    if (syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA))
        return "the kernel gives no permission";
    return NULL;
}

/* A thread configures its tiles before each op and releases them after it, in 0.1 us. Until then
 * the kernel saves 8 KiB more whenever it switches threads, and a library that uses tiles itself
 * may release them: the next tile instruction would be illegal. */
static inline void tile_config(const amx_config *c) { __asm__ volatile("ldtilecfg %0" ::"m"(*c)); }
static inline void tile_release(void) { __asm__ volatile("tilerelease" ::: "memory"); }

#define TILE_NAME_(x) #x
#define TILE(x)       "%%tmm" TILE_NAME_(x)
#define TILE_ASM(...) __extension__({ __asm__ volatile(__VA_ARGS__); })
/* Tile t = 16 rows at p, `stride` bytes apart. It loads past the first-level cache: from the second
 * level that is a third faster than TILELOADD (Sapphire Rapids). */
#define tile_stream(t, p, stride)                                                                  \
    TILE_ASM("tileloaddt1 (%0,%1,1), " TILE(t)::"r"(p), "r"((long)(stride)) : "memory")
#define tile_store(t, p, stride)                                                                   \
    TILE_ASM("tilestored " TILE(t) ", (%0,%1,1)" ::"r"(p), "r"((long)(stride)) : "memory")
#define tile_zero(t)          TILE_ASM("tilezero " TILE(t)::)
#define tile_dp_bf16(c, a, b) TILE_ASM("tdpbf16ps " TILE(b) ", " TILE(a) ", " TILE(c)::)
/* Bytes, four along K where there are two bfloat16: sums are 32-bit integers. AMX-INT8. */
#define tile_dp_int8(c, a, b) TILE_ASM("tdpbssd " TILE(b) ", " TILE(a) ", " TILE(c)::)

#endif
#endif
