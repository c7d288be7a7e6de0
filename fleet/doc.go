// Package fleet is muster's vocabulary: the nouns that every other package
// speaks (Tenant, Site, Node, Request, Image, Charter, Admission, ...), their
// identifiers, their states, and their validation.
//
// It is the leaf of the import graph: it imports only the standard library
// and its own sub-packages (statement, audit, text). It does no I/O and reads
// no clock; time is always an argument.
//
// Every object of the management plane has a Meta (tenant, name, labels,
// generation). What people want is a Spec, what nodes say is a Status.
// docs/terms.md explains the words.
package fleet
