"""Random verbs on a volume and on a model of plain Python objects: same outcomes, same trees.

The model knows nothing of keys and transactions; what it says of links, times, listings and refusals is written down
anew. After every step the inodes that the step touched are compared, and now and then everything.
"""

from __future__ import annotations

import asyncio
import stat
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from namespaces import DIRECTORY, FILE, INLINE_LIMIT, ROOT, SESSION, SYMLINK, Files, new_engine

from metaserver import wire
from metaserver.errors import Refused
from metaserver.namespace import reap_session
from metaserver.wire import ErrorCode, InodeFlag

NAMES = st.sampled_from([b"a", b"b", b"c"])
#: Which of the nodes there are; modulo their number, the latest first, so that shrinking finds small trees.
WHICH = st.integers(0, 12)
#: A place in a directory: one that is taken, one in a directory that there is, or one in any node that ever was.
PLACE = st.tuples(st.sampled_from(["taken", "taken", "directory", "directory", "any"]), WHICH, NAMES)
TAKEN = st.tuples(st.just("taken"), WHICH, NAMES)
GOOD = st.tuples(st.sampled_from(["taken", "directory"]), WHICH, NAMES)
Place = tuple[str, int, bytes]


@dataclass(eq=False)
class Node:
    """An inode of the model."""

    mode: int
    ino: int
    mtime: int
    ctime: int
    nlink: int = 1
    data: bytes = b""
    parent: Node | None = None
    entries: dict[bytes, Node] = field(default_factory=dict)
    xattrs: dict[bytes, bytes] = field(default_factory=dict)

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(self.mode)

    def changed(self, now: int, modified: bool = False) -> None:
        self.ctime = now
        self.mtime = now if modified else self.mtime

    def matches(self, attributes: wire.Attributes) -> None:
        size = 0 if self.is_directory else len(self.data)
        times = (attributes.mtime_ns, attributes.ctime_ns)
        assert (attributes.ino, attributes.mode, attributes.nlink) == (self.ino, self.mode, self.nlink)
        assert (attributes.size, times) == (size, (self.mtime, self.ctime))
        assert bool(attributes.flags & InodeFlag.HAS_XATTRS) == bool(self.xattrs)


class Model:
    """The whole tree; its verbs raise :exc:`Refused` as the namespace should."""

    def __init__(self) -> None:
        self.root = Node(DIRECTORY, ROOT, 1000, 1000, 2)
        self.nodes = [self.root]

    def directory(self, node: Node) -> Node:
        if node not in self.nodes:
            raise Refused(ErrorCode.NOT_FOUND)
        if not node.is_directory:
            raise Refused(ErrorCode.NOT_A_DIRECTORY)
        if node.nlink == 0:
            raise Refused(ErrorCode.NOT_FOUND)
        return node

    def make(self, now: int, parent: Node, name: bytes, mode: int, target: bytes) -> list[Node]:
        if name in self.directory(parent).entries:
            raise Refused(ErrorCode.EXISTS)
        node = Node(mode, 0, now, now, 2 if stat.S_ISDIR(mode) else 1, target)
        self._enter(now, parent, name, node)
        parent.nlink += node.is_directory
        self.nodes.append(node)
        return [node, parent]

    def link(self, now: int, node: Node, parent: Node, name: bytes) -> list[Node]:
        if node not in self.nodes:
            raise Refused(ErrorCode.NOT_FOUND)
        self.directory(parent)
        if node.is_directory:
            raise Refused(ErrorCode.NOT_PERMITTED)
        if node.nlink == 0:
            raise Refused(ErrorCode.NOT_FOUND)
        if name in parent.entries:
            raise Refused(ErrorCode.EXISTS)
        node.nlink += 1
        node.changed(now)
        self._enter(now, parent, name, node)
        return [node, parent]

    def remove(self, now: int, parent: Node, name: bytes, directory: bool) -> list[Node]:
        node = self.directory(parent).entries.get(name)
        if node is None:
            raise Refused(ErrorCode.NOT_FOUND)
        if node.is_directory != directory:
            raise Refused(ErrorCode.NOT_A_DIRECTORY if directory else ErrorCode.IS_A_DIRECTORY)
        if node.entries:
            raise Refused(ErrorCode.NOT_EMPTY)
        del parent.entries[name]
        parent.changed(now, True)
        self._unlinked(now, node, parent)
        return [node, parent]

    def rename(
        self, now: int, old: Node, name: bytes, new: Node, new_name: bytes, no_replace: bool, exchange: bool
    ) -> list[Node]:
        if no_replace and exchange:
            raise Refused(ErrorCode.INVALID)
        node = self.directory(old).entries.get(name)
        target = self.directory(new).entries.get(new_name)
        if node is None or (exchange and target is None):
            raise Refused(ErrorCode.NOT_FOUND)
        if no_replace and target:
            raise Refused(ErrorCode.EXISTS)
        if node is target:
            return [node, old, new]
        self._check_loop(node, new)
        if exchange:
            assert target is not None
            self._check_loop(target, old)
        elif target:
            self._check_replace(node, target)
        if exchange and target:
            self._enter(now, old, name, target)
            self._reparent(now, target, new, old)
        else:
            del old.entries[name]
            old.changed(now, True)
        self._enter(now, new, new_name, node)
        self._reparent(now, node, old, new)
        if target and not exchange:
            self._unlinked(now, target, new)
        return [node, old, new, target] if target else [node, old, new]

    def _check_loop(self, node: Node, into: Node) -> None:
        above: Node | None = into
        while above is not None:
            if above is node:
                raise Refused(ErrorCode.INVALID)
            above = above.parent

    def _check_replace(self, node: Node, target: Node) -> None:
        if node.is_directory and not target.is_directory:
            raise Refused(ErrorCode.NOT_A_DIRECTORY)
        if target.is_directory and not node.is_directory:
            raise Refused(ErrorCode.IS_A_DIRECTORY)
        if target.entries:
            raise Refused(ErrorCode.NOT_EMPTY)

    def _enter(self, now: int, parent: Node, name: bytes, node: Node) -> None:
        parent.entries[name] = node
        parent.changed(now, True)
        if node.is_directory:
            node.parent = parent

    def _reparent(self, now: int, node: Node, old: Node, new: Node) -> None:
        node.changed(now)
        if node.is_directory:
            old.nlink -= 1
            new.nlink += 1

    def _unlinked(self, now: int, node: Node, parent: Node) -> None:
        parent.nlink -= node.is_directory
        node.nlink = 0 if node.is_directory else node.nlink - 1
        node.changed(now)

    def write(self, now: int, node: Node, offset: int, data: bytes) -> list[Node]:
        self._regular(node)
        if offset + len(data) > INLINE_LIMIT:
            raise Refused(ErrorCode.TOO_LARGE)
        if data:
            end = offset + len(data)
            node.data = node.data[:offset].ljust(offset, b"\0") + data + node.data[end:]
            node.changed(now, True)
        return [node]

    def resize(self, now: int, node: Node, size: int) -> list[Node]:
        self._regular(node)
        node.data = node.data[:size].ljust(size, b"\0")
        node.changed(now, True)
        return [node]

    def _regular(self, node: Node) -> None:
        if node not in self.nodes:
            raise Refused(ErrorCode.NOT_FOUND)
        if not stat.S_ISREG(node.mode):
            raise Refused(ErrorCode.IS_A_DIRECTORY if node.is_directory else ErrorCode.INVALID)

    def set_xattr(self, now: int, node: Node, name: bytes, value: bytes, create: bool, replace: bool) -> list[Node]:
        if node not in self.nodes:
            raise Refused(ErrorCode.NOT_FOUND)
        if create and name in node.xattrs:
            raise Refused(ErrorCode.XATTR_EXISTS)
        if replace and name not in node.xattrs:
            raise Refused(ErrorCode.NO_XATTR)
        node.xattrs[name] = value
        node.changed(now)
        return [node]

    def remove_xattr(self, now: int, node: Node, name: bytes) -> list[Node]:
        if node not in self.nodes:
            raise Refused(ErrorCode.NOT_FOUND)
        if node.xattrs.pop(name, None) is None:
            raise Refused(ErrorCode.NO_XATTR)
        node.changed(now)
        return [node]

    def reap(self, nodes: list[Node]) -> None:
        self.nodes = [node for node in self.nodes if node not in nodes or node.nlink]


class Namespace(RuleBasedStateMachine):
    """The namespace on the in-memory engine, step by step with the model."""

    engine = "memory"

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.directory = tempfile.TemporaryDirectory(prefix="bpfuse-test-")
        self.model = Model()
        #: All nodes that ever were, so that the deleted ones are asked for, too.
        self.ever = [self.model.root]

    @initialize()
    def create(self) -> None:
        engine = new_engine(self.engine, Path(self.directory.name))
        self.fs: Files = self.runner.run(Files.create(engine))
        for mode in (DIRECTORY, FILE, DIRECTORY):
            self.make(("directory", 0, b"a"), mode)
            self.make(("directory", 0, b"b"), mode)

    def teardown(self) -> None:
        with self.directory, self.runner:
            try:
                self.runner.run(self.compare_all())
            finally:
                self.runner.run(self.fs.engine.close())

    def node(self, which: int) -> Node:
        return self.ever[-1 - which % len(self.ever)]

    def place(self, place: Place) -> tuple[Node, bytes]:
        kind, which, name = place
        directories = [node for node in self.model.nodes if node.is_directory and node.nlink]
        taken = [(node, name) for node in directories for name in node.entries]
        if kind == "taken" and taken:
            return taken[-1 - which % len(taken)]
        return (self.node(which) if kind == "any" else directories[-1 - which % len(directories)]), name

    def step(self, request: wire.Request, verb: Any, *arguments: Any) -> None:
        """Do a request and the model's verb; both succeed with the same inodes, or are refused alike."""
        try:
            nodes: list[Node] | None = verb(self.fs.now + 1, *arguments)
            code = None
        except Refused as refusal:
            nodes, code = None, refusal.code
        if nodes is None:
            with pytest.raises(Refused) as refused:
                self.runner.run(self.fs.change(request))
            assert refused.value.code is code, f"{request}: {refused.value}"
            return
        reply = self.runner.run(self.fs.change(request))
        unique = list(dict.fromkeys(nodes))
        if isinstance(request, wire.MakeNode):
            unique[0].ino = reply.attributes[0].ino
            self.ever.append(unique[0])
        assert len(reply.attributes) == len(unique)
        for node, attributes in zip(unique, reply.attributes, strict=True):
            node.matches(attributes)

    @rule(place=PLACE, mode=st.sampled_from([FILE, DIRECTORY, DIRECTORY, SYMLINK]))
    def make(self, place: Place, mode: int) -> None:
        parent, name = self.place(place)
        target = b"to " + name if mode == SYMLINK else None
        request = wire.MakeNode(parent.ino, name, mode, 0, 0, target=target)
        self.step(request, self.model.make, parent, name, mode, target or b"")

    @rule(which=WHICH, place=PLACE)
    def link(self, which: int, place: Place) -> None:
        node, (parent, name) = self.node(which), self.place(place)
        self.step(wire.Link(node.ino, parent.ino, name), self.model.link, node, parent, name)

    @rule(place=PLACE, directory=st.booleans())
    def remove(self, place: Place, directory: bool) -> None:
        parent, name = self.place(place)
        self.step(wire.Remove(parent.ino, name, directory), self.model.remove, parent, name, directory)

    @rule(place=PLACE, new_place=PLACE, flags=st.sampled_from(["", "n", "x", "nx"]))
    def rename(self, place: Place, new_place: Place, flags: str) -> None:
        (old, name), (new, new_name) = self.place(place), self.place(new_place)
        no_replace, exchange = "n" in flags, "x" in flags
        request = wire.Rename(old.ino, name, new.ino, new_name, no_replace, exchange)
        self.step(request, self.model.rename, old, name, new, new_name, no_replace, exchange)

    @rule(place=TAKEN, new_place=GOOD)
    def rename_what_there_is(self, place: Place, new_place: Place) -> None:
        self.rename(place, new_place, "")

    @rule(place=TAKEN, new_place=TAKEN)
    def exchange(self, place: Place, new_place: Place) -> None:
        self.rename(place, new_place, "x")

    @rule(place=GOOD, mode=st.sampled_from([FILE, DIRECTORY]))
    def make_more(self, place: Place, mode: int) -> None:
        self.make(place, mode)

    @rule(which=WHICH, offset=st.sampled_from([0, 1, 10, INLINE_LIMIT - 3]), data=st.binary(max_size=6))
    def write(self, which: int, offset: int, data: bytes) -> None:
        node = self.node(which)
        self.step(wire.WriteInline(node.ino, offset, data), self.model.write, node, offset, data)

    @rule(which=WHICH, size=st.sampled_from([0, 1, 5, 20, 2 * INLINE_LIMIT]))
    def resize(self, which: int, size: int) -> None:
        node = self.node(which)
        self.step(wire.SetAttributes(node.ino, size=size), self.model.resize, node, size)

    @rule(which=WHICH, name=NAMES, value=st.binary(max_size=3), flags=st.sampled_from(["", "c", "r", "cr"]))
    def set_xattr(self, which: int, name: bytes, value: bytes, flags: str) -> None:
        node, name = self.node(which), b"user." + name
        create, replace = "c" in flags, "r" in flags
        request = wire.SetXattr(node.ino, name, value, create, replace)
        self.step(request, self.model.set_xattr, node, name, value, create, replace)

    @rule(which=WHICH, name=NAMES)
    def remove_xattr(self, which: int, name: bytes) -> None:
        node, name = self.node(which), b"user." + name
        self.step(wire.RemoveXattr(node.ino, name), self.model.remove_xattr, node, name)

    @rule(which=st.lists(WHICH, min_size=1, max_size=5))
    def reap(self, which: list[int]) -> None:
        nodes = [self.node(each) for each in which]
        self.runner.run(self.fs.call(wire.Reap([node.ino for node in nodes]), wire.Done))
        self.model.reap(nodes)

    @rule()
    def end_session(self) -> None:
        while self.runner.run(self.fs.engine.write(lambda txn: reap_session(txn, self.fs.volume, SESSION))):
            pass
        self.model.reap(self.model.nodes)

    @rule()
    def sweep(self) -> None:
        self.runner.run(self.fs.sweep())

    @rule(which=WHICH)
    def compare(self, which: int) -> None:
        self.runner.run(self.compare_node(self.node(which)))

    @invariant()
    def stored_fits_together(self) -> None:
        if self.engine == "memory":
            self.runner.run(self.fs.check())

    async def compare_all(self) -> None:
        await self.fs.check()
        for node in self.ever:
            await self.compare_node(node)
        figures = await self.fs.call(wire.GetStatistics(), wire.Statistics)
        files = [node for node in self.model.nodes if stat.S_ISREG(node.mode)]
        assert (figures.inodes, figures.bytes) == (len(self.model.nodes), sum(len(node.data) for node in files))

    async def compare_node(self, node: Node) -> None:
        if node not in self.model.nodes:
            await self.fs.refused(ErrorCode.NOT_FOUND, wire.GetAttributes(node.ino))
            return
        node.matches(await self.fs.stat(node.ino))
        names = (await self.fs.call(wire.ListXattrs(node.ino), wire.XattrNames)).names
        assert names == sorted(node.xattrs)
        for name in names:
            assert (await self.fs.call(wire.GetXattr(node.ino, name), wire.XattrIs)).value == node.xattrs[name]
        if stat.S_ISREG(node.mode):
            assert await self.fs.read(node.ino) == node.data
        elif stat.S_ISLNK(node.mode):
            assert (await self.fs.call(wire.ReadLink(node.ino), wire.TargetIs)).target == node.data
        else:
            await self.compare_listing(node)

    async def compare_listing(self, node: Node) -> None:
        (page,) = await self.fs.fetch(node.ino, data_limit=2 * INLINE_LIMIT)
        assert [entry.name for entry in page.entries] == list(node.entries)
        for entry in page.entries:
            child = node.entries[entry.name]
            child.matches(entry.attributes)
            assert entry.data == (None if child.is_directory else child.data)
            found = await self.fs.call(wire.Lookup(node.ino, entry.name), wire.Found)
            assert found == wire.Found(entry.attributes, entry.cookie)


class LmdbNamespace(Namespace):
    """The same on LMDB."""

    engine = "lmdb"


#: Without the phase that explains a failure, which takes longer than all others.
PHASES = (Phase.explicit, Phase.generate, Phase.shrink)

TestNamespace = Namespace.TestCase
TestNamespace.settings = settings(
    max_examples=200, stateful_step_count=50, deadline=None, derandomize=True, phases=PHASES
)

TestLmdbNamespace = LmdbNamespace.TestCase
TestLmdbNamespace.settings = settings(
    max_examples=15,
    stateful_step_count=50,
    deadline=None,
    derandomize=True,
    phases=PHASES,
    suppress_health_check=[HealthCheck.too_slow],
)
