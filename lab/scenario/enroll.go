package scenario

import (
	"context"
	"errors"

	"github.com/muster-edge/muster/lab"
)

func prepareEnroll(ctx context.Context, l *lab.Lab) error { return errors.New("not yet") }
func runEnroll(ctx context.Context, l *lab.Lab) error     { return errors.New("not yet") }
func runUp(ctx context.Context, l *lab.Lab) error         { return errors.New("not yet") }
