"""JAX's persistent compilation cache, turned on for the command line.

Most of the processor time of a command is XLA compiling programs that the last command has compiled
already. The cache keeps them in the user's cache folder: `$GRADJAX_CACHE_DIR`, else
`$XDG_CACHE_HOME/gradjax`, else `~/.cache/gradjax`. Processors with different instructions get
separate subfolders, because the entries are machine code.

JAX reports an entry that it cannot read, but it neither replaces the entry nor notices every
flipped bit, and a damaged program may crash the process. So each command first compares the entries
with their recorded checksums and deletes those that differ: a damaged entry costs one compilation.
The size is bounded in the same way, without a lock and without `filelock`, which JAX's own bound
needs: beyond `MAX_BYTES` the oldest entries are deleted. One command adds about 1 MB.

The setting is made through environment variables, which JAX reads when it is first imported. A
process that has imported JAX before keeps its own setting, and so does a user who has set
`JAX_COMPILATION_CACHE_DIR`.
"""

import atexit
import hashlib
import os
import platform
import sys
import tempfile
import time
import warnings
import zlib
from pathlib import Path

MAX_BYTES = 256 * 2**20
"""The entries of one kind of processor may take this much: about 200 commands."""

UNLISTED_SECONDS = 24 * 3600
"""How long an entry without a checksum is kept. A command that is killed leaves such entries, and
one that still runs has not recorded its own yet."""

_CHECKSUMS = "checksums.txt"
_JAX_MESSAGES = ("Error reading persistent compilation", "Error writing persistent compilation")


def turn_on() -> None:
    """Let the JAX that this process is going to import keep its compiled programs.

    A folder that cannot be written costs one warning on standard error, and so do damaged entries,
    however many; nothing is raised.
    """
    if "jax" in sys.modules or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            # It can be written.
            pass
        damaged = _remove_damaged(folder)
        _remove_oldest(folder)
    except OSError as error:
        _warn(f"the compilation cache {folder} cannot be used ({error}); compiling anew")
        return
    if damaged:
        _warn(f"{damaged} damaged entries of the compilation cache {folder} were deleted")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    # Small programs too: a command compiles about a hundred, and reading one is faster than that.
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    _warn_once_about_entries(folder, warned=damaged > 0)
    atexit.register(_record, folder, time.time())


def cache_folder() -> Path:
    """The folder of compiled programs for this user and this kind of processor."""
    own = os.environ.get("GRADJAX_CACHE_DIR")
    if own:
        return Path(own).expanduser() / _processor()
    shared = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(shared).expanduser() / "gradjax" / _processor()


def _processor() -> str:
    """A short name for the instruction set: machine code for one must not be loaded on another."""
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        cpuinfo = ""
    flags = [line for line in cpuinfo.splitlines() if line.startswith(("flags", "Features"))]
    if flags:
        instructions = " ".join(sorted(flags[0].split()))
    else:
        # Not Linux: the processor's name has to do.
        instructions = platform.processor()
    digest = hashlib.sha256(instructions.encode()).hexdigest()[:8]
    return f"{platform.machine() or 'unknown'}-{digest}"


def _entries(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name.endswith("-cache")]


def _checksum(path: Path) -> str:
    data = path.read_bytes()
    return f"{zlib.crc32(data):08x}.{len(data)}"


def _recorded(folder: Path) -> dict[str, str]:
    """Entry name -> checksum. An unreadable line counts as none; the last line of a name holds."""
    try:
        text = (folder / _CHECKSUMS).read_text(errors="replace")
    except FileNotFoundError:
        return {}
    pairs = (line.split() for line in text.splitlines())
    return {pair[1]: pair[0] for pair in pairs if len(pair) == 2}


def _remove_damaged(folder: Path) -> int:
    """Delete entries that differ from their checksum, and old ones without any.

    Returns how many differed.
    """
    recorded, kept, damaged = _recorded(folder), {}, 0
    for path in _entries(folder):
        try:
            expected = recorded.get(path.name)
            if expected is None:
                if time.time() - path.stat().st_mtime > UNLISTED_SECONDS:
                    path.unlink()
            elif _checksum(path) == expected:
                kept[path.name] = expected
            else:
                path.unlink()
                damaged += 1
        except FileNotFoundError:
            # Another command has just deleted it.
            continue
    if kept != recorded:
        lines = "".join(f"{checksum} {name}\n" for name, checksum in kept.items())
        _replace(folder / _CHECKSUMS, lines)
    return damaged


def _replace(path: Path, text: str) -> None:
    """Write a file that other processes see whole or not at all."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as new:
        new.write(text)
    os.replace(new.name, path)


def _remove_oldest(folder: Path) -> None:
    """Delete the oldest entries until the others fit into `MAX_BYTES`."""
    entries = []
    for path in _entries(folder):
        try:
            state = path.stat()
        except FileNotFoundError:
            continue
        entries.append((state.st_mtime, state.st_size, path))
    total = sum(size for _, size, _ in entries)
    for _, size, path in sorted(entries):
        if total <= MAX_BYTES:
            return
        path.unlink(missing_ok=True)
        total -= size


def _record(folder: Path, started: float) -> None:
    """At exit: bound the size, then record the checksums of the entries written since `started`.

    Another command may be writing an entry at this moment, so the last second is left out.
    """
    try:
        _remove_oldest(folder)
        lines = []
        for path in _entries(folder):
            if started - 1 <= path.stat().st_mtime <= time.time() - 1:
                lines.append(f"{_checksum(path)} {path.name}\n")
        with open(folder / _CHECKSUMS, "a") as file:
            file.writelines(lines)
    except OSError:
        # Entries without a checksum are deleted after a day.
        pass


def _warn_once_about_entries(folder: Path, warned: bool) -> None:
    """JAX warns of every entry that it cannot read or write; show the first one, in our words."""
    show = warnings.showwarning

    def show_first(message, category, filename, lineno, file=None, line=None):
        nonlocal warned
        if not str(message).startswith(_JAX_MESSAGES):
            show(message, category, filename, lineno, file, line)
        elif not warned:
            warned = True
            _warn(f"an entry of the compilation cache {folder} is of no use ({message})")

    warnings.showwarning = show_first


def _warn(message: str) -> None:
    print(f"gradjax: {message}. To do without it: --no_cache", file=sys.stderr)
