-- The short way of limits.lua, in less than half of its time: for one ask, of one request or of several of one caller, at
-- subjects where somebody was admitted within the same second, as it is where many come. What it comes upon besides is for
-- the long way: then it has written nothing, and returns nil.
--
-- What takes the long way its time are tables, functions and names; here a subject is a handful of local variables.
--
-- Who holds what may still stand in a state where no limit asks for it any more: there it is corrected, and not renewed.
local now = clock(ARGV[1])

local function alone()
  local pack, unpack, call, pcall, keys, steps, at = pack, unpack, call, redis.pcall, KEYS, ARGV[5], 1
  local HEAD_FROM, TO_END, HEAD_SIZE, HOLDERS_AT, HOLDER_SIZE = HEAD_FROM, TO_END, HEAD_SIZE, HOLDERS_AT, HOLDER_SIZE
  -- Bytes of a correction, and of a subject of a request.
  local CORRECTION, SUBJECT = 94, 82
  local NOBODY = '\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0'
  local cell = math.floor(now / 1000)
  -- Every state and our holder in it begin like this: they are compared, not read.
  local newest, mine, renewed = pack('<c1I4I4', FORM, cell, cell), pack('<c8I4', ARGV[2], ARGV[3]), cell + ARGV[4]

  local corrections, pieces = { nil, nil, nil, nil, nil, nil, nil, nil }, { nil, nil, nil, nil, nil, nil, nil, nil }
  local subjects, first, count = unpack('<I2I2I2', steps)
  while subjects == 0 do
    for key = first, first + count - 1 do
      if corrections[key] then return end
      corrections[key] = at + 6
    end
    at = at + CORRECTION
    if at > #steps then return end
    subjects, first, count = unpack('<I2I2I2', steps, at)
  end
  local times, need_tokens, need_nano, least_tokens, least_nano, month
  times, need_tokens, need_nano, least_tokens, least_nano, month, at = unpack('<dddddd', steps, at + 2)
  if at + SUBJECT * subjects <= #steps then return end

  local older, reply, n = nil, { now, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0 }, 3
  local decoded, ended, from, back_r, back_t, begun, more, more_tokens, more_nano, _, b_tokens, b_nano, old_from, old_to
  for key = 1, #keys do
    local v = pcall('GETRANGE', keys[key], HEAD_FROM, TO_END)
    local size, place = #v, HOLDERS_AT
    if size < HEAD_SIZE or (size - HEAD_SIZE) % HOLDER_SIZE ~= 0 then return end
    if size == HEAD_SIZE then v, place = v .. NOBODY, nil end
    local seen, s_month, bt, bn, quota, rs, ts, cr, ct, holder, expires, busy, tokens, nano =
      unpack('<c9I4I7I7I1I6I7I3I6c12I4I4I7I7', v)
    if seen ~= newest then return end
    if place and holder ~= mine then
      place = v:find(mine, HOLDERS_AT + HOLDER_SIZE, true)
      if not place or (place - HOLDERS_AT) % HOLDER_SIZE ~= 0 then return end
      expires, busy, tokens, nano = unpack('<I4I4I7I7', v, place + 12)
    end
    if place and expires <= cell then return end

    local correction = corrections[key]
    if correction then
      if correction ~= decoded then
        decoded, ended, from, back_r, back_t, begun, more, more_tokens, more_nano, _, b_tokens, b_nano =
          correction, unpack('<ddddddddddd', steps, correction)
        if b_tokens ~= 0 or b_nano ~= 0 then return end
        if from < cell and back_r + back_t > 0 then
          local offset = from % CELLS * CELL_SIZE
          old_from, old_to = ('%d'):format(offset), ('%d'):format(offset + CELL_SIZE - 1)
        end
      end
      if back_r > 0 or back_t > 0 then
        if from == cell then
          local r, t = back_r < cr and back_r or cr, back_t < ct and back_t or ct
          rs, cr, ts, ct = rs - r, cr - r, ts - t, ct - t
        elseif from < cell and from + CELLS > cell then
          local old_r, old_t = unpack(CELL, call('GETRANGE', keys[key], old_from, old_to))
          local r, t = back_r < old_r and back_r or old_r, back_t < old_t and back_t or old_t
          rs, ts = rs - r, ts - t
          older = older or {}
          older[#older + 1] = { keys[key], old_from, pack(CELL, old_r - r, old_t - t) }
        end
        if rs < 0 or ts < 0 then return end
      end
      rs, cr, ts, ct = rs + begun, cr + begun, ts + more, ct + more
      if place then
        busy, tokens, nano = busy - ended, tokens + more_tokens, nano + more_nano
        if busy < 0 then busy = 0 end
        if tokens < 0 then tokens = 0 end
        if nano < 0 then nano = 0 end
      end
    end

    if key <= subjects then
      local which, rpm, tpm, most_busy, m_tokens, m_nano = unpack('<I2ddddd', steps, at)
      if which ~= key then return end
      at = at + SUBJECT
      if rpm > 0 then
        rs, cr = rs + times, cr + times
        if rs > rpm then return end
      end
      if tpm > 0 then
        ts, ct = ts + need_tokens, ct + need_tokens
        if ts > tpm then return end
      end
      if most_busy > 0 or m_tokens > 0 or m_nano > 0 then
        if not place then return end
        busy, expires = busy + times, renewed
        local all_busy, all_tokens, all_nano = busy, bt + tokens + least_tokens, bn + nano + least_nano
        if size > HEAD_SIZE + HOLDER_SIZE then
          for other = HOLDERS_AT, size, HOLDER_SIZE do
            local o_expires, o_busy, o_tokens, o_nano = unpack('<I4I4I7I7', v, other + 12)
            if o_expires > cell and other ~= place then
              all_busy, all_tokens, all_nano = all_busy + o_busy, all_tokens + o_tokens, all_nano + o_nano
            end
          end
        end
        if most_busy > 0 and all_busy > most_busy then return end
        if m_tokens > 0 or m_nano > 0 then
          if quota == 0 or s_month < month then return end
          if m_tokens > 0 and all_tokens > m_tokens or m_nano > 0 and all_nano > m_nano then return end
        end
        if quota == 1 then tokens, nano = tokens + need_tokens, nano + need_nano end
      end
      reply[n + 1], reply[n + 2] = rs, ts
      n = n + 2
    end

    if rs > MOST_REQUESTS or ts + tokens + nano > MOST_TOKENS then return end
    if place == HOLDERS_AT then
      pieces[key] = pack('<I6I7I3I6c12I4I4I7I7', rs, ts, cr, ct, mine, expires, busy, tokens, nano)
    else
      pieces[key] = pack('<I6I7I3I6', rs, ts, cr, ct)
      if place then
        pieces[key] = pieces[key] .. v:sub(HOLDERS_AT, place + 11) .. pack('<I4I4I7I7', expires, busy, tokens, nano)
      end
    end
  end
  if older then
    for _, cell in ipairs(older) do call('SETRANGE', cell[1], cell[2], cell[3]) end
  end
  for key = 1, #keys do call('SETRANGE', keys[key], WINDOWS_FROM, pieces[key]) end
  return pack(('<ddddddddddddddddddd'):sub(1, n + 1), spread(reply, 1, n))
end

local admitted = alone()
if admitted then return admitted end
