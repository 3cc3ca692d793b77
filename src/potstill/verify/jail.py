"""Shuts itself in, then becomes the interpreter that tries the code. Refuses to start where a wall cannot be built.

Runs as a program of its own (`python -I -S jail.py ORDER`, ORDER as JSON); standard library only. Two means:

    namespaces  an own file tree (libraries read-only, one small tmpfs), own processes, network, IPC; needs root or user
                namespaces. The first process of the namespace ends with the trial, and the kernel all others with it.
    landlock    where namespaces are forbidden, as in most containers: Landlock (Linux 6.2) leaves the libraries, to
                read; nothing can be written.

Both: no new privileges, an own user where started by root, limits on resources, and the filter of `syscalls`.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import runpy
import select
import signal
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["main"]

LANDLOCK_ABI = 3
"""Since Linux 6.2; earlier ones let a file be emptied that may only be read."""
RESULT = 3
"""Descriptor by which `trial` answers, once it runs."""
DISK_BYTES, FILE_BYTES, FILES, THREADS = 64 << 20, 16 << 20, 64, 64

_PACKAGES = ("site-packages", "dist-packages")
_NEW_NS, _NEW_UTS, _NEW_IPC, _NEW_USER, _NEW_PID, _NEW_NET = 0x20000, 0x4000000, 0x8000000, 1 << 28, 1 << 29, 1 << 30
_RDONLY, _NOSUID, _NODEV, _NOEXEC, _REMOUNT, _BIND, _REC, _PRIVATE = 1, 2, 4, 8, 32, 4096, 16384, 1 << 18
_SET_PDEATHSIG, _SET_DUMPABLE, _SET_SECCOMP, _SET_NO_NEW_PRIVS = 1, 4, 22, 38
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR, _ALL_OF_ABI_3 = 1, 2, 4, 8, (1 << 15) - 1
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}

_libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    """Do what the order says, up to the start of the trial.

    means, home (an empty folder), result (descriptor), trial (source), user (number, or null to stay who one is),
    cpu_s, memory_bytes, others (threads that this user has elsewhere).
    """
    _end_with_parent()  # killed, it leaves nobody to look after a trial
    order = json.loads(sys.argv[1])
    os.umask(0o022)
    if order["result"] != RESULT:
        os.dup2(order["result"], RESULT)
        os.close(order["result"])
    filter_maker = runpy.run_path(str(Path(__file__).with_name("syscalls.py")))["seccomp_program"]
    if order["means"] == "namespaces":
        _enter_namespaces()
        _fork_and_wait()
        _build_tree()
        _become(order["user"])
        _end_with_parent()  # forgotten with the change of user
        _check(_libc.prctl(_SET_DUMPABLE, 0, 0, 0, 0), "prctl")
        _fork_and_wait()
        os.chdir("/home")
    else:
        os.chdir(order["home"])
        _check(_libc.prctl(_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
        _close_files(order["home"])
        _become(order["user"])
        _end_with_parent()
    _limit(order)
    _check(_libc.prctl(_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    _filter_calls(filter_maker(platform.machine(), os.getpid()))
    command = [os.path.realpath(sys.executable), "-I", "-S", "-B", "-u", "-X", "utf8", "-c", order["trial"]]
    os.set_inheritable(RESULT, True)
    os.execve(command[0], command, {"HOME": str(Path.cwd())})


def _check(result: int, what: str) -> int:
    """Raises OSError where a call of libc failed."""
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")
    return result


def _enter_namespaces() -> None:
    """The calling process' children are in the new namespaces, in which a plain user keeps its number."""
    user, group = os.geteuid(), os.getegid()
    spaces = _NEW_NS | _NEW_UTS | _NEW_IPC | _NEW_PID | _NEW_NET
    _check(_libc.unshare(spaces | (_NEW_USER if user else 0)), "unshare")
    if user:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")


def _fork_and_wait() -> None:
    """Return in a child that ends with its parent; the parent waits for it and ends as it did."""
    reader, writer = os.pipe()
    child = os.fork()
    if child:
        # Asked to end, it waits for the child: the kernel lets the first process of a namespace go last.
        signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGKILL))
        os.closerange(0, RESULT + 1)
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        os._exit(code if code >= 0 else 128 - code)
    os.close(writer)
    _end_with_parent()
    if select.select([reader], [], [], 0)[0]:  # the parent was gone before its end could be noticed
        os._exit(1)
    os.close(reader)


def _end_with_parent() -> None:
    _check(_libc.prctl(_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")


def _become(user: int | None) -> None:
    """Give up root for a user that owns nothing."""
    if user is not None:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)


def _limit(order: dict[str, Any]) -> None:
    """Limits of every process of the trial: seconds of processor time, bytes, counts."""
    limits = {
        resource.RLIMIT_AS: order["memory_bytes"],
        resource.RLIMIT_CPU: order["cpu_s"],
        resource.RLIMIT_NPROC: order["others"] + THREADS,
        resource.RLIMIT_FSIZE: FILE_BYTES,
        resource.RLIMIT_NOFILE: FILES,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    for kind, value in limits.items():
        hard = resource.getrlimit(kind)[1]
        least = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (least, least))


def _libraries() -> list[Path]:
    """What the interpreter is made of: itself, its standard library, and where the shared libraries in use lie."""
    found = {Path(os.path.realpath(sys.executable)), *map(Path, sys.path)}
    for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        file = Path("/" + line.partition("/")[2])
        if ".so" in file.name and file.exists():
            found.add(file.parent)
    found |= {Path("/etc/ld.so.cache"), Path("/lib64"), Path("/usr/lib64")}
    real = {Path(os.path.realpath(path)) for path in found if path.exists()} | {path for path in found if path.is_dir()}
    whole = {path for path in real if not path.is_symlink()}
    return sorted(path for path in whole if not whole & set(path.parents))


def _build_tree() -> None:
    """A root directory with the libraries, two devices, and a small /home; nothing else of the machine is in it."""
    _mount("none", "/", None, _REC | _PRIVATE)
    libraries = _libraries()
    root = Path("/proc")  # a place to stand that every machine has, and that hides nothing which is needed from here on
    _mount("jail", str(root), "tmpfs", _NOSUID | _NODEV, options="size=1m,mode=755")
    for path in [*libraries, Path("/dev/null"), Path("/dev/urandom")]:
        _show(path, root)
    for path in (path for top in libraries if top.is_dir() for name in _PACKAGES for path in _folders(top, name)):
        _mount("none", f"{root}{path}", "tmpfs", _NOSUID | _NODEV | _NOEXEC | _RDONLY, options="size=4k")
    for name in ("lib", "lib64"):
        if Path("/", name).is_symlink():
            (root / name).symlink_to(Path("/", name).readlink())
    (root / "home").mkdir()
    _mount(
        "home",
        f"{root}/home",
        "tmpfs",
        _NOSUID | _NODEV | _NOEXEC,
        options=f"size={DISK_BYTES},nr_inodes=4096,mode=777",
    )
    _mount("none", str(root), None, _REMOUNT | _BIND | _RDONLY | _NOSUID | _NODEV)
    os.chdir(root)
    _check(_libc.syscall(_PIVOT_ROOT[platform.machine()], b".", b"."), "pivot_root")
    _check(_libc.umount2(b".", 2), "umount")
    os.chdir("/")


def _folders(top: Path, name: str) -> list[Path]:
    """Where the interpreter's packages are, if below `top`."""
    places = [Path(path) for path in sys.path if Path(path, name).is_dir()]
    return [place / name for place in places if top in (place, *place.parents)]


def _show(path: Path, root: Path) -> None:
    place = Path(f"{root}{path}")
    place.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    if path.is_dir():
        place.mkdir(mode=0o755)
    else:
        place.touch()
    _mount(str(path), str(place), None, _BIND | _REC)
    kept = os.statvfs(place).f_flag & os.ST_NOEXEC
    _mount("none", str(place), None, _REMOUNT | _BIND | _RDONLY | _NOSUID | (kept and _NOEXEC) | _device(path))


def _device(path: Path) -> int:
    return 0 if path.parent == Path("/dev") else _NODEV


def _mount(source: str, target: str, kind: str | None, flags: int, *, options: str = "") -> None:
    names = (os.fsencode(source), os.fsencode(target), kind.encode() if kind else None)
    _check(_libc.mount(*names, ctypes.c_ulong(flags), options.encode() or None), f"mount {target}")


def _close_files(home: str) -> None:
    """Leave the libraries to be read, and nothing to be written but /dev/null."""
    if _libc.syscall(_CREATE_RULESET, None, 0, 1) < LANDLOCK_ABI:
        raise OSError(f"Landlock of version {LANDLOCK_ABI} (Linux 6.2) is not in force")
    attribute = struct.pack("<Q", _ALL_OF_ABI_3)
    rules = _check(_libc.syscall(_CREATE_RULESET, attribute, len(attribute), 0), "landlock_create_ruleset")
    _allow(rules, Path(home), _READ_DIR)
    _allow(rules, Path("/dev/null"), _READ_FILE | _WRITE_FILE)
    _allow(rules, Path("/dev/urandom"), _READ_FILE)
    for top in _libraries():
        if top.is_dir():
            _allow(rules, top, _READ_DIR)
        for path in _without_packages(top):
            _allow(rules, path, _READ_FILE | _EXECUTE | (_READ_DIR if path.is_dir() else 0))
    _check(_libc.syscall(_RESTRICT_SELF, rules, 0), "landlock_restrict_self")
    os.close(rules)


def _without_packages(top: Path) -> Iterator[Path]:
    """`top` itself, or what is in it where packages lie below: those are left out."""
    hidden = [path for name in _PACKAGES for path in _folders(top, name)] if top.is_dir() else []
    if not hidden:
        yield top
        return
    for entry in top.iterdir():
        if any(entry in path.parents for path in hidden):
            yield from _without_packages(entry)
        elif entry not in hidden and entry.exists():
            yield entry


def _allow(rules: int, path: Path, rights: int) -> None:
    place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    attribute = struct.pack("<Qi", rights, place)
    _check(_libc.syscall(_ADD_RULE, rules, 1, attribute, 0), f"landlock_add_rule {path}")
    os.close(place)


def _filter_calls(program: bytes) -> None:
    """Install the filter for this process and what it becomes."""
    memory = ctypes.create_string_buffer(program, len(program))
    head = struct.pack("@HP", len(program) // 8, ctypes.addressof(memory))
    _check(_libc.prctl(_SET_SECCOMP, 2, ctypes.c_char_p(head), 0, 0), "seccomp")


if __name__ == "__main__":
    main()
