# Two commands: `make demo` runs the main job on real cells, `make test` passes the tests. Both make .venv when it is missing.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: venv demo test lint bench lock clean

venv: .venv/.ready

.venv/.ready: pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { echo "Python 3.11 is needed; found $$($(PYTHON) --version). Run: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@# torch first and at its exact version: a range would pull another build.
	$(BIN)/python -m pip install -q torch==2.13.0
	$(BIN)/python -m pip install -q -e '.[test]' -c requirements.lock
	@touch $@

# Settings can be added: make demo ARGS="task.max_steps=50"
demo: venv
	@$(BIN)/bmfm run zheng68k-mini $(ARGS)

lint: venv
	$(BIN)/ruff check -q .
	$(BIN)/ruff format -q --check .
	$(BIN)/lint-imports --no-cache > /dev/null || { $(BIN)/lint-imports --no-cache; exit 1; }

# Processes that run tests side by side: much of the suite waits for servers. A server is started once, a module runs in one process.
TEST_PROCESSES ?= 2
test: lint
	$(BIN)/python -m pytest -q -n $(TEST_PROCESSES) --dist loadscope --no-loadscope-reorder

bench: venv
	@for script in $(filter-out %/measuring.py %/processed.py,$(wildcard benchmarks/*.py)); do $(BIN)/python $$script || exit 1; done

# Transitive versions, without torch: its CPU and CUDA builds carry different local versions.
lock: venv
	$(BIN)/python -m pip freeze --exclude-editable --exclude torch --exclude bmfm-pipeline | grep -v -i -E '^(nvidia|triton|cuda)' > requirements.lock

clean:
	rm -rf .venv workspace workspace.state
