"""Stand-ins for the driver libraries of Ascend (CANN), so that the real torch_npu loads where there is none.

torch_npu's wheel leaves CANN's calls to libraries that are not in it. `build` writes C source with an answer to every such call, and
compiles it under the names that the loader asks for: one device, memory from malloc, copies by memcpy, success for all else. Nothing
computes: a kernel that is launched leaves its output as it was. What needs no kernel is real: allocation, copies, types, dispatch.

    libraries = build(Path(torch_npu.__file__).parent, folder)       # then LD_LIBRARY_PATH=folder python ...
"""

import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

__all__ = ["COMPILER", "SOC", "StandinError", "build", "missing_programs"]

COMPILER = "gcc"
PROGRAMS = {COMPILER: "gcc", "nm": "binutils"}
SOC = "Ascend910B3"
# What torch_npu is linked to, or opens by name.
LIBRARIES = (
    *("libascendcl", "libacl_op_compiler", "libacl_tdt_channel", "libge_runner", "libgraph", "libhccl", "libatb"),
    *("libopapi", "libaclnn_math", "libaclnn_ops_infer", "libaclnn_ops_train", "libaclnn_rand", "libaclnn_sparse", "libaclnn_fft"),
)
# Calls that torch_npu looks up by name when it runs: driver, graph engine, operators, collectives, profiler.
CALL = re.compile(rb"(?:acl(?:rt|mdl|op|nn|prof|tdt|sys|blas|util)?|Hccl|Hcom|Msprof)[A-Z]\w+|rt[A-Z]\w{4,}")
TEXT = re.compile(rb"[ -~]{5,}")
DEVICE_BYTES = 64 << 30

# Calls whose answer is data; ids, streams, events and contexts are never null. All others answer 0, which is success.
ANSWERS = f"""
#include <stdlib.h>
#include <string.h>
typedef unsigned long size;
static int allocate(void **place, size bytes) {{ return posix_memalign(place, 512, bytes ? bytes : 512); }}
int aclrtGetDeviceCount(unsigned *count) {{ *count = 1; return 0; }}
int aclrtGetDevice(int *device) {{ *device = 0; return 0; }}
const char *aclrtGetSocName(void) {{ return "{SOC}"; }}
const char *aclGetRecentErrMsg(void) {{ return ""; }}
int aclrtGetCurrentContext(void **context) {{ *context = (void *)1; return 0; }}
int aclrtCreateContext(void **context, int device) {{ *context = (void *)1; return 0; }}
int aclrtCreateStream(void **stream) {{ return allocate(stream, 8); }}
int aclrtCreateStreamWithConfig(void **stream, unsigned priority, unsigned flag) {{ return allocate(stream, 8); }}
int aclrtCreateEvent(void **event) {{ return allocate(event, 8); }}
int aclrtCreateEventWithFlag(void **event, unsigned flag) {{ return allocate(event, 8); }}
int aclrtCreateEventExWithFlag(void **event, unsigned flag) {{ return allocate(event, 8); }}
int aclrtQueryEventStatus(void *event, int *status) {{ *status = 1; return 0; }}
int aclrtQueryEventWaitStatus(void *event, int *status) {{ *status = 1; return 0; }}
int aclrtStreamQuery(void *stream, int *status) {{ *status = 0; return 0; }}
int aclrtGetMemInfo(int kind, size *unused, size *all) {{ *unused = *all = {DEVICE_BYTES}ul; return 0; }}
int aclrtMalloc(void **place, size bytes, int policy) {{ return allocate(place, bytes); }}
int aclrtMallocAlign32(void **place, size bytes, int policy) {{ return allocate(place, bytes); }}
int aclrtMallocWithCfg(void **place, size bytes, int policy, void *config) {{ return allocate(place, bytes); }}
int aclrtMallocHost(void **place, size bytes) {{ return allocate(place, bytes); }}
int aclrtMallocHostWithCfg(void **place, size bytes, void *config) {{ return allocate(place, bytes); }}
int aclrtFree(void *place) {{ free(place); return 0; }}
int aclrtFreeHost(void *place) {{ free(place); return 0; }}
int aclrtMemcpy(void *to, size room, const void *from, size bytes, int kind) {{ memcpy(to, from, bytes); return 0; }}
int aclrtMemcpyAsync(void *to, size room, const void *from, size bytes, int kind, void *stream) {{ memcpy(to, from, bytes); return 0; }}
int aclrtMemset(void *to, size room, int value, size bytes) {{ memset(to, value, bytes); return 0; }}
int aclrtMemsetAsync(void *to, size room, int value, size bytes, void *stream) {{ memset(to, value, bytes); return 0; }}
static int is_capturing;
int aclmdlRICaptureBegin(void *stream, int mode) {{ is_capturing = 1; return 0; }}
int aclmdlRICaptureEnd(void *stream, void **model) {{ is_capturing = 0; *model = (void *)8; return 0; }}
int aclmdlRICaptureGetInfo(void *stream, int *status, void **model) {{ *status = is_capturing; *model = (void *)8; return 0; }}
size aclGetCompileoptSize(int option) {{ return 16; }}
int aclGetCompileopt(int option, char *value, size bytes) {{ strncpy(value, "disable", bytes); return 0; }}
"""


class StandinError(Exception):
    """The stand-in cannot be built here; the message says what to install."""


def missing_programs() -> list[str]:
    """Debian packages of the programs that `build` needs and that are not there."""
    return sorted({package for program, package in PROGRAMS.items() if shutil.which(program) is None})


def build(package: Path, folder: Path) -> list[Path]:
    """Libraries for the torch_npu in `package`, written to `folder`; raises StandinError where that cannot be."""
    lacking = missing_programs()
    if lacking:
        raise StandinError(f"the stand-in for Ascend's driver needs {' and '.join(lacking)}: apt-get install {' '.join(lacking)}")
    own = [*package.glob("lib/*.so"), *package.glob("_C*.so")]
    if not own:
        raise StandinError(f"{package} holds no library of torch_npu")
    answered = set(re.findall(r"^(?:int|size|const char \*)\s*(\w+)\(", ANSWERS, re.MULTILINE))
    source = folder / "standin.c"
    calls = sorted(_calls(own, package.parent / "torch" / "lib") - answered)
    source.write_text(ANSWERS + "".join(f"long {name}() {{ return 0; }}\n" for name in calls), encoding="ascii")
    first, *others = (folder / f"{name}.so" for name in LIBRARIES)
    outcome = subprocess.run([COMPILER, "-shared", "-fPIC", "-w", "-o", first, source], capture_output=True, text=True, check=False)
    if outcome.returncode != 0:
        raise StandinError(f"{COMPILER} cannot build the stand-in for Ascend's driver: {outcome.stderr[-2000:]}")
    for other in others:
        shutil.copyfile(first, other)
    return [first, *others]


def _calls(own: Iterable[Path], torch_lib: Path) -> set[str]:
    """Names that `own` libraries need, or look up, and that neither they nor torch nor the system define."""
    needed: set[str] = set()
    defined: set[str] = set()
    for library in own:
        defined |= _symbols(library, "--defined-only")
        # A version behind @ is the system's, so is what Python and the C++ runtime provide.
        needed |= {name for name in _symbols(library, "--undefined-only") if "@" not in name and not name.startswith(("Py", "_Py"))}
        for text in TEXT.findall(library.read_bytes()):
            if CALL.fullmatch(text):
                needed.add(text.decode("ascii"))
    for library in torch_lib.glob("*.so*"):
        defined |= _symbols(library, "--defined-only")
    return {name for name in needed - defined if re.fullmatch(r"[A-Za-z_]\w*", name)}


def _symbols(library: Path, which: str) -> set[str]:
    outcome = subprocess.run(["nm", "-D", which, library], capture_output=True, text=True, check=True)
    # " U name", "address T name"; weak ones (w, v) may stay undefined.
    fields = (line.split() for line in outcome.stdout.splitlines())
    return {parts[-1] for parts in fields if len(parts) >= 2 and parts[-2] not in "wv"}
