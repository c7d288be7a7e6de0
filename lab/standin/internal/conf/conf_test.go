package conf

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func files(t *testing.T, m map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, text := range m {
		p := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return filepath.Join(dir, "config.yaml")
}

func TestLaterFilesReplaceAndPlusAppends(t *testing.T) {
	cfg := files(t, map[string]string{
		"config.yaml":           "token: first\nnode-label: [a=1]\ntls-san: [x]\n",
		"config.yaml.d/10.yaml": "token: second\nnode-label+: [b=2]\n",
		"config.yaml.d/20.yml":  "tls-san: [y]\n",
		"config.yaml.d/30.txt":  "token: third\n",
	})
	v, err := Parse("server", []string{"--config", cfg}, func(string) {})
	if err != nil {
		t.Fatal(err)
	}
	if v.Str("token") != "second" || !slices.Equal(v.List("node-label"), []string{"a=1", "b=2"}) || !slices.Equal(v.List("tls-san"), []string{"y"}) {
		t.Errorf("%q %q %q", v.Str("token"), v.List("node-label"), v.List("tls-san"))
	}
	// The command line comes last: text is replaced, lists grow.
	v, err = Parse("server", []string{"--config=" + cfg, "--token", "cli", "--tls-san=z"}, func(string) {})
	if err != nil || v.Str("token") != "cli" || !slices.Equal(v.List("tls-san"), []string{"y", "z"}) {
		t.Errorf("%q %q %v", v.Str("token"), v.List("tls-san"), err)
	}
}

func TestUnknownKeys(t *testing.T) {
	cfg := files(t, map[string]string{"config.yaml.d/1.yaml": "of-the-future: 1\ntoken: t\n"})
	warned := ""
	v, err := Parse("server", []string{"-c", cfg}, func(s string) { warned += s })
	if err != nil || v.Str("token") != "t" || !strings.Contains(warned, "of-the-future") {
		t.Errorf("server: %v %q", err, warned)
	}
	for _, key := range []string{"of-the-future: 1", "cluster-init: true", "agent-token: x", "disable: [a]"} {
		cfg := files(t, map[string]string{"config.yaml": key + "\n"})
		if _, err := Parse("agent", []string{"--config", cfg}, func(string) {}); !errors.Is(err, ErrUsage) || !strings.Contains(err.Error(), "not defined") {
			t.Errorf("agent with %s: %v", key, err)
		}
	}
	if _, err := Parse("server", []string{"--config", filepath.Join(t.TempDir(), "none.yaml")}, func(string) {}); err == nil {
		t.Error("a named file that does not exist is accepted")
	}
}

func TestEnvironmentIsWeakest(t *testing.T) {
	t.Setenv("K3S_TOKEN", "env")
	cfg := files(t, map[string]string{"config.yaml": "debug: true\n"})
	if v, err := Parse("server", []string{"--config", cfg}, func(string) {}); err != nil || v.Str("token") != "env" || !v.Bool("debug") {
		t.Errorf("%v", err)
	}
	if v, err := Parse("server", []string{"--config", cfg, "--token=cli"}, func(string) {}); err != nil || v.Str("token") != "cli" {
		t.Errorf("%v", err)
	}
}

func FuzzParseYAML(f *testing.F) {
	f.Add([]byte("a: b\nc+: [d, e]\n"))
	f.Add([]byte("a: {b: c}\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		es, err := parseYAML("x", b)
		if err != nil {
			return
		}
		all := merge(nil, es)
		if len(all) > len(es) {
			t.Errorf("%d keys out of %d", len(all), len(es))
		}
		for i, e := range all {
			for _, o := range all[:i] {
				if o.key == e.key {
					t.Errorf("key %q twice", e.key)
				}
			}
		}
	})
}
