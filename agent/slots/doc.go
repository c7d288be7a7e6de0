// Package slots is a node's care for its own system: it gathers what is known
// of the two slots, asks firmware.PlanUpdate what to do next, does it, and
// asks again. What it has to remember is in the record on the meta partition
// (firmware.Meta), which is also readable when the data partition is not; a
// few notes that mean nothing without the data partition are in files there.
//
// Nothing of it is in agent/journal: that refuses what an older program wrote
// less of, and the system before must be able to read all that the new one
// left behind.
//
// Disk, loader, images and cluster are small interfaces: the rooms that know
// them are firmware/disk, firmware/efi, agent/fetch and cluster-bootstrap/k3s.
package slots
