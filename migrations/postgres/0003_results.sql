-- What the engine computed, and up to where: final rows, alerts and checkpoints, all written in one transaction.

-- The primary key is the identity of a final row, so writing it again is recognised; it is also the order in which
-- pages are read. It holds `window_start`, by which TimescaleDB cuts the table into chunks. No reference to
-- `workspaces`: checked row by row it would cost more than the row itself. The checkpoint of the same transaction has
-- one, and deleting a workspace deletes its rows by name.
CREATE TABLE final_rows (
    workspace    TEXT COLLATE "C" NOT NULL,
    metric       TEXT COLLATE "C" NOT NULL,
    window_start TIMESTAMPTZ      NOT NULL,
    window_end   TIMESTAMPTZ      NOT NULL, -- in the key: session and cumulating windows share their start
    key_json     TEXT COLLATE "C" NOT NULL, -- canonical JSON object of the key columns, `{}` where there are none
    revision     BIGINT           NOT NULL, -- 0, then one more for each correction by late events; only a greater one is kept
    row_json     TEXT             NOT NULL, -- JSON object of the values
    PRIMARY KEY (workspace, metric, window_start, window_end, key_json)
);

-- `started_at` is part of the key because TimescaleDB wants the time in every unique index; the id is derived from it,
-- so (workspace, id) is as unique as before.
CREATE TABLE alerts (
    workspace   TEXT COLLATE "C" NOT NULL REFERENCES workspaces (id) ON DELETE CASCADE,
    id          TEXT COLLATE "C" NOT NULL, -- derived from rule, labels and window: the same firing has the same id after a replay
    rule        TEXT             NOT NULL, -- by name and without a reference: an alert outlives its rule
    metric      TEXT COLLATE "C" NOT NULL,
    severity    TEXT             NOT NULL,
    labels_json TEXT             NOT NULL,
    state       TEXT             NOT NULL CHECK (state IN ('firing', 'resolved')),
    row_json    TEXT             NOT NULL, -- the metric row that made it fire
    started_at  TIMESTAMPTZ      NOT NULL, -- event time
    fired_at    TIMESTAMPTZ      NOT NULL,
    resolved_at TIMESTAMPTZ,
    acked_at    TIMESTAMPTZ,
    acked_by    TEXT,
    PRIMARY KEY (workspace, id, started_at)
);
CREATE INDEX alerts_by_time ON alerts (workspace, fired_at, id);
-- The few that fire must be found among very many resolved ones.
CREATE INDEX alerts_by_state ON alerts (workspace, state, fired_at, id);

CREATE TABLE checkpoints (
    workspace  TEXT COLLATE "C" NOT NULL PRIMARY KEY REFERENCES workspaces (id) ON DELETE CASCADE,
    log_offset BIGINT           NOT NULL, -- the state includes the log up to here, exclusive
    version    BIGINT           NOT NULL, -- number of commits, from 1
    state      BYTEA                      -- NULL: no state yet
);
-- The state is compressed by its writer or does not compress: EXTERNAL saves the attempt at every commit.
ALTER TABLE checkpoints ALTER COLUMN state SET STORAGE EXTERNAL;

SELECT wall_off('final_rows'), wall_off('alerts'), wall_off('checkpoints');
