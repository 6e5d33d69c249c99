# Each target does all the set-up that it needs: a virtual environment with the pinned packages, made once.
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready

export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export DVC_NO_ANALYTICS := 1
export MLFLOW_DISABLE_TELEMETRY := true
# Another checkout's DVC, from which this was started, must not be taken for ours.
unexport DVC_ROOT DVC_STAGE DVC_EXP_NAME DVC_EXP_BASELINE_REV
PORT ?= 5000
JOBS ?= 1

BASE ?= HEAD~1
REPORTS ?= .runs/verify

.PHONY: help setup repro smoke queue compare ui verify verify-varied verify-lock verify-steps verify-base verify-cpus report diff golden test test-pipeline soak pictures deps docs lint gc

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*##\(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 24

setup: $(READY)  ## only the set-up (TORCH=default, cpu, cu126, … for another build of torch)

# A virtual environment's commands name its interpreter by an absolute path, so it does not survive a move of the repository.
PIP := $(VENV)/bin/pip
$(shell test ! -e $(PIP) || test -x "$$(sed -n '1s/^#! *\([^ ]*\).*/\1/p' $(PIP))" || rm -rf $(VENV))

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	@$(PYTHON) -m venv $(VENV)
	@TORCH='$(TORCH)' tools/install.sh
	@touch $(READY)
	@echo "ready; \`source $(VENV)/bin/activate\` activates it"

repro: $(READY)  ## run the pipeline (what changed of it) and sum up the result
	dvc repro
	@python -m tools summary

smoke: $(READY)  ## the whole pipeline in seconds, as an experiment named smoke that leaves the workspace alone
	dvc exp run --temp --force --name smoke \
	  --set-param download.documents=60 --set-param model.n_embd=32 --set-param model.block_size=32 \
	  --set-param train.max_iters=20 --set-param train.warmup_iters=2 --set-param train.eval_interval=10 \
	  --set-param sample.max_new_tokens=100
	@python -m tools compare smoke

queue: $(READY)  ## run all queued experiments (JOBS=2 at a time), then compare them
	@python -m tools queue --jobs $(JOBS)

compare: $(READY)  ## which setting is best, by how much, and whether that is noise
	@python -m tools compare

ui: $(READY)  ## MLflow's page on http://127.0.0.1:5000 (PORT=… for another port)
	@exec python -m tools ui --port $(PORT)

verify: $(READY)  ## rerun the whole pipeline of the commit in a clean clone, and compare with its dvc.lock
	@python -m tools verify --out $(REPORTS)/full

verify-varied: $(READY)  ## the same on one core, in another folder, locale, with other variables set
	@python -m tools verify --varied --out $(REPORTS)/varied

verify-lock: $(READY)  ## seconds: dvc.lock and the remote are complete
	@python -m tools verify --layer lock --out $(REPORTS)/lock

verify-steps: $(READY)  ## a minute: the first training steps against golden/
	@python -m tools verify --layer steps --out $(REPORTS)/steps

verify-base: $(READY)  ## minutes: the first training steps of another commit and of this one (BASE=origin/main)
	@python -m tools verify --layer base --base $(BASE) --out $(REPORTS)/base

verify-cpus: $(READY)  ## seven minutes: the first training steps under emulated CPUs of Intel and AMD (needs qemu-user)
	@python -m tools verify --layer cpus --out $(REPORTS)/cpus

report:  ## what the checks have found, as Markdown
	@cat $(REPORTS)/*/report.md

diff: $(READY)  ## params and metrics against another commit, as Markdown (BASE=origin/main)
	@dvc params diff --md $(BASE)
	@dvc metrics diff --md $(BASE)

golden: $(READY)  ## write the golden file of this environment
	@python -m tools golden

test: $(READY)  ## the fast tests
	pytest -n 2 --dist worksteal tests --ignore=tests/pipeline --ignore=tests/faults

test-pipeline: $(READY)  ## real DVC and MLflow in throw-away clones
	pytest -n 3 --dist loadfile --no-loadscope-reorder tests/pipeline tests/faults

soak: $(READY)  ## kill the pipeline at 100 random moments, and ranks, nodes, servers and workers at 30; check that no trace remains
	python -m tests.faults.soak --kills 100
	python -m tests.faults.cluster_soak --kills 30

pictures: $(READY)  ## the documentation's pictures, from the runs in this repository
	python -m tests.pictures

deps: $(READY)  ## write dvc.yaml's lists of code from the imports of the stages
	@python -m tools deps

docs: $(READY)  ## the documentation as a site, in build/site; a broken link is an error
	@python -c 'import material' 2>/dev/null || pip install --quiet --constraint constraints.txt '.[docs]'
	mkdocs build --strict

lint: $(READY)  ## style and types
	ruff check .
	ruff format --check .
	mypy nanogpt stages tracking tools benchmarks

gc: $(READY)  ## show what old runs and caches take, and free it if you agree
	@python -m tools gc
