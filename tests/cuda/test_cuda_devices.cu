/* test_cuda_devices.cu - the emulation's several devices: what a program may not mix up, and
 * threads. test_cuda_program.py and test_cuda_serve.py run whole programs on them. */
#include "cuda_test.h"

#if defined(QEMB_EMU)

#include <sys/wait.h>
#include <thread>
#include <unistd.h>

#include <cublasLt.h>

__global__ static void add_one_kernel(float *x) { x[threadIdx.x] += 1; }

static cudaError_t add_one(float *x, cudaStream_t st) {
    return launch(add_one_kernel, dim3(1), dim3(32), 0, st, x);
}

struct devices {
    const emu::device before = emu::dev;
    explicit devices(int n) { emu::dev.count = n; }
    ~devices() {
        emu::dev = before;
        cudaSetDevice(0);
    }
};

/* Runs f in a process of its own, which has to end with this message of the emulation. */
template <class F> static void check_dies(const char *message, F f) {
    int pipes[2];
    if (pipe(pipes)) exit(1);
    const pid_t child = fork();
    if (!child) {
        dup2(pipes[1], STDERR_FILENO);
        f();
        cudaDeviceSynchronize();
        _exit(0);
    }
    close(pipes[1]);
    std::string said;
    char c;
    while (read(pipes[0], &c, 1) == 1) said += c;
    close(pipes[0]);
    int status;
    waitpid(child, &status, 0);
    check(said.find(message) != std::string::npos, "%s (got %s)", message, said.c_str());
    check(WIFEXITED(status) && WEXITSTATUS(status) == 86, "%s: status %d", message, status);
}

TEST(devices_that_are_there) {
    devices two(2);
    cudaDeviceProp prop;
    int v;
    check(cudaSetDevice(2) == cudaErrorInvalidDevice && cudaSetDevice(-1) == cudaErrorInvalidDevice,
          "no such device");
    check(cudaGetDeviceProperties(&prop, 2) == cudaErrorInvalidDevice, "its properties");
    check(cudaDeviceGetAttribute(&v, cudaDevAttrMultiProcessorCount, 2) == cudaErrorInvalidDevice,
          "its attributes");
    cudaGetLastError();
    check(cudaSetDevice(1) == cudaSuccess, "the second one");
}

TEST(devices_own_what_was_made_on_them) {
    devices two(2);
    cudaStream_t st, other;
    cudaEvent_t e;
    cublasLtHandle_t lt;
    device_array<float> x(32);
    cublasLtCreate(&lt);
    cuda_ok(cudaStreamCreateWithFlags(&st, cudaStreamNonBlocking), "stream");
    cuda_ok(cudaEventCreateWithFlags(&e, cudaEventDisableTiming), "event");
    float *pinned;
    cuda_ok(cudaHostAlloc((void **)&pinned, 32 * sizeof(float), cudaHostAllocDefault), "pinned");
    cudaSetDevice(1);
    cuda_ok(cudaStreamCreateWithFlags(&other, cudaStreamNonBlocking), "stream");
    check_dies("a stream of device 0 while device 1 is current", [&] { add_one(x.p, st); });
    check_dies("a stream of device 0 while", [&] { cudaStreamSynchronize(st); });
    check_dies("an event of device 0 while", [&] { cudaEventRecord(e, other); });
    check_dies("work of device 1 touches memory of device 0", [&] { add_one(x.p, other); });
    check_dies("cudaFree: memory of device 0 while", [&] { cudaFree(x.p); });
    check_dies("cudaMemcpyAsync: memory of device 0 while", [&] {
        cudaMemcpyAsync(x.p, pinned, 32 * sizeof(float), cudaMemcpyHostToDevice, other);
    });
    check_dies("cublasLtMatmul: a handle of device 0 while", [&] {
        cublasLtMatmul(lt, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr,
                       nullptr, nullptr, nullptr, nullptr, nullptr, 0, other);
    });
    cuda_ok(cudaStreamDestroy(other), "stream");
    cudaSetDevice(0);
    cuda_ok(cudaFreeHost(pinned), "pinned");
    cuda_ok(cudaEventDestroy(e), "event");
    cuda_ok(cudaStreamDestroy(st), "stream");
}

TEST(devices_have_their_own_memory_and_faults) {
    devices two(2);
    void *p[2], *more;
    size_t left, total;
    cudaMemGetInfo(&left, &total);
    emu::dev.memory = total - left + (1 << 20); /* what other tests keep, and a MiB */
    for (int i = 0; i < 2; i++) {
        cudaSetDevice(i);
        check(cudaMalloc(&p[i], 1 << 20) == cudaSuccess, "a MiB of device %d", i);
    }
    cudaMemGetInfo(&left, &total);
    check(left == total - (1 << 20), "left of device 1");
    cudaSetDevice(0);
    check(cudaMalloc(&more, 1) == cudaErrorMemoryAllocation, "more than device 0 has");
    emu::dev.fault_device = 1;
    emu::dev.fault_after = 2;
    const emu::counters before = emu::count;
    for (int i = 0; i < 2; i++) {
        cudaSetDevice(i);
        check(add_one((float *)p[i], nullptr) == cudaSuccess, "device %d works", i);
        check(emu::count.launches_on[i] == before.launches_on[i] + 1, "its launches");
    }
    check(add_one((float *)p[1], nullptr) != cudaSuccess, "device 1 fails at its second launch");
    check(cudaDeviceSynchronize() != cudaSuccess, "and says so");
    cudaSetDevice(0);
    check(add_one((float *)p[0], nullptr) == cudaSuccess, "device 0 goes on");
    emu::dev.fault = cudaSuccess;
    for (int i = 0; i < 2; i++) {
        cudaSetDevice(i);
        cudaFree(p[i]);
    }
    cudaGetLastError();
}

TEST(devices_run_threads) {
    enum { N = 4, TIMES = 50 };
    devices four(N);
    float got[N] = {};
    std::vector<std::thread> threads;
    for (int i = 0; i < N; i++)
        threads.emplace_back([i, &got] {
            cudaSetDevice(i);
            cudaStream_t st;
            cuda_ok(cudaStreamCreateWithFlags(&st, cudaStreamNonBlocking), "stream");
            device_array<float> x(std::vector<float>(32, (float)i));
            for (int k = 0; k < TIMES; k++) cuda_ok(add_one(x.p, st), "launch");
            cuda_ok(cudaStreamSynchronize(st), "wait");
            got[i] = x.get()[31];
            cuda_ok(cudaStreamDestroy(st), "stream");
        });
    for (std::thread &t : threads) t.join();
    for (int i = 0; i < N; i++) check(got[i] == (float)(i + TIMES), "thread %d: %g", i, got[i]);
}

#endif
