SELECT event, count(*) AS events, approx_distinct(user_id) AS people, avg(value) AS mean_value
FROM analytics.events
GROUP BY tumble(ts, INTERVAL '1 minute'), event
