// Package journal keeps on disk what a node must not forget about its cluster:
// the part of clusterbootstrap.Disk that the node agent writes, and how often
// the agent was started.
//
// Each write goes to two copies, one after the other, each by fsync of a new
// file, rename and fsync of the directory. A power cut at any point leaves one
// whole copy that holds everything that was acknowledged; a copy that a bad
// disk damaged later is mended from the other. When no copy can be read, the
// journal is never taken for an empty one: a node that forgot that it is a
// member could found a second cluster. It says ErrDamaged, and a person
// decides.
//
// What k3s itself leaves on the disk and the mark in the TPM are not here:
// they are observed anew each time.
package journal
