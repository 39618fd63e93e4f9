"""The file events of this process: counted, and each a chance for a kill, a signal, a power cut or a full disk.

Python's own functions are replaced (open, os.fsync, os.replace, …), so that no other library is needed. What C++ code
writes by itself is not seen; torch.save writes through the file object that it is given, which is.
"""

import builtins
import errno
import io
import mmap
import os
import threading

REAL = {
    name: getattr(os, name)
    for name in "open close write fsync replace rename link unlink remove truncate ftruncate mkdir rmdir".split()
}
REAL_OPEN = builtins.open


class Shared:
    """A number that a process and its forks have in common."""

    def __init__(self):
        self.memory = mmap.mmap(-1, 8)

    @property
    def value(self):
        return int.from_bytes(self.memory[:8], "little")

    @value.setter
    def value(self, number):
        self.memory[:8] = number.to_bytes(8, "little")


class FileEvents:
    """Counts the moments at which a process may die while it writes below the folder root.

    A moment is before each event (open for writing, write, fsync, truncate, rename, link, unlink, mkdir, rmdir), in the
    middle of each write, and at the end; "after an event" is "before the next one", as far as the disk can tell. At
    moment number `at`, from 1, action() is called, which may end the process. disk: told of the events, see disk.py.
    """

    def __init__(self, root, at=None, action=None, disk=None):
        self.root, self.at, self.action, self.disk = os.path.realpath(root), at, action, disk
        self.count = 0
        self.used = Shared()  # bytes that were written, and one for each new name
        self.marks = []  # how many that were, at each moment
        self.space = None  # of these, until the disk is full
        self.read_only = False
        self.files = {}  # open descriptor -> what disk.opened returned
        self.lock = threading.RLock()

    def moment(self):
        """Count a moment, and act if it is the one."""
        self.count += 1
        self.marks.append(self.used.value)
        if self.count == self.at:
            self.action()

    def inside(self, path):
        """The real path of a name below root; None for another place and for a descriptor."""
        if isinstance(path, int):
            return None
        folder, name = os.path.split(os.path.abspath(os.fsdecode(path)))
        place = os.path.join(os.path.realpath(folder), name)
        return place if place.startswith(self.root + os.sep) or place == self.root else None

    def allow(self, path, new_names=0):
        """Raise the OSError of a disk that is read-only, or has no space for new names."""
        if self.read_only:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
        if new_names and self.space is not None and self.used.value >= self.space:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        self.used.value += new_names

    def write(self, write, content):
        """Write as much of content as there is space for, by write(part); how much that was."""
        with self.lock:
            self.moment()
            content = memoryview(content).cast("B")
            if self.space is not None:
                left = max(0, self.space - self.used.value)
                if len(content) and not left:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as the system says it: without a path
                content = content[:left]
            half = len(content) // 2
            if half and self.count + 1 == self.at:
                written = write(content[:half])
                self.moment()
            else:
                self.count += bool(half)
                written = write(content)
            self.used.value += written
            return written

    def opened(self, path, descriptor, new):
        """Note what an open descriptor is."""
        self.files[descriptor] = self.disk.opened(path, new) if self.disk else None

    def install(self):
        """Take the place of Python's functions, until the process ends."""
        for name, function in _replacements(self).items():
            setattr(os, name, function)
        builtins.open = io.open = _opener(self)


def _opener(events):
    """What takes the place of `open`."""

    class File(io.FileIO):
        def write(self, content):
            return events.write(super().write, content)

        def close(self):
            if not self.closed:
                events.files.pop(self.fileno(), None)
            super().close()

        def truncate(self, size=None):
            with events.lock:
                events.moment()
                return super().truncate(size)

    def open_file(
        file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, closefd=True, opener=None
    ):  # the signature of `open`
        path = events.inside(file)
        if path is None or not set(mode) & set("wax+") or opener is not None:
            return REAL_OPEN(file, mode, buffering, encoding, errors, newline, closefd, opener)
        with events.lock:
            events.moment()
            new = not os.path.lexists(path)
            events.allow(path, new_names=new)
            raw = File(file, mode.replace("b", "").replace("t", ""))
            events.opened(path, raw.fileno(), new)
        if buffering == 0:
            return raw
        buffered = (io.BufferedRandom if "+" in mode else io.BufferedWriter)(raw)
        if "b" in mode:
            return buffered
        text = io.TextIOWrapper(buffered, encoding or "utf-8", errors, newline, line_buffering=buffering == 1)
        text.mode = mode
        return text

    return open_file


def _replacements(events):
    """name -> what takes the place of a function of os."""

    def open_descriptor(path, flags, mode=0o777, *, dir_fd=None):
        place = events.inside(path) if dir_fd is None else None
        writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if place is None:
            return REAL["open"](path, flags, mode, dir_fd=dir_fd)
        with events.lock:
            new = bool(flags & os.O_CREAT) and not os.path.lexists(place)
            if writes:
                events.moment()
                events.allow(place, new_names=new)
            descriptor = REAL["open"](path, flags, mode)
            events.opened(place, descriptor, new)
            return descriptor

    def sync(descriptor):
        with events.lock:
            if descriptor in events.files:
                events.moment()
            REAL["fsync"](descriptor)
            if events.disk and descriptor in events.files:
                events.disk.synced(events.files[descriptor])

    def changes_names(name, note, new_names=0):
        """A function of one or two paths, for os.name; note: the method of disk that is told."""

        def function(*paths, dir_fd=None, **options):
            if dir_fd is not None:  # shutil.rmtree
                folder = os.readlink(f"/proc/self/fd/{dir_fd}")
                paths = (os.path.join(folder, os.fspath(paths[0])), *paths[1:])
            n_paths = 2 if name in ("replace", "rename", "link") else 1
            places = [events.inside(path) for path in paths[:n_paths]]
            if None in places:
                return REAL[name](*paths, **options)
            with events.lock:
                events.moment()
                if name != "mkdir" or not os.path.lexists(places[0]):
                    events.allow(places[-1], new_names)
                kept = events.disk and events.disk.content_of(places[-1])
                result = REAL[name](*paths, **options)
                if events.disk:
                    getattr(events.disk, note)(*places, kept=kept)
                return result

        return function

    def close(descriptor):
        events.files.pop(descriptor, None)
        REAL["close"](descriptor)

    def truncate_descriptor(descriptor, size):
        with events.lock:
            if descriptor in events.files:
                events.moment()
            return REAL["ftruncate"](descriptor, size)

    def write_descriptor(descriptor, content):
        if descriptor not in events.files:
            return REAL["write"](descriptor, content)
        return events.write(lambda part: REAL["write"](descriptor, part), content)

    return {
        "open": open_descriptor,
        "close": close,
        "fsync": sync,
        "fdatasync": sync,
        "write": write_descriptor,
        "ftruncate": truncate_descriptor,
        **{name: changes_names(name, "renamed") for name in ("replace", "rename")},
        "link": changes_names("link", "linked", new_names=1),
        **{name: changes_names(name, "unlinked") for name in ("unlink", "remove", "rmdir")},
        "mkdir": changes_names("mkdir", "made", new_names=1),
    }
