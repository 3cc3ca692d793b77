"""Which system calls code under trial may not make, as a seccomp program. Refuses processors it has no numbers of.

A process that is bound by it has one process for life (threads are allowed), no sockets but pairs, signals for itself
only, and no way to change modes, owners, times, mounts or namespaces. Read by `jail`, which imports nothing else.
"""

from __future__ import annotations

import struct
import sys

__all__ = ["ARCHITECTURES", "seccomp_program"]

ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
"""{machine: (AUDIT_ARCH of linux/audit.h, column of the tables below)}."""

DENIED: dict[str, tuple[int | None, int | None]] = {
    # New processes: what is started would outlive the trial, or take its memory limit once more.
    "fork": (57, None), "vfork": (58, None),
    # Network. socketpair stays: event loops wake themselves with it.
    "socket": (41, 198),
    # Other processes.
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "process_madvise": (440, 440), "process_mrelease": (448, 448), "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438), "pidfd_send_signal": (424, 424), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "tkill": (200, 130), "kcmp": (312, 272), "setpriority": (141, 140),
    "ioprio_set": (251, 30), "sched_setaffinity": (203, 122), "sched_setscheduler": (144, 119),
    "sched_setparam": (142, 118), "sched_setattr": (314, 274), "migrate_pages": (256, 238), "move_pages": (279, 239),
    # What belongs to a file beside its content, of which Landlock does not know.
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452), "chown": (92, None),
    "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54), "utime": (132, None), "utimes": (235, None),
    "futimesat": (261, None), "utimensat": (280, 88), "setxattr": (188, 5), "lsetxattr": (189, 6),
    "fsetxattr": (190, 7), "setxattrat": (463, 463), "removexattr": (197, 14), "lremovexattr": (198, 15),
    "fremovexattr": (199, 16), "removexattrat": (466, 466), "inotify_add_watch": (254, 27), "fanotify_init": (300, 262),
    # Mounts and namespaces.
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "unshare": (272, 97),
    "setns": (308, 268), "move_mount": (429, 429), "open_tree": (428, 428), "fsopen": (430, 430),
    "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442),
    "open_by_handle_at": (304, 265), "name_to_handle_at": (303, 264),
    # Memory that no limit counts, and memory that outlives the process.
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "msgget": (68, 186),
    "semget": (64, 190), "mq_open": (240, 180), "mlockall": (151, 230),
    # The kernel's wider surface.
    "swapon": (167, 224), "swapoff": (168, 225), "reboot": (169, 142), "kexec_load": (246, 104),
    "kexec_file_load": (320, 294), "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106),
    "quotactl": (179, 60), "quotactl_fd": (443, 443), "acct": (163, 89), "syslog": (103, 116), "bpf": (321, 280),
    "perf_event_open": (298, 241), "userfaultfd": (323, 282), "keyctl": (250, 219), "add_key": (248, 217),
    "request_key": (249, 218), "io_uring_setup": (425, 425), "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427), "personality": (135, 92), "iopl": (172, None), "ioperm": (173, None),
    "modify_ldt": (154, None),
}  # fmt: skip
"""{name: (number on x86_64, number on aarch64)}; None where there is no such call."""

CLONE, CLONE3 = (56, 220), (435, 435)
OF_OWN_PROCESS = {"kill": (62, 129), "tgkill": (234, 131), "prlimit64": (302, 261)}
"""Allowed where the first argument is the caller's own number; prlimit64 also takes 0 for the caller."""

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16
_ALLOW, _KILL, _EPERM, _ENOSYS = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026
_CLONE_THREAD, _X32 = 0x00010000, 0x40000000


def seccomp_program(machine: str, pid: int) -> bytes:
    """The filter for the process `pid` on `machine`, as an array of struct sock_filter (8 bytes an instruction).

    A denied call fails with EPERM. Raises KeyError for a machine that is not in ARCHITECTURES.
    """
    if sys.byteorder != "little":
        raise KeyError(f"{machine} with {sys.byteorder} endian words")
    audit, column = ARCHITECTURES[machine]
    steps = [(_LOAD, 0, 0, _ARCHITECTURE), (_EQUAL, 1, 0, audit), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, _NUMBER)]
    if machine == "x86_64":  # the same calls under other numbers
        steps += [(_AT_LEAST, 0, 1, _X32), (_RETURN, 0, 0, _EPERM)]
    for numbers in DENIED.values():
        number = numbers[column]
        if number is not None:
            steps += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _EPERM)]
    # Its flags lie in memory, where no filter looks; libc falls back to clone.
    steps += [(_EQUAL, 0, 1, CLONE3[column]), (_RETURN, 0, 0, _ENOSYS)]
    steps += [(_EQUAL, 0, 4, CLONE[column]), (_LOAD, 0, 0, _FIRST_ARGUMENT)]
    steps += [(_ANY_BIT, 0, 1, _CLONE_THREAD), (_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _EPERM)]
    for name, own in OF_OWN_PROCESS.items():
        other = 0 if name == "prlimit64" else pid
        steps += [(_EQUAL, 0, 5, own[column]), (_LOAD, 0, 0, _FIRST_ARGUMENT)]
        steps += [(_EQUAL, 1, 0, pid), (_EQUAL, 0, 1, other), (_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _EPERM)]
    steps.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("<HBBI", *step) for step in steps)
