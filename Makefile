# uv from this machine, or else installed into the project by Python's own venv and pip.
UV := $(or $(shell command -v uv),.uv/bin/uv)

# PROMPT and MODEL reach `make client` as they were typed, whatever is in them: make reads no $ there, and the shell no quote.
# Only from make's own command line, because zsh has a PROMPT too.
typed = $(if $(findstring command,$(origin $1)),$(value $1))
override PROMPT := $(call typed,PROMPT)
override MODEL := $(call typed,MODEL)
export PROMPT MODEL

# Containers often set it. Python would then compile thousands of files at every start.
unexport PYTHONDONTWRITEBYTECODE

# What a target needs is fetched when it first runs.
first = @[ -d .venv ] || echo "The first run fetches packages ($1 MB), which may take a minute. Later ones need no internet." >&2

# The packages that the server and the client need. uv shows its progress only when there is something to fetch.
sync = { $(UV) sync --inexact $(if $(wildcard .venv),--quiet) || { echo "The packages could not be fetched. Behind a proxy that \
  inspects TLS, name its CA in SSL_CERT_FILE." >&2; exit 1; }; }

.PHONY: help server client demo test image rolling libraries programs faults workarounds mutants bench profile advisories

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1:\2/p' Makefile | while IFS=: read -r target what; do \
	  printf '%-14s %s\n' "$$target" "$$what"; done

server: $(UV)  ## start the gateway on http://localhost:8321, no key needed
	$(if $(filter command%,$(origin PORT)),$(error PORT is not a setting. To choose the port, type: make server LLAMA_STACK_PORT=$(value PORT)))
	$(call first,35)
	@$(sync) && exec "$${UV_PROJECT_ENVIRONMENT:-.venv}/bin/python" -I deploy/start

client: $(UV)  ## run main.py with the keys of .env; PROMPT="..." and MODEL="provider/model ..." are passed on
	$(call first,35)
	@set -f; for model in $$MODEL; do set -- "$$@" -m "$$model"; done; exec $(UV) run python main.py "$$@" $${PROMPT:+-- "$$PROMPT"}

demo: $(UV)  ## no keys: stand-in vendors, the gateway and main.py together (STAY=1: until Ctrl-C, with a page to open)
	$(call first,70)
	@PYTHONPATH=tests $(UV) run --group dev python -m tools.demo $(if $(filter-out 0,$(STAY)),--stay)

test: $(UV)  ## the whole test suite, on loopback alone (Linux, about 4 minutes)
	$(call first,160)
	$(UV) run --group dev ruff check
	$(UV) run --group dev ruff format --check
	$(UV) run --group dev --group deploy --group browser pytest -n 5 --dist loadfile --no-loadscope-reorder

image: $(UV)  ## build the container image with podman, run it and ask every model through it
	$(UV) run --group dev pytest tests/test_image.py -m slow -s

rolling: $(UV)  ## restart and kill gateways behind a load balancer, and print what callers noticed
	$(UV) run --group dev pytest tests/test_balancer.py -m slow -s

libraries: $(UV)  ## the client libraries' tests, with the newest release of each (asks the package indexes)
	NEWEST_NODE=1 $(UV) run --isolated --no-project --refresh-package openai --refresh-package openai-agents \
	  --refresh-package langchain-openai --refresh-package llama-stack-client \
	  --with openai,openai-agents,langchain-openai,llama-stack-client \
	  --with dnslib,opentelemetry-proto,psutil,pyjwt,pytest,pytest-timeout,pyyaml,starlette,trustme,uvicorn \
	  pytest $(addprefix tests/test_,openai_sdk.py openai_agents.py responses.py shapes.py llama_stack_client.py langchain.py node.py)

programs: $(UV)  ## the programs of docs/programs.md, each in a folder of its own (asks the package indexes)
	$(UV) run --group dev pytest tests/test_programs.py -m slow -s

FAULTS := $(addprefix tests/,test_vendor_faults.py test_caller_faults.py test_heavy_calls.py test_fuzzing.py test_start_lifetime.py)

faults: $(UV)  ## the long tests of faults, with their figures in tests/faults.md
	$(UV) run --group dev pytest $(FAULTS) -m "slow or not slow" --figures tests/faults.md

workarounds: $(UV)  ## undo what is done about the stock server's traps, one by one, and measure each (ONLY=names)
	@PYTHONPATH=tests $(UV) run --group dev python -m tools.workarounds $(ONLY)

mutants: $(UV)  ## change the project on purpose, and see that a test notices (ONLY=pattern, JOBS=2)
	@PYTHONPATH=tests $(UV) run --group dev --group deploy --group browser python -m tools.mutation --only "$(ONLY)" --jobs $(or $(JOBS),2)

bench: $(UV)  ## this gateway beside its peers, 15 minutes (PAIRED=1: beside the previous start, in pairs, 10 minutes)
	@PYTHONPATH=tests $(UV) run --group dev python -m tools.bench $(if $(PAIRED),--paired) $(if $(ROUNDS),--rounds $(ROUNDS)) \
	  $(if $(SECONDS),--seconds $(SECONDS)) $(if $(MINUTES),--minutes $(MINUTES)) $(if $(SEED),--seed $(SEED)) --only $(ONLY)

profile: $(UV)  ## where the server's time goes, sampled with py-spy; SETTINGS=1: what each setting adds or takes off
	@PYTHONPATH=tests ROUNDS=$(ROUNDS) SECONDS=$(SECONDS) $(UV) run --group dev python -m \
	  tools.bench.$(if $(SETTINGS),settings $(filter-out 1,$(SETTINGS)),profiling)

advisories: $(UV)  ## the known advisories for what uv.lock has (asks osv.dev)
	@$(UV) audit --preview-features audit-command --frozen || { code=$$?; [ $$code -ne 2 ] || \
	  echo "The advisories could not be listed. That takes internet, and a uv that has \`uv audit\`." >&2; exit $$code; }

.uv/bin/uv:
	@echo "This machine has no uv, which installs packages. Fetching one into .uv (17 MB) ..." >&2
	@python3 -m venv .uv
	@.uv/bin/pip install --quiet --disable-pip-version-check uv
