package main

import (
	"fmt"
	"net/url"
	"os"

	"github.com/spf13/cobra"
)

// configCommand is `muster config show`.
func configCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "config show",
		Short: "Settings and where they come from",
		RunE: func(*cobra.Command, []string) error {
			return exitError{2, fmt.Errorf("config what? Want show")}
		},
	}
	cmd.AddCommand(configShowCommand())
	return cmd
}

func configShowCommand() *cobra.Command {
	var (
		s    serveSettings
		file string
		f    format
	)
	cmd := &cobra.Command{
		Use:   "show",
		Short: "Show the settings `muster serve` would run with, and which file other commands use",
		Args:  noArgs,
	}
	s.flags(cmd)
	cmd.Flags().StringVar(&file, "config", "", "YAML `file` with settings of muster serve")
	formatFlag(cmd, &f)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		all, err := resolve(cmd, serveConfigFile(file))
		if err != nil {
			return err
		}
		settings := []setting{}
		t := table{columns: []string{"SETTING", "VALUE", "FROM"}}
		add := func(v setting) {
			settings = append(settings, v)
			t.rows = append(t.rows, []string{v.Name, fmt.Sprint(v.Value), v.Source})
			t.names = append(t.names, v.Name)
		}
		for _, v := range all {
			if text, ok := v.Value.(string); ok && v.Name == "database" {
				v.Value = withoutPassword(text)
			}
			if v.Name != "output" {
				add(v)
			}
		}
		client := setting{"(client configuration)", "", "none found"}
		if v := os.Getenv("MUSTER_CONFIG"); v != "" {
			client.Value, client.Source = v, "environment MUSTER_CONFIG"
		} else if v := userConfig(); v != "" {
			client.Value, client.Source = v, "default"
		}
		add(client)
		return f.write(cmd.OutOrStdout(), settings, t)
	}
	return cmd
}

// withoutPassword is a database URL as people may see it.
func withoutPassword(text string) string {
	u, err := url.Parse(text)
	if text == "" || err == nil && !hasPassword(u) {
		return text
	}
	if err != nil || u.Scheme == "" || u.Query().Has("password") {
		return "(set)"
	}
	return u.Redacted()
}
