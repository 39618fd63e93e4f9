"""What survives a power cut: the content that was flushed, under the names whose folder was flushed.

The strictest reading of POSIX: fsync of a file saves its content, not its name; fsync of a folder saves the names in
it; nothing else is saved. A real file system saves more, so a cut may also keep any part of the rest.
"""

import os

from .events import REAL, REAL_OPEN


class Node:
    """A file or a folder, whatever names it has."""

    def __init__(self, is_folder=False):
        self.is_folder = is_folder
        self.saved = b""  # what of its content was flushed
        self.last = b""  # its content when its last name went
        self.changed_ns = None  # when a file that was there to begin with was changed


class Disk:
    """Follows the file events below the folder root; see FileEvents. All that is there to begin with is saved."""

    def __init__(self, root):
        self.root = os.path.realpath(root)
        self.names, self.saved = {self.root: Node(is_folder=True)}, {}  # path -> Node: as seen now, and on the disk
        self.pending = []  # changes of names that no fsync has saved: {path: Node, or None where it went}
        for folder, folders, names in os.walk(self.root):
            for name in folders:
                self.names[os.path.join(folder, name)] = Node(is_folder=True)
            for name in names:
                path = os.path.join(folder, name)
                self.names[path] = node = Node()
                node.saved, node.changed_ns = _content(path), os.stat(path).st_mtime_ns
        self.saved = dict(self.names)

    def content_of(self, path):
        """The content of a file that is about to lose this name, should it be its last."""
        node = self.names.get(path)
        return _content(path) if node and not node.is_folder and os.path.exists(path) else b""

    def note(self, changes, kept=b""):
        """Names change: {path: Node, or None}. kept: the content of the Node that had the last of these names."""
        for path, node in changes.items():
            before = self.names.pop(path, None)
            if before:
                before.last = kept
            if node:
                self.names[path] = node
        self.pending.append(changes)

    def opened(self, path, new):
        """A file is open; its Node."""
        if new:
            self.note({path: Node()})
        return self.names[path]

    def renamed(self, source, target, kept):
        self.note({target: self.names[source], source: None}, kept)
        self.names[target].last = b""

    def linked(self, source, target, kept):
        self.note({target: self.names[source]}, kept)

    def unlinked(self, path, kept):
        self.note({path: None}, kept)

    def made(self, path, kept):
        self.note({path: Node(is_folder=True)})

    def synced(self, node):
        """A file, or a folder, is flushed."""
        path = next((path for path, other in self.names.items() if other is node), None)
        if not node.is_folder:
            node.saved = _content(path) if path else node.last
            return
        # A change of names in two folders is one change, and comes after all earlier ones in both.
        folders, saved = {path}, []
        for changes in reversed(self.pending):
            touched = {os.path.dirname(name) for name in changes}
            if folders & touched:
                folders |= touched
                saved.append(changes)
        self._save(reversed(saved))

    def _save(self, all_changes):
        for changes in list(all_changes):
            self.pending = [other for other in self.pending if other is not changes]
            for path, node in changes.items():
                self.saved.pop(path, None)
                if node:
                    self.saved[path] = node

    def cut(self, target, rng=None):
        """Write to the new folder target what a power cut leaves; with rng, also a random part of what was not flushed.

        Then a random number of the oldest changes of names is saved, and a random part of each file's new content: it
        may be whole, cut off, or zeros from some byte on, as file systems that allocate late leave it.
        """
        if rng:
            self._save(self.pending[: rng.randint(0, len(self.pending))])
        REAL["mkdir"](target)
        present = {self.root}
        for path, node in sorted(self.saved.items(), key=lambda item: item[0].count(os.sep)):
            place = target + path[len(self.root) :]
            if path == self.root or os.path.dirname(path) not in present:
                continue
            if node.is_folder:
                present.add(path)
                REAL["mkdir"](place)
                continue
            with REAL_OPEN(place, "wb") as file:
                file.write(self._content_after(node, rng))
            if node.changed_ns:
                os.utime(place, ns=(node.changed_ns, node.changed_ns))

    def _content_after(self, node, rng):
        if rng is None or rng.random() < 0.3:
            return node.saved
        path = next((path for path, other in self.names.items() if other is node), None)
        now = _content(path) if path and os.path.exists(path) else node.last
        first = next((i for i, pair in enumerate(zip(node.saved, now, strict=False)) if pair[0] != pair[1]), None)
        same = min(len(node.saved), len(now)) if first is None else first  # bytes that were flushed as they are now
        end = rng.randint(same, max(same, len(now)))
        return now[:end] + b"\0" * ((len(now) - end) * rng.randint(0, 1))


def _content(path):
    with REAL_OPEN(path, "rb") as file:
        return file.read()
