-- Who may do what: users, their sign-ins, workspaces, memberships, API keys. The same tables as in `sqlite/`, in the
-- types that PostgreSQL has for them.
--
-- Habits of every table here and in the later files:
--   * Ids and names are TEXT COLLATE "C": compared byte by byte, as SQLite and the engine do. A cursor then stays good
--     whatever the locale of the database, and the primary keys serve the paging.
--   * Times are TIMESTAMPTZ: microseconds, UTC. What lies outside PostgreSQL's range is -infinity or infinity.
--   * `…_json` is TEXT and not JSONB: it comes back exactly as it was written, and it may hold \u0000, which JSONB
--     refuses. Cast it (`row_json::json ->> 'vwap'`) to look inside.
--   * Counts and offsets are BIGINT: the log counts in 64 bits.
--   * A table of a workspace starts its primary key with `workspace` and hangs on `workspaces` by a cascade.
--   * Row-level security is the wall between workspaces, forced also on the owner of the tables: a transaction sees the
--     rows of the workspace in its `app.workspace`, `*` being the whole installation. Where it is not set nothing is
--     seen. A superuser passes through it; run tidewatch as a role that is none.

CREATE TABLE users (
    id            TEXT COLLATE "C" NOT NULL PRIMARY KEY,
    email         TEXT COLLATE "C" NOT NULL UNIQUE, -- lower case, so that UNIQUE holds for what people call the same address
    password_hash TEXT             NOT NULL,        -- PHC string: algorithm and cost travel with the hash
    admin         BOOLEAN          NOT NULL,
    created_at    TIMESTAMPTZ      NOT NULL
);

-- One sign-in and all the tokens it was renewed to. `revoked` stands here and not on the tokens: a successor that is
-- written just after its family was revoked must be dead on arrival.
CREATE TABLE refresh_families (
    family     TEXT COLLATE "C" NOT NULL PRIMARY KEY,
    revoked    BOOLEAN          NOT NULL,
    expires_at TIMESTAMPTZ      NOT NULL -- the latest expiry of its tokens: when the family can be forgotten
);
CREATE INDEX refresh_families_by_expiry ON refresh_families (expires_at);

CREATE TABLE refresh_tokens (
    token_hash TEXT COLLATE "C" NOT NULL PRIMARY KEY, -- a copy of the database gives nobody a token
    family     TEXT COLLATE "C" NOT NULL REFERENCES refresh_families (family) ON DELETE CASCADE,
    user_id    TEXT COLLATE "C" NOT NULL REFERENCES users (id) ON DELETE CASCADE,
    issued_at  TIMESTAMPTZ      NOT NULL,
    expires_at TIMESTAMPTZ      NOT NULL,
    spent_at   TIMESTAMPTZ -- a spent token stays until the family goes: seeing it again is how theft shows
);
CREATE INDEX refresh_tokens_by_family ON refresh_tokens (family);

CREATE TABLE workspaces (
    id         TEXT COLLATE "C" NOT NULL PRIMARY KEY,
    name       TEXT             NOT NULL,
    pack       TEXT, -- name of the pack it was made from, if any
    tier       TEXT             NOT NULL, -- a word of the configuration, which gives it its limits: no CHECK
    created_at TIMESTAMPTZ      NOT NULL
);

CREATE TABLE members (
    workspace TEXT COLLATE "C" NOT NULL REFERENCES workspaces (id) ON DELETE CASCADE,
    user_id   TEXT COLLATE "C" NOT NULL REFERENCES users (id) ON DELETE CASCADE,
    role      TEXT             NOT NULL, -- the gateway owns the list of roles
    since     TIMESTAMPTZ      NOT NULL,
    PRIMARY KEY (workspace, user_id)
);
CREATE INDEX members_by_user ON members (user_id); -- "which workspaces are mine" at every sign-in

CREATE TABLE api_keys (
    workspace  TEXT COLLATE "C" NOT NULL REFERENCES workspaces (id) ON DELETE CASCADE,
    id         TEXT COLLATE "C" NOT NULL,
    name       TEXT             NOT NULL,
    role       TEXT             NOT NULL,
    key_hash   TEXT COLLATE "C" NOT NULL UNIQUE, -- looked up by hash at every call; the key itself is shown once
    prefix     TEXT             NOT NULL,        -- its first characters, so that people recognise it in a list
    created_by TEXT             NOT NULL,        -- a user or another key, for the reader: no reference
    created_at TIMESTAMPTZ      NOT NULL,
    expires_at TIMESTAMPTZ,                      -- NULL: until revoked
    revoked_at TIMESTAMPTZ,
    PRIMARY KEY (workspace, id)
);

-- Puts a table of workspaces behind the wall. Every later file calls it for each such table it makes; a test fails for
-- one that was forgotten.
CREATE FUNCTION wall_off(walled REGCLASS, owner_column TEXT DEFAULT 'workspace') RETURNS VOID LANGUAGE plpgsql AS $$
BEGIN
    EXECUTE format('ALTER TABLE %s ENABLE ROW LEVEL SECURITY', walled);
    EXECUTE format('ALTER TABLE %s FORCE ROW LEVEL SECURITY', walled);
    EXECUTE format(
        'CREATE POLICY own_workspace ON %s USING (current_setting(''app.workspace'', true) IN (%I, ''*''))',
        walled, owner_column);
END $$;

SELECT wall_off('workspaces', 'id'), wall_off('members'), wall_off('api_keys');
