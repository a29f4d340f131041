-- What a workspace has defined: streams, metrics, alert rules, silences. Definitions are JSON because the engine reads
-- them whole and the database never looks inside.

CREATE TABLE streams (
    workspace   TEXT    NOT NULL REFERENCES workspaces (id) ON DELETE CASCADE,
    stream      TEXT    NOT NULL,
    schema_json TEXT    NOT NULL,
    created_at  INTEGER NOT NULL,
    updated_at  INTEGER NOT NULL,
    PRIMARY KEY (workspace, stream)
) STRICT;

CREATE TABLE metrics (
    workspace       TEXT    NOT NULL REFERENCES workspaces (id) ON DELETE CASCADE,
    name            TEXT    NOT NULL,
    definition_json TEXT    NOT NULL,
    since_offset    INTEGER NOT NULL, -- first log offset it counts: a replay from further back must not feed it
    version         INTEGER NOT NULL, -- one more with every change: kept state of another version is not its state
    created_at      INTEGER NOT NULL,
    updated_at      INTEGER NOT NULL,
    PRIMARY KEY (workspace, name)
) STRICT;

CREATE TABLE alert_rules (
    workspace       TEXT    NOT NULL REFERENCES workspaces (id) ON DELETE CASCADE,
    name            TEXT    NOT NULL,
    definition_json TEXT    NOT NULL,
    created_at      INTEGER NOT NULL,
    updated_at      INTEGER NOT NULL,
    PRIMARY KEY (workspace, name)
) STRICT;

CREATE TABLE silences (
    workspace     TEXT    NOT NULL REFERENCES workspaces (id) ON DELETE CASCADE,
    id            TEXT    NOT NULL,
    matchers_json TEXT    NOT NULL,
    starts_at     INTEGER NOT NULL,
    ends_at       INTEGER NOT NULL,
    comment       TEXT    NOT NULL,
    created_by    TEXT    NOT NULL,
    PRIMARY KEY (workspace, id)
) STRICT;
