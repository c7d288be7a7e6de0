package central

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"connectrpc.com/connect"

	musterv1connect "github.com/muster-edge/muster/api/muster/v1/musterv1connect"
	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/access"
)

// tokenPrefix lets secret scanners recognise our tokens.
const tokenPrefix = "muster_"

// newToken makes a bearer token of 256 random bits and its stored form.
func newToken() (token string, hash fleet.Digest) {
	b := make([]byte, 32)
	rand.Read(b)
	token = tokenPrefix + base64.RawURLEncoding.EncodeToString(b)
	return token, hashToken(token)
}

// hashToken needs no slow hash: nobody guesses 256 random bits.
func hashToken(token string) fleet.Digest { return sha256.Sum256([]byte(token)) }

// permission is what a method does to which kind of object.
type permission struct {
	kind access.Kind
	verb access.Verb
}

// methods says what each method is, for the gate in front of it: a caller who
// may do that to no object at all gets no further. A method that is missing
// here is refused: forgetting one must not open it. What the gate cannot know
// is the object; methods ask about it themselves, through find..., part and
// may (scope.go).
var methods = map[string]permission{
	musterv1connect.ManagementServiceGetCentreProcedure:           {access.Centre, access.Read},
	musterv1connect.ManagementServiceListRequestsProcedure:        {access.Request, access.Read},
	musterv1connect.ManagementServiceGetRequestProcedure:          {access.Request, access.Read},
	musterv1connect.ManagementServiceListNodesProcedure:           {access.Node, access.Read},
	musterv1connect.ManagementServiceGetNodeProcedure:             {access.Node, access.Read},
	musterv1connect.ManagementServiceListSitesProcedure:           {access.Site, access.Read},
	musterv1connect.ManagementServiceListImagesProcedure:          {access.Image, access.Read},
	musterv1connect.ManagementServiceListRootsProcedure:           {access.Roots, access.Read},
	musterv1connect.ManagementServiceWatchEventsProcedure:         {access.Event, access.Read},
	musterv1connect.ManagementServiceListAuditProcedure:           {access.Audit, access.Read},
	musterv1connect.ManagementServiceVerifyAuditProcedure:         {access.Audit, access.Read},
	musterv1connect.ManagementServiceListPreApprovalsProcedure:    {access.PreApproval, access.Read},
	musterv1connect.ManagementServiceTestPreApprovalsProcedure:    {access.Request, access.Read},
	musterv1connect.ManagementServiceImportPreApprovalProcedure:   {access.PreApproval, access.Change},
	musterv1connect.ManagementServiceCreateClaimProcedure:         {access.PreApproval, access.Change},
	musterv1connect.ManagementServiceCreateRuleProcedure:          {access.PreApproval, access.Change},
	musterv1connect.ManagementServiceRemovePreApprovalProcedure:   {access.PreApproval, access.Change},
	musterv1connect.ManagementServiceApproveProcedure:             {access.Request, access.Decide},
	musterv1connect.ManagementServiceRejectProcedure:              {access.Request, access.Decide},
	musterv1connect.ManagementServiceReleaseProcedure:             {access.Request, access.Decide},
	musterv1connect.ManagementServiceReplaceProcedure:             {access.Node, access.Change},
	musterv1connect.ManagementServiceDenyNodeProcedure:            {access.Node, access.Change},
	musterv1connect.ManagementServiceAllowNodeProcedure:           {access.Node, access.Change},
	musterv1connect.ManagementServiceOpenBootWindowProcedure:      {access.BootWindow, access.Change},
	musterv1connect.ManagementServiceRegisterImageProcedure:       {access.Image, access.Change},
	musterv1connect.ManagementServiceTrustReleaseKeyProcedure:     {access.ReleaseKey, access.Change},
	musterv1connect.ManagementServiceImportRootsProcedure:         {access.Roots, access.Change},
	musterv1connect.ManagementServiceGetSiteProcedure:             {access.Site, access.Read},
	musterv1connect.ManagementServiceListOrdersProcedure:          {access.Order, access.Read},
	musterv1connect.ManagementServiceListEscrowProcedure:          {access.Escrow, access.Read},
	musterv1connect.ManagementServiceAssignNodeProcedure:          {access.Node, access.Change},
	musterv1connect.ManagementServiceRemoveNodeProcedure:          {access.Node, access.Change},
	musterv1connect.ManagementServiceSetSiteProcedure:             {access.Site, access.Change},
	musterv1connect.ManagementServiceConfirmSiteProcedure:         {access.Site, access.Change},
	musterv1connect.ManagementServiceCreateOrderProcedure:         {access.Order, access.Change},
	musterv1connect.ManagementServiceWithdrawOrderProcedure:       {access.Order, access.Change},
	musterv1connect.ManagementServiceFetchEscrowProcedure:         {access.Escrow, access.Change},
	musterv1connect.ManagementServicePutHandoverProcedure:         {access.Escrow, access.Change},
	musterv1connect.ManagementServiceTrustEscrowKeyProcedure:      {access.EscrowKey, access.Change},
	musterv1connect.ManagementServiceAssignStackProcedure:         {access.Site, access.Change},
	musterv1connect.ManagementServiceGetDriftProcedure:            {access.Site, access.Read},
	musterv1connect.ManagementServiceListStacksProcedure:          {access.Stack, access.Read},
	musterv1connect.ManagementServiceGetStackProcedure:            {access.Stack, access.Read},
	musterv1connect.ManagementServicePublishStackVersionProcedure: {access.Stack, access.Change},
	musterv1connect.ManagementServiceStartRolloutProcedure:        {access.Rollout, access.Change},
	musterv1connect.ManagementServiceListRolloutsProcedure:        {access.Rollout, access.Read},
	musterv1connect.ManagementServiceGetRolloutProcedure:          {access.Rollout, access.Read},
	musterv1connect.ManagementServiceChangeRolloutProcedure:       {access.Rollout, access.Change},
	musterv1connect.ManagementServiceApplyProcedure:               {access.Site, access.Change},
	musterv1connect.ManagementServiceExportProcedure:              {access.Site, access.Read},
	musterv1connect.ManagementServiceDeleteObjectProcedure:        {access.Site, access.Change},
	musterv1connect.ManagementServiceLabelObjectProcedure:         {access.Site, access.Change},
	musterv1connect.AccessServiceListBindingsProcedure:            {access.User, access.Read},
	musterv1connect.AccessServiceGrantProcedure:                   {access.User, access.Change},
	musterv1connect.AccessServiceRevokeProcedure:                  {access.User, access.Change},
	musterv1connect.AccessServiceInviteProcedure:                  {access.User, access.Change},
	musterv1connect.AccessServiceCreateTenantProcedure:            {access.Tenant, access.Change},
	musterv1connect.AccessServiceHandOverTenantProcedure:          {access.User, access.Change},
}

// routes are the same for what is no method: paths that begin so.
var routes = map[string]permission{
	// Operators send and fetch files by their digest.
	blobsPath: {access.Image, access.Change},
}

// TenantHeader names the tenant that a call acts in. Without it, it is the
// home of the credential.
const TenantHeader = "Muster-Tenant"

// caller is who makes a management call.
type caller struct {
	access.Principal
	// source is the network address.
	source string
}

// actor is the caller's name in the audit log.
func (c caller) actor() string { return c.Actor() }

func (c caller) act(now time.Time) act { return act{actor: c.actor(), source: c.source, now: now} }

// callerOf is who makes the call. Nobody authenticated: somebody without any
// right.
func callerOf(ctx context.Context) caller {
	p, _ := access.FromContext(ctx)
	return caller{p, p.Source}
}

// authenticate lets only callers through who may do what the method does. It
// stands before the Connect handler, so that nothing of a stranger's body is
// read. A principal in the context is believed: only code of this process
// puts one there (Inside).
func (s *Server) authenticate(next http.Handler) http.Handler {
	errorWriter := connect.NewErrorWriter()
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		p, inside := access.FromContext(r.Context())
		var err error
		switch {
		case r.URL.Path == musterv1connect.AccessServiceLoginProcedure:
			// It is how people get a right to anything; here they have none.
			p = access.Principal{Source: sourceOf(r.RemoteAddr)}
		case !inside:
			if p, err = s.principalOfRequest(r); err == nil {
				err = gate(p, r.URL.Path)
			}
		default:
			err = gate(p, r.URL.Path)
		}
		if err != nil {
			s.metrics.refused.WithLabelValues("operators", connect.CodeOf(err).String()).Inc()
			s.refusals.say("call refused", logMethod, r.URL.Path, logAddress, sourceOf(r.RemoteAddr), logError, err)
			if !errorWriter.IsSupported(r) {
				http.Error(w, err.Error(), statusOf(err))
				return
			}
			_ = errorWriter.Write(w, r, err) // the peer is gone: nothing to do
			return
		}
		next.ServeHTTP(w, r.WithContext(access.NewContext(r.Context(), p)))
	})
}

// gate refuses callers who may do what a method does to no object.
func gate(p access.Principal, procedure string) error {
	if selfService[procedure] {
		return nil
	}
	m, known := methods[procedure]
	for prefix, r := range routes {
		if strings.HasPrefix(procedure, prefix) {
			m, known = r, true
		}
	}
	if !known {
		return connect.NewError(connect.CodePermissionDenied, errors.New("nobody may call this method"))
	}
	return refused(access.Possible(p, m.kind, m.verb), func() error { return noTenant(p.Tenant) })
}

// refused turns a decision into an error; hidden makes the one for what the
// caller must not know of.
func refused(d access.Decision, hidden func() error) error {
	switch d.Answer {
	case access.Allowed:
		return nil
	case access.Forbidden:
		return connect.NewError(connect.CodePermissionDenied, errors.New(d.Why))
	}
	return hidden()
}

func noTenant(name string) error {
	return connect.NewError(connect.CodeNotFound, fmt.Errorf("there is no tenant %.80q for you", name))
}

// principalOfRequest finds out who shows a bearer token.
func (s *Server) principalOfRequest(r *http.Request) (access.Principal, error) {
	token, found := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	if !found || !strings.HasPrefix(token, tokenPrefix) || len(token) > 128 {
		return access.Principal{}, connect.NewError(connect.CodeUnauthenticated, errors.New("this endpoint wants a bearer token: use the admin.yaml of the centre's data directory, or log in: muster login"))
	}
	return s.principalOfToken(r.Context(), token, r.Header.Get(TenantHeader), sourceOf(r.RemoteAddr), bearerKinds)
}

// bearerKinds are the credentials that work as a bearer token. Those that only
// open the door once, and those of browsers, do not.
var bearerKinds = map[store.CredentialKind]bool{store.CredentialStart: true, store.CredentialPersonal: true, store.CredentialToken: true}

func (s *Server) principalOfToken(ctx context.Context, token, tenant, source string, kinds map[store.CredentialKind]bool) (p access.Principal, err error) {
	hash := hashToken(token)
	var cred store.Credential
	err = s.store.View(ctx, func(t store.Reader) (err error) {
		if cred, err = t.CredentialByHash(hash); err != nil {
			return err
		}
		if subtle.ConstantTimeCompare(cred.Hash[:], hash[:]) != 1 || !kinds[cred.Kind] {
			return store.ErrNotFound
		}
		// A use that is not on disk yet counts, too.
		cred.LastUsed = s.usage.newer(cred.ID, cred.LastUsed)
		if why := cred.Ended(s.cfg.Now()); why != "" {
			return connect.NewError(connect.CodeUnauthenticated, fmt.Errorf("the token %s; log in again: muster login", why))
		}
		p, err = s.principalOf(t, cred, tenant, source)
		return err
	})
	var coded *connect.Error
	switch {
	case errors.Is(err, store.ErrNotFound):
		return p, connect.NewError(connect.CodeUnauthenticated, errors.New("the token is not known here: is it of another centre, or was it replaced?"))
	case errors.As(err, &coded):
		return p, err
	case err != nil:
		s.log.Error("token not checked", logError, err)
		return p, connect.NewError(connect.CodeUnavailable, errors.New("the token could not be checked; try again"))
	}
	s.usage.note(cred.ID, s.cfg.Now())
	return p, nil
}

// principalOf is who a credential stands for, in the tenant that the call
// names.
func (s *Server) principalOf(t store.Reader, cred store.Credential, tenant, source string) (access.Principal, error) {
	p := access.Principal{Name: cred.Holder, Via: cred.ID, Source: source, Tenant: tenant}
	if p.Tenant == "" {
		p.Tenant = cred.Tenant
	}
	if p.Tenant == access.AllTenants {
		p.Tenant = DefaultTenant
	}
	if fromProvider(cred.Holder) && s.provider == nil {
		return p, connect.NewError(connect.CodeUnauthenticated, errors.New("this centre has no identity provider any more: ask its administrator for an invitation"))
	}
	own, err := s.bindingsOf(t, cred.Holder, cred.Groups)
	if err != nil {
		return p, err
	}
	p.Bindings = own
	if cred.Kind == store.CredentialToken {
		p.Bindings, p.Bounded, p.Owner = cred.Scopes, true, own
	}
	if fleet.ValidateName("tenant", p.Tenant) != nil || p.Role() == access.None {
		return p, noTenant(p.Tenant)
	}
	if _, err := t.Tenant(p.Tenant); errors.Is(err, store.ErrNotFound) {
		return p, noTenant(p.Tenant)
	} else if err != nil {
		return p, err
	}
	return p, nil
}

// bindingsOf are the rights of a person with these groups: those that were
// given here, and those by the rules for the identity provider.
func (s *Server) bindingsOf(t store.Reader, name string, groups []string) ([]access.Binding, error) {
	subjects := []string{userSubject(name)}
	for _, g := range groups {
		subjects = append(subjects, groupSubject(g))
	}
	var out []access.Binding
	if fromProvider(name) {
		out = s.provider.Roles(groups)
	}
	for _, subject := range subjects {
		all, err := t.BindingsOf(subject)
		if err != nil {
			return nil, err
		}
		for _, b := range all {
			out = append(out, b.Binding)
		}
	}
	return out, nil
}

func userSubject(name string) string  { return "user:" + name }
func groupSubject(name string) string { return "group:" + name }

// selfService are methods about the caller alone: who is let in may call them.
var selfService = map[string]bool{
	musterv1connect.AccessServiceWhoAmIProcedure:      true,
	musterv1connect.AccessServiceLogoutProcedure:      true,
	musterv1connect.AccessServiceCreateTokenProcedure: true,
	musterv1connect.AccessServiceListTokensProcedure:  true,
	musterv1connect.AccessServiceRevokeTokenProcedure: true,
	musterv1connect.AccessServiceListTenantsProcedure: true,
}

// randomID is the random part of an ID.
func randomID() string { return strings.ToLower(rand.Text()[:16]) }
