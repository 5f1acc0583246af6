"""Directories of which every name is known: against a model that may forget, but not err."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fuseclient.worker.whole import WholeDirectories

_names = st.sampled_from([b"a", b"b", b"c", b"d"])
_inos = st.integers(1, 3)
_steps = st.lists(
    st.one_of(
        st.tuples(st.just("know"), _inos, st.sets(_names)),
        st.tuples(st.sampled_from(["named", "unnamed", "forget"]), _inos, _names),
        st.tuples(st.just("clear"), _inos, _names),
    ),
    max_size=40,
)


@given(_steps, st.integers(0, 6))
def test_what_is_said_to_lack_a_name_lacks_it(steps: list[tuple[str, int, set[bytes] | bytes]], most: int) -> None:
    whole, model = WholeDirectories(most), dict[int, set[bytes]]()
    for what, ino, argument in steps:
        if isinstance(argument, set):
            whole.know(ino, dict.fromkeys(argument, ino))
            model[ino] = set(argument)
        elif what == "named":
            whole.named(ino, argument, ino)
            model.get(ino, set()).add(argument)
        elif what == "unnamed":
            whole.unnamed(ino, argument)
            model.get(ino, set()).discard(argument)
        elif what == "forget":
            whole.forget(ino)
            model.pop(ino, None)
        else:
            whole.clear()
            model.clear()
        for each in (1, 2, 3):
            for name in (b"a", b"b", b"c", b"d"):
                assert whole.find(each, name) in ((each, None) if name in model.get(each, ()) else (None,))
                if whole.lacks(each, name):
                    assert name not in model[each]
                elif most == 6 and each in model and sum(map(len, model.values())) < most:
                    assert name in model[each] or not whole.lacks(each, name)
        assert whole._count == sum(map(len, whole._known.values())) <= most


def test_the_directories_used_last_are_kept() -> None:
    whole = WholeDirectories(4)
    for ino in (1, 2):
        whole.know(ino, {b"x": 1, b"y": 2})
    assert whole.lacks(1, b"z")
    whole.know(3, {b"x": 1})
    assert whole.lacks(1, b"z")
    assert not whole.lacks(2, b"z")
    assert whole.lacks(3, b"z")
