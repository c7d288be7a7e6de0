// Package console is the centre's web console: pages for the people who
// approve machines and look after sites. It is served on the operator port
// and is a client of the management API, which it calls inside the process as
// the person who is logged in: what a role may do, what is refused and what
// is written to the audit log is decided there and nowhere else.
//
// Pages are rendered at the server and work without JavaScript, but for live
// updates and keyboard shortcuts. All assets are in the binary. DESIGN.md
// says why things are as they are.
package console
