package central

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/enroll"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/access"
	"github.com/muster-edge/muster/fleet/placement"
)

// systemOrders are about a node's own operating system.
var systemOrders = []fleet.OrderKind{fleet.OrderInstall, fleet.OrderWipe, fleet.OrderRecover, fleet.OrderDowngrade, fleet.OrderClearFailed}

// describeSystemOrder resolves what a person named into what is signed: one
// disk by all it says of itself, one image by its digest. No node chooses.
func (s *Server) describeSystemOrder(t store.Reader, site fleet.Site, n fleet.Node, w wish, o *fleet.Order) (p promise, err error) {
	who := fleet.Words(n.ID)
	warn := func(format string, args ...any) { p.warnings = append(p.warnings, fmt.Sprintf(format, args...)) }
	sys, err := t.System(n.Tenant, n.ID)
	if err != nil && !errors.Is(err, store.ErrNotFound) {
		return p, err
	}
	switch w.kind {
	case fleet.OrderInstall, fleet.OrderWipe:
		c, err := diskFor(site, n, w)
		if err != nil {
			return p, &enroll.Refused{Why: fmt.Sprintf("no disk of %s can be ordered: %s", who, strings.TrimPrefix(err.Error(), "placement: ")), Do: "name one: --disk serial=S, --disk wwn=W or --disk /dev/NAME; `muster describe node " + string(n.ID) + "` lists them"}
		}
		o.Disk = &c.Target
		what := fmt.Sprintf("%s %s (serial %s, %.1f GB, %s)", c.Disk.Path, c.Disk.Model, c.Target.Serial, float64(c.Target.SizeBytes)/1e9, c.Why)
		if w.kind == fleet.OrderWipe {
			p.sentence = fmt.Sprintf("%s wipes %s: all that is on it is lost.", who, what)
			return p, nil
		}
		if c.Disk.Partitioned {
			warn("The disk holds a partition table: what is on it is lost%s.", keeps(w.keepData))
		}
		ref, err := s.imageFor(t, site, n, w.image)
		if err != nil {
			return p, err
		}
		o.Image, o.KeepData = &ref, w.keepData
		p.sentence = fmt.Sprintf("%s installs image %s on %s.", who, ref.ID(), what)
		if sys.Slot == fleet.SlotA || sys.Slot == fleet.SlotB {
			warn("%s runs from slot %s: it will start its recovery image first.", who, sys.Slot)
		}
	case fleet.OrderRecover:
		p.sentence = fmt.Sprintf("%s restarts into its recovery image and stays there until it is told otherwise.", who)
		if slices.Contains(site.Status.Members, n.ID) && len(site.Status.Members) < 3 {
			warn("%s is a server of cluster %s, which has %d: the site's API is away meanwhile.", who, site.Status.ClusterUID, len(site.Status.Members))
		}
	case fleet.OrderDowngrade:
		ref, err := s.imageFor(t, site, n, w.image)
		if err != nil {
			return p, err
		}
		o.Image = &ref
		p.sentence = fmt.Sprintf("%s goes to image %s, although it is older than what it ran.", who, ref.ID())
		if sys.Image != "" {
			p.sentence = fmt.Sprintf("%s goes from image %s to %s, although that is older.", who, sys.Image, ref.ID())
		}
		warn("etcd does not go back: a node whose etcd has raised its data keeps waiting with that reason.")
	case fleet.OrderClearFailed:
		name := w.image
		if err := o.Digest.UnmarshalText([]byte(w.image)); err != nil || len(o.Digest) != 32 {
			ref, err := s.imageFor(t, site, n, w.image)
			if err != nil {
				return p, err
			}
			o.Digest, name = ref.SHA256, ref.ID()
		}
		known := slices.ContainsFunc(sys.Failed, func(f fleet.FailedImage) bool { return f.SHA256.String() == o.Digest.String() })
		if !known {
			warn("%s has not said that this image failed there.", who)
		}
		p.sentence = fmt.Sprintf("%s forgets that image %s failed, and may try it again.", who, name)
	}
	return p, nil
}

func keeps(data bool) string {
	if data {
		return ", but for a data partition of ours"
	}
	return ""
}

// diskFor is the disk that the person named, or that the site's rule takes.
func diskFor(site fleet.Site, n fleet.Node, w wish) (placement.Choice, error) {
	if w.disk != "" {
		return placement.Find(w.disk, w.overwrite || w.kind == fleet.OrderWipe, n.Hardware.Disks)
	}
	rule := site.Spec.Chosen().Install
	if rule == nil || w.kind == fleet.OrderWipe {
		return placement.Choice{}, fmt.Errorf("none was named, and site %s has no rule for one", site.Name)
	}
	r := *rule
	r.Overwrite = r.Overwrite || w.overwrite
	return placement.Choose(r, n.Hardware.Disks)
}

// imageFor is the slot image that a person named, or that of the site's stack
// version, for the node's architecture. Its files are here.
func (s *Server) imageFor(t store.Reader, site fleet.Site, n fleet.Node, id string) (ref fleet.ImageRef, err error) {
	arch := "amd64"
	images, err := t.Images(n.Tenant)
	if err != nil {
		return ref, err
	}
	for _, i := range images {
		if i.ID() == n.Image {
			arch = i.Arch
		}
	}
	if id == "" {
		want := site.Spec.StackRef()
		if want == nil {
			return ref, &enroll.Refused{Why: fmt.Sprintf("no image was named, and site %s has no stack", site.Name), Do: "--image NAME@VERSION, or: muster assign " + site.Name + " --stack NAME@VERSION"}
		}
		kept, err := t.StackVersion(n.Tenant, want.Name, want.Version)
		if err != nil {
			return ref, err
		}
		v, err := versionOf(kept)
		if err != nil {
			return ref, err
		}
		at := slices.IndexFunc(v.Images, func(i fleet.ImageRef) bool { return i.Arch == arch })
		if at < 0 {
			return ref, &enroll.Refused{Why: fmt.Sprintf("stack version %s has no image for %s", v.ID(), arch)}
		}
		id = v.Images[at].ID()
	}
	at := slices.IndexFunc(images, func(i fleet.Image) bool { return i.ID() == id && i.Arch == arch })
	if at < 0 {
		return ref, &errNoSuch{fmt.Sprintf("there is no image %.160q for %s in tenant %s", id, arch, n.Tenant), "`muster get images` lists them; muster image push sends one"}
	}
	lacks, err := s.imageLacks(t, images[at])
	if err != nil {
		return ref, err
	}
	if len(lacks) > 0 {
		return ref, &enroll.Refused{Why: strings.Join(lacks, "; ")}
	}
	i := images[at]
	return fleet.ImageRef{Name: i.Name, Version: i.Version, Arch: i.Arch, SHA256: i.SHA256}, nil
}

// ruled is who gives the orders that a site's rule calls for.
func ruled(tenant string) caller {
	return caller{Principal: access.Principal{Name: "install-rule", Tenant: tenant, Bindings: []access.Binding{{Tenant: tenant, Role: access.Operator}}}}
}

// installs orders the installation of all nodes of a site that its rule is
// for.
func (s *Server) installs(ctx context.Context, tenant, site string) {
	var waiting []fleet.NodeID
	err := s.store.View(ctx, func(t store.Reader) error {
		waiting = nil
		systems, err := t.SystemsOfSite(tenant, site)
		for _, r := range systems {
			if r.State == fleet.SystemRecovery {
				waiting = append(waiting, r.Node)
			}
		}
		return err
	})
	if err != nil {
		s.log.Error("install rule not looked at", logSite, site, logError, err)
	}
	for _, id := range waiting {
		s.installByRule(ctx, tenant, id)
	}
}

// refitted looks at the rule again when a machine came back with other disks:
// what waited for a person may be clear now.
func (s *Server) refitted(ctx context.Context, n fleet.Node) {
	if n.Admitted() {
		s.installs(ctx, n.Tenant, n.Site)
	}
}

// installByRule orders the installation of a node that runs the recovery
// image, if its site has a stack and a rule and the node was never told to
// install in this incarnation: what a person withdrew or a node refused is not
// ordered again by itself.
func (s *Server) installByRule(ctx context.Context, tenant string, id fleet.NodeID) {
	var site fleet.Site
	due := false
	err := s.store.View(ctx, func(t store.Reader) error {
		due = false
		n, err := t.Node(tenant, id)
		if err != nil || !n.Admitted() {
			return err
		}
		if site, err = t.Site(tenant, n.Site); err != nil {
			return err
		}
		if site.Spec.StackRef() == nil || site.Spec.Chosen().Install == nil {
			return nil
		}
		admission, _, err := admissionNow(t, n)
		if err != nil || admission == nil {
			return err
		}
		orders, err := t.Orders(tenant, site.Name, maxList)
		due = !slices.ContainsFunc(orders, func(o store.Order) bool {
			return o.Node == id && o.Kind == fleet.OrderInstall && !o.Issued.Before(admission.Issued)
		})
		return err
	})
	if err != nil || !due {
		if err != nil {
			s.log.Error("install rule not looked at", logNode, id, logError, err)
		}
		return
	}
	_, err = s.order(ctx, ruled(tenant), wish{kind: fleet.OrderInstall, node: string(id), site: site.Name, reason: "the site's rule for installing"})
	var refused *enroll.Refused
	switch {
	case errors.As(err, &refused):
		// Why it is so may be long, and is cut off at the end.
		words := fleet.Words(id)
		said := fmt.Sprintf("%s waits for a person, who names the disk (muster order install %s --disk serial=S --reason TEXT --yes): %s",
			words, id, strings.TrimPrefix(refused.Why, "no disk of "+words+" can be ordered: "))
		err = s.store.Update(ctx, func(t store.Tx) error {
			_, err := t.AddEvent(cleanEvent(fleet.Event{
				Tenant: tenant, Time: s.cfg.Now(), Level: fleet.EventWarning, Kind: "install.waits", Node: id, Site: site.Name,
				Text: said,
			}))
			return err
		})
		s.hub.changed(eventsTopic(tenant))
	}
	if err != nil {
		s.log.Error("install not ordered", logNode, id, logError, err)
	}
}
