package declare

import (
	"embed"
	"encoding/json"
	"fmt"
	"reflect"
	"strings"
	"time"

	"github.com/muster-edge/muster/fleet"
)

// published are the schemas as they were last made from the types; a test
// compares them.
//
//go:embed schemas/*.json
var published embed.FS

// SchemaFile is the name of a kind's schema among the published ones.
func SchemaFile(k Kind) string {
	var b strings.Builder
	for i, c := range string(k) {
		if c >= 'A' && c <= 'Z' && i > 0 {
			b.WriteByte('-')
		}
		b.WriteRune(c)
	}
	return strings.ToLower(b.String()) + ".json"
}

// Schema returns the JSON Schema (draft 2020-12) of a kind.
func Schema(k Kind) ([]byte, error) {
	b, err := published.ReadFile("schemas/" + SchemaFile(k))
	if err != nil {
		return nil, fmt.Errorf("declare: read schema of %.60q: %w", k, err)
	}
	return b, nil
}

// Comments finds the comment of a field of a type ("fleet.SitePolicy",
// "PromoteAt"), or of the type itself for the field "".
type Comments func(typeName, field string) string

// schemaID is the base of the schemas' names. They name; nothing is fetched.
const schemaID = "https://muster-edge.github.io/schemas/v1/"

type schema struct {
	Schema               string             `json:"$schema,omitempty"`
	ID                   string             `json:"$id,omitempty"`
	Title                string             `json:"title,omitempty"`
	Description          string             `json:"description,omitempty"`
	Type                 any                `json:"type,omitempty"`
	Const                string             `json:"const,omitempty"`
	Enum                 []any              `json:"enum,omitempty"`
	Pattern              string             `json:"pattern,omitempty"`
	Format               string             `json:"format,omitempty"`
	ContentEncoding      string             `json:"contentEncoding,omitempty"`
	Minimum              *int64             `json:"minimum,omitempty"`
	Items                *schema            `json:"items,omitempty"`
	Properties           map[string]*schema `json:"properties,omitempty"`
	Required             []string           `json:"required,omitempty"`
	AdditionalProperties any                `json:"additionalProperties,omitempty"`
	MinProperties        int                `json:"minProperties,omitempty"`
	MaxProperties        int                `json:"maxProperties,omitempty"`
}

const (
	namePattern    = `^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`
	versionPattern = `^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?@[A-Za-z0-9][A-Za-z0-9._+~-]{0,127}$`
	nodePattern    = `^n-[a-z2-7]{24}$`
)

// words are the texts that a field takes, and patterns their form, by type and
// field in JSON.
var (
	words = map[string][]string{
		"Founding.mode":                    {string(fleet.FoundCentral), string(fleet.FoundNamed), string(fleet.FoundFirst)},
		"BirthSettings.flannel_backend":    {"wireguard-native", "vxlan", "host-gw", "none"},
		"DiskRule.prefer":                  {fleet.DiskOnly, fleet.DiskSmallest, fleet.DiskLargest, fleet.DiskNVMeFirst},
		"AssignmentSpec.role_hint":         {HintServer, HintWorker},
		"PreApprovalRuleSpec.min_identity": {fleet.IdentityLab.String(), fleet.IdentityListed.String(), fleet.IdentityHardware.String()},
		"PreApprovalRuleSpec.min_boot":     {fleet.BootMeasured.String(), fleet.BootEnforced.String()},
		"UpdateWindow.days":                {"mon", "tue", "wed", "thu", "fri", "sat", "sun"},
	}
	patterns = map[string]string{
		"SiteSpec.stack":           `^$|` + versionPattern,
		"SiteSpec.images":          versionPattern,
		"UpdateWindow.from":        `^([01][0-9]|2[0-3]):[0-5][0-9]$`,
		"AssignmentSpec.site":      namePattern,
		"PreApprovalRuleSpec.site": namePattern,
		"Founding.founder":         nodePattern,
		"Founding.successors":      nodePattern,
	}
	namePatterns = map[Kind]string{StackVersion: versionPattern, Assignment: nodePattern}
	required     = map[Kind][]string{Assignment: {"site"}, StackVersion: nil}
)

// MakeSchema makes the schema of a kind from its types.
func MakeSchema(k Kind, comments Comments) ([]byte, error) {
	g := schemaMaker{comments}
	spec := reflect.TypeOf(specs[k]()).Elem()
	specSchema := g.of(spec, "")
	specSchema.Type = "object"
	specSchema.Required = required[k]
	specSchema.Description = comments(typeName(spec), "")
	if k == StackVersion {
		specSchema.MinProperties, specSchema.MaxProperties = 1, 1
	}
	meta := g.of(reflect.TypeFor[Metadata](), "")
	meta.Type, meta.Required = "object", []string{"name"}
	pattern := namePattern
	if p, special := namePatterns[k]; special {
		pattern = p
	}
	meta.Properties["name"].Type, meta.Properties["name"].Pattern = "string", pattern
	if k == StackVersion || k == PreApprovalRule {
		delete(meta.Properties, "labels")
	}
	doc := schema{
		Schema: "https://json-schema.org/draft/2020-12/schema", ID: schemaID + SchemaFile(k), Title: string(k), Type: "object",
		Description: "A document of kind " + string(k) + " for muster apply. " + specSchema.Description,
		Properties: map[string]*schema{
			"apiVersion": {Const: APIVersion}, "kind": {Const: string(k)}, "metadata": meta, "spec": specSchema,
		},
		Required: []string{"apiVersion", "kind", "metadata"}, AdditionalProperties: false,
	}
	if k == Assignment || k == StackVersion {
		doc.Required = append(doc.Required, "spec")
	}
	b, err := json.MarshalIndent(doc, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("declare: make schema of %s: %w", k, err)
	}
	return append(b, '\n'), nil
}

type schemaMaker struct{ comments Comments }

func typeName(t reflect.Type) string {
	if strings.HasSuffix(t.PkgPath(), "/declare") {
		return t.Name()
	}
	return "fleet." + t.Name()
}

// or null: null is the default.
func orNull(t string) any { return []string{t, "null"} }

func (g schemaMaker) of(t reflect.Type, key string) *schema {
	switch {
	case t.Kind() == reflect.Pointer:
		return g.of(t.Elem(), key)
	case t == reflect.TypeFor[time.Time]():
		return &schema{Type: orNull("string"), Format: "date-time"}
	case reflect.PointerTo(t).Implements(unmarshaler):
		return restricted(&schema{Type: orNull("string")}, key)
	}
	switch t.Kind() {
	case reflect.Struct:
		s := &schema{Type: orNull("object"), Properties: make(map[string]*schema), AdditionalProperties: false}
		for _, m := range members(t) {
			f := t.FieldByIndex(m.index)
			p := g.of(f.Type, t.Name()+"."+m.name)
			p.Description = g.comments(typeName(t), f.Name)
			s.Properties[m.name] = p
		}
		return s
	case reflect.Map:
		return &schema{Type: orNull("object"), AdditionalProperties: &schema{Type: "string"}}
	case reflect.Slice:
		if t.Elem().Kind() == reflect.Uint8 {
			return &schema{Type: orNull("string"), ContentEncoding: "base64"}
		}
		items := g.of(t.Elem(), key)
		items.Type = single(items.Type)
		items.Enum = notNull(items.Enum)
		return &schema{Type: orNull("array"), Items: items}
	case reflect.Bool:
		return &schema{Type: orNull("boolean")}
	case reflect.Int, reflect.Int64:
		s := &schema{Type: orNull("integer")}
		if key != "UpdateWindow.utc_offset_min" {
			s.Minimum = new(int64)
		}
		return s
	}
	return restricted(&schema{Type: orNull("string")}, key)
}

func single(t any) any {
	if list, several := t.([]string); several {
		return list[0]
	}
	return t
}

func notNull(list []any) (out []any) {
	for _, v := range list {
		if v != nil {
			out = append(out, v)
		}
	}
	return out
}

func restricted(s *schema, key string) *schema {
	s.Pattern = patterns[key]
	for _, w := range words[key] {
		s.Enum = append(s.Enum, w)
	}
	if len(s.Enum) > 0 {
		s.Enum = append(s.Enum, nil)
	}
	return s
}
