// Package ekcert reads what the makers of TPMs and firmware write: EK
// certificates as they lie in NV, event logs as the kernel shows them, and
// directories of root certificates that people fill. It is used by the
// centre only.
//
// Real certificates and logs break their specifications in known ways. What
// is tolerated is tolerated here, and nowhere else; what a certificate is
// worth is judged by pki.Verify.
package ekcert
