-- What an audit asks for: scopes of keys, grants of single resources, second factors, sign-ins by OpenID Connect, and
-- an audit log that shows when somebody changed it.

ALTER TABLE api_keys ADD COLUMN scopes_json TEXT; -- JSON array of scopes; NULL: all that its role may do

-- What a member may do beyond the role, mostly with one resource: `portfolio:read@portfolio/main`.
CREATE TABLE grants (
    workspace  TEXT    NOT NULL,
    user_id    TEXT    NOT NULL,
    scope      TEXT    NOT NULL, -- the gateway owns the list of permissions
    created_by TEXT    NOT NULL,
    created_at INTEGER NOT NULL,
    PRIMARY KEY (workspace, user_id, scope),
    FOREIGN KEY (workspace, user_id) REFERENCES members (workspace, user_id) ON DELETE CASCADE
) STRICT;

-- The second factor of a user (RFC 6238). Secrets are sealed by the gateway: a copy of the database gives nobody a code.
CREATE TABLE totp (
    user_id TEXT    NOT NULL PRIMARY KEY REFERENCES users (id) ON DELETE CASCADE,
    secret  TEXT,             -- asked for at sign-in; NULL: not confirmed yet
    pending TEXT,             -- shown to the user, who has to prove a code of it first
    step    INTEGER NOT NULL  -- time step of the last code that was used: none is good twice
) STRICT;

-- Users as OpenID Connect issuers know them.
CREATE TABLE identities (
    issuer     TEXT    NOT NULL,
    subject    TEXT    NOT NULL,
    user_id    TEXT    NOT NULL REFERENCES users (id) ON DELETE CASCADE,
    created_at INTEGER NOT NULL,
    PRIMARY KEY (issuer, subject)
) STRICT;

-- Each entry has the digest of itself, and a hash over that digest and the hash before it. The last hash stands in
-- `meta` too, so that cutting off the end shows. Entries from before this migration have neither.
--
-- An entry is never changed, but for one of a deleted workspace: it is emptied, and its digest keeps the chain whole.
ALTER TABLE audit ADD COLUMN digest TEXT;
ALTER TABLE audit ADD COLUMN hash TEXT;
INSERT INTO meta (key, value) VALUES ('audit_head', '');
CREATE TRIGGER audit_is_not_changed BEFORE UPDATE ON audit
WHEN NEW.seq IS NOT OLD.seq OR NEW.at IS NOT OLD.at OR NEW.digest IS NOT OLD.digest OR NEW.hash IS NOT OLD.hash
    OR NEW.workspace IS NOT NULL
    OR NEW.actor || NEW.action || NEW.target || NEW.outcome || NEW.came_from || NEW.request_id <> ''
    OR OLD.workspace IS NULL OR EXISTS (SELECT 1 FROM workspaces WHERE id = OLD.workspace)
BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END;
CREATE TRIGGER audit_is_not_shortened BEFORE DELETE ON audit
BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END;
