package api

import (
	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/fleet"
)

// The messages of documents are for showing. There is no Format in them, and
// no way back to the payload that was signed: who has to trust a document
// verifies its envelope.

// CharterToProto converts a charter.
func CharterToProto(c fleet.Charter) *musterv1.Charter {
	m := &musterv1.Charter{
		Tenant: c.Tenant, Site: c.Site, Version: docVersionToProto(c.Version), Lab: c.Lab, AnyBoot: c.AnyBoot,
		Founding: foundingToProto(c.Founding), Policy: policyToProto(c.Policy), Birth: birthToProto(c.Birth),
		Delegates: c.Delegates, EscrowKey: c.EscrowKey, Issued: stamp(c.Issued),
		Stack: stackRefToProto(c.Stack), Update: updateToProto(c.Update),
	}
	for _, i := range c.Images {
		m.Images = append(m.Images, &musterv1.ImageEvidence{
			Name: i.Name, Version: i.Version, Authenticode: i.Authenticode, Kernel: i.Kernel, Loader: i.Loader, Pcr11: i.PCR11, SignerCert: i.SignerCert,
		})
	}
	return m
}

// AdmissionToProto converts an admission.
func AdmissionToProto(a fleet.Admission) *musterv1.Admission {
	return &musterv1.Admission{
		Tenant: a.Tenant, Site: a.Site, Node: string(a.Node), Incarnation: a.Incarnation, LdevidKey: a.LDevIDKey,
		Labels: a.Labels, MayServe: a.MayServe, Address: a.Address, Version: docVersionToProto(a.Version), Issued: stamp(a.Issued),
	}
}

// RemovalToProto converts a removal.
func RemovalToProto(r fleet.Removal) *musterv1.Removal {
	return &musterv1.Removal{
		Tenant: r.Tenant, Site: r.Site, Node: string(r.Node), Incarnation: r.Incarnation, LdevidKey: r.LDevIDKey,
		Reason: r.Reason, Version: docVersionToProto(r.Version), Issued: stamp(r.Issued),
	}
}

// OrderToProto converts an order.
func OrderToProto(o fleet.Order) *musterv1.Order {
	m := &musterv1.Order{
		Id: o.ID, Tenant: o.Tenant, Site: o.Site, Node: string(o.Node), Kind: string(o.Kind), Snapshot: o.Snapshot,
		Digest: o.Digest, Cluster: o.Cluster, Epoch: o.Epoch, Into: o.Into, KeepData: o.KeepData, Reason: o.Reason, Version: docVersionToProto(o.Version), Issued: stamp(o.Issued), NotAfter: stamp(o.NotAfter),
	}
	if d := o.Disk; d != nil {
		m.Disk = &musterv1.DiskTarget{Serial: d.Serial, Wwn: d.WWN, Model: d.Model, SizeBytes: d.SizeBytes}
	}
	if i := o.Image; i != nil {
		m.Image = imageRefToProto(*i)
	}
	return m
}

// StackVersionToProto converts a stack version.
func StackVersionToProto(v fleet.StackVersion) *musterv1.StackVersion {
	m := &musterv1.StackVersion{
		Tenant: v.Tenant, Stack: v.Stack, Version: v.Version, K3S: v.K3s, EtcdMinor: v.EtcdMinor, Created: stamp(v.Created),
		Cni: v.CNI, Csi: v.CSI,
	}
	for _, i := range v.Images {
		m.Images = append(m.Images, imageRefToProto(i))
	}
	for _, a := range v.AddOns {
		m.AddOns = append(m.AddOns, addOnToProto(a))
	}
	for _, a := range v.Apps {
		m.Apps = append(m.Apps, &musterv1.App{Chart: addOnToProto(a.AddOn), Sites: a.Sites})
	}
	return m
}

func addOnToProto(a fleet.AddOn) *musterv1.AddOn {
	return &musterv1.AddOn{Name: a.Name, Version: a.Version, Sha256: a.SHA256, Namespace: a.Namespace, Values: a.Values}
}

func imageRefToProto(i fleet.ImageRef) *musterv1.ImageRef {
	return &musterv1.ImageRef{Name: i.Name, Version: i.Version, Arch: i.Arch, Sha256: i.SHA256}
}
