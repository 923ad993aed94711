# Two commands are all a newcomer needs: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo figures test test-slow test-numerics test-hosts lint types wheel clean

demo: $(VENV)/.installed  ## train a tiny MDEQ on handwritten digits, once per gradient method
	$(BIN)/deq-phantom compare --out runs/demo

figures: $(VENV)/.installed  ## the figures that need no data to be fetched, and the numbers in them
	$(BIN)/python examples/synthetic.py
	$(BIN)/python examples/sgd_convergence.py
	$(BIN)/python examples/report_figures.py
	$(BIN)/python examples/train_ignn.py --out examples/figures --epochs 300 \
		--lengths 10 20 30 40 60 80 100 --grad "ift(max_iter=100)" "upg(k=5, lam=0.5)" \
		"upg(k=5, lam=0.8)" "upg(k=20, lam=1.0)" "npg(k=50, lam=1.0)" "bptt(steps=50)" jfb

test: $(VENV)/.installed  ## the test suite
	$(BIN)/python -m pytest -n auto -m "not slow and not hosts"

test-slow: $(VENV)/.installed  ## tests that take minutes
	$(BIN)/python -m pytest -m "slow and not hosts"

test-numerics: $(VENV)/.installed  ## tests that depend on rounding, as other processors round
	bash .ci/numerics $(BIN)/python

test-hosts: $(VENV)/.installed  ## tests against checkouts of foreign repositories in .hosts/
	$(BIN)/python -m pytest -m hosts -rs

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed
	$(BIN)/mypy

wheel: $(VENV)/.installed  ## build the wheel into dist/, and use it in an empty environment
	bash .ci/wheel $(BIN)/python

# The newest PyTorch that this package was run with.
NEWEST_TORCH ?= 2.14.1

.PHONY: compat compat-newest
compat:  ## the oldest and the newest packages that are admitted; COMPAT="tests/forward -x"
	@# An environment is made once: remove it to see what is the newest today.
	PYTHON=$(PYTHON) bash .ci/compat oldest $(COMPAT)
	PYTHON=$(PYTHON) bash .ci/compat newest $(COMPAT)

compat-newest:  ## the newest PyTorch too, with deepinv and a torchvision for it: 6 GB on Linux
	PYTHON=$(PYTHON) TORCH=$(NEWEST_TORCH) bash .ci/compat newest $(COMPAT)

.PHONY: test-silva test-deepinv
test-silva: .venv-silva/.installed  ## silva-networks as a host, in an environment of its own
	.venv-silva/bin/python -m pytest tests/hosts/test_host_suite.py tests/hosts/test_silva.py \
		-k "silva or two_hosts"

test-deepinv: .venv-deepinv/.installed  ## deepinv as a host, in an environment of its own: 6 GB
	.venv-deepinv/bin/python -m pytest tests/hosts/test_host_suite.py tests/hosts/test_deepinv.py \
		-k "deepinv or two_hosts"

.PHONY: test-peers test-peers-transformers test-peers-deepinv test-peers-silva
test-peers:  ## other projects' suites with ours at work; says what is missing and how to get it
	@status=0; for name in transformers deepinv silva; do \
		$(MAKE) --no-print-directory test-peers-$$name || status=1; \
	done; exit $$status

# PEERS="-x -k greedy" are arguments of pytest.
test-peers-transformers: .venv-transformers/.installed
	.venv-transformers/bin/python .ci/peers/run.py transformers $(PEERS)

test-peers-deepinv: .venv-deepinv/.installed
	.venv-deepinv/bin/python .ci/peers/run.py deepinv $(PEERS)

test-peers-silva: .venv-silva/.installed
	.venv-silva/bin/python .ci/peers/run.py silva $(PEERS)

.PHONY: bench bench-silva
bench: $(VENV)/.installed  ## ours against TorchDEQ and floors; BENCH="--images F.npz --graphs DIR"
	$(BIN)/python benchmarks/bench.py $(BENCH)

bench-silva: .venv-silva/.installed  ## the same with silva-networks, which needs numpy < 2
	.venv-silva/bin/python benchmarks/bench.py --only forward step synthetic silva $(BENCH)

.PHONY: soak
soak: $(VENV)/.installed  ## 20,000 steps in two processes, and whether anything grows: SOAK="--steps 2000"
	$(BIN)/python -m torch.distributed.run --standalone --nproc-per-node 2 benchmarks/soak.py $(SOAK)

.venv-silva/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-silva
	echo '*' > .venv-silva/.gitignore
	.venv-silva/bin/python -m pip install --quiet -c constraints.txt torch
	.venv-silva/bin/python -m pip install --quiet -c constraints.txt \
		"numpy<2" silva-networks==1.2.2 pytest hypothesis -e ".[vision,text]"
	touch $@

# What Transformers' own tests import besides.
.venv-transformers/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-transformers
	echo '*' > .venv-transformers/.gitignore
	.venv-transformers/bin/python -m pip install --quiet -c constraints.txt torch
	.venv-transformers/bin/python -m pip install --quiet -c constraints.txt \
		httpx parameterized psutil pytest -e ".[text]"
	touch $@

# Of three "=", pip takes the index's own build, for which there is a torchvision; a local one, such
# as 2.13.0+cpu, has none there, and torchvision then ends in "operator torchvision::nms does not
# exist".
.venv-deepinv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-deepinv
	echo '*' > .venv-deepinv/.gitignore
	.venv-deepinv/bin/python -m pip install --quiet --disable-pip-version-check \
		"torch===$$(sed -n 's/^torch==//p' constraints.txt)" torchvision deepinv==0.5.0 \
		ptwt pytest hypothesis -e ".[text,vision]"
	.venv-deepinv/bin/python -c "import torchvision, deepinv"
	touch $@

.PHONY: docs docs-links
docs: .venv-docs/.installed  ## the documentation, into site/; warnings, such as a broken link, are errors
	rm -rf .venv-docs/package
	$(PYTHON) benchmarks/importable.py .venv-docs/package
	@# The variable silences what the theme says about its own future.
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict

docs-links: docs  ## ask every external link of the documentation whether it is there
	$(PYTHON) docs/check_links.py site

# The extra `docs` without the package itself: sources are read, not imported, and need no PyTorch.
.venv-docs/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-docs
	echo '*' > .venv-docs/.gitignore
	.venv-docs/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		mkdocs-material "mkdocstrings[python]" ruff
	touch $@

.PHONY: fuzz
fuzz: .venv-fuzz/.installed  ## coverage-guided fuzzing of the parsers; FUZZ_SECONDS=120 for each
	@for name in spec record repository; do \
		.venv-fuzz/bin/python tests/fuzz/fuzz.py $$name -max_total_time=$(FUZZ_SECONDS) \
			-timeout=30 -rss_limit_mb=4096 -artifact_prefix=.venv-fuzz/ || exit 1; \
	done

FUZZ_SECONDS ?= 120

# Atheris has wheels for Linux on x86-64.
.venv-fuzz/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-fuzz
	echo '*' > .venv-fuzz/.gitignore
	.venv-fuzz/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	.venv-fuzz/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		atheris -e ".[patch]"
	touch $@

clean:
	rm -rf $(VENV) .venv-silva .venv-deepinv .venv-transformers .venv-docs .venv-fuzz .venv-compat-* site build dist runs *.egg-info

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) torch
	$(INSTALL) -e ".[test]"
	touch $@
