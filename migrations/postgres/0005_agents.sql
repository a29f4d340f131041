-- Conversations with agents: threads, their messages, the runs that answered and the events of each run.

CREATE TABLE threads (
    workspace  TEXT COLLATE "C" NOT NULL REFERENCES workspaces (id) ON DELETE CASCADE,
    id         TEXT COLLATE "C" NOT NULL, -- the client's threadId
    agent      TEXT             NOT NULL,
    title      TEXT             NOT NULL,
    created_by TEXT             NOT NULL,
    created_at TIMESTAMPTZ      NOT NULL,
    updated_at TIMESTAMPTZ      NOT NULL, -- last message or change: lists show the newest first
    state_json TEXT             NOT NULL, -- AG-UI shared state
    PRIMARY KEY (workspace, id)
);
CREATE INDEX threads_by_time ON threads (workspace, updated_at, id);

CREATE TABLE messages (
    workspace    TEXT COLLATE "C" NOT NULL,
    thread       TEXT COLLATE "C" NOT NULL,
    seq          BIGINT           NOT NULL, -- order within the thread, from 1; may have gaps where a message came twice
    id           TEXT COLLATE "C" NOT NULL, -- the client's: the same id again is the same message
    role         TEXT             NOT NULL,
    content_json TEXT             NOT NULL, -- the whole AG-UI message object
    run_id       TEXT COLLATE "C",
    created_at   TIMESTAMPTZ      NOT NULL,
    PRIMARY KEY (workspace, thread, seq),
    UNIQUE (workspace, thread, id),
    FOREIGN KEY (workspace, thread) REFERENCES threads (workspace, id) ON DELETE CASCADE
);

CREATE TABLE runs (
    workspace   TEXT COLLATE "C" NOT NULL,
    thread      TEXT COLLATE "C" NOT NULL,
    run_id      TEXT COLLATE "C" NOT NULL,
    agent       TEXT             NOT NULL,
    status      TEXT             NOT NULL,
    started_at  TIMESTAMPTZ      NOT NULL,
    finished_at TIMESTAMPTZ, -- NULL while it runs; set once, as a run has one terminal event
    error       TEXT,
    PRIMARY KEY (workspace, run_id), -- events are asked for by run id alone
    FOREIGN KEY (workspace, thread) REFERENCES threads (workspace, id) ON DELETE CASCADE
);
CREATE INDEX runs_by_thread ON runs (workspace, thread); -- for the cascade
CREATE INDEX runs_unfinished ON runs (started_at) WHERE finished_at IS NULL; -- what a restart has to end

CREATE TABLE run_events (
    workspace TEXT COLLATE "C" NOT NULL,
    run_id    TEXT COLLATE "C" NOT NULL,
    n         BIGINT           NOT NULL, -- place within the run: the number in the SSE event id
    event     TEXT             NOT NULL, -- the encoded AG-UI event, sent again as it is
    PRIMARY KEY (workspace, run_id, n),
    FOREIGN KEY (workspace, run_id) REFERENCES runs (workspace, run_id) ON DELETE CASCADE
);

SELECT wall_off('threads'), wall_off('messages'), wall_off('runs'), wall_off('run_events');
