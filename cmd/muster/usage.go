package main

import (
	"fmt"

	"github.com/spf13/cobra"
)

// usageArgs makes a wrong number of arguments a usage error (exit code 2).
func usageArgs(check cobra.PositionalArgs, hint string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if err := check(cmd, args); err != nil {
			return exitError{2, fmt.Errorf("%w: %s", err, hint)}
		}
		return nil
	}
}

// noArgs refuses arguments.
func noArgs(cmd *cobra.Command, args []string) error {
	return usageArgs(cobra.NoArgs, "see `"+cmd.CommandPath()+" --help`")(cmd, args)
}

func oneArg(hint string) cobra.PositionalArgs { return usageArgs(cobra.ExactArgs(1), hint) }

// onFlagError makes a wrong flag a usage error.
func onFlagError(cmd *cobra.Command, err error) error {
	return exitError{2, fmt.Errorf("%w: see `%s --help`", err, cmd.CommandPath())}
}
