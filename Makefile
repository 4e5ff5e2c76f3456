# Every target makes .venv when it is missing; a second call is fast.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
XDIST ?= -n 2
FAMILIES := .venv/families
FAMILY_TESTS := tests/test_attention_seam_packages.py tests/test_evonorm_timm.py

.PHONY: venv study test test-all check bench catalogue reproductions

venv: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("foreshock needs Python 3.11 or newer; set PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(READY)

study: venv
	$(BIN)/foreshock study quick --out out/quick

test: venv
	$(BIN)/python -m pytest $(XDIST) -q

test-all: venv $(FAMILIES)/.ready
	$(BIN)/python -m pytest $(XDIST) -q -m slow $(FAMILY_TESTS:%=--deselect %)
	PYTHONPATH=$(FAMILIES) $(BIN)/python -m pytest -q -m slow $(FAMILY_TESTS)

# Beside the environment and not in it: transformers would find a torchvision that has no operators here.
$(FAMILIES)/.ready: | venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(FAMILIES) \
		timm==1.0.31 torchvision==0.28.0 \
		x-transformers==2.31.10 einops==0.8.2 torch-einops-utils==0.2.0 einx==0.4.3 loguru==0.7.3 frozendict==2.5.1
	@touch $@

check: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(MAKE) test

bench: venv
	$(BIN)/python -m benchmarks

catalogue: venv
	$(BIN)/python -m tools.catalogue

reproductions: venv
	$(BIN)/python -m tools.reproductions
