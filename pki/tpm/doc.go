// Package tpm turns hostile TPM structures into the plain structs of package
// pki, makes credentials for EKs, and holds the frozen templates of muster's
// TPM keys. It needs no TPM; package device talks to one.
//
// Every parser here is strict: a size cap before anything else, the whole
// input must be the structure (it is written again and compared), points
// must be on their curve, moduli must have their length. No input makes it
// panic.
package tpm
