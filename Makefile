# make demo, make test: each sets up all it needs in its own .venv.
# Settings: PYTHON=python3.12  VENV=.venv  STACK=openmmlab|onedl  JOBS=2  SEED=0
PYTHON ?= python3
STACK ?= openmmlab
VENV ?= .venv$(if $(filter onedl,$(STACK)),-onedl)
JOBS ?= 2
SEED ?= 0

BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Every package, those that others bring along as well: see `make lock`.
LOCK := requirements/lock-$(STACK).txt
PIP := $(BIN)/python -m pip install --disable-pip-version-check \
	--constraint $(LOCK)
RELEASE := .venv-release/bin

export OMP_NUM_THREADS ?= 1
# Neither stack's mmcv is compiled here: mmkd brings what mmdet calls.
export MMCV_WITH_OPS := 0

.PHONY: demo test test-slow test-all soak zoo lint format docs lock audit setup clean
.DEFAULT_GOAL := help

help:
	@echo 'make demo       teacher, student alone, student distilled, compared'
	@echo 'make test       the tests (minutes)'
	@echo 'make test-slow  the long ones as well'
	@echo 'make test-all   every tiny config on three seeds (an hour)'
	@echo 'make soak       kills, floods, wrong configs and long runs (an hour or two)'
	@echo "make zoo        every detector of mmdet's zoo, two steps (an hour)"
	@echo 'make lint       ruff, as the commit hook runs it'
	@echo 'make docs       the generated pages and tables'
	@echo 'make lock       the locks in requirements/ anew, from constraints*.txt'
	@echo 'make audit      known weaknesses of what the locks name'
	@echo 'make clean      removes $(VENV) and what the demo made'

setup: $(READY)

$(READY): setup.py requirements/torch.txt $(LOCK)
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; \
	    sys.exit(None if (3, 10) <= v <= (3, 13) else \
	    f"mmkd needs Python 3.10 to 3.13, {sys.executable} is " \
	    f"{v[0]}.{v[1]}. Name another: make PYTHON=python3.12 $(MAKECMDGOALS)")'
	@echo 'Setting up $(VENV) (torch brings some gigabytes; minutes) ...'
	@test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	@$(PIP) --quiet --upgrade pip wheel
	@$(PIP) --quiet --requirement requirements/torch.txt
	@# Isolated: onedl-mmcv compiles its operators where it sees a torch.
	@$(PIP) --quiet --build-constraint $(LOCK) '.[$(STACK),demo,test]'
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
	$(BIN)/python -m pytest -m soak

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

.venv-release/.ready: requirements/release.txt
	@test -d .venv-release || $(PYTHON) -m venv .venv-release
	@$(RELEASE)/python -m pip install --quiet --disable-pip-version-check \
	    --requirement requirements/release.txt
	@touch $@

# No hashes: pip wants all or none, and torch's wheels for the CPU or for
# other CUDA come from indices of their own.
lock: .venv-release/.ready
	@for stack in openmmlab onedl; do \
	    $(RELEASE)/uv pip compile --universal --python-version 3.10 --quiet \
	        --no-annotate --no-emit-index-url --upgrade \
	        --custom-compile-command 'make lock' \
	        --constraint requirements/constraints.txt \
	        --constraint requirements/constraints-$$stack.txt \
	        --extra $$stack --extra demo --extra test \
	        requirements/build.txt requirements/torch.txt setup.py \
	        --output-file requirements/lock-$$stack.txt || exit 1; \
	done

audit: .venv-release/.ready
	@PATH=$(RELEASE):$$PATH $(PYTHON) tools/audit.py

clean:
	rm -rf $(VENV) work_dirs/demo data/trees
