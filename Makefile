# Everything a developer runs; `make help` lists it. Nothing is installed outside of this folder.

# The interpreter that a new virtual environment is made with, and where that environment is.
PYTHON ?= python3
VENV ?= .venv
# How many tests run at a time; more arguments for pytest, benchmarks/run.py and what is in tools/.
WORKERS ?= auto
PYTEST_ARGS ?=
BENCH_ARGS ?=
SOAK_ARGS ?=
MUTANTS_ARGS ?=

BIN := $(VENV)/bin
BUILD := build/$(patsubst .%,%,$(notdir $(VENV)))
PRINT_VERSION := -c 'import sys; print("%d.%d" % sys.version_info[:2])'
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check
CXX_FILES = $(shell find include src tests/cpp -name '*.cc' -o -name '*.h')

# What the extension is made from.
SOURCES := CMakeLists.txt pyproject.toml README.md LICENSE $(shell find include src -type f)

.PHONY: help
help: ## This list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1|/' | \
	  while IFS='|' read -r name text; do printf '  %-15s %s\n' "$$name" "$$text"; done

# --- What people run ------------------------------------------------------------------------------

.PHONY: demo
demo: $(VENV)/.extension $(VENV)/.demo ## Run examples/demo.py, which draws demo.png
	$(BIN)/python examples/demo.py

.PHONY: test
test: test-cpp test-python ## Run the tests, in C++ and in Python

.PHONY: test-python
test-python: $(VENV)/.extension $(VENV)/.test $(VENV)/.demo ## Run the tests in Python
	$(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 8 $(PYTEST_ARGS)

.PHONY: test-cpp
test-cpp: ctest-plain ## Run the tests in C++

.PHONY: test-sanitized
test-sanitized: ctest-address ctest-thread pytest-address pytest-thread ## Run tests under ASan and UBSan, then under TSan

.PHONY: test-all
test-all: ## Run the tests in Python, the long ones too, on every JAX that storax supports
	@STORAX_ALL=1 MAKE='$(MAKE)' sh tools/test_all.sh

.PHONY: test-jit
test-jit: ## Run the tests in Python with storax.jit in the place of jax.jit, packed and pure
	STORAX_JIT=packed $(MAKE) --no-print-directory test-python
	STORAX_JIT=pure $(MAKE) --no-print-directory test-python

.PHONY: test-gpu
test-gpu: $(VENV)/.extension $(VENV)/.test $(VENV)/.demo ## Run the tests of storax.jit on a GPU, with the JAX for it that is in $(VENV)
	JAX_PLATFORMS=cuda,cpu $(BIN)/python -m pytest tests/python/jit/test_gpu.py $(PYTEST_ARGS)

.PHONY: soak
soak: $(VENV)/.extension $(VENV)/.test ## Run 100,000 random programs: hours; run it again to go on
	nice -n 19 $(BIN)/python tools/soak.py $(SOAK_ARGS)

.PHONY: mutants
mutants: $(VENV)/.extension $(VENV)/.test $(VENV)/.demo ## Take out each rule and check in turn: does a test notice?
	$(BIN)/python tools/mutants.py $(MUTANTS_ARGS)

.PHONY: bench
bench: $(VENV)/.extension $(VENV)/.bench ## Run the benchmarks
	$(BIN)/python benchmarks/run.py $(BENCH_ARGS)

.PHONY: lint
lint: $(VENV)/.extension $(VENV)/.lint ## Check format, style, types and stubs
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)/mypy
	@$(MAKE) --no-print-directory $(BUILD)/_core.pyi
	@diff -u python/storax/_core.pyi $(BUILD)/_core.pyi || \
	  { echo 'python/storax/_core.pyi is out of date: run `make stubs`, and commit it.'; exit 1; }

.PHONY: format
format: $(VENV)/.lint ## Format the code, and mend the style where that is safe
	$(BIN)/ruff check --fix --quiet || true
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CXX_FILES)

.PHONY: stubs
stubs: $(BUILD)/_core.pyi ## Write python/storax/_core.pyi anew, from the extension
	cp $< python/storax/_core.pyi

.PHONY: clean
clean: ## Remove what was built, and the virtual environments
	rm -rf build dist .venv .venv-* demo.png .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find python tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# --- The virtual environment ----------------------------------------------------------------------
# A file per step says that it was done, so that a second run does only what has changed.

$(VENV)/.created: tools/check_python.py
	@$(PYTHON) tools/check_python.py
	@echo "Making a virtual environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.build $(VENV)/.test $(VENV)/.demo $(VENV)/.lint $(VENV)/.bench: \
$(VENV)/.%: requirements/%.txt requirements/constraints.txt $(VENV)/.created
	@echo "Installing requirements/$*.txt into $(VENV)"
	@$(PIP) install -r $<
	@touch $@

# The extension, compiled against this environment's jaxlib; the Python files stay where they are.
# Without isolation, since an isolated build would fetch some other jaxlib.
$(VENV)/.extension: $(SOURCES) $(VENV)/.build $(VENV)/.modules
	@echo "Building storax for $(VENV)"
	@$(PIP) install --no-build-isolation --no-deps --config-settings=build-dir=$(BUILD) --editable .
	@touch $@

# An editable install knows the modules there were when it was made: notice a new one.
$(VENV)/.modules: $(VENV)/.created FORCE
ifneq ($(origin PYTHON),file)
	@made=$$($(BIN)/python $(PRINT_VERSION)) && asked=$$($(PYTHON) $(PRINT_VERSION)) && \
	  test "$$made" = "$$asked" || { echo "$(VENV) is of Python $$made, not $$asked:" \
	  "name another with VENV=..., or make clean."; exit 1; }
endif
	@find python -name '*.py' | sort > $@.now
	@if cmp -s $@.now $@; then rm $@.now; else mv $@.now $@; fi

$(BUILD)/_core.pyi: $(VENV)/.extension $(VENV)/.lint
	@mkdir -p $(BUILD)
	@$(BIN)/python -m nanobind.stubgen --quiet -m storax._core -o $@.raw
	@$(BIN)/ruff format --stdin-filename python/storax/_core.pyi - < $@.raw > $@

.PHONY: FORCE
FORCE:

# --- The tests in C++, a build for each set of sanitizers -----------------------------------------
# GCC takes minutes to optimise what UBSan adds to Boost.Test, so that build is not optimised.

FLAGS_plain := -DCMAKE_BUILD_TYPE=Release
FLAGS_address := -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_FLAGS_DEBUG=-O0
FLAGS_thread := -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_FLAGS_DEBUG=-O1
SANITIZE_address := address,undefined
SANITIZE_thread := thread

.PHONY: ctest-plain ctest-address ctest-thread
ctest-plain ctest-address ctest-thread: ctest-%: $(VENV)/.build $(VENV)/.test
	@echo "Building the tests in C++$(if $(SANITIZE_$*), with -fsanitize=$(SANITIZE_$*))"
	@$(BIN)/cmake -S . -B build/ctest-$* -G Ninja --log-level=WARNING \
	  -DCMAKE_MAKE_PROGRAM='$(abspath $(BIN)/ninja)' \
	  -DPython_EXECUTABLE='$(abspath $(BIN)/python)' \
	  -DSTORAX_PYTHON=OFF -DSTORAX_TESTS=ON -DSTORAX_SANITIZE=$(SANITIZE_$*) $(FLAGS_$*) >/dev/null
	@$(BIN)/cmake --build build/ctest-$* -- --quiet
	@$(BIN)/ctest --test-dir build/ctest-$* --output-on-failure

# --- Tests in Python of the extension, built with sanitizers --------------------------------------
# Python and jaxlib aren't, so this is about storax's own accesses, to their memory too. A sanitizer has
# to be loaded before anything else, with libstdc++, where ASan looks for __cxa_throw as it starts.
# Python never frees all it has, hence detect_leaks=0: the tests in C++ look for leaks.

RUNTIME_address := libasan.so
RUNTIME_thread := libtsan.so
TESTS_address := tests/python/test_dtypes.py
# Not test_exit, whose programs XLA spreads over threads: TSan can't tell whose the compiled code is
# that calls memcpy there, so nothing can be said to suppress it.
TESTS_thread := tests/python/test_threads.py -k 'not test_exit'
OPTIONS_address = ASAN_OPTIONS=detect_leaks=0:log_path=$(1) UBSAN_OPTIONS=print_stacktrace=1:log_path=$(1)
OPTIONS_thread = TSAN_OPTIONS=suppressions=$(CURDIR)/tools/sanitized/tsan.supp:log_path=$(1)

.PHONY: pytest-address pytest-thread
pytest-address pytest-thread: pytest-%: $(VENV)/.build $(VENV)/.test
	@echo "Building the extension with -fsanitize=$(SANITIZE_$*)"
	@$(BIN)/cmake -S . -B $(BUILD)-$* -G Ninja --log-level=WARNING \
	  -DCMAKE_MAKE_PROGRAM='$(abspath $(BIN)/ninja)' \
	  -DPython_EXECUTABLE='$(abspath $(BIN)/python)' \
	  -DSTORAX_SANITIZE=$(SANITIZE_$*) $(FLAGS_$*) >/dev/null
	@$(BIN)/cmake --build $(BUILD)-$* -- --quiet
	@rm -f $(BUILD)-$*/report.*
	@export PYTHONPATH=tools/sanitized:python STORAX_EXTENSION="$$(ls $(CURDIR)/$(BUILD)-$*/_core.*.so)" \
	  $(call OPTIONS_$*,$(CURDIR)/$(BUILD)-$*/report) && \
	export LD_PRELOAD="$$($(CXX) -print-file-name=$(RUNTIME_$*)) $$($(CXX) -print-file-name=libstdc++.so.6)" && \
	$(BIN)/python -c 'import os, storax._core as c; assert c.__file__ == os.environ["STORAX_EXTENSION"]' && \
	$(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 8 $(TESTS_$*)
	@! cat $(BUILD)-$*/report.* 2>/dev/null
