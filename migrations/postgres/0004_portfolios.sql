-- Positions in symbols; their value is computed live and never stored.

CREATE TABLE portfolios (
    workspace  TEXT COLLATE "C" NOT NULL REFERENCES workspaces (id) ON DELETE CASCADE,
    id         TEXT COLLATE "C" NOT NULL,
    name       TEXT             NOT NULL,
    currency   TEXT             NOT NULL,
    created_at TIMESTAMPTZ      NOT NULL,
    PRIMARY KEY (workspace, id)
);

-- Quantities and money: NUMERIC, so that sums in SQL are exact, without the NaN and the infinities that NUMERIC knows
-- and no amount is.
CREATE DOMAIN finite_numeric AS NUMERIC CHECK (VALUE NOT IN ('NaN', 'Infinity', '-Infinity'));

CREATE TABLE positions (
    workspace TEXT COLLATE "C" NOT NULL,
    portfolio TEXT COLLATE "C" NOT NULL,
    symbol    TEXT COLLATE "C" NOT NULL,
    qty       FINITE_NUMERIC   NOT NULL, -- negative: short
    cost      FINITE_NUMERIC   NOT NULL, -- average price paid for one unit, in the portfolio's currency
    sector    TEXT,
    PRIMARY KEY (workspace, portfolio, symbol),
    FOREIGN KEY (workspace, portfolio) REFERENCES portfolios (workspace, id) ON DELETE CASCADE
);

SELECT wall_off('portfolios'), wall_off('positions');
