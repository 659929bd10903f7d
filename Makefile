# The front door. `make help` lists what there is; each target prepares what it needs.
#
#   PYTHON=python3.12   interpreter to build the environment from (default: python3)
#   JOBS=8              parallel jobs (default: one for each core)
#   ARGS=--resume       more options for `make demo` or `make bench`: see `flash-attn-res train
#                       --help` and `flash-attn-res bench --help`
#   SANITIZE=1          `make gpu-test` also runs compute-sanitizer
#   ARCH="80 90a"       architectures of `make cuda-check` (default: 90a; all: every one)
#   CUDA=ON|OFF         CUDA kernels in what `demo`, `test` and `bench` build (default: ON where
#                       there is both nvcc and a GPU, for that GPU alone)

.DEFAULT_GOAL := help
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

PYTHON ?= python3
JOBS ?= $(shell nproc)
CUDA ?= $(shell command -v nvcc >/dev/null && nvidia-smi -L >/dev/null 2>&1 && echo ON || echo OFF)

VENV := .venv
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export CMAKE_BUILD_PARALLEL_LEVEL := $(JOBS)
export PYTHON

CUDA_OPTIONS := -DFLASH_ATTN_RES_CUDA=$(CUDA)
ifeq ($(CUDA),ON)
# "9.0" becomes 90a: what is special to Hopper and to data-centre Blackwell needs the a.
GPU := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .)
CUDA_OPTIONS += -DCMAKE_CUDA_ARCHITECTURES=$(patsubst 100,100a,$(patsubst 90,90a,$(GPU)))-real
endif
OPTIONS := -DPython_EXECUTABLE=$(CURDIR)/$(VENV)/bin/python $(CUDA_OPTIONS)

PACKAGE := build/python/package-$(CUDA).stamp
CPP_SOURCES := $(shell find include src bindings cmake -type f) CMakeLists.txt
# The time of a folder changes with what files it has: an editable install lists them.
PYTHON_FOLDERS := $(shell find python -type d -not -name __pycache__)

.PHONY: help demo test bench report docs gpu-test lint format wheel install cuda-check clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1@\2/p' Makefile | column -t -s@

# ------------------------------------------------------------------------------- what others need

# Compilers and Python for the package alone; with the libraries of the C++ tests and benchmarks.
.PHONY: bootstrap bootstrap-cpp
bootstrap:
	@tools/bootstrap package

bootstrap-cpp: bootstrap
	@tools/bootstrap development

# The package, installed so that changes of the Python sources count at once.
$(PACKAGE): $(CPP_SOURCES) $(PYTHON_FOLDERS) pyproject.toml | bootstrap
	@echo "building the package (CUDA $(CUDA))"
	@$(VENV)/bin/python -m pip --disable-pip-version-check --quiet install --no-build-isolation \
	  --config-settings=build-dir=build/python \
	  $(patsubst -D%,--config-settings=cmake.define.%,$(CUDA_OPTIONS)) --editable '.[cli,docs,test]'
	@rm -f build/python/package-*.stamp
	@touch $@

install: bootstrap $(PACKAGE) ## build and install the package into .venv

# The core without PyTorch, optimised, with its tests and benchmarks.
.PHONY: build-cpp build-asan
build-cpp: bootstrap-cpp
	@cmake --preset cpu $(OPTIONS) --log-level=WARNING
	@cmake --build --preset cpu

build-asan: bootstrap-cpp
	@cmake --preset asan --log-level=WARNING
	@cmake --build --preset asan

# ---------------------------------------------------------------------------------------- targets

demo: install ## train small language models, plain and with Attention Residuals
	@$(VENV)/bin/flash-attn-res train $(ARGS)

test: install build-cpp build-asan ## run all tests: C++, C++ with sanitizers, Python
	@rm -rf build/cpu/test-results build/asan/test-results build/python-tests.xml; \
	results=(C++=build/cpu/test-results C++-with-sanitizers=build/asan/test-results \
	         Python=build/python-tests.xml); \
	status=0; \
	ctest --preset cpu -j $(JOBS) --output-junit test-results/ctest.xml || status=1; \
	ctest --preset asan -j $(JOBS) --output-junit test-results/ctest.xml || status=1; \
	$(VENV)/bin/python -m pytest -n $(JOBS) --junit-xml=build/python-tests.xml || status=1; \
	$(VENV)/bin/python tools/summarize_tests.py "$${results[@]}" || status=1; \
	if grep -qs "no browser here" build/python-tests.xml; then \
	  echo "! NOT TESTED: the page of the depth lens. No browser is installed here: apt-get install chromium"; \
	fi; \
	exit $$status

bench: install build-cpp ## measure every suite that this machine's device has
	@mkdir -p benchmarks/results
	@build/cpu/benchmarks/cpp/cpu_benchmark \
	  --benchmark_out=benchmarks/results/cpu-cpp.json --benchmark_out_format=json
	@$(VENV)/bin/flash-attn-res bench --out benchmarks/results $(ARGS)

report: install ## make the tables and plots of README and docs from benchmarks/results
	@$(VENV)/bin/flash-attn-res report --results benchmarks/results

docs: install ## build the documentation site in build/site
	@NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --quiet
	@echo "open build/site/index.html"

gpu-test: ## run tests/gpu on this machine's GPU and record the outcome
	@if [ -x $(VENV)/bin/python ]; then python=$(VENV)/bin/python; else python=$(PYTHON); fi; \
	"$$python" tools/gpu_test.py $(if $(SANITIZE),--sanitize)

lint: bootstrap-cpp install ## check format, layering, C++ (clang-tidy) and Python (ruff, mypy)
	@cmake --preset cpu -DFLASH_ATTN_RES_CUDA=OFF --log-level=WARNING
	@JOBS=$(JOBS) tools/lint

format: bootstrap ## format every C++ and Python file
	@tools/lint --format

wheel: bootstrap ## build a wheel for distribution into dist/, with CUDA where nvcc is found
	@$(VENV)/bin/python -m pip --disable-pip-version-check wheel --no-build-isolation --no-deps \
	  --wheel-dir dist .

cuda-check: bootstrap ## compile the CUDA code for ARCH (90a); fail when a hot kernel spills registers
	@JOBS=$(JOBS) ARCH="$(ARCH)" tools/cuda_check

clean: ## remove what was built; the environment in .venv stays
	@rm -rf build dist
