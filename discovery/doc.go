// Package discovery keeps what a node knows of where its peers might be, and
// decides which address to dial next and why. It is the pure core: hints go
// in, dials come out, time and randomness are arguments. Sockets are in the
// room mdns; the dialling, and the proof of who answers, are the caller's.
//
// Nothing that arrives here is trusted. An advert is a reason to dial, at a
// bounded rate, and only a caller that has authenticated the other side makes
// an address proven. DESIGN.md tells why the rules are as they are.
package discovery
