# Each target makes its own virtual environment when there is none: `make demo`, `make test`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-slurm torture fuzz soak lint lock clean

# A teacher, the student alone, KD and SSKD on the embedded digits, then the table.
demo: $(READY)
	$(BIN)/python train_student.py -cd sweeps -cn demo
	$(BIN)/python -m sskd.report demo --out demo/table

# Every test that runs on a CPU, one process a core. More of them run where SSKD_DATA names a folder
# that holds cifar-100-python, and SSKD_TEACHERS one of published checkpoints (tests/conftest.py).
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

# Sweeps on a real SLURM, which is installed, started and stopped again on this machine: Debian, root.
test-slurm: $(READY)
	$(BIN)/python -m pytest tests/slurm.py

# Hundreds of kills, power failures and full disks; prints a row of the table for each.
torture: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/torture.py

# Ten minutes of damaged checkpoints, results and run folders: no crash, no hang, no code run.
fuzz: $(READY)
	$(BIN)/python tests/fuzz.py --minutes 10

# 500 cells in one process, and one run of 20,000 epochs.
soak: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python tests/soak.py cells --cells 500
	OMP_NUM_THREADS=1 $(BIN)/python tests/soak.py epochs --epochs 20000

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Pin anew what pyproject.toml allows.
lock: $(READY)
	$(BIN)/uv pip compile --universal --python-version 3.11 --all-extras --upgrade \
	  --no-header --no-annotate --no-emit-index-url pyproject.toml -o requirements.lock

clean:
	rm -rf $(VENV) demo smoke .mypy_cache .pytest_cache .ruff_cache

$(READY): requirements.lock
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements.lock
	touch $(READY)
