SELECT event, count(*) AS events, count(DISTINCT user_id) AS users, sum(value) AS value
FROM analytics.events
GROUP BY tumble(ts, INTERVAL '1 minute'), event
