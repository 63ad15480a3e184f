"""MCP servers that are wrong in one way each, by their first argument."""

import json
import os
import subprocess
import sys
from typing import Any

HOW = sys.argv[1]
SCHEMAS = {
    "malformed": {"type": "object", "properties": {"a": {"type": "whole"}}},
    "no schema": {"type": 5},
}
TOOL = {"name": "odd", "inputSchema": SCHEMAS.get(HOW, {"type": "object"})}
PATTERN = {"type": "object", "properties": {"a": {"type": "string", "pattern": "^(a+)+$"}}}
TOOLS = {
    "slow pattern": [TOOL | {"outputSchema": PATTERN}],
    "twice": [TOOL, TOOL],
    "no list": "odd",
    "large": [TOOL | {"description": "a" * 70_000}],
}
RIGHT = ("slow pattern", "chatty", "leaves a daemon")
DAEMON = """
import os, time
if not os.fork():
    os.setsid()
    if not os.fork():
        print(os.getpid(), flush=True)
        os.close(1)
        time.sleep(600)
"""
asked = 0

for line in sys.stdin:
    request = json.loads(line)
    if HOW == "rubbish":
        print("Traceback (most recent call last):", flush=True)
    if "id" not in request or HOW in ("rubbish", "silent"):
        continue
    reply: dict[str, Any] = {"error": {"code": -32601, "message": "no such method"}}
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
        if HOW in RIGHT:
            reply = {"result": {"content": [{"type": "text", "text": "right"}]}}
        if HOW == "leaves a daemon":
            started = subprocess.Popen([sys.executable, "-c", DAEMON], stdout=subprocess.PIPE)
            told = [os.getpid(), int(started.stdout.readline())]  # pyright: ignore
            reply["result"]["content"][0]["text"] = json.dumps(told)
        if HOW == "slow pattern":
            reply["result"]["structuredContent"] = {"a": "a" * 22 + "b"}
        if HOW == "chatty":
            print("Seven\n" * 7, end="", flush=True)
    print(json.dumps({"jsonrpc": "2.0", "id": request["id"], **reply}), flush=True)
