-- What an audit asks for: scopes of keys, grants of single resources, second factors, sign-ins by OpenID Connect, and
-- an audit log that shows when somebody changed it.

ALTER TABLE api_keys ADD COLUMN scopes_json TEXT; -- JSON array of scopes; NULL: all that its role may do

-- What a member may do beyond the role, mostly with one resource: `portfolio:read@portfolio/main`.
CREATE TABLE grants (
    workspace  TEXT COLLATE "C" NOT NULL,
    user_id    TEXT COLLATE "C" NOT NULL,
    scope      TEXT COLLATE "C" NOT NULL, -- the gateway owns the list of permissions
    created_by TEXT             NOT NULL,
    created_at TIMESTAMPTZ      NOT NULL,
    PRIMARY KEY (workspace, user_id, scope),
    FOREIGN KEY (workspace, user_id) REFERENCES members (workspace, user_id) ON DELETE CASCADE
);

-- The second factor of a user (RFC 6238). Secrets are sealed by the gateway: a copy of the database gives nobody a code.
CREATE TABLE totp (
    user_id TEXT COLLATE "C" NOT NULL PRIMARY KEY REFERENCES users (id) ON DELETE CASCADE,
    secret  TEXT,            -- asked for at sign-in; NULL: not confirmed yet
    pending TEXT,            -- shown to the user, who has to prove a code of it first
    step    BIGINT NOT NULL  -- time step of the last code that was used: none is good twice
);

-- Users as OpenID Connect issuers know them.
CREATE TABLE identities (
    issuer     TEXT COLLATE "C" NOT NULL,
    subject    TEXT COLLATE "C" NOT NULL,
    user_id    TEXT COLLATE "C" NOT NULL REFERENCES users (id) ON DELETE CASCADE,
    created_at TIMESTAMPTZ      NOT NULL,
    PRIMARY KEY (issuer, subject)
);

-- Each entry has the digest of itself, and a hash over that digest and the hash before it. The last hash stands in
-- `meta` too, so that cutting off the end shows. Entries from before this migration have neither.
--
-- An entry is never changed, but for one of a deleted workspace: it is emptied, and its digest keeps the chain whole.
ALTER TABLE audit ADD COLUMN digest TEXT;
ALTER TABLE audit ADD COLUMN hash TEXT;
INSERT INTO meta (key, value) VALUES ('audit_head', '');
CREATE FUNCTION keep_audit() RETURNS TRIGGER LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'UPDATE' THEN
        IF (NEW.seq, NEW.at) = (OLD.seq, OLD.at)
            AND NEW.digest IS NOT DISTINCT FROM OLD.digest AND NEW.hash IS NOT DISTINCT FROM OLD.hash
            AND NEW.workspace IS NULL
            AND concat(NEW.actor, NEW.action, NEW.target, NEW.outcome, NEW.came_from, NEW.request_id) = ''
            AND OLD.workspace IS NOT NULL AND NOT EXISTS (SELECT FROM workspaces WHERE id = OLD.workspace)
        THEN
            RETURN NEW;
        END IF;
    END IF;
    RAISE EXCEPTION 'the audit log is append-only';
END $$;
CREATE TRIGGER audit_is_not_changed BEFORE UPDATE ON audit FOR EACH ROW EXECUTE FUNCTION keep_audit();
CREATE TRIGGER audit_is_not_shortened BEFORE DELETE ON audit FOR EACH ROW EXECUTE FUNCTION keep_audit();
CREATE TRIGGER audit_is_not_emptied BEFORE TRUNCATE ON audit FOR EACH STATEMENT EXECUTE FUNCTION keep_audit();

SELECT wall_off('grants');
