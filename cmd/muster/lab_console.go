package main

import (
	"fmt"
	"net"
	"net/netip"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/muster-edge/muster/internal/netns"
	"github.com/muster-edge/muster/lab/scenario"
)

// labConsoleCommand lets a browser on this host look at the console of a lab's
// centre, which lives in a network of its own.
func labConsoleCommand() *cobra.Command {
	var listen string
	cmd := &cobra.Command{
		Use:   "console [NAME]",
		Short: "Open the console of a lab's centre to a browser on this host",
		Long: "Passes connections on to the console of the centre inside a lab, until Ctrl-C. It\n" +
			"listens on an address of this host itself (127.0.0.0/8 or ::1), nowhere else.",
		Example: "  muster lab console\n  muster lab console up-20260102-030405.000 --listen 127.0.0.1:9443",
		Args:    cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			at, err := netip.ParseAddrPort(listen)
			if err != nil || !at.Addr().IsLoopback() {
				return exitError{2, fmt.Errorf("--listen %q: want a loopback address and a port, such as 127.0.0.1:8443: whoever reaches it reaches the lab's centre", listen)}
			}
			r, rest, err := labArgs(args)
			if err != nil {
				return err
			}
			if len(rest) > 0 {
				return fmt.Errorf("there is no lab %q: `muster lab list --all` shows all", rest[0])
			}
			if !r.Alive() {
				return fmt.Errorf("%s is not running (muster lab up starts one)", r.Name)
			}
			ln, err := net.Listen("tcp", listen)
			if err != nil {
				return fmt.Errorf("%w (--listen takes another port)", err)
			}
			fmt.Fprintf(cmd.OutOrStdout(), `The console of %s: https://%s/
  Your browser asks about the certificate: it is the lab's own.
  Log in with the token in %s
  Ctrl-C ends this; the lab goes on.
`, r.Name, ln.Addr(), filepath.Join(r.Dir, scenario.CentreDir, "admin.yaml"))
			return netns.Forward(cmd.Context(), ln, r.PID, "127.0.0.1:7443", func(err error) {
				if !r.Alive() {
					err = fmt.Errorf("the lab has ended: %w", err)
				}
				fmt.Fprintln(cmd.ErrOrStderr(), "muster:", err)
			})
		},
	}
	cmd.Flags().StringVar(&listen, "listen", "127.0.0.1:8443", "where to listen, a loopback `address`")
	return cmd
}
