# `make help` lists what can be made. Variables: PYTHON (which Python makes .venv), PIP_ARGS (for pip install), ARGS (for pytest),
# N (how many chaos runs, or fuzz inputs).
PYTHON ?= python3
PIP_ARGS ?=
ARGS ?=

BIN := .venv/bin
INPUTS := pyproject.toml setup.py constraints.txt $(wildcard protos/gptfl/*/*.proto)
# A stamp says that .venv holds what INPUTS asked for when it was written. That of dev covers demo.
DEMO := .venv/.installed-demo
DEV := .venv/.installed-dev

.DEFAULT_GOAL := help
.PHONY: help demo test chaos fuzz lint wheel clean
.DELETE_ON_ERROR:

help:  ## list the targets
	@grep -E '^[a-z]+: .*##|^[a-z]+:  ##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/make \1|\2/' | awk -F'|' '{printf "  %-12s %s\n", $$1, $$2}'

demo: $(DEMO)  ## install into .venv what the demo needs, then run it (report in runs/demo/)
	$(BIN)/gptfl demo

test: $(DEV)  ## install into .venv what the tests need, then run them all (ARGS="tests/config -x" runs some)
	$(BIN)/python -m pytest $(ARGS)

chaos: $(DEV)  ## N federations of ten rounds, each killed and cut off three times or more; prints kills by state (N=200)
	$(BIN)/python tests/chaos/chaos_runs.py --runs $(or $(N),200)

fuzz: $(DEV)  ## N malformed inputs for everything that reads a peer's bytes, under a limit of memory (N=1000000)
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt -e '.[fuzz]'
	$(BIN)/python tests/fuzz/fuzz.py --inputs $(or $(N),1000000)

lint: $(DEV)  ## ruff check, ruff format --check, mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict gptfl_dist

wheel: $(DEV)  ## build the sdist and, from it, the wheel, into dist/
	rm -rf build dist
	$(BIN)/python -m build --outdir dist .

clean:  ## remove what was built and generated (keeps .venv and runs/)
	rm -rf build dist ./*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis $(DEMO) $(DEV)
	find gptfl_dist \( -name '*_pb2.py' -o -name '*_pb2.pyi' \) -delete
	find gptfl_dist tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "$(PYTHON) is missing or not Python 3.11 to 3.13: name one, such as make demo PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv .venv || { rm -rf .venv; echo "on Debian, venv is in the package python3-venv" >&2; exit 1; }

$(DEMO): $(INPUTS) | $(BIN)/python
	@$(announce)
	$(BIN)/python -m pip install $(PIP_ARGS) -c constraints.txt -e '.[demo,mpi]'
	@touch $@

$(DEV): $(INPUTS) | $(BIN)/python
	@$(announce)
	$(BIN)/python -m pip install $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	@touch $(DEMO) $@

# Said only where torch would be downloaded.
define announce
if [ "$$(uname -s)" = Linux ] && ! $(BIN)/python -c 'import importlib.util as u, sys; sys.exit(not u.find_spec("torch"))'; then \
  echo "Installing into .venv. On Linux, pip's plain torch is a CUDA build: a download of several GB."; \
  echo "Without a GPU, stop here (Ctrl-C) and take the CPU build: the PyTorch site's 'Get Started' page shows its index;"; \
  echo "  make $(firstword $(MAKECMDGOALS)) PIP_ARGS=\"--extra-index-url THAT_INDEX\""; \
fi
endef
