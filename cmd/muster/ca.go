package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/google/renameio/v2"
	"github.com/spf13/cobra"

	"github.com/muster-edge/muster/central"
	"github.com/muster-edge/muster/pki/stepca"
)

// caCommand is `muster ca init|export|rotate`: work on the data directory of the
// centre's host.
func caCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "ca init|export|rotate",
		Short: "The centre's certificate authority",
		RunE: func(*cobra.Command, []string) error {
			return exitError{2, errors.New("ca what? Want init, export or rotate")}
		},
	}
	cmd.AddCommand(caInitCommand(), caExportCommand(), caRotateCommand())
	return cmd
}

func caInitCommand() *cobra.Command {
	var data, name string
	cmd := &cobra.Command{
		Use:   "init --data DIR",
		Short: "Make the certificate authority before the first `muster serve`",
		Long: `Makes DIR/ca: a root CA, a node CA and a server CA. ` + "`muster serve`" + ` does the same
at its first start; do it beforehand to build a recovery image first. An
authority that is there is left as it is.`,
		Args: noArgs,
	}
	cmd.Flags().StringVar(&data, "data", "", "the centre's data directory")
	cmd.Flags().StringVar(&name, "name", "", "name of the organisation in the CA certificates")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if data == "" {
			return exitError{2, errors.New("--data DIR is missing")}
		}
		l, err := central.OpenLocal(cmd.Context(), data, time.Now())
		if errors.Is(err, central.ErrRunning) {
			return exitError{3, fmt.Errorf("%w; it made its authority at its first start", err)}
		}
		if err != nil {
			return err
		}
		created, err := l.InitAuthority(cmd.Context(), name, time.Now())
		if err := errors.Join(err, l.Close()); err != nil {
			return err
		}
		if !created {
			fmt.Fprintf(cmd.OutOrStdout(), "%s has an authority already; nothing was changed\n", data)
			return nil
		}
		fmt.Fprintf(cmd.OutOrStdout(), "made %s; `muster ca export --data %s` writes what images need\n", filepath.Join(data, "ca"), data)
		return nil
	}
	return cmd
}

func caExportCommand() *cobra.Command {
	var data, out, tenant string
	cmd := &cobra.Command{
		Use:   "export --data DIR [--out DIR2]",
		Short: "Write the public keys that recovery images carry",
		Long: `Without --out, prints the root CA certificate. With it, writes root-ca.pem and
orders.pub.pem (the tenant's public orders key) into DIR2, for
` + "`muster image recovery --root-ca DIR2/root-ca.pem --orders-key DIR2/orders.pub.pem`" + `.
No secret is among them.`,
		Args: noArgs,
	}
	cmd.Flags().StringVar(&data, "data", "", "the centre's data directory")
	cmd.Flags().StringVar(&out, "out", "", "directory to write to; it is created")
	cmd.Flags().StringVar(&tenant, "tenant", central.DefaultTenant, "tenant whose orders key is written")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if data == "" {
			return exitError{2, errors.New("--data DIR is missing")}
		}
		ca, err := stepca.Open(data)
		if errors.Is(err, os.ErrNotExist) {
			return exitError{3, fmt.Errorf("%s holds no authority: `muster ca init --data %s` makes one", data, data)}
		}
		if err != nil {
			return err
		}
		if out == "" {
			_, err := cmd.OutOrStdout().Write(ca.RootsPEM())
			return err
		}
		orders, err := ca.OrdersPublicPEM(tenant)
		if err != nil {
			return err
		}
		if err := os.MkdirAll(out, 0o755); err != nil {
			return fmt.Errorf("write export: %w", err)
		}
		for name, b := range map[string][]byte{"root-ca.pem": ca.RootsPEM(), "orders.pub.pem": orders} {
			if err := renameio.WriteFile(filepath.Join(out, name), b, 0o644); err != nil {
				return fmt.Errorf("write export: %w", err)
			}
		}
		fmt.Fprintf(cmd.OutOrStdout(), "wrote %s and %s\n", filepath.Join(out, "root-ca.pem"), filepath.Join(out, "orders.pub.pem"))
		return nil
	}
	return cmd
}
