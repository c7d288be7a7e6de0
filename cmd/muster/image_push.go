package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/muster-edge/muster/api"
	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/central"
	"github.com/muster-edge/muster/firmware"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/statement"
	"github.com/muster-edge/muster/fleet/text"
)

// imagePushCommand is `muster image push MANIFEST`.
func imagePushCommand() *cobra.Command {
	var (
		releasePub, reason string
		f                  format
	)
	cmd := &cobra.Command{
		Use:   "push DIR|MANIFEST",
		Short: "Send an image's files to the centre and register it, so that nodes can fetch it",
		Long: `Sends the files that a signed manifest names, found beside it, and registers the
image at the end. An upload that was cut goes on where it was; what the centre
has is not sent again. The centre takes a file only if its digest is right, and
the image only if a release key that the tenant trusts has signed the manifest.`,
		Example: `  muster image push out/shop-2027.1-amd64.manifest
  muster image push out --release-pub release.key.pub`,
		Args: oneArg("push which image? Give the signed manifest that `muster image slot` or `muster image recovery` wrote, or its folder"),
	}
	a := accessFlags(cmd)
	formatFlag(cmd, &f)
	cmd.Flags().StringVar(&releasePub, "release-pub", "", "PEM file with a release public key to trust from now on")
	cmd.Flags().StringVar(&reason, "reason", "", "why the key is trusted, for the audit log")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		name, err := manifestFile(args[0])
		if err != nil {
			return err
		}
		envelope, m, err := readManifest(name)
		if err != nil {
			return err
		}
		c, err := a.connect()
		if err != nil {
			return err
		}
		if releasePub != "" {
			key, err := readLimited(releasePub, 64<<10)
			if err != nil {
				return err
			}
			if _, err := c.TrustReleaseKey(cmd.Context(), &musterv1.TrustReleaseKeyRequest{PublicKey: string(key), Reason: reason}); err != nil {
				return c.explain(err)
			}
		}
		sent := int64(0)
		for _, file := range m.Files() {
			n, err := c.pushFile(cmd, filepath.Join(filepath.Dir(name), file.File), file.SHA256.String(), file.Size)
			if err != nil {
				return err
			}
			sent += n
		}
		out, err := c.RegisterImage(cmd.Context(), &musterv1.RegisterImageRequest{Manifest: envelope})
		if err != nil {
			return c.explain(err)
		}
		image, err := api.ImageFromProto(out.Image)
		if err != nil {
			return err
		}
		if f != "table" && f != "wide" {
			return f.write(cmd.OutOrStdout(), struct {
				fleet.Image
				Sent    int64 `json:"sent_bytes"`
				Created bool  `json:"created"`
			}{image, sent, out.Created}, table{names: []string{"image/" + image.ID()}})
		}
		verb := "is registered"
		if !out.Created {
			verb = "was registered before"
		}
		fmt.Fprintf(cmd.OutOrStdout(), "image %s for %s %s; %s sent\n", image.ID(), image.Arch, verb, megabytes(sent))
		return nil
	}
	return cmd
}

// manifestFile finds the signed manifest in a folder that holds just one.
func manifestFile(name string) (string, error) {
	info, err := os.Stat(name)
	if errors.Is(err, fs.ErrNotExist) {
		return "", exitError{2, fmt.Errorf("there is no %s", name)}
	}
	if err != nil {
		return "", err
	}
	if !info.IsDir() {
		return name, nil
	}
	var found []string
	for _, pattern := range []string{"*.manifest", "manifest.dsse.json"} {
		more, err := filepath.Glob(filepath.Join(name, pattern))
		if err != nil {
			return "", err
		}
		found = append(found, more...)
	}
	switch len(found) {
	case 1:
		return found[0], nil
	case 0:
		return "", exitError{2, fmt.Errorf("there is no signed manifest in %s: build the image with --release-key", name)}
	}
	return "", exitError{2, fmt.Errorf("%s holds several manifests; give one: %s", name, strings.Join(found, ", "))}
}

// readManifest reads a manifest as it is: the centre checks its signature.
func readManifest(name string) ([]byte, firmware.Manifest, error) {
	envelope, err := readLimited(name, fleet.MaxManifest)
	if err != nil {
		return nil, firmware.Manifest{}, err
	}
	env, err := statement.Parse(envelope)
	if err != nil {
		return nil, firmware.Manifest{}, fmt.Errorf("%s is no signed manifest: %w", name, err)
	}
	m, err := firmware.ParseManifest(env.Payload)
	if err != nil {
		return nil, m, fmt.Errorf("%s: %w", name, err)
	}
	return envelope, m, nil
}

const (
	// pushPiece is what one call sends: small enough that little is sent
	// twice on a line that breaks often.
	pushPiece = 8 << 20
	// pushTries is how often the same piece is tried before giving up.
	pushTries = 8
)

// pushFile sends what the centre lacks of a file. It returns how many bytes
// went over the line.
func (c *centre) pushFile(cmd *cobra.Command, path, digest string, size int64) (sent int64, err error) {
	file, err := os.Open(path)
	if err != nil {
		return 0, fmt.Errorf("push image: %w", err)
	}
	defer file.Close()
	if info, err := file.Stat(); err != nil || info.Size() != size {
		return 0, errors.Join(fmt.Errorf("%s does not have the %d bytes that the manifest says: build the image again", path, size), err)
	}
	url := strings.TrimSuffix(c.server, "/") + "/v1/blobs/" + digest
	have, whole, err := c.blobState(cmd.Context(), url)
	if err != nil {
		return 0, err
	}
	show := newProgress(cmd.ErrOrStderr(), filepath.Base(path), size)
	defer show.end()
	tries := 0
	for !whole {
		show.at(have)
		next, done, n, err := c.pushPiece(cmd.Context(), url, file, have, size)
		sent += n
		if err == nil {
			if next > have {
				tries = 0
			}
			have, whole = next, done
			continue
		}
		var final *finalError
		if tries++; errors.As(err, &final) || tries >= pushTries || cmd.Context().Err() != nil {
			return sent, fmt.Errorf("send %s: %w (what was sent is kept for a day: run the command again to go on)", filepath.Base(path), err)
		}
		select {
		case <-time.After(time.Duration(tries) * time.Second):
		case <-cmd.Context().Done():
			return sent, cmd.Context().Err()
		}
		if have, whole, err = c.blobState(cmd.Context(), url); err != nil && tries+1 >= pushTries {
			return sent, err
		}
	}
	show.at(size)
	return sent, nil
}

// finalError is an answer that another try would get again.
type finalError struct{ text string }

func (e *finalError) Error() string { return e.text }

func (c *centre) blobCall(ctx context.Context, method, url string, body io.Reader) (*http.Request, error) {
	r, err := http.NewRequestWithContext(ctx, method, url, body)
	if err == nil {
		c.who.put(r.Header)
	}
	return r, err
}

// blobState asks how much of a file the centre has.
func (c *centre) blobState(ctx context.Context, url string) (have int64, whole bool, err error) {
	r, err := c.blobCall(ctx, http.MethodHead, url, nil)
	if err != nil {
		return 0, false, err
	}
	res, err := c.http.Do(r)
	if err != nil {
		return 0, false, c.explain(err)
	}
	defer res.Body.Close()
	switch res.StatusCode {
	case http.StatusOK:
		return res.ContentLength, true, nil
	case http.StatusNotFound:
		have, err = strconv.ParseInt(res.Header.Get(central.HeaderUploadOffset), 10, 64)
		if err != nil || have < 0 {
			return 0, false, &finalError{"this centre does not take files: is it older than this program?"}
		}
		return have, false, nil
	case http.StatusUnauthorized, http.StatusForbidden:
		return 0, false, &finalError{fmt.Sprintf("the centre refuses (%s): sending images takes the role operator (configuration: %s)", res.Status, c.file)}
	}
	return 0, false, fmt.Errorf("the centre answers %s", res.Status)
}

// pushPiece sends one piece and returns where to go on.
func (c *centre) pushPiece(ctx context.Context, url string, file io.ReaderAt, have, size int64) (next int64, whole bool, sent int64, err error) {
	body := io.NewSectionReader(file, have, min(pushPiece, size-have))
	r, err := c.blobCall(ctx, http.MethodPatch, url, body)
	if err != nil {
		return have, false, 0, err
	}
	r.ContentLength = body.Size()
	r.Header.Set(central.HeaderUploadOffset, strconv.FormatInt(have, 10))
	r.Header.Set(central.HeaderUploadLength, strconv.FormatInt(size, 10))
	res, err := c.http.Do(r)
	if err != nil {
		return have, false, 0, c.explain(err)
	}
	defer res.Body.Close()
	message, err := io.ReadAll(io.LimitReader(res.Body, 4<<10))
	if err != nil {
		return have, false, 0, err
	}
	next, parseErr := strconv.ParseInt(res.Header.Get(central.HeaderUploadOffset), 10, 64)
	switch res.StatusCode {
	case http.StatusOK, http.StatusCreated:
		return size, true, body.Size(), nil
	case http.StatusNoContent, http.StatusConflict:
		if parseErr != nil || next < 0 || next > size {
			return have, false, 0, &finalError{"the centre's answer is not understood"}
		}
		return next, false, body.Size(), nil
	}
	text := fmt.Sprintf("%s: %s", res.Status, strings.TrimSpace(text.ForTerminal(string(message))))
	if res.StatusCode >= 500 && res.StatusCode != http.StatusInsufficientStorage || res.StatusCode == http.StatusLocked || res.StatusCode == http.StatusTooManyRequests {
		return have, false, body.Size(), errors.New(text)
	}
	return have, false, body.Size(), &finalError{text}
}

// progress is one line that tells how far something long is: on a terminal
// always the newest, elsewhere one line per tenth.
type progress struct {
	w        io.Writer
	name     string
	total    int64
	terminal bool
	last     int64
	said     bool
}

func newProgress(w io.Writer, name string, total int64) *progress {
	f, ok := w.(*os.File)
	terminal := false
	if ok {
		if info, err := f.Stat(); err == nil {
			terminal = info.Mode()&os.ModeCharDevice != 0
		}
	}
	return &progress{w: w, name: cell(name), total: max(total, 1), terminal: terminal, last: -1}
}

func (p *progress) at(n int64) {
	step := n * 10 / p.total
	if p.terminal {
		step = n * 100 / p.total
	}
	if step == p.last {
		return
	}
	p.last, p.said = step, true
	line := fmt.Sprintf("%s  %3d %%  %s of %s", p.name, n*100/p.total, megabytes(n), megabytes(p.total))
	if p.terminal {
		fmt.Fprintf(p.w, "\r%s", line)
		return
	}
	fmt.Fprintln(p.w, line)
}

func (p *progress) end() {
	if p.terminal && p.said {
		fmt.Fprintln(p.w)
	}
}
