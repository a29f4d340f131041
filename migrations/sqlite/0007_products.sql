-- What the products keep beside streams: a fund's companies, investments and deals, snapshots of the market, and what
-- agents were asked and answered.
--
--   * Money and quantities are decimal numbers as TEXT: SQLite has no exact type, and REAL would not keep cents.
--     PostgreSQL has NUMERIC in the same place.
--   * Every amount stands beside its ISO 4217 currency: a sum over a column is only meaningful within one.
--   * References stay within the workspace: each holds the workspace in its key, so that no row can point into another's.

CREATE TABLE funds (
    workspace  TEXT NOT NULL REFERENCES workspaces (id) ON DELETE CASCADE,
    id         TEXT NOT NULL,
    name       TEXT NOT NULL,
    currency   TEXT NOT NULL, -- in which the fund reports
    committed TEXT, -- by its investors; NULL while it is raised
    vintage    INTEGER, -- year of the first investment, by which funds are compared
    created_at INTEGER NOT NULL,
    updated_at INTEGER NOT NULL,
    PRIMARY KEY (workspace, id)
) STRICT;

CREATE TABLE companies (
    workspace    TEXT NOT NULL REFERENCES workspaces (id) ON DELETE CASCADE,
    id           TEXT NOT NULL,
    name         TEXT NOT NULL,
    symbol       TEXT, -- of its shares in market streams, where they are traded: what joins it to live prices
    sector       TEXT,
    country      TEXT, -- ISO 3166-1 alpha-2
    details_json TEXT NOT NULL, -- what else a product knows of it; no query looks inside
    created_at   INTEGER NOT NULL,
    updated_at   INTEGER NOT NULL,
    PRIMARY KEY (workspace, id)
) STRICT;
CREATE INDEX companies_by_symbol ON companies (workspace, symbol);

-- What a fund put into a company, one row a tranche: the dates of the tranches are what a rate of return is made of.
CREATE TABLE investments (
    workspace   TEXT NOT NULL,
    id          TEXT NOT NULL,
    fund        TEXT NOT NULL,
    company     TEXT NOT NULL,
    amount TEXT NOT NULL, -- paid
    currency    TEXT NOT NULL,
    shares TEXT, -- NULL for debt
    ownership TEXT, -- share of the company after it, 0 to 1
    invested_at INTEGER NOT NULL,
    exited_at   INTEGER, -- NULL while held
    proceeds TEXT, -- of the exit, in the same currency
    PRIMARY KEY (workspace, id),
    FOREIGN KEY (workspace, fund) REFERENCES funds (workspace, id) ON DELETE CASCADE,
    FOREIGN KEY (workspace, company) REFERENCES companies (workspace, id) ON DELETE CASCADE
) STRICT;
CREATE INDEX investments_by_fund ON investments (workspace, fund); -- a fund's portfolio, and the cascade
CREATE INDEX investments_by_company ON investments (workspace, company);

-- What may become an investment. `stage` is a word of the product's pipeline, which differs: no CHECK.
CREATE TABLE deals (
    workspace  TEXT NOT NULL,
    id         TEXT NOT NULL,
    fund       TEXT, -- NULL until one takes it
    company    TEXT NOT NULL,
    stage      TEXT NOT NULL,
    valuation TEXT, -- asked, before the money
    amount TEXT, -- sought
    currency   TEXT NOT NULL,
    owner      TEXT NOT NULL, -- a user, for the reader: a deal outlives the membership
    opened_at  INTEGER NOT NULL,
    closed_at  INTEGER, -- NULL while open
    PRIMARY KEY (workspace, id),
    FOREIGN KEY (workspace, company) REFERENCES companies (workspace, id) ON DELETE CASCADE,
    FOREIGN KEY (workspace, fund) REFERENCES funds (workspace, id) ON DELETE CASCADE
) STRICT;
CREATE INDEX deals_by_company ON deals (workspace, company);
CREATE INDEX deals_by_fund ON deals (workspace, fund);

-- The market at one moment, kept when it must be known later what was seen then: a valuation, a report, an alert. The
-- time is in the key, so TimescaleDB can cut the table by it; `source` too, since two may see it differently.
CREATE TABLE market_snapshots (
    workspace TEXT NOT NULL REFERENCES workspaces (id) ON DELETE CASCADE,
    symbol    TEXT NOT NULL,
    at        INTEGER NOT NULL,
    source    TEXT NOT NULL,
    price TEXT NOT NULL,
    bid TEXT,
    ask TEXT,
    volume TEXT, -- traded since the start of the day, in units
    currency  TEXT NOT NULL,
    PRIMARY KEY (workspace, symbol, at, source)
) STRICT, WITHOUT ROWID;

-- One call of a model: what it cost and whether it helped. The conversation itself is in `messages`, which is why text
-- is not kept twice.
CREATE TABLE ai_interactions (
    workspace     TEXT NOT NULL REFERENCES workspaces (id) ON DELETE CASCADE,
    id            TEXT NOT NULL,
    thread        TEXT, -- by id and without a reference: what was spent stays when a thread is deleted
    run_id        TEXT,
    agent         TEXT NOT NULL,
    model         TEXT NOT NULL,
    asked_by      TEXT NOT NULL,
    tokens_in     INTEGER NOT NULL CHECK (tokens_in >= 0),
    tokens_out    INTEGER NOT NULL CHECK (tokens_out >= 0),
    cost TEXT, -- NULL where the model has no price
    currency      TEXT,
    elapsed_ms    INTEGER NOT NULL CHECK (elapsed_ms >= 0),
    outcome       TEXT NOT NULL,
    rating        INTEGER CHECK (rating BETWEEN -1 AND 1), -- by the reader: -1, 0 or 1
    started_at    INTEGER NOT NULL,
    PRIMARY KEY (workspace, id)
) STRICT;
CREATE INDEX ai_interactions_by_time ON ai_interactions (workspace, started_at); -- what was spent in a month
