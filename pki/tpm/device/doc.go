// Package device talks to a TPM 2.0: the kernel's /dev/tpmrm0, or the unix
// socket of a software TPM. It gives a node what enrollment needs (EKs with
// their certificates, AK, LDevID, activation, statements) and a signer for
// TLS.
//
// AK and LDevID are primary keys from frozen templates, made again when
// needed; nothing is stored in the TPM and nothing is persisted. Everything
// here uses empty hierarchy passwords: a TPM that somebody took ownership of
// gives ErrOwned.
package device
