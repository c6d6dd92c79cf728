# Two commands do everything on a machine with Python and g++: `make compare` and `make test`.
# `make VENV= ...` uses the interpreter as it is (PYTHON=python3) and installs nothing: it must have torch >= 2.11.
VENV ?= .venv
PYTHON ?= python3
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))

ifeq ($(strip $(VENV)),)
PY := $(PYTHON)
READY :=
else
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
export PATH := $(abspath $(VENV))/bin:$(PATH)
endif

# Tests run on all cores if pytest-xdist is installed; it need not be.
WORKERS = $(shell $(PY) -c "import xdist" 2>/dev/null && echo "-n auto --dist loadfile")

.PHONY: extension build compare bench test clients test-torch format lint sass emulate-all gpu-check fuzz clean help

help:  ## list what there is to make
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/:[^#]*## /\t/' | expand -t 16

extension: $(READY)  ## compile the extension in place
	$(PY) setup.py -q build_ext --inplace

build: $(READY)  ## compile the extension in place, and the emulated kernels that tests run
	$(PY) setup.py -q build_ext --inplace --emulator

# The first build for a comparison is without CUDA kernels where no GPU is to run them; `make build` adds them.
compare: export FREEZEKIT_CUDA := $(or $(FREEZEKIT_CUDA),$(if $(wildcard /dev/nvidia[0-9]* /dev/dxg freezekit/_C*.so),,0))
compare: extension  ## compare freezekit with stock PyTorch, in under two minutes
	$(PY) bench/compare.py

bench: extension  ## all sections of the comparison, with plots, in under twenty minutes
	mkdir -p bench/out
	$(PY) bench/compare.py --all --plot bench/out --json bench/out/compare.json

# NVIDIA's headers for tests/truth, unpacked beside the environment and without their dependencies. Where they cannot be had
# an older copy stays; without one of the version that is asked for those tests are skipped.
CUTLASS := build/cutlass
$(CUTLASS): requirements-dev.txt | $(READY)
	rm -rf $@.new
	-$(PY) -m pip install -q --no-deps --no-compile --retries 1 --target $@.new $$(grep -o 'nvidia-cutlass==[0-9.]*' $<) \
		&& rm -rf $@ && mv $@.new $@ && touch $@ || rm -rf $@.new

test: build $(CUTLASS)  ## the test suite, on the CPU and, if there is one, on a GPU
	$(PY) -m pytest $(WORKERS) $(TESTS)

# The libraries of tests/clients, beside the environment as well. One process, since its table has times in it.
CLIENTS := build/clients
$(CLIENTS): requirements-clients.txt | $(READY)
	rm -rf $@
	$(PY) -m pip install -q --no-deps --no-compile --target $@ -r $<
	touch $@

clients: export PYTHONPATH := $(PYTHONPATH):$(CURDIR)/$(CLIENTS)
clients: build $(CLIENTS)  ## networks of a dozen libraries against stock, and the table in docs/clients.md
	$(PY) -m pytest -m full tests/clients
	$(PY) -m tests.clients docs/clients.md

# A build belongs to one minor version of torch, so another version has a copy of the sources and an environment of its own.
V ?= 2.11.0
OTHER = build/torch-$(V)
test-torch: .venv-$(V)/.ready  ## the suite under another torch: make test-torch V=2.11.0
	mkdir -p $(OTHER)
	find $(OTHER) -mindepth 1 -maxdepth 1 ! -name build -exec rm -rf {} +
	tar -c --exclude='./.git' --exclude='./.venv*' --exclude='./build' --exclude='*.so' --exclude=_build_info.json . | tar -x -C $(OTHER)
	PATH="$(CURDIR)/.venv-$(V)/bin:$$PATH" $(MAKE) -C $(OTHER) test VENV= PYTHON=python

CLANG_FORMAT = $(shell $(PY) -c "import clang_format; print(clang_format.get_executable('clang-format'))")
CXX_SOURCES = $(shell find csrc tests -name '*.cpp' -o -name '*.cu' -o -name '*.h')
format: $(READY)  ## lay out all sources: Python, C++ and CUDA
	$(PY) -m ruff format .
	$(CLANG_FORMAT) -i $(CXX_SOURCES)

lint: $(READY)  ## style and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(CLANG_FORMAT) --dry-run -Werror $(CXX_SOURCES)
	$(PY) -m mypy

sass: extension  ## registers, spills and instructions of every CUDA kernel
	$(PY) tools/sass.py

emulate-all: build $(CUTLASS)  ## the emulator's whole matrix: every mode, every planted bug, every misreading
	$(PY) -m pytest $(WORKERS) -m "full or not full" tests/emulator tests/kernels tests/truth

OUT ?= gpu-check
gpu-check: $(READY)  ## everything that only a GPU can tell, in under nine minutes, in one folder: make gpu-check OUT=DIR
	$(PY) -m tools.gpu_check --out $(OUT) $(if $(EMULATED),--emulated) $(if $(COMMIT),--commit $(COMMIT))

N ?= 10000
fuzz: build  ## a long run of the fuzzer: make fuzz N=10000
	$(PY) -m tests.fuzz --cases $(N)

clean:  ## remove what was built
	rm -rf build freezekit/*.so freezekit/_build_info.json

# pip would compile all that is installed, one file after the other, for a minute; what every process imports is enough.
COMPILED = torch sympy numpy
$(VENV)/.ready: requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q --no-compile -r requirements-dev.txt
	$(VENV)/bin/python -m compileall -qq -j 0 $(foreach name,$(COMPILED),$(VENV)/lib/python*/site-packages/$(name)) || true
	touch $@

# The pinned setuptools is one that some releases of torch refuse.
.venv-%/.ready: requirements-dev.txt
	$(PYTHON) -m venv .venv-$*
	sed -e 's/^torch==.*/torch==$*/' -e 's/^setuptools==.*/setuptools>=77/' $< > .venv-$*/requirements.txt
	.venv-$*/bin/python -m pip install -q -r .venv-$*/requirements.txt
	touch $@
