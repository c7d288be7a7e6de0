// Package pxe decides what a machine that asks the network for a boot image
// is told. It is the pure core of network boot: it knows the facts of a DHCP
// packet, what the operator wants, and the quirks of firmware, and it answers
// with a Reply that carries a reason for the person watching. It opens no
// socket and reads no clock.
//
// The rooms beside it do the work: dhcp speaks DHCP and proxyDHCP, tftp and
// httpboot hand out the image, server composes them.
//
// Three modes exist. Full: muster leases addresses on a provisioning network.
// Proxy: another server leases, muster adds the boot part beside it. Off:
// nothing is sent; Advice prints the options to set in the other server.
//
// Everything in a Request is a claim by an unproven machine. A MAC address or
// a UUID chooses what is *offered*, never what is trusted, and nothing secret
// is served. DESIGN.md tells why the rules are as they are.
package pxe
