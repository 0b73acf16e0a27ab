# make demo, make test: each sets up all it needs in its own .venv.
# Settings: PYTHON=python3.12  VENV=.venv  STACK=openmmlab|onedl  JOBS=2  SEED=0
PYTHON ?= python3
STACK ?= openmmlab
VENV ?= .venv$(if $(filter onedl,$(STACK)),-onedl)
JOBS ?= 2
SEED ?= 0

BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip install --disable-pip-version-check \
	--constraint requirements/constraints.txt

export OMP_NUM_THREADS ?= 1
# Neither stack's mmcv is compiled here: mmkd brings what mmdet calls.
export MMCV_WITH_OPS := 0

.PHONY: demo test test-slow test-all soak zoo lint format docs setup clean
.DEFAULT_GOAL := help

help:
	@echo 'make demo       teacher, student alone, student distilled, compared'
	@echo 'make test       the tests (minutes)'
	@echo 'make test-slow  the long ones as well'
	@echo 'make test-all   every tiny config on three seeds (an hour)'
	@echo "make zoo        every detector of mmdet's zoo, two steps (an hour)"
	@echo 'make lint       ruff, as the commit hook runs it'
	@echo 'make docs       the generated pages and tables'
	@echo 'make clean      removes $(VENV) and what the demo made'

setup: $(READY)

$(READY): setup.py requirements/torch.txt requirements/constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; \
	    sys.exit(None if (3, 10) <= v <= (3, 13) else \
	    f"mmkd needs Python 3.10 to 3.13, {sys.executable} is " \
	    f"{v[0]}.{v[1]}. Name another: make PYTHON=python3.12 $(MAKECMDGOALS)")'
	@echo 'Setting up $(VENV) (torch brings some gigabytes; minutes) ...'
	@test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	@$(PIP) --quiet --upgrade pip wheel
	@$(PIP) --quiet --requirement requirements/torch.txt
	@# Isolated: onedl-mmcv compiles its operators where it sees a torch.
	@$(PIP) --quiet '.[$(STACK),demo,test]'
	@$(PIP) --quiet --no-build-isolation --no-deps --editable .
	@# The headless build needs no libGL, which servers often lack.
	@version=$$($(BIN)/python -m pip show opencv-python 2>/dev/null \
	    | sed -n 's/^Version: //p'); \
	if [ -n "$$version" ]; then \
	    $(BIN)/python -m pip uninstall --quiet --yes opencv-python && \
	    $(PIP) --quiet --force-reinstall --no-deps \
	        opencv-python-headless==$$version; \
	fi
	@$(BIN)/python -c 'import mmkd, mmdet, cv2'
	@touch $@

demo: $(READY)
	@$(BIN)/python demo/demo.py --seed $(SEED)

test: $(READY)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadgroup

test-slow: $(READY)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadgroup -m slow

test-all: $(READY)
	$(BIN)/python tools/test_all.py --jobs $(JOBS)

soak: $(READY)
	$(BIN)/python -m pytest -m soak -rP

zoo: $(READY)
	$(BIN)/python tools/check_zoo.py --jobs $(JOBS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY)
	$(BIN)/python tools/make_docs.py

clean:
	rm -rf $(VENV) work_dirs/demo data/trees
