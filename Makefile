# Each target creates its virtual environment if it is missing: `make demo`, `make test`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-oldest test-newest test-slurm test-stand-in coverage torture fuzz soak results lint lock clean

# Train a teacher, the student alone, KD and SSKD on the digits of scikit-learn; print the table.
demo: $(READY)
	$(BIN)/python train_student.py -cd sweeps -cn demo
	$(BIN)/python -m sskd.report demo --out demo/table

# Run every test that a CPU can run, one process a core. Some tests run only if SSKD_DATA names a
# folder with cifar-100-python and SSKD_TEACHERS a folder with a teacher (tests/conftest.py).
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

# Run the tests with the oldest versions that pyproject.toml admits, and with the newest, including
# the release candidates of Hydra and OmegaConf. The cluster launchers need Hydra 1.3.
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

# Run sweeps on a real SLURM, which is installed on this machine, started and stopped: Debian, root.
test-slurm: $(READY)
	$(BIN)/python -m pytest tests/robustness/slurm.py

# Build the stand-in GPU with g++, and run a training step on it: Linux, PyTorch for CUDA 13.
test-stand-in: $(READY)
	SSKD_STAND_IN=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/benchmarks/test_stand_in.py

# Report the code that the tests reach and miss, in all of the processes that they start.
coverage: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal --cov --cov-report=term-missing:skip-covered

# Cause hundreds of kills, power failures and full disks; print a row of the table for each kind.
torture: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/robustness/torture.py

# Read damaged checkpoints, results and run folders for ten minutes; none may crash, hang or run code.
fuzz: $(READY)
	$(BIN)/python tests/robustness/fuzz.py --minutes 10

# Run a sweep of 500 jobs in one process, and one run of 20,000 epochs, to find leaks.
soak: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python tests/robustness/soak.py jobs --jobs 500
	OMP_NUM_THREADS=1 $(BIN)/python tests/robustness/soak.py epochs --epochs 20000

# Draw the tables and plots of results/ again from the committed metrics of each sweep.
results: $(READY)
	for sweep in short short_fp32 short_later few_shot cpu later; do \
	  $(BIN)/python -m sskd.report results/runs/$$sweep --out results/cifar100_$$sweep || exit 1; \
	done

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Pin the newest versions that pyproject.toml allows.
lock: $(READY)
	$(BIN)/uv pip compile --universal --python-version 3.11 --all-extras --upgrade \
	  --no-header --no-annotate --no-emit-index-url pyproject.toml -o requirements.lock

clean:
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-newest demo smoke soak .coverage* .mypy_cache .pytest_cache .ruff_cache

$(READY): requirements.lock
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements.lock
	touch $(READY)
