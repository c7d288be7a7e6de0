package console

import (
	"net/http"
	"net/url"
	"strconv"

	"github.com/muster-edge/muster/api"
	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/text"
)

type imagesBody struct {
	Rows     []fleet.Image
	Roots    []*musterv1.Root
	Problems []string
}

func (c *Console) images(v *visit) error {
	out, err := c.api.ListImages(v.ctx, &musterv1.ListImagesRequest{})
	if err != nil {
		return err
	}
	roots, err := c.api.ListRoots(v.ctx, &musterv1.ListRootsRequest{})
	if err != nil {
		return err
	}
	body := imagesBody{Roots: roots.Roots, Problems: roots.Problems}
	for _, m := range out.Images {
		i, err := api.ImageFromProto(m)
		if err != nil {
			return err
		}
		body.Rows = append(body.Rows, i)
	}
	return v.show(http.StatusOK, "images", page{Title: "Images", Nav: "images", CLI: []string{command("get", "images"), command("roots", "list")}, Body: body})
}

const auditPage = 100

type auditBody struct {
	Rows                []fleet.AuditRecord
	Actor, Kind, Object string
	Next                string
	Verified            *musterv1.VerifyAuditResponse
	Filtered            bool
}

// audit shows who did what, newest first.
func (c *Console) audit(v *visit) error {
	q := v.r.URL.Query()
	b := auditBody{Actor: text.Clean(q.Get("actor"), 128), Kind: text.Clean(q.Get("kind"), 64), Object: text.Clean(q.Get("object"), 128)}
	b.Filtered = b.Actor+b.Kind+b.Object != ""
	before, _ := strconv.ParseUint(q.Get("before"), 10, 64) // anything else is the newest page
	out, err := c.api.ListAudit(v.ctx, &musterv1.ListAuditRequest{NewestFirst: true, Before: before, Limit: auditPage, Actor: b.Actor, Kind: b.Kind, Object: b.Object})
	if err != nil {
		return err
	}
	for _, m := range out.Records {
		r, err := api.AuditRecordFromProto(m)
		if err != nil {
			// What cannot be read is a finding, not a reason to show nothing.
			r = fleet.AuditRecord{Seq: m.Seq, Kind: "unreadable", Reason: "this record cannot be read: run `muster audit verify`"}
		}
		b.Rows = append(b.Rows, r)
	}
	if out.Next > 0 {
		b.Next = "/audit?" + url.Values{"before": {strconv.FormatUint(out.Next, 10)}, "actor": {b.Actor}, "kind": {b.Kind}, "object": {b.Object}}.Encode()
	}
	if q.Get("verify") != "" {
		if b.Verified, err = c.api.VerifyAudit(v.ctx, &musterv1.VerifyAuditRequest{}); err != nil {
			return err
		}
	}
	return v.show(http.StatusOK, "audit", page{Title: "Audit", Nav: "audit", CLI: []string{command("audit", "list"), command("audit", "verify")}, Body: b})
}

func (c *Console) help(v *visit) error {
	return v.show(http.StatusOK, "help", page{Title: "Keys and help", Nav: "help", CLI: []string{command("--help")}})
}
