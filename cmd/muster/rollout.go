package main

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	musterv1 "github.com/muster-edge/muster/api/muster/v1"
)

// rolloutView is a rollout as -o json shows it.
type rolloutView struct {
	Name        string            `json:"name"`
	Revision    int64             `json:"revision"`
	Stack       string            `json:"stack"`
	State       string            `json:"state"`
	Explanation string            `json:"explanation"`
	Waves       []string          `json:"waves"`
	Wave        uint32            `json:"wave"`
	WaveSites   uint32            `json:"wave_sites"`
	Total       uint32            `json:"sites_total"`
	Healthy     uint32            `json:"sites_healthy"`
	Failed      uint32            `json:"sites_failed"`
	Soak        int64             `json:"soak_s"`
	MaxFailed   uint32            `json:"max_failed"`
	Timeout     int64             `json:"timeout_s"`
	By          string            `json:"by"`
	Created     time.Time         `json:"created"`
	Updated     time.Time         `json:"updated"`
	Sites       []rolloutSiteView `json:"sites,omitempty"`
}

type rolloutSiteView struct {
	Name     string    `json:"name"`
	State    string    `json:"state"`
	Since    time.Time `json:"since,omitzero"`
	Before   string    `json:"before,omitempty"`
	Reason   string    `json:"reason,omitempty"`
	Forgiven bool      `json:"forgiven,omitempty"`
}

func rolloutOf(m *musterv1.Rollout) rolloutView {
	v := rolloutView{
		Name: m.GetName(), Revision: m.GetRevision(), Stack: m.GetStack().GetName() + "@" + m.GetStack().GetVersion(), State: m.GetState(), Explanation: m.GetExplanation(),
		Waves: []string{}, Wave: m.GetWave(), WaveSites: m.GetWaveSites(), Total: m.GetSitesTotal(), Healthy: m.GetSitesHealthy(), Failed: m.GetSitesFailed(),
		Soak: m.GetSoakSeconds(), MaxFailed: m.GetMaxFailed(), Timeout: m.GetTimeoutSeconds(), By: m.GetBy(), Created: m.GetCreated().AsTime(), Updated: m.GetUpdated().AsTime(),
	}
	for _, w := range m.GetWaves() {
		text := fmt.Sprint(w.GetSites())
		if w.GetPercent() > 0 {
			text = fmt.Sprintf("%d%%", w.GetPercent())
		}
		v.Waves = append(v.Waves, text)
	}
	for _, x := range m.GetSites() {
		s := rolloutSiteView{Name: x.GetName(), State: x.GetState(), Before: x.GetBefore(), Reason: x.GetReason(), Forgiven: x.GetForgiven()}
		if x.GetSince() != nil {
			s.Since = x.GetSince().AsTime()
		}
		v.Sites = append(v.Sites, s)
	}
	return v
}

func rolloutTable(list []rolloutView) table {
	t := table{
		columns: []string{"NAME", "STACK", "STATE", "WAVE", "HEALTHY", "FAILED", "WHY", "AGE", "BY", "WAVES"}, wide: 7,
		empty: "no rollouts; `muster rollout start` begins one",
	}
	for _, v := range list {
		t.rows = append(t.rows, []string{
			v.Name, v.Stack, v.State, fmt.Sprintf("%d/%d", v.Wave, len(v.Waves)), fmt.Sprintf("%d/%d", v.Healthy, v.Total), fmt.Sprint(v.Failed), v.Explanation,
			ago(time.Now(), v.Created), v.By, strings.Join(v.Waves, ","),
		})
		t.names = append(t.names, "rollout/"+v.Name)
	}
	return t
}

func showRollout(cmd *cobra.Command, f format, m *musterv1.Rollout) error {
	v := rolloutOf(m)
	if err := f.write(cmd.OutOrStdout(), v, rolloutTable([]rolloutView{v})); err != nil || f != "table" && f != "wide" || len(v.Sites) == 0 {
		return err
	}
	t := table{columns: []string{"SITE", "STATE", "SINCE", "BEFORE", "WHY"}}
	for _, s := range v.Sites {
		t.rows = append(t.rows, []string{s.Name, s.State, ago(time.Now(), s.Since), s.Before, s.Reason})
	}
	fmt.Fprintln(cmd.OutOrStdout())
	return f.write(cmd.OutOrStdout(), v, t)
}

// rolloutCommand is `muster rollout start|status|pause|resume|abort`.
func rolloutCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "rollout", Short: "Give a stack version to sites in waves"}
	cmd.AddCommand(rolloutStartCommand(), rolloutStatusCommand(),
		rolloutActCommand("pause", "Give the version to no more sites for now", "Sites that have it keep it and go on with it."),
		rolloutActCommand("resume", "Take a paused or stopped rollout up again", "Sites that have failed so far neither hold it up nor count again."),
		rolloutActCommand("abort", "End a rollout", "Sites that have the version keep it; muster assign gives them another."))
	return cmd
}

// parseWaves reads "1,10%,100%".
func parseWaves(s string) (out []*musterv1.RolloutWave, err error) {
	for _, w := range strings.Split(s, ",") {
		number, percent := strings.CutSuffix(strings.TrimSpace(w), "%")
		n, err := strconv.ParseUint(number, 10, 16)
		if err != nil || n == 0 || percent && n > 100 {
			return nil, exitError{2, fmt.Errorf("wave %q is neither a number of sites nor 1%% to 100%%", w)}
		}
		x := &musterv1.RolloutWave{Sites: uint32(n)}
		if percent {
			x = &musterv1.RolloutWave{Percent: uint32(n)}
		}
		out = append(out, x)
	}
	return out, nil
}

func rolloutStartCommand() *cobra.Command {
	var (
		q              musterv1.StartRolloutRequest
		stack, waves   string
		soak, deadline time.Duration
		f              format
	)
	cmd := &cobra.Command{
		Use:   "start NAME --stack NAME@VERSION",
		Short: "Give a stack version to sites in waves, each after the one before is healthy",
		Long: `The sites with the labels of --selector get the version in waves. A wave waits until
all nodes of its sites run the version and none has judged it bad, and until
that has been so for --soak. When more than --max-failed sites failed, the
rollout stops by itself and says why; muster rollout resume goes on without
them. It goes on after a restart of the centre.

Sites that come to have the labels later are not in it.`,
		Example: `  muster rollout start may --stack shop@2027.1 --first canary=yes --dry-run
  muster rollout start may --stack shop@2027.1 --first canary=yes --waves 1,10%,100% --soak 2h`,
		Args: oneArg("which rollout? Give it a name"),
	}
	a := accessFlags(cmd)
	formatFlag(cmd, &f)
	cmd.Flags().StringVar(&stack, "stack", "", "the stack version (NAME@VERSION)")
	cmd.Flags().StringToStringVarP(&q.Labels, "selector", "l", nil, "sites with these labels (KEY=VALUE); without: all")
	cmd.Flags().StringToStringVar(&q.First, "first", nil, "sites with these labels come first")
	cmd.Flags().StringVar(&waves, "waves", "1,10%,100%", "how many sites have the version when each wave is through; the last is all")
	cmd.Flags().DurationVar(&soak, "soak", time.Hour, "how long a wave must have been healthy before the next")
	cmd.Flags().DurationVar(&deadline, "timeout", 24*time.Hour, "a site that is not healthy so long after it got the version counts as failed, also one out of reach; 0: never")
	cmd.Flags().Uint32Var(&q.MaxFailed, "max-failed", 0, "so many sites may fail")
	cmd.Flags().BoolVar(&q.AcceptNoReturn, "accept-no-return", false, "also where the step raises etcd's minor version, which cannot be undone")
	cmd.Flags().BoolVar(&q.DryRun, "dry-run", false, "say which sites would get it in which order, and do nothing")
	cmd.Flags().StringVar(&q.Reason, "reason", "", "for the audit log")
	cmd.RunE = func(cmd *cobra.Command, args []string) (err error) {
		name, version, found := strings.Cut(stack, "@")
		if !found {
			return exitError{2, errors.New("--stack NAME@VERSION is missing")}
		}
		q.Name, q.Stack, q.Version, q.SoakSeconds, q.TimeoutSeconds = args[0], name, version, int64(soak/time.Second), int64(deadline/time.Second)
		if q.Waves, err = parseWaves(waves); err != nil {
			return err
		}
		c, err := a.connect()
		if err != nil {
			return err
		}
		out, err := c.StartRollout(cmd.Context(), &q)
		if err != nil {
			return c.explain(err)
		}
		if q.DryRun {
			fmt.Fprintln(cmd.ErrOrStderr(), "nothing was started: this was a dry run")
		}
		return showRollout(cmd, f, out.Rollout)
	}
	return cmd
}

func rolloutStatusCommand() *cobra.Command {
	var f format
	cmd := &cobra.Command{
		Use:   "status [NAME]",
		Short: "List rollouts, or show one with its sites",
		Args:  usageArgs(cobra.MaximumNArgs(1), "which rollout?"),
	}
	a := accessFlags(cmd)
	formatFlag(cmd, &f)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		c, err := a.connect()
		if err != nil {
			return err
		}
		if len(args) == 1 {
			out, err := c.GetRollout(cmd.Context(), &musterv1.GetRolloutRequest{Name: args[0]})
			if err != nil {
				return c.explain(err)
			}
			return showRollout(cmd, f, out.Rollout)
		}
		out, err := c.ListRollouts(cmd.Context(), &musterv1.ListRolloutsRequest{})
		if err != nil {
			return c.explain(err)
		}
		list := []rolloutView{}
		for _, m := range out.Rollouts {
			list = append(list, rolloutOf(m))
		}
		t := rolloutTable(list)
		t.lab = out.Lab
		return f.write(cmd.OutOrStdout(), list, t)
	}
	return cmd
}

func rolloutActCommand(act, short, long string) *cobra.Command {
	var (
		q musterv1.ChangeRolloutRequest
		f format
	)
	cmd := &cobra.Command{Use: act + " NAME --reason TEXT", Short: short, Long: short + ". " + long, Args: oneArg("which rollout? `muster rollout status` lists them")}
	a := accessFlags(cmd)
	formatFlag(cmd, &f)
	cmd.Flags().StringVar(&q.Reason, "reason", "", "for the audit log")
	cmd.Flags().Int64Var(&q.Revision, "revision", 0, "only if the rollout is at this revision")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if strings.TrimSpace(q.Reason) == "" {
			return exitError{2, errors.New("--reason TEXT is missing: the audit log keeps why")}
		}
		c, err := a.connect()
		if err != nil {
			return err
		}
		q.Name, q.Act = args[0], act
		out, err := c.ChangeRollout(cmd.Context(), &q)
		if err != nil {
			return c.explain(err)
		}
		return showRollout(cmd, f, out.Rollout)
	}
	return cmd
}
