-- Reference tables of a workspace. Their rows are in the log and in the checkpoint, like events and what became of them.

CREATE TABLE tables (
    workspace       TEXT    NOT NULL REFERENCES workspaces (id) ON DELETE CASCADE,
    name            TEXT    NOT NULL,
    definition_json TEXT    NOT NULL,
    since_offset    INTEGER NOT NULL, -- first log offset of its changes: those of an earlier table of its name are before
    created_at      INTEGER NOT NULL,
    updated_at      INTEGER NOT NULL,
    PRIMARY KEY (workspace, name)
) STRICT;
