package console

import (
	"crypto/sha256"
	"crypto/sha512"
	"embed"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"mime"
	"net/http"
	"path"
	"strconv"
	"strings"
	"sync"
)

// htmx is version 2.0.11 of https://htmx.org (0BSD), dist/htmx.min.js of the
// package htmx.org in the npm registry, as it is there.
//
//go:embed static
var staticFiles embed.FS

// htmxSHA256 pins the file; a test compares.
const htmxSHA256 = "d6fdc75f204e6bdefa99b69bf1e6d4ac69b8a364f77929f45c13476b4000f717"

const assetPrefix = "/assets/"

// asset is one file with its address, which holds its digest: a browser may
// keep it for ever.
type asset struct {
	name, url, integrity, kind string
	body                       []byte
}

// assets are the files that pages refer to, by name and by address.
type assets struct{ byName, byURL map[string]asset }

var loadAssets = sync.OnceValue(func() assets {
	a := assets{byName: make(map[string]asset), byURL: make(map[string]asset)}
	for _, name := range []string{"console.css", "console.js", "htmx.min.js", "favicon.svg"} {
		b, err := staticFiles.ReadFile("static/" + name)
		if err != nil {
			panic(err) // embedded: cannot happen
		}
		short := sha256.Sum256(b)
		long := sha512.Sum384(b)
		ext := path.Ext(name)
		f := asset{
			name: name, body: b, kind: mime.TypeByExtension(ext),
			url:       assetPrefix + strings.TrimSuffix(name, ext) + "." + hex.EncodeToString(short[:6]) + ext,
			integrity: "sha384-" + base64.StdEncoding.EncodeToString(long[:]),
		}
		a.byName[name], a.byURL[f.url] = f, f
	}
	return a
})

// ref is how templates name an asset.
func (a assets) ref(name string) (asset, error) {
	f, ok := a.byName[name]
	if !ok {
		return f, fmt.Errorf("console: there is no asset %q", name)
	}
	return f, nil
}

// URL and Integrity are for templates.
func (f asset) URL() string       { return f.url }
func (f asset) Integrity() string { return f.integrity }

// ServeHTTP serves assets. They are no secret: the login page needs them.
func (a assets) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	f, ok := a.byURL[r.URL.Path]
	if !ok {
		http.NotFound(w, r)
		return
	}
	h := w.Header()
	h.Set("Content-Type", f.kind)
	h.Set("Content-Length", strconv.Itoa(len(f.body)))
	h.Set("Cache-Control", "public, max-age=31536000, immutable")
	if r.Method != http.MethodHead {
		_, _ = w.Write(f.body) // the browser went away: nothing to do
	}
}
