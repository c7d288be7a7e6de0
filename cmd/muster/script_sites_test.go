package main

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/json"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/escrow"
	"github.com/muster-edge/muster/fleet/statement"
)

// reported: reported DIR NAME SITE ROLE UID notes what the node said, as the
// centre does after it has verified it.
func scriptReported(ts *testscript.TestScript, neg bool, args []string) {
	id := fleet.NodeID(ts.Getenv("NODE_" + args[1]))
	inStore(ts, args[0], func(t store.Tx) error {
		site, err := t.Site("default", args[2])
		if err != nil {
			return err
		}
		site.Status = fleet.SiteStatus{Seen: time.Now(), ClusterUID: args[4], ClusterEpoch: 3, Founder: id, Members: []fleet.NodeID{id}, Servers: 1}
		if _, err := t.PutSite(site); err != nil {
			return err
		}
		return t.PutReport(fleet.NodeReport{Tenant: "default", Site: args[2], Node: id, At: time.Now(), UID: args[4], Epoch: 3, Role: args[3], State: args[3]})
	})
	inStore(ts, args[0], func(t store.Tx) error { return t.TouchNode("default", id, time.Now()) })
}

// sealed: sealed DIR NAME SITE KEY puts a sealed snapshot of the node into
// escrow and sets SEALED to its ID. The centre must not run.
func scriptSealed(ts *testscript.TestScript, neg bool, args []string) {
	public, err := escrow.ParsePublic([]byte(ts.ReadFile(args[3])))
	ts.Check(err)
	data := "the snapshot"
	sum := sha256.Sum256([]byte(data))
	var b bytes.Buffer
	node := fleet.NodeID(ts.Getenv("NODE_" + args[1]))
	_, err = escrow.SealSnapshot(&b, public, escrow.Header{Tenant: "default", Site: args[2], Node: node, Cluster: "c-1", Epoch: 3, Taken: time.Now()},
		escrow.Contents{Name: "etcd-1", Size: int64(len(data)), SHA256: hex.EncodeToString(sum[:]), Token: "K10canary", K3s: "v1"}, strings.NewReader(data))
	ts.Check(err)
	whole := sha256.Sum256(b.Bytes())
	id := fleet.EscrowID(whole)
	dir := filepath.Join(ts.MkAbs(args[0]), "escrow", "default")
	ts.Check(os.MkdirAll(dir, 0o700))
	ts.Check(os.WriteFile(filepath.Join(dir, id), b.Bytes(), 0o600))
	inStore(ts, args[0], func(t store.Tx) error {
		return t.AddEscrow(fleet.EscrowBlob{
			Tenant: "default", Site: args[2], ID: id, SHA256: whole[:], Size: int64(b.Len()), Node: node, Cluster: "c-1", Epoch: 3, Taken: time.Now(), Stored: time.Now(), KeyID: escrow.KeyID(public),
		})
	})
	ts.Setenv("SEALED", id)
}

// offers: offers DIR NAME SITE gives the node a key and a certificate, lets it
// offer a key for snapshots, and sets NODEKEY to what its screen would show.
func scriptOffers(ts *testscript.TestScript, neg bool, args []string) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	ts.Check(err)
	c := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: args[1]}, NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	ts.Check(err)
	leaf, err := x509.ParseCertificate(der)
	ts.Check(err)
	sum := sha256.Sum256(leaf.RawSubjectPublicKeyInfo)
	_, public, err := escrow.GenerateKey()
	ts.Check(err)
	id := fleet.NodeID(ts.Getenv("NODE_" + args[1]))
	offer, err := json.Marshal(fleet.EscrowOffer{Format: fleet.EscrowOfferFormat, Tenant: "default", Site: args[2], Node: id, Key: public, Issued: time.Now()})
	ts.Check(err)
	env, err := statement.Sign(fleet.EscrowOfferPayload, offer, key)
	ts.Check(err)
	inStore(ts, args[0], func(t store.Tx) error {
		n, err := t.Node("default", id)
		if err != nil {
			return err
		}
		n.LDevIDKey = sum[:]
		if n, err = t.PutNode(n); err != nil {
			return err
		}
		if err := t.AddIssued(store.Issued{Tenant: "default", Request: n.Request, Node: id, LDevIDKey: sum[:], Serial: "0b", NotBefore: time.Now(), NotAfter: time.Now().Add(time.Hour), Certificates: [][]byte{der}}); err != nil {
			return err
		}
		return t.PutReport(fleet.NodeReport{Tenant: "default", Site: args[2], Node: id, At: time.Now(), Role: "none", State: "waiting", Offer: public, Offered: env.JSON()})
	})
	ts.Setenv("NODEKEY", hex.EncodeToString(sum[:]))
}

// truncate: truncate FILE cuts off the last byte.
func scriptTruncate(ts *testscript.TestScript, neg bool, args []string) {
	name := ts.MkAbs(args[0])
	info, err := os.Stat(name)
	ts.Check(err)
	ts.Check(os.Truncate(name, info.Size()-1))
}
