package repo

import (
	"context"
	"errors"
	"fmt"
	"slices"
)

// images brings the newest boot images of the backups that were asked for to their copies, as far as these lack them.
func (c *clusterCopier) images(ctx context.Context) error {
	from, err := c.from.Images(ctx, c.cluster.Name)
	if err := unanswered(ctx, err); err != nil {
		return err
	}
	to, err := c.to.Images(ctx, c.cluster.Name)
	if err := unanswered(ctx, err); err != nil {
		return err
	}
	for _, id := range c.askedFor() {
		copied := c.inTo[OriginalID(id)]
		if copied == "" || len(from[id]) == 0 {
			continue
		}
		for _, m := range newestOfKinds(from[id]) {
			there := slices.ContainsFunc(to[copied], func(o *Manifest) bool { return m.Image.replacedBy(o.Image) })
			if there {
				continue
			}
			if err := c.image(ctx, m, id, copied); err != nil {
				return fmt.Errorf("copy boot image %s of %s: %w", m.ID, m.Cluster, err)
			}
		}
	}
	return nil
}

// replacedBy tells whether an image is of no use where there is another one: its copy, or one that reaches farther.
func (i *Image) replacedBy(o *Image) bool {
	return i.Kind == o.Kind && (i.LSN < o.LSN || i.LSN == o.LSN && !i.MadeAt.After(o.MadeAt))
}

// image copies one image: what differs from its backup, which is in both repositories.
func (c *clusterCopier) image(ctx context.Context, m *Manifest, of, copied string) error {
	var prior pair
	var err error
	if prior.from, err = c.from.readManifest(ctx, m.Cluster, of); err == nil {
		prior.to, err = c.to.readManifest(ctx, m.Cluster, copied)
	}
	if err == nil {
		_, err = c.protected(ctx, m, &prior)
	}
	if errors.Is(err, ErrDeleted) || errors.Is(err, ErrNoBackup) {
		return nil // since it was listed
	}
	if err != nil {
		return c.leaveOut(NotCopied{Cluster: m.Cluster, Backup: m.ID, Err: err})
	}
	c.done.Images++
	return nil
}
