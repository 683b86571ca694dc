# Everything that a person needs: `make demo`, `make test`, `make check`, `make ui`. Each sets up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export MLFLOW_DISABLE_TELEMETRY := true
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test coverage test-slow check lint types imports format ui bench-floor bench-throughput bench-gpu bench-jobs bench-tables bench-adbench bench-ablation bench-contextual bench-calibration bench-explanations bench-missing bench-images gallery drill-kill clean

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

# By a plain path: else Python started beside the clone, which has the package's name, takes the clone for it.
EDITABLE := --config-settings editable_mode=compat -e

# torch first and pinned: a bare `torch` pulls gigabytes of GPU packages.
$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "Setting up $(VENV) (a few minutes the first time) …"
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed; set PYTHON=…")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt $(EDITABLE) .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install --quiet -c constraints.txt $(EDITABLE) ".[dev]"
	@touch $@

$(VENV)/.installed-bench: $(VENV)/.installed
	$(BIN)/pip install --quiet -c constraints.txt $(EDITABLE) ".[bench]"
	@touch $@

demo: $(VENV)/.installed  ## Find the digits that are not what they claim to be; ends by saying what to open
	$(BIN)/python pipelines/digits.py

# One thread each for two workers: twice as fast on two cores as two threads for one. Files in our order: xdist would
# begin with those of most tests, and a file of few that take long would keep one worker busy at the end.
test: $(VENV)/.installed-dev  ## Run the tests (about 9 minutes on 2 cores)
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not slow and not gpu" -n 2 --dist loadfile --no-loadscope-reorder

coverage: $(VENV)/.installed-dev  ## The same, with the lines that no test reaches (longer)
	$(BIN)/pytest -m "not slow and not gpu" --cov --cov-report=term:skip-covered

test-slow: $(VENV)/.installed-dev  ## Run the tests that take longer
	$(BIN)/pytest -m "slow"

check: lint types imports  ## Lint, format, types, import floors

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev
	$(BIN)/mypy

imports: $(VENV)/.installed-dev
	$(BIN)/lint-imports

format: $(VENV)/.installed-dev  ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

ui: $(VENV)/.installed  ## MLflow at http://127.0.0.1:5000, on the runs of this folder
	@mkdir -p mlruns
	$(BIN)/mlflow server --host 127.0.0.1 --port 5000 --workers 1 \
		--backend-store-uri "$${MLFLOW_TRACKING_URI:-sqlite:///mlruns/mlflow.db}" --default-artifact-root mlruns/artifacts

bench-floor: $(VENV)/.installed  ## Measure the speed floors; writes docs/benchmarks/floor.md
	$(BIN)/python pipelines/benchmarks/floor.py

bench-throughput: $(VENV)/.installed-bench  ## Measure speed beside the machine's limits and PyOD; writes docs/benchmarks/speed.md; OPTIONS="--only peers"
	$(BIN)/python pipelines/benchmarks/throughput.py $(OPTIONS)

bench-gpu: $(VENV)/.installed-dev  ## Run the checks and the benchmarks that need a CUDA device; adds them to docs/benchmarks/speed.md
	$(BIN)/python pipelines/benchmarks/gpu.py $(OPTIONS)

bench-jobs: $(VENV)/.installed  ## Measure streaming and tracking; writes docs/benchmarks/jobs.md (about 6 minutes)
	$(BIN)/python pipelines/benchmarks/jobs.py

bench-tables: $(VENV)/.installed  ## Run the configurations of conditional tables in DATA=FOLDER from end to end; writes docs/benchmarks/tables.md (about 3 minutes)
	$(BIN)/python pipelines/benchmarks/tables.py $(DATA) $(OPTIONS)

bench-adbench: $(VENV)/.installed-bench  ## Measure one-class detection on the npz files (X, y) of DATA=FOLDER; writes docs/benchmarks/quality.md; OPTIONS="--methods kNN"
	$(BIN)/python pipelines/benchmarks/adbench.py $(DATA) $(OPTIONS)

bench-calibration: $(VENV)/.installed  ## Measure rates asked for on the npz files of DATA=FOLDER and the tables of TABLES=FOLDER; adds to docs/benchmarks/quality.md
	$(BIN)/python pipelines/benchmarks/calibrated.py $(DATA) $(if $(TABLES),--tables $(TABLES)) $(OPTIONS)

bench-explanations: $(VENV)/.installed  ## Measure how often a spoiled column is found, on the npz files of DATA=FOLDER; adds to docs/benchmarks/quality.md
	$(BIN)/python pipelines/benchmarks/explained.py $(DATA) $(OPTIONS)

bench-missing: $(VENV)/.installed  ## Measure detection with missing cells on the npz files of DATA=FOLDER and the tables of TABLES=FOLDER; adds to docs/benchmarks/quality.md
	$(BIN)/python pipelines/benchmarks/missing.py $(DATA) $(if $(TABLES),--tables $(TABLES)) $(OPTIONS)

bench-contextual: $(VENV)/.installed  ## Measure detection given a condition on tables and images in DATA=FOLDER (hours); adds it to docs/benchmarks/quality.md; OPTIONS="--parts ce"
	$(BIN)/python pipelines/benchmarks/contextual.py $(DATA) $(OPTIONS)

bench-ablation: $(VENV)/.installed-bench  ## Change one thing of the balanced preset at a time on the npz files of DATA=FOLDER; writes docs/benchmarks/quality.md
	$(BIN)/python pipelines/benchmarks/ablation.py $(DATA) $(OPTIONS)

PRESET ?= fast
bench-images: $(VENV)/.installed  ## Run the studies on images in DATA=FOLDER, PRESET=fast (an hour) or best; writes docs/benchmarks/images.md
	$(BIN)/python pipelines/benchmarks/images.py $(DATA) --preset $(PRESET)

gallery: $(VENV)/.installed  ## Make docs/gallery.md of what bench-images left in outputs/
	$(BIN)/python pipelines/gallery.py

drill-kill: $(VENV)/.installed  ## Kill scoring jobs, resume them and compare the output, 30 times (about 7 minutes)
	$(BIN)/python pipelines/drill_kill.py

clean:  ## Remove what can be made again
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .coverage outputs
