package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"github.com/google/renameio/v2"
	"github.com/spf13/cobra"
	"sigs.k8s.io/yaml"

	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/statement"
)

const (
	// maxStackFile bounds what people write, maxChart one packed chart.
	maxStackFile = 1 << 20
	maxChart     = 64 << 20
)

// stackFile is a stack version as people write it. Images and charts are named
// by files, from which digests are taken.
type stackFile struct {
	Tenant    string       `json:"tenant"`
	Stack     string       `json:"stack"`
	Version   string       `json:"version"`
	Images    []stackImage `json:"images"`
	K3s       string       `json:"k3s"`
	EtcdMinor string       `json:"etcd_minor"`
	CNI       string       `json:"cni"`
	CSI       string       `json:"csi"`
	AddOns    []stackChart `json:"add_ons"`
	Apps      []stackChart `json:"apps"`
}

type stackImage struct {
	// Manifest is the signed manifest of a slot image.
	Manifest string `json:"manifest"`
}

type stackChart struct {
	Name    string `json:"name"`
	Version string `json:"version"`
	// Chart is the packed chart (.tgz), or SHA256 its digest.
	Chart     string            `json:"chart"`
	SHA256    fleet.HexBytes    `json:"sha256"`
	Namespace string            `json:"namespace"`
	Values    string            `json:"values"`
	Sites     map[string]string `json:"sites"`
}

func (s stackFile) version(dir string, created time.Time) (fleet.StackVersion, error) {
	v := fleet.StackVersion{
		Format: fleet.StackVersionFormat, Tenant: s.Tenant, Stack: s.Stack, Version: s.Version, K3s: s.K3s, EtcdMinor: s.EtcdMinor, CNI: s.CNI, CSI: s.CSI,
		Created: created.UTC().Truncate(time.Second),
	}
	if v.Tenant == "" {
		v.Tenant = "default"
	}
	var errs []error
	for _, i := range s.Images {
		_, m, err := readManifest(filepath.Join(dir, i.Manifest))
		if err != nil {
			errs = append(errs, err)
			continue
		}
		if m.Slot == nil {
			errs = append(errs, fmt.Errorf("%s is a %s image; a stack has slot images", i.Manifest, m.Kind))
			continue
		}
		// What the image says of itself holds; what is written must agree.
		for _, f := range []struct {
			name     string
			have     *string
			manifest string
		}{{"k3s", &v.K3s, m.Slot.K3s}, {"etcd_minor", &v.EtcdMinor, m.Slot.EtcdMinor}} {
			if *f.have == "" {
				*f.have = f.manifest
			}
			if f.manifest != "" && *f.have != f.manifest {
				errs = append(errs, fmt.Errorf("%s is %q, and image %s has %q", f.name, *f.have, i.Manifest, f.manifest))
			}
		}
		v.Images = append(v.Images, fleet.ImageRef{Name: m.Name, Version: m.Version, Arch: m.Arch, SHA256: m.SHA256[:]})
	}
	addOn := func(c stackChart) fleet.AddOn {
		if c.Chart != "" {
			b, err := readLimited(filepath.Join(dir, c.Chart), maxChart)
			if err != nil {
				errs = append(errs, err)
			}
			sum := sha256.Sum256(b)
			if len(c.SHA256) > 0 && !bytes.Equal(c.SHA256, sum[:]) {
				errs = append(errs, fmt.Errorf("chart %s has the digest %x, not %s", c.Chart, sum, c.SHA256))
			}
			c.SHA256 = sum[:]
		}
		return fleet.AddOn{Name: c.Name, Version: c.Version, SHA256: c.SHA256, Namespace: c.Namespace, Values: c.Values}
	}
	for _, c := range s.AddOns {
		if len(c.Sites) > 0 {
			errs = append(errs, fmt.Errorf("add-on %s is for some sites only: then it is an app", c.Name))
		}
		v.AddOns = append(v.AddOns, addOn(c))
	}
	for _, c := range s.Apps {
		v.Apps = append(v.Apps, fleet.App{AddOn: addOn(c), Sites: c.Sites})
	}
	return v, errors.Join(append(errs, v.Validate())...)
}

// releaseStackCommand is `muster release stack FILE --key KEY --out FILE`.
func releaseStackCommand() *cobra.Command {
	var key, out string
	cmd := &cobra.Command{
		Use:   "stack FILE --key FILE --out FILE",
		Short: "Sign a stack version: slot images, k3s, add-ons and apps as one release",
		Long: `FILE is YAML. It names slot images by their signed manifests and charts by their
packed files, relative to itself; their digests are taken from there:

  stack: shop
  version: "2027.1"
  images:
    - manifest: out/shop-2027.1-amd64.manifest
  add_ons:
    - {name: longhorn, version: 1.9.0, chart: charts/longhorn-1.9.0.tgz}
  apps:
    - {name: till, version: "4", chart: charts/till-4.tgz, sites: {kind: shop}}

The signed version goes to the centre with muster stack publish. It never
changes: a change is a new version.`,
		Args: oneArg("sign which stack version? Give its YAML file"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if key == "" || out == "" {
				return exitError{2, errors.New("want --key FILE (the release key) and --out FILE")}
			}
			signer, err := readSigner("--key", key)
			if err != nil {
				return err
			}
			b, err := readLimited(args[0], maxStackFile)
			if err != nil {
				return err
			}
			var s stackFile
			if err := yaml.UnmarshalStrict(b, &s); err != nil {
				return exitError{2, fmt.Errorf("%s: %w", args[0], err)}
			}
			v, err := s.version(filepath.Dir(args[0]), time.Now())
			if err != nil {
				return exitError{2, fmt.Errorf("%s: %w", args[0], err)}
			}
			payload, err := json.Marshal(v)
			if err != nil {
				return err
			}
			env, err := statement.Sign(fleet.StackVersionPayload, payload, signer)
			if err != nil {
				return err
			}
			envelope := env.JSON()
			if len(envelope) > fleet.MaxEnvelope {
				return fmt.Errorf("the signed version has %d bytes, and nodes keep at most %d: shorten the values of its charts", len(envelope), fleet.MaxEnvelope)
			}
			if err := renameio.WriteFile(out, envelope, 0o644); err != nil {
				return fmt.Errorf("write stack version: %w", err)
			}
			sum := sha256.Sum256(envelope)
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "stack version %s signed: %s\nsha256 %x\n", v.ID(), out, sum)
			return err
		},
	}
	cmd.Flags().StringVar(&key, "key", "", "PEM file with the release key")
	cmd.Flags().StringVar(&out, "out", "", "file for the signed version")
	return cmd
}

// stackCommand is `muster stack publish`.
func stackCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "stack", Short: "Publish what sites can run"}
	cmd.AddCommand(stackPublishCommand())
	return cmd
}

// publishedVersion is a stack version as -o json shows it.
type publishedVersion struct {
	Stack     string         `json:"stack"`
	Version   string         `json:"version"`
	SHA256    fleet.HexBytes `json:"sha256"`
	K3s       string         `json:"k3s"`
	EtcdMinor string         `json:"etcd_minor"`
	Images    []string       `json:"images"`
	Charts    []string       `json:"charts,omitempty"`
	Published time.Time      `json:"published"`
	By        string         `json:"by"`
	KeyID     string         `json:"key_id"`
	// Sites is how many sites shall run it.
	Sites    uint32   `json:"sites"`
	Created  bool     `json:"created,omitempty"`
	Warnings []string `json:"warnings,omitempty"`
}

func publishedOf(m *musterv1.PublishedVersion) publishedVersion {
	v := m.GetVersion()
	out := publishedVersion{
		Stack: v.GetStack(), Version: v.GetVersion(), SHA256: m.GetSha256(), K3s: v.GetK3S(), EtcdMinor: v.GetEtcdMinor(), Images: []string{},
		Published: m.GetPublished().AsTime(), By: m.GetBy(), KeyID: m.GetKeyId(),
	}
	for _, i := range v.GetImages() {
		out.Images = append(out.Images, fmt.Sprintf("%s@%s (%s)", i.GetName(), i.GetVersion(), i.GetArch()))
	}
	for _, a := range v.GetAddOns() {
		out.Charts = append(out.Charts, a.GetName()+" "+a.GetVersion())
	}
	for _, a := range v.GetApps() {
		where := labels(a.GetSites())
		if where == "" {
			where = "all sites"
		}
		out.Charts = append(out.Charts, fmt.Sprintf("%s %s (%s)", a.GetChart().GetName(), a.GetChart().GetVersion(), where))
	}
	return out
}

func stackPublishCommand() *cobra.Command {
	var (
		charts, reason string
		f              format
	)
	cmd := &cobra.Command{
		Use:   "publish FILE [--charts DIR]",
		Short: "Send a signed stack version to the centre",
		Long: `FILE is what muster release stack wrote. The centre takes it if a release key that
the tenant trusts has signed it. --charts sends the packed charts of a folder
first; images are sent with muster image push.`,
		Args: oneArg("publish which stack version? Give the file that `muster release stack` wrote"),
	}
	a := accessFlags(cmd)
	formatFlag(cmd, &f)
	cmd.Flags().StringVar(&charts, "charts", "", "folder with the packed charts (.tgz) of the version")
	cmd.Flags().StringVar(&reason, "reason", "", "for the audit log")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		envelope, err := readLimited(args[0], fleet.MaxEnvelope)
		if err != nil {
			return err
		}
		c, err := a.connect()
		if err != nil {
			return err
		}
		if charts != "" {
			if err := c.pushCharts(cmd, charts); err != nil {
				return err
			}
		}
		out, err := c.PublishStackVersion(cmd.Context(), &musterv1.PublishStackVersionRequest{Envelope: envelope, Reason: reason})
		if err != nil {
			return c.explain(err)
		}
		v := publishedOf(out.Version)
		v.Created, v.Warnings = out.Created, out.Warnings
		if f != "table" && f != "wide" {
			return f.write(cmd.OutOrStdout(), v, table{names: []string{"stack/" + v.Stack + "@" + v.Version}})
		}
		verb := "is published"
		if !v.Created {
			verb = "was published before; nothing changed"
		}
		fmt.Fprintf(cmd.OutOrStdout(), "stack version %s@%s %s\n", v.Stack, v.Version, verb)
		for _, w := range v.Warnings {
			fmt.Fprintf(cmd.ErrOrStderr(), "  note: %s\n", cell(w))
		}
		return nil
	}
	return cmd
}

func (c *centre) pushCharts(cmd *cobra.Command, dir string) error {
	names, err := filepath.Glob(filepath.Join(dir, "*.tgz"))
	if err != nil {
		return err
	}
	if len(names) == 0 {
		return exitError{2, fmt.Errorf("there is no packed chart (.tgz) in %s", dir)}
	}
	for _, name := range names {
		size, sum, err := hashFile(name)
		if err != nil {
			return err
		}
		if _, err := c.pushFile(cmd, name, hex.EncodeToString(sum[:]), size); err != nil {
			return err
		}
	}
	return nil
}

func getStacksCommand() *cobra.Command {
	return listing("stacks", "List stacks and their versions: what sites can run", []string{"stack"},
		func(cmd *cobra.Command, c *centre) (any, table, error) {
			out, err := c.ListStacks(cmd.Context(), &musterv1.ListStacksRequest{})
			if err != nil {
				return nil, table{}, err
			}
			now := time.Now()
			list := []publishedVersion{}
			t := table{
				lab: out.Lab, columns: []string{"STACK", "VERSION", "K3S", "ETCD", "IMAGES", "SITES", "AGE", "BY", "CHARTS", "SHA256"}, wide: 7,
				empty: "no stacks; `muster stack publish` adds one",
			}
			for _, k := range out.Stacks {
				for _, m := range k.Versions {
					v := publishedOf(m)
					v.Sites = k.Sites[v.Version]
					list = append(list, v)
					t.rows = append(t.rows, []string{
						v.Stack, v.Version, v.K3s, v.EtcdMinor, strings.Join(v.Images, " "), fmt.Sprint(v.Sites), ago(now, v.Published), v.By, strings.Join(v.Charts, ", "), v.SHA256.String(),
					})
					t.names = append(t.names, "stack/"+v.Stack+"@"+v.Version)
				}
			}
			return list, t, nil
		})
}

// describeStack shows a stack with its versions.
func describeStack(cmd *cobra.Command, c *centre, f format, id string) error {
	name, version, one := strings.Cut(id, "@")
	out, err := c.GetStack(cmd.Context(), &musterv1.GetStackRequest{Name: name})
	if err != nil {
		return err
	}
	list := []publishedVersion{}
	for _, m := range out.Stack.Versions {
		v := publishedOf(m)
		v.Sites = out.Stack.Sites[v.Version]
		if !one || v.Version == version {
			list = append(list, v)
		}
	}
	if one && len(list) == 0 {
		return fmt.Errorf("stack %s has no version %s; `muster get stacks` lists them", cell(name), cell(version))
	}
	if f != "table" && f != "wide" {
		return f.write(cmd.OutOrStdout(), list, table{names: []string{"stack/" + id}})
	}
	w := cmd.OutOrStdout()
	if out.Lab {
		fmt.Fprintln(w, labBanner)
	}
	s := sheet{w}
	s.line("Stack", name)
	s.line("Labels", labels(out.Stack.Stack.GetMeta().GetLabels()))
	for _, v := range list {
		fmt.Fprintln(w)
		s.line("Version", v.Version)
		s.line("k3s", v.K3s)
		s.line("etcd", v.EtcdMinor)
		s.list("Images", v.Images)
		s.list("Charts", v.Charts)
		s.line("Sites", fmt.Sprintf("%d shall run it", v.Sites))
		s.line("Published", stamp(v.Published)+" by "+v.By)
		s.line("Signed by", v.KeyID)
		s.line("SHA-256", v.SHA256.String())
	}
	return nil
}

// siteDrift is how a site compares, as -o json shows it.
type siteDrift struct {
	Site      string      `json:"site"`
	Desired   string      `json:"desired"`
	State     string      `json:"state"`
	Why       string      `json:"why,omitempty"`
	Nodes     uint32      `json:"nodes"`
	Current   uint32      `json:"nodes_current"`
	Stale     bool        `json:"stale,omitempty"`
	LastHeard time.Time   `json:"last_heard,omitzero"`
	Outliers  []nodeDrift `json:"outliers,omitempty"`
}

type nodeDrift struct {
	Node      string            `json:"node"`
	Words     string            `json:"words"`
	Running   string            `json:"running,omitempty"`
	State     fleet.SystemState `json:"state"`
	Percent   uint32            `json:"percent,omitempty"`
	Stale     bool              `json:"stale,omitempty"`
	LastHeard time.Time         `json:"last_heard,omitzero"`
	Why       string            `json:"why"`
}

func siteDriftOf(m *musterv1.SiteDrift) siteDrift {
	d := siteDrift{Site: m.GetSite(), Desired: m.GetDesired(), State: m.GetState(), Why: m.GetWhy(), Nodes: m.GetNodes(), Current: m.GetNodesCurrent(), Stale: m.GetStale()}
	if m.GetLastHeard() != nil {
		d.LastHeard = m.GetLastHeard().AsTime()
	}
	for _, n := range m.GetOutliers() {
		o := nodeDrift{Node: n.GetNode(), Words: n.GetWords(), Running: n.GetRunning(), State: fleet.SystemState(n.GetState()), Percent: n.GetPercent(), Stale: n.GetStale(), Why: n.GetWhy()}
		if n.GetLastHeard() != nil {
			o.LastHeard = n.GetLastHeard().AsTime()
		}
		d.Outliers = append(d.Outliers, o)
	}
	return d
}

func getDriftCommand() *cobra.Command {
	var (
		selector map[string]string
		stack    string
		all      bool
		f        format
	)
	cmd := &cobra.Command{
		Use:   "drift",
		Short: "Say which sites do not run what they shall, and why",
		Long: `Compares what sites shall run with what their nodes last said. What is older
than three reports is marked "last known": a site out of reach waits, and it
has not failed.`,
		Args: noArgs,
	}
	a := accessFlags(cmd)
	formatFlag(cmd, &f)
	cmd.Flags().StringToStringVarP(&selector, "selector", "l", nil, "only sites with these labels (KEY=VALUE)")
	cmd.Flags().StringVar(&stack, "stack", "", "only sites that shall run this stack")
	cmd.Flags().BoolVar(&all, "all", false, "list the sites that are current too")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		c, err := a.connect()
		if err != nil {
			return err
		}
		out, err := c.GetDrift(cmd.Context(), &musterv1.GetDriftRequest{Labels: selector, Stack: stack, All: all})
		if err != nil {
			return c.explain(err)
		}
		now := out.Now.AsTime()
		list := []siteDrift{}
		t := table{lab: out.Lab, columns: []string{"SITE", "SHALL RUN", "STATE", "NODES", "HEARD", "WHY"}, empty: out.Summary}
		for _, m := range out.Outliers {
			d := siteDriftOf(m)
			list = append(list, d)
			heard := ago(now, d.LastHeard)
			if d.Stale {
				heard = "last known " + heard
			}
			t.rows = append(t.rows, []string{d.Site, d.Desired, d.State, fmt.Sprintf("%d/%d", d.Current, d.Nodes), heard, d.Why})
			t.names = append(t.names, "site/"+d.Site)
		}
		if f == "table" || f == "wide" {
			if len(t.rows) > 0 {
				fmt.Fprintln(cmd.OutOrStdout(), out.Summary)
			}
			return f.write(cmd.OutOrStdout(), list, t)
		}
		return f.write(cmd.OutOrStdout(), struct {
			Summary    string      `json:"summary"`
			Sites      uint32      `json:"sites"`
			Current    uint32      `json:"sites_current"`
			Unassigned uint32      `json:"unassigned"`
			Outliers   []siteDrift `json:"outliers"`
		}{out.Summary, out.Sites, out.SitesCurrent, out.Unassigned, list}, t)
	}
	return cmd
}

// assignStack is `muster assign SITE... --stack NAME@VERSION`.
func assignStack(cmd *cobra.Command, a *access, f format, q *musterv1.AssignStackRequest, stack string) error {
	if stack != "none" {
		name, version, found := strings.Cut(stack, "@")
		if !found || name == "" || version == "" {
			return exitError{2, fmt.Errorf("--stack %q: want NAME@VERSION, or none; `muster get stacks` lists them", stack)}
		}
		q.Stack, q.Version = name, version
	}
	c, err := a.connect()
	if err != nil {
		return err
	}
	out, err := c.AssignStack(cmd.Context(), q)
	if err != nil {
		return c.explain(err)
	}
	type assigned struct {
		Site       string `json:"site"`
		Before     string `json:"before,omitempty"`
		After      string `json:"after,omitempty"`
		Changed    bool   `json:"changed"`
		Generation int64  `json:"generation"`
		Charter    string `json:"charter,omitempty"`
		Refused    string `json:"refused,omitempty"`
	}
	list := []assigned{}
	t := table{columns: []string{"SITE", "BEFORE", "AFTER", "OUTCOME"}, empty: "no sites"}
	refused := 0
	for _, m := range out.Sites {
		s := assigned{Site: m.Site.Meta.Name, Before: m.Before, Changed: m.Changed, Refused: m.Refused, Generation: m.Site.Meta.Generation}
		if m.Site.Spec.Stack != "" {
			s.After = m.Site.Spec.Stack + "@" + m.Site.Spec.Version
		}
		if v := m.Site.Spec.Charter; v != nil {
			s.Charter = fmt.Sprintf("%d.%d", v.Epoch, v.N)
		}
		outcome := "unchanged"
		switch {
		case s.Refused != "":
			refused++
			outcome = s.Refused
		case s.Changed && q.DryRun:
			outcome = "would change"
		case s.Changed:
			outcome = "changed"
		}
		list = append(list, s)
		t.rows = append(t.rows, []string{s.Site, s.Before, s.After, outcome})
		t.names = append(t.names, "site/"+s.Site)
	}
	if err := f.write(cmd.OutOrStdout(), list, t); err != nil {
		return err
	}
	if refused > 0 {
		return fmt.Errorf("%s left as %s", count(refused, "site was", "sites were"), map[bool]string{true: "it was", false: "they were"}[refused == 1])
	}
	return nil
}

// systemLines adds what a node said of its system to its description.
func systemLines(s sheet, now time.Time, out *musterv1.GetNodeResponse) {
	if d := out.GetDesired(); d != nil {
		s.line("Shall run", d.GetName()+"@"+d.GetVersion())
	}
	r := out.GetSystem()
	if r == nil {
		return
	}
	s.line("System", systemText(r))
	s.line("  Image", r.GetImage())
	s.line("  Goes to", r.GetTarget())
	s.line("  Reason", r.GetReason())
	heard := ago(now, r.GetAt().AsTime()) + " ago"
	if age := now.Sub(r.GetAt().AsTime()); age > time.Duration(out.GetStaleAfterSeconds())*time.Second {
		heard = "last changed " + heard
	}
	s.line("  Said so", heard)
	for _, f := range r.GetFailed() {
		s.line("  Failed here", fmt.Sprintf("%s %s", f.GetImage(), f.GetReason()))
	}
	s.list("Warnings", r.GetWarnings())
	for _, o := range out.GetOrders() {
		i := issuedOrderOf(o)
		s.line("Order", fmt.Sprintf("%s %s: %s %s", i.ID, i.Kind, i.State, i.Text))
	}
}

// systemText is a system in a few words.
func systemText(r *musterv1.SystemReport) string {
	if r == nil || r.GetAt() == nil {
		return ""
	}
	text := fleet.SystemState(r.GetState()).String()
	if p := r.GetPercent(); p > 0 && p < 100 {
		text += fmt.Sprintf(" %d %%", p)
	}
	if r.GetSlot() == fleet.SlotA || r.GetSlot() == fleet.SlotB {
		text += " (slot " + r.GetSlot() + ")"
	}
	return text
}
