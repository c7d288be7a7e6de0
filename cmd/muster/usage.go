package main

import (
	"errors"
	"fmt"
	"strings"

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

// ownArguments marks a command that holds others and also takes arguments.
const ownArguments = "own-arguments"

// strict makes every wrong call of cmd and what is below it a usage error:
// wrong arguments, and names of verbs that do not exist. cobra answers some
// of these with exit code 1 and some with help and 0, which a script takes
// for success.
func strict(cmd *cobra.Command) {
	for _, c := range cmd.Commands() {
		strict(c)
	}
	if cmd.HasSubCommands() && !cmd.DisableFlagParsing && cmd.Annotations[ownArguments] == "" {
		group(cmd)
		return
	}
	check := cmd.Args
	if check == nil {
		return
	}
	cmd.Args = func(cmd *cobra.Command, args []string) error {
		err := check(cmd, args)
		if coded := (exitError{}); err == nil || errors.As(err, &coded) {
			return err
		}
		return exitError{2, fmt.Errorf("%w: see `%s --help`", err, cmd.CommandPath())}
	}
}

// group is a command that only holds others. The root alone shows help when
// it is called without one.
func group(cmd *cobra.Command) {
	want := func(cmd *cobra.Command) string {
		var names []string
		for _, c := range cmd.Commands() {
			if c.IsAvailableCommand() && c.Name() != "help" && c.Name() != "completion" {
				names = append(names, c.Name())
			}
		}
		if len(names) < 2 {
			return strings.Join(names, "")
		}
		return strings.Join(names[:len(names)-1], ", ") + " or " + names[len(names)-1]
	}
	known := cmd.Args
	cmd.Args = func(cmd *cobra.Command, args []string) error {
		if known != nil {
			if err := known(cmd, args); err != nil {
				return err
			}
		}
		if len(args) == 0 {
			return nil
		}
		hint := "want " + want(cmd)
		if s := cmd.SuggestionsFor(args[0]); len(s) > 0 {
			hint = "did you mean " + strings.Join(s, " or ") + "?"
		}
		return exitError{2, fmt.Errorf("unknown command %q for %q: %s", args[0], cmd.CommandPath(), hint)}
	}
	switch {
	case cmd.RunE != nil || cmd.Run != nil:
	case !cmd.HasParent():
		cmd.RunE = func(cmd *cobra.Command, _ []string) error { return cmd.Help() }
	default:
		cmd.RunE = func(cmd *cobra.Command, _ []string) error {
			return exitError{2, fmt.Errorf("%s what? Want %s", cmd.Name(), want(cmd))}
		}
	}
}
