package lab

import (
	"regexp"
	"strings"

	"github.com/muster-edge/muster/lab/machine"
)

// NodeLine is what the recovery image prints on every console besides its
// screen: "muster-node: <state>: <text>".
var NodeLine = regexp.MustCompile(`muster-node: ([a-z-]+): (.*)`)

// InitLine is the recovery image's first console line.
var InitLine = regexp.MustCompile(`muster-node: init started`)

// DeadLine is what a machine prints whose boot cannot succeed any more.
var DeadLine = regexp.MustCompile(`Kernel panic - not syncing|BdsDxe: No bootable option`)

// milestones translate what firmware and kernel print into words for people
// who have never seen a machine boot from the network. First match wins.
var milestones = []struct {
	pattern *regexp.Regexp
	event   string
	text    string
}{
	{regexp.MustCompile(`>>Start PXE over IPv4`), "firmware-pxe", "firmware asks for an address and a boot file by DHCP"},
	{regexp.MustCompile(`>>Start HTTP Boot over IPv4`), "firmware-http", "firmware asks for an address and a boot URL by DHCP"},
	{regexp.MustCompile(`>>Start PXE over IPv6|>>Start HTTP Boot over IPv6`), "firmware-ipv6", "firmware tries IPv6 (nobody answers in this lab)"},
	{regexp.MustCompile(`NBP file downloaded successfully`), "firmware-loaded", "firmware has the boot file"},
	{regexp.MustCompile(`Downloading NBP file|NBP filename is`), "firmware-loads", "firmware loads the boot file"},
	{regexp.MustCompile(`URI: (http://\S+)`), "firmware-loads", "firmware loads the boot file by HTTP"},
	{regexp.MustCompile(`BdsDxe: failed to load .*Access Denied|Security Violation|Access Denied`), "firmware-refused", "firmware REFUSES the boot file: its signature is not from our key"},
	{regexp.MustCompile(`PXE-E\d+: .*`), "firmware-error", "firmware reports a network boot error"},
	{regexp.MustCompile(`BdsDxe: No bootable option|No bootable option or device`), "firmware-gave-up", "firmware found nothing to boot"},
	{regexp.MustCompile(`EFI stub:`), "kernel-stub", "the boot file runs; kernel is being unpacked"},
	{regexp.MustCompile(`Linux version \d`), "kernel", "kernel starts"},
	{regexp.MustCompile(`Kernel panic - not syncing.*`), "kernel-panic", "kernel PANIC"},
	{InitLine, "init", "recovery image runs (/init started)"},
	{regexp.MustCompile(`slot initrd started`), "slot-initrd", "the loader starts a system from the disk"},
	{regexp.MustCompile(`muster-node: slot [ab] on \S+ is verified`), "slot-root", "the slot's file system is verified and mounted"},
	{regexp.MustCompile(`The data partition is [^"]*`), "slot-data", ""},
	{regexp.MustCompile(`this slot does not start.*|muster: this system cannot start.*|dm-verity device corrupted`), "slot-dead", ""},
}

// agentLine is what the node agent of an installed system logs when its state
// or what it does about its system changes.
var agentLine = regexp.MustCompile(`muster-node\[\d+\]: .* msg=(state|slots) .*reason="([^"]+)"`)

// percent is the progress of an installation: people need each tenth.
var percent = regexp.MustCompile(`(installing [^:]+: \d*)\d %`)

// explain translates a console line. event is "" for a line of no interest.
func explain(text string) (event, words string) {
	for _, m := range milestones {
		if found := m.pattern.FindString(text); found != "" {
			if words = m.text; words == "" {
				words = strings.TrimSpace(found)
			}
			switch m.event {
			case "firmware-error", "kernel-panic":
				words += ": " + found
			}
			return m.event, words
		}
	}
	if m := agentLine.FindStringSubmatch(text); m != nil {
		return "agent-" + m[1], m[2]
	}
	if m := NodeLine.FindStringSubmatch(text); m != nil {
		return "node-" + m[1], m[1] + ": " + percent.ReplaceAllString(strings.TrimSpace(m[2]), "${1}0 %")
	}
	return "", ""
}

// console puts a machine's milestones on the time line.
func (l *Lab) console(name string, line machine.Line) {
	event, words := explain(line.Text)
	if event == "" {
		return
	}
	l.mu.Lock()
	key := name + "\x00" + event + "\x00" + words
	if l.said == nil {
		l.said = map[string]bool{}
	}
	// Firmware paints lines again and again; people need each once per boot.
	// Bounded: beyond some thousand distinct lines the time line is silent,
	// serial.log has them all.
	again := l.said[key] || len(l.said) > 4096
	l.said[key] = true
	l.mu.Unlock()
	if !again {
		l.line.add(line.At, name, event, words, true)
	}
}
