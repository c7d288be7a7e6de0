package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/muster-edge/muster/api"
	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/enroll"
	"github.com/muster-edge/muster/fleet"
)

// preapproveCommand is `muster preapprove`: decisions before machines call.
func preapproveCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "preapprove import|claim|rule|list|remove|test",
		Short: "Decide about machines before they call: lists of EKs, claim codes, rules",
		Long: `A pre-approval lets a machine in without a person, once. It is looked at when
the machine calls, in this order: lists, claim codes, rules. None approves what
policy would refuse a person, a machine whose TPM nobody vouches for, or a
machine that was decided about before.`,
		Args: usageArgs(cobra.NoArgs, "want import, claim, rule, list, remove or test"),
		RunE: func(*cobra.Command, []string) error {
			return exitError{2, errors.New("preapprove how? Want import, claim, rule, list, remove or test")}
		},
	}
	cmd.AddCommand(preapproveImportCommand(), preapproveClaimCommand(), preapproveRuleCommand(),
		preapproveListCommand(), preapproveRemoveCommand(), preapproveTestCommand())
	return cmd
}

// claimFlag reads a claim code, so that a slip is found where it was made.
func claimFlag(into *string) func(string) error {
	return func(s string) error {
		if _, err := enroll.HashClaim(s); err != nil {
			return errors.New(strings.TrimPrefix(err.Error(), "enroll: "))
		}
		*into = s
		return nil
	}
}

// lifetime is a flag such as 30d, 12h.
type lifetime time.Duration

// String implements pflag.Value.
func (l *lifetime) String() string {
	if *l == 0 {
		return ""
	}
	return time.Duration(*l).String()
}

// Type implements pflag.Value.
func (l *lifetime) Type() string { return "duration" }

// Set implements pflag.Value.
func (l *lifetime) Set(s string) error {
	var d time.Duration
	if days, found := strings.CutSuffix(s, "d"); found {
		n, err := strconv.ParseUint(days, 10, 16)
		if err != nil {
			return errors.New("want a number of days such as 30d, or 12h")
		}
		d = time.Duration(n) * 24 * time.Hour
	} else {
		var err error
		if d, err = time.ParseDuration(s); err != nil {
			return errors.New("want a number of days such as 30d, or 12h")
		}
	}
	if d < time.Second {
		return errors.New("that is over before it begins; want a number of days such as 30d, or 12h")
	}
	*l = lifetime(d)
	return nil
}

func (l lifetime) seconds() uint64 { return uint64(time.Duration(l) / time.Second) }

// preapproval are the flags that import, claim and rule have in common.
type preapproval struct {
	name, site, reason string
	labels             map[string]string
	expires            lifetime
	f                  format
	a                  *access
}

func preapprovalFlags(cmd *cobra.Command, normal string) *preapproval {
	p := &preapproval{a: accessFlags(cmd)}
	formatFlag(cmd, &p.f)
	cmd.Flags().StringVar(&p.name, "name", "", "name of the pre-approval (default: one is made up)")
	cmd.Flags().StringVar(&p.site, "site", "", "site that the machines belong to; it is created at its first use")
	cmd.Flags().StringVar(&p.reason, "reason", "", "for the audit log")
	cmd.Flags().StringToStringVar(&p.labels, "label", nil, "label of the nodes, KEY=VALUE; may be repeated")
	cmd.Flags().Var(&p.expires, "expires", "how long it holds, such as 30d or 12h (default "+normal+")")
	return p
}

// created prints a new pre-approval.
func (p *preapproval) created(cmd *cobra.Command, m *musterv1.PreApproval, code, sentence string) error {
	v, err := api.PreApprovalFromProto(m)
	if err != nil {
		return err
	}
	if p.f == "table" || p.f == "wide" {
		_, err := fmt.Fprintln(cmd.OutOrStdout(), sentence)
		return err
	}
	return p.f.write(cmd.OutOrStdout(), struct {
		fleet.PreApproval
		Code string `json:"code,omitempty"`
	}{v, code}, table{names: []string{"preapproval/" + v.Name}})
}

func preapproveImportCommand() *cobra.Command {
	var dryRun, createSites bool
	cmd := &cobra.Command{
		Use:   "import FILE.csv [--site SITE]",
		Short: "Import a list of EKs, such as a warehouse scan: each line lets one machine in, once",
		Long: `FILE is CSV (RFC 4180, UTF-8, at most 100,000 lines and 10 MB; - is standard
input) with a header:

  ek_sha256    SHA-256 of the EK's public key (PKIX DER), 64 hex digits; needed
  serial       for people; it is never compared
  site         site of this machine; else --site counts
  model        for people; it is not kept
  words        for people; they must be those of the EK
  label:KEY    label of the node

All that is wrong is named line by line, and then nothing is imported.`,
		Args: usageArgs(cobra.ExactArgs(1), "import which file? Give FILE.csv, or - for standard input"),
	}
	p := preapprovalFlags(cmd, "30d")
	cmd.Flags().BoolVar(&dryRun, "dry-run", false, "check the list and import nothing")
	cmd.Flags().BoolVar(&createSites, "create-sites", false, "create the sites that lines name and that are not there yet")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		csv, err := readList(cmd.InOrStdin(), args[0])
		if err != nil {
			return err
		}
		c, err := p.a.connect()
		if err != nil {
			return err
		}
		out, err := c.ImportPreApproval(cmd.Context(), &musterv1.ImportPreApprovalRequest{
			Csv: csv, Name: p.name, Site: p.site, Labels: p.labels, ExpiresSeconds: p.expires.seconds(),
			DryRun: dryRun, CreateSites: createSites, Reason: p.reason,
		})
		if err != nil {
			return c.explain(err)
		}
		if len(out.Problems) > 0 {
			return badList(cmd.ErrOrStderr(), args[0], out)
		}
		for _, s := range out.SitesCreated {
			verb := "was created"
			if dryRun {
				verb = "would be created"
			}
			fmt.Fprintf(cmd.ErrOrStderr(), "site %s %s\n", s, verb)
		}
		m := out.PreApproval
		sentence := fmt.Sprintf("list %s: %s, until %s", m.GetMeta().GetName(), count(int(out.Lines), "machine", "machines"), stamp(m.GetNotAfter().AsTime()))
		if dryRun {
			sentence = fmt.Sprintf("the list is good: %s; nothing was imported (--dry-run)", count(int(out.Lines), "machine", "machines"))
		}
		return p.created(cmd, m, "", sentence)
	}
	return cmd
}

// readList reads a file, or standard input, of at most the length of a list.
func readList(stdin io.Reader, name string) ([]byte, error) {
	in := stdin
	if name != "-" {
		file, err := os.Open(name)
		if err != nil {
			return nil, fmt.Errorf("read list: %w", err)
		}
		defer file.Close()
		in = file
	}
	b, err := io.ReadAll(io.LimitReader(in, enroll.MaxListBytes+1))
	if err != nil {
		return nil, fmt.Errorf("read list: %w", err)
	}
	if len(b) > enroll.MaxListBytes {
		return nil, fmt.Errorf("read list: %s has more than %d bytes", name, enroll.MaxListBytes)
	}
	return b, nil
}

// badList prints FILE:LINE: problem, as compilers do.
func badList(w io.Writer, name string, out *musterv1.ImportPreApprovalResponse) error {
	for _, x := range out.Problems {
		if x.Line == 0 {
			fmt.Fprintf(w, "%s: %s\n", cell(name), cell(x.Problem))
			continue
		}
		fmt.Fprintf(w, "%s:%d: %s\n", cell(name), x.Line, cell(x.Problem))
	}
	n := len(out.Problems) + int(out.MoreProblems)
	return fmt.Errorf("nothing was imported: %s in the list", count(n, "problem", "problems"))
}

func preapproveClaimCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "claim --site SITE",
		Short: "Make a claim code: the first machine that brings it is approved for the site",
		Long: `The code is printed once; the centre keeps a hash of it. Build it into a
recovery image with ` + "`muster image recovery --claim CODE`" + `. It is good for one
machine, and only for one that policy would let a person approve.`,
		Args: noArgs,
	}
	p := preapprovalFlags(cmd, "7d")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if p.site == "" {
			return exitError{2, errors.New("--site SITE is missing: a claim code belongs to a site")}
		}
		c, err := p.a.connect()
		if err != nil {
			return err
		}
		out, err := c.CreateClaim(cmd.Context(), &musterv1.CreateClaimRequest{
			Name: p.name, Site: p.site, Labels: p.labels, ExpiresSeconds: p.expires.seconds(), Reason: p.reason,
		})
		if err != nil {
			return c.explain(err)
		}
		m := out.PreApproval
		if p.f == "table" || p.f == "wide" {
			fmt.Fprintf(cmd.ErrOrStderr(), "claim code %s for one machine at site %s, until %s; it is not shown again:\n",
				m.GetMeta().GetName(), m.Site, stamp(m.GetNotAfter().AsTime()))
		}
		return p.created(cmd, m, out.Code, out.Code)
	}
	return cmd
}

func preapproveRuleCommand() *cobra.Command {
	var (
		identity, boot, vendor string
		most, perDay           uint32
		serials                []string
	)
	cmd := &cobra.Command{
		Use:   "rule --site SITE --identity WORD --boot WORD --max N",
		Short: "Let in any machine whose verdict is good enough, up to a number",
		Long: `A rule counts what was proved: identity lab, listed or hardware, boot measured
or enforced. --vendor and --serial narrow it to machines that say these of
themselves; such words are never enough alone. A machine whose serial number or
UUID another machine claims, too, is left to a person.`,
		Args: noArgs,
	}
	p := preapprovalFlags(cmd, "30d")
	cmd.Flags().StringVar(&identity, "identity", "", "least identity: lab, listed or hardware")
	cmd.Flags().StringVar(&boot, "boot", "", "least boot: measured or enforced")
	cmd.Flags().Uint32Var(&most, "max", 0, "the most machines it lets in")
	cmd.Flags().Uint32Var(&perDay, "per-day", 0, "the most machines within any 24 hours (default: no such cap)")
	cmd.Flags().StringVar(&vendor, "vendor", "", "only machines that give this system vendor, exactly")
	cmd.Flags().StringArrayVar(&serials, "serial", nil, "only machines that give this serial number, exactly; may be repeated")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		var i fleet.IdentityTrust
		var b fleet.BootTrust
		switch {
		case p.site == "":
			return exitError{2, errors.New("--site SITE is missing: a rule belongs to a site")}
		case i.UnmarshalText([]byte(identity)) != nil || i == fleet.IdentityUnverified:
			return exitError{2, fmt.Errorf("--identity %q: want lab, listed or hardware", identity)}
		case b.UnmarshalText([]byte(boot)) != nil || b == fleet.BootUnknown:
			return exitError{2, fmt.Errorf("--boot %q: want measured or enforced", boot)}
		case most == 0:
			return exitError{2, errors.New("--max N is missing: a rule without an end is no decision")}
		case perDay > most:
			return exitError{2, fmt.Errorf("--per-day %d is more than --max %d", perDay, most)}
		}
		c, err := p.a.connect()
		if err != nil {
			return err
		}
		out, err := c.CreateRule(cmd.Context(), &musterv1.CreateRuleRequest{
			Name: p.name, Site: p.site, Labels: p.labels, MinIdentity: musterv1.IdentityTrust(i), MinBoot: musterv1.BootTrust(b),
			Max: most, PerDay: perDay, Vendor: vendor, Serials: serials, ExpiresSeconds: p.expires.seconds(), Reason: p.reason,
		})
		if err != nil {
			return c.explain(err)
		}
		m := out.PreApproval
		return p.created(cmd, m, "", fmt.Sprintf("rule %s: at most %s at site %s, until %s",
			m.GetMeta().GetName(), count(int(most), "machine", "machines"), m.Site, stamp(m.GetNotAfter().AsTime())))
	}
	return cmd
}

func preapproveListCommand() *cobra.Command {
	return listing("list", "List pre-approvals: what each lets in, and what of it is used", nil,
		func(cmd *cobra.Command, c *centre) (any, table, error) {
			out, err := c.ListPreApprovals(cmd.Context(), &musterv1.ListPreApprovalsRequest{})
			if err != nil {
				return nil, table{}, err
			}
			now := time.Now()
			all := []fleet.PreApproval{}
			t := table{
				lab: out.Lab, columns: []string{"NAME", "KIND", "STATE", "SITE", "USED", "ENDS", "WANTS", "LABELS", "AGE"},
				wide: 7, empty: "no pre-approvals",
			}
			for _, m := range out.PreApprovals {
				p, err := api.PreApprovalFromProto(m)
				if err != nil {
					return nil, table{}, err
				}
				all = append(all, p)
				t.rows = append(t.rows, []string{
					p.Name, string(p.Kind), preapprovalState(p, now), p.Site, fmt.Sprintf("%d/%d", p.Used, p.Limit),
					stamp(p.NotAfter), wants(p), labels(p.NodeLabels), ago(now, p.Created),
				})
				t.names = append(t.names, "preapproval/"+p.Name)
			}
			return all, t, nil
		})
}

func preapprovalState(p fleet.PreApproval, now time.Time) string {
	switch {
	case p.Withdrawn:
		return "removed"
	case !now.Before(p.NotAfter):
		return "ended"
	case p.Used >= p.Limit:
		return "used up"
	}
	return "open"
}

// wants says what a machine must show.
func wants(p fleet.PreApproval) string {
	switch p.Kind {
	case fleet.PreApproveEKs:
		return "an EK of the list"
	case fleet.PreApproveClaim:
		return "the code"
	}
	out := fmt.Sprintf("identity %s, boot %s", p.MinIdentity, p.MinBoot)
	if p.PerDay > 0 {
		out += fmt.Sprintf(", %d a day", p.PerDay)
	}
	if p.Vendor != "" {
		out += ", vendor " + p.Vendor
	}
	if n := len(p.Serials); n > 0 {
		out += ", one of " + count(n, "serial", "serials")
	}
	return out
}

func preapproveRemoveCommand() *cobra.Command {
	var reason string
	var f format
	cmd := &cobra.Command{
		Use:   "remove NAME",
		Short: "End a pre-approval; what it approved stays approved",
		Long: `After the end of a list its EKs are no longer "listed": a machine without an EK
certificate that its vendor signed becomes unverified when it calls again.`,
		Args: usageArgs(cobra.ExactArgs(1), "remove which pre-approval? `muster preapprove list` names them"),
	}
	a := accessFlags(cmd)
	formatFlag(cmd, &f)
	cmd.Flags().StringVar(&reason, "reason", "", "for the audit log")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		c, err := a.connect()
		if err != nil {
			return err
		}
		out, err := c.RemovePreApproval(cmd.Context(), &musterv1.RemovePreApprovalRequest{
			Name: strings.TrimPrefix(args[0], "preapproval/"), Reason: reason,
		})
		if err != nil {
			return c.explain(err)
		}
		v, err := api.PreApprovalFromProto(out.PreApproval)
		if err != nil {
			return err
		}
		if f == "table" || f == "wide" {
			_, err := fmt.Fprintf(cmd.OutOrStdout(), "%s was removed; it was used %d of %d times\n", v.Name, v.Used, v.Limit)
			return err
		}
		return f.write(cmd.OutOrStdout(), v, table{names: []string{"preapproval/" + v.Name}})
	}
	return cmd
}

func preapproveTestCommand() *cobra.Command {
	var f format
	cmd := &cobra.Command{
		Use:   "test REQUEST",
		Short: "Say which pre-approval would let a request in, and why the others would not",
		Long: `Nothing is changed. The claim code that a machine brings is not kept, so that
no code counts here. A machine that waits is approved when it calls again, at
the latest when it is switched off and on.`,
		Args: usageArgs(cobra.MinimumNArgs(1), "test which request? `muster get requests` lists them"),
	}
	a := accessFlags(cmd)
	formatFlag(cmd, &f)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		c, err := a.connect()
		if err != nil {
			return err
		}
		_, id := kindOf(args)
		out, err := c.TestPreApprovals(cmd.Context(), &musterv1.TestPreApprovalsRequest{Id: id})
		if err != nil {
			return c.explain(err)
		}
		if f != "table" && f != "wide" {
			return f.write(cmd.OutOrStdout(), tested(out), table{names: []string{"request/" + out.Request}})
		}
		w := cmd.OutOrStdout()
		if out.Approve {
			site := ""
			if out.Site != "" {
				site = " for site " + out.Site
			}
			fmt.Fprintf(w, "%s would be approved%s by %s: %s\n", out.Request, site, cell(out.Which), cell(out.Reason))
		} else {
			fmt.Fprintf(w, "%s would wait: %s\n", out.Request, cell(out.Reason))
		}
		for _, x := range out.Tried {
			fmt.Fprintf(w, "  not %s (%s): %s\n", cell(x.Name), cell(x.Kind), cell(x.WhyNot))
		}
		return nil
	}
	return cmd
}

// testReport is the JSON answer of `muster preapprove test`.
type testReport struct {
	Request string            `json:"request"`
	Approve bool              `json:"approve"`
	Which   string            `json:"which,omitempty"`
	Reason  string            `json:"reason"`
	Site    string            `json:"site,omitempty"`
	Labels  map[string]string `json:"labels,omitempty"`
	Tried   []testTried       `json:"tried"`
}

type testTried struct {
	Name   string `json:"name"`
	Kind   string `json:"kind"`
	WhyNot string `json:"why_not"`
}

func tested(m *musterv1.TestPreApprovalsResponse) testReport {
	r := testReport{
		Request: m.Request, Approve: m.Approve, Which: m.Which, Reason: m.Reason, Site: m.Site, Labels: m.Labels, Tried: []testTried{},
	}
	for _, x := range m.Tried {
		r.Tried = append(r.Tried, testTried{x.Name, x.Kind, x.WhyNot})
	}
	return r
}
