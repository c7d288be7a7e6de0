package fleet

import (
	"encoding/json"
	"time"
)

// EventLevel says how much an event should disturb a person.
type EventLevel uint8

const (
	EventInfo EventLevel = iota
	EventWarning
	EventAlarm
)

var eventLevelNames = [...]string{"info", "warning", "alarm"}

// String returns the word used in the CLI, the API and the console.
func (l EventLevel) String() string { return name(eventLevelNames[:], int(l), "event level") }

// MarshalText implements encoding.TextMarshaler.
func (l EventLevel) MarshalText() ([]byte, error) {
	return marshal(eventLevelNames[:], int(l), "event level")
}

// UnmarshalText implements encoding.TextUnmarshaler.
func (l *EventLevel) UnmarshalText(b []byte) error {
	i, err := unmarshal(eventLevelNames[:], b, "event level")
	if err == nil {
		*l = EventLevel(i)
	}
	return err
}

// Event is one thing that happened, for the people who watch. Events may be
// lost or thinned out; what must not be lost is an AuditRecord.
type Event struct {
	Tenant string `json:"tenant"`
	// Seq grows by one per event of the centre; 0 before it is stored.
	Seq   uint64     `json:"seq,omitempty"`
	Time  time.Time  `json:"time"`
	Level EventLevel `json:"level"`
	// Kind is a dotted word, source first: "pxe.served", "request.pending".
	Kind string `json:"kind"`
	// Node, Request, Site and MAC say whom it is about, as far as known.
	Node    NodeID    `json:"node,omitempty"`
	Request RequestID `json:"request,omitempty"`
	Site    string    `json:"site,omitempty"`
	MAC     string    `json:"mac,omitempty"`
	// Text is one sentence for a person. It may quote cleaned claims.
	Text   string            `json:"text"`
	Fields map[string]string `json:"fields,omitempty"`
}

const maxEventFields = 32

// Validate reports all problems of the event.
func (e Event) Validate() error {
	var p problems
	p.add(ValidateName("tenant", e.Tenant))
	p.check(int(e.Level) < len(eventLevelNames), "level %d does not exist", e.Level)
	p.check(kindForm(e.Kind), "kind %q: want dotted words a-z, 0-9 and '-'", clip(e.Kind, 80))
	p.check(!e.Time.IsZero(), "time is not set")
	if e.Node != "" {
		p.add(e.Node.Validate())
	}
	if e.Request != "" {
		p.add(e.Request.Validate())
	}
	if e.Site != "" {
		p.add(ValidateName("site", e.Site))
	}
	p.text("MAC", e.MAC)
	p.text("text", e.Text)
	p.check(len(e.Fields) <= maxEventFields, "%d fields, at most %d are allowed", len(e.Fields), maxEventFields)
	return p.err("event")
}

// kindForm reports whether s is dotted lower-case words.
func kindForm(s string) bool {
	word := 0
	for i := range len(s) {
		switch c := s[i]; {
		case c >= 'a' && c <= 'z', c >= '0' && c <= '9':
			word++
		case (c == '-' || c == '.') && word > 0:
			word = 0
		default:
			return false
		}
	}
	return word > 0 && len(s) <= 64
}

// AuditKind names the act of an AuditRecord: "request.approved". Package
// audit lists all of them.
type AuditKind string

// AuditRecord is one link of a tenant's audit chain: who did what to which
// object, from where, and why. Package audit makes, checks, reads and writes
// chains.
type AuditRecord struct {
	// Seq starts at 1 and grows by 1 in each tenant.
	Seq    uint64 `json:"seq"`
	Tenant string `json:"tenant"`
	// Time is UTC.
	Time time.Time `json:"time"`
	// Actor is "user:NAME", "node:ID", "rule:NAME" or "system".
	Actor string `json:"actor"`
	// Source is the network address the act came from, "" if local.
	Source string    `json:"source,omitempty"`
	Kind   AuditKind `json:"kind"`
	// Object is "KIND/NAME": "request/r-...", "node/n-...".
	Object string `json:"object"`
	// Before and After are the object, or what changed of it, as JSON in the
	// form that audit.CanonicalJSON gives; nil when there is none.
	Before json.RawMessage `json:"before,omitempty"`
	After  json.RawMessage `json:"after,omitempty"`
	Reason string          `json:"reason,omitempty"`
	// Prev is the Hash of record Seq-1; for Seq 1 it is all zero.
	Prev Digest `json:"prev"`
	Hash Digest `json:"hash"`
}

// MaxAuditJSON bounds Before and After of an AuditRecord, in bytes each.
const MaxAuditJSON = 256 << 10

// Validate reports all problems of the record as an act. Whether it fits its
// chain is what package audit checks.
func (r AuditRecord) Validate() error {
	var p problems
	p.add(ValidateName("tenant", r.Tenant))
	p.check(!r.Time.IsZero(), "time is not set")
	p.check(kindForm(string(r.Kind)), "kind %q: want dotted words a-z, 0-9 and '-'", clip(string(r.Kind), 80))
	p.check(r.Actor != "", "actor is not set")
	p.check(r.Object != "", "object is not set")
	p.text("actor", r.Actor)
	p.text("source", r.Source)
	p.text("object", r.Object)
	p.text("reason", r.Reason)
	p.check(len(r.Before) <= MaxAuditJSON, "before has %d bytes, at most %d are allowed", len(r.Before), MaxAuditJSON)
	p.check(len(r.After) <= MaxAuditJSON, "after has %d bytes, at most %d are allowed", len(r.After), MaxAuditJSON)
	return p.err("audit record")
}
