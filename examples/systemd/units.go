// Package systemd holds the node's systemd units, as people install them by hand
// and as slot images have them.
package systemd

import "embed"

// Units are the files, by name.
//
//go:embed *.service *.timer
var Units embed.FS
