package main

import (
	"fmt"
	"os"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"
)

// manCommand is `muster man DIR`, for packages.
func manCommand() *cobra.Command {
	var date string
	cmd := &cobra.Command{
		Use: "man DIR", Short: "Write the manual pages of all commands into a directory",
		Long:   "For packages: the same program and --date give the same bytes.",
		Args:   usageArgs(cobra.ExactArgs(1), "into which directory?"),
		Hidden: true,
	}
	cmd.Flags().StringVar(&date, "date", "", "day on the pages, 2006-01-02 (default: none)")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		day := time.Time{}
		if date != "" {
			var err error
			if day, err = time.Parse(time.DateOnly, date); err != nil {
				return exitError{2, fmt.Errorf("--date: %w", err)}
			}
		}
		if err := os.MkdirAll(args[0], 0o755); err != nil {
			return fmt.Errorf("write manual pages: %w", err)
		}
		root := cmd.Root()
		root.DisableAutoGenTag = true // it would carry the day of the build
		if err := doc.GenManTree(root, &doc.GenManHeader{Section: "1", Source: "muster " + version, Manual: "muster", Date: &day}, args[0]); err != nil {
			return fmt.Errorf("write manual pages: %w", err)
		}
		return nil
	}
	return cmd
}
