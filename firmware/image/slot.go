package image

import (
	"bytes"
	"context"
	"crypto"
	"crypto/sha256"
	"debug/buildinfo"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/google/renameio/v2"

	"github.com/muster-edge/muster/firmware"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/statement"
)

// SlotCmdline is the command line of a slot before the words that name its
// root. gpt_auto is off: a slot is named, nothing may be picked.
const SlotCmdline = Cmdline + " ro systemd.gpt_auto=no systemd.show_status=auto"

// SlotConfig says what slot image to build. The zero value of a field means
// the default its comment names.
type SlotConfig struct {
	// OutDir receives the files; it is made if it is missing. Required.
	OutDir string
	// Name of the image, a DNS label. Default "edge".
	Name string
	// Version, as fleet.ValidateVersion. Required.
	Version string
	// Flavour is FlavourGeneric (default) or FlavourCloud.
	Flavour string
	// NodeBinary is the path of muster-node. Required.
	NodeBinary string
	// K3s is the path of k3s, "" for a system without; Airgap are archives of
	// images that k3s loads at its start.
	K3s    string
	Airgap []string
	// EtcdMinor is that of the etcd inside k3s. Default: known from the
	// version of k3s.
	EtcdMinor string

	// Site becomes /etc/muster/site.json: whom the node trusts and where it
	// calls. Format, Image, Version and TimeFloor are filled in. Without roots
	// and centre nothing is written.
	Site fleet.SiteConfig

	// Overlay is a folder with files and links of people's own, put over the
	// root at last; "" for none.
	Overlay string

	// CacheDir keeps packages and the unpacked base. Default: as for recovery.
	CacheDir string
	// Lock demands exactly these packages; nil takes what apt would install
	// now.
	Lock *Lock
	// SignKey and SignCert are the Secure Boot db key and its certificate, both
	// or none. They sign the UKI and the boot loader.
	SignKey, SignCert string
	// Release signs the manifest; without it no envelope is written.
	Release crypto.Signer
	// Note receives one line of text for each step that takes time.
	Note func(format string, args ...any)

	// extra are more files and units that start, for tests.
	extra      []treeFile
	extraUnits []string
}

// SlotResult is a finished build.
type SlotResult struct {
	Manifest firmware.Manifest
	// Envelope is the signed manifest, nil without a release key.
	Envelope []byte
	Lock     Lock
	// Base names the file in the cache with the unpacked packages.
	Base string
}

// slotFile is the name of one of the image's files.
func slotFile(name, version, suffix string) string {
	return name + "-" + version + "-amd64." + suffix
}

func (c SlotConfig) withDefaults() (SlotConfig, error) {
	if c.Name == "" {
		c.Name = "edge"
	}
	r, err := RecoveryConfig{Name: c.Name, Version: c.Version, Flavour: c.Flavour, Note: c.Note, CacheDir: c.CacheDir, Site: c.Site, Release: c.Release}.withDefaults()
	c.Flavour, c.Note, c.CacheDir, c.Site = r.Flavour, r.Note, r.CacheDir, r.Site
	return c, err
}

func (c SlotConfig) validate() error {
	var problems []error
	check := func(ok bool, format string, args ...any) {
		if !ok {
			problems = append(problems, fmt.Errorf(format, args...))
		}
	}
	check(c.OutDir != "", "no output folder: give --out DIR")
	problems = append(problems, fleet.ValidateName("image", c.Name), fleet.ValidateVersion(c.Version))
	// The loader sorts by this name, and recovery must come last.
	check(c.Name < "zz", "the name %q sorts behind recovery: choose one before \"zz\"", c.Name)
	check(c.Flavour == FlavourCloud || c.Flavour == FlavourGeneric, "kernel %q is neither cloud nor generic", c.Flavour)
	check(c.NodeBinary != "", "no node program: build bin/muster-node and give --node-binary FILE")
	check(c.K3s != "" || len(c.Airgap) == 0, "--airgap goes with --k3s")
	check((c.SignKey == "") == (c.SignCert == ""), "--sign-key and --sign-cert go together")
	problems = append(problems, checkSite(c.Site))
	// Owners and set-user-ID bits in the image are those of the files here.
	check(os.Geteuid() == 0, "a slot image is built as root: maintainer scripts run in a new root, and files keep their owners; try `sudo`, or a container")
	for _, tool := range []string{"mmdebstrap", "mkfs.erofs", "veritysetup", "depmod", "tar", "dpkg-deb"} {
		if _, err := exec.LookPath(tool); err != nil {
			problems = append(problems, fmt.Errorf("%s is not here: install the packages mmdebstrap, erofs-utils, cryptsetup-bin and kmod", tool))
		}
	}
	if err := errors.Join(problems...); err != nil {
		return fmt.Errorf("image: %w", err)
	}
	return nil
}

// BuildSlot makes a slot image and writes it to cfg.OutDir. Unsigned files
// depend on the packages, the programs, Name and Version alone.
func BuildSlot(ctx context.Context, cfg SlotConfig) (SlotResult, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return SlotResult{}, err
	}
	if err := cfg.validate(); err != nil {
		return SlotResult{}, err
	}
	b := &slotBuild{cfg: cfg, debs: archiveCache{dir: cfg.CacheDir, note: cfg.Note}}
	if b.tmp, err = os.MkdirTemp("", "muster-slot-"); err != nil {
		return SlotResult{}, fmt.Errorf("image: %w", err)
	}
	defer os.RemoveAll(b.tmp)
	for _, step := range []func(context.Context) error{b.packages, b.programs, b.base, b.tree, b.root, b.boot, b.write} {
		if err := step(ctx); err != nil {
			return SlotResult{}, err
		}
	}
	return b.result, nil
}

// slotBuild is a build under way; each step fills in more.
type slotBuild struct {
	cfg  SlotConfig
	debs archiveCache
	tmp  string

	lock       Lock
	kernelDeb  string
	kernel     kernel
	stub       []byte
	loader     []byte
	node       []byte
	k3s        string // version
	etcd       string
	k3sDigest  firmware.Digest
	inputs     []firmware.Input
	seed       firmware.Digest // over all inputs: UUIDs and salt come from it
	newest     time.Time
	basePath   string
	rootDir    string
	components []component
	parts      []firmware.Part
	slot       firmware.SlotImage
	efi        []byte
	cert       firmware.Digest
	measured   firmware.Measurements
	result     SlotResult
}

// packages makes or takes the lock and fills the cache.
func (b *slotBuild) packages(ctx context.Context) error {
	if b.cfg.Lock != nil {
		b.lock = *b.cfg.Lock
	} else {
		boot, err := choosePackages(ctx, b.debs, RecoveryConfig{Flavour: b.cfg.Flavour})
		if err != nil {
			return err
		}
		system, err := resolve(ctx, b.debs, slotPackages)
		if err != nil {
			return err
		}
		b.lock = Lock{Format: LockFormat, Packages: append(boot.Packages, system...)}
	}
	return b.debs.fetchAll(ctx, b.lock.Packages)
}

// slotPackages are those that are asked for; the rest are dependencies.
var slotPackages = []string{
	"usr-is-merged", "systemd", "systemd-sysv", "systemd-resolved", "udev", "dbus", "kmod", "util-linux", "mount", "procps", "login", "passwd",
	"iproute2", "nftables", "iptables", "conntrack", "ethtool", "socat", "ca-certificates", "chrony",
	"cryptsetup-bin", "libtss2-esys-3.0.2-0", "libtss2-tcti-device0", "libtss2-rc0", "e2fsprogs", "dosfstools",
}

var installLine = regexp.MustCompile(`(?m)^Inst (\S+) \((\S+) `)

// resolve asks apt which packages a new system with these would have, and
// their digests.
func resolve(ctx context.Context, debs archiveCache, names []string) ([]Package, error) {
	if _, _, err := debs.candidate(ctx, names[0]); err != nil {
		return nil, err // updates the lists if there are none
	}
	args := append([]string{"install", "-s", "-q", "-o", "Dir::State::status=/dev/null", "-o", "APT::Install-Recommends=0", "?essential"}, names...)
	out, err := debs.run(ctx, "", "apt-get", args...)
	if err != nil {
		return nil, fmt.Errorf("image: choose packages: %w", err)
	}
	show := []string{"show", "--no-all-versions"}
	want := map[string]string{}
	for _, m := range installLine.FindAllStringSubmatch(string(out), -1) {
		want[m[1]] = m[2]
		show = append(show, m[1]+"="+m[2])
	}
	if len(want) < len(names) {
		return nil, fmt.Errorf("image: choose packages: apt names %d packages for %d", len(want), len(names))
	}
	if out, err = debs.run(ctx, "", "apt-cache", show...); err != nil {
		return nil, fmt.Errorf("image: choose packages: %w", err)
	}
	var list []Package
	for _, stanza := range strings.Split(string(out), "\n\n") {
		f := controlFields(stanza)
		p := Package{Name: f["Package"], Version: f["Version"]}
		if v, ok := want[p.Name]; !ok || v != p.Version {
			continue
		}
		if err := p.SHA256.UnmarshalText([]byte(f["SHA256"])); err != nil {
			return nil, fmt.Errorf("image: choose packages: %s: %w", p.Name, err)
		}
		delete(want, p.Name)
		list = append(list, p)
	}
	if len(want) > 0 {
		return nil, fmt.Errorf("image: choose packages: apt knows no digest of %v", slices.Sorted(maps.Keys(want)))
	}
	return list, nil
}

// controlFields reads the single lines of a stanza.
func controlFields(stanza string) map[string]string {
	f := map[string]string{}
	for _, line := range strings.Split(stanza, "\n") {
		if key, value, ok := strings.Cut(line, ":"); ok && !strings.HasPrefix(line, " ") {
			f[key] = strings.TrimSpace(value)
		}
	}
	return f
}

// system are the packages of the lock that mmdebstrap installs.
func (b *slotBuild) system() []Package {
	return slices.DeleteFunc(slices.Clone(b.lock.Packages), func(p Package) bool { return p.Name == stubPackage || flavourOf(p.Name) != "" })
}

// programs reads everything that is no package of the system, and learns the
// date and the seed of the build.
func (b *slotBuild) programs(ctx context.Context) error {
	var err error
	if b.node, err = readNodeBinary(b.cfg.NodeBinary); err != nil {
		return err
	}
	date := func(t time.Time) {
		if t.After(b.newest) {
			b.newest = t
		}
	}
	for _, p := range b.lock.Packages {
		b.inputs = append(b.inputs, firmware.Input(p))
		var when time.Time
		switch flavour := flavourOf(p.Name); {
		case p.Name == stubPackage:
			b.stub, when, err = readStub(ctx, b.debs.path(p))
		case flavour != "" && flavour != b.cfg.Flavour:
			err = fmt.Errorf("image: the lock names %s, which is not the %s kernel: give the lock of the same --kernel", p.Name, b.cfg.Flavour)
		case flavour != "":
			b.kernelDeb = b.debs.path(p)
			b.kernel, when, err = readKernel(ctx, b.kernelDeb, strings.TrimPrefix(p.Name, "linux-image-"), flavour, slotModulesText)
		}
		if err != nil {
			return err
		}
		date(when)
	}
	if b.stub == nil || b.kernel.image == nil {
		return fmt.Errorf("image: the lock names no stub (%s) or no kernel: delete it and build once without --lock", stubPackage)
	}
	if b.loader, err = Loader(ctx, b.cfg.CacheDir, b.cfg.Note); err != nil {
		return err
	}
	version, modules := goModules(b.node)
	b.components = append(b.components, modules...)
	b.inputs = append(b.inputs,
		firmware.Input{Name: loaderPackage.Name + " (loader)", Version: loaderPackage.Version, SHA256: loaderPackage.SHA256},
		firmware.Input{Name: "muster-node", Version: version, SHA256: digestOf(b.node)})
	if b.cfg.K3s != "" {
		if err := b.readK3s(ctx); err != nil {
			return err
		}
	}
	for _, f := range b.cfg.Airgap {
		d, err := fileDigest(f)
		if err != nil {
			return fmt.Errorf("image: read images of k3s: %w", err)
		}
		b.inputs = append(b.inputs, firmware.Input{Name: "images/" + filepath.Base(f), SHA256: d})
	}
	overlay, err := overlayFiles()
	if err != nil {
		return err
	}
	site, err := b.siteFile()
	if err != nil {
		return err
	}
	b.cfg.extra = append(b.cfg.extra, site...)
	if b.cfg.Overlay != "" {
		own, err := readOverlay(b.cfg.Overlay)
		if err != nil {
			return err
		}
		b.cfg.extra = append(b.cfg.extra, own...)
	}
	overlay = append(overlay, b.cfg.extra...)
	h := sha256.New()
	for _, f := range overlay {
		fmt.Fprintf(h, "%s %d %s\n", f.path, f.mode, digestOf(f.data))
	}
	if err := json.NewEncoder(h).Encode(struct {
		Recipe        int
		Name, Version string
		Inputs        []firmware.Input
	}{slotRecipe, b.cfg.Name, b.cfg.Version, b.inputs}); err != nil {
		return err
	}
	b.seed = firmware.Digest(h.Sum(nil))
	return nil
}

// siteFile is site.json in the root. It is part of the image, so that nobody
// who writes the ESP can say whom a node trusts.
func (b *slotBuild) siteFile() ([]treeFile, error) {
	site := b.cfg.Site
	if site.RootsPEM == "" && len(site.Centre) == 0 {
		return nil, nil
	}
	site.TimeFloor = b.newest.UTC().Truncate(time.Second)
	text, err := json.MarshalIndent(site, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("image: write site.json: %w", err)
	}
	return []treeFile{{"etc/muster/site.json", 0o644, append(text, '\n')}}, nil
}

var k3sLine = regexp.MustCompile(`^k3s version (v1\.([0-9]+)\.\S+)`)

func (b *slotBuild) readK3s(ctx context.Context) error {
	var err error
	if b.k3sDigest, err = fileDigest(b.cfg.K3s); err != nil {
		return fmt.Errorf("image: read k3s: %w", err)
	}
	cmd := exec.CommandContext(ctx, b.cfg.K3s, "--version")
	// k3s unpacks itself into its data folder, wherever that may be.
	cmd.Env = append(os.Environ(), "K3S_DATA_DIR="+filepath.Join(b.tmp, "k3s"), "HOME="+b.tmp)
	out, err := cmd.Output()
	if err != nil {
		return fmt.Errorf("image: ask %s for its version: %w", b.cfg.K3s, err)
	}
	m := k3sLine.FindSubmatch(out)
	if m == nil {
		return fmt.Errorf("image: %s is no k3s: its version line is %.80q", b.cfg.K3s, lastLine(string(out)))
	}
	b.k3s, b.etcd = string(m[1]), b.cfg.EtcdMinor
	if b.etcd == "" {
		switch minor, _ := strconv.Atoi(string(m[2])); {
		case minor >= 34:
			b.etcd = "3.6"
		case minor >= 22:
			b.etcd = "3.5"
		default:
			return fmt.Errorf("image: which etcd is in k3s %s? Give --etcd-minor", b.k3s)
		}
	}
	b.inputs = append(b.inputs, firmware.Input{Name: "k3s", Version: b.k3s, SHA256: b.k3sDigest})
	return nil
}

// epoch is the date of every file in the image.
func (b *slotBuild) epoch() string { return strconv.FormatInt(b.newest.Unix(), 10) }

// root packs the tree and makes its hash tree.
func (b *slotBuild) root(ctx context.Context) error {
	b.cfg.Note("packing the root file system")
	rootUUID, verityUUID := derivedUUID("root", b.seed), derivedUUID("verity", b.seed)
	salt := derive("salt", b.seed)
	rootFile, verityFile := filepath.Join(b.tmp, "root"), filepath.Join(b.tmp, "verity")
	// No extended attributes: those of the build host would get in.
	if _, err := b.debs.run(ctx, b.tmp, "mkfs.erofs", "-zlz4hc", "-x-1", "-T", b.epoch(), "-U", rootUUID.String(), rootFile, b.rootDir); err != nil {
		return fmt.Errorf("image: pack root: %w", err)
	}
	out, err := b.debs.run(ctx, b.tmp, "veritysetup", "format", "--uuid", verityUUID.String(), "--salt", fmt.Sprintf("%x", salt), "--hash", "sha256", rootFile, verityFile)
	if err != nil {
		return fmt.Errorf("image: make hash tree: %w", err)
	}
	m := regexp.MustCompile(`(?m)^Root hash:\s*([0-9a-f]{64})$`).FindSubmatch(out)
	if m == nil {
		return errors.New("image: make hash tree: veritysetup names no root hash")
	}
	b.slot = firmware.SlotImage{RootUUID: rootUUID.String(), VerityUUID: verityUUID.String(), ChunkSize: firmware.ChunkSize,
		K3s: b.k3s, K3sDigest: b.k3sDigest, EtcdMinor: b.etcd}
	if err := b.slot.RootHash.UnmarshalText(m[1]); err != nil {
		return err
	}
	// veritysetup gives its file the size of what it wrote, a whole number of
	// blocks, superblock included.
	if b.slot.Root, err = fileOf(rootFile, slotFile(b.cfg.Name, b.cfg.Version, "root")); err != nil {
		return err
	}
	if b.slot.Verity, err = fileOf(verityFile, slotFile(b.cfg.Name, b.cfg.Version, "verity")); err != nil {
		return err
	}
	f, err := os.Open(rootFile)
	if err != nil {
		return err
	}
	defer f.Close()
	b.slot.Chunks, err = firmware.Chunks(f)
	return err
}

func fileOf(path, name string) (firmware.File, error) {
	d, err := fileDigest(path)
	if err != nil {
		return firmware.File{}, err
	}
	info, err := os.Stat(path)
	if err != nil {
		return firmware.File{}, err
	}
	return firmware.File{File: name, Size: info.Size(), SHA256: d}, nil
}

// boot makes the UKI and signs what firmware starts.
func (b *slotBuild) boot(ctx context.Context) error {
	b.cfg.Note("packing the initrd (%d modules)", len(b.kernel.paths))
	cpio, err := archive(append([]file{{path: "/init", exec: true, data: b.node}}, b.kernel.modules...))
	if err != nil {
		return err
	}
	initrd, err := compress(cpio)
	if err != nil {
		return err
	}
	osRelease := slotOSRelease(b.cfg.Name, b.cfg.Version)
	if b.efi, err = assemble(b.stub, []section{
		{firmware.SectionOSRel, []byte(osRelease)},
		{firmware.SectionCmdline, []byte(SlotCmdline + " " + b.slot.RootArguments())},
		{firmware.SectionLinux, b.kernel.image},
		{firmware.SectionInitrd, initrd},
	}); err != nil {
		return err
	}
	if b.cfg.SignKey != "" {
		b.cfg.Note("signing UKI and loader for Secure Boot")
		if b.efi, b.cert, err = signPE(ctx, b.cfg.SignKey, b.cfg.SignCert, b.efi); err != nil {
			return err
		}
		if b.loader, _, err = signPE(ctx, b.cfg.SignKey, b.cfg.SignCert, b.loader); err != nil {
			return err
		}
	}
	if b.measured, err = Measure(b.efi); err != nil {
		return err
	}
	if b.measured.Loader, err = authenticode(b.loader); err != nil {
		return err
	}
	part := func(name string, size, packed int64) {
		b.parts = append(b.parts, firmware.Part{Name: name, Size: size, Packed: packed})
	}
	part("UKI: kernel "+b.kernel.release, int64(len(b.kernel.image)), int64(len(b.kernel.image)))
	part("UKI: initrd", int64(len(cpio)), int64(len(initrd)))
	part("loader", int64(len(b.loader)), int64(len(b.loader)))
	whole := treeSize(b.rootDir)
	part("root", whole, b.slot.Root.Size)
	rest := whole
	for _, p := range []struct{ name, path string }{
		{"kernel modules", "usr/lib/modules"}, {"muster-node", "usr/local/bin/muster-node"}, {"k3s", "usr/local/bin/k3s"}, {"container images", "usr/share/muster/images"},
	} {
		if n := treeSize(filepath.Join(b.rootDir, p.path)); n > 0 {
			part("root: "+p.name, n, 0)
			rest -= n
		}
	}
	part("root: Debian packages", rest, 0)
	part("hash tree", b.slot.Verity.Size, b.slot.Verity.Size)
	return nil
}

// write puts the files into the output folder, the manifest last.
func (b *slotBuild) write(context.Context) error {
	name := func(suffix string) string { return slotFile(b.cfg.Name, b.cfg.Version, suffix) }
	b.slot.Loader = firmware.File{File: name("loader.efi"), Size: int64(len(b.loader)), SHA256: digestOf(b.loader)}
	m := firmware.Manifest{
		Format: firmware.ManifestFormat, Name: b.cfg.Name, Version: b.cfg.Version, Kind: fleet.ImageSlot, Arch: "amd64",
		File: name("efi"), SHA256: digestOf(b.efi), Size: int64(len(b.efi)), Parts: b.parts, Inputs: b.inputs,
		Measurements: b.measured, SecureBoot: firmware.SecureBoot{SignerCertSHA256: b.cert},
		Slot: &b.slot, Created: b.newest.UTC().Truncate(time.Second),
	}
	payload, err := m.JSON()
	if err != nil {
		return err
	}
	lockJSON, err := b.lock.JSON()
	if err != nil {
		return err
	}
	sbom, err := bill(m, b.components)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(b.cfg.OutDir, 0o755); err != nil {
		return fmt.Errorf("image: make output folder: %w", err)
	}
	// A manifest of an earlier build would speak of other files.
	if err := os.Remove(filepath.Join(b.cfg.OutDir, name("manifest"))); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("image: write output: %w", err)
	}
	for from, to := range map[string]string{"root": name("root"), "verity": name("verity")} {
		if err := copyFile(filepath.Join(b.tmp, from), filepath.Join(b.cfg.OutDir, to)); err != nil {
			return fmt.Errorf("image: write output: %w", err)
		}
	}
	files := []struct {
		name string
		data []byte
	}{{name("efi"), b.efi}, {name("loader.efi"), b.loader}, {name("sbom.json"), sbom}, {name("lock.json"), lockJSON}}
	if b.cfg.Release != nil {
		envelope, err := statement.Sign(firmware.ManifestType, payload, b.cfg.Release)
		if err != nil {
			return fmt.Errorf("image: sign manifest: %w", err)
		}
		b.result.Envelope = envelope.JSON()
		files = append(files, struct {
			name string
			data []byte
		}{name("manifest"), b.result.Envelope})
	}
	for _, f := range files {
		if err := renameio.WriteFile(filepath.Join(b.cfg.OutDir, f.name), f.data, 0o644); err != nil {
			return fmt.Errorf("image: write output: %w", err)
		}
	}
	b.result.Manifest, b.result.Lock, b.result.Base = m, b.lock, b.basePath
	return nil
}

func copyFile(from, to string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := renameio.NewPendingFile(to, renameio.WithPermissions(0o644))
	if err != nil {
		return err
	}
	defer out.Cleanup() //nolint:errcheck // nothing to do about it
	if _, err := io.Copy(out, in); err != nil {
		return err
	}
	return out.CloseAtomicallyReplace()
}

func digestOf(b []byte) firmware.Digest { return sha256.Sum256(b) }

// slotOSRelease is the image's os-release(5). systemd-boot sorts entries by ID,
// then by version.
func slotOSRelease(name, version string) string {
	return fmt.Sprintf("ID=%[1]s\nID_LIKE=debian\nNAME=\"muster %[1]s\"\nVERSION_ID=\"%[2]s\"\nPRETTY_NAME=\"muster %[1]s %[2]s\"\n", name, version)
}

// goModules lists what a Go program was built from.
func goModules(program []byte) (version string, list []component) {
	info, err := buildinfo.Read(bytes.NewReader(program))
	if err != nil {
		return "", nil
	}
	list = append(list, component{Name: "go", Version: strings.TrimPrefix(info.GoVersion, "go"), PURL: "pkg:golang/stdlib@" + info.GoVersion})
	for _, d := range info.Deps {
		list = append(list, component{Name: d.Path, Version: d.Version, PURL: "pkg:golang/" + d.Path + "@" + d.Version})
	}
	return strings.TrimSpace(info.Main.Version + " " + info.GoVersion), list
}
