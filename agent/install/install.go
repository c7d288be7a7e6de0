package install

import (
	"bytes"
	"context"
	"crypto"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"path/filepath"
	"slices"
	"time"

	"github.com/muster-edge/muster/agent/fetch"
	"github.com/muster-edge/muster/firmware"
	"github.com/muster-edge/muster/firmware/disk"
	"github.com/muster-edge/muster/firmware/efi"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/internal/failpoint"
)

// Source serves files by their digests, and manifests.
type Source interface {
	fetch.Source
	Manifest(ctx context.Context, image fetch.Digest, most int64) ([]byte, error)
}

// Config says what an Installer works with. What is not marked optional is
// needed.
type Config struct {
	Node fleet.NodeID
	// Arch is Go's word for this machine's.
	Arch        string
	ReleaseKeys []crypto.PublicKey
	Machine     Machine
	// Disks are those of this machine, now.
	Disks func() []fleet.Disk
	// Orders are the verified orders for this node, oldest first; Withdrawn
	// says which of them the centre took back.
	Orders    func() []fleet.Order
	Withdrawn func(id string) bool
	// TimeKnown: the centre told the time, and which orders stand.
	TimeKnown func() bool
	Now       func() time.Time
	// Sources are asked in this order for the files of the image.
	Sources func() []Source
	// Rate is the most bytes a second; 0: as fast as it goes. Optional.
	Rate int64
	// Recovery names what may be the manifest of the recovery image that
	// belongs on the disk, once HandOver is complete; why there is none. The
	// manifest decides. Optional: then the disk gets none.
	Recovery func() (images []fleet.ImageRef, why string)
	// HandOver returns what the system is to find; missing says what it lacks.
	HandOver func() (h HandOver, missing string)
	// Tell says to the centre how far an order is; it does not wait for it.
	Tell func(order string, state fleet.OrderState, text string)
	// Heard waits until the centre has heard of what Tell said, for a while.
	Heard func(ctx context.Context)
	// Restart ends this system.
	Restart func(why string)
	// Shows is called when what Now returns has changed. Optional.
	Shows func()
	// Log is optional.
	Log *slog.Logger
	// cut is a test's power cut: called before and after each action.
	cut func(point string) error
}

// Now is where the machine stands, for screen and report.
type Now struct {
	State   firmware.InstallState
	Reason  string
	Percent int
	// Image is what is being installed, as name and version.
	Image string
}

// Installer installs. Now may be called by anybody.
type Installer struct {
	cfg     Config
	log     *slog.Logger
	fetcher fetch.Fetcher
	now     box
	done    map[string]bool
	// manifest of the order's image, and why there is none.
	manifest *firmware.Manifest
	why      string
	// recovery is the manifest of the recovery image, recoveryWhy why the disk
	// gets none.
	recovery    *firmware.Manifest
	recoveryWhy string
	// looked is the disk that target is about.
	target    *firmware.TargetDisk
	targetWhy string
	looked    string
	last      string
	// entriesSet: the firmware was told once. Some do not keep what they are
	// told; then the default path is left, and no loop.
	entriesSet bool
}

// New checks the configuration.
func New(cfg Config) (*Installer, error) {
	var errs []error
	check := func(ok bool, what string) {
		if !ok {
			errs = append(errs, errors.New("install: config: "+what+" is missing"))
		}
	}
	check(cfg.Node != "", "Node")
	check(cfg.Arch != "", "Arch")
	check(len(cfg.ReleaseKeys) > 0, "ReleaseKeys")
	check(cfg.Machine != nil, "Machine")
	check(cfg.Disks != nil, "Disks")
	check(cfg.Orders != nil, "Orders")
	check(cfg.Withdrawn != nil, "Withdrawn")
	check(cfg.TimeKnown != nil, "TimeKnown")
	check(cfg.Now != nil, "Now")
	check(cfg.Sources != nil, "Sources")
	check(cfg.HandOver != nil, "HandOver")
	check(cfg.Tell != nil, "Tell")
	check(cfg.Heard != nil, "Heard")
	check(cfg.Restart != nil, "Restart")
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	i := &Installer{cfg: cfg, log: cfg.Log, done: map[string]bool{}}
	if cfg.Recovery == nil {
		i.recoveryWhy = "nobody says which one it is"
	}
	i.fetcher = fetch.Fetcher{Rate: cfg.Rate, Log: cfg.Log, Progress: i.progress, Sources: func() (out []fetch.Source) {
		for _, s := range cfg.Sources() {
			out = append(out, s)
		}
		return out
	}}
	return i, nil
}

// Now returns where the machine stands.
func (i *Installer) Now() Now { return i.now.get() }

// Pauses of the loop.
const (
	idlePause = 3 * time.Second
	failPause = 10 * time.Second
	// heardFor is how long the centre may take to hear that an order is done.
	heardFor = 30 * time.Second
)

// Run plans and acts until ctx ends.
func (i *Installer) Run(ctx context.Context) error {
	for {
		busy, err := i.Step(ctx)
		pause := idlePause
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case err != nil:
			i.log.Warn("install", "err", err)
			i.show(func(n *Now) { n.Reason = "It did not work, and is tried again: " + err.Error() })
			i.forget()
			pause = failPause
		case busy:
			continue
		}
		t := time.NewTimer(pause)
		select {
		case <-ctx.Done():
			t.Stop()
			return ctx.Err()
		case <-t.C:
		}
	}
}

// forget makes the next plan look at the disk again.
func (i *Installer) forget() { i.target, i.targetWhy, i.looked = nil, "", "" }

// Step looks, plans and does what the plan says. busy: there is more to do.
func (i *Installer) Step(ctx context.Context) (busy bool, err error) {
	f := i.facts()
	state, acts := firmware.PlanInstall(f)
	for _, a := range acts {
		i.tell(state, a)
		if a.Kind == firmware.InstallWait {
			// What was in the way may change without a word.
			if state == firmware.InstallWaiting {
				i.forget()
				i.why = ""
			}
			return false, nil
		}
		i.log.Info("install", "state", state.String(), "action", a.Kind.String(), "file", a.File, "reason", a.Reason)
		if err := i.at(a.Kind, "begin"); err != nil {
			return false, err
		}
		if err := i.do(ctx, a, f); err != nil {
			return false, fmt.Errorf("install: %s: %w", a.Kind, err)
		}
		if err := i.at(a.Kind, "end"); err != nil {
			return false, err
		}
	}
	return true, nil
}

func (i *Installer) at(k firmware.InstallKind, when string) error {
	point := "install." + k.String() + "." + when
	failpoint.Hit(point)
	if i.cfg.cut != nil {
		return i.cfg.cut(point)
	}
	return nil
}

func (i *Installer) facts() firmware.InstallFacts {
	f := firmware.InstallFacts{
		Now: i.cfg.Now(), TimeKnown: i.cfg.TimeKnown(), Node: i.cfg.Node, Arch: i.cfg.Arch, Orders: i.cfg.Orders(),
		Withdrawn: i.cfg.Withdrawn, Done: func(id string) bool { return i.done[id] }, Disks: i.cfg.Disks(), ImageWhy: i.why,
		Recovery: i.recovery, RecoveryWhy: i.recoveryWhy,
	}
	if o, _ := firmware.PickInstallOrder(f); o != nil && o.Image != nil && i.manifest != nil && bytes.Equal(i.manifest.SHA256[:], o.Image.SHA256) {
		f.Image = i.manifest
	}
	if o, _ := firmware.PickInstallOrder(f); o != nil && o.ID == i.looked {
		f.Target, f.TargetWhy = i.target, i.targetWhy
	}
	var h HandOver
	h, f.Missing = i.cfg.HandOver()
	f.HandOver = f.Missing == ""
	_ = h
	return f
}

func (i *Installer) do(ctx context.Context, a firmware.InstallAction, f firmware.InstallFacts) error {
	switch a.Kind {
	case firmware.FetchManifest:
		return i.fetchManifest(ctx, *a.Order)
	case firmware.FetchRecovery:
		return i.changed(i.fetchRecovery(ctx))
	case firmware.LookAtDisk:
		return i.look(*a.Order, *a.Disk)
	case firmware.WriteTable:
		return i.changed(i.writeTable(*a.Disk))
	case firmware.MakeESP:
		return i.changed(i.part(*a.Disk, firmware.LabelESP, func(d Device) error { return disk.FormatESP(d) }))
	case firmware.InstallMeta:
		return i.changed(i.writeMeta(*a.Disk, *a.Meta, f.Target.Meta.Seq))
	case firmware.WriteSystem:
		return i.changed(i.writeSystem(ctx, *a.Disk, f.Target.Meta))
	case firmware.EraseData:
		return i.changed(i.part(*a.Disk, firmware.LabelData, func(d Device) error { return disk.Erase(d) }))
	case firmware.WriteLoader:
		return i.changed(i.onESP(*a.Disk, func(e *efi.ESP) error { return i.writeLoader(ctx, e) }))
	case firmware.StageSystem:
		return i.changed(i.stage(ctx, *a.Disk, *i.manifest, a.File))
	case firmware.StageRecovery:
		return i.changed(i.stage(ctx, *a.Disk, *i.recovery, a.File))
	case firmware.WriteDocuments:
		return i.changed(i.onESP(*a.Disk, i.writeDocuments))
	case firmware.SetEntries:
		return i.changed(i.setEntries(*a.Disk, a.File))
	case firmware.InstallRename:
		return i.changed(i.onESP(*a.Disk, func(e *efi.ESP) error { return e.Rename(a.File, a.To) }))
	case firmware.InstallRemove:
		return i.changed(i.onESP(*a.Disk, func(e *efi.ESP) error { return e.Remove(a.File) }))
	case firmware.WipeDisk:
		return i.changed(i.wipe(*a.Disk))
	case firmware.TellDone:
		i.done[a.Order.ID] = true
		i.cfg.Tell(a.Order.ID, fleet.OrderDone, a.Reason)
		hctx, cancel := context.WithTimeout(ctx, heardFor)
		defer cancel()
		i.cfg.Heard(hctx)
		return nil
	case firmware.RestartMachine:
		i.cfg.Restart(a.Reason)
		<-ctx.Done() // this system is about to end
		return ctx.Err()
	}
	return fmt.Errorf("no such action")
}

// changed makes the next plan look again.
func (i *Installer) changed(err error) error {
	i.forget()
	return err
}

func (i *Installer) fetchManifest(ctx context.Context, o fleet.Order) error {
	var errs []error
	for _, s := range i.cfg.Sources() {
		b, err := s.Manifest(ctx, fetch.Digest(o.Image.SHA256), fleet.MaxManifest)
		if err == nil {
			var m firmware.Manifest
			if m, err = firmware.OpenManifest(b, i.cfg.ReleaseKeys); err == nil {
				if bytes.Equal(m.SHA256[:], o.Image.SHA256) {
					i.manifest, i.why = &m, ""
					return nil
				}
				err = fmt.Errorf("install: %s gave the manifest of another image", s.Name())
			}
		}
		errs = append(errs, err)
	}
	if len(errs) == 0 {
		errs = []error{errors.New("nobody is known who could have it")}
	}
	i.why = "its manifest did not come: " + errors.Join(errs...).Error()
	return nil
}

// look opens the disk and says what is on it.
func (i *Installer) look(o fleet.Order, d fleet.Disk) error {
	i.target, i.targetWhy, i.looked = nil, "", o.ID
	t, err := i.state(d)
	if err != nil {
		i.targetWhy = err.Error()
		return nil
	}
	i.target = t
	return nil
}

func (i *Installer) state(d fleet.Disk) (*firmware.TargetDisk, error) {
	whole, _, err := i.cfg.Machine.Disk(d)
	if err != nil {
		return nil, err
	}
	t := &firmware.TargetDisk{Sector: whole.Sector(), MetaWhy: "there is no such partition"}
	table, terr := disk.ReadTable(whole)
	size := whole.Size()
	if err := whole.Close(); err != nil {
		return nil, err
	}
	if terr != nil {
		return t, nil
	}
	var parts []firmware.Partition
	for _, e := range table {
		parts = append(parts, e.Partition)
	}
	if firmware.CheckLayout(parts, size, t.Sector) != nil {
		return t, nil
	}
	t.Ours = true
	if err := i.part(d, firmware.LabelMeta, func(dev Device) error {
		m, err := disk.ReadMeta(dev)
		t.Meta, t.MetaWhy = m, ""
		if err != nil {
			t.MetaWhy = err.Error()
		}
		return nil
	}); err != nil {
		return nil, err
	}
	if err := i.part(d, firmware.LabelData, func(dev Device) error {
		empty, err := disk.Empty(dev)
		t.Data = !empty
		return err
	}); err != nil {
		return nil, err
	}
	files, umount, err := i.cfg.Machine.Mount(d)
	if err != nil {
		i.log.Info("the ESP cannot be mounted", "err", err)
		return t, nil
	}
	err = i.lookAtESP(efi.On(files), t)
	if uerr := umount(); err == nil && uerr == nil {
		t.ESP = true
	} else {
		i.log.Warn("the ESP cannot be read", "err", errors.Join(err, uerr))
	}
	if t.Entries = i.entriesSet; !t.Entries {
		t.Entries, err = i.entries(table[0].Ref(t.Sector), t.RecoveryFile(i.recovery))
	}
	return t, err
}

func (i *Installer) lookAtESP(e *efi.ESP, t *firmware.TargetDisk) (err error) {
	var writable bool
	if t.Free, writable, err = e.Space(); err != nil {
		return err
	}
	if !writable {
		return errors.New("the ESP is read-only: the kernel found damage")
	}
	if t.Files, err = e.BootFiles(); err != nil {
		return err
	}
	m := i.manifest
	if m == nil || m.Slot == nil {
		return nil
	}
	entry := m.Entry()
	for _, f := range t.Files {
		if f.Base != entry && f.Name != firmware.StagedPrefix+entry {
			continue
		}
		whole, err := e.Whole(f.Name, m.Size, m.SHA256)
		if err != nil {
			return err
		}
		if f.Base == entry {
			t.FinalWhole = whole
		} else {
			t.StagedWhole = whole
		}
	}
	if r := i.recovery; r != nil {
		name := firmware.RecoveryEntry(r.Version)
		if t.RecoveryWhole, err = e.Whole(name, r.Size, r.SHA256); err != nil {
			return err
		}
		if t.RecoveryStaged, err = e.Whole(firmware.StagedPrefix+name, r.Size, r.SHA256); err != nil {
			return err
		}
	}
	t.Loader = true
	for _, name := range []string{firmware.LoaderCopy, firmware.LoaderFile} {
		ok, err := e.HasFile(name, m.Slot.Loader.Size, m.Slot.Loader.SHA256)
		if err != nil {
			return err
		}
		t.Loader = t.Loader && ok
	}
	conf := []byte(firmware.LoaderConf)
	ok, err := e.HasFile(loaderConf, int64(len(conf)), sha256.Sum256(conf))
	if err != nil {
		return err
	}
	t.Loader = t.Loader && ok
	h, _ := i.cfg.HandOver()
	want, err := h.Files()
	if err != nil {
		return err
	}
	t.Documents = true
	for name, b := range want {
		ok, err := e.HasFile(name, int64(len(b)), sha256.Sum256(b))
		if err != nil {
			return err
		}
		t.Documents = t.Documents && ok
	}
	return nil
}

const loaderConf = "loader/loader.conf"

// part opens a partition for do.
func (i *Installer) part(d fleet.Disk, label string, do func(Device) error) error {
	dev, err := i.cfg.Machine.Part(d, label)
	if err != nil {
		return err
	}
	return errors.Join(do(dev), dev.Close())
}

// onESP mounts the ESP for do.
func (i *Installer) onESP(d fleet.Disk, do func(*efi.ESP) error) error {
	files, umount, err := i.cfg.Machine.Mount(d)
	if err != nil {
		return err
	}
	return errors.Join(do(efi.On(files)), umount())
}

func (i *Installer) writeTable(d fleet.Disk) error {
	dev, announce, err := i.cfg.Machine.Disk(d)
	if err != nil {
		return err
	}
	parts, err := firmware.LayoutFor(i.cfg.Arch, dev.Size(), dev.Sector())
	if err == nil {
		_, err = disk.WriteTable(dev, parts)
	}
	if err == nil {
		err = announce()
	}
	return errors.Join(err, dev.Close())
}

func (i *Installer) wipe(d fleet.Disk) error {
	dev, announce, err := i.cfg.Machine.Disk(d)
	if err != nil {
		return err
	}
	return errors.Join(disk.Wipe(dev), announce(), dev.Close())
}

func (i *Installer) writeMeta(d fleet.Disk, m firmware.Meta, last uint64) error {
	return i.part(d, firmware.LabelMeta, func(dev Device) error {
		_, err := disk.WriteMeta(dev, m, last)
		return err
	})
}

func (i *Installer) writeSystem(ctx context.Context, d fleet.Disk, m firmware.Meta) error {
	rootLabel, verityLabel := firmware.RootLabels(firmware.SlotA)
	return i.part(d, rootLabel, func(root Device) error {
		return i.part(d, verityLabel, func(verity Device) error {
			return i.part(d, firmware.LabelMeta, func(meta Device) error {
				return WriteSlot(ctx, &i.fetcher, *i.manifest.Slot, root, verity, m.Update.Verified, func(verified int64) error {
					next := m
					u := *m.Update
					u.Verified = verified
					next.Update = &u
					var err error
					m, err = disk.WriteMeta(meta, next, m.Seq)
					return err
				})
			})
		})
	})
}

func (i *Installer) writeLoader(ctx context.Context, e *efi.ESP) error {
	l := i.manifest.Slot.Loader
	mem := fetch.NewMemory()
	if err := i.fetcher.Whole(ctx, fetch.Blob{Digest: l.SHA256, Size: l.Size}, mem); err != nil {
		return err
	}
	// The settings first: a loader without them would listen to keys.
	if err := e.PutBytes(loaderConf, []byte(firmware.LoaderConf)); err != nil {
		return err
	}
	for _, name := range []string{firmware.LoaderCopy, firmware.LoaderFile} {
		if err := e.Put(name, bytes.NewReader(mem.Bytes()), l.Size, l.SHA256); err != nil {
			return err
		}
	}
	return nil
}

// stage brings the boot file. Where the ESP is a mounted one, what came before
// a power cut is gone on with.
func (i *Installer) stage(ctx context.Context, d fleet.Disk, m firmware.Manifest, name string) error {
	b := fetch.Blob{Digest: m.SHA256, Size: m.Size}
	files, umount, err := i.cfg.Machine.Mount(d)
	if err != nil {
		return err
	}
	e := efi.On(files)
	return errors.Join(func() error {
		dir, mounted := files.(efi.Dir)
		if !mounted {
			mem := fetch.NewMemory()
			if err := i.fetcher.Whole(ctx, b, mem); err != nil {
				return err
			}
			return e.Stage(name, bytes.NewReader(mem.Bytes()), m.Size, m.SHA256)
		}
		if err := files.Mkdir("muster"); err != nil {
			return err
		}
		spool, err := fetch.OpenFile(filepath.Join(string(dir), "muster", spoolName))
		if err != nil {
			return err
		}
		err = i.fetcher.Whole(ctx, b, spool)
		if err == nil {
			err = e.Stage(name, io.Reader(spool.Reader()), m.Size, m.SHA256)
		}
		if err = errors.Join(err, spool.Close()); err != nil {
			return err
		}
		return e.RemoveFile("muster/" + spoolName)
	}(), umount())
}

const spoolName = "fetching"

func (i *Installer) writeDocuments(e *efi.ESP) error {
	h, missing := i.cfg.HandOver()
	if missing != "" {
		return errors.New(missing)
	}
	files, err := h.Files()
	if err != nil {
		return err
	}
	for _, name := range slices.Sorted(maps.Keys(files)) {
		if err := e.PutBytes(name, files[name]); err != nil {
			return err
		}
	}
	return nil
}

// entries reports whether the firmware's boot order is right.
func (i *Installer) entries(esp firmware.PartRef, recovery string) (bool, error) {
	vars, done, err := i.cfg.Machine.Vars()
	if err != nil || vars == nil {
		// Without variables firmware starts the default path, where the
		// loader's copy is.
		return true, nil
	}
	defer done()
	b, err := vars.Boot()
	if err != nil {
		return false, err
	}
	p, err := firmware.PlanBootOrder(b.Entries, b.Unread, b.Order, firmware.BootEntries(esp, recovery))
	return err == nil && p.Empty(), nil
}

func (i *Installer) setEntries(d fleet.Disk, recovery string) error {
	whole, _, err := i.cfg.Machine.Disk(d)
	if err != nil {
		return err
	}
	table, err := disk.ReadTable(whole)
	sector := whole.Sector()
	if err = errors.Join(err, whole.Close()); err != nil {
		return err
	}
	esp, err := disk.Find(table, firmware.LabelESP)
	if err != nil {
		return err
	}
	vars, done, err := i.cfg.Machine.Vars()
	if err != nil || vars == nil {
		return err
	}
	defer done()
	i.entriesSet = true
	_, err = vars.SetBoot(firmware.BootEntries(esp.Ref(sector), recovery))
	return err
}

// tell keeps what people see, and tells the centre when it changes.
func (i *Installer) tell(state firmware.InstallState, a firmware.InstallAction) {
	image := ""
	if m := i.manifest; m != nil && state != firmware.InstallIdle {
		image = m.Name + " " + m.Version
	}
	if a.Kind == firmware.LookAtDisk && i.now.get().State > firmware.InstallWaiting {
		return // in the middle of the work a look is nothing to tell
	}
	i.show(func(n *Now) {
		if n.State != state && state < firmware.WritingSystem {
			n.Percent = 0
		}
		n.State, n.Reason, n.Image = state, a.Reason, image
		if state >= firmware.WritingFiles && state <= firmware.Installed {
			n.Percent = 100
		}
	})
	key := state.String() + a.Reason
	if a.Order != nil && key != i.last && a.Kind != firmware.TellDone && !i.done[a.Order.ID] {
		i.last = key
		i.cfg.Tell(a.Order.ID, fleet.OrderRunning, a.Reason)
	}
}

func (i *Installer) progress(got, size int64, waiting string) {
	i.show(func(n *Now) {
		if m := i.manifest; n.State == firmware.WritingSystem && m != nil && m.Slot != nil {
			if size != m.Slot.Root.Size {
				got += m.Slot.Root.Size // the hash tree comes behind the file system
			}
			n.Percent = min(int(got*100/m.Slot.WriteSize()), 100)
		}
		if waiting != "" {
			n.Reason = "I wait for the image: " + waiting
		}
	})
}

func (i *Installer) show(change func(*Now)) {
	if i.now.set(change) && i.cfg.Shows != nil {
		i.cfg.Shows()
	}
}
