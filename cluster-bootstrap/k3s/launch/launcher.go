package launch

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"time"
)

// Config is a launcher. Zero fields get the defaults.
type Config struct {
	Paths  Paths
	Binary string // k3s; required
	// Child is the command that becomes k3s: it is run with the process file,
	// Binary and its arguments appended, and must call BecomeK3s with them.
	// Default: this program with the argument k3s-child.
	Child []string
	// Journal leaves k3s' output where the launcher's goes, instead of
	// Paths.LogFile.
	Journal bool
	// LogSize and LogFiles bound the log (8 MiB, 4 files).
	LogSize  int64
	LogFiles int
	// StopTimeout is how long k3s may take to end before it is killed (90 s).
	StopTimeout time.Duration
	// Pause is the time before k3s is started again (5 s); after six starts in
	// a row it doubles up to MaxPause (60 s).
	Pause, MaxPause time.Duration
	// Ports must be free before k3s starts; nil: those that two k3s of one
	// node fight for. Empty: none.
	Ports []int
	Log   *slog.Logger
}

// fightFor are the ports that a second k3s on a node cannot have: load
// balancer or apiserver, kubelet, etcd peers.
var fightFor = []int{6444, 10250, 2380}

const (
	steady    = 2 * time.Minute // after so long a run the pauses are short again
	quick     = 6               // so many starts have the short pause
	tick      = time.Second
	leaseTick = 200 * time.Millisecond
)

func (c Config) withDefaults() Config {
	c.Paths = c.Paths.WithDefaults()
	if c.Child == nil {
		c.Child = []string{"/proc/self/exe", "k3s-child"}
	}
	if c.LogSize == 0 {
		c.LogSize = 8 << 20
	}
	if c.LogFiles == 0 {
		c.LogFiles = 4
	}
	if c.StopTimeout == 0 {
		c.StopTimeout = 90 * time.Second
	}
	if c.Pause == 0 {
		c.Pause = 5 * time.Second
	}
	if c.MaxPause == 0 {
		c.MaxPause = time.Minute
	}
	if c.Ports == nil {
		c.Ports = fightFor
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return c
}

// Validate reports all problems.
func (c Config) Validate() error {
	c = c.withDefaults()
	var errs []error
	check := func(ok bool, format string, args ...any) {
		if !ok {
			errs = append(errs, fmt.Errorf("launch: config: "+format, args...))
		}
	}
	errs = append(errs, c.Paths.Validate())
	check(filepath.IsAbs(c.Binary), "the k3s program %q must be an absolute path", c.Binary)
	check(c.LogSize >= 4096, "log size %d is less than 4096", c.LogSize)
	check(c.LogFiles >= 1 && c.LogFiles <= 100, "log files %d; want 1 to 100", c.LogFiles)
	check(c.StopTimeout > 0 && c.Pause > 0 && c.MaxPause >= c.Pause, "timeouts: stop %s, pause %s, max pause %s", c.StopTimeout, c.Pause, c.MaxPause)
	return errors.Join(errs...)
}

// Launcher is `muster-node k3s`.
type Launcher struct {
	cfg    Config
	boot   string
	status Status
	notify *notifier
	child  *child
	starts int           // in a row
	pause  time.Duration // CLOCK_BOOTTIME
}

// New checks cfg and returns a Launcher.
func New(cfg Config) (*Launcher, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	return &Launcher{cfg: cfg.withDefaults()}, nil
}

// Run runs k3s as the files say until ctx ends or the permission is withdrawn,
// then ends k3s in order. ErrLocked: another launcher does that already.
func (l *Launcher) Run(ctx context.Context) (err error) {
	if l.boot, err = BootID(); err != nil {
		return err
	}
	held, err := lock(l.cfg.Paths)
	if err != nil {
		return err
	}
	defer held.Close()
	me, err := identify(os.Getpid())
	if err != nil {
		return err
	}
	// Whoever wants to stop this launcher finds it by the lock's content.
	if err := WriteFile(l.cfg.Paths.StatusFile(), Status{Launcher: me, State: Starting}); err != nil {
		return err
	}
	l.status.Launcher = me
	if l.notify, err = newNotifier(l.cfg.Paths.NotifySocket(), l.cfg.Log); err != nil {
		return err
	}
	defer l.notify.Close()

	// A k3s whose launcher was killed goes on without one. It is ours, so it
	// is ended, and a new one started: that the files allow it to run says
	// nothing about whether they still allow *it*.
	if old := l.cfg.Paths.K3s(); old != nil {
		l.say(Stopping, "ending the k3s of an earlier launcher")
		l.cfg.Log.Info("end k3s of an earlier launcher", "pid", old.PID)
		if err := old.End(context.WithoutCancel(ctx), l.cfg.StopTimeout); err != nil {
			return err
		}
	}
	err = l.loop(ctx)
	l.say(Gone, l.status.Reason)
	return err
}

func (l *Launcher) loop(ctx context.Context) error {
	t := time.NewTimer(0)
	defer t.Stop()
	done := ctx.Done()
	stop := false
	for {
		var exited <-chan struct{}
		if l.child != nil {
			exited = l.child.done
		}
		select {
		case <-done:
			stop, done = true, nil
		case <-exited:
			l.ended()
		case m := <-l.notify.messages:
			l.heard(m)
		case <-t.C:
		}
		l.notify.alive()
		l.watchGuard()
		l.rotate()
		f := l.look(stop)
		do, why := decide(f, l.cfg.StopTimeout)
		switch do {
		case end:
			l.status.Reason = why
			return nil
		case start:
			l.start(f)
		case term:
			l.cfg.Log.Info("end k3s", "reason", why)
			l.child.termed = f.now
			l.child.signal(false)
			l.say(Stopping, why)
		case kill:
			if !l.child.killed {
				l.cfg.Log.Warn("kill k3s", "reason", why)
			}
			l.child.killed = true
			l.child.signal(true)
			l.say(Stopping, why)
		case wait:
			l.waiting(f, why)
		}
		d := tick
		if f.role.Role == Candidate || l.child != nil && (l.child.role == Candidate || l.child.termed != 0) {
			d = leaseTick
		}
		if f.child == nil && l.pause > f.now {
			d = min(d, l.pause-f.now)
		}
		t.Reset(d)
	}
}

// watchGuard starts another guard if a candidate's was killed.
func (l *Launcher) watchGuard() {
	c := l.child
	if c == nil || c.role != Candidate || c.termed != 0 || c.killed || c.guard.watches() {
		return
	}
	if n, err := l.cfg.Paths.ReadRole(); err == nil && n.Role == Server {
		return // it was confirmed, and the guard has seen that first
	}
	g, err := startGuard(l.cfg, c.plan)
	if err != nil {
		l.cfg.Log.Error("start another guard", "err", err)
		return
	}
	c.guard = g
	l.status.Guard = g.pid()
	l.say(Running, "")
}

// look gathers the facts of the moment.
func (l *Launcher) look(stop bool) facts {
	p := l.cfg.Paths
	f := facts{now: Boottime(), stop: stop, allowed: p.allowed(l.boot), pause: l.pause}
	f.role, f.roleErr = p.ReadRole()
	if l.child != nil {
		f.child = &l.child.running
		plan := f.role.Plan
		if f.roleErr != nil {
			plan = l.child.plan // torn: the lease of its own plan still counts
		}
		f.lease = p.readLease(plan, l.boot, f.now)
		return f
	}
	f.lease = p.readLease(f.role.Plan, l.boot, f.now)
	f.init = f.role.Role == Server && p.initAllowed(l.boot)
	f.datastore, f.tombstone = exists(p.WAL()), exists(p.Tombstone())
	f.joins, f.configErr = checkConfig(p, f.role.Role)
	if do, _ := decide(f, l.cfg.StopTimeout); do == start {
		f.inTheWay = l.obstacle()
	}
	return f
}

// obstacle looks for a k3s that is not ours.
func (l *Launcher) obstacle() string {
	if p := l.cfg.Paths.K3s(); p != nil {
		return fmt.Sprintf("k3s still runs as process %d", p.PID)
	}
	pids, err := strangers(l.cfg.Binary, l.cfg.Paths.Data)
	if err != nil {
		return err.Error()
	}
	if len(pids) > 0 {
		return fmt.Sprintf("process %d runs k3s and was not started by muster; two of them would take the quorum of the whole site away", pids[0])
	}
	ports, err := listening(l.cfg.Ports)
	if err != nil {
		return err.Error()
	}
	if len(ports) > 0 {
		return fmt.Sprintf("port %d is in use by another program", ports[0])
	}
	return ""
}

// start starts k3s.
func (l *Launcher) start(f facts) {
	p := l.cfg.Paths
	init := f.init && !f.datastore
	// Deleted first: a power cut or a crash between here and the first write
	// of etcd must not leave a permission behind.
	if err := Remove(p.InitFile()); err != nil {
		l.waiting(f, err.Error())
		return
	}
	args := []string{"server"}
	if f.role.Role == Worker {
		args[0] = "agent"
	}
	args = append(args, "--config", p.ConfigFile())
	if init {
		args = append(args, "--cluster-init")
	}
	l.starts++
	var c *child
	// A file of a process that has ended would mislead the guard.
	err := Remove(p.ProcessFile())
	var g *watcher
	if err == nil && f.role.Role == Candidate {
		g, err = startGuard(l.cfg, f.role.Plan) // before k3s: it is never unwatched
	}
	if err == nil {
		c, err = startChild(l.cfg, args, false, l.notify.env())
	}
	if err != nil {
		g.stop()
		l.cfg.Log.Error("start k3s", "err", err)
		l.setPause(f.now)
		l.say(Pausing, err.Error())
		return
	}
	c.running = running{role: f.role.Role, init: init, started: f.now}
	c.plan, c.guard = f.role.Plan, g
	l.status.Guard = g.pid()
	l.child = c
	l.status.Starts++
	l.cfg.Log.Info("started k3s", "role", string(f.role.Role), "pid", c.process.PID, "init", init)
	l.status.K3s, l.status.Started, l.status.Ready = &c.process, f.now, false
	l.status.Role, l.status.Init = string(f.role.Role), init
	l.say(Running, "")
}

// ended notes that k3s ended. Its exit code says nothing: failures exit 0.
func (l *Launcher) ended() {
	c := l.child
	l.child = nil
	c.guard.stop()
	l.status.Guard = 0
	now := Boottime()
	if now-c.started >= steady {
		l.starts = 0
	}
	l.status.K3s, l.status.Ready, l.status.LastExit = nil, false, c.exit
	l.cfg.Log.Info("k3s ended", "pid", c.process.PID, "exit", c.exit, "ran", now-c.started)
	if c.termed == 0 {
		l.setPause(now)
	}
	_ = Remove(l.cfg.Paths.ProcessFile()) // a stale one names a process that is gone
	l.say(Pausing, "k3s ended ("+c.exit+")")
}

func (l *Launcher) setPause(now time.Duration) {
	d := l.cfg.Pause
	for i := quick; i < l.starts && d < l.cfg.MaxPause; i++ {
		d *= 2
	}
	l.pause = now + min(d, l.cfg.MaxPause)
}

// waiting says why nothing happens.
func (l *Launcher) waiting(f facts, why string) {
	switch {
	case f.child != nil:
		if f.child.role != Server && f.role.Role == Server && f.roleErr == nil && f.child.termed == 0 {
			l.child.role = Server // confirmed
			l.status.Role = string(Server)
			l.say(Running, "")
		}
	case why != "":
		l.say(Refused, why)
	}
}

// say writes the status if it changed.
func (l *Launcher) say(s State, why string) {
	n := l.status
	n.State, n.Reason = s, why
	if n == l.status && s != Running {
		return
	}
	if n.State != l.status.State || n.Reason != l.status.Reason {
		l.cfg.Log.Info("launcher", "state", string(s), "reason", why)
		l.notify.send("STATUS=" + string(s) + " " + why)
	}
	l.status = n
	if err := WriteFile(l.cfg.Paths.StatusFile(), n); err != nil {
		l.cfg.Log.Error("write status", "err", err)
	}
}

// heard takes a message of k3s to the service manager: readiness and words
// for people, nothing that would change who is the main process.
func (l *Launcher) heard(m message) {
	if m.ready && l.child != nil && !l.status.Ready {
		l.status.Ready = true
		l.say(Running, "")
		l.notify.send("READY=1")
	}
	if m.status != "" {
		l.notify.send("STATUS=k3s: " + m.status)
	}
}

func (l *Launcher) rotate() {
	if l.cfg.Journal {
		return
	}
	if err := rotate(l.cfg.Paths.LogFile(), l.cfg.LogSize, l.cfg.LogFiles); err != nil {
		l.cfg.Log.Error("rotate log", "err", err)
	}
}
