# A thin face for `python -m helpers …`; every target that needs packages sets up .venv first.
# Override on the line: make run MODEL=tiny-phi3 PARAMS="-p max_new_tokens 16" TRACKING_URI=http://127.0.0.1:5000
.DEFAULT_GOAL := help
# .venv's own Python, or else the first of a supported version; one that does not start is passed over.
OUTSIDE := $(PATH)
PYTHON ?= $(shell PATH='$(OUTSIDE)'; for p in .venv/bin/python python3 python3.13 python3.12 python3.11; do \
  p=$$(command -v $$p) && $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null \
  && echo $$p && break; done)
VENV := .venv/bin
NOTEBOOK ?= notebooks/01_TransformerPipeline.ipynb
RUN := $(VENV)/python -m helpers
export PATH := $(CURDIR)/.venv/bin:$(PATH)
# As in helpers/__init__.py, for what is started without it, such as `make ui`; a value of your own stays.
MLFLOW_DISABLE_TELEMETRY ?= true
DO_NOT_TRACK ?= true
export MLFLOW_DISABLE_TELEMETRY DO_NOT_TRACK
# What is given on the line reaches a command through the environment and is read there as "$$MODEL": it never
# becomes a part of the command, and $(value …) keeps make from expanding it. A quote or $(…) in it stays text.
GIVEN := MODEL TRACKING_URI PARAMS PORT MINUTES WEIGHTS_DIR TORCH_BACKEND WHEELHOUSE NOTEBOOK
$(foreach name,$(GIVEN),$(if $(filter-out undefined,$(origin $(name))),\
  $(eval override $(name) := $$(value $(name)))$(eval export $(name))))

STYLE := $(VENV)/ruff check . && $(VENV)/ruff format --check .
# tests/reasons.py calls a test slow; --durations and out/tests-*.xml say where the time goes.
PYTEST := $(VENV)/pytest --durations=20 --durations-min=1
FAST := $(PYTEST) -m "not slow" --junitxml=out/tests-fast.xml --nbmake --nbmake-timeout=900 tests notebooks
SLOW := $(PYTEST) -m slow --junitxml=out/tests-slow.xml tests

.PHONY: help python doctor setup run test test-slow test-all lab ui serve weights wheelhouse notebooks bench \
  rehearsal lock clean test-browser classroom student site soak audit

help: ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

python:
	@test -n "$(PYTHON)" || { echo "No Python 3.11, 3.12 or 3.13 found. Install one, or name it: make run PYTHON=/path/to/python3.12" >&2; exit 1; }

doctor: python ## say what is here and what is missing, before or after set-up
	@$(PYTHON) -m helpers doctor $${MODEL:+--model="$$MODEL"} $${TRACKING_URI:+--tracking-uri="$$TRACKING_URI"}

setup: python ## make .venv hold what requirements.lock says
	@$(PYTHON) -m helpers setup

run: setup ## run both notebooks headless into out/
	$(RUN) run $${MODEL:+-p model "$$MODEL"} $${TRACKING_URI:+-p tracking_uri "$$TRACKING_URI"} --words "$$PARAMS"

test: setup ## check the style, run both notebooks and the quick tests (under ten minutes)
	$(STYLE)
	$(FAST)
	@echo "Left out, for they take half an hour: attempts at exercises, browser, classroom, container, environment,"
	@echo "faults, most of kernel, models and server, network, soak and spark. To run them: make test-slow"

test-slow: setup ## run the tests that make test leaves out (half an hour)
	$(SLOW)

test-all: setup ## run all that make test and make test-slow run
	$(STYLE)
	$(FAST); fast=$$?; $(SLOW) && exit $$fast

test-browser: setup ## look at JupyterLab, MLflow's pages and the site in a real browser (fetches one where none is)
	@for name in chromium chromium-browser google-chrome; do command -v $$name >/dev/null && exit 0; done; \
	  $(VENV)/playwright install chromium || echo "No browser could be installed; the tests will be skipped."
	$(VENV)/pytest tests/e2e

lab: setup ## open the notebooks in JupyterLab
	JUPYTER_CONFIG_PATH="$$PWD/.jupyter" $(VENV)/jupyter lab "$$NOTEBOOK" $$PARAMS

ui: setup ## look at runs, models and traces in MLflow's UI
	@uri="$${TRACKING_URI:-sqlite:///$$(printf %s "$$PWD" | sed 's/%/%25/g; s/?/%3F/g')/mlflow.db}"; \
	  case "$$uri" in postgresql:*) uri="postgresql+psycopg2:$${uri#postgresql:}";; esac; \
	  MLFLOW_BACKEND_STORE_URI="$$uri" $(VENV)/mlflow ui --host 127.0.0.1 --port "$${PORT:-5000}"

serve: setup ## put an OpenAI endpoint before the champion, at http://127.0.0.1:8000/v1
	$(RUN) serve $${TRACKING_URI:+--tracking-uri="$$TRACKING_URI"} $${MODEL:+--model="$$MODEL"} --words "$$PARAMS"

classroom: setup ## serve one MLflow for a room, on PostgreSQL (installs it where it is missing)
	$(RUN) classroom --words "$$PARAMS"

weights: setup ## fetch and convert the model, so that everything else runs offline
	$(RUN) fetch $${MODEL:+-- "$$MODEL"}

wheelhouse: setup ## gather all locked wheels: make run WHEELHOUSE=wheelhouse then needs no network
	$(RUN) wheelhouse

site: setup ## write notebooks and guides as a static site to out/site
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
	$(VENV)/python benchmarks/soak.py --minutes "$${MINUTES:-30}"

audit: setup ## look the locked packages up in a database of known vulnerabilities (needs a network)
	$(RUN) audit

rehearsal: setup ## run both flows at Phi-3-mini's true size with random weights, and measure (PARAMS="--help")
	$(VENV)/python benchmarks/rehearsal.py $$PARAMS

lock: setup ## resolve pyproject.toml again
	$(RUN) lock

clean: ## remove what was made here, but not weights/, the runs in mlflow.db and out/student/
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis
	[ ! -d out ] || find out -mindepth 1 -maxdepth 1 ! -name student -exec rm -rf {} +
