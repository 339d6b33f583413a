-- Corrects what was reserved: settles, undoes, releases, books. A key may stand in KEYS several times.
-- ARGV: clock | holder | session | lease in seconds | for each key 11 doubles: requests that ended; cell of the
--       reservation, requests and tokens to take back from it; requests and tokens to add now; held tokens and nano-dollars to add
--       (negative: to let go); month, tokens and nano-dollars that were booked.
-- What has no state, or no holder of this session, has nothing to correct: the holder brings its truth when it comes again.
local now = clock(ARGV[1])
local newest = math.floor(now / 1000)
local id, session = ARGV[2], tonumber(ARGV[3])

-- The holders, with ours corrected.
local function corrected(s, ended, held_tokens, held_nano)
  for at = HOLDERS_AT, #s.v, HOLDER_SIZE do
    local h_id, h_session, expires, busy, tokens, nano = unpack(HOLDER, s.v, at)
    if h_id == id and h_session == session then
      s.at, s.session, s.busy = at, session, math.max(0, busy - ended)
      s.tokens, s.nano = math.max(0, tokens + held_tokens), math.max(0, nano + held_nano)
      return holders_with_ours(s, id, expires)
    end
  end
  return s.v:sub(HOLDERS_AT)
end

for i = 1, #KEYS do
  local ended, cell, requests, tokens, begun, more, held_tokens, held_nano, month, b_tokens, b_nano =
    unpack('<ddddddddddd', ARGV[4 + i])
  local s = load(KEYS[i])
  if s then
    advance(s, newest)
    if requests > 0 or tokens > 0 then take_back(s, cell, requests, tokens) end
    if begun > 0 or more > 0 then add(s, begun, more) end
    if s.month == month then s.bt, s.bn = math.max(0, s.bt + b_tokens), math.max(0, s.bn + b_nano) end
    store(s, corrected(s, ended, held_tokens, held_nano))
  end
end
return redis.status_reply('OK')
