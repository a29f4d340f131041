-- Who is asked to become a member, by address, whether or not anybody here has it: it becomes a membership, and its scopes
-- grants, when a user with this address first comes to the workspace.
CREATE TABLE invitations (
    workspace   TEXT COLLATE "C" NOT NULL REFERENCES workspaces (id) ON DELETE CASCADE,
    email       TEXT COLLATE "C" NOT NULL, -- lower case, as in users; no reference, or it would tell who is one
    role        TEXT             NOT NULL,
    scopes_json TEXT             NOT NULL, -- JSON array of what is granted beyond the role
    invited_by  TEXT             NOT NULL,
    invited_at  TIMESTAMPTZ      NOT NULL,
    PRIMARY KEY (workspace, email)
);
CREATE INDEX invitations_by_email ON invitations (email); -- "where am I invited"

SELECT wall_off('invitations');
