package server_test

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/muster-edge/muster/pxe"
	"github.com/muster-edge/muster/pxe/internal/edk2"
	"github.com/muster-edge/muster/pxe/internal/netlab"
)

var update = flag.Bool("update", false, "write docs/reference/firmware.md anew")

// TestFirmwareModels boots every model of firmware that there is, on a
// provisioning network and beside another DHCP server, and compares what each
// got with the published table.
func TestFirmwareModels(t *testing.T) {
	netlab.Need(t)
	ca := newAuthority(t, ecKey)
	slow := func(c *edk2.Client) { c.Wait[0] = 2100 * time.Millisecond }
	arch := func(n uint16) func(*edk2.Client) { return func(c *edk2.Client) { c.Arch = n; c.Wait = c.Wait[:1] } }
	models := []struct {
		name string
		edit func(*edk2.Client)
		why  string
	}{
		{"EDK2 since April 2017, PXE (OVMF, most PCs and servers)", nil, "takes a complete proxy offer (option 43 {6:8}) and asks for a window of 4 (RFC 7440)"},
		{"EDK2 before April 2017, PXE (Dell T430 and its time)", func(c *edk2.Client) { c.Old = true; slow(c) }, "drops complete proxy offers; the second one has no option 43 and leads to port 4011. The rung is remembered: the next boot takes one DISCOVER"},
		{"EDK2, HTTP boot", http, "a URL with an IP literal needs no DNS; HEAD, GET and ranges, never a redirect"},
		{"EDK2, HTTPS boot, our CA enrolled", func(c *edk2.Client) { http(c); c.Roots = ca.pool }, "the certificate names the address in the URL; TLS 1.2 is enough"},
		{"EDK2, HTTPS boot, no CA enrolled", func(c *edk2.Client) { http(c); slow(c) }, "it says nothing to a server it does not trust. At its next boot it gets plain HTTP, unless HTTPS alone is allowed; the image is signed and measured either way"},
		{"AMI size probe", func(c *edk2.Client) { c.AMI, c.Window = true, 1 }, "acknowledges the size, aborts with code 0, and asks again from the same port: no error, no second boot"},
		{"Firmware without windows, blocks of 1024", func(c *edk2.Client) { c.BlockSize, c.Window = 1024, 1 }, "one block per round trip"},
		{"No TFTP options at all, blocks of 512 (shim's loader)", func(c *edk2.Client) { c.BlockSize = 512 }, "block numbers roll over beyond 32 MiB"},
		{"PXE ROM without a UUID", func(c *edk2.Client) { c.NoUUID = true }, "option 97 is optional"},
		{"Firmware deaf to proxies (some HP)", func(c *edk2.Client) {
			c.Deaf = true
			c.Wait = []time.Duration{2100 * time.Millisecond, 2100 * time.Millisecond, 300 * time.Millisecond}
		}, "after both rungs an alarm tells the options to set in the site's own server"},
		{"arm64 UEFI (11)", arch(11), "no arm64 image is built yet; one in the image directory is served"},
		{"legacy BIOS (0)", arch(0), "refused in one clear line"},
		{"32-bit UEFI (6)", arch(6), "refused in one clear line"},
	}
	var b strings.Builder
	b.WriteString("# What firmware gets\n\nEach row is a model of firmware that the tests boot in a network of their own (`go test ./pxe/server -run TestFirmwareModels`); the EDK2 rows are\nalso checked against the real one in a virtual machine (`TestRealFirmwareFetches`). The whole chain, from power-on to a certificate, runs on\nthe real one by each way in the machine lab: `lab run enroll` (TFTP), `--boot http`, `--boot https`, `--boot disk`, `--dhcp proxy`, and `boot-paths`. *Full* is a provisioning network of ours, *proxy* is beside another DHCP\nserver. A cell tells how it was told of the image, after how many DISCOVERs, and what TFTP agreed on.\n\n| firmware | full | proxy | why |\n|---|---|---|---|\n")
	for _, m := range models {
		row := []string{m.name}
		for _, mode := range []pxe.Mode{pxe.ModeFull, pxe.ModeProxy} {
			t.Run(fmt.Sprintf("%s, %s", m.name, mode), func(t *testing.T) {
				lan := netlab.NewLAN(t, "10.77.0.1/24")
				dir, data := image(t, 300_001)
				cfg := full(t, lan, dir)
				if mode == pxe.ModeProxy {
					site(t, lan)
					cfg = proxy(lan, dir, pxe.Recover)
				}
				if strings.Contains(m.name, "HTTPS") {
					cfg.HTTPSAddr, cfg.TLS = ":7481", ca.tls
				}
				_, rec := start(t, cfg)
				h := lan.Host(t)
				cell := ""
				for range 2 {
					fw := firmware(h)
					if m.edit != nil {
						m.edit(fw)
					}
					var res edk2.Result
					err := h.Do(func() (err error) { res, err = fw.Boot(); return err })
					switch {
					case err == nil && !bytes.Equal(res.Data, data):
						t.Errorf("%d bytes", len(res.Data))
					case err == nil:
						cell += fmt.Sprintf("%s, %d DISCOVER", res.Kind, res.Rounds)
						if !fw.HTTP {
							cell += fmt.Sprintf(", %d x %d B", fw.Negotiated[1], fw.Negotiated[0])
						} else {
							cell += ", " + res.File[:strings.Index(res.File, ":")]
						}
					case errors.Is(err, edk2.ErrNoOffer):
						cell += "no offer"
						for _, e := range rec.all() {
							if e.Alarm && strings.Contains(e.Text, "set in your DHCP server") {
								cell += ", alarm with the options to set"
							} else if e.Step == pxe.StateRefused {
								_, why, _ := strings.Cut(e.Text, ": ")
								cell += " (" + why + ")"
							}
						}
					case strings.Contains(err.Error(), "no CA"):
						cell += "fails; second boot: "
						continue
					default:
						t.Error(err)
					}
					break
				}
				row = append(row, cell)
			})
		}
		fmt.Fprintf(&b, "| %s | %s |\n", strings.Join(row, " | "), m.why)
	}
	if t.Failed() {
		return
	}
	b.WriteString("\nWhat people ran into with other systems, what muster does instead, and the tests that show it: [field-lessons.yaml](../field-lessons.yaml).\n")
	const path = "../../docs/reference/firmware.md"
	if *update {
		if err := os.WriteFile(path, []byte(b.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil || string(want) != b.String() {
		t.Errorf("%s is not what firmware gets (go test ./pxe/server -run TestFirmwareModels -update): %v\n%s", path, err, b.String())
	}
}
