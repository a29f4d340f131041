SELECT approx_distinct(user_id) AS people, count(*) AS events
FROM analytics.events
GROUP BY cumulate(ts, INTERVAL '1 hour', INTERVAL '1 day')
