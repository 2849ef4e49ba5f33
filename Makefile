# Everything happens in a virtual environment in .venv; a second call is quick.
#
#   make demo     normalise Pendulum-v1, side by side with torchrl's VecNorm
#   make test     run the tests (make test TESTS="tests/test_ops.py -k opcheck")
#   make bench    time it against copy_ and torchrl, into bench/results/
#   make build    compile what has changed
#   make lint     check style; make format mends it
#   make clean    remove what was built, and the virtual environment

PYTHON ?= python3
VENV ?= .venv
TESTS ?= tests

bin := $(VENV)/bin
cxx := $(shell find csrc -name '*.h' -o -name '*.inl' -o -name '*.cpp' -o -name '*.cu' \
	-o -name '*.cuh')

.PHONY: demo test bench build lint format clean

demo: build
	$(bin)/python examples/pendulum.py

test: build
	$(bin)/python -m pytest $(TESTS)

bench: build
	$(bin)/python bench/compare.py

build: $(VENV)/built

lint: $(VENV)/installed
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/clang-format --dry-run --Werror $(cxx) tests/cuda_host/*

format: $(VENV)/installed
	$(bin)/ruff check --fix .
	$(bin)/ruff format .
	$(bin)/clang-format -i $(cxx) tests/cuda_host/*

clean:
	rm -rf $(VENV) build dist demo-output *.egg-info torchrl_vecnorm/_build.py
	rm -f torchrl_vecnorm/*.so

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(bin)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

# An editable install, so that Python changes need no build; setup.py keeps its object
# files in build/, so that C++ changes compile only what they touch.
$(VENV)/built: $(VENV)/installed setup.py pyproject.toml $(cxx)
	$(bin)/python setup.py --quiet build_ext --inplace
	$(bin)/python -m pip install --quiet --disable-pip-version-check \
		--no-build-isolation --no-deps --editable .
	touch $@
