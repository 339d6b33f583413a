-- What is done to a state, and the law of its windows: the twin of crates/core/src/limit/window.rs.

local max, min = math.max, math.min

-- Cells with nothing in them.
local function nothing(bytes)
  return string.rep('\0', bytes)
end

-- The month of a unix time, counted from January of the year 0 (Howard Hinnant, "chrono-compatible low-level date
-- algorithms": civil_from_days).
local function month_of(ms)
  local days = math.floor(ms / 86400000) + 719468
  local era = math.floor(days / 146097)
  local doe = days - era * 146097
  local yoe = math.floor((doe - math.floor(doe / 1460) + math.floor(doe / 36524) - math.floor(doe / 146096)) / 365)
  local mp = math.floor((5 * (doe - (365 * yoe + math.floor(yoe / 4) - math.floor(yoe / 100))) + 2) / 153)
  local month = mp < 10 and mp + 3 or mp - 9
  return (yoe + era * 400 + (month <= 2 and 1 or 0)) * 12 + month - 1
end

-- `v` is head and holders as they were read; `ring` a ring that is to be written whole.
local function new_state(key, cell)
  return { key = key, v = nothing(HEAD_SIZE), ring = nothing(RING_SIZE), newest = cell, filled = 0, rs = 0, ts = 0, month = 0,
           bt = 0, bn = 0, cr = 0, ct = 0, is_held = false, fresh = false }
end

-- Reads a state; nil: there is none. What is not ours is an error that names the key.
local function load(key)
  local v = redis.pcall('GETRANGE', key, HEAD_FROM, TO_END)
  if v == '' and call('EXISTS', key) == 0 then return nil end
  if type(v) ~= 'string' or #v < HEAD_SIZE or (#v - HEAD_SIZE) % HOLDER_SIZE ~= 0 or v:sub(1, 1) ~= FORM then
    return nil, redis.error_reply('FOREIGN the key ' .. key .. ' holds something that is not a limit of tollgate')
  end
  local _, newest, filled, month, bt, bn, older_r, older_t, cr, ct = unpack(HEAD, v)
  -- All fields at once: a table that grows is made anew several times.
  return { key = key, v = v, ring = false, newest = newest, filled = filled, rs = older_r + cr, ts = older_t + ct,
           month = month, bt = bt, bn = bn, cr = cr, ct = ct, old = false, old_r = 0, old_t = 0, aged = false, turned_back = false,
           at = false, is_held = false, busy = 0, tokens = 0, nano = 0, expires = 0, session = 0, others_busy = false,
           others_tokens = 0, others_nano = 0, rpm = 0, tpm = 0, counts = false, has_quota = false, dirty = false }
end

-- A cell that holds so much, or as much as it can.
local function cell_of(requests, tokens)
  if requests > MOST_REQUESTS then requests = MOST_REQUESTS end
  if tokens > MOST_TOKENS then tokens = MOST_TOKENS end
  return pack(CELL, requests, tokens)
end

-- Puts `piece` in the place of as many bytes of `v`.
local function with(v, at, piece)
  return v:sub(1, at - 1) .. piece .. v:sub(at + #piece)
end

-- Where a cell is in the ring, from 0.
local function offset(cell)
  return cell % CELLS * CELL_SIZE
end

-- Both runs of the ring, if it is one around its end, that `count` cells from `cell` on take: first byte and number of
-- bytes of each.
local function runs(cell, count)
  local from, size = offset(cell), count * CELL_SIZE
  local first = min(size, RING_SIZE - from)
  return from, first, size - first
end

-- What `count` cells from `cell` on hold together.
local function sum_of(key, cell, count)
  local from, first, rest = runs(cell, count)
  local cells = call('GETRANGE', key, from, from + first - 1)
  if rest > 0 then cells = cells .. call('GETRANGE', key, 0, rest - 1) end
  local requests, tokens = 0, 0
  for at = 1, #cells, CELL_SIZE do
    local r, t = unpack(CELL, cells, at)
    requests, tokens = requests + r, tokens + t
  end
  return requests, tokens
end

-- The whole ring, what is not written yet included.
local function whole_ring(s)
  local ring = s.ring or call('GETRANGE', s.key, 0, RING_SIZE - 1)
  if s.old then
    local from, first, rest = runs(s.old + 1, s.newest - s.old)
    ring = with(with(ring, from + 1, nothing(first)), 1, nothing(rest))
    ring = with(ring, offset(s.old) + 1, cell_of(s.old_r, s.old_t))
  end
  return with(ring, offset(s.newest) + 1, cell_of(s.cr, s.ct))
end

-- Moves both windows on to `cell`; nothing is written yet. If the clock went back, what is in them keeps its age relative
-- to the newest cell.
local function advance(s, cell)
  local passed = cell - s.newest
  if passed == 0 then return end
  s.aged = true
  if s.rs > 0 or s.ts > 0 then
    if passed < 0 then
      s.turned_back = true
      local ring, by = whole_ring(s), -passed % CELLS * CELL_SIZE
      s.ring = ring:sub(by + 1) .. ring:sub(1, by)
      s.filled = max(0, s.filled + passed)
    elseif passed >= CELLS then
      s.ring, s.rs, s.ts, s.cr, s.ct = nothing(RING_SIZE), 0, 0, 0, 0
    else
      local requests, tokens = sum_of(s.key, s.newest + 1, passed)
      s.old, s.old_r, s.old_t, s.cr, s.ct = s.newest, s.cr, s.ct, 0, 0
      s.rs, s.ts = max(0, s.rs - requests), max(0, s.ts - tokens)
    end
  end
  s.newest = cell
end

local function add(s, requests, tokens)
  s.cr, s.rs, s.ct, s.ts = s.cr + requests, s.rs + requests, s.ct + tokens, s.ts + tokens
  s.filled = s.newest
end

-- Takes out of a cell again what is still there.
local function take_back(s, cell, requests, tokens)
  if cell > s.newest or cell + CELLS <= s.newest then return end
  local r, t
  if cell == s.newest then
    r, t = s.cr, s.ct
  elseif cell == s.old then
    r, t = s.old_r, s.old_t
  else
    local ring = s.ring and s.ring:sub(offset(cell) + 1, offset(cell) + CELL_SIZE)
    r, t = unpack(CELL, ring or call('GETRANGE', s.key, offset(cell), offset(cell) + CELL_SIZE - 1))
  end
  requests, tokens = min(requests, r), min(tokens, t)
  if requests == 0 and tokens == 0 then return end
  s.rs, s.ts = max(0, s.rs - requests), max(0, s.ts - tokens)
  r, t = r - requests, t - tokens
  if cell == s.newest then
    s.cr, s.ct = r, t
  elseif cell == s.old then
    s.old_r, s.old_t = r, t
  elseif s.ring then
    s.ring = with(s.ring, offset(cell) + 1, pack(CELL, r, t))
  else
    call('SETRANGE', s.key, offset(cell), pack(CELL, r, t))
  end
end

local function head(s)
  local bt, bn, cr, ct = s.bt, s.bn, s.cr, s.ct
  local older_r, older_t = max(0, s.rs - cr), max(0, s.ts - ct)
  if older_t > MOST then older_t = MOST end
  if bt > MOST then bt = MOST end
  if bn > MOST then bn = MOST end
  if cr > MOST_REQUESTS then cr = MOST_REQUESTS end
  if ct > MOST_TOKENS then ct = MOST_TOKENS end
  return pack(HEAD, FORM, s.newest, s.filled, s.month, bt, bn, older_r, older_t, cr, ct)
end

-- Windows are over after a minute. What is booked of a quota stays for its month: losing it costs a query elsewhere.
local function store(s, holders)
  local ttl = s.month > 0 and QUOTA_TTL or TTL
  if s.ring then
    call('SET', s.key, s.ring .. head(s) .. holders, 'EX', ttl)
    return
  end
  if s.old then
    local from, first, rest = runs(s.old + 1, s.newest - s.old)
    call('SETRANGE', s.key, from, nothing(first))
    if rest > 0 then call('SETRANGE', s.key, 0, nothing(rest)) end
    call('SETRANGE', s.key, offset(s.old), cell_of(s.old_r, s.old_t))
  end
  call('SETRANGE', s.key, HEAD_FROM, head(s) .. holders)
  if s.aged then call('EXPIRE', s.key, ttl) end
end

-- How long until `requests` and `tokens` more fit under the limit of either (0: none).
local function wait_ms(s, requests, tokens, rpm, tpm, now)
  local ring = whole_ring(s)
  local much_r = rpm > 0 and s.rs + requests - rpm or 0
  local much_t = tpm > 0 and s.ts + tokens - tpm or 0
  for cell = s.newest - CELLS + 1, s.newest do
    local r, t = unpack(CELL, ring, offset(cell) + 1)
    much_r, much_t = much_r - r, much_t - t
    if much_r <= 0 and much_t <= 0 then return max(1, (cell + CELLS) * 1000 - now) end
  end
  return CELLS * 1000
end

-- When both windows will be empty at the latest.
local function reset_ms(s, now)
  if s.rs == 0 and s.ts == 0 then return 0 end
  return max(0, (s.filled + CELLS) * 1000 - now)
end

-- Reads the holders, once: what the others hold, and where ours stands. Those who ceased to renew do not count, and their
-- place is free.
local function find_holders(s, id, seconds)
  if s.others_busy then return end
  local busy, tokens, nano, free = 0, 0, 0, nil
  s.at, s.is_held = false, false
  for at = HOLDERS_AT, #s.v, HOLDER_SIZE do
    local h_busy, h_tokens, h_nano, expires, h_session, h_id = unpack(HOLDER, s.v, at)
    if expires <= seconds then
      free = free or at
    elseif h_id == id then
      s.at, s.is_held, s.session, s.expires = at, true, h_session, expires
      s.busy, s.tokens, s.nano = h_busy, h_tokens, h_nano
    else
      busy, tokens, nano = busy + h_busy, tokens + h_tokens, nano + h_nano
    end
  end
  if not s.at then
    s.at = free or #s.v + 1
    -- Should there ever be more replicas than fit, the first makes room.
    if s.at >= HOLDERS_AT + MAX_HOLDERS * HOLDER_SIZE then s.at = HOLDERS_AT end
  end
  s.others_busy, s.others_tokens, s.others_nano = busy, tokens, nano
end

-- If ours is not there, or only from an earlier session, it holds what the replica says: that knows best what it holds. A
-- call of an earlier session that was overtaken counts in the later one.
local function be_held(s, session, busy, tokens, nano)
  if s.is_held and s.session >= session then return end
  -- As good as expired: whoever renews it next stores what it holds now.
  s.is_held, s.session, s.expires, s.busy, s.tokens, s.nano = true, session, 0, busy, tokens, nano
end

-- All holders, with ours as it is now.
local function held(s, id)
  if not s.is_held then return s.v:sub(HOLDERS_AT) end
  local busy, tokens, nano = s.busy, s.tokens, s.nano
  if busy > MOST_REQUESTS then busy = MOST_REQUESTS end
  if tokens > MOST then tokens = MOST end
  if nano > MOST then nano = MOST end
  local ours = pack(HOLDER, busy, tokens, nano, s.expires, s.session, id)
  if s.at == HOLDERS_AT and #s.v < s.at + HOLDER_SIZE then return ours end
  return s.v:sub(HOLDERS_AT, s.at - 1) .. ours .. s.v:sub(s.at + HOLDER_SIZE)
end

-- Begins a new month with what the replica knows to be booked. The month is over only when both clocks say so: a clock
-- that runs ahead must not give a quota anew.
local function turn_page(s, now, seed_month, seed_tokens, seed_nano)
  local month = seed_month
  if s.month < month then
    month = min(month_of(now), seed_month)
    if s.month < month then
      local known = seed_month == month
      s.month, s.bt, s.bn = month, known and seed_tokens or 0, known and seed_nano or 0
    end
  end
end
