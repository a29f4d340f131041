SELECT symbol, vwap,
       avg(vwap) OVER (PARTITION BY symbol ORDER BY window_start ROWS BETWEEN 19 PRECEDING AND CURRENT ROW) AS sma20,
       ema(vwap, 20) OVER w AS ema20, rsi(vwap, 14) OVER w AS rsi14, drawdown(vwap) OVER w AS drawdown
FROM metrics.price_1m
WINDOW w AS (PARTITION BY symbol ORDER BY window_start)
