"""Runs as `python -I -S sandbox_child.py`: walls itself in, then becomes the program to be run.

Namespaces of its own for users, processes, network, mounts, IPC and host name; every file system
read-only but a small one in memory; no capabilities; resource limits. Root becomes `nobody` first,
for limits on processes do not bind root. Whatever is left when the program ends dies with its
process namespace. Uses the standard library alone. Linux >= 5.14.
"""

import ctypes
import json
import os
import resource
import signal
import sys

_NOBODY = 65534
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE = 1, 2, 4, 4096, 16384, 1 << 18
_NEWNS, _NEWUTS, _NEWIPC = 0x00020000, 0x04000000, 0x08000000
_NEWUSER, _NEWPID, _NEWNET = 0x10000000, 0x20000000, 0x40000000
_SYS_MOUNT_SETATTR, _AT_FDCWD, _AT_RECURSIVE = 442, -100, 0x8000
_PR_PDEATHSIG, _PR_DUMPABLE, _PR_CAPBSET_DROP, _PR_NO_NEW_PRIVS = 1, 4, 24, 38

_libc = ctypes.CDLL(None, use_errno=True)


class _MountAttributes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "userns")]


def _call(what: str, result: int) -> None:
    if result != 0:
        raise OSError(f"{what}: {os.strerror(ctypes.get_errno())}")


def _mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    arguments = (source.encode(), target.encode(), kind.encode(), flags, options.encode())
    _call(f"mount of {target}", _libc.mount(*arguments))


def _become_nobody(stage: str, prefix: str) -> str:
    """As root: show the interpreter where nobody may read it, and become nobody; its new place."""
    _call("unshare (mounts)", _libc.unshare(_NEWNS))
    _mount("none", "/", "", _MS_REC | _MS_PRIVATE)
    place = f"{stage}/python"
    _mount(prefix, place, "", _MS_BIND | _MS_REC)
    os.setgroups([])
    os.setgid(_NOBODY)
    os.setuid(_NOBODY)
    # Else /proc/self belongs to root, and the maps below cannot be written.
    _call("prctl", _libc.prctl(_PR_DUMPABLE, 1, 0, 0, 0))
    return place


def _new_namespaces() -> None:
    uid, gid = os.getuid(), os.getgid()
    spaces = _NEWUSER | _NEWNS | _NEWPID | _NEWNET | _NEWIPC | _NEWUTS
    _call("unshare (user namespaces may be forbidden here)", _libc.unshare(spaces))
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"0 {uid} 1"),
        ("gid_map", f"0 {gid} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def _wall_in(work: str, size_bytes: int) -> None:
    """Everything read-only but `work`, an empty file system in memory; our own /proc."""
    _mount("none", "/", "", _MS_REC | _MS_PRIVATE)
    read_only = _MountAttributes(1, 0, 0, 0)
    _call(
        "mount_setattr (needs Linux 5.12)",
        _libc.syscall(
            _SYS_MOUNT_SETATTR,
            _AT_FDCWD,
            b"/",
            _AT_RECURSIVE,
            ctypes.byref(read_only),
            ctypes.sizeof(read_only),
        ),
    )
    safe = _MS_NOSUID | _MS_NODEV
    _mount("none", work, "tmpfs", safe, f"size={size_bytes},nr_inodes=1024,mode=700")
    try:
        _mount("proc", "/proc", "proc", safe)
    except OSError:  # containers that mask parts of /proc: then none at all
        _mount("none", "/proc", "tmpfs", safe | _MS_RDONLY, "size=4096")


def _limit(limits: dict[str, int]) -> None:
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
    for capability in range(64):
        if _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) != 0:
            break  # past the last one that this kernel knows
    _call("prctl (no_new_privs)", _libc.prctl(_PR_NO_NEW_PRIVS, 1, 0, 0, 0))


def _follow_parent() -> None:
    _call("prctl (pdeathsig)", _libc.prctl(_PR_PDEATHSIG, signal.SIGKILL, 0, 0, 0))


def _in_child(status_fd: int) -> None:
    """Fork and go on in the child; the parent waits for it and ends as it did."""
    child = os.fork()
    if child == 0:
        _follow_parent()
        return
    os.close(status_fd)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os._exit(code if code >= 0 else 128 - code)


def main() -> None:
    """argv: one JSON object, made by rollout.rewards.sandbox."""
    plan = json.loads(sys.argv[1])
    status_fd, stage = plan["status_fd"], plan["stage"]
    try:
        prefix, executable = plan["prefix"], plan["executable"]
        if os.getuid() == 0:
            place = _become_nobody(stage, prefix)
            executable = place + executable.removeprefix(prefix)
            prefix = place
        _follow_parent()
        _new_namespaces()
        _in_child(status_fd)  # process 1 of the namespace: its end is everybody's
        _wall_in(f"{stage}/work", plan["disk_bytes"])
        _in_child(status_fd)  # process 1 ignores signals of limits, so the program is not it
        os.chdir(f"{stage}/work")
        _limit(plan["limits"])
        os.write(status_fd, b"ready")
        os.set_inheritable(status_fd, False)
        environment = {
            "PATH": "/usr/bin:/bin",
            "HOME": f"{stage}/work",
            "TMPDIR": f"{stage}/work",
            "LANG": "C.UTF-8",
            "OMP_NUM_THREADS": "1",
            "LD_LIBRARY_PATH": f"{prefix}/lib",
        }
        os.execve(executable, [executable, "-I", "-S", "-c", plan["program"]], environment)  # noqa: S606
    except OSError as error:
        os.write(status_fd, f" failed: {error}".encode())
        os._exit(125)


if __name__ == "__main__":
    main()
