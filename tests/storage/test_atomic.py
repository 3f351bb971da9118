"""Nothing is torn, nothing of others goes, and of two at once one is told so."""

import errno
import os
import subprocess
import sys

import pytest

from mlx_moe.errors import InputError
from mlx_moe.storage import atomic, locks
from mlx_moe.storage.atomic import clean_leftovers, creating, new_folder, quarantine, replacing, signature, writing


def refusal(context):
    with pytest.raises(InputError) as caught, context:
        pytest.fail("the work began")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# Files


def test_a_file_takes_the_place_of_a_file(tmp_path):
    with replacing(tmp_path / "a.txt") as partial:
        partial.write_text("one")
    with replacing(tmp_path / "a.txt") as partial:
        partial.write_text("two")
        assert (tmp_path / "a.txt").read_text() == "one"
    assert (tmp_path / "a.txt").read_text() == "two"
    assert names(tmp_path) == ["a.txt"]


def test_a_file_never_takes_the_place_of_a_folder(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(IsADirectoryError), replacing(tmp_path / "a") as partial:
        partial.write_text("one")
    assert (tmp_path / "a").is_dir()


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "a.txt").write_text("one")
    (tmp_path / "link").symlink_to(tmp_path / "there" / "a.txt")
    with replacing(tmp_path / "link") as partial:
        partial.write_text("two")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "there" / "a.txt").read_text() == "two"


def test_an_error_leaves_what_was_there(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    with pytest.raises(ValueError, match="no"), replacing(tmp_path / "a.txt") as partial:  # noqa: PT012
        partial.write_text("two")
        raise ValueError("no")
    assert (tmp_path / "a.txt").read_text() == "one"
    assert names(tmp_path) == ["a.txt"]


def test_a_folder_for_a_file_means_the_file_in_it(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with writing(tmp_path, "report.html", "report") as partial:
        partial.write_text("page")
    assert names(tmp_path) == ["report.html", "thesis.txt"]


def test_only_what_we_wrote_is_written_over(tmp_path):
    place = tmp_path / "notes.html"
    place.write_text("precious")
    assert "was not written by this command" in refusal(writing(place, "report.html", "report"))
    assert place.read_text() == "precious"
    place.write_text(f"<!-- {signature('report')} -->")
    with writing(place, "report.html", "report") as partial:
        partial.write_text("page")
    assert place.read_text() == "page"


@pytest.mark.parametrize(
    "text",
    [
        "# My thesis\nThe table below was written by mlxmoe report, I then spent a week on it.\n",
        f"notes <!-- {signature('report')} -->",
        f"<!-- {signature('fit')} -->",
        f'{{"notes": "mine", "generator": "{signature("report")}"}}',
    ],
)
def test_what_only_mentions_us_is_somebodys(text, tmp_path):
    place = tmp_path / "notes.html"
    place.write_text(text)
    assert "was not written by this command" in refusal(writing(place, "report.html", "report"))
    assert place.read_text() == text


@pytest.mark.parametrize("name", ["fifo", "link to nothing", "file/below", "x" * 300, "nul\0byte"])
def test_odd_places_are_one_line_or_work(name, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "file").write_text("precious")
    (tmp_path / "link to nothing").symlink_to(tmp_path / "nothing")
    if name == "link to nothing":
        with writing(tmp_path / name, "report.html", "report") as partial:
            partial.write_text("page")
        assert (tmp_path / "nothing").read_text() == "page"
    else:
        refusal(writing(tmp_path / name, "report.html", "report"))
        assert names(tmp_path) == ["fifo", "file", "link to nothing"]


def test_folders_on_the_way_go_again_where_nothing_came_of_it(tmp_path):
    with pytest.raises(ValueError, match="no"), writing(tmp_path / "a" / "b" / "c.html", "c.html", "report"):
        raise ValueError("no")
    assert names(tmp_path) == []


# Folders


def test_a_folder_takes_the_place_of_nothing(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "full")
    (tmp_path / "file").write_text("precious")
    for name in ("full", "link", "file", "."):
        assert "exists already" in refusal(creating(tmp_path / name))
    (tmp_path / "empty").mkdir()
    with creating(tmp_path / "empty") as partial:
        (partial / "a").write_text("one")
    assert names(tmp_path / "empty") == ["a"]
    assert names(tmp_path) == ["empty", "file", "full", "link"]


def test_the_working_folder_is_not_replaced_under_the_shell(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in (".", "", tmp_path):
        assert "exists already" in refusal(creating(atomic.Path(path)))


def test_what_came_in_the_meantime_stays(tmp_path):
    with pytest.raises(FileExistsError), new_folder(tmp_path / "a") as partial:  # noqa: PT012
        (partial / "ours").write_text("ours")
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "theirs").write_text("theirs")
    assert names(tmp_path / "a") == ["theirs"]
    assert names(tmp_path) == ["a"]


def test_what_is_set_aside_replaces_nothing(tmp_path):
    for content in ("one", "two", "three"):
        (tmp_path / "a").write_text(content)
        quarantine(tmp_path / "a", "damaged")
    assert [(tmp_path / f"a.damaged{n}").read_text() for n in ("", "-2", "-3")] == ["one", "two", "three"]


# Two at once, and what a dead process leaves


def test_of_two_at_once_one_is_told(tmp_path):
    with creating(tmp_path / "a") as partial:
        (partial / "x").write_text("x")
        assert "another process is writing" in refusal(creating(tmp_path / "a"))
        with creating(tmp_path / "b"):
            pass
    with writing(tmp_path / "a.html", "a.html", "report") as partial:
        partial.write_text("page")
        assert "another process is writing" in refusal(writing(tmp_path / "a.html", "a.html", "report"))
    assert names(tmp_path) == ["a", "a.html", "b"]


KILLED = """
import os, sys
from pathlib import Path
from mlx_moe.storage.atomic import creating
with creating(Path(sys.argv[1])) as partial:
    (partial / "x").write_text("x")
    os.kill(os.getpid(), 9)
"""


def test_the_leftovers_of_a_killed_process_go_at_the_next_start(tmp_path):
    subprocess.run([sys.executable, "-c", KILLED, tmp_path / "a"], check=False)
    assert len(names(tmp_path)) == 2  # a scratch folder and a lock
    with creating(tmp_path / "a"):
        pass
    assert names(tmp_path) == ["a"]


def test_what_another_process_writes_is_no_leftover(tmp_path):
    with creating(tmp_path / "a") as partial:
        clean_leftovers(tmp_path)
        assert partial.is_dir()
        (partial / "x").write_text("x")
    assert names(tmp_path / "a") == ["x"]


def test_a_lock_ends_with_its_holder(tmp_path):
    with locks.holding(tmp_path / "a"), pytest.raises(locks.Busy), locks.holding(tmp_path / "a"):
        pass
    with locks.holding(tmp_path / "a"):
        pass
    assert names(tmp_path) == []


def test_folders_on_the_way_go_again_where_one_cannot_be_made(tmp_path):
    refusal(creating(tmp_path / "new" / ("y" * 300) / "out"))
    refusal(writing(tmp_path / "new" / ("y" * 300) / "a.html", None, "report"))
    assert names(tmp_path) == []


def test_two_links_to_a_file_are_one_place(tmp_path):
    (tmp_path / "there").mkdir()
    for name in ("one", "other"):
        (tmp_path / name).symlink_to(tmp_path / "there" / "a.html")
    with writing(tmp_path / "one", None, "report") as partial:
        partial.write_text("page")
        assert "another process is writing" in refusal(writing(tmp_path / "other", None, "report"))
    assert (tmp_path / "there" / "a.html").read_text() == "page"


def test_memory_that_runs_out_is_not_blamed_on_the_place(tmp_path):
    with pytest.raises(OSError, match="Cannot allocate"), writing(tmp_path / "a.html", None, "report"):
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
    assert names(tmp_path) == []


def test_a_folder_that_another_made_and_removed_is_made_again(tmp_path, monkeypatch):
    real = atomic.locks.holding

    def removed(target):
        monkeypatch.setattr(atomic.locks, "holding", real)
        target.parent.rmdir()
        return real(target)

    monkeypatch.setattr(atomic.locks, "holding", removed)
    with writing(tmp_path / "new" / "a.html", None, "report") as partial:
        partial.write_text("page")
    assert (tmp_path / "new" / "a.html").read_text() == "page"


@pytest.mark.parametrize("is_link", [False, True])
def test_no_device_or_pipe_is_replaced(is_link, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    place = tmp_path / "link" if is_link else pipe
    if is_link:
        place.symlink_to(pipe)
    assert "is no regular file" in refusal(replacing(place))
    assert pipe.is_fifo()
    assert place.is_symlink() == is_link
