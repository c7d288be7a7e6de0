package edk2

import (
	"bufio"
	"bytes"
	"cmp"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"time"
)

func fileConn(fd int) (*net.UDPConn, error) {
	f := os.NewFile(uintptr(fd), "udp")
	defer f.Close()
	c, err := net.FilePacketConn(f)
	if err != nil {
		return nil, err
	}
	return c.(*net.UDPConn), nil
}

// tftpFetch is Mtftp4Dxe as UefiPxeBcDxe uses it: ask for the size, abort,
// then read.
func (c *Client) tftpFetch(server netip.Addr, name string) ([]byte, error) {
	if c.AMI {
		return c.amiFetch(server, name)
	}
	size, err := c.TFTPSize(server, name)
	if err != nil {
		return nil, err
	}
	data, err := c.TFTPRead(server, name)
	if err == nil && len(data) != size {
		err = fmt.Errorf("edk2: tftp: %d bytes came, %d were announced", len(data), size)
	}
	return data, err
}

// amiFetch is what several AMI firmwares do: they ask for tsize alone,
// acknowledge the OACK, then abort with code 0 and words of their own, and ask
// again from the same port before the first transfer is over.
func (c *Client) amiFetch(server netip.Addr, name string) ([]byte, error) {
	t, err := dialTFTP()
	if err != nil {
		return nil, err
	}
	defer t.Close()
	pkt, err := t.ask(netip.AddrPortFrom(server, 69), rrq(name, "tsize", "0"))
	if err != nil {
		return nil, err
	}
	if binary.BigEndian.Uint16(pkt) != 6 {
		return nil, fmt.Errorf("edk2: tftp: %s", tftpError(pkt))
	}
	first := t.peer
	if _, err := t.exchange([]byte{0, 4, 0, 0}); err != nil {
		return nil, err
	}
	if err := t.send(append([]byte{0, 5, 0, 0}, "TFTP Aborted\x00"...)); err != nil {
		return nil, err
	}
	data, err := c.read(t, server, name)
	if err == nil && t.peer == first {
		err = errors.New("edk2: tftp: the second transfer came from the first one's port")
	}
	return data, err
}

// TFTPSize asks for tsize and aborts the transfer with error 8.
func (c *Client) TFTPSize(server netip.Addr, name string) (int, error) {
	t, err := dialTFTP()
	if err != nil {
		return 0, err
	}
	defer t.Close()
	pkt, err := t.ask(netip.AddrPortFrom(server, 69), rrq(name, "tsize", "0", "blksize", strconv.Itoa(c.block())))
	if err != nil {
		return 0, err
	}
	if binary.BigEndian.Uint16(pkt) != 6 {
		return 0, fmt.Errorf("edk2: tftp: %s", tftpError(pkt))
	}
	opts := strings.Split(string(pkt[2:]), "\x00")
	for i := 0; i+1 < len(opts); i += 2 {
		if strings.EqualFold(opts[i], "tsize") {
			_ = t.send(append([]byte{0, 5, 0, 8}, "User aborted the transfer\x00"...))
			return strconv.Atoi(opts[i+1])
		}
	}
	return 0, errors.New("edk2: tftp: no tsize in OACK")
}

func (c *Client) block() int {
	if c.BlockSize == 0 {
		return 1468
	}
	return c.BlockSize
}

// window is what EDK2 proposes by default (PcdPxeTftpWindowSize).
func (c *Client) window() int {
	if c.Window == 0 {
		return 4
	}
	return c.Window
}

// TFTPRead reads a whole file. It proposes a window of 4 as EDK2 does (RFC
// 7440) and takes what the OACK says. Block numbers roll over.
func (c *Client) TFTPRead(server netip.Addr, name string) ([]byte, error) {
	t, err := dialTFTP()
	if err != nil {
		return nil, err
	}
	defer t.Close()
	return c.read(t, server, name)
}

func (c *Client) read(t *tftpConn, server netip.Addr, name string) ([]byte, error) {
	if c.Impatient {
		t.wait = 500 * time.Millisecond
	}
	args := []string{"blksize", strconv.Itoa(c.block()), "windowsize", strconv.Itoa(c.window())}
	switch {
	case c.block() == 512:
		args = nil // shim: no options at all
	case c.window() == 1:
		args = args[:2] // firmware before RFC 7440
	}
	pkt, err := t.ask(netip.AddrPortFrom(server, 69), rrq(name, args...))
	if err != nil {
		return nil, err
	}
	block, window := 512, 1
	switch binary.BigEndian.Uint16(pkt) {
	case 6:
		opts := strings.Split(string(pkt[2:]), "\x00")
		for i := 0; i+1 < len(opts); i += 2 {
			switch strings.ToLower(opts[i]) {
			case "blksize":
				if block, err = strconv.Atoi(opts[i+1]); err != nil || block > c.block() {
					return nil, fmt.Errorf("edk2: tftp: block size %q", opts[i+1])
				}
			case "windowsize":
				if window, err = strconv.Atoi(opts[i+1]); err != nil || window < 1 || window > c.window() || c.window() == 1 {
					return nil, fmt.Errorf("edk2: tftp: window %q, asked for %d", opts[i+1], c.window())
				}
			}
		}
		if err := t.send([]byte{0, 4, 0, 0}); err != nil {
			return nil, err
		}
		pkt = nil
	}
	c.Negotiated = [2]int{block, window}
	var out bytes.Buffer
	last, seen, fresh := uint16(0), 0, 0
	ack := func() []byte { return binary.BigEndian.AppendUint16([]byte{0, 4}, last) }
	// Firmware repeats its acknowledgement six times (Mtftp4Dxe).
	again := func() (b []byte, err error) {
		for range 6 {
			if b, err = t.receive(); err == nil {
				break
			}
			fresh = 0
			if err := t.send(ack()); err != nil {
				return nil, err
			}
		}
		return b, err
	}
	if pkt == nil {
		if pkt, err = again(); err != nil {
			return nil, err
		}
	}
	for {
		switch binary.BigEndian.Uint16(pkt) {
		case 3:
			n := binary.BigEndian.Uint16(pkt[2:])
			seen++
			switch {
			case c.Lose > 0 && seen%c.Lose == 0:
				// Lost on the way: the server must send it again.
			case n == last+1:
				out.Write(pkt[4:])
				last = n
				fresh++
				end := len(pkt)-4 < block
				if fresh == window || end {
					fresh = 0
					if err := t.send(ack()); err != nil || end {
						return out.Bytes(), err
					}
				}
			default:
				// Unexpected, old or new: EDK2 says what it has.
				fresh = 0
				if err := t.send(ack()); err != nil {
					return nil, err
				}
			}
		case 6:
			if err := t.send([]byte{0, 4, 0, 0}); err != nil {
				return nil, err
			}
		default:
			return nil, fmt.Errorf("edk2: tftp: %s", tftpError(pkt))
		}
		if pkt, err = again(); err != nil {
			return nil, err
		}
	}
}

type tftpConn struct {
	*net.UDPConn
	peer netip.AddrPort
	buf  []byte
	wait time.Duration
}

func dialTFTP() (*tftpConn, error) {
	c, err := net.ListenUDP("udp4", nil)
	if err != nil {
		return nil, err
	}
	return &tftpConn{UDPConn: c, buf: make([]byte, 65536), wait: 5 * time.Second}, nil
}

func rrq(name string, opts ...string) []byte {
	b := append([]byte{0, 1}, name...)
	b = append(b, "\x00octet\x00"...)
	for _, o := range opts {
		b = append(append(b, o...), 0)
	}
	return b
}

// ask sends the request to the server's port; the answer comes from another.
func (t *tftpConn) ask(to netip.AddrPort, req []byte) ([]byte, error) {
	for range 5 {
		if _, err := t.WriteToUDPAddrPort(req, to); err != nil {
			return nil, err
		}
		_ = t.SetReadDeadline(time.Now().Add(2 * time.Second))
		n, from, err := t.ReadFromUDPAddrPort(t.buf)
		if err == nil && n >= 4 {
			if from.Addr() != to.Addr() {
				return nil, fmt.Errorf("edk2: tftp: answer from %s, asked %s", from, to)
			}
			t.peer = from
			return t.buf[:n], nil
		}
	}
	return nil, errors.New("edk2: tftp: no answer")
}

func (t *tftpConn) send(b []byte) error {
	_, err := t.WriteToUDPAddrPort(b, t.peer)
	return err
}

func (t *tftpConn) exchange(b []byte) ([]byte, error) {
	if err := t.send(b); err != nil {
		return nil, err
	}
	return t.receive()
}

func (t *tftpConn) receive() ([]byte, error) {
	_ = t.SetReadDeadline(time.Now().Add(t.wait))
	for {
		n, from, err := t.ReadFromUDPAddrPort(t.buf)
		if err != nil {
			return nil, fmt.Errorf("edk2: tftp: %w", err)
		}
		if from == t.peer && n >= 4 {
			return t.buf[:n], nil
		}
	}
}

func tftpError(b []byte) string {
	if len(b) > 4 && b[1] == 5 {
		return fmt.Sprintf("error %d: %s", b[3], strings.TrimRight(string(b[4:]), "\x00"))
	}
	return fmt.Sprintf("unexpected packet % x", b[:min(len(b), 8)])
}

// Fetch is what happens once a URL is known.
func (c *Client) Fetch(url string) ([]byte, error) { return c.httpFetch(url) }

// httpFetch is HttpBootDxe: HEAD for size and type, then GET; no redirects.
func (c *Client) httpFetch(url string) ([]byte, error) {
	scheme, rest, _ := strings.Cut(url, "://")
	host, path, _ := strings.Cut(rest, "/")
	var tc *tls.Config
	if scheme == "https" {
		if c.Roots == nil {
			return nil, errors.New("edk2: https: no CA is enrolled in this firmware")
		}
		// TlsDxe of 2022 and older ends at TLS 1.2. The name is the URL's, here an address.
		name, _, _ := net.SplitHostPort(host)
		tc = &tls.Config{RootCAs: c.Roots, ServerName: name, MaxVersion: tls.VersionTLS12, Time: c.Clock}
	}
	head, _, err := request(tc, cmp.Or(c.Patience, 30*time.Second), host, "HEAD", "/"+path, "")
	if err != nil {
		return nil, err
	}
	if head.StatusCode != 200 || head.ContentLength <= 0 {
		return nil, fmt.Errorf("edk2: http: HEAD gave %s, length %d", head.Status, head.ContentLength)
	}
	ct := head.Header.Get("Content-Type")
	if ct != "application/efi" && !strings.HasSuffix(path, ".efi") {
		return nil, fmt.Errorf("edk2: http: not a boot image: %q", ct)
	}
	get, body, err := request(tc, cmp.Or(c.Patience, 30*time.Second), host, "GET", "/"+path, "")
	if err != nil {
		return nil, err
	}
	if get.StatusCode != 200 || int64(len(body)) != head.ContentLength {
		return nil, fmt.Errorf("edk2: http: GET gave %s, %d bytes of %d", get.Status, len(body), head.ContentLength)
	}
	return body, nil
}

// HTTP makes one request on a connection opened by this thread.
func HTTP(hostport, method, path, ranges string) (*http.Response, []byte, error) {
	return request(nil, 30*time.Second, hostport, method, path, ranges)
}

func request(tc *tls.Config, patience time.Duration, hostport, method, path, ranges string) (*http.Response, []byte, error) {
	conn, err := net.DialTimeout("tcp4", hostport, 3*time.Second)
	if err != nil {
		return nil, nil, err
	}
	if tc != nil {
		conn = tls.Client(conn, tc)
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(patience))
	req := method + " " + path + " HTTP/1.1\r\nHost: " + hostport + "\r\nUser-Agent: UefiHttpBoot/1.0\r\nConnection: close\r\n"
	if ranges != "" {
		req += "Range: " + ranges + "\r\n"
	}
	if _, err := io.WriteString(conn, req+"\r\n"); err != nil {
		return nil, nil, err
	}
	res, err := http.ReadResponse(bufio.NewReader(conn), &http.Request{Method: method})
	if err != nil {
		return nil, nil, err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	return res, body, err
}
