"""What long work says of itself."""

from bestiary.data.progress import Report, Reporter


def test_rate_and_remaining_time_leave_out_what_was_done_before():
    report = Report("tokenising", done=60.0, total=100.0, unit="MB", seconds=10.0, resumed=40.0)
    assert report.rate == 2.0
    assert report.remaining == 20.0
    assert str(report) == "tokenising: 60.0 of 100.0 MB, 2.0 MB/s, 20 s left"


def test_unknown_totals_and_finished_work():
    assert str(Report("reading", 3.0, None, "MB", 2.0)) == "reading: 3.0 MB, 1.5 MB/s"
    assert str(Report("reading", 3.0, 3.0, "MB", 2.0)) == "reading: 3.0 of 3.0 MB, 1.5 MB/s"
    nothing_yet = Report("reading", 0.0, 3.0, "MB", 2.0)
    assert (nothing_yet.rate, nothing_yet.remaining) == (0.0, None)


def test_reports_come_at_intervals_and_at_the_end():
    heard: list[Report] = []
    often, seldom = Reporter("a", "MB", heard.append, interval=0.0), Reporter("b", "MB", heard.append, interval=60.0)
    for done in range(3):
        often(done, 3)
        seldom(done, 3)
    seldom(3, 3, final=True)
    assert [(report.task, report.done) for report in heard] == [("a", 0), ("a", 1), ("a", 2), ("b", 3)]
    Reporter("c", "MB", None)(1, 1, final=True)
