package recovery

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"runtime/debug"
	"strings"
	"time"

	"github.com/muster-edge/muster/agent"
	"github.com/muster-edge/muster/agent/facts"
	"github.com/muster-edge/muster/agent/kmod"
	"github.com/muster-edge/muster/agent/recovery/netup"
	"github.com/muster-edge/muster/firmware"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/internal/sleep"
)

// SiteFile is where the image builder puts site.json.
const SiteFile = "/etc/muster/site.json"

// Times of the last resort.
const (
	// rebootWithoutSite: an image with an unreadable site.json cannot work;
	// perhaps the next network boot fetches a better one.
	rebootWithoutSite = 10 * time.Minute
	// whyPatience is how long enrollment waits for the reason why the machine
	// is in recovery.
	whyPatience = 30 * time.Second
	// lastWords is how long a fatal message stays before the restart.
	lastWords = 10 * time.Second
	// tpmGrace is how long drivers may take to find the TPM before its
	// absence is called a failure.
	tpmGrace = 5 * time.Second
)

// Config of the recovery image's PID 1.
type Config struct {
	// Version of this program, as on the first console line.
	Version string
	// BuildTime of this program; it counts for the time floor. May be zero.
	BuildTime time.Time
	// Open finds the TPM and returns an Enroller; ErrNoTPM when there is
	// none. It is called again and again. nil shows the network and stops.
	Open func(context.Context, Services) (Enroller, error)
	// Scan is what an image does whose site.json says so, instead of calling
	// anybody. It ends with nil when the machine may be switched off, or with
	// ctx. nil: such an image says that it cannot.
	Scan func(context.Context, ScanServices) error
	// Why says how the machine came into recovery, once its devices were
	// looked for. It reads a disk of ours and opens no other. Optional.
	Why func(module func(name string) error) Started
}

// Started is why the recovery image runs.
type Started struct {
	Cause firmware.Cause
	// Text is for screen and centre; "" when there is nothing to say.
	Text string
	// Failed are the images that failed on this machine, as its disk says.
	Failed []firmware.FailedImage
}

// ScanServices is what recovery lends to Config.Scan.
type ScanServices struct {
	Site     fleet.SiteConfig
	Hardware func() fleet.Hardware
	// Module loads a kernel module, with what it needs.
	Module func(name string) error
	// Booted is closed when the devices that were there at power-on have been
	// served.
	Booted <-chan struct{}
	// Identity and Progress are for the screen. States are Scanning, Scanned
	// and Failed.
	Identity func(Identity)
	Progress func(Progress)
	Log      *slog.Logger
}

// Run is /init. It does not return: it ends in a restart of the machine.
func Run(cfg Config) {
	m := &machine{cfg: cfg, started: time.Now(), events: make(chan func(), 256), screen: &consoles{}}
	m.sys = realSystem(slog.New(slog.DiscardHandler))
	defer func() {
		if r := recover(); r != nil {
			m.lastWords(fmt.Sprintf("panic: %v\n%s", r, debug.Stack()))
		}
	}()
	mounts := mountAll(earlyMounts)
	m.screen = openConsoles()
	m.say(agent.InitLine(cfg.Version))
	m.log = quiet()
	if wantsDebug() {
		m.log = slog.New(slog.NewTextHandler(lineWriter{m.screen}, &slog.HandlerOptions{Level: slog.LevelDebug}))
	}
	m.sys = realSystem(m.log)
	if mounts != nil {
		m.note(mounts.Error())
	}
	b, err := readCapped(SiteFile, agent.MaxSiteConfig+1)
	if err == nil {
		m.site, err = agent.ParseSiteConfig(b)
	}
	m.run(context.Background(), err)
	m.lastWords("the main loop ended")
}

// wantsDebug: muster.debug on the kernel command line puts details on the
// consoles. Where it is not part of the signed image the stub measures it.
func wantsDebug() bool {
	b, _ := readCapped("/proc/cmdline", 4096)
	for _, f := range strings.Fields(string(b)) {
		if f == "muster.debug" {
			return true
		}
	}
	return false
}

// lineWriter puts log records on the consoles.
type lineWriter struct{ c *consoles }

func (w lineWriter) Write(p []byte) (int, error) {
	w.c.line(strings.TrimRight(string(p), "\n"))
	return len(p), nil
}

var _ io.Writer = lineWriter{}

// machine is the main loop and what it owns. Only the loop touches the
// fields below events; everybody else posts functions to it.
type machine struct {
	cfg     Config
	site    fleet.SiteConfig
	sys     system
	log     *slog.Logger
	screen  *consoles
	started time.Time
	heart   agent.Heartbeat
	floor   time.Time
	events  chan func()

	state   agent.State
	text    string
	since   time.Duration
	cond    conditions
	id      Identity
	request fleet.RequestID
	notes   []string
	recent  []string
	nicsUp  bool
	up      chan struct{} // closed while an address is there
	redo    chan struct{}
	restart string // why, once a restart is wanted
	off     bool   // switch off instead
	booted  chan struct{}
	// why gets the reason why this image runs, once.
	why chan Started
}

func (m *machine) uptime() time.Duration { return time.Since(m.started) }

// post hands f to the main loop.
func (m *machine) post(f func()) { m.events <- f }

// say prints a line on every console and keeps it for the screen.
func (m *machine) say(line string) {
	m.recent = append(m.recent, line)
	if len(m.recent) > 16 {
		m.recent = m.recent[len(m.recent)-16:]
	}
	m.screen.line(line)
}

func (m *machine) note(s string) {
	if len(m.notes) < 4 {
		m.notes = append(m.notes, s)
	}
	m.say("muster-node: note: " + s)
}

// spawn starts a part of the machine. None of them may end by a panic: PID 1
// would take the kernel along without a word.
func (m *machine) spawn(ctx context.Context, name string, f func(context.Context) error) {
	go func() {
		defer func() {
			if r := recover(); r != nil {
				m.lastWords(fmt.Sprintf("panic in %s: %v\n%s", name, r, debug.Stack()))
			}
		}()
		err := f(ctx)
		if err != nil && !errors.Is(err, context.Canceled) {
			m.log.Warn("part ended", "part", name, "err", err)
		}
	}()
}

// run is everything after the consoles are open. It returns when a restart
// is wanted.
func (m *machine) run(ctx context.Context, siteErr error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	m.heart.Patience = heartPatience
	m.heart.Beat(m.uptime())
	m.up = make(chan struct{})
	m.redo = make(chan struct{}, 1)
	m.booted = make(chan struct{})
	m.why = make(chan Started, 1)
	m.firstClock()
	m.update()

	dog := &watchdog{heart: &m.heart, uptime: m.uptime, open: openWatchdog, reboot: m.lastWords, log: m.log}
	m.spawn(ctx, "watchdog", dog.run)
	m.spawn(ctx, "signals", func(ctx context.Context) error {
		return watchSignals(ctx, func(why string) { m.post(func() { m.restart = why }) })
	})
	loader, err := kmod.NewLoader(m.log)
	if err != nil {
		m.log.Warn("modules", "err", err)
	}
	m.spawn(ctx, "devices", func(ctx context.Context) error { return m.devices(ctx, loader) })
	if siteErr != nil {
		m.cond.SiteError = "this image cannot be used: " + firstLine(siteErr)
		m.log.Error("site.json", "err", siteErr)
		time.AfterFunc(rebootWithoutSite, func() { m.post(func() { m.restart = "trying another boot" }) })
	} else if m.site.Scan != nil {
		m.scan(ctx, loader)
	} else {
		m.serve(ctx, loader)
	}
	m.loop()
	end, what := m.sys.restart, "restarting"
	if m.off {
		end, what = m.sys.powerOff, "switching off"
	}
	m.say("muster-node: " + what + ": " + m.restart)
	m.screen.flush(2 * time.Second)
	end()
}

// scan is what an image for a warehouse does instead of calling the centre.
func (m *machine) scan(ctx context.Context, loader *kmod.Loader) {
	tell := func(p Progress) { m.post(func() { m.cond.Scan = &p }) }
	m.cond.Scan = &Progress{State: agent.Scanning, Text: "looking for devices"}
	if m.cfg.Scan == nil {
		m.cond.Scan = &Progress{State: agent.Failed, Text: "this program cannot scan: build the image with another muster-node"}
		return
	}
	s := ScanServices{
		Site: m.site, Module: loader.Module, Booted: m.booted, Log: m.log, Progress: tell,
		Hardware: func() fleet.Hardware { return m.hardware(nil) },
		Identity: func(id Identity) { m.post(func() { m.id, m.cond.Words = id, id.Words }) },
	}
	m.spawn(ctx, "scan", func(ctx context.Context) error {
		wait := agent.Backoff{First: time.Second, Most: 10 * time.Second}
		for {
			err := m.cfg.Scan(ctx, s)
			switch {
			case ctx.Err() != nil:
				return ctx.Err()
			case err == nil:
				m.post(func() { m.restart, m.off = "the stick is out; next machine, please", true })
				return nil
			}
			m.log.Warn("scan stopped", "err", err)
			tell(Progress{State: agent.Failed, Text: firstLine(err) + "; trying again"})
			pause(ctx, wait.Next(rand.Float64()))
		}
	})
}

// serve starts network and enrollment; both need a site.json.
func (m *machine) serve(ctx context.Context, loader *kmod.Loader) {
	m.cond.Centre, m.cond.VLAN = strings.Join(m.site.Centre, ", "), m.site.Network.VLAN
	net := netup.New(netup.Config{
		Network: m.site.Network, ResolvConf: "/etc/resolv.conf", NeedModule: loader.Module, Log: m.log,
		Changed: func(nics []netup.NIC) { m.post(func() { m.network(nics) }) },
	})
	m.spawn(ctx, "network", net.Run)
	m.spawn(ctx, "why", func(ctx context.Context) error { return m.askWhy(ctx, loader.Module) })
	if m.cfg.Open == nil {
		return
	}
	upNow := make(chan (<-chan struct{}))
	e := &enrollment{
		open: m.cfg.Open, redo: m.redo, log: m.log,
		services: Services{
			Site: m.site, Now: m.sys.now, Floor: m.floor, Dial: net.Dial, Log: m.log,
			Hardware:   func() fleet.Hardware { return m.hardware(net.NICs()) },
			EventLog:   func() ([]byte, error) { return facts.EventLog(os.DirFS("/")) },
			SetTime:    m.toldClock,
			Progress:   func(p Progress) { m.post(func() { m.progress(p) }) },
			NeedModule: loader.Module, Restart: func(why string) { m.post(func() { m.restart = why }) }, Why: m.whyHere,
		},
		up: func() <-chan struct{} {
			m.post(func() { upNow <- m.up })
			return <-upNow
		},
		identity: func(id Identity) { m.post(func() { m.id, m.cond.Words = id, id.Words }) },
		failed: func(text string) {
			m.post(func() {
				if text == NoTPM && m.uptime() < tpmGrace {
					return // drivers are still looking
				}
				m.cond.TPMError, m.cond.Progress = text, nil
			})
		},
		pause: pause,
	}
	m.spawn(ctx, "enrollment", e.run)
	m.spawn(ctx, "leave", m.leave)
}

// askWhy finds out why this image runs. A disk that is dying may take for ever
// or make the reader fail: neither keeps the machine from calling home.
func (m *machine) askWhy(ctx context.Context, module func(string) error) error {
	if m.cfg.Why == nil {
		m.why <- Started{}
		return nil
	}
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-m.booted:
	}
	s := func() (s Started) {
		defer func() {
			if r := recover(); r != nil {
				s = Started{Cause: firmware.CauseNoSystem, Text: fmt.Sprintf("The disk cannot be read: %v.", r)}
			}
		}()
		return m.cfg.Why(module)
	}()
	if s.Text != "" {
		m.post(func() { m.note(s.Text) })
	}
	m.why <- s
	return nil
}

// whyHere returns what askWhy found, or nothing when it takes too long.
func (m *machine) whyHere(ctx context.Context) Started {
	t := time.NewTimer(whyPatience)
	defer t.Stop()
	select {
	case s := <-m.why:
		m.why <- s // for who asks next
		return s
	case <-ctx.Done():
	case <-t.C:
	}
	return Started{}
}

// loop is the main loop. Its beat is what keeps the watchdog quiet.
func (m *machine) loop() {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for m.restart == "" {
		m.heart.Beat(m.uptime())
		m.update()
		select {
		case f := <-m.events:
			f()
		case <-tick.C:
		}
	}
}

// update follows the conditions and shows what changed.
func (m *machine) update() {
	state, text := assess(m.cond)
	if state != m.state || text != m.text || m.since == 0 {
		next, err := m.state.MoveTo(state)
		if err != nil {
			// A screen that lies is worse than an odd move.
			m.log.Error("odd move", "err", err)
			next = state
		}
		if next != m.state || m.since == 0 {
			m.since = max(m.uptime(), 1)
		}
		if m.cond.Scan != nil && next != m.state {
			for _, line := range agent.Banner(next) {
				m.screen.line(line)
			}
		}
		m.state, m.text = next, text
		m.say(agent.StateLine(m.state, m.text))
	}
	m.screen.draw(m.view())
}

func (m *machine) view() agent.View {
	v := agent.View{
		Version: m.cfg.Version, Image: strings.TrimSpace(m.site.Image + " " + m.site.Version),
		State: m.state, Text: m.text, InState: m.uptime() - m.since,
		Words: m.id.Words, Node: string(m.id.Node), Request: string(m.request),
		Centre: m.site.Centre, Notes: m.notes, Recent: m.recent, Scan: m.cond.Scan != nil,
	}
	if m.id.Node != "" {
		v.EK = m.id.EK.String()
	}
	for _, n := range m.cond.NICs {
		v.NICs = append(v.NICs, agent.NICView{Name: n.Name, MAC: n.MAC, Text: n.String()})
	}
	return v
}

// network takes a new picture of the interfaces.
func (m *machine) network(nics []netup.NIC) {
	m.cond.NICs = nics
	up := false
	for _, n := range nics {
		up = up || n.Phase == netup.Up
	}
	switch {
	case up && !m.nicsUp:
		close(m.up)
		select {
		case <-m.redo:
		default:
		}
		if m.cond.Progress != nil && m.cond.Progress.State != agent.Enrolled {
			m.redo <- struct{}{}
		}
	case !up && m.nicsUp:
		m.up = make(chan struct{})
	}
	m.nicsUp = up
}

func (m *machine) progress(p Progress) {
	switch p.State {
	case agent.Time, agent.Enrolling, agent.WaitingForApproval, agent.Enrolled:
	default:
		return
	}
	m.cond.Progress = &p
	if p.Request != "" {
		m.request = p.Request
	}
}

// hardware is facts plus what only we know.
func (m *machine) hardware(nics []netup.NIC) fleet.Hardware {
	h := facts.Read(os.DirFS("/"))
	h.Image, h.Version = m.site.Image, m.site.Version
	for i := range h.NICs {
		for _, n := range nics {
			if n.Name == h.NICs[i].Name && n.Address.IsValid() {
				h.NICs[i].Addresses = append(h.NICs[i].Addresses, n.Address.String())
			}
		}
	}
	return h
}

// firstClock lifts the clock to the floor before anything checks a
// certificate.
func (m *machine) firstClock() {
	m.floor = agent.Floor(m.site.TimeFloor, m.cfg.BuildTime)
	now := m.sys.now()
	set, adjust := agent.FirstClock(now, m.floor)
	m.log.Info("clock", "says", now.UTC(), "floor", m.floor.UTC(), "adjust", adjust)
	if !adjust {
		return
	}
	if err := m.sys.setTime(set); err != nil {
		m.note(firstLine(err))
		return
	}
	m.note(fmt.Sprintf("the clock said %s; set to the image's time floor %s until the centre tells the time",
		now.UTC().Format(time.DateOnly), set.UTC().Format(time.DateOnly)))
}

// toldClock is called by the Enroller, from its goroutine.
func (m *machine) toldClock(told time.Time) error {
	now := m.sys.now()
	set, adjust, err := agent.ToldClock(now, told, m.floor)
	if err != nil || !adjust {
		return err
	}
	if err := m.sys.setTime(set); err != nil {
		return err
	}
	m.post(func() {
		m.note(fmt.Sprintf("the clock was %s off; set to the centre's %s", set.Sub(now).Round(time.Second), set.UTC().Format(time.RFC3339)))
	})
	return nil
}

// devices loads modules: first for what is there, then for what appears.
func (m *machine) devices(ctx context.Context, l *kmod.Loader) error {
	fd, err := kmod.Listen()
	if err != nil {
		m.post(func() { m.note(firstLine(err)) })
	}
	rescan := func() { l.Coldplug(ctx, "/sys/devices") }
	if err == nil {
		m.spawn(ctx, "uevents", func(ctx context.Context) error {
			return kmod.Read(ctx, fd, func(e kmod.Event) {
				if e.Action == "add" && e.Modalias != "" {
					l.Device(e.Modalias)
				}
			}, rescan)
		})
	}
	// Modules are loaded by bus first; what they find is served by the
	// uevents. Two passes serve it even without.
	rescan()
	for _, name := range []string{"efivarfs"} {
		if err := l.Module(name); err != nil {
			m.log.Info("module", "name", name, "err", err)
		}
	}
	if err := mountAll(lateMounts); err != nil {
		m.log.Info("mount", "err", err)
	}
	rescan()
	if _, err := os.Stat("/dev/watchdog0"); err != nil {
		// Better than none: it catches a hung PID 1, not a hung kernel.
		if err := l.Module("softdog"); err != nil {
			m.log.Info("module", "name", "softdog", "err", err)
		}
	}
	m.log.Info("devices served", "modules", l.Count())
	m.post(func() { m.cond.Booted = true })
	close(m.booted)
	return nil
}

// lastWords shows a fatal message on every console, waits so that it can be
// read, and restarts the machine. Any goroutine may call it.
func (m *machine) lastWords(why string) {
	for line := range strings.Lines("muster-node: fatal: " + why) {
		m.screen.line(strings.TrimRight(line, "\n"))
	}
	m.screen.line(fmt.Sprintf("muster-node: restarting in %s", lastWords))
	m.screen.flush(2 * time.Second)
	pause(context.Background(), lastWords)
	m.sys.restart()
}

// pause is sleep.For where the end of ctx shows by itself.
func pause(ctx context.Context, d time.Duration) { _ = sleep.For(ctx, d) }

func firstLine(err error) string {
	s, _, _ := strings.Cut(err.Error(), "\n")
	return s
}
