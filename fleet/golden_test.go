package fleet_test

import (
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/muster-edge/muster/fleet"
)

var updateGolden = flag.Bool("update", false, "write testdata/*.json instead of comparing with it")

// TestDocumentsAsTheyAreSigned: what was signed years ago must be read for
// ever, so that no field may change its name or form.
func TestDocumentsAsTheyAreSigned(t *testing.T) {
	charter := goodCharter()
	charter.Version = fleet.DocVersion{Epoch: 2, N: 7}
	charter.Founding.Successors = []fleet.NodeID{fleet.EKHash{9}.NodeID()}
	charter.Delegates, charter.EscrowKey, charter.Lab, charter.AnyBoot = [][]byte{{1, 2}}, digest, true, true
	charter.Birth.Disable = []string{"traefik"}
	charterStack := charter
	charterStack.Stack, charterStack.Update = goodStackRef(), goodUpdate()
	version := goodStackVersion()
	version.CNI, version.CSI = "flannel", "longhorn"
	version.AddOns = []fleet.AddOn{{Name: "longhorn", Version: "1.9.0", SHA256: digest, Namespace: "longhorn-system", Values: "replicas: 2\n"}}
	version.Apps = []fleet.App{{AddOn: fleet.AddOn{Name: "till", Version: "4", SHA256: digest}, Sites: map[string]string{"kind": "shop"}}}
	admission := goodAdmission()
	admission.Labels, admission.MayServe, admission.Address, admission.Version = map[string]string{"muster/cpus": "8"}, true, "100.96.0.1", fleet.DocVersion{Epoch: 1, N: 3}
	order := func(kind fleet.OrderKind, change func(*fleet.Order)) fleet.Order {
		o := fleet.Order{
			Format: fleet.OrderFormat, ID: "o-1", Tenant: "default", Site: "shop-1", Node: ek.NodeID(), Kind: kind, Reason: "why",
			Version: fleet.DocVersion{Epoch: 1, N: 9}, Issued: now, NotAfter: now.Add(time.Hour),
		}
		if change != nil {
			change(&o)
		}
		return o
	}
	record := goodRecord()
	record.Version, record.Into = 4, "c-2"
	for name, v := range map[string]interface{ Validate() error }{
		"charter": charter, "charter-stack": charterStack, "stack-version": version, "admission": admission,
		"order-install": order(fleet.OrderInstall, func(o *fleet.Order) {
			o.Disk, o.KeepData = &fleet.DiskTarget{Serial: "S1", WWN: "naa.5", Model: "M", SizeBytes: 64 << 30}, true
			o.Image = &fleet.ImageRef{Name: "slot", Version: "1", Arch: "amd64", SHA256: digest}
		}),
		"order-wipe":    order(fleet.OrderWipe, func(o *fleet.Order) { o.Disk = &fleet.DiskTarget{Serial: "S1", SizeBytes: 64 << 30} }),
		"order-recover": order(fleet.OrderRecover, nil),
		"order-downgrade": order(fleet.OrderDowngrade, func(o *fleet.Order) {
			o.Image = &fleet.ImageRef{Name: "slot", Version: "1", Arch: "amd64", SHA256: digest}
		}),
		"order-clear-failed": order(fleet.OrderClearFailed, func(o *fleet.Order) { o.Digest = digest }),
		"removal": fleet.Removal{
			Format: fleet.RemovalFormat, Tenant: "default", Site: "shop-1", Node: ek.NodeID(), Incarnation: 2, LDevIDKey: digest, Reason: "sold",
			Version: fleet.DocVersion{Epoch: 1, N: 4}, Issued: now,
		},
		"order-found":    order(fleet.OrderFound, nil),
		"order-reset":    order(fleet.OrderReset, func(o *fleet.Order) { o.Cluster, o.Epoch = "c-1", 17 }),
		"order-restore":  order(fleet.OrderRestore, func(o *fleet.Order) { o.Cluster, o.Epoch, o.Snapshot = "c-1", 17, "e-aaaaaaaaaaaaaaaaaaaaaaaa" }),
		"order-dissolve": order(fleet.OrderDissolve, func(o *fleet.Order) { o.Cluster, o.Into = "c-1", "c-2" }),
		"cluster-record": record,
		"escrow-offer":   fleet.EscrowOffer{Format: fleet.EscrowOfferFormat, Tenant: "default", Site: "shop-1", Node: ek.NodeID(), Key: digest, Issued: now},
	} {
		if err := v.Validate(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		got, err := json.MarshalIndent(v, "", "  ")
		if err != nil {
			t.Fatal(err)
		}
		file := filepath.Join("testdata", name+".json")
		if *updateGolden {
			if err := os.WriteFile(file, append(got, '\n'), 0o644); err != nil {
				t.Fatal(err)
			}
			continue
		}
		want, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if string(want) != string(got)+"\n" {
			t.Errorf("%s is signed as\n%s\nand was\n%s", name, got, want)
		}
	}
}

// FuzzDocuments: a document of whoever is taken apart without harm.
func FuzzDocuments(f *testing.F) {
	files, err := filepath.Glob("testdata/*.json")
	if err != nil || len(files) == 0 {
		f.Fatal("no examples", err)
	}
	for _, name := range files {
		b, err := os.ReadFile(name)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var (
			record    fleet.ClusterRecord
			offer     fleet.EscrowOffer
			charter   fleet.Charter
			admission fleet.Admission
			order     fleet.Order
			version   fleet.StackVersion
			system    fleet.SystemReport
		)
		if json.Unmarshal(b, &record) == nil && record.Validate() == nil && (len(record.Servers) > fleet.MaxRecordServers || record.Epoch > fleet.MaxClusterEpoch) {
			t.Fatal("an unbounded record is valid")
		}
		for _, v := range []interface{ Validate() error }{&offer, &charter, &admission, &order, &version, &system} {
			if json.Unmarshal(b, v) == nil {
				_ = v.Validate()
			}
		}
		if u := charter.UpdatePolicy(); u.Validate() == nil {
			if open, change := u.Open(now); !change.IsZero() && (!change.After(now) || change.After(now.Add(9*24*time.Hour))) {
				t.Fatalf("%+v is open: %v, and changes at %s", u, open, change)
			}
		}
	})
}
