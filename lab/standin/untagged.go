//go:build !labstandin

package main

import (
	"fmt"
	"os"
)

func main() {
	fmt.Fprintln(os.Stderr, "k3s-standin: built without the tag labstandin: make bin/k3s-standin")
	os.Exit(1)
}
