package data

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/escrow"
)

var (
	self  = fleet.NodeID("n-" + strings.Repeat("a", 24))
	other = fleet.NodeID("n-" + strings.Repeat("b", 24))
)

var errCut = errors.New("the power is gone")

// bench is a machine: a partition, an ESP, a TPM, and programs that do to the
// partition what the real ones do.
type bench struct {
	t       *testing.T
	dir     string
	shelf   map[string][]byte
	private []byte
	public  []byte
	// keys of the volume: passphrases, and whether this TPM has one.
	keys    []string
	tpm     int // which TPM is in the machine
	sealed  int // which TPM the volume is sealed to; 0: none
	fsLabel string
	stored  bool // somebody has put something into it
	mounted bool
	said    string // what the TPM says when it does not release the key
	torn    bool   // the next format is cut off in the middle
	runs    []string
	cutAt   int
	points  int
}

func newBench(t *testing.T) *bench {
	b := &bench{t: t, dir: t.TempDir(), shelf: map[string][]byte{}, tpm: 1, cutAt: -1}
	var err error
	if b.private, b.public, err = escrow.GenerateKey(); err != nil {
		t.Fatal(err)
	}
	b.write(nil)
	return b
}

func (b *bench) device() string { return filepath.Join(b.dir, "part") }

func (b *bench) write(head []byte) {
	if err := os.WriteFile(b.device(), append(bytes.Clone(head), make([]byte, HeadSize-len(head))...), 0o600); err != nil {
		b.t.Fatal(err)
	}
}

func header(name, subsystem string) []byte {
	h := make([]byte, 4096)
	copy(h, "LUKS\xba\xbe\x00\x02")
	copy(h[24:], name)
	copy(h[208:], subsystem)
	return h
}

func super(name string) []byte {
	h := make([]byte, 4096)
	h[1024+56], h[1024+57] = 0x53, 0xef
	copy(h[1024+120:], name)
	return h
}

// Put, Get and Remove make the bench a Shelf.
func (b *bench) Put(name string, x []byte) error { b.shelf[name] = bytes.Clone(x); return nil }

func (b *bench) Get(name string) ([]byte, error) {
	x, ok := b.shelf[name]
	if !ok {
		return nil, fs.ErrNotExist
	}
	return x, nil
}

func (b *bench) Remove(name string) error { delete(b.shelf, name); return nil }

type exit int

func (e exit) Error() string { return fmt.Sprintf("exit status %d", int(e)) }
func (e exit) ExitCode() int { return int(e) }

// Run does what the programs do.
func (b *bench) Run(_ context.Context, in, key []byte, program string, args ...string) (string, error) {
	all := program + " " + strings.Join(args, " ")
	for _, k := range append(slices.Clone(b.keys), string(in), string(key)) {
		if k != "" && strings.Contains(all, k) {
			b.t.Errorf("a key is among the arguments: %s", all)
		}
	}
	b.runs = append(b.runs, strings.ReplaceAll(all, KeyFile, "FD"))
	mapper := filepath.Join(b.dir, "mapper", "data")
	last := args[len(args)-1]
	switch {
	case slices.Contains(args, "luksFormat"):
		if b.stored {
			b.t.Error("a volume with data is formatted")
		}
		if b.torn {
			b.torn = false
			b.write([]byte("torn"))
			return "", errCut
		}
		b.keys, b.sealed, b.fsLabel = []string{string(in)}, 0, ""
		b.write(header(args[slices.Index(args, "--label")+1], args[slices.Index(args, "--subsystem")+1]))
	case program == "systemd-cryptenroll":
		if !slices.Contains(b.keys, string(key)) {
			return "Failed to acquire volume key", exit(1)
		}
		b.sealed = b.tpm
	case slices.Contains(args, "luksRemoveKey"):
		b.keys = slices.DeleteFunc(b.keys, func(k string) bool { return k == string(in) })
	case slices.Contains(args, "config"):
		b.write(header(label, last))
	case slices.Contains(args, "close"):
		return "", os.Remove(mapper)
	case strings.HasSuffix(program, "systemd-cryptsetup"), slices.Contains(args, "open"):
		if slices.Contains(args, "open") && !slices.Contains(b.keys, string(in)) {
			return "No key available with this passphrase.", exit(2)
		}
		if !slices.Contains(args, "open") && b.sealed != b.tpm {
			return b.said, exit(1)
		}
		if err := os.MkdirAll(filepath.Dir(mapper), 0o755); err != nil {
			return "", err
		}
		return "", os.WriteFile(mapper, nil, 0o600)
	case program == "mkfs.ext4":
		if b.stored {
			b.t.Error("a file system with data is made anew")
		}
		b.fsLabel = args[slices.Index(args, "-L")+1]
		if last == b.device() {
			b.write(super(b.fsLabel))
		}
	case program == "e2label":
		b.write(super(last))
	case program == "e2fsck":
		if b.fsLabel == "" {
			return "Bad magic number in super-block", exit(8)
		}
	case program == "mount":
		b.mounted = true
	default:
		b.t.Errorf("unknown program %s", all)
	}
	return "", nil
}

func (b *bench) open(with func(*Config)) Report {
	b.t.Helper()
	cfg := Config{Device: b.device(), ID: "guid-1", Mapped: "data", At: filepath.Join(b.dir, "at"), Node: self, Tools: b, Shelf: b, EscrowKey: b.public,
		Tenant: "acme", Site: "shop-1", Now: func() time.Time { return time.Unix(1_700_000_000, 0) }, mappers: filepath.Join(b.dir, "mapper"),
		isMounted: func(string) bool { return b.mounted },
		cut: func(string) error {
			if b.points++; b.points == b.cutAt {
				return errCut
			}
			return nil
		}}
	if with != nil {
		with(&cfg)
	}
	p, err := New(cfg)
	if err != nil {
		b.t.Fatal(err)
	}
	return p.Open(b.t.Context())
}

// off is a power cut: what is in memory is gone.
func (b *bench) off() {
	b.mounted = false
	_ = os.RemoveAll(filepath.Join(b.dir, "mapper"))
	b.points, b.cutAt = 0, -1
}

func TestMadeOnceAndOpenedLater(t *testing.T) {
	b := newBench(t)
	r := b.open(nil)
	if r.State != Mounted || !r.Encrypted || !r.Made || r.Escrow != EscrowSealed || r.Help != "" {
		t.Fatalf("%+v\n%s", r, strings.Join(b.runs, "\n"))
	}
	b.stored = true
	b.off()
	if r = b.open(nil); r.State != Mounted || r.Made {
		t.Fatalf("%+v", r)
	}
	if _, err := b.Get(BegunFile); err == nil {
		t.Error("the mark of the beginning is still there")
	}
}

// What is in escrow opens the volume, on another TPM too, and from then on the
// machine opens it by itself.
func TestTheRecoveryKeyOpensIt(t *testing.T) {
	b := newBench(t)
	b.open(nil)
	b.stored = true
	b.off()
	b.tpm, b.said = 2, "Failed to unseal secret using TPM2: Operation not permitted"
	r := b.open(nil)
	if r.State != Locked || !strings.Contains(r.Reason, "cleared or replaced") || !strings.Contains(r.Help, "muster-node data unlock") {
		t.Fatalf("%+v", r)
	}
	var plain bytes.Buffer
	h, err := escrow.Open(&plain, bytes.NewReader(b.shelf[KeyBlob]), b.private)
	if err != nil || h.Kind != escrow.KindDiskKey || h.Node != self {
		t.Fatalf("%v %+v", err, h)
	}
	key, err := ParseKey(plain.Bytes())
	if err != nil {
		t.Fatal(err)
	}
	p, err := New(Config{Device: b.device(), ID: "guid-1", Mapped: "data", At: "x", Node: self, Tools: b, Shelf: b, Now: time.Now, mappers: filepath.Join(b.dir, "mapper")})
	if err != nil {
		t.Fatal(err)
	}
	if err := p.UnlockWith(t.Context(), NewKey()); err == nil {
		t.Fatal("a wrong key opens it")
	}
	if err := p.UnlockWith(t.Context(), key); err != nil {
		t.Fatal(err)
	}
	b.off()
	if r = b.open(nil); r.State != Mounted {
		t.Fatalf("%+v", r)
	}
}

// A power cut at each step, and in the middle of the format: the next start
// finishes, and nothing that was stored is lost.
func TestAPowerCutAnywhere(t *testing.T) {
	for _, plain := range []bool{false, true} {
		for _, escrowed := range []bool{true, false} {
			with := func(c *Config) {
				c.Plain = plain
				if !escrowed {
					c.EscrowKey = nil
				}
			}
			count := newBench(t)
			count.open(with)
			if count.points < 4 {
				t.Fatalf("%d points", count.points)
			}
			for at := 1; at <= count.points; at++ {
				b := newBench(t)
				b.cutAt = at
				if r := b.open(with); r.State == Mounted {
					t.Fatalf("cut at %d: %+v", at, r)
				}
				b.off()
				r := b.open(with)
				if r.State != Mounted || r.Encrypted == plain || escrowed && !plain && r.Escrow != EscrowSealed {
					t.Fatalf("after a cut at %d: %+v\n%s", at, r, strings.Join(b.runs, "\n"))
				}
				if !plain && escrowed {
					var key bytes.Buffer
					if _, err := escrow.Open(&key, bytes.NewReader(b.shelf[KeyBlob]), b.private); err != nil {
						t.Fatal(err)
					}
					k, err := ParseKey(key.Bytes())
					if err != nil || !slices.Contains(b.keys, string(k)) {
						t.Fatalf("after a cut at %d: the key in escrow does not open the volume: %v", at, err)
					}
				}
				if !plain && !escrowed && len(b.keys) != 0 {
					t.Fatalf("a key that nobody knows stays on the volume")
				}
				b.stored = true
				b.off()
				if r := b.open(with); r.State != Mounted {
					t.Fatalf("%+v", r)
				}
			}
		}
	}
	b := newBench(t)
	b.torn = true
	b.open(nil)
	b.off()
	if r := b.open(nil); r.State != Mounted {
		t.Fatalf("after a torn header: %+v", r)
	}
}

// In one and the same start, an attempt after a failed one begins from the
// start too.
func TestAgainInTheSameStart(t *testing.T) {
	b := newBench(t)
	b.cutAt = 6
	b.open(nil)
	if r := b.open(nil); r.State != Mounted {
		t.Fatalf("%+v\n%s", r, strings.Join(b.runs, "\n"))
	}
}

func TestForeignIsNotTouched(t *testing.T) {
	for name, c := range map[string]struct {
		head []byte
		say  string
	}{
		"another node's":            {header(label, string(other)), "belongs to node " + string(other)},
		"somebody's volume":         {header("backup", ""), "did not make"},
		"ours without a node":       {header(label, "x"), "names no node"},
		"somebody's file system":    {super("photos"), "did not make"},
		"bytes that nobody knows":   {[]byte("PK\x03\x04"), "neither empty nor known"},
		"an old format of the same": {[]byte("LUKS\xba\xbe\x00\x01"), "neither empty nor known"},
	} {
		b := newBench(t)
		b.write(c.head)
		before, err := os.ReadFile(b.device())
		if err != nil {
			t.Fatal(err)
		}
		r := b.open(nil)
		after, err := os.ReadFile(b.device())
		if err != nil {
			t.Fatal(err)
		}
		if r.State != Refused || !strings.Contains(r.Reason, c.say) || len(b.runs) != 0 || !bytes.Equal(before, after) {
			t.Errorf("%s: %+v %v", name, r, b.runs)
		}
		// The mark of another partition changes nothing.
		b.shelf[BegunFile] = []byte(string(self) + " guid-2\n")
		if r := b.open(nil); r.State != Refused {
			t.Errorf("%s: %+v", name, r)
		}
	}
}

func TestPlainIsSaid(t *testing.T) {
	b := newBench(t)
	r := b.open(func(c *Config) { c.Plain = true })
	if r.State != Mounted || r.Encrypted || r.Escrow != EscrowNone || !strings.Contains(r.Reason, "NOT encrypted") {
		t.Fatalf("%+v", r)
	}
	// A policy that changes later does not destroy what is there.
	b.stored = true
	b.off()
	if r = b.open(nil); r.State != Mounted || r.Encrypted {
		t.Fatalf("%+v", r)
	}
}

func TestExplain(t *testing.T) {
	for said, want := range map[string]string{
		"WARNING: TPM is in DA lockout mode":                                     "lockout",
		"No TPM2 hardware discovered":                                            "no usable TPM",
		"Failed to unseal secret using TPM2: State not recoverable":              "cleared or replaced",
		"ERROR: Esys_Load: tpm:parameter(1):integrity check failed (0x000001DF)": "cleared or replaced",
		"tpm:session(1):a policy check failed (0x0000099D)":                      "cleared or replaced",
	} {
		reason, help, ok := explain(said)
		if !ok || !strings.Contains(reason, want) || help == "" {
			t.Errorf("%q: %q %v", said, reason, ok)
		}
	}
	if _, _, ok := explain("Input/output error"); ok {
		t.Error("a failing disk is no locked TPM")
	}
}

func TestKeys(t *testing.T) {
	k := NewKey()
	if len(k) != keyText || bytes.Equal(k, NewKey()) {
		t.Fatalf("%d", len(k))
	}
	back, err := ParseKey([]byte(" " + strings.ToUpper(ShowKey(k)) + "\n"))
	if err != nil || !bytes.Equal(back, k) {
		t.Fatal(err)
	}
	for _, bad := range []string{"", "abcd", ShowKey(k)[1:], ShowKey(k) + "a", strings.Repeat("a", 5000), "é" + ShowKey(k)} {
		if _, err := ParseKey([]byte(bad)); err == nil {
			t.Errorf("%.20q is no key", bad)
		}
	}
}

func TestReportThereAndBack(t *testing.T) {
	path := filepath.Join(t.TempDir(), "run", "data.json")
	if r, err := ReadReport(path); err != nil || r != (Report{}) {
		t.Fatal(r, err)
	}
	want := Report{State: Mounted, Encrypted: true, Escrow: EscrowSealed, Reason: "x"}
	if err := want.Write(path); err != nil {
		t.Fatal(err)
	}
	if r, err := ReadReport(path); err != nil || r != want {
		t.Fatal(r, err)
	}
}

func FuzzInspect(f *testing.F) {
	f.Add(header(label, string(self)))
	f.Add(super(label))
	f.Add(make([]byte, 4096))
	f.Fuzz(func(t *testing.T, b []byte) {
		x := Inspect(b)
		what, why := Decide(x, self, false)
		if why == "" || x.Kind == Foreign && what != Refuse || what == Unlock && x.Owner != self {
			t.Fatalf("%+v %s", x, what)
		}
	})
}

func FuzzKey(f *testing.F) {
	f.Add([]byte(ShowKey(NewKey())))
	f.Fuzz(func(t *testing.T, b []byte) {
		if k, err := ParseKey(b); err == nil {
			if again, err := ParseKey([]byte(ShowKey(k))); err != nil || !bytes.Equal(again, k) {
				t.Fatal(err)
			}
		}
	})
}
