// Package mdns is the multicast edge of discovery: it advertises a node on
// every usable link and hands what it hears to the peer table as hints. It
// decides nothing about peers.
//
// Records and message format come from hashicorp/mdns and miekg/dns; sockets,
// queries, announcements, goodbyes and the rules for answering are our own.
// docs/adr/0004-mdns.md says why. Linux only.
package mdns
