-- Reference tables of a workspace. Their rows are in the log and in the checkpoint, like events and what became of them.

CREATE TABLE tables (
    workspace       TEXT COLLATE "C" NOT NULL REFERENCES workspaces (id) ON DELETE CASCADE,
    name            TEXT COLLATE "C" NOT NULL,
    definition_json TEXT             NOT NULL,
    since_offset    BIGINT           NOT NULL, -- first log offset of its changes: those of an earlier table of its name are before
    created_at      TIMESTAMPTZ      NOT NULL,
    updated_at      TIMESTAMPTZ      NOT NULL,
    PRIMARY KEY (workspace, name)
);

SELECT wall_off('tables');
