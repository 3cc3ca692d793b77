# ruff: noqa: E501
"""Programs that try to get out of the sandbox, or to pass without passing. Refuses to run any of them: they are text.

`ATTEMPTS` end normally only where they got what they wanted; `FORGERIES` are tried with tests that always fail. In them
@SECRET@ stands for a file of the caller's, @FOLDER@ for its folder, @HOME@ for a file in the caller's home, @PORT@ for a port that somebody listens on, @PID@
for the caller's number.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["ATTEMPTS", "FORGERIES", "TESTS_THAT_FAIL"]

TESTS_THAT_FAIL = "import random\nassert random.random() > 2\ndone = True"

_ANY = """
def any_of(*ways):
    for way in ways:
        try:
            way()
            return
        except (Exception, SystemExit) as error:
            print(error)
    raise SystemExit("contained")
"""

_NATIVE = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
def must(result):
    if result < 0: raise OSError(ctypes.get_errno())
"""

ATTEMPTS: dict[str, str] = {
    "fork bomb": "import os\nwhile True: os.fork()",
    "one fork": "import os\nif os.fork() == 0:\n    os.setsid()\n    import time; time.sleep(60)",
    "daemon": "import os, time\nos.setsid()\nos.posix_spawn('/bin/sleep', ['sleep', '60'], {})",
    "subprocess": "import subprocess\nsubprocess.run(['/bin/sh', '-c', 'sleep 60 &'], check=True)",
    "multiprocessing": "import multiprocessing as m\nm.get_context('fork').Process(target=print).start()",
    "thread bomb": (
        "import threading, time\nthreading.stack_size(32768)\n"
        "for _ in range(5000): threading.Thread(target=time.sleep, args=(60,), daemon=True).start()"
    ),
    "10 GB": "block = bytearray(10 << 30)",
    "10 GB in pieces": "blocks = []\nfor _ in range(10240): blocks.append(b'x' * (1 << 20))",
    "10 GB shared": "import mmap\nblock = mmap.mmap(-1, 10 << 30)\nfor i in range(0, 10 << 30, 4096): block[i] = 1",
    "memory in a memfd": "import os\nf = os.memfd_create('x')\nfor _ in range(10240): os.write(f, b'x' * (1 << 20))",
    "zip bomb": (
        "import zlib\ndata = zlib.compress(bytes(64 << 20))\n"
        "out = [zlib.decompress(data) for _ in range(160)]"
    ),
    "IPv4": _ANY
    + "import socket\nany_of(*[lambda a=a: socket.create_connection(a, 2) for a in [('127.0.0.1', @PORT@), ('1.1.1.1', 53)]])",
    "IPv6": "import socket\nsocket.socket(socket.AF_INET6).connect(('::1', @PORT@))",
    "UDP": "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', @PORT@))",
    "raw packets": _ANY
    + "import socket\nany_of(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW), lambda: socket.socket(16, 3, 0))",
    "HTTP": "import urllib.request\nurllib.request.urlopen('http://127.0.0.1:@PORT@', timeout=2)",
    "unix sockets": "import socket\nsocket.socket(socket.AF_UNIX).bind('\\0potstill')",
    "reading a file": "open('@SECRET@').read()",
    "reading by a link": "import os\nos.symlink('@SECRET@', 'link')\nopen('link').read()",
    "reading by a hard link": "import os\nos.link('@SECRET@', 'link')\nopen('link').read()",
    "listing a folder": "import os\nos.listdir('@FOLDER@')",
    "reading home": _ANY
    + "import os\nany_of(lambda: open('@HOME@').read(), *[lambda p=p: open(p).read() for p in "
    + repr([*(str(Path("~root").expanduser() / name) for name in (".bashrc", ".profile")), "/etc/hosts"])
    + "])",
    "passwords": _ANY + "any_of(lambda: open('/etc/passwd').read(), lambda: open('/etc/shadow').read())",
    "out by dots": "open('../' * 40 + '@SECRET@'.lstrip('/')).read()",
    "out by chroot": "import os\nos.chroot('.')",
    "out by mkdir and fchdir": "import os\nf = os.open('/', os.O_RDONLY)\nos.mkdir('x')\nos.chroot('x')\nos.fchdir(f)",
    "deleting a file": "import os\nos.unlink('@SECRET@')",
    "deleting everything": (
        "import os, shutil\ncount = 0\n"
        "def seen(*arguments): pass\n"
        "for top in ('/usr', '/lib', '/root', '/home', '/srv', '/etc', '@FOLDER@'): shutil.rmtree(top, onerror=seen)\n"
        "raise SystemExit('see what is left')"
    ),
    "writing a file": "open('@SECRET@', 'w').write('x')",
    "emptying a file": "import os\nos.open('@SECRET@', os.O_RDONLY | os.O_TRUNC)",
    "a new file outside": _ANY
    + "any_of(*[lambda p=p: open(p + '/potstill-escaped', 'w') for p in ('/', '/tmp', '/usr', '/var/tmp', '/dev/shm', '@FOLDER@')])",
    "changing modes": _ANY
    + "import os\nany_of(lambda: os.chmod('@SECRET@', 0), lambda: os.utime('@SECRET@'), lambda: os.setxattr('@SECRET@', 'user.x', b''))",
    "changing the library": "import os\nopen(os.__file__, 'a').write('x')",
    "filling the disk": (
        "import os\nfor number in range(200):\n    with open(str(number), 'wb') as f: f.write(bytes(8 << 20))"
    ),
    "one large file": "import os\nf = open('x', 'wb')\nfor _ in range(200): f.write(bytes(1 << 20))",
    "many files": "for number in range(100_000): open(str(number), 'w').close()",
    "many descriptors": "import os\nkept = [os.open('/dev/null', 0) for _ in range(1000)]",
    "/proc/self/mem": "open('/proc/self/mem', 'rb')",
    "/proc of others": _ANY
    + "any_of(*[lambda p=p: open(f'/proc/{p}/environ').read() for p in (1, 2, '@PID@', 'self')])",
    "/proc/self/fd": "import os\nos.listdir('/proc/self/fd')",
    "/sys": "import os\nos.listdir('/sys')",
    "devices": _ANY + "any_of(*[lambda p=p: open(p, 'rb') for p in ('/dev/mem', '/dev/sda', '/dev/vda', '/dev/tty', '/dev/kmsg')])",
    "making a device": "import os, stat\nos.mknod('sda', stat.S_IFBLK | 0o666, os.makedev(8, 0))",
    "killing the caller": _ANY
    + "import os, signal\nany_of(*[lambda p=p: os.kill(p, signal.SIGKILL) for p in (os.getppid(), @PID@, -1, 1) if p != 0] or [lambda: os.kill(@PID@, 9)])",
    "stopping the caller": "import os, signal\nos.kill(@PID@, signal.SIGSTOP)",
    "killing its group": "import os, signal\nos.killpg(os.getpgid(@PID@), signal.SIGTERM)",
    "ptrace": _NATIVE + "must(libc.ptrace(16, @PID@, 0, 0))",
    "mount": _NATIVE + "must(libc.mount(b'none', b'.', b'proc', 0, None))",
    "new namespaces": _NATIVE + "must(libc.unshare(0x10000000))",
    "native code": "import ctypes\nctypes.CDLL(None)",
    "a made library": (
        "import importlib.machinery, importlib.util, os, shutil\n"
        "source = next(p for p in __import__('sys').path if p.endswith('lib-dynload'))\n"
        "name = next(n for n in os.listdir(source) if n.startswith('_bisect'))\n"
        "open('_bisect.so', 'wb').write(open(source + '/' + name, 'rb').read())\n"
        "loader = importlib.machinery.ExtensionFileLoader('_bisect', os.getcwd() + '/_bisect.so')\n"
        "importlib.util.module_from_spec(importlib.util.spec_from_loader('_bisect', loader))"
    ),
    "root again": _ANY + "import os\nany_of(lambda: os.setuid(0), lambda: os.setresuid(0, 0, 0), lambda: os.setgroups([0]))",
    "setuid programs": _ANY
    + "import os\nany_of(*[lambda p=p: os.execv(p, [p, '-c', 'id']) for p in ('/bin/su', '/usr/bin/su', '/usr/bin/sudo', '/bin/mount')])",
    "another limit": _ANY
    + "import resource as r\nany_of(*[lambda k=k: r.setrlimit(k, (r.RLIM_INFINITY,) * 2) for k in (r.RLIMIT_AS, r.RLIMIT_CPU, r.RLIMIT_NPROC, r.RLIMIT_FSIZE)])",
    "shared memory": "from multiprocessing.shared_memory import SharedMemory\nSharedMemory('potstill', True, 4096)",
    "inherited descriptors": (
        "import os\nfor number in range(4, 4096):\n    try: os.fstat(number)\n    except OSError: continue\n    break\n"
        "else: raise SystemExit('none')"
    ),
    "the environment": (
        "import os\nkept = {n: v for n, v in os.environ.items() if n not in ('HOME', 'LC_CTYPE')}\n"
        "if not kept and os.environ['HOME'] != '/root': raise SystemExit('empty')"
    ),
    "packages of the caller": "import sys\nsys.path += ['/usr/lib/python3/dist-packages']\nimport numpy",
    "endless loop": "while True: pass",
    "a loop that hears no signal": (
        "import signal\nfor number in range(1, 64):\n    try: signal.signal(number, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\nwhile True: pass"
    ),
    "sleep": "import time\nwhile True: time.sleep(1000)",
    "stop itself": "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)\nraise SystemExit('woken')",
    "a loop in C": "sum(range(10 ** 12))",
    "a power": "x = 10 ** 10 ** 10",
    "backtracking": "import re\nre.match('(a+)+$', 'a' * 64 + 'b')",
    "flood": "while True: print('x' * 65536)",
    "flood of the result": "import os\nwhile True: os.write(3, b'x' * 65536)",
    "silence": "import os, time\nfor number in range(64):\n    try: os.close(number)\n    except OSError: pass\ntime.sleep(1000)",
    "recursion": "import sys\nsys.setrecursionlimit(10 ** 9)\ndef f(): f()\nf()",
    "byte code by marshal": "import marshal\nmarshal.loads(marshal.dumps(compile('1', 'x', 'exec')))",
    "byte code by a file": (
        "import io, marshal\nmarshal.load(io.BytesIO(marshal.dumps(compile('1', 'x', 'exec'))))"
    ),
    "byte code by the import system": _ANY
    + (
        "import importlib._bootstrap_external as b, importlib.util, marshal, sys\n"
        "data = marshal.dumps(compile('1', 'x', 'exec'))\n"
        "class Source(b.SourceLoader):\n"
        "    def get_filename(self, name): return 'x.py'\n"
        "    def path_stats(self, path): return {'mtime': 0, 'size': 0}\n"
        "    def get_data(self, path):\n"
        "        if path == 'x.py': raise OSError('no source')\n"
        "        return importlib.util.MAGIC_NUMBER + bytes(12) + data\n"
        "sys.implementation.cache_tag = 'x'\n"
        "any_of(lambda: Source().get_code('x'), lambda: b._compile_bytecode(data))"
    ),
    "byte code as a frozen module": _ANY
    + (
        "import _imp, marshal\ndata = marshal.dumps(compile('1', 'x', 'exec'))\n"
        "def again():\n"
        "    from importlib.machinery import BuiltinImporter, ModuleSpec\n"
        "    made = BuiltinImporter.create_module(ModuleSpec('_imp', BuiltinImporter, origin='built-in'))\n"
        "    made.get_frozen_object('x', data)\n"
        "any_of(lambda: _imp.get_frozen_object('x', data), again)"
    ),
    "byte code by replace": "(lambda: 1).__code__.replace(co_consts=(None, 2))",
    "byte code by its type": (
        "c = (lambda: 1).__code__\ntype(c)(0, 0, 0, 0, 0, 0, b'', (), (), (), '', '', '', 1, b'', b'', (), ())"
    ),
    "tracing at all": _ANY
    + (
        "import sys, threading\n"
        "def monitor():\n"
        "    sys.monitoring.use_tool_id(1, 'x')\n"
        "    sys.monitoring.register_callback(1, sys.monitoring.events.LINE, print)\n"
        "def all_threads():\n    threading.settrace_all_threads(print)\n    assert sys.gettrace()\n"
        "any_of(lambda: sys.settrace(print), lambda: sys.setprofile(print), monitor, all_threads)"
    ),
    "frames of other threads": _ANY + "import sys\nany_of(sys._current_frames, sys._current_exceptions)",
    "another audit hook": (
        "import sys\nheard = []\nsys.addaudithook(lambda *a: heard.append(a))\n"
        "compile('1', 'x', 'eval')\nassert heard"
    ),
    "a second interpreter": _ANY
    + (
        "def older():\n    import _xxsubinterpreters as s\n    s.create()\n"
        "def newer():\n    import _interpreters as s\n    s.create()\n"
        "any_of(older, newer)"
    ),
    "the library's own tests": (
        "import importlib.machinery, importlib.util, sys\n"
        "import glob\n"
        "file = next((f for p in sys.path for f in glob.glob(p + '/_testcapi*.so')), '/nowhere.so')\n"
        "loader = importlib.machinery.ExtensionFileLoader('x._testcapi', file)\n"
        "importlib.util.module_from_spec(importlib.util.spec_from_loader('x._testcapi', loader))"
    ),
}  # fmt: skip

_SAY = "import os\ndef say(word): os.write(3, word)\n"

_WORDS_IN_GC = _SAY + (
    "def say_words():\n    import gc\n    for value in gc.get_objects():\n"
    "        for part in getattr(value, 'args', ()) or ():\n"
    "            if isinstance(part, bytes) and len(part) == 16: say(part); os._exit(0)\n"
)

FORGERIES: dict[str, str] = {
    "leaving with 0": "import os\nos._exit(0)",
    "sys.exit": "import sys\nsys.exit(0)",
    "atexit": "import atexit, os\natexit.register(os._exit, 0)",
    "saying yes": _SAY + "say(b'+')\nos._exit(0)",
    "all bytes": _SAY + "say(bytes(range(256)))\nos._exit(0)",
    "no AssertionError": (
        "import builtins\nclass AssertionError(BaseException): pass\nbuiltins.AssertionError = None\n"
        "builtins.exec = print\nbuiltins.compile = print\nbuiltins.__import__ = lambda *a, **k: None"
    ),
    "another random": "import sys, types\nm = types.ModuleType('random')\nm.random = lambda: 1\nsys.modules['random'] = m",
    "swallowing the exception": (
        "import sys, os\nsys.excepthook = lambda *a: os._exit(0)\nsys.unraisablehook = sys.excepthook\n"
        "sys.stderr = None"
    ),
    "words in frames": _SAY
    + (
        "import sys\nframe = sys._getframe()\nwhile frame:\n"
        "    for place in (frame.f_locals, frame.f_globals, frame.f_builtins):\n"
        "        for value in list(place.values()):\n"
        "            if isinstance(value, bytes) and len(value) == 16: say(value)\n"
        "            if isinstance(value, (tuple, list)):\n"
        "                for part in value: print(part)\n"
        "    frame = frame.f_back\nos._exit(0)"
    ),
    "calling what is in frames": (
        "import sys\nframe = sys._getframe()\nwhile frame:\n    for place in (frame.f_locals, frame.f_globals):\n"
        "        for name, value in list(place.items()):\n"
        "            if hasattr(value, '__next__'):\n                for step in value: print(step)\n"
        "    frame = frame.f_back"
    ),
    "words in gc": _SAY
    + (
        "import gc\nfor value in gc.get_objects():\n"
        "    for part in getattr(value, 'args', ()) or ():\n"
        "        if isinstance(part, bytes) and len(part) == 16: say(part); os._exit(0)"
    ),
    "referrers": _SAY
    + (
        "import gc, os\nfor value in gc.get_referrers(os.write):\n"
        "    if hasattr(value, 'args'): value(); os._exit(0)"
    ),
    "referents": "import gc, sys\nprint(gc.get_referents(sys._getframe(1)))\nimport os; os._exit(0)",
    "unfrozen gc": "import gc\ngc.freeze(); gc.unfreeze()\nprint(len(gc.get_objects(generation=2)))",
    "gc callbacks": "import gc, sys, os\ngc.callbacks.append(lambda *a: print(sys._getframe().f_back))\ngc.collect()",
    "standard input again": _SAY
    + "os.lseek(0, 0, 0)\nword = os.read(0, 16)\nsay(word)\nos._exit(0)",
    "memory by ctypes": "import ctypes\nprint(ctypes.string_at(id(b'x'), 64))\nimport os; os._exit(0)",
    "ctypes by its classes": (
        "for c in object.__subclasses__():\n    if 'ctypes' in c.__module__ or 'CData' in c.__name__: print(c)\n"
        "import _ctypes\n_ctypes.dlopen(None, 0)"
    ),
    "made byte code": (
        "def f(): return 1\nf.__code__ = f.__code__.replace(co_consts=(None, 2))\nimport os; os._exit(0)"
    ),
    "tracing": (
        "import sys, threading\ndef trace(frame, event, argument):\n    frame.f_trace_lines = True\n"
        "    if frame.f_code.co_filename == 'tests.py' and event == 'line':\n"
        "        try: frame.f_lineno = frame.f_lineno + 1\n        except ValueError: pass\n    return trace\n"
        "frame = sys._getframe()\nwhile frame: frame.f_trace = trace; frame = frame.f_back\n"
        "import os; sys.settrace(lambda f, e, a: os._exit(0) if f.f_code.co_filename == 'tests.py' else None)"
    ),
    "profiling": (
        "import sys\nseen = []\nsys.setprofile(lambda f, e, a: seen.append(a))\n"
        "import atexit, os\natexit.register(lambda: print(seen))"
    ),
    "audit hook": "import sys, os\nsys.addaudithook(lambda e, a: os._exit(0) if e == 'exec' else None)",
    "alarm": _SAY
    + (
        "import signal\ndef hear(number, frame):\n    while frame:\n"
        "        for value in frame.f_locals.values():\n"
        "            if isinstance(value, bytes) and len(value) == 16: say(value)\n        frame = frame.f_back\n"
        "    os._exit(0)\nsignal.signal(signal.SIGALRM, hear)\nsignal.setitimer(signal.ITIMER_REAL, 1e-5, 1e-5)"
    ),
    "thread": "import threading, os, time\nthreading.Thread(target=lambda: os._exit(0)).start()\ntime.sleep(1)",
    "another interpreter": (
        "import os, sys\nos.write(3, b'+')\n"
        "os.execv(os.path.realpath(sys.executable), ['python', '-c', 'pass'])"
    ),
    "no os.write": "import os, posix\nos._exit = posix._exit = os.write = posix.write = lambda *a: 0",
    "other built-ins in the module": "__builtins__ = {'__import__': lambda *a: type('R', (), {'random': lambda: 9})}",
    "tracing past the assertion": (
        "import sys\ndef trace(frame, event, argument):\n"
        "    if frame.f_code.co_filename == 'tests.py' and event == 'line' and frame.f_lineno == 2:\n"
        "        frame.f_lineno = 3\n    return trace\nsys.settrace(trace)"
    ),
    "tracing from a thread": (
        "import sys, threading\ndef trace(frame, event, argument):\n"
        "    if frame.f_code.co_filename == 'tests.py' and event == 'line' and frame.f_lineno == 2:\n"
        "        frame.f_lineno = 3\n    return trace\n"
        "t = threading.Thread(target=threading.settrace_all_threads, args=(trace,))\nt.start()\nt.join()"
    ),
    "monitoring past the assertion": (
        "import sys\nm = sys.monitoring\nm.use_tool_id(1, 'x')\n"
        "def line(code, number):\n"
        "    frame = sys._getframe(1)\n    frame.f_trace = print\n"
        "    if code.co_filename == 'tests.py' and number == 2: frame.f_lineno = 3\n"
        "m.register_callback(1, m.events.LINE, line)\nm.set_events(1, m.events.LINE)"
    ),
    "another guard": _WORDS_IN_GC
    + "import __main__\nfor name in ('_HIDDEN', '_MODULES'): setattr(__main__, name, frozenset())\nsay_words()",
    "the guard's code": _WORDS_IN_GC
    + "import __main__\n__main__._keep_hidden.__code__ = (lambda e, a: None).__code__\nsay_words()",
    "no error for the guard to raise": _WORDS_IN_GC
    + "import __main__\n__main__.PermissionError = lambda *a: None\nsay_words()",
    "dying": "import os, signal\nos.kill(os.getpid(), signal.SIGTERM)",
}  # fmt: skip
