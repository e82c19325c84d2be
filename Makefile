# make demo    install into .venv and run the main job: PreNorm and two Multi-Gate Residuals on real text
# make test    install and run all tests
# make test-oldest  the same with the oldest torch that is admitted, in an environment of its own
# make test-peers  install other implementations (1 GB) and compare with them
# make test-kernels  the same installation: run the Triton kernels, on the GPU or in Triton's interpreter
# make test-integrations  install DeepSpeed, Accelerate and Fabric: run examples/integrations on two processes
# make test-hf  install transformers, timm, datasets, lm-eval: models in and out, served, evaluated; FineWeb
# make test-nodes  two nodes, as network namespaces, that lose each other in training; needs root and iproute2
# make docs    install mkdocs and build the site into build/site; fails on any warning
# make package  build wheel and sdist into build/dist and check them in another environment
# make results  make the pages of docs/results again from results/*/*.jsonl
# make gpu-check  everything that needs an NVIDIA GPU: tests, sanitizer, benchmarks; installs nothing
# make lint    style, common mistakes, types
PYTHON ?= python3
VENV ?= .venv
OLDEST ?= .venv-oldest
export PYTHON

# Two processes, each of whole files, so that what a file's tests share is made once.
TWO := -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-oldest test-peers test-kernels test-integrations test-hf test-nodes docs package results gpu-check lint clean
demo: $(VENV)/.demo
	$(VENV)/bin/depthmix compare --recipe quick --out runs/demo --resume

test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest $(TWO)

test-oldest: $(OLDEST)/.oldest
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest $(TWO)

test-peers: $(VENV)/.peers
	$(VENV)/bin/python -m pytest -m peers

test-kernels: $(VENV)/.peers
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -m kernels tests/kernels

test-integrations: $(VENV)/.integrations
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -m integrations tests/integrations

test-hf: $(VENV)/.hf
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(VENV)/bin/python -m pytest $(TWO) -m hf tests/hf --ignore tests/hf/vision
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONPATH=$(abspath $(VENV))/vision $(VENV)/bin/python -m pytest -m hf tests/hf/vision

# 77: what it needs is missing here, and it has said so.
test-nodes: $(VENV)/.test
	$(VENV)/bin/python scripts/two_nodes.py --steps 20 --cut-at 8 --timeout 12 --down 14 || [ $$? = 77 ]

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --quiet

package: $(VENV)/.test
	$(VENV)/bin/python scripts/check_package.py

results: $(VENV)/.test
	for study in studies/*.toml; do $(VENV)/bin/depthmix study $$study --report || exit; done

gpu-check:
	scripts/gpu_check.sh

lint: $(VENV)/.test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

$(VENV)/.demo: pyproject.toml constraints-cpu.txt
	scripts/install.sh $(VENV) ""
	@touch $@

$(VENV)/.test: pyproject.toml constraints-cpu.txt
	scripts/install.sh $(VENV) test,dev
	@touch $@

$(OLDEST)/.oldest: pyproject.toml constraints-oldest.txt
	CONSTRAINTS=constraints-oldest.txt scripts/install.sh $(OLDEST) test
	@touch $@

$(VENV)/.peers: pyproject.toml constraints-cpu.txt
	scripts/install.sh $(VENV) test,dev,peers
	@touch $@

$(VENV)/.integrations: pyproject.toml constraints-cpu.txt
	scripts/install.sh $(VENV) test,dev,integrations
	@touch $@

$(VENV)/.docs: pyproject.toml constraints-cpu.txt
	scripts/install.sh $(VENV) test,dev,docs
	@touch $@

$(VENV)/.hf: pyproject.toml constraints-cpu.txt
	scripts/install.sh $(VENV) test,dev,hf,serve,fineweb,eval,test-hf
# Apart: beside a CPU build of torch, torchvision's package has no operators, and transformers trips over it.
	$(VENV)/bin/python -m pip install -q --upgrade --no-deps --target $(VENV)/vision timm==1.0.31 torchvision==0.28.0
	@touch $@

clean:
	rm -rf $(VENV) build dist
