-- Where in the log a rule begins to look at its metric, as metrics have: read again from further back, it must not fire for
-- what it did not see. Rules of before begin with their metric.
ALTER TABLE alert_rules ADD COLUMN since_offset INTEGER NOT NULL DEFAULT 0;
