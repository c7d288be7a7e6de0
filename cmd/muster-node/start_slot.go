package main

import (
	"os"

	"github.com/muster-edge/muster/agent/initrd"
)

// startSlot becomes the init of a slot's initrd, if this is one, and does not
// return then.
func startSlot() {
	if os.Getpid() == 1 && initrd.IsSlot() {
		initrd.Run(version)
	}
}
