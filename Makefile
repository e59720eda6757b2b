# A virtual environment with pinned packages, and everything that runs in it. `make help` lists the targets.

PYTHON ?= python3
BIN := .venv/bin
UV ?= $(or $(shell command -v uv 2>/dev/null),$(BIN)/uv)
ARGS ?=
PY ?=

# Flags that change samples, for example `make sample ARGS="--guidance 3"`, start another run in runs/<model>-<fingerprint>.
SAME := --num-samples% --max-actors% --progress% --shard-size% --overwrite% --score% --metrics%
OUTPUT := $(if $(filter-out $(SAME),$(subst _,-,$(filter --%,$(ARGS)))),,--output runs/digits)

.DEFAULT_GOAL := help
.PHONY: help venv sample test accidents chaos simulate bench gpu check-inception lint system chromium azurite fuse clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: .venv/installed ## .venv with everything that constraints.txt pins, for tests and benchmarks; UV= installs with pip

# uv does not read pip's configuration: it is given the indexes and folders of wheels that pip would use. Where uv fails, pip follows.
setting = $$($(BIN)/pip config list | sed -n "s/^[^=]*[.]$(1)='\(.*\)'$$/\1/p" | head -n 1)
pip = $(BIN)/pip install --quiet --disable-pip-version-check
define install
@test -z "$(UV)" || test -x "$(UV)" || $(pip) uv || true
@UV_DEFAULT_INDEX="$(call setting,index-url)" UV_INDEX="$(call setting,extra-index-url)" \
	UV_FIND_LINKS="$(call setting,find-links)" $(or $(UV),false) pip install --quiet --python $(BIN)/python \
	--index-strategy unsafe-best-match --constraints constraints.txt --editable ".[$(EXTRAS)]" || \
	$(pip) --constraint constraints.txt --editable ".[$(EXTRAS)]"
@touch $@
endef

.venv/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; v >= (3, 11) or sys.exit("the pinned packages need Python 3.11 or newer, and $(PYTHON) is %d.%d; name another, as in make PYTHON=python3.12" % v)'
	$(PYTHON) -m venv .venv

.venv/installed-core: EXTRAS := s3
.venv/installed: EXTRAS := dev,examples,s3,gcs,azure

.venv/installed-core: pyproject.toml constraints.txt | .venv/bin/python
	$(install)

.venv/installed: .venv/installed-core
	$(install)

sample: .venv/installed-core ## 1,000 handwritten digits into runs/digits, and their score; ARGS="--num-samples 2000" passes flags on
	$(BIN)/python jobs/sample.py $(OUTPUT) --num-samples 1000 --score digits $(ARGS)

test: lint ## linter, type checker and all tests but those of `make accidents`
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS) || $(call again,)

accidents: venv ## tests that kill, freeze and submit whole processes and clusters
	$(BIN)/python -m pytest -m accidents -n 2 --maxschedchunk 1 $(ARGS) || $(call again,-m accidents)

# Tests that failed run once more, one at a time: a busy machine may starve a process, but a fault fails twice.
again = { test $$? = 1 && echo "once more, one at a time: the tests that failed" && OMP_NUM_THREADS=1 $(BIN)/python -m pytest --last-failed --last-failed-no-failures none $(1); }

chaos: venv ## runs that are killed and spoiled on purpose; ARGS="--rounds 50 --seed 1" or ARGS="--minutes 30"
	$(BIN)/python -m tests.chaos $(ARGS)

simulate: venv ## the driver on a simulated cluster; ARGS="--seed 7 --actors 1000 --shards 1000000 --kills 10000"
	$(BIN)/python -m tests.simulation $(ARGS)

bench: venv ## every benchmark, with results in benchmarks/README.md; ARGS="engine noise" runs those two
	$(BIN)/python benchmarks/bench.py $(ARGS)

gpu: $(if $(PY),,venv) ## what a GPU must show, in nine minutes; PY=python3 takes that interpreter as it is; without a GPU a rehearsal
	$(or $(PY),$(BIN)/python) benchmarks/gpu.py --rehearse $(ARGS)

check-inception: venv ## WEIGHTS=FILE: features and scores with the published Inception weights against torch-fidelity's own
	@test -f "$(WEIGHTS)" || { echo "make check-inception needs WEIGHTS=FILE, the file weights-inception-2015-12-05-6726825d.pth"; exit 2; }
	INCEPTION_WEIGHTS="$(abspath $(WEIGHTS))" $(BIN)/python -m pytest -v -s -k "inception or same" tests/scoring/test_extractors.py tests/scoring/test_fidelity.py $(ARGS)

lint: venv ## linter, formatter (as a check) and type checker
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

system: chromium azurite fuse ## what the tests can use beside Python packages; does nothing where that cannot be installed

chromium:
	@if command -v chromium >/dev/null || ! command -v apt-get >/dev/null || [ "$$(id -u)" != 0 ]; then exit 0; fi; \
	apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y chromium \
		|| echo "make system: Chromium was not installed; the tests that open a page in it will be skipped"

azurite:
	@if [ -d .emulators ] || ! command -v npm >/dev/null; then exit 0; fi; \
	npm install --silent --no-audit --no-fund --prefix .emulators azurite@3 \
		|| echo "make system: Azurite was not installed; the tests of Azure Blob Storage will be skipped"

fuse:
	@if command -v fusermount3 >/dev/null || ! command -v apt-get >/dev/null || [ "$$(id -u)" != 0 ]; then exit 0; fi; \
	apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y fuse3 libfuse3-3 \
		|| echo "make system: FUSE was not installed; the tests of disks that fail will be skipped"

clean: ## remove the environment and caches, but no runs
	rm -rf .venv .emulators build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
