package central

import (
	musterv1connect "github.com/muster-edge/muster/api/muster/v1/musterv1connect"
)

// Keys of log lines.
const (
	logError   = "error"
	logCount   = "count"
	logUnsaid  = "unsaid"
	logNode    = "node"
	logRequest = "request"
	logActor   = "actor"
	logAddress = "address"
	logTenant  = "tenant"
	logSite    = "site"
	logObject  = "object"
	logFile    = "file"
	logMethod  = "method"
)

// DefaultTenant is the tenant of a centre with one owner.
const DefaultTenant = "default"

// knownMethods may be labels of metrics; what else callers ask for may not.
var knownMethods = func() map[string]bool {
	m := map[string]bool{
		musterv1connect.EnrollmentServiceHelloProcedure:    true,
		musterv1connect.EnrollmentServiceBeginProcedure:    true,
		musterv1connect.EnrollmentServiceCompleteProcedure: true,
		musterv1connect.EnrollmentServiceCollectProcedure:  true,
		musterv1connect.NodeServiceReportProcedure:         true,
		musterv1connect.NodeServiceRenewProcedure:          true,
		musterv1connect.NodeServiceDocumentsProcedure:      true,
		musterv1connect.NodeServiceAskFoundingProcedure:    true,
		musterv1connect.NodeServicePutEscrowProcedure:      true,
		musterv1connect.NodeServiceGetHandoverProcedure:    true,
	}
	for p := range methods {
		m[p] = true
	}
	for p := range selfService {
		m[p] = true
	}
	m[musterv1connect.AccessServiceLoginProcedure] = true
	return m
}()
