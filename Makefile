# Everything here creates or refreshes .venv by itself; see `make help`.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SUFFIXES:

OPTIMIZER ?= sso
ARGS ?=
TESTS ?= tests

VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
WHEELS := .wheels

.PHONY: help venv pretrain wheels test quick lint bench docs clean distclean

help: ## show this list
	@echo 'usage: make TARGET [OPTIMIZER=sso] [TESTS=path] [ARGS="..."] [PYTHON=/path/to/python3.12]'
	@sed -n 's/^\([a-z]*\):[^#]*## \(.*\)/  \1\t\2/p' Makefile | expand -t 14
	@echo 'PYTHON is the interpreter that .venv is made from; make distclean first to change it.'

# One recipe line, so one shell: whatever fails or is interrupted, the stamp is not written. All
# output goes to stderr. A .venv that does not work (half made, or of an old Python) is made anew.
$(STAMP): setup.py pyproject.toml tests/constraints.txt sso_megatron/version.py
	@exec >&2; rm -f $@; \
	if ! { PYTHON=$(PY) bash launch/python.sh && $(PY) -m pip --version; } >/dev/null 2>&1; then \
	    python=$$(bash launch/python.sh); \
	    echo "Creating $(VENV) with $$python"; \
	    "$$python" -m venv --clear $(VENV); \
	fi; \
	echo "Installing into $(VENV); the first time takes a few minutes (about 6 GB, mostly PyTorch)"; \
	$(PY) -m pip install --disable-pip-version-check -c tests/constraints.txt -e '.[dev]'; \
	touch $@

venv: $(STAMP) ## create or refresh .venv; the targets below do it by themselves

pretrain: $(STAMP) ## train a tiny model on this machine with OPTIMIZER; ARGS are passed on
	@$(VENV)/bin/sso-megatron first-run --optimizer $(OPTIMIZER) $(ARGS)

# Of the versions that versions.py names, without what they need: the installed version's is there.
wheels: $(WHEELS)/.fetched ## fetch the versions of Megatron-Core that tests compare
$(WHEELS)/.fetched: sso_megatron/mcore/compat/versions.py | $(STAMP)
	@mkdir -p $(WHEELS); \
	for version in $$($(PY) -c 'from sso_megatron.mcore.compat.versions import MEGATRON; print(*MEGATRON.tested)'); do \
	    $(PY) -m pip download --disable-pip-version-check --quiet --no-deps --only-binary :all: \
	        --dest $(WHEELS) "megatron-core==$$version"; \
	done; \
	touch $@

# Two workers that each compute on all cores wait for one another: a thread each is five times as fast.
# Files in the order that tests/conftest.py gives, since xdist's own leaves those of few and long tests to the
# end.
PYTEST = OMP_NUM_THREADS=1 $(PY) -m pytest $(TESTS) -n 2 --dist loadfile --no-loadscope-reorder

test: $(STAMP) ## run the tests, or those of TESTS=path; ARGS are passed to pytest
	@$(PYTEST) $(ARGS)

quick: $(STAMP) ## run those that need no Megatron process, in less than a minute; TESTS and ARGS as for test
	@$(PYTEST) -q -m 'not (megatron or browser or slurm or gpu or slow)' $(ARGS)

lint: $(STAMP) ## ruff, mypy, the import contracts, shellcheck, no paths of a home directory
	@status=0; run() { echo "-- $$*"; "$$@" || status=1; }; \
	run $(VENV)/bin/ruff check .; \
	run $(VENV)/bin/ruff format --check .; \
	run $(VENV)/bin/mypy sso_megatron; \
	run $(VENV)/bin/lint-imports; \
	run $(VENV)/bin/shellcheck -x launch/*.sh launch/slurm/* .ci/run; \
	found=0; git grep --untracked -nIE '/(root|home)/' || found=$$?; \
	case $$found in \
	    1) ;; \
	    0) echo 'The lines above name a directory of one machine; say it some other way.'; status=1 ;; \
	    *) echo 'git grep failed; the check for such directories needs a git checkout.'; status=1 ;; \
	esac; \
	exit $$status

bench: $(STAMP) ## measure optimizer steps beside AdamW and Muon; ARGS are passed on
	@$(VENV)/bin/sso-megatron bench --json runs/bench.json $(ARGS)

docs: $(STAMP) ## build the documentation as a site, site/index.html; ARGS are passed on
	@NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict $(ARGS)

clean: ## remove caches and build outputs, keep .venv
	@rm -rf build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
	@find sso_megatron tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## clean, and remove .venv and .wheels
	@rm -rf $(VENV) $(WHEELS)
