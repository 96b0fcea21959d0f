//go:build tools

// Package containerd pins the container runtime, apart from Kubernetes: both want modules of k8s.io, of different versions.
package containerd

import (
	_ "github.com/containerd/containerd/v2/cmd/containerd"
	_ "github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2"
	_ "github.com/containerd/containerd/v2/cmd/ctr"
)
