# Two commands: `make demo` runs the main job on real cells, `make test` passes the tests. Both make .venv when it is missing.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: venv demo test lint bench screenshots lock audit docker-check clean

venv: .venv/.ready

LOCKS := requirements.lock requirements-test.lock
INSTALL := $(BIN)/python -m pip install -q
.venv/.ready: pyproject.toml $(LOCKS) requirements-build.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { echo "Python 3.11 is needed; found $$($(PYTHON) --version). Run: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@# Everything by its hash, but for torch, whose builds for CPU and CUDA differ: at its exact version, after all that it asks for.
	$(INSTALL) --require-hashes --no-deps -r requirements-build.lock
	$(INSTALL) --require-hashes --no-deps --no-build-isolation $(addprefix -r ,$(LOCKS))
	$(INSTALL) torch==2.13.0
	$(INSTALL) --no-deps --no-build-isolation -e .
	@$(BIN)/python -m pip check > /dev/null || { $(BIN)/python -m pip check; exit 1; }
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

# The pictures of docs/images, by headless Chromium, of a run of their own. Look at them before they are committed.
screenshots: venv
	$(BIN)/python docs/screenshots/take.py

# The lock files, from what is installed here. To move a version: change it in pyproject.toml, then run this.
EXTRAS := test,hvg,interpret,docker,kubernetes,servers
UV := uv==0.13.8
lock:
	$(INSTALL) -e '.[$(EXTRAS)]'
	@place=$$(mktemp -d) && trap 'rm -rf "$$place"' EXIT && $(INSTALL) --target "$$place" $(UV) && $(BIN)/python .ci/lock.py "$$place/bin/uv"

# Known vulnerabilities of what is locked. It asks a database over the network.
AUDIT := pip-audit==2.10.1
audit:
	@place=$$(mktemp -d) && trap 'rm -rf "$$place"' EXIT && $(PYTHON) -m venv "$$place" && { "$$place/bin/python" -m pip install -q $(AUDIT) \
	|| { echo "make audit needs a network, and got no $(AUDIT). Run it where there is one: the lock files are all that it reads"; exit 1; }; } \
	&& { "$$place/bin/pip-audit" --strict --progress-spinner off --require-hashes --disable-pip $(addprefix -r ,$(LOCKS) docker/requirements.lock) \
	|| { echo "make audit: not clean. Either the table above names what to update, or pypi.org could not be asked about a package"; exit 1; }; }

# What of docker/ and deployments/ can be checked without a container engine: steps, schemas, entry points. Minutes.
docker-check: venv
	$(BIN)/python docker/check.py

clean:
	rm -rf .venv workspace workspace.state
