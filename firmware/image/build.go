package image

import (
	"bytes"
	"context"
	"crypto/sha256"
	"debug/buildinfo"
	"debug/elf"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/google/renameio/v2"

	"github.com/muster-edge/muster/firmware"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/statement"
)

// Files of a recovery image in its output folder.
const (
	RecoveryFile = "recovery.efi"
	// ManifestFile is the DSSE envelope; it is written only with a release
	// key.
	ManifestFile = "manifest.dsse.json"
	LockFile     = "recovery.lock.json"
)

const (
	stubPackage = "systemd-boot-efi"
	stubPath    = "usr/lib/systemd/boot/efi/linuxx64.efi.stub"
	// stubVersion is what firmware.PCR11 describes.
	stubVersion = "systemd-stub 252"
)

// Cmdline of the recovery image. It is measured and, under Secure Boot, signed
// with the image; the stub then ignores what a boot loader passes. A machine
// that hangs or panics starts over; the serial console is named last, since
// the last one is /dev/console.
const Cmdline = "console=tty0 console=ttyS0,115200n8 panic=10 oops=panic quiet loglevel=4"

// Result is a finished build.
type Result struct {
	Manifest firmware.Manifest
	// Envelope is the signed manifest, nil without a release key.
	Envelope []byte
	Lock     Lock
	// Modules are the paths of the kernel modules in the initrd.
	Modules []string
	// TimeFloor is what site.json says.
	TimeFloor time.Time
}

// Build makes the recovery image and writes it to cfg.OutDir. The bytes of an
// unsigned image depend on the packages, the node binary, Site, Name and
// Version alone. A Secure Boot signature holds the time of signing, so signed
// files differ from build to build while their Authenticode digest does not.
func Build(ctx context.Context, cfg RecoveryConfig) (Result, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return Result{}, err
	}
	if err := cfg.validate(); err != nil {
		return Result{}, err
	}
	debs := archiveCache{dir: cfg.CacheDir, note: cfg.Note}
	lock, err := choosePackages(ctx, debs, cfg)
	if err != nil {
		return Result{}, err
	}
	in, err := readInputs(ctx, debs, cfg, lock)
	if err != nil {
		return Result{}, err
	}
	cfg.Note("packing the initrd (%d modules)", len(in.kernel.paths))
	made, err := compose(cfg, in)
	if err != nil {
		return Result{}, err
	}
	if cfg.SignKey != "" {
		if made, err = sign(ctx, cfg, made); err != nil {
			return Result{}, err
		}
	}
	return write(cfg, lock, in, made)
}

// choosePackages returns the lock: the one given, or one made from what apt
// would install now.
func choosePackages(ctx context.Context, debs archiveCache, cfg RecoveryConfig) (Lock, error) {
	if cfg.Lock != nil {
		return *cfg.Lock, nil
	}
	stub, _, err := debs.candidate(ctx, stubPackage)
	if err != nil {
		return Lock{}, err
	}
	meta := map[string]string{FlavourCloud: "linux-image-cloud-amd64", FlavourGeneric: "linux-image-amd64"}[cfg.Flavour]
	_, depends, err := debs.candidate(ctx, meta)
	if err != nil {
		return Lock{}, err
	}
	// "linux-image-6.1.0-56-amd64 (= 6.1.192-2)"
	name, _, _ := strings.Cut(strings.TrimSpace(depends), " ")
	if flavourOf(name) != cfg.Flavour {
		return Lock{}, fmt.Errorf("image: find kernel: %s depends on %.80q, which is no kernel package", meta, depends)
	}
	kernel, _, err := debs.candidate(ctx, name)
	if err != nil {
		return Lock{}, err
	}
	return Lock{Format: LockFormat, Packages: []Package{kernel, stub}}, nil
}

var kernelForm = regexp.MustCompile(`^linux-image-[0-9]+\.[0-9]+\.[0-9]+-[0-9]+(-cloud)?-amd64$`)

// flavourOf returns the flavour of a kernel package, "" for any other.
func flavourOf(pkg string) string {
	m := kernelForm.FindStringSubmatch(pkg)
	switch {
	case m == nil:
		return ""
	case m[1] != "":
		return FlavourCloud
	}
	return FlavourGeneric
}

// inputs are the bytes an image is made of.
type inputs struct {
	stub   []byte
	kernel kernel
	node   []byte
	list   []firmware.Input
	// newest is the newest date among the inputs.
	newest time.Time
}

func readInputs(ctx context.Context, debs archiveCache, cfg RecoveryConfig, lock Lock) (inputs, error) {
	var in inputs
	date := func(t time.Time) {
		if t.After(in.newest) {
			in.newest = t
		}
	}
	// The node binary first: it is the input most likely to be wrong.
	var err error
	if in.node, err = readNodeBinary(cfg.NodeBinary); err != nil {
		return in, err
	}
	version := ""
	if info, err := buildinfo.Read(bytes.NewReader(in.node)); err == nil {
		version = strings.TrimSpace(info.Main.Version + " " + info.GoVersion)
		for _, s := range info.Settings {
			if t, err := time.Parse(time.RFC3339, s.Value); s.Key == "vcs.time" && err == nil {
				date(t)
			}
		}
	}

	for _, p := range lock.Packages {
		flavour := flavourOf(p.Name)
		if p.Name != stubPackage && flavour != cfg.Flavour {
			return in, fmt.Errorf("image: the lock names %s, which a recovery image with the %s kernel does not use: give the lock of the same --kernel", p.Name, cfg.Flavour)
		}
		deb, err := debs.fetch(ctx, p)
		if err != nil {
			return in, err
		}
		cfg.Note("unpacking %s %s", p.Name, p.Version)
		var when time.Time
		if p.Name == stubPackage {
			in.stub, when, err = readStub(ctx, deb)
		} else {
			in.kernel, when, err = readKernel(ctx, deb, strings.TrimPrefix(p.Name, "linux-image-"), flavour, modulesText)
		}
		if err != nil {
			return in, err
		}
		date(when)
		in.list = append(in.list, firmware.Input(p))
	}
	if in.stub == nil || in.kernel.image == nil {
		return in, fmt.Errorf("image: the lock names no stub (%s) or no kernel: delete it and build once without --lock", stubPackage)
	}
	in.list = append(in.list, firmware.Input{Name: "muster-node", Version: version, SHA256: sha256.Sum256(in.node)})
	return in, nil
}

// readNodeBinary wants a program that runs without anything else in the
// initrd.
func readNodeBinary(path string) ([]byte, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("image: read node program: %w (`make build` makes bin/muster-node)", err)
	}
	f, err := elf.NewFile(bytes.NewReader(data))
	if err != nil {
		return nil, fmt.Errorf("image: node program %s is not an ELF file: %w", path, err)
	}
	if f.Machine != elf.EM_X86_64 {
		return nil, fmt.Errorf("image: node program %s is for %v, the image for amd64: build with GOARCH=amd64", path, f.Machine)
	}
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			return nil, fmt.Errorf("image: node program %s needs a dynamic loader, and the image has none: build with CGO_ENABLED=0", path)
		}
	}
	return data, nil
}

func readStub(ctx context.Context, deb string) ([]byte, time.Time, error) {
	var stub []byte
	var when time.Time
	err := walkDeb(ctx, deb,
		func(p string) bool { return p == stubPath || isChangelog(p) },
		func(p string, data []byte) (err error) {
			if p == stubPath {
				stub = data
				return nil
			}
			when, err = changelogDate(data)
			return err
		})
	switch {
	case err != nil:
		return nil, when, err
	case stub == nil:
		return nil, when, fmt.Errorf("image: %s holds no %s", filepath.Base(deb), stubPath)
	case !bytes.Contains(stub, []byte(stubVersion)):
		return nil, when, fmt.Errorf("image: %s is not %s: its measurements are not known here; the rules in firmware.PCR11 must be extended and proved first", filepath.Base(deb), stubVersion)
	}
	return stub, when, nil
}

// kernel is what the kernel package gives.
type kernel struct {
	release string // as `uname -r`
	image   []byte
	modules []file
	sizes   map[string]int64 // bytes of modules by folder
	paths   []string
}

// needed are kernel options without which the image cannot boot or do its job.
var needed = []string{"CONFIG_RD_ZSTD=y", "CONFIG_EFI_STUB=y", "CONFIG_BLK_DEV_INITRD=y", "CONFIG_SECURITYFS=y", "CONFIG_DEVTMPFS=y"}

// readKernel reads the package twice: once to learn the modules' dependencies,
// once to take the chosen ones. All 4,000 of the generic kernel at once would
// need 400 MB.
func readKernel(ctx context.Context, deb, release, flavour, modules string) (kernel, time.Time, error) {
	k := kernel{release: release, sizes: map[string]int64{}}
	root := "lib/modules/" + release + "/"
	imagePath, configPath := "boot/vmlinuz-"+release, "boot/config-"+release
	var config, builtin, order []byte
	var all []moduleInfo
	var when time.Time
	err := walkDeb(ctx, deb,
		func(p string) bool {
			return p == imagePath || p == configPath || isChangelog(p) || p == root+"modules.builtin" || p == root+"modules.order" ||
				strings.HasPrefix(p, root) && strings.HasSuffix(p, ".ko")
		},
		func(p string, data []byte) (err error) {
			switch {
			case p == imagePath:
				k.image = data
			case p == configPath:
				config = data
			case p == root+"modules.builtin":
				builtin = data
			case p == root+"modules.order":
				order = data
			case isChangelog(p):
				when, err = changelogDate(data)
			default:
				var m moduleInfo
				m, err = parseModule(strings.TrimPrefix(p, root), data)
				all = append(all, m)
			}
			return err
		})
	if err != nil {
		return k, when, err
	}
	if k.image == nil || config == nil || builtin == nil {
		return k, when, fmt.Errorf("image: %s lacks the kernel, its configuration or modules.builtin", filepath.Base(deb))
	}
	lines := strings.Split(string(config), "\n")
	var problems []error
	for _, want := range needed {
		if !slices.Contains(lines, want) {
			problems = append(problems, fmt.Errorf("image: kernel %s: %s is missing", release, want))
		}
	}
	if err := errors.Join(problems...); err != nil {
		return k, when, err
	}
	groups, err := parseModuleGroups(modules)
	if err != nil {
		return k, when, err
	}
	plan, err := planModules(wanted(groups, flavour), all, string(builtin))
	if err != nil {
		return k, when, err
	}
	k.paths = plan.paths
	take := map[string]bool{}
	for _, p := range plan.paths {
		take[root+p] = true
	}
	err = walkDeb(ctx, deb, func(p string) bool { return take[p] }, func(p string, data []byte) error {
		// The bytes stay as they are: Debian's signature is at their end,
		// and a kernel under Secure Boot loads nothing else.
		k.modules = append(k.modules, file{path: "/" + p, data: data})
		k.sizes[moduleFolder(strings.TrimPrefix(p, root))] += int64(len(data))
		delete(take, p)
		return nil
	})
	if err != nil {
		return k, when, err
	}
	if len(take) > 0 {
		return k, when, fmt.Errorf("image: %s changed while it was read", filepath.Base(deb))
	}
	for name, text := range map[string]string{"modules.dep": plan.dep, "modules.alias": plan.alias, "modules.builtin": string(builtin), "modules.order": string(order)} {
		if text != "" {
			k.modules = append(k.modules, file{path: "/" + root + name, data: []byte(text)})
			k.sizes["tables"] += int64(len(text))
		}
	}
	return k, when, nil
}

// moduleFolder groups sizes: kernel/drivers/net/..., kernel/fs/...
func moduleFolder(p string) string {
	parts := strings.Split(strings.TrimPrefix(p, "kernel/"), "/")
	if len(parts) > 2 && parts[0] == "drivers" {
		return "drivers/" + parts[1]
	}
	return parts[0]
}

// made is an image and what is known of it.
type made struct {
	efi       []byte
	measured  firmware.Measurements
	secure    firmware.SecureBoot
	parts     []firmware.Part
	timeFloor time.Time
}

// compose is the pure middle of the build: inputs to UKI.
func compose(cfg RecoveryConfig, in inputs) (made, error) {
	var m made
	m.timeFloor = cfg.TimeFloor
	if m.timeFloor.IsZero() {
		m.timeFloor = in.newest
	}
	m.timeFloor = m.timeFloor.UTC().Truncate(time.Second)
	if m.timeFloor.IsZero() {
		return m, errors.New("image: no input has a date: give --time-floor")
	}
	site := cfg.Site
	site.TimeFloor = m.timeFloor
	siteJSON, err := json.MarshalIndent(site, "", "  ")
	if err != nil {
		return m, fmt.Errorf("image: write site.json: %w", err)
	}
	siteJSON = append(siteJSON, '\n')
	osRelease := []byte(osRelease(cfg.Version))

	files := append([]file{
		{path: "/init", exec: true, data: in.node},
		{path: "/etc/muster/site.json", data: siteJSON},
		{path: "/etc/os-release", data: osRelease},
	}, in.kernel.modules...)
	cpio, err := archive(files)
	if err != nil {
		return m, err
	}
	initrd, err := compress(cpio)
	if err != nil {
		return m, err
	}
	sections := []section{
		{firmware.SectionOSRel, osRelease},
		{firmware.SectionCmdline, []byte(Cmdline)},
		{firmware.SectionLinux, in.kernel.image},
		{firmware.SectionInitrd, initrd},
	}
	if m.efi, err = assemble(in.stub, sections); err != nil {
		return m, err
	}
	// Measured from the file as a verifier reads it, not from the parts as
	// the builder meant them.
	if m.measured, err = Measure(m.efi); err != nil {
		return m, err
	}

	part := func(name string, size, packed int) {
		m.parts = append(m.parts, firmware.Part{Name: name, Size: int64(size), Packed: int64(packed)})
	}
	part("stub", len(in.stub), len(in.stub))
	part("kernel "+in.kernel.release, len(in.kernel.image), len(in.kernel.image))
	part("initrd", len(cpio), len(initrd))
	part("initrd: muster-node", len(in.node), 0)
	for _, folder := range slices.Sorted(maps.Keys(in.kernel.sizes)) {
		part("initrd: modules "+folder, int(in.kernel.sizes[folder]), 0)
	}
	part("initrd: site.json, os-release", len(siteJSON)+len(osRelease), 0)
	return m, nil
}

// osRelease is the image's os-release(5). systemd-boot sorts entries by ID:
// "zz-" keeps recovery behind every slot that still may boot.
func osRelease(version string) string {
	return fmt.Sprintf("ID=zz-muster-recovery\nNAME=\"muster recovery\"\nVERSION_ID=\"%[1]s\"\nPRETTY_NAME=\"muster recovery %[1]s\"\n", version)
}

// Measure computes from the bytes of a UKI what a machine running it shows.
func Measure(efi []byte) (firmware.Measurements, error) {
	var m firmware.Measurements
	pe, err := firmware.ParsePE(efi)
	if err != nil {
		return m, err
	}
	if m.Authenticode, err = pe.Authenticode(); err != nil {
		return m, err
	}
	sections, err := pe.UKISections()
	if err != nil {
		return m, err
	}
	kernel, err := firmware.ParsePE(sections[firmware.SectionLinux])
	if err != nil {
		return m, fmt.Errorf("image: kernel: %w", err)
	}
	if m.Kernel, err = kernel.Authenticode(); err != nil {
		return m, fmt.Errorf("image: kernel: %w", err)
	}
	m.Sections = firmware.MeasureSections(sections)
	m.PCR11, err = firmware.PCR11(m.Sections)
	return m, err
}

func write(cfg RecoveryConfig, lock Lock, in inputs, m made) (Result, error) {
	created := cfg.Created
	if created.IsZero() {
		created = m.timeFloor
	}
	manifest := firmware.Manifest{
		Format: firmware.ManifestFormat, Name: cfg.Name, Version: cfg.Version,
		Kind: fleet.ImageRecovery, Arch: "amd64",
		File: RecoveryFile, SHA256: sha256.Sum256(m.efi), Size: int64(len(m.efi)),
		Parts: m.parts, Inputs: in.list, Measurements: m.measured, SecureBoot: m.secure,
		Created: created.UTC().Truncate(time.Second),
	}
	formats, err := checkFormats(cfg.Formats)
	if err != nil {
		return Result{}, err
	}
	media := map[string][]byte{}
	for _, format := range formats {
		cfg.Note("making the %s", mediaFiles[format])
		data, err := makeMedium(format, m.efi, m.timeFloor)
		if err != nil {
			return Result{}, err
		}
		media[format] = data
		manifest.Media = append(manifest.Media, firmware.Medium{
			Format: format, File: mediaFiles[format], SHA256: sha256.Sum256(data), Size: int64(len(data)),
		})
	}
	payload, err := manifest.JSON()
	if err != nil {
		return Result{}, err
	}
	lockJSON, err := lock.JSON()
	if err != nil {
		return Result{}, err
	}
	result := Result{Manifest: manifest, Lock: lock, Modules: in.kernel.paths, TimeFloor: m.timeFloor}
	if err := os.MkdirAll(cfg.OutDir, 0o755); err != nil {
		return Result{}, fmt.Errorf("image: make output folder: %w", err)
	}
	put := func(name string, data []byte) {
		if err == nil {
			err = renameio.WriteFile(filepath.Join(cfg.OutDir, name), data, 0o644)
		}
	}
	put(RecoveryFile, m.efi)
	for format, name := range mediaFiles {
		if data := media[format]; data != nil {
			put(name, data)
		} else if rmErr := os.Remove(filepath.Join(cfg.OutDir, name)); rmErr != nil && !errors.Is(rmErr, os.ErrNotExist) {
			// A medium of an earlier build holds another image.
			err = errors.Join(err, rmErr)
		}
	}
	put(LockFile, lockJSON)
	if cfg.Release != nil {
		envelope, signErr := statement.Sign(firmware.ManifestType, payload, cfg.Release)
		if signErr != nil {
			return Result{}, fmt.Errorf("image: sign manifest: %w", signErr)
		}
		result.Envelope = envelope.JSON()
		// Last: whoever sees the manifest finds the file it speaks of.
		put(ManifestFile, result.Envelope)
	} else if rmErr := os.Remove(filepath.Join(cfg.OutDir, ManifestFile)); rmErr != nil && !errors.Is(rmErr, os.ErrNotExist) {
		// A manifest of an earlier build would speak of another file.
		err = errors.Join(err, rmErr)
	}
	if err != nil {
		return Result{}, fmt.Errorf("image: write output: %w", err)
	}
	return result, nil
}
