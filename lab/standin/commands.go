//go:build labstandin

package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"text/tabwriter"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/muster-edge/muster/lab/standin/internal/access"
	"github.com/muster-edge/muster/lab/standin/internal/proc"
	"github.com/muster-edge/muster/lab/standin/internal/server"
)

const tokenType = "bootstrap.kubernetes.io/token"

// interspersed reads flags before and after the words; it returns the words.
func interspersed(fs *flag.FlagSet, args []string) ([]string, error) {
	fs.SetOutput(io.Discard)
	var words []string
	for {
		if err := fs.Parse(args); err != nil {
			return nil, err
		}
		if fs.NArg() == 0 {
			return words, nil
		}
		words = append(words, fs.Arg(0))
		args = fs.Args()[1:]
	}
}

func dataDir(fs *flag.FlagSet) *string {
	d := "/var/lib/rancher/k3s"
	if e := os.Getenv("K3S_DATA_DIR"); e != "" {
		d = e
	}
	p := fs.String("data-dir", d, "")
	fs.StringVar(p, "d", d, "")
	return p
}

func tokenCommand(args []string) error {
	if len(args) == 0 {
		return errors.New("usage: token create|list|delete|generate")
	}
	fs := flag.NewFlagSet("token", flag.ContinueOnError)
	dir := dataDir(fs)
	kc := fs.String("kubeconfig", os.Getenv("KUBECONFIG"), "")
	ttl := fs.Duration("ttl", 24*time.Hour, "")
	desc := fs.String("description", "", "")
	groups := fs.String("groups", "system:bootstrappers:k3s:default-node-token", "")
	usages := fs.String("usages", "signing,authentication", "")
	out := fs.String("output", "", "")
	fs.StringVar(out, "o", "", "")
	words, err := interspersed(fs, args[1:])
	if err != nil {
		return err
	}
	if args[0] == "generate" {
		fmt.Println(newToken())
		return nil
	}
	path := *kc
	if path == "" {
		path = filepath.Join(*dir, "server", "cred", "admin.kubeconfig")
	}
	rc, err := clientcmd.BuildConfigFromFlags("", path)
	if err != nil {
		return err
	}
	rc.Timeout = 15 * time.Second
	c, err := kubernetes.NewForConfig(rc)
	if err != nil {
		return err
	}
	ctx := context.Background()
	secrets := c.CoreV1().Secrets(metav1.NamespaceSystem)
	switch args[0] {
	case "create":
		tok := newToken()
		if len(words) > 0 {
			t, err := access.ParseToken(words[0])
			if err != nil || t.Bootstrap == "" {
				return fmt.Errorf("the bootstrap token %q was not of the form id.secret", words[0])
			}
			tok = t.Bootstrap
		}
		id, secret, _ := strings.Cut(tok, ".")
		data := map[string]string{"token-id": id, "token-secret": secret, "auth-extra-groups": *groups}
		for _, u := range strings.Split(*usages, ",") {
			data["usage-bootstrap-"+u] = "true"
		}
		if *desc != "" {
			data["description"] = *desc
		}
		if *ttl > 0 {
			data["expiration"] = time.Now().Add(*ttl).UTC().Format(time.RFC3339)
		}
		sec := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: "bootstrap-token-" + id, Namespace: metav1.NamespaceSystem}, Type: tokenType, StringData: data}
		if _, err := secrets.Create(ctx, sec, metav1.CreateOptions{}); err != nil {
			return err
		}
		ca := rc.CAData
		if len(ca) == 0 {
			if ca, err = os.ReadFile(rc.CAFile); err != nil {
				return err
			}
		}
		full, err := access.Format(ca, tok)
		if err != nil {
			return err
		}
		fmt.Println(full)
		return nil
	case "list":
		l, err := secrets.List(ctx, metav1.ListOptions{FieldSelector: "type=" + tokenType})
		if err != nil {
			return err
		}
		w := tabwriter.NewWriter(os.Stdout, 10, 4, 3, ' ', 0)
		fmt.Fprintln(w, "TOKEN\tTTL\tEXPIRES\tUSAGES\tDESCRIPTION")
		for _, s := range l.Items {
			left, exp := "<forever>", "<never>"
			if t, err := time.Parse(time.RFC3339, string(s.Data["expiration"])); err == nil {
				left, exp = time.Until(t).Round(time.Second).String(), t.Format(time.RFC3339)
			}
			fmt.Fprintf(w, "%s\t%s\t%s\tauthentication,signing\t%s\n", s.Data["token-id"], left, exp, s.Data["description"])
		}
		return w.Flush()
	case "delete":
		if len(words) == 0 {
			return errors.New("missing argument; 'token delete' is missing token")
		}
		for _, t := range words {
			id := t
			if p, err := access.ParseToken(t); err == nil && p.Bootstrap != "" {
				id, _, _ = strings.Cut(p.Bootstrap, ".")
			}
			if err := secrets.Delete(ctx, "bootstrap-token-"+id, metav1.DeleteOptions{}); err != nil {
				return err
			}
			fmt.Printf("bootstrap token %q deleted\n", id)
		}
		return nil
	}
	return fmt.Errorf("unknown command %q", args[0])
}

func newToken() string {
	const chars = "abcdefghijklmnopqrstuvwxyz0123456789"
	b := make([]byte, 22)
	for i := range b {
		n, _ := rand.Int(rand.Reader, big.NewInt(int64(len(chars))))
		b[i] = chars[n.Int64()]
	}
	return string(b[:6]) + "." + string(b[6:])
}

func snapshotCommand(args []string) error {
	if len(args) == 0 {
		return errors.New("usage: etcd-snapshot save|ls|delete")
	}
	fs := flag.NewFlagSet("etcd-snapshot", flag.ContinueOnError)
	dir := dataDir(fs)
	url := fs.String("etcd-server", "https://127.0.0.1:6443", "")
	tok := fs.String("token", os.Getenv("K3S_TOKEN"), "")
	fs.StringVar(tok, "t", os.Getenv("K3S_TOKEN"), "")
	file := fs.String("token-file", os.Getenv("K3S_TOKEN_FILE"), "")
	name := fs.String("name", "on-demand", "")
	where := fs.String("etcd-snapshot-dir", "", "")
	fs.StringVar(where, "dir", "", "")
	out := fs.String("output", "", "")
	fs.StringVar(out, "o", "", "")
	words, err := interspersed(fs, args[1:])
	if err != nil {
		return err
	}
	if *tok == "" {
		path := *file
		if path == "" {
			path = filepath.Join(*dir, "server", "token")
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		*tok = strings.TrimSpace(string(b))
	}
	req := server.SnapshotRequest{Dir: where}
	switch args[0] {
	case "save":
		req.Operation, req.Name = "save", []string{*name}
	case "ls", "list", "l":
		req.Operation = "list"
	case "delete":
		req.Operation, req.Name = "delete", words
		if len(words) == 0 {
			return errors.New("no snapshots given for removal")
		}
	default:
		return fmt.Errorf("unknown command %q", args[0])
	}
	body, err := json.Marshal(req)
	if err != nil {
		return err
	}
	ctx := context.Background()
	info, err := access.Validate(ctx, *url, *tok, "server", (*tls.Certificate)(nil))
	if err != nil {
		return err
	}
	b, err := info.Do(ctx, "POST", "/db/snapshot", body, map[string]string{"Content-Type": "application/json"})
	if err != nil {
		return err
	}
	var ans server.SnapshotAnswer
	if err := json.Unmarshal(b, &ans); err != nil {
		return err
	}
	for _, f := range ans.Created {
		proc.Info("Snapshot %s saved.", f.Name)
	}
	for _, f := range ans.Deleted {
		proc.Info("Snapshot %s deleted.", f.Name)
	}
	if req.Operation != "list" {
		return nil
	}
	if *out == "json" {
		var buf bytes.Buffer
		if err := json.NewEncoder(&buf).Encode(ans.Files); err != nil {
			return err
		}
		fmt.Print(buf.String())
		return nil
	}
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 1, ' ', 0)
	fmt.Fprintln(w, "Name\tLocation\tSize\tCreated")
	for _, f := range ans.Files {
		fmt.Fprintf(w, "%s\t%s\t%d\t%s\n", f.Name, f.Location, f.Size, f.Created.Format(time.RFC3339))
	}
	return w.Flush()
}
