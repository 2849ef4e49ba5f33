# Everything happens in a virtual environment in .venv; a second call is quick.
#
#   make demo     normalise Pendulum-v1, side by side with torchrl's VecNorm
#   make test     run the quick tests, minutes (make test TESTS="tests/test_ops.py -k opcheck"
#                 runs what it names, quick or slow)
#   make test-all run all tests, with all that they can be told to try
#   make bench    measure it against copy_ and other normalisers, into bench/results/
#                 (make bench BENCH="--quick" for a couple of minutes)
#   make cuda-torch  build against a CUDA build of torch, and test that build on the CPU (five
#                 gigabytes to download, no GPU needed)
#   make matrix   build and test with each torch from 2.7.1 on, alone (MATRIX=2.7.1 for one;
#                 five gigabytes each)
#   make model    print what an update should take on GPUs, by a model of the kernels
#   make sanitize run tests of the compiled code under AddressSanitizer and UBSan
#   make coverage which lines of Python and C++ the tests do not run
#   make soak     kill workers that share statistics, KILLS of them (100,000: twenty minutes),
#                 then ten million updates by 16 of them
#   make interop  what stands for the normalisers of skrl, rsl_rl, rl_games, Stable-Baselines3 and
#                 Gymnasium, tested and measured beside them, and statistics carried between these
#                 and a dozen others, in environments in build/ (two gigabytes, with jax, ray and mjlab)
#   make docs     the documentation, into build/docs/
#   make build    compile what has changed
#   make wheel    a wheel for the PyTorch that is here, into dist/
#   make lint     check style, and types as users see them; make format mends the style
#   make clean    remove what was built, and the virtual environment
#
# and one thing happens outside of it, with the interpreter PYTHON and no network:
#
#   make gpu-check  on a machine with a CUDA GPU: build, test, sanitize and measure

SHELL := bash
.SHELLFLAGS := -o pipefail -c
PYTHON ?= python3
VENV ?= .venv
TESTS ?= tests -m "not slow"
PARALLEL ?= -n 2 --dist worksteal
BENCH ?=
KILLS ?= 100000
MATRIX ?=
SANITIZED ?= $(addprefix tests/test_,ops.py bound.py rule.py returns.py state.py machine.py \
	sharing.py survival.py) -m "not slow" -k "not spawn"
COVERED ?= $(filter-out tests/test_bench.py tests/test_long_run.py \
	tests/test_examples.py tests/test_docs.py %_host.py,$(wildcard tests/test_*.py)) --mutations 5000

bin := $(VENV)/bin
cxx := $(shell find csrc -name '*.h' -o -name '*.inl' -o -name '*.cpp' -o -name '*.cu' \
	-o -name '*.cuh')
checks := tests/cases.h tests/returns_cases.h bench/plan.cpp $(wildcard tests/*_host/*)

# Compilers are called with a screen of flags; which file it is, and how many there are, is
# what one wants to see.
files_alone := awk 'length > 200 && / -c / { match($$0, /-c [^- ][^ ]*/); \
	file = substr($$0, RSTART + 3, RLENGTH - 3); sub(/.*\/csrc\//, "csrc/", file); \
	print "compiled", (/^\[/ ? $$1 : ""), file; fflush(); next } \
	length > 200 && / -shared / { next } { print; fflush() }'

.PHONY: demo test test-all interop bench soak model matrix cuda-torch sanitize sanitized \
	sanitizers coverage gpu-check docs build wheel lint format clean

demo: build
	$(bin)/python examples/pendulum.py

test: build $(VENV)/tools
	PYTHONHASHSEED=0 $(bin)/python -m pytest $(PARALLEL) $(TESTS)

test-all: build $(VENV)/tools
	PYTHONHASHSEED=0 $(bin)/python -m pytest $(PARALLEL) tests --all-architectures --mutations 4000

bench: build $(VENV)/peers
	$(bin)/python -m bench.run $(BENCH)

model: $(VENV)/installed
	$(bin)/python -m bench.model

matrix:
	$(PYTHON) -m bench.matrix $(MATRIX)

soak: build $(VENV)/tools build/soak
	build/soak cost
	build/soak soak $(KILLS)
	$(bin)/python -m pytest tests/test_sharing.py -k "is_lost and fork-shared" \
		--workers 16 --updates 625000

# With setuptools as that torch wants them. The source is a copy: the builds have one name.
CUDA_TORCH ?= torch===2.11.0
CUDA_TORCH_TESTS ?= tests/test_ops.py tests/test_bound.py
cuda-torch: build/cuda-torch/installed
	rm -rf build/cuda-torch/source build/cuda-torch/tests
	mkdir -p build/cuda-torch/source
	cp -r csrc torchrl_vecnorm setup.py pyproject.toml README.md LICENSE build/cuda-torch/source
	rm -f build/cuda-torch/source/torchrl_vecnorm/*.so
	cd build/cuda-torch/source && env -u FORCE_CUDA ../bin/python setup.py --quiet \
		build_ext --inplace --build-temp ../objects
	cp -r tests build/cuda-torch/source
	cd build/cuda-torch/source && ../bin/python -c "import torch; \
		from torchrl_vecnorm import _C, _build; \
		assert torch.version.cuda and _build.has_cuda and hasattr(_C, 'cuda_path')" && \
		../bin/python -m pytest --quiet -p no:cacheprovider -m "not slow" $(CUDA_TORCH_TESTS)

build/cuda-torch/installed: requirements.txt tests/requirements.txt
	$(PYTHON) -m venv build/cuda-torch
	grep -v '^torch==\|^setuptools==' requirements.txt > build/cuda-torch/requirements.txt
	build/cuda-torch/bin/python -m pip install --quiet --disable-pip-version-check \
		"$(CUDA_TORCH)" "setuptools>=77,<82" -r build/cuda-torch/requirements.txt \
		-r tests/requirements.txt
	touch $@

# The extension once more, with flags $(2), in a package of its own in build/$(1). The
# `pytest` program, unlike `python -m pytest`, does not look for packages right here.
define instrumented
	mkdir -p build/$(1)/torchrl_vecnorm
	ln -sfn $(CURDIR)/torchrl_vecnorm/*.py $(CURDIR)/torchrl_vecnorm/*/ \
		build/$(1)/torchrl_vecnorm
	rm build/$(1)/torchrl_vecnorm/_build.py
	DEBUG=1 CFLAGS="$(2)" LDFLAGS="$(2)" $(bin)/python setup.py --quiet build_ext \
		--build-temp build/$(1)/objects --build-lib build/$(1)
endef

# Shared statistics have record locks here, and robust mutexes in the other tests.
sanitizers := -fsanitize=address -fsanitize=undefined -fno-sanitize=vptr \
	-fno-sanitize-recover=all -DVECNORM_RECORD_LOCK

sanitize: build $(VENV)/tools
	$(call instrumented,sanitized,$(sanitizers))
	$(MAKE) sanitized PACKAGES=build/sanitized

# With a package in the folder PACKAGES that was compiled with what `make sanitizers` prints.
# The interpreter and torch leak what they keep until the end: that is not looked at.
sanitized: $(VENV)/tools
	libraries=$$($(CXX) -print-file-name=libasan.so):$$($(CXX) -print-file-name=libstdc++.so); \
	PYTHONPATH=$(PACKAGES) ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD=$$libraries PYTHONHASHSEED=0 \
		$(bin)/pytest $(PARALLEL) --capture=sys --sanitized $(PACKAGES) --updates 400 $(SANITIZED)

sanitizers:
	@echo $(sanitizers)

coverage: build $(VENV)/tools
	$(call instrumented,coverage,--coverage)
	find build/coverage -name '*.gcda' -delete
	PYTHONPATH=build/coverage $(bin)/coverage run $(bin)/pytest $(COVERED)
	for instructions in default avx2; do \
		ATEN_CPU_CAPABILITY=$$instructions PYTHONPATH=build/coverage \
			$(bin)/pytest --quiet tests/test_ops.py tests/test_bound.py -k "not inductor" || exit; \
	done
	$(bin)/coverage combine --quiet
	$(bin)/coverage report
	$(bin)/gcovr --merge-lines --filter csrc/ --object-directory build/coverage/objects build/coverage

# An environment in $(1) that sees the packages of .venv.
define environment
	rm -rf $(1)
	$(PYTHON) -m venv $(1)
	packages='import site; print(site.getsitepackages()[0])'; \
		$(bin)/python -c "$$packages" \
		> "$$($(1)/bin/python -c "$$packages")/packages.pth"
endef

# The libraries see the packages of .venv, torch among them, but not the editable one. With
# the last rsl_rl twice: mjlab wants the one before. Ray is aside: torchrl imports all of it
# where it finds it.
interop: build $(VENV)/tools build/interop/installed build/mjlab/installed
	build/interop/bin/python -m pytest $(PARALLEL) tests/interop
	PYTHONPATH=build/interop/rsl-rl-5.4.2 build/interop/bin/python -m pytest $(PARALLEL) \
		tests/interop/test_rsl_rl.py
	build/mjlab/bin/python -m pytest tests/interop/test_mjlab.py
	build/interop/bin/python -m bench.interop
	build/interop/bin/python -m bench.ranks

build/interop/installed: $(VENV)/tools tests/interop/requirements.txt tests/interop/large.txt
	@echo "installing skrl, rsl_rl, rl_games, Stable-Baselines3 and others into build/interop"
	$(call environment,build/interop)
	build/interop/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
		-r tests/interop/requirements.txt -r tests/interop/large.txt
	build/interop/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
		--target build/interop/rsl-rl-5.4.2 rsl-rl-lib==5.4.2
	build/interop/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
		--target build/interop/aside ray==2.60.0
	touch $@

# mjlab with all that it wants, but for torch: that of .venv. Without a word about that its
# rsl_rl would have the newest torchvision, and with it another torch.
build/mjlab/installed: $(VENV)/tools pyproject.toml
	@echo "installing mjlab into build/mjlab"
	$(call environment,build/mjlab)
	build/mjlab/bin/python -m pip install --quiet --disable-pip-version-check mjlab==1.6.0 \
		$$(grep '^torch==' requirements.txt)
	touch $@

build/soak: tests/shared_host/check.cpp $(wildcard csrc/shared/*)
	mkdir -p build
	$(CXX) -std=c++17 -O2 -pthread -I. -Icsrc/shared -o $@ tests/shared_host/check.cpp \
		$(wildcard csrc/shared/*.cpp)

docs: build $(VENV)/docs
	$(bin)/python -m sphinx --quiet --fail-on-warning --keep-going docs build/docs
	@echo "build/docs/index.html"

wheel: build
	@echo "compiling a wheel"
	$(bin)/python -m pip wheel --quiet --disable-pip-version-check --no-build-isolation \
		--no-deps --wheel-dir dist .
	@ls -sh dist/*.whl

gpu-check:
	$(PYTHON) -m bench.gpu_check

build: $(VENV)/built

lint: $(VENV)/tools
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/clang-format --dry-run --Werror $(cxx) $(checks)
	$(bin)/basedpyright --pythonpath $(bin)/python

format: $(VENV)/tools
	$(bin)/ruff check --fix .
	$(bin)/ruff format .
	$(bin)/clang-format -i $(cxx) $(checks)

clean:
	rm -rf $(VENV) build dist demo-output *.egg-info torchrl_vecnorm/_build.py
	rm -f torchrl_vecnorm/*.so

$(VENV)/installed: requirements.txt
	@echo "installing PyTorch, TorchRL and what the demo shows into $(VENV): a minute or two"
	$(PYTHON) -m venv $(VENV)
	$(bin)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/tools: $(VENV)/installed tests/requirements.txt
	@echo "installing pytest and other tools into $(VENV)"
	$(bin)/python -m pip install --quiet --disable-pip-version-check -r tests/requirements.txt
	touch $@

$(VENV)/docs: $(VENV)/installed docs/requirements.txt
	@echo "installing Sphinx into $(VENV)"
	$(bin)/python -m pip install --quiet --disable-pip-version-check -r docs/requirements.txt
	touch $@

# A peer that cannot be had is shown as such, and tried again the next time.
$(VENV)/peers: $(VENV)/installed bench/requirements.txt
	@missing=; for peer in $$(grep -v '^#' bench/requirements.txt); do \
		$(bin)/python -m pip install --quiet --disable-pip-version-check \
			--no-deps $$peer || missing="$$missing $$peer"; \
	done; \
	if [ -z "$$missing" ]; then touch $@; else echo "not installed:$$missing"; fi

# An editable install, so that Python changes need no build; setup.py keeps its object
# files in build/, so that C++ changes compile only what they touch.
$(VENV)/built: $(VENV)/installed setup.py pyproject.toml $(cxx)
	@echo "compiling: a minute or two for the CPU, some more where nvcc builds kernels"
	@$(bin)/python setup.py --quiet build_ext --inplace 2>&1 | $(files_alone)
	$(bin)/python -m pip install --quiet --disable-pip-version-check \
		--no-build-isolation --no-deps --editable .
	touch $@
