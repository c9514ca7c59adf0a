# One verb each. `make demo` draws a picture on a fresh clone; `make test` runs every test.
PYTHON ?= python3
PROMPT ?= a red apple on a blue background
TORCH_BACKEND ?= auto
export PYTHONDONTWRITEBYTECODE =
export UV_PYTHON_DOWNLOADS = never

# torch comes from a local wheel folder where pip is told of one, else from uv's choice for this machine (CPU, CUDA, ROCm).
WHEELS := $(shell $(PYTHON) -m pip config get global.find-links 2>/dev/null || $(PYTHON) -m pip config get :env:.find-links 2>/dev/null)
ifneq ($(WHEELS),)
TORCH_FROM := $(addprefix --find-links ,$(WHEELS))
else
TORCH_FROM := --torch-backend=$(TORCH_BACKEND)
endif
UV := .venv/bin/uv pip install -q --python .venv/bin/python

setup: .venv/.done

.venv/.done: pyproject.toml torch.txt requirements.lock tests/clients/openai-1.txt
	@echo "setting up .venv (once; about a minute)"
	@$(PYTHON) -m venv .venv
	@.venv/bin/python -m pip install -qq uv==0.13.9
	@$(UV) $(TORCH_FROM) -r torch.txt || $(UV) -r torch.txt
	@$(UV) --no-deps --require-hashes -r requirements.lock
	@$(UV) --no-deps -e .
	@$(UV) --no-deps --require-hashes --target .venv/openai-1 -r tests/clients/openai-1.txt
	@touch $@

demo: setup
	@.venv/bin/darkroom generate "$(PROMPT)" -o image.png --fresh --with-parent

up: setup
	@.venv/bin/darkroom up --with-parent

test: setup
	@.venv/bin/pytest -n 3 --dist loadfile --ignore tests/test_contract.py
	@.venv/bin/pytest tests/test_contract.py # whose cases share a name, which is all that two processes go by

check: setup
	@.venv/bin/ruff format --check .
	@.venv/bin/ruff check .
	@.venv/bin/basedpyright

# The second half runs other servers, in an environment of their own: half an hour. `make bench ARGS=--short`: some minutes.
bench: setup peers
	@.venv/bin/python -m tests.bench
	@.venv/bin/python -m bench $(or $(ARGS),--minutes 30)

peers: .venv-peers/.done

.venv-peers/.done: .venv/.done bench/peers/requirements.txt
	@$(PYTHON) -m venv .venv-peers
	@.venv/bin/uv pip install -q --no-deps --python .venv-peers/bin/python -r bench/peers/requirements.txt
	@.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		>$$(.venv-peers/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/ours.pth # torch, diffusers
	@touch $@

# The long form takes about a quarter of an hour; `make chaos SHORT=1 SEED=7 MUTATE=lease` are its options.
chaos: setup
	@.venv/bin/python -m tests.chaos $(if $(SHORT),--short) --seed $(or $(SEED),1) $(if $(MUTATE),--mutate $(MUTATE))

soak: setup
	@.venv/bin/python -m tests.chaos.soak

lock:
	@.venv/bin/uv pip compile -q --python-version 3.11 $(TORCH_FROM) --generate-hashes --no-emit-package torch --no-emit-package triton \
		--no-header -c torch.txt --extra worker --extra language --extra embedded --group test -o requirements.lock pyproject.toml

.PHONY: setup demo up test check bench peers chaos soak lock
