# Each target makes .venv when it is missing and does nothing to it when it is up to date.
PYTHON ?= python3.11
# PyTorch's own index of CPU wheels, for a small install on Linux: see the README. Optional.
TORCH_INDEX ?=
# vLLM for this machine: `make VLLM=gpu` where there is an NVIDIA GPU.
VLLM ?= cpu
VENV := .venv
PEERS := .venv-peers
TORCH := 2.13.0
PIP_FLAGS := --quiet --disable-pip-version-check

.PHONY: demo test lint peers tables clean

demo: $(VENV)/.installed
	$(VENV)/bin/medsae pipeline --config jobs/demo.yaml

test: $(VENV)/.installed
	$(VENV)/bin/python -m pytest

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# The CPU build of PyTorch comes first and alone: while one index is slow, pip waits for it at every package.
# It is a build of its own only on Linux; where it is not to be had, the ordinary wheel serves as well.
define install_torch
$(if $(filter gpu,$(VLLM)),,$(1)/bin/pip install $(PIP_FLAGS) \
	$(if $(TORCH_INDEX),--retries 1 --extra-index-url $(TORCH_INDEX)) torch==$(TORCH)+cpu ||) \
	$(1)/bin/pip install $(PIP_FLAGS) torch==$(TORCH)
endef

# vLLM brings builds of these that do not fit PyTorch's CPU build; transformers fails where one of them is found.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install $(PIP_FLAGS) --upgrade pip
	$(call install_torch,$(VENV))
	$(VENV)/bin/pip install $(PIP_FLAGS) -c constraints.txt -e '.[test,dev,$(VLLM)]'
	for module in torchvision torchaudio torchcodec; do \
		$(VENV)/bin/python -c "import $$module" 2>/dev/null || $(VENV)/bin/pip uninstall $(PIP_FLAGS) --yes $$module; \
	done
	touch $@

# SAELens in an environment of its own: its pins are not ours.
peers: $(PEERS)/.installed
	PYTHONPATH=. $(PEERS)/bin/python -m pytest tests/peers

$(PEERS)/.installed: constraints-peers.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/pip install $(PIP_FLAGS) --upgrade pip
	$(call install_torch,$(PEERS))
	$(PEERS)/bin/pip install $(PIP_FLAGS) -c constraints-peers.txt \
		sae-lens numpy safetensors pyarrow scipy pytest pytest-timeout
	touch $@

# The real, whole label tables of CheXpert and NIH, out of the torchxrayvision package, for tests; not committed.
TABLES := data/torchxrayvision
tables: $(TABLES)/chexpert_train.csv.gz

$(TABLES)/chexpert_train.csv.gz: | $(VENV)/.installed
	$(VENV)/bin/pip download $(PIP_FLAGS) --no-deps --only-binary=:all: --dest data/unpacked torchxrayvision==1.5.7
	$(VENV)/bin/python -m zipfile -e data/unpacked/torchxrayvision-1.5.7-py3-none-any.whl data/unpacked
	mkdir -p $(TABLES)
	mv data/unpacked/torchxrayvision/data/Data_Entry_2017_v2020.csv.gz $(TABLES)/
	mv data/unpacked/torchxrayvision/data/chexpert_train.csv.gz $(TABLES)/
	touch $@
	rm -r data/unpacked

clean:
	rm -rf $(VENV) $(PEERS) runs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
