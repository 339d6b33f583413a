-- Renews what this holder holds at each subject (KEYS), and shows their windows and books.
-- ARGV: clock | holder: its session I4, its id c8 | for each subject (MessagePack): requests in flight, held
--       tokens, held nano-dollars.
-- Reply: now, and for each subject the head and the cells of its state, or an empty string.
local now = clock(ARGV[1])
local seconds = math.floor(now / 1000)
local session, id = unpack('<I4c8', ARGV[2])
local reply = { now }
for i = 1, #KEYS do
  local _, busy, tokens, nano = read(ARGV[2 + i], 3, 0)
  local s, problem = load(KEYS[i])
  local holds = not problem and (busy > 0 or tokens > 0 or nano > 0)
  if holds then
    s = s or new_state(KEYS[i], seconds)
    advance(s, seconds)
    find_holders(s, id, seconds)
    be_held(s, session, busy, tokens, nano)
    if s.expires < seconds + LEASE / 2 then
      s.expires = seconds + LEASE
      store(s, held(s, id))
    end
  end
  -- What is stored is still in here as it was computed.
  reply[i + 1] = s and head(s) .. whole_ring(s) or ''
end
return reply
