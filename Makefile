# Each target makes its own virtual environment when there is none: `make demo`, `make test`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-oldest test-newest test-slurm coverage torture fuzz soak lint lock clean

# A teacher, the student alone, KD and SSKD on the embedded digits, then the table.
demo: $(READY)
	$(BIN)/python train_student.py -cd sweeps -cn demo
	$(BIN)/python -m sskd.report demo --out demo/table

# Every test that runs on a CPU, one process a core. More of them run where SSKD_DATA names a folder
# that holds cifar-100-python, and SSKD_TEACHERS one of published checkpoints (tests/conftest.py).
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

# The same with the oldest versions that pyproject.toml admits, and with the newest, Hydra's and
# OmegaConf's release candidates among them (the launchers of a cluster need Hydra 1.3).
test-oldest: $(READY)
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python .venv-oldest
	$(BIN)/uv pip install --quiet --python .venv-oldest/bin/python --resolution lowest-direct \
	  --extra dev --extra cluster -r pyproject.toml
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -n auto --dist worksteal

test-newest: $(READY)
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python .venv-newest
	$(BIN)/uv pip install --quiet --python .venv-newest/bin/python --upgrade \
	  --extra dev -r pyproject.toml 'hydra-core>=1.4.0rc1' 'omegaconf>=2.4.0rc1'
	OMP_NUM_THREADS=1 .venv-newest/bin/python -m pytest -n auto --dist worksteal

# Sweeps on a real SLURM, which is installed, started and stopped again on this machine: Debian, root.
test-slurm: $(READY)
	$(BIN)/python -m pytest tests/robustness/slurm.py

# What the tests run of the suite's own code, in their processes' processes too, and what they do not.
coverage: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal --cov --cov-report=term-missing:skip-covered

# Hundreds of kills, power failures and full disks; prints a row of the table for each.
torture: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/robustness/torture.py

# Ten minutes of damaged checkpoints, results and run folders: no crash, no hang, no code run.
fuzz: $(READY)
	$(BIN)/python tests/robustness/fuzz.py --minutes 10

# 500 cells in one process, and one run of 20,000 epochs.
soak: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python tests/robustness/soak.py jobs --jobs 500
	OMP_NUM_THREADS=1 $(BIN)/python tests/robustness/soak.py epochs --epochs 20000

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Pin anew what pyproject.toml allows.
lock: $(READY)
	$(BIN)/uv pip compile --universal --python-version 3.11 --all-extras --upgrade \
	  --no-header --no-annotate --no-emit-index-url pyproject.toml -o requirements.lock

clean:
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-newest demo smoke soak .coverage* .mypy_cache .pytest_cache .ruff_cache

$(READY): requirements.lock
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements.lock
	touch $(READY)
