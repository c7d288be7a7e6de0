package main

import (
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/muster-edge/muster/api"
	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/fleet"
)

// getCommand is `muster get KIND`: lists.
func getCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "get requests|nodes|sites|stacks|drift|orders|images",
		Short: "List what the centre knows",
		Args:  usageArgs(cobra.NoArgs, "want requests, nodes, sites, stacks, drift, orders or images"),
		RunE: func(*cobra.Command, []string) error {
			return exitError{2, fmt.Errorf("get what? Want requests, nodes, sites, stacks, drift, orders or images")}
		},
	}
	cmd.AddCommand(getRequestsCommand(), getNodesCommand(), getSitesCommand(), getStacksCommand(), getDriftCommand(), getOrdersCommand(), getImagesCommand())
	return cmd
}

// listing makes one list command.
func listing(use, short string, aliases []string, list func(*cobra.Command, *centre) (any, table, error)) *cobra.Command {
	var f format
	cmd := &cobra.Command{Use: use, Short: short, Aliases: aliases, Args: noArgs}
	a := accessFlags(cmd)
	formatFlag(cmd, &f)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		c, err := a.connect()
		if err != nil {
			return err
		}
		objects, t, err := list(cmd, c)
		if err != nil {
			return c.explain(err)
		}
		return f.write(cmd.OutOrStdout(), objects, t)
	}
	return cmd
}

// maxListed bounds what is printed: an attacker can file very many requests.
const maxListed = 100000

func getRequestsCommand() *cobra.Command {
	var state string
	cmd := listing("requests", "List enrollment requests: who waits for approval, and who was decided on", []string{"request"},
		func(cmd *cobra.Command, c *centre) (any, table, error) {
			requests := []fleet.Request{}
			q := &musterv1.ListRequestsRequest{State: state}
			out, err := c.ListRequests(cmd.Context(), q)
			for {
				if err != nil {
					return nil, table{}, err
				}
				page, err2 := requestsFrom(out.Requests)
				if err2 != nil {
					return nil, table{}, err2
				}
				requests = append(requests, page...)
				if !out.More || len(page) == 0 {
					break
				}
				if len(requests) >= maxListed {
					fmt.Fprintf(cmd.ErrOrStderr(), "only the first %d are listed; narrow it with --state\n", len(requests))
					break
				}
				q.After = string(page[len(page)-1].ID)
				out, err = c.ListRequests(cmd.Context(), q)
			}
			t := requestTable(requests)
			t.lab = out.Lab
			return requests, t, nil
		})
	cmd.Flags().StringVar(&state, "state", "", "only those that are pending, approved, issued, rejected, expired, superseded or quarantined")
	return cmd
}

func requestsFrom(in []*musterv1.Request) ([]fleet.Request, error) {
	out := make([]fleet.Request, 0, len(in))
	for _, m := range in {
		r, err := api.RequestFromProto(m)
		if err != nil {
			return nil, err
		}
		if r.Warnings == nil {
			r.Warnings = []string{}
		}
		out = append(out, r)
	}
	return out, nil
}

func requestTable(requests []fleet.Request) table {
	now := time.Now()
	t := table{
		columns: []string{"ID", "WORDS", "STATE", "IDENTITY", "BOOT", "SITE", "MACHINE", "AGE", "WARNINGS", "NODE", "IMAGE", "SERIAL", "SEEN", "SOURCE"},
		wide:    9, empty: "no requests",
	}
	for _, r := range requests {
		hw := r.Evidence.Hardware
		warnings := ""
		if n := len(r.Warnings); n > 0 {
			warnings = fmt.Sprint(n)
		}
		t.rows = append(t.rows, []string{
			string(r.ID), r.Words, r.State.String(), r.Identity.String(), r.Boot.String(), r.Site,
			strings.TrimSpace(hw.Vendor + " " + hw.Product), ago(now, r.FirstSeen), warnings,
			string(r.Node), r.Image, r.Evidence.Serial, ago(now, r.LastSeen), r.Source,
		})
		t.names = append(t.names, "request/"+string(r.ID))
	}
	return t
}

func getNodesCommand() *cobra.Command {
	return listing("nodes", "List nodes: machines whose request was approved", []string{"node"},
		func(cmd *cobra.Command, c *centre) (any, table, error) {
			now := time.Now()
			nodes := []fleet.Node{}
			t := table{
				columns: []string{"ID", "WORDS", "STATE", "IDENTITY", "BOOT", "SITE", "SEEN", "SYSTEM", "CERTIFICATE", "IMAGE", "REQUEST", "SOURCE"},
				wide:    9, empty: "no nodes",
			}
			for after := ""; ; {
				out, err := c.ListNodes(cmd.Context(), &musterv1.ListNodesRequest{After: after})
				if err != nil {
					return nil, table{}, err
				}
				t.lab = out.Lab
				for i, m := range out.Nodes {
					n, err := api.NodeFromProto(m)
					if err != nil {
						return nil, table{}, err
					}
					nodes = append(nodes, n)
					t.rows = append(t.rows, []string{
						string(n.ID), n.Words, n.State.String(), n.Identity.String(), n.Boot.String(), n.Site,
						ago(now, n.LastSeen), systemAt(out.Systems, i), certificateText(n.Certificate, now), n.Image, string(n.Request), n.Source,
					})
					t.names = append(t.names, "node/"+string(n.ID))
					after = string(n.ID)
				}
				if !out.More {
					return nodes, t, nil
				}
			}
		})
}

func systemAt(systems []*musterv1.SystemReport, i int) string {
	if i >= len(systems) {
		return ""
	}
	return systemText(systems[i])
}

func certificateText(c fleet.Certificate, now time.Time) string {
	switch {
	case c.Serial == "":
		return "none"
	case now.After(c.NotAfter):
		return "ended " + ago(now, c.NotAfter) + " ago"
	}
	return "for " + ago(c.NotAfter, now)
}

func getSitesCommand() *cobra.Command {
	return listing("sites", "List sites", []string{"site"},
		func(cmd *cobra.Command, c *centre) (any, table, error) {
			sites := []fleet.Site{}
			t := table{columns: []string{"NAME", "TITLE", "CLUSTER", "SERVERS", "WORKERS", "CHARTER", "REPORTED", "WAITS FOR", "AGE", "EPOCH", "FOUNDING", "STACK", "VERSION"}, wide: 8, empty: "no sites"}
			now := time.Now()
			for after := ""; ; {
				out, err := c.ListSites(cmd.Context(), &musterv1.ListSitesRequest{After: after})
				if err != nil {
					return nil, table{}, err
				}
				t.lab = out.Lab
				for _, m := range out.Sites {
					s, err := api.SiteFromProto(m)
					if err != nil {
						return nil, table{}, err
					}
					sites = append(sites, s)
					charter := ""
					if s.Spec.Charter != (fleet.DocVersion{}) {
						charter = s.Spec.Charter.String()
					}
					t.rows = append(t.rows, []string{
						s.Name, s.Title, s.Status.ClusterUID, fmt.Sprint(s.Status.Servers), fmt.Sprint(s.Status.Workers), charter, ago(now, s.Status.Seen), s.Status.Blocker,
						ago(now, s.Created), fmt.Sprint(s.Status.ClusterEpoch), string(s.Spec.Chosen().Founding.Mode), s.Spec.Stack, s.Spec.Version,
					})
					t.names = append(t.names, "site/"+s.Name)
					after = s.Name
				}
				if !out.More {
					return sites, t, nil
				}
			}
		})
}

func getImagesCommand() *cobra.Command {
	return listing("images", "List registered images: what a machine may run to count as measured", []string{"image"},
		func(cmd *cobra.Command, c *centre) (any, table, error) {
			out, err := c.ListImages(cmd.Context(), &musterv1.ListImagesRequest{})
			if err != nil {
				return nil, table{}, err
			}
			now := time.Now()
			images := []fleet.Image{}
			t := table{
				lab: out.Lab, columns: []string{"NAME", "VERSION", "KIND", "ARCH", "SIZE", "AGE", "SIGNED", "SHA256", "PCR11"},
				wide: 7, empty: "no images; `muster image register DIR` adds one",
			}
			for _, m := range out.Images {
				i, err := api.ImageFromProto(m)
				if err != nil {
					return nil, table{}, err
				}
				images = append(images, i)
				signed := "no"
				if len(i.SignerCert) > 0 {
					signed = i.SignerCert.String()[:12]
				}
				t.rows = append(t.rows, []string{
					i.Name, i.Version, string(i.Kind), i.Arch, fmt.Sprintf("%.1f MB", float64(i.Size)/1e6), ago(now, i.Registered),
					signed, i.SHA256.String(), i.PCR11.String(),
				})
				t.names = append(t.names, "image/"+i.ID())
			}
			return images, t, nil
		})
}
