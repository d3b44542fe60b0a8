# An interpreter run from here must not find ./kernels under its bare name.
export PYTHONSAFEPATH := 1

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
NEWEST_TRITON := $(CURDIR)/build/triton-newest
# Compiled as pip leaves them: half of the command line's start where Python may not write bytecode.
UV_OPTIONS := --quiet --compile-bytecode --python $(BIN)/python
CPP := $(shell find kernels -name '*.cpp' -o -name '*.h')
# Tests that share what is made once for them stay together. They run side by side: with threads in
# each, a report's tests took five times the processor's time, most of it waiting for a core.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -x -q --dist loadgroup
# What `make ci` runs and times.
STAGES := lint type machine-code test
# PyTorch brings it.
NOT_IN_WHEEL := --exclude libtorch_cpu.so
SANITIZED := build/sanitize
SANITIZERS := -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined \
	-fno-sanitize-recover=undefined -D_GLIBCXX_ASSERTIONS

.DEFAULT_GOAL := help
.PHONY: help install demo docs test test-slow test-gpu lint type fmt bench gpu \
	wheel machine-code machine-code-newest sanitize ci clean

help: ## show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 20

install: $(INSTALLED) ## make .venv and install the project into it, C++ library included

$(INSTALLED): pyproject.toml constraints.txt setup.py CMakeLists.txt $(CPP)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install $(UV_OPTIONS) -c constraints.txt \
		torch 'setuptools>=77' wheel 'cmake>=3.25' ninja
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/uv pip install $(UV_OPTIONS) \
		-c constraints.txt --no-build-isolation --reinstall-package maect-fast -e '.[dev]'
	@$(BIN)/python -c "from maect_fast.kernels._common import cpp; print('C++ library:', cpp.status())"
	@touch $@

demo: install ## tune a model on real digits, three minutes on two cores, and show what it gained
	$(BIN)/maect-fast demo

docs: install ## build the documentation into build/site; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	@echo "to read it: $(BIN)/python -m http.server --directory build/site"

# Where Triton sees a GPU it compiles, and interprets nothing: these run as if there were none.
test: install ## the tests, without those marked slow
	CUDA_VISIBLE_DEVICES= $(PYTEST) -n auto --maxprocesses 8 -m "not slow"

test-slow: install ## the tests marked slow: packaging, long runs, interpreted kernels at many sizes
	CUDA_VISIBLE_DEVICES= $(PYTEST) -n auto --maxprocesses 8 -m slow

# Of these most of the time is the compiler's.
test-gpu: install ## the tests that need a CUDA device
	$(PYTEST) -n 4 -m gpu

lint: install ## check style: ruff, clang-format, codespell
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/codespell

type: install ## check types: mypy, strict
	$(BIN)/mypy

fmt: install ## rewrite the sources in the project's style
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

bench: install ## time every op beside its peers, into benchmarks/results; OP=name for one
	$(BIN)/maect-fast bench --out benchmarks/results $(if $(OP),--op $(OP))

gpu: install ## on a GPU: check, benchmarks, whole updates, tests, trace, in seven minutes; OUT=folder
	PYTHON=$(CURDIR)/$(BIN)/python bash benchmarks/gpu.sh

wheel: install ## a wheel for every Python and for Linux as old as its tag says, into dist
	rm -rf build/wheel
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m build --wheel --no-isolation --outdir build/wheel .
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair $(NOT_IN_WHEEL) --wheel-dir dist build/wheel/*.whl

machine-code: install ## check machine code: Triton kernels for sm_80 and sm_90, the C++ library
	$(BIN)/python -m maect_fast.benchmarks.machine_code --csv build/machine-code.csv
	$(BIN)/python -m maect_fast.benchmarks.machine_code.cpu

machine-code-newest: install ## the same with the newest Triton, installed apart from .venv
	$(BIN)/uv pip install --quiet --upgrade --python $(BIN)/python --no-deps \
		--target $(NEWEST_TRITON) triton
	@PYTHONPATH=$(NEWEST_TRITON) $(BIN)/python -c "import triton; file = triton.__file__; \
		file.startswith('$(NEWEST_TRITON)/') or exit(f'expected Triton from $(NEWEST_TRITON), got {file}')"
	PYTHONPATH=$(NEWEST_TRITON) $(BIN)/python -m maect_fast.benchmarks.machine_code \
		--csv build/machine-code-newest.csv

# The sanitizers' libraries come before all others, or memory that PyTorch allocates is not watched.
# Leaks are not looked for: Python and PyTorch keep memory until the process ends. What a sanitizer
# says as it ends the process must not be in pytest's keeping.
# A test of resident memory is left out: AddressSanitizer keeps what is freed for a while.
sanitize: install ## the tests of the C++ kernels with its memory accesses and arithmetic checked
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S . -B $(SANITIZED) -G Ninja \
		-DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python \
		-DCMAKE_BUILD_TYPE=Sanitize -DCMAKE_CXX_FLAGS_SANITIZE='$(SANITIZERS)'
	$(BIN)/cmake --build $(SANITIZED)
	LD_PRELOAD="$$(ldd $(SANITIZED)/_C.so | awk '/lib(a|ub)san/ { print $$3 }' | xargs)" \
		ASAN_OPTIONS=detect_leaks=0 $(BIN)/python -m pytest -x -q -m "not slow" -k "not triton and not never_holds" --capture=sys \
		--cpp-library=$(SANITIZED)/_C.so \
		tests/kernels/test_cpp.py tests/kernels/test_queue_topk.py tests/kernels/test_info_nce.py

ci: install ## everything that a change must pass: lint, type, machine-code, test
	@for stage in $(STAGES); do \
		began=$$(date +%s); \
		$(MAKE) --no-print-directory $$stage || exit 1; \
		echo "== $$stage: $$(($$(date +%s) - began)) s"; \
	done

clean: ## remove what was built, keep .venv
	rm -rf build dist *.egg-info kernels/_C.so .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -exec rm -rf {} +
	rm -f $(INSTALLED)
