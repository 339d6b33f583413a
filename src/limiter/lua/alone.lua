-- The short way of limits.lua, in a third of its time: for one ask, of one request or of several of one caller, at
-- subjects where somebody was admitted within the same second, as it is where many come. What it comes upon besides is for
-- the long way: then it has written nothing, and returns nil.
--
-- What takes the long way its time are tables, functions and names; here a subject is a handful of local variables. What is
-- used of form.lua is handed over: twenty captured variables would cost as much as a call of Redis's.
--
-- Who holds what may still stand in a state where no limit asks for it any more: there it is corrected, and not renewed.
local now = clock(ARGV[1])

local function alone(now, keys, mine, steps, read, spread, pack, unpack, call, pcall, FORM, CELLS, CELL, CELL_SIZE,
                     HEAD_FROM, WINDOWS_FROM, NEWEST_FROM, TO_END, HEAD_SIZE, HOLDERS_AT, HOLDER_SIZE, MOST_REQUESTS,
                     MOST_TOKENS, LEASE)
  -- Where session and id stand in a holder.
  local NAME_AT = 24
  local NOBODY = '\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0'
  local cell = (now - now % 1000) / 1000
  -- Every state begins like this: it is compared, not read.
  local newest, renewed = pack('<c1I4I4', FORM, cell, cell), cell + LEASE

  local at, count = read(steps, 1, 0)
  local subjects, first, second, third, corrections
  at, subjects, first, second, third = read(steps, 4, at)
  for _ = 2, count do
    if subjects ~= 0 then return end
    corrections = corrections or { nil, nil, nil, nil, nil, nil, nil, nil }
    for key = first, first + second - 1 do
      if corrections[key] then return end
      corrections[key] = at
    end
    at, subjects, first, second, third = read(steps, 4, at + third)
  end
  if subjects == 0 then return end
  local times, need_tokens, need_nano = first, second, third
  local least_tokens, least_nano, month
  at, least_tokens, least_nano, month = read(steps, 3, at)

  local pieces, froms, older = { nil, nil, nil, nil, nil, nil, nil, nil }, nil, nil
  local reply, n = { now, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0 }, 3
  local decoded, ended, from, back_r, back_t, begun, more, more_tokens, more_nano, _, b_tokens, b_nano, old_from, old_to
  for key = 1, #keys do
    local v = pcall('GETRANGE', keys[key], HEAD_FROM, TO_END)
    local size, place, holds, renews, is_older = #v, HOLDERS_AT, false, false, false
    if size < HEAD_SIZE + HOLDER_SIZE then
      if size ~= HEAD_SIZE then return end
      v, place = v .. NOBODY, nil
    end
    -- Booked (bt, bn), in the older cells (rb, tb), in the newest (cr, ct), and what the first holder holds.
    local seen, s_month, bt, bn, rb, tb, cr, ct, busy, tokens, nano, expires, holder =
      unpack('<c9I4ddddfdfddI4c12', v)
    if seen ~= newest then return end
    if place and holder ~= mine then
      place = v:find(mine, HOLDERS_AT + HOLDER_SIZE, true)
      if place then
        place = place - NAME_AT
        if (place - HOLDERS_AT) % HOLDER_SIZE ~= 0 then return end
        busy, tokens, nano, expires = unpack('<fddI4', v, place)
      end
    end

    local correction = corrections and corrections[key]
    if correction then
      if correction ~= decoded then
        decoded, _, ended, from, back_r, back_t, begun, more, more_tokens, more_nano, _, b_tokens, b_nano =
          correction, read(steps, 11, correction)
        if b_tokens ~= 0 or b_nano ~= 0 then return end
        old_from = nil
        if from < cell and from + CELLS > cell and back_r + back_t > 0 then
          local offset = from % CELLS * CELL_SIZE
          old_from, old_to = ('%d'):format(offset), ('%d'):format(offset + CELL_SIZE - 1)
        end
      end
      if from == cell then
        if back_r > 0 then cr = back_r < cr and cr - back_r or 0 end
        if back_t > 0 then ct = back_t < ct and ct - back_t or 0 end
      elseif old_from then
        local old_r, old_t = unpack(CELL, call('GETRANGE', keys[key], old_from, old_to))
        local r, t = back_r < old_r and back_r or old_r, back_t < old_t and back_t or old_t
        rb, tb, is_older = rb - r, tb - t, true
        if rb < 0 or tb < 0 then return end
        older = older or {}
        older[#older + 1] = { keys[key], old_from, pack(CELL, old_r - r, old_t - t) }
      end
      cr = cr + begun
      ct = ct + more
      if place and (ended > 0 or more_tokens ~= 0 or more_nano ~= 0) then
        if expires <= cell then return end
        holds = true
        busy = busy - ended
        tokens = tokens + more_tokens
        nano = nano + more_nano
        if busy < 0 then busy = 0 end
        if tokens < 0 then tokens = 0 end
        if nano < 0 then nano = 0 end
      end
    end

    if key <= subjects then
      local rpm, tpm, most_busy, m_tokens, m_nano
      at, rpm, tpm, most_busy, m_tokens, m_nano = read(steps, 5, at)
      if rpm > 0 then
        cr = cr + times
        if rb + cr > rpm then return end
      end
      if tpm > 0 then
        ct = ct + need_tokens
        if tb + ct > tpm then return end
      end
      local has_quota = m_tokens > 0 or m_nano > 0
      if has_quota or most_busy > 0 then
        if not place or expires <= cell then return end
        holds, renews = true, expires ~= renewed
        busy = busy + times
        local others = 0
        if size > HEAD_SIZE + HOLDER_SIZE then
          for other = HOLDERS_AT, size, HOLDER_SIZE do
            local o_busy, o_tokens, o_nano, o_expires = unpack('<fddI4', v, other)
            if o_expires > cell and other ~= place then
              others, bt, bn = others + o_busy, bt + o_tokens, bn + o_nano
            end
          end
        end
        if most_busy > 0 and others + busy > most_busy then return end
        if has_quota then
          if s_month < month then return end
          if m_tokens > 0 and bt + tokens + least_tokens > m_tokens then return end
          if m_nano > 0 and bn + nano + least_nano > m_nano then return end
          tokens = tokens + need_tokens
          nano = nano + need_nano
        end
      end
      reply[n + 1], reply[n + 2] = rb + cr, tb + ct
      n = n + 2
    end

    if cr > MOST_REQUESTS or busy > MOST_REQUESTS or tb + ct + tokens + nano > MOST_TOKENS then return end
    local piece
    if not holds then
      piece = pack('<fd', cr, ct)
    elseif place ~= HOLDERS_AT then
      piece = pack('<fd', cr, ct) .. v:sub(HOLDERS_AT, place - 1)
        .. pack('<fddI4', busy, tokens, nano, renews and renewed or expires)
    elseif renews then
      piece = pack('<fdfddI4', cr, ct, busy, tokens, nano, renewed)
    else
      piece = pack('<fdfdd', cr, ct, busy, tokens, nano)
    end
    if is_older then
      froms = froms or {}
      froms[key], piece = WINDOWS_FROM, pack('<dd', rb, tb) .. piece
    end
    pieces[key] = piece
  end
  if older then
    for _, cell in ipairs(older) do call('SETRANGE', cell[1], cell[2], cell[3]) end
  end
  for key = 1, #keys do call('SETRANGE', keys[key], froms and froms[key] or NEWEST_FROM, pieces[key]) end
  return pack(('<ddddddddddddddddddd'):sub(1, n + 1), spread(reply, 1, n))
end

local admitted = alone(now, KEYS, ARGV[2], ARGV[3], read, spread, pack, unpack, call, redis.pcall, FORM, CELLS, CELL, CELL_SIZE,
                       HEAD_FROM, WINDOWS_FROM, NEWEST_FROM, TO_END, HEAD_SIZE, HOLDERS_AT, HOLDER_SIZE, MOST_REQUESTS,
                       MOST_TOKENS, LEASE)
if admitted then return admitted end
