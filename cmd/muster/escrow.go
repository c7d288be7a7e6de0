package main

import (
	"bytes"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/muster-edge/muster/api"
	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/escrow"
	"github.com/muster-edge/muster/fleet/statement"
)

// escrowCommand is `muster escrow ...`.
func escrowCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "escrow",
		Short: "Sealed snapshots of the sites, and the key that opens them",
		Long: `Sites seal snapshots of their cluster, with the token that restoring one takes,
to a public key and give them to the centre. The private key stays with you: the
centre cannot open them. Keep it offline, with a copy in another place.`,
	}
	cmd.AddCommand(escrowKeygenCommand(), escrowTrustCommand(), escrowListCommand(), escrowFetchCommand(), escrowOpenCommand())
	return cmd
}

func escrowKeygenCommand() *cobra.Command {
	var out string
	cmd := &cobra.Command{
		Use:     "keygen --out FILE",
		Short:   "Make an escrow key: FILE (private, keep it offline) and FILE.pub",
		Example: "  muster escrow keygen --out /media/stick/escrow.key\n  muster escrow trust /media/stick/escrow.key.pub --reason 'first key' --yes",
		Args:    noArgs,
	}
	cmd.Flags().StringVar(&out, "out", "", "where the private key goes; it must not be there yet")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if out == "" {
			return exitError{2, errors.New("--out FILE is missing")}
		}
		private, public, err := escrow.GenerateKey()
		if err != nil {
			return err
		}
		secret, err := escrow.MarshalPrivate(private)
		if err != nil {
			return err
		}
		open, err := escrow.MarshalPublic(public)
		if err != nil {
			return err
		}
		if err := createFile(out, secret, 0o600); err != nil {
			return err
		}
		if err := createFile(out+".pub", open, 0o644); err != nil {
			return err
		}
		fmt.Fprintf(cmd.OutOrStdout(), "escrow key %s: private %s, public %s.pub\n", escrow.KeyID(public), out, out)
		return nil
	}
	return cmd
}

// createFile writes a file that is not there yet, and flushes it.
func createFile(name string, b []byte, mode os.FileMode) error {
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if err != nil {
		return exitError{3, err}
	}
	_, err = f.Write(b)
	return errors.Join(err, f.Sync(), f.Close())
}

func escrowTrustCommand() *cobra.Command {
	var (
		reason string
		yes    bool
	)
	cmd := &cobra.Command{
		Use:   "trust FILE.pub --reason TEXT --yes",
		Short: "Let all sites seal their snapshots to this key; \"none\" ends escrow",
		Long: `The key goes into every site's charter. What was sealed before stays sealed to
the key before: keep that one as long as you keep those snapshots.`,
		Args: oneArg("want the public key that `muster escrow keygen` wrote, or none"),
	}
	a := accessFlags(cmd)
	cmd.Flags().StringVar(&reason, "reason", "", "for the audit log")
	cmd.Flags().BoolVar(&yes, "yes", false, "do it")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if strings.TrimSpace(reason) == "" {
			return exitError{2, errors.New("--reason TEXT is missing: the audit log keeps why")}
		}
		var key []byte
		sentence := "No site puts snapshots into escrow any more."
		if args[0] != "none" {
			text, err := os.ReadFile(args[0])
			if err != nil {
				return exitError{3, err}
			}
			if key, err = escrow.ParsePublic(text); err != nil {
				return exitError{2, fmt.Errorf("%s: %w", args[0], err)}
			}
			sentence = fmt.Sprintf("All sites seal their snapshots to key %s from now on: only who has its private half can open them.", escrow.KeyID(key))
		}
		if err := agreed(cmd, yes, sentence, nil); err != nil {
			return err
		}
		c, err := a.connect()
		if err != nil {
			return err
		}
		out, err := c.TrustEscrowKey(cmd.Context(), &musterv1.TrustEscrowKeyRequest{Key: key, Reason: reason})
		if err != nil {
			return c.explain(err)
		}
		if !out.Changed {
			fmt.Fprintln(cmd.OutOrStdout(), "it is so already")
			return nil
		}
		fmt.Fprintf(cmd.OutOrStdout(), "the escrow key is %s\n", keyName(key))
		return nil
	}
	return cmd
}

func keyName(key []byte) string {
	if len(key) == 0 {
		return "none"
	}
	return escrow.KeyID(key)
}

func escrowListCommand() *cobra.Command {
	var site string
	cmd := listing("list", "List the sealed snapshots that the centre keeps", nil,
		func(cmd *cobra.Command, c *centre) (any, table, error) {
			out, err := c.ListEscrow(cmd.Context(), &musterv1.ListEscrowRequest{Site: site})
			if err != nil {
				return nil, table{}, err
			}
			now := time.Now()
			blobs := []fleet.EscrowBlob{}
			t := table{
				lab: out.Lab, columns: []string{"ID", "KIND", "SITE", "CLUSTER", "EPOCH", "TAKEN", "SIZE", "KEY", "FROM", "FOR"}, empty: "no sealed snapshots",
			}
			for _, m := range out.Blobs {
				b, err := api.EscrowBlobFromProto(m)
				if err != nil {
					return nil, table{}, err
				}
				blobs = append(blobs, b)
				from := fleet.Words(b.Node)
				if b.For != "" {
					from = "an operator"
				}
				kind, epoch := "snapshot", fmt.Sprint(b.Epoch)
				if b.Kind != escrow.KindSnapshot {
					kind, epoch = b.Kind, ""
				}
				t.rows = append(t.rows, []string{b.ID, kind, b.Site, b.Cluster, epoch, ago(now, b.Taken) + " ago", fmt.Sprintf("%.1f MB", float64(b.Size)/1e6), b.KeyID, from, fleet.Words(b.For)})
				t.names = append(t.names, "escrow/"+b.ID)
			}
			return blobs, t, nil
		})
	cmd.Flags().StringVar(&site, "site", "", "only those of this site")
	return cmd
}

func escrowFetchCommand() *cobra.Command {
	var out string
	cmd := &cobra.Command{
		Use:   "fetch ID --out FILE",
		Short: "Copy a sealed snapshot from the centre to a file, still sealed",
		Args:  oneArg("which? `muster escrow list` lists them"),
	}
	a := accessFlags(cmd)
	cmd.Flags().StringVar(&out, "out", "", "the file; it must not be there yet")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if out == "" {
			return exitError{2, errors.New("--out FILE is missing")}
		}
		c, err := a.connect()
		if err != nil {
			return err
		}
		b, err := fetchBlob(cmd, c, args[0], out)
		if err != nil {
			return c.explain(err)
		}
		what := "snapshot of cluster " + b.Cluster
		if b.Kind == escrow.KindDiskKey {
			what = "recovery key of the disk of " + fleet.Words(b.Node)
		}
		fmt.Fprintf(cmd.OutOrStdout(), "%s: %s at site %s, sealed to key %s\n", out, cell(what), cell(b.Site), cell(b.KeyID))
		return nil
	}
	return cmd
}

// fetchBlob writes a blob to a new file and checks that it is the one its ID
// names. What does not check is removed.
func fetchBlob(cmd *cobra.Command, c *centre, id, file string) (b fleet.EscrowBlob, err error) {
	stream, err := c.FetchEscrow(cmd.Context(), &musterv1.FetchEscrowRequest{Id: strings.TrimPrefix(id, "escrow/")})
	if err != nil {
		return b, err
	}
	defer stream.Close() //nolint:errcheck // it was read to its end or failed
	if !stream.Receive() {
		return b, errors.Join(stream.Err(), errors.New("the centre sent nothing"))
	}
	if b, err = api.EscrowBlobFromProto(stream.Msg().GetBlob()); err != nil {
		return b, err
	}
	f, err := os.OpenFile(file, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return b, exitError{3, err}
	}
	defer func() {
		if err = errors.Join(err, f.Close()); err != nil {
			err = errors.Join(err, os.Remove(file))
		}
	}()
	sum := sha256.New()
	var n int64
	for stream.Receive() {
		p := stream.Msg().GetData()
		if n += int64(len(p)); n > escrow.MaxBlob {
			return b, errors.New("the centre sends more than a blob can have")
		}
		sum.Write(p)
		if _, err := f.Write(p); err != nil {
			return b, err
		}
	}
	if err := stream.Err(); err != nil {
		return b, err
	}
	if got := fleet.EscrowID([32]byte(sum.Sum(nil))); got != b.ID || b.ID != strings.TrimPrefix(id, "escrow/") {
		return b, fmt.Errorf("the centre sent %s instead of %s: it is damaged there", got, id)
	}
	return b, f.Sync()
}

func escrowOpenCommand() *cobra.Command {
	var keyFile, out, forNode, nodeKey, reason string
	var yes bool
	cmd := &cobra.Command{
		Use:   "open ID|FILE --key FILE (--out DIR | --for NODE --reason TEXT --yes)",
		Short: "Open a sealed snapshot into a directory, or hand it over to one node",
		Long: `With --out, snapshot and token are written to a new directory (0700): both are
secrets, and whoever has them has the cluster.

The recovery key of a node's disk (kind disk-key) is written to a new file (0600),
and shown nowhere: it unlocks that node's data (muster-node data unlock).

With --for, the snapshot is sealed anew, to a key that the node offers and has
signed, and given to the centre for it; nothing readable touches a disk. The node
takes it when it is ordered to (` + "`muster order restore`" + `). The key is told by the
centre: to rule out that it lies, compare the node's key on the node's own
screen (muster-node status) and give it as --node-key.`,
		Example: `  muster escrow open e-abc --key escrow.key --for "amber canoe" --reason 'all servers burnt' --yes
  muster escrow open snapshot.sealed --key escrow.key --out /run/opened`,
		Args: oneArg("which? `muster escrow list` lists them"),
	}
	a := accessFlags(cmd)
	cmd.Flags().StringVar(&keyFile, "key", "", "private escrow key")
	cmd.Flags().StringVar(&out, "out", "", "new directory for snapshot and token; new file for a disk key")
	cmd.Flags().StringVar(&forNode, "for", "", "the node that shall restore it")
	cmd.Flags().StringVar(&nodeKey, "node-key", "", "SHA-256 of the node's key (hex) as its own screen shows it")
	cmd.Flags().StringVar(&reason, "reason", "", "with --for: for the audit log")
	cmd.Flags().BoolVar(&yes, "yes", false, "with --for: do it")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if keyFile == "" || (out == "") == (forNode == "") {
			return exitError{2, errors.New("--key FILE is needed, and either --out DIR or --for NODE")}
		}
		if forNode != "" && strings.TrimSpace(reason) == "" {
			return exitError{2, errors.New("--reason TEXT is missing: the audit log keeps why")}
		}
		private, err := readEscrowKey(keyFile)
		if err != nil {
			return err
		}
		dir, err := os.MkdirTemp("", "muster-escrow-")
		if err != nil {
			return exitError{3, err}
		}
		defer os.RemoveAll(dir) // only sealed bytes are in it
		file := args[0]
		if _, err := os.Stat(file); err != nil || fleet.ValidateEscrowID(file) == nil {
			c, err := a.connect()
			if err != nil {
				return err
			}
			file = filepath.Join(dir, "sealed")
			if _, err := fetchBlob(cmd, c, args[0], file); err != nil {
				return c.explain(err)
			}
		}
		if out != "" {
			return openTo(cmd, file, private, out)
		}
		c, err := a.connect()
		if err != nil {
			return err
		}
		return c.explain(handOver(cmd, c, handing{file: file, dir: dir, private: private, node: forNode, pin: nodeKey, reason: reason, yes: yes}))
	}
	return cmd
}

func readEscrowKey(file string) ([]byte, error) {
	info, err := os.Stat(file)
	if err != nil {
		return nil, exitError{3, err}
	}
	if info.Mode().Perm()&0o077 != 0 {
		return nil, exitError{3, fmt.Errorf("%s opens every snapshot and others may read it (mode %04o): chmod 600 it", file, info.Mode().Perm())}
	}
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, exitError{3, err}
	}
	private, err := escrow.ParsePrivate(text)
	if err != nil {
		return nil, exitError{2, fmt.Errorf("%s: %w", file, err)}
	}
	return private, nil
}

// openTo writes what is in a blob to a new directory, or nothing at all.
func openTo(cmd *cobra.Command, file string, private []byte, dir string) (err error) {
	src, err := os.Open(file)
	if err != nil {
		return exitError{3, err}
	}
	defer src.Close()
	head, err := escrow.Inspect(src)
	if err != nil {
		return err
	}
	if _, err := src.Seek(0, io.SeekStart); err != nil {
		return err
	}
	if head.Kind == escrow.KindDiskKey {
		return openDiskKey(cmd, src, private, dir)
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		return exitError{3, err}
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(dir))
		}
	}()
	part := filepath.Join(dir, "snapshot.part")
	f, err := os.OpenFile(part, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return exitError{3, err}
	}
	h, c, err := escrow.OpenSnapshot(f, src, private)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Rename(part, filepath.Join(dir, c.Name)); err != nil {
		return err
	}
	if err := createFile(filepath.Join(dir, "token"), []byte(c.Token+"\n"), 0o600); err != nil {
		return err
	}
	about, err := json.MarshalIndent(h, "", "  ")
	if err != nil {
		return err
	}
	if err := createFile(filepath.Join(dir, "about.json"), append(about, '\n'), 0o600); err != nil {
		return err
	}
	fmt.Fprintf(cmd.OutOrStdout(), "%s: snapshot %s of cluster %s at site %s (epoch %d, taken %s) and its token; delete them when you are done\n",
		dir, cell(c.Name), cell(h.Cluster), cell(h.Site), h.Epoch, stamp(h.Taken))
	return nil
}

// openDiskKey writes the recovery key of a node's disk to a new file.
func openDiskKey(cmd *cobra.Command, src io.Reader, private []byte, file string) error {
	var key bytes.Buffer
	h, err := escrow.Open(&key, io.LimitReader(src, escrow.MaxDiskKey), private)
	if err != nil {
		return err
	}
	defer func() { clear(key.Bytes()) }()
	if err := createFile(file, key.Bytes(), 0o600); err != nil {
		return err
	}
	fmt.Fprintf(cmd.OutOrStdout(), "%s: recovery key of the disk of %s (%s) at site %s, made %s; delete it when you are done\n",
		file, cell(fleet.Words(h.Node)), h.Node, cell(h.Site), stamp(h.Taken))
	return nil
}

// handing is what handing a snapshot over takes.
type handing struct {
	file, dir, node, pin, reason string
	private                      []byte
	yes                          bool
}

func handOver(cmd *cobra.Command, c *centre, h handing) error {
	n, err := c.GetNode(cmd.Context(), &musterv1.GetNodeRequest{Id: h.node})
	if err != nil {
		return err
	}
	public, fingerprint, err := offeredKey(n, h.pin)
	if err != nil {
		return err
	}
	src, err := os.Open(h.file)
	if err != nil {
		return exitError{3, err}
	}
	defer src.Close()
	head, err := escrow.Inspect(src)
	if err != nil {
		return err
	}
	if head.Kind != escrow.KindSnapshot {
		return exitError{2, errors.New("only snapshots are handed over: open a disk key with --out FILE, and type it at the box (muster-node data unlock)")}
	}
	if _, err := src.Seek(0, io.SeekStart); err != nil {
		return err
	}
	sentence := fmt.Sprintf("The snapshot of cluster %s (site %s, epoch %d, taken %s) is given to %s, which can then read all of it.",
		head.Cluster, head.Site, head.Epoch, stamp(head.Taken), n.Node.Words)
	var notes []string
	if h.pin == "" {
		notes = append(notes, "the node's key is "+fingerprint+" by the centre's word; compare it on the node's screen and give it as --node-key")
	}
	if err := agreed(cmd, h.yes, sentence, notes); err != nil {
		return err
	}
	resealed := filepath.Join(h.dir, "resealed")
	f, err := os.OpenFile(resealed, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return exitError{3, err}
	}
	defer f.Close()
	sum := sha256.New()
	if _, err := escrow.Reseal(io.MultiWriter(f, sum), src, h.private, public); err != nil {
		return err
	}
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return err
	}
	stream, err := c.PutHandover(cmd.Context())
	if err != nil {
		return err
	}
	sendErr := stream.Send(&musterv1.PutHandoverRequest{Part: &musterv1.PutHandoverRequest_Header{Header: &musterv1.HandoverHeader{
		Node: n.Node.Id, Sha256: sum.Sum(nil), Size: size, Cluster: head.Cluster, Epoch: head.Epoch, Reason: h.reason, Key: public,
	}}})
	for buf := make([]byte, 128<<10); sendErr == nil; {
		k, err := f.Read(buf)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		sendErr = stream.Send(&musterv1.PutHandoverRequest{Part: &musterv1.PutHandoverRequest_Data{Data: bytes.Clone(buf[:k])}})
	}
	// What the centre says counts more than that it stopped reading.
	out, err := stream.CloseAndReceive()
	if err != nil {
		return err
	}
	if sendErr != nil && !errors.Is(sendErr, io.EOF) {
		return sendErr
	}
	b := out.GetBlob()
	fmt.Fprintf(cmd.OutOrStdout(), "snapshot %s waits for %s; now: muster order restore %s --site %s --snapshot %s --reason TEXT\n", b.GetId(), cell(n.Node.Words), n.Node.Id, b.GetSite(), b.GetId())
	return nil
}

// offeredKey returns the key that the node itself signed, and the fingerprint
// of the key it signed with.
func offeredKey(n *musterv1.GetNodeResponse, pin string) (public []byte, fingerprint string, err error) {
	if len(n.GetReport().GetOffered()) == 0 {
		return nil, "", fmt.Errorf("node %s offers no key yet: its agent does so with a report when it waits for a restore", n.GetNode().GetId())
	}
	key, err := x509.ParsePKIXPublicKey(n.GetLdevidPublic())
	if err != nil {
		return nil, "", fmt.Errorf("the centre knows no key of node %s", n.GetNode().GetId())
	}
	if fingerprint, err = statement.KeyID(key); err != nil {
		return nil, "", err
	}
	if want := strings.ToLower(strings.ReplaceAll(pin, ":", "")); pin != "" && want != fingerprint {
		return nil, "", fmt.Errorf("the centre says that the node's key is %s, its screen says %s: do not go on, and find out who lies", fingerprint, want)
	}
	if hex.EncodeToString(n.GetNode().GetLdevidKey()) != fingerprint {
		return nil, "", errors.New("the centre contradicts itself about the node's key")
	}
	payload, err := statement.Verify(n.GetReport().GetOffered(), fleet.EscrowOfferPayload, []crypto.PublicKey{key})
	if err != nil {
		return nil, "", fmt.Errorf("the offered key is not signed by the node: %w", err)
	}
	var o fleet.EscrowOffer
	if err := json.Unmarshal(payload, &o); err != nil {
		return nil, "", fmt.Errorf("the node's offer is not understood: %w", err)
	}
	if err := o.Validate(); err != nil {
		return nil, "", err
	}
	if string(o.Node) != n.GetNode().GetId() || o.Site != n.GetNode().GetSite() {
		return nil, "", errors.New("the offer is another node's")
	}
	return o.Key, fingerprint, nil
}
