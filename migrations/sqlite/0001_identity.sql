-- Who may do what: users, their sign-ins, workspaces, memberships, API keys.
--
-- Habits of every table here and in the later files:
--   * STRICT, because SQLite would otherwise keep a text in an integer column without a word.
--   * Ids are text: UUIDs of version 7 made by the caller, or natural keys. No id depends on the database.
--   * Times (`…_at`, `since`, `window_…`) are microseconds since the Unix epoch, UTC, as everywhere in the engine.
--   * `…_json` is JSON as text: it comes back exactly as it was written.
--   * A truth value is 0 or 1 and checked; PostgreSQL has BOOLEAN in the same place.
--   * A table of a workspace starts its primary key with `workspace` (reads stay within one tenant's pages) and
--     hangs on `workspaces` by a cascade, so that a new table cannot be forgotten when a workspace is deleted.

CREATE TABLE users (
    id            TEXT    NOT NULL PRIMARY KEY,
    email         TEXT    NOT NULL UNIQUE, -- lower case, so that UNIQUE holds for what people call the same address
    password_hash TEXT    NOT NULL,        -- PHC string: algorithm and cost travel with the hash
    admin         INTEGER NOT NULL CHECK (admin IN (0, 1)),
    created_at    INTEGER NOT NULL
) STRICT;

-- One sign-in and all the tokens it was renewed to. `revoked` stands here and not on the tokens: a successor that is
-- written just after its family was revoked must be dead on arrival.
CREATE TABLE refresh_families (
    family     TEXT    NOT NULL PRIMARY KEY,
    revoked    INTEGER NOT NULL CHECK (revoked IN (0, 1)),
    expires_at INTEGER NOT NULL -- the latest expiry of its tokens: when the family can be forgotten
) STRICT;
CREATE INDEX refresh_families_by_expiry ON refresh_families (expires_at);

CREATE TABLE refresh_tokens (
    token_hash TEXT    NOT NULL PRIMARY KEY, -- a copy of the database gives nobody a token
    family     TEXT    NOT NULL REFERENCES refresh_families (family) ON DELETE CASCADE,
    user_id    TEXT    NOT NULL REFERENCES users (id) ON DELETE CASCADE,
    issued_at  INTEGER NOT NULL,
    expires_at INTEGER NOT NULL,
    spent_at   INTEGER -- a spent token stays until the family goes: seeing it again is how theft shows
) STRICT;
CREATE INDEX refresh_tokens_by_family ON refresh_tokens (family);

CREATE TABLE workspaces (
    id         TEXT    NOT NULL PRIMARY KEY,
    name       TEXT    NOT NULL,
    pack       TEXT, -- name of the pack it was made from, if any
    tier       TEXT    NOT NULL, -- a word of the configuration, which gives it its limits: no CHECK
    created_at INTEGER NOT NULL
) STRICT;

CREATE TABLE members (
    workspace TEXT    NOT NULL REFERENCES workspaces (id) ON DELETE CASCADE,
    user_id   TEXT    NOT NULL REFERENCES users (id) ON DELETE CASCADE,
    role      TEXT    NOT NULL, -- the gateway owns the list of roles
    since     INTEGER NOT NULL,
    PRIMARY KEY (workspace, user_id)
) STRICT;
CREATE INDEX members_by_user ON members (user_id); -- "which workspaces are mine" at every sign-in

CREATE TABLE api_keys (
    workspace  TEXT    NOT NULL REFERENCES workspaces (id) ON DELETE CASCADE,
    id         TEXT    NOT NULL,
    name       TEXT    NOT NULL,
    role       TEXT    NOT NULL,
    key_hash   TEXT    NOT NULL UNIQUE, -- looked up by hash at every call; the key itself is shown once
    prefix     TEXT    NOT NULL,        -- its first characters, so that people recognise it in a list
    created_by TEXT    NOT NULL,        -- a user or another key, for the reader: no reference
    created_at INTEGER NOT NULL,
    expires_at INTEGER,                 -- NULL: until revoked
    revoked_at INTEGER,
    PRIMARY KEY (workspace, id)
) STRICT;
