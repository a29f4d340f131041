-- Who is asked to become a member, by address, whether or not anybody here has it: it becomes a membership, and its scopes
-- grants, when a user with this address first comes to the workspace.
CREATE TABLE invitations (
    workspace   TEXT    NOT NULL REFERENCES workspaces (id) ON DELETE CASCADE,
    email       TEXT    NOT NULL, -- lower case, as in users; no reference, or it would tell who is one
    role        TEXT    NOT NULL,
    scopes_json TEXT    NOT NULL, -- JSON array of what is granted beyond the role
    invited_by  TEXT    NOT NULL,
    invited_at  INTEGER NOT NULL,
    PRIMARY KEY (workspace, email)
) STRICT;
CREATE INDEX invitations_by_email ON invitations (email); -- "where am I invited"
