# world.mk - `make test-world`: the programs that people use beside qemb, each started for real. A
# suite is tests/world/test_NAME.py. NAME.txt has its Python packages, which get an environment of
# their own, since their needs differ; uv fills it in seconds, pip in minutes. WORLD_NAME has its
# Debian packages.

WORLD := clients stores engines python packages
WORLD_clients  := prometheus
WORLD_stores   :=
WORLD_engines  := default-jre-headless parallel slurmctld slurmd slurm-client busybox shellcheck
WORLD_python   :=
WORLD_packages := debootstrap podman crun zsh fish $(DEBIAN_DEB)
WORLD_VENV     := .venv-world

.PHONY: test-world $(WORLD:%=need-world-%)
$(WORLD:%=need-world-%): need-world-%:
	$(call need,$(WORLD_$*))
$(WORLD:%=$(WORLD_VENV)/%/.done): $(WORLD_VENV)/%/.done: tests/world/%.txt tests/requirements.txt | need-test need-world-% $(VENV)/bin/uv
	$(call venv,$(@D))
	$(VENV)/bin/uv pip install -q --python $(@D)/bin/python -r tests/world/$*.txt
	touch $@

test-world: qemb qemb-serve build/lib/libqemb.a build/lib/libqemb.so $(patsubst %,$(WORLD_VENV)/%/.done,$(or $(SUITES),$(WORLD))) ## clients, stores, engines, packages: each started for real (installs them; SUITES="clients stores")
	@JOBS=1 tests/run.sh $(foreach s,$(or $(SUITES),$(WORLD)),"$(WORLD_VENV)/$(s)/bin/pytest -q -rs tests/world/test_$(s).py")
