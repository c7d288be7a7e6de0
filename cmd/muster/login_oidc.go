package main

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/muster-edge/muster/central"
)

// browserWait is how long a person may take in the browser.
const browserWait = 10 * time.Minute

// browserLogin lets a person log in at the identity provider in their browser,
// which then comes to a port that only this computer reaches. It returns the
// code that the centre gave, and what proves that we asked for it.
func browserLogin(ctx context.Context, out io.Writer, server string, port uint16) (code, verifier string, err error) {
	l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port))
	if err != nil {
		return "", "", exitError{3, fmt.Errorf("listen for the browser: %w; is --port free?", err)}
	}
	defer l.Close()
	verifier, state := randomText(), randomText()
	sum := sha256.Sum256([]byte(verifier))
	challenge := base64.RawURLEncoding.EncodeToString(sum[:])
	address := l.Addr().(*net.TCPAddr)
	page := strings.TrimSuffix(server, "/") + "/auth/oidc?" + url.Values{"port": {fmt.Sprint(address.Port)}, "challenge": {challenge}, "state": {state}}.Encode()
	fmt.Fprintf(out, "Open this address in a browser on this computer:\n\n  %s\n\nand go on there if it shows this check: %s\n", page, central.LoginCheck(challenge))

	codes := make(chan string, 1)
	srv := &http.Server{
		ReadHeaderTimeout: 10 * time.Second, WriteTimeout: 10 * time.Second, MaxHeaderBytes: 16 << 10,
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			h := w.Header()
			h.Set("Content-Type", "text/plain; charset=utf-8")
			h.Set("Cache-Control", "no-store")
			h.Set("Referrer-Policy", "no-referrer")
			h.Set("X-Content-Type-Options", "nosniff")
			q := r.URL.Query()
			// Another page may send a browser here, under another name too.
			if r.Method != http.MethodGet || r.URL.Path != "/" || r.Host != address.String() || subtle.ConstantTimeCompare([]byte(q.Get("state")), []byte(state)) != 1 || q.Get("code") == "" {
				http.Error(w, "This is not the answer that muster waits for.", http.StatusBadRequest)
				return
			}
			select {
			case codes <- q.Get("code"):
			default: // it has one
			}
			fmt.Fprintln(w, "Go on at the command line. You can close this page.")
		}),
	}
	failed := make(chan error, 1)
	go func() { failed <- srv.Serve(l) }()
	wait, cancel := context.WithTimeout(ctx, browserWait)
	defer cancel()
	defer func() {
		// The browser gets its answer; a second is long on one computer.
		end, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
		defer cancel()
		_ = srv.Shutdown(end)
	}()
	select {
	case code = <-codes:
		return code, verifier, nil
	case err := <-failed:
		return "", "", fmt.Errorf("wait for the browser: %w", err)
	case <-wait.Done():
		if ctx.Err() != nil {
			return "", "", ctx.Err()
		}
		return "", "", errors.New("nobody logged in within ten minutes: run the command again; if the page said that you have no role, ask the administrator for one first")
	}
}

// randomText is 256 random bits.
func randomText() string {
	b := make([]byte, 32)
	rand.Read(b)
	return base64.RawURLEncoding.EncodeToString(b)
}
