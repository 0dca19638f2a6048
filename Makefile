# Every target sets up what it needs. PYTHON chooses the interpreter: 3.11, 3.12 or 3.13.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
REQUIREMENTS := $(if $(shell nvidia-smi -L 2>/dev/null),requirements.txt,requirements-cpu.txt)
WORKDIR ?= runs/mlp
# ImageNet weights for `make transfer`: "torchvision" fetches the published file.
WEIGHTS ?= $(or $(CIFAR_JAX_WEIGHTS),torchvision)
# Further flags of the command that trains, such as --config.seed=1.
FLAGS :=
# The value that FLAGS give --config.data.NAME.
flag = $(patsubst --config.data.$(1)=%,%,$(filter --config.data.$(1)=%,$(FLAGS)))
PYTEST := $(BIN)/python -m pytest
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help train transfer test test-slow test-tpu test-gpu lint clean

help:
	@echo "make train      set up, fetch CIFAR-10, train the MLP baseline (WORKDIR=$(WORKDIR))"
	@echo "make transfer   fine-tune a pretrained ResNet-50 in about an hour (WEIGHTS=$(WEIGHTS))"
	@echo "                both pass on FLAGS, such as FLAGS=--config.seed=1"
	@echo "make test       set up and run the tests"
	@echo "make test-slow  the long ones"
	@echo "make test-tpu   those that need TPU's compiler and no TPU: brings it into $(VENV), 0.7 GB"
	@echo "make test-gpu   the same for GPUs, 0.5 GB"
	@echo "make lint       ruff"
	@echo "make clean      remove the virtual environment and caches (not runs/)"

$(VENV)/installed: requirements.txt requirements-cpu.txt
	@$(PYTHON) -c "import sys; v = sys.version_info[:2]; (3, 11) <= v <= (3, 13) or sys.exit(f'Python 3.11 to 3.13 is needed, {sys.executable} is {v[0]}.{v[1]}: make PYTHON=python3.12 ...')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -r $(REQUIREMENTS)
	touch $@

$(VENV)/installed-dev: $(VENV)/installed requirements-dev.txt
	$(BIN)/pip install --quiet -r requirements-dev.txt
	touch $@

# Where no data set is to be had the sample stands in, in a workdir of its own, and says so everywhere.
train: $(VENV)/installed
	@source=$(or $(call flag,source),$$($(BIN)/python -m cifar_jax.fetch_data --or-sample \
	  $(addprefix --directory=,$(call flag,directory)))) || exit; \
	if [ "$$source" = sample ]; then \
	  echo "Training on the small SAMPLE that ships with the package."; \
	  $(BIN)/python -m cifar_jax.main --config=configs/mlp.py --workdir=$(WORKDIR)-sample \
	    --config.data.source=sample --config.steps_per_call=45 $(FLAGS); \
	else \
	  $(BIN)/python -m cifar_jax.main --config=configs/mlp.py --workdir=$(WORKDIR) $(FLAGS); \
	fi

transfer: $(VENV)/installed
	@$(BIN)/python -m cifar_jax.main --config=configs/resnet50_cpu.py \
	  --workdir=runs/resnet50_cpu "--config.model.pretrained=$(WEIGHTS)" $(FLAGS) || { \
	  code=$$?; \
	  [ $$code != 2 ] || echo 'with make: make transfer WEIGHTS=FILE FLAGS="--config.NAME=VALUE ..."' >&2; \
	  exit $$code; }

test: $(VENV)/installed-dev lint
	$(PYTEST) -n 2 --dist=loadfile --cov=cifar_jax --cov-report=term --cov-fail-under=90

test-slow: $(VENV)/installed-dev
	$(PYTEST) -m slow

test-tpu: $(VENV)/installed-dev
	$(BIN)/pip install --quiet -r requirements-tpu.txt
	JAX_PLATFORMS=cpu $(PYTEST) -m slow tests/test_accelerators.py -k compiler_of_tpus

$(VENV)/installed-cuda: requirements-gpu-compiler.txt | $(VENV)/installed-dev
	rm -rf $(VENV)/cuda
	$(BIN)/pip install --quiet --target $(VENV)/cuda -r requirements-gpu-compiler.txt
	touch $@

test-gpu: $(VENV)/installed-cuda
	JAX_PLATFORMS=cpu PYTHONPATH=$(VENV)/cuda $(PYTEST) -m slow tests/test_accelerators.py -k compiler_of_gpus

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis .coverage build dist *.egg-info
