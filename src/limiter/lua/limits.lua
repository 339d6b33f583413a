-- Decides on requests and corrects what was decided before, in the order in which this replica did both.
-- KEYS: every state that is touched, once.
-- ARGV: clock | holder: its session I4, its id c8 | numbers (MessagePack): how many steps; then, one after the other, of
--         a correction, the same at keys that follow each other: 0, the first key (from 1), how many they are, and the bytes
--           of what follows; requests that ended; cell of the reservation, requests and tokens to take back from it;
--           requests and tokens to add now; held tokens and nano-dollars to add (negative: to let go); month, tokens and
--           nano-dollars that were booked.
--         requests that are admitted together or not at all: number of their subjects; how many they are; of all together:
--           tokens, nano-dollars, least tokens, least nano-dollars; month; for each subject: rpm, tpm, concurrency, monthly
--           tokens, monthly nano-dollars; for each subject: its key; tokens and nano-dollars of the books; what this holder
--           holds: requests in flight, tokens, nano-dollars. The first such step's subjects are the first keys.
-- Reply, as doubles: now; for each request: verdict (1: admitted at all of its subjects, 0: at none, -1: the state of the
--   refusing subject is not ours), which subjects had no state before this call (bit by bit), and, if it is not admitted:
--   refusing subject (from 0), kind, wait (-1: next month, -2: never); for each of its subjects: requests, tokens, and, if
--   it is not admitted, their reset.
--
-- Each state is read once and written once, however many steps touch it.
local cell = math.floor(now / 1000)
local session, id = unpack('<I4c8', ARGV[2])
local steps = ARGV[3]
local at, count = read(steps, 1, 0)
local states, foreign = {}, {}
local reply, n = { now }, 1

-- The state behind a key; nil: there is none, or it is not ours.
local function state(key)
  local s = states[key]
  if s == nil then
    local problem
    s, problem = load(KEYS[key])
    foreign[key] = problem
    if s then advance(s, cell) end
    states[key] = s or false
  end
  return s or nil
end

-- What has no state, or no holder of this session, has nothing to correct: the holder brings its truth when it comes again.
local function correct(first, count)
  local ended, from, requests, tokens, begun, more, held_tokens, held_nano, month, b_tokens, b_nano
  at, ended, from, requests, tokens, begun, more, held_tokens, held_nano, month, b_tokens, b_nano = read(steps, 11, at)
  for key = first, first + count - 1 do
    local s = state(key)
    if s then
      if requests > 0 or tokens > 0 then take_back(s, from, requests, tokens) end
      if begun > 0 or more > 0 then add(s, begun, more) end
      if s.month == month then s.bt, s.bn = max(0, s.bt + b_tokens), max(0, s.bn + b_nano) end
      if ended > 0 or held_tokens ~= 0 or held_nano ~= 0 then
        find_holders(s, id, cell)
        if s.is_held and s.session == session then
          s.busy, s.tokens, s.nano = max(0, s.busy - ended), max(0, s.tokens + held_tokens), max(0, s.nano + held_nano)
        end
      end
      s.dirty = true
    end
  end
end

local function decide(count, times, need_tokens, need_nano)
  local least_tokens, least_nano, month
  at, least_tokens, least_nano, month = read(steps, 3, at)
  -- Where the next number begins, and five of each subject.
  local caps = { read(steps, 5 * count, at) }
  at = caps[1]
  local asked, fresh = {}, 0
  local worst, refusing, kind, wait = 0, 0, 0, 0
  local function refuse(rank, subject, which, ms)
    -- What takes longest to give way is named; of equals the last.
    if rank >= worst then worst, refusing, kind, wait = rank, subject, which, ms end
  end
  for i = 1, count do
    local rpm, tpm, most_busy, m_tokens, m_nano = spread(caps, 5 * i - 3, 5 * i + 1)
    local key, b_tokens, b_nano, own_busy, own_tokens, own_nano
    at, key, b_tokens, b_nano, own_busy, own_tokens, own_nano = read(steps, 6, at)
    local s = state(key)
    if foreign[key] then
      s = new_state(KEYS[key], cell)
      refuse(1e19, i, -1, 0)
    elseif not s then
      s = new_state(KEYS[key], cell)
      states[key], s.fresh = s, true
    end
    if s.fresh then fresh = fresh + 2 ^ (i - 1) end
    asked[i], s.rpm, s.tpm = s, rpm, tpm
    if rpm > 0 and s.rs + times > rpm then
      local ms = wait_ms(s, times, 0, rpm, 0, now)
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
    -- Who holds what matters only where requests at once or a quota are limited.
    s.has_quota = m_tokens > 0 or m_nano > 0
    s.counts = most_busy > 0 or s.has_quota
    if s.counts then
      find_holders(s, id, cell)
      be_held(s, session, own_busy, own_tokens, own_nano)
      if most_busy > 0 and s.others_busy + s.busy + times > most_busy then refuse(1000, i, 2, 1000) end
      if s.has_quota then
        turn_page(s, now, month, b_tokens, b_nano)
        local bt, bn = s.bt, s.bn
        -- A replica that is in the next month already is bound by both: what it books there is not counted here yet.
        if month > s.month then bt, bn = max(bt, b_tokens), max(bn, b_nano) end
        if m_tokens > 0 and bt + s.others_tokens + s.tokens + least_tokens > m_tokens then refuse(1e17, i, 3, -1) end
        if m_nano > 0 and bn + s.others_nano + s.nano + least_nano > m_nano then refuse(1e17, i, 4, -1) end
      end
    end
  end
  reply[n + 1], reply[n + 2] = kind == -1 and -1 or (worst == 0 and 1 or 0), fresh
  n = n + 2
  if worst ~= 0 then
    reply[n + 1], reply[n + 2], reply[n + 3] = refusing - 1, kind, wait
    n = n + 3
  end
  for i = 1, count do
    local s = asked[i]
    if worst == 0 then
      add(s, s.rpm > 0 and times or 0, s.tpm > 0 and need_tokens or 0)
      -- A call of an earlier session was overtaken: its admission was decided otherwise.
      if s.counts and s.session == session then
        s.busy, s.expires = s.busy + times, cell + LEASE
        if s.has_quota then s.tokens, s.nano = s.tokens + need_tokens, s.nano + need_nano end
      end
      s.dirty = true
      reply[n + 1], reply[n + 2] = s.rs, s.ts
      n = n + 2
    else
      reply[n + 1], reply[n + 2], reply[n + 3] = s.rs, s.ts, reset_ms(s, now)
      n = n + 3
    end
  end
end

for _ = 1, count do
  local subjects, first, second, third
  at, subjects, first, second, third = read(steps, 4, at)
  if subjects == 0 then correct(first, second) else decide(subjects, first, second, third) end
end
for _, s in pairs(states) do
  -- A clock that went back is noted by a refusal too, or the window would stand still until the clock is where it was.
  if s and (s.dirty or s.turned_back) then store(s, held(s, id)) end
end
return pack('<' .. ('d'):rep(n), spread(reply, 1, n))
