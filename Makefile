# The few verbs of the project. Each works on a fresh Debian machine that has Rust and make; what else is missing is
# installed by the system's package manager (see scripts/setup.sh).

.DEFAULT_GOAL := help
.PHONY: help run test check bench crash

help: ## Show this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST)

run: ## Build and run the gateway, with a first user and key
	@scripts/run.sh

test: ## Run everything that must pass: format, lints, docs, tests, SDKs
	@scripts/test.sh

check: ## Format, lints and docs only
	@scripts/setup.sh test
	@scripts/check.sh

crash: ## Kill the gateway and its database under load, 200 times (ROUNDS=n for another number)
	@scripts/setup.sh test
	@TOLLGATE_CRASH_ROUNDS=$(or $(ROUNDS),200) cargo test --locked --test gateway -- crash

bench: ## Compare the gateway, bare Pingora and nginx side by side (ARGS="--quick" for a glance)
	@scripts/setup.sh build
	@cargo bench --bench side_by_side --locked -- $(ARGS)
