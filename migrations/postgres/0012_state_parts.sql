-- The state of a workspace in parts. As one value it was written whole at every checkpoint, however little of it had
-- changed; now a checkpoint writes the parts that did. `checkpoints.state` is the head, which names every part and the
-- checkpoint that wrote it. A state from before is read as it is, all in one, and becomes parts at its next checkpoint.
CREATE TABLE state_parts (
    workspace TEXT COLLATE "C" NOT NULL REFERENCES checkpoints (workspace) ON DELETE CASCADE,
    name      TEXT COLLATE "C" NOT NULL, -- what it is of, and which part of that: `metric/bars/panes`
    state     BYTEA            NOT NULL, -- with its own name, the checkpoint that wrote it and a checksum
    PRIMARY KEY (workspace, name)
);
-- As that of `checkpoints`: the attempt to compress it costs more than it saves.
ALTER TABLE state_parts ALTER COLUMN state SET STORAGE EXTERNAL;

SELECT wall_off('state_parts');
