# bpfuse. `make` or `make help` lists the targets.

PYTHON := /usr/bin/python3
VENV := .venv
BIN := $(VENV)/bin

BPF_OBJECT := fuseclient/answer.bpf.o
BPF_SOURCES := $(wildcard bpf/*.c bpf/*.h)
NATIVE_SOURCES := cffi_build.py bpf/abi.h $(wildcard fuseclient/channel/native/*.c fuseclient/channel/native/*.h)
C_SOURCES := $(BPF_SOURCES) $(wildcard fuseclient/channel/native/*.c fuseclient/channel/native/*.h tests/native/*.c)
PYTHON_SOURCES := fuseclient metaserver bench tests cffi_build.py

.DELETE_ON_ERROR:
.PHONY: help setup packages test simulate crashes demo bench bench-setup bench-quick bench-readme bench-profile bench-check lint format clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: packages $(VENV)/.installed build/native.stamp $(BPF_OBJECT) ## install what is missing and build (Debian 12, root)

test: setup ## set up, then run every test, JOBS=2 at a time (ARGS="-k name" chooses)
	$(BIN)/python -m pytest -n $(or $(JOBS),2) $(ARGS)

simulate: setup ## run the simulation of clients and a metaserver (SEED=n, or SEEDS=count FIRST=n)
	cd tests && ../$(BIN)/python -m simulation --jobs $(or $(JOBS),1) $(if $(SEED),--seed $(SEED)) $(if $(SEEDS),--seeds $(SEEDS)) $(if $(FIRST),--first $(FIRST))

crashes: setup ## kill, hang and cut off metaservers, engines and a store under load, COUNT faults (50) an engine, in the order of SEED=n
	BPFUSE_CRASHES=$(or $(COUNT),50) $(if $(SEED),BPFUSE_SEED=$(SEED)) $(BIN)/python -m pytest -n0 -s tests/t5_crashes.py

demo: setup ## set up, then show a mounted volume and what BPF answered
	$(BIN)/python -m bench.demo $(ARGS)

bench: setup bench-setup ## measure beside other systems, an hour (ARGS="small trees" chooses, --help says more)
	$(BIN)/python -m bench $(ARGS)

bench-quick: setup bench-setup ## the same in three minutes, with fewer files, rounds and systems
	$(BIN)/python -m bench --quick $(ARGS)

bench-profile: setup bench-setup ## where the time of a workload goes: make bench-profile NAME=small (ARGS="--files 5000")
	$(BIN)/python -m bench.profile $(NAME) $(ARGS)

bench-check: setup bench-setup ## fail if a ratio got worse than bench/baseline.json allows (ARGS=--update writes it anew)
	$(BIN)/python -m bench.check $(ARGS)

bench-readme: ## write README's table and plot and docs/benchmarks.md anew from the last make bench
	$(BIN)/python -m bench --readme

lint: setup ## check the style and the types of Python and C
	$(BIN)/ruff check $(PYTHON_SOURCES)
	$(BIN)/ruff format --check $(PYTHON_SOURCES)
	$(BIN)/mypy
	clang-format --dry-run -Werror $(C_SOURCES)

format: setup ## bring Python and C into that style
	$(BIN)/ruff check --fix $(PYTHON_SOURCES)
	$(BIN)/ruff format $(PYTHON_SOURCES)
	clang-format -i $(C_SOURCES)

clean: ## remove all that was built, the virtual environment too
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	rm -f $(BPF_OBJECT) fuseclient/_native*.so fuseclient/_native.c fuseclient/_native.o fuseclient/channel/native/*.o
	find $(PYTHON_SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +

# What setup is made of. Each stamp is newer than all it was made from, so a second run has nothing to do.

packages:
	@scripts/system-packages.sh

$(VENV)/.installed: pyproject.toml | packages
	$(PYTHON) -m venv --system-site-packages $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --retries 5 -e '.[dev]'
	touch $@

# What the other systems and the reports are made of; needed for make bench only.
bench-setup: $(VENV)/.bench-installed
	@scripts/system-packages.sh redis-server

$(VENV)/.bench-installed: pyproject.toml $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --retries 5 -e '.[bench]'
	touch $@

build/native.stamp: $(NATIVE_SOURCES) $(VENV)/.installed
	$(BIN)/python cffi_build.py
	@mkdir -p build
	touch $@

$(BPF_OBJECT): | packages
include bpf/build.mk
