// Package swtpmtest makes and runs software TPMs (swtpm) for tests and for
// the lab: each in its own directory, each with EK certificates of an EK
// authority of its own, each killed when its owner ends.
//
// A TPM made here is as good as a real one for everything that is proved by
// cryptography and as bad as a file for everything that is proved by
// hardware. Its authority must therefore only ever be imported as a lab root.
package swtpmtest
