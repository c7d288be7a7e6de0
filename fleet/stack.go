package fleet

import (
	"fmt"
	"time"
)

// Stack is a named line of immutable releases.
type Stack struct {
	Meta
	Title string `json:"title,omitempty"`
}

// Validate reports all problems of the stack.
func (s Stack) Validate() error {
	var p problems
	s.Meta.validate(&p, "stack")
	p.text("title", s.Title)
	return p.err("stack")
}

// StackVersion is one immutable release: operating system, k3s and add-ons.
// It is signed with the release key, which is never at the centre.
type StackVersion struct {
	// Format is StackVersionFormat.
	Format  string `json:"format"`
	Tenant  string `json:"tenant"`
	Stack   string `json:"stack"`
	Version string `json:"version"`
	// Images are the slot images, one per architecture.
	Images []ImageRef `json:"images"`
	// K3s is the k3s version in the images, e.g. "v1.36.3+k3s1".
	K3s string `json:"k3s"`
	// EtcdMinor is etcd's "3.6". A step that raises it is a point of no
	// return, since etcd does not go back.
	EtcdMinor string `json:"etcd_minor"`
	// CNI and CSI say what gives pods their network and their volumes: the
	// name of one of AddOns, or of a part that k3s brings along ("flannel",
	// "local-path"). Empty: what k3s brings along.
	CNI string `json:"cni,omitempty"`
	CSI string `json:"csi,omitempty"`
	// AddOns belong to every site that runs the version, Apps only to those
	// whose labels fit.
	AddOns  []AddOn   `json:"add_ons,omitempty"`
	Apps    []App     `json:"apps,omitempty"`
	Created time.Time `json:"created"`
}

// StackVersionFormat is the value of StackVersion.Format.
const StackVersionFormat = "muster/stack-version/v1"

// ID is how people name the version: "stack@version".
func (v StackVersion) ID() string { return v.Stack + "@" + v.Version }

// ImageRef names one image by its content: SHA256 is over its UKI.
type ImageRef struct {
	Name    string   `json:"name"`
	Version string   `json:"version"`
	Arch    string   `json:"arch"`
	SHA256  HexBytes `json:"sha256"`
}

// ID is how people name the image: "name@version".
func (i ImageRef) ID() string { return i.Name + "@" + i.Version }

// AddOn is a Helm chart that belongs to the stack.
type AddOn struct {
	Name    string `json:"name"`
	Version string `json:"version"`
	// SHA256 is over the packed chart (.tgz), which is a blob.
	SHA256 HexBytes `json:"sha256"`
	// Namespace it is installed in; empty: its own name.
	Namespace string `json:"namespace,omitempty"`
	// Values is YAML that the chart gets, at most MaxValues bytes.
	Values string `json:"values,omitempty"`
}

// App is a Helm chart for the sites whose labels are all those of Sites.
type App struct {
	AddOn
	Sites map[string]string `json:"sites,omitempty"`
}

// StackRef names a stack version by the content of its signed envelope.
type StackRef struct {
	Name    string `json:"name"`
	Version string `json:"version"`
	// SHA256 is over the envelope's bytes, which are a blob.
	SHA256 HexBytes `json:"sha256"`
}

// ID is how people name the version: "stack@version".
func (r StackRef) ID() string { return r.Name + "@" + r.Version }

func (r StackRef) validate(p *problems) {
	p.add(ValidateName("stack", r.Name))
	p.add(ValidateVersion(r.Version))
	p.sha256("sha256 of the stack version", r.SHA256, true)
}

const (
	maxImageRefs = 16
	maxAddOns    = 256
	// MaxValues bounds the values of one chart, in bytes; the whole version
	// must also fit MaxEnvelope.
	MaxValues = 16 << 10
)

// Validate reports all problems of the stack version.
func (v StackVersion) Validate() error {
	var p problems
	p.format(v.Format, StackVersionFormat)
	p.add(ValidateName("tenant", v.Tenant))
	p.add(ValidateName("stack", v.Stack))
	p.add(ValidateVersion(v.Version))
	p.check(len(v.Images) > 0 && len(v.Images) <= maxImageRefs, "%d images; want 1 to %d", len(v.Images), maxImageRefs)
	arches := map[string]bool{}
	for _, i := range head(v.Images, maxImageRefs) {
		i.validate(&p)
		p.check(!arches[i.Arch], "two images for architecture %q", clip(i.Arch, 80))
		arches[i.Arch] = true
	}
	p.add(ValidateVersion(v.K3s))
	p.check(etcdMinorForm.MatchString(v.EtcdMinor), "etcd minor %q: want MAJOR.MINOR", clip(v.EtcdMinor, 80))
	p.check(len(v.AddOns) <= maxAddOns, "%d add-ons, at most %d are allowed", len(v.AddOns), maxAddOns)
	p.check(len(v.Apps) <= maxAddOns, "%d apps, at most %d are allowed", len(v.Apps), maxAddOns)
	names := map[string]bool{}
	for _, a := range head(v.AddOns, maxAddOns) {
		a.validate(&p, "add-on", names)
	}
	for _, a := range head(v.Apps, maxAddOns) {
		a.validate(&p, "app", names)
		p.add(ValidateLabels(a.Sites))
	}
	for field, name := range map[string]string{"cni": v.CNI, "csi": v.CSI} {
		if name != "" {
			p.add(ValidateName(field, name))
		}
	}
	p.check(!v.Created.IsZero(), "created is not set")
	return p.err("stack version")
}

func (a AddOn) validate(p *problems, kind string, names map[string]bool) {
	p.add(ValidateName(kind, a.Name))
	p.add(ValidateVersion(a.Version))
	p.sha256(fmt.Sprintf("sha256 of %s %s", kind, clip(a.Name, 80)), a.SHA256, true)
	if a.Namespace != "" {
		p.add(ValidateName("namespace", a.Namespace))
	}
	p.check(len(a.Values) <= MaxValues, "values of %s %q have %d bytes, at most %d are allowed", kind, clip(a.Name, 80), len(a.Values), MaxValues)
	p.check(!names[a.Name], "%s %q is listed twice", kind, clip(a.Name, 80))
	names[a.Name] = true
}

func (i ImageRef) validate(p *problems) {
	p.add(ValidateName("image", i.Name))
	p.add(ValidateVersion(i.Version))
	p.check(i.Arch == "amd64" || i.Arch == "arm64", "architecture %q is neither amd64 nor arm64", clip(i.Arch, 80))
	p.sha256("sha256 of image "+clip(i.Name, 80), i.SHA256, true)
}
