package repo

import "time"

// Policy says which backups of a cluster are kept. The zero value keeps all.
type Policy struct {
	Last int // so many newest; 0: no such rule
}

// Decision on one backup.
type Decision struct {
	Backup  *Manifest
	Keep    bool
	Reasons []string
}

// Decide tells for each backup, oldest first, whether it is kept.
func (p Policy) Decide(backups []*Manifest, now time.Time) []Decision {
	all := make([]Decision, len(backups))
	for i, m := range backups {
		all[i] = Decision{Backup: m, Keep: p.Last == 0 || i >= len(backups)-p.Last}
	}
	return all
}
