/* cuda_main.cu - main of the CUDA test programs, see cuda_test.h. */
#include "cuda_test.h"

#include <ctime>

enum { SKIPPED = 77 }; /* as automake has it; gpu_day.py reads it */

struct chosen_tests {
    std::vector<std::string> names;
    bool exact;
    bool has(const char *test) const {
        bool found = names.empty();
        for (const std::string &s : names)
            found = found || (exact ? s == test : strstr(test, s.c_str()) != nullptr);
        return found;
    }
};

static double seconds() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

int main(int argc, char **argv) {
    int schedules = 1, ran = 0;
    bool times = false, list = false;
    chosen_tests chosen = {};
    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "--schedules") && i + 1 < argc)
            schedules = atoi(argv[++i]);
        else if (!strcmp(argv[i], "--times"))
            times = true;
        else if (!strcmp(argv[i], "--exact"))
            chosen.exact = true;
        else if (!strcmp(argv[i], "--list"))
            list = true;
        else
            chosen.names.push_back(argv[i]);
    }
    if (list) {
        for (const test_case &t : all_tests()) puts(t.name);
        return 0;
    }
    int n = 0;
    const cudaError_t e = cudaGetDeviceCount(&n);
    if (e != cudaSuccess || !n) {
        printf("skipped %zu tests: no GPU (%s)\n", all_tests().size(), cudaGetErrorString(e));
        return SKIPPED;
    }
#if !defined(QEMB_EMU)
    schedules = 1;
#endif
    setvbuf(stdout, nullptr, _IOLBF, 0);
    for (const test_case &t : all_tests()) {
        if (!chosen.has(t.name)) continue;
        ran++;
        running = t.name;
        n_shown = 0;
        const double start = seconds();
        for (int s = 0; s < (t.schedules ? schedules : 1); s++) {
#if defined(QEMB_EMU)
            emu::set_schedule((emu::schedule)(s % emu::N_SCHEDULES), (uint64_t)s);
#endif
            t.run();
        }
        if (times) printf("%8.2f s  %s\n", seconds() - start, t.name);
    }
    long races = 0;
#if defined(QEMB_EMU)
    races = emu::count.races;
    printf("emulated: %ld launches, %ld collectives, %ld products, %ld races\n",
           emu::count.launches, emu::count.collectives, emu::count.gemms, races);
#endif
    printf("%d tests, %ld checks, %ld failed\n", ran, n_checks, n_failed);
    return n_failed || races || !ran;
}
