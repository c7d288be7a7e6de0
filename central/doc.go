// Package central is the centre: it composes enrollment, the certificate
// authority, the store and the boot role into two HTTPS endpoints, one for
// nodes and one for operators, and holds the acts of operators.
//
// It decides little itself: what may be approved is in package enroll, what
// evidence proves in pki, what may boot in pxe. What it owns is that every
// act is one transaction with its audit record. DESIGN.md says why things
// are as they are.
package central
