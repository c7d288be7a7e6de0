// Package metal is agent/slots' view of a real machine: the record on the meta
// partition, the mounted ESP, the firmware's variables, images that come by
// agent/fetch. Each of it is small, and none of it decides anything.
package metal
