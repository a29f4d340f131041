-- Webhooks of a workspace, and the outbox of what is on its way to them. A delivery is written in the transaction that
-- stores its alert: there is none without the other, whatever is killed in between.

CREATE TABLE webhooks (
    workspace       TEXT COLLATE "C" NOT NULL REFERENCES workspaces (id) ON DELETE CASCADE,
    id              TEXT COLLATE "C" NOT NULL,
    url             TEXT             NOT NULL,
    events_json     TEXT             NOT NULL, -- JSON array of what it is told of; compared outside, where the names are known
    severities_json TEXT,                      -- JSON array; NULL: alerts of every severity
    secret          TEXT             NOT NULL, -- signs what is sent; sealed outside: a copy of the database forges nothing
    disabled        TEXT,                      -- why nothing is sent any more; NULL: it is
    created_at      TIMESTAMPTZ      NOT NULL,
    updated_at      TIMESTAMPTZ      NOT NULL,
    PRIMARY KEY (workspace, id)
);

-- No hypertable: rows change until they are done, and are bounded for each webhook by their number and not by age.
CREATE TABLE webhook_deliveries (
    seq         BIGINT           GENERATED ALWAYS AS IDENTITY PRIMARY KEY, -- order of arrival: lists show the newest first, an alert's end waits for its beginning
    workspace   TEXT COLLATE "C" NOT NULL,
    id          TEXT COLLATE "C" NOT NULL, -- derived from workspace, webhook, event and alert: a repeated commit adds nothing, and the receiver knows a repeat by it
    webhook     TEXT COLLATE "C" NOT NULL,
    event       TEXT             NOT NULL,
    alert       TEXT COLLATE "C",          -- by id and without a reference: alerts go by retention, and a test has none
    body        TEXT             NOT NULL, -- as it is sent, to the byte: the alert as it was then, the same at every attempt
    state       TEXT             NOT NULL CHECK (state IN ('pending', 'delivered', 'failed')),
    attempts    BIGINT           NOT NULL,
    created_at  TIMESTAMPTZ      NOT NULL, -- attempts end some hours after it
    next_at     TIMESTAMPTZ      CHECK ((next_at IS NULL) = (state <> 'pending')), -- of the next attempt
    last_at     TIMESTAMPTZ,               -- of the last attempt
    last_status BIGINT,                    -- of its answer, if there was one
    last_error  TEXT,                      -- why it was none that counts
    UNIQUE (workspace, id),
    FOREIGN KEY (workspace, webhook) REFERENCES webhooks (workspace, id) ON DELETE CASCADE
);
CREATE INDEX webhook_deliveries_by_webhook ON webhook_deliveries (workspace, webhook, seq); -- lists, bounds, the cascade
-- The few that wait, of all workspaces, among very many that are done; and whether something of the same alert waits
-- before.
CREATE INDEX webhook_deliveries_due ON webhook_deliveries (next_at) WHERE state = 'pending';
CREATE INDEX webhook_deliveries_waiting ON webhook_deliveries (workspace, webhook, alert, seq) WHERE state = 'pending';

SELECT wall_off('webhooks'), wall_off('webhook_deliveries');
