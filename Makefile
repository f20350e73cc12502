# The two commands of the README are `make demo` and `make test`; each sets up all it needs.
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PROTO := src/firebuild_bootstrap/_proto

.PHONY: demo test assurance bench check check-style check-types check-generated format proto tables docs lock package clean

demo: $(READY)
	@$(BIN)/python examples/demo.py

test: $(READY)
	$(BIN)/python -m pytest -n auto --dist loadgroup $(PYTEST_ARGS)

# The long tests, which take hours: all, or those of TRIALS="NAME …"; docs/assurance.md gets what they found.
assurance: $(READY)
	$(BIN)/python tests/assurance/run $(if $(SECONDS_EACH),--seconds $(SECONDS_EACH)) $(TRIALS)

# Against other tools, and against the limits: all, or those of ONLY="NAME …"; QUICK=1 for one round of each.
# benchmarks/RESULTS.md gets what they found.
bench: $(READY)
	$(BIN)/python -m benchmarks $(if $(QUICK),--rounds 1) $(if $(ROUNDS),--rounds $(ROUNDS)) $(ONLY)

check: check-style check-types check-generated

check-style: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports

check-types: $(READY)
	$(BIN)/mypy
	$(BIN)/mypy tests benchmarks examples
	for plugin in $(wildcard plugins/*); do MYPYPATH=$$plugin/src:$$plugin/tests $(BIN)/mypy $$plugin/tests || exit; done

check-generated: $(READY)
	$(BIN)/python scripts/option-tables --check
	$(BIN)/python scripts/reference --check
	$(BIN)/python scripts/man-page --check
	@$(MAKE) --no-print-directory proto PROTO=$(VENV)/proto
	diff -r -x __init__.py -x __pycache__ $(VENV)/proto $(PROTO)

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

proto: $(READY)
	@mkdir -p $(PROTO)
	$(BIN)/python -m grpc_tools.protoc -Iprotos --python_out=$(PROTO) --pyi_out=$(PROTO) protos/rootfs_server.proto

# What the documentation has from the code: the tables of options, the pages of docs/reference, the man page.
tables: $(READY)
	$(BIN)/python scripts/option-tables
	$(BIN)/python scripts/reference
	$(BIN)/python scripts/man-page

# The documentation as a site, in build/site; every warning is an error.
docs: $(READY)
	$(BIN)/python -m sphinx -q -W --keep-going -c docs . build/site

# Names, versions and hashes of everything that is installed; no index addresses.
lock: $(READY)
	$(BIN)/uv pip compile pyproject.toml --group dev --generate-hashes --universal \
	  --python-version 3.11 --no-annotate --no-header --no-emit-index-url --no-emit-find-links \
	  --upgrade -o constraints.txt

package: $(READY)
	$(BIN)/python -m build --no-isolation

# The package has the version.
$(READY): $(VENV)/.pinned pyproject.toml src/firebuild_bootstrap/__init__.py $(wildcard plugins/*/pyproject.toml)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  --no-deps --no-build-isolation --no-index $(foreach package,. $(wildcard plugins/*),--editable $(package))
	@$(BIN)/python -m compileall -q src  # as an installer does; a start takes twice as long without
	@touch $@

$(VENV)/.pinned: constraints.txt scripts/make-venv
	@scripts/make-venv $(VENV)
	@touch $@

clean:
	rm -rf $(VENV) dist build .mypy_cache .pytest_cache .ruff_cache .coverage*
