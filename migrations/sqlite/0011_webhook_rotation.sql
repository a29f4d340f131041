-- The secret before the last rotation: what is sent is signed with both for a while, so that a receiver can take the new
-- one without missing a message.
ALTER TABLE webhooks ADD COLUMN previous_secret TEXT;    -- sealed as `secret` is; NULL: there is none
ALTER TABLE webhooks ADD COLUMN previous_until  INTEGER; -- it signs until then
