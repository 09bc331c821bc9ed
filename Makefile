# Every target sets itself up: it needs make and Python 3.11 or newer (with venv), nothing else.
#   make PYTHON=python3.12 test      another interpreter
#   make test ARGS="-k magics -x"    arguments for pytest, the demo or the benchmark
#   make test WORKERS=0              the tests in one process, as a debugger wants it; 2 share the CPUs otherwise

PYTHON  ?= python3
VENV    ?= .venv
ARGS    ?=
WORKERS ?= 2
BIN     := $(VENV)/bin

.PHONY: help demo test soak check format lab bench mutants kernels kernels-readme gpu clean

help:
	@echo "make demo    run examples/quickstart.ipynb with the embedded model and print the answers as they stream"
	@echo "make test    run the tests"
	@echo "make soak    many requests at once, each answered as alone: five seeds of three minutes (ARGS='--seeds 1 --seconds 30')"
	@echo "make check   lint, format check, types, generated parts of the README"
	@echo "make lab     open the quickstart in JupyterLab"
	@echo "make bench   measure the embedded model on this machine (ARGS=serve: under load)"
	@echo "make mutants break the kernels one line at a time; each has to turn a test red"
	@echo "make kernels compile the kernels for every architecture, without a GPU, and check what the code uses"
	@echo "make gpu     run the GPU tests with this host's own python3 and torch (PART=device for one file)"
	@echo "make format  fix what ruff can fix, and the generated parts of the README"

demo: $(VENV)/.demo
	MISTRAL_NB_BACKEND=local MISTRAL_NB_MODEL=embedded $(BIN)/python -m mistral_nb demo examples/quickstart.ipynb $(ARGS)

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

soak: $(VENV)/.dev
	$(BIN)/python -m tests.soak $(ARGS)

check: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python .ci/readme.py --check

format: $(VENV)/.dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/python .ci/readme.py

lab: $(VENV)/.dev
	$(BIN)/jupyter lab examples/quickstart.ipynb $(ARGS)

# Other engines are measured beside ours with the packages of the tests, of which transformers is one and matplotlib another.
bench: $(VENV)/$(if $(or $(findstring engine,$(ARGS)),$(findstring --plot,$(ARGS))),.dev,.demo)
	$(BIN)/python -m mistral_nb bench $(ARGS)

mutants: $(VENV)/.dev
	$(BIN)/python -m tests.kernels.mutants $(ARGS)

kernels: $(VENV)/.dev
	PYTHONPATH=kernels $(BIN)/python -m mistral_nb_kernels.compile_report --check kernels/README.md

kernels-readme: $(VENV)/.dev
	PYTHONPATH=kernels $(BIN)/python -m mistral_nb_kernels.compile_report --write kernels/README.md

# Nothing is installed: a GPU host brings python3, torch, triton and pytest, and the source roots are put on the path.
gpu:
	@$(PYTHON) -c 'import importlib.util as u, sys; u.find_spec("torch") and u.find_spec("pytest") or sys.exit( \
	    "make gpu: " + sys.executable + " has no torch or no pytest: make gpu PYTHON=... names one that has both"); \
	    import torch; torch.cuda.is_available() or sys.exit("make gpu: torch sees no NVIDIA GPU on this machine")'
	PYTHONPATH=.:kernels:magics $(PYTHON) -m pytest -m gpu tests/gpu/$(if $(PART),test_$(PART).py) $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else \
	    "mistral-nb needs Python 3.11 or newer, this is " + sys.version.split()[0] + ": make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.demo: $(VENV)/.python pyproject.toml constraints.txt
	@echo "Installing mistral-nb and what it needs into $(VENV): a few minutes, once"
	$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[local,demo]'
	@touch $@

$(VENV)/.dev: $(VENV)/.python pyproject.toml constraints.txt
	@echo "Installing mistral-nb and what it needs into $(VENV): a few minutes, once"
	$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[local,dev]'
	@touch $(VENV)/.demo $@
