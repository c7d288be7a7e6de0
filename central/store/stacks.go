package store

import (
	"time"

	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/rollout"
)

// StackReader is what a Reader knows of blobs, of systems and of stacks.
type StackReader interface {
	Blob(tenant string, sha256 fleet.HexBytes) (Blob, error)
	// Blobs returns at most count blobs after a digest.
	Blobs(tenant string, after fleet.HexBytes, count int) ([]Blob, error)
	// BlobBytes is the sum of all sizes.
	BlobBytes(tenant string) (int64, error)
	// ImageBySHA256 finds an image by the digest of its file.
	ImageBySHA256(tenant string, sha256 fleet.HexBytes) (fleet.Image, error)
	// System returns what the node said last about its operating system.
	System(tenant string, node fleet.NodeID) (fleet.SystemReport, error)
	SystemsOfSite(tenant, site string) ([]fleet.SystemReport, error)
	// Systems returns at most count reports after the given node.
	Systems(tenant string, after fleet.NodeID, count int) ([]fleet.SystemReport, error)
	Stack(tenant, name string) (fleet.Stack, error)
	Stacks(tenant string) ([]fleet.Stack, error)
	StackVersion(tenant, stack, version string) (StackVersion, error)
	// StackVersionBySHA256 finds a version by the digest of its envelope.
	StackVersionBySHA256(tenant string, sha256 fleet.HexBytes) (StackVersion, error)
	// StackVersions are those of the stack, newest first.
	StackVersions(tenant, stack string) ([]StackVersion, error)
	Rollout(tenant, name string) (rollout.Rollout, error)
	Rollouts(tenant string) ([]rollout.Rollout, error)
	// RolloutsOfState are those of all tenants.
	RolloutsOfState(state rollout.State) ([]rollout.Rollout, error)
}

// StackTx is what a Tx writes of blobs, of systems and of stacks.
type StackTx interface {
	// AddBlob returns ErrExists if the tenant has it.
	AddBlob(Blob) error
	DropBlob(tenant string, sha256 fleet.HexBytes) error
	PutSystem(fleet.SystemReport) error
	DropSystem(tenant string, node fleet.NodeID) error
	PutStack(fleet.Stack) (fleet.Stack, error)
	PutRollout(rollout.Rollout) (rollout.Rollout, error)
	// DeleteRollout deletes the rollout of exactly this revision.
	DeleteRollout(tenant, name string, revision int64) error
	// DeleteStack deletes the stack of exactly this revision with its
	// versions.
	DeleteStack(tenant, name string, revision int64) error
	// DeleteStackVersion deletes one version; ErrNotFound if there is none.
	DeleteStackVersion(tenant, stack, version string) error
	// AddStackVersion returns ErrExists if the version or the digest is
	// taken.
	AddStackVersion(StackVersion) error
	// DeleteSite deletes the site of exactly this revision with the addresses
	// given there. Its documents stay, since nodes may still hold them.
	DeleteSite(tenant, name string, revision int64) error
}

// Blob is a file that the centre serves by its digest.
type Blob struct {
	Tenant string
	SHA256 fleet.HexBytes
	Size   int64
	Stored time.Time
	// By is who sent it.
	By string
}

// StackVersion is a stack version as it was signed.
type StackVersion struct {
	Tenant  string
	Stack   string
	Version string
	// SHA256 is over the envelope.
	SHA256    fleet.HexBytes
	Published time.Time
	By        string
	// KeyID names the release key that signed it.
	KeyID    string
	Envelope []byte
}
