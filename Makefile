# uv from this machine, or else installed into the project by Python's own venv and pip.
UV := $(or $(shell command -v uv),.uv/bin/uv)

# .python-version asks for 3.12; where there is none, any later Python serves.
ifeq (,$(shell command -v python3.12))
export UV_PYTHON ?= >=3.12
endif

.PHONY: help server client demo test rolling libraries faults traps bench profile

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1:\2/p' Makefile | while IFS=: read -r target what; do \
	  printf '%-14s %s\n' "$$target" "$$what"; done

server: $(UV)  ## start the gateway on http://localhost:8321, no key needed; EGRESS=1 keeps connections to the vendors warm
	@exec $(UV) run deploy/$(if $(filter 1,$(EGRESS)),egress/)serve.sh

client: $(UV)  ## run main.py with the keys of .env
	@$(UV) run python main.py

demo: $(UV)  ## no keys, no internet: stand-in vendors, the gateway and main.py together
	@$(UV) run --group dev python tests/demo.py

test: $(UV)  ## the whole test suite, offline
	$(UV) run --group dev ruff check
	$(UV) run --group dev ruff format --check
	$(UV) run --group dev --group deploy pytest -n 2 --dist loadfile

rolling: $(UV)  ## restart and kill gateways behind a load balancer, and print what callers noticed
	$(UV) run --group dev pytest tests/test_balancer.py -m slow -s

libraries: $(UV)  ## the client libraries' tests, with the newest release of each (asks the package indexes)
	NEWEST_NODE=1 $(UV) run --isolated --no-project --refresh-package openai --refresh-package openai-agents \
	  --refresh-package langchain-openai --refresh-package llama-stack-client \
	  --with openai,openai-agents,langchain-openai,llama-stack-client --with psutil,pytest,pytest-timeout,pyyaml,starlette,trustme,uvicorn \
	  pytest $(addprefix tests/test_,openai_sdk.py openai_agents.py responses.py llama_stack_client.py langchain.py node.py)

faults: $(UV)  ## the long tests of faults, with their figures in tests/faults.md
	$(UV) run --group dev pytest tests/test_faults.py tests/test_serve.py -m "slow or not slow" --figures tests/faults.md

traps: $(UV)  ## undo what is done about the stock server's traps, one by one, and measure each
	@$(UV) run --group dev python tests/traps.py

bench: $(UV)  ## this gateway beside its peers, about 20 minutes (a quick look: ROUNDS=1 SECONDS=1)
	@PYTHONPATH=tests $(UV) run --group dev python -m bench --rounds $(or $(ROUNDS),3) --seconds $(or $(SECONDS),3) --only $(ONLY)

profile: $(UV)  ## where the server's time goes, sampled with py-spy
	@PYTHONPATH=tests $(UV) run --group dev python -m bench.profiling

.uv/bin/uv:
	python3 -m venv .uv
	.uv/bin/pip install --quiet --disable-pip-version-check uv
