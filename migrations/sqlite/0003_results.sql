-- What the engine computed, and up to where: final rows, alerts and checkpoints, all written in one transaction.

-- The primary key is the identity of a final row, so writing it again is recognised; it is also the order in which
-- pages are read, which is why the table is kept in it (WITHOUT ROWID: no second tree). No reference to `metrics`:
-- metrics of packs are not in that table, and a metric deleted a moment ago must not fail the checkpoint of others.
-- PostgreSQL sorts `key_json` with COLLATE "C", as SQLite does by itself.
CREATE TABLE final_rows (
    workspace    TEXT    NOT NULL REFERENCES workspaces (id) ON DELETE CASCADE,
    metric       TEXT    NOT NULL,
    window_start INTEGER NOT NULL,
    window_end   INTEGER NOT NULL, -- in the key: session and cumulating windows share their start
    key_json     TEXT    NOT NULL, -- canonical JSON object of the key columns, `{}` where there are none
    revision     INTEGER NOT NULL, -- 0, then one more for each correction by late events; only a greater one is kept
    row_json     TEXT    NOT NULL, -- JSON object of the values
    PRIMARY KEY (workspace, metric, window_start, window_end, key_json)
) STRICT, WITHOUT ROWID;

CREATE TABLE alerts (
    workspace   TEXT    NOT NULL REFERENCES workspaces (id) ON DELETE CASCADE,
    id          TEXT    NOT NULL, -- derived from rule, labels and window: the same firing has the same id after a replay
    rule        TEXT    NOT NULL, -- by name and without a reference: an alert outlives its rule
    metric      TEXT    NOT NULL,
    severity    TEXT    NOT NULL,
    labels_json TEXT    NOT NULL,
    state       TEXT    NOT NULL CHECK (state IN ('firing', 'resolved')),
    row_json    TEXT    NOT NULL, -- the metric row that made it fire
    started_at  INTEGER NOT NULL, -- event time
    fired_at    INTEGER NOT NULL,
    resolved_at INTEGER,
    acked_at    INTEGER,
    acked_by    TEXT,
    PRIMARY KEY (workspace, id)
) STRICT;
CREATE INDEX alerts_by_time ON alerts (workspace, fired_at, id);
-- The few that fire must be found among very many resolved ones.
CREATE INDEX alerts_by_state ON alerts (workspace, state, fired_at, id);

CREATE TABLE checkpoints (
    workspace  TEXT    NOT NULL PRIMARY KEY REFERENCES workspaces (id) ON DELETE CASCADE,
    log_offset INTEGER NOT NULL, -- the state includes the log up to here, exclusive
    version    INTEGER NOT NULL, -- number of commits, from 1
    state      BLOB              -- NULL: no state yet
) STRICT;
