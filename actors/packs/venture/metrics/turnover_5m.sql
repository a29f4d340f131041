SELECT symbol,
       sum(price * qty) AS turnover, sum(price * qty) / sum(qty) AS vwap, max(price) / min(price) * 100 - 100 AS range_pct
FROM market.trades
GROUP BY hop(ts, INTERVAL '10 seconds', INTERVAL '5 minutes'), symbol
