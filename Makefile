# One command each: makes .venv, installs torch and fishfast with its extension, and runs.
#   make demo                            the demo on real data, with pictures in demo-pictures/
#   make test                            the tests, in two processes; its head says what it leaves out
#   make test-long                       the exhaustive ones
#   make test-card                       those for a GPU, on a simulated one
#   make test TORCH=torch                with another torch, here the newest
# torch and triton are those that were tested, and all else is as in constraints.txt. Where torch brings
# a triton (its builds for CUDA do), that one stays.
TORCH ?= torch==2.13.0
TRITON ?= triton==3.9.0
CONSTRAINTS ?= constraints.txt
PYTHON ?= python3
VENV ?= .venv
BENCH_SET ?= cpu
BENCH_SECONDS ?= 1080
RUN := $(VENV)/bin/python
INSTALL := $(RUN) -m pip install $(CONSTRAINTS:%=-c %)

.PHONY: demo test test-long test-card test-newest constraints doctest lint bench mutants clean

demo: $(VENV)/installed
	$(RUN) -m fishfast demo --png demo-pictures

# torch's idle threads would spin on the other process's core; the order leaves no long file last.
test: $(VENV)/installed
	OMP_WAIT_POLICY=passive $(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# The exhaustive grids, of which make test runs a thin cut.
test-long: $(VENV)/installed
	OMP_WAIT_POLICY=passive $(RUN) -m pytest -n 2 --no-loadscope-reorder -m long

# The tests for a GPU, on a card that is simulated: needs a torch without CUDA. With
# CARD_TESTS=tests it runs all, in which a process may still die.
CARD_LEAST ?= 115# must pass, or some were lost without a word
CARD_TESTS ?= tests/test_simulated_card.py tests/test_cuda.py tests/test_capturable_cuda.py \
	tests/test_topk_mask_cuda.py
test-card: $(VENV)/installed
	OMP_WAIT_POLICY=passive $(RUN) -m pytest -n 2 --no-loadscope-reorder -m gpu \
		--simulated-card --card-least=$(CARD_LEAST) $(CARD_TESTS)

# Before a release: everything at its newest, in an environment of its own.
test-newest:
	rm -rf .venv-newest
	$(MAKE) test VENV=.venv-newest TORCH=torch TRITON=triton CONSTRAINTS=

# Writes constraints.txt: the newest of everything but of torch, triton and what .ci/held.txt names.
constraints:
	folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT \
	&& $(MAKE) "$$folder/bench" "$$folder/lint" VENV="$$folder" CONSTRAINTS=.ci/held.txt \
	&& "$$folder/bin/python" .ci/freeze.py > "$$folder/constraints.txt" \
	&& cp "$$folder/constraints.txt" constraints.txt

doctest: $(VENV)/installed
	$(RUN) -m pytest --doctest-modules fishfast

# Breaks the CUDA kernels in every way that simt/mutants.py knows: some minutes a kernel.
mutants: $(VENV)/installed
	$(RUN) tests/simt/mutate.py

# What this machine's CPU does, in at most 18 minutes; what was not reached is named. The
# report is written even if a benchmark failed, and names it.
bench: $(VENV)/bench
	mkdir -p bench/out
	rm -f bench/out/bench.json  # a run that breaks off writes none, and the last one's is not its
	FISHFAST_BENCH=$(BENCH_SET) FISHFAST_BENCH_SECONDS=$(BENCH_SECONDS) $(RUN) -m pytest bench -s \
		--benchmark-enable --benchmark-json=bench/out/bench.json; \
	status=$$?; $(RUN) bench/report.py bench/out/bench.json && exit $$status

lint: $(VENV)/lint
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(shell git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')
	$(RUN) -m mypy

# torch comes first, by itself: any other package would choose its build. What compiles the extension
# is of the versions that were tested, too, so it is not pip that brings it. The extras come by the
# name of what is installed: a second -e would compile again.
$(VENV)/installed: pyproject.toml setup.py CMakeLists.txt $(CONSTRAINTS) $(wildcard csrc/*)
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(INSTALL) "$(TORCH)"
	$(RUN) -m pip show -q triton || $(INSTALL) "$(TRITON)"
	$(INSTALL) "setuptools>=77" pybind11 ninja cmake
	$(INSTALL) --no-build-isolation -e ".[test]"
	touch $@

# Peers to measure against; backpack alone, or it would bring torchvision and with it another torch.
$(VENV)/bench: $(VENV)/installed
	$(INSTALL) "fishfast[bench]"
	$(INSTALL) --no-deps backpack-for-pytorch
	touch $@

$(VENV)/lint: $(VENV)/installed
	$(INSTALL) "fishfast[lint]"
	touch $@

clean:
	rm -rf $(VENV) .venv-newest build *.egg-info fishfast/*.so bench/out demo-pictures .pytest_cache .mypy_cache .ruff_cache
