-- The form of a subject's state: one string. Prepended to every script, so that all of them read the same. FORM stands in
-- the names of the keys too: another version of the gateway never reads what it does not understand.
--
--   ring:    61 cells, by their number modulo 61: requests I3, tokens I6. That of the newest cell is in the head instead
--   head:    FORM c1 | newest cell I4 | last cell that something was put into I4 | month I4 | booked tokens I7 | booked
--            nano-dollars I7 | has a quota I1 | requests I6 | tokens I7 | newest cell: requests I3, tokens I6
--   holders: up to 42 replicas: id c8, session I4, expires (unix seconds; over: free) I4, requests in flight I4, held
--            tokens I7, held nano-dollars I7
--
-- That is 2 KB at the most, whatever the limit. A script costs mostly its calls, the numbers it unpacks and the strings it
-- makes. So the ring is touched only when a second has passed; within it, head and holders are all that is read and
-- written. Numbers are doubles in here: exact up to 2^53.
local spread, pack, unpack, call = unpack, struct.pack, struct.unpack, redis.call
local FORM, HEAD, HEAD_SIZE = '2', '<c1I4I4I4I7I7I1I6I7I3I6', 50
local CELLS, CELL, CELL_SIZE = 61, '<I3I6', 9
local HOLDER, HOLDER_SIZE, MAX_HOLDERS = '<c8I4I4I4I7I7', 34, 42
local RING_SIZE = CELLS * CELL_SIZE
-- As texts: Redis would write numbers out anew at every call.
local HEAD_FROM, WINDOWS_FROM, TO_END, TTL, QUOTA_TTL = '549', '577', '-1', '180', '3456000'
local HOLDERS_AT = HEAD_SIZE + 1
local MOST, MOST_REQUESTS, MOST_TOKENS = 4e15, 16777215, 281474976710655

-- Milliseconds of Redis's clock; tests give their own.
local function clock(given)
  if given ~= '' then return tonumber(given) end
  local time = call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end
