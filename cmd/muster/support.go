package main

import (
	"archive/tar"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"time"

	"github.com/google/renameio/v2"
	"github.com/spf13/cobra"

	musterv1 "github.com/muster-edge/muster/api/muster/v1"
)

// secretForms are what must not leave the house, whatever text it got into.
// Nothing in a bundle should hold any of it; this is the second line.
var secretForms = []*regexp.Regexp{
	regexp.MustCompile(`muster_[A-Za-z0-9_-]{12,}`),
	regexp.MustCompile(`K10[0-9a-f]{16,}(::[^\s"',]*)?`),
	regexp.MustCompile(`(?s)-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(-----END [A-Z ]*PRIVATE KEY-----|$)`),
	regexp.MustCompile(`(?i)(bearer|password|passwd|secret|token|authorization)(["']?\s*[:=]\s*["']?)[^\s"',&}]+`),
	regexp.MustCompile(`([a-z][a-z0-9+.-]*://)[^/\s:@"']*:[^/\s"']*@`),
}

// scrub takes out of a text what has the form of a secret.
func scrub(b []byte) []byte {
	s := string(b)
	for i, r := range secretForms {
		switch i {
		case 3:
			s = r.ReplaceAllString(s, "${1}${2}[taken out]")
		case 4:
			s = r.ReplaceAllString(s, "${1}[taken out]@")
		default:
			s = r.ReplaceAllString(s, "[taken out]")
		}
	}
	return []byte(s)
}

// bundle is a support bundle that is being written.
type bundle struct {
	tar      *tar.Writer
	now      time.Time
	problems []string
}

func (b *bundle) add(name string, content []byte) error {
	content = scrub(content)
	h := &tar.Header{Name: "muster-support/" + name, Mode: 0o600, Size: int64(len(content)), ModTime: b.now, Typeflag: tar.TypeReg}
	if err := b.tar.WriteHeader(h); err != nil {
		return err
	}
	_, err := b.tar.Write(content)
	return err
}

// json adds what a call answers; one that fails is noted, and the rest goes on.
func (b *bundle) json(name string, get func() (any, error)) error {
	v, err := get()
	if err != nil {
		b.problems = append(b.problems, name+": "+err.Error())
		return nil
	}
	out, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	return b.add(name, append(out, '\n'))
}

const (
	bundleList   = 1000    // objects of each kind
	bundleEvents = 2000    // newest ones
	bundleText   = 4 << 20 // bytes of metrics
)

// supportCommand is `muster support-bundle`.
func supportCommand() *cobra.Command {
	var out, metrics string
	cmd := &cobra.Command{
		Use: "support-bundle --out FILE", Short: "Gather what helps somebody else to help you, without secrets",
		Long: `Versions, counts, sites, nodes, requests, orders, the newest events, whether the
audit log holds, metrics, and with --data the names and sizes of the centre's
files, never their content. Keys, tokens, snapshots and the database stay where
they are; what has the form of a secret is taken out of every text. The bundle
names your sites and machines: look at it before you give it away.`,
		Example: "  muster support-bundle --data /var/lib/muster --out support.tar.gz",
		Args:    usageArgs(cobra.NoArgs, "support-bundle takes no arguments"),
	}
	a := accessFlags(cmd)
	cmd.Flags().StringVar(&out, "out", "", "file to write")
	cmd.Flags().StringVar(&metrics, "metrics", "http://127.0.0.1:7490/metrics", "where the centre shows its metrics; - leaves them out")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if out == "" {
			return exitError{2, errors.New("--out FILE is missing")}
		}
		f, err := renameio.NewPendingFile(out, renameio.WithPermissions(0o600))
		if err != nil {
			return fmt.Errorf("write bundle: %w", err)
		}
		defer f.Cleanup() //nolint:errcheck // after the replacement there is nothing to clean up
		z := gzip.NewWriter(f)
		b := &bundle{tar: tar.NewWriter(z), now: time.Now().UTC().Truncate(time.Second)}
		if err := b.gather(cmd.Context(), a, metrics); err != nil {
			return fmt.Errorf("write bundle: %w", err)
		}
		if err := errors.Join(b.tar.Close(), z.Close()); err != nil {
			return fmt.Errorf("write bundle: %w", err)
		}
		if err := f.CloseAtomicallyReplace(); err != nil {
			return fmt.Errorf("write bundle: %w", err)
		}
		for _, p := range b.problems {
			fmt.Fprintln(cmd.ErrOrStderr(), "left out:", cell(p))
		}
		fmt.Fprintf(cmd.OutOrStdout(), "%s is written. It names your sites and machines: look at it before you give it away\n", out)
		return nil
	}
	return cmd
}

func (b *bundle) gather(ctx context.Context, a *access, metrics string) error {
	if err := b.json("version.json", func() (any, error) {
		return map[string]any{"muster": version, "go": runtime.Version(), "os": runtime.GOOS, "arch": runtime.GOARCH, "cpus": runtime.NumCPU(), "made": b.now}, nil
	}); err != nil {
		return err
	}
	c, err := a.connect()
	if err != nil {
		b.problems = append(b.problems, "everything the centre knows: "+err.Error())
	} else if err := b.centre(ctx, c); err != nil {
		return err
	}
	if metrics != "-" {
		text, err := fetchText(ctx, metrics)
		if err != nil {
			b.problems = append(b.problems, "metrics.txt: "+err.Error())
		} else if err := b.add("metrics.txt", text); err != nil {
			return err
		}
	}
	if a.data != "" {
		if err := b.add("files.txt", fileList(a.data)); err != nil {
			return err
		}
	}
	if len(b.problems) > 0 {
		return b.add("left-out.txt", []byte(strings.Join(b.problems, "\n")+"\n"))
	}
	return nil
}

// centre asks the centre.
func (b *bundle) centre(ctx context.Context, c *centre) error {
	for _, part := range []struct {
		name string
		get  func() (any, error)
	}{
		{"centre.json", func() (any, error) { return c.GetCentre(ctx, &musterv1.GetCentreRequest{}) }},
		{"sites.json", func() (any, error) { return c.ListSites(ctx, &musterv1.ListSitesRequest{Limit: bundleList}) }},
		{"nodes.json", func() (any, error) { return c.ListNodes(ctx, &musterv1.ListNodesRequest{Limit: bundleList}) }},
		{"requests.json", func() (any, error) { return c.ListRequests(ctx, &musterv1.ListRequestsRequest{Limit: bundleList}) }},
		{"orders.json", func() (any, error) { return c.ListOrders(ctx, &musterv1.ListOrdersRequest{Limit: bundleList}) }},
		{"audit.json", func() (any, error) { return c.VerifyAudit(ctx, &musterv1.VerifyAuditRequest{}) }},
		{"events.json", func() (any, error) {
			stream, err := c.WatchEvents(ctx, &musterv1.WatchEventsRequest{Tail: bundleEvents})
			if err != nil {
				return nil, err
			}
			defer stream.Close()
			var all []*musterv1.Event
			for stream.Receive() {
				if e := stream.Msg().Event; e != nil {
					all = append(all, e)
				}
			}
			return all, stream.Err()
		}},
	} {
		if err := b.json(part.name, part.get); err != nil {
			return err
		}
	}
	return nil
}

func fetchText(ctx context.Context, url string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	q, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	resp, err := http.DefaultClient.Do(q)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s answers %s", url, resp.Status)
	}
	return io.ReadAll(io.LimitReader(resp.Body, bundleText))
}

// fileList is what is in a directory, without a byte of its content.
func fileList(dir string) []byte {
	var out strings.Builder
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			fmt.Fprintf(&out, "%s: %v\n", path, err)
			return nil
		}
		info, err := d.Info()
		if err != nil {
			return nil // gone meanwhile
		}
		rel, err := filepath.Rel(dir, path)
		if err != nil {
			rel = path
		}
		fmt.Fprintf(&out, "%s %12d %s %s\n", info.Mode(), info.Size(), info.ModTime().UTC().Format(time.RFC3339), cell(rel))
		return nil
	})
	if err != nil {
		fmt.Fprintf(&out, "%v\n", err)
	}
	if st, err := os.Stat(dir); err == nil {
		fmt.Fprintf(&out, "%s is %s\n", cell(dir), st.Mode())
	}
	return []byte(out.String())
}
