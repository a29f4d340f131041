SELECT window_start, symbol,
       sum(price * qty) / sum(qty) AS vwap, min(price) AS low, max(price) AS high, sum(qty) AS volume, count(*) AS trades
FROM market.trades
GROUP BY tumble(ts, INTERVAL '1 minute'), symbol
