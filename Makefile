# Two commands are all a newcomer needs: `make demo` and `make test`. Each sets up .venv when it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lint types soak runtimes matrix clean
.DELETE_ON_ERROR:

demo: $(READY)  ## compress the bundled network and measure it: about a minute
	$(BIN)/edgecomp build --force -o demo
	$(BIN)/edgecomp bench demo

WORKERS ?= auto
# A file's tests share what they build, so each file goes to one worker; its libraries take one thread, as workers fill the cores.
test: lint types  ## everything CI runs, on up to four cores: WORKERS=0 for one process
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses=4 --dist=loadfile

lint: $(READY)
	$(BIN)/ruff check .

types: $(READY)
	$(BIN)/mypy --strict edgecomp

MINUTES ?= 20
soak: $(READY)  ## damaged files and random graphs for MINUTES, or CASES=100000 damaged files; SEED=N repeats a run
	$(BIN)/python -m tests.soak $(if $(CASES),--only fuzz --cases $(CASES),--minutes $(MINUTES)) $(if $(SEED),--seed $(SEED))

runtimes: $(READY)  ## the same files in old and new onnxruntime, tflite-runtime and LiteRT; fetches each once
	$(BIN)/python -m tests.runtimes --folder .runtimes

matrix: $(READY)  ## measure README's table of what runs where again: about an hour
	$(BIN)/python -m tests.matrix

# Made again when the dependencies change; .ready is written last, so an interrupted installation is repeated.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "edgecomp needs Python 3.11 or newer, this is " + sys.version.split()[0])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .runtimes demo build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
