package central

import (
	"context"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/enroll/service"
)

// metrics are what /metrics on the loopback address shows. Labels are never
// filled from what machines say.
type metrics struct {
	registry *prometheus.Registry
	calls    *prometheus.HistogramVec
	refused  *prometheus.CounterVec
	conns    *prometheus.CounterVec
	issue    prometheus.Histogram
	filed    *prometheus.CounterVec
	// calls and checks of enrollment, see observe.
	enrollCalls, enrollChecks *prometheus.CounterVec
	events                    prometheus.Counter
	reports                   *prometheus.CounterVec
	boots                     *prometheus.CounterVec
}

func newMetrics() *metrics {
	m := &metrics{
		registry: prometheus.NewRegistry(),
		calls: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "muster_http_request_seconds", Help: "Time to answer a call, by endpoint, method and status.",
			Buckets: []float64{.001, .005, .01, .05, .1, .5, 1, 5, 30},
		}, []string{"endpoint", "method", "code"}),
		refused: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "muster_refused_total", Help: "Calls refused before they were served, by endpoint and reason.",
		}, []string{"endpoint", "reason"}),
		conns: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "muster_connections_refused_total", Help: "Connections closed because of a limit.",
		}, []string{"endpoint"}),
		issue: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "muster_issue_seconds", Help: "Time to sign and store a node certificate.",
			Buckets: []float64{.001, .005, .01, .05, .1, .5, 1, 5},
		}),
		filed: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "muster_enrollments_total", Help: "Proved machines by outcome: filed, denied, full, failed.",
		}, []string{"outcome"}),
		enrollCalls: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "muster_enrollment_calls_total", Help: "Calls of the enrollment protocol by outcome: ok, or why not.",
		}, []string{"call", "outcome"}),
		enrollChecks: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "muster_enrollment_not_proven_total", Help: "Proofs that did not hold, by the first check that failed.",
		}, []string{"check"}),
		events: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "muster_events_dropped_total", Help: "Events lost because they came faster than they could be written.",
		}),
		reports: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "muster_reports_total", Help: "Reports of nodes by outcome.",
		}, []string{"outcome"}),
		boots: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "muster_boot_steps_total", Help: "Steps of machines that boot from the network.",
		}, []string{"kind"}),
	}
	m.registry.MustRegister(m.calls, m.refused, m.conns, m.issue, m.filed, m.enrollCalls, m.enrollChecks, m.events, m.reports, m.boots,
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	// Series that are there from the start show the first refusal as a step.
	for _, c := range service.Checks() {
		m.enrollChecks.WithLabelValues(c)
	}
	return m
}

// observe is the service.Observer. All labels are from the service's lists.
func (m *metrics) observe(o service.Observation) {
	if o.Call == service.CallIssue {
		m.issue.Observe(o.Took.Seconds())
		return
	}
	m.enrollCalls.WithLabelValues(o.Call, o.Outcome).Inc()
	if o.Check != "" {
		m.enrollChecks.WithLabelValues(o.Check).Inc()
	}
}

// queue shows requests and nodes by state, read at each scrape.
type queue struct {
	store           store.Store
	requests, nodes *prometheus.Desc
}

func newQueue(s store.Store) *queue {
	return &queue{
		store:    s,
		requests: prometheus.NewDesc("muster_requests", "Enrollment requests by tenant and state.", []string{"tenant", "state"}, nil),
		nodes:    prometheus.NewDesc("muster_nodes", "Nodes by tenant and state.", []string{"tenant", "state"}, nil),
	}
}

// Describe implements prometheus.Collector.
func (q *queue) Describe(c chan<- *prometheus.Desc) { c <- q.requests; c <- q.nodes }

// Collect implements prometheus.Collector.
func (q *queue) Collect(c chan<- prometheus.Metric) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	err := q.store.View(ctx, func(t store.Reader) error {
		tenants, err := t.Tenants()
		if err != nil {
			return err
		}
		for _, tenant := range tenants {
			requests, err := t.CountRequests(tenant.Name)
			if err != nil {
				return err
			}
			for state, n := range requests {
				c <- prometheus.MustNewConstMetric(q.requests, prometheus.GaugeValue, float64(n), tenant.Name, state.String())
			}
			nodes, err := t.CountNodes(tenant.Name)
			if err != nil {
				return err
			}
			for state, n := range nodes {
				c <- prometheus.MustNewConstMetric(q.nodes, prometheus.GaugeValue, float64(n), tenant.Name, state.String())
			}
		}
		return nil
	})
	if err != nil {
		c <- prometheus.NewInvalidMetric(q.requests, err)
	}
}

// handler serves metrics and health on the loopback address.
func (s *Server) metricsHandler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(s.metrics.registry, promhttp.HandlerOpts{}))
	s.addHealth(mux)
	return mux
}

// addHealth adds /healthz (the process answers) and /readyz (it can serve).
func (s *Server) addHealth(mux *http.ServeMux) {
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("ok\n")) })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(r.Context(), 2*time.Second)
		defer cancel()
		err := s.store.View(ctx, func(t store.Reader) error { _, err := t.Epoch(); return err })
		if err != nil || !s.ready.Load() || s.follower.behind() {
			http.Error(w, "not ready", http.StatusServiceUnavailable)
			return
		}
		_, _ = w.Write([]byte("ok\n"))
	})
}

// measured times calls. Only our own method names become labels.
func (s *Server) measured(endpoint string, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		start := time.Now()
		rec := &statusRecorder{ResponseWriter: w, code: http.StatusOK}
		next.ServeHTTP(rec, r)
		method := "other"
		if knownMethods[r.URL.Path] {
			method = r.URL.Path
		}
		s.metrics.calls.WithLabelValues(endpoint, method, http.StatusText(rec.code)).Observe(time.Since(start).Seconds())
	})
}

type statusRecorder struct {
	http.ResponseWriter
	code int
}

// WriteHeader implements http.ResponseWriter.
func (r *statusRecorder) WriteHeader(code int) {
	r.code = code
	r.ResponseWriter.WriteHeader(code)
}

// Unwrap lets http.ResponseController reach Flush and deadlines.
func (r *statusRecorder) Unwrap() http.ResponseWriter { return r.ResponseWriter }

// Flush implements http.Flusher, which streams ask for directly.
func (r *statusRecorder) Flush() {
	if f, ok := r.ResponseWriter.(http.Flusher); ok {
		f.Flush()
	}
}
