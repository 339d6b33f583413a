-- The form of a subject's state: one string. Prepended to every script, so that all of them read the same. FORM stands in
-- the names of the keys too: another version of the gateway never reads what it does not understand.
--
--   ring:    61 cells, by their number modulo 61: requests I3, tokens I6. That of the newest cell is in the head instead
--   head:    FORM c1 | newest cell I4 | last cell that something was put into I4 | month I4 (0: has no quota) | booked
--            tokens d, booked nano-dollars d | the other cells together: requests d, tokens d | newest cell: requests f,
--            tokens d
--   holders: up to 40 replicas: requests in flight f, held tokens d, held nano-dollars d, expires I4 (unix seconds; over:
--            free), session I4, id c8
--
-- That is 2 KB at the most, whatever the limit. A script costs mostly its calls, the numbers it reads and writes and the
-- strings it makes. So the ring is touched only when a second has passed; within it, head and holders are all that is read,
-- and what changes stands side by side: the newest cell, and the first holder. Numbers are doubles in here, exact up to
-- 2^53, and cost least as such; an f is exact up to MOST_REQUESTS.
local spread, pack, unpack, call = unpack, struct.pack, struct.unpack, redis.call
-- Reads so many numbers of a message (MessagePack) from an offset on; says first where the next one begins.
local read = cmsgpack.unpack_limit
local FORM, HEAD, HEAD_SIZE = '3', '<c1I4I4I4ddddfd', 57
local CELLS, CELL, CELL_SIZE = 61, '<I3I6', 9
local HOLDER, HOLDER_SIZE, MAX_HOLDERS = '<fddI4I4c8', 36, 40
local RING_SIZE = CELLS * CELL_SIZE
-- As texts: Redis would write numbers out anew at every call.
local HEAD_FROM, WINDOWS_FROM, NEWEST_FROM, TO_END, TTL, QUOTA_TTL = '549', '578', '594', '-1', '180', '3456000'
local HOLDERS_AT = HEAD_SIZE + 1
local MOST, MOST_REQUESTS, MOST_TOKENS = 4e15, 16777215, 281474976710655
-- How long what a replica holds outlives its last sign of life, in seconds.
local LEASE = 30

-- Milliseconds of Redis's clock; tests give their own.
local function clock(given)
  if given ~= '' then return tonumber(given) end
  local time = call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end
