# SGLANG chooses the release, each in an environment of its own; PYTHON its interpreter (3.11 or 3.12).
SGLANG ?= 0.5.16
PYTHON ?= python3
VENV := $(if $(filter 0.5.16,$(SGLANG)),.venv,.venv-$(SGLANG))
STAMP := $(VENV)/.installed

# What a release can break, in two lists that take about as long: the contract with it, what is checked and
# refused, backends, and some launches; and servers.
CHECKS := $(addprefix tests/test_,$(addsuffix .py,architecture architectures mutations plugin patches cli validate checkpoints \
	requests backends flashinfer_verify verify_modes page_selectors token_selector history memory \
	extending hicache)) \
	tests/test_cpu_ops.py::test_stand_ins_do_what_sglangs_triton_kernels_do \
	tests/test_evaluate.py::test_a_pair_is_evaluated \
	tests/test_launch.py::test_engine_takes_a_dict_and_refuses_a_second_config \
	tests/test_launch.py::test_a_scheduler_that_nobody_checked_ends_in_one_line
SERVED := $(patsubst %,'tests/test_serving.py::test_full_budget_then_small[%]',standalone-chain eagle3-tree \
	standalone-chain-all) \
	tests/test_serving.py::test_metrics_and_server_info \
	tests/test_serving.py::test_updates_of_weights_are_400s_and_touch_none \
	tests/test_serving.py::test_pages_of_16_with_retraction \
	tests/test_serving.py::test_history_follows_the_prefix_and_forgets_with_its_slots \
	$(addprefix tests/test_alone.py::test_,small_budgets_agree_with_the_oracle \
	a_branch_within_a_page_reads_its_own_sketches what_the_host_cache_brings_back_is_sketched_anew) \
	'tests/test_prefill_serving.py::test_the_cache_keeps_kinds_apart[sparse]' \
	'tests/test_tensor_parallel.py::test_two_ranks_draft_and_verify_as_one[standalone-tree]'

# Of all tests, about half of the time: servers, which take one core each.
HALF := $(addprefix tests/test_,$(addsuffix .py,serving tensor_parallel launch inspect gpu_history \
	alone prefill_serving hicache fp8 bench_load))

.PHONY: env demo test test-servers test-others architectures contract contract-checks contract-servers lint format clean

env: $(STAMP)

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
		'sglang==$(SGLANG)' --editable '.[test,plots]'
	touch $(STAMP)

demo: env
	$(VENV)/bin/python -m sts_sglang.tools.demo

test: lint
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=target test-servers test-others

test-servers: env
	$(VENV)/bin/python -m pytest $(HALF)

test-others: env
	$(VENV)/bin/python -m pytest $(addprefix --ignore=,$(HALF))

# Every served architecture on every road, against stock: half an hour.
architectures: env
	$(VENV)/bin/python -m pytest -m architectures tests/test_architectures.py

# With -j2 both at once: a server of the tests takes one core.
contract: contract-checks contract-servers

contract-checks: env
	$(VENV)/bin/python -m pytest $(CHECKS) --deselect tests/test_architectures.py::test_served

contract-servers: env
	$(VENV)/bin/python -m pytest $(SERVED)

lint: env
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: env
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf .venv .venv-* build dist *.egg-info .pytest_cache .ruff_cache
