SELECT user_id, count(*) AS events, count(*) FILTER (WHERE event = 'page_view') AS views, sum(value) AS value
FROM analytics.events
WHERE user_id IS NOT NULL
GROUP BY session(ts, INTERVAL '30 minutes'), user_id
