# `make` builds ./pgthaw. `make test` is everything CI runs; it and demo, integration, crash and bench want root.

GO       ?= go
FUZZTIME ?= 30s
ROOMS     = $$($(GO) list ./... | grep -v /integration)
PATH     := $(PATH):/usr/local/go/bin
export PATH

.PHONY: build check test static rooms demo integration crash suites fuzz bench
.DEFAULT_GOAL := build

build:
	@./integration/setup.sh build
	$(GO) build -buildvcs=false -o pgthaw ./cmd/pgthaw

# The rooms' tests with fewer rounds and without the long ones, under the race detector. What needs root is skipped without it.
check: static
	@# The detector would sleep a second at each exit of a process.
	GORACE=atexit_sleep_ms=0 $(GO) test -race -short -timeout 20m $(ROOMS)

test: check rooms integration

# The import test is one of cmd/pgthaw's.
static:
	@./integration/setup.sh check
	@unformatted=$$(gofmt -l .); test -z "$$unformatted" || { echo "gofmt -l: $$unformatted" >&2; exit 1; }
	$(GO) vet -tags bench ./...
	$(GO) tool staticcheck -tags bench ./...

# All of the rooms' tests.
rooms:
	$(GO) test -timeout 20m $(ROOMS)

demo: build
	@./integration/setup.sh demo
	./integration/demo.sh

# Against PostgreSQL 15, 16, 17 and 18, whose servers wait for the disk half of the time. ARGS="-run TestName -v" chooses.
integration:
	@./integration/setup.sh test
	$(GO) test -count=1 -timeout 40m -parallel $$(($$(nproc) * 2)) ./integration $(ARGS)

# Longer campaigns of the tests whose names begin with TestCrash. PGTHAW_CRASH_ROUNDS is how long. PGTHAW_CRASH_DIR names a
# directory in which TestCrashCampaign keeps its seed, how far it came, what it hit, and a log: run again, it goes on from there.
# SIGTERM to integration.test ends it after the cycle under way.
#   make crash PGTHAW_CRASH_ROUNDS=1000 PGTHAW_CRASH_DIR=$$HOME/campaign ARGS="-run ^TestCrashCampaign$$"
crash:
	@./integration/setup.sh test
	PGTHAW_CRASH_ROUNDS=$${PGTHAW_CRASH_ROUNDS:-50} $(GO) test -count=1 -timeout 24h -run '^TestCrash' -v ./integration ./fusefs ./repo/... $(ARGS)

# What others wrote to test file systems and PostgreSQL, on thawed directories: PostgreSQL's regression and recovery suites, fio,
# stress-ng. About an hour.
suites:
	@./integration/setup.sh suites
	PGTHAW_SUITES=$${PGTHAW_PG_PREFIX:-/opt}/pg15-suites $(GO) test -count=1 -timeout 4h -run '^TestSuite' -v ./integration $(ARGS)

# Every fuzz test of every package, FUZZTIME each.
fuzz:
	./integration/fuzz.sh $(FUZZTIME)

bench: build
	@./integration/setup.sh bench
	$(GO) test -count=1 -timeout 90m -tags bench -run "^TestBench$$" -v ./integration $(ARGS)
