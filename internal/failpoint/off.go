//go:build !failpoint

// Package failpoint lets crash tests stop a process at a named line. In a
// normal build every call is empty and disappears.
package failpoint

// Enabled tells whether this binary was built for crash tests.
const Enabled = false

// Hit does nothing in a normal build.
func Hit(string) {}
