package agent

import "time"

// Renewal says when a certificate is to be renewed: when a third of its life
// is left, and up to a twelfth of its life later, so that nodes that were
// enrolled together do not call together. jitter is in [0, 1). With less than
// a sixth left the node stops relying on renewal and enrolls.
type Renewal struct {
	// Due is when to ask for a new certificate, Late when to enroll instead.
	Due, Late time.Time
}

// RenewalOf returns the plan for a certificate with these dates.
func RenewalOf(notBefore, notAfter time.Time, jitter float64) Renewal {
	life := notAfter.Sub(notBefore)
	if life <= 0 { // it never was good
		return Renewal{Due: notBefore, Late: notBefore}
	}
	jitter = min(max(jitter, 0), 1)
	return Renewal{
		Due:  notAfter.Add(-life / 3).Add(time.Duration(float64(life/12) * jitter)),
		Late: notAfter.Add(-life / 6),
	}
}
