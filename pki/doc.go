// Package pki is the pure core of muster's trust: what evidence a machine
// gives, what the centre concludes from it (Verify), and what certificates
// look like. It uses the standard library's cryptography only, does no I/O
// and reads no clock.
//
// The rooms beside it touch the outside: tpm turns hostile TPM bytes into
// the plain structs of this package, ekcert does the same for EK
// certificates and event logs, stepca keeps the CA.
//
// DESIGN.md says what is checked, in which order, and why.
package pki
