package central

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"errors"
	"net/http"
	"strings"

	"connectrpc.com/connect"

	musterv1connect "github.com/muster-edge/muster/api/muster/v1/musterv1connect"
	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/fleet"
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

// Roles, each with the rights of those before it.
var roles = []string{"viewer", "approver", "operator", "admin"}

func rank(role string) int {
	for i, r := range roles {
		if r == role {
			return i
		}
	}
	return -1
}

// methodRoles is the least role for each method. A method that is missing
// here is refused: forgetting one must not open it.
var methodRoles = map[string]string{
	musterv1connect.ManagementServiceGetCentreProcedure:           "viewer",
	musterv1connect.ManagementServiceListRequestsProcedure:        "viewer",
	musterv1connect.ManagementServiceGetRequestProcedure:          "viewer",
	musterv1connect.ManagementServiceListNodesProcedure:           "viewer",
	musterv1connect.ManagementServiceGetNodeProcedure:             "viewer",
	musterv1connect.ManagementServiceListSitesProcedure:           "viewer",
	musterv1connect.ManagementServiceListImagesProcedure:          "viewer",
	musterv1connect.ManagementServiceListRootsProcedure:           "viewer",
	musterv1connect.ManagementServiceWatchEventsProcedure:         "viewer",
	musterv1connect.ManagementServiceListAuditProcedure:           "viewer",
	musterv1connect.ManagementServiceVerifyAuditProcedure:         "viewer",
	musterv1connect.ManagementServiceListPreApprovalsProcedure:    "viewer",
	musterv1connect.ManagementServiceTestPreApprovalsProcedure:    "viewer",
	musterv1connect.ManagementServiceImportPreApprovalProcedure:   "operator",
	musterv1connect.ManagementServiceCreateClaimProcedure:         "operator",
	musterv1connect.ManagementServiceCreateRuleProcedure:          "operator",
	musterv1connect.ManagementServiceRemovePreApprovalProcedure:   "operator",
	musterv1connect.ManagementServiceApproveProcedure:             "approver",
	musterv1connect.ManagementServiceRejectProcedure:              "approver",
	musterv1connect.ManagementServiceReleaseProcedure:             "approver",
	musterv1connect.ManagementServiceReplaceProcedure:             "operator",
	musterv1connect.ManagementServiceDenyNodeProcedure:            "operator",
	musterv1connect.ManagementServiceAllowNodeProcedure:           "operator",
	musterv1connect.ManagementServiceOpenBootWindowProcedure:      "operator",
	musterv1connect.ManagementServiceRegisterImageProcedure:       "operator",
	musterv1connect.ManagementServiceTrustReleaseKeyProcedure:     "admin",
	musterv1connect.ManagementServiceImportRootsProcedure:         "admin",
	musterv1connect.ManagementServiceGetSiteProcedure:             "viewer",
	musterv1connect.ManagementServiceListOrdersProcedure:          "viewer",
	musterv1connect.ManagementServiceListEscrowProcedure:          "viewer",
	musterv1connect.ManagementServiceAssignNodeProcedure:          "operator",
	musterv1connect.ManagementServiceRemoveNodeProcedure:          "operator",
	musterv1connect.ManagementServiceSetSiteProcedure:             "operator",
	musterv1connect.ManagementServiceConfirmSiteProcedure:         "operator",
	musterv1connect.ManagementServiceCreateOrderProcedure:         "operator",
	musterv1connect.ManagementServiceWithdrawOrderProcedure:       "operator",
	musterv1connect.ManagementServiceFetchEscrowProcedure:         "operator",
	musterv1connect.ManagementServicePutHandoverProcedure:         "operator",
	musterv1connect.ManagementServiceTrustEscrowKeyProcedure:      "admin",
	musterv1connect.ManagementServiceAssignStackProcedure:         "operator",
	musterv1connect.ManagementServiceGetDriftProcedure:            "viewer",
	musterv1connect.ManagementServiceListStacksProcedure:          "viewer",
	musterv1connect.ManagementServiceGetStackProcedure:            "viewer",
	musterv1connect.ManagementServicePublishStackVersionProcedure: "operator",
	musterv1connect.ManagementServiceApplyProcedure:               "operator",
	musterv1connect.ManagementServiceLabelObjectProcedure:         "operator",
	musterv1connect.ManagementServiceDeleteObjectProcedure:        "operator",
}

// blobRole may send and fetch files by their digest.
const blobRole = "operator"

// caller is who makes a management call.
type caller struct {
	store.Operator
	// source is the network address.
	source string
}

// actor is the caller's name in the audit log.
func (c caller) actor() string { return "user:" + c.Name }

type callerKey struct{}

func callerOf(ctx context.Context) caller {
	c, _ := ctx.Value(callerKey{}).(caller)
	return c
}

// authenticate lets only holders of a token with a sufficient role through.
// It stands before the Connect handler, so that nothing of a stranger's body
// is read.
func (s *Server) authenticate(next http.Handler) http.Handler {
	errorWriter := connect.NewErrorWriter()
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c, err := s.callerOfRequest(r)
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
		next.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), callerKey{}, c)))
	})
}

func (s *Server) callerOfRequest(r *http.Request) (caller, error) {
	token, found := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	if !found || !strings.HasPrefix(token, tokenPrefix) || len(token) > 128 {
		return caller{}, connect.NewError(connect.CodeUnauthenticated, errors.New("this endpoint wants a bearer token: use the admin.yaml of the centre's data directory"))
	}
	hash := hashToken(token)
	var op store.Operator
	err := s.store.View(r.Context(), func(t store.Reader) (err error) {
		op, err = t.OperatorByToken(hash)
		return err
	})
	switch {
	case errors.Is(err, store.ErrNotFound), err == nil && subtle.ConstantTimeCompare(op.Token[:], hash[:]) != 1:
		return caller{}, connect.NewError(connect.CodeUnauthenticated, errors.New("the token is not known here: is it of another centre, or was it replaced?"))
	case err != nil:
		s.log.Error("token not checked", logError, err)
		return caller{}, connect.NewError(connect.CodeUnavailable, errors.New("the token could not be checked; try again"))
	}
	need, known := methodRoles[r.URL.Path]
	if strings.HasPrefix(r.URL.Path, blobsPath) {
		need, known = blobRole, true
	}
	if !known || rank(op.Role) < rank(need) {
		return caller{}, connect.NewError(connect.CodePermissionDenied, errors.New("the role "+op.Role+" does not allow this; it takes "+need))
	}
	return caller{Operator: op, source: sourceOf(r.RemoteAddr)}, nil
}
