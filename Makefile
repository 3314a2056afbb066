# The lab's commands. A virtual environment in .venv is made on first use; nothing else is needed but Python >= 3.11.
#   make          build the book           make test      prove it
#   make lab      JupyterLab               make chapters  run all notebooks and store their outputs
#   make record   measure on this GPU      make tune      measure the trials of block sizes on it
#   make metal    all that needs a GPU: its tests, record, tune, notebooks, sanitizer
#   make compiled run what the kernels compile to, on the CPU
#   make experiments, make train: the long CPU runs
# TORCH_INDEX=<url> takes torch from another wheel index, PYTHON=<python> another interpreter: when .venv is made, so
# remove it first to change one of them.

PYTHON ?= python3
PY := .venv/bin/python
# One thread and one instruction set, so that stored outputs are the same on every CPU.
# torch.compile's cache knows no instruction sets: what it keeps of this one would spoil other processes.
NOTEBOOK_ENV := OMP_NUM_THREADS=1 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 OPENBLAS_CORETYPE=Haswell TORCHINDUCTOR_FX_GRAPH_CACHE=0
JOBS ?= 2

.DEFAULT_GOAL := book
.PHONY: book test lab chapters record tune metal experiments train table bugs compiled sanitize lint clean

book: .venv/ready
	.venv/bin/jupyter-book build . --path-output . -W -n --keep-going -q
	@echo "The book: file://$(CURDIR)/_build/html/index.html"

test: .venv/ready-test
	$(NOTEBOOK_ENV) $(PY) -m pytest -n $(JOBS) --dist loadscope
	$(NOTEBOOK_ENV) $(PY) -m labkit.notebooks test -n $(JOBS)

lab: .venv/ready-lab
	$(PY) -m jupyterlab chapters

chapters: .venv/ready
	$(PY) -m labkit.notebooks run

record: .venv/ready
	$(PY) -m kernels record $(if $(DRY),--dry)

tune: .venv/ready
	$(PY) -m kernels tune $(if $(DRY),--dry)

# Stages of labkit/metal.py one after the other; STAGES="tests record" for some, SECONDS=590 for all of them together.
metal: .venv/ready-test
	$(PY) -m kernels metal $(STAGES) $(if $(SECONDS),--seconds $(SECONDS)) $(if $(DRY),--dry)

experiments: .venv/ready
	$(PY) -m kernels experiments $(NAME)

train: .venv/ready
	$(PY) -m labkit.train

# What runs where: compiles one call of every kernel for eight GPUs. Minutes; then run the page again.
table: .venv/ready
	$(PY) -m kernels codegen --table
	$(PY) -m labkit.notebooks run chapters/what_runs_where.ipynb

# Plants the bugs listed in the test files, one at a time, in a copy, and shows that the tests catch them. Minutes.
bugs: .venv/ready-test
	$(PY) tests/planted_bugs.py $(TOPIC)

# Without a GPU: compiles the kernels for an H200, then for an A100, and runs their PTX on the CPU in every test that
# runs a kernel (labkit/ptx.py); accesses out of bounds and races are found too. Minutes.
compiled: .venv/ready-test
	for gpu in sm_90 sm_80; do LAB_PTX=$$gpu OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --dist loadscope --on-device $(TESTS) || exit 1; done

# Looks for accesses out of bounds and for races, on a GPU, while the tests run the kernels. compute-sanitizer comes
# with the CUDA toolkit; under it the tests take an hour or more (TESTS=tests/test_gqa.py for one file).
sanitize: .venv/ready-test
	@command -v compute-sanitizer > /dev/null || { echo "compute-sanitizer is missing; it comes with NVIDIA's CUDA toolkit"; exit 1; }
	for tool in memcheck racecheck; do \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 1 \
	    $(PY) -m pytest -q --on-device $(TESTS) || exit 1; done

lint: .venv/ready-test
	$(PY) -m ruff check .
	$(PY) -m labkit.notebooks lint

.venv/ready: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; name one: make PYTHON=python3.12"; exit 1; }
	@test -x $(PY) || $(PYTHON) -m venv .venv || { echo "The venv module is missing (Debian and Ubuntu: apt install python3-venv)"; rm -rf .venv; exit 1; }
	$(if $(TORCH_INDEX),$(PY) -m pip install -q --index-url $(TORCH_INDEX) "$$(grep '^torch==' requirements.txt)")
	$(PY) -m pip install -q --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/ready-test: .venv/ready requirements-test.txt
	$(PY) -m pip install -q --disable-pip-version-check -r requirements-test.txt
	@touch $@

.venv/ready-lab: .venv/ready
	$(PY) -m pip install -q --disable-pip-version-check "jupyterlab>=4.4,<5"
	@touch $@

clean:
	rm -rf _build
