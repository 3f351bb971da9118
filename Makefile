# make demo: an environment, three phases on embedded stories, then both backends compared.
# make test: an environment, then the checks and the tests.
# make check: the checks and the fast tests, in a minute.
# make docs: the site, into site/.
# make fuzz: wrong files and options for every reader, for ten minutes.

VENV ?= .venv
NEW_ENOUGH := -c 'import sys; sys.exit(sys.version_info < (3, 11))'
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p $(NEW_ENOUGH) 2>/dev/null && echo $$p && break; done)
BIN := $(VENV)/bin
FUZZ_SECONDS ?= 600
RUN ?= runs/demo-$(shell date +%Y%m%d-%H%M%S)

.PHONY: demo test check lint docs fuzz clean

demo: $(VENV)/ready
	$(BIN)/mlxmoe train --phases 3 --preset demo --out $(RUN)
	$(BIN)/mlxmoe parity $(RUN)

test: lint
	$(BIN)/pytest -n 2

check: lint
	$(BIN)/pytest -n 2 -m "not slow and not gpu"

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest --noconftest -n 0 tests/test_english.py

docs: $(VENV)/ready-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

fuzz: $(VENV)/ready
	$(BIN)/python tests/faults/fuzz.py --seconds $(FUZZ_SECONDS)

clean:
	rm -rf $(VENV) build site *.egg-info

# On Linux, MLX needs a fast BLAS from the system; without the right to install one it still works, slowly.
$(VENV)/ready: pyproject.toml constraints.txt
	@$(or $(PYTHON),false) $(NEW_ENOUGH) || \
		{ echo "error: no Python 3.11 or later found; make PYTHON=/path/to/python3.11"; exit 2; }
	@if [ "$$(uname -s)" = Linux ] && ! ldconfig -p | grep -q 'libopenblas\.so\.0'; then \
		sudo=$$([ "$$(id -u)" = 0 ] || echo "sudo -n"); \
		{ $$sudo apt-get update -qq && $$sudo apt-get install -qq -y libopenblas0-pthread g++ >/dev/null; } || \
		echo "warning: no OpenBLAS, so MLX will be slow on this CPU; install libopenblas0-pthread"; \
	fi
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e '.[all,test]'
	@touch $@

$(VENV)/ready-docs: $(VENV)/ready
	$(BIN)/pip install -q -c constraints.txt -e '.[docs]'
	@touch $@
