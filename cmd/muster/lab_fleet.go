package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/muster-edge/muster/lab/fleet"
)

// labFleetCommand is `muster lab fleet`: a whole fleet against one centre.
func labFleetCommand() *cobra.Command {
	cfg := fleet.Config{}
	var (
		minutes      float64
		databaseFile string
		f            format
	)
	cmd := &cobra.Command{
		Use:   "fleet --sites N --minutes M",
		Short: "Measure a centre under a whole fleet: memory, CPU, answers, and all nodes coming back at once",
		Long: `Starts a centre of its own in a temporary directory and plays the nodes: real TLS
1.3 with a certificate for each, over the loopback network, one address per site,
every tenth site behind one address. Software keys stand for TPMs, and sites and
nodes are written into the database beforehand. The centre's memory and CPU are
measured apart. The last line of -o json is one object; "ok" is true when all goals
were reached, and "missed" says which were not.`,
		Example: "  muster lab fleet --sites 1000 --minutes 2\n  MUSTER_DATABASE=postgres://... muster lab fleet --sites 10000 --minutes 5 -o json",
		Args:    noArgs,
	}
	cmd.Flags().IntVar(&cfg.Sites, "sites", 100, "sites")
	cmd.Flags().IntVar(&cfg.NodesPerSite, "nodes-per-site", 3, "nodes of each site")
	cmd.Flags().IntVar(&cfg.Pending, "pending", 10000, "machines that wait for approval beside them")
	cmd.Flags().Float64Var(&minutes, "minutes", 2, "how long the steady state is measured, after a first round that is not")
	cmd.Flags().DurationVar(&cfg.ReportEvery, "report-every", time.Minute, "how often each node calls")
	cmd.Flags().StringVar(&cfg.Database, "database", "", "`URL` of an empty PostgreSQL database, without a password (default: the environment MUSTER_DATABASE; else SQLite)")
	cmd.Flags().StringVar(&databaseFile, "database-file", "", "`file` with the URL")
	formatFlag(cmd, &f)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if cfg.Sites < 1 || cfg.Sites > 200000 || cfg.NodesPerSite < 1 || cfg.NodesPerSite > 100 || cfg.Pending < 0 || minutes <= 0 || cfg.ReportEvery < time.Second {
			return exitError{2, errors.New("want 1 to 200,000 sites of 1 to 100 nodes, some minutes, and reports at least a second apart")}
		}
		if cfg.Database == "" {
			cfg.Database = os.Getenv(envName("database"))
		}
		if databaseFile != "" {
			b, err := os.ReadFile(databaseFile)
			if err != nil {
				return exitError{2, err}
			}
			cfg.Database = string(b)
		}
		dir, err := os.MkdirTemp("", "muster-fleet")
		if err != nil {
			return exitError{3, err}
		}
		defer os.RemoveAll(dir)
		if cfg.Program, err = os.Executable(); err != nil {
			return exitError{3, err}
		}
		cfg.Dir, cfg.For = filepath.Join(dir, "data"), time.Duration(minutes*float64(time.Minute))
		cfg.Say = func(format string, args ...any) { fmt.Fprintf(cmd.ErrOrStderr(), format+"\n", args...) }
		r, err := fleet.Run(cmd.Context(), cfg)
		if err != nil {
			return exitError{3, err}
		}
		if f == "json" {
			// One line, the last.
			if err := json.NewEncoder(cmd.OutOrStdout()).Encode(r); err != nil {
				return err
			}
		} else if err := f.write(cmd.OutOrStdout(), r, fleetTable(r)); err != nil {
			return err
		}
		if !r.OK {
			return exitError{1, fmt.Errorf("goals missed: %v", r.Missed)}
		}
		return nil
	}
	return cmd
}

func fleetTable(r fleet.Result) table {
	return table{columns: []string{"SITES", "NODES", "DB", "RSS MB", "CORES", "P50 MS", "P99 MS", "ERRORS", "RECONNECT S", "LIST MS"},
		names: []string{fmt.Sprint(r.Sites)},
		rows: [][]string{{fmt.Sprint(r.Sites), fmt.Sprint(r.Nodes), r.DB, fmt.Sprint(r.RSSMB), fmt.Sprint(r.CPUCores), fmt.Sprint(r.P50MS), fmt.Sprint(r.P99MS),
			fmt.Sprint(r.Errors), fmt.Sprint(r.ReconnectS), fmt.Sprint(r.ListMS)}}}
}
