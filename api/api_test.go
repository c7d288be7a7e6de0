package api

import (
	"fmt"
	"reflect"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/timestamppb"
	"pgregory.net/rapid"

	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/fleettest"
)

// there and back: object -> message -> bytes -> message -> object.
func thereAndBack[T any, M any, P interface {
	*M
	proto.Message
}](to func(T) P, from func(P) (T, error),
) func(*testing.T) {
	return func(t *testing.T) {
		rapid.Check(t, func(t *rapid.T) {
			in := fleettest.Draw[T](t)
			wire, err := proto.Marshal(to(in))
			if err != nil {
				t.Fatal(err)
			}
			m := P(new(M))
			if err := proto.Unmarshal(wire, m); err != nil {
				t.Fatal(err)
			}
			out, err := from(m)
			if err != nil {
				t.Fatal(err)
			}
			if !reflect.DeepEqual(in, out) {
				t.Fatalf("%+v\nbecame\n%+v", in, out)
			}
		})
	}
}

// fleettest fills every field of an object, so that a field that was added to
// fleet and forgotten here fails these tests.
func TestRoundTrips(t *testing.T) {
	t.Run("Request", thereAndBack(RequestToProto, RequestFromProto))
	t.Run("Evidence", thereAndBack(EvidenceToProto, EvidenceFromProto))
	t.Run("Hardware", thereAndBack(HardwareToProto, HardwareFromProto))
	t.Run("Node", thereAndBack(NodeToProto, NodeFromProto))
	t.Run("Image", thereAndBack(ImageToProto, ImageFromProto))
	t.Run("Event", thereAndBack(EventToProto, EventFromProto))
	t.Run("AuditRecord", thereAndBack(AuditRecordToProto, AuditRecordFromProto))
	t.Run("Tenant", thereAndBack(TenantToProto, TenantFromProto))
	t.Run("Site", thereAndBack(SiteToProto, SiteFromProto))
	t.Run("SiteSettings", thereAndBack(SettingsToProto, SettingsFromProto))
	t.Run("NodeReport", thereAndBack(NodeReportToProto, NodeReportFromProto))
	t.Run("EscrowBlob", thereAndBack(EscrowBlobToProto, EscrowBlobFromProto))
	t.Run("PreApproval", thereAndBack(PreApprovalToProto, PreApprovalFromProto))
	t.Run("Stack", thereAndBack(StackToProto, StackFromProto))
	t.Run("SystemReport", thereAndBack(SystemReportToProto, SystemReportFromProto))
}

// everyField fails if a field of the message was never set in many random
// objects: then the conversion forgets it.
func everyField[T any, P proto.Message](to func(T) P) func(*testing.T) {
	return func(t *testing.T) {
		seen := map[protoreflect.FullName]bool{}
		var all map[protoreflect.FullName]bool
		rapid.Check(t, func(t *rapid.T) {
			m := to(fleettest.Draw[T](t))
			if all == nil {
				all = map[protoreflect.FullName]bool{}
				collect(m.ProtoReflect().Descriptor(), all)
			}
			mark(m.ProtoReflect(), seen)
		})
		for f := range all {
			if !seen[f] {
				t.Errorf("%s is never set", f)
			}
		}
	}
}

func collect(d protoreflect.MessageDescriptor, all map[protoreflect.FullName]bool) {
	for i := range d.Fields().Len() {
		f := d.Fields().Get(i)
		if all[f.FullName()] || f.ContainingMessage().IsMapEntry() {
			continue
		}
		all[f.FullName()] = true
		if f.Message() != nil && strings.HasPrefix(string(f.Message().FullName()), "muster.v1.") {
			collect(f.Message(), all)
		}
	}
}

func mark(m protoreflect.Message, seen map[protoreflect.FullName]bool) {
	m.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		seen[f.FullName()] = true
		switch {
		case f.IsMap() || f.Message() == nil:
		case f.IsList():
			for i := range v.List().Len() {
				mark(v.List().Get(i).Message(), seen)
			}
		default:
			mark(v.Message(), seen)
		}
		return true
	})
}

func TestEveryFieldOfADocumentIsShown(t *testing.T) {
	t.Run("Charter", everyField(CharterToProto))
	t.Run("Admission", everyField(AdmissionToProto))
	t.Run("Removal", everyField(RemovalToProto))
	t.Run("Order", everyField(OrderToProto))
	t.Run("IssuedOrder", everyField(IssuedOrderToProto))
	t.Run("StackVersion", everyField(StackVersionToProto))
	t.Run("Request", everyField(RequestToProto))
	t.Run("Node", everyField(NodeToProto))
}

// The number of an enum on the wire is the number in fleet, and so is the
// word.
func TestEnumsAgree(t *testing.T) {
	for _, row := range []struct {
		d     protoreflect.EnumDescriptor
		value func(int) fmt.Stringer
	}{
		{musterv1.RequestState(0).Descriptor(), func(i int) fmt.Stringer { return fleet.RequestState(i) }},
		{musterv1.NodeState(0).Descriptor(), func(i int) fmt.Stringer { return fleet.NodeState(i) }},
		{musterv1.SystemState(0).Descriptor(), func(i int) fmt.Stringer { return fleet.SystemState(i) }},
		{musterv1.OrderState(0).Descriptor(), func(i int) fmt.Stringer { return fleet.OrderState(i) }},
		{musterv1.IdentityTrust(0).Descriptor(), func(i int) fmt.Stringer { return fleet.IdentityTrust(i) }},
		{musterv1.BootTrust(0).Descriptor(), func(i int) fmt.Stringer { return fleet.BootTrust(i) }},
		{musterv1.EventLevel(0).Descriptor(), func(i int) fmt.Stringer { return fleet.EventLevel(i) }},
	} {
		n := row.d.Values().Len()
		for i := range n {
			v := row.d.Values().Get(i)
			word := "_" + strings.ToUpper(strings.ReplaceAll(row.value(i).String(), "-", "_"))
			if int(v.Number()) != i || !strings.HasSuffix(string(v.Name()), word) {
				t.Errorf("%s is number %d, fleet has %s there", v.Name(), v.Number(), row.value(i))
			}
		}
		if s := row.value(n).String(); !strings.Contains(s, "(") {
			t.Errorf("%s has no value for %s", row.d.Name(), s)
		}
	}
}

func TestHostileMessagesAreRefused(t *testing.T) {
	good := func() *musterv1.Request {
		return RequestToProto(fleet.Request{
			Evidence: fleet.Evidence{EK: fleet.EKHash{1}, PCRs: map[int]fleet.HexBytes{7: make([]byte, 32)}},
		})
	}
	if _, err := RequestFromProto(good()); err != nil {
		t.Fatalf("the unchanged request: %v", err)
	}
	for name, change := range map[string]func(*musterv1.Request){
		"state":           func(m *musterv1.Request) { m.State = 7 },
		"negative state":  func(m *musterv1.Request) { m.State = -1 },
		"identity":        func(m *musterv1.Request) { m.Identity = 4 },
		"identity, wraps": func(m *musterv1.Request) { m.Identity = 256 + 3 },
		"boot":            func(m *musterv1.Request) { m.Boot = 3 },
		"evidence boot":   func(m *musterv1.Request) { m.Evidence.Boot = 99 },
		"short digest":    func(m *musterv1.Request) { m.EvidenceDigest = make([]byte, 31) },
		"long EK":         func(m *musterv1.Request) { m.Evidence.Ek = make([]byte, 33) },
		"empty alias":     func(m *musterv1.Request) { m.Evidence.EkAliases = [][]byte{nil} },
		"many aliases":    func(m *musterv1.Request) { m.Evidence.EkAliases = make([][]byte, 1000) },
		"PCR 24":          func(m *musterv1.Request) { m.Evidence.Pcrs = map[uint32][]byte{24: make([]byte, 32)} },
		"PCR, wraps":      func(m *musterv1.Request) { m.Evidence.Pcrs = map[uint32][]byte{1 << 31: make([]byte, 32)} },
		"short PCR":       func(m *musterv1.Request) { m.Evidence.Pcrs[7] = []byte{1} },
		"time":            func(m *musterv1.Request) { m.FirstSeen = &timestamppb.Timestamp{Nanos: -1} },
		"time far off":    func(m *musterv1.Request) { m.LastSeen = &timestamppb.Timestamp{Seconds: 1 << 60} },
		"processors":      func(m *musterv1.Request) { m.Evidence.Hardware.Cpus = 1 << 40 },
	} {
		m := good()
		change(m)
		if q, err := RequestFromProto(m); err == nil {
			t.Errorf("%s: it was read as %+v", name, q)
		}
	}
	many := good()
	many.State, many.Boot, many.EvidenceDigest = 99, 99, []byte{1}
	if _, err := RequestFromProto(many); err == nil || strings.Count(err.Error(), "\n") < 2 {
		t.Errorf("not all problems are named: %v", err)
	}
	if _, err := PreApprovalFromProto(&musterv1.PreApproval{Eks: make([]*musterv1.ListedEk, fleet.MaxListedEKs+1)}); err == nil {
		t.Error("an endless list of EKs was read")
	}
}

// Nothing at all is read as nothing at all.
func TestAbsentMessages(t *testing.T) {
	if q, err := RequestFromProto(nil); err != nil || !reflect.DeepEqual(q, fleet.Request{}) {
		t.Errorf("%+v, %v", q, err)
	}
	if n, err := NodeFromProto(nil); err != nil || !reflect.DeepEqual(n, fleet.Node{}) {
		t.Errorf("%+v, %v", n, err)
	}
	if s, err := SiteFromProto(nil); err != nil || !reflect.DeepEqual(s, fleet.Site{}) {
		t.Errorf("%+v, %v", s, err)
	}
}

func FuzzFromProto(f *testing.F) {
	wire, err := proto.Marshal(RequestToProto(fleet.Request{Evidence: fleet.Evidence{EK: fleet.EKHash{1}}}))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(wire)
	f.Fuzz(func(t *testing.T, wire []byte) {
		var q musterv1.Request
		if proto.Unmarshal(wire, &q) == nil {
			if r, err := RequestFromProto(&q); err == nil {
				if again, err := RequestFromProto(RequestToProto(r)); err != nil || again.ID != r.ID || again.State != r.State {
					t.Fatalf("%+v became %+v, %v", r, again, err)
				}
			}
		}
		var n musterv1.Node
		if proto.Unmarshal(wire, &n) == nil {
			_, _ = NodeFromProto(&n)
		}
		var a musterv1.PreApproval
		if proto.Unmarshal(wire, &a) == nil {
			_, _ = PreApprovalFromProto(&a)
		}
		var y musterv1.SystemReport
		if proto.Unmarshal(wire, &y) == nil {
			if v, err := SystemReportFromProto(&y); err == nil {
				_ = v.Validate()
			}
		}
		var r musterv1.AuditRecord
		if proto.Unmarshal(wire, &r) == nil {
			_, _ = AuditRecordFromProto(&r)
		}
	})
}
