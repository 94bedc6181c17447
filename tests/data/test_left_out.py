"""What is left out is counted by reason, and told in one line."""

from xushi.data.left_out import NOT_TEXT, REASONS, LeftOut, LeftOutList, counts, in_short, sentence


def listed(*names: str, reason: str = "binary") -> list[LeftOut]:
    found = LeftOutList()
    for name in names:
        found.add(reason, name)
    return found.listed()


def test_all_are_counted_and_the_first_two_named() -> None:
    assert listed("a", "b", "c") == [LeftOut(reason="binary", count=3, examples=["a", "b"])]
    assert listed() == []


def test_a_list_goes_on_from_another_and_leaves_it_as_it_is() -> None:
    before = listed("a")
    more = LeftOutList(before)
    for reason, name in (("binary", "b"), ("binary", "c"), ("hidden", ".x")):
        more.add(reason, name)
    assert [(each.reason, each.count, each.examples) for each in more.listed()] == [
        ("hidden", 1, [".x"]),  # in the order of REASONS
        ("binary", 3, ["a", "b"]),
    ]
    assert before[0].count == 1 and before[0].examples == ["a"]


def test_every_reason_has_a_count() -> None:
    totals = counts([listed("a", "b"), listed("c"), listed("d", reason="empty")])
    assert totals == dict.fromkeys(REASONS, 0) | {"binary": 3, "empty": 1}
    assert in_short(totals) == "3 binary files, 1 document without text"


def test_one_line_says_what_how_many_which_and_what_to_do() -> None:
    (three,) = listed("a.pdf", "b.pdf", "c.pdf", reason="formatted")
    assert sentence(three) == (
        "left out: 3 PDF and office documents (such as a.pdf and b.pdf); "
        "convert to plain text first"
    )
    (one,) = listed("a.bin")
    assert sentence(one) == "left out: 1 binary file (a.bin)"


def test_every_suffix_has_a_reason_with_a_remedy() -> None:
    assert all(REASONS[reason].remedy for reason in NOT_TEXT.values())
