# The commands of this project. Each sets up what it needs by itself: uv (into .tools) when there is none, then the
# environment (.venv). Needed beforehand: Python 3.11 or later, git, make, and room for about 6 GB.

UV_VERSION := 0.13.9
UV := $(or $(shell command -v uv 2>/dev/null),.tools/uv/bin/uv)
export UV_NO_PROGRESS := 1
ARGS ?=

.PHONY: help tour test lab export env
.DEFAULT_GOAL := help

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-8s %s\n", $$1, $$2}' Makefile

tour: env ## walk once round the whole loop on sample images: the place to start
	@$(UV) run --quiet fsml tour $(ARGS)

test: env ## run every test, the notebooks among them (ARGS="-k lease" for some)
	@$(UV) run --quiet pytest $(ARGS)

lab: env ## open JupyterLab on the tour
	@$(UV) run --quiet fsml lab $(ARGS)

export: env ## write modules, clean notebooks and README.md from nbs/
	@$(UV) run --quiet nbdev-export
	@$(UV) run --quiet python -m fsml_lab._notebooks
	@$(UV) run --quiet python -m fsml_lab._notebooks --readme

env: $(UV) ## set up or update the environment
	@[ -d .venv ] || echo "Setting up the environment in .venv: some 6 GB, minutes on a slow line ..."
	@$(UV) sync --quiet

# venv, or pip alone where Debian's python3-venv is missing
.tools/uv/bin/uv:
	@set -e; py=; \
	for p in python3 python3.13 python3.12 python3.11 python3.14 python; do \
	  if command -v $$p >/dev/null 2>&1 && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then py=$$p; break; fi; \
	done; \
	if [ -z "$$py" ]; then echo "No Python 3.11 or later was found. Install one (Debian, Ubuntu: apt-get install python3 python3-venv), or uv itself." >&2; exit 1; fi; \
	echo "Installing uv $(UV_VERSION) into .tools ..."; \
	rm -rf .tools/uv; mkdir -p .tools; \
	if $$py -m venv .tools/uv >/dev/null 2>&1 && .tools/uv/bin/python -m pip --version >/dev/null 2>&1; then \
	  .tools/uv/bin/python -m pip install --quiet --disable-pip-version-check 'uv==$(UV_VERSION)'; \
	elif $$py -m pip --version >/dev/null 2>&1; then \
	  rm -rf .tools/uv; $$py -m pip install --quiet --disable-pip-version-check --target .tools/uv 'uv==$(UV_VERSION)'; \
	else \
	  rm -rf .tools/uv; \
	  echo "$$py has neither venv nor pip. Install one (Debian, Ubuntu: apt-get install python3-venv), or uv itself." >&2; exit 1; \
	fi
