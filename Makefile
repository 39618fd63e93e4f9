# make demo: train the baseline and W_Q = I on the embedded corpus, and compare them (minutes on a CPU)
# make test: lint and test
# make results: write the tables and figures of results/, and those in the READMEs, anew from the runs kept there
# make architectures: each architecture that the paper names, with and without W_Q, at the quick size (hours on two cores)
# They make their own environment in .venv and do nothing twice.

PYTHON ?= python3
# Options of the two studies, such as DEMO="--max_iters=100" and ARCHITECTURES="--jobs=1".
DEMO ?=
ARCHITECTURES ?=

BIN := .venv/bin

.PHONY: demo results architectures test clean

demo: | data/stdlib/meta.json
	$(BIN)/python sweep.py config/study_demo.py config/quick.py --out_dir=out/demo $(DEMO)
	$(BIN)/python report.py out/demo

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
