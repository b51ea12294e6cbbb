# Everything here needs python3 (3.11 or newer, with its headers) and a C compiler, and sets up the rest by itself in .venv.
# pip takes its settings from the environment, as always.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
PEERS := .venv-peers
C_FILES := $(shell find csrc cuda tests/c tests/cuda_emulator -name '*.[ch]' -o -name '*.inc' -o -name '*.cu' -o -name '*.cuh' -o -name '*.cpp')
PY_FILES := setup.py python tests $(wildcard benchmarks/*.py)
SOURCES := pyproject.toml setup.py $(shell find csrc -name '*.[ch]' -o -name '*.inc')
# The build requirements stand in pyproject.toml; they are installed beside the package, so that a rebuild takes seconds.
REQUIRES = import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")

# ladd._cuda takes minutes to compile, so these targets leave it out even where nvcc is; `make cuda` and `make gpu` build it.
export LADD_CUDA ?= 0

.DEFAULT_GOAL := help
.PHONY: help build cuda gpu test test-peers bench demo lint format wheel sanitize clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## */  make \1 - /p' Makefile

# $(call install,venv,extras): makes the environment once, then (re)builds the package in it.
define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer expected, got " + sys.version.split()[0] + "; set PYTHON=...")'
	@test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
	@$(1)/bin/python -c '$(REQUIRES)' > $(1)/requires.txt
	$(1)/bin/python -m pip --disable-pip-version-check -q install -r $(1)/requires.txt
	$(1)/bin/python -m pip --disable-pip-version-check -q install --no-build-isolation -e '.$(2)'
	@touch $@
endef

$(VENV)/build.done: $(SOURCES)
	$(call install,$(VENV),)

$(VENV)/test.done: $(SOURCES)
	$(call install,$(VENV),[test])

$(VENV)/demo.done: $(SOURCES)
	$(call install,$(VENV),[demo])

$(VENV)/dev.done: $(SOURCES)
	$(call install,$(VENV),[test$(,)dev])

$(PEERS)/peers.done: $(SOURCES)
	$(call install,$(PEERS),[test$(,)peers])

$(PEERS)/bench.done: $(SOURCES)
	$(call install,$(PEERS),[bench])

, := ,

build: $(VENV)/build.done  ## compile csrc/ and install the package in .venv, editable

test: $(VENV)/test.done  ## all tests that need no PyTorch
	$(BIN)/python -m pytest tests --ignore=tests/peers

# On a machine without a GPU, point pip at PyTorch's index of CPU builds (PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS) to save a large download.
test-peers: $(PEERS)/peers.done  ## live comparison with PyTorch and diffusers, in .venv-peers
	$(PEERS)/bin/python -m pytest tests/peers

# BENCH_ARGS chooses rows: make bench BENCH_ARGS="'demo/step/*' --seconds 10"; torch.compile needs g++.
bench: $(PEERS)/bench.done  ## time ladd beside PyTorch with diffusers' model, in .venv-peers
	$(PEERS)/bin/python benchmarks/vs_pytorch.py $(BENCH_ARGS)

demo: $(VENV)/demo.done  ## distil a fresh student from the shipped teacher and write out/demo/report.html
	$(BIN)/ladd demo

lint: $(VENV)/dev.done  ## ruff, mypy, stubs against the built module, clang-format, warnings of the C compiler
	$(BIN)/ruff check $(PY_FILES)
	$(BIN)/ruff format --check $(PY_FILES)
	$(BIN)/mypy
	MYPYPATH=python $(BIN)/python -m mypy.stubtest --ignore-disjoint-bases ladd._core
	$(BIN)/clang-format --dry-run --Werror $(C_FILES)
	rm -rf build/werror
	CFLAGS=-Werror $(PIP) install --no-build-isolation --no-deps --target build/werror .

format: $(VENV)/dev.done  ## let ruff and clang-format write the files
	$(BIN)/ruff check --fix $(PY_FILES)
	$(BIN)/ruff format $(PY_FILES)
	$(BIN)/clang-format -i $(C_FILES)

# The repaired wheel is tried where there is no compiler and no source: PATH holds nothing but the new environment.
wheel: $(VENV)/dev.done  ## build and repair a wheel into dist/, and try it in a clean environment without a compiler
	rm -rf dist build/wheel build/try
	$(PIP) wheel --no-build-isolation --no-deps -w build/wheel .
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m auditwheel repair -w dist build/wheel/ladd-*.whl
	$(PYTHON) -m venv build/try
	build/try/bin/python -m pip --disable-pip-version-check -q install --only-binary :all: pytest dist/ladd-*.whl
	cd build/try && PATH="$(CURDIR)/build/try/bin" CC=none bin/python -m pytest -q -p no:cacheprovider ../../tests/test_binding.py ../../tests/test_binding_threads.py ../../tests/test_kernels_bad_input.py
	@ls -l dist

sanitize: $(VENV)/test.done  ## the C tests, then the binding's, under the address and undefined-behaviour sanitizers
	$(BIN)/python -m pytest tests/test_sanitizers.py
	rm -rf build/sanitize
	CFLAGS="-O1 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined" LDFLAGS="-fsanitize=address,undefined" \
	    $(PIP) install --no-build-isolation --no-deps --target build/sanitize .
	PYTHONPATH=build/sanitize LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" PYTHONMALLOC=malloc \
	    ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 \
	    $(BIN)/python -m pytest -p no:cacheprovider tests/test_binding.py tests/test_binding_threads.py tests/test_kernels_bad_input.py -k "not leaks"

# No network and no environment of its own: numpy, scipy-openblas32, setuptools, safetensors, pillow, tqdm and pytest are in $(PYTHON)'s, torch may be.
gpu:  ## on a machine with an NVIDIA GPU, in 8 minutes: build for it, test on it, and write out/gpu/cuda.json and cuda.md
	@$(PYTHON) benchmarks/gpu.py --out out/gpu

cuda: $(VENV)/build.done  ## compile cuda/ with nvcc and read registers, spills and instructions (no GPU needed)
	$(PIP) install nvidia-cublas nvidia-cudnn-cu13 nvidia-cudnn-frontend nvidia-cuda-nvrtc nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm
	LADD_CUDA=1 $(BIN)/python setup.py -q build_ext --inplace
	PATH="$$(echo $(CURDIR)/$(VENV)/lib/python*/site-packages/nvidia/cu*/bin):$$PATH" $(BIN)/python benchmarks/cuda_static.py --main python/ladd/_cuda*.so

clean:  ## remove what was built, not the environments
	rm -rf build dist out python/*.egg-info python/ladd/*.so
