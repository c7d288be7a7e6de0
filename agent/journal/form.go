package journal

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"

	cb "github.com/muster-edge/muster/cluster-bootstrap"
	"github.com/muster-edge/muster/fleet"
)

// A copy is one line of text and a JSON object:
//
//	muster/journal/v1 GENERATION BYTES SHA-256\n
//	{...}\n
//
// The line says how long the object is and what it hashes to, so that a torn
// or altered copy is never read as a shorter truth. Unknown fields and later
// formats are refused: a program that does not know a field would drop it
// with its next write.

const (
	formatStem = "muster/journal/v"
	format     = formatStem + "1"
	// maxFile bounds a copy. The largest parts are the lists of servers and
	// addresses, both bounded by the size of a site.
	maxFile = 1 << 20
	// maxAddrs bounds the addresses that are kept.
	maxAddrs = 4096
)

// state is the content of the journal.
type state struct {
	Boots uint64  `json:"boots"`
	Disk  cb.Disk `json:"-"`
}

// The JSON names. Roles and phases are words, so that a change of the order
// of constants cannot turn one into another.
type (
	stateJSON struct {
		Boots  uint64                  `json:"boots"`
		Role   string                  `json:"role"`
		Record *cb.Record              `json:"record,omitempty"`
		Intent *intentJSON             `json:"intent,omitempty"`
		Ack    *claimJSON              `json:"ack,omitempty"`
		Step   *stepJSON               `json:"step,omitempty"`
		Lead   *leadJSON               `json:"lead,omitempty"`
		Reset  *resetJSON              `json:"reset,omitempty"`
		Aside  bool                    `json:"aside,omitempty"`
		Addrs  map[fleet.NodeID]string `json:"addrs,omitempty"`
	}
	intentJSON struct {
		UID  string             `json:"uid"`
		Boot string             `json:"boot"`
		Mode fleet.FoundingMode `json:"mode"`
	}
	claimJSON struct {
		Node  fleet.NodeID `json:"node"`
		Round uint64       `json:"round"`
		Token string       `json:"token"`
	}
	stepJSON struct {
		Plan    string       `json:"plan"`
		N       uint64       `json:"n"`
		Epoch   uint64       `json:"epoch"`
		Leader  fleet.NodeID `json:"leader"`
		Phase   string       `json:"phase"`
		Replace bool         `json:"replace,omitempty"`
	}
	leadJSON struct {
		Plan       string         `json:"plan"`
		Epoch      uint64         `json:"epoch"`
		Phase      string         `json:"phase"`
		Candidates []fleet.NodeID `json:"candidates"`
	}
	resetJSON struct {
		Plan     string `json:"plan,omitempty"`
		To       uint64 `json:"to"`
		Snapshot string `json:"snapshot,omitempty"`
		UID      string `json:"uid,omitempty"`
	}
)

var (
	roleWords = []string{cb.RoleNone: "none", cb.RoleWorker: "worker", cb.RoleCandidate: "candidate", cb.RoleServer: "server"}
	stepWords = []string{cb.StepPrepared: "prepared", cb.StepSwitched: "switched"}
	leadWords = []string{cb.LeadOpen: "open", cb.LeadConfirming: "confirming"}
)

func word(words []string, i int, what string) (string, error) {
	if i < len(words) && words[i] != "" {
		return words[i], nil
	}
	return "", fmt.Errorf("journal: write %s: %d has no name", what, i)
}

func unword(words []string, s, what string) (int, error) {
	for i, w := range words {
		if w == s && w != "" {
			return i, nil
		}
	}
	return 0, fmt.Errorf("%s %.40q is none of %s", what, s, strings.TrimSpace(strings.Join(words, " ")))
}

func (s state) encode(generation uint64) ([]byte, error) {
	d := s.Disk
	j := stateJSON{Boots: s.Boots, Record: d.Record, Aside: d.Aside, Addrs: d.Addrs}
	var err error
	if j.Role, err = word(roleWords, int(d.Role), "role"); err != nil {
		return nil, err
	}
	if d.Intent != nil {
		i := intentJSON(*d.Intent)
		j.Intent = &i
	}
	if d.Ack != nil {
		a := claimJSON(*d.Ack)
		j.Ack = &a
	}
	if x := d.Step; x != nil {
		j.Step = &stepJSON{Plan: x.Plan, N: x.N, Epoch: x.Epoch, Leader: x.Leader, Replace: x.Replace}
		if j.Step.Phase, err = word(stepWords, int(x.Phase), "step"); err != nil {
			return nil, err
		}
	}
	if x := d.Lead; x != nil {
		j.Lead = &leadJSON{Plan: x.Plan, Epoch: x.Epoch, Candidates: x.Candidates}
		if j.Lead.Phase, err = word(leadWords, int(x.Phase), "lead"); err != nil {
			return nil, err
		}
	}
	if d.Reset != nil {
		r := resetJSON(*d.Reset)
		j.Reset = &r
	}
	if len(d.Addrs) > maxAddrs {
		return nil, fmt.Errorf("journal: write: %d addresses, at most %d", len(d.Addrs), maxAddrs)
	}
	body, err := json.Marshal(j)
	if err != nil {
		return nil, fmt.Errorf("journal: write: %w", err)
	}
	body = append(body, '\n')
	sum := sha256.Sum256(body)
	head := fmt.Sprintf("%s %d %d %s\n", format, generation, len(body), hex.EncodeToString(sum[:]))
	if len(head)+len(body) > maxFile {
		return nil, fmt.Errorf("journal: write: %d bytes, at most %d", len(head)+len(body), maxFile)
	}
	return append([]byte(head), body...), nil
}

// decode reads a copy. Its error wraps ErrNewer if a newer program wrote it.
func decode(b []byte) (state, uint64, error) {
	if len(b) > maxFile {
		return state{}, 0, fmt.Errorf("%d bytes, at most %d", len(b), maxFile)
	}
	head, body, ok := bytes.Cut(b, []byte{'\n'})
	f := strings.Fields(string(head))
	if !ok || len(f) == 0 || !strings.HasPrefix(f[0], formatStem) {
		return state{}, 0, errors.New("it does not begin as a journal")
	}
	if f[0] != format {
		if n, err := strconv.ParseUint(strings.TrimPrefix(f[0], formatStem), 10, 32); err == nil && n > 1 {
			return state{}, 0, fmt.Errorf("%w: its form is %s, this program knows %s", ErrNewer, f[0], format)
		}
		return state{}, 0, errors.New("it does not begin as a journal")
	}
	if len(f) != 4 {
		return state{}, 0, errors.New("its first line is damaged")
	}
	generation, errG := strconv.ParseUint(f[1], 10, 64)
	size, errN := strconv.Atoi(f[2])
	sum := sha256.Sum256(body)
	if errG != nil || errN != nil || size != len(body) || f[3] != hex.EncodeToString(sum[:]) {
		return state{}, 0, errors.New("its checksum is wrong")
	}
	var j stateJSON
	d := json.NewDecoder(bytes.NewReader(body))
	d.DisallowUnknownFields()
	if err := d.Decode(&j); err != nil {
		// The checksum is right, so nobody damaged it.
		return state{}, 0, fmt.Errorf("%w: %w", ErrNewer, err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return state{}, 0, errors.New("something follows the object")
	}
	s, err := j.state()
	if err != nil {
		return state{}, 0, fmt.Errorf("%w: %w", ErrNewer, err)
	}
	return s, generation, nil
}

func (j stateJSON) state() (state, error) {
	s := state{Boots: j.Boots, Disk: cb.Disk{Record: j.Record, Aside: j.Aside, Addrs: j.Addrs}}
	role, err := unword(roleWords, j.Role, "role")
	if err != nil {
		return s, err
	}
	s.Disk.Role = cb.Role(role)
	if j.Intent != nil {
		i := cb.Intent(*j.Intent)
		s.Disk.Intent = &i
	}
	if j.Ack != nil {
		a := cb.Claim(*j.Ack)
		s.Disk.Ack = &a
	}
	if x := j.Step; x != nil {
		p, err := unword(stepWords, x.Phase, "step")
		if err != nil {
			return s, err
		}
		s.Disk.Step = &cb.Step{Plan: x.Plan, N: x.N, Epoch: x.Epoch, Leader: x.Leader, Phase: cb.StepPhase(p), Replace: x.Replace}
	}
	if x := j.Lead; x != nil {
		p, err := unword(leadWords, x.Phase, "lead")
		if err != nil {
			return s, err
		}
		s.Disk.Lead = &cb.Lead{Plan: x.Plan, Epoch: x.Epoch, Phase: cb.LeadPhase(p), Candidates: x.Candidates}
	}
	if j.Reset != nil {
		r := cb.Reset(*j.Reset)
		s.Disk.Reset = &r
	}
	return s, nil
}
