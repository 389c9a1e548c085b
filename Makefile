# Two commands on a fresh machine with Python >= 3.11 and a C++ compiler: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export TORCHINDUCTOR_CACHE_DIR ?= $(abspath $(VENV))/inductor

.PHONY: demo test lint bench clean

demo: $(STAMP)
	$(BIN)/python -m vggt_compile demo --out demo_out

# One thread a worker: two workers with two threads each on two cores take several times as long.
test: $(STAMP) lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not gpu" -n auto --dist loadfile --durations=10

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python -m vggt_compile bench --out docs/benchmarks

$(STAMP): pyproject.toml .ci/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "vggt_compile needs Python 3.11 or newer; call make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c .ci/constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build dist demo_out *.egg-info
