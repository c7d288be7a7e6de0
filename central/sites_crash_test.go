package central

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/audit"
	"github.com/muster-edge/muster/fleet/statement"
	"github.com/muster-edge/muster/internal/failpoint/crashtest"
)

const forming = "forming"

// crashTB is a testing.TB outside of a test: a failure ends the process.
type crashTB struct{ testing.TB }

func (crashTB) Helper() {}
func (crashTB) Fatal(args ...any) {
	fmt.Fprintln(os.Stderr, args...)
	os.Exit(1)
}

// crashingSite lets a site form: two nodes, the founding, a record, a sealed
// snapshot, a removal, an order. It prints each step once it is acknowledged.
// A second run goes on where the first was killed.
func crashingSite(h *harness) error {
	s := newVaultShopOf(crashTB{}, h)
	defer s.close()
	s.must(h.s.store.Update(context.Background(), func(t store.Tx) error {
		images, err := t.Images(DefaultTenant)
		if err == nil && len(images) == 0 {
			err = addTestImage(t, h.clock.now(), "slot", "1")
		}
		return err
	}))
	a := s.join("a", "shop-7")
	b := s.join("b", "shop-7")
	fmt.Println("joined")
	for _, m := range []*member{a, b} {
		if !s.get(m.ID).Admitted() {
			continue
		}
		out, err := s.node.AskFounding(m.ctx, &musterv1.AskFoundingRequest{Site: "shop-7", Uid: "c-1"})
		if err != nil {
			return err
		}
		if out.Node != string(a.ID) {
			return fmt.Errorf("the right went to %q", out.Node)
		}
	}
	fmt.Println("granted")
	if _, err := s.node.Report(a.ctx, &musterv1.ReportRequest{Cluster: &musterv1.ClusterReport{Role: "server", Record: s.record(a, nil)}}); err != nil {
		return err
	}
	fmt.Println("known")
	out, err := s.put(a, s.sealed(a, "shop-7", "data", s.public), nil)
	if err != nil {
		return err
	}
	fmt.Println("stored", out.Id)
	if s.get(b.ID).Admitted() {
		if _, _, err := s.s.removeNode(context.Background(), testCaller, string(b.ID), 0, "test"); err != nil {
			return err
		}
	}
	fmt.Println("removed")
	open := 0
	s.must(h.s.store.View(context.Background(), func(t store.Reader) error {
		orders, err := t.OpenOrders(DefaultTenant, "shop-7", "", 10)
		open = len(orders)
		return err
	}))
	if open == 0 {
		if _, err := s.order(wish{kind: fleet.OrderReset, node: string(a.ID)}); err != nil {
			return err
		}
	}
	fmt.Println("ordered")
	return nil
}

// TestKilledWhileASiteForms kills the centre around each step of a forming
// site. What was acknowledged is there; documents, rows, records and files
// agree; and the work goes on to the same end.
func TestKilledWhileASiteForms(t *testing.T) {
	binary := crashtest.Binary(t)
	t.Setenv(crashWork, forming)
	verbs := []string{"joined", "granted", "known", "stored", "removed", "ordered"}
	for _, point := range []string{
		"issue.before-commit,2", "found.before-commit", "found.after-commit", "report.before-commit", "escrow.before-sync", "escrow.after-rename",
		"escrow.before-commit", "escrow.after-commit", "remove.before-commit", "remove.after-commit", "order.before-commit", "order.after-commit",
	} {
		t.Run(point, func(t *testing.T) {
			dir := t.TempDir()
			before, killed := runCrashing(t, binary, dir, point)
			if !killed {
				t.Fatalf("it was not killed; it said %v", before)
			}
			lookAtSite(t, dir, before)
			after, killed := runCrashing(t, binary, dir, "")
			var said []string
			for _, line := range after {
				said = append(said, strings.Fields(line)[0])
			}
			if killed || !slices.Equal(said, verbs) {
				t.Fatalf("the second run said %v", after)
			}
			lookAtSite(t, dir, after)
		})
	}
}

func lookAtSite(t *testing.T, dir string, said []string) {
	t.Helper()
	h, err := openHarness(dir, newClock())
	if err != nil {
		t.Fatal(err)
	}
	defer h.s.Close()
	h.sound(t)
	kinds := map[fleet.AuditKind]int{}
	for _, r := range must(h.records())(t) {
		kinds[r.Kind]++
	}
	err = h.s.store.View(context.Background(), func(tx store.Reader) error {
		site, err := tx.Site(DefaultTenant, "shop-7")
		if err != nil {
			return err
		}
		has := map[string]int{}
		documents, err := tx.DocumentsOfSite(DefaultTenant, "shop-7", fleet.DocVersion{}, 100)
		if err != nil {
			return err
		}
		for _, d := range documents {
			env, err := statement.Parse(d.Envelope)
			if err != nil {
				return err
			}
			has[env.PayloadType]++
			if d.Version.Compare(site.Ledger.Documents) > 0 {
				t.Errorf("document %s is newer than the site's revision %s: no node would fetch it", d.Version, site.Ledger.Documents)
			}
		}
		orders, err := tx.OpenOrders(DefaultTenant, "shop-7", "", 10)
		if err != nil {
			return err
		}
		blobs, err := tx.EscrowOfSite(DefaultTenant, "shop-7", 100)
		if err != nil {
			return err
		}
		names := map[string]bool{}
		for _, b := range blobs {
			names[b.ID] = true
			content, err := os.ReadFile(h.s.vault.path(DefaultTenant, b.ID))
			if err != nil || fleet.EscrowID(sha256.Sum256(content)) != b.ID {
				t.Errorf("blob %s is kept by name alone: %v", b.ID, err)
			}
		}
		files, err := os.ReadDir(h.s.vault.dir + "/" + DefaultTenant)
		if err != nil && !os.IsNotExist(err) {
			return err
		}
		if len(files) != len(blobs) {
			t.Errorf("%d files of %d blobs after a start", len(files), len(blobs))
		}
		if kinds[audit.RemovalIssued] != has[fleet.RemovalPayload] || kinds[audit.OrderIssued] != len(orders) || kinds[audit.NodeRemoved] != has[fleet.RemovalPayload] {
			t.Errorf("records %v, documents %v, %d orders", kinds, has, len(orders))
		}
		if (kinds[audit.FoundingGranted] == 1) != (site.Ledger.Grant != nil) || kinds[audit.FoundingGranted] > 1 {
			t.Errorf("%d grants recorded, the site says %+v", kinds[audit.FoundingGranted], site.Ledger.Grant)
		}
		for _, line := range said {
			words := strings.Fields(line)
			good := true
			switch words[0] {
			case "granted":
				good = site.Ledger.Grant != nil
			case "known":
				good = site.Status.ClusterUID == "c-1"
			case "stored":
				good = names[words[1]]
			case "removed":
				good = has[fleet.RemovalPayload] == 1
			case "ordered":
				good = len(orders) == 1
			}
			if !good {
				t.Errorf("%q was acknowledged and is gone", line)
			}
		}
		return nil
	})
	if err != nil && !errors.Is(err, store.ErrNotFound) {
		t.Fatal(err)
	}
}
