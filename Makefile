# make demo: train the baseline and W_Q = I on the embedded corpus, and compare them (minutes on a CPU)
# make test: lint and test
# make architectures: each architecture that the paper names, with and without W_Q, at the quick size (an hour)
# They make their own environment in .venv and do nothing twice.

PYTHON ?= python3
# Options of the demo's two runs, such as DEMO="--max_iters=100".
DEMO ?=
# Options of the runs of make architectures.
ARCHITECTURE ?=

BIN := .venv/bin
RUNS := out/demo/baseline_tied out/demo/reduced_tied

OVERLAYS := rope gqa mqa rmsnorm dyt nonorm parallel shared moe encoder
VARIANTS := baseline_tied reduced_tied
ARCHITECTURES := $(VARIANTS) $(foreach overlay,$(OVERLAYS),$(VARIANTS:%=$(overlay)-%))

.PHONY: demo architectures test clean

demo: $(RUNS:%=%/summary.json)
	$(BIN)/python report.py $(RUNS) --out_dir=out/demo

out/demo/%/summary.json: | data/stdlib/meta.json
	$(BIN)/python train.py config/quick.py config/$*.py --out_dir=out/demo/$* --resume $(DEMO)

architectures: $(ARCHITECTURES:%=out/architectures/%/summary.json)
	$(BIN)/python report.py $(ARCHITECTURES:%=out/architectures/%) --out_dir=out/architectures

# The folder rope-reduced_tied is made of config/rope.py and config/reduced_tied.py.
out/architectures/%/summary.json: | data/stdlib/meta.json
	$(BIN)/python train.py config/quick.py $(patsubst %,config/%.py,$(subst -, ,$*)) \
	    --out_dir=out/architectures/$* --resume $(ARCHITECTURE)

data/stdlib/meta.json: | .venv/installed
	$(BIN)/python prepare_owt.py --source=stdlib

test: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

.venv/installed-dev: requirements-dev.txt .venv/installed
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@

clean:
	rm -rf out/demo
