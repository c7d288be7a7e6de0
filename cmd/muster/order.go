package main

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/fleet"
)

// issuedOrder is an order as -o json shows it.
type issuedOrder struct {
	ID       string           `json:"id"`
	Kind     fleet.OrderKind  `json:"kind"`
	Site     string           `json:"site"`
	Node     fleet.NodeID     `json:"node"`
	State    fleet.OrderState `json:"state"`
	Text     string           `json:"text,omitempty"`
	Cluster  string           `json:"cluster,omitempty"`
	Epoch    uint64           `json:"epoch,omitempty"`
	Into     string           `json:"into,omitempty"`
	Snapshot string           `json:"snapshot,omitempty"`
	// Disk and Image are the exact targets; Digest the image that
	// clear-failed forgets.
	Disk     *fleet.DiskTarget `json:"disk,omitempty"`
	Image    *fleet.ImageRef   `json:"image,omitempty"`
	Digest   fleet.HexBytes    `json:"digest,omitempty"`
	KeepData bool              `json:"keep_data,omitempty"`
	Reason   string            `json:"reason,omitempty"`
	By       string            `json:"by"`
	Version  string            `json:"version"`
	Issued   time.Time         `json:"issued"`
	NotAfter time.Time         `json:"not_after"`
	Changed  time.Time         `json:"changed"`
	// Sentence says what it does; only where the order was just given.
	Sentence string   `json:"sentence,omitempty"`
	Warnings []string `json:"warnings,omitempty"`
}

func issuedOrderOf(m *musterv1.IssuedOrder) issuedOrder {
	o := m.GetOrder()
	out := issuedOrder{
		ID: o.GetId(), Kind: fleet.OrderKind(o.GetKind()), Site: o.GetSite(), Node: fleet.NodeID(o.GetNode()), State: fleet.OrderState(m.GetState()),
		Text: m.GetText(), Cluster: o.GetCluster(), Epoch: o.GetEpoch(), Into: o.GetInto(), Snapshot: o.GetSnapshot(), Reason: o.GetReason(),
		By: m.GetBy(), Version: fmt.Sprintf("%d.%d", o.GetVersion().GetEpoch(), o.GetVersion().GetN()), Issued: o.GetIssued().AsTime(),
		NotAfter: o.GetNotAfter().AsTime(), Changed: m.GetChanged().AsTime(),
		Digest: o.GetDigest(), KeepData: o.GetKeepData(),
	}
	if d := o.GetDisk(); d != nil {
		out.Disk = &fleet.DiskTarget{Serial: d.GetSerial(), WWN: d.GetWwn(), Model: d.GetModel(), SizeBytes: d.GetSizeBytes()}
	}
	if i := o.GetImage(); i != nil {
		out.Image = &fleet.ImageRef{Name: i.GetName(), Version: i.GetVersion(), Arch: i.GetArch(), SHA256: i.GetSha256()}
	}
	return out
}

// onSystem are the kinds that are about a node's own operating system; its
// site need not be named.
var onSystem = map[string]bool{"install": true, "wipe": true, "recover": true, "downgrade": true, "clear-failed": true}

// orderCommand is `muster order KIND NODE`.
func orderCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "order",
		Short: "Tell one node of a site what no node may do on its own",
		Long: `Install, wipe, recover, downgrade and clear-failed are about the node's own
operating system; the others are for a site that lost servers, and for two
clusters at one site. Each order says
in a sentence what it does and wants --yes. It is signed, it is good for one
node and until it ends, and a node that has it needs no centre to obey.

Found, reset and restore are carried out when the cluster has been silent for
ten minutes, so that one too many does no harm while a server merely restarts.`,
	}
	cmd.AddCommand(
		orderKindCommand("install", "Write a slot image to one disk, named exactly",
			`The centre finds the disk in what the machine reported, by --disk or by the
site's rule, and signs all that the disk says of itself: serial number, WWN, model
and size. The node touches no disk that differs in any of these. Without --image
it is the image of the site's stack version.`),
		orderKindCommand("wipe", "Destroy what is on one disk, named exactly",
			`For a machine that goes to somebody else. The machine itself can be denied
afterwards: muster deny.`),
		orderKindCommand("recover", "Restart into the recovery image and stay there",
			`The node calls home from there and waits for the next order.`),
		orderKindCommand("downgrade", "Go to an older image",
			`A node never goes back by itself but to the slot it came from.`),
		orderKindCommand("clear-failed", "Forget that an image failed on the node",
			`A node does not try an image again that it judged bad. After what was wrong has
been mended outside of the image, this lets it try once more.`),
		orderKindCommand("found", "Start a new, empty cluster",
			`For a site whose founder (--founding named) will not come, whose founding right
went to a node that was lost, or whose cluster is lost with all its data.`),
		orderKindCommand("reset", "Go on from the node's own data, as the only server",
			`For a site that lost its quorum for good: the node's own copy of the data becomes
the cluster's, and all others come back as workers and are promoted again.`),
		orderKindCommand("restore", "Go on from a snapshot",
			`For a site that lost its servers. --snapshot names a snapshot on the node's disk
(`+"`muster describe site`"+` lists them) or one that was handed to the node
(`+"`muster escrow open --for NODE`"+`).`),
		orderKindCommand("dissolve", "Give up one of two clusters",
			`For a site with two clusters that both hold data: the one of --cluster is given
up, and its nodes join that of --into.`),
		orderWithdrawCommand(),
	)
	return cmd
}

func orderKindCommand(kind, short, long string) *cobra.Command {
	var (
		q      musterv1.CreateOrderRequest
		valid  time.Duration
		yes    bool
		f      format
		dryRun bool
	)
	q.Kind = kind
	cmd := &cobra.Command{
		Use: kind + " NODE --site SITE --reason TEXT --yes", Short: short, Long: long,
		Args: usageArgs(cobra.MinimumNArgs(1), "order which node? `muster describe site` lists them"),
	}
	a := accessFlags(cmd)
	formatFlag(cmd, &f)
	fl := cmd.Flags()
	fl.StringVar(&q.Site, "site", "", "the site")
	fl.StringVar(&q.Reason, "reason", "", "for the audit log and for the node's screen")
	fl.DurationVar(&valid, "valid", 24*time.Hour, "how long the order is good")
	fl.BoolVar(&yes, "yes", false, "do it")
	fl.BoolVar(&dryRun, "dry-run", false, "say what the order would do, and sign nothing")
	switch kind {
	case "install", "wipe":
		fl.StringVar(&q.Disk, "disk", "", "the disk: serial=S, wwn=W, or its path")
		if kind == "install" {
			fl.StringVar(&q.Image, "image", "", "slot image (NAME@VERSION); default: that of the site's stack version")
			fl.BoolVar(&q.KeepData, "keep-data", false, "a data partition of ours that is on the disk stays as it is")
			fl.BoolVar(&q.Overwrite, "overwrite", false, "take the disk although it holds a partition table")
		}
	case "downgrade", "clear-failed":
		fl.StringVar(&q.Image, "image", "", "the image (NAME@VERSION)")
	case "reset":
		fl.StringVar(&q.Cluster, "cluster", "", "UID of the cluster; default: the one the centre knows")
	case "restore":
		fl.StringVar(&q.Cluster, "cluster", "", "UID of the cluster; default: the one the centre knows")
		fl.StringVar(&q.Snapshot, "snapshot", "", "ID of a handed-over snapshot, or name of one on the node's disk")
	case "dissolve":
		fl.StringVar(&q.Cluster, "cluster", "", "UID of the cluster that goes")
		fl.StringVar(&q.Into, "into", "", "UID of the cluster that stays")
	}
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		var missing []string
		own := onSystem[kind]
		for name, v := range map[string]string{"site": q.Site, "reason": strings.TrimSpace(q.Reason)} {
			if v == "" && !(own && name == "site") {
				missing = append(missing, "--"+name)
			}
		}
		if kind == "restore" && q.Snapshot == "" {
			missing = append(missing, "--snapshot")
		}
		if kind == "wipe" && q.Disk == "" {
			missing = append(missing, "--disk")
		}
		if (kind == "downgrade" || kind == "clear-failed") && q.Image == "" {
			missing = append(missing, "--image")
		}
		if kind == "dissolve" && (q.Cluster == "" || q.Into == "") {
			missing = append(missing, "--cluster and --into")
		}
		if len(missing) > 0 {
			return exitError{2, fmt.Errorf("missing: %s", strings.Join(missing, ", "))}
		}
		c, err := a.connect()
		if err != nil {
			return err
		}
		_, q.Node = kindOf(args)
		q.ValidSeconds = uint32(min(valid, 365*24*time.Hour) / time.Second)
		q.DryRun = true
		dry, err := c.CreateOrder(cmd.Context(), &q)
		if err != nil {
			return c.explain(err)
		}
		if dryRun {
			o := issuedOrderOf(dry.Order)
			o.ID, o.Sentence, o.Warnings = "", dry.Sentence, dry.Warnings
			if f == "table" || f == "wide" {
				fmt.Fprintln(cmd.OutOrStdout(), cell(dry.Sentence))
				for _, w := range dry.Warnings {
					fmt.Fprintf(cmd.OutOrStdout(), "  note: %s\n", cell(w))
				}
				return nil
			}
			return f.write(cmd.OutOrStdout(), o, table{names: []string{"order/"}})
		}
		if err := agreed(cmd, yes, dry.Sentence, dry.Warnings); err != nil {
			return err
		}
		// What was shown is what is signed: the same node, cluster and epoch.
		q.DryRun, q.SeenEpoch, q.Node = false, dry.Epoch, dry.Order.Order.Node
		if own {
			if i := dry.Order.Order.Image; i != nil {
				q.Image = i.Name + "@" + i.Version
			}
			q.Site = dry.Order.Order.Site
		} else if kind != "found" {
			q.Cluster = dry.Order.Order.Cluster
		}
		out, err := c.CreateOrder(cmd.Context(), &q)
		if err != nil {
			return c.explain(err)
		}
		o := issuedOrderOf(out.Order)
		o.Sentence, o.Warnings = out.Sentence, out.Warnings
		if f == "table" || f == "wide" {
			fmt.Fprintf(cmd.OutOrStdout(), "order %s was signed for %s (%s), good until %s\n", o.ID, o.Node, cell(fleet.Words(o.Node)), stamp(o.NotAfter))
			return nil
		}
		return f.write(cmd.OutOrStdout(), o, table{names: []string{"order/" + o.ID}})
	}
	return cmd
}

func orderWithdrawCommand() *cobra.Command {
	var (
		reason string
		yes    bool
		f      format
	)
	cmd := &cobra.Command{
		Use:   "withdraw ID --reason TEXT --yes",
		Short: "Take an order back that its node has not begun",
		Long: `A node that has the order and does not reach the centre may carry it out all the
same, until the order ends.`,
		Args: oneArg("which order? `muster get orders` lists them"),
	}
	a := accessFlags(cmd)
	formatFlag(cmd, &f)
	cmd.Flags().StringVar(&reason, "reason", "", "for the audit log")
	cmd.Flags().BoolVar(&yes, "yes", false, "do it")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if strings.TrimSpace(reason) == "" {
			return exitError{2, errors.New("--reason TEXT is missing: the audit log keeps why")}
		}
		if err := agreed(cmd, yes, "The order is taken back; a node that has it and is out of reach may still obey it.", nil); err != nil {
			return err
		}
		c, err := a.connect()
		if err != nil {
			return err
		}
		out, err := c.WithdrawOrder(cmd.Context(), &musterv1.WithdrawOrderRequest{Id: strings.TrimPrefix(args[0], "order/"), Reason: reason})
		if err != nil {
			return c.explain(err)
		}
		o := issuedOrderOf(out.Order)
		if f == "table" || f == "wide" {
			fmt.Fprintf(cmd.OutOrStdout(), "order %s is withdrawn\n", o.ID)
			return nil
		}
		return f.write(cmd.OutOrStdout(), o, table{names: []string{"order/" + o.ID}})
	}
	return cmd
}

func getOrdersCommand() *cobra.Command {
	var site string
	var open bool
	cmd := listing("orders", "List orders: what nodes were told to do, and what became of it", []string{"order"},
		func(cmd *cobra.Command, c *centre) (any, table, error) {
			out, err := c.ListOrders(cmd.Context(), &musterv1.ListOrdersRequest{Site: site, Open: open})
			if err != nil {
				return nil, table{}, err
			}
			now := time.Now()
			orders := []issuedOrder{}
			t := table{
				lab: out.Lab, columns: []string{"ID", "KIND", "SITE", "NODE", "STATE", "AGE", "ENDS", "TEXT", "BY", "VERSION", "CLUSTER"},
				wide: 8, empty: "no orders",
			}
			for _, m := range out.Orders {
				o := issuedOrderOf(m)
				orders = append(orders, o)
				t.rows = append(t.rows, []string{
					o.ID, string(o.Kind), o.Site, fleet.Words(o.Node), o.State.String(), ago(now, o.Issued), stamp(o.NotAfter), o.Text, o.By, o.Version, o.Cluster,
				})
				t.names = append(t.names, "order/"+o.ID)
			}
			if out.More {
				fmt.Fprintf(cmd.ErrOrStderr(), "only the newest %d are listed; narrow it with --site\n", len(orders))
			}
			return orders, t, nil
		})
	cmd.Flags().StringVar(&site, "site", "", "only those of this site")
	cmd.Flags().BoolVar(&open, "open", false, "only those that stand")
	return cmd
}
