package main

import (
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"github.com/muster-edge/muster/api"
	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/statement"
)

// siteCommand is `muster site set|confirm`.
func siteCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "site", Short: "Say how a site founds its cluster, grows and heals"}
	cmd.AddCommand(siteSetCommand(), siteConfirmCommand())
	return cmd
}

// siteFlags are the settings of a site as flags; those that were not given
// change nothing.
type siteFlags struct {
	founding, founder, delegates      string
	successors, images, disable       []string
	servers, promoteAt, maxLearners   int
	promoteAfter, replaceAfter        time.Duration
	anyBoot, secrets                  bool
	flannel, clusterCIDR, serviceCIDR string
	clusterDNS, nodeCIDR              string
	title, location, reason           string
	install                           string
	windows                           []string
	paused, drainForce                bool
	drainTimeout                      time.Duration
	rateKbit                          int64
}

func (s *siteFlags) add(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&s.founding, "founding", "", "who starts the cluster: central (the centre grants it once), named (--founder), first (whoever is there first, for sites that never see the centre)")
	f.StringVar(&s.founder, "founder", "", "with --founding named: the node that founds")
	f.StringSliceVar(&s.successors, "successor", nil, "with --founding named: who may be ordered to found instead, in this order")
	f.IntVar(&s.servers, "servers", 3, "wanted k3s servers: 1 or 3")
	f.IntVar(&s.promoteAt, "promote-at", 3, "ready nodes at which workers become servers")
	f.DurationVar(&s.promoteAfter, "promote-after", time.Minute, "how long they must have been ready before")
	f.DurationVar(&s.replaceAfter, "replace-after", 24*time.Hour, "a server that is away so long is replaced; 0: never")
	f.StringSliceVar(&s.images, "image", nil, "only these images (NAME@VERSION) may join; default: all registered ones; \"all\" takes a choice back")
	f.BoolVar(&s.anyBoot, "any-boot", false, "machines that run anything may join (lab tenants only)")
	f.StringVar(&s.flannel, "flannel-backend", "wireguard-native", "at birth: wireguard-native, vxlan, host-gw or none")
	f.StringSliceVar(&s.disable, "disable", nil, "at birth: parts of k3s to leave out, such as traefik; \"none\" for nothing")
	f.IntVar(&s.maxLearners, "max-learners", 2, "at birth: 2 promotes both candidates at once, 1 one after the other")
	f.StringVar(&s.clusterCIDR, "cluster-cidr", "10.42.0.0/16", "at birth: network of the pods")
	f.StringVar(&s.serviceCIDR, "service-cidr", "10.43.0.0/16", "at birth: network of the services")
	f.StringVar(&s.clusterDNS, "cluster-dns", "10.43.0.10", "at birth: address of the cluster's DNS, inside the service network")
	f.StringVar(&s.nodeCIDR, "node-cidr", "100.96.0.0/16", "at birth: network of the nodes' in-site addresses; \"none\": their LAN addresses, which then must never change")
	f.BoolVar(&s.secrets, "secrets-encryption", true, "at birth: Secrets are encrypted in the datastore")
	f.StringVar(&s.delegates, "delegates", "", "file with public keys (PEM) that may admit and remove nodes beside the centre; \"none\" takes them back")
	f.StringVar(&s.install, "install", "", "which disk the centre orders installed when a node comes and the site has a stack: only, smallest, largest or nvme-first, with conditions after commas: model=PM9*, transport=nvme, min=BYTES, max=BYTES, overwrite; \"none\": a person orders it")
	f.StringArrayVar(&s.windows, "update-window", nil, "when nodes may restart into another version: \"[mon,tue ]HH:MM MINUTES [UTC+OFFSET_MINUTES]\"; may be repeated; \"always\" takes all back")
	f.BoolVar(&s.paused, "update-paused", false, "no node restarts into another version")
	f.DurationVar(&s.drainTimeout, "drain-timeout", 5*time.Minute, "how long pods may take to leave a node before it restarts")
	f.BoolVar(&s.drainForce, "drain-force", false, "restart although pods did not leave in time")
	f.Int64Var(&s.rateKbit, "rate-kbit", 0, "most that one node takes from the centre, in kbit/s; 0: no bound")
	f.StringVar(&s.title, "title", "", "a name for people")
	f.StringVar(&s.location, "location", "", "where it is")
	f.StringVar(&s.reason, "reason", "", "for the audit log")
}

// apply changes what was given on the command line.
func (s *siteFlags) apply(cmd *cobra.Command, site *fleet.Site, set *fleet.SiteSettings, node func(string) (fleet.NodeID, error)) error {
	var errs []error
	given := cmd.Flags().Changed
	errs = append(errs, s.applySystem(given, set))
	if given("founding") {
		set.Founding = fleet.Founding{Mode: fleet.FoundingMode(s.founding)}
	}
	if given("founder") {
		id, err := node(s.founder)
		errs = append(errs, err)
		set.Founding.Founder = id
	}
	if given("successor") {
		set.Founding.Successors = nil
		for _, x := range s.successors {
			id, err := node(x)
			errs = append(errs, err)
			set.Founding.Successors = append(set.Founding.Successors, id)
		}
	}
	for name, do := range map[string]func(){
		"servers":       func() { set.Policy.Servers = s.servers },
		"promote-at":    func() { set.Policy.PromoteAt = s.promoteAt },
		"promote-after": func() { set.Policy.PromoteAfter = int64(s.promoteAfter / time.Second) },
		"replace-after": func() { set.Policy.ReplaceAfter = int64(s.replaceAfter / time.Second) },
		"any-boot":      func() { set.AnyBoot = s.anyBoot },
		"image": func() {
			if set.Images = s.images; len(s.images) == 1 && s.images[0] == "all" {
				set.Images = nil
			}
		},
		"flannel-backend": func() { set.Birth.FlannelBackend = s.flannel },
		"disable": func() {
			if set.Birth.Disable = s.disable; len(s.disable) == 1 && s.disable[0] == "none" {
				set.Birth.Disable = nil
			}
		},
		"max-learners": func() { set.Birth.MaxLearners = s.maxLearners },
		"cluster-cidr": func() { set.Birth.ClusterCIDR = s.clusterCIDR },
		"service-cidr": func() { set.Birth.ServiceCIDR = s.serviceCIDR },
		"cluster-dns":  func() { set.Birth.ClusterDNS = s.clusterDNS },
		"node-cidr": func() {
			if set.Birth.NodeCIDR = s.nodeCIDR; s.nodeCIDR == "none" {
				set.Birth.NodeCIDR = ""
			}
		},
		"secrets-encryption": func() { set.Birth.SecretsEncryption = s.secrets },
		"title":              func() { site.Title = s.title },
		"location":           func() { site.Location = s.location },
		"delegates": func() {
			keys, err := readDelegates(s.delegates)
			errs = append(errs, err)
			set.Delegates = keys
		},
	} {
		if given(name) {
			do()
		}
	}
	// One server needs no three nodes to wait for.
	if given("servers") && !given("promote-at") && s.servers == 1 {
		set.Policy.PromoteAt = max(1, min(set.Policy.PromoteAt, 3))
	}
	return errors.Join(errs...)
}

func readDelegates(file string) (out [][]byte, err error) {
	if file == "none" {
		return nil, nil
	}
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, exitError{3, fmt.Errorf("read delegates: %w", err)}
	}
	keys, err := statement.ParseKeys(text)
	if err != nil {
		return nil, exitError{2, fmt.Errorf("%s: %w", file, err)}
	}
	for _, k := range keys {
		der, err := x509.MarshalPKIXPublicKey(k)
		if err != nil {
			return nil, err
		}
		out = append(out, der)
	}
	return out, nil
}

// delegateNames shows keys as people compare them.
func delegateNames(keys [][]byte) (out []string) {
	for _, der := range keys {
		key, err := x509.ParsePKIXPublicKey(der)
		if err != nil {
			continue
		}
		if id, err := statement.KeyID(key); err == nil {
			out = append(out, id)
		}
	}
	return out
}

// nodeNamed finds a node by ID, beginning or words. A whole ID need not be
// known yet: a site may be planned before its machines call.
func nodeNamed(cmd *cobra.Command, c *centre) func(string) (fleet.NodeID, error) {
	return func(s string) (fleet.NodeID, error) {
		if id := fleet.NodeID(s); id.Validate() == nil {
			return id, nil
		}
		out, err := c.GetNode(cmd.Context(), &musterv1.GetNodeRequest{Id: s})
		if err != nil {
			return "", c.explain(err)
		}
		return fleet.NodeID(out.Node.GetId()), nil
	}
}

// siteSetCommand is `muster site set NAME`.
func siteSetCommand() *cobra.Command {
	var (
		s siteFlags
		f format
	)
	cmd := &cobra.Command{
		Use:   "set NAME",
		Short: "Make a site, or change how it founds, grows and heals",
		Long: `What is not given stays as it is. The site's nodes get a new charter, signed by
the centre, with the next report they make.

What holds "at birth" is fixed once a cluster of the site is known, or the right
to found one was given.`,
		Example: `  muster site set shop-7 --title 'Main street 7'
  muster site set ship-3 --founding named --founder "amber canoe" --successor "quiet lamp"
  muster site set kiosk --servers 1`,
		Args: oneArg("which site? `muster get sites` lists them"),
	}
	a := accessFlags(cmd)
	formatFlag(cmd, &f)
	s.add(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		c, err := a.connect()
		if err != nil {
			return err
		}
		site := fleet.Site{Meta: fleet.Meta{Name: args[0]}}
		create := false
		old, err := c.GetSite(cmd.Context(), &musterv1.GetSiteRequest{Name: args[0]})
		switch {
		case connect.CodeOf(err) == connect.CodeNotFound:
			create = true
		case err != nil:
			return c.explain(err)
		default:
			if site, err = api.SiteFromProto(old.Site); err != nil {
				return err
			}
		}
		set := site.Spec.Chosen()
		if err := s.apply(cmd, &site, &set, nodeNamed(cmd, c)); err != nil {
			return err
		}
		out, err := c.SetSite(cmd.Context(), &musterv1.SetSiteRequest{
			Name: args[0], Generation: site.Generation, Settings: api.SettingsToProto(set), Title: site.Title, Location: site.Location,
			Create: create, Reason: s.reason,
		})
		if err != nil {
			return c.explain(err)
		}
		return writeSiteSet(cmd, f, out)
	}
	return cmd
}

func writeSiteSet(cmd *cobra.Command, f format, out *musterv1.SetSiteResponse) error {
	site, err := api.SiteFromProto(out.Site)
	if err != nil {
		return err
	}
	if f != "table" && f != "wide" {
		return f.write(cmd.OutOrStdout(), struct {
			fleet.Site
			Changed bool `json:"changed"`
		}{site, out.Changed}, table{names: []string{"site/" + site.Name}})
	}
	w := cmd.OutOrStdout()
	switch {
	case !out.Changed:
		fmt.Fprintf(w, "site %s is as wanted already\n", site.Name)
	case out.Created:
		fmt.Fprintf(w, "site %s was made\n", site.Name)
	default:
		fmt.Fprintf(w, "site %s was changed\n", site.Name)
	}
	switch {
	case out.WhyNoCharter != "":
		fmt.Fprintf(cmd.ErrOrStderr(), "no charter can be signed yet: %s\n", cell(out.WhyNoCharter))
	case out.Changed:
		fmt.Fprintf(w, "its charter is %s\n", site.Spec.Charter)
	}
	return nil
}

// siteConfirmCommand is `muster site confirm NAME`.
func siteConfirmCommand() *cobra.Command {
	var (
		reason string
		yes    bool
		f      format
	)
	cmd := &cobra.Command{
		Use:   "confirm NAME --reason TEXT --yes",
		Short: "After a restored backup: say that you looked, and the site has no cluster yet",
		Long: `A centre that was restored from a backup may have forgotten to whom it gave the
right to found a site's cluster. Until a node shows the cluster, it gives none
again. Look at the site (on a node: muster-node status): if a cluster is there,
do nothing, the node will show it. If there is none, confirm it.`,
		Args: oneArg("which site? `muster get sites` lists them"),
	}
	a := accessFlags(cmd)
	formatFlag(cmd, &f)
	cmd.Flags().StringVar(&reason, "reason", "", "how you know; for the audit log")
	cmd.Flags().BoolVar(&yes, "yes", false, "do it")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if strings.TrimSpace(reason) == "" {
			return exitError{2, errors.New("--reason TEXT is missing: the audit log keeps how you know")}
		}
		if err := agreed(cmd, yes, fmt.Sprintf("The centre may grant the founding of a cluster at site %s, as if it had never done so.", args[0]), nil); err != nil {
			return err
		}
		c, err := a.connect()
		if err != nil {
			return err
		}
		out, err := c.ConfirmSite(cmd.Context(), &musterv1.ConfirmSiteRequest{Name: args[0], Reason: reason})
		if err != nil {
			return c.explain(err)
		}
		site, err := api.SiteFromProto(out.Site)
		if err != nil {
			return err
		}
		if f == "table" || f == "wide" {
			fmt.Fprintf(cmd.OutOrStdout(), "site %s is confirmed\n", site.Name)
			return nil
		}
		return f.write(cmd.OutOrStdout(), site, table{names: []string{"site/" + site.Name}})
	}
	return cmd
}

// agreed says in a sentence what will be done and wants --yes. Who says no
// has changed nothing.
func agreed(cmd *cobra.Command, yes bool, sentence string, warnings []string) error {
	w := cmd.ErrOrStderr()
	fmt.Fprintln(w, cell(sentence))
	for _, x := range warnings {
		fmt.Fprintf(w, "  note: %s\n", cell(x))
	}
	if !yes {
		return exitError{2, errors.New("nothing was done; repeat it with --yes to do it")}
	}
	return nil
}
