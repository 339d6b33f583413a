-- Notes that this replica is alive, and says which of how many it is.
-- KEYS: the register. ARGV: clock | holder | seconds after which a silent replica counts as gone.
-- Reply: its number from 0, how many there are, now, and whether it was known before (1 or 0).
local time = redis.call('TIME')
local now = ARGV[1] ~= '' and tonumber(ARGV[1]) / 1000 or tonumber(time[1])
local was_known = redis.call('ZADD', KEYS[1], now, ARGV[2]) == 0
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now - tonumber(ARGV[3]))
redis.call('EXPIRE', KEYS[1], 3600)
local all = redis.call('ZRANGE', KEYS[1], 0, -1)
-- By name, not by score: every replica must see the same order.
table.sort(all)
for i, holder in ipairs(all) do
  if holder == ARGV[2] then return { i - 1, #all, now * 1000, was_known and 1 or 0 } end
end
return redis.error_reply('the register lost its replica')
