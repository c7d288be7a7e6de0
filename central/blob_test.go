package central

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/firmware"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/access"
	"github.com/muster-edge/muster/fleet/statement"
)

// release is a release key and the images it signs.
type release struct {
	t   testing.TB
	key *ecdsa.PrivateKey
	pem []byte
}

func newRelease(t testing.TB) *release {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	return &release{t, key, pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})}
}

// slot makes a slot image: its signed manifest and its files, small ones.
func (r *release) slot(name, version string) (ref fleet.ImageRef, envelope []byte, files [][]byte) {
	r.t.Helper()
	file := func(kind string, size int) firmware.File {
		b := bytes.Repeat([]byte(name+version+kind), size)[:size]
		files = append(files, b)
		return firmware.File{File: fmt.Sprintf("%s-%s-amd64.%s", name, version, kind), Size: int64(size), SHA256: firmware.Digest(sha256.Sum256(b))}
	}
	uki, root, verity, loader := file("efi", 5000), file("root", 3*4096), file("verity", 4096), file("loader.efi", 900)
	chunks, err := firmware.Chunks(bytes.NewReader(files[1]))
	if err != nil {
		r.t.Fatal(err)
	}
	sections := []firmware.SectionDigest{{Name: ".linux", SHA256: uki.SHA256}}
	pcr11, err := firmware.PCR11(sections)
	if err != nil {
		r.t.Fatal(err)
	}
	m := firmware.Manifest{
		Format: firmware.ManifestFormat, Name: name, Version: version, Kind: fleet.ImageSlot, Arch: "amd64", File: uki.File, SHA256: uki.SHA256, Size: uki.Size,
		Created: time.Date(2026, 11, 1, 0, 0, 0, 0, time.UTC), Parts: []firmware.Part{{Name: "kernel", Size: 1}},
		Measurements: firmware.Measurements{Authenticode: uki.SHA256, Kernel: root.SHA256, PCR11: pcr11, Sections: sections, Loader: loader.SHA256},
		Slot: &firmware.SlotImage{
			Root: root, Verity: verity, Loader: loader, RootHash: root.SHA256, ChunkSize: firmware.ChunkSize, Chunks: chunks,
			RootUUID: "00000000-0000-4000-8000-000000000001", VerityUUID: "00000000-0000-4000-8000-000000000002",
			K3s: "v1.36.3+k3s1", K3sDigest: root.SHA256, EtcdMinor: "3.6",
		},
	}
	payload, err := m.JSON()
	if err != nil {
		r.t.Fatal(err)
	}
	return fleet.ImageRef{Name: name, Version: version, Arch: "amd64", SHA256: uki.SHA256[:]}, r.sign(firmware.ManifestType, payload), files
}

func (r *release) sign(kind string, payload []byte) []byte {
	r.t.Helper()
	env, err := statement.Sign(kind, payload, crypto.Signer(r.key))
	if err != nil {
		r.t.Fatal(err)
	}
	return env.JSON()
}

// call makes a call for a file.
func (r *running) call(t *testing.T, client *http.Client, method, url string, body io.Reader, header ...string) (*http.Response, []byte) {
	t.Helper()
	q, err := http.NewRequest(method, url, body)
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(header); i += 2 {
		q.Header.Set(header[i], header[i+1])
	}
	res, err := client.Do(q)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return res, b
}

// push sends a file in two pieces.
func (r *running) push(t *testing.T, b []byte) {
	t.Helper()
	sum := sha256.Sum256(b)
	url := r.admin.Server + blobsPath + hex.EncodeToString(sum[:])
	half := len(b) / 2
	for i, piece := range [][]byte{b[:half], b[half:]} {
		res, text := r.call(t, r.client(), http.MethodPatch, url, bytes.NewReader(piece), "Authorization", "Bearer "+r.admin.Token,
			HeaderUploadOffset, fmt.Sprint(i*half), HeaderUploadLength, fmt.Sprint(len(b)))
		if want := []int{http.StatusNoContent, http.StatusCreated}[i]; res.StatusCode != want {
			t.Fatalf("piece %d: %s %s", i, res.Status, text)
		}
	}
}

// TestBlobs: what an operator pushed, a node of a site fetches, whole and in
// ranges; and nobody else does.
func TestBlobs(t *testing.T) {
	key := newRelease(t)
	r := serve(t, t.TempDir(), func(c *Config) { c.ReleaseKeys, c.BlobQuota = [][]byte{key.pem}, 1<<20 })
	ref, envelope, files := key.slot("shop", "1")
	for _, f := range files {
		r.push(t, f)
	}
	if _, err := r.manage().RegisterImage(context.Background(), &musterv1.RegisterImageRequest{Manifest: envelope}); err != nil {
		t.Fatal(err)
	}
	req, cert, _ := r.enroll(t, newMachine(t, "a"))
	nodes, root := "https://"+r.addr.Nodes, files[1]
	sum := sha256.Sum256(root)
	url := nodes + blobsPath + hex.EncodeToString(sum[:])
	get := func(url string, certs []tls.Certificate, header ...string) (*http.Response, []byte) {
		return r.call(t, r.client(certs...), http.MethodGet, url, nil, header...)
	}
	mine := []tls.Certificate{cert}
	if res, b := get(url, mine); res.StatusCode != 200 || !bytes.Equal(b, root) || res.Header.Get("ETag") != `"`+hex.EncodeToString(sum[:])+`"` {
		t.Errorf("the whole file: %s, %d bytes, ETag %s", res.Status, len(b), res.Header.Get("ETag"))
	}
	if res, b := get(url, mine, "Range", "bytes=4096-4105"); res.StatusCode != 206 || !bytes.Equal(b, root[4096:4106]) {
		t.Errorf("a range: %s, %d bytes", res.Status, len(b))
	}
	if res, _ := get(url, mine, "Range", "bytes=999999-"); res.StatusCode != 416 {
		t.Errorf("a range behind the end: %s", res.Status)
	}
	if res, b := r.call(t, r.client(cert), http.MethodHead, url, nil); res.StatusCode != 200 || len(b) != 0 || res.ContentLength != int64(len(root)) {
		t.Errorf("HEAD: %s, %d", res.Status, res.ContentLength)
	}
	if res, b := get(nodes+manifestsPath+ref.SHA256.String(), mine); res.StatusCode != 200 || !bytes.Equal(b, envelope) {
		t.Errorf("the manifest: %s, %d bytes", res.Status, len(b))
	}
	for name, c := range map[string]struct {
		url   string
		certs []tls.Certificate
		want  int
	}{
		"no certificate":             {url, nil, 401},
		"no certificate, manifest":   {nodes + manifestsPath + ref.SHA256.String(), nil, 401},
		"a file that is not there":   {nodes + blobsPath + strings.Repeat("0", 64), mine, 404},
		"a manifest of no image":     {nodes + manifestsPath + hex.EncodeToString(sum[:]), mine, 404},
		"no digest":                  {nodes + blobsPath + "passwd", mine, 400},
		"a way out":                  {nodes + blobsPath + "..%2f..%2fmuster.db", mine, 400},
		"upper case":                 {nodes + blobsPath + strings.ToUpper(hex.EncodeToString(sum[:])), mine, 400},
		"operators without a token":  {r.admin.Server + blobsPath + hex.EncodeToString(sum[:]), nil, 401},
		"the bare folder":            {nodes + blobsPath, mine, 404},
		"the operators' side, nodes": {r.admin.Server + manifestsPath + ref.SHA256.String(), mine, 404},
	} {
		if res, b := get(c.url, c.certs); res.StatusCode != c.want || bytes.Contains(b, root[:64]) {
			t.Errorf("%s: %s (%s), want %d", name, res.Status, b, c.want)
		}
	}
	if res, _ := r.call(t, r.client(cert), http.MethodPatch, url, strings.NewReader("x")); res.StatusCode != 405 {
		t.Errorf("a node writes: %s", res.Status)
	}
	// A node that left its site gets nothing more, and a denied one neither.
	if _, _, err := r.s.removeNode(context.Background(), testCaller, string(req.Node), 0, "sold"); err != nil {
		t.Fatal(err)
	}
	if res, b := get(url, mine); res.StatusCode != 403 || !strings.Contains(string(b), "belong to a site") {
		t.Errorf("a node of the pool: %s %s", res.Status, b)
	}
	if _, err := r.s.deny(context.Background(), testCaller, string(req.Node), 0, "stolen"); err != nil {
		t.Fatal(err)
	}
	if res, b := get(url, mine); res.StatusCode != 403 || !strings.Contains(string(b), "denied") {
		t.Errorf("a denied node: %s %s", res.Status, b)
	}
}

func TestUploadsThatAreRefused(t *testing.T) {
	r := serve(t, t.TempDir(), func(c *Config) { c.BlobQuota = 10_000 })
	content := bytes.Repeat([]byte("x"), 6000)
	sum := sha256.Sum256(content)
	url := r.admin.Server + blobsPath + hex.EncodeToString(sum[:])
	patch := func(offset, length string, body []byte) (*http.Response, string) {
		res, b := r.call(t, r.client(), http.MethodPatch, url, bytes.NewReader(body), "Authorization", "Bearer "+r.admin.Token, HeaderUploadOffset, offset, HeaderUploadLength, length)
		return res, string(b)
	}
	for name, row := range map[string]struct {
		offset, length string
		body           []byte
		want           int
	}{
		"no offset":         {"", "6000", content, 400},
		"negative":          {"-1", "6000", content, 400},
		"behind the end":    {"6001", "6000", content, 400},
		"a gap":             {"5", "6000", content[5:], 409},
		"too large for all": {"0", "99999999999999", content, 413},
		"no room":           {"0", "10001", content, 507},
		"another file":      {"0", "6000", bytes.Repeat([]byte("y"), 6000), 422},
		"longer than said":  {"0", "5999", content, 422},
	} {
		if res, text := patch(row.offset, row.length, row.body); res.StatusCode != row.want {
			t.Errorf("%s: %s %s, want %d", name, res.Status, text, row.want)
		}
	}
	if res, _ := r.call(t, r.client(), http.MethodHead, url, nil, "Authorization", "Bearer "+r.admin.Token); res.StatusCode != 404 || res.Header.Get(HeaderUploadOffset) != "0" {
		t.Errorf("after the refusals: %s, offset %s", res.Status, res.Header.Get(HeaderUploadOffset))
	}
	r.push(t, content)
	if res, _ := r.call(t, r.client(), http.MethodHead, url, nil, "Authorization", "Bearer "+r.admin.Token); res.StatusCode != 200 || res.ContentLength != 6000 {
		t.Errorf("afterwards: %s, %d bytes", res.Status, res.ContentLength)
	}
	if res, text := patch("0", "6000", content); res.StatusCode != 200 {
		t.Errorf("once more: %s %s", res.Status, text)
	}
	// The centre's disk went bad: whoever sends the image again repairs it.
	name := hex.EncodeToString(sum[:])
	if err := os.WriteFile(filepath.Join(r.s.cfg.Data, "blobs", name[:2], name), bytes.Repeat([]byte("z"), 6000), 0o600); err != nil {
		t.Fatal(err)
	}
	if res, _ := r.call(t, r.client(), http.MethodHead, url, nil, "Authorization", "Bearer "+r.admin.Token); res.StatusCode != 404 || res.Header.Get(HeaderUploadOffset) != "0" {
		t.Errorf("a damaged file: %s, offset %s", res.Status, res.Header.Get(HeaderUploadOffset))
	}
	if res, text := patch("0", "6000", content); res.StatusCode != 201 {
		t.Errorf("a damaged file is sent again: %s %s", res.Status, text)
	}
	if res, b := r.call(t, r.client(), http.MethodGet, url, nil, "Authorization", "Bearer "+r.admin.Token); res.StatusCode != 200 || !bytes.Equal(b, content) {
		t.Errorf("after that: %s, %d bytes", res.Status, len(b))
	}
	// A viewer reads lists, and neither sends nor fetches files.
	token := r.person(t, "eve", access.Binding{Tenant: DefaultTenant, Role: access.Viewer})
	for _, method := range []string{http.MethodGet, http.MethodHead, http.MethodPatch} {
		if res, _ := r.call(t, r.client(), method, url, nil, "Authorization", "Bearer "+token); res.StatusCode != 403 {
			t.Errorf("%s of a viewer: %s", method, res.Status)
		}
	}
}

// TestBlobsThatNothingNamesGo: files stay as long as an image names them, and
// a day without.
func TestBlobsThatNothingNamesGo(t *testing.T) {
	key := newRelease(t)
	r := serve(t, t.TempDir(), func(c *Config) { c.ReleaseKeys = [][]byte{key.pem} })
	_, envelope, files := key.slot("shop", "1")
	other := []byte("nothing names this")
	for _, f := range append(files, other) {
		r.push(t, f)
	}
	if _, err := r.manage().RegisterImage(context.Background(), &musterv1.RegisterImageRequest{Manifest: envelope}); err != nil {
		t.Fatal(err)
	}
	count := func() (n int) {
		if err := r.s.store.View(context.Background(), func(tx store.Reader) error {
			all, err := tx.Blobs(DefaultTenant, nil, 100)
			n = len(all)
			return err
		}); err != nil {
			t.Fatal(err)
		}
		return n
	}
	now := time.Now()
	r.s.cfg.Now = func() time.Time { return now }
	if err := r.s.tidyBlobs(context.Background()); err != nil || count() != 5 {
		t.Fatalf("at once: %d files, %v", count(), err)
	}
	now = now.Add(blobGrace + time.Minute)
	if err := r.s.tidyBlobs(context.Background()); err != nil || count() != 4 {
		t.Fatalf("a day later: %d files, %v", count(), err)
	}
	sum := sha256.Sum256(other)
	if _, whole, err := r.s.blobs.State(sum); whole || err != nil {
		t.Errorf("the file is still there (%v)", err)
	}
	root := sha256.Sum256(files[1])
	if _, whole, err := r.s.blobs.State(root); !whole || err != nil {
		t.Errorf("the root of the image is gone (%v)", err)
	}
}

// TestAChainBehindOneAddress: connections of nodes do not count for their
// address once they proved themselves.
func TestAChainBehindOneAddress(t *testing.T) {
	r := serve(t, t.TempDir(), func(c *Config) { c.MaxConnsPerSource = 2 })
	_, cert, _ := r.enroll(t, newMachine(t, "a"))
	open := func() error {
		_, err := r.report(cert) // each client has a connection of its own
		return err
	}
	for i := range 6 {
		if err := open(); err != nil {
			t.Fatalf("connection %d: %v", i, err)
		}
	}
	// Strangers still have their bound: the third has no answer.
	for i := range 4 {
		c := &http.Client{Transport: r.client().Transport}
		res, err := c.Post("https://"+r.addr.Nodes+"/muster.v1.NodeService/Report", "application/json", strings.NewReader("{}"))
		if err == nil {
			res.Body.Close()
		}
		if i < 2 && err != nil {
			t.Errorf("stranger %d: %v", i, err)
		}
	}
}
