package main

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"net/url"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/muster-edge/muster/central"
	"github.com/muster-edge/muster/central/oidc"
	"github.com/muster-edge/muster/pxe"
	pxeserver "github.com/muster-edge/muster/pxe/server"
)

// serveSettings are the flags of `muster serve`.
type serveSettings struct {
	maxConns, maxConnsPerSource                                          int
	blobQuota                                                            int64
	data, operators, nodes, metrics                                      string
	oidc                                                                 string
	database, databaseFile                                               string
	advertise, releaseKeys                                               []string
	reportEvery                                                          time.Duration
	labUnknownBoot, labUnverified                                        bool
	bootInterface, bootMode, bootAddress, bootRange, bootHTTP, bootImage string
	bootHTTPS                                                            string
	bootHTTPSOnly                                                        bool
	logFormat, logLevel                                                  string
}

func (s *serveSettings) flags(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&s.data, "data", "", "directory of everything the centre keeps")
	f.StringVar(&s.database, "database", "", "`URL` of a PostgreSQL database instead of SQLite in --data: postgres://USER@HOST/DATABASE?sslmode=verify-full; with a password only by environment or file, never on the command line")
	f.StringVar(&s.databaseFile, "database-file", "", "`file` that holds the URL of the database (default: the file \"database\" in --data, if it is there)")
	f.StringVar(&s.operators, "listen-operators", ":7443", "address for operators")
	f.StringVar(&s.nodes, "listen-nodes", ":7444", "address for nodes; a load balancer in front must pass TLS through")
	f.StringVar(&s.metrics, "metrics", "127.0.0.1:7490", "address for Prometheus metrics and health; \"-\" for none")
	f.StringSliceVar(&s.advertise, "advertise", nil, "further host names and addresses of the centre, for its TLS certificate")
	f.StringSliceVar(&s.releaseKeys, "release-key", nil, "PEM file with a public release key to trust; may be repeated")
	f.StringVar(&s.oidc, "oidc", "", "YAML `file` about the identity provider at which people log in; its secret is in a file of its own")
	f.DurationVar(&s.reportEvery, "report-every", time.Minute, "how often nodes shall call")
	f.IntVar(&s.maxConns, "max-conns", 8192, "most open connections of an endpoint")
	f.IntVar(&s.maxConnsPerSource, "max-conns-per-source", 1024, "most open connections from one address; behind a load balancer that hides addresses, as --max-conns")
	f.Int64Var(&s.blobQuota, "blob-quota", 64<<30, "most bytes of image files and charts to keep")
	f.BoolVar(&s.labUnknownBoot, "lab-allow-unknown-boot", false, "let people approve machines of a lab tenant whose boot is not proved")
	f.BoolVar(&s.labUnverified, "lab-allow-unverified", false, "let people approve machines of a lab tenant whose TPM nobody vouches for")
	f.StringVar(&s.bootInterface, "boot-interface", "", "serve network boot on this interface")
	f.StringVar(&s.bootMode, "boot-mode", "proxy", "full (lease addresses too), proxy (beside the site's DHCP server) or off (files only)")
	f.StringVar(&s.bootAddress, "boot-address", "", "our address on the boot interface and its network, with what to lease in mode full: 10.77.0.1/24,10.77.0.100-10.77.0.199")
	f.StringVar(&s.bootRange, "boot-range", "", "addresses to lease in mode full: FIRST-LAST")
	f.StringVar(&s.bootHTTP, "boot-http", ":7480", "address for UEFI HTTP boot; \"-\" for none")
	f.StringVar(&s.bootHTTPS, "boot-https", "", "address for UEFI HTTPS boot, such as :7481; its CA, to enrol in firmware, is boot/https-ca.pem in the data directory")
	f.BoolVar(&s.bootHTTPSOnly, "boot-https-only", false, "give HTTP boot clients no plain URL, even when they do not take the https one")
	f.StringVar(&s.bootImage, "boot-image", "", "`directory` written by muster image recovery")
	f.StringVar(&s.logFormat, "log-format", "text", "text or json")
	f.StringVar(&s.logLevel, "log-level", "info", "debug, info, warn or error")
}

// serveCommand is `muster serve`: the centre.
func serveCommand() *cobra.Command {
	var (
		s    serveSettings
		file string
	)
	cmd := &cobra.Command{
		Use:   "serve --data DIR",
		Short: "Run the centre: enrollment, approval, certificates; with --boot-interface also network boot",
		Long: `Runs the centre. It needs a directory and nothing else; the first start makes
the certificate authority, the database and DIR/admin.yaml (mode 0600), with
which other muster commands reach it.

Every flag is also a setting: --listen-nodes is MUSTER_LISTEN_NODES in the
environment and listen-nodes in the YAML file of --config. A flag wins over
the environment, the environment over the file. ` + "`muster config show`" + ` prints what holds.`,
		Example: `  muster serve --data /var/lib/muster --advertise centre.example
  muster serve --data /var/lib/muster --boot-interface eth1 --boot-mode full \
      --boot-address 10.77.0.1/24 --boot-range 10.77.0.100-10.77.0.199 --boot-image out`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if _, err := resolve(cmd, serveConfigFile(file)); err != nil {
				return err
			}
			cfg, err := s.config(cmd)
			if err != nil {
				return err
			}
			srv, err := central.New(cmd.Context(), cfg)
			if errors.Is(err, central.ErrRunning) {
				return exitError{3, err}
			}
			if err != nil {
				return err
			}
			return srv.Run(cmd.Context())
		},
	}
	s.flags(cmd)
	cmd.Flags().StringVar(&file, "config", "", "YAML file with settings (default: $MUSTER_SERVE_CONFIG)")
	return cmd
}

// serveConfigFile is apart from the client's file, which holds a token.
func serveConfigFile(flag string) string {
	if flag != "" {
		return flag
	}
	return os.Getenv("MUSTER_SERVE_CONFIG")
}

func (s *serveSettings) config(cmd *cobra.Command) (central.Config, error) {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	cfg := central.Config{
		Data: s.data, Database: s.database, Operators: s.operators, Nodes: s.nodes, Metrics: s.metrics, Advertise: s.advertise,
		LabUnknownBoot: s.labUnknownBoot, LabUnverified: s.labUnverified, ReportEvery: s.reportEvery, Version: version,
		MaxConns: s.maxConns, MaxConnsPerSource: s.maxConnsPerSource, BlobQuota: s.blobQuota,
	}
	if s.data == "" {
		bad("--data DIR is missing: the centre needs a directory to keep things in")
	}
	if u, err := url.Parse(s.database); s.database != "" && cmd.Flags().Changed("database") && (err != nil || hasPassword(u)) {
		bad("--database: everybody on this host can read command lines: put a URL with a password into the file %s/%s (mode 0600), or into MUSTER_DATABASE", s.data, central.DatabaseFile)
	}
	if s.databaseFile != "" {
		b, err := os.ReadFile(s.databaseFile)
		switch {
		case err != nil:
			bad("--database-file: %w", err)
		case s.database != "":
			bad("--database and --database-file exclude each other")
		default:
			cfg.Database = strings.TrimSpace(string(b))
		}
	}
	for _, name := range s.releaseKeys {
		b, err := os.ReadFile(name)
		if err != nil {
			bad("--release-key: %w", err)
			continue
		}
		cfg.ReleaseKeys = append(cfg.ReleaseKeys, b)
	}
	if s.oidc != "" {
		provider, err := oidc.Load(s.oidc)
		if err != nil {
			bad("--oidc: %w", err)
		}
		cfg.OIDC = provider
	}
	var level slog.Level
	if err := level.UnmarshalText([]byte(s.logLevel)); err != nil {
		bad("--log-level %q: want debug, info, warn or error", s.logLevel)
	}
	options := &slog.HandlerOptions{Level: level}
	switch s.logFormat {
	case "text":
		cfg.Log = slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), options))
	case "json":
		cfg.Log = slog.New(slog.NewJSONHandler(cmd.ErrOrStderr(), options))
	default:
		bad("--log-format %q: want text or json", s.logFormat)
	}
	if s.bootInterface != "" {
		boot, err := s.boot()
		if err != nil {
			errs = append(errs, err)
		}
		cfg.Boot = boot
	}
	out := cmd.OutOrStdout()
	cfg.Ready = func(a central.Addresses) {
		fmt.Fprintf(out, "muster serves: operators %s, nodes %s; administrator's access: %s\n", a.Operators, a.Nodes, s.data+"/"+central.AdminFile)
		notifyReady()
	}
	if err := errors.Join(errs...); err != nil {
		return cfg, exitError{2, err}
	}
	return cfg, nil
}

func hasPassword(u *url.URL) bool {
	_, in := u.User.Password()
	return in || u.Query().Has("password") || u.Scheme == ""
}

func (s *serveSettings) boot() (*central.BootConfig, error) {
	b := &central.BootConfig{Interface: s.bootInterface, HTTP: s.bootHTTP, HTTPS: s.bootHTTPS, HTTPSOnly: s.bootHTTPSOnly, Image: s.bootImage}
	switch s.bootMode {
	case "full":
		b.Mode = pxe.ModeFull
	case "proxy":
		b.Mode = pxe.ModeProxy
	case "off":
		b.Mode = pxe.ModeOff
	default:
		return nil, fmt.Errorf("--boot-mode %q: want full, proxy or off", s.bootMode)
	}
	address, lease, _ := strings.Cut(s.bootAddress, ",")
	if lease == "" {
		lease = s.bootRange
	}
	var err error
	if address != "" {
		if b.Address, err = netip.ParsePrefix(strings.TrimSpace(address)); err != nil {
			return nil, fmt.Errorf("--boot-address %q: want an address with the network's length, such as 10.77.0.1/24", address)
		}
	}
	if lease != "" {
		if b.Range, err = pxeserver.ParseRange(lease); err != nil {
			return nil, fmt.Errorf("--boot-range: %w", err)
		}
	}
	return b, nil
}

// notifyReady tells systemd that we serve (sd_notify(3)), if it asked.
func notifyReady() {
	name := os.Getenv("NOTIFY_SOCKET")
	if name == "" {
		return
	}
	conn, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: strings.Replace(name, "@", "\x00", 1), Net: "unixgram"})
	if err != nil {
		return // nobody listens: systemd will find out by its timeout
	}
	defer conn.Close()
	_, _ = conn.Write([]byte("READY=1"))
}
