"""What Redis runs for `limits_redis`: the same arithmetic as `buckets`, each call one atomic step.

    PREFIX:{NAME}:limit:TENANT:WINDOW    hash: used:KIND, last:KIND, tail, KIND:SLOT -> tokens
    PREFIX:{NAME}:running:TENANT         sorted set: the key of a request -> when its lease ends
    PREFIX:{NAME}:owner:TENANT           hash: the key of a request -> the nonce of its grant

Times are milliseconds of Redis's own clock, so conductors need not agree about theirs.
"""

from __future__ import annotations

_COMMON = """
local buckets, running, owner = KEYS[1], KEYS[2], KEYS[3]
local now, window, SLOTS = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local call = redis.call
if now < 0 then
  local time = call('TIME')
  now = time[1] * 1000 + math.floor(time[2] / 1000)
end
local slot = math.floor(now * SLOTS / window)
local first = slot - SLOTS
local used = {}

local function back_at(s)
  return math.ceil((s + SLOTS + 1) * window / SLOTS)
end

local function age()
  local tail = tonumber(call('HGET', buckets, 'tail') or first)
  if first - tail > SLOTS then
    call('DEL', buckets)
  else
    for s = tail, first - 1 do
      for kind = 1, 3 do
        local field = kind .. ':' .. s
        local taken = call('HGET', buckets, field)
        if taken then
          call('HINCRBY', buckets, 'used:' .. kind, -taken)
          call('HDEL', buckets, field)
        end
      end
    end
  end
  call('HSET', buckets, 'tail', first)
  for kind = 1, 3 do
    used[kind] = tonumber(call('HGET', buckets, 'used:' .. kind) or 0)
  end
end

local function add(kind, s, amount)
  if amount == 0 then return end
  call('HINCRBY', buckets, kind .. ':' .. s, amount)
  used[kind] = call('HINCRBY', buckets, 'used:' .. kind, amount)
end

local function take(kind, amount)
  add(kind, slot, amount)
  if amount > 0 then call('HSET', buckets, 'last:' .. kind, slot) end
end

local function reply(granted, reason, wait)
  local full = {}
  for kind = 1, 3 do
    full[kind] = 0
    if used[kind] > 0 then
      full[kind] = back_at(tonumber(call('HGET', buckets, 'last:' .. kind) or slot)) - now
    end
  end
  call('PEXPIRE', buckets, 2 * window)
  return {granted, reason, wait, slot, used[1], used[2], used[3], full[1], full[2], full[3],
          call('ZCARD', running)}
end

age()
"""

RESERVE = (
    _COMMON
    + """
local capacity, wanted = {}, {}
for kind = 1, 3 do
  capacity[kind], wanted[kind] = tonumber(ARGV[3 + kind]), tonumber(ARGV[6 + kind])
end
local most, key, nonce, lease = tonumber(ARGV[10]), ARGV[11], ARGV[12], tonumber(ARGV[13])

local function wait_for(kind)
  local missing = used[kind] + wanted[kind] - capacity[kind]
  if missing <= 0 then return 0 end
  local fields = {}
  for s = first, slot do fields[#fields + 1] = kind .. ':' .. s end
  for place, taken in ipairs(call('HMGET', buckets, unpack(fields))) do
    missing = missing - tonumber(taken or 0)
    if missing <= 0 then return back_at(first + place - 1) - now end
  end
  return window
end

if most >= 0 then
  for _, ended in ipairs(call('ZRANGEBYSCORE', running, '-inf', now)) do
    call('HDEL', owner, ended)
    call('ZREM', running, ended)
  end
  if call('ZCARD', running) >= most and not call('ZSCORE', running, key) then
    return reply(0, 0, 0)
  end
end
local worst, reason = 0, 0
for kind = 1, 3 do
  if capacity[kind] >= 0 then
    local wait = wait_for(kind)
    if wait > worst then worst, reason = wait, kind end
  end
end
if worst > 0 then return reply(0, reason, worst) end
for kind = 1, 3 do take(kind, wanted[kind]) end
if most >= 0 then
  call('ZADD', running, now + lease, key)
  call('HSET', owner, key, nonce)
  call('PEXPIRE', running, 2 * lease)
  call('PEXPIRE', owner, 2 * lease)
end
return reply(1, 0, 0)
"""
)
"""Returns granted, reason (0: concurrent), wait, slot, used x 3, full in x 3, running."""

SETTLE = (
    _COMMON
    + """
local taken_in, key, nonce = tonumber(ARGV[4]), ARGV[11], ARGV[12]
for kind = 1, 3 do
  local more = tonumber(ARGV[7 + kind]) - tonumber(ARGV[4 + kind])
  if more > 0 then
    take(kind, more)
  elseif more < 0 and call('HEXISTS', buckets, kind .. ':' .. taken_in) == 1 then
    add(kind, taken_in, more)
  end
end
if call('HGET', owner, key) == nonce then
  call('HDEL', owner, key)
  call('ZREM', running, key)
end
return reply(1, 0, 0)
"""
)

RENEW = """
local now, lease = tonumber(ARGV[1]), tonumber(ARGV[2])
if now < 0 then
  local time = redis.call('TIME')
  now = time[1] * 1000 + math.floor(time[2] / 1000)
end
for place = 3, #ARGV do
  redis.call('ZADD', KEYS[1], 'XX', now + lease, ARGV[place])
end
redis.call('PEXPIRE', KEYS[1], 2 * lease)
redis.call('PEXPIRE', KEYS[2], 2 * lease)
return {}
"""
