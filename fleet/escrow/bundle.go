package escrow

import (
	"crypto/ecdh"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"hash"
	"io"
)

// Contents is what is sealed: an etcd snapshot and the server token without
// which it cannot be restored (it decrypts k3s's bootstrap data).
type Contents struct {
	// Name of the snapshot file, Size in bytes, SHA256 in hex.
	Name   string `json:"name"`
	Size   int64  `json:"size"`
	SHA256 string `json:"sha256"`
	// Token is the server token. A secret.
	Token string `json:"token"`
	// K3s is the version that wrote the snapshot.
	K3s string `json:"k3s"`
}

const (
	maxContents = 16 << 10
	maxToken    = 4 << 10
)

// String hides the token.
func (c Contents) String() string {
	return fmt.Sprintf("snapshot %s (%d bytes, k3s %s) and its token", c.Name, c.Size, c.K3s)
}

// GoString hides the token.
func (c Contents) GoString() string { return c.String() }

// Validate reports all problems of the contents.
func (c Contents) Validate() error {
	var errs []error
	check := func(ok bool, format string, args ...any) {
		if !ok {
			errs = append(errs, fmt.Errorf(format, args...))
		}
	}
	sum, err := hex.DecodeString(c.SHA256)
	check(err == nil && len(sum) == sha256.Size, "sha256 is no SHA-256 in hex")
	check(c.Name != "" && len(c.Name) <= 256 && baseName(c.Name), "the name of the snapshot is no file name")
	check(c.Size > 0 && c.Size <= MaxPlain-maxContents-4, "size %d; want 1 to %d", c.Size, int64(MaxPlain-maxContents-4))
	check(c.Token != "" && len(c.Token) <= maxToken, "the token has %d bytes; want 1 to %d", len(c.Token), maxToken)
	check(len(c.K3s) <= 64, "the k3s version is too long")
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("escrow: contents: %w", err)
	}
	return nil
}

// baseName keeps a name from leaving the directory it is put into.
func baseName(s string) bool {
	if s[0] == '.' || s[0] == '-' {
		return false
	}
	for _, r := range s {
		if r < 0x20 || r == '/' || r == '\\' || r == 0x7f {
			return false
		}
	}
	return true
}

// SealSnapshot seals a snapshot with its contents. The caller knows size and
// hash of the snapshot beforehand; it fails if they are not as said.
func SealSnapshot(dst io.Writer, public []byte, h Header, c Contents, snapshot io.Reader) (written int64, err error) {
	if err := c.Validate(); err != nil {
		return 0, err
	}
	head, err := json.Marshal(c)
	if err != nil {
		return 0, fmt.Errorf("escrow: seal: %w", err)
	}
	if len(head) > maxContents {
		return 0, fmt.Errorf("escrow: seal: contents of %d bytes", len(head))
	}
	front := append(binary.BigEndian.AppendUint32(nil, uint32(len(head))), head...)
	checked := &checkedReader{r: snapshot, sum: sha256.New(), size: c.Size, want: c.SHA256}
	return Seal(dst, io.MultiReader(&onceReader{front}, checked), public, h)
}

// onceReader gives its bytes and then ends.
type onceReader struct{ b []byte }

// Read implements io.Reader.
func (o *onceReader) Read(p []byte) (int, error) {
	if len(o.b) == 0 {
		return 0, io.EOF
	}
	n := copy(p, o.b)
	o.b = o.b[n:]
	return n, nil
}

// checkedReader fails at the end if size or hash are not as wanted.
type checkedReader struct {
	r    io.Reader
	sum  hash.Hash
	n    int64
	size int64
	want string
}

// Read implements io.Reader.
func (c *checkedReader) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.sum.Write(p[:n])
	if c.n += int64(n); c.n > c.size {
		return n, fmt.Errorf("escrow: the snapshot is longer than %d bytes", c.size)
	}
	if errors.Is(err, io.EOF) && (c.n != c.size || hex.EncodeToString(c.sum.Sum(nil)) != c.want) {
		return n, errors.New("escrow: the snapshot changed while it was read")
	}
	return n, err
}

// OpenSnapshot opens a blob that SealSnapshot made and writes the snapshot to
// dst. What was written counts only if it returns nil.
func OpenSnapshot(dst io.Writer, src io.Reader, private []byte) (Header, Contents, error) {
	s := &splitter{dst: dst, sum: sha256.New()}
	h, err := Open(s, src, private)
	if err != nil {
		return h, Contents{}, err
	}
	if !s.ready || s.n != s.contents.Size || hex.EncodeToString(s.sum.Sum(nil)) != s.contents.SHA256 {
		return h, Contents{}, fmt.Errorf("%w: the snapshot in it is not what it says", ErrDamaged)
	}
	return h, s.contents, nil
}

// splitter takes the contents off the front of a stream.
type splitter struct {
	dst      io.Writer
	sum      hash.Hash
	front    []byte
	contents Contents
	ready    bool
	n        int64
}

// Write implements io.Writer.
func (s *splitter) Write(p []byte) (int, error) {
	all := len(p)
	for !s.ready {
		need := 4
		if len(s.front) >= 4 {
			size := binary.BigEndian.Uint32(s.front)
			if size > maxContents {
				return 0, fmt.Errorf("%w: contents of %d bytes", ErrDamaged, size)
			}
			need += int(size)
		}
		take := min(need-len(s.front), len(p))
		s.front, p = append(s.front, p[:take]...), p[take:]
		switch {
		case len(s.front) < need:
			return all, nil
		case need == 4:
			if binary.BigEndian.Uint32(s.front) == 0 {
				return 0, fmt.Errorf("%w: no contents", ErrDamaged)
			}
			continue
		}
		if err := json.Unmarshal(s.front[4:], &s.contents); err != nil {
			return 0, fmt.Errorf("%w: the contents are no JSON", ErrDamaged)
		}
		if err := s.contents.Validate(); err != nil {
			return 0, fmt.Errorf("%w: %w", ErrDamaged, err)
		}
		s.ready = true
	}
	if s.n += int64(len(p)); s.n > s.contents.Size {
		return 0, fmt.Errorf("%w: the snapshot in it is too long", ErrDamaged)
	}
	s.sum.Write(p)
	if _, err := s.dst.Write(p); err != nil {
		return 0, err
	}
	return all, nil
}

// Reseal opens a blob and seals what is in it to another key, under the same
// header: the way a snapshot goes from the operator to one node. Nothing of it
// touches a disk.
func Reseal(dst io.Writer, src io.Reader, private, public []byte) (Header, error) {
	// The header is needed before the body: read it, and put it back.
	h, info, err := readHeader(src)
	if err != nil {
		return h, err
	}
	pr, pw := io.Pipe()
	opened := make(chan error, 1)
	go func() {
		_, err := Open(pw, io.MultiReader(&onceReader{info}, src), private)
		opened <- err
		pw.CloseWithError(err)
	}()
	_, err = Seal(dst, pr, public, h)
	pr.CloseWithError(errors.New("escrow: reseal ended"))
	if openErr := <-opened; openErr != nil && err != nil {
		err = openErr
	}
	return h, err
}

// MarshalPrivate and the functions after it turn keys into PEM files (PKCS #8
// and PKIX) and back.
func MarshalPrivate(private []byte) ([]byte, error) {
	k, err := ecdh.X25519().NewPrivateKey(private)
	if err != nil {
		return nil, fmt.Errorf("escrow: write private key: %w", err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		return nil, fmt.Errorf("escrow: write private key: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}

// MarshalPublic returns the public key as PEM.
func MarshalPublic(public []byte) ([]byte, error) {
	k, err := ecdh.X25519().NewPublicKey(public)
	if err != nil {
		return nil, fmt.Errorf("escrow: write public key: %w", err)
	}
	der, err := x509.MarshalPKIXPublicKey(k)
	if err != nil {
		return nil, fmt.Errorf("escrow: write public key: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}), nil
}

const maxKeyFile = 16 << 10

func block(text []byte, kind string) ([]byte, error) {
	if len(text) > maxKeyFile {
		return nil, fmt.Errorf("escrow: read key: %d bytes are no key", len(text))
	}
	b, _ := pem.Decode(text)
	if b == nil || b.Type != kind {
		return nil, fmt.Errorf("escrow: read key: no %s block in PEM form", kind)
	}
	return b.Bytes, nil
}

// ParsePrivate reads what MarshalPrivate wrote.
func ParsePrivate(text []byte) ([]byte, error) {
	der, err := block(text, "PRIVATE KEY")
	if err != nil {
		return nil, err
	}
	k, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		return nil, errors.New("escrow: read private key: it is no PKCS #8 key")
	}
	if x, ok := k.(*ecdh.PrivateKey); ok && x.Curve() == ecdh.X25519() {
		return x.Bytes(), nil
	}
	return nil, errors.New("escrow: read private key: it is no X25519 key")
}

// ParsePublic reads what MarshalPublic wrote.
func ParsePublic(text []byte) ([]byte, error) {
	der, err := block(text, "PUBLIC KEY")
	if err != nil {
		return nil, err
	}
	k, err := x509.ParsePKIXPublicKey(der)
	if err != nil {
		return nil, errors.New("escrow: read public key: it is no PKIX key")
	}
	if x, ok := k.(*ecdh.PublicKey); ok && x.Curve() == ecdh.X25519() {
		return x.Bytes(), nil
	}
	return nil, errors.New("escrow: read public key: it is no X25519 key")
}
