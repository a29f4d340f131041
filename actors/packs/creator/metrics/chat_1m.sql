SELECT role, count(*) AS messages, count(DISTINCT sender) AS people, avg(length(text)) AS mean_length
FROM chat.messages
GROUP BY tumble(ts, INTERVAL '1 minute'), role
