SELECT symbol, avg(ask - bid) AS spread, avg((ask - bid) / bid) * 10000 AS spread_bp
FROM market.quotes
GROUP BY tumble(ts, INTERVAL '10 seconds'), symbol
