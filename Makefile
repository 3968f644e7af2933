# make run   sets up what is missing and runs the main job on the embedded default
# make test  sets up what is missing and passes the tests
# make check formats, lints and types
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip

# Where it is set, every process would compile all that it imports anew: starting would take twice as long.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: run test test-unit test-extras test-containers test-namespaces check format clean

run: $(STAMP)
	$(BIN)/bouquet run -m strategy=fc_moe,fedavg,local_only rounds=3 train.max_steps=10 train.learning_rate=2e-3 eval.max_examples=40

# These look for processes that were left behind, others' too: one at a time.
ALONE := simulation or processes
ELSEWHERE := network or namespaces or containers or gpu

test: $(STAMP)
	$(BIN)/python -m pytest -n auto -m "not ($(ALONE) or $(ELSEWHERE))"
	$(BIN)/python -m pytest -m "($(ALONE)) and not ($(ELSEWHERE))"

test-unit: $(STAMP)
	$(BIN)/python -m pytest -n auto -m "not (slow or $(ALONE) or $(ELSEWHERE))"

# What only those need who ask for it; last, since torchao slows the start of every process where it is installed.
test-extras: $(STAMP)
	$(PIP) install -q torchao==0.18.0
	$(BIN)/python -m pytest tests/client/test_quantization.py

# Needs a container engine that answers to docker and docker compose; TORCH_INDEX= takes torch from pip's own sources.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
test-containers: $(STAMP)
	for target in server site; do docker build -f docker/Dockerfile --build-arg TORCH_INDEX=$(TORCH_INDEX) --target $$target -t bouquet-$$target . || exit 1; done
	$(BIN)/python -m pytest -m containers

# Needs root and ip netns.
test-namespaces: $(STAMP)
	$(BIN)/python -m pytest -m namespaces

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The dependencies are the exact versions of the lock; pyproject.toml's ranges are for those who build on Bouquet.
$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Bouquet needs Python 3.11 or newer: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "no virtual environments here: apt-get install python3-venv"; exit 1; }
	$(PIP) install -q --no-compile -r requirements.lock
	$(PIP) install -q --no-deps -e .
	@touch $(STAMP)

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
