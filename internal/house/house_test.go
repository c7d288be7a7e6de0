// Package house holds the tests that keep the layout honest: who may import
// whom, what a pure core may not touch, and that every package says what it
// is. docs/architecture.md explains the rules in words; here they bite.
package house

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"testing"
)

const module = "github.com/muster-edge/muster"

// pkg is what the rules need to know of one folder.
type pkg struct {
	dir     string              // relative, slash separated; "" is the root
	imports map[string][]string // import path -> files (tests left out)
	doc     []string            // files that carry a package comment
	calls   map[string][]string // "time.Now" and the like -> positions
	lines   map[string]int      // file -> lines
}

// load reads every Go file of the module once.
func load(t *testing.T) map[string]*pkg {
	t.Helper()
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	pkgs := map[string]*pkg{}
	fset := token.NewFileSet()
	err = filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name := d.Name()
		if d.IsDir() {
			if path != root && (strings.HasPrefix(name, ".") || name == "bin" || name == "testdata") {
				return filepath.SkipDir
			}
			if _, err := os.Stat(filepath.Join(path, "go.mod")); err == nil && path != root {
				return filepath.SkipDir // a module of its own
			}
			return nil
		}
		if !strings.HasSuffix(name, ".go") {
			return nil
		}
		dir, err := filepath.Rel(root, filepath.Dir(path))
		if err != nil {
			return err
		}
		dir = filepath.ToSlash(dir)
		p := pkgs[dir]
		if p == nil {
			p = &pkg{dir: dir, imports: map[string][]string{}, calls: map[string][]string{}, lines: map[string]int{}}
			pkgs[dir] = p
		}
		f, err := parser.ParseFile(fset, path, nil, parser.ParseComments)
		if err != nil {
			return err
		}
		if f.Doc != nil && strings.TrimSpace(f.Doc.Text()) != "" {
			p.doc = append(p.doc, name)
		}
		if strings.HasSuffix(name, "_test.go") {
			return nil
		}
		p.lines[name] = fset.File(f.Pos()).LineCount()
		for _, im := range f.Imports {
			ip := strings.Trim(im.Path.Value, `"`)
			p.imports[ip] = append(p.imports[ip], name)
		}
		ast.Inspect(f, func(n ast.Node) bool {
			sel, ok := n.(*ast.SelectorExpr)
			if !ok {
				return true
			}
			if id, ok := sel.X.(*ast.Ident); ok && id.Name == "time" {
				switch sel.Sel.Name {
				case "Now", "Since", "Until", "Sleep", "After", "Tick", "NewTimer", "NewTicker":
					pos := fset.Position(sel.Pos())
					key := "time." + sel.Sel.Name
					p.calls[key] = append(p.calls[key], fmt.Sprintf("%s/%s:%d", dir, name, pos.Line))
				}
			}
			return true
		})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return pkgs
}

func sorted(pkgs map[string]*pkg) []*pkg {
	var out []*pkg
	for _, p := range pkgs {
		out = append(out, p)
	}
	sort.Slice(out, func(i, j int) bool { return out[i].dir < out[j].dir })
	return out
}

// rooms are the allowed top-level folders. A new one needs a decision record.
var rooms = map[string]bool{
	"cmd": true, "discovery": true, "pxe": true, "enroll": true, "cluster-bootstrap": true,
	"pki": true, "firmware": true, "lab": true, "fleet": true, "api": true, "agent": true,
	"central": true, "docs": true, "examples": true, "internal": true,
}

func TestTopLevelFolders(t *testing.T) {
	entries, err := os.ReadDir("../..")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		n := e.Name()
		if !e.IsDir() || strings.HasPrefix(n, ".") || n == "bin" {
			continue
		}
		if !rooms[n] {
			t.Errorf("top-level folder %q is not one of the agreed rooms: put it into one, or write a decision record and add it here", n)
		}
	}
}

func TestEveryPackageHasOneComment(t *testing.T) {
	for _, p := range sorted(load(t)) {
		var docs []string
		for _, f := range p.doc {
			if strings.HasSuffix(f, ".pb.go") || strings.HasSuffix(f, ".connect.go") {
				continue
			}
			docs = append(docs, f)
		}
		if generated(p) {
			continue
		}
		if len(docs) == 0 {
			t.Errorf("%s: no package comment: say in one paragraph what the package is and what it leaves out", p.dir)
		}
		// on.go/off.go pairs under build tags may each carry it.
		if len(docs) > 1 && !strings.HasPrefix(p.dir, "internal/failpoint") && !testOnly(docs) {
			t.Errorf("%s: package comments in %v: keep one", p.dir, docs)
		}
	}
}

func testOnly(files []string) bool {
	n := 0
	for _, f := range files {
		if !strings.HasSuffix(f, "_test.go") {
			n++
		}
	}
	return n <= 1
}

func generated(p *pkg) bool {
	if len(p.lines) == 0 {
		return false
	}
	for f := range p.lines {
		if !strings.HasSuffix(f, ".pb.go") && !strings.HasSuffix(f, ".connect.go") && !strings.HasSuffix(f, ".sql.go") {
			return false
		}
	}
	return true
}

// cores are the pure packages and what they may import of this module.
var cores = map[string][]string{
	"fleet":             {"fleet"},
	"fleet/statement":   {"fleet"},
	"fleet/audit":       {"fleet"},
	"fleet/text":        {"fleet"},
	"fleet/turns":       {"fleet"},
	"fleet/declare":     {"fleet"},
	"fleet/rollout":     {"fleet"},
	"pxe":               {"fleet"},
	"pki":               {"fleet"},
	"enroll":            {"fleet", "pki"},
	"discovery":         {"fleet"},
	"cluster-bootstrap": {"fleet"},
	"firmware":          {"fleet"},
}

// impure packages have no place in a core: decisions take facts and time as
// arguments and return values; edges do the I/O.
var impure = []string{"net/http", "os/exec", "log", "log/slog", "database/sql", "syscall", "os/signal"}

func TestCoresArePure(t *testing.T) {
	pkgs := load(t)
	for dir, allowed := range cores {
		p := pkgs[dir]
		if p == nil {
			continue // not built yet: no empty rooms
		}
		for ip, files := range p.imports {
			switch {
			case strings.HasPrefix(ip, module+"/"):
				rel := strings.TrimPrefix(ip, module+"/")
				ok := false
				for _, a := range allowed {
					if rel == a || (a == "fleet" && strings.HasPrefix(rel, "fleet/")) {
						ok = true
					}
				}
				if !ok {
					t.Errorf("%s imports %s (%v): a pure core may import only the standard library and %v, so that it can be tested with values alone", dir, rel, files, allowed)
				}
			case strings.Contains(strings.SplitN(ip, "/", 2)[0], "."):
				t.Errorf("%s imports %s (%v): a pure core uses the standard library only; put the library behind an edge package", dir, ip, files)
			}
			for _, bad := range impure {
				if ip == bad {
					t.Errorf("%s imports %s (%v): a pure core does no I/O and does not log", dir, ip, files)
				}
			}
		}
		for call, at := range p.calls {
			t.Errorf("%s calls %s (%v): time is an argument of a core", dir, call, at)
		}
	}
}

// siblings: the product folders meet in agent, central, lab and cmd only.
func TestSiblingsDoNotImportSiblings(t *testing.T) {
	siblings := []string{"discovery", "pxe", "enroll", "cluster-bootstrap", "pki", "firmware"}
	for _, p := range sorted(load(t)) {
		own := strings.SplitN(p.dir, "/", 2)[0]
		isSibling := false
		for _, s := range siblings {
			isSibling = isSibling || s == own
		}
		for ip, files := range p.imports {
			if !strings.HasPrefix(ip, module+"/") {
				continue
			}
			rel := strings.TrimPrefix(ip, module+"/")
			other := strings.SplitN(rel, "/", 2)[0]
			if isSibling {
				for _, s := range siblings {
					if other == s && s != own && !(own == "enroll" && s == "pki") {
						t.Errorf("%s imports %s (%v): siblings meet in agent or central, not in each other", p.dir, rel, files)
					}
				}
				if other == "agent" || other == "central" || other == "lab" || other == "cmd" {
					t.Errorf("%s imports %s (%v): that folder composes this one, not the other way round", p.dir, rel, files)
				}
			}
			switch {
			case own == "agent" && other == "central", own == "central" && other == "agent":
				t.Errorf("%s imports %s (%v): node and centre share only fleet and api", p.dir, rel, files)
			case other == "lab" && own != "lab" && p.dir != "cmd/muster":
				t.Errorf("%s imports %s (%v): the lab is imported by cmd/muster alone", p.dir, rel, files)
			case other == "cmd":
				t.Errorf("%s imports %s (%v): nothing imports a command", p.dir, rel, files)
			case own == "fleet" && other != "fleet", own == "internal" && other != "internal":
				t.Errorf("%s imports %s (%v): %s is a leaf", p.dir, rel, files, own)
			case own == "api" && other != "api" && other != "fleet":
				t.Errorf("%s imports %s (%v): the API speaks fleet and nothing else", p.dir, rel, files)
			}
		}
	}
}

// libraries lists each protocol library with the rooms that may import it.
// A prefix ending in "/" admits everything below it.
var libraries = map[string][]string{
	"github.com/insomniacslk/dhcp":        {"pxe/dhcp", "pxe/internal/", "agent/recovery/netup", "lab/"},
	"github.com/hashicorp/mdns":           {"discovery/mdns", "lab/"},
	"github.com/miekg/dns":                {"discovery/mdns", "lab/"},
	"github.com/google/go-tpm":            {"pki/tpm", "pki/tpm/"},
	"github.com/google/go-attestation":    {"pki/ekcert"},
	"github.com/smallstep/certificates":   {"pki/stepca"},
	"go.step.sm/crypto":                   {"pki/stepca"},
	"modernc.org/sqlite":                  {"central/store/sqlite"},
	"github.com/pressly/goose":            {"central/store/"},
	"github.com/coreos/go-oidc":           {"central/oidc"},
	"golang.org/x/oauth2":                 {"central/oidc"},
	"github.com/zitadel/oidc":             {"central/oidc/oidctest"},
	"github.com/jackc/pgx":                {"central/store/postgres", "central/store/postgres/"},
	"github.com/spf13/cobra":              {"cmd/muster"},
	"github.com/knadh/koanf":              {"cmd/muster", "internal/config"},
	"github.com/vishvananda/netlink":      {"agent/recovery", "agent/recovery/", "agent/facts", "agent/hostnet", "lab", "lab/", "pxe/"},
	"github.com/google/nftables":          {"agent/hostnet"},
	"github.com/u-root/u-root":            {"agent/", "firmware/"},
	"github.com/prometheus/client_golang": {"central", "central/", "pxe/server"},
	"github.com/saferwall/pe":             {"firmware/image"},
	"github.com/cavaliergopher/cpio":      {"firmware/image"},
	"github.com/diskfs/go-diskfs":         {"firmware/image", "firmware/disk", "firmware/disk/disktest"},
	"connectrpc.com/connect":              {"api/", "enroll/client", "enroll/service", "enroll/service/", "central", "central/", "agent/", "lab/", "cmd/muster", "cmd/muster-node"},
}

func TestLibrariesStayInTheirRooms(t *testing.T) {
	for _, p := range sorted(load(t)) {
		for ip, files := range p.imports {
			for lib, where := range libraries {
				if ip != lib && !strings.HasPrefix(ip, lib+"/") {
					continue
				}
				ok := false
				for _, w := range where {
					ok = ok || p.dir == w || (strings.HasSuffix(w, "/") && strings.HasPrefix(p.dir, w))
				}
				if !ok {
					t.Errorf("%s imports %s (%v): that library lives in %v, so that it can be replaced in one place", p.dir, ip, files, where)
				}
			}
		}
	}
}

// TestNodeBinaryStaysSmall follows the imports of cmd/muster-node through the
// module: what runs on a node must not carry the centre's weight.
func TestNodeBinaryStaysSmall(t *testing.T) {
	pkgs := load(t)
	heavy := map[string]string{
		"github.com/smallstep":             "no certificate authority on a node",
		"go.step.sm":                       "no certificate authority on a node",
		"modernc.org/sqlite":               "no database on a node",
		"database/sql":                     "no database on a node",
		"k8s.io":                           "Kubernetes is spoken to by plain REST",
		"helm.sh":                          "charts are rendered at the centre",
		"github.com/spf13/cobra":           "a handful of sub-commands needs no framework",
		"github.com/google/go-attestation": "verifying is the centre's work",
		// There is no way on a node that leads past its TPM.
		module + "/pki/tpm/swtpmtest":                       "no emulated TPM on a node",
		"github.com/google/go-tpm-tools":                    "no emulated TPM on a node",
		"github.com/google/go-tpm/tpm2/transport/simulator": "no emulated TPM on a node",
	}
	seen := map[string]bool{}
	var walk func(dir string, path []string)
	walk = func(dir string, path []string) {
		if seen[dir] || pkgs[dir] == nil {
			return
		}
		seen[dir] = true
		for ip := range pkgs[dir].imports {
			for h, why := range heavy {
				if ip == h || strings.HasPrefix(ip, h+"/") {
					t.Errorf("cmd/muster-node reaches %s by %s: %s", ip, strings.Join(append(path, dir), " -> "), why)
				}
			}
			if strings.HasPrefix(ip, module+"/") {
				walk(strings.TrimPrefix(ip, module+"/"), append(path[:len(path):len(path)], dir))
			}
		}
	}
	walk("cmd/muster-node", nil)
}

func TestFilesHaveOneResponsibility(t *testing.T) {
	const most = 700
	for _, p := range sorted(load(t)) {
		for f, n := range p.lines {
			if strings.HasSuffix(f, ".pb.go") || strings.HasSuffix(f, ".connect.go") || strings.HasSuffix(f, ".sql.go") {
				continue
			}
			if n > most {
				t.Errorf("%s/%s has %d lines (most %d): does it still have one responsibility?", p.dir, f, n, most)
			}
		}
	}
}
