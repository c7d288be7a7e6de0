package peer

import "time"

// Limits bound what others can cause. Zero fields get the defaults.
type Limits struct {
	// Port is where this node serves, as it tells peers (7445).
	Port uint16
	// Unproven bounds connections that are not past hello (512); of one source
	// address (16).
	Unproven, UnprovenPerSource int
	// PerSource is how many connections a minute a source address may open
	// (60, in bursts of as many).
	PerSource int
	// Proven bounds connections of one admitted node (8).
	Proven int
	// Hello is how long a connection may take from its beginning to the end of
	// hello (15 s).
	Hello time.Duration
	// HelloPerKey is how many hellos a minute a key may say (60).
	HelloPerKey int
	// ProvePerKey is how many times a minute a key may have this node prove
	// what it runs (12).
	ProvePerKey int
	// TurnPerKey is how many times a minute a key may ask for its turn (30):
	// each has this node ask its cluster a few things.
	TurnPerKey int
	// BlobsPerKey is how many times a minute a key may ask about files (1200);
	// BlobReaders bounds files that are read for peers at once (4), BlobsPerNode
	// those for one (2), BlobRate the bytes a second for all (64 MiB).
	BlobsPerKey, BlobReaders, BlobsPerNode int
	BlobRate                               int64
	// Strangers is how many hellos a minute of keys that nobody knows are
	// looked at (600).
	Strangers int
	// Idle is how long a proven connection may be silent (5 min).
	Idle time.Duration
	// EscrowBlobs and EscrowSize bound what is kept for each node (2 blobs)
	// and the size of a blob (512 MiB); EscrowTotal all bytes (4 GiB).
	EscrowBlobs int
	EscrowSize  int64
	EscrowTotal int64
}
