package ingest

import (
	"context"
	"fmt"
	"regexp"
	"strconv"

	"github.com/jackc/pgx/v5/pgconn"

	"pgthaw/repo/pg"
)

// slotName is what a replication slot may be called (slot.c, ReplicationSlotValidateName).
var slotName = regexp.MustCompile(`^[a-z0-9_]{1,63}$`)

// createSlot makes a physical slot that keeps WAL from the last checkpoint on. kind is TEMPORARY, or empty.
func createSlot(ctx context.Context, conn *pgconn.PgConn, slot, kind string) error {
	_, err := conn.Exec(ctx, fmt.Sprintf("CREATE_REPLICATION_SLOT %s %s PHYSICAL (RESERVE_WAL true)", slot, kind)).ReadAll()
	if err != nil {
		return serverError("create replication slot "+slot, err)
	}
	return nil
}

// readSlot asks where a slot stands. exists: there is such a slot; a zero LSN: it keeps no WAL.
func readSlot(ctx context.Context, conn *pgconn.PgConn, slot string) (p position, exists bool, err error) {
	results, err := conn.Exec(ctx, "READ_REPLICATION_SLOT "+slot).ReadAll()
	if err != nil {
		return p, false, serverError("read replication slot "+slot, err)
	}
	if len(results) != 1 || len(results[0].Rows) != 1 || len(results[0].Rows[0]) != 3 {
		return p, false, fmt.Errorf("read replication slot %s: no single row", slot)
	}
	row := results[0].Rows[0] // slot_type, restart_lsn, restart_tli
	if row[0] == nil {
		return p, false, nil
	}
	if row[1] == nil || row[2] == nil {
		return p, true, nil
	}
	if p.lsn, err = pg.ParseLSN(string(row[1])); err != nil {
		return p, true, fmt.Errorf("read replication slot %s: %w", slot, err)
	}
	timeline, err := strconv.ParseUint(string(row[2]), 10, 31)
	if err != nil || timeline == 0 {
		return p, true, fmt.Errorf("read replication slot %s: timeline %q", slot, row[2])
	}
	p.timeline = pg.Timeline(timeline)
	return p, true, nil
}
