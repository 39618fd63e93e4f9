# make demo: train the baseline and W_Q = I on the embedded corpus, and compare them (minutes on a CPU)
# make test: lint and test
# make results: write the tables and figures of results/, and those in the READMEs, anew from the runs kept there
# make architectures: each architecture that the paper names, with and without W_Q, at the quick size (hours on two cores)
# They make their own environment in .venv and do nothing twice.

PYTHON ?= python3
# Options of the demo's two runs, such as DEMO="--max_iters=100".
DEMO ?=
# Options of make architectures, such as ARCHITECTURES="--jobs=1".
ARCHITECTURES ?=

BIN := .venv/bin
RUNS := out/demo/baseline_tied out/demo/reduced_tied

.PHONY: demo results architectures test clean

demo: $(RUNS:%=%/summary.json)
	$(BIN)/python report.py $(RUNS) --out_dir=out/demo

out/demo/%/summary.json: | data/stdlib/meta.json
	$(BIN)/python train.py config/quick.py config/$*.py --out_dir=out/demo/$* --resume \
		--attn_logit_std=small $(DEMO)

results: .venv/installed
	for runs in results/*/runs.json.xz; do $(BIN)/python report.py $$(dirname $$runs) >/dev/null || exit 1; done
	$(BIN)/python -m studies.blocks README.md results/README.md

architectures: | data/stdlib/meta.json
	$(BIN)/python sweep.py config/study_arch.py config/quick.py --seeds=1337 --out_dir=out/architectures $(ARCHITECTURES)
	$(BIN)/python report.py out/architectures

data/stdlib/meta.json: | .venv/installed
	$(BIN)/python prepare_owt.py --source=stdlib

test: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest --numprocesses=auto

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

.venv/installed-dev: tests/requirements.txt .venv/installed
	$(BIN)/python -m pip install --quiet -r tests/requirements.txt
	touch $@

clean:
	rm -rf out/demo
