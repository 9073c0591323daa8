# cuda.mk - the targets of the CUDA backend; the Makefile includes it. test-emu and mutants need the
# headers of the CUDA toolkit, the other targets need nvcc. CUDA is the toolkit's directory. Without
# it, each target prints that it is skipped and succeeds.

CUDA ?= $(firstword $(wildcard /usr/local/cuda /opt/cuda) $(patsubst %/bin/nvcc,%,$(shell command -v nvcc 2>/dev/null)) none)
NVCC := $(CUDA)/bin/nvcc
CUDA_ARCHS := 80 89 90a 120
CUDA_SOURCES := qemb.cu $(wildcard backends/cuda/*.h backends/cuda/*.cuh) qemb.h
GENCODE = $(foreach a,$(CUDA_ARCHS),-gencode arch=compute_$(a),code=sm_$(a))

EMU_SOURCES := tests/cuda/emu/emu_fibers.cpp tests/cuda/emu/emu_runtime.cpp tests/cuda/emu/emu_race.cpp tests/cuda/emu/emu_hopper.cpp tests/cuda/emu/emu_cublaslt.cpp
EMU_HEADERS := $(wildcard tests/cuda/emu/*.h) tests/cuda/cuda_test.h tests/cuda/cuda_model.h tests/cuda/cuda_attention.h tests/unit/oracle.h tests/unit/support.h $(CUDA_SOURCES)
C_HEADERS   := $(wildcard *.h */*.h */*/*.h) # of all C files: a stale object is one of another layout
EMU_TESTS   := tests/cuda/cuda_main.cu tests/cuda/test_cuda_ops.cu tests/cuda/test_cuda_hopper.cu tests/cuda/test_cuda_model.cu tests/cuda/test_cuda_quantize.cu tests/cuda/test_cuda_devices.cu
EMU_C       := $(patsubst %,%.c,$(ENGINE)) tests/unit/oracle.c tests/unit/support.c
EMU_OBJECTS := $(patsubst %.cu,%.cu.o,qemb.cu $(EMU_TESTS)) $(EMU_SOURCES:.cpp=.o) $(EMU_C:.c=.o) # of test_cuda
EMU_WARN    := -Wall -Wextra -Wpedantic -Werror -Wno-unknown-pragmas
EMU_CXX     := -std=c++20 -g $(EMU_WARN) -Wno-psabi -DQEMB_EMU -isystem $(CUDA)/include -I. -Itests/cuda/emu
EMU_CC      := -std=c11 -D_GNU_SOURCE -I. -g $(EMU_WARN)
CXX         ?= g++
comma       := ,

CUDA_PROGRAM = $(FRONT) backends/cuda/backend $(ENGINE)
CUDA_SERVE   = $(SERVE) backends/cuda/backend $(ENGINE)

.PHONY: test-emu emu-values emu-sanitizers emu-races emu-program emu-mutants emu-objects cuda-archs mutants gpu-test gpu-check gpu-bench
ifeq ($(wildcard $(CUDA)/include/cuda_fp16.h),)
test-emu cuda-archs mutants gpu-test gpu-check gpu-bench qemb-cuda qemb-serve-cuda:
	@echo "skipped: no CUDA toolkit (looked in /usr/local/cuda, /opt/cuda and PATH; set CUDA=)"
else

# $(eval $(call emu,NAME,FLAGS OF THE CODE UNDER TEST,FLAGS OF ALL)): build/NAME/test_cuda. The access
# hooks of the race detector must not see the emulator itself, so that gets its own flags.
define emu
build/$(1)/%.cu.o: %.cu $$(EMU_HEADERS)
	@mkdir -p $$(@D)
	$$(CXX) $$(EMU_CXX) $(2) $(3) -x c++ -c $$< -o $$@
build/$(1)/%.o: %.cpp $$(EMU_HEADERS)
	@mkdir -p $$(@D)
	$$(CXX) $$(EMU_CXX) -O3 -march=native $(3) -c $$< -o $$@
build/$(1)/%.o: %.c $$(C_HEADERS)
	@mkdir -p $$(@D)
	$$(CC) $$(EMU_CC) -O3 -fopenmp $(3) -c $$< -o $$@
build/$(1)/test_cuda: $$(EMU_OBJECTS:%=build/$(1)/%)
	$$(CXX) -g -fopenmp -no-pie $(3) $$^ -lcrypto -lm -o $$@
build/$(1)/qemb-cuda: build/$(1)/qemb.cu.o $$(patsubst %,build/$(1)/%.o,$$(CUDA_PROGRAM)) $$(patsubst %.cpp,build/$(1)/%.o,$$(EMU_SOURCES))
	$$(CXX) -g -fopenmp -no-pie $(3) $$^ -ljansson -lcrypto -lm -o $$@
build/$(1)/qemb-serve: $$(patsubst %,build/$(1)/%.o,$$(CUDA_SERVE)) build/$(1)/qemb.cu.o $$(patsubst %.cpp,build/$(1)/%.o,$$(EMU_SOURCES))
	$$(CXX) -g -fopenmp -no-pie $(3) $$^ $$(SERVE_LIBS) -ljansson -lcrypto -lm -o $$@
endef
$(eval $(call emu,emu,-O2 -fopenmp,))
$(eval $(call emu,emu-asan,-O1 -fopenmp,-fsanitize=address$(comma)undefined -fno-sanitize-recover=all))
$(eval $(call emu,emu-race,-O1 -fopenmp -fsanitize=thread -fno-threadsafe-statics -fno-pie,-DEMU_RACE))

build/emu/qemb-cpu: $(patsubst %,build/emu/%.o,$(FRONT) $(BACKEND) $(ENGINE))
	$(CC) $(EMU_CC) -O2 -fopenmp $^ -ljansson -lcrypto -lm -o $@

test-emu: emu-values emu-sanitizers emu-races emu-program emu-mutants ## CUDA kernels and the CUDA program on the CPU (make -j2): values, sanitizers, races, mutants
emu-values: build/emu/test_cuda
	build/emu/test_cuda --schedules 4
emu-sanitizers: build/emu-asan/test_cuda
	build/emu-asan/test_cuda ptx attention_ rmsnorm qknorm swiglu gate_up quantize op_fp8 op_matmul op_attention op_embed_b golden_m refuse fails
emu-races: build/emu-race/test_cuda
	build/emu-race/test_cuda ptx attention_ rmsnorm qknorm swiglu gate_up quantize op_fp8 op_matmul op_attention op_embed_b op_gather shapes
emu-program: build/emu/qemb-cuda build/emu/qemb-cpu build/emu/qemb-serve
	tests/cuda/test_cuda_program.py build/emu/qemb-cuda build/emu/qemb-cpu
	tests/cuda/test_cuda_serve.py build/emu/qemb-serve build/emu/qemb-cpu
emu-mutants: build/emu/test_cuda build/emu-race/test_cuda
	tests/cuda/mutants.py --sample
emu-objects:
	@echo $(EMU_OBJECTS)

mutants: ## drop every barrier, wait and guard of the CUDA code in turn: the tests must notice each
	tests/cuda/mutants.py

ifneq ($(wildcard $(NVCC)),)
define CHECKED_CUBIN
@mkdir -p $(@D)
$(NVCC) -I. -std=c++20 -O3 -Werror all-warnings -Xptxas -v -gencode arch=compute_$*,code=sm_$* -cubin $< -o $@ 2> $@.log || { cat $@.log; exit 1; }
endef
# One object per architecture, so that the log of ptxas names the architecture of a spill.
build/cuda/qemb_%.o: qemb.cu $(CUDA_SOURCES)
	@mkdir -p $(@D)
	$(NVCC) -I. -std=c++20 -O3 -Werror all-warnings -Xcompiler -Wall,-Wextra,-fopenmp -Xptxas -v \
	    -gencode arch=compute_$*,code=sm_$* -c $< -o $@ 2> $@.log || { cat $@.log; exit 1; }
build/cuda/qemb_%.cubin: qemb.cu $(CUDA_SOURCES)
	@mkdir -p $(@D)
	$(NVCC) -I. -std=c++20 -O3 -gencode arch=compute_$*,code=sm_$* -cubin $< -o $@
build/cuda/tests_%.cubin: tests/cuda/test_cuda_ops.cu $(CUDA_SOURCES) tests/cuda/cuda_test.h tests/cuda/cuda_attention.h
	$(CHECKED_CUBIN)
build/cuda/hopper_%.cubin: tests/cuda/test_cuda_hopper.cu $(CUDA_SOURCES) tests/cuda/cuda_test.h tests/cuda/cuda_attention.h tests/cuda/cuda_model.h
	$(CHECKED_CUBIN)

cuda-archs: $(foreach a,$(CUDA_ARCHS),build/cuda/qemb_$(a).o build/cuda/qemb_$(a).cubin build/cuda/tests_$(a).cubin) build/cuda/hopper_90a.cubin ## build the CUDA code for sm_80, 89, 90a, 120 and check it: no spills, tensor-core instructions
	tests/cuda/check_sass.py $(foreach a,$(CUDA_ARCHS),build/cuda/qemb_$(a).o.log build/cuda/tests_$(a).cubin.log build/cuda/qemb_$(a).cubin build/cuda/tests_$(a).cubin) build/cuda/hopper_90a.cubin.log build/cuda/hopper_90a.cubin

build/cuda/%.cu.o: %.cu $(CUDA_SOURCES) tests/cuda/cuda_test.h
	@mkdir -p $(@D)
	$(NVCC) -I. -std=c++20 -O3 -Xcompiler -fopenmp $(GENCODE) -c $< -o $@
build/cuda/%.o: %.c $(C_HEADERS)
	@mkdir -p $(@D)
	$(CC) $(EMU_CC) -O3 -fopenmp -c $< -o $@
build/cuda/test_cuda: $(patsubst %.cu,build/cuda/%.cu.o,qemb.cu $(EMU_TESTS)) $(patsubst %.c,build/cuda/%.o,$(EMU_C))
	$(NVCC) -Xcompiler -fopenmp $^ -L$(CUDA)/lib64 -Xlinker -rpath,$(CUDA)/lib64 -lcublasLt -lcrypto -lm -o $@

build/cuda/qemb-cuda: build/cuda/qemb.cu.o $(patsubst %,build/cuda/%.o,$(CUDA_PROGRAM))
	$(NVCC) -Xcompiler -fopenmp $^ -L$(CUDA)/lib64 -Xlinker -rpath,$(CUDA)/lib64 -lcublasLt -ljansson -lcrypto -lm -o $@
qemb-cuda: build/cuda/qemb-cuda ## qemb for NVIDIA GPUs: same options, same protocol
	cp build/cuda/qemb-cuda qemb-cuda
build/cuda/qemb-serve: $(patsubst %,build/cuda/%.o,$(CUDA_SERVE)) build/cuda/qemb.cu.o
	$(NVCC) -Xcompiler -fopenmp $^ -L$(CUDA)/lib64 -Xlinker -rpath,$(CUDA)/lib64 -lcublasLt $(SERVE_LIBS) -ljansson -lcrypto -lm -o $@
qemb-serve-cuda: need-serve build/cuda/qemb-serve ## qemb-serve for NVIDIA GPUs: same options and requests
	cp build/cuda/qemb-serve qemb-serve-cuda
build/cuda/bench_cuda: build/cuda/bench/bench_cuda.cu.o build/cuda/qemb.cu.o $(patsubst %.c,build/cuda/%.o,$(EMU_C))
	$(NVCC) -Xcompiler -fopenmp $^ -L$(CUDA)/lib64 -Xlinker -rpath,$(CUDA)/lib64 -lcublasLt -lcrypto -lm -o $@

gpu-test: build/cuda/test_cuda ## the CUDA tests on this machine's GPU; a counted skip without one
	build/cuda/test_cuda

gpu-check: build/cuda/test_cuda build/cuda/bench_cuda qemb-cuda build/release/qemb ## on a GPU: all CUDA tests, compute-sanitizer, the program against the CPU's
	tests/cuda/gpu_check.sh

gpu-bench: qemb-cuda build/cuda/bench_cuda build/release/qemb $(VENV)/.convert ## on a GPU: kernels, products, accuracy, whole runs, transformers beside; a table and bench/results/*.json
	bench/bench_gpu.py
else
cuda-archs gpu-test gpu-check gpu-bench qemb-cuda qemb-serve-cuda:
	@echo "skipped: no nvcc in $(CUDA)/bin"
endif
endif
