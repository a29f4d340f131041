-- Positions in symbols; their value is computed live and never stored.

CREATE TABLE portfolios (
    workspace  TEXT    NOT NULL REFERENCES workspaces (id) ON DELETE CASCADE,
    id         TEXT    NOT NULL,
    name       TEXT    NOT NULL,
    currency   TEXT    NOT NULL,
    created_at INTEGER NOT NULL,
    PRIMARY KEY (workspace, id)
) STRICT;

CREATE TABLE positions (
    workspace TEXT NOT NULL,
    portfolio TEXT NOT NULL,
    symbol    TEXT NOT NULL,
    qty       REAL NOT NULL, -- negative: short
    cost      REAL NOT NULL, -- average price paid for one unit, in the portfolio's currency
    sector    TEXT,
    PRIMARY KEY (workspace, portfolio, symbol),
    FOREIGN KEY (workspace, portfolio) REFERENCES portfolios (workspace, id) ON DELETE CASCADE
) STRICT;
