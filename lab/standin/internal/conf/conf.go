package conf

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
)

// Config is what one process works with, for both roles.
type Config struct {
	*Values
	Role     string // "server" or "agent"
	DataDir  string // with server/ and agent/ below it
	NodeName string // lower case
	NodeIP   string // first of node-ip, or the address of the default route
	Server   string // join URL without a trailing slash, or ""
	Token    string
	AgentTok string // "" unless set
	Args     []string
}

// New parses args for a role and fills in what the machine knows.
func New(role string, args []string, warn func(string)) (*Config, error) {
	v, err := Parse(role, args, warn)
	if err != nil {
		return nil, err
	}
	c := &Config{Values: v, Role: role, DataDir: v.Str("data-dir"), Args: args}
	c.Server = strings.TrimRight(v.Str("server"), "/")
	if c.Token, err = secret(v, "token"); err != nil {
		return nil, err
	}
	if c.AgentTok, err = secret(v, "agent-token"); err != nil {
		return nil, err
	}
	c.NodeName = v.Str("node-name")
	if c.NodeName == "" {
		if c.NodeName, err = os.Hostname(); err != nil {
			return nil, err
		}
	}
	c.NodeName = strings.ToLower(strings.TrimSpace(c.NodeName))
	if l := v.List("node-ip"); len(l) > 0 {
		c.NodeIP = l[0]
	} else if c.NodeIP, err = routeAddr(); err != nil {
		return nil, err
	}
	if net.ParseIP(c.NodeIP) == nil {
		return nil, fmt.Errorf("invalid node-ip %q", c.NodeIP)
	}
	if c.DataDir, err = filepath.Abs(c.DataDir); err != nil {
		return nil, err
	}
	return c, nil
}

func secret(v *Values, name string) (string, error) {
	if s := v.Str(name); s != "" {
		return s, nil
	}
	f := v.Str(name + "-file")
	if f == "" {
		return "", nil
	}
	b, err := os.ReadFile(f)
	if err != nil {
		return "", err
	}
	return strings.TrimSpace(string(b)), nil
}

// routeAddr is the address that the default route would use.
func routeAddr() (string, error) {
	c, err := net.Dial("udp4", "198.51.100.1:9") // no packet leaves
	if err != nil {
		return "", errors.New("no default routes found: set node-ip")
	}
	defer c.Close()
	return c.LocalAddr().(*net.UDPAddr).IP.String(), nil
}

// ServerDir is a path below server/.
func (c *Config) ServerDir(p ...string) string {
	return filepath.Join(append([]string{c.DataDir, "server"}, p...)...)
}

// AgentDir is a path below agent/.
func (c *Config) AgentDir(p ...string) string {
	return filepath.Join(append([]string{c.DataDir, "agent"}, p...)...)
}

// NodePasswordFile is outside of the data directory, as with k3s.
const NodePasswordFile = "/etc/rancher/node/password"

// NodePassword reads the node's password and makes one the first time.
func NodePassword() (string, error) {
	b, err := os.ReadFile(NodePasswordFile)
	if err == nil {
		return strings.TrimSpace(string(b)), nil
	}
	if !os.IsNotExist(err) {
		return "", err
	}
	raw := make([]byte, 16)
	rand.Read(raw)
	pw := hex.EncodeToString(raw)
	if err := os.MkdirAll(filepath.Dir(NodePasswordFile), 0o755); err != nil {
		return "", err
	}
	return pw, os.WriteFile(NodePasswordFile, []byte(pw+"\n"), 0o600)
}
