# make train         from a bare machine to a small pretrained model
# make pretraining   all its stages in a row, long context included
# make assistant     the first three of them, then mid-training, SFT and preference optimisation
# make test          the whole suite
# make drills        drills in full, which the suite holds samples of
# make lint          style
VENV   ?= .venv
PYTHON ?= python3
BIN     = $(VENV)/bin
PIP     = $(BIN)/python -m pip --disable-pip-version-check -q
TORCH   = torch==2.13.0
DRILLED = tests/faults tests/launch $(addprefix tests/checkpoints/test_,crash_points.py mirror.py credentials.py)
CPU     = https://download.pytorch.org/whl/cpu

.PHONY: train pretraining assistant test drills lint install install-dev clean

train: install
	$(BIN)/python src/train.py fit --config configs/stage1.yaml

pretraining: install
	for stage in stage1 stage2 stage3 long_context_32k long_context_64k; do \
		$(BIN)/python src/train.py fit --config configs/$$stage.yaml || exit 1; \
	done

assistant: install
	for phase in stage1 stage2 stage3 mid_training sft preference; do \
		$(BIN)/python src/train.py fit --config configs/$$phase.yaml || exit 1; \
	done

drills: install-dev
	DRILLS=1 PYTHONPATH=tests:benchmarks $(BIN)/python -m pytest -p drill_report $(DRILLED)

test: install-dev
	$(BIN)/python -m pytest

lint: install-dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

# torch first: with a GPU the index's default wheel, else a CPU wheel, from this index or PyTorch's.
$(VENV)/.torch:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; type make PYTHON=python3.11")'
	@if command -v nvidia-smi > /dev/null && nvidia-smi > /dev/null 2>&1; then \
		echo "a GPU is present: installing $(TORCH)"; $(PIP) install $(TORCH); \
	else \
		echo "no GPU: installing a CPU wheel of $(TORCH)"; \
		$(PIP) install $(TORCH)+cpu 2> /dev/null \
		|| $(PIP) install $(TORCH) --index-url $(CPU) 2> /dev/null \
		|| $(PIP) install $(TORCH); \
	fi
	@$(BIN)/python -W ignore -c 'import torch; print("torch", torch.__version__)'
	@touch $@

# Exact versions without dependencies: nothing is resolved, and nothing asks for torchvision.
$(VENV)/.installed: $(VENV)/.torch requirements.lock pyproject.toml
	$(PIP) install --no-deps -r requirements.lock
	$(PIP) install --no-deps -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements-dev.lock
	$(PIP) install --no-deps -r requirements-dev.lock
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache
