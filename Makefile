# make train | test | lint      sets up .venv and runs; nothing else has to be done first.
# ... VENV=none PYTHON=python3  uses an environment that has torch already: installs nothing, builds the C++ extension
#                               in place where there is a compiler.

PYTHON ?= python3
VENV ?= .venv
PIP_FLAGS = -q --disable-pip-version-check --no-input
SOURCES = pyproject.toml setup.py $(shell find csrc -name '*.h' -o -name '*.inl' -o -name '*.cpp' -o -name '*.cu*' -o -name '*.py')

ifeq ($(VENV),none)
RUN = PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" "$(PYTHON)"
# One extension for each Python and torch.
ASK = import sys, importlib.metadata as m; print(sys.version_info[1], m.version('torch'), sep='-')
READY := build/in-place-$(shell "$(PYTHON)" -c "$(ASK)" 2>/dev/null || echo none)
else
RUN = $(VENV)/bin/python
READY = $(VENV)/ready
endif

.PHONY: docs docs-serve dist matrix sanitize train test lint format codegen bench paper gpu doctor clean

train: $(READY)
	$(RUN) examples/train.py --recipe demo $(ARGS)

test: $(READY)
	$(RUN) python_tests/run_tiers.py $(TIERS)

lint: $(READY)
	$(RUN) python_tests/lint.py

format: $(READY)
	$(RUN) python_tests/lint.py --fix

# Rewrites benchmarks/codegen_summary.json: what each Triton kernel compiles to. Needs no GPU.
codegen: $(READY)
	$(RUN) benchmarks/codegen.py

# The CPU's share of the benchmarks: rows and plots under benchmarks/results, and the README's tables from them.
bench: $(READY)
	$(RUN) -m benchmarks.run --suite all --device cpu --minutes 4.5
	$(RUN) -m benchmarks.readme
	$(RUN) -m benchmarks.plots

# A table or figure of the paper, or all of them, and docs/reproduction.md: make paper NAME=figure5 ARGS='--data DIR'
NAME ?= all
paper: $(READY)
	$(RUN) -m benchmarks.paper $(NAME) $(ARGS)
	$(RUN) -m benchmarks.paper report

# On a machine with a CUDA device, without network: all stages in order, going on where an earlier call stopped, or
# make gpu STAGE=build|kernels|steps|graphs|large|sanitizer|perturb|steps-bench|loss|memory. A call takes less than nine
# minutes, a stage by itself less than eight, with what is built first. Rows, logs, JUnit XML:
# benchmarks/results/<device>/, and as one archive under $OUT.
gpu: export ESAM_GPU_BEGAN := $(shell date +%s)
gpu: $(READY)
	@$(RUN) -m benchmarks.gpu $(STAGE)

# The site, in build/site: a warning, a broken link or an undocumented public name fails.
docs: $(READY)
	$(RUN) -m sphinx -q -W --keep-going -b html -d build/doctrees docs build/site
	@echo "The site is in build/site; make docs-serve shows it in a browser."

# sdist and wheel, in dist/, tried in fresh environments.
dist: $(READY)
	$(RUN) tools/dist.py

# The test tiers on another Python and torch, in a fresh environment; a row for docs/versions.md.
matrix:
	"$(PYTHON)" tools/matrix.py --python "$(PYTHON)" $(if $(TORCH),--torch $(TORCH)) $(if $(TIERS),--tiers $(TIERS))

# The C++ extension under gcc's sanitizers, in build/sanitize: make sanitize ARGS=thread
sanitize: $(READY)
	$(RUN) tools/sanitize.py $(ARGS)

docs-serve: docs
	$(RUN) -m http.server --bind 127.0.0.1 --directory build/site 8000

doctor: $(READY)
	$(RUN) -m esam_kernels doctor

# torch comes first, pinned: the extension is compiled against it.
$(VENV)/ready: constraints.txt $(SOURCES)
	@echo "Setting up $(VENV), once: PyTorch is downloaded and the C++ code compiled, which takes some minutes."
	"$(PYTHON)" -m venv $(VENV)
	$(VENV)/bin/python -m pip install $(PIP_FLAGS) -c constraints.txt torch setuptools wheel ninja pybind11
	$(VENV)/bin/python -m pip install $(PIP_FLAGS) -c constraints.txt --no-build-isolation -e '.[examples,dev]'
	touch $@

build/in-place-none:
	@echo "VENV=none uses the torch of $(PYTHON), which has none: install torch there, or leave VENV=none out" >&2; exit 1

build/in-place-%: $(SOURCES)
	"$(PYTHON)" setup.py -q build_ext --inplace
	@mkdir -p build && touch $@

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache runs
	rm -f $(VENV)/ready esam_kernels/_build.json
	find esam_kernels -name '_native*.so' -delete -o -name '_cuda*.so' -delete
