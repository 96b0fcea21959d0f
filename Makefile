# fabricd: `make lab` shows it, `make test` tests it.

# The lab that `lab` and `lab-down` are about; any number can be up side by side.
NAME ?= fabric

# How `image` and `e2e` compile: release, or dev to have it sooner.
PROFILE ?= release

.DEFAULT_GOAL := help
.PHONY: help deps build lab lab-down test machines machines-down test-machines kernels bench faults flannel image deb release e2e api-server helm lint audit

help: ## List the targets
	@sed -nE 's/^([a-z0-9-]+):.*## (.*)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 12

deps: ## Install what is missing for the lab and the tests (apt; elsewhere: say what is missing)
	@tests/deps

build: ## Build all binaries
	cargo build --workspace

lab: root deps build ## Bring up a cluster of three nodes, show that it works, leave it up
	@target/debug/lab --name $(NAME) up

lab-down: root ## Take it down again
	@target/debug/lab --name $(NAME) down

test: root deps build ## Run all tests, several suites at once
	@tests/deps test
	@tests/run

# Kernels by tests/src/machines/kernels.txt, with what differs: MACHINES="6.1 newest,memory=512,nics=2".
MACHINES ?= 6.1 newest

machines: root deps build ## Bring up a cluster whose nodes have kernels of their own, by QEMU, leave it up
	@tests/deps machines
	@target/debug/machines --name $(NAME) up $(MACHINES)

machines-down: root ## Take it down again
	@target/debug/machines --name $(NAME) down

test-machines: root deps build ## Run the tests on Debian's kernels, by QEMU (SHORT=1: what CI runs; ONLY=name)
	@tests/deps machines
	@SHORT=$(SHORT) tests/machines $(ONLY)

kernels: build ## Keep what test-machines has noted of each kernel, and show it in docs/kernels.md
	@target/debug/machines record

image: ## Build the container image, without Docker, into target/image/fabricd.tar
	@PROFILE=$(PROFILE) deploy/image/build

deb: ## Build a Debian package into target/debian
	@deploy/deb/build

release: ## Build a release for amd64 and arm64 into target/release-files (REGISTRY=registry.example/team; docs/releasing.md)
	@tests/deps release
	@PROFILE=$(PROFILE) deploy/release/build

e2e: root ## Run the manifests on a real Kubernetes of today, or VERSION=1.20, built on first use (SCENARIO=conformance, network-policy, no-kube-proxy, or with -dual: upstream's tests)
	@tests/deps e2e
	tests/e2e/kubernetes
	PROFILE=$(PROFILE) deploy/image/build
	tests/e2e/run $(SCENARIO)

api-server: deps ## Try the lease store in Kubernetes, and Services, on real kube-apiservers, today's and 1.20's, built on first use
	@tests/deps api-server
	tests/e2e/api-server

helm: ## Check that the Helm chart says what the manifests say (needs helm)
	@deploy/helm/check

faults: root deps build ## Try every fault that must cost nothing (SEEDS=20 times; FAULTS="1 17" only these)
	target/debug/faults $(FAULTS)

flannel: root deps build ## Take over and give back every kind of flannel node (ROUNDS=5; SEEDS=5; KIND="dual direct": this one)
	tests/flannel

# Any arguments of `bench`: BENCH="cold-start --peers 100,1000", FLANNELD=/path to have flanneld in the same run.
BENCH ?=

# What image and package carry is measured: static programs, which start sooner and take less memory than linked ones.
STATIC := $(shell uname -m)-unknown-linux-musl

bench: root deps ## Measure fabricd beside iproute2, a VXLAN made by hand and flanneld (BENCH=cold-start: that alone)
	@tests/deps bench
	cargo build --release -p fabric-tests
	TARGET=$(STATIC) PROFILE=release deploy/image/programs
	FABRIC_BIN_DIR=$(CURDIR)/target/$(STATIC)/release target/release/bench $(BENCH)

lint: deps ## Check format and lints
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings

# What `audit` asks cargo-deny; advisories need the network, the others only the crates.
CHECKS ?= licenses bans sources advisories
audit: ## Check the dependencies: licences, duplicates, sources, known holes (deny.toml), unused ones
	@tests/deps audit
	cargo deny check $(CHECKS)
	cargo machete

.PHONY: root
root:
	@[ $$(id -u) = 0 ] || { echo 'network namespaces need root: sudo -E env "PATH=$$PATH" make $(MAKECMDGOALS)' >&2; exit 1; }
