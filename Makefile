# Short names for `python -m helpers …`. Every target that needs packages sets up .venv first. For example:
#   make run MODEL=tiny-phi3 PARAMS='-p max_new_tokens 16' TRACKING_URI=http://127.0.0.1:5000
# WEIGHTS_DIR, TORCH_BACKEND and WHEELHOUSE are read from the environment, which make's command line is a part of.
.DEFAULT_GOAL := help
# .venv's own Python, or else the first of a supported version that starts; by its path, for PATH changes below.
PYTHON := $(or $(PYTHON),$(shell for name in .venv/bin/python python3 python3.13 python3.12 python3.11; do \
  p=$$(command -v $$name) && $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
  2>/dev/null && echo $$p && break; done))
VENV := .venv/bin
RUN := $(VENV)/python -m helpers
NOTEBOOK ?= notebooks/01_TransformerPipeline.ipynb
PORT ?= 5000
MINUTES ?= 30
STORE := $(if $(TRACKING_URI),--tracking-uri "$(TRACKING_URI)")
# `uv`, `mlflow` and the other programs of the environment are found by what is started here.
export PATH := $(CURDIR)/.venv/bin:$(PATH)

STYLE := $(VENV)/ruff check . && $(VENV)/ruff format --check .
# tests/reasons.py calls a test slow; --durations and out/tests-*.xml say where the time goes.
PYTEST := $(VENV)/pytest --durations=20 --durations-min=1
# Two at a time, the longest first: a notebook.
FAST := $(PYTEST) -m "not slow" -n 2 --dist worksteal --junitxml=out/tests-fast.xml --nbmake --nbmake-timeout=900 \
  notebooks tests
# Three at a time, also on two cores: these tests wait a quarter of their time, for servers, disks and time-outs.
SLOW := $(PYTEST) -m slow -n 3 --dist loadfile --junitxml=out/tests-slow.xml tests

.PHONY: help python doctor setup run test test-slow test-all lab ui serve weights wheelhouse notebooks bench \
  rehearsal lock clean test-browser classroom student site soak audit board kit test-pythons newest

help: ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

python:
	@test -n "$(PYTHON)" || { echo "No Python 3.11, 3.12 or 3.13 found. Install one, or name it: make run PYTHON=/path/to/python3.12" >&2; exit 1; }

doctor: python ## say what is here and what is missing, before or after set-up
	@$(PYTHON) -m helpers doctor $(if $(MODEL),--model "$(MODEL)") $(STORE)

setup: python ## make .venv hold what requirements.lock says
	@$(PYTHON) -m helpers setup

run: setup ## run both notebooks headless into out/
	$(RUN) run $(if $(MODEL),-p model "$(MODEL)") $(if $(TRACKING_URI),-p tracking_uri "$(TRACKING_URI)") $(PARAMS)

test: setup ## check the style, run both notebooks and the quick tests (under ten minutes)
	$(STYLE)
	$(FAST)
	@echo "Left out, for they take 20 to 50 minutes: attempts at exercises, browser, classroom, container, environment,"
	@echo "faults, most of kernel, models and server, network, soak and spark. To run them: make test-slow"

test-slow: setup ## run the tests that make test leaves out (20 to 50 minutes)
	$(SLOW)

test-all: setup ## run all that make test and make test-slow run
	$(STYLE)
	$(FAST); fast=$$?; $(SLOW) && exit $$fast

test-pythons: python ## set up, run both notebooks (tiny-phi3) and the fast tests on this machine's other Pythons
	$(PYTHON) -m tools.elsewhere pythons $(PARAMS)

newest: python ## try the newest releases beyond the ranges in a copy of this project, and print what changed
	$(PYTHON) -m tools.elsewhere newest

test-browser: setup ## look at JupyterLab, MLflow's pages and the site in a real browser (fetches one where none is)
	command -v chromium || command -v google-chrome || $(VENV)/playwright install chromium || true
	$(VENV)/pytest tests/e2e

lab: setup ## open the notebooks in JupyterLab
	JUPYTER_CONFIG_PATH="$(CURDIR)/.jupyter" $(VENV)/jupyter lab "$(NOTEBOOK)" $(PARAMS)

ui: setup ## look at runs, models and traces in MLflow's UI
	@# The shell reads the store's address from the environment, for its command line can be read by everybody.
	$(RUN) ui --port $(PORT) $(if $(TRACKING_URI),--tracking-uri "$$TRACKING_URI")

serve: setup ## put an OpenAI endpoint before the champion, at http://127.0.0.1:8000/v1
	$(RUN) serve $(STORE) $(if $(MODEL),--model "$(MODEL)") $(PARAMS)

classroom: setup ## serve one MLflow for a room, on PostgreSQL
	$(RUN) classroom $(PARAMS)

board: setup ## show on http://127.0.0.1:8050 who has solved which exercise, and who needs help
	$(RUN) board $(STORE) $(PARAMS)

kit: setup ## gather wheels for other kinds of laptops, and the models (PLATFORMS="macos-arm64:3.12 …")
	$(RUN) kit $(PLATFORMS)

weights: setup ## fetch and convert the model, so that everything else runs offline
	$(RUN) fetch $(if $(MODEL),"$(MODEL)")

wheelhouse: setup ## gather all locked wheels: make run WHEELHOUSE=wheelhouse then needs no network
	$(RUN) wheelhouse

site: setup ## write notebooks and guides as web pages to out/site
	$(RUN) site

student: setup ## write out/student/ (exercises without our solutions) and out/full/
	$(RUN) student

notebooks: setup ## execute the notebooks and save them with their outputs
	$(RUN) save

bench: setup ## measure the wrapper against its peers, and the servers (compiles llama.cpp once; 25 minutes)
	$(VENV)/uv pip install --python $(VENV)/python -c requirements.lock -e '.[bench]'
	$(VENV)/python benchmarks/wrapper.py
	$(VENV)/python benchmarks/concurrency.py
	$(VENV)/python benchmarks/serving.py
	$(VENV)/python benchmarks/classroom.py

soak: setup ## put 8 clients on the OpenAI endpoint for MINUTES (30) and look for wrong answers and growth
	$(VENV)/python benchmarks/soak.py --minutes $(MINUTES)

audit: setup ## look the locked packages up in a database of known vulnerabilities (needs a network)
	$(RUN) audit

rehearsal: setup ## run both flows at Phi-3-mini's true size with random weights, and measure (PARAMS="--help")
	$(VENV)/python benchmarks/rehearsal.py $(PARAMS)

lock: setup ## resolve pyproject.toml again
	$(RUN) lock

clean: ## remove what was made here, but not weights/, the runs in mlflow.db and out/student/
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis
	[ ! -d out ] || find out -mindepth 1 -maxdepth 1 ! -name student -exec rm -rf {} +
