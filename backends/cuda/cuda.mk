# cuda.mk - the targets of the CUDA backend; the Makefile includes it. test-emu and mutants need the
# headers of the CUDA toolkit, the other targets need nvcc. CUDA is the toolkit's directory. Without
# it, each target prints that it is skipped and succeeds.

CUDA ?= $(firstword $(wildcard /usr/local/cuda /opt/cuda) $(patsubst %/bin/nvcc,%,$(shell command -v nvcc 2>/dev/null)) none)
NVCC := $(CUDA)/bin/nvcc
# The first toolkit whose cuBLASLt has FP8 products with a scale for each row.
CUDA_OLDEST  := 12090
CUDA_VERSION := $(or $(shell sed -n 's/^\#define CUDA_VERSION \([0-9]*\)$$/\1/p' $(CUDA)/include/cuda.h 2>/dev/null),0)
# Machine code runs on its own compute capability and on newer ones of the same major number; 90a on
# 9.0 alone. Everything else from 10.0 on (11.0, and what comes after 12.x) gets PTX of 10.0.
CUDA_ARCHS := 80 89 90a 100 120
CUDA_SOURCES := qemb.cu $(wildcard backends/cuda/*.h backends/cuda/*.cuh) qemb.h
GENCODE = $(foreach a,$(CUDA_ARCHS),-gencode arch=compute_$(a),code=sm_$(a)) -gencode arch=compute_100,code=compute_100

EMU_SOURCES := tests/cuda/emu/emu_fibers.cpp tests/cuda/emu/emu_runtime.cpp tests/cuda/emu/emu_race.cpp tests/cuda/emu/emu_hopper.cpp tests/cuda/emu/emu_cublaslt.cpp
EMU_HEADERS := $(wildcard tests/cuda/emu/*.h) tests/cuda/cuda_test.h tests/cuda/cuda_model.h tests/cuda/cuda_attention.h tests/unit/oracle.h tests/unit/oracle_encoder.h tests/unit/support.h $(CUDA_SOURCES)
EMU_TESTS   := tests/cuda/cuda_main.cu tests/cuda/test_cuda_ops.cu tests/cuda/test_cuda_hopper.cu tests/cuda/test_cuda_model.cu tests/cuda/test_cuda_encoder.cu tests/cuda/test_cuda_quantize.cu tests/cuda/test_cuda_devices.cu
EMU_C       := $(ENGINE) tests/unit/oracle tests/unit/oracle_encoder tests/unit/support
EMU_OBJECTS := $(patsubst %.cu,%.cu.o,qemb.cu $(EMU_TESTS)) $(EMU_SOURCES:.cpp=.o) # of test_cuda, beside the C files
EMU_CXX     := -std=c++20 -g1 $(WARNINGS) -Wno-unknown-pragmas -Wno-psabi -DQEMB_EMU -isystem $(CUDA)/include -I. -Itests/cuda/emu
CXX         ?= g++
comma       := ,

CUDA_PROGRAM = $(FRONT) backends/cuda/backend $(ENGINE)
CUDA_SERVE   = $(SERVE) backends/cuda/backend $(ENGINE)

.PHONY: test-emu emu-values emu-sanitizers emu-races emu-program emu-day emu-mutants emu-objects cuda-archs mutants gpu-needs gpu-pack gpu-day test-gpu-pack
ifeq ($(wildcard $(CUDA)/include/cuda_fp16.h),)
test-emu cuda-archs mutants gpu-pack gpu-day test-gpu-pack qemb-cuda qemb-serve-cuda:
	@echo "skipped: no CUDA toolkit (looked in /usr/local/cuda, /opt/cuda and PATH; set CUDA=)"
else ifeq ($(shell test $(CUDA_VERSION) -ge $(CUDA_OLDEST) && echo new enough),)
test-emu cuda-archs mutants gpu-pack gpu-day test-gpu-pack qemb-cuda qemb-serve-cuda:
	@echo "CUDA toolkit: too old (got CUDA_VERSION $(CUDA_VERSION) in $(CUDA), want $(CUDA_OLDEST) or newer)"; exit 1
else

# For make accuracy, which leaves the GPU out without the toolkit.
EMULATED_GPU := build/emu/qemb-cuda

# $(eval $(call emu,NAME,FLAGS OF THE CODE UNDER TEST,FLAGS OF ALL,VARIANT)): build/NAME/test_cuda. The
# C files are those of the VARIANT of the CPU's programs. The access hooks of the race detector must
# not see the emulator itself, so that gets its own flags.
define emu
build/$(1)/%.cu.o: %.cu $$(EMU_HEADERS)
	@mkdir -p $$(@D)
	$$(CXX) $$(EMU_CXX) $(2) $(3) -x c++ -c $$< -o $$@
build/$(1)/%.o: %.cpp $$(EMU_HEADERS)
	@mkdir -p $$(@D)
	$$(CXX) $$(EMU_CXX) -O3 -march=native $(3) -c $$< -o $$@
build/$(1)/test_cuda: $$(EMU_OBJECTS:%=build/$(1)/%) $$(EMU_C:%=build/$(4)/%.o)
	$$(CXX) -g -pthread -no-pie $(3) $$^ -lcrypto -lm -o $$@
build/$(1)/qemb-cuda: build/$(1)/qemb.cu.o $$(CUDA_PROGRAM:%=build/$(4)/%.o) $$(patsubst %.cpp,build/$(1)/%.o,$$(EMU_SOURCES))
	$$(CXX) -g -pthread -no-pie $(3) $$^ $$(LIBS) -o $$@
build/$(1)/bench_cuda: build/$(1)/bench/bench_cuda.cu.o build/$(1)/qemb.cu.o $$(patsubst %.cpp,build/$(1)/%.o,$$(EMU_SOURCES)) $$(EMU_C:%=build/$(4)/%.o)
	$$(CXX) -g -pthread -no-pie $(3) $$^ -lcrypto -lm -o $$@
build/$(1)/qemb-serve: $$(CUDA_SERVE:%=build/$(4)/%.o) build/$(1)/qemb.cu.o $$(patsubst %.cpp,build/$(1)/%.o,$$(EMU_SOURCES))
	$$(CXX) -g -pthread -no-pie $(3) $$^ $$(SERVE_LIBS) $$(LIBS) -o $$@
endef
$(eval $(call emu,emu,-O2,,release))
$(eval $(call emu,emu-asan,-O1,$(ASAN),asan))
$(eval $(call emu,emu-race,-O1 -fsanitize=thread -fno-threadsafe-statics -fno-pie,-DEMU_RACE,release))

build/emu/qemb-cpu: build/release/qemb
	@mkdir -p $(@D)
	cp $< $@

test-emu: emu-values emu-sanitizers emu-races emu-program emu-day emu-mutants ## CUDA kernels and the CUDA program on the CPU (make -j2): values, sanitizers, races, mutants
emu-values: build/emu/test_cuda
	build/emu/test_cuda --schedules 4
emu-sanitizers: build/emu-asan/test_cuda
	build/emu-asan/test_cuda ptx attention_ rmsnorm layernorm bias gelu embed_positions encoder_shapes encoder_refuses qknorm swiglu gate_up quantize op_fp8 op_matmul op_attention op_embed_b golden_m refuse fails
emu-races: build/emu-race/test_cuda
	build/emu-race/test_cuda ptx attention_ rmsnorm layernorm bias gelu embed_positions qknorm swiglu gate_up quantize op_fp8 op_matmul op_attention op_embed_b op_gather shapes
emu-program: build/emu/qemb-cuda build/emu/qemb-cpu build/emu/qemb-serve
	tests/cuda/test_cuda_program.py build/emu/qemb-cuda build/emu/qemb-cpu
	tests/cuda/test_cuda_serve.py build/emu/qemb-serve build/emu/qemb-cpu
emu-day: build/emu/test_cuda build/emu/bench_cuda build/emu/qemb-cuda build/emu/qemb-cpu build/emu/qemb-serve
	tests/cuda/test_gpu_day.py build/emu
emu-mutants: build/emu/test_cuda build/emu-race/test_cuda
	tests/cuda/mutants.py --sample
# Of build/NET/test_cuda, in the order in which they are linked
emu-objects:
	@echo $(EMU_OBJECTS:%=build/$(NET)/%) $(EMU_C:%=build/release/%.o)

mutants: ## drop every barrier, wait and guard of the CUDA code in turn: the tests must notice each
	tests/cuda/mutants.py

ifneq ($(wildcard $(NVCC)),)
define CHECKED_CUBIN
@mkdir -p $(@D)
$(NVCC) -I. -std=c++20 -O3 -Werror all-warnings -Xptxas -v -gencode arch=compute_$*,code=sm_$* -cubin $< -o $@ 2> $@.log || { cat $@.log; exit 1; }
endef
# One for each architecture, so that the log of ptxas names the architecture of a spill.
build/cuda/qemb_%.cubin: qemb.cu $(CUDA_SOURCES)
	$(CHECKED_CUBIN)
build/cuda/tests_%.cubin: tests/cuda/test_cuda_ops.cu $(CUDA_SOURCES) tests/cuda/cuda_test.h tests/cuda/cuda_attention.h
	$(CHECKED_CUBIN)
build/cuda/hopper_%.cubin: tests/cuda/test_cuda_hopper.cu $(CUDA_SOURCES) tests/cuda/cuda_test.h tests/cuda/cuda_attention.h tests/cuda/cuda_model.h
	$(CHECKED_CUBIN)

cuda-archs: $(foreach a,$(CUDA_ARCHS),build/cuda/qemb_$(a).cubin build/cuda/tests_$(a).cubin) build/cuda/hopper_90a.cubin ## build the CUDA code for sm_80, 89, 90a, 100, 120 and check it: no spills, tensor-core instructions
	tests/cuda/check_sass.py $(foreach a,$(CUDA_ARCHS),build/cuda/qemb_$(a).cubin.log build/cuda/tests_$(a).cubin.log build/cuda/qemb_$(a).cubin build/cuda/tests_$(a).cubin) build/cuda/hopper_90a.cubin.log build/cuda/hopper_90a.cubin

NVCC_HOST := -Xcompiler -pthread,$(subst $() ,$(comma),$(strip $(HARDENED)))
build/cuda/%.cu.o: %.cu $(CUDA_SOURCES)
	@mkdir -p $(@D)
	$(NVCC) -I. -std=c++20 -O3 $(NVCC_HOST) $(GENCODE) -c $< -o $@
build/cuda/qemb-cuda: build/cuda/qemb.cu.o $(CUDA_PROGRAM:%=build/release/%.o)
	$(NVCC) $(NVCC_HOST) $(RELRO:-Wl,%=-Xlinker %) $^ -L$(CUDA)/lib64 -Xlinker -rpath,$(CUDA)/lib64 -lcublasLt $(LIBS) -o $@
qemb-cuda: build/cuda/qemb-cuda ## qemb for NVIDIA GPUs: same options, same protocol
	cp build/cuda/qemb-cuda qemb-cuda
build/cuda/qemb-serve: $(CUDA_SERVE:%=build/release/%.o) build/cuda/qemb.cu.o
	$(NVCC) $(NVCC_HOST) $(RELRO:-Wl,%=-Xlinker %) $^ -L$(CUDA)/lib64 -Xlinker -rpath,$(CUDA)/lib64 -lcublasLt $(SERVE_LIBS) $(LIBS) -o $@
qemb-serve-cuda: build/cuda/qemb-serve ## qemb-serve for NVIDIA GPUs: same options and requests
	cp build/cuda/qemb-serve qemb-serve-cuda

# ---- a GPU's day ----------------------------------------------------------------------------------

# What a machine with a GPU runs, built beforehand or there. Nothing is installed: such a machine may
# have no network. GPU_ARCHS: the compute capabilities to build for.
GPU_ARCHS ?= $(patsubst 90,90a,$(or $(subst .,,$(firstword $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null))),90a))
GPU       := build/gpu-$(subst $(subst ,, ),-,$(strip $(GPU_ARCHS)))
GPU_PACK  := build/gpu-pack
GPU_PROGRAMS := test_cuda bench_cuda qemb-cuda qemb-serve-cuda qemb
GPU_FILES := tests/cuda/gpu_day.py tests/cuda/test_cuda_program.py tests/cuda/test_cuda_serve.py tests/fixtures/make_big_qemb.py tests/fixtures/edit_qemb.py bench/bench_transformers.py tests/fixtures/small.qemb tests/fixtures/small.txt $(wildcard tests/golden/*.qemb tests/golden/*.vec)
# cuBLASLt's directory: the toolkit's, or where PyTorch keeps it.
CUBLASLT  = $(shell python3 tests/cuda/gpu_day.py cublaslt $(CUDA))
# A program needs no library but glibc's and cuBLASLt. libstdc++.a has std::random_device beside
# std::string and with it arc4random of glibc 2.36, which nothing calls.
GPU_LINK  = g++ $(RELRO) -static-libstdc++ -static-libgcc -pthread -Wl,--defsym=arc4random=main
GPU_CUDA  = -L$(CUDA)/lib64 -lcudart_static $(firstword $(wildcard $(CUBLASLT)/libcublasLt.so.*)) -Wl,-rpath,$(CUDA)/lib64
GPU_LIBS  = -l:libjansson.a -l:libcrypto.a -l:libz.a -l:libzstd.a -ldl -lrt -lm
# File and Debian package
GPU_NEEDS := gcc:gcc g++:g++ make:make python3:python3 jansson.h:libjansson-dev libjansson.a:libjansson-dev openssl/evp.h:libssl-dev libcrypto.a:libssl-dev xxhash.h:libxxhash-dev \
  zlib.h:zlib1g-dev libz.a:zlib1g-dev zstd.h:libzstd-dev libzstd.a:libzstd-dev \
  openssl/ssl.h:libssl-dev libssl.a:libssl-dev

gpu-needs:
	@missing=; for need in $(GPU_NEEDS); do file=$${need%%:*}; \
	case $$file in \
	*.h) echo "#include <$$file>" | $(CC) -E -x c - >/dev/null 2>&1 ;; \
	*.a) case $$($(CC) -print-file-name=$$file) in /*) ;; *) false ;; esac ;; \
	*) command -v $$file >/dev/null ;; esac || case $$missing in *$${need#*:}*) ;; *) missing="$$missing $${need#*:}" ;; esac; done; \
	[ -n "$(CUBLASLT)" ] || missing="$$missing libcublasLt.so"; \
	[ -z "$$missing" ] || { echo "gpu-pack: this machine lacks$$missing"; exit 1; }

$(GPU)/%.cu.o: %.cu $(CUDA_SOURCES) $(wildcard tests/cuda/*.h) | gpu-needs
	@mkdir -p $(@D)
	$(NVCC) -I. -I$(CUBLASLT)/../include -std=c++20 -O3 -Werror all-warnings -Xcompiler -Wall,-Wextra $(NVCC_HOST) $(foreach a,$(GPU_ARCHS),-gencode arch=compute_$(a),code=sm_$(a)) -c $< -o $@
# build/release would ask dpkg for its packages.
$(GPU)/%.o: %.c $(wildcard *.h */*.h */*/*.h) | gpu-needs
	@mkdir -p $(@D)
	$(CC) $(BASE) -O3 -g $(HARDENED) -c $< -o $@
$(GPU)/test_cuda: $(patsubst %.cu,$(GPU)/%.cu.o,qemb.cu $(EMU_TESTS)) $(EMU_C:%=$(GPU)/%.o)
	$(GPU_LINK) $^ $(GPU_CUDA) $(GPU_LIBS) -o $@
$(GPU)/bench_cuda: $(GPU)/bench/bench_cuda.cu.o $(GPU)/qemb.cu.o $(EMU_C:%=$(GPU)/%.o)
	$(GPU_LINK) $^ $(GPU_CUDA) $(GPU_LIBS) -o $@
$(GPU)/qemb-cuda: $(GPU)/qemb.cu.o $(CUDA_PROGRAM:%=$(GPU)/%.o)
	$(GPU_LINK) $^ $(GPU_CUDA) $(GPU_LIBS) -o $@
$(GPU)/qemb: $(patsubst %,$(GPU)/%.o,$(FRONT) $(BACKEND) $(ENGINE))
	$(GPU_LINK) $^ $(GPU_LIBS) -o $@
$(GPU)/qemb-serve-cuda: $(CUDA_SERVE:%=$(GPU)/%.o) $(GPU)/qemb.cu.o
	$(GPU_LINK) $^ $(GPU_CUDA) -l:libssl.a $(GPU_LIBS) -o $@

gpu-pack: gpu-needs $(GPU_PROGRAMS:%=$(GPU)/%) ## all that a GPU machine needs for its day, in build/gpu-pack (GPU_ARCHS="80 90a": compute capabilities)
	rm -rf $(GPU_PACK)
	mkdir -p $(GPU_PACK)
	cp --parents $(GPU_FILES) $(GPU_PACK)
	for p in $(GPU_PROGRAMS); do strip -o $(GPU_PACK)/$$p $(GPU)/$$p || exit 1; done
	echo "$$(git rev-parse --short HEAD 2>/dev/null)$$(git diff --quiet HEAD 2>/dev/null || echo ' with changes')" >$(GPU_PACK)/COMMIT

# Status 77: there is no GPU, as the day has said.
gpu-day: gpu-pack ## on a machine with a GPU: all tests and measurements in order of value (PHASE="check speed variants", OUT=bench/results)
	python3 $(GPU_PACK)/tests/cuda/gpu_day.py $(or $(PHASE),check speed variants) --out $(or $(OUT),bench/results) || [ $$? = 77 ]

test-gpu-pack: gpu-pack
	tests/cuda/test_gpu_pack.py $(GPU_PACK)
else
cuda-archs gpu-pack gpu-day test-gpu-pack qemb-cuda qemb-serve-cuda:
	@echo "skipped: no nvcc in $(CUDA)/bin"
endif
endif
