-- Admits a request at all subjects (KEYS) or at none.
-- ARGV: clock | holder | session | lease in seconds | tokens, nano-dollars, least tokens, least nano-dollars as doubles
--       | for each subject 11 doubles: rpm, tpm, concurrency, monthly tokens, monthly nano-dollars; month, tokens and
--         nano-dollars of the books; what this holder holds: requests in flight, tokens, nano-dollars.
-- Reply: verdict (1 or 0), now, which subjects had no state (bit by bit); refusing subject (from 0), kind, wait (-1: next
--        month, -2: never); for each subject: requests, tokens; and if it is refused, for each subject: their reset.
local now = clock(ARGV[1])
local cell = math.floor(now / 1000)
local id, session, lease = ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local need_tokens, need_nano, least_tokens, least_nano = unpack('<dddd', ARGV[5])
local states, fresh = {}, 0
local worst, refusing, kind, wait = 0, 0, 0, 0

-- What takes longest to give way is named; of equals the last.
local function refuse(rank, subject, which, ms)
  if rank >= worst then worst, refusing, kind, wait = rank, subject, which, ms end
end

for i = 1, #KEYS do
  local rpm, tpm, most_busy, m_tokens, m_nano, month, b_tokens, b_nano, own_busy, own_tokens, own_nano =
    unpack('<ddddddddddd', ARGV[5 + i])
  local s, problem = load(KEYS[i])
  if problem then return problem end
  if not s then
    s, fresh = new_state(KEYS[i], cell), fresh + 2 ^ (i - 1)
  end
  states[i] = s
  s.rpm, s.tpm = rpm, tpm
  advance(s, cell)
  -- Who holds what matters only where requests at once or a quota are limited.
  s.counts = most_busy > 0 or m_tokens > 0 or m_nano > 0
  local busy, tokens, nano = 0, 0, 0
  if s.counts then busy, tokens, nano = holdings(s, id, session, own_busy, own_tokens, own_nano, cell) end
  if rpm > 0 and s.rs + 1 > rpm then
    local ms = wait_ms(s, 1, 0, rpm, 0, now)
    refuse(ms, i, 0, ms)
  end
  if tpm > 0 then
    if need_tokens > tpm then
      refuse(1e18, i, 1, -2)
    elseif s.ts + need_tokens > tpm then
      local ms = wait_ms(s, 0, need_tokens, 0, tpm, now)
      refuse(ms, i, 1, ms)
    end
  end
  if most_busy > 0 and busy >= most_busy then refuse(1000, i, 2, 1000) end
  if m_tokens > 0 or m_nano > 0 then
    s.quota = 1
    turn_page(s, now, month, b_tokens, b_nano)
    local bt, bn = s.bt, s.bn
    -- A replica that is in the next month already is bound by both: what it books there is not counted here yet.
    if month > s.month then bt, bn = math.max(bt, b_tokens), math.max(bn, b_nano) end
    if m_tokens > 0 and bt + tokens + least_tokens > m_tokens then refuse(1e17, i, 3, -1) end
    if m_nano > 0 and bn + nano + least_nano > m_nano then refuse(1e17, i, 4, -1) end
  end
end

local reply = { worst == 0 and 1 or 0, now, fresh, refusing - 1, kind, wait }
local n = 6
for i = 1, #KEYS do
  local s = states[i]
  if worst == 0 then
    add(s, s.rpm > 0 and 1 or 0, s.tpm > 0 and need_tokens or 0)
    if s.counts then
      s.busy = s.busy + 1
      if s.quota == 1 then s.tokens, s.nano = s.tokens + need_tokens, s.nano + need_nano end
      store(s, holders_with_ours(s, id, cell + lease))
    else
      store(s, s.v:sub(HOLDERS_AT))
    end
  elseif s.turned_back then
    -- Noted by a refusal too, or the window would stand still until the clock is where it was.
    store(s, s.v:sub(HOLDERS_AT))
  end
  reply[n + 1], reply[n + 2] = s.rs, s.ts
  n = n + 2
end
if worst > 0 then
  for i = 1, #KEYS do
    n = n + 1
    reply[n] = reset_ms(states[i], now)
  end
end
return reply
