# A thin face for `python -m helpers …`; every target sets up .venv first.
# Override on the line: make run MODEL=tiny-phi3 PARAMS="-p max_new_tokens 16" TRACKING_URI=http://127.0.0.1:5000
.DEFAULT_GOAL := help
# The first Python of a supported version; a shim that does not start is passed over.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
  $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$p && break; done)
VENV := .venv/bin
RUN := $(VENV)/python -m helpers
export PATH := $(CURDIR)/.venv/bin:$(PATH)
ifdef WEIGHTS_DIR
export WEIGHTS_DIR
endif
ifdef TORCH_BACKEND
export TORCH_BACKEND
endif

.PHONY: help setup run test lab ui serve weights notebooks bench lock clean

help: ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: ## make .venv hold what requirements.lock says
	@test -n "$(PYTHON)" || { echo "No Python 3.11, 3.12 or 3.13 found. Install one, or name it: make run PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(PYTHON) -m helpers setup

run: setup ## run both notebooks headless into out/
	$(RUN) run $(if $(MODEL),-p model '$(MODEL)') $(if $(TRACKING_URI),-p tracking_uri '$(TRACKING_URI)') $(PARAMS)

test: setup ## check the style, then run every test
	$(VENV)/ruff check . && $(VENV)/ruff format --check .
	$(VENV)/pytest --nbmake --nbmake-timeout=900 tests notebooks

lab: setup ## open the notebooks in JupyterLab
	$(VENV)/jupyter lab notebooks/01_TransformerPipeline.ipynb

ui: setup ## look at runs, models and traces in MLflow's UI
	$(VENV)/mlflow ui --backend-store-uri $(or $(TRACKING_URI),sqlite:///$(CURDIR)/mlflow.db) --host 127.0.0.1

serve: setup ## put an OpenAI endpoint before the champion, at http://127.0.0.1:8000/v1
	$(RUN) serve $(if $(TRACKING_URI),--tracking-uri '$(TRACKING_URI)') $(if $(MODEL),--model '$(MODEL)') $(PARAMS)

weights: setup ## fetch and convert the model, so that everything else runs offline
	$(RUN) fetch $(MODEL)

notebooks: setup ## execute the notebooks and save them with their outputs
	$(RUN) save

bench: setup ## measure the wrapper against its peers, and the servers (compiles llama.cpp once; 20 minutes)
	$(VENV)/uv pip install --python $(VENV)/python -c requirements.lock -e '.[bench]'
	$(VENV)/python benchmarks/wrapper.py
	$(VENV)/python benchmarks/concurrency.py
	$(VENV)/python benchmarks/serving.py

lock: setup ## resolve pyproject.toml again
	$(RUN) lock

clean: ## remove what was made here, but neither weights/ nor the runs in mlflow.db
	rm -rf .venv out .pytest_cache .ruff_cache .hypothesis
