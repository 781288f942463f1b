# make demo, make test: make .venv, install what they need into it, run. With VENV= they run in the interpreter that is there.
VENV ?= .venv
TORCH ?= $(shell sed -n 's/^torch==//p' constraints.txt)
EXTRAS ?= test,bench,dev,fbgemm
ARGS ?=

ifeq ($(strip $(VENV)),)
PYTHON := python3
READY :=
else
PYTHON := $(VENV)/bin/python
READY := $(VENV)/ready-torch-$(TORCH)
endif

export PYTHONPATH := .
# As many test processes as there are cores, a thread each; one process where pytest-xdist is not installed.
PARALLEL = $(shell $(PYTHON) -c 'import xdist' 2>/dev/null && echo --numprocesses auto --maxprocesses 16 --dist worksteal)
test test-torch: export OMP_NUM_THREADS := 1
PIP := $(PYTHON) -m pip install --quiet --disable-pip-version-check
# A lint tool that is not installed is skipped in the interpreter that is there, and an error in a .venv of ours.
tool = if [ -n "$(READY)" ] || $(PYTHON) -c 'import $(1)' 2>/dev/null; then $(PYTHON) -m $(1) $(2); else echo "$(1): not installed, skipped"; fi

.PHONY: demo test lint format test-torch bench tables clean

demo: $(READY)
	$(PYTHON) -m bench.demo $(ARGS)

test: lint
	$(PYTHON) -m pytest $(PARALLEL) $(ARGS)

lint: $(READY)
	@$(call tool,ruff,check .)
	@$(call tool,ruff,format --check .)
	@$(call tool,mypy,)

format: $(READY)
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

# The tests under another torch, with the triton that it brings and without fbgemm: make test-torch TORCH=2.15.0
test-torch:
	$(MAKE) .venv-torch-$(TORCH)/ready-torch-$(TORCH) VENV=.venv-torch-$(TORCH) TORCH=$(TORCH) EXTRAS=test,bench,dev
	.venv-torch-$(TORCH)/bin/python -m pytest $(PARALLEL) $(ARGS)

bench: $(READY)
	$(PYTHON) -m pytest bench $(ARGS)

# The tables in README.md and docs/, from bench/results.
tables: $(READY)
	$(PYTHON) -m bench.tables

clean:
	rm -rf .venv .venv-torch-* build dist *.egg-info

# torch first: its CUDA builds name the triton they want, its CPU builds none, and then constraints.txt says which.
ifneq ($(READY),)
$(READY): pyproject.toml constraints.txt
	python3 -m venv $(VENV)
	grep -vE '^(torch|triton)==' constraints.txt > $(VENV)/constraints.txt
	$(PIP) torch==$(TORCH)
	$(PYTHON) -c 'import triton' 2>/dev/null || $(PIP) -c constraints.txt triton
	$(PIP) -c $(VENV)/constraints.txt -e '.[$(EXTRAS)]'
	touch $@
endif
