-- Windows of processing time: bids of each bidder every ten seconds. Time here is event time, so that a replay
-- gives the same rows.
SELECT bidder, count(*) AS bids FROM nexmark.bids GROUP BY tumble(ts, INTERVAL '10 seconds'), bidder
