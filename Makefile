# muster: the developer's desk. `make help` lists what there is.
# On a fresh machine with git, make and Go 1.26, `make lab` and `make test`
# install the rest themselves (internal/dev/prerequisites says what).

SHELL       := /bin/bash
.DELETE_ON_ERROR:
VERSION     ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo 0.0.0-dev)
# The time floor: of the commit, not of the build, so that the same source gives the same bytes.
BUILDTIME   ?= $(shell git log -1 --format=%cI 2>/dev/null)
LDFLAGS     := -s -w -X main.version=$(VERSION)
GOBUILD      = CGO_ENABLED=0 go build -trimpath -ldflags "$(LDFLAGS)"
STATICCHECK := honnef.co/go/tools/cmd/staticcheck@v0.8.2
SHARD       ?= 1
FUZZTIME    ?= 60s

.PHONY: help build standin lab test test-fast test-full bench fuzz fuzz-long lint sim generate deb fresh-check clean FORCE

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

build: bin/muster bin/muster-node ## build bin/muster and bin/muster-node (static)

bin/muster: FORCE
	@$(GOBUILD) -o $@ ./cmd/muster

bin/muster-node: LDFLAGS += -X main.buildTime=$(BUILDTIME)
bin/muster-node: FORCE
	@$(GOBUILD) -o $@ ./cmd/muster-node

standin: bin/k3s-standin ## build bin/k3s-standin, the stand-in for k3s in tests (own module; long from a cold cache)

bin/k3s-standin: FORCE
	@cd lab/standin && CGO_ENABLED=0 go build -tags labstandin -trimpath -ldflags "-s -w" -o $(CURDIR)/$@ .

# The node agent that stops at a named line (MUSTER_FAILPOINT), for the scenario powercut.
bin/muster-node-crash: LDFLAGS += -X main.buildTime=$(BUILDTIME)
bin/muster-node-crash: FORCE
	@CGO_ENABLED=0 go build -trimpath -tags failpoint -ldflags "$(LDFLAGS)" -o $@ ./cmd/muster-node

lab: ## an empty machine from power-on to a site's first server (the main job); SITE=1: three machines, one site
	@internal/dev/prerequisites lab
	@$(MAKE) --no-print-directory build
	@[ -n "$$K3S" ] || command -v k3s >/dev/null || $(MAKE) --no-print-directory standin
	bin/muster lab run $(if $(SITE),site,install)

test: ## what CI runs: everything but the long scenarios, with the time of each part
	@internal/dev/prerequisites lab test
	@internal/dev/test

test-fast: ## unit tests and simulation only, no root, no VM
	@internal/dev/test fast

test-full: ## every scenario; SHARD=n picks a shard
	@internal/dev/prerequisites lab test
	@internal/dev/test full $(SHARD)

bench: ## measures beside named peers -> docs/benchmarks.md; PART=tftp (http, dhcp, fifty, enroll, storm) for one
	@internal/dev/prerequisites lab test bench
	@internal/dev/bench $(PART)

fuzz: ## every fuzz target for FUZZTIME (60s)
	@internal/dev/fuzz $(FUZZTIME)

fuzz-long: ## every fuzz target for 10 minutes -> docs/fuzz.md; goes on where it stopped
	@internal/dev/fuzz 10m resume

sim: ## simulate sites: SEEDS=N plays N seeds of each kind; SEED=S KIND=K V=1 replays one
	@go test ./cluster-bootstrap/sim -run TestSeeds -count=1 -v -timeout 0

lint: ## gofmt, go vet, staticcheck
	@internal/dev/test lint

deb: bin/muster ## bin/muster_VERSION_ARCH.deb: the centre, its unit, manual pages, shell completion
	@internal/dev/deb
	@internal/dev/deb-check

generate: ## protobuf and SQL code (needs protoc)
	@internal/dev/prerequisites generate
	@internal/dev/generate

fresh-check: ## `make lab` and `make test-fast` in a new root with only git, make and Go
	@internal/dev/fresh-check

clean: ## remove what was built here
	rm -rf bin
