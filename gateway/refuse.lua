-- Refuses a body that is too large, after reading it: many clients lose a reply that arrives while they still send,
-- as a reset stream (HTTP/2) or a broken pipe (HTTP/1.1).

local MOST_BYTES = 16777216 -- a client that sends more than this is cut off

core.register_service("refuse_large", "http", function(applet)
    local read = 0
    while read < MOST_BYTES do
        local part = applet:receive(16384)
        if part == nil or #part == 0 then break end
        read = read + #part
    end
    if applet.headers["content-type"] and applet.headers["content-type"][0]:find("^application/grpc") then
        applet:set_status(200)
        applet:add_header("content-type", "application/grpc")
        applet:add_header("grpc-status", "8")
        applet:add_header("grpc-message", "the message is too large: send fewer rows at a time")
        applet:add_header("content-length", "0")
        applet:start_response()
    else
        local reply = '{"error":"gateway: the body is too large; send fewer rows at a time"}'
        applet:set_status(413)
        applet:add_header("content-type", "application/json")
        applet:add_header("content-length", string.len(reply))
        applet:start_response()
        applet:send(reply)
    end
end)
