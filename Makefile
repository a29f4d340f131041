# Everything a newcomer needs: `make demo` to see it run, `make test` to see it hold.
SHELL := /bin/bash
CARGO ?= cargo
WEB := gateway/web

.PHONY: demo test fuzz console build check bench clean

# Builds the console and the release binary, then starts the demo.
demo: console
	$(CARGO) run --release --locked -p tidewatch-server --bin tidewatch -- demo $(ARGS)

build: console
	$(CARGO) build --release --locked -p tidewatch-server

# The console is embedded in the binary, so it is built first.
console: $(WEB)/dist/index.html

$(WEB)/dist/index.html: $(WEB)/package-lock.json $(shell find $(WEB)/src $(WEB)/public $(WEB)/index.html -type f 2>/dev/null)
	cd $(WEB) && npm ci --no-audit --no-fund && npm run build

# Unit, property, end-to-end and browser tests; installs what they need where it can.
test: console
	tests/run.sh

# The targets of fuzz/ with coverage, TIDEWATCH_FUZZ_SECONDS each.
fuzz:
	fuzz/run.sh $(ARGS)

# Formatting and lints, as CI runs them.
check: console
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --all-features --locked -- -D warnings
	cd $(WEB) && npm run check

# Measures this machine; the table goes to the terminal, JSON beside it.
bench: build
	$(CARGO) run --release --locked -p tidewatch-server --bin tidewatch -- bench all

clean:
	$(CARGO) clean
	rm -rf $(WEB)/dist $(WEB)/node_modules
