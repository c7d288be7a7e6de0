// Package db is the Go form of ../queries, written by sqlc (see
// ../sqlc.yaml for the command). Only the parent package uses it.
package db
