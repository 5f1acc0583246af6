"""What the benchmarks make of their samples: medians, ratios, tables, plots, and the parts of the documentation."""

from __future__ import annotations

import json
import subprocess
import time
import zipfile
from pathlib import Path

import pytest

from bench import check, peers, profile, workloads
from bench.comparison import NAME, Comparison, Measured, compare
from bench.peers.local import Ext4, Passthrough
from bench.peers.own import Bpfuse
from bench.report import documents, markdown, plots, reasons, targets
from bench.results import Figure, Result, Samples
from bench.workloads import fio, sources, stale_reads
from bench.workloads.base import Scale, Turn, Workload
from fuseclient.bench import works
from fuseclient.bench.directories import Size, measure
from fuseclient.bench.figures import Figures, show
from fuseclient.bench.timing import share, timed
from fuseclient.errors import UserError


def comparison() -> Comparison:
    figures = Figures()
    for value in (30.0, 10.0, 20.0):
        figures.add("create 4 KiB", "bpfuse", value, "us")
        figures.add("create 4 KiB", "ext4", value / 4, "us")
        figures.add("create 4 KiB", "juicefs", value * 8, "us")
        figures.add("first epoch, 0 workers", "bpfuse", value * 100, "samples/s")
        figures.add("first epoch, 0 workers", "juicefs", value * 50, "samples/s")
    systems = {name: {"version": "1", "durability": "none"} for name in ("ext4", "bpfuse", "juicefs")}
    machine = {"cpus": "2 x CPU", "memory": "4 GiB", "kernel": "Linux", "python": "3", "commit": "abc"}
    scale = {"files": 3, "images": 3}
    measured = Measured("small", "small files", "2026-01-01 10:00", machine, 3, scale, systems, ["lustre"])
    measured.figures, measured.failed = figures, {"seaweedfs": "it broke"}
    return Comparison([measured])


def test_the_median_and_the_spread() -> None:
    row = comparison().figures()["small"].rows["create 4 KiB"]
    found = row.summary("bpfuse")
    assert found is not None
    assert (found.median, found.low, found.high, found.rounds) == (20.0, 10.0, 30.0, 3)
    assert row.summary("seaweedfs") is None


def test_a_ratio_says_how_many_times_as_fast_whatever_the_unit() -> None:
    rows = comparison().figures()["small"].rows
    assert rows["create 4 KiB"].speed("bpfuse", "ext4") == pytest.approx(0.25)
    assert rows["create 4 KiB"].speed("bpfuse", "juicefs") == pytest.approx(8.0)
    assert rows["first epoch, 0 workers"].speed("bpfuse", "juicefs") == pytest.approx(2.0)
    assert rows["first epoch, 0 workers"].speed("bpfuse", "ext4") is None


def test_what_cannot_be_a_figure_is_refused() -> None:
    figures = Figures()
    figures.add("read", "ext4", 1.0, "us")
    with pytest.raises(ValueError, match="is in us"):
        figures.add("read", "ext4", 1.0, "ms")
    with pytest.raises(ValueError, match="nan"):
        figures.add("read", "ext4", float("nan"), "us")


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (0.0123, "0.012"), (1.234, "1.23"), (45.67, "45.7"), (1234.5, "1,234")]
)
def test_three_digits_are_shown(value: float, text: str) -> None:
    assert show(value) == text


def test_a_comparison_is_read_as_it_was_written(tmp_path: Path) -> None:
    comparison().write(tmp_path)
    read = Comparison.read(tmp_path / NAME)
    assert markdown.whole(read) == markdown.whole(comparison())
    assert read.workloads[0].scale == {"files": 3, "images": 3}


def test_a_workload_that_is_measured_anew_replaces_only_itself() -> None:
    known, trees = comparison(), comparison().workloads[0]
    trees.name, trees.date, trees.rounds = "trees", "2026-01-02 10:00", 5
    trees.machine = trees.machine | {"commit": "def"}
    order = ["trees", "small"]
    known.add(trees, order)
    assert [each.name for each in known.workloads] == order
    anew = comparison().workloads[0]
    anew.figures = Figures()
    known.add(anew, order)
    assert [each.name for each in known.workloads] == order
    assert not known.figures()["small"].rows
    assert known.figures()["trees"].rows
    text = markdown.about(known)
    assert "2026-01-01 10:00 to 2026-01-02 10:00 at commit def, abc on 2 x CPU, 4 GiB, Linux; 3 to 5 rounds" in text


class _Breaking(Workload):
    """What can go wrong in a turn."""

    name = "breaking"
    about = "breaks"
    turn_limit_s = 0.2

    def turn(self, turn: Turn) -> None:
        if turn.kind is Ext4:
            time.sleep(60)
        if turn.kind is Passthrough:
            raise KeyError("a mistake")
        turn.wrong.append("it is wrong")
        turn.time("nothing", 1.0)


class _Unprepared(_Breaking):
    name = "unprepared"

    def prepare(self) -> None:
        raise RuntimeError("no sources")


def test_a_turn_that_hangs_or_breaks_is_named_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BPFUSE_RUNTIME_DIR", str(tmp_path))
    kinds = [Ext4, Passthrough, Bpfuse]
    monkeypatch.setattr(Passthrough, "version", classmethod(lambda _: "1"))
    found = compare([_Unprepared, _Breaking], kinds, 2, Scale(), tmp_path)
    (measured,) = found.workloads
    assert measured.failed == {"ext4": "it took more than 0 s", "passthrough": "KeyError: 'a mistake'"}
    assert measured.figures.rows["nothing"].values == {"bpfuse": [1e3, 1e3]}
    assert {name: len(turns) for name, turns in measured.turns_s.items()} == {"ext4": 1, "passthrough": 1, "bpfuse": 2}
    assert measured.wrong == {"bpfuse": ["it is wrong", "it is wrong"]}
    read = Comparison.read(tmp_path / NAME)
    assert (read.workloads[0].failed, read.workloads[0].wrong) == (measured.failed, measured.wrong)
    assert "bpfuse was wrong in 2 of 2 rounds" in markdown.whole(read)


def test_rounds_end_when_their_time_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BPFUSE_RUNTIME_DIR", str(tmp_path))
    (measured,) = compare([_Breaking], [Bpfuse], 7, Scale(), tmp_path, limit_s=0).workloads
    assert measured.rounds == 1
    assert measured.figures.rows["nothing"].values == {"bpfuse": [1e3]}


def test_the_table_has_a_column_a_system_and_marks_losses() -> None:
    lines = markdown.table(comparison().figures()["small"].rows.values(), comparison())
    assert lines[0] == "|  | ext4 | bpfuse | juicefs | to ext4 | to JuiceFS |"
    assert lines[2] == "| create 4 KiB, us | 5.00 (2.50-7.50) | 20.0 (10.0-30.0) | 160 (80.0-240) | **0.250** | 8.00 |"
    assert lines[3].endswith("| 1,000 (500-1,500) |  | 2.00 |")


def test_the_whole_names_what_is_missing_and_what_failed() -> None:
    text = markdown.whole(comparison())
    assert "Left out: lustre." in text
    assert "seaweedfs did not come through: it broke" in text


def _slow_reads() -> Comparison:
    slow = comparison()
    for name, speed in (("read 4 KiB shuffled, cold", 9.0), ("read 4 KiB shuffled, warm", 5.0), ("delete", 0.5)):
        slow.workloads[0].figures.add(name, "bpfuse", 10.0, "us")
        slow.workloads[0].figures.add(name, "juicefs", 10.0 * speed, "us")
    return slow


def test_rows_are_judged_by_their_targets() -> None:
    missed = {(each.row, each.target.least): each.speed for each in targets.missed(_slow_reads())}
    assert missed == {("delete", 1.0): 0.5, ("read 4 KiB shuffled, warm", 8.0): 5.0}
    text = markdown.whole(_slow_reads())
    assert (
        "| 8 times as fast as juicefs at reading small files | 1 of 2 | small: read 4 KiB shuffled, warm, 5.00 |"
        in text
    )
    assert "- small: delete: 0.500 of juicefs\n" in text
    assert "- small: read 4 KiB shuffled, warm: 5.00 of juicefs (8.00 is wanted)\n" in text
    assert markdown.verdict(_slow_reads()).startswith("bpfuse is faster than every peer in 4 of 5 rows of small.")


def test_what_is_on_disk_as_late_is_judged_by_itself() -> None:
    slow = _slow_reads()
    slow.workloads[0].figures.add("delete", "bpfuse interval", 4.0, "us")
    text = markdown.whole(slow)
    assert "| faster than juicefs at changes of like durability | 1 of 1 | small: delete, 1.25 |" in text
    assert "bpfuse interval, whose changes are on disk as late as theirs, in 1 of the 1 rows" in markdown.verdict(slow)
    slow.workloads[0].figures.add("mkdir", "bpfuse interval", 4.0, "us")
    slow.workloads[0].figures.add("mkdir", "juicefs", 1.0, "us")
    assert "0.250 of juicefs by bpfuse interval\n" in markdown.whole(slow)


def test_what_ext4_does_not_reach_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reasons, "REASONS", ())
    slow = _slow_reads()
    slow.workloads[0].figures.add("read 4 KiB shuffled, warm", "ext4", 8.0, "us")
    lines = markdown.misses(list(targets.judge(slow)))
    told = "Not even ext4 is so many times as fast as juicefs there:"
    assert lines[lines.index(told) + 2] == "- small: read 4 KiB shuffled, warm: 5.00 of juicefs (8.00 is wanted)"
    assert lines[lines.index("Why is not known yet:") + 2] == "- small: delete: 0.500 of juicefs"


def test_a_reason_is_told_once_for_its_rows_and_its_want_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reasons, "REASONS", (reasons.Reason("small", "delete", "juicefs", "A commit is synced."),))
    lines = markdown.misses(list(targets.judge(_slow_reads())))
    assert lines == [
        "A commit is synced.",
        "",
        "- small: delete: 0.500 of juicefs",
        "",
        "Why is not known yet:",
        "",
        "- small: read 4 KiB shuffled, warm: 5.00 of juicefs (8.00 is wanted)",
    ]
    assert reasons.reason("small", "delete, 4 processes", "juicefs") is None


def test_the_documents_are_written_between_their_marks(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    readme = tmp_path / "README.md"
    readme.write_text(
        "before\n<!-- made by make bench-readme: begin -->\nold\n<!-- made by make bench-readme: end -->\nafter\n"
    )
    documents.write(comparison(), tmp_path)
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| create 4 KiB, us |" in text
    assert "## small" in (tmp_path / "docs" / "benchmarks.md").read_text()
    assert (tmp_path / "docs" / "benchmarks.png").read_bytes().startswith(b"\x89PNG")
    documents.write(comparison(), tmp_path)
    assert readme.read_text() == text


def test_a_readme_without_the_marks_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("nothing")
    with pytest.raises(ValueError, match="no place"):
        documents.write(comparison(), tmp_path)
    assert (tmp_path / "README.md").read_text() == "nothing"


def test_a_plot_of_each_workload(tmp_path: Path) -> None:
    assert plots.draw_all(comparison(), tmp_path) == [tmp_path / "small.png"]


def test_rows_that_grow_become_curves(tmp_path: Path) -> None:
    measured = comparison()
    rows = Figures()
    for number in (1, 10, 100):
        rows.add(f"create | files={number}", "bpfuse", 5.0 * number, "us")
    measured.workloads[0].figures = rows
    assert plots.draw_all(measured, tmp_path) == [tmp_path / "small.png"]


def test_what_readme_shows_is_measured() -> None:
    assert set(documents.CHOSEN) <= {each.name for each in workloads.ALL}


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match="there are ext4"):
        peers.choose(["ext5"])
    with pytest.raises(ValueError, match="there are small"):
        workloads.choose(["big"])


def test_works_are_shared_whole_and_in_order() -> None:
    items = [str(number) for number in range(10)]
    parts = share(items, 4)
    assert [each for part in parts for each in part] == items
    assert {len(part) for part in parts} == {2, 3}


def test_files_that_are_timed_hold_what_they_should(tmp_path: Path) -> None:
    paths = works.paths(tmp_path, 8, 2)
    assert len({Path(path).parent for path in paths}) == 2
    assert len(timed("create_files", [{"paths": part, "size": 100} for part in share(paths, 2)])) == 1
    assert all(0 < each < 60 for each in timed("read_files", [{"paths": paths, "size": 100}], passes=2))
    Path(paths[3]).write_bytes(works.content(4, 100))
    with pytest.raises(UserError, match=r"wrong content in .*f3"):
        timed("read_files", [{"paths": paths, "size": 100}])


def test_a_wrong_page_of_a_large_file_is_found(tmp_path: Path) -> None:
    path = tmp_path / "large"
    works.write_large(str(path), 3 << 20)
    works.read_large(str(path), 3 << 20)
    works.read_at_random(str(path), 100)
    with path.open("r+b") as file:
        file.seek(2 << 20)
        file.write(b"x")
    with pytest.raises(works.Wrong, match="near 2097152"):
        works.read_large(str(path), 3 << 20)


def _fio(*jobs: dict[str, object]) -> str:
    return "a line of fio's own\n" + json.dumps({"jobs": jobs})


def test_fio_is_understood_in_the_direction_that_a_job_is_about() -> None:
    none = {"io_bytes": 0, "total_ios": 0, "bw_bytes": 0, "iops": 0.0}
    way = {"io_bytes": 8192, "total_ios": 2, "bw_bytes": 100, "iops": 7.5}
    jobs = list(
        fio.parse(
            _fio(
                {"jobname": "read", "error": 0, "read": way, "write": none},
                {"jobname": "write, then compare", "error": 0, "read": way, "write": way | {"iops": 1.5}},
            )
        )
    )
    assert jobs == [fio.Job("read", 100, 7.5, 4096), fio.Job("write, then compare", 100, 1.5, 4096)]


def test_a_failed_job_of_fio_is_no_figure() -> None:
    with pytest.raises(RuntimeError, match="read ended with error 84"):
        list(fio.parse(_fio({"jobname": "read", "error": 84})))


def test_the_job_files_name_each_job_once() -> None:
    names = [
        line for path in sorted(fio.JOBS.glob("*.fio")) for line in path.read_text().splitlines() if line[:1] == "["
    ]
    jobs = [name for name in names if name != "[global]"]
    assert len(jobs) == len(set(jobs)) > 10
    assert {f"[{name}]" for name in documents.CHOSEN["fio"]} <= set(jobs)


def test_folded_stacks_become_a_table() -> None:
    samples = profile.parse_folded("main (a.py:1);work (a.py:5) 3\nmain (a.py:2);work (a.py:7) 2\nmain (a.py:2) 1\n")
    assert profile.by_function(samples) == [("work (a.py)", 5, 5), ("main (a.py)", 1, 6)]


def test_a_ratio_that_got_worse_is_found() -> None:
    before = check.baseline_of(comparison())
    assert before["small: create 4 KiB"]["ext4"] == {"speed": 0.25, "tolerance": 0.4}
    assert list(check.falls(comparison(), before)) == []
    slower = comparison()
    row = slower.figures()["small"].rows["create 4 KiB"]
    row.values["bpfuse"] = [value * 2 for value in row.values["bpfuse"]]
    (fall,) = check.falls(slower, before)
    assert str(fall) == "small: create 4 KiB: 0.125 times as fast as ext4, at least 0.15 was to be"


def test_a_row_that_is_not_measured_is_no_pass() -> None:
    with pytest.raises(KeyError):
        list(check.falls(comparison(), {"small: stat": {"ext4": {"speed": 1.0, "tolerance": 0.4}}}))


def test_the_program_of_the_project_is_built_and_prints_what_it_should(tmp_path: Path) -> None:
    project = tmp_path / "project"
    sources.make_project(project, 3)
    subprocess.run(["make", "-s", "-C", project], check=True)
    assert subprocess.run([project / "program"], check=True, capture_output=True, text=True).stdout == (
        sources.program_output()
    )
    wheel = sources.make_wheel(tmp_path, 4)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    assert sources.check_wheel(wheel, tmp_path / "installed") == 5
    (tmp_path / "installed" / "benchtree" / "m1.py").write_text("")
    with pytest.raises(RuntimeError, match=r"m1\.py"):
        sources.check_wheel(wheel, tmp_path / "installed")


def test_directories_are_measured_in_turns_and_nothing_is_left(tmp_path: Path) -> None:
    directories = [str(tmp_path / name) for name in ("one", "two")]
    for each in directories:
        Path(each).mkdir()
    told = list[str]()
    figures = measure(directories, Size(20, 512, 2, 1 << 20), 1, told.append)
    assert told == [f"round 1 of 1: {each}" for each in directories]
    assert figures.systems() == directories
    assert figures.rows["read it"].more_is_better
    assert all(not list(Path(each).iterdir()) for each in directories)
    with pytest.raises(UserError, match="no such file"):
        measure([str(tmp_path / "none")], Size(), 1, told.append)


def test_versions_are_seen_whole_or_not_at_all(tmp_path: Path) -> None:
    path = str(tmp_path / "f0")
    stale_reads.write(path, 7)
    assert stale_reads.read(path) == 7
    Path(path).write_bytes(Path(path).read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="wrong content"):
        stale_reads.read(path)


def test_a_part_says_why_figures_miss_their_limits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    why = "Both commits are synced."
    monkeypatch.setattr(reasons, "REASONS", (reasons.Reason("engines", "create", "juicefs .*", why),))
    figures = [
        Figure("create", "bpfuse", "juicefs etcd", 1.5, "x", 1.0),
        Figure("create", "bpfuse", "juicefs mysql", 1.5, "x", 1.0),
        Figure("create", "bpfuse", "juicefs redis", 0.5, "x", 1.0),
        Figure("lookup", "bpfuse", "juicefs etcd", 1.5, "x", 1.0),
    ]
    result = Result("engines", 1, {}, Samples(), figures)
    assert [each for each in result.tables() if isinstance(each, str)] == [why]
    result.write(tmp_path)
    written = json.loads((tmp_path / "engines.json").read_text())["figures"]
    assert [each["reason"] for each in written] == [why, why, None, None]
