package httpboot_test

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/muster-edge/muster/pxe/httpboot"
)

const name = "amd64/recovery.efi"

type dir map[string]string

func (d dir) Open(n string) (httpboot.File, error) {
	p, ok := d[n]
	if !ok {
		return nil, fs.ErrNotExist
	}
	return os.Open(p)
}

type rig struct {
	addr string
	s    *httpboot.Server
	data []byte
	mu   sync.Mutex
	got  []httpboot.Progress
}

func (r *rig) progress() []httpboot.Progress {
	r.mu.Lock()
	defer r.mu.Unlock()
	return append([]httpboot.Progress(nil), r.got...)
}

func newRig(t testing.TB, size int, edit func(*httpboot.Config)) *rig {
	t.Helper()
	r := &rig{data: make([]byte, size)}
	for i := range r.data {
		r.data[i] = byte(i * 13 >> 4)
	}
	path := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(path, r.data, 0o600); err != nil {
		t.Fatal(err)
	}
	cfg := httpboot.Config{Addr: "127.0.0.1:0", Source: dir{name: path, "x.iso": path, "x.img": path, "x": path}, Log: slog.New(slog.NewTextHandler(io.Discard, nil)),
		Progress: func(p httpboot.Progress) {
			r.mu.Lock()
			defer r.mu.Unlock()
			r.got = append(r.got, p)
		}}
	if edit != nil {
		edit(&cfg)
	}
	s, err := httpboot.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	r.s, r.addr = s, s.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	return r
}

// raw sends a request as it is and reads the answer.
func (r *rig) raw(t testing.TB, request string) (*http.Response, []byte) {
	t.Helper()
	c, err := net.Dial("tcp", r.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(10 * time.Second))
	if _, err := io.WriteString(c, request); err != nil {
		t.Fatal(err)
	}
	method, _, _ := strings.Cut(request, " ")
	res, err := http.ReadResponse(bufio.NewReader(c), &http.Request{Method: method})
	if err != nil {
		t.Fatalf("%q: %v", request, err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return res, b
}

func get(method, path string, headers ...string) string {
	h := strings.Join(append(headers, ""), "\r\n")
	return fmt.Sprintf("%s %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n%s\r\n", method, path, h)
}

func TestWhatFirmwareAsks(t *testing.T) {
	r := newRig(t, 100_001, nil)
	for _, c := range []struct {
		name, request string
		status        int
		length        int64
		body          []byte
		header        string // "Key: value"
	}{
		{"HEAD", get("HEAD", "/"+name), 200, 100_001, nil, "Content-Type: application/efi"},
		{"GET", get("GET", "/"+name), 200, 100_001, r.data, "Content-Type: application/efi"},
		{"double slashes", get("GET", "//amd64//recovery.efi"), 200, 100_001, r.data, ""},
		{"absolute form", get("GET", "http://x//"+name), 200, 100_001, r.data, ""},
		{"query is ignored", get("GET", "/"+name+"?x=1"), 200, 100_001, r.data, ""},
		{"range", get("GET", "/"+name, "Range: bytes=100-199"), 206, 100, r.data[100:200], "Content-Range: bytes 100-199/100001"},
		{"resume", get("GET", "/"+name, "Range: bytes=100000-"), 206, 1, r.data[100_000:], "Content-Range: bytes 100000-100000/100001"},
		{"HEAD with range", get("HEAD", "/"+name, "Range: bytes=0-9"), 206, 10, nil, ""},
		{"range beyond the end", get("GET", "/"+name, "Range: bytes=100001-"), 416, -1, nil, "Content-Range: bytes */100001"},
		{"several ranges are one file", get("GET", "/"+name, "Range: bytes=0-1,5-6"), 200, 100_001, r.data, ""},
		{"conditional is plain", get("GET", "/"+name, "If-Modified-Since: Fri, 31 Dec 2100 23:59:59 GMT", "If-None-Match: *"), 200, 100_001, r.data, ""},
		{"iso", get("HEAD", "/x.iso"), 200, 100_001, nil, "Content-Type: application/vnd.efi-iso"},
		{"img", get("HEAD", "/x.img"), 200, 100_001, nil, "Content-Type: application/vnd.efi-img"},
		{"other", get("HEAD", "/x"), 200, 100_001, nil, "Content-Type: application/octet-stream"},
		{"nothing", get("GET", "/"), 404, 0, []byte{}, ""},
		{"unknown", get("GET", "/etc/passwd"), 404, 0, []byte{}, ""},
		{"folder", get("GET", "/amd64"), 404, 0, []byte{}, ""},
		{"folder with slash", get("GET", "/amd64/"), 404, 0, []byte{}, ""},
		{"dots", get("GET", "/amd64/../"+name), 404, 0, []byte{}, ""},
		{"coded dots", get("GET", "/%2e%2e/"+name), 404, 0, []byte{}, ""},
		{"index", get("GET", "/index.html"), 404, 0, []byte{}, ""},
		{"POST", get("POST", "/"+name, "Content-Length: 0"), 405, 0, []byte{}, "Allow: GET, HEAD"},
		{"PUT", get("PUT", "/"+name, "Content-Length: 3")[:0] + "PUT /x HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nConnection: close\r\n\r\nabc", 405, 0, []byte{}, ""},
		{"CONNECT", get("CONNECT", "x:80"), 405, 0, []byte{}, ""},
		{"OPTIONS *", get("OPTIONS", "*"), 405, 0, []byte{}, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			res, b := r.raw(t, c.request)
			if res.StatusCode != c.status {
				t.Fatalf("%s, want %d", res.Status, c.status)
			}
			if c.length >= 0 && res.ContentLength != c.length && !(res.Request.Method == "CONNECT") {
				t.Errorf("Content-Length %d, want %d", res.ContentLength, c.length)
			}
			if c.body != nil && !bytes.Equal(b, c.body) {
				t.Errorf("%d bytes, want %d", len(b), len(c.body))
			}
			if k, v, ok := strings.Cut(c.header, ": "); ok && res.Header.Get(k) != v {
				t.Errorf("%s: %q, want %q", k, res.Header.Get(k), v)
			}
			if len(res.TransferEncoding) > 0 {
				t.Errorf("transfer encoding %v: firmware wants a length", res.TransferEncoding)
			}
		})
	}
}

// EDK2 gives up on every redirect.
func TestNeverARedirect(t *testing.T) {
	r := newRig(t, 10, nil)
	rapid.Check(t, func(t *rapid.T) {
		parts := rapid.SliceOfN(rapid.SampledFrom([]string{"/", "//", ".", "..", "amd64", "recovery.efi", "index.html", "%2f", "%2e", "?", ";", "a", "%20"}), 0, 8).Draw(t, "parts")
		method := rapid.SampledFrom([]string{"GET", "HEAD", "POST", "OPTIONS"}).Draw(t, "method")
		c, err := net.Dial("tcp", r.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if _, err := io.WriteString(c, get(method, "/"+strings.Join(parts, ""))); err != nil {
			t.Fatal(err)
		}
		res, err := http.ReadResponse(bufio.NewReader(c), &http.Request{Method: method})
		if err != nil {
			t.Fatal(err)
		}
		if res.StatusCode >= 300 && res.StatusCode < 400 || res.Header.Get("Location") != "" {
			t.Fatalf("%s for %v", res.Status, parts)
		}
	})
}

func TestProgress(t *testing.T) {
	r := newRig(t, 9_000_000, nil)
	r.raw(t, get("HEAD", "/"+name))
	if p := r.progress(); len(p) != 0 {
		t.Errorf("HEAD is reported: %+v", p)
	}
	r.raw(t, get("GET", "/"+name))
	last := func() httpboot.Progress {
		deadline := time.Now().Add(5 * time.Second)
		for time.Now().Before(deadline) {
			if p := r.progress(); len(p) > 0 && (p[len(p)-1].Done || p[len(p)-1].Offset+p[len(p)-1].Sent == p[len(p)-1].Size) {
				return p[len(p)-1]
			}
		}
		t.Fatal("no end is reported")
		return httpboot.Progress{}
	}
	p := last()
	if !p.Done || p.Sent != 9_000_000 || p.Size != 9_000_000 || p.Client != netip.MustParseAddr("127.0.0.1") || p.Name != name {
		t.Errorf("%+v", p)
	}
	if len(r.progress()) < 3 {
		t.Errorf("only %d steps of a 9 MB download", len(r.progress()))
	}
	r.mu.Lock()
	r.got = nil
	r.mu.Unlock()
	r.raw(t, get("GET", "/"+name, "Range: bytes=8999999-"))
	if p := last(); !p.Done || p.Offset != 8_999_999 || p.Sent != 1 {
		t.Errorf("resumed: %+v", p)
	}
	r.mu.Lock()
	r.got = nil
	r.mu.Unlock()
	r.raw(t, get("GET", "/"+name, "Range: bytes=0-9"))
	for _, p := range r.progress() {
		if p.Done {
			t.Errorf("a part is reported as the whole: %+v", p)
		}
	}
}

// copies is a connection that notes what the kernel is asked to copy from.
type copies struct {
	*net.TCPConn
	seen chan io.Reader
}

func (c copies) ReadFrom(src io.Reader) (int64, error) {
	r := src
	for {
		l, ok := r.(*io.LimitedReader)
		if !ok {
			break
		}
		r = l.R
	}
	select {
	case c.seen <- r:
	default:
	}
	return c.TCPConn.ReadFrom(src)
}

type copyListener struct {
	net.Listener
	seen chan io.Reader
}

func (l copyListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return copies{c.(*net.TCPConn), l.seen}, nil
}

// net/http hands the file to the connection's ReadFrom, which uses sendfile
// for an *os.File; one wrapper too many and every byte goes through Go.
func TestSendfileIsNotBroken(t *testing.T) {
	r := newRig(t, 10_000_000, nil)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	seen := make(chan io.Reader, 16)
	srv := &http.Server{Handler: r.s}
	go srv.Serve(copyListener{ln, seen})
	defer srv.Close()
	res, err := http.Get("http://" + ln.Addr().String() + "/" + name)
	if err != nil {
		t.Fatal(err)
	}
	b, _ := io.ReadAll(res.Body)
	res.Body.Close()
	if !bytes.Equal(b, r.data) {
		t.Fatalf("%d bytes", len(b))
	}
	n := len(seen)
	for range n {
		if _, ok := (<-seen).(*os.File); !ok {
			t.Error("the connection is given something other than the file")
		}
	}
	if n < 2 {
		t.Errorf("the file went through ReadFrom %d times, in 4 MB pieces it is 3", n)
	}
}

func TestStrangersGetNothing(t *testing.T) {
	r := newRig(t, 10, func(c *httpboot.Config) { c.Allow = func(netip.Addr) bool { return false } })
	if res, _ := r.raw(t, get("GET", "/"+name)); res.StatusCode != 404 || !res.Close {
		t.Errorf("%s, close %v", res.Status, res.Close)
	}
}

func TestConnectionsAreBounded(t *testing.T) {
	r := newRig(t, 10, func(c *httpboot.Config) { c.MaxConns = 1 })
	first, err := net.Dial("tcp", r.addr)
	if err != nil {
		t.Fatal(err)
	}
	// An answer shows that the first has the only place.
	if _, err := io.WriteString(first, "HEAD /"+name+" HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	if _, err := http.ReadResponse(bufio.NewReader(first), &http.Request{Method: "HEAD"}); err != nil {
		t.Fatal(err)
	}
	second, err := net.Dial("tcp", r.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer second.Close()
	if _, err := io.WriteString(second, get("GET", "/"+name)); err != nil {
		t.Fatal(err)
	}
	_ = second.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
	if n, err := second.Read(make([]byte, 1)); err == nil {
		t.Errorf("a second connection got %d bytes", n)
	}
	first.Close()
	_ = second.SetReadDeadline(time.Now().Add(5 * time.Second))
	if _, err := second.Read(make([]byte, 1)); err != nil {
		t.Errorf("the second is not served after the first left: %v", err)
	}
}

func TestConfig(t *testing.T) {
	_, err := httpboot.New(httpboot.Config{MaxConns: -1})
	if err == nil || !strings.Contains(err.Error(), "Source") || !strings.Contains(err.Error(), "MaxConns") {
		t.Errorf("%v", err)
	}
	r := newRig(t, 1, nil)
	if _, err := httpboot.New(httpboot.Config{Addr: r.addr, Source: dir{}}); err == nil || !strings.Contains(err.Error(), "another program") {
		t.Errorf("%v", err)
	}
}

func FuzzClean(f *testing.F) {
	for _, s := range []string{"/" + name, ".", "//a//b", "/../x", "/a/./b", "/\x00", `/a\b`, "", "/"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		n, ok := httpboot.Clean(s)
		if ok && (!fs.ValidPath(n) || n == "." || !filepath.IsLocal(n) || strings.ContainsAny(n, "\\\x00")) {
			t.Fatalf("%q becomes %q", s, n)
		}
		if again, ok2 := httpboot.Clean(n); ok && (!ok2 || again != n) {
			t.Fatalf("%q is not stable", n)
		}
	})
}

func BenchmarkGet(b *testing.B) {
	r := newRig(b, 32<<20, nil)
	b.SetBytes(32 << 20)
	for b.Loop() {
		res, err := http.Get("http://" + r.addr + "/" + name)
		if err != nil {
			b.Fatal(err)
		}
		if n, err := io.Copy(io.Discard, res.Body); n != 32<<20 || err != nil {
			b.Fatal(n, err)
		}
		res.Body.Close()
	}
}
