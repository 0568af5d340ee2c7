# Needs Python 3.10 or newer and nothing else; the environment is made once and reused.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY_TO_RUN := $(VENV)/.ready-to-run
READY_TO_TEST := $(VENV)/.ready-to-test
READY_TO_DOCUMENT := $(VENV)/.ready-to-document
BENCHMARKS := $(notdir $(basename $(wildcard benchmarks/experiments/*.yaml benchmarks/[a-z]*.py)))
export OMP_WAIT_POLICY := PASSIVE
export MANTICORE_SCREENSHOTS ?= $(CURDIR)/build/screenshots

.PHONY: demo test wheel docs readme lint format bench bench-speed clean

$(READY_TO_RUN): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed" if sys.version_info < (3, 10) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[train]'
	touch $(READY_TO_RUN)

$(READY_TO_TEST): $(READY_TO_RUN)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $(READY_TO_TEST)

$(READY_TO_DOCUMENT): $(READY_TO_RUN)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	touch $(READY_TO_DOCUMENT)

demo: $(READY_TO_RUN)
	$(BIN)/manticore demo

test: $(READY_TO_TEST)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow and not cuda"

wheel: $(READY_TO_RUN)
	rm -f dist/*.whl
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	@ls dist/*.whl

# The parts of README.md that are made from benchmarks/results, RESULTS.md, pyproject.toml and the commands.
readme: $(READY_TO_RUN)
	$(BIN)/python docs/fill_readme.py

# Strict: a broken link or anchor, a name that is not there or a page out of the navigation is an error.
docs: $(READY_TO_DOCUMENT)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "build/site/index.html"

lint: $(READY_TO_TEST)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY_TO_TEST)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# All benchmark scripts, or with NAME one experiment (benchmarks/experiments/NAME.yaml) or script (benchmarks/NAME.py).
bench: $(READY_TO_TEST)
ifdef NAME
	@test -f benchmarks/experiments/$(NAME).yaml -o -f benchmarks/$(NAME).py \
		|| { echo "NAME: got $(NAME), allowed are $(sort $(BENCHMARKS))" >&2; exit 2; }
	if test -f benchmarks/experiments/$(NAME).yaml; then \
		$(BIN)/manticore experiment benchmarks/experiments/$(NAME).yaml && $(BIN)/manticore report; \
	else $(BIN)/python benchmarks/$(NAME).py; fi
else
	for script in benchmarks/[a-z]*.py; do $(BIN)/python $$script || exit 1; done
endif

# Speed and memory against native models; ARGS are options of benchmarks/speed.py, as ARGS="--shapes tiny --resume".
bench-speed: $(READY_TO_TEST)
	$(BIN)/python benchmarks/speed.py $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info
