-- What a workspace has defined: streams, metrics, alert rules, silences. Definitions are JSON because the engine reads
-- them whole and the database never looks inside.

CREATE TABLE streams (
    workspace   TEXT COLLATE "C" NOT NULL REFERENCES workspaces (id) ON DELETE CASCADE,
    stream      TEXT COLLATE "C" NOT NULL,
    schema_json TEXT             NOT NULL,
    created_at  TIMESTAMPTZ      NOT NULL,
    updated_at  TIMESTAMPTZ      NOT NULL,
    PRIMARY KEY (workspace, stream)
);

CREATE TABLE metrics (
    workspace       TEXT COLLATE "C" NOT NULL REFERENCES workspaces (id) ON DELETE CASCADE,
    name            TEXT COLLATE "C" NOT NULL,
    definition_json TEXT             NOT NULL,
    since_offset    BIGINT           NOT NULL, -- first log offset it counts: a replay from further back must not feed it
    version         BIGINT           NOT NULL, -- one more with every change: kept state of another version is not its state
    created_at      TIMESTAMPTZ      NOT NULL,
    updated_at      TIMESTAMPTZ      NOT NULL,
    PRIMARY KEY (workspace, name)
);

CREATE TABLE alert_rules (
    workspace       TEXT COLLATE "C" NOT NULL REFERENCES workspaces (id) ON DELETE CASCADE,
    name            TEXT COLLATE "C" NOT NULL,
    definition_json TEXT             NOT NULL,
    created_at      TIMESTAMPTZ      NOT NULL,
    updated_at      TIMESTAMPTZ      NOT NULL,
    PRIMARY KEY (workspace, name)
);

CREATE TABLE silences (
    workspace     TEXT COLLATE "C" NOT NULL REFERENCES workspaces (id) ON DELETE CASCADE,
    id            TEXT COLLATE "C" NOT NULL,
    matchers_json TEXT             NOT NULL,
    starts_at     TIMESTAMPTZ      NOT NULL,
    ends_at       TIMESTAMPTZ      NOT NULL,
    comment       TEXT             NOT NULL,
    created_by    TEXT             NOT NULL,
    PRIMARY KEY (workspace, id)
);

SELECT wall_off('streams'), wall_off('metrics'), wall_off('alert_rules'), wall_off('silences');
