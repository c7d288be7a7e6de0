package agent

import (
	"fmt"
	"strings"
	"time"
)

// View is everything the screen shows. Strings in it may come from the
// network or the firmware; Screen makes them printable.
type View struct {
	Version string
	Image   string
	// Words and EK are empty until the TPM has answered. EK is hex.
	Words, EK, Node string
	State           State
	Text            string
	// InState is how long the machine has been in State.
	InState time.Duration
	Request string
	Centre  []string
	NICs    []NICView
	// Notes are lasting remarks (clock was wrong, no watchdog, ...).
	Notes []string
	// Recent are the latest console lines, oldest first.
	Recent []string
	// Scan is for an image that scans machines: no network is shown, and how
	// it ended can be read from across the room.
	Scan bool
}

// NICView is one interface on the screen.
type NICView struct {
	Name, MAC string
	// Text says what the interface does: "no cable", "10.77.0.20/24", ...
	Text string
}

const (
	minWidth   = 40
	maxNICs    = 8
	maxRecent  = 6
	shortEK    = 32 // hex digits shown: 128 bits are enough to compare by eye
	labelWidth = 10
)

// InitLine is the first line on every console. Scenarios wait for it.
func InitLine(version string) string {
	return "muster-node: init started (" + printable(version, 80) + ")"
}

// StateLine is printed on every console for each change of state or text.
func StateLine(s State, text string) string {
	return "muster-node: " + s.String() + ": " + printable(text, 400)
}

// Banner is how a scan stands, in letters for somebody who walks along a row
// of machines; nil while it is not over.
func Banner(s State) []string {
	switch s {
	case Scanned:
		return strings.Split(bannerDone, "\n")
	case Failed:
		return strings.Split(bannerStop, "\n")
	}
	return nil
}

// No wider than minWidth.
const (
	bannerDone = `
   #####    ####   #    #  ######
   #    #  #    #  ##   #  #
   #    #  #    #  # #  #  #####
   #    #  #    #  #  # #  #
   #    #  #    #  #   ##  #
   #####    ####   #    #  ######
`
	bannerStop = `
   ####   #####   ####   #####
  #         #    #    #  #    #
   ####     #    #    #  #    #
       #    #    #    #  #####
       #    #    #    #  #
   ####     #     ####   #
`
)

// Screen draws v for a text screen of the given width: ASCII only, no line
// longer than width, lines separated by "\n", none at the end.
func Screen(v View, width int) string {
	width = max(width, minWidth)
	var out []string
	put := func(s string) { out = append(out, clip(s, width)) }
	rule := strings.Repeat("-", width)
	field := func(label, value string) {
		for i, part := range wrap(printable(value, 800), width-labelWidth-1) {
			if i > 0 {
				label = ""
			}
			put(fmt.Sprintf(" %-*s%s", labelWidth, label, part))
		}
	}
	title := " muster  " + printable(v.Image, 60)
	put(title + strings.Repeat(" ", max(1, width-len(title)-len(v.Version)-1)) + printable(v.Version, 60))
	put(rule)
	if v.Words == "" {
		field("node", "(not known before the TPM answers)")
	} else {
		field("node", v.Words)
	}
	if v.Node != "" {
		field("id", v.Node)
	}
	if v.EK != "" {
		field("EK", groups(printable(v.EK, shortEK)))
	}
	put("")
	if v.Scan {
		for _, line := range Banner(v.State) {
			put(line)
		}
	}
	field("state", v.State.String()+ago(v.InState))
	field("", v.Text)
	if v.Request != "" {
		field("request", v.Request)
	}
	put("")
	for i, n := range v.NICs {
		if i == maxNICs {
			field("", fmt.Sprintf("and %d more", len(v.NICs)-maxNICs))
			break
		}
		label := ""
		if i == 0 {
			label = "network"
		}
		field(label, fmt.Sprintf("%s  %s  %s", n.Name, n.MAC, n.Text))
	}
	if len(v.NICs) == 0 && !v.Scan {
		field("network", "no network interface found yet")
	}
	for i, c := range v.Centre {
		label := ""
		if i == 0 {
			label = "centre"
		}
		field(label, c)
	}
	for i, n := range v.Notes {
		label := ""
		if i == 0 {
			label = "note"
		}
		field(label, n)
	}
	if len(v.Recent) > 0 {
		put(rule)
		for _, l := range v.Recent[max(0, len(v.Recent)-maxRecent):] {
			put(printable(l, width))
		}
	}
	return strings.Join(out, "\n")
}

// ago is coarse on purpose: the screen is redrawn only when it changes.
func ago(d time.Duration) string {
	switch {
	case d < time.Minute:
		return ""
	case d < time.Hour:
		return fmt.Sprintf(" (for %d min)", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf(" (for %d h)", int(d.Hours()))
	}
	return fmt.Sprintf(" (for %d days)", int(d.Hours()/24))
}

// groups puts a blank after every four characters, for reading aloud.
func groups(s string) string {
	var b strings.Builder
	for i, r := range s {
		if i > 0 && i%4 == 0 {
			b.WriteByte(' ')
		}
		b.WriteRune(r)
	}
	return b.String()
}

// printable keeps what a console font and a serial line can show: ASCII from
// blank to tilde. Everything else, escape sequences first of all, becomes '?'
// or, for white space, a blank.
func printable(s string, most int) string {
	var b strings.Builder
	for _, r := range s {
		if b.Len() >= most {
			break
		}
		switch {
		case r >= ' ' && r <= '~':
			b.WriteByte(byte(r))
		case r == '\n' || r == '\t' || r == '\r':
			b.WriteByte(' ')
		default:
			b.WriteByte('?')
		}
	}
	return b.String()
}

func clip(s string, width int) string {
	if len(s) > width {
		return s[:width]
	}
	return strings.TrimRight(s, " ")
}

// wrap breaks s at blanks into lines of at most width; a longer word is cut.
func wrap(s string, width int) []string {
	width = max(width, 1)
	var lines []string
	line := ""
	for _, w := range strings.Fields(s) {
		for len(w) > width {
			if line != "" {
				lines, line = append(lines, line), ""
			}
			lines, w = append(lines, w[:width]), w[width:]
		}
		switch {
		case line == "":
			line = w
		case len(line)+1+len(w) <= width:
			line += " " + w
		default:
			lines, line = append(lines, line), w
		}
	}
	if line != "" || len(lines) == 0 {
		lines = append(lines, line)
	}
	return lines
}
