-- What operators read: dead letters, the audit log, and a few values of the whole process.

CREATE TABLE dead_letters (
    seq       BIGINT           GENERATED ALWAYS AS IDENTITY PRIMARY KEY, -- order of arrival: the oldest are dropped first
    workspace TEXT COLLATE "C" NOT NULL REFERENCES workspaces (id) ON DELETE CASCADE,
    digest    BYTEA            NOT NULL, -- SHA-256 of the other columns: a retried write adds nothing, however long the payload
    stream    TEXT COLLATE "C" NOT NULL,
    at        TIMESTAMPTZ      NOT NULL,
    code      TEXT             NOT NULL,
    detail    TEXT             NOT NULL,
    payload   TEXT             NOT NULL, -- as it came; NUL, which PostgreSQL's text cannot hold, shows as U+2400
    UNIQUE (workspace, digest)
);
CREATE INDEX dead_letters_by_workspace ON dead_letters (workspace, seq);

CREATE TABLE audit (
    seq        BIGINT           GENERATED ALWAYS AS IDENTITY PRIMARY KEY, -- order of arrival, never reused: a cursor stays good
    at         TIMESTAMPTZ      NOT NULL,
    workspace  TEXT COLLATE "C", -- no reference: refused attempts on workspaces that do not exist are recorded too
    actor      TEXT             NOT NULL,
    action     TEXT             NOT NULL,
    target     TEXT             NOT NULL,
    outcome    TEXT             NOT NULL,
    came_from  TEXT             NOT NULL, -- network address, or what else the caller came by
    request_id TEXT             NOT NULL
);
CREATE INDEX audit_by_workspace ON audit (workspace, seq);

-- Small values of the whole process, such as the epoch of the channels.
CREATE TABLE meta (
    key   TEXT COLLATE "C" NOT NULL PRIMARY KEY,
    value TEXT             NOT NULL
);

SELECT wall_off('dead_letters'), wall_off('audit');
