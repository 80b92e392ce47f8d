# Two commands on a fresh machine: `make demo` and `make test`. Everything else is in CONTRIBUTING.md.
#
#   make TORCH=cuda demo      take PyPI's torch, which on Linux brings CUDA (gigabytes)
#   make PYTHON=python3.12 …  another interpreter for .venv
#   make WORKERS=8 test       test processes; each needs about 1 GB

PYTHON ?= python3
TORCH ?= cpu
WORKERS ?= 2
VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
TORCH_VERSION := $(shell sed -n 's/^torch==//p' constraints.txt)
CPU_INDEX := https://download.pytorch.org/whl/cpu
READY := $(VENV)/.installed
DEMO_READY := $(VENV)/.installed-demo
NATIVE := CMakeLists.txt $(shell find native -type f)
SANITIZED := $(VENV)/sanitized
EMULATED := $(VENV)/emulated
# pip builds the extension in an environment of its own, which -c does not reach in every version of pip.
export PIP_CONSTRAINT := constraints.txt
export PIP_BUILD_CONSTRAINT := constraints.txt
# Bytecode is written where it is imported: a process without it compiles torch, and tests start many.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test test-slow sanitize emulate lint docs readme-table install clean
.DELETE_ON_ERROR:

demo: $(DEMO_READY)
	$(VENV)/bin/pruneofa demo

# A file of tests stays in one process: what its tests share is made once.
test: install
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadscope --no-loadscope-reorder

test-slow: install
	$(VENV)/bin/python -m pytest -m slow --timeout=1800

# The kernels' tests on a build that checks every access (AddressSanitizer) and every operation of undefined meaning.
# The interpreter is not built so: the sanitizer is loaded before it, and what Python itself never frees is no leak.
# -s: a report ends the process, and pytest would keep it to itself.
sanitize: $(SANITIZED)/.installed
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=1 \
	  $(SANITIZED)/bin/python -m pytest -s tests/kernels --timeout=1200

# The kernels' tests of every path on a CPU with AVX2: the instructions that it lacks are emulated, one element after the
# other, so that results are those of the path and times say nothing.
emulate: $(EMULATED)/.installed
	PRUNEOFA_EMULATE=1 OMP_NUM_THREADS=1 $(EMULATED)/bin/python -m pytest tests/kernels --timeout=1200

# The packages of .venv, and above them pruneofa as users install it, not editable.
$(SANITIZED)/.installed: BUILD := -C cmake.define.PRUNEOFA_SANITIZE=ON -C cmake.build-type=RelWithDebInfo
$(EMULATED)/.installed: BUILD := -C cmake.define.PRUNEOFA_EMULATE=ON
$(EMULATED)/.installed: tests/kernels/emulated/immintrin.h
$(SANITIZED)/.installed $(EMULATED)/.installed: $(READY) $(shell find src -name '*.py' 2>/dev/null)
	rm -rf $(@D)
	$(VENV)/bin/python -m venv --without-pip $(@D)
	$(VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  > "$$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/venv.pth"
	$(PIP) --python $(@D)/bin/python install -q --no-deps --ignore-installed \
	  -C cmake.define.PRUNEOFA_WERROR=ON $(BUILD) .
	@touch $@

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyrefly check --python-interpreter-path $(VENV)/bin/python

# The documentation as a site, in build/site. Pages are copied to where their links to each other hold; zensical.toml names
# the copy. --strict: a link or a name of the API that leads nowhere is an error.
docs: install
	rm -rf build/pages build/site
	mkdir -p build/pages
	tar cf - *.md LICENSE docs recipes results benchmarks | tar xf - -C build/pages
	$(VENV)/bin/python -m zensical build --strict

# The picture and the tables of README.md and docs/results.md, from the committed runs and records.
readme-table: RUNS = $(sort $(filter-out results/demo/%,$(wildcard results/*/results.json)))
readme-table: install
	$(VENV)/bin/python results/picture.py
	$(call fill,docs/results.md,rows,$(VENV)/bin/python results/rows_table.py,results/rows.json)
	$(call fill,docs/results.md,lost,$(VENV)/bin/python results/lost_table.py,$(RUNS))
	$(call fill,docs/results.md,results,$(VENV)/bin/pruneofa table,$(RUNS))
	$(call fill,README.md,demo,$(VENV)/bin/python results/demo_table.py,$(wildcard results/demo/results.json))
	$(call fill,docs/results.md,speed,$(VENV)/bin/python benchmarks/speed_table.py,$(sort $(wildcard benchmarks/records/*-engine/bench_*.json)))

# $(call fill,PAGE,NAME,COMMAND,FILES): put what COMMAND prints of FILES between the markers NAME:begin and NAME:end.
define fill
@$(if $(4),$(3) $(4),true) > $(VENV)/table.md
@awk -v file=$(VENV)/table.md 'BEGIN { while ((getline line < file) > 0) table = table line "\n" } \
  /<!-- $(2):end -->/ { skip = 0 } !skip { print } /<!-- $(2):begin -->/ { printf "%s", table; skip = 1 }' \
  $(1) > $(VENV)/page.md
@cp $(VENV)/page.md $(1)
endef

install: $(READY)

clean:
	rm -rf $(VENV)

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is $$($(PYTHON) -V 2>&1), wanted 3.11 or newer; run: make PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)

# torch comes first and alone: what is installed satisfies the constraint, so nothing later pulls another build.
# The stamp's name holds version and build: another one is installed over it.
$(VENV)/.torch-$(TORCH_VERSION)-$(TORCH): | $(VENV)/bin/python
	@rm -f $(VENV)/.torch-*
ifneq (,$(filter cuda,$(TORCH))$(filter Darwin,$(shell uname -s)))
	$(PIP) install -q --no-compile -c constraints.txt 'torch==$(TORCH_VERSION)'
else ifeq ($(TORCH),cpu)
	@echo "torch $(TORCH_VERSION)+cpu: from pip's configured sources, else from $(CPU_INDEX)"
	@$(PIP) install -q --no-compile -c constraints.txt 'torch==$(TORCH_VERSION)+cpu' 2>$(VENV)/torch.log || \
	 $(PIP) install -q --no-compile -c constraints.txt --retries 2 --extra-index-url $(CPU_INDEX) \
	   'torch==$(TORCH_VERSION)+cpu' 2>>$(VENV)/torch.log || { \
	 tail -n 2 $(VENV)/torch.log; \
	 echo "No CPU build of torch $(TORCH_VERSION): none in pip's configured sources, $(CPU_INDEX) did not give one."; \
	 echo "Make one of them reachable (e.g. PIP_FIND_LINKS=folder with the wheel),"; \
	 echo "or accept PyPI's build, which on Linux brings gigabytes of CUDA: make TORCH=cuda $(or $(MAKECMDGOALS),demo)"; \
	 exit 2; }
else
	@echo "TORCH is '$(TORCH)', wanted cpu or cuda"; exit 2
endif
	@touch $@

$(READY): pyproject.toml constraints.txt $(NATIVE) $(VENV)/.torch-$(TORCH_VERSION)-$(TORCH)
	$(PIP) install -q -c constraints.txt -C cmake.define.PRUNEOFA_WERROR=ON -e '.[dev]'
	@touch $(DEMO_READY) $@

# What the demo needs and no more. Bytecode is written where it is imported: pip would compile all of torch.
$(DEMO_READY): pyproject.toml constraints.txt $(NATIVE) $(VENV)/.torch-$(TORCH_VERSION)-$(TORCH)
	$(PIP) install -q --no-compile -c constraints.txt -C cmake.define.PRUNEOFA_WERROR=ON -e '.[demo]'
	@touch $@
