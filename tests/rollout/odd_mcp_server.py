"""MCP servers that are wrong in one way each, by their first argument."""

import json
import sys

HOW = sys.argv[1]
SCHEMAS = {
    "malformed": {"type": "object", "properties": {"a": {"type": "whole"}}},
    "no schema": {"type": 5},
}
TOOL = {"name": "odd", "inputSchema": SCHEMAS.get(HOW, {"type": "object"})}
TOOLS = {"twice": [TOOL, TOOL], "no list": "odd", "large": [TOOL | {"description": "a" * 70_000}]}
asked = 0

for line in sys.stdin:
    request = json.loads(line)
    if HOW == "rubbish":
        print("Traceback (most recent call last):", flush=True)
    if "id" not in request or HOW in ("rubbish", "silent"):
        continue
    reply = {"error": {"code": -32601, "message": "no such method"}}
    if request["method"] == "initialize":
        about = {"protocolVersion": request["params"]["protocolVersion"], "capabilities": {}}
        reply = {"result": about | {"serverInfo": {"name": "odd", "version": "1"}}}
    elif request["method"] == "tools/list":
        asked += 1
        if HOW == "mute" and asked > 1:
            continue
        reply = {"result": {"tools": TOOLS.get(HOW, [TOOL])}}
        if HOW == "endless":
            reply["result"]["nextCursor"] = "more"
    elif request["method"] == "tools/call":
        if HOW == "mute":
            continue
        reply = {"result": {"content": 7}}
    print(json.dumps({"jsonrpc": "2.0", "id": request["id"], **reply}), flush=True)
