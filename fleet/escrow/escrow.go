// Package escrow seals a site's snapshot, and the token that it needs, to an
// X25519 public key whose private half is with the operator (or, on the way
// back, with one node): nobody in between can read it, and a changed, cut or
// reordered blob does not open. It works on streams and holds one chunk of it
// in memory.
//
// A blob is: the line "muster/escrow/v1", the length of the header (4 bytes,
// big endian), the header (JSON), the encapsulated key (32 bytes), then
// chunks. A chunk is its length (4 bytes) and ciphertext of at most ChunkSize
// bytes of plaintext. The sealing is HPKE (RFC 9180) in base mode with
// DHKEM(X25519, HKDF-SHA256), HKDF-SHA256 and ChaCha20-Poly1305; all before
// the encapsulated key is its info, the byte 1 is the associated data of the
// last chunk and 0 that of all others, and HPKE counts the chunks.
//
// Base mode does not say who sealed: whoever has the public key can make a
// blob that opens. What a node restores is named by a signed order.
package escrow

import (
	"bytes"
	"crypto/ecdh"
	"crypto/hpke"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/muster-edge/muster/fleet"
)

const (
	// MaxBlob bounds a sealed blob and MaxPlain what is in it, in bytes.
	MaxBlob  = 512 << 20
	MaxPlain = MaxBlob - 1<<20
	// ChunkSize is how much plaintext goes into one chunk.
	ChunkSize = 64 << 10
	// KeySize is the size of both halves of a key.
	KeySize = 32

	magic     = "muster/escrow/v1\n"
	maxHeader = 4 << 10
	overhead  = 16 // of ChaCha20-Poly1305
)

// ErrDamaged: the blob was cut or changed, or is none. ErrWrongKey: it is
// sealed to another key.
var (
	ErrDamaged  = errors.New("escrow: the blob is damaged")
	ErrWrongKey = errors.New("escrow: sealed to another key")
)

// Header says what a blob is. It is readable without the key, and it cannot
// be changed without spoiling the blob.
type Header struct {
	// KeyID names the key the blob is sealed to; Seal sets it.
	KeyID  string       `json:"key_id"`
	Tenant string       `json:"tenant"`
	Site   string       `json:"site"`
	Node   fleet.NodeID `json:"node"`
	// Kind is KindSnapshot or KindDiskKey.
	Kind string `json:"kind,omitempty"`
	// Cluster and Epoch are of the record at the time of the snapshot; there
	// are none for other kinds.
	Cluster string    `json:"cluster"`
	Epoch   uint64    `json:"epoch"`
	Taken   time.Time `json:"taken"`
}

// Kinds of blobs.
const (
	// KindSnapshot holds Contents and an etcd snapshot.
	KindSnapshot = ""
	// KindDiskKey holds the recovery key of a node's data partition: one line
	// of text.
	KindDiskKey = "disk-key"
	// MaxDiskKey bounds a sealed one, in bytes.
	MaxDiskKey = 16 << 10
)

// Validate reports all problems of the header.
func (h Header) Validate() error {
	var errs []error
	errs = append(errs, fleet.ValidateName("tenant", h.Tenant), fleet.ValidateName("site", h.Site), h.Node.Validate())
	switch h.Kind {
	case KindSnapshot:
		errs = append(errs, fleet.ValidateClusterUID(h.Cluster))
	case KindDiskKey:
		if h.Cluster != "" || h.Epoch != 0 {
			errs = append(errs, errors.New("a disk key belongs to no cluster"))
		}
	default:
		errs = append(errs, fmt.Errorf("kind %.40q is not known", h.Kind))
	}
	if h.Epoch > fleet.MaxClusterEpoch {
		errs = append(errs, fmt.Errorf("epoch %d is too large", h.Epoch))
	}
	if h.Taken.IsZero() {
		errs = append(errs, errors.New("taken is not set"))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("escrow: header: %w", err)
	}
	return nil
}

// KeyID names a public key: the first 8 bytes of its SHA-256, in hex.
func KeyID(public []byte) string {
	sum := sha256.Sum256(public)
	return hex.EncodeToString(sum[:8])
}

// GenerateKey makes a key pair; each half has KeySize bytes.
func GenerateKey() (private, public []byte, err error) {
	k, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		return nil, nil, fmt.Errorf("escrow: make key: %w", err)
	}
	return k.Bytes(), k.PublicKey().Bytes(), nil
}

// PublicOf returns the public half of a private key.
func PublicOf(private []byte) ([]byte, error) {
	k, err := ecdh.X25519().NewPrivateKey(private)
	if err != nil {
		return nil, fmt.Errorf("escrow: read private key: %w", err)
	}
	return k.PublicKey().Bytes(), nil
}

// suite is the one way of sealing: there is nothing to negotiate.
func suite() (hpke.KEM, hpke.KDF, hpke.AEAD) {
	return hpke.DHKEM(ecdh.X25519()), hpke.HKDFSHA256(), hpke.ChaCha20Poly1305()
}

var (
	notLast = []byte{0}
	last    = []byte{1}
)

// Seal seals all of src to the public key and returns how many bytes it wrote.
func Seal(dst io.Writer, src io.Reader, public []byte, h Header) (written int64, err error) {
	h.KeyID = KeyID(public)
	if err := h.Validate(); err != nil {
		return 0, err
	}
	info, err := json.Marshal(h)
	if err != nil {
		return 0, fmt.Errorf("escrow: seal: %w", err)
	}
	if len(info) > maxHeader {
		return 0, fmt.Errorf("escrow: seal: header of %d bytes, at most %d are allowed", len(info), maxHeader)
	}
	info = append(binary.BigEndian.AppendUint32([]byte(magic), uint32(len(info))), info...)
	kem, kdf, aead := suite()
	key, err := kem.NewPublicKey(public)
	if err != nil {
		return 0, fmt.Errorf("escrow: read public key: %w", err)
	}
	enc, sender, err := hpke.NewSender(key, kdf, aead, info)
	if err != nil {
		return 0, fmt.Errorf("escrow: seal: %w", err)
	}
	out := &counter{w: dst}
	if _, err := out.Write(append(info, enc...)); err != nil {
		return out.n, fmt.Errorf("escrow: seal: %w", err)
	}
	// Two buffers: whether a chunk is the last one is known after the next
	// read.
	chunk, next := make([]byte, ChunkSize), make([]byte, ChunkSize)
	n, end, err := fill(src, chunk)
	for total := int64(0); err == nil; {
		if total += int64(n); total > MaxPlain {
			return out.n, fmt.Errorf("escrow: seal: more than %d bytes", int64(MaxPlain))
		}
		m := 0
		if !end {
			if m, end, err = fill(src, next); err != nil {
				break
			}
			if m > 0 || !end {
				if err := out.chunk(sender, notLast, chunk[:n]); err != nil {
					return out.n, err
				}
				chunk, next, n = next, chunk, m
				continue
			}
		}
		return out.n, out.chunk(sender, last, chunk[:n])
	}
	return out.n, fmt.Errorf("escrow: read what is to be sealed: %w", err)
}

// fill reads a whole buffer, or what is left.
func fill(r io.Reader, b []byte) (n int, end bool, err error) {
	n, err = io.ReadFull(r, b)
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return n, true, nil
	}
	return n, false, err
}

type counter struct {
	w io.Writer
	n int64
}

// Write implements io.Writer.
func (c *counter) Write(b []byte) (int, error) {
	n, err := c.w.Write(b)
	c.n += int64(n)
	return n, err
}

func (c *counter) chunk(s *hpke.Sender, aad, plain []byte) error {
	sealed, err := s.Seal(aad, plain)
	if err != nil {
		return fmt.Errorf("escrow: seal: %w", err)
	}
	if _, err := c.Write(append(binary.BigEndian.AppendUint32(make([]byte, 0, 4+len(sealed)), uint32(len(sealed))), sealed...)); err != nil {
		return fmt.Errorf("escrow: write: %w", err)
	}
	return nil
}

// Inspect reads the header of a blob. Nothing of it is proven: only Open
// proves it.
func Inspect(src io.Reader) (Header, error) {
	h, _, err := readHeader(src)
	return h, err
}

func readHeader(src io.Reader) (h Header, info []byte, err error) {
	info = make([]byte, len(magic)+4)
	if _, err := io.ReadFull(src, info); err != nil || !bytes.HasPrefix(info, []byte(magic)) {
		return h, nil, fmt.Errorf("%w: it does not begin as one", ErrDamaged)
	}
	size := binary.BigEndian.Uint32(info[len(magic):])
	if size > maxHeader {
		return h, nil, fmt.Errorf("%w: header of %d bytes", ErrDamaged, size)
	}
	body := make([]byte, size)
	if _, err := io.ReadFull(src, body); err != nil {
		return h, nil, fmt.Errorf("%w: the header is cut", ErrDamaged)
	}
	if err := json.Unmarshal(body, &h); err != nil {
		return h, nil, fmt.Errorf("%w: the header is no JSON", ErrDamaged)
	}
	if err := h.Validate(); err != nil {
		return h, nil, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	return h, append(info, body...), nil
}

// Open opens a blob. It writes plaintext to dst while it goes: what was
// written counts only if Open returns nil, else the caller deletes it.
func Open(dst io.Writer, src io.Reader, private []byte) (Header, error) {
	h, info, err := readHeader(src)
	if err != nil {
		return h, err
	}
	public, err := PublicOf(private)
	if err != nil {
		return h, err
	}
	if h.KeyID != KeyID(public) {
		return h, fmt.Errorf("%w: it wants key %.32q, this is %s", ErrWrongKey, h.KeyID, KeyID(public))
	}
	enc := make([]byte, KeySize)
	if _, err := io.ReadFull(src, enc); err != nil {
		return h, fmt.Errorf("%w: the key is cut", ErrDamaged)
	}
	kem, kdf, aead := suite()
	key, err := kem.NewPrivateKey(private)
	if err != nil {
		return h, fmt.Errorf("escrow: read private key: %w", err)
	}
	recipient, err := hpke.NewRecipient(enc, key, kdf, aead, info)
	if err != nil {
		return h, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	var size [4]byte
	buf := make([]byte, ChunkSize+overhead)
	for total := 0; ; {
		if _, err := io.ReadFull(src, size[:]); err != nil {
			return h, fmt.Errorf("%w: it ends too soon", ErrDamaged)
		}
		n := binary.BigEndian.Uint32(size[:])
		if n < overhead || int(n) > len(buf) {
			return h, fmt.Errorf("%w: chunk of %d bytes", ErrDamaged, n)
		}
		if _, err := io.ReadFull(src, buf[:n]); err != nil {
			return h, fmt.Errorf("%w: it ends too soon", ErrDamaged)
		}
		// A full chunk says by its data which it is: HPKE does not count a
		// failed try.
		end := false
		plain, err := recipient.Open(notLast, buf[:n])
		if err != nil {
			if plain, err = recipient.Open(last, buf[:n]); err != nil {
				return h, fmt.Errorf("%w: a chunk was changed", ErrDamaged)
			}
			end = true
		}
		if total += len(plain); total > MaxPlain {
			return h, fmt.Errorf("%w: more than %d bytes", ErrDamaged, int64(MaxPlain))
		}
		if _, err := dst.Write(plain); err != nil {
			return h, fmt.Errorf("escrow: write: %w", err)
		}
		if !end {
			continue
		}
		if n, err := io.ReadFull(src, size[:1]); n != 0 || !errors.Is(err, io.EOF) {
			return h, fmt.Errorf("%w: something follows its end", ErrDamaged)
		}
		return h, nil
	}
}
