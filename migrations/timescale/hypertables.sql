-- What TimescaleDB adds to the tables of `postgres/`, where its extension is in the database. Not a migration: it is run
-- at every start, does what is missing, and so also takes over a database in which the extension came later. The
-- caller sets `app.chunk`, `app.compress_after` and `app.retain` (empty: for ever) in its session.

-- Hours and days of final rows (below) outlive the rows that retention drops. Up to where it has come, which a setting
-- that keeps rows for longer does not undo, they are never made anew.
DO $$
BEGIN
    PERFORM set_config('app.kept_from', GREATEST(
        (SELECT (config ->> 'kept_from')::timestamptz FROM timescaledb_information.jobs
         WHERE proc_schema = current_schema() AND proc_name = 'refresh_samples'),
        (SELECT now() - (config ->> 'drop_after')::interval FROM timescaledb_information.jobs
         WHERE hypertable_schema = current_schema() AND hypertable_name = 'final_rows' AND proc_name = 'policy_retention')
    )::text, false);
END $$;

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

-- Hours of a metric that may have got rows after they were kept in `final_rows_1h`, or their day in `final_rows_1d`:
-- `Store::samples` computes these from the rows until `refresh_samples` has made them anew. The commit that brings a row
-- to an hour that is over notes it here. No reference to `workspaces`: what is deleted is noted too.
DO $$
BEGIN
    PERFORM set_config('app.workspace', '*', true);
    IF to_regclass('late_hours') IS NULL THEN
        CREATE TABLE late_hours (
            workspace TEXT COLLATE "C" NOT NULL,
            metric    TEXT COLLATE "C" NOT NULL,
            bucket    TIMESTAMPTZ      NOT NULL,
            written   XID8             NOT NULL DEFAULT pg_current_xact_id(), -- the last transaction that noted it
            PRIMARY KEY (workspace, metric, bucket)
        );
        PERFORM wall_off('late_hours');
        -- Aggregates of an earlier version miss what came late to it, nobody knows where.
        IF to_regclass('final_rows_1h') IS NOT NULL THEN
            INSERT INTO late_hours (workspace, metric, bucket)
            SELECT DISTINCT workspace, metric, time_bucket('1 hour', window_start) FROM final_rows;
        END IF;
    END IF;
    -- Transactions of the server that this database was restored from.
    UPDATE late_hours SET written = DEFAULT WHERE written > pg_current_xact_id();
END $$;

-- History at a coarser step: of each hour, and for each key, the row that ended last, and of the hours the same for
-- each day. Real-time aggregates: hours that are not rolled up yet are computed from the rows themselves. Segmented
-- like the rows they are made of, so that a page of one metric reads no other's.
DO $$
DECLARE
    rollups CONSTANT TEXT[][] := ARRAY[
        ARRAY['final_rows_1h', 'final_rows', 'window_start', '1 hour'],
        ARRAY['final_rows_1d', 'final_rows_1h', 'bucket', '1 day']];
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
                 FROM %2$I WHERE row_json <> ''null'' -- withdrawn
                 GROUP BY workspace, metric, time_bucket(%4$L, %3$I), key_json WITH NO DATA',
                r[1], r[2], r[3], r[4]);
            EXECUTE format('CREATE INDEX ON %I (workspace, metric, bucket, key_json)', r[1]);
        END IF;
        -- Of an earlier version: it passed over what came later than some days.
        PERFORM remove_continuous_aggregate_policy(r[1]::regclass, if_exists => true);
    END LOOP;
END $$;

-- Keeps the hours that ended two hours ago and the days that ended a day ago, and makes those anew that have late hours.
-- Only this refreshes the aggregates: a refresh beside it could take a change over and not be done when this one is.
--
-- Not with a policy from the beginning on, though TimescaleDB makes anew only what changed: it notes of a transaction
-- the oldest and the newest change, so one late row beside a live one would bring the hours of all workspaces between
-- them; and what retention drops is a change, which would empty the hours that outlive it.
CREATE OR REPLACE PROCEDURE refresh_samples(job_id INT, config JSONB) LANGUAGE plpgsql AS $$
DECLARE
    at CONSTANT TIMESTAMPTZ := now();
    hours_to CONSTANT TIMESTAMPTZ := date_trunc('hour', at - INTERVAL '2 hours', 'UTC');
    days_to CONSTANT TIMESTAMPTZ := date_trunc('day', at - INTERVAL '1 day', 'UTC');
    began PG_SNAPSHOT;
    kept_from TIMESTAMPTZ;
    late TSTZMULTIRANGE;
    rollup TEXT;
    kept TEXT;
    kept_to TIMESTAMPTZ;
    refresh_to TIMESTAMPTZ;
    wanted TSTZMULTIRANGE;
    span TSTZRANGE;
BEGIN
    PERFORM set_config('search_path', config ->> 'search_path', false), set_config('app.workspace', '*', false);
    PERFORM pg_advisory_lock(hashtext('refresh_samples'));
    -- The refreshes read all that was committed by now: what was noted by then needs no note any more after them.
    SELECT pg_current_snapshot() INTO began;
    SELECT date_trunc('day', GREATEST(
        (config ->> 'kept_from')::timestamptz,
        (SELECT at - (j.config ->> 'drop_after')::interval FROM timescaledb_information.jobs AS j
         WHERE j.hypertable_schema = current_schema() AND j.hypertable_name = 'final_rows' AND j.proc_name = 'policy_retention')
    ), 'UTC') + INTERVAL '1 day' INTO kept_from;
    kept_from := COALESCE(kept_from, '-infinity');
    SELECT COALESCE(range_agg(tstzrange(day, day + INTERVAL '1 day')), '{}') INTO late
    FROM (SELECT DISTINCT date_trunc('day', bucket, 'UTC') AS day FROM late_hours) AS days WHERE day >= kept_from;

    FOREACH rollup IN ARRAY ARRAY['final_rows_1h', 'final_rows_1d'] LOOP
        refresh_to := CASE rollup WHEN 'final_rows_1h' THEN hours_to ELSE days_to END;
        SELECT format('%I.%I', materialization_hypertable_schema, materialization_hypertable_name) INTO kept
        FROM timescaledb_information.continuous_aggregates
        WHERE view_schema = current_schema() AND view_name = rollup;
        EXECUTE format('SELECT max(bucket) + $1 FROM %s', kept)
        USING CASE rollup WHEN 'final_rows_1h' THEN INTERVAL '1 hour' ELSE INTERVAL '1 day' END INTO kept_to;
        wanted := late * tstzmultirange(tstzrange(NULL, refresh_to));
        IF kept_to IS NULL OR kept_to < refresh_to THEN
            wanted := wanted + tstzmultirange(tstzrange(kept_to, refresh_to));
        END IF;
        FOREACH span IN ARRAY ARRAY(SELECT unnest(wanted)) LOOP
            CALL refresh_continuous_aggregate(rollup::regclass, lower(span), upper(span));
            -- What it changed is told to the days when it is committed, which it leaves to whoever called it.
            COMMIT;
        END LOOP;
    END LOOP;

    -- Where the rows may be gone nothing was made anew, and the note stays until they are. What a commit notes again
    -- just now stays, and neither waits for the other.
    DELETE FROM late_hours WHERE (workspace, metric, bucket) IN (
        SELECT workspace, metric, bucket FROM late_hours AS noted
        WHERE pg_visible_in_snapshot(written, began) AND bucket < hours_to
            AND (bucket >= kept_from OR NOT EXISTS (
                SELECT FROM final_rows AS f WHERE f.workspace = noted.workspace AND f.metric = noted.metric
                    AND f.window_start >= noted.bucket AND f.window_start < noted.bucket + INTERVAL '1 hour'))
        FOR UPDATE SKIP LOCKED);
    PERFORM pg_advisory_unlock(hashtext('refresh_samples'));
END $$;

DO $$
DECLARE
    settings CONSTANT JSONB := jsonb_build_object(
        'search_path', current_setting('search_path'), 'kept_from', NULLIF(current_setting('app.kept_from'), ''));
    job INT;
BEGIN
    SELECT job_id INTO job FROM timescaledb_information.jobs
    WHERE proc_schema = current_schema() AND proc_name = 'refresh_samples';
    IF job IS NULL THEN
        PERFORM add_job('refresh_samples', INTERVAL '30 minutes', config => settings);
    ELSE
        PERFORM alter_job(job, config => settings);
    END IF;
END $$;

-- Deletes rows of a workspace, of one metric or all, that ended by `before` from the hours and days; to be called before
-- the rows themselves are deleted. A refresh under way may have read those: their hours then count as late.
CREATE OR REPLACE FUNCTION forget_samples(of_workspace TEXT, of_metric TEXT, before TIMESTAMPTZ) RETURNS VOID
LANGUAGE plpgsql AS $$
DECLARE
    rollup RECORD;
BEGIN
    IF NOT pg_try_advisory_xact_lock_shared(hashtext('refresh_samples')) THEN
        INSERT INTO late_hours (workspace, metric, bucket)
        SELECT DISTINCT workspace, metric, time_bucket('1 hour', window_start) FROM final_rows
        WHERE workspace = of_workspace AND (metric = of_metric OR of_metric IS NULL)
            AND window_start <= before AND window_end <= before
        ON CONFLICT (workspace, metric, bucket) DO UPDATE SET written = excluded.written;
    END IF;
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
