package image

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/muster-edge/muster/firmware"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/lab/machine"
)

func TestSlotConfigSaysAllProblems(t *testing.T) {
	err := SlotConfig{Version: "", Name: "zz-top", Flavour: "x", Airgap: []string{"a"}, SignKey: "k"}.validate()
	for _, want := range []string{"--out DIR", "version", "behind recovery", "neither cloud nor generic", "--node-binary", "--airgap goes with", "go together"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q is not said: %v", want, err)
		}
	}
}

// A canary: what must not be in an image stops the build.
func TestNoSecrets(t *testing.T) {
	for when, c := range map[string]struct {
		file, text string
		bad        bool
	}{
		"a private key lies in /etc":        {"etc/ssl/private/k.pem", "x\n-----BEGIN RSA PRIVATE KEY-----\nMII", true},
		"root has a password":               {"etc/shadow", "root:$y$j9T$abc:19000:0:99999:7:::\n", true},
		"root needs no password":            {"etc/shadow", "root::19000:0:99999:7:::\n", true},
		"all accounts are locked":           {"etc/shadow", "root:*:19000:0:99999:7:::\nx:!:1::::::\ny:!*:1::::::\n", false},
		"a certificate lies in /etc":        {"etc/ssl/certs/ca.pem", "-----BEGIN CERTIFICATE-----\nMII", false},
		"a library knows how keys are told": {"usr/lib/libssl.so", "\x7fELF -----BEGIN PRIVATE KEY-----", false},
	} {
		root := t.TempDir()
		at := filepath.Join(root, c.file)
		if err := os.MkdirAll(filepath.Dir(at), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(at, []byte(c.text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := noSecrets(root); (err != nil) != c.bad {
			t.Errorf("when %s: %v", when, err)
		}
	}
}

// The settings of a slot say what the design asks for.
func TestOverlayFiles(t *testing.T) {
	files, err := overlayFiles()
	if err != nil {
		t.Fatal(err)
	}
	byPath := map[string]string{}
	for i, f := range files {
		byPath[f.path] = string(f.data)
		if i > 0 && files[i-1].path >= f.path {
			t.Errorf("%s is not in order", f.path)
		}
	}
	for file, want := range map[string]string{
		"etc/systemd/system/muster-agent.service":             "WatchdogSec=60",
		"etc/systemd/system/muster-k3s.service":               "Type=notify",
		"etc/systemd/system/muster-agent.service.d/slot.conf": "Requires=muster-data.service",
		"etc/systemd/system/muster-data.service":              "Before=muster-agent.service muster-k3s.service",
		"etc/systemd/system/muster-trial.timer":               "OnBootSec=16min",
		"etc/systemd/system/muster-trial.service":             "muster-node slot trial",
		"etc/systemd/system.conf.d/muster.conf":               "RuntimeWatchdogSec=180",
	} {
		if !strings.Contains(byPath[file], want) {
			t.Errorf("%s does not say %q", file, want)
		}
	}
}

// k3s finds the system's container images, those of the system before are gone
// from its folder, and files of people stay.
func TestLinkImages(t *testing.T) {
	script, err := filepath.Abs("slotfs/usr/lib/muster/link-images")
	if err != nil {
		t.Fatal(err)
	}
	from, to := filepath.Join(t.TempDir(), "images"), filepath.Join(t.TempDir(), "k3s", "images")
	put := func(name, text string) {
		t.Helper()
		if err := errors.Join(os.MkdirAll(filepath.Dir(name), 0o755), os.WriteFile(name, []byte(text), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	link := func() {
		t.Helper()
		if out, err := exec.Command("/bin/sh", script, from, to).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	link() // a system without images
	put(filepath.Join(from, "k3s 1.tar.zst"), "one")
	put(filepath.Join(from, "mine.tar"), "the system's")
	put(filepath.Join(to, "mine.tar"), "a person's")
	link()
	link()
	got := func(name string) string { b, _ := os.ReadFile(filepath.Join(to, name)); return string(b) }
	if got("k3s 1.tar.zst") != "one" || got("mine.tar") != "a person's" {
		t.Errorf("k3s sees %q and %q", got("k3s 1.tar.zst"), got("mine.tar"))
	}
	// Another system starts.
	if err := os.Remove(filepath.Join(from, "k3s 1.tar.zst")); err != nil {
		t.Fatal(err)
	}
	put(filepath.Join(from, "k3s 2.tar.zst"), "two")
	link()
	if _, err := os.Lstat(filepath.Join(to, "k3s 1.tar.zst")); err == nil || got("k3s 2.tar.zst") != "two" || got("mine.tar") != "a person's" {
		t.Errorf("after an update k3s sees %q and %q (%v)", got("k3s 2.tar.zst"), got("mine.tar"), err)
	}
}

func TestBillOfMaterials(t *testing.T) {
	m := firmware.Manifest{Name: "edge", Version: "1", Created: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC), Inputs: []firmware.Input{
		{Name: "linux-image-6.1.0-56-cloud-amd64", Version: "6.1.192-2"}, {Name: "k3s", Version: "v1"}, {Name: "bash", Version: "5"},
	}}
	b, err := bill(m, []component{debian(Package{Name: "bash", Version: "1:5+b1"}, "amd64")})
	if err != nil {
		t.Fatal(err)
	}
	var got struct {
		Format     string      `json:"bomFormat"`
		Components []component `json:"components"`
	}
	if err := json.Unmarshal(b, &got); err != nil || got.Format != "CycloneDX" || len(got.Components) != 3 {
		t.Fatalf("%v: %s", err, b)
	}
	if p := got.Components[0].PURL; p != "pkg:deb/debian/bash@1:5%2Bb1?arch=amd64" {
		t.Errorf("bash is %s", p)
	}
	if p := got.Components[2].PURL; !strings.HasPrefix(p, "pkg:deb/debian/linux-image-") {
		t.Errorf("the kernel is %q", p)
	}
}

// slotForTest is a build with a program that tells the TPM's state.
func slotForTest(t *testing.T) SlotConfig {
	t.Helper()
	if os.Getenv("MUSTER_VM_TESTS") != "long" {
		t.Skip("builds a whole system and starts it in virtual machines, half an hour: set MUSTER_VM_TESTS=long to run it")
	}
	if os.Geteuid() != 0 {
		t.Skip("slot images are built as root")
	}
	for _, tool := range []string{"mmdebstrap", "mkfs.erofs", "veritysetup", "depmod", "sgdisk", "mformat", "mmd", "mcopy"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("%s is not here", tool)
		}
	}
	if missing := machine.CheckHost(false); len(missing) > 0 {
		t.Skipf("this host cannot run machines: missing %v", missing)
	}
	node, err := filepath.Abs("../../bin/muster-node")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(node); err != nil {
		t.Skipf("no %s: make build", node)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	const probe = `#!/bin/bash
exec >/dev/ttyS0
for i in $(seq 0 23); do echo "probe: pcr $i $(cat /sys/class/tpm/tpm0/pcr-sha256/$i)"; done
base64 -w 200 /sys/kernel/security/tpm0/binary_bios_measurements | sed 's/^/probe: log /'
echo "probe: failed $(systemctl --failed --plain --no-legend | awk '{print $1}' | tr '\n' ' ')"
echo "probe: watchdog $(cat /sys/class/watchdog/watchdog0/state 2>/dev/null) id $(cat /etc/machine-id) iptables $(iptables -V)"
echo "probe: writable $(touch /usr/x 2>&1; touch /etc/x && echo etc)"
echo "probe: agent $(systemctl is-active muster-agent) data $(findmnt -no SOURCE /var/lib/rancher) $(findmnt -no FSTYPE /var/lib/kubelet)"
echo "probe: end"
`
	const unit = "[Unit]\nAfter=muster-started.service\n[Service]\nType=oneshot\nExecStart=/usr/local/bin/probe\n"
	orders, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	return SlotConfig{
		OutDir: t.TempDir(), Version: "1.0", Flavour: FlavourCloud, NodeBinary: node, Release: key, Note: t.Logf,
		// A centre that does not answer: the system must come up all the same.
		Site: fleet.SiteConfig{Centre: []string{"https://centre.invalid:7444"}, RootsPEM: rootPEM(t, true),
			OrdersKeysPEM: string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: orders}))},
		extra:      []treeFile{{"usr/local/bin/probe", 0o755, []byte(probe)}, {"etc/systemd/system/probe.service", 0o644, []byte(unit)}},
		extraUnits: []string{"probe.service"},
	}
}

// slotTime bounds one start, without hardware virtualization.
const slotTime = 12 * time.Minute

// slotDisk is a disk as an installation leaves it, with the image in one slot.
type slotDisk struct {
	t     *testing.T
	file  string
	parts []firmware.Partition
}

func newSlotDisk(t *testing.T, dir string) *slotDisk {
	t.Helper()
	d := &slotDisk{t: t, file: filepath.Join(dir, "disk.img")}
	f, err := os.Create(d.file)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.Truncate(firmware.MinDisk), f.Close()); err != nil {
		t.Fatal(err)
	}
	if d.parts, err = firmware.Layout(firmware.MinDisk, 512); err != nil {
		t.Fatal(err)
	}
	var args []string
	for _, p := range d.parts {
		n := strconv.Itoa(p.Number)
		args = append(args, "-n", fmt.Sprintf("%s:%d:%d", n, p.Start/512, (p.Start+p.Size)/512-1), "-t", n+":"+p.Type, "-c", n+":"+p.Label)
	}
	d.run("sgdisk", append(args, d.file)...)
	d.run("mformat", "-i", d.esp(), "-F", "-T", fmt.Sprint(int64(firmware.SizeESP)/512), "::")
	d.run("mmd", "-i", d.esp(), "::/EFI", "::/EFI/BOOT", "::/EFI/systemd", "::/EFI/Linux", "::/loader")
	return d
}

func (d *slotDisk) esp() string { return fmt.Sprintf("%s@@%d", d.file, d.parts[0].Start) }

func (d *slotDisk) run(name string, args ...string) string {
	d.t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		d.t.Fatalf("%s %v: %v: %s", name, args, err, out)
	}
	return string(out)
}

// put copies a host's file onto the ESP.
func (d *slotDisk) put(from, to string) { d.run("mcopy", "-o", "-i", d.esp(), from, "::/"+to) }

// write puts a file's bytes into a partition.
func (d *slotDisk) write(label, from string) {
	d.t.Helper()
	b, err := os.ReadFile(from)
	if err != nil {
		d.t.Fatal(err)
	}
	d.writeAt(label, 0, b)
}

func (d *slotDisk) writeAt(label string, off int64, b []byte) {
	d.t.Helper()
	f, err := os.OpenFile(d.file, os.O_RDWR, 0)
	if err != nil {
		d.t.Fatal(err)
	}
	defer f.Close()
	for _, p := range d.parts {
		if p.Label == label {
			if _, err := f.WriteAt(b, p.Start+off); err != nil {
				d.t.Fatal(err)
			}
		}
	}
}

// install writes an image into a slot, and loader and UKI onto the ESP.
func (d *slotDisk) install(dir string, m firmware.Manifest, slot firmware.SlotID) {
	root, verity := firmware.RootLabels(slot)
	d.write(root, filepath.Join(dir, m.Slot.Root.File))
	d.write(verity, filepath.Join(dir, m.Slot.Verity.File))
	for _, to := range []string{"EFI/BOOT/BOOTX64.EFI", "EFI/systemd/systemd-bootx64.efi"} {
		d.put(filepath.Join(dir, m.Slot.Loader.File), to)
	}
	d.put(filepath.Join(dir, m.File), "EFI/Linux/"+firmware.CountedName(m.Entry(), firmware.Tries, 0))
	conf := filepath.Join(d.t.TempDir(), "loader.conf")
	if err := os.WriteFile(conf, []byte(firmware.LoaderConf), 0o644); err != nil {
		d.t.Fatal(err)
	}
	d.put(conf, "loader/loader.conf")
}

// clear takes all boot files away.
func (d *slotDisk) clear() {
	d.run("mdeltree", "-i", d.esp(), "::/EFI/Linux")
	d.run("mmd", "-i", d.esp(), "::/EFI/Linux")
}

func (d *slotDisk) entries() string {
	return strings.Join(strings.Fields(d.run("mdir", "-b", "-i", d.esp(), "::/EFI/Linux")), " ")
}

// TestSlotStarts is the proof on real firmware: the same bytes twice, both
// slots from one UKI, what the TPM shows, and a slot that is damaged.
func TestSlotStarts(t *testing.T) {
	cfg := slotForTest(t)
	one, err := BuildSlot(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	again := cfg
	again.OutDir = t.TempDir()
	t.Setenv("TZ", "Pacific/Kiritimati")
	two, err := BuildSlot(t.Context(), again)
	if err != nil {
		t.Fatal(err)
	}
	a, err := one.Manifest.JSON()
	if err != nil {
		t.Fatal(err)
	}
	if b, err := two.Manifest.JSON(); err != nil || string(a) != string(b) {
		t.Errorf("a second build gave another image (%v)", err)
	}
	for _, p := range one.Manifest.Parts {
		t.Logf("%-40s %10d %10d", p.Name, p.Size, p.Packed)
	}
	checkSlotVerify(t, cfg, one)

	next := cfg
	next.OutDir, next.Version = t.TempDir(), "1.1"
	later, err := BuildSlot(t.Context(), next)
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "slot")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	disk := newSlotDisk(t, dir)
	for _, slot := range []firmware.SlotID{firmware.SlotA, firmware.SlotB} {
		t.Run("slot "+slot.String(), func(t *testing.T) {
			disk.t = t
			// The other slot must not be what starts.
			disk.writeAt(firmware.LabelRootA, 0, make([]byte, 8192))
			disk.writeAt(firmware.LabelRootB, 0, make([]byte, 8192))
			disk.clear()
			disk.install(cfg.OutDir, one.Manifest, slot)
			m := startSlot(t, filepath.Join(dir, "m"), disk.file)
			up := m.wait(`muster: slot is up: (.*)$`, slotTime)
			if !strings.Contains(up.Text, `"slot":"`+slot.String()+`"`) || !strings.Contains(up.Text, `"counted":true`) {
				t.Errorf("it says %s", up.Text)
			}
			m.wait(`probe: end`, 2*time.Minute)
			m.cut()
			t.Logf("up after %s", up.At.Sub(m.on).Round(time.Second))
			m.check(one.Manifest)
			if got := disk.entries(); !strings.Contains(got, "+2-1") {
				t.Errorf("the loader has not counted: %s", got)
			}
		})
	}
	t.Run("damaged", func(t *testing.T) {
		disk.t = t
		disk.clear()
		disk.install(cfg.OutDir, one.Manifest, firmware.SlotA)
		// Slot A was found good: its boot file is not counted.
		disk.run("mmove", "-i", disk.esp(), "::/EFI/Linux/"+firmware.CountedName(one.Manifest.Entry(), firmware.Tries, 0), "::/EFI/Linux/"+one.Manifest.Entry())
		disk.install(next.OutDir, later.Manifest, firmware.SlotB)
		// The superblock stays, what it points at does not.
		disk.writeAt(firmware.LabelRootB, 8192, make([]byte, 1<<20))
		m := startSlot(t, filepath.Join(dir, "m"), disk.file)
		for range firmware.Tries {
			m.wait(`slot initrd started`, slotTime)
			m.wait(`this slot does not start|dm-verity device corrupted|Kernel panic`, slotTime)
		}
		up := m.wait(`muster: slot is up: (.*)$`, slotTime)
		m.cut()
		if !strings.Contains(up.Text, `"slot":"a"`) || !strings.Contains(up.Text, `"counted":false`) || !strings.Contains(up.Text, one.Manifest.Slot.RootHash.String()) {
			t.Errorf("it says %s", up.Text)
		}
		if got := disk.entries(); !strings.Contains(got, fmt.Sprintf("+0-%d", firmware.Tries)) {
			t.Errorf("the loader has not counted down: %s", got)
		}
	})
}

// checkSlotVerify: `muster image verify` passes the image, and names a change.
func checkSlotVerify(t *testing.T, cfg SlotConfig, r SlotResult) {
	t.Helper()
	failed := func() string {
		checks, err := Verify(cfg.OutDir, []crypto.PublicKey{cfg.Release.Public()})
		if err != nil {
			t.Fatal(err)
		}
		var bad []string
		for _, c := range checks {
			if !c.OK {
				bad = append(bad, c.Name+": "+c.Detail)
			}
		}
		return strings.Join(bad, "; ")
	}
	if bad := failed(); bad != "" {
		t.Errorf("a good image fails: %s", bad)
	}
	path := filepath.Join(cfg.OutDir, r.Manifest.Slot.Root.File)
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	flip := func() {
		b := make([]byte, 1)
		if _, err := f.ReadAt(b, 100_000); err != nil {
			t.Fatal(err)
		}
		b[0] ^= 1
		if _, err := f.WriteAt(b, 100_000); err != nil {
			t.Fatal(err)
		}
	}
	flip()
	if bad := failed(); !strings.Contains(bad, "chunk 0") || !strings.Contains(bad, "hash tree") {
		t.Errorf("with a changed bit of root, this fails: %q", bad)
	}
	flip()
	if bad := failed(); bad != "" {
		t.Errorf("the image is whole again and fails: %s", bad)
	}
}

// slotMachine is a machine that starts from a disk.
type slotMachine struct {
	*machine.Machine
	t    *testing.T
	on   time.Time
	from int
}

func startSlot(t *testing.T, dir, disk string) *slotMachine {
	t.Helper()
	m, err := machine.New(machine.Config{Name: "slot", Dir: dir, Boot: machine.BootDisk, MemoryMB: 1024, CPUs: 2,
		Disks: []machine.Disk{{File: disk, Serial: "SLOT", Boot: true}}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = m.Close() })
	s := &slotMachine{Machine: m, t: t, on: time.Now()}
	if err := m.PowerOn(t.Context()); err != nil {
		t.Fatal(err)
	}
	return s
}

func (m *slotMachine) wait(pattern string, limit time.Duration) machine.Line {
	m.t.Helper()
	ctx, cancel := context.WithTimeout(m.t.Context(), limit)
	defer cancel()
	l, err := m.Serial().Wait(ctx, m.from, regexp.MustCompile(pattern))
	if err != nil {
		var tail []string
		for _, l := range m.Serial().Tail(60) {
			tail = append(tail, l.Text)
		}
		m.t.Fatalf("no %q: %v; console:\n%s", pattern, err, strings.Join(tail, "\n"))
	}
	m.from = m.Serial().Mark()
	m.t.Logf("%6.1fs %s", l.At.Sub(m.on).Seconds(), l.Text)
	return l
}

func (m *slotMachine) cut() {
	if err := m.Cut(); err != nil {
		m.t.Error(err)
	}
}

// check compares what the probe told with the manifest, and keeps the log
// where MUSTER_KEEP_LOG names a folder, for the tests of package pki.
func (m *slotMachine) check(want firmware.Manifest) {
	m.t.Helper()
	pcrs, told := map[int]string{}, map[string]string{}
	var log strings.Builder
	for _, l := range m.Serial().Tail(100000) {
		f := strings.Fields(l.Text)
		if len(f) < 2 || f[0] != "probe:" || f[1] == "end" || len(f) < 3 && f[1] != "failed" {
			continue
		}
		switch f[1] {
		case "pcr":
			n, _ := strconv.Atoi(f[2])
			pcrs[n] = strings.ToLower(f[len(f)-1])
		case "log":
			log.WriteString(f[2])
		default:
			m.t.Log(l.Text)
			told[f[1]] = strings.Join(f[2:], " ")
		}
	}
	// No unit failed (empty), the agent runs, k3s' state is on the encrypted
	// partition, the watchdog ticks, and the root is read-only.
	for what, want := range map[string]string{"failed": "^$", "agent": `^active data /dev/mapper/muster-data\S* ext4$`, "watchdog": "^active id [0-9a-f]{32} iptables iptables v", "writable": "Read-only file system"} {
		if got, ok := told[what]; !ok || !regexp.MustCompile(want).MatchString(got) {
			m.t.Errorf("probe %q says %q, want %q", what, got, want)
		}
	}
	if got := pcrs[11]; got != want.Measurements.PCR11.String() {
		m.t.Errorf("PCR 11 is %s, the manifest says %s", got, want.Measurements.PCR11)
	}
	if got := pcrs[12]; got != strings.Repeat("0", 64) {
		m.t.Errorf("PCR 12 is %s", got)
	}
	raw, err := base64.StdEncoding.DecodeString(log.String())
	if err != nil || len(raw) == 0 {
		m.t.Errorf("no event log (%v)", err)
	}
	for what, d := range map[string]firmware.Digest{"loader": want.Measurements.Loader, "UKI": want.Measurements.Authenticode, "kernel": want.Measurements.Kernel} {
		if !strings.Contains(string(raw), string(d[:])) {
			m.t.Errorf("the log has no digest of the %s (%s)", what, d)
		}
	}
	if dir := os.Getenv("MUSTER_KEEP_LOG"); dir != "" {
		var text strings.Builder
		for _, i := range slices.Sorted(maps.Keys(pcrs)) {
			fmt.Fprintln(&text, i, pcrs[i])
		}
		err := errors.Join(os.WriteFile(filepath.Join(dir, "slot.bin"), raw, 0o644), os.WriteFile(filepath.Join(dir, "slot.pcrs"), []byte(text.String()), 0o644))
		m.t.Logf("measurements %+v", want.Measurements)
		if err != nil {
			m.t.Error(err)
		}
	}
}
