package main

import (
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	musterv1 "github.com/muster-edge/muster/api/muster/v1"
)

// bootCommand is `muster boot window open|close`.
func bootCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "boot window",
		Short: "Network boot",
		RunE: func(*cobra.Command, []string) error {
			return exitError{2, errors.New("boot what? Want window open or window close")}
		},
	}
	window := &cobra.Command{
		Use:   "window open|close",
		Short: "Let unknown machines load the recovery image beside the site's own DHCP server (boot mode proxy)",
		RunE: func(*cobra.Command, []string) error {
			return exitError{2, errors.New("boot window what? Want open or close")}
		},
	}
	window.AddCommand(bootWindowOpenCommand(), bootWindowCloseCommand())
	cmd.AddCommand(window)
	return cmd
}

func bootWindowOpenCommand() *cobra.Command {
	var (
		length time.Duration
		count  uint32
		reason string
	)
	cmd := &cobra.Command{Use: "open --for 1h --count 5", Short: "Let so many unknown machines boot, for so long", Args: noArgs}
	a := accessFlags(cmd)
	cmd.Flags().DurationVar(&length, "for", time.Hour, "how long")
	cmd.Flags().Uint32Var(&count, "count", 0, "how many machines")
	cmd.Flags().StringVar(&reason, "reason", "", "for the audit log")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if count == 0 || length < time.Second || length > 7*24*time.Hour {
			return exitError{2, errors.New("want --count of at least 1, and --for between 1s and 168h")}
		}
		return openWindow(cmd, a, uint32(length/time.Second), count, reason)
	}
	return cmd
}

func bootWindowCloseCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "close", Short: "End the window now", Args: noArgs}
	a := accessFlags(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error { return openWindow(cmd, a, 0, 0, "") }
	return cmd
}

func openWindow(cmd *cobra.Command, a *access, seconds, count uint32, reason string) error {
	c, err := a.connect()
	if err != nil {
		return err
	}
	out, err := c.OpenBootWindow(cmd.Context(), &musterv1.OpenBootWindowRequest{Seconds: seconds, Count: count, Reason: reason})
	if err != nil {
		return c.explain(err)
	}
	if out.Count == 0 {
		fmt.Fprintln(cmd.OutOrStdout(), "the window is closed")
		return nil
	}
	fmt.Fprintf(cmd.OutOrStdout(), "%d unknown machines may boot until %s\n", out.Count, stamp(out.Until.AsTime()))
	return nil
}
