-- What operators read: dead letters, the audit log, and a few values of the whole process.

CREATE TABLE dead_letters (
    seq       INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, -- order of arrival: the oldest are dropped first
    workspace TEXT    NOT NULL REFERENCES workspaces (id) ON DELETE CASCADE,
    digest    BLOB    NOT NULL, -- SHA-256 of the other columns: a retried write adds nothing, however long the payload
    stream    TEXT    NOT NULL,
    at        INTEGER NOT NULL,
    code      TEXT    NOT NULL,
    detail    TEXT    NOT NULL,
    payload   TEXT    NOT NULL,
    UNIQUE (workspace, digest)
) STRICT;
CREATE INDEX dead_letters_by_workspace ON dead_letters (workspace, seq);

CREATE TABLE audit (
    seq        INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, -- order of arrival, never reused: a cursor stays good
    at         INTEGER NOT NULL,
    workspace  TEXT, -- no reference: refused attempts on workspaces that do not exist are recorded too
    actor      TEXT    NOT NULL,
    action     TEXT    NOT NULL,
    target     TEXT    NOT NULL,
    outcome    TEXT    NOT NULL,
    came_from  TEXT    NOT NULL, -- network address, or what else the caller came by
    request_id TEXT    NOT NULL
) STRICT;
CREATE INDEX audit_by_workspace ON audit (workspace, seq);

-- Small values of the whole process, such as the epoch of the channels.
CREATE TABLE meta (
    key   TEXT NOT NULL PRIMARY KEY,
    value TEXT NOT NULL
) STRICT;
