package enroll

const domainRenewal = "muster/renew/v1/transcript"

// RenewalTranscript is the qualifying data of both TPM statements in a
// renewal. There is no nonce of the centre's and no claim: the exporter of a
// TLS 1.3 connection depends on key shares of both sides that were never used
// before, so the statements are younger than the connection. The domain keeps
// statements of an enrollment from passing for those of a renewal, and the
// other way round.
func RenewalTranscript(f TranscriptFields) [32]byte {
	d := newDigest(domainRenewal)
	for _, b := range [][]byte{f.EK, f.AK, f.LDevID, f.CSR, f.Hardware, f.Exporter} {
		d.bytes(b)
	}
	return d.sum()
}
