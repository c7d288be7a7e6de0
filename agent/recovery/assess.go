package recovery

import (
	"fmt"

	"github.com/muster-edge/muster/agent"
	"github.com/muster-edge/muster/agent/recovery/netup"
)

// NoTPM is what the screen says on a machine without a TPM.
const NoTPM = "this machine has no TPM 2.0 (or it is switched off in the firmware setup)"

// conditions is all that the machine's state follows from.
type conditions struct {
	// Booted: devices that were there at power-on have been looked at.
	Booted bool
	// SiteError says why site.json cannot be used.
	SiteError string
	// TPMError says why there is no identity; empty while still looking and
	// once there is one.
	TPMError string
	NICs     []netup.NIC
	// Progress is what the Enroller said last; nil before it said anything
	// since it was started.
	Progress *Progress
	Words    string
	Centre   string
	// VLAN is the tag that site.json demands; 0: none.
	VLAN int
	// Scan is how a scan stands; nil in an image that enrolls.
	Scan *Progress
}

// assess derives state and text. What stands in the way first is shown: a
// machine without TPM that also lacks a cable needs the TPM first, since the
// cable alone would not help.
func assess(c conditions) (agent.State, string) {
	up := false
	for _, n := range c.NICs {
		up = up || n.Phase == netup.Up
	}
	switch {
	case c.SiteError != "":
		return agent.Failed, c.SiteError
	case c.Scan != nil:
		return c.Scan.State, c.Scan.Text
	case c.TPMError != "" && c.Booted: // before, its driver may still come
		return agent.Failed, c.TPMError
	case !c.Booted && len(c.NICs) == 0:
		return agent.Booting, "looking for devices"
	case !up:
		return agent.Network, networkText(c.NICs, c.VLAN)
	case c.Progress == nil:
		return agent.Time, "address " + firstAddress(c.NICs) + ", asking " + c.Centre
	case c.Progress.State == agent.Enrolled:
		text := c.Progress.Text
		if text == "" {
			text = "waiting for orders"
		}
		return agent.Enrolled, "enrolled as " + c.Words + "; " + text
	}
	return c.Progress.State, c.Progress.Text
}

func networkText(nics []netup.NIC, vlan int) string {
	link, broken := 0, ""
	for _, n := range nics {
		switch n.Phase {
		case netup.Asking:
			link++
		case netup.Broken:
			broken = n.Name + ": " + n.Detail
		}
	}
	switch {
	case len(nics) == 0:
		return "no network interface found; still looking"
	case link > 0 && vlan != 0:
		return fmt.Sprintf("cable on %d of %d interfaces; waiting for an address from DHCP on VLAN %d: does the switch port carry it, tagged?", link, len(nics), vlan)
	case link > 0:
		return fmt.Sprintf("cable on %d of %d interfaces; waiting for an address from DHCP", link, len(nics))
	case broken != "":
		return broken
	case len(nics) == 1:
		return "waiting for a link on " + nics[0].Name + " (" + nics[0].MAC + "); is the cable plugged in and the switch on?"
	}
	return fmt.Sprintf("waiting for a link on any of %d interfaces; is a cable plugged in and the switch on?", len(nics))
}

func firstAddress(nics []netup.NIC) string {
	for _, n := range nics {
		if n.Phase == netup.Up {
			return n.Address.Addr().String() + " on " + n.Device
		}
	}
	return "?"
}
