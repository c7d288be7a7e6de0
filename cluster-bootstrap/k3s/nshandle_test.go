package k3s

import (
	"os"

	"github.com/vishvananda/netns"
)

// nsHandle keeps f's namespace under a descriptor of its own.
func nsHandle(f *os.File) netns.NsHandle { return netns.NsHandle(f.Fd()) }
