-- User sessions: how many bids each bidder made in a row, with pauses of at most ten seconds.
SELECT bidder, count(*) AS bids FROM nexmark.bids GROUP BY session(ts, INTERVAL '10 seconds'), bidder
