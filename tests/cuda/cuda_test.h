/* cuda_test.h - what the CUDA tests share. They do not use Criterion: the same programs run under
 * the emulation (whose fibers and access hooks do not suit its worker processes) and, built by
 * nvcc, on machines with a GPU, where one process must pay for one CUDA context.
 *
 *   test_cuda [--schedules N] [--times] [--exact] [NAME...]     tests whose name contains a NAME
 *   test_cuda --list                                            the names of all tests
 *
 * Without a NAME all tests run. --exact: whose name is a NAME. N schedules of the emulator (in
 * order, reverse, random, random priorities, random ...) for every test that asks for them; 1
 * without. --times: a line for each test when it has ended. The last line has the counts. Exit
 * status 1 if a check failed, 77 if there is no GPU.
 */
#ifndef CUDA_TEST_H
#define CUDA_TEST_H

#include "backends/cuda/qemb_cuda.h"

#include "backends/cuda/ptx.cuh"

extern "C" {
#include "tests/unit/oracle.h"
#include "tests/unit/oracle_encoder.h"
#include "tests/unit/support.h"
}

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

struct test_case {
    const char *name;
    void (*run)();
    bool schedules; /* worth more than one */
};
inline std::vector<test_case> &all_tests() {
    static std::vector<test_case> v;
    return v;
}
struct add_test {
    add_test(const char *name, void (*run)(), bool schedules) {
        all_tests().push_back({name, run, schedules});
    }
};
#define TEST_(name, schedules)                                                                     \
    static void test_##name();                                                                     \
    static add_test added_##name(#name, test_##name, schedules);                                   \
    static void test_##name()
#define TEST(name)           TEST_(name, false)
#define TEST_SCHEDULES(name) TEST_(name, true)

inline long n_checks, n_failed, n_shown;
inline const char *running;

__attribute__((format(printf, 2, 3))) inline bool check(bool ok, const char *fmt, ...) {
    n_checks++;
    if (ok) return true;
    n_failed++;
    if (n_shown++ < 5) {
        va_list ap;
        va_start(ap, fmt);
        printf("FAIL %s: ", running);
        vprintf(fmt, ap);
        printf("\n");
        va_end(ap);
    }
    return false;
}
/* NaN is never near. */
inline bool check_near(double got, double want, double tol, const char *what, size_t i) {
    return check(!far_off(got, want, tol), "%s[%zu] (got %.9g, want %.9g, within %.3g)", what, i,
                 got, want, tol);
}
inline void cuda_ok(cudaError_t e, const char *what) {
    if (e == cudaSuccess) return;
    printf("FAIL %s: %s: %s\n", running, what, cudaGetErrorString(e));
    exit(1);
}

/* Whether the device has FP8 products (device.cuh); says so where a test has to do without. */
inline bool has_fp8() {
    int major = 0, minor = 0;
    cuda_ok(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0), "attribute");
    cuda_ok(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, 0), "attribute");
    const bool has = 10 * major + minor >= 89;
    if (!has)
        printf("skipped %s: no FP8 products on compute capability %d.%d\n", running, major, minor);
    return has;
}

inline qemb_health health_of(const qemb_backend *be) {
    qemb_health h = {};
    qemb_cuda_ops.health(be, &h);
    return h;
}
inline const char *failure_of(const qemb_backend *be) { return health_of(be).failure; }

/* n numbers of device memory, freed with the object. */
template <class T> struct device_array {
    T *p = nullptr;
    size_t n;
    explicit device_array(size_t n_) : n(n_) {
        cuda_ok(cudaMalloc((void **)&p, n * sizeof(T)), "cudaMalloc");
        cuda_ok(cudaMemset(p, 0xFF, n * sizeof(T)), "cudaMemset"); /* NaN */
        wait();
    }
    explicit device_array(const std::vector<T> &v) : device_array(v.size()) {
        cuda_ok(cudaMemcpy(p, v.data(), n * sizeof(T), cudaMemcpyHostToDevice), "upload");
        wait();
    }
    /* cudaMemset returns before it has run, and the backend's stream does not wait for its own. */
    static void wait() { cuda_ok(cudaDeviceSynchronize(), "device_array"); /* array_set */ }
    device_array(const device_array &) = delete;
    ~device_array() { cudaFree(p); }
    std::vector<T> get() const {
        std::vector<T> v(n);
        cuda_ok(cudaDeviceSynchronize(), "kernel");
        cuda_ok(cudaMemcpy(v.data(), p, n * sizeof(T), cudaMemcpyDeviceToHost), "download");
        return v;
    }
};

/* ---- 16-bit numbers on the host -------------------------------------------------------------- */

inline double num(__half v) { return (double)__half2float(v); }
inline double num(__nv_bfloat16 v) { return (double)__bfloat162float(v); }
inline double num(float v) { return v; }
template <class A> inline A make(double v);
template <> inline __half make<__half>(double v) { return __float2half_rn((float)v); }
template <> inline __nv_bfloat16 make<__nv_bfloat16>(double v) {
    return __float2bfloat16_rn((float)v);
}
template <> inline float make<float>(double v) { return (float)v; }

/* Largest relative error of rounding to A, and the absolute one below its normal range. */
template <class A> inline double rounding() { return U; }
template <> inline double rounding<__half>() { return 0x1p-11; }
template <> inline double rounding<__nv_bfloat16>() { return 0x1p-8; }
template <class A> inline double tiny() {
    return 0x1p-126;
} /* the GPU may flush subnormal floats */
template <> inline double tiny<__half>() { return 0x1p-25; }

template <class A>
inline std::vector<A> random_numbers(rng *r, size_t n, double scale, double offset = 0) {
    std::vector<A> v(n);
    for (A &x : v) x = make<A>(offset + scale * rng_uniform(r));
    return v;
}
template <class A> inline std::vector<double> doubles(const std::vector<A> &v) {
    std::vector<double> d(v.size());
    for (size_t i = 0; i < v.size(); i++) d[i] = num(v[i]);
    return d;
}

/* ---- e4m3 on the host ------------------------------------------------------------------------ */

/* By its definition: sign, four bits of exponent (bias 7), three of fraction; subnormal below 2^-6,
 * no infinity, all ones is NaN. Rounding to it is off by at most 2^-4 of the number, or by half a
 * step of the subnormals, 2^-10. */
inline double e4m3(uint8_t code) {
    const int e = code >> 3 & 15, m = code & 7;
    const double size = e ? ldexp(1 + m / 8.0, e - 7) : ldexp(m / 8.0, -6);
    return (code & 127) == 127 ? (double)NAN : code & 128 ? -size : size;
}
/* Codes and scale of a row against the numbers that it should hold, each known to within size * rel
 * + off. */
inline bool row_near(const uint8_t *codes, float scale, const std::vector<double> &want, double rel,
                     size_t row, double off = 0) {
    double top = 0;
    for (double v : want) top = std::max(top, fabs(v));
    check_near((double)scale * 448, top, top * (rel + 4 * U) + off + 0x1p-99, "scale", row);
    for (size_t i = 0; i < want.size(); i++) {
        const double tol = fabs(want[i]) * (0x1p-4 + rel) + 1.1 * off + scale * 0x1p-10 + 0x1p-99;
        if (!check_near(e4m3(codes[i]) * scale, want[i], tol, "code", row * want.size() + i))
            return false;
    }
    return true;
}

#endif
