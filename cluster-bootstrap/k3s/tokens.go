package k3s

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	clusterbootstrap "github.com/muster-edge/muster/cluster-bootstrap"
	"github.com/muster-edge/muster/cluster-bootstrap/k3s/launch"
	"github.com/muster-edge/muster/fleet"
)

// Token files below Paths.Tokens.
const (
	tokenJoin   = "join"        // worker: bootstrap token
	tokenServer = "server"      // the cluster's first secret
	tokenAgent  = "agent"       // its second
	nextServer  = "next-server" // the same of a promotion that has not begun
	nextAgent   = "next-agent"
)

const maxToken = 1024

var (
	tokenK10      = regexp.MustCompile(`^K10([0-9a-f]{64})::(.+)$`)
	bootstrapForm = regexp.MustCompile(`^[a-z0-9]{6}\.[a-z0-9]{16}$`)
	passwordForm  = regexp.MustCompile(`^[!-~]{16,512}$`)
)

// ParseToken takes a token in K10 form apart: the hash that pins the cluster's
// CA and the secret behind "user:" or the bootstrap token. The short form is
// refused: it would let anybody on the LAN answer in the cluster's place.
func ParseToken(s string) (hash, secret string, bootstrap bool, err error) {
	m := tokenK10.FindStringSubmatch(s)
	if m == nil || len(s) > maxToken {
		return "", "", false, errors.New("k3s: read token: not in K10 form")
	}
	if bootstrapForm.MatchString(m[2]) {
		return m[1], m[2], true, nil
	}
	_, secret, ok := strings.Cut(m[2], ":")
	if !ok || !passwordForm.MatchString(secret) {
		return "", "", false, errors.New("k3s: read token: neither a user with a password nor a bootstrap token")
	}
	return m[1], secret, false, nil
}

// Validate checks the form of what a server sent.
func (x Material) Validate() error {
	_, _, bootstrap, err := ParseToken(x.Token)
	switch {
	case err != nil:
		return err
	case !strings.HasPrefix(x.Server, "https://") || len(x.Server) > 200:
		return fmt.Errorf("k3s: join material: server %.80q is no https URL", x.Server)
	case x.As == clusterbootstrap.RoleWorker && bootstrap && x.AgentToken == "":
		return nil
	case x.As == clusterbootstrap.RoleServer && !bootstrap && passwordForm.MatchString(x.AgentToken):
		return nil
	}
	return fmt.Errorf("k3s: join material: the tokens are not those of a %s", x.As)
}

func (m *Manager) readToken(path string) (string, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return "", fmt.Errorf("k3s: read token: %w", err)
	}
	s := strings.TrimSpace(string(b))
	if s == "" || len(s) > maxToken {
		return "", fmt.Errorf("k3s: read token: %s is empty or too long", path)
	}
	return s, nil
}

func (m *Manager) tokenFile(name string) string { return filepath.Join(m.cfg.Paths.Tokens(), name) }

func (m *Manager) writeToken(name, s string) error {
	return launch.WriteBytes(m.tokenFile(name), []byte(s+"\n"))
}

// KeepMaterial writes what a server gave, flushed. Server material is kept
// apart until Start with RoleCandidate takes it.
func (m *Manager) KeepMaterial(x Material) error {
	if err := x.Validate(); err != nil {
		return err
	}
	if err := launch.WriteBytes(m.joinFile(), []byte(x.Server+"\n")); err != nil {
		return err
	}
	if x.As == clusterbootstrap.RoleWorker {
		return m.writeToken(tokenJoin, x.Token)
	}
	if err := m.writeToken(nextAgent, x.AgentToken); err != nil {
		return err
	}
	return m.writeToken(nextServer, x.Token)
}

// joinFile holds the server that last gave material: a site without in-site
// addresses knows no other way to name one.
func (m *Manager) joinFile() string { return filepath.Join(m.cfg.Paths.State, "k3s", "join-url") }

// ForgetServerMaterial deletes the server token of a plan that came to
// nothing: workers hold no server token.
func (m *Manager) ForgetServerMaterial() error {
	return errors.Join(launch.Remove(m.tokenFile(nextServer)), launch.Remove(m.tokenFile(nextAgent)))
}

func (m *Manager) forgetServerTokens() error {
	return errors.Join(launch.Remove(m.tokenFile(tokenServer)), launch.Remove(m.tokenFile(tokenAgent)))
}

// prepareTokens makes the token files fit for a start.
func (m *Manager) prepareTokens(s Start) error {
	has := func(name string) bool { _, err := os.Stat(m.tokenFile(name)); return err == nil }
	switch s.Role {
	case clusterbootstrap.RoleWorker:
		// What a plan gave a worker that is about to be a server stays: its
		// step on disk promised it, and a power cut starts the worker once more
		// in between. When the plan has ended, ForgetServerMaterial is called.
		return m.forgetServerTokens()
	case clusterbootstrap.RoleCandidate:
		if has(nextServer) && has(nextAgent) {
			for _, r := range [][2]string{{nextAgent, tokenAgent}, {nextServer, tokenServer}} {
				if err := os.Rename(m.tokenFile(r[0]), m.tokenFile(r[1])); err != nil {
					return fmt.Errorf("k3s: take server material: %w", err)
				}
			}
			if err := launch.SyncDir(m.cfg.Paths.Tokens()); err != nil {
				return err
			}
		}
	case clusterbootstrap.RoleServer:
		for _, n := range []string{tokenServer, tokenAgent} {
			if has(n) || !s.Init {
				continue
			}
			// Drawn once: a founding that is repeated goes on with the same.
			b := make([]byte, 32)
			_, _ = rand.Read(b) // never fails (crypto/rand)
			if err := m.writeToken(n, hex.EncodeToString(b)); err != nil {
				return err
			}
		}
	}
	if !has(tokenServer) || !has(tokenAgent) {
		return fmt.Errorf("k3s: start as %s: there is no server token", s.Role)
	}
	return nil
}

// keepNodePassword makes the node password survive everything: it proves to
// the cluster that this is the node that it knows by this name. The copy on
// the persistent partition counts; k3s reads it where it always does.
func (m *Manager) keepNodePassword() error {
	ours := filepath.Join(m.cfg.Paths.State, "k3s", "node-password")
	theirs := filepath.Join(m.cfg.Paths.Node, "password")
	form := regexp.MustCompile(`^[0-9a-f]{32}$`)
	read := func(path string) string {
		b, err := os.ReadFile(path)
		if s := strings.TrimSpace(string(b)); err == nil && form.MatchString(s) {
			return s
		}
		return ""
	}
	pw := read(ours)
	if pw == "" {
		if pw = read(theirs); pw == "" {
			b := make([]byte, 16)
			_, _ = rand.Read(b) // never fails (crypto/rand)
			pw = hex.EncodeToString(b)
		}
		if err := launch.WriteBytes(ours, []byte(pw+"\n")); err != nil {
			return err
		}
	}
	if read(theirs) == pw {
		return nil
	}
	return launch.WriteBytes(theirs, []byte(pw+"\n"))
}

// clusterToken is what k3s wrote about its own token: with the CA's hash.
func (m *Manager) clusterToken() (full, hash string, err error) {
	full, err = m.readToken(filepath.Join(m.cfg.Paths.Server(), "token"))
	if errors.Is(err, fs.ErrNotExist) {
		return "", "", fmt.Errorf("%w: %w", ErrNotReady, err)
	}
	if err != nil {
		return "", "", err
	}
	hash, _, bootstrap, err := ParseToken(full)
	if err != nil || bootstrap {
		return "", "", errors.Join(errors.New("k3s: read token: k3s' own file holds none"), err)
	}
	return full, hash, nil
}

const bootstrapGroup = "system:bootstrappers:k3s:default-node-token"

// WorkerMaterial makes a bootstrap token that lives for ttl; server is this
// node's address, by which nodes join.
func (m *Manager) WorkerMaterial(ctx context.Context, ttl time.Duration, server netip.Addr, b fleet.BirthSettings) (Material, error) {
	if ttl < time.Minute || ttl > 24*time.Hour {
		return Material{}, fmt.Errorf("k3s: make bootstrap token: %s is no sensible time to live", ttl)
	}
	_, hash, err := m.clusterToken()
	if err != nil {
		return Material{}, err
	}
	c, err := m.admin()
	if err != nil {
		return Material{}, err
	}
	id, secret := randomText(6), randomText(16)
	s := map[string]any{
		"apiVersion": "v1", "kind": "Secret", "type": "bootstrap.kubernetes.io/token",
		"metadata": map[string]any{"name": "bootstrap-token-" + id, "namespace": "kube-system"},
		"stringData": map[string]string{
			"token-id": id, "token-secret": secret, "description": "a worker joins",
			// Judged by the cluster's own clock; the wall clock of this node
			// is the best guess of it.
			"expiration":                     time.Now().Add(ttl).UTC().Format(time.RFC3339),
			"usage-bootstrap-authentication": "true", "usage-bootstrap-signing": "true",
			"auth-extra-groups": bootstrapGroup,
		},
	}
	if err := c.Post(ctx, "/api/v1/namespaces/kube-system/secrets", s, nil); err != nil {
		return Material{}, fmt.Errorf("k3s: make bootstrap token: %w", err)
	}
	v, err := m.Version(ctx)
	if err != nil {
		return Material{}, err
	}
	return Material{As: clusterbootstrap.RoleWorker, Server: JoinURL(server), Token: "K10" + hash + "::" + id + "." + secret,
		Version: v, Critical: CriticalDigest(b)}, nil
}

// ServerMaterial returns what a candidate needs.
func (m *Manager) ServerMaterial(ctx context.Context, server netip.Addr, b fleet.BirthSettings) (Material, error) {
	full, agent, err := m.EscrowToken()
	if err != nil {
		return Material{}, err
	}
	v, err := m.Version(ctx)
	if err != nil {
		return Material{}, err
	}
	return Material{As: clusterbootstrap.RoleServer, Server: JoinURL(server), Token: full, AgentToken: agent,
		Version: v, Critical: CriticalDigest(b)}, nil
}

// EscrowToken is the server token that the snapshots of now need, in K10 form,
// and the agent token beside it.
func (m *Manager) EscrowToken() (server, agent string, err error) {
	if server, _, err = m.clusterToken(); err != nil {
		return "", "", err
	}
	agent, err = m.readToken(m.tokenFile(tokenAgent))
	return server, agent, err
}

// randomText draws n characters of [a-z0-9].
func randomText(n int) string {
	const set = "abcdefghijklmnopqrstuvwxyz0123456789"
	out := make([]byte, 0, n)
	b := make([]byte, 1)
	for len(out) < n {
		_, _ = rand.Read(b)                    // never fails (crypto/rand)
		if int(b[0]) < 256/len(set)*len(set) { // else some characters would be likelier
			out = append(out, set[int(b[0])%len(set)])
		}
	}
	return string(out)
}
