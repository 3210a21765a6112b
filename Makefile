# `make demo` and `make test` need only Python 3.11 or later. VENV=path reuses an environment.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test bench gpu lint

demo: $(VENV)/.installed
	$(BIN)/python allconvnet_main.py --config configs/demo.yaml --overwrite
	@echo
	@echo "What it did: trained three layers, each a convolution and a ConvNN side by side, on 1,437 handwritten digits,"
	@echo "and tested them after every epoch on the other 360."
	@echo "Results: Output/demo/train_eval_results.txt, metrics.csv and summary.json; look at Output/demo/curves.png."
	@echo "Try next:"
	@echo "  $(BIN)/python allconvnet_main.py --config configs/demo.yaml --layer Attention/ConvNN_Attn --output_dir Output/demo2"
	@echo "  $(BIN)/python allconvnet_main.py --config configs/demo.yaml --layer ConvNN --output_dir Output/demo3  # blind to place"
	@echo "  $(BIN)/python allconvnet_main.py --config configs/demo.yaml --test_only"
	@echo "  $(BIN)/python allconvnet_main.py --help"

# Run two tests at a time.
test: $(VENV)/.installed-dev lint
	$(BIN)/python -m pytest -n 2 --dist worksteal

# Compare times with their targets; needs an idle machine. Fails if a target is missed.
bench: $(VENV)/.installed
	$(BIN)/python benchmark.py targets

# Check and measure the kernels on a GPU, with PYTHON where it has all that is needed, else with the environment. Without a GPU,
# list what is skipped.
NEEDED = torch torchvision numpy tqdm yaml matplotlib safetensors pytest hypothesis
READY = $(shell $(PYTHON) -c 'from importlib.util import find_spec; print(*map(find_spec, "$(NEEDED)".split()))' | grep -v None)
.SECONDEXPANSION:
gpu: $$(if $$(READY),,$$(VENV)/.installed-dev)
	$(if $(READY),$(PYTHON),$(BIN)/python) -m experiments.first_contact --parts check time tests epochs profile

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "needs Python 3.11 or later; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: requirements.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install -r requirements.txt
	@touch $@

$(VENV)/.installed-dev: requirements.txt requirements-dev.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install -r requirements-dev.txt
	@touch $@ $(VENV)/.installed
