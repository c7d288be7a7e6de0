package tftp

// ParseRequest is parseRequest for tests.
func ParseRequest(b []byte) (name string, block, window int, size bool, err error) {
	r, err := parseRequest(b)
	return r.name, r.block, r.window, r.size, err
}
