SELECT thread, coalesce(sum(amount), 0) AS spend, count(amount) AS payments, count(*) AS messages
FROM chat.messages
GROUP BY hop(ts, INTERVAL '10 seconds', INTERVAL '5 minutes'), thread
