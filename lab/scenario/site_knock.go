package scenario

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"math/big"
	"net"
	"time"
)

// k3sPorts are those that only admitted peers may reach (TCP).
var k3sPorts = []int{6443, 2379, 2380, 10250, 5001}

// peerPort is the peers' own; everybody may knock there.
const peerPort = 7445

// knock tries, from a stranger, what an attacker on the LAN would try first:
// the ports of k3s, and the peers' port with a key that nobody admitted. The
// same knocks from an admitted node must be let in, or they prove nothing.
func (s *shop) knock(ctx context.Context, stranger *box, honest []*box) error {
	var errs []error
	v := s.watch.now()
	friend := v.with(s, roleWorker)
	if len(friend) == 0 {
		return errors.New("there is no worker to compare with")
	}
	for _, b := range honest {
		if v.role(b) != roleServer {
			continue
		}
		lan := oldLAN + fmt.Sprint(b.n)
		for _, port := range k3sPorts {
			if err := stranger.reach(ctx, lan, port); err == nil {
				errs = append(errs, fmt.Errorf("%s reaches port %d of %s", stranger.Name(), port, b.Name()))
			}
		}
		said, err := stranger.talk(ctx, fmt.Sprintf("%s:%d", lan, peerPort))
		if err != nil {
			errs = append(errs, err)
		} else if said > 0 {
			errs = append(errs, fmt.Errorf("%s answers a stranger with %d bytes", b.Name(), said))
		}
	}
	// The twin.
	for _, b := range v.with(s, roleServer) {
		if st := v.status[b.Name()]; st.Address != "" {
			if err := friend[0].reach(ctx, st.Address, 6443); err != nil {
				errs = append(errs, fmt.Errorf("the worker %s does not reach its server either: %w", friend[0].Name(), err))
			}
		}
	}
	return errors.Join(errs...)
}

// reach opens a TCP connection and closes it.
func (b *box) reach(ctx context.Context, address string, port int) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	c, err := b.Dial(ctx, "tcp", net.JoinHostPort(address, fmt.Sprint(port)))
	if err != nil {
		return err
	}
	return c.Close()
}

// talk shows a certificate of its own making at the peers' port, says
// something, and returns how many bytes it is told, beyond the handshake.
func (b *box) talk(ctx context.Context, address string) (int, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	raw, err := b.Dial(ctx, "tcp", address)
	if err != nil {
		return 0, fmt.Errorf("a stranger cannot even knock at %s: %w", address, err)
	}
	defer raw.Close()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return 0, err
	}
	t := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "stranger"}, NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, t, t, key.Public(), key)
	if err != nil {
		return 0, err
	}
	c := tls.Client(raw, &tls.Config{
		InsecureSkipVerify: true, // a stranger believes anybody
		Certificates:       []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}, NextProtos: []string{"h2", "http/1.1"},
	})
	_ = c.SetDeadline(time.Now().Add(5 * time.Second))
	if err := c.HandshakeContext(ctx); err != nil {
		return 0, nil // refused at the door
	}
	if _, err := c.Write([]byte("GET / HTTP/1.1\r\nHost: x\r\n\r\n")); err != nil {
		return 0, nil
	}
	buf := make([]byte, 4096)
	n, _ := c.Read(buf) // whatever ends it
	if n > 256 {
		return n, nil
	}
	return 0, nil // an alert, a settings frame, a short refusal: no knowledge
}
