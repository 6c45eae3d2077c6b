# make demo | test | test-spark | lint | docs | bench | clean.   Needs Python 3.11 to 3.13; everything else is installed
# into .venv on first use. Variables:
#   PYTHON       the interpreter to build .venv from        make test PYTHON=python3.12
#   GPU          auto (default), yes or no                  make demo GPU=no
#   TORCH_INDEX  where torch's CPU build comes from, if pip's own sources do not have it
#   SPARK        the pyspark that test-spark takes          make test-spark SPARK=3.5.7
#   ARGS         further arguments of pytest or the demo    make test ARGS="tests/unit -x"

VENV := .venv
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null \
	&& { echo $$p; break; }; done)
GPU ?= auto
SPARK ?= 4.0.1
# Without Java there is no Spark, and pyspark is 400 MB.
comma := ,
EXTRAS ?= dev$(if $(shell command -v java),$(comma)spark-connect)
STAMP := $(VENV)/.installed
# In an environment made for the CPU a GPU must not be chosen: what drives it is not installed.
RUN_ENV = $(if $(filter cpu,$(shell cat $(STAMP))),CUDA_VISIBLE_DEVICES=-1)
RUN = $(RUN_ENV) $(VENV)/bin/python
BENCHMARKS := $(filter-out report,$(patsubst benchmarks/%.py,%,$(shell grep -l __main__ benchmarks/*.py)))

.PHONY: demo test test-spark lint docs bench clean
.DELETE_ON_ERROR:

demo: $(STAMP)
	$(RUN) -m daskshare.demo --output demo-output $(ARGS)

test: $(STAMP)
	$(RUN) -m pytest $(ARGS)

# What a pipeline of an older Spark does, beside the version that the other tests use. It goes into a
# folder of its own, which comes first on Python's path.
test-spark: $(STAMP)
	[ -d $(VENV)/pyspark-$(SPARK) ] || $(VENV)/bin/python -m pip install -q \
		--target $(VENV)/pyspark-$(SPARK) pyspark==$(SPARK)
	PYTHONPATH=$(CURDIR)/$(VENV)/pyspark-$(SPARK) $(RUN_ENV) $(VENV)/bin/python -m pytest \
		tests/spark -m short $(ARGS)

lint: $(STAMP)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

# Warnings are errors; the examples in the pages are run.
docs: $(STAMP)
	rm -rf docs/generated
	$(RUN) -m sphinx -W --keep-going -q -d docs/_build/doctrees -b html docs docs/_build/html
	$(RUN) -m sphinx -W --keep-going -q -d docs/_build/doctrees -b doctest docs docs/_build/doctest
	@echo "open docs/_build/html/index.html"

# Every benchmark that this machine can run (others say what they need), then one table of all bars.
bench: $(STAMP)
	@rm -rf bench-output
	@for name in $(BENCHMARKS); do \
		echo "== benchmarks.$$name"; \
		$(RUN) -m benchmarks.$$name --json bench-output/$$name.json || exit 1; \
	done
	@$(RUN) -m benchmarks.report --bars $(BENCHMARKS:%=bench-output/%.json)

clean:
	rm -rf $(VENV) demo-output bench-output test-output docs/_build docs/generated build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints/cpu.txt constraints/gpu.txt tools/make_venv.py
	@[ -n "$(PYTHON)" ] || { echo "daskshare needs Python 3.11, 3.12 or 3.13 and found none;" \
		"name it: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	$(PYTHON) tools/make_venv.py $(VENV) --extras $(EXTRAS) --gpu $(GPU) \
		$(if $(TORCH_INDEX),--torch-index $(TORCH_INDEX))
