package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spf13/cobra"

	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/escrow"
)

func TestOpenDiskKey(t *testing.T) {
	private, public, err := escrow.GenerateKey()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	const key = "abcd-efgh-2345\n"
	var blob bytes.Buffer
	if _, err := escrow.Seal(&blob, strings.NewReader(key), public, escrow.Header{Kind: escrow.KindDiskKey, Tenant: "acme", Site: "shop-7",
		Node: fleet.NodeID("n-" + strings.Repeat("a", 24)), Taken: time.Unix(1_700_000_000, 0).UTC()}); err != nil {
		t.Fatal(err)
	}
	file, out := filepath.Join(dir, "blob"), filepath.Join(dir, "key")
	if err := os.WriteFile(file, blob.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	var said bytes.Buffer
	cmd := &cobra.Command{}
	cmd.SetOut(&said)
	if err := openTo(cmd, file, private, out); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(out)
	fi, serr := os.Stat(out)
	if err != nil || serr != nil || string(b) != key || fi.Mode().Perm() != 0o600 {
		t.Fatalf("%q %v %v %v", b, err, fi.Mode(), serr)
	}
	if strings.Contains(said.String(), "abcd") || !strings.Contains(said.String(), "recovery key") {
		t.Errorf("it says %q", &said)
	}
	if err := openTo(cmd, file, private, out); err == nil {
		t.Error("a file was overwritten")
	}
	other, _, err := escrow.GenerateKey()
	if err != nil {
		t.Fatal(err)
	}
	cut := filepath.Join(dir, "cut")
	if err := os.WriteFile(cut, blob.Bytes()[:blob.Len()-1], 0o600); err != nil {
		t.Fatal(err)
	}
	for _, x := range []struct {
		file string
		key  []byte
	}{{file, other}, {cut, private}} {
		nothing := filepath.Join(dir, "nothing")
		if err := openTo(cmd, x.file, x.key, nothing); err == nil {
			t.Error("it opened")
		}
		if _, err := os.Stat(nothing); err == nil {
			t.Error("something was written")
		}
	}
}
