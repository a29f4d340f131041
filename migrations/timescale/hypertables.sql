-- What TimescaleDB adds to the tables of `postgres/`, where its extension is in the database. Not a migration: it is run
-- at every start, does what is missing, and so also takes over a database in which the extension came later. The
-- caller sets `app.chunk`, `app.compress_after` and `app.retain` (empty: for ever) in its session.

-- Final rows, alerts and market snapshots become hypertables, cut by event time: a page of one metric then reads the chunks of its
-- range, compression works chunk by chunk, and retention drops whole chunks instead of deleting rows. Compressed
-- chunks are ordered by workspace first (segmentby), so one tenant's read decompresses no other's rows.
--
-- TimescaleDB compresses no table with row security, so on these it gives way: their wall is the primary key that
-- starts with `workspace` and the scope without which the store runs no statement.
DO $$
DECLARE
    tables CONSTANT TEXT[][] := ARRAY[
        ARRAY['final_rows', 'window_start', 'workspace, metric', 'window_start, window_end, key_json'],
        ARRAY['alerts', 'started_at', 'workspace', 'started_at, id'],
        ARRAY['market_snapshots', 'at', 'workspace, symbol', 'at, source']];
    t TEXT[];
BEGIN
    FOREACH t SLICE 1 IN ARRAY tables LOOP
        IF NOT EXISTS (
            SELECT FROM timescaledb_information.hypertables
            WHERE hypertable_schema = current_schema() AND hypertable_name = t[1] AND compression_enabled
        ) THEN
            EXECUTE format('DROP POLICY IF EXISTS own_workspace ON %I', t[1]);
            EXECUTE format('ALTER TABLE %I NO FORCE ROW LEVEL SECURITY', t[1]);
            EXECUTE format('ALTER TABLE %I DISABLE ROW LEVEL SECURITY', t[1]);
            PERFORM create_hypertable(
                t[1]::regclass, by_range(t[2]::name, current_setting('app.chunk')::interval),
                create_default_indexes => false, if_not_exists => true, migrate_data => true);
            EXECUTE format(
                'ALTER TABLE %I SET (timescaledb.compress, timescaledb.compress_segmentby = %L, timescaledb.compress_orderby = %L)',
                t[1], t[3], t[4]);
        END IF;
        -- Removed and added again, so that a changed setting takes effect.
        PERFORM remove_compression_policy(t[1]::regclass, if_exists => true);
        PERFORM add_compression_policy(t[1]::regclass, current_setting('app.compress_after')::interval);
        PERFORM remove_retention_policy(t[1]::regclass, if_exists => true);
        IF current_setting('app.retain') <> '' THEN
            PERFORM add_retention_policy(t[1]::regclass, current_setting('app.retain')::interval);
        END IF;
    END LOOP;
END $$;

-- History at a coarser step: of each hour, and for each key, the row that ended last, and of the hours the same for
-- each day. Real-time aggregates: hours that are not rolled up yet are computed from the rows themselves. Segmented
-- like the rows they are made of, so that a page of one metric reads no other's.
DO $$
DECLARE
    rollups CONSTANT TEXT[][] := ARRAY[
        ARRAY['final_rows_1h', 'final_rows', 'window_start', '1 hour', '7 days', '1 hour', '30 minutes'],
        ARRAY['final_rows_1d', 'final_rows_1h', 'bucket', '1 day', '30 days', '1 day', '6 hours']];
    r TEXT[];
BEGIN
    FOREACH r SLICE 1 IN ARRAY rollups LOOP
        IF to_regclass(r[1]) IS NULL THEN
            EXECUTE format(
                'CREATE MATERIALIZED VIEW %1$I
                 WITH (timescaledb.continuous, timescaledb.materialized_only = false, timescaledb.create_group_indexes = false) AS
                 SELECT workspace, metric, time_bucket(%4$L, %3$I) AS bucket, key_json,
                        last(window_start, window_end) AS window_start, max(window_end) AS window_end,
                        last(revision, window_end) AS revision, last(row_json, window_end) AS row_json
                 FROM %2$I GROUP BY workspace, metric, time_bucket(%4$L, %3$I), key_json WITH NO DATA',
                r[1], r[2], r[3], r[4]);
            EXECUTE format('CREATE INDEX ON %I (workspace, metric, bucket, key_json)', r[1]);
        END IF;
        -- not beyond what retention leaves: rolling up rows that are gone would empty their hours
        PERFORM add_continuous_aggregate_policy(
            r[1]::regclass, start_offset => LEAST(r[5]::interval, NULLIF(current_setting('app.retain'), '')::interval), end_offset => r[6]::interval,
            schedule_interval => r[7]::interval, if_not_exists => true);
    END LOOP;
END $$;

-- Deletes rows of a workspace, of one metric or all, that ended by `before` from the hours and days. Their refresh looks
-- only at the last days, and what was deleted must not stay.
CREATE OR REPLACE FUNCTION forget_samples(of_workspace TEXT, of_metric TEXT, before TIMESTAMPTZ) RETURNS VOID
LANGUAGE plpgsql AS $$
DECLARE
    rollup RECORD;
BEGIN
    FOR rollup IN
        SELECT materialization_hypertable_schema AS s, materialization_hypertable_name AS t
        FROM timescaledb_information.continuous_aggregates
        WHERE view_schema = current_schema() AND view_name IN ('final_rows_1h', 'final_rows_1d')
    LOOP
        EXECUTE format(
            'DELETE FROM %I.%I WHERE workspace = $1 AND (metric = $2 OR $2 IS NULL) AND window_end <= $3', rollup.s, rollup.t)
        USING of_workspace, of_metric, before;
    END LOOP;
END $$;
