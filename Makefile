# `make` builds ./pgthaw. `make test` is everything CI runs; it and demo, integration, crash and bench want root.

GO       ?= go
FUZZTIME ?= 30s
PATH     := $(PATH):/usr/local/go/bin
export PATH

.PHONY: build check test static rooms demo integration crash fuzz bench
.DEFAULT_GOAL := build

build:
	@./integration/setup.sh build
	$(GO) build -buildvcs=false -o pgthaw ./cmd/pgthaw

# Under a minute on two cores: the rooms' tests with fewer rounds and without the long ones. What needs root is skipped without it.
check: SHORT = -short
check: static rooms

test: static rooms integration

# The import test is one of cmd/pgthaw's.
static:
	@./integration/setup.sh check
	@unformatted=$$(gofmt -l .); test -z "$$unformatted" || { echo "gofmt -l: $$unformatted" >&2; exit 1; }
	$(GO) vet -tags bench ./...
	$(GO) tool staticcheck -tags bench ./...

# The race detector would sleep a second at each exit of a process.
rooms:
	GORACE=atexit_sleep_ms=0 $(GO) test -race $(SHORT) -timeout 20m $$($(GO) list ./... | grep -v /integration)

demo: build
	@./integration/setup.sh demo
	./integration/demo.sh

# Against PostgreSQL 15, 16, 17 and 18. ARGS="-run TestName -v" chooses.
integration:
	@./integration/setup.sh test
	$(GO) test -count=1 -timeout 20m ./integration $(ARGS)

# Longer campaigns of the tests whose names begin with TestCrash.
crash:
	@./integration/setup.sh test
	PGTHAW_CRASH_ROUNDS=$${PGTHAW_CRASH_ROUNDS:-50} $(GO) test -count=1 -timeout 120m -run '^TestCrash' -v ./integration ./repo/... $(ARGS)

# Every fuzz test of every package, FUZZTIME each.
fuzz:
	./integration/fuzz.sh $(FUZZTIME)

bench: build
	@./integration/setup.sh bench
	$(GO) test -count=1 -timeout 90m -tags bench -run "^TestBench$$" -v ./integration $(ARGS)
